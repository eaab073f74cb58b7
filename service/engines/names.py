"""The engines' names, as settings and logs have them."""

from typing import Literal, get_args

EngineName = Literal["torch-cuda", "openvino-int8", "openvino-bf16", "openvino-fp32", "torch"]
NAMES: tuple[EngineName, ...] = get_args(EngineName)
Wanted = Literal["auto", EngineName]
