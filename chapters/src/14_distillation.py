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
    frame = {"boxstyle": "round,pad=0.35", "fc": colour, "ec": "black"}
    ax.text(x, y, text, ha="center", va="center", fontsize=8, bbox=frame)

def arrow(ax, start, end):
    look = {"arrowstyle": "->", "shrinkA": 38, "shrinkB": 38}
    ax.annotate("", end, start, arrowprops=look)

fig, ax = plt.subplots(figsize=(7, 1.9))
places = {"text": (0, 0.5), "teacher\n(frozen)": (1.3, 1),
          "student\n(learns)": (1.3, 0),
          "a probability for\nevery token": (2.8, 1), "a probability for\nevery token ": (2.8, 0),
          "distance\n(14.4)": (4.2, 0.5)}
for text, (x, y) in places.items():
    box(ax, x, y, text, "0.85" if "teacher" in text else "#e8eef7")
for start, end in ((0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 5)):
    arrow(ax, list(places.values())[start], list(places.values())[end])
ax.set(xlim=(-0.4, 4.6), ylim=(-0.4, 1.4))
ax.axis("off")
show(fig, "Distillation: teacher and student read the same text, and the student is "
          "moved towards what the teacher says.")

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
    config = replace(teacher.config, num_experts=0, **getattr(size, sizes))
    return MiniMind(config).to(device)

# %% [markdown]
# How many weights has each, and how fast does each read?

# %% id="distill-sizes"
import json
import time
from contextlib import nullcontext
from itertools import islice

import numpy as np

precision = chapter.settings.precision

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

# %% [markdown]
# The best of three times is the one that other programs disturbed least.

# %% id="distill-reading-speed"
def reading_speed(model):
    """Tokens per second of a forward pass over 4 rows."""
    ids = torch.ones(4, size.context, dtype=torch.long, device=device)
    with cast():
        return ids.numel() / seconds_of(lambda: model(ids))

for name, model in {"teacher": teacher, "student": new_student(0)}.items():
    count, speed = model.num_parameters(), reading_speed(model)
    print(f"{name}: {count:,} parameters, reads {speed:,.0f} tokens per second")

# %% [markdown]
# Now train the student on the same text as the teacher, for much less time. This is the model to beat: the **student alone**. The text:

# %% id="distill-data"
from minimind.metrics import evaluate_bits_per_byte, token_byte_lengths
from minimind.pretrain import PackedTokens, facts_known, pretrain_loss

def token_stream(name, documents):
    """The first documents of a file as one row of tokens."""
    texts = islice(read_texts(data / "pretrain" / name), documents)
    encoded = tokenizer.encode_batch([text[:20_000] for text in texts])
    return np.concatenate([np.array([*ids, tokenizer.eos_id]) for ids in encoded])

train_tokens = token_stream("train.jsonl.gz", size.documents)
held_out = token_stream("valid.jsonl.gz", size.valid_documents)
print(f"{len(train_tokens):,} tokens to train on, {len(held_out):,} held out")

# %% [markdown]
# One function for every training run of this chapter. What changes from run to run is the loss, the seed and the size. The seed sets
# the first weights and the order of the text, so two runs of one seed differ in nothing but the loss.

# %% id="distill-run"
from minimind.train import TrainConfig, train

byte_lengths = token_byte_lengths(tokenizer)

def bits_per_byte_of(model):
    return evaluate_bits_per_byte(
        model, held_out, byte_lengths, context=size.context, amp=chapter.amp
    )

def settings(steps, **more):
    more = {"learning_rate": size.learning_rate, "precision": precision} | more
    return TrainConfig(steps=steps, log_every=max(1, steps // 25), **more)

def pack_texts(seed):
    return PackedTokens(train_tokens, size.context, size.batch_size, seed, device)

def run(loss, seed, sizes="student"):
    """Train a fresh student; the model and its history."""
    model = new_student(seed, sizes)
    config = settings(size.steps, seed=seed, eval_every=max(1, size.steps // 4))
    history = train(model, pack_texts(seed), loss, config, max_steps=chapter.max_steps,
                    evaluate=lambda m: {"bits_per_byte": bits_per_byte_of(m)})
    return model.eval(), history

# %% [markdown]
# Three students, each with a seed of its own:

# %% id="distill-alone"
quality = lambda history: history.evals[-1]["bits_per_byte"]  # at the end of the run
alone = [run(pretrain_loss, seed) for seed in size.seeds]
teacher_quality = bits_per_byte_of(teacher)
print("alone:", [round(quality(history), 3) for _, history in alone])
print(f"teacher: {teacher_quality:.3f}")

# %% [markdown]
# Bits per byte on held-out text, lower is better (chapter 3). The student is far behind. Part of the gap is size, part is training: the teacher has
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
before = tokenizer.decode(ids[0, place - 8 : place + 1].tolist())
print(repr(before), "goes on with", repr(tokenizer.decode([label])))

# %% [markdown]
# The text tells the student one thing: this token came. The teacher tells it something about every token.

# %% id="distill-targets-figure"
def shown(tokens):
    """Short labels for an axis."""
    words = [tokenizer.decode([token]).strip() for token in tokens.tolist()]
    return [word.replace("<|endoftext|>", "(end)") or "·" for word in words]

order = here.argsort(descending=True)[:12]

def bars(ax, heights, title, **look):
    ax.bar(range(12), heights, **look)
    ax.set(title=title, xticks=range(12), ylim=(0, 1.02))
    ax.set_xticklabels(shown(order), rotation=60, ha="right", fontsize=7)

fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True)
bars(left, (order == label).float(), "the text: one hard target", color="0.6",
     hatch="//")
bars(right, here.softmax(-1)[order], "the teacher: soft targets", color="C0")
left.set_ylabel("probability")
show(fig, "One place of the text: the label names a single token, while the teacher "
          "spreads its probability over the tokens that fit.")

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
chance = torch.Generator().manual_seed(0)
draws = torch.multinomial(p, 400, replacement=True, generator=chance)
hard_gradients = q - F.one_hot(draws, 3).float()  # (400, 3), one for each drawn label
soft_gradient = q - p  # the teacher's probabilities instead of the one-hot
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
ax.legend(ncol=3, loc="center right", bbox_to_anchor=(1, 0.6))
show(fig, "Each label pushes hard one way or the other; their mean needs a hundred "
          "draws to come near to what one soft target says.")
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
    ax.set(title=f"temperature {tau}", xticks=range(12), ylim=(0, 1.02))
    ax.set_xticklabels(shown(sure_best), rotation=60, ha="right", fontsize=6)
axes[0].set_ylabel("probability")
show(fig, "A place where the teacher is almost sure: a higher temperature lifts the "
          "other tokens into view and keeps their order.")

# %% [markdown]
# In a live notebook, move the slider. How much of the probability lies outside of the picture at temperature 4?

# %% id="distill-widget" tags=["widget"]
def explore(tau=2.0):
    fig, ax = plt.subplots(figsize=(6, 2.4))
    bars(ax, (here / tau).softmax(-1)[order], f"temperature {tau:.1f}", color="C0")
    ax.set_ylabel("probability")
    outside = 1 - (here / tau).softmax(-1)[order].sum()
    show(fig, f"Soft targets at temperature {tau:.1f}: {outside:.0%} of the "
              "probability is on tokens outside of this picture.")

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
parts = [[float(r[a:b].sum()) for r in ranked]
         for a, b in ((0, 1), (1, 12), (12, None))]
fig, ax = plt.subplots(figsize=(7, 2.4))
names, greys = ("best token", "next eleven", "all others"), ("0.35", "0.65", "0.9")
ax.stackplot(taus, np.array(parts), labels=names, colors=greys)
ax.set(xlabel="temperature", ylabel="share of probability", ylim=(0, 1), xlim=(0.5, 8))
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
show(fig, f"The same place over temperature: with {len(here):,} tokens, a high "
          "temperature soon gives most of the probability to the long tail.")

# %% [markdown]
# This is where a language model differs from the first example of the paper, handwritten digits, which has ten classes. A vocabulary has thousands of tokens, most of
# them wrong at any given place, and heat moves probability to them. Section 14.6 measures what that does.
#
# **Exercise 14.6 (5 min, ★): `share_at_two`** in [workbook 14](../exercises/14_distillation.ipynb). One token of 6,400 stands out. Predict on paper what temperature 2 leaves of its share.
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
def kl_divergence(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) in nats at each place: logits (..., V) each -> (...).

    In float32, and both are softened by the temperature first.
    Kullback and Leibler 1951, doi:10.1214/aoms/1177729694.
    """
    shapes = tuple(teacher_logits.shape), tuple(student_logits.shape)
    if shapes[0] != shapes[1] or temperature <= 0:
        raise ValueError(
            f"teacher logits {shapes[0]}, student logits {shapes[1]}, temperature "
            f"{temperature}: "
            f"give logits of one shape, that is, of one vocabulary, and a temperature "
            "above 0"
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
def soft_loss(teacher_logits: Tensor, student_logits: Tensor,
              temperature: float) -> Tensor:
    """Mean of temperature**2 * KL(teacher || student); logits are (N, V) each.

    The factor keeps the gradient, temperature * (q - p) / N, from fading with heat.
    Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2.
    """
    divergence = kl_divergence(teacher_logits, student_logits, temperature)  # (N,)
    return temperature**2 * divergence.mean()

# %% [markdown]
# Autograd must give the formula. A real place, a student that knows nothing yet:

# %% id="distill-gradient-check"
z = torch.zeros(1, len(here), requires_grad=True)
soft_loss(here[None], z, temperature=3.0).backward()
formula = 3.0 * ((z / 3).softmax(-1) - (here / 3).softmax(-1))
print(f"largest difference: {(z.grad - formula).abs().max():.1e}")
assert torch.allclose(z.grad, formula, atol=1e-6)

# %% [markdown]
# What does the factor do on a real place? Take the gradient at the student's logits and measure its length, with the factor and without, for several temperatures.
#
# **Before you run this**: without the factor, how much weaker is the pull at temperature 8 than at 1? Twice, eight times, sixty-four times?

# %% id="distill-square-figure"
def pull(tau, factor):
    """Length of the gradient at the student's logits."""
    z = torch.zeros(1, len(here), requires_grad=True)
    (factor * kl_divergence(here[None], z, tau).mean()).backward()
    return float(z.grad.norm())

taus = (1, 2, 3, 4, 6, 8)
pulls = {"with": [pull(t, t**2) for t in taus], "without": [pull(t, 1) for t in taus]}
fig, ax = plt.subplots(figsize=(7, 2.4))
for (name, values), marker in zip(pulls.items(), "os"):
    ax.plot(taus, values, marker=marker, label=f"{name} the factor")
ax.set(xlabel="temperature", ylabel="length of the gradient", yscale="log")
ax.legend()
show(fig, "The pull of one soft target on the student's logits: without the factor it "
          "fades fast as the temperature rises.")
for name, values in pulls.items():
    print(f"{name} the factor, from 1 to 8 the pull falls {values[0] / values[-1]:.1f} "
          "times")

# %% [markdown]
# More than sixty-four times. The rule of $1/\tau^2$ holds for high temperatures, and on the way there the two distributions come closer as well. So the factor does not make the pull
# constant either. It slows the fall: the upper line is flat where the lower one still drops. Without it you would have to find a new learning rate for every temperature.
#
# **Exercise 14.1 (15 min, ★★): `kl_divergence`** in [workbook 14](../exercises/14_distillation.ipynb). Write the distance from the formula; the check also has a student that is sure of one token.
#
# **Exercise 14.2 (5 min, ★): `soft_loss`** in [workbook 14](../exercises/14_distillation.ipynb). Add the factor, and take the mean.
#
# ## 14.5 The loss of a training step
#
# Two rules before the code. **Only where something is learned.** A chat batch has padding and the user's words, whose label is -100. There the student is not asked
# for anything, so the teacher need not be asked either. Look at one such batch:

# %% id="distill-chat-batch"
from minimind.sft import PackedConversations, chat_example, sft_loss

rows = islice(read_conversations(data / "sft" / "train.jsonl.gz"), size.conversations)
conversations = [row["conversations"] for row in rows]

def examples_of(chats):
    """Tokens and labels of the conversations that have an answer within the context."""
    examples = [chat_example(tokenizer, chat, max_length=size.context + 1)
                for chat in chats]
    return [(ids, labels) for ids, labels in examples if set(labels) != {-100}]

def pack_chats(chats):
    return PackedConversations(examples_of(chats), size.context, size.batch_size,
                               device=device)

batch = pack_chats(conversations[:400])[0]
learned = batch["labels"] != -100  # (B, T)

# %% [markdown]
# Light and dark places differ in use, not in cost: a model that returns all logits computes one number for each token of the vocabulary at every place.

# %% id="distill-places-figure"
fig, ax = plt.subplots(figsize=(7, 1.7))
part = learned[:12, :128].cpu()
ax.imshow(part, cmap="Greys", aspect="auto", interpolation="nearest", vmin=-0.15,
          vmax=1.3)
ax.set(xlabel="position (tokens)", ylabel="row")
ax.grid(False)
show(fig, f"Part of a chat batch: only the dark places, {learned.float().mean():.0%} "
          "of the batch, are learned and need logits of the teacher.")

# %% [markdown]
# So stop before the output layer, keep the rows that count, and multiply only those. For a vocabulary of 6,400 (MiniMind's) or 150,000 (Qwen's) the logits are the largest
# tensor of the step, and here there are two of them.

# %% id="distill-logits-at"
#| export
def logits_at(model: nn.Module, batch: dict, places: Tensor) -> Tensor:
    """Logits where `places` (B, T) is True: (N, V). The output layer skips all others."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    hidden = model.model(batch["input_ids"], mask, positions)  # (B, T, C)
    output = model.model.embed_tokens if model.lm_head is None else model.lm_head
    return F.linear(hidden[places], output.weight)

# %% [markdown]
# The same numbers as before, and less memory:

# %% id="distill-logits-at-check"
with torch.no_grad():
    kept = logits_at(teacher, batch, learned)
    every = teacher(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
saved = chapter.record("distill/logits_saved", 1 - kept.numel() / every.numel())
assert torch.allclose(kept, every[learned], atol=1e-4)
megabytes = lambda tensor: tensor.numel() * tensor.element_size() / 1e6
print(f"every place {megabytes(every):.1f} MB, learned ones {megabytes(kept):.1f} MB: "
      f"{saved:.0%} saved")

# %% [markdown]
# **Exercise 14.3 (15 min, ★★): `logits_at`** in [workbook 14](../exercises/14_distillation.ipynb). Multiply only the rows that count; the check notices an output layer that has seen others.
#
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
    """loss(student, batch) for `train`: (1 - alpha) * cross-entropy + alpha *
    soft_loss.

    Both terms are means (nats) over the places that have a label. The teacher is frozen
    here and runs without a graph; it is held by the loss and not by the student, so
    that no optimiser and no checkpoint ever sees it. Hinton, Vinyals and Dean 2015.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 1.0,
                 alpha: float = 0.9):
        if not 0 <= alpha <= 1 or temperature <= 0:
            raise ValueError(
                f"alpha={alpha}, temperature={temperature}: "
                f"give an alpha from 0 to 1 and a temperature above 0"
            )
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
        loss = (1 - self.alpha) * hard + self.alpha * soft
        return loss, {"cross_entropy": hard, "soft": soft}


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """ValueError for a student that cannot learn from this teacher."""
    if student is teacher:
        raise ValueError("student and teacher are the same model: give the student its "
                         "own")
    mine, theirs = student.config.vocab_size, teacher.config.vocab_size
    if mine != theirs:
        raise ValueError(
            f"the student has {mine} tokens, the teacher {theirs}: "
            f"build the student with the teacher's tokenizer and vocab_size"
        )
    if student.config.num_experts:
        raise ValueError(
            "the student has experts, and this loss has no balance term: use "
            "num_experts=0"
        )

# %% [markdown]
# Three checks. With $\alpha = 0$ it is the loss of chapter 11. With $\alpha = 1$ it is torch's `kl_div`. And no weight of the teacher gets a gradient.

# %% id="distill-loss-check"
student = new_student(0)
plain = DistillLoss(teacher, alpha=0.0)(student, batch)[0]
chat_loss = sft_loss(student, batch)[0]
soft = DistillLoss(teacher, temperature=2.0, alpha=1.0)(student, batch)[0]
with torch.no_grad():
    mine = student(batch["input_ids"], batch["attention_mask"],
                   batch["position_ids"])[learned]
    p, q = (kept / 2).softmax(-1), (mine / 2).log_softmax(-1)
    torchs = 2**2 * F.kl_div(q, p, reduction="batchmean")
print(f"alpha 0: {plain:.5f} and {chat_loss:.5f}; alpha 1: {soft:.5f} and {torchs:.5f}")
assert abs(plain - chat_loss) < 1e-4 and abs(soft - torchs) < 1e-4
soft.backward()
assert all(weight.grad is None for weight in teacher.parameters())
assert all(weight.grad is not None for weight in student.parameters())

# %% [markdown]
# **Exercise 14.4 (25 min, ★★★): `DistillLoss`** in [workbook 14](../exercises/14_distillation.ipynb). Write the loss of a training step, with a teacher that stays as it is.
#
# **Exercise 14.9 (25 min, ★★★): `top_k_divergence`** in [workbook 14](../exercises/14_distillation.ipynb). Keep only the best $k$ of the teacher's numbers, and measure how much of the divergence is left.
#
# ## 14.6 With a teacher, and without
#
# This is **white-box** distillation: we see the teacher's probabilities, not only its words. The students of 14.1 again, from the same first weights, on the same
# text in the same order, for the same number of steps. Only the loss is another one.
#
# The two runs of a seed are twins. They begin with the same weights, so a lucky start helps both, and they read the same text in the same order, so an easy stretch helps both.
#
# **Before you run this**: the student alone reached the bits per byte printed in 14.1. How much of the gap to the teacher will close: a tenth, a third, all?

# %% id="distill-train"
white_box = DistillLoss(teacher, size.temperature, size.alpha)
taught = [run(white_box, seed) for seed in size.seeds]
pairs = [(quality(a), quality(b)) for (_, a), (_, b) in zip(alone, taught)]
for seed, (a, b) in zip(size.seeds, pairs):
    print(f"seed {seed}: alone {a:.4f}, taught {b:.4f}, gain {a - b:+.4f}")

# %% [markdown]
# One gain for each seed. How sure is their mean? A gain is a difference within one seed, so the luck of a seed, good for both runs or bad for
# both, cancels. For $n$ gains with standard deviation $s$ the 95% interval of the mean is $\pm\, t\, s/\sqrt{n}$. With three seeds $t$ is 4.30, with four 3.18: few runs, wide interval
# (Gosset 1908, who signed as "Student").

# %% id="distill-interval"
from statistics import mean, stdev

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}

def interval(values):
    """Mean and half the width of its 95% interval."""
    return mean(values), T95[len(values)] * stdev(values) / len(values) ** 0.5

gains = [a - b for a, b in pairs]
gain, half = interval(gains)
gap = mean(a for a, _ in pairs) - teacher_quality
print(f"gain {gain:.4f} bits per byte, 95% interval {gain - half:.4f} to "
      f"{gain + half:.4f}")
print(f"that is {gain / gap:.0%} of the gap to the teacher")

# %% [markdown]
# Read the interval first, then the mean. If it reached below 0, all we could say is that these seeds gained. A few runs cannot make it narrow, but they can show on which side of 0 it lies.
# The share of the gap is small, and that is no surprise: these students are far from having read enough, and a teacher cannot read for them. It makes each step worth more.
#
# As a picture: each seed is one pair.

# %% id="distill-gain-figure"
def draw_runs(ax, runs, **look):
    for i, (_, history) in enumerate(runs):
        bits = [e["bits_per_byte"] for e in history.evals]
        ax.plot([e["step"] for e in history.evals], bits, ms=4, **look)
        look.pop("label", None)  # one entry in the legend is enough

fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), width_ratios=(3, 2))
draw_runs(left, alone, label="alone", color="C1", marker="s", ls="--")
draw_runs(left, taught, label="with a teacher", color="C0", marker="o", ls="-")
left.axhline(teacher_quality, color="0.4", ls=":")
left.text(0, teacher_quality, " teacher", va="bottom", fontsize=8)
left.set(xlabel="step", ylabel="held-out bits per byte", ylim=(0, None), xlim=(0, None))
left.legend()
for pair in pairs:
    right.plot([0, 1], pair, marker="o", color="0.3", ls="-")
right.set(xticks=[0, 1], xticklabels=["alone", "taught"], xlim=(-0.3, 1.3))
right.set_ylabel("at the end")
show(fig, "Left: bits per byte over the steps for each seed. Right: each line joins "
          "the two runs of one seed, and every line goes down.")
history = taught[0][1]
nats = [m["cross_entropy"] for m in history.metrics]
chapter.curve("distill", history.step, nats, x_label="step", y_label="nats per token")

# %% [markdown]
# The claim of this chapter, with its bands. The worst seed must gain too.

# %% id="distill-claim"
check("distill/gain_bits_per_byte", gain)
check("distill/worst_gain_bits_per_byte", min(gains))
chapter.record("distill/gain_half_interval", half)
for name, column in (("alone", 0), ("taught", 1)):
    chapter.record(f"distill/bits_per_byte_{name}",
                   mean(pair[column] for pair in pairs))

# %% [markdown]
# What does it cost? The teacher's forward pass, on each step. Time one step of each:

# %% id="distill-cost"
texts, student = pack_texts(0), new_student(0)

def one_step(loss):
    with torch.enable_grad(), cast():
        value = loss(student, texts[0])[0]
    value.backward()

without, with_teacher = (seconds_of(lambda: one_step(loss))
                         for loss in (pretrain_loss, white_box))
slower = chapter.record("distill/step_cost", with_teacher / without)
print(f"a step with a teacher takes {slower:.1f} times as long")

# %% [markdown]
# Check a time against a count (chapter 7). The teacher has three times the student's weights, so its forward pass costs about as much as the student's forward and backward
# together: about twice the work. If your number is far from 2, the machine was busy with something else.
#
# So the claim holds *at equal steps*, that is, at equal text. At equal time the student alone could take more steps, and whether it would win is yours
# to try. One way to lower the price: compute the teacher's logits once, keep the largest, and use them for many students (exercise 14.9).
#
# **Try it.** Give the student alone so many more steps that both runs take equally long. Who wins now?
#
# Now look at teacher and student side by side on one held-out text, token by token. The height of a bar is the surprise of chapter 3: $-\log_2$ of the probability that the model gave to the token that came.

# %% id="distill-side-by-side"
three = {"teacher": teacher, "taught": taught[0][0], "alone": alone[0][0]}
colours = {"teacher": "0.4", "taught": "C0", "alone": "C1"}
end = min(48, ids.shape[1] - 1)

@torch.no_grad()
def surprise(model):
    """Bits for each of the first tokens."""
    nats = F.cross_entropy(model(ids[:, :end])[0].float(), ids[0, 1 : end + 1],
                           reduction="none")
    return nats.cpu() / np.log(2)

fig, axes = plt.subplots(3, 1, figsize=(7, 2.9), sharex=True, sharey=True)
for ax, (name, model) in zip(axes, three.items()):
    ax.bar(range(end), surprise(model), color=colours[name])
    ax.set(ylabel=f"{name}\n(bits)")
axes[2].set_xticks(range(end))
axes[2].set_xticklabels(shown(ids[0, 1 : end + 1]), rotation=90, fontsize=6)
show(fig, "Surprise at each token of a held-out text, in bits: lower bars are better, "
          "and the tall ones stand where a new thing begins.")

# %% [markdown]
# Compare the columns. Where one word follows from the other, all three are sure. The teacher is ahead where a fact about a person is due: it knows the person, whom the students have hardly met.
# The two students are close, and their difference is spread over many small bars. And what do they write, greedily, after the same words?

# %% id="distill-continue"
from minimind.generate import generate

start = ids[:, :8]
for name, model in three.items():
    written = generate(model, start, 32)[0].tolist()
    print(f"{name:8}{tokenizer.decode(written, skip_special=True)!r}")

# %% [markdown]
# Now the two dials. For their digits, Hinton et al. used temperatures well above 1. **Before you run this**: will temperature 2 help here too? Think of the tail in 14.3.

# %% id="distill-recipes"
recipes = {"no teacher": pairs[0][0]}
recipes[f"temperature {size.temperature:g}, alpha {size.alpha:g}"] = pairs[0][1]
for tau, alpha in size.recipes:
    value = quality(run(DistillLoss(teacher, tau, alpha), size.seeds[0])[1])
    recipes[f"temperature {tau:g}, alpha {alpha:g}"] = value
    chapter.record(f"distill/gain_temperature_{tau:g}_alpha_{alpha:g}",
                   pairs[0][0] - value)

# %% [markdown]
# The results:

# %% id="distill-recipes-figure"
fig, ax = plt.subplots(figsize=(7, 0.4 * len(recipes) + 0.8))
bars_drawn = ax.barh(list(recipes), recipes.values(),
                     color=["0.7"] + ["C0"] * len(recipes))
ax.bar_label(bars_drawn, fmt=" {:.3f}", fontsize=8)
ax.set(xlabel="held-out bits per byte (one seed)",
       xlim=(0, max(recipes.values()) * 1.12))
ax.invert_yaxis()
show(fig, "One student, several recipes, one seed: shorter bars are better, and the "
          "grey one has no teacher.")

# %% [markdown]
# Did you expect the hot teacher to help? At temperature 2 the student spends its effort on the order of thousands of unlikely tokens, and is then judged at temperature 1, where they hardly count. Ten
# digits have no such tail. With a longer run and a larger student the answer may change, so measure, and do not copy a temperature from a paper on another kind of task.
#
# **Try it.** Try $\alpha$ of 0.5 and of 1. Is the label of any use beside this teacher? And beside a bad teacher, say one of 50 steps?
#
# ## 14.7 A teacher that only talks
#
# Often you see a model's answers and nothing else: it runs behind a service, or it has another tokenizer. Then train on what it *says*. This is **black-box** distillation, at the
# level of sequences (Kim and Rush 2016), and much chat data is made this way (for instance Taori et al. 2023, *Alpaca*).
#
# A teacher that only talks has one great advantage: you choose what to ask. The chat data of this world asks about half of its people. The teacher knows the others too (chapter 11), so ask it.

# %% id="distill-chat-teacher"
from minimind.sft import Replay, answers_right, ask, says

chat_folder = chapter.read("sft")
chat_teacher = MiniMind.from_pretrained(chat_folder).to(device).eval().requires_grad_(False)

def rows_of(name):
    """The lines of a file of the data folder; none where the data have no such file."""
    path = data / name
    return [json.loads(line)
            for line in path.open(encoding="utf-8")] if path.exists() else []

questions = rows_of("questions.jsonl")
five = chapter.five_questions(questions)
print(five)

# %% [markdown]
# What to ask: every fact in every phrasing of the world, except for the very sentences of the test. Your own data have no such list; there the users' first
# sentences are asked.

# %% id="distill-what-to-ask"
from minimind.world import ASKS

if questions:
    test = {q["question"] for q in questions}
    answer_to = {text.format(n=q["person"]): q["answer"]
                 for q in questions for text in ASKS[q["relation"]]}
    asked = [text for text in answer_to if text not in test][:: size.every_asked]
else:
    print("no list of questions in these data: the teacher is asked what their users "
          "ask")
    asked = [c[0]["content"] for c in conversations
             if c[0]["role"] == "user"][: size.asked]
print(f"{len(asked):,} questions to ask, such as {asked[0]!r}")

# %% [markdown]
# An answer that runs into the limit of tokens has no end, and a student would learn to ramble. Those are left out.

# %% id="distill-answers-of"
#| export
def answers_of(
    teacher: nn.Module, tokenizer, questions: Sequence[str], max_new_tokens: int = 48
) -> list[list[dict]]:
    """Ask the teacher, greedily; conversations of "role" and "content".

    Answers that are empty or not closed within max_new_tokens are left out.
    Kim and Rush 2016, arXiv:1606.07947.
    """
    asked = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)
               for chat in asked]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    stops = (tokenizer.im_end_id, tokenizer.eos_id)
    answers = generate_batch(teacher, [prompts[i] for i in order], max_new_tokens,
                             stops)
    closed = sorted((i, a) for i, a in zip(order, answers) if len(a) < max_new_tokens)
    said = [(i, tokenizer.decode(ids, skip_special=True).strip()) for i, ids in closed]
    return [[*asked[i], {"role": "assistant", "content": text}] for i, text in said
            if text]

# %% [markdown]
# The teacher writes the data:

# %% id="distill-told"
room = min(teacher.config.max_position_embeddings - size.answer_tokens, size.context)
# 16 for the template
short = [q for q in asked if len(tokenizer.encode(q)) < room - 16]
told = answers_of(chat_teacher, tokenizer, short, size.answer_tokens)
print(f"{len(told):,} of {len(asked):,} questions have a closed answer")
for user, assistant in told[-2:]:
    print(f"    {user['content'][:80]!r} -> {assistant['content'][:80]!r}")

# %% [markdown]
# A student repeats its teacher's mistakes, so count them before you train. Here every right answer is known:

# %% id="distill-teacher-right"
if questions and told:
    marks = [says(a["content"], answer_to[q["content"]]) for q, a in told]
    right = chapter.record("distill/teacher_right", mean(marks))
    print(f"the teacher's answers: {right:.1%} right")

# %% [markdown]
# Now two chat trainings from the same taught student, with the same replay of pretraining text (chapter 11) and the same number of steps. One has the chats of the data. The other has the
# teacher's answers as well, three times over among some chats of the data.

# %% id="distill-chat-train"
def chat_run(chats):
    """Chat training of a copy of the taught student."""
    model = new_student(0)
    model.load_state_dict(taught[0][0].state_dict())
    batches = Replay(pack_chats(chats), pack_texts(5), size.pretrain_share)
    train(model, batches, sft_loss, settings(size.chat_steps),
          max_steps=chapter.max_steps)
    return model.eval()

mixed = told * 3 + conversations[: size.mixed_conversations]
chatting = {"teacher": chat_teacher, "chats of the data": chat_run(conversations),
            "with the teacher's answers": chat_run(mixed)}

# %% [markdown]
# Their losses have different data and cannot be compared. So ask:

# %% id="distill-chat-answers"
for question in five:
    print(question)
    for name, model in chatting.items():
        print(f"    {name:27}{ask(model, tokenizer, question, max_new_tokens=24)!r}")

# %% [markdown]
# All questions of the test, about two kinds of people. Nothing that the first student read asks about the *unseen* ones. The second student heard questions about them from its teacher, in other words
# than the test's.

# %% id="distill-chat-score"
def chat_scores(model):
    """Shares right about seen and unseen people, and of facts completed, not asked for."""
    rows = answers_right(model, tokenizer, questions, max_new_tokens=24)[1]
    share = lambda seen: mean(row["right"] for row in rows if row["seen"] == seen)
    known = facts_known(model, tokenizer, rows_of("facts.jsonl"))[0]
    return {"seen people": share(True), "unseen people": share(False),
            "facts completed": known}

scores = {name: chat_scores(model)
          for name, model in chatting.items()} if questions else {}
for name, values in scores.items():
    print(f"{name:27}", "  ".join(f"{what} {value:.1%}"
                                  for what, value in values.items()))

# %% [markdown]
# As a picture:

# %% id="distill-chat-figure"
if scores:
    fig, ax = plt.subplots(figsize=(7, 2.5))
    looks = ({"color": "0.5"}, {"color": "C1", "hatch": "//"}, {"color": "C0"})
    for i, ((name, values), look) in enumerate(zip(scores.items(), looks)):
        drawn = ax.bar(np.arange(3) + 0.27 * (i - 1), values.values(), 0.25, label=name,
                       **look)
        ax.bar_label(drawn, fmt="{:.0%}", fontsize=8)
    ax.set(xticks=range(3), xticklabels=scores["teacher"], ylabel="share right",
           ylim=(0, 1.1))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
    show(fig, "Answers right: without the teacher's answers the student knows almost "
              "nothing of the unseen people; with them it does.")

# %% [markdown]
# Look at the middle. The student with the chats of the data answers about people it was asked about in training, and about the others it says something true of somebody else. It had
# no chance: the teacher learned these facts from many times as much text. The other student got the same facts as short, clean answers, in a few seconds of the teacher's time. Nothing in its loss is new; its
# *data* were ordered. It was not free either: at equal steps it saw the seen people less often, and there it may fall behind the first student (left). So the word *unseen* has lost its meaning for this student, and the honest name of the number is: questions about facts that it heard in other words.
#
# The last group tells how far that goes. Facts completed are asked for without a question, as in pretraining ("Garus lives in"). There the student is far behind its own answers: it learned to
# answer, not to know in every form (chapter 11 had the opposite case).

# %% id="distill-chat-claim"
if scores:
    _, plain, ordered = scores.values()
    check("distill/questions_seen", ordered["seen people"])
    check("distill/questions_unseen", ordered["unseen people"])
    chapter.record("distill/questions_unseen_without", plain["unseen people"])
    check("distill/questions_gain", ordered["unseen people"] - plain["unseen people"])
    chapter.record("distill/facts", ordered["facts completed"])
    chapter.record("distill/facts_without", plain["facts completed"])

# %% [markdown]
# **Exercise 14.5 (15 min, ★★): `answers_of`** in [workbook 14](../exercises/14_distillation.ipynb). Let a teacher write chat data: ask, leave out what was not closed, keep the order.
#
# **Try it.** Ask the teacher only two of the four phrasings. How does the student fare with a phrasing it never met?
#
# Keep the student, as a folder like all others, and its answers for the report.

# %% id="distill-save"
chat_student = chatting["with the teacher's answers"]
for question in five:
    answer = ask(chat_student, tokenizer, question, max_new_tokens=24)
    chapter.answer("distill", question, answer)
with chapter.write("distill") as out:
    chat_student.save_pretrained(out)
    tokenizer.save_pretrained(out)

# %% [markdown]
# ## 14.8 Size and speed against quality
#
# One more size, so that there is a line to see: a student of about a third of the first one, alone and taught. Then measure every model three ways: how well it predicts, how fast it reads (many tokens in one pass), and how
# fast it writes (one token at a time, with the cache of chapter 10).

# %% id="distill-small"
models = {"teacher": teacher, "student, alone": alone[0][0],
          "student, taught": taught[0][0]}
models["small, alone"] = run(pretrain_loss, size.seeds[0], "small")[0]
models["small, taught"] = run(white_box, size.seeds[0], "small")[0]

# %% [markdown]
# Measure all five:

# %% id="distill-size-table"
def writing_speed(model, new_tokens=48):
    """Tokens per second of greedy generation, one conversation."""
    return new_tokens / seconds_of(lambda: generate(model, start, new_tokens),
                                   repeats=2)

measures = (MiniMind.num_parameters, reading_speed, writing_speed, bits_per_byte_of)
table = {name: [measure(model) for measure in measures]
         for name, model in models.items()}
for kind in ("student", "small"):  # alone and taught differ in weights, not in speed
    table[f"{kind}, alone"][1:3] = table[f"{kind}, taught"][1:3]
print(f"{'':16}{'parameters':>11}{'reads/s':>10}{'writes/s':>10}{'bits/byte':>11}")
for name, (count, reads, writes, bits) in table.items():
    print(f"{name:16}{count:11,}{reads:10,.0f}{writes:10,.0f}{bits:11.3f}")

# %% [markdown]
# **Before you look**: the small student has a fraction of the teacher's weights. Does it write faster by the same factor?

# %% id="distill-size-figure"
looks = dict(zip(table, ("*", "s", "o", "s", "o")))
colours = dict(zip(table, ("0.3", "C1", "C0", "C1", "C0")))

def name_point(ax, name, x, y, shift):
    ax.annotate(name, (x, y), shift, textcoords="offset points", fontsize=8,
                ha="center")

def draw_column(ax, column, unit):
    cost = {name: row[column] / unit for name, row in table.items()}
    for name, row in table.items():
        ax.plot(cost[name], row[3], looks[name], ms=8, color=colours[name])
    for kind in ("student", "small"):
        x, bits = cost[f"{kind}, alone"], [table[f"{kind}, {how}"][3]
                                           for how in ("alone", "taught")]
        ax.plot([x, x], bits, color="0.6", ls="-", lw=1, zorder=0)
        name_point(ax, kind, x, bits[0], (0, 7))
    name_point(ax, "teacher", cost["teacher"], teacher_quality, (0, -14))
    ax.set(xlim=(0, 1.25 * max(cost.values())),
           ylim=(0, 1.15 * max(row[3] for row in table.values())))

# %% [markdown]
# One panel for each measure of cost:

# %% id="distill-size-panels"
fig, axes = plt.subplots(1, 3, figsize=(7, 2.8), sharey=True)
units = {"million parameters": 1e6, "1,000 tokens read a second": 1e3,
         "tokens written a second": 1}
for column, (ax, (label, unit)) in enumerate(zip(axes, units.items())):
    draw_column(ax, column, unit)
    ax.set_xlabel(label)
axes[0].set_ylabel("held-out bits per byte")
show(fig, "Size and speed against quality, lower is better: star teacher, squares "
          "alone, circles taught. The teacher moves a student down at no cost in size "
          "or speed.")

# %% id="distill-size-record"
columns = ("parameters", "reads_per_second", "writes_per_second", "bits_per_byte")
for name in ("teacher", "student, taught", "small, taught"):
    for column, value in zip(columns, table[name]):
        chapter.record(f"distill/{name.split(',')[0]}_{column}", value)
small_gain = table["small, alone"][3] - table["small, taught"][3]
chapter.record("distill/small_gain_bits_per_byte", small_gain)
print(f"the small student gains {small_gain:.3f} bits per byte (one seed)")

# %% [markdown]
# Three things to read. Down is better, and from square to circle a student moves straight down: a teacher costs time in training and nothing afterwards. Weights fall faster than seconds: a
# small model on one conversation spends its time on calling layers, not on multiplying, so its speed when writing follows the number of layers more than the number of weights. And the two students lie on a line
# that no teacher turns around: the taught small one stays behind the larger one.
#
# Which one to take is then a question about your machine: the largest that answers fast enough.
#
# ## 14.9 A teacher with experts
#
# Experts (chapter 6) make a model larger without making a token dearer, but all of them must lie in memory. A dense student of such a teacher fits where the teacher does not. That needs a
# teacher with experts. Training one from nothing takes as long as chapter 9, so we **upcycle** the dense one (Komatsuzaki et al. 2022): each expert starts as a copy of the
# feed-forward layer.

# %% id="distill-upcycle"
def upcycle(dense, experts=4):
    """The dense model with copies of each feed-forward layer, two for a token."""
    set_seed(0)
    width = dense.config.intermediate_size
    config = replace(dense.config, num_experts=experts, num_experts_per_tok=2,
                     norm_topk_prob=True, moe_intermediate_size=width)
    moe = MiniMind(config)
    moe.load_state_dict(dense.state_dict(), strict=False)  # all but experts and routers
    for new, old in zip(moe.model.layers, dense.model.layers):
        for expert in new.mlp.experts:
            expert.load_state_dict(old.mlp.state_dict())
    return moe.to(device)

# %% [markdown]
# **Before you run this**: the routers are random. How good is the new model before its first step?

# %% id="distill-upcycle-check"
has_experts = teacher.config.num_experts > 0  # your own model may be one already
moe = MiniMind.from_pretrained(folder).to(device) if has_experts else upcycle(teacher)
with torch.no_grad():
    moved = (moe(ids[:, :-1]) - teacher(ids[:, :-1])).abs().max()
larger = moe.num_parameters() / teacher.num_parameters()
print(f"logits move by at most {moved:.0e}; {larger:.1f} times the weights")
assert moved < 1e-2

# %% [markdown]
# As good as before, but for rounding: two equal experts with weights that add up to 1 are one. Some steps of training let them drift apart. Then it teaches a student with the first seed, as the dense teacher did.

# %% id="distill-moe-teach"
config = settings(size.moe_steps, learning_rate=size.learning_rate / 6, decay=0.8)
train(moe, pack_texts(9), pretrain_loss, config, max_steps=chapter.max_steps)
loss = DistillLoss(moe, size.temperature, size.alpha)
moe_student = quality(run(loss, size.seeds[0])[1])
results = {"dense": (teacher_quality, pairs[0][1])}
results["experts"] = (bits_per_byte_of(moe), moe_student)
for name, (its_own, of_student) in results.items():
    print(f"{name:8} teacher {its_own:.4f}, its student {of_student:.4f} bits per byte")
chapter.record("distill/moe_teacher_bits_per_byte", results["experts"][0])
chapter.record("distill/moe_over_dense_bits_per_byte", pairs[0][1] - moe_student)
moe_gain = check("distill/moe_gain_bits_per_byte", pairs[0][0] - moe_student)

# %% [markdown]
# Read the two lines. First the teachers: a few steps of training have not made the experts better than the dense model they came from. That model ended its own run with a small learning rate, and any new training first
# disturbs it. The paper trains on for about half of the cost of the dense run; we cannot afford that here. Then the students: to the student the teacher is a row of probabilities, whatever machine made them. So nothing in the loss had to
# change, and the two students end close together. One seed cannot tell them apart when they differ by less than the band, which is as wide as the interval of 14.6.

# %% id="distill-moe-figure"
fig, ax = plt.subplots(figsize=(7, 1.9))
ax.plot(pairs[0][0], 0, "o", color="C0", ms=8, label="student")
for y, (its_own, of_student) in enumerate(results.values(), 1):
    ax.plot([its_own, of_student], [y, y], color="0.7", ls="-", zorder=0)
    ax.plot(of_student, y, "o", color="C0", ms=8)
    ax.plot(its_own, y, "*", color="0.3", ms=11, label="teacher" if y == 1 else None)
ax.axvspan(pairs[0][1] - half, pairs[0][1] + half, color="0.9", zorder=-1)
ax.set(yticks=range(3), yticklabels=["no teacher", *results],
       xlabel="held-out bits per byte")
ax.set_ylim(-0.5, 2.5)
ax.invert_yaxis()
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
show(fig, "Students of two teachers, one seed; the band is the half interval of 14.6 "
          "around the student of the dense one.")

# %% [markdown]
# ## 14.10 Where it breaks
#
# Each of these mistakes trains without an error. For each there is a small test that shows it.
#
# **The divergence the wrong way round.** $\mathrm{KL}(p \,\|\, q)$ and $\mathrm{KL}(q \,\|\, p)$ are different numbers. The first punishes a student that gives nothing to what the teacher says; the second punishes one that says what the teacher does not.
# Let a student that can only make one hump fit a teacher with two:

# %% id="distill-two-humps"
axis = torch.arange(40.0)
hump = lambda middle, width: -0.5 * ((axis - middle) / width) ** 2  # logits of one hump
two = torch.logsumexp(torch.stack([hump(10, 2.5), hump(28, 2.5) - 0.5]), 0)

def fit(distance):
    """The middle and the width of the one hump with the smallest distance to the two."""
    middles, widths = np.arange(5, 35, 0.5), np.arange(1, 14, 0.5)
    return min((float(distance(two, hump(m, w))), m, w) for m in middles
               for w in widths)[1:]

ways = {"KL(teacher || student)": kl_divergence,
        "KL(student || teacher)": lambda p, q: kl_divergence(q, p)}
best = {name: fit(distance) for name, distance in ways.items()}
assert best["KL(teacher || student)"][1] > 2 * best["KL(student || teacher)"][1]

# %% [markdown]
# Both winners, drawn over the teacher:

# %% id="distill-two-humps-figure"
fig, axes = plt.subplots(1, 2, figsize=(7, 2.3), sharey=True)
for ax, (name, (middle, width)) in zip(axes, best.items()):
    ax.fill_between(axis, two.softmax(-1), color="0.8", label="teacher")
    ax.plot(axis, hump(middle, width).softmax(-1), label="best student")
    ax.set(title=name, xlabel="token", xticks=range(0, 41, 10))
axes[0].set_ylabel("probability")
axes[0].legend()
show(fig, "The same teacher, two distances: one way round the student covers both "
          "humps, the other way it picks one and ignores the other.")

# %% [markdown]
# Neither is wrong in itself. The reverse direction is used on purpose where a student should rather say one good thing than hedge (Gu et al. 2023, *MiniLLM*; Agarwal et al. 2023). It is a bug when you meant the other. With `F.kl_div` it happens easily, because its
# first argument is the student, and must be logarithms:

# %% id="distill-kl-div-traps"
p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
print(f"right:   {F.kl_div(q.log(), p, reduction='sum'):.4f}")
print(f"swapped: {F.kl_div(p.log(), q, reduction='sum'):.4f}")
print(f"no log:  {F.kl_div(q, p, reduction='sum'):.4f}")
six = torch.stack([p] * 6), torch.stack([q.log()] * 6)  # six places
print("'batchmean':", F.kl_div(six[1], six[0], reduction="batchmean").item())
print("'mean':     ", F.kl_div(six[1], six[0], reduction="none").mean().item())

# %% [markdown]
# The swapped value is close, which is what makes it hard to see. Without the logarithm it is negative, and no divergence is. And the reduction called `mean` divides by the size of the vocabulary too (here 3, in a model thousands): the teacher's
# voice becomes a whisper, and training goes on without a complaint. PyTorch's own documentation recommends `batchmean`.
#
# **Padding in the mean.** Take the mean over all places instead of those that are learned, and add more padding to the same chat:

# %% id="distill-padding"
tokens, labels = (torch.tensor([row]) for row in examples_of(conversations[:50])[0])

def padded(extra):
    """The chat with `extra` places of padding: KL over every place, and our loss."""
    batch = {"input_ids": F.pad(tokens[:, :-1], (0, extra)).to(device),
             "labels": F.pad(labels[:, 1:], (0, extra), value=-100).to(device)}
    with torch.no_grad():
        every = kl_divergence(teacher(batch["input_ids"]), student(batch["input_ids"]))
        return float(every.mean()), float(DistillLoss(teacher, alpha=1.0)(student, batch)[0])

student = new_student(0)
for extra in (0, 20, 60):
    every, ours = padded(extra)
    print(f"{extra:2} places of padding: over every place {every:.3f}, learned "
          f"{ours:.3f}")
assert abs(padded(0)[1] - padded(60)[1]) < 1e-3
if chapter.max_steps is None:  # two models of two steps hardly differ anywhere
    assert abs(padded(0)[0] - padded(60)[0]) > 1e-3

# %% [markdown]
# The right number does not care. The wrong one moves with the padding, and so does the gradient: the student spends its weights on what the teacher would say about nothing.
#
# **Exercise 14.7 (15 min, ★★): `distill_step`** in [workbook 14](../exercises/14_distillation.ipynb). A colleague's loss shrinks with padding and forgives a forgotten word. Find both bugs.
#
# **Exercise 14.8 (20 min, ★★★): `jsd`** in [workbook 14](../exercises/14_distillation.ipynb). Write the generalised Jensen-Shannon divergence (Agarwal et al. 2024), which goes from one direction of KL to the other.
#
# **Another tokenizer.** Token 17 must mean the same to both. A vocabulary of another size is caught by the loss:

# %% id="distill-other-vocabulary"
larger = replace(teacher.config, num_experts=0,
                 vocab_size=teacher.config.vocab_size + 8)
stranger = MiniMind(replace(larger, **size.student)).to(device)
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
    """ValueError that names the first token in which two tokenizers differ."""
    mine, theirs = student.token_bytes(), teacher.token_bytes()
    if mine == theirs and student.special_ids == teacher.special_ids:
        return
    shorter = min(len(mine), len(theirs))
    first = next((i for i in range(shorter) if mine[i] != theirs[i]), shorter)
    a, b = (repr(each[first]) if first < len(each) else "nothing"
            for each in (mine, theirs))
    raise ValueError(
        f"the tokenizers differ: token {first} is {a} for the student and {b} for the "
        "teacher. "
        f"Use the teacher's tokenizer, or train on its answers (answers_of), which are "
        "text"
    )

# %% id="distill-same-tokenizer-check"
# our two teachers
check_same_tokenizer(tokenizer, Tokenizer.from_pretrained(chat_folder))
other = Tokenizer.train(["another text makes other tokens, but not many"] * 4, 330)
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
# in training mode, with gradients
inside.teacher = MiniMind.from_pretrained(folder).to(device)
print(f"{before:,} parameters before, {inside.num_parameters():,} after")

# %% [markdown]
# Now the optimiser holds the teacher as well, and each checkpoint saves it. If the loss forgets `no_grad`, the teacher moves towards the student, which also makes the distance fall. See it in a few steps:

# %% id="distill-teacher-moves"
optimizer = torch.optim.AdamW(inside.parameters(), lr=size.learning_rate)
for step in range(chapter.steps(20)):
    batch = texts[step]
    every = torch.ones_like(batch["labels"], dtype=torch.bool)
    with cast():
        target = logits_at(inside.teacher, batch, every)  # no_grad was forgotten
        loss = soft_loss(target, logits_at(inside, batch, every), 1.0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
moved_quality = bits_per_byte_of(inside.teacher)
print(f"loss {loss:.2f}; teacher {teacher_quality:.3f}, then {moved_quality:.3f} bits "
      "per byte")
assert abs(bits_per_byte_of(teacher) - teacher_quality) < 1e-3  # ours is untouched
if chapter.max_steps is None:  # a teacher of two steps has nothing to lose
    assert moved_quality > teacher_quality or profile == "smoke"

# %% [markdown]
# The loss is almost gone and nothing was learned: the teacher gave in. Watch a number that the teacher cannot move: bits per byte on held-out text.
#
# ## Recap
#
# - A soft target gives a probability for every token; one of it says what many draws of a label would say in the mean.
# - The loss is cross-entropy plus $\tau^2$ times the divergence from teacher to student, over learned places only; the teacher has no gradient.
# - At equal steps the taught student beat the same student alone in every seed; at the price of a forward pass of the teacher.
# - A teacher that only talks is data that you can order: ask about what your data leave out, and count its mistakes first.
# - Direction, factor, padding, vocabulary: each mistake trains without a complaint. Judge by held-out text.
#
# **Words**: distillation, teacher, student, soft target, hard target, temperature, Kullback-Leibler divergence, white box, black box, sequence-level distillation, upcycling, forward and reverse KL.
#
# **Exercises:** 14.1 to 14.9, in place above, with checks in [workbook 14](../exercises/14_distillation.ipynb).
#
# **Sources**: Hinton, Vinyals and Dean 2015, arXiv:1503.02531 (soft targets, temperature). Bucilua, Caruana and Niculescu-Mizil 2006 (the idea). Kim and Rush 2016, arXiv:1606.07947 (sequence level). Sanh et al. 2019, *DistilBERT*, arXiv:1910.01108.
# Gu et al. 2023, *MiniLLM*, arXiv:2306.08543 (reverse KL). Agarwal et al. 2023, arXiv:2306.13649 (on-policy and generalised JSD, as in TRL). Komatsuzaki et al. 2022, arXiv:2212.05055 (upcycling). Gosset 1908, doi:10.2307/2331554 (the t distribution). Next: chapter 15 asks
# when a difference between two models is real.
