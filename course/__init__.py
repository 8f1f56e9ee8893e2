"""The tools around the book: build, run, report, doctor, data, bench."""


def start(name: str, profile: str):
    """Open chapter `name` ("04_attention") at `profile`; the set-up cell of every chapter calls this."""
    from course.chapter import Chapter

    return Chapter(name, profile)
