# %% [markdown]
# # 9. Pretraining
#
# At the end of this chapter you have a language model that you trained from nothing and saved as a folder that other programs can open.
# You will have made its training several times faster, with the gain of each step measured, watched it learn facts, and compared it with a model with experts.
#
# You need: tokens and shards (chapters 1 and 2), bits per byte (3), experts (6), the model (7), the loop (8).
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

sizes = np.array([5, 3, 8, 2, 6, 4, 4])
numbers = np.arange(1, 8)[:, None]
alone = np.where(np.arange(8) < sizes[:, None], numbers, 0)  # (7, 8); 0 is padding
together = np.repeat(numbers, sizes).reshape(4, 8)
fig, axes = plt.subplots(1, 2, figsize=(7, 2.2))
for ax, rows, name in zip(axes, (alone, together), ("one document a row", "packed")):
    shown = np.ma.masked_equal(rows, 0)
    ax.pcolormesh(shown, cmap="cividis", edgecolors="white", linewidth=1.5)
    ax.set(title=f"{name}: {len(rows)} rows", xlabel="position", ylim=(7, 0), yticks=[])
    ax.grid(False)
show(fig, "Seven short documents, one colour each. Left: a row each, empty cells are "
          "padding. Right: the same tokens packed into four full rows.")

# %% [markdown]
# Pretraining is chapter 8's loop, fed with all the text there is. What decides is how much text it can read in the time you have.
# So this chapter has two halves: first speed (9.1 to 9.4), then the run (9.5 to 9.10).

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
# The file is then *mapped* into memory: it looks like an array, and the system reads only the parts that you touch.

# %% id="pretrain-shards"
def documents(name):
    return read_texts(data / "pretrain" / f"{name}.jsonl.gz")

shards = write_shards(documents("train"), tokenizer, chapter.work / "train")
valid = write_shards(documents("valid"), tokenizer, chapter.work / "valid")
lengths = np.diff(shards.documents)
print(f"{len(shards.tokens):,} tokens in {len(lengths):,} documents, "
      f"{shards.num_bytes / len(shards.tokens):.2f} bytes per token")

# %% [markdown]
# ## 9.1 How much of a batch is text?
#
# A batch is a rectangle: B rows of T tokens. Documents are not. The usual way gives each document a row and fills it up with padding.
# **Before you look:** what share of such a rectangle of 256 columns is text?

# %% id="pretrain-lengths-figure"
cut = np.minimum(lengths, size.context)
fig, ax = plt.subplots(figsize=(7, 2.5))
ax.hist(cut, bins=60)
ax.set(xlabel="tokens of a document", ylabel="documents", xlim=(0, size.context + 4))
show(fig, f"The axis ends where a row ends: of a padded row of {size.context} tokens, "
          f"{cut.mean() / size.context:.0%} on average would be text.")

# %% [markdown]
# Here is the baseline, as most tutorials write it: one document a row, tokenised when it is asked for, padded, with the padding left out of the loss.
# Inputs and labels are the same tokens, one place apart; the label -100 says "do not count this place" (chapter 3).

# %% id="pretrain-padded-documents"
#| export
class PaddedDocuments:
    """One document a row, tokenised when asked for, padded to `context`: slow."""

    def __init__(
        self, texts: Sequence[str], tokenizer, context: int, batch_size: int,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.texts, self.tokenizer, self.device = texts, tokenizer, device
        self.context, self.batch_size = context, batch_size

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        eos = self.tokenizer.eos_id
        ids = torch.full((self.batch_size, self.context + 1), eos)  # (B, T+1)
        labels = torch.full((self.batch_size, self.context), -100)  # (B, T)
        for row in range(self.batch_size):
            text = self.texts[(step * self.batch_size + row) % len(self.texts)]
            tokens = [*self.tokenizer.encode(text), eos][: self.context + 1]
            tokens = ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(tokens) - 1] = tokens[1:]
        batch = {"input_ids": ids[:, :-1], "labels": labels}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

# %% [markdown]
# **Exercise 9.1 (15 min, ★★): `PaddedDocuments`** in [workbook 9](../exercises/09_pretraining.ipynb). Rebuild it without looking: the end of a document is learned, padding is not.
#
# ## 9.2 Packing
#
# **Packing** cuts the endless row of tokens into windows of T + 1 instead. By hand, for ten tokens and T = 3:
# windows start at 0, 3 and 6. The first is tokens 0 to 3, with inputs 0 1 2 and labels 1 2 3. The last token of a window is the first input of the next, so every token is a label exactly once.
#
# Two things make it good to train on. Each *epoch* (one pass over all the text) has its own order and its own shift of the windows, so no token stands twice at the same place in its row.
# And `[step]` always gives the same batch, as chapter 8's loop asks: `start` finds the epoch and the place in it by division, and deals the order of that epoch out again from its seed.

# %% id="pretrain-packed-tokens"
#| export
class PackedTokens:
    """Full windows of a long row of tokens, in shuffled epochs; `[step]` never changes.

    Window i of an epoch is `tokens[i*context + shift : ... + context + 1]`.
    """

    def __init__(
        self, tokens, context: int, batch_size: int, seed: int = 0,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        if len(tokens) < 2 * context + 1:
            raise ValueError(
                f"{len(tokens)} tokens are too few for windows of {context}: "
                f"need {2 * context + 1}, shorten the context or add text"
            )
        self.tokens, self.context, self.batch_size = tokens, context, batch_size
        self.seed, self.device = seed, device
        self.windows = (len(tokens) - 1) // context - 1  # one less: room for the shift
        self.epoch, self.starts = -1, np.empty(0, dtype=np.int64)

    def start(self, position: int) -> int:
        """First token of the window at `position` of the endless row of epochs."""
        epoch, index = divmod(position, self.windows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order, shift = rng.permutation(self.windows), rng.integers(self.context)
            self.epoch, self.starts = epoch, order * self.context + shift
        return int(self.starts[index])

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        first = step * self.batch_size
        starts = [self.start(first + row) for row in range(self.batch_size)]
        rows = np.stack([self.tokens[s : s + self.context + 1] for s in starts])
        rows = torch.from_numpy(rows.astype(np.int64)).to(self.device)  # (B, T+1)
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}

# %% [markdown]
# Check it on the numbers 0 to 999. Full rows, and labels one ahead:

# %% id="pretrain-packed-check"
counting_up = np.arange(1000, dtype=np.uint16)
toy = PackedTokens(counting_up, context=10, batch_size=7, seed=3)
assert torch.equal(toy[0]["input_ids"] + 1, toy[0]["labels"])

# %% [markdown]
# A step can be asked for without the steps before it, which is what makes exact resume possible:

# %% id="pretrain-packed-again"
again = PackedTokens(counting_up, context=10, batch_size=7, seed=3)
assert torch.equal(again[5]["labels"], toy[5]["labels"])  # without steps 0 to 4

# %% [markdown]
# In one epoch every label comes once. The next epoch starts its windows at other places: both the order and the last digit, which is the shift, are new.

# %% id="pretrain-packed-epoch"
labels = torch.cat([toy[step]["labels"].flatten() for step in range(toy.windows // 7)])
assert len(labels.unique()) == len(labels) == toy.windows // 7 * 70
for epoch in range(2):
    print("epoch", epoch, [toy.start(epoch * toy.windows + row) for row in range(4)])

# %% [markdown]
# **Exercise 9.2 (30 min, ★★★): `PackedTokens`** in [workbook 9](../exercises/09_pretraining.ipynb). Windows in an order and with a shift of each epoch's own,
# and any step without the steps before it.
#
# Both ways side by side, on real text:

# %% id="pretrain-batch-figure"
from itertools import cycle, islice

texts = list(islice(documents("train"), 2000))
padded = PaddedDocuments(texts, tokenizer, size.context, size.batch_size, device)
packed = PackedTokens(shards.tokens, size.context, size.batch_size, device=device)

# %% [markdown]
# Grey is text, black the end of a document, white is padding:

# %% id="pretrain-batch-share"
share = {}
fig, axes = plt.subplots(2, 1, figsize=(7, 3.2), sharex=True)
for ax, (name, batches) in zip(axes, {"padded": padded, "packed": packed}.items()):
    labels = batches[0]["labels"].cpu()
    share[name] = (labels != -100).float().mean().item()
    shades = (labels != -100) + 0.6 * (labels == tokenizer.eos_id)
    ax.imshow(shades, "Greys", vmin=0, vmax=1.6, aspect="auto", interpolation="nearest")
    ax.set(ylabel="row", title=f"{name}: {share[name]:.0%} text")
    ax.grid(False)
axes[1].set_xlabel("position")
show(fig, f"One batch each: {1 - share['padded']:.0%} of the first is padding (white).")
assert share["packed"] == 1.0

# %% [markdown]
# A packed row holds several documents, and a token may look back into the one before. The model learns from `<|endoftext|>` that what stands before does not matter.
# GPT-2 and GPT-3 were trained so. Chapter 11 packs conversations with a mask between them, because there it does matter.
#
# **Exercise 9.5 (10 min, ★★): `document_mask`** in [workbook 9](../exercises/09_pretraining.ipynb). A mask that keeps packed documents apart, and does not quite. Find both bugs.
#
# **Exercise 9.6 (20 min, ★★): `best_fit`** in [workbook 9](../exercises/09_pretraining.ipynb). Pack documents without cutting any of them (Ding et al. 2024).
#
# **Exercise 9.7 (15 min, ★★): `share_cut`** in [workbook 9](../exercises/09_pretraining.ipynb). How many documents does a plain window cut in two? Predict, then measure.
#
# The loss is one line for a dense model. A model with experts adds the balance loss of chapter 6, so that no expert dies; the cross-entropy is logged by itself, because only it can be compared.

# %% id="pretrain-loss"
#| export
def pretrain_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
    """Cross-entropy of the next token (nats), with experts plus their balance loss."""
    loss = cross_entropy(model(batch["input_ids"]), batch["labels"])
    means = {"cross_entropy": loss}
    if model.config.num_experts:
        loss = loss + model.config.router_aux_loss_coef * model.aux_loss
    return loss, means

# %% [markdown]
# **Exercise 9.3 (10 min, ★): `pretrain_loss`** in [workbook 9](../exercises/09_pretraining.ipynb). What is minimised, and what is logged to be compared.
#
# ## 9.3 From the naive loop to the fast one
#
# Now we time it, adding one thing after another. What counts is tokens of real text per second: padding is work, but not progress.
# Each speed is measured on a new model with the same weights, so that only the thing added differs.

# %% id="pretrain-config"
config = ModelConfig.preset(chapter.model, vocab_size=tokenizer.vocab_size)
amp = chapter.amp  # the 16-bit type that this machine multiplies fast, or None
print(f"{chapter.model}: {MiniMind(config).num_parameters():,} weights, amp {amp}")

# %% [markdown]
# One training step, as in chapter 8, with or without autocast to a 16-bit type:

# %% id="pretrain-one-step"
def one_step(model, optimizer, batch, amp, loss_fn=pretrain_loss):
    with torch.autocast(device.type, amp, enabled=amp is not None):
        loss, _ = loss_fn(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()  # waits for the device, so that the clock does too

# %% [markdown]
# The clock runs over making the batch, loss, gradient and update. The result is the median over some steps, after one that warms up.
# The naive optimiser updates weight by weight; `fused` does a group at once.

# %% id="pretrain-timed-steps"
import time

def real_tokens_per_second(batches, amp=None, fused=False, compiled=False):
    set_seed(0)
    model = MiniMind(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused, foreach=False)
    loss_fn, speeds = torch.compile(pretrain_loss) if compiled else pretrain_loss, []
    for step in range(size.table_steps + 1):
        begin = time.perf_counter()
        batch = batches[step]
        one_step(model, optimizer, batch, amp, loss_fn)
        real = (batch["labels"] != -100).sum().item()  # not the rectangle
        speeds.append(real / (time.perf_counter() - begin))
    return float(np.median(speeds[1:]))

# %% [markdown]
# One step between padding and shards is missing: packed rows, but tokenised anew for each batch.

# %% id="pretrain-tokenised-late"
class TokenisedLate:
    def __getitem__(self, step):
        row, later = [], islice(cycle(texts), step * 31, None)
        while len(row) <= size.batch_size * size.context:
            row += [*tokenizer.encode(next(later)), tokenizer.eos_id]
        row = torch.tensor(row[: size.batch_size * size.context + 1], device=device)
        inputs, labels = row[:-1].view(-1, size.context), row[1:].view(-1, size.context)
        return {"input_ids": inputs, "labels": labels}

# %% [markdown]
# The ladder. **Before you run it:** which rung gains most on your machine: packing, 16-bit products, the fused optimiser, or keeping memory?

# %% id="pretrain-ladder"
keep_memory(False)
speeds = {"naive: float32, padded rows": real_tokens_per_second(padded)}
speeds["+ packing"] = real_tokens_per_second(TokenisedLate())
speeds["+ memory-mapped tokens"] = real_tokens_per_second(packed)

# %% [markdown]
# So far the batches. Now the arithmetic: 16-bit products, one fused update, and freed memory that is kept instead of returned.

# %% id="pretrain-ladder-arithmetic"
if amp is not None:
    speeds[f"+ {str(amp)[6:]}"] = real_tokens_per_second(packed, amp)
speeds["+ fused optimiser"] = real_tokens_per_second(packed, amp, fused=True)
if device.type == "cpu" and keep_memory():  # chapter 8
    speeds["+ memory kept"] = real_tokens_per_second(packed, amp, fused=True)

# %% [markdown]
# The last rung is `torch.compile`: it joins small operations of the model and of the loss into larger ones, which needs a C++ compiler and time to compile. Whether it pays depends on the
# length of the run: it must save more seconds in all steps together than compiling costs.

# %% id="pretrain-compile"
import shutil

compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
eager, compiled_pays = max(speeds.values()), False
if size.compile and compiler:
    begin = time.perf_counter()
    fast = real_tokens_per_second(packed, amp, fused=True, compiled=True)
    cost = time.perf_counter() - begin
    saved = size.batch_size * size.context * size.steps * (1 / eager - 1 / fast)
    speeds["+ torch.compile"], compiled_pays = fast, saved > cost
    print(f"compiling took about {cost:.0f} s and would save {saved:.0f} s in the run")
else:
    print("left out:", "the profile says so" if compiler else "no C++ compiler here")

# %% [markdown]
# A compiled step rounds in other places, so the run ends with slightly other weights. The `cpu` profile measures this rung and then trains without it: its numbers should not depend on
# whether you have a compiler. Its key `compile_run` changes that.

# %% id="pretrain-compile-run"
compiled_run = compiled_pays and size.compile_run
print("the run will be compiled" if compiled_run else "the run will not be compiled")

# %% [markdown]
# How many times as fast as the naive loop? Both numbers compare with the first bar below.

# %% id="pretrain-table"
slowest = speeds["naive: float32, padded rows"]
check("pretrain/speedup", max(speeds.values()) / slowest)
_ = check("pretrain/packing_speedup", speeds["+ packing"] / slowest)

# %% [markdown]
# Read the bars from the top, each against the one above it. A bar may even be a little shorter: a few steps on a machine that does other things too are a noisy clock, and a gain of a few percent can hide in it.

# %% id="pretrain-ladder-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
bars = ax.barh(list(speeds), list(speeds.values()), color="C0")
ax.bar_label(bars, fmt=" {:,.0f}", fontsize=8)
ax.invert_yaxis()
ax.set(xlabel="tokens of real text per second", xlim=(0, 1.15 * max(speeds.values())))
ax.grid(axis="y", visible=False)
show(fig, "From the naive loop (top) to the fast one, each bar adds one thing: "
          f"together {max(speeds.values()) / slowest:.0f} times as fast.")

# %% [markdown]
# Memory-mapped tokens change little in speed at this size: our tokenizer is fast. They change what is possible: memory stays flat however large the text, and any step can be read without the ones before it, which is what exact resume needs.
#
# **Try it.** Time batches of 4, 16 and 64 rows, in tokens of text per second. Which is fastest on your machine, and why is the largest not?
#
# ## 9.4 Where the time goes
#
# The profiler adds up the time of every operation of one step, under names such as `aten::mm`. We sort them into six kinds by parts of their names; the first kind that fits counts.

# %% id="pretrain-profile"
KINDS = {"loss": ["log_softmax", "nll_loss"],
         "optimiser": ["adam", "norm_foreach", "linalg"],
         "attention": ["scaled_dot_product", "softmax"],
         "matrix products": ["mm", "linear"],
         "copies and casts": ["copy_", "fill_", "cat", "zero"]}

def kind_of(name):
    fits = lambda kind: any(part in name for part in KINDS[kind])
    return next(filter(fits, KINDS), "small operations")

# %% [markdown]
# One step to warm up, one that is counted. The switch keeps the profiler's own messages away.

# %% id="pretrain-profile-steps"
import os

os.environ["KINETO_LOG_LEVEL"] = "99"
model = MiniMind(config).to(device)
optimizer = make_optimizer(model, TrainConfig(steps=1))
for step in range(2):
    with torch.profiler.profile() as profiler:  # processor and, where there is one, GPU
        one_step(model, optimizer, packed[step], amp)

# %% [markdown]
# The time of each operation without the operations inside it, added up by kind:

# %% id="pretrain-profile-sums"
clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
spent = dict.fromkeys([*KINDS, "small operations"], 0.0)
for event in profiler.key_averages():
    spent[kind_of(event.key.lower())] += getattr(event, clock)
percent = {kind: 100 * value / sum(spent.values()) for kind, value in spent.items()}

# %% [markdown]
# Matrix products are the work itself. On a processor, and in a model this narrow, they are the smaller part: norms, rotations and additions do little arithmetic, and yet each reads and writes every
# number once more. These are what the compiler joined on the last rung.

# %% id="pretrain-profile-figure"
fig, ax = plt.subplots(figsize=(7, 2.5))
ax.barh(list(percent), list(percent.values()), color="C0")
ax.invert_yaxis()
ax.set(xlabel="share of one training step (%)")
ax.grid(axis="y", visible=False)
show(fig, f"Matrix products take {percent['matrix products']:.0f}% of a step, "
          f"attention {percent['attention']:.0f}%; the rest is everything around them.")

# %% [markdown]
# ## 9.5 The baseline to beat
#
# Before the run, the number that it must beat: what counting alone reaches on the same held-out text (chapter 3).
# The measure is bits per byte: all the surprise of the text in bits, divided by its length in bytes, so that models with other tokenizers can be compared.

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
# The pair count is mixed with the single count, nine parts to one, so that a pair which the training text never had still gets a chance.

# %% id="pretrain-baselines"
single = (counted(tokens, held_out[1:]) + 1) / (len(tokens) + V)
pairs = counted(tokens[:-1] * V + tokens[1:], held_out[:-1] * V + held_out[1:])
mixed = 0.9 * pairs / np.maximum(1, counted(tokens, held_out[:-1])) + 0.1 * single
baselines = {}
for name, p in (("single tokens", single), ("pairs of tokens", mixed)):
    baselines[name] = float(-np.log2(p).sum() / num_bytes)
    print(f"counting {name}: {baselines[name]:.3f} bits per byte")

# %% [markdown]
# ## 9.6 What it knows
#
# The world's facts are known, so we can ask: which does the model complete correctly? A prompt "Garus lives in" must go on with exactly the tokens of " Foxhollow".
# Generating token by token would answer this, slowly. One pass over prompt and answer together does as well: if at every position of the answer the most likely token is the right one, then greedy generation would have written it.
#
# The row of predictions is one place behind the row of tokens: what is predicted *at* the last token of the prompt is the first token of the answer. Hence the `- 1` in `guess`.

# %% id="pretrain-facts-known"
#| export
@torch.no_grad()
def facts_known(
    model: nn.Module, tokenizer, facts: Sequence[dict], batch_size: int = 64
) -> tuple[float, list[dict]]:
    """Share of facts whose answer tokens are all the most likely ones; a row per fact.

    A position sees only earlier tokens, so one pass says what greedy writing would.
    """
    device, rows = next(model.parameters()).device, []
    for first in range(0, len(facts), batch_size):
        some = facts[first : first + batch_size]
        prompts = [tokenizer.encode(fact["prompt"]) for fact in some]
        answers = [tokenizer.encode(fact["answer"]) for fact in some]
        both = [torch.tensor(p + a) for p, a in zip(prompts, answers)]
        ids = nn.utils.rnn.pad_sequence(both, batch_first=True)  # (B, T)
        best = model(ids.to(device)).argmax(-1).tolist()  # (B, T)
        for fact, prompt, answer, row in zip(some, prompts, answers, best):
            guess = row[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            known = {"guess": tokenizer.decode(guess), "known": guess == answer}
            rows.append({**fact, **known})
    return sum(row["known"] for row in rows) / max(1, len(rows)), rows

# %% [markdown]
# **Exercise 9.4 (25 min, ★★★): `facts_known`** in [workbook 9](../exercises/09_pretraining.ipynb). One pass for many facts; the check compares with greedy writing.
#
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
# The facts and, for later, questions about them stand beside the text. A fact has a prompt, an answer and a kind, here called relation. Real text comes without such lists; then the run is judged by bits per byte alone.

# %% id="pretrain-facts"
import json

def rows_of(name):
    path = data / name
    return list(map(json.loads, path.open(encoding="utf-8"))) if path.exists() else []

facts, questions = rows_of("facts.jsonl"), rows_of("questions.jsonl")
print(len(facts), "facts, the first:", *(facts[0].values() if facts else []), sep=" | ")

# %% [markdown]
# ## 9.7 The run
#
# Every so often the run stops to measure three things: bits per byte on held-out text, facts known, and how it continues a few words.

# %% id="pretrain-held-out"
def held_out_bits(model, tokens=held_out):
    bits = evaluate_bits_per_byte(model, tokens, byte_lengths, size.context, amp=amp)
    return {"bits_per_byte": bits}

prompts, samples = [fact["prompt"] for fact in facts[:2]] + ["One day"], []

# %% [markdown]
# `evaluate` is handed to `train`, which calls it at every milestone:

# %% id="pretrain-evaluate"
def evaluate(model):
    result = held_out_bits(model)
    if facts:
        result["facts"] = facts_known(model, tokenizer, facts)[0]
    samples.append([greedy(model, prompt, 12) for prompt in prompts])
    print({name: round(number, 3) for name, number in result.items()}, samples[-1][0])
    return result

# %% [markdown]
# When you run this notebook by hand, a plot grows below while the model trains, with the time that is left. In a course run it stays quiet.
# `train` calls it at every line of the log; it draws at most every two seconds.

# %% id="pretrain-live"
def live(history):
    if time.perf_counter() - live.drawn < 2 and history.step[-1] < steps:
        return
    left = (steps - history.step[-1]) * history.seconds[-1] / history.step[-1]
    fig, ax = plt.subplots(figsize=(7, 2.6))
    ax.plot(history.step, history.loss)
    ax.set(xlabel="step", ylabel="loss (nats)", title=f"{left / 60:.1f} minutes left")
    live.handle.update(fig)
    plt.close(fig)
    live.drawn = time.perf_counter()

# %% [markdown]
# The settings are chapter 8's. A **milestone** comes every `eval_every` steps; there the run is measured and also saved, so that a crash costs at most the way from the last one.
# `log_every` is finer: it only writes down the means of the loss.

# %% id="pretrain-settings"
steps = chapter.steps(size.steps)
milestone = -(-steps // size.milestones)  # rounded up
settings = TrainConfig(
    steps, size.learning_rate, accumulation=size.accumulation, compile=compiled_run,
    precision=chapter.settings.precision, log_every=max(1, min(10, steps // 20)),
    eval_every=milestone, save_every=milestone)

# %% [markdown]
# The number of tokens is the number that matters: about how often is each document read? Steps times rows times tokens of a row.
# With the speed from the ladder this also says how long it will take, before it starts.
#
# **Exercise 9.8 (10 min, ★): `compute_optimal`** in [workbook 9](../exercises/09_pretraining.ipynb). For a given amount of arithmetic, how many weights are best, and how many tokens?
# (Hoffmann et al. 2022)

# %% id="pretrain-how-long"
reads = steps * size.accumulation * size.batch_size * size.context
print(f"{steps} steps: {reads:,} tokens, {reads / len(shards.tokens):.1f} x the text")
print(f"about {reads / (fast if compiled_run else eager) / 60:.1f} minutes")

# %% [markdown]
# If it is interrupted, start the chapter again: it goes on from the last checkpoint. The folder's name holds a checksum of the tokens, so that a run never continues on other text.

# %% id="pretrain-run"
import zlib

start = np.asarray(shards.tokens[:1_000_000])
checksum = zlib.crc32(start.tobytes()) ^ len(shards.tokens)
resume_folder = chapter.work / f"resume-{checksum:08x}"

# %% [markdown]
# Somebody at the notebook gets the plot, a course run does not:

# %% id="pretrain-live-start"
by_hand = chapter.alone and hasattr(get_ipython(), "kernel")  # not in a course run
if by_hand:
    live.handle, live.drawn = display("training starts", display_id=True), 0.0

# %% [markdown]
# Go. Each line below is a milestone: watch when the town becomes the right one.

# %% id="pretrain-train"
set_seed(settings.seed)
model = MiniMind(config).to(device)
history = train(model, packed, pretrain_loss, settings, resume_folder, resume=True,
                evaluate=evaluate, on_log=live if by_hand else None)
seconds, speed = history.seconds[-1], history.tokens[-1] / history.seconds[-1]
print(f"{seconds:.0f} s, {speed:,.0f} tokens/s, last loss {history.loss[-1]:.3f}")

# %% [markdown]
# Read the milestones as a story. At profile cpu bits per byte fall at each, and the first person in the list lives in wrong towns at first, and in the right one in the end.
#
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
# ## 9.8 What it learned
#
# The loss first. At profile cpu it falls in two waves. The first is spelling and phrases, which are everywhere in the text. The second is who lives where;
# the figure after the next shows that it comes at the same time as the facts.

# %% id="pretrain-loss-figure"
evals = history.evals
million = [e["tokens"] / 1e6 for e in evals]
bits = [e["bits_per_byte"] for e in evals]
chapter.curve("pretrain", [e["tokens"] for e in evals], bits, "tokens", "bits per byte")

# %% [markdown]
# The left side is what the loop sees while it trains, the right side what counts.

# %% id="pretrain-loss-drawn"
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
left.plot(np.array(history.tokens) / 1e6, history.loss)
left.set(xlabel="million tokens", ylabel="training loss (nats per token)")
right.plot(million, bits, marker="o", label="the model")
for (name, value), style in zip(baselines.items(), (":", "--")):
    right.axhline(value, color="grey", ls=style, label=f"counting {name}")
right.set(xlabel="million tokens", ylabel="held-out bits per byte", ylim=(0, 2.9))
right.legend()
show(fig, f"Left: training loss. Right: held-out text, {bits[-1]:.2f} bits per byte at "
          "the end; the grey lines are what counting alone reaches.")

# %% [markdown]
# The claim, part one: fewer bits per byte than counting reaches. (Chapter 3's best, counts of four tokens in a row and a small network, came to 0.54 on its own held-out sample, at profile cpu.)

# %% id="pretrain-claim-bits"
bits_per_byte = check("pretrain/bits_per_byte", evals[-1]["bits_per_byte"])
gain = check("pretrain/gain_over_counting", min(baselines.values()) - bits_per_byte)

# %% [markdown]
# Now the facts. **Before you look:** a sentence such as "Hanis lives in ..." is fluent early. Does the right town come at the same time, or later?

# %% id="pretrain-facts-asked"
known, rows = facts_known(model, tokenizer, facts)
by_kind = {}
for row in rows:
    by_kind.setdefault(row["relation"], []).append(row["known"])

# %% [markdown]
# Facts come late and nearly all at once: long after the sentences are fluent, the model still invents the town. A fact is a rare thing, a sentence pattern is not.

# %% id="pretrain-facts-figure"
if facts:
    shares = [e["facts"] for e in evals]
    fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), width_ratios=(3, 2))
    left.plot(million, shares, marker="o")
    left.set(xlabel="million tokens", ylabel="share of facts known", ylim=(-0.03, 1.03))
    right.barh(list(by_kind), [np.mean(kind) for kind in by_kind.values()])
    right.set(xlabel="known at the end", xlim=(0, 1))
    show(fig, f"Left: {shares[0]:.0%} of the facts at the first milestone, {known:.0%} "
              "at the last: learned late and then quickly. Right: the end, by kind.")
    chapter.curve("facts", [e["tokens"] for e in evals], shares, "tokens", "known")

# %% [markdown]
# The claim, part two, and the check that one pass and greedy generation agree:

# %% id="pretrain-claim-facts"
if facts:
    check("pretrain/facts", known)
for row in rows[:5]:
    written = greedy(model, row["prompt"], len(tokenizer.encode(row["answer"])))
    assert (written == row["prompt"] + row["answer"]) == row["known"]
    print(f"{row['prompt']} ->{row['guess']}   (it is{row['answer']})")

# %% [markdown]
# The same beginnings, continued at some of the milestones. Read downwards. The form of a sentence is there from the first on; what changes is whether it is true.

# %% id="pretrain-samples"
dated = list(zip(million[-len(samples) :], samples))
for index, prompt in enumerate(prompts):
    print(f"'{prompt}' ...")
    for read, sample in dated[:: max(1, len(samples) // 5)]:
        print(f"  {read:5.2f} M {sample[index][len(prompt) :]!r}")

# %% [markdown]
# It completes text, nothing else. Much of its text consists of questions with answers, so a bare question may well be completed by its answer.
# In the form of a chat, with turns and an end, it is lost: chapter 11 begins there. Five questions, kept for the report:

# %% id="pretrain-answers"
for question in chapter.five_questions(questions):
    answer = greedy(model, question, 16)[len(question) :].strip()
    chapter.answer("pretrain", question, answer)
    print(f"{question} -> {answer!r}")

# %% [markdown]
# **Try it.** Plot facts known against how often a fact occurs in the text. How often must the model read a fact before it knows it?
#
# ## 9.9 Dense against experts
#
# Chapter 6 promised more capacity for the same work: with four experts of which each token uses one, a token passes through as many weights as in the dense model, but the model owns almost four times the feed-forward weights.
# Each expert is as wide as the dense feed-forward layer (`moe_intermediate_size`). With one expert a token, dividing its share by the sum of the chosen shares would always give 1, and the router would learn nothing from the loss; so that division stays off (`norm_topk_prob`).
#
# The test: equal steps, equal data, equal active size, the same learning rate at every step.
# The dense side is the run above, up to one of its milestones; only the experts have to be trained. **Before you run this:** do four experts gain, and what does a step cost?

# %% id="pretrain-moe-model"
experts = dict(num_experts=4, num_experts_per_tok=1, norm_topk_prob=False,
               moe_intermediate_size=config.intermediate_size, qk_norm=config.qk_norm)
set_seed(settings.seed)
moe = MiniMind(ModelConfig.preset(chapter.model, vocab_size=V, **experts)).to(device)
print(f"{moe.num_parameters() / model.num_parameters():.1f} times the weights")

# %% [markdown]
# The same settings, stopped at the milestone:

# %% id="pretrain-moe-run"
from dataclasses import replace

last = min(steps, max(1, size.moe_milestone * milestone))
moe_settings = replace(settings, save_every=0, compile=False)
moe_history = train(moe, packed, pretrain_loss, moe_settings, evaluate=held_out_bits,
                    max_steps=last)

# %% [markdown]
# Both at that step: bits per byte on held-out text, and the seconds of training until there.

# %% id="pretrain-moe-gain"
at, seconds = {}, {}
for name, run in {"dense": history, "experts": moe_history}.items():
    at[name] = next(e["bits_per_byte"] for e in run.evals if e["step"] == last)
    seconds[name] = run.seconds[sum(step <= last for step in run.step) - 1]
    print(f"step {last}: {name:7} {at[name]:.4f} bits per byte, {seconds[name]:.0f} s")
gain = chapter.record("moe/gain_bits_per_byte", at["dense"] - at["experts"])
slower = seconds["experts"] / seconds["dense"]

# %% [markdown]
# **Did you expect a gain?** See how the curves below run: both models soon reach a plateau, near 1.5 nats a token with the settings of the cpu profile, stay there for a while, and fall again. Whoever leaves the plateau first
# is ahead, and when that happens is luck. After 400 steps the experts were 0.04 bits per byte behind (two runs); after 600 steps 0.01 ahead, and with another seed of the world 0.11 behind. So one pair of runs
# says nothing about experts. It takes several seeds, or runs to the end. Per second they lose every time: sorting tokens to experts costs more than it saves. Larger models that read thousands of times more are
# another matter (Fedus, Zoph and Shazeer 2021); this course claims only what it measured.

# %% id="pretrain-moe-figure"
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
for name, run in (("dense", history), ("4 experts", moe_history)):
    upto = sum(step <= last for step in run.step)
    loss = [means["cross_entropy"] for means in run.metrics[:upto]]
    left.plot(run.step[:upto], loss, label=name)
    right.plot(run.seconds[:upto], loss)
low = min(loss)  # the first fall is the same for both: cut off
left.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0.9 * low, 2 * low))
right.set(xlabel="seconds")
left.legend()
show(fig, f"Dense against four experts: {-gain:+.3f} bits per byte for the experts at "
          f"equal steps (left); their steps take {slower:.1f} times as long (right).")

# %% [markdown]
# ## 9.10 Where it breaks
#
# Two mistakes that lower the loss and ruin the model. **Padding in the loss:** forget the -100, and the model is paid for predicting padding, which is easy. **Labels not shifted:** the label is the input itself.

# %% id="pretrain-mistakes"
def padding_counts(batch):
    labels = batch["labels"]
    return batch | {"labels": labels.masked_fill(labels == -100, tokenizer.eos_id)}

def not_shifted(batch):
    real = batch["labels"] != -100
    return batch | {"labels": torch.where(real, batch["input_ids"], -100)}

# %% [markdown]
# Each is trained for a few steps on the same padded batches, then judged on held-out text. **Predict:** which of the three shows the lowest training loss?

# %% id="pretrain-mistakes-train"
few = chapter.steps(size.mistake_steps)
brief = TrainConfig(few, size.learning_rate, log_every=1, precision=settings.precision)
same = lambda batch: batch
mistakes = {"right": same, "padding counts": padding_counts, "not shifted": not_shifted}
shown, honest = {}, {}
for name, change in mistakes.items():
    set_seed(0)
    other = MiniMind(config).to(device)
    wrong = [change(padded[step]) for step in range(few)]
    shown[name] = train(other, wrong, pretrain_loss, brief).loss
    honest[name] = held_out_bits(other, held_out[:4000])["bits_per_byte"]
    print(f"{name:14} loss {shown[name][-1]:.2f}, {honest[name]:.2f} bits per byte")

# %% [markdown]
# Why do they win? Most places of a padded row are padding, and after one `<|endoftext|>` the next is certain: the mean over all places sinks. And copying the input is the easiest task there is, since a residual network passes it on by itself.
#
# The two wrong runs show the better loss and write the worse text. Held-out bits per byte, computed by code that the training loop does not share, is what tells them apart.

# %% id="pretrain-mistakes-figure"
fig, ax = plt.subplots(figsize=(7, 3))
for name, curve in shown.items():
    label = f"{name}: held-out {honest[name]:.2f} bits per byte"
    ax.plot(range(1, len(curve) + 1), curve, label=label)
ax.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(0, 13))
ax.legend(loc="upper right")
show(fig, "The wrong runs have the lower training loss and the worse held-out text.")
if few >= 8 and share["padded"] < 0.6:  # enough padding to matter
    assert shown["padding counts"][-1] < shown["right"][-1]
    assert honest["right"] == min(honest.values())

# %% [markdown]
# **Try it.** A loss that falls below 0.1 nats within a hundred steps is always a bug. Name three that would cause it, and the one-line check for each.
#
# ## Recap
#
# - Speed is counted in tokens of real text. Packing gives the most, then 16-bit products and memory that stays.
# - Packed windows are addressed by step, so the run can be interrupted and goes on exactly.
# - Fluency comes first, facts come late: each fact must be read many times.
# - Bits per byte on held-out text is the judge; the training loss can lie.
# - At equal active size, experts own more weights and cost more seconds; in a short run they gain little per token.
#
# **Words:** pretraining, packing, padding, window, epoch, memory map, throughput, profiler, milestone, held-out text, active parameters.
#
# **Exercises:** 9.1 to 9.8, in place above, with checks in [workbook 9](../exercises/09_pretraining.ipynb).
#
# **Sources:** Brown et al. 2020, GPT-3 (packing documents into rows), arXiv:2005.14165. Allen-Zhu and Li 2023, Physics of language models 3.1 (how often a fact must be read), arXiv:2309.14316.
# Fedus, Zoph and Shazeer 2021, Switch Transformers (equal active size), arXiv:2101.03961. Krell et al. 2021, packing without padding, arXiv:2107.02027.
# Ding et al. 2024, packing without cutting, arXiv:2404.10830. Hoffmann et al. 2022, compute-optimal sizes, arXiv:2203.15556.
#
# **Next:** the model only ever took the most likely token. Chapter 10 lets it choose, and makes it fast.
