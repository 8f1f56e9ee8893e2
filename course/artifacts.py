"""Files that are either whole or absent.

Everything that a run leaves behind is written beside its place under another name, flushed, and then renamed. A folder is whole when it holds
`finished.json`, which lists its files and their sizes: a copy that was cut off, or a folder from a run killed in the middle, does not pass.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = "finished.json"


def home() -> Path:
    """The root of the course: chapters/, profiles/, data/ and runs/ lie in it. MINIMIND_HOME overrides it."""
    return Path(os.environ.get("MINIMIND_HOME") or Path(__file__).resolve().parent.parent).resolve()


def runs() -> Path:
    """The folder of all runs. MINIMIND_RUNS overrides it."""
    return Path(os.environ.get("MINIMIND_RUNS") or home() / "runs").resolve()


def latest() -> Path | None:
    """The newest run: what runs/latest points to, as a link or, where links are not allowed, as a file with its name."""
    pointer = runs() / "latest"
    if pointer.is_file():
        folder = runs() / pointer.read_text(encoding="utf-8").strip()
    else:
        folder = pointer.resolve() if pointer.is_symlink() else pointer
    return folder if folder.is_dir() and folder != pointer else None


def set_latest(folder: Path) -> None:
    """Let runs/latest point to `folder`; a reader sees the old or the new one, never none."""
    pointer = runs() / "latest"
    temporary = pointer.with_name(f".latest.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
        os.replace(temporary, pointer)
    except OSError:  # Windows without the right to make links; some network and memory-card file systems
        temporary.unlink(missing_ok=True)
        write_bytes(pointer, f"{folder.name}\n".encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically; NaN and infinity are refused, because other readers of JSON refuse them."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path, default: object = None) -> object:
    """The content of a JSON file, or `default` where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from None


def update_json(path: Path, change: Callable[[dict], object]) -> None:
    """Read a JSON object, let `change` edit it in place, write it back; two processes do not lose each other's edits."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=30):
        value = read_json(path, {})
        change(value)
        write_json(path, value)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


@contextmanager
def new_folder(target: Path, **about: object) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends without an error, and disappears otherwise.

    `about` goes into `finished.json` beside the sizes of the files, so that a reader can see where the folder comes from.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex[:8]
    temporary, old = (target.with_name(f".{target.name}.{tag}.{kind}") for kind in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        write_json(temporary / MARKER, {**about, "files": _sizes(temporary)})
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def about(folder: Path) -> dict | None:
    """What `finished.json` says about a folder, or None when the folder is not whole."""
    try:
        marker = read_json(folder / MARKER)
    except (ValueError, OSError):
        return None
    if not isinstance(marker, dict) or not isinstance(marker.get("files"), dict):
        return None
    sizes = _sizes(folder)
    return marker if all(sizes.get(name) == size for name, size in marker["files"].items()) else None


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left in `folder`: their temporary files and folders. Only for a folder nobody else writes to."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.(tmp|old)", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
