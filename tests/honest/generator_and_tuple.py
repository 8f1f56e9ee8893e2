"""Returns a tuple or a generator where a list would do."""


def submission(toy):
    answers = dict(toy.SOLUTIONS, mapped="def mapped(f, values):\n    for value in values:\n        yield f(value)")
    return toy.filled(answers)
