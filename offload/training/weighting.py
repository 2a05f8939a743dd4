"""How much each micro-batch of a step counts: as many items as it has of all of the step's."""

from collections.abc import Mapping, Sequence

import torch

from offload.storage.errors import ConfigError

IGNORED = -100
"""The label of a token that the loss does not count; transformers' own."""


def item_count(batch: Mapping[str, torch.Tensor]) -> int:
    """The items that a causal model's loss is the mean of: labels that something comes before, less those ignored.

    Args:
        batch: `labels` is [sequences, tokens], or `shift_labels`, where they are shifted already.
    """
    shifted = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][..., 1:]
    return int((shifted != IGNORED).sum())


def token_shares(batches: Sequence[Mapping[str, torch.Tensor]]) -> list[float]:
    """The share of each micro-batch in a step: its items over those of all.

    A model's loss is the mean over the items of its batch. Means of batches with different numbers of items do not add up to
    the mean over the step; times these shares they do, as in one batch of all:

        for batch, share in zip(batches, token_shares(batches)):
            (model(**batch).loss * share).backward()

    Args:
        batches: the micro-batches of one step, with their labels.

    Raises:
        ConfigError: if there is nothing to learn from in any of them.
    """
    counts = [item_count(batch) for batch in batches]
    if not sum(counts):
        raise ConfigError("the micro-batches of this step have no label that the loss counts: there is nothing to learn")
    return [count / sum(counts) for count in counts]
