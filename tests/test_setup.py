"""Set-up: one environment, pinned, made once; and the Makefile's promises."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from course import build, install


def pins(root: Path) -> dict[str, str]:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


@pytest.fixture
def clone(tmp_path, root) -> Path:
    """The set-up files alone, in a folder with a space in its name."""
    folder = tmp_path / "my course"
    shutil.copytree(root / "course", folder / "course", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".ci").mkdir()
    for name in ("Makefile", "constraints.txt", "pyproject.toml", ".ci/run"):
        shutil.copy(root / name, folder / name)
    return folder


class Pip:
    """Stands for subprocess.run: makes a pretended .venv and records what pip is asked for."""

    def __init__(self, fail: str = ""):
        self.asked, self.fail = [], fail

    def __call__(self, command, **_):
        if "venv" in command:
            python = install.venv_python(Path(command[-1]).parent)
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)
        elif "pip" in command:
            self.asked.append([word for word in command[command.index("10") + 1 :] if not word.endswith("constraints.txt")])
        else:
            return REAL_RUN(command, **_)
        return subprocess.CompletedProcess(command, bool(self.fail and self.fail in " ".join(command)))


REAL_RUN = subprocess.run


# -- pins


def test_environment_yml_has_the_versions_of_constraints(root):
    wanted = pins(root)
    dependencies = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    listed = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    have = dict(line.split("==") for line in listed if "==" in line)
    assert have == wanted
    assert listed[-1] == "--editable ." and next(iter(have)) == "torch"
    have["numpy"] = "1.0"
    assert have != wanted


def test_every_dependency_is_pinned_within_its_range(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + [line for lines in project["optional-dependencies"].values() for line in lines]
    wanted = pins(root)
    for line in listed:
        requirement = Requirement(line)
        assert requirement.specifier.contains(wanted[requirement.name]), line
    names = {Requirement(line).name for line in listed} | {"setuptools"}
    assert set(wanted) == names
    assert project["requires-python"] == ">=3.11,<3.14"


def test_what_the_code_imports_is_a_dependency(root):
    """Third-party names imported anywhere in the course, its tests and its chapters are listed in pyproject.toml."""
    import ast

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + [line for lines in project["optional-dependencies"].values() for line in lines]
    modules = {"pyyaml": "yaml", "pytest-timeout": "pytest_timeout"}
    known = {modules.get(Requirement(line).name, Requirement(line).name.replace("-", "_")) for line in listed}
    # These come with a listed package: jupyter with jupyterlab, PIL and cycler with matplotlib, and so on.
    known |= {"jupyter_client", "IPython", "PIL", "cycler", "jinja2", "packaging", "requests", "tqdm", "traitlets", "zmq"}
    known |= {"minimind", "course", "conftest", "tests", *(path.stem for path in root.glob("tests/*.py"))} | set(sys.stdlib_module_names)
    optional = {"playwright", "scipy", "triton"}  # used where present
    unknown = {}
    for path in [*root.glob("course/**/*.py"), *root.glob("tests/*.py"), *root.glob("minimind/*.py"), *root.glob("chapters/src/*.py")]:
        text = re.sub(r"^(\s*)[%!]", r"\1pass # ", path.read_text(), flags=re.MULTILINE)
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in names:
                if name.split(".")[0] not in known | optional:
                    unknown[name] = f"{path.relative_to(root)}:{node.lineno}"
    assert not unknown


# -- the environment is made once


def test_torch_goes_first_and_alone(root):
    (_, first), *others = install.steps(root)
    assert first == [f"torch=={pins(root)['torch']}"]
    assert all("--constraint" in arguments for _, arguments in others)
    assert others[-1][1][-2:] == ["--editable", f"{root}[reference,dev]"]


def test_set_up_runs_once_and_again_when_the_pins_change(clone, monkeypatch):
    pip = Pip()
    monkeypatch.setattr(install.subprocess, "run", pip)
    assert install.set_up(clone) and len(pip.asked) == 3
    assert not install.set_up(clone) and len(pip.asked) == 3  # nothing to do: no network needed
    settings = (clone / "pyproject.toml").read_text()
    (clone / "pyproject.toml").write_text(settings.replace("line-length = ", "line-length = 1"))
    assert not install.set_up(clone)  # a setting of ruff installs nothing
    (clone / "pyproject.toml").write_text(settings.replace('"numpy>=', '"numpy>1,>='))
    assert not install.up_to_date(clone)
    (clone / "pyproject.toml").write_text(settings)
    (clone / "constraints.txt").write_text((clone / "constraints.txt").read_text().replace("torch==", "torch==9"))
    assert install.set_up(clone) and len(pip.asked) == 6 and pip.asked[3][0].startswith("torch==9")
    monkeypatch.setattr(install, "up_to_date", lambda _: False)
    assert install.set_up(clone) and len(pip.asked) == 9  # without the stamp it installs each time


def test_an_interrupted_set_up_is_taken_up_again(clone, monkeypatch):
    monkeypatch.setattr(install.subprocess, "run", Pip(fail="--editable"))
    with pytest.raises(install.SetupError, match="pip could not install the other libraries"):
        install.set_up(clone)
    assert not install.up_to_date(clone)
    pip = Pip()
    monkeypatch.setattr(install.subprocess, "run", pip)
    assert install.set_up(clone) and len(pip.asked) == 3


def test_an_unsuitable_python_is_named(clone, monkeypatch):
    monkeypatch.setattr(install.sys, "version_info", (3, 10, 4, "final", 0))
    monkeypatch.setattr(install.shutil, "which", lambda _: None)
    with pytest.raises(install.SetupError, match=r"needs Python 3.11, 3.12 or 3.13, and .* is 3.10.4"):
        install.set_up(clone)
    assert not (clone / ".venv").exists()
    monkeypatch.setattr(install, "suitable", lambda version: version[0] == 3)
    monkeypatch.setattr(install.subprocess, "run", Pip())
    assert install.set_up(clone)  # without the check, 3.10 would be used


def test_another_python_on_the_path_is_found(tmp_path, monkeypatch):
    for name, version in (("python3.13", "3 14"), ("python3.12", "3 12")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {version}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(install.sys, "version_info", (3, 14, 0, "final", 0))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert install.pick_python() == str(tmp_path / "python3.12")


# -- the Makefile


def pretend_environment(clone: Path) -> None:
    """A finished .venv whose python only says how it was called."""
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "called in $(basename "$PWD"): $*; real data ${MINIMIND_REAL_DATA:-not set}"\n')
    python.chmod(0o755)
    (clone / ".venv" / install.STAMP).write_text(install.fingerprint(clone))


def make(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "PROFILE", "ARGS", "MINIMIND_REAL_DATA")}
    command = ["make", "--no-print-directory", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=clean | environment)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_works_from_anywhere_and_hands_the_profile_on(clone, tmp_path):
    pretend_environment(clone)
    for folder, where in ((clone, ()), (tmp_path, ("-C", str(clone)))):
        assert "called in my course: -m course run;" in make(*where, "course", cwd=folder).stdout
        assert "-m course run --profile smoke;" in make(*where, "course", "PROFILE=smoke", cwd=folder).stdout
        assert "-m course run --profile smoke --only 4;" in make(*where, "course", "PROFILE=smoke", "ARGS=--only 4", cwd=folder).stdout
        assert "-m pytest;" in make(*where, "test", cwd=folder).stdout
        assert "-m course build;" in make(*where, "build", cwd=folder).stdout
        assert "lab/tree/chapters/00_start_here.ipynb;" in make(*where, "lab", cwd=folder).stdout
        assert make(*where, "setup", cwd=folder).stdout == ""
    plain = tmp_path / "plain"
    clone.rename(plain)
    (plain / ".venv" / install.STAMP).write_text(install.fingerprint(plain))
    assert "called in plain: -m course run;" in make("-f", str(plain / "Makefile"), "course", cwd=tmp_path).stdout


@needs_make
def test_make_fails_when_the_command_fails(clone):
    pretend_environment(clone)
    (clone / ".venv/bin/python").write_text("#!/bin/sh\nexit 3\n")
    assert make("course", cwd=clone).returncode and make("test", cwd=clone).returncode
    (clone / ".venv" / install.STAMP).unlink()  # set-up is not complete and cannot be
    done = make("course", f"PYTHON={clone / 'nothing'}", cwd=clone)
    assert done.returncode and "-m course run" not in done.stdout


@needs_make
def test_make_clean_keeps_what_the_reader_made(clone):
    pretend_environment(clone)
    for name in ("runs/a", "student", "course/__pycache__", "chapters/.ipynb_checkpoints", ".pytest_cache", "build"):
        (clone / name).mkdir(parents=True, exist_ok=True)
    assert make("clean", cwd=clone).returncode == 0
    left = {path.name for path in clone.iterdir()}
    assert {"runs", "student", ".venv", "course"} <= left and not {"build", ".pytest_cache"} & left
    assert not list(clone.rglob("__pycache__")) and not list(clone.rglob(".ipynb_checkpoints"))


@needs_make
def test_ci_calls_make_test_with_the_real_data_where_there_are_any(clone, tmp_path):
    pretend_environment(clone)
    run = lambda: make_run(clone)
    assert "-m pytest; real data not set" in run()
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert f"-m pytest; real data {tmp_path.resolve() / 'shared/data'}" in run()


def make_run(clone: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MINIMIND_REAL_DATA", "ARGS")}
    environment |= {"PYTHON": sys.executable}
    return subprocess.run([str(clone / ".ci" / "run")], cwd="/", capture_output=True, text=True, env=environment).stdout


# -- Colab


def test_a_chapter_installs_what_is_missing_but_never_torch(root, monkeypatch):
    asked = []
    monkeypatch.setattr(install.subprocess, "run", lambda command, **_: asked.append(command) or subprocess.CompletedProcess(command, 0))
    assert install.install_missing(root) == [] and asked == []  # a prepared machine
    present = install.importlib.metadata.version

    def version(name):
        if name == "datasketch":
            return "0.1"  # too old
        if name in ("torch", "papermill", "tiktoken"):
            raise install.importlib.metadata.PackageNotFoundError(name)
        return present(name)

    monkeypatch.setattr(install.importlib.metadata, "version", version)
    assert [install.package_name(line) for line in install.install_missing(root)] == ["tiktoken", "datasketch"]
    assert [install.package_name(line) for line in install.missing(root)] == ["tiktoken", "datasketch", "papermill"]
    assert not any("torch" in word for word in asked[0])
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(install.SetupError, match="torch is missing"):
        install.install_missing(root)


def test_the_set_up_cell_fetches_the_course_where_it_is_missing(tmp_path):
    """The cell, run by a Python that has no course, in an empty folder, with a local repository in place of the published one."""
    origin, work = tmp_path / "origin", tmp_path / "work"
    (origin / "course").mkdir(parents=True)
    work.mkdir()
    (origin / "course" / "__init__.py").write_text(
        "class Chapter:\n    check = show = print\n\n\ndef start(name, profile):\n    print('started', name, profile)\n    return Chapter()\n"
    )
    (origin / "course" / "install.py").write_text("def install_missing():\n    print('looked for libraries')\n")
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    cell = 'profile = "smoke"\n' + build.CHAPTER_SETUP.format(name="04_attention", repository="https://example.org/none.git")
    environment = os.environ | {"MINIMIND_COURSE": str(origin)}
    run = lambda folder: subprocess.run([sys.executable, "-S", "-c", cell], cwd=folder, capture_output=True, text=True, env=environment)
    for _ in range(2):  # the second time the clone is there
        done = run(work)
        assert done.stdout == "looked for libraries\nstarted 04_attention smoke\n", done.stderr
    (origin / "chapters").mkdir()
    assert run(origin / "chapters").returncode == 0  # opened inside a clone
    assert not (origin / "chapters" / "minimind-course").exists()


# -- what a reader meets first


def test_the_address_of_the_course_is_the_same_everywhere(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Repository"] == build.REPOSITORY
    assert yaml.safe_load((root / "CITATION.cff").read_text())["repository-code"] == build.REPOSITORY
    assert build.REPOSITORY in (root / "README.md").read_text()


def test_links_in_the_readme_lead_somewhere(root):
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", (root / name).read_text()):
            assert (root / target).exists(), f"{name}: {target}"


def test_the_readme_lists_every_chapter(root):
    text = (root / "README.md").read_text()
    for path in sorted((root / "chapters" / "src").glob("*.py")):
        assert f"(chapters/{path.stem}.ipynb)" in text


def test_the_workflow_calls_the_two_commands(root):
    jobs = yaml.safe_load((root / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["make test", "make course PROFILE=smoke"]


def test_the_licence_is_whole(root):
    text = (root / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and len(text.splitlines()) > 195
    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"
