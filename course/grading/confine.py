"""Shut a process in: limits, namespaces, another user, no network. Called in a child process before code that nobody trusts runs in it.

Two ways, the first that the system allows:
- namespaces: own root folder (the Python installation and the package `minimind`, read-only, and a small /tmp), own process numbers, no network
  devices, and where the grader is root another user beside;
- limits only: rlimits, and another user where the grader is root. Files that everybody may read are then within reach.

On both ways a filter of system calls (course/grading/syscalls.py) closes the network and what holds memory without showing it.

Memory. RLIMIT_AS bounds one process, and an answer may have several. Their sum is held by the keeper (course/grading/worker.py), which looks every
LOOK seconds and ends all of them above the limit, and by a control group where the system lets us make one. What can be taken between two looks is
what CORES processors can fill in that time: they write about 5 GB a second each, so about 0.2 GB at the usual delay, and never more than `processes`
times RLIMIT_AS. Not counted: files in /tmp and /dev/shm (`folder_bytes` each), and buffers of sockets and pipes (at most 0.5 GB at 16 processes of
128 files). The kernel, if it runs out of memory all the same, ends these processes first (oom_score_adj).
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import stat
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
SET_PDEATHSIG, SET_NO_NEW_PRIVS, SET_CHILD_SUBREAPER, CAPBSET_DROP, SET_DUMPABLE = 1, 38, 36, 24, 4
LOOK, CORES = 0.02, 2  # seconds between two looks at the memory of an answer; processors that its processes share
VISIBLE = ("minimind", "data")  # of the course, read-only


@dataclass
class Limits:
    """What one exercise may use."""

    cpu_seconds: int = 20
    wall_seconds: float = 60.0
    memory_bytes: int = 2 * 2**30  # of all processes together, beyond what torch itself takes
    file_bytes: int = 16 * 2**20
    folder_bytes: int = 64 * 2**20
    processes: int = 16  # and threads
    files: int = 128

    def plain(self) -> dict:
        return asdict(self)


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments) -> None:
    if getattr(libc(), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def prctl(option: int, *values: int) -> None:
    numbers = [ctypes.c_ulong(v) for v in (*values, 0, 0, 0, 0)[:4]]
    libc().prctl(option, *numbers)


def enter_namespaces() -> str:
    """New namespaces for this process and, for process numbers, its next children. Returns "root", "user" or "" (not allowed here)."""
    if not sys.platform.startswith("linux"):
        return ""
    plain = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    try:
        _call("unshare", plain)
        return "root"
    except OSError:
        pass
    try:
        _call("unshare", plain | NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        return "user"
    except OSError:
        return ""


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data.encode())


def needed_folders(root: Path) -> list[Path]:
    """What a Python process with torch reads, without the course, the home of anybody, or /tmp."""
    system = [Path(p) for p in ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime", "/sys/devices/system/cpu")]
    python = [Path(sys.base_prefix), Path(sys.prefix)]
    paths = [Path(p) for p in sys.path if p and Path(p).is_dir() and Path(p).name in ("site-packages", "dist-packages")]
    found: list[Path] = []
    for path in [*system, *python, *paths]:
        path = Path(os.path.abspath(path))
        inside_other = any(path.is_relative_to(other) for other in found)
        holds_course = root.is_relative_to(path) or path == Path("/")
        if path.exists() and not inside_other and not holds_course:
            found.append(path)
    return found


def new_root(root: Path, limits: Limits) -> None:
    """A root folder with only what is needed; the old one is out of reach afterwards."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    top = Path("/tmp") if Path("/tmp").is_dir() else Path("/var/tmp")
    shown = [(path, path.resolve()) for path in needed_folders(root)]
    descriptors = {}
    for path, real in [*shown, *((root / name, root / name) for name in VISIBLE if (root / name).exists())]:
        descriptors[path] = os.open(real, os.O_PATH)  # /tmp may hold some of them, and is about to be covered
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in ("null", "random", "urandom") if Path("/dev", name).exists()}
    mount("tmpfs", str(top), "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for name in ("tmp", "dev/shm"):  # first: the course itself may lie in /tmp
        (top / name).mkdir(parents=True)
        mount("tmpfs", str(top / name), "tmpfs", MS_NOSUID | MS_NODEV, f"size={limits.folder_bytes},nr_inodes=2000,mode=1777")
    for path, descriptor in descriptors.items():
        target = Path(f"{top}{path}")
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        mount(f"/proc/self/fd/{descriptor}", str(target), None, MS_BIND | MS_REC)
        flags = os.statvfs(target).f_flag & (MS_NODEV | MS_NOEXEC | 0xC00)
        mount("none", str(target), None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | flags)
        os.close(descriptor)
    for name, descriptor in devices.items():  # not /dev/zero: mapped, it is memory that belongs to no process
        (top / "dev" / name).touch()
        mount(f"/proc/self/fd/{descriptor}", str(top / "dev" / name), None, MS_BIND)
        os.close(descriptor)
    (top / "proc").mkdir(exist_ok=True)
    try:
        mount("proc", str(top / "proc"), "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)  # so oom_score_adj stays
    except OSError:  # inside a container that hides parts of /proc
        pass
    (top / "old").mkdir()
    os.chdir(top)
    _call("pivot_root", b".", b"old")
    os.chdir("/")
    _call("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")
    mount("none", "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, "size=1m,mode=755")


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


def drop_rights(number: int) -> bool:
    """Another user where we are root, no capabilities, and no way to get them back. True where the user changed."""
    changed = False
    if os.geteuid() == 0:
        for capability in range(64):
            prctl(CAPBSET_DROP, capability)
        try:
            os.setgroups([])
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
            changed = True
        except OSError:  # inside a user namespace with one user
            pass
    if sys.platform.startswith("linux"):
        header, data = _Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc().capset(ctypes.byref(header), data)
        prctl(SET_NO_NEW_PRIVS, 1)
        prctl(SET_DUMPABLE, 0)
    return changed


def end_with_parent() -> None:
    """End when the process that started this one ends, even if it is killed."""
    if sys.platform.startswith("linux"):
        prctl(SET_PDEATHSIG, signal.SIGKILL)


def first_to_go() -> None:
    """Let the kernel end this process and its children first when memory runs out, and give them few processors to fill it with."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        pass
    try:
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, random.SystemRandom().sample(mine, min(CORES, len(mine))))
    except (AttributeError, OSError):  # macOS
        pass


class Group:
    """A control group (version 2) of one answer, where one may be made: the kernel itself then holds the sum of memory, and counts all of it."""

    def __init__(self, limits: Limits, more: int, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> None:
        self.path: Path | None = None
        try:
            inside = next(line.partition("::")[2].strip("/") for line in own.read_text().splitlines() if line.startswith("0::"))
        except (OSError, StopIteration):
            return
        for parent in (root / inside, (root / inside).parent):  # beside our own group, where that one may have no children
            try:
                if not parent.is_relative_to(root) or "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                    continue
                path = parent / f"minimind-answer-{os.getpid()}-{os.urandom(3).hex()}"
                path.mkdir()
            except OSError:
                continue
            self.path = path
            try:
                self.set("memory.max", limits.memory_bytes + more)
                self.set("memory.oom.group", 1, needed=False)
                self.set("memory.swap.max", 0, needed=False)
                self.set("pids.max", limits.processes, needed=False)
                return
            except OSError:
                self.remove()

    def set(self, name: str, value: int, needed: bool = True) -> None:
        try:
            (self.path / name).write_text(str(value))
        except OSError:
            if needed:
                raise

    def add(self, pid: int) -> bool:
        """Put a process in; False where that is not allowed."""
        if not self.path:
            return False
        try:
            (self.path / "cgroup.procs").write_text(str(pid))
            return True
        except OSError:
            self.remove()
            return False

    def remove(self) -> None:
        for _ in range(50 if self.path else 0):  # its processes need a moment to be gone
            try:
                self.path.rmdir()
                break
            except OSError:
                time.sleep(0.02)
        self.path = None


def set_limits(limits: Limits) -> None:
    """The limits that every system has."""
    size = 0
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    wanted = {
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_NOFILE": limits.files,
        "RLIMIT_CORE": 0,
        "RLIMIT_AS": size + limits.memory_bytes if size else None,
    }
    for name, value in wanted.items():
        number = getattr(resource, name, None)
        if number is None or value is None:
            continue
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError):
            continue


def protection(namespaces: bool = True) -> str:
    """In words, which protection this machine has for running the answers of students; tried in a process of its own."""
    if not hasattr(os, "fork"):
        return "none: grading needs Linux or macOS (on Windows: WSL)"
    code = "from course.grading.confine import enter_namespaces; from course.grading.syscalls import install; print(enter_namespaces(), install())"
    command = [sys.executable, "-c", code]
    root = str(Path(__file__).resolve().parents[2])
    try:
        done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=30)
        way, _, filtered = done.stdout.strip("\n").partition(" ")
    except (OSError, subprocess.SubprocessError):
        way, filtered = "", ""
    user = "another user, " if os.geteuid() == 0 else ""
    calls = ", filter of system calls" if filtered == "True" else ""
    if way and namespaces:
        return "own root folder, processes and network, " + (user if way == "root" else "") + f"limits{calls}"
    network = "" if calls else ", and use the network"
    return f"{user}limits{calls} only: answers can read what everybody may read{network}"
