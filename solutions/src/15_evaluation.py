# %% [markdown]
# # Workbook 15. Evaluation
#
# You write the module `minimind.evaluate` yourself: scores by likelihood, two kinds of
# intervals, a paired test, and the number of questions that a claim needs. Then you
# find two bugs, estimate pass@k without bias, and measure what it costs to look at a
# result too often. About two and a half hours; stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. Hints open one at a time. `solution("wilson")` shows
# that one solution and no other.

# %% id="setup"
# (filled in by the build)

# %% id="w15-imports"
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch
from torch import nn

from minimind.evaluate import render, score_pairs

# %% [markdown] exercise="encode_pair"
# ## 1. The border
#
# A context and a continuation become two lists of ids. Three rules (section 15.2):
#
# - Spaces at the end of the context move to the beginning of the continuation.
# - Both are cut into tokens *as one text*; the ids after those of the bare context
#   belong to the continuation. Where no context is left, it is the one token
#   `tokenizer.eos_id`, and the continuation is cut alone.
# - A context that is no text but a list of messages goes through
#   `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`, which gives
#   ids; the continuation is cut alone.
#
# <details><summary>Hint 1: moving the spaces</summary>
#
# `rstrip` gives the bare context. What it cut off is the rest of the context from
# that length on.
#
# </details>
# <details><summary>Hint 2: the ids of the continuation</summary>
#
# Cut the bare context, count its ids, cut the whole text, and leave out so many.
#
# </details>

# %% id="w15-encode-pair" exercise="encode_pair" points=3 minutes=10 difficulty=2 kind="rebuild"
def encode_pair(tokenizer, context: str | list[dict],
                continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of its continuation; spaces at the end of the context move
    to the continuation.
    """
    ### BEGIN SOLUTION
    if not isinstance(context, str):
        chat = tokenizer.apply_chat_template(context, add_generation_prompt=True)
        return chat, tokenizer.encode(continuation)
    bare = context.rstrip()
    continuation = context[len(bare):] + continuation
    before = tokenizer.encode(bare)
    if not before:
        return [tokenizer.eos_id], tokenizer.encode(continuation)
    return before, tokenizer.encode(bare + continuation)[len(before):]
    ### END SOLUTION

# %% id="w15-encode-pair-check"
check("encode_pair")

# %% [markdown] exercise="score_batch"
# ## 2. The likelihood of the last tokens
#
# Row $r$ of `rows` is context and continuation in one list of ids, and its last $n$
# tokens, `sizes[r]` of them, are the continuation. Give for each row
# $$\sum_{t = L - n}^{L - 1} \ln p(x_t \mid x_{<t})$$
# with $L$ the length of the row, and whether each of these $n$ tokens is the most
# likely one in its place. Rows have unequal lengths and go through the model together:
# `nn.utils.rnn.pad_sequence` fills the short ones up on the right, where a causal
# model cannot look. Take the logarithm in float32 even where the model computes in
# bfloat16. (Section 15.2.)
#
# <details><summary>Hint 1: where a token is scored</summary>
#
# The logits at position $t - 1$ are the prediction of token $t$. So a row of length
# $L$ needs the logits from $L - n - 1$ to $L - 2$, and its last token is never read.
#
# </details>
# <details><summary>Hint 2: a loop is fine</summary>
#
# After one pass of the model, `log_softmax` gives all $\ln p$, and a loop over the
# rows can cut out what each needs. `gather(1, target[:, None])` picks one per row.
#
# </details>
# <details><summary>Hint 3: greedy</summary>
#
# `argmax(-1)` of the same logits, compared with the targets; `all` of them.
#
# </details>

# %% id="w15-score-batch" exercise="score_batch" points=4 minutes=25 difficulty=3 kind="rebuild"
@torch.no_grad()
def score_batch(
    model: nn.Module, rows: list[list[int]], sizes: list[int]
) -> tuple[list[float], list[bool]]:
    """Of the last sizes[i] tokens of rows[i]: their ln p in nats, and whether each is
    the most likely one. All rows go through the model in one pass.
    """
    ### BEGIN SOLUTION
    device = next(model.parameters()).device
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows],
                                    batch_first=True)
    log_p = model(ids.to(device)).float().log_softmax(-1).cpu()  # (rows, T, V)
    nats, greedy = [], []
    for row, size, found in zip(rows, sizes, log_p):
        target = torch.tensor(row[-size:])
        found = found[len(row) - size - 1 : len(row) - 1]  # (size, V)
        nats.append(found.gather(1, target[:, None]).double().sum().item())
        greedy.append(bool((found.argmax(-1) == target).all()))
    return nats, greedy
    ### END SOLUTION

# %% id="w15-score-batch-check"
check("score_batch")

# %% [markdown] exercise="choose"
# ## 3. Choosing
#
# Answer multiple-choice questions by likelihood. `render(row, form)` gives one
# `(context, continuation)` per option; `score_pairs(model, pairs, batch_size)` takes
# pairs of *ids* and gives an array of nats first, and greedy or not second. Both are
# imported. Return the same rows, each with
#
# - `"nats"`, a list of floats, one per option;
# - `"chosen"`, the number of the option with the most nats, and `"right"`, whether it
#   is `row["label"]`;
# - `"chosen_norm"` and `"right_norm"`, the same by nats per *character of the option*
#   as it stands in `row["choices"]`.
#
# The first of equals wins. Leave the rows that you were given as they are.
#
# <details><summary>Hint 1: all in one call</summary>
#
# The pairs of all questions can go through `score_pairs` in one list; then the nats
# must be dealt out again, and questions may have different numbers of options.
#
# </details>
# <details><summary>Hint 2: a new row</summary>
#
# `{**row, "chosen": ...}` is a new dict. `int(...)` of an `argmax` is a plain number.
#
# </details>

# %% id="w15-choose" exercise="choose" points=3 minutes=15 difficulty=2 kind="rebuild"
def choose(
    model: nn.Module, tokenizer, questions: Sequence[dict], form: str = "statement",
    batch_size: int = 64
) -> list[dict]:
    """Answer rows of "prompt", "choices", "label" by likelihood: the same rows with
    "nats", "chosen", "right", "chosen_norm" and "right_norm".
    """
    ### BEGIN SOLUTION
    pairs = [[encode_pair(tokenizer, *pair) for pair in render(row, form)]
             for row in questions]
    every = [pair for options in pairs for pair in options]
    nats = score_pairs(model, every, batch_size)[0].tolist()
    answered = []
    for row in questions:
        own, nats = nats[: len(row["choices"])], nats[len(row["choices"]):]
        per_character = [x / len(text) for x, text in zip(own, row["choices"])]
        found = {"nats": own}
        for name, values in (("", own), ("_norm", per_character)):
            found["chosen" + name] = values.index(max(values))
            found["right" + name] = found["chosen" + name] == row["label"]
        answered.append({**row, **found})
    return answered
    ### END SOLUTION

# %% id="w15-choose-check"
check("choose")

# %% [markdown] exercise="bootstrap"
# ## 4. Draw the questions again
#
# Draw as many of the $N$ questions as there are, with putting back, and take the mean;
# do it `draws` times. The 95% interval cuts off 2.5% of these means at each side. With
# weights, the number is $\sum v_i / \sum w_i$, and a question that is drawn brings
# both its value and its weight. (Section 15.4.)
#
# The same answers must give the same interval, so fix the seed. Raise `ValueError`
# where there are no values.
#
# <details><summary>Hint 1: one draw</summary>
#
# `rng = np.random.default_rng(0)`, then `rng.integers(N, size=N)` are the numbers of
# the questions drawn. Indexing an array with them draws.
#
# </details>
# <details><summary>Hint 2: the ends</summary>
#
# `np.quantile(means, [0.025, 0.975])`. The first result is the mean of the real
# answers, not of the draws.
#
# </details>

# %% id="w15-bootstrap" exercise="bootstrap" points=3 minutes=15 difficulty=2 kind="rebuild"
def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, draws: int = 2000
) -> tuple[float, float, float]:
    """Mean of values (N,), or sum(values) / sum(weights), and the ends of its 95%
    interval (Efron 1979).
    """
    ### BEGIN SOLUTION
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("no values: nothing can be drawn")
    weights = np.ones_like(values) if weights is None else np.asarray(weights)
    rng, means = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = rng.integers(len(values), size=len(values))
        means.append(values[drawn].sum() / weights[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.sum() / weights.sum()), float(low), float(high)
    ### END SOLUTION

# %% id="w15-bootstrap-check"
check("bootstrap")

# %% [markdown] exercise="wilson"
# ## 5. An interval that holds at the edge
#
# Twenty of twenty right: the bootstrap's interval has no width. Wilson (1927) asks for
# which true shares $p$ the measured $\hat p = \text{right}/N$ is no surprise,
# $|\hat p - p| \le z \sqrt{p(1-p)/N}$ with $z = 1.96$. Solved for $p$:
# $$\frac{\hat p + \frac{z^2}{2N} \pm
#   z\sqrt{\frac{\hat p(1-\hat p)}{N} + \frac{z^2}{4N^2}}}{1 + \frac{z^2}{N}}$$
# Rounding must not lift nothing above nothing: with 0 right the lower end is exactly
# 0, with all right the upper end is exactly 1. Raise `ValueError` for fewer than 0 or
# more than `total` right, and for no questions. (Section 15.4.)
#
# <details><summary>Hint 1: z</summary>
#
# `NormalDist().inv_cdf(0.975)` is 1.95996...; 2.5% lie above it.
#
# </details>
# <details><summary>Hint 2: three names</summary>
#
# The middle, half of the width, and what both are divided by.
#
# </details>

# %% id="w15-wilson" exercise="wilson" points=3 minutes=15 difficulty=2 kind="rebuild"
def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927)."""
    ### BEGIN SOLUTION
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} of {total} cannot be right")
    z, share = NormalDist().inv_cdf(0.975), right / total
    middle = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = ((middle + end) / (1 + z**2 / total) for end in (-half, half))
    return (low if right else 0.0), (high if right < total else 1.0)
    ### END SOLUTION

# %% id="w15-wilson-check"
check("wilson")

# %% [markdown] exercise="mcnemar"
# ## 6. Two models, the same questions
#
# `a` and `b` say for each question whether the first and the second model is right.
# Only the $n$ questions on which they disagree count. If neither model is better, each
# of these is a fair coin, and with $f$ the smaller of the two counts
# $$p = \min\!\Big(1,\; 2 \sum_{i=0}^{f} \binom{n}{i} / 2^n \Big)$$
# is the chance of a split at least as uneven (McNemar 1947, in its exact form). Raise
# `ValueError` where the two lists are not equally long. (Section 15.5.)
#
# <details><summary>Hint 1: which to count</summary>
#
# Two counts: only `a` right, and only `b` right.
#
# </details>
# <details><summary>Hint 2: binomial coefficients</summary>
#
# `math.comb(n, i)`. The sum includes $i = f$.
#
# </details>

# %% id="w15-mcnemar" exercise="mcnemar" points=3 minutes=15 difficulty=2 kind="rebuild"
def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact p-value for two models on the same questions (McNemar 1947)."""
    ### BEGIN SOLUTION
    if len(a) != len(b):
        raise ValueError(f"{len(a)} answers and {len(b)}: not the same questions")
    apart = [bool(x) for x, y in zip(a, b) if bool(x) != bool(y)]
    n, few = len(apart), min(sum(apart), len(apart) - sum(apart))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)
    ### END SOLUTION

# %% id="w15-mcnemar-check"
check("mcnemar")

# %% [markdown] exercise="questions_needed"
# ## 7. How many questions?
#
# To see a difference $d$ at the 5% level with probability `power` takes
# $$N = \Big\lceil (z_{0.975} + z_{\text{power}})^2 \, \sigma^2 / d^2 \Big\rceil$$
# questions, with $\sigma^2$ the variance of one question's difference; for the same
# questions it is the share on which the models disagree, minus $d^2$. A difference of 0
# is a `ValueError`. (Section 15.5.)
#
# <details><summary>Hint 1: the shape of the function</summary>
#
# Below the line stands $d^2$, so a difference of -0.02 needs as many as one of 0.02.
#
# </details>
# <details><summary>Hint 2: z</summary>
#
# `NormalDist().inv_cdf`, for both; and `math.ceil` gives a whole number.
#
# </details>

# %% id="w15-questions-needed" exercise="questions_needed" points=2 minutes=10 difficulty=1 kind="rebuild"
def questions_needed(difference: float, variance: float, power: float = 0.8) -> int:
    """Questions needed to see `difference` (0.02 is two points) at the 5% level with
    probability `power`; `variance` is that of one question's difference.
    """
    ### BEGIN SOLUTION
    if difference == 0:
        raise ValueError("no test shows a difference of 0")
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(power)
    return math.ceil(variance * (z / difference) ** 2)
    ### END SOLUTION

# %% id="w15-questions-needed-check"
check("questions_needed")

# %% [markdown] exercise="permutation_test"
# ## 8. Two bugs
#
# Where a question gives a number and not right or wrong (nats, a mark from 0 to 10),
# McNemar's test does not fit, and a permutation test does: if the two models are
# equal, then on each question it is a coin's throw which of them got which number. A
# colleague throws the coins many times and counts how often the difference is at least
# as large as the real one. There are two bugs. With one, **the p-value is about 1 for
# every pair of models** (with the other one repaired). The other shows when you **swap
# the two models**: the p-value must stay the same.
#
# <details><summary>Hint 1: how many coins?</summary>
#
# Print the shape of `coins` for five questions. How many coins does one draw throw,
# and how many should it?
#
# </details>
# <details><summary>Hint 2: which side?</summary>
#
# A difference of -3 is as large as one of 3.
#
# </details>

# %% id="w15-permutation-test" exercise="permutation_test" points=3 minutes=10 difficulty=2 kind="beyond"
def permutation_test(a: Sequence[float], b: Sequence[float],
                     draws: int = 4000) -> float:
    """Two-sided p-value for two models with one number each on the same questions."""
    difference = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    rng = np.random.default_rng(0)
    ### BEGIN SOLUTION
    coins = rng.choice([-1, 1], size=(draws, len(difference)))
    ### END SOLUTION
    ### BEGIN STUB
    # coins = rng.choice([-1, 1], size=(draws, 1))
    ### END STUB
    swapped = (coins * difference).sum(axis=1)
    ### BEGIN SOLUTION
    return float((np.abs(swapped) >= abs(difference.sum())).mean())
    ### END SOLUTION
    ### BEGIN STUB
    # return float((swapped >= difference.sum()).mean())
    ### END STUB

# %% id="w15-permutation-test-check"
check("permutation_test")
### BEGIN HIDDEN TESTS
hidden_a, hidden_b = [5, 7, 1, 4, 6, 2], [6, 9, 4, 8, 11, 8]
assert abs(permutation_test(hidden_a, hidden_b) - 2 / 64) < 0.02
assert abs(permutation_test(hidden_b, hidden_a) - 2 / 64) < 0.02
### END HIDDEN TESTS

# %% [markdown] exercise="pass_at_k"
# ## 9. Predict, then write: pass@k
#
# A program is right or wrong, and a model may try more than once. **pass@k** is the
# chance that at least one of $k$ samples is right. To measure it with less noise, draw
# $n \ge k$ samples, of which $c$ turn out right, and ask: of all ways to pick $k$ of
# these $n$, which share has a right one among them? (Chen et al. 2021,
# arXiv:2107.03374.) That is one minus the share of picks that are all wrong.
#
# The tempting $1 - (1 - c/n)^k$ is biased: it puts each sample back after drawing it.
#
# **Predict first**: of ten samples, two are right. The biased formula says 0.866 for
# pass@9. What is the unbiased number? Write it into `predicted_nine`.
#
# <details><summary>Hint 1: picks that are all wrong</summary>
#
# There are $n - c$ wrong samples, and $\binom{n}{k}$ picks in all.
#
# </details>
# <details><summary>Hint 2: the prediction</summary>
#
# Eight of the ten are wrong. Can you pick nine of them without a right one?
#
# </details>
# <details><summary>Hint 3: few wrong ones</summary>
#
# `math.comb` gives 0 where there is nothing to pick; a product of factors needs care.
#
# </details>

# %% id="w15-pass-at-k" exercise="pass_at_k" points=3 minutes=10 difficulty=1 kind="beyond"
### BEGIN SOLUTION
predicted_nine = 1.0
### END SOLUTION

def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, of which c are right, hold a right one."""
    ### BEGIN SOLUTION
    return 1 - math.comb(n - c, k) / math.comb(n, k)
    ### END SOLUTION

# %% id="w15-pass-at-k-check"
check("pass_at_k")

# %% [markdown] exercise="peeking"
# ## 10. An experiment: looking too often
#
# A test of 200 questions runs slowly, so you look at McNemar's p after every ten, and
# stop and cheer as soon as it is below 0.05. Your two models are equally good.
# **Predict first**: how often do you cheer? `"about 5%"`, `"about 8%"` or `"over 12%"`
# goes into `predicted_alarms`.
#
# Then measure. `false_alarms(looks, trials)` simulates `trials` such tests. On each
# question the two models disagree with probability 0.4, and then a fair coin says
# which of them is right; where they agree, both are right. `looks` are the numbers of
# questions after which you look; the result is the share of tests in which p was
# below 0.05 at one look at least. Fill `measured` with 600 trials each: `"once"` for
# one look after 200 questions, `"every ten"` for looks after 10, 20, ... 200.
#
# <details><summary>Hint 1: one test</summary>
#
# Draw all answers of `max(looks)` questions at once. A look after `n` questions is
# your `mcnemar` of the first `n` of both.
#
# </details>
# <details><summary>Hint 2: three kinds of questions</summary>
#
# `rng.choice(3, size=n, p=[0.2, 0.2, 0.6])`: only the first right, only the second
# right, both right. Make `rng` once, outside of the loop over trials.
#
# </details>
# <details><summary>Hint 3: why more than 5%?</summary>
#
# Each look is another chance to be fooled. Why not twenty times as many? The looks
# share most of their questions.
#
# </details>

# %% id="w15-peeking" exercise="peeking" points=4 minutes=20 difficulty=2 kind="beyond"
### BEGIN SOLUTION
predicted_alarms = "over 12%"
### END SOLUTION

def false_alarms(looks: Sequence[int], trials: int) -> float:
    """The share of tests of equal models in which at least one look has p < 0.05."""
    ### BEGIN SOLUTION
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(trials):
        kind = rng.choice(3, size=max(looks), p=[0.2, 0.2, 0.6])
        a, b = (kind != 1).tolist(), (kind != 0).tolist()
        alarms += any(mcnemar(a[:n], b[:n]) < 0.05 for n in looks)
    return alarms / trials
    ### END SOLUTION

### BEGIN SOLUTION
measured = {"once": false_alarms([200], 600),
            "every ten": false_alarms(range(10, 201, 10), 600)}
### END SOLUTION

# %% id="w15-peeking-check"
check("peeking")

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves the functions of exercises 1 to 7 that pass to `student/evaluate.py`.
# With `MINIMIND_STUDENT=student` before a command, the course uses them.

# %% id="w15-keep"
keep()
