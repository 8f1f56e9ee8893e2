# %% [markdown]
# # Workbook 8. The training loop
#
# You write the parts of `minimind.train` that decide what a run learns: the schedule,
# the groups, the shares of tokens, the step. Then you write two optimisers by hand,
# predict what a spike does, repair a loop, save without ever being without a whole
# checkpoint, and measure what decay and averaging are good for. About two and a half
# hours; stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. Hints open one at a time. `solution("train_step")` shows
# that one solution and no other.

# %% id="setup"
# (filled in by the build)

# %% id="w08-imports"
import math
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from minimind.train import Run, TrainConfig

def token_loss(model, batch):
    """The mean loss of a batch, and as a metric how many bytes its numbers have."""
    logits = model(batch["input_ids"])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
    return loss, {"bytes": logits.element_size()}

def noise(step):
    """What a batch adds to the true gradient of 1000 weights; the same at each call."""
    return torch.randn(1000, generator=torch.Generator().manual_seed(step))

# %% [markdown] exercise="learning_rate_at"
# ## 1. The rate of a step
#
# Warm-up, flat, decay (section 8.2). With peak $p$, $S$ steps, $w$ of them warm-up, $d$
# of them decay, and final share $f$:
# $$\text{rate}(s) = p \cdot
# \min\Big(1,\ \tfrac{s+1}{w},\ f + (1-f)\,\tfrac{S-s}{d}\Big)$$
# `config` has `steps`, `learning_rate` (the peak), `warmup` and `decay` (shares of the
# steps) and `final_lr` (a share of the peak). $w$ and $d$ are rounded to whole steps,
# and are at least 1.
#
# <details><summary>Hint 1: from shares to steps</summary>
#
# `round(share * steps)`. It may give 0: then `max` helps.
#
# </details>
# <details><summary>Hint 2: a case to try by hand</summary>
#
# 10 steps, peak 1, `warmup=0.2`, `decay=0.5`, `final_lr=0`: the first rate is 1/2, the
# last is 1/5.
#
# </details>

# %% id="w08-learning-rate-at" exercise="learning_rate_at" points=2 minutes=10 difficulty=1 kind="rebuild"
def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Rate of `step`, from 0: rise, flat, fall (Hu et al. 2024, arXiv:2404.06395)."""
    ### BEGIN SOLUTION
    rise = (step + 1) / max(1, round(config.warmup * config.steps))
    fall = (config.steps - step) / max(1, round(config.decay * config.steps))
    end = config.final_lr + (1 - config.final_lr) * fall
    return config.learning_rate * min(1.0, rise, end)
    ### END SOLUTION

# %% id="w08-learning-rate-at-check"
check("learning_rate_at")

# %% [markdown] exercise="optimizer_groups"
# ## 2. What decays, and what does not
#
# Weight decay is for parameters of two or more dimensions. Vectors (biases, the gains
# of norms) do not decay. Give AdamW its two groups, the decaying one first; leave out
# what is frozen. (Section 8.3.)
#
# <details><summary>Hint 1: the form</summary>
#
# A group is a dict: `{"params": [...], "weight_decay": 0.1}`. The function returns a
# list of two.
#
# </details>
# <details><summary>Hint 2: how to tell them apart</summary>
#
# By `p.dim()`, not by name: the gain of a norm is called `weight` too. Frozen
# parameters have `requires_grad=False`. `model.parameters()` names a tied weight once.
#
# </details>

# %% id="w08-optimizer-groups" exercise="optimizer_groups" points=2 minutes=10 difficulty=1 kind="rebuild"
def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices (embeddings too) decay, vectors (gains, biases) do not."""
    ### BEGIN SOLUTION
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    decays = ((matrices, weight_decay), (vectors, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in decays]
    ### END SOLUTION

# %% id="w08-optimizer-groups-check"
check("optimizer_groups")

# %% [markdown] exercise="token_shares"
# ## 3. How much a micro-batch counts
#
# A batch was cut into micro-batches. Each one's mean loss must count by its share of
# the real tokens, those whose label is not -100. Return the shares, one float for each
# micro-batch, and the number of real tokens as a tensor. (Section 8.4.)
#
# Two borders: batches without `"labels"` get equal shares and count 0 tokens; and if
# every label is -100, all shares are 0.
#
# <details><summary>Hint 1: counting</summary>
#
# `(labels != -100).sum()` is a tensor with one number; `torch.stack` makes one tensor
# of several. Leave `.item()` out: on a GPU it would wait.
#
# </details>
# <details><summary>Hint 2: no 0 / 0</summary>
#
# 0 / 1 is 0. `clamp(min=...)` keeps the divisor up.
#
# </details>

# %% id="w08-token-shares" exercise="token_shares" points=2 minutes=10 difficulty=1 kind="rebuild"
def token_shares(batches: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """The micro-batches' shares of the real tokens (label not -100), and their number.

    Batches without labels get equal shares.
    """
    ### BEGIN SOLUTION
    if "labels" not in batches[0]:
        return torch.full((len(batches),), 1 / len(batches)), torch.tensor(0)
    counts = torch.stack([(batch["labels"] != -100).sum() for batch in batches])
    return counts / counts.sum().clamp(min=1), counts.sum()
    ### END SOLUTION

# %% id="w08-token-shares-check"
check("token_shares")

# %% [markdown] exercise="train_step"
# ## 4. One step
#
# All of it, in this order (section 8.7):
#
# 1. Set the rate of this step in *every* group of `run.optimizer.param_groups`.
# 2. Read the micro-batches `batches[i]`. With $a$ = `run.config.accumulation`, step
#    $s$ = `run.step` reads numbers $sa$ to $sa + a - 1$. Get their shares.
# 3. For each: loss and metrics from `loss_fn(model, batch)`, under `torch.autocast` to
#    `run.dtype` if that is not None; multiply the loss by its share; scale it
#    (`run.scaler.scale(...)`); `backward()`.
# 4. Let the scaler divide the gradients again (`unscale_`, which takes the optimiser),
#    then clip the norm of `run.parameters` to `run.config.grad_clip`, where 0 means
#    "do not clip".
# 5. The scaler's `step` moves the weights, unless a gradient overflowed; its `update`
#    adapts the scale. Then clear the gradients.
# 6. Write down: `run.window` is a dict of *sums* since the last line of the log. Add
#    `"loss"` and each metric (a mean over the tokens of this step), and
#    `"grad_norm"` before clipping. Add the tokens to `run.tokens`, and 1 to `run.step`.
#
# `try_steps` below is given: the check uses it, and you can too.
#
# <details><summary>Hint 1: autocast, or not</summary>
#
# `nullcontext()` is a `with` that does nothing:
# `with torch.autocast(kind, dtype) if ... else nullcontext():`
# where `kind` is `run.device.type`.
#
# </details>
# <details><summary>Hint 2: the norm</summary>
#
# `nn.utils.clip_grad_norm_(parameters, largest)` clips, and returns the norm from
# before. Which `largest` never clips?
#
# </details>
# <details><summary>Hint 3: sums that start at nothing</summary>
#
# `d[name] = d.get(name, 0) + value`. The loss still carries its whole graph: `detach()`
# it, or the memory of every step since the last log stays. Metrics may be plain
# numbers; `torch.as_tensor` takes both.
#
# </details>

# %% id="w08-train-step" exercise="train_step" points=5 minutes=30 difficulty=3 kind="rebuild"
def train_step(run: Run, model: nn.Module, batches, loss_fn: Callable) -> None:
    """One optimiser step over `accumulation` micro-batches; waits for no device."""
    ### BEGIN SOLUTION
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
    ### END SOLUTION

def try_steps(model, batches, count, dtype=None, scale=None, **settings):
    """`count` steps with a copy of the model; what they left, as plain data. Given."""
    usual = {"steps": 10, "precision": "fp32"}
    run = Run(deepcopy(model), TrainConfig(**usual | settings))
    run.dtype = dtype
    if scale:
        run.scaler = torch.amp.GradScaler("cpu", scale, growth_interval=2)
    for _ in range(count):
        train_step(run, run.model, batches, token_loss)
    window = {name: float(value) for name, value in run.window.items()}
    graphs = [name for name in window if getattr(run.window[name], "grad_fn", None)]
    return {"step": run.step, "tokens": int(run.tokens),
            "window": window, "graphs": graphs,
            "lr": [group["lr"] for group in run.optimizer.param_groups],
            "scale": run.scaler.get_scale(),
            "weights": [p.detach().clone() for p in run.model.parameters()]}

# %% id="w08-train-step-check"
check("train_step")

# %% [markdown] exercise="adamw_step"
# ## 5. AdamW by hand
#
# One step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) for one tensor. $t$
# counts from 1, so that the means, which start at 0, can be divided by the part they
# have seen:
# $$m' = \beta_1 m + (1-\beta_1)\,g \qquad v' = \beta_2 v + (1-\beta_2)\,g^2$$
# $$w' = w - \eta\lambda w - \eta\,
# \frac{m' / (1-\beta_1^t)}{\sqrt{v' / (1-\beta_2^t)} + \epsilon}$$
# Return new tensors, and leave the given ones alone. (Section 8.3.)
#
# <details><summary>Hint 1: a case by hand</summary>
#
# At $t = 1$, with $m = v = 0$, the quotient is the sign of $g$, whatever its size
# (unless it is as small as $\epsilon$).
#
# </details>
# <details><summary>Hint 2: two small traps</summary>
#
# The decay is of the old $w$ and does not go through the means: that is what the W in
# the name stands for. And $\epsilon$ stands outside the root.
#
# </details>

# %% id="w08-adamw-step" exercise="adamw_step" points=3 minutes=20 difficulty=2 kind="beyond"
def adamw_step(
    w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, t: int,
    lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.1,
    eps: float = 1e-8,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Step t, from 1, of AdamW: the new weights and both new means."""
    ### BEGIN SOLUTION
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    quotient = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return w - lr * weight_decay * w - lr * quotient, m, v
    ### END SOLUTION

# %% id="w08-adamw-step-check"
check("adamw_step")

# %% [markdown] exercise="spike"
# ## 6. Predict: a gradient a thousand times too large
#
# A weight has had the gradient 0.001 for many hundred steps, so $m = 0.001$ and
# $v = 0.001^2$, and it moves by the full rate in each step. Now comes one damaged batch
# with the gradient 1. How far does the weight move *in this one step*, in units of the
# rate? ($\beta_1 = 0.9$, $\beta_2 = 0.95$, no decay, no clipping.) Guess first; then
# work it out on paper, to within 2%.
#
# <details><summary>Hint 1: what is left out</summary>
#
# Beside the new gradient, the old means hardly count: $m \approx 0.1 \cdot 1$.
#
# </details>
# <details><summary>Hint 2: why it is still bad</summary>
#
# Both means are now far too large. Run your `adamw_step` for twenty more steps with
# the gradient 0.001, and add up the moves: $m$ and $v$ forget at different speeds.
#
# </details>

# %% id="w08-spike" exercise="spike" points=1 minutes=10 difficulty=1 kind="beyond"
### BEGIN SOLUTION
predicted_spike = 0.1 / math.sqrt(0.05)
### END SOLUTION

# %% id="w08-spike-check"
check("spike")

# %% [markdown]
# The twenty steps after the spike, if your `adamw_step` is ready. Without the spike
# they would move the weight by 20 rates.

# %% id="w08-spike-after"
w, m, v = torch.tensor(0.0), torch.tensor(0.001), torch.tensor(0.001**2)
for step, gradient in enumerate([1.0] + 20 * [0.001]):
    before = w
    g = torch.tensor(gradient)
    w, m, v = adamw_step(w, g, m, v, 1000 + step, lr=1.0, weight_decay=0)
    if step in (0, 1, 5, 20):
        print(f"{step:2} steps after the spike: moved by {before - w:.2f} rates")

# %% [markdown] exercise="lion_step"
# ## 7. Another optimiser: Lion
#
# Lion (Chen et al. 2023, arXiv:2302.06675) was found by a program that searched among
# programs. It keeps one mean instead of two, so it needs half of Adam's memory, and
# each weight moves by exactly the rate:
# $$w' = w - \eta\,\big(\operatorname{sign}(\beta_1 m + (1-\beta_1)\,g) + \lambda w\big)
# \qquad m' = \beta_2 m + (1-\beta_2)\,g$$
# Note that the mean that gives the direction is not the mean that is kept.
#
# <details><summary>Hint 1</summary>
#
# Two lines, each from the *old* $m$. `torch.sign` gives 0 for 0.
#
# </details>
# <details><summary>Hint 2: what happens to a spike?</summary>
#
# Nothing can make a step longer than the rate (and the decay). But a spike in $m$
# decides the signs for a long time.
#
# </details>

# %% id="w08-lion-step" exercise="lion_step" points=2 minutes=10 difficulty=1 kind="beyond"
def lion_step(
    w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, lr: float,
    betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One step of Lion: the new weights and the new mean."""
    ### BEGIN SOLUTION
    beta1, beta2 = betas
    direction = torch.sign(beta1 * m + (1 - beta1) * g)
    return w - lr * (direction + weight_decay * w), beta2 * m + (1 - beta2) * g
    ### END SOLUTION

# %% id="w08-lion-step-check"
check("lion_step")

# %% [markdown] exercise="fit"
# ## 8. Two bugs
#
# A colleague fits `x @ w` to `y` with micro-batches, loss scaling and clipping. The
# loss falls, so nobody noticed, but there are two bugs. One makes **most of the data
# useless**: the result is the same if all micro-batches of a step but one are replaced.
# The other makes **every step too small**, unless the scale is 1. Find both and repair
# them in place.
#
# <details><summary>Hint 1: the data</summary>
#
# Follow `gradient` through two micro-batches of the same step. (Section 8.4.)
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# With a scale of 1000, how large is the norm where it is compared with `max_norm`?
# What must come first? (Section 8.5.)
#
# </details>

# %% id="w08-fit" exercise="fit" points=3 minutes=15 difficulty=2 kind="beyond"
def fit(w, steps, lr=0.1, max_norm=1.0, scale=1000.0):
    """Each of `steps` is a list of equally large micro-batches (x, y); the final w."""
    for micro_batches in steps:
        w = w.detach().requires_grad_()
        gradient = torch.zeros_like(w)
        for x, y in micro_batches:
            loss = ((x @ w - y) ** 2).mean() / len(micro_batches)
            ### BEGIN SOLUTION
            gradient += torch.autograd.grad(scale * loss, w)[0]
            ### END SOLUTION
            ### BEGIN STUB
            # gradient = torch.autograd.grad(scale * loss, w)[0]
            ### END STUB
        ### BEGIN SOLUTION
        gradient = gradient / scale
        w = w - lr * gradient * min(1, max_norm / gradient.norm())
        ### END SOLUTION
        ### BEGIN STUB
        # gradient = gradient * min(1, max_norm / gradient.norm())
        # w = w - lr * gradient / scale
        ### END STUB
    return w.detach()

# %% id="w08-fit-check"
check("fit")
### BEGIN HIDDEN TESTS
hidden_g = torch.Generator().manual_seed(31)
hidden_x, hidden_y = torch.randn(12, 3, generator=hidden_g), torch.ones(12)
hidden_whole = fit(torch.zeros(3), [[(hidden_x, hidden_y)]] * 4, scale=64.0)
hidden_cut = fit(torch.zeros(3), [list(zip(hidden_x.chunk(4), hidden_y.chunk(4)))] * 4)
assert torch.allclose(hidden_whole, hidden_cut, atol=1e-5)
### END HIDDEN TESTS

# %% [markdown] exercise="save_newest"
# ## 9. Never without a whole checkpoint
#
# Keep the newest `last` checkpoints, and let a power cut come at any moment (section
# 8.7). A disk has five orders. `write(name, data)` makes or empties a file and then
# fills it, but only after `sync(name)` would its bytes survive a power cut.
# `rename(old, new)` and `delete(name)` happen entirely or not at all, and survive; a
# rename replaces what was called `new`. `names()` lists all files in any order.
#
# The checkpoint of step 12 is called `step-000012.pt`. Promise: at every moment, each
# file that ends in `.pt` is whole; once `last` are there, there are never fewer; and at
# the end there are the `last` newest. Files that do not end in `.pt` are yours for
# other uses. A run that was killed may have left one behind: it must not count as a
# checkpoint.
#
# <details><summary>Hint 1: the new one</summary>
#
# Four orders, of which the last makes it visible under its name: write beside it, ...
#
# </details>
# <details><summary>Hint 2: the old ones</summary>
#
# Before or after the new one is in place? Sorted names are sorted steps, thanks to the
# zeros; `sorted(...)[:-last]` are all but the `last` newest.
#
# </details>

# %% id="w08-save-newest" exercise="save_newest" points=4 minutes=20 difficulty=2 kind="beyond"
def save_newest(disk, step: int, data: bytes, last: int = 3) -> None:
    """Save `data` as the checkpoint of `step`, and keep only the `last` newest."""
    ### BEGIN SOLUTION
    final, part = f"step-{step:06}.pt", "checkpoint.part"
    disk.write(part, data)
    disk.sync(part)
    disk.rename(part, final)
    checkpoints = sorted(name for name in disk.names() if name.endswith(".pt"))
    for name in checkpoints[:-last]:
        disk.delete(name)
    ### END SOLUTION

# %% id="w08-save-newest-check"
check("save_newest")

# %% [markdown] exercise="final_loss"
# ## 10. An experiment: why the rate falls at the end
#
# In section 8.8 the decay gained nothing, because the run was short. Here the run is
# long enough, and the model is as plain as can be: 1000 weights that should all be 0,
# with the loss $\frac{1}{2}\,\text{mean}(w^2)$. A batch sees the true gradient $w$ plus
# noise, and a step is
# $$w \leftarrow w - \eta_t\,(w + \text{noise}(t)) \qquad t = 0, \dots, 199$$
# from $w = 1$ everywhere (`noise` stands at the top). Three ways:
#
# - `"flat"`: the rate is 0.3 at every step.
# - `"decay"`: flat for 100 steps, then down to 0 as in your `learning_rate_at`, without
#   warm-up: at step $t \ge 100$ it is $0.3\,(200 - t)/100$.
# - `"average"`: the rate is 0.3 at every step, and beside the run goes a moving average
#   of the weights, $e \leftarrow 0.98\,e + 0.02\,w$ after each step, from $e = 1$. The
#   loss is that of $e$. (Polyak and Juditsky 1992; as a moving average in Tarvainen and
#   Valpola 2017, arXiv:1703.01780.)
#
# **Predict first:** which one ends lowest? Write its name into `predicted_best`. Then
# write `final_loss(way)`, the loss after 200 steps as a plain number, and fill the dict
# `measured` for all three. Correct your prediction if it was wrong.
#
# <details><summary>Hint 1: the shape of it</summary>
#
# One loop for all three: only the rate and what is measured at the end differ. No
# autograd is needed, because the gradient is given.
#
# </details>
# <details><summary>Hint 2: why flat stops falling</summary>
#
# The noise of each step stays in the weights until later steps have pulled it out. A
# flat rate puts as much in as it pulls out.
#
# </details>

# %% id="w08-final-loss" exercise="final_loss" points=4 minutes=25 difficulty=2 kind="beyond"
### BEGIN SOLUTION
predicted_best = "average"
### END SOLUTION

def final_loss(way: str) -> float:
    """The loss after 200 noisy steps, by "flat", "decay" or "average"."""
    ### BEGIN SOLUTION
    w = average = torch.ones(1000)
    for t in range(200):
        rate = 0.3 * (min(1, (200 - t) / 100) if way == "decay" else 1)
        w = w - rate * (w + noise(t))
        average = 0.98 * average + 0.02 * w
    return ((average if way == "average" else w) ** 2).mean().item() / 2
    ### END SOLUTION

### BEGIN SOLUTION
measured = {way: final_loss(way) for way in ("flat", "decay", "average")}
### END SOLUTION

# %% id="w08-final-loss-check"
check("final_loss")

# %% [markdown]
# What you measured, if you did. An average needs no decision in advance of when the run
# will end; a decay needs no second copy of the weights.

# %% id="w08-final-loss-show"
for way in measured if isinstance(measured, dict) else ():
    print(f"{way:8} {measured[way]:.4f}")

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves the functions of exercises 1 to 4 that pass to `student/train.py`. With
# `MINIMIND_STUDENT=student` before a command, the course trains with them.

# %% id="w08-keep"
keep()
