"""The `offload` command."""

import importlib
import os
import sys
import warnings
from typing import Any

from offload.cli import termination
from offload.cli.parser import make_parser
from offload.cli.wording import as_options
from offload.storage.errors import OffloadError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its status: 0, 1 for a failure, 2 for a wrong call, 130 after Ctrl-C, 143 at SIGTERM."""
    words = sys.argv[1:] if arguments is None else arguments
    asked = words[0] if words and not words[0].startswith("-") else None
    try:
        make_parser(_run, asked)(args=words, prog_name="offload")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _run(command: str, request: Any) -> int:
    """Run one command; returns its status. Its module is imported only now, and torch with it."""
    warnings.simplefilter("ignore")
    try:
        with termination.raising():
            importlib.import_module(f"offload.cli.{command}").run(request)
        return 0
    except OffloadError as error:
        print(f"offload: {as_options(str(error), request)}", file=sys.stderr)
        return 1
    except termination.Terminated as error:
        print(f"offload: {str(error) or 'terminated'}", file=sys.stderr)
        return termination.SIGTERM_STATUS
    except KeyboardInterrupt as error:
        print(f"offload: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): not an error.
        _forget_output()
        return 0
    except OSError as error:
        print(f"offload: {error}", file=sys.stderr)
        _forget_output()
        return 1


def _forget_output() -> None:
    """What is still in the buffer of stdout cannot be written; Python would try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
