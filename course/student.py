"""`python -m course student`: which modules of the package are the reader's own, and do the course's tests of these hold for them. Needs no torch."""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

from course import artifacts

EXAMPLE = """examples:
  python -m course student                   the tests of your modules and of the model, with your functions in their place
  python -m course student --all -- -x       all tests of the package, up to the first that fails
  python -m course student --folder other    what lies in another folder than student/"""
BUILT_ON = "model"  # it uses attention, rope and moe; its tests compare it with Hugging Face's


def saved_names(path: Path) -> list[str]:
    """What a saved file says it has; nothing where there is no file or it is damaged."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    except (OSError, SyntaxError, ValueError, StopIteration):
        return []


def modules() -> dict[str, list[str]]:
    """The reader's modules that `minimind` uses here, and what each has. ImportError where MINIMIND_STUDENT names no folder."""
    import minimind

    return {name: saved_names(path) for name, path in minimind.student_modules().items()}


def tests_of(names: list[str]) -> list[Path]:
    """The course's tests of these modules."""
    paths = [artifacts.home() / "tests" / f"test_{name}.py" for name in dict.fromkeys(names)]
    return [path for path in paths if path.is_file()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `course student`."""
    parser.add_argument("--folder", help="the folder of your modules (default: MINIMIND_STUDENT, else student)")
    parser.add_argument("--all", action="store_true", help="the tests of every module of the package, not only of yours")
    parser.add_argument("pytest", nargs="*", help="more for pytest, after --")


def main(args: argparse.Namespace) -> int:
    """Say which modules are the reader's and run pytest; its exit code, or 2 where there is nothing to test."""
    os.environ["MINIMIND_STUDENT"] = args.folder or os.environ.get("MINIMIND_STUDENT") or "student"
    try:
        mine = modules()
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, names in mine.items():
        print(f"your own: minimind.{name} ({', '.join(names)})")
    package = sorted(path.stem for path in (artifacts.home() / "minimind").glob("[a-z]*.py"))
    tests = tests_of(package if args.all else [*mine, BUILT_ON])
    if not mine or not tests:
        print("nothing to test: no module is kept yet" if not mine else "this copy of the course has no tests", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "pytest", "-q", *map(str, tests), *args.pytest]
    return subprocess.run(command, cwd=artifacts.home(), env=os.environ).returncode
