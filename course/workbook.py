"""Read a workbook source (solutions/src/NN_topic.py) and make its two notebooks: with stubs for readers, and solved.

An answer cell names its exercise on its marker line. What a reader has to write stands between `### BEGIN SOLUTION` and `### END SOLUTION`;
`### BEGIN STUB` ... `### END STUB`, as comments, may follow and takes its place in the reader's notebook.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from course.source import ROOT, BuildError, Cell, Chapter, read_cells, show_path

MARK = re.compile(r"(\s*)### (BEGIN|END) (SOLUTION|HIDDEN TESTS|STUB)\s*")
FACTS = ("exercise", "points", "minutes", "difficulty", "kind")
KINDS = ("rebuild", "beyond")
SHORT = 12  # a solution line of fewer characters (`return x`) may also stand elsewhere by chance


@dataclass
class Exercise:
    """One exercise: its facts, and the cells that ask for it, answer it and check it."""

    name: str
    points: int
    minutes: int
    difficulty: int
    kind: str
    text: Cell
    answer: Cell
    check: Cell

    @property
    def facts(self) -> str:
        """The line under the heading."""
        stars = "★" * self.difficulty + "☆" * (3 - self.difficulty)
        points = f"{self.points} point{'s' * (self.points != 1)}"
        return f'*{points} · {self.minutes} minutes · {stars} · checked by* `check("{self.name}")`'


@dataclass
class Workbook:
    """A workbook source, read and checked."""

    source: Chapter
    exercises: list[Exercise]

    @property
    def name(self) -> str:
        return self.source.name

    def find(self, name: str) -> Exercise:
        """The exercise of this name; KeyError says which there are."""
        for exercise in self.exercises:
            if exercise.name == name:
                return exercise
        raise KeyError(f"{self.name} has no exercise {name!r}; there are {', '.join(e.name for e in self.exercises)}")

    def solution(self, name: str) -> str:
        """The answer to one exercise, without the marks."""
        lines = solved_source(self.find(name).answer.source).splitlines()
        return "\n".join(line for line in lines if not MARK.fullmatch(line)).strip()

    def stubs(self) -> Chapter:
        """What readers get: stubs, and no hidden tests."""
        return self._made(stub_source)

    def solved(self) -> Chapter:
        """The workbook with its answers."""
        return self._made(lambda source, _: solved_source(source))

    def _made(self, transform) -> Chapter:
        answers = {e.answer.id: e for e in self.exercises}
        checks = {e.check.id: e for e in self.exercises}
        texts = {e.text.id: e for e in self.exercises}
        cells = []
        for cell in self.source.cells:
            tags, source, metadata = list(cell.tags), cell.source, {}
            if exercise := texts.get(cell.id):
                heading, _, rest = source.partition("\n")
                source = f"{heading}\n\n{exercise.facts}\n{rest}"
            elif exercise := answers.get(cell.id):
                tags = sorted({*tags, "answer"})
                source = f"# exercise: {exercise.name} (keep this line)\n{transform(source, exercise.name)}"
                metadata = {"exercise": {key: getattr(exercise, key) for key in ("name", *FACTS[1:])}, "nbgrader": nbgrader(cell.id)}
            elif exercise := checks.get(cell.id):
                tags = sorted({*tags, "check"})
                source = transform(source, exercise.name)
                metadata = {"check": exercise.name, "nbgrader": nbgrader(cell.id, exercise.points)}
            cells.append(replace(cell, tags=tags, source=source, metadata=metadata))
        return replace(self.source, cells=cells)


def nbgrader(identity: str, points: int | None = None) -> dict:
    """What nbgrader reads: an answer cell, or with points the cell that tests it."""
    told = {"grade": points is not None, "grade_id": identity, "locked": points is not None, "schema_version": 3, "solution": points is None}
    return told | {"task": False} | ({"points": points} if points is not None else {})


# -- the parts of a cell


def parts(source: str) -> Iterator[tuple[str, str, list[str], int]]:
    """(kind, indent, lines, line number) of each run of lines; kind is "" or SOLUTION, HIDDEN TESTS, STUB. ValueError on unpaired marks."""
    kind, indent, lines, start = "", "", [], 1
    for number, line in enumerate(source.splitlines(), 1):
        mark = MARK.fullmatch(line)
        if not mark:
            if re.match(r"\s*#+ *(BEGIN|END) (SOLUTION|HIDDEN|STUB)", line):
                raise ValueError(number, f"{line.strip()!r} is not a mark: write for example ### BEGIN SOLUTION")
            lines.append(line)
            continue
        wanted = ("BEGIN", mark[3]) if not kind else ("END", kind)
        if (mark[2], mark[3]) != wanted:
            raise ValueError(number, f"{line.strip()!r} where ### {wanted[0]} {wanted[1] if kind else '...'} was expected")
        yield kind, indent, lines, start
        kind, indent, lines, start = (mark[3] if mark[2] == "BEGIN" else ""), mark[1], [], number + 1
    if kind:
        raise ValueError(start - 1, f"### BEGIN {kind} has no ### END {kind}")
    yield kind, indent, lines, start


def solved_source(source: str) -> str:
    """The cell with its answer; nbgrader's marks stay, so that it can be its source."""
    lines: list[str] = []
    for kind, indent, body, _ in parts(source):
        if kind in ("SOLUTION", "HIDDEN TESTS"):
            body = [f"{indent}### BEGIN {kind}", *body, f"{indent}### END {kind}"]
        lines += [] if kind == "STUB" else body
    return "\n".join(lines)


def stub_source(source: str, name: str) -> str:
    """The cell as readers get it."""
    found = list(parts(source))
    lines: list[str] = []
    for position, (kind, indent, body, start) in enumerate(found):
        if kind == "":
            lines += body
        elif kind == "STUB":
            lines += uncomment(body, indent, start)
        elif kind == "SOLUTION":
            following = [part for part in found[position + 1 :] if part[0] or any(line.strip() for line in part[2])]
            if not (following and following[0][0] == "STUB"):
                lines += [f'{indent}raise NotImplementedError("{name}")'] if indent else blanks(body, start)
    while lines and not lines[-1].strip():
        lines.pop()
    return "\n".join(lines)


def uncomment(body: list[str], indent: str, start: int) -> list[str]:
    """The lines of a STUB, which stand as comments in the source."""
    lines = []
    for number, line in enumerate(body, start):
        mark = re.fullmatch(re.escape(indent) + r"#(?: (.*))?", line)
        if not mark:
            raise ValueError(number, "a line of a STUB must be a comment, as far to the right as its mark: # ...")
        lines.append(indent + mark[1] if mark[1] else "")
    return lines


def blanks(body: list[str], start: int) -> list[str]:
    """`name = ...` for each name that a solution at the left margin assigns."""
    lines = []
    for node in ast.parse("\n".join(body)).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name):
            raise ValueError(start + node.lineno - 1, "a solution at the left margin may only assign names; "
                                                      "put the marks inside the function, or give a STUB")  # fmt: skip
        lines.append(f"{target.id} = ...  # your answer")
    return lines


# -- reading


def read_workbook(path: Path, checked: dict[str, int] | None = None) -> Workbook:
    """Read a source; BuildError with all its problems. `checked` has the exercises that course/checks knows, with their lines."""
    cells, problems = read_cells(path, ("id", "tags", *FACTS))
    source = Chapter(path, cells, None)
    code = [cell for cell in cells if cell.kind == "code"]
    first: dict[str, Cell] = {}
    if doubles := [cell for cell in cells if first.setdefault(cell.id, cell) is not cell]:
        same = [f'{source.where(cell)}: duplicate cell id="{cell.id}", first used at {source.where(first[cell.id])}' for cell in doubles]
        raise BuildError(problems + same)
    if not (cells and cells[0].kind == "markdown" and cells[0].source.startswith("# ")):
        problems.append(f"{show_path(path)}:1: the first cell must be markdown that starts with the title (# ...)")
    if [cell.id for cell in code][:1] != ["setup"]:
        problems.append(f'{show_path(path)}:{code[0].line if code else 1}: the first code cell must have id="setup"')
    for cell in code:
        problems += cell_problems(source, cell)
    texts, answers, checks = {}, {}, {}
    for cell in cells:
        if cell.kind == "markdown" and "exercise" in cell.extra:
            problems += twice(source, texts, cell, cell.extra["exercise"], "text")
        elif cell.kind == "code" and cell.extra:
            problems += twice(source, answers, cell, cell.extra.get("exercise", cell.id), "answer cell")
        elif cell.kind == "code":
            for name in checked_names(cell):
                problems += twice(source, checks, cell, name, "check")
    order = {cell.id: number for number, cell in enumerate(cells)}
    exercises = []
    for name, cell in answers.items():
        if found := fact_problems(cell):
            problems += [f"{source.where(cell)}: {problem}" for problem in found]
        elif name not in texts or order[texts[name].id] > order[cell.id]:
            problems.append(f'{source.where(cell)}: exercise {name} has no text before it: # %% [markdown] exercise="{name}"')
        elif name not in checks or order[checks[name].id] < order[cell.id]:
            problems.append(f'{source.where(cell)}: exercise {name} has no check after it; write check("{name}") into a cell')
        elif checked is not None and name not in checked:
            problems.append(f"{source.where(cell)}: course/checks knows no check for exercise {name}")
        else:
            exercises.append(Exercise(name, *(cell.extra[fact] for fact in FACTS[1:]), texts[name], cell, checks[name]))
    for kind, found in (("check", checks), ("text", texts)):
        problems += [f"{source.where(cell)}: a {kind} without an exercise: {name}" for name, cell in found.items() if name not in answers]
    if problems:
        raise BuildError(problems)
    workbook = Workbook(source, exercises)
    if leaks := leaking(workbook):
        raise BuildError(leaks)
    return workbook


def cell_problems(source: Chapter, cell: Cell) -> list[str]:
    """What is wrong with one code cell: its marks, its attributes, its place."""
    try:
        found = list(parts(cell.source))
        stub = stub_source(cell.source, "name")
        ast.parse(re.sub(r"^(\s*)[%!]", r"\1pass # ", stub, flags=re.MULTILINE))
    except SyntaxError as error:
        return [f"{source.where(cell)}: the stub is not valid Python ({error.msg}, its line {error.lineno})"]
    except ValueError as error:
        return [f"{source.where(cell, error.args[0])}: {error.args[1]}"]
    kinds, problems = {kind for kind, *_ in found} - {""}, []
    answer = "exercise" in cell.extra
    if cell.directives:
        problems.append(f"{source.where(cell)}: a workbook exports nothing; leave #| {next(iter(cell.directives))} out")
    if answer and "SOLUTION" not in kinds:
        problems.append(f"{source.where(cell)}: an exercise without ### BEGIN SOLUTION ... ### END SOLUTION")
    if not answer and kinds & {"SOLUTION", "STUB"}:
        problems.append(f'{source.where(cell)}: a solution in a cell that is no exercise; write exercise="..." on its marker')
    if "HIDDEN TESTS" in kinds and not checked_names(cell):
        problems.append(f"{source.where(cell)}: hidden tests belong into a check cell")
    if cell.extra and not answer:
        problems.append(f"{source.where(cell)}: {', '.join(cell.extra)} without exercise=")
    return problems


def fact_problems(cell: Cell) -> list[str]:
    """What is wrong on the marker line of an answer cell."""
    name, problems = cell.extra.get("exercise"), []
    if name is None:
        return []  # told already
    if not (isinstance(name, str) and name.isidentifier()):
        problems.append(f"exercise={name!r} is not a name")
    for fact in ("points", "minutes", "difficulty"):
        value = cell.extra.get(fact)
        if value is None:
            problems.append(f"exercise {name} has no {fact}")
        elif type(value) is not int or value < 1 or (fact == "difficulty" and value > 3):
            problems.append(f"{fact}={value!r}: expected a whole number, {'1 to 3' if fact == 'difficulty' else '1 or more'}")
    if cell.extra.get("kind") not in KINDS:
        problems.append(f"exercise {name}: kind={cell.extra.get('kind')!r}, expected {' or '.join(KINDS)}")
    return problems


def twice(source: Chapter, found: dict[str, Cell], cell: Cell, name: str, what: str) -> list[str]:
    """Put the cell under its name; a problem if the name is taken."""
    if name in found:
        return [f"{source.where(cell)}: a second {what} for exercise {name}, the first is at {source.where(found[name])}"]
    found[name] = cell
    return []


def checked_names(cell: Cell) -> list[str]:
    """The exercises that a cell checks: its calls check("name")."""
    try:
        tree = ast.parse(cell.code)
    except SyntaxError:
        return []  # a line magic; nothing is checked there
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check"]
    return [call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)]


def known_checks(path: Path) -> dict[str, int] | None:
    """The exercises that a module of checks registers, with their lines, read without running it; None where there is no such module."""
    if not path.is_file():
        return None
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).split(".")[-1] == "exercise" and decorator.args:
                found[ast.literal_eval(decorator.args[0])] = decorator.lineno
    return found


def read_workbooks(root: Path, only: list[str] | None = None) -> list[Workbook]:
    """The workbooks of a course, each with the checks that it names."""
    books, problems = [], []
    for path in sorted((root / "solutions" / "src").glob("*.py")):
        if only is not None and path.stem not in only:
            continue
        checks = root / "course" / "checks" / f"{path.stem.partition('_')[2]}.py"
        known = known_checks(checks)
        try:
            book = read_workbook(path, known or {})
            books.append(book)
        except BuildError as error:
            problems += error.problems
            continue
        if not (root / "chapters" / "src" / path.name).is_file():
            problems.append(f"{show_path(path)}:1: there is no chapter of this name in chapters/src")
        asked = {exercise.name for exercise in book.exercises}
        problems += [f"{checks.relative_to(root).as_posix()}:{line}: a check without an exercise in {show_path(path)}: {name}"
                     for name, line in (known or {}).items() if name not in asked]  # fmt: skip
    if problems:
        raise BuildError(problems)
    return books


def load(name: str, root: Path = ROOT) -> Workbook:
    """The workbook of a chapter, by name. FileNotFoundError in a copy of the course without solutions."""
    path = root / "solutions" / "src" / f"{name}.py"
    if not path.is_file():
        raise FileNotFoundError(f"this copy of the course has no solutions for {name}")
    return read_workbook(path)


# -- nothing leaks


def secret_lines(workbook: Workbook) -> Iterator[tuple[str, Cell, int]]:
    """Each line of a solution or hidden test that says something, with spaces made even, and where it stands."""
    for cell in workbook.source.cells:
        if cell.kind != "code":
            continue
        for kind, _, body, start in parts(cell.source):
            if kind not in ("SOLUTION", "HIDDEN TESTS"):
                continue
            for number, line in enumerate(body, start):
                if len(even(line)) >= SHORT:
                    yield even(line), cell, number


def even(text: str) -> str:
    return " ".join(text.split())


def strings(value: object) -> Iterator[str]:
    """Every string in a piece of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from (key, *strings(each))
    elif isinstance(value, Iterable):
        for each in value:
            yield from strings(each)


def leaking(workbook: Workbook) -> list[str]:
    """Lines of a solution that readers would find elsewhere in their workbook."""
    shown = even("\n".join(text for cell in workbook.stubs().cells for text in (cell.source, *strings(cell.metadata), *cell.tags)))
    return [f"{workbook.source.where(cell, number)}: this line of the solution also stands in the reader's workbook: {line!r}"
            for line, cell, number in secret_lines(workbook) if line in shown]  # fmt: skip
