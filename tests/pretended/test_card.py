"""What the pretended card does like a card: when a release of torch breaks it, this says so."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _card(card):
    return card


@pytest.fixture
def numbers():
    return torch.arange(12, device="cuda", dtype=torch.float32).view(3, 4)


MIXED = {
    "a sum": lambda card: card + torch.ones(3, 4),
    "a product": lambda card: card @ torch.ones(4, 2),
    "an embedding": lambda card: torch.nn.functional.embedding(torch.tensor([0, 1]), card),
    "in place": lambda card: card.clone().add_(torch.ones(3, 4)),
    "a list": lambda card: torch.cat([card, torch.ones(1, 4)]),
    "a bias": lambda card: torch.nn.functional.linear(card, torch.randn(5, 4, device="cuda"), torch.randn(5)),
}


@pytest.mark.parametrize("what", list(MIXED))
def test_devices_do_not_mix(what, numbers):
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[what](numbers)


def test_numbers_of_the_cpu_are_taken(numbers):
    assert torch.equal((numbers + torch.tensor(2.0)).cpu(), numbers.cpu() + 2)
    assert torch.equal(numbers[torch.tensor([0, 2])].cpu(), numbers.cpu()[[0, 2]])


def test_results_are_those_of_the_cpu(numbers):
    host = numbers.cpu()
    for function in (torch.sort, lambda value: value.topk(2), lambda value: value.cumsum(0), lambda value: value.softmax(-1)):
        found, wanted = function(numbers), function(host)
        found, wanted = (found, wanted) if isinstance(found, torch.Tensor) else (found[0], wanted[0])
        assert found.device.type == "cuda"
        assert torch.equal(found.cpu(), wanted)


def test_freed_memory_holds_nothing():
    torch.full((4096,), 7.0, device="cuda")
    assert torch.empty(4096, device="cuda").isnan().all()


def test_memory_is_limited(card):
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            torch.empty(card.total_bytes // 500, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_peaks_are_counted():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    assert torch.cuda.max_memory_allocated() >= before + (1 << 20)


def test_autograd_runs_on_its_own_thread_and_knows_where_gradients_belong(numbers):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.data = weight.data.cuda()
    (numbers @ weight).square().sum().backward()
    assert weight.grad.device.type == "cuda"


class TestOrder:
    @pytest.fixture
    def side(self):
        return torch.Stream("cuda")

    @pytest.fixture
    def host(self, card):
        from offload.storage.host_buffer import HostBuffer

        buffer = HostBuffer(4096)
        assert card.lock(buffer.address, buffer.nbytes) == 0
        yield buffer
        card.unlock(buffer.address)
        card.violations()

    def test_a_copy_lands_when_somebody_waits_for_it(self, side, host, numbers):
        target = torch.zeros(4096, dtype=torch.uint8, device="cuda")
        torch.accelerator.synchronize()
        host.tensor.fill_(5)
        with side:
            target.copy_(host.tensor, non_blocking=True)
            event = side.record_event()
        assert not event.query()
        host.tensor.fill_(6)
        event.wait()
        # It took the bytes that were there when it was waited for: the source must stay as it is until then.
        assert bool((target == 6).all())

    def test_compute_that_does_not_wait_for_a_copy_is_refused(self, side, host):
        target = torch.zeros(4096, dtype=torch.uint8, device="cuda")
        torch.accelerator.synchronize()
        with side:
            target.copy_(host.tensor, non_blocking=True)
        with pytest.raises(RuntimeError, match=r"unordered access: aten::add.* reads what a copy"):
            target + 1

    def test_a_copy_that_does_not_wait_for_compute_is_refused(self, side, host):
        target = torch.zeros(4096, dtype=torch.uint8, device="cuda")
        with side, pytest.raises(RuntimeError, match=r"unordered access: a copy .* writes what"):
            target.copy_(host.tensor, non_blocking=True)

    def test_memory_that_a_side_stream_reads_is_not_freed(self, side, host, card):
        source = torch.zeros(4096, dtype=torch.uint8, device="cuda")
        torch.accelerator.synchronize()
        with side:
            host.tensor.copy_(source, non_blocking=True)
        del source
        assert "freeing" in card.violations()[0]

    def test_what_is_ordered_passes(self, side, host):
        target = torch.zeros(4096, dtype=torch.uint8, device="cuda")
        side.wait_event(torch.accelerator.current_stream().record_event())
        with side:
            target.copy_(host.tensor, non_blocking=True)
            arrived = side.record_event()
        arrived.wait()
        (target + 1).sum()


def test_waits_are_counted_by_place(card, numbers):
    before = card.host_waits()
    numbers.sum().item()
    new = {key: count - before.get(key, 0) for key, count in card.host_waits().items() if count > before.get(key, 0)}
    ((what, place),) = new
    assert what == "item"
    assert place.startswith("tests/pretended/test_card.py:")


def test_the_clock_passes_as_a_test_says(card):
    torch.accelerator.synchronize()
    begun = card.host_seconds()
    card.set_speeds(0.5, 0.0, 0.0, 0.0, 0.0)
    try:
        torch.zeros(4, device="cuda").add_(1).mul_(2)
        torch.accelerator.synchronize()
    finally:
        card.set_speeds(0.0, 0.0, 0.0, 0.0, 0.0)
    assert card.host_seconds() - begun == pytest.approx(1.5)
