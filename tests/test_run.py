"""`course run` on tiny chapters: what it does when all goes well, and what it keeps when something does not."""

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from filelock import FileLock
from helpers_course import course_run, environment, fake_course, notebook

from course import artifacts, run
from course.execute import ChapterError, execute

VISIT = "with (chapter.run / 'visits.txt').open('a') as file:\n    file.write('{}\\n')"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A course of two tiny chapters, in which this process works."""
    for key in [key for key in os.environ if key.startswith("MINIMIND_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("MINIMIND_HOME", str(tmp_path))
    monkeypatch.setattr(run.Run, "_describe_machine", lambda self: None)  # takes seconds, and is tested by itself
    return fake_course(tmp_path)


def go(*options: str) -> int:
    """`course run OPTIONS` in this process: the exit code."""
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return run.main(parser.parse_args(options))


def state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


def statuses(folder: Path) -> dict[str, str]:
    return {name: entry["status"] for name, entry in state(folder)["chapters"].items()}


def visits(folder: Path) -> list[str]:
    path = folder / "visits.txt"
    return path.read_text().split() if path.exists() else []


def wait_for(condition, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# -- when all goes well


def test_a_whole_run_in_a_process_of_its_own(home):
    done = course_run(home, "--profile", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = artifacts.latest()
    assert folder.name.endswith("-cpu") and statuses(folder) == {"01_first": "done", "02_second": "done"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["first/steps"] == 100 and metrics["second/value"] == 100
    assert metrics["course/seconds"] > 0 and metrics["course/peak_memory_bytes"] > 20e6
    assert all(isinstance(value, float | int) for value in metrics.values())
    page = (folder / "report.html").read_text()
    assert "first/steps" in page and "✓ inside" in page
    ran = nbformat.read(folder / "01_first.ipynb", as_version=4)
    assert any("cpu" in str(cell.get("outputs")) for cell in ran.cells)
    lines = [line for line in done.stdout.splitlines() if line.startswith("  0")]
    assert len(lines) == 2 and all(" s " in line and "GB" in line for line in lines)
    assert "report.html" in done.stdout and not done.stderr
    wait_for(lambda: (folder / "machine.json").exists())
    assert json.loads((folder / "machine.json").read_text())["python"]


def test_a_second_run_never_overwrites_the_first(home, capsys):
    assert go("--profile", "cpu", "--only", "1", "--name", "mine") == 0
    before = {path: path.read_bytes() for path in (artifacts.runs() / "mine").rglob("*") if path.is_file()}
    assert go("--profile", "cpu", "--only", "1", "--name", "mine") == 0
    assert {path: path.read_bytes() for path in before} == before
    assert "mine-2" in capsys.readouterr().out and artifacts.latest().name == "mine-2"


def test_latest_is_a_file_where_links_are_not_allowed(home, monkeypatch):
    artifacts.runs().mkdir()
    for name in ("a", "b"):
        (artifacts.runs() / name).mkdir()
    artifacts.set_latest(artifacts.runs() / "a")
    assert (artifacts.runs() / "latest").is_symlink() and artifacts.latest().name == "a"
    (artifacts.runs() / "latest").unlink()
    monkeypatch.setattr(Path, "symlink_to", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "not allowed")))
    artifacts.set_latest(artifacts.runs() / "b")
    assert (artifacts.runs() / "latest").is_file() and artifacts.latest().name == "b"


def test_max_steps_and_a_precision_that_this_machine_lacks(home, capsys, monkeypatch):
    monkeypatch.setattr(run, "replaced", lambda profile, root: ["precision fp16 replaced by fp32"])
    assert go("--profile", "t4", "--max-steps", "2", "--only", "1") == 0
    out = capsys.readouterr().out
    assert "precision fp16 replaced" in out and "after 2 steps" in out
    assert json.loads((artifacts.latest() / "metrics.json").read_text())["first/steps"] == 2
    assert "precision fp16" not in capsys.readouterr().out


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine has a GPU: nothing is replaced")
def test_what_is_replaced_is_found_by_asking_torch(home):
    from course.profile import load

    device, precision = run.replaced(load("t4"), home)
    assert "cuda replaced by cpu" in device and "fp16 replaced by" in precision
    assert run.replaced(load("cpu"), home) == []


def test_bands_are_not_compared_when_the_profile_was_changed(home, capsys):
    """first/steps must be at most 100; 200 is a failure, unless the run changed what the band stands on."""
    assert go("--profile", "cpu", "--only", "1", "--set", "chapters.01_first.steps=200") == 0
    assert "not compared" in (artifacts.latest() / "report.html").read_text()
    path = home / "profiles" / "cpu.yaml"
    path.write_text(path.read_text().replace("steps: 100", "steps: 200"))
    assert go("--profile", "cpu", "--only", "1") == 1
    assert "first/steps = 200 is outside of the band 1 to 100" in capsys.readouterr().out


def test_options_that_cannot_be_meant(home, capsys):
    for options, words in [
        (["--profile", "cpux"], "did you mean 'cpu'"),
        (["--profile", "cpu", "--set", "modle=x"], "did you mean 'model'"),
        (["--profile", "cpu", "--only", "7"], "there are 1 to 2"),
        (["--profile", "cpu", "--only", "x"], "such as 4, 4-8"),
        (["--profile", "cpu", "--data", "nothing-here"], "no such file or folder"),
        (["--profile", "cpu", "--name", "../up"], "plain name"),
        (["--profile", "cpu", "--max-steps", "0"], "at least 1"),
        (["--resume"], "there is no run"),
    ]:
        assert go(*options) == 2
        assert words in capsys.readouterr().err
    assert not artifacts.runs().exists(), "a run that cannot start must leave nothing behind"


def test_the_profile_that_fits_is_found_and_said(home, capsys):
    name = run._fitting_profile()
    assert name in ("smoke", "cpu", "t4", "gpu") and f"profile {name}: " in capsys.readouterr().out


def test_selecting_chapters():
    names = ["00_a", "01_b", "02_c", "04_d"]
    assert run.select(None, names) == names
    assert run.select("1", names) == ["01_b"]
    assert run.select("1-4", names) == ["01_b", "02_c", "04_d"]
    assert run.select("2-", names) == ["02_c", "04_d"]
    assert run.select("-1", names) == ["00_a", "01_b"]
    assert run.select("0,2-4", names) == ["00_a", "02_c", "04_d"]
    for wrong in ("", "3", "4-2", "a", "1--2", "9"):
        with pytest.raises(run.RunError):
            run.select(wrong, names)


def test_data_is_found_and_checked(home, tmp_path, monkeypatch):
    assert run.resolve_data("world", home) == "world"
    text = tmp_path / "my.txt"
    text.write_text("words")
    monkeypatch.chdir(tmp_path)
    assert run.resolve_data("my.txt", home) == str(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").touch()
    for source, words in [("empty", "has no files"), ("nothing.txt", "is empty"), ("gone", "no such file")]:
        with pytest.raises(run.RunError, match=words):
            run.resolve_data(source, home)


def test_bad_data_stop_the_run_before_it_begins(home, tmp_path, capsys):
    text = tmp_path / "my.jsonl"
    text.write_text('{"text": "good"}\n{"txet": "bad"}\nnot json\n')
    assert go("--profile", "cpu", "--data", str(text)) == 2
    error = capsys.readouterr().err
    assert "cannot be used" in error and "my.jsonl:2" in error and "my.jsonl:3" in error
    assert not artifacts.runs().exists()
    assert run.resolve_data(str(text), home) == str(text), "without reading the lines, the path alone looks good"


def test_the_chapters_are_told_about_the_data(home, tmp_path):
    text = tmp_path / "my.txt"
    text.write_text("words")
    code = "import os\nassert os.environ['MINIMIND_DATA'] == chapter.data\nprint(chapter.data, chapter.bands_hold)"
    notebook(home / "chapters" / "01_first.ipynb", code)
    assert go("--profile", "cpu", "--only", "1", "--data", str(text)) == 0
    assert f"{text} False" in (artifacts.latest() / "01_first.ipynb").read_text()


def test_time_left_is_scaled_by_what_the_first_chapters_took(home):
    folder = run._new_folder("x")
    run._keep_profile(folder, run.load("cpu"))
    chapters = {"01_first": {"status": "done", "seconds": 120.0}, "02_second": {"status": "waiting"}}
    one = run.Run(folder, {"profile": "cpu", "set": [], "data": "world", "max_steps": None, "chapters": chapters})
    assert one.time_left() is None
    one.profile.seconds.update({"01_first": 60, "02_second": 100})
    assert one.time_left() == pytest.approx(100 * (120 + 60) / (60 + 60))
    assert [run.clock(seconds) for seconds in (4.4, 200, 1800, 3900)] == ["4 s", "3 min 20 s", "30 min", "1 h 05 min"]


# -- a chapter that fails


def test_a_failing_cell_stops_the_run_and_resume_goes_on(home, capsys):
    notebook(home / "chapters" / "02_second.ipynb", "good = 1", "print('before')\nbad = good / 0", "never = 1", setup=False)
    assert go("--profile", "cpu") == 1
    out, folder = capsys.readouterr().out, artifacts.latest()
    for words in ("02_second.ipynb, cell 'cell-2'", "bad = good / 0", "ZeroDivisionError: division by zero", "--resume", "partial.ipynb"):
        assert words in out, words
    assert statuses(folder) == {"01_first": "done", "02_second": "failed"} and visits(folder) == ["first"]
    assert not (folder / "02_second.ipynb").exists()
    kept = nbformat.read(folder / "02_second.partial.ipynb", as_version=4)
    cells = {cell.id: cell for cell in kept.cells}
    assert "before" in str(cells["cell-2"].outputs) and cells["cell-3"].execution_count is None
    assert "stopped in chapter 02 second" in (folder / "report.html").read_text()
    notebook(home / "chapters" / "02_second.ipynb", VISIT.format("second"))
    assert go("--resume") == 0
    assert visits(folder) == ["first", "second"], "a finished chapter was run again"
    assert statuses(folder) == {"01_first": "done", "02_second": "done"} and not (folder / "02_second.partial.ipynb").exists()
    assert go("--resume") == 0 and visits(folder) == ["first", "second"]


def test_without_the_record_of_what_is_done_resume_would_repeat(home):
    assert go("--profile", "cpu") == 0
    folder = artifacts.latest()
    known = state(folder)
    known["chapters"]["01_first"] = {"status": "waiting"}
    artifacts.write_json(folder / "state.json", known)
    assert go("--resume") == 0
    assert visits(folder) == ["first", "second", "first"]


def test_resume_takes_a_repaired_profile_and_refuses_other_options(home, capsys):
    notebook(home / "chapters" / "02_second.ipynb", "print(chapter.size.missing)")
    assert go("--profile", "cpu") == 1
    assert "no size 'missing' under chapters: 02_second" in capsys.readouterr().out
    assert go("--resume", "--profile", "t4") == 2
    assert "started with --profile cpu" in capsys.readouterr().err
    path = home / "profiles" / "cpu.yaml"
    path.write_text(path.read_text().replace("steps: 5", "missing: 6"))
    assert go("--resume", "--profile", "cpu") == 0
    assert "has changed since this run began" in capsys.readouterr().out


def test_resume_runs_a_chapter_again_whose_artifact_was_damaged(home, capsys):
    assert go("--profile", "cpu") == 0
    folder = artifacts.latest()
    (folder / "artifacts" / "tokenizer" / "steps.txt").write_text("1")  # truncated: it was 100
    assert go("--resume") == 0
    assert "01_first runs again" in capsys.readouterr().out and visits(folder) == ["first", "second", "first"]
    assert (folder / "artifacts" / "tokenizer" / "steps.txt").read_text() == "100"


# -- traps of notebook execution: each test first shows that papermill alone falls into it


def papermill_alone(path: Path, output: Path, **options) -> nbformat.NotebookNode:
    try:
        node = nbformat.read(path, as_version=4)
        node.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        papermill.execute_notebook(node, str(output), progress_bar=False, **options)
    except Exception:
        pass
    return nbformat.read(output, as_version=4)


def told(cell) -> str:
    return cell.metadata.papermill["status"]


def test_a_misspelled_parameter_fails_before_anything_runs(home, tmp_path):
    path = notebook(tmp_path / "x.ipynb", "print('ran with', profil)", parameter='profil = "cpu"', setup=False)
    alone = papermill_alone(path, tmp_path / "alone.ipynb", parameters={"profile": "smoke"})
    assert "ran with cpu" in str(alone.cells[-1].outputs), "papermill no longer ignores unknown parameters"
    with pytest.raises(ChapterError, match="no parameter 'profile'.*it has: profil"):
        execute(path, tmp_path / "out.ipynb", {"profile": "smoke"})
    assert not list(tmp_path.glob("out*"))


def test_a_cell_time_out_is_a_failure(home, tmp_path):
    path = notebook(tmp_path / "x.ipynb", "import time\ntime.sleep(30)", "after = 1", setup=False)
    alone = papermill_alone(path, tmp_path / "alone.ipynb", execution_timeout=1)
    assert [told(cell) for cell in alone.cells[-2:]] == ["completed", "completed"], "papermill no longer marks a time-out as completed"
    with pytest.raises(ChapterError, match="longer than 1 seconds") as caught:
        execute(path, tmp_path / "out.ipynb", {"profile": "smoke"}, cell_timeout=1)
    assert caught.value.cell == "cell-1" and "sleep" in caught.value.source
    kept = nbformat.read(tmp_path / "out.partial.ipynb", as_version=4)
    assert [told(cell) for cell in kept.cells[-2:]] == ["failed", "pending"] and kept.metadata.papermill.exception is True
    assert not (tmp_path / "out.ipynb").exists()


def test_a_dead_kernel_is_a_failure(home, tmp_path):
    path = notebook(tmp_path / "x.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "after = 1", setup=False)
    alone = papermill_alone(path, tmp_path / "alone.ipynb")
    assert told(alone.cells[-1]) == "completed", "papermill no longer marks the rest as completed"
    with pytest.raises(ChapterError, match="dead kernel") as caught:
        execute(path, tmp_path / "out.ipynb", {"profile": "smoke"})
    assert caught.value.cell == "cell-1"
    kept = nbformat.read(tmp_path / "out.partial.ipynb", as_version=4)
    assert [told(cell) for cell in kept.cells[-2:]] == ["failed", "pending"]


def test_leaving_early_is_a_failure(home, tmp_path):
    path = notebook(tmp_path / "x.ipynb", "import sys\nsys.exit(0)", "after = 1", setup=False)
    papermill.execute_notebook(str(path), str(tmp_path / "alone.ipynb"), progress_bar=False, kernel_name="python3")  # no exception
    assert nbformat.read(tmp_path / "alone.ipynb", as_version=4).cells[-1].execution_count is None
    with pytest.raises(ChapterError, match="stopped early"):
        execute(path, tmp_path / "out.ipynb", {"profile": "smoke"})


def test_memory_is_that_of_the_notebook_with_its_children(home, tmp_path):
    child = "import subprocess, sys\nchild = [sys.executable, '-c', 'x = bytearray(150_000_000); import time; time.sleep(1.5)']"
    path = notebook(tmp_path / "x.ipynb", "x = bytearray(200_000_000)\ndel x", f"{child}\nsubprocess.run(child)", setup=False)
    result = execute(path, tmp_path / "out.ipynb", {"profile": "smoke"})
    assert 2.4e8 < result.peak_memory_bytes < 4.5e8
    light = execute(notebook(tmp_path / "y.ipynb", "y = 1", setup=False), tmp_path / "y-out.ipynb", {"profile": "smoke"})
    assert light.peak_memory_bytes < 1.5e8 and result.seconds > light.seconds


def test_the_users_own_kernels_and_start_up_files_play_no_part(home, tmp_path, monkeypatch):
    start_up = tmp_path / "ipython" / "profile_default" / "startup" / "00.py"
    start_up.parent.mkdir(parents=True)
    start_up.write_text("print('start-up file of the user')")
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["false"], "display_name": "wrong", "language": "python"}))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    path = notebook(tmp_path / "x.ipynb", "import sys\nprint(sys.executable)", setup=False)
    execute(path, tmp_path / "out.ipynb", {"profile": "smoke"})
    text = (tmp_path / "out.ipynb").read_text()
    assert sys.executable in text and "start-up file" not in text


# -- kill -9


SLOW = """
with chapter.write('pretrain') as folder:
    (folder / 'half.txt').write_text('half')
    if not (chapter.run / 'go').exists():
        (chapter.run / 'now').touch()
        import time
        time.sleep(600)
    (folder / 'rest.txt').write_text('rest')
"""


def start_and_kill(home: Path, name: str, whom: str) -> tuple[Path, int, int]:
    """Start a run, wait until chapter 2 is half-way through writing an artifact, kill -9; the run's folder, its exit code, the kernel's id."""
    notebook(home / "chapters" / "02_second.ipynb", SLOW, VISIT.format("second"))
    command = [sys.executable, "-m", "course", "run", "--profile", "cpu", "--name", name]
    process = subprocess.Popen(command, env=environment(home), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = artifacts.runs() / name
    wait_for(lambda: (folder / "now").exists())
    kernel = state(folder)["kernel"][0]
    os.kill({"run": process.pid, "kernel": kernel}[whom], signal.SIGKILL)
    process.communicate(timeout=180)
    return folder, process.returncode, kernel


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_killed_run_leaves_no_kernel_and_no_half_artifact_and_resumes(home):
    folder, code, kernel = start_and_kill(home, "killed", "run")
    assert code == -signal.SIGKILL and statuses(folder) == {"01_first": "done", "02_second": "running"}
    left = [path for path in (folder / "artifacts").iterdir() if "pretrain" in path.name]
    assert len(left) == 1 and (left[0] / "half.txt").exists(), "the kill came too early to show anything"
    assert artifacts.about(folder / "artifacts" / "pretrain") is None and artifacts.about(left[0]) is None
    wait_for(lambda: not alive(kernel))
    scratch = Path(state(folder)["kernel"][2])
    assert scratch.is_dir()
    (folder / "go").touch()
    assert go("--resume") == 0
    assert visits(folder) == ["first", "second"]
    assert artifacts.about(folder / "artifacts" / "pretrain")["chapter"] == "02_second"
    assert (folder / "artifacts" / "pretrain" / "rest.txt").exists() and not left[0].exists()
    assert not scratch.exists()


def test_without_a_watch_on_its_parent_a_child_lives_on(tmp_path):
    """Why kernels look after their parent, and why --resume ends the kernel of a killed run."""
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', '{sleep}']).pid, flush=True)\n{sleep}"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    time.sleep(1.5)
    assert alive(child)
    os.kill(child, signal.SIGKILL)


def test_resume_ends_the_kernel_of_a_killed_run(home):
    folder = run._new_folder("old")
    run._keep_profile(folder, run.load("cpu"))
    stray = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    entry = {"profile": "cpu", "set": [], "data": "world", "data_name": "world", "only": None, "max_steps": None, "chapters": {}, "bands": True}
    entry |= {"status": "running", "started": 0.0}
    one = run.Run(folder, entry)
    one._save(kernel=[stray.pid, psutil.Process(stray.pid).create_time(), None])
    one._clean()
    assert stray.wait(10) == -signal.SIGKILL
    one._save(kernel=[other.pid, psutil.Process(other.pid).create_time() - 100, None])  # the number was given to somebody else since
    one._clean()
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_killed_kernel_is_reported_and_resumes(home):
    folder, code, _ = start_and_kill(home, "kernel", "kernel")
    assert code == 1 and statuses(folder) == {"01_first": "done", "02_second": "failed"}
    assert "dead kernel" in state(folder)["chapters"]["02_second"]["error"]
    (folder / "go").touch()
    assert go("--resume", "--name", "kernel") == 0 and visits(folder) == ["first", "second"]


def test_a_terminated_run_says_how_to_go_on(home):
    notebook(home / "chapters" / "02_second.ipynb", SLOW)
    command = [sys.executable, "-m", "course", "run", "--profile", "cpu", "--name", "stopped"]
    process = subprocess.Popen(command, env=environment(home), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = artifacts.runs() / "stopped"
    wait_for(lambda: (folder / "now").exists())
    kernel = state(folder)["kernel"][0]
    process.terminate()
    _, error = process.communicate(timeout=180)
    assert process.returncode == 130 and "course run --resume" in error
    assert state(folder)["status"] == "stopped" and not alive(kernel)


def test_two_runs_do_not_share_a_folder(home, capsys):
    assert go("--profile", "cpu", "--only", "1", "--name", "one") == 0
    with FileLock(artifacts.runs() / "one" / ".lock"):
        done = course_run(home, "--resume", "--name", "one")
    assert done.returncode == 2 and "another `course run` is at work in runs/one" in done.stderr
    assert go("--resume", "--name", "one") == 0, "without the lock the same command must go through"


# -- disks


def test_a_folder_that_cannot_be_written(home, capsys):
    artifacts.runs().write_text("a file where the folder should be")
    assert go("--profile", "cpu") == 2
    assert "error: cannot write to" in capsys.readouterr().err
    artifacts.runs().unlink()
    assert go("--profile", "cpu", "--only", "1") == 0


def test_a_full_disk_is_said_before_and_during_the_run(home, capsys, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full)
        assert go("--profile", "cpu", "--name", "full") == 2
    assert "only 0.00 GB are free" in capsys.readouterr().err
    original = os.fsync

    def fsync(number: int) -> None:
        if "metrics" in os.readlink(f"/proc/self/fd/{number}") if Path("/proc/self/fd").exists() else True:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert go("--resume", "--name", "full") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert go("--resume", "--name", "full") == 0, "after room was made the run must go on"


def test_a_full_disk_in_a_chapter(home, capsys):
    code = "import errno\nif not (chapter.run / 'room').exists():\n    raise OSError(errno.ENOSPC, 'No space left on device')"
    notebook(home / "chapters" / "01_first.ipynb", code)
    assert go("--profile", "cpu", "--only", "1") == 1
    assert "The disk is full. Make room" in capsys.readouterr().out


def test_a_really_full_disk_leaves_the_old_file(tmp_path):
    """/dev/full refuses every byte: the file that was there before must survive a write that fails."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    path = tmp_path / "metrics.json"
    path.write_text('{"a": 1}')
    with pytest.raises(OSError), open("/dev/full", "wb", buffering=0) as disk:
        disk.write(b"x")
    with pytest.raises(ValueError):
        artifacts.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
