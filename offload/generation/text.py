"""Text from prompts: tokenise, run in batches, stream what comes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from offload.storage.errors import CheckpointError, ConfigError, foreign_file

LEAST_SHARED_TOKENS = 64
"""Fewer are computed sooner than they are shared."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: draw from the likeliest tokens whose probabilities add up to this.
        seed: of the draw; None for another one each time.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be more than 0 and at most 1")
        if self.top_p < 1 and not self.temperature:
            raise ConfigError(f"top_p={self.top_p} says nothing at temperature 0, where the likeliest token is taken")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2^63")

    def options(self) -> dict[str, Any]:
        if self.temperature == 0:
            chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, **chosen}


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one prompt."""

    prompt: str
    text: str
    new_tokens: int


class Prompts:
    """Prompts as token ids, padded on the left.

    Args:
        texts: one or more.
        chat: wrap each in the model's chat template, as a user's message.

    Raises:
        ConfigError: for an empty prompt, or a chat without a template.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], chat: bool = False) -> None:
        self.texts = list(texts)
        self.tokenizer = tokenizer
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ConfigError("--chat was asked for, and this model's tokenizer has no chat template; leave --chat out")
        if tokenizer.pad_token_id is None:
            has_end = tokenizer.eos_token_id is not None
            tokenizer.pad_token = tokenizer.eos_token if has_end else tokenizer.convert_ids_to_tokens(0)
        tokenizer.padding_side = "left"
        self._ids = [self._encode(text, chat) for text in self.texts]
        for text, ids in zip(self.texts, self._ids, strict=True):
            if not ids:
                raise ConfigError(f"the prompt {text!r} has no tokens; give some text")

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

    def _encode(self, text: str, chat: bool) -> list[int]:
        if chat:
            message = [{"role": "user", "content": text}]
            with foreign_file("the model's chat template cannot be used: mend it, or leave --chat out", CheckpointError):
                text = str(self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        with foreign_file("the model's tokenizer does not take this text", CheckpointError):
            return list(self.tokenizer(text, add_special_tokens=not chat)["input_ids"])


def load_tokenizer(folder: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a checkpoint's folder.

    Raises:
        CheckpointError: if there is none.
    """
    what = f"{folder} holds no tokenizer that can be used: copy the model's tokenizer files there"
    with foreign_file(what, CheckpointError):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def check_generation_config(model: Any) -> None:
    """Values of other types than these break `generate` in its middle.

    Raises:
        CheckpointError: which names the value.
    """
    config = getattr(model, "generation_config", None)
    for name, value in ({} if config is None else vars(config)).items():
        counted = value if isinstance(value, list) else [value]
        if name.endswith("_token_id"):
            right = value is None or all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in counted)
        else:
            right = value is None or isinstance(value, bool) or not name.startswith(("output_", "return_", "do_", "use_"))
        if not right:
            raise CheckpointError(f"generation_config.json of the model says {name}={value!r}, which is no such thing: mend it")


def complete(
    model: Any,
    prompts: Prompts,
    sampling: Sampling,
    batch_size: int = 1,
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[int], None] | None = None,
    begin: Callable[[Sequence[int], int], Any] | None = None,
) -> Iterator[Completion]:
    """Complete the prompts, one after another or in batches.

    Args:
        model: any that has `generate`.
        on_text: told each piece of text as it is made; only where a batch is a single prompt.
        on_token: told how many tokens each step made.
        begin: given the tokens that a batch of prompts begins with and how many prompts there are, a cache that holds some of
            them; None to compute every prompt as a whole.
    """
    check_generation_config(model)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    tokenizer = prompts.tokenizer
    for indices in prompts.batches(batch_size):
        cache = None if begin is None else begin(prompts.beginning(indices), len(indices))
        inputs: dict[str, Any] = prompts.inputs(indices, 0 if cache is None else cache.get_seq_length())
        streamer = _Streamer(tokenizer, on_text if len(indices) == 1 else None, on_token)
        with torch.inference_mode():
            options = sampling.options() | {"streamer": streamer, "pad_token_id": tokenizer.pad_token_id}
            output = model.generate(**inputs, **options, **({} if cache is None else {"past_key_values": cache}))
        start = inputs["input_ids"].shape[1]
        for index, row in zip(indices, output[:, start:].tolist(), strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            yield Completion(prompts.texts[index], text, _made(row, model.generation_config.eos_token_id))


def _made(row: list[int], end_ids: int | list[int] | None) -> int:
    """Tokens up to the first end of the text, that one counted: what follows is padding."""
    ends = {end_ids} if isinstance(end_ids, int) else set(end_ids or ())
    return next((place for place, token in enumerate(row, 1) if token in ends), len(row))


class _Streamer(BaseStreamer):
    """Passes on what `generate` makes, step by step."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None, on_token: Callable[[int], None] | None) -> None:
        self._words = _Words(tokenizer, on_text) if on_text is not None else None
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._words is not None:
            self._words.put(value)  # type: ignore[no-untyped-call]
        if self._prompt_seen and self._on_token is not None:
            self._on_token(value.numel())
        self._prompt_seen = True

    def end(self) -> None:
        if self._words is not None:
            self._words.end()  # type: ignore[no-untyped-call]


class _Words(TextStreamer):
    """Whole words, as soon as they are sure."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)
