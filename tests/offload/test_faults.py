"""A disk whose n-th call fails, is cut short or is late: a clear error or the right result, nothing lost, no hang.

In `make test` a few n, in `make test-all` every n until a scenario ends before its fault comes, up to 200.
"""

import errno
import os
import time
from pathlib import Path

import pytest
import torch

from offload import OffloadError, Training, offload
from offload.adapters.peft import load_adapters, merge
from tests.architectures import make, tokens
from tests.budgets import NONE, budget_for, spec_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SOME_CALLS = (1, 3, 8)
LOST = {"spilling": {"write: disk full": (40,)}}
"""Calls at which weights were lost once: the index at the end of the file that they are spilled to."""

MOST_CALLS = 200
_READ, _WRITE = os.preadv, os.pwrite


class Disk:
    """Counts reads and writes of the runtime; the n-th of one of them is not as it should be."""

    def __init__(self, kind: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.number, self.calls = kind, number, 0
        monkeypatch.setattr(os, "preadv", self._preadv)
        monkeypatch.setattr(os, "pwrite", self._pwrite)

    @property
    def came(self) -> bool:
        return self.calls >= self.number

    def _is_it(self, link: str) -> bool:
        if not self.kind.startswith(link):
            return False
        self.calls += 1
        return self.calls == self.number

    def _preadv(self, descriptor, buffers, offset, *more):
        if self._is_it("read"):
            if self.kind == "read fails":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if self.kind == "read is late":
                time.sleep(0.05)
            if self.kind == "read is short":
                (buffer,) = buffers
                # As the kernel does: a part, in whole units of the disk.
                half = max(4096, len(buffer) // 2 // 4096 * 4096)
                return _READ(descriptor, [buffer[:half]], offset, *more)
        return _READ(descriptor, buffers, offset, *more)

    def _pwrite(self, descriptor, content, offset):
        if self._is_it("write"):
            if self.kind == "write: disk full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.kind == "write is short":
                return _WRITE(descriptor, content[: max(4096, len(content) // 2 // 4096 * 4096)], offset)
        return _WRITE(descriptor, content, offset)


KINDS = ["read fails", "read is short", "read is late", "write: disk full", "write is short"]


@torch.no_grad()
def logits(model):
    return model(tokens(2, 8), use_cache=False).logits


def generated(model, prompt=8):
    return model.generate(tokens(2, prompt), max_new_tokens=4, min_new_tokens=4, do_sample=False)


def budget(target):
    return budget_for(spec_of(target, batch_size=2, max_tokens=16), NONE, 2, 16)


def loading(folder: Path):
    """Weights are streamed from a checkpoint."""
    with offload(
        folder / "model", device="cpu", cpu_memory=budget(str(folder / "model")), batch_size=2, max_tokens=16
    ) as session:
        return generated(session.model)


def spilling(folder: Path):
    """Weights that no file holds are written to one, and read back in the end: whatever came of it, the model is whole."""
    model = make("llama")
    try:
        with offload(
            model, device="cpu", cpu_memory=budget(model), batch_size=2, max_tokens=16, disk_dir=str(folder / "spill")
        ) as session:
            return generated(session.model)
    finally:
        assert torch.equal(logits(model), logits(make("llama")))


def converting(folder: Path):
    """A mixture's experts, which lie in files one by one, are joined in a file of their own."""
    options = {"cpu_memory": 1 << 20, "batch_size": 2, "max_tokens": 16, "disk_dir": str(folder / "spill")}
    with offload(folder / "mixture", device="cpu", expert_policy="layers", **options) as session:
        return generated(session.model)


def kv_pages(folder: Path):
    options = {"kv_memory": 64 << 10, "batch_size": 2, "max_tokens": 200, "disk_dir": str(folder / "pages")}
    with offload(make("llama"), device="cpu", cpu_memory=1 << 28, **options) as session:
        return generated(session.model, 180)


def prefix_blocks(folder: Path):
    """The second session takes up what the first one kept."""
    found = []
    for _ in range(2):
        options = {"prefix_cache": str(folder / "prefixes"), "exactness": "rounding", "batch_size": 1, "max_tokens": 400}
        with offload(folder / "model", device="cpu", cpu_memory=1 << 28, **options) as session:
            ids = tokens(1, 380)
            cache = session.kv_cache(ids)
            found.append(
                session.model.generate(ids, past_key_values=cache, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            )
    assert torch.equal(found[0], found[1])
    return found[1]


def states(folder: Path):
    """Optimizer states and trained weights on the disk, and a checkpoint of them."""
    training = Training(full=True, state_tier="nvme", learning_rate=1e-2, sub_group_elements=4096)
    options = {"device": "cpu", "cpu_memory": "64MiB", "batch_size": 2, "max_tokens": 16, "training": training}
    ids = tokens(2, 8)
    with offload(folder / "model", disk_dir=str(folder / "states"), **options) as session:
        for _ in range(2):
            session.backward([lambda: session.model(input_ids=ids, labels=ids, use_cache=False).loss])
            session.step()
        session.save(folder / "run", {"step": 2})
        session.finish()
    with offload(folder / "model", disk_dir=str(folder / "states"), **options) as session:
        progress = session.resume(folder / "run")
        assert progress == {"step": 2}
        return logits(session.model)


def merging(folder: Path):
    return logits(merge(load_adapters(type(make("llama")).from_pretrained(folder / "model"), str(folder / "adapter"))))


SCENARIOS = [loading, spilling, converting, kv_pages, prefix_blocks, states, merging]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("whole")
    make("llama").save_pretrained(folder / "model")
    make("mixtral").save_pretrained(folder / "mixture")
    torch.manual_seed(2)
    adapted = get_peft_model(make("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder


_expected: dict[str, torch.Tensor] = {}


def attempt(scenario, kind, number, prepared, folder, monkeypatch) -> bool:
    """Run with one fault; whether it came at all."""
    folder.mkdir()
    for name in ("model", "mixture", "adapter"):
        (folder / name).symlink_to(prepared / name)
    for name in ("spill", "pages", "states"):
        (folder / name).mkdir()
    if scenario.__name__ not in _expected:
        clean = folder / "clean"
        clean.mkdir()
        for name in ("model", "mixture", "adapter", "spill", "pages", "states"):
            (clean / name).symlink_to(folder / name)
        _expected[scenario.__name__] = scenario(clean)
    with monkeypatch.context() as patch:
        disk = Disk(kind, number, patch)
        try:
            assert torch.equal(scenario(folder), _expected[scenario.__name__])
        except OffloadError as error:
            assert disk.came
            assert kind in ("read fails", "write: disk full"), f"call {number}: {error}"
            assert len(str(error)) > 20
    left = [path for path in folder.rglob("*") if path.name.endswith(".partial") and not path.is_symlink()]
    assert not left, f"call {number} left {left}"
    # What was kept serves the next run, or is made anew.
    if scenario is prefix_blocks:
        assert torch.equal(scenario(folder), _expected[scenario.__name__])
    return disk.came


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_few_calls(scenario, kind, prepared, tmp_path, monkeypatch):
    for number in (*SOME_CALLS, *LOST.get(scenario.__name__, {}).get(kind, ())):
        if not attempt(scenario, kind, number, prepared, tmp_path / str(number), monkeypatch):
            break


@pytest.mark.every_case
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_call(scenario, kind, prepared, tmp_path, monkeypatch):
    for number in range(1, MOST_CALLS + 1):
        if not attempt(scenario, kind, number, prepared, tmp_path / str(number), monkeypatch):
            break
