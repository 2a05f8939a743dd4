"""What a session offers of its KV cache."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from offload.session.request import Request
from offload.storage.errors import ConfigError, SessionError

if TYPE_CHECKING:
    from offload.kv.component import KvComponent
    from offload.session.opened import Opened


class CacheMethods:
    """The methods of `Session` for the KV cache."""

    _request: Request
    _inside: bool

    @property
    def _parts(self) -> "Opened":
        raise NotImplementedError

    def kv_cache(self, prefix: Sequence[int] | torch.Tensor | str = (), batch_size: int = 1) -> Any:
        """Make a cache for `model.generate(past_key_values=...)`, or for calls of the model: kept as the session was asked to.

        Where all keys and values stay on the device it is transformers' own.

        Args:
            prefix: token ids that prompts begin with: computed now, or loaded from `prefix_cache`, whose whole blocks are used
                only. `get_seq_length()` of the cache tells how many it holds; a prompt must have more.
            batch_size: sequences that begin so.

        Raises:
            SessionError: outside of the context.

        Example:
            ::

                ids = tokenizer("You are a helpful assistant.").input_ids
                cache = session.kv_cache(prefix=ids)
                session.model.generate(input_ids=question, past_key_values=cache)
        """
        if not self._inside:
            raise SessionError("a KV cache lives in a session: enter it first, `with offload(...) as session:`")
        if isinstance(prefix, str) or (isinstance(prefix, torch.Tensor) and prefix.dim() > 1 and len(prefix) != 1):
            raise ConfigError("prefix= is the token ids of one prefix, such as tokenizer(text)['input_ids']")
        if isinstance(prefix, torch.Tensor):
            prefix = prefix.flatten().tolist()
        cache = self._kv.new_cache(self._parts.model)
        return self._kv.prefill(cache, prefix, batch_size, self._parts.root.prompt_goes_on) if len(prefix) else cache

    @property
    def caches_prefixes(self) -> bool:
        """A prompt's prefix may be on disk, or is to be: `kv_cache(prefix=...)` is worth its while for one prompt too."""
        return self._request.kv.prefix_dir is not None

    @property
    def shares_prefixes(self) -> bool:
        """The prefix that all sequences of a batch have in common is kept and read once."""
        return self._kv.shares_prefixes

    @property
    def _kv(self) -> "KvComponent":
        from offload.kv.component import KvComponent

        component = self._parts.component(KvComponent)
        assert component is not None
        return component
