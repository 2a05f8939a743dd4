"""Who may import whom."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_scheduler_loads_no_torch():
    code = (
        "import sys, pkgutil, importlib, offload.scheduler as scheduler\n"
        "for module in pkgutil.walk_packages(scheduler.__path__, 'offload.scheduler.'): importlib.import_module(module.name)\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_only_one_file_names_torch_cuda():
    users = [
        str(path.relative_to(ROOT))
        for package in ("offload", "scheduler", "storage")
        for path in (ROOT / package).rglob("*.py")
        if "torch.cuda." in path.read_text() and "torch.cuda.is_available" not in path.read_text()
    ]
    assert users == ["storage/devices/cuda.py"]


def test_importing_offload_waits_for_no_model_code():
    """transformers takes longer to import than torch: it comes when a session is entered, while weights are read."""
    code = (
        "import sys\nfrom offload import Session, offload, open_machine\noffload('demo', device='cpu')\n"
        "assert not {'transformers', 'scipy', 'torch._dynamo'} & sys.modules.keys(), 'they were loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
