"""Prints a lot, warns, draws a figure, measures time, and tries its function in the answer cell."""


def submission(toy):
    answers = dict(toy.SOLUTIONS)
    answers["repeat"] += (
        "\n\nimport warnings, logging, time\nimport matplotlib.pyplot as plt\nwarnings.warn('mind the gap')\nlogging.warning('hm')\n"
        "print('hello ' * 100000)\nplt.plot([1, 2])\nplt.savefig('figure.png')\nplt.show()\ndisplay(repeat(torch.ones(2, 2), 2))\nrepeat(torch.ones(2, 2), 2)"
    )
    return toy.filled(answers)
