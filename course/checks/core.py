"""What all checks share: how one is registered, run, and told about.

A check is a function whose parameters are named after what the reader wrote. It goes from shape and type, through a case worked by hand and a
property, to a trusted implementation, and calls `fail`, `shaped` or `equal` where something is wrong. It may return a sentence to print.
"""

import inspect
import linecache
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

Likely = torch.Tensor | tuple[torch.Tensor, ...]  # what a mistake would give
REGISTERED: dict[str, dict[str, "Check"]] = {}  # module of checks -> exercise -> its check


class CheckFailed(AssertionError):
    """An answer that is not right: the likely mistake in words, and the smallest case that shows it."""

    def __init__(self, mistake: str, given: object = None, expected: object = None, got: object = None, exercise: str = "") -> None:
        self.mistake, self.given, self.expected, self.got, self.exercise = mistake, given, expected, got, exercise
        self.notes: list[str] = []
        super().__init__(mistake)

    def __str__(self) -> str:
        lines = [f"{self.exercise}: {self.mistake}" if self.exercise else self.mistake]
        lines += [f"  {name + ':':10}{show(value)}" for name in ("given", "expected", "got") if (value := getattr(self, name)) is not None]
        return "\n".join([*lines, *self.notes])

    def _render_traceback_(self) -> list[str]:
        """IPython shows this in place of a traceback through the course's own code."""
        return str(self).splitlines()


class NotWritten(CheckFailed):
    """A stub that nobody filled in yet."""


class NotKept(str):
    """A remark about an answer that is right, and that the package cannot use all the same."""


@dataclass
class Check:
    """The check of one exercise."""

    name: str
    function: Callable
    after: tuple[str, ...]  # exercises that this one builds on
    keeps: tuple[str, ...]  # names that keep() saves when it passes
    in_place: bool = False  # the answer's task is to change what it is given, such as a model that it trains

    @property
    def needs(self) -> list[str]:
        """The names that it takes from the reader's notebook."""
        return list(inspect.signature(self.function).parameters)


def exercise(name: str, after: Iterable[str] = (), keeps: Iterable[str] = (), in_place: bool = False) -> Callable:
    """Register a function as the check of an exercise; without `in_place`, what an answer writes into its arguments is dropped by the grader."""

    def register(function: Callable) -> Callable:
        REGISTERED.setdefault(function.__module__, {})[name] = Check(name, function, tuple(after), tuple(keeps), in_place)
        return function

    return register


# -- running one


def run(checks: dict[str, Check], name: str, namespace: dict) -> str | None:
    """Check an answer. CheckFailed says what is wrong; what is returned is a remark about a right one."""
    if name not in checks:
        raise KeyError(f"there is no exercise {name!r} here; there are {', '.join(checks)}")
    check = checks[name]
    try:
        return attempt(check, namespace)
    except CheckFailed as failure:
        failure.exercise = name
        if not isinstance(failure, NotWritten):
            failure.notes += unsure(checks, check, namespace)
        failure.__cause__ = failure.__context__ = None
        raise failure from None


def unsure(checks: dict[str, Check], check: Check, namespace: dict) -> list[str]:
    """A line for the first exercise that this one builds on and that is not right either."""
    for name in check.after:
        try:
            attempt(checks[name], namespace)
        except CheckFailed:
            return [f"  begin with {name}: this exercise uses it, and it does not pass its own check"]
    return []


def attempt(check: Check, namespace: dict) -> str | None:
    """Run the check on the reader's objects; whatever goes wrong in there becomes a CheckFailed."""
    objects = {}
    for needed in check.needs:
        if needed not in namespace:
            raise NotWritten(f"there is no {needed} in this notebook yet; run the cell that defines it")
        if namespace[needed] is ...:
            raise NotWritten(f"not written yet: put your answer in place of {needed} = ...")
        objects[needed] = namespace[needed]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return check.function(**objects)
    except CheckFailed:
        raise
    except Exception as error:
        raise explained(error, check, namespace) from None


def explained(error: Exception, check: Check, namespace: dict) -> CheckFailed:
    """What an exception inside the reader's code, or on the way into it, means."""
    frames, step = [], error.__traceback__
    while step is not None:
        frames.append((step.tb_frame, step.tb_lineno))
        step = step.tb_next
    theirs = [frame for frame in frames if frame[0].f_globals is namespace]
    called = [frame for frame in frames if frame[0].f_globals.get("__name__", "").startswith(f"{__package__}.") and frame[0].f_code is not RUNS]
    if isinstance(error, NotImplementedError) and (theirs or hasattr(error, "answer_line")):
        name = str(error) or check.name
        if name == check.name or name not in REGISTERED.get(check.function.__module__, {}):
            return NotWritten("not written yet: put your code in place of the line that raises NotImplementedError")
        return NotWritten(f"it calls {name}, which is not written yet; that exercise comes first")
    told = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    if line := getattr(error, "answer_line", ""):  # in the grader the answer runs in another process
        return CheckFailed(f"your code stopped with {told}", got=line)
    if theirs:
        line = line_of(*theirs[-1])
        return CheckFailed(f"your code stopped with {told}", got=f"line {theirs[-1][1]} of your cell: {line}", given=shapes(theirs[-1][0]))
    line = line_of(*called[-1]) if called else ""
    return CheckFailed(f"the check could not use it: {told}", given=line or None)


RUNS = attempt.__code__


def line_of(frame, number: int) -> str:
    return linecache.getline(frame.f_code.co_filename, number).strip()


def shapes(frame) -> str | None:
    """The tensors that a function was working on, by name and shape."""
    found = [f"{name} {tuple(value.shape)}" for name, value in frame.f_locals.items() if isinstance(value, torch.Tensor)]
    return ", ".join(found[:8]) or None


# -- what checks say


def show(value: object) -> str:
    """A value on few lines: small tensors as numbers, large ones as their shape."""
    if not isinstance(value, torch.Tensor):
        return str(value).replace("\n", "\n" + " " * 12)
    if value.numel() > 64:
        return f"a tensor {tuple(value.shape)}, {value.dtype}"
    kept = value.detach()
    if kept.dtype == torch.bool:
        kept = kept.int()
    rows = [str(row) for row in rounded(kept)] if kept.dim() == 2 else [str(rounded(kept))]
    return ("\n" + " " * 12).join(rows)


def rounded(tensor: torch.Tensor) -> object:
    """Nested lists with at most four digits."""
    def short(value):
        if isinstance(value, list):
            return [short(each) for each in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return short(tensor.tolist())


def fail(mistake: str, given: object = None, expected: object = None, got: object = None) -> None:
    """Say that the answer is wrong."""
    raise CheckFailed(mistake, given, expected, got)


def shaped(value: object, shape: Iterable[int], given: str, dtype: torch.dtype | None = None, hint: str = "") -> None:
    """The value is a tensor of this shape, and of this type."""
    if value is None:
        fail("it returns nothing; is there a `return`?", given)
    if not isinstance(value, torch.Tensor):
        fail(f"it returns a {type(value).__name__}, not a tensor", given, f"a tensor {tuple(shape)}", value)
    if tuple(value.shape) != tuple(shape):
        fail(hint or "the shape is not right", given, f"shape {tuple(shape)}", f"shape {tuple(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        fail(f"the numbers are of the wrong type: {value.dtype}", given, dtype, value.dtype)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """The same shape and, up to rounding, the same numbers; infinities and NaN must stand in the same places."""
    return a.shape == b.shape and torch.allclose(a.detach().double(), b.detach().double(), atol=tolerance, rtol=tolerance, equal_nan=True)


def equal(got: torch.Tensor, expected: torch.Tensor, given: object, mistake: str, likely: dict[str, Likely] | None = None,
          tolerance: float = 1e-4) -> None:  # fmt: skip
    """`got` equals `expected`; else the mistake whose result (one or more, in `likely`) is `got` is named, and `mistake` where none fits."""
    if close(got, expected, tolerance):
        return
    for words, wrong in (likely or {}).items():
        if any(close(got, each, tolerance) for each in (wrong if isinstance(wrong, tuple) else (wrong,))):
            mistake = words
            break
    else:
        if got.isnan().any() and not expected.isnan().any():
            mistake = f"some numbers are NaN. {mistake}"
    if got.shape == expected.shape and got.numel() > 64:  # show one number, not a thousand
        place = tuple(int(i) for i in torch.nonzero(~torch.isclose(got.double(), expected.double(), tolerance, tolerance, equal_nan=True))[0])
        given, expected, got = f"{given}; the first number that differs, at {list(place)}", expected[place], got[place]
    fail(mistake, given, expected, got)


def unchanged(name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    """A function must not write into what it was given. The grader keeps `after` as it was, and only marks it."""
    if not torch.equal(before, after) or getattr(after, "changed_by_answer", False):
        fail(f"it changes its argument {name} in place; make a new tensor", given=f"{name} {tuple(before.shape)}")
