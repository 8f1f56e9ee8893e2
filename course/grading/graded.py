"""The notebook that is graded: a fresh master with the answers in it, and what its kernel needs to run it.

The cells keep their order. An answer stands in a cell that starts with `%%answer NAME`: it runs in a confined process (sandbox.py) and the
kernel gets stand-ins for what it defines. Checks and hidden tests run in the kernel, where no answer ever runs. `%%shared` cells run in both.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
import re
import secrets
import textwrap
from pathlib import Path

from course.grading.submission import Master, Submission, defined, needed_helpers, used

NBVAL = re.compile(r"(?m)^(\s*#+\s*)(NBVAL_|PYTEST_VALIDATE_)")  # a comment that would tell nbval to skip a cell


# --- making it ----------------------------------------


def build(master: Master, submission: Submission, hidden: dict[str, list[dict]], module: str, limits: dict, namespaces: bool = True) -> dict:
    """The notebook as plain JSON data, and with it the plan: which cells must run, and which must fail."""
    cells, plan = [], []
    roles = {e.answer: ("answer", e) for e in master.exercises.values()} | {e.check: ("check", e) for e in master.exercises.values()}
    shared = {n for i, c in enumerate(master.cells) if c["kind"] == "code" and i not in roles for n in defined(c["source"])}
    checks = checks_of(master.name)
    changing = {name for name, check in checks.items() if check.in_place}
    taken = {name: [n for n in check.needs if n not in shared] for name, check in checks.items()}  # also what other answers define
    facts = {e.name: {"names": [n for n in e.names if n not in shared], "in_place": e.name in changing, "taken": taken.get(e.name, []),
                      "check": master.cells[e.check]["source"]} for e in master.exercises.values()}  # fmt: skip
    known = shared | {n for source in submission.answers.values() for n in defined(source)}

    def add(source: str, role: str, exercise: str = "", **more) -> None:
        identity = f"{role}-{exercise}-{len(cells)}".replace("_", "-").strip("-")
        told = {"role": role, "exercise": exercise, **more}
        plan.append({"id": identity, **told})
        cells.append({"cell_type": "code", "id": identity, "metadata": {"grade": told}, "source": source, "outputs": [], "execution_count": None})

    begin = json.dumps({"workbook": master.name, "module": module, "exercises": facts, "limits": limits, "namespaces": namespaces})
    add(f"from course.grading.graded import begin\n\nbegin({begin!r})", "begin")
    canaries = set(random.SystemRandom().sample(sorted(master.exercises), min(2, len(master.exercises))))
    add(_plain_canary(), "canary")
    for index, cell in enumerate(master.cells):
        role, exercise = roles.get(index, ("", None))
        if cell["kind"] != "code":
            cells.append({"cell_type": "markdown", "id": f"text-{len(cells)}", "metadata": {}, "source": cell["source"]})
        elif role == "answer":
            source = submission.answers.get(exercise.name, exercise.stub)
            helpers = needed_helpers(source, known, submission.helpers)
            source = "".join(f"{text}\n" for text in dict.fromkeys(helpers.values())) + source
            add(f"%%answer {exercise.name}\n" + NBVAL.sub(r"\1NBVAL-", source), "answer", exercise.name)
        elif role == "check":
            tests = hidden.get(exercise.name, [])
            own = [t for t in tests if t["points"] is not None]
            points = exercise.points - sum(t["points"] for t in own)
            add(cell["source"], "check", exercise.name, points=points)
            for test in tests:
                add(test["source"], "hidden", exercise.name, points=test["points"] or 0, what=test["what"])
            if exercise.name in canaries:
                add(f"with canary({exercise.name!r}):\n" + textwrap.indent(cell["source"], "    "), "canary", exercise.name)
        elif cell["source"].strip():
            add(f"%%shared\n{cell['source']}", "shared")
    add(_plain_canary(), "canary")
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    return {"notebook": {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, "plan": plan}


def checks_module(workbook: str):
    """The module of the checks of a workbook, or None: a master of an instructor's own may bring its checks along."""
    try:
        return importlib.import_module("course.checks." + workbook.partition("_")[2])
    except ImportError:
        return None


def checks_of(workbook: str) -> dict:
    """The registered checks of a workbook, by exercise."""
    from course.checks import core

    return core.REGISTERED.get(getattr(checks_module(workbook), "__name__", ""), {})


def _plain_canary() -> str:
    """A test that must fail: two random numbers that differ."""
    number = secrets.randbelow(10**9)
    return f"import torch\n\nassert torch.equal(torch.tensor([{number}]), torch.tensor([{number + 1}])), 'this cell must fail'"


def hidden_in_source(home: Path, master: Master) -> dict[str, list[dict]]:
    """The hidden tests that the course's own source of a workbook has in its check cells; none in a copy without solutions."""
    from course import workbook

    path = home / "solutions" / "src" / f"{master.name}.py"
    if not path.is_file():
        return {}
    found = {}
    for exercise in workbook.read_workbook(path).exercises:
        for kind, _, lines, _ in workbook.parts(exercise.check.source):
            if kind == "HIDDEN TESTS" and exercise.name in master.exercises:
                found.setdefault(exercise.name, []).append({"source": textwrap.dedent("\n".join(lines)), "points": None, "what": ""})
    return found


def read_hidden(folder: Path | None, master: Master) -> dict[str, list[dict]]:
    """The instructor's hidden tests for a workbook: FOLDER/NAME.py, with a line `# %% EXERCISE` or `# %% EXERCISE points=1 what it tests`."""
    path = folder / f"{master.name}.py" if folder else None
    found: dict[str, list[dict]] = {}
    if not path or not path.is_file():
        return found
    pieces = re.split(r"(?m)^# %%[ \t]*(.*)$", path.read_text(encoding="utf-8"))
    for heading, source in zip(pieces[1::2], pieces[2::2]):
        name, _, rest = heading.strip().partition(" ")
        if name not in master.exercises:
            raise ValueError(f"{path.name}: `# %% {heading.strip()}` names no exercise of {master.name}; there are {', '.join(master.exercises)}")
        points = re.search(r"\bpoints=(\d+(?:\.\d+)?)", rest)
        what = re.sub(r"\bpoints=\S+", "", rest).strip()
        compile(source, f"{path.name}: {heading}", "exec")
        found.setdefault(name, []).append({"source": source.strip(), "points": float(points[1]) if points else None, "what": what})
    for name, tests in found.items():
        if sum(t["points"] or 0 for t in tests) > master.exercises[name].points:
            raise ValueError(f"{path.name}: the hidden tests of {name} have more points than the exercise ({master.exercises[name].points:g})")
    return found


# --- inside its kernel ----------------------------------------


class Answers:
    """What the magics of a graded notebook share: the sandboxes, the answers so far, and which exercises are right."""

    def __init__(self, shell, workbook: str, module: str, exercises: dict, limits: dict, namespaces: bool) -> None:
        from course.grading.confine import Limits
        from course.grading.sandbox import Server

        self.workbook = workbook
        self.shell, self.module, self.exercises, self.namespaces = shell, module, exercises, namespaces
        self.limits, self.server = Limits(**limits), Server.find()
        self.shared: list[str] = []
        self.sources: dict[str, str] = {}
        self.failed: set[str] = set()
        self.broken: set[str] = set()  # those that cannot even be defined: never run again
        self.boxes: list = []

    def share(self, line: str, source: str) -> None:
        """%%shared: a cell of the master that is no exercise runs here and before each answer."""
        self.shared.append(source)
        result = self.shell.run_cell(source)
        result.raise_error()

    def answer(self, line: str, source: str) -> None:
        """%%answer NAME: run an answer apart, and put stand-ins for what it defines into this notebook."""
        from course.grading.sandbox import AnswerFailed, NotDefined, Sandbox

        name = line.strip()
        names, space = self.exercises[name]["names"], self.shell.user_ns
        for each in names:
            space[each] = NotDefined(each)
        self.sources[name] = source
        self.failed.add(name)  # until its check passes
        others = [each for each in self.exercises[name].get("taken", []) if each not in names]  # a check uses them together: from one process
        before, give, own = self.needed(name, source, others)
        cells = [{"name": "workbook", "source": text, "answer": False, "names": []} for text in self.shared]
        cells += [{"name": other, "source": text, "answer": False, "names": [], "spare": list(give)} for other, text in before.items()]
        cells.append({"name": name, "source": source, "answer": True, "names": [*names, *others]})
        hide = {self.module: names} if self.module else {}
        box = Sandbox(self.server, cells, self.limits, hide=hide, namespaces=self.namespaces, in_place=self.exercises[name]["in_place"], give=give)
        self.boxes.append(box)
        self.broken.add(name)
        found = box.open()
        self.broken.discard(name)
        if type(found) is not dict:
            raise AnswerFailed("the answer sent no definitions")
        space.update({each: found[each] for each in [*names, *others] if each in found})
        for other in [*give, *own]:
            print(f"with the course's own {other}")

    def needed(self, name: str, source: str, others: list[str] = ()) -> tuple[dict[str, str], dict[str, str], list[str]]:
        """The answers that this one, or its check, builds on, by exercise; in the place of those that are not right stands what the course has.

        That is names of its package (the second value, with their modules), or, for what goes beyond it, its solution (the names are the third).
        """
        wanted, todo, give, own = {}, ["; ".join(others), source], {}, []
        mine = set(defined(source)).union(*(defined(text) for text in self.shared))  # an answer that redefines torch spoils only itself
        while todo:
            for each in used(todo.pop()):
                for other, text in self.sources.items():
                    if other == name or other in wanted or each not in {*defined(text), *self.exercises[other]["names"]} or each in mine:
                        continue
                    if other in self.failed and (names := self.of_the_course(other)):
                        give.update(names)
                        wanted[other] = ""
                        continue
                    if other in self.failed and (solved := self.solution(other)):
                        own += self.exercises[other]["names"]
                        text = solved
                    elif other in self.broken:
                        text = ""
                    wanted[other] = text
                    todo.append(text)
        return {other: wanted[other] for other in self.sources if wanted.get(other)}, give, own

    def solution(self, exercise: str) -> str:
        """The course's own answer to an exercise; nothing in a copy without solutions."""
        from course import workbook

        try:
            return workbook.load(self.workbook).solution(exercise)
        except (OSError, ValueError, KeyError, StopIteration, workbook.BuildError):
            return ""

    def of_the_course(self, exercise: str) -> dict[str, str]:
        """The names of an exercise that the course's own module has."""
        try:
            module = importlib.import_module(self.module)
        except (ImportError, ValueError):
            return {}
        return {n: self.module for n in self.exercises[exercise]["names"] if hasattr(module, n)}

    def after_cell(self, result) -> None:
        """A check that passes makes its answer the one that later answers build on."""
        if result.success:
            self.failed -= {name for name, told in self.exercises.items() if told["check"] == result.info.raw_cell}

    @contextlib.contextmanager
    def canary(self, exercise: str):
        """Put something wrong in the place of an answer: the check in this block must fail."""
        names, space = self.exercises[exercise]["names"], self.shell.user_ns
        before = {name: space.get(name) for name in names}
        number = random.SystemRandom().random() + 7

        def wrong(*args, **kwargs):
            return number

        try:
            space.update({name: wrong if callable(before[name]) else number for name in names})
            yield
        finally:
            space.update(before)


def begin(settings: str) -> None:
    """The first cell of a graded notebook."""
    from IPython import get_ipython

    shell = get_ipython()
    answers = Answers(shell, **json.loads(settings))
    shell.register_magic_function(answers.answer, "cell", "answer")
    shell.register_magic_function(answers.share, "cell", "shared")
    shell.events.register("post_run_cell", answers.after_cell)
    shell.user_ns["canary"] = answers.canary
