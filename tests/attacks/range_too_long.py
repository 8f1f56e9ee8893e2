# exercise: mapped
"""Returns a range that is short to tell and fills all memory when it is made into a list."""


def mapped(f, values):
    return range(3 * 10**9)
