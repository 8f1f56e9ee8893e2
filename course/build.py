"""Make the notebooks, the package and the sample data from chapters/src; `--check` says what is stale.

The package is written by nbdev's own `nb_export`, in a scratch folder, and then moved into place file by file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from course import artifacts, workbook
from course.outputs import check_paths, check_size, take_outputs, without_outputs
from course.source import ROOT, BuildError, Chapter, check_book, read_chapter

# Where readers without a clone (Colab) fetch the course from. The environment variable MINIMIND_COURSE overrides it.
REPOSITORY = "https://example.org/minimind-course.git"
SIZE_LIMIT = 500_000  # bytes of an executed notebook
MINE = ".mine"  # a workbook that a reader filled in, put aside before a build replaces it

SETUP = '''\
import importlib.util, os, subprocess, sys

if importlib.util.find_spec("course") is None:  # not installed here (Colab): use the clone beside this notebook, or fetch one
    folder = ".." if os.path.exists("../course/install.py") else "minimind-course"
    if not os.path.exists(folder):
        address = os.environ.get("MINIMIND_COURSE", "{repository}")
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", address, folder], check=True)
    sys.path.insert(0, os.path.abspath(folder))

'''
CHAPTER_SETUP = SETUP + '''\
from course import install, start

install.install_missing()  # does nothing on a prepared machine, and never touches torch
chapter = start("{name}", profile)
check, show = chapter.check, chapter.show'''
WORKBOOK_SETUP = SETUP + '''\
from course import install, open_workbook

install.install_missing()  # does nothing on a prepared machine, and never touches torch
workbook = open_workbook("{name}", globals())
check, solution, keep = workbook.check, workbook.solution, workbook.keep'''
SOLVED_SETUP = WORKBOOK_SETUP.replace("globals())", "globals(), solved=True)")

INIT = Path(__file__).with_name("package.py").read_text(encoding="utf-8")  # minimind/__init__.py


def make_notebook(chapter: Chapter, old: dict | None = None, setup: str = CHAPTER_SETUP) -> dict:
    """The notebook of a chapter as plain JSON data; outputs of unchanged cells are taken over from `old`."""
    kept = {c.get("id"): c for c in (old or {}).get("cells", []) if c["cell_type"] == "code"}
    cells = []
    for cell in chapter.cells:
        source = setup.format(name=chapter.name, repository=REPOSITORY) if cell.id == "setup" else cell.source
        metadata: dict = ({"id": cell.id} if cell.kind == "code" else {}) | cell.metadata
        if cell.tags:
            metadata["tags"] = cell.tags
        new = {"cell_type": cell.kind, "id": cell.id, "metadata": metadata, "source": source.splitlines(keepends=True)}
        if cell.kind == "code":
            before = kept.get(cell.id)
            same = before is not None and "".join(before["source"]) == source
            new["outputs"] = before["outputs"] if same else []
            new["execution_count"] = before.get("execution_count") if same else None
        cells.append(new)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def dump_notebook(notebook: dict) -> bytes:
    """One spelling for a notebook, so that two builds agree byte for byte."""
    return (json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def export_modules(chapter: Chapter, notebook: dict) -> dict[str, bytes]:
    """The modules of a chapter, as nbdev writes them. `#| export NAME` fills a second module of the same chapter."""
    if not chapter.modules():
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nbdev.export import nb_export
    with tempfile.TemporaryDirectory() as scratch:
        package, path = Path(scratch, "minimind"), Path(scratch, "chapters", f"{chapter.name}.ipynb")
        for module, cells in chapter.modules().items():
            # nbdev marks a block with the cell id, makes `from minimind.x` relative and writes __all__. It appends to a
            # module other than default_exp, so each module is exported by itself, from the cells that belong to it.
            wanted = {cell.id for cell in cells}
            heading = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# {module}\n\n> {chapter.title}"}
            code = [dict(c, source=re.sub(r"^#\|.*$", "#| export", "".join(c["source"]), count=1, flags=re.MULTILINE), outputs=[])
                    for c in notebook["cells"] if c["id"] in wanted]  # fmt: skip
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(dump_notebook(dict(notebook, cells=[heading, *code])))
            nb_export(path, lib_path=package, name=module)
        return {f"{module}.py": tidy(package / f"{module}.py", chapter, module) for module in chapter.modules()}


def tidy(path: Path, chapter: Chapter, module: str) -> bytes:
    """nbdev's text with a header that names the course's own command and the file to edit."""
    text = path.read_text(encoding="utf-8")
    edit = f"# Generated by `python -m course build`; do not edit. Edit chapters/src/{chapter.name}.py."
    text, count = re.subn(r"^# AUTOGENERATED!.*$", lambda _: edit, text, count=1, flags=re.MULTILINE)
    if count != 1:
        raise BuildError([f"chapters/src/{chapter.name}.py:1: nbdev wrote no header for minimind.{module}"])
    return text.encode()


def ruff_problems(files: dict[Path, bytes], root: Path) -> list[tuple[str, int, str]]:
    """What ruff says about these texts: (path, line, message)."""
    found = []
    for path, text in files.items():
        command = [sys.executable, "-m", "ruff", "check", "--quiet", "--no-cache", "--output-format", "json",
                   "--stdin-filename", str(path), "-"]  # fmt: skip
        done = subprocess.run(command, input=text, capture_output=True, cwd=root)
        if done.returncode not in (0, 1):
            raise BuildError([f"{path}:1: ruff failed: {done.stderr.decode().strip()}"])
        found += [(str(path), p["location"]["row"], f"{p['code']} {p['message']}") for p in json.loads(done.stdout or b"[]")]
    return found


def check_style(chapters: list[Chapter], modules: dict[str, tuple[Chapter, bytes]], root: Path) -> list[str]:
    """Ruff on the sources, then on the modules; a problem in a module is reported at its line in the source."""
    by_path = {str(c.path): c for c in chapters}
    problems = []
    for path, line, message in ruff_problems({c.path: c.path.read_bytes() for c in chapters}, root):
        problems.append(f"{by_path[path].where(by_path[path].cells[0], line - by_path[path].cells[0].line)}: {message}")
    if problems:
        return problems
    for name, (chapter, text) in modules.items():
        for _, line, message in ruff_problems({root / "minimind" / name: text}, root):
            problems.append(f"{source_line(chapter, text.decode(), line)}: in minimind/{name}: {message}")
    return problems


def source_line(chapter: Chapter, text: str, line: int) -> str:
    """The place in the source of a line in a generated module."""
    lines = text.splitlines()
    start = next((n for n in range(min(line, len(lines)), 0, -1) if lines[n - 1].startswith("# %% ../chapters/")), None)
    cell = next((c for c in chapter.cells if start and c.id == lines[start - 1].rpartition("#")[2]), None)
    return chapter.where(cell, line - start + 1) if cell else chapter.where(chapter.cells[0])


def write_atomically(path: Path, data: bytes) -> bool:
    """Replace the file in one step; False if it already holds these bytes."""
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


def read_book(root: Path, only: list[str] | None = None) -> tuple[list[Chapter], list[workbook.Workbook]]:
    """Read and check the sources of chapters and workbooks. With `only`, another chapter's own problems do not stop the build of these."""
    chapters, problems = [], []
    for path in sorted((root / "chapters" / "src").glob("*.py")):
        try:
            chapters.append(read_chapter(path))
        except BuildError as error:
            if only is None or path.stem in only:
                problems += error.problems
    workbooks = []
    try:
        workbooks = workbook.read_workbooks(root, only)
    except BuildError as error:
        problems += error.problems
    across = check_book([*chapters, *(book.source for book in workbooks)])
    if only is not None:
        across = [p for p in across if any(f"/{name}.py:" in p for name in only)]
    if problems or across:
        raise BuildError(problems + across)
    return chapters, workbooks


def pick(root: Path, wanted: list[str]) -> list[str] | None:
    """Chapter names from what was typed: 4, 04, 04_attention, 4-8; None means all."""
    names = sorted(p.stem for p in (root / "chapters" / "src").glob("*.py"))
    if not names:
        raise BuildError([f"{root / 'chapters' / 'src'}:1: no chapter sources (NN_topic.py) here"])
    if not wanted:
        return None
    found = []
    for word in wanted:
        low, _, high = word.partition("-")
        if low.isdigit() and (high.isdigit() or not high):
            numbers = range(int(low), int(high or low) + 1)
            hits = [n for n in names if n[:2].isdigit() and int(n[:2]) in numbers]
        else:
            hits = [n for n in names if n == Path(word).stem]
        if not hits:
            raise BuildError([f"chapters/src:1: no chapter {word!r}; there are {', '.join(names)}"])
        found += hits
    return sorted(set(found))


def make_samples(root: Path, modules: dict[str, bytes]) -> dict[Path, bytes]:
    """The files that ship in data/sample, made by course/samples.py from the world as it is now in the sources.

    It runs in a process of its own, because this one may have imported an older minimind.
    """
    program = (
        "import json, sys; from course.samples import files; "
        "json.dump({str(path): data.decode() for path, data in files(sys.argv[1]).items()}, sys.stdout)"
    )
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch, "minimind")
        package.mkdir()
        package.joinpath("__init__.py").touch()
        for name, text in modules.items():
            package.joinpath(name).write_bytes(text)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([scratch, str(root)]), "PYTHONDONTWRITEBYTECODE": "1", "MINIMIND_STUDENT": ""}
        done = subprocess.run([sys.executable, "-c", program, str(root)], capture_output=True, cwd=scratch, env=environment)
    if done.returncode:
        last = (done.stderr.decode().strip().splitlines() or ["no message"])[-1]
        raise BuildError([f"course/samples.py:1: the sample data could not be made: {last}"])
    return {Path(path): text.encode() for path, text in json.loads(done.stdout).items()}


@dataclass
class Made:
    """Everything that a build makes, before it is written."""

    files: dict[Path, bytes] = field(default_factory=dict)
    notebooks: dict[Path, tuple[Chapter, dict]] = field(default_factory=dict)
    modules: dict[str, tuple[Chapter, bytes]] = field(default_factory=dict)
    whole: bool = True  # all chapters, not a part


def add_notebook(
    made: Made, path: Path, chapter: Chapter, setup: str, run: Path | None, profile: str, problems: list[str]
) -> dict | None:  # fmt: skip
    """Make one notebook, with the outputs that a run has or that are there already (exercises have none); None where that fails."""
    notebook = make_notebook(chapter, None if path.parent.name == "exercises" else read_notebook(path), setup)
    if path.parent.name == "exercises":
        notebook["metadata"]["made"] = fingerprint(notebook)
    elif run:
        executed = read_notebook(run / path.name)
        if executed is None:
            problems.append(f"{chapter.where(chapter.cells[0])}: {run / path.name} is missing or not a notebook")
            return None
        home = run.resolve().parent.parent  # runs/NAME lies in a course
        if path.parent.name == "solutions":
            home = home.parent
        try:
            notebook = take_outputs(chapter, notebook, executed, profile, home)
        except BuildError as error:
            problems += error.problems
    made.notebooks[path] = chapter, notebook
    made.files[path] = dump_notebook(notebook)
    problems += check_size(chapter, notebook, len(made.files[path]), SIZE_LIMIT) + check_paths(chapter, notebook)
    return notebook


def build(root: Path = ROOT, wanted: list[str] | None = None, draft: bool = False, run: Path | None = None, profile: str = "cpu",
          ran: bool = True) -> Made:  # fmt: skip
    """Make all files of the wanted chapters; nothing is written.

    `run` is the folder of a course run whose outputs are taken (`ran`: those of chapters too). A draft only prints what ruff says.
    """
    only = pick(root, wanted or [])
    made = Made(whole=only is None)
    book, workbooks = read_book(root, only)
    problems: list[str] = []
    for chapter in book:
        if only is not None and chapter.name not in only:
            continue
        notebook = add_notebook(made, root / "chapters" / f"{chapter.name}.ipynb", chapter, CHAPTER_SETUP, run if ran else None, profile, problems)
        made.modules |= {name: (chapter, text) for name, text in export_modules(chapter, notebook).items()} if notebook else {}
    for each in workbooks:
        add_notebook(made, root / "exercises" / f"{each.name}.ipynb", each.stubs(), WORKBOOK_SETUP, None, profile, problems)
        solved = run / "solutions" if run and (run / "solutions" / f"{each.name}.ipynb").exists() else None
        add_notebook(made, root / "solutions" / f"{each.name}.ipynb", each.solved(), SOLVED_SETUP, solved, profile, problems)
    if problems:
        raise BuildError(problems)
    sources = [chapter for path, (chapter, _) in made.notebooks.items() if path.parent.name != "exercises"]
    if problems := check_style(sources, made.modules, root):
        if not draft:
            raise BuildError(problems)
        print("\n".join(problems), file=sys.stderr)
    made.files |= {root / "minimind" / name: text for name, (_, text) in made.modules.items()}
    made.files[root / "minimind" / "__init__.py"] = INIT.encode()
    if "world.py" in made.modules and (root / "course" / "samples.py").exists():
        there = {p.name: p.read_bytes() for p in (root / "minimind").glob("*.py")}
        made.files |= make_samples(root, there | {name: text for name, (_, text) in made.modules.items()})
    return made


def read_notebook(path: Path) -> dict | None:
    """A notebook as plain data; None if it is missing or damaged (then it is made anew)."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def orphans(root: Path, made: Made) -> list[Path]:
    """Generated files that no source makes any more; only a build of all chapters can tell."""
    if not made.whole:
        return []
    found = [*(root / "minimind").glob("*.py")]
    found += [path for folder in ("chapters", "exercises", "solutions") for path in (root / folder).glob("*.ipynb")]
    if any("sample" in path.parts for path in made.files):
        found += [path for path in (root / "data" / "sample").rglob("*") if path.is_file()]
    return sorted(path for path in found if path not in made.files and not path.name.startswith(".") and MINE not in path.name)


def stale(root: Path, made: Made) -> list[str]:
    """What differs between the committed files and the sources; outputs and execution counts are not compared."""
    problems = [f"{p.relative_to(root).as_posix()}:1: no source makes this file; delete it" for p in orphans(root, made)]
    for path, wanted in made.files.items():
        shown = path.relative_to(root).as_posix()
        if not path.exists():
            problems.append(f"{shown}:1: missing; run `python -m course build`")
            continue
        there = path.read_bytes()
        if path in made.notebooks:
            notebook = read_notebook(path)
            if notebook is None:
                problems.append(f"{shown}:1: not a notebook any more; run `python -m course build`")
                continue
            if path.parent.name != "exercises":  # those have no outputs
                there, wanted = (dump_notebook(without_outputs(n)) for n in (notebook, made.notebooks[path][1]))
        if there != wanted:
            problems.append(describe_difference(shown, there.decode(errors="replace"), wanted.decode(), made, path))
    return problems


def describe_difference(shown: str, there: str, wanted: str, made: Made, path: Path) -> str:
    """`file:line: stale ...` with the first line that differs, and where in the source it comes from."""
    pairs = zip_longest(there.splitlines(), wanted.splitlines())
    line, (old, new) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    origin = ""
    if path in made.notebooks:
        chapter, notebook = made.notebooks[path]
        old = without_outputs(read_notebook(path) or {"cells": []})["cells"]
        new = without_outputs(notebook)["cells"]
        cell = next((c for c, a, b in zip_longest(chapter.cells, old, new) if a != b and c), chapter.cells[-1])
        return f"{chapter.where(cell)}: {shown} is stale from this cell on; run `python -m course build`"
    if path.name in made.modules and path.parent.name == "minimind":
        chapter, text = made.modules[path.name]
        origin = f" (made from {source_line(chapter, text.decode(), line)})"
    return f"{shown}:{line}: stale{origin}: has {old!r}, the source makes {new!r}; run `python -m course build`"


def execute(chapters: list[str], profile: str) -> Path:
    """Run the chapters with `course run`; give the folder of the run. Raises BuildError if a chapter fails."""
    name = f"build-{time.strftime('%Y%m%d-%H%M%S')}"
    only = ["--only", ",".join(str(int(chapter[:2])) for chapter in chapters)] if chapters else []
    command = [sys.executable, "-m", "course", "run", "--profile", profile, "--name", name, *only]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise BuildError([f"runs/{name}:1: the run failed, see above; no outputs were taken"])
    return artifacts.runs() / name


def execute_solutions(notebooks: list[Path], run: Path) -> None:
    """Run the solved workbooks; the results go to RUN/solutions. Raises BuildError if a check fails."""
    from course import execute as engine

    problems = []
    for path in notebooks:
        target = run / "solutions" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        told = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "MINIMIND_STUDENT": ""}
        try:
            engine.execute(path, target, {}, told)
        except engine.ChapterError as error:
            problems.append(f"solutions/{path.name}:1: {error}")
    if problems:
        raise BuildError(problems)


def refuse_partial_run(run: Path) -> None:
    """The book shows results of the profile as it stands: not those of a run with --max-steps, --set or other data."""
    state = read_notebook(run / "state.json") or {}
    if state.get("bands") is False:
        raise BuildError([f"{run}:1: this run had --max-steps, --set or --data; the book keeps outputs of plain runs only"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("chapters", nargs="*", help="numbers, ranges or names (4, 4-8, 04_attention); all if none is given")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; fail if a committed file differs from its source")
    what.add_argument("--execute", action="store_true", help="run the chapters and store their outputs in the notebooks")
    what.add_argument("--from-run", metavar="FOLDER", type=Path, help="store the outputs of a finished run (runs/NAME)")
    parser.add_argument("--workbooks", action="store_true", help="with --execute: run the solved workbooks alone, not the chapters")
    parser.add_argument("--profile", default="cpu", help="the profile of --execute and --from-run (default: cpu)")
    parser.add_argument("--draft", action="store_true", help="write the files even where ruff complains about style")
    parser.epilog = """examples:
  python -m course build                       make everything
  python -m course build 04 05                 these chapters only
  python -m course build 4 --draft             while you write: style problems are printed and do not stop the build
  python -m course build --check               what continuous integration calls
  python -m course build --execute             run the book at the cpu profile and keep its outputs
  python -m course build --execute --workbooks 4   run the solved workbook of chapter 4
  python -m course build --from-run runs/NAME  keep the outputs of a run that is already there"""


def main(args: argparse.Namespace) -> int:
    try:
        return run_build(args)
    except BuildError as error:
        print(error, file=sys.stderr)
        print(f"course build: {len(error.problems)} problem(s), nothing written", file=sys.stderr)
        return 1


def run_build(args: argparse.Namespace) -> int:
    os.environ["MINIMIND_STUDENT"] = ""  # the book shows the course's own modules
    if args.check:
        made = build(ROOT, args.chapters)
        if problems := stale(ROOT, made):
            raise BuildError(problems)
        print(f"{len(made.files)} files agree with their sources")
        return 0
    run = args.from_run
    if run and not run.is_dir():
        raise BuildError([f"{run}:1: no such folder; a finished run is in runs/NAME"])
    if args.execute:
        made = build(ROOT, args.chapters)
        save(made)  # what runs must be what the sources say now
        names = pick(ROOT, args.chapters)
        run = artifacts.runs() / f"build-{time.strftime('%Y%m%d-%H%M%S')}" if args.workbooks else execute(names or [], args.profile)
        execute_solutions([path for path in made.notebooks if path.parent.name == "solutions"], run)
    elif run and not args.chapters:
        args.chapters = [path.stem for path in sorted(run.glob("[0-9][0-9]_*.ipynb"))]
    if run:
        refuse_partial_run(run)
    made = build(ROOT, args.chapters, args.draft, run, args.profile, not args.workbooks)
    for path in keep_answers(made):
        print(f"the answers in this workbook are kept in {path.relative_to(ROOT)}")
    changed = save(made)
    for path in changed:
        print(f"wrote {path.relative_to(ROOT)}")
    print(f"{len(made.files)} files, {len(changed)} changed")
    for path in orphans(ROOT, made):
        print(f"{path.relative_to(ROOT)}: no source makes this file any more; delete it", file=sys.stderr)
    return 0


def fingerprint(notebook: dict) -> str:
    """Of the text of all cells and of what was run: it tells whether a workbook is as it was made."""
    cells = ["".join(c["source"]) + str(c.get("execution_count")) for c in notebook["cells"]]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:16]


def keep_answers(made: Made) -> list[Path]:
    """Put aside each workbook that somebody filled in and that a build would replace: its cells are not those that a build made."""
    kept = []
    for path, data in made.files.items():
        if path.parent.name != "exercises" or not path.exists() or path.read_bytes() == data:
            continue
        there = read_notebook(path)
        if there is None or there["metadata"].get("made") != fingerprint(there):
            numbers = ["", *(f"-{number}" for number in range(2, 1000))]
            kept.append(next(new for n in numbers if not (new := path.with_name(f"{path.stem}{MINE}{n}.ipynb")).exists()))
            write_atomically(kept[-1], path.read_bytes())
    return kept


def save(made: Made) -> list[Path]:
    """Write what changed, each file in one step."""
    return [path for path, data in made.files.items() if write_atomically(path, data)]
