"""Full pages in fewer bytes, after KIVI (arXiv 2402.02750): keys by channel, values by token, each page once.

A channel of the keys that is far larger than the others (an outlier) has a scale of its own, so that it does not take the
others' levels away; values have no such channels, and are read token by token.
"""

from dataclasses import dataclass

import torch

from offload.kv.page_layout import KeyValue, PageLayout

_GROUP = 32
"""Numbers that share a scale."""

_WORST_ERROR = {8: 0.02, 4: 0.25}
"""The largest error of a page, relative to its size (root of mean squares): a worse one stays as it is."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """Pages of `bits` a number, with a 16-bit scale and minimum for each group of 32."""

    bits: int

    def percent(self, element_bytes: int) -> int:
        """Percent of a page's bytes that its code takes, about."""
        return -(-100 * self._line_bytes(_GROUP) // (_GROUP * element_bytes))

    def nbytes(self, shape: PageLayout) -> int:
        """What a page takes."""
        lines = shape.rows * shape.heads
        keys = lines * shape.key_dim * self._line_bytes(shape.tokens)
        return int(keys + lines * shape.tokens * self._line_bytes(shape.value_dim))

    def encode(self, pair: KeyValue, shape: PageLayout, memory: torch.Tensor) -> bool:
        """Write a page's code; False if it would be too far from the page, and was not written.

        Args:
            memory: uint8 [nbytes(shape)].
        """
        keys, values = self._encode(pair.keys.transpose(-1, -2)), self._encode(pair.values)
        lines = shape.rows * shape.heads
        for code, lengths, wanted in (
            (keys, (lines * shape.key_dim, shape.tokens), pair.keys.transpose(-1, -2)),
            (values, (lines * shape.tokens, shape.value_dim), pair.values),
        ):
            error = self._decode(code, *lengths).view(wanted.shape) - wanted.float()
            # Not `>`: what is no number is not below either.
            if not bool(error.square().mean() <= _WORST_ERROR[self.bits] ** 2 * wanted.float().square().mean()):
                return False
        memory[: keys.numel()].copy_(keys)
        memory[keys.numel() : keys.numel() + values.numel()].copy_(values)
        return True

    def decode(self, memory: torch.Tensor, shape: PageLayout) -> KeyValue:
        """The page's tensors again, as near as the code is."""
        lines = shape.rows * shape.heads
        key_bytes = lines * shape.key_dim * self._line_bytes(shape.tokens)
        keys = self._decode(memory[:key_bytes], lines * shape.key_dim, shape.tokens)
        values = self._decode(memory[key_bytes : self.nbytes(shape)], lines * shape.tokens, shape.value_dim)
        # Kernels take numbers of one key to lie side by side.
        keys = keys.view(shape.rows, shape.heads, shape.key_dim, shape.tokens).transpose(-1, -2).contiguous()
        return KeyValue(
            keys.to(shape.dtype), values.view(shape.rows, shape.heads, shape.tokens, shape.value_dim).to(shape.dtype)
        )

    def _line_bytes(self, length: int) -> int:
        """Bytes of `length` numbers that follow one another: codes, and two 16-bit numbers a group."""
        group, groups = _grouping(length)
        return groups * (group * self.bits // 8 + 4)

    def _encode(self, lines: torch.Tensor) -> torch.Tensor:
        """uint8 codes of numbers, grouped along the last dimension."""
        length = lines.shape[-1]
        group, groups = _grouping(length)
        flat = lines.reshape(-1, length).float()
        if groups * group > length:
            flat = torch.cat([flat, flat[:, -1:].expand(-1, groups * group - length)], dim=1)
        grouped = flat.view(-1, groups, group)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        minimum = low.half()
        scale = ((high - minimum.float()) / (2**self.bits - 1)).half()
        steps = (grouped - minimum.float()) / scale.float().clamp(min=torch.finfo(torch.float16).tiny)
        codes = steps.round().clamp(0, 2**self.bits - 1).nan_to_num().to(torch.uint8)
        if self.bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        return torch.cat([codes, minimum.view(torch.uint8), scale.view(torch.uint8)], dim=-1).view(-1)

    def _decode(self, memory: torch.Tensor, lines: int, length: int) -> torch.Tensor:
        """fp32 [lines, length]."""
        group, groups = _grouping(length)
        code_bytes = group * self.bits // 8
        packed = memory.view(lines, groups, code_bytes + 4)
        codes, rest = packed[..., :code_bytes], packed[..., code_bytes:].contiguous().view(torch.float16).float()
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).view(lines, groups, group)
        return (codes.float() * rest[..., 1:] + rest[..., :1]).view(lines, groups * group)[:, :length]


def _grouping(length: int) -> tuple[int, int]:
    """The size of a group, even, and the number of them."""
    group = min(_GROUP, length + length % 2)
    return group, -(-length // group)
