# %% [markdown]
# # 11. Supervised fine-tuning
#
# At the end of this chapter your model answers. You will turn conversations into training rows, choose which tokens it learns from, pack
# many conversations into one row without letting them see each other, train for less than a minute, and measure three things: does it
# answer, does it answer about people it was never asked about, and what did it forget?
#
# You need chapters 4 (masks), 8 (the loop), 9 (a pretrained model) and 10 (generation). The chat template is from chapter 2.
#
# Reading 35 minutes; running: smoke 15 s, cpu 50 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="sft-default-exp"
#| default_exp sft

# %% [markdown]
# **Supervised fine-tuning** (SFT) is training on examples of what you want: here, questions with good answers. The loop of chapter 8 stays as
# it is. New is how the examples are made:

# %% id="sft-opening-picture"
import matplotlib.pyplot as plt

boxes = ["conversations", "template\n(11.2)", "loss mask\n(11.2)",
         "packed rows\n(11.3)", "train\n(11.5)", "ask\n(11.6)"]
fig, ax = plt.subplots(figsize=(7, 1))
for i, label in enumerate(boxes):
    ax.text(i, 0, label, ha="center", va="center", fontsize=9,
            bbox={"boxstyle": "round,pad=0.35", "fc": "#d5ead8", "ec": "black"})
    if i:
        ax.annotate("", (i - 0.4, 0), (i - 0.6, 0), arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-0.6, 5.5), ylim=(-0.5, 0.5))
ax.axis("off")
show(fig, "From conversations to a model that answers: each box is one section.")

# %% [markdown]
# The module needs the generation of chapter 10, to ask, and the loss of chapter 3, to learn:

# %% id="sft-imports"
#| export
import json
import re
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from minimind.generate import generate_batch
from minimind.metrics import cross_entropy

# %% [markdown]
# ## 11.1 A model that knows and does not answer
#
# Load the pretrained model and ask it something, in the chat template. Every experiment of this chapter starts from a fresh copy of it, so that none sees what another has learned.

# %% id="sft-load"
from minimind.data import read_conversations, read_texts
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

folder, data = chapter.read("pretrain"), chapter.read("data")
size, device = chapter.size, chapter.device

# %% [markdown]
# The tokenizer was saved with the model, so the two always fit.

# %% id="sft-base-model"
tokenizer = Tokenizer.from_pretrained(folder)

def base_model():
    """A fresh copy of the pretrained model."""
    return MiniMind.from_pretrained(folder).to(device)

base = base_model()

# %% [markdown]
# The questions: the data folder has one for every fact of the world. Five of them, each about another kind of fact, are asked after every stage of this course. Your own data have none, so five everyday
# ones serve.

# %% id="sft-questions"
path = data / "questions.jsonl"
questions = list(map(json.loads, path.open(encoding="utf-8"))) if path.exists() else []
five = chapter.five_questions(questions)
print(*five, sep="\n")

# %% [markdown]
# The prompt ends with `<|im_start|>assistant`, and the model writes on until it closes its turn with `<|im_end|>`, or until its tokens run out.

# %% id="sft-ask-base"
def prompt_of(text):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)

# %% [markdown]
# An answer that took all its tokens was not closed by the model.

# %% id="sft-replies-of"
def replies_of(model, texts, new_tokens=24):
    """The model's reply to each question, and whether it closed its turn."""
    prompts = [prompt_of(text) for text in texts]
    stops = (tokenizer.im_end_id,)
    answers = generate_batch(model, prompts, new_tokens, stop_ids=stops)
    return [(tokenizer.decode(ids), len(ids) < new_tokens) for ids in answers]

# %% [markdown]
# **Before you run this:** at profile cpu chapter 9 left a model that completes "Hanis lives in" correctly. Will it answer the question?

# %% id="sft-base-replies"
base_replies = replies_of(base, five)
for question, (reply, closed) in zip(five, base_replies):
    print(f"{question} {'(closed)' if closed else '(ran on)'}\n    {reply!r}")

# %% [markdown]
# It continues as if this were one more document. The facts may be in there: chapter 9 measured how many it can complete. What it lacks is
# a form: a question comes, an answer follows, and then you stop. The special tokens mean nothing to it, since pretraining text had none; their
# embeddings are still what chance made them. So SFT has three things to teach: what the tokens of the template mean, that an answer is wanted, and when to
# stop. It should *not* have to teach facts.
#
# ## 11.2 Which tokens to learn from
#
# Here is a short conversation of two turns from the training data, the shortest there is, in the template of chapter 2.

# %% id="sft-first-conversation"
from itertools import islice

rows = islice(read_conversations(data / "sft" / "train.jsonl.gz"), size.conversations)
conversations = [row["conversations"] for row in rows]
size_of = lambda messages: sum(len(m["content"] or "") for m in messages)
two_turns = [messages for messages in conversations if len(messages) == 4]
several = min(two_turns, key=size_of, default=conversations[0])
print(tokenizer.apply_chat_template(several, tokenize=False))

# %% [markdown]
# Each turn is a header with a role, the text, and an end mark. The model reads all of it. But it should learn to *write* only what the assistant writes: the answers, and the `<|im_end|>` after each, which is how
# it learns to stop. The user's words are given to it, so learning to predict them would be wasted effort. This choice is the **loss mask**.
#
# **Before you run the next cells**: the header `<|im_start|>assistant\n` comes right before an answer. Should it be learned?
#
# By hand on this one conversation, with a small state machine (a loop that remembers where it is): after `assistant` and a line end we are in an answer, after `<|im_end|>` we are out.

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
# other direction, where the first word of the answer is left out of the loss, because that is the word that decides what follows.
#
# The same as a function. The header ends with the first token that holds a line end, so nothing depends on how many tokens the header is cut into. A conversation that was cut off has no end mark; then its end is the end of the list.

# %% id="sft-assistant-mask"
#| export
def assistant_mask(tokenizer, ids: Sequence[int]) -> list[bool]:
    """True for what the assistant writes: its text and the <|im_end|> after it.

    A turn is <|im_start|>, the role, a line end, the text, <|im_end|>.
    """
    mask, token_bytes = [False] * len(ids), tokenizer.token_bytes()

    def after(start, fits):  # the place behind the first token that fits
        return next((i + 1 for i in range(start, len(ids)) if fits(ids[i])), len(ids))

    for start in (i for i, token in enumerate(ids) if token == tokenizer.im_start_id):
        body = after(start, lambda token: b"\n" in token_bytes[token])
        end = after(body, lambda token: token == tokenizer.im_end_id)
        if tokenizer.decode(ids[start + 1 : body]).strip() == "assistant":
            mask[body:end] = [True] * (end - body)
    return mask

# %% [markdown]
# It agrees with the state machine:

# %% id="sft-mask-agrees"
assert assistant_mask(tokenizer, tokens) == by_hand

# %% [markdown]
# **Exercise 11.1 (20 min, ★★): `assistant_mask`** in [workbook 11](../exercises/11_sft.ipynb). Write it in your own way; the check cuts conversations off and headers into other tokens.
#
# `chat_example` returns the tokens and the **labels**: the token itself where it is learned, and -100 elsewhere, which `cross_entropy` leaves out. First a small help for chat files that hold parts as JSON text:

# %% id="sft-from-json"
#| export
def from_json(value):
    """The object in a JSON text, such as tools; any other value as it is."""
    return json.loads(value) if isinstance(value, str) else value

# %% [markdown]
# A label stands under its own token here. The shift, to "what position $t$ must predict", happens once, further below. Some data hold tools in the first message; the template wants them apart.

# %% id="sft-chat-example"
#| export
def chat_example(
    tokenizer, messages: list[dict], max_length: int | None = None,
    tools: list[dict] | None = None,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """One conversation as (ids, labels) of equal length, cut after `max_length` tokens.

    labels[i] is ids[i] where the assistant wrote token i, else -100; not shifted yet.
    """
    if messages and tools is None:
        tools = from_json(messages[0].get("tools"))
    messages = [
        m | {"tool_calls": from_json(m["tool_calls"])} if m.get("tool_calls") else m
        for m in messages
    ]
    ids = tokenizer.apply_chat_template(messages, tools=tools)[:max_length]
    mask = assistant_mask(tokenizer, ids)
    return ids, [token if mine else -100 for token, mine in zip(ids, mask)]

# %% [markdown]
# Draw it token by token. A second answer is learned like the first: every answer is predicted from all that stands before it. So one pass over a
# conversation of three turns trains three answers, each with the right history. Cutting it into three examples would read the first turn three times.

# %% id="sft-mask-figure"
def draw_tokens(ax, ids, labels, per_row=8):
    for i, (token, label) in enumerate(zip(ids, labels)):
        text = repr(tokenizer.decode([token]))[1:-1]
        ink, paper = ("black", "#e8e8e8") if label == -100 else ("white", "#0072B2")
        ax.text(i % per_row, -(i // per_row), text, ha="center", va="center", color=ink,
                fontsize=8 if len(text) < 9 else 6.5, bbox={"fc": paper, "ec": "none"})
    rows = -(-len(ids) // per_row)
    ax.set(xlim=(-0.6, per_row - 0.4), ylim=(0.4 - rows, 0.6))
    ax.axis("off")

# %% [markdown]
# Every token of the conversation in its box:

# %% id="sft-mask-drawn"
ids, labels = chat_example(tokenizer, several, max_length=120)
fig, ax = plt.subplots(figsize=(7, 0.3 * (len(ids) // 8 + 1)))
draw_tokens(ax, ids, labels)
show(fig, "One conversation, token by token: white on blue is learned, grey is only "
          "read. The end mark after each answer is learned too.")

# %% [markdown]
# Two facts that every loss mask must meet, on many conversations: each answer ends with a learned `<|im_end|>`, and the learned
# text is exactly what the assistant said.

# %% id="sft-mask-facts"
for messages in conversations[:200]:
    ids, labels = chat_example(tokenizer, messages)
    learned = [label for label in labels if label != -100]
    answers = [m for m in messages if m["role"] == "assistant"]
    assert learned.count(tokenizer.im_end_id) == len(answers)
    if any(m.keys() & {"tool_calls", "reasoning_content"} for m in answers):
        continue  # the template writes more than the content
    said = "".join(m["content"] + "<|im_end|>" for m in answers)
    if "</think>" not in said:
        assert "".join(tokenizer.decode(learned).split()) == "".join(said.split())

# %% [markdown]
# **Exercise 11.2 (10 min, ★★): `chat_example`** in [workbook 11](../exercises/11_sft.ipynb). From messages to ids and labels; the messages stay as they are.
#
# The tokens before an answer in training must be exactly those that `ask` will send later. If they differ by one line end, the model meets a prompt that it has never
# seen. That is why both go through the same template.
# A line that is no conversation must stop you before training does: `check_file` of chapter 1 lists what is wrong, with the line.

# %% [markdown]
# ## 11.3 Many conversations in one row
#
# Conversations are short and differ in length. The usual way pads each to a fixed row, often 768 tokens. **Before you run this:** how much of that is text?
# Ours are cut at `context` + 1 tokens, the last of which is only a label. What has no answer left after the cut teaches nothing and is left out.

# %% id="sft-lengths"
context, padded_row = size.context, 768
cut = [chat_example(tokenizer, m, max_length=context + 1) for m in conversations]
examples = [(ids, labels) for ids, labels in cut if max(labels) != -100]
print(f"{len(cut) - len(examples)} of {len(cut):,} have no answer in {context} tokens")
lengths = np.array([len(ids) for ids, _ in examples])
full = np.minimum(lengths, padded_row).mean() / padded_row
print(f"{lengths.mean():.0f} tokens each; rows of {padded_row} are {full:.0%} full")

# %% [markdown]
# The picture of the waste:

# %% id="sft-lengths-figure"
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.hist(lengths, bins=range(0, padded_row, 8), color="C0")
ax.axvline(padded_row, color="C1", ls="--")
ax.set(xlabel="length of a conversation (tokens)", ylabel="conversations")
show(fig, f"Conversations are far shorter than a padded row of {padded_row} (dashed): "
          "everything between the bars and the line is computed for nothing.")

# %% [markdown]
# So put several into one row, as chapter 9 did with documents. Which ones? This is packing suitcases: take the longest
# first, and put each into the row that it fills best. The long ones come first because they are hard to place; the short ones fill the gaps. To find
# the best row quickly, rows are kept in drawers by the room they have left: an item of length 5 looks into the drawer for 5, then 6, and so on.
# Seven lengths into rows of 10, by hand: 7+3, 6+4, 5+2, and 2 joins the 5 and 2.

# %% id="sft-pack"
#| export
def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of item numbers, `width` places each: longest first, where it fits best."""
    rows: list[list[int]] = []
    drawers: list[list[int]] = [[] for _ in range(width + 1)]  # [r]: rows with room r
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((r for r in range(lengths[item], width + 1) if drawers[r]), None)
        if room is None:  # nowhere: a new row
            rows.append([])
            row, room = len(rows) - 1, width
        else:
            row = drawers[room].pop()
        rows[row].append(item)
        drawers[room - lengths[item]].append(row)
    return rows

# %% [markdown]
# The same seven lengths:

# %% id="sft-pack-by-hand"
toy = [5, 7, 2, 3, 6, 4, 2]
rows = pack(toy, 10)
print([[toy[i] for i in row] for row in rows])
assert sorted(sum(rows, [])) == list(range(7)) and len(rows) == 3

# %% [markdown]
# **Exercise 11.3 (20 min, ★★): `pack`** in [workbook 11](../exercises/11_sft.ipynb). The longest first, into the row that it fills best; the check knows three other ways to pack.
#
# A shorter row is cheaper still, since attention costs the square of its width (chapter 4): four rows of 64 compute a quarter of the scores of one row of
# 256, and hold as many tokens. So rows come in three widths, and a narrow row is used where it gets at least nine tenths full. A batch has always about the same
# number of tokens, so narrow rows come in larger batches.
#
# One width after the other: what fits is packed. Rows that are not full enough are given up again, and so are those that do not make a whole batch; their conversations try the next width. At the widest nothing is given up.

# %% id="sft-pack-by-width"
#| export
def pack_by_width(
    lengths: Sequence[int], context: int, batch_size: int, full: float = 0.9
) -> dict[int, list[list[int]]]:
    """Rows of up to three widths, {width: rows}; narrow ones are cheaper for attention.

    A narrow row stays if at least `full`, in batches of batch_size * context tokens.
    """
    packed, rest = {}, set(range(len(lengths)))
    for width in (context // 4, context // 2, context):
        fits = [i for i in sorted(rest) if lengths[i] <= width]
        rows = pack([lengths[i] for i in fits], width)
        rows = [[fits[j] for j in row] for row in rows]
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
    """Who may look where, (B, 1, T, T): earlier positions of one's own owner (B, T)."""
    same = owner[:, :, None] == owner[:, None, :]  # (B, T, T)
    return same.tril()[:, None]

# %% [markdown]
# By hand: the second token of the second conversation stands at position 4 and may look at two positions, its own and the one before.

# %% id="sft-block-mask-by-hand"
owner = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3, 0]])  # 0: one place of padding
mask = block_mask(owner)[0, 0]
assert mask[4].nonzero().flatten().tolist() == [3, 4]

# %% [markdown]
# The whole mask as a picture. Each row is one position, and what it may look at is dark.

# %% id="sft-block-mask-figure"
fig, ax = plt.subplots(figsize=(3.4, 3.1))
ax.imshow(mask, cmap="Greys", vmax=1.4)
ax.set(xlabel="position looked at", ylabel="position that looks", xticks=range(10))
ax.grid(False)
show(fig, "The mask of a row with three conversations of 3, 2 and 4 tokens: dark may "
          "look, and no block reaches into another.")

# %% [markdown]
# A row is laid out one conversation behind the other. For each place four numbers are noted: the token, its label, the position within its conversation, and the number of its owner.

# %% id="sft-lay-out"
#| export
def lay_out(rows: Sequence, width: int) -> list[np.ndarray]:
    """Rows of (ids, labels) pairs as ids, labels, positions and owners, each (B, T)."""
    ids, positions, owner = np.zeros((3, len(rows), width), dtype=np.int64)
    labels = np.full_like(ids, -100)
    for r, row in enumerate(rows):
        start = 0
        for number, (own, learned) in enumerate(row, 1):
            end = start + len(own)
            ids[r, start:end], labels[r, start:end] = own, learned
            positions[r, start:end], owner[r, start:end] = range(len(own)), number
            start = end
    return [ids, labels, positions, owner]

# %% [markdown]
# By hand: conversations of two and three tokens in one row of six. The last place belongs to nobody.

# %% id="sft-lay-out-by-hand"
for numbers in lay_out([[([11, 12], [-100, 13]), ([21, 22, 23], [-100, 23, 24])]], 6):
    print(numbers[0])

# %% [markdown]
# **Exercise 11.4 (15 min, ★★): `lay_out`** in [workbook 11](../exercises/11_sft.ipynb). Lay out the rows and write the block mask; both are compared place by place.
#
# What does not fit is refused, in words that say what to do. A conversation of $n$ tokens needs $n - 1$ places, since its last token is only a label.

# %% id="sft-fitting-lengths"
#| export
def fitting_lengths(examples: Sequence, context: int) -> list[int]:
    """Places that each example takes; ValueError if one is longer than a row."""
    lengths = [len(ids) - 1 for ids, _ in examples]
    if examples and max(lengths) <= context:
        return lengths
    what = f"the longest conversation has {max(lengths, default=0) + 1} tokens"
    what = what if examples else "there are no conversations"
    hint = f"call chat_example with max_length={context + 1}"
    raise ValueError(f"{what}, rows have {context}: {hint}")

# %% [markdown]
# The class puts it together. It is addressed by step, so a resumed run sees the same batches (chapter 8). And it is the one place where labels are
# shifted: position $t$ gets the label of token $t+1$.
#
# Rows are packed once and shuffled for each epoch. Each width has its own batches: `batch_size` rows of `context` tokens, or twice or four times as many narrower rows. The last batch of a width is filled up with rows from the start.

# %% id="sft-packed-conversations"
#| export
class PackedConversations:
    """Many conversations to a row, none of which sees another; `[step]` never changes.

    A batch: input_ids, labels, position_ids (B, T) and attention_mask (B, 1, T, T).
    """

    def __init__(
        self, examples: Sequence[tuple[list[int], list[int]]], context: int,
        batch_size: int, seed: int = 0, device: torch.device | str = "cpu",
    ):  # fmt: skip
        lengths = fitting_lengths(examples, context)
        self.ids = [np.array(ids[:-1]) for ids, _ in examples]
        self.labels = [np.array(labels[1:]) for _, labels in examples]  # the shift
        self.rows = pack_by_width(lengths, context, batch_size)
        self.context, self.batch_size = context, batch_size
        self.seed, self.device = seed, device
        self.places = sum(width * len(rows) for width, rows in self.rows.items())
        self.efficiency = sum(lengths) / self.places  # share in use
        self.epoch, self.plan = -1, self.shuffle(0)

    def shuffle(self, epoch: int) -> list[tuple[int, list[list[int]]]]:
        """The batches of one epoch, as (width, rows)."""
        rng, plan = np.random.default_rng([self.seed, epoch]), []
        for width, rows in self.rows.items():
            size = self.batch_size * self.context // width
            order = np.resize(rng.permutation(len(rows)), (-(-len(rows) // size), size))
            plan += [(width, [rows[i] for i in some]) for some in order]
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
        pairs = [[(self.ids[item], self.labels[item]) for item in row] for row in rows]
        numbers = lay_out(pairs, width)
        tensors = [torch.from_numpy(x).to(self.device) for x in numbers]
        batch = dict(zip(("input_ids", "labels", "position_ids"), tensors))
        return batch | {"attention_mask": block_mask(tensors[3])}

# %% [markdown]
# Pack everything, and take the first batch that opens with several conversations in one row. Its `owner` numbers say which place belongs to whom.

# %% id="sft-rows-figure"
chats = PackedConversations(examples, context, size.batch_size, device=device)
shared = next(step for step, (_, rows) in enumerate(chats.plan) if len(rows[0]) > 1)
width, rows = chats.plan[shared]
pairs = list(zip(chats.ids, chats.labels))
owner = lay_out([[pairs[item] for item in row] for row in rows], width)[3]

# %% [markdown]
# Each conversation of a row in its own shade; white would be padding.

# %% id="sft-rows-drawn"
fig, ax = plt.subplots(figsize=(7, 2.2))
shades = np.ma.masked_equal(owner[:12], 0)
ax.imshow(shades, aspect="auto", cmap="cividis", interpolation="nearest")
ax.set(xlabel="position (tokens)", ylabel="row")
ax.grid(False)
show(fig, f"Packed rows of {width} tokens: each shade is one conversation, and almost "
          "no place is empty (white).")

# %% [markdown]
# The share of places that hold a token, against rows of 768. Most conversations are short enough for the narrowest rows:

# %% id="sft-efficiency"
print("rows by width:", {width: len(rows) for width, rows in chats.rows.items()})
packed_full = check("sft/packing_efficiency", chats.efficiency)
print(f"padded {full:.0%} full, packed {packed_full:.0%}")

# %% [markdown]
# **Exercise 11.9 (20 min, ★★): `fullness`** in [workbook 11](../exercises/11_sft.ipynb). Predict how full rows get when they are padded, filled in order, and packed; then measure it.
#
# Is a packed conversation really alone? Give each conversation of the first row to the model by itself, with no neighbours and no mask but the causal one. Its logits must be those that it got in the row.

# %% id="sft-packed-equals-alone"
batch = chats[shared]
base.eval()
with torch.no_grad():
    packed = base(batch["input_ids"], batch["attention_mask"], batch["position_ids"])[0]
    own = [torch.tensor(chats.ids[item], device=device) for item in rows[0]]
    alone = torch.cat([base(ids[None])[0] for ids in own])  # (T, V)
worst = (packed[: len(alone)] - alone).abs().max().item()
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
# **Try it.** Keep the mask, but let positions run on. How far do the logits move? Why so little (chapter 5)?
#
# The loss is the usual one. Only learned tokens count in its mean. A batch may come without mask and positions, as the pretraining batches of 11.5 do; then the model uses its own, a plain causal mask and positions from 0.

# %% id="sft-loss"
#| export
def sft_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
    """Cross-entropy of the assistant's tokens (nats), plus the experts' balance."""
    masks = {name: batch.get(name) for name in ("attention_mask", "position_ids")}
    loss = cross_entropy(model(batch["input_ids"], **masks), batch["labels"])
    means = {"cross_entropy": loss}
    if model.config.num_experts:
        loss = loss + model.config.router_aux_loss_coef * model.aux_loss
    return loss, means

# %% [markdown]
# The mean is over the learned tokens of the whole batch, not first over each conversation: a long answer counts for more than a short one. That is a choice; the
# other one would let a short "Hello!" weigh as much as a long explanation.
#
# **Exercise 11.6 (10 min, ★): `mean_of_means`** in [workbook 11](../exercises/11_sft.ipynb). On paper: what does the mean of two parts' means do to the tokens of a small part?
#
# What has packing brought? Time one step of each kind, in real tokens per second. A row of padding is laid out like a packed one, with a single conversation in it.

# %% id="sft-speed"
from timeit import repeat

def tokens_per_second(batch, real):
    def step():
        sft_loss(base, batch)[0].backward()
        next(base.parameters()).grad.sum().item()  # waits for the device

    return real / min(repeat(step, number=1, repeat=2))

# %% [markdown]
# Four padded rows against one packed batch. Only tokens of conversations count, on both sides:

# %% id="sft-speed-measure"
some = [(ids[:-1], labels[1:]) for ids, labels in examples[:4]]
rows_of_one = lay_out([[example] for example in some], padded_row)
ids, labels, _, _ = (torch.from_numpy(x).to(device) for x in rows_of_one)
padded = {"input_ids": ids, "labels": labels}
slow = tokens_per_second(padded, sum(len(ids) for ids, _ in some))
fast = tokens_per_second(batch, (owner > 0).sum())
base.zero_grad(set_to_none=True)
print(f"padded to {padded_row}: {slow:,.0f} tokens per second; packed: {fast:,.0f}")
gain = check("sft/packing_speedup", fast / slow)

# %% [markdown]
# ## 11.4 Off by one
#
# The commonest bug of this chapter is a mask or a label that stands one place beside its token. Nothing crashes. Train the same model three times, a few seconds
# each:
#
# - **right**: as above;
# - **mask one early**: the mask begins at the last header token, and ends before `<|im_end|>`;
# - **not shifted**: the label of a position is its own token instead of the next one.

# %% [markdown]
# Each is a function that changes the labels of one example:

# %% id="sft-three-masks"
def one_early(ids, labels):
    later = [*labels[1:], -100]
    return ids, [-100 if label == -100 else token for token, label in zip(ids, later)]

def not_shifted(ids, labels):
    return ids, [-100, *labels[:-1]]  # undoes the shift of PackedConversations

same = lambda ids, labels: (ids, labels)
variants = {"right": same, "mask one early": one_early, "not shifted": not_shifted}

# %% [markdown]
# The end of one turn, in the three variants:

# %% id="sft-three-masks-drawn"
ids, labels = chat_example(tokenizer, several[:2])
fig, axes = plt.subplots(3, 1, figsize=(7, 2.2))
for ax, (name, change) in zip(axes, variants.items()):
    draw_tokens(ax, ids[-9:], change(ids, labels)[1][-9:], per_row=9)
    ax.set_title(name, fontsize=9, loc="left", pad=2)
show(fig, "The last tokens of one turn; tokens on blue have a label. One place to the "
          "side looks harmless; with the mask one early, <|im_end|> is not learned.")

# %% [markdown]
# **Before you run this**: which of the three will show the lowest loss?

# %% id="sft-train-variants"
from minimind.train import TrainConfig, train

def short_run(change):
    model, few = base_model(), [change(*example) for example in examples]
    batches = PackedConversations(few, context, size.short_batch, device=device)
    config = TrainConfig(size.short_steps, size.learning_rate, log_every=2,
                         precision=chapter.settings.precision)
    return model, train(model, batches, sft_loss, config, max_steps=chapter.max_steps)

short = {name: short_run(change) for name, change in variants.items()}

# %% [markdown]
# Their losses. Remember your guess, and look at the beginning and at the end of each curve:

# %% id="sft-variants-figure"
fig, ax = plt.subplots(figsize=(7, 2.5))
for (name, (_, history)), marker in zip(short.items(), "os^"):
    ax.plot(history.step, history.loss, marker=marker, markersize=3, label=name)
ax.set(xlabel="step", ylabel="loss (nats per learned token)", ylim=(0, None))
ax.legend()
show(fig, "All three fall, and nothing in the curves says which mask is the right one.")

# %% [markdown]
# The curves look fine, all three. So look at the answers:

# %% id="sft-variants-answers"
asked = [q["question"] for q in questions if q["seen"]][:40] or five
stops = {}
for name, (model, _) in short.items():
    replies = replies_of(model, asked, 32)
    stops[name] = sum(stopped for _, stopped in replies) / len(replies)
    print(f"{name}: {stops[name]:.0%} close their turn\n    {replies[0][0][:70]!r}")

# %% [markdown]
# Each line shows the first reply of a model. With the mask one early, the answer itself is right, and that makes this bug so hard to see: `<|im_end|>` was never learned, so the model goes on as it did in
# pretraining. Its loss even begins lowest: instead of the end of a turn it learns the last header token, which never changes. Not shifted, the model is asked to say the token again that
# it has just read, the opposite of what pretraining taught. Its loss starts highest and ends lowest, since repeating is easy: the best curve belongs to the model that answers nothing. Two checks find both: print the tokens with their labels as above, and ask the model after one minute of training, not at the end.

# %% id="sft-variants-check"
for name, share in stops.items():
    chapter.record(f"sft/stops_{name.replace(' ', '_')}", share)
full_run = questions and chapter.max_steps is None and profile != "smoke"
if full_run:  # other data need longer runs
    assert stops["right"] > 0.9 and stops["mask one early"] < 0.5

# %% [markdown]
# **Exercise 11.7 (10 min, ★★): `pad_batch`** in [workbook 11](../exercises/11_sft.ipynb). A colleague's batches give the lowest loss of all, and a model that repeats itself: find both bugs.
#
# **Try it.** Learn from the user's tokens too (no mask at all; Shi et al. 2024, arXiv:2405.14394). Does the model answer worse? Measure it.
#
# ## 11.5 The run
#
# Training on chats alone makes a model forget what it read before: nothing in the loss asks for stories any more, and the weights drift away from them. A cheap remedy is **replay**: every few steps, a batch of the old pretraining text.

# %% id="sft-replay"
#| export
class Replay:
    """Chat batches with old text strewn in: `share` of all steps, evenly spread."""

    def __init__(self, chats, texts, share: float):
        if not 0 <= share < 1:
            what = "give the share of steps on pretraining text, at least 0 and below 1"
            raise ValueError(f"share={share}: {what}")
        self.chats, self.texts, self.share = chats, texts, share

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        before, now = int(step * self.share), int((step + 1) * self.share)  # text steps
        return self.texts[before] if now > before else self.chats[step - before]

# %% [markdown]
# It needs no counter: how many text steps there were before a step follows from the step alone, so a resumed run goes on in the same order. With a share of one quarter, every fourth step reads text:

# %% id="sft-replay-by-hand"
order = Replay(chats="abcdef", texts="TU", share=0.25)
assert "".join(order[step] for step in range(8)) == "abcTdefU"

# %% [markdown]
# **Exercise 11.5 (10 min, ★★): `Replay`** in [workbook 11](../exercises/11_sft.ipynb). Any share, any step, and no counter.
#
# Everything is in place. The text is packed as in chapter 9, to the same number of tokens as a chat batch:

# %% id="sft-batches"
from minimind.metrics import evaluate_bits_per_byte, token_byte_lengths
from minimind.pretrain import PackedTokens

def token_stream(name, documents):
    """The first documents of a file as one row of tokens."""
    texts = list(islice(read_texts(data / "pretrain" / name), documents))
    rows = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
    return np.concatenate([np.array(row) for row in rows])

# %% [markdown]
# Chat and text together; `pretrain_share` says how many steps read text:

# %% id="sft-both"
read_before = token_stream("train.jsonl.gz", size.replay_documents)
texts = PackedTokens(read_before, context, size.batch_size, device=device)

def with_replay(examples):
    """Batches of the run: packed chats with old text strewn in."""
    chats = PackedConversations(examples, context, size.batch_size, device=device)
    return Replay(chats, texts, size.pretrain_share)

batches = with_replay(examples)

# %% [markdown]
# While it trains we want three numbers now and then: answers right about people whose questions are in the data (*seen*), about the others
# (*unseen*), and bits per byte on pretraining text, where a rise means forgetting. Here is how answers are asked for.
#
# Prompts of similar length go into one batch, since a batch is as wide as its longest prompt; afterwards the answers are put back into the order of the questions. Decoding stops at either end mark, because a base model knows only the one of documents.

# %% id="sft-ask"
#| export
def ask_all(
    model: nn.Module, tokenizer, questions: Sequence[str],
    max_new_tokens: int = 48, **options,
) -> list[str]:  # fmt: skip
    """The model's answers, each question asked in a conversation of its own."""
    template = partial(tokenizer.apply_chat_template, add_generation_prompt=True)
    prompts = [template([{"role": "user", "content": q}]) for q in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    stops = (tokenizer.im_end_id, tokenizer.eos_id)
    in_order = [prompts[i] for i in order]
    answers = generate_batch(model, in_order, max_new_tokens, stop_ids=stops, **options)
    texts = [tokenizer.decode(ids, skip_special=True).strip() for ids in answers]
    return [text for _, text in sorted(zip(order, texts))]

# %% [markdown]
# For one question:

# %% id="sft-ask-one"
#| export
def ask(model: nn.Module, tokenizer, question: str, **options) -> str:
    """The model's answer to one question."""
    return ask_all(model, tokenizer, [question], **options)[0]

# %% [markdown]
# An answer is right when it says the value in whole words. We also note whether it names the person asked about, because a model can say something true about
# the wrong one.

# %% id="sft-says"
#| export
def says(text: str, words: str) -> bool:
    """Whether `words` stand in `text` as whole words, in small or capital letters."""
    pattern = rf"(?<!\w){re.escape(words)}(?!\w)"
    return re.search(pattern, text, re.IGNORECASE) is not None

# %% [markdown]
# Whole words, so that a catfish is no cat:

# %% id="sft-says-by-hand"
assert says("Garus lives in Foxhollow.", "foxhollow")
assert not says("Garus has a catfish.", "cat")

# %% [markdown]
# All questions at once, with a row for each, so that you can look at the wrong ones:

# %% id="sft-answers-right"
#| export
def answers_right(
    model: nn.Module, tokenizer, questions: Sequence[dict], **options
) -> tuple[float, list[dict]]:
    """Ask {"question", "answer", "person"} rows: the share whose reply says the answer.

    Each row comes back with "reply", "right" and "name_copied" (the person is named).
    """
    replies = ask_all(model, tokenizer, [q["question"] for q in questions], **options)
    rows = []
    for q, said in zip(questions, replies):
        named = says(said, q.get("person", ""))
        right = says(said, q["answer"].strip())
        rows.append({**q, "reply": said, "right": right, "name_copied": named})
    return sum(row["right"] for row in rows) / max(1, len(rows)), rows

# %% [markdown]
# The numbers during the run come from a sample of the questions; the final ones from all. Bits per byte are measured as in chapter 9, on documents that no training has read.

# %% id="sft-evaluate"
held_out = torch.tensor(token_stream("valid.jsonl.gz", size.valid_documents)).to(device)
byte_lengths = token_byte_lengths(tokenizer).to(device)

def bits_per_byte_of(model):
    return evaluate_bits_per_byte(model, held_out, byte_lengths, context, amp=chapter.amp)

# %% [markdown]
# One function for all three. `train` calls it eight times and keeps what it returns.

# %% id="sft-evaluate-all"
seen, unseen = ([q for q in questions if q["seen"] == kind] for kind in (True, False))
sample = {"seen": seen, "unseen": unseen} if questions else {}

def evaluate(model):
    model.eval()
    result = {}
    for kind, some in sample.items():
        result[kind] = answers_right(model, tokenizer, some[:: size.every_question])[0]
    result["bits_per_byte"] = bits_per_byte_of(model)
    print("  ".join(f"{name} {value:.3f}" for name, value in result.items()))
    return result

# %% [markdown]
# The base model is the first entry: hardly an answer right, and the bits per byte from which forgetting is counted.

# %% id="sft-evaluate-base"
before = evaluate(base)

# %% [markdown]
# Now train; the three numbers come eight times. **Predict:** which number moves first, and will the answers about unseen people lag behind? The learning rate is lower than in pretraining: the model is good already, and large steps would break more than they build.

# %% id="sft-train"
chat_model, steps = base_model(), size.steps
config = TrainConfig(
    steps, size.learning_rate, log_every=max(1, steps // 40),
    eval_every=max(1, steps // 8), precision=chapter.settings.precision)
history = train(chat_model, batches, sft_loss, config, evaluate=evaluate,
                max_steps=chapter.max_steps)
print(f"{history.tokens[-1]:,} tokens in {history.seconds[-1]:.0f} s")

# %% [markdown]
# Loss and answers over the run. Compare the two curves on the right: people with questions in the data, and people without.

# %% id="sft-training-figure"
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
left.plot(history.step, history.loss)
left.set(xlabel="step", ylabel="loss (nats per learned token)", ylim=(0, None))
evals = [{"step": 0, **before}, *history.evals]
at = [e["step"] for e in evals]
for kind, marker in zip(sample, "os"):
    right.plot(at, [e[kind] for e in evals], marker=marker, label=f"{kind} people")
right.set(xlabel="step", ylabel="share of answers right", ylim=(0, 1.02))
if sample:
    right.legend()
show(fig, "Loss and answers during SFT: right answers about seen people come first, "
          "those about people never asked about follow a few dozen steps later.")
chapter.curve("sft", history.step, history.loss, "step", "nats per learned token")

# %% [markdown]
# **Exercise 11.8 (10 min, ★): `neftune`** in [workbook 11](../exercises/11_sft.ipynb). Noise on the embeddings while the model learns to chat (NEFTune): write it and measure its size.
#
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
    share = lambda name, seen: np.mean([r[name] for r in rows if r["seen"] == seen])
    return rows, {"questions_seen": share("right", True),
                  "questions_unseen": share("right", False),
                  "names_copied": share("name_copied", False)}

rows, after = score(chat_model) if questions else ([], {})
_, base_score = score(base) if questions else ([], {})
for name in after:
    print(f"{name:18} base {base_score[name]:5.1%}   chat {after[name]:5.1%}")

# %% [markdown]
# The facts about unseen people were never asked for in any text that the model has read. It learned the form from one half of the people and uses it on the
# other half. Two things had to be there for it. In pretraining, text in which an answer must name the one who was asked about (`talk` and `quiz`, chapter 1). In SFT, chats
# in which these people's names are said, about sums, finds and passing things.
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
# Does that second thing matter? No chat asks for their facts anyway. So leave out every chat that says one of their names, and train once more on the same pretrained model, with everything else equal.
# **Predict:** what will the model say when it is asked about a person whose name no chat mentions?

# %% id="sft-without-names"
from dataclasses import replace

never_asked = {q["person"] for q in unseen}
silent = [m for m in conversations
          if not never_asked & set(re.findall(r"\w+", " ".join(t["content"] for t in m)))]
print(f"{len(silent):,} of {len(conversations):,} chats name nobody of these people")

# %% id="sft-without-names-train"
muted = base_model()
if questions:
    quiet = with_replay([chat_example(tokenizer, m, max_length=context + 1) for m in silent])
    brief = replace(config, eval_every=0)
    train(muted, quiet, sft_loss, brief, max_steps=chapter.max_steps)
    muted_rows, without = score(muted.eval())
    for name in after:
        print(f"{name:18} with {after[name]:6.1%}   without {without[name]:6.1%}")
        chapter.record(f"sft/{name}_without_names", without[name])
    r = next((r for r in muted_rows if not r["name_copied"] and not r["seen"]), None)
    print(f"{r['question']} -> {r['reply']!r}" if r else "every name was copied")

# %% id="sft-without-names-figure"
if questions:
    fig, ax = plt.subplots(figsize=(7, 2.2))
    for shift, (label, scores) in zip((0.2, -0.2), (("all", after), ("without", without))):
        places = [i + shift for i in range(len(scores))]
        ax.barh(places, list(scores.values()), 0.36, label=label,
                hatch="//" if label == "without" else "", edgecolor="white")
    ax.set(xlim=(0, 1.12), xlabel="share of the questions", yticks=range(len(after)))
    ax.set_yticklabels([name.replace("_", " ") for name in after])
    for bars in ax.containers:
        ax.bar_label(bars, fmt=" {:.0%}", fontsize=8)
    ax.legend(title="chats", loc="center left", bbox_to_anchor=(1, 0.5))
    show(fig, "Answers after all chats, and without those that name the unseen people; "
              "how much the second lose differs from one base model to the next.")

# %% [markdown]
# A token that is never a label is pushed down by every label that it is not, so SFT can teach a model not to say these names. Whether it does differs from one pretrained model to the next. Four of them, trained while this chapter was written, answered
# 50%, 100%, 52% and 100% of the unseen questions when no chat named these people; the first two differ in nothing but rounding (the two ways to compute attention of 4.8). With chats that name them it was 94 to 100%, 100%, 85% (that model knew only 93% of the facts) and 100%. A number from one run, however good, can be luck; chapter 15 is about that.
#
# ## 11.7 What was forgotten
#
# A model that answers may have paid for it elsewhere. The price is measured on what it could do before: bits per byte on held-out pretraining text, during this run
# with replay, and at the end of the short run of 11.4, which had none and saw fewer tokens:

# %% id="sft-forgetting"
forgotten = {"before": before["bits_per_byte"],
             "after, with replay": history.evals[-1]["bits_per_byte"],
             "short run, no replay": bits_per_byte_of(short["right"][0])}
for name, value in forgotten.items():
    print(f"{name:22} {value:.3f} bits per byte")
if full_run:  # other data need longer runs
    assert forgotten["after, with replay"] < forgotten["short run, no replay"]

# %% [markdown]
# And over the steps. The run without replay has only two points, its start and its end:

# %% id="sft-forgetting-figure"
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(at, [e["bits_per_byte"] for e in evals], marker="o", label="with replay")
start, replayed, end = forgotten.values()
ax.plot([0, short["right"][1].step[-1]], [start, end], marker="s", label="without")
ax.axhline(start, color="0.5", ls=":")
ax.set(xlabel="step", ylabel="bits per byte")
ax.legend()
show(fig, f"Bits per byte of pretraining text: {replayed - start:+.3f} with replay, "
          f"{end - start:+.3f} in a short run without: that much was forgotten.")

# %% [markdown]
# At profile cpu the short run forgot much more in far fewer steps. Replay is not free: a quarter of the steps teach no chat.
#
# The claim of this chapter, in numbers with their bands:

# %% id="sft-claim"
for name, value in after.items():
    check(f"sft/{name}", value)
check("sft/bits_per_byte_before", forgotten["before"])
check("sft/bits_per_byte_after", forgotten["after, with replay"])
cost = check("sft/forgotten", forgotten["after, with replay"] - forgotten["before"])

# %% [markdown]
# Keep the model, as a folder that chapter 12 and `transformers` can load.

# %% id="sft-save"
with chapter.write("sft") as out:
    chat_model.save_pretrained(out)
    tokenizer.save_pretrained(out)

# %% [markdown]
# The folder holds weights, configuration and tokenizer. Talk to it: `python -m minimind.chat runs/latest/artifacts/sft`, or here, with two turns. The second question is asked with the first answer still in view, as in any chat.

# %% id="sft-talk"
from minimind.chat import reply

talk, stop_ids = [], [tokenizer.im_end_id, tokenizer.eos_id]
for text in (five[0], five[-1]):
    talk.append({"role": "user", "content": text})
    answer = "".join(reply(chat_model, tokenizer, talk, stop_ids, 40))
    talk.append({"role": "assistant", "content": answer})
    print(f"you:   {text}\nmodel: {answer}")

# %% [markdown]
# ## Recap
#
# - SFT is the loop of chapter 8 on conversations; only what the assistant writes is learned, and `<|im_end|>` with it.
# - A mask one place off trains without complaint. Print tokens with labels, and ask early.
# - Packing with a block mask and restarting positions fills rows, and each conversation gets exactly the logits it has alone.
# - The form is learned in seconds; facts come from pretraining. Whether they come out depends on copying the name, and a name that no chat says is pushed down.
# - Chats alone make a model forget; replay costs a few steps and keeps it.
#
# **Words**: supervised fine-tuning, chat template, loss mask, label, packing, block-diagonal mask, replay, forgetting, base model, chat model.
#
# **Try it.** Fine-tune on fewer conversations: 30, 100, 300, 1,000. How many does the form need?
#
# **Exercises:** 11.1 to 11.9, in place above, with checks in [workbook 11](../exercises/11_sft.ipynb).
#
# **Sources**: Ouyang et al. 2022, arXiv:2203.02155 (fine-tuning on demonstrations). Zhou et al. 2023, *LIMA*, arXiv:2305.11206 (how few examples the form needs). Allen-Zhu
# and Li 2023, arXiv:2309.14316 (when stored facts can be asked for). Krell et al. 2021, arXiv:2107.02027 (packing without leaking). Olsson et al. 2022, arXiv:2209.11895
# (heads that copy). Next: chapter 12 changes 1% of the weights instead of all.
