"""Grade notebooks: the answers of each go into a fresh master with its own checks, and nbval runs it.

What is left in the folder of results: grades.csv, grades.json, grades.xml (JUnit), overview.html, and for each student a page, the notebook that was
graded and result.json. A student whose result.json is there and belongs to the same file, master and hidden tests is not graded again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from course import artifacts
from course.grading import confine, graded, nbval_points, report
from course.grading.confine import Limits
from course.grading.submission import Master, SubmissionError, read_submission, student_name

VERSION = 2  # of result.json
EXAMPLE = """examples:
  python -m course grade handed_in/ --out grades/week4
  python -m course grade handed_in/ --hidden ~/hidden --out grades/week4 --jobs 2
  python -m course grade exercises/04_attention.ipynb          one notebook, into runs/grades"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("submissions", nargs="+", type=Path, metavar="SUBMISSION", help="notebooks, or folders of notebooks (a class download)")
    parser.add_argument("--hidden", type=Path, help="folder of hidden tests: NN_topic.py for the workbook NN_topic")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/grades); a second call goes on where the first stopped")
    parser.add_argument("--jobs", type=int, default=1, help="how many students at once (default: 1)")
    parser.add_argument("--master", type=Path, help="folder of the workbooks as they were handed out (default: exercises)")
    parser.add_argument("--seconds", type=int, default=20, help="processor seconds for one exercise (default: 20); three times that by the clock")
    parser.add_argument("--memory", type=float, default=2.0, help="GB of memory for one exercise (default: 2)")
    parser.add_argument("--no-namespaces", action="store_true", help="only limits and another user, also where the system could do better")
    parser.add_argument("--again", action="store_true", help="grade also what was graded before")


def main(args: argparse.Namespace) -> int:
    folder = args.master or artifacts.home() / "exercises"
    out = (args.out or artifacts.runs() / "grades").resolve()
    try:
        masters = read_masters(folder)
        if args.hidden and not args.hidden.is_dir():
            raise ValueError(f"--hidden {args.hidden}: there is no such folder")
        hidden = {m.name: hidden_tests(m, args.hidden) for m in masters}
        files = find_files(args.submissions)
    except (ValueError, SyntaxError, OSError) as error:
        print(f"grade: {error}", file=sys.stderr)
        return 2
    if not files:
        print("grade: there is no notebook (.ipynb) in what was given", file=sys.stderr)
        return 2
    limits = Limits(cpu_seconds=args.seconds, wall_seconds=3.0 * args.seconds, memory_bytes=int(args.memory * 2**30))
    return grade_all(files, masters, hidden, out, limits, args.jobs, not args.no_namespaces, args.again)


def read_masters(folder: Path) -> list[Master]:
    """The workbooks of a folder; ValueError where there is none."""
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.ipynb"))
    if not paths:
        raise ValueError(f"there is no workbook in {folder}: `python -m course build` makes exercises/, or name the folder with --master")
    return [Master.read(path) for path in paths]


def hidden_tests(master: Master, folder: Path | None) -> dict[str, list[dict]]:
    """The hidden tests of a workbook, from its source and from the instructor's folder."""
    found = graded.hidden_in_source(artifacts.home(), master)
    for name, tests in graded.read_hidden(folder, master).items():
        found.setdefault(name, []).extend(tests)
    return found


def find_files(given: list[Path]) -> list[Path]:
    """All notebooks of files and folders, without the copies that Jupyter and macOS leave."""
    found = []
    for path in given:
        if path.is_dir():
            there = sorted(path.rglob("*.ipynb"))
            found += [p for p in there if not {".ipynb_checkpoints", "__MACOSX"} & set(p.parts) and not p.name.startswith("._")]
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"{path}: there is no such file or folder")
    return list(dict.fromkeys(p.resolve() for p in found))


def grade_all(files, masters, hidden, out: Path, limits: Limits, jobs: int, namespaces: bool, again: bool) -> int:
    """Grade all files, `jobs` at a time, and write the tables."""
    from course.grading.sandbox import SERVER, Server

    students = out / "students"
    students.mkdir(parents=True, exist_ok=True)
    os.chmod(out, 0o700)  # the results are nobody else's, an answer's least of all
    for folder in students.iterdir():
        if folder.is_dir():
            artifacts.remove_leftovers(folder)
    server, begun = Server.start(), time.monotonic()
    os.environ[SERVER] = server.path
    print(f"answers run with: {confine.protection(namespaces)}", flush=True)
    try:
        with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            tasks = {pool.submit(grade_one, file, masters, hidden, students, limits, namespaces, again): file for file in files}
            for number, task in enumerate(as_completed(tasks), 1):
                result = task.result()
                told = f"{result['points']:g} of {result['of']:g}" if not result["error"] else f"not graded: {result['error']}"
                kept = "  (as before)" if result.pop("kept", False) else f"  {result['seconds']:.1f} s"
                print(f"[{number}/{len(files)}] {result['student']}: {told}{kept}", flush=True)
    finally:
        os.environ.pop(SERVER, None)
        server.stop()
    report.write_tables(out, [slug(file) for file in files])
    print(f"{len(files)} notebooks in {(time.monotonic() - begun) / 60:.1f} minutes: {out / 'overview.html'}")
    return 0


def slug(file: Path) -> str:
    """A folder name for a submission: readable, and one for each file."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{file.parent.name}-{file.stem}").strip("-")[-60:]
    return f"{name}-{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"


def grade_one(file: Path, masters, hidden, students: Path, limits: Limits, namespaces: bool, again: bool) -> dict:
    """Grade one file; whatever goes wrong is in the result, never an exception."""
    folder, begun = students / slug(file), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        key = fingerprint(file, masters, hidden, limits, namespaces)
        before = artifacts.read_json(folder / "result.json")
        if isinstance(before, dict) and before.get("key") == key and not again:
            return {**before, "kept": True}
    except (ValueError, OSError):
        key = ""
    student = student_name(file, *(master.name for master in masters))
    result = {
        "key": key, "version": VERSION, "file": file.name, "folder": file.parent.name, "student": student,
        "workbook": "", "points": 0.0, "of": 0.0, "error": "", "notes": [], "exercises": {}, "seconds": 0.0,
    }  # fmt: skip
    try:
        grade_into(result, file, masters, hidden, folder, limits, namespaces)
    except SubmissionError as error:
        result["error"] = str(error)
    except Exception as error:  # of the grader: this student waits, the others do not
        result["error"] = f"the grader stopped ({type(error).__name__}: {str(error)[:300]})"
        artifacts.write_bytes(folder / "grader_error.txt", traceback.format_exc().encode())
        result["key"] = ""  # tried again next time
    if result["error"]:
        of = {m.name: m.points for m in masters}
        result["of"] = of.get(result["workbook"]) or (masters[0].points if len(masters) == 1 else 0.0)
    result["seconds"] = round(time.monotonic() - begun, 2)
    report.write_student(folder / "report.html", result)
    artifacts.write_json(folder / "result.json", result)
    return result


def fingerprint(file: Path, masters, hidden, limits: Limits, namespaces: bool) -> str:
    """What a result depends on."""
    digest = hashlib.sha256(file.read_bytes())
    for master in masters:
        digest.update(master.path.read_bytes())
    digest.update(json.dumps([VERSION, hidden, limits.plain(), namespaces], sort_keys=True).encode())
    return digest.hexdigest()


def grade_into(result: dict, file: Path, masters, hidden, folder: Path, limits: Limits, namespaces: bool) -> None:
    submission, master = read_submission(file, masters)
    result.update(student=submission.student, workbook=master.name, of=float(master.points), notes=list(submission.notes))
    made = graded.build(master, submission, hidden[master.name], module_of(master), limits.plain(), namespaces)
    notebook = folder / "graded.ipynb"
    artifacts.write_bytes(notebook, (json.dumps(made["notebook"], indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    rows = run_nbval(notebook, made["plan"], limits)
    check_rows(rows, made["plan"])
    for name, told in nbval_points.points(rows).items():
        odd = submission.odd.get(name, [])
        told["odd"] = list(odd)
        if name in submission.claims and told["points"] < told["of"]:
            told["odd"].append("its saved output calls it right; outputs are not read")
        result["exercises"][name] = told
    result["points"] = float(sum(told["points"] for told in result["exercises"].values()))


def module_of(master: Master) -> str:
    """The module that a workbook rebuilds: its checks say so."""
    found = getattr(graded.checks_module(master.name), "MODULE", "")
    return f"minimind.{found}" if found else ""


def run_nbval(notebook: Path, plan: list[dict], limits: Limits) -> list[dict]:
    """Run a graded notebook with nbval in a process group of its own, and read what happened to each cell."""
    answers = sum(row["role"] == "answer" for row in plan)
    with tempfile.TemporaryDirectory(prefix="grade-") as scratch:
        rows = Path(scratch, "rows.jsonl")
        command = [
            sys.executable, "-m", "pytest", "-p", "nbval.plugin", "-p", "course.grading.nbval_points", "-p", "no:cacheprovider", "-q", "--no-header",
            "-c", os.devnull, "--rootdir", scratch, "--nbval-lax", "--nbval-current-env", "--nbval-kernel-startup-timeout", "180",
            "--nbval-cell-timeout", str(10 * limits.wall_seconds + 60), "--grade-results", str(rows), "--color", "no", str(notebook),
        ]  # fmt: skip
        environment = {
            **os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "JUPYTER_RUNTIME_DIR": f"{scratch}/run", "IPYTHONDIR": f"{scratch}/ipython",
            "JUPYTER_CONFIG_DIR": f"{scratch}/config", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        environment.pop("PYTEST_ADDOPTS", None)
        log = Path(scratch, "log.txt")
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                       start_new_session=True, preexec_fn=confine.end_with_parent)  # fmt: skip
            try:
                process.wait(300 + answers * (limits.wall_seconds * 2 + 10))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []
        if not found:
            raise RuntimeError(f"nbval ran no cell: {log.read_text(errors='replace')[-1500:]}")
        return found


def check_rows(rows: list[dict], plan: list[dict]) -> None:
    """Every cell of the plan was run, once; the canaries failed as they must. Else no result can be trusted."""
    by_id: dict[str, dict] = {}
    for row in rows:
        if row["id"] in by_id:
            raise RuntimeError(f"cell {row['id']} was reported twice")
        by_id[row["id"]] = row
    for told in plan:
        row = by_id.get(told["id"])
        if told["role"] in ("canary", "begin"):
            if row is None or row["outcome"] != "passed":
                what = "a test that must fail has passed" if told["role"] == "canary" and row else "the notebook could not be started"
                raise RuntimeError(f"{what} (cell {told['id']}): {(row or {}).get('reason', 'it was not run')[:300]}")


def csv_bytes(rows: list[list]) -> bytes:
    """CSV that a spreadsheet opens as it is: with a byte order mark, and no cell that it would take for a formula."""
    text = io.StringIO()
    safe = [[f"'{v}" if isinstance(v, str) and v[:1] in ("=", "+", "-", "@", "\t", "\r") else v for v in row] for row in rows]
    csv.writer(text, lineterminator="\r\n").writerows(safe)
    return text.getvalue().encode("utf-8-sig", "replace")
