"""The answer cell was copied: the copy, with the same metadata and marker but a new id, holds the answer; the first one is still the stub."""


def submission(toy):
    made = toy.filled({name: text for name, text in toy.SOLUTIONS.items() if name != "repeat"})
    place = next(i for i, cell in enumerate(made["cells"]) if cell["id"] == "toy-repeat")
    copy = dict(made["cells"][place], id="f00dcafe", source="# exercise: repeat (keep this line)\n" + toy.SOLUTIONS["repeat"])
    made["cells"].insert(place + 1, copy)
    return made
