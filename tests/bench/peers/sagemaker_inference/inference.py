"""AWS's inference toolkit: the four functions of https://github.com/aws/sagemaker-inference-toolkit, one image a call.

The toolkit has no batching for a single model; more workers are its way to more cores.
"""

import json
from pathlib import Path

from classifier import load


def model_fn(model_dir, context=None):
    return load(Path(model_dir))


def input_fn(input_data, content_type, context=None):
    assert content_type == "image/jpeg"
    return bytes(input_data)


def predict_fn(data, model, context=None):
    return model.predict([model.decode(data)])[0]


def output_fn(prediction, accept, context=None):
    return json.dumps({"predictions": prediction}).encode()
