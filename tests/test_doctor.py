"""The doctor: what it sees, what it advises, and that it fails where something is missing."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest

from course import doctor, install, machine

LAPTOP = {
    "python": "3.12.4", "system": "Linux", "torch": "2.13.0+cpu", "processor": "a laptop", "cores": 4, "memory_gb": 16.0,
    "memory_free_gb": 12.0, "disk_free_gb": 50.0, "gpu": None, "gpu_memory_gb": None, "gpu_memory_free_gb": None, "bf16": "native",
    "bf16_gpu": None, "compiler": "/usr/bin/g++",
}  # fmt: skip
T4 = LAPTOP | {"gpu": "Tesla T4", "gpu_memory_gb": 15.8, "gpu_memory_free_gb": 15.0, "bf16_gpu": "emulated"}
RTX = LAPTOP | {"gpu": "RTX 3090", "gpu_memory_gb": 25.3, "gpu_memory_free_gb": 24.0, "bf16_gpu": "native"}


class Sized:
    """A profile with one training run whose sizes are told."""

    model, precision, budget, seconds = "tiny", "auto", {"minutes": 30, "memory_gb": 4}, {"04_attention": 55}
    chapters = {"04_attention": {}, "09_pretraining": {"steps": 100, "batch_size": 16, "context": 256}, "11_sft": {"epochs": 3}}

    def __init__(self, name: str = "cpu"):
        self.name = name


@pytest.fixture
def laptop(monkeypatch):
    """The doctor on a healthy laptop, with profiles of our own."""
    monkeypatch.setattr(machine, "describe", lambda: LAPTOP)
    monkeypatch.setattr(install, "missing", lambda: [])
    monkeypatch.setattr(doctor, "measure_speed", lambda *_: 1e11)
    monkeypatch.setattr("course.profile.load", Sized)


def test_describe_agrees_with_the_libraries():
    import psutil
    import torch

    found = machine.describe()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert 1 <= found["cores"] <= psutil.cpu_count()
    assert 0 < found["memory_gb"] <= psutil.virtual_memory().total / 1e9 + 0.1
    assert bool(found["gpu"]) == torch.cuda.is_available()
    assert found["bf16"] in ("native", "emulated", "unknown")
    json.dumps(found)


@pytest.mark.parametrize(
    ("found", "profile", "reason"),
    [
        (LAPTOP, "cpu", "no GPU was found"),
        (T4, "t4", "no bfloat16 of its own"),
        (RTX, "gpu", "RTX 3090 has 25 GB"),
        (RTX | {"bf16_gpu": "emulated"}, "t4", "no bfloat16 of its own"),
        (RTX | {"gpu_memory_gb": 8.0}, "cpu", "has only 8 GB"),
        (LAPTOP | {"memory_gb": 3.0}, "smoke", "less than the 4 GB"),
    ],
)
def test_the_profile_that_fits(found, profile, reason):
    name, why = machine.fitting_profile(found)
    assert name == profile and reason in why


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", "native"),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile", "native"),
        ("Features\t: fp asimd bf16 i8mm", "native"),
        ("flags\t\t: fpu avx2 avx512f", "emulated"),
    ],
)
def test_bfloat16_is_read_from_the_processor(tmp_path, monkeypatch, flags, expected):
    real = machine.Path
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / "cpuinfo" if name == "/proc/cpuinfo" else real(name))
    assert machine.cpu_bf16() == expected


def test_limits_of_a_container_count(monkeypatch):
    limits = {"/sys/fs/cgroup/cpu.max": "100000 100000", "/sys/fs/cgroup/memory.max": "1000000000", "/sys/fs/cgroup/memory.current": "400000000"}
    monkeypatch.setattr(machine, "read_first_line", lambda path: limits.get(path, ""))
    assert machine.cores() == 1
    total, free = machine.memory()
    assert total == 1_000_000_000 and free <= 600_000_000
    monkeypatch.setattr(machine, "read_first_line", lambda path: "max")
    assert machine.memory()[0] > 1_000_000_000


PROBLEMS = {
    "old Python": ({"python": "3.10.9"}, [], "Python 3.10.9 is not supported"),
    "new Python": ({"python": "3.14.0"}, [], "Python 3.14.0 is not supported"),
    "no torch": ({"torch": None}, [], "torch is missing: `make setup`"),
    "old torch": ({"torch": "2.9.1+cu128"}, [], "torch 2.9.1+cu128 is too old"),
    "missing libraries": ({}, ["papermill>=2.6", "nbval>=0.11"], "libraries missing or too old: papermill, nbval"),
    "no memory": ({"memory_gb": 1.0}, [], "1.0 GB of memory"),
    "no disk": ({"disk_free_gb": 0.5}, [], "0.5 GB of disk are free"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_missing_is_said_and_fails(laptop, monkeypatch, capsys, name):
    changes, absent, expected = PROBLEMS[name]
    monkeypatch.setattr(machine, "describe", lambda: LAPTOP | changes)
    monkeypatch.setattr(install, "missing", lambda: absent)
    assert doctor.main(Namespace(profile=None, json=False)) == 1
    assert f"PROBLEM: {expected}" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "problems", lambda *_: [])
    assert doctor.main(Namespace(profile=None, json=False)) == 0  # without the check the doctor is content


def test_a_healthy_machine_passes_and_learns_what_to_do_next(laptop, capsys):
    assert doctor.main(Namespace(profile=None, json=False)) == 0
    out = capsys.readouterr().out
    assert "Profile cpu fits" in out and "Next: make course" in out and "PROBLEM" not in out
    for name in ("smoke", "cpu", "t4", "gpu"):
        assert f"\n  {name} " in out
    assert "04_attention                55 s" in out and "pretraining: 409,600 tokens, about" in out


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (LAPTOP | {"compiler": None}, "torch.compile step of chapter 09 is left out"),
        (LAPTOP | {"bf16": "emulated"}, "no bfloat16 instructions"),
        (T4, "profile t4 uses float16"),
    ],
)
def test_what_works_with_less_is_remarked(found, expected):
    assert any(expected in remark for remark in doctor.remarks(found))
    assert doctor.remarks(LAPTOP) == []
    assert doctor.problems(found, []) == []


def test_memory_and_time_come_from_the_formulas_of_chapter_07():
    from minimind.model import ModelConfig, flops_per_token, training_memory

    config = ModelConfig.preset("tiny")
    made = doctor.predict(Sized(), LAPTOP, speed=1e11)
    assert set(made) == {"09_pretraining"}  # the other one's sizes do not tell
    run = made["09_pretraining"]
    assert run["precision"] == "bf16" and run["tokens"] == 100 * 16 * 256
    assert run["memory_bytes"] == training_memory(config, 16, 256, "bf16", "cpu")["total"]
    assert run["seconds"] == pytest.approx(run["tokens"] * flops_per_token(config, 256) / (1e11 * doctor.CPU_SHARE["tiny"]))
    assert doctor.predict(Sized(), LAPTOP | {"bf16": "emulated"})["09_pretraining"]["precision"] == "fp32"
    assert doctor.predict(Sized(), LAPTOP)["09_pretraining"]["seconds"] is None


def test_times_of_the_last_run_here_are_shown(laptop, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIMIND_RUNS", str(tmp_path))
    chapter = {"status": "done", "seconds": 60.0, "peak_memory_bytes": 1_500_000_000}
    runs = {
        "old": {"profile": "cpu", "bands": True, "chapters": {"04_attention": chapter | {"started": 1, "seconds": 70.0}}},
        "new": {"profile": "cpu", "bands": True, "chapters": {"04_attention": chapter | {"started": 2}}},
        "short": {"profile": "cpu", "bands": False, "chapters": {"04_attention": chapter | {"started": 3, "seconds": 1.0}}},
        "other": {"profile": "smoke", "bands": True, "chapters": {"04_attention": chapter | {"started": 4, "seconds": 2.0}}},
        "torn": {"profile": "cpu"},
    }
    for name, state in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(json.dumps(state))
    (tmp_path / "torn" / "state.json").write_text('{"profile')
    assert doctor.measured_here("cpu") == {"04_attention": {"seconds": 60.0, "memory_bytes": 1_500_000_000}}
    assert doctor.main(Namespace(profile=None, json=False)) == 0
    assert "60 s, 1.50 GB" in capsys.readouterr().out


def test_a_broken_profile_is_a_problem(laptop, monkeypatch):
    from course.profile import ProfileError

    def load(name):
        if name == "t4":
            raise ProfileError("profiles/t4.yaml: modle: no such key; did you mean 'model'?")
        return Sized(name)

    monkeypatch.setattr("course.profile.load", load)
    report = doctor.examine()
    assert report["problems"] == ["profiles/t4.yaml: modle: no such key; did you mean 'model'?"] and "cpu" in report["profiles"]


def test_without_the_model_the_doctor_says_so(laptop, monkeypatch):
    monkeypatch.setitem(sys.modules, "minimind.model", None)
    report = doctor.examine()
    assert any("no prediction of memory and time" in note for note in report["notes"])
    assert all(entry["memory_gb"] is None for entry in report["profiles"].values())


def test_the_measured_speed_is_plausible():
    assert 1e8 < doctor.measure_speed("fp32") < 1e15


def test_the_command_prints_json(root):
    done = subprocess.run([sys.executable, "-m", "course", "doctor", "--json"], cwd=root, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["problems"] else 0)
    assert set(report["profiles"]) == {"smoke", "cpu", "t4", "gpu"}
