"""What every codec does, whoever uses it."""

import pytest
import torch

from offload.storage.codecs.affine_groups import AffineGroups
from offload.storage.codecs.base import Codec
from offload.storage.codecs.power_blocks import PowerBlocks

CODECS = [
    (AffineGroups(8), 0.01),
    (AffineGroups(4), 0.1),
    (PowerBlocks(torch.int8, 2), 0.02),
    (PowerBlocks(torch.uint8, 4), 0.02),
]


@pytest.fixture(params=CODECS, ids=lambda case: case[0].name)
def case(request) -> tuple[Codec, float]:
    return request.param


def encoded(codec: Codec, values: torch.Tensor) -> list[torch.Tensor]:
    parts = codec.parts(*values.shape, values.device)
    codec.encode(values, parts)
    return parts


@pytest.mark.parametrize("length", [1, 7, 32, 33, 256, 257, 1000])
def test_what_is_decoded_is_near(case, length):
    codec, most = case
    values = torch.randn(5, length, generator=torch.Generator().manual_seed(1)).abs()
    parts = encoded(codec, values)
    assert sum(part.nbytes for part in parts) == 5 * codec.nbytes(length)
    found = codec.decode(parts, length)
    assert found.shape == values.shape
    assert found.dtype == torch.float32
    assert (found - values).norm() <= most * values.norm()


def test_a_line_does_not_depend_on_the_others(case):
    codec, _ = case
    values = torch.randn(3, 300, generator=torch.Generator().manual_seed(2)).abs()
    together = codec.decode(encoded(codec, values), 300)
    alone = torch.cat([codec.decode(encoded(codec, values[row : row + 1]), 300) for row in range(3)])
    assert torch.equal(together, alone)


def test_zeros_stay_zeros(case):
    codec, _ = case
    assert torch.equal(codec.decode(encoded(codec, torch.zeros(2, 40)), 40), torch.zeros(2, 40))


def test_it_takes_fewer_bytes_than_halves(case):
    codec, _ = case
    assert codec.nbytes(4096) < 4096 * 2


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_are_rounded_to_the_nearest_of_their_levels(bits):
    """Half a step off at most, beside what 16 bits make of the group's minimum and scale."""
    torch.manual_seed(0)
    codec = AffineGroups(bits)
    values = torch.randn(50, 256) * 3 + 10
    parts = codec.parts(50, 256, torch.device("cpu"))
    codec.encode(values, parts)
    groups = values.view(50, -1, 32)
    spread = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    allowed = 0.5 * spread / (2**bits - 1) + (groups.amin(-1, keepdim=True).abs() + spread) * 2**-11
    assert ((codec.decode(parts, 256).view_as(groups) - groups).abs() <= allowed).all()
