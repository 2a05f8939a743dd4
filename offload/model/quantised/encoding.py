"""Plain checkpoints whose weights are encoded here, once, into a file that is streamed from then on: lossy.

The linear weights of the layers, and the head; never routers, norms, biases, or tables that are read by row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from offload.model.blocks import find_structure
from offload.model.encoding import AS_IS, GROUP, Encoding
from offload.model.quantised.weights import StoredWeights
from offload.scheduler.model_spec import BlockRole
from offload.storage.block_file import BlockFile, BlockFileWriter, spill_folder
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, DTYPE_BYTES, FileRange, TensorSpec, align_up
from offload.storage.checkpoint import StoredTensor
from offload.storage.codecs.four_bits import FourBits
from offload.storage.codecs.packed_integers import PackedRows
from offload.storage.codecs.scaled_numbers import ScaledNumbers
from offload.storage.codecs.weights import Cast, EncodedTensor, Source, WeightCodec

_PIECE_NUMBERS = 1 << 20
_SCALE = "bfloat16"
_ROUTERS = (".gate.weight", ".router.weight", "_gate.weight")

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # fmt: skip
"""QLoRA, arXiv 2305.14314, appendix E."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How one matrix is stored: its codec, and the dtypes and shapes of its parts."""

    codec: WeightCodec
    parts: tuple[tuple[str, tuple[int, ...]], ...]


Forms = Mapping[str, tuple[str, _Form]]
"""Weights that are encoded, by name: the kind, and the form."""


def _form(kind: str, shape: Sequence[int]) -> _Form | None:
    """None for a matrix that this kind does not fit."""
    rows, columns = shape
    if kind == "int8":
        return _Form(ScaledNumbers("int8", _SCALE, (rows, 1)), (("int8", (rows, columns)), (_SCALE, (rows, 1))))
    if columns % GROUP:
        return None
    groups = columns // GROUP
    if kind == "int4":
        words = ("int32", (rows, columns // 8))
        return _Form(PackedRows(4, _SCALE, groups, zeros=False), (words, (_SCALE, (rows, groups))))
    codec = FourBits(kind, GROUP)
    return _Form(codec, (("uint8", (rows, columns // 2)), ("float32", (rows, groups)), ("float32", (16,))))


def encode(values: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """Encode some rows.

    Args:
        values: [rows, columns].
        kind: `int8`, `int4` or `nf4`; for those of four bits columns are a multiple of their groups.

    Returns:
        The parts, in the order in which the codec takes them; but for the numbers that four bits stand for.
    """
    values = values.float()
    if kind == "int8":
        scales = values.abs().amax(1, keepdim=True).div_(127).bfloat16()
        levels = values.div(scales.float().clamp_(min=torch.finfo(torch.float32).tiny)).round_().clamp_(-127, 127)
        return [levels.to(torch.int8), scales]
    grouped = values.view(len(values), -1, GROUP)
    furthest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    if kind == "int4":
        # The number furthest from zero is -8 times the scale, of whichever sign.
        scales = furthest.div(-8).bfloat16()
        safe = torch.where(scales == 0, 1, scales.float())
        levels = grouped.div(safe).round_().clamp_(-8, 7).add_(8).to(torch.int32).view(len(values), -1, 8)
        words = torch.zeros(levels.shape[:2], dtype=torch.int32)
        for place in range(8):
            words |= levels[:, :, place] << (4 * place)
        return [words, scales[:, :, 0]]
    scales = furthest.abs()
    near = grouped.div(torch.where(scales == 0, 1, scales))
    numbers = torch.tensor(NF4)
    places = torch.bucketize(near, (numbers[1:] + numbers[:-1]) / 2).to(torch.uint8).view(len(values), -1, 2)
    return [places[:, :, 0] << 4 | places[:, :, 1], scales[:, :, 0]]


def forms_of(outline: nn.Module, encoding: Encoding) -> Forms:
    """Which weights of a model are encoded."""
    forms: dict[str, tuple[str, _Form]] = {}
    linear = {f"{name}.weight": module for name, module in outline.named_modules() if type(module) is nn.Linear}
    layers = {
        name
        for unit in find_structure(outline).units
        if unit.role is BlockRole.LAYER
        for name in unit.parameters
        if name in linear and not name.endswith(_ROUTERS)
    }
    head, embeddings = _of(outline, "get_output_embeddings"), _of(outline, "get_input_embeddings")
    for name, module in linear.items():
        is_head = module is head and getattr(embeddings, "weight", None) is not module.weight
        kind = encoding.layers if name in layers else encoding.head if is_head else AS_IS
        form = None if kind == AS_IS else _form(kind, module.weight.shape)
        if form is not None:
            forms[name] = kind, form
    return forms


def as_found(encoding: Encoding, outline: nn.Module, forms: Forms) -> Encoding:
    """What is really encoded: a head that is tied to a table is not."""
    head = _of(outline, "get_output_embeddings")
    names = [name for name, module in outline.named_modules() if module is head]
    return encoding if any(f"{name}.weight" in forms for name in names) else replace(encoding, head=AS_IS)


def _of(outline: nn.Module, method: str) -> nn.Module | None:
    found = getattr(outline, method, None)
    try:
        module: nn.Module | None = None if found is None else found()
    except (AttributeError, NotImplementedError):
        return None
    return module


def expected_source(spec: TensorSpec, forms: Forms) -> Source:
    """What a tensor will be made of while nothing is written yet: of the sizes that it will have."""
    if spec.name not in forms:
        return FileRange(f"{spec.name} as it is", 0, spec.nbytes)
    parts, end, form = [], 0, forms[spec.name][1]
    for kind, sizes in form.parts:
        parts.append(FileRange(f"{spec.name} encoded", end, DTYPE_BYTES[kind] * prod(sizes)))
        end = align_up(parts[-1].end, BLOCK_ALIGNMENT_BYTES)
    return EncodedTensor(spec, form.codec, tuple(parts))


def encoded_weights(
    stored: Mapping[str, StoredTensor],
    view: Callable[[StoredTensor], torch.Tensor],
    forms: Forms,
    dtype: str,
    folder: str | None,
    key: str,
    progress: Callable[[int, int], None],
) -> tuple[StoredWeights, BlockFile]:
    """Encode a checkpoint, or find what was encoded before.

    Args:
        view: of a tensor's bytes in its file.
        dtype: that is decoded to, torch's name.
        folder: keeps the file, by `key`; None for a file that vanishes with the process.
        progress: told of the bytes that are done, and of all.
    """
    file = None if folder is None else BlockFile.open(folder, key)
    if file is None:
        file = _written(stored, view, forms, BlockFileWriter(folder or spill_folder(), key if folder else None), progress)
    plain: dict[str, StoredTensor] = {}
    encoded: dict[str, EncodedTensor] = {}
    for name, tensor in stored.items():
        spec = TensorSpec(name, dtype, tensor.spec.shape)
        if name in forms:
            form = forms[name][1]
            ranges = tuple(file.tensors[f"{name}/{place}"].range for place in range(len(form.parts)))
            encoded[name] = EncodedTensor(spec, form.codec, ranges)
        elif tensor.spec.dtype == dtype or not tensor.spec.dtype.startswith(("float", "bfloat")):
            plain[name] = tensor
        else:
            encoded[name] = EncodedTensor(spec, Cast(tensor.spec.dtype), (tensor.range,))
    return StoredWeights(plain, encoded), file


def _written(
    stored: Mapping[str, StoredTensor],
    view: Callable[[StoredTensor], torch.Tensor],
    forms: Forms,
    writer: BlockFileWriter,
    progress: Callable[[int, int], None],
) -> BlockFile:
    done, total = 0, sum(stored[name].spec.nbytes for name in forms if name in stored)
    try:
        for name, (kind, form) in forms.items():
            pieces = [encode(piece, kind) for piece in _rows(view(stored[name]))]
            whole = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
            if kind == "nf4":
                whole.append(torch.tensor(NF4))
            for place, (part, (_, shape)) in enumerate(zip(whole, form.parts, strict=True)):
                writer.add(f"{name}/{place}", part.view(shape), name)
            done += stored[name].spec.nbytes
            progress(done, total)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _rows(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some rows after others: in fp32 they take memory of their own."""
    step = max(1, _PIECE_NUMBERS // max(1, matrix.shape[1]))
    for begin in range(0, len(matrix), step):
        yield matrix[begin : begin + step]
