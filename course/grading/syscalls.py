"""A filter of system calls (seccomp) for code that nobody trusts: what would hold memory that no process shows, open the network, or make new
namespaces is refused with an error. Any Linux program may give such a filter to itself; no rights are needed, and nothing takes it back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

SET_NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
NEW_NAMESPACES = 0x7E020000  # flags of clone
SHARED_ANONYMOUS = 0x21  # flags of mmap
NUMBERS = {  # the number of each call, by kind of processor
    "x86_64": (0xC000003E, {
        "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "shmat": 30, "msgget": 68, "semget": 64, "mq_open": 240, "io_uring_setup": 425,
        "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249, "ptrace": 101,
        "process_vm_readv": 310, "process_vm_writev": 311, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155,
        "chroot": 161, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "fanotify_init": 300, "sched_setaffinity": 203,
        "clone": 56, "clone3": 435, "socket": 41, "mmap": 9,
    }),
    "aarch64": (0xC00000B7, {
        "memfd_create": 279, "memfd_secret": 447, "shmget": 194, "shmat": 196, "msgget": 186, "semget": 190, "mq_open": 180, "io_uring_setup": 425,
        "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "keyctl": 219, "add_key": 217, "request_key": 218, "ptrace": 117,
        "process_vm_readv": 270, "process_vm_writev": 271, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41,
        "chroot": 51, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "fanotify_init": 262, "sched_setaffinity": 122,
        "clone": 220, "clone3": 435, "socket": 198, "mmap": 222,
    }),
}  # fmt: skip
LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # places in what the filter is shown


def program(machine: str) -> bytes:
    """The filter as instructions of the kernel's small machine: (code, jump if true, jump if false, value)."""
    architecture, numbers = NUMBERS[machine]
    numbers = dict(numbers)
    rows = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":  # the same calls under other numbers
        rows += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, ERROR | errno.ENOSYS)]

    def when(name: str, *then: tuple) -> None:
        rows.extend([(EQUAL, 0, len(then), numbers.pop(name)), *then])

    allow, refuse = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERROR | errno.EPERM)
    when("clone", (LOAD, 0, 0, ARGUMENTS), (ANY_BIT, 0, 1, NEW_NAMESPACES), refuse, allow)
    when("clone3", (RETURN, 0, 0, ERROR | errno.ENOSYS))  # its flags cannot be read here; the C library then uses clone
    when("socket", (LOAD, 0, 0, ARGUMENTS), (EQUAL, 1, 0, 1), (RETURN, 0, 0, ERROR | errno.EACCES), allow)  # 1: between processes, AF_UNIX
    when("mmap", (LOAD, 0, 0, ARGUMENTS + 8 * 3), (AND, 0, 0, SHARED_ANONYMOUS), (EQUAL, 0, 1, SHARED_ANONYMOUS), refuse, allow)
    for name in list(numbers):
        when(name, refuse)
    return b"".join(struct.pack("<HBBI", *row) for row in [*rows, allow])


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("rows", ctypes.c_void_p)]


def install() -> bool:
    """Filter the calls of this process and all that it starts, for ever. False where this is no Linux, or a processor that is not in the table."""
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    if not sys.platform.startswith("linux") or machine not in NUMBERS or struct.calcsize("P") != 8:
        return False
    text = program(machine)
    rows = ctypes.create_string_buffer(text, len(text))
    given = _Program(len(text) // 8, ctypes.addressof(rows))
    libc = ctypes.CDLL(None, use_errno=True)
    prctl = libc.prctl
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    prctl(SET_NO_NEW_PRIVS, 1, None, 0, 0)
    return prctl(SET_SECCOMP, FILTER, ctypes.addressof(given), 0, 0) == 0


if __name__ == "__main__":
    print("calls are filtered" if install() else "this system filters no calls", f"(process {os.getpid()})")
