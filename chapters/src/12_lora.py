# %% [markdown]
# # 12. LoRA
#
# At the end of this chapter you will have taught the model of chapter 11 about ten new people, and changed no weight that it had. You will build adapters by hand,
# choose layers, rank and alpha by measurement, compare with training everything, draw which layers change most, fold the adapter into the weights, and
# exchange adapters with `peft`, the library that practitioners use.
#
# You need chapters 7 (the names of the layers), 8 (the loop) and 11 (chat rows, replay, `ask`). A matrix product is all the algebra.
#
# Reading 35 minutes; running: smoke 30 s, cpu 2 min.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# The whole idea in one picture. A big matrix stays as it is. Beside it stand two thin ones, and only they learn.

# %% id="lora-opening-picture"
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

def block(ax, x, y, w, h, text, face, hatch=""):
    ax.add_patch(Rectangle((x, y), w, h, fc=face, ec="black", hatch=hatch))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=9,
            bbox={"fc": face, "ec": "none", "pad": 1})

fig, ax = plt.subplots(figsize=(7, 2.3))
block(ax, 0, 0, 2, 2, "W\n\n160 × 448 weights\nfrozen", "0.88")
block(ax, 3.1, 0, 0.25, 2, "B", "#f3c9a5", "//")
block(ax, 3.6, 1.75, 2, 0.25, "A", "#f3c9a5", "//")
ax.text(2.55, 1, "+", ha="center", va="center", fontsize=18)
ax.text(4.65, 0.8, "2 × 448 and 160 × 2 weights\ntrained: under 2% of them",
        ha="center", va="center", fontsize=9)
ax.set(xlim=(-0.1, 5.8), ylim=(-0.1, 2.1))
ax.axis("off")
show(fig, "A frozen matrix W and beside it two thin matrices, B and A, whose product "
          "has the shape of W: LoRA trains only the thin ones.")

# %% [markdown]
# The parts that later chapters use go into the module `minimind.lora`.

# %% id="lora-default-exp"
#| default_exp lora

# %% id="lora-imports"
#| export
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minimind.model import check_weights, read_weights, replace_folder

# %% [markdown]
# ## 12.1 Ten people nobody told it about
#
# Chapter 11 ended with a model that answers questions about the people of its world, and left one open: what if there is one person more? Or a new product, a new colleague, a new tone of voice? Must all
# weights be trained again, and kept again, for every such wish? Load the chat model and its data.

# %% id="lora-load"
from itertools import islice

import numpy as np

from minimind.data import read_conversations, read_texts
from minimind.model import MiniMind
from minimind.sft import PackedConversations, Replay, answers_right, ask, chat_example, sft_loss
from minimind.tokenizer import Tokenizer

folder, data = chapter.read("sft"), chapter.read("data")
tokenizer = Tokenizer.from_pretrained(folder)

def chat_model():
    """A fresh copy of the model of chapter 11."""
    return MiniMind.from_pretrained(folder).to(chapter.device)

base = chat_model().eval()
weights = base.num_parameters()
print(f"{weights:,} weights")

# %% [markdown]
# The world has names that are only names: people who find hats in stories, with no town, no job, no pet. We let ten of them move in. Their facts come from the
# world's own generator with another seed, so no text that the model has read holds them. Names that it has never read at all are another matter, and 12.9 is about them.

# %% id="lora-newcomers"
from dataclasses import replace

from course import artifacts
from minimind.world import ASKS, SAYS, VALUES, bare, make_world

questions_file = data / "questions.jsonl"
yours = Path(chapter.data) / "sft"  # where --data names a folder with chats
of_the_world = questions_file.exists() and not yours.is_dir()
questions = [json.loads(line)
             for line in questions_file.open(encoding="utf-8")] if of_the_world else []
newcomers = []
if questions:
    sizes = artifacts.about(data)["world"]  # how the world of this model was made
    world = make_world(sizes["people"], sizes.get("seed", 1))
    # another world: other facts
    strangers = make_world(max(40, 4 * chapter.size.people), seed=world.seed + 1)
    # read in stories, without facts
    names = world.names[len(world.people) :][: chapter.size.people]
    newcomers = [replace(person, name=name)
                 for person, name in zip(strangers.people, names)]
    print(newcomers[0].name, newcomers[0].facts)
else:
    print("Your data have no people with facts: this chapter teaches rows of their "
          "sft/ folder.")

# %% [markdown]
# Trust, but look: no sentence that states one of these facts, in any of the world's six forms, may stand in what the model has read.

# %% id="lora-nothing-leaks"
told = {form.format(n=p.name, v=p.facts[r]) for p in newcomers for r in VALUES
        for form in SAYS[r]}
read = list(islice(read_texts(data / "pretrain" / "train.jsonl.gz"),
                   chapter.size.replay_documents))
assert not any(sentence in text for text in read for sentence in told)
print(f"{len(told)} sentences about newcomers, none of them in {len(read):,} documents")

# %% [markdown]
# Each fact can be asked in four ways. The first two go into the training rows; the last two are kept for the test. The model knows these ways from chapter 11, but
# never with these names.

# %% id="lora-rows"
def rows_about(people, ways=(0, 1)):
    """One conversation for each fact and way of asking."""
    return [[{"role": "user", "content": ASKS[r][way].format(n=p.name)},
             {"role": "assistant", "content": p.reply(r)}]
            for p in people for r in VALUES for way in ways]

def questions_about(people, ways=(2, 3)):
    """The same facts, asked in other ways."""
    return [{"person": p.name, "question": ASKS[r][way].format(n=p.name),
             "answer": bare(p.facts[r])}
            for p in people for r in VALUES for way in ways]

# %% [markdown]
# Your own data take another path to the same place: what is new are the files of their `sft/` folder whose names begin with `lora` (MiniMind's own
# data name them so), or else all of its chats. Every tenth row is kept for the test.

# %% id="lora-new-rows"
limit = chapter.size.conversations
def first_chats(source, count=limit):
    return [row["conversations"] for row in islice(read_conversations(source), count)]

chats = first_chats(data / "sft" / "train.jsonl.gz")
files = (sorted(yours.glob("lora*")) or [yours]) if yours.is_dir() else []
given = [row for file in files for row in first_chats(file)] or chats
new_rows, held_out = [row for i, row in enumerate(given) if i % 10], given[::10]
if questions:
    new_rows, held_out = rows_about(newcomers), questions_about(newcomers)
print(f"{len(new_rows)} new rows, {len(held_out)} for the test; for example:")
print(*new_rows[0], sep="\n")

# %% [markdown]
# Ask the base model about three of them.

# %% id="lora-ask-base"
three = held_out[:: max(1, len(held_out) // 3)][:3]
said_by = lambda row, role: next(m["content"] for m in row if m["role"] == role)
asked = {q["question"]: q["answer"] for q in three} if questions else {
    said_by(row, "user"): said_by(row, "assistant") for row in three}

def answer_three(model):
    for question, right in asked.items():
        reply = ask(model, tokenizer, question, max_new_tokens=24)
        print(f"{question}\n    {reply!r}; right: {right}")

answer_three(base)

# %% [markdown]
# Fluent, in the right form, and invented. Everything below is measured in the same three numbers: what is **learned** (questions about the newcomers), what is **kept** (a
# sample of the questions of chapter 11, about the old people), and bits per byte on held-out text. Your own data have no questions; there, the first two are losses.

# %% id="lora-rows-to-batches"
context, device = chapter.size.context, chapter.device

def packed(rows):
    """Packed batches of conversations, as in chapter 11."""
    examples = [chat_example(tokenizer, row, max_length=context + 1) for row in rows]
    usable = [(ids, labels) for ids, labels in examples
              if any(label != -100 for label in labels)]
    return PackedConversations(usable, context, chapter.size.batch_size, device=device)

@torch.no_grad()
def loss_on(model, rows, batches=4):
    """Mean loss over the first batches of some rows (nats per learned token)."""
    some = packed(rows)
    return np.mean([sft_loss(model, some[i])[0].item()
                    for i in range(min(batches, len(some)))])

# %% [markdown]
# The three measures, each a function of a model. What is asked about the newcomers is always the held-back ways of asking, which stand in no training row.

# %% id="lora-measure"
from minimind.metrics import evaluate_bits_per_byte, token_byte_lengths
from minimind.pretrain import PackedTokens

def token_stream(texts):
    ids = tokenizer.encode_batch(texts)
    return np.concatenate([np.array([*document, tokenizer.eos_id]) for document in ids])

valid_texts = islice(read_texts(data / "pretrain" / "valid.jsonl.gz"),
                     chapter.size.valid_documents)
valid_tokens = torch.tensor(token_stream(list(valid_texts))).to(device)
byte_lengths = token_byte_lengths(tokenizer).to(device)
old_rows = first_chats(data / "sft" / "valid.jsonl.gz", 200)
old_sample = questions[:: chapter.size.every_question]
unit = "share of answers right" if questions else "loss (nats per token)"

def share_right(model, some):
    return answers_right(model.eval(), tokenizer, some, max_new_tokens=24)[0]

def learned(model):
    """On the newcomers: share of questions right, or loss on the held-out rows."""
    return share_right(model, held_out) if questions else loss_on(model.eval(), held_out)

def kept(model):
    """On what it knew: share of the old questions right, or loss on old chats."""
    return share_right(model, old_sample) if questions else loss_on(model.eval(), old_rows)

def measure(model):
    bits = evaluate_bits_per_byte(model.eval(), valid_tokens, byte_lengths, context,
                                  amp=chapter.amp)
    return {"learned": learned(model), "kept": kept(model), "bits": bits}

# %% [markdown]
# The model of chapter 11, before anything:

# %% id="lora-before"
rounded = lambda score: {name: round(float(value), 3) for name, value in score.items()}
scores = {"before": measure(base)}
print(rounded(scores["before"]))

# %% [markdown]
# ## 12.2 Change everything, and look at the change
#
# What you know already is to go on training, all weights, with the new rows: **full fine-tuning**. We do it first, because its result tells why LoRA works. Chapter 11
# showed that training on one thing forgets others, so both runs of this chapter get the same **replay**: a share of the steps on old chats, and a share on old text.

# Replay from chats protects those whom the chats ask about, and that is only half of the people. For half of the others we let the model write its own rows: ask it, and keep what it answers
# (*self-replay*; Robins 1995 called it pseudorehearsal). The last quarter is never rehearsed. It shows what replay does not reach.

# %% id="lora-self-replay"
from minimind.sft import ask_all

size = chapter.size
unasked = [p for p in world.people if not p.asked] if questions else []
rehearsed, never = unasked[::2], unasked[1::2]
own = [ASKS[r][way].format(n=p.name) for p in rehearsed for r in VALUES
       for way in (0, 1)]
answers = ask_all(base, tokenizer, own, max_new_tokens=24) if own else []
own_rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}]
            for q, a in zip(own, answers)]
if own:
    print(f"{len(own_rows)} rows of its own, such as {own[0]} {answers[0]}")
else:
    print("no people to ask about: replay from your chats only")

# %% [markdown]
# Nested, the two kinds of replay give three streams: new rows, old chats, old text.

# %% id="lora-replay"
new_batches, chat_batches = packed(new_rows), packed(chats + 2 * own_rows)
text_batches = PackedTokens(token_stream(read), context, size.batch_size, device=device)
with_chats = Replay(new_batches, chat_batches, size.chat_share / (1 - size.text_share))
batches = Replay(with_chats, text_batches, size.text_share)
new_share = 1 - size.chat_share - size.text_share
print(f"steps: new {new_share:.0%}, chats {size.chat_share:.0%}, text "
      f"{size.text_share:.0%}")

# %% [markdown]
# All runs of this chapter go through one function, so that they differ only in what is named. Here all weights train, at a third of the learning rate of chapter 11: the model is good, and
# the task is small. (At 1e-3, it lost 8% of the old answers in a trial, at 3e-4 1%.)

# %% id="lora-full-run"
from minimind.train import TrainConfig, train

def fit(model, learning_rate, steps=size.steps, batches=batches, points=6):
    """Train in place, all runs alike; the loss is logged `points` times."""
    config = TrainConfig(steps=steps, learning_rate=learning_rate,
                         log_every=max(1, steps // points),
                         precision=chapter.settings.precision)
    return train(model, batches, sft_loss, config, max_steps=chapter.max_steps)

full = chat_model()
full_history = fit(full, size.full_learning_rate)
scores["full"] = measure(full)
print(rounded(scores["full"]), f"{full_history.seconds[-1]:.0f} s")

# %% [markdown]
# It learned them. Now the question of this chapter: how big is the change, really? Subtract. For every weight matrix there is a $\Delta W = W_\text{after} - W_\text{before}$ of the same shape. To
# say how much is in it, we need its rank.
#
# A matrix of **rank 1** is a column times a row: six numbers here, made from five. One of rank 2 is the sum of two such.

# %% id="lora-rank-by-hand"
column, row = torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([[3.0, -1.0]])  # (3, 1) and (1, 2)
print(column @ row)
assert torch.linalg.matrix_rank(column @ row) == 1

# %% [markdown]
# Any matrix is a sum of rank-1 pieces, the largest first: the **singular value decomposition** $\Delta W = \sum_i \sigma_i u_i v_i^\top$. The numbers $\sigma_i$ say how large each piece is.
# Keep the first $r$ pieces, and you have the best matrix of rank $r$ there is (Eckart and Young 1936).

# %% id="lora-low-rank"
def low_rank(matrix, r):
    """The best approximation of rank r: the first r singular pieces."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vt[:r]

assert torch.allclose(low_rank(column @ row, 1), column @ row, atol=1e-6)

# %% [markdown]
# **Before you run this**: ten people and five facts each, in a matrix that could hold rank 160. Will the change have one large piece, a few, or a hundred?

# %% id="lora-changes"
before, after = base.state_dict(), full.state_dict()
changes = {name: (after[name] - before[name]).cpu()
           for name in before if name.endswith("_proj.weight")}
last = max(int(name.split(".")[2]) for name in changes)
parts = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
looked_at = [f"model.layers.{last}.{part}.weight" for part in parts]
spectra = {part: torch.linalg.svdvals(changes[name])
           for part, name in zip(parts, looked_at)}

fig, ax = plt.subplots(figsize=(7, 2.8))
for (name, s), marker in zip(spectra.items(), "os^"):
    ax.plot(range(1, len(s) + 1), s / s[0], marker=marker, markevery=12, label=name)
noise = torch.linalg.svdvals(torch.randn(160, 448,
                                         generator=torch.Generator().manual_seed(0)))
ax.plot(range(1, 161), noise / noise[0], color="0.6",
        label="a random matrix, 160 × 448")
ax.set(xlabel="piece", ylabel="size (first piece = 1)")
ax.legend()
show(fig, f"Sizes of the pieces of three changes in layer {last}: a few are large and "
          "the rest is small; in a random matrix nearly all are large.")

# %% [markdown]
# A few pieces stand out, and a long tail follows, small but many. Does the tail matter? Put back a change that is cut to rank $r$ in every matrix, and ask.

# %% id="lora-cut-the-change"
def with_change(r):
    """The base model plus the change of its matrices, each cut to rank r."""
    model = chat_model()
    weights_now = model.state_dict()  # shares memory with the model
    for name, change in changes.items():
        weights_now[name] += low_rank(change, r).to(device)
    return model

ranks = (1, 2, 4, 8, 16, 160)
cut = {r: with_change(r) for r in ranks}
cut_scores = {r: (learned(model), kept(model)) for r, model in cut.items()}
print({r: tuple(round(x, 2) for x in pair) for r, pair in cut_scores.items()})

# %% [markdown]
# As a picture. The two lines are the two questions: when do the newcomers come in, and what does the cut do to everybody else?

# %% id="lora-cut-figure"
fig, ax = plt.subplots(figsize=(7, 2.6))
for i, (name, marker) in enumerate((("learned: newcomers", "o"),
                                    ("kept: old questions", "s"))):
    ax.plot(ranks, [pair[i] for pair in cut_scores.values()], marker=marker, label=name)
ax.set(xscale="log", xlabel="rank kept of every change", ylabel=unit, xticks=ranks,
       xticklabels=ranks)
ax.minorticks_off()
ax.legend()
show(fig, "The change of full fine-tuning, cut to rank r: some ten of 160 pieces "
          "carry nearly all that was learned.")

# %% [markdown]
# That is the finding behind LoRA (Aghajanyan et al. 2020; Hu et al. 2021): the change that a small task needs has a low rank, even when training was free to use all of it. The tail holds
# most of the squares and hardly any of the facts. Move the slider to see one change and its pieces.

# %% id="lora-widget" tags=["widget"]
def explore(rank=2, matrix=looked_at[-1]):
    change = changes[matrix]
    approximation = low_rank(change, rank)
    left = (change - approximation).square().sum() / change.square().sum()
    fig, axes = plt.subplots(1, 3, figsize=(7, 1.7))
    pictures = {"the change": change, f"rank {rank}": approximation,
                "what is missing": change - approximation}
    for ax, (title, picture) in zip(axes, pictures.items()):
        ax.imshow(picture[:24, :40], cmap="PuOr", vmin=-3 * change.std(),
                  vmax=3 * change.std())
        ax.set(title=title, xticks=[], yticks=[])
    show(fig, "The first 24 rows and 40 columns of a change and its best copy of "
              f"rank {rank}: {left:.0%} of its squares are missing.")

try:
    from ipywidgets import IntSlider, interact
    interact(explore, rank=IntSlider(value=2, min=1, max=64, continuous_update=False),
             matrix=looked_at)
except ImportError:
    print("pip install ipywidgets shows a slider here")

# %% [markdown]
# The same picture without a kernel, for rank 4:

# %% id="lora-explore-static"
explore(4)

# %% [markdown]
# Keep one number in mind for later: what a change cut to rank 2 still knows. It was trained with all ranks and cut afterwards. Will a change that is *trained* at rank 2 do better?
#
# **Try it.** How much of the squares does rank 8 hold in each of the 28 changes? Which matrix needs the most pieces?
#
# ## 12.3 Two thin matrices
#
# If the change will have a low rank anyway, train it in that form. Freeze $W$ and learn $\Delta W = \frac{\alpha}{r} B A$, with $A$ of $r$ rows and $B$ of $r$ columns:
#
# $$y = W x + \frac{\alpha}{r} B (A x)$$
#
# By hand with rank 1: two inputs, three outputs, $\alpha = 1$.

# %% id="lora-forward-by-hand"
W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # (3, 2), frozen
A, B = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [0.0], [1.0]])  # (1, 2) and (3, 1)
x = torch.tensor([3.0, 1.0])
print("A x =", A @ x, " B A x =", B @ (A @ x), " y =", W @ x + B @ (A @ x))
assert torch.equal(W @ x + B @ (A @ x), (W + B @ A) @ x)

# %% [markdown]
# $A x$ first, then $B$: the product $BA$ is never made. Each token costs $r$ (in + out) multiplications more, and the memory of the change is $r$ (in + out) instead of in × out.
#
# How do $A$ and $B$ begin? The model should start as it was, so $BA$ must be 0. Zeros in both would never move (12.9 shows it). So $A$ is random and $B$ is zero. The
# random part is PEFT's: uniform between $\pm 1/\sqrt{\text{in}}$.

# %% id="lora-linear"
#| export
class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained change of low rank; (..., in) -> (..., out).

    y = W x + alpha / r * B A x.
    A (r, in) starts random, B (out, r) at zero, so the layer starts as it was. Hu et
    al. 2021, arXiv:2106.09685.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank}: an adapter has at least rank 1")
        like = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.base_layer, self.scale = base_layer, alpha / rank
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, **like)
        # uniform within 1 / sqrt(in)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))

    def change(self) -> Tensor:
        """What the adapter adds to the weight, (out, in)."""
        return self.scale * self.lora_B.weight @ self.lora_A.weight

# %% [markdown]
# The same numbers through the class:

# %% id="lora-linear-agrees"
layer = nn.Linear(2, 3, bias=False)
adapted = LoRALinear(layer, rank=1, alpha=1.0)
with torch.no_grad():
    layer.weight.copy_(W)
    assert torch.equal(adapted(x), W @ x)  # B is zero: nothing has changed yet
    adapted.lora_A.weight.copy_(A)
    adapted.lora_B.weight.copy_(B)
    assert torch.equal(adapted(x), (W + B @ A) @ x)

# %% [markdown]
# What do the thin matrices learn from? With $g = \partial L / \partial y$, the chain rule gives
#
# $$\frac{\partial L}{\partial B} = \tfrac{\alpha}{r}\, g\, (A x)^\top \qquad \frac{\partial L}{\partial A} = \tfrac{\alpha}{r}\, B^\top g\, x^\top$$
#
# **Before you run this**: at the start $B$ is zero. Which of the two gets no gradient in the first step?

# %% id="lora-gradients"
torch.manual_seed(0)
adapted = LoRALinear(layer.requires_grad_(False), rank=1, alpha=1.0)
adapted(x).square().sum().backward()
g = 2 * W @ x  # the gradient of the sum of squares
assert torch.allclose(adapted.lora_B.weight.grad,
                      g[:, None] @ (adapted.lora_A.weight @ x)[None])
print("gradient of A:", adapted.lora_A.weight.grad.tolist(), " of B:",
      adapted.lora_B.weight.grad.tolist())
assert adapted.lora_A.weight.grad.abs().max() == 0 < adapted.lora_B.weight.grad.abs().max()

# %% [markdown]
# $B$ moves first, and from then on $A$ moves too. The frozen $W$ gets no gradient at all: no memory for it, and none for the two averages that AdamW keeps of each trained weight.
#
# **Exercise 12.1 (15 min, ★★): `LoRALinear`** in [workbook 12](../exercises/12_lora.ipynb). Write the layer without looking; the check compares it and its gradients with one matrix that was changed.
#
# **Try it.** Start with B random and A zero instead. It also begins as the base model. Does it train as well?
#
# ## 12.4 Which layers
#
# An adapter is for linear layers, and they have names. These are Hugging Face's, so a list of **targets** means the same here and there.

# %% id="lora-find-targets"
#| export
def linear_names(model: nn.Module) -> list[str]:
    """The full names of all linear layers, such as model.layers.0.self_attn.q_proj."""
    return [name for name, module in model.named_modules()
            if isinstance(module, nn.Linear)]


def find_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Full names of the linear layers whose names are, or end in, one of `targets`.

    ValueError when a target fits no layer; it lists the names there are.
    """
    names = linear_names(model)
    fits = {target: [name for name in names if f".{name}".endswith(f".{target}")]
            for target in targets}
    unknown = [target for target, found in fits.items() if not found]
    if unknown or not fits:
        what = f"no linear layer is called {', '.join(map(repr, unknown))}"
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ValueError(f"{what if unknown else 'no targets are given'}; the layers "
                         f"are {known}")
    return [name for name in names if any(name in found for found in fits.values())]

# %% [markdown]
# A misspelled target must stop you. If it were skipped, training would run, with fewer adapters than you think or with none, and only the result would tell.

# %% id="lora-misspelled"
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
print(find_targets(base, ["q_proj", "layers.0.mlp.up_proj"]))
try:
    find_targets(base, ["q_proj", "query_proj"])
except ValueError as error:
    print(error)
else:
    raise AssertionError("a misspelled target must be refused")

# %% [markdown]
# **Exercise 12.2 (15 min, ★★): `find_targets`** in [workbook 12](../exercises/12_lora.ipynb). Which layers fit a name, and which names fit nothing?
#
# Three settings make an adapter: the rank, alpha, and the targets. They have PEFT's names, so that they can be written to its file as they are.

# %% id="lora-config"
#| export
@dataclass
class LoRAConfig:
    """Rank, alpha (the scale is alpha / r) and targets, by the names that PEFT uses."""

    r: int
    lora_alpha: float
    target_modules: list[str]

# %% [markdown]
# Two helpers: put a module in the place of another, and list the adapters of a model. To list none is an error, because everything that asks for the list, such as a merge, is a mistake on a model
# that has none.

# %% id="lora-adapters"
#| export
def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module with this full name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by full name; ValueError when there are none."""
    found = {name: module for name, module in model.named_modules()
             if isinstance(module, LoRALinear)}
    if not found:
        raise ValueError("this model has no adapters: they were never added, or are "
                         "merged or removed already")
    return found

# %% [markdown]
# Check first, then freeze, then replace: a model that is refused stays as it was. The embedding and the norms are frozen too; what that costs is seen in 12.9.

# %% id="lora-add"
#| export
def add_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Freeze a model and put an adapter on every target layer, in place."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("this model has adapters already: merge or remove them first")
    names = find_targets(model, config.target_modules)
    model.requires_grad_(False)
    for name in names:
        replace_module(model, name, LoRALinear(model.get_submodule(name), config.r,
                                               config.lora_alpha))
    model.lora_config = config
    return model

# %% [markdown]
# With rank 2 on the feed-forward layers, count the weights that will learn. By hand: each of the three matrices has 160 + 448 = 608 in and out, times rank 2, times 3, times 4 layers.

# %% id="lora-count"
#| export
def trained_parameters(model: nn.Module) -> int:
    """How many weights an optimiser would change."""
    return sum(parameter.numel() for parameter in model.parameters()
               if parameter.requires_grad)

# %% [markdown]
# The count by hand against the count by machine:

# %% id="lora-count-by-hand"
def lora_model(r=size.rank, alpha=size.alpha, targets=FEED_FORWARD, seed=0):
    """The chat model with fresh adapters."""
    torch.manual_seed(seed)
    return add_lora(chat_model(), LoRAConfig(r, alpha, targets))

model = lora_model()
inner, outer = base.config.hidden_size, base.config.intermediate_size
layers = base.config.num_hidden_layers
by_hand = size.rank * (inner + outer) * 3 * layers
print(f"{by_hand:,} of {weights:,} weights: {by_hand / weights:.2%}")
assert trained_parameters(model) == by_hand or base.config.num_experts

# %% [markdown]
# And the model still says exactly what it said:

# %% id="lora-starts-as-it-was"
batch = chat_batches[0]
def logits_of(model):
    with torch.no_grad():
        return model.eval()(batch["input_ids"], batch["attention_mask"],
                            batch["position_ids"])  # (B, T, V)

assert torch.equal(logits_of(model), logits_of(base))

# %% [markdown]
# **Exercise 12.3 (15 min, ★★): `add_lora`** in [workbook 12](../exercises/12_lora.ipynb). Find, freeze, replace: the order decides what trains.
#
# What does freezing save? The weights themselves must be there either way. A gradient and two averages for each *trained* weight need not be (chapter 7).

# %% id="lora-memory-figure"
trained = {"full": weights, "LoRA": trained_parameters(model)}
looks = {"weights": {"color": "0.75"}, "gradients": {"color": "C1", "hatch": "//"},
         "AdamW": {"color": "C0", "hatch": ".."}}
fig, ax = plt.subplots(figsize=(7, 1.9))
for y, (name, count) in enumerate(trained.items()):
    left = 0
    held = weights + (count if name == "LoRA" else 0)
    for numbers, (part, look) in zip((held, count, 2 * count), looks.items()):
        ax.barh(y, 4 * numbers / 1e6, left=left, ec="white", label=None if y else part,
                **look)
        left += 4 * numbers / 1e6
ax.set(yticks=[0, 1], yticklabels=list(trained),
       xlabel="memory without activations (MB)")
ax.legend(loc="upper right")
show(fig, "Memory of a training step without activations: LoRA keeps gradients and "
          "AdamW's averages only for the thin matrices.")

# %% [markdown]
# **Exercise 12.6 (10 min, ★★): `seven_billion`** in [workbook 12](../exercises/12_lora.ipynb). On paper: how many weights, and how many gigabytes of gradients and averages, does rank 16 need in a model of seven billion?
#
# ## 12.5 Teach the village
#
# The same loop, rows, replay and steps as in 12.2. Only the learning rate is higher: the thin matrices start at zero and have a longer way to go, ten times that of
# full fine-tuning is the common advice.

# %% id="lora-run"
village = lora_model()
history = fit(village, size.learning_rate)
scores["LoRA"] = measure(village)
print(rounded(scores["LoRA"]), f"{history.seconds[-1]:.0f} s")
answer_three(village)

# %% [markdown]
# In 12.2 a change was trained at full rank and cut afterwards. Compare, at the same rank:

# %% id="lora-cut-or-trained"
was_cut, was_trained = cut_scores[size.rank][0], scores["LoRA"]["learned"]
print(f"rank {size.rank}: cut afterwards {was_cut:.2f}, trained at it "
      f"{was_trained:.2f} ({unit})")
if questions and chapter.max_steps is None and profile == "cpu":
    assert scores["LoRA"]["learned"] > cut_scores[size.rank][0] + 0.3

# %% [markdown]
# Training that may use only two pieces puts into these two what it needs. That a change *can* be cut is a hint that a low rank may do; how low, only training tells.
#
# Both losses over the run:

# %% id="lora-curves-figure"
fig, ax = plt.subplots(figsize=(7, 2.6))
for name, line, marker in (("all weights", full_history, "o"),
                           (f"LoRA, rank {size.rank}", history, "s")):
    ax.plot(line.step, line.loss, marker=marker, markersize=3, label=name)
ax.set(xlabel="step", ylabel="loss (nats per learned token)", ylim=(0, None))
ax.legend()
show(fig, "Loss of full fine-tuning and of LoRA on the same batches, replay included: "
          "LoRA starts more slowly and arrives at about the same place.")
chapter.curve("lora", history.step, history.loss, x_label="step",
              y_label="nats per learned token")

# %% [markdown]
# Does replay do all the work? The same two, on nothing but the new rows, for fewer steps, since every step is now a new one.
#
# **Before you run this**: which of the two will forget more?

# %% id="lora-no-replay"
alone_steps = max(1, round(size.steps * new_share))
both = (("full", chat_model(), size.full_learning_rate),
        ("LoRA", lora_model(), size.learning_rate))
for name, model, rate in both:
    fit(model, rate, alone_steps, new_batches)
    scores[f"{name}, no replay"] = measure(model)

# %% [markdown]
# All five models side by side. *Bits per byte* is the text measure of chapter 11: lower is better.

# %% id="lora-scores-figure"
def draw_scores(ax, part, label):
    y = np.arange(len(scores))
    values = [score[part] for score in scores.values()]
    bars = ax.barh(y, values, color=["0.6", "C1", "C0", "C1", "C0"], hatch="")
    for bar, name in zip(bars, scores):
        bar.set_hatch("//" if "full" in name else "")
    ax.bar_label(bars, fmt=" %.2f", fontsize=8)
    ax.set(yticks=y, yticklabels=list(scores), title=label,
           xlim=(0, 1.25 * max(values) or 1))
    ax.invert_yaxis()

fig, axes = plt.subplots(1, 3, figsize=(7, 2.4), sharey=True)
labels = {"learned": "learned (newcomers)", "kept": "kept (old people)",
          "bits": "bits per byte"}
for ax, (part, label) in zip(axes, labels.items()):
    draw_scores(ax, part, label)
show(fig, "What was learned and what was kept, with replay and without. The first "
          f"two panels are in {unit}.")

# %% [markdown]
# Read it in two steps. Without replay both forget, and full fine-tuning forgets more; LoRA has learned a little less. Biderman et al. (2024) found the same pattern in large models and made it their title:
# *LoRA learns less and forgets less*. With the same replay the two come close to each other, and both keep nearly everything. So replay protects more than the thin matrices do. What LoRA
# brings beside it is a change that is small to store, needs little memory to train, and can be taken off again. The time of a step hardly differs here: a small model
# gains little from the gradients that are left out, and pays for the extra products.
#
# Who was forgotten? The old people in three groups, from all questions:

# %% id="lora-who-was-forgotten"
def by_group(model):
    """Share right: asked about in chats, rehearsed by itself, never rehearsed."""
    rows = answers_right(model.eval(), tokenizer, questions, max_new_tokens=24)[1]
    of = {p.name: "own rows" for p in rehearsed} | {p.name: "never" for p in never}
    groups = {"chats": [], "own rows": [], "never": []}
    for row in rows:
        groups[of.get(row["person"], "chats")].append(row["right"])
    groups["all"] = [row["right"] for row in rows]
    return {name: sum(right) / len(right) for name, right in groups.items()}

three_models = {"before": base, "full": full, "LoRA": village} if questions else {}
kept_by = {name: by_group(model) for name, model in three_models.items()}
for name, groups in kept_by.items():
    print(f"{name:7}", "  ".join(f"{group} {share:.1%}"
                                 for group, share in groups.items()))

# %% [markdown]
# The same as bars:

# %% id="lora-forgotten-figure"
if kept_by:
    fig, ax = plt.subplots(figsize=(7, 2.3))
    looks = ({"color": "0.7"}, {"color": "C1", "hatch": "//"}, {"color": "C0"})
    for shift, (name, groups), look in zip((-0.27, 0, 0.27), kept_by.items(), looks):
        bars = ax.bar(np.arange(4) + shift, list(groups.values()), 0.26, label=name,
                      **look)
        ax.bar_label(bars, fmt="{:.0%}", fontsize=7)
    ax.set(xticks=range(4), xticklabels=["asked in chats", "own rows",
                                         "never rehearsed", "all"],
           ylabel="share right", ylim=(0, 1.15))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    show(fig, "Old questions after teaching the newcomers: whoever is rehearsed is "
              "kept; the losses are among those who are not.")

# %% [markdown]
# **Exercise 12.7 (10 min, ★★): `train_adapters`** in [workbook 12](../exercises/12_lora.ipynb). A colleague's loop learns nothing, and would return what it did not train: find both bugs.
#
# ## 12.6 Rank, targets, alpha
#
# Which layers, and how much rank? A grid of short runs. It is stopped early on purpose: given time, most of them arrive, and a difference shows only on the way.

# %% id="lora-grid"
BOTH = ATTENTION + FEED_FORWARD
test_rows = rows_about(newcomers, ways=(2, 3)) if questions else held_out
places = {"attention": (ATTENTION, (1, 4)), "feed-forward": (FEED_FORWARD, (1, 2, 4)),
          "both": (BOTH, (1, 2))}
grid = [(where, targets, r) for where, (targets, ranks) in places.items()
        for r in ranks]
table = []
for where, targets, r in grid:
    model = lora_model(r, targets=targets)
    share = trained_parameters(model) / weights
    fit(model, size.learning_rate, size.grid_steps)
    row = {"learned": learned(model), "loss": loss_on(model.eval(), test_rows),
           "kept": kept(model)}
    table.append({"where": where, "r": r, "share": share, "model": model} | row)

# %% [markdown]
# The table; *loss* is that on the answers of the test, a finer number than the share of them that is right:

# %% id="lora-grid-table"
print(f"{'targets':13} rank  weights  learned   loss   kept")
for row in table:
    numbers = f"{row['share']:8.2%} {row['learned']:8.2f} {row['loss']:6.3f} {row['kept']:6.2f}"
    print(f"{row['where']:13} {row['r']:4} {numbers}")
of = {(row["where"], row["r"]): row["learned"] for row in table}
if questions:
    check("lora/place_gain", of["feed-forward", 2] - of["attention", 4])

# %% [markdown]
# And drawn, against the share of weights that were trained:

# %% id="lora-grid-figure"
fig, axes = plt.subplots(1, 2, figsize=(7, 2.6))
for where, marker in (("attention", "^"), ("feed-forward", "o"), ("both", "s")):
    rows = [row for row in table if row["where"] == where]
    for ax, part in zip(axes, ("learned", "kept")):
        shares = [100 * row["share"] for row in rows]
        ax.plot(shares, [row[part] for row in rows], marker=marker, label=where)
        ax.set(xlabel="weights trained (%)", title=part,
               ylim=(0, 1.05) if questions else None)
axes[0].set_ylabel(unit)
axes[1].legend(loc="lower right")
show(fig, f"Short runs of {size.grid_steps} steps: what was learned and kept against "
          "the share of weights, for three choices of layers.")

# %% [markdown]
# The place matters most. Rank helps a little, as the loss shows, and fifty facts find room even in rank 1. But attention takes them in far more slowly than the feed-forward layers do, with more weights. That fits what is known of where models keep facts (Geva et al. 2020, Meng et al. 2022). It is one task
# and one small model: for a manner of speaking, attention may do as well. The usual advice is to adapt all linear layers when you do not know.
#
# **Alpha** scales the change: doubling it is much like doubling the learning rate of the pair. It is divided by $r$, so that a rank found later needs no new learning rate.
#
# **Before you run this**: four values of alpha, 1 to 512, at the same learning rate, on the new rows alone. Which curve is lowest at the end? Is more always faster?

# %% id="lora-alpha"
fig, ax = plt.subplots(figsize=(7, 2.6))
for alpha, marker in zip((1, 8, 64, 512), "os^v"):
    model = lora_model(alpha=alpha)
    line = fit(model, size.learning_rate, size.alpha_steps, new_batches, points=10)
    ax.plot(line.step, line.loss, marker=marker, markersize=3, label=f"alpha {alpha}")
ax.set(xlabel="step", ylabel="loss (nats per learned token)", ylim=(0, None))
ax.legend()
show(fig, "Loss for four values of alpha at one learning rate: too small is slow, too "
          "large jumps about.")

# %% [markdown]
# More is faster, up to a point, and then the steps are too large to land anywhere. The runs of this chapter use 8, which was chosen before this picture. Whether a larger alpha keeps as much of the old is
# for you to measure.
#
# **Exercise 12.9 (20 min, ★★★): `first_step`** in [workbook 12](../exercises/12_lora.ipynb). Alpha over the rank, or over its root? Predict how the first step depends on the rank, then measure it.
#
# ## 12.7 Which layers change most
#
# Compare the size of each change with the size of its matrix: $\lVert \Delta W \rVert / \lVert W \rVert$, for full fine-tuning and for the run with adapters in all layers.

# %% id="lora-relative-change"
everywhere = table[-1]["model"]

def relative_change(change_of):
    """A table of layers by modules: the norm of a change over the norm of its matrix."""
    names = [[f"model.layers.{layer}.{part}" for part in parts]
             for layer in range(layers)]
    relative = lambda name: change_of(name).norm() / before[f"{name}.weight"].norm().cpu()
    return torch.tensor([[relative(name) for name in row] for row in names])

parts = [name.split(".", 3)[3] for name in adapters(everywhere)
         if name.startswith("model.layers.0.")]
of_full = relative_change(lambda name: changes[f"{name}.weight"])
of_lora = relative_change(lambda name: adapters(everywhere)[name].change().detach().cpu())

# %% [markdown]
# One box for each matrix, with its share written in:

# %% id="lora-change-figure"
fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.4), sharey=True)
for ax, relative, title in zip(axes, (of_full, of_lora),
                               ("full fine-tuning", "LoRA on all layers")):
    ax.imshow(relative, cmap="Greys", vmin=0, vmax=1.3 * relative.max(), aspect="auto")
    for (i, j), value in np.ndenumerate(relative.numpy()):
        colour = "white" if value > 0.75 * relative.max() else "black"
        ax.text(j, i, f"{value:.0%}", ha="center", va="center", fontsize=7,
                color=colour)
    ax.set(title=title, xticks=range(len(parts)), yticks=range(layers))
    ax.set_xticklabels([part.split(".")[-1].removesuffix("_proj") for part in parts])
    ax.grid(False)
axes[0].set_ylabel("layer")
show(fig, "Size of the change over the size of the matrix, by layer and module: "
          "darker changed more.")

# %% [markdown]
# Full fine-tuning spreads its change nearly evenly. AdamW moves every weight that has a gradient by about the learning rate in each step, whether the task needs it or not (chapter 8). With two
# pieces for a matrix, each matrix has to move further, and the differences are larger. A large change is not yet an important one: which layers *matter* is what 12.6 measured.
#
# **Exercise 12.8 (15 min, ★★): `dora_weight`** in [workbook 12](../exercises/12_lora.ipynb). Lengths of rows as weights of their own: write DoRA, and let no gradient flow through the norm.
#
# ## 12.8 Merge, save, exchange
#
# At run time the adapter costs two more products in each layer. It need not: $W + \frac{\alpha}{r} B A$ is a matrix of the old shape. Write it over $W$, and take the adapter off.

# %% id="lora-merge"
#| export
def remove_lora(model: nn.Module) -> nn.Module:
    """Take the adapters off, in place: what was before add_lora; all weights train."""
    for name, module in adapters(model).items():
        replace_module(model, name, module.base_layer)
    del model.lora_config
    return model.requires_grad_(True)


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Add each change to its weight and take the adapters off, in place."""
    for module in adapters(model).values():
        module.base_layer.weight += module.change()
    return remove_lora(model)

# %% [markdown]
# Same logits? Adding in 32 bits rounds the weights a little. Computed in 64 bits, what is left of a difference comes from the merge alone; in 32 bits the rounding of every product is
# added to it.

# %% id="lora-merge-agrees"
import copy
import time

merged = merge_lora(copy.deepcopy(village))
exact = lambda model: logits_of(copy.deepcopy(model).double())
worst = (exact(merged) - exact(village)).abs().max().item()
in_32_bits = (logits_of(merged) - logits_of(village)).abs().max().item()
print(f"largest difference of a logit: 64 bits {worst:.1e}, 32 bits {in_32_bits:.1e}; "
      f"the largest logit is {logits_of(merged).max():.0f}")
check("lora/merge_difference", worst)
assert list(merged.state_dict()) == list(base.state_dict())

# %% [markdown]
# And the time of one forward pass:

# %% id="lora-merge-speed"
def milliseconds(model):
    clock = time.perf_counter()
    logits_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - clock)

# In turns, so that both meet the same disturbances.
times = [(milliseconds(village), milliseconds(merged)) for _ in range(20)]
print("one batch: with adapters {:.1f} ms, merged {:.1f} ms".format(*map(min, zip(*times))))

# %% [markdown]
# **Exercise 12.4 (10 min, ★★): `merge_lora`** in [workbook 12](../exercises/12_lora.ipynb). Take the adapters off, with or without what they learned; the weights are compared one by one.
#
# Why ever keep an adapter apart, then? Because it is small: one base model and a hundred adapters, each loaded when it is needed. On disk it is a folder with two files, in the format of PEFT: the settings, and
# the thin matrices under PEFT's names.

# %% id="lora-weights"
#| export
PREFIX = "base_model.model."  # PEFT puts this before every name


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The thin matrices by name, such as ...q_proj.lora_A.weight."""
    return {
        f"{name}.{part}.weight": getattr(module, part).weight
        for name, module in adapters(model).items() for part in ("lora_A", "lora_B")
    }

# %% [markdown]
# Both files are written beside the folder and then put in place in one step, as in chapter 7: a full disk or a kill in between leaves the old adapter, not half of a new one.

# %% id="lora-save"
#| export
def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write an adapter folder as PEFT does, all or nothing; other files there stay."""
    tensors = {PREFIX + name: weight.detach().cpu().contiguous()
               for name, weight in adapter_weights(model).items()}
    folder, config = Path(folder), model.lora_config
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.r,
                "lora_alpha": config.lora_alpha,
                "target_modules": list(config.target_modules), "lora_dropout": 0.0,
                "bias": "none", "inference_mode": True}
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if folder.is_dir():
            shutil.copytree(folder, draft, dirs_exist_ok=True)
        (draft / "adapter_config.json").write_text(json.dumps(settings, indent=2)
                                                   + "\n", encoding="utf-8")
        save_file(tensors, draft / "adapter_model.safetensors",
                  metadata={"format": "pt"})
        replace_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)

# %% [markdown]
# Reading is the reverse, and strict. PEFT knows many kinds of adapters. One that this code would read wrongly, such as a rank that differs from layer to layer, must be refused.

# %% id="lora-read-config"
#| export
NOT_PLAIN = ("fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save",
             "layers_to_transform", "lora_bias", "exclude_modules",
             "trainable_token_indices", "target_parameters", "layer_replication",
             "alora_invocation_tokens", "arrow_config")


def not_plain(values: dict) -> list[str]:
    """What in an adapter_config.json is no plain LoRA, in words."""
    # use_dora, use_rslora, ...
    special = [name for name in values if name in NOT_PLAIN or name.startswith("use_")]
    found = [f"{name} is {values[name]!r}" for name in special if values[name]]
    found += [f"{name} is {values.get(name)!r}"
              for name, plain in (("peft_type", "LORA"), ("bias", "none"))
              if values.get(name, plain) != plain]
    if not isinstance(values["target_modules"], list):
        found.append(f"target_modules is the pattern {values['target_modules']!r} "
                     "where a list of names was expected")
    return found


def read_adapter_config(path: Path) -> LoRAConfig:
    """Read adapter_config.json; ValueError if it is damaged or no plain LoRA."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = LoRAConfig(int(values["r"]), float(values["lora_alpha"]),
                            values["target_modules"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error!r}): save the "
                         "adapter again") from error
    if other := not_plain(values):
        raise ValueError(f"{path}: only plain LoRA is read here, but {'; '.join(other)}")
    return config

# %% [markdown]
# Names and shapes are checked as for a whole model (chapter 7): a missing weight would stay at its random start, and nothing would say so. If anything does not fit, the adapters come off again, and the
# model is as it was.

# %% id="lora-load-adapter"
#| export
def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter of a PEFT folder on a model, in place, or leave it as it was."""
    folder = Path(folder)
    path = folder / "adapter_model.safetensors"
    for needed in (folder / "adapter_config.json", path):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing: {folder} is no adapter "
                                    "folder")
    config = read_adapter_config(folder / "adapter_config.json")
    tensors = {name.removeprefix(PREFIX): tensor
               for name, tensor in read_weights(path).items()}
    add_lora(model, config)
    try:
        check_weights(adapter_weights(model), tensors, path)
    except ValueError:
        remove_lora(model)
        raise
    model.load_state_dict(tensors, strict=False)
    return model

# %% [markdown]
# Out and in again, on a fresh model:

# %% id="lora-round-trip"
saved = chapter.work / "adapter"
save_adapter(village, saved)
again = load_adapter(chat_model(), saved)
assert torch.equal(logits_of(again), logits_of(village))
print({file.name: f"{file.stat().st_size:,} bytes" for file in sorted(saved.iterdir())})
print(f"the whole model: {(folder / 'model.safetensors').stat().st_size:,} bytes")

# %% [markdown]
# And `peft` itself: transformers loads the base model, `peft` puts the same folder on it, and the logits are compared. (A folder may hold 16-bit weights, and transformers would compute in 16 bits; so
# we ask for 64, on both sides.)

# %% id="lora-peft"
import warnings

def hugging_face_model():
    """The base model as transformers loads it, in 64 bits."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

def largest_difference(theirs, ours):
    ids = batch["input_ids"][:2].cpu()
    with torch.no_grad():
        return (theirs.eval()(ids).logits
                - ours.cpu().double().eval()(ids)).abs().max().item()

try:
    import peft
except ImportError:
    peft = None
    print("not compared: `pip install peft transformers` to see it")

# %% [markdown]
# Our folder, read by `peft`. It would warn about a weight that is missing; the logits are the stronger test.

# %% id="lora-peft-reads-ours"
if peft:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that transformers 6 will change
        theirs = peft.PeftModel.from_pretrained(hugging_face_model(), saved)
    difference = largest_difference(theirs, again)
    print(f"saved here, loaded by peft: largest difference of a logit {difference:.1e}")
    chapter.record("lora/peft_difference", difference)
    assert difference < 1e-4

# %% [markdown]
# Then the other way round: an adapter made by `peft`, with random numbers in both matrices, read by us.

# %% id="lora-we-read-theirs"
if peft:
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=ATTENTION,
                               init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(hugging_face_model(), settings)
        made.save_pretrained(chapter.work / "by_peft")
    ours = load_adapter(MiniMind.from_pretrained(folder), chapter.work / "by_peft")
    difference = largest_difference(made, ours)
    print(f"made by peft, loaded here: largest difference of a logit {difference:.1e}")
    assert difference < 1e-4

# %% [markdown]
# **Exercise 12.5 (5 min, ★): `adapter_weights`** in [workbook 12](../exercises/12_lora.ipynb). Which tensors go into the file, and under which names?
#
# ## 12.9 Where it breaks
#
# **Zero times zero.** $A$ and $B$ both zero: each is the other's gradient, and nothing ever moves. **Both random**: now it moves, but from a model that was broken before the first step.

# %% id="lora-bad-starts"
def zero_both(module):
    nn.init.zeros_(module.lora_A.weight)

def random_both(module):
    nn.init.normal_(module.lora_B.weight, std=0.5)

starts = {}
ways = {"right": lambda module: None, "both zero": zero_both,
        "both random": random_both}
for name, spoil in ways.items():
    model = lora_model()
    for module in adapters(model).values():
        spoil(module)
    loss = loss_on(model, old_rows, 1)
    line = fit(model, size.learning_rate, size.alpha_steps, new_batches, points=10)
    starts[name] = loss, line
    print(f"{name:12} before step 1: loss {loss:.2f} on old chats, gradient "
          f"{line.grad_norm[0]:.3f}")
assert starts["both zero"][1].grad_norm[-1] == 0 < starts["right"][1].grad_norm[-1]
assert starts["both random"][0] > starts["right"][0] + 0.1

# %% [markdown]
# The three losses:

# %% id="lora-bad-starts-figure"
fig, ax = plt.subplots(figsize=(7, 2.4))
for (name, (_, line)), marker in zip(starts.items(), "os^"):
    ax.plot(line.step, line.loss, marker=marker, markersize=3, label=name)
ax.set(xlabel="step", ylabel="loss (nats per learned token)", ylim=(0, None))
ax.legend()
show(fig, "Three ways to begin: with both at zero nothing is learned, and with both "
          "random the run first repairs its own damage.")

# %% [markdown]
# **Alpha forgotten at the merge.** Somebody adds $BA$ and leaves out $\alpha / r$. The merged model is not the one that was trained. With $\alpha = r$ nobody would ever see it, so test
# with another value.

# %% id="lora-forgotten-alpha"
wrong = copy.deepcopy(village)
with torch.no_grad():
    for module in adapters(wrong).values():
        module.base_layer.weight += module.lora_B.weight @ module.lora_A.weight
remove_lora(wrong)
print(f"learned: right {scores['LoRA']['learned']:.2f}, alpha forgotten "
      f"{learned(wrong):.2f}")
print(f"logits move by up to {(logits_of(wrong) - logits_of(village)).abs().max():.1f}")
assert (logits_of(wrong) - logits_of(village)).abs().max() > 100 * max(worst, 1e-6)

# %% [markdown]
# **Merged twice.** Add the change again, and the model has double of it. Here the second merge is an error, because the first took the adapters off:

# %% id="lora-merged-twice"
try:
    merge_lora(merged)
except ValueError as error:
    print(error)
else:
    raise AssertionError("a second merge must be refused")
# what the error protects from
twice = merge_lora(load_adapter(copy.deepcopy(merged), saved))
for name, model in (("once", merged), ("twice", twice)):
    print(f"merged {name}: learned {learned(model):.2f}, kept {kept(model):.2f}")
assert (logits_of(twice) - logits_of(merged)).abs().max() > 100 * max(worst, 1e-6)

# %% [markdown]
# **Names it has never read.** The newcomers had names that the model knew as words. Take people of the other world, whose names stand in no text, and train the same adapter, with the same
# replay, on their facts.

# %% id="lora-strangers"
def pieces(people):
    return [[tokenizer.decode([t]) for t in tokenizer.encode(f" {p.name}")]
            for p in people[:4]]

outsiders = []
if questions:
    outsiders = [p for p in strangers.people
                 if p.name not in set(world.names)][: len(newcomers)]
    mixed = Replay(packed(rows_about(outsiders)), chat_batches,
                   size.chat_share / (1 - size.text_share))
    unknown = lora_model()
    fit(unknown, size.learning_rate,
        batches=Replay(mixed, text_batches, size.text_share))
    told_right = share_right(unknown, questions_about(outsiders))
    print(f"known names: {scores['LoRA']['learned']:.0%} right", pieces(newcomers))
    print(f"new names: {told_right:.0%} right", pieces(outsiders))
    chapter.record("lora/new_names", told_right)

# %% [markdown]
# Where does it fail? Split the loss of an answer into the tokens of the name and the rest.

# %% id="lora-strangers-figure"
import torch.nn.functional as F

@torch.no_grad()
def nats_by_kind(model, people):
    """Mean nats of the name's tokens, with which an answer begins, and of the rest."""
    name, rest = [], []
    for person in people:
        count = len(tokenizer.encode(person.name))
        for row in rows_about([person], ways=(0,)):
            ids, labels = torch.tensor(chat_example(tokenizer, row), device=device)
            logits = model.eval()(ids[None, :-1])[0].float()
            nats = F.cross_entropy(logits, labels[1:],
                                   reduction="none")[labels[1:] != -100].tolist()
            name, rest = name + nats[:count], rest + nats[count:]
    return sum(name) / len(name), sum(rest) / len(rest)

if outsiders:
    bars = {
        "known names, before": nats_by_kind(base, newcomers),
        "known names, after": nats_by_kind(village, newcomers),
        "new names, before": nats_by_kind(base, outsiders),
        "new names, after": nats_by_kind(unknown, outsiders),
    }
    fig, ax = plt.subplots(figsize=(7, 2.4))
    y = np.arange(len(bars))
    looks = ({"color": "C1", "hatch": "//", "label": "tokens of the name"},
             {"color": "C0", "label": "all other tokens"})
    for shift, values, look in zip((-0.2, 0.2), zip(*bars.values()), looks):
        ax.bar_label(ax.barh(y + shift, values, 0.38, **look), fmt=" %.2f", fontsize=8)
    ax.set(yticks=y, yticklabels=list(bars), xlabel="loss (nats per token)")
    ax.invert_yaxis()
    ax.legend()
    show(fig, "Loss on the answers, split into the name and the rest: names that were "
              "never read stay expensive after training.")

# %% [markdown]
# A name that no text holds is cut into pieces that the model has met only inside other names. At the cpu profile each piece costs 7.5 nats before and 0.8 after, where a known name costs 0.01. The adapter cannot change the rows of these pieces: it sits in the
# feed-forward layers, and the embedding, which is also the output layer here, is frozen. What that costs depends on how well pretraining has trained these rows. This model has read 400 names, and 90% of the answers come out right (68% with another seed of the world); an earlier one, whose world had 200 names, got 5 to 14%: it could
# neither tell such names apart nor say them. LoRA teaches new facts about known words; for new words, train their rows of the embedding too (PEFT: `trainable_token_indices`).
#
# **Try it.** Let the embedding rows of these pieces train beside the adapter. How many weights is that, and do the outsiders come in?
#
# ## 12.10 The claim
#
# The numbers of this chapter with their bands. All questions of chapter 11 count for what was lost.

# %% id="lora-claim"
check("lora/weights_share", trained_parameters(village) / weights)
if questions:
    check("lora/new_facts", scores["LoRA"]["learned"])
    check("lora/old_facts_lost", kept_by["before"]["all"] - kept_by["LoRA"]["all"])
    check("lora/full_old_facts_lost", kept_by["before"]["all"] - kept_by["full"]["all"])
    check("lora/new_facts_before", scores["before"]["learned"])
else:
    for name in ("before", "LoRA"):
        print(f"{name}: loss on new rows {scores[name]['learned']:.3f}, on old chats "
              f"{scores[name]['kept']:.3f}")
    chapter.record("lora/new_loss_gain",
                   scores["before"]["learned"] - scores["LoRA"]["learned"])
forgotten = check("lora/forgotten", scores["LoRA"]["bits"] - scores["before"]["bits"])

# %% [markdown]
# Keep the merged model as a folder that later chapters load, with the adapter in a folder inside it; and ask it the five questions that every stage answers.

# %% id="lora-artifact"
with chapter.write("lora") as out:
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    save_adapter(village, out / "adapter")

for question in chapter.five_questions(questions):
    answer = ask(merged, tokenizer, question)
    chapter.answer("lora", question, answer)
    print(f"{question}\n    {answer!r}")

# %% [markdown]
# ## Recap
#
# - The change that a small task needs has a low rank: cut to some ten pieces of 160, full fine-tuning keeps nearly all that it learned.
# - LoRA trains that change as two thin matrices beside frozen weights. $B$ starts at zero, so the model starts as it was.
# - Rank, alpha and targets are to be measured: here a rank of 2 in the feed-forward layers, 1% of the weights, is enough for fifty facts.
# - Replay keeps the old, with LoRA as with full fine-tuning. Without it both forget, LoRA less.
# - Merge, and it costs nothing at run time. Keep it apart, and it is a small file that PEFT reads.
#
# **Exercises:** 12.1 to 12.9, in place above, with checks in [workbook 12](../exercises/12_lora.ipynb).
#
# **Words**: adapter, low rank, singular value, LoRA, alpha, target, merge, full fine-tuning, self-replay, PEFT.
#
# **Sources**: Hu et al. 2021, arXiv:2106.09685 (LoRA). Aghajanyan et al. 2020, arXiv:2012.13255 (fine-tuning has a low intrinsic dimension). Biderman et al. 2024, arXiv:2405.09673 (*LoRA learns less and
# forgets less*). Geva et al. 2020, arXiv:2012.14913, and Meng et al. 2022, arXiv:2202.05262 (facts in feed-forward layers). Robins 1995, *Catastrophic forgetting, rehearsal and pseudorehearsal*, Connection
# Science 7. Eckart and Young 1936, Psychometrika 1. Next: chapter 13 teaches from which of two answers is better.
