"""Other argument names, type hints with forward references, default values, a docstring in another alphabet."""


def submission(toy):
    answers = dict(toy.SOLUTIONS)
    answers["repeat"] = 'from __future__ import annotations\n\n\ndef repeat(матрица: "Tensor", раз: int = 2) -> "Tensor":\n    """Повторить каждую строку. 每行重复。"""\n' \
                        "    return матрица.repeat_interleave(раз, dim=0)"  # fmt: skip
    return toy.filled(answers)
