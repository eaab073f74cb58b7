"""A custom handler of TorchServe (https://pytorch.org/serve/custom_service.html) around the int8 model."""

from pathlib import Path

from classifier import load
from ts.torch_handler.base_handler import BaseHandler


class Handler(BaseHandler):
    def initialize(self, context):
        self.classifier = load(Path(context.system_properties["model_dir"]))
        self.initialized = True

    def preprocess(self, data):
        return [self.classifier.decode(bytes(row.get("data") or row.get("body"))) for row in data]

    def inference(self, data, *args, **kwargs):
        return self.classifier.predict(data)

    def postprocess(self, data):
        return data
