# %% [markdown]
# # Workbook 4. Attention
#
# You write the module `minimind.attention` yourself, from stubs, and then go beyond
# it: find two bugs, write two masks from the literature, and measure how far a model
# with a short window can look back. About two hours; stop anywhere.
#
# Each exercise says what it is worth, how long it takes, and how hard it is (one to
# three stars). Write your code in place of the line that raises
# `NotImplementedError`, run the cell, then run the check under it. A check that fails
# names the likely mistake and shows the smallest case. Hints open one at a time.
# `solution("causal_mask")` shows that one solution and no other.
#
# Letters as in the chapter: B batch, T queries, S keys, C model width, H query heads,
# K key/value heads, D head width.

# %% id="setup"
# (filled in by the build)

# %% id="w04-imports"
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from minimind.attention import Projections

# %% [markdown] exercise="causal_mask"
# ## 1. The causal mask
#
# Which of $S$ keys may each of the last $T$ positions look at? Query $i$ stands at
# position $S - T + i$ and sees itself and everything before it:
# $$\text{mask}_{is} = \big[\, s \le S - T + i \,\big]$$
# For example, `causal_mask(2, 3)` is `[[True, True, False], [True, True, True]]`.
# (Chapter section 4.4.)
#
# <details><summary>Hint 1: a tool</summary>
#
# `tril` keeps the lower left triangle of a matrix and clears the rest. Its argument
# moves the diagonal.
#
# </details>
# <details><summary>Hint 2: how far to move it</summary>
#
# The first query sees $S - T + 1$ keys. With `tril(0)` the first row keeps one entry.
# And put the mask on the device that was asked for.
#
# </details>

# %% id="w04-causal-mask" exercise="causal_mask" points=2 minutes=5 difficulty=1 kind="rebuild"
def causal_mask(T: int, S: int | None = None,
                device: torch.device | str | None = None) -> torch.Tensor:
    """Which of S keys each of the last T positions may look at, as bool (T, S).

    True means "may look". Without S, there are as many keys as queries.
    """
    ### BEGIN SOLUTION
    S = T if S is None else S
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    ### END SOLUTION

# %% id="w04-causal-mask-check"
check("causal_mask")

# %% [markdown] exercise="repeat_kv"
# ## 2. One key head for several query heads
#
# With grouped queries, $H$ query heads share $K$ key/value heads. The plain way to
# compute it gives every query head a copy: query head $h$ uses key head
# $\lfloor h \cdot K / H \rfloor$. So two heads `a, b` repeated twice are
# `a, a, b, b`. (Section 4.6.)
#
# <details><summary>Hint 1: which dimension?</summary>
#
# Heads are dimension 1 of `(B, K, S, D)`. Nothing else changes.
#
# </details>
# <details><summary>Hint 2: two tools, one of them right</summary>
#
# torch has `repeat` (the whole row of heads again: a, b, a, b) and
# `repeat_interleave` (each head again before the next).
#
# </details>

# %% id="w04-repeat-kv" exercise="repeat_kv" points=2 minutes=5 difficulty=1 kind="rebuild"
def repeat_kv(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """Each head `repeats` times in a row: (B, K, S, D) -> (B, K * repeats, S, D)."""
    ### BEGIN SOLUTION
    return x.repeat_interleave(repeats, dim=1)
    ### END SOLUTION

# %% id="w04-repeat-kv-check"
check("repeat_kv")

# %% [markdown] exercise="attention_weights"
# ## 3. Shares of attention
#
# Compare each query with each key, hide what may not be seen, and turn the scores of
# each row into shares that sum to one:
# $$w = \operatorname{softmax}\!\Big(\frac{q\,k^\top}{\sqrt{D}}\Big)$$
# Two masks are possible, and both may be given: `attention_mask` (bool, True: may
# look) and `is_causal`. A query may look only where both allow it. (Sections 4.3, 4.4.)
#
# <details><summary>Hint 1: the order of the steps</summary>
#
# Repeat the keys; scores; mask; softmax. The mask comes before the softmax, because
# the shares that are left must still sum to one.
#
# </details>
# <details><summary>Hint 2: how to hide</summary>
#
# `masked_fill(where, value)` writes `value` where its first argument is True, and your
# masks are True where a look is *allowed*. Which value becomes a share of zero?
#
# </details>
# <details><summary>Hint 3: the shapes</summary>
#
# `k` has to become `(B, H, D, S)` for the product with `q`. `transpose(-2, -1)` swaps
# the last two dimensions. Your `causal_mask(T, S)` broadcasts to all heads.
#
# </details>

# %% id="w04-attention-weights" exercise="attention_weights" points=4 minutes=15 difficulty=2 kind="rebuild"
def attention_weights(
    q: torch.Tensor, k: torch.Tensor, attention_mask: torch.Tensor | None = None,
    is_causal: bool = False
) -> torch.Tensor:
    """Shares of attention, (B, H, T, S); q is (B, H, T, D), k is (B, K, S, D).

    `attention_mask` broadcasts to (B, H, T, S); `is_causal` adds the causal mask.
    """
    ### BEGIN SOLUTION
    k = repeat_kv(k, q.shape[1] // k.shape[1])  # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    if is_causal:
        mask = causal_mask(*scores.shape[-2:], device=q.device)
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)
    ### END SOLUTION

# %% id="w04-attention-weights-check"
check("attention_weights")

# %% [markdown] exercise="attention"
# ## 4. Attention
#
# Mix the values by the shares: $y = w\,v$. Hand both masks on.
#
# <details><summary>Hint</summary>
#
# You have everything: the shares are exercise 3, and the values need the same
# treatment as the keys got there.
#
# </details>

# %% id="w04-attention" exercise="attention" points=2 minutes=5 difficulty=1 kind="rebuild"
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762).

    q is (B, H, T, D), k and v are (B, K, S, D); returns (B, H, T, D).
    """
    ### BEGIN SOLUTION
    weights = attention_weights(q, k, attention_mask, is_causal)
    return weights @ repeat_kv(v, q.shape[1] // v.shape[1])
    ### END SOLUTION

# %% id="w04-attention-check"
check("attention")

# %% [markdown] exercise="grouped_attention"
# ## 5. Without copies
#
# Repeating copies numbers for nothing. The queries that share a key/value head can
# stand below each other in one matrix of $H/K \cdot T$ rows: then one product with the
# keys gives all their scores, and one with the values their results. The check looks
# at what autograd keeps: keys or values that were repeated on the way do not pass.
#
# One more promise: a row that may look nowhere gets the mean of all values. With
# minus infinity everywhere it would be NaN; with the smallest number of its type
# everywhere, the softmax is even.
#
# <details><summary>Hint 1: the shapes on the way</summary>
#
# q `(B, H, T, D)` → rows `(B, K, H/K * T, D)` → scores `(B, K, H/K * T, S)` → for the
# mask `(B, H, T, S)` → and back for the product with v.
#
# </details>
# <details><summary>Hint 2: why a reshape is enough</summary>
#
# The query heads of one key head are neighbours in dimension 1, so `reshape` puts
# them, and their positions, into one long dimension. Nothing has to be transposed but
# the keys.
#
# </details>
# <details><summary>Hint 3: the smallest number</summary>
#
# `torch.finfo(scores.dtype).min`.
#
# </details>

# %% id="w04-grouped-attention" exercise="grouped_attention" points=4 minutes=20 difficulty=3 kind="rebuild"
def grouped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """`attention` without repeated keys or values.

    q is (B, H, T, D), k and v are (B, K, S, D); `attention_mask` is bool and
    broadcasts to (B, H, T, S). A row that may look nowhere gets the mean of all values.
    """
    ### BEGIN SOLUTION
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    rows = (q / math.sqrt(D)).reshape(B, K, -1, D)  # (B, K, H/K * T, D)
    scores = (rows @ k.transpose(-2, -1)).view(B, H, T, S)
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(dim=-1).view(B, K, -1, S) @ v).view(B, H, T, D)
    ### END SOLUTION

# %% id="w04-grouped-attention-check"
check("grouped_attention")

# %% [markdown] exercise="Attention"
# ## 6. The layer
#
# `Projections` (section 4.7) holds the four matrices, and its
# `self.project(x, rotate)` gives q `(B, H, T, D)`, k and v `(B, K, T, D)`. Write
# `forward`: project; if there is a cache, exchange keys and values for those of all
# positions so far (`kv_cache.update(k, v, self.layer_idx)`); attend; join the heads;
# mix them with `self.o_proj`. Without `attention_mask` the layer is causal, and a mask
# that is given already includes causality. Use your own `attention` or torch's kernel.
#
# <details><summary>Hint 1: causal, with a cache</summary>
#
# With a cache there are more keys than queries. Your `attention` with `is_causal=True`
# counts the queries from the end. torch's `is_causal` counts from the first key: give
# that kernel your `causal_mask(T, S)` instead.
#
# </details>
# <details><summary>Hint 2: joining the heads</summary>
#
# The result is `(B, H, T, D)`. Head and width must be neighbours before they can
# become one dimension; `flatten(2)` joins everything from dimension 2 on.
#
# </details>

# %% id="w04-attention-layer" exercise="Attention" points=5 minutes=20 difficulty=2 kind="rebuild"
class Attention(Projections):
    """Causal self-attention with grouped queries: (B, T, C) -> (B, T, C)."""

    def forward(self, x: torch.Tensor, rotate: Callable | None = None,
                attention_mask: torch.Tensor | None = None,
                kv_cache=None) -> torch.Tensor:  # fmt: skip
        """A bool `attention_mask` includes causality; None means causal.

        `kv_cache.update(k, v, layer_idx)` returns the keys and values of all positions.
        """
        ### BEGIN SOLUTION
        q, k, v = self.project(x, rotate)
        if kv_cache is not None:
            k, v = kv_cache.update(k, v, self.layer_idx)  # (B, K, S, D)
        T, S = q.shape[2], k.shape[2]
        if attention_mask is None and 1 < T < S:
            # is_causal of the kernel counts from the first key
            attention_mask = causal_mask(T, S, device=x.device)
        causal = attention_mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attention_mask, is_causal=causal,
                                           enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)
        ### END SOLUTION

    def weights(self, x: torch.Tensor, rotate: Callable | None = None) -> torch.Tensor:
        """The causal shares (B, H, T, T) that `forward` uses for x, for looking at."""
        q, k, _ = self.project(x, rotate)
        return attention_weights(q, k, is_causal=True)

# %% id="w04-attention-layer-check"
check("Attention")

# %% [markdown] exercise="multi_head"
# ## 7. Two bugs
#
# A colleague wrote attention with several heads in one function. The shapes are right
# and nothing crashes, but it trains badly. There are two bugs, each in one line. One
# of them **leaks**: an earlier output changes when only the last input changes. The
# other makes all shares **too even**. Find both and repair them in place.
#
# <details><summary>Hint 1: find the leak first</summary>
#
# Take a random `x`, change `x[:, -1]`, and compare the outputs before it, as in the
# causality test of section 4.7. Is the mask to blame? Then what comes after it?
#
# </details>
# <details><summary>Hint 2: too even</summary>
#
# Dividing by a larger number makes scores, and so shares, more even. Section 4.2 says
# why there is a root, and of what: the number of terms in one dot product.
#
# </details>

# %% id="w04-multi-head" exercise="multi_head" points=3 minutes=10 difficulty=2 kind="beyond"
def multi_head(x, wq, wk, wv, wo, H):
    """Causal attention with H heads: x (B, T, C), four matrices (C, C)."""
    B, T, C = x.shape
    q, k, v = ((x @ w).view(B, T, H, C // H).transpose(1, 2) for w in (wq, wk, wv))
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    ### BEGIN SOLUTION
    scores = q @ k.transpose(-2, -1) / math.sqrt(C // H)  # (B, H, T, T)
    ### END SOLUTION
    ### BEGIN STUB
    # scores = q @ k.transpose(-2, -1) / math.sqrt(C)  # (B, H, T, T)
    ### END STUB
    shares = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    y = shares @ v
    ### BEGIN SOLUTION
    return y.transpose(1, 2).reshape(B, T, C) @ wo
    ### END SOLUTION
    ### BEGIN STUB
    # return y.reshape(B, T, C) @ wo
    ### END STUB

# %% id="w04-multi-head-check"
check("multi_head")
### BEGIN HIDDEN TESTS
for hidden_seed, hidden_heads in ((11, 2), (12, 3)):
    torch.manual_seed(hidden_seed)
    hidden_x, *hidden_w = torch.randn(1, 7, 12), *torch.randn(4, 12, 12)
    hidden_shorter = multi_head(hidden_x[:, :4], *hidden_w, hidden_heads)
    hidden_longer = multi_head(hidden_x, *hidden_w, hidden_heads)
    assert torch.allclose(hidden_shorter, hidden_longer[:, :4], atol=1e-4)
### END HIDDEN TESTS

# %% [markdown] exercise="sliding_mask"
# ## 8. A sliding window
#
# Longformer (Beltagy et al. 2020, arXiv:2004.05150) and Mistral 7B (Jiang et al. 2023,
# arXiv:2310.06825) let a position see only the `window` latest positions, itself
# among them. Then the cache stops growing, and the cost of a long text grows with $T$
# instead of $T^2$:
# $$\text{mask}_{ts} = \big[\, t - \text{window} < s \le t \,\big]$$
#
# <details><summary>Hint 1</summary>
#
# It is the causal mask without everything that is too old.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `triu(n)` keeps what is on or above a diagonal, and `n` may be negative. How far down
# from the main diagonal is the oldest key that a position may see?
#
# </details>

# %% id="w04-sliding-mask" exercise="sliding_mask" points=2 minutes=10 difficulty=2 kind="beyond"
def sliding_mask(T: int, window: int) -> torch.Tensor:
    """Each position sees the `window` latest ones, itself included: bool (T, T)."""
    ### BEGIN SOLUTION
    return causal_mask(T).triu(1 - window)
    ### END SOLUTION

# %% id="w04-sliding-mask-check"
check("sliding_mask")

# %% [markdown] exercise="alibi_bias"
# ## 9. Positions without position vectors: ALiBi
#
# Attention does not see order (section 4.12). Press et al. 2021 (arXiv:2108.12409) add
# a penalty to each score that grows with the distance to the key, and nothing else.
# Head $h = 0, 1, \dots$ has a slope of its own, so that some heads look near and
# some far:
# $$\text{bias}_{hts} = -\,2^{-8(h+1)/H} \cdot (\text{distance from query to key})$$
# Query $i$ of $T$ stands at position $S - T + i$, as in exercise 1. A key in the future
# gets minus infinity, so this bias is a causal mask at the same time.
#
# <details><summary>Hint 1: all distances at once</summary>
#
# One tensor holds the positions of the queries, as a column; another holds those of
# the keys, as a row. Their difference is a table.
#
# </details>
# <details><summary>Hint 2: the shape of the slopes</summary>
#
# One slope for each head, times a table `(T, S)`, is `(H, T, S)`: give the slopes the
# shape `(H, 1, 1)`. Count the heads from one.
#
# </details>

# %% id="w04-alibi-bias" exercise="alibi_bias" points=4 minutes=15 difficulty=2 kind="beyond"
def alibi_bias(H: int, T: int, S: int | None = None) -> torch.Tensor:
    """What ALiBi adds to the scores, float32 (H, T, S); -inf for keys in the future."""
    ### BEGIN SOLUTION
    S = T if S is None else S
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)  # (T, S)
    slopes = 2.0 ** (-8 * torch.arange(1, H + 1) / H)
    bias = -slopes[:, None, None] * distance  # (H, T, S)
    return bias.masked_fill(distance < 0, -math.inf)
    ### END SOLUTION

# %% id="w04-alibi-bias-check"
check("alibi_bias")

# %% [markdown]
# What your bias does: equal queries and keys everywhere, so that only the distance
# decides. The first of four heads looks a few positions back, the last one far.

# %% id="w04-alibi-try"
nothing = torch.zeros(1, 4, 12, 8)
bias = alibi_bias(4, 12)
shares = (nothing @ nothing.transpose(-2, -1) + bias).softmax(dim=-1)
for h in range(4):
    print(f"head {h}:", " ".join(f"{share:.2f}" for share in shares[0, h, -1]))

# %% [markdown] exercise="reach"
# ## 10. An experiment: how far does a window reach?
#
# A layer with a window of 8 looks 7 positions back. Its output is the next layer's
# input. **Predict first:** how many positions, the last one among them, can the last
# output of four such layers depend on? Write the number into `predicted_reach`.
#
# Then measure. Write `reach(layers, window, T)`: take a small random `x` of shape
# `(1, 1, T, 8)` that wants a gradient (a tenth of `randn`: large scores would round
# shares to zero); as often as there are layers, let `y = y + attention(y, y, y, mask)`
# with your sliding mask; take the gradient of the last position's output with respect
# to `x`; count the positions where it is not zero. Last, fill the dict `measured`:
# 1, 2, 3 and 4 layers with a window of 8.
#
# <details><summary>Hint 1: the gradient</summary>
#
# `torch.autograd.grad(y[..., -1, :].sum(), x)` returns a tuple with one tensor of
# the shape of `x`.
#
# </details>
# <details><summary>Hint 2: counting</summary>
#
# A position counts if any of its channels is not zero. The result is a tensor with one
# number; `.item()` makes it a whole number of Python.
#
# </details>

# %% id="w04-reach" exercise="reach" points=4 minutes=20 difficulty=3 kind="beyond"
### BEGIN SOLUTION
predicted_reach = 1 + 4 * (8 - 1)
### END SOLUTION

def reach(layers: int, window: int, T: int = 48) -> int:
    """How many of T positions the last output of a stack of layers depends on."""
    ### BEGIN SOLUTION
    torch.manual_seed(0)
    x = (0.1 * torch.randn(1, 1, T, 8)).requires_grad_()
    y = x
    for _ in range(layers):
        y = y + attention(y, y, y, sliding_mask(T, window))
    (gradient,) = torch.autograd.grad(y[..., -1, :].sum(), x)
    return (gradient != 0).any(dim=-1).sum().item()
    ### END SOLUTION

### BEGIN SOLUTION
measured = {layers: reach(layers, 8) for layers in (1, 2, 3, 4)}
### END SOLUTION

# %% id="w04-reach-check"
check("reach")

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves the functions of exercises 1 to 6 that pass to `student/attention.py`.
# With `MINIMIND_STUDENT=student` before a command, the course uses them: your own
# attention trains the model of chapter 9.

# %% id="w04-keep"
keep()
