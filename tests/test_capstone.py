"""A model on the reader's modules: the capstone agrees with right ones and stops at wrong ones, and so do the package's own tests."""

import os
import subprocess
import sys

import nbformat
import pytest
from helpers_workbooks import ROOT, book, run_cells

from course import desk
from course.execute import ChapterError, execute

LEAKS = '''\
"""An attention that sees one place into the future."""

import torch

from minimind.attention import Attention as Course
from minimind.attention import causal_mask as right

__all__ = ["Attention", "causal_mask"]


def causal_mask(T, S=None, device=None):
    S = S or T
    return right(T, S, device) | torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T + 1)


class Attention(Course):
    def forward(self, x, rotate=None, attention_mask=None, kv_cache=None):
        if attention_mask is None and kv_cache is None:
            attention_mask = causal_mask(x.shape[1], device=x.device)
        return super().forward(x, rotate, attention_mask, kv_cache)
'''


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What a reader has who solved workbooks 4 and 5."""
    folder = tmp_path_factory.mktemp("student")
    for name in ("04_attention", "05_rope"):
        desk.Desk(name, run_cells(book(name).solved())).keep(folder)
    return folder


@pytest.fixture(scope="module")
def leaks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaks")
    (folder / "attention.py").write_text(LEAKS)
    return folder


def capstone(folder, target):
    """Run the capstone at the smoke profile with the modules of this folder; all that it printed."""
    told = {"PYTHONPATH": str(ROOT), "MINIMIND_STUDENT": str(folder), "MINIMIND_RUNS": str(target.parent / "runs")}
    execute(ROOT / "chapters" / "16_capstone.ipynb", target, {"profile": "smoke"}, told)
    cells = nbformat.read(target, as_version=4).cells
    return {cell.id: "".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in cells if cell.cell_type == "code"}


def test_the_capstone_agrees_with_right_modules(kept, tmp_path):
    told = capstone(kept, tmp_path / "out.ipynb")
    assert "attention  yours: causal_mask, repeat_kv" in told["capstone-modules"] and "rope       yours: " in told["capstone-modules"]
    assert "model      of the course" in told["capstone-modules"]
    assert "5 of 5 answers are the same" in told["capstone-same-answers"] or "4 of 5" in told["capstone-same-answers"]


def test_the_capstone_stops_at_a_leak(leaks, tmp_path):
    with pytest.raises(ChapterError, match="your model computes something else"):
        capstone(leaks, tmp_path / "out.ipynb")


def student(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "MINIMIND_STUDENT"}
    command = [sys.executable, "-m", "course", "student", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_the_tests_of_the_package_hold_for_right_modules(kept):
    done = student("--folder", str(kept), "--", "-k", "test_attention or test_rope", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "your own: minimind.attention (causal_mask, repeat_kv" in done.stdout and "your own: minimind.rope" in done.stdout
    assert " passed" in done.stdout


def test_the_tests_of_the_package_find_a_broken_module(leaks):
    done = student("--folder", str(leaks), "--", "-k", "test_attention", "-p", "no:cacheprovider")
    assert done.returncode == 1 and " failed" in done.stdout


def test_without_modules_there_is_nothing_to_test(tmp_path):
    assert "no module is kept yet" in student("--folder", str(tmp_path)).stderr
    assert "there is no folder" in student("--folder", str(tmp_path / "none")).stderr
