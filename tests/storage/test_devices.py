"""One suite that every device passes; tests/gpu runs it on CUDA."""

import pytest
import torch
from typing_extensions import get_protocol_members

from benchmarks.throttled import ThrottledDevice
from offload.storage.devices.base import Device
from offload.storage.devices.cpu import CpuDevice
from offload.storage.host_buffer import HostBuffer
from tests.delayed import DelayedDevice


class DeviceContract:
    """What the runtime relies on."""

    @pytest.fixture
    def device(self):
        raise NotImplementedError

    def test_it_has_all_that_a_device_has(self, device):
        assert not [name for name in get_protocol_members(Device) if not hasattr(device, name)]

    def test_memory_is_aligned(self, device):
        buffer = device.allocate(10_000)
        assert buffer.tensor.data_ptr() % 256 == 0
        assert buffer.tensor.numel() >= 10_000
        assert buffer.tensor.dtype == torch.uint8
        assert buffer.tensor.device.type == device.torch_device.type

    def test_memory_allocated_under_inference_mode_can_be_trained_with(self, device):
        with torch.inference_mode():
            buffer = device.allocate(4096)
        assert not buffer.tensor.is_inference()

    def test_a_copy_arrives_when_its_event_is_passed(self, device):
        source = HostBuffer(1 << 20)
        source.tensor.copy_(torch.arange(1 << 20) % 251)
        locked = device.lock_pages(source)
        target = device.allocate(1 << 20).tensor[: 1 << 20]
        device.copy_in([(target, source.tensor)]).synchronize()
        assert torch.equal(target.cpu(), source.tensor)
        if locked:
            device.unlock_pages(source)

    def test_a_copy_is_no_change_to_autograd(self, device):
        """Other slots lie in the same memory: a tensor of one may be saved while another one is filled."""
        source = HostBuffer(1 << 20)
        slots = device.allocate(2 << 20).tensor[: 2 << 20]
        first, second = slots[: 1 << 20].view(torch.float32), slots[1 << 20 :]
        first.fill_(2.0)
        version = slots._version

        def pack(tensor):
            # What a link's thread does at any moment.
            device.copy_in([(second, source.tensor)], [device.record()]).synchronize()
            device.copy_out(source.tensor, second).synchronize()
            return tensor

        factor = torch.ones(1 << 18, device=first.device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            product = (first * factor).sum()
        product.backward()
        assert slots._version == version
        assert torch.equal(factor.grad, first)

    def test_compute_waits_for_a_copy(self, device):
        source = HostBuffer(1 << 20)
        target = device.allocate(1 << 20).tensor[: 1 << 20]
        for value in range(20):
            source.tensor.fill_(value)
            event = device.copy_in([(target, source.tensor)], [device.record()])
            device.wait(event)
            total = (target == value).sum()
            assert int(total) == 1 << 20
            event.synchronize()

    def test_a_copy_starts_after_what_it_was_told_to_wait_for(self, device):
        source, second = HostBuffer(1 << 20), HostBuffer(1 << 20)
        source.tensor.fill_(1)
        second.tensor.fill_(2)
        target = device.allocate(1 << 20).tensor[: 1 << 20]
        for _ in range(10):
            first = device.copy_in([(target, source.tensor)])
            device.copy_in([(target, second.tensor)], [first]).synchronize()
            assert int(target.sum()) == 2 << 20

    def test_figures(self, device):
        assert device.free_bytes() > 0
        assert all(end >= begin for begin, end in device.ended_stalls())
        assert all(copy.end_seconds >= copy.begin_seconds for copy in device.ended_copies())
        device.synchronize()


class TestCpu(DeviceContract):
    @pytest.fixture
    def device(self):
        return CpuDevice()


class TestThrottled(DeviceContract):
    """What the benchmark of the planner runs on."""

    @pytest.fixture
    def device(self):
        return ThrottledDevice(1e9)


class TestDelayed(DeviceContract):
    @pytest.fixture
    def device(self):
        return DelayedDevice()


def test_host_memory_is_exact_and_each_view_its_own_storage():
    buffer = HostBuffer(10_000)
    assert buffer.nbytes == 12_288
    assert buffer.address % 4096 == 0
    view = buffer.own_storage(4096, 100)
    assert view.untyped_storage().nbytes() == 100
    view.fill_(7)
    assert int(buffer.tensor[4096:4196].sum()) == 700


def test_host_memory_tells_what_of_it_is_in_ram():
    buffer = HostBuffer(8 << 20, prefault=False)
    assert buffer.resident_bytes == 0
    buffer.tensor[: 1 << 20].fill_(1)
    # A huge page, where there are any.
    assert 1 << 20 <= buffer.resident_bytes <= 4 << 20
    assert HostBuffer(1 << 20).resident_bytes == 1 << 20
