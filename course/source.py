"""Read a chapter source (chapters/src/NN_topic.py, py:percent) and check it before anything is made from it.

Every problem is a `file:line: message`. All problems of all chapters are collected, so one build shows them all.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELL_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
MARKER = re.compile(r"# %%(?!%)")
DIRECTIVE = re.compile(r"#\|\s*(\S*)\s*(.*)")
IMPORTABLE = {"torch", "numpy", "tokenizers", "safetensors", "minimind"} | set(sys.stdlib_module_names)
PLOTTING = {"matplotlib", "IPython", "ipywidgets", "pandas", "seaborn"}
# Calls that only build a value, so they may stand at module level of an exported cell.
PURE_CALLS = {
    "abs", "bytes", "dict", "enumerate", "field", "float", "frozenset", "int", "len", "list", "max", "min", "namedtuple",
    "ord", "range", "reversed", "round", "set", "sorted", "str", "sum", "tuple", "zip", "Path", "Path.cwd", "TypeVar",
    "NewType", "bytes.fromhex", "chr", "collections.namedtuple", "dataclasses.field", "dict.fromkeys", "frozendict",
    "logging.getLogger", "MappingProxyType", "re.compile", "types.MappingProxyType", "typing.TypeVar", "bool",
    "str.maketrans", "object", "repr", "bytearray", "divmod",
}  # fmt: skip
PURE_METHODS = {"split", "splitlines", "strip", "join", "items", "keys", "values", "encode", "format", "replace", "copy"}
NODES_OF_A_VALUE = (
    ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare,
    ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Starred, ast.JoinedStr, ast.FormattedValue, ast.IfExp, ast.Lambda,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.expr_context, ast.operator,
    ast.unaryop, ast.boolop, ast.cmpop, ast.arguments, ast.arg, ast.keyword,
)  # fmt: skip


class BuildError(Exception):
    """One or more problems, each `file:line: message`."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass
class Cell:
    """One cell of a chapter; `line` is the line of its `# %%` marker in the source file."""

    kind: str  # "markdown" or "code"
    id: str
    source: str
    line: int
    tags: list[str] = field(default_factory=list)
    directives: dict[str, str] = field(default_factory=dict)
    export: str | None = None  # the module this cell is exported to
    extra: dict = field(default_factory=dict)  # what else stands on the marker: the facts of an exercise
    metadata: dict = field(default_factory=dict)  # what the notebook's cell gets beside its id and tags

    @property
    def code(self) -> str:
        """The code with each directive line blanked, so that line numbers stay."""
        return re.sub(r"^#\|.*$", "", self.source, flags=re.MULTILINE)


@dataclass
class Chapter:
    """A chapter source, read and split into cells."""

    path: Path
    cells: list[Cell]
    module: str | None

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def title(self) -> str:
        first = next((c.source for c in self.cells if c.kind == "markdown"), "")
        return first.splitlines()[0].lstrip("# ").strip() if first else self.name

    def where(self, cell: Cell, line_in_cell: int = 0) -> str:
        """`chapters/src/04_attention.py:12`; line_in_cell counts the lines of the cell from 1, 0 is its marker."""
        return f"{show_path(self.path)}:{cell.line + line_in_cell}"

    def modules(self) -> dict[str, list[Cell]]:
        """The cells of each module that this chapter exports, in order."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if cell.export:
                found.setdefault(cell.export, []).append(cell)
        return found


def show_path(path: Path) -> str:
    """The path from the root of the course, or from the working directory, or whole."""
    for base in (path.parents[2] if len(path.parents) > 2 and path.parent.name == "src" else ROOT, ROOT, Path.cwd()):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return str(path)


def read_chapter(path: Path) -> Chapter:
    """Read one source; raise BuildError with every problem that this file has by itself."""
    cells, problems = read_cells(path)
    shown = show_path(path)
    chapter = Chapter(path, cells, None)
    chapter.module, more = find_exports(chapter)
    problems += more
    if [c.id for c in cells if c.kind == "code"][:2] != ["parameters", "setup"]:
        problems.append(f"{shown}:{cells[0].line if cells else 1}: the first two code cells must have "
                        'id="parameters" (with tags=["parameters"]) and id="setup"')  # fmt: skip
    else:
        parameters = next(c for c in cells if c.id == "parameters")
        if "parameters" not in parameters.tags:
            problems.append(f'{chapter.where(parameters)}: the parameters cell needs tags=["parameters"]')
        if not (cells[0].kind == "markdown" and cells[0].source.startswith("# ")):
            problems.append(f"{shown}:{cells[0].line}: the first cell must be markdown that starts with the title (# ...)")
    problems += [p for cells_of in chapter.modules().values() for c in cells_of for p in check_export(chapter, c)]
    if problems:
        raise BuildError(problems)
    return chapter


def read_cells(path: Path, known: tuple[str, ...] = ("id", "tags")) -> tuple[list[Cell], list[str]]:
    """The cells of a source, and what is wrong with them; `known` names the attributes that a cell may have."""
    import jupytext

    text = path.read_text(encoding="utf-8")
    shown, problems = show_path(path), []
    try:
        ast.parse(re.sub(r"^(\s*)[%!]", r"\1pass # ", text, flags=re.MULTILINE))
    except SyntaxError as error:
        raise BuildError([f"{shown}:{error.lineno}: not valid Python: {error.msg}"]) from None
    markers = [number for number, line in enumerate(text.splitlines(), 1) if MARKER.match(line)]
    notebook = jupytext.reads(text, fmt="py:percent")
    if len(markers) != len(notebook.cells):
        start = markers[0] if markers else 1
        raise BuildError([
            f"{shown}:{1 if start > 1 else start}: {len(markers)} cell markers (# %%) but {len(notebook.cells)} cells: "
            "the file must start with a marker, and no string or comment may hold a line that starts with one"
        ])
    cells: list[Cell] = []
    for line, raw in zip(markers, notebook.cells, strict=True):
        try:
            cells.append(read_cell(raw, line, path.stem, cells, known))
        except ValueError as error:
            problems.append(f"{shown}:{line}: {error}")
    return cells, problems


def read_cell(raw, line: int, chapter: str, before: list[Cell], known: tuple[str, ...] = ("id", "tags")) -> Cell:
    """Turn a jupytext cell into ours; ValueError says what is wrong with it."""
    metadata = {k: v for k, v in raw.metadata.items() if k != "lines_to_next_cell"}
    if raw.cell_type not in ("markdown", "code"):
        raise ValueError(f"a {raw.cell_type} cell; only markdown and code cells are known")
    if unknown := sorted(set(metadata) - set(known)):
        raise ValueError(f"unknown cell metadata {', '.join(unknown)}; only {', '.join(known[:-1])} and {known[-1]} are known")
    extra = {name: value for name, value in metadata.items() if name not in ("id", "tags")}
    if raw.cell_type == "markdown":
        taken = {cell.id for cell in before}
        given = metadata.get("id")
        identity = given or markdown_id(chapter, raw.source, taken)
        if given and not CELL_ID.fullmatch(given):
            raise ValueError(f'id="{given}" is not kebab-case (a to z, 0 to 9 and -, at most 64)')
        return Cell("markdown", identity, raw.source, line, list(metadata.get("tags", [])), extra=extra)
    if "id" not in metadata:
        raise ValueError('a code cell without an id; write for example # %% id="attention-scores"')
    if not CELL_ID.fullmatch(str(metadata["id"])):
        raise ValueError(f'id="{metadata["id"]}" is not kebab-case (a to z, 0 to 9 and -, at most 64)')
    cell = Cell("code", metadata["id"], raw.source, line, list(metadata.get("tags", [])), extra=extra)
    body_started = False
    for text in cell.source.splitlines():
        found = DIRECTIVE.match(text)
        if not found:
            body_started = body_started or bool(text.strip())
            continue
        name, value = found[1], found[2].strip()
        if name not in ("default_exp", "export"):
            raise ValueError(f"unknown directive #| {name}; known are default_exp NAME, export and export NAME")
        if body_started:
            raise ValueError(f"#| {name} must be the first line of its cell")
        if value and not value.isidentifier():
            raise ValueError(f"#| {name} {value}: {value!r} is not a module name")
        if name == "default_exp" and not value:
            raise ValueError("#| default_exp needs the name of a module")
        cell.directives[name] = value
    return cell


def markdown_id(chapter: str, source: str, taken: set[str]) -> str:
    """An id that depends on the text alone, so that two builds agree; repeated texts are numbered."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    number, identity = 1, f"md-{digest}"
    while identity in taken:
        number += 1
        identity = f"md-{digest}-{number}"
    return identity


def find_exports(chapter: Chapter) -> tuple[str | None, list[str]]:
    """Set `cell.export` on each exported cell; give the chapter's own module and the problems."""
    problems, module = [], None
    for cell in chapter.cells:
        if "default_exp" in cell.directives:
            if module:
                problems.append(f"{chapter.where(cell)}: a second #| default_exp; one chapter owns one module")
            module = cell.directives["default_exp"]
            if any(line.strip() and not line.startswith("#") for line in cell.source.splitlines()):
                problems.append(f"{chapter.where(cell)}: #| default_exp must stand alone in its cell")
        if "export" in cell.directives:
            cell.export = cell.directives["export"] or module
            if not cell.export:
                problems.append(f"{chapter.where(cell)}: #| export before any #| default_exp NAME")
    return module, problems


def check_export(chapter: Chapter, cell: Cell) -> list[str]:
    """Importing a module must do nothing: only imports, definitions and constants may stand in an exported cell."""
    problems = []

    def complain(node: ast.AST, text: str) -> None:
        problems.append(f"{chapter.where(cell, node.lineno)}: {text}")

    try:
        tree = ast.parse(cell.code)
    except SyntaxError as error:
        return [f"{chapter.where(cell, error.lineno or 1)}: not valid Python in an exported cell: {error.msg}"]
    if not tree.body:
        complain_at = chapter.where(cell)
        return [f"{complain_at}: #| export on a cell without code"]

    def check_block(body: list[ast.stmt]) -> None:
        for node in body:
            check_statement(node)

    def check_statement(node: ast.stmt) -> None:
        match node:
            case ast.Import() | ast.ImportFrom():
                check_import(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                for value in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
                    check_value(value)
            case ast.ClassDef():
                check_block(node.body)
            case ast.Assign() | ast.AnnAssign():
                if node.value is not None:
                    check_value(node.value)
            case ast.Pass() | ast.Expr(value=ast.Constant()):
                pass
            case ast.If(test=test) if is_type_checking(test) or is_script_guard(test):
                if is_type_checking(test):
                    check_block(node.body)
            case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
                complain(node, 'this also runs in the notebook: write if __name__ == "__main__" and "__file__" in globals():')
            case _:
                what = ast.unparse(node).splitlines()[0]
                complain(node, f"an exported cell works at import: {what!r}; only imports, definitions and constants may")

    def check_value(value: ast.expr) -> None:
        for node in walk_value(value):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                method = isinstance(node.func, ast.Attribute) and node.func.attr in PURE_METHODS
                if not (name in PURE_CALLS or method or name.startswith("math.")):
                    complain(node, f"an exported cell works at import: it calls {name}(...) at module level; "
                                   "move it into a function (functools.cache keeps its result)")  # fmt: skip
            elif not isinstance(node, NODES_OF_A_VALUE):
                complain(value, f"an exported cell may not hold {type(node).__name__} at module level")

    def check_import(node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.ImportFrom) and node.level:
            complain(node, "write minimind imports in full (from minimind.rope import ...); the build makes them relative")
            return
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for name in names:
            top = name.split(".")[0]
            if top in PLOTTING:
                complain(node, f"an exported cell imports {top}: plots and widgets stay in ordinary cells")
            elif top not in IMPORTABLE:
                complain(node, f"an exported cell imports {top} at module level; only torch, numpy, "
                               "tokenizers, safetensors and the standard library may be (import it inside the function)")  # fmt: skip

    check_block(tree.body)
    return problems


def walk_value(value: ast.AST):
    """All nodes of an expression, but not inside a lambda: its body runs later."""
    yield value
    if isinstance(value, ast.Lambda):
        return
    for child in ast.iter_child_nodes(value):
        yield from walk_value(child)


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def is_script_guard(test: ast.expr) -> bool:
    return ast.unparse(test) == "__name__ == '__main__' and '__file__' in globals()"


def defined_names(cell: Cell) -> list[tuple[str, int]]:
    """The names an exported cell defines at module level, with their line in the cell."""
    found = []
    for node in ast.parse(cell.code).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append((node.name, node.lineno))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [(n.id, n.lineno) for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return found


def check_book(chapters: list[Chapter]) -> list[str]:
    """Problems that only show across chapters: ids, exported names, module owners, direction of imports."""
    problems = []
    ids: dict[str, str] = {}
    names: dict[str, tuple[str, str]] = {}
    owner: dict[str, str] = {}
    for chapter in chapters:
        for cell in chapter.cells:
            shared = cell.kind == "markdown" or cell.id in ("parameters", "setup")
            key = f"{chapter.path}/{cell.id}" if shared else cell.id
            if key in ids:
                problems.append(f'{chapter.where(cell)}: duplicate cell id="{cell.id}", first used at {ids[key]}')
            ids.setdefault(key, chapter.where(cell))
        for module, cells in chapter.modules().items():
            if module in owner:
                problems.append(f"{chapter.where(cells[0])}: module minimind.{module} is owned by {owner[module]}; "
                                "a later chapter adds a module of its own")  # fmt: skip
            owner.setdefault(module, chapter.name)
            for cell in cells:
                for name, line in defined_names(cell):
                    key = f"{module}.{name}" if name.startswith("_") else name
                    if key in names:
                        other, place = names[key]
                        problems.append(f"{chapter.where(cell, line)}: {name} is exported twice, "
                                        f"first to minimind.{other} at {place}")  # fmt: skip
                    names.setdefault(key, (module, chapter.where(cell, line)))
    order = {module: name for module, name in owner.items()}
    for chapter in chapters:
        for cells in chapter.modules().values():
            for cell in cells:
                for node in ast.walk(ast.parse(cell.code)):
                    for module in imported_modules(node):
                        if module in order and order[module] > chapter.name:
                            problems.append(f"{chapter.where(cell, node.lineno)}: minimind.{module} belongs to the later chapter "
                                            f"{order[module]}; imports point to lower-numbered chapters only")  # fmt: skip
    return problems


def imported_modules(node: ast.AST) -> list[str]:
    """The names of the minimind modules that an import statement imports."""
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minimind."):
        return [node.module.split(".")[1]]
    if isinstance(node, ast.ImportFrom) and node.module == "minimind":
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return [a.name.split(".")[1] for a in node.names if a.name.startswith("minimind.")]
    return []
