"""The small samples that ship in data/sample: generated, the same bytes each time, and themselves a valid `--data` folder.

Two faults are planted for chapter 01 to find: one story stands there twice, and one training text holds a text of evals/.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path

from course.artifacts import write_bytes

PEOPLE, SEED = 20, 1
SOURCES = {"people": ("biography", "gossip"), "stories": ("story",), "talk": ("quiz", "talk", "small_sum")}


def lines(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def files(root: Path) -> dict[Path, bytes]:
    """Every sample file and its content; nothing is written."""
    from minimind import world as module

    world = module.make_world(PEOPLE, SEED)
    texts = {}
    for name, kinds in SOURCES.items():
        rng = random.Random(f"{SEED} {name}")
        texts[name] = list(dict.fromkeys(getattr(module, rng.choice(kinds))(world, rng) for _ in range(250)))
    tests = [texts["people"].pop() for _ in range(10)]
    texts["people"].append(f"{texts['people'][0]} {max(tests, key=len)}")
    texts["stories"].append(texts["stories"][0])
    made = {f"pretrain/{name}.jsonl": lines({"text": text} for text in found) for name, found in texts.items()}
    made["sft/chats.jsonl"] = lines({"conversations": chat} for chat in world.conversations(300, SEED))
    made["evals/people.jsonl"] = lines({"text": text} for text in tests)
    return {Path(root) / "data" / "sample" / name: content for name, content in made.items()}


def write(root: Path) -> list[Path]:
    """Write the samples and say which files changed."""
    changed = {path: content for path, content in files(root).items() if not path.exists() or path.read_bytes() != content}
    for path, content in changed.items():
        write_bytes(path, content)
    return list(changed)
