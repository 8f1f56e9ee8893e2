"""Save a reader's functions as a module of their own: student/attention.py, which imports alone and which `minimind` can use.

The text of a function is looked up where Python keeps it for tracebacks, so it is that of the very object that passed its check.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import linecache
import os
import shutil
import symtable
import sys
import uuid
from pathlib import Path
from types import FunctionType, ModuleType

from course import artifacts
from course.checks import core
from course.student import saved_names

PLAIN = (int, float, str, bool, bytes, type(None))
DRIVE = Path("/content/drive/MyDrive")  # where Colab shows the reader's Drive


class KeepError(RuntimeError):
    """Nothing was saved; the message says why."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def save(desk, folder: Path, right: list[core.Check], wrong: list[tuple[core.Check, str]], replace: bool = False) -> Path | None:
    """Write FOLDER/MODULE.py with what the right answers define; say what is missing. KeepError where that cannot work."""
    path = folder / f"{desk.module}.py"
    names = [name for check in right for name in check.keeps]
    for check, mistake in wrong:
        print(f"{', '.join(check.keeps)}: not saved, the course's own is used ({mistake.partition(':')[0]})")
    if not names:
        print("nothing to save: no exercise of the rebuild passes its check yet")
        return None
    if lost := sorted(set(saved_names(path)) - set(names)):
        if not replace:
            raise KeepError(f"{shown(path)} stays as it is: it has {', '.join(lost)}, which does not pass in this notebook now. "
                            "Run the cells above, then keep() again; or keep(replace=True) to save without.")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    text = module_text(desk, names)
    temporary = path.with_name(f".{path.stem}_{uuid.uuid4().hex[:8]}.py")
    try:
        temporary.write_text(text, encoding="utf-8")
        verify(temporary, desk, right)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"saved {', '.join(names)} to {shown(path)}")
    print(f"MINIMIND_STUDENT={shown(folder)} makes minimind.{desk.module} use them: "
          f"MINIMIND_STUDENT={shown(folder)} python -m course run --only 7")  # fmt: skip
    if "google.colab" in sys.modules:
        take_away(path)
    return path


def take_away(path: Path) -> None:
    """Colab throws its machine away: the file goes to the reader's Drive where it is mounted, else the browser downloads it."""
    if DRIVE.is_dir():
        target = DRIVE / "minimind" / "student" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{path.stem}_{uuid.uuid4().hex[:8]}.py")
        try:
            shutil.copyfile(path, draft)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
        print(f"and to your Drive: MINIMIND_STUDENT={target.parent} uses it from there, in any session")
    else:
        print("your browser downloads it too, because this machine is thrown away; drive.mount(\"/content/drive\") keeps it in your Drive instead")
        sys.modules["google.colab"].files.download(str(path))


def verify(path: Path, desk, right: list[core.Check]) -> None:
    """The file imports by itself, and what it has passes the same checks."""
    try:
        module = load(path)
    except Exception as error:
        raise KeepError(f"your functions do not work outside of this notebook, so nothing was saved: {type(error).__name__}: {error}") from None
    for check in right:
        try:
            core.run(desk.checks, check.name, vars(module))
        except core.CheckFailed as failure:
            raise KeepError(f"outside of this notebook {check.name} does not pass any more, so nothing was saved:\n{failure}") from None


def load(path: Path) -> ModuleType:
    """Run a file as a module that nobody else sees."""
    module = ModuleType(f"kept_{uuid.uuid4().hex[:8]}")
    module.__file__ = str(path)
    exec(compile(path.read_bytes(), path, "exec"), vars(module))  # a plain import would leave a __pycache__ beside the file
    return module


def shown(path: Path) -> str:
    home = artifacts.home()
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)


# -- the text of the module


def module_text(desk, names: list[str]) -> str:
    """The definitions of these names, with everything that they use."""
    definitions: dict[str, str] = {}
    imports: set[str] = set()
    constants: dict[str, str] = {}
    from_course: set[str] = set()
    package = f"minimind.{desk.module}"
    course_names = vars(importlib.import_module(package))
    kept = {name for check in desk.checks.values() for name in check.keeps}
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        if name in definitions:
            continue
        definitions[name] = text = source_of(desk.namespace[name], name)
        for used in sorted(used_names(text) - {name}):
            if used in names or used in definitions or (hasattr(builtins, used) and used not in desk.namespace):
                continue
            value = desk.namespace.get(used, core)  # `core` stands for nothing
            if value is core or (used in kept and used in course_names):
                if used not in course_names:
                    raise KeepError(f"{name} uses {used}, which this notebook does not define; nothing was saved")
                from_course.add(used)
            elif line := import_of(used, value):
                from_course.add(used) if line == f"from {package} import {used}" else imports.add(line)
            elif isinstance(value, PLAIN):
                constants[used] = f"{used} = {value!r}"
            elif isinstance(value, FunctionType | type):
                waiting.append(used)
            else:
                raise KeepError(f"{name} uses {used}, a {type(value).__name__} of this notebook, which cannot be saved with it; "
                                "make it an argument or a local variable. Nothing was saved")  # fmt: skip
    parts = [f'"""minimind.{desk.module}, as you wrote it in the workbook {desk.name}; keep() made this file."""']
    parts += ["\n".join(sorted(imports, key=lambda line: (line.startswith("from"), line)))] if imports else []
    if from_course:
        parts.append(f"from {package} import {', '.join(sorted(from_course))}  # the course's own")
    parts.append(f"__all__ = {names!r}")
    parts += ["\n".join(constants.values())] if constants else []
    # Helpers go first, then the exercises in their order: a class that another one extends must stand before it.
    order = [name for name in reversed(list(definitions)) if name not in names] + names
    return "\n\n".join(parts) + "\n\n\n" + "\n\n\n".join(definitions[name] for name in order) + "\n"


def source_of(value: object, name: str) -> str:
    """The text of a function or class, from the cell that defined it; a decorator such as no_grad may wrap it."""
    value = inspect.unwrap(value) if isinstance(value, FunctionType) else value
    function = value if isinstance(value, FunctionType) else next((f for f in vars(value).values() if isinstance(f, FunctionType)), None) \
        if isinstance(value, type) else None  # fmt: skip
    file = function.__code__.co_filename if function else ""
    lines = linecache.getlines(file)
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:
        tree = ast.Module([], [])
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
    if not found:
        raise KeepError(f"the text of {name} cannot be found; define it with def or class in a cell of its own. Nothing was saved")
    node = found[-1]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "".join(line for line in lines[first - 1 : node.end_lineno] if not line.lstrip().startswith(("### BEGIN ", "### END "))).rstrip()


def used_names(text: str) -> set[str]:
    """The global names that a definition uses, in its body, its defaults and its annotations."""
    found = set()

    def look(table: symtable.SymbolTable, top: bool) -> None:
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or top):
                found.add(symbol.get_name())
        for child in table.get_children():
            look(child, False)

    look(symtable.symtable(text, "<kept>", "exec"), True)
    return found


def import_of(name: str, value: object) -> str | None:
    """The line that imports this very object under this name, from its module or a public one above; None if there is none."""
    if isinstance(value, ModuleType):
        top, _, last = value.__name__.rpartition(".")
        if not top and last == name:
            return f"import {name}"
        return f"from {top} import {name}" if last == name else f"import {value.__name__} as {name}"
    home = getattr(value, "__module__", None)
    real = getattr(value, "__name__", name)
    candidates = [home, home and home.partition(".")[0], "torch", "math"]
    for module in dict.fromkeys(candidates):
        if module and module != "__main__" and module in sys.modules and not module.startswith("course"):
            for attribute in dict.fromkeys((real, name)):
                if getattr(sys.modules[module], attribute, None) is value:
                    return f"from {module} import {attribute}" + (f" as {name}" if attribute != name else "")
    return None
