"""The command line before anything is loaded: help, usage, what a wrong call is told."""

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest

from offload import choices
from offload.cli.commands import COMMANDS
from offload.cli.main import main
from offload.cli.parser import make_parser
from offload.cli.wording import as_options

HEAVY = ("torch", "numpy", "transformers", "scipy", "psutil", "pydantic", "offload.api")


def called(calls):
    """The statuses of some calls in a fresh process, and which heavy modules they imported."""
    code = f"""import json, sys
from offload.cli.main import main
statuses = [main(arguments) for arguments in {calls!r}]
print("\\n" + json.dumps([statuses, [name for name in {HEAVY!r} if name in sys.modules]]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_help_and_version_import_nothing_heavy():
    calls = [["--help"], ["--version"], *([*name.split(), "--help"] for name in COMMANDS), ["experts", "-h"]]
    assert called(calls) == [[0] * len(calls), []]


def test_a_wrong_call_imports_nothing_heavy():
    calls = [[], ["generate"], ["generate", "--no-such-option"], ["no-such-command"], ["generate", "demo", "--dtype", "int3"],
             ["generate", "demo", "--prompt", "a", "--prompts", "b"], ["experts", "replay", "t.csv"], ["finetune", "demo"]]  # fmt: skip
    assert called(calls) == [[2] * len(calls), ["pydantic"]]


def test_a_wrong_option_is_told_before_any_value_is_read():
    assert called([["generate", "demo", "--no-such-option"], ["no-such-command"]]) == [[2, 2], []]


def test_the_beginning_of_an_option_is_answered_with_the_whole(capsys):
    assert main(["generate", "demo", "--max-new", "5"]) == 2
    error = capsys.readouterr().err
    assert "No such option: --max-new" in error
    assert "--max-new-tokens" in error
    assert "Usage: offload generate" in error


def test_a_wrong_command_is_answered_with_one_that_it_may_have_meant(capsys):
    assert main(["genrate", "demo"]) == 2
    assert "'generate'" in capsys.readouterr().err


def test_a_second_adapter_is_refused(capsys):
    assert main(["generate", "demo", "--prompt", "a", "--adapter", "one", "--adapter", "two"]) == 2
    assert "--adapter was given 2 times" in " ".join(capsys.readouterr().err.split())


def test_the_help_is_in_groups(capsys):
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    titles = ("Prompt", "Sampling", "Model", "Memory", "Experts", "KV cache", "Output")
    places = [out.index(f"─ {title} ─") for title in titles]
    assert places == sorted(places)


def options_of(kind):
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        yield from options_of(hint) if is_dataclass(hint) else [field.name]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_declared_twice(command):
    names = list(options_of(COMMANDS[command].arguments()))
    assert len(names) == len(set(names))


def known_words():
    from offload.config import EXACTNESS
    from offload.finetune import recipe
    from offload.kv.options import METHODS
    from offload.moe import options as experts
    from offload.scheduler.expert_replay import SCOPES
    from offload.synth import FAMILIES
    from offload.training import options as training

    return {
        "Exactness": EXACTNESS,
        "KvPolicy": METHODS,
        "ExpertPolicy": experts.POLICIES,
        "ExpertMisses": experts.MISSES,
        "ExpertPrefetch": experts.PREFETCH,
        "SlotScope": SCOPES,
        "TrainingMethod": recipe.METHODS,
        "Optimizer": training.OPTIMIZERS,
        "StateTier": training.STATE_TIERS,
        "ActivationTier": training.ACTIVATION_TIERS,
        "MasterDtype": training.MASTER_DTYPES,
        "Family": FAMILIES,
    }


@pytest.mark.parametrize("name", known_words())
def test_the_command_line_takes_what_is_there(name):
    assert get_args(getattr(choices, name)) == tuple(known_words()[name])


@pytest.mark.parametrize("text", ["6", "6XB", "-1GiB", "0"])
def test_a_size_that_cannot_be_meant_is_a_wrong_call(capsys, text):
    assert main(["plan", "demo", f"--cpu-memory={text}"]) == 2
    assert "--cpu-memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("kv_policy='window' takes back at most 8 tokens", "--kv-policy window takes back at most 8 tokens"),
        (
            "gpu_memory=8.00 GiB was asked for; leave gpu_memory out",
            "--gpu-memory 8.00 GiB was asked for; leave --gpu-memory out",
        ),
        ("Give fewer tokens (max_tokens).", "Give fewer tokens (--max-new-tokens)."),
        ("/a/cpu_memory/b.cpu_memory is no model, seed is no option here", None),
    ],
)
def test_messages_name_the_options_of_the_command(message, said):
    asked = []
    with pytest.raises(SystemExit):
        make_parser(lambda _, request: asked.append(request) or 0, "generate")(["generate", "demo", "--prompt", "a"])
    assert as_options(message, asked[0]) == (said or message)
