# exercise: repeat
"""Waits for ever without using the processor."""
import time


def repeat(x, n):
    while True:
        time.sleep(1000)
