# %% [markdown]
# # 9. Pretraining
#
# At the end of this chapter you have a language model that you trained from nothing and saved as a folder that other programs can open.
# You will have made its training several times faster, with the gain of each step measured, watched it learn facts, and compared it with a model with experts.
#
# You need: tokens and shards (chapters 01 and 02), bits per byte (03), the model (07), the loop (08).
#
# Reading 30 minutes; running: smoke 40 s, cpu 13 minutes.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="pretrain-default-exp"
#| default_exp pretrain

# %% [markdown]
# The idea that gives most of the speed, in one picture: do not give every document a row of its own.

# %% id="pretrain-map"
import matplotlib.pyplot as plt
import numpy as np

documents = np.repeat(np.arange(1, 8), [5, 3, 8, 2, 6, 4, 4])
one_each = np.zeros((7, 8))
for number in range(1, 8):
    one_each[number - 1, : (documents == number).sum()] = number
fig, axes = plt.subplots(1, 2, figsize=(7, 2.2))
for ax, rows, title in zip(axes, (one_each, documents.reshape(4, 8)), ("one document a row", "packed")):
    ax.pcolormesh(np.ma.masked_equal(rows, 0), cmap="cividis", edgecolors="white", linewidth=1.5)
    ax.set(title=f"{title}: {len(rows)} rows", xlabel="position", ylabel="row", ylim=(7, 0), yticks=[])
    ax.grid(False)
show(fig, "Seven short documents, one colour each. Left: a row each, the empty cells are padding. Right: the same tokens packed into four full rows.")

# %% [markdown]
# Pretraining is chapter 08's loop, fed with all the text there is. What decides is how much text it can read in the time you have.
# So this chapter has two halves: first speed, then the run.

# %% id="pretrain-imports"
#| export
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from minimind.metrics import cross_entropy

# %% [markdown]
# From the earlier chapters: the data, the tokenizer, the model, the measure and the loop.

# %% id="pretrain-tools"
import json
import os
import shutil
import time
import zlib

from minimind.data import read_texts, set_seed, write_shards
from minimind.metrics import evaluate_bits_per_byte, token_byte_lengths
from minimind.model import MiniMind, ModelConfig
from minimind.tokenizer import Tokenizer
from minimind.train import TrainConfig, keep_memory, make_optimizer, train

# %% [markdown]
# And two results: the text and the tokenizer that was trained on it.

# %% id="pretrain-read"
tokenizer = Tokenizer.from_pretrained(chapter.read("tokenizer"))
data = chapter.read("data")
size, device = chapter.size, chapter.device

# %% [markdown]
# The training text becomes one long row of tokens on disk, each document followed by `<|endoftext|>`. This is the only time that it is tokenised.

# %% id="pretrain-shards"
begin = time.perf_counter()
shards = write_shards(read_texts(data / "pretrain" / "train.jsonl.gz"), tokenizer, chapter.work / "train")
valid = write_shards(read_texts(data / "pretrain" / "valid.jsonl.gz"), tokenizer, chapter.work / "valid")
lengths = np.diff(shards.documents)
print(f"{len(shards.tokens):,} tokens in {len(lengths):,} documents, {shards.num_bytes / len(shards.tokens):.2f} bytes per token, {time.perf_counter() - begin:.1f} s")

# %% [markdown]
# ## How much of a batch is text?
#
# A batch is a rectangle: B rows of T tokens. Documents are not. The usual way gives each document a row and fills it up with padding.
# **Before you look:** what share of such a rectangle of 256 columns is text?

# %% id="pretrain-lengths-figure"
fill = np.minimum(lengths, size.context).mean() / size.context
fig, ax = plt.subplots(figsize=(7, 2.5))
ax.hist(np.minimum(lengths, size.context), bins=60)
ax.axvline(size.context, color="grey", ls=":")
ax.set(xlabel=f"tokens of a document (longer ones cut at {size.context})", ylabel="documents")
show(fig, f"Lengths of the documents: on average {fill:.0%} of a padded row of {size.context} tokens would be text.")

# %% [markdown]
# Here is the baseline, as most tutorials write it: one document a row, tokenised when it is asked for, padded, with the padding left out of the loss.

# %% id="pretrain-padded-documents"
#| export
class PaddedDocuments:
    """One document a row, tokenised when asked for and padded to `context`: what most tutorials do. The slow baseline."""

    def __init__(self, texts: Sequence[str], tokenizer, context: int, batch_size: int, device: torch.device | str = "cpu"):
        self.texts, self.tokenizer, self.context, self.batch_size, self.device = texts, tokenizer, context, batch_size, device

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        ids = torch.full((self.batch_size, self.context + 1), self.tokenizer.eos_id)
        labels = torch.full((self.batch_size, self.context), -100)
        for row in range(self.batch_size):
            text = self.texts[(step * self.batch_size + row) % len(self.texts)]
            tokens = torch.tensor(self.tokenizer.encode(text) + [self.tokenizer.eos_id])[: self.context + 1]
            ids[row, : len(tokens)] = tokens
            labels[row, : len(tokens) - 1] = tokens[1:]
        return {"input_ids": ids[:, :-1].to(self.device), "labels": labels.to(self.device)}

# %% [markdown]
# **Packing** cuts the endless row of tokens into windows of T + 1 instead. By hand, for ten tokens and T = 3:
# windows start at 0, 3, 6; the first is tokens 0 to 3, with inputs 0 1 2 and labels 1 2 3. The last token of a window is the first input of the next, so every token is a label exactly once.
#
# Two things make it good to train on: each epoch has its own order and its own shift, and `[step]` always gives the same batch, as chapter 08's loop asks.

# %% id="pretrain-packed-tokens"
#| export
class PackedTokens:
    """Full windows of one long row of tokens, in shuffled epochs; `[step]` is always the same batch.

    Window i of an epoch is `tokens[i*context + shift : ... + context + 1]`; every epoch has its own order and shift,
    so that each token is seen once an epoch and never twice at the same place.
    """

    def __init__(self, tokens, context: int, batch_size: int, seed: int = 0, device: torch.device | str = "cpu"):
        if len(tokens) < 2 * context + 1:
            raise ValueError(f"{len(tokens)} tokens are too few for windows of {context}: need {2 * context + 1}, shorten the context or add text")
        self.tokens, self.context, self.batch_size, self.seed, self.device = tokens, context, batch_size, seed, device
        self.windows = (len(tokens) - 1) // context - 1  # one less leaves room for the shift
        self.epoch, self.starts = -1, np.empty(0, dtype=np.int64)

    def start(self, position: int) -> int:
        """First token of the window at `position` of the endless row of shuffled epochs."""
        epoch, index = divmod(position, self.windows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.starts = epoch, rng.permutation(self.windows) * self.context + rng.integers(self.context)
        return int(self.starts[index])

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        first = step * self.batch_size
        starts = [self.start(position) for position in range(first, first + self.batch_size)]
        rows = np.stack([self.tokens[start : start + self.context + 1] for start in starts])
        rows = torch.from_numpy(rows.astype(np.int64)).to(self.device)  # (B, T+1)
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}

# %% [markdown]
# The promises as facts: full rows, labels one ahead, every window once an epoch, the same batch for the same step.

# %% id="pretrain-packed-check"
counting_up = np.arange(1000, dtype=np.uint16)
packed = PackedTokens(counting_up, context=10, batch_size=7, seed=3)
batch = packed[0]
assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
epoch = torch.cat([packed[step]["labels"].flatten() for step in range(packed.windows // 7)])
assert len(epoch.unique()) == len(epoch) == packed.windows // 7 * 70
assert torch.equal(packed[5]["input_ids"], PackedTokens(counting_up, 10, 7, seed=3)[5]["input_ids"])
first = [[packed.start(epoch * packed.windows + row) for row in range(4)] for epoch in range(2)]
print("first windows of two epochs start at", *first)

# %% [markdown]
# Both ways side by side, on real text:

# %% id="pretrain-batch-figure"
from itertools import islice

texts = list(islice(read_texts(data / "pretrain" / "train.jsonl.gz"), 2000))
padded = PaddedDocuments(texts, tokenizer, size.context, size.batch_size)
packed = PackedTokens(shards.tokens, size.context, size.batch_size)

# %% [markdown]
# Dark is text, darker still the end of a document, white is padding:

# %% id="pretrain-batch-share"
share = {}
fig, axes = plt.subplots(2, 1, figsize=(7, 3.2), sharex=True)
for ax, (name, batches) in zip(axes, {"padded": padded, "packed": packed}.items()):
    batch = batches[0]
    real = batch["labels"] != -100
    share[name] = real.float().mean().item()
    ax.imshow(real + 0.4 * (real & (batch["labels"] == tokenizer.eos_id)), aspect="auto", cmap="Greys", vmin=0, vmax=1.6, interpolation="nearest")
    ax.set(ylabel="row", title=f"{name}: {share[name]:.0%} text")
    ax.grid(False)
axes[1].set_xlabel("position")
show(fig, "One batch each, text grey and padding white: padding spends most of the work on nothing.")
assert share["packed"] == 1.0

# %% [markdown]
# A packed row holds several documents, and a token may look back into the one before. The model learns from `<|endoftext|>` that what stands before does not matter.
# GPT-2 and GPT-3 were trained so. Chapter 11 packs conversations with a mask between them, because there it does matter.
#
# **Exercise 9.1 (10 min, ★).** With T = 512 instead of 256, what happens to the share of text of a padded batch, and of a packed one? Predict, then measure.

# %% [markdown]
# ## The loss
#
# One line for a dense model. A model with experts adds the balance loss of chapter 06, so that no expert dies.

# %% id="pretrain-loss"
#| export
def pretrain_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
    """Cross-entropy of the next token (nats), plus the balance loss of a model with experts."""
    loss = cross_entropy(model(batch["input_ids"]), batch["labels"])
    if not model.config.num_experts:
        return loss, {"cross_entropy": loss}
    return loss + model.config.router_aux_loss_coef * model.aux_loss, {"cross_entropy": loss}

# %% [markdown]
# ## From the naive loop to the fast one
#
# Now we time it, adding one thing after another. What counts is tokens of real text per second: padding is work, but not progress.
#
# A step of the naive loop: float32, an optimiser that updates weight by weight, `loss.item()` every step.

# %% id="pretrain-config"
config = ModelConfig.preset(chapter.model, vocab_size=tokenizer.vocab_size)
amp = chapter.amp  # what this machine multiplies fast, or None
print(f"{chapter.model}: {MiniMind(config).num_parameters():,} weights, {str(amp or torch.float32)[6:]}")

# %% [markdown]
# The clock runs over batch, loss, gradient and update, and only real tokens count.

# %% id="pretrain-timed-steps"
def real_tokens_per_second(batches, amp=None, fused=False, compiled=False):
    """Median over some steps, after one that warms up; the real tokens are counted, not the rectangle."""
    set_seed(0)
    model = MiniMind(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused, foreach=False)
    forward, speeds = torch.compile(model) if compiled else model, []
    for step in range(size.table_steps + 1):
        begin = time.perf_counter()
        batch = batches[step]
        with torch.autocast(device.type, amp, enabled=amp is not None):
            loss, _ = pretrain_loss(forward, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() > 0  # waits for the device: the clock must not stop before the work does
        speeds.append((batch["labels"] != -100).sum().item() / (time.perf_counter() - begin))
    return float(np.median(speeds[1:]))

# %% [markdown]
# One step between padding and shards is missing: packed, but tokenised anew for each batch.

# %% id="pretrain-tokenised-late"
class TokenisedLate:
    """Packed rows, tokenised from text when a batch is asked for."""

    def __getitem__(self, step):
        wanted, row = size.batch_size * size.context + 1, []
        first = step * 31
        while len(row) < wanted:
            row += tokenizer.encode(texts[first % len(texts)]) + [tokenizer.eos_id]
            first += 1
        row = torch.tensor(row[:wanted])
        shape = (size.batch_size, size.context)
        return {"input_ids": row[:-1].view(shape).to(device), "labels": row[1:].view(shape).to(device)}

# %% [markdown]
# The ladder. **Before you run it:** which rung gains most on your machine: packing, 16-bit products, the fused optimiser, or keeping memory?

# %% id="pretrain-ladder"
padded = PaddedDocuments(texts, tokenizer, size.context, size.batch_size, device)
packed = PackedTokens(shards.tokens, size.context, size.batch_size, device=device)
keep_memory(False)
speeds = {"naive: float32, padded rows": real_tokens_per_second(padded)}
speeds["+ packing"] = real_tokens_per_second(TokenisedLate())
speeds["+ memory-mapped tokens"] = real_tokens_per_second(packed)

# %% [markdown]
# So far the batches. Now the arithmetic: 16-bit products, one fused update, and freed memory that is kept instead of returned.

# %% id="pretrain-ladder-arithmetic"
if amp is not None:
    speeds[f"+ {str(amp).removeprefix('torch.')}"] = real_tokens_per_second(packed, amp)
speeds["+ fused optimiser"] = real_tokens_per_second(packed, amp, fused=True)
if device.type == "cpu" and keep_memory():
    speeds["+ memory kept (chapter 08)"] = real_tokens_per_second(packed, amp, fused=True)

# %% [markdown]
# The last rung is `torch.compile`: it joins small operations into larger ones, which needs a C++ compiler and time to compile. Whether it pays depends on the length of the run, so the profile decides.

# %% id="pretrain-compile"
compiled_pays, has_compiler = False, any(shutil.which(name) for name in ("c++", "g++", "clang++"))
if size.compile and has_compiler:
    eager, begin = max(speeds.values()), time.perf_counter()
    speeds["+ torch.compile"] = real_tokens_per_second(packed, amp, fused=True, compiled=True)
    cost, tokens = time.perf_counter() - begin, size.batch_size * size.context
    saved = (tokens / eager - tokens / speeds["+ torch.compile"]) * size.steps
    compiled_pays = saved > cost
    print(f"compiling took about {cost:.0f} s and would save {saved:.0f} s in {size.steps} steps: {'used' if compiled_pays else 'not used'} in the run")
else:
    print("torch.compile is left out:", "this profile switches it off" if has_compiler else "there is no C++ compiler here")

# %% [markdown]
# The table. With your numbers, which rung was the largest?

# %% id="pretrain-table"
slowest = speeds["naive: float32, padded rows"]
for name, speed in speeds.items():
    print(f"{name:30} {speed:9,.0f} tokens/s   {speed / slowest:5.1f} x")
check("pretrain/speedup", max(speeds.values()) / slowest)
_ = check("pretrain/packing_speedup", speeds["+ packing"] / slowest)

# %% [markdown]
# The same numbers as bars:

# %% id="pretrain-ladder-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
ax.barh(list(speeds), list(speeds.values()), color="C0")
ax.invert_yaxis()
ax.set(xlabel="tokens of real text per second")
ax.grid(axis="y", visible=False)
show(fig, "Tokens of real text per second, from the naive loop (top) to the fast one: each bar adds one thing to the bar above.")

# %% [markdown]
# Memory-mapped tokens change little in speed at this size: our tokenizer is fast. They change what is possible: memory stays flat however large the text, and any step can be read without the ones before it, which is what exact resume needs.
#
# **Exercise 9.2 (20 min, ★★).** Time batches of 4, 16 and 64 rows at equal tokens per second of text. Which is fastest on your machine, and why is the largest not?

# %% [markdown]
# ### Where the time goes
#
# The profiler adds up the time of every operation of one step. We sort them into six kinds.

# %% id="pretrain-profile"
KINDS = {
    "matrix products": ("mm", "linear"), "attention": ("scaled_dot_product", "softmax"), "loss": ("log_softmax", "nll_loss"),
    "optimiser": ("adam", "norm_foreach", "linalg"), "copies and casts": ("copy_", "fill_", "cat", "zero"),
}  # fmt: skip


def kind_of(name):
    order = ("loss", "optimiser", "attention", "copies and casts", "matrix products")
    return next((kind for kind in order if any(part in name.lower() for part in KINDS[kind])), "small operations")


# %% [markdown]
# One step to warm up, one that is counted:

# %% id="pretrain-profile-steps"
model = MiniMind(config).to(device)
optimizer = make_optimizer(model, TrainConfig(steps=1))
activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler is talkative
for step in range(2):
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.autocast(device.type, amp, enabled=amp is not None):
            loss, _ = pretrain_loss(model, packed[step])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

# %% [markdown]
# Matrix products are the work itself. Attention moves many numbers for little arithmetic, and on a processor it costs far more than its share of the operations. The rest is overhead that a compiler could shrink.

# %% id="pretrain-profile-figure"
clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
spent = dict.fromkeys([*KINDS, "small operations"], 0.0)
for event in profiler.key_averages():
    spent[kind_of(event.key)] += getattr(event, clock)
total = sum(spent.values())
fig, ax = plt.subplots(figsize=(7, 2.5))
ax.barh(list(spent), [100 * value / total for value in spent.values()], color="C0")
ax.invert_yaxis()
ax.set(xlabel="share of one training step (%)")
ax.grid(axis="y", visible=False)
show(fig, f"Matrix products take {spent['matrix products'] / total:.0%} of a step, attention {spent['attention'] / total:.0%}; the rest is everything around them.")

# %% [markdown]
# ## The baseline to beat
#
# Before the run, the number that it must beat: what counting alone reaches on the same held-out text (chapter 03).
# A pair count, mixed with the single count so that an unseen pair has a chance:

# %% id="pretrain-baseline"
tokens = shards.tokens[: size.baseline_tokens].astype(np.int64)
held_out = valid.tokens[: size.valid_tokens].astype(np.int64)
byte_lengths = token_byte_lengths(tokenizer)
V, num_bytes = tokenizer.vocab_size, int(byte_lengths[held_out[1:]].sum())

# %% [markdown]
# `counted` says how often each wanted key occurs among the keys. A pair of tokens is one key: first times V plus second.

# %% id="pretrain-counts"
def counted(keys, wanted):
    values, counts = np.unique(keys, return_counts=True)
    place = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where(values[place] == wanted, counts[place], 0)

# %% [markdown]
# Two models by counting, in bits per byte:

# %% id="pretrain-baselines"
single = (counted(tokens, held_out[1:]) + 1) / (len(tokens) + V)
pair = counted(tokens[:-1] * V + tokens[1:], held_out[:-1] * V + held_out[1:]) / np.maximum(1, counted(tokens, held_out[:-1]))
bits = lambda p: -np.log2(p).sum() / num_bytes
baselines = {"single tokens": float(bits(single)), "pairs of tokens": float(bits(0.9 * pair + 0.1 * single))}
for name, value in baselines.items():
    print(f"counting {name}: {value:.3f} bits per byte")

# %% [markdown]
# ## What it knows
#
# The world's facts are known, so we can ask: which does the model complete correctly? A prompt "Garus lives in" must go on with exactly the tokens of " Foxhollow".
# Generating token by token would answer this, slowly. One pass over prompt and answer together does as well: if at every position of the answer the most likely token is the right one, then greedy generation would have written it.

# %% id="pretrain-facts-known"
#| export
@torch.no_grad()
def facts_known(model: nn.Module, tokenizer, facts: Sequence[dict], batch_size: int = 64) -> tuple[float, list[dict]]:
    """Share of facts whose every answer token is the most likely one after the prompt, and one row per fact.

    One forward pass reads prompt and answer together. Each position sees only earlier tokens, so all answer tokens
    come first exactly when greedy completion would write the answer.
    """
    device, rows = next(model.parameters()).device, []
    for first in range(0, len(facts), batch_size):
        some = facts[first : first + batch_size]
        prompts = [tokenizer.encode(fact["prompt"]) for fact in some]
        answers = [tokenizer.encode(fact["answer"]) for fact in some]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(p + a) for p, a in zip(prompts, answers)], batch_first=True)
        best = model(ids.to(device)).argmax(-1).tolist()  # (B, T)
        for fact, prompt, answer, row in zip(some, prompts, answers, best):
            guess = row[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            rows.append({**fact, "guess": tokenizer.decode(guess), "known": guess == answer})
    return sum(row["known"] for row in rows) / max(1, len(rows)), rows

# %% [markdown]
# `greedy` is that generation, in its simplest form; chapter 10 builds the real one. After the run we check that both agree.

# %% id="pretrain-greedy"
@torch.no_grad()
def greedy(model, text, new_tokens):
    ids = torch.tensor([tokenizer.encode(text)], device=device)
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_id:
            break
    return tokenizer.decode(ids[0].tolist(), skip_special=True)

# %% [markdown]
# Real text comes without such a list; then `facts` is None and the run is judged by bits per byte alone.

# %% id="pretrain-facts"
facts_file = data / "facts.jsonl"
facts = [json.loads(line) for line in facts_file.open(encoding="utf-8")] if facts_file.exists() else None
print(f"{len(facts)} facts, such as {facts[0]['prompt']!r} -> {facts[0]['answer']!r}" if facts else "this data has no list of facts")

# %% [markdown]
# ## The run
#
# Every so often the run stops to measure three things: bits per byte on held-out text, facts known, and how it continues a few words.

# %% id="pretrain-evaluate"
prompts = [facts[0]["prompt"], facts[1]["prompt"], "One day"] if facts else ["One day", "The", "In"]
samples = []


def evaluate(model):
    result = {"bits_per_byte": evaluate_bits_per_byte(model, held_out, byte_lengths, size.context, amp=amp)}
    if facts:
        result["facts"] = facts_known(model, tokenizer, facts)[0]
    samples.append([greedy(model, prompt, 12) for prompt in prompts])
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()), "|", samples[-1][0][:50])
    return result

# %% [markdown]
# When you run this notebook by hand, a plot grows below while the model trains, with the time that is left. In a course run it stays quiet.

# %% id="pretrain-live"
class LivePlot:
    def __init__(self, total):
        self.total, self.last = total, 0.0
        self.fig, self.ax = plt.subplots(figsize=(7, 2.6))
        self.handle = display(self.fig, display_id=True)
        plt.close(self.fig)

    def __call__(self, history):
        if time.perf_counter() - self.last < 2 and history.step[-1] < self.total:
            return
        self.last = time.perf_counter()
        self.ax.clear()
        self.ax.plot(history.step, history.loss)
        left = (self.total - history.step[-1]) * history.seconds[-1] / history.step[-1]
        title = f"{history.tokens_per_second[-1]:,.0f} tokens/s, {left / 60:.1f} minutes left"
        self.ax.set(xlabel=f"step of {self.total}", ylabel="loss (nats per token)", title=title)
        self.handle.update(self.fig)

# %% [markdown]
# The settings. The number of tokens is the number that matters: about how often is each document read?

# %% id="pretrain-settings"
steps = chapter.steps(size.steps)
settings = TrainConfig(
    steps=steps, learning_rate=size.learning_rate, accumulation=size.accumulation, precision=chapter.settings.precision,
    log_every=max(1, min(10, steps // 20)), eval_every=-(-steps // size.milestones), save_every=-(-steps // size.milestones), compile=compiled_pays,
)  # fmt: skip
tokens_read = steps * size.accumulation * size.batch_size * size.context
fastest = max(speeds.values())
print(f"{steps} steps read {tokens_read:,} tokens, {tokens_read / len(shards.tokens):.1f} times the text")
print(f"in about {tokens_read / fastest / 60:.1f} minutes")

# %% [markdown]
# If it is interrupted, start the chapter again: it goes on from the last checkpoint. The folder's name holds a checksum of the tokens, so that a run never continues on other text.

# %% id="pretrain-run"
fingerprint = zlib.crc32(np.asarray(shards.tokens[:1_000_000]).tobytes()) ^ len(shards.tokens)
resume_folder = chapter.work / f"resume-{fingerprint:08x}"

# %% [markdown]
# Go:

# %% id="pretrain-train"
set_seed(settings.seed)
model = MiniMind(config).to(device)
live = LivePlot(steps) if chapter.alone and hasattr(get_ipython(), "kernel") else None
history = train(model, packed, pretrain_loss, settings, resume_folder, resume=True, evaluate=evaluate, on_log=live)
print(f"{history.seconds[-1]:.0f} s, {history.tokens[-1] / history.seconds[-1]:,.0f} tokens/s, last loss {history.loss[-1]:.3f}")

# %% [markdown]
# Save at once: a Hugging Face model folder with its tokenizer. Only then may the resume checkpoint go.

# %% id="pretrain-save"
with chapter.write("pretrain") as folder:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
shutil.rmtree(resume_folder)

# %% [markdown]
# What was saved computes the same:

# %% id="pretrain-saved"
saved = MiniMind.from_pretrained(chapter.run / "artifacts" / "pretrain").to(device)
probe = packed[0]["input_ids"][:1]
assert torch.equal(saved(probe), model(probe))

# %% [markdown]
# ## What it learned
#
# The loss first. It falls steeply while the model learns spelling and phrases, then slowly, while it learns who lives where.

# %% id="pretrain-loss-figure"
evals = history.evals
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
left.plot(np.array(history.tokens) / 1e6, history.loss)
left.set(xlabel="million tokens", ylabel="training loss (nats per token)")
right.plot([e["tokens"] / 1e6 for e in evals], [e["bits_per_byte"] for e in evals], marker="o")
for (name, value), style in zip(baselines.items(), (":", "--")):
    right.axhline(value, color="grey", ls=style, lw=1)
    right.text(evals[-1]["tokens"] / 1e6, value, name, ha="right", va="bottom", fontsize=8, color="dimgrey")
right.set(xlabel="million tokens", ylabel="held-out bits per byte", ylim=(0, None))
show(fig, "Left: training loss. Right: bits per byte on held-out text, with what counting alone reaches as grey lines.")
chapter.curve("pretrain", [e["tokens"] for e in evals], [e["bits_per_byte"] for e in evals], x_label="tokens", y_label="bits per byte")

# %% [markdown]
# The claim, part one: fewer bits per byte than any earlier baseline.

# %% id="pretrain-claim-bits"
bits_per_byte = check("pretrain/bits_per_byte", evals[-1]["bits_per_byte"])
gain = check("pretrain/gain_over_counting", min(baselines.values()) - bits_per_byte)

# %% [markdown]
# Facts come late and all at once: long after the sentences are fluent, the model still invents the town. A fact is a rare thing, a sentence pattern is not.

# %% id="pretrain-facts-figure"
if facts:
    known, rows = facts_known(model, tokenizer, facts)
    relations = sorted({row["relation"] for row in rows})
    of_kind = lambda name: 100 * np.mean([row["known"] for row in rows if row["relation"] == name])
    fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), width_ratios=(3, 2))
    left.plot([e["tokens"] / 1e6 for e in evals], [100 * e["facts"] for e in evals], marker="o")
    left.set(xlabel="million tokens", ylabel="facts completed correctly (%)", ylim=(-3, 103))
    right.barh(relations, [of_kind(name) for name in relations])
    right.set(xlabel="known at the end (%)", xlim=(0, 100))
    show(fig, "Left: facts are learned late and then quickly. Right: what is known at the end, by kind.")
    chapter.curve("facts", [e["tokens"] for e in evals], [e["facts"] for e in evals], x_label="tokens", y_label="facts known")

# %% [markdown]
# The claim, part two, and the check that one pass and greedy generation agree:

# %% id="pretrain-claim-facts"
if facts:
    check("pretrain/facts", known)
    for row in rows[:5]:
        written = greedy(model, row["prompt"], len(tokenizer.encode(row["answer"])))
        assert (written == row["prompt"] + row["answer"]) == row["known"]
        print(f"{row['prompt']} ->{row['guess']}   ({'right' if row['known'] else 'it is' + row['answer']})")

# %% [markdown]
# The same three beginnings, continued at each milestone. Read downwards: first letters, then words, then sentences, then sense.

# %% id="pretrain-samples"
for index, prompt in enumerate(prompts):
    print(f"'{prompt}' ...")
    for sample, entry in list(zip(samples, evals[-len(samples) :]))[:: -(-len(samples) // 5) or 1]:
        print(f"  {entry['tokens'] / 1e6:5.2f} M  {sample[index][len(prompt) :]!r}")

# %% [markdown]
# It completes text, nothing else. Much of its text consists of questions with answers, so a bare question may well be completed by its answer.
# In the form of a chat, with turns and an end, it is lost: chapter 11 begins there. Five questions, kept for the report:

# %% id="pretrain-answers"
questions_file = data / "questions.jsonl"
if questions_file.exists():
    rows = [json.loads(line) for line in questions_file.open(encoding="utf-8")]
    questions = [rows[index * len(rows) // 5]["question"] for index in range(5)]
else:
    questions = ["Who are you?", "What is the sun?", "How are you today?", "What is two plus three?", "Tell me a story."]
for question in questions:
    answer = greedy(model, question, 16)[len(question) :].strip()
    chapter.answer("pretrain", question, answer)
    print(f"{question} -> {answer!r}")

# %% [markdown]
# **Exercise 9.3 (15 min, ★★).** Plot facts known against how often a fact occurs in the text. How often must the model read a fact before it knows it?
#
# **Exercise 9.4 (30 min, ★★★).** Halve the learning rate, then double it. Does bits per byte or facts known suffer first?

# %% [markdown]
# ## Dense against experts
#
# Chapter 06 promised more capacity for the same work: with four experts of which each token uses one, a token passes through as many weights as in the dense model, but the model owns almost four times the feed-forward weights.
# The test: equal steps, equal data, equal active size, the same learning rate at every step.
# The dense side is the run above, up to one of its milestones; only the experts have to be trained.

# %% id="pretrain-moe-run"
from dataclasses import replace

moe_steps = min(steps, max(1, size.moe_milestone * settings.eval_every))
experts = dict(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=config.intermediate_size, qk_norm=config.qk_norm, norm_topk_prob=False)
set_seed(settings.seed)
moe = MiniMind(ModelConfig.preset(chapter.model, vocab_size=tokenizer.vocab_size, **experts)).to(device)
moe_settings = replace(settings, save_every=0, compile=False)


def moe_evaluate(model):
    return {"bits_per_byte": evaluate_bits_per_byte(model, held_out, byte_lengths, size.context, amp=amp)}


moe_history = train(moe, packed, pretrain_loss, moe_settings, evaluate=moe_evaluate, max_steps=moe_steps)
dense_at = {entry["step"]: entry["bits_per_byte"] for entry in history.evals}
moe_at = {entry["step"]: entry["bits_per_byte"] for entry in moe_history.evals}

# %% [markdown]
# Both at the same step:

# %% id="pretrain-moe-gain"
last = max(set(dense_at) & set(moe_at))
gain = chapter.record("moe/gain_bits_per_byte", dense_at[last] - moe_at[last])
slower = history.tokens_per_second[-1] / moe_history.tokens_per_second[-1]
print(f"step {last}: dense {dense_at[last]:.4f}, experts {moe_at[last]:.4f} bits per byte; {moe.num_parameters() / model.num_parameters():.1f} times the weights")
print(f"the experts {'gain' if gain > 0 else 'lose'} {abs(gain):.4f} bits per byte, and a step takes {slower:.1f} times as long")

# %% [markdown]
# **Did you expect a gain?** On a laptop's few million tokens the experts lose, and in two ways. Per token: each expert has read
# a quarter of the text, and its output is scaled by a router that is still unsure, so the model learns later. Per second: sorting tokens
# to experts costs more than it saves. Larger models that read thousands of times more are another matter (Fedus, Zoph and Shazeer 2021);
# this course claims only what it measured.

# %% id="pretrain-moe-figure"
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
for name, run in {"dense": history, "4 experts": moe_history}.items():
    upto = [index for index, step in enumerate(run.step) if step <= last]
    loss = [run.metrics[index]["cross_entropy"] for index in upto]
    left.plot([run.step[index] for index in upto], loss, label=name)
    right.plot([run.seconds[index] for index in upto], loss, label=name)
left.set(xlabel="step", ylabel="loss (nats per token)")
right.set(xlabel="seconds")
left.legend()
show(fig, "Dense against four experts, over steps (left) and over time (right): compare the two curves at equal steps, then at equal seconds.")

# %% [markdown]
# **Exercise 9.5 (20 min, ★★).** Give the dense model the same wall-clock time instead of the same steps. Who wins now?

# %% [markdown]
# ## Where it breaks
#
# Two mistakes that lower the loss and ruin the model. **Padding in the loss:** forget the -100, and the model is paid for predicting padding, which is easy. **Labels not shifted:** the label is the input itself.

# %% id="pretrain-mistakes"
class Mistake:
    def __init__(self, change):
        self.change = change

    def __getitem__(self, step):
        return self.change(padded[step])


mistakes = {
    "right": lambda batch: batch,
    "padding in the loss": lambda batch: batch | {"labels": batch["labels"].masked_fill(batch["labels"] == -100, tokenizer.eos_id)},
    "labels not shifted": lambda batch: batch | {"labels": torch.where(batch["labels"] == -100, -100, batch["input_ids"])},
}

# %% [markdown]
# Each is trained for a few steps on the same padded batches, then judged on held-out text:

# %% id="pretrain-mistakes-train"
few = chapter.steps(size.mistake_steps)
brief, shown, honest = TrainConfig(steps=few, learning_rate=size.learning_rate, precision=settings.precision, log_every=1), {}, {}
for name, change in mistakes.items():
    set_seed(0)
    other = MiniMind(config).to(device)
    shown[name] = train(other, Mistake(change), pretrain_loss, brief).loss
    honest[name] = evaluate_bits_per_byte(other, held_out[:4000], byte_lengths, size.context, amp=amp)
    print(f"{name:20} training loss {shown[name][-1]:.2f} nats, held-out {honest[name]:.2f} bits per byte")

# %% [markdown]
# The two wrong runs show the better loss and write the worse text. Held-out bits per byte, computed by code that the training loop does not share, is what tells them apart.

# %% id="pretrain-mistakes-figure"
fig, ax = plt.subplots(figsize=(7, 2.6))
for name, curve in shown.items():
    ax.plot(range(1, len(curve) + 1), curve, label=f"{name}: held-out {honest[name]:.2f} bits per byte")
ax.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(0, None))
ax.legend()
show(fig, "The wrong runs have the lower training loss and the worse held-out text.")
if few >= 8 and share["padded"] < 0.6:  # enough padding to matter
    assert shown["padding in the loss"][-1] < shown["right"][-1] and honest["right"] < min(honest["padding in the loss"], honest["labels not shifted"])

# %% [markdown]
# **Exercise 9.6 (15 min, ★★).** A loss that falls below 0.1 nats within a hundred steps is always a bug. Name three that would cause it, and the one-line check for each.

# %% [markdown]
# ## Closing
#
# - Speed is counted in tokens of real text. Packing gives the most, then 16-bit products and memory that stays.
# - Packed windows are addressed by step, so the run can be interrupted and goes on exactly.
# - Fluency comes first, facts come late: each fact must be read many times.
# - Bits per byte on held-out text is the judge; the training loss can lie.
# - At equal active size, experts own more weights and cost more seconds; in a short run they gain little per token.
#
# **Words:** pretraining, packing, padding, window, epoch, memory map, throughput, profiler, milestone, held-out text, active parameters.
#
# **Sources:** Brown et al. 2020, GPT-3 (packing documents into rows), arXiv:2005.14165. Allen-Zhu and Li 2023, Physics of language models 3.1 (how often a fact must be read), arXiv:2309.14316.
# Fedus, Zoph and Shazeer 2021, Switch Transformers (equal active size), arXiv:2101.03961. Krell et al. 2021, packing without padding, arXiv:2107.02027.
#
# **Next:** the model only ever took the most likely token. Chapter 10 lets it choose, and makes it fast.
