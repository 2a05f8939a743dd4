"""The code of the documents: its pages, their blocks, and how a test runs what a user would type."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    """The contents of the page's fenced blocks of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page):
    """The lines of the page's shell blocks, without what is said beside them."""
    lines = [line.split("  #")[0].rstrip() for block in blocks(page, "sh") for line in block.splitlines()]
    assert all(re.match(r"(echo .*\| )?offload \w", line) for line in lines), f"{page.name} has a command that no test runs"
    return lines


def expanded(line, folder):
    """What the shell makes of a command: its arguments, its standard input, and the file that its output goes to."""
    line, _, target = line.partition(" > ")
    script = """offload() { printf '%s\\0' "$@" > arguments; if [ -p /dev/stdin ]; then cat > input; else : > input; fi; }\n"""
    environment = os.environ | {"HOME": str(folder)}
    subprocess.run(["bash", "-c", script + line], cwd=folder, env=environment, check=True, stdin=subprocess.DEVNULL)
    arguments = (folder / "arguments").read_text().split("\0")[:-1]
    return arguments, (folder / "input").read_bytes(), target or None
