"""Starts the multi-model server the toolkit's way; a container would write its settings to /etc, we to our folder."""

import os
from pathlib import Path

from sagemaker_inference import model_server

if __name__ == "__main__":
    model_server.MMS_CONFIG_FILE = str(Path(os.environ["SAGEMAKER_BASE_DIR"]) / "mms.properties")
    model_server.start_model_server()
