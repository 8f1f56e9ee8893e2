"""The function is defined twice in its cell (a first try above), with assertions and a main block below."""


def submission(toy):
    answers = dict(toy.SOLUTIONS)
    answers["repeat"] = "def repeat(x, n):\n    return x\n\n\n" + answers["repeat"] + "\n\n\nassert repeat(torch.ones(1, 1), 2).shape == (2, 1)\n" \
                        "if __name__ == '__main__':\n    print(repeat(torch.ones(1, 1), 2))"  # fmt: skip
    return toy.filled(answers)
