"""What the bytes of a page are."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


class KeyValue(NamedTuple):
    """Keys [rows, heads, tokens, key dim] and values [rows, heads, tokens, value dim]."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Some tokens of one layer, of all sequences of a batch: keys, and after them values.

    Attributes:
        rows: sequences.
        tokens: that there is room for, of each sequence.
    """

    rows: int
    heads: int
    tokens: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> "PageLayout":
        """The layout of pages for tokens like these, and as many."""
        rows, heads, tokens, key_dim = keys.shape
        return cls(rows, heads, tokens, key_dim, values.shape[-1], keys.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of every sequence."""
        return self.rows * self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.tokens * self.token_bytes

    def fit_to(self, page_bytes: int) -> "PageLayout":
        """The same layout with room for as many tokens as a page takes."""
        return replace(self, tokens=page_bytes // self.token_bytes)

    def views(self, memory: torch.Tensor) -> KeyValue:
        """The page's tensors.

        Args:
            memory: uint8 [at least nbytes].
        """
        keys, values = self.views_of_all(memory[None])
        return KeyValue(keys[0], values[0])

    def views_of_all(self, pages: torch.Tensor) -> KeyValue:
        """Keys [pages, rows, heads, tokens, key dim] and values of several pages.

        Args:
            pages: uint8 [pages, at least nbytes].
        """
        key_bytes = self.rows * self.heads * self.tokens * self.key_dim * self.dtype.itemsize
        lines = (len(pages), self.rows, self.heads, self.tokens)
        keys = pages[:, :key_bytes].view(self.dtype)
        values = pages[:, key_bytes : self.nbytes].view(self.dtype)
        return KeyValue(keys.view(*lines, self.key_dim), values.view(*lines, self.value_dim))
