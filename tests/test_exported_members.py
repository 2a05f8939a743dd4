"""The public names: those that are promised, each imported when it is first used."""

import subprocess
import sys

import pytest

import offload
from offload import errors

NAMES = {"ExpertOptions", "KvOptions", "Session", "Training", "offload", "open_machine", "token_shares"}


def test_the_public_names_are_these():
    assert set(offload.__all__) == NAMES | set(errors.__all__)
    assert dir(offload) == sorted([*offload.__all__, "__version__"])


@pytest.mark.parametrize("name", sorted(offload.__all__))
def test_every_public_name_is_there_and_documented(name):
    assert getattr(offload, name).__doc__


def test_all_errors_are_of_one_kind_and_exported():
    from offload.storage import errors as defined

    kinds = {name for name, value in vars(defined).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds == set(errors.__all__)
    assert all(issubclass(getattr(errors, name), errors.OffloadError) for name in errors.__all__)


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'ofload'"):
        _ = offload.ofload


def test_importing_offload_imports_no_torch():
    code = "import sys, offload; assert 'torch' not in sys.modules; offload.Training; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
