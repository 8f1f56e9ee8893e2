# exercise: repeat
"""Takes all the memory of the machine, in several processes."""
import os

kept = []
for _ in range(6):
    try:
        os.fork()
    except OSError:
        break
while True:
    try:
        kept.append(bytearray(os.urandom(2**20)) * 50)
    except MemoryError:
        pass
