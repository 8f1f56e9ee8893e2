# exercise: repeat
"""Overflows the stack of the interpreter."""
import ctypes
import sys

sys.setrecursionlimit(10**9)


def repeat(x, n):
    if n > 5:
        ctypes.string_at(0)
    return repeat(x, n)
