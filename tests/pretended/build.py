"""Builds the pretended card, once for each state of its source and version of torch, without importing torch."""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

TORCH = "2.13"
"""Its internals are not the same in any other version."""

_SOURCES = ("card.cpp", "order.h")
_HERE = Path(__file__).parent


class Unavailable(Exception):
    """There is no pretended card here, and why."""


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("torch is not installed")
    return Path(spec.origin).parent


def built() -> Path:
    """The shared library, built if it is not there yet.

    Raises:
        Unavailable: if it cannot be built here.
    """
    version = importlib.metadata.version("torch")
    if not version.startswith(TORCH + ".") or "+cu" in version:
        raise Unavailable(f"the pretended card is for the CPU build of torch {TORCH}, and this is {version}")
    key = hashlib.sha256(b"".join((_HERE / name).read_bytes() for name in _SOURCES) + version.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "offload-tests"
    library = folder / f"pretended-card-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(library)
    return library


def _compile(library: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise Unavailable("there is no g++ to build the pretended card with")
    include, lib = torch_folder() / "include", torch_folder() / "lib"
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", str(_HERE / "card.cpp"), "-o", str(made)]
        for folder in (include, include / "torch/csrc/api/include", Path(sysconfig.get_path("include"))):
            command += ["-isystem", str(folder)]
        command += ["-DTORCH_API_INCLUDE_EXTENSION_H", f"-L{lib}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"the pretended card does not compile: {done.stderr[-2000:]}")
        # Whole or not there, whoever else builds it at the same time.
        made.replace(library)
