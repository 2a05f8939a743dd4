"""Weights in fewer bytes: what is decoded, against the packages that define the formats; and how blocks of them land."""

import random

import pytest
import torch

from offload.storage.blocks import FileRange, TensorSpec
from offload.storage.codecs.decode_speed import CODECS, decoded_bytes_per_second
from offload.storage.codecs.ggml import GgmlBlocks
from offload.storage.codecs.packed_integers import PackedColumns, PackedRows
from offload.storage.codecs.scaled_numbers import ScaledNumbers
from offload.storage.codecs.weights import Cast, EncodedTensor, parts_of
from offload.storage.errors import ConfigError
from offload.storage.gguf_header import GGML_TYPES
from offload.storage.load_plan import decoded_pieces, piece_rows, plan_load
from offload.storage.native.decoders import decode_ggml, decode_packed_columns, decode_packed_rows
from offload.storage.native.library import build, library
from tests.compiled import compiled_decoders

BLOCKS = {name: (numbers, nbytes) for name, numbers, nbytes in GGML_TYPES.values() if numbers > 1}


def same_bits(ours, theirs):
    """NaN is NaN, whichever."""
    kind = {4: torch.int32, 2: torch.int16}[ours.element_size()]
    told = ours.isnan(), theirs.isnan()
    return torch.equal(*told) and torch.equal(ours.view(kind)[~told[0]], theirs.view(kind)[~told[1]])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_ggml_type_is_decoded_as_gguf_does(kind, dtype, decoders):
    quants = pytest.importorskip("gguf").quants
    from gguf import GGMLQuantizationType

    numbers, nbytes = BLOCKS[kind]
    generator = torch.Generator().manual_seed(3)
    # All that bytes can be, scales that are no number or infinite among them.
    data = torch.randint(0, 256, (4096, nbytes), dtype=torch.uint8, generator=generator)
    wanted = torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[kind])).view(-1).to(dtype)
    out = torch.empty(4096 * numbers, dtype=dtype)
    GgmlBlocks(kind).decode([data.view(-1)], out)
    assert same_bits(out, wanted)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(
    ("scales", "grid"), [("float32", (2, 4)), ("bfloat16", (256, 1)), ("uint8", (1, 1)), ("float16", (4, 4))]
)
def test_scaled_numbers(kind, scales, grid, decoders):
    """Every byte, under scales of every form: a product in fp32, rounded once."""
    stored = torch.arange(256, dtype=torch.uint8).repeat(256).view(256, 256)
    factors = (
        torch.randint(100, 140, grid, dtype=torch.uint8) if scales == "uint8" else torch.rand(grid).to(getattr(torch, scales))
    )
    numbers = (factors.float() - 127).exp2() if scales == "uint8" else factors.float()
    spread = numbers.repeat_interleave(256 // grid[0], 0).repeat_interleave(256 // grid[1], 1)
    wanted = (stored.view(getattr(torch, kind)).float() * spread).bfloat16()
    out = torch.empty(256, 256, dtype=torch.bfloat16)
    ScaledNumbers(kind, scales, grid).decode([stored.view(-1), factors.view(torch.uint8).view(-1)], out)
    assert same_bits(out, wanted)


PACKED = [
    PackedRows(4, "bfloat16", 4, zeros=False),
    PackedRows(4, "float32", 4, zeros=True),
    PackedRows(4, "float16", 1, zeros=True),
    PackedRows(8, "float16", 36, zeros=False),
    PackedRows(8, "float32", 0, zeros=False),
    PackedColumns(4, "float16", 4, 1, awq=False),
    PackedColumns(8, "float16", 36, 0, awq=False),
    PackedColumns(4, "bfloat16", 4, 0, awq=True),
]


@pytest.mark.parametrize("codec", PACKED, ids=str)
def test_what_is_compiled_unpacks_the_same_bits(codec):
    """Of 40 outputs and 72 inputs, which fill no tile of it, and of groups in any order."""
    torch.manual_seed(5)
    outputs, inputs, bits = 40, 72, codec.bits
    groups = max(1, codec.groups)
    scales = torch.randn(groups * (outputs if codec.groups else 1)).to(getattr(torch, codec.scales)).view(torch.uint8)
    words = torch.randint(0, 256, (outputs * inputs * bits // 8,), dtype=torch.uint8)
    zeros = torch.randint(0, 256, (outputs * groups * bits // 8,), dtype=torch.uint8)
    if isinstance(codec, PackedRows):
        every = [[words, scales, *([zeros] if codec.zeros else [])]]
    else:
        order = torch.randint(0, groups, (inputs,), dtype=torch.int32).view(torch.uint8)
        every = [[words, zeros, scales], [words, zeros, scales, order]]
    for parts in every:
        wanted, out = torch.empty(outputs, inputs, dtype=torch.bfloat16), torch.empty(outputs, inputs, dtype=torch.bfloat16)
        codec.decode(parts, wanted)
        with compiled_decoders():
            codec.decode(parts, out)
        assert same_bits(out, wanted)


def test_a_kind_that_was_not_compiled_is_not_taken_for_decoded():
    data, out, scales = torch.zeros(64, dtype=torch.uint8), torch.full((2, 32), 7.0), torch.ones(2, 1)
    with compiled_decoders():
        assert not decode_ggml(9, data, 2, 1, out)
        assert not decode_packed_rows(3, data.view(torch.int32).view(2, -1), scales, None, out)
        assert not decode_packed_columns(5, data.view(torch.int32), scales, scales, torch.zeros(32, dtype=torch.int32), out)
    assert (out == 7.0).all()


def test_what_is_not_built_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_PROFILES", str(tmp_path))
    library.cache_clear()
    assert library() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler is not there"):
        build()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ConfigError, match="false failed with status 1"):
        build()
    assert not list(tmp_path.rglob("*.so*"))


def made(generator, path, offset):
    """A random source that begins at `offset` of the file, and the end of it."""
    shape = generator.choice([(64, 256), (3, 512), (640, 256), (256,), (1, 256), (5000, 256)])
    numbers = torch.Size(shape).numel()
    codec = generator.choice([None, Cast("float32"), GgmlBlocks("Q4_0"), GgmlBlocks("Q8_0"), GgmlBlocks("Q6_K"), "scaled"])
    name = str(offset)
    if codec == "scaled":
        shape = (64, 256)
        grid = generator.choice([(1, 1), (64, 1), (2, 4)])
        parts = FileRange(path, offset, 64 * 256), FileRange(path, offset + 64 * 256, grid[0] * grid[1] * 4)
        spec = TensorSpec(name, "bfloat16", shape)
        return EncodedTensor(spec, ScaledNumbers("float8_e4m3fn", "float32", grid), parts), parts[1].end
    if codec is None:
        return FileRange(path, offset, numbers * 2), offset + numbers * 2
    nbytes = numbers * 4 if isinstance(codec, Cast) else numbers // BLOCKS[codec.name][0] * BLOCKS[codec.name][1]
    place = FileRange(path, offset, nbytes)
    return EncodedTensor(TensorSpec(name, "bfloat16", shape), codec, (place,)), place.end


@pytest.mark.parametrize("apart", [False, True], ids=["in the slot", "apart"])
@pytest.mark.parametrize("seed", range(30))
def test_a_block_lands_whatever_it_is_made_of(seed, apart, decoders):
    """In a slot of just the bytes that the plan names, full of what was there before: nothing is overwritten too early."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    sources, offset = [], generator.randrange(5000)
    for _ in range(generator.randrange(1, 9)):
        source, offset = made(generator, "file", offset)
        offset += generator.choice([0, 0, 3, 9000])
        sources.append(source)
    generator.shuffle(sources)
    content = torch.randint(0, 256, (offset + 20_000,), dtype=torch.uint8)
    load_plan = plan_load(sources, 4096)
    slot = torch.full((load_plan.slot_bytes,), 0xFF, dtype=torch.uint8)
    memory = memoryview(slot.numpy())
    _read(load_plan, content.numpy(), load_plan.read_into(memory))
    if apart:
        # What was read stays in memory of its own, and is decoded from there more than once.
        stored = slot[load_plan.read_offset :].clone()
        slot.fill_(0xFF)
        load_plan.decode(slot, stored)
        slot[: load_plan.tensor_bytes].fill_(0xFF)
        load_plan.decode(slot, stored)
    else:
        load_plan.decode(slot)
    ends = []
    for source, at in zip(sources, load_plan.offsets, strict=True):
        assert at % 256 == 0
        parts = [content[part.offset : part.end].clone() for part in parts_of(source)]
        if isinstance(source, EncodedTensor):
            wanted = torch.empty(source.spec.shape, dtype=torch.bfloat16)
            source.codec.decode(parts, wanted)
            assert same_bits(slot[at : at + source.nbytes].view(torch.bfloat16).view(source.spec.shape), wanted)
            pieces = torch.cat(list(decoded_pieces(source, parts)))
            assert same_bits(pieces, wanted)
        else:
            assert torch.equal(slot[at : at + source.nbytes], parts[0])
        ends.append((at, at + source.nbytes))
    ends.sort()
    assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:], strict=False))
    assert load_plan.tensor_bytes == max(end for _, end in ends)


def _read(load_plan, content, memory):
    """As the disk would."""
    for read in load_plan.read_plan.reads:
        part = content[read.file_offset : read.file_offset + read.nbytes]
        memory[read.slot_offset : read.slot_offset + len(part)] = memoryview(part)
    for move in load_plan.read_plan.moves:
        memory[move.target : move.target + move.nbytes] = bytes(memory[move.source : move.source + move.nbytes])


def test_a_slot_takes_hardly_more_than_the_plain_tensors():
    sources, offset = [], 0
    for rows in (4096, 1024, 1024, 4096, 11008, 11008, 4096):
        nbytes = rows * 4096 // 32 * 18
        spec = TensorSpec(str(offset), "bfloat16", (rows, 4096))
        sources.append(EncodedTensor(spec, GgmlBlocks("Q4_0"), (FileRange("file", offset, nbytes),)))
        offset += nbytes
    load_plan = plan_load(sources, 4096)
    assert load_plan.slot_bytes <= sum(source.nbytes for source in sources) + 16384
    assert all(piece_rows(source) * 8192 <= 1 << 20 for source in sources)


@pytest.mark.parametrize("name", [*CODECS, "float32", "float16"])
def test_every_codec_can_be_timed(name):
    assert decoded_bytes_per_second(name, "bfloat16") > 0
