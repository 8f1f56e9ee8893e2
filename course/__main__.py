"""`python -m course COMMAND`: the tools around the book. Each command is one module, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys

COMMANDS = {  # each is a module course/NAME.py with add_arguments(parser) and main(args) -> exit code
    "doctor": "what this machine is, which profile fits, what each chapter will take",
    "run": "run the chapters in order and write a report",
    "build": "make the notebooks, the package and the sample data from the sources",
    "solution": "print one solution of a workbook",
    "student": "say which modules are yours, and run the course's tests on them",
    "grade": "grade workbooks that students handed in",
    "release": "write the tree that an instructor gives to students",
    "data": "list, download and check public data sets",
    "compare": "set two or more runs side by side: differences, intervals, noise",
    "ship": "copy the small checkpoints of a run to data/checkpoints",
    "bench": "our training loop beside the plain loop and Hugging Face Trainer",
}
EXAMPLES = """examples:
  python -m course doctor
  python -m course run --profile smoke
  python -m course build --check

`python -m course COMMAND --help` shows a command's options and an example of each."""


def available() -> dict[str, str]:
    """The commands whose module is there."""
    return {name: text for name, text in COMMANDS.items() if importlib.util.find_spec(f"course.{name}")}


def main(argv: list[str] | None = None) -> int:
    """Read the command, import its module alone, and run it."""
    argv = sys.argv[1:] if argv is None else argv
    commands = available()
    top = argparse.ArgumentParser(
        prog="python -m course", description="The tools around the book.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    listing = top.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for name, text in commands.items():
        listing.add_parser(name, help=text, add_help=False)
    if not argv or argv[0] not in commands:
        top.parse_args(argv)  # prints the help or the error, and leaves
        return 2
    module = importlib.import_module(f"course.{argv[0]}")
    parser = argparse.ArgumentParser(
        prog=f"python -m course {argv[0]}", description=commands[argv[0]],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    module.add_arguments(parser)
    parser.epilog = parser.epilog or getattr(module, "EXAMPLE", None)
    try:
        return module.main(parser.parse_args(argv[1:]))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
