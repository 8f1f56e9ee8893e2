# %% [markdown]
# # 11. Supervised fine-tuning
#
# At the end of this chapter your model answers. You will turn conversations into training rows, choose which tokens it learns from, pack
# many conversations into one row without letting them see each other, train for two minutes, and measure three things: does it
# answer, does it answer about people it was never asked about, and what did it forget?
#
# You need chapters 4 (masks), 8 (the loop), 9 (a pretrained model) and 10 (generation). The chat template is from chapter 2.
#
# Reading 35 minutes; running: smoke 20 s, cpu 90 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# **Supervised fine-tuning** (SFT) is training on examples of what you want: here, questions with good answers. The loop of chapter 8 stays as
# it is. New is how the examples are made:

# %% id="sft-opening-picture"
import matplotlib.pyplot as plt

steps = ["conversations", "template\n(11.2)", "loss mask\n(11.2)", "packed rows\n(11.3)", "train\n(11.5)", "ask\n(11.6)"]
fig, ax = plt.subplots(figsize=(7, 1.2))
for i, label in enumerate(steps):
    ax.text(i, 0, label, ha="center", va="center", fontsize=8, bbox={"boxstyle": "round,pad=0.35", "fc": "#d5ead8", "ec": "black"})
    if i:
        ax.annotate("", (i - 0.4, 0), (i - 0.6, 0), arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-0.6, 5.5), ylim=(-0.5, 0.5))
ax.axis("off")
show(fig, "From conversations to a model that answers: each box is one section of this chapter.")

# %% id="sft-default-exp"
#| default_exp sft

# %% id="sft-imports"
#| export
import json
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from minimind.generate import generate_batch
from minimind.metrics import cross_entropy

# %% [markdown]
# ## 11.1 A model that knows and does not answer
#
# Load the pretrained model and ask it something, in the chat template.

# %% id="sft-load"
from minimind.data import check_file, read_conversations, read_texts
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

folder, data = chapter.read("pretrain"), chapter.read("data")
tokenizer = Tokenizer.from_pretrained(folder)

def base_model():
    """A fresh copy of the pretrained model."""
    return MiniMind.from_pretrained(folder).to(chapter.device)

base = base_model()

# %% [markdown]
# The questions: the data folder has one for every fact of the world. Your own data have none, so five everyday ones serve.

# %% id="sft-questions"
questions_file = data / "questions.jsonl"
questions = [json.loads(line) for line in questions_file.open(encoding="utf-8")] if questions_file.exists() else []
if questions:
    five = [questions[i * len(questions) // 5]["question"] for i in range(5)]
else:
    five = ["Who are you?", "What is the sun?", "How are you today?", "What is two plus three?", "Tell me a story."]
print(five)

# %% [markdown]
# The prompt ends with `<|im_start|>assistant`, and the model writes on until it closes its turn with `<|im_end|>`, or until its tokens run out.

# %% id="sft-ask-base"
def replies_of(model, texts, new_tokens=24):
    """The model's reply to each question, and whether it closed its turn."""
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True) for t in texts]
    answers = generate_batch(model, prompts, new_tokens, stop_ids=(tokenizer.im_end_id,))
    return [(tokenizer.decode(ids), len(ids) < new_tokens) for ids in answers]

base_replies = replies_of(base, five)
for question, (reply, stopped) in zip(five, base_replies):
    print(f"{question}\n    {reply!r} {'(closed)' if stopped else '(ran on)'}")

# %% [markdown]
# It continues as if this were one more document. The facts may be in there: chapter 9 measured how many it can complete. What it lacks is
# a form: a question comes, an answer follows, and then you stop. The special tokens mean nothing to it, since pretraining text had none; their
# embeddings are still what chance made them. So SFT has three things to teach: what the tokens of the template mean, that an answer is wanted, and when to
# stop. It should *not* have to teach facts.
#
# ## 11.2 Which tokens to learn from
#
# Here is a short conversation of two turns from the training data, in the template of chapter 2.

# %% id="sft-first-conversation"
from itertools import islice

rows = islice(read_conversations(data / "sft" / "train.jsonl.gz"), chapter.size.conversations)
conversations = [row["conversations"] for row in rows]
size_of = lambda messages: sum(len(m["content"] or "") for m in messages)
several = min((c for c in conversations if len(c) == 4), key=size_of, default=conversations[0])
print(tokenizer.apply_chat_template(several, tokenize=False))

# %% [markdown]
# Each turn is a header with a role, the text, and an end mark. The model reads all of it. But it should learn to *write* only what the assistant writes: the answers, and the `<|im_end|>` after each, which is how
# it learns to stop. The user's words are given to it, so learning to predict them would be wasted effort. This choice is the **loss mask**.
#
# **Before you run the next cells**: the header `<|im_start|>assistant\n` comes right before an answer. Should it be learned?
#
# By hand on this one conversation, with a small state machine: after `assistant` and a line end we are in an answer, after `<|im_end|>` we are out.

# %% id="sft-mask-by-hand"
tokens = tokenizer.apply_chat_template(several)
inside, header, by_hand = False, "", []
for token in tokens:
    by_hand.append(inside)
    if token == tokenizer.im_start_id:
        header = ""
    elif token == tokenizer.im_end_id:
        inside = False
    elif not inside:
        header += tokenizer.decode([token])
        inside = header == "assistant\n"
print(sum(by_hand), "of", len(tokens), "tokens are learned")

# %% [markdown]
# The header is not learned: in a chat, the program writes it, not the model. A model that has to produce its own header would waste a little effort; worse is the
# other direction, where the first word of the answer is left out of the loss, because that is the word that decides what follows. The same as a function, which does not depend on how the header is cut into
# tokens:

# %% id="sft-assistant-mask"
#| export
def assistant_mask(tokenizer, ids: Sequence[int]) -> list[bool]:
    """True for the tokens that the assistant writes: the text of its turns and the <|im_end|> that closes each.

    A turn is <|im_start|>, the role, a line end, the text, <|im_end|>. The header ends with the first token that
    holds a line end, so this needs no fixed number of header tokens.
    """
    mask, token_bytes = [False] * len(ids), tokenizer.token_bytes()
    for start in (i for i, token in enumerate(ids) if token == tokenizer.im_start_id):
        body = next((i + 1 for i in range(start, len(ids)) if b"\n" in token_bytes[ids[i]]), len(ids))
        end = next((i + 1 for i in range(body, len(ids)) if ids[i] == tokenizer.im_end_id), len(ids))
        if tokenizer.decode(ids[start + 1 : body]).strip() == "assistant":
            mask[body:end] = [True] * (end - body)
    return mask

# %% [markdown]
# It agrees with the state machine:

# %% id="sft-mask-agrees"
assert assistant_mask(tokenizer, tokens) == by_hand

# %% [markdown]
# `chat_example` returns the tokens and the **labels**: the token itself where it is learned, and -100 elsewhere, which `cross_entropy` leaves out.

# %% id="sft-chat-example"
#| export
def from_json(value):
    """Chat files may hold tools and tool calls as JSON text: the object in it; anything else stays as it is."""
    return json.loads(value) if isinstance(value, str) else value


def chat_example(
    tokenizer, messages: list[dict], max_length: int | None = None, tools: list[dict] | None = None
) -> tuple[list[int], list[int]]:
    """One conversation as (ids, labels) of equal length, cut after `max_length` tokens.

    labels[i] is ids[i] where the assistant wrote token i, else -100. They stand under their own token; the shift to
    "target of position i" happens once, in PackedConversations. Tools may also stand in the first message, as "tools".
    """
    if messages and tools is None:
        tools = from_json(messages[0].get("tools"))
    messages = [m | {"tool_calls": from_json(m["tool_calls"])} if m.get("tool_calls") else m for m in messages]
    ids = tokenizer.apply_chat_template(messages, tools=tools)[:max_length]
    return ids, [token if mine else -100 for token, mine in zip(ids, assistant_mask(tokenizer, ids))]

# %% [markdown]
# Drawn token by token. A second answer is learned like the first: every answer is predicted from all that stands before it. So one pass over a
# conversation of three turns trains three answers, each with the right history. Cutting it into three examples would read the first turn three times.

# %% id="sft-mask-figure"
def draw_tokens(ax, ids, labels, per_row=10):
    for i, (token, label) in enumerate(zip(ids, labels)):
        learned = label != -100
        text = repr(tokenizer.decode([token]))[1:-1]
        ax.text(i % per_row, -(i // per_row), text, ha="center", va="center", fontsize=7.5 if len(text) < 9 else 5.5,
                color="white" if learned else "black", bbox={"boxstyle": "square,pad=0.3", "fc": "#0072B2" if learned else "#e8e8e8", "ec": "none"})
    ax.set(xlim=(-0.6, per_row - 0.4), ylim=(-((len(ids) - 1) // per_row) - 0.6, 0.6))
    ax.axis("off")

ids, labels = chat_example(tokenizer, several, max_length=120)
fig, ax = plt.subplots(figsize=(7, 0.36 * (len(ids) // 10 + 1)))
draw_tokens(ax, ids, labels)
show(fig, "One conversation, token by token: white on blue is learned, grey is only read. The end mark after each answer is learned too.")

# %% [markdown]
# Two facts that every loss mask must meet, on many conversations: each answer ends with a learned `<|im_end|>`, and the learned
# text is exactly what the assistant said.

# %% id="sft-mask-facts"
for messages in conversations[:200]:
    ids, labels = chat_example(tokenizer, messages)
    learned = [label for label in labels if label != -100]
    answers = [m for m in messages if m["role"] == "assistant"]
    assert learned.count(tokenizer.im_end_id) == len(answers)
    if not any(m.get("tool_calls") or m.get("reasoning_content") or "</think>" in m["content"] for m in answers):
        said = "".join(m["content"] + "<|im_end|>" for m in answers)
        assert "".join(tokenizer.decode(learned).split()) == "".join(said.split())  # blanks aside

# %% [markdown]
# **Exercise 11.1 (15 min, ★★).** Learn from the last answer only. How many of the learned tokens are lost in this data?
#
# The tokens before an answer in training must be exactly those that `ask` will send later. If they differ by one line end, the model meets a prompt that it has never
# seen. That is why both go through the same template.
#
# A line that is no conversation must stop you before training does. `check_file` of chapter 1 lists what is wrong, with the line:

# %% id="sft-bad-conversations"
bad = chapter.work / "bad.jsonl"
bad.write_text('{"conversations": [{"role": "user", "content": "Hello"}]}\n{"conversations": [{"role": "bot", "content": "Hi"}]}\n', encoding="utf-8")
try:
    check_file(bad, "sft")
except ValueError as error:
    print(str(error).replace(str(chapter.work), "..."))
else:
    raise AssertionError("bad conversations must be refused")

# %% [markdown]
# ## 11.3 Many conversations in one row
#
# Conversations are short and differ in length. The usual way pads each to a fixed row, often 768 tokens. How much of that is text?

# %% id="sft-lengths"
context, padded_row = chapter.size.context, 768
examples = [chat_example(tokenizer, messages, max_length=context + 1) for messages in conversations]
usable = [(ids, labels) for ids, labels in examples if any(label != -100 for label in labels)]
print(f"{len(examples) - len(usable)} of {len(examples):,} have no answer within {context} tokens and are left out")
examples = usable
lengths = np.array([len(ids) for ids, _ in examples])
full = np.minimum(lengths, padded_row).mean() / padded_row
print(f"{lengths.mean():.0f} tokens on average; rows of {padded_row} are {full:.0%} full")
print(f"{(lengths > context).sum()} conversations are cut at {context + 1} tokens")

# %% [markdown]
# The picture of the waste:

# %% id="sft-lengths-figure"
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.hist(lengths, bins=range(0, padded_row + 16, 8), color="C0")
ax.axvline(padded_row, color="C1", ls="--")
ax.text(padded_row - 8, ax.get_ylim()[1] * 0.8, f"padded row: {padded_row}", ha="right")
ax.set(xlabel="length of a conversation (tokens)", ylabel="conversations")
show(fig, "Conversations are far shorter than the row they are padded to: everything between the bars and the line is computed for nothing.")

# %% [markdown]
# So put several into one row, as chapter 9 did with documents. Which ones? This is packing suitcases: take the longest
# first, and put each into the row that it fills best. The long ones come first because they are hard to place; the short ones fill the gaps. To find
# the best row quickly, rows are kept in drawers by the room they have left: an item of length 5 looks into the drawer for 5, then 6, and so on.
# Seven lengths into rows of 10, by hand: 7+3, 6+4, 5+2, and 2 joins the 5 and 2.

# %% id="sft-pack"
#| export
def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Put items into rows of `width` places: longest first, each into the row that it fills best. Rows of item numbers."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # with_room[r]: rows that have r places left
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((r for r in range(lengths[item], width + 1) if with_room[r]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, width
        else:
            row = with_room[room].pop()
        rows[row].append(item)
        with_room[room - lengths[item]].append(row)
    return rows

# %% [markdown]
# The same seven lengths:

# %% id="sft-pack-by-hand"
toy = [5, 7, 2, 3, 6, 4, 2]
rows = pack(toy, 10)
print([[toy[i] for i in row] for row in rows])
assert sorted(i for row in rows for i in row) == list(range(7)) and len(rows) == 3

# %% [markdown]
# A shorter row is cheaper still, since attention costs the square of its width (chapter 4): four rows of 64 compute a quarter of the scores of one row of
# 256, and hold as many tokens. So rows come in three widths, and a narrow row is used where it gets at least nine tenths full. A batch has always about the same
# number of tokens, so narrow rows come in larger batches.

# %% id="sft-pack-by-width"
#| export
def pack_by_width(lengths: Sequence[int], context: int, batch_size: int, full: float = 0.9) -> dict[int, list[list[int]]]:
    """Rows of up to three widths, {width: rows}: attention costs width squared per row, so narrow rows are cheaper.

    A narrow row is kept when at least the share `full` of it is used. Narrow rows come in whole batches of
    batch_size * context tokens; all else moves on to the next width.
    """
    packed, rest = {}, set(range(len(lengths)))
    for width in (context // 4, context // 2, context):
        fits = [i for i in sorted(rest) if lengths[i] <= width]
        rows = [[fits[j] for j in row] for row in pack([lengths[i] for i in fits], width)]
        if width < context:
            rows = [row for row in rows if sum(lengths[i] for i in row) >= full * width]
            rows = rows[: len(rows) - len(rows) % (batch_size * context // width)]
        if rows:
            packed[width] = rows
        rest -= {i for row in rows for i in row}
    return packed

# %% [markdown]
# Now the rows hold strangers. Two things keep them apart. The **mask** lets a position look only at earlier positions of its own conversation;
# it is a causal mask cut into blocks. And **positions** start again at 0 in each. The padding at the end of a row is a block of its own, which keeps its softmax from
# being empty (chapter 10).

# %% id="sft-block-mask"
#| export
def block_mask(owner: torch.Tensor) -> torch.Tensor:
    """Who may look where, (B, 1, T, T): earlier positions of the same owner. owner (B, T) numbers the conversations."""
    same = owner[:, :, None] == owner[:, None, :]  # (B, T, T)
    return same.tril()[:, None]

# %% [markdown]
# By hand: the second token of the second conversation may look at two positions, its own and the one before.

# %% id="sft-block-mask-by-hand"
owner = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3, 0]])  # three conversations and one place of padding
mask = block_mask(owner)[0, 0]
assert mask[4].tolist() == [False, False, False, True, True, False, False, False, False, False]

# %% [markdown]
# The whole mask as a picture. Each row is one position, and what it may look at is dark.

# %% id="sft-block-mask-figure"
fig, ax = plt.subplots(figsize=(3.4, 3.1))
ax.imshow(mask, cmap="Greys", vmax=1.4)
ax.set(xlabel="position looked at", ylabel="position that looks", xticks=range(10), yticks=range(10))
ax.grid(False)
show(fig, "The mask of a row with three conversations of 3, 2 and 4 tokens: dark may look, and no block reaches into another.")

# %% [markdown]
# The class puts it together. It is addressed by step, so a resumed run sees the same batches (chapter 8). And it is the one place where labels are
# shifted: position $t$ gets the label of token $t+1$. Read `batch` first: it lays conversations one behind the other and notes for each place the token,
# the label, the position within its conversation, and the number of its owner. Everything else decides which rows come when. Rows are packed once and
# shuffled for each epoch.

# %% id="sft-packed-conversations"
#| export
class PackedConversations:
    """Many conversations to a row, none of which sees another; `[step]` is always the same batch.

    examples: pairs from `chat_example`. A batch holds about batch_size * context tokens: batch_size rows of `context`,
    or more and narrower rows. Rows are shuffled anew each epoch. A batch has, each (B, T) except the mask:
    input_ids; labels, already shifted, -100 where nothing is learned; position_ids, which start at 0 in every
    conversation; attention_mask (B, 1, T, T), True where a position may look.
    """

    def __init__(
        self, examples: Sequence[tuple[list[int], list[int]]], context: int, batch_size: int,
        seed: int = 0, device: torch.device | str = "cpu",
    ):  # fmt: skip
        lengths = [len(ids) - 1 for ids, _ in examples]  # the last token has no next one to learn
        if not examples or max(lengths) > context:
            what = f"the longest conversation has {max(lengths) + 1} tokens" if examples else "there are no conversations"
            raise ValueError(f"{what}, rows have {context}: call chat_example with max_length={context + 1}")
        self.ids = [np.array(ids[:-1]) for ids, _ in examples]
        self.labels = [np.array(labels[1:]) for _, labels in examples]  # the shift
        self.rows = pack_by_width(lengths, context, batch_size)
        self.context, self.batch_size, self.seed, self.device = context, batch_size, seed, device
        self.places = sum(width * len(rows) for width, rows in self.rows.items())
        self.efficiency = sum(lengths) / self.places  # share of all places that holds a token
        self.epoch, self.plan = -1, self.shuffle(0)

    def shuffle(self, epoch: int) -> list[tuple[int, list[list[int]]]]:
        """The batches of one epoch, as (width, rows)."""
        rng = np.random.default_rng([self.seed, epoch])
        plan = []
        for width, rows in self.rows.items():
            order, size = rng.permutation(len(rows)), self.batch_size * self.context // width
            order = np.resize(order, -(-len(rows) // size) * size)  # the last batch is filled up from the start
            plan += [(width, [rows[i] for i in some]) for some in order.reshape(-1, size)]
        return [plan[i] for i in rng.permutation(len(plan))]

    def __len__(self) -> int:
        """Batches in one epoch."""
        return len(self.plan)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        epoch, index = divmod(step, len(self.plan))
        if epoch != self.epoch:
            self.epoch, self.plan = epoch, self.shuffle(epoch)
        return self.batch(*self.plan[index])

    def batch(self, width: int, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Rows of item numbers as tensors."""
        ids, positions, owner = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
        labels = np.full((len(rows), width), -100, dtype=np.int64)
        for r, row in enumerate(rows):
            start = 0
            for number, item in enumerate(row, 1):
                end = start + len(self.ids[item])
                ids[r, start:end], labels[r, start:end] = self.ids[item], self.labels[item]
                positions[r, start:end], owner[r, start:end] = np.arange(end - start), number
                start = end
        ids, labels, positions, owner = (torch.from_numpy(x).to(self.device) for x in (ids, labels, positions, owner))
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": block_mask(owner)}

# %% [markdown]
# Pack everything, and look at some rows of the first batch that opens with several conversations in one row:

# %% id="sft-rows-figure"
chats = PackedConversations(examples, context, chapter.size.batch_size, device=chapter.device)
shared = next(step for step, (_, rows) in enumerate(chats.plan) if len(rows[0]) > 1)
width, rows = chats.plan[shared]
fig, ax = plt.subplots(figsize=(7, 2.2))
for r, row in enumerate(rows[:12]):
    start = 0
    for n, item in enumerate(row):
        ax.barh(r, len(chats.ids[item]), left=start, color=f"C{n % 6}", ec="white", hatch=["", "//", ".."][n % 3])
        start += len(chats.ids[item])
ax.set(xlabel="position (tokens)", ylabel="row", xlim=(0, width), yticks=range(0, min(12, len(rows)), 2))
show(fig, f"Packed rows of {width} tokens: each block is one conversation, and almost no place is empty.")

# %% [markdown]
# The share of places that hold a token, against rows of 768:

# %% id="sft-efficiency"
print({width: len(rows) for width, rows in chats.rows.items()}, "rows by width")
print(f"padded {full:.0%} full, packed {check('sft/packing_efficiency', chats.efficiency):.0%}")

# %% [markdown]
# Is a packed conversation really alone? Compare each with a separate pass through the model.

# %% id="sft-packed-equals-alone"
batch = chats[shared]
base.eval()
with torch.no_grad():
    packed = base(batch["input_ids"], batch["attention_mask"], batch["position_ids"])[0]  # (T, V)
    start, worst = 0, 0.0
    for item in rows[0]:
        own = torch.tensor(chats.ids[item], device=chapter.device)[None]
        worst = max(worst, (packed[start : start + own.shape[1]] - base(own)[0]).abs().max().item())
        start += own.shape[1]
print(f"largest difference of a logit: {worst:.1e}")
assert worst < 1e-3

# %% [markdown]
# The rest is rounding. Now leave out the mask and see the neighbours leak in. The positions alone do not help:

# %% id="sft-leak"
with torch.no_grad():
    leaky = base(batch["input_ids"], position_ids=batch["position_ids"])[0]
leak = (packed - leaky)[batch["position_ids"][0] > 0].abs().max().item()
print(f"without the mask logits move by up to {leak:.1e}")
assert leak > 10 * worst

# %% [markdown]
# **Exercise 11.2 (15 min, ★★).** Keep the mask, but let positions run on. How far do the logits move? Why so little (chapter 5)?
#
# The loss is the usual one. Only learned tokens count in its mean.

# %% id="sft-loss"
#| export
def sft_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
    """Cross-entropy over the assistant's tokens (nats), plus the balance loss of a model with experts."""
    logits = model(batch["input_ids"], attention_mask=batch.get("attention_mask"), position_ids=batch.get("position_ids"))
    loss = cross_entropy(logits, batch["labels"])
    if not model.config.num_experts:
        return loss, {"cross_entropy": loss}
    return loss + model.config.router_aux_loss_coef * model.aux_loss, {"cross_entropy": loss}

# %% [markdown]
# The mean is over the learned tokens of the whole batch, not first over each conversation: a long answer counts for more than a short one. That is a choice; the
# other one would let a short "Hello!" weigh as much as a long explanation.
#
# What has packing brought? Time one step of each kind, in real tokens per second.

# %% id="sft-speed"
import time

def padded_batch(some, width):
    """One conversation a row, padded: what most tutorials do."""
    ids, labels = torch.zeros(len(some), width, dtype=torch.long), torch.full((len(some), width), -100)
    for r, (own, learned) in enumerate(some):
        n = min(len(own) - 1, width)
        ids[r, :n], labels[r, :n] = torch.tensor(own[:n]), torch.tensor(learned[1 : n + 1])
    return {"input_ids": ids.to(chapter.device), "labels": labels.to(chapter.device)}

def tokens_per_second(batch, real, repeats=2):
    """Real tokens per second of forward and backward, best of `repeats`."""
    best = float("inf")
    for _ in range(repeats):
        clock = time.perf_counter()
        sft_loss(base, batch)[0].backward()
        if chapter.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - clock)
    return real / best

# %% [markdown]
# Four padded rows against one packed batch:

# %% id="sft-speed-measure"
some = examples[:4]
slow = tokens_per_second(padded_batch(some, padded_row), sum(len(ids) - 1 for ids, _ in some))
fast = tokens_per_second(batch, sum(len(chats.ids[item]) for row in rows for item in row))
base.zero_grad(set_to_none=True)
print(f"padded to {padded_row}: {slow:,.0f} tokens per second; packed: {fast:,.0f}")
gain = check("sft/packing_speedup", fast / slow)

# %% [markdown]
# **Exercise 11.3 (20 min, ★★).** Batches of equal length need no mask at all: sort by length and pad the little that is missing. Is that faster?
#
# ## 11.4 Off by one
#
# The commonest bug of this chapter is a mask or a label that stands one place beside its token. Nothing crashes. Train the same model three times, a few seconds
# each:
#
# - **right**: as above;
# - **mask one early**: the mask begins at the last header token, and ends before `<|im_end|>`;
# - **not shifted**: the label of a position is its own token instead of the next one.

# %% [markdown]
# The end of one turn, in the three variants:

# %% id="sft-three-masks"
def one_early(ids, labels):
    return ids, [token if later != -100 else -100 for token, later in zip(ids, [*labels[1:], -100])]

def not_shifted(ids, labels):
    return ids, [-100, *labels[:-1]]  # PackedConversations shifts left, so this ends where it began

variants = {"right": lambda ids, labels: (ids, labels), "mask one early": one_early, "not shifted": not_shifted}
ids, labels = chat_example(tokenizer, several[:2])
fig, axes = plt.subplots(3, 1, figsize=(7, 2.2))
for ax, (name, change) in zip(axes, variants.items()):
    draw_tokens(ax, ids[-11:], change(ids, labels)[1][-11:], per_row=11)
    ax.set_title(name, fontsize=9, loc="left", pad=2)
show(fig, "The last tokens of one turn; tokens on blue have a label. One place to the side looks harmless; with the mask one early, <|im_end|> is not learned.")

# %% [markdown]
# **Before you run this**: which of the three will show the lowest loss?

# %% id="sft-train-variants"
from minimind.train import TrainConfig, train

def short_run(change):
    model = base_model()
    batches = PackedConversations([change(*e) for e in examples], context, chapter.size.short_batch, device=chapter.device)
    config = TrainConfig(steps=chapter.size.short_steps, learning_rate=chapter.size.learning_rate, log_every=2, precision=chapter.settings.precision)
    return model, train(model, batches, sft_loss, config, max_steps=chapter.max_steps)

short = {name: short_run(change) for name, change in variants.items()}

# %% [markdown]
# Their losses:

# %% id="sft-variants-figure"
fig, ax = plt.subplots(figsize=(7, 2.5))
for (name, (_, history)), marker in zip(short.items(), "os^"):
    ax.plot(history.step, history.loss, marker=marker, markersize=3, label=name)
ax.set(xlabel="step", ylabel="loss (nats per learned token)", ylim=(0, None))
ax.legend()
show(fig, "Loss of the three variants: all fall, and nothing in the curves says which mask is the right one.")

# %% [markdown]
# The curves look fine, all three. So look at the answers:

# %% id="sft-variants-answers"
asked = [q["question"] for q in questions if q["seen"]][:40] or five
stops = {}
for name, (model, _) in short.items():
    replies = replies_of(model, asked, 32)
    stops[name] = sum(stopped for _, stopped in replies) / len(replies)
    print(f"{name}: {stops[name]:.0%} close their turn\n    {asked[0]} -> {replies[0][0][:80]!r}")

# %% [markdown]
# With the mask one early, the answer itself is right, and that makes this bug so hard to see: `<|im_end|>` was never learned, so the model goes on as it did in
# pretraining. Its loss is even the lowest: instead of the end of a turn it learns the last header token, which never changes. Not shifted, the model is asked to say the token again that
# it has just read, the opposite of what pretraining taught. Its loss starts highest, and then falls like the others. Two checks find both: print the tokens with their labels as above, and ask the model after one minute of training, not at the end.

# %% id="sft-variants-check"
for name, share in stops.items():
    chapter.record(f"sft/stops_{name.replace(' ', '_')}", share)
if questions and chapter.max_steps is None and profile != "smoke":  # other data need longer runs
    assert stops["right"] > 0.9 and stops["mask one early"] < 0.5

# %% [markdown]
# **Exercise 11.4 (20 min, ★★).** Learn from the user's tokens too (no mask at all). Does the model answer worse? Measure it.
#
# ## 11.5 The run
#
# Training on chats alone makes a model forget what it read before: nothing in the loss asks for stories any more, and the weights drift away from them. A cheap remedy is **replay**: every few steps, a batch of the old pretraining text.

# %% id="sft-replay"
#| export
class Replay:
    """Chat batches with pretraining batches strewn in, so that less is forgotten: `share` of all steps, evenly spread."""

    def __init__(self, chats, texts, share: float):
        if not 0 <= share < 1:
            raise ValueError(f"share={share}: give the share of steps on pretraining text, at least 0 and below 1")
        self.chats, self.texts, self.share = chats, texts, share

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        before, now = int(step * self.share), int((step + 1) * self.share)  # text steps so far, without and with this one
        return self.texts[before] if now > before else self.chats[step - before]

# %% [markdown]
# With a share of one quarter, every fourth step reads text:

# %% id="sft-replay-by-hand"
order = Replay(chats=["c0", "c1", "c2", "c3", "c4", "c5"], texts=["t0", "t1"], share=0.25)
assert [order[step] for step in range(8)] == ["c0", "c1", "c2", "t0", "c3", "c4", "c5", "t1"]

# %% [markdown]
# Everything is in place:

# %% id="sft-batches"
from minimind.metrics import evaluate_bits_per_byte, token_byte_lengths
from minimind.pretrain import PackedTokens

def token_stream(name, documents):
    """The first documents of a file as one row of tokens."""
    texts = list(islice(read_texts(data / "pretrain" / name), documents))
    return np.concatenate([np.array([*ids, tokenizer.eos_id]) for ids in tokenizer.encode_batch(texts)])

texts = PackedTokens(token_stream("train.jsonl.gz", chapter.size.replay_documents), context, chapter.size.batch_size, device=chapter.device)
batches = Replay(chats, texts, chapter.size.pretrain_share)

# %% [markdown]
# While it trains we want three numbers now and then: answers right about people whose questions are in the data (*seen*), about the others
# (*unseen*), and bits per byte on pretraining text, where a rise means forgetting. Here is how answers are judged.

# %% id="sft-ask"
#| export
def ask_all(model: nn.Module, tokenizer, questions: Sequence[str], max_new_tokens: int = 48, **options) -> list[str]:
    """The model's answer to each question, each asked in a conversation of its own."""
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True) for q in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths together: little padding
    stops = (tokenizer.im_end_id, tokenizer.eos_id)
    answers = generate_batch(model, [prompts[i] for i in order], max_new_tokens, stop_ids=stops, **options)
    return [tokenizer.decode(ids, skip_special=True).strip() for _, ids in sorted(zip(order, answers))]


def ask(model: nn.Module, tokenizer, question: str, **options) -> str:
    """The model's answer to one question."""
    return ask_all(model, tokenizer, [question], **options)[0]

# %% [markdown]
# An answer is right when it says the value in whole words. We also note whether it names the person asked about, because a model can say something true about
# the wrong one.

# %% id="sft-answers-right"
#| export
def says(text: str, words: str) -> bool:
    """Whether `words` stand in `text` as whole words, in small or capital letters."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


def answers_right(model: nn.Module, tokenizer, questions: Sequence[dict], **options) -> tuple[float, list[dict]]:
    """Ask {"question", "answer", "person"} rows: the share whose reply says the answer, and one row each.

    Every row gets "reply", "right", and "name_copied": whether the reply names the person who was asked about.
    """
    replies = ask_all(model, tokenizer, [q["question"] for q in questions], **options)
    rows = [
        {**q, "reply": reply, "right": says(reply, q["answer"].strip()), "name_copied": says(reply, q.get("person", ""))}
        for q, reply in zip(questions, replies)
    ]
    return sum(row["right"] for row in rows) / max(1, len(rows)), rows

# %% [markdown]
# Whole words, so that a catfish is no cat:

# %% id="sft-says-by-hand"
assert says("Garus lives in Foxhollow.", "foxhollow")
assert not says("Garus has a catfish.", "cat")

# %% [markdown]
# The numbers during the run come from a sample of the questions; the final ones from all.

# %% id="sft-evaluate"
valid_tokens = torch.tensor(token_stream("valid.jsonl.gz", chapter.size.valid_documents))
byte_lengths = token_byte_lengths(tokenizer)

def bits_per_byte_of(model):
    model.eval()
    with torch.no_grad():
        return evaluate_bits_per_byte(model, valid_tokens.to(chapter.device), byte_lengths.to(chapter.device), context=context, amp=chapter.amp)

sample = {kind: [q for q in questions if q["seen"] == seen][:: chapter.size.every_question] for kind, seen in (("seen", True), ("unseen", False))}

def evaluate(model):
    model.eval()
    shares = {kind: answers_right(model, tokenizer, some)[0] for kind, some in sample.items() if some}
    result = shares | {"bits_per_byte": bits_per_byte_of(model)}
    print("  ".join(f"{name} {value:.3f}" for name, value in result.items()))
    return result

before = evaluate(base)

# %% [markdown]
# Now train; the three numbers come eight times. The learning rate is lower than in pretraining: the model is good already, and large steps would break more than they build.

# %% id="sft-train"
chat_model = base_model()
steps = chapter.size.steps
config = TrainConfig(steps=steps, learning_rate=chapter.size.learning_rate, log_every=max(1, steps // 40), eval_every=max(1, steps // 8),
                     precision=chapter.settings.precision)
history = train(chat_model, batches, sft_loss, config, evaluate=evaluate, max_steps=chapter.max_steps)
print(f"{history.tokens[-1]:,} tokens in {history.seconds[-1]:.0f} s")

# %% [markdown]
# Loss and answers over the run:

# %% id="sft-training-figure"
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
left.plot(history.step, history.loss)
left.set(xlabel="step", ylabel="loss (nats per learned token)", ylim=(0, None))
at = [0, *(e["step"] for e in history.evals)]
for kind, marker in (("seen", "o"), ("unseen", "s")):
    if kind in before:
        right.plot(at, [before[kind], *(e[kind] for e in history.evals)], marker=marker, label=f"{kind} people")
right.set(xlabel="step", ylabel="share of answers right", ylim=(0, 1.02))
right.legend() if questions else None
show(fig, "Loss and answers during SFT: the form is learned within a few steps, and with it come answers about people never asked about.")
chapter.curve("sft", history.step, history.loss, x_label="step", y_label="nats per learned token")

# %% [markdown]
# ## 11.6 Base against chat
#
# The five questions of 11.1 again:

# %% id="sft-base-against-chat"
chat_model.eval()
for question, (reply, _) in zip(five, base_replies):
    answer = ask(chat_model, tokenizer, question)
    chapter.answer("sft", question, answer)
    print(f"{question}\n    base: {reply.strip()!r}\n    chat: {answer!r}")

# %% [markdown]
# All questions, both models. *Seen* people were asked about in the chat data; about the *unseen* ones, every fact comes from pretraining alone. Three
# numbers: answers right for each, and for the unseen how often the answer names the person who was asked about.

# %% id="sft-final-answers"
def score(model):
    rows = answers_right(model, tokenizer, questions, max_new_tokens=24)[1]
    mean = lambda name, seen: sum(r[name] for r in rows if r["seen"] == seen) / max(1, sum(r["seen"] == seen for r in rows))
    return rows, {"questions_seen": mean("right", True), "questions_unseen": mean("right", False), "names_copied": mean("name_copied", False)}

rows, after = score(chat_model) if questions else ([], {})
_, base_score = score(base) if questions else ([], {})
for name in after:
    print(f"{name:18} base {base_score[name]:5.1%}   chat {after[name]:5.1%}")

# %% [markdown]
# As a picture:

# %% id="sft-final-figure"
if after:
    fig, ax = plt.subplots(figsize=(7, 2.3))
    y = np.arange(3)
    for shift, scores, name, look in ((0.2, base_score, "base", {"color": "0.7", "hatch": "//"}), (-0.2, after, "chat", {"color": "C0"})):
        ax.bar_label(ax.barh(y + shift, list(scores.values()), 0.38, label=name, **look), fmt=" {:.0%}", fontsize=8)
    ax.set(yticks=y, yticklabels=["right, seen people", "right, unseen people", "names copied, unseen"], xlabel="share of questions", xlim=(0, 1.1))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
    show(fig, "The same questions to both models: SFT teaches the form, and facts that were never asked about come out in it.")

# %% [markdown]
# The facts about unseen people were never asked for in any text that the model has read. It learned the form from one half of the people and uses it on the
# other half. That did not come by itself: in an earlier version of the world, which had no `talk` documents and other sentence forms, 19% of these questions
# were right after fifty steps of SFT, and no answer named the right person. The version that you have reached 99% after as many. Several things changed at once, so
# the share of each is not known (a good experiment). Copying a name from a question is a skill, and it comes from text that needs it.
#
# Look at what went wrong, if anything did. Is the *fact* wrong, or the *name*? An answer that is true of somebody else is a failure to copy: the name must travel from the question into the
# answer (chapter 4 shows the heads that do it), and pretraining must have taught that.

# %% id="sft-failures"
wrong = [r for r in rows if not r["right"]]
other = [r for r in wrong if not r["name_copied"]]
print(f"{len(wrong)} of {len(rows)} wrong; {len(other)} of these name somebody else")
for r in wrong[:5]:
    print(f"  {r['question']} -> {r['reply']!r}, expected {r['answer']!r}")

# %% [markdown]
# **Exercise 11.5 (20 min, ★★).** Ask with words the data never uses ("Tell me where Garus lives!"). How far does the form carry?
#
# ## 11.7 What was forgotten
#
# A model that answers may have paid for it elsewhere. The price is measured on what it could do before: bits per byte on held-out pretraining text, during this run
# with replay, and at the end of the short run of 11.4, which had none and saw fewer tokens:

# %% id="sft-forgetting"
forgotten = {"before": before["bits_per_byte"], "after, with replay": history.evals[-1]["bits_per_byte"]}
forgotten["short run, no replay"] = bits_per_byte_of(short["right"][0])
for name, value in forgotten.items():
    print(f"{name:22} {value:.3f} bits per byte")
if questions and chapter.max_steps is None and profile != "smoke":  # other data need longer runs
    assert forgotten["after, with replay"] < forgotten["short run, no replay"]

# %% [markdown]
# And over the steps:

# %% id="sft-forgetting-figure"
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(at, [before["bits_per_byte"], *(e["bits_per_byte"] for e in history.evals)], marker="o", label="with replay")
ax.plot([0, short["right"][1].step[-1]], [before["bits_per_byte"], forgotten["short run, no replay"]], marker="s", label="without")
ax.axhline(before["bits_per_byte"], color="0.5", ls=":")
ax.set(xlabel="step", ylabel="bits per byte")
ax.legend()
show(fig, "Forgetting on pretraining text: bits per byte above the dotted line of the base model is what fine-tuning has cost.")

# %% [markdown]
# The claim of this chapter, in numbers with their bands:

# %% id="sft-claim"
for name, value in after.items():
    check(f"sft/{name}", value)
check("sft/bits_per_byte_before", forgotten["before"])
check("sft/bits_per_byte_after", forgotten["after, with replay"])
cost = check("sft/forgotten", forgotten["after, with replay"] - forgotten["before"])

# %% [markdown]
# **Exercise 11.6 (20 min, ★★).** Double the share of replay at equal steps. Does the model answer worse?
#
# **Exercise 11.7 (25 min, ★★★).** Teach "I do not know": add questions about names that do not exist. Which true answers get lost?
#
# Keep the model, as a folder that chapter 12 and `transformers` can load.

# %% id="sft-save"
with chapter.write("sft") as out:
    chat_model.save_pretrained(out)
    tokenizer.save_pretrained(out)

# %% [markdown]
# Talk to it: `python -m minimind.chat runs/latest/artifacts/sft`, or here, with two turns.

# %% id="sft-talk"
from minimind.chat import reply

talk = []
for text in (five[0], five[-1]):
    talk.append({"role": "user", "content": text})
    answer = "".join(reply(chat_model, tokenizer, talk, [tokenizer.im_end_id, tokenizer.eos_id], 40))
    talk.append({"role": "assistant", "content": answer})
    print(f"you:   {text}\nmodel: {answer}")

# %% [markdown]
# ## 11.8 Recap
#
# - SFT is the loop of chapter 8 on conversations; only what the assistant writes is learned, and `<|im_end|>` with it.
# - A mask one place off trains without complaint. Print tokens with labels, and ask early.
# - Packing with a block mask and restarting positions fills rows, and each conversation gets exactly the logits it has alone.
# - The form is learned in seconds; facts come from pretraining. Whether they come out depends on copying the name.
# - Chats alone make a model forget; replay costs a few steps and keeps it.
#
# **Words**: supervised fine-tuning, chat template, loss mask, label, packing, block-diagonal mask, replay, forgetting, base model, chat model.
#
# **Exercise 11.8 (30 min, ★★★).** Fine-tune on fewer conversations: 30, 100, 300, 1,000. How many does the form need?
#
# **Sources**: Ouyang et al. 2022, arXiv:2203.02155 (fine-tuning on demonstrations). Zhou et al. 2023, *LIMA*, arXiv:2305.11206 (how few examples the form needs). Allen-Zhu
# and Li 2023, arXiv:2309.14316 (when stored facts can be asked for). Krell et al. 2021, arXiv:2107.02027 (packing without leaking). Olsson et al. 2022, arXiv:2209.11895
# (heads that copy). Next: chapter 12 changes 1% of the weights instead of all.
