"""What a dry run counted is kept in a file for the next process, where nothing but versions decides what it is."""

import pytest
from torch import nn

from offload.planning import counted_work
from offload.planning.dry_run import DryRun
from offload.planning.operations import DryRunFailed
from tests.architectures import make


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_PROFILES", str(tmp_path))
    monkeypatch.setattr(counted_work, "_in_memory", {})
    return tmp_path / "dry-runs"


def in_another_process(monkeypatch, runs=0):
    """Nothing is in memory; more than so many dry runs fail the test."""
    monkeypatch.setattr(counted_work, "_in_memory", {})
    if not runs:
        monkeypatch.setattr(DryRun, "_run", lambda *args, **kwargs: pytest.fail("it was counted again"))


QUESTIONS = {
    "forward": lambda run: run.forward(2, 8),
    "passes": lambda run: run.passes(1, 8, 10),
    "continued": lambda run: run.continued(1, 4, 8),
    "reads_its_cache": lambda run: run.reads_its_cache(),
    "stray_reads": lambda run: run.stray_reads(),
    "cache_bytes": lambda run: run.cache_bytes(4),
}


@pytest.mark.parametrize("question", list(QUESTIONS))
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_answer_is_the_same_from_the_file(name, question, folder, monkeypatch):
    ask = QUESTIONS[question]
    counted = ask(DryRun(make(name)))
    in_another_process(monkeypatch)
    assert ask(DryRun(make(name))) == counted


def test_one_file_holds_all_answers_of_a_model(folder, monkeypatch):
    for ask in QUESTIONS.values():
        ask(DryRun(make("llama")))
    assert len(list(folder.iterdir())) == 1
    in_another_process(monkeypatch)
    for ask in QUESTIONS.values():
        ask(DryRun(make("llama")))


def test_another_config_or_version_is_counted_anew(folder, monkeypatch):
    DryRun(make("llama")).forward(1, 8)
    model = make("llama")
    model.config.hidden_act = "gelu"
    DryRun(model).forward(1, 8)
    monkeypatch.setattr(counted_work.transformers, "__version__", "0")
    counted_work._in_memory.clear()
    DryRun(make("llama")).forward(1, 8)
    assert len(list(folder.iterdir())) == 3


class Other(nn.Linear):
    """Code of the user's, which may be another the next time."""


@pytest.mark.parametrize("change", ["a class", "a forward", "a method of the class"])
def test_no_file_is_kept_where_other_code_takes_part(change, folder, monkeypatch):
    model = make("llama")
    if change == "a class":
        model.lm_head.__class__ = Other
    if change == "a forward":
        model.lm_head.forward = model.lm_head.forward
    if change == "a method of the class":
        original = type(model.model.norm).forward
        monkeypatch.setattr(type(model.model.norm), "forward", lambda self, value: original(self, value))
    DryRun(model).forward(1, 8)
    assert not folder.exists()


def test_a_failure_is_not_kept(folder):
    with pytest.raises(DryRunFailed):
        DryRun(make("t5")).forward(1, 8)
    assert not folder.exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"_forward (1, 8)": {"pass": {}}}', '{"_forward (1, 8)": 3}'])
def test_a_broken_file_is_counted_over(content, folder, monkeypatch):
    counted = DryRun(make("llama")).forward(1, 8)
    (path,) = folder.iterdir()
    path.write_text(content)
    in_another_process(monkeypatch, runs=1)
    assert DryRun(make("llama")).forward(1, 8) == counted
    in_another_process(monkeypatch)
    assert DryRun(make("llama")).forward(1, 8) == counted


def test_old_files_go(folder, monkeypatch):
    monkeypatch.setattr(counted_work, "_MOST_FILES", 2)
    for name in ("llama", "gpt2", "mistral"):
        DryRun(make(name)).forward(1, 8)
    assert len(list(folder.iterdir())) == 2
