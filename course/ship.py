"""`python -m course ship RUN`: copy the small checkpoints of a run to data/checkpoints, where they ship with the course.

Weights are stored in half precision, which is enough to talk to and to start a chapter from; a run keeps float32.
"""
import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

from course import artifacts

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = "example: python -m course ship runs/latest"
STAGES = ("tokenizer", "pretrain", "sft")
FILE_LIMIT, ALL_LIMIT = 4_000_000, 16_000_000  # bytes of one checkpoint, and of all
SHOWN = ("pretrain/bits_per_byte", "pretrain/facts", "sft/questions_seen", "sft/questions_unseen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `course ship`."""
    parser.add_argument("run", type=Path, help="the folder of a finished run, such as runs/latest")
    parser.add_argument("--to", type=Path, default=ROOT / "data/checkpoints", help=argparse.SUPPRESS)


def halve(folder: Path) -> None:
    """Store the weights of a checkpoint folder as float16, and say so in its config."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    if not weights.exists():
        return
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(weights).items()}
    assert all(tensor.isfinite().all() for tensor in tensors.values()), f"{weights}: a weight does not fit into float16"
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def mark_whole(folder: Path) -> None:
    """Bring the sizes in an artifact's marker up to date, so that it counts as a whole one."""
    marker = folder / artifacts.MARKER
    if marker.exists():
        about = json.loads(marker.read_text())
        about["files"] = {name: (folder / name).stat().st_size for name in about["files"]}
        marker.write_text(json.dumps(about, indent=1) + "\n")


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def ship(run: Path, to: Path) -> dict:
    """Copy the stages of `run` to `to` and write its manifest: from which profile, with which results, and each file's sha256.

    FileNotFoundError names a missing stage, ValueError one that is too large; then the old checkpoints stay as they are.
    """
    metrics = json.loads((run / "metrics.json").read_text())
    new = to.with_name(to.name + ".partial")
    shutil.rmtree(new, ignore_errors=True)
    for stage in STAGES:
        source = run / "artifacts" / stage
        if not source.is_dir():
            raise FileNotFoundError(f"{source} is missing: ship takes a run of chapters 2 to 11 that has finished")
        shutil.copytree(source, new / stage, ignore=shutil.ignore_patterns(".*"))
        halve(new / stage)
        mark_whole(new / stage)
        if size_of(new / stage) > FILE_LIMIT:
            raise ValueError(f"{stage} has {size_of(new / stage):,} bytes, more than {FILE_LIMIT:,}: ship a run of the cpu profile")
    if size_of(new) > ALL_LIMIT:
        raise ValueError(f"the checkpoints have {size_of(new):,} bytes together, more than {ALL_LIMIT:,}")
    files = {p.relative_to(new).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(new.rglob("*")) if p.is_file()}
    manifest = {"metrics": {name: metrics[name] for name in SHOWN if name in metrics}, "sha256": files}
    (new / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(to, ignore_errors=True)
    new.rename(to)
    return manifest


def main(args: argparse.Namespace) -> int:
    """Ship, and say what went where."""
    try:
        manifest = ship(args.run, args.to)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(manifest['sha256'])} files, {size_of(args.to) / 1e6:.1f} MB in {args.to}")
    return 0
