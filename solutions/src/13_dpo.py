# %% [markdown]
# # Workbook 13. Preferences
#
# You write the core of `minimind.dpo` yourself: pairs from sampled answers, the
# probability of an answer, the batch, and the loss. Then you go beyond it: work out
# where DPO ends, find two bugs, write a loss without a reference, and measure which
# losses know when to stop. About two hours; stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. A check that fails names the likely mistake and shows the
# smallest case. Hints open one at a time. `solution("pair_example")` shows that one
# solution and no other.
#
# Letters as in the chapter: B pairs, T positions, V tokens in the vocabulary; $y_w$ is
# the chosen answer, $y_l$ the rejected one.

# %% id="setup"
# (filled in by the build)

# %% id="w13-imports"
import math
import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minimind.dpo import chat_of, judge, reply_in
from minimind.sft import chat_example

# %% [markdown] exercise="sort_pairs"
# ## 1. From answers to pairs
#
# The model answered each prompt several times. `judge(reply, question)["preferred"]`
# says whether a reply is what the judge wants. For each prompt, draw one preferred
# reply and one that is not, both at random, and make them a pair of conversations with
# `chat_of(text, reply)`. A prompt that lacks either gives no pair. An empty reply is no
# reply at all.
#
# With `write=True`, a prompt without a preferred reply gets one from the world:
# `reply_in("friendly", question["reply"], rng)`. The same `seed` must give the same
# pairs, whatever else used random numbers before. (Section 13.5.)
#
# <details><summary>Hint 1: chance of your own</summary>
#
# `random.Random(...)` is a generator that nobody else uses. Its argument may be a
# number or a text; `rng.choice(some)` draws one.
#
# </details>
# <details><summary>Hint 2: two lists</summary>
#
# For each prompt, make the list of the good replies and the list of the others. The
# world may fill the first; then look whether both have something.
#
# </details>

# %% id="w13-sort-pairs" exercise="sort_pairs" points=3 minutes=15 difficulty=2 kind="rebuild"
def sort_pairs(
    prompts: Sequence[tuple[str, dict]], replies: Sequence[Sequence[str]],
    seed: int = 0, write: bool = False,
) -> list[dict]:  # fmt: skip
    """{"chosen", "rejected"} rows from several replies to each (text, world question).

    One preferred reply meets one that is not, both drawn at random; a prompt that lacks
    either gives no pair. With write=True the world writes a missing preferred reply.
    """
    ### BEGIN SOLUTION
    rng, pairs = random.Random(f"pairs {seed}"), []
    for (text, question), group in zip(prompts, replies):
        group = [reply for reply in group if reply]
        verdicts = [judge(reply, question)["preferred"] for reply in group]
        good = [reply for reply, liked in zip(group, verdicts) if liked]
        bad = [reply for reply, liked in zip(group, verdicts) if not liked]
        if write and not good:
            good = [reply_in("friendly", question["reply"], rng)]
        if good and bad:
            chosen, rejected = rng.choice(good), rng.choice(bad)
            pairs.append({"chosen": chat_of(text, chosen),
                          "rejected": chat_of(text, rejected)})
    return pairs
    ### END SOLUTION

# %% id="w13-sort-pairs-check"
check("sort_pairs")

# %% [markdown] exercise="pair_example"
# ## 2. What counts as the answer
#
# `chat_example(tokenizer, messages)` (chapter 11) gives the tokens of a conversation
# and their labels: the token itself where the assistant wrote it, `<|im_end|>` among
# them, else -100. A pair compares only the *last* answer. Return the same tokens, and
# labels that keep the last answer and its end, and nothing else. (Section 13.4.)
#
# <details><summary>Hint 1: where does the last turn begin?</summary>
#
# Each turn begins with the token `tokenizer.im_start_id`. Only one of them is the last.
#
# </details>
# <details><summary>Hint 2: no need to look for the text</summary>
#
# The labels that you got are right from the last turn on. Before it, none may stay.
#
# </details>

# %% id="w13-pair-example" exercise="pair_example" points=2 minutes=10 difficulty=1 kind="rebuild"
def pair_example(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """A conversation as (ids, labels) of equal length.

    labels are -100 everywhere but in the last answer and its end; not shifted.
    """
    ### BEGIN SOLUTION
    ids, labels = chat_example(tokenizer, messages)
    last_turn = len(ids) - 1 - ids[::-1].index(tokenizer.im_start_id)
    kept = [label if i > last_turn else -100 for i, label in enumerate(labels)]
    return ids, kept
    ### END SOLUTION

# %% id="w13-pair-example-check"
check("pair_example")

# %% [markdown] exercise="answer_logprobs"
# ## 3. The probability of an answer
#
# For each row of a batch, add the log-probabilities of the tokens that count:
# $$\log \pi(y) = \sum_{t \,:\, \text{target}_t \ne -100} \log
#   \operatorname{softmax}(\text{logits}_t)[\text{target}_t]$$
# The targets are shifted already: `targets[b, t]` is the token after position `t`.
# Compute in float32, whatever type the logits have. Raise `ValueError` when the shapes
# do not fit: targets must be `(B, T)` where logits are `(B, T, V)`. (Section 13.4.)
#
# <details><summary>Hint 1: a function that you know</summary>
#
# Cross-entropy is $-\log p$ of the label. `F.cross_entropy(..., reduction="none")`
# leaves one number for each place, and 0 where the label is -100.
#
# </details>
# <details><summary>Hint 2: the order of the dimensions</summary>
#
# `F.cross_entropy` wants the vocabulary as dimension 1: `(B, V, T)`. Or use
# `log_softmax` and `gather`; then -100 is no index, and you must hide those places.
#
# </details>

# %% id="w13-answer-logprobs" exercise="answer_logprobs" points=3 minutes=15 difficulty=2 kind="rebuild"
def answer_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """ln p of each row's answer, (B,), in nats.

    logits (B, T, V); targets (B, T), already shifted: targets[b, t] is token t+1 where
    it belongs to the answer, else -100. ValueError when the shapes do not fit.
    """
    ### BEGIN SOLUTION
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"{tuple(targets.shape)} targets for {tuple(logits.shape)}")
    counted = targets != -100  # (B, T)
    token = targets.masked_fill(~counted, 0)[..., None]
    each = logits.float().log_softmax(dim=-1).gather(-1, token)[..., 0]  # (B, T)
    return each.masked_fill(~counted, 0.0).sum(dim=-1)
    ### END SOLUTION

# %% id="w13-answer-logprobs-check"
check("answer_logprobs")

# %% [markdown] exercise="PreferencePairs"
# ## 4. A batch of pairs
#
# Most of the class stands here already. `self.sides` is two lists, the chosen and the
# rejected answers, of `(ids, labels)` as your `pair_example` gives them. Write `batch`:
# a dict of three tensors (the third only where there is one), on `self.device`.
#
# - `input_ids` (2B, T): the rows of the chosen answers, then those of the rejected ones
#   in the same order, each without its last token. Padding on the right is 0.
# - `targets` (2B, T): the labels, shifted, so that `targets[:, t]` belongs to the token
#   after position t. Padding on the right is -100.
# - `reference` (2B,): only where `self.reference` (N, 2) is not None. Its columns are
#   chosen and rejected; the numbers must stand in the order of the rows.
#
# T is the longest row of this batch, not of all pairs. (Sections 13.5 and 13.6.)
#
# <details><summary>Hint 1: padding</summary>
#
# `nn.utils.rnn.pad_sequence(list_of_tensors, batch_first=True, padding_value=...)`.
#
# </details>
# <details><summary>Hint 2: the shift</summary>
#
# Row and targets are one shorter than the conversation: one loses its last entry, the
# other its first.
#
# </details>
# <details><summary>Hint 3: the order of the reference</summary>
#
# `self.reference[numbers]` is (B, 2), one pair to a row. You want the first column and
# then the second, as one row of numbers.
#
# </details>

# %% id="w13-preference-pairs" exercise="PreferencePairs" points=4 minutes=20 difficulty=3 kind="rebuild"
class PreferencePairs:
    """Batches of {"chosen", "rejected"} pairs; `[step]` is always the same batch.

    A batch of B pairs has rows 0..B-1 chosen, B..2B-1 rejected: input_ids (2B, T);
    targets (2B, T), already shifted, -100 outside of the answer; and, after
    `keep_reference`, reference (2B,), ln p under it. Each epoch is shuffled anew.
    """

    def __init__(
        self, rows: Sequence[dict], tokenizer, batch_size: int,
        seed: int = 0, device: torch.device | str = "cpu",
    ):  # fmt: skip
        if not rows:
            raise ValueError("there are no pairs to train on")
        self.sides = [
            [pair_example(tokenizer, row[side]) for row in rows]
            for side in ("chosen", "rejected")
        ]
        self.batch_size = min(batch_size, len(rows))
        self.seed, self.device = seed, device
        self.reference: torch.Tensor | None = None  # (N, 2)

    def __len__(self) -> int:
        """Pairs."""
        return len(self.sides[0])

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        epoch, index = divmod(step, len(self) // self.batch_size)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return self.batch(order[index * self.batch_size :][: self.batch_size])

    def batch(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """The pairs with these numbers."""
        ### BEGIN SOLUTION
        def together(rows, padding):
            rows = [torch.tensor(row) for row in rows]
            full = nn.utils.rnn.pad_sequence(rows, True, padding)
            return full.to(self.device)

        picked = [side[i] for side in self.sides for i in numbers]
        made = {"input_ids": together([ids[:-1] for ids, _ in picked], 0)}
        made["targets"] = together([labels[1:] for _, labels in picked], -100)
        if self.reference is not None:
            both = self.reference[torch.as_tensor(numbers)]  # (B, 2)
            made["reference"] = torch.cat((both[:, 0], both[:, 1])).to(self.device)
        return made
        ### END SOLUTION

# %% id="w13-preference-pairs-check"
check("PreferencePairs")

# %% [markdown] exercise="dpo_loss"
# ## 5. The loss of DPO
#
# A batch of exercise 4, with the reference's numbers, and a model whose
# `model(input_ids)` gives logits. Write `log_ratios`, the differences
# $\log\pi(y) - \log\pi_{ref}(y)$ for the chosen and for the rejected answers, and then
# the loss, a mean over pairs:
# $$\text{margin} = \beta\, \Big[\log\frac{\pi(y_w)}{\pi_{ref}(y_w)} -
#   \log\frac{\pi(y_l)}{\pi_{ref}(y_l)}\Big], \qquad L = -\log \sigma(\text{margin})$$
# The metrics are means too: `margin`, and `accuracy`, the share of pairs with a margin
# above 0. A tie is not the right order. (Section 13.6.)
#
# <details><summary>Hint 1: two halves</summary>
#
# The first half of the rows is chosen, the second rejected. `chunk(2)` cuts a tensor
# into two.
#
# </details>
# <details><summary>Hint 2: large margins</summary>
#
# The sigmoid of -200 rounds to 0, and the logarithm of 0 is minus infinity. torch has a
# function for both steps at once: `F.logsigmoid`.
#
# </details>

# %% id="w13-dpo-loss" exercise="dpo_loss" points=4 minutes=15 difficulty=2 kind="rebuild"
def log_ratios(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """ln(pi / pi_ref) of the chosen and of the rejected answers, (B,) each."""
    ### BEGIN SOLUTION
    mine = answer_logprobs(model(batch["input_ids"]), batch["targets"])  # (2B,)
    gained = mine - batch["reference"]
    B = len(gained) // 2
    return gained[:B], gained[B:]
    ### END SOLUTION


def dpo_loss(
    model: nn.Module, batch: dict, beta: float = 0.1
) -> tuple[torch.Tensor, dict]:
    """The sigmoid loss of DPO, a mean over pairs.

    Rafailov et al. 2023, arXiv:2305.18290.
    Metrics, means too: margin; accuracy, the share of pairs with a margin above 0.
    """
    ### BEGIN SOLUTION
    better, worse = log_ratios(model, batch)
    margins = beta * (better - worse)  # (B,)
    right = (margins > 0).float()
    metrics = {"margin": margins.detach().mean(), "accuracy": right.mean()}
    return F.softplus(-margins).mean(), metrics
    ### END SOLUTION

# %% id="w13-dpo-loss-check"
check("dpo_loss")

# %% [markdown] exercise="best_share"
# ## 6. Predict: where does it end?
#
# A model has two answers. The reference gives the friendly one with probability 0.3 and
# the plain one with 0.7. People prefer the friendly answer in 80 of 100 comparisons.
# You train with DPO at $\beta = 0.5$ until the loss falls no more. With which
# probability does the model now give the friendly answer? Work it out on paper, and
# write the number (within 1%) into `best_share`. A formula counts as a number.
# (Sections 13.2 and 13.3.)
#
# <details><summary>Hint 1: the difference of rewards</summary>
#
# Bradley and Terry: a share of wins of 0.8 is a difference of rewards of
# $\ln(0.8 / 0.2)$.
#
# </details>
# <details><summary>Hint 2: the best model for them</summary>
#
# Each answer's probability under the reference is weighed by $e^{r/\beta}$; then both
# are made to sum to 1. $e^{\ln 4 / 0.5}$ is a whole number.
#
# </details>

# %% id="w13-best-share" exercise="best_share" points=2 minutes=10 difficulty=2 kind="beyond"
### BEGIN SOLUTION
best_share = 0.3 * 4**2 / (0.3 * 4**2 + 0.7)
### END SOLUTION

# %% id="w13-best-share-check"
check("best_share")

# %% [markdown] exercise="margins"
# ## 7. Two bugs
#
# A colleague wrote the margins in one function, without labels: `prompt` and `length`
# say where each answer begins and ends. Nothing crashes, and the loss falls. Two tests
# fail. **Change only the padding**, and some margins change. **Let two pairs change
# places**, and the margins do not just change places with them. Find the two bugs, each
# in one line, and repair them in place.
#
# <details><summary>Hint 1: by hand</summary>
#
# A row has a prompt of 2 tokens and an answer of 3. The answer stands at the places 2,
# 3 and 4. `logs[:, t]` speaks about the token at place t + 1. Which places does
# `counted` take?
#
# </details>
# <details><summary>Hint 2: who meets whom</summary>
#
# With B = 2 the rows are chosen 0, chosen 1, rejected 0, rejected 1. Print which two
# rows are subtracted.
#
# </details>

# %% id="w13-margins" exercise="margins" points=3 minutes=15 difficulty=2 kind="beyond"
def margins(model, reference, ids, prompt, length, beta):
    """DPO's margins (B,): rows 0..B-1 of ids (2B, T) are chosen, the others rejected.

    A row is `prompt` (2B,) tokens of prompt, then the answer; both together have
    `length` (2B,) tokens, and what follows is padding.
    """
    ### BEGIN SOLUTION
    place = torch.arange(1, ids.shape[1])  # of the token that is predicted
    ### END SOLUTION
    ### BEGIN STUB
    # place = torch.arange(ids.shape[1] - 1)  # of the token that is predicted
    ### END STUB
    counted = (place >= prompt[:, None]) & (place < length[:, None])  # (2B, T-1)
    ratio = 0
    for sign, one in ((1, model), (-1, reference)):
        logs = one(ids[:, :-1]).log_softmax(-1)  # (2B, T-1, V)
        token = logs.gather(-1, ids[:, 1:, None]).squeeze(-1)
        ratio = ratio + sign * (token * counted).sum(-1)  # (2B,)
    ### BEGIN SOLUTION
    chosen, rejected = ratio.view(2, -1)
    ### END SOLUTION
    ### BEGIN STUB
    # chosen, rejected = ratio.view(-1, 2).T
    ### END STUB
    return beta * (chosen - rejected)

# %% id="w13-margins-check"
check("margins")
### BEGIN HIDDEN TESTS
torch.manual_seed(31)
hidden_model, hidden_reference = nn.Embedding(7, 7), nn.Embedding(7, 7)
hidden_ids, hidden_prompt = torch.randint(0, 7, (6, 8)), torch.tensor([2, 3, 1] * 2)
hidden_length = torch.tensor([5, 8, 4, 7, 6, 6])
hidden_rest = (hidden_ids, hidden_prompt, hidden_length)
hidden_first = margins(hidden_model, hidden_reference, *hidden_rest, 0.4)
hidden_order = torch.tensor([1, 2, 0, 4, 5, 3])
hidden_rest = [part[hidden_order] for part in hidden_rest]
hidden_second = margins(hidden_model, hidden_reference, *hidden_rest, 0.4)
assert torch.allclose(hidden_first[[1, 2, 0]], hidden_second, atol=1e-4)
### END HIDDEN TESTS

# %% [markdown] exercise="simpo_loss"
# ## 8. Without a reference: SimPO
#
# SimPO (Meng et al. 2024, arXiv:2405.14734) drops the reference. It compares the *mean*
# log-probability of an answer's tokens, which is what decides when the model writes,
# and asks the chosen answer to win by more than $\gamma$:
# $$L = -\log \sigma\Big(\beta\,(\bar p_w - \bar p_l) - \gamma\Big), \qquad
#   \bar p = \frac{1}{|y|} \log \pi(y)$$
# $|y|$ is the number of tokens that count. The loss is a mean over pairs. The metrics
# are as in exercise 5, with margin $\beta\,(\bar p_w - \bar p_l)$, without $\gamma$.
# The batch may lack the key `reference`.
#
# <details><summary>Hint 1: lengths</summary>
#
# Count the targets that are not -100, row by row.
#
# </details>
# <details><summary>Hint 2: the parts that you have</summary>
#
# Your `answer_logprobs` gives the sums of all rows, chosen ones first.
#
# </details>

# %% id="w13-simpo-loss" exercise="simpo_loss" points=3 minutes=15 difficulty=2 kind="beyond"
def simpo_loss(
    model: nn.Module, batch: dict, beta: float = 2.0, gamma: float = 1.0
) -> tuple[torch.Tensor, dict]:
    """SimPO's loss, a mean over pairs; metrics margin (without gamma) and accuracy."""
    ### BEGIN SOLUTION
    total = answer_logprobs(model(batch["input_ids"]), batch["targets"])  # (2B,)
    mean = total / (batch["targets"] != -100).sum(dim=-1)
    p_w, p_l = mean.chunk(2)
    margin = beta * (p_w - p_l)
    metrics = {"margin": margin.mean(), "accuracy": (margin > 0).float().mean()}
    return -F.logsigmoid(margin - gamma).mean(), metrics
    ### END SOLUTION

# %% id="w13-simpo-loss-check"
check("simpo_loss")

# %% [markdown] exercise="final_gap"
# ## 9. An experiment: which loss has enough?
#
# The smallest model there is: two logits, one for the chosen answer and one for the
# rejected. The reference gives each a half, so the model starts with both logits at 0.
# Let $g$ be the gap $\log\frac{\pi(y_w)}{\pi_{ref}(y_w)} -
# \log\frac{\pi(y_l)}{\pi_{ref}(y_l)}$. Three losses, at $\beta = 0.5$:
#
# - `"dpo"`: $-\log\sigma(\beta g)$
# - `"smoothed"`: a share $\varepsilon = 0.1$ of the comparisons counts the other way
#   round (conservative DPO, Mitchell 2023, *A note on DPO with noisy preferences*):
#   $-(1 - \varepsilon)\log\sigma(\beta g) - \varepsilon \log\sigma(-\beta g)$
# - `"ipo"`: $\big(g - \tfrac{1}{2\beta}\big)^2$ (Azar et al. 2023, arXiv:2310.12036)
#
# **Predict first:** at which gap does the smoothed loss stop? Write the number (within
# 5%) into `predicted_gap`.
#
# Then measure. Write `gap_loss(kind, g)`, and `final_gap(kind, steps)`: that many steps
# of plain gradient descent on the two logits, rate 0.4; return the gap at the end as a
# number. Last, fill the dict `measured`: for each kind, the list of the gaps after 60
# and after 600 steps.
#
# <details><summary>Hint 1: for the prediction</summary>
#
# A loss stops where its slope is 0. The slope of $-\log\sigma(x)$ is $-\sigma(-x)$, so
# you look for the margin with $0.9\,\sigma(-x) = 0.1\,\sigma(x)$. And a margin is
# $\beta$ times a gap.
#
# </details>
# <details><summary>Hint 2: one step</summary>
#
# `torch.autograd.grad(loss, logits)` returns a tuple with one tensor. The next logits
# are the old ones minus the rate times it, `detach`ed; they need `requires_grad_()`.
# `torch.optim.SGD([logits], lr=0.4)` does the same.
#
# </details>
# <details><summary>Hint 3: the gap of two logits</summary>
#
# The log-ratios are `logits.log_softmax(-1) - math.log(0.5)`, and the gap is the first
# minus the second.
#
# </details>

# %% id="w13-final-gap" exercise="final_gap" points=4 minutes=25 difficulty=3 kind="beyond"
### BEGIN SOLUTION
predicted_gap = math.log(0.9 / 0.1) / 0.5
### END SOLUTION

def gap_loss(kind: str, g: torch.Tensor, beta: float = 0.5,
             epsilon: float = 0.1) -> torch.Tensor:
    """The loss of "dpo", "smoothed" or "ipo" at the gap g."""
    ### BEGIN SOLUTION
    if kind == "ipo":
        return (g - 1 / (2 * beta)) ** 2
    turned = epsilon if kind == "smoothed" else 0.0
    return -(1 - turned) * F.logsigmoid(beta * g) - turned * F.logsigmoid(-beta * g)
    ### END SOLUTION


def final_gap(kind: str, steps: int) -> float:
    """The gap after so many steps of gradient descent, rate 0.4, from logits 0, 0."""
    ### BEGIN SOLUTION
    logits = torch.zeros(2)
    for _ in range(steps):
        logits.requires_grad_()
        loss = gap_loss(kind, logits[0] - logits[1])  # both log-ratios lose ln 0.5
        (slope,) = torch.autograd.grad(loss, logits)
        logits = (logits - 0.4 * slope).detach()
    return (logits[0] - logits[1]).item()
    ### END SOLUTION

### BEGIN SOLUTION
measured = {
    kind: [final_gap(kind, 60), final_gap(kind, 600)]
    for kind in ("dpo", "smoothed", "ipo")
}
### END SOLUTION

# %% id="w13-final-gap-check"
check("final_gap")

# %% [markdown]
# Two of the three arrive somewhere. DPO goes on, by the same amount for each tenfold
# number of steps, and in a real model that is where section 13.8 begins.

# %% id="w13-final-gap-try"
for kind, (early, late) in measured.items():
    print(f"{kind:9} after 60 steps {early:5.2f}, after 600 {late:5.2f}")

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves the functions of exercises 1 to 5 that pass to `student/dpo.py`. With
# `MINIMIND_STUDENT=student` before a command, the course uses them: your own loss
# trains the model of chapter 13.

# %% id="w13-keep"
keep()
