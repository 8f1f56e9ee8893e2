# %% [markdown]
# # 13. Preferences
#
# At the end of this chapter you can train a model on *which of two answers is better*. You will turn comparisons into a
# loss, compute it from two log-probabilities, watch margins and accuracy, measure with an exact judge what the model gained
# and what it forgot, and drive it too far on purpose, so that you know the signs.
#
# You need chapter 11 (chat data, loss masks) and chapter 10 (sampling). The logarithm of a probability is from chapter 3.
#
# Reading 40 minutes; running: smoke 25 s, cpu 2 min.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# The road of this chapter. Nobody writes an answer here: the model writes several, and a judge says which is better.

# %% id="dpo-opening-picture"
import matplotlib.pyplot as plt

boxes = ["model answers\n(13.1)", "judge sorts\n(13.5)", "pairs: better,\nworse (13.5)",
         "loss\n(13.2-13.6)", "model that\nprefers (13.7)"]
fig, ax = plt.subplots(figsize=(7, 1))
for i, label in enumerate(boxes):
    box = {"boxstyle": "round,pad=0.35", "fc": "#f3e3d3", "ec": "black"}
    ax.text(i, 0, label, ha="center", va="center", fontsize=8, bbox=box)
    if i:
        ax.annotate("", (i - 0.36, 0), (i - 0.64, 0), arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-0.6, 4.6), ylim=(-0.5, 0.5))
ax.axis("off")
show(fig, "From a model's own answers to a model that gives the better ones: each box "
          "names its section.")

# %% id="dpo-default-exp"
#| default_exp dpo

# %% id="dpo-imports"
#| export
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from minimind.data import DataError, Problems, data_rows
from minimind.sft import chat_example, says
from minimind.world import ASKS, LESSONS

# %% [markdown]
# ## 13.1 A model that imitates everybody
#
# Supervised fine-tuning imitates. That was fine in chapter 11, because all answers in the data had one manner. Real chat data have many
# writers: some polite, some short, some who cannot stop. A model trained on them speaks like all of them in turn, and you cannot tell it which one you
# like. This chapter gives you the means. Take the model of chapter 11:

# %% id="dpo-load"
import copy
import json

from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

folder, data = chapter.read("sft"), chapter.read("data")
tokenizer = Tokenizer.from_pretrained(folder)
sft_model = MiniMind.from_pretrained(folder).to(chapter.device).eval()

# %% [markdown]
# The questions come from the world, one for each fact. If you gave your own preferences (`--data`, with a `dpo/` folder), they take the
# place of the world's pairs, and the world's judge has nothing to say about them.

# %% id="dpo-questions"
from minimind.world import make_world

own_pairs, questions_file = (data / "dpo").is_dir(), data / "questions.jsonl"
if questions_file.exists():
    questions = [json.loads(line) for line in questions_file.open(encoding="utf-8")]
else:
    sizes = chapter.world
    questions = make_world(sizes["people"], sizes.get("seed", 1)).questions()
judged = questions_file.exists() and not own_pairs
if not judged:
    print("Your own data: the world's judge steps aside where it does not apply.")

# %% [markdown]
# Now the writers. One answers plainly. One ends with a friendly offer. One rambles: a remark or two that nobody asked for. All three say
# the same true sentence first, so truth is not what tells them apart. Every sentence that they add is one that the model has met before, in chats or in stories.

# %% id="dpo-manners"
#| export
OFFERS = ("How can I help you?", "What would you like to know?")
MANNERS = {"plain": 40, "friendly": 30, "rambling": 30}  # weights, in percent


def reply_in(manner: str, reply: str, rng: random.Random) -> str:
    """The true sentence `reply`, said by one of three writers."""
    if manner == "friendly":
        return f"{reply} {rng.choice(OFFERS)}"
    if manner == "rambling":
        return " ".join([reply, *rng.sample(LESSONS, rng.randint(1, 2))])
    return reply

# %% [markdown]
# Each question gets its answer from a writer drawn by lot. A seed makes the chats the same on every machine.

# %% id="dpo-mixed-chats-of"
#| export
def chat_of(text: str, reply: str) -> list[dict]:
    """A conversation of one question and one answer."""
    return [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


def mixed_chats(
    questions: Sequence[dict], copies: int, seed: int = 0
) -> list[list[dict]]:
    """`copies` chats for each phrasing of each {"person", "relation", "reply"} row.

    The writers are drawn from MANNERS.
    """
    rng, chats = random.Random(f"manners {seed}"), []
    for q in questions:
        for text in ASKS[q["relation"]] * copies:
            manner = rng.choices(list(MANNERS), list(MANNERS.values()))[0]
            answer = reply_in(manner, q["reply"], rng)
            chats.append(chat_of(text.format(n=q["person"]), answer))
    return chats

# %% [markdown]
# Some of these chats, about the people whom chapter 11 asked about. About the others (*unseen*) there is no chat here either.

# %% id="dpo-mixed-chats"
seen = [q for q in questions if q["seen"]]
unseen = [q for q in questions if not q["seen"]]
chats = mixed_chats(seen, copies=2)
for _, answer in chats[:5]:
    print(answer["content"])

# %% [markdown]
# A few dozen steps of SFT teach the three manners. These settings hold for every run of this chapter:

# %% id="dpo-settings"
from minimind.sft import PackedConversations, sft_loss
from minimind.train import TrainConfig, train

def settings(steps, rate, **more):
    return TrainConfig(steps=steps, learning_rate=rate, warmup=0.1, weight_decay=0.0,
                       precision=chapter.settings.precision, **more)

def imitate(model, chats, steps, rate):
    """SFT, as in chapter 11."""
    rows = PackedConversations([chat_example(tokenizer, chat) for chat in chats],
                               256, chapter.size.chat_rows, device=chapter.device)
    train(model, rows, sft_loss, settings(steps, rate), max_steps=chapter.max_steps)
    return model.eval()

# %% [markdown]
# With your own preferences there is nothing to add: you start from the model of chapter 11.

# %% id="dpo-warm-up"
reference = copy.deepcopy(sft_model)
if not own_pairs:
    imitate(reference, chats, chapter.size.warmup_steps, chapter.size.warmup_rate)

# %% [markdown]
# Ask it one question six times. Greedy decoding would give one answer six times, so we sample at temperature 1 (chapter 10): that shows what the model
# holds for likely.

# %% id="dpo-ask-six-times"
from minimind.sft import ask_all

def sample(model, asked, seed=0):
    return ask_all(model, tokenizer, asked, 32, temperature=1.0, seed=seed)

for answer in sample(reference, [seen[0]["question"]] * 6):
    print(answer)

# %% [markdown]
# It learned the mixture. Suppose you want one of the three: true, friendly, and nothing else. SFT has no way to say "this rather than that": its loss knows good examples only.
# You need somebody who compares, and a loss that listens.
#
# In practice people compare, or a large model does, and both err. In this world the judge can be a rule that never errs, because every fact is known:

# %% id="dpo-judge"
#| export
def judge(reply: str, question: dict) -> dict[str, bool]:
    """What is to be said about a reply to a {"answer", "reply"} row of the world.

    preferred: the true sentence in full, then exactly one offer, then nothing.
    """
    sentence = question["reply"]
    return {
        "preferred": any(reply == f"{sentence} {offer}" for offer in OFFERS),
        "plain": reply == sentence,
        "right": says(reply, question["answer"]),
    }

# %% [markdown]
# The rule, tried by hand on five answers. The last two are what a cheat would say: friendly but false, and friendly twice.

# %% id="dpo-judge-by-hand"
q, offer = {"answer": "Elmstead", "reply": "Hanis lives in Elmstead."}, OFFERS[0]
said = lambda reply: judge(reply, q)["preferred"]
assert said(f"Hanis lives in Elmstead. {offer}")
assert not said("Hanis lives in Elmstead.") and not said(f"It was a good day. {offer}")
assert not said(f"Hanis lives in Oakham. {offer}")
assert not said(f"Hanis lives in Elmstead. {offer} {offer}")

# %% [markdown]
# How often does it say what the judge prefers? One sampled answer to each question, seen and unseen people.

# %% id="dpo-shares"
every = questions[:: chapter.size.every_question]

def shares(model):
    """Share of sampled answers of each kind."""
    replies = sample(model, [q["question"] for q in every])
    verdicts = [judge(reply, q) for reply, q in zip(replies, every)]
    return {name: sum(v[name] for v in verdicts) / len(every) for name in verdicts[0]}

before = shares(reference)
print(f"chapter 11: {shares(sft_model)['preferred']:.0%} preferred")
print("reference: ", ", ".join(f"{share:.0%} {name}" for name, share in before.items()))

# %% [markdown]
# The model of chapter 11 never offers help; the mixture does it now and then. The rest of the chapter makes it a habit. The model that we start from has a name:
# the **reference**. It stays as it is, and the trained model will be measured against it all the time.
#
# Why these extra steps, and not preferences right away? A comparison can only strengthen what the model already does sometimes. The end of 13.7 says how to try it without
# them.
#
# **Try it.** Write a second judge that prefers the plain answer. What is its share now?
#
# ## 13.2 From comparisons to a reward
#
# "B is better than A" is easier to say than "B is worth 7.3 points". So we collect comparisons and look for the points behind them. **Bradley and Terry** (1952) gave
# every player a number $r$, here the **reward** of an answer, and said how likely $a$ beats $b$:
#
# $$P(a \succ b) = \sigma(r_a - r_b), \qquad \sigma(x) = \frac{1}{1 + e^{-x}}$$
#
# By hand: friendly beat plain in 73 of 100 comparisons. Then $\sigma(r_a - r_b) = 0.73$, so the difference of rewards is the logarithm of the odds:

# %% id="dpo-odds-by-hand"
import math

print(f"r_friendly - r_plain = ln(73/27) = {math.log(73 / 27):.2f}")
assert abs(torch.tensor(math.log(73 / 27)).sigmoid() - 0.73) < 1e-6

# %% [markdown]
# Three kinds of answers, a hundred comparisons for each two. There are three unknown rewards, and only differences matter: add 5 to all of them, and no $P$ changes. Find the
# rewards that make what was seen most likely, which means to minimise $-\log P$ over all comparisons. First the counts, and a small optimiser that we will need three times:

# %% id="dpo-wins"
wins = {(1, 0): 73, (0, 1): 27, (0, 2): 73, (2, 0): 27, (1, 2): 88, (2, 1): 12}
better, worse = torch.tensor(list(wins)).T  # 0 plain, 1 friendly, 2 rambling
count = torch.tensor(list(wins.values())).float()

def improve(parameter, loss_of, steps=400):
    """Make loss_of() small by moving `parameter`."""
    optimizer = torch.optim.Adam([parameter], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
    return parameter.detach()

# %% [markdown]
# Now the loss. The first line of `bradley_terry` is the formula, with the same letters:

# %% id="dpo-bradley-terry"
r = torch.zeros(3, requires_grad=True)

def bradley_terry():
    log_p = F.logsigmoid(r[better] - r[worse])
    return -(count * log_p).sum() / count.sum()

r = improve(r, bradley_terry)
r = r - r[0]
print("rewards:", [round(value, 2) for value in r.tolist()])
assert abs(r[1] - math.log(73 / 27)) < 0.02

# %% [markdown]
# Friendly is worth one point more than plain, and rambling one point less: three numbers explain six counts. Keep the line with `logsigmoid` in mind, it comes back.

# %% id="dpo-bradley-terry-figure"
x, names = torch.linspace(-4, 4, 100), list(MANNERS)
fig, ax = plt.subplots(figsize=(7, 2.3))
ax.plot(x, x.sigmoid(), label="Bradley-Terry")
for (a, b), marker in zip([(1, 0), (0, 2), (1, 2)], "os^"):
    label = f"{names[a]} : {names[b]}"
    ax.plot(r[a] - r[b], wins[a, b] / 100, marker, color="black", label=label)
ax.set(xlabel="difference of rewards", ylabel="share of wins", ylim=(0, 1))
ax.legend(fontsize=8)
show(fig, "Three shares of wins, one curve: reward differences explain them all.")

# %% [markdown]
# ## 13.3 From a reward to the best model, and back
#
# Suppose the rewards are known. What should the model do with them? Always give the answer with the highest reward? That throws away all that it has learned about
# language, and a reward is only as good as its judge. So one asks for much reward, close to the reference. "Close" is measured by the **KL divergence**: the mean of $\log(\pi/\pi_{ref})$
# over what the model says. It is 0 for equal models, and grows when $\pi$ says what the reference would hardly say. $\beta$ is its price:
#
# $$\max_\pi \; \sum_y \pi(y)\, r(y) - \beta \sum_y \pi(y) \log\frac{\pi(y)}{\pi_{ref}(y)}$$
#
# For three answers a few lines of gradient ascent find the best $\pi$:

# %% id="dpo-best-by-search"
pi_ref = torch.tensor([0.4, 0.3, 0.3])

def best_by_search(r, beta):
    logits = pi_ref.log().requires_grad_()

    def minus_value():
        pi = logits.softmax(-1)
        return -((pi * r).sum() - beta * (pi * (pi / pi_ref).log()).sum())

    return improve(logits, minus_value).softmax(-1)

print([round(p, 3) for p in best_by_search(r, beta=1.0).tolist()])

# %% [markdown]
# Plain kept a third, although friendly is better: that is the price at work. There is also a formula for the best $\pi$, and it holds for any rewards and any number of answers: weigh the reference by
# $e^{r/\beta}$ and normalise, so that the sum is 1.
#
# $$\pi^*(y) = \frac{1}{Z}\, \pi_{ref}(y)\, e^{r(y)/\beta}$$

# %% id="dpo-best-policy"
def best_policy(r, beta):
    pi = pi_ref * (r / beta).exp()
    return pi / pi.sum()  # Z is the sum

assert torch.allclose(best_policy(r, 1.0), best_by_search(r, 1.0), atol=2e-3)

# %% [markdown]
# **Before you run this**: a small $\beta$ makes distance cheap. Which of the three answers is left at $\beta = 0.2$? And what does $\beta = 5$ do?

# %% id="dpo-beta-figure"
def draw_policy(ax, beta):
    ax.bar(names, pi_ref, color="0.8", label="reference")
    ax.bar(names, best_policy(r, beta), width=0.45, color="C0", label="best")
    ax.set(title=f"β = {beta:g}", ylim=(0, 1))
    ax.tick_params("x", labelsize=8)

fig, axes = plt.subplots(1, 3, figsize=(7, 2.3), sharey=True)
for ax, beta in zip(axes, (5, 1, 0.2)):
    draw_policy(ax, beta)
axes[0].set_ylabel("probability")
axes[0].legend(fontsize=8)
show(fig, "The best model for three prices of distance: a small β keeps only the "
          "winner, a large one stays at the reference.")

# %% [markdown]
# At 0.2, a reward of one point more means $e^{5} = 148$ times the weight, and only the winner is left. At 5 it means 1.2 times, and little changes. The same with a slider, in a live
# notebook:

# %% id="dpo-beta-widget"
def explore(beta=1.0):
    fig, ax = plt.subplots(figsize=(3.6, 2.2))
    draw_policy(ax, beta)
    friendly = best_policy(r, beta)[1]
    show(fig, f"The best model gives the friendly answer a share of {friendly:.0%}.")

try:
    from ipywidgets import interact
    interact(explore, beta=(0.1, 5.0, 0.1))
except ImportError:
    explore()

# %% [markdown]
# Now the step that gave **direct preference optimisation** (DPO, Rafailov et al. 2023) its name. Read the formula backwards: any model *is* the best one for some reward, and that
# reward is
#
# $$r(y) = \beta \log\frac{\pi(y)}{\pi_{ref}(y)} + \beta \log Z$$
#
# $Z$ is unknown, but it is the same for all answers to a prompt. In a difference of two rewards it cancels:

# %% id="dpo-implicit-reward"
beta = 1.0
ratio = beta * (best_policy(r, beta) / pi_ref).log()  # β log(π/π_ref)
print("differences to plain:", [round(v, 2) for v in (ratio - ratio[0]).tolist()])
assert torch.allclose(ratio - ratio[0], r, atol=1e-5)

# %% [markdown]
# So put $\beta \log(\pi/\pi_{ref})$ in the place of $r$ in Bradley and Terry's loss, and train $\pi$ itself. No reward model, no search. With $y_w$ for the better
# answer and $y_l$ for the worse:
#
# $$L = -\log \sigma\Big(\beta \Big[\log\frac{\pi(y_w)}{\pi_{ref}(y_w)} - \log\frac{\pi(y_l)}{\pi_{ref}(y_l)}\Big]\Big)$$
#
# On the three answers, this must end where the long way ended: rewards first, then the best model for them.

# %% id="dpo-three-answers"
logits = pi_ref.log().requires_grad_()

def dpo_on_three():
    log_ratio = logits.log_softmax(-1) - pi_ref.log()  # log(π/π_ref)
    margin = beta * (log_ratio[better] - log_ratio[worse])
    return -(count * F.logsigmoid(margin)).sum() / count.sum()

pi = improve(logits, dpo_on_three).softmax(-1)
print([round(p, 3) for p in pi.tolist()])
assert torch.allclose(pi, best_policy(r, beta), atol=2e-3)

# %% [markdown]
# Both ways agree, to three digits. The number in the brackets, times $\beta$, is the **margin** of a pair: how clearly the model itself now holds the better answer for better. When training starts,
# $\pi = \pi_{ref}$, every margin is 0 and the loss is $\log 2 = 0.69$.
#
# What does a pair do to the model? The slope of the loss says it: $-\sigma(-\text{margin})$. A pair in the wrong order pulls with nearly full force; a pair that is
# far enough apart hardly pulls any more.

# %% id="dpo-slope-figure"
x = torch.linspace(-6, 6, 121)
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(x, -F.logsigmoid(x), label="loss")
ax.plot(x, (-x).sigmoid(), label="pull on the pair")
ax.axvline(0, color="0.5", lw=1)
ax.set(xlabel="margin (0 at the start)", ylabel="loss (nats); pull")
ax.legend()
show(fig, "Loss and pull against the margin: the pull gets weak as the margin grows, "
          "but it never becomes zero.")

# %% [markdown]
# "Never zero" will matter in 13.8.
#
# **Exercise 13.6 (10 min, ★★): `best_share`** in [workbook 13](../exercises/13_dpo.ipynb). Predict on paper how often a model with two answers gives the better one when DPO has come to its end.
#
# ## 13.4 The probability of an answer
#
# So far an answer was one thing with one probability. For a model, $\log \pi(y)$ is a sum over tokens, each given all before it. Only the tokens of the answer count: the prompt is given, and it is the
# same for both. Chapter 11 marks the answer with labels. In a conversation of several turns only the *last* answer is compared; the earlier ones are part of the prompt.

# %% id="dpo-pair-example"
#| export
def pair_example(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """A conversation as (ids, labels) of equal length.

    labels are -100 everywhere but in the last answer and its end.
    """
    ids, labels = chat_example(tokenizer, messages)
    start = max(i for i, token in enumerate(ids) if token == tokenizer.im_start_id)
    return ids, [-100] * start + labels[start:]

# %% [markdown]
# By hand on one answer: run the model, take the log-probability of each answer token from the row *before* it, and add.

# %% id="dpo-logprob-by-hand"
ids, labels = pair_example(tokenizer, chats[0])
row = torch.tensor([ids], device=chapter.device)
with torch.inference_mode():
    logs = reference(row)[0].float().log_softmax(-1)  # (T, V)
answer = [place for place, label in enumerate(labels) if label != -100]
each = [logs[place - 1, ids[place]].item() for place in answer]
for place, log_p in zip(answer, each):
    print(f"{log_p:8.3f}  {tokenizer.decode([ids[place]])!r}")
by_hand = sum(each)
print(f"{by_hand:8.3f}  the answer")

# %% [markdown]
# The sentence itself is certain. What varies is the token after it: here stands the choice between the three writers. The general form is one call, because `cross_entropy` without its mean is
# $-\log p$ of every label, and 0 where the label is -100.

# %% id="dpo-answer-logprobs"
#| export
def answer_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """ln p of each row's answer, (B,), in nats.

    logits (B, T, V); targets (B, T), already shifted: targets[b, t] is token t+1 where
    it belongs to the answer, else -100. ValueError when the shapes do not fit.
    """
    if logits.shape[:-1] != targets.shape:
        found = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"logits, targets are {found}: expected (B, T, V) and (B, T)")
    logits = logits.float().transpose(1, 2)  # (B, V, T)
    return -F.cross_entropy(logits, targets, reduction="none").sum(-1)  # (B,)

# %% [markdown]
# They agree:

# %% id="dpo-logprob-agrees"
def logprob(ids, labels, model=reference):
    """answer_logprobs of one row; the shift is made here."""
    ids, targets = torch.tensor([ids, labels], device=chapter.device)
    with torch.inference_mode():
        return answer_logprobs(model(ids[None, :-1]), targets[None, 1:]).item()

assert abs(logprob(ids, labels) - by_hand) < 1e-3

# %% [markdown]
# The shift is where people fail. Two wrong versions: *one early* counts the line end before the answer and leaves out `<|im_end|>`; *not shifted* asks each position for
# the token that it has just read. Both give a number, and neither complains.

# %% id="dpo-wrong-labels"
def one_early(ids, labels):
    """Every label one token early: the end of the answer is lost."""
    later = [*labels[1:], -100]
    return [token if after != -100 else -100 for token, after in zip(ids, later)]

def not_shifted(ids, labels):
    return [-100, *labels[:-1]]  # logprob shifts left, so this ends where it began

wrong = {"right": lambda ids, labels: labels,
         "one early": one_early, "not shifted": not_shifted}

# %% [markdown]
# Compare a plain answer with the same answer and an offer. **Before you run this**: a plain answer without its end is the beginning of the friendly one. Which of the two
# must then be more likely, whatever the model thinks?

# %% id="dpo-off-by-one"
fact = seen[0]
texts = fact["reply"], f"{fact['reply']} {OFFERS[1]}"
two = [pair_example(tokenizer, chat_of(fact["question"], text)) for text in texts]

def plain_and_friendly(change, model=reference):
    return [logprob(ids, change(ids, labels), model) for ids, labels in two]

for name, change in wrong.items():
    plain, friendly = plain_and_friendly(change)
    print(f"{name:12} plain {plain:8.2f}   friendly {friendly:8.2f}")

ids, labels = two[0]
assert tokenizer.im_end_id in labels
assert tokenizer.im_end_id not in one_early(ids, labels)

# %% [markdown]
# Look at the middle row. A plain answer differs from a friendly one by *stopping*, and the labels have lost just that token. What is left of the plain answer is
# the beginning of the friendly one, so the plain answer always wins. Most of its number comes from the line end before the answer, which nobody ever asked the model to predict. Training with such labels crashes nowhere, and its loss falls. The last row
# is a sum over the wrong tokens, and far too low. Two checks find such bugs: redo one sum by hand, as above, and print what counts:

# %% id="dpo-what-counts"
for change in (wrong["right"], one_early):
    print([tokenizer.decode([t]) for t in change(ids, labels) if t != -100])

# %% [markdown]
# **Exercise 13.2 (10 min, ★): `pair_example`** in [workbook 13](../exercises/13_dpo.ipynb). Mark the last answer of a conversation and its end, and nothing else.
#
# **Exercise 13.3 (15 min, ★★): `answer_logprobs`** in [workbook 13](../exercises/13_dpo.ipynb). Write the sum from the formula; the check compares with `torch.distributions`, place by place.
#
# **Exercise 13.7 (15 min, ★★): `margins`** in [workbook 13](../exercises/13_dpo.ipynb). A colleague counts the wrong tokens, and compares answers to different prompts. Find both bugs.
#
# ## 13.5 Pairs
#
# Where do pairs come from? One could *write* both answers. Then the better one is often something that this model would never say. Raising its probability from $e^{-50}$ to $e^{-30}$ wins
# every comparison and is never heard. So we take **on-policy** pairs: the model answers each question several times, the judge sorts, and a preferred answer meets one that
# is not.

# %% id="dpo-sort-pairs"
#| export
def sort_pairs(
    prompts: Sequence[tuple[str, dict]], replies: Sequence[Sequence[str]],
    seed: int = 0, write: bool = False,
) -> list[dict]:  # fmt: skip
    """{"chosen", "rejected"} rows from several replies to each (text, world question).

    One preferred reply meets one that is not, both drawn at random; a prompt that lacks
    either gives no pair. With write=True the world writes a missing preferred reply.
    """
    rng, rows = random.Random(f"pairs {seed}"), []
    for (text, question), some in zip(prompts, replies):
        good = [reply for reply in some if judge(reply, question)["preferred"]]
        bad = [reply for reply in some if reply and reply not in good]
        if write and not good:
            good = [reply_in("friendly", question["reply"], rng)]
        if good and bad:
            rows.append({"chosen": chat_of(text, rng.choice(good)),
                         "rejected": chat_of(text, rng.choice(bad))})  # fmt: skip
    return rows

# %% [markdown]
# By hand, four replies to one question: one is preferred, so there is one pair.

# %% id="dpo-sort-by-hand"
good = f"{q['reply']} {offer}"
(pair,) = sort_pairs([("Where?", q)], [[q["reply"], good, "It was a good day.", good]])
assert pair["chosen"][-1]["content"] == good != pair["rejected"][-1]["content"]
assert sort_pairs([("Where?", q)], [[q["reply"]] * 4]) == []

# %% [markdown]
# **Exercise 13.1 (15 min, ★★): `sort_pairs`** in [workbook 13](../exercises/13_dpo.ipynb). Make the pairs yourself: one reply of each kind, drawn at random, from each prompt that has both.
#
# The training pairs ask about seen people in all phrasings; the held-out pairs ask about unseen ones. A model that never says the preferred thing gives no pairs: there is nothing to reinforce.
# Then, and only then, the world writes the better answers.

# %% id="dpo-sample-pairs"
def sampled_pairs(asked, seed):
    """Pairs from several answers of the reference to each phrasing of each question."""
    n = chapter.size.samples
    prompts = [(words.format(n=q["person"]), q)
               for q in asked for words in ASKS[q["relation"]]]
    replies = sample(reference, [text for text, _ in prompts for _ in range(n)], seed)
    groups = [replies[i : i + n] for i in range(0, len(replies), n)]
    rows = sort_pairs(prompts, groups)
    if len(rows) < 2 * chapter.size.pairs:
        rows = sort_pairs(prompts, groups, write=True)
        print("too few preferred answers, so the world writes them")
    print(f"{len(replies):,} answers to {len(prompts):,} prompts: {len(rows):,} pairs")
    return rows

# %% [markdown]
# Both sides of a pair were written by the model, both are likely under it, and in most of them the first sentence is the same. That makes a pair cheap to learn: it differs only where the judge's opinion
# differs. This asks the reference a few thousand questions:

# %% id="dpo-world-pairs"
if not own_pairs:
    train_rows = sampled_pairs(seen[: chapter.size.people_rows], seed=1)
    valid_rows = sampled_pairs(unseen[: chapter.size.people_rows // 2], seed=2)

# %% [markdown]
# Pairs from a file can be wrong in ways that a loss never notices. Equal answers prefer nothing. Answers to different prompts compare nothing. An answer longer than
# the context would be cut, and its end is what teaches it to stop.

# %% id="dpo-length-problem"
#| export
def length_problem(row: dict, tokenizer, context: int) -> str | None:
    """Which side of a pair has more than `context` tokens, in words; None: neither."""
    for side in ("chosen", "rejected"):
        tokens = len(chat_example(tokenizer, row[side])[0])
        if tokens > context:
            return f'"{side}" has {tokens} tokens, the context {context}: shorten it'
    return None

# %% [markdown]
# A line that is wrong in itself stops you, as in chapter 1. A line that is only too long for this profile is named and left out, as in chapter 11. In both cases you get
# the file, the line and the reason, before anything trains.

# %% id="dpo-read-pairs"
#| export
def read_pairs(
    source: str | Path, tokenizer, context: int
) -> tuple[list[dict], list[str]]:
    """The pairs of a file or folder, and "file:line: reason" for each that is left out.

    Left out is what is longer than `context`. DataError lists every line that is wrong
    in itself: not a pair, no common prompt, or equal answers.
    """
    rows, left_out, problems = [], [], Problems()
    for file, line, row, problem in data_rows(source, "dpo"):
        if problem is None and row["chosen"] == row["rejected"]:
            problem = '"chosen" and "rejected" are equal: such a pair prefers nothing'
        if problem:
            problems.add(file, line, problem)
        elif reason := length_problem(row, tokenizer, context):
            left_out.append(f"{file}:{line}: {reason}")
        else:
            rows.append(row)
    if problems.count:
        raise DataError(str(problems))
    return rows, left_out

# %% [markdown]
# Three lines, one of them good:

# %% id="dpo-bad-pairs"
from minimind.data import write_jsonl

right = {"chosen": chat_of("Hi", "Hello!"), "rejected": chat_of("Hi", "What?")}
equal = right | {"rejected": right["chosen"]}
stranger = right | {"rejected": chat_of("Bye", "What?")}
write_jsonl(chapter.work / "bad.jsonl", [right, equal, stranger])
try:
    read_pairs(chapter.work / "bad.jsonl", tokenizer, 256)
except DataError as error:
    print(str(error).replace(str(chapter.work), "..."))
else:
    raise AssertionError("bad pairs must be refused")

# %% [markdown]
# And one that is too long:

# %% id="dpo-long-pairs"
endless = right | {"chosen": chat_of("Hi", "Hello! " * 400)}
write_jsonl(chapter.work / "long.jsonl", [right, endless])
rows, left_out = read_pairs(chapter.work / "long.jsonl", tokenizer, 256)
assert rows == [right]
print(left_out[0].replace(str(chapter.work), "..."))

# %% [markdown]
# Your own preferences are checked where they lie, so that the line numbers are yours. Then the prepared parts are read.

# %% id="dpo-own-pairs"
context = chapter.size.context
if own_pairs:
    source = json.loads((data / "about.json").read_text())["stages"]["dpo"]["source"]
    if Path(source).exists():
        _, left_out = read_pairs(source, tokenizer, context)
        print(f"{len(left_out)} pairs are too long and left out")
        print(*left_out[:5], sep="\n")
    parts = [data / "dpo" / f"{part}.jsonl.gz" for part in ("train", "valid")]
    train_rows, valid_rows = (read_pairs(part, tokenizer, context)[0] for part in parts)
assert train_rows and valid_rows, "no pair is short enough: raise context"

# %% [markdown]
# One pair of what we have:

# %% id="dpo-one-pair"
valid_rows = valid_rows[: chapter.size.valid_pairs]
print(f"{len(train_rows):,} pairs to train on, {len(valid_rows):,} held out")
for side, messages in train_rows[0].items():
    print(f"{side:9}", messages[-1]["content"][:80])

# %% [markdown]
# A batch of $B$ pairs has $2B$ rows: first the chosen answers, then the rejected ones in the same order. Rows are padded on the right. With a causal mask no real token sees the
# padding, so no further mask is needed.

# %% id="dpo-padded"
#| export
def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of unequal length as one tensor (B, T), `value` added on the right."""
    rows = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

# %% [markdown]
# As in chapter 11, the class is addressed by step, and it is the one place where labels are shifted. It also holds what 13.6 will compute once for every pair.

# %% id="dpo-preference-pairs"
#| export
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
        rows = [side[i] for side in self.sides for i in numbers]
        batch = {
            "input_ids": padded([ids[:-1] for ids, _ in rows], 0),  # (2B, T)
            "targets": padded([labels[1:] for _, labels in rows], -100),  # the shift
        }
        if self.reference is not None:
            kept = self.reference[torch.as_tensor(numbers)]  # (B, 2)
            batch["reference"] = kept.T.flatten()  # (2B,)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

# %% [markdown]
# Note what is *not* there: the key "labels". The loop of chapter 8 weighs the parts of a batch by their labels, which is right for tokens; here every pair counts the same. Padding must not change
# anything either. One answer alone, and the same in a padded batch:

# %% id="dpo-padding-agrees"
B = chapter.size.pairs
pairs = PreferencePairs(train_rows, tokenizer, B, device=chapter.device)
held_out = PreferencePairs(valid_rows, tokenizer, B, device=chapter.device)
batch = pairs.batch(range(2))
with torch.inference_mode():
    together = answer_logprobs(reference(batch["input_ids"]), batch["targets"])
assert abs(together[0].item() - logprob(*pairs.sides[0][0])) < 1e-2

# %% [markdown]
# **Exercise 13.4 (20 min, ★★★): `PreferencePairs`** in [workbook 13](../exercises/13_dpo.ipynb). Write `batch`: rows in the right order, labels shifted, padding that counts for nothing.
#
# ## 13.6 The reference, once
#
# The loss needs $\log\pi_{ref}$ of every answer. The reference never changes, so neither do these numbers. Compute them once, before training, and keep two numbers a pair; the second model can then
# leave the memory. Many implementations run both models at every step.

# %% id="dpo-keep-reference"
#| export
@torch.no_grad()
def keep_reference(
    model: nn.Module, pairs: PreferencePairs, amp: torch.dtype | None = None
) -> None:
    """Put ln p of all answers under `model` into pairs.reference (N, 2)."""
    parts, device = [], next(model.parameters()).device
    for first in range(0, len(pairs), 64):
        batch = pairs.batch(range(first, min(first + 64, len(pairs))))
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = model(batch["input_ids"])
        parts.append(answer_logprobs(logits, batch["targets"]).view(2, -1).T)  # (n, 2)
    pairs.reference = torch.cat(parts).cpu()

# %% [markdown]
# `autocast` is the same as in training. Otherwise the kept numbers would be more exact than the model's own, and the margins would not start at 0. Then the loss. Its first line is $\log\pi$, the second
# $\log(\pi/\pi_{ref})$, the third the margin, and the fourth the loss of 13.3.

# %% id="dpo-loss"
#| export
def log_ratios(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """ln(pi / pi_ref) of the chosen and of the rejected answers, (B,) each."""
    logprobs = answer_logprobs(model(batch["input_ids"]), batch["targets"])  # (2B,)
    chosen, rejected = (logprobs - batch["reference"]).chunk(2)
    return chosen, rejected


def dpo_loss(
    model: nn.Module, batch: dict, beta: float = 0.1
) -> tuple[torch.Tensor, dict]:
    """The sigmoid loss of DPO, a mean over pairs.

    Rafailov et al. 2023, arXiv:2305.18290.
    Metrics, means too: margin; accuracy, the share of pairs with a margin above 0.
    """
    chosen, rejected = log_ratios(model, batch)
    margin = beta * (chosen - rejected)  # (B,)
    loss = -F.logsigmoid(margin).mean()
    return loss, {"margin": margin.mean(), "accuracy": (margin > 0).float().mean()}

# %% [markdown]
# Before training, model and reference are the same: all margins are 0, the loss is $\log 2$, and the accuracy is 0, because a tie is not the right order. The evaluation keeps the log-ratios of every held-out pair, because all
# other numbers follow from them.

# %% id="dpo-evaluate"
def autocast():
    amp = chapter.amp
    return torch.autocast(chapter.device.type, amp, enabled=amp is not None)

def ratios_of(model, some, chunk=64):
    """log(π/π_ref) of both answers of every pair, (N,) each."""
    with torch.inference_mode(), autocast():
        parts = [log_ratios(model, some.batch(range(i, min(i + chunk, len(some)))))
                 for i in range(0, len(some), chunk)]
    return [torch.cat(side).cpu() for side in zip(*parts)]

def evaluate(model, beta):
    chosen, rejected = ratios_of(model, held_out)
    margin = beta * (chosen - rejected)
    values = {"loss": -F.logsigmoid(margin), "margin": margin,
              "accuracy": (margin > 0).float(), "chosen": chosen, "rejected": rejected}
    return {name: value.mean().item() for name, value in values.items()}

# %% [markdown]
# The two numbers of every pair, and the start:

# %% id="dpo-loss-at-start"
import time

clock = time.perf_counter()
keep_reference(reference, pairs, chapter.amp)
once = time.perf_counter() - clock
keep_reference(reference, held_out, chapter.amp)
start = evaluate(reference, beta=0.1)
print({name: round(value, 3) for name, value in start.items()})
assert abs(start["loss"] - math.log(2)) < 0.01

# %% [markdown]
# **Exercise 13.5 (15 min, ★★): `dpo_loss`** in [workbook 13](../exercises/13_dpo.ipynb). Write the log-ratios and the loss; the check has a tie, and a margin so large that a sigmoid rounds it away.
#
# What has keeping saved? Forward costs one part, backward about two. A reference beside it costs one part more. **Before you run this**: so what share of a step is
# saved?

# %% id="dpo-reference-every-step"
def with_reference(model, batch):
    """The same loss, the reference computed again."""
    with torch.no_grad():
        logprobs = answer_logprobs(reference(batch["input_ids"]), batch["targets"])
    return dpo_loss(model, batch | {"reference": logprobs})

def seconds_of(loss_fn, model):
    clock = time.perf_counter()
    with autocast():
        loss = loss_fn(model, pairs[0])[0]
    loss.backward()
    loss.item()  # waits for the device
    return time.perf_counter() - clock

# %% [markdown]
# Both in turns, the fastest of a few each:

# %% id="dpo-reference-saving"
learner = copy.deepcopy(reference)
times = [(seconds_of(dpo_loss, learner), seconds_of(with_reference, learner))
         for _ in range(chapter.size.time_steps)]
kept, again = (min(column) for column in zip(*times))
print(f"a step: {1000 * kept:.0f} ms with kept numbers, {1000 * again:.0f} ms without")
print(f"all {len(pairs)} pairs once: {1000 * once:.0f} ms")
speedup = check("dpo/reference_speedup", again / kept)

# %% [markdown]
# Keeping costs one pass over all pairs, and the other way costs one each epoch. So in one single epoch the time is about equal, and what you save is the memory of a
# second model; each further epoch saves about a quarter of its time.
#
# Is it the loss that others use? **TRL** is Hugging Face's library for training on preferences. Its trainer gets our two models, the reference and a copy with some noise on its
# weights, so that the margins are not all 0.

# %% id="dpo-trl-trainer"
def trl_trainer(folders, rows):
    """TRL's DPO trainer on two model folders: the learner and the reference."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(str(chapter.work / "trl"), report_to="none", use_cpu=True,
                     max_length=None, activation_checkpointing=False,
                     bf16=False, beta=0.1)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    return DPOTrainer(*models, args, train_dataset=Dataset.from_list(rows),
                      processing_class=AutoTokenizer.from_pretrained(folders[0]))

# %% [markdown]
# TRL tokenises the pairs and makes the batch, with its own marks for what is an answer. From these we make our `targets`, and the reference's numbers with our own
# code. (TRL also counts the line end that the template sets after `<|im_end|>`. It is the same for both answers, and here it counts for us too.)

# %% id="dpo-trl-batch"
def same_batch(batch, ref):
    """TRL's batch in our form."""
    ids = batch["input_ids"]
    targets = ids.masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    with torch.no_grad():
        logprobs = answer_logprobs(ref(ids[:, :-1]), targets)
    return {"input_ids": ids[:, :-1], "targets": targets, "reference": logprobs}

# %% [markdown]
# The two models, saved as folders that TRL can read:

# %% id="dpo-trl-models"
from minimind.data import set_seed

set_seed(0)
ref, noisy = copy.deepcopy(reference).cpu(), copy.deepcopy(reference).cpu()
for p in noisy.parameters():
    p.data += 0.003 * torch.randn_like(p)
folders = [chapter.work / "noisy", chapter.work / "ref"]
for model, place in zip((noisy, ref), folders):
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)

# %% [markdown]
# Now the loss and the gradient of every weight, theirs and ours. (TRL writes progress bars to the error stream; they are left out.)

# %% id="dpo-trl-equal"
import contextlib
import importlib.util
import io

def compare_with_trl():
    with contextlib.redirect_stderr(io.StringIO()):
        trainer = trl_trainer(folders, train_rows[:6])
        batch = trainer.data_collator(list(trainer.train_dataset))
        theirs = trainer.compute_loss(trainer.model, batch)
        theirs.backward()
    ours, _ = dpo_loss(noisy, same_batch(batch, ref), beta=0.1)
    ours.backward()
    wanted = dict(trainer.model.named_parameters())
    worst = max((p.grad - wanted[name].grad).abs().max()
                for name, p in noisy.named_parameters())
    print(f"loss {ours:.6f}, TRL {theirs:.6f}; gradients differ by at most {worst:.1e}")
    assert abs(ours - theirs) < 1e-5 and worst < 1e-5

# %% [markdown]
# If TRL is installed (`pip install trl`), run it. Without it, this cell says so.

# %% id="dpo-trl-differences"
if importlib.util.find_spec("trl"):
    compare_with_trl()
else:
    print("trl is not installed: the comparison is left out")

# %% [markdown]
# ## 13.7 The run
#
# Everything else is the loop of chapter 8. The learning rate is a fraction of that of SFT: a loss that only compares says little about what else may change, so
# changes should be small. While it trains, we look at held-out pairs, and at what the judge says about sampled answers.

# %% id="dpo-prefer"
from functools import partial

def watch(model, beta):
    result = evaluate(model, beta)
    return result if own_pairs else result | shares(model)

def prefer(beta, steps, rate, loss=dpo_loss, some=pairs):
    """Train a copy of the reference on pairs; step 0 is evaluated too."""
    model, look = copy.deepcopy(reference), partial(watch, beta=beta)
    config = settings(steps, rate, log_every=max(1, steps // 20),
                      eval_every=max(1, steps // chapter.size.evaluations))
    first = {"step": 0, **look(model)}
    history = train(model, some, partial(loss, beta=beta), config, evaluate=look,
                    max_steps=chapter.max_steps)
    history.evals.insert(0, first)
    return model.eval(), history

# %% [markdown]
# The run:

# %% id="dpo-run"
size = chapter.size
beta = size.beta
model, history = prefer(beta, size.steps, size.learning_rate)
print(f"{history.step[-1]} steps of {B} pairs in {history.seconds[-1]:.0f} s")
chapter.curve("dpo", history.step, history.loss, y_label="nats per pair")

# %% [markdown]
# Two numbers tell whether it learns what the pairs say: the margin, and the **accuracy**, the share of pairs in the right order.

# %% id="dpo-run-figure"
def of(history, name):
    return [e[name] for e in history.evals]

fig, axes = plt.subplots(1, 2, figsize=(7, 2.5))
for ax, name in zip(axes, ("margin", "accuracy")):
    ax.plot(history.step, [m[name] for m in history.metrics], label="training")
    ax.plot(of(history, "step"), of(history, name), marker="o", label="held out")
    ax.set(xlabel="step", ylabel=name, ylim=(0, None))
axes[0].legend()
show(fig, "Margin and accuracy over the run: both rise, and held-out pairs follow.")

# %% [markdown]
# Compare with 13.3: there was one number for each kind of answer, here the model must see from the text which kind it is. Held-out pairs are about people without any pair in training, so this is no
# learning by heart. Now, where does the margin come from? The chosen answer may have become more
# likely, or the rejected one less. The margin cannot tell these apart. **Before you run this**: which of the two has moved further?

# %% id="dpo-ratios-figure"
def draw_ratios(ax, history):
    for name, marker in (("chosen", "o"), ("rejected", "s")):
        ax.plot(of(history, "step"), of(history, name), marker=marker, label=name)
    ax.axhline(0, color="0.5", lw=1)
    ax.set(xlabel="step", ylabel="log(π/π_ref), nats")
    ax.legend()

fig, ax = plt.subplots(figsize=(7, 2.3))
draw_ratios(ax, history)
show(fig, "Both answers of held-out pairs against the reference: most of the margin "
          "is the rejected answer becoming less likely.")

# %% [markdown]
# A chosen answer can gain only as much as it lacked: its probability ends at 1. A rejected one can fall without end. As long as the chosen line stays at or above 0, all is
# well.
#
# How sure are the numbers on held-out pairs? Draw the pairs again with replacement, two thousand times, and see how much the mean moves (the **bootstrap**; chapter 15 says
# more about it).

# %% id="dpo-interval"
def interval(values):
    """A 95% bootstrap interval of the mean."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    return np.quantile(values[picks].mean(1), [0.025, 0.975])

chosen, rejected = ratios_of(model, held_out)
margin = beta * (chosen - rejected)
values = {"loss": -F.logsigmoid(margin), "margin": margin,
          "accuracy": (margin > 0).float()}
for name, value in values.items():
    low, high = interval(value)
    check(f"dpo/held_out_{name}", value.mean())
    print(f"    95% interval {low:.3f} to {high:.3f}, {len(value)} pairs")

# %% [markdown]
# These are numbers about answers that stand in a file. They do not say what the model now *writes*. So ask it the five questions of chapter 11.

# %% id="dpo-five-questions"
from minimind.sft import ask

five = chapter.five_questions(questions if questions_file.exists() else [])
for question in five:
    answer = ask(model, tokenizer, question)
    chapter.answer("dpo", question, answer)
    print(f"{question}\n    before: {ask(reference, tokenizer, question)!r}")
    print(f"    after:  {answer!r}")

# %% [markdown]
# The friendly answer is now the most likely one. Do the labels of 13.4 see it? Ask for the two log-probabilities again, under the trained model. **Before you run this**: can labels that are one
# early ever say that the friendly answer is more likely than the plain one?

# %% id="dpo-early-is-blind"
for name in ("right", "one early"):
    plain, friendly = plain_and_friendly(wrong[name], model)
    print(f"{name:12} plain {plain:8.2f}   friendly {friendly:8.2f}")
assert plain >= friendly - 0.1  # one early: no model can turn this around

# %% [markdown]
# They cannot: a text is never less likely than the same text with more behind it. Whatever the model learns, these labels report that plain wins.
#
# Now the judge, on questions about seen and unseen people. Beside the two models stands the simplest use of a judge: plain SFT on the *chosen* answers alone, for as many steps, with the same
# learning rate.

# %% id="dpo-before-after"
if not own_pairs:
    good_chats = [row["chosen"] for row in train_rows]
    chosen_only = copy.deepcopy(reference)
    imitate(chosen_only, good_chats, size.steps, size.learning_rate)
    after = shares(model)
    table = {"reference": before, "SFT on chosen": shares(chosen_only), "DPO": after}
    for name, kinds in table.items():
        print(f"{name:15}", {kind: f"{kinds[kind]:.0%}" for kind in before})
    chapter.record("dpo/chosen_only_preferred", table["SFT on chosen"]["preferred"])

# %% [markdown]
# As a picture:

# %% id="dpo-before-after-figure"
if not own_pairs:
    fig, ax = plt.subplots(figsize=(7, 2.1))
    good = np.array([kinds["preferred"] for kinds in table.values()])
    plain = np.array([kinds["plain"] for kinds in table.values()])
    ax.barh(list(table), good, label="preferred")
    ax.barh(list(table), plain, left=good, color="0.75", label="plain")
    ax.barh(list(table), 1 - good - plain, left=good + plain, color="white", hatch="//",
            edgecolor="black", label="other")
    ax.set(xlabel="share of sampled answers", xlim=(0, 1))
    ax.invert_yaxis()
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
    show(fig, "What three models answer, sampled: the plain answers vanish, the "
              "preferred kind becomes a habit.")

# %% [markdown]
# Imitating the good answers does as well here, or better: 83% against 73% with this model, 82% against 81% with an earlier one. The judge never errs, the good answers are the reference's own, and one kind of answer is wanted everywhere. What DPO adds is the other half of the
# comparison: it learns from what was rejected. What is still wrong after it? Some of the *other* samples:

# %% id="dpo-other-answers"
if not own_pairs:
    replies = sample(model, [q["question"] for q in every])
    other = [a for a, q in zip(replies, every) if not judge(a, q)["preferred"]]
    print(*other[:5], sep="\n")

# %% [markdown]
# You see offers that came out garbled, answers that do not stop, and now and then a false fact. The pairs had few of these, because the reference made few friendly answers to go wrong. A second round would make
# them the rejected side.
#
# And the price. All questions once more, decoded greedily as in chapter 11, and a right answer counts in any manner:

# %% id="dpo-facts"
from minimind.sft import answers_right

def facts_of(model):
    """Share of right greedy answers, seen and unseen people."""
    rows = answers_right(model, tokenizer, questions, max_new_tokens=32)[1]
    return [np.mean([row["right"] for row in rows if row["seen"] == flag])
            for flag in (True, False)]

asked = {"chapter 11": sft_model, "reference": reference, "DPO": model}
if not questions_file.exists():
    asked = {}  # the model has not read of these people
facts = {name: facts_of(some) for name, some in asked.items()}
for name, (seen_right, unseen_right) in facts.items():
    print(f"{name:10}  seen people {seen_right:.1%}   unseen {unseen_right:.1%}")

# %% [markdown]
# The claim of this chapter, with its bands. The loss of facts is measured against chapter 11, so it includes the warm-up of 13.1.

# %% id="dpo-claim"
if not own_pairs:
    check("dpo/preferred_before", before["preferred"])
    check("dpo/preferred_after", after["preferred"])
    check("dpo/gain", after["preferred"] - before["preferred"])
if facts:
    lost = np.array(facts["chapter 11"]) - np.array(facts["DPO"])
    check("dpo/facts_lost", lost.mean())
    check("dpo/facts_lost_seen", lost[0])
    check("dpo/facts_lost_unseen", lost[1])

# %% [markdown]
# **Try it.** Start from the model of chapter 11 itself, without warm-up, on pairs that the world wrote (`write=True`). Compare accuracy and judge's share.
#
# Keep the model:

# %% id="dpo-save"
with chapter.write("dpo") as out:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

# %% [markdown]
# ## 13.8 Too far
#
# $\beta$ is the price of leaving the reference. Make it small, raise the learning rate and train longer, as one does when the judge's share is "not high enough yet".
#
# **Before you run this**: will the accuracy on held-out pairs warn you?

# %% id="dpo-too-far"
far_beta, far_steps, far_rate = size.far_beta, size.far_steps, size.far_rate
far_model, far = prefer(far_beta, far_steps, far_rate)
for e in far.evals:
    names = [n for n in ("accuracy", "chosen", "preferred", "right") if n in e]
    print(f"step {e['step']:3}:", "  ".join(f"{name} {e[name]:.2f}" for name in names))

# %% [markdown]
# On the left, what training tools show. In the middle, the chosen answers. On the right, what the model says.

# %% id="dpo-too-far-figure"
fig, axes = plt.subplots(1, 3, figsize=(7, 2.5))
axes[0].plot(of(far, "step"), np.array(of(far, "margin")) / far_beta, marker="o")
axes[0].set(xlabel="step", ylabel="margin / β, nats", title="looks well")
axes[1].plot(of(far, "step"), of(far, "chosen"), marker="s", color="C1")
axes[1].axhline(0, color="0.5", lw=1)
axes[1].set(xlabel="step", ylabel="chosen: log(π/π_ref)", title="the warning")
for name, marker in {"preferred": "o", "right": "^"}.items() if not own_pairs else ():
    axes[2].plot(of(far, "step"), of(far, name), marker=marker, label=name)
    axes[2].legend()
axes[2].set(xlabel="step", ylabel="share", ylim=(0, 1.02), title="what it says")
show(fig, "Over-optimisation: the margin grows on, the chosen answers become "
          "unlikely, and what the model says falls apart.")

# %% [markdown]
# The accuracy did not warn: it rose and stayed. Read what the model says, sampled as in 13.1, about people without pairs:

# %% id="dpo-too-far-answers"
strangers = [q["question"] for q in unseen[7 :: max(1, len(unseen) // 5)]]
for question in strangers if judged else five:
    (answer,) = sample(far_model, [question])
    print(f"{question}\n    {answer[:80]!r}")

# %% [markdown]
# Nothing in the loss forbids this. Both answers of a pair begin with the same sentence, so it cancels in the margin, and nothing protects it. The loss asks only that the rejected answer become
# *less likely than* the chosen one; to drive both down, one of them faster, is a solution. Three signs show it, and neither margin nor accuracy is one of
# them:
#
# - the chosen log-ratio falls below 0: even the good answers become unlikely;
# - the samples: read ten of them at every evaluation;
# - a measure that is not the judge, here the facts.

# %% id="dpo-too-far-check"
last = far.evals[-1]
gap = {"far": last["margin"] / far_beta, "mine": history.evals[-1]["margin"] / beta}
chapter.record("dpo/far_gap", gap["far"])
check("dpo/far_chosen", last["chosen"])
if judged:
    check("dpo/far_preferred", last["preferred"])
    check("dpo/far_right", last["right"])
if judged and chapter.bands_hold and profile == "cpu":
    assert gap["far"] > gap["mine"]
    assert last["preferred"] < history.evals[-1]["preferred"]

# %% [markdown]
# **Try it.** Add cross-entropy of the chosen answer to the loss, weight 0.1. Does the chosen line stay above 0 in the run that went too far?
#
# ## 13.9 A loss that has enough
#
# The pull of DPO never becomes zero. **IPO** (Azar et al. 2023) sets a goal instead: the log-ratios of the two answers should differ by $1/2\beta$ per token, and no more. A square takes
# the place of $-\log\sigma$:
#
# $$L = \Big(h_w - h_l - \frac{1}{2\beta}\Big)^2, \qquad h = \frac{1}{|y|}\log\frac{\pi(y)}{\pi_{ref}(y)}$$

# %% id="dpo-ipo-loss"
#| export
def ipo_loss(
    model: nn.Module, batch: dict, beta: float = 0.1
) -> tuple[torch.Tensor, dict]:
    """The squared loss of IPO, a mean over pairs. Metrics as in dpo_loss.

    Azar et al. 2023, arXiv:2310.12036; log-ratios are means over tokens, as in TRL.
    """
    chosen, rejected = log_ratios(model, batch)
    lengths = (batch["targets"] != -100).sum(-1)  # (2B,)
    h = torch.cat((chosen, rejected)) / lengths
    gap = h[: len(chosen)] - h[len(chosen) :]  # (B,)
    loss = ((gap - 1 / (2 * beta)) ** 2).mean()
    margin = beta * (chosen - rejected)
    return loss, {"margin": margin.mean(), "accuracy": (margin > 0).float().mean()}

# %% [markdown]
# Four lines in the middle differ from `dpo_loss`. By hand: two answers of two and four tokens with log-ratios 1 and -2. Then $h$ is 0.5 and -0.5, and at $\beta = 0.5$ the goal is 1, which is reached
# exactly.

# %% id="dpo-ipo-by-hand"
h_w, h_l = 1 / 2, -2 / 4
assert (h_w - h_l - 1 / (2 * 0.5)) ** 2 == 0

# %% [markdown]
# Now as many steps as in the run that went too far, with the same learning rate:

# %% id="dpo-ipo-run"
ipo_beta = size.ipo_beta
ipo_model, ipo = prefer(ipo_beta, far_steps, far_rate, ipo_loss)
fig, axes = plt.subplots(1, 2, figsize=(7, 2.4))
for name, run, b, marker in (("DPO, small β", far, far_beta, "o"),
                             ("IPO", ipo, ipo_beta, "s")):
    gaps = np.array(of(run, "margin")) / b
    axes[0].plot(of(run, "step"), gaps, marker=marker, label=name)
    axes[1].plot(of(run, "step"), of(run, "chosen"), marker=marker, label=name)
axes[0].set(xlabel="step", ylabel="margin / β, nats")
axes[1].set(xlabel="step", ylabel="chosen: log(π/π_ref)")
axes[0].legend()
show(fig, "The same steps and learning rate: IPO stops at its goal, DPO runs on.")

# %% [markdown]
# The goal here is a sixth of a nat per token, and the gap stays near it. What the model says:

# %% id="dpo-ipo-share"
if judged:
    check("dpo/ipo_preferred", ipo.evals[-1]["preferred"])
    check("dpo/ipo_right", ipo.evals[-1]["right"])

# %% [markdown]
# The facts survive a learning rate and a number of steps that broke the other run. The preferred share stays below that of 13.7: a loss that has enough also stops early. The goal is a dial too. With
# $\beta = 1$, a goal three times as far, the same run ended at a preferred share of 35% (with an earlier model). So one run cannot tell whether DPO or IPO is better; it tells what each dial does.
#
# **Exercise 13.8 (15 min, ★★): `simpo_loss`** in [workbook 13](../exercises/13_dpo.ipynb). SimPO (Meng et al. 2024) drops the reference and compares means over tokens. What protects the model now?
#
# **Exercise 13.9 (25 min, ★★★): `final_gap`** in [workbook 13](../exercises/13_dpo.ipynb). Predict where a smoothed loss stops, then measure how far DPO, its smoothed form and IPO go on the smallest model there is.
#
# ## Recap
#
# - A comparison says which answer is better. Bradley and Terry turn comparisons into rewards; DPO puts $\beta \log(\pi/\pi_{ref})$ in the place of the reward and trains the model itself.
# - Count the tokens of the last answer and its end, and nothing else. One place early, and "stop here" is no longer compared.
# - The reference never changes: two numbers a pair, computed once.
# - Margin and accuracy are about the pairs. What the model writes needs samples, a judge, and a measure that is not the judge.
# - A small $\beta$ and many steps win every comparison and lose the model. Watch the chosen answers.
#
# **Words**: preference, chosen, rejected, reward, Bradley-Terry, KL divergence, reference model, log-ratio, margin, on-policy, over-optimisation, IPO.
#
# **Exercises:** 13.1 to 13.9, in place above, with checks in [workbook 13](../exercises/13_dpo.ipynb).
#
# **Sources**: Bradley and Terry 1952, *Biometrika* 39. Rafailov et al. 2023, arXiv:2305.18290 (DPO). Azar et al. 2023, arXiv:2310.12036 (IPO). Meng et al. 2024, arXiv:2405.14734 (SimPO). Rafailov et al. 2024,
# arXiv:2406.02900 (over-optimisation of DPO). Pal et al. 2024, arXiv:2402.13228 (how the chosen answer can lose). Tajwar et al. 2024, arXiv:2404.14367 (why on-policy pairs help). Next: chapter 14 lets a large model teach a small
# one.
