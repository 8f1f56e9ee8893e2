"""Take the outputs of an executed notebook into a chapter, without the noise that makes two executions differ."""

from __future__ import annotations

import json
import re
from pathlib import Path

from course.source import ROOT, BuildError, Chapter

WIDGET = "application/vnd.jupyter.widget-view+json"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,16}\b")
SCRATCH = re.compile(r"(?:/private)?(?:/tmp|/var/folders)/[\w./+-]*")
ABSOLUTE = re.compile(r"(?<![\w.~<:/)\]-])/(?!tmp/\.\.\.|proc/|dev/|content/)[A-Za-z][\w.+-]*(?:/[\w.+-]+)+")
TIMESTAMP = re.compile(r"\b\d{4}-\d{2}-\d{2}[ T]\d{2}:\d{2}(?::\d{2})?(?:[.,]\d+)?(?:Z|[+-]\d{2}:?\d{2})?")


def take_outputs(chapter: Chapter, notebook: dict, executed: dict, profile: str = "cpu", home: Path = ROOT) -> dict:
    """`notebook` with the outputs of `executed`, normalised; `home` is the course that ran it.

    Raises BuildError where the execution is of another source.
    """
    shown = f"the run of {chapter.name}"
    told = executed.get("metadata", {}).get("papermill", {})
    if told.get("exception"):
        raise BuildError([f"{chapter.where(chapter.cells[0])}: {shown} failed; its outputs are not taken"])
    if (ran := told.get("parameters", {}).get("profile", profile)) != profile:
        raise BuildError([f"{chapter.where(chapter.cells[0])}: {shown} used profile {ran}, not {profile}; its outputs are not taken"])
    results = {c.get("id"): c for c in executed["cells"] if c["cell_type"] == "code"}
    problems, cells, count = [], [], 0
    for cell, new in zip(chapter.cells, notebook["cells"], strict=True):
        if cell.kind == "code":
            ran = results.get(cell.id)
            if ran is None or "".join(ran["source"]) != "".join(new["source"]):
                problems.append(f'{chapter.where(cell)}: cell id="{cell.id}" has changed since {shown}; run the chapter again')
            elif ran.get("execution_count") is None and cell.code.strip():
                problems.append(f'{chapter.where(cell)}: cell id="{cell.id}" was not executed in {shown}')
            elif any(o["output_type"] == "error" for o in ran["outputs"]) and "raises-exception" not in cell.tags:
                problems.append(f'{chapter.where(cell)}: cell id="{cell.id}" ended with an error in {shown}')
            else:
                count += 1
                new = dict(new, outputs=normalise(ran["outputs"], count, home), execution_count=count)
        cells.append(new)
    if problems:
        raise BuildError(problems)
    return dict(notebook, cells=cells)


def normalise(outputs: list[dict], count: int | None, home: Path = ROOT) -> list[dict]:
    """The outputs of one cell: streams joined, widgets and terminal codes dropped, paths, times and addresses neutral."""
    kept: list[dict] = []
    for output in outputs:
        kind = output["output_type"]
        if kind == "stream":
            text = "".join(output["text"])
            if kept and kept[-1]["output_type"] == "stream" and kept[-1]["name"] == output["name"]:
                kept[-1]["text"] += text
            else:
                kept.append({"output_type": "stream", "name": output["name"], "text": text})
        elif kind in ("display_data", "execute_result"):
            data = {mime: clean_value(mime, value, home) for mime, value in output["data"].items() if mime != WIDGET}
            if not data or (WIDGET in output["data"] and set(data) == {"text/plain"}):
                continue  # a widget needs a kernel; the static figure beside it stays
            new = {"output_type": kind, "data": data, "metadata": output.get("metadata", {})}
            if kind == "execute_result":
                new["execution_count"] = count
            kept.append(new)
        elif kind == "error":
            trace = [clean_text(line, home) for line in output["traceback"]]
            kept.append({"output_type": "error", "ename": output["ename"], "evalue": clean_text(output["evalue"], home), "traceback": trace})
    for output in kept:
        if output["output_type"] == "stream":
            output["text"] = as_lines(clean_text(last_of_progress(output["text"]), home))
    return [o for o in kept if o["output_type"] != "stream" or o["text"]]


def clean_value(mime: str, value, home: Path = ROOT):
    """Text parts of an output are cleaned; pictures and JSON stay."""
    if mime.startswith("text/"):
        return as_lines(clean_text("".join(value), home))
    if mime.startswith("image/") and mime != "image/svg+xml":
        return "".join(value).strip()
    return value


def clean_text(text: str, home: Path = ROOT) -> str:
    """Without terminal colours, addresses, times of day, and paths of the machine that ran it."""
    text = ANSI.sub("", text)
    for path, name in ((str(home), "."), (str(ROOT), "."), (str(Path.home()), "~")):
        if len(path) > 1:
            text = re.sub(re.escape(path) + r"(?![\w-])", name, text)
    text = SCRATCH.sub("/tmp/...", text)
    return ADDRESS.sub("0x...", TIMESTAMP.sub("<time>", text))


def last_of_progress(text: str) -> str:
    """What a terminal shows after carriage returns: of each progress line, its last state."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def as_lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def without_outputs(notebook: dict) -> dict:
    """The notebook that the source alone determines."""
    cells = [dict(c, outputs=[], execution_count=None) if c["cell_type"] == "code" else c for c in notebook["cells"]]
    return dict(notebook, cells=cells)


def check_paths(chapter: Chapter, notebook: dict) -> list[str]:
    """Outputs that name a folder of the machine that ran them."""
    problems = []
    for cell, source in zip(notebook["cells"], chapter.cells, strict=True):
        for output in cell.get("outputs", []):
            parts = [output.get("text", ""), *(v for mime, v in output.get("data", {}).items() if mime.startswith("text/"))]
            for found in ABSOLUTE.findall("\n".join("".join(part) for part in parts))[:1]:
                shown = f"{chapter.path.parents[1].name}/{chapter.name}.ipynb"
                told = f"the output of {shown} names {found}, a path of one machine; print it relative to the course"
                problems.append(f'{chapter.where(source)}: cell id="{source.id}": {told}')
    return problems


def check_size(chapter: Chapter, notebook: dict, size: int, limit: int) -> list[str]:
    """Notebooks over the limit, with the cells that make them big."""
    if size <= limit:
        return []
    weights = {c["id"]: len(json.dumps(c.get("outputs", []))) for c in notebook["cells"]}
    heavy = sorted((c for c in chapter.cells if c.kind == "code"), key=lambda c: -weights[c.id])[:3]
    cells = ", ".join(f"{c.id} ({weights[c.id] / 1000:.0f} KB)" for c in heavy)
    told = f"has {size / 1000:.0f} KB, the limit is {limit / 1000:.0f}; largest: {cells}"
    return [f"{chapter.where(heavy[0])}: {chapter.path.parents[1].name}/{chapter.name}.ipynb {told}"]
