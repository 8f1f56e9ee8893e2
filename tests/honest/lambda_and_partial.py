"""Functions that are no `def`: a lambda, a partial, an object with __call__, a bound method, a decorated function."""


def submission(toy):
    answers = dict(toy.SOLUTIONS)
    answers["repeat"] = "repeat = lambda x, n: torch.repeat_interleave(x, n, dim=0)"
    answers["total"] = "class Total:\n    def __call__(self, x, n):\n        return repeat(x, n).sum(dim=0)\n\n\ntotal = Total()"
    answers["mapped"] = "import functools\n\n\n@functools.lru_cache\ndef unused():\n    pass\n\n\ndef _m(f, values, kind=list):\n    return kind(map(f, values))\n\n\n" \
                        "mapped = functools.partial(_m, kind=list)"  # fmt: skip
    return toy.filled(answers)
