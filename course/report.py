"""A run in one page: runs/NAME/report.html, one file that opens anywhere without a network.

Everything in it is read from the run's folder: state.json, metrics.json, curves.json, answers.json, machine.json and its copy of the profile.
"""

import importlib.metadata
import math
import shlex
import time
from html import escape
from pathlib import Path

from course import artifacts
from course.chapter import describe_band
from course.profile import load_file
from course.run import clock

LABELS = {  # what people call the numbers that others read
    "pretrain/bits_per_byte": "bits per byte on held-out text",
    "pretrain/facts": "facts completed after pretraining",
    "sft/questions_seen": "questions answered, people known from the chats",
    "sft/questions_unseen": "questions answered, people never asked about before",
    "lora/new_facts": "new facts learned by the adapter",
    "lora/old_facts_lost": "old facts lost",
    "lora/weights_share": "weights trained",
    "dpo/preferred_before": "answers preferred before",
    "dpo/preferred_after": "answers preferred after",
    "dpo/facts_lost": "facts lost",
    "distill/gain_bits_per_byte": "gain of the student, bits per byte",
    "moe/gain_bits_per_byte": "gain over a dense model of equal active size, bits per byte",
    "generate/cache_speedup": "generation with the cache, times as fast",
    "course/seconds": "whole run",
    "course/peak_memory_bytes": "peak memory",
}
SHARES = {"pretrain/facts", "sft/questions_seen", "sft/questions_unseen", "lora/new_facts", "lora/old_facts_lost", "lora/weights_share"}
SHARES |= {"dpo/preferred_before", "dpo/preferred_after", "dpo/facts_lost"}
TILES = (
    "pretrain/bits_per_byte", "pretrain/facts", "sft/questions_unseen", "lora/new_facts", "dpo/preferred_after", "distill/gain_bits_per_byte",
    "generate/cache_speedup", "course/seconds", "course/peak_memory_bytes",
)  # fmt: skip
STAGES = {"pretrain": "after pretraining", "sft": "after SFT", "lora": "after LoRA", "dpo": "after DPO", "distill": "after distillation"}
GROUPS = {"sft": "SFT", "dpo": "DPO", "lora": "LoRA", "moe": "mixture of experts (MoE)", "rope": "RoPE", "course": "the whole run"}
PACKAGES = ("numpy", "tokenizers", "safetensors", "papermill", "nbclient", "ipykernel", "matplotlib")
MARKS = (  # circle, square, triangle, diamond, bar: told apart without colour
    "M{0:.1f} {1:.1f}m-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M{0:.1f} {1:.1f}m-5-5h10v10h-10z", "M{0:.1f} {1:.1f}m0-6l6 11h-12z",
    "M{0:.1f} {1:.1f}m0-7l6 7l-6 7l-6-7z", "M{0:.1f} {1:.1f}m-7-3h14v6h-14z",
)  # fmt: skip
DASHES = ("", "7 4", "2 4", "9 3 2 3", "4 2")


def write(folder: Path) -> Path:
    """Write report.html for the run in `folder` and return its path."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    path = folder / "report.html"
    artifacts.write_bytes(path, pages.get_template("report.html").render(collect(folder)).encode())
    return path


def collect(folder: Path) -> dict:
    """All that the page shows, as plain values."""
    state = artifacts.read_json(folder / "state.json")
    metrics, curves, answers, machine, replaced = (
        artifacts.read_json(folder / f"{name}.json", {}) for name in ("metrics", "curves", "answers", "machine", "replaced")
    )
    profile = load_file(folder / "profile.yaml")
    chapters, bands = state["chapters"], state["bands"]
    done = [entry for entry in chapters.values() if entry["status"] == "done"]
    failed = next(({**entry, "title": name.replace("_", " ")} for name, entry in chapters.items() if entry["status"] == "failed"), None)
    expected = dict(profile.bands)
    if state["only"] is None and state["status"] == "done":  # the budget of the profile is for all chapters
        expected.setdefault("course/seconds", (None, 60 * profile.budget.get("minutes", 1e9)))
        expected.setdefault("course/peak_memory_bytes", (None, 1e9 * profile.budget.get("memory_gb", 1e9)))
    groups = results(metrics, expected, bands)
    resume = f"python -m course run --resume --name {folder.name}"
    return {
        "name": folder.name,
        "title": headline(metrics, profile, state),
        "subtitle": subtitle(profile, state, metrics),
        "status": state["status"],
        "failed": failed,
        "done": len(done),
        "resume": resume,
        "notes": notes(state, replaced),
        "tiles": [
            {"value": minutes(metrics[name]) if name == "course/seconds" else show_value(name, metrics[name]), "label": LABELS[name]}
            for name in TILES
            if name in metrics
        ],
        "answers": questions(answers),
        "stages": stages(metrics),
        "panels": panels(curves),
        "groups": groups,
        "summary": summary([row for group in groups for row in group["rows"]]),
        "bands": bands,
        "bands_note": "The bands hold for the profile as it stands with its own data, so nothing is compared with them here.",
        "rows": [chapter_row(folder, name, entry, done) for name, entry in chapters.items()],
        "time_note": budget_note(profile, metrics, bands),
        "machine": machine_rows(machine),
        "versions": versions(machine),
        "command": command(state),
        "chat": f"python -m minimind.chat runs/{folder.name}/artifacts/sft" if artifacts.about(folder / "artifacts" / "sft") else "",
    }


# -- words


def headline(metrics: dict, profile, state: dict) -> str:
    """What this run achieved, in one sentence; only what was measured."""
    if state["max_steps"] or state["status"] == "failed":
        return f"Course run at profile {profile.name}"
    if "sft/questions_unseen" in metrics:
        return f"A language model that answers, trained here in {minutes(metrics['course/seconds'])}"
    if "pretrain/bits_per_byte" in metrics:
        return "A language model, pretrained here"
    return f"Course run at profile {profile.name}"


def subtitle(profile, state: dict, metrics: dict) -> str:
    """Model, profile, data, day."""
    source = state["data_name"]
    text = "the generated world" if source == "world" else Path(source).name if "/" in source else source
    day = time.strftime("%d %B %Y, %H:%M", time.localtime(state["started"]))
    return f"Model {profile.model}. Profile {profile.name}: {profile.machine}. Text: {text}. Started {day}."


def notes(state: dict, replaced: dict) -> list[str]:
    """What is special about this run."""
    found = [f"Changed in this run: {', '.join(state['set'])}."] if state["set"] else []
    if state["max_steps"]:
        found.append(f"Every training stopped after {state['max_steps']} steps: this shows that the code runs, and no more.")
    return found + [f"{sentence[0].upper()}{sentence[1:]}." for sentence in replaced.values()]


def summary(rows: list[dict]) -> str:
    """How many numbers lie where they should."""
    count = {mark: sum(row["mark"] == mark and row["band"] is not None for row in rows) for mark in ("in", "out")}
    banded, measured = count["in"] + count["out"], sum(row["value"] != "" for row in rows)
    if not banded:
        return f"{measured} numbers were measured."
    parts = [f"{measured} numbers were measured; {banded} have an expected band, and {count['in']} of them lie inside."]
    if count["out"]:
        parts.append(f"{count['out']} {'lies' if count['out'] == 1 else 'lie'} outside.")
    return " ".join(parts)


def budget_note(profile, metrics: dict, bands: bool) -> str:
    """Time and memory beside the budget of the profile."""
    allowed, memory = profile.budget.get("minutes"), profile.budget.get("memory_gb")
    if "course/seconds" not in metrics:
        return "No chapter is finished yet."
    used = f"{clock(metrics['course/seconds'])} and at most {metrics['course/peak_memory_bytes'] / 1e9:.2f} GB of memory"
    return f"{used}." + (f" The profile allows {allowed:g} minutes and {memory:g} GB." if allowed and memory and bands else "")


def command(state: dict) -> str:
    """The command that repeats a run."""
    words = ["python", "-m", "course", "run", "--profile", state["profile"]]
    if state["data_name"] != "world":
        words += ["--data", state["data_name"]]
    words += ["--only", state["only"]] if state["only"] else []
    words += ["--max-steps", str(state["max_steps"])] if state["max_steps"] else []
    return shlex.join(words + [word for change in state["set"] for word in ("--set", change)])


def show_value(name: str, value: float) -> str:
    """A number as people read it: 97%, 4.2 GB, 12 min 05 s, 1,234,000."""
    if name in SHARES:
        percent = 100 * value
        if percent in (0, 100) or 10 <= percent <= 99.5:
            return f"{percent:.0f}%"
        return f"{percent:.2g}%" if percent < 10 else f"{min(percent, 99.9):.1f}%"  # only all is 100%
    if name.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if name == "course/seconds":
        return clock(value)
    if name.endswith("speedup"):
        return f"{value:.1f} ×"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


# -- tables


def results(metrics: dict, bands: dict, compare: bool) -> list[dict]:
    """The metrics, grouped by what stands before the slash, each with its band and a verdict."""
    groups: dict[str, list] = {}
    for name, value in metrics.items():
        band = bands.get(name)
        if band is None or not compare:
            mark, verdict = "none", "no band" if band is None else "not compared"
        else:
            inside = (band[0] is None or value >= band[0]) and (band[1] is None or value <= band[1])
            mark, verdict = ("in", "✓ inside") if inside else ("out", "✗ outside")
        groups.setdefault(name.split("/")[0], []).append(
            {
                "name": name,
                "label": LABELS.get(name, name),
                "value": show_value(name, value),
                "band": band and show_band(name, band),
                "mark": mark,
                "verdict": verdict,
                "svg": bullet(value, band) if band else "",
            }
        )
    for name in bands if compare else ():  # an expected number that nobody measured must not go unseen
        if name not in metrics and name.split("/")[0] in groups:
            row = {"name": name, "label": LABELS.get(name, name), "value": "", "band": show_band(name, bands[name]), "svg": ""}
            groups[name.split("/")[0]].append({**row, "mark": "none", "verdict": "not measured"})
    ordered = sorted(groups.items(), key=lambda group: group[0] == "course")
    return [{"title": GROUPS.get(key, key.replace("_", " ")), "rows": rows} for key, rows in ordered]


def minutes(seconds: float) -> str:
    """A time without the odd seconds, for large print."""
    return clock(round(seconds / 60) * 60 if seconds >= 99.5 else seconds)


def show_band(name: str, band: tuple) -> str:
    """ "at least 90%" """
    if name in SHARES or name.endswith("_bytes") or name == "course/seconds":
        low, high = (None if limit is None else show_value(name, limit) for limit in band)
        return f"at most {high}" if low is None else f"at least {low}" if high is None else f"{low} to {high}"
    return describe_band(band)


def questions(answers: dict) -> dict | None:
    """One row for each question, one column for each stage."""
    if not answers:
        return None
    stages = sorted(answers, key=lambda stage: list(STAGES).index(stage) if stage in STAGES else len(STAGES))
    asked = list(dict.fromkeys(question for stage in stages for question in answers[stage]))
    return {
        "stages": [{"title": STAGES.get(stage, stage)} for stage in stages],
        "rows": [{"question": question, "texts": [answers[stage].get(question) for stage in stages]} for question in asked],
    }


def stages(metrics: dict) -> dict | None:
    """Each stage of the model with its size, speed and quality, as measured in chapter 15: a table and a picture."""
    found = {}
    for name, title in STAGES.items():
        values = {key: metrics.get(f"evaluate/{key}_{name}") for key in ("questions", "facts", "bits_per_byte", "parameters", "milliseconds")}
        if values["parameters"] is not None:
            found[title] = values | {"quality": values["questions"]}
    if len(found) < 2:
        return None
    share = lambda value: "" if value is None else f"{value:.0%}"
    number = lambda value, form: "" if value is None else format(value, form)
    tenth = lambda value: "" if value is None else short(round(value, 1))
    cells = lambda v: [short(v["parameters"]), tenth(v["milliseconds"]), share(v["facts"]), share(v["questions"]), number(v["bits_per_byte"], ".3f")]
    rows = [{"title": title, "cells": cells(v)} for title, v in found.items()]
    drawn = {title: v for title, v in found.items() if v["quality"] is not None and v["milliseconds"] is not None}
    told = "Questions answered against size (left) and against time for one answer (right): up and to the left is better."
    pictures = [
        scatter({title: (v[key], v["quality"]) for title, v in drawn.items()}, label, "questions answered", told)
        for key, label in (("parameters", "parameters"), ("milliseconds", "milliseconds for one answer")) if len(drawn) > 1
    ]  # fmt: skip
    return {"rows": rows, "pictures": pictures, "caption": told}


def chapter_row(folder: Path, name: str, entry: dict, done: list[dict]) -> dict:
    """One line of the table of time and memory."""
    row = {"title": name.replace("_", " "), "status": entry["status"], "link": ""}
    for file in (f"{name}.ipynb", f"{name}.partial.ipynb"):
        if not row["link"] and entry["status"] in ("done", "failed") and (folder / file).is_file():
            row["link"] = file
    if entry["status"] == "done":
        longest, largest = max(each["seconds"] for each in done), max(each["peak_memory_bytes"] for each in done)
        row.update(time=clock(entry["seconds"]), time_share=round(100 * entry["seconds"] / max(longest, 1e-9), 1))
        row.update(memory=f"{entry['peak_memory_bytes'] / 1e9:.2f} GB", memory_share=round(100 * entry["peak_memory_bytes"] / max(largest, 1), 1))
    return row


def machine_rows(machine: dict) -> list[tuple[str, str]]:
    """The hardware, in words."""
    words = {"processor": "processor", "cores": "cores", "memory_gb": "memory", "gpu": "GPU", "gpu_memory_gb": "GPU memory", "system": "system"}
    words |= {"bf16": "bfloat16 on the processor", "bf16_gpu": "bfloat16 on the GPU", "disk_free_gb": "free on disk"}
    unit = lambda key, value: f"{value:g} GB" if key.endswith("_gb") else str(value)
    return [(word, unit(key, machine[key])) for key, word in words.items() if machine.get(key) is not None]


def versions(machine: dict) -> list[tuple[str, str]]:
    """Python, torch, and the packages that the course stands on."""
    found = [(key, machine[key]) for key in ("python", "torch") if machine.get(key)]
    for package in PACKAGES if found else ("torch", *PACKAGES):
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# -- drawings, as SVG that takes its colours from the page


def panels(curves: dict) -> list[dict]:
    """Curves with the same axes whose names share what stands before the slash are drawn together."""
    groups: dict[tuple, dict] = {}
    for name, line in curves.items():
        if len(line["x"]) > 1:
            groups.setdefault((name.split("/")[0], line["x_label"], line["y_label"]), {})[name] = line
    found = []
    for (name, x_label, y_label), lines in groups.items():
        ends = "; ".join(
            f"{key.split('/', 1)[-1] if len(lines) > 1 else y_label} from {line['y'][0]:.3g} to {line['y'][-1]:.3g}" for key, line in lines.items()
        )
        heading = GROUPS.get(name, name.replace("_", " "))
        unit = "steps" if x_label == "step" else x_label
        caption = f"{ends[0].upper()}{ends[1:]}, over {short(max(line['x'][-1] for line in lines.values()))} {unit}."
        found.append({"title": f"{heading[0].upper()}{heading[1:]}: {y_label}", "svg": chart(lines, x_label, y_label, caption), "caption": caption})
    return found


def chart(lines: dict, x_label: str, y_label: str, description: str) -> str:
    """A line chart; each line has its own colour and its own dashes, and is named where it ends."""
    width, height, left, right, top, bottom = 520, 270, 52, 16 if len(lines) == 1 else 84, 12, 42
    xs, ys = ([value for line in lines.values() for value in line[axis]] for axis in "xy")
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys), 5)
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))
    place_x = lambda value: left + (value - x0) / ((x1 - x0) or 1) * (width - left - right)
    place_y = lambda value: height - bottom - (value - y0) / ((y1 - y0) or 1) * (height - top - bottom)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">']
    for value in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{place_y(value):.1f}" y2="{place_y(value):.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{place_y(value) + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in x_ticks:
        if x0 <= value <= x1:
            parts.append(f'<text x="{place_x(value):.1f}" y="{height - bottom + 18}" text-anchor="middle">{short(value)}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (height - bottom + top) / 2
    parts.append(f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{escape(y_label)}</text>')
    labels = spread([place_y(line["y"][-1]) for line in lines.values()], 14)
    for number, ((name, line), label) in enumerate(zip(lines.items(), labels, strict=True)):
        points = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in zip(line["x"], line["y"], strict=True))
        colour = f"var(--c{number % 5})"
        parts.append(f'<polyline class="curve" points="{points}" stroke="{colour}" stroke-dasharray="{DASHES[number % 5]}"/>')
        if len(lines) > 1:
            text = escape(name.split("/", 1)[-1][:14])
            x = width - right + 6
            parts.append(f'<text class="name" x="{x:.1f}" y="{label + 4:.1f}" style="fill:{colour}">{text}</text>')
    return "".join(parts) + "</svg>"


def scatter(points: dict[str, tuple[float, float]], x_label: str, y_label: str, description: str) -> str:
    """One mark and one name for each point; y is a share from 0 to 1."""
    width, height, left, right, top, bottom = 520, 250, 52, 120, 14, 42
    far = ticks(0, 1.05 * max(x for x, _ in points.values()), 4)
    place_x = lambda value: left + value / far[-1] * (width - left - right)
    place_y = lambda value: height - bottom - value * (height - top - bottom)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">']
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{place_y(value):.1f}" y2="{place_y(value):.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{place_y(value) + 4:.1f}" text-anchor="end">{value:.0%}</text>')
    parts += [f'<text x="{place_x(value):.1f}" y="{height - bottom + 18}" text-anchor="middle">{short(value)}</text>' for value in far]
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (height - bottom + top) / 2
    parts.append(f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{escape(y_label)}</text>')
    labels = spread([place_y(y) for _, y in points.values()], 15)
    for number, ((name, (x, y)), label) in enumerate(zip(points.items(), labels, strict=True)):
        a, b, style = place_x(x), place_y(y), f"fill:var(--c{number % 5})"
        parts.append(f'<line class="grid" x1="{a + 6:.1f}" y1="{b:.1f}" x2="{width - right + 2}" y2="{label:.1f}"/>')
        parts.append(f'<path d="{MARKS[number % 5].format(a, b)}" style="{style}"/>')
        parts.append(f'<text class="name" x="{width - right + 6}" y="{label + 4:.1f}" style="{style}">{escape(name)}</text>')
    return "".join(parts) + "</svg>"


def spread(places: list[float], gap: float) -> list[float]:
    """Move labels apart that would lie on each other, keeping their order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, this in zip(order, order[1:]):
        moved[this] = max(moved[this], moved[before] + gap)
    return moved


def bullet(value: float, band: tuple) -> str:
    """A small scale: the band as a bar, the result as a mark; an arrow where the result lies far off."""
    low, high = band
    if low is None or high is None:  # one open end: draw as much room on both sides of the limit
        limit = high if low is None else low
        room = max(abs(value - limit) * 1.25, abs(limit) * 0.25, 1e-9)
        start, end = limit - room, limit + room
    else:
        room = max((high - low) * 0.6, abs(high) * 0.02, 1e-9)
        start, end = low - room, high + room
    place = lambda number: 4 + 132 * min(max((number - start) / (end - start), 0), 1)
    a, b = place(start if low is None else low), place(end if high is None else high)
    mark = place(value)
    return (
        '<svg viewBox="0 0 140 18" style="width:8.75rem" aria-hidden="true">'
        '<line class="grid" x1="4" x2="136" y1="9" y2="9"/>'
        f'<rect x="{a:.1f}" y="4" width="{max(b - a, 1):.1f}" height="10" rx="2" style="fill:var(--band)"/>'
        f'<path d="M{mark:.1f} 1 v16" style="stroke:var(--ink);stroke-width:2.5"/></svg>'
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that cover low to high."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def short(value: float) -> str:
    """1500000 -> 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}"
