# %% [markdown]
# # 14. Distillation
#
# In this chapter a large model teaches a small one. You will draw what a teacher says about one token, write the loss that compares two models,
# train the same small student with and without a teacher and put an interval around the difference. Then the teacher writes training data, and
# one picture shows size, speed and quality of all models.
#
# You need chapters 3 (cross-entropy), 8 (the loop), 9 (a pretrained model) and 11 (chat data). Section 14.9 uses the experts of chapter 6.
#
# Reading 40 minutes; running: smoke 30 s, cpu 4 min.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# One training step of this chapter. The text goes through two models. Only one of them learns.

# %% id="distill-opening-picture"
import matplotlib.pyplot as plt

def box(ax, x, y, text, colour="#e8eef7"):
    ax.text(x, y, text, ha="center", va="center", fontsize=8, bbox={"boxstyle": "round,pad=0.35", "fc": colour, "ec": "black"})

def arrow(ax, start, end):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "shrinkA": 22, "shrinkB": 22})

fig, ax = plt.subplots(figsize=(7, 1.9))
places = {"text": (0, 0.5), "teacher\n(frozen)": (1.3, 1), "student\n(learns)": (1.3, 0), "a probability for\nevery token": (2.8, 1),
          "a probability for\nevery token ": (2.8, 0), "distance\n(14.4)": (4.2, 0.5)}
for text, (x, y) in places.items():
    box(ax, x, y, text, "0.85" if "teacher" in text else "#e8eef7")
for start, end in ((0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 5)):
    arrow(ax, list(places.values())[start], list(places.values())[end])
ax.set(xlim=(-0.5, 4.8), ylim=(-0.4, 1.4))
ax.axis("off")
show(fig, "Distillation: teacher and student read the same text, and the student is moved towards what the teacher says.")

# %% id="distill-default-exp"
#| default_exp distill

# %% id="distill-imports"
#| export
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minimind.generate import generate_batch
from minimind.metrics import cross_entropy

# %% [markdown]
# ## 14.1 A small model is fast, and knows less
#
# Every model so far has had the same size. Much of its time goes into weights that a smaller model would not have. So take a smaller one: the
# **student**. It has the teacher's settings except for the sizes that the profile names, so it has the same vocabulary.

# %% id="distill-load"
from dataclasses import replace

from minimind.data import read_conversations, read_texts, set_seed
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

folder, data = chapter.read("pretrain"), chapter.read("data")
size, device = chapter.size, chapter.device
tokenizer = Tokenizer.from_pretrained(folder)
teacher = MiniMind.from_pretrained(folder).to(device).eval().requires_grad_(False)

def new_student(seed, sizes="student"):
    """A student with fresh weights."""
    set_seed(seed)
    return MiniMind(replace(teacher.config, num_experts=0, **getattr(size, sizes))).to(device)

# %% [markdown]
# How many weights has each, and how fast does each read?

# %% id="distill-sizes"
import json
import time
from contextlib import nullcontext
from itertools import islice

import numpy as np

def cast():
    """The precision of the training loop, for a forward pass outside of it."""
    return torch.autocast(device.type, chapter.amp) if chapter.amp else nullcontext()

@torch.no_grad()
def seconds_of(work, repeats=3):
    """The best time of `repeats` calls, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        clock = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - clock)
    return min(times[1:])

def reading_speed(model):
    """Tokens per second of a forward pass over 4 rows."""
    ids = torch.ones(4, size.context, dtype=torch.long, device=device)
    with cast():
        return ids.numel() / seconds_of(lambda: model(ids))

for name, model in {"teacher": teacher, "student": new_student(0)}.items():
    print(f"{name}: {model.num_parameters():,} parameters, reads {reading_speed(model):,.0f} tokens per second")

# %% [markdown]
# Now train the student on the same text as the teacher, for much less time. This is the model to beat: the **student alone**. The text:

# %% id="distill-data"
from minimind.metrics import evaluate_bits_per_byte, token_byte_lengths
from minimind.pretrain import PackedTokens, facts_known, pretrain_loss

def token_stream(name, documents):
    """The first documents of a file as one row of tokens."""
    some = [text[:20_000] for text in islice(read_texts(data / "pretrain" / name), documents)]
    return np.concatenate([np.array([*ids, tokenizer.eos_id]) for ids in tokenizer.encode_batch(some)])

train_tokens = token_stream("train.jsonl.gz", size.documents)
held_out, byte_lengths = token_stream("valid.jsonl.gz", size.valid_documents), token_byte_lengths(tokenizer)
print(f"{len(train_tokens):,} tokens to train on, {len(held_out):,} held out")

# %% [markdown]
# One function for every training run of this chapter. What changes from run to run is the loss, the seed and the size. The seed sets
# the first weights and the order of the text, so two runs of one seed differ in nothing but the loss.

# %% id="distill-run"
from minimind.train import TrainConfig, train

def bits_per_byte_of(model):
    return evaluate_bits_per_byte(model, held_out, byte_lengths, context=size.context, amp=chapter.amp)

def run(loss, seed, sizes="student"):
    """Train a fresh student; the model and its history."""
    model = new_student(seed, sizes)
    texts = PackedTokens(train_tokens, size.context, size.batch_size, seed=seed, device=device)
    config = TrainConfig(steps=size.steps, learning_rate=size.learning_rate, seed=seed, precision=chapter.settings.precision,
                         log_every=max(1, size.steps // 25), eval_every=max(1, size.steps // 4))
    evaluate = lambda model: {"bits_per_byte": bits_per_byte_of(model)}
    return model.eval(), train(model, texts, loss, config, evaluate=evaluate, max_steps=chapter.max_steps)

quality = lambda history: history.evals[-1]["bits_per_byte"]  # held-out bits per byte at the end
alone = [run(pretrain_loss, seed) for seed in size.seeds]
teacher_quality = bits_per_byte_of(teacher)
print("student alone:", [round(quality(history), 3) for _, history in alone], f"teacher: {teacher_quality:.3f}")

# %% [markdown]
# Bits per byte on held-out text, lower is better. The student is far behind. Part of the gap is size, part is training: the teacher has
# read many times more text. The question of this chapter: **the teacher has already read all that. Can the student get some of it without reading it?**
#
# ## 14.2 What one token tells
#
# Look at what the student learns from. Take a place in the held-out text where the teacher hesitates (about 2 bits of entropy, as in chapter 10).

# %% id="distill-one-place"
ids = torch.tensor(held_out[: size.context + 1], device=device)[None]  # (1, T+1)
with torch.no_grad():
    all_logits = teacher(ids[:, :-1])[0].float()  # (T, V)
entropy = -(all_logits.softmax(-1) * all_logits.log_softmax(-1)).sum(-1) / np.log(2)
place = int((entropy[8:] - 2).abs().argmin()) + 8
here, label = all_logits[place].cpu(), int(ids[0, place + 1])
print(repr(tokenizer.decode(ids[0, place - 8 : place + 1].tolist())), "goes on with", repr(tokenizer.decode([label])))

# %% [markdown]
# The text tells the student one thing: this token came. The teacher tells it something about every token.

# %% id="distill-targets-figure"
order = here.argsort(descending=True)[:12]
names = [tokenizer.decode([t]).strip() or "·" for t in order.tolist()]

def bars(ax, heights, title, **look):
    ax.bar(range(12), heights, **look)
    ax.set(title=title, xticks=range(12), ylim=(0, 1.02))
    ax.set_xticklabels(names, rotation=60, ha="right", fontsize=7)

fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True)
bars(left, (order == label).float(), "the text: one hard target", color="0.6", hatch="//")
bars(right, here.softmax(-1)[order], "the teacher: soft targets", color="C0")
left.set_ylabel("probability")
show(fig, "One place of the text: the label names a single token, while the teacher spreads its probability over the tokens that fit.")

# %% [markdown]
# These are **soft targets** (Hinton, Vinyals and Dean 2015). They say which other tokens would have been fine here and which
# would not, and this at every place. Nothing of it stands in the text; the teacher collected it from many places like this one.
#
# Is that more than the label tells? Think of the label as a *draw*: the writer had several continuations in mind and took one. With three tokens, teacher
# probabilities 0.6, 0.3 and 0.1, and a student that knows nothing, the gradient of the cross-entropy is $q - \text{one-hot}$ (chapter 3).
#
# **Before you run this**: the label is drawn 400 times. To what does the average gradient of the first logit converge?

# %% id="distill-draws"
p, q = torch.tensor([0.6, 0.3, 0.1]), torch.ones(3) / 3
draws = torch.multinomial(p, 400, replacement=True, generator=torch.Generator().manual_seed(0))
hard_gradients = q - F.one_hot(draws, 3).float()  # (400, 3), one for each drawn label
soft_gradient = q - p  # with the teacher's probabilities in the place of the one-hot
print("mean of 400 hard gradients:", hard_gradients.mean(0).tolist())
print("one soft gradient:         ", soft_gradient.tolist())

# %% [markdown]
# To the gradient with the soft target. One soft target is what you would know after seeing the same place again and again.

# %% id="distill-draws-figure"
fig, ax = plt.subplots(figsize=(7, 2.5))
count = torch.arange(1, 401)
ax.plot(count, hard_gradients[:, 0], ".", color="0.6", markersize=3, label="one label")
ax.plot(count, hard_gradients[:, 0].cumsum(0) / count, label="mean so far")
ax.axhline(soft_gradient[0], color="C1", ls="--", label="soft target")
ax.set(xlabel="labels drawn", ylabel="gradient of the first logit")
ax.legend(ncol=3, loc="center right")
show(fig, "Each label pushes hard one way or the other; their mean needs a hundred draws to come near to what one soft target says.")
assert (hard_gradients.mean(0) - soft_gradient).abs().max() < 5 * 0.5 / 400**0.5

# %% [markdown]
# So a teacher does two things: it takes noise out of the gradient, and it shares what it has seen elsewhere. It can do this only as far as it is right.
#
# ## 14.3 Temperature
#
# Where the teacher is sure, its soft target is almost a hard one, and the small differences among the other tokens vanish. Hinton et al. make them visible with the
# temperature of chapter 10: divide the logits by $\tau$ before the softmax.

# %% id="distill-temperature-figure"
sure = all_logits[int((entropy[8:] - 0.3).abs().argmin()) + 8].cpu()
sure_best = sure.argsort(descending=True)[:12]
fig, axes = plt.subplots(1, 3, figsize=(7, 2.5), sharey=True)
for ax, tau in zip(axes, (1, 2, 4)):
    ax.bar(range(12), (sure / tau).softmax(-1)[sure_best], color="C0")
    ax.set(title=f"temperature {tau}", xticks=range(12), xlabel="token, by rank", ylim=(0, 1.02))
    ax.set_xticklabels([tokenizer.decode([t]).strip() or "·" for t in sure_best.tolist()], rotation=60, ha="right", fontsize=6)
axes[0].set_ylabel("probability")
show(fig, "A place where the teacher is almost sure: a higher temperature lifts the other tokens into view and keeps their order.")

# %% [markdown]
# In a live notebook, move the slider. How much of the probability lies outside of the picture at temperature 4?

# %% id="distill-widget" tags=["widget"]
def explore(tau=2.0):
    fig, ax = plt.subplots(figsize=(6, 2.4))
    bars(ax, (here / tau).softmax(-1)[order], f"temperature {tau:.1f}", color="C0")
    ax.set_ylabel("probability")
    outside = 1 - (here / tau).softmax(-1)[order].sum()
    show(fig, f"Soft targets at temperature {tau:.1f}: {outside:.0%} of the probability is on tokens outside of this picture.")

try:
    from ipywidgets import interact
    interact(explore, tau=(0.5, 8.0, 0.5))
except ImportError:
    explore()

# %% [markdown]
# The same as a static figure: the share of the best token, of the next eleven, and of all the others.

# %% id="distill-tail-figure"
taus = np.linspace(0.5, 8, 31)
ranked = [(here / tau).softmax(-1).sort(descending=True).values for tau in taus]
parts = [[r[0] for r in ranked], [r[1:12].sum() for r in ranked], [r[12:].sum() for r in ranked]]
fig, ax = plt.subplots(figsize=(7, 2.4))
for (name, grey), part, below in zip({"best token": "0.35", "next eleven": "0.65", "all others": "0.9"}.items(), parts, np.cumsum([0 * taus, *parts], axis=0)):
    ax.fill_between(taus, below, below + np.array(part), color=grey, label=name)
ax.set(xlabel="temperature", ylabel="share of probability", ylim=(0, 1), xlim=(0.5, 8))
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
show(fig, f"The same place over temperature: with {len(here):,} tokens, a high temperature soon gives most of the probability to the long tail.")

# %% [markdown]
# This is where language models differ from the image classifiers of the paper, which had ten classes. A vocabulary has thousands of tokens, most of
# them wrong everywhere, and heat moves probability to them. Section 14.6 measures what that does.
#
# **Exercise 14.1 (10 min, ★).** Find the temperature at which half of the probability lies outside of the best twelve. Use bisection.
#
# ## 14.4 The distance between two models
#
# How far is the student $q$ from the teacher $p$ at one place? The **Kullback-Leibler divergence** asks how many extra nats you pay when the tokens come from $p$ and
# you bet with $q$:
#
# $$\mathrm{KL}(p \,\|\, q) = \sum_i p_i \,(\ln p_i - \ln q_i)$$
#
# Three tokens by hand: $p = (0.5, 0.3, 0.2)$, $q = (0.4, 0.4, 0.2)$. The last one agrees and costs nothing.

# %% id="distill-kl-by-hand"
p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
by_hand = 0.5 * np.log(0.5 / 0.4) + 0.3 * np.log(0.3 / 0.4) + 0.2 * np.log(0.2 / 0.2)
print(f"{by_hand:.4f} nats")

# %% [markdown]
# The same line for every place at once, from logits. `log_softmax` keeps tokens with a probability near 0 exact, and float32 keeps a sum over thousands of tokens
# exact.

# %% id="distill-kl"
#| export
def kl_divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats at each place: logits (..., V) each -> (...). Computed in float32.

    Both distributions are softened by the temperature first. Kullback and Leibler 1951, doi:10.1214/aoms/1177729694.
    """
    if teacher_logits.shape != student_logits.shape or temperature <= 0:
        raise ValueError(
            f"teacher logits {tuple(teacher_logits.shape)}, student logits {tuple(student_logits.shape)}, temperature "
            f"{temperature}: give logits of one shape, that is, of one vocabulary, and a temperature above 0"
        )
    p = (teacher_logits.float() / temperature).log_softmax(-1)
    q = (student_logits.float() / temperature).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)

# %% [markdown]
# By hand, and against torch's own function. Its first argument is the *student*, in logarithms; many bugs start there.

# %% id="distill-kl-agrees"
ours = kl_divergence(p.log(), q.log())
assert abs(float(ours) - by_hand) < 1e-6
assert torch.allclose(ours, F.kl_div(q.log(), p, reduction="sum"))
assert kl_divergence(p.log(), p.log()) == 0  # equal models are at distance 0

# %% [markdown]
# How does it pull at the student's logits $z$? The derivative of $\mathrm{KL}$ at temperature $\tau$ is
#
# $$\frac{\partial\, \mathrm{KL}}{\partial z_i} = \frac{1}{\tau}\,(q_i - p_i)$$
#
# and for a high temperature the difference $q_i - p_i$ shrinks like $1/\tau$ as well. Together the pull fades with $1/\tau^2$. Hinton et al. multiply the loss by
# $\tau^2$, so that its pull does not depend on the temperature you chose; the gradient becomes $\tau\,(q_i - p_i)$.

# %% id="distill-soft-loss"
#| export
def soft_loss(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """Mean of temperature**2 * KL(teacher || student) over all places (nats); logits (N, V) each.

    The factor keeps the gradient, temperature * (q - p) / N, from fading as the temperature rises.
    Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2.
    """
    return temperature**2 * kl_divergence(teacher_logits, student_logits, temperature).mean()

# %% [markdown]
# Autograd must give the formula. A real place, a student that knows nothing yet:

# %% id="distill-gradient-check"
z = torch.zeros(1, len(here), requires_grad=True)
soft_loss(here[None], z, temperature=3.0).backward()
formula = 3.0 * ((z / 3).softmax(-1) - (here / 3).softmax(-1))
print(f"largest difference: {(z.grad - formula).abs().max():.1e}")
assert torch.allclose(z.grad, formula, atol=1e-6)

# %% [markdown]
# **Before you run this**: without the factor, how much weaker is the pull at temperature 8 than at 1? Twice, eight times, sixty-four times?

# %% id="distill-square-figure"
def pull(tau, factor):
    """Length of the gradient at the student's logits."""
    z = torch.zeros(1, len(here), requires_grad=True)
    (factor * kl_divergence(here[None], z, tau).mean()).backward()
    return float(z.grad.norm())

taus = (1, 2, 3, 4, 6, 8)
pulls = {"with the factor": [pull(t, t**2) for t in taus], "without": [pull(t, 1) for t in taus]}
fig, ax = plt.subplots(figsize=(7, 2.4))
for (name, values), marker in zip(pulls.items(), "os"):
    ax.plot(taus, values, marker=marker, label=name)
ax.set(xlabel="temperature", ylabel="length of the gradient", yscale="log")
ax.legend()
show(fig, "The pull of one soft target on the student's logits: without the factor it fades fast as the temperature rises.")
print(f"from 1 to 8 it falls {pulls['without'][0] / pulls['without'][-1]:.0f} times without, {pulls['with the factor'][0] / pulls['with the factor'][-1]:.1f} times with")

# %% [markdown]
# **Exercise 14.2 (15 min, ★★).** For a very high temperature, show that the gradient tends to $(z_i - v_i)/V$, where $v$ are the teacher's logits and both have mean 0.
# What loss is that?
#
# ## 14.5 The loss of a training step
#
# Two rules before the code. **Only where something is learned.** A chat batch has padding and the user's words, whose label is -100. There the student is not asked
# for anything, so the teacher need not be asked either. Look at one such batch:

# %% id="distill-chat-batch"
from minimind.sft import PackedConversations, Replay, answers_right, ask, chat_example, sft_loss

rows = islice(read_conversations(data / "sft" / "train.jsonl.gz"), size.conversations)
conversations = [row["conversations"] for row in rows]

def examples_of(chats):
    """Tokens and labels of the conversations that have an answer within the context."""
    examples = [chat_example(tokenizer, messages, max_length=size.context + 1) for messages in chats]
    return [(ids, labels) for ids, labels in examples if any(label != -100 for label in labels)]

batch = PackedConversations(examples_of(conversations[:400]), size.context, size.batch_size, device=device)[0]
learned = batch["labels"] != -100  # (B, T)

# %% [markdown]
# The grey and white places of this picture differ in use, not in cost: a model that returns all logits computes a vector of the size of the vocabulary for each.

# %% id="distill-places-figure"
fig, ax = plt.subplots(figsize=(7, 1.7))
ax.imshow(learned[:12, :128].cpu(), cmap="Greys", aspect="auto", interpolation="nearest", vmin=-0.15, vmax=1.3)
ax.set(xlabel="position (tokens)", ylabel="row")
ax.grid(False)
show(fig, f"Part of a chat batch: only the dark places, {learned.float().mean():.0%} of the batch, are learned and need logits of the teacher.")

# %% [markdown]
# So stop before the output layer, keep the rows that count, and multiply only those. For a vocabulary of 6,400 (MiniMind's) or 150,000 (Qwen's) the logits are the largest
# tensor of the step, and here there are two of them.

# %% id="distill-logits-at"
#| export
def logits_at(model: nn.Module, batch: dict, places: Tensor) -> Tensor:
    """Logits where `places` (B, T) is True: (N, V). The output layer never sees the other positions."""
    hidden = model.model(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))  # (B, T, C)
    output = model.model.embed_tokens if model.lm_head is None else model.lm_head
    return F.linear(hidden[places], output.weight)

# %% [markdown]
# The same numbers as before, and less memory:

# %% id="distill-logits-at-check"
with torch.no_grad():
    kept = logits_at(teacher, batch, learned)
    every = teacher(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
assert torch.allclose(kept, every[learned], atol=1e-4)
megabytes = lambda tensor: tensor.numel() * tensor.element_size() / 1e6
saved = 1 - kept.numel() / every.numel()
print(f"teacher logits: {megabytes(every):.1f} MB for every place, {megabytes(kept):.1f} MB where something is learned ({chapter.record('distill/logits_saved', saved):.0%} saved)")

# %% [markdown]
# **And the teacher never learns.** It runs in evaluation mode and under `no_grad`: no graph, no gradients, no change.
#
# The loss mixes both targets. $\alpha$ is the weight of the teacher; $\alpha = 0$ is plain training, $\alpha = 1$ listens to the teacher alone.
#
# $$L = (1 - \alpha)\, \mathrm{CE}(\text{label}, q) + \alpha\, \tau^2\, \mathrm{KL}(p_\tau \,\|\, q_\tau)$$
#
# The loop of chapter 8 calls `loss_fn(model, batch)` with the student only. So the loss is an object that holds the teacher.

# %% id="distill-loss"
#| export
class DistillLoss:
    """loss(student, batch) for `train`: (1 - alpha) * cross-entropy + alpha * temperature**2 * KL(teacher || student).

    Both terms are means (nats) over the places that have a label. The teacher is frozen here and runs without a graph;
    it is held by the loss and not by the student, so that no optimiser and no checkpoint ever sees it.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 1.0, alpha: float = 0.9):
        if not 0 <= alpha <= 1 or temperature <= 0:
            raise ValueError(f"alpha={alpha}, temperature={temperature}: give an alpha from 0 to 1 and a temperature above 0")
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.alpha = temperature, alpha

    def __call__(self, student: nn.Module, batch: dict) -> tuple[Tensor, dict]:
        check_pair(student, self.teacher)
        learned = batch["labels"] != -100  # (B, T)
        logits = logits_at(student, batch, learned)  # (N, V)
        with torch.no_grad():
            target = logits_at(self.teacher, batch, learned)  # (N, V)
        hard = cross_entropy(logits, batch["labels"][learned])
        soft = soft_loss(target, logits, self.temperature)
        return (1 - self.alpha) * hard + self.alpha * soft, {"cross_entropy": hard, "soft": soft}


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """ValueError for a student that cannot learn from this teacher."""
    if student is teacher:
        raise ValueError("student and teacher are the same model: give the student weights of its own")
    mine, theirs = student.config.vocab_size, teacher.config.vocab_size
    if mine != theirs:
        raise ValueError(f"the student has {mine} tokens, the teacher {theirs}: build the student with the teacher's tokenizer and vocab_size")
    if student.config.num_experts:
        raise ValueError("the student has experts, and this loss has no balance term for them: give it num_experts=0")

# %% [markdown]
# Three checks. With $\alpha = 0$ it is the loss of chapter 11. With $\alpha = 1$ it is torch's `kl_div`. And no weight of the teacher gets a gradient.

# %% id="distill-loss-check"
student = new_student(0)
plain, chat_loss = DistillLoss(teacher, alpha=0.0)(student, batch)[0], sft_loss(student, batch)[0]
soft = DistillLoss(teacher, temperature=2.0, alpha=1.0)(student, batch)[0]
with torch.no_grad():
    mine = student(batch["input_ids"], batch["attention_mask"], batch["position_ids"])[learned]
    torchs = 4 * F.kl_div((mine / 2).log_softmax(-1), (kept / 2).softmax(-1), reduction="batchmean")
print(f"alpha 0: {plain:.5f} and {chat_loss:.5f}; alpha 1: {soft:.5f} and {torchs:.5f}")
assert abs(plain - chat_loss) < 1e-4 and abs(soft - torchs) < 1e-4
soft.backward()
assert all(weight.grad is None for weight in teacher.parameters()) and student.model.norm.weight.grad is not None

# %% [markdown]
# **Exercise 14.3 (20 min, ★★).** Keep only the teacher's 16 best logits of each place and put the rest of the probability into one more class. How far is the loss from the
# full one? What would it cost to store these for the whole text?
#
# ## 14.6 With a teacher, and without
#
# This is **white-box** distillation: we see the teacher's probabilities, not only its words. The students of 14.1 again, from the same first weights, on the same
# text in the same order, for the same number of steps. Only the loss is another one.
#
# **Before you run this**: the student alone reached the bits per byte printed in 14.1. How much of the gap to the teacher will close: a tenth, a third, all?

# %% id="distill-train"
white_box = DistillLoss(teacher, size.temperature, size.alpha)
taught = [run(white_box, seed) for seed in size.seeds]
for seed, (_, without), (_, with_teacher) in zip(size.seeds, alone, taught):
    print(f"seed {seed}: alone {quality(without):.4f}, taught {quality(with_teacher):.4f}, gain {quality(without) - quality(with_teacher):+.4f}")

# %% [markdown]
# Three seeds, three gains. How sure is their mean? A gain is a difference within one seed, so the luck of a seed, good for both runs or bad for
# both, cancels. For $n$ gains with standard deviation $s$ the 95% interval of the mean is $\pm\, t\, s/\sqrt{n}$. With three seeds $t$ is 4.30: few runs, wide interval
# (Student 1908).

# %% id="distill-interval"
from statistics import mean, stdev

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}

def interval(values):
    """Mean and half the width of its 95% interval."""
    return mean(values), T95[len(values)] * stdev(values) / len(values) ** 0.5

gains = [quality(without) - quality(with_teacher) for (_, without), (_, with_teacher) in zip(alone, taught)]
gain, half = interval(gains)
print(f"gain {gain:.4f} bits per byte, 95% interval {gain - half:.4f} to {gain + half:.4f}")
print(f"that is {gain / (mean(quality(h) for _, h in alone) - teacher_quality):.0%} of the gap to the teacher")

# %% [markdown]
# As a picture: each seed is one pair.

# %% id="distill-gain-figure"
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), width_ratios=(3, 2))
for runs, name, colour, marker in ((alone, "alone", "C1", "s"), (taught, "with a teacher", "C0", "o")):
    for i, (_, history) in enumerate(runs):
        left.plot([e["step"] for e in history.evals], [e["bits_per_byte"] for e in history.evals], color=colour, marker=marker, ms=4, ls="--" if marker == "s" else "-",
                  label=name if i == 0 else None)
left.axhline(teacher_quality, color="0.4", ls=":")
left.text(0, teacher_quality, " teacher", va="bottom", fontsize=8)
left.set(xlabel="step", ylabel="held-out bits per byte", ylim=(0, None), xlim=(0, None))
left.legend()
for seed, (_, a), (_, b) in zip(size.seeds, alone, taught):
    right.plot([0, 1], [quality(a), quality(b)], marker="o", color="0.3", ls="-")
right.set(xticks=[0, 1], xticklabels=["alone", "taught"], xlim=(-0.3, 1.3), ylabel="at the end")
show(fig, "Left: bits per byte over the steps for each seed. Right: each line joins the two runs of one seed, and every line goes down.")
chapter.curve("distill", taught[0][1].step, [m["cross_entropy"] for m in taught[0][1].metrics], x_label="step", y_label="nats per token")

# %% [markdown]
# The claim of this chapter, with its bands. The worst seed must gain too.

# %% id="distill-claim"
check("distill/gain_bits_per_byte", gain)
check("distill/worst_gain_bits_per_byte", min(gains))
chapter.record("distill/gain_half_interval", half)
chapter.record("distill/bits_per_byte_alone", mean(quality(h) for _, h in alone))
chapter.record("distill/bits_per_byte_taught", mean(quality(h) for _, h in taught))

# %% [markdown]
# What does it cost? The teacher's forward pass, on each step. Time one step of each:

# %% id="distill-cost"
texts = PackedTokens(train_tokens, size.context, size.batch_size, device=device)
student = new_student(0)

def one_step(loss):
    with torch.enable_grad(), cast():
        value = loss(student, texts[0])[0]
    value.backward()

slower = seconds_of(lambda: one_step(white_box)) / seconds_of(lambda: one_step(pretrain_loss))
print(f"a step with a teacher takes {chapter.record('distill/step_cost', slower):.1f} times as long")

# %% [markdown]
# So the claim holds *at equal steps*, that is, at equal text. At equal time the student alone could take more steps. A teacher pays where text is scarce, where the steps
# are few, or where its logits are computed once and used for many students.
#
# **Exercise 14.4 (25 min, ★★).** Give the student alone so many more steps that both runs take equally long. Who wins now?
#
# Teacher and student side by side on one held-out text, token by token:

# %% id="distill-side-by-side"
three = {"teacher": teacher, "taught": taught[0][0], "alone": alone[0][0]}
end = min(48, ids.shape[1] - 1)
with torch.no_grad():
    surprise = {name: F.cross_entropy(m(ids[:, :end])[0].float(), ids[0, 1 : end + 1], reduction="none").cpu() / np.log(2) for name, m in three.items()}
fig, axes = plt.subplots(3, 1, figsize=(7, 2.9), sharex=True, sharey=True)
for ax, (name, bits) in zip(axes, surprise.items()):
    ax.bar(range(end), bits, color="0.4" if name == "teacher" else "C0" if name == "taught" else "C1")
    ax.set(ylabel=f"{name}\n(bits)")
axes[2].set_xticks(range(end))
axes[2].set_xticklabels([tokenizer.decode([t]).strip() or "·" for t in ids[0, 1 : end + 1].tolist()], rotation=90, fontsize=6)
show(fig, "Surprise at each token of a held-out text, in bits: lower bars are better, and the tall ones stand where a new thing begins.")

# %% [markdown]
# And what they write, greedily, after the same words:

# %% id="distill-continue"
from minimind.generate import generate

start = ids[:, :8]
for name, model in three.items():
    print(f"{name:8}", repr(tokenizer.decode(generate(model, start, 24, stop_ids=(tokenizer.eos_id,))[0].tolist(), skip_special=True)))

# %% [markdown]
# Now the two dials. Hinton et al. found temperatures above 1 best for image classes. **Before you run this**: will temperature 2 help here too? Think of the tail in 14.3.

# %% id="distill-recipes"
recipes = {"alone": quality(alone[0][1]), f"temperature {size.temperature:g}, alpha {size.alpha:g}": quality(taught[0][1])}
for tau, alpha in size.recipes:
    recipes[f"temperature {tau:g}, alpha {alpha:g}"] = quality(run(DistillLoss(teacher, tau, alpha), size.seeds[0])[1])
    chapter.record(f"distill/gain_temperature_{tau:g}_alpha_{alpha:g}", recipes["alone"] - recipes[f"temperature {tau:g}, alpha {alpha:g}"])
fig, ax = plt.subplots(figsize=(7, 0.4 * len(recipes) + 0.8))
ax.bar_label(ax.barh(range(len(recipes)), recipes.values(), color=["0.7"] + ["C0"] * (len(recipes) - 1)), fmt=" {:.3f}", fontsize=8)
ax.set(yticks=range(len(recipes)), yticklabels=recipes, xlabel="held-out bits per byte (one seed)", xlim=(0, max(recipes.values()) * 1.12))
ax.invert_yaxis()
show(fig, "One student, several recipes, one seed: shorter bars are better, and the grey one has no teacher.")

# %% [markdown]
# RECIPES_PROSE
#
# **Exercise 14.5 (30 min, ★★).** Let the temperature fall from 2 to 1 over the run. Does it beat both?
#
# ## 14.7 A teacher that only talks
#
# Often you see a model's answers and nothing else: it runs behind a service, or it has another tokenizer. Then train on what it *says*. This is **black-box** distillation, at the
# level of sequences (Kim and Rush 2016), and most chat data written by models is made this way (for instance Taori et al. 2023, *Alpaca*).
#
# A teacher that only talks has one great advantage: you choose what to ask. The chat data of this world asks about half of its people. The teacher knows the others too (chapter 11), so ask it.

# %% id="distill-chat-teacher"
chat_teacher = MiniMind.from_pretrained(chapter.read("sft")).to(device).eval().requires_grad_(False)
questions_file = data / "questions.jsonl"
questions = [json.loads(line) for line in questions_file.open(encoding="utf-8")] if questions_file.exists() else []
if questions:
    five = [questions[i * len(questions) // 5]["question"] for i in range(5)]
else:
    five = ["Who are you?", "What is the sun?", "How are you today?", "What is two plus three?", "Tell me a story."]
print(five)

# %% [markdown]
# What to ask: every fact in every phrasing of the world, except for the very sentences of the test. Your own data have no such list; there the users' first
# sentences are asked.

# %% id="distill-what-to-ask"
from minimind.world import ASKS

if questions:
    test = {q["question"] for q in questions}
    asked = [text.format(n=q["person"]) for q in questions for text in ASKS[q["relation"]]]
    asked = [text for text in asked if text not in test][:: size.every_asked]
else:
    print("these data have no list of questions: the teacher is asked what the users of the chat data ask")
    asked = [messages[0]["content"] for messages in conversations if messages[0]["role"] == "user"][: size.asked]
print(f"{len(asked):,} questions to ask, such as {asked[0]!r}")

# %% [markdown]
# An answer that runs into the limit of tokens has no end, and a student would learn to ramble. Those are left out.

# %% id="distill-answers-of"
#| export
def answers_of(teacher: nn.Module, tokenizer, questions: Sequence[str], max_new_tokens: int = 48) -> list[list[dict]]:
    """Ask the teacher and return conversations {"role", "content"}, as chat data are; greedy, so the same each time.

    Answers that are empty or not closed within max_new_tokens are left out. Kim and Rush 2016, arXiv:1606.07947.
    """
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True) for q in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths together: little padding
    stops = (tokenizer.im_end_id, tokenizer.eos_id)
    answers = generate_batch(teacher, [prompts[i] for i in order], max_new_tokens, stop_ids=stops)
    closed = sorted((i, ids) for i, ids in zip(order, answers) if 0 < len(ids) < max_new_tokens)
    said = [(questions[i], tokenizer.decode(ids, skip_special=True).strip()) for i, ids in closed]
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said if a]

# %% [markdown]
# The teacher writes the data:

# %% id="distill-told"
clock = time.perf_counter()
room = teacher.config.max_position_embeddings - size.answer_tokens
short_enough = [q for q in asked if len(tokenizer.encode(q)) < min(room, size.context) - 16]  # the template needs some room too
told = answers_of(chat_teacher, tokenizer, short_enough, size.answer_tokens)
print(f"{len(told):,} of {len(asked):,} questions have a closed answer; {time.perf_counter() - clock:.0f} s")
for user, assistant in told[-2:]:
    print(f"    {user['content'][:80]!r} -> {assistant['content'][:80]!r}")

# %% [markdown]
# A student repeats its teacher's mistakes, so count them before you train. Here every right answer is known:

# %% id="distill-teacher-right"
from minimind.sft import says

if questions:
    answer_to = {text.format(n=q["person"]): q["answer"] for q in questions for text in ASKS[q["relation"]]}
    right = mean(says(assistant["content"], answer_to[user["content"]]) for user, assistant in told) if told else 0.0
    print(f"the teacher's answers: {chapter.record('distill/teacher_right', right):.1%} right")

# %% [markdown]
# Now two chat trainings from the same taught student, with the same replay of pretraining text (chapter 11) and the same number of steps. One has the chats of the data. The other has the
# teacher's answers as well, three times over among some chats of the data.

# %% id="distill-chat-train"
texts = PackedTokens(train_tokens, size.context, size.batch_size, seed=5, device=device)

def chat_run(chats, start):
    """Chat training of a copy of `start`."""
    model = new_student(0)
    model.load_state_dict(start.state_dict())
    packed = PackedConversations(examples_of(chats), size.context, size.batch_size, device=device)
    config = TrainConfig(steps=size.chat_steps, learning_rate=size.learning_rate, log_every=max(1, size.chat_steps // 25), precision=chapter.settings.precision)
    history = train(model, Replay(packed, texts, size.pretrain_share), sft_loss, config, max_steps=chapter.max_steps)
    return model.eval(), history

mixed = told * 3 + conversations[: size.mixed_conversations]
chat_runs = {"chats of the data": chat_run(conversations, taught[0][0]), "with the teacher's answers": chat_run(mixed, taught[0][0])}

# %% [markdown]
# Their losses have different data and cannot be compared. So ask:

# %% id="distill-chat-answers"
for question in five:
    print(question)
    for name, (model, _) in {"teacher": (chat_teacher, None), **chat_runs}.items():
        print(f"    {name:27}{ask(model, tokenizer, question, max_new_tokens=24)!r}")

# %% [markdown]
# All questions, in sentences that no training data held. For the first student the people called *unseen* were never asked about; the second heard other questions about them from its
# teacher.

# %% id="distill-chat-score"
def chat_scores(model):
    """Shares right about seen and unseen people, and of all facts completed without a question."""
    rows = answers_right(model, tokenizer, questions, max_new_tokens=24)[1]
    share = lambda seen: mean(row["right"] for row in rows if row["seen"] == seen)
    known = facts_known(model, tokenizer, [json.loads(line) for line in (data / "facts.jsonl").open(encoding="utf-8")])[0]
    return {"seen people": share(True), "unseen people": share(False), "facts completed": known}

scores = {name: chat_scores(model) for name, (model, _) in {"teacher": (chat_teacher, None), **chat_runs}.items()} if questions else {}
for name, values in scores.items():
    print(f"{name:27}", "  ".join(f"{what} {value:.1%}" for what, value in values.items()))

# %% id="distill-chat-figure"
if scores:
    fig, ax = plt.subplots(figsize=(7, 2.5))
    for i, ((name, values), look) in enumerate(zip(scores.items(), ({"color": "0.5"}, {"color": "C1", "hatch": "//"}, {"color": "C0"}))):
        ax.bar_label(ax.bar(np.arange(3) + 0.27 * (i - 1), values.values(), 0.25, label=name, **look), fmt="{:.0%}", fontsize=8)
    ax.set(xticks=range(3), xticklabels=scores["teacher"], ylabel="share right", ylim=(0, 1.1))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
    show(fig, "Answers right: without the teacher's answers the student knows almost nothing of the unseen people; with them it does.")

# %% [markdown]
# CHAT_PROSE

# %% id="distill-chat-claim"
if scores:
    without, with_answers = scores["chats of the data"], scores["with the teacher's answers"]
    check("distill/questions_seen", with_answers["seen people"])
    check("distill/questions_unseen", with_answers["unseen people"])
    chapter.record("distill/questions_unseen_without", without["unseen people"])
    check("distill/questions_gain", with_answers["unseen people"] - without["unseen people"])
    chapter.record("distill/facts", with_answers["facts completed"])
    chapter.record("distill/facts_without", without["facts completed"])

# %% [markdown]
# **Exercise 14.6 (25 min, ★★).** Ask the teacher only two of the four phrasings. How does the student fare with a phrasing it never met?
#
# **Exercise 14.7 (30 min, ★★★).** Put white box on top: train the same chats with `DistillLoss(chat_teacher)`. Does it need fewer steps?
#
# Keep the student, as a folder like all others, and its answers for the report.

# %% id="distill-save"
chat_student = chat_runs["with the teacher's answers"][0]
for question in five:
    chapter.answer("distill", question, ask(chat_student, tokenizer, question, max_new_tokens=24))
with chapter.write("distill") as out:
    chat_student.save_pretrained(out)
    tokenizer.save_pretrained(out)

# %% [markdown]
# ## 14.8 Size and speed against quality
#
# One more size, so that there is a line to see: a student of about a third of the first one, alone and taught. Then measure every model three ways: how well it predicts, how fast it reads (many tokens in one pass), and how
# fast it writes (one token at a time, with the cache of chapter 10).

# %% id="distill-small"
small = {"small, alone": run(pretrain_loss, size.seeds[0], "small"), "small, taught": run(white_box, size.seeds[0], "small")}

def writing_speed(model, new_tokens=48):
    """Tokens per second of greedy generation, one conversation."""
    return new_tokens / seconds_of(lambda: generate(model, start, new_tokens), repeats=2)

models = {"teacher": teacher, "student, alone": alone[0][0], "student, taught": taught[0][0]} | {name: model for name, (model, _) in small.items()}
table = {name: (m.num_parameters(), reading_speed(m), writing_speed(m), bits_per_byte_of(m)) for name, m in models.items()}
print(f"{'':16}{'parameters':>11}{'reads/s':>10}{'writes/s':>10}{'bits/byte':>11}")
for name, (count, reads, writes, bits) in table.items():
    print(f"{name:16}{count:11,}{reads:10,.0f}{writes:10,.0f}{bits:11.3f}")

# %% [markdown]
# **Before you look**: the small student has a fraction of the teacher's weights. Does it write faster by the same factor?

# %% id="distill-size-figure"
looks = dict(zip(table, ("*", "s", "o", "s", "o")))
fig, axes = plt.subplots(1, 3, figsize=(7, 2.8), sharey=True)
for ax, column, label in zip(axes, range(3), ("parameters", "tokens read per second", "tokens written per second")):
    for name, row in table.items():
        ax.plot(row[column], row[3], looks[name], ms=11 if name == "teacher" else 7, color="0.3" if name == "teacher" else "C0" if "taught" in name else "C1", label=name)
    for kind in ("student", "small"):
        ax.plot([table[f"{kind}, alone"][column], table[f"{kind}, taught"][column]], [table[f"{kind}, alone"][3], table[f"{kind}, taught"][3]], color="0.6", ls="-", lw=1, zorder=0)
    ax.set(xlabel=label, ylim=(0, None), xlim=(0, max(row[column] for row in table.values()) * 1.15))
axes[0].set_ylabel("held-out bits per byte")
axes[0].text(table["teacher"][0], table["teacher"][3], "teacher ", ha="right", va="top", fontsize=8)
axes[0].text(table["student, alone"][0], table["student, alone"][3], " student", va="bottom", fontsize=8)
axes[0].text(table["small, alone"][0], table["small, alone"][3], " small", va="bottom", fontsize=8)
show(fig, "Size and speed against quality, lower is better: star teacher, squares alone, circles taught. The teacher moves a student down at no cost in size or speed.")

# %% id="distill-size-record"
for name, metric in (("teacher", "teacher"), ("student, taught", "student"), ("small, taught", "small")):
    chapter.record(f"distill/{metric}_parameters", table[name][0])
    chapter.record(f"distill/{metric}_reads_per_second", table[name][1])
    chapter.record(f"distill/{metric}_writes_per_second", table[name][2])
    chapter.record(f"distill/{metric}_bits_per_byte", table[name][3])
chapter.record("distill/small_gain_bits_per_byte", table["small, alone"][3] - table["small, taught"][3])

# %% [markdown]
# SPEED_PROSE
#
# ## 14.9 A teacher with experts
#
# Experts (chapter 6) make a model larger without making a token dearer, but all of them must lie in memory. A dense student of such a teacher fits where the teacher does not. That needs a
# teacher with experts. Training one from nothing takes as long as chapter 9, so we **upcycle** the dense one (Komatsuzaki et al. 2022): each expert starts as a copy of the
# feed-forward layer.

# %% id="distill-upcycle"
def upcycle(dense, experts=4):
    """The dense model with each feed-forward layer copied into `experts` experts, two of them for each token."""
    set_seed(0)
    moe = MiniMind(replace(dense.config, num_experts=experts, num_experts_per_tok=2, norm_topk_prob=True, moe_intermediate_size=dense.config.intermediate_size))
    moe.load_state_dict(dense.state_dict(), strict=False)  # all but the experts and the routers
    for new, old in zip(moe.model.layers, dense.model.layers):
        for expert in new.mlp.experts:
            expert.load_state_dict(old.mlp.state_dict())
    return moe.to(device)

# %% [markdown]
# **Before you run this**: the routers are random. How good is the new model before its first step?

# %% id="distill-upcycle-check"
moe = upcycle(teacher) if not teacher.config.num_experts else MiniMind.from_pretrained(folder).to(device)
with torch.no_grad():
    moved = (moe(ids[:, :-1]) - teacher(ids[:, :-1])).abs().max()
print(f"logits move by at most {moved:.0e}; {moe.num_parameters() / teacher.num_parameters():.1f} times the weights")
assert moved < 1e-2

# %% [markdown]
# Exactly as good: two equal experts with weights that add up to 1 are one. Some steps of training let them drift apart. Then it teaches a student with the first seed, as the dense teacher did.

# %% id="distill-moe-teach"
config = TrainConfig(steps=size.moe_steps, learning_rate=size.learning_rate / 3, decay=0.8, log_every=max(1, size.moe_steps // 5), precision=chapter.settings.precision)
moe_texts = PackedTokens(train_tokens, size.context, size.batch_size, seed=9, device=device)
train(moe, moe_texts, pretrain_loss, config, max_steps=chapter.max_steps)
moe_student, moe_history = run(DistillLoss(moe, size.temperature, size.alpha), size.seeds[0])
results = {"dense": (teacher_quality, quality(taught[0][1])), "experts": (bits_per_byte_of(moe), quality(moe_history))}
for name, (its_own, of_student) in results.items():
    print(f"{name:8} teacher {its_own:.4f}, its student {of_student:.4f} bits per byte")
chapter.record("distill/moe_teacher_bits_per_byte", results["experts"][0])
moe_gain = check("distill/moe_gain_bits_per_byte", quality(alone[0][1]) - quality(moe_history))
chapter.record("distill/moe_over_dense_bits_per_byte", quality(taught[0][1]) - quality(moe_history))

# %% [markdown]
# MOE_PROSE

# %% id="distill-moe-figure"
fig, ax = plt.subplots(figsize=(7, 1.9))
pairs = {"no teacher": (None, quality(alone[0][1]))} | {f"{name} teacher": pair for name, pair in results.items()}
for y, (name, (its_own, of_student)) in enumerate(pairs.items()):
    ax.plot(of_student, y, "o", color="C0", ms=8, label="student" if y == 0 else None)
    if its_own is not None:
        ax.plot([its_own, of_student], [y, y], color="0.7", ls="-", zorder=0)
        ax.plot(its_own, y, "*", color="0.3", ms=11, label="teacher" if y == 1 else None)
ax.axvspan(quality(taught[0][1]) - half, quality(taught[0][1]) + half, color="0.9", zorder=-1)
ax.set(yticks=range(3), yticklabels=pairs, xlabel="held-out bits per byte", ylim=(-0.5, 2.5))
ax.invert_yaxis()
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
show(fig, "Students of two teachers, one seed; the band is the half interval of 14.6 around the student of the dense one.")

# %% [markdown]
# **Exercise 14.8 (25 min, ★★).** Run the experiment with two more seeds and put an interval around the difference between the two teachers.
#
# ## 14.10 Where it breaks
#
# **The divergence the wrong way round.** $\mathrm{KL}(p \,\|\, q)$ and $\mathrm{KL}(q \,\|\, p)$ are different numbers. The first punishes a student that gives nothing to what the teacher says; the second one that says what the teacher does not.
# Let a student that can only make one hump fit a teacher with two:

# %% id="distill-two-humps"
axis = torch.arange(40.0)
hump = lambda middle, width: -0.5 * ((axis - middle) / width) ** 2  # logits of one hump
two = torch.logsumexp(torch.stack([hump(10, 2.5), hump(28, 2.5) - 0.5]), 0)

def fit(distance):
    """The middle and the width of the one hump with the smallest distance to the two."""
    tried = [(float(distance(two, hump(m, w))), m, w) for m in np.arange(5, 35, 0.5) for w in np.arange(1, 14, 0.5)]
    return min(tried)[1:]

fig, axes = plt.subplots(1, 2, figsize=(7, 2.3), sharey=True)
ways = {"KL(teacher || student)": kl_divergence, "KL(student || teacher)": lambda p, q: kl_divergence(q, p)}
for ax, (name, distance) in zip(axes, ways.items()):
    ax.fill_between(axis, two.softmax(-1), color="0.8", label="teacher")
    ax.plot(axis, hump(*fit(distance)).softmax(-1), label="best student")
    ax.set(title=name, xlabel="token", xticks=range(0, 41, 10))
axes[0].set_ylabel("probability")
axes[0].legend()
show(fig, "The same teacher, two distances: one way round the student covers both humps, the other way it picks one and ignores the other.")
assert fit(ways["KL(teacher || student)"])[1] > 2 * fit(ways["KL(student || teacher)"])[1]

# %% [markdown]
# Neither is wrong in itself. The reverse direction is used on purpose where a student should rather say one good thing than hedge (Gu et al. 2023, *MiniLLM*; Agarwal et al. 2023). It is a bug when you meant the other. With `F.kl_div` it happens easily, because its
# first argument is the student, and must be logarithms:

# %% id="distill-kl-div-traps"
right = F.kl_div(q.log(), p, reduction="sum")
print(f"right: {right:.4f}   swapped: {F.kl_div(p.log(), q, reduction='sum'):.4f}   no log: {F.kl_div(q, p, reduction='sum'):.4f}")
rows = torch.randn(6, 50)  # six places, fifty tokens
mean_of = lambda reduction: float(F.kl_div(rows.log_softmax(-1), torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).softmax(-1), reduction=reduction))
print(f"'batchmean' {mean_of('batchmean'):.3f}; 'mean' {mean_of('mean'):.4f}, which is divided by the vocabulary too")

# %% [markdown]
# The swapped value is close, which is what makes it hard to see. Without the logarithm it is negative, and no divergence is. And the reduction called `mean` divides by the size of the vocabulary too: the teacher's voice becomes a whisper, and training
# goes on without a complaint.
#
# **Padding in the mean.** Take the mean over all places instead of those that are learned, and add more padding to the same chat:

# %% id="distill-padding"
def padded(extra):
    """One conversation with `extra` places of padding: batch, and the mean KL over every place."""
    tokens, labels = examples_of(conversations[:50])[0]
    fill = torch.zeros(1, extra, dtype=torch.long)
    batch = {"input_ids": torch.cat([torch.tensor([tokens[:-1]]), fill], 1).to(device), "labels": torch.cat([torch.tensor([labels[1:]]), fill - 100], 1).to(device)}
    with torch.no_grad():
        every = kl_divergence(teacher(batch["input_ids"]), student(batch["input_ids"])).mean()
        ours = DistillLoss(teacher, alpha=1.0)(student, batch)[0]
    return float(every), float(ours)

student = new_student(0)
for extra in (0, 20, 60):
    every, ours = padded(extra)
    print(f"{extra:2} places of padding: mean over every place {every:.3f}, over learned places {ours:.3f}")
assert abs(padded(0)[1] - padded(60)[1]) < 0.05 < abs(padded(0)[0] - padded(60)[0])

# %% [markdown]
# The right number does not care. The wrong one moves with the padding, and so does the gradient: the student spends its weights on what the teacher would say about nothing.
#
# **Another tokenizer.** Token 17 must mean the same to both. A vocabulary of another size is caught by the loss:

# %% id="distill-other-vocabulary"
stranger = MiniMind(replace(teacher.config, num_experts=0, vocab_size=teacher.config.vocab_size + 8, **size.student)).to(device)
try:
    white_box(stranger, batch)
except ValueError as error:
    print(error)
else:
    raise AssertionError("another vocabulary must be refused")

# %% [markdown]
# But two tokenizers of one size are more dangerous: every shape fits, the loss falls, and the student learns nonsense. Compare them before you train:

# %% id="distill-same-tokenizer"
#| export
def check_same_tokenizer(student, teacher) -> None:
    """ValueError that names the first token in which two tokenizers differ: soft targets need one vocabulary."""
    mine, theirs = student.token_bytes(), teacher.token_bytes()
    if mine == theirs and student.special_ids == teacher.special_ids:
        return
    first = next((i for i, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1]), min(len(mine), len(theirs)))
    shown = [repr(tokens[first]) if first < len(tokens) else "nothing" for tokens in (mine, theirs)]
    raise ValueError(
        f"the tokenizers differ: token {first} is {shown[0]} for the student and {shown[1]} for the teacher. Train the student "
        f"with the teacher's tokenizer, or train it on the teacher's answers (answers_of), which are text"
    )

# %% id="distill-same-tokenizer-check"
check_same_tokenizer(tokenizer, Tokenizer.from_pretrained(chapter.read("sft")))  # the two teachers of this chapter agree
other = Tokenizer.train(["another text makes other tokens, and there are not many of them"] * 4, 330)
try:
    check_same_tokenizer(other, tokenizer)
except ValueError as error:
    print(error)
else:
    raise AssertionError("another tokenizer must be refused")

# %% [markdown]
# **The teacher as a part of the student.** It is tempting to write `student.teacher = teacher`, to have it at hand. PyTorch then counts it as a layer:

# %% id="distill-teacher-inside"
inside = new_student(0)
before = inside.num_parameters()
inside.teacher = MiniMind.from_pretrained(folder).to(device)  # in training mode, with gradients
print(f"{before:,} parameters before, {inside.num_parameters():,} after; the optimiser would train all of them")

# %% [markdown]
# Now the optimiser holds the teacher as well, and each checkpoint saves it. If the loss forgets `no_grad`, the teacher moves towards the student, which also makes the distance fall. See it in a few steps on one batch: the loss falls, and the teacher gets worse.

# %% id="distill-teacher-moves"
few = min(20, chapter.max_steps or 20)
optimizer = torch.optim.AdamW(inside.parameters(), lr=size.learning_rate)
for step in range(few):
    with cast():
        every = torch.ones_like(texts[step]["labels"], dtype=torch.bool)
        loss = soft_loss(logits_at(inside.teacher, texts[step], every), logits_at(inside, texts[step], every), 1.0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
moved_quality = bits_per_byte_of(inside.teacher)
print(f"loss {loss:.2f} after {few} steps; the teacher went from {teacher_quality:.3f} to {moved_quality:.3f} bits per byte")
assert moved_quality > teacher_quality and abs(bits_per_byte_of(teacher) - teacher_quality) < 1e-3  # ours is untouched

# %% [markdown]
# The loss fell because the teacher gave in. Watch a number that the teacher cannot move: bits per byte on held-out text.
#
# ## 14.11 Recap
#
# - A soft target gives a probability for every token; one of it says what many draws of a label would say in the mean.
# - The loss is cross-entropy plus $\tau^2$ times the divergence from teacher to student, over learned places only; the teacher has no gradient.
# - At equal steps the taught student beat the same student alone in every seed; at the price of a forward pass of the teacher.
# - A teacher that only talks is data that you can order: ask about what your data leave out, and count its mistakes first.
# - Direction, factor, padding, vocabulary: each mistake trains without a complaint. Judge by held-out text.
#
# **Words**: distillation, teacher, student, soft target, hard target, temperature, Kullback-Leibler divergence, white box, black box, sequence-level distillation, upcycling, forward and reverse KL.
#
# **Exercise 14.9 (30 min, ★★★).** Start the student from layers of the teacher instead of from chance (Sanh et al. 2019): the same width, every second layer. How much of the gap is left?
#
# **Sources**: Hinton, Vinyals and Dean 2015, arXiv:1503.02531 (soft targets, temperature). Bucilua, Caruana and Niculescu-Mizil 2006 (the idea). Kim and Rush 2016, arXiv:1606.07947 (sequence level). Sanh et al. 2019, *DistilBERT*, arXiv:1910.01108.
# Gu et al. 2023, *MiniLLM*, arXiv:2306.08543 (reverse KL). Agarwal et al. 2023, arXiv:2306.13649 (on-policy and generalised JSD, as in TRL). Komatsuzaki et al. 2022, arXiv:2212.05055 (upcycling). Student 1908, doi:10.2307/2331554 (the t interval). Next: chapter 15 asks
# when a difference between two models is real.
