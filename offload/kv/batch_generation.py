"""transformers' continuous batching (`generate_batch`) in what a session reserves for the KV cache.

Left to itself it takes 90% of the memory that it finds free.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from offload.scheduler.model_spec import Workload
from offload.storage.errors import ConfigError

_PAGE_TOKENS = range(4, 257, 4)
"""The sizes of a page that transformers takes."""

_PAGES_A_SEQUENCE = 8
"""At least, where it is long enough: little of the last one is lost."""


class BatchGeneration:
    """Sizes the cache of `generate_batch` by what the session's plan has for it, until undone.

    Args:
        tokens: how many the memory of the present plan holds, of all sequences.
        workload: what was reserved for.
        warn: told what became of the cache.
    """

    def __init__(self, model: nn.Module, tokens: Callable[[], int], workload: Workload, warn: Callable[[str], None]) -> None:
        self._model: Any = model
        self._tokens, self._workload, self._warn = tokens, workload, warn
        self._original = getattr(type(model), "init_continuous_batching", None)
        if self._original is not None:
            self._model.__dict__["init_continuous_batching"] = self._init

    def undo(self) -> None:
        self._model.__dict__.pop("init_continuous_batching", None)

    def _init(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **options: Any,
    ) -> Any:
        assert self._original is not None
        config = self._sized(continuous_batching_config)
        return self._original(self._model, generation_config, config, **options)

    def _sized(self, given: ContinuousBatchingConfig | None) -> ContinuousBatchingConfig:
        config: Any = ContinuousBatchingConfig() if given is None else copy.copy(given)
        if config.use_cuda_graph and config.use_cuda_graph != (False, False):
            raise ConfigError("CUDA graphs replay addresses, and streamed weights come to others: give use_cuda_graph=False")
        config.use_cuda_graph = False
        # 5.17 calls it otherwise.
        page = "page_size" if hasattr(config, "page_size") else "block_size"
        sequences, longest = self._workload.batch_size, self._workload.total_tokens
        if given is None:
            setattr(config, page, _page_tokens(longest))
        size = int(getattr(config, page))
        # A sequence has whole pages.
        fitting = self._tokens() // longest * -(-longest // size)
        if config.num_blocks is None:
            config.num_blocks = fitting
            self._warn(
                f"generate_batch keeps keys and values of {fitting * size:,} tokens, which is what batch_size={sequences} and "
                f"max_tokens={longest} reserve; sequences beyond that wait"
            )
        if config.num_blocks > fitting or not config.num_blocks:
            raise ConfigError(
                f"generate_batch wants {max(1, config.num_blocks)} blocks of {size} tokens, and {fitting} fit what is "
                "reserved: enter with a larger batch_size or max_tokens, or give fewer blocks"
            )
        config.max_batch_tokens = config.max_batch_tokens or sequences * self._workload.tokens_at_once
        if config.max_requests_per_batch is None:
            config.max_requests_per_batch = sequences
        sized: ContinuousBatchingConfig = config
        return sized


def _page_tokens(total_tokens: int) -> int:
    """The largest page that divides a sequence; the smallest there is where none does."""
    whole = [size for size in _PAGE_TOKENS if total_tokens % size == 0 and total_tokens >= size * _PAGES_A_SEQUENCE]
    return max(whole, default=_PAGE_TOKENS[0])
