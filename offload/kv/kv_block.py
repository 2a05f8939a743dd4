"""Tokens in pages, as a layer sees them."""

from dataclasses import dataclass

import torch

from offload.kv.page_layout import PageLayout
from offload.storage.pages.pool import Page


class BatchRows:
    """Which of a page's rows each sequence of a batch reads; one object for all pages that are read so.

    Args:
        index: int64 [batch].
    """

    def __init__(self, index: torch.Tensor) -> None:
        self.index = index
        self._sharing: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    def of_these(self, rows: torch.Tensor) -> torch.Tensor:
        """The index for a batch of these sequences, int64 [new batch]."""
        return self.index.index_select(0, rows)

    def of(self, part: torch.Tensor) -> torch.Tensor:
        """The rows of a page's tensor, one for each sequence."""
        return part.index_select(0, self.index.to(part.device))

    def sharing(self, stored: int) -> int:
        """How many sequences, one after another, read each of `stored` rows; 0 if they read them otherwise."""
        if stored not in self._sharing:
            each, rest = divmod(len(self.index), stored)
            # Asked once: on a device it waits for the index.
            alike = not rest and self.index.tolist() == [row for row in range(stored) for _ in range(each)]
            self._sharing[stored] = each if alike else 0
        return self._sharing[stored]


@dataclass(slots=True, eq=False)
class KvBlock:
    """Tokens that follow one another, in one page.

    Attributes:
        start: the position of the first one in its sequence.
        tokens: how many of the page's tokens count.
        rows: which of the page's rows each sequence of the batch reads; None: each its own.
        coded: the page holds the codec's bytes.
    """

    page: Page
    shape: PageLayout
    start: int
    tokens: int = 0
    rows: BatchRows | None = None
    coded: bool = False

    @property
    def end(self) -> int:
        return self.start + self.tokens

    @property
    def batch_size(self) -> int:
        return self.shape.rows if self.rows is None else len(self.rows)
