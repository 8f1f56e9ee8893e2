"""The build: the same bytes twice, and every problem reported with file and line."""

import ast
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from course import build, outputs, source
from course.source import BuildError

ALPHA = '''\
# %% [markdown]
# # 1. Alpha
#
# The first chapter.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="alpha-default-exp"
#| default_exp alpha

# %% id="alpha-imports"
#| export
import re

import torch

# %% [markdown]
# A sentence.

# %% id="alpha-double"
#| export
PATTERN = re.compile("a+")


def double(x: torch.Tensor) -> torch.Tensor:
    """Twice x."""
    return 2 * x

# %% id="alpha-try"
print(double(torch.ones(2)))
'''

BETA = '''\
# %% [markdown]
# # 2. Beta

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="beta-default-exp"
#| default_exp beta

# %% id="beta-four"
#| export
from minimind.alpha import double


def four(x):
    """Four times x."""
    return double(double(x))

# %% id="beta-say"
#| export say
import sys

from minimind.beta import four


def main() -> int:
    """Print four times one."""
    print(four(1))
    return 0


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main())
'''


@pytest.fixture
def book(tmp_path, root) -> Path:
    """A course of two chapters."""
    folder = tmp_path / "chapters" / "src"
    folder.mkdir(parents=True)
    (folder / "01_alpha.py").write_text(ALPHA)
    (folder / "02_beta.py").write_text(BETA)
    shutil.copy(root / "chapters" / "src" / "ruff.toml", folder)
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


def edit(book: Path, old: str, new: str, name: str = "01_alpha") -> None:
    path = book / "chapters" / "src" / f"{name}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def cells(book: Path, name: str = "01_alpha") -> dict[str, dict]:
    return {cell["id"]: cell for cell in json.loads((book / "chapters" / f"{name}.ipynb").read_text())["cells"]}


def snapshot(book: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(book.rglob("*")) if path.is_file()}


def problems(book: Path, *wanted: str) -> str:
    with pytest.raises(BuildError) as caught:
        build.build(book, list(wanted))
    return str(caught.value)


# -- what is made


def test_twice_gives_the_same_bytes(book):
    assert build.save(build.build(book))
    first = snapshot(book)
    assert build.save(build.build(book)) == []
    assert snapshot(book) == first
    shutil.rmtree(book / "minimind")
    build.save(build.build(book))
    assert snapshot(book) == first


def test_cell_ids_come_from_the_source_and_survive(book):
    import nbformat

    build.save(build.build(book))
    notebook = nbformat.read(book / "chapters" / "01_alpha.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code][:3] == ["parameters", "setup", "alpha-default-exp"]
    assert all(cell.metadata["id"] == cell.id for cell in code)
    text = [cell.id for cell in notebook.cells if cell.cell_type == "markdown"]
    edit(book, "A sentence.", "Another sentence.")
    build.save(build.build(book))
    changed = [cell for cell in cells(book) if cell.startswith("md-")]
    assert changed[0] == text[0] and changed[1] != text[1]


def test_the_set_up_cell_is_filled_in(book):
    build.save(build.build(book))
    body = "".join(cells(book)["setup"]["source"])
    ast.parse(body)
    assert 'start("01_alpha", profile)' in body and "check, show = chapter.check, chapter.show" in body
    assert build.REPOSITORY in body and "MINIMIND_COURSE" in body
    assert "pip install torch" not in body


def test_modules_name_their_cells_and_import_each_other(book):
    build.save(build.build(book))
    beta = (book / "minimind" / "beta.py").read_text()
    assert "# %% ../chapters/02_beta.ipynb #beta-four" in beta
    assert "from .alpha import double" in beta
    assert "__all__ = ['four']" in beta
    assert beta.startswith('"""2. Beta"""')
    say = (book / "minimind" / "say.py").read_text()
    assert "__all__ = ['main']" in say and "from .beta import four" in say
    done = subprocess.run([sys.executable, "-P", "-m", "minimind.say"], capture_output=True, text=True, cwd=book,
                          env=os.environ | {"PYTHONPATH": str(book)})  # fmt: skip
    assert done.stdout == "4\n", done.stderr


def test_a_part_is_built_alone_even_when_another_chapter_is_broken(book):
    edit(book, "def four(x):", "def four(x:", "02_beta")
    made = build.build(book, ["1"])
    assert {path.name for path in made.files} == {"01_alpha.ipynb", "alpha.py", "__init__.py"}
    assert "02_beta.py:18" in problems(book)
    assert build.pick(book, ["1-2"]) == ["01_alpha", "02_beta"]
    assert "no chapter '7'" in problems(book, "7")


# -- every error has file and line; without the safeguard the mistake would pass

END = "    return 2 * x\n"  # line 31, the end of an exported cell
AT_IMPORT = "an exported cell works at import"
ACROSS, INSIDE = "check_book", "check_export"  # the safeguards
MISTAKES = {  # name: (text to add after the exported cell's end, expected problem, safeguard)
    "name exported twice": ("\n\ndef four(x):\n    return x\n", "02_beta.py:18: four is exported twice, first to minimind.alpha at", ACROSS),
    "prints at import": ('\n\nprint("hello")\n', f"01_alpha.py:34: {AT_IMPORT}: \"print('hello')\"", INSIDE),
    "trains at import": ("\n\nfor step in range(3):\n    double(step)\n", f"01_alpha.py:34: {AT_IMPORT}: 'for step", INSIDE),
    "result of a call": ("\n\nFOUR = double(2)\n", f"01_alpha.py:34: {AT_IMPORT}: it calls double(...)", INSIDE),
    "call in a default": ("\n\ndef f(x=torch.ones(3)):\n    return x\n", f"01_alpha.py:34: {AT_IMPORT}: it calls torch.ones", INSIDE),
    "runs in the notebook": ('\n\nif __name__ == "__main__":\n    double(1)\n', "01_alpha.py:34: this also runs in the notebook", INSIDE),
    "plots": ("\n\nimport matplotlib.pyplot\n", "01_alpha.py:34: an exported cell imports matplotlib", INSIDE),
    "heavy import": ("\n\nimport transformers\n", "01_alpha.py:34: an exported cell imports transformers", INSIDE),
    "import from a later chapter": (
        "\n\nfrom minimind.beta import four\n", "01_alpha.py:34: minimind.beta belongs to the later chapter 02_beta", ACROSS,
    ),
    "duplicate id": ('\n# %% id="alpha-double"\n1\n', '01_alpha.py:33: duplicate cell id="alpha-double", first used at', ACROSS),
    "duplicate id in another chapter": (
        '\n# %% id="beta-four"\n1\n', '02_beta.py:13: duplicate cell id="beta-four", first used at chapters/src/01_alpha.py:33', ACROSS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_with_file_and_line(book, monkeypatch, name):
    added, expected, safeguard = MISTAKES[name]
    edit(book, END, END + added)
    assert f"chapters/src/{expected}" in problems(book)
    # The same mistake passes when the safeguard is taken away (the style check is silenced: it is another safeguard).
    monkeypatch.setattr(build, "check_style", lambda *_: [])
    monkeypatch.setattr(source, safeguard, lambda *_: [])
    monkeypatch.setattr(build, safeguard, lambda *_: [], raising=False)
    assert build.build(book).files


FORM = {
    "missing id": ('# %% id="alpha-try"', "# %%", "01_alpha.py:33: a code cell without an id"),
    "id in capitals": ('id="alpha-try"', 'id="Alpha Try"', '01_alpha.py:33: id="Alpha Try" is not kebab-case'),
    "unknown directive": ("#| export\nPATTERN", "#| exprt\nPATTERN", "01_alpha.py:24: unknown directive #| exprt"),
    "directive not first": ("#| export\nPATTERN", "x = 1\n#| export\nPATTERN", "01_alpha.py:24: #| export must be the first line"),
    "unknown metadata": ('id="alpha-try"', 'id="alpha-try" colour="red"', "01_alpha.py:33: unknown cell metadata colour"),
    "export without a module": ("#| default_exp alpha", "# nothing", "01_alpha.py:15: #| export before any #| default_exp"),
    "two modules": ('# %% id="alpha-try"\n', '# %% id="alpha-try"\n#| default_exp other\n', "01_alpha.py:33: a second #| default_exp"),
    "no title": ("# # 1. Alpha", "# Alpha", "01_alpha.py:1: the first cell must be markdown that starts with the title"),
    "no parameters tag": (' tags=["parameters"]', "", '01_alpha.py:6: the parameters cell needs tags=["parameters"]'),
    "no set-up": ('# %% id="setup"', '# %% id="alpha-setup"', "01_alpha.py:1: the first two code cells must have"),
    "syntax": ("    return 2 * x", "    return 2 *", "01_alpha.py:31: not valid Python"),
    "text before the first cell": ("# %% [markdown]\n# # 1. Alpha", "x = 1\n\n# %% [markdown]\n# # 1. Alpha", "01_alpha.py:1: "),
    "relative import": ("import re\n", "from .beta import four\n", "01_alpha.py:17: write minimind imports in full"),
    "unused import": ("import re\n", "import json\nimport re\n", "01_alpha.py:17: F401"),
    "undefined name": ("print(double(", "print(triple(", "01_alpha.py:34: F821"),
    "a module of another chapter": ("#| default_exp alpha", "#| default_exp beta", "02_beta.py:13: module minimind.beta is owned by 01_alpha"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORM)
def test_the_form_of_a_source_is_checked(book, name):
    old, new, expected = FORM[name]
    edit(book, old, new)
    assert f"chapters/src/{expected}" in problems(book)


def test_style_of_the_module_is_reported_at_the_source(book, monkeypatch):
    edit(book, "def double(x: torch.Tensor)", "def double(x: torch.Tensor, more=[])")
    assert "chapters/src/01_alpha.py:29: in minimind/alpha.py: B006" in problems(book)
    assert build.build(book, draft=True).files  # a draft is written all the same
    monkeypatch.setattr(build, "check_style", lambda *_: [])
    assert build.build(book).files


def test_all_problems_are_told_at_once(book):
    edit(book, '# %% id="alpha-try"', "# %%")
    edit(book, "    return double(double(x))", "    return double(double(x))\n\n\nprint(1)", "02_beta")
    assert len(problems(book).splitlines()) == 2


def test_values_that_may_stand_in_an_exported_cell():
    def check(code: str) -> list[str]:
        cell = source.Cell("code", "x", "#| export\n" + code, 1, [], {"export": ""}, "m")
        return source.check_export(source.Chapter(Path("chapters/src/01_x.py"), [cell], "m"), cell)

    for code in ("SIZES = {'a': 3, **{'b': 4}}", "A: int = 3", "NAMES = 'a b'.split()", "F = lambda x: train(x)",
                 "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy", "import torch\n\n@torch.no_grad()\ndef f(): ...",
                 "import dataclasses\n\n@dataclasses.dataclass\nclass A:\n    x: list = dataclasses.field(default_factory=list)",
                 "B = [2 * i for i in range(3)]"):  # fmt: skip
        assert check(code) == [], code
    for code in ("x = open('a')", "import torch\ntorch.manual_seed(0)", "class A:\n    print(1)", "with open('a') as f: pass",
                 "x = y = train()", "del x", "x = [train(i) for i in range(3)]", "class A:\n    x = train()", "assert train()"):  # fmt: skip
        assert check(code), code


# -- stale files


def test_check_finds_every_stale_file(book, monkeypatch, capsys):
    build.save(build.build(book))
    assert build.stale(book, build.build(book)) == []
    clean = snapshot(book)
    changes = {
        "chapters/01_alpha.ipynb": lambda p: p.write_text(p.read_text().replace("A sentence.", "Edited by hand.")),
        "chapters/02_beta.ipynb": lambda p: p.unlink(),
        "minimind/alpha.py": lambda p: p.write_text(p.read_text().replace("2 * x", "3 * x")),
        "minimind/old.py": lambda p: p.write_text(""),
        "chapters/09_old.ipynb": lambda p: p.write_text("{}"),
        "minimind/__init__.py": lambda p: p.write_text(""),
    }
    expected = {
        "chapters/01_alpha.ipynb": "chapters/src/01_alpha.py:21: chapters/01_alpha.ipynb is stale",
        "chapters/02_beta.ipynb": "chapters/02_beta.ipynb:1: missing",
        "minimind/alpha.py": "minimind/alpha.py:19: stale (made from chapters/src/01_alpha.py:31)",
        "minimind/old.py": "minimind/old.py:1: no source makes this file",
        "chapters/09_old.ipynb": "chapters/09_old.ipynb:1: no source makes this file",
        "minimind/__init__.py": "minimind/__init__.py:1: stale",
    }
    monkeypatch.setattr(build, "ROOT", book)
    arguments = Namespace(check=True, execute=False, from_run=None, chapters=[], draft=False, profile="cpu", workbooks=False)
    for name, change in changes.items():
        change(book / name)
        found = build.stale(book, build.build(book))
        assert len(found) == 1 and found[0].startswith(expected[name]), found
        assert build.main(arguments) == 1 and expected[name] in capsys.readouterr().err
        (book / name).unlink(missing_ok=True)
        for path, data in clean.items():
            path.write_bytes(data)
    assert build.main(arguments) == 0
    assert snapshot(book) == clean
    changes["minimind/alpha.py"](book / "minimind/alpha.py")
    monkeypatch.setattr(build, "stale", lambda *_: [])
    assert build.main(arguments) == 0  # without the comparison the edited module passes


def test_outputs_are_not_compared(book):
    build.save(build.build(book))
    path = book / "chapters" / "01_alpha.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][-1] |= {"outputs": [stream("hello\n")], "execution_count": 7}
    path.write_bytes(build.dump_notebook(notebook))
    assert build.stale(book, build.build(book)) == []
    notebook["cells"][-1]["source"] = ["print(1)"]
    path.write_bytes(build.dump_notebook(notebook))
    assert "01_alpha.py:33" in build.stale(book, build.build(book))[0]


# -- outputs


def run_of(book: Path, name: str = "01_alpha", outputs_of: dict | None = None, **papermill) -> Path:
    """A folder like that of a finished course run."""
    folder = book / "runs" / "one"
    folder.mkdir(parents=True, exist_ok=True)
    notebook = json.loads((book / "chapters" / f"{name}.ipynb").read_text())
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            cell |= {"execution_count": 10 + number, "outputs": (outputs_of or {}).get(cell["id"], [])}
            cell["metadata"]["papermill"] = {"duration": 0.3}
    injected = {"cell_type": "code", "id": "f00", "metadata": {"tags": ["injected-parameters"]}, "source": ['profile = "cpu"']}
    notebook["cells"].insert(2, injected | {"outputs": [], "execution_count": 2})
    notebook["metadata"] |= {"papermill": {"parameters": {"profile": "cpu"}} | papermill, "widgets": {"state": {}}}
    (folder / f"{name}.ipynb").write_text(json.dumps(notebook))
    return folder


def stream(text: str) -> dict:
    return {"output_type": "stream", "name": "stdout", "text": text}


def test_outputs_of_a_run_are_taken_without_noise(book):
    build.save(build.build(book))
    noise = [
        stream("10%\r50%\r100%\n"), stream(f"/tmp/elsewhere/x saved in {source.ROOT}/runs at 2026-01-02 03:04:05, <A at 0x7f0012345678>\n"),
        {"output_type": "display_data", "data": {outputs.WIDGET: {}, "text/plain": "interactive(children=...)"}, "metadata": {}},
        {"output_type": "display_data", "data": {"image/png": "aGVsbG8=\n", "text/plain": "<Figure>"}, "metadata": {}},
        {"output_type": "execute_result", "data": {"text/plain": "\x1b[31m4\x1b[0m"}, "metadata": {}, "execution_count": 99},
    ]  # fmt: skip
    folder = run_of(book, outputs_of={"alpha-try": noise})
    build.save(build.build(book, ["1"], run=folder))
    notebook = json.loads((book / "chapters" / "01_alpha.ipynb").read_text())
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert not any("papermill" in c["metadata"] for c in code)
    text, picture, result = code[-1]["outputs"]
    assert text["text"] == ["100%\n", "/tmp/... saved in ./runs at <time>, <A at 0x...>\n"]
    assert picture["data"]["image/png"] == "aGVsbG8="
    assert result["data"]["text/plain"] == ["4"] and result["execution_count"] == len(code)
    # They stay as long as the cell stays, and go with it.
    build.save(build.build(book))
    assert cells(book)["alpha-try"]["outputs"] == code[-1]["outputs"]
    edit(book, "torch.ones(2)", "torch.ones(3)")
    build.save(build.build(book))
    assert cells(book)["alpha-try"]["outputs"] == [] and cells(book)["alpha-imports"]["execution_count"]


def test_outputs_of_another_source_or_a_failed_run_are_refused(book):
    build.save(build.build(book))
    error = [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]
    run = lambda **changes: build.build(book, ["1"], run=run_of(book, **changes))
    assert run().files
    for changes, expected in (
        ({"exception": True}, "01_alpha.py:1: the run of 01_alpha failed"),
        ({"parameters": {"profile": "smoke"}}, "used profile smoke, not cpu"),
        ({"outputs_of": {"alpha-try": error}}, '01_alpha.py:33: cell id="alpha-try" ended with an error'),
    ):
        with pytest.raises(BuildError, match=expected):
            run(**changes)
    folder = run_of(book)
    edit(book, "torch.ones(2)", "torch.ones(3)")
    with pytest.raises(BuildError, match='01_alpha.py:33: cell id="alpha-try" has changed since the run'):
        build.build(book, ["1"], run=folder)
    with pytest.raises(BuildError, match="is missing or not a notebook"):
        build.build(book, ["2"], run=folder)


def test_outputs_of_a_run_cut_short_are_refused(book, monkeypatch, capsys):
    build.save(build.build(book))
    monkeypatch.setattr(build, "ROOT", book)
    folder = run_of(book)
    (folder / "state.json").write_text('{"bands": false}')
    arguments = Namespace(check=False, execute=False, from_run=folder, chapters=[], draft=False, profile="cpu", workbooks=False)
    assert build.main(arguments) == 1 and "--max-steps" in capsys.readouterr().err
    (folder / "state.json").write_text('{"bands": true}')
    assert build.main(arguments) == 0


def test_a_notebook_over_the_limit_is_refused(book, monkeypatch):
    build.save(build.build(book))
    folder = run_of(book, outputs_of={"alpha-try": [stream("x" * 600_000)]})
    with pytest.raises(BuildError, match=r"01_alpha.py:33: chapters/01_alpha.ipynb has 60\d KB, the limit is 500; largest: alpha-try"):
        build.build(book, ["1"], run=folder)
    monkeypatch.setattr(build, "check_size", lambda *_: [])
    assert build.build(book, ["1"], run=folder).files


def test_outputs_name_no_folder_of_the_machine(book, tmp_path, monkeypatch):
    build.save(build.build(book))
    home = Path("/srv/ann/course")  # another clone, where the run was made
    folder = run_of(book, outputs_of={"alpha-try": [stream(f"kept in {home}/runs/a/pretrain at 3 tokens/s, see /proc/self/status\n")]})
    take = build.take_outputs
    monkeypatch.setattr(build, "take_outputs", lambda *given: take(*given[:-1], home))
    made = build.build(book, ["1"], run=folder)
    text = "".join(made.files[book / "chapters" / "01_alpha.ipynb"].decode())
    assert "kept in ./runs/a/pretrain at 3 tokens/s" in text and "/srv/" not in text
    monkeypatch.setattr(build, "take_outputs", lambda *given: take(*given[:-1]))  # without it, the path would stay ...
    with pytest.raises(BuildError, match=r'01_alpha.py:33: cell id="alpha-try": .* names /srv/ann/course/runs/a/pretrain, a path of one machine'):
        build.build(book, ["1"], run=folder)  # ... and is refused


def test_the_home_of_a_run_is_the_course_around_it(book, monkeypatch):
    build.save(build.build(book))
    homes = []
    monkeypatch.setattr(build, "take_outputs", lambda chapter, notebook, executed, profile, home: homes.append(home) or notebook)
    folder = run_of(book)
    build.build(book, ["1"], run=folder)
    assert homes == [folder.resolve().parent.parent]


def test_execute_runs_the_chapters_and_keeps_their_outputs(book, monkeypatch):
    monkeypatch.setattr(build, "ROOT", book)
    calls = []

    def run(chapters, profile):
        calls.append((chapters, profile))
        return run_of(book, outputs_of={"alpha-try": [stream("done\n")]})

    monkeypatch.setattr(build, "execute", run)
    arguments = Namespace(check=False, execute=True, from_run=None, chapters=["1"], draft=False, profile="cpu", workbooks=False)
    assert build.main(arguments) == 0
    assert calls == [(["01_alpha"], "cpu")] and cells(book)["alpha-try"]["outputs"][0]["text"] == ["done\n"]


# -- writing


def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.os, "fsync", full_disk)
    with pytest.raises(OSError):
        build.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.txt"]
    # Writing in place instead would have lost it.
    with pytest.raises(OSError), path.open("wb") as file:
        full_disk(file)
    assert path.read_bytes() == b""


# -- sample data


def test_sample_data_are_made_from_the_world_in_the_sources(book):
    edit(book, "#| default_exp alpha", "#| default_exp world")
    for old, new in (("\nimport torch\n", ""), ("x: torch.Tensor) -> torch.Tensor", "x)"), ("torch.ones(2)", "2")):
        edit(book, old, new)
    edit(book, "from minimind.alpha", "from minimind.world", "02_beta")
    (book / "course").mkdir()
    (book / "course" / "__init__.py").touch()
    (book / "course" / "samples.py").write_text(
        "from pathlib import Path\n\n\ndef files(root):\n    from minimind.world import double\n\n"
        "    return {Path(root) / 'data' / 'sample' / 'a.txt': str(double(21)).encode()}\n"
    )
    build.save(build.build(book))
    sample = book / "data" / "sample" / "a.txt"
    assert sample.read_text() == "42"
    edit(book, "return 2 * x", "return 3 * x")
    assert any(p.startswith("data/sample/a.txt:1: stale") for p in build.stale(book, build.build(book)))
    build.save(build.build(book))
    assert sample.read_text() == "63"
    (book / "data" / "sample" / "b.txt").touch()
    assert build.stale(book, build.build(book)) == ["data/sample/b.txt:1: no source makes this file; delete it"]
    edit(book, "return 3 * x", "raise ValueError(x)")
    assert "course/samples.py:1: the sample data could not be made" in problems(book, "1")


# -- the command


def test_every_command_has_help_with_an_example(root):
    from course.__main__ import available

    assert {"build", "doctor"} <= set(available())
    for command in available():
        done = subprocess.run([sys.executable, "-m", "course", command, "--help"], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "example" in done.stdout and f"python -m course {command}" in done.stdout, command


def test_an_unknown_command_fails(root):
    done = subprocess.run([sys.executable, "-m", "course", "biuld"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "biuld" in done.stderr


# -- the course itself


def test_the_committed_files_agree_with_their_sources(root):
    assert build.stale(root, build.build(root)) == []


def test_the_committed_chapters_are_executed_and_small(root):
    for path in sorted((root / "chapters").glob("*.ipynb")):
        notebook = json.loads(path.read_bytes())
        code = [c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
        idle = [c["id"] for c in code if c["execution_count"] is None]
        assert not idle, f"{path.name}: not executed: {idle}; run `python -m course build --execute {path.stem[:2]}`"
        assert path.stat().st_size <= build.SIZE_LIMIT
        assert str(root) not in path.read_text() and str(Path.home()) not in path.read_text()


def test_the_committed_solutions_are_executed_and_right(root):
    for path in sorted((root / "solutions").glob("*.ipynb")):
        code = [c for c in json.loads(path.read_bytes())["cells"] if c["cell_type"] == "code"]
        idle = [c["id"] for c in code if c["execution_count"] is None]
        assert not idle, f"{path.name}: not executed: {idle}; run `python -m course build --execute --workbooks {path.stem[:2]}`"
        checks = [c for c in code if "".join(c["source"]).startswith("check(")]
        said = {"".join(c["source"]).partition("\n")[0]: "".join("".join(o.get("text", "")) for o in c["outputs"]) for c in checks}
        assert len(said) >= 6
        for line, answer in said.items():
            assert answer.startswith(f"{line[7:-2]}: right"), f"{path.name}: {line} says {answer!r}"


def test_ruff_finds_nothing(root):
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_importing_a_module_is_quick_and_quiet(root):
    """Each module imports with torch, numpy, tokenizers, safetensors and the standard library only, prints nothing and trains nothing."""
    names = sorted(path.stem for path in (root / "minimind").glob("[a-z]*.py"))
    assert names
    program = """
import importlib, sys, time
allowed = set(sys.argv[1].split(","))
import torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in allowed:
            raise ImportError(f"{name} must not be imported at the top of a minimind module")
sys.meta_path.insert(0, Refuse())
state = torch.random.get_rng_state()
for name in sys.argv[2].split(","):
    start = time.process_time()
    importlib.import_module(f"minimind.{name}")
    assert time.process_time() - start < 3, f"minimind.{name} takes more than three seconds"
    assert torch.equal(state, torch.random.get_rng_state()), f"minimind.{name} uses random numbers at import"
"""
    refused = ["matplotlib", "IPython", "ipywidgets", "pandas", "transformers", "datasets", "datasketch", "pyarrow", "tiktoken", "course", "yaml"]
    environment = os.environ | {"PYTHONPATH": str(root)}

    def run(*modules: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", program, ",".join(refused), ",".join(modules)]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)

    done = run(*names)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    refused += ["re", "torch", "json", "minimind"]  # the guard itself works
    assert run(*names).returncode != 0
