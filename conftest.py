"""Fixtures for all tests, and chapters as tests: `pytest chapters/04_attention.ipynb` runs that chapter at the smoke profile."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest_plugins = ["course.grading.nbval_points"]  # exercises and points in nbval's report of a graded notebook
ROOT = Path(__file__).resolve().parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never need the network; a hidden download would show as an error
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
if os.environ.get("MINIMIND_STUDENT"):  # the kind of an error is part of what a function promises; its words are the reader's own
    _raises = pytest.raises
    pytest.raises = lambda *kinds, match=None, **options: _raises(*kinds, **options)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The same tests hold for a reader's modules, but for those that look inside."""
    if os.environ.get("MINIMIND_STUDENT"):
        for item in items:
            if item.get_closest_marker("internal"):
                item.add_marker(pytest.mark.skip(reason="how the course's own code does it; here are a reader's modules"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the course."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real texts and chats named by MINIMIND_REAL_DATA; the test is skipped where it is not set."""
    folder = os.environ.get("MINIMIND_REAL_DATA")
    if not folder:
        pytest.skip("MINIMIND_REAL_DATA is not set: no real text to test on")
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"MINIMIND_REAL_DATA names {path}, which is not a folder")
    return path


def pytest_collect_file(file_path: Path, parent):
    if file_path.suffix == ".ipynb" and file_path.parent == ROOT / "chapters":
        return ChapterFile.from_parent(parent, path=file_path)


class ChapterFile(pytest.File):
    """A chapter notebook."""

    def collect(self):
        yield ChapterRun.from_parent(self, name="smoke")


class ChapterRun(pytest.Item):
    """One chapter, run by `course run` (papermill) at the smoke profile."""

    def runtest(self) -> None:
        name = f"pytest-{self.path.stem}-{time.strftime('%H%M%S')}-{os.getpid()}"
        number = str(int(self.path.stem[:2]))
        command = [sys.executable, "-m", "course", "run", "--profile", "smoke", "--only", number, "--name", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ChapterFailed(f"{' '.join(command[1:])}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")

    def repr_failure(self, excinfo) -> str:
        if isinstance(excinfo.value, ChapterFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, 0, f"{self.path.stem} at the smoke profile"


class ChapterFailed(Exception):
    """A chapter that stopped; the text is what the run printed."""
