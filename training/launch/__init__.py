"""From laptop to endpoint on Amazon SageMaker: `python -m training.launch COMMAND`. The only package that imports AWS's."""
