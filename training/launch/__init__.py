"""From laptop to endpoint on Amazon SageMaker: `python -m training.launch COMMAND`.

Of `training`, only this package imports boto3.
"""
