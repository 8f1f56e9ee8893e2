"""Small changes to the solutions are noticed by the checks; what is not is listed with a reason."""

import ast
import json
import os
import subprocess
import sys

import pytest
from helpers_workbooks import NAMES, ROOT, book

from course import mutants

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forks of a process, which this system has not")
ENOUGH = 0.9
SAMPLE = 6  # of each exercise; `python -m course.mutants` judges all of them

BLIND = """
import sys
from course import mutants
mutants.prepare()
bench = mutants.Bench(sys.argv[1])
for check in bench.checks.values():
    check.function = eval(f"lambda {', '.join(check.needs)}: None")
print(mutants.rate(bench.judged(bench.made(3))))
"""


def started(*command: str) -> subprocess.Popen:
    """Away from pytest's own process, which has threads and may not fork."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_nine_in_ten_mutants_are_rejected():
    halves = [NAMES[start::2] for start in (0, 1) if NAMES[start::2]]
    running = [started("-m", "course.mutants", *names, "--sample", str(SAMPLE), "--json") for names in halves]
    rows = []
    for process in running:
        told, problems = process.communicate()
        assert told, problems
        rows += [mutants.Mutant(**{key: value for key, value in row.items() if key != "workbook"}) for row in json.loads(told)]
    assert {(row.exercise) for row in rows} == {exercise.name for name in NAMES for exercise in book(name).exercises}
    gaps = [f"{row.exercise}: {row.before}  ->  {row.after}" for row in rows if row.outcome == "survived" and not row.why]
    assert mutants.rate(rows) >= ENOUGH, "\n".join(gaps)


def test_a_blind_check_is_found():
    told, problems = started("-c", BLIND, "04_attention").communicate()
    assert float(told) < 0.5 < ENOUGH, problems  # what is left are mutants that cannot even be run


@pytest.mark.parametrize("name", mutants.equivalents())
def test_what_is_listed_as_equivalent_is_a_mutant_and_has_a_reason(name):
    for exercise, listed in mutants.equivalents()[name].items():
        source, lines = mutants.solved_lines(book(name).find(exercise).answer.source)
        made = {mutants.line_shown(mutant) for mutant in mutants.mutants(exercise, source, lines)}
        assert not [line for line in listed if line not in made], f"{name} {exercise}: no mutant has this line any more"
        assert all(len(why) > 10 for why in listed.values())


SOURCE = '''\
def share(values, limit=3):
    """The share of values below 3."""
    below = [v for v in values if v < limit and v is not None]
    if not values:
        raise ValueError("no values: 1 is needed")
    return len(below) / len(values[1:])
'''


def test_what_a_mutant_is():
    made = mutants.mutants("share", SOURCE, set(range(3, 7)))
    lines = {mutant.after for mutant in made}
    assert {"return len(below) * len(values[1:])", "return len(values[1:]) / len(below)", "return len(below)", "return len(below) / len(values[0:])",
            "below = [v for v in values if v <= limit and v is not None]", "below = [v for v in values if v >= limit and v is not None]",
            "below = [v for v in values if v < limit or v is not None]", "below = [v for v in values if v < limit]",
            "below = [v for v in values]", "if values:", "pass"} <= lines  # fmt: skip
    assert len(made) == len({mutant.source for mutant in made}) and all(mutant.source != ast.unparse(ast.parse(SOURCE)) for mutant in made)
    assert all("limit=3" in mutant.source and "1 is needed" in mutant.source or mutant.after == "pass" for mutant in made)
    assert all(mutants.line_shown(mutant).startswith("drop: ") for mutant in made if mutant.after == "pass")


def test_only_lines_of_the_solution_are_changed():
    source, lines = mutants.solved_lines(book("04_attention").find("multi_head").answer.source)
    kept = [line for number, line in enumerate(source.splitlines(), 1) if number not in lines]
    assert len(lines) == 2 and any("triu(1)" in line for line in kept)
    assert all("triu(1)" in mutant.source for mutant in mutants.mutants("multi_head", source, lines))


NEVER_ENDS = """
import sys
from course import mutants
mutants.prepare()
bench = mutants.Bench("04_attention")
right = bench.made(1)[:1]
loops = mutants.Mutant("causal_mask", "x", "y", "def causal_mask(*a, **k):\\n    while True: pass")
waits = mutants.Mutant("causal_mask", "x", "z", "import time\\ndef causal_mask(*a, **k):\\n    time.sleep(60)")
print([mutant.outcome for mutant in bench.judged([*right, loops, waits], jobs=2, limit=0.5)])
"""


def test_a_mutant_that_never_ends_is_rejected():
    told, problems = started("-c", NEVER_ENDS).communicate(timeout=120)
    assert told.strip() == "['rejected', 'rejected']", problems


def test_what_a_later_statement_needs_is_kept():
    body = ast.parse("seed = 6\nlost = 3\ndraws = range(seed)\nlimit = 2\ndef share(x):\n    return x / limit").body
    assert [ast.unparse(node).splitlines()[0] for node in mutants.wanted(body, {"draws"})] == [
        "seed = 6", "draws = range(seed)", "limit = 2", "def share(x):"]  # fmt: skip
