"""Read what a student handed in, and take the answers out of it; say what is odd about it.

A cell is an answer by its id, else by its metadata, else by its marker comment (`# exercise: NAME (keep this line)`), else because it alone defines
what the exercise asks for. Everything else in the file (checks, outputs, text) is looked at only to say that it was changed.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import unicodedata
import warnings
from dataclasses import dataclass, field
from pathlib import Path

MARKER = re.compile(r"^\s*#\s*exercise:\s*(\w+)", re.MULTILINE)
LARGEST = 30 * 2**20  # bytes of a file that is read at all
LONGEST = 200_000  # characters of one answer
WRITTEN_RIGHT = re.compile(r"^\s*(\w+): right", re.MULTILINE)


class SubmissionError(ValueError):
    """A file that cannot be graded; the text is for the student."""


@dataclass
class Exercise:
    """One exercise of a master notebook."""

    name: str
    points: float
    answer: int  # position of the cell in the master
    check: int
    stub: str
    id: str = ""
    facts: dict = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """What the stub defines, so what an answer has to define."""
        return self.facts.get("names") or asked_for(self.stub) or [self.name]


@dataclass
class Master:
    """The workbook as it was handed out: its cells and its exercises."""

    name: str
    path: Path
    cells: list[dict]
    exercises: dict[str, Exercise]

    @property
    def points(self) -> float:
        return sum(e.points for e in self.exercises.values())

    @classmethod
    def read(cls, path: Path) -> Master:
        """Read a master; ValueError where an exercise has no check or no points."""
        cells, checks, exercises = read_cells(path.read_bytes()), {}, {}
        for index, cell in enumerate(cells):
            told = cell["metadata"].get("check")
            for name in [told] if isinstance(told, str) else told or []:
                checks[name] = index
        for index, cell in enumerate(cells):
            facts = cell["metadata"].get("exercise")
            if cell["kind"] != "code" or not isinstance(facts, dict):
                continue
            name = facts["name"]
            if name not in checks:
                raise ValueError(f"{path.name}: exercise {name} has no check cell")
            exercises[name] = Exercise(name, facts["points"], index, checks[name], cell["source"], cell["id"], facts)
        if not exercises:
            raise ValueError(f"{path.name} has no exercises: it is no workbook")
        return cls(path.stem, path, cells, exercises)


@dataclass
class Submission:
    """The answers of one student to one workbook, and what is odd."""

    path: Path
    student: str
    answers: dict[str, str]
    helpers: dict[str, str]  # top-level definitions outside of the answers, by name
    notes: list[str] = field(default_factory=list)
    odd: dict[str, list[str]] = field(default_factory=dict)
    claims: set[str] = field(default_factory=set)  # exercises that its stored outputs call right


# --- files ----------------------------------------


def read_cells(data: bytes) -> list[dict]:
    """The cells of a notebook of any format as {"kind", "id", "metadata", "source", "outputs"}. SubmissionError says what is wrong."""
    if len(data) > LARGEST:
        raise SubmissionError(f"the file has {len(data) / 2**20:.0f} MB; at most {LARGEST / 2**20:.0f} MB are read. Clear the outputs and save again")
    if not data.strip():
        raise SubmissionError("the file is empty")
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise SubmissionError("the file is no text, so it is no notebook") from None
    try:
        notebook = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; it is a web page: download the notebook itself" if text.lstrip()[:1] == "<" else ""
        raise SubmissionError(f"the file is no notebook ({str(error)[:80]}){hint}") from None
    if not isinstance(notebook, dict) or not ("cells" in notebook or "worksheets" in notebook):
        raise SubmissionError("the file is JSON, but no notebook: it has no cells")
    if "worksheets" in notebook:
        notebook = upgraded(text)
    if not isinstance(notebook["cells"], list):
        raise SubmissionError("the file is damaged: its cells are no list")
    return [normal(cell) for cell in notebook["cells"] if isinstance(cell, dict)]


def upgraded(text: str) -> dict:
    """A notebook of format 2 or 3 in today's form."""
    import nbformat

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nbformat.reads(text, as_version=4)
    except Exception as error:
        raise SubmissionError(f"the notebook has an old format that cannot be read ({type(error).__name__})") from None


def normal(cell: dict) -> dict:
    metadata, source, outputs = cell.get("metadata"), cell.get("source", cell.get("input", "")), cell.get("outputs")
    if isinstance(source, list):
        source = "".join(line for line in source if isinstance(line, str))
    return {
        "kind": str(cell.get("cell_type", "")), "id": cell.get("id") if isinstance(cell.get("id"), str) else "",
        "metadata": metadata if isinstance(metadata, dict) else {}, "source": source if isinstance(source, str) else "",
        "outputs": outputs if isinstance(outputs, list) else [],
    }  # fmt: skip


WORDS = "copy of|kopie von|copie de|final|late|submission|assignsubmission|onlinetext|file|attempt|version|v"
NOISE = re.compile(rf"(?i)\b({WORDS})\b|\(\d+\)|\b\d{{4,}}\b|-\d{{1,2}}$")


def student_name(path: Path, *workbooks: str) -> str:
    """The student's name: what a class download put into the name of the file or of its folder, beside the name of a workbook."""
    whole = [known for name in workbooks for known in (name, name.replace("_", "-"), name.replace("_", " "))]
    topics = [name.partition("_")[2] for name in workbooks]
    for part, removed in ((path.stem, (whole, topics)), (path.parent.name, (whole,))):
        part = unicodedata.normalize("NFC", part)
        for known in removed:  # a student may be called Lora: "12_lora - Lora Berg" loses the first only
            less = re.sub(rf"(?i)(?<![^\W_])({'|'.join(map(re.escape, known))})(?![^\W_])", " ", part)
            if less != part:
                part = less
                break
        part = " ".join(NOISE.sub(" ", part.replace("_", " ")).replace("_", " ").split()).strip(" -.,")
        if part and part.lower() not in ("downloads", "tmp", "submissions", "handed in"):
            return part
    return path.stem


# --- code ----------------------------------------


def parsed(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def defined(source: str) -> list[str]:
    """The names that a cell binds at its top level."""
    tree = parsed(source)
    return list(dict.fromkeys(name for node in tree.body for name in bound(node))) if tree else []


def asked_for(stub: str) -> list[str]:
    """What a stub asks the student to define: its functions, classes and values, not its imports."""
    tree = parsed(stub)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    return list(dict.fromkeys(name for node in tree.body if isinstance(node, kinds) for name in bound(node))) if tree else []


def bound(node: ast.stmt) -> list[str]:
    """The names that a statement binds in its own scope."""
    found: list[str] = []

    def look(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append(node.name)
            return
        if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            return
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.extend(a.asname or a.name.partition(".")[0] for a in node.names if a.name != "*")
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node.id)
        for child in ast.iter_child_nodes(node):
            look(child)

    look(node)
    return found


def used(source: str) -> set[str]:
    """The names that a cell reads anywhere."""
    tree = parsed(source)
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} if tree else set()


def plain_python(source: str) -> tuple[str, list[str]]:
    """The cell without IPython's magics, and which there were."""
    magics = []
    lines = source.splitlines()
    while True:  # cell magics stand on the first line with text
        first = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), None)
        if first is None or not lines[first].startswith("%%"):
            break
        magics.append(lines[first].split()[0])
        lines[first] = ""
    source = "\n".join(lines)
    if parsed(source) is None:
        from IPython.core.inputtransformer2 import TransformerManager

        try:
            changed = TransformerManager().transform_cell(source)
        except (SyntaxError, ValueError, RecursionError):
            return source, magics
        if parsed(changed) is not None:
            magics += re.findall(r"run_line_magic\('(\w+)'", changed) + ["!"] * ("system(" in changed or "getoutput(" in changed)
            source = changed
    return source, magics


def even(source: str) -> str:
    """Source without differences that mean nothing: spaces at line ends, empty lines, the marker."""
    return "\n".join(line.rstrip() for line in source.replace("\r\n", "\n").splitlines() if line.strip() and not MARKER.match(line))


# --- taking the answers ----------------------------------------


def read_submission(path: Path, masters: list[Master]) -> tuple[Submission, Master]:
    """Read a file and find the workbook that it answers. SubmissionError where that fails."""
    try:
        data = path.read_bytes() if path.stat().st_size <= LARGEST else b" " * (LARGEST + 1)
    except OSError as error:
        raise SubmissionError(f"the file cannot be read ({error.strerror})") from None
    cells = read_cells(data)
    master = max(masters, key=lambda m: likeness(m, cells, path))
    if not likeness(master, cells, path):
        raise SubmissionError("the file has no cell of a workbook: no cell id, no metadata and no line `# exercise: NAME (keep this line)`")
    return take(path, cells, master), master


def likeness(master: Master, cells: list[dict], path: Path) -> int:
    """How many cells of a file belong to a workbook; its name decides between equals."""
    ids = {e.id for e in master.exercises.values()}
    score = sum(2 * (c["id"] in ids or grade_id(c) in ids or marker(c) in master.exercises) for c in cells if c["kind"] == "code")
    return score + (score > 0 and master.name.lower() in path.stem.lower())


def grade_id(cell: dict) -> str:
    """The id that a cell's metadata give: ours, or nbgrader's."""
    told, grader = cell["metadata"].get("id"), cell["metadata"].get("nbgrader")
    return told if isinstance(told, str) else str(grader.get("grade_id", "")) if isinstance(grader, dict) else ""


def marker(cell: dict) -> str:
    found = MARKER.findall(cell["source"])
    return found[0] if found else ""


def take(path: Path, cells: list[dict], master: Master) -> Submission:
    """The answers of a notebook, each from the cell that most surely is it."""
    result = Submission(path, student_name(path, master.name), {}, {})
    by_id = {e.id: e for e in master.exercises.values() if e.id}
    claims: dict[str, list[tuple[int, int]]] = {name: [] for name in master.exercises}
    taken: set[int] = set()
    code = [(index, cell) for index, cell in enumerate(cells) if cell["kind"] == "code"]
    fixed_ids = {c["id"] or str(c["metadata"].get("id", "")) for c in master.cells} - set(by_id)
    for index, cell in code:
        facts = cell["metadata"].get("exercise")
        named = master.exercises.get(str(facts.get("name"))) if isinstance(facts, dict) else None
        meant = {3: by_id.get(cell["id"]), 2: by_id.get(grade_id(cell)) or named, 1: master.exercises.get(marker(cell))}
        ranked = [(rank, e) for rank, e in meant.items() if e]
        if not ranked:
            continue
        rank, exercise = ranked[0]
        marked = meant[1]
        if marked and marked is not exercise:
            result.odd.setdefault(marked.name, []).append(f"its cell has the id or metadata of {exercise.name} (cells were renumbered or copied)")
            defines = set(defined(plain_python(cell["source"])[0]))
            if set(marked.names) & defines or not set(exercise.names) & defines:
                rank, exercise = 1, marked
        claims[exercise.name].append((rank, index))
        taken.add(index)
    for name, exercise in master.exercises.items():
        found = claims[name]
        if not found:
            loose = [i for i, c in code if i not in taken and c["id"] not in fixed_ids and defines_any(c, exercise)]
            if len(loose) != 1:
                result.odd.setdefault(name, []).append("its cell is not in the notebook (deleted?)")
                continue
            taken.add(loose[0])
            found = [(0, loose[0])]
            result.odd.setdefault(name, []).append("its cell lost id, metadata and marker line; found by what it defines")
        written = [(rank, i) for rank, i in found if even(cells[i]["source"]) != even(exercise.stub)]
        defining = [(rank, i) for rank, i in written if defines_any(cells[i], exercise)]
        choice = max(defining or written or found)
        if len(found) > 1:
            which = "the only one that was changed" if len(written) == 1 else "the one with the right id, else the last"
            result.odd.setdefault(name, []).append(f"there are {len(found)} cells for it; taken: {which}")
        source, magics = plain_python(cells[choice[1]]["source"])
        if magics:
            result.odd.setdefault(name, []).append(f"magics are not run: {', '.join(dict.fromkeys(magics))}")
        if len(source) > LONGEST:
            result.odd.setdefault(name, []).append(f"the answer has {len(source):,} characters; at most {LONGEST:,} are read")
            source = exercise.stub
        result.answers[name] = source
    look_around(cells, master, result, taken)
    return result


def defines_any(cell: dict, exercise: Exercise) -> bool:
    """Whether a cell defines something that the exercise asks for."""
    return bool(set(exercise.names) & set(defined(plain_python(cell["source"])[0])))


def look_around(cells: list[dict], master: Master, result: Submission, taken: set[int]) -> None:
    """What else is odd: changed or missing cells of the master, results written by hand; and the definitions beside the answers."""
    own = {c["id"] or grade_id(c): c for c in master.cells if c["kind"] == "code"}
    answer_ids = {e.id for e in master.exercises.values()}
    seen: dict[str, int] = {}
    original = {even(c["source"]) for c in own.values()}
    for index, cell in enumerate(cells):
        if cell["kind"] != "code":
            continue
        identity = cell["id"] if cell["id"] in own else grade_id(cell)
        if identity in own and identity not in answer_ids:
            seen[identity] = seen.get(identity, 0) + 1
            if even(cell["source"]) != even(own[identity]["source"]):
                what = "the check of " + str(own[identity]["metadata"]["check"]) if "check" in own[identity]["metadata"] else f"cell {identity}"
                result.notes.append(f"{what} was edited; the master's own is used")
        elif even(cell["source"]) in original:
            seen[next(i for i, c in own.items() if even(c["source"]) == even(cell["source"]))] = 1
        for output in cell["outputs"]:
            text = output.get("text", "") if isinstance(output, dict) else ""
            text = "".join(t for t in text if isinstance(t, str)) if isinstance(text, list) else text
            if isinstance(text, str):
                result.claims.update(WRITTEN_RIGHT.findall(text))
        if index not in taken and (identity not in own or even(cell["source"]) != even(own[identity]["source"])):
            result.helpers.update(definitions(plain_python(cell["source"])[0]))
    missing = [str(c["metadata"]["check"]) for i, c in own.items() if "check" in c["metadata"] and i not in seen]
    if missing:
        result.notes.append(f"check cells were deleted: {', '.join(missing)}; the master's own are used")
    doubled = [identity for identity, count in seen.items() if count > 1]
    if doubled:
        result.notes.append(f"cells stand there more than once: {', '.join(doubled)}")


def definitions(source: str) -> dict[str, str]:
    """Functions, classes, imports and simple values that a cell defines at its top level, by name."""
    tree, found = parsed(source), {}
    for node in tree.body if tree else ():
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)):
            lines = source.splitlines()
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            text = "\n".join(lines[first - 1 : node.end_lineno])
            for name in bound(node):
                found[name] = text
    return found


def needed_helpers(source: str, known: set[str], helpers: dict[str, str]) -> dict[str, str]:
    """The definitions beside the answers that this code needs, in the order in which they must run."""
    found: dict[str, str] = {}

    def need(text: str) -> None:
        for name in sorted(used(text) - known - set(dir(builtins))):
            if name in helpers and name not in found and name not in defined(text):
                found[name] = ""
                need(helpers[name])
                del found[name]
                found[name] = helpers[name]

    need(source)
    return found
