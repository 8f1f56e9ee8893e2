"""`python -m course compare RUN RUN ...`: what differs between runs, by how much, and whether that is more than noise.

Where two runs kept right or wrong for the same questions (results.json), the difference is tested question by question. Where several runs stand on
both sides (--against), the interval is over runs. Where there is neither, one number beside another is all that is known, and the table says so.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, variance

from course import artifacts
from course.report import GROUPS, LABELS, chart, show_value

EXAMPLE = """examples:
  python -m course compare 2026-01-01-cpu latest
  python -m course compare a1 a2 a3 --against b1 b2 b3 --out compare.html"""
SETTINGS = {"profile": "profiles", "data_name": "data", "max_steps": "--max-steps", "set": "changed settings (--set)"}
MARKS = {"real": "in", "maybe": "none", "noise": "none", "unknown": "none", "equal": "none"}


class CompareError(ValueError):
    """Runs that cannot be compared; the message says which and what to do."""


@dataclass
class Run:
    """What one run left behind."""

    label: str
    name: str
    folder: Path
    metrics: dict[str, float]
    curves: dict
    results: dict[str, dict[str, int]]
    state: dict


@dataclass
class Difference:
    """How much one side is above the other; low, high and p only where they could be estimated."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    how: str = ""
    verdict: str = "unknown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `course compare`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a name in runs/ or the path of a run; the first is what others are compared with")
    parser.add_argument("--against", nargs="+", metavar="RUN", default=[], help="a second group: mean against mean, interval over runs (seeds)")
    parser.add_argument("--out", type=Path, help="where the page goes (default: runs/compare.html)")
    parser.epilog = EXAMPLE


# -- reading


def find(name: str) -> Path:
    """The folder of a run: a name in runs/, else a path; CompareError where it is no run."""
    places = [artifacts.runs() / name, Path(name)]
    if name == "latest" and artifacts.latest():
        places.insert(0, artifacts.latest())
    for folder in places:
        if (folder / "metrics.json").is_file():
            return folder.resolve()
    there = next((folder for folder in places if folder.exists()), None)
    if there:
        raise CompareError(f"{name}: {there} is no run with results, it has no metrics.json; a run is made by `python -m course run`")
    known = sorted(path.parent.name for path in artifacts.runs().glob("*/metrics.json") if not path.parent.is_symlink())
    raise CompareError(f"{name}: there is no such run; runs here: {', '.join(known) or 'none yet'}")


def read(name: str, label: str) -> Run:
    """One run; CompareError names a file that is damaged."""
    folder = find(name)
    try:
        metrics, curves, results, state = (artifacts.read_json(folder / f"{part}.json", {}) for part in ("metrics", "curves", "results", "state"))
    except ValueError as error:
        raise CompareError(str(error)) from None
    if not isinstance(metrics, dict) or not all(isinstance(value, int | float) for value in metrics.values()):
        raise CompareError(f"{folder / 'metrics.json'}: expected one object, name to number; is this a run of the course?")
    return Run(label, folder.name, folder, metrics, curves, results, state)


def read_all(names: list[str], against: list[str]) -> tuple[list[Run], list[Run]]:
    """Both groups; without --against the second is empty. Runs are called A, B, ... or A1, A2, ..., B1, ..."""
    if len(names) + len(against) < 2:
        raise CompareError("one run alone: give at least two, such as `python -m course compare latest OTHER`")
    letters = [chr(ord("A") + i) if i < 26 else f"R{i + 1}" for i in range(len(names))]
    first = [read(name, f"A{i + 1}" if against else letters[i]) for i, name in enumerate(names)]
    second = [read(name, f"B{i + 1}") for i, name in enumerate(against)]
    folders = [run.folder for run in first + second]
    if twice := {run.name for run in first + second if folders.count(run.folder) > 1}:
        raise CompareError(f"{', '.join(sorted(twice))} is given twice: a run cannot be compared with itself")
    return first, second


def common_metrics(runs: list[Run]) -> list[str]:
    """Metrics that all runs have, in the order of the first; CompareError when there is none."""
    names = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    if not names:
        held = "; ".join(f"{run.name} has {', '.join(list(run.metrics)[:3]) or 'none'}" for run in runs)
        raise CompareError(f"no metric is common to all of these runs ({held}): did they run the same chapters?")
    return names


def remarks(runs: list[Run]) -> list[str]:
    """What makes a comparison unfair: said, not refused."""
    said = []
    for key, what in SETTINGS.items():
        values = {run.label: run.state.get(key) for run in runs if run.state}
        if len({str(value) for value in values.values()}) > 1:
            shown = ", ".join(f"{label} {' '.join(value) if isinstance(value, list) else value or 'none'}" for label, value in values.items())
            said.append(f"Different {what}: {shown}. A difference may come from that alone.")
    unfinished = [run.label for run in runs if run.state and run.state.get("status") != "done"]
    if unfinished:
        said.append(f"Not finished: {', '.join(unfinished)}.")
    if unknown := [run.label for run in runs if not run.state]:
        said.append(f"No state.json, so settings are not known: {', '.join(unknown)}.")
    return said


# -- differences


def t_table(df: float) -> tuple:
    """Angles a and P(|T| < t) for t = sqrt(df) tan(a), Student's t: in a the density is cos(a) to the df - 1, over a finite range."""
    import numpy as np

    angles = np.linspace(0, math.pi / 2, 20001)
    density = np.cos(angles).clip(0) ** (df - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return angles, below / below[-1]


def t_share(t: float, df: float) -> float:
    """Probability that |T| < t for Student's t with df degrees of freedom."""
    import numpy as np

    return float(np.interp(math.atan(t / math.sqrt(df)), *t_table(df)))


def t_quantile(df: float, share: float = 0.95) -> float:
    """The t for which |T| < t with probability `share`."""
    import numpy as np

    angles, below = t_table(df)
    return math.sqrt(df) * math.tan(np.interp(share, below, angles))


def over_runs(a: list[float], b: list[float]) -> Difference:
    """Mean of a minus mean of b, with Welch's interval over runs (Welch 1947); none with a single run on one side."""
    value = fmean(a) - fmean(b)
    if min(len(a), len(b)) < 2:
        return Difference(value, how="one run on one side: no interval", verdict="equal" if value == 0 else "unknown")
    how = f"over {len(a)} and {len(b)} runs"
    parts = variance(a) / len(a), variance(b) / len(b)
    error = math.sqrt(sum(parts))
    if error <= 1e-12 * max(map(abs, a + b), default=1):
        return Difference(value, value, value, 0.0 if value else 1.0, how + ", no spread", "real" if value else "equal")
    df = sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    half, p = t_quantile(df) * error, 1 - t_share(abs(value) / error, df)
    return Difference(value, value - half, value + half, p, f"{how}, p = {p:.2g}")


def over_questions(metric: str, a: Run, b: Run) -> Difference:
    """b minus a on the questions that both kept; without such, the plain difference and nothing about its size."""
    from minimind.evaluate import paired_difference

    plain = b.metrics[metric] - a.metrics[metric]
    mine, other = a.results.get(metric, {}), b.results.get(metric, {})
    shared = [question for question in mine if question in other]
    if not shared:
        why = "no question in common" if mine and other else "one run each: no interval"
        return Difference(plain, how=why, verdict="equal" if plain == 0 else "unknown")
    found = paired_difference([mine[q] for q in shared], [other[q] for q in shared])
    fewer = "" if len(shared) == len(mine) == len(other) else " in common"
    how = f"{len(shared)} questions{fewer}, p = {found['p']:.2g}"
    return Difference(found["difference"], found["low"], found["high"], found["p"], how)


def judge(differences: list[Difference]) -> None:
    """Fill in the verdicts. "real" must survive Holm's correction (1979) for all differences that were tested here."""
    tested = sorted((d for d in differences if d.p is not None and d.verdict == "unknown"), key=lambda d: d.p)
    holds = True
    for place, d in enumerate(tested):
        holds = holds and d.p < 0.05 / (len(tested) - place)
        outside = not d.low <= 0 <= d.high
        d.verdict = "noise" if d.p >= 0.05 or not outside else "real" if holds else "maybe"


def differences(first: list[Run], second: list[Run], metrics: list[str]) -> tuple[list[str], dict[str, list[Difference]]]:
    """Headings and, for each metric, one difference per heading."""
    if len(first) == len(second) == 1:
        table = {name: [over_questions(name, second[0], first[0])] for name in metrics}
        headings = [f"{first[0].label} - {second[0].label}"]
    elif second:
        table = {name: [over_runs(*([run.metrics[name] for run in group] for group in (first, second)))] for name in metrics}
        headings = ["A - B"]
    else:
        table = {name: [over_questions(name, first[0], run) for run in first[1:]] for name in metrics}
        headings = [f"{run.label} - {first[0].label}" for run in first[1:]]
    judge([d for row in table.values() for d in row])
    return headings, table


# -- words


def show_difference(d: Difference) -> str:
    """-0.028 (-0.048 to -0.01)"""
    interval = "" if d.low is None or d.verdict == "equal" else f" ({d.low:+.3g} to {d.high:+.3g})"
    return f"{d.value:+.3g}{interval}" if d.value else f"0{interval}"


def summary(table: dict[str, list[Difference]]) -> list[str]:
    """What to take from the table, in sentences."""
    by = {verdict: [name for name, row in table.items() for d in row if d.verdict == verdict] for verdict in MARKS}
    tested = len(by["real"]) + len(by["maybe"]) + len(by["noise"])
    said = [f"{len(table)} common metrics; {tested} differences could be tested."]
    if by["real"]:
        said.append(f"Real: {', '.join(dict.fromkeys(by['real']))}.")
    if by["maybe"]:
        said.append(f"Maybe (p below 0.05, but one of {tested} tests may be so by luck): {', '.join(dict.fromkeys(by['maybe']))}.")
    if by["noise"]:
        said.append(f"Noise: {', '.join(dict.fromkeys(by['noise']))}.")
    if by["unknown"]:
        said.append(f"Unknown for {len(by['unknown'])}: one run each and no results by question. Give several runs on each side with --against.")
    return said


def as_text(runs: list[Run], headings: list[str], table: dict[str, list[Difference]]) -> str:
    """The table for the terminal."""
    head = ["metric", *(run.label for run in runs), *(part for heading in headings for part in (heading, "verdict"))]
    lines = [head]
    for name, row in table.items():
        cells = [part for d in row for part in (show_difference(d), d.verdict)]
        lines.append([name, *(show_value(name, run.metrics[name]) for run in runs), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


# -- the page


def as_page(runs: list[Run], headings: list[str], table: dict[str, list[Difference]]) -> str:
    """One HTML file that needs no network, in the look of the report."""
    look = re.search(r"<style>.*?</style>", (Path(__file__).parent / "report.html").read_text(encoding="utf-8"), re.S)[0]
    named = "".join(f"<li><strong>{escape(run.label)}</strong>: {escape(run.name)}</li>" for run in runs)
    notes = "".join(f'<p class="small">{escape(note)}</p>' for note in remarks(runs))
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in summary(table))
    title = f"{len(runs)} runs compared"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n{look}\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n<ul>{named}</ul>\n{notes}</header>\n<main>\n"
        f'<section aria-labelledby="table">\n<h2 id="table">What differs</h2>\n{said}\n{page_table(runs, headings, table)}</section>\n'
        f"{page_curves(runs)}</main>\n<footer><p>{HOW}</p></footer>\n</body>\n</html>\n"
    )


HOW = (
    "Over questions: right and wrong on the same questions, McNemar's exact test and a bootstrap interval. Over runs: Welch's interval over runs on "
    "both sides. All intervals are 95%; a real difference also survives Holm's correction for the number of tests. This page needs no network."
)


def page_table(runs: list[Run], headings: list[str], table: dict[str, list[Difference]]) -> str:
    """The table, grouped by what stands before the slash."""
    number = lambda text: f'<th scope="col" class="number">{escape(text)}</th>'
    pairs = "".join(f'{number(heading)}<th scope="col">how</th><th scope="col">verdict</th>' for heading in headings)
    rows = [f'<div class="scroll"><table>\n<thead><tr><th scope="col">measured</th>{"".join(number(r.label) for r in runs)}{pairs}</tr></thead>\n']
    groups: dict[str, list[str]] = {}
    for name in table:
        groups.setdefault(name.split("/")[0], []).append(name)
    for group, names in groups.items():
        wide = 1 + len(runs) + 3 * len(headings)
        title = escape(GROUPS.get(group, group.replace("_", " ")))
        rows.append(f'<tbody><tr><th class="group" scope="rowgroup" colspan="{wide}">{title}</th></tr>\n')
        for name in names:
            label = escape(LABELS.get(name, name))
            code = f'<br><code class="soft">{escape(name)}</code>' if name in LABELS else ""
            values = "".join(f'<td class="number">{show_value(name, run.metrics[name])}</td>' for run in runs)
            found = "".join(
                f'<td class="number">{show_difference(d)}</td><td class="small">{escape(d.how)}</td>'
                f'<td><span class="mark {MARKS[d.verdict]}">{d.verdict}</span></td>'
                for d in table[name]
            )
            rows.append(f'<tr><th scope="row">{label}{code}</th>{values}{found}</tr>\n')
        rows.append("</tbody>\n")
    return "".join(rows) + "</table></div>\n"


def page_curves(runs: list[Run]) -> str:
    """Curves that at least two runs have, drawn together."""
    figures = []
    for name in dict.fromkeys(name for run in runs for name in run.curves):
        lines = {run.label: run.curves[name] for run in runs if len(run.curves.get(name, {"x": []})["x"]) > 1}
        if len(lines) < 2:
            continue
        any_line = next(iter(lines.values()))
        caption = "; ".join(f"{label} ends at {line['y'][-1]:.3g}" for label, line in lines.items()) + "."
        title = f"{name.replace('_', ' ')}: {any_line['y_label']}"
        svg = chart(lines, any_line["x_label"], any_line["y_label"], f"{title}. {caption}")
        figures.append(f"<figure>\n<h3>{escape(title)}</h3>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n")
    if not figures:
        return ""
    return f'<section aria-labelledby="curves">\n<h2 id="curves">Curves</h2>\n<div class="curves">\n{"".join(figures)}</div>\n</section>\n'


def main(args: argparse.Namespace) -> int:
    """Print the table, write the page; 1 where the runs cannot be compared."""
    try:
        first, second = read_all(args.runs, args.against)
        runs = first + second
        metrics = common_metrics(runs)
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    headings, table = differences(first, second, metrics)
    for run in runs:
        print(f"{run.label}: {run.name}")
    for note in remarks(runs):
        print(note)
    print(f"\n{as_text(runs, headings, table)}\n")
    print("\n".join(summary(table)))
    out = args.out or artifacts.runs() / "compare.html"
    try:
        artifacts.write_bytes(out, as_page(runs, headings, table).encode())
    except OSError as error:
        print(f"error: {out} cannot be written ({error}): give another place with --out", file=sys.stderr)
        return 1
    print(f"page: {out}")
    return 0
