"""GGUF files: their tensors by the names that transformers' model has, decoded as its own loading would.

The tables are transformers' (`modeling_gguf_pytorch_utils`): config, names, and for each architecture what llama.cpp's
converter did to the values, which is undone here: to rows before decoding, to values after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.model.quantised.gguf_files import made_once, parts_of
from offload.model.quantised.weights import StoredWeights
from offload.storage.blocks import TensorSpec
from offload.storage.checkpoint import StoredTensor
from offload.storage.codecs.ggml import GgmlBlocks
from offload.storage.codecs.weights import Cast, EncodedTensor, WeightCodec
from offload.storage.errors import CorruptCheckpoint, UnsupportedCheckpoint, foreign_file
from offload.storage.gguf_header import read_gguf_header

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows that were put into another order for rotary embeddings: in each head, the two halves took turns.

    Attributes:
        head_rows: of one head.
    """

    inner: WeightCodec
    head_rows: int

    @property
    def name(self) -> str:
        return self.inner.name

    def decode(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        if isinstance(self.inner, GgmlBlocks) and self.inner.decode_natively(parts[0], out, self.head_rows):
            return
        turns = torch.empty_like(out)
        self.inner.decode(parts, turns)
        half = self.head_rows // 2
        out.view(-1, 2, half, *out.shape[1:]).copy_(turns.view(-1, half, 2, *out.shape[1:]).transpose(1, 2))

    def rows_together(self, shape: Sequence[int]) -> int:
        return self.head_rows if self.inner.rows_together(shape) == 1 else shape[0]


@dataclass(frozen=True, slots=True)
class LessOne:
    """Values that one was added to."""

    inner: WeightCodec

    @property
    def name(self) -> str:
        return self.inner.name

    def decode(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        values = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        self.inner.decode(parts, values)
        out.copy_(values - 1)

    def rows_together(self, shape: Sequence[int]) -> int:
        return self.inner.rows_together(shape)


Undo = Callable[[str, int, WeightCodec, Any], WeightCodec]
"""From a tensor's name in the file, its rows, its codec and the model's config: the codec that undoes the converter, too."""


def _as_it_is(name: str, rows: int, codec: WeightCodec, config: Any) -> WeightCodec:
    return codec


def _of_llama(name: str, rows: int, codec: WeightCodec, config: Any) -> WeightCodec:
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    count = next((count for part, count in heads.items() if part in name), None)
    return codec if count is None else HeadRows(codec, rows // count)


def _of_gemma(name: str, rows: int, codec: WeightCodec, config: Any) -> WeightCodec:
    return LessOne(codec) if "norm.weight" in name else codec


_UNDONE: dict[str, Undo] = {
    "TensorProcessor": _as_it_is,
    "LlamaTensorProcessor": _of_llama,
    "Gemma2TensorProcessor": _of_gemma,
    "NemotronTensorProcessor": _of_gemma,
}
"""What transformers' class for an architecture does to a tensor, by the class's name; others are refused."""


class GgufFile:
    """One checkpoint, the headers of its files read.

    Args:
        path: of its first file.

    Raises:
        UnsupportedCheckpoint: if it holds what cannot be decoded here.
        CorruptCheckpoint: if it is no such file, or cut short.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        headers = [read_gguf_header(part) for part in parts_of(path)]
        self.architecture = str(headers[0].values.get("general.architecture"))
        self._tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
        count = headers[0].values.get("split.count", 1)
        if count > len(headers) or len(self._tensors) != sum(len(header.tensors) for header in headers):
            raise CorruptCheckpoint(
                f"{path} says that it is one of {count} parts, of different tensors; by its name there are {len(headers)}"
            )

    def weights(self, outline: nn.Module, dtype: torch.dtype) -> StoredWeights:
        """Tell what it holds, for a model of that outline in that dtype."""
        config: Any = outline.config
        undone, names = self._tables(outline, config)
        plain: dict[str, StoredTensor] = {}
        encoded: dict[str, EncodedTensor] = {}
        for stored_name, tensor in self._tensors.items():
            if stored_name not in names:
                continue
            name = names[stored_name]
            codec = undone(stored_name, tensor.shape[0], _codec_of(tensor.kind), config)
            if isinstance(codec, Cast) and getattr(torch, codec.dtype) == dtype:
                plain[name] = StoredTensor(TensorSpec(name, codec.dtype, tensor.shape), tensor.range)
            else:
                spec = TensorSpec(name, str(dtype).removeprefix("torch."), tensor.shape)
                encoded[name] = EncodedTensor(spec, codec, (tensor.range,))
        return StoredWeights(plain, encoded, tuple(name for name in self._tensors if name not in names))

    def _tables(self, outline: nn.Module, config: Any) -> tuple[Undo, dict[str, str]]:
        from transformers import modeling_gguf_pytorch_utils

        tables: Any = modeling_gguf_pytorch_utils
        kind = tables.TENSOR_PROCESSORS.get(self.architecture, tables.TensorProcessor)
        if kind.__name__ not in _UNDONE:
            raise UnsupportedCheckpoint(
                f"{self.path} is of the architecture {self.architecture!r}, whose GGUF tensors are put together in another way "
                "than the model's: not read yet. Use the safetensors checkpoint."
            )
        unknown = f"{self.path}: transformers knows no names for the tensors of {self.architecture!r}"
        with made_once("get_tensor_name_map"), foreign_file(unknown, UnsupportedCheckpoint):
            names: dict[str, str] = tables.get_gguf_hf_weights_map(outline, kind(config=config.to_dict()))
        return _UNDONE[kind.__name__], names


def _codec_of(kind: str) -> WeightCodec:
    return Cast(_PLAIN[kind]) if kind in _PLAIN else GgmlBlocks(kind)
