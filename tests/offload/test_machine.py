"""Several sessions on one machine, and what plugs into a session."""

import threading

import pytest
import torch

from offload import BudgetTooSmall, ConfigError, offload, open_machine
from offload.runtime.component import Component
from offload.session import opening
from tests.architectures import make, oracle_of, tokens

MIB = 1 << 20


def test_two_sessions_share_memory_and_compute_the_same():
    first, second = make("llama"), make("gpt2")
    wanted = [oracle_of(model).generate(input_ids=tokens(), max_new_tokens=4, do_sample=False) for model in (first, second)]
    with open_machine("cpu", cpu_memory="2MiB") as machine:
        with offload(first, machine=machine, cpu_memory="1MiB", max_tokens=32) as one:
            with offload(second, machine=machine, max_tokens=32) as other:
                assert machine.ledger.used_bytes == one.machine.ledger.used_bytes + other.machine.ledger.used_bytes
                assert machine.ledger.used_bytes <= 2 * MIB
                for session, expected in zip((one, other), wanted, strict=True):
                    found = session.model.generate(input_ids=tokens(), max_new_tokens=4, do_sample=False)
                    assert torch.equal(found, expected)
                # Each reports on itself, over the links of the machine.
                assert one.report().decode.passes == other.report().decode.passes == 3
                assert one.machine.host.reads is other.machine.host.reads
            assert machine.ledger.used_bytes == one.machine.ledger.used_bytes
        assert machine.ledger.used_bytes == 0


def test_a_session_gets_what_the_others_leave():
    with open_machine("cpu", cpu_memory="2MiB") as machine, offload(make("llama"), machine=machine, cpu_memory="1MiB"):
        with pytest.raises(BudgetTooSmall, match=r"free"):
            offload(make("gpt2"), machine=machine, cpu_memory="2MiB").__enter__()
        held = machine.ledger.used_bytes
        with pytest.raises(BudgetTooSmall):
            offload(make("gpt2"), machine=machine, cpu_memory="16KiB").__enter__()
        assert machine.ledger.used_bytes == held
        with pytest.raises(ConfigError, match="one budget"):
            offload(make("gpt2"), machine=machine, gpu_memory="1MiB").__enter__()
    with pytest.raises(ConfigError, match="its own"):
        offload(make("llama"), machine=machine, device="cpu")


def test_one_forward_at_a_time_computes_on_a_machine():
    inside, most = [0], [0]
    with (
        open_machine("cpu", cpu_memory="4MiB") as machine,
        offload(make("llama"), machine=machine, cpu_memory="1MiB", max_tokens=32) as one,
        offload(make("llama"), machine=machine, cpu_memory="1MiB", max_tokens=32) as other,
    ):
        for session in (one, other):
            layer = session.model.model.layers[0]
            layer.register_forward_pre_hook(lambda *call: inside.__setitem__(0, inside[0] + 1))
            layer.register_forward_pre_hook(lambda *call: most.__setitem__(0, max(most[0], inside[0])))
            layer.register_forward_hook(lambda *call: inside.__setitem__(0, inside[0] - 1))

        def generate(session):
            session.model.generate(input_ids=tokens(), max_new_tokens=8, do_sample=False)

        threads = [threading.Thread(target=generate, args=(session,)) for session in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most[0] == 1


class Extra(Component):
    """Counts what the session asks of it."""

    name = "extra"

    def __init__(self):
        self.calls, self.started, self.waited, self.slots = [], [], [], 0

    def take_slots(self, plan):
        self.slots += 1

    def free_slots(self):
        self.slots -= 1

    def extras(self, block, call):
        component = self

        class Arrival:
            def wait(self):
                component.waited.append(block)
                return {"extra": 0.0}

            def cancel(self):
                component.waited.append(block)

        self.started.append((block, None if call is None else call.kind.value))
        return [Arrival()]

    def before_pass(self, call):
        self.calls.append((call.kind.value, call.batch_size, call.tokens, call.cached_tokens))

    def usage(self):
        return {"started": len(self.started)}


def test_a_component_is_asked_at_each_step(monkeypatch):
    extra, real = Extra(), opening.components_of
    monkeypatch.setattr(opening, "components_of", lambda *args: [*real(*args), extra])
    model = make("llama")
    wanted = oracle_of(model).generate(input_ids=tokens(2, 5), max_new_tokens=3, do_sample=False)
    with offload(model, device="cpu", cpu_memory="300KiB", batch_size=2, max_tokens=8) as session:
        assert torch.equal(session.model.generate(input_ids=tokens(2, 5), max_new_tokens=3, do_sample=False), wanted)
        assert extra.slots == 1
        assert session.plan.weights.streamed
        assert {block for block, _ in extra.started} >= set(session.plan.weights.streamed)
        assert {kind for _, kind in extra.started} >= {"prefill", "decode"}
    assert extra.calls == [("prefill", 2, 5, 0), ("decode", 2, 1, 5), ("decode", 2, 1, 6)]
    # What travels with a block is waited for, or ended with it.
    assert len(extra.waited) == len(extra.started)
    assert extra.slots == 0
