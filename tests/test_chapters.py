"""The chapters themselves: all of them in one run at the smoke profile, each of them alone on a fresh clone, and what `chapter` gives them."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import nbformat
import pytest
from helpers_course import fake_course, notebook

from course import artifacts
from course.chapter import Chapter, style_figures
from course.execute import execute
from course.profile import load

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(path.stem for path in (ROOT / "chapters" / "src").glob("[0-9][0-9]_*.py"))
READERS = ("MINIMIND_HOME", "MINIMIND_RUN", "MINIMIND_RUNS", "MINIMIND_DATA", "MINIMIND_MAX_STEPS", "MINIMIND_BANDS", "PYTHONPATH")


def clean_environment(**more: str) -> dict[str, str]:
    return {**{key: value for key, value in os.environ.items() if key not in READERS}, **more}


@pytest.fixture(scope="session")
def two_at_a_time():
    """The long runs share two cores: one thread each, two of them at a time."""
    pool = ThreadPoolExecutor(2)
    yield pool
    pool.shutdown(cancel_futures=True)


def python(*arguments: str, where: Path, **more: str) -> subprocess.CompletedProcess:
    environment = clean_environment(OMP_NUM_THREADS="1", **more)
    return subprocess.run([sys.executable, *arguments], cwd=where, env=environment, capture_output=True, text=True)


# -- the whole course at the smoke profile


@pytest.fixture(scope="session")
def smoke_run(two_at_a_time, tmp_path_factory, request):
    """One run of all chapters at the smoke profile, in a folder of its own: what it printed and where it lies."""
    runs = tmp_path_factory.mktemp("runs")
    command = ("-m", "course", "run", "--profile", "smoke", "--name", "smoke")
    running = two_at_a_time.submit(python, *command, where=ROOT, MINIMIND_RUNS=str(runs))
    request.getfixturevalue("alone")  # these begin meanwhile, if they were asked for
    return running.result(), runs / "smoke"


@pytest.mark.timeout(1700)  # the first of these tests waits for the whole run
@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_at_the_smoke_profile(smoke_run, name):
    done, folder = smoke_run
    chapters = json.loads((folder / "state.json").read_text())["chapters"]
    assert chapters[name]["status"] == "done", f"{name}: {chapters[name]['status']}\n{done.stdout[-5000:]}\n{done.stderr[-2000:]}"
    ran = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    code = [cell for cell in ran.cells if cell.cell_type == "code" and cell.source.strip()]
    assert all(cell.execution_count for cell in code), "a cell was not executed"
    assert not [cell.id for cell in code if any(output.output_type == "error" for output in cell.outputs)]
    warnings = [cell.id for cell in code for output in cell.outputs if output.get("name") == "stderr" and "Warning" in output.text]
    assert not warnings, f"these cells print warnings: {warnings}"


@pytest.mark.timeout(1700)
def test_the_smoke_run_meets_its_bands_and_budget(smoke_run):
    done, folder = smoke_run
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    profile, metrics = load("smoke", ROOT), json.loads((folder / "metrics.json").read_text())
    assert all(isinstance(value, int | float) for value in metrics.values())
    missing = [name for name in profile.bands if name not in metrics]
    assert not missing, f"expected in profiles/smoke.yaml, but no chapter measures it: {missing}"
    outside = {
        name: (metrics[name], band)
        for name, band in profile.bands.items()
        if (band[0] is not None and metrics[name] < band[0]) or (band[1] is not None and metrics[name] > band[1])
    }
    assert not outside
    assert metrics["course/peak_memory_bytes"] <= profile.budget["memory_gb"] * 1e9
    for name in ("tokenizer", "pretrain", "sft"):
        assert artifacts.about(folder / "artifacts" / name), f"no artifact {name}"
    text = (folder / "report.html").read_text()
    assert all(f'href="{name}.ipynb"' in text for name in CHAPTERS)
    answers = json.loads((folder / "answers.json").read_text())
    assert list(answers["pretrain"]) == list(answers["sft"]) and len(answers["sft"]) == 5, "the report compares the same five questions"


# -- each chapter alone


def clone(target: Path) -> Path:
    """What a reader has after `git clone`: the tracked files and nothing else."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:  # a downloaded archive instead of a clone
        return shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".venv", "runs", "student", "__pycache__", ".git"))
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def tree(folder: Path) -> set[str]:
    """The files of a clone, but not what Python and a run leave behind."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts and path.parts[0] != "runs"}


EXECUTE = """
import sys
from pathlib import Path

from course.execute import execute

notebook, out, home = map(Path, sys.argv[1:])
# PYTHONPATH: where this course is installed, the kernel must take the clone and not the installed one.
execute(notebook, out, {"profile": "smoke"}, {"PYTHONPATH": str(home)})
"""


def run_alone(name: str, clones: Queue, out: Path) -> tuple[subprocess.CompletedProcess, set[str], set[str]]:
    """One chapter in a clone that no other chapter uses meanwhile: how it ended, the files it wrote, and the folders it left in runs/."""
    place = clones.get()
    try:
        shutil.rmtree(place / "runs", ignore_errors=True)
        before = tree(place)
        done = python("-c", EXECUTE, str(place / "chapters" / f"{name}.ipynb"), str(out), str(place), where=place)
        left = {path.name for path in (place / "runs").iterdir()} if (place / "runs").exists() else set()
        return done, tree(place) ^ before, left
    finally:
        clones.put(place)


@pytest.fixture(scope="session")
def alone(two_at_a_time, tmp_path_factory, request):
    """The chapters that were asked for, each by itself."""
    folder, clones = tmp_path_factory.mktemp("alone"), Queue()
    for number in range(2):
        clones.put(clone(folder / f"clone-{number}"))
    same = [item for item in request.session.items if getattr(item, "function", None) is test_chapter_alone_on_a_fresh_clone]
    names = [item.callspec.params["name"] for item in same]
    return {name: two_at_a_time.submit(run_alone, name, clones, folder / f"{name}.ipynb") for name in names}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_alone_on_a_fresh_clone(alone, name):
    done, changed, left = alone[name].result()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert not changed, "a chapter may write to runs/ only"
    assert left <= {"alone"}, left


# -- what `chapter` gives


@pytest.fixture
def home(tmp_path, monkeypatch):
    for key in READERS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("MINIMIND_HOME", str(tmp_path))
    return fake_course(tmp_path)


def make(home: Path, place: str, name: str = "pretrain", age: float = 0, **about: object) -> Path:
    """A finished artifact in runs/PLACE, `age` seconds old."""
    folder = home / "runs" / place / "artifacts" / name
    told = {"profile": "cpu", "max_steps": None, "data": "world", "world": {"seed": 1, "people": 10, "documents": 20}, **about}
    with artifacts.new_folder(folder, **told) as new:
        (new / "weights").write_text(place)
    then = time.time() - age
    os.utime(folder / artifacts.MARKER, (then, then))
    return folder


def test_an_artifact_comes_from_this_run_then_the_newest_then_what_ships(home, monkeypatch, capsys):
    chapter = Chapter("02_second", "cpu")
    with pytest.raises(FileNotFoundError, match=r"no finished artifact 'pretrain'.*python -m course run --profile cpu --only 1-9"):
        chapter.read("pretrain")
    shipped = home / "data" / "checkpoints" / "pretrain"
    shipped.mkdir(parents=True)
    assert chapter.read("pretrain") == shipped
    old, new = make(home, "old", age=100), make(home, "new", age=50)
    assert chapter.read("pretrain") == new and "pretrain comes from runs/new/artifacts/pretrain" in capsys.readouterr().out
    make(home, "other-profile", profile="smoke")
    assert chapter.read("pretrain") == new, "a newer model of another profile does not replace one of this profile"
    make(home, "cut-short", max_steps=2)
    assert chapter.read("pretrain") == new, "a model that --max-steps kept from learning is no model to build on"
    (new / "weights").write_text("")  # a copy that was cut off
    assert chapter.read("pretrain") == old
    monkeypatch.setenv("MINIMIND_RUN", str(home / "runs" / "this"))
    mine = make(home, "this", age=1000)
    assert Chapter("02_second", "cpu").read("pretrain") == mine


def test_data_are_made_from_the_world_when_nothing_fits(home):
    chapter = Chapter("02_second", "cpu")
    folder = chapter.read("data")
    assert json.loads((folder / "about.json").read_text())["source"] == "world" and (folder / "pretrain" / "train.jsonl.gz").exists()
    stamp = (folder / artifacts.MARKER).stat().st_mtime_ns
    assert Chapter("02_second", "cpu").read("data") == folder and (folder / artifacts.MARKER).stat().st_mtime_ns == stamp, "made once only"


def test_data_fit_the_model_that_was_read(home):
    """Questions about 10 people make no sense to a model that read about 12 others."""
    chapter = Chapter("02_second", "cpu")
    make(home, "other", world={"seed": 1, "people": 12, "documents": 30})
    chapter.read("pretrain")
    facts = (chapter.read("data") / "facts.jsonl").read_text().splitlines()
    assert len({json.loads(line)["person"] for line in facts}) == 12
    alone = (Chapter("02_second", "cpu").read("data") / "facts.jsonl").read_text().splitlines()
    assert len({json.loads(line)["person"] for line in alone}) == 10


def test_an_artifact_appears_whole_or_not_at_all(home):
    chapter = Chapter("02_second", "cpu")
    target = chapter.run / "artifacts" / "pretrain"
    with pytest.raises(KeyboardInterrupt), chapter.write("pretrain") as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert not target.exists() and list(target.parent.iterdir()) == []
    for content in ("first", "second"):
        with chapter.write("pretrain") as folder:
            (folder / "weights").write_text(content)
        assert (target / "weights").read_text() == content and chapter.read("pretrain") == target
    with pytest.raises(ValueError), chapter.write("pretrain") as folder:
        (folder / "weights").write_text("third")
        raise ValueError
    assert (target / "weights").read_text() == "second", "a failed write must leave the last good one"
    assert artifacts.about(target)["chapter"] == "02_second"


def test_without_the_marker_a_half_copy_would_look_whole(home):
    target = make(home, "a")
    assert artifacts.about(target)
    (target / "weights").unlink()
    assert target.is_dir() and artifacts.about(target) is None
    (target / artifacts.MARKER).unlink()
    assert artifacts.about(target) is None


def test_metrics_survive_a_write_that_fails(home, monkeypatch):
    chapter = Chapter("02_second", "cpu")
    chapter.record("a/b", 1)

    def no_room(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", no_room)
        chapter.record("a/c", 2)
    assert json.loads((chapter.run / "metrics.json").read_text()) == {"a/b": 1.0}
    plain = home / "plain.json"
    plain.write_text('{"a/b": 1.0}')
    with pytest.raises(OSError), plain.open("w") as file:  # what a plain write does
        no_room(file.fileno())
    assert plain.read_text() == ""


def test_a_band_is_held(home, capsys):
    chapter = Chapter("02_second", "cpu")
    assert chapter.check("second/value", 0.5) == 0.5
    assert "second/value = 0.5   (expected at least 0.5 at profile cpu)" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="second/value = 0.49 is outside of the band at least 0.5 that profiles/cpu.yaml expects"):
        chapter.check("second/value", 0.49)
    assert json.loads((chapter.run / "metrics.json").read_text())["second/value"] == 0.49, "a failed check is recorded too"
    chapter.check("second/without_band", -1e9)
    with pytest.raises(ValueError, match="is nan"):
        chapter.record("second/value", float("nan"))


def test_max_steps_cuts_the_steps_and_drops_the_bands(home, monkeypatch):
    assert Chapter("01_first", "cpu").steps(7) == 7
    monkeypatch.setenv("MINIMIND_MAX_STEPS", "2")
    chapter = Chapter("01_first", "cpu")
    assert chapter.max_steps == 2 and chapter.steps(7) == 2 and chapter.steps(1) == 1
    chapter.check("second/value", 0.1)
    monkeypatch.setenv("MINIMIND_MAX_STEPS", "two")
    with pytest.raises(ValueError, match="MINIMIND_MAX_STEPS is 'two'"):
        Chapter("01_first", "cpu")


def test_curves_and_answers_are_kept_for_the_report(home):
    chapter = Chapter("01_first", "cpu")
    chapter.curve("pretrain/train", range(1000), [float("nan"), *range(999)], x_label="tokens")
    kept = json.loads((chapter.run / "curves.json").read_text())["pretrain/train"]
    assert len(kept["x"]) == len(kept["y"]) <= 401 and kept["x"][0] == 1 and kept["x"][-1] == 999 and kept["x_label"] == "tokens"
    with pytest.raises(ValueError, match="3 values of x, 2 of y"):
        chapter.curve("x", [1, 2, 3], [1, 2])
    chapter.answer("pretrain", "Who?", "Kalo")
    chapter.answer("sft", "Who?", "Garus")
    assert json.loads((chapter.run / "answers.json").read_text()) == {"pretrain": {"Who?": "Kalo"}, "sft": {"Who?": "Garus"}}
    rows = [{"question": f"{kind} of {person}?"} for person in range(40) for kind in ("home", "work", "food", "pet", "colour")]
    five = chapter.five_questions(rows)
    assert len(five) == 5 == len({q.split()[0] for q in five}) == len({q.split()[-1] for q in five}), "five kinds, five people"
    assert len(chapter.five_questions([])) == 5, "without questions, everyday ones"


def test_a_profile_asks_for_more_than_the_machine_has(home, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: nothing is replaced")
    chapter = Chapter("01_first", "t4")
    assert chapter.device.type == "cpu" and chapter.amp in (None, torch.bfloat16)
    told = capsys.readouterr().out
    assert "device cuda replaced by cpu" in told and "precision fp16 replaced by" in told
    assert set(json.loads((chapter.run / "replaced.json").read_text())) == {"device", "precision"}
    quiet = Chapter("01_first", "cpu")
    assert quiet.device.type == "cpu" and quiet.amp is None and capsys.readouterr().out == ""


FIGURE = """
import matplotlib.pyplot as plt
fig, ax = plt.subplots()
ax.plot([1, 2], label='一')
ax.set_title('注意力 attention')
show(fig, 'The line rises, as every line in this test does.')
print(plt.get_fignums())
"""


def test_a_figure_has_a_caption_and_a_text_alternative(home, tmp_path):
    path = notebook(home / "chapters" / "01_first.ipynb", FIGURE)
    execute(path, tmp_path / "out.ipynb", {"profile": "cpu"}, {"MINIMIND_HOME": str(home), "PYTHONPATH": str(ROOT)})
    cell = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1]
    caption = "The line rises, as every line in this test does."
    pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1 and pictures[0].metadata["image/png"]["alt"] == caption
    assert [output.data["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {})] == [f"*{caption}*"]
    assert not [output for output in cell.outputs if output.get("name") == "stderr"], "a missing font must not warn"
    assert "[]" in str(cell.outputs), "the figure stays open"
    import base64
    import io

    from PIL import Image

    assert Image.open(io.BytesIO(base64.b64decode(pictures[0].data["image/png"]))).text["Description"] == caption


def test_colours_survive_grey_print():
    import matplotlib

    style_figures()
    cycle = list(matplotlib.rcParams["axes.prop_cycle"])
    assert len({str(entry["linestyle"]) for entry in cycle}) == len(cycle) == len({entry["color"] for entry in cycle})
    assert all(family in matplotlib.font_manager.get_font_names() for family in matplotlib.rcParams["font.family"]), "a font that warns"
