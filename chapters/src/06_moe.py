# %% [markdown]
# # 6. Feed-forward layers and mixtures of experts
#
# Attention moves information between positions. The feed-forward layer works on what has arrived at one position. In this chapter you
# build that layer, then replace it by several **experts** of which each token uses only one or two, and watch what happens when nobody
# takes care that all experts get work.
#
# At the end you can
#
# - write SwiGLU, the feed-forward layer of today's models, from its formula;
# - route tokens to experts and run each expert once on its own tokens, without a loop over tokens;
# - compute the balance loss, and show in seconds what goes wrong without it;
# - say when a mixture of experts is worth its memory.
#
# You need chapter 3 (cross-entropy) and what a matrix product is. Reading 30 minutes; running: smoke 20 s, cpu 60 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="moe-default-exp"
#| default_exp moe

# %% id="moe-imports"
#| export
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %% [markdown]
# The whole chapter in one picture: a token vector goes to the router; the router picks one expert; only that expert computes.

# %% id="moe-picture"
import matplotlib.pyplot as plt


def box(ax, x, y, text, picked=True):
    style = dict(boxstyle="round", fc="#dce9f7" if picked else "white", ec="black",
                 ls="-" if picked else ":")
    ax.text(x, y, text, ha="center", va="center", bbox=style,
            color="black" if picked else "grey", size=10)


fig, ax = plt.subplots(figsize=(7, 2.6))
for x, y, text in ((0.4, 1.5, "token\nvector x"), (2.3, 1.5, "router\nsoftmax(W x)"),
                   (8.6, 1.5, "y = 0.7 · expert 2(x)")):
    box(ax, x, y, text)
for i, share in enumerate((0.1, 0.7, 0.05, 0.15)):
    picked = i == 1
    box(ax, 5.4, 3 - i, f"expert {i + 1}   p = {share}", picked)
    arrow = dict(arrowstyle="->", ls="-" if picked else ":", lw=2 if picked else 1,
                 color="black" if picked else "grey")
    ax.annotate("", (4.3, 3 - i), (3.15, 1.5), arrowprops=arrow)
ax.annotate("", (1.4, 1.5), (1.05, 1.5), arrowprops=dict(arrowstyle="->", lw=2))
ax.annotate("", (7.2, 1.6), (6.5, 2), arrowprops=dict(arrowstyle="->", lw=2))
ax.set(xlim=(-0.5, 10), ylim=(-0.5, 3.5))
ax.axis("off")
show(fig, "Four experts, one used: the router gives each expert a probability, the "
          "likeliest computes, and its output is scaled by that probability.")

# %% [markdown]
# ## 6.1 What attention cannot do
#
# The output of attention is a weighted mean of value vectors. Given the weights, that is linear: sums and scalings, no products. Take two
# facts about a token, each +1 or -1, and ask for their product ("are they the same?"). What is the best that any linear map can do?

# %% id="moe-linear-fails"
pairs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
same = pairs[:, :1] * pairs[:, 1:]  # (4, 1): the product of the two facts
linear = torch.linalg.lstsq(pairs, same).solution  # the best linear map
answers = (pairs @ linear).flatten()
print("best linear answers:", answers.round(decimals=3).abs().tolist(), " wanted:",
      same.flatten().tolist())
assert torch.allclose(answers, torch.zeros(4), atol=1e-6)

# %% [markdown]
# It answers 0 every time: it learned nothing. A layer that works on one position needs something that is not linear.
#
# ## 6.2 SwiGLU
#
# The feed-forward layer of Llama, Qwen and MiniMind multiplies two projections of the same vector. One of them goes through **SiLU**
# first: $\text{silu}(z) = z \cdot \sigma(z)$, where $\sigma$ is the logistic function. It acts as a soft gate, near 0 for negative $z$
# and near $z$ for positive $z$.

# %% id="moe-silu"
z = torch.linspace(-6, 6, 200)
fig, ax = plt.subplots(figsize=(5, 2.6))
ax.plot(z, F.silu(z), label="silu(z) = z · σ(z)")
ax.plot(z, F.relu(z), label="relu(z) = max(z, 0)")
ax.set(xlabel="z", ylabel="output")
ax.legend()
show(fig, "SiLU follows ReLU far from zero and is smooth in between, with a dip to "
          "-0.28 near z = -1.3.")

# %% [markdown]
# Now the layer, for a vector $x$ of width C and three matrices (Shazeer 2020):
#
# $$\text{SwiGLU}(x) = W_\text{down}\,\big(\text{silu}(W_\text{gate}\,x) \odot W_\text{up}\,x\big)$$
#
# where $\odot$ multiplies number by number. Two hidden numbers are enough for the product, with weights chosen by hand: one of them opens its gate
# when both facts are +1, the other when both are -1.

# %% id="moe-swiglu-by-hand"
gate = torch.tensor([[4.0, 4], [-4, -4]])  # fires when both facts are +1, or both -1
up = torch.tensor([[1.0, 1], [-1, -1]])
hidden = F.silu(pairs @ gate.T) * (pairs @ up.T)  # (4, 2)
print(hidden)

# %% [markdown]
# Where the facts agree (rows 1 and 4) the two hidden numbers sum to 16, elsewhere to 0: a sum and a shift, which the layers after it can do, give
# the product. The class is the formula, and uses Hugging Face's names for the matrices.

# %% id="moe-swiglu-class"
#| export
class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)), x (..., C) -> (..., C).

    Shazeer 2020, arXiv:2002.05202. The parameter names are Hugging Face's.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

# %% [markdown]
# The same numbers come out when the class gets the weights from above:

# %% id="moe-swiglu-check"
layer = SwiGLU(2, 2)
with torch.no_grad():
    layer.gate_proj.weight.copy_(gate)
    layer.up_proj.weight.copy_(up)
    layer.down_proj.weight.copy_(torch.ones(2, 2))
assert torch.allclose(layer(pairs)[:, :1], hidden.sum(-1, keepdim=True), atol=1e-6)
layer(pairs)[:, 0].tolist()

# %% [markdown]
# **Exercise 6.1 (10 min, ★): `SwiGLU`** in [workbook 6](../exercises/06_moe.ipynb). Write the layer from the formula, without looking; the check tells apart the ways to put the gate in
# the wrong place.
#
# How large should the hidden width be? Three matrices of C × I are $3CI$ parameters. In the small model of this course (C = 160, I = 448, four
# heads of 40, two key/value heads) that is most of a layer:

# %% id="moe-share-of-layer"
C, I = 160, 448
feed_forward = 3 * C * I
attention = 2 * C * 4 * 40 + 2 * C * 2 * 40
assert feed_forward == sum(p.numel() for p in SwiGLU(C, I).parameters())
share = feed_forward / (feed_forward + attention)
print(f"feed-forward {feed_forward:,} and attention {attention:,}: {share:.0%} of a "
      "layer is feed-forward")

# %% [markdown]
# ## 6.3 Experts: more weights, the same work
#
# Three quarters of a layer are spent on every token, whatever the token is. The idea of a **mixture of experts** (Shazeer et al. 2017): keep E of these
# layers, and let each token pass through only k of them. The model knows more (E times the weights) and works as before (k times the products).

# %% id="moe-total-and-active"
for E, k in ((1, 1), (4, 1), (8, 2), (128, 8)):
    total, active = E * feed_forward, k * feed_forward
    print(f"{E:3} experts, {k} used: {total:>12,} parameters stored, {active:>9,} used "
          f"for a token ({active / total:.0%})")

# %% [markdown]
# What it costs: all experts must lie in memory, and someone must decide which expert gets which token.
#
# **Exercise 6.2 (10 min, ★): `widths`** in [workbook 6](../exercises/06_moe.ipynb). Three numbers on paper: the width that makes SwiGLU as large as the plain layer of 2017, and what a
# mixture stores and uses.
#
# ## 6.4 The router
#
# The decision is made by one small matrix with a row for each expert. Its products with the token are the **router logits**. A softmax makes them
# probabilities, and the k largest win. Take six tokens and four experts:

# %% id="moe-router-by-hand"
from minimind.data import set_seed

set_seed(6)
router_logits = torch.randn(6, 4) * 1.5  # six tokens, four experts
probs = router_logits.softmax(-1)  # (6, 4): each row sums to 1
chosen = probs.argmax(-1)  # (6,)
print(probs.round(decimals=2), chosen, sep="\n")

# %% [markdown]
# Six rows of four probabilities, and the number of the winner for each token. As a picture:

# %% id="moe-router-picture"
fig, ax = plt.subplots(figsize=(5, 2.7))
image = ax.imshow(probs.T, cmap="Greys", vmin=0, vmax=1)
ax.scatter(range(6), chosen, marker="*", s=120, color="#D55E00")
ax.set(xlabel="token", ylabel="expert", yticks=range(4))
ax.grid(False)
fig.colorbar(image, label="probability")
show(fig, "Probability of each expert for six tokens; the star marks the expert that "
          "top-1 routing takes. The load is uneven already.")

# %% [markdown]
# The winner's output is multiplied by its probability. This is not decoration: choosing is a step function without a gradient, so the
# probability in the product is the only way in which the loss can tell the router that a choice was good.
#
# With k > 1 the k probabilities can be rescaled to sum to 1 (`norm_topk_prob`). Remember this switch; it returns in section 6.11.

# %% id="moe-route"
#| export
def route(router_logits: Tensor, top_k: int,
          norm_topk_prob: bool = True) -> tuple[Tensor, Tensor]:
    """router_logits (N, E) -> weights (N, top_k), chosen experts (N, top_k).

    The softmax runs in float32. With norm_topk_prob the weights of a token sum to 1.
    """
    probs = router_logits.softmax(-1, dtype=torch.float32)  # (N, E)
    weights, chosen = probs.topk(top_k, dim=-1)  # (N, top_k) each
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen

# %% [markdown]
# It agrees with the six tokens above, and two experts for a token share a weight of 1:

# %% id="moe-route-check"
weights, top = route(router_logits, 1, norm_topk_prob=False)
assert top.flatten().equal(chosen) and torch.allclose(weights[:, 0],
                                                      probs.max(-1).values)
weights, top = route(router_logits, 2)
assert torch.allclose(weights.sum(-1), torch.ones(6))
print(top.tolist())

# %% [markdown]
# **Exercise 6.3 (10 min, ★): `route`** in [workbook 6](../exercises/06_moe.ipynb). Write it from the formula; the check compares with a count over tokens, in float32.
#
# **Try it.** Predict, then run: what changes if you add 10 to all logits of one token? And if you double them?
#
# ## 6.5 Dispatch: from tokens to experts and back
#
# First the version that cannot be wrong: run every expert on every token, and multiply by a weight that is zero where the expert was not chosen.
# It does E/k times too much work, and it is the reference for all that follows.

# %% id="moe-dense-reference"
def moe_dense(experts, tokens, weights, chosen):
    """Every expert on every token; (N, C) -> (N, C)."""
    full = torch.zeros(len(tokens), len(experts))  # (N, E): zero where not chosen
    full = full.scatter(1, chosen, weights)
    outputs = torch.stack([expert(tokens) for expert in experts], dim=1)  # (N, E, C)
    return (full.unsqueeze(-1) * outputs).sum(1)

# %% [markdown]
# The second version does no needless work, but loops over tokens in Python. Each turn multiplies one vector, and processors are poor at that:

# %% id="moe-token-loop"
def moe_token_loop(experts, tokens, weights, chosen):
    rows = []
    for token, ws, es in zip(tokens, weights, chosen.tolist()):
        rows.append(sum(w * experts[e](token) for w, e in zip(ws, es)))
    return torch.stack(rows)

# %% [markdown]
# The third version sorts. If all tokens of expert 0 stand first, then those of expert 1 and so on, each expert has one slice of consecutive rows and
# runs once. With six tokens:

# %% id="moe-sort-by-hand"
order = chosen.argsort(stable=True)  # token numbers, grouped by expert
load = chosen.bincount(minlength=4).tolist()  # how many tokens each expert has
print("expert of each token", chosen.tolist())
print("tokens in order     ", order.tolist(), " slices:", load)
assert chosen[order].tolist() == sorted(chosen.tolist()) and sum(load) == 6

# %% [markdown]
# With forty tokens the effect is easier to see:

# %% id="moe-sort-picture"
set_seed(1)
many = torch.randint(0, 4, (40,))
fig, axes = plt.subplots(2, 1, figsize=(7, 1.9), sharex=True)
for ax, row, title in zip(axes, (many, many.sort().values),
                          ("as the text comes", "sorted by expert")):
    ax.imshow(row[None], aspect="auto", cmap="cividis", vmin=0, vmax=3)
    for i, e in enumerate(row.tolist()):
        ax.text(i, 0, e, ha="center", va="center", size=7,
                color="white" if e < 2 else "black")
    ax.set(yticks=[], title=title)
    ax.grid(False)
axes[1].set_xlabel("row")
show(fig, "Forty tokens with the number of their expert: sorted, each expert has one "
          "block of rows and runs once.")

# %% [markdown]
# With k experts for a token there are N · k **visits**. Visit number j belongs to token j // k, so dividing the sorted visit numbers by k gives
# the token behind each row. At the end, `index_add` brings each result back to the row of its token and sums the k results of a token.

# %% id="moe-dispatch"
#| export
def dispatch(experts: Sequence[nn.Module], tokens: Tensor, weights: Tensor,
             chosen: Tensor) -> Tensor:
    """Run each expert once on the tokens that chose it.

    tokens (N, C), weights and chosen (N, k) -> (N, C). The N * k visits are sorted by
    expert, so that the rows of an expert are one slice.
    """
    visits = chosen.flatten()  # (N * k,)
    order = visits.argsort(stable=True)
    token_of = order // chosen.size(1)  # the token behind each sorted visit
    load = visits.bincount(minlength=len(experts)).tolist()
    # one (load, C) for each expert
    slices = tokens.index_select(0, token_of).split(load)
    y = torch.cat([expert(part) for expert, part in zip(experts, slices, strict=True)])
    y = y * weights.flatten().index_select(0, order).unsqueeze(-1)  # (N * k, C)
    return torch.zeros_like(tokens).index_add(0, token_of, y.to(tokens.dtype))

# %% [markdown]
# The layer is a router, experts and this function. It leaves the router logits of its last call in `router_logits`; the balance loss will need them.

# %% id="moe-class"
#| export
class MoE(nn.Module):
    """SwiGLUs of which each token uses num_experts_per_tok; (..., C) -> (..., C).

    After a forward pass router_logits (N, num_experts) holds the scores of its N
    tokens. Parameter names are those of Hugging Face's Qwen3-MoE files. Shazeer et al.
    2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        norm_topk_prob: bool = True,
    ):
        super().__init__()
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(f"num_experts_per_tok is {num_experts_per_tok}: it must "
                             f"be 1 to num_experts = {num_experts}")
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(hidden_size, moe_intermediate_size)
                                     for _ in range(num_experts))
        self.router_logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, C)
        self.router_logits = self.gate(tokens)  # (N, E)
        weights, chosen = route(self.router_logits, self.num_experts_per_tok,
                                self.norm_topk_prob)
        return dispatch(self.experts, tokens, weights.to(x.dtype), chosen).view_as(x)

    def __getstate__(self) -> dict:
        # router_logits belongs to one forward pass; a copy or a pickle of the layer starts without it.
        return self.__dict__ | {"router_logits": None}

# %% [markdown]
# Three versions, one function. All three must give the same values, and the same gradients for every weight:

# %% id="moe-three-agree"
set_seed(0)
moe = MoE(32, 48, num_experts=4, num_experts_per_tok=2)
tokens = torch.randn(50, 32)
weights, chosen = route(moe.gate(tokens), 2)
results = []
for version in (moe_dense, moe_token_loop, dispatch):
    y = version(moe.experts, tokens, weights, chosen)
    results.append([y.detach(),
                    *torch.autograd.grad(y.pow(2).sum(), list(moe.parameters()),
                                         retain_graph=True)])
for reference, loop, ours in zip(*results):
    torch.testing.assert_close(loop, reference, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)

# %% [markdown]
# **Exercise 6.4 (25 min, ★★★): `dispatch`** in [workbook 6](../exercises/06_moe.ipynb). Sort, or loop over the experts: the check counts rows and calls, and compares values and gradients
# with a loop over tokens.
#
# **Exercise 6.5 (15 min, ★★): `MoE`** in [workbook 6](../exercises/06_moe.ipynb). Write `forward`, for any number of dimensions.
#
# Which is the fastest? Guess the two factors before you run: sorted against the token loop, and sorted against dense with 8 experts and top-1.

# %% id="moe-speed"
import time


def milliseconds(function, repeats=5):
    function()
    times = []
    for _ in range(repeats):
        start_time = time.perf_counter()
        function()
        times.append(time.perf_counter() - start_time)
    return 1000 * min(times)

# %% [markdown]
# The sizes are those of the small model of this course; the last line is one expert on all tokens, which is all the arithmetic that top-1 needs:

# %% id="moe-speed-measure"
timed = MoE(160, 448, num_experts=8, num_experts_per_tok=1, norm_topk_prob=False)
tokens = torch.randn(chapter.size.timing_tokens, 160)
with torch.no_grad():
    weights, chosen = route(timed.gate(tokens), 1, False)
    versions = {"token loop": moe_token_loop, "dense": moe_dense, "sorted": dispatch}
    cost = {name: milliseconds(lambda: f(timed.experts, tokens, weights, chosen))
            for name, f in versions.items()}
    cost["one expert\n(no routing)"] = milliseconds(lambda: timed.experts[0](tokens))
check("experts/sorted_over_token_loop", cost["token loop"] / cost["sorted"])
check("experts/sorted_over_dense", cost["dense"] / cost["sorted"])
print("milliseconds:", {name.split("\n")[0]: round(value, 1)
                        for name, value in cost.items()})

# %% [markdown]
# The dense version computes eight times too much, the token loop pays for each call. Sorting pays for neither:

# %% id="moe-speed-picture"
fig, ax = plt.subplots(figsize=(6, 2.3))
ax.barh(list(cost), list(cost.values()), color="#0072B2")
count = chapter.size.timing_tokens
ax.set(xlabel=f"milliseconds for {count:,} tokens (logarithmic)", xscale="log")
ax.invert_yaxis()
show(fig, "Time of the three dispatches, 8 experts and top-1: sorting costs little "
          "more than one expert on all tokens.")

# %% [markdown]
# ## 6.6 Same as Hugging Face
#
# `transformers` has this layer in Qwen3-MoE. It stores the weights of all experts in two large tensors, with gate and up stacked; in checkpoint files they
# are separate, under the names that our class has. With the same weights the block must agree, and so must the gradients.

# %% id="moe-hugging-face"
import importlib.util

if importlib.util.find_spec("transformers"):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, load_balancing_loss_func

    sizes = dict(hidden_size=32, moe_intermediate_size=48, num_experts=4,
                 num_experts_per_tok=2)
    config = Qwen3MoeConfig(**sizes, norm_topk_prob=True)
    config._experts_implementation = "eager"  # their plain version, experts one by one
    theirs = Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        theirs.gate.weight.copy_(moe.gate.weight)
        gate_up = [torch.cat([e.gate_proj.weight, e.up_proj.weight])
                   for e in moe.experts]
        theirs.experts.gate_up_proj.copy_(torch.stack(gate_up))  # (E, 2 I, C)
        theirs.experts.down_proj.copy_(torch.stack([e.down_proj.weight
                                                    for e in moe.experts]))
else:
    theirs = None
    print("transformers is not installed: this comparison is left out")

# %% [markdown]
# Values and the router's gradient; the tests of this course compare the gradients of all experts too.

# %% id="moe-hugging-face-check"
if theirs is not None:
    x = torch.randn(2, 25, 32)
    ours_y, theirs_y = moe(x), theirs(x)
    torch.testing.assert_close(ours_y, theirs_y, atol=1e-5, rtol=1e-4)
    (ours_gradient,) = torch.autograd.grad(ours_y.pow(2).sum(), moe.gate.weight)
    (theirs_gradient,) = torch.autograd.grad(theirs_y.pow(2).sum(), theirs.gate.weight)
    torch.testing.assert_close(ours_gradient, theirs_gradient, atol=1e-4, rtol=1e-4)
    print("largest difference:", (ours_y - theirs_y).abs().max().item())

# %% [markdown]
# ## 6.7 The balance loss
#
# Nothing so far makes the router use all experts. The usual remedy (Fedus et al. 2021) is a second loss. For each expert i take $f_i$, the share of tokens that
# chose it, and $P_i$, the mean of its probability over all tokens:
#
# $$L_\text{balance} = E \sum_{i=1}^{E} f_i\,P_i$$
#
# $f_i$ comes from counting and has no gradient; $P_i$ has one. So an expert with a large $f_i$ gets its probability pushed down hard.
# Two extreme cases by hand, with E = 4 and k = 1:

# %% id="moe-balance-by-hand"
even = torch.full((4,), 0.25)
one = torch.tensor([1.0, 0, 0, 0])
print("all even:", (4 * (even * even).sum()).item(), "  one expert takes all:",
      (4 * (one * one).sum()).item())

# %% [markdown]
# Between them the loss climbs from 1 to E. As a function of a tensor of logits, or of one for each layer:

# %% id="moe-balance-loss"
#| export
def load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor],
    num_experts: int,
    top_k: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """E * sum of (share of visits) * (mean probability); top_k when perfectly even.

    router_logits is one (N, E) tensor or one for each layer; all layers are pooled, as
    Hugging Face does. attention_mask (B, T), 1 = real, leaves padding out. Fedus et al.
    2021, equations 4-6.
    """
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    logits = torch.cat(layers)  # (L * N, E)
    probs = logits.softmax(-1, dtype=torch.float32)
    chosen = probs.topk(top_k, dim=-1).indices  # (L * N, top_k)
    real = torch.ones_like(probs[:, 0])
    if attention_mask is not None:
        real = attention_mask.flatten().to(probs.dtype).repeat(len(layers))
    visits = torch.zeros_like(probs[0]).index_add(0, chosen.flatten(),
                                                  real.repeat_interleave(top_k))
    return num_experts * ((visits / real.sum()) * (real @ probs / real.sum())).sum()

# %% [markdown]
# The check: near 1 for random logits, near E when one expert wins everywhere, and equal to Hugging Face's function.

# %% id="moe-balance-check"
random_logits = torch.randn(10_000, 4)
lopsided = random_logits + torch.tensor([20.0, 0, 0, 0])
assert abs(load_balancing_loss(random_logits, 4, 1) - 1) < 0.01
assert abs(load_balancing_loss(lopsided, 4, 1) - 4) < 0.01
if theirs is not None:
    layers = (torch.randn(50, 4), torch.randn(50, 4))
    torch.testing.assert_close(load_balancing_loss(layers, 4, 2),
                               load_balancing_loss_func(layers, 4, 2))

# %% [markdown]
# How it rises in between, when one expert is favoured more and more:

# %% id="moe-balance-picture"
pushes = torch.linspace(0, 8, 40)
favour = torch.tensor([1.0, 0, 0, 0])
values = [load_balancing_loss(random_logits + push * favour, 4, 1).item()
          for push in pushes]
shares = [(random_logits + push * favour).argmax(-1).eq(0).float().mean().item()
          for push in pushes]
fig, ax = plt.subplots(figsize=(5, 2.6))
ax.plot(shares, values)
ax.axhline(1, color="grey", ls=":", lw=1)
ax.set(xlabel="share of tokens that go to expert 0", ylabel="balance loss")
show(fig, "The balance loss of four experts: 1 when each has a quarter of the tokens, "
          "4 when one expert has them all.")

# %% [markdown]
# **Exercise 6.6 (20 min, ★★): `load_balancing_loss`** in [workbook 6](../exercises/06_moe.ipynb). Several layers, and padding that counts nowhere.
#
# ## 6.8 A run in which experts die
#
# Now a model small enough to train in seconds. It reads words, not characters, so that you can later see which words go where:

# %% id="moe-words"
import re
from collections import Counter
from itertools import islice

from minimind.data import read_texts

texts = list(islice(read_texts(chapter.read("data") / "pretrain" / "train.jsonl.gz"),
                    2000))
words = [word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)]
vocabulary = ["(rare)"] + [word for word, _ in Counter(words).most_common(511)]
number = {word: i for i, word in enumerate(vocabulary)}
# all texts, one after the other
stream = torch.tensor([number.get(word, 0) for word in words])
print(f"{len(stream):,} words; the commonest:", vocabulary[1:8])

# %% [markdown]
# The model guesses the next word from the last two. Their vectors are added, and the feed-forward layer under test works on the sum. One more thing is
# added: a vector that is the same for every word. Hidden vectors inside real transformers have such a large common part (Ethayarajh 2019), and
# it matters here, because what all tokens share makes them all like the same expert.

# %% id="moe-word-model"
class WordModel(nn.Module):
    """Two words -> logits of the next word. feed_forward: any module (N, C) -> (N, C)."""

    def __init__(self, feed_forward, C=64, V=512):
        super().__init__()
        self.now, self.before = nn.Embedding(V, C), nn.Embedding(V, C)
        self.common = nn.Parameter(torch.randn(C))
        self.feed_forward = feed_forward
        self.out = nn.Linear(C, V, bias=False)

    def forward(self, now, before):
        x = F.rms_norm(self.now(now) + self.before(before) + self.common,
                       (64,))  # (N, C), scaled to size 1
        return self.out(F.rms_norm(x + self.feed_forward(x), (64,)))  # (N, V)

# %% [markdown]
# Training is the loop of chapter 3, with the balance loss added times a coefficient. It also writes down the load of each expert at each step.

# %% id="moe-word-training"
def train_words(make, coefficient=0.0, seed=0, batch=512):
    """Train a WordModel; returns model, losses and loads (steps, E)."""
    set_seed(seed)
    model = WordModel(make())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, loads = [], []
    for _ in range(chapter.steps(chapter.size.steps)):
        i = torch.randint(1, len(stream) - 1, (batch,))
        loss = F.cross_entropy(model(stream[i], stream[i - 1]), stream[i + 1])
        losses.append(loss.item())
        if isinstance(model.feed_forward, MoE):
            logits = model.feed_forward.router_logits
            E = logits.size(-1)
            loads.append(logits.argmax(-1).bincount(minlength=E) / batch)
            loss = loss + coefficient * load_balancing_loss(logits, E, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, torch.tensor(losses), torch.stack(loads) if loads else None

# %% [markdown]
# Eight experts, top-1, once without and once with the balance loss. How many of the eight will still be in use at the end without it?

# %% id="moe-dying-run"
def eight_experts():
    return MoE(64, 32, num_experts=8, num_experts_per_tok=1, norm_topk_prob=False)


runs = {coefficient: train_words(eight_experts, coefficient)
        for coefficient in (0.0, 0.1)}
last = {c: loads[-50:].mean(0) for c, (_, _, loads) in runs.items()}
check("experts/dead_without_balance", (last[0.0] < 0.01).sum())
check("experts/dead_with_balance", (last[0.1] < 0.01).sum())
for c, load in last.items():
    print(f"coefficient {c}: load", [round(v, 2) for v in load.tolist()])

# %% [markdown]
# An expert with less than 1% of the tokens in the last 50 steps counts as dead. The load over time:

# %% id="moe-dying-picture"
colours = plt.get_cmap("cividis")(torch.linspace(0, 1, 8).numpy())
fig, axes = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
for ax, (c, (_, _, loads)) in zip(axes, runs.items()):
    smooth = loads.unfold(0, min(10, len(loads)), 1).mean(-1)  # mean over 10 steps
    ax.stackplot(range(len(smooth)), smooth.T, colors=colours, edgecolor="white",
                 lw=0.4)
    ax.set(xlabel="step", title=f"balance coefficient {c}", ylim=(0, 1))
    ax.grid(False)
axes[0].set_ylabel("share of tokens")
show(fig, "Expert load over training, one band for each expert: without the balance "
          "loss a few experts take everything, with it the bands stay alike.")

# %% [markdown]
# It begins with luck: the common part of all vectors lies a little closer to one expert's row in the router. That expert gets most tokens, so it alone gets gradients
# and improves; being useful, its probability rises; so it gets more tokens. An expert without tokens gets no gradient at all and cannot come back. It is
# **dead**, and its weights are paid for in memory and never used.
#
# **Try it.** Run coefficients 0, 0.001, 0.01, 0.1 and 1, and draw the dead experts and the final loss against the coefficient. Then take `common` out of the model: do experts still die?
#
# **Exercise 6.8 (15 min, ★★): `biased_route`** in [workbook 6](../exercises/06_moe.ipynb). Balance without a loss, by a bias that only chooses (Wang et al. 2024).
#
# **Exercise 6.9 (20 min, ★★): `overload`** in [workbook 6](../exercises/06_moe.ipynb). Predict how fast that bias may move, then measure it.
#
# ## 6.9 What did the router learn?
#
# Each word goes to some expert. The share of a word's visits that go to each expert, for the commonest words, in the balanced run:

# %% id="moe-what-it-learned"
model = runs[0.1][0]
with torch.no_grad():
    model(stream[1:], stream[:-1])
choice = model.feed_forward.router_logits.argmax(-1)  # (words - 1,): the expert of each position
table = torch.zeros(512, 8).index_put_((stream[1:], choice), torch.ones(len(choice)),
                                       accumulate=True)
table = table / table.sum(1, keepdim=True).clamp(min=1)  # (512, 8): each row sums to 1
common = table[1:33]
rows = common.argmax(1).argsort(stable=True)

# %% [markdown]
# Words are grouped by their favourite expert, so a router that sorts by word shows as a staircase:

# %% id="moe-what-it-learned-picture"
fig, ax = plt.subplots(figsize=(7, 2.9))
image = ax.imshow(common[rows].T, cmap="Greys", vmin=0, vmax=1, aspect="auto")
ax.set_xticks(range(32), [vocabulary[1 + i] for i in rows.tolist()], rotation=90)
ax.set(ylabel="expert", xlabel="word that was read last")
ax.grid(False)
fig.colorbar(image, label="share of visits")
show(fig, "Where the 32 commonest words go: most words have one or two experts of "
          "their own, whatever stood before them.")

# %% [markdown]
# The router sorts by word much more than by topic. Large models show the same (Jiang et al. 2024): experts follow the surface of the text, and "an expert for
# biology" is a wish. Measured as one number: how often does a word go to its favourite expert? Chance is 1/8 or a little more.

# %% id="moe-favourite-share"
counts = stream[1:].bincount(minlength=512).float()
favourite = (table.max(1).values * counts).sum() / counts.sum()
favourite = check("experts/word_goes_to_favourite", favourite)

# %% [markdown]
# ## 6.10 Is it worth it?
#
# The fair comparison is at **equal active size**: a dense layer with the width of one expert does the same work for a token. A dense layer of the width of all eight is the other
# end: the same memory, eight times the work. Three seeds each, because differences are small:

# %% id="moe-equal-active"
def final_losses(make, coefficient=0.0):
    return torch.stack([train_words(make, coefficient, seed)[1][-50:].mean()
                        for seed in chapter.size.seeds])


compared = {
    "dense, as wide as one expert": final_losses(lambda: SwiGLU(64, 32)),
    "8 experts, top-1": final_losses(eight_experts, 0.1),
    "dense, as wide as all eight": final_losses(lambda: SwiGLU(64, 256)),
}
for name, losses in compared.items():
    print(f"{name:30} {losses.mean():.3f}  (seeds: "
          f"{[round(v, 3) for v in losses.tolist()]})")
gain = compared["dense, as wide as one expert"] - compared["8 experts, top-1"]
gain = check("experts/gain_nats_per_word", gain.mean())

# %% [markdown]
# One dot for each seed, so that you see whether the difference is larger than the luck of a seed:

# %% id="moe-equal-active-picture"
fig, ax = plt.subplots(figsize=(6, 2.2))
for y, (name, losses) in enumerate(compared.items()):
    ax.plot(losses, [y] * len(losses), "o", color="#0072B2", alpha=0.6)
    ax.plot(losses.mean(), y, "|", color="#D55E00", ms=22, mew=2)
ax.set_yticks(range(3), list(compared))
ax.set(xlabel="loss of the last 50 steps (nats per word)", ylim=(2.5, -0.5))
show(fig, "Final loss by seed (dots) and mean (bar): experts beat the dense layer of "
          "equal work and lose to the dense layer of equal memory.")

# %% [markdown]
# Experts buy quality with memory instead of time. When memory is what you lack, a dense model of the same number of parameters is better. Chapter 9 repeats this with the whole
# model on real token counts.
#
# **Try it.** DeepSeekMoE adds a **shared expert** that every token uses, besides the chosen one (Dai et al. 2024). Build it as a class around `MoE`. Does it change how many experts die?
#
# ## 6.11 Where it breaks
#
# **The router that learns nothing.** Take top-1 and `norm_topk_prob=True`. The single weight is divided by itself: it is always 1. What is the gradient of the router?

# %% id="moe-norm-trap"
gradients = {}
for norm in (True, False):
    set_seed(0)
    trap = MoE(32, 48, num_experts=4, num_experts_per_tok=1, norm_topk_prob=norm)
    trap(torch.randn(100, 32)).pow(2).sum().backward()
    gradients[norm] = trap.gate.weight.grad.abs().max().item()
print({norm: f"{size:.1e}" for norm, size in gradients.items()})
assert gradients[True] < 1e-4 < gradients[False]

# %% [markdown]
# Zero, up to rounding. Only the balance loss moves such a router, and that loss does not know which expert is good for what. So our presets with top-1 set `norm_topk_prob=False`. With the switch
# on, nothing fails and the loss falls too. In the word model, after full training, it costs this much:

# %% id="moe-norm-trap-cost"
normed = final_losses(lambda: MoE(64, 32, 8, 1, norm_topk_prob=True), 0.1)
print(f"normalised {normed.mean():.3f}, not normalised "
      f"{compared['8 experts, top-1'].mean():.3f}")
cost_of_norm = check("experts/cost_of_norm_at_top1",
                     normed.mean() - compared["8 experts, top-1"].mean())

# %% [markdown]
# **Results in sorted order.** Forget to bring the rows back, and every shape is right while almost every token gets the output of another token:

# %% id="moe-unsorted-bug"
def dispatch_wrong(experts, tokens, weights, chosen):
    order = chosen.flatten().argsort(stable=True)
    load = chosen.flatten().bincount(minlength=len(experts)).tolist()
    parts = [expert(part) for expert, part in zip(experts, tokens[order].split(load))]
    return torch.cat(parts) * weights[order]  # still in sorted order


with torch.no_grad():
    wrong, right = (f(timed.experts, tokens, weights, chosen)
                    for f in (dispatch_wrong, moe_dense))
misplaced = (~torch.isclose(wrong, right, atol=1e-5).all(-1)).float().mean()
print(f"shape {tuple(wrong.shape)} is right, {misplaced:.0%} of tokens are wrong")
assert misplaced > 0.5

# %% [markdown]
# No error appears, and every check of shapes passes. The comparison with the dense version finds it at once: keep a slow version beside every fast one.
#
# **Exercise 6.7 (15 min, ★★): `by_expert`** in [workbook 6](../exercises/06_moe.ipynb). Three bugs in a dispatch, with three symptoms: find and repair them.
#
# ## Recap
#
# - SwiGLU is `down(silu(gate(x)) * up(x))`, $3CI$ parameters, about three quarters of a layer.
# - A mixture of experts stores E such layers and uses k of them for a token; the router's softmax chooses and weighs.
# - Sorting visits by expert gives each expert one slice, and `index_add` brings the results home.
# - Without a balance loss the early winner takes all and the others die; with it the load is even.
# - At equal work experts beat dense, at equal memory they lose.
#
# **Words**: feed-forward layer, SiLU, gate, expert, router, router logits, top-k, load, dispatch, balance loss, dead expert, active parameters.
#
# **Sources**: Shazeer 2020, *GLU Variants Improve Transformer*, arXiv:2002.05202. Shazeer et al. 2017, *Outrageously Large Neural Networks*, arXiv:1701.06538. Fedus, Zoph and
# Shazeer 2021, *Switch Transformers*, arXiv:2101.03961. Jiang et al. 2024, *Mixtral of Experts*, arXiv:2401.04088. Dai et al. 2024, *DeepSeekMoE*, arXiv:2401.06066. Ethayarajh 2019, *How Contextual are
# Contextualized Word Representations?*, arXiv:1909.00512. Wang et al. 2024, *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*, arXiv:2408.15664. Next: all parts of one model, in chapter 7.
#
# **Exercises:** 6.1 to 6.9, in place above, with checks in [workbook 6](../exercises/06_moe.ipynb).
