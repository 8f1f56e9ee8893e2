"""Uses a thread pool, seeds random numbers, and keeps a cache in a global and a file."""


def submission(toy):
    answers = dict(toy.SOLUTIONS)
    answers["mapped"] = (
        "from concurrent.futures import ThreadPoolExecutor\nimport json, tempfile, pathlib\n\nCACHE = {}\ntorch.manual_seed(3)\n\n\ndef mapped(f, values):\n"
        "    with ThreadPoolExecutor(1) as pool:\n        doubled = list(pool.map(lambda v: v, values))\n    CACHE[len(CACHE)] = doubled\n"
        "    path = pathlib.Path(tempfile.mkdtemp(), 'cache.json')\n    path.write_text(json.dumps(CACHE))\n    return [f(v) for v in json.loads(path.read_text())['0']]"
    )
    return toy.filled(answers)
