# %% [markdown]
# # Workbook 9. Pretraining
#
# You write the module `minimind.pretrain` yourself: padded and packed batches, the
# loss, and the test that asks for facts. Then you find two bugs in a mask, pack
# documents without cutting them, measure how many a plain window cuts, and work out
# how large a model should be. About two hours; stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. Hints open one at a time. `solution("pretrain_loss")`
# shows that one solution and no other.
#
# Letters as in the chapter: B rows, T positions (the context), V vocabulary.

# %% id="setup"
# (filled in by the build)

# %% id="w09-imports"
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from minimind.metrics import cross_entropy

# %% [markdown] exercise="PaddedDocuments"
# ## 1. One document a row
#
# The simple way: row $r$ of batch $s$ is document $s \cdot B + r$ (after the last
# comes the first again), tokenised, with `eos_id` behind it, cut to $T + 1$ tokens.
# Inputs are its tokens without the last, labels its tokens without the first. What is
# left of a row is padding: `eos_id` in the inputs, and -100 in the labels, which the
# loss leaves out. The end of a document is learned; padding is not. (Section 9.1.)
#
# For example, a document of tokens 7, 8 with end 0 and a context of 4 gives inputs
# 7, 8, 0, 0 and labels 8, 0, -100, -100.
#
# <details><summary>Hint 1: begin with what is empty</summary>
#
# Fill ids `(B, T + 1)` with `eos_id` and labels `(B, T)` with -100, then write each
# document into its row.
#
# </details>
# <details><summary>Hint 2: how many of each</summary>
#
# A row of n tokens, its end among them, has n - 1 labels.
#
# </details>

# %% id="w09-padded-documents" exercise="PaddedDocuments" points=3 minutes=15 difficulty=2 kind="rebuild"
class PaddedDocuments:
    """One document a row, tokenised when asked for, padded to `context`."""

    def __init__(self, texts: Sequence[str], tokenizer, context: int, batch_size: int,
                 device: torch.device | str = "cpu"):
        self.texts, self.tokenizer, self.device = texts, tokenizer, device
        self.context, self.batch_size = context, batch_size

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """{"input_ids": (B, T), "labels": (B, T)}, on the device, for this step.

        The tokenizer has `encode(text)`, a list of ids, and `eos_id`.
        """
        ### BEGIN SOLUTION
        end = self.tokenizer.eos_id
        ids = torch.full((self.batch_size, self.context + 1), end)  # (B, T+1)
        labels = torch.full((self.batch_size, self.context), -100)  # (B, T)
        for row in range(self.batch_size):
            text = self.texts[(step * self.batch_size + row) % len(self.texts)]
            tokens = [*self.tokenizer.encode(text), end][: self.context + 1]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(tokens) - 1] = torch.tensor(tokens[1:])
        inputs = ids[:, :-1].to(self.device)
        return {"input_ids": inputs, "labels": labels.to(self.device)}
        ### END SOLUTION

# %% id="w09-padded-documents-check"
check("PaddedDocuments")

# %% [markdown] exercise="PackedTokens"
# ## 2. Packed windows
#
# All documents stand in one row of tokens. An epoch cuts it into `windows` windows of
# T labels each: with the numbers $0, 1, \dots$ in an order of its own for $i$, and one
# shift for the whole epoch, from 0 to $T - 1$, a window is
# $$\text{tokens}[\,iT + \text{shift} \;:\; iT + \text{shift} + T + 1\,]$$
# Inputs are its first T tokens, labels its last T. So in an epoch no label comes twice.
#
# `start(position)` says where the window at `position` of the endless row of epochs
# begins: positions 0 to `windows` - 1 are epoch 0, the next ones epoch 1. Order and
# shift of an epoch may depend on `seed` and its number alone, so that any step can be
# asked for without the steps before it. Row $r$ of batch $s$ is position
# $s \cdot B + r$. (Section 9.2.)
#
# <details><summary>Hint 1: epoch and place</summary>
#
# `divmod(position, self.windows)` gives both.
#
# </details>
# <details><summary>Hint 2: random, and always the same</summary>
#
# `np.random.default_rng([a, b])` makes a generator from two numbers. It has
# `permutation(n)` and `integers(n)`, from 0 to n - 1.
#
# </details>
# <details><summary>Hint 3: not the whole order for each row</summary>
#
# Keep the order of the latest epoch in `self.starts` and its number in `self.epoch`;
# make a new one when another epoch is asked for.
#
# </details>

# %% id="w09-packed-tokens" exercise="PackedTokens" points=5 minutes=30 difficulty=3 kind="rebuild"
class PackedTokens:
    """Full windows of a long row of tokens, in shuffled epochs."""

    def __init__(self, tokens, context: int, batch_size: int, seed: int = 0,
                 device: torch.device | str = "cpu"):
        if len(tokens) < 2 * context + 1:
            raise ValueError(f"{len(tokens)} tokens are too few for windows of "
                             f"{context}: need {2 * context + 1}")
        self.tokens, self.context, self.batch_size = tokens, context, batch_size
        self.seed, self.device = seed, device
        self.windows = (len(tokens) - 1) // context - 1  # one less: room for the shift
        self.epoch, self.starts = -1, np.empty(0, dtype=np.int64)  # of no epoch yet

    def start(self, position: int) -> int:
        """First token of the window at `position` of the endless row of epochs."""
        ### BEGIN SOLUTION
        epoch, index = divmod(position, self.windows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order, shift = rng.permutation(self.windows), rng.integers(self.context)
            self.epoch, self.starts = epoch, order * self.context + shift
        return int(self.starts[index])
        ### END SOLUTION

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """{"input_ids": (B, T), "labels": (B, T)}, int64, on the device."""
        ### BEGIN SOLUTION
        first = step * self.batch_size
        starts = [self.start(first + row) for row in range(self.batch_size)]
        rows = np.stack([self.tokens[s : s + self.context + 1] for s in starts])
        rows = torch.from_numpy(rows.astype(np.int64)).to(self.device)  # (B, T+1)
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}
        ### END SOLUTION

# %% id="w09-packed-tokens-check"
check("PackedTokens")

# %% [markdown] exercise="pretrain_loss"
# ## 3. The loss
#
# For a dense model, the cross-entropy of the next token and nothing else. A model with
# experts (`model.config.num_experts` is not 0) adds its balance loss:
# $$\text{loss} = \text{cross-entropy} +
# \text{router\_aux\_loss\_coef} \cdot \text{aux\_loss}$$
# Return two things: the loss to minimise, and a dict `{"cross_entropy": ...}` with the
# part that can be compared between models. The coefficient stands in `model.config`;
# `model.aux_loss` is what the latest call of the model left there. (Section 9.2.)
#
# <details><summary>Hint 1: the tools</summary>
#
# `cross_entropy(logits, labels)` of chapter 3 wants logits `(B, T, V)` and labels
# `(B, T)`, and leaves -100 out. The batch has its labels one ahead already.
#
# </details>
# <details><summary>Hint 2: what the dict holds</summary>
#
# The cross-entropy before anything is added.
#
# </details>

# %% id="w09-pretrain-loss" exercise="pretrain_loss" points=2 minutes=10 difficulty=1 kind="rebuild"
def pretrain_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
    """Cross-entropy of the next token (nats), with experts plus their balance loss.

    The batch is {"input_ids": (B, T), "labels": (B, T)}.
    """
    ### BEGIN SOLUTION
    loss = cross_entropy(model(batch["input_ids"]), batch["labels"])
    means = {"cross_entropy": loss}
    if model.config.num_experts:
        loss = loss + model.config.router_aux_loss_coef * model.aux_loss
    return loss, means
    ### END SOLUTION

# %% id="w09-pretrain-loss-check"
check("pretrain_loss")

# %% [markdown] exercise="facts_known"
# ## 4. What does it know?
#
# A fact is a dict with a "prompt" and an "answer". The model knows it when greedy
# writing would continue the prompt with exactly the tokens of the answer. One pass over
# prompt and answer together tells: at every position, look at the most likely next
# token. What is predicted *at* the last token of the prompt is the first of the answer.
#
# Return the share of facts known (0.0 for no facts), and a list with one dict for each
# fact: all that the fact had, with "guess", the text of the tokens that the model would
# put in the place of the answer, and "known". At most `batch_size` facts go through the
# model at once. (Section 9.6.)
#
# <details><summary>Hint 1: one row of predictions</summary>
#
# With 3 tokens of prompt and 2 of answer, the predictions at positions 2 and 3 are
# about the answer. The one at position 4 is about what comes after it.
#
# </details>
# <details><summary>Hint 2: rows of unequal length</summary>
#
# `nn.utils.rnn.pad_sequence(list_of_tensors, batch_first=True)` puts padding on the
# right. A position sees nothing to its right, so no mask is needed.
#
# </details>
# <details><summary>Hint 3: a copy with more in it</summary>
#
# `{**fact, "known": True}` is a new dict; the fact stays as it is.
#
# </details>

# %% id="w09-facts-known" exercise="facts_known" points=4 minutes=25 difficulty=3 kind="rebuild"
@torch.no_grad()
def facts_known(
    model: nn.Module, tokenizer, facts: Sequence[dict], batch_size: int = 64
) -> tuple[float, list[dict]]:
    """Share of facts whose answer tokens are all the most likely ones; a row per fact.

    The tokenizer has `encode(text)` and `decode(ids)`.
    """
    ### BEGIN SOLUTION
    device, rows = next(model.parameters()).device, []
    for first in range(0, len(facts), batch_size):
        some = facts[first : first + batch_size]
        prompts = [tokenizer.encode(fact["prompt"]) for fact in some]
        answers = [tokenizer.encode(fact["answer"]) for fact in some]
        both = [torch.tensor(p + a) for p, a in zip(prompts, answers)]
        ids = nn.utils.rnn.pad_sequence(both, batch_first=True)  # (B, T)
        best = model(ids.to(device)).argmax(-1).tolist()  # (B, T)
        for fact, prompt, answer, row in zip(some, prompts, answers, best):
            guess = row[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            known = {"guess": tokenizer.decode(guess), "known": guess == answer}
            rows.append({**fact, **known})
    return sum(row["known"] for row in rows) / max(1, len(rows)), rows
    ### END SOLUTION

# %% id="w09-facts-known-check"
check("facts_known")

# %% [markdown] exercise="document_mask"
# ## 5. Two bugs
#
# In a packed row a token may look back into the document before. A colleague wanted to
# forbid that, with a mask for attention (chapter 4): True where a query may look. Each
# token gets the number of its document; `<|endoftext|>` is the last token of the
# document that it ends. There are two bugs. For the tokens `5 6 0 7 8` with end 0, the
# 7 should see itself and nothing else. Find both, and repair them in place.
#
# <details><summary>Hint 1: look at the numbers</summary>
#
# The documents should be numbered 0 0 0 1 1. Print what the code makes of it. Which
# token has changed sides?
#
# </details>
# <details><summary>Hint 2: look at the diagonal</summary>
#
# `tril(0)` keeps it. What does the first token of a text see here?
#
# </details>

# %% id="w09-document-mask" exercise="document_mask" points=3 minutes=10 difficulty=2 kind="beyond"
def document_mask(ids: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Which keys each query of packed rows ids (B, T) may look at: bool (B, T, T).

    Causal, and within its own document (Krell et al. 2021, arXiv:2107.02027).
    """
    T = ids.shape[1]
    ends = (ids == eos_id).long()
    ### BEGIN SOLUTION
    document = ends.cumsum(-1) - ends  # (B, T): how many have ended before
    ### END SOLUTION
    ### BEGIN STUB
    # document = ends.cumsum(-1)  # (B, T)
    ### END STUB
    same = document[:, :, None] == document[:, None, :]  # (B, T, T)
    ### BEGIN SOLUTION
    return same & torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
    ### END SOLUTION
    ### BEGIN STUB
    # return same & torch.ones(T, T, dtype=torch.bool, device=ids.device).tril(-1)
    ### END STUB

# %% id="w09-document-mask-check"
check("document_mask")
### BEGIN HIDDEN TESTS
hidden_ids = torch.tensor([[3, 0, 0, 4, 4, 0], [1, 1, 1, 1, 1, 1]])
hidden_mask = document_mask(hidden_ids, 0)
assert hidden_mask.sum(-1).tolist() == [[1, 2, 1, 1, 2, 3], [1, 2, 3, 4, 5, 6]]
### END HIDDEN TESTS

# %% [markdown] exercise="best_fit"
# ## 6. Packing without cutting
#
# Plain windows cut documents in two, and what the second half refers to is gone. Ding
# et al. 2024 (arXiv:2404.10830) measured more invented facts for it, and packed by
# *best fit decreasing* instead: take the documents from the longest to the shortest,
# and put each into the row with the **least room that is still enough**; if there is
# none, begin a new row. Documents longer than a row are cut into pieces first; here no
# document is longer.
#
# With room for 8 and the lengths 5, 3, 6, 2, the 6 and the 5 begin rows, the 3 goes to
# the 5 and the 2 to the 6: two full rows, `[[2, 3], [0, 1]]`. The order of the rows,
# and of the documents in a row, is yours.
#
# <details><summary>Hint 1: what to remember</summary>
#
# For each row, its documents and the room that is left.
#
# </details>
# <details><summary>Hint 2: the best row</summary>
#
# Among the rows where the document fits, `min(..., key=...)` finds the one with the
# least room. `default=None` says what it gives when there is none.
#
# </details>

# %% id="w09-best-fit" exercise="best_fit" points=4 minutes=20 difficulty=2 kind="beyond"
def best_fit(lengths: Sequence[int], context: int) -> list[list[int]]:
    """Rows of document numbers; the lengths in a row add up to at most `context`."""
    ### BEGIN SOLUTION
    rows: list[list[int]] = []
    room: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        length = lengths[document]
        fitting = [row for row in range(len(rows)) if room[row] >= length]
        best = min(fitting, key=lambda row: room[row], default=None)
        if best is None:
            best = len(rows)
            rows.append([])
            room.append(context)
        rows[best].append(document)
        room[best] -= length
    return rows
    ### END SOLUTION

# %% id="w09-best-fit-check"
check("best_fit")

# %% [markdown]
# Your packing on a thousand documents of 5 to 250 tokens, in rows of 256: nothing is
# cut, and hardly anything is padding.

# %% id="w09-best-fit-try"
some_lengths = np.random.default_rng(1).integers(5, 251, 1000).tolist()
packed = best_fit(some_lengths, 256)
print(f"{len(packed)} rows, {sum(some_lengths) / (256 * len(packed)):.2%} of them text")

# %% [markdown] exercise="share_cut"
# ## 7. An experiment: how many documents are cut?
#
# Documents stand behind one another, and windows are cut at 0, T, 2T and so on. A
# document is cut when its tokens lie in more than one window. **Predict first:** all
# documents have 65 tokens, `<|endoftext|>` among them, and T is 256. Which share of
# them is cut? Write it into `predicted_cut`, to three digits.
#
# Then measure. Write `share_cut(lengths, context)`, and fill the dict `measured` for
# contexts of 128, 256, 512 and 1024, with 1,024 such documents.
#
# <details><summary>Hint 1: the prediction</summary>
#
# A document of n tokens has n - 1 places between two of its tokens, and one place in
# every T is a cut.
#
# </details>
# <details><summary>Hint 2: which window?</summary>
#
# Token number $a$ lies in window $\lfloor a / T \rfloor$. Compare the first token of a
# document with its last. `cumsum` of the lengths says where documents end.
#
# </details>

# %% id="w09-share-cut" exercise="share_cut" points=3 minutes=15 difficulty=2 kind="beyond"
### BEGIN SOLUTION
predicted_cut = (65 - 1) / 256
### END SOLUTION

def share_cut(lengths: Sequence[int], context: int) -> float:
    """Share of documents that lie in more than one window of `context` tokens."""
    ### BEGIN SOLUTION
    ends = np.cumsum(lengths)  # the first token after each document
    firsts = ends - np.asarray(lengths)
    return float(np.mean(firsts // context != (ends - 1) // context))
    ### END SOLUTION

### BEGIN SOLUTION
measured = {T: share_cut([65] * 1024, T) for T in (128, 256, 512, 1024)}
### END SOLUTION

# %% id="w09-share-cut-check"
check("share_cut")

# %% [markdown] exercise="compute_optimal"
# ## 8. Predict: how large should it be?
#
# Training takes about $C = 6ND$ operations for N weights and D tokens: two for each
# weight and token on the way forward, four on the way back. Hoffmann et al. 2022
# (arXiv:2203.15556) trained over 400 models and found that the best use of a given $C$
# has about 20 tokens for each weight, $D = 20N$.
#
# Gopher (Rae et al. 2021, arXiv:2112.11446) has 280 billion weights and read 300
# billion tokens. **Predict:** with the same compute, how many billion weights would
# have been best? Write the number (within 2%) into `best_billions`; a formula counts.
# And write `compute_optimal(flops)`, which returns N and D for any budget.
#
# <details><summary>Hint 1: one unknown</summary>
#
# Put $D = 20N$ into $C = 6ND$. Then only N is left, squared.
#
# </details>
# <details><summary>Hint 2: Gopher's budget</summary>
#
# $6 \cdot 280 \cdot 10^9 \cdot 300 \cdot 10^9$ operations. Divide by 120 and take the
# root.
#
# </details>

# %% id="w09-compute-optimal" exercise="compute_optimal" points=2 minutes=10 difficulty=1 kind="beyond"
def compute_optimal(flops: float, ratio: float = 20.0) -> tuple[float, float]:
    """Weights N and tokens D with 6 N D = flops and D = ratio * N."""
    ### BEGIN SOLUTION
    weights = (flops / (6 * ratio)) ** 0.5
    return weights, ratio * weights
    ### END SOLUTION

### BEGIN SOLUTION
best_billions = compute_optimal(6 * 280e9 * 300e9)[0] / 1e9
### END SOLUTION

# %% id="w09-compute-optimal-check"
check("compute_optimal")

# %% [markdown]
# That model was trained: Chinchilla, 70 billion weights on 1.4 trillion tokens, better
# than Gopher in nearly every test. Where a model is used often, a smaller one that
# reads more is the better buy: Llama 3 8B read almost 2,000 tokens for each weight.
#
# ## Keep what is yours
#
# `keep()` saves the classes and functions of exercises 1 to 4 that pass to
# `student/pretrain.py`. With `MINIMIND_STUDENT=student` before a command, the course
# uses them: chapter 9 then trains on batches that your code has packed.

# %% id="w09-keep"
keep()
