"""`python -m course data list | show NAME | get NAME`: the public data sets of data/manifest.yaml.

The download itself is huggingface_hub's (resume, retries, progress). Around it stand the checks that it leaves to
its caller: is there room, is this the file that was meant (sha256), and do its lines have the course's form.
"""
import argparse
import gzip
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

HELP = "list and download public data sets"
EXAMPLE = "example: python -m course data get minimind"
ROOT = Path(__file__).resolve().parent.parent
STAGES = ("pretrain", "sft", "dpo")


class DownloadError(RuntimeError):
    """What went wrong with which file, and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `course data`."""
    parser.add_argument("action", choices=("list", "show", "get"), help="list all, show one, or get one")
    parser.add_argument("name", nargs="?", help="a name in data/manifest.yaml")
    parser.add_argument("--manifest", type=Path, default=ROOT / "data/manifest.yaml", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, default=ROOT / "data/downloads", help="where it goes (default: data/downloads)")


def load_manifest(path: Path) -> dict[str, dict]:
    """The data sets by name; ValueError names a missing or misspelled key."""
    sets = yaml.safe_load(path.read_text())
    for name, entry in sets.items():
        _keys(f"{path.name}: {name}", entry, {"about", "licence", "files"})
        for file in entry["files"]:
            _keys(f"{path.name}: {name}: {file.get('path')}", file, {"repo", "revision", "path", "stage", "size", "sha256", "rows"})
            if file["stage"] not in STAGES:
                raise ValueError(f"{path.name}: {name}: stage {file['stage']!r} is not one of {', '.join(STAGES)}")
    return sets


def _keys(where: str, given: dict, wanted: set[str]) -> None:
    if set(given) != wanted:
        raise ValueError(f"{where}: missing {sorted(wanted - set(given))}, unknown {sorted(set(given) - wanted)}")


def describe(name: str, entry: dict) -> str:
    """What a data set is, how large, and under which licence."""
    lines = [f"{name}: {entry['about']}", f"  licence: {entry['licence']}"]
    lines += [f"  {f['stage']:9}{f['size'] / 1e9:6.2f} GB  {f['repo']} {f['path']} @ {f['revision'][:12]}" for f in entry["files"]]
    return "\n".join(lines)


# -- download -------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(file: dict, folder: Path) -> Path:
    """Download one file of the manifest into `folder` and check it. An interrupted download goes on where it stopped.

    Raises DownloadError: no room, no connection, not there, or bytes that are not the ones meant (then the file is deleted).
    """
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # one plain, resumable HTTP path for the hub and its mirrors
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    where = {"repo_id": file["repo"], "filename": file["path"], "repo_type": "dataset", "revision": file["revision"],
             "endpoint": os.environ.get("HF_ENDPOINT")}
    try:
        hub = get_hf_file_metadata(hf_hub_url(**where))
        _room(folder, hub.size or file["size"], file["path"])
        path = Path(hf_hub_download(**where, local_dir=folder))
    except (OSError, RuntimeError, ValueError) as error:  # the library's network and hub errors are OSErrors
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(f"{file['repo']} {file['path']}: {error}\nRun the same command again: it goes on where it stopped. "
                            "Behind a firewall, set HF_ENDPOINT to a mirror of the hub.") from error
    wanted = file["sha256"] or (hub.etag if hub.etag and len(hub.etag) == 64 else None)
    if wanted is None:
        print(f"  {file['path']}: no sha256 in the manifest and none from the hub; only its size was checked")
    elif (got := sha256_of(path)) != wanted:
        path.unlink()
        raise DownloadError(f"{file['path']}: sha256 is {got}, wanted {wanted}: damaged or changed on the way, and deleted. "
                            "Run the same command again; if it happens twice, do not use this mirror.")
    return path


def _room(folder: Path, size: int, name: str) -> None:
    """Twice the size must be free: the download and its converted form."""
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise DownloadError(f"{name} needs {2 * size / 1e9:.1f} GB with its converted form, {free / 1e9:.1f} GB are free in {folder}: "
                            "free some space or give another folder with --to")


# -- conversion -----------------------------------------------------------------------------------


def records(path: Path) -> Iterator[dict]:
    """The rows of a .jsonl, .jsonl.gz or .parquet file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256):
            yield from batch.to_pylist()
        return
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DownloadError(f"{path.name}:{number}: not JSON ({error})") from error


def as_line(row: dict, stage: str) -> dict | None:
    """One row in the course's form, or None for a row without the fields that this stage needs."""
    messages = row.get("conversations") or row.get("messages")
    if stage == "pretrain":
        return {"text": row["text"]} if row.get("text", "").strip() else None
    if stage == "sft":
        return {"conversations": messages} if messages else None
    if not (row.get("chosen") and row.get("rejected")) or row["chosen"] == row["rejected"]:
        return None
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def convert(source: Path, target: Path, stage: str, rows: int | None) -> tuple[int, int]:
    """Write the rows of `source` as gzipped lines to `target` (whole or not at all); counts of rows kept and left out."""
    kept = left_out = 0
    partial = target.with_name(target.name + ".partial")
    with gzip.open(partial, "wt", encoding="utf-8", compresslevel=3) as out:
        for row in records(source):
            line = as_line(row, stage)
            left_out += line is None
            if line is not None:
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                kept += 1
            if rows and kept >= rows:
                break
    partial.replace(target)
    return kept, left_out


def get(name: str, entry: dict, to: Path) -> Path:
    """Download, check and convert every file of a data set; the folder that `course run --data` takes."""
    folder = to / name
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for file in entry["files"]:
        target = folder / file["stage"] / (Path(file["path"]).name.split(".")[0] + ".jsonl.gz")
        if target.exists():
            print(f"  {target.name}: there already")
            continue
        source = fetch(file, raw)
        target.parent.mkdir(exist_ok=True)
        kept, left_out = convert(source, target, file["stage"], file["rows"])
        print(f"  {file['stage']}: {kept:,} rows" + (f", {left_out:,} without the fields of this stage left out" if left_out else ""))
        source.unlink()
    shutil.rmtree(raw, ignore_errors=True)
    return folder


def main(args: argparse.Namespace) -> int:
    """Carry out `list`, `show` or `get`."""
    sets = load_manifest(args.manifest)
    if args.action == "list":
        print("\n\n".join(describe(name, entry) for name, entry in sets.items()))
        return 0
    if args.name not in sets:
        print(f"no data set {args.name!r}; there are {', '.join(sets)}", file=sys.stderr)
        return 2
    print(describe(args.name, sets[args.name]))
    if args.action == "get":
        try:
            folder = get(args.name, sets[args.name], args.to)
        except (DownloadError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"ready: python -m course run --data {args.name}   ({folder})")
    return 0
