"""Text from prompts: run in batches, stream what comes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from offload.generation.prompts import Prompt, Prompts
from offload.generation.sampling import Sampling, check_generation_config
from offload.generation.stop import StopFilter, before_stop


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one prompt."""

    prompt: Prompt
    text: str
    new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As the commands print it."""
        asked = {"prompt": self.prompt} if isinstance(self.prompt, str) else {"messages": [dict(item) for item in self.prompt]}
        return {**asked, "text": self.text, "new_tokens": self.new_tokens}


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
        on_text: told each piece of text as it is made; only where a batch is a single prompt, without a search along beams.
        on_token: told how many tokens each step made.
        begin: given the tokens that a batch of prompts begins with and how many prompts there are, a cache that holds some of
            them; None to compute every prompt as a whole.
    """
    check_generation_config(getattr(model, "generation_config", None))
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    tokenizer = prompts.tokenizer
    for indices in prompts.batches(batch_size):
        cache = None if begin is None else begin(prompts.beginning(indices), len(indices))
        inputs: dict[str, Any] = prompts.inputs(indices, 0 if cache is None else cache.get_seq_length())
        if sampling.beams == 1:
            inputs["streamer"] = _Streamer(tokenizer, sampling.stop, on_text if len(indices) == 1 else None, on_token)
        if cache is not None:
            inputs["past_key_values"] = cache
        if sampling.stop:
            inputs |= {"stop_strings": list(sampling.stop), "tokenizer": tokenizer}
        with torch.inference_mode():
            output = model.generate(**inputs, **sampling.options(), pad_token_id=tokenizer.pad_token_id)
        # An encoder reads the prompt, and a decoder begins with a token of its own.
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        for index, row in zip(indices, output[:, start:].tolist(), strict=True):
            count = _made(row, model.generation_config.eos_token_id, tokenizer, sampling.stop)
            text = before_stop(tokenizer.decode(row[:count], skip_special_tokens=True), sampling.stop)
            yield Completion(prompts.prompts[index], text, count)


def _made(row: list[int], end_ids: int | list[int] | None, tokenizer: Any, stops: Sequence[str]) -> int:
    """Tokens up to the first end of the text, or to the one that completes a stop, that one counted: padding follows."""
    ends = {end_ids} if isinstance(end_ids, int) else set(end_ids or ())
    count = next((place for place, token in enumerate(row, 1) if token in ends), len(row))
    if stops and (whole := tokenizer.decode(row[:count], skip_special_tokens=True)) != before_stop(whole, stops):
        least = 1
        while least < count:
            middle = (least + count) // 2
            text = tokenizer.decode(row[:middle], skip_special_tokens=True)
            least, count = (least, middle) if before_stop(text, stops) != text else (middle + 1, count)
    return count


class _Streamer(BaseStreamer):
    """Passes on what `generate` makes, step by step."""

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        on_text: Callable[[str], None] | None,
        on_token: Callable[[int], None] | None,
    ) -> None:
        self._words = _Words(tokenizer, StopFilter(stops, on_text)) if on_text is not None else None
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

    def __init__(self, tokenizer: Any, text: StopFilter) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._text = text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._text.add(text, stream_end)
