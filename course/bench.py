"""`python -m course bench`: training loops on the same model and text, side by side in one run.

- ours: packed, memory-mapped tokens, bf16 where the machine has it, fused AdamW, compiled where there is a C++ compiler
  (`minimind.train`); the time of compiling does not count, as in any long run
- uncompiled: ours without `torch.compile`
- plain: the loop of this field's tutorials: float32, one padded row per document, tokenised in `__getitem__`
- trainer: Hugging Face `Trainer` in its best plain setting: bf16, packed rows, fused AdamW, the same batch

The speed is real tokens per second: padding does not count, and neither do the first (warm-up) steps. The loops
take turns, so that noise of the machine meets all of them, and each figure is the median over the rounds.
"""
import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

HELP = "train the same model with our loop and with others and compare their speed"
EXAMPLE = "example: python -m course bench --models tiny --steps 8 --out bench.json"
PEAK_FLOPS = {  # dense bf16/fp16 FLOP/s from the makers' data sheets (NVIDIA 2018 to 2024)
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12, "L4": 121e12, "T4": 65e12,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `course bench`."""
    parser.add_argument("--models", default="tiny,minimind2-small", help="presets, comma-separated (default: %(default)s)")
    parser.add_argument("--text", default="pretrain,chat", help="kinds of text: pretrain, chat or both (default: both)")
    parser.add_argument("--loops", default="ours,uncompiled,plain,trainer", help="which loops (default: all four)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the loops take turns (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows in a batch (default: %(default)s)")
    parser.add_argument("--row", type=int, default=340, help="length of a pretraining row (default: %(default)s)")
    parser.add_argument("--chat-row", type=int, default=768, help="length of a chat row (default: %(default)s)")
    parser.add_argument("--data", help="a folder with pretrain/ and sft/ instead of the world")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="where the JSON goes (default: %(default)s)")


# -- text -----------------------------------------------------------------------------------------


def load_text(data: str | None, rows: int = 20_000) -> tuple[list[str], list[list[dict]]]:
    """Documents and conversations, from a folder or from the world (where several short texts make one document)."""
    from minimind.data import read_conversations, read_texts

    if data:
        texts = _first(rows, (t for f in sorted(Path(data, "pretrain").glob("*")) for t in read_texts(f)))
        chats = _first(rows, (c["conversations"] for f in sorted(Path(data, "sft").glob("*")) for c in read_conversations(f)))
        return texts, chats
    from minimind.world import World

    world = World(people=100, seed=1)
    pieces = list(world.documents(8 * rows // 4, seed=11))
    texts = [" ".join(pieces[i : i + 8]) for i in range(0, len(pieces), 8)]  # about 300 tokens each, as in MiniMind's rows
    return texts, list(world.conversations(rows // 2, seed=11))


def _first(count: int, items) -> list:
    return [item for item, _ in zip(items, range(count))]


class PaddedRows(Dataset):
    """One padded row per document, tokenised when it is asked for: what most tutorials do."""

    def __init__(self, items: list, encode, length: int):
        self.items, self.encode, self.length = items, encode, length

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = self.encode(self.items[index])
        ids, labels = ids[: self.length + 1], labels[: self.length + 1]
        missing = self.length + 1 - len(ids)
        ids, labels = ids + [0] * missing, labels + [-100] * missing
        return torch.tensor(ids[:-1]), torch.tensor(labels[1:])


def as_document(tokenizer):
    """Document -> (ids, labels), every token a target."""
    def encode(text: str) -> tuple[list[int], list[int]]:
        ids = tokenizer.encode(text) + [tokenizer.eos_id]
        return ids, ids
    return encode


def as_chat(tokenizer, length: int):
    """Conversation -> (ids, labels), the assistant's tokens the targets. Labels are aligned with ids, not shifted."""
    from minimind.sft import chat_example

    def encode(messages: list[dict]) -> tuple[list[int], list[int]]:
        return chat_example(tokenizer, messages, length + 1)
    return encode


# -- the loops: each takes the same batches' worth of text and returns (seconds, real tokens) -----------


class Stopwatch:
    """Hands out batches and starts the clock when the first timed one is asked for."""

    def __init__(self, batches, warmup: int, device: torch.device):
        self.batches, self.warmup, self.device, self.start = batches, warmup, device, 0.0

    def __getitem__(self, step: int):
        if step == self.warmup:
            self.start = now(self.device)
        return self.batches[step]

    def seconds(self) -> float:
        return now(self.device) - self.start


def now(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(model, task: "Task", args, device) -> tuple[float, int]:
    """`uncompiled`, and compiled where there is a compiler."""
    return uncompiled(model, task, args, device, compile=args.compile)


def uncompiled(model, task: "Task", args, device, compile: bool = False) -> tuple[float, int]:
    """`minimind.train.train` on packed batches."""
    from minimind.pretrain import pretrain_loss
    from minimind.sft import sft_loss
    from minimind.train import TrainConfig, train

    watch = Stopwatch(task.packed, WARMUP, device)
    config = TrainConfig(steps=WARMUP + args.steps, learning_rate=3e-4, log_every=10_000, compile=compile)
    train(model, watch, sft_loss if task.chat else pretrain_loss, config)
    return watch.seconds(), task.packed_tokens(args.steps)


def plain(model, task: "Task", args, device) -> tuple[float, int]:
    """Float32, one padded row per document tokenised in `__getitem__`, an unfused optimiser."""
    loader = DataLoader(task.padded, batch_size=args.batch)
    watch = Stopwatch(Successive(loader), WARMUP, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(WARMUP + args.steps):
        ids, labels = (t.to(device) for t in watch[step])
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return watch.seconds(), task.padded_tokens(args.steps, args.batch)


class Successive:
    """A DataLoader addressed by step, so that one stopwatch serves all loops."""

    def __init__(self, loader: DataLoader):
        self.iterator = iter(loader)

    def __getitem__(self, step: int):
        return next(self.iterator)


def trainer(model, task: "Task", args, device) -> tuple[float, int]:
    """Hugging Face `Trainer` on the same model (its own implementation, our weights) and the same packed rows."""
    from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    class Clock(TrainerCallback):
        def on_step_begin(self, arguments, state, control, **_):
            if state.global_step == WARMUP:
                Clock.start = now(device)

        def on_train_end(self, arguments, state, control, **_):
            Clock.seconds = now(device) - Clock.start

    rows = task.rows((WARMUP + args.steps) * args.batch)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        theirs = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
        settings = TrainingArguments(
            folder, per_device_train_batch_size=args.batch, max_steps=WARMUP + args.steps, learning_rate=3e-4, bf16=args.bf16,
            use_cpu=device.type == "cpu", optim="adamw_torch_fused", report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False)
        loop = Trainer(theirs, settings, train_dataset=rows, callbacks=[Clock])
        loop.remove_callback(PrinterCallback)
        loop.train()
    return Clock.seconds, task.packed_tokens(args.steps)


LOOPS = {"ours": ours, "uncompiled": uncompiled, "plain": plain, "trainer": trainer}
WARMUP = 2


class Task:
    """One kind of text in the two forms that the loops need: padded rows and packed batches."""

    def __init__(self, kind: str, items: list, tokenizer, args, device: torch.device, folder: Path):
        self.chat, self.length = kind == "chat", args.chat_row if kind == "chat" else args.row
        encode = as_chat(tokenizer, self.length) if self.chat else as_document(tokenizer)
        self.padded = PaddedRows(items, encode, self.length)
        if self.chat:
            from minimind.sft import PackedConversations

            self.packed = PackedConversations([encode(item) for item in items], self.length, args.batch, seed=0, device=device)
        else:
            from minimind.data import TokenShards, write_shards
            from minimind.pretrain import PackedTokens

            write_shards(items, tokenizer, folder / "shards")
            self.packed = PackedTokens(TokenShards(folder / "shards").tokens, self.length, args.batch, seed=0, device=device)

    def packed_tokens(self, steps: int) -> int:
        """Real tokens in the timed packed batches; only chat rows have padding (id 0) at their end."""
        batches = [self.packed[WARMUP + step]["input_ids"] for step in range(steps)]
        return sum(int((ids != 0).sum()) if self.chat else ids.numel() for ids in batches)

    def padded_tokens(self, steps: int, batch: int) -> int:
        """Real tokens in the timed padded batches."""
        timed = self.padded.items[WARMUP * batch : (WARMUP + steps) * batch]
        return sum(min(len(self.padded.encode(item)[0]), self.length) for item in timed)

    def fill(self, count: int = 200) -> float:
        """Share of a padded row that is text."""
        lengths = [min(len(self.padded.encode(item)[0]), self.length) for item in self.padded.items[:count]]
        return statistics.mean(lengths) / self.length

    def rows(self, count: int) -> list[dict]:
        """Packed rows for `Trainer`, which shifts the labels itself; one stream, no masks: the faster plain way."""
        if not self.chat:
            stream = self.packed.tokens[: count * self.length].astype("int64")
            ids = torch.from_numpy(stream).view(count, self.length)
            return [{"input_ids": row, "labels": row.clone()} for row in ids]
        ids, labels = [], []
        for item in self.padded.items:
            more_ids, more_labels = self.padded.encode(item)
            ids, labels = ids + more_ids, labels + more_labels
            if len(ids) >= count * self.length:
                break
        count = len(ids) // self.length
        shape = (count, self.length)
        ids, labels = (torch.tensor(x[: count * self.length]).view(shape) for x in (ids, labels))
        return [{"input_ids": i, "labels": t} for i, t in zip(ids, labels)]


# -- the table ------------------------------------------------------------------------------------


def alone(function, *arguments):
    """Call in a process of its own: what one loop changes in its process (such as how memory is kept) must not help the others."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(name: str, kind: str, config, folder: str, args: argparse.Namespace) -> tuple[float, int, float]:
    """One loop, once: real tokens per second, length of a row, share of a padded row that is text."""
    from minimind.data import set_seed
    from minimind.model import MiniMind
    from minimind.tokenizer import Tokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts, chats = load_text(args.data)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Tokenizer.from_pretrained(Path(folder) / "tokenizer")
        task = Task(kind, chats if kind == "chat" else texts, tokenizer, args, device, Path(scratch))
        set_seed(0)
        seconds, tokens = LOOPS[name](MiniMind(config).to(device), task, args, device)
    return tokens / seconds, task.length, task.fill()


def bench(args: argparse.Namespace) -> dict:
    """Run every loop `args.rounds` times in turn; tokens per second, ratios and, on a known GPU, the share of its peak."""
    from course.machine import compiler, describe
    from minimind.model import ModelConfig, flops_per_token
    from minimind.tokenizer import Tokenizer
    from minimind.train import pick_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.bf16 = pick_precision(device, "auto")[0] is torch.bfloat16
    args.compile, loops = compiler() is not None, args.loops.split(",")
    if not args.compile:
        print("no C++ compiler: ours is not compiled")
        loops = [name for name in loops if name != "uncompiled" or "ours" not in loops]
    texts, chats = load_text(args.data)
    settings = {"bf16": args.bf16, "compiled": args.compile, "batch": args.batch, "steps": args.steps, "rounds": args.rounds}
    result = {"machine": describe(), **settings, "rows": []}
    for preset in args.models.split(","):
        vocabulary = ModelConfig.preset(preset).vocab_size
        tokenizer = Tokenizer.train([*texts[:4000], *(m["content"] for c in chats[:4000] for m in c)], vocabulary)
        config = ModelConfig.preset(preset, vocab_size=max(vocabulary, tokenizer.vocab_size))
        for kind in args.text.split(","):
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(Path(folder) / "tokenizer")
                speeds = {name: [] for name in loops}
                for _ in range(args.rounds):
                    for name in speeds:
                        speed, length, fill = alone(measure, name, kind, config, folder, args)
                        speeds[name].append(speed)
            row = {"model": preset, "text": kind, "row": length, "fill": round(fill, 3),
                   "tokens_per_second": {name: statistics.median(v) for name, v in speeds.items()}, "all": speeds}
            own = row["tokens_per_second"].get("ours")
            row["ratio"] = {name: own / v for name, v in row["tokens_per_second"].items()} if own else {}
            peak = next((f for name, f in PEAK_FLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None)
            if peak and "ours" in speeds:
                row["mfu"] = row["tokens_per_second"]["ours"] * flops_per_token(config, length) / peak
            result["rows"].append(row)
            print(line(row), flush=True)
    return result


def line(row: dict) -> str:
    """One row of the table."""
    speeds = "  ".join(f"{name} {speed:9,.0f}" for name, speed in row["tokens_per_second"].items())
    ratios = "  ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratio"].items() if name != "ours")
    mfu = f"  {row['mfu']:.0%} of peak" if "mfu" in row else ""
    return f"{row['model']:16} {row['text']:9} rows of {row['row']} ({row['fill']:.0%} full)  {speeds}  ours = {ratios}{mfu}"


def main(args: argparse.Namespace) -> int:
    """Print the table, write the JSON."""
    from minimind.model import PRESETS

    for name, known, given in (("--models", PRESETS, args.models), ("--loops", LOOPS, args.loops), ("--text", ("pretrain", "chat"), args.text)):
        unknown = set(given.split(",")) - set(known)
        if unknown:
            print(f"{name}: unknown {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}")
            return 2
    print("real tokens per second (padding does not count), median of", args.rounds, "rounds")
    result = bench(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(args.out.name + ".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(args.out)
    print(f"written: {args.out}")
    return 0
