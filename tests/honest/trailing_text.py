"""Tabs, no newline at the end, form feeds, comments of several hundred lines, and emoji."""


def submission(toy):
    answers = dict(toy.SOLUTIONS)
    answers["repeat"] = "\n" * 30 + "# thinking… 🤔\n" * 300 + "def repeat(x, n):\n\t# NBVAL_SKIP\n\treturn x.repeat_interleave(n, dim=0)  # ✓\f"
    return toy.filled(answers)
