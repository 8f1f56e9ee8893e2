# %% [markdown]
# # Workbook 6. Mixtures of experts
#
# You write the module `minimind.moe` yourself: the feed-forward layer, the router, the
# dispatch and the balance loss. Then you repair somebody else's dispatch, balance the
# experts without a loss, and measure how fast that may go. About two hours; stop
# anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. Hints open one at a time. `solution("route")` shows that
# one solution and no other.
#
# Letters as in the chapter: N tokens, C model width, I width of an expert, E experts,
# k experts for a token.

# %% id="setup"
# (filled in by the build)

# %% id="w06-imports"
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %% [markdown] exercise="SwiGLU"
# ## 1. The feed-forward layer
#
# Three matrices without bias, under Hugging Face's names `gate_proj`, `up_proj` and
# `down_proj`. The first two lead from C to I, the last one back:
# $$\text{SwiGLU}(x) = W_\text{down}\,
# \big(\text{silu}(W_\text{gate}\,x) \odot W_\text{up}\,x\big)$$
# (Chapter section 6.2.)
#
# <details><summary>Hint 1: the parts</summary>
#
# `nn.Linear(inputs, outputs, bias=False)` holds a matrix and multiplies by it; the
# function `F.silu` is ready.
#
# </details>
# <details><summary>Hint 2: what goes through silu?</summary>
#
# Only the gate. What it lets through is the other projection, number by number.
#
# </details>

# %% id="w06-swiglu" exercise="SwiGLU" points=2 minutes=10 difficulty=1 kind="rebuild"
class SwiGLU(nn.Module):
    """Gated feed-forward layer, x (..., C) -> (..., C); Shazeer 2020, arXiv:2002.05202.

    Its weights are gate_proj.weight, up_proj.weight and down_proj.weight.
    """

    def __init__(self, C: int, I: int):
        super().__init__()
        ### BEGIN SOLUTION
        self.gate_proj = nn.Linear(C, I, bias=False)
        self.up_proj = nn.Linear(C, I, bias=False)
        self.down_proj = nn.Linear(I, C, bias=False)
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        ### END SOLUTION

# %% id="w06-swiglu-check"
check("SwiGLU")

# %% [markdown] exercise="widths"
# ## 2. Three numbers on paper
#
# 1. The plain layer of 2017 has two matrices, C × 4C and 4C × C. Which I gives SwiGLU
#    the same number of weights for C = 512? Round up to a multiple of 64.
# 2. A layer with C = 160, I = 448, eight experts and a router without bias: how many
#    weights must lie in memory?
# 3. With top-2, how many of them does one token use, the router among them?
#
# <details><summary>Hint 1</summary>
#
# The plain layer has $8C^2$ weights, SwiGLU has $3CI$.
#
# </details>
# <details><summary>Hint 2: the router</summary>
#
# It has one row of C numbers for each expert, and every token is compared with all of
# them.
#
# </details>

# %% id="w06-widths" exercise="widths" points=2 minutes=10 difficulty=1 kind="beyond"
### BEGIN SOLUTION
same_width = 1408  # 8 * 512 / 3 is 1365.3
stored = 8 * 3 * 160 * 448 + 8 * 160
used = 2 * 3 * 160 * 448 + 8 * 160
### END SOLUTION

# %% id="w06-widths-check"
check("widths")

# %% [markdown] exercise="route"
# ## 3. Choose experts
#
# The router's logits $z$ become probabilities, and the k largest of a token win:
# $$p = \operatorname{softmax}(z), \qquad
# w_i = p_i \;\text{ or }\; w_i = \frac{p_i}{\sum_{j\,\text{chosen}} p_j}$$
# The second form, whose weights sum to one, is that of `norm_topk_prob=True`. Compute
# in float32 even where the logits are shorter numbers. (Section 6.4.)
#
# <details><summary>Hint 1: a tool</summary>
#
# `topk` returns two things: the largest values along a dimension, and where they stood.
#
# </details>
# <details><summary>Hint 2: float32</summary>
#
# `softmax` has an argument `dtype`: what it is given is converted before it computes.
#
# </details>

# %% id="w06-route" exercise="route" points=3 minutes=10 difficulty=1 kind="rebuild"
def route(router_logits: Tensor, top_k: int,
          norm_topk_prob: bool = True) -> tuple[Tensor, Tensor]:
    """router_logits (N, E) -> weights (N, k) in float32, chosen experts (N, k)."""
    ### BEGIN SOLUTION
    probs = router_logits.softmax(-1, dtype=torch.float32)  # (N, E)
    weights, chosen = probs.topk(top_k, dim=-1)  # (N, k) each
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen
    ### END SOLUTION

# %% id="w06-route-check"
check("route")

# %% [markdown] exercise="dispatch"
# ## 4. Bring tokens to experts and back
#
# With weights $w$ and chosen experts $e$ of each token $n$,
# $$y_n = \sum_{j=1}^{k} w_{nj} \cdot \text{expert}_{e_{nj}}(x_n)$$
# Run each expert **once**, on all of its tokens and on no others. The check counts:
# neither a loop over tokens nor every expert on every token passes. An expert may have
# no token at all. (Section 6.5.)
#
# <details><summary>Hint 1: two ways</summary>
#
# Sort the N · k visits by expert, so that each expert has one slice of rows; `bincount`
# gives the lengths of the slices. Or go through the experts, and find the visits of
# each with `nonzero`.
#
# </details>
# <details><summary>Hint 2: whose row is it?</summary>
#
# `chosen.flatten()` lists the k visits of token 0, then those of token 1. So visit
# number j belongs to token j // k. `argsort` gives numbers of visits.
#
# </details>
# <details><summary>Hint 3: the way back</summary>
#
# `index_add(0, rows, values)` adds a value to each of these rows, also where a row
# comes twice. The weights have to stand in the same order as the values.
#
# </details>

# %% id="w06-dispatch" exercise="dispatch" points=5 minutes=25 difficulty=3 kind="rebuild"
def dispatch(experts: Sequence[nn.Module], tokens: Tensor, weights: Tensor,
             chosen: Tensor) -> Tensor:
    """Run each expert once on the tokens that chose it.

    tokens (N, C), weights and chosen (N, k) -> (N, C), in the type of tokens.
    """
    ### BEGIN SOLUTION
    visits = chosen.flatten()  # (N * k,)
    order = visits.argsort()
    rows = order // chosen.size(1)  # the token behind each sorted visit
    load = visits.bincount(minlength=len(experts)).tolist()
    slices = tokens[rows].split(load)  # one (load, C) for each expert
    y = torch.cat([expert(part) for expert, part in zip(experts, slices)])
    y = y * weights.flatten()[order].unsqueeze(-1)  # (N * k, C)
    return torch.zeros_like(tokens).index_add(0, rows, y.to(tokens.dtype))
    ### END SOLUTION

# %% id="w06-dispatch-check"
check("dispatch")

# %% [markdown] exercise="MoE"
# ## 5. The layer
#
# The router `self.gate` and the list `self.experts` are there; their names are those
# of checkpoint files. Write `forward`: make one row of each token, whatever stands
# before the last dimension; keep the logits in `self.router_logits`, because the
# balance loss will train the router through them; route, dispatch, and give the result
# the shape of x. (Section 6.5.)
#
# <details><summary>Hint 1: the shape</summary>
#
# `flatten(0, -2)` joins all dimensions but the last; `view_as` gives the shape back.
#
# </details>
# <details><summary>Hint 2: what to keep</summary>
#
# The logits themselves, before the softmax and with their gradient.
#
# </details>

# %% id="w06-moe" exercise="MoE" points=3 minutes=15 difficulty=2 kind="rebuild"
class MoE(nn.Module):
    """E SwiGLUs of which each token uses k, x (..., C) -> (..., C).

    After a call, router_logits (N, E) holds the scores of its N tokens. Shazeer et al.
    2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961.
    """

    def __init__(self, C: int, I: int, num_experts: int,
                 num_experts_per_tok: int, norm_topk_prob: bool = True):
        super().__init__()
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(f"num_experts_per_tok is {num_experts_per_tok}: it must "
                             f"be 1 to num_experts = {num_experts}")
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.gate = nn.Linear(C, num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(C, I)
                                     for _ in range(num_experts))
        self.router_logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        tokens = x.flatten(0, -2)  # (N, C)
        self.router_logits = self.gate(tokens)  # (N, E)
        weights, chosen = route(self.router_logits, self.num_experts_per_tok,
                                self.norm_topk_prob)
        return dispatch(self.experts, tokens, weights, chosen).view_as(x)
        ### END SOLUTION

    def __getstate__(self) -> dict:
        # a copy or a pickle of the layer starts without the logits of one call
        return self.__dict__ | {"router_logits": None}

# %% id="w06-moe-check"
check("MoE")

# %% [markdown] exercise="load_balancing_loss"
# ## 6. The balance loss
#
# For each expert $i$: $f_i$ is how many visits it got, over the number of tokens, and
# $P_i$ is the mean of its probability over all tokens (Fedus et al. 2021):
# $$L = E \sum_{i=1}^{E} f_i\,P_i$$
# A perfectly even router has $L = k$. Three promises: the logits of several layers
# come as a list and count as one long batch; `attention_mask` (B, T) has a 0 where a
# token is padding, and such a token counts nowhere, in no layer; the softmax is in
# float32. Which of $f$ and $P$ has a gradient? (Section 6.7.)
#
# <details><summary>Hint 1: one layer, no mask</summary>
#
# `topk` gives the visits, `bincount` counts them. $P$ is a mean over rows.
#
# </details>
# <details><summary>Hint 2: with the mask</summary>
#
# Give each token a number, 1 or 0. $P$ is the sum of rows times these numbers, over the
# sum of the numbers. For $f$, each of a token's k visits counts as much as its token:
# `bincount` takes `weights`, and `index_add` can do it too.
#
# </details>
# <details><summary>Hint 3: several layers</summary>
#
# `torch.cat` puts layer below layer, so the tokens of the mask come again for each
# layer: `repeat`, not `repeat_interleave`.
#
# </details>

# %% id="w06-load-balancing-loss" exercise="load_balancing_loss" points=4 minutes=20 difficulty=2 kind="rebuild"
def load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor], num_experts: int, top_k: int,
    attention_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """E times the sum of (visits for each token) * (mean probability), a scalar.

    router_logits is one (N, E) tensor or a list with one for each layer; attention_mask
    is (B, T) with N = B * T, and 1 means a real token.
    """
    ### BEGIN SOLUTION
    layers = [router_logits] if isinstance(router_logits, Tensor) else router_logits
    probs = torch.cat(list(layers)).softmax(-1, dtype=torch.float32)  # (L * N, E)
    real = torch.ones(len(probs), device=probs.device)
    if attention_mask is not None:
        real = attention_mask.flatten().to(probs.dtype).repeat(len(layers))
    chosen = probs.topk(top_k, dim=-1).indices  # (L * N, k)
    visits = torch.zeros_like(probs).scatter(1, chosen, 1.0)
    f, P = real @ visits / real.sum(), real @ probs / real.sum()  # (E,) each
    return num_experts * (f * P).sum()
    ### END SOLUTION

# %% id="w06-load-balancing-loss-check"
check("load_balancing_loss")

# %% [markdown] exercise="by_expert"
# ## 7. Three bugs
#
# A colleague loops over the experts. The first test, k = 1 with all experts in use,
# passed. There are three bugs, each in one line, with three symptoms: one shows only
# for **k > 1**, one only when **an expert has no token**, and one **only in the
# gradients**. Find them and repair them in place.
#
# <details><summary>Hint 1: k = 2</summary>
#
# A token has two experts. The row of `y` is written twice: what is left of the first?
#
# </details>
# <details><summary>Hint 2: no token</summary>
#
# Which experts come after an expert without tokens?
#
# </details>
# <details><summary>Hint 3: gradients</summary>
#
# Ask for the gradient of the sum of the result with respect to `tokens`, `weights` and
# the experts. Which of them gets none?
#
# </details>

# %% id="w06-by-expert" exercise="by_expert" points=3 minutes=15 difficulty=2 kind="beyond"
def by_expert(experts, tokens, weights, chosen):
    """The task of `dispatch`: tokens (N, C), weights and chosen (N, k) -> (N, C)."""
    y = torch.zeros_like(tokens)
    for e, expert in enumerate(experts):
        rows, place = (chosen == e).nonzero(as_tuple=True)  # tokens, and which choice
        if len(rows) == 0:
            ### BEGIN SOLUTION
            continue
            ### END SOLUTION
            ### BEGIN STUB
            # break
            ### END STUB
        ### BEGIN SOLUTION
        share = weights[rows, place]
        y[rows] += share.unsqueeze(-1) * expert(tokens[rows])
        ### END SOLUTION
        ### BEGIN STUB
        # share = weights.data[rows, place]
        # y[rows] = share.unsqueeze(-1) * expert(tokens[rows])
        ### END STUB
    return y

# %% id="w06-by-expert-check"
check("by_expert")
### BEGIN HIDDEN TESTS
torch.manual_seed(61)
hidden_experts = [nn.Linear(5, 5) for _ in range(6)]
hidden_tokens, hidden_logits = torch.randn(9, 5), torch.randn(9, 6)
hidden_logits[:, [1, 4]] -= 50  # nobody chooses these two
hidden_weights, hidden_chosen = hidden_logits.softmax(-1).topk(3)
hidden_wanted = torch.stack([
    sum(w * hidden_experts[e](t) for w, e in zip(ws, es))
    for t, ws, es in zip(hidden_tokens, hidden_weights, hidden_chosen.tolist())])
hidden_got = by_expert(hidden_experts, hidden_tokens, hidden_weights, hidden_chosen)
assert torch.allclose(hidden_got, hidden_wanted, atol=1e-4)
### END HIDDEN TESTS

# %% [markdown] exercise="biased_route"
# ## 8. Balance without a loss
#
# The balance loss pulls the router away from what is good for the text. Wang et al.
# 2024 (arXiv:2408.15664) balance without a gradient; DeepSeek-V3 does the same. Each
# expert has a **bias** $b_i$ that counts when experts are chosen, and only then:
# $$\text{chosen}: \text{the } k \text{ largest of } p_i + b_i, \qquad w_i = p_i$$
# After each batch the bias of a crowded expert goes down by a fixed step $u$, the
# bias of the others up:
# $$b_i \leftarrow b_i + u \cdot \operatorname{sign}(\bar c - c_i)$$
# where $c_i$ counts the visits of expert $i$, and $\bar c$ is the mean of these counts.
# The probabilities are those of exercise 3; the weights are not made to sum to one.
#
# <details><summary>Hint 1: two sets of numbers</summary>
#
# Take `topk` of one tensor for the places, and `gather` the weights from another.
#
# </details>
# <details><summary>Hint 2: the counts</summary>
#
# An expert that nobody chose has the count 0, and must be in the mean. Make a new
# tensor for the new bias.
#
# </details>

# %% id="w06-biased-route" exercise="biased_route" points=3 minutes=15 difficulty=2 kind="beyond"
def biased_route(router_logits: Tensor, bias: Tensor,
                 top_k: int) -> tuple[Tensor, Tensor]:
    """router_logits (N, E), bias (E,) -> weights (N, k), chosen experts (N, k)."""
    ### BEGIN SOLUTION
    probs = router_logits.softmax(-1, dtype=torch.float32)
    chosen = (probs + bias).topk(top_k, dim=-1).indices
    return probs.gather(1, chosen), chosen
    ### END SOLUTION

def updated_bias(bias: Tensor, chosen: Tensor, speed: float) -> Tensor:
    """The bias (E,) for the next batch, after the choices (N, k) of this one."""
    ### BEGIN SOLUTION
    count = chosen.flatten().bincount(minlength=len(bias)).float()
    return bias + speed * (count.mean() - count).sign()
    ### END SOLUTION

# %% id="w06-biased-route-check"
check("biased_route")

# %% [markdown] exercise="overload"
# ## 9. An experiment: how fast may the bias move?
#
# `lopsided` has the logits of 800 tokens for eight experts, and expert 0 is everybody's
# favourite: at first it gets 4.6 times its fair share. Let the bias begin at 0 and
# follow the rule 100 times, always on these logits, with top-1. **Predict first:** with
# which of the speeds 0.1, 0.01 and 0.001 is the load the most even at the end? Write it
# into `predicted_speed`.
#
# Then measure. Write `overload(router_logits, speed, updates)`: after so many updates,
# choose once more and return the largest count over the mean count, as a float. Fill
# the dict `measured` for the three speeds with 100 updates, and correct your prediction
# if it was wrong.
#
# <details><summary>Hint 1: the loop</summary>
#
# Choose, update, choose, update: it ends with a choice, by the last bias. With
# `updates=0` the bias is zero.
#
# </details>
# <details><summary>Hint 2: why can a speed be too high?</summary>
#
# Each step has the same size, however small the imbalance. Compare 0.1 with the
# distance between a token's best two probabilities.
#
# </details>

# %% id="w06-overload" exercise="overload" points=4 minutes=20 difficulty=2 kind="beyond"
draw = torch.Generator().manual_seed(6)
lopsided = torch.randn(800, 8, generator=draw)
lopsided = lopsided + torch.tensor([2.0, 1, 1, 0, 0, 0, -1, -2])

### BEGIN SOLUTION
predicted_speed = 0.01
### END SOLUTION

def overload(router_logits: Tensor, speed: float, updates: int) -> float:
    """Largest over mean count of the experts after `updates` updates, top-1."""
    ### BEGIN SOLUTION
    bias = torch.zeros(router_logits.size(1))
    for _ in range(updates):
        _, chosen = biased_route(router_logits, bias, 1)
        bias = updated_bias(bias, chosen, speed)
    _, chosen = biased_route(router_logits, bias, 1)
    count = chosen.flatten().bincount(minlength=len(bias)).float()
    return (count.max() / count.mean()).item()
    ### END SOLUTION

### BEGIN SOLUTION
measured = {speed: overload(lopsided, speed, 100) for speed in (0.1, 0.01, 0.001)}
### END SOLUTION

# %% id="w06-overload-check"
check("overload")

# %% [markdown]
# What you measured, update by update. The fast bias overshoots and jumps back, for
# ever; the slow one is on its way.

# %% id="w06-overload-try"
for speed in (0.1, 0.01, 0.001):
    path = [overload(lopsided, speed, updates) for updates in range(0, 121, 20)]
    print(f"speed {speed:<5}:", "  ".join(f"{value:.2f}" for value in path))

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves what passes of exercises 1 and 3 to 6 to `student/moe.py`. With
# `MINIMIND_STUDENT=student` before a command, the course uses it: your own experts
# are in the models of chapters 7 and 9.

# %% id="w06-keep"
keep()
