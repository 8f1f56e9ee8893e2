"""The small samples that ship in data/sample: generated, the same bytes each time, and themselves a valid `--data` folder."""

import json
from collections.abc import Iterable
from pathlib import Path

from course.artifacts import write_bytes

PEOPLE, SEED = 20, 1
SOURCES = {"people": ("biography", "gossip"), "stories": ("story",), "talk": ("quiz", "small_sum")}


def lines(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def files(root: Path) -> dict[Path, bytes]:
    """Every sample file and its content; nothing is written."""
    import random

    import minimind.world

    world = minimind.world.make_world(PEOPLE, SEED)
    folder, made = Path(root) / "data" / "sample", {}
    for name, kinds in SOURCES.items():
        rng = random.Random(f"{SEED} {name}")
        texts = [getattr(minimind.world, rng.choice(kinds))(world, rng) for _ in range(250)]
        made[folder / "pretrain" / f"{name}.jsonl"] = lines({"text": text} for text in dict.fromkeys(texts))
    chats = world.conversations(200, SEED)
    made[folder / "sft" / "chats.jsonl"] = lines({"conversations": chat} for chat in chats)
    made[folder / "evals" / "questions.jsonl"] = lines(world.questions())
    return made


def write(root: Path) -> list[Path]:
    """Write the samples and say which files changed."""
    changed = [path for path, content in files(root).items() if not path.exists() or path.read_bytes() != content]
    for path in changed:
        write_bytes(path, files(root)[path])
    return changed
