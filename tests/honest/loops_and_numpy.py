"""Slow, explicit loops, and numpy inside, where gradients allow it."""


def submission(toy):
    answers = dict(toy.SOLUTIONS)
    answers["repeat"] = "def repeat(x, n):\n    rows = []\n    for row in x:\n        for _ in range(n):\n            rows.append(row)\n    return torch.stack(rows)"
    answers["total"] = "import numpy as np\n\n\ndef total(x, n):\n    return torch.from_numpy(np.repeat(x.numpy(), n, axis=0).sum(axis=0))"
    answers["steps"] = "import numpy as np\n\nsteps = np.int64(2) ** 7"
    return toy.filled(answers)
