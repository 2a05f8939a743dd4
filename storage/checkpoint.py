"""Where each tensor of a safetensors checkpoint lies, from the headers alone."""

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from offload.storage.blocks import DTYPE_BYTES, FileRange, TensorSpec
from offload.storage.errors import CheckpointError, CorruptCheckpoint, MissingShard, UnsupportedCheckpoint
from offload.storage.fingerprint import fingerprint_of

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

_DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint and the bytes that hold it."""

    spec: TensorSpec
    range: FileRange


def read_checkpoint(folder: str, variant: str | None = None) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in `folder`, by their names in the files.

    Args:
        variant: a part of the file names, as in `model.fp16.safetensors`.

    Raises:
        MissingShard: if the index names a file that is not there.
        CorruptCheckpoint: if a header cannot be read or a file is shorter than its header says.
        UnsupportedCheckpoint: if the folder holds no safetensors, or a dtype that torch lacks.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder, variant):
        tensors.update(read_header(path))
    return tensors


def weight_files(folder: str, variant: str | None = None) -> list[str]:
    """The safetensors files of the checkpoint in `folder`, each of which exists."""
    index = index_of(folder, variant)
    single = Path(folder, of_variant(SINGLE_NAME, variant))
    if single.exists():
        return [str(single)]
    if not index.exists():
        raise no_safetensors(folder, sorted(path.name for path in Path(folder).glob("*")), single.name, index.name)
    names = indexed_files(index)
    missing = [name for name in names if name == "." or not _exists(Path(folder, name))]
    if missing:
        shown = ", ".join(name[:80] for name in missing[:4])
        raise MissingShard(
            f"{index} names {len(names)} files, and {len(missing)} of them are not in the folder: "
            f"{shown}. Download the checkpoint again, or copy the missing files beside the index."
        )
    return [str(Path(folder, name)) for name in names]


def index_of(folder: str, variant: str | None = None) -> Path:
    """Where the index of a sharded checkpoint is, if it is one."""
    return Path(folder, of_variant(INDEX_NAME, variant))


def indexed_files(index: Path) -> list[str]:
    """The files that an index names, relative to its folder.

    Raises:
        CorruptCheckpoint: if it is none.
    """
    try:
        return sorted({str(Path(name)) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{index} is not a safetensors index: {error!r}") from error


def _exists(path: Path) -> bool:
    """False too for what cannot be the name of a file."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_header(path: str) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        CorruptCheckpoint, UnsupportedCheckpoint: as `read_checkpoint` does.
    """
    header, data_start, size = _raw_header(path)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _stored(path, name, entry, data_start)
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].range.offset, item[1].range.nbytes)):
        if tensor.range.offset != end:
            what = "overlaps the tensor before it" if tensor.range.offset < end else "leaves a hole before it"
            raise CorruptCheckpoint(f"{path}: {name} {what}, which no safetensors file does. Download it again.")
        end = tensor.range.end
    if end != size:
        how = "truncated" if end > size else "longer than that"
        raise CorruptCheckpoint(
            f"{path} has {size:,} bytes and its header describes {end:,}: the file is {how}. Download it again."
        )
    return tensors


def dtypes_of(headers: Mapping[str, str]) -> list[str]:
    """torch's names for the dtypes in safetensors headers, by tensor; those that are not known are left out."""
    return [_DTYPES[kind] for kind in headers.values() if kind in _DTYPES]


def identity(path: str) -> dict[str, Any]:
    """What distinguishes a file from another under the same name: enough to key files derived from it.

    A file in the hub's cache is a link to a blob whose name is a hash of its content; any other file is told by its
    header, samples of its content, size, time and inode: it may have been overwritten in place, and its time set back.
    """
    real = os.path.realpath(path)
    if os.path.basename(os.path.dirname(real)) == "blobs":
        return {"blob": os.path.basename(real)}
    if not os.path.exists(real):
        # A file without a name is reached by its descriptor alone.
        real = path
    status = os.stat(real)
    return {
        "fingerprint": fingerprint_of(real),
        "size": status.st_size,
        "mtime": status.st_mtime_ns,
        "inode": status.st_ino,
    }


def _raw_header(path: str) -> tuple[dict[str, Any], int, int]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        if prefix == b"version ":
            raise CorruptCheckpoint(
                f"{path} ({size:,} bytes) is a pointer of git-lfs, and the file itself was not fetched: run `git lfs pull`"
            )
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _LARGEST_HEADER_BYTES + 1
        if length > min(size, _LARGEST_HEADER_BYTES):
            raise CorruptCheckpoint(f"{path} ({size:,} bytes) does not begin as a safetensors file does. Download it again.")
        try:
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise CorruptCheckpoint(f"{path}: the safetensors header cannot be read: {error}") from error
    return header, 8 + length, size


def _stored(path: str, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        kind = str(entry["dtype"])
        if not all(type(value) is int and value >= 0 for value in (begin, end, *shape)):
            raise ValueError(f"offsets and sizes are whole numbers, not {[begin, end, *shape]}")
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptCheckpoint(f"{path}: the header's entry for {name} cannot be read: {error!r}") from error
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise UnsupportedCheckpoint(f"{path}: {name} has the dtype {kind}, which offload cannot stream")
    if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise CorruptCheckpoint(f"{path}: {name} is {kind}{list(shape)}, and its bytes are {begin:,} to {end:,}")
    return StoredTensor(TensorSpec(name, dtype, shape), FileRange(path, data_start + begin, end - begin))


def of_variant(name: str, variant: str | None) -> str:
    """The name of a variant's file, as transformers makes it: `model.safetensors.index.fp16.json`."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def no_safetensors(place: str, files: Sequence[str], single: str, index: str) -> CheckpointError:
    """The error for a folder or a repository that has neither of both files, with what it has and what to do.

    Args:
        files: what is in it, by name.
    """
    pickles = [name for name in files if name.endswith(_PICKLE_SUFFIXES)]
    shards = [name for name in files if name.endswith(".safetensors")]
    if len(shards) > 1:
        return UnsupportedCheckpoint(
            f"{place} holds {len(shards)} safetensors files ({', '.join(shards[:3])}) and neither {single} nor {index}, which "
            "says what is in which. Copy it beside them."
        )
    if not pickles:
        return UnsupportedCheckpoint(f"{place} holds neither {single} nor {index}. Give a folder that `save_pretrained` wrote.")
    return UnsupportedCheckpoint(
        f"{place} holds its weights as pickle files ({', '.join(pickles[:3])}), which cannot be streamed. Convert once, "
        'on a machine with enough memory: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{place}', dtype='auto').save_pretrained('{place}-safetensors')\" "
        "(and copy the tokenizer's files)."
    )


def cache_first_pages(ranges: Iterable[FileRange]) -> None:
    """Have the first page of each range in the page cache, and no more.

    Who makes a view of a mapped file looks at its first byte: a page fault, for which the kernel reads megabytes around it.
    """
    by_path: dict[str, list[int]] = {}
    for item in ranges:
        by_path.setdefault(item.path, []).append(item.offset)
    for path, offsets in by_path.items():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            for offset in offsets:
                os.pread(descriptor, 1, offset)
        finally:
            os.close(descriptor)
