"""Workbooks without a kernel: their cells are run in a plain namespace, with text that tracebacks and keep() can find."""

import functools
import importlib
import itertools
import linecache
from pathlib import Path

from course import workbook
from course.checks import core

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "solutions" / "src").glob("[0-9][0-9]_*.py"))
NUMBERS = itertools.count()


@functools.cache
def book(name: str) -> workbook.Workbook:
    return workbook.load(name, ROOT)


def checks_of(name: str) -> dict[str, core.Check]:
    module = importlib.import_module(f"course.checks.{name.partition('_')[2]}")
    return core.REGISTERED[module.__name__]


def run_cell(source: str, namespace: dict) -> None:
    """Run a cell as IPython does: under a name of its own, with its text in linecache."""
    name = f"<cell {next(NUMBERS)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)


def run_cells(chapter, until: str | None = None) -> dict:
    """A namespace with the answers and the given code, without checks; `until` names the exercise that is the last to run."""
    namespace = {"__name__": "__main__", "display": print}
    for cell in chapter.cells:
        if cell.kind == "code" and cell.id != "setup" and "check" not in cell.tags and not cell.source.startswith("keep("):
            run_cell(cell.source, namespace)
            if until and cell.extra.get("exercise") == until:
                break
    return namespace


def changed(text: str, changes: dict[str, str]) -> str:
    """The text with each change made; one that fits nowhere is an error."""
    for old, new in changes.items():
        assert old in text or len(changes) > 1, f"{old!r} does not stand in the solution"
        text = text.replace(old, new)
    return text
