"""Prompts in chunks: transformers' own chunked prefill, switched on for a session."""

from typing import Any

from torch import nn


class PrefillChunks:
    """Has `generate` compute prompts in chunks, until undone: transformers' own way, which masks and positions follow.

    Args:
        size: tokens.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        holder: Any = model
        self._config = holder.generation_config
        self._before = self._config.prefill_chunk_size
        self._config.prefill_chunk_size = size

    def undo(self) -> None:
        self._config.prefill_chunk_size = self._before
