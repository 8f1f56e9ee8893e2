# %% [markdown]
# # 8. The training loop
#
# At the end of this chapter you have one training loop that every later stage of this book uses.
# You start from six lines, break them in five ways, and repair each break with one feature: warm-up, clipping, accumulation, loss scaling, checkpoints.
# Then you kill the run with `kill -9` and prove that it continues bit for bit.
#
# You need: the model of chapter 07, cross-entropy from chapter 03, and what a gradient is.
#
# Reading 40 minutes; running: smoke 25 s, cpu 90 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="train-default-exp"
#| default_exp train

# %% [markdown]
# The whole chapter in one picture: the solid boxes are the six lines that you start from, the dashed ones are what you add.

# %% id="train-map"
import matplotlib.pyplot as plt

labels = ["batch\n[step]", "loss", "times\nscale", "gradient", "add up", "clip", "rate\n(step)", "update", "check-\npoint"]
added = {"times\nscale", "add up", "clip", "rate\n(step)", "check-\npoint"}
fig, ax = plt.subplots(figsize=(7, 1.5))
for x, label in enumerate(labels):
    box = dict(boxstyle="round,pad=0.4", fc="white", ec="C1" if label in added else "C0", lw=2, ls="--" if label in added else "-")
    ax.text(x, 0, label, ha="center", va="center", fontsize=8, bbox=box)
ax.annotate("", (0, 0.5), (8, 0.5), arrowprops=dict(arrowstyle="->", connectionstyle="arc3,rad=0.1"))
ax.text(4, 1.5, "next step", ha="center", fontsize=8)
ax.set(xlim=(-0.6, 8.6), ylim=(-0.7, 1.9))
ax.axis("off")
show(fig, "One step of the loop, left to right: solid boxes are the plain loop, dashed ones are what this chapter adds.")

# %% [markdown]
# ## Six lines that train
#
# Chapter 07 left a model whose first loss is ln V: it knows nothing. Training is what changes that.
# For quick runs we take a small model of three layers and use the bytes of the text as tokens, so that V is 256 and no tokenizer is needed.

# %% [markdown]
# The module needs only the standard library, NumPy, torch and the seed function of chapter 01:

# %% id="train-imports"
#| export
import ctypes
import math
import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minimind.data import set_seed

# %% [markdown]
# A batch is addressed by its number: `batches[5]` is always the same batch.
# This small rule pays off twice. Any two runs see the same data, and a run that was killed knows where it stood: the data position is the step.

# %% id="train-byte-stream"
from itertools import islice

from minimind.data import read_texts

texts = islice(read_texts(chapter.read("data") / "pretrain" / "train.jsonl.gz"), 3000)
stream = torch.frombuffer(bytearray("\n".join(texts).encode()), dtype=torch.uint8).long()

# %% [markdown]
# The step number seeds the choice of the rows. `spikes` will later put damaged batches at chosen steps; for now there are none.

# %% id="train-byte-batches"
class ByteBatches:
    def __init__(self, batch_size=16, context=64, spikes=()):
        self.batch_size, self.context, self.spikes = batch_size, context, spikes

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(stream) - self.context - 1, (self.batch_size, 1), generator=generator)
        rows = stream[starts + torch.arange(self.context + 1)]  # (B, T+1)
        if step in self.spikes:  # a damaged file: one random byte, repeated to the end of the row
            rows = torch.randint(256, (self.batch_size, 1), generator=generator).repeat(1, self.context + 1)
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}

# %% [markdown]
# The same number gives the same batch, whenever we ask:

# %% id="train-same-batch"
batches = ByteBatches()
assert torch.equal(batches[5]["input_ids"], batches[5]["input_ids"])
print(bytes(batches[5]["input_ids"][0].tolist()).decode())

# %% [markdown]
# The loss function gets a model and a batch and returns the mean loss and a dict of further numbers to log.
# Pretraining, chat tuning and distillation differ in this function only, so one loop serves them all.

# %% id="train-byte-model"
from minimind.metrics import cross_entropy


def byte_loss(model, batch):
    return cross_entropy(model(batch["input_ids"]), batch["labels"]), {}

# %% [markdown]
# The model is chapter 07's, only smaller. `set_seed` makes every new model start from the same weights, so that two runs differ only in what we change.

# %% id="train-small-model"
from minimind.model import MiniMind, ModelConfig

SMALL = dict(
    vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=160
)


def new_model(seed=0):
    set_seed(seed)
    return MiniMind(ModelConfig.preset("minimind2-small", **SMALL))

# %% [markdown]
# Now the six lines. **Before you run this:** the first loss is known. Is it near 4, 5.5 or 8?

# %% id="train-plain-loop"
model, losses = new_model(), []
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for step in range(chapter.steps(chapter.size.steps)):
    loss, _ = byte_loss(model, batches[step])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"first loss {losses[0]:.2f}, ln 256 = {math.log(256):.2f}, last loss {losses[-1]:.2f}")
assert abs(losses[0] - math.log(256)) < 0.2

# %% [markdown]
# It learns. But the curve below falls fast to about 3.1 and then hangs there for a long time.
# How low can a model come that knows only how frequent each byte is? That is the entropy of the byte counts (chapter 03):

# %% id="train-entropy"
frequency = torch.bincount(stream).double() / len(stream)
entropy = -torch.special.xlogy(frequency, frequency).sum().item()
print(f"byte frequencies alone: {entropy:.2f} nats")
trained = model  # used again below

# %% [markdown]
# The plateau stands exactly there. The rest of this chapter asks what it costs to leave it late, and what else goes wrong.

# %% id="train-plain-figure"
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.plot(losses)
ax.axhline(entropy, color="grey", ls=":")
ax.text(len(losses), entropy + 0.06, "byte frequencies alone", ha="right", fontsize=8, color="dimgrey")
ax.set(xlabel="step", ylabel="loss (nats per byte)")
show(fig, "The plain loop: the loss falls quickly to what byte frequencies alone can reach and stays there for many steps.")

# %% [markdown]
# ## The learning rate over time
#
# Adam divides each gradient by a running estimate of its size. In the first steps this estimate rests on one or two batches,
# so every weight takes a full step of the learning rate in a direction that is mostly noise.
# **Warm-up** makes these first steps small. At the other end, **decay** makes the last steps small, because a large step cannot settle in a narrow valley.
#
# All settings of a run live in one dataclass. The three that matter here are shares, so that they fit a run of any length.

# %% id="train-config"
#| export
@dataclass
class TrainConfig:
    """Settings of one training run. `warmup`, `decay` are shares of the steps, `final_lr` a share of the peak."""

    steps: int
    learning_rate: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.5
    final_lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0  # 0 switches clipping off
    accumulation: int = 1  # micro-batches per step
    precision: str = "auto"  # auto, bf16, fp16 or fp32
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0  # 0: only at the end
    save_every: int = 0  # 0: only at the end
    compile: bool = False

# %% [markdown]
# Take a run of 10 steps, with peak 1, warm-up over 2 steps and decay over 5. By hand:
# the rise is 1/2, 2/2; then flat; then the fall counts the steps that are left, 5/5, 4/5, ..., 1/5, mixed with the final rate.
#
# $$ \text{rate}(s) = \text{peak} \cdot \min\Big(1,\ \tfrac{s+1}{w},\ f + (1-f)\,\tfrac{S-s}{d}\Big) $$
#
# Here $S$ is the number of steps, $w$ and $d$ the steps of warm-up and decay, $f$ the final share.

# %% id="train-learning-rate"
#| export
def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Learning rate of `step` (from 0): a linear rise, a flat middle, a linear fall (Hu et al. 2024, arXiv:2404.06395)."""
    rise = (step + 1) / max(1, round(config.warmup * config.steps))
    fall = (config.steps - step) / max(1, round(config.decay * config.steps))
    return config.learning_rate * min(1.0, rise, config.final_lr + (1 - config.final_lr) * fall)

# %% [markdown]
# The numbers by hand and the function agree:

# %% id="train-learning-rate-check"
ten = TrainConfig(steps=10, learning_rate=1.0, warmup=0.2, decay=0.5, final_lr=0.0)
by_hand = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
assert np.allclose([learning_rate_at(step, ten) for step in range(10)], by_hand)

# %% [markdown]
# This shape is called a trapezoid, or warm-up, stable, decay. The cosine that older recipes use is drawn beside it.
# The trapezoid has one practical gain: until the decay begins, you need not know how long the run will be.

# %% id="train-schedule-figure"
shape = TrainConfig(steps=1000)
steps = np.arange(1000)
cosine = 0.1 + 0.45 * (1 + np.cos(np.pi * steps / 1000))
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(steps, [learning_rate_at(step, shape) / shape.learning_rate for step in steps], label="warm-up, flat, linear decay (ours)")
ax.plot(steps, cosine * np.minimum(1, (steps + 1) / 20), label="cosine")
ax.set(xlabel="step", ylabel="share of the peak rate")
ax.legend()
show(fig, "Both schedules rise during the first 2% of the steps and end at a tenth of the peak; ours stays flat until half of the run.")

# %% [markdown]
# **Exercise 8.1 (10 min, ★).** Without running it: what is the rate at step 0 when `warmup=0`? What would go wrong with `step / w` in place of `(step + 1) / w`?
#
# To see what warm-up does we need the loop itself. It comes next, piece by piece.

# %% [markdown]
# ## The optimiser, and what must not decay
#
# One AdamW step by hand, on one weight. The gradient $g$ feeds two running means, of $g$ and of $g^2$; both are divided by what is missing at the start;
# the weight moves by their quotient, and shrinks a little on its own (weight decay):
#
# $$ m = \beta_1 m + (1-\beta_1) g, \qquad v = \beta_2 v + (1-\beta_2) g^2, \qquad w \leftarrow w - \eta\lambda w - \eta\, \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon} $$

# %% id="train-adam-by-hand"
w, m, v, lr, decay, beta1, beta2 = 1.0, 0.0, 0.0, 0.1, 0.01, 0.9, 0.95
for t, g in enumerate([0.5, 0.0001], start=1):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    w = w - lr * decay * w - lr * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + 1e-8)
    print(f"step {t}: gradient {g}, weight {w:.5f}")

# %% [markdown]
# The first step moves by the full rate of 0.1, whatever the size of the gradient: $m/\sqrt{v}$ is 1 there. That is why the first steps need a warm-up.
# PyTorch's optimiser gives the same weight:

# %% id="train-adam-check"
weight = torch.nn.Parameter(torch.tensor(1.0))
adamw = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01, betas=(0.9, 0.95), fused=True)
for g in [0.5, 0.0001]:
    weight.grad = torch.tensor(g)
    adamw.step()
assert abs(weight.item() - w) < 1e-6

# %% [markdown]
# Weight decay pulls a weight to zero. For a matrix that is a preference for small, spread-out weights.
# For the gain of a norm it is a mistake: its neutral value is 1, not 0, and a gain of 0 switches the channel off. So vectors do not decay.
# Our embedding is a matrix and decays: in a tied model it is the output layer as well.

# %% id="train-optimizer-groups"
#| export
def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices (embeddings too) decay, vectors (norm gains, biases) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]

# %% [markdown]
# Two groups, and every weight is in exactly one. The gains are few, which is why forgetting this goes unnoticed for so long.

# %% id="train-groups-table"
model = new_model()
for group in optimizer_groups(model, 0.1):
    print(f"decay {group['weight_decay']}: {len(group['params']):3d} tensors, {sum(p.numel() for p in group['params']):8,} weights")
assert sum(p.numel() for group in optimizer_groups(model, 0.1) for p in group["params"]) == model.num_parameters()

# %% [markdown]
# `fused=True` updates all weights of a group in one pass over memory instead of a dozen. Chapter 09 measures it.

# %% id="train-make-optimizer"
#| export
def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), all parameters of a group updated in one kernel."""
    groups = optimizer_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)

# %% [markdown]
# **Exercise 8.2 (15 min, ★★).** Write `optimizer_groups` with a third group: embeddings without decay (as OLMo 2 does). A tied embedding must not land in two groups. How do you find it?

# %% [markdown]
# ## Batches too large for memory
#
# A large batch gives a steadier gradient but may not fit. **Accumulation** splits it: run micro-batch after micro-batch, let the gradients add up, step once.
# The result must not depend on how the batch was cut. The trap is what to divide by.
#
# Three micro-batches by hand, with 4, 1 and 1 real tokens (the rest is padding, label -100) and token losses of 2, 8 and 8:
# all tokens together give (4·2 + 8 + 8)/6 = 4. The mean of the three means is (2 + 8 + 8)/3 = 6. The two lonely tokens got four times their weight.

# %% id="train-token-shares"
#| export
def token_shares(batches: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each micro-batch's share of the real tokens (labels other than -100), and their number.

    A loss that is a mean over its own micro-batch must be weighted by this share, so that the sum
    is the mean over all tokens. Batches without "labels" count equally.
    """
    if "labels" not in batches[0]:
        return torch.full((len(batches),), 1 / len(batches)), torch.tensor(0)
    counts = torch.stack([(batch["labels"] != -100).sum() for batch in batches])
    return counts / counts.sum().clamp(min=1), counts.sum()

# %% [markdown]
# Weighted by its share of the tokens, each mean counts as it should:

# %% id="train-shares-by-hand"
labels = [torch.tensor([[1, 1, 1, 1]]), torch.tensor([[1, -100, -100, -100]]), torch.tensor([[1, -100, -100, -100]])]
shares, tokens = token_shares([{"labels": row} for row in labels])
means = torch.tensor([2.0, 8.0, 8.0])
print("by token shares:", (means * shares).sum().item(), "  mean of means:", means.mean().item())
assert (means * shares).sum() == 4 and tokens == 6

# %% [markdown]
# The same on a real gradient. `ragged` keeps only the first few labels of some rows, as short documents would.
# One batch of 16 rows is cut into 4 micro-batches; the gradient of the whole batch is the truth.

# %% id="train-ragged"
def ragged(batch, lengths=(64, 16, 8, 4)):
    labels = batch["labels"].clone()
    for rows, length in zip(labels.chunk(len(lengths)), lengths):
        rows[:, length:] = -100
    return {"input_ids": batch["input_ids"], "labels": labels}

# %% [markdown]
# `cut` makes the micro-batches. `gradient` adds up the gradients of some parts, each with its weight, as one long vector.

# %% id="train-cut"
def cut(batch, parts=4):
    return [dict(zip(batch, rows)) for rows in zip(*(tensor.chunk(parts) for tensor in batch.values()))]


def gradient(model, parts, weights):
    model.zero_grad()
    for part, weight in zip(parts, weights):
        (byte_loss(model, part)[0] * weight).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])

# %% [markdown]
# **Before you run this:** how far off is the mean of means: 1%, 10%, or more than 50%?

# %% id="train-accumulation-gradient"
batch = ragged(batches[0])
parts, whole = cut(batch), gradient(new_model(), [batch], [1.0])
right = gradient(new_model(), parts, token_shares(parts)[0])
wrong = gradient(new_model(), parts, [1 / 4] * 4)
error = lambda g: ((g - whole).norm() / whole.norm()).item()
print(f"relative error: token shares {error(right):.0e}, mean of means {error(wrong):.0%}")
assert error(right) < 1e-4 < error(wrong)

# %% [markdown]
# And in training: three runs on the same data, whole batches against two ways of accumulating.

# %% id="train-accumulation-runs"
def accumulate(weigh, steps):
    model, curve = new_model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = ragged(batches[step])
        parts = cut(batch) if weigh else [batch]
        weights = weigh(parts) if weigh else [1.0]
        losses = [byte_loss(model, part)[0] for part in parts]
        sum(loss * weight for loss, weight in zip(losses, weights)).backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(sum(loss.item() * share for loss, share in zip(losses, token_shares(parts)[0].tolist())))
    return curve

# %% [markdown]
# `weigh` is the only difference between the three:

# %% id="train-accumulation-three"
steps = chapter.steps(chapter.size.accumulation_steps)
runs = {
    "one batch of 16": accumulate(None, steps),
    "4 x 4, token shares": accumulate(lambda parts: token_shares(parts)[0], steps),
    "4 x 4, mean of means": accumulate(lambda parts: [1 / 4] * 4, steps),
}

# %% [markdown]
# The figure shows how far each accumulated run is from the run with whole batches. Token shares stay at rounding noise.

# %% id="train-accumulation-figure"
reference = np.array(runs["one batch of 16"])
fig, ax = plt.subplots(figsize=(7, 2.6))
for name in list(runs)[1:]:
    ax.semilogy(np.abs(np.array(runs[name]) - reference) + 1e-9, label=name)
ax.set(xlabel="step", ylabel="difference of loss (nats)")
ax.legend()
show(fig, "With token shares the loss stays within rounding of the whole batch; the mean of means trains a different model.")
right, wrong = (np.median(np.abs(np.array(runs[name]) - reference)) for name in list(runs)[1:])
assert right < 1e-3 and right < wrong / 10

# %% [markdown]
# Libraries got this wrong for years: the `Trainer` of transformers was repaired in October 2024, after training losses with and without accumulation were seen to differ.
#
# **Exercise 8.3 (15 min, ★★).** Another common mistake: add up the micro-batch losses and forget to divide. With Adam the loss curve looks almost the same. Why? With clipping it does not. Why?

# %% [markdown]
# ## 16-bit numbers
#
# 16-bit numbers halve the memory and more than double the speed of matrix products, on hardware that has them.
# There are two kinds, and they fail differently. `bfloat16` keeps the range of float32 and gives up digits; `float16` keeps more digits and gives up range.

# %% id="train-formats"
for kind in (torch.float32, torch.bfloat16, torch.float16):
    info = torch.finfo(kind)
    print(f"{str(kind)[6:]:9} largest {info.max:.0e}, smallest normal {info.tiny:.0e}, after 1 comes 1 + {info.eps:.0e}")
assert torch.tensor(256, dtype=torch.bfloat16) + 1 == 256  # too few digits to count to 257
assert torch.tensor(1e-8, dtype=torch.float16) == 0  # too small for its range

# %% [markdown]
# Weights therefore stay in float32, where small updates are not lost, and **autocast** runs only the matrix products in 16 bits.
# Which kind a machine does fast decides. A processor without bfloat16 emulates it, slower than float32.

# %% id="train-fast-bfloat16"
#| export
def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (emulation is slower than float32)."""
    flags = {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"}
    if hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(flag) for flag in flags)
    info = Path("/proc/cpuinfo")
    return info.exists() and bool(flags & set(info.read_text().split()))

# %% [markdown]
# A wish that the machine cannot fulfil fast is replaced, and the reason says so:

# %% id="train-pick-precision"
#| export
REASONS = {"bf16": "multiplies bfloat16 in hardware", "fp16": "has no bfloat16", "fp32": "has no fast 16-bit numbers"}


def pick_precision(device: torch.device | str, wanted: str = "auto") -> tuple[torch.dtype | None, str]:
    """The autocast type for `device` (None is plain float32) and the reason, in words.

    `wanted` is auto, bf16, fp16 or fp32. What the machine cannot do fast is replaced, and the reason says so.
    """
    if wanted not in ("auto", "bf16", "fp16", "fp32"):
        raise ValueError(f"precision {wanted!r}: choose auto, bf16, fp16 or fp32")
    gpu = torch.device(device).type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else has_fast_bfloat16()
    best = "bf16" if has_bf16 else "fp16" if gpu else "fp32"
    possible = {"auto": best, "bf16": best, "fp16": "fp16" if gpu else best, "fp32": "fp32"}
    got = possible[wanted]
    reason = f"{got}, as asked" if got == wanted else f"{got}: {'this GPU' if gpu else 'this processor'} {REASONS[got]}"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[got], reason

# %% [markdown]
# On this machine:

# %% id="train-pick-precision-table"
for wanted in ("auto", "bf16", "fp16", "fp32"):
    print(f"{wanted:5} -> {pick_precision(chapter.device, wanted)[1]}")

# %% [markdown]
# ### Loss scaling, simulated
#
# Graphics cards before 2020 (a Colab T4, say) have only float16. Its smallest number is $6\cdot10^{-8}$, and gradients are often smaller: the loss is a mean over many tokens,
# so each token's gradient is divided by their number. The cure: multiply the loss by a large number $s$, and divide the weights' gradients by $s$ in float32.
#
# We can watch this on a processor. `Half` passes a tensor on unchanged, but sends its gradient back through float16, as a float16 layer would.

# %% id="train-half"
class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        seen.append(gradient.abs().flatten())
        return gradient.half().float()  # too small becomes 0, too large becomes inf


seen = []

# %% [markdown]
# The setting: this batch is one of 256 micro-batches, so its loss is divided by 256. We take the model from the plain loop and look at all gradients that arrive at its logits.

# %% id="train-gradient-sizes"
def half_loss(model, batch, share=1 / 256, scale=1.0):
    logits = Half.apply(model(batch["input_ids"]))
    return cross_entropy(logits, batch["labels"]) * share * scale


half_loss(trained, batches[0]).backward()
sizes = seen.pop()
lost = (sizes.half() == 0).float().mean().item()
kept = 1 - ((sizes * 2**16).half() == 0).float().mean().item()
print(f"{lost:.0%} of the gradients become 0 in float16; scaled by 2^16, {kept:.0%} survive")
assert kept > 0.9 > 0.5 > 1 - lost

# %% [markdown]
# The same as a picture. Scaling moves the whole hill to the right, into the range that float16 can hold.

# %% id="train-gradient-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
for scale, label in ((1, "as they are"), (2**16, "loss times 65,536")):
    ax.hist((sizes * scale).clamp(min=1e-16).log10().numpy(), bins=80, histtype="step", lw=1.8, label=label, ls="-" if scale == 1 else "--")
for edge, name in ((6e-8, "smallest float16"), (65504, "largest")):
    ax.axvline(math.log10(edge), color="grey", ls=":")
    ax.text(math.log10(edge), ax.get_ylim()[1], name, ha="right", va="top", rotation=90, fontsize=8, color="dimgrey")
ax.set(xlabel="size of a gradient at the logits (power of ten)", ylabel="count")
ax.legend()
show(fig, "Left of the first dotted line a gradient becomes zero in float16; multiplying the loss moves all of them to the right.")

# %% [markdown]
# How large should $s$ be? Nobody needs to know: start high, halve it when a gradient overflows (and skip that step), double it after some good steps.

# %% id="train-tiny-scaler"
class TinyScaler:
    def __init__(self, scale=2.0**40, patience=10):
        self.scale, self.patience, self.good = scale, patience, 0

    def update(self, overflow):
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.scale /= 2
        elif self.good == self.patience:
            self.scale, self.good = self.scale * 2, 0

# %% [markdown]
# The loop with a scaler in it. The optimiser steps only when every gradient is finite.

# %% id="train-half-runs"
def half_run(steps, scaler=None, share=1 / 256):
    model, curve, scales = new_model(), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        scale = scaler.scale if scaler else 1.0
        loss = half_loss(model, batches[step], share, scale)
        loss.backward()
        for p in model.parameters():
            p.grad /= scale
        overflow = not all(p.grad.isfinite().all() for p in model.parameters())
        if not overflow:
            optimizer.step()
        if scaler:
            scaler.update(overflow)
        optimizer.zero_grad()
        curve.append(loss.item() / share / scale)
        scales.append(scale)
    return curve, scales

# %% [markdown]
# The first run is the reference: its loss is not divided, so that hardly anything is lost.

# %% id="train-half-three"
steps = chapter.steps(chapter.size.half_steps)
full, _ = half_run(steps, share=1.0)
unscaled, _ = half_run(steps)
scaled, scales = half_run(steps, TinyScaler())

# %% [markdown]
# Without scaling most of the signal is gone. With it the run follows the reference, after a few skipped steps.

# %% id="train-half-figure"
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.7))
for curve, label in ((full, "share 1: nothing lost"), (unscaled, "share 1/256, no scaling"), (scaled, "share 1/256, scaling")):
    left.plot(curve, label=label)
left.set(xlabel="step", ylabel="loss (nats per byte)")
left.legend(fontsize=8)
right.semilogy(scales, base=2)
right.set(xlabel="step", ylabel="scale")
show(fig, "Left: without scaling float16 learns more slowly. Right: the scale starts too high on purpose, halves until the gradients fit, then probes upwards.")
if len(scaled) > 20:
    assert np.mean(scaled[-5:]) < np.mean(unscaled[-5:])

# %% [markdown]
# PyTorch's own `GradScaler` follows the same rule. We feed both the same pattern of overflows:

# %% id="train-scaler-check"
theirs = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=10)
ours, point = TinyScaler(2.0**24), torch.nn.Parameter(torch.zeros(1))
sgd = torch.optim.SGD([point], lr=0.1)
for step in range(60):
    overflow = step in (0, 1, 2, 30)
    theirs.scale(point.sum()).backward()
    point.grad.fill_(math.inf if overflow else 1.0)
    theirs.step(sgd)
    theirs.update()
    ours.update(overflow)
    assert theirs.get_scale() == ours.scale

# %% [markdown]
# bfloat16 needs none of this: its range is that of float32. The loop uses the scaler for float16 only.
#
# **Exercise 8.4 (10 min, ★).** Why must clipping come after the division by the scale, and why must a skipped step not count as a step of Adam?

# %% [markdown]
# ## Memory that stays
#
# One gain belongs to the processor alone and has nothing to do with arithmetic. A step allocates the same large tensors as the step before.
# The C library fetches each from the kernel and returns it when freed; the kernel clears every page again. We ask it to keep them.

# %% id="train-keep-memory"
#| export
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers from malloc.h


def keep_memory(on: bool = True) -> bool:
    """Let the C library keep freed memory for the next step; False where it cannot be told to (only glibc can).

    By default glibc fetches each large block from the kernel, which clears every page of it, and gives it back when freed.
    A training step frees and fetches the same blocks again and again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    size = 2**30 if on else 2**17  # 2**17 is glibc's own choice
    return all([mallopt(M_MMAP_THRESHOLD, size), mallopt(M_TRIM_THRESHOLD, size)])

# %% [markdown]
# The gain shows wherever tensors are large, such as the 32 MB of float32 logits of a batch:

# %% id="train-keep-memory-measure"
def seconds_of_a_loss(rows=chapter.size.logit_rows, repeats=5):
    logits, labels, best = torch.randn(1, rows, 2048, requires_grad=True), torch.zeros(1, rows, dtype=torch.long), math.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        cross_entropy(logits, labels).backward()
        best = min(best, time.perf_counter() - begin)
        logits.grad = None
    return best

# %% [markdown]
# Once with glibc's own choice, once with memory kept:

# %% id="train-keep-memory-compare"
keep_memory(False)
returned = seconds_of_a_loss()
possible = keep_memory()
kept = seconds_of_a_loss()
print(f"memory returned {returned * 1e3:.0f} ms, kept {kept * 1e3:.0f} ms" if possible else "only glibc (Linux) can do this")
speedup = check("train/keep_memory_speedup", returned / kept)

# %% [markdown]
# ## The loop, first half: one step
#
# Everything that changes during a run lives in one object, because that is exactly what a checkpoint must hold.
# `History` keeps what was logged.

# %% id="train-history"
#| export
@dataclass
class History:
    """What a run logged, one entry per log line; a mean is over the steps since the line before."""

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # mean
    metrics: list[dict] = field(default_factory=list)  # means of what loss_fn returned beside the loss
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)  # mean, before clipping
    tokens: list[int] = field(default_factory=list)  # real tokens since step 0
    seconds: list[float] = field(default_factory=list)  # of training, without evaluation and saving
    tokens_per_second: list[float] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)  # {"step", "tokens", and what evaluate returned}

# %% [markdown]
# `Run` holds model, optimiser, scale, step and sums. `state()` turns it into plain tensors and numbers, which is the checkpoint.

# %% id="train-run-state"
#| export
class Run:
    """Everything that changes while training: what a checkpoint must hold to continue bit for bit."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        self.model, self.config = model, config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.dtype, self.reason = pick_precision(self.device, config.precision)
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.history = History()
        self.step, self.tokens, self.seconds = 0, torch.tensor(0, device=self.device), 0.0
        self.window: dict[str, torch.Tensor] = {}  # sums since the last log line, on the device
        self.window_start = (0, 0, 0.0)  # step, tokens, seconds of the last log line
        self.clock = time.perf_counter()

    def tick(self, count: bool = True) -> None:
        """Add the time since the last tick to the training seconds (or, with count=False, leave it out)."""
        now = time.perf_counter()
        self.seconds += (now - self.clock) * count
        self.clock = now

    def state(self) -> dict:
        """What a checkpoint holds: the state of every part, the random state and the settings."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        numbers = {name: getattr(self, name) for name in ("step", "tokens", "seconds", "window", "window_start")}
        return parts | numbers | {"history": asdict(self.history), "config": asdict(self.config), "random": random_state()}

# %% [markdown]
# One step. Nothing in it asks for a number: `loss.item()` would wait until the device has finished, every step. Sums stay tensors, on the device.
#
# **Clipping** is the line with `clip_grad_norm_`. By hand: the gradient (3, 4) has norm 5; clipped to norm 1 it becomes (0.6, 0.8). The direction stays, the length is capped.

# %% id="train-clip-by-hand"
point = torch.nn.Parameter(torch.zeros(2))
point.grad = torch.tensor([3.0, 4.0])
norm = nn.utils.clip_grad_norm_([point], max_norm=1.0)
print("norm before:", norm.item(), "clipped:", point.grad.tolist())
assert norm == 5 and torch.allclose(point.grad, torch.tensor([0.6, 0.8]), atol=1e-5)

# %% [markdown]
# With accumulation, step s reads the micro-batches s·a to s·a + a - 1. The data position still follows from the step alone.

# %% id="train-one-step"
#| export
def train_step(run: Run, model: nn.Module, batches, loss_fn: Callable) -> None:
    """One optimiser step over `accumulation` micro-batches. Nothing here waits for the device."""
    config, first = run.config, run.step * run.config.accumulation
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(run.step, config)
    micro = [batches[first + i] for i in range(config.accumulation)]
    shares, tokens = token_shares(micro)
    for batch, share in zip(micro, shares.unbind()):
        with torch.autocast(run.device.type, run.dtype) if run.dtype else nullcontext():
            loss, metrics = loss_fn(model, batch)
        run.scaler.scale(loss * share).backward()
        for name, value in {**metrics, "loss": loss}.items():
            value = value.detach() if torch.is_tensor(value) else torch.tensor(float(value))
            run.window[name] = run.window.get(name, 0) + value.float() * share
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.parameters, config.grad_clip or math.inf)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.window["grad_norm"] = run.window.get("grad_norm", 0) + norm
    run.tokens, run.step = run.tokens + tokens, run.step + 1

# %% [markdown]
# Every few steps the sums become numbers. A loss that is no number stops the run here, before a checkpoint could keep it.

# %% id="train-write-log"
#| export
def write_log(run: Run) -> None:
    """Move the sums of the window into the history; the only place where the loop waits for the device."""
    step, tokens, seconds = run.window_start
    means = {name: float(value) / (run.step - step) for name, value in run.window.items()}
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(f"the loss is {means['loss']} between steps {step} and {run.step}: lower learning_rate or raise warmup")
    now, history = int(run.tokens), run.history
    run.tick()
    history.step.append(run.step)
    history.loss.append(means.pop("loss"))
    history.grad_norm.append(means.pop("grad_norm"))
    history.metrics.append(means)
    history.lr.append(run.optimizer.param_groups[0]["lr"])
    history.tokens.append(now)
    history.seconds.append(run.seconds)
    history.tokens_per_second.append((now - tokens) / max(run.seconds - seconds, 1e-9))
    run.window, run.window_start = {}, (run.step, now, run.seconds)

# %% [markdown]
# An evaluation must not disturb the training: evaluation mode on, gradients off, the clock stopped, and all of it undone afterwards.

# %% id="train-evaluate"
#| export
def write_evaluation(run: Run, evaluate: Callable) -> None:
    """Append what `evaluate(model)` returns (a dict, or one number) to the history, in evaluation mode, without gradients."""
    run.tick()
    run.model.eval()
    with torch.no_grad():
        result = evaluate(run.model)
    run.model.train()
    run.tick(count=False)
    result = result if isinstance(result, dict) else {"value": result}
    run.history.evals.append({"step": run.step, "tokens": int(run.tokens), **result})

# %% [markdown]
# ## Checkpoints: what a run must remember
#
# A saved model is not a checkpoint. To continue as if nothing had happened, the loop needs the weights, Adam's two running means, the loss scale, the step (which gives the schedule
# and the data position) and the state of every random generator.

# %% id="train-random-state"
#| export
def random_state() -> dict:
    """The state of every random generator that a training step may use, in types that load safely."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": (kind, keys.tolist(), *rest), "python": random.getstate()}


def set_random_state(state: dict) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])

# %% [markdown]
# A half-written file must never take the place of a whole one. So we write beside it, force the bytes to the disk, and rename: a rename happens entirely or not at all.

# %% id="train-save-checkpoint"
#| export
class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says which and what to do."""


def save_checkpoint(folder: str | Path, state: dict) -> Path:
    """Write `state` to `folder`/checkpoint.pt so that a kill at any moment leaves the old file or the new one whole."""
    final = Path(folder) / "checkpoint.pt"
    part = final.with_suffix(".part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk before the name points to them
        os.replace(part, final)  # one step for every reader: old file before, new file after
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{final}: could not be written ({error}); the last good checkpoint is untouched") from error
    return final

# %% [markdown]
# Reading is strict. `weights_only=True` lets the file hold data but no code, which a pickle otherwise may. A damaged file gives one clear error.

# %% id="train-load-checkpoint"
#| export
def load_checkpoint(folder: str | Path) -> dict:
    """Read `folder`/checkpoint.pt to the CPU; CheckpointError when it is missing or damaged. Runs no code from the file."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise CheckpointError(f"{path}: no checkpoint there; start without resume")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for a damaged file
        raise CheckpointError(f"{path}: truncated or damaged ({path.stat().st_size:,} bytes); delete it and start again") from error

# %% [markdown]
# Weights are loaded strictly. Missing, unexpected or differently shaped ones are named, before anything is changed.

# %% id="train-load-weights"
#| export
def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Strict loading; CheckpointError names the weights that are missing, unexpected or of another shape."""
    own = model.state_dict()
    wrong = [f"{name}: missing in the checkpoint" for name in own if name not in weights]
    wrong += [f"{name}: not in this model" for name in weights if name not in own]
    wrong += [
        f"{name}: {tuple(weights[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(f"checkpoint of another model, {len(wrong)} weights differ, such as\n  " + "\n  ".join(wrong[:3]))
    model.load_state_dict(weights)

# %% [markdown]
# A schedule of other length or another rate would continue, but not the same run. So other settings are refused, except how often to report and to save.

# %% id="train-same-settings"
#| export
def check_same_settings(saved: dict, given: dict) -> None:
    """A resumed run must have the settings that it began with; only how often it reports and saves may change."""
    free = {"log_every", "eval_every", "save_every"}
    changed = [f"{key}: {saved[key]!r} then, {given[key]!r} now" for key in given if key not in free and saved.get(key) != given[key]]
    if changed:
        raise CheckpointError("cannot resume with other settings (" + "; ".join(changed) + "); give the same, or start without resume")

# %% [markdown]
# Putting it all back is the mirror image of `state()`. The random state comes last, since nothing after it may draw a number.

# %% id="train-run-restore"
#| export
def restore(run: Run, state: dict) -> None:
    """Continue from the checkpoint `state`; CheckpointError when its settings or sizes are not those of `run`."""
    check_same_settings(state["config"], asdict(run.config))
    load_weights(run.model, state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.step, run.seconds, run.window_start = state["step"], state["seconds"], tuple(state["window_start"])
    run.tokens = state["tokens"].to(run.device)
    run.window = {name: value.to(run.device) for name, value in state["window"].items()}
    run.history = History(**state["history"])
    set_random_state(state["random"])

# %% [markdown]
# ## The loop, second half
#
# Now the loop is short: step, and now and then log, evaluate, save.

# %% id="train-train"
#| export
def train(
    model: nn.Module, batches, loss_fn: Callable, config: TrainConfig, folder: str | Path | None = None, resume: bool = False,
    evaluate: Callable | None = None, on_log: Callable[[History], None] | None = None, max_steps: int | None = None,
) -> History:  # fmt: skip
    """Train `model` in place on `batches[0]`, `batches[1]`, ... and return what was logged.

    `batches[i]` is a dict of tensors on the model's device, the same for the same `i`: then the data position is the
    step, and `resume` continues bit for bit from `folder`/checkpoint.pt (from step 0 when there is none).
    `loss_fn(model, batch)` returns the mean loss over the real tokens and a dict of further means.
    `max_steps` stops earlier, on the same schedule.
    """
    set_seed(config.seed)
    run = Run(model, config)
    if run.device.type == "cpu":
        keep_memory()
    if resume and folder and (Path(folder) / "checkpoint.pt").exists():
        restore(run, load_checkpoint(folder))
    fast = torch.compile(model) if config.compile else model
    last = min(config.steps, max_steps or config.steps)
    due = lambda every: run.step == last or (every > 0 and run.step % every == 0)
    model.train()
    while run.step < last:
        train_step(run, fast, batches, loss_fn)
        if due(config.log_every):
            write_log(run)
            if on_log:
                on_log(run.history)
        if evaluate and due(config.eval_every):
            write_evaluation(run, evaluate)
        if folder and due(config.save_every):
            run.tick()
            save_checkpoint(folder, run.state())
            run.tick(count=False)
    return run.history

# %% [markdown]
# ## What each feature is worth
#
# The same model, data and steps; each run lacks one thing. First warm-up and decay, at a rate that is high for this model.

# %% id="train-feature-runs"
def run(name, batches=batches, **changes):
    config = TrainConfig(**(dict(steps=chapter.steps(chapter.size.steps), learning_rate=5e-3, warmup=0.15, log_every=4, precision="fp32") | changes))
    history = train(new_model(), batches, byte_loss, config)
    print(f"{name:30} last loss {history.loss[-1]:.2f}   {history.seconds[-1]:.1f} s")
    return history

# %% [markdown]
# **Before you run this:** which costs more at the end of 120 steps, no warm-up or no decay?

# %% id="train-warmup-runs"
everything = run("all features")
no_warmup = run("no warm-up", warmup=0)
no_decay = run("no decay", final_lr=1.0)

# %% [markdown]
# Without warm-up the loss falls faster at first, and then sits on the plateau of byte frequencies: the large first steps have pushed the weights to a place from which the way out is long.
# Decay gains nothing here, it may even cost a little: after so few steps the loss still falls steeply, and small steps are slow steps. It pays once the curve is flat (Hu et al. 2024).

# %% id="train-warmup-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
for history, label in ((everything, "all features"), (no_warmup, "no warm-up"), (no_decay, "no decay")):
    ax.plot(history.step, history.loss, label=label)
ax.axhline(entropy, color="grey", ls=":")
ax.set(xlabel="step", ylabel="loss (nats per byte)")
ax.legend()
show(fig, "Without warm-up the run sits longer on the plateau of byte frequencies (grey) and ends higher; decay makes little difference in so short a run.")
warmup_gain = check("train/warmup_gain_nats", no_warmup.loss[-1] - everything.loss[-1])

# %% [markdown]
# Now a damaged file: two batches in the middle of the run hold one random byte repeated. Web text has such places.
#
# **Before you run this:** Adam divides by the size of the gradient anyway. Does clipping still matter?

# %% id="train-clip-runs"
middle = chapter.steps(chapter.size.steps) // 2
damaged = ByteBatches(spikes=(middle, middle + 1))
clipped = run("damaged, clipping", damaged)
unclipped = run("damaged, no clipping", damaged, grad_clip=0)
clean = run("not damaged, no clipping", grad_clip=0)

# %% [markdown]
# It does, and twice. Even without damage, the occasional large gradient of the first steps keeps the run longer on the plateau.
# With damage, one gradient of ten times the usual size fills Adam's running mean $m$, and the model keeps walking in the wrong direction for the next steps. Clipped, the same batches leave hardly a trace.

# %% id="train-clip-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
for history, label in ((clipped, "damaged, clipping at norm 1"), (unclipped, "damaged, no clipping"), (clean, "not damaged, no clipping")):
    ax.plot(history.step, history.loss, label=label)
ax.axvline(middle, color="grey", ls=":")
ax.text(middle, ax.get_ylim()[1], " damaged batches", va="top", fontsize=8, color="dimgrey")
ax.set(xlabel="step", ylabel="loss (nats per byte)")
ax.legend()
show(fig, "Two damaged batches at the dotted line: the clipped run recovers at once; without clipping a run ends higher, damaged or not.")
clip_gain = check("train/clip_gain_nats", unclipped.loss[-1] - clipped.loss[-1])

# %% [markdown]
# Read such numbers with care: this is one seed of a small model at a high rate. At a low rate the same features cost a little time and change nothing.
#
# **Exercise 8.5 (20 min, ★★).** Repeat the warm-up pair with `learning_rate=1e-3` and with three seeds. At which rate does warm-up begin to matter?

# %% [markdown]
# ## Does it really continue?
#
# First in one process. Run A trains without a break. Run B stops half way and goes on from its checkpoint.
# The loss uses chance on purpose (one input byte in ten is replaced), so that the random state matters too.

# %% id="train-noisy-loss"
def noisy_loss(model, batch):
    noise = torch.rand(batch["input_ids"].shape) < 0.1
    ids = torch.where(noise, torch.randint(256, noise.shape), batch["input_ids"])
    return cross_entropy(model(ids), batch["labels"]), {}

# %% [markdown]
# Run A in one go, run B to step 12 of 24:

# %% id="train-half-way"
half_way, resume_config = 12, TrainConfig(steps=24, learning_rate=5e-3, warmup=0.5, log_every=1, precision="fp32")
model_a = new_model()
history_a = train(model_a, batches, noisy_loss, resume_config)
_ = train(new_model(), batches, noisy_loss, resume_config, folder=chapter.work / "half", max_steps=half_way)

# %% [markdown]
# `finish` continues from that checkpoint, after `change` has damaged one part of it.

# %% id="train-finish"
def finish(change=lambda state: None, batches=batches):
    state = load_checkpoint(chapter.work / "half")
    change(state)
    save_checkpoint(chapter.work / "changed", state)
    model = new_model(seed=1)  # its weights must all come from the checkpoint
    history = train(model, batches, noisy_loss, resume_config, folder=chapter.work / "changed", resume=True)
    largest = max((a - b).abs().max().item() for a, b in zip(model_a.parameters(), model.parameters()))
    return history, largest

# %% [markdown]
# With nothing damaged:

# %% id="train-exact"
history_b, largest = finish()
print("largest difference of any weight:", largest)
assert largest == 0 and history_b.loss == history_a.loss

# %% [markdown]
# Zero: not close, but equal. Now leave out one part at a time. Most tutorials save the weights alone.

# %% id="train-leave-one-out"
class Shifted:
    def __init__(self, by):
        self.by = by

    def __getitem__(self, step):
        return batches[step - self.by]

# %% [markdown]
# Each variant replaces one part of the checkpoint by what a fresh start would have there:

# %% id="train-variants"
fresh = Run(new_model(), resume_config).state()
variants = {
    "nothing (exact)": finish(),
    "random state": finish(lambda state: state.update(random=fresh["random"])),
    "data position": finish(batches=Shifted(half_way)),
    "Adam's means": finish(lambda state: state.update(optimizer=fresh["optimizer"])),
    "weights": finish(lambda state: state.update(model=fresh["model"])),
}
for name, (history, largest) in variants.items():
    worst = max(abs(a - b) for a, b in zip(history.loss, history_a.loss))
    print(f"left out: {name:16} largest difference of a weight {largest:.0e}, of a loss {worst:.0e}")
assert all(largest > 0 for name, (_, largest) in variants.items() if name != "nothing (exact)")

# %% [markdown]
# Every part matters. Some are loud, such as Adam's means, and some are silent: a wrong data position only means that the model sees some text twice and some never.

# %% id="train-leave-one-out-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
for name, (history, _) in variants.items():
    ax.plot(history.step[half_way - 1 :], history.loss[half_way - 1 :], label=f"without {name}" if name[0] != "n" else "complete checkpoint")
ax.set(xlabel="step", ylabel="loss (nats per byte)")
ax.legend(fontsize=8)
show(fig, f"After the restart at step {half_way}: only the complete checkpoint follows the run that was never stopped.")

# %% [markdown]
# ## kill -9
#
# A process that is killed cannot tidy up. So we start a run in a process of its own, kill it in the middle, start it again, and compare with a run that lived.
# The script is a file that you can read and try yourself:

# %% id="train-kill-script"
script = chapter.work / "run_me.py"
_ = script.write_text("""import sys, torch
from minimind.train import TrainConfig, train

class Batches:
    def __getitem__(self, step):
        ids = torch.randint(0, 50, (8, 33), generator=torch.Generator().manual_seed(step))
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

def loss_fn(model, batch):  # dropout inside: uses chance
    logits = model(batch["input_ids"])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()), {}

def run(folder, on_log=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 50))
    config = TrainConfig(steps=120, log_every=1, save_every=9, precision="fp32")
    return model, train(model, Batches(), loss_fn, config, folder, resume=True, on_log=on_log)

if __name__ == "__main__":
    run(sys.argv[1], lambda history: print(history.step[-1], flush=True))
""")

# %% [markdown]
# The parent reads the step numbers that the run prints, and at step 40 sends signal 9, which no process can catch.

# %% id="train-kill"
import shutil
import signal
import subprocess
import sys

import minimind

home = Path(minimind.__file__).parent.parent
environment = os.environ | {"PYTHONPATH": str(home), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def start_run(folder):
    return subprocess.Popen([sys.executable, script, folder], stdout=subprocess.PIPE, text=True, env=environment)

# %% [markdown]
# Start, listen, kill:

# %% id="train-kill-now"
for name in ("killed", "lived"):
    shutil.rmtree(chapter.work / name, ignore_errors=True)
victim = start_run(chapter.work / "killed")
for line in victim.stdout:
    if int(line) == 40:
        victim.send_signal(signal.SIGKILL)
        break
print("ended by signal", -victim.wait(), "- the last checkpoint is of step", load_checkpoint(chapter.work / "killed")["step"])
assert victim.returncode == -signal.SIGKILL

# %% [markdown]
# The same command again goes on where the checkpoint stands. A third run, never killed, is the truth.

# %% id="train-kill-compare"
processes = [start_run(chapter.work / "killed"), start_run(chapter.work / "lived")]
printed = [[int(line) for line in process.stdout] for process in processes]
print("the second start began at step", printed[0][0], "and ended at step", printed[0][-1])
killed, lived = (load_checkpoint(chapter.work / name) for name in ("killed", "lived"))
assert killed["step"] == lived["step"] == 120 and killed["history"]["loss"] == lived["history"]["loss"]
assert all(torch.equal(killed["model"][name], lived["model"][name]) for name in lived["model"])
assert torch.equal(killed["random"]["torch"], lived["random"]["torch"])

# %% [markdown]
# Weights, losses and the random state are equal to the last bit. (On a GPU some kernels add in a different order each time; there equality holds up to rounding.)
#
# **Exercise 8.6 (20 min, ★★★).** A loop that shuffles with `random.shuffle` at the start of each epoch also stores its data position as the step. Does it resume exactly? Design a test that shows it.

# %% [markdown]
# ## Killed while writing
#
# The worst moment is during the write itself. The next script saves a good checkpoint, then tells the kernel to kill it as soon as a file grows beyond half of the next one.
# It does so once with a plain `torch.save` and once with ours.

# %% id="train-die-writing"
dying = chapter.work / "die_writing.py"
_ = dying.write_text("""import resource, signal, sys, torch
from minimind.train import save_checkpoint

kind, folder = sys.argv[1:]
def plain_save(folder, state):
    torch.save(state, folder + "/checkpoint.pt")
save = {"plain": plain_save, "ours": save_checkpoint}[kind]
save_checkpoint(folder, {"step": 1, "weights": torch.zeros(100_000)})
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel may kill us, without warning
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
save(folder, {"step": 2, "weights": torch.ones(100_000)})
""")

# %% [markdown]
# What is left after each?

# %% id="train-die-compare"
for kind in ("plain", "ours"):
    ended = subprocess.run([sys.executable, dying, kind, chapter.work / kind], env=environment).returncode
    try:
        print(f"{kind:5}: ended by signal {-ended}, checkpoint of step {load_checkpoint(chapter.work / kind)['step']} is there")
    except CheckpointError as error:
        print(f"{kind:5}: ended by signal {-ended}, {str(error).split(': ', 1)[1][:34]}")

# %% [markdown]
# The plain way destroyed the only copy. Ours still has step 1. A full disk is the same case with an error in place of a kill; the tests of this course try both.

# %% id="train-safe-write"
assert load_checkpoint(chapter.work / "ours")["step"] == 1
try:
    load_checkpoint(chapter.work / "plain")
    raise AssertionError("a half-written file was loaded")
except CheckpointError:
    pass

# %% [markdown]
# ## Where it breaks
#
# Two refusals that save an evening. A checkpoint of another size names the weights that differ, and other settings are named as well:

# %% id="train-refusals"
wider = MiniMind(ModelConfig.preset("tiny", num_hidden_layers=3, vocab_size=256))
for model, config in ((wider, resume_config), (new_model(), TrainConfig(steps=48, learning_rate=5e-3, warmup=0.5, precision="fp32"))):
    try:
        train(model, batches, byte_loss, config, folder=chapter.work / "half", resume=True)
        raise AssertionError("a checkpoint that does not fit was taken")
    except CheckpointError as error:
        print(error, "\n")

# %% [markdown]
# **Exercise 8.7 (15 min, ★★).** Find the bug: a loop evaluates the model every 100 steps, calls `model.eval()` before, and forgets `model.train()` after. Which of the losses in this chapter would change?
#
# **Exercise 8.8 (30 min, ★★★).** Keep the last three checkpoints instead of one. Which order of renames and deletions is safe at every moment?

# %% [markdown]
# ## Closing
#
# - The loop asks for `batches[step]`: any step's data can be had again, so the step is the data position.
# - Warm-up protects the first steps, decay settles the last ones of a long run, clipping caps the damage of a bad batch.
# - Accumulated micro-batches count by their real tokens. float16 needs a scaled loss, bfloat16 does not.
# - A checkpoint holds weights, optimiser, scale, step and random state. It is written beside the old one and renamed.
# - `train(model, batches, loss_fn, config)` is the loop of all later chapters.
#
# **Words:** learning-rate schedule, warm-up, decay, weight decay, optimiser group, gradient norm, clipping, micro-batch, accumulation, autocast, bfloat16, float16, loss scaling, checkpoint, atomic write.
#
# **Sources:** Kingma and Ba 2015, Adam, arXiv:1412.6980. Loshchilov and Hutter 2019, AdamW, arXiv:1711.05101. Pascanu, Mikolov and Bengio 2013, clipping, arXiv:1211.5063.
# Micikevicius et al. 2018, mixed precision and loss scaling, arXiv:1710.03740. Goyal et al. 2017, warm-up, arXiv:1706.02677. Hu et al. 2024, warm-up, stable, decay, arXiv:2404.06395. OLMo 2 2024, arXiv:2501.00656.
#
# **Next:** the loop waits for real data. Chapter 09 feeds it as fast as this machine allows, and trains the model.
