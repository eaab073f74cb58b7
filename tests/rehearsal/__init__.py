"""The journey to SageMaker without an account: AWS on this machine (`cloud`), walked through by `journey`."""
