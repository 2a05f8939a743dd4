"""Which quantisations of safetensors checkpoints are read as they are."""

from collections.abc import Callable, Mapping
from typing import Any

from offload.model.quantised.bitsandbytes import bitsandbytes_weights
from offload.model.quantised.fp8 import fp8_weights
from offload.model.quantised.integers import awq_weights, compressed_tensors_weights, gptq_weights
from offload.model.quantised.parts import Shapes, Stored
from offload.model.quantised.weights import StoredWeights

READERS: dict[str, Callable[[Stored, Mapping[str, Any], str, Shapes], StoredWeights]] = {
    "fp8": fp8_weights,
    "compressed-tensors": compressed_tensors_weights,
    "gptq": gptq_weights,
    "awq": awq_weights,
    "bitsandbytes": bitsandbytes_weights,
}
"""Readers by `quant_method`: given the files' tensors, what the config says, the dtype to decode to, the model's shapes."""
