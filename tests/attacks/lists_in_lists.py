# exercise: repeat
"""Returns a list in a list in a list, a list that holds itself, and numbers with a million digits."""


def repeat(x, n):
    value = []
    for _ in range(100_000):
        value = [value]
    value.append(value)
    return [value, 10**1_000_000]
