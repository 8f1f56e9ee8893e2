"""Which modules of the package are the reader's own: what keep() saved, where MINIMIND_STUDENT points to it. Needs no torch."""

import ast
from pathlib import Path


def saved_names(path: Path) -> list[str]:
    """What a saved file says it has; nothing where there is no file or it is damaged."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    except (OSError, SyntaxError, ValueError, StopIteration):
        return []


def modules() -> dict[str, list[str]]:
    """The reader's modules that `minimind` uses here, and what each has. ImportError where MINIMIND_STUDENT names no folder."""
    import minimind

    return {name: saved_names(path) for name, path in minimind.student_modules().items()}
