"""What a workbook gives its reader: check one answer, show one solution, keep what is right."""

import importlib
from pathlib import Path

from course import artifacts
from course.checks import core


class Desk:
    """The standard set-up of a workbook: `workbook = open_workbook("04_attention", globals())`."""

    def __init__(self, name: str, namespace: dict, solved: bool = False) -> None:
        self.name, self.namespace, self.solved = name, namespace, solved
        module = importlib.import_module(f"course.checks.{name.partition('_')[2]}")
        self.module: str = module.MODULE  # the module of minimind that this workbook rebuilds
        self.checks: dict[str, core.Check] = core.REGISTERED[module.__name__]

    def check(self, exercise: str) -> None:
        """Check the answer to one exercise; CheckFailed names the likely mistake and shows the smallest case."""
        remark = core.run(self.checks, exercise, self.namespace)
        print(f"{exercise}: right" + (f"; {remark}" if remark else ""))

    def solution(self, exercise: str) -> None:
        """Print the solution of one exercise, and no other."""
        from course import workbook

        try:
            print(workbook.load(self.name, artifacts.home()).solution(exercise))
        except (FileNotFoundError, KeyError) as error:
            print(error.args[0])

    def keep(self, folder: str | Path | None = None, replace: bool = False) -> None:
        """Save what passes its check to student/MODULE.py, to be used by `minimind` when MINIMIND_STUDENT=student.

        A file that has more than what passes now stays, unless `replace` is true.
        """
        from course.keep import save

        right, wrong = [], []
        for check in self.checks.values():
            if check.keeps:
                try:
                    remark = core.run(self.checks, check.name, self.namespace)
                except core.CheckFailed as failure:
                    remark = core.NotKept(failure.mistake)
                if isinstance(remark, core.NotKept):
                    wrong.append((check, remark))
                else:
                    right.append(check)
        if self.solved and folder is None:
            names = ", ".join(name for check in right for name in check.keeps)
            print(f"This is the solved workbook, so nothing is saved. In yours, keep() would save {names}.")
            return
        save(self, Path(folder) if folder else artifacts.home() / "student", right, wrong, replace)
