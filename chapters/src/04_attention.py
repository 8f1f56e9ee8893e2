# %% [markdown]
# # 4. Attention
#
# At the end of this chapter you will have written attention by hand and as a class that the rest of the course uses, shown that
# it equals torch's own kernel, measured what it costs, and trained a small model that **copies**: told once where Garus lives, it
# answers when you ask again. You will find the head that does it and watch it work.
#
# You need: matrix multiplication, the softmax, and cross-entropy from chapter 3.
#
# Reading 30 minutes; running: smoke 15 s, cpu 60 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="attention-default-exp"
#| default_exp attention

# %% [markdown]
# The whole chapter in one picture. A position asks a question (its *query*), every earlier position shows a label (its *key*), and
# where label and question agree, more of the content (the *value*) is taken over.

# %% id="attention-picture"
import matplotlib.pyplot as plt

words = "Garus Foxhollow Kalo Elmstead Garus".split()
shares = [0.04, 0.86, 0.02, 0.05, 0.03]
fig, ax = plt.subplots(figsize=(7, 2.3))
for i, (word, share) in enumerate(zip(words, shares)):
    ax.text(i, 0, word, ha="center", va="center",
            bbox={"boxstyle": "round,pad=0.4", "fc": "#e8f1f8", "ec": "black"})
    if i < 4:
        ax.annotate("", (i, 0.25), (4, 0.25),
                    arrowprops={"arrowstyle": "->", "lw": 0.5 + 6 * share,
                                "color": "#0072B2",
                                                         "shrinkA": 2,
                                                         "connectionstyle": "arc3,rad=0.35"})
ax.text(4, -0.5, "query: who was\nwritten just after Garus?", ha="center", va="center",
        fontsize=9)
ax.text(1, -0.5, "key: I was written after Garus\nvalue: the town Foxhollow",
        ha="center", va="center", fontsize=9)
ax.set(xlim=(-0.6, 4.8), ylim=(-0.75, 0.95))
ax.axis("off")
show(fig, "The last word sends out a query; the word whose key fits best, Foxhollow, "
          "gives most of the answer (thickness is the share).")

# %% [markdown]
# ## 4.1 A question that counting cannot answer
#
# Chapter 3 predicted a word from the one before it. Here is a kind of text where that must fail. Six people are introduced, each
# with a town; then some are named again. In every text the towns are dealt out anew, so nothing can be learned by heart.

# %% id="attention-words"
import torch

NAMES = ("Garus Kalo Tilda Benna Dorin Fello Hasta Josen "
         "Lemia Marek Nilla Pelor Resta Sador Tovan Zeren").split()
TOWNS = ("Foxhollow Elmstead Millbrook Ashford Redcliff Oakham Windmere Saltport "
         "Greenfield Northgate Ravenhill Otterby Larkspur Thornton Pinedale Fernley").split()
WORDS = NAMES + TOWNS

def make_texts(count, generator, people=6, questions=6):
    """Pairs (name, town), then questions: ids (count, 2 * (people + questions))."""
    who = torch.rand(count, 16, generator=generator).argsort(dim=1)[:, :people]
    where = torch.rand(count, 16, generator=generator).argsort(dim=1)[:, :people] + 16
    asked = torch.randint(people, (count, questions), generator=generator)
    order = torch.cat((torch.arange(people).expand(count, people), asked), dim=1)
    return torch.stack((who.gather(1, order), where.gather(1, order)),
                       dim=-1).flatten(1)

# %% [markdown]
# Read one text. From the seventh name on, every town could be known.

# %% id="attention-read-one"
held_out = make_texts(500, torch.Generator().manual_seed(1))
ASKED = torch.arange(12, 24, 2)  # positions of the six names that are asked about
print(" ".join(WORDS[i] for i in held_out[0][:12]))
print(" ".join(WORDS[i] for i in held_out[0][12:]))

# %% [markdown]
# **Before you run this:** how often will a table of word pairs, counted on 20,000 texts, name the right town? There are sixteen towns.

# %% id="attention-bigram"
counts = torch.zeros(32, 32)
texts = make_texts(20_000, torch.Generator().manual_seed(2))
counts.index_put_((texts[:, :-1].flatten(), texts[:, 1:].flatten()), torch.tensor(1.0),
                  accumulate=True)
guesses = counts.argmax(dim=1)[held_out[:, ASKED]]
bigram = (guesses == held_out[:, ASKED + 1]).float().mean().item()
chapter.record("attention/copy_bigram", bigram)
print(f"right: {bigram:.1%} (one in sixteen is {1 / 16:.1%}; one of the six towns in "
      f"the text would be {1 / 6:.1%})")

# %% [markdown]
# It is a blind guess. The answer stands in the text, but at a place that depends on the text. We need an operation that **looks
# back and chooses where to look by content**.

# %% [markdown]
# ## 4.2 One row, by hand
#
# Take four positions, with vectors of width $D = 2$. Each position $s$ offers a key $k_s$ (a label) and a value $v_s$ (a content).
# The last position has a query $q$. Think of the first number of a key as "I am a town" and of the second as "I am a name".

# %% id="attention-hand-numbers"
k = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])  # (S, D) = (4, 2)
v = torch.tensor([[0.0, 0.0], [1.0, 3.0], [0.0, 1.0], [2.0, 0.0]])
q = torch.tensor([2.0, 0.0])  # this position looks for a town

# %% [markdown]
# Step one: compare the query with every key, by the dot product, divided by $\sqrt{D}$ (the reason follows):
# $\text{score}_s = q \cdot k_s / \sqrt{D}$. Work out the second score on paper first: $2 \cdot 2 / 1.414$.

# %% id="attention-hand-scores"
scores = (k * q).sum(dim=1) / 2**0.5
print(scores)
assert abs(scores[1] - 4 / 1.41421356) < 1e-5

# %% [markdown]
# Step two: the softmax turns scores into shares that are positive and sum to one:
# $w_s = e^{\text{score}_s} / \sum_r e^{\text{score}_r}$.

# %% id="attention-hand-softmax"
weights = scores.exp() / scores.exp().sum()
print(weights)
assert torch.allclose(weights, scores.softmax(dim=0)) and abs(weights.sum() - 1) < 1e-6

# %% [markdown]
# Step three: the output is the mean of the values, weighted by the shares: $y = \sum_s w_s v_s$.

# %% id="attention-hand-output"
row = (weights[:, None] * v).sum(dim=0)
print(row)
assert torch.allclose(row, weights @ v)

# %% [markdown]
# Scores and shares side by side. Position 3 is half a town, and it gets a quarter of what position 1 gets.

# %% id="attention-hand-figure"
fig, axes = plt.subplots(1, 2, figsize=(7, 2.4), sharey=False)
axes[0].bar(range(4), scores, color="#0072B2")
axes[0].set(xlabel="position s", ylabel="score", xticks=range(4))
axes[1].bar(range(4), weights, color="#D55E00", hatch="//")
axes[1].set(xlabel="position s", ylabel="share of attention", xticks=range(4),
            ylim=(0, 1))
show(fig, "Scores (left) become shares (right): the softmax gives the best fitting "
          "key, at position 1, most of the attention.")

# %% [markdown]
# **Try it.** Change `q` so that the row looks for a name. Predict the three largest shares before you run it. Which `q` gives every position the same share?
#
# ### Why divide by the root of D?
#
# With random vectors of width $D$, a dot product is a sum of $D$ random terms, so its spread grows like $\sqrt{D}$. A softmax of
# large scores puts everything on one position, and then no gradient reaches the others. **Predict:** what is the spread at $D = 64$?

# %% id="attention-why-root"
generator = torch.Generator().manual_seed(0)
widths = [4, 16, 64, 256]
spread, largest = [], {"plain": [], "scaled": []}
for D in widths:
    a = torch.randn(2000, 1, D, generator=generator)
    b = torch.randn(2000, 16, D, generator=generator)
    dots = (a * b).sum(dim=-1)  # 2000 queries, 16 keys each
    spread.append(dots.std().item())
    largest["plain"].append(dots.softmax(dim=-1).amax(dim=-1).mean().item())
    largest["scaled"].append((dots / D**0.5).softmax(dim=-1).amax(dim=-1).mean().item())
assert all(abs(s / D**0.5 - 1) < 0.05
           for s, D in zip(spread, widths)), "the spread of a dot product is the root of D"
print([f"D={D}: {s:.1f}" for D, s in zip(widths, spread)])

# %% [markdown]
# The spread at 64 is 8. Now the consequence: how much does the luckiest of sixteen random keys get?

# %% id="attention-why-root-figure"
fig, ax = plt.subplots(figsize=(7, 2.5))
ax.plot(widths, largest["plain"], marker="o", label="plain dot product")
ax.plot(widths, largest["scaled"], marker="s", label="divided by the root of D")
ax.set(xscale="log", xticks=widths, xticklabels=widths, xlabel="width D",
       ylabel="largest of 16 shares", ylim=(0, 1))
ax.minorticks_off()
ax.legend(loc="center right")
show(fig, "Without the root, random wide vectors already put nearly all attention on "
          "one key; with it, the shares do not depend on the width.")

# %% [markdown]
# ## 4.3 All rows at once
#
# Every position has its own query. Stack them as the rows of $Q$; do the same for $K$ and $V$. The three steps become one line,
# $Y = \operatorname{softmax}(Q K^\top / \sqrt{D})\, V$ (Vaswani et al. 2017).

# %% id="attention-matrix"
def attention_plain(Q, K, V):
    return (Q @ K.T / Q.shape[1] ** 0.5).softmax(dim=-1) @ V

Q = torch.stack((torch.zeros(2), torch.tensor([0.0, 1.0]), torch.tensor([1.0, -1.0]),
                 q))  # the last row is ours
assert torch.allclose(attention_plain(Q, k, v)[3], row)

# %% [markdown]
# The first query is all zeros: it fits every key equally, so its output must be the plain mean of the values.

# %% id="attention-matrix-mean"
assert torch.allclose(attention_plain(Q, k, v)[0], v.mean(dim=0))
attention_plain(Q, k, v)

# %% [markdown]
# ## 4.4 The causal mask
#
# A language model is trained on all positions of a text at once: position $t$ must predict word $t+1$. If it may look at $t+1$, there is
# nothing to predict. So a mask says which of the $S$ keys each of the $T$ queries may look at.
#
# The function below allows for $S > T$. During generation (chapter 10) the keys of old positions are kept, and only the
# last $T$ positions ask. Query $i$ then stands at position $S - T + i$.

# %% id="attention-imports"
#| export
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

# %% id="attention-causal-mask"
#| export
def causal_mask(T: int, S: int | None = None,
                device: torch.device | str | None = None) -> torch.Tensor:
    """Which of S keys each of the last T positions may look at, as bool (T, S).

    True means "may look". The queries are the last T of S positions, so query i stands at position S - T + i.
    Without a cache S is T.
    """
    S = T if S is None else S
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)

# %% [markdown]
# Two small cases that you can check with your finger:

# %% id="attention-causal-mask-check"
assert causal_mask(3).tolist() == [[True, False, False], [True, True, False],
                                   [True, True, True]]
assert causal_mask(2, 4).tolist() == [[True, True, True, False],
                                      [True, True, True, True]]

# %% [markdown]
# How do we forbid a look? A forbidden share must be exactly zero and the rest must still sum to one. Setting the share to
# zero after the softmax breaks the sum. Setting the **score** to minus infinity before it does both, because $e^{-\infty} = 0$.

# %% id="attention-mask-in-scores"
scores = (Q @ k.T / 2**0.5).masked_fill(~causal_mask(4), -math.inf)
weights = scores.softmax(dim=-1)
assert (weights.triu(1) == 0).all() and torch.allclose(weights.sum(dim=-1),
                                                       torch.ones(4))
weights

# %% [markdown]
# Seen as pictures, with the mask for two new positions at the end of six as the third:

# %% id="attention-mask-figure"
fig, axes = plt.subplots(1, 3, figsize=(7, 2.4))
pictures = {"no mask": (Q @ k.T / 2**0.5).softmax(dim=-1), "causal": weights,
            "2 new of 6": causal_mask(2, 6).float()}
for ax, (name, picture) in zip(axes, pictures.items()):
    ax.imshow(picture, vmin=0, vmax=1, cmap="Greys", aspect="equal")
    ax.set(title=name, xlabel="key position", xticks=range(picture.shape[1]),
           yticks=range(len(picture)))
    ax.grid(False)
axes[0].set_ylabel("query position")
axes[2].set_yticks([0, 1], ["4", "5"])
show(fig, "Shares from white (0) to black (1): without a mask every row looks "
          "everywhere; the causal mask clears the upper right; two new positions of "
          "six look back at all before them.")

# %% [markdown]
# **Exercise 4.1 (5 min, ★): `causal_mask`** in [workbook 4](../exercises/04_attention.ipynb). Write it without looking; the check tries lengths with a cache, too.
#
# **Exercise 4.8 (10 min, ★★): `sliding_mask`** in [workbook 4](../exercises/04_attention.ipynb). Let each position see itself and the few before it. For which window is that the causal mask?
#
# ## 4.5 Heads
#
# One softmax gives one mixture. To look at the last name **and** at the last town, a position needs two. So the width is cut into $H$
# *heads* of width $D$; each attends by itself. In tensors the head becomes a dimension: $(B, T, H \cdot D) \to (B, H, T, D)$.

# %% id="attention-split"
B, T, H, D = 1, 4, 2, 3
x = torch.arange(B * T * H * D).view(B, T, H * D)
heads = x.unflatten(-1, (H, D)).transpose(1, 2)  # (B, H, T, D)
print("position 0:", x[0, 0].tolist(), "\nhead 0:", heads[0, 0].tolist())
assert torch.equal(heads.transpose(1, 2).flatten(2),
                   x), "splitting and joining must give the same numbers back"

# %% [markdown]
# Look at head 0: it has the first three numbers of each position. A tempting shortcut is `x.view(B, H, T, D)`. It has the same
# shape, and it is wrong: **it mixes positions**.

# %% id="attention-split-wrong"
wrong = x.view(B, H, T, D)
print("head 0, position 1:", wrong[0, 0, 1].tolist(), " should be",
      heads[0, 0, 1].tolist())
assert not torch.equal(wrong, heads)

# %% [markdown]
# In the wrong version, "position 1 of head 0" is the second half of position 0. Nothing crashes; the model is only worse, and later
# positions leak into earlier ones. In 4.7 you will meet the test that finds this.
#
# ## 4.6 Grouped queries
#
# When a model writes, it keeps the keys and values of every position it has read. That memory, not the arithmetic, limits how many
# people a server can talk to. So let several query heads share one key/value head: $K$ key/value heads serve $H$ query
# heads (Ainslie et al. 2023; $K = 1$ is Shazeer 2019). The plain way to compute it: repeat each key/value head $H/K$ times.

# %% id="attention-repeat-kv"
#| export
def repeat_kv(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """Each key/value head `repeats` times: (B, K, S, D) -> (B, K * repeats, S, D)."""
    return x.repeat_interleave(repeats, dim=1)

# %% [markdown]
# Heads 0 and 1 share the first key/value head, heads 2 and 3 the second. The other order (0, 1, 0, 1) would be as good for a fresh
# model, but it would misread every published checkpoint.

# %% id="attention-repeat-kv-check"
two = torch.tensor([10, 20]).view(1, 2, 1, 1)
assert repeat_kv(two, 2).flatten().tolist() == [10, 10, 20, 20]

# %% [markdown]
# Now everything together: shares of attention for all heads, with grouping and masks. Two masks are possible: the causal
# one, and your own (chapter 11 uses it to keep packed conversations apart).

# %% id="attention-weights"
#| export
def attention_weights(
    q: torch.Tensor, k: torch.Tensor, attention_mask: torch.Tensor | None = None,
    is_causal: bool = False
) -> torch.Tensor:
    """Shares of attention, (B, H, T, S); each row sums to 1.

    q is (B, H, T, D), k is (B, K, S, D).
    `attention_mask` is bool, True means "may look", and broadcasts to (B, H, T, S);
    `is_causal` adds the causal mask.
    """
    k = repeat_kv(k, q.shape[1] // k.shape[1])  # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    if is_causal:
        scores = scores.masked_fill(~causal_mask(*scores.shape[-2:], device=q.device),
                                    -math.inf)
    return scores.softmax(dim=-1)

# %% [markdown]
# And the mixture of values:

# %% id="attention-function"
#| export
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762).

    The readable way: memory grows with T * S. q is (B, H, T, D), k and v are (B, K, S,
    D); K divides H (Ainslie et al. 2023, arXiv:2305.13245). Returns (B, H, T, D).
    """
    weights = attention_weights(q, k, attention_mask, is_causal)
    return weights @ repeat_kv(v, q.shape[1] // v.shape[1])

# %% [markdown]
# The hand-made row is still in it, and grouping equals full attention over repeated heads.

# %% id="attention-function-check"
assert torch.allclose(attention(Q.view(1, 1, 4, 2), k.view(1, 1, 4, 2),
                                v.view(1, 1, 4, 2))[0, 0, 3], row)
q4, k2, v2 = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
one_by_one = [attention(q4[:, h : h + 1], k2[:, h // 2 : h // 2 + 1],
                        v2[:, h // 2 : h // 2 + 1]) for h in range(4)]
assert torch.allclose(attention(q4, k2, v2), torch.cat(one_by_one, dim=1), atol=1e-6)

# %% [markdown]
# Repeating copies numbers for nothing. The queries that share a head can stand in one tall matrix instead: $H/K \cdot T$ rows, one
# product with the keys, one with the values. The mask becomes numbers to add, 0 or the lowest there is: one small table serves
# all heads, where filling would go through the scores of each.

# %% id="attention-grouped"
#| export
def grouped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """`attention` without repeated keys: one matrix for the queries of a k/v head.

    q is (B, H, T, D), k and v are (B, K, S, D), `attention_mask` as in `attention`. A
    row that may look nowhere gets the mean of all values instead of NaN.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    rows = (q / math.sqrt(D)).reshape(B, K, -1, D)  # (B, K, H/K * T, D)
    scores = (rows @ k.transpose(-2, -1)).view(B, H, T, S)
    lowest = torch.finfo(scores.dtype).min
    hidden = scores.new_zeros(attention_mask.shape).masked_fill(~attention_mask, lowest)
    scores = scores + hidden
    return (scores.softmax(dim=-1).view(B, K, -1, S) @ v).view(B, H, T, D)

# %% id="attention-grouped-check"
mask = causal_mask(9)
assert torch.allclose(grouped_attention(q4, k2, v2, mask), attention(q4, k2, v2, mask),
                      atol=1e-6)

# %% [markdown]
# What grouping saves in memory, for a model with 32 layers and 32 heads of width 128, in bfloat16 (2 bytes per number; a key and a value each):

# %% id="attention-cache-figure"
groups = [32, 8, 4, 1]
megabytes = [2 * 2 * 32 * K * 128 * 8192 / 1e6 for K in groups]
fig, ax = plt.subplots(figsize=(7, 2.2))
bars = ax.barh([f"K = {K}" for K in groups], megabytes, color="#56B4E9",
               edgecolor="black")
ax.bar_label(bars, fmt="%.0f MB", padding=3)
ax.set(xlabel="cache of one conversation of 8,192 tokens (MB)", xlim=(0, 5200))
show(fig, "Sharing each key/value head among four query heads (K = 8) cuts the cache "
          "of a conversation to a quarter.")

# %% [markdown]
# **Exercise 4.2 (5 min, ★): `repeat_kv`** in [workbook 4](../exercises/04_attention.ipynb). Which of torch's two ways to repeat keeps each head beside its copy?
#
# **Exercise 4.3 (15 min, ★★): `attention_weights`** in [workbook 4](../exercises/04_attention.ipynb). Shares with two masks, either or both; the check compares with torch's kernel.
#
# **Exercise 4.4 (5 min, ★): `attention`** in [workbook 4](../exercises/04_attention.ipynb). Mix the values by your shares.
#
# **Exercise 4.5 (20 min, ★★★): `grouped_attention`** in [workbook 4](../exercises/04_attention.ipynb). The same without a repeated key; the check looks at what autograd keeps.
#
# ## 4.7 The layer
#
# Queries, keys and values come from the input $x$ through learned matrices; a last matrix mixes the heads. The names are those of Hugging
# Face's Llama and Qwen3, so trained weights can be exchanged in chapter 7. Two doors stay open: `norm` (chapter 7) and
# `rotate`, for positions (chapter 5).

# %% id="attention-projections"
#| export
class Projections(nn.Module):
    """The four matrices of an attention layer, under Hugging Face's names.

    `norm` makes a normalisation of width D for queries and keys, applied to each head
    before rotation (Qwen3).
    """

    def __init__(self, hidden_size: int, num_attention_heads: int,
                 num_key_value_heads: int, head_dim: int,
                 norm: Callable[[int], nn.Module] | None = None, bias: bool = False,
                 layer_idx: int = 0):
        super().__init__()
        if num_attention_heads % num_key_value_heads:
            raise ValueError(f"num_attention_heads ({num_attention_heads}) must be a "
                             "multiple of num_key_value_heads "
                             f"({num_key_value_heads}): each key/value head serves as "
                             "many query heads as the others")
        self.head_dim, self.layer_idx = head_dim, layer_idx
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = norm(head_dim) if norm else nn.Identity()
        self.k_norm = norm(head_dim) if norm else nn.Identity()

    def project(
        self, x: torch.Tensor, rotate: Callable | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, T, C) -> q (B, H, T, D), k and v (B, K, T, D).

        `rotate(q, k)` puts positions into them.
        """
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim))
                   for p in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, heads, D)
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        v = v.transpose(1, 2)  # (B, heads, T, D)
        if rotate is not None:
            q, k = rotate(q, k)
        return q, k, v

# %% [markdown]
# The layer itself projects, attends and mixes. It calls torch's fused kernel, which 4.8 compares with our own function,
# except where 4.8 finds ours faster: training on a processor in 16-bit numbers, with short rows.

# %% id="attention-matrices-faster"
#| export
MATRICES_UP_TO = 512  # positions up to which two matrix products beat the fused kernel (4.8)


def matrices_are_faster(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether to train with matrices: on a processor, in 16 bits, with short rows."""
    low = torch.is_autocast_enabled("cpu") or q.dtype == torch.bfloat16
    short = 1 < q.shape[2] == k.shape[2] <= MATRICES_UP_TO
    return low and short and q.device.type == "cpu" and torch.is_grad_enabled()

# %% [markdown]
# With matrices, half of the table lies above the diagonal and is computed only to be hidden. Take the queries in blocks, and give each block no keys beyond its own end: with two blocks a
# quarter of the table is never made, with many nearly half.

# %% id="attention-in-blocks"
#| export
QUERY_BLOCK = 256  # queries in a block


def attention_in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """`grouped_attention` in blocks of queries, without the keys behind each block.

    Shapes as there, with as many keys as queries; the mask (..., T, T) must include
    causality.
    """
    parts = []
    for end in range(QUERY_BLOCK, q.shape[2] + QUERY_BLOCK, QUERY_BLOCK):
        block = q[:, :, end - QUERY_BLOCK : end]
        mask = attention_mask[..., end - QUERY_BLOCK : end, :end]
        parts.append(grouped_attention(block, k[:, :, :end], v[:, :, :end], mask))
    return torch.cat(parts, dim=2)

# %% [markdown]
# A third door, `kv_cache`, hands back the keys and values of all positions so far (chapter 10).

# %% id="attention-class"
#| export
class Attention(Projections):
    """Causal self-attention with grouped queries: (B, T, C) -> (B, T, C)."""

    def forward(self, x: torch.Tensor, rotate: Callable | None = None,
                attention_mask: torch.Tensor | None = None,
                kv_cache=None) -> torch.Tensor:  # fmt: skip
        """x (B, T, C) -> (B, T, C); without `attention_mask` it is causal.

        A bool `attention_mask` (True: may look) broadcasts to (B, H, T, S) and must
        include causality. `kv_cache` has `.update(k, v, layer_idx)`, which returns the
        keys and values of all positions so far.
        """
        q, k, v = self.project(x, rotate)
        if kv_cache is not None:
            k, v = kv_cache.update(k, v, self.layer_idx)  # (B, K, S, D)
        T, S, by_matrices = q.shape[2], k.shape[2], matrices_are_faster(q, k)
        if attention_mask is None and (1 < T < S or by_matrices):
            # is_causal counts from the first key
            attention_mask = causal_mask(T, S, device=x.device)
        if by_matrices:
            y = attention_in_blocks(q, k, v, attention_mask)
        else:
            causal = attention_mask is None and T > 1
            y = F.scaled_dot_product_attention(q, k, v, attention_mask,
                                               is_causal=causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)

    def weights(self, x: torch.Tensor, rotate: Callable | None = None) -> torch.Tensor:
        """The causal shares (B, H, T, T) that `forward` uses, for looking at."""
        q, k, _ = self.project(x, rotate)
        return attention_weights(q, k, is_causal=True)

# %% [markdown]
# ### The causality test
#
# Change the last position of the input. Every earlier output must stay exactly as it was. This test needs no knowledge of the
# inside, and it finds the wrong split of 4.5 as well as a wrong mask. Write it for every model that you build.

# %% id="attention-causality-test"
def leaks(layer, x):
    """True if an output of `layer` depends on a later input."""
    changed = x.clone()
    changed[:, -1] += 1
    return not torch.equal(layer(x)[:, :-1], layer(changed)[:, :-1])

torch.manual_seed(0)
layer, x = Attention(64, num_attention_heads=4, num_key_value_heads=2,
                     head_dim=16), torch.randn(2, 10, 64)
assert not leaks(layer, x)

# %% [markdown]
# A test that never fails shows nothing. So give it a layer that must fail: one that splits its heads the wrong way.

# %% id="attention-causality-test-fails"
class WrongSplit(Attention):
    def project(self, x, rotate=None):
        return tuple(p(x).view(len(x), -1, x.shape[1], 16)
                     for p in (self.q_proj, self.k_proj, self.v_proj))

wrong_layer = WrongSplit(64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
assert wrong_layer(x).shape == layer(x).shape and leaks(wrong_layer, x)

# %% [markdown]
# **Exercise 4.6 (20 min, ★★): `Attention`** in [workbook 4](../exercises/04_attention.ipynb). Write `forward`, with a cache and without, so that it passes this test.
#
# **Exercise 4.7 (10 min, ★★): `multi_head`** in [workbook 4](../exercises/04_attention.ipynb). A colleague's version has two bugs, and one of them leaks. The test above finds it.
#
# ## 4.8 The fused kernel
#
# `F.scaled_dot_product_attention` computes the same function in one piece. It goes through the keys in blocks and
# never holds the $T \times S$ table (Dao et al. 2022, FlashAttention). The same function must give the same values **and** the same gradients.

# %% id="attention-parity"
def value_and_gradients(function, q, k, v, **options):
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    y = function(*inputs, **options)
    # a different gradient for every number
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return y.detach(), *torch.autograd.grad(loss, inputs)

q4, k2, v2 = (torch.randn(2, heads, 50, 16) for heads in (4, 2, 2))
ours = value_and_gradients(attention, q4, k2, v2, is_causal=True)
fused = value_and_gradients(F.scaled_dot_product_attention, q4, k2, v2, is_causal=True,
                            enable_gqa=True)
for name, a, b in zip(("value", "dq", "dk", "dv"), ours, fused):
    print(f"{name:6} largest difference {(a - b).abs().max():.1e}")
    assert torch.allclose(a, b, atol=2e-5)

# %% [markdown]
# The same function, but not the same cost. To compute gradients, torch keeps what the backward pass will need. Count
# those bytes: `saved_tensors_hooks` shows every tensor that is kept.

# %% id="attention-kept-bytes"
def kept_bytes(function, *inputs):
    """Bytes that autograd keeps for the backward pass of function(*inputs)."""
    kept = {}

    def pack(tensor):
        # shared memory counts once
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*inputs)
    return sum(kept.values()) if result is not None else 0

# %% [markdown]
# And time, as the shortest of a few runs, because anything else on the machine only makes a run longer.

# %% id="attention-seconds"
import time

def seconds(function, *inputs, repeats=3):
    """The shortest of a few runs, forward and backward; the first run only warms up."""
    runs = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        gradient = torch.autograd.grad(function(*inputs).sum(), inputs)[0]
        gradient[0, 0, 0, 0].item()  # waits for a GPU to finish
        runs.append(time.perf_counter() - start)
    return min(runs[1:])

# %% [markdown]
# **Predict:** when the text gets twice as long, how does each of the two grow, in time and in memory?

# %% id="attention-measure"
kinds = {"ours": lambda q, k, v: attention(q, k, v, is_causal=True),
         "fused": lambda q, k,
         v: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
lengths, cost = list(chapter.size.lengths), {name: {"s": [], "MB": []}
                                             for name in kinds}
for T in lengths:
    inputs = [torch.randn(1, 4, T, 32, device=chapter.device, requires_grad=True)
              for _ in range(3)]
    for name, function in kinds.items():
        cost[name]["s"].append(seconds(function, *inputs))
        cost[name]["MB"].append(kept_bytes(function, *inputs) / 1e6)

# %% [markdown]
# Both axes are logarithmic, so a straight line is a power of $T$: slope 1 is proportional, slope 2 is the square.

# %% id="attention-cost-figure"
fig, axes = plt.subplots(1, 2, figsize=(7, 2.9))
for name, marker in (("ours", "o"), ("fused", "s")):
    axes[0].plot(lengths, [1000 * s for s in cost[name]["s"]], marker=marker,
                 label=name)
    axes[1].plot(lengths, cost[name]["MB"], marker=marker, label=name)
for ax, label in zip(axes,
                     ("forward and backward (ms)", "kept for the backward pass (MB)")):
    ax.set(xscale="log", yscale="log", xlabel="positions T", ylabel=label)
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()
axes[0].legend()
show(fig, "Time (left) grows with the square of T for both in the end, and the fused "
          "kernel needs less of it; the memory that is kept (right) grows with the "
          "square of T for ours and only in proportion to T for the kernel.")

# %% [markdown]
# At the last doubling of $T$, the kernel keeps twice as much and ours nearly four times as much. That is exact, so it is asserted. The
# time depends on your machine, so it gets a band.

# %% id="attention-cost-check"
growth = {name: cost[name]["MB"][-1] / cost[name]["MB"][-2] for name in kinds}
print({name: f"{factor:.2f} times" for name, factor in growth.items()})
assert abs(growth["fused"] - 2) < 0.1 and growth["ours"] > 3
faster = check("attention/fused_speedup",
               cost["ours"]["s"][-1] / cost["fused"]["s"][-1])
smaller = check("attention/memory_ratio",
                cost["ours"]["MB"][-1] / cost["fused"]["MB"][-1])

# %% [markdown]
# Does the operating system agree? Two fresh processes do the same forward and backward pass at one length, and report the highest memory
# that they ever held. Linux writes it as `VmHWM` into a file for each process; elsewhere the cell does nothing.

# %% id="attention-peak-program"
PROGRAM = """
import re, sys, torch, torch.nn.functional as F
from minimind.attention import attention
def peak():  # in bytes
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
def step(T):
    q, k, v = (torch.randn(1, 4, T, 32, requires_grad=True) for _ in range(3))
    run = attention if sys.argv[1] == "ours" else F.scaled_dot_product_attention
    run(q, k, v, is_causal=True).sum().backward()
step(64); before = peak(); step(int(sys.argv[2])); print((peak() - before) / 1e6)
"""

# %% id="attention-peak-process"
import subprocess
import sys

T = chapter.size.process_length
for name in kinds if sys.platform == "linux" else ():
    command = [sys.executable, "-c", PROGRAM, name, str(T)]
    done = subprocess.run(command, capture_output=True, text=True, check=True,
                          cwd=chapter.root)
    peak = chapter.record(f"attention/peak_mb_{name}", float(done.stdout))
    print(f"{name:6} T = {T}: {peak:6.0f} MB more at the peak")

# %% [markdown]
# One table of $4 \cdot T^2$ numbers takes $16\,T^2$ bytes; ours holds several such tables at once during the backward pass.
#
# ### Where matrices win
#
# The kernel was made for GPUs and for long texts. **Predict:** on a processor, in 16-bit numbers and rows of 256 positions, is it still
# the faster one? The contender is `grouped_attention` of 4.6 in the blocks of 4.7: large matrix products and a softmax.

# %% id="attention-short-rows"
from minimind.attention import attention_in_blocks as matrices

def fused_gqa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

def times_faster(T, dtype, heads=8, groups=2):
    """Time of the fused kernel over that of the matrices, both ways."""
    q, k, v = (torch.randn(4, n, T, 64, dtype=dtype, requires_grad=True)
               for n in (heads, groups, groups))
    by_matrices = lambda q, k, v: matrices(q, k, v, causal_mask(T))
    fused, ours = (seconds(f, q, k, v, repeats=5) for f in (fused_gqa, by_matrices))
    return fused / ours

# %% [markdown]
# Only a processor that multiplies 16-bit numbers in hardware shows it; others get a sentence. Freed memory is kept for the next round, as in training
# (chapter 8), or the table of shares would be fetched from the system each time.

# %% id="attention-short-rows-measure"
from minimind.train import keep_memory

short = [64, 128, 256, 512, 1024]
number_types = {"bfloat16": torch.bfloat16, "float32": torch.float32}
measurable = chapter.amp is torch.bfloat16 and chapter.device.type == "cpu"
keep_memory()
faster_by = {name: [times_faster(T, kind) for T in short]
             for name, kind in number_types.items() if measurable}
keep_memory(False)
for name, ratios in faster_by.items():
    print(f"{name:9}", "  ".join(f"T = {T}: {x:.2f}" for T, x in zip(short, ratios)))
if measurable:
    chapter.record("attention/matrices_speedup_256", faster_by["bfloat16"][2])
else:
    print("left out: this comparison is for processors with 16-bit arithmetic")

# %% id="attention-short-rows-figure"
fig, ax = plt.subplots(figsize=(7, 2.4))
for (name, ratio), style in zip(faster_by.items(), ("o-", "s--")):
    ax.plot(short, ratio, style, label=name)
ax.axhline(1, color="black", lw=1)
ax.set(xscale="log", yscale="log", xlabel="positions T",
       ylabel="kernel's time / matrices'")
ax.set_xticks(short, short)
ax.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
ax.minorticks_off()
if faster_by:
    ax.legend()
show(fig, "Above the line the matrices are faster than the fused kernel: on a processor "
          "that is so in 16-bit numbers and short rows. In float32 they lose, and at "
          "1,024 positions little of the gain is left.")

# %% [markdown]
# The kernel's backward pass is what is slow there. So the layer of 4.7 takes the matrices for training in 16 bits up to `MATRICES_UP_TO`
# positions, and pays with memory: it keeps one table of shares per head (chapter 7 counts it).
#
# **Try it.** Write `attention_by_keys(q, k, v, block)`, which loops over blocks of keys and keeps a running maximum and a running sum, so that no $T \times S$ table exists.
#
# ## 4.9 A model that copies
#
# Back to the question of 4.1. The smallest model with attention has a vector for each word plus a vector for each place in the text (attention
# alone does not know order; 4.12 returns to this). Then come layers that **add** what they found, and a score for each word. `nn.RMSNorm` keeps the numbers
# at one size; chapter 7 explains it.

# %% id="attention-copier"
class Copier(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.words, self.places = nn.Embedding(32, 64), nn.Embedding(24, 64)
        self.layers = nn.ModuleList(Attention(64, 4, 2, 32) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(64) for _ in range(layers + 1))
        self.head = nn.Linear(64, 32, bias=False)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, ids, attention_mask=None):
        x = self.words(ids) + self.places.weight[: ids.shape[1]]  # (B, T, C)
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x), attention_mask=attention_mask)
        return self.head(self.norms[-1](x))  # (B, T, V)

# %% [markdown]
# The score: the share of asked towns that it names on texts it was not trained on.

# %% id="attention-copied"
def copied(model, attention_mask=None):
    """Share of asked towns named correctly on held-out texts."""
    with torch.no_grad():
        best = model(held_out.to(chapter.device),
                     attention_mask)[:, ASKED].argmax(dim=-1).cpu()
    return (best == held_out[:, ASKED + 1]).float().mean().item()

# %% [markdown]
# Training is a few lines here; chapter 8 makes it a proper loop. Only the six asked towns count in the loss, since nothing else in these texts can be predicted.
# The model is so small that a second processor core would spend its time waiting, so training uses one.

# %% id="attention-train"
def train_copier(layers, steps, attention_mask=None, seed=0):
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator, history = torch.Generator().manual_seed(seed), []
    model = Copier(layers).to(chapter.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        # a short warm-up, and down to zero at the end (chapter 8)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 20,
                                     (steps - step) / (0.25 * steps))
        ids = make_texts(64, generator).to(chapter.device)
        loss = F.cross_entropy(model(ids, attention_mask)[:, ASKED].flatten(0, 1),
                               ids[:, ASKED + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    torch.set_num_threads(threads)
    return model, history

# %% [markdown]
# **Predict:** is one layer of attention enough? Think of what the last word would need to know about the position of the right town.

# %% id="attention-train-both"
steps = chapter.steps(chapter.size.steps)
copier, curve_two = train_copier(layers=2, steps=steps)
one_layer, curve_one = train_copier(layers=1, steps=steps)
for name, model in (("one_layer", one_layer), ("two_layers", copier)):
    check(f"attention/copy_{name}", copied(model))

# %% [markdown]
# The two numbers are the end; the curves show how it came.

# %% id="attention-train-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
ax.plot(curve_one, label="one layer", color="#D55E00", ls="--", lw=1.2)
ax.plot(curve_two, label="two layers", color="#0072B2", ls="-", lw=1.2)
ax.axhline(math.log(6), color="black", ls=":", lw=1,
           label="guessing among the six towns, ln 6")
ax.set(xlabel="step (64 texts each)", ylabel="loss (nats per town)", ylim=(0, 3.6))
ax.legend()
show(fig, "Both models soon guess among the six towns of the text; then the model with "
          "two layers discovers copying and its loss drops to zero, while one layer "
          "stays at the guess.")

# %% [markdown]
# One layer cannot do it. The key of Foxhollow is made from the vectors of Foxhollow and its place: nothing in it says *Garus*. Two layers
# can work together. The first lets every town look at the word before it and note down the name. The second matches the
# asked name with these notes. Such a pair is called an *induction* circuit. In large language models it appears in
# one sudden step, as here, together with the ability to learn from the prompt (Olsson et al. 2022). You will need it
# in chapter 11: to answer a question about Garus, a chat model must carry the name from the question to the answer.
#
# ## 4.10 Attention maps
#
# If this story is true, we must see it. Take one held-out text and ask each layer for its shares.

# %% id="attention-maps"
@torch.no_grad()
def attention_maps(model, ids):
    """Shares of attention of every layer, (layers, H, T, T), for one text ids (T,)."""
    x, maps = model.words(ids[None]) + model.places.weight[: len(ids)], []
    for norm, layer in zip(model.norms, model.layers):
        maps.append(layer.weights(norm(x))[0])
        x = x + layer(norm(x))
    return torch.stack(maps).cpu()

text = held_out[0]
maps = attention_maps(copier, text.to(chapter.device))
assert torch.allclose(maps.sum(dim=-1), torch.ones(maps.shape[:3]), atol=1e-5)

# %% [markdown]
# Two numbers for each head. *Previous*: the share that towns give to the word just before them. *Induction*: the share that an
# asked name gives to the right town in the introductions.

# %% id="attention-head-scores"
towns = torch.arange(1, 12, 2)  # the introductions
# where the right town stands
answer = torch.stack([(text[:12] == text[a + 1]).nonzero()[0, 0] for a in ASKED])
previous = maps[:, :, towns, towns - 1].mean(dim=-1)
induction = maps[:, :, ASKED, answer].mean(dim=-1)

# %% id="attention-head-scores-figure"
fig, ax = plt.subplots(figsize=(7, 2.5))
names = [f"layer {l}\nhead {h}" for l in range(2) for h in range(4)]
ax.bar([i - 0.2 for i in range(8)], previous.flatten(), width=0.4, color="#56B4E9",
       edgecolor="black", label="previous: town to its name")
ax.bar([i + 0.2 for i in range(8)], induction.flatten(), width=0.4, color="#D55E00",
       edgecolor="black", hatch="//", label="induction: asked name to the right town")
ax.set(xticks=range(8), xticklabels=names, ylabel="share of attention", ylim=(0, 1.3),
       yticks=(0, 0.5, 1))
ax.legend(ncols=2, loc="upper center")
show(fig, "The work is divided: heads of layer 0 look from each town to the name "
          "before it, heads of layer 1 look from an asked name to the right town.")

# %% [markdown]
# The numbers as metrics: the best head of each kind, in the layer where the story puts it.

# %% id="attention-head-scores-check"
for name, scores in (("previous", previous[0]), ("induction", induction[1])):
    check(f"attention/{name}_head", scores.max().item())

# %% [markdown]
# And the two heads themselves. Each row is a word; dark cells are where it looks.

# %% id="attention-map-draw"
def draw_map(ax, layer, head):
    ax.imshow(maps[layer, head], vmin=0, vmax=1, cmap="Greys")
    ax.set(title=f"layer {layer}, head {head}", xticks=range(24), yticks=range(24),
           xlabel="looks at")
    ax.set_xticklabels([WORDS[i] for i in text], rotation=90, fontsize=7)
    ax.set_yticklabels([WORDS[i] for i in text], fontsize=7)
    ax.grid(False)

# %% id="attention-map-figure"
best = [(0, previous[0].argmax().item()), (1, induction[1].argmax().item())]
fig, axes = plt.subplots(1, 2, figsize=(8.4, 4.4))
for ax, (layer_number, head) in zip(axes, best):
    draw_map(ax, layer_number, head)
axes[1].scatter(answer, ASKED, s=60, facecolors="none", edgecolors="#D55E00",
                linewidths=1.5)
show(fig, "The best head of each layer on one text: on the left, towns look one word "
          "back; on the right, each asked name looks at the town that was introduced "
          "with it (circles).")

# %% [markdown]
# Choose a layer and a head yourself. (On a page without a kernel you see only the figure above.)

# %% id="attention-map-widget" tags=["widget"]
def look(layer, head):
    fig, ax = plt.subplots(figsize=(4.6, 4.6))
    draw_map(ax, layer, head)
    show(fig, f"Shares of attention in layer {layer}, head {head}.")

try:
    from ipywidgets import IntSlider, interact
    interact(look, layer=IntSlider(value=1, min=0, max=1),
             head=IntSlider(value=best[1][1], min=0, max=3))
except ImportError:
    print("pip install ipywidgets shows two sliders here")

# %% [markdown]
# **Try it.** Switch off one head at a time (set its columns of `o_proj.weight` to zero) and draw the share copied. Is it the heads with the high scores that matter?
#
# **Exercise 4.9 (15 min, ★★): `alibi_bias`** in [workbook 4](../exercises/04_attention.ipynb). Order without position vectors: a penalty that grows with the distance (Press et al. 2021).
#
# ## 4.11 What leaks without the mask
#
# Now train the same model with a mask that allows everything. In training, the word at $t+1$ is part of the input.

# %% id="attention-leak-train"
everything = torch.ones(24, 24, dtype=torch.bool, device=chapter.device)
leaky, curve_leaky = train_copier(2, chapter.steps(chapter.size.leak_steps),
                                  attention_mask=everything)
in_view = copied(leaky, everything)

# %% [markdown]
# That number is what a training log would show. When the model must **write**, the future does not exist yet: give it the text up to the
# asked name, and nothing more.

# %% id="attention-leak-write"
def copied_writing(model, attention_mask=None):
    """As `copied`, but the text is cut off after each name that is asked for."""
    right = []
    for a in ASKED.tolist():
        mask = None if attention_mask is None else attention_mask[: a + 1, : a + 1]
        with torch.no_grad():
            best = model(held_out[:, : a + 1].to(chapter.device),
                         mask)[:, -1].argmax(dim=-1).cpu()
        right.append((best == held_out[:, a + 1]).float().mean().item())
    return sum(right) / len(right)

writing = copied_writing(leaky, everything)
print(f"the future in view: {in_view:.0%} right; when writing: {writing:.0%}. With the "
      f"causal mask: {copied(copier):.0%} and {copied_writing(copier):.0%}")

# %% id="attention-leak-figure"
fig, axes = plt.subplots(1, 2, figsize=(7, 2.7), width_ratios=(1.6, 1))
axes[0].plot(curve_two, label="causal mask", color="#0072B2", ls="-", lw=1.2)
axes[0].plot(curve_leaky, label="no mask", color="#D55E00", ls="--", lw=1.2)
axes[0].set(xlabel="step", ylabel="training loss (nats)", xlim=(0, 250), ylim=(0, 3.6))
axes[0].legend()
bars = axes[1].bar(["causal", "no mask"], [copied_writing(copier), writing],
                   color=["#0072B2", "#D55E00"], edgecolor="black")
axes[1].bar_label(bars, fmt="{:.0%}")
axes[1].set(ylabel="right when writing", ylim=(0, 1.15))
show(fig, "Without a mask the training loss falls sooner and looks better (left), but "
          "the model has only learned to read the answer, and fails when it must write "
          "(right).")

# %% id="attention-leak-check"
for name, share in (("in_view", in_view), ("writing", writing)):
    check(f"attention/leak_{name}", share)

# %% [markdown]
# The rule: **a training loss that is too good is a leak until shown otherwise.** The causality test of 4.7 finds it before training.
#
# ## 4.12 Where it breaks
#
# **A mask off by one.** `tril(1)` instead of `tril(0)` shows each position exactly one word too many: the very word that it
# must predict. It is as bad as no mask.

# %% id="attention-off-by-one"
off_by_one = torch.ones(10, 10, dtype=torch.bool).tril(1)
assert leaks(lambda x: layer(x, attention_mask=off_by_one),
             x), "the causality test must find a mask that is off by one"

# %% [markdown]
# **A row without any key.** `tril(-1)` hides the first position from everything. A softmax over nothing is NaN, and one NaN spreads to every weight at the next step.
# It happens in practice with padding at the left (chapter 10): a padded position must be allowed to look at something, for example at itself.

# %% id="attention-empty-row"
q3, k3 = torch.randn(2, 1, 1, 3, 4)
nothing = attention_weights(q3, k3, torch.ones(3, 3, dtype=torch.bool).tril(-1))
print(nothing[0, 0, 0])
assert nothing[0, 0, 0].isnan().all()

# %% [markdown]
# **`is_causal` with a cache.** torch counts its causal mask from the *first* key. With two new queries and six keys, the first query would see
# only key 0 instead of keys 0 to 4. That is why the layer builds `causal_mask(T, S)` itself. With the identity matrix as values, the output shows the shares.

# %% id="attention-top-left"
q2, k6 = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 6, 8)
identity = torch.eye(6)[None, None]
by_torch = F.scaled_dot_product_attention(q2, k6, identity, is_causal=True)[0, 0, 0]
by_us = attention(q2, k6, identity, attention_mask=causal_mask(2, 6))[0, 0, 0]
print("keys seen by the first new query: torch", (by_torch > 0).sum().item(), "ours",
      (by_us > 0).sum().item())
assert (by_torch > 0).sum() == 1 and (by_us > 0).sum() == 5

# %% [markdown]
# **Exercise 4.10 (20 min, ★★★): `reach`** in [workbook 4](../exercises/04_attention.ipynb). Predict how far back four layers with a window of 8 can look, then measure it with gradients.
#
# **Order is invisible.** One thing attention cannot do at all. Without a mask and without the table of places, shuffle the words: each
# word gets the same output as before. To attention, a text is a bag.

# %% id="attention-order"
shuffle = torch.randperm(10)
full = torch.ones(10, 10, dtype=torch.bool)
assert torch.allclose(layer(x, attention_mask=full)[:, shuffle],
                      layer(x[:, shuffle], attention_mask=full), atol=1e-6)

# %% [markdown]
# `Copier` has a table with a vector for each place. It has 24 rows, and a 25th place does not exist. Nothing in the table says that places 3 and 4 are
# as near to each other as 13 and 14. Chapter 5 replaces it.
#
# ## Recap
#
# - Attention: compare a query with all keys, turn scores into shares, mix the values. Dividing by $\sqrt{D}$ keeps the shares soft.
# - The causal mask sets forbidden scores to minus infinity; the causality test proves it, and a loss that is too good is a leak.
# - Heads attend separately; grouped queries share keys and values among heads and cut the cache.
# - Our function equals the fused kernel in value and gradient; the kernel keeps memory in proportion to $T$.
# - Copying needs two layers: one writes down the previous word, one finds it. You saw both heads.
#
# **Words:** query, key, value, score, share of attention, head, causal mask, grouped queries, fused kernel, induction head.
#
# **Exercises:** 4.1 to 4.10, in place above, with checks in [workbook 4](../exercises/04_attention.ipynb).
#
# **Sources:** Vaswani et al. 2017, *Attention Is All You Need* (arXiv:1706.03762); Shazeer 2019, *Fast Transformer Decoding* (arXiv:1911.02150);
# Dao et al. 2022, *FlashAttention* (arXiv:2205.14135); Ainslie et al. 2023, *GQA* (arXiv:2305.13245); Elhage et al. 2021, *A Mathematical Framework for
# Transformer Circuits* (transformer-circuits.pub); Olsson et al. 2022, *In-context Learning and Induction Heads* (arXiv:2209.11895).
# Read next: Olsson et al., for what the sudden step looks like in large models. Then chapter 5.
