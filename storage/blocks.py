"""What is placed and moved: tiers, file ranges, tensors and blocks. Torch-free."""

from dataclasses import dataclass
from enum import Enum
from math import prod

BlockKey = str
"""A block's name: the path of its module in the model, such as `model.layers.3`."""

TENSOR_ALIGNMENT_BYTES = 256
"""Where a tensor may start inside a slot: kernels give other bits below 16 bytes and run slower below 64."""

BLOCK_ALIGNMENT_BYTES = 4096
"""Where a block starts on disk and in host memory: what O_DIRECT takes everywhere."""

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8,
}  # fmt: skip


class Tier(Enum):
    """Where bytes live, fastest first."""

    DEVICE = "gpu"
    CPU = "cpu"
    DISK = "nvme"


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes of a file that hold one tensor.

    Attributes:
        crc32: what `zlib.crc32` of the bytes must be, where the file says; checked at the first read.
    """

    path: str
    offset: int
    nbytes: int
    crc32: int | None = None

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name in the model, its dtype (torch's name, without `torch.`) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * prod(self.shape)


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """What is placed and moved as one: a decoder layer, an embedding, a head."""

    key: BlockKey
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors alone, without padding."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the tensors one after another, each at a multiple of `TENSOR_ALIGNMENT_BYTES`."""
        return sum(align_up(tensor.nbytes) for tensor in self.tensors)


def align_up(value: int, alignment: int = TENSOR_ALIGNMENT_BYTES) -> int:
    return -(-value // alignment) * alignment


def align_down(value: int, alignment: int = TENSOR_ALIGNMENT_BYTES) -> int:
    return value // alignment * alignment
