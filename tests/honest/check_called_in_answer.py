"""Calls check, keep and the course's tools inside the answer cell."""


def submission(toy):
    answers = dict(toy.SOLUTIONS)
    answers["repeat"] = "from course.checks import core\n" + answers["repeat"] + '\n\n\ncheck("repeat")\nkeep()\nprint(core)'
    return toy.filled(answers)
