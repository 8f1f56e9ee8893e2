"""`python -m course.mutants`: change the solutions of the workbooks in small ways, and see whether the checks notice.

mutmut and cosmic-ray mutate modules that a test suite imports; an answer is a cell of a workbook, so this is a small mutator of its own.
Each mutant runs in a process of its own (a fork, with a time limit), among the solved answers of the other exercises. One that passes its check
survives: a gap in the check, or no mutant at all because nothing changed; those are listed with a reason in tests/equivalent_mutants.yaml.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from course import workbook
from course.source import ROOT

EQUIVALENTS = ROOT / "tests" / "equivalent_mutants.yaml"
EXAMPLE = """examples:
  python -m course.mutants                       all workbooks, all mutants
  python -m course.mutants 04 --survivors        what the checks of workbook 4 let through
  python -m course.mutants --sample 6 --seed 1   six of each exercise"""
MEMORY = 12 << 30
COMPARED = {ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,),
            ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,)}  # fmt: skip
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
            ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}  # fmt: skip
PAIRS = ("min max", "amin amax", "argmin argmax", "minimum maximum", "sum mean", "sin cos", "floor ceil", "tril triu", "any all", "log exp",
         "softmax log_softmax", "zeros ones", "zeros_like ones_like", "repeat repeat_interleave", "quantile median", "append insert",
         "lstrip rstrip", "startswith endswith", "keys values")  # fmt: skip
SWAPPED = {a: b for pair in map(str.split, PAIRS) for a, b in (pair, pair[::-1])}
EITHER_WAY = {"transpose", "swapaxes", "max", "min", "maximum", "minimum"}  # the order of their arguments says nothing
OF_DIMENSIONS = set("transpose swapaxes movedim flatten unflatten unsqueeze squeeze size permute gather cumsum argmax argmin softmax log_softmax "
                    "sum mean any all amax amin".split())  # fmt: skip
SHED = {"abs", "clone", "copy", "detach", "item", "lower", "sort", "sorted", "sqrt", "strip", "round", "clamp", "float", "softmax", "log_softmax"}


@dataclass
class Mutant:
    """One change of one answer."""

    exercise: str
    before: str  # the line that changed, as ast writes it
    after: str
    source: str
    outcome: str = ""  # "rejected" or "survived"
    why: str = ""  # the reason, where a survivor is listed as equivalent


# -- making mutants


def mutants(exercise: str, source: str, lines: set[int]) -> list[Mutant]:
    """Every mutant of the answer in `source`, of whose lines only `lines` are the solution's."""
    tree = ast.parse(source)
    plain, made = ast.unparse(tree), {}
    for _ in changes(tree, lines):
        text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(tree)))
        if text != plain and text not in made:
            made[text] = Mutant(exercise, *first_difference(plain, text), text)
    return list(made.values())


def first_difference(plain: str, text: str) -> tuple[str, str]:
    """The line that differs, before and after; a statement that was dropped is `pass` after."""
    a, b = plain.splitlines(), text.splitlines()
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)) - 1)
    return a[at].strip(), b[at].strip()


def changes(tree: ast.AST, lines: set[int]) -> Iterator[None]:
    """Change the tree in each way in turn; every change is taken back before the next."""
    for parent, field, place, old in list(places(tree)):
        if line_of(old) in lines:
            for new in others(old, parent, field):
                put(parent, field, place, new)
                yield
                put(parent, field, place, old)


def places(parent: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node with the place where it stands, but for types, for the words of errors, and for what a number's sign belongs to."""
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for place, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(node, ast.AST) and not isinstance(node, ast.JoinedStr):
                yield parent, field, place, node
                if not isinstance(node, ast.Raise) and signed(node) is None:
                    yield from places(node)


def signed(node: ast.AST) -> int | float | None:
    """The value of a negative number, which ast takes apart."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value
    return None


def line_of(node: ast.AST) -> int:
    return getattr(node, "lineno", None) or getattr(getattr(node, "target", None), "lineno", 0)


def put(parent: ast.AST, field: str, place: int | None, node: ast.AST) -> None:
    if place is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[place] = node


def others(node: ast.AST, parent: ast.AST, field: str) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    if isinstance(node, ast.stmt):
        words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not words and not isinstance(node, ast.Pass | ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
            yield ast.Pass()
        if isinstance(node, ast.AugAssign) and type(node.op) in COMPUTED:
            yield like(node, op=COMPUTED[type(node.op)]())
    elif isinstance(node, ast.Constant):
        yield from constants(node.value, dimension(parent, field))
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield from (like(node, ops=[op()]) for op in COMPARED[type(node.ops[0])])
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield from (like(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]]) for other in COMPARED[type(op)])
    elif isinstance(node, ast.BinOp):
        if type(node.op) in COMPUTED:
            yield like(node, op=COMPUTED[type(node.op)]())
        if isinstance(node.op, ast.Sub | ast.Div | ast.FloorDiv | ast.Mod | ast.Pow | ast.MatMult):
            yield like(node, left=node.right, right=node.left)
        yield from (node.left, node.right)
    elif (value := signed(node)) is not None:
        yield from constants(value, dimension(parent, field))
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.BoolOp):
        yield like(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        yield from node.values
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.Call):
        yield from calls(node)
    elif isinstance(node, ast.Slice):
        yield from slices(node)
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield like(node, ifs=[])
    if isinstance(parent, ast.If | ast.While | ast.IfExp) and field == "test" and not isinstance(node, ast.Compare):
        yield ast.UnaryOp(ast.Not(), node)


def like(node: ast.AST, **fields) -> ast.AST:
    """The node with other fields."""
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})


def constants(value: object, dimension: bool) -> Iterator[ast.Constant]:
    """Other numbers; -1 for 2 only where it is no other name of the same dimension."""
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int | float):
        near = (value + 1, value - 1, 0 * value) if dimension else (value + 1, value - 1, 0 * value, -value)
        yield from (ast.Constant(each) for each in dict.fromkeys(near) if each != value)


def dimension(parent: ast.AST, field: str) -> bool:
    """Whether a number stands where it names a dimension: transpose(1, 2), x.shape[2], dim=-1."""
    if isinstance(parent, ast.keyword):
        return parent.arg in ("dim", "axis", "start_dim", "end_dim")
    if isinstance(parent, ast.Subscript):
        return field == "slice" and getattr(parent.value, "attr", "") == "shape"
    return isinstance(parent, ast.Call) and getattr(parent.func, "attr", "") in OF_DIMENSIONS


def calls(node: ast.Call) -> Iterator[ast.AST]:
    """Neighbouring arguments swapped, a keyword dropped, another function, none."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    for i in range(len(node.args) - 1 if name not in EITHER_WAY else 0):
        yield like(node, args=[*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]])
    for i, keyword in enumerate(node.keywords):
        if keyword.arg:
            yield like(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])
    if name in SWAPPED:
        other = {"attr": SWAPPED[name]} if isinstance(node.func, ast.Attribute) else {"id": SWAPPED[name]}
        yield like(node, func=like(node.func, **other))
    if name in SHED:
        yield node.args[0] if node.args and plain_module(node.func) else getattr(node.func, "value", node)


def plain_module(function: ast.expr) -> bool:
    """torch.sqrt and sorted take their value as an argument; x.sqrt has it before the dot."""
    return not isinstance(function, ast.Attribute) or (isinstance(function.value, ast.Name) and function.value.id in ("torch", "np", "math", "F"))


def slices(node: ast.Slice) -> Iterator[ast.Slice]:
    for bound in ("lower", "upper"):
        if value := getattr(node, bound):
            yield like(node, **{bound: None})
            if not isinstance(value, ast.Constant):  # those are moved as constants
                yield from (like(node, **{bound: ast.BinOp(value, op, ast.Constant(1))}) for op in (ast.Add(), ast.Sub()))


# -- running them


class Bench:
    """A workbook whose solved cells have run, so that each fork of this process can judge one mutant."""

    def __init__(self, name: str) -> None:
        self.name, self.book = name, workbook.load(name)
        core = importlib.import_module("course.checks.core")
        checks = importlib.import_module(f"course.checks.{name.partition('_')[2]}").__name__
        self.checks, self.attempt = core.REGISTERED[checks], core.attempt
        self.namespace = {"__name__": "__main__", "display": print}
        self.own = {exercise.name: bound(solved_lines(exercise.answer.source)[0]) for exercise in self.book.exercises}
        cells = {cell.id: ast.parse(cell.source) for cell in self.book.solved().cells
                 if cell.kind == "code" and cell.id != "setup" and "check" not in cell.tags and not cell.source.startswith("keep(")}  # fmt: skip
        answers = {exercise.answer.id for exercise in self.book.exercises}
        used = {identity: {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} for identity, tree in cells.items()}
        with contextlib.redirect_stdout(io.StringIO()):
            for identity, tree in cells.items():
                if identity in answers:  # numbers that only their own check looks at are measured again in each mutant of that exercise
                    elsewhere = set().union(*(names for other, names in used.items() if other != identity))
                    tree.body = wanted(tree.body, elsewhere)
                exec(compile(tree, f"<{identity}>", "exec"), self.namespace)

    def made(self, sample: int = 0, seed: int = 0) -> list[Mutant]:
        """The mutants of each exercise, or so many of each, drawn by lot; the unchanged answer goes first, and must pass."""
        found = []
        for exercise in self.book.exercises:
            source, lines = solved_lines(exercise.answer.source)
            drawn = mutants(exercise.name, source, lines)
            if sample and len(drawn) > sample:
                drawn = random.Random(f"{self.name} {exercise.name} {seed}").sample(drawn, sample)
            found += [Mutant(exercise.name, "", "(unchanged)", ast.unparse(ast.parse(source))), *drawn]
        return found

    def judged(self, found: list[Mutant], jobs: int = 1, limit: float = 10.0) -> list[Mutant]:
        """The same mutants, each with its outcome. RuntimeError where an unchanged answer does not pass."""
        waiting, running = list(reversed(found)), {}
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.pop()
                running[self.start(mutant, limit if mutant.before else 3 * limit)] = mutant
            process, status = os.wait()
            running.pop(process).outcome = "survived" if status == 0 else "rejected"
        if broken := [mutant.exercise for mutant in found if not mutant.before and mutant.outcome != "survived"]:
            raise RuntimeError(f"{self.name}: the solution itself does not pass its check: {', '.join(broken)}")
        return [mutant for mutant in found if mutant.before]

    def start(self, mutant: Mutant, limit: float) -> int:
        """A process that leaves with 0 where the mutant passes its check; the system ends it when the time is over."""
        if process := os.fork():
            return process
        code = 1
        try:
            signal.setitimer(signal.ITIMER_PROF, limit)  # of computing, so that a busy machine rejects nothing
            signal.setitimer(signal.ITIMER_REAL, 12 * limit)
            if sys.platform == "linux":
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            import torch

            torch.manual_seed(0)
            tree = ast.parse(mutant.source)
            for name in self.own[mutant.exercise]:  # a statement that was dropped leaves nothing behind
                self.namespace.pop(name, None)
            exec(compile(tree, "<mutant>", "exec"), self.namespace)
            self.attempt(self.checks[mutant.exercise], self.namespace)
            code = 0
        finally:
            os._exit(code)


def wanted(body: list[ast.stmt], elsewhere: set[str]) -> list[ast.stmt]:
    """The statements without the assignments that nothing else needs: no other cell, and no later statement that stays."""
    kept, needed = [], set(elsewhere)
    for node in reversed(body):
        if not isinstance(node, ast.Assign) or bound(ast.unparse(node)) & needed:
            needed |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            kept.insert(0, node)
    return kept


def bound(source: str) -> set[str]:
    """The names that a cell gives at its left margin."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    return found


def solved_lines(source: str) -> tuple[str, set[int]]:
    """The solved answer without marks, and the numbers of the lines that are the solution's."""
    lines, numbers = [], set()
    for kind, _, body, _ in workbook.parts(source):
        if kind != "STUB":
            numbers |= set(range(len(lines) + 1, len(lines) + len(body) + 1)) if kind == "SOLUTION" else set()
            lines += body
    return "\n".join(lines), numbers


# -- what is known, and the report


def equivalents(path: Path = EQUIVALENTS) -> dict[str, dict[str, dict[str, str]]]:
    """Workbook -> exercise -> the mutated line (`drop: ` and the statement, where one was dropped) -> why no check should refuse it."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def explain(name: str, judged: list[Mutant], known: dict) -> None:
    """Give each survivor that is listed its reason."""
    for mutant in judged:
        mutant.why = known.get(name, {}).get(mutant.exercise, {}).get(line_shown(mutant), "")


def line_shown(mutant: Mutant) -> str:
    """The line that the list of equivalents names."""
    return f"drop: {mutant.before}" if mutant.after == "pass" else mutant.after


def rate(judged: list[Mutant]) -> float:
    """The share of mutants that are rejected, of those that are not listed as equivalent."""
    counted = [mutant for mutant in judged if not mutant.why]
    return sum(mutant.outcome == "rejected" for mutant in counted) / max(1, len(counted))


def report(name: str, judged: list[Mutant], survivors: bool) -> None:
    print(f"{name}: {rate(judged):.1%} rejected")
    for exercise in dict.fromkeys(mutant.exercise for mutant in judged):
        rows = [mutant for mutant in judged if mutant.exercise == exercise]
        alive = [mutant for mutant in rows if mutant.outcome == "survived" and not mutant.why]
        same = sum(bool(mutant.why) for mutant in rows)
        print(f"  {exercise:24} {len(rows) - len(alive) - same:4} rejected {len(alive):4} survived {same:4} equivalent")
        for mutant in alive if survivors else ():
            print(f"    - {mutant.before}\n    + {mutant.after}")


def main(argv: list[str] | None = None) -> int:
    """Judge the mutants of the named workbooks; 1 where less than nine in ten are rejected."""
    parser = argparse.ArgumentParser(prog="python -m course.mutants", description=__doc__.partition("\n")[2], epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("workbooks", nargs="*", help="numbers or names: 4, 04, 04_attention; left out, all of them")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="at most N mutants of each exercise, drawn by lot")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=10.0, metavar="SECONDS", help="a mutant that takes longer is rejected (default 10)")
    parser.add_argument("--survivors", action="store_true", help="show each line that changed unnoticed")
    parser.add_argument("--json", action="store_true", help="print the mutants as JSON instead")
    args = parser.parse_args(argv)
    from course.solution import name_of

    names = sorted(path.stem for path in (ROOT / "solutions" / "src").glob("[0-9][0-9]_*.py"))
    names = [name_of(str(int(each)) if each.isdigit() else each) for each in args.workbooks] or names
    known, everything = equivalents(), {}
    prepare()
    for name in names:
        bench = Bench(name)
        everything[name] = bench.judged(bench.made(args.sample, args.seed), args.jobs, args.limit)
        explain(name, everything[name], known)
        if not args.json:
            report(name, everything[name], args.survivors)
    rows = [mutant for judged in everything.values() for mutant in judged]
    if args.json:
        print(json.dumps([{"workbook": name} | asdict(mutant) for name, judged in everything.items() for mutant in judged]))
    else:
        print(f"all: {rate(rows):.1%} of {sum(not mutant.why for mutant in rows)} rejected")
    return int(rate(rows) < 0.9)


def prepare() -> None:
    """One thread and no GPU, because the process forks; a folder of its own for what answers write."""
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg", "MINIMIND_STUDENT": ""}.items():
        os.environ[name] = value
    import torch

    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp(prefix="mutants_"))


if __name__ == "__main__":
    sys.exit(main())
