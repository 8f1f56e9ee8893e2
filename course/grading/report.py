"""Pages and tables of a grading: one page for each student, and for the class CSV, JSON, JUnit XML and an overview."""

from __future__ import annotations

import html
import re
import statistics
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from course import artifacts

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #ccc; vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; } pre { white-space: pre-wrap; margin: 0; font-size: 13px; overflow-wrap: anywhere; }
.full { font-weight: 600; } .odd { color: #7a4b00; } svg { max-width: 100%; }
"""


def page(title: str, body: str) -> bytes:
    text = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">' \
           f"<title>{h(title)}</title><style>{STYLE}</style>\n<h1>{h(title)}</h1>\n{body}\n</html>\n"  # fmt: skip
    return text.encode("utf-8", "replace")


def h(text: object) -> str:
    return html.escape(str(text))


def write_student(path: Path, result: dict) -> None:
    """One student's page: points by exercise, with the reason for each lost point."""
    lines = [f"<p>{h(result['workbook'] or result['file'])}: <b>{result['points']:g} of {result['of']:g} points</b></p>"]
    if result["error"]:
        lines.append(f"<p>This notebook was not graded: {h(result['error'])}.</p>")
    if result["exercises"]:
        lines.append('<table><tr><th>Exercise<th class="n">Points<th>Why</tr>')
        for name, told in result["exercises"].items():
            full = told["points"] == told["of"]
            notes = list(told["odd"])
            if told["given"] and not told["reason"].startswith("not written yet"):
                are = "is" if len(told["given"]) == 1 else "are"
                notes.append(f"judged with the course's own {' and '.join(told['given'])}, because yours {are} not right")
            odd = "".join(f'<p class="odd">Note: {h(note)}.</p>' for note in notes)
            why = '<span class="full">right</span>' if full else f"<pre>{h(told['reason'])}</pre>"
            lines.append(f'<tr><td>{h(name)}<td class="n">{told["points"]:g} of {told["of"]:g}<td>{why}{odd}</tr>')
        lines.append("</table>")
    if result["notes"]:
        lines.append("<h2>Also noticed</h2><ul>" + "".join(f"<li>{h(note)}</li>" for note in result["notes"]) + "</ul>")
    artifacts.write_bytes(path, page(result["student"], "\n".join(lines)))


def read_results(out: Path, slugs: list[str]):
    """The results one at a time, so that a large class needs no more memory than a small one."""
    for slug in slugs:
        result = artifacts.read_json(out / "students" / slug / "result.json")
        if result:
            yield slug, result


def write_tables(out: Path, slugs: list[str]) -> None:
    """grades.csv, grades.json, grades.xml and overview.html of these submissions."""
    from course.grading.grade import csv_bytes

    exercises: dict[str, dict[str, float]] = {}
    for _, result in read_results(out, slugs):
        for name, told in result["exercises"].items():
            exercises.setdefault(result["workbook"], {})[name] = told["of"]
    columns = [(book, name) for book in sorted(exercises) for name in exercises[book]]
    many = len(exercises) > 1
    head = ["student", "folder", "file", "workbook", "points", "of"]
    rows = [[*head, *[f"{book}/{name}" if many else name for book, name in columns], "not graded because", "noticed", "lost points"]]
    whole, cases, count, lost = [], [], 0, 0
    for slug, result in read_results(out, slugs):
        told = result["exercises"]
        points = [told[name]["points"] if book == result["workbook"] and name in told else "" for book, name in columns]
        reasons = "; ".join(f"{name}: {first_line(t['reason'])}" for name, t in told.items() if t["reason"])
        odd = "; ".join([*result["notes"], *(f"{name}: {note}" for name, t in told.items() for note in t["odd"])])
        rows.append([*(result[key] for key in head), *points, result["error"], odd, reasons])
        whole.append({key: result[key] for key in (*head, "error", "notes", "exercises", "seconds")} | {"page": f"students/{slug}/report.html"})
        for name, t in told.items() or [("submission", {"points": 0, "of": 0, "reason": result["error"], "seconds": 0})]:
            count, lost = count + 1, lost + bool(t["reason"])
            cases.append(junit_case(slug, result, name, t))
    artifacts.write_bytes(out / "grades.csv", csv_bytes(rows))
    artifacts.write_json(out / "grades.json", whole)
    xml = f'<?xml version="1.0" encoding="utf-8"?>\n<testsuites><testsuite name="grades" tests="{count}" failures="{lost}" errors="0">\n'
    artifacts.write_bytes(out / "grades.xml", (xml + "\n".join(cases) + "\n</testsuite></testsuites>\n").encode("utf-8", "replace"))
    artifacts.write_bytes(out / "overview.html", overview(whole))


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]


def junit_case(slug: str, result: dict, name: str, told: dict) -> str:
    clean = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", told["reason"])
    failure = f"<failure message={quoteattr(first_line(clean))}>{escape(clean)}</failure>" if told["reason"] else ""
    about = f'<properties><property name="points" value="{told["points"]:g}"/><property name="of" value="{told["of"]:g}"/></properties>'
    student = re.sub(r"[^\t\x20-\ud7ff\ue000-\ufffd]", "?", result["student"])
    return f'<testcase classname={quoteattr(student + " " + slug[-8:])} name={quoteattr(name)} time="{told["seconds"]:g}">{about}{failure}</testcase>'


def overview(results: list[dict]) -> bytes:
    """The class on one page: who has what, which exercises were missed, how the points are spread, what it took."""
    graded = [r for r in results if not r["error"]]
    body = [f"<p>{len(results)} notebooks, {len(results) - len(graded)} of them could not be graded.</p>"]
    for book in sorted({r["workbook"] for r in graded}):
        own = [r for r in graded if r["workbook"] == book]
        of, points = max(r["of"] for r in own), [r["points"] for r in own]
        body.append(f"<h2>{h(book)}</h2><p>{len(own)} students; median {statistics.median(points):g} of {of:g} points, "
                    f"from {min(points):g} to {max(points):g}.</p>{histogram(points, of)}")  # fmt: skip
        body.append('<table><tr><th>Exercise<th class="n">Right<th class="n">Share<th class="n">Not written<th class="n">Seconds (median)'
                    "<th>Most frequent mistake</tr>")  # fmt: skip
        for name in own[0]["exercises"]:
            told = [r["exercises"][name] for r in own if name in r["exercises"]]
            right = sum(t["points"] == t["of"] for t in told)
            reasons = Counter(first_line(t["reason"]) for t in told if t["reason"])
            empty = sum(reasons.pop(reason) for reason in list(reasons) if reason.startswith("not written yet"))
            often = "".join(f"{reason} ({count})" for reason, count in reasons.most_common(1))
            seconds = statistics.median(t["seconds"] for t in told)
            body.append(f'<tr><td>{h(name)}<td class="n">{right} of {len(told)}<td class="n">{right / len(told):.0%}<td class="n">{empty or ""}'
                        f'<td class="n">{seconds:.2f}<td>{h(often)}</tr>')  # fmt: skip
        body.append("</table>")
    body.append('<h2>Students</h2><table><tr><th>Student<th>File<th class="n">Points<th>Noticed</tr>')
    for r in sorted(results, key=lambda r: r["student"].casefold()):
        odd = [*r["notes"], *(f"{name}: {note}" for name, t in r["exercises"].items() for note in t["odd"])]
        noticed = h(r["error"]) or "<br>".join(h(note) for note in odd)
        points = "not graded" if r["error"] else f"{r['points']:g} of {r['of']:g}"
        body.append(f'<tr><td><a href="{h(r["page"])}">{h(r["student"])}</a><td>{h(r["folder"])}/{h(r["file"])}'
                    f'<td class="n">{points}<td class="odd">{noticed}</tr>')  # fmt: skip
    body.append("</table>")
    return page("Class overview", "\n".join(body))


def histogram(points: list[float], of: float) -> str:
    """How the points are spread, as a picture with its numbers in words."""
    bins = 10
    counts = [0] * bins
    for value in points:
        counts[min(bins - 1, int(bins * value / of)) if of else 0] += 1
    labels = [f"{100 * i // bins}-{100 * (i + 1) // bins}%" for i in range(bins)]
    bars = ""
    for i, count in enumerate(counts):
        height, middle = 100 * count / max(counts), f'x="{i * 60 + 30}" text-anchor="middle"'
        bars += f'<rect x="{i * 60 + 8}" y="{120 - height:.1f}" width="44" height="{height:.1f}" fill="#3b6ea5"/>'
        bars += f'<text {middle} y="{115 - height:.1f}" font-size="12">{count or ""}</text><text {middle} y="136" font-size="11">{labels[i]}</text>'
    words = ", ".join(f"{label}: {count}" for label, count in zip(labels, counts) if count)
    return f'<svg viewBox="0 0 610 142" role="img" aria-label="Students by share of the points: {h(words)}">{bars}</svg>'
