"""What is said of bytes, time and memory, against what is seen from outside of the runtime."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload import Training, offload
from offload.planning.dry_run import DryRun
from offload.scheduler.hardware import LinkRate
from offload.scheduler.model_spec import Workload
from tests.architectures import make, tokens
from tests.budgets import NONE, budget_for, spec_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def bytes_of_process() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def test_each_page_is_written_once_and_read_once_a_pass(tmp_path):
    """Of the pages that do not stay: by what the kernel counts of this process."""
    model = make("llama")
    options = {"kv_memory": 64 << 10, "batch_size": 1, "max_tokens": 512, "disk_dir": str(tmp_path)}
    with offload(model, device="cpu", cpu_memory=1 << 28, **options) as session, torch.inference_mode():
        before = bytes_of_process()
        session.model.generate(tokens(1, 480), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        after = bytes_of_process()
        pool = session._kv.paged.store.raw
        pages, page_bytes = session._kv.paged.store.sealed, pool.page_bytes
    written, read = (after[name] - before[name] for name in ("wchar", "rchar"))
    assert pool.written_bytes > 8 * page_bytes
    assert pages * page_bytes >= pool.written_bytes
    assert pool.written_bytes <= written <= pool.written_bytes + page_bytes
    # What is read of files beside is the process's own state: its memory, its maps.
    assert pool.onloaded_bytes <= read <= pool.onloaded_bytes + (4 << 20)


class LiveBytes(TorchDispatchMode):
    """The most memory that results of operations held at once, without what `known` holds."""

    def __init__(self, known):
        super().__init__()
        self._known = {value.untyped_storage().data_ptr() for value in known}
        self._live: dict[int, tuple[int, object]] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        import weakref

        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self._known:
                storage = value.untyped_storage()
                if storage._cdata not in self._live:
                    self._live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._live.pop, storage._cdata, None)
        self.most = max(self.most, sum(self._live.values()))
        return result


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_predicted_temporaries_are_those_of_a_pass(name):
    model = make(name)
    batch, prompt = 2, 96
    predicted = DryRun(model).forward(batch, prompt).activation_bytes
    meter = LiveBytes([*model.parameters(), *model.buffers()])
    with torch.no_grad(), meter:
        model(tokens(batch, prompt), use_cache=False, logits_to_keep=1)
    assert 0.5 * meter.most <= predicted <= 3 * meter.most
    reserved = Workload(batch, prompt, prompt).activation_bytes(spec_of(model, batch_size=batch, max_tokens=prompt))
    assert reserved >= 0.5 * meter.most


def test_a_link_takes_its_latency_and_its_bytes():
    assert LinkRate(2e9, 0.25).seconds(1e9) == 0.75


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_training_is_resumed_with_the_generators_state(tier, tmp_path):
    """What a user's own loop draws: dropout, shuffling."""
    make("llama").save_pretrained(tmp_path / "model")
    training = Training(full=True, state_tier=tier)
    reserve = {"device": "cpu", "cpu_memory": "64MiB", "batch_size": 2, "max_tokens": 16, "training": training}
    ids = tokens(2, 8)
    with offload(tmp_path / "model", **reserve) as session:
        session.backward([lambda: session.model(input_ids=ids, labels=ids, use_cache=False).loss])
        session.step()
        torch.manual_seed(77)
        torch.rand(5)
        session.save(tmp_path / "run")
        expected = torch.rand(5)
    torch.manual_seed(1)
    with offload(tmp_path / "model", **reserve) as session:
        session.resume(tmp_path / "run")
        assert torch.equal(torch.rand(5), expected)


def test_what_streams_is_read_from_the_file_once_a_pass(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path)
    spec = spec_of(str(tmp_path), batch_size=1, max_tokens=16)
    budget = budget_for(spec, NONE, 1, 16)
    with offload(tmp_path, device="cpu", cpu_memory=budget, batch_size=1, max_tokens=16) as session, torch.inference_mode():
        session.model(tokens(1, 8))
        streamed = session.report().streamed_bytes_per_pass
        before = bytes_of_process()["rchar"]
        for _ in range(20):
            session.model(tokens(1, 8))
        read = bytes_of_process()["rchar"] - before
    assert streamed > 100_000
    # Whole units are read around tensors; one pass's prefetch may be under way.
    assert 19 * streamed <= read <= 21 * (streamed * 1.35 + 20_000)
