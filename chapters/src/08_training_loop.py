# %% [markdown]
# # 8. The training loop
#
# At the end of this chapter you have one training loop that every later stage of this book uses.
# You start from six lines, break them in five ways, and repair each break with one feature: warm-up, clipping, accumulation, loss scaling, checkpoints.
# Then you kill the run with `kill -9` and prove that it continues bit for bit.
#
# You need: the model of chapter 7, cross-entropy from chapter 3, and what a gradient is.
#
# Reading 40 minutes; running: smoke 25 s, cpu 90 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="train-default-exp"
#| default_exp train

# %% [markdown]
# The whole chapter in one picture: the solid boxes are the plain loop that you start from, the dashed ones are what you add.

# %% id="train-map"
import matplotlib.pyplot as plt

names = "batch loss times_scale gradient add_up clip set_rate update save".split()
added = {"times_scale", "add_up", "clip", "set_rate", "save"}
fig, ax = plt.subplots(figsize=(7, 1.3))
for x, name in enumerate(names):
    line = {"ec": "C1", "ls": "--"} if name in added else {"ec": "C0", "ls": "-"}
    ax.text(x, 0, name.replace("_", "\n"), ha="center", va="center", fontsize=9,
            bbox={"boxstyle": "round,pad=0.4", "fc": "white", "lw": 2, **line})
ax.annotate("next step", (0, 0.5), (7.5, 0.9), arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-0.6, 8.6), ylim=(-0.5, 1.2))
ax.axis("off")
show(fig, "One step, left to right: solid is the plain loop, dashed is what you add.")

# %% [markdown]
# ## 8.1 Six lines that train
#
# Chapter 7 left a model whose first loss is $\ln V$: it gives each of the $V$ tokens the same chance, because it knows nothing. Training is what changes that.
# For quick runs we take a small model of three layers and use the bytes of the text as tokens, so that $V$ is 256 and no tokenizer is needed.
#
# The module needs only the standard library, NumPy, torch and the seed function of chapter 1:

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
# Three thousand documents, one behind the other, as one long row of numbers from 0 to 255:

# %% id="train-byte-stream"
from itertools import islice

from minimind.data import read_texts

texts = read_texts(chapter.read("data") / "pretrain" / "train.jsonl.gz")
text = "\n".join(islice(texts, 3000)).encode()
stream = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))

# %% [markdown]
# A batch is addressed by its number: `batches[5]` is always the same batch, because the step number seeds the choice of its rows.
# This small rule pays off twice. Any two runs see the same data, and a run that was killed knows where it stood: the data position *is* the step.
#
# `spikes` will later put damaged batches at chosen steps; for now there are none.

# %% id="train-byte-batches"
B, T = 16, 64  # rows of a batch, bytes of a row

class ByteBatches:
    def __init__(self, spikes=()):
        self.spikes = spikes

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(stream) - T - 1, (B, 1), generator=generator)
        rows = stream[starts + torch.arange(T + 1)]  # (B, T+1)
        if step in self.spikes:  # a damaged file: one random byte, repeated
            rows = torch.randint(256, (B, 1), generator=generator).repeat(1, T + 1)
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}

# %% [markdown]
# Inputs and labels are the same bytes, one place apart: position $t$ must predict byte $t+1$.
# The same number gives the same batch, whenever we ask:

# %% id="train-same-batch"
batches = ByteBatches()
assert torch.equal(batches[5]["input_ids"], batches[5]["input_ids"])
print(bytes(batches[5]["input_ids"][0].tolist()).decode())

# %% [markdown]
# The loss function gets a model and a batch. It returns the mean loss and a dict of further numbers to log, which is empty here.
# Pretraining, chat tuning and distillation differ in this function only, so one loop serves them all.

# %% id="train-byte-model"
from minimind.metrics import cross_entropy

def byte_loss(model, batch):
    return cross_entropy(model(batch["input_ids"]), batch["labels"]), {}

# %% [markdown]
# The model is chapter 7's, only smaller. `set_seed` makes every new model start from the same weights, so that two runs differ only in what we change.

# %% id="train-small-model"
from minimind.model import MiniMind, ModelConfig

SMALL = dict(vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, intermediate_size=160)

def new_model(seed=0):
    set_seed(seed)
    return MiniMind(ModelConfig.preset("minimind2-small", **SMALL))

# %% [markdown]
# Now the six lines, from `for` to `zero_grad`. Compute the loss; let `backward` put into each weight's `.grad` how the loss would change with it;
# let the optimiser move every weight a little against its gradient; and clear the gradients, because the next `backward` would add to them.
#
# **Before you run this:** the first loss is known. Is it near 4, 5.5 or 8?

# %% id="train-plain-loop"
model, losses = new_model(), []
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for step in range(chapter.steps(chapter.size.steps)):
    loss, _ = byte_loss(model, batches[step])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
trained = model  # used again below
print(f"first {losses[0]:.2f}, ln 256 = {math.log(256):.2f}, last {losses[-1]:.2f}")
assert abs(losses[0] - math.log(256)) < 0.2

# %% [markdown]
# It learns. But the curve below falls fast to about 3.1 and then hangs there for a long time.
# How low can a model come that knows only how frequent each byte is? That is the entropy of the byte counts (chapter 3):

# %% id="train-entropy"
frequency = torch.bincount(stream).double() / len(stream)
entropy = -torch.special.xlogy(frequency, frequency).sum().item()
print(f"byte frequencies alone: {entropy:.2f} nats")

# %% [markdown]
# The plateau stands exactly there. First the model learns which bytes are common, which is easy; only then does it begin to look at the bytes before.
# The rest of this chapter asks what it costs to leave the plateau late, and what else goes wrong.

# %% id="train-plain-figure"
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.plot(losses, label="plain loop")
ax.axhline(entropy, color="grey", ls=":", label="byte frequencies alone")
ax.set(xlabel="step", ylabel="loss (nats per byte)")
ax.legend()
show(fig, "The loss falls fast to what byte frequencies reach, and stays there long.")

# %% [markdown]
# ## 8.2 The learning rate over time
#
# Adam divides each gradient by a running estimate of its size. In the first steps this estimate rests on one or two batches,
# so every weight takes a full step of the learning rate in a direction that is mostly noise.
# **Warm-up** makes these first steps small. At the other end, **decay** makes the last steps small, because a large step cannot settle in a narrow valley.
#
# All settings of a run live in one dataclass, so that a checkpoint can hold them and a resumed run can be compared with them.
# `warmup`, `decay` and `final_lr` are shares, so that they fit a run of any length. The other fields come up one by one in this chapter.

# %% id="train-config"
#| export
@dataclass
class TrainConfig:
    """One run; `warmup`, `decay`: shares of steps; `final_lr`: of the peak."""

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
# Here $S$ is the number of steps, $w$ and $d$ the steps of warm-up and decay, $f$ the final share. The smallest of the three lines wins:
# first the rise, then the constant, then the fall.

# %% id="train-learning-rate"
#| export
def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Rate of `step`, from 0: rise, flat, fall (Hu et al. 2024, arXiv:2404.06395)."""
    rise = (step + 1) / max(1, round(config.warmup * config.steps))
    fall = (config.steps - step) / max(1, round(config.decay * config.steps))
    end = config.final_lr + (1 - config.final_lr) * fall
    return config.learning_rate * min(1.0, rise, end)

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
shape, steps = TrainConfig(steps=1000, learning_rate=1.0), np.arange(1000)
ours = [learning_rate_at(step, shape) for step in steps]
cosine = (0.55 + 0.45 * np.cos(np.pi * steps / 1000)) * np.minimum(1, (steps + 1) / 20)
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(steps, ours, label="warm-up, flat, linear decay (ours)")
ax.plot(steps, cosine, label="cosine")
ax.set(xlabel="step", ylabel="share of the peak rate")
ax.legend()
show(fig, "Both rise during the first 2% of the steps and end at a tenth of the peak; "
          "ours stays flat until half of the run.")

# %% [markdown]
# **Exercise 8.1 (10 min, ★): `learning_rate_at`** in [workbook 8](../exercises/08_training_loop.ipynb). Write it from the formula, without looking; the check draws the three lines from their corners and names the one that is off.
#
# To see what warm-up does we need the loop itself. It comes next, piece by piece; section 8.8 then measures each feature.
#
# ## 8.3 The optimiser, and what must not decay
#
# One AdamW step by hand, on one weight. The gradient $g$ feeds two running means, $m$ of $g$ and $v$ of $g^2$. Both start at 0 and are too small at first, so each is divided by the part it has seen, $1-\beta^t$ at step $t$.
# With $\beta_1 = 0.9$ and $\beta_2 = 0.95$, as here, they remember about the last 10 and 20 gradients.
# The weight moves by their quotient times the rate $\eta$, and shrinks a little on its own: that is **weight decay**, with strength $\lambda$.
#
# $$ m = \beta_1 m + (1-\beta_1) g, \qquad v = \beta_2 v + (1-\beta_2) g^2, \qquad w \leftarrow w - \eta\lambda w - \eta\, \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon} $$
#
# **Before you run this:** the second gradient is 5,000 times smaller than the first. How much smaller is the second step?

# %% id="train-adam-by-hand"
w, m, v, eta, lam, beta1, beta2 = 1.0, 0.0, 0.0, 0.1, 0.01, 0.9, 0.95
for t, g in enumerate([0.5, 0.0001], start=1):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    quotient = (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + 1e-8)
    w = w - eta * lam * w - eta * quotient
    print(f"step {t}: gradient {g}, weight {w:.5f}")

# %% [markdown]
# The first step moves by the full rate of 0.1, whatever the size of the gradient: $m/\sqrt{v}$ is 1 there. That is why the first steps need a warm-up.
# The second still moves by two thirds of it, since the means remember the first gradient.
# PyTorch's optimiser gives the same weight:

# %% id="train-adam-check"
weight = nn.Parameter(torch.tensor(1.0))
adamw = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01, betas=(0.9, 0.95))
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
    """Two groups: matrices (embeddings too) decay, vectors (gains, biases) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    decays = ((matrices, weight_decay), (vectors, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in decays]

# %% [markdown]
# Two groups, and every weight is in exactly one. The gains are few, which is why forgetting this goes unnoticed for so long.

# %% id="train-groups-table"
model = new_model()
sizes = [[p.numel() for p in group["params"]] for group in optimizer_groups(model, 0.1)]
for name, tensors in zip(("decay", "no decay"), sizes):
    print(f"{name:8}: {len(tensors):3} tensors, {sum(tensors):8,} weights")
assert sum(map(sum, sizes)) == model.num_parameters()

# %% [markdown]
# `fused=True` updates all weights of a group in one pass over memory instead of a dozen. Chapter 9 measures it.

# %% id="train-make-optimizer"
#| export
def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), one kernel a group."""
    groups = optimizer_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, config.learning_rate, config.betas, fused=True)

# %% [markdown]
# **Exercise 8.2 (10 min, ★): `optimizer_groups`** in [workbook 8](../exercises/08_training_loop.ipynb). Sort the parameters of a model that has every trap: gains called weight, a tensor of three dimensions, a frozen one, a tied one.
#
# **Exercise 8.5 (20 min, ★★): `adamw_step`** in [workbook 8](../exercises/08_training_loop.ipynb). Write the formula above for whole tensors; the check compares with `torch.optim.AdamW` over many steps.
#
# **Exercise 8.6 (10 min, ★): `spike`** in [workbook 8](../exercises/08_training_loop.ipynb). Predict how far one gradient that is a thousand times too large moves a weight. Most guesses are far off.
#
# **Exercise 8.7 (10 min, ★): `lion_step`** in [workbook 8](../exercises/08_training_loop.ipynb). Lion (Chen et al. 2023) needs one mean where Adam needs two; write it from its formula.
#
# **Try it.** Add a third group: embeddings without decay, as OLMo 2 has it. A tied embedding must not land in two groups. How do you find it?
#
# ## 8.4 Batches too large for memory
#
# A large batch gives a steadier gradient but may not fit. **Accumulation** splits it: run micro-batch after micro-batch, let the gradients add up, step once.
# The result must not depend on how the batch was cut. The trap is what to divide by.
#
# Three micro-batches by hand, with 4, 1 and 1 real tokens (the rest is padding, label -100) and token losses of 2, 8 and 8:
# all tokens together give (4·2 + 8 + 8)/6 = 4. The mean of the three means is (2 + 8 + 8)/3 = 6. The two lonely tokens got four times their weight.
#
# The cure is to weight each micro-batch's mean by its share of the real tokens, here 4/6, 1/6 and 1/6.

# %% id="train-token-shares"
#| export
def token_shares(batches: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """The micro-batches' shares of the real tokens (label not -100), and their number.

    Batches without labels get equal shares.
    """
    if "labels" not in batches[0]:
        return torch.full((len(batches),), 1 / len(batches)), torch.tensor(0)
    counts = torch.stack([(batch["labels"] != -100).sum() for batch in batches])
    return counts / counts.sum().clamp(min=1), counts.sum()

# %% [markdown]
# The same three micro-batches. Weighted by its share of the tokens, each mean counts as it should:

# %% id="train-shares-by-hand"
labels = torch.tensor([[1, 1, 1, 1], [1, -100, -100, -100], [1, -100, -100, -100]])
shares, tokens = token_shares([{"labels": row} for row in labels])
means = torch.tensor([2.0, 8.0, 8.0])
print(f"token shares: {(means * shares).sum()}, mean of means: {means.mean()}")
assert (means * shares).sum() == 4 and tokens == 6

# %% [markdown]
# Now a real gradient. `ragged` keeps only the first 64, 16, 8 or 4 labels of a row, as documents of different lengths would.

# %% id="train-ragged"
def ragged(batch):
    labels = batch["labels"].clone()
    for rows, length in zip(labels.chunk(4), (64, 16, 8, 4)):
        rows[:, length:] = -100
    return {"input_ids": batch["input_ids"], "labels": labels}

# %% [markdown]
# `cut` makes micro-batches: 16 rows become, for example, four times 4.

# %% id="train-cut"
def cut(batch, parts):
    pieces = [tensor.chunk(parts) for tensor in batch.values()]
    return [dict(zip(batch, rows)) for rows in zip(*pieces)]

# %% [markdown]
# `gradient` adds up the gradients of the parts, each with its weight, and returns them as one long vector.

# %% id="train-gradient"
def gradient(model, parts, weights):
    model.zero_grad()
    for part, weight in zip(parts, weights):
        (byte_loss(model, part)[0] * weight).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])

# %% [markdown]
# The gradient of the whole batch is the truth. **Before you run this:** how far off is the mean of means: 1%, 10%, or more than 40%?

# %% id="train-accumulation-gradient"
model, batch = new_model(), ragged(batches[0])
parts, whole = cut(batch, 4), gradient(model, [batch], [1.0])
error = lambda weights: (gradient(model, parts, weights) - whole).norm() / whole.norm()
right, wrong = error(token_shares(parts)[0]), error([1 / 4] * 4)
print(f"relative error: token shares {right:.0e}, mean of means {wrong:.0%}")
assert right < 1e-4 < wrong

# %% [markdown]
# And in training: the same data, cut into one part or into four, with weights by `weigh`. The curve is the loss of the whole batch in every case.

# %% id="train-accumulation-runs"
def accumulate(parts, weigh):
    model, curve = new_model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(chapter.steps(chapter.size.accumulation_steps)):
        batch = ragged(batches[step])
        curve.append(byte_loss(model, batch)[0].item())
        pieces = cut(batch, parts)
        gradient(model, pieces, weigh(pieces))
        optimizer.step()
    return np.array(curve)

# %% [markdown]
# The truth, and how far each way of accumulating is from it:

# %% id="train-accumulation-three"
by_shares = lambda pieces: token_shares(pieces)[0]
truth = accumulate(1, by_shares)
right = abs(accumulate(4, by_shares) - truth)
wrong = abs(accumulate(4, lambda pieces: [1 / 4] * 4) - truth)
assert np.median(right) < 1e-3 and np.median(right) < np.median(wrong) / 10

# %% [markdown]
# The scale is logarithmic, so equal distances on the axis are equal factors. Token shares begin at rounding noise; as in any training, tiny differences grow with time.

# %% id="train-accumulation-figure"
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.semilogy(right + 1e-9, label="token shares")
ax.semilogy(wrong + 1e-9, label="mean of means")
ax.set(xlabel="step", ylabel="difference of loss (nats)")
ax.legend()
show(fig, f"Token shares stay near rounding (at most {right.max():.0e} nats off); the "
          f"mean of means (up to {wrong.max():.0e}) trains a different model.")

# %% [markdown]
# Libraries got this wrong for years: the `Trainer` of transformers was repaired in October 2024, after training losses with and without accumulation were seen to differ.
#
# **Exercise 8.3 (10 min, ★): `token_shares`** in [workbook 8](../exercises/08_training_loop.ipynb). Rebuild it without looking. Mind the borders: no labels at all, and labels that are all padding.
#
# ## 8.5 16-bit numbers
#
# 16-bit numbers halve the memory and more than double the speed of matrix products, on hardware that has them.
# There are two kinds, and they fail differently. Both spend one bit on the sign. Of the other 15, `bfloat16` gives 8 to the exponent, as many as float32, and 7 to the digits: it keeps the range.
# `float16` gives 5 and 10: it keeps more digits and gives up range.

# %% id="train-formats"
for kind in (torch.float32, torch.bfloat16, torch.float16):
    info = torch.finfo(kind)
    print(f"{str(kind)[6:]:9} largest {info.max:.0e}, smallest normal {info.tiny:.0e}, "
          f"after 1 comes 1 + {info.eps:.0e}")
assert torch.tensor(256, dtype=torch.bfloat16) + 1 == 256  # too few digits for 257
assert torch.tensor(1e-8, dtype=torch.float16) == 0  # too small for its range

# %% [markdown]
# The last column is the step from 1 to the next number: bfloat16 counts in steps of almost a hundredth, float16 in steps of a thousandth.
# An update often changes a weight by a thousandth of itself or less, and in bfloat16 such a change is rounded away. So weights stay in float32, and **autocast** runs only the matrix products in 16 bits.
#
# Which kind a machine does fast decides. A processor without bfloat16 emulates it, slower than float32; what it can do stands in its list of capabilities.

# %% id="train-fast-bfloat16"
#| export
def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (emulation is slow)."""
    flags = {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"}
    if hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(flag) for flag in flags)
    info = Path("/proc/cpuinfo")
    return info.exists() and bool(flags & set(info.read_text().split()))

# %% [markdown]
# Three cases follow. Hardware with bfloat16 takes it; a GPU without takes float16; a processor without stays in float32.
# The names are short ones, and each has its reason:

# %% id="train-reasons"
#| export
REASONS = {"bf16": "multiplies bfloat16 in hardware", "fp16": "has no bfloat16",
           "fp32": "has no fast 16-bit numbers"}  # fmt: skip

# %% [markdown]
# A wish that the machine cannot fulfil fast is replaced by the best that it can, and the reason says so.

# %% id="train-pick-precision"
#| export
def pick_precision(
    device: torch.device | str, wanted: str = "auto"
) -> tuple[torch.dtype | None, str]:
    """The autocast type for `device` (None: plain float32) and the reason in words."""
    if wanted not in ("auto", "bf16", "fp16", "fp32"):
        raise ValueError(f"precision {wanted!r}: choose auto, bf16, fp16 or fp32")
    gpu = torch.device(device).type == "cuda"
    fast = torch.cuda.is_bf16_supported(False) if gpu else has_fast_bfloat16()
    best = "bf16" if fast else "fp16" if gpu else "fp32"
    got = {"fp32": "fp32", "fp16": "fp16" if gpu else best}.get(wanted, best)
    what = "this GPU" if gpu else "this processor"
    reason = f"{got}, as asked" if got == wanted else f"{got}: {what} {REASONS[got]}"
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
# We can watch this on a processor. Take the model from the plain loop and a batch that is one of 256 micro-batches, so its loss is divided by 256.
# These are the sizes of the gradients that arrive at its logits. **Before you run the second cell:** what share of them does float16 lose?

# %% id="train-gradient-sizes"
logits = trained(batches[0]["input_ids"])
loss = cross_entropy(logits, batches[0]["labels"]) / 256
sizes = torch.autograd.grad(loss, logits)[0].abs().flatten()

# %% [markdown]
# `half()` turns them into float16. How many become 0, as they are, and multiplied by $2^{16}$?

# %% id="train-gradient-lost"
lost = (sizes.half() == 0).float().mean().item()
kept = ((sizes * 2**16).half() != 0).float().mean().item()
print(f"{lost:.0%} become 0 in float16; scaled by 2^16, {kept:.0%} survive")
assert lost > 0.5 and kept > 0.9

# %% [markdown]
# Most of the vocabulary is improbable at each position, and the gradient of an improbable token is tiny. As a picture: scaling moves the whole hill to the right, into the range that float16 can hold.

# %% id="train-gradient-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
for scale, style in ((1, "-"), (2**16, "--")):
    powers = (sizes * scale).clamp(min=1e-16).log10().numpy()
    ax.hist(powers, 80, histtype="step", ls=style, label=f"loss times {scale:,}")
ax.axvspan(math.log10(6e-8), math.log10(65504), color="0.88")
ax.set(xlabel="size of a gradient at the logits (power of ten)", ylabel="count")
ax.legend()
show(fig, "Grey is what float16 can hold; left of it a gradient becomes zero: "
          f"{lost:.0%} of them as they are, {1 - kept:.0%} after scaling.")

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
# A hook on the logits sends their gradient through float16, as a float16 layer would: too small becomes 0, too large becomes infinite.

# %% id="train-half"
def half_loss(model, batch, share):
    logits = model(batch["input_ids"])
    logits.register_hook(lambda gradient: gradient.half().float())
    return cross_entropy(logits, batch["labels"]) * share

# %% [markdown]
# The loop with a scaler in it. The optimiser steps only when every gradient is finite.

# %% id="train-half-runs"
def half_run(scaler, share=1 / 256):
    model, curve, scales = new_model(), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(chapter.steps(chapter.size.half_steps)):
        loss = half_loss(model, batches[step], share)
        optimizer.zero_grad()
        (loss * scaler.scale).backward()
        for p in model.parameters():
            p.grad /= scaler.scale
        curve.append(loss.item() / share)
        scales.append(scaler.scale)
        overflow = not all(p.grad.isfinite().all() for p in model.parameters())
        if not overflow:
            optimizer.step()
        scaler.update(overflow)
    return curve, scales

# %% [markdown]
# Three runs. The first is the reference: its loss is not divided, so that hardly anything is lost. The second is divided and not scaled, the third is both.

# %% id="train-half-three"
full, _ = half_run(TinyScaler(1.0, patience=math.inf), share=1.0)
unscaled, _ = half_run(TinyScaler(1.0, patience=math.inf))
scaled, scales = half_run(TinyScaler())
assert len(scaled) <= 20 or np.mean(scaled[-5:]) < np.mean(unscaled[-5:])

# %% [markdown]
# Without scaling most of the signal is gone. With it the run follows the reference, after a few skipped steps.

# %% id="train-half-figure"
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.7))
for name, curve in {"whole": full, "divided": unscaled, "and scaled": scaled}.items():
    left.plot(curve, label=name)
left.set(xlabel="step", ylabel="loss (nats per byte)")
left.legend()
right.semilogy(scales, base=2)
right.set(xlabel="step", ylabel="scale")
show(fig, "Left: without scaling float16 learns more slowly. Right: the scale starts "
          "too high on purpose, halves until the gradients fit, then probes upwards.")

# %% [markdown]
# PyTorch's own `GradScaler` follows the same rule. We feed both the same pattern of overflows:

# %% id="train-scaler-check"
theirs = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=10)
ours = TinyScaler(2.0**24)
for step in range(60):
    overflow, point = step in (0, 1, 2, 30), nn.Parameter(torch.zeros(1))
    theirs.scale(point * (math.inf if overflow else 1.0)).backward()
    theirs.step(torch.optim.SGD([point], lr=0.1))
    theirs.update()
    ours.update(overflow)
    assert theirs.get_scale() == ours.scale

# %% [markdown]
# bfloat16 needs none of this: its range is that of float32. The loop uses the scaler for float16 only.
#
# ## 8.6 Memory that stays
#
# One gain belongs to the processor alone and has nothing to do with arithmetic. A step allocates the same large tensors as the step before.
# The C library fetches each from the kernel and returns it when freed; the kernel clears every page again. We ask it to keep them.

# %% id="train-keep-memory"
#| export
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers from malloc.h

def keep_memory(on: bool = True) -> bool:
    """Let the C library keep freed memory for the next step; False: it cannot."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    size = 2**30 if on else 2**17  # 2**17 is glibc's own choice
    return all([mallopt(M_MMAP_THRESHOLD, size), mallopt(M_TRIM_THRESHOLD, size)])

# %% [markdown]
# The gain shows wherever tensors are large, such as the 32 MB of float32 logits of a batch. The clock takes the best of five, since other programs can only make it slower.

# %% id="train-keep-memory-measure"
from timeit import repeat

rows = chapter.size.logit_rows
logits = torch.randn(1, rows, 2048, requires_grad=True)
labels = torch.zeros(1, rows, dtype=torch.long)
one_loss = lambda: torch.autograd.grad(cross_entropy(logits, labels), logits)

# %% [markdown]
# Once with glibc's own choice, once with memory kept:

# %% id="train-keep-memory-compare"
seconds = {}
for keep in (False, True):
    possible = keep_memory(keep)
    seconds[keep] = min(repeat(one_loss, number=1, repeat=5))
print(f"memory returned {seconds[False]:.3f} s, kept {seconds[True]:.3f} s"
      if possible else "only glibc (Linux) can do this")
speedup = check("train/keep_memory_speedup", seconds[False] / seconds[True])

# %% [markdown]
# ## 8.7 The loop
#
# Everything that changes during a run lives in one object, because that is exactly what a checkpoint must hold. Its first part is the log.
# A line of the log covers several steps: it keeps means over them, so that a single lucky batch does not show as progress.

# %% id="train-history"
#| export
@dataclass
class History:
    """What a run logged; a mean is over the steps since the entry before."""

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # mean
    metrics: list[dict] = field(default_factory=list)  # means of what loss_fn adds
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)  # mean, before clipping
    tokens: list[int] = field(default_factory=list)  # real tokens since step 0
    seconds: list[float] = field(default_factory=list)  # without evaluation and saving
    tokens_per_second: list[float] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)  # step, tokens, evaluate's numbers

# %% [markdown]
# `Run` holds model, optimiser, scaler, step, and in `window` the sums since the last line of the log. These sums stay tensors, on the device.
# The scaler is torch's, and switched off unless the type is float16. `tick` is the clock; with `count=False` the time since the last tick does not count as training.
# `state` turns everything into plain tensors and numbers: that is the checkpoint.

# %% id="train-run-state"
#| export
class Run:
    """Everything that changes while training, which is what a checkpoint must hold."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        self.model, self.config, self.history = model, config, History()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.dtype, self.reason = pick_precision(self.device, config.precision)
        self.optimizer, kind = make_optimizer(model, config), self.device.type
        self.scaler = torch.amp.GradScaler(kind, enabled=self.dtype == torch.float16)
        self.step, self.tokens = 0, torch.tensor(0, device=self.device)
        self.window: dict[str, torch.Tensor] = {}  # sums since the last log line
        self.window_start = (0, 0, 0.0)  # step, tokens, seconds of that line
        self.seconds, self.clock = 0.0, time.perf_counter()

    def tick(self, count: bool = True) -> None:
        """Count the time since the last tick as training, or leave it out."""
        now = time.perf_counter()
        self.seconds += (now - self.clock) * count
        self.clock = now

    def state(self) -> dict:
        """What a checkpoint holds: every part, the random state, the settings."""
        names = ("step", "tokens", "seconds", "window", "window_start")
        state = {name: getattr(self, name) for name in names}
        for name in ("model", "optimizer", "scaler"):
            state[name] = getattr(self, name).state_dict()
        settings = {"history": asdict(self.history), "config": asdict(self.config)}
        return state | settings | {"random": random_state()}

# %% [markdown]
# ### One step
#
# One feature is still missing. A single bad batch can give a gradient many times the usual size, and one such step can throw the weights far off. **Clipping** caps its length.
# Its norm is the root of the sum of all squares, over all weights of the model together. By hand: the gradient (3, 4) has norm 5; clipped to norm 1 it becomes (0.6, 0.8). The direction stays.

# %% id="train-clip-by-hand"
point = nn.Parameter(torch.zeros(2))
point.grad = torch.tensor([3.0, 4.0])
norm = nn.utils.clip_grad_norm_([point], max_norm=1.0)
print(f"norm before: {norm:.1f}, clipped: {point.grad}")
assert norm == 5 and torch.allclose(point.grad, torch.tensor([0.6, 0.8]), atol=1e-5)

# %% [markdown]
# Now all features in their order: set the rate of this step; read the micro-batches; for each, the loss under autocast, weighted by its share, scaled, and `backward`;
# divide by the scale; clip; update. With accumulation $a$, step $s$ reads the micro-batches $s \cdot a$ to $s \cdot a + a - 1$, so the data position still follows from the step alone.
#
# Nothing here asks for a number. A GPU works through a queue of orders while Python goes on; `loss.item()` would wait until the queue is empty, every step.

# %% id="train-one-step"
#| export
def train_step(run: Run, model: nn.Module, batches, loss_fn: Callable) -> None:
    """One optimiser step over `accumulation` micro-batches; waits for no device."""
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
            value = torch.as_tensor(value).detach().float()
            run.window[name] = run.window.get(name, 0) + value * share
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.parameters, config.grad_clip or math.inf)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.window["grad_norm"] = run.window.get("grad_norm", 0) + norm
    run.tokens, run.step = run.tokens + tokens, run.step + 1

# %% [markdown]
# **Exercise 8.4 (30 min, ★★★): `train_step`** in [workbook 8](../exercises/08_training_loop.ipynb). Put the parts together in the right order; the check compares weights and log with a plain loop, and finds twenty ways to get it wrong.
#
# **Exercise 8.8 (15 min, ★★): `fit`** in [workbook 8](../exercises/08_training_loop.ipynb). Two bugs in a short loop whose loss falls all the same: one in the accumulation, one in the clipping.
#
# Every few steps the sums become numbers. A loss that is no number stops the run here, before a checkpoint could keep it.
# `now` and `run.seconds` are totals; what they were at the line before gives the speed.

# %% id="train-write-log"
#| export
def write_log(run: Run) -> None:
    """Move the window into the history; only here the loop waits for the device."""
    step, tokens, seconds = run.window_start
    means = {name: float(x) / (run.step - step) for name, x in run.window.items()}
    if not math.isfinite(means["loss"]):
        what = f"the loss is {means['loss']} between steps {step} and {run.step}"
        raise FloatingPointError(f"{what}: lower learning_rate or raise warmup")
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
    """Append what `evaluate(model)` returns, a dict or one number, to the history."""
    run.tick()
    run.model.eval()
    with torch.no_grad():
        result = evaluate(run.model)
    run.model.train()
    run.tick(count=False)
    result = result if isinstance(result, dict) else {"value": result}
    at = {"step": run.step, "tokens": int(run.tokens)}
    run.history.evals.append(at | result)

# %% [markdown]
# ### Checkpoints: what a run must remember
#
# A saved model is not a checkpoint. To continue as if nothing had happened, the loop needs the weights, Adam's two running means, the loss scale, the step (which gives the schedule
# and the data position) and the state of every random generator. There are four of these: Python's, NumPy's, torch's, and one on each GPU. Dropout draws from torch's, for example.

# %% id="train-random-state"
#| export
def random_state() -> dict:
    """The state of every random generator a step may use, in types that load safely."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(),
            "numpy": (kind, keys.tolist(), *rest)}  # fmt: skip

# %% [markdown]
# The way back. A checkpoint from a machine with a GPU can be read on one without; then its GPU state is left out, and the run continues, but not bit for bit.

# %% id="train-set-random-state"
#| export
def set_random_state(state: dict) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])

# %% [markdown]
# A half-written file must never take the place of a whole one. So we write beside it, force the bytes to the disk, and rename: a rename happens entirely or not at all.
# A reader finds the old file before it and the new one after. First the one error that all of this can raise:

# %% id="train-checkpoint-error"
#| export
class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message says what to do."""

# %% [markdown]
# Without `fsync` the rename may reach the disk before the bytes do, and a power cut would leave an empty file under the right name.

# %% id="train-save-checkpoint"
#| export
def save_checkpoint(folder: str | Path, state: dict) -> Path:
    """Write `folder`/checkpoint.pt; a kill leaves the old file or the new, whole."""
    final = Path(folder) / "checkpoint.pt"
    part = final.with_suffix(".part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name points to it
        os.replace(part, final)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        what = f"could not be written ({error}); the last good checkpoint is untouched"
        raise CheckpointError(f"{final}: {what}") from error
    return final

# %% [markdown]
# **Exercise 8.9 (20 min, ★★): `save_newest`** in [workbook 8](../exercises/08_training_loop.ipynb). Keep the newest three checkpoints. The check cuts the power after each of your orders to the disk and looks at what is left.
#
# Reading is strict. `weights_only=True` lets the file hold data but no code, which a pickle otherwise may. A damaged file gives one clear error; torch raises several types for it, so all are caught.

# %% id="train-load-checkpoint"
#| export
def load_checkpoint(folder: str | Path) -> dict:
    """Read `folder`/checkpoint.pt to the CPU; CheckpointError if missing or damaged."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise CheckpointError(f"{path}: no checkpoint there; start without resume")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        what = f"{path}: truncated or damaged ({path.stat().st_size:,} bytes)"
        raise CheckpointError(f"{what}; delete it and start again") from error

# %% [markdown]
# Weights are loaded strictly. Missing, unexpected or differently shaped ones are named, before anything is changed.

# %% id="train-load-weights"
#| export
def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load strictly; CheckpointError names weights missing, unknown or misshapen."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [f"{name}: missing in the checkpoint" for name in own if name not in given]
    wrong += [f"{name}: not in this model" for name in given if name not in own]
    for name in own:
        if name in given and (there := given[name]) != own[name]:
            wrong.append(f"{name}: {there} in the checkpoint, {own[name]} in the model")
    if wrong:
        what = f"checkpoint of another model, {len(wrong)} weights differ, such as\n  "
        raise CheckpointError(what + "\n  ".join(wrong[:3]))
    model.load_state_dict(weights)

# %% [markdown]
# A schedule of other length or another rate would continue, but not the same run. So other settings are refused, except how often to report and to save.

# %% id="train-same-settings"
#| export
def check_same_settings(saved: dict, given: dict) -> None:
    """CheckpointError when a resumed run has other settings than it began with."""
    free = {"log_every", "eval_every", "save_every"}
    changed = [key for key in given if key not in free and saved.get(key) != given[key]]
    both = [f"{key}: {saved[key]!r} then, {given[key]!r} now" for key in changed]
    if changed:
        what = f"cannot resume with other settings ({'; '.join(both)})"
        raise CheckpointError(f"{what}; give the same, or start without resume")

# %% [markdown]
# Putting it all back is the mirror image of `state`. The random state comes last, since nothing after it may draw a number.

# %% id="train-run-restore"
#| export
def restore(run: Run, state: dict) -> None:
    """Continue from `state`; CheckpointError if settings or sizes differ from `run`."""
    check_same_settings(state["config"], asdict(run.config))
    load_weights(run.model, state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.step, run.seconds = state["step"], state["seconds"]
    run.window_start = tuple(state["window_start"])
    run.tokens = state["tokens"].to(run.device)
    run.window = {name: value.to(run.device) for name, value in state["window"].items()}
    run.history = History(**state["history"])
    set_random_state(state["random"])

# %% [markdown]
# ### The whole loop
#
# With these parts the loop is short: step, and now and then log, evaluate, save. `due` says whether it is time for one of the three; after the last step it always is.
# `max_steps` stops earlier on the same schedule, which is how we will interrupt a run on purpose.

# %% id="train-train"
#| export
def train(
    model: nn.Module, batches, loss_fn: Callable, config: TrainConfig,
    folder: str | Path | None = None, resume: bool = False,
    evaluate: Callable | None = None, on_log: Callable[[History], None] | None = None,
    max_steps: int | None = None,
) -> History:  # fmt: skip
    """Train `model` in place on `batches[0]`, `batches[1]`, ... and return the log.

    `batches[i]` is a dict of tensors on the model's device, the same for the same `i`.
    `loss_fn(model, batch)` returns the mean loss over real tokens and a dict of means.
    `resume` goes on bit for bit from `folder`/checkpoint.pt, or begins without one.
    """
    set_seed(config.seed)
    run = Run(model, config)
    if run.device.type == "cpu":
        keep_memory()
    if resume and folder and (Path(folder) / "checkpoint.pt").exists():
        restore(run, load_checkpoint(folder))
    # with the loss, whose float32 table over all tokens is a large part of a small step
    fast = torch.compile(loss_fn) if config.compile else loss_fn
    last = min(config.steps, max_steps or config.steps)
    due = lambda every: run.step == last or (every > 0 and run.step % every == 0)
    model.train()
    while run.step < last:
        train_step(run, model, batches, fast)
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
# ## 8.8 What each feature is worth
#
# The same model, data and steps; each run lacks one thing. First warm-up and decay, at a rate that is high for this model.

# %% id="train-feature-runs"
def run(name, batches=batches, **changes):
    usual = dict(steps=chapter.steps(chapter.size.steps), learning_rate=5e-3,
                 warmup=0.15, log_every=4, precision="fp32")
    history = train(new_model(), batches, byte_loss, TrainConfig(**(usual | changes)))
    print(f"{name:26} last loss {history.loss[-1]:.2f}, {history.seconds[-1]:.1f} s")
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

# %% id="train-draw"
def draw(runs):
    """Loss curves of {name: history}."""
    fig, ax = plt.subplots(figsize=(7, 2.8))
    for name, history in runs.items():
        ax.plot(history.step, history.loss, label=name)
    ax.set(xlabel="step", ylabel="loss (nats per byte)")
    ax.legend()
    return fig, ax

# %% [markdown]
# How far above the complete run does the run without warm-up end? That is the number to keep.

# %% id="train-warmup-figure"
fig, ax = draw({"all": everything, "no warm-up": no_warmup, "no decay": no_decay})
ax.axhline(entropy, color="grey", ls=":")
show(fig, "Without warm-up the run sits longer on the plateau (dotted) and ends "
          "higher; decay makes little difference in so short a run.")
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
fig, ax = draw({"damaged, clipping at norm 1": clipped,
                "damaged, no clipping": unclipped, "not damaged, no clipping": clean})
ax.axvline(middle, color="grey", ls=":")
show(fig, "Two damaged batches at the dotted line: the clipped run recovers at once; "
          "without clipping a run ends higher, damaged or not.")
clip_gain = check("train/clip_gain_nats", unclipped.loss[-1] - clipped.loss[-1])

# %% [markdown]
# Read such numbers with care: this is one seed of a small model at a high rate. At a low rate the same features cost a little time and change nothing.
#
# **Exercise 8.10 (25 min, ★★): `final_loss`** in [workbook 8](../exercises/08_training_loop.ipynb). A run that is long enough: measure what a flat rate, decay, and an average of the weights leave of the noise.
#
# **Try it.** Repeat the warm-up pair with `learning_rate=1e-3` and with three seeds. At which rate does warm-up begin to matter?
#
# ## 8.9 Does it really continue?
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
settings = TrainConfig(24, 5e-3, warmup=0.5, log_every=1, precision="fp32")
model_a, half = new_model(), chapter.work / "half"
history_a = train(model_a, batches, noisy_loss, settings)
_ = train(new_model(), batches, noisy_loss, settings, folder=half, max_steps=12)

# %% [markdown]
# `finish` continues from that checkpoint, after `change` has damaged one part of it. The new model starts from another seed: its weights must all come from the checkpoint.

# %% id="train-finish"
def finish(change=lambda state: None, batches=batches):
    state, changed = load_checkpoint(half), chapter.work / "changed"
    change(state)
    save_checkpoint(changed, state)
    model = new_model(seed=1)
    history = train(model, batches, noisy_loss, settings, folder=changed, resume=True)
    pairs = zip(model_a.parameters(), model.parameters())
    return history.loss, max((a - b).abs().max().item() for a, b in pairs)

# %% [markdown]
# With nothing damaged:

# %% id="train-exact"
complete = finish()
print("largest difference of any weight:", complete[1])
assert complete == (history_a.loss, 0)

# %% [markdown]
# Zero: not close, but equal. Now leave out one part at a time, by putting there what a fresh start would have. Most tutorials save the weights alone.
# For the data position, the batches begin again at step 0. Anything that answers to `[step]` will do as batches, even a dict.
#
# **Predict:** which of the four losses will go wrong without anybody noticing?

# %% id="train-variants"
fresh = Run(new_model(), settings).state()
forget = lambda part: lambda state: state.update({part: fresh[part]})
again = {step: batches[step % 12] for step in range(24)}
finished = {part: finish(forget(part)) for part in ("random", "optimizer", "model")}
finished |= {"data position": finish(batches=again), "nothing": complete}

# %% [markdown]
# How far from run A does each end?

# %% id="train-leave-one-out"
off = {}
for part, (losses, largest) in finished.items():
    off[part] = np.abs(np.array(losses) - history_a.loss)
    print(f"{part:13} weights off by {largest:.0e}, losses by {off[part].max():.0e}")
    assert (largest == 0) == (part == "nothing")

# %% [markdown]
# Without its weights the model starts anew, and anybody sees that. The other three are silent. A tenth of a nat or less hardly shows in a curve;
# a wrong data position only means that the model sees some text twice and some never. Only the comparison with a run that was never stopped finds them.

# %% id="train-leave-one-out-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
for (part, gap), marker in zip(off.items(), "osv^x"):
    ax.semilogy(range(13, 25), gap[12:] + 1e-7, marker=marker, ms=4, label=part)
ax.set(xlabel="step", ylabel="difference of loss (nats)", xlim=(12.5, 30))
ax.legend(title="left out", loc="right")
show(fig, "Distance from run A after the restart at step 12: only the complete one "
          "stays at zero, which is drawn at the lower edge.")

# %% [markdown]
# ## 8.10 kill -9
#
# A process that is killed cannot tidy up. So we start a run in a process of its own, kill it in the middle, start it again, and compare with a run that lived.
# The script is a file that you can read and try yourself. It has dropout, so chance plays a part, and it saves every 9 steps.

# %% id="train-kill-script"
script = chapter.work / "run_me.py"
_ = script.write_text("""import sys, torch
from torch import nn
from minimind.train import TrainConfig, train

class Batches:
    def __getitem__(self, step):
        ids = torch.randint(50, (8, 33), generator=torch.Generator().manual_seed(step))
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

def loss_fn(model, batch):
    logits = model(batch["input_ids"]).mT  # (B, V, T)
    return nn.functional.cross_entropy(logits, batch["labels"]), {}

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(50, 64), nn.Dropout(0.1), nn.Linear(64, 50))
config = TrainConfig(steps=120, log_every=1, save_every=9, precision="fp32")
train(model, Batches(), loss_fn, config, folder=sys.argv[1], resume=True,
      on_log=lambda history: print(history.step[-1], flush=True))
""")

# %% [markdown]
# Four tools of the standard library start, kill and clear away:

# %% id="train-kill"
import shutil
import signal
import subprocess
import sys

import minimind

# %% [markdown]
# The new process must find the package, and use as many threads as this one, since sums depend on how they are split among threads.

# %% id="train-start-run"
environment = os.environ | {"PYTHONPATH": str(Path(minimind.__file__).parent.parent),
                            "OMP_NUM_THREADS": str(torch.get_num_threads())}

for name in ("killed", "lived"):
    shutil.rmtree(chapter.work / name, ignore_errors=True)

def start_run(name):
    command = [sys.executable, script, chapter.work / name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

# %% [markdown]
# The parent reads the step numbers that the run prints, and at step 40 sends signal 9, which no process can catch. From which step will a second start go on?

# %% id="train-kill-now"
victim = start_run("killed")
for line in victim.stdout:
    if int(line) == 40:
        victim.send_signal(signal.SIGKILL)
        break
assert victim.wait() == -signal.SIGKILL
print("last checkpoint: step", load_checkpoint(chapter.work / "killed")["step"])

# %% [markdown]
# The steps since that checkpoint are lost, at most nine. The same command again goes on there. A third run, never killed, is the truth.

# %% id="train-kill-compare"
processes = [start_run("killed"), start_run("lived")]
printed = [[int(line) for line in process.stdout] for process in processes]
print("the second start did steps", printed[0][0], "to", printed[0][-1])
killed, lived = (load_checkpoint(chapter.work / name) for name in ("killed", "lived"))

# %% [markdown]
# Are the two ends the same? Compare the losses of all steps, every weight, and the random state.

# %% id="train-kill-equal"
assert killed["step"] == 120 and killed["history"]["loss"] == lived["history"]["loss"]
assert all(torch.equal(w, lived["model"][name]) for name, w in killed["model"].items())
assert torch.equal(killed["random"]["torch"], lived["random"]["torch"])

# %% [markdown]
# They are equal to the last bit. (On a GPU some kernels add in a different order each time; there equality holds up to rounding.)
#
# **Try it.** A loop that shuffles with `random.shuffle` at the start of each epoch also stores its data position as the step. Does it resume exactly? Design a test that shows it.
#
# ## 8.11 Killed while writing
#
# The worst moment is during the write itself. The next script saves a good checkpoint of step 1, then tells the kernel to kill it as soon as a file grows beyond 200,000 bytes, and saves step 2, which has twice as many.
# It does so once with a plain `torch.save` and once with ours.

# %% id="train-die-writing"
dying = chapter.work / "die_writing.py"
_ = dying.write_text("""import resource, signal, sys, torch
from minimind.train import save_checkpoint

kind, folder = sys.argv[1:]
plain_save = lambda folder, state: torch.save(state, folder + "/checkpoint.pt")
save_checkpoint(folder, {"step": 1, "weights": torch.zeros(100_000)})
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel may kill us, without warning
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
save = plain_save if kind == "plain" else save_checkpoint
save(folder, {"step": 2, "weights": torch.ones(100_000)})
""")

# %% [markdown]
# What is left after each?

# %% id="train-die-compare"
left = {}
for kind in ("plain", "ours"):
    command = [sys.executable, dying, kind, chapter.work / kind]
    ended = subprocess.run(command, env=environment).returncode
    try:
        left[kind] = load_checkpoint(chapter.work / kind)["step"]
    except CheckpointError as error:
        left[kind] = str(error).partition(": ")[2].partition(" (")[0]
    print(f"{kind:5}: ended by signal {-ended}, left: {left[kind]}")
assert left == {"plain": "truncated or damaged", "ours": 1}

# %% [markdown]
# The plain way destroyed the only copy: opening a file for writing empties it first. Ours still has step 1. A full disk is the same case with an error in place of a kill; the tests of this course try both.
#
# ## 8.12 Where it breaks
#
# Two refusals that save an evening. A checkpoint of another size names the weights that differ, and other settings are named as well. Nothing of the run has been changed by then.

# %% id="train-refusals"
wider = MiniMind(ModelConfig.preset("tiny", num_hidden_layers=3, vocab_size=256))
longer = TrainConfig(steps=48, learning_rate=5e-3, warmup=0.5, precision="fp32")
for model, config in ((wider, settings), (new_model(), longer)):
    try:
        train(model, batches, byte_loss, config, folder=half, resume=True)
        raise AssertionError("a checkpoint that does not fit was taken")
    except CheckpointError as error:
        print(error, "\n")

# %% [markdown]
# ## Recap
#
# - The loop asks for `batches[step]`: any step's data can be had again, so the step is the data position.
# - Warm-up protects the first steps, decay settles the last ones of a long run, clipping caps the damage of a bad batch.
# - Accumulated micro-batches count by their real tokens. float16 needs a scaled loss, bfloat16 does not.
# - A checkpoint holds weights, optimiser, scale, step and random state. It is written beside the old one and renamed.
# - `train(model, batches, loss_fn, config)` is the loop of all later chapters.
#
# **Exercises:** 8.1 to 8.10, in place above, with checks in [workbook 8](../exercises/08_training_loop.ipynb).
#
# **Words:** learning-rate schedule, warm-up, decay, weight decay, optimiser group, gradient norm, clipping, micro-batch, accumulation, autocast, bfloat16, float16, loss scaling, checkpoint, atomic write.
#
# **Sources:** Kingma and Ba 2015, Adam, arXiv:1412.6980. Loshchilov and Hutter 2019, AdamW, arXiv:1711.05101. Pascanu, Mikolov and Bengio 2013, clipping, arXiv:1211.5063.
# Micikevicius et al. 2018, mixed precision and loss scaling, arXiv:1710.03740. Goyal et al. 2017, warm-up, arXiv:1706.02677. Hu et al. 2024, warm-up, stable, decay, arXiv:2404.06395. OLMo 2 2024, arXiv:2501.00656.
#
# **Next:** the loop waits for real data. Chapter 9 feeds it as fast as this machine allows, and trains the model.
