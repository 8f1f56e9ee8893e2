"""A tool gave all cells new ids: 1, 2, 3, ..."""


def submission(toy):
    made = toy.filled(toy.SOLUTIONS)
    for number, cell in enumerate(made["cells"]):
        cell["id"] = str(number)
        cell["metadata"].pop("id", None)
    return made
