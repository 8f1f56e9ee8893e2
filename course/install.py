"""Make `.venv` with the pinned versions (`make setup`), and add what is missing on Colab.

It runs before anything is installed, so it needs the standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
STAMP = "course-stamp"
TOOLS = {"ipykernel", "jupyterlab", "jupytext", "nbclient", "nbconvert", "nbdev", "nbformat", "nbval", "papermill"}  # no chapter needs them
SEARCHED = ("python3.13", "python3.12", "python3.11")


class SetupError(Exception):
    """Set-up cannot go on; the message says what to do."""


def suitable(version: tuple) -> bool:
    return OLDEST <= tuple(version[:2]) <= NEWEST


def pick_python() -> str:
    """This Python if it is 3.11 to 3.13, else another one on the PATH; SetupError if there is none."""
    if suitable(sys.version_info):
        return sys.executable
    for name in SEARCHED:
        if (path := shutil.which(name)) and python_version(path) and suitable(python_version(path)):
            return path
    have = ".".join(map(str, sys.version_info[:3]))
    raise SetupError(
        f"this course needs Python 3.11, 3.12 or 3.13, and {sys.executable} is {have}.\n"
        "Install one of them and name it, for example: make setup PYTHON=/usr/bin/python3.13"
    )


def python_version(python: str | Path) -> tuple[int, int] | None:
    """(3, 13) for a Python that starts, None for one that does not."""
    try:
        done = subprocess.run([str(python), "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
        return tuple(int(part) for part in done.stdout.split()) or None if done.returncode == 0 else None
    except OSError:
        return None


def fingerprint(root: Path) -> str:
    """Changes when the pins or the dependencies change, and when the clone is moved: the environment holds its path."""
    digest = hashlib.sha256(str(root).encode())
    digest.update((root / "constraints.txt").read_bytes())
    sections = re.split(r"^(?=\[)", (root / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section in sections:  # not the settings of ruff and pytest: they change nothing that is installed
        if not section.startswith(("[tool.ruff", "[tool.pytest")):
            digest.update(section.encode())
    return digest.hexdigest()


def venv_python(root: Path) -> Path:
    return root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def up_to_date(root: Path) -> bool:
    stamp = root / ".venv" / STAMP
    return stamp.is_file() and stamp.read_text() == fingerprint(root) and venv_python(root).exists()


def steps(root: Path) -> list[tuple[str, list[str]]]:
    """What pip is asked for, in order. torch goes first and alone, so that nothing else chooses its build."""
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().split() if "==" in line)
    constrained = ["--constraint", str(root / "constraints.txt")]
    return [
        (f"torch {pins['torch']}", [f"torch=={pins['torch']}"]),
        ("the build tool of the package", [*constrained, "setuptools"]),
        ("the other libraries and the course", [*constrained, "--no-build-isolation", "--editable", f"{root}[reference,dev]"]),
    ]


def set_up(root: Path = ROOT) -> bool:
    """Make or update .venv; False if there was nothing to do."""
    if up_to_date(root):
        return False
    python, venv = pick_python(), venv_python(root)
    if not suitable(python_version(venv) or (0, 0)):
        print(f"making {root / '.venv'} with {python}", flush=True)
        if subprocess.run([python, "-m", "venv", "--clear", str(root / ".venv")]).returncode:
            raise SetupError(f"{python} could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv")
    (root / ".venv" / STAMP).unlink(missing_ok=True)
    for text, arguments in steps(root):
        print(f"installing {text}", flush=True)
        command = [str(venv), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "10", *arguments]
        if subprocess.run(command).returncode:
            raise SetupError(f"pip could not install {text}, see above. With a network again, `make setup` goes on from here.")
    (root / ".venv" / STAMP).write_text(fingerprint(root))
    print("set-up is complete", flush=True)
    return True


def package_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0]


def missing(root: Path = ROOT, without: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """The run-time dependencies in pyproject.toml that are not installed here, or too old; torch is not looked at."""
    import tomllib

    listed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    return [line for line in listed if package_name(line) not in {"torch", *without} and not satisfied(line)]


def satisfied(requirement: str) -> bool:
    """Whether a requirement such as `numpy>=2.0` holds here."""
    try:
        have = importlib.metadata.version(package_name(requirement))
    except importlib.metadata.PackageNotFoundError:
        return False
    try:
        from packaging.requirements import Requirement
    except ImportError:  # then being there must do
        return True
    return Requirement(requirement).specifier.contains(have, prereleases=True)


def install_missing(root: Path = ROOT) -> list[str]:
    """Install what a chapter needs and this Python lacks (Colab); nothing on a prepared machine, and never torch."""
    if importlib.util.find_spec("torch") is None:
        raise SetupError("torch is missing. This cell does not install it, because the right build depends on your machine: "
                         "choose a Colab runtime, or run `make setup` in the folder of the course.")  # fmt: skip
    if absent := missing(root, without=TOOLS):
        print("installing", ", ".join(absent))
        if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *absent]).returncode:
            raise SetupError("pip could not install them, see above; check the network and run this cell again")
        importlib.invalidate_caches()
    return absent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m course.install", description="Make .venv with the pinned versions; nothing to do if it is up to date.",
        epilog="example: make setup PYTHON=python3.12",
    )  # fmt: skip
    parser.parse_args(argv)
    try:
        set_up()
    except SetupError as error:
        print(f"set-up stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
