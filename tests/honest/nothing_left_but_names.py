"""Ids, metadata and marker lines are all gone (pasted into a new notebook): each answer is known by what it defines."""


def submission(toy):
    cells = []
    for cell in toy.filled(toy.SOLUTIONS)["cells"]:
        source = "\n".join(line for line in cell["source"].splitlines() if not line.startswith("# exercise: steps"))
        keep_one = "# exercise: Scale" in cell["source"]
        cells.append(dict(cell, id="", metadata={}, source=source if keep_one else source.partition("(keep this line)\n")[2] or source))
    return toy.notebook(cells, minor=4)
