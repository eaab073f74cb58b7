"""From laptop to endpoint on Amazon SageMaker: `python -m training.launch COMMAND`. Only this package imports boto3."""
