"""The grader on a small workbook: exact points, honest submissions in unusual forms, attacks, and everything that can go wrong around them."""

import csv
import importlib.util
import itertools
import json
import random
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from helpers_course import ROOT, environment

from course.grading import grade, graded, nbval_points
from course.grading.confine import Limits
from course.grading.submission import Master, SubmissionError, read_cells, read_submission, student_name
from tests import make_class
from tests import toy_workbook as toy

HERE = Path(__file__).parent
ATTACKS = sorted((HERE / "attacks").glob("*.py"))
HONEST = sorted((HERE / "honest").glob("*.py"))
QUICK = Limits(cpu_seconds=3, wall_seconds=6, memory_bytes=2**30)
INDEPENDENT = {**toy.SOLUTIONS, "total": "def total(x, n):\n    return n * x.sum(0)"}


def honest(path: Path) -> bytes:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.submission(toy)
    return made if isinstance(made, bytes) else json.dumps(made).encode()


def attacked(path: Path) -> str:
    """The exercise that an attack is an answer to."""
    return path.read_text().splitlines()[0].removeprefix("# exercise: ")


def run(folder: Path, submissions: dict[str, bytes], *options: str, hidden: str = "") -> dict[str, dict]:
    """Grade these submissions with `python -m course grade`; the results by name."""
    toy.write_master(folder / "master")
    for name, data in submissions.items():
        (folder / "in" / name).mkdir(parents=True, exist_ok=True)
        (folder / "in" / name / "90_toy.ipynb").write_bytes(data)
    if hidden:
        (folder / "hidden").mkdir(exist_ok=True)
        (folder / "hidden" / "90_toy.py").write_text(hidden)
        options += ("--hidden", str(folder / "hidden"))
    where = ("--master", str(folder / "master"), "--out", str(folder / "out"))
    command = [sys.executable, "-m", "course", "grade", str(folder / "in"), *where, *options]
    done = subprocess.run(command, env=environment(ROOT), cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return {result["folder"]: result for result in json.loads((folder / "out" / "grades.json").read_text())} | {"said": done.stdout}


def notebook(answers: dict[str, str]) -> bytes:
    return json.dumps(toy.filled(answers)).encode()


@pytest.fixture(scope="session")
def graded_class(tmp_path_factory) -> dict[str, dict]:
    """All attacks and all honest submissions, graded together as one class."""
    submissions = {path.stem: honest(path) for path in HONEST}
    submissions |= {path.stem: notebook({**INDEPENDENT, attacked(path): path.read_text()}) for path in ATTACKS}
    assert len(submissions) == len(ATTACKS) + len(HONEST)
    return run(tmp_path_factory.mktemp("class"), submissions, "--jobs", "2", "--seconds", "8", "--memory", "1")


@pytest.mark.parametrize("path", HONEST, ids=lambda path: path.stem)
def test_honest_submissions_get_all_points(path: Path, graded_class) -> None:
    """However unusual its form, an answer that is right gets its points."""
    result = graded_class[path.stem]
    assert not result["error"]
    assert {name: told["reason"] for name, told in result["exercises"].items() if told["points"] != told["of"]} == {}
    assert result["points"] == toy.FULL


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_attacks_get_nothing_and_cost_only_their_own_exercise(path: Path, graded_class) -> None:
    """A wrong answer that attacks the grader gets no points; the other answers of the same notebook get all of theirs."""
    result, name = graded_class[path.stem], attacked(path)
    assert not result["error"]
    assert result["exercises"][name]["points"] == 0
    assert result["exercises"][name]["reason"]
    assert {other for other, told in result["exercises"].items() if told["points"] != told["of"]} == {name}
    assert not Path("/tmp/owned").exists()


def test_points_are_exact(tmp_path: Path) -> None:
    """Solved, empty and every half-solved notebook (all subsets of three exercises) get exactly what their right exercises are worth."""
    some = [subset for count in range(4) for subset in itertools.combinations(("total", "steps", "Scale"), count)]
    cases = {"solved": tuple(toy.SOLUTIONS), **{f"only {' '.join(subset)}".strip(): subset for subset in some}}
    submissions = {case: notebook({name: INDEPENDENT[name] for name in subset}) for case, subset in cases.items()}
    found = run(tmp_path, submissions, "--jobs", "2")
    for case, subset in cases.items():
        assert found[case]["points"] == sum(toy.POINTS[name] for name in subset), case
        assert all(told["reason"] for name, told in found[case]["exercises"].items() if name not in subset)


def test_the_workbooks_themselves(tmp_path: Path) -> None:
    """Solved workbooks get all points, empty ones none, half-solved ones what is right in them; a wrong answer costs later ones nothing."""
    expected, rng = {}, random.Random(4)
    for path in sorted((ROOT / "exercises").glob("*.ipynb")):
        book, solved = make_class.Workbook(path.stem), json.loads((ROOT / "solutions" / path.name).read_text())
        first, *others = book.solved
        chosen = {*book.subset(rng), others[-1]} - {first}  # the last one in any case, and never all
        half = {name: book.solved[name] for name in book.solved if name in chosen}
        ending = {**book.solved, first: "import os\nos._exit(0)"}
        cases = {"solved": (solved, list(book.points)), "empty": (book.empty, []), "first wrong": (book.filled(ending), others),
                 "half": (book.filled(half), list(half))}  # fmt: skip
        for case, (made, right) in cases.items():
            toy.write(tmp_path / "in" / case / path.name, made)
            expected[case, path.stem] = {name: book.points[name] if name in right else 0 for name in book.points}
    command = [sys.executable, "-m", "course", "grade", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    done = subprocess.run(command, env=environment(ROOT), cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "grades.json").read_text())
    found = {(r["folder"], r["workbook"]): {name: told["points"] for name, told in r["exercises"].items()} for r in results}
    assert found == expected


@pytest.mark.skipif(not (ROOT / "exercises" / "04_attention.ipynb").exists(), reason="workbook 4 is not here")
def test_a_class_as_it_comes(tmp_path: Path) -> None:
    """File names of class downloads, Colab's notebooks, attacks and broken files; killed in the middle, and gone on with."""
    expected = make_class.make(tmp_path / "in", students=10)
    assert {told["kind"] for told in expected.values()} == set(make_class.KINDS)
    command = [sys.executable, "-m", "course", "grade", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    results = tmp_path / "out" / "students"
    process = subprocess.Popen(command, env=environment(ROOT), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(list(results.glob("*/result.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.kill()
    process.wait()
    before = {path: path.read_bytes() for path in results.glob("*/result.json")}
    assert 3 <= len(before) < 10
    done = subprocess.run(command, env=environment(ROOT), cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.stdout.count("as before") == len(before), done.stdout + done.stderr
    assert all(path.read_bytes() == text for path, text in before.items())
    found = json.loads((tmp_path / "out" / "grades.json").read_text())
    assert len(found) == 10
    for result in found:
        name = result["file"] if result["file"] in expected else f"{result['folder']}/{result['file']}"
        told = expected[name]
        assert (None if result["error"] else result["points"]) == told["points"], (told, result)
        assert result["student"].replace(" ", "") == told["student"].replace(" ", "") or "LATE" in name


def test_reports_and_resuming(tmp_path: Path) -> None:
    """Tables hold what the pages say; a second call grades only what changed; a broken file stops nobody."""
    evil = notebook({**INDEPENDENT, "steps": "raise ValueError('<script>alert(1)</script> \\x00 \\ud800')"})
    submissions = {"=HYPERLINK(1)": evil, "Zoë Åström": notebook(INDEPENDENT)}
    submissions |= {"broken": b"{", "page": b"<html>", "empty": b"", "other": b'{"cells": []}'}
    hidden = "# %% repeat points=1 no rows\nassert repeat(torch.zeros(0, 2), 3).shape == (0, 2)\n\n# %% steps\nassert steps > 0\n" \
             "# %% total never right\nassert False\n"  # fmt: skip
    found = run(tmp_path, submissions, hidden=hidden)
    assert found["Zoë Åström"]["points"] == toy.FULL - toy.POINTS["total"]
    assert "never right" in found["Zoë Åström"]["exercises"]["total"]["reason"]
    assert found["Zoë Åström"]["exercises"]["repeat"]["of"] == toy.POINTS["repeat"]
    for name in ("broken", "page", "empty", "other"):
        assert found[name]["error"] and found[name]["points"] == 0
    rows = list(csv.reader((tmp_path / "out" / "grades.csv").read_text(encoding="utf-8-sig").splitlines()))
    assert len(rows) == 7
    assert not any(cell.startswith("=") for row in rows for cell in row)
    cases = ElementTree.parse(tmp_path / "out" / "grades.xml").findall(".//testcase")
    assert len(cases) == 2 * len(toy.SOLUTIONS) + 4
    assert sum(case.find("failure") is not None for case in cases) == 7
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "out" / "students").glob("*/report.html")]
    assert len(pages) == 6
    assert not any("<script>" in page for page in pages)
    assert "=HYPERLINK(1)" in (tmp_path / "out" / "overview.html").read_text(encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "students").glob("*/result.json")}
    (tmp_path / "in" / "broken" / "90_toy.ipynb").write_bytes(notebook({}))
    again = run(tmp_path, {}, hidden=hidden)
    changed = [path for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert len(changed) == 1 and "broken" in changed[0].parent.name
    assert again["said"].count("as before") == 5


def test_by_hand(tmp_path: Path) -> None:
    """`pytest --nbval-lax` on a graded notebook shows exercises and points, and writes them into its XML report."""
    master = Master.read(toy.write_master(tmp_path))
    submission, _ = read_submission(toy.write(tmp_path / "Ada.ipynb", toy.filled({"steps": "steps = 128"})), [master])
    made = graded.build(master, submission, {}, "", QUICK.plain())
    path = tmp_path / "graded.ipynb"
    path.write_text(json.dumps(made["notebook"]))
    options = ["-p", "course.grading.nbval_points", "--nbval-lax", "--nbval-current-env", "--junitxml", str(tmp_path / "r.xml")]
    command = [sys.executable, "-m", "pytest", *options, str(path)]
    done = subprocess.run(command, env=environment(ROOT), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "1 of 10" in done.stdout, done.stdout + done.stderr
    cases = {case.get("name"): case for case in ElementTree.parse(tmp_path / "r.xml").findall(".//testcase")}
    name = next(row["id"] for row in made["plan"] if row["role"] == "check" and row["exercise"] == "steps")
    assert {(p.get("name"), p.get("value")) for p in cases[name].findall(".//property")} >= {("exercise", "steps"), ("points", "1")}


# --- taking the answers


def taken(tmp_path: Path, made: dict | bytes, name: str = "Ada.ipynb"):
    master = Master.read(toy.write_master(tmp_path / "master"))
    path = tmp_path / name
    path.write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
    return read_submission(path, [master])[0]


def test_what_is_odd_is_named(tmp_path: Path) -> None:
    """Edited and deleted checks, forged outputs, deleted and doubled answers."""
    made = toy.filled({"repeat": toy.SOLUTIONS["repeat"]})
    cells = {cell["id"]: cell for cell in made["cells"]}
    cells["toy-repeat-check"]["source"] = "print('repeat: right')"
    cells["toy-steps-check"]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "steps: right\n"}]
    made["cells"] = [cell for cell in made["cells"] if cell["id"] not in ("toy-total", "toy-scale-check")] + [cells["toy-mapped"]]
    found = taken(tmp_path, made)
    assert any("check of repeat was edited" in note for note in found.notes)
    assert any("deleted: Scale" in note for note in found.notes)
    assert found.claims == {"steps"}
    assert "not in the notebook" in found.odd["total"][0] and "total" not in found.answers
    assert "2 cells" in found.odd["mapped"][0]


def test_swapped_ids_do_not_swap_answers(tmp_path: Path) -> None:
    """Where an id and a marker disagree, what the cell defines decides, and it is named."""
    made = toy.filled(toy.SOLUTIONS)
    cells = {cell["id"]: cell for cell in made["cells"]}
    cells["toy-repeat"]["id"], cells["toy-total"]["id"] = "toy-total", "toy-repeat"
    found = taken(tmp_path, made)
    assert "repeat_interleave" in found.answers["repeat"] and "sum(0)" in found.answers["total"]
    assert found.odd["repeat"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"<html>", b"\xff\xfe", b"\x80\x81", b'{"cells": 3}', b'{"a": 1}', b"[" * 10**6,
                                  b'{"worksheets": 1, "nbformat": 3}', b'{"cells": [], "nbformat": 4}', b"null"])  # fmt: skip
def test_bad_files_say_why(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SubmissionError) as told:
        taken(tmp_path, data)
    assert len(str(told.value)) > 15


def test_odd_cells_are_read() -> None:
    """Cells that are no objects, sources that are numbers, metadata that is null."""
    cells = read_cells(json.dumps({"cells": [3, {}, {"cell_type": "code", "source": 5, "metadata": None}, {"source": ["a", 1, "b"]}]}).encode())
    assert [cell["source"] for cell in cells] == ["", "", "ab"]


@pytest.mark.parametrize(("path", "name"), [
    ("Ada Ash_123456_assignsubmission_file_/04_attention.ipynb", "Ada Ash"),  # Moodle
    ("in/ashada_LATE_12345_678910_04_attention-1.ipynb", "ashada"),  # Canvas
    ("in/04_attention - Zoë Åström.ipynb", "Zoë Åström"),
    ("in/Copy of 04_attention_李明 (2).ipynb", "李明"),
    ("Group 7/04_attention.ipynb", "Group 7"),
    ("in/O'Neil-Smith_attention_final.ipynb", "O'Neil-Smith"),
])  # fmt: skip
def test_student_names(path: str, name: str) -> None:
    assert student_name(Path(path), "04_attention") == name


@pytest.mark.parametrize(("path", "name"), [
    ("in/ashada_LATE_12345_678910_04_attention-1.ipynb", "ashada"),
    ("Lora Berg/Copy of 12_lora (2).ipynb", "Lora Berg"),
    ("in/12_lora - Lora Berg.ipynb", "Lora Berg"),
])  # fmt: skip
def test_student_names_of_files_that_cannot_be_read(path: str, name: str) -> None:
    """The workbook is not known then, so every workbook's name is left out."""
    assert student_name(Path(path), "03_language_modeling", "04_attention", "12_lora") == name


# --- what is trusted


def test_a_canary_that_passes_stops_the_grading(tmp_path: Path) -> None:
    """Where the machinery of checks says yes to everything, nobody gets points."""
    plan = [{"id": "canary-1", "role": "canary", "exercise": ""}]
    row = {"id": "canary-1", "role": "canary", "exercise": "", "outcome": "failed", "reason": "", "seconds": 0, "printed": ""}
    with pytest.raises(RuntimeError, match="must fail has passed"):
        grade.check_rows([row], plan)
    with pytest.raises(RuntimeError, match="could not be started"):
        grade.check_rows([], plan)
    right = [{"id": str(n), "role": role, "exercise": "a", "outcome": "passed", "reason": "", "points": 2, "seconds": 0, "printed": ""}
             for n, role in enumerate(("answer", "check"))]  # fmt: skip
    assert nbval_points.points([*right, row])["a"]["points"] == 0
    assert nbval_points.points(right)["a"]["points"] == 2
    assert nbval_points.points(right[1:])["a"]["points"] == 0  # the check alone, without the answer's cell


def test_a_check_that_accepts_everything_is_found(tmp_path: Path) -> None:
    """The canary puts something wrong in the place of an answer: a master whose checks are empty is refused."""
    made = toy.filled({})
    for cell in made["cells"]:
        if "check" in cell["metadata"]:
            cell["source"] = "pass"
    toy.write(tmp_path / "master" / "90_toy.ipynb", made)
    toy.write(tmp_path / "in" / "Ada.ipynb", toy.filled({}))
    command = [sys.executable, "-m", "course", "grade", str(tmp_path / "in"), "--master", str(tmp_path / "master"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(ROOT), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "must fail has passed" in done.stdout
    assert json.loads((tmp_path / "out" / "grades.json").read_text())[0]["points"] == 0
