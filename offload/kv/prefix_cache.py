"""The beginning of a prompt: computed or loaded once, and continued by as many sequences as begin so."""

import inspect
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import EncoderDecoderCache

from offload.kv.options import KvOptions
from offload.kv.prefix_store import BLOCK_TOKENS, PrefixStore, add_block, block_of
from offload.runtime.machine import Machine
from offload.storage.errors import ConfigError

_NAME = "beginning of a prompt"


class PrefixCache:
    """Fills empty caches.

    Args:
        rounds: what is computed otherwise than the plain model does.
        source_key: stands for the checkpoint; None for a model that no file is known of.
        worth: whether loading so many bytes is expected to be faster than computing a block.
        edited_weight: tells the name of a weight that has other values than its file.
    """

    def __init__(
        self,
        model: nn.Module,
        machine: Machine,
        options: KvOptions,
        rounds: tuple[str, ...],
        source_key: str | None,
        worth: Callable[[int], bool],
        edited_weight: Callable[[], str | None],
    ) -> None:
        self._reads, self._writes = machine.host.reads, machine.host.writes
        self.loaded_tokens = 0
        self.computed_tokens = 0
        self._model = model
        self._device = machine.device
        self._options = options
        self._source_key = source_key
        self._worth = worth
        self._warn = machine.notes.warn
        self._computed_by = {
            "source": source_key,
            "torch": torch.__version__,
            "device": machine.device.hardware_name,
            "attention": str(getattr(getattr(model, "config", None), "_attn_implementation", "")),
            "kept": options.level,
            "rounds": rounds,
        }
        self._edited_weight = edited_weight
        self._versions = {id(value): (weakref.ref(value), value._version) for value in model.parameters()}

    def _store(self) -> PrefixStore | None:
        """The blocks of the model as it is now; None where they are not asked for, or its weights are not the file's."""
        if self._options.prefix_dir is None:
            return None
        added, changed = {}, self._edited_weight()
        for name, value in self._model.named_parameters():
            known, version = self._versions.get(id(value), (lambda: None, 0))
            if known() is not value:
                content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                added[name] = zlib.crc32(memoryview(content))  # type: ignore[arg-type]
            elif value._version != version:
                changed = name
        if changed is not None:
            self._warn(f"{changed} was changed in this session, so beginnings of prompts are neither kept nor loaded")
            return None
        return PrefixStore(self._options.prefix_dir, self._computed_by | {"added": added}, self._warn)

    def prefill(self, cache: Any, tokens: Sequence[int], batch_size: int, announce: Callable[[int], None]) -> Any:
        """Fill an empty cache with a prefix.

        With a store these are whole blocks of it only.

        Args:
            batch_size: sequences that continue it.
            announce: called before a pass with the number of passes of the same prompt that follow it.

        Returns:
            The cache.

        Raises:
            ConfigError: for a model that reads and writes apart.
        """
        if isinstance(cache, EncoderDecoderCache):
            raise ConfigError("the model reads its prompt with an encoder: there is no beginning to keep")
        with torch.inference_mode():
            store = self._store()
            if store is not None:
                self._by_blocks(cache, tokens, store, announce)
            elif self._options.prefix_dir is None:
                announce(1)
                self._compute(cache, tokens)
                self.computed_tokens += len(tokens)
            if batch_size > 1 and cache.get_seq_length():
                cache.batch_repeat_interleave(batch_size)
        return cache

    def _by_blocks(self, cache: Any, tokens: Sequence[int], store: PrefixStore, announce: Callable[[int], None]) -> None:
        keys = store.keys(tokens)
        for index, key in enumerate(keys):
            start, end = index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS
            nbytes = store.nbytes(key)
            begun = time.perf_counter()
            parts = store.load(key) if nbytes is not None and self._worth(nbytes) else None
            if parts is not None:
                self._reads.count(_NAME, begun, time.perf_counter(), nbytes or 0)
                add_block(cache, parts, self._device.torch_device)
                self.loaded_tokens += BLOCK_TOKENS
                continue
            announce(len(keys) - index)
            self._compute(cache, tokens[start:end])
            self.computed_tokens += BLOCK_TOKENS
            if store.nbytes(key) is None:
                begun = time.perf_counter()
                store.save(key, block_of(cache, start, end))
                self._writes.count(_NAME, begun, time.perf_counter(), store.nbytes(key) or 0)

    def _compute(self, cache: Any, tokens: Sequence[int]) -> None:
        inputs = torch.tensor([list(tokens)], device=self._device.torch_device)
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            options["logits_to_keep"] = 1
        self._model(input_ids=inputs, **options)
