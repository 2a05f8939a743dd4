"""Prompts as tokens: texts as they are, or conversations through the model's chat template."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from offload.model.quantised.gguf_metadata import metadata_folder
from offload.storage.errors import CheckpointError, ConfigError, foreign_file

LEAST_SHARED_TOKENS = 64
"""Fewer are computed sooner than they are shared."""

Messages = Sequence[Mapping[str, str]]
"""A conversation: `{"role": "user", "content": "..."}` and so on."""

Prompt = str | Messages


class Prompts:
    """Prompts as token ids, padded on the left.

    Args:
        prompts: one or more; conversations go through the chat template.
        chat: wrap each text in the chat template too, as a user's message.
        system: a message in front of each conversation that does not begin with one.

    Raises:
        ConfigError: for an empty prompt, or a chat without a template.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[Prompt], chat: bool = False, system: str | None = None) -> None:
        self.prompts = list(prompts)
        self.tokenizer = tokenizer
        self._chat, self._system = chat or system is not None, system
        talks = self._chat or not all(isinstance(prompt, str) for prompt in prompts)
        if talks and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "a chat was asked for (--chat, --system or messages), and this model's tokenizer has no chat template: "
                "give texts to continue"
            )
        if tokenizer.pad_token_id is None:
            has_end = tokenizer.eos_token_id is not None
            tokenizer.pad_token = tokenizer.eos_token if has_end else tokenizer.convert_ids_to_tokens(0)
        tokenizer.padding_side = "left"
        self._ids = [self._encode(prompt) for prompt in self.prompts]
        for prompt, ids in zip(self.prompts, self._ids, strict=True):
            if not ids:
                raise ConfigError(f"the prompt {prompt!r} has no tokens; give some text")

    @property
    def longest(self) -> int:
        return max(len(ids) for ids in self._ids)

    def batches(self, size: int) -> Iterator[list[int]]:
        """Indices of the prompts, `size` at a time."""
        for start in range(0, len(self._ids), size):
            yield list(range(start, min(start + size, len(self._ids))))

    def beginning(self, indices: Sequence[int]) -> list[int]:
        """The tokens that these prompts begin with, all of them, and more follows in each."""
        first, *others = (self._ids[index] for index in indices)
        length = min(len(first), *(len(ids) for ids in others)) - 1 if others else len(first) - 1
        for ids in others:
            length = next((place for place in range(length) if ids[place] != first[place]), length)
        return first[:length]

    def shared(self, size: int) -> int:
        """Tokens that the prompts of each batch begin with, in the batch where they are fewest; 0 for single prompts."""
        return min(len(self.beginning(indices)) if len(indices) > 1 else 0 for indices in self.batches(size))

    def inputs(self, indices: Sequence[int], begun: int) -> dict[str, torch.Tensor]:
        """What the model takes of these prompts, padded on the left.

        Args:
            begun: tokens that all of them begin with and that a cache holds: padding comes after these.
        """
        rest = [self._ids[index][begun:] for index in indices]
        padded = dict(self.tokenizer.pad({"input_ids": rest}, return_tensors="pt"))
        if begun:
            same = torch.tensor([self._ids[indices[0]][:begun]]).expand(len(indices), -1)
            padded["input_ids"] = torch.cat([same, padded["input_ids"]], dim=1)
            padded["attention_mask"] = torch.cat([torch.ones_like(same), padded["attention_mask"]], dim=1)
        return padded

    def _encode(self, prompt: Prompt) -> list[int]:
        chat = self._chat or not isinstance(prompt, str)
        text = self._rendered(prompt) if chat else str(prompt)
        with foreign_file("the model's tokenizer does not take this text", CheckpointError):
            return list(self.tokenizer(text, add_special_tokens=not chat)["input_ids"])

    def _rendered(self, prompt: Prompt) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(item) for item in prompt]
        if self._system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        with foreign_file("the model's chat template cannot be used: mend it, or leave the chat out", CheckpointError):
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def load_tokenizer(folder: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a checkpoint's folder.

    Raises:
        CheckpointError: if there is none.
    """
    what = f"{folder} holds no tokenizer that can be used: copy the model's tokenizer files there"
    with foreign_file(what, CheckpointError):
        return AutoTokenizer.from_pretrained(metadata_folder(folder), trust_remote_code=trust_remote_code)
