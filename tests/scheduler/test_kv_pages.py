"""How a KV cache is cut, which pages stay, and what is predicted of it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as some

from offload.scheduler.cost import CostModel
from offload.scheduler.kv_pages import KvShape, PagedKv, PageResidency, coming, cpu_reads_pages, cut, paged_ways, streamed_bytes
from offload.scheduler.model_spec import Workload
from offload.scheduler.planner import make_plan
from offload.scheduler.prediction import predict
from offload.storage.errors import BudgetTooSmall
from tests.scheduler.machines import GIB, LAPTOP, MIB, RTX_4090, stack, work


@given(
    layers=some.integers(1, 40),
    token_bytes=some.integers(16, 9000),
    batch=some.integers(1, 40),
    tokens=some.integers(1, 5000),
    memory=some.integers(1, 1 << 32),
    segments=some.booleans(),
    page_tokens=some.none() | some.integers(1, 64),
)
def test_a_cut_is_within_the_memory(layers, token_bytes, batch, tokens, memory, segments, page_tokens):
    shape = KvShape(layers, token_bytes)
    try:
        pages = cut(shape, batch, tokens, memory, segments, page_tokens)
    except BudgetTooSmall as error:
        assert error.least_bytes > memory
        least = cut(shape, batch, tokens, error.least_bytes, segments, page_tokens)
        assert least.nbytes <= error.least_bytes
        with pytest.raises(BudgetTooSmall):
            cut(shape, batch, tokens, error.least_bytes - 1, segments, page_tokens)
        return
    assert pages.nbytes <= memory
    assert pages.page_bytes % 4096 == 0
    assert pages.page_bytes >= batch * token_bytes * (page_tokens or 1)
    assert pages.ring_pages >= 2
    assert pages.resident_pages(layers) >= 0
    assert (pages.assembled_bytes == 0) == segments


@given(some.lists(some.tuples(some.sampled_from(["add", "remove"]), some.integers(0, 4)), max_size=80), some.integers(0, 12))
def test_what_stays_is_spread_evenly_and_never_too_much(steps, limit):
    residency, held, number = PageResidency(limit), [], 0
    for step, layer in steps:
        if step == "add":
            number += 1
            residency.add(layer, number)
            held.append((layer, number))
        elif held:
            residency.remove(held.pop(layer % len(held))[1])
        while (leaving := residency.next_to_go()) is not None:
            counts = {key: sum(other == key for other, _ in held) for key, _ in held}
            assert counts[leaving[0]] == max(counts.values())
            held.remove(leaving)
        assert len(held) <= limit


def test_pages_come_in_the_order_in_which_layers_read_them():
    layers = [["a1", "a2"], [], ["c1"], ["d1", "d2"]]
    assert list(coming(layers, 0, 1)) == ["a2", "c1", "d1", "d2"]
    assert list(coming(layers, 3, 2)) == ["a1", "a2", "c1"]


def test_less_memory_is_tried_until_pages_do_not_fit():
    ways = paged_ways(KvShape(4, 512), 1, 4096, None, [False, True])
    sizes = [way.memory_bytes for way in ways if not way.segments]
    assert sizes == sorted(sizes, reverse=True)
    assert min(way.memory_bytes for way in ways if way.segments) < min(sizes)
    with pytest.raises(BudgetTooSmall):
        paged_ways(KvShape(4, 512), 1, 4096, 1000, [False, True])
    *_, least = paged_ways(KvShape(4, 16), 1, 20, None, [True], anyway=True)
    assert cut(KvShape(4, 16), 1, 20, least.memory_bytes, True)


def test_what_is_streamed_is_what_does_not_stay():
    shape = KvShape(8, 512)
    pages = cut(shape, 1, 4096, 8 * 512 * 4096 // 8, True)
    full = 8 * (4095 // (pages.page_bytes // 512))
    assert streamed_bytes(shape, pages, 1, 4096) == (full - pages.resident_pages(8)) * pages.page_bytes
    assert streamed_bytes(shape, pages, 1, 2) == 0


def _with_kv(layers=16):
    shape = KvShape(layers, 4096)
    return replace(stack(layers, 64 * MIB), kv_bytes_per_token=shape.all_token_bytes, kv=shape)


def _predicted(memory, *, segments=False, hardware=RTX_4090, context=30_000):
    model = _with_kv()
    workload = Workload(1, 32_768, 512, paged=PagedKv(memory, segments) if memory else None)
    plan = make_plan(model, 8 * GIB, workload, 48 * GIB)
    decode = replace(work(model, "decode", 1), context_tokens=context)
    return plan, predict(plan, model, CostModel(hardware, "bfloat16"), [work(model, "prefill", 512)], decode)


def test_prediction_knows_what_pages_cost_the_bus():
    """Half of the cache below: a token takes at least as long as its bytes take on the bus."""
    whole = 16 * 4096 * 32_768
    plain, with_all = _predicted(0)
    paged, with_half = _predicted(whole // 2)
    assert plain.kv.memory_bytes == 0 and paged.kv.memory_bytes == whole // 2
    # Pages that come and go, and those that are filled, keep none of the device's half: all that does not stay has room.
    assert paged.kv.host_bytes >= whole - paged.kv.resident_bytes
    below = 30_000 * 16 * 4096 - paged.kv.resident_bytes
    assert with_half.seconds_per_token >= below / RTX_4090.h2d.bytes_per_second
    assert with_half.seconds_per_token <= with_all.seconds_per_token + 1.1 * below / RTX_4090.h2d.bytes_per_second
    assert with_half.bound == "h2d"
    assert _predicted(whole // 2, context=10)[1].seconds_per_token == pytest.approx(with_all.seconds_per_token)


def test_the_cpu_reads_pages_where_the_bus_is_slow():
    """Laptop: 6 GB/s on the bus, 60 of memory. The 4090 has 25 on the bus: there the CPU still wins by a little."""
    assert cpu_reads_pages(LAPTOP)
    fast = replace(RTX_4090, h2d=replace(RTX_4090.h2d, bytes_per_second=50e9))
    assert not cpu_reads_pages(fast)
    assert not cpu_reads_pages(None)
    whole = 16 * 4096 * 32_768
    beside = _predicted(whole // 4, segments=True, hardware=LAPTOP)[1]
    brought = _predicted(whole // 4, hardware=LAPTOP)[1]
    assert beside.seconds_per_token < brought.seconds_per_token / 2


def test_memory_goes_where_it_saves_the_most():
    """Weights first, which all of it is used for in every token; then keys and values, which take some for coming and going."""
    model = _with_kv()
    cost = CostModel(LAPTOP, "bfloat16")
    whole = 16 * 4096 * 32_768

    def best(context, device_bytes):
        decode = replace(work(model, "decode", 1), context_tokens=context)
        found = {}
        for share in (2, 4, 8):
            workload = Workload(1, 32_768, 512, paged=PagedKv(whole // share))
            plan = make_plan(model, device_bytes, workload, 48 * GIB)
            found[share] = predict(plan, model, cost, [work(model, "prefill", 512)], decode).seconds_per_token
        return min(found, key=found.__getitem__)

    assert best(100, 5 * GIB // 4) == 8
    assert best(32_000, 5 * GIB // 4) == 8
    assert best(32_000, 4 * GIB) == 2
