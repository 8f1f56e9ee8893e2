"""How much memory tokenising needs: `python -m course.shard_memory --megabytes 1000`.

Writes a text file of that size, tokenises it into shards (or, with --way list, into one list, as a first attempt would), reads from
the result and prints the peak of the process as one line of JSON. Chapter 01 runs it at small sizes.
"""

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path


def peak_memory() -> int:
    """The most memory this process ever had in RAM, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; ru_maxrss would count what the parent process had when it started this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_text(path: Path, size: int) -> None:
    """A .jsonl file of `size` bytes: the world's documents again and again, each with its number."""
    from minimind.world import make_world

    texts = [json.dumps(text)[1:] for text in make_world(100, 1).documents(5000, 1)]
    with open(path, "w", encoding="utf-8") as file:
        for number, text in enumerate(itertools.cycle(texts)):
            size -= file.write(f'{{"text": "{number}. {text}}}\n')
            if size <= 0:
                return


def load_tokenizer(folder: str | None):
    """The tokenizer of chapter 02 from a folder, or bytes."""
    if folder is None:
        from minimind.data import ByteTokenizer

        return ByteTokenizer()
    from minimind.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(folder)


def measure(way: str, source: Path, folder: Path, tokenizer) -> dict[str, float]:
    """Tokenise `source` in one of the two ways, read from the result, and say what it took."""
    from minimind.data import batches, read_texts, write_shards

    before, start = peak_memory(), time.perf_counter()
    if way == "list":
        tokens = [token for group in batches(read_texts(source)) for ids in tokenizer.encode_batch(group) for token in ids]
    else:
        tokens = write_shards(read_texts(source), tokenizer, folder).tokens
    rng = random.Random(0)
    for _ in range(2000):  # what training does: windows from anywhere
        place = rng.randrange(max(1, len(tokens) - 256))
        assert len(tokens[place : place + 256]) > 0
    seconds = time.perf_counter() - start
    return {"tokens": len(tokens), "before_bytes": before, "peak_bytes": peak_memory(), "seconds": round(seconds, 2)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20, help="size of the text file (default 20)")
    parser.add_argument("--way", choices=("shards", "list"), default="shards", help="stream into shards, or one list in memory")
    parser.add_argument("--tokenizer", help="folder of a trained tokenizer; without it, bytes are tokens")
    parser.add_argument("--scratch", help="where the text and the shards go for the time being (about 3 times the size)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        text = Path(scratch, "text.jsonl")
        pid = os.fork() if hasattr(os, "fork") else 0  # the text is written by a child, so that its memory does not count
        if pid == 0:
            write_text(text, round(args.megabytes * 1e6))
            if hasattr(os, "fork"):
                os._exit(0)
        else:
            os.waitpid(pid, 0)
        result = measure(args.way, text, Path(scratch, "shards"), load_tokenizer(args.tokenizer))
    print(json.dumps({"way": args.way, "megabytes": args.megabytes, **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
