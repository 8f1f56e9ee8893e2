# %% [markdown]
# # Workbook 14. Distillation
#
# You write the core of `minimind.distill` yourself: the distance between two models,
# the loss of a training step, and a teacher that writes data. Then you go beyond it:
# work out what heat does to a large vocabulary, find two bugs, write a distance that
# goes from one direction to the other, and measure how few of the teacher's numbers a
# student needs. About two hours; stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. A check that fails names the likely mistake and shows the
# smallest case. Hints open one at a time. `solution("kl_divergence")` shows that one
# solution and no other.
#
# Letters as in the chapter: $p$ the teacher's probabilities, $q$ the student's, $\tau$
# the temperature; B rows, T positions, V tokens, C model width, N places that count.

# %% id="setup"
# (filled in by the build)

# %% id="w14-imports"
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.distill import check_pair
from minimind.generate import generate_batch
from minimind.metrics import cross_entropy

# %% [markdown] exercise="kl_divergence"
# ## 1. The distance
#
# How many nats more do you pay when the tokens come from the teacher $p$ and you bet
# with the student $q$? One number for each place:
# $$\mathrm{KL}(p \,\|\, q) = \sum_i p_i \,(\ln p_i - \ln q_i), \qquad
#   p = \operatorname{softmax}(v / \tau), \quad q = \operatorname{softmax}(z / \tau)$$
# with the teacher's logits $v$ and the student's logits $z$. Compute in float32. Raise
# `ValueError` when the two shapes differ (they must be equal; nothing is broadcast) or
# the temperature is not above 0. (Sections 14.3 and 14.4.)
#
# <details><summary>Hint 1: logarithms first</summary>
#
# A sure model gives some tokens a probability that rounds to 0, and the logarithm of 0
# is lost. `log_softmax` gives $\ln p$ itself; from there, `exp` leads back to $p$.
#
# </details>
# <details><summary>Hint 2: torch has it too</summary>
#
# `F.kl_div` takes the *student* first, in logarithms, and then the teacher's
# probabilities. With `reduction="none"` it leaves one number for each token.
#
# </details>

# %% id="w14-kl-divergence" exercise="kl_divergence" points=3 minutes=15 difficulty=2 kind="rebuild"
def kl_divergence(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) in nats at each place: logits (..., V) each -> (...).

    In float32, and both are softened by the temperature first. ValueError for logits
    of unequal shapes and for a temperature that is not above 0.
    Kullback and Leibler 1951, doi:10.1214/aoms/1177729694.
    """
    ### BEGIN SOLUTION
    if teacher_logits.shape != student_logits.shape:
        raise ValueError("teacher and student need logits of one shape")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: it must be above 0")
    ln_p, ln_q = ((logits.float() / temperature).log_softmax(dim=-1)
                  for logits in (teacher_logits, student_logits))
    return F.kl_div(ln_q, ln_p, reduction="none", log_target=True).sum(dim=-1)
    ### END SOLUTION

# %% id="w14-kl-divergence-check"
check("kl_divergence")

# %% [markdown] exercise="soft_loss"
# ## 2. The soft loss
#
# Heat makes the gradient small: it fades with $1/\tau^2$. So multiply by $\tau^2$, and
# take the mean over the N places. (Section 14.4.)
#
# <details><summary>Hint</summary>
#
# Exercise 1 gives you one number for each place, at any temperature.
#
# </details>

# %% id="w14-soft-loss" exercise="soft_loss" points=1 minutes=5 difficulty=1 kind="rebuild"
def soft_loss(teacher_logits: Tensor, student_logits: Tensor,
              temperature: float) -> Tensor:
    """Mean of temperature**2 * KL(teacher || student) over N places; logits (N, V).

    The factor keeps the gradient, temperature * (q - p) / N, from fading with heat.
    Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2.
    """
    ### BEGIN SOLUTION
    each = kl_divergence(teacher_logits, student_logits, temperature)  # (N,)
    return each.mean() * temperature**2
    ### END SOLUTION

# %% id="w14-soft-loss-check"
check("soft_loss")

# %% [markdown] exercise="logits_at"
# ## 3. Logits only where they count
#
# Most places of a chat batch have no label, and the logits are the largest tensor of
# the step. `model.model(input_ids, attention_mask, position_ids)` gives the hidden
# vectors (B, T, C) of a `MiniMind`. Keep the rows where `places` is True, and multiply
# only those by the output matrix: `model.lm_head.weight`, or where `model.lm_head` is
# None the embedding, `model.model.embed_tokens.weight`; both are (V, C). The batch may
# lack `attention_mask` and `position_ids`; then pass None. The check notices an output
# layer that has seen other places. (Section 14.5.)
#
# <details><summary>Hint 1: rows where something is True</summary>
#
# A bool mask (B, T) is an index for the first two dimensions of (B, T, C): the result
# is (N, C), row by row.
#
# </details>
# <details><summary>Hint 2: the product</summary>
#
# `F.linear(x, weight)` is `x @ weight.T`. A dict's `get` gives None for a missing key.
#
# </details>

# %% id="w14-logits-at" exercise="logits_at" points=3 minutes=15 difficulty=2 kind="rebuild"
def logits_at(model: nn.Module, batch: dict, places: Tensor) -> Tensor:
    """Logits where `places` (B, T) is True: (N, V); the output layer skips the rest."""
    ### BEGIN SOLUTION
    rest = [batch.get(name) for name in ("attention_mask", "position_ids")]
    hidden = model.model(batch["input_ids"], *rest)[places]  # (N, C)
    tied = model.lm_head is None
    weight = model.model.embed_tokens.weight if tied else model.lm_head.weight
    return hidden @ weight.T
    ### END SOLUTION

# %% id="w14-logits-at-check"
check("logits_at")

# %% [markdown] exercise="DistillLoss"
# ## 4. The loss of a training step
#
# The loop of chapter 8 calls `loss_fn(model, batch)` with the student. So the loss is
# an object that holds the teacher. It mixes two targets, both means over the places
# whose label is not -100:
# $$L = (1 - \alpha)\, \mathrm{CE}(\text{label}, q) + \alpha\, \tau^2\,
#   \mathrm{KL}(p_\tau \,\|\, q_\tau)$$
# In `__init__`, raise `ValueError` unless $\alpha$ is from 0 to 1 (both allowed) and
# the temperature above 0; keep the teacher as `self.teacher`, in evaluation mode, and
# let none of its weights want a gradient. In `__call__`, return the loss and a dict of
# its two parts, `cross_entropy` and `soft`, before they are weighed. The teacher runs
# without a graph. `cross_entropy(logits, labels)` of chapter 3 is imported.
# (Section 14.5.)
#
# <details><summary>Hint 1: who is asked where</summary>
#
# One mask of places serves both models; `batch["labels"][places]` are the labels there.
#
# </details>
# <details><summary>Hint 2: a frozen teacher</summary>
#
# `eval()` and `requires_grad_(False)` return the model. `with torch.no_grad():` builds
# no graph.
#
# </details>

# %% id="w14-distill-loss" exercise="DistillLoss" points=5 minutes=25 difficulty=3 kind="rebuild"
class DistillLoss:
    """loss(student, batch) for `train`: a mixture of cross-entropy and soft_loss.

    alpha is the weight of the soft loss. Both terms are means (nats) over the places
    that have a label. The teacher is frozen here and runs without a graph; it is held
    by the loss and not by the student. Hinton, Vinyals and Dean 2015.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 1.0,
                 alpha: float = 0.9):
        ### BEGIN SOLUTION
        if alpha < 0 or alpha > 1:
            raise ValueError(f"alpha={alpha}: give a weight from 0 to 1")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: give one above 0")
        self.temperature, self.alpha = temperature, alpha
        self.teacher = teacher.requires_grad_(False).eval()
        ### END SOLUTION

    def __call__(self, student: nn.Module, batch: dict) -> tuple[Tensor, dict]:
        check_pair(student, self.teacher)  # one vocabulary, and two models
        ### BEGIN SOLUTION
        places = batch["labels"] != -100  # (B, T)
        with torch.set_grad_enabled(False):
            wanted = logits_at(self.teacher, batch, places)  # (N, V)
        mine = logits_at(student, batch, places)  # (N, V)
        parts = {"cross_entropy": cross_entropy(mine, batch["labels"][places]),
                 "soft": soft_loss(wanted, mine, self.temperature)}
        hard, soft = parts.values()
        return hard + self.alpha * (soft - hard), parts
        ### END SOLUTION

# %% id="w14-distill-loss-check"
check("DistillLoss")

# %% [markdown] exercise="answers_of"
# ## 5. A teacher that writes data
#
# Often you get a model's words and nothing else. Ask it, and make chat data of the
# answers: for each question a conversation of two messages, `user` and `assistant`, in
# the order of the questions.
#
# - A prompt is `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`.
# - `generate_batch(teacher, prompts, max_new_tokens, stops)` (chapter 10) continues all
#   of them greedily: a list of new tokens for each, without the stop token. The stops
#   are `tokenizer.im_end_id` and `tokenizer.eos_id`.
# - An answer as long as `max_new_tokens` was not closed. Leave it out, and those that
#   are empty without the spaces and line ends around them.
# - The text is `tokenizer.decode(ids, skip_special=True)`, stripped.
#
# (Section 14.7.)
#
# <details><summary>Hint 1: one list beside the other</summary>
#
# Questions, prompts and answers have one length and one order; `zip` walks along all
# of them.
#
# </details>
# <details><summary>Hint 2: cheaper, if you like</summary>
#
# `generate_batch` pads the prompts of 64 questions to one length. Sorted by length they
# need less padding; then bring the answers back into the order of the questions.
#
# </details>

# %% id="w14-answers-of" exercise="answers_of" points=3 minutes=15 difficulty=2 kind="rebuild"
def answers_of(
    teacher: nn.Module, tokenizer, questions: Sequence[str], max_new_tokens: int = 48
) -> list[list[dict]]:
    """Ask the teacher, greedily: conversations of "role" and "content".

    Answers that are empty or not closed within max_new_tokens are left out.
    Kim and Rush 2016, arXiv:1606.07947.
    """
    ### BEGIN SOLUTION
    turns = [{"role": "user", "content": question} for question in questions]
    prompts = [tokenizer.apply_chat_template([turn], add_generation_prompt=True)
               for turn in turns]
    ends = (tokenizer.im_end_id, tokenizer.eos_id)
    chats = []
    for turn, new in zip(turns, generate_batch(teacher, prompts, max_new_tokens, ends)):
        text = tokenizer.decode(new, skip_special=True).strip()
        if text and len(new) < max_new_tokens:
            chats.append([turn, {"role": "assistant", "content": text}])
    return chats
    ### END SOLUTION

# %% id="w14-answers-of-check"
check("answers_of")

# %% [markdown] exercise="share_at_two"
# ## 6. Predict: what does heat do to a large vocabulary?
#
# A vocabulary has 6,400 tokens. At one place the teacher gives one token a logit of 10
# and all others 0. At temperature 1 the best token has a share of 77%. Which share has
# it at temperature 2? Guess first, then work it out on paper, and write the share, a
# number between 0 and 1 (within 2%), into `share_at_two`. A formula counts as a number.
# (Section 14.3.)
#
# <details><summary>Hint 1: the temperature</summary>
#
# The logit becomes 10 / 2. The others stay at 0.
#
# </details>
# <details><summary>Hint 2: the sum</summary>
#
# Each of the 6,399 others weighs $e^0$.
#
# </details>

# %% id="w14-share-at-two" exercise="share_at_two" points=2 minutes=5 difficulty=1 kind="beyond"
### BEGIN SOLUTION
share_at_two = math.exp(5) / (math.exp(5) + 6399)
### END SOLUTION

# %% id="w14-share-at-two-check"
check("share_at_two")

# %% [markdown] exercise="distill_step"
# ## 7. Two bugs
#
# A colleague wrote the soft loss of a batch in one function, for models whose
# `model(ids)` gives logits. It runs, and the loss falls. Two tests fail. **Add
# padding** (places with the label -100), and the loss becomes smaller. **Let the
# student forget a word** that the teacher often says, and the loss hardly minds. Find
# the two bugs, each in one line, and repair them in place.
#
# <details><summary>Hint 1: padding</summary>
#
# A place that does not count adds 0 to the sum. What does it add to the number by which
# the sum is divided?
#
# </details>
# <details><summary>Hint 2: the forgotten word</summary>
#
# KL(p || q) weighs each token by p. Which of the two weighs here? Section 14.10 says
# what `F.kl_div` wants as its first argument.
#
# </details>

# %% id="w14-distill-step" exercise="distill_step" points=3 minutes=15 difficulty=2 kind="beyond"
def distill_step(student, teacher, ids, labels, temperature):
    """The soft loss over the places that have a label: ids and labels are (B, T)."""
    with torch.no_grad():
        ln_p = (teacher(ids) / temperature).log_softmax(-1)  # (B, T, V)
    ln_q = (student(ids) / temperature).log_softmax(-1)
    ### BEGIN SOLUTION
    each = F.kl_div(ln_q, ln_p, reduction="none", log_target=True).sum(-1)  # (B, T)
    ### END SOLUTION
    ### BEGIN STUB
    # each = F.kl_div(ln_p, ln_q, reduction="none", log_target=True).sum(-1)  # (B, T)
    ### END STUB
    counted = labels != -100
    ### BEGIN SOLUTION
    return temperature**2 * (each * counted).sum() / counted.sum()
    ### END SOLUTION
    ### BEGIN STUB
    # return temperature**2 * (each * counted).mean()
    ### END STUB

# %% id="w14-distill-step-check"
check("distill_step")
### BEGIN HIDDEN TESTS
torch.manual_seed(41)
hidden_models = nn.Embedding(6, 6), nn.Embedding(6, 6)
hidden_ids, hidden_labels = torch.randint(0, 6, (2, 5)), torch.randint(0, 6, (2, 5))
hidden_short = distill_step(*hidden_models, hidden_ids, hidden_labels, 1.5)
hidden_ids = F.pad(hidden_ids, (0, 9))
hidden_labels = F.pad(hidden_labels, (0, 9), value=-100)
hidden_long = distill_step(*hidden_models, hidden_ids, hidden_labels, 1.5)
assert torch.allclose(hidden_short, hidden_long, atol=1e-5)
### END HIDDEN TESTS

# %% [markdown] exercise="jsd"
# ## 8. From one direction to the other
#
# KL(p || q) makes the student cover all that the teacher says, KL(q || p) lets it pick
# (section 14.10; Gu et al. 2024, arXiv:2306.08543, use the second). Agarwal et al. 2024
# (arXiv:2306.13649) go from one to the other with a dial $\beta$, the generalised
# Jensen-Shannon divergence. Both models are compared with their mixture:
# $$\mathrm{JSD}_\beta = \beta\, \mathrm{KL}(p \,\|\, m) + (1 - \beta)\,
#   \mathrm{KL}(q \,\|\, m), \qquad m = \beta\, p + (1 - \beta)\, q$$
# For $0 < \beta < 1$ it is bounded, however far apart the models are. Its ends are
# defined apart: $\beta = 0$ means KL(p || q), and $\beta = 1$ means KL(q || p). Write
# it, one number for each place. It must stay exact where a probability rounds to 0.
#
# <details><summary>Hint 1: the ends</summary>
#
# Two calls of your `kl_divergence`, in two orders.
#
# </details>
# <details><summary>Hint 2: the logarithm of a mixture</summary>
#
# $\ln m = \ln\big(e^{\ln p + \ln \beta} + e^{\ln q + \ln(1 - \beta)}\big)$, and
# `torch.logaddexp(a, b)` is $\ln(e^a + e^b)$ without rounding to 0 on the way.
#
# </details>
# <details><summary>Hint 3: a shorter way</summary>
#
# $\ln m$ is a row of logits like any other: its softmax is $m$.
#
# </details>

# %% id="w14-jsd" exercise="jsd" points=4 minutes=20 difficulty=3 kind="beyond"
def jsd(teacher_logits: Tensor, student_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence in nats: logits (..., V) each -> (...).

    beta = 0 is KL(teacher || student), beta = 1 is KL(student || teacher).
    """
    ### BEGIN SOLUTION
    if beta == 0:
        return kl_divergence(teacher_logits, student_logits)
    if beta == 1:
        return kl_divergence(student_logits, teacher_logits)
    ln_p, ln_q = (x.float().log_softmax(-1) for x in (teacher_logits, student_logits))
    ln_m = torch.logaddexp(ln_p + math.log(beta), ln_q + math.log(1 - beta))
    return beta * kl_divergence(ln_p, ln_m) + (1 - beta) * kl_divergence(ln_q, ln_m)
    ### END SOLUTION

# %% id="w14-jsd-check"
check("jsd")

# %% [markdown] exercise="top_k_divergence"
# ## 9. An experiment: how many of the teacher's numbers are needed?
#
# To store a teacher's logits for a whole text, one keeps only the $k$ largest of each
# place. Put the rest of the vocabulary into one more class, for both models: $k + 1$
# probabilities each, and the KL between those. Merging classes can only lose, so the
# result is at most the full KL.
#
# Write `top_k_divergence`. The $k$ tokens are the teacher's best at each place. Then
# measure: `two_models()` gives a teacher and a student at 200 places with 1,000 tokens.
# Fill the dict `measured`: for $k$ = 1, 4, 16, 64 and 256, the mean of the top-k
# divergence over all places, divided by the mean of the full KL.
#
# **Predict first:** which is the smallest of the five that keeps at least half? Write
# it into `predicted_k`, and correct it afterwards if you were wrong.
#
# <details><summary>Hint 1: the classes</summary>
#
# `topk(k, dim=-1)` gives values and indices; `gather(-1, indices)` takes the same
# tokens from the student.
#
# </details>
# <details><summary>Hint 2: the rest</summary>
#
# The rest of the probability is 1 minus the sum of the $k$, or the sum of the others.
# Near 1 the first way rounds badly: stay above 0 with `clamp(min=1e-9)`, or use
# float64.
#
# </details>

# %% id="w14-top-k" exercise="top_k_divergence" points=4 minutes=25 difficulty=3 kind="beyond"
def two_models() -> tuple[Tensor, Tensor]:
    """Logits of a teacher and of a student that is not there yet, (200, 1000) each."""
    chance = torch.Generator().manual_seed(0)
    fall = -1.2 * torch.arange(1.0, 1001.0).log()  # Zipf: a few likely tokens, a tail
    teacher = fall + torch.randn(200, 1000, generator=chance)
    return teacher, teacher + torch.randn(200, 1000, generator=chance)


### BEGIN SOLUTION
predicted_k = 16
### END SOLUTION

def top_k_divergence(teacher_logits: Tensor, student_logits: Tensor, k: int) -> Tensor:
    """KL(teacher || student) of the teacher's k best tokens and the rest as one class.

    Logits (..., V) each -> (...), in nats.
    """
    ### BEGIN SOLUTION
    p, q = (x.double().softmax(-1) for x in (teacher_logits, student_logits))
    order = p.argsort(dim=-1, descending=True)
    classes = []
    for shares in (p, q):
        ranked = shares.gather(-1, order)
        rest = ranked[..., k:].sum(-1, keepdim=True)
        classes.append(torch.cat((ranked[..., :k], rest), dim=-1).clamp(min=1e-30))
    p, q = classes
    return (p * (p / q).log()).sum(-1).float()
    ### END SOLUTION

### BEGIN SOLUTION
measured = {
    k: (top_k_divergence(*two_models(), k).mean()
        / kl_divergence(*two_models()).mean()).item()
    for k in (1, 4, 16, 64, 256)
}
### END SOLUTION

# %% id="w14-top-k-check"
check("top_k_divergence")

# %% [markdown]
# What you lose and what you save: sixteen numbers and as many token numbers take a
# thirtieth of the memory here. With 6,400 tokens it is a two-hundredth.

# %% id="w14-top-k-try"
for k, share in measured.items():
    print(f"k = {k:3}: {share:.0%} of the divergence")

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves the functions of exercises 1 to 5 that pass to `student/distill.py`.
# With `MINIMIND_STUDENT=student` before a command, the course uses them: your own loss
# teaches the students of chapter 14.

# %% id="w14-keep"
keep()
