"""Magics and shell lines in the answers, also in the middle and as a cell magic."""


def submission(toy):
    answers = dict(toy.SOLUTIONS)
    answers["repeat"] = "%matplotlib inline\n!pip install einops\n" + answers["repeat"] + "\n%timeit -n1 repeat(torch.zeros(2, 2), 3)\nfiles = !ls"
    answers["steps"] = "steps = 128\nsteps?"
    made = toy.filled(answers)
    for cell in made["cells"]:
        if cell["id"] == "toy-mapped":
            cell["source"] = "%%time\n" + cell["source"]
    return made
