"""The words that options take. Nothing else is imported with them, so that a command can name them at once."""

from typing import Literal

Exactness = Literal["identical", "rounding"]
WeightEncoding = Literal["as-is", "int8", "int4", "nf4"]
WeightDtype = Literal["auto", "bfloat16", "float16", "float32"]

KvPolicy = Literal["none", "int8", "int4", "window", "retrieve"]
ExpertPolicy = Literal["auto", "lru", "lfu", "admission", "layers"]
ExpertMisses = Literal["auto", "load", "cpu"]
ExpertPrefetch = Literal["auto", "on", "off"]
SlotScope = Literal["global", "layer"]

TrainingMethod = Literal["lora", "full"]
Optimizer = Literal["adamw", "adamw8bit", "sgd"]
StateTier = Literal["cpu", "nvme"]
ActivationTier = Literal["recompute", "gpu", "cpu", "nvme"]
MasterDtype = Literal["float32", "none"]

Family = Literal["llama", "mistral", "qwen3", "gemma3", "qwen3_moe"]
SyntheticDtype = Literal["bfloat16", "float16", "float32"]
