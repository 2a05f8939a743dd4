"""The header of GGUF files, against the reader of the package `gguf`; and files that are none."""

import random
import struct
from pathlib import Path

import pytest

from offload.storage.errors import CheckpointError, CorruptCheckpoint
from offload.storage.gguf_header import read_gguf_header

gguf = pytest.importorskip("gguf")
from tests.gguf_files import write_gguf  # noqa: E402


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", "llama", ["Q4_K", "F16", "Q8_0", "MXFP4"])


def test_it_tells_what_the_package_tells(path):
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for theirs in reader.tensors:
        ours = header.tensors[theirs.name]
        assert ours.shape == tuple(int(count) for count in reversed(theirs.shape))
        assert ours.kind == theirs.tensor_type.name
        assert (ours.range.offset, ours.range.nbytes) == (theirs.data_offset, theirs.n_bytes)
    plain = {key for key, field in reader.fields.items() if not key.startswith("GGUF.") and len(field.types) == 1}
    assert set(header.values) == plain
    assert all(header.values[key] == reader.fields[key].contents() for key in plain)


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_an_error_of_ours(path, seed, tmp_path):
    generator = random.Random(seed)
    content = bytearray(Path(path).read_bytes())
    header_bytes = read_gguf_header(path).tensors["token_embd.weight"].range.offset
    at = generator.randrange(header_bytes)
    if generator.random() < 0.5:
        content = content[:at]
    else:
        struct.pack_into("<Q", content, at, generator.choice([0, 1, 1 << 31, 1 << 62, (1 << 64) - 1]))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        read_gguf_header(str(damaged))
    except CheckpointError as error:
        assert str(damaged) in str(error)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(40), b"GGUF" + struct.pack("<IQQ", 1, 0, 0)])
def test_what_is_no_gguf_is_named(content, tmp_path):
    path = tmp_path / "none.gguf"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="GGUF"):
        read_gguf_header(str(path))
