"""The `offload` command."""

import argparse
import os
import sys
import warnings

from offload import __version__
from offload.cli import experts, finetune, generate, merge, plan, probe, report, synth, termination
from offload.storage.errors import OffloadError

_COMMANDS = {
    "generate": generate,
    "finetune": finetune,
    "merge": merge,
    "experts": experts,
    "plan": plan,
    "probe": probe,
    "report": report,
    "synth": synth,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its status: 0, 1 for a failure, 2 for a wrong call, 130 after Ctrl-C, 143 at SIGTERM."""
    request = _parser().parse_args(arguments)
    warnings.simplefilter("ignore")
    try:
        with termination.raising():
            _COMMANDS[request.command].run(request)
        return 0
    except OffloadError as error:
        print(f"offload: {error}", file=sys.stderr)
        return 1
    except termination.Terminated as error:
        print(f"offload: {str(error) or 'terminated'}", file=sys.stderr)
        return termination.SIGTERM_STATUS
    except KeyboardInterrupt:
        print("offload: interrupted", file=sys.stderr)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="offload", description="Run transformers models that do not fit into memory, by streaming their weights."
    )
    parser.add_argument("--version", action="version", version=f"offload {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY))
    return parser


if __name__ == "__main__":
    sys.exit(main())
