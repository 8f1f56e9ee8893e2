# %% [markdown]
# # 5. Rotary positions
#
# Attention does not know order. At the end of this chapter you will have given it order by **turning** queries and keys, shown that only
# distances matter then, written both layouts in which published models store it, and stretched a trained model to texts ten times as
# long as any that it was trained on.
#
# You need: chapter 4, and sine and cosine from school.
#
# Reading 25 minutes; running: smoke 10 s, cpu 40 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="rope-default-exp"
#| default_exp rope

# %% [markdown]
# The idea in one picture: a pair of numbers is an arrow. At every position, turn the arrow a little further. Two arrows that are three
# positions apart then always differ by the same angle, wherever in the text they stand.

# %% id="rope-picture"
import math

import matplotlib.pyplot as plt

fig, axes = plt.subplots(1, 6, figsize=(7, 1.7))
for position, ax in enumerate(axes):
    for start, colour, style in ((0.4, "#0072B2", "-"),
                                 (0.4 + 0.5 * 3, "#D55E00", "--")):
        angle = start + 0.5 * position
        ax.annotate("", (math.cos(angle), math.sin(angle)), (0, 0),
                    arrowprops={"arrowstyle": "->", "lw": 2, "color": colour,
                                "ls": style})
    ax.add_patch(plt.Circle((0, 0), 1, fill=False, ec="0.7"))
    ax.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal",
           title=f"{position} and {position + 3}")
    ax.axis("off")
show(fig, "A key (solid) at positions 0 to 5 and a query (dashed) three positions "
          "later: both turn, the angle between them stays.")

# %% [markdown]
# ## 5.1 A question that the table of places left open
#
# The model of chapter 4 had a table: one vector for each place, learned. Here are its texts again: six people with their towns, then six
# questions. The model has one switch, so that we can compare two ways to tell it about places.

# %% id="rope-texts"
import torch
import torch.nn.functional as F
from torch import nn

from minimind.attention import Attention

def make_texts(count, generator, questions=6):
    """Six pairs (name, town), then questions: ids (count, 12 + 2 * questions)."""
    who = torch.rand(count, 16, generator=generator).argsort(dim=1)[:, :6]
    where = torch.rand(count, 16, generator=generator).argsort(dim=1)[:, :6] + 16
    order = torch.cat((torch.arange(6).expand(count, 6),
                       torch.randint(6, (count, questions), generator=generator)),
                       dim=1)
    return torch.stack((who.gather(1, order), where.gather(1, order)),
                       dim=-1).flatten(1)

# %% [markdown]
# The model, with the switch. A rotation is handed to every layer; chapter 4 left the door `rotate` open for it.

# %% id="rope-copier"
class Copier(nn.Module):
    """Two layers of attention; with `rotation`, there is no table of places."""

    def __init__(self, rotation=None):
        super().__init__()
        self.words, self.places = nn.Embedding(32, 64), nn.Embedding(256, 64)
        self.rotation = rotation
        self.layers = nn.ModuleList(Attention(64, 4, 2, 32) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(64) for _ in range(3))
        self.head = nn.Linear(64, 32, bias=False)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, ids, positions):
        x = self.words(ids)
        if not self.rotation:
            x = x + self.places(positions)
        rotate = self.rotation(positions) if self.rotation else None
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x), rotate=rotate)
        return self.head(self.norms[-1](x))

# %% [markdown]
# The training is that of chapter 4, on positions 0 to 23.

# %% id="rope-train"
def train_copier(rotation=None):
    torch.manual_seed(0)
    threads, steps = torch.get_num_threads(), chapter.steps(chapter.size.steps)
    torch.set_num_threads(1)  # the model is too small for two cores
    generator, asked = torch.Generator().manual_seed(0), torch.arange(12, 24, 2)
    model = Copier(rotation).to(chapter.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 20,
                                     (steps - step) / (0.25 * steps))
        ids = make_texts(64, generator).to(chapter.device)
        logits = model(ids, torch.arange(24, device=chapter.device))[:, asked]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, asked + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model

# %% [markdown]
# And the score: the share of asked towns named correctly, with the whole text moved by `shift` positions.

# %% id="rope-copied"
@torch.no_grad()
def copied(model, shift=0, questions=6):
    """Share right for each question, averaged over held-out texts: (questions,)."""
    ids = make_texts(chapter.size.texts, torch.Generator().manual_seed(1),
                     questions).to(chapter.device)
    positions = shift + torch.arange(ids.shape[1], device=chapter.device)
    best = model(ids, positions)[:, 12::2].argmax(dim=-1)
    return (best == ids[:, 13::2]).float().mean(dim=0).cpu()

# %% [markdown]
# **Predict:** the same text, read 3, 10 or 100 positions later, as if other words had come before it. What does the table do?

# %% id="rope-table-shift"
table = train_copier()
for shift in (0, 3, 10, 100):
    print(f"moved by {shift:3}: {copied(table, shift).mean():.0%} right")

# %% [markdown]
# A shift of three is enough to spoil it. Places that were never seen in training have vectors of noise, and after its last row the table has
# nothing at all. We want the opposite: what matters is not *where* two words are, but **how far apart**.
#
# ## 5.2 Turn one pair
#
# Take a vector of two numbers $(a, b)$ and turn it by an angle $\varphi$: $(a \cos\varphi - b \sin\varphi,\; a \sin\varphi + b \cos\varphi)$.

# %% id="rope-turn"
def turn(pair, angle):
    a, b = pair
    return torch.tensor([a * math.cos(angle) - b * math.sin(angle),
                         a * math.sin(angle) + b * math.cos(angle)])

assert torch.allclose(turn(torch.tensor([1.0, 0.0]), math.pi / 2),
                      torch.tensor([0.0, 1.0]), atol=1e-6)  # a quarter turn
assert abs(turn(torch.tensor([3.0, 4.0]), 0.7).norm() - 5) < 1e-5  # the length stays

# %% [markdown]
# Rotary position embedding (Su et al. 2021) turns the pair at position $m$ by $m\,\theta$: position 0 not at all, position 1 by $\theta$,
# position 2 by $2\theta$. Draw one pair.

# %% id="rope-turn-figure"
fig, ax = plt.subplots(figsize=(3.4, 3.4))
for m in range(6):
    x, y = turn(torch.tensor([0.9, 0.3]), 0.5 * m).tolist()
    ax.annotate("", (x, y), (0, 0),
                arrowprops={"arrowstyle": "->", "lw": 2, "color": "#0072B2",
                            "alpha": 1 - 0.12 * m})
    ax.text(1.12 * x, 1.12 * y, f"m = {m}", ha="center", va="center", fontsize=9)
ax.add_patch(plt.Circle((0, 0), 0.949, fill=False, ec="0.7"))
ax.set(xlim=(-1.3, 1.3), ylim=(-0.5, 1.3), xlabel="first number of the pair",
       ylabel="second number", aspect="equal")
show(fig, "The pair (0.9, 0.3) at positions 0 to 5, turned by 0.5 radians for each "
          "position: the direction changes, the length does not.")

# %% [markdown]
# ## 5.3 Only the distance counts
#
# Turn the query at $m$ and the key at $n$, and take their dot product. Turning both arrows by the same angle does not change the angle between
# them, so the score depends on $m - n$ alone. **Do this by hand:** with $q = k = (1, 0)$ the score is $\cos(m\theta - n\theta)$. Check it, then check any pair at all.

# %% id="rope-relative-pair"
q, k, theta = torch.tensor([0.9, 0.3]), torch.tensor([-0.2, 0.8]), 0.5

def score(m, n, q=q, k=k):
    return (turn(q, m * theta) @ turn(k, n * theta)).item()

assert abs(score(5, 3, q=torch.tensor([1.0, 0.0]), k=torch.tensor([1.0, 0.0]))
           - math.cos(2 * theta)) < 1e-6
print(f"positions 5 and 3: {score(5, 3):.5f}   12 and 10: {score(12, 10):.5f}   102 "
      f"and 100: {score(102, 100):.5f}   5 and 4: {score(5, 4):.5f}")
assert abs(score(5, 3) - score(102, 100)) < 1e-5

# %% [markdown]
# All scores of a short text at once show it best: along each diagonal, where $m - n$ is constant, the colour is constant.

# %% id="rope-diagonals-figure"
grid = torch.tensor([[score(m, n) for n in range(16)] for m in range(16)])
fig, ax = plt.subplots(figsize=(3.8, 3.1))
image = ax.imshow(grid, cmap="cividis")
fig.colorbar(image, ax=ax, label="score")
ax.set(xlabel="key position n", ylabel="query position m")
ax.grid(False)
show(fig, "Scores of one query and one key placed at all positions: every diagonal has "
          "one colour, so only the distance counts.")
assert all((grid.diagonal(d) - grid.diagonal(d)[0]).abs().max() < 1e-5
           for d in range(-15, 16))

# %% [markdown]
# **Try it.** Queries and keys are turned, values are not. What would happen to the output of attention if values were turned too? Predict, then try.
#
# ## 5.4 Many pairs, many speeds
#
# One pair is a clock with one hand: after a full turn, distances repeat. So a head of width $D$ has $D/2$ pairs that turn at different speeds,
# $\theta_i = \text{base}^{-2i/D}$. The first turns by one radian for each position, the last by little more than 1/base.

# %% id="rope-speeds"
base, D = 100.0, 32
speeds = base ** -(torch.arange(0, D, 2) / D)  # (D/2,), radians for each position
print("first", speeds[0].item(), " last", round(speeds[-1].item(), 4),
      " positions for a full turn:", [round(x)
                                      for x in (2 * math.pi / speeds)[::3].tolist()])
assert speeds[0] == 1 and len(speeds) == D // 2

# %% [markdown]
# The same as periods, for three bases:

# %% id="rope-wavelength-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
for b, marker in ((100, "o"), (10_000, "s"), (1_000_000, "^")):
    ax.plot(2 * math.pi * b ** (torch.arange(0, D, 2) / D), marker=marker, ms=4,
            label=f"base {b:,}")
ax.axhline(24, color="black", lw=1, ls=":")
ax.text(15.2, 27, "our texts: 24", ha="right", fontsize=9)
ax.set(yscale="log", xlabel="pair i", ylabel="positions for one turn")
ax.legend()
show(fig, "Each pair is a clock with its own period: the first turns once in 6 "
          "positions for any base; a larger base makes the last ones slower.")

# %% [markdown]
# We take a base of 100, since our texts have 24 positions. Large models take 10,000 (Su et al.) to 1,000,000 and more, for long texts.
#
# Cosines and sines are computed once for a batch and used in every layer.

# %% id="rope-imports"
#| export
import math

import torch

# %% id="rope-cos-sin"
#| export
def rope_cos_sin(
    positions: torch.Tensor, inv_freq: torch.Tensor, attention_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position times frequency, each (..., T, D).

    `positions` is (T,) or (B, T). The D/2 angles stand twice in a row, as the
    half-split layout needs. Computed in float32: bfloat16 has not all whole numbers
    above 256, so positions in it would fall together.
    """
    angles = positions[..., None].float() * inv_freq  # (..., T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (..., T, D)
    return angles.cos() * attention_factor, angles.sin() * attention_factor

# %% [markdown]
# The comment on bfloat16 is worth seeing, because half precision is where people lose positions without an error. How many different
# positions are left of 1,024?

# %% id="rope-bfloat16"
print(torch.arange(1024).to(torch.bfloat16).unique().numel(),
      "of 1024 positions differ in bfloat16")
assert torch.arange(1024).to(torch.bfloat16).unique().numel() < 600

# %% [markdown]
# ## 5.5 Two layouts, one rotation
#
# Which two channels are a pair? The paper pairs neighbours: (0, 1), (2, 3), and so on. Llama's and Qwen's weights at Hugging Face pair channel $i$ with $i + D/2$:
# the first half holds every $a$, the second half every $b$. Then a turn needs no reshuffling: $x \cos + \mathrm{rot}(x) \sin$, where rot swaps the halves and negates one.

# %% id="rope-apply"
#| export
def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a) for the halves a, b: a quarter turn of every pair."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (B, H, T, D) by its positions; cos and sin are (T, D) or (B, T, D).

    Half-split layout, as Hugging Face: channel i is paired with channel i + D/2.
    """
    cos, sin = (t.unsqueeze(-3).to(x.dtype) for t in (cos, sin))  # (..., 1, T, D)
    return x * cos + rotate_half(x) * sin

# %% [markdown]
# The formula of 5.2 must be in it, and the facts of 5.3 must hold for a whole head: lengths stay, and moving everything changes no score.

# %% id="rope-apply-check"
x = torch.randn(1, 1, 24, D)
cos, sin = rope_cos_sin(torch.arange(24), speeds)
turned = apply_rope(x, cos, sin)
assert torch.allclose(turned[0, 0, 7, [3, 3 + D // 2]],
                      turn(x[0, 0, 7, [3, 3 + D // 2]], 7 * speeds[3].item()),
                      atol=1e-5)
assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-4)

# %% [markdown]
# Now move a text of 24 positions as a whole, by up to 1,000. The angles are float32 numbers, so a little rounding grows with the position.

# %% id="rope-shift-fact"
queries, keys = torch.randn(2, 1, 2, 24, D)
def scores_at(shift):
    cos, sin = rope_cos_sin(shift + torch.arange(24), speeds)
    return apply_rope(queries, cos, sin) @ apply_rope(keys, cos, sin).transpose(-2, -1)
for shift in (1, 100, 1000):
    print(f"moved by {shift:4}: largest change of a score "
          f"{(scores_at(shift) - scores_at(0)).abs().max():.1e}")
    assert torch.allclose(scores_at(shift), scores_at(0), atol=2e-3)

# %% [markdown]
# Now the layout of the paper, with neighbours as pairs. It does the same to other channels.

# %% id="rope-interleaved"
#| export
def apply_rope_interleaved(x: torch.Tensor, cos: torch.Tensor,
                           sin: torch.Tensor) -> torch.Tensor:
    """Turn x (B, H, T, D) by its positions; channel 2i is paired with 2i + 1.

    Takes the same cos and sin (..., T, D) as `apply_rope`; the angles of the pairs are
    their first half.
    """
    cos, sin = (t[..., : x.shape[-1] // 2].unsqueeze(-3).to(x.dtype)
                for t in (cos, sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

# %% [markdown]
# Between them lies one permutation of the channels: evens first, then odds.

# %% id="rope-permutation"
evens_first = torch.cat((torch.arange(0, D, 2), torch.arange(1, D, 2)))
print(evens_first.tolist())
assert torch.allclose(apply_rope_interleaved(x, cos, sin)[..., evens_first],
                      apply_rope(x[..., evens_first], cos, sin), atol=1e-6)

# %% [markdown]
# A dot product does not care about the order of channels, as long as queries and keys have the same. So a model can move from one layout to the other: permute the
# rows of `q_proj` and `k_proj`, head by head. The conversion of Meta's Llama files to Hugging Face's needs this step.

# %% id="rope-layouts"
#| export
def to_half_split(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q_proj or k_proj (heads * D, C), interleaved to half-split."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q_proj or k_proj (heads * D, C), half-split to interleaved."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)

# %% [markdown]
# There and back must give the same numbers, and the first head must have its even rows first.

# %% id="rope-layouts-check"
weight = torch.randn(4 * D, 64)  # a q_proj with four heads
assert torch.equal(to_half_split(weight, D)[:D], weight[evens_first])
assert torch.equal(to_interleaved(to_half_split(weight, D), D), weight)

# %% [markdown]
# **Exercise 5.1 (10 min, ★): `rope_cos_sin`** in [workbook 5](../exercises/05_rope.ipynb). The table of angles, from positions of any shape.
#
# **Exercise 5.2 (15 min, ★★): `apply_rope`** in [workbook 5](../exercises/05_rope.ipynb). Turn the pairs; either layout passes, and the check says which one it is.
#
# **Exercise 5.3 (15 min, ★★): `layouts`** in [workbook 5](../exercises/05_rope.ipynb). Convert weights from one layout to the other and back.
#
# **Exercise 5.7 (10 min, ★★): `scores_of_new`** in [workbook 5](../exercises/05_rope.ipynb). Scores with a cache, in a colleague's version. Two bugs; the shift test of this chapter finds one.
#
# **Exercise 5.8 (10 min, ★): `partial_rope`** in [workbook 5](../exercises/05_rope.ipynb). GPT-NeoX turns only some of the channels. So do you.
#
# ## 5.6 Long range and the base
#
# Let a query and a key be equal in all pairs, and move them apart. The score is a sum of cosines. Near zero they agree; far away they cancel. How slowly depends on the base.

# %% id="rope-decay"
def agreement(base, distances, D=64):
    """Mean of cos(distance * speed) over all pairs: the score of two equal vectors."""
    speeds = base ** -(torch.arange(0, D, 2) / D)
    return (distances[:, None] * speeds).cos().mean(dim=1)

distances = torch.arange(0, 4096)
assert agreement(1e4, distances)[0] == 1
assert agreement(1e6, distances)[1000:].mean() > agreement(1e2, distances)[1000:].mean()

# %% [markdown]
# Drawn over distances from 0 to 4,095, on a logarithmic axis:

# %% id="rope-decay-figure"
def draw_decay(ax, base, **style):
    ax.plot(distances, agreement(base, distances), lw=1.3, **style)
    ax.set(xscale="symlog", xlabel="distance (positions)", ylabel="agreement",
           ylim=(-0.4, 1.05), xlim=(0, 4096))

fig, ax = plt.subplots(figsize=(7, 2.8))
for base_shown, style in ((1e2, "-"), (1e4, "--"), (1e6, ":")):
    draw_decay(ax, base_shown, ls=style, label=f"base {base_shown:,.0f}")
ax.legend()
show(fig, "Two equal vectors agree less the further apart they stand; a larger base "
          "stretches the curve to longer distances.")

# %% [markdown]
# Move the base yourself. (Without a kernel, the figure above has to do.)

# %% id="rope-widget" tags=["widget"]
def explore(log10_base=4.0):
    fig, ax = plt.subplots(figsize=(6, 2.6))
    draw_decay(ax, 10**log10_base, color="#0072B2")
    show(fig, f"Agreement of two equal vectors over their distance, base "
              f"{10**log10_base:,.0f}.")

try:
    from ipywidgets import FloatSlider, interact
    interact(explore, log10_base=FloatSlider(value=4.0, min=1.0, max=7.0, step=0.5,
                                             description="log10 base",
                                             continuous_update=False))
except ImportError:
    print("pip install ipywidgets shows a slider here")

# %% [markdown]
# **Exercise 5.6 (10 min, ★★): `smallest_base`** in [workbook 5](../exercises/05_rope.ipynb). A model must tell apart distances up to 8,000. Which base does it need? On paper, then checked.
#
# **Exercise 5.9 (20 min, ★★): `agreement`** in [workbook 5](../exercises/05_rope.ipynb). Predict how much further equal vectors agree with a base a hundred times as large, then measure.
#
# ## 5.7 Back to the question
#
# Train the copier again, now without a table: queries and keys are turned in every layer.

# %% id="rope-train-rotary"
frequencies = {"inv_freq": speeds, "attention_factor": 1.0}  # changed in 5.8

def rotation(positions):
    cos, sin = rope_cos_sin(positions, frequencies["inv_freq"].to(positions.device),
                            frequencies["attention_factor"])
    return lambda q, k: (apply_rope(q, cos, sin), apply_rope(k, cos, sin))

rotary = train_copier(rotation)

# %% [markdown]
# Move the text by ever more, for both models:

# %% id="rope-shift-figure"
shifts = [0, 1, 3, 10, 30, 100, 200]
right = {name: [copied(model, shift).mean().item() for shift in shifts]
         for name, model in (("table", table), ("rotary", rotary))}
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.plot(range(7), right["rotary"], marker="o", label="rotary")
ax.plot(range(7), right["table"], marker="s", label="table of places")
ax.axhline(1 / 6, color="black", lw=1, ls=":")
ax.set(xticks=range(7), xticklabels=shifts, xlabel="whole text moved by (positions)",
       ylabel="share copied", ylim=(0, 1.08))
ax.legend(loc="center right")
show(fig, "Move the whole text: the model with rotary positions does not notice, the "
          "one with a table of places fails (the dotted line is a guess among six).")

# %% [markdown]
# As numbers, moved by 100 positions:

# %% id="rope-shift-check"
for name in right:
    check(f"rope/moved_{name}", right[name][-2])  # moved by 100

# %% [markdown]
# ## 5.8 Longer than trained
#
# Moving is free. What about texts that are **longer**: more questions after the same six introductions, so that an answer may lie 250 positions back, while training never went beyond 23?

# %% id="rope-longer"
questions = chapter.size.long_questions
plain = copied(rotary, questions=questions)
print(f"first 6 questions {plain[:6].mean():.0%}, last 6 questions "
      f"{plain[-6:].mean():.0%} right, {11 + 2 * questions} positions in all")

# %% [markdown]
# The slow pairs have now turned to angles that they never had in training. Three remedies change the speeds and leave the weights alone. All are known by the names in Hugging Face's `rope_scaling`:
#
# - **linear** (Chen et al. 2023): divide every speed by a factor. Every angle is again one that was seen, but neighbours are now closer than ever.
# - **dynamic**, the NTK-aware way: raise the base instead, so that the slowest pair is slowed by the factor and the fastest not at all.
# - **yarn** (Peng et al. 2023): keep pairs that made many turns within the trained length, slow down those that made less than one, blend in between, and sharpen the scores a little.

# %% id="rope-yarn"
#| export
def yarn_ramp(head_dim: int, theta: float, trained_length: int, beta_fast: float = 32,
              beta_slow: float = 1) -> torch.Tensor:
    """Share of interpolation for each pair, (D/2,), from 0 (kept) to 1.

    1 divides the frequency by the factor. A pair that turns more than `beta_fast` times
    within the trained length is kept, one that turns less than `beta_slow` times is
    slowed down, and the share grows linearly in between (Peng et al. 2023,
    arXiv:2309.00071).
    """

    # the pair, as a fraction, that makes this many turns in the trained length
    def pair_with(turns: float) -> float:
        return head_dim * math.log(trained_length
                                   / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(beta_fast)), 0)
    high = min(math.ceil(pair_with(beta_slow)), head_dim - 1)
    high = high + 0.001 if low == high else high
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low)
            / (high - low)).clamp(0, 1)

# %% [markdown]
# One function gives the speeds for all of them. It is what the model of chapter 7 calls.

# %% id="rope-frequencies"
#| export
def rope_frequencies(head_dim: int, theta: float = 1e6, scaling: dict | None = None,
                     max_position_embeddings: int | None = None,
                     seq_len: int | None = None) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair, (D/2,) in radians, and the factor on cos, sin.

    `scaling` is Hugging Face's `rope_scaling`: {"rope_type": "linear" | "dynamic" |
    "yarn", "factor": ...}. "dynamic" needs the trained length
    (`max_position_embeddings`) and stretches only for a `seq_len` beyond it; "yarn"
    takes the trained length from `original_max_position_embeddings` in the dict, else
    from `max_position_embeddings`. Source: Su et al. 2021, arXiv:2104.09864. Raises
    ValueError for an unknown kind or a missing length.
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factor = scaling.get("factor", 1.0)
    original = scaling.get("original_max_position_embeddings")
    trained = max_position_embeddings or original if kind == "dynamic" else original or max_position_embeddings
    if kind not in ("default", "linear", "dynamic", "yarn"):
        raise ValueError(f"rope_scaling kind {kind!r} is unknown: use default, linear, "
                         "dynamic or yarn")
    if kind in ("dynamic", "yarn") and not trained:
        raise ValueError(f"rope_scaling kind {kind!r} needs the length that the model "
                         "was trained with: pass max_position_embeddings")
    if kind == "dynamic":
        stretch = factor * max(seq_len or trained, trained) / trained - (factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    inv_freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32)
                          / head_dim)  # (D/2,)
    if kind == "linear":
        return inv_freq / factor, 1.0
    if kind == "yarn":
        ramp = yarn_ramp(head_dim, theta, trained, scaling.get("beta_fast") or 32,
                         scaling.get("beta_slow") or 1)
        default_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        mixed = inv_freq * (1 - ramp) + inv_freq / factor * ramp
        return mixed, scaling.get("attention_factor") or default_factor
    return inv_freq, 1.0

# %% [markdown]
# Our texts grow from 24 positions to many more; the factor is the quotient.

# %% id="rope-remedies"
T = 12 + 2 * questions
factor = T / 24
remedies = {"plain": None, "linear": {"rope_type": "linear", "factor": factor},
            "dynamic": {"rope_type": "dynamic", "factor": 1.0},
            "yarn": {"rope_type": "yarn", "factor": factor,
                     "original_max_position_embeddings": 24}}
settings = {name: rope_frequencies(D, base, scaling, max_position_embeddings=24,
                                   seq_len=T) for name, scaling in remedies.items()}
assert torch.allclose(settings["plain"][0], speeds)

# %% [markdown]
# Before using them, see what each does to the speeds.

# %% id="rope-remedies-figure"
fig, ax = plt.subplots(figsize=(7, 2.7))
for (name, (inv_freq, _)), marker in zip(settings.items(), "os^d"):
    ax.plot(inv_freq / speeds, marker=marker, ms=4, label=name)
ax.set(xlabel="pair i (fast to slow)", ylabel="speed, relative to plain", yscale="log")
ax.legend(ncols=2)
show(fig, "Linear scaling slows every pair; dynamic and YaRN keep the fast pairs, "
          "which tell neighbours apart, and slow down the slow ones.")

# %% [markdown]
# Are they the remedies that others use? Hugging Face computes the same numbers from the same dictionaries.

# %% id="rope-hugging-face"
try:
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name in ("linear", "dynamic", "yarn"):
        config = Qwen3Config(hidden_size=4 * D, num_attention_heads=4, head_dim=D,
                             max_position_embeddings=24,
                             rope_parameters={**remedies[name], "rope_theta": base})
        more = {"seq_len": T} if name == "dynamic" else {}
        theirs, their_factor = ROPE_INIT_FUNCTIONS[name](config, **more)
        assert torch.allclose(settings[name][0], theirs, rtol=1e-5)
        assert abs(settings[name][1] - their_factor) < 1e-6
        print(f"{name:8} equals Hugging Face, factor on cos and sin {their_factor:.3f}")
except ImportError:
    print("pip install transformers to compare with Hugging Face")

# %% [markdown]
# **Predict** the order of the four on the long texts. The model is not trained any further.

# %% id="rope-longer-all"
long = {}
for name, (inv_freq, attention_factor) in settings.items():
    frequencies.update(inv_freq=inv_freq, attention_factor=attention_factor)
    long[name] = copied(rotary, questions=questions)
    check(f"rope/long_{name}", long[name][-6:].mean().item())
frequencies.update(inv_freq=speeds, attention_factor=1.0)

# %% [markdown]
# The whole way, question by question (means of six questions):

# %% id="rope-longer-figure"
fig, ax = plt.subplots(figsize=(7, 3))
for name, marker in zip(long, "os^d"):
    smooth = F.avg_pool1d(long[name][None, None], 6, 6)[0, 0]
    ax.plot(15 + 12 * torch.arange(len(smooth)), smooth, marker=marker, ms=3,
            label=name)
ax.axvline(24, color="black", lw=1, ls=":")
ax.set(xlabel="position of the question (trained up to the dotted line)",
       ylabel="share copied", ylim=(0, 1.05))
ax.legend(loc="lower left", ncols=2)
show(fig, "Far beyond the trained length, plain rotation forgets how to copy; dynamic "
          "scaling and YaRN keep it, without any training; linear scaling spoils even "
          "short distances.")

# %% [markdown]
# Linear scaling fails from the first question on: the first layer must find *the word just before*, and linear scaling moves that word from a distance of one to a small fraction of one. Its authors use it together with some more
# training, which we leave out here. YaRN leaves the fast pairs alone, so neighbours stay neighbours.
#
# **Exercise 5.4 (20 min, ★★★): `yarn_ramp`** in [workbook 5](../exercises/05_rope.ipynb). Which pairs are slowed down, and by how much.
#
# **Exercise 5.5 (25 min, ★★★): `rope_frequencies`** in [workbook 5](../exercises/05_rope.ipynb). All four kinds of scaling; the check compares with the formulas of the papers.
#
# **Try it.** Set YaRN's `attention_factor` to 1 and compare on the last questions. Why might sharper scores help when there are more keys?
#
# ## 5.9 Where it breaks
#
# **Turning queries and keys in opposite ways.** One wrong sign, and the score depends on $m + n$ instead of $m - n$. Norms are kept and shapes are right. The shift test finds it.

# %% id="rope-wrong-sign"
def scores_wrong(shift):
    cos, sin = rope_cos_sin(shift + torch.arange(24), speeds)
    return apply_rope(queries, cos, sin) @ apply_rope(keys, cos, -sin).transpose(-2, -1)

print(f"moved by 5: largest change "
      f"{(scores_wrong(5) - scores_wrong(0)).abs().max():.1f}")
assert not torch.allclose(scores_wrong(5), scores_wrong(0), atol=0.1)

# %% [markdown]
# **The wrong layout.** The trained model, run with the other layout: the weights fit, nothing complains.

# %% id="rope-wrong-layout"
def interleaved_rotation(positions):
    cos, sin = rope_cos_sin(positions, speeds.to(positions.device))
    return lambda q, k: (apply_rope_interleaved(q, cos, sin),
                         apply_rope_interleaved(k, cos, sin))

rotary.rotation = interleaved_rotation
wrong = check("rope/wrong_layout", copied(rotary).mean().item())

# %% [markdown]
# Converted, the model is itself again. That is the whole repair.

# %% id="rope-converted"
with torch.no_grad():
    for layer in rotary.layers:
        for projection in (layer.q_proj, layer.k_proj):
            projection.weight.copy_(to_interleaved(projection.weight, D))
repaired = copied(rotary).mean().item()
print(f"wrong layout {wrong:.0%}, converted {repaired:.0%}")
assert abs(repaired - right["rotary"][0]) < 0.01

# %% [markdown]
# **Positions that restart.** With a cache (chapter 10) the next token is not at position 0, and in a padded batch (chapters 10 and 11) the first real token is not at the first place. Pass `positions`; do not count from the shape.
#
# **Try it.** Which of the checks in this chapter would pass if `rope_cos_sin` used degrees instead of radians?
#
# ## Recap
#
# - Rotary positions turn each pair of channels of queries and keys by position times speed. Lengths stay; scores depend on distances alone.
# - The pairs turn at speeds from 1 down to nearly 1/base: fast ones tell neighbours apart, slow ones reach far.
# - Two layouts hold the same rotation; a permutation of `q_proj` and `k_proj` rows leads from one to the other.
# - Beyond the trained length, YaRN kept a copying model right without training; plain rotation and linear scaling did not.
# - The shift test finds wrong signs, and a comparison of outputs finds wrong layouts. Norms and shapes find neither.
#
# **Words:** rotary position embedding, pair, base (theta), frequency, half-split and interleaved layout, extrapolation, NTK-aware scaling, YaRN.
#
# **Exercises:** 5.1 to 5.9, in place above, with checks in [workbook 5](../exercises/05_rope.ipynb).
#
# **Sources:** Su et al. 2021, *RoFormer* (arXiv:2104.09864); Chen et al. 2023, *Extending Context Window of Large Language Models via Positional Interpolation* (arXiv:2306.15595); Peng et al. 2023, *YaRN* (arXiv:2309.00071), which also tells the history of NTK-aware scaling. Read next: Press et al. 2022, *ALiBi* (arXiv:2108.12409), another way to length. Then chapter 6.
