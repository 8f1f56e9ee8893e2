"""Write the tree that an instructor gives to students: the book and the workbooks, without solutions, hidden tests and sources.

What goes in is a list of what students need, not everything less some names. Then every file is searched for every line of every solution and hidden
test (see `leaks`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from course import artifacts

FILES = ("README.md", "LICENSE", "CITATION.cff", "Makefile", "pyproject.toml", "constraints.txt", "environment.yml", "conftest.py")
FOLDERS = {  # with the endings of the files that belong in
    "chapters": (".ipynb",), "exercises": (".ipynb",), "minimind": (".py",), "course": (".py", ".html", ".json", ".yaml"),
    "profiles": (".yaml",), "data": None, "docs": (".md", ".png", ".svg"),
}  # fmt: skip
NOT_FOR_STUDENTS = {"docs/instructors.md"}
THE_BOOK = ("chapters/", "minimind/", "course/")  # may hold the code that a rebuild asks for
EXAMPLE = """examples:
  python -m course release --without-solutions ~/class/minimind
  python -m course release --without-solutions ~/class/minimind --hidden ~/hidden"""


class LeakError(RuntimeError):
    """A line that students must not see stands in a file that they would get."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where to write the tree; it must not exist")
    parser.add_argument("--without-solutions", action="store_true", required=True, help="say so: this tree has no solutions, hidden tests or sources")
    parser.add_argument("--hidden", type=Path, help="folder of your own hidden tests; their lines are searched for too")


def main(args: argparse.Namespace) -> int:
    try:
        count = release(artifacts.home(), args.folder.resolve(), args.hidden)
    except (LeakError, ValueError, OSError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    print(f"{count} files in {args.folder}, none with a line of a solution or hidden test that the book does not show")
    return 0


def release(home: Path, target: Path, hidden: Path | None = None) -> int:
    """Copy, search, and only then give the folder its name. Returns the number of files."""
    if target.exists():
        raise ValueError(f"{target} is there already; name a folder that does not exist")
    if target.is_relative_to(home):
        raise ValueError(f"{target} lies inside the course; name a folder outside of it")
    if not list((home / "exercises").glob("*.ipynb")):
        raise ValueError("there are no workbooks in exercises/; `python -m course build` makes them")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        count = 0
        for path in wanted(home):
            place = temporary / path.relative_to(home)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            count += 1
        found = leaks(temporary, secrets_of(home, hidden))
        if found:
            raise LeakError("nothing was written, because students would see this:\n" + "\n".join(f"  {line}" for line in found[:20]))
        os.rename(temporary, target)
        return count
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def wanted(home: Path) -> Iterator[Path]:
    """The files that students get."""
    yield from (home / name for name in FILES if (home / name).is_file())
    for folder, endings in FOLDERS.items():
        for path in sorted((home / folder).rglob("*")):
            name = path.relative_to(home).as_posix()
            hidden = any(part.startswith(".") or part in ("__pycache__", "src") for part in path.relative_to(home).parts)
            if path.is_file() and not path.is_symlink() and not hidden and name not in NOT_FOR_STUDENTS:
                if endings is None or path.suffix in endings:
                    yield path


@dataclass
class Secret:
    """The lines of one solution or hidden test, with spaces made even."""

    where: str
    lines: set[str]
    kind: str  # rebuild, beyond or hidden


def secrets_of(home: Path, hidden: Path | None = None) -> list[Secret]:
    """What students must not see."""
    from course import workbook

    found: dict[tuple[str, str], Secret] = {}
    for path in sorted((home / "solutions" / "src").glob("*.py")):
        book = workbook.read_workbook(path)
        kinds = {e.answer.id: e.kind for e in book.exercises}
        for line, cell, _ in workbook.secret_lines(book):
            secret = found.setdefault((path.stem, cell.id), Secret(f"{path.stem}, {cell.id}", set(), kinds.get(cell.id, "hidden")))
            secret.lines.add(line)
    for path in sorted(hidden.glob("*.py")) if hidden else ():
        lines = {workbook.even(line) for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(("# %%", "import ", "from "))}
        found[path.name, ""] = Secret(f"hidden {path.name}", {line for line in lines if len(line) >= 20}, "hidden")
    return list(found.values())


def leaks(folder: Path, secrets: list[Secret]) -> list[str]:
    """What of the secrets stands in a file of the tree, also inside of notebooks.

    Outside of the book a single line is one too many. In the book, what a rebuild asks for is no secret, and of another solution more than half
    of the lines must be there: `torch.manual_seed(0)` alone gives nothing away. So it is in the workbook of another chapter, too.
    """
    from course import workbook

    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("data/") and path.suffix not in (".py", ".md", ".ipynb"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if path.suffix in (".ipynb", ".json"):
            try:
                text = "\n".join(workbook.strings(joined(json.loads(text))))
            except ValueError:
                pass
        lines = {workbook.even(line) for line in text.splitlines()} | {workbook.even(line.lstrip("> ")) for line in text.splitlines()}
        in_book = name.startswith(THE_BOOK)
        for secret in secrets:
            seen = lines & secret.lines
            elsewhere = name.startswith("exercises/") and not secret.where.startswith(f"{path.stem},")
            if (in_book or elsewhere) and (secret.kind == "rebuild" or (secret.kind == "beyond" and 2 * len(seen) <= len(secret.lines))):
                continue
            found += [f"{name}: {line}   ({secret.where})" for line in sorted(seen)]
        if any(mark in text for mark in ("### BEGIN SOLUTION", "### BEGIN HIDDEN TESTS")) and not name.startswith("course/"):
            found.append(f"{name}: a mark of a solution or hidden test")
    return found


def joined(value: object) -> object:
    """JSON with the lines of a cell as one string, as they are read."""
    if isinstance(value, dict):
        return {key: joined(each) for key, each in value.items()}
    if isinstance(value, list):
        return "".join(value) if value and all(isinstance(each, str) for each in value) else [joined(each) for each in value]
    return value
