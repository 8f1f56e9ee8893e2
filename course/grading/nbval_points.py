"""For pytest: exercises and points in nbval's report of a graded notebook.

`pytest --nbval-lax NOTEBOOK` then names cells by what they are, adds their points to the XML report, and ends with the points of each exercise.
"""

from __future__ import annotations

import json
import os
import re

import pytest

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
RESULTS = pytest.StashKey[list]()


def pytest_addoption(parser) -> None:
    parser.addoption("--grade-results", help="write what happened to each cell of a graded notebook to this file, one JSON object a line")


def pytest_configure(config) -> None:
    config.stash[RESULTS] = []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items) -> None:
    for place, item in enumerate(items):
        told = dict(getattr(item, "cell", {}).get("metadata", {}).get("grade", {})) if type(item).__name__ == "IPyNbCell" else {}
        if told:
            name = item.cell.get("id", item.name)
            items[place] = named = type(item).from_parent(item.parent, name=name, cell_num=item.cell_num, cell=item.cell, options=item.options)
            named.user_properties += [(key, told[key]) for key in ("exercise", "points", "role") if told.get(key) not in (None, "")]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    told = getattr(item, "cell", {}).get("metadata", {}).get("grade") if type(item).__name__ == "IPyNbCell" else None
    if not told or not (report.when == "call" or report.outcome != "passed"):
        return
    if told["role"] == "canary" and report.when == "call":  # it must fail
        report.outcome = {"failed": "passed", "passed": "failed"}.get(report.outcome, report.outcome)
        report.longrepr = None if report.passed else "CANARY: a test that must fail has passed, so no result of this notebook can be trusted"
    texts = [output for output in item.test_outputs or [] if output.get("output_type") == "error"]
    reason = f"{texts[-1]['ename']}: {texts[-1]['evalue']}" if texts else str(call.excinfo.value) if call.excinfo else ""
    row = {"id": item.name, **told, "outcome": report.outcome, "reason": ANSI.sub("", reason)[:6000], "seconds": round(call.duration, 3),
           "printed": "".join(o.get("text", "") for o in item.test_outputs or [] if o.get("output_type") == "stream")[:4000]}  # fmt: skip
    item.config.stash[RESULTS].append(row)
    path = item.config.getoption("--grade-results")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def points(rows: list[dict]) -> dict[str, dict]:
    """Points by exercise: its check and every hidden test without points of its own must pass; hidden tests with points add theirs."""
    found: dict[str, dict] = {}
    exercises = dict.fromkeys(row["exercise"] for row in rows if row["role"] in ("answer", "check"))
    sound = all(row["outcome"] == "passed" for row in rows if row["role"] in ("canary", "begin"))
    for name in exercises:
        own = [row for row in rows if row["exercise"] == name and row["role"] != "canary"]
        worth = {row["id"]: row.get("points", 0) for row in own if row["role"] in ("check", "hidden")}
        needed = [row for row in own if row["role"] in ("answer", "check") or (row["role"] == "hidden" and not row["points"])]
        right = sound and {"answer", "check"} <= {row["role"] for row in needed} and all(row["outcome"] == "passed" for row in needed)
        passed = [row for row in own if row["outcome"] == "passed"]
        failed = [row for row in own if row["outcome"] != "passed"]
        found[name] = {
            "points": sum(row.get("points", 0) for row in passed if row["role"] in ("check", "hidden")) if right else 0,
            "of": sum(worth.values()), "seconds": round(sum(row["seconds"] for row in own), 3),
            "reason": "" if right and not failed else reason(failed[0]) if failed else "its cells were not run",
            "given": list(dict.fromkeys(re.findall(r"with the course's own (\w+)", "".join(row["printed"] for row in own)))),
        }  # fmt: skip
    return found


def reason(row: dict) -> str:
    """Why a cell failed, as the student should read it."""
    text = re.sub(r"^(CheckFailed|NotWritten|AnswerFailed|AssertionError): ", "", row["reason"]).removeprefix(f"{row['exercise']}: ")
    if row["role"] == "hidden":
        return f"a hidden test fails{': ' + row['what'] if row.get('what') else ''} ({text.strip() or 'assertion'})"
    return text.strip() or "the cell did not run"


def pytest_terminal_summary(terminalreporter) -> None:
    rows = terminalreporter.config.stash[RESULTS]
    if not rows:
        return
    terminalreporter.section("points")
    found = points(rows)
    for name, told in found.items():
        terminalreporter.write_line(f"{name:28} {told['points']:g} of {told['of']:g}   {told['reason'].partition(chr(10))[0][:100]}")
    terminalreporter.write_line(f"{'together':28} {sum(t['points'] for t in found.values()):g} of {sum(t['of'] for t in found.values()):g}")
