"""The tree for students: what is in it, and that nothing leaks into it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_course import ROOT, environment

from course import release


def small_course(home: Path) -> Path:
    """A course with one workbook, its source, and a chapter."""
    for name in ("solutions/src", "exercises", "chapters/src", "minimind", "course/checks", "tests", "docs", "data"):
        (home / name).mkdir(parents=True)
    for name in ("solutions/src/04_attention.py", "exercises/04_attention.ipynb", "chapters/src/04_attention.py", "chapters/04_attention.ipynb",
                 "minimind/attention.py", "course/checks/attention.py", "README.md"):  # fmt: skip
        shutil.copyfile(ROOT / name, home / name)
    (home / "tests" / "test_x.py").write_text("pass")
    (home / "docs" / "instructors.md").write_text("for you")
    (home / "exercises" / ".ipynb_checkpoints").mkdir()
    (home / "exercises" / ".ipynb_checkpoints" / "04-checkpoint.ipynb").write_text("{}")
    (home / "exercises" / "solved.pkl").write_bytes(b"x")
    return home


def test_what_students_get(tmp_path: Path) -> None:
    home = small_course(tmp_path / "home")
    release.release(home, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    book = {"chapters/04_attention.ipynb", "minimind/attention.py", "course/checks/attention.py"}
    assert found == book | {"README.md", "exercises/04_attention.ipynb"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("place", ["source", "outputs", "metadata", "split", "readme", "check"])
def test_a_leak_stops_the_release(tmp_path: Path, place: str) -> None:
    """One line of a solution, wherever it stands; a whole solution of an exercise beyond the book in the checks."""
    home = small_course(tmp_path / "home")
    line = next(s for s in release.secrets_of(home) if "sliding" in s.where).lines.pop()
    path = home / "exercises" / "04_attention.ipynb"
    notebook = json.loads(path.read_text())
    cell = next(c for c in notebook["cells"] if c["cell_type"] == "code")
    if place == "source":
        cell["source"] = f"    {line}"
    elif place == "split":
        cell["source"] = ["x = 1\n", *line]
    elif place == "outputs":
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": [f"{line}\n"]}]
    elif place == "metadata":
        cell["metadata"]["old"] = {"source": line}
    elif place == "readme":
        (home / "README.md").write_text(f"text\n> {line}\n")
    else:
        whole = max((s for s in release.secrets_of(home) if s.kind == "beyond"), key=lambda s: len(s.lines))
        (home / "course" / "checks" / "attention.py").write_text("\n".join(whole.lines))
    path.write_text(json.dumps(notebook))
    with pytest.raises(release.LeakError):
        release.release(home, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hidden_tests_of_the_instructor_count(tmp_path: Path) -> None:
    home = small_course(tmp_path / "home")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "04_attention.py").write_text("# %% causal_mask\nassert causal_mask(7, 19).sum() == 112\n")
    release.release(home, tmp_path / "fine", tmp_path / "hidden")
    (home / "README.md").write_text("assert causal_mask(7, 19).sum() == 112")
    with pytest.raises(release.LeakError):
        release.release(home, tmp_path / "out", tmp_path / "hidden")


def test_the_course_itself(tmp_path: Path) -> None:
    """What would be given out today leaks nothing, and its tools start."""
    command = [sys.executable, "-m", "course", "release", "--without-solutions", str(tmp_path / "class")]
    done = subprocess.run(command, cwd=ROOT, env=environment(ROOT), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tree = tmp_path / "class"
    assert not any((tree / name).exists() for name in ("solutions", "tests", "chapters/src", "docs/instructors.md", ".git"))
    told = subprocess.run([sys.executable, "-m", "course", "--help"], cwd=tree, env={**environment(tree), "PYTHONPATH": str(tree)},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert told.returncode == 0
    again = subprocess.run(command, cwd=ROOT, env=environment(ROOT), capture_output=True, text=True, timeout=300)
    assert again.returncode == 1 and "there already" in again.stderr
