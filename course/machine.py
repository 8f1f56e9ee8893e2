"""What this machine is, and which profile fits it. Nothing here needs a package except psutil and torch, both optional."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 with AVX-512, x86 with AMX, ARM


@cache
def describe() -> dict:
    """Python, torch, processor, memory, disk, GPU and precision of this machine, as plain values for a report."""
    torch = load_torch()
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__ if torch else None,
        "processor": processor(),
        "cores": cores(),
        "memory_gb": round(memory()[0] / GB, 1),
        "memory_free_gb": round(memory()[1] / GB, 1),
        "disk_free_gb": round(shutil.disk_usage(ROOT).free / GB, 1),
        "gpu": None,
        "gpu_memory_gb": None,
        "gpu_memory_free_gb": None,
        "bf16": cpu_bf16(),
        "bf16_gpu": None,
        "compiler": compiler(),
    }
    if torch and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory_gb": round(total / GB, 1),
            "gpu_memory_free_gb": round(free / GB, 1),
            "bf16_gpu": "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated",
        }
    return found


def load_torch():
    """torch, or None where it is missing or broken."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: a library that torch needs is missing
        return None
    return torch


def cores() -> int:
    """The cores that this process may use: less than the machine has in a container or under taskset."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        count = os.cpu_count() or 1
    quota = read_first_line("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        count = min(count, max(1, round(int(quota[0]) / int(quota[1]))))
    return count


def memory() -> tuple[int, int]:
    """Bytes of memory that this process may use, and bytes of it that are free; (0, 0) where nothing tells."""
    try:
        import psutil

        total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    except ImportError:
        if not hasattr(os, "sysconf"):
            return 0, 0
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        free = page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else total
    limit = read_first_line("/sys/fs/cgroup/memory.max") or read_first_line("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    if limit.isdigit() and int(limit) < total:  # a container's limit
        used = read_first_line("/sys/fs/cgroup/memory.current") or read_first_line("/sys/fs/cgroup/memory/memory.usage_in_bytes")
        total = int(limit)
        free = min(free, total - int(used)) if used.isdigit() else min(free, total)
    return total, free


def read_first_line(path: str) -> str:
    try:
        return Path(path).read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return ""


def cpu_flags() -> set[str]:
    """What /proc/cpuinfo says the processor can do; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":", 1)[1].split()}


def cpu_bf16() -> str:
    """`native` where the processor multiplies bfloat16 itself, `emulated` where it is converted to float32 first."""
    if flags := cpu_flags():
        return "native" if flags & BF16_FLAGS else "emulated"
    if platform.system() == "Darwin":
        return "native" if command_output("sysctl", "-n", "hw.optional.arm.FEAT_BF16") == "1" else "emulated"
    return "unknown"


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return command_output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def compiler() -> str | None:
    """The C compiler that torch.compile would call; None leaves the compile step out."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    return next((shutil.which(name) for name in names if name and shutil.which(name)), None)


def command_output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def fitting_profile(machine: dict | None = None) -> tuple[str, str]:
    """The largest profile that fits this machine, and why."""
    m = machine or describe()
    memory_gb, gpu, vram = m["memory_gb"], m["gpu"], m["gpu_memory_gb"] or 0
    if gpu and vram >= 22 and m["bf16_gpu"] == "native":
        return "gpu", f"{gpu} has {vram:.0f} GB and multiplies bfloat16 itself"
    if gpu and vram >= 14:
        return "t4", f"{gpu} has {vram:.0f} GB" + ("" if m["bf16_gpu"] == "native" else " and no bfloat16 of its own")
    small = f"{gpu} has only {vram:.0f} GB (14 are needed), so the processor does the work" if gpu else "no GPU was found"
    if memory_gb and memory_gb < 4:
        return "smoke", f"{small}, and {memory_gb:.1f} GB of memory is less than the 4 GB that cpu needs"
    return "cpu", f"{small}; {m['cores']} cores and {memory_gb:.0f} GB of memory are enough"


if __name__ == "__main__":
    for key, value in describe().items():
        print(f"{key:20} {value}")
    print(*fitting_profile(), sep=": ", file=sys.stdout)
