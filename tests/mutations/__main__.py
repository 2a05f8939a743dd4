"""Plant faults, one at a time, and see that the tests find each: `python -m tests.mutations [--only WORD] [--jobs 2]`.

A copy of the tree gets the fault, so that the tree itself stays as it is. A fault that no test finds is a claim that none holds.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutations.planted import FAULTS, Fault

ROOT = Path(__file__).parent.parent.parent
_LIMIT_SECONDS = 900
_PASSED, _FAILED = 0, 1


def copy_of_tree(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)


def plant(fault: Fault, folder: Path) -> None:
    path = folder / fault.file
    text = path.read_text()
    if text.count(fault.before) != 1:
        raise SystemExit(f"{fault.file} has {text.count(fault.before)} times, and not once: {fault.before!r}")
    path.write_text(text.replace(fault.before, fault.after))


def outcome(fault: Fault) -> str:
    """Whether it was found; anything but failing tests is no finding."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tree"
        copy_of_tree(folder)
        plant(fault, folder)
        marks = () if "gpu" in fault.tests else ("-m", "not slow and not every_case and not gpu")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={scratch}/files"]
        try:
            done = subprocess.run(
                [*command, *marks, *fault.tests], cwd=folder, capture_output=True, text=True, timeout=_LIMIT_SECONDS
            )
        except subprocess.TimeoutExpired:
            return "found (they hang)"
    if done.returncode == _FAILED:
        return "found"
    return "SURVIVED" if done.returncode == _PASSED else f"NOT TRIED: {done.stdout[-300:]}{done.stderr[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose file or text has this in it")
    parser.add_argument("--jobs", type=int, default=2)
    request = parser.parse_args()
    chosen = [fault for fault in FAULTS if request.only in fault.file or request.only in fault.before]
    for fault in chosen:
        # The list is right before anything is run.
        text = (ROOT / fault.file).read_text()
        if text.count(fault.before) != 1:
            raise SystemExit(f"{fault.file} has {text.count(fault.before)} times, and not once: {fault.before!r}")
    begun, left = time.perf_counter(), 0
    with ThreadPoolExecutor(request.jobs) as pool:
        for fault, found in zip(chosen, pool.map(outcome, chosen), strict=True):
            left += not found.startswith("found")
            print(f"{found:10}  {fault.file}: {fault.before.strip()[:70]!r} -> {fault.after.strip()[:50]!r}", flush=True)
    print(f"{len(chosen)} faults, {len(chosen) - left} found, {left} not; {time.perf_counter() - begun:.0f} s")
    return int(left > 1)


if __name__ == "__main__":
    raise SystemExit(main())
