# %% [markdown]
# # Workbook 11. Supervised fine-tuning
#
# You write what stands between conversations and training steps: the loss mask, the
# packing, the block mask, and replay. Then you predict what a mean of means does, find
# two bugs, add noise as in NEFTune, and measure how full rows get. About two hours;
# stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. Hints open one at a time. `solution("pack")` shows that
# one solution and no other.

# %% id="setup"
# (filled in by the build)

# %% id="w11-imports"
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minimind.sft import from_json

# %% [markdown] exercise="assistant_mask"
# ## 1. Which tokens does the assistant write?
#
# A turn is `<|im_start|>`, the role, a line end, the text, `<|im_end|>`, and a line end
# that belongs to no turn. Give a list with True for each token that the assistant
# writes: its text and the `<|im_end|>` after it. Its header is not learned.
#
# The header ends with the first token that *holds* a line end, however many tokens it
# is cut into. A conversation may be cut off anywhere: a text without `<|im_end|>` goes
# to the end of the list, and a header without a line end has no text.
#
# The tokenizer has `im_start_id` and `im_end_id`, `token_bytes()` (the bytes of each
# token, as a list) and `decode(ids)`. (Chapter section 11.2.)
#
# <details><summary>Hint 1: a plan</summary>
#
# For each `<|im_start|>`: find the place behind the next line end (there the text
# begins) and the place behind the next `<|im_end|>` (there it is over). What lies
# between the first two, decoded, is the role.
#
# </details>
# <details><summary>Hint 2: where the role stands</summary>
#
# Only the header says who speaks. A user may write the word "assistant", too.
#
# </details>
# <details><summary>Hint 3: a line end in a token</summary>
#
# `b"\n" in tokenizer.token_bytes()[token]`. Call `token_bytes()` once: it is a long
# list.
#
# </details>

# %% id="w11-assistant-mask" exercise="assistant_mask" points=4 minutes=20 difficulty=2 kind="rebuild"
def assistant_mask(tokenizer, ids: Sequence[int]) -> list[bool]:
    """True for what the assistant writes: its text and the <|im_end|> after it."""
    ### BEGIN SOLUTION
    mask, token_bytes, place = [False] * len(ids), tokenizer.token_bytes(), 0
    while place < len(ids):
        if ids[place] != tokenizer.im_start_id:
            place += 1
            continue
        body = place + 1
        while body < len(ids) and b"\n" not in token_bytes[ids[body]]:
            body += 1
        role = tokenizer.decode(ids[place + 1 : body + 1]).strip()
        place = body + 1
        while place < len(ids) and ids[place - 1] != tokenizer.im_end_id:
            mask[place] = role == "assistant"
            place += 1
    return mask
    ### END SOLUTION

# %% id="w11-assistant-mask-check"
check("assistant_mask")

# %% [markdown] exercise="chat_example"
# ## 2. Tokens and labels
#
# A conversation as two lists of equal length: the ids of the chat template, cut after
# `max_length` tokens, and the labels: the token itself where the assistant wrote it,
# else -100. They are not shifted here.
#
# `tokenizer.apply_chat_template(messages, tools=tools)` gives the ids. Chat files hold
# two things as JSON text, and the template wants objects; `from_json(value)` makes one
# of a text and leaves anything else alone. `messages[0]` may have `"tools"`, which
# count unless tools are given; and any message may have `"tool_calls"`. The messages
# that you got must stay as they are. (Section 11.2.)
#
# <details><summary>Hint 1: the order</summary>
#
# First the template, then the cut, then the mask: a mask of the whole conversation
# would be too long.
#
# </details>
# <details><summary>Hint 2: a message with one part changed</summary>
#
# `message | {"tool_calls": ...}` is a new dict; the old one stays.
#
# </details>

# %% id="w11-chat-example" exercise="chat_example" points=3 minutes=10 difficulty=2 kind="rebuild"
def chat_example(tokenizer, messages: list[dict], max_length: int | None = None,
                 tools: list[dict] | None = None) -> tuple[list[int], list[int]]:
    """One conversation as (ids, labels) of equal length, cut after `max_length` tokens.

    labels[i] is ids[i] where the assistant wrote token i, else -100; not shifted yet.
    """
    ### BEGIN SOLUTION
    if tools is None:
        tools = from_json(messages[0].get("tools"))
    parsed = [m | {"tool_calls": from_json(m["tool_calls"])} if m.get("tool_calls")
              else m for m in messages]
    ids = tokenizer.apply_chat_template(parsed, tools=tools)[:max_length]
    mask = assistant_mask(tokenizer, ids)
    return ids, [token if mine else -100 for token, mine in zip(ids, mask)]
    ### END SOLUTION

# %% id="w11-chat-example-check"
check("chat_example")

# %% [markdown] exercise="pack"
# ## 3. Suitcases
#
# Put items of these lengths into rows of `width` places. Take the longest item first,
# and put each into the row that it fills **best**: the one that has the least room of
# those where it still fits. Where it fits nowhere, open a new row. Return the rows as
# lists of item *numbers*. For example, the lengths 5, 7, 2, 3, 6, 4, 2 in rows of 10
# give 7+3, 6+4 and 5+2+2. No item is longer than a row. (Section 11.3.)
#
# <details><summary>Hint 1: numbers, not lengths</summary>
#
# `sorted(range(n), key=...)` sorts the numbers of items by something else.
#
# </details>
# <details><summary>Hint 2: the best row</summary>
#
# Keep a list with the room of each row. Among the rows with enough room, `min` with a
# `key` finds the fullest. This is slow for a million conversations, and right; the
# chapter's drawers are the same idea, faster.
#
# </details>

# %% id="w11-pack" exercise="pack" points=4 minutes=20 difficulty=2 kind="rebuild"
def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of item numbers, `width` places each: longest first, where it fits best."""
    ### BEGIN SOLUTION
    rows, room = [], []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [row for row in range(len(rows)) if room[row] >= lengths[item]]
        if not fits:
            rows.append([])
            room.append(width)
        best = min(fits, key=lambda row: room[row]) if fits else -1
        rows[best].append(item)
        room[best] -= lengths[item]
    return rows
    ### END SOLUTION

# %% id="w11-pack-check"
check("pack")

# %% [markdown] exercise="lay_out"
# ## 4. Strangers in one row
#
# `lay_out` puts conversations one behind the other. A row is a list of (ids, labels)
# pairs. Return four whole-number arrays (B, T) with, for each place: the token, the
# label, the position within its own conversation, and the number of its owner, 1, 2, 3
# and so on in each row. What is left over at the end has token 0, label -100, position
# 0 and owner 0.
#
# `block_mask(owner)` says who may look where, as bool (B, 1, T, T): at earlier
# positions and one's own, of one's own owner only. The padding is an owner like any
# other, so no row of the mask is empty. (Section 11.3.)
#
# <details><summary>Hint 1: filling</summary>
#
# Begin with arrays that hold what padding has; then each conversation writes over its
# own stretch. Keep the place where the next one starts.
#
# </details>
# <details><summary>Hint 2: all pairs at once</summary>
#
# `owner[:, :, None] == owner[:, None, :]` compares each place with each. What is
# missing is the order, and a dimension for the heads.
#
# </details>

# %% id="w11-lay-out" exercise="lay_out" points=4 minutes=15 difficulty=2 kind="rebuild"
def lay_out(rows: Sequence, width: int) -> list[np.ndarray]:
    """Rows of (ids, labels) pairs as ids, labels, positions and owners, each (B, T)."""
    ### BEGIN SOLUTION
    ids, positions, owner = np.zeros((3, len(rows), width), dtype=np.int64)
    labels = np.full_like(ids, -100)
    for r, row in enumerate(rows):
        start = 0
        for number, (tokens, learned) in enumerate(row, 1):
            place = slice(start, start + len(tokens))
            ids[r, place], labels[r, place] = tokens, learned
            positions[r, place], owner[r, place] = range(len(tokens)), number
            start = place.stop
    return [ids, labels, positions, owner]
    ### END SOLUTION


def block_mask(owner: Tensor) -> Tensor:
    """Who may look where, (B, 1, T, T): earlier positions of one's own owner (B, T)."""
    ### BEGIN SOLUTION
    same_owner = owner[:, :, None] == owner[:, None, :]  # (B, T, T)
    return same_owner.tril()[:, None]
    ### END SOLUTION

# %% id="w11-lay-out-check"
check("lay_out")

# %% [markdown] exercise="Replay"
# ## 5. Replay
#
# Chat batches with old text strewn in. Of the first $n$ steps,
# $\lfloor n \cdot \text{share} \rfloor$ read text, for every $n$. So step $s$ reads
# text if that number grows from $n = s$ to $n = s + 1$. Both sources are read in their
# order, and none of their batches is left out: with a share of one quarter the steps
# are a b c **T** d e f **U**. Keep no counter: `replay[7]` must be the same whatever
# was asked before, so that a run can go on in the middle. A share below 0, or of 1 and
# more, is a `ValueError`. (Section 11.5.)
#
# <details><summary>Hint 1: which text?</summary>
#
# Before step $s$ there were $\lfloor s \cdot \text{share} \rfloor$ steps of text. That
# is the number of the next one.
#
# </details>
# <details><summary>Hint 2: which chat?</summary>
#
# All steps before that were no text were chats.
#
# </details>

# %% id="w11-replay" exercise="Replay" points=3 minutes=10 difficulty=2 kind="rebuild"
class Replay:
    """Chat batches with old text strewn in: `share` of all steps, evenly spread."""

    def __init__(self, chats, texts, share: float):
        ### BEGIN SOLUTION
        if not 0 <= share < 1:
            raise ValueError(f"share={share}: expected at least 0 and below 1")
        self.chats, self.texts, self.share = chats, texts, share
        ### END SOLUTION

    def __getitem__(self, step: int):
        ### BEGIN SOLUTION
        old, new = math.floor(step * self.share), math.floor((step + 1) * self.share)
        return self.texts[old] if new > old else self.chats[step - old]
        ### END SOLUTION

# %% id="w11-replay-check"
check("Replay")

# %% [markdown] exercise="mean_of_means"
# ## 6. Predict: a mean of means
#
# The loss of section 11.3 is the mean over all learned tokens of a batch. When a batch
# is too large for the memory, it is cut into parts, and many programs then took the
# mean of the parts' means. Take two parts: one has 10 learned tokens with a mean loss
# of 3, the other 190 learned tokens with a mean loss of 1. On paper:
#
# - `predicted_tokens`: the mean over all learned tokens;
# - `predicted_parts`: the mean of the two means;
# - `predicted_weight`: in the second, how many times as much does one token of the
#   small part count as one token of the large part?
#
# A formula counts as a number.
#
# <details><summary>Hint 1: the sum behind a mean</summary>
#
# Ten tokens with a mean of 3 have a sum of 30.
#
# </details>
# <details><summary>Hint 2: the weight of one token</summary>
#
# In the mean of two means, each part has a weight of one half, however many tokens
# share it.
#
# </details>

# %% id="w11-mean-of-means" exercise="mean_of_means" points=2 minutes=10 difficulty=1 kind="beyond"
### BEGIN SOLUTION
predicted_tokens = (10 * 3 + 190 * 1) / (10 + 190)
predicted_parts = (3 + 1) / 2
predicted_weight = 190 / 10
### END SOLUTION

# %% id="w11-mean-of-means-check"
check("mean_of_means")

# %% [markdown] exercise="pad_batch"
# ## 7. Two bugs
#
# A colleague pads instead of packing: one conversation to a row, filled up with
# `pad_id`. The loss falls to almost nothing, lower than anybody else's, and the model
# says again, whatever it is asked, what it has just read. There are two bugs; repair
# them in place.
#
# <details><summary>Hint 1: print it</summary>
#
# Two short examples are enough, say `([5, 6, 7, 8], [-100, -100, 7, 8])` and a shorter
# one. For each place: which token stands there, and which one must it predict?
#
# </details>
# <details><summary>Hint 2: too easy</summary>
#
# What is learned where there is no conversation any more?
#
# </details>

# %% id="w11-pad-batch" exercise="pad_batch" points=3 minutes=10 difficulty=2 kind="beyond"
def pad_batch(examples, pad_id):
    """(ids, labels) pairs of `chat_example` as a batch, each (B, T).

    The labels are shifted: at each place stands the token that comes next.
    """
    T = max(len(ids) for ids, _ in examples) - 1
    input_ids = torch.full((len(examples), T), pad_id)
    ### BEGIN SOLUTION
    targets = torch.full((len(examples), T), -100)
    ### END SOLUTION
    ### BEGIN STUB
    # targets = torch.full((len(examples), T), pad_id)
    ### END STUB
    for row, (ids, labels) in enumerate(examples):
        n = len(ids) - 1
        input_ids[row, :n] = torch.tensor(ids[:-1])
        ### BEGIN SOLUTION
        targets[row, :n] = torch.tensor(labels[1:])
        ### END SOLUTION
        ### BEGIN STUB
        # targets[row, :n] = torch.tensor(labels[:-1])
        ### END STUB
    return {"input_ids": input_ids, "labels": targets}

# %% id="w11-pad-batch-check"
check("pad_batch")
### BEGIN HIDDEN TESTS
hidden_batch = pad_batch([([3, 4], [-100, 4]), ([5, 6, 7, 8], [-100, 6, -100, 8])], 9)
assert hidden_batch["input_ids"].tolist() == [[3, 9, 9], [5, 6, 7]]
assert hidden_batch["labels"].tolist() == [[4, -100, -100], [6, -100, 8]]
### END HIDDEN TESTS

# %% [markdown] exercise="neftune"
# ## 8. A variant: noise on the embeddings
#
# NEFTune (Jain et al. 2023, arXiv:2310.05914) adds noise to the embeddings of the
# tokens, in training alone. On AlpacaEval a fine-tuned LLaMA-2 7B went from 29.8% to
# 64.7% by nothing else. Each number of $x$, of the shape (B, T, C), gets its own noise,
# uniform between $-1$ and $1$, scaled by
# $$\frac{\alpha}{\sqrt{T\,C}}$$
# so that the noise of a row, all its numbers together, has about the same length
# whatever T and C are. Leave `x` itself as it is.
#
# <details><summary>Hint 1: uniform numbers</summary>
#
# `torch.rand_like(x)` is uniform between 0 and 1. Stretch it and move it.
#
# </details>
# <details><summary>Hint 2: which sizes</summary>
#
# T and C are the last two dimensions; the number of rows does not count.
#
# </details>

# %% id="w11-neftune" exercise="neftune" points=3 minutes=10 difficulty=1 kind="beyond"
def neftune(x: Tensor, alpha: float = 5.0) -> Tensor:
    """Embeddings x (B, T, C) with uniform noise of at most alpha / sqrt(T * C)."""
    ### BEGIN SOLUTION
    T, C = x.shape[-2:]
    noise = 2 * torch.rand_like(x) - 1
    return x + alpha / math.sqrt(T * C) * noise
    ### END SOLUTION

# %% id="w11-neftune-check"
check("neftune")

# %% [markdown] exercise="fullness"
# ## 9. An experiment: how full do rows get?
#
# A thousand conversations, with lengths spread evenly from 1 to 256, go into rows of
# 256 places: **padded**, each in a row of its own; **in order**, as they come, with a
# new row whenever the next one does not fit any more behind the last; or **packed**, by
# your `pack`. Which share of the places holds a token?
#
# **Predict first**, within 0.05: `predicted_padded`, `predicted_in_order`,
# `predicted_packed`.
#
# Then measure. Write `in_order(lengths, width)`, which returns rows of item numbers as
# `pack` does, and never looks back at a row that it has left; and
# `fullness(rows, lengths, width)`, the share of places in use. Fill the dict `measured`
# for `lengths`: `"padded"`, `"in order"`, `"packed"`. Correct your predictions where
# they were wrong.
#
# <details><summary>Hint 1: padded</summary>
#
# The rows are `[[0], [1], [2], ...]`. The mean of numbers spread evenly from 1 to 256
# is half of the width.
#
# </details>
# <details><summary>Hint 2: in order</summary>
#
# Two rows in a row: the first item of the second did not fit into the first. So both
# together hold more than one width: more than half is always full. The truth lies
# halfway between that and a full row.
#
# </details>
# <details><summary>Hint 3: the last row</summary>
#
# `rows[-1]` is the one to look at. How much stands in it already?
#
# </details>

# %% id="w11-fullness" exercise="fullness" points=4 minutes=20 difficulty=2 kind="beyond"
lengths = torch.randint(1, 257, (1000,), generator=torch.Generator().manual_seed(0))
lengths = lengths.tolist()

### BEGIN SOLUTION
predicted_padded = 1 / 2
predicted_in_order = 3 / 4
predicted_packed = 1
### END SOLUTION

def in_order(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of item numbers in their order; a new row where the next does not fit."""
    ### BEGIN SOLUTION
    rows, room = [], 0
    for item, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = width
        rows[-1].append(item)
        room -= length
    return rows
    ### END SOLUTION


def fullness(rows: list[list[int]], lengths: Sequence[int], width: int) -> float:
    """The share of places that hold a token."""
    ### BEGIN SOLUTION
    return sum(lengths[item] for row in rows for item in row) / (len(rows) * width)
    ### END SOLUTION

### BEGIN SOLUTION
measured = {
    "padded": fullness([[item] for item in range(1000)], lengths, 256),
    "in order": fullness(in_order(lengths, 256), lengths, 256),
    "packed": fullness(pack(lengths, 256), lengths, 256),
}
### END SOLUTION

# %% id="w11-fullness-check"
check("fullness")

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves what passes of exercises 1 to 5 to `student/sft.py`. With
# `MINIMIND_STUDENT=student` before a command, the course uses it: your masks and rows
# train the chat model.

# %% id="w11-keep"
keep()
