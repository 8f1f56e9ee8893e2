"""The set-up cell got one more import."""


def submission(toy):
    answers = dict(toy.SOLUTIONS, total="def total(x, n):\n    return functools.reduce(torch.add, repeat(x, n))")
    made = toy.filled(answers)
    made["cells"][1]["source"] += "\nimport functools"
    return made
