"""The tools around the book: build, run, report, doctor, data, bench."""


def start(name: str, profile: str):
    """Open chapter `name` ("04_attention") at `profile`; the set-up cell of every chapter calls this."""
    from course.chapter import Chapter

    return Chapter(name, profile)


def open_workbook(name: str, namespace: dict, solved: bool = False):
    """Open the workbook of chapter `name`; the set-up cell of every workbook calls this with its own globals()."""
    from course.desk import Desk

    return Desk(name, namespace, solved)
