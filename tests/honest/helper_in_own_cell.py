"""A helper function and its import stand in a cell of the student's own."""


def submission(toy):
    answers = dict(toy.SOLUTIONS, repeat="def repeat(x, n):\n    return np_rows(x, n)")
    made = toy.filled(answers)
    made["cells"].insert(2, toy.code("import torch as t\n\nprint('my notes')\nK = 0\n\n\ndef np_rows(x, n):\n    return t.repeat_interleave(x, n, dim=K)", "aa11"))
    return made
