"""Say what this machine is, which profile fits and why, and what each chapter will take."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time

from course import install, machine
from course.grading import confine

OLDEST_TORCH = (2, 11)
DISK_GB = 2.0  # a cpu run with its checkpoints and data stays below this
PROFILES = ("smoke", "cpu", "t4", "gpu")
# Share of the speed of a large bf16 matrix product, measured on one core of an AMD EPYC: tiny 3,653 tokens/s at 110 GFLOPS,
# minimind2-small 341 tokens/s at 129 GFLOPS.
CPU_SHARE = {"tiny": 0.36, "other": 0.44}
GPU_SHARE = 0.25  # an assumption, on the low side, for models this small
DATASHEET = {"t4": 65e12, "gpu": 71e12}  # operations per second of a T4 (fp16) and an RTX 3090 (bf16), where none is here to be measured
TRAINING = {"09_pretraining": "pretraining", "11_sft": "chat tuning"}  # the chapters whose time is mostly one training run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", choices=PROFILES, help="show the chapters at this profile (default: the one that fits)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.epilog = """examples:
  python -m course doctor
  python -m course doctor --profile gpu"""


def problems(found: dict, absent: list[str]) -> list[str]:
    """What stops the course on this machine, each with what to do."""
    told = []
    version = tuple(int(part) for part in found["python"].split(".")[:2])
    if not install.suitable(version):
        told.append(f"Python {found['python']} is not supported: install 3.11, 3.12 or 3.13, then `make setup PYTHON=python3.13`")
    if not found["torch"]:
        told.append("torch is missing: `make setup`, or `pip install torch==2.13.0` in your own environment")
    elif torch_version(found["torch"]) < OLDEST_TORCH:
        told.append(f"torch {found['torch']} is too old: 2.11 or newer is needed; `make setup` installs it")
    if absent:
        told.append(f"libraries missing or too old: {', '.join(install.package_name(line) for line in absent)}; `make setup` installs them, "
                    "or `pip install -c constraints.txt --editable .`")  # fmt: skip
    if 0 < found["memory_gb"] < 2:
        told.append(f"{found['memory_gb']} GB of memory: at least 2 GB are needed, and 4 GB for the cpu profile")
    if found["disk_free_gb"] < DISK_GB:
        told.append(f"{found['disk_free_gb']} GB of disk are free: a run needs {DISK_GB:.0f} GB")
    return told


def remarks(found: dict) -> list[str]:
    """What works, but with less."""
    told = []
    if not found["compiler"]:
        told.append("no C++ compiler (g++, clang++): the torch.compile step of chapter 09 is left out")
    if not found["gpu"] and found["bf16"] != "native":
        told.append("this processor has no bfloat16 instructions: training runs in float32 and takes about twice as long")
    if found["gpu"] and found["bf16_gpu"] != "native":
        told.append(f"{found['gpu']} has no bfloat16 of its own: profile t4 uses float16 with loss scaling")
    return told


def torch_version(text: str) -> tuple[int, int]:
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def chapter_times(profile) -> dict[str, float | None]:
    """Seconds of each chapter as the profile expects them; None where they were not measured yet."""
    return {name: profile.seconds.get(name) for name in sorted(profile.chapters)}


def measured_here(profile: str) -> dict[str, dict]:
    """Seconds and bytes of each chapter in the newest plain run of a profile on this machine."""
    from course import artifacts

    found: dict[str, tuple[float, dict]] = {}
    for path in artifacts.runs().glob("*/state.json"):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if path.parent.is_symlink() or state["profile"] != profile or not state["bands"]:
                continue
            for name, entry in state["chapters"].items():
                if entry["status"] == "done" and entry["started"] >= found.get(name, (0, {}))[0]:
                    found[name] = entry["started"], {"seconds": entry["seconds"], "memory_bytes": entry["peak_memory_bytes"]}
        except (OSError, ValueError, KeyError, TypeError):  # a run that is being written, or of an older version
            continue
    return {name: values for name, (_, values) in sorted(found.items())}


def training_sizes(profile, chapter: str) -> dict | None:
    """Batch, context, steps of a chapter's training run, if its sizes in the profile have these names."""
    sizes = profile.chapters.get(chapter, {})
    names = {"steps": ("steps",), "batch": ("batch_size", "batch"), "context": ("context", "context_length")}
    found = {key: next((sizes[n] for n in some if n in sizes), None) for key, some in names.items()}
    found["accumulation"] = sizes.get("accumulation", 1)
    return found if all(isinstance(value, (int, float)) for value in found.values()) else None


def predict(profile, found: dict, speed: float | None = None) -> dict[str, dict]:
    """Memory, and with a measured speed (operations per second) time, of the training runs by chapter 07's formulas.

    Training reaches a share of that speed, see `utilisation`.
    """
    from minimind.model import ModelConfig, flops_per_token, training_memory

    config = ModelConfig.preset(profile.model)
    gpu = profile.name in ("t4", "gpu")
    precision = profile.precision
    if precision == "auto":
        native = found["bf16_gpu"] if gpu else found["bf16"]
        precision = "bf16" if native == "native" else "fp32"
    made = {}
    for chapter in TRAINING:
        sizes = training_sizes(profile, chapter)
        if sizes is None:
            continue
        batch, context = int(sizes["batch"]), int(sizes["context"])
        tokens = int(sizes["steps"]) * batch * context * int(sizes["accumulation"])
        memory = training_memory(config, batch, context, precision, "cuda" if gpu else "cpu")["total"]
        work = tokens * flops_per_token(config, context)
        made[chapter] = {"precision": precision, "memory_bytes": memory, "operations": work, "tokens": tokens,
                         "seconds": work / (speed * utilisation(profile, "cuda" if gpu else "cpu")) if speed else None}  # fmt: skip
    return made


def utilisation(profile, device: str) -> float:
    """The share of a large matrix product's speed that a training step reaches; norms, softmax and small matrices cost the rest."""
    return GPU_SHARE if device == "cuda" else CPU_SHARE.get(profile.model, CPU_SHARE["other"])


def measure_speed(precision: str, device: str = "cpu") -> float:
    """Operations per second of a matrix product on this machine: the best of a few short ones, half a second in all."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    side = 4096 if device == "cuda" else 768
    a, b = (torch.randn(side, side).to(device=device, dtype=dtype) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + 0.5
    a @ b
    while time.perf_counter() < deadline or best == float("inf"):  # at least one, also on a machine that is busy elsewhere
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def examine(wanted: str | None = None) -> dict:
    """Everything the doctor knows, as plain values."""
    found, absent = machine.describe(), install.missing()
    name, why = machine.fitting_profile(found)
    shown = wanted or name
    report = {"machine": found, "problems": problems(found, absent), "remarks": remarks(found),
              "profile": name, "why": why, "shown": shown, "profiles": {}, "chapters": {}, "measured": {}, "notes": [],
              "grading": confine.protection()}  # fmt: skip
    if importlib.util.find_spec("yaml") is None:
        report["notes"].append("the profiles cannot be read before the libraries are there")
        return report
    from course.profile import ProfileError, load

    speeds: dict[tuple, float] = {}
    for each in PROFILES:
        try:
            profile = load(each)
        except ProfileError as error:
            report["problems"].append(str(error))
            continue
        entry = {"model": profile.model, "precision": profile.precision, "minutes": profile.budget.get("minutes"),
                 "limit_gb": profile.budget.get("memory_gb"), "memory_gb": None, "training": {}}  # fmt: skip
        if each == shown:
            report["chapters"] = chapter_times(profile)
            report["measured"] = measured_here(each)
        device = "cuda" if each in ("t4", "gpu") and found["gpu"] else "cpu"
        try:
            training = predict(profile, found)
            for chapter, values in training.items():
                key = values["precision"], device
                if key not in speeds and (each in ("smoke", "cpu") or device == "cuda"):
                    speeds[key] = measure_speed(*key)
                speed = DATASHEET[each] if each in DATASHEET and device == "cpu" else speeds[key]
                training[chapter] = predict(profile, found, speed)[chapter]
            entry["training"] = training
            if training:
                entry["memory_gb"] = round(max(t["memory_bytes"] for t in training.values()) / machine.GB, 2)
        except ImportError as error:
            note = f"no prediction of memory and time: {error}"
            if note not in report["notes"]:
                report["notes"].append(note)
        report["profiles"][each] = entry
    return report


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def write_report(report: dict) -> str:
    """The report as people read it."""
    m, lines = report["machine"], ["This machine"]
    gpu = f"{m['gpu']}, {m['gpu_memory_gb']} GB ({m['gpu_memory_free_gb']} free)" if m["gpu"] else "none that torch can use"
    rows = {
        "Python": f"{m['python']}, {m['system']}",
        "torch": m["torch"] or "missing",
        "processor": f"{m['processor']}, {m['cores']} core{'s' if m['cores'] != 1 else ''}",
        "memory": f"{m['memory_gb']} GB ({m['memory_free_gb']} free)" if m["memory_gb"] else "unknown",
        "disk": f"{m['disk_free_gb']} GB free",
        "GPU": gpu,
        "bfloat16": f"processor: {m['bf16']}" + (f"; GPU: {m['bf16_gpu']}" if m["gpu"] else ""),
        "C++ compiler": m["compiler"] or "none",
        "grading": report["grading"],
    }
    lines += [f"  {key:13} {value}" for key, value in rows.items()]
    lines += ["", f"Profile {report['profile']} fits: {report['why']}.", ""]
    if report["profiles"]:
        lines.append("  profile  model             precision  training memory  whole course, at most")
        for name, e in report["profiles"].items():
            memory = f"{e['memory_gb']:.2f} GB" if e["memory_gb"] else "-"
            lines.append(f"  {name:8} {e['model']:17} {e['precision']:10} {memory:16} {e['minutes'] or '-'} min")
    if report["chapters"]:
        name, entry = report["shown"], report["profiles"].get(report["shown"], {})
        where = "the GPU's data sheet" if name in DATASHEET and not m["gpu"] else "this machine"
        lines += ["", f"Chapters at {name}; training is predicted for {where}", f"  {'':22} {'expected':>9} {'last run here':>19}"]
        for chapter, seconds in report["chapters"].items():
            training, here = entry.get("training", {}).get(chapter), report["measured"].get(chapter)
            last = f"{duration(here['seconds'])}, {here['memory_bytes'] / machine.GB:.2f} GB" if here else "-"
            told = f"   {TRAINING[chapter]}: {training['tokens']:,} tokens, about {duration(training['seconds'])}, " \
                   f"{training['memory_bytes'] / machine.GB:.2f} GB" if training else ""  # fmt: skip
            lines.append(f"  {chapter:22} {duration(seconds):>9} {last:>19}{told}")
        totals = [[s for s in some if s is not None] for some in (report["chapters"].values(), [h["seconds"] for h in report["measured"].values()])]
        if any(totals):
            lines.append(f"  {'together':22} " + " ".join(f"{duration(sum(some) if some else None):>{w}}" for some, w in zip(totals, (9, 19))))
    for note in report["notes"]:
        lines += ["", f"Note: {note}"]
    for remark in report["remarks"]:
        lines += ["", f"Note: {remark}"]
    for problem in report["problems"]:
        lines += ["", f"PROBLEM: {problem}"]
    if not report["problems"]:
        lines += ["", f"Nothing is missing. Next: make course   (or: python -m course run --profile {report['profile']})"]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    report = examine(args.profile)
    print(json.dumps(report, indent=2) if args.json else write_report(report))
    return 1 if report["problems"] else 0




if __name__ == "__main__":
    sys.exit(main(argparse.Namespace(profile=None, json=False)))
