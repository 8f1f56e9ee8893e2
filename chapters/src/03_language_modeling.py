# %% [markdown]
# # 3. Language modeling
#
# A language model says how likely each next token is. In this chapter you will
#
# - build one by counting letters, and let it write,
# - measure surprise: cross-entropy, perplexity, and bits per byte,
# - train the same model by gradient descent, and see it arrive at the counts,
# - find the loss that an untrained model must have,
# - set the baseline that every later model must beat, and challenge it with a first small network.
#
# You need logarithms, a gradient, and the tokenizer of chapter 2.
#
# Reading 35 minutes; running: smoke 10 s, cpu 35 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# ## 3.1 What comes next?
#
# Cover the end of this sentence and guess: *The cat sat on the*. You could, because you have seen much text. A machine can see text too, and count. We start with letters, because their table is small enough to look at.

# %% id="language-letters"
from collections import Counter
from itertools import islice

import torch
from minimind.data import read_texts, set_seed

set_seed(1)
data = chapter.read("data")
some = list(islice(read_texts(data / "pretrain" / "train.jsonl.gz"),
                   chapter.size.letter_texts))
# rarer letters become "?"
common = [c for c, _ in Counter("\n".join(some)).most_common(60)]
alphabet = sorted({*common, "\n", "?"})
print(len(alphabet), "letters:", "".join(alphabet).replace("\n", "⏎"))

# %% [markdown]
# Each letter gets a number. Row `a`, column `b` of the table counts how often `b` came right after `a`.

# %% id="language-count"
number = {c: i for i, c in enumerate(alphabet)}


def letter_ids(texts: list[str]) -> torch.Tensor:
    """One long row of letter numbers, a line end after each text."""
    return torch.tensor([number.get(c, number["?"]) for text in texts
                         for c in text + "\n"])


ids = letter_ids(some)
V = len(alphabet)
counts = torch.bincount(ids[:-1] * V + ids[1:],
                        minlength=V * V).view(V, V).float()  # (V, V)
assert counts.sum() == len(ids) - 1

# %% [markdown]
# Divide each row by its sum, and a count becomes a probability: the share of the times that `b` followed `a`.

# %% id="language-probabilities"
rows = counts.sum(1, keepdim=True)
P = counts / rows.clamp(min=1)  # (V, V): P[a, b] = p(b | a)
assert torch.allclose(P.sum(1)[rows[:, 0] > 0], torch.ones(()))

# %% [markdown]
# Look for the dark squares. Some letters leave no doubt about what comes next.

# %% id="language-heat"
import matplotlib.pyplot as plt

shown = [number[c] for c in sorted(c for c in common if c.isalpha() and c.islower()
                                   or c in " .")]
labels = [alphabet[i].replace(" ", "␣") for i in shown]
fig, ax = plt.subplots(figsize=(5.2, 4.6))
image = ax.imshow(P[shown][:, shown], cmap="Greys", vmin=0, vmax=1)
ax.set_xticks(range(len(shown)), labels)
ax.set_yticks(range(len(shown)), labels)
ax.set(xlabel="next letter", ylabel="this letter")
ax.grid(False)
fig.colorbar(image, label="probability", shrink=0.8)
show(fig, "Next-letter probabilities counted in the text: each row is one letter; a "
          "dark square is a letter that almost always follows.")

# %% [markdown]
# In JupyterLab, choose a letter and see its row.

# %% id="language-widget" tags=["widget"]
def row_of(letter: str) -> str:
    """The five likeliest letters after `letter`, as lines with bars."""
    top = P[number[letter]].topk(5)
    return "".join(f"{alphabet[i]!r:5} {'#' * round(40 * p)} {p:.2f}\n"
                   for p, i in zip(*(x.tolist() for x in top)))


try:
    from ipywidgets import HTML, Dropdown, VBox

    choice, lines = Dropdown(options=[c for c in alphabet if c.isalpha()],
                             description="letter"), HTML()

    def fill(_):
        lines.value = f"<pre>{row_of(choice.value)}</pre>"

    choice.observe(fill, "value")
    fill(None)
    display(VBox([choice, lines]))
except ImportError:
    print("pip install ipywidgets shows a list of letters here")

# %% [markdown]
# A table of probabilities can write: draw a next letter, go to its row, draw again.

# %% id="language-write"
def write(table: torch.Tensor, length: int = 90, seed: int = 0) -> str:
    """Draw letters one after the other, starting after a line end."""
    draw, at, out = torch.Generator().manual_seed(seed), number["\n"], []
    for _ in range(length):
        at = torch.multinomial(table[at], 1, generator=draw).item()
        out.append(alphabet[at])
    return "".join(out).replace("\n", " / ")


unigram = (counts.sum(0) / counts.sum()).expand(V, V)  # the same row for every letter
print("one letter:  ", write(unigram))
print("pairs:       ", write(P))

# %% [markdown]
# The first line ignores what came before. The second looks one letter back, and already makes syllables. This is a **bigram** model, as old as Shannon (1948).
#
# **Try it.** Count triples: `counts3` of shape (V, V, V). Write 90 letters with it. How many of its V·V rows did the text never fill?
#
# ## 3.2 How good is it?
#
# We need one number. A good model gives high probability to what really comes. The probability of a whole text is a product of one factor for each letter, and underflows at once:

# %% id="language-product"
steps = P[ids[:400], ids[1:401]]  # the probability of each next letter
print("after 20 letters:", steps[:20].prod().item(), "  after 400:",
      steps.prod().item())
assert steps.prod() == 0 and steps.log().sum() < -100

# %% [markdown]
# So we add logarithms. The **surprise** of one step is $-\ln p$, in nats: 0 for what was certain, large for what seemed impossible.

# %% id="language-surprise"
p = torch.linspace(0.005, 1, 200)
fig, ax = plt.subplots(figsize=(5.5, 2.5))
ax.plot(p, -p.log())
for point in (0.5, 0.1, 0.01):
    value = -torch.tensor(point).log()
    ax.plot(point, value, "o", color="black")
    ax.annotate(f"p = {point}: {value:.2f}", (point, value), xytext=(6, 3),
                textcoords="offset points")
ax.set(xlabel="probability given to what came", ylabel="surprise (nats)")
show(fig, "Surprise grows slowly at first and without bound: half as likely always "
          "costs another 0.69 nats.")

# %% [markdown]
# The mean surprise over a text is the **cross-entropy**, and it is the loss of all training in this course. For logits $z$ (any real numbers, one for each token) the probability is
#
# $$p_i = \frac{e^{z_i}}{\sum_j e^{z_j}}, \qquad \text{loss} = -\frac1N \sum_{n} \ln p_{\,\text{label}_n}.$$
#
# Three tokens, two positions, by hand:

# %% id="language-by-hand"
z = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])  # (N, V)
label = torch.tensor([0, 2])
p = z.exp() / z.exp().sum(1, keepdim=True)
loss = -p[[0, 1], label].log().mean()
print(p, loss)

# %% [markdown]
# The final form is torch's own, which never computes $e^{z}$ of a large $z$. Positions marked -100 do not count; we will need this for chats in chapter 11.

# %% id="language-default-exp"
#| default_exp metrics

# %% id="language-imports"
#| export
import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn import functional as F

from minimind.tokenizer import Tokenizer

# %% [markdown]
# One error is common enough to deserve its own message: labels that do not fit the logits.

# %% id="language-cross-entropy"
#| export
def cross_entropy(logits: torch.Tensor, labels: torch.Tensor,
                  ignore_index: int = -100) -> torch.Tensor:
    """Mean of -ln p(label) in nats, in float32, over all labels but ignore_index.

    logits (B, T, V); labels (B, T), already shifted: labels[b, t] is the target of
    position t.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} need labels "
                         f"{tuple(logits.shape[:-1])}, not {tuple(labels.shape)}")
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(),
                           ignore_index=ignore_index)


# %% [markdown]
# It agrees with the sum by hand, and with what we ignore left out:

# %% id="language-cross-entropy-check"
assert torch.isclose(cross_entropy(z[None], label[None]), loss)
assert torch.isclose(cross_entropy(z[None], torch.tensor([[0, -100]])), -p[0, 0].log())

# %% [markdown]
# **Exercise 3.1 (15 min, ★★): `cross_entropy`** in [workbook 3](../exercises/03_language_modeling.ipynb). Write it from the formula: in float32, without the ignored positions, and with the message for labels that do not fit.
#
# **Predict before you run:** a model that knows nothing gives each of the V letters the same probability. What is its loss?

# %% id="language-ln-v"
nothing = torch.zeros(1, 4, V)  # equal logits
untrained = cross_entropy(nothing, ids[None, :4]).item()
print(f"loss {untrained:.4f}, ln V = {math.log(V):.4f}")
assert abs(untrained - math.log(V)) < 1e-6

# %% [markdown]
# Each letter has $p = 1/V$, so the surprise is $-\ln(1/V) = \ln V$, whatever comes. **The loss of an untrained model is ln V**: 7.6 for the 2,048 tokens of this course. Check it at the first step of every run. A higher first loss means that the start is too sure of itself:

# %% id="language-too-sure"
scales = [0.01, 0.1, 0.3, 1, 2, 3, 5]
first = [cross_entropy(scale * torch.randn(1, 4000, V),
                       torch.randint(V, (1, 4000))).item() for scale in scales]
fig, ax = plt.subplots(figsize=(6, 2.5))
ax.plot(scales, first, "o-", label="random logits")
ax.axhline(math.log(V), color="black", ls=":", label="ln V")
ax.set(xlabel="standard deviation of the random logits", ylabel="loss (nats)")
ax.legend()
show(fig, "The first loss of a random model: ln V while the logits are small, and more "
          "for each step towards being sure of nonsense.")
assert abs(first[0] - math.log(V)) < 0.01 < first[-1] - math.log(V)

# %% [markdown]
# In between, e to the loss reads well: a loss of $\ln 10$ is as bad as a fair choice among ten. This is the **perplexity**.

# %% id="language-perplexity"
#| export
def perplexity(nats: float) -> float:
    """e to the mean nats per token: as unsure as a fair choice among so many."""
    return math.exp(nats)


# %% [markdown]
# Our letter counts against knowing nothing:

# %% id="language-letter-losses"
count_loss = -(counts[counts > 0] * P[counts > 0].log()).sum().item() / (len(ids) - 1)
letter_loss = -(unigram[0][ids[1:]]).log().mean().item()
for name, nats in (("nothing", math.log(V)), ("single letters", letter_loss),
                   ("pairs", count_loss)):
    print(f"{name:15} {nats:.3f} nats, perplexity {perplexity(nats):5.1f}")
assert count_loss < letter_loss < math.log(V)

# %% [markdown]
# ## 3.3 The same model, trained
#
# Counting stops being possible soon. A network does not count: it has weights, and follows the gradient of the loss. Take the smallest one that could learn our table: a weight $W_{ab}$ for each pair, used as the logit of `b` after `a`. Before any step its weights are 0, so its loss is ln V.

# %% id="language-neural"
W = torch.zeros(V, V, requires_grad=True)
share = counts / counts.sum()  # how often each pair occurs: the whole text in one batch
optimizer = torch.optim.Adam([W], lr=0.5)

# %% [markdown]
# The gradient has a simple form: predicted share minus counted share. It is zero exactly where the prediction equals the count. Let autograd confirm it.

# %% id="language-gradient"
loss = -(share * W.log_softmax(1)).sum()
loss.backward()
predicted = share.sum(1, keepdim=True) * W.softmax(1)
assert abs(loss.item() - math.log(V)) < 1e-5
assert torch.allclose(W.grad, predicted - share, atol=1e-6)

# %% [markdown]
# **Predict:** where will the loss end, if training goes on for long?

# %% id="language-train-bigram"
curve = []
for _ in range(chapter.steps(chapter.size.bigram_steps)):
    loss = -(share * W.log_softmax(1)).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    curve.append(loss.item())
print(f"trained {curve[-1]:.4f}, counted {count_loss:.4f}")

# %% [markdown]
# The picture shows the whole training against the number that counting gave.

# %% id="language-train-bigram-plot"
fig, ax = plt.subplots(figsize=(6, 2.5))
ax.plot(range(1, len(curve) + 1), curve, label="trained by gradient")
ax.axhline(count_loss, color="black", ls=":", label="counted")
ax.set(xlabel="steps", ylabel="loss (nats per letter)", xscale="log")
ax.legend()
show(fig, "The trained bigram starts at ln V and falls to the loss of the counted one, "
          "never below it.")
if chapter.max_steps is None:
    assert abs(curve[-1] - count_loss) < 0.01
    assert (W.softmax(1) - P)[rows[:, 0] > 100].abs().max() < 0.02

# %% [markdown]
# **Counting and training arrive at the same table.** Counting is the exact answer for this one model. Training is the method that still works when the model has a million weights and no formula.
#
# **Try it.** Train again on random batches of 1,000 pairs in place of all of them. How close to `count_loss` does it come, and what does a smaller learning rate change?
#
# ## 3.4 New text, and the count of zero
#
# A model is judged on text that it was not made from. Suppose we had only twenty texts to count, and take the held-out texts as new. **Predict:** what does the table say of a pair that it never saw?

# %% id="language-zero"
few = letter_ids(some[:20])
few_counts = torch.bincount(few[:-1] * V + few[1:], minlength=V * V).view(V, V).float()
held = letter_ids(list(islice(read_texts(data / "pretrain" / "valid.jsonl.gz"),
                              chapter.size.valid_texts)))
p = (few_counts / few_counts.sum(1, keepdim=True).clamp(min=1))[held[:-1], held[1:]]
print(f"{(p == 0).sum():,} of {len(p):,} held-out pairs were never counted; loss "
      f"{-p.log().mean():.3f}")
assert (p == 0).any() and torch.isinf(-p.log().mean())

# %% [markdown]
# One impossible pair makes the whole loss infinite. The oldest repair is to pretend that every pair was seen a little: add a constant before dividing (Laplace). Too little keeps the surprise of new pairs huge; too much forgets what was counted.

# %% id="language-smooth"
def smoothed(counts: torch.Tensor, constant: float) -> float:
    """Held-out loss of a table of counts with `constant` added to each."""
    table = (counts + constant) / (counts + constant).sum(1, keepdim=True)
    return -table[held[:-1], held[1:]].log().mean().item()


constants = [10.0**k for k in range(-6, 4)]
fig, ax = plt.subplots(figsize=(6, 2.5))
ax.plot(constants, [smoothed(few_counts, c) for c in constants], "o-",
        label="20 texts counted")
ax.plot(constants, [smoothed(counts, c) for c in constants], "s--",
        label=f"{len(some):,} texts counted")
ax.set(xlabel="added to every count", ylabel="loss (nats per letter)", xscale="log")
ax.legend()
show(fig, "Held-out loss against the added constant: with few texts it matters, with "
          "many it hardly does, until it drowns the counts.")

# %% [markdown]
# ## 3.5 Bits per byte
#
# Back to tokens. A loss in nats **per token** cannot be compared between tokenizers: longer tokens are harder to guess, and there are fewer of them. Split the same surprise over what does not depend on the tokenizer, the bytes of the text, and count in bits, as one does for files:
#
# $$\text{bits per byte} = \frac{\text{nats of the whole text}}{\ln 2 \cdot \text{bytes of the text}}$$

# %% id="language-bits-per-byte"
#| export
def bits_per_byte(nats: float, num_bytes: int) -> float:
    """All nats of a text in bits, over its length in UTF-8 bytes."""
    if num_bytes <= 0:
        raise ValueError(f"num_bytes={num_bytes}: a text has at least one byte")
    return nats / math.log(2) / num_bytes


# %% [markdown]
# **Exercise 3.2 (5 min, ★): `bits_per_byte`** in [workbook 3](../exercises/03_language_modeling.ipynb). Write it and `perplexity`.
#
# **Exercise 3.3 (10 min, ★): `three_numbers`** in [workbook 3](../exercises/03_language_modeling.ipynb). A first loss, a perplexity and bits per byte, on paper.
#
# A plain file spends 8 bits on each byte, and a model that needs 2 could compress the file to a quarter. To use it for tokens, we must know how many bytes of text each token stands for. Special tokens are no text.

# %% id="language-byte-lengths"
#| export
def token_byte_lengths(tokenizer: Tokenizer) -> torch.Tensor:
    """Bytes of text that each token stands for, (V,); 0 for special tokens."""
    lengths = torch.tensor([len(token) for token in tokenizer.token_bytes()])
    lengths[list(tokenizer.special_ids.values())] = 0
    return lengths


# %% [markdown]
# **Exercise 3.4 (5 min, ★): `token_byte_lengths`** in [workbook 3](../exercises/03_language_modeling.ipynb). Bytes, not letters.
#
# The end of each document has to be predicted too. Its surprise counts, its bytes do not.

# %% id="language-tokens"
tokenizer = Tokenizer.from_pretrained(chapter.read("tokenizer"))
byte_lengths = token_byte_lengths(tokenizer)
V = tokenizer.vocab_size


def token_stream(part: str, texts: int, tokens: int) -> torch.Tensor:
    """The first texts of a part as one row of ids, an end-of-text token after each."""
    rows, ids = islice(read_texts(data / "pretrain" / f"{part}.jsonl.gz"), texts), []
    while len(ids) < tokens and (some := list(islice(rows, 1000))):
        for each in tokenizer.encode_batch(some):
            ids += [*each, tokenizer.eos_id]
    return torch.tensor(ids[:tokens])


size = chapter.size
train_ids = token_stream("train", size.train_texts, size.train_tokens)
valid_ids = token_stream("valid", size.valid_texts, size.train_tokens // 10)
print(f"{len(train_ids):,} tokens to learn from, {len(valid_ids):,} held out, "
      f"{byte_lengths[valid_ids].sum():,} bytes")

# %% [markdown]
# Now the measure that every later chapter uses. It cuts the stream into windows, runs the model, and adds up surprise and bytes. Each token but the first is predicted exactly once, so the result does not depend on the batch size.

# %% id="language-total-nats"
#| export
@torch.no_grad()
def total_nats(model: Callable, tokens: torch.Tensor, context: int, batch_size: int,
               amp: torch.dtype | None) -> float:
    """Sum of -ln p over all tokens but the first.

    Each is predicted from at most `context` tokens before it.
    """
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    device = next(parameters, tokens).device
    whole = (len(tokens) - 1) // context * context
    inputs, labels = tokens[:whole], tokens[1 : whole + 1]
    inputs, labels = inputs.view(-1, context), labels.view(-1, context)  # (N, T)
    batches = list(zip(inputs.split(batch_size),
                       labels.split(batch_size))) if whole else []
    if whole < len(tokens) - 1:  # what is left is shorter than a window
        batches.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))
    nats = 0.0
    for ids, labels in batches:
        with torch.autocast(device.type, amp) if amp else nullcontext():
            logits = model(ids.to(device))  # (B, T, V)
        nats += cross_entropy(logits, labels.to(device)).item() * labels.numel()
    return nats


# %% [markdown]
# The trap that this avoids: batches of unequal size. The mean of their means is not the mean, so we multiply back and divide once, at the end.
#
# **Exercise 3.5 (25 min, ★★★): `total_nats`** in [workbook 3](../exercises/03_language_modeling.ipynb). Windows, batches and a rest; the check compares with one token after the other.

# %% id="language-evaluate"
#| export
def evaluate_bits_per_byte(
    model: Callable, tokens: torch.Tensor | np.ndarray, byte_lengths: torch.Tensor,
    context: int = 256, batch_size: int = 32, amp: torch.dtype | None = None,
) -> float:  # fmt: skip
    """Bits per byte of `model` on ids (1-D), read in windows of `context` tokens.

    model: any callable from ids (B, T) to logits (B, T, V); a module is in eval mode
    meanwhile.
    """
    tokens = torch.as_tensor(tokens if torch.is_tensor(tokens)
                             else np.asarray(tokens, dtype=np.int64)).long()
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens: at least two are needed, one to read "
                         "and one to predict")
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        nats = total_nats(model, tokens, context, batch_size, amp)
    finally:
        if was_training:
            model.train()
    return bits_per_byte(nats, int(byte_lengths.cpu()[tokens[1:].cpu()].sum()))


# %% [markdown]
# **Exercise 3.6 (20 min, ★★): `evaluate_bits_per_byte`** in [workbook 3](../exercises/03_language_modeling.ipynb). Put the measure together; it gives a module back in the mode in which it came.
#
# The model may be any function. The one that knows nothing must give $\log_2 V$ bits for each token:

# %% id="language-uniform"
def know_nothing(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*ids.shape, V)  # (B, T, V)


uniform = evaluate_bits_per_byte(know_nothing, valid_ids, byte_lengths)
by_hand = math.log2(V) * (len(valid_ids) - 1) / byte_lengths[valid_ids[1:]].sum().item()
assert abs(uniform - by_hand) < 1e-4
print(f"{uniform:.3f} bits per byte")

# %% [markdown]
# Notice how low that is. Knowing nothing about tokens already beats 8 bits, because the tokenizer has learned which strings are common. And now letters and tokens can be compared, both by counted pairs on the same held-out text:

# %% id="language-compare"
table = torch.bincount(train_ids[:-1] * V + train_ids[1:],
                       minlength=V * V).view(V, V).float()
table = ((table + 0.01) / (table + 0.01).sum(1, keepdim=True)).log()  # (V, V) ln p
token_pairs = evaluate_bits_per_byte(lambda ids: table[ids], valid_ids, byte_lengths)
num_bytes = byte_lengths[valid_ids[1:]].sum().item()
nats = token_pairs * math.log(2) * num_bytes / (len(valid_ids) - 1)
text_bytes = byte_lengths[valid_ids].sum().item()
letter_pairs = bits_per_byte(smoothed(counts, 0.01) * (len(held) - 1), text_bytes)
print(f"letters: {smoothed(counts, 0.01):.2f} nats per letter, {letter_pairs:.3f} bits "
      "per byte")
print(f"tokens:  {nats:.2f} nats per token,  {token_pairs:.3f} bits per byte")

# %% [markdown]
# The loss per token looks worse and the model is better. **From here on, every model is judged in bits per byte.**
#
# **Try it.** Train two tokenizers of 400 and 1,500 tokens, and a pair table for each. Compare nats per token, perplexity and bits per byte. Which of the three would have misled you?
#
# ## 3.6 The baseline
#
# How far does counting go? Look back two tokens, three: the table becomes too large to fill, and most contexts of new text were never seen. So mix: trust a long context as far as it was seen, and ask a shorter one for the rest. With $c$ for counts and $T(h)$ for the number of different tokens seen after the context $h$,
#
# $$p_n(w \mid h) = \frac{c(h, w) + T(h)\, p_{n-1}(w \mid h')}{c(h) + T(h)},$$
#
# where $h'$ is $h$ without its oldest token. A context that was followed by many different tokens passes more on to the shorter one. This is Witten and Bell (1991). It needs no constant to tune.
#
# To count fast we write each run of n tokens as one number, in base V.

# %% id="language-runs"
def runs(tokens: np.ndarray, n: int) -> np.ndarray:
    """Each run of n tokens as one number in base V, its last token the last digit."""
    assert V**n < 2**63, "too many tokens for runs this long"
    keys = np.zeros(len(tokens) - n + 1, dtype=np.int64)
    for j in range(n):
        keys = keys * V + tokens[j : len(tokens) - n + 1 + j]
    return keys


assert runs(np.array([1, 2, 3]), 2).tolist() == [V + 2, 2 * V + 3]

# %% [markdown]
# Looking up a run is a search in a sorted list. The context of a run is the same number without its last digit.

# %% id="language-lookup"
def look_up(keys: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values[i] where a key equals known[i] (sorted), 0 where it is not known."""
    at = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[at] == keys, values[at], 0)


assert look_up(np.array([5, 6]), np.array([2, 6]), np.array([7, 9])).tolist() == [0, 9]

# %% [markdown]
# The formula, from the shortest context to the longest. `p` starts as 1/V, and each round is the line above with the same letters.

# %% id="language-ngram"
def ngram_probabilities(train: np.ndarray, test: np.ndarray,
                        order: int) -> list[np.ndarray]:
    """For each n up to `order`: p of each token of `test` from the n - 1 before it."""
    # something to look back on
    test = np.concatenate([np.full(max(order - 2, 0), tokenizer.eos_id), test])
    first = max(order - 1, 1)  # the first place that is predicted
    p, result = np.full(len(test) - first, 1 / V), []
    for n in range(1, order + 1):
        known, c_hw = np.unique(runs(train, n), return_counts=True)
        contexts, start, T_h = np.unique(known // V, return_index=True,
                                         return_counts=True)
        c_h = np.add.reduceat(c_hw, start)
        keys = runs(test, n)[first - n + 1 :]
        c, c_context, T = (look_up(*x)
                           for x in ((keys, known, c_hw), (keys // V, contexts, c_h),
                                     (keys // V, contexts, T_h)))
        p = np.where(c_context > 0, (c + T * p) / np.maximum(c_context + T, 1), p)
        result.append(p)
    return result


# %% [markdown]
# Probabilities must sum to one. We ask for every token after one context, which is a test that such code often fails.

# %% id="language-ngram-check"
small, context = train_ids[:2000].numpy(), train_ids[100:102].tolist()
known = np.unique(small)
new = np.setdiff1d(np.arange(V), known)  # all of these get the same probability

def p_of(w):
    return ngram_probabilities(small, np.array([*context, w]), 3)[2][-1]

assert abs(sum(p_of(w) for w in known) + len(new) * p_of(new[0]) - 1) < 1e-9

# %% [markdown]
# **Predict:** will three tokens of context beat one by much? Will the text it was counted from agree?

# %% id="language-orders"
test_bytes = byte_lengths[valid_ids[1:]].sum().item()
seen = train_ids[: len(valid_ids)].numpy()
by_order = [bits_per_byte(-np.log(p).sum(), test_bytes)
            for p in ngram_probabilities(train_ids.numpy(), valid_ids.numpy(),
                                         chapter.size.order)]
own = [bits_per_byte(-np.log(p).sum(), byte_lengths[seen[1:]].sum().item())
       for p in ngram_probabilities(train_ids.numpy(), seen, chapter.size.order)]
fig, ax = plt.subplots(figsize=(5.5, 2.6))
ax.plot(range(1, len(own) + 1), by_order, "o-", label="held-out text")
ax.plot(range(1, len(own) + 1), own, "s--", label="text that was counted")
ax.set(xlabel="n: tokens in a run", ylabel="bits per byte",
       xticks=range(1, len(own) + 1))
ax.legend()
show(fig, "Longer runs always fit the counted text better; on held-out text the gain "
          "shrinks, and may turn.")
assert own == sorted(own, reverse=True)

# %% [markdown]
# The best of these is our **baseline**: no weights, no gradient, a few seconds of counting. A network that does not beat it on held-out text has learned nothing worth its electricity. Chapter 9 will be held to it.

# %% id="language-baseline"
baseline = min(by_order)
chapter.record("baseline/uniform_bits_per_byte", uniform)
for name, value in zip(("unigram", "bigram", "trigram", "fourgram"), by_order):
    chapter.record(f"baseline/{name}_bits_per_byte", value)
_ = check("baseline/bits_per_byte", baseline)

# %% [markdown]
# **Exercise 3.8 (25 min, ★★★): `kneser_ney`** in [workbook 3](../exercises/03_language_modeling.ipynb). Kneser and Ney (1995) ask in how many different contexts a token came, not how often. Write it for pairs.
#
# **Exercise 3.9 (25 min, ★★): `floor`** in [workbook 3](../exercises/03_language_modeling.ipynb). Predict, then measure: how far can a loss fall on a text whose source is known?
#
# ## 3.7 A first network
#
# Counts treat `red` and `blue` as strangers: what was learned about one says nothing about the other. Bengio et al. (2003) gave each token a vector, a row of numbers that training is free to set. Tokens that are used alike get vectors alike, and share what they learn. Their network looks at a fixed window of tokens, joins their vectors, and predicts the next one.

# %% id="language-window-model"
class WindowModel(torch.nn.Module):
    """Predict the next token from the last `window` tokens (Bengio et al. 2003)."""

    def __init__(self, window: int, embedding: int, hidden: int):
        super().__init__()
        self.window = window
        self.embed = torch.nn.Embedding(V, embedding)
        # small, so that training can move the vectors
        torch.nn.init.normal_(self.embed.weight, std=0.1)
        self.hidden = torch.nn.Linear(window * embedding, hidden)
        self.out = torch.nn.Linear(hidden, V)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T)
        padded = F.pad(ids, (self.window - 1, 0), value=tokenizer.eos_id)
        windows = padded.unfold(1, self.window, 1)  # (B, T, window)
        x = self.embed(windows).flatten(2)  # (B, T, window * embedding)
        return self.out(torch.tanh(self.hidden(x)))  # (B, T, V)


# %% [markdown]
# Does it look into the future? Change a later token: the logits before it must not move. This test will come back in chapter 4.

# %% id="language-causal"
model = WindowModel(chapter.size.window, chapter.size.embedding,
                    chapter.size.hidden).to(chapter.device)
x = train_ids[None, :12].to(chapter.device)
changed = x.clone()
changed[0, 8] = (changed[0, 8] + 1) % V
before, after = model(x), model(changed)
assert torch.equal(before[:, :8], after[:, :8])
assert not torch.equal(before[:, 8:], after[:, 8:])
first = cross_entropy(model(x[:, :-1]), x[:, 1:]).item()
print(f"{sum(w.numel() for w in model.parameters()):,} weights, first loss "
      f"{first:.2f}, ln V = {math.log(V):.2f}")

# %% [markdown]
# Training is the loop of section 3.3 with random stretches of text in place of the whole table. Chapter 8 makes a proper loop of it.

# %% id="language-train-window"
draw = torch.Generator().manual_seed(0)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
steps = chapter.steps(chapter.size.steps)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3,
                                               total_steps=max(steps, 2), pct_start=0.1)
losses = []
for _ in range(steps):
    at = torch.randint(len(train_ids) - 65, (chapter.size.batch, 1),
                       generator=draw) + torch.arange(65)
    rows = train_ids[at].to(chapter.device)  # (B, 65)
    loss = cross_entropy(model(rows[:, :-1]), rows[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(loss.item())

# %% [markdown]
# **Predict:** will it beat the counted pairs? The counted runs of three and four?

# %% id="language-window-result"
network = evaluate_bits_per_byte(model, valid_ids, byte_lengths, amp=chapter.amp)
per_byte = (len(train_ids) - 1) / byte_lengths[train_ids].sum().item() / math.log(2)
fig, ax = plt.subplots(figsize=(6.5, 2.8))
ax.plot(range(1, steps + 1), [loss * per_byte for loss in losses],
        label="network, on its batches", lw=1)
ax.plot(steps, network, "o", color="black", label="network, held out")
for name, value, line in (("counted pairs", by_order[1], "--"),
                          ("best count", baseline, ":")):
    ax.axhline(value, ls=line, color="0.3", label=name)
ax.set(xlabel="steps", ylabel="bits per byte", ylim=(0, None))
ax.legend()
show(fig, "A network with a window of a few tokens passes the counted pairs early in "
          "its training.")
chapter.curve("window model", range(1, steps + 1), [loss * per_byte for loss in losses],
              "steps", "bits per byte")
chapter.record("language_modeling/network_bits_per_byte", network)
_ = check("language_modeling/gain_over_bigram", by_order[1] - network)

# %% [markdown]
# Against the longest runs it is a close race. Compare what the two have to remember:

# %% id="language-sizes"
counted = len(np.unique(runs(train_ids.numpy(), chapter.size.order)))
print(f"best count {baseline:.3f} bits per byte, {counted:,} different runs of "
      f"{chapter.size.order} kept")
print(f"network    {network:.3f} bits per byte, "
      f"{sum(w.numel() for w in model.parameters()):,} weights")

# %% [markdown]
# All of this chapter in one picture. Each bar is what one more idea brought.

# %% id="language-bars"
bars = {"know nothing": uniform, "single tokens": by_order[0], "pairs": by_order[1],
        "runs, best": baseline, "network": network}
fig, ax = plt.subplots(figsize=(6.5, 2.4))
drawn = ax.barh(list(bars)[::-1], list(bars.values())[::-1])
ax.bar_label(drawn, fmt="%.2f", padding=3)
ax.set(xlabel="bits per byte on held-out text")
show(fig, "Bits per byte on held-out text, lower is better: from knowing nothing to "
          "the first network.")

# %% [markdown]
# Did tokens that are used alike get vectors alike? Ask for the nearest neighbours of some.

# %% id="language-neighbours"
vectors = F.normalize(model.embed.weight.detach(), dim=1)
for word in (" blue", " baker", " river"):
    i = tokenizer.encode(word)[0]
    near = (vectors @ vectors[i]).topk(6).indices[1:].tolist()
    print(f"{tokenizer.decode([i])!r:10} is near",
          ", ".join(repr(tokenizer.decode([j])) for j in near))

# %% [markdown]
# ## 3.8 Where it breaks: a loss that is too good
#
# The most common mistake of this whole course fits in one line: labels that are not shifted. Then the model is asked for the token that it just read. A "model" that repeats its input shows the effect.

# %% id="language-unshifted"
def repeat(ids: torch.Tensor) -> torch.Tensor:
    return 20.0 * F.one_hot(ids, V).float()  # sure of what it was just given


x = valid_ids[None, :200]
wrong = cross_entropy(repeat(x), x).item()  # labels not shifted
right = cross_entropy(repeat(x[:, :-1]), x[:, 1:]).item()
print(f"not shifted: {wrong:.4f}   shifted: {right:.2f}")
assert wrong < 0.01 and right > math.log(V)

# %% [markdown]
# A loss that falls to almost zero within a few steps is not a triumph. It is a label that leaked. Text has surprise that no model can remove, so be suspicious of every result that is too good.
#
# **Exercise 3.7 (10 min, ★★): `validation_loss`** in [workbook 3](../exercises/03_language_modeling.ipynb). Two bugs, one of them of this kind: find and repair them.
#
# ## Recap
#
# - A language model gives a probability to each next token. Counting pairs is the smallest one.
# - The loss is the mean surprise, $-\ln p$. Knowing nothing costs $\ln V$.
# - Gradient descent on a table of logits arrives at the counts.
# - Nats per token depend on the tokenizer; bits per byte do not.
# - The baseline is recorded. A network with shared vectors beats counted pairs; the window is its limit, and attention will remove it.
#
# **Words of this chapter:** language model, bigram, n-gram, surprise, cross-entropy, logit, softmax, perplexity, bits per byte, smoothing, baseline, embedding.
#
# **Sources.** Shannon (1948), *A mathematical theory of communication*; Witten and Bell (1991), *The zero-frequency problem*; Kneser and Ney (1995), *Improved backing-off for m-gram language modeling*; Bengio, Ducharme, Vincent and Jauvin (2003), *A neural probabilistic language model*. Read next: Chen and
# Goodman (1999) on smoothing; Delétang et al. (2024), arXiv:2309.10668, on models as compressors. In chapter 4 the model learns where to look.
#
# **Exercises:** 3.1 to 3.9, in place above, with checks in [workbook 3](../exercises/03_language_modeling.ipynb).
