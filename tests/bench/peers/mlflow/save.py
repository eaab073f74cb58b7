"""Saves the model of model.py as an MLflow model; `mlflow models serve` then serves the folder."""

import sys
from pathlib import Path

import mlflow
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, Schema

if __name__ == "__main__":
    mlflow.pyfunc.save_model(
        sys.argv[1],
        python_model=str(Path(__file__).parent / "model.py"),
        signature=ModelSignature(inputs=Schema([ColSpec("string", "image")])),
        pip_requirements=["mlflow"],
    )
