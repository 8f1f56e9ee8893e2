"""A class that hands in: notebooks of every kind that an instructor gets, with the points that each must get.

    python tests/make_class.py FOLDER --students 30 --workbook 04_attention
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
FIRST = "Ada Zoë Noor 李明 Søren Ewa Priya Tomás Ife Jürgen Mei Olga Yusuf Anaïs Kwame Ravi Lena Hugo Sara Tariq".split()
LAST = "Ash Åström Patel O'Neil-Smith García Nowak Okafor Müller Haddad Ivanova Tanaka Silva Berg Cohen Diallo Lindqvist".split()
KINDS = ("full", "half", "half", "wrong", "half", "empty", "colab", "attack", "half", "broken")  # one after the other
ATTACKS = "exit_at_once torch_equal_patched builtins_patched report_written threads_and_exit_handlers messages_forged many_processes".split()
BROKEN = (b"", b"{", b"<html><body>Sign in</body></html>", b'{"cells": []}', b"\x80\x81\x82")


class Workbook:
    """A workbook with its solution, and the answers that are known to be wrong."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.empty = json.loads((ROOT / "exercises" / f"{name}.ipynb").read_text(encoding="utf-8"))
        solved = json.loads((ROOT / "solutions" / f"{name}.ipynb").read_text(encoding="utf-8"))
        self.solved = {facts["name"]: "".join(cell["source"]) for cell in solved["cells"] if (facts := cell["metadata"].get("exercise"))}
        self.points = {facts["name"]: facts["points"] for cell in self.empty["cells"] if (facts := cell["metadata"].get("exercise"))}
        told = yaml.safe_load((ROOT / "tests" / "wrong_answers" / f"{name}.yaml").read_text(encoding="utf-8"))
        self.wrong = {exercise: [each["change"] for each in rows["wrong"] if "change" in each] for exercise, rows in told.items()}

    def filled(self, answers: dict[str, str]) -> dict:
        """The workbook with these answers."""
        made = json.loads(json.dumps(self.empty))
        for cell in made["cells"]:
            name = cell["metadata"].get("exercise", {}).get("name")
            if name in answers:
                cell["source"] = answers[name] if answers[name].startswith("# exercise:") else f"# exercise: {name} (keep this line)\n{answers[name]}"
        return made

    def subset(self, rng: random.Random) -> list[str]:
        return [name for name in self.points if rng.random() < 0.5]


def from_colab(made: dict) -> dict:
    """As Colab saves it: format 4.0, no ids, its own metadata."""
    for number, cell in enumerate(made["cells"]):
        cell.pop("id", None)
        cell["metadata"] = {"id": f"xYz{number:08d}", "colab": {"base_uri": "https://localhost:8080/"}}
    return {**made, "nbformat": 4, "nbformat_minor": 0}


def place(student: str, number: int, workbook: str) -> str:
    """Where a class download puts the file: Moodle, Canvas, a shared folder, a name of the student's own."""
    plain = "".join(part.lower() for part in reversed(student.replace("'", "").replace("-", "").split()))
    moodle, canvas = f"{student}_{10000 + number}_assignsubmission_file_", f"{plain}_LATE_{20000 + number}_{30000 + number}"
    return (f"{moodle}/{workbook}.ipynb", f"{canvas}_{workbook}-1.ipynb", f"{workbook} - {student}.ipynb",
            f"{student}/Copy of {workbook} (2).ipynb")[number % 4]  # fmt: skip


def make(folder: Path, workbook: str = "04_attention", students: int = 30, seed: int = 0) -> dict[str, dict]:
    """Write the class; for each file its kind and the points that it must get, None where it cannot be read."""
    book, rng, expected = Workbook(workbook), random.Random(seed), {}
    full = sum(book.points.values())
    for number in range(students):
        student, kind = f"{FIRST[number % len(FIRST)]} {LAST[(number * 3 + number // len(FIRST)) % len(LAST)]}", KINDS[number % len(KINDS)]
        answers, points = dict(book.solved), full
        if kind == "half":
            some = book.subset(rng)
            answers, points = {name: book.solved[name] for name in some}, sum(book.points[name] for name in some)
        elif kind == "empty":
            answers, points = {}, 0
        elif kind in ("wrong", "attack"):
            name = rng.choice([each for each, rows in book.wrong.items() if rows])
            points -= book.points[name]
            if kind == "wrong":
                answers[name] = changed(answers[name], rng.choice(book.wrong[name]))
            else:
                name_of = (ROOT / "tests" / "attacks" / f"{rng.choice(ATTACKS)}.py").read_text(encoding="utf-8")
                answers[name] = name_of.replace("def repeat(", f"def {name}(").partition("\n")[2]
        made = book.filled(answers)
        data = json.dumps(from_colab(made) if kind == "colab" else made, ensure_ascii=False).encode()
        if kind == "broken":
            data, points = rng.choice(BROKEN), None
        path = folder / place(student, number, workbook)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        expected[str(path.relative_to(folder))] = {"student": student, "kind": kind, "points": points}
    return expected


def changed(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--students", type=int, default=30)
    parser.add_argument("--workbook", default="04_attention")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps(make(given.folder, given.workbook, given.students, given.seed), indent=1, ensure_ascii=False))
