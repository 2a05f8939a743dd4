"""Text to learn from: lines of JSON to token ids, with the loss on what the model should say."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from storage.errors import ConfigError

IGNORED = -100
"""The label of a token that the loss does not count; transformers' own."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence.

    Attributes:
        ids: tokens.
        labels: the same, with IGNORED where nothing is to be learned.
        line: of the file that it comes from.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    line: int


def read_examples(path: str | Path, tokenizer: Any, sequence_length: int) -> list[Example]:
    """The examples of a file of JSON lines: `{"text"}`, `{"prompt", "completion"}` or `{"messages": [...]}`.

    Text that is longer than a sequence is cut into several. Of a prompt with its completion the loss counts the completion, of
    messages what the assistant says.

    Raises:
        ConfigError: names the line, and what is wrong with it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--data {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--data {path} is not UTF-8 text (byte {error.start:,})") from error
    examples: list[Example] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            examples += _read_line(f"{path}, line {number}", number, line, tokenizer, sequence_length)
    if not examples:
        raise ConfigError(f'--data {path} holds no example; write one a line, like {{"text": "..."}}')
    return examples


def _read_line(where: str, number: int, line: str, tokenizer: Any, sequence_length: int) -> Iterator[Example]:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error})") from error
    if not isinstance(item, dict):
        raise ConfigError(f'{where} is not an object like {{"text": "..."}}')
    if isinstance(item.get("text"), str):
        ids = tokenizer(item["text"])["input_ids"] + _end(tokenizer)
        for begin in range(0, len(ids), sequence_length):
            piece = tuple(ids[begin : begin + sequence_length])
            if len(piece) > 1:
                yield Example(piece, piece, number)
        return
    if isinstance(item.get("prompt"), str) and isinstance(item.get("completion"), str):
        parts = [(item["prompt"], False), (item["completion"], True)]
        ids, labels = _joined([(tokenizer(text, add_special_tokens=not said)["input_ids"], said) for text, said in parts])
        ids, labels = ids + _end(tokenizer), labels + _end(tokenizer)
    elif isinstance(item.get("messages"), list):
        ids, labels = _conversation(where, item["messages"], tokenizer)
    else:
        raise ConfigError(f'{where} has neither "text", nor "prompt" and "completion", nor "messages"')
    if len(ids) > sequence_length:
        raise ConfigError(
            f"{where} has {len(ids)} tokens, and --sequence-length is {sequence_length}; give more, or shorten it"
        )
    if all(label == IGNORED for label in labels):
        raise ConfigError(f"{where} has nothing to learn: no completion, or no message of the assistant")
    yield Example(tuple(ids), tuple(labels), number)


def _conversation(where: str, messages: list[Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f'{where} has "messages", and this model\'s tokenizer has no chat template; write "prompt" and "completion"'
        )
    said: list[tuple[int, int]] = []
    whole = ""
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise ConfigError(f'{where}: message {index + 1} is not {{"role": "...", "content": "..."}}')
        asked = _rendered(tokenizer, messages[:index], True) if message["role"] == "assistant" else whole
        before, whole = whole, _rendered(tokenizer, messages[: index + 1], False)
        if not whole.startswith(asked) or not whole.startswith(before):
            raise ConfigError(f"{where}: the chat template changes what it said before: it cannot be told what to learn")
        if message["role"] == "assistant":
            said.append((len(asked), len(whole)))
    # By character: a token may lie across the border, and belongs to what is said then.
    tokens = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(tokens["input_ids"])
    spans = tokens["offset_mapping"]
    learned = [any(first < end and last > begin for begin, end in said) for first, last in spans]
    return ids, [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]


def _rendered(tokenizer: Any, messages: list[Any], ask: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)) if messages or ask else ""


def _joined(parts: Sequence[tuple[list[int], bool]]) -> tuple[list[int], list[int]]:
    ids = [token for tokens, _ in parts for token in tokens]
    labels = [token if said else IGNORED for tokens, said in parts for token in tokens]
    return ids, labels


def _end(tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []


class Batches:
    """Examples in an order that the seed and the epoch decide, padded on the right.

    Args:
        size: examples in one batch; the last one of an epoch may have fewer.
    """

    def __init__(self, examples: Sequence[Example], size: int, seed: int, padding_id: int) -> None:
        self._examples = list(examples)
        self._size = size
        self._seed = seed
        self._padding_id = padding_id

    def __len__(self) -> int:
        """Batches in one epoch."""
        return -(-len(self._examples) // self._size)

    def epoch(self, number: int) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed((self._seed << 16) + number)
        order = torch.randperm(len(self._examples), generator=generator).tolist()
        for begin in range(0, len(order), self._size):
            yield self._padded([self._examples[index] for index in order[begin : begin + self._size]])

    def _padded(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        longest = max(len(example.ids) for example in examples)

        def rows(values: Sequence[tuple[int, ...]], filler: int) -> torch.Tensor:
            return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in values])

        return {
            "input_ids": rows([example.ids for example in examples], self._padding_id),
            "attention_mask": rows([(1,) * len(example.ids) for example in examples], 0),
            "labels": rows([example.labels for example in examples], IGNORED),
        }
