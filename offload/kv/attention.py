"""Attention over segments: each by itself, merged by the logarithm of the sum of exponents, in fp32.

One routine for pages that come one after another, for pages that the CPU reads where they are, for a prefix that many sequences
share (Hydragen, arXiv 2402.05099: the queries of all of them are one product's rows), and for what a policy chose.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from offload.kv.kv_block import BatchRows
from offload.kv.layer import PagedLayer
from offload.kv.page_layout import KeyValue
from offload.kv.policies.base import Selection
from offload.kv.reading import Reading

_GATHERED_TOKENS = 512
"""Short segments are put together up to so many tokens: a product's start costs more than copying them."""


class Partial(NamedTuple):
    """Attention to a part of the tokens.

    Attributes:
        output: fp32 [batch, heads, queries, value dim].
        weight: fp32 [batch, heads, queries]: the logarithm of the sum of exponents; minus infinity where nothing is seen.
    """

    output: torch.Tensor
    weight: torch.Tensor


def attend(
    layer: PagedLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `query` reads from a layer of the cache, its own tokens included.

    Args:
        query: [batch, heads, tokens, key dim].
        mask: by position, bool (True: seen) or added, [batch or 1, heads or 1, tokens, positions]; None: each token sees
            those before it.
        softcap: scores are softcap x tanh(score / softcap).
        sinks: [heads]: a score for nothing, beside those of the tokens.

    Returns:
        [batch, heads, tokens, value dim].
    """
    count = query.shape[2]
    if mask is None and count > 1:
        own = torch.arange(layer.length - count, layer.length, device=query.device)
        mask = (torch.arange(layer.length, device=query.device) <= own.unsqueeze(1)).view(1, 1, count, layer.length)
    merged: Partial | None = None
    for pair, allowed, rows in _segments(layer, query, mask):
        part = _partial(query, pair, allowed, rows, scale, softcap)
        merged = part if merged is None else merge(merged, part)
    assert merged is not None
    if sinks is not None:
        weight = sinks.float().view(1, -1, 1).expand(merged.weight.shape)
        merged = merge(merged, Partial(torch.zeros_like(merged.output), weight))
    return merged.output.to(query.dtype)


def merge(one: Partial, other: Partial) -> Partial:
    """Attention to both parts."""
    weight = torch.logaddexp(one.weight, other.weight)
    # Where neither sees anything there is nothing to weigh.
    base = torch.where(weight.isinf(), torch.zeros_like(weight), weight)
    ours, theirs = (one.weight - base).exp().unsqueeze(-1), (other.weight - base).exp().unsqueeze(-1)
    return Partial(one.output * ours + other.output * theirs, weight)


Segment = tuple[KeyValue, torch.Tensor | None, BatchRows | None]
"""Keys and values; which of them each query sees; which row of them each sequence reads."""


def _segments(layer: PagedLayer, query: torch.Tensor, mask: torch.Tensor | None) -> Iterator[Segment]:
    """What a query reads, in pieces worth a product each."""
    choices = layer.visible(query)
    batched: list[Segment] = []
    for choice, reading in zip(choices, layer.readings(choices), strict=True):
        segment = (reading.pair, _allowed(choice, query, mask), choice.block.rows)
        tokens = reading.pair.keys.shape[2]
        if batched and (tokens >= _GATHERED_TOKENS or not _alike(batched[-1], segment)):
            yield _joined(batched)
            batched = []
        if tokens >= _GATHERED_TOKENS:
            yield segment
        else:
            # Its place is given back before it is read with the others.
            batched.append((_copied(reading), segment[1], segment[2]))
            if sum(item[0].keys.shape[2] for item in batched) >= _GATHERED_TOKENS:
                yield _joined(batched)
                batched = []
        reading.done()
    if batched:
        yield _joined(batched)


def _copied(reading: Reading) -> KeyValue:
    return KeyValue(reading.pair.keys.clone(), reading.pair.values.clone()) if reading.is_lent else reading.pair


def _alike(segment: Segment, next_one: Segment) -> bool:
    """Whether they can be one segment."""
    (pair, _, rows), (other, _, other_rows) = segment, next_one
    return rows is other_rows and pair.keys.shape[0] == other.keys.shape[0] and pair.keys.device == other.keys.device


def _joined(segments: list[Segment]) -> Segment:
    if len(segments) == 1:
        return segments[0]
    pairs = [segment[0] for segment in segments]
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
    masks = [segment[1] for segment in segments]
    allowed = None
    if any(mask is not None for mask in masks):
        known = [mask for mask in masks if mask is not None]
        shape = torch.broadcast_shapes(*(mask.shape[:3] for mask in known))
        filled = [
            known[0].new_ones((*shape, pair.keys.shape[2])) if mask is None else mask.expand(*shape, pair.keys.shape[2])
            for mask, pair in zip(masks, pairs, strict=True)
        ]
        allowed = torch.cat(filled, dim=3)
    return KeyValue(keys, values), allowed, segments[0][2]


def _allowed(choice: Selection, query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which tokens of a block each query sees: bool [batch or 1, heads or 1, queries or 1, tokens]; None for all."""
    block = choice.block
    ours = choice.allowed
    if ours is not None:
        ours = ours.view(1, 1, 1, -1) if ours.dim() == 1 else ours.expand(-1, -1, -1, block.tokens)
    if mask is None:
        return ours
    part = mask[..., block.start : block.end]
    part = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min
    return part if ours is None else part & ours


def _partial(
    query: torch.Tensor,
    pair: KeyValue,
    allowed: torch.Tensor | None,
    rows: BatchRows | None,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention of all queries to one segment, where the segment is."""
    device, home = pair.keys.device, query.device
    batch, heads, count, dim = query.shape
    stored, kv_heads = pair.keys.shape[0], pair.keys.shape[1]
    shared = 1 if rows is None else rows.sharing(stored)
    if rows is not None and not shared:
        pair = KeyValue(*(rows.of(part) for part in pair))
        stored, shared = batch, 1
    groups = heads // kv_heads
    # The queries that read the same keys are rows of one product: those of a group of heads, of sequences that share them.
    folded = (stored, shared, kv_heads, groups, count)
    queries = query.to(device).reshape(*folded, dim).permute(0, 2, 1, 3, 4, 5).reshape(stored, kv_heads, -1, dim)
    if allowed is not None:
        # Heads that share keys may see different tokens; those of a mask for all heads do not.
        tokens = allowed.shape[-1]
        by_head = allowed.to(device).expand(batch, heads if allowed.shape[1] > 1 else 1, count, tokens)
        if by_head.shape[1] == 1:
            by_head = by_head.expand(batch, groups, count, tokens).reshape(stored, shared, 1, groups, count, tokens)
        else:
            by_head = by_head.reshape(*folded, tokens)
        allowed = by_head.permute(0, 2, 1, 3, 4, 5).reshape(stored, by_head.shape[2], -1, tokens)
    output, weight = _product(queries, pair, allowed, scale, softcap)
    order = (stored, kv_heads, shared, groups, count)
    output = output.view(*order, -1).permute(0, 2, 1, 3, 4, 5).reshape(batch, heads, count, -1)
    weight = weight.view(order).permute(0, 2, 1, 3, 4).reshape(batch, heads, count)
    return Partial(output.to(home), weight.to(home))


def _product(
    queries: torch.Tensor, pair: KeyValue, allowed: torch.Tensor | None, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 output [rows, heads, queries, value dim] and logarithm of the sum of exponents [rows, heads, queries]."""
    # Called directly, torch's kernel takes it for granted that numbers of one token lie side by side.
    keys, values = (part if part.stride(-1) == 1 else part.contiguous() for part in pair)
    blind = None if allowed is None else ~allowed.any(dim=-1)
    if keys.device.type == "cpu" and softcap is None and keys.shape[-1] == values.shape[-1]:
        # torch's kernel keeps scores in fp32 and tells their sum; it takes no grouped heads, which are folded here.
        bias = None
        if allowed is not None:
            bias = torch.zeros(allowed.shape, dtype=queries.dtype).masked_fill_(~allowed, -torch.inf)
            bias = bias.expand(queries.shape[0], -1, -1, -1)
        output, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, False, attn_mask=bias, scale=scale
        )
        output = output.float()
    else:
        scores = queries.float() @ keys.float().transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        weight = torch.logsumexp(scores, dim=-1)
        base = torch.where(weight.isinf(), torch.zeros_like(weight), weight)
        output = (scores - base.unsqueeze(-1)).exp() @ values.float()
    if blind is not None:
        blind = blind.expand(weight.shape)
        weight = weight.masked_fill(blind, -torch.inf)
        output = output.masked_fill(blind.unsqueeze(-1), 0.0)
    return output, weight
