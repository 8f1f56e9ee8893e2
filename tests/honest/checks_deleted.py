"""All check cells and the text were deleted."""


def submission(toy):
    made = toy.filled(toy.SOLUTIONS)
    return dict(made, cells=[cell for cell in made["cells"] if "exercise" in cell["metadata"]])
