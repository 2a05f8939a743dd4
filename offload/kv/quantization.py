"""Full pages in fewer bytes, after KIVI (arXiv 2402.02750): keys by channel, values by token, each page once.

A channel of the keys that is far larger than the others (an outlier) has a scale of its own, so that it does not take the
others' levels away; values have no such channels, and are read token by token.
"""

from dataclasses import dataclass

import torch

from offload.kv.page_layout import KeyValue, PageLayout
from offload.storage.codecs.affine_groups import GROUP, AffineGroups
from offload.storage.codecs.base import Codec

_WORST_ERROR = {8: 0.02, 4: 0.25}
"""The largest error of a page, relative to its size (root of mean squares): a worse one stays as it is."""


@dataclass(frozen=True, slots=True)
class PageQuantizer:
    """Full pages in `bits` a number: keys by channel, values by token."""

    bits: int

    @property
    def codec(self) -> Codec:
        """The codec of numbers."""
        return AffineGroups(self.bits)

    def percent(self, element_bytes: int) -> int:
        """Percent of a page's bytes that its code takes, about."""
        return -(-100 * self.codec.nbytes(GROUP) // (GROUP * element_bytes))

    def nbytes(self, shape: PageLayout) -> int:
        """Bytes of an encoded page."""
        return _key_bytes(self.codec, shape) + shape.rows * shape.heads * shape.tokens * self.codec.nbytes(shape.value_dim)

    def encode(self, pair: KeyValue, shape: PageLayout, memory: torch.Tensor) -> bool:
        """Write a page's code; False if it would be too far from the page, and was not written.

        Args:
            memory: uint8 [nbytes(shape)].
        """
        encoded = []
        for wanted in (pair.keys.transpose(-1, -2), pair.values):
            lines = wanted.reshape(-1, wanted.shape[-1])
            parts = self.codec.parts(len(lines), lines.shape[-1], lines.device)
            self.codec.encode(lines, parts)
            error = self.codec.decode(parts, lines.shape[-1]) - lines.float()
            # Not `>`: what is no number is not below either.
            if not bool(error.square().mean() <= _WORST_ERROR[self.bits] ** 2 * lines.float().square().mean()):
                return False
            encoded.append(parts[0].view(-1))
        keys, values = encoded
        memory[: keys.numel()].copy_(keys)
        memory[keys.numel() : keys.numel() + values.numel()].copy_(values)
        return True

    def decode(self, memory: torch.Tensor, shape: PageLayout) -> KeyValue:
        """The page's tensors again, as near as the code is."""
        key_bytes = _key_bytes(self.codec, shape)
        keys = self.codec.decode([memory[:key_bytes]], shape.tokens)
        values = self.codec.decode([memory[key_bytes : self.nbytes(shape)]], shape.value_dim)
        # Kernels take numbers of one key to lie side by side.
        keys = keys.view(shape.rows, shape.heads, shape.key_dim, shape.tokens).transpose(-1, -2).contiguous()
        values = values.view(shape.rows, shape.heads, shape.tokens, shape.value_dim)
        return KeyValue(keys.to(shape.dtype), values.to(shape.dtype))


def _key_bytes(codec: Codec, shape: PageLayout) -> int:
    return shape.rows * shape.heads * shape.key_dim * codec.nbytes(shape.tokens)
