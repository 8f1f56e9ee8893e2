"""A small workbook for tests of the grader: its checks, its master notebook, its solutions, and submissions made of answers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SETUP = """import torch
from torch import nn

from tests.toy_workbook import opened

check = opened(globals())"""
STUBS = {
    "repeat": ('def repeat(x: torch.Tensor, n: int) -> torch.Tensor:\n    """Each row n times."""\n    raise NotImplementedError("repeat")', 2),
    "total": ('def total(x: torch.Tensor, n: int) -> torch.Tensor:\n    """The sum of the rows of repeat(x, n)."""\n'
              '    raise NotImplementedError("total")', 3),
    "Scale": ('class Scale(nn.Module):\n    """x times a learned factor for each column, 1 at the start."""\n\n'
              '    def __init__(self, width: int):\n        raise NotImplementedError("Scale")', 3),
    "steps": ("steps = ...  # your answer", 1),
    "mapped": ('def mapped(f, values: list) -> list:\n    """f of each value."""\n    raise NotImplementedError("mapped")', 1),
}  # fmt: skip
SOLUTIONS = {
    "repeat": "def repeat(x, n):\n    return x.repeat_interleave(n, dim=0)",
    "total": "def total(x, n):\n    return repeat(x, n).sum(0)",
    "Scale": "class Scale(nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
             "        self.factor = nn.Parameter(torch.ones(width))\n\n    def forward(self, x):\n        return x * self.factor",
    "steps": "steps = 128",
    "mapped": "def mapped(f, values):\n    return [f(v) for v in values]",
}  # fmt: skip
POINTS = {name: points for name, (_, points) in STUBS.items()}
FULL = sum(POINTS.values())


def opened(namespace: dict):
    """What the set-up cell of the toy workbook calls: its `check`."""

    def check(name: str) -> None:
        CHECKS[name](namespace[name])
        print(f"{name}: right")

    return check


def check_repeat(repeat) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    assert repeat(x, 2).shape == (6, 4), "the shape is not right"
    assert torch.equal(repeat(x, 2), x.repeat_interleave(2, dim=0)), "rows are in the wrong order"
    x.requires_grad_()
    repeat(x, 3).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 3.0)), "the gradient is lost"


def check_total(total) -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(total(x, 3), 3 * x.sum(0)), "the sum is not right"


def check_scale(made) -> None:
    layer = made(3)
    assert isinstance(layer, torch.nn.Module), "not a module"
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(layer(x), x), "the factor does not start at 1"
    factor = next(layer.parameters())
    with torch.no_grad():
        factor.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(layer(x), x * torch.tensor([1.0, 2.0, 3.0])), "the factor is not used"
    layer(x).sum().backward()
    assert torch.equal(factor.grad, x.sum(0)), "the factor does not learn"


def check_steps(steps) -> None:
    assert steps is not ..., "not written yet"
    assert steps == 128, "not the number of steps"


def check_mapped(mapped) -> None:
    seen = []
    result = mapped(lambda v: seen.append(v) or v * 10, [1, 2])
    assert list(result) == [10, 20] and seen == [1, 2], "not f of each value"


CHECKS = {"repeat": check_repeat, "total": check_total, "Scale": check_scale, "steps": check_steps, "mapped": check_mapped}


def code(source: str, identity: str, **metadata) -> dict:
    return {"cell_type": "code", "id": identity, "metadata": metadata, "source": source, "outputs": [], "execution_count": None}


def notebook(cells: list[dict], minor: int = 5) -> dict:
    return {"cells": cells, "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}}, "nbformat": 4, "nbformat_minor": minor}


def filled(answers: dict[str, str]) -> dict:
    """The workbook with these answers; the others stay stubs."""
    cells = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": "# Toy workbook"}, code(SETUP, "setup", id="setup")]
    for name, (stub, points) in STUBS.items():
        source = f"# exercise: {name} (keep this line)\n{answers.get(name, stub)}"
        about = {"id": f"toy-{name.lower()}", "tags": ["answer"], "nbgrader": {"grade_id": f"toy-{name.lower()}", "solution": True},
                 "exercise": {"name": name, "points": points, "minutes": 1, "difficulty": 1, "kind": "rebuild"}}  # fmt: skip
        cells.append(code(source, f"toy-{name.lower()}", **about))
        cells.append(code(f'check("{name}")', f"toy-{name.lower()}-check", id=f"toy-{name.lower()}-check", tags=["check"], check=name))
    return notebook(cells)


def write(path: Path, made: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


def write_master(folder: Path) -> Path:
    return write(folder / "90_toy.ipynb", filled({}))
