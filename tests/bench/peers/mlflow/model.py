"""MLflow: a custom model from code (https://mlflow.org/docs/latest/ml/model/models-from-code/), images as base64.

The scoring server takes JSON, so an image travels as base64, which the documentation suggests for binary data; each
request is one row. The server has no batching; more workers are its way to more cores.
"""

import base64

import mlflow
from mlflow.pyfunc import PythonModel


class ImageClassifier(PythonModel):
    def load_context(self, context):
        from classifier import load

        self.classifier = load()

    def predict(self, context, model_input, params=None):
        images = [self.classifier.decode(base64.b64decode(row)) for row in model_input["image"]]
        return self.classifier.predict(images)


mlflow.models.set_model(ImageClassifier())
