"""The package that the chapters build: one module for each chapter, generated from the notebooks.

Do not edit the files of this folder. Edit chapters/src and run `python -m course build`.

With the environment variable MINIMIND_STUDENT=student, the functions and classes in student/attention.py, which a workbook's keep() wrote,
take the place of those in minimind.attention, and so for every module that has a file there. `minimind.student_modules()` tells which.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path


def student_folder() -> Path | None:
    """The folder that MINIMIND_STUDENT names, from the root of the course; None if it names none. ImportError if it is not there."""
    name = os.environ.get("MINIMIND_STUDENT")
    if not name:
        return None
    folder = Path(os.environ.get("MINIMIND_HOME") or Path(__file__).resolve().parent.parent, Path(name).expanduser())
    if not folder.is_dir():
        raise ImportError(f"MINIMIND_STUDENT is {name!r}, and there is no folder {folder}. keep() at the end of a workbook "
                          "makes it; to use the course's own modules, unset the variable")  # fmt: skip
    return folder


def student_modules() -> dict[str, Path]:
    """The modules that are the reader's own, and their files."""
    folder, own = student_folder(), Path(__file__).parent
    return {path.stem: path for path in sorted(folder.glob("[a-z]*.py")) if (own / path.name).is_file()} if folder else {}


class _Both(SourceFileLoader):
    """Runs the course's own module, then puts the reader's names over it; what the reader has not written stays the course's."""

    def exec_module(self, module) -> None:
        super().exec_module(module)
        path = _STUDENT[module.__name__.rpartition(".")[2]]
        spec = importlib.util.spec_from_file_location(f"minimind_student_{path.stem}", path)
        mine = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(mine)
        except Exception as error:
            raise ImportError(f"your own {path.name} cannot be used: {type(error).__name__}: {error} (in {path})") from error
        for name in mine.__all__:
            setattr(module, name, getattr(mine, name))


class _Finder:
    """Finds the modules of this package that the reader has, before Python does."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.rpartition(".")[0] != __name__ or name.rpartition(".")[2] not in _STUDENT:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _Both(name, spec.origin)
        return spec


_STUDENT = student_modules()
if _STUDENT:
    sys.meta_path.insert(0, _Finder)
