"""Random-weight checkpoints of any size, written without holding them in memory: to try and measure at scale."""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from numpy.typing import NDArray

from offload.storage.blocks import DTYPE_BYTES
from offload.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from offload.storage.errors import ConfigError, DiskFolderError, DiskFull, gib

_LAYERS_WANTED = 24
_SMALL_VOCAB, _LARGE_VOCAB = 2048, 32_000
_LARGE_VOCAB_FROM_BYTES = 500 << 20
_POOL_ELEMENTS = 1 << 22
_PIECE_ELEMENTS = 1 << 20
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes from which a family makes its config."""

    hidden: int
    layers: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return 128 if self.hidden >= 2048 else 64

    @property
    def common(self) -> dict[str, Any]:
        heads = self.hidden // self.head_dim
        # At most a quarter of the heads, and a divisor of their number: each key serves as many queries.
        kv_heads = next(count for count in range(max(1, heads // 4), 0, -1) if heads % count == 0)
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.hidden * 7 // 2,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }


def _llama(shape: Shape) -> Any:
    return transformers.LlamaConfig(**shape.common)


def _mistral(shape: Shape) -> Any:
    return transformers.MistralConfig(**shape.common)


def _qwen3(shape: Shape) -> Any:
    return transformers.Qwen3Config(**shape.common)


def _gemma3(shape: Shape) -> Any:
    return transformers.Gemma3TextConfig(**(shape.common | {"tie_word_embeddings": True, "sliding_window": 512}))


def _qwen3_moe(shape: Shape) -> Any:
    return transformers.Qwen3MoeConfig(
        **shape.common, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=shape.hidden // 2
    )


FAMILIES: dict[str, Callable[[Shape], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "qwen3_moe": _qwen3_moe,
}


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def synthesize(
    folder: str,
    size_bytes: int,
    *,
    family: str = "llama",
    dtype: str = "bfloat16",
    shard_bytes: int = 2 << 30,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a checkpoint of about `size_bytes` to `folder`, with a tokenizer.

    Args:
        folder: made if need be; must be empty.
        size_bytes: of the weights; met within a few percent, since layers are whole.
        family: one of `FAMILIES`.
        dtype: bfloat16, float16 or float32.
        shard_bytes: no file is larger, a single larger tensor excepted.
        seed: the same one gives the same bytes.
        progress: told (done, total) bytes.

    Returns:
        The bytes of weights that were written.

    Raises:
        ConfigError: for an unknown family or dtype, or a size too small for a model.
        DiskFolderError, DiskFull: if it cannot be written; nothing is left behind then.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family={family!r} is not known; give one of {', '.join(FAMILIES)}")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known; give one of {', '.join(_DTYPES)}")
    _check_room(folder, size_bytes)
    config, entries = _choose(family, size_bytes, DTYPE_BYTES[dtype])
    _make(folder)
    config.dtype = getattr(torch, dtype)
    written: list[Path] = []
    try:
        total = _write_shards(Path(folder), entries, dtype, shard_bytes, seed, progress, written)
    except BaseException as error:
        for path in written:
            path.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise DiskFull(f"{folder} could not take {gib(size_bytes)}: {error.strerror}; what was written is removed") from error
    config.save_pretrained(folder)
    _write_tokenizer(Path(folder), config.vocab_size)
    return total


def _make(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise DiskFolderError(f"the folder {folder} cannot be made: {error.strerror}") from error
    if os.listdir(folder):
        raise DiskFolderError(f"the folder {folder} is not empty; name another, or delete what is in it")


def _check_room(folder: str, size_bytes: int) -> None:
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    disk = os.statvfs(existing)
    if disk.f_bavail * disk.f_frsize < size_bytes:
        raise DiskFull(f"{gib(size_bytes)} were asked for, and {folder} has {gib(disk.f_bavail * disk.f_frsize)} free")


def _choose(family: str, size_bytes: int, element_bytes: int) -> tuple[Any, list[_Entry]]:
    """The config whose weights come nearest to the size, with about `_LAYERS_WANTED` layers."""
    vocab = _LARGE_VOCAB if size_bytes >= _LARGE_VOCAB_FROM_BYTES else _SMALL_VOCAB
    best: tuple[int, Any] | None = None
    for hidden in range(256, 16_384, 256):
        fixed, layer = _parts(family, Shape(hidden, 1, vocab), element_bytes)
        layers = round((size_bytes - fixed) / layer)
        if layers < 2:
            break
        error = abs(fixed + layers * layer - size_bytes)
        if best is None or abs(layers - _LAYERS_WANTED) <= _LAYERS_WANTED // 3 or layers > _LAYERS_WANTED:
            penalty = error + abs(layers - _LAYERS_WANTED) * size_bytes // 100
            if best is None or penalty < best[0]:
                best = penalty, FAMILIES[family](Shape(hidden, layers, vocab))
    if best is None:
        fixed, layer = _parts(family, Shape(256, 1, vocab), element_bytes)
        raise ConfigError(f"{gib(size_bytes)} is too small for a {family} model; the smallest has {gib(fixed + 2 * layer)}")
    return best[1], _entries(best[1])


def _parts(family: str, shape: Shape, element_bytes: int) -> tuple[int, int]:
    """Bytes outside of the layers, and of one layer."""
    entries = _entries(FAMILIES[family](shape))
    total = sum(entry.elements for entry in entries)
    layer = sum(entry.elements for entry in entries if ".layers.0." in entry.name)
    return (total - layer) * element_bytes, layer * element_bytes


def _entries(config: Any) -> list[_Entry]:
    """The tensors of a checkpoint as they are published: experts one by one, tied weights once."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    entries: list[_Entry] = []
    for name, parameter in model.named_parameters():
        entries += _published(name, tuple(parameter.shape))
    return entries


def _published(name: str, shape: tuple[int, ...]) -> Iterator[_Entry]:
    prefix, _, kind = name.rpartition(".experts.")
    if kind not in ("gate_up_proj", "down_proj"):
        yield _Entry(name, shape)
        return
    experts, rows, columns = shape
    for expert in range(experts):
        if kind == "down_proj":
            yield _Entry(f"{prefix}.experts.{expert}.down_proj.weight", (rows, columns))
        else:
            yield _Entry(f"{prefix}.experts.{expert}.gate_proj.weight", (rows // 2, columns))
            yield _Entry(f"{prefix}.experts.{expert}.up_proj.weight", (rows // 2, columns))


def _write_shards(
    folder: Path,
    entries: list[_Entry],
    dtype: str,
    shard_bytes: int,
    seed: int,
    progress: Callable[[int, int], None],
    written: list[Path],
) -> int:
    element_bytes = DTYPE_BYTES[dtype]
    shards = list(_shards(entries, shard_bytes // element_bytes))
    total = sum(entry.elements for entry in entries) * element_bytes
    weights = _RandomWeights(seed, dtype)
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written.append(folder / name)
        weight_map |= {entry.name: name for entry in shard}
        with open(folder / name, "wb") as file:
            file.write(_header(shard, dtype))
            for entry in shard:
                for piece in weights.pieces(entry):
                    file.write(piece.data)
                    done += piece.nbytes
                progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))
    return total


def _shards(entries: list[_Entry], shard_elements: int) -> Iterator[list[_Entry]]:
    shard: list[_Entry] = []
    held = 0
    for entry in entries:
        if shard and held + entry.elements > shard_elements:
            yield shard
            shard, held = [], 0
        shard.append(entry)
        held += entry.elements
    yield shard


def _header(shard: list[_Entry], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        begin, end = end, end + entry.elements * DTYPE_BYTES[dtype]
        header[entry.name] = {"dtype": _DTYPES[dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _RandomWeights:
    """Normal numbers, drawn once into a pool; a tensor is put together of pieces from random places in it.

    So no two tensors are alike, and writing is as fast as the disk.
    """

    def __init__(self, seed: int, dtype: str) -> None:
        self._random = numpy.random.default_rng(seed)
        self._dtype = dtype
        self._normal = self._random.standard_normal(_POOL_ELEMENTS + _PIECE_ELEMENTS, dtype=numpy.float32)
        self._scaled: dict[float, NDArray[Any]] = {}

    def pieces(self, entry: _Entry) -> Iterator[NDArray[Any]]:
        if len(entry.shape) == 1:
            value = 1.0 if entry.name.endswith("norm.weight") else 0.0
            yield self._stored(numpy.full(entry.elements, value, dtype=numpy.float32))
            return
        pool = self._pool(round(1 / math.sqrt(entry.shape[-1]), 4))
        for start in range(0, entry.elements, _PIECE_ELEMENTS):
            at = int(self._random.integers(_POOL_ELEMENTS))
            yield pool[at : at + min(_PIECE_ELEMENTS, entry.elements - start)]

    def _pool(self, deviation: float) -> NDArray[Any]:
        if deviation not in self._scaled:
            self._scaled[deviation] = self._stored(self._normal * numpy.float32(deviation))
        return self._scaled[deviation]

    def _stored(self, values: NDArray[Any]) -> NDArray[Any]:
        if self._dtype == "float32":
            return values
        # numpy has no bfloat16: the bits are passed on as integers.
        tensor = torch.from_numpy(values).to(getattr(torch, self._dtype)).view(torch.int16)
        return numpy.asarray(tensor.numpy())


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """The demo model's tokenizer, with filler tokens up to the vocabulary's size."""
    demo = resources.files("offload") / "demo"
    tokenizer = json.loads((demo / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"<{index}>": index for index in range(len(vocab), vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text((demo / "tokenizer_config.json").read_text())
