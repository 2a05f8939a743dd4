"""What goes on after its session, beside it in a forked child, or until SIGTERM: ended by a sentence, with nothing left behind."""

import os
import signal
import threading
import time

import pytest
import torch

from offload import CheckpointError, SessionError, offload
from offload.cli.main import main
from offload.cli.termination import SIGTERM_STATUS
from offload.finetune import loop
from offload.report.html import as_html
from offload.report.record import Record
from tests.architectures import make, tokens
from tests.budgets import NONE, budget_for, enter, spec_of

RESERVE = {"batch_size": 2, "max_tokens": 200}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make("llama").save_pretrained(path)
    return str(path)


class Counting:
    """A streamer that counts tokens, and waits in between."""

    def __init__(self):
        self.tokens = 0
        self.begun = threading.Event()

    def put(self, value):
        self.tokens += 1
        if self.tokens > 3:
            self.begun.set()
        time.sleep(0.02)

    def end(self):
        pass


def test_a_thread_that_still_generates_is_stopped(saved):
    budget = budget_for(spec_of(saved, **RESERVE), NONE, 2, 200) + 65_536
    streamer, raised = Counting(), []

    def generate(model):
        try:
            model.generate(tokens(1, 9), max_new_tokens=150, do_sample=False, eos_token_id=None, streamer=streamer)
        except Exception as error:
            raised.append(error)

    with enter(saved, budget, **RESERVE) as session:
        model = session.model
        thread = threading.Thread(target=generate, args=(model,))
        thread.start()
        assert streamer.begun.wait(30)
    thread.join(30)
    assert not thread.is_alive()
    assert [type(error) for error in raised] == [SessionError]
    assert "was left" in str(raised[0])
    # Nothing of that stays: the model is the plain one.
    assert "forward" not in vars(model)
    assert model.generate(tokens(1, 9), max_new_tokens=3, do_sample=False).shape[1] == 12


def test_generating_again_in_the_thread_that_leaves_is_plain(saved):
    with enter(saved, 1 << 26, **RESERVE) as session:
        model = session.model
        inside = model.generate(tokens(1, 9), max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(tokens(1, 9), max_new_tokens=3, do_sample=False), inside)


def test_a_forked_child_is_told(saved):
    budget = budget_for(spec_of(saved, **RESERVE), NONE, 2, 200) + 65_536
    with enter(saved, budget, **RESERVE) as session:
        session.model(tokens())
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                with session.machine.lock:
                    said = "no"
            except SessionError:
                try:
                    session.model(tokens())
                    said = "computed"
                except SessionError as error:
                    said = str(error)
            os.write(writing, said.encode())
            os._exit(0)
        os.close(writing)
        assert "forked" in os.read(reading, 1000).decode()
        os.close(reading)
        assert os.waitpid(child, 0)[1] == 0
        # The parent goes on.
        session.model(tokens())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_pipe_in_a_checkpoint_is_named(name, saved, tmp_path):
    for item in os.listdir(saved):
        os.link(os.path.join(saved, item), tmp_path / item)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"is a pipe, a socket or a device"), offload(str(tmp_path)):
        pass


def tuning(tmp_path, *more):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "And the king of the sea said unto the whale, Sing."}\n' * 8)
    output = tmp_path / "deep" / "output"
    sizes = ["--device", "cpu", "--cpu-memory", "200MiB", "--sequence-length", "32", "--rank", "2", "--quiet"]
    return ["finetune", "demo", "--data", str(data), "--output", str(output), *sizes, *more], output


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_fine_tuning_finishes_its_step_at_sigterm(tmp_path, monkeypatch, capsys):
    command, output = tuning(tmp_path, "--epochs", "2")
    real, steps = loop._step, []

    def step(*args):
        steps.append(args[-1])
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_step", step)
        assert main(command) == SIGTERM_STATUS
    assert steps == [1, 2, 3]
    assert "stopped after step 3 of 16; --resume goes on from the checkpoint of step 3" in capsys.readouterr().err
    assert [item.name for item in output.iterdir()] == ["checkpoint"]
    assert main([*command, "--resume"]) == 0
    assert (output / "adapter_model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_generating_ends_at_sigterm(monkeypatch, capsys):
    from offload.cli import generate

    monkeypatch.setattr(generate, "run", lambda request: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))
    assert main(["generate", "demo", "--prompt", "a"]) == SIGTERM_STATUS
    assert capsys.readouterr().err.strip() == "offload: terminated"


def test_a_refused_fine_tuning_leaves_no_folder(tmp_path, capsys):
    command, output = tuning(tmp_path)
    command[command.index("200MiB")] = "1MiB"
    assert main(command) == 1
    assert "offload:" in capsys.readouterr().err
    assert not output.parent.exists()


def test_nothing_of_a_report_gets_into_the_page_as_it_is():
    """Whatever string a foreign report holds, and whatever key."""
    evil = "<script>alert(1)</script>"
    with offload("demo", device="cpu", cpu_memory="8MiB") as session:
        session.model(torch.arange(3, 20)[None])
        record = Record.of(session.report(), session.trace())

    def everywhere(value, free=False):
        if isinstance(value, dict):
            return {(name + evil if free else name): everywhere(item, name in FREE_KEYS) for name, item in value.items()}
        if isinstance(value, list):
            return [everywhere(item) for item in value]
        return value + evil if isinstance(value, str) else value

    page = as_html(Record(everywhere(record.report), record.trace))
    assert "alert(1)" in page
    assert "<script>alert" not in page


FREE_KEYS = ("tiers", "links", "wait_seconds", "drift")
