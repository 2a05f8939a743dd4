"""Text to learn from: lines of JSON to token ids, with the loss on what the model should say."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload.json_lines import Item, conversation, json_lines, read_text
from offload.storage.errors import ConfigError
from offload.training.weighting import IGNORED

_OPEN_ROWS = 64
"""Sequences that a short example may still be packed into."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence.

    Attributes:
        ids: tokens.
        labels: the same, with IGNORED where nothing is to be learned.
        line: of the file that it comes from.
        positions: of each token in its own text, where several are packed into one sequence.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    line: int
    positions: tuple[int, ...] = ()


def read_examples(source: str | Path, tokenizer: Any, sequence_length: int) -> list[Example]:
    """The examples of a file of JSON lines, of a folder of such files and of plain text, or of a dataset of the hub.

    An item is `{"text"}`, `{"prompt", "completion"}` or `{"messages": [...]}`. Text that is longer than a sequence is cut into
    several. Of a prompt with its completion the loss counts the completion, of messages what the assistant says.

    Raises:
        ConfigError: names the line, and what is wrong with it.
    """
    examples: list[Example] = []
    for where, number, item in _items(str(source)):
        examples += _read_item(where, number, item, tokenizer, sequence_length)
    if not examples:
        raise ConfigError(f'--data {source} holds no example; write one a line, like {{"text": "..."}}')
    return examples


def _items(source: str) -> Iterator[Item]:
    path = Path(source)
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.suffix in (".jsonl", ".txt"))
        if not files:
            raise ConfigError(f"--data {source} is a folder without .jsonl and .txt files")
        for file in files:
            if file.suffix == ".jsonl":
                yield from json_lines(file, "--data")
            else:
                yield str(file), 1, {"text": read_text(file, "--data").replace("\r\n", "\n")}
    elif path.exists() or path.suffix or source.count("/") != 1:
        yield from json_lines(path, "--data")
    else:
        yield from _of_the_hub(source)


def _of_the_hub(name: str) -> Iterator[Item]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            f"--data {name} is no file; as a dataset of the hub it needs the package datasets: pip install datasets"
        ) from error
    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # whatever the hub, the network or the dataset's own code raise
        raise ConfigError(f"--data {name}: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", number, row


def _kind_of(item: dict[str, Any]) -> str | None:
    """The name of what is learned from. What is there and empty hides nothing: datasets fill what a row does not use."""
    present = []
    if isinstance(item.get("text"), str):
        present.append("text")
    if isinstance(item.get("prompt"), str) and isinstance(item.get("completion"), str):
        present.append("completion")
    if isinstance(item.get("messages"), list):
        present.append("messages")
    return next((name for name in present if item[name]), present[0] if present else None)


def _read_item(where: str, number: int, item: Any, tokenizer: Any, sequence_length: int) -> Iterator[Example]:
    if not isinstance(item, dict):
        raise ConfigError(f'{where} is not an object like {{"text": "..."}}')
    kind = _kind_of(item)
    if kind == "text":
        ids = tokenizer(item["text"])["input_ids"] + _end(tokenizer)
        for begin in range(0, len(ids), sequence_length):
            piece = tuple(ids[begin : begin + sequence_length])
            if len(piece) > 1:
                yield Example(piece, piece, number)
        return
    if kind == "completion":
        parts = [(item["prompt"], False), (item["completion"], True)]
        ids, labels = _joined([(tokenizer(text, add_special_tokens=not said)["input_ids"], said) for text, said in parts])
        ids, labels = ids + _end(tokenizer), labels + _end(tokenizer)
    elif kind == "messages":
        ids, labels = _conversation(where, item["messages"], tokenizer)
    else:
        raise ConfigError(f'{where} has neither "text", nor "prompt" and "completion", nor "messages"')
    if len(ids) > sequence_length:
        raise ConfigError(
            f"{where} has {len(ids)} tokens, and --sequence-length is {sequence_length}; give more, or shorten it"
        )
    if all(label == IGNORED for label in labels[1:]):
        raise ConfigError(f"{where} has nothing to learn: no completion, or no message of the assistant")
    yield Example(tuple(ids), tuple(labels), number)


def _conversation(where: str, messages: list[Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f'{where} has "messages", and this model\'s tokenizer has no chat template; write "prompt" and "completion"'
        )
    said: list[tuple[int, int]] = []
    whole = ""
    for index, message in enumerate(conversation(where, messages)):
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

    def __init__(self, examples: Sequence[Example], size: int, seed: int = 0, padding_id: int = 0) -> None:
        self._examples = list(examples)
        self._size = size
        self._seed = seed
        self._padding_id = padding_id

    @property
    def identity(self) -> int:
        """A checksum of the examples and of how they come together."""
        content = [(example.ids, example.labels, example.positions) for example in self._examples]
        return zlib.crc32(repr((content, self._size)).encode())

    def in_order(self) -> Iterator[dict[str, torch.Tensor]]:
        """All of them once, as they were given."""
        for begin in range(0, len(self._examples), self._size):
            yield self._padded(self._examples[begin : begin + self._size])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(example.ids) for example in self._examples)

    @property
    def examples(self) -> Sequence[Example]:
        return self._examples

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

        batch = {
            "input_ids": rows([example.ids for example in examples], self._padding_id),
            "labels": rows([example.labels for example in examples], IGNORED),
        }
        if any(example.positions for example in examples):
            # Positions that begin anew tell the texts apart. What pads the end is seen by nothing before it.
            return batch | {"position_ids": rows([example.positions for example in examples], 0)}
        return batch | {"attention_mask": rows([(1,) * len(example.ids) for example in examples], 0)}


def packed(examples: Sequence[Example], sequence_length: int) -> list[Example]:
    """Several examples in each sequence, in order, none cut: each where it first fits."""
    rows: list[list[Example]] = []
    for example in examples:
        fitting = (
            row for row in rows[-_OPEN_ROWS:] if sum(len(item.ids) for item in row) + len(example.ids) <= sequence_length
        )
        row = next(fitting, None)
        if row is None:
            rows.append([example])
        else:
            row.append(example)
    return [_joined_row(row) for row in rows]


def _joined_row(row: Sequence[Example]) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for example in row:
        ids += example.ids
        # The first token of a text is nothing that the one before could tell.
        labels += (IGNORED, *example.labels[1:])
        positions += range(len(example.ids))
    return Example(tuple(ids), tuple(labels), row[0].line, tuple(positions))


def check_packing(model: Any, batches: Batches) -> None:
    """See that the texts of one sequence do not see each other, on the first two of a packed one.

    Raises:
        ConfigError: if the model mixes them.
    """
    row = next((row for row in batches.examples if row.positions.count(0) > 1), None)
    if row is None:
        return
    begins = [index for index, position in enumerate(row.positions) if position == 0][1:3]
    first, end = begins[0], (*begins, len(row.ids))[1]
    ids = torch.tensor([row.ids[:end]])
    with torch.no_grad():
        model.eval()
        together = model(input_ids=ids, position_ids=torch.tensor([row.positions[:end]]), use_cache=False).logits[0, first:]
        alone = model(input_ids=ids[:, first:], use_cache=False).logits[0]
        model.train()
    if not torch.allclose(together.float(), alone.float(), rtol=0.02, atol=0.02 * float(alone.abs().max())):
        raise ConfigError("this model mixes the texts that are packed into one sequence; leave out --packing")
