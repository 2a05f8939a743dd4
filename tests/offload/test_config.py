"""What a user may ask for."""

import pytest

from offload.budgets import Budgets, cgroup_limit_bytes, default_host_bytes, resolve_budgets, what_it_risks
from offload.config import parse_bytes
from offload.storage.devices.cpu import CpuDevice
from offload.storage.errors import BudgetTooSmall, ConfigError, gib
from offload.storage.process_memory import mapped_bytes, process_bytes
from tests.delayed import DelayedDevice


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GiB", 8 << 30),
        ("8 GiB", 8 << 30),
        ("8GB", 8 * 10**9),
        ("1.5MiB", 3 << 19),
        ("500mb", 500 * 10**6),
        ("4096 B", 4096),
        ("4194304", 4 << 20),
        (4096, 4096),
        ("2k", 2000),
        (None, None),
    ],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "8 elephants", "-1GiB", "0", 0, -5, "1e9", True, 0.5])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError):
        parse_bytes(text, "cpu_memory")


def test_one_budget_on_the_cpu_and_two_elsewhere():
    assert resolve_budgets(CpuDevice(), None, "1GiB", 0).host_bytes is None
    assert resolve_budgets(CpuDevice(), None, "1GiB", 0).device_bytes == 1 << 30
    budgets = resolve_budgets(DelayedDevice(), "1GiB", "2GiB", 0)
    assert (budgets.device_bytes, budgets.host_bytes) == (1 << 30, 2 << 30)
    assert resolve_budgets(DelayedDevice(), None, "2GiB", 0).device_bytes == (1 << 30) * 9 // 10


def test_the_default_is_under_what_there_is(monkeypatch):
    import psutil

    assert 0 < default_host_bytes(0) < psutil.virtual_memory().total
    monkeypatch.setattr("offload.budgets.cgroup_limit_bytes", lambda: process_bytes() + (1 << 30))
    assert default_host_bytes(0) <= (1 << 30) - (256 << 20)
    monkeypatch.setattr("offload.budgets.cgroup_limit_bytes", lambda: process_bytes())
    with pytest.raises(BudgetTooSmall, match="close other programs"):
        default_host_bytes(0)


def test_a_budget_that_leaves_no_room_for_code_is_told_its_risk(monkeypatch):
    budget = Budgets(1 << 30, None)
    monkeypatch.setattr("offload.budgets.cgroup_limit_bytes", lambda: None)
    assert what_it_risks(budget, 0) is None
    with_code = process_bytes() + mapped_bytes() + (1 << 30)
    monkeypatch.setattr("offload.budgets.cgroup_limit_bytes", lambda: with_code + (64 << 20))
    assert what_it_risks(budget, 0) is None
    monkeypatch.setattr("offload.budgets.cgroup_limit_bytes", lambda: with_code - (64 << 20))
    assert "cpu_memory=1.00 GiB is more than the" in what_it_risks(budget, 0)
    assert what_it_risks(budget, 128 << 20) is None
    # Beside a card it is its own budget.
    assert what_it_risks(Budgets(1 << 30, 1 << 20), 0) is None


def test_limits_of_control_groups_are_read(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "a" / "memory.max").write_text("1000000\n")
    (tmp_path / "a" / "b" / "memory.max").write_text("5000000\n")
    from offload import budgets

    assert budgets._limits_along(str(tmp_path), "/a/b", "memory.max") == [1_000_000, 5_000_000]
    assert cgroup_limit_bytes() is None or cgroup_limit_bytes() > 0


@pytest.mark.parametrize("count", [1, 1023, 1707383, 1 << 20, (1 << 30) + 1, 3_333_333_333])
def test_a_least_size_is_enough_as_it_is_printed(count):
    assert count <= parse_bytes(gib(count, at_least=True)) <= count + max(count // 50, 1 << 20)
