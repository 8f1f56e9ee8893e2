"""Measure what a process and everything below it use together, from outside, so that a limit holds for their sum.

Linux alone tells it (/proc). Counted is what has no file behind it: private memory, shared memory that is mapped, swap, page tables. First the quick
way, in which a page that two processes share since a fork counts twice, so that the sum is never too small; only where that is above the limit, the
kernel is asked for each process's share of its pages, which takes milliseconds and the right to look (root has it, another user may not).
"""

from __future__ import annotations

import os
import re

FIELDS = re.compile(rb"^(?:RssAnon|RssShmem|VmSwap|VmPTE):\s*(\d+) kB", re.MULTILINE)
SHARES = re.compile(rb"^(?:Pss_Anon|Pss_Shmem|SwapPss):\s*(\d+) kB", re.MULTILINE)
ENDED = re.compile(rb"^State:\s*[ZX]", re.MULTILINE)


class Meter:
    """The processes below one process. /proc is opened at once: it stays that of the whole machine when the root folder changes."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY) if os.path.isdir("/proc/self") else None
        self.quick = self.proc is not None and self.read(f"{top}/task/{top}/children") is not None

    def read(self, path: str) -> bytes | None:
        try:
            file = os.open(path, os.O_RDONLY, dir_fd=self.proc)
        except OSError:
            return None
        try:
            parts = []
            while part := os.read(file, 2**16):
                parts.append(part)
            return b"".join(parts)
        except OSError:
            return None
        finally:
            os.close(file)

    def below(self) -> list[int]:
        """All descendants. One that starts while we look is seen the next time."""
        if self.proc is None:
            return []
        found, todo = [], [self.top]
        table = None if self.quick else self.parents()
        while todo:
            pid = todo.pop()
            children = table.get(pid, []) if table is not None else self.children(pid)
            found += children
            todo += children
        return found

    def children(self, pid: int) -> list[int]:
        """Children of every thread of a process, as the kernel lists them."""
        try:
            threads = self.folder(f"{pid}/task")
        except OSError:
            return []
        return [int(child) for thread in threads for child in (self.read(f"{pid}/task/{thread}/children") or b"").split()]

    def folder(self, path: str) -> list[str]:
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.proc)
        try:
            return os.listdir(file)
        finally:
            os.close(file)

    def parents(self) -> dict[int, list[int]]:
        """Children by parent, from all processes of the machine: slower, for kernels that keep no lists of children."""
        children: dict[int, list[int]] = {}
        for entry in os.listdir(self.proc):
            if entry.isdigit() and (stat := self.read(f"{entry}/stat")):
                children.setdefault(int(stat.rpartition(b")")[2].split()[1]), []).append(int(entry))
        return children

    def bytes_of(self, pid: int) -> int:
        """Memory of one process; 0 when it is gone."""
        status = self.read(f"{pid}/status") or b""
        found = FIELDS.findall(status)
        if not found and ENDED.search(status):  # its first thread has ended, and others may go on
            try:
                rows = [FIELDS.findall(self.read(f"{pid}/task/{thread}/status") or b"") for thread in self.folder(f"{pid}/task")]
            except OSError:
                rows = []
            found = max(rows, key=len, default=[])
        return 1024 * sum(int(number) for number in found)

    def shares_of(self, pid: int) -> int:
        """Memory of one process, with its part of what it shares; all of it where the kernel does not tell."""
        found = SHARES.findall(self.read(f"{pid}/smaps_rollup") or b"")
        return 1024 * sum(int(number) for number in found) if found else self.bytes_of(pid)

    def used(self, allowed: int = 0) -> int:
        """Memory of all processes below together: never too small, and exact where it would be more than `allowed`."""
        pids = self.below()
        quick = sum(self.bytes_of(pid) for pid in pids)
        return quick if not allowed < quick < 4 * allowed else sum(self.shares_of(pid) for pid in pids)
