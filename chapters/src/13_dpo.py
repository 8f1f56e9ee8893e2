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

boxes = ["model answers\nseveral times\n(13.1)", "judge sorts\n(13.5)",
         "pairs: better,\nworse (13.5)", "loss\n(13.2-13.4)", "model that\nprefers (13.6)"]
fig, ax = plt.subplots(figsize=(7, 1.2))
for i, label in enumerate(boxes):
    box = {"boxstyle": "round,pad=0.35", "fc": "#f3e3d3", "ec": "black"}
    ax.text(i, 0, label, ha="center", va="center", fontsize=8, bbox=box)
    if i:
        ax.annotate("", (i - 0.36, 0), (i - 0.64, 0), arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-0.6, 4.6), ylim=(-0.5, 0.5))
ax.axis("off")
show(fig, "From a model's own answers to a model that gives the better ones: "
          "each box names its section.")

# %% id="dpo-default-exp"
#| default_exp dpo

# %% id="dpo-imports"
#| export
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from minimind.data import DataError, Problems, data_rows, row_problem
from minimind.sft import chat_example, says
from minimind.world import ASKS, LESSONS

# %% [markdown]
# ## 13.1 A model that imitates everybody
#
# Supervised fine-tuning imitates. That was fine in chapter 11, because all answers in the data had one manner. Real chat data have many
# writers, and a model trained on them speaks like all of them in turn. Take the model of chapter 11:

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
    world = make_world(chapter.world["people"], chapter.world.get("seed", 1))
    questions = world.questions()
judged = questions_file.exists() and not own_pairs
if own_pairs:
    print("Preferences come from your data: the world's judge steps aside.")
elif not judged:
    print("The model has not read of this world: judged answers mean little in this run.")

# %% [markdown]
# Now the writers. One answers plainly. One ends with a friendly offer. One rambles: a remark or two that nobody asked for. All three say
# the same true sentence first.

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


def mixed_chats(questions: Sequence[dict], copies: int, seed: int = 0) -> list[list[dict]]:
    """`copies` chats for each phrasing of each {"person", "relation", "reply"} row, by writers drawn from MANNERS."""
    rng, chats = random.Random(f"manners {seed}"), []
    for q in questions:
        for ask in ASKS[q["relation"]] * copies:
            manner = rng.choices(list(MANNERS), list(MANNERS.values()))[0]
            user = {"role": "user", "content": ask.format(n=q["person"])}
            answer = {"role": "assistant", "content": reply_in(manner, q["reply"], rng)}
            chats.append([user, answer])
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
# A few dozen steps of SFT on them give the model that this chapter starts from. With your own preferences it is the model of chapter 11
# as it is.

# %% id="dpo-warm-up"
from minimind.sft import PackedConversations, sft_loss
from minimind.train import TrainConfig, train

def settings(steps, rate, **more):
    """Training settings that all runs of this chapter share."""
    return TrainConfig(steps=steps, learning_rate=rate, warmup=0.1, weight_decay=0.0,
                       precision=chapter.settings.precision, **more)

def learn_answers(model, chats, steps, rate):
    """SFT, as in chapter 11."""
    rows = PackedConversations([chat_example(tokenizer, chat) for chat in chats],
                               256, chapter.size.chat_rows, device=chapter.device)
    train(model, rows, sft_loss, settings(steps, rate), max_steps=chapter.max_steps)
    return model.eval()

reference = copy.deepcopy(sft_model)
if not own_pairs:
    learn_answers(reference, chats, chapter.size.warmup_steps, chapter.size.warmup_rate)

# %% [markdown]
# Ask it one question six times. Greedy decoding would give one answer six times, so we sample at temperature 1 (chapter 10): that shows what the model
# holds for likely.

# %% id="dpo-ask-six-times"
from minimind.sft import ask_all

def sample(model, asked, seed=0):
    """One sampled answer to each question."""
    return ask_all(model, tokenizer, asked, 32, temperature=1.0, seed=seed)

for answer in sample(reference, [seen[0]["question"]] * 6):
    print(answer)

# %% [markdown]
# It learned the mixture. Suppose you want one of the three: true, friendly, and nothing else. SFT has no way to say "this rather than that". For that you need a judge
# and a loss that listens to it. In this world the judge can be a rule, because every fact is known:

# %% id="dpo-judge"
#| export
def judge(reply: str, question: dict) -> dict[str, bool]:
    """What is to be said about a reply to a {"answer", "person", "reply"} row of the world.

    preferred: the true sentence in full, then exactly one offer, then nothing.
    """
    sentence = question["reply"]
    return {
        "right": says(reply, question["answer"]),
        "plain": reply == sentence,
        "friendly": reply.endswith(OFFERS),
        "preferred": any(reply == f"{sentence} {offer}" for offer in OFFERS),
    }

# %% [markdown]
# The rule, tried by hand on five answers. The last two are what a cheat would say: friendly but false, and friendly twice.

# %% id="dpo-judge-by-hand"
q = {"answer": "Elmstead", "person": "Hanis", "reply": "Hanis lives in Elmstead."}
offer = OFFERS[0]
assert judge(f"Hanis lives in Elmstead. {offer}", q)["preferred"]
for reply in ("Hanis lives in Elmstead.", f"It was a good day. {offer}",
              f"Hanis lives in Oakham. {offer}", f"Hanis lives in Elmstead. {offer} {offer}"):
    assert not judge(reply, q)["preferred"]

# %% [markdown]
# How often does it say what the judge prefers? One sampled answer to each question, seen and unseen people.

# %% id="dpo-shares"
every = questions[:: chapter.size.every_question]

def shares(model, asked=every, seed=0):
    """Share of sampled answers of each kind."""
    replies = sample(model, [q["question"] for q in asked], seed)
    verdicts = [judge(reply, q) for reply, q in zip(replies, asked)]
    return {name: sum(v[name] for v in verdicts) / len(verdicts) for name in verdicts[0]}

before = shares(reference)
print(f"chapter 11: {shares(sft_model)['preferred']:.0%} preferred")
for name, value in before.items():
    print(f"reference: {value:5.0%} {name}")

# %% [markdown]
# The model of chapter 11 never offers help; the mixture does it now and then. The rest of the chapter makes it a habit. The model that we start from has a name:
# the **reference**.
#
# **Exercise 13.1 (10 min, ★).** Write a second judge that prefers the plain answer. What is its share now?
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
# Three kinds of answers, three numbers of wins. There are three unknown rewards, and only differences matter. Make what was seen likely: minimise
# $-\log P$ over all comparisons.

# %% id="dpo-bradley-terry"
wins = {(1, 0): 73, (0, 1): 27, (0, 2): 73, (2, 0): 27, (1, 2): 88, (2, 1): 12}
better, worse = torch.tensor(list(wins)).T  # 0 plain, 1 friendly, 2 rambling
count = torch.tensor(list(wins.values()))
r = torch.zeros(3, requires_grad=True)
for _ in range(200):
    loss = -(count * F.logsigmoid(r[better] - r[worse])).sum() / count.sum()
    (grad,) = torch.autograd.grad(loss, r)
    r = (r - 3 * grad).detach().requires_grad_()
r = (r - r[0]).detach()
print("rewards:", [round(value, 2) for value in r.tolist()])
assert abs(r[1] - math.log(73 / 27)) < 0.02

# %% [markdown]
# One line holds the formula: `F.logsigmoid(r[better] - r[worse])`. Keep it in mind, it comes back.

# %% id="dpo-bradley-terry-figure"
fig, ax = plt.subplots(figsize=(7, 2.5))
x = torch.linspace(-4, 4, 100)
ax.plot(x, x.sigmoid(), label="Bradley-Terry")
for (a, b), marker in zip([(1, 0), (0, 2), (1, 2)], "os^"):
    share = wins[a, b] / (wins[a, b] + wins[b, a])
    names = list(MANNERS)
    ax.plot(r[a] - r[b], share, marker, color="black", label=f"{names[a]} against {names[b]}")
ax.set(xlabel="difference of rewards", ylabel="share of wins", ylim=(0, 1))
ax.legend(fontsize=8)
show(fig, "Three shares of wins, one curve: the reward differences explain all comparisons.")

# %% [markdown]
# ## 13.3 From a reward to the best model, and back
#
# Suppose the rewards are known. What should the model do with them? Always give the answer with the highest reward? That throws away all that it has learned about
# language, and a reward is only as good as its judge. So one asks for much reward, close to the reference. "Close" is the KL divergence, and $\beta$ is
# its price:
#
# $$\max_\pi \; \sum_y \pi(y)\, r(y) - \beta \sum_y \pi(y) \log\frac{\pi(y)}{\pi_{ref}(y)}$$
#
# For three answers a few lines of gradient ascent find the best $\pi$:

# %% id="dpo-best-by-search"
pi_ref = torch.tensor([0.4, 0.3, 0.3])

def best_by_search(r, beta):
    logits = pi_ref.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        pi = logits.softmax(-1)
        value = (pi * r).sum() - beta * (pi * (pi / pi_ref).log()).sum()
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
    return logits.softmax(-1).detach()

print([round(p, 3) for p in best_by_search(r, beta=1.0).tolist()])

# %% [markdown]
# There is a formula for it (a distribution that trades reward against KL is always of this form): weigh the reference by $e^{r/\beta}$ and normalise.
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
    ax.bar(range(3), pi_ref, color="0.8", label="reference")
    ax.bar(range(3), best_policy(r, beta), width=0.45, color="C0", label="best")
    ax.set(title=f"β = {beta:g}", xticks=range(3), ylim=(0, 1))
    ax.set_xticklabels(list(MANNERS), fontsize=8)

fig, axes = plt.subplots(1, 3, figsize=(7, 2.3), sharey=True)
for ax, beta in zip(axes, (5, 1, 0.2)):
    draw_policy(ax, beta)
axes[0].set_ylabel("probability")
axes[0].legend(fontsize=8)
show(fig, "The best model for three prices of distance: "
          "a small β keeps only the winner, a large one stays at the reference.")

# %% [markdown]
# The same with a slider (in a live notebook):

# %% id="dpo-beta-widget"
def explore(beta=1.0):
    fig, ax = plt.subplots(figsize=(3.6, 2.2))
    draw_policy(ax, beta)
    plt.show()

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
optimizer = torch.optim.Adam([logits], lr=0.05)
for _ in range(400):
    log_ratio = logits.log_softmax(-1) - pi_ref.log()  # log(π/π_ref)
    margin = beta * (log_ratio[better] - log_ratio[worse])
    loss = -(count * F.logsigmoid(margin)).sum() / count.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print([round(p, 3) for p in logits.softmax(-1).tolist()])
assert torch.allclose(logits.softmax(-1), best_policy(r, beta), atol=2e-3)

# %% [markdown]
# Both ways agree. The number in the brackets, times $\beta$, is the **margin** of a pair. When training starts, $\pi = \pi_{ref}$, every margin is 0 and the loss is $\log 2 = 0.69$.
#
# What does a pair do to the model? The slope of the loss says it: $-\sigma(-\text{margin})$. A pair in the wrong order pulls with nearly full force, a pair that is
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
# **Exercise 13.2 (15 min, ★★).** Give the judge an error: it turns one comparison in five around. Where do the three rewards go?
#
# ## 13.4 The probability of an answer
#
# For a model, $\log \pi(y)$ is a sum over tokens, each given all before it. Only the tokens of the answer count: the prompt is given. Chapter 11 marks
# them with labels. For a conversation of several turns, only the *last* answer is compared; the earlier ones are part of the prompt.

# %% id="dpo-pair-example"
#| export
def pair_example(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """A conversation as (ids, labels) of equal length; labels are -100 everywhere but in the last answer and its end."""
    ids, labels = chat_example(tokenizer, messages)
    start = max(i for i, token in enumerate(ids) if token == tokenizer.im_start_id)
    return ids, [-100] * start + labels[start:]

# %% [markdown]
# By hand on one answer: run the model, take the log-probability of each answer token from the row *before* it, and add.

# %% id="dpo-logprob-by-hand"
chat = chats[0]
ids, labels = pair_example(tokenizer, chat)
with torch.inference_mode():
    logs = reference(torch.tensor([ids], device=chapter.device))[0].float().log_softmax(-1)
by_hand = 0.0
for place, label in enumerate(labels):
    if label != -100:
        p = logs[place - 1, label].item()
        by_hand += p
        print(f"{p:8.3f}  {tokenizer.decode([label])!r}")
print(f"{by_hand:8.3f}  the answer")

# %% [markdown]
# The general form is one call: `cross_entropy` without its mean is $-\log p$ of every label and 0 where the label is -100.

# %% id="dpo-answer-logprobs"
#| export
def answer_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """ln p of each row's answer, (B,), in nats.

    logits (B, T, V); targets (B, T), already shifted: targets[b, t] is token t+1 if it belongs to the answer, else -100.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, "
                         f"not {tuple(targets.shape)}")  # fmt: skip
    nats = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")  # (B, T)
    return -nats.sum(-1)

# %% [markdown]
# They agree:

# %% id="dpo-logprob-agrees"
def logprob(model, ids, targets):
    """answer_logprobs of one row; targets as long as ids[:-1]."""
    row = torch.tensor([ids[:-1]], device=chapter.device)
    with torch.inference_mode():
        return answer_logprobs(model(row), torch.tensor([targets], device=chapter.device)).item()

assert abs(logprob(reference, ids, labels[1:]) - by_hand) < 1e-3

# %% [markdown]
# The shift is where people fail. Two wrong masks: *one early* counts the last token of the prompt and leaves out `<|im_end|>`; *not shifted* asks each position for
# the token that it has just read. Both give a number, and neither complains. Compare a plain answer with the same answer and an offer.
#
# **Before you run this**: the plain answer without its end is a beginning of the friendly one. What does that do to a comparison?

# %% id="dpo-off-by-one"
fact = seen[0]
asked = {"role": "user", "content": fact["question"]}
two = [[asked, {"role": "assistant", "content": text}]
       for text in (fact["reply"], f"{fact['reply']} {OFFERS[0]}")]

def early(ids, labels):  # each label stands one token early; the end is lost
    mask = [label != -100 for label in labels][1:] + [False]
    return [token if m else -100 for token, m in zip(ids, mask)][1:]

masks = {"right": lambda ids, labels: labels[1:], "one early": early,
         "not shifted": lambda ids, labels: labels[:-1]}
for name, mask in masks.items():
    plain, friendly = (logprob(reference, ids, mask(ids, labels))
                       for ids, labels in (pair_example(tokenizer, chat) for chat in two))
    print(f"{name:12} plain {plain:8.2f}   friendly {friendly:8.2f}")

# %% [markdown]
# Look at the middle row. A plain answer differs from a friendly one by *stopping*, and the mask has lost just that token. What is left of the plain answer is
# part of the friendly one, so to the loss they agree on everything but the offer. The last row is a sum of the wrong tokens; it is far too low. Two checks
# find such bugs: redo one sum by hand, as above, and print the tokens that count.

# %% id="dpo-off-by-one-figure"
def draw_tokens(ax, ids, counted):
    for i, (token, on) in enumerate(zip(ids, counted)):
        text = repr(tokenizer.decode([token]))[1:-1]
        box = {"boxstyle": "square,pad=0.3", "fc": "#0072B2" if on else "#e8e8e8", "ec": "none"}
        ax.text(i, 0, text, ha="center", va="center", fontsize=6.5,
                color="white" if on else "black", bbox=box)
    ax.set(xlim=(-0.7, len(ids) - 0.3), ylim=(-0.5, 0.5))
    ax.axis("off")

ids, labels = pair_example(tokenizer, two[0])
fig, axes = plt.subplots(2, 1, figsize=(7, 1.3))
for ax, name in zip(axes, ("right", "one early")):
    counted = [target != -100 for target in masks[name](ids, labels)]
    draw_tokens(ax, ids[1:][-10:], counted[-10:])
    ax.set_title(name, fontsize=9, loc="left", pad=2)
show(fig, "The end of the plain answer; white on blue counts. "
          "One place early, the line end before the answer counts, and <|im_end|> does not.")

# %% [markdown]
# **Exercise 13.3 (15 min, ★★).** Divide by the number of answer tokens. Which of two answers gains by that, the short or the long one?
#
# ## 13.5 Pairs
#
# Where do pairs come from? One could *write* both answers. Then the better one is often something that this model would never say, and to push its probability
# from $e^{-50}$ to $e^{-30}$ wins the comparison without ever being heard. So we take **on-policy** pairs: the model answers each question
# several times, the judge sorts, and a preferred answer meets one that is not.

# %% id="dpo-sort-pairs"
#| export
def sort_pairs(
    prompts: Sequence[tuple[str, dict]], replies: Sequence[Sequence[str]], seed: int = 0
) -> list[dict]:
    """Pairs {"chosen", "rejected"} from several replies to each (text, question): one preferred, one not, at random.

    A prompt whose replies are all preferred, or none of them, gives no pair.
    """
    rng, rows = random.Random(f"pairs {seed}"), []
    for (text, question), some in zip(prompts, replies):
        good = [reply for reply in some if judge(reply, question)["preferred"]]
        bad = [reply for reply in some if reply.strip() and reply not in good]
        if good and bad:
            chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
                     for reply in (rng.choice(good), rng.choice(bad))]
            rows.append({"chosen": chats[0], "rejected": chats[1]})
    return rows

# %% [markdown]
# The training pairs ask about seen people in all phrasings, the held-out pairs about unseen ones.

# %% id="dpo-sample-pairs"
def sampled_pairs(model, asked, samples, seed):
    """On-policy pairs: `samples` answers to each phrasing of each question, sorted by the judge."""
    prompts = [(ask.format(n=q["person"]), q) for q in asked for ask in ASKS[q["relation"]]]
    replies = sample(model, [text for text, _ in prompts for _ in range(samples)], seed)
    groups = [replies[i : i + samples] for i in range(0, len(replies), samples)]
    rows = sort_pairs(prompts, groups)
    print(f"{len(replies):,} answers to {len(prompts):,} prompts give {len(rows):,} pairs")
    return rows

if not own_pairs:
    size = chapter.size
    train_rows = sampled_pairs(reference, seen[: size.people_rows], size.samples, seed=1)
    valid_rows = sampled_pairs(reference, unseen[: size.people_rows // 2], size.samples, seed=2)

# %% [markdown]
# A model that never says the preferred thing gives no pairs: there is nothing to reinforce. Then, and only then, the world writes them.

# %% id="dpo-written-pairs"
def written_pairs(asked, seed=0):
    """Pairs that nobody sampled: friendly against plain or rambling."""
    chats, rng = mixed_chats(asked, 1, seed), random.Random(f"written {seed}")
    good = [[user, {**answer, "content": reply_in("friendly", q["reply"], rng)}]
            for (user, answer), q in zip(chats, [q for q in asked for _ in ASKS[q["relation"]]])]
    return [{"chosen": a, "rejected": b} for a, b in zip(good, chats)
            if not b[1]["content"].endswith(OFFERS)]

if not own_pairs and min(len(train_rows), len(valid_rows)) < 2 * chapter.size.pairs:
    print("Too few pairs from samples: written pairs are used")
    train_rows, valid_rows = written_pairs(seen), written_pairs(unseen)

# %% [markdown]
# Pairs from a file can be wrong in ways that a loss never notices. Equal answers prefer nothing. Answers to different prompts compare nothing. An answer longer than
# the model's context would be cut, and its end is what teaches it to stop. Chapter 1 finds the second kind; the others are found here, all with file and line.

# %% id="dpo-read-pairs"
#| export
def length_problem(row: dict, tokenizer, context: int) -> str | None:
    """Which side of a pair does not fit into `context` tokens, in words; None if both do."""
    for side in ("chosen", "rejected"):
        tokens = len(chat_example(tokenizer, row[side])[0])
        if tokens > context:
            return f'"{side}" has {tokens} tokens, the context has {context}: shorten it or raise context'
    return None


def read_pairs(source: str | Path, tokenizer, context: int) -> tuple[list[dict], list[str]]:
    """The pairs of a file or folder, and a line "file:line: reason" for each that is longer than `context` and left out.

    DataError lists every line that is wrong in itself: no pair, no common prompt, or equal answers.
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
# Four lines, of which one is good:

# %% id="dpo-bad-pairs"
from minimind.data import write_jsonl

say = lambda role, text: {"role": role, "content": text}
good = {"chosen": [say("user", "Hi"), say("assistant", "Hello!")],
        "rejected": [say("user", "Hi"), say("assistant", "What?")]}
equal = {**good, "rejected": good["chosen"]}
stranger = {**good, "rejected": [say("user", "Bye"), say("assistant", "What?")]}
endless = {**good, "chosen": [say("user", "Hi"), say("assistant", "Hello! " * 400)]}

bad = chapter.work / "bad.jsonl"
write_jsonl(bad, [good, equal, stranger])
try:
    read_pairs(bad, tokenizer, 256)
except DataError as error:
    print(str(error).replace(str(chapter.work), "..."))
else:
    raise AssertionError("bad pairs must be refused")

# %% [markdown]
# A line that is wrong stops you. A line that is only too long for this profile is named and left out, as in chapter 11:

# %% id="dpo-long-pairs"
write_jsonl(bad, [good, endless])
rows, left_out = read_pairs(bad, tokenizer, 256)
assert rows == [good] and len(left_out) == 1
print(left_out[0].replace(str(chapter.work), "..."))

# %% [markdown]
# Your own preferences are checked where they lie, so that the line numbers are yours. Then the prepared parts are read.

# %% id="dpo-own-pairs"
def read_own():
    source = json.loads((data / "about.json").read_text())["stages"]["dpo"]["source"]
    if Path(source).exists():
        _, left_out = read_pairs(source, tokenizer, chapter.size.context)
        print(f"{len(left_out)} pairs are too long and left out", *left_out[:5], sep="\n  ")
    return [read_pairs(data / "dpo" / f"{part}.jsonl.gz", tokenizer, chapter.size.context)[0]
            for part in ("train", "valid")]

if own_pairs:
    train_rows, valid_rows = read_own()
assert train_rows and valid_rows, "no pairs are left to train on: raise context in the profile"
valid_rows = valid_rows[: chapter.size.valid_pairs]
print(f"{len(train_rows):,} pairs to train on, {len(valid_rows):,} held out")
for side in ("chosen", "rejected"):
    print(f"{side:9}", train_rows[0][side][-1]["content"][:80])

# %% [markdown]
# A batch of $B$ pairs has $2B$ rows: first the chosen answers, then the rejected ones in the same order. Rows are padded on the right. With a causal mask no real token sees the
# padding, so no further mask is needed.

# %% id="dpo-preference-pairs"
#| export
class PreferencePairs:
    """Batches of {"chosen", "rejected"} pairs; `[step]` is always the same batch, in an order that is new each epoch.

    A batch of B pairs has rows 0..B-1 chosen, B..2B-1 rejected: input_ids (2B, T); targets (2B, T), already shifted,
    -100 outside of the answer; and, once `keep_reference` has run, reference (2B,): ln p under the reference model.
    """

    def __init__(self, rows: Sequence[dict], tokenizer, batch_size: int, seed: int = 0, device="cpu"):
        if not rows:
            raise ValueError("there are no pairs to train on")
        self.sides = [[pair_example(tokenizer, row[side]) for row in rows] for side in ("chosen", "rejected")]
        self.batch_size, self.seed, self.device = min(batch_size, len(rows)), seed, device
        self.reference: torch.Tensor | None = None  # (N, 2)
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Pairs."""
        return len(self.sides[0])

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        epoch, index = divmod(step, len(self) // self.batch_size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return self.batch(self.order[index * self.batch_size :][: self.batch_size])

    def batch(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """The pairs with these numbers."""
        rows = [side[i] for side in self.sides for i in numbers]
        pad = lambda parts, value: nn.utils.rnn.pad_sequence(
            [torch.tensor(part) for part in parts], batch_first=True, padding_value=value
        ).to(self.device)  # (2B, T)
        batch = {"input_ids": pad([ids[:-1] for ids, _ in rows], 0)}
        batch["targets"] = pad([labels[1:] for _, labels in rows], -100)
        if self.reference is not None:
            batch["reference"] = self.reference[torch.as_tensor(numbers)].T.flatten().to(self.device)
        return batch

# %% [markdown]
# Padding must not change anything. One answer alone, and the same in a padded batch:

# %% id="dpo-padding-agrees"
pairs = PreferencePairs(train_rows, tokenizer, chapter.size.pairs, device=chapter.device)
held_out = PreferencePairs(valid_rows, tokenizer, chapter.size.pairs, device=chapter.device)
batch = pairs.batch(range(min(4, len(pairs))))
with torch.inference_mode():
    together = answer_logprobs(reference(batch["input_ids"]), batch["targets"])
ids, labels = pairs.sides[0][0]
assert abs(together[0].item() - logprob(reference, ids, labels[1:])) < 1e-2

# %% [markdown]
# ## 13.6 The reference, once
#
# The loss needs $\log\pi_{ref}$ of every answer. The reference never changes, so neither do these numbers. Compute them once, before training, and keep two numbers a pair; the second model can then
# leave the memory. Many implementations run both models at every step.

# %% id="dpo-keep-reference"
#| export
@torch.no_grad()
def keep_reference(model: nn.Module, pairs: PreferencePairs, amp: torch.dtype | None = None) -> None:
    """Compute ln p of all answers of `pairs` under `model` and keep them in pairs.reference (N, 2), chosen and rejected."""
    parts, device = [], next(model.parameters()).device
    for first in range(0, len(pairs), 64):
        batch = pairs.batch(range(first, min(first + 64, len(pairs))))
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = model(batch["input_ids"])
        parts.append(answer_logprobs(logits, batch["targets"]).view(2, -1).T)  # (n, 2)
    pairs.reference = torch.cat(parts).cpu()

# %% [markdown]
# Then the loss. Its first line is $\log\pi$, the second $\log(\pi/\pi_{ref})$, the third the margin, and the last the loss of 13.3.

# %% id="dpo-loss"
#| export
def log_ratios(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """ln(pi / pi_ref) of the chosen and of the rejected answers of a batch, (B,) each."""
    logprobs = answer_logprobs(model(batch["input_ids"]), batch["targets"])  # (2B,)
    chosen, rejected = (logprobs - batch["reference"]).chunk(2)
    return chosen, rejected


def dpo_loss(model: nn.Module, batch: dict, beta: float = 0.1) -> tuple[torch.Tensor, dict]:
    """The sigmoid loss of direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290), a mean over pairs.

    Metrics, means too: margin; accuracy, the share of pairs with a margin above 0; ln(pi / pi_ref) of both sides.
    """
    chosen, rejected = log_ratios(model, batch)
    margin = beta * (chosen - rejected)  # (B,)
    loss = -F.logsigmoid(margin).mean()
    accuracy = (margin > 0).float().mean()
    return loss, {"margin": margin.mean(), "accuracy": accuracy,
                  "chosen": chosen.mean(), "rejected": rejected.mean()}  # fmt: skip

# %% [markdown]
# Before training, model and reference are the same: all margins 0, the loss $\log 2$.

# %% id="dpo-loss-at-start"
import time

clock = time.perf_counter()
for some in (pairs, held_out):
    keep_reference(reference, some, chapter.amp)
once = time.perf_counter() - clock

def evaluated(loss_fn, model, some=held_out):
    """Mean loss and metrics over all pairs of `some`, in chunks."""
    total = {}
    for first in range(0, len(some), 64):
        numbers = range(first, min(first + 64, len(some)))
        with torch.no_grad(), torch.autocast(chapter.device.type, chapter.amp, enabled=chapter.amp is not None):
            loss, metrics = loss_fn(model.eval(), some.batch(numbers))
        for name, value in {"loss": loss, **metrics}.items():
            total[name] = total.get(name, 0) + value.item() * len(numbers) / len(some)
    return total

start = evaluated(dpo_loss, reference)
print({name: round(value, 3) for name, value in start.items()}, f"log 2 = {math.log(2):.3f}")
assert abs(start["loss"] - math.log(2)) < 0.01

# %% [markdown]
# What has keeping saved? Time a few steps with the kept numbers, and with the reference run beside the model at each step.

# %% id="dpo-reference-every-step"
def with_reference(model, batch):
    """The same loss, the reference computed again."""
    with torch.no_grad():
        logprobs = answer_logprobs(reference(batch["input_ids"]), batch["targets"])
    return dpo_loss(model, {**batch, "reference": logprobs})

def seconds_of(loss_fn):
    """Seconds of one step, forward and backward: the fastest of a few."""
    model, times = copy.deepcopy(reference), []
    for step in range(chapter.size.time_steps):
        batch, clock = pairs[0], time.perf_counter()
        with torch.autocast(chapter.device.type, chapter.amp, enabled=chapter.amp is not None):
            loss = loss_fn(model, batch)[0]
        loss.backward()
        if chapter.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - clock)
    return min(times)

# %% [markdown]
# Three forward-sized pieces of work (forward, and backward, which costs about two) become four with a reference. So expect about a quarter of the time saved:

# %% id="dpo-reference-saving"
kept, again = seconds_of(dpo_loss), seconds_of(with_reference)
print(f"a step: {1000 * kept:.0f} ms kept, {1000 * again:.0f} ms with the reference each time")
print(f"once for all {len(pairs) + len(held_out)} pairs: {once:.1f} s")
check("dpo/reference_speedup", again / kept)
breaks_even = once / max(again - kept, 1e-9)
print(f"it pays after {breaks_even:.0f} steps")

# %% [markdown]
# Is it the loss that others use? **TRL** is Hugging Face's library for this. Give its trainer our model and the same batch, and compare the loss and all gradients.

# %% id="dpo-trl-trainer"
def trl_trainer(model_folder, reference_folder, row, **options):
    """TRL's DPO trainer on two model folders; it wants a data set, so it gets one row."""
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    read = transformers.AutoModelForCausalLM.from_pretrained
    models = [read(f, dtype=torch.float32) for f in (model_folder, reference_folder)]
    args = DPOConfig(output_dir=str(chapter.work / "trl"), report_to="none", use_cpu=True,
                     bf16=False, activation_checkpointing=False, **options)
    return DPOTrainer(models[0], ref_model=models[1], args=args,
                      train_dataset=datasets.Dataset.from_list([row]),
                      processing_class=transformers.AutoTokenizer.from_pretrained(reference_folder))

# %% [markdown]
# Some noise on the weights, so that the margins are not all 0. Our rows go through TRL's own collator, which pads them and marks the answers; its loss then makes
# the gradients.

# %% id="dpo-trl-loss"
def trl_loss(trainer, some):
    """TRL's loss of these pairs, and its gradient of every weight."""
    cut = lambda labels: next(i for i, label in enumerate(labels) if label != -100)
    examples = []
    for (ids, labels), (other, _) in zip(*([side[i] for i in some] for side in pairs.sides)):
        start, end = cut(labels), len(ids) - 1  # without the line end after <|im_end|>
        examples.append({"prompt_ids": ids[:start], "chosen_ids": ids[start:end],
                         "rejected_ids": other[start : len(other) - 1]})
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}

def our_loss(model, some, loss_fn):
    """The same with ours, in float32 on the processor."""
    model, own = copy.deepcopy(model).cpu().float(), PreferencePairs(train_rows, tokenizer, 8)
    keep_reference(copy.deepcopy(reference).cpu(), own)
    loss, _ = loss_fn(model, own.batch(some))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}

# %% [markdown]
# One line end makes a difference: TRL counts the one that the template sets after `<|im_end|>` as part of the answer. It is the same for both answers and never
# written by the model, so we leave it out here.

# %% id="dpo-trl-equal"
import contextlib
import importlib.util
import io

def compare(loss_fn, **options):
    noisy, some = copy.deepcopy(reference).cpu(), range(min(6, len(pairs)))
    torch.manual_seed(0)
    for p in noisy.parameters():
        p.data += 0.003 * torch.randn_like(p)
    for name, model in (("noisy", noisy), ("reference", reference)):
        model.save_pretrained(chapter.work / name)
        tokenizer.save_pretrained(chapter.work / name)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        trainer = trl_trainer(chapter.work / "noisy", chapter.work / "reference",
                              train_rows[0], max_length=None, **options)
        theirs, their_grads = trl_loss(trainer, some)
    ours, grads = our_loss(noisy, some, loss_fn)
    worst = max((grads[name] - their_grads[name]).abs().max().item() for name in grads)
    print(f"loss {ours:.6f}, TRL {theirs:.6f}; largest difference of a gradient {worst:.1e}")
    assert abs(ours - theirs) < 1e-5 and worst < 1e-5

have_trl = all(importlib.util.find_spec(name) for name in ("trl", "datasets"))
if have_trl:
    compare(dpo_loss, beta=0.1)
else:
    print("trl is not installed: the comparison is left out")

# %% [markdown]
# ## 13.7 The run
#
# Everything else is the loop of chapter 8. The learning rate is far below that of SFT, because a loss that only compares says little about what else may
# change. While it trains, we look at the held-out pairs and at the judge's share.

# %% id="dpo-run"
from functools import partial

def evaluate(model, loss_fn):
    result = evaluated(loss_fn, model)
    if not own_pairs:
        kinds = shares(model)
        result |= {"preferred": kinds["preferred"], "right": kinds["right"]}
    return result

def prefer(beta, steps, rate, loss=dpo_loss):
    """Train a copy of the reference on the pairs: model and history; step 0 is evaluated too."""
    model, loss_fn = copy.deepcopy(reference), partial(loss, beta=beta)
    config = settings(steps, rate, log_every=max(1, steps // 20),
                      eval_every=max(1, steps // chapter.size.evaluations))
    first = {"step": 0, **evaluate(model, loss_fn)}
    history = train(model, pairs, loss_fn, config, max_steps=chapter.max_steps,
                    evaluate=partial(evaluate, loss_fn=loss_fn))
    history.evals.insert(0, first)
    return model.eval(), history

model, history = prefer(chapter.size.beta, chapter.size.steps, chapter.size.learning_rate)
print(f"{history.step[-1]} steps of {pairs.batch_size} pairs in {history.seconds[-1]:.0f} s")

# %% [markdown]
# Two numbers tell whether it learns: the **margin**, and the **accuracy**, the share of pairs in the right order. Held-out pairs are about people without any pair in the
# training set.

# %% id="dpo-run-figure"
def of(history, name):
    return [e[name] for e in history.evals]

fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6))
for ax, name, label in ((left, "margin", "margin"), (right, "accuracy", "share in the right order")):
    ax.plot(history.step, [m[name] for m in history.metrics], label="training")
    ax.plot(of(history, "step"), of(history, name), marker="o", label="held out")
    ax.set(xlabel="step", ylabel=label)
right.set_ylim(0, 1.03)
left.legend()
show(fig, "Margin and accuracy over the run: both rise, and held-out pairs follow.")
chapter.curve("dpo", history.step, history.loss, x_label="step", y_label="loss (nats)")

# %% [markdown]
# Where does the margin come from? From both ends: the chosen answer may become more likely, the rejected one less. The margin cannot tell these apart, so plot
# them. **Before you run this**: which of the two moves further?

# %% id="dpo-ratios-figure"
fig, ax = plt.subplots(figsize=(7, 2.4))
for name, marker in (("chosen", "o"), ("rejected", "s")):
    ax.plot(of(history, "step"), of(history, name), marker=marker, label=name)
ax.axhline(0, color="0.5", lw=1)
ax.set(xlabel="step", ylabel="log(π/π_ref), nats")
ax.legend()
show(fig, "What happens to both answers of held-out pairs: "
          "most of the margin is the rejected answer becoming less likely.")

# %% [markdown]
# A chosen answer can gain a few nats only: its probability ends at 1. A rejected one can fall without end. As long as the chosen line stays at or above 0, this is
# healthy.

# %% id="dpo-held-out"
def interval(values, draws=2000):
    """Mean and a 95% bootstrap interval."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return values.mean(), low, high

def held_out_values(model, beta):
    """Loss, margin and whether it is above 0, of each held-out pair."""
    numbers = range(len(held_out))
    with torch.inference_mode():
        parts = [log_ratios(model, held_out.batch(numbers[i : i + 64])) for i in numbers[::64]]
    margin = beta * torch.cat([chosen - rejected for chosen, rejected in parts]).cpu()
    return {"loss": -F.logsigmoid(margin), "margin": margin, "accuracy": (margin > 0).float()}

for name, values in held_out_values(model, chapter.size.beta).items():
    mean, low, high = interval(values)
    print(f"held-out {name:8} {mean:6.3f}   95% interval {low:.3f} to {high:.3f}")
    check(f"dpo/held_out_{name}", mean)

# %% [markdown]
# These are numbers about pairs that somebody else wrote down. They do not say what the model now *writes*. So ask it:

# %% id="dpo-five-questions"
from minimind.sft import ask

five = ["Who are you?", "What is the sun?", "How are you today?",
        "What is two plus three?", "Tell me a story."]
if questions_file.exists():
    five = [questions[i * len(questions) // 5]["question"] for i in range(5)]
for question in five:
    answer = ask(model, tokenizer, question)
    chapter.answer("dpo", question, answer)
    print(f"{question}\n    before: {ask(reference, tokenizer, question)!r}\n    after:  {answer!r}")

# %% [markdown]
# Each of the kinds of answers, before and after, sampled as in 13.1, and one more model for comparison: the reference trained for as many steps with plain SFT on the
# *chosen* answers alone. That is the simplest use of a judge: keep what is good and imitate it.

# %% id="dpo-before-after"
def kinds_of(model):
    kinds = shares(model)
    other = 1 - kinds["preferred"] - kinds["plain"]
    return {"preferred": kinds["preferred"], "plain": kinds["plain"], "other": other}

if not own_pairs:
    only_chosen = learn_answers(copy.deepcopy(reference), [row["chosen"] for row in train_rows],
                                chapter.size.steps, chapter.size.learning_rate)
    models = {"reference": reference, "SFT on chosen": only_chosen, "DPO": model}
    table = {name: kinds_of(some) for name, some in models.items()}
    for name, kinds in table.items():
        print(f"{name:14}", {kind: f"{share:.0%}" for kind, share in kinds.items()})

# %% [markdown]
# As a picture:

# %% id="dpo-before-after-figure"
if not own_pairs:
    fig, ax = plt.subplots(figsize=(7, 1.9))
    left = np.zeros(len(table))
    for kind, look in (("preferred", {"color": "C0"}), ("plain", {"color": "0.75"}),
                       ("other", {"color": "white", "hatch": "//", "ec": "black"})):
        share = np.array([kinds[kind] for kinds in table.values()])
        ax.barh(list(table), share, left=left, label=kind, **look)
        left += share
    ax.set(xlabel="share of sampled answers", xlim=(0, 1))
    ax.invert_yaxis()
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
    show(fig, "What three models answer: after DPO nearly every answer is of the preferred kind.")

# %% [markdown]
# And the price. All questions once more, decoded greedily as in chapter 11: how many answers are right, before this chapter and after it? A right answer counts in any manner.

# %% id="dpo-facts"
from minimind.sft import answers_right

def facts_of(model):
    """Share of right greedy answers, seen and unseen people."""
    rows = answers_right(model, tokenizer, questions, max_new_tokens=32)[1]
    mean = lambda flag: np.mean([row["right"] for row in rows if row["seen"] == flag])
    return {"seen": mean(True), "unseen": mean(False)}

if questions_file.exists():
    facts = {name: facts_of(some) for name, some in
             (("chapter 11", sft_model), ("reference", reference), ("DPO", model))}
    for name, some in facts.items():
        print(f"{name:10} seen {some['seen']:.1%}   unseen {some['unseen']:.1%}")

# %% [markdown]
# The claim of this chapter, with its bands. The loss of facts is measured against the model of chapter 11, so it includes the warm-up of 13.1.

# %% id="dpo-claim"
if not own_pairs:
    after = shares(model)
    check("dpo/preferred_before", before["preferred"])
    check("dpo/preferred_after", after["preferred"])
    check("dpo/gain", after["preferred"] - before["preferred"])
if questions_file.exists():
    old, new = facts["chapter 11"], facts["DPO"]
    check("dpo/facts_lost", np.mean(list(old.values())) - np.mean(list(new.values())))
    check("dpo/facts_lost_unseen", old["unseen"] - new["unseen"])

# %% [markdown]
# **Exercise 13.4 (20 min, ★★).** Sample new pairs from the trained model and go on for another round. How many pairs are left? What is wrong with the rejected ones?
#
# **Exercise 13.5 (20 min, ★★).** Train on written pairs (`written_pairs`) instead of sampled ones. Compare the accuracy on pairs with the judge's share.
#
# Keep the model:

# %% id="dpo-save"
with chapter.write("dpo") as out:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

# %% [markdown]
# ## 13.8 Too far
#
# $\beta$ is the price of leaving the reference. Make it small, raise the learning rate, and train longer, as one does when the judge's share is "not high enough yet".
#
# **Before you run this**: will the accuracy on held-out pairs warn you?

# %% id="dpo-too-far"
far_model, far = prefer(chapter.size.far_beta, chapter.size.far_steps, chapter.size.far_rate)
for e in far.evals:
    print("   ".join(f"{name} {e[name]:.2f}" for name in
                     ("step", "margin", "accuracy", "chosen", "preferred", "right") if name in e))

# %% [markdown]
# The curves that a library shows by default are on the left. What the model says is on the right.

# %% id="dpo-too-far-figure"
fig, axes = plt.subplots(1, 3, figsize=(7, 2.5))
x = of(far, "step")
axes[0].plot(x, np.array(of(far, "margin")) / chapter.size.far_beta, marker="o")
axes[0].set(xlabel="step", ylabel="margin / β (nats)", title="looks well")
axes[1].plot(x, of(far, "chosen"), marker="s", color="C1")
axes[1].axhline(0, color="0.5", lw=1)
axes[1].set(xlabel="step", ylabel="chosen: log(π/π_ref)", title="the warning")
for name, marker in (("preferred", "o"), ("right", "^")):
    if name in far.evals[0]:
        axes[2].plot(x, of(far, name), marker=marker, label=name)
        axes[2].legend(fontsize=8)
axes[2].set(xlabel="step", ylabel="share of answers", ylim=(0, 1.02), title="what it says")
show(fig, "Over-optimisation: the margin grows and grows, the chosen answers become unlikely, "
          "and what the model says falls apart.")

# %% [markdown]
# Some of what it says now:

# %% id="dpo-too-far-answers"
for question in five[:3]:
    print(f"{question}\n    {ask(far_model, tokenizer, question, max_new_tokens=32)!r}")

# %% [markdown]
# Nothing in the loss forbids this. Chosen and rejected share their first sentence, so nothing protects it. The loss asks that the rejected answer become *less likely than* the chosen one, and
# driving both down, one faster, is a solution. Three signs to watch, none of which is margin or accuracy:
#
# - the chosen log-ratio falls below 0: even the good answers become unlikely;
# - sampled answers: read ten of them after every evaluation;
# - a measure that is not the judge, such as the facts here.

# %% id="dpo-too-far-check"
last = far.evals[-1]
chapter.record("dpo/far_margin", last["margin"] / chapter.size.far_beta)
chapter.record("dpo/far_chosen", last["chosen"])
if judged:
    check("dpo/far_preferred", last["preferred"])
    check("dpo/far_right", last["right"])
if judged and chapter.bands_hold and profile != "smoke":
    mine = history.evals[-1]
    assert last["margin"] / chapter.size.far_beta > mine["margin"] / chapter.size.beta
    assert last["preferred"] < mine["preferred"] and last["chosen"] < mine["chosen"]

# %% [markdown]
# **Exercise 13.6 (20 min, ★★).** Add cross-entropy of the chosen answer to the loss, weight 0.1. Does the chosen line stay above 0 in the run that went too far?
#
# **Exercise 13.7 (30 min, ★★★).** Plot the judge's share against the distance `chosen` + `rejected` for five values of $\beta$. Where is the best point?
#
# ## 13.9 A loss that has enough
#
# The pull of DPO never becomes zero. **IPO** (Azar et al. 2023) gives the margin a goal instead: the log-ratios of the two answers should differ by $1/2\beta$, per token, and no more.
# The square replaces $-\log\sigma$:
#
# $$L = \Big(h_w - h_l - \frac{1}{2\beta}\Big)^2, \qquad h = \frac{1}{|y|}\log\frac{\pi(y)}{\pi_{ref}(y)}$$

# %% id="dpo-ipo-loss"
#| export
def ipo_loss(model: nn.Module, batch: dict, beta: float = 0.1) -> tuple[torch.Tensor, dict]:
    """The squared loss of IPO (Azar et al. 2023, arXiv:2310.12036) with log-ratios per token, as TRL computes it."""
    chosen, rejected = log_ratios(model, batch)
    chosen_length, rejected_length = (batch["targets"] != -100).sum(-1).chunk(2)
    gap = chosen / chosen_length - rejected / rejected_length  # (B,), nats per token
    loss = ((gap - 1 / (2 * beta)) ** 2).mean()
    margin, accuracy = beta * (chosen - rejected), (chosen > rejected).float().mean()
    return loss, {"margin": margin.mean(), "accuracy": accuracy,
                  "chosen": chosen.mean(), "rejected": rejected.mean()}  # fmt: skip

# %% [markdown]
# Three lines differ from `dpo_loss`: the lengths, the gap, the square. TRL agrees here too:

# %% id="dpo-ipo-equal"
if have_trl:
    compare(partial(ipo_loss, beta=0.5), beta=0.5, loss_type=["ipo"])

# %% [markdown]
# Train it for as long as the run that went too far, with the same learning rate:

# %% id="dpo-ipo-run"
ipo_model, ipo = prefer(chapter.size.ipo_beta, chapter.size.far_steps, chapter.size.far_rate, ipo_loss)
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.5))
for name, run, beta, marker in (("DPO, small β", far, chapter.size.far_beta, "o"),
                                ("IPO", ipo, chapter.size.ipo_beta, "s")):
    left.plot(of(run, "step"), np.array(of(run, "margin")) / beta, marker=marker, label=name)
    right.plot(of(run, "step"), of(run, "chosen"), marker=marker, label=name)
left.set(xlabel="step", ylabel="margin / β (nats)")
right.set(xlabel="step", ylabel="chosen: log(π/π_ref)")
left.legend()
show(fig, "The same steps and learning rate: the margin of IPO stops at its goal, that of DPO runs on.")

# %% [markdown]
# And what it says:

# %% id="dpo-ipo-share"
if judged:
    print({name: f"{ipo.evals[-1][name]:.0%}" for name in ("preferred", "right")})
    check("dpo/ipo_preferred", ipo.evals[-1]["preferred"])

# %% [markdown]
# **Exercise 13.8 (25 min, ★★★).** SimPO (Meng et al. 2024) drops the reference: $-\log\sigma(\beta(\bar p_w - \bar p_l) - \gamma)$, with the mean log-probability $\bar p$ of a token. Write it. What protects the model now?
#
# ## 13.10 Recap
#
# - A comparison says which answer is better. Bradley and Terry turn comparisons into rewards; DPO puts $\beta \log(\pi/\pi_{ref})$ in the place of the reward and trains the model itself.
# - Count the tokens of the last answer only, and its end. One place early, and "stop here" is no longer compared.
# - The reference never changes: two numbers a pair, computed once.
# - Margin and accuracy are about the pairs. What the model writes needs samples, a judge, and a measure that is not the judge.
# - A small $\beta$ and many steps win every comparison and lose the model. Watch the chosen answers.
#
# **Words**: preference, chosen, rejected, reward, Bradley-Terry, KL divergence, reference model, margin, log-ratio, on-policy, over-optimisation, IPO.
#
# **Sources**: Bradley and Terry 1952, *Biometrika* 39. Rafailov et al. 2023, arXiv:2305.18290 (DPO). Azar et al. 2023, arXiv:2310.12036 (IPO). Meng et al. 2024, arXiv:2405.14734 (SimPO). Rafailov et al. 2024,
# arXiv:2406.02900 (over-optimisation in DPO). Pal et al. 2024, arXiv:2402.13228 (why the chosen answer can lose). Tajwar et al. 2024, arXiv:2404.14367 (why on-policy pairs help). Next: chapter 14 lets a large model teach a small one.
