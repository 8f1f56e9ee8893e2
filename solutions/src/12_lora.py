# %% [markdown]
# # Workbook 12. LoRA
#
# You write the core of `minimind.lora` yourself: the layer, the search for its places,
# adding, merging, and the names that `peft` reads. Then you count what a large model
# would need, find two bugs, write DoRA, and measure why the scale is a matter of
# dispute. About two hours; stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. Hints open one at a time. `solution("find_targets")`
# shows that one solution and no other.

# %% id="setup"
# (filled in by the build)

# %% id="w12-imports"
import math

import torch
from torch import Tensor, nn

from minimind.lora import LoRAConfig, linear_names, replace_module

# %% [markdown] exercise="LoRALinear"
# ## 1. A layer and its change
#
# Beside a linear layer stand two thin matrices, $A$ with $r$ rows and $B$ with $r$
# columns:
# $$y = W x + \frac{\alpha}{r}\, B (A x)$$
# The old layer may have a bias; it stays where it is. The parts are called
# `base_layer`, `lora_A` and `lora_B`, because PEFT's files use these names, and the
# thin ones are linear layers without a bias. $A$ starts as PEFT's does, uniform within
# $\pm 1/\sqrt{\text{in}}$; $B$ starts at zero. Both have the type of the old weights.
# A rank below 1 is a `ValueError`. `change()` is what has to be added to $W$ to get
# the same layer without an adapter. (Chapter section 12.3.)
#
# <details><summary>Hint 1: the shapes</summary>
#
# The weight of `nn.Linear(a, b)` has the shape (b, a). So the two thin layers go from
# `in_features` to the rank, and from the rank to `out_features`.
#
# </details>
# <details><summary>Hint 2: how A starts</summary>
#
# `nn.Linear` starts exactly so by itself. Only the other matrix needs `nn.init`.
#
# </details>
# <details><summary>Hint 3: type and place</summary>
#
# `module.to(tensor)` gives all weights of a module the type and the device of a tensor.
#
# </details>

# %% id="w12-lora-linear" exercise="LoRALinear" points=4 minutes=15 difficulty=2 kind="rebuild"
class LoRALinear(nn.Module):
    """A linear layer plus a change of low rank: x (..., in) -> (..., out).

    A (r, in) starts random, B (out, r) at zero (Hu et al. 2021, arXiv:2106.09685).
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float):
        super().__init__()
        ### BEGIN SOLUTION
        if rank < 1:
            raise ValueError(f"rank {rank}: an adapter has at least rank 1")
        self.base_layer, self.scale = base_layer, alpha / rank
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.to(base_layer.weight)
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))
        ### END SOLUTION

    def change(self) -> Tensor:
        """What the adapter adds to the weight, (out, in)."""
        ### BEGIN SOLUTION
        return self.scale * self.lora_B.weight @ self.lora_A.weight
        ### END SOLUTION

# %% id="w12-lora-linear-check"
check("LoRALinear")

# %% [markdown] exercise="find_targets"
# ## 2. Which layers?
#
# `linear_names(model)` gives the full names of all linear layers, such as
# `model.layers.0.self_attn.q_proj`. Choose those that fit one of the `targets`: a
# target is a full name or the end of one, in whole words between dots. So `q_proj` and
# `layers.0.self_attn.q_proj` fit that name, and `proj` does not. Give them in the
# order of the model, each once.
#
# A target that fits nothing is a `ValueError`; its text names the target and the layers
# that there are. No target at all is one, too. (Section 12.4.)
#
# <details><summary>Hint 1: whole words</summary>
#
# `"a.q_proj".endswith("q_proj")` is true, and so is `"a.q_proj".endswith("proj")`.
# What if both sides began with a dot?
#
# </details>
# <details><summary>Hint 2: in which order to ask</summary>
#
# First, for each target: does any name fit it? Then, for each name: does it fit any
# target?
#
# </details>

# %% id="w12-find-targets" exercise="find_targets" points=3 minutes=15 difficulty=2 kind="rebuild"
def find_targets(model: nn.Module, targets: list[str]) -> list[str]:
    """Full names of the linear layers that fit one of `targets`, by name or its end.

    ValueError when there are no targets, or one fits no layer.
    """
    ### BEGIN SOLUTION
    names = linear_names(model)
    fits = lambda name, target: f".{name}".endswith(f".{target}")
    unknown = [t for t in targets if not any(fits(name, t) for name in names)]
    if unknown or not targets:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ValueError(f"no layer for {unknown or 'no target'}; there are {known}")
    return [name for name in names if any(fits(name, t) for t in targets)]
    ### END SOLUTION

# %% id="w12-find-targets-check"
check("find_targets")

# %% [markdown] exercise="add_lora"
# ## 3. Put adapters on a model
#
# `adapters(model)` lists the adapted layers, full name to layer; a model without any is
# a `ValueError`, because whoever asks for them expects some. `add_lora(model, config)`
# works in place and returns the model: find the targets, freeze every weight, put a
# `LoRALinear` in the place of each target (`replace_module(model, name, new)` does
# that), and remember the settings as `model.lora_config`. A model that has adapters
# already is a `ValueError`. Whatever is refused stays as it was. (Section 12.4.)
#
# <details><summary>Hint 1: the order</summary>
#
# Everything that can be refused comes first. Then freeze, then replace: a layer that is
# put in after the freezing still trains.
#
# </details>
# <details><summary>Hint 2: freezing</summary>
#
# A module has the method `requires_grad_`, for all its weights at once.
#
# </details>
# <details><summary>Hint 3: who is an adapter?</summary>
#
# `model.named_modules()` gives all modules with their full names; `isinstance` tells
# yours from the others.
#
# </details>

# %% id="w12-add-lora" exercise="add_lora" points=4 minutes=15 difficulty=2 kind="rebuild"
def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by full name; ValueError when there are none."""
    ### BEGIN SOLUTION
    found = {name: module for name, module in model.named_modules()
             if isinstance(module, LoRALinear)}
    if not found:
        raise ValueError("this model has no adapters: none added, or none left")
    return found
    ### END SOLUTION


def add_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Freeze a model and put an adapter on every target layer, in place.

    `config` has `r`, `lora_alpha` and `target_modules`.
    """
    ### BEGIN SOLUTION
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("this model has adapters already: merge or remove them first")
    names = find_targets(model, config.target_modules)
    model.requires_grad_(False)
    for name in names:
        old = model.get_submodule(name)
        replace_module(model, name, LoRALinear(old, config.r, config.lora_alpha))
    model.lora_config = config
    return model
    ### END SOLUTION

# %% id="w12-add-lora-check"
check("add_lora")

# %% [markdown] exercise="merge_lora"
# ## 4. Off again, with or without what was learned
#
# Both work in place and return the model, without adapters, without `lora_config`, and
# with all its weights training again. `remove_lora` gives back the model as it was;
# `merge_lora` adds each change to its weight first. Both refuse a model that has none.
# (Section 12.8.)
#
# <details><summary>Hint 1</summary>
#
# The old layer is still there, inside the adapter. One of the two functions can call
# the other.
#
# </details>
# <details><summary>Hint 2: a weight that is written over</summary>
#
# Adding to a weight is no step of the model's computation: without `torch.no_grad()`
# autograd would remember that the new weight was made of $A$ and $B$.
#
# </details>

# %% id="w12-merge-lora" exercise="merge_lora" points=3 minutes=10 difficulty=2 kind="rebuild"
def remove_lora(model: nn.Module) -> nn.Module:
    """Take the adapters off, in place: the model is what it was before add_lora."""
    ### BEGIN SOLUTION
    for name, module in adapters(model).items():
        replace_module(model, name, module.base_layer)
    del model.lora_config
    return model.requires_grad_(True)
    ### END SOLUTION


def merge_lora(model: nn.Module) -> nn.Module:
    """Add each change to its weight and take the adapters off, in place."""
    ### BEGIN SOLUTION
    with torch.no_grad():
        for module in adapters(model).values():
            module.base_layer.weight += module.change()
    return remove_lora(model)
    ### END SOLUTION

# %% id="w12-merge-lora-check"
check("merge_lora")

# %% [markdown] exercise="adapter_weights"
# ## 5. What goes into the file
#
# A file of PEFT holds the thin matrices and nothing else, each under the full name of
# its layer: `layers.0.q_proj.lora_A.weight`, then `layers.0.q_proj.lora_B.weight`, then
# those of the next layer. (Section 12.8.)
#
# <details><summary>Hint</summary>
#
# `adapters(model)` has names and layers. Two entries for each.
#
# </details>

# %% id="w12-adapter-weights" exercise="adapter_weights" points=2 minutes=5 difficulty=1 kind="rebuild"
def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The thin matrices by their full names, ...q_proj.lora_A.weight and so on."""
    ### BEGIN SOLUTION
    return {f"{name}.{part}.weight": getattr(layer, part).weight
            for name, layer in adapters(model).items() for part in ("lora_A", "lora_B")}
    ### END SOLUTION

# %% id="w12-adapter-weights-check"
check("adapter_weights")

# %% [markdown] exercise="seven_billion"
# ## 6. Predict: a model of seven billion weights
#
# Mistral 7B (Jiang et al. 2023, arXiv:2310.06825) has 32 layers, a width of 4,096, a
# feed-forward width of 14,336, and 32 query heads over 8 key/value heads of width 128.
# Give each of its seven matrices (`q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`,
# `up_proj`, `down_proj`) an adapter of rank 16, in every layer. On paper:
#
# 1. How many weights train? Write the exact number into `predicted_weights`.
# 2. Each of them has a gradient and two averages of AdamW, 4 bytes each. How many
#    gigabytes ($10^9$ bytes) is that? Write it into `predicted_gb` (within 2%). For
#    all 7.24 billion weights it would be 87.
#
# A formula counts as a number.
#
# <details><summary>Hint 1: one matrix</summary>
#
# A matrix of the shape (out, in) gets $r \cdot \text{in}$ weights in $A$ and
# $\text{out} \cdot r$ in $B$.
#
# </details>
# <details><summary>Hint 2: the widths</summary>
#
# Two of the seven are narrower than the others: how many outputs do 8 heads of width
# 128 have?
#
# </details>

# %% id="w12-seven-billion" exercise="seven_billion" points=3 minutes=10 difficulty=2 kind="beyond"
### BEGIN SOLUTION
predicted_weights = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024)
                               + 3 * (4096 + 14336))
predicted_gb = predicted_weights * 3 * 4 / 1e9
### END SOLUTION

# %% id="w12-seven-billion-check"
check("seven_billion")

# %% [markdown] exercise="train_adapters"
# ## 7. Two bugs
#
# A colleague trains adapters and returns the last loss and, for each layer, what has to
# be added to its weight. Nothing crashes. But **the loss stands still**, and even if it
# moved, **what is returned would not be what was trained**. There are two bugs; repair
# them in place.
#
# <details><summary>Hint 1: it stands still</summary>
#
# An optimiser changes the weights that it was given when it was made, and no others.
# Which were there at that moment?
#
# </details>
# <details><summary>Hint 2: what is returned</summary>
#
# Compare with the formula of exercise 1. Here $\alpha$ is 8 and $r$ is 2.
#
# </details>

# %% id="w12-train-adapters" exercise="train_adapters" points=3 minutes=10 difficulty=2 kind="beyond"
def train_adapters(model, names, x, y, r=2, alpha=8.0, steps=40, learning_rate=0.02):
    """Train adapters on the layers `names` so that model(x) comes close to y.

    Returns the mean square error at the end, and {name: what to add to its weight}.
    """
    config = LoRAConfig(r, alpha, names)
    ### BEGIN SOLUTION
    adapted = add_lora(model, config)  # before the optimiser looks
    optimizer = torch.optim.AdamW(adapted.parameters(), learning_rate)
    ### END SOLUTION
    ### BEGIN STUB
    # optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    # adapted = add_lora(model, config)
    ### END STUB
    for _ in range(steps):
        optimizer.zero_grad()
        (adapted(x) - y).square().mean().backward()
        optimizer.step()
    loss = (adapted(x) - y).square().mean().item()
    ### BEGIN SOLUTION
    changes = {name: layer.change() for name, layer in adapters(adapted).items()}
    ### END SOLUTION
    ### BEGIN STUB
    # changes = {name: layer.lora_B.weight @ layer.lora_A.weight
    #            for name, layer in adapters(adapted).items()}
    ### END STUB
    return loss, {name: change.detach() for name, change in changes.items()}

# %% id="w12-train-adapters-check"
check("train_adapters")
### BEGIN HIDDEN TESTS
torch.manual_seed(31)
hidden_model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
hidden_old, hidden_bias = (p.detach().clone() for p in hidden_model[2].parameters())
hidden_x, hidden_y = torch.randn(12, 5), torch.randn(12, 2)
hidden_rows = hidden_model[:2](hidden_x).detach()
hidden_loss, hidden_changes = train_adapters(hidden_model, ["2"], hidden_x, hidden_y, 1)
hidden_now = hidden_rows @ (hidden_old + hidden_changes["2"]).T + hidden_bias
assert abs((hidden_now - hidden_y).square().mean().item() - hidden_loss) < 1e-4
### END HIDDEN TESTS

# %% [markdown] exercise="dora_weight"
# ## 8. A variant: DoRA
#
# DoRA (Liu et al. 2024, arXiv:2402.09353) splits a matrix into directions and lengths.
# LoRA's change turns the directions; the lengths $m$, one for each row (each output) of
# $W$, are weights of their own:
# $$W' = m \odot \frac{W + \Delta W}{\lVert W + \Delta W \rVert}$$
# where the norm is that of each row, as in PEFT. When no `magnitude` is given, take
# the lengths of the rows of $W$: with $\Delta W = 0$ the layer then starts as it was.
#
# To save memory, section 4.3 of the paper takes the norm as a **constant** in the
# backward pass: no gradient flows through it.
#
# <details><summary>Hint 1: a norm for each row</summary>
#
# `norm(dim=..., keepdim=True)` of an (out, in) matrix must have the shape (out, 1).
#
# </details>
# <details><summary>Hint 2: a constant</summary>
#
# `detach()` gives the same numbers without their history. Only the norm is detached;
# the numerator is not.
#
# </details>

# %% id="w12-dora-weight" exercise="dora_weight" points=4 minutes=15 difficulty=2 kind="beyond"
def dora_weight(weight: Tensor, change: Tensor,
                magnitude: Tensor | None = None) -> Tensor:
    """The matrix of DoRA, (out, in), from W, its change (both so) and m (out,)."""
    ### BEGIN SOLUTION
    if magnitude is None:
        magnitude = weight.norm(dim=1)
    turned = weight + change
    length = turned.norm(dim=1).detach()
    return (magnitude / length)[:, None] * turned
    ### END SOLUTION

# %% id="w12-dora-weight-check"
check("dora_weight")

# %% [markdown] exercise="first_step"
# ## 9. An experiment: divide by the rank, or by its root?
#
# LoRA scales the change by $\alpha / r$. Kalajdzievski 2023 (arXiv:2312.03732) says
# that this makes large ranks learn too slowly, and takes $\alpha / \sqrt r$. Look at
# the first step of plain gradient descent.
#
# **Predict first.** How many times smaller is the step of the output at rank 128 than
# at rank 8, in the mean over all random $A$, with $\alpha / r$? And with
# $\alpha / \sqrt r$? Write the two exact factors into `predicted_plain` and
# `predicted_root`.
#
# Then measure. Write `first_step(r, alpha)`: for each of 30 seeds, put a `LoRALinear`
# on a fresh `nn.Linear(128, 128, bias=False)`; let `x` be 128 ones and the loss the
# sum of the outputs $y$; take one step of learning rate 1 on $B$ (on $A$ there is
# nothing to step: why?); how far have the outputs fallen, in the mean over them? Return
# the mean of that over the seeds. Last, fill `measured` for $\alpha = 8$:
# `measured["plain"]` and `measured["root"]` are dicts from the ranks 8, 32 and 128 to
# the step.
#
# <details><summary>Hint 1: on paper</summary>
#
# With scale $s$ and a gradient $g$ at the output, $B$ becomes $-s\,g\,(Ax)^\top$. So
# the output moves by $s B A x = -s^2\, g\, \lVert A x \rVert^2$. That square has $r$
# terms.
#
# </details>
# <details><summary>Hint 2: the root with your layer</summary>
#
# Your layer divides alpha by $r$. By which alpha must it be given so that
# $8 / \sqrt r$ comes out?
#
# </details>
# <details><summary>Hint 3: a step by hand</summary>
#
# `loss.backward()` fills `layer.lora_B.weight.grad`; subtract it from the weight within
# `torch.no_grad()`.
#
# </details>

# %% id="w12-first-step" exercise="first_step" points=4 minutes=20 difficulty=3 kind="beyond"
### BEGIN SOLUTION
predicted_plain = 128 / 8
predicted_root = 1
### END SOLUTION

def first_step(r: int, alpha: float) -> float:
    """How far the first gradient step lowers the outputs; mean of 30 seeds."""
    ### BEGIN SOLUTION
    moved, x = [], torch.ones(128)
    for seed in range(30):
        torch.manual_seed(seed)
        layer = LoRALinear(nn.Linear(128, 128, bias=False), r, alpha)
        before = layer(x)
        before.sum().backward()
        with torch.no_grad():
            layer.lora_B.weight -= layer.lora_B.weight.grad
            moved.append((before - layer(x)).mean().item())
    return sum(moved) / len(moved)
    ### END SOLUTION

### BEGIN SOLUTION
measured = {"plain": {r: first_step(r, 8) for r in (8, 32, 128)},
            "root": {r: first_step(r, 8 * math.sqrt(r)) for r in (8, 32, 128)}}
### END SOLUTION

# %% id="w12-first-step-check"
check("first_step")

# %% [markdown]
# AdamW divides each gradient by its size, so its first step is another one: put
# `.grad.sign()` in place of `.grad`, and see which of the two scales is even now. The
# chapter trains with AdamW.
#
# ## Keep what is yours
#
# `keep()` saves the functions of exercises 1 to 5 that pass to `student/lora.py`. With
# `MINIMIND_STUDENT=student` before a command, the course uses them.

# %% id="w12-keep"
keep()
