"""One answer defines a helper that another one uses, and a later one replaces an earlier function."""


def submission(toy):
    answers = dict(toy.SOLUTIONS)
    answers["repeat"] += "\n\n\ndef summed(x, n):\n    return repeat(x, n).sum(0)"
    answers["total"] = "def total(x, n):\n    return summed(x, n)"
    answers["mapped"] += "\n\n\ndef summed(x, n):\n    raise ValueError('replaced later')"
    return toy.filled(answers)
