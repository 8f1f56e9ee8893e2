"""Workbooks: solved ones pass, stubs fail, nothing leaks, wrong answers are told what is wrong, and what is kept works."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
import yaml
from helpers_workbooks import NAMES, ROOT, book, changed, checks_of, run_cell, run_cells

from course import build, desk, keep, student, workbook
from course.checks import core
from course.source import BuildError

ANSWERS = {name: yaml.safe_load((ROOT / "tests" / "wrong_answers" / f"{name}.yaml").read_text()) for name in NAMES}
WRONG = [(name, exercise, number) for name in NAMES for exercise, given in ANSWERS[name].items() for number in range(len(given["wrong"]))]
RIGHT = [(name, exercise, number) for name in NAMES for exercise, given in ANSWERS[name].items() for number in range(len(given["right"]))]
EXERCISES = [(name, exercise.name) for name in NAMES for exercise in book(name).exercises]


def run(name: str, exercise: str, namespace: dict) -> str | None:
    return core.run(checks_of(name), exercise, namespace)


# -- solved, and not


@pytest.mark.parametrize("name", NAMES)
def test_the_solved_workbook_passes_all_checks(name):
    namespace = run_cells(book(name).solved())
    for exercise in book(name).exercises:
        run(name, exercise.name, namespace)
        check = exercise.check.source
        run_cell("check = lambda name: None\n" + check, namespace)  # the hidden tests


@pytest.mark.parametrize("name, exercise", EXERCISES)
def test_a_stub_fails_and_is_told_kindly(name, exercise):
    """The stub of one exercise among the solutions of the others."""
    namespace = run_cells(book(name).solved())
    stub = next(cell for cell in book(name).stubs().cells if cell.extra.get("exercise") == exercise and cell.kind == "code")
    has_own_text = "### BEGIN STUB" in book(name).find(exercise).answer.source
    run_cell(stub.source, namespace)
    with pytest.raises(core.CheckFailed if has_own_text else core.NotWritten) as caught:
        run(name, exercise, namespace)
    if not has_own_text:
        assert "not written yet" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_size_and_shape_of_a_workbook(name):
    exercises = book(name).exercises
    assert 6 <= len(exercises) <= 10
    assert {exercise.kind for exercise in exercises} == {"rebuild", "beyond"}
    for exercise in exercises:
        assert "<details>" in exercise.text.source, f"{exercise.name} has no hint"


@pytest.mark.parametrize("name", [name for name in NAMES if (ROOT / "chapters" / "src" / f"{name}.py").exists()])
def test_the_chapter_points_to_each_exercise(name):
    """Once, with the number, minutes and stars of the workbook."""
    text = (ROOT / "chapters" / "src" / f"{name}.py").read_text(encoding="utf-8")
    found = re.findall(r"^# \*\*Exercise (\d+)\.(\d+) \((\d+) min, (★+)\): `(\w+)`\*\* in \[workbook (\d+)\]\((\S+)\)\.", text, re.MULTILINE)
    chapter = str(int(name[:2]))
    expected = [(chapter, str(number), str(e.minutes), "★" * e.difficulty, e.name, chapter, f"../exercises/{name}.ipynb")
                for number, e in enumerate(book(name).exercises, 1)]  # fmt: skip
    assert sorted(found) == sorted(expected)
    assert len(re.findall(r"^# \*\*Exercise \d", text, re.MULTILINE)) == len(found), "an exercise in the chapter that no workbook has"


def test_an_exercise_that_is_missing_below_is_named():
    namespace = run_cells(book("04_attention").solved())
    run_cell("def attention_weights(*a, **k):\n    raise NotImplementedError('attention_weights')", namespace)
    with pytest.raises(core.NotWritten, match="calls attention_weights, which is not written yet"):
        run("04_attention", "attention", namespace)
    run_cell("def repeat_kv(x, repeats):\n    return x.repeat(1, repeats, 1, 1)", namespace)
    run_cell(book("04_attention").solution("attention_weights"), namespace)
    with pytest.raises(core.CheckFailed, match="begin with repeat_kv"):
        run("04_attention", "attention", namespace)


# -- wrong answers, and honest ones in another style


@pytest.mark.parametrize("name, exercise, number", WRONG, ids=lambda value: str(value))
def test_a_wrong_answer_is_rejected_by_its_message(name, exercise, number):
    given = ANSWERS[name][exercise]["wrong"][number]
    code = given.get("code") or changed(book(name).solution(exercise), given["change"])
    namespace = run_cells(book(name).solved())
    run_cell(code, namespace)
    with pytest.raises(core.CheckFailed) as caught:
        run(name, exercise, namespace)
    assert given["says"] in str(caught.value)


@pytest.mark.parametrize("name, exercise, number", RIGHT, ids=lambda value: str(value))
def test_an_honest_answer_in_another_style_passes(name, exercise, number):
    namespace = run_cells(book(name).solved())
    run_cell(ANSWERS[name][exercise]["right"][number], namespace)
    run(name, exercise, namespace)


@pytest.mark.parametrize("name, exercise", EXERCISES)
def test_there_are_enough_wrong_answers(name, exercise):
    assert len(ANSWERS[name][exercise]["wrong"]) >= 4 and ANSWERS[name][exercise]["right"]


# -- what a failure looks like


def test_a_failure_shows_given_expected_and_got():
    namespace = run_cells(book("04_attention").solved())
    run_cell("def repeat_kv(x, repeats):\n    return x.repeat(1, repeats, 1, 1)", namespace)
    with pytest.raises(core.CheckFailed) as caught:
        run("04_attention", "repeat_kv", namespace)
    told = str(caught.value).splitlines()
    assert told[0].startswith("repeat_kv: the heads come in the order 0, 1, 0, 1")
    assert told[1:] == ["  given:    two heads, holding 10 and 20, repeats = 2", "  expected: [10.0, 10.0, 20.0, 20.0]",
                        "  got:      [10.0, 20.0, 10.0, 20.0]"]  # fmt: skip
    assert caught.value._render_traceback_() == told and caught.value.__suppress_context__


def test_an_exception_is_shown_with_the_line_of_the_reader():
    namespace = run_cells(book("04_attention").solved())
    run_cell("def helper(x):\n    return x @ x\n\ndef repeat_kv(x, repeats):\n    return helper(x[0, 0, 0])[99]", namespace)
    with pytest.raises(core.CheckFailed) as caught:
        run("04_attention", "repeat_kv", namespace)
    assert "your code stopped with IndexError" in str(caught.value) and "line 5 of your cell: return helper(x[0, 0, 0])[99]" in str(caught.value)
    run_cell("def repeat_kv(x):\n    return x", namespace)
    with pytest.raises(core.CheckFailed, match="the check could not use it: TypeError") as caught:
        run("04_attention", "repeat_kv", namespace)
    assert "y = repeat_kv(x, 2)" in str(caught.value)


def test_a_check_leaves_the_random_numbers_of_the_notebook_alone():
    import torch

    namespace = run_cells(book("04_attention").solved())
    state = torch.random.get_rng_state()
    run("04_attention", "attention", namespace)
    assert torch.equal(state, torch.random.get_rng_state())


# -- nothing leaks


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_solution_stands_in_the_exercise_notebook(name):
    notebook = json.loads((ROOT / "exercises" / f"{name}.ipynb").read_text())
    everything = workbook.even("\n".join(workbook.strings(notebook)))
    secrets = {line for line, _, _ in workbook.secret_lines(book(name))}
    assert len(secrets) > 20
    assert not [line for line in secrets if line in everything]
    assert not [word for word in ("BEGIN SOLUTION", "END SOLUTION", "HIDDEN", "BEGIN STUB") if word in everything]
    assert not re.search(r"\bhidden_(?!size\b)", everything)  # the names of hidden tests, and not a model's hidden_size
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]]
    solved = workbook.even((ROOT / "solutions" / f"{name}.ipynb").read_text().replace("\\n", " ").replace('\\"', '"'))
    assert sum(line in solved for line in secrets) > 20  # the search would find them


@pytest.mark.parametrize("name", NAMES)
def test_the_checks_do_not_give_the_solutions_away(name):
    text = workbook.even((ROOT / "course" / "checks" / f"{name.partition('_')[2]}.py").read_text())
    assert not [line for line, _, _ in workbook.secret_lines(book(name)) if len(line) > 30 and line in text]


@pytest.mark.parametrize("name", NAMES)
def test_both_notebooks_are_valid_and_know_their_exercises(name):
    for folder, setup in (("exercises", "globals())"), ("solutions", "globals(), solved=True)")):
        notebook = nbformat.read(ROOT / folder / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        cells = {cell.id: cell for cell in notebook.cells}
        assert setup in cells["setup"].source
        for exercise in book(name).exercises:
            answer, check, text = (cells[cell.id] for cell in (exercise.answer, exercise.check, exercise.text))
            assert answer.source.startswith(f"# exercise: {exercise.name} (keep this line)\n")
            assert answer.metadata.exercise.points == exercise.points and answer.metadata.nbgrader.solution
            assert check.metadata.nbgrader.points == exercise.points and check.metadata.nbgrader.grade
            assert exercise.facts in text.source


# -- the source


SOURCE = '''\
# %% [markdown]
# # Workbook 1. Alpha

# %% id="setup"
# (filled in by the build)

# %% [markdown] exercise="double"
# ## 1. Double

# %% id="w01-double" exercise="double" points=2 minutes=5 difficulty=1 kind="rebuild"
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    return x + x + 0 * x
    ### END SOLUTION

# %% id="w01-double-check"
check("double")
### BEGIN HIDDEN TESTS
assert double(21) == 42, "hidden"
### END HIDDEN TESTS

# %% [markdown] exercise="predict"
# ## 2. Predict

# %% id="w01-predict" exercise="predict" points=1 minutes=5 difficulty=3 kind="beyond"
### BEGIN SOLUTION
guess = 40 + 2
### END SOLUTION

# %% id="w01-predict-check"
check("predict")
'''
CHECKS = 'from course.checks.core import exercise\n\n\n@exercise("double")\ndef a(double): ...\n\n\n@exercise("predict")\ndef b(guess): ...\n'
CHAPTER = '# %% [markdown]\n# # 1. Alpha\n\n# %% id="parameters" tags=["parameters"]\nprofile = "cpu"\n\n# %% id="setup"\n# (filled in)\n'


@pytest.fixture
def small(tmp_path) -> Path:
    """A course of one chapter with its workbook."""
    files = {"chapters/src/01_alpha.py": CHAPTER, "solutions/src/01_alpha.py": SOURCE, "course/checks/alpha.py": CHECKS}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for folder in ("chapters", "solutions"):
        shutil.copy(ROOT / folder / "src" / "ruff.toml", tmp_path / folder / "src")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def edit(home: Path, old: str, new: str, name: str = "solutions/src/01_alpha.py") -> None:
    text = (home / name).read_text()
    assert old in text
    (home / name).write_text(text.replace(old, new, 1))


def cells_of(path: Path) -> dict[str, str]:
    return {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]}


def test_stubs_and_solutions_are_made(small):
    build.save(build.build(small))
    assert build.save(build.build(small)) == []
    stub, solved = (cells_of(small / folder / "01_alpha.ipynb") for folder in ("exercises", "solutions"))
    marker = "# exercise: double (keep this line)\n"
    assert stub["w01-double"] == marker + 'def double(x):\n    """Twice x."""\n    raise NotImplementedError("double")'
    assert stub["w01-predict"].endswith("guess = ...  # your answer") and stub["w01-double-check"] == 'check("double")'
    assert "    ### BEGIN SOLUTION\n    return x + x + 0 * x\n    ### END SOLUTION" in solved["w01-double"]
    assert "assert double(21) == 42" in solved["w01-double-check"]
    text = next(source for source in stub.values() if source.startswith("## 1. Double"))
    assert text.splitlines()[2] == '*2 points · 5 minutes · ★☆☆ · checked by* `check("double")`'
    assert workbook.load("01_alpha", small).solution("double") == 'def double(x):\n    """Twice x."""\n    return x + x + 0 * x'


def test_a_stub_may_have_a_text_of_its_own(small):
    edit(small, "    ### END SOLUTION\n", "    ### END SOLUTION\n    ### BEGIN STUB\n    # y = x  # a bug\n    #\n    # return y\n    ### END STUB\n")
    build.save(build.build(small))
    assert cells_of(small / "exercises" / "01_alpha.ipynb")["w01-double"].endswith('"""Twice x."""\n    y = x  # a bug\n\n    return y')
    assert "y = x" not in cells_of(small / "solutions" / "01_alpha.ipynb")["w01-double"]


MISTAKES = {
    "no points": (" points=2", "", ":10: exercise double has no points"),
    "points in words": ("points=2", 'points="two"', ":10: points='two': expected a whole number"),
    "difficulty four": ("difficulty=1", "difficulty=4", ":10: difficulty=4: expected a whole number, 1 to 3"),
    "no kind": (' kind="rebuild"', "", ":10: exercise double: kind=None, expected rebuild or beyond"),
    "no check": ('check("double")\n### BEGIN HIDDEN TESTS\nassert double(21) == 42, "hidden"\n### END HIDDEN TESTS\n', "pass\n",
                 ":10: exercise double has no check after it"),
    "a check without an exercise": ('check("double")', 'check("double")\ncheck("triple")', ":17: a check without an exercise: triple"),
    "no text": ('# %% [markdown] exercise="double"', "# %% [markdown]", ":10: exercise double has no text before it"),
    "two checks": ('check("double")', 'check("double")\ncheck("double")', ":17: a second check for exercise double"),
    "two answers": ('exercise="predict" points', 'exercise="double" points', ":26: a second answer cell for exercise double"),
    "no solution": ("    ### BEGIN SOLUTION\n    return x + x + 0 * x\n    ### END SOLUTION", "    return x", ":10: an exercise without ### BEGIN"),
    "no end": ("    ### END SOLUTION\n", "", ":13: ### BEGIN SOLUTION has no ### END SOLUTION"),
    "wrong end": ("### END SOLUTION", "### END HIDDEN TESTS", ":15: '### END HIDDEN TESTS' where ### END SOLUTION was expected"),
    "misspelled mark": ("### BEGIN SOLUTION", "## BEGIN SOLUTION", ":13: '## BEGIN SOLUTION' is not a mark"),
    "a solution elsewhere":
        (' exercise="double" points=2 minutes=5 difficulty=1 kind="rebuild"', "", ":10: a solution in a cell that is no exercise"),
    "a leak": ("# ## 1. Double", "# ## 1. Double\n#\n# Write `return x + x +  0 * x`.", ":16: this line of the solution also stands in"),
    "an unknown attribute": ("points=2", "point=2", ":10: unknown cell metadata point"),
    "duplicate id": ('id="w01-predict"', 'id="w01-double"', ':26: duplicate cell id="w01-double", first used at solutions/src/01_alpha.py:10'),
    "an id of the book": ('id="w01-predict"', 'id="alpha-try"', ':26: duplicate cell id="alpha-try", first used at chapters/src/01_alpha.py:10'),
    "not Python as a stub": ("guess = 40 + 2", "print(42)", ":28: a solution at the left margin may only assign names"),
    "an export": ('check("predict")', '#| export\ncheck("predict")', ":31: a workbook exports nothing"),
    "style": ("    return x + x + 0 * x", "    import os\n    return x + x + 0 * x", ":14: F401"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_source_are_told_with_file_and_line(small, name):
    old, new, expected = MISTAKES[name]
    edit(small, "# (filled in)\n", '# (filled in)\n\n# %% id="alpha-try"\nprint(1)\n', "chapters/src/01_alpha.py")
    edit(small, old, new)
    with pytest.raises(BuildError) as caught:
        build.build(small)
    assert f"solutions/src/01_alpha.py{expected}" in str(caught.value)


def test_checks_and_exercises_must_fit(small):
    edit(small, '"double"', '"triple"', "course/checks/alpha.py")
    with pytest.raises(BuildError, match="01_alpha.py:10: course/checks knows no check for exercise double"):
        build.build(small)
    edit(small, '"triple"', '"double"', "course/checks/alpha.py")
    (small / "course/checks/alpha.py").write_text(CHECKS + '\n\n@exercise("more")\ndef c(more): ...\n')
    with pytest.raises(BuildError, match=r"course/checks/alpha.py:12: a check without an exercise in solutions/src/01_alpha.py: more"):
        build.build(small)


def test_stale_workbooks_are_found(small):
    build.save(build.build(small))
    assert build.stale(small, build.build(small)) == []
    edit(small, "Twice x.", "Two x.")
    stale = build.stale(small, build.build(small))
    assert [line.split(" is stale")[0] for line in stale] == [
        f"solutions/src/01_alpha.py:10: {folder}/01_alpha.ipynb" for folder in ("exercises", "solutions")
    ]
    (small / "exercises" / "09_old.ipynb").write_text("{}")
    assert build.stale(small, build.build(small))[0].startswith("exercises/09_old.ipynb:1: no source")


def test_a_build_puts_the_answers_of_a_reader_aside(small, monkeypatch):
    monkeypatch.setattr(build, "ROOT", small)
    made = build.build(small)
    assert build.keep_answers(made) == []
    build.save(made)
    path = small / "exercises" / "01_alpha.ipynb"
    edit(small, "# # Workbook 1.", "# # Workbook One.")  # an untouched workbook is replaced
    assert build.keep_answers(build.build(small)) == []
    names = ["01_alpha.mine.ipynb", "01_alpha.mine-2.ipynb"]
    for old, new in (('"execution_count": null', '"execution_count": 3'), ("raise NotImplementedError", "return 2 * x  # ")):
        mine = made.files[path].decode().replace(old, new)
        path.write_text(mine)
        kept = build.keep_answers(build.build(small))
        assert [file.name for file in kept] == [names.pop(0)] and kept[0].read_text() == mine
    assert build.orphans(small, build.build(small)) == []


# -- solutions one at a time


def solution(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "course", "solution", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip


def test_one_solution_is_shown_and_no_other(capsys):
    done = solution("4", "repeat_kv")
    assert done.returncode == 0 and done.stdout.strip() == book("04_attention").solution("repeat_kv")
    others = [line for line, cell, _ in workbook.secret_lines(book("04_attention")) if cell.extra.get("exercise") != "repeat_kv"]
    assert not [line for line in others if line in workbook.even(done.stdout)]
    desk.Desk("04_attention", {}).solution("repeat_kv")
    assert capsys.readouterr().out == done.stdout
    assert "there are causal_mask, repeat_kv" in solution("4", "repeat").stderr
    assert "repeat_kv" in solution("4").stdout


def test_a_copy_without_solutions_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIMIND_HOME", str(tmp_path))
    desk.Desk("04_attention", {}).solution("repeat_kv")
    assert "no solutions for 04_attention" in capsys.readouterr().out


# -- keep


@pytest.fixture
def mine() -> desk.Desk:
    """The workbook of chapter 4, solved by a reader."""
    return _desk("04_attention")


def _desk(name: str) -> desk.Desk:
    return desk.Desk(name, run_cells(book(name).solved()))


def with_student(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MINIMIND_STUDENT": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_imports_alone_and_passes(name, tmp_path, capsys):
    desk = _desk(name)
    desk.keep(tmp_path)
    path = tmp_path / f"{desk.module}.py"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    names = [kept for check in desk.checks.values() for kept in check.keeps]
    assert student.saved_names(path) == names and f"saved {', '.join(names)}" in capsys.readouterr().out
    program = "import sys, runpy; space = runpy.run_path(sys.argv[1]); print(space['__all__'])"
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == str(names), done.stderr


def test_what_does_not_pass_is_taken_from_the_course(mine, tmp_path, capsys):
    run_cell("def attention_weights(q, k):\n    return q @ k.mT", mine.namespace)
    run_cell("HALF = 0.5\n\ndef root(x):\n    return x**HALF", mine.namespace)
    run_cell(changed(mine_solution("grouped_attention"), {"math.sqrt(D)": "root(D)"}), mine.namespace)
    mine.keep(tmp_path)
    told, text = capsys.readouterr().out, (tmp_path / "attention.py").read_text()
    assert "attention_weights: not saved, the course's own is used" in told
    assert "from minimind.attention import Projections, attention_weights  # the course's own" in text
    assert "HALF = 0.5" in text and "def root(x):" in text and "def attention_weights" not in text


def mine_solution(exercise: str) -> str:
    return book("04_attention").solution(exercise)


def test_a_fuller_file_is_not_replaced_by_a_smaller_one(mine, tmp_path):
    mine.keep(tmp_path)
    before = (tmp_path / "attention.py").read_text()
    run_cell("def causal_mask(*a, **k):\n    raise NotImplementedError('causal_mask')", mine.namespace)
    run_cell("def attention(*a, **k):\n    raise NotImplementedError('attention')", mine.namespace)
    with pytest.raises(keep.KeepError, match="it has Attention, attention, attention_weights, causal_mask, which"):
        mine.keep(tmp_path)
    assert (tmp_path / "attention.py").read_text() == before and len(list(tmp_path.iterdir())) == 1
    mine.keep(tmp_path, replace=True)
    assert "def causal_mask" not in (tmp_path / "attention.py").read_text()


def test_what_cannot_be_saved_is_named(mine, tmp_path):
    run_cell("TABLE = torch.ones(512, 512, dtype=torch.bool).tril()", mine.namespace)
    run_cell(changed(mine_solution("causal_mask"), {"return torch": "TABLE.sum()\n    return torch"}), mine.namespace)
    with pytest.raises(keep.KeepError, match="causal_mask uses TABLE, a Tensor of this notebook"):
        mine.keep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_on_colab_what_is_kept_outlives_the_machine(mine, tmp_path, monkeypatch, capsys):
    downloads = []
    colab = types.SimpleNamespace(files=types.SimpleNamespace(download=downloads.append))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(keep, "DRIVE", tmp_path / "drive")
    mine.keep(tmp_path / "student")
    assert downloads == [str(tmp_path / "student" / "attention.py")] and "downloads it too" in capsys.readouterr().out
    (tmp_path / "drive").mkdir()
    mine.keep(tmp_path / "student")
    folder = tmp_path / "drive" / "minimind" / "student"
    assert len(downloads) == 1 and f"MINIMIND_STUDENT={folder}" in capsys.readouterr().out
    assert [file.name for file in folder.iterdir()] == ["attention.py"]
    assert (folder / "attention.py").read_text() == (tmp_path / "student" / "attention.py").read_text()


def test_nothing_is_saved_from_the_solved_workbook(capsys):
    solved = desk.Desk("04_attention", run_cells(book("04_attention").solved()), solved=True)
    solved.keep()
    assert "nothing is saved" in capsys.readouterr().out


# -- the reader's modules in the package


TWO_STEPS = """
import sys, torch, minimind, minimind.attention as a
from minimind.model import MiniMind, ModelConfig
torch.manual_seed(0)
config = ModelConfig.preset("tiny")
model = MiniMind(config)
ids = torch.randint(config.vocab_size, (2, 17))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(2):
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward(); optimizer.step(); optimizer.zero_grad()
print(a.Attention.__module__, a.repeat_kv.__module__, a.matrices_are_faster.__module__, f"{loss.item():.5f}", *minimind.student_modules())
"""


def test_a_model_trains_on_the_modules_of_the_reader(mine, tmp_path, monkeypatch):
    run_cell("def repeat_kv(x, repeats):\n    return x.repeat(1, repeats, 1, 1)", mine.namespace)  # wrong: the course's own is used
    mine.keep(tmp_path)
    own = with_student(tmp_path, TWO_STEPS)
    plain = subprocess.run([sys.executable, "-c", TWO_STEPS], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT), "MINIMIND_STUDENT": "", "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert own.stdout.split()[:3] == ["minimind_student_attention", "minimind.attention", "minimind.attention"], own.stderr
    assert own.stdout.split()[4:] == ["attention"] and plain.stdout.split()[4:] == []
    assert own.stdout.split()[3] == plain.stdout.split()[3], "the reader's attention is the same function"


def test_mistakes_with_student_modules_are_told(tmp_path):
    missing = with_student(tmp_path / "none", "import minimind")
    assert "there is no folder" in missing.stderr and "keep()" in missing.stderr
    (tmp_path / "attention.py").write_text("import nothing_of_this_name\n__all__ = []\n")
    broken = with_student(tmp_path, "import minimind.metrics; print('fine'); import minimind.attention")
    assert broken.stdout == "fine\n" and "your own attention.py cannot be used: ModuleNotFoundError" in broken.stderr


def test_a_run_says_which_modules_are_the_readers(mine, tmp_path):
    from helpers_course import course_run, fake_course

    home = fake_course(tmp_path / "course")
    mine.keep(home / "student")
    done = course_run(home, "--profile", "cpu", "--only", "1", MINIMIND_STUDENT="student")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "your own: minimind.attention (causal_mask, repeat_kv, attention_weights, attention, grouped_attention, Attention)" in done.stdout
    without = course_run(home, "--profile", "cpu", "--only", "1", MINIMIND_STUDENT="")
    assert "your own" not in without.stdout
    assert course_run(home, "--profile", "cpu", MINIMIND_STUDENT="nowhere").returncode == 2


def test_the_other_layout_passes_and_is_not_kept(tmp_path, capsys):
    reader = _desk("05_rope")
    run_cell(ANSWERS["05_rope"]["apply_rope"]["right"][0], reader.namespace)
    reader.check("apply_rope")
    reader.check("scores_of_new")
    assert "right; it pairs neighbours" in capsys.readouterr().out
    reader.keep(tmp_path)
    assert "apply_rope: not saved" in capsys.readouterr().out and "apply_rope" not in student.saved_names(tmp_path / "rope.py")
