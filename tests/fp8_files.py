"""Checkpoints with weights in 8-bit floats."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SCALES = {
    "tiles": lambda shape: torch.rand(shape[0] // 64, shape[1] // 64) * 0.02,
    "bf16 tiles": lambda shape: (torch.rand(shape[0] // 64, shape[1] // 64) * 0.02).bfloat16(),
    "exponents": lambda shape: torch.randint(118, 122, (shape[0] // 64, shape[1] // 64), dtype=torch.uint8),
    "rows": lambda shape: torch.rand(shape[0], 1) * 0.02,
    "one": lambda shape: torch.tensor([[0.01]]),
}
"""The forms that scales have, by the shape of the weight."""


def in_eight_bits(folder: Path, scales: str = "tiles", without: tuple[str, ...] = ()) -> None:
    """Rewrite a saved model: its products' weights as fp8, with scales beside them.

    Args:
        without: tensors to leave out.
    """
    torch.manual_seed(0)
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        tensors[name] = value
        if value.dim() == 2 and ("proj" in name or "experts" in name):
            tensors[name] = (value.float() * 100).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = SCALES[scales](value.shape)
    kept = {name: value for name, value in tensors.items() if name not in without}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "fp8", "weight_block_size": [64, 64], "dequantize": True, "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": method}))
