"""`python -m course run`: execute the chapters in order, and keep what they made in a folder of their own.

A run can be killed at any moment. What it knows stands in runs/NAME/state.json, which is replaced as a whole after every step: a chapter that is
marked done there, and whose artifacts are whole, is not run again by --resume.
"""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from course import artifacts
from course.profile import Profile, ProfileError, load, load_file

EXAMPLE = """examples:
  python -m course run                                 all chapters, with the profile that fits this machine
  python -m course run --profile smoke --only 4-8      a part, quickly
  python -m course run --resume                        go on with the newest run
  python -m course run --data my_texts/                the same course on your own text
  python -m course run --profile gpu --set model=minimind3"""
FREE_BYTES = 500_000_000  # less free space than this is not worth starting with


class RunError(RuntimeError):
    """A run that cannot start; the message says what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `course run`."""
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--profile", help="a file of profiles/: smoke, cpu, t4 or gpu (default: what fits this machine)")
    parser.add_argument("--data", help="a file or folder of text, or a name in data/manifest.yaml (default: what the profile says)")
    parser.add_argument("--only", metavar="4-8", help="a part of the chapters: 4, 4-8, 4-, or 1,4-8")
    parser.add_argument("--resume", action="store_true", help="go on with the newest run, or with the one that --name names")
    parser.add_argument("--name", help="the folder in runs/ (default: date, time and profile)")
    parser.add_argument("--max-steps", type=int, metavar="K", help="at most K steps in every training: shows that the code runs, teaches no model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the profile, such as model=minimind3")
    parser.add_argument("--cell-timeout", type=float, metavar="MINUTES", help="stop when one cell takes longer")


def main(args: argparse.Namespace) -> int:
    """Run, and turn what went wrong into words and an exit code: 1 a chapter failed, 2 the run could not start, 130 stopped."""
    try:
        return Run.open(args).execute()
    except (RunError, ProfileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2


def explain(error: OSError) -> str:
    """What to do about a full disk or a folder that may not be written."""
    where = error.filename or artifacts.runs()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full (while writing {where}). Make room, for example delete old folders in {artifacts.runs()}, then add --resume"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        wanted = f"Make {artifacts.runs()} a folder that you may write to, or name another one in MINIMIND_RUNS"
        return f"cannot write to {where} ({error.strerror}). {wanted}"
    return f"{where}: {error.strerror or error}"


class Run:
    """One folder in runs/, and what stands in its state.json."""

    def __init__(self, folder: Path, state: dict, cell_timeout: float | None = None) -> None:
        self.folder, self.state, self.cell_timeout = folder, state, cell_timeout
        self.root = artifacts.home()
        self.profile: Profile = load_file(folder / "profile.yaml", self.root)
        self.told: set[str] = set()

    # -- opening

    @classmethod
    def open(cls, args: argparse.Namespace) -> "Run":
        """The run that the options ask for: a new one, or an old one to go on with. Raises RunError and ProfileError before anything is written."""
        if args.max_steps is not None and args.max_steps < 1:
            raise RunError(f"--max-steps {args.max_steps}: expected a whole number of at least 1")
        if args.cell_timeout is not None and args.cell_timeout <= 0:
            raise RunError(f"--cell-timeout {args.cell_timeout:g}: expected minutes, more than 0")
        if args.name is not None and (not re.fullmatch(r"[\w][\w.+-]*", args.name) or args.name in ("latest", "alone")):
            raise RunError(f"--name {args.name}: expected a plain name for a folder (letters, digits, - _ . +), not latest or alone")
        timeout = args.cell_timeout and args.cell_timeout * 60
        return cls._reopen(args, timeout) if args.resume else cls._new(args, timeout)

    @classmethod
    def _new(cls, args: argparse.Namespace, timeout: float | None) -> "Run":
        root = artifacts.home()
        student_modules()
        name = args.profile or _fitting_profile()
        profile = load(name, root, args.set)
        chapters = select(args.only, all_chapters(root))
        source = args.data or profile.data
        data = resolve_data(source, root)
        if args.data and Path(source).exists():
            check_data(data, source)
        state = {
            "profile": profile.name, "set": args.set, "data": data, "data_name": source, "only": args.only, "max_steps": args.max_steps,
            "chapters": {chapter: {"status": "waiting"} for chapter in chapters}, "started": time.time(), "status": "running",
            "bands": not args.set and args.max_steps is None and source == profile.data,
        }  # fmt: skip
        folder = _new_folder(args.name or f"{time.strftime('%Y-%m-%d-%H%M%S')}-{profile.name}")
        _keep_profile(folder, profile)
        artifacts.write_json(folder / "state.json", state)
        return cls(folder, state, timeout)

    @classmethod
    def _reopen(cls, args: argparse.Namespace, timeout: float | None) -> "Run":
        folder = artifacts.runs() / args.name if args.name else artifacts.latest()
        if folder is None or not (folder / "state.json").is_file():
            raise RunError(f"--resume: there is no run {args.name or ''} in {artifacts.runs()} to go on with; start one without --resume")
        state = artifacts.read_json(folder / "state.json")
        same = {"profile": args.profile, "data_name": args.data, "only": args.only, "max_steps": args.max_steps, "set": args.set or None}
        for key, wanted in same.items():
            if wanted is not None and wanted != state[key]:
                option = f"--{key.removesuffix('_name').replace('_', '-')}"
                was = f"{folder.name} was started with {option} {state[key] or 'left out'}, not {wanted}"
                raise RunError(f"--resume: {was}; leave {option} out, or start a new run")
        try:  # a repair of the profile counts from here on
            profile = load(state["profile"], artifacts.home(), state["set"])
        except ProfileError as error:
            raise RunError(f"--resume: {error}") from None
        if profile.raw != load_file(folder / "profile.yaml").raw:
            print(f"{profile.file} has changed since this run began; the chapters that are left use it as it is now")
            _keep_profile(folder, profile)
        return cls(folder, state, timeout)

    # -- running

    def execute(self) -> int:
        """Run what is not done yet; 0 when all chapters are."""
        from filelock import FileLock, Timeout

        try:
            lock = FileLock(self.folder / ".lock").acquire(timeout=0)
        except Timeout:
            who = f"another `course run` is at work in {self.shown(self.folder)}"
            raise RunError(f"{who}; wait for it, or start a new run without --resume") from None
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            with lock:
                self._clean()
                return self._chapters()
        except KeyboardInterrupt:
            self._save(status="stopped")
            print(f"\nstopped. Go on with: {self.resume_command()}", file=sys.stderr)
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)

    def _clean(self) -> None:
        """What a killed run left: a kernel that still works, half-written files."""
        state = artifacts.read_json(self.folder / "state.json")  # now that nobody else has it
        self.state = state
        pid, born, scratch = state.get("kernel") or (None, None, None)
        if pid and psutil.pid_exists(pid):
            try:
                if abs(psutil.Process(pid).create_time() - born) < 1:
                    from course.execute import kill_group

                    kill_group(pid)
            except psutil.Error:
                pass
        if scratch and Path(scratch).name.startswith("course-"):
            shutil.rmtree(scratch, ignore_errors=True)  # its sockets
        for folder in (self.folder, self.folder / "artifacts"):
            artifacts.remove_leftovers(folder)
        for name, entry in state["chapters"].items():
            missing = [made for made in entry.get("artifacts", ()) if not artifacts.about(self.folder / "artifacts" / made)]
            if entry["status"] == "done" and missing:
                print(f"{name} runs again: artifact {', '.join(missing)} is damaged or gone")
                entry["status"] = "waiting"
        if (free := shutil.disk_usage(self.folder).free) < FREE_BYTES:
            room = f"only {free / 1e9:.2f} GB are free on the disk of {self.folder}, at least {FREE_BYTES / 1e9:.1f} are needed"
            raise RunError(f"{room}. Make room, then: {self.resume_command()}")
        artifacts.set_latest(self.folder)

    def _chapters(self) -> int:
        from course.execute import ChapterError

        chapters = self.state["chapters"]
        done = [name for name in chapters if chapters[name]["status"] == "done"]
        self._headline(len(done))
        self._describe_machine()
        self._save(status="running")
        for name in chapters:
            if name in done:
                continue
            try:
                self._chapter(name)
            except ChapterError as error:
                self._failed(name, error)
                return 1
            self._line(name)
        self._save(status="done", finished=time.time())
        self._totals()
        report = self._report()
        seconds = sum(entry["seconds"] for entry in chapters.values())
        print(f"\nall {len(chapters)} chapters done in {clock(seconds)}" + (f"; report: {report}" if report else ""))
        return 0 if report else 1

    def _chapter(self, name: str) -> None:
        from course.execute import ChapterError, execute

        notebook, entry = self.root / "chapters" / f"{name}.ipynb", self.state["chapters"][name]
        entry.clear()
        entry.update(status="running", started=time.time())
        before = self._made()
        self._save()
        begun = time.monotonic()

        def on_kernel(pid: int, folder: Path) -> None:
            self._save(kernel=[pid, psutil.Process(pid).create_time(), str(folder)])

        def on_cell(number: int, count: int) -> None:
            self._progress(f"  {title(name):22} cell {number} of {count}   {clock(time.monotonic() - begun)}")

        try:
            result = execute(
                notebook, self.folder / notebook.name, {"profile": self.profile.name}, self.environment(), self.cell_timeout, on_cell, on_kernel
            )
        except ChapterError as error:
            entry.update(status="failed", seconds=round(time.monotonic() - begun, 2), cell=error.cell, error=f"{error.name}: {error.message}"[:2000])
            self._save(status="failed", kernel=None)
            raise
        made = sorted(name for name, mark in self._made().items() if before.get(name) != mark)
        entry.update(status="done", seconds=round(result.seconds, 2), peak_memory_bytes=result.peak_memory_bytes, artifacts=made)
        self._save(kernel=None)
        self._totals()
        self._report()

    def _describe_machine(self) -> None:
        """Let a process of its own write down what this machine is, while the first chapter starts: it needs torch, and this one does not."""
        code = (
            "import sys; from pathlib import Path; from course import artifacts, machine; artifacts.write_json(Path(sys.argv[1]), machine.describe())"
        )
        path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), str(self.root)])
        command = [sys.executable, "-c", code, str(self.folder / "machine.json")]
        self.machine = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def environment(self) -> dict[str, str]:
        """What the chapters are told."""
        told = {
            "MINIMIND_RUN": self.folder,
            "MINIMIND_HOME": self.root,
            "MINIMIND_RUNS": artifacts.runs(),
            "MINIMIND_DATA": self.state["data"],
            "MINIMIND_MAX_STEPS": self.state["max_steps"] or "",
            "MINIMIND_BANDS": "on" if self.state["bands"] else "off",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")])),
            "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "true"),
        }
        return {key: str(value) for key, value in told.items()}

    def _made(self) -> dict[str, int]:
        """The artifacts that are whole, and when each was finished."""
        folders = (self.folder / "artifacts").glob("[!.]*") if (self.folder / "artifacts").is_dir() else ()
        return {folder.name: (folder / artifacts.MARKER).stat().st_mtime_ns for folder in folders if artifacts.about(folder)}

    def _save(self, **changes: object) -> None:
        self.state.update(changes)
        artifacts.write_json(self.folder / "state.json", self.state)

    def _totals(self) -> None:
        finished = [entry for entry in self.state["chapters"].values() if entry["status"] == "done"]
        totals = {
            "course/seconds": round(sum(entry["seconds"] for entry in finished), 2),
            "course/peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in finished),
        }
        artifacts.update_json(self.folder / "metrics.json", lambda metrics: metrics.update(totals))

    def _report(self) -> Path | None:
        from course import report

        try:
            return report.write(self.folder)
        except OSError:
            raise
        except Exception as error:  # hours of training must not be lost to a drawing
            print(f"the report could not be written: {type(error).__name__}: {error}", file=sys.stderr)
            return None

    # -- telling

    def _headline(self, done: int) -> None:
        state, count = self.state, len(self.state["chapters"])
        print(f"profile {self.profile.name} ({self.profile.machine}); model {self.profile.model}; data {state['data_name']}")
        print(f"results go to {self.shown(self.folder)}")
        for module, names in student_modules().items():
            print(f"your own: minimind.{module} ({', '.join(names)})")
        if state["set"]:
            print(f"changed in this run: {', '.join(state['set'])}")
        if state["max_steps"]:
            print(f"every training stops after {state['max_steps']} steps: this shows that the code runs, and no more")
        for sentence in replaced(self.profile, self.root):
            print(sentence)
            self.told.add(sentence)
        if done:
            print(f"{done} of {count} chapters are done already")
        if left := self.time_left():
            print(f"about {clock(left)} to go")

    def _line(self, name: str) -> None:
        """One line for a chapter that is done."""
        entry = self.state["chapters"][name]
        left = self.time_left()
        remaining = f"   about {clock(left)} left" if left else ""
        self._progress("")
        print(f"  {title(name):22}{clock(entry['seconds']):>11}   {entry['peak_memory_bytes'] / 1e9:5.2f} GB{remaining}", flush=True)
        for sentence in artifacts.read_json(self.folder / "replaced.json", {}).values():
            if sentence not in self.told:
                self.told.add(sentence)
                print(f"    {sentence}")

    def _progress(self, text: str) -> None:
        """A line that is written over by the next one, where somebody watches."""
        if sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="", flush=True)

    def _failed(self, name: str, error) -> None:
        self._progress("")
        entry = self.state["chapters"][name]
        self._report()
        print(f"  {title(name):22} FAILED after {clock(entry['seconds'])}\n\nchapters/{name}.ipynb, cell {error.cell!r}:\n")
        print("\n".join(f"    {line}" for line in error.source.splitlines()) + "\n")
        if error.traceback:
            print("\n".join(error.traceback.splitlines()[-40:]) + "\n")
        print(f"{error.name}: {error.message}")
        if "No space left" in error.message:
            print("The disk is full. Make room, for example by deleting old folders in runs/.")
        from course.execute import partial_path

        partial = partial_path(self.folder / f"{name}.ipynb")
        if partial.exists():
            print(f"\nThe notebook up to this cell: {self.shown(partial)}")
        print(f"Finished chapters are kept. After a repair go on with: {self.resume_command()}", flush=True)

    def resume_command(self) -> str:
        """The command that goes on with this run."""
        return "python -m course run --resume" + ("" if artifacts.latest() == self.folder else f" --name {self.folder.name}")

    def shown(self, path: Path) -> str:
        """A path as people see it from the root of the course."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def time_left(self) -> float | None:
        """Seconds until the end: what this machine needed last time, else what the profile expects, scaled by what is done."""
        expected, chapters = self.expected(), self.state["chapters"]
        rest = [name for name in chapters if chapters[name]["status"] != "done"]
        if not rest or any(name not in expected for name in rest):
            return None
        pairs = [(entry["seconds"], expected[name]) for name, entry in chapters.items() if entry["status"] == "done" and name in expected]
        took, thought = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        # A start with 60 seconds of trust in the estimate keeps the first, short chapters from deciding everything.
        return sum(expected[name] for name in rest) * (took + 60) / (thought + 60)

    def expected(self) -> dict[str, float]:
        """Seconds for each chapter."""
        expected = dict(self.profile.seconds)
        for path in sorted(artifacts.runs().glob("*/state.json"), key=lambda path: path.stat().st_mtime):
            if path.parent == self.folder or path.parent.is_symlink():
                continue
            try:
                other = json.loads(path.read_text())
                if all(other[key] == self.state[key] for key in ("profile", "set", "data", "max_steps")):
                    expected.update({name: entry["seconds"] for name, entry in other["chapters"].items() if entry["status"] == "done"})
            except (OSError, ValueError, KeyError):
                continue
        return expected


def student_modules() -> dict[str, list[str]]:
    """The modules that are the reader's own in this run, and what they have; RunError where MINIMIND_STUDENT names nothing."""
    from course import student

    try:
        return student.modules()
    except ImportError as error:
        raise RunError(str(error)) from None


def all_chapters(root: Path) -> list[str]:
    """The names of all chapters, in order."""
    names = sorted(path.stem for path in (root / "chapters").glob("[0-9][0-9]_*.ipynb"))
    if not names:
        raise RunError(f"there are no chapters in {root / 'chapters'}; `python -m course build` makes them")
    return names


def select(only: str | None, names: list[str]) -> list[str]:
    """The chapters that --only asks for: "4", "4-8", "4-", "-3", "1,4-8"."""
    if only is None:
        return names
    numbers = {int(name[:2]): name for name in names}
    chosen = set()
    for part in only.split(","):
        match = re.fullmatch(r"(\d*)(-?)(\d*)", part.strip())
        if not match or not (match[1] or match[3]):
            raise RunError(f"--only {only}: expected numbers of chapters such as 4, 4-8, 4- or 1,4-8")
        low = int(match[1] or min(numbers))
        high = int(match[3] or max(numbers)) if match[2] else low
        found = [number for number in numbers if low <= number <= high]
        if not found or (match[1] and low not in numbers) or (match[3] and high not in numbers):
            raise RunError(f"--only {only}: there is no chapter {part.strip()}; there are {min(numbers)} to {max(numbers)}")
        chosen.update(found)
    return [name for number, name in sorted(numbers.items()) if number in chosen]


def resolve_data(source: str, root: Path) -> str:
    """What --data means, as chapters read it: "world", "hf:owner/name", or the absolute path of a file or folder that is there."""
    if source == "world" or source.startswith("hf:"):
        return source
    path = Path(source).expanduser()
    if path.exists():
        path = path.resolve()
        if not os.access(path, os.R_OK):
            raise RunError(f"--data {source}: {path} may not be read; change its permissions")
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
        if not files:
            raise RunError(f"--data {source}: the folder {path} has no files")
        if not any(file.stat().st_size for file in files):
            raise RunError(f"--data {source}: {'the file is' if path.is_file() else 'all files are'} empty")
        return str(path)
    manifest = root / "data" / "manifest.yaml"
    sets = {}
    if manifest.is_file():
        from course.data import load_manifest

        sets = load_manifest(manifest)
    if source not in sets:
        known = f"data/manifest.yaml has no data set of that name (it has: {', '.join(sets) or 'none'})"
        raise RunError(f"--data {source}: there is no such file or folder, and {known}")
    folder = root / "data" / "downloads" / source
    stages = {file["stage"] for file in sets[source]["files"]}
    if not all((folder / stage).is_dir() and any((folder / stage).glob("*.jsonl.gz")) for stage in stages):
        from course.data import DownloadError, describe, get

        print(describe(source, sets[source]))
        try:
            get(source, sets[source], folder.parent)
        except DownloadError as error:
            raise RunError(f"--data {source}: {error}") from None
    return str(folder)


def check_data(data: str, source: str) -> None:
    """Read all of the given text once, before hours of work on it: RunError lists what is wrong with which line."""
    if data == "world" or data.startswith("hf:"):
        return
    code = "import sys; from minimind import data\ntry: data.check_stages(data.stage_sources(sys.argv[1]))"
    code += "\nexcept data.DataError as error: sys.exit(str(error))"
    if message := in_other_process(code, data)[1]:
        raise RunError(f"--data {source} cannot be used:\n{message}")


def in_other_process(code: str, *words: str) -> tuple[str, str]:
    """What a piece of Python prints, and its last words if it fails. What it imports, torch above all, leaves this process as small as it was."""
    path = os.pathsep.join(dict.fromkeys([str(artifacts.home()), str(Path(__file__).resolve().parent.parent)]))
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    error = done.stderr.strip()
    if error.startswith("Traceback"):
        error = error.splitlines()[-1]
    return done.stdout, (error or f"exit code {done.returncode}") if done.returncode else ""


def replaced(profile: Profile, root: Path) -> list[str]:
    """Sentences on what the profile asks for and this machine cannot do: device, precision."""
    if profile.device != "cuda" and profile.precision in ("auto", "fp32"):
        return []
    code = "import sys; from course.chapter import replaced; print(*replaced(*sys.argv[1:]), sep='\\n')"
    printed, error = in_other_process(code, profile.device, profile.precision)
    if error:
        raise RunError(f"cannot tell what this machine can do: {error}. `python -m course doctor` says more")
    return [line for line in printed.splitlines() if line]


def title(name: str) -> str:
    """04_attention -> 04 attention."""
    return name.replace("_", " ")


def clock(seconds: float) -> str:
    """45 s, 3 min 20 s, 1 h 05 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min" + f" {rest:02} s" * bool(rest) if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _keep_profile(folder: Path, profile: Profile) -> None:
    """Each run has its own copy of the profile, with the changes of --set."""
    artifacts.write_bytes(folder / "profile.yaml", yaml.safe_dump(profile.raw, sort_keys=False, allow_unicode=True).encode())


def _fitting_profile() -> str:
    printed, error = in_other_process("from course.machine import fitting_profile; print(*fitting_profile(), sep='\\n')")
    if error:
        raise RunError(f"cannot tell which profile fits this machine: {error}. Name one with --profile, or ask `python -m course doctor`")
    name, why = printed.splitlines()[:2]
    print(f"profile {name}: {why}")
    return name


def _new_folder(name: str) -> Path:
    """A folder that nobody has: NAME, or NAME-2, NAME-3 where that is taken."""
    artifacts.runs().mkdir(parents=True, exist_ok=True)
    for attempt in ["", *(f"-{number}" for number in range(2, 1000))]:
        folder = artifacts.runs() / f"{name}{attempt}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        if attempt:
            print(f"runs/{name} is there already and stays as it is; this run is {folder.name}")
        return folder
    raise RunError(f"there are a thousand runs named {name}; choose another --name")


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends a run like Ctrl-C does: the kernel is stopped and the state is written."""
    raise KeyboardInterrupt
