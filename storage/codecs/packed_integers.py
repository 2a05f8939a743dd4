"""Integers of four or eight bits in words of 32, with scales by group: as compressed-tensors, GPTQ and AWQ write them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload.storage.codecs.weights import piece_numbers
from offload.storage.native.decoders import decode_packed_columns, decode_packed_rows

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of a word's eight numbers is the first, the second, ...: they were put in as 0, 2, 4, 6, 1, 3, 5, 7."""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Compressed-tensors' `pack-quantized`: each row of a weight in words of its own. Parts: words, scales, zero points if any.

    Attributes:
        bits: of a number, which is stored with half of its range added.
        scales: their dtype, torch's name.
        groups: scales of a row; 1 for one each, 0 for one for all rows.
        zeros: each scale has a zero point, packed along the rows.
    """

    bits: int
    scales: str
    groups: int
    zeros: bool

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def decode(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        rows, columns = out.shape
        words = parts[0].view(torch.int32).view(rows, -1)
        scales = parts[1].view(getattr(torch, self.scales)).view(rows if self.groups else 1, -1)
        zeros = None
        if self.zeros:
            zeros = _unpacked(parts[2].view(torch.int32).view(-1, self.groups).t(), self.bits)[:, :rows].t().contiguous()
        if decode_packed_rows(self.bits, words, scales, zeros, out):
            return
        scales = scales.float().expand(rows, -1)
        step = max(1, piece_numbers(out.device) // columns)
        for begin in range(0, rows, step):
            piece = slice(begin, min(begin + step, rows))
            numbers = _unpacked(words[piece], self.bits)[:, :columns]
            grouped = numbers.reshape(len(numbers), max(1, self.groups), -1)
            grouped.sub_(1 << (self.bits - 1) if zeros is None else zeros[piece, :, None]).mul_(scales[piece, :, None])
            out[piece].copy_(grouped.view(len(numbers), columns))

    def rows_together(self, shape: Sequence[int]) -> int:
        return shape[0]


@dataclass(frozen=True, slots=True)
class PackedColumns:
    """GPTQ and AWQ, whose weights lie with inputs along the rows. Parts: words, zero points, scales, and each input's group.

    Attributes:
        bits: of a number.
        scales: their dtype, torch's name.
        groups: of inputs that share a scale and a zero point for each output.
        added: to each zero point that is stored: GPTQ's first format has one less.
        awq: words hold numbers of eight outputs, in AWQ's order; else of several inputs.
    """

    bits: int
    scales: str
    groups: int
    added: int
    awq: bool

    @property
    def name(self) -> str:
        return f"{'awq' if self.awq else 'gptq'} int{self.bits}"

    def decode(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        outputs, inputs = out.shape
        words = parts[0].view(torch.int32).view(inputs, -1) if self.awq else parts[0].view(torch.int32).view(-1, outputs)
        scales = parts[2].view(getattr(torch, self.scales)).view(self.groups, outputs).float()
        zeros = self._unpacked(parts[1].view(torch.int32).view(self.groups, -1)) + self.added
        if len(parts) > 3:
            group_of = parts[3].view(torch.int32)
        else:
            group_of = (torch.arange(inputs, device=out.device) // (inputs // self.groups)).int()
        if decode_packed_columns(0 if self.awq else self.bits, words, scales, zeros, group_of, out):
            return
        in_a_word = 1 if self.awq else 32 // self.bits
        step = max(1, piece_numbers(out.device) // (outputs * in_a_word))
        for begin in range(0, len(words), step):
            piece = words[begin : begin + step]
            numbers = self._unpacked(piece) if self.awq else _unpacked(piece.t(), self.bits).t()
            at = slice(begin * in_a_word, begin * in_a_word + len(numbers))
            groups = group_of[at]
            out[:, at].copy_((numbers - zeros[groups]).mul_(scales[groups]).t())

    def rows_together(self, shape: Sequence[int]) -> int:
        return shape[0]

    def _unpacked(self, words: torch.Tensor) -> torch.Tensor:
        """The numbers of words that hold neighbouring outputs."""
        numbers = _unpacked(words, self.bits)
        if not self.awq:
            return numbers
        return numbers.view(len(words), -1, 8)[:, :, _AWQ_ORDER].reshape(len(words), -1)


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of each row's words, the lowest bits first: int32 [rows, words] to fp32 [rows, words * 32 / bits]."""
    stored = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stored.float()
    numbers = torch.empty(*stored.shape, 2, device=words.device)
    numbers[..., 0] = stored & 15
    numbers[..., 1] = stored >> 4
    return numbers.view(len(words), -1)
