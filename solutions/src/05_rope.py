# %% [markdown]
# # Workbook 5. Rotary positions
#
# You write the module `minimind.rope` yourself: the turn, both layouts, and the ways
# to stretch it to long texts. Then you find two bugs, turn only a part of the
# channels, and measure what the base does. About two hours; stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. Hints open one at a time. `solution("apply_rope")` shows
# that one solution and no other.
#
# Letters as in the chapter: T positions, D head width, so D/2 pairs; speeds are
# radians for each position.

# %% id="setup"
# (filled in by the build)

# %% id="w05-imports"
import math

import torch

# %% [markdown] exercise="rope_cos_sin"
# ## 1. The table of angles
#
# Pair $i$ at position $m$ turns by the angle $m\,\theta_i$. Give the cosine and the
# sine of all of them, times `attention_factor`. The $D/2$ angles of a position stand
# twice in a row: $(m\theta_0, \dots, m\theta_{D/2-1}, m\theta_0, \dots)$, because
# the layout of exercise 2 needs them so. (Section 5.4.)
#
# <details><summary>Hint 1: all angles at once</summary>
#
# Positions as a column, `(..., T, 1)`, times speeds as a row, `(D/2,)`.
#
# </details>
# <details><summary>Hint 2: precision</summary>
#
# Large positions in bfloat16 fall together. Make one of the factors float32 first,
# with `.float()`; the other then follows.
#
# </details>

# %% id="w05-rope-cos-sin" exercise="rope_cos_sin" points=2 minutes=10 difficulty=1 kind="rebuild"
def rope_cos_sin(
    positions: torch.Tensor, inv_freq: torch.Tensor, attention_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position times speed, each (..., T, D), in float32.

    `positions` is (T,) or (B, T), `inv_freq` has the speeds (D/2,).
    """
    ### BEGIN SOLUTION
    angles = positions[..., None].float() * inv_freq  # (..., T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (..., T, D)
    return angles.cos() * attention_factor, angles.sin() * attention_factor
    ### END SOLUTION

# %% id="w05-rope-cos-sin-check"
check("rope_cos_sin")

# %% [markdown] exercise="apply_rope"
# ## 2. The turn
#
# A pair $(a, b)$ turned by $\varphi$ is
# $(a \cos\varphi - b \sin\varphi,\; a \sin\varphi + b \cos\varphi)$. Turn every pair
# of `x`. Which two channels are a pair is your choice: $i$ and $i + D/2$
# (half-split, Hugging Face) or $2i$ and $2i + 1$ (interleaved, the paper). The check
# takes either, and says which one it sees. Only half-split fits the checkpoints of
# this course, so `keep()` saves only that. (Section 5.5.)
#
# <details><summary>Hint 1: shapes</summary>
#
# `x` is `(B, H, T, D)`; cos and sin are `(T, D)` or `(B, T, D)`. `unsqueeze(-3)` gives
# them a dimension for the heads. Take them to the type of `x`.
#
# </details>
# <details><summary>Hint 2: without a loop</summary>
#
# Write the formula for the whole vector: every channel times its cosine, plus
# something times its sine. What is that something, in the first half and in the
# second? `chunk(2, dim=-1)` gives the halves.
#
# </details>

# %% id="w05-apply-rope" exercise="apply_rope" points=4 minutes=15 difficulty=2 kind="rebuild"
def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (B, H, T, D) by its positions; cos and sin are (T, D) or (B, T, D)."""
    ### BEGIN SOLUTION
    cos, sin = (t.unsqueeze(-3).to(x.dtype) for t in (cos, sin))  # (..., 1, T, D)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin
    ### END SOLUTION

# %% id="w05-apply-rope-check"
check("apply_rope")

# %% [markdown] exercise="layouts"
# ## 3. From one layout to the other
#
# A model that was trained with one layout works with the other one if the rows of its
# `q_proj` and `k_proj` are reordered, head by head. To half-split: within each head the
# even rows first, then the odd ones. With `head_dim` 6, the rows 0, 1, 2, 3, 4, 5 of a
# head become 0, 2, 4, 1, 3, 5. To interleaved: the way back. (Section 5.5.)
#
# <details><summary>Hint 1: give the rows two names</summary>
#
# The number of a row is (head, pair, which of the two) in the interleaved layout, and
# (head, which of the two, pair) in the other. So a swap of two dimensions does it.
#
# </details>
# <details><summary>Hint 2: tools</summary>
#
# `unflatten(0, (-1, D // 2, 2))` splits the first dimension into three;
# `flatten(0, 2)` joins three again.
#
# </details>

# %% id="w05-layouts" exercise="layouts" points=3 minutes=15 difficulty=2 kind="rebuild"
def to_half_split(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of q_proj (heads * D, C) from interleaved to half-split."""
    ### BEGIN SOLUTION
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    ### END SOLUTION


def to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of q_proj (heads * D, C) from half-split to interleaved."""
    ### BEGIN SOLUTION
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
    ### END SOLUTION

# %% id="w05-layouts-check"
check("layouts")

# %% [markdown] exercise="yarn_ramp"
# ## 4. YaRN's ramp
#
# Which pairs should be slowed down for a longer text? YaRN (Peng et al. 2023,
# arXiv:2309.00071) keeps those that turn often within the trained length $L$ (share
# 0), slows down those that turn less than once (share 1), and grows the share linearly
# in between. The pair that makes $r$ turns within $L$ is
# $$p(r) = \frac{D \ln\!\big(L / (2\pi r)\big)}{2 \ln \theta}$$
# The ramp goes from `low`, the floor of $p(\beta_{fast})$ but at least 0, to `high`,
# the ceiling of $p(\beta_{slow})$ but at most $D - 1$. Where both are equal, make
# `high` larger by 0.001, so that nothing is divided by zero. (Section 5.8.)
#
# <details><summary>Hint 1: a straight line</summary>
#
# A line that is 0 at `low` and 1 at `high` is `(i - low) / (high - low)`.
#
# </details>
# <details><summary>Hint 2: outside of the ramp</summary>
#
# `clamp(0, 1)`.
#
# </details>

# %% id="w05-yarn-ramp" exercise="yarn_ramp" points=3 minutes=20 difficulty=3 kind="rebuild"
def yarn_ramp(head_dim: int, theta: float, trained_length: int, beta_fast: float = 32,
              beta_slow: float = 1) -> torch.Tensor:
    """Share of slowing down for each pair, float32 (D/2,): 0 keeps, 1 slows down."""
    ### BEGIN SOLUTION
    def pair_with(turns: float) -> float:
        length = math.log(trained_length / (turns * 2 * math.pi))
        return head_dim * length / (2 * math.log(theta))

    low = max(math.floor(pair_with(beta_fast)), 0)
    high = min(math.ceil(pair_with(beta_slow)), head_dim - 1)
    high = high + 0.001 if low == high else high
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    return ((pairs - low) / (high - low)).clamp(0, 1)
    ### END SOLUTION

# %% id="w05-yarn-ramp-check"
check("yarn_ramp")

# %% [markdown] exercise="rope_frequencies"
# ## 5. The speeds
#
# The speed of pair $i$ is $\theta_i = \text{base}^{-2i/D}$. Give all of them, and the
# factor for cos and sin, for each kind of `scaling` that section 5.8 compares:
#
# - none (`None`): the speeds, factor 1.
# - `"linear"`: every speed divided by `factor`.
# - `"dynamic"`: the base is raised first, to
#   $\text{base} \cdot (f \cdot n / L - (f - 1))^{D/(D-2)}$, with $f$ the factor, $L$
#   the trained length (`max_position_embeddings`) and $n$ the length now (`seq_len`),
#   or $L$ where that is more or `seq_len` is not given.
# - `"yarn"`: plain where the ramp is 0, divided by `factor` where it is 1, blended
#   between. $L$ is `scaling["original_max_position_embeddings"]`, else
#   `max_position_embeddings`. The factor on cos and sin is
#   $0.1 \ln(\text{factor}) + 1$, unless `scaling` has an `attention_factor`.
#
# Raise `ValueError` for any other kind, and where `"dynamic"` or `"yarn"` has no $L$.
#
# <details><summary>Hint 1: where to begin</summary>
#
# Read the kind and the factor from the dict, then raise the errors. Only `"dynamic"`
# changes the base, so do that before you compute the speeds.
#
# </details>
# <details><summary>Hint 2: the exponents</summary>
#
# `torch.arange(0, head_dim, 2)` is $2i$ for all pairs.
#
# </details>

# %% id="w05-rope-frequencies" exercise="rope_frequencies" points=5 minutes=25 difficulty=3 kind="rebuild"
def rope_frequencies(head_dim: int, theta: float = 1e6, scaling: dict | None = None,
                     max_position_embeddings: int | None = None,
                     seq_len: int | None = None) -> tuple[torch.Tensor, float]:
    """Radians for each position of each pair, (D/2,), and the factor on cos and sin.

    `scaling` is Hugging Face's: {"rope_type": "linear", "factor": 4.0} and the like.
    """
    ### BEGIN SOLUTION
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factor, trained = scaling.get("factor", 1.0), max_position_embeddings
    if kind == "yarn":
        trained = scaling.get("original_max_position_embeddings") or trained
    if kind not in ("default", "linear", "dynamic", "yarn"):
        raise ValueError(f"rope_scaling kind {kind!r} is unknown")
    if kind in ("dynamic", "yarn") and not trained:
        raise ValueError(f"{kind} needs max_position_embeddings")
    if kind == "dynamic":
        stretch = factor * max(seq_len or trained, trained) / trained - (factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = theta**-exponents  # (D/2,)
    if kind == "linear":
        return inv_freq / factor, 1.0
    if kind == "yarn":
        ramp = yarn_ramp(head_dim, theta, trained, scaling.get("beta_fast") or 32,
                         scaling.get("beta_slow") or 1)
        default_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        mixed = inv_freq * (1 - ramp) + inv_freq / factor * ramp
        return mixed, scaling.get("attention_factor") or default_factor
    return inv_freq, 1.0
    ### END SOLUTION

# %% id="w05-rope-frequencies-check"
check("rope_frequencies")

# %% [markdown] exercise="smallest_base"
# ## 6. Predict: which base?
#
# A model must tell apart distances up to 8,000. A head has 64 channels, so the slowest
# pair is number 31. Which base makes it turn by exactly half a turn over 8,000
# positions? Work it out on paper, and write the number (within 2%) into
# `smallest_base`. A formula counts as a number.
#
# <details><summary>Hint 1: the equation</summary>
#
# Half a turn is $\pi$ radians, and the slowest pair makes $\text{base}^{-62/64}$
# radians for each position.
#
# </details>
# <details><summary>Hint 2: solve it</summary>
#
# $\text{base}^{62/64} = 8000 / \pi$. Raise both sides to the power $64/62$.
#
# </details>

# %% id="w05-smallest-base" exercise="smallest_base" points=2 minutes=10 difficulty=2 kind="beyond"
### BEGIN SOLUTION
smallest_base = (8000 / math.pi) ** (64 / 62)
### END SOLUTION

# %% id="w05-smallest-base-check"
check("smallest_base")

# %% [markdown] exercise="scores_of_new"
# ## 7. Two bugs
#
# With a cache (chapter 10), only the new positions ask, and all keys are there. A
# colleague wrote the scores of T new queries against S keys. It worked on one test:
# a whole text, T = S, where only the scores of a position with itself were looked at.
# Find two bugs, and repair them in place.
#
# <details><summary>Hint 1: where do the queries stand?</summary>
#
# The new queries are the last T of S positions.
#
# </details>
# <details><summary>Hint 2: the shift test</summary>
#
# A score may depend only on the distance. Turn both by $m$ and $n$: which sign must
# the two turns have, so that $m - n$ is left?
#
# </details>

# %% id="w05-scores-of-new" exercise="scores_of_new" points=3 minutes=10 difficulty=2 kind="beyond"
def scores_of_new(q: torch.Tensor, k: torch.Tensor,
                  inv_freq: torch.Tensor) -> torch.Tensor:
    """Scores of the last T of S positions: q (B, H, T, D), k (B, H, S, D), not turned
    yet; returns (B, H, T, S), not divided.
    """
    T, S = q.size(2), k.size(2)
    ### BEGIN SOLUTION
    cos, sin = rope_cos_sin(torch.arange(S - T, S), inv_freq)
    ### END SOLUTION
    ### BEGIN STUB
    # cos, sin = rope_cos_sin(torch.arange(T), inv_freq)
    ### END STUB
    q = apply_rope(q, cos, sin)
    cos, sin = rope_cos_sin(torch.arange(S), inv_freq)
    ### BEGIN SOLUTION
    return q @ apply_rope(k, cos, sin).transpose(-2, -1)
    ### END SOLUTION
    ### BEGIN STUB
    # return q @ apply_rope(k, cos, -sin).transpose(-2, -1)
    ### END STUB

# %% id="w05-scores-of-new-check"
check("scores_of_new")
### BEGIN HIDDEN TESTS
torch.manual_seed(21)
hidden_q, hidden_k = torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 4)
hidden_all = scores_of_new(hidden_q, hidden_k, torch.tensor([1.0, 0.1]))
hidden_last = scores_of_new(hidden_q[:, :, 6:], hidden_k, torch.tensor([1.0, 0.1]))
assert torch.allclose(hidden_all[:, :, 6:], hidden_last, atol=1e-4)
### END HIDDEN TESTS

# %% [markdown] exercise="partial_rope"
# ## 8. Turn only a part
#
# GPT-NeoX-20B (Black et al. 2022, arXiv:2204.06745) turns only the first quarter of the
# channels of each head; the others know nothing of positions and compare by content
# alone. Write it: cos and sin are `(T, R)` with `R` at most `D`; the first `R` channels
# are turned, the others stay as they are.
#
# <details><summary>Hint</summary>
#
# `x[..., :R]` are the first channels. You have a function that turns them; `torch.cat`
# puts both parts together again.
#
# </details>

# %% id="w05-partial-rope" exercise="partial_rope" points=2 minutes=10 difficulty=1 kind="beyond"
def partial_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first R channels of x (B, H, T, D); cos and sin are (T, R)."""
    ### BEGIN SOLUTION
    R = cos.shape[-1]
    return torch.cat((apply_rope(x[..., :R], cos, sin), x[..., R:]), dim=-1)
    ### END SOLUTION

# %% id="w05-partial-rope-check"
check("partial_rope")

# %% [markdown] exercise="agreement"
# ## 9. An experiment: how far do equal vectors agree?
#
# Two vectors that are equal in all pairs, $n$ positions apart, have a score of
# $\frac{1}{32}\sum_i \cos(n\,\theta_i)$ in a head of 64 channels: 1 at distance 0,
# less further away (section 5.6). **Predict first:** raise the base from 10,000 to
# 1,000,000, a hundred times. The first distance where this score is below one half
# becomes "twice", "four times" or "a hundred times" as large? Write one of the three
# into `predicted_longer`.
#
# Then measure. Write `agrees_until(base)`, the first distance where the score is below
# 0.5, and fill the dict `measured` for the bases 100, 10_000 and 1_000_000. Correct
# your prediction if it was wrong, and say to yourself why.
#
# <details><summary>Hint 1: a table again</summary>
#
# Distances 0 to 999 as a column, your speeds as a row; the mean of the cosines over
# the pairs.
#
# </details>
# <details><summary>Hint 2: the first one</summary>
#
# `(score < 0.5).nonzero()[0]`, and `.item()` for a whole number.
#
# </details>
# <details><summary>Hint 3: why not a hundred times?</summary>
#
# The first pair has speed 1 for any base. How does the number of fast pairs change?
#
# </details>

# %% id="w05-agreement" exercise="agreement" points=4 minutes=20 difficulty=2 kind="beyond"
### BEGIN SOLUTION
predicted_longer = "four times"
### END SOLUTION

def agrees_until(base: float) -> int:
    """The first distance at which two equal vectors of 32 pairs agree less than 0.5."""
    ### BEGIN SOLUTION
    speeds, _ = rope_frequencies(64, base)
    score = (torch.arange(1000)[:, None] * speeds).cos().mean(dim=-1)
    return (score < 0.5).nonzero()[0].item()
    ### END SOLUTION

### BEGIN SOLUTION
measured = {base: agrees_until(base) for base in (100, 10_000, 1_000_000)}
### END SOLUTION

# %% id="w05-agreement-check"
check("agreement")

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves the functions of exercises 1 to 5 that pass to `student/rope.py`. With
# `MINIMIND_STUDENT=student` before a command, the course uses them.

# %% id="w05-keep"
keep()
