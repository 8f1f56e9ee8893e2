"""A course of a few tiny chapters in a temporary folder, for tests of the tools."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PROFILE = """
name: {name}
machine: "a test: {name}"
model: tiny
precision: {precision}
device: {device}
data: world
budget: {{minutes: 1, memory_gb: 4}}
world: {{seed: 1, people: 10, documents: 20}}
chapters:
  01_first: {{steps: 100, rate: 3e-3}}
  02_second: {{steps: 5}}
expected:
  first/steps: [1, 100]
  second/value: [0.5, null]
"""
SETUP = "from course import start\nchapter = start({name!r}, profile)\ncheck, show = chapter.check, chapter.show"


def notebook(path: Path, *cells: str, parameter: str = 'profile = "cpu"', setup: bool = True) -> Path:
    """A chapter: its parameter, the set-up, and cells named cell-1, cell-2, ..."""
    make = nbformat.v4.new_code_cell
    made = [make(parameter, id="parameters", metadata={"tags": ["parameters"]})]
    made += [make(SETUP.format(name=path.stem), id="setup")] if setup else []
    made += [make(source, id=f"cell-{number}") for number, source in enumerate(cells, 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


def fake_course(home: Path) -> Path:
    """Two chapters that hand an artifact on, and two profiles."""
    for name, precision, device in (("cpu", "fp32", "auto"), ("t4", "fp16", "cuda")):
        path = home / "profiles" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PROFILE.format(name=name, precision=precision, device=device))
    notebook(
        home / "chapters" / "01_first.ipynb",
        "steps = chapter.steps(chapter.size.steps)\ncheck('first/steps', steps)\nprint(profile)",
        "with chapter.write('tokenizer') as folder:\n    (folder / 'steps.txt').write_text(str(steps))",
        "with (chapter.run / 'visits.txt').open('a') as file:\n    file.write('first\\n')",
    )
    notebook(
        home / "chapters" / "02_second.ipynb",
        "text = (chapter.read('tokenizer') / 'steps.txt').read_text()\ncheck('second/value', float(text))",
        "with (chapter.run / 'visits.txt').open('a') as file:\n    file.write('second\\n')",
    )
    return home


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that works in the course at `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MINIMIND_")}
    return {**kept, "MINIMIND_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def course_run(home: Path, *options: str, **more: str) -> subprocess.CompletedProcess:
    """`python -m course run OPTIONS` in the course at `home`."""
    command = [sys.executable, "-m", "course", "run", *options]
    return subprocess.run(command, env=environment(home, **more), cwd=home, capture_output=True, text=True, timeout=300)
