# %% [markdown]
# # 10. Generation
#
# The model of chapter 9 does one thing: it reads tokens and gives every possible next token a score. In this chapter
# you turn the scores into text. You will choose the next token in six ways, make the loop several times faster with a
# cache, answer many prompts at once, print letters as they come, and talk to the model from the command line.
#
# You need chapters 4 (attention), 5 (positions) and 9 (a pretrained model). Chapter 2 explains the tokenizer.
#
# Reading 35 minutes; running: smoke 15 s, cpu 30 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# One picture of the whole chapter first. Everything below is one of its boxes.

# %% id="generate-opening-picture"
import matplotlib.pyplot as plt

boxes = ["tokens so far\n(10.1)", "model and cache\n(10.4)", "one score per\ntoken",
         "choose one\n(10.2, 10.3)", "print it\n(10.6)"]
fig, ax = plt.subplots(figsize=(7, 1.9))
for i, label in enumerate(boxes):
    ax.text(i, 0, label, ha="center", va="center", fontsize=8,
            bbox={"boxstyle": "round,pad=0.35", "fc": "#e8eef7", "ec": "black"})
    if i:
        ax.annotate("", (i - 0.38, 0), (i - 0.62, 0), arrowprops={"arrowstyle": "->"})
ax.annotate("", (0, 0.3), (3, 0.3),
            arrowprops={"arrowstyle": "->", "connectionstyle": "arc3,rad=0.22"})
ax.text(1.5, 0.86, "append the chosen token and go round again", ha="center",
        fontsize=9)
ax.set(xlim=(-0.6, 4.6), ylim=(-0.5, 1.1))
ax.axis("off")
show(fig, "The generation loop: the tokens so far go through the model, one new token "
          "is chosen from its scores, and it joins the tokens.")

# %% [markdown]
# ## 10.1 From scores to a sentence
#
# Take the checkpoint of chapter 9 and a text that it has never seen.

# %% id="generate-load"
import torch

from minimind.data import read_texts
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

folder = chapter.read("pretrain")
model = MiniMind.from_pretrained(folder).to(chapter.device).eval()
tokenizer = Tokenizer.from_pretrained(folder)
valid_texts = [text[:20_000]
               for text, _ in zip(read_texts(chapter.read("data") / "pretrain"
                                             / "valid.jsonl.gz"), range(300))]
text = max(valid_texts, key=len)
print(text[:300])

# %% [markdown]
# Give the model the first tokens of this text. The last row of logits belongs to the token that comes next.

# %% id="generate-first-step"
def as_ids(string, count=None):
    return torch.tensor([tokenizer.encode(string)[:count]],
                        device=chapter.device)  # (1, T)

prompt = as_ids(text, 6)
with torch.inference_mode():
    logits = model(prompt)[0, -1]  # (V,)
best = logits.softmax(-1).topk(5)
print(repr(tokenizer.decode(prompt[0].tolist())), "->")
for p, token in zip(best.values.tolist(), best.indices.tolist()):
    print(f"{p:6.1%}  {tokenizer.decode([token])!r}")

# %% [markdown]
# The simplest choice is the most probable token. Append it, ask again, and you have **greedy decoding**.

# %% id="generate-greedy-by-hand"
ids = prompt
with torch.inference_mode():
    for _ in range(20):
        token = model(ids)[0, -1].argmax()
        ids = torch.cat((ids, token.view(1, 1)), dim=1)
by_hand = ids
print(tokenizer.decode(ids[0].tolist()))

# %% [markdown]
# Four lines, and it talks. Nothing else will be added to the model in this chapter: every sample below comes from these same weights.
# What changes is how we read them. The rest of the chapter is about three questions. Is the most probable token the right choice? Why
# read the whole text again for every token? And what about many prompts, letters cut in half, and the end of the text?

# %% id="generate-default-exp"
#| default_exp generate

# %% id="generate-imports"
#| export
import codecs
from collections.abc import Iterator, Sequence

import torch

# %% [markdown]
# ## 10.2 Temperature
#
# Greedy text is always the same, and it loves to go in circles. To get variety, draw the token at random, with its probability.
# **Temperature** $\tau$ sets how bold the draw is: divide the logits $z$ by it before the softmax.
#
# $$p_i = \frac{e^{z_i/\tau}}{\sum_j e^{z_j/\tau}}$$
#
# Three tokens by hand, with logits 2, 1 and 0:

# %% id="generate-temperature-by-hand"
z = torch.tensor([2.0, 1.0, 0.0])
for tau in (0.5, 1.0, 2.0):
    print(tau, [round(p, 2) for p in (z / tau).softmax(-1).tolist()])

# %% [markdown]
# At $\tau = 0.5$ the winner takes almost all; at $\tau = 2$ the three come closer. The order never changes. As $\tau$ goes to 0 the
# draw becomes the greedy choice.

# %% id="generate-temperature-limit"
assert (z / 0.01).softmax(-1)[0] > 0.9999
assert ((z / 2).softmax(-1).argsort() == (z / 0.5).softmax(-1).argsort()).all()

# %% [markdown]
# Now a real distribution. The **entropy** $-\sum p_i \log_2 p_i$ says how unsure a prediction is, in bits: 0 for a sure thing, 1 for a coin, 3 for a
# choice among eight. We take the place in the text that comes nearest to 3 bits. All pictures until 10.4 use this one place.

# %% id="generate-unsure-place"
text_ids = as_ids(text, 128)
with torch.inference_mode():
    all_logits = model(text_ids)[0].float()  # (T, V)
entropy = -(all_logits.softmax(-1)
            * all_logits.log_softmax(-1)).sum(-1) / torch.log(torch.tensor(2.0))
place = int((entropy[3:-1] - 3).abs().argmin()) + 3
here = all_logits[place : place + 1].cpu()  # (1, V)
print(f"{entropy[place]:.1f} bits after "
      f"{tokenizer.decode(text_ids[0, max(0, place - 12) : place + 1].tolist())!r}")

# %% [markdown]
# **Before you run this**: the curve for 0.5 and the curve for 2 cross. On which side of the crossing is the hot one higher?

# %% id="generate-temperature-figure"
fig, ax = plt.subplots(figsize=(7, 3))
for tau, marker in ((0.5, "o"), (1.0, "s"), (2.0, "^")):
    ranked = (here / tau).softmax(-1)[0].sort(descending=True).values[:40]
    ax.plot(range(1, 41), ranked, marker=marker, markersize=3,
            label=f"temperature {tau}")
ax.set(xlabel="rank of the token", ylabel="probability", yscale="log")
ax.legend()
show(fig, "A low temperature gives more to the first few tokens and takes it from the "
          "long tail; a high one does the reverse.")

# %% [markdown]
# **Try it.** Find the temperature at which this distribution has half its entropy. Use bisection.
#
# ## 10.3 Cutting the tail
#
# A vocabulary has thousands of tokens. Most fit badly here, but together they hold a good share of the probability. Draw often enough
# and one of them comes, and the model must then continue nonsense. So we cut the tail off before we draw. Three rules are common.
#
# **Top-k** (Fan et al. 2018) keeps the $k$ best tokens. A logit of $-\infty$ becomes probability 0. The smallest of the $k$ best is the
# threshold; a token exactly as good as it is kept too, because there is no reason to prefer one of two equals.

# %% id="generate-top-k"
#| export
def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest of logits (B, V), and ties; the others become -inf.

    Fan et al. 2018, arXiv:1805.04833.
    """
    last = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < last, -torch.inf)

# %% [markdown]
# **Top-p** (Holtzman et al. 2019) keeps the fewest tokens that together reach probability $p$. A token stays when the better
# ones before it have not reached $p$ yet; so the best one always stays. In the code, `before` is the running total without the token
# itself, and `scatter` carries the decision from sorted order back to the order of the vocabulary.

# %% id="generate-top-p"
#| export
def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the fewest tokens whose probabilities add up to at least p (Holtzman et al.
    2019, arXiv:1904.09751).
    """
    probabilities, order = logits.softmax(-1).sort(descending=True)  # (B, V) each
    # what the better tokens already add up to
    before = probabilities.cumsum(-1) - probabilities
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(drop, -torch.inf)

# %% [markdown]
# **Min-p** (Nguyen et al. 2024) compares with the best token: keep what is at least $p$ times as probable. It needs no sorting. When the
# best token has 90%, a value of 0.1 keeps what has at least 9%; when the best has 5%, it keeps what has half a percent.

# %% id="generate-min-p"
#| export
def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep tokens at least p times as probable as the most probable one (Nguyen et al.
    2024, arXiv:2407.01082).
    """
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True),
                              -torch.inf)

# %% [markdown]
# Check all three on four tokens whose probabilities you can see. Work the three lines out on paper first.

# %% id="generate-filters-by-hand"
four = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
kept = lambda logits: logits.isfinite()[0].tolist()
assert kept(keep_top_k(four, 2)) == [True, True, False, False]
# 0.5 + 0.25 is not 0.8 yet
assert kept(keep_top_p(four, 0.8)) == [True, True, True, False]
assert kept(keep_min_p(four, 0.25)) == [True, True, True, False]  # at least 0.25 * 0.5

# %% [markdown]
# **Exercise 10.1 (10 min, ★): `cutting`** in [workbook 10](../exercises/10_generation.ipynb). Top-k and min-p from their formulas, ties included;
# the check compares with plain loops over one row.
#
# **Exercise 10.2 (15 min, ★★): `keep_top_p`** in [workbook 10](../exercises/10_generation.ipynb). The fewest tokens that reach p, put back into the order of the vocabulary.
#
# The **repetition penalty** (Keskar et al. 2019) works against circles. It makes every token that already stands in the text less
# likely. Positive logits are divided by the penalty; negative ones are multiplied, since dividing would make them *more* likely.

# %% id="generate-repetition-penalty"
#| export
def penalise_repetition(logits: torch.Tensor, previous: torch.Tensor,
                        penalty: float) -> torch.Tensor:
    """Make the tokens in `previous` (B, n) less likely.

    Positive logits are divided, negative ones multiplied. Keskar et al. 2019,
    arXiv:1909.05858.
    """
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, previous, True)
    return torch.where(seen, torch.where(logits > 0, logits / penalty,
                                         logits * penalty), logits)

# %% [markdown]
# A token with logit 3 and one with logit -3, both seen before. Both must go down:

# %% id="generate-repetition-by-hand"
after = penalise_repetition(torch.tensor([[3.0, -3.0, 1.0]]),
                            previous=torch.tensor([[0, 1]]), penalty=1.5)
assert after.tolist() == [[2.0, -4.5, 1.0]]

# %% [markdown]
# **Exercise 10.3 (10 min, ★): `penalise_repetition`** in [workbook 10](../exercises/10_generation.ipynb). Each token once, each row by its own text, and always downwards.
#
# One function applies what is asked for. The order is that of Hugging Face's `generate`, so the same settings mean the
# same thing: penalty, temperature, top-k, top-p, min-p.

# %% id="generate-sample-next"
#| export
def sample_next(
    logits: torch.Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    previous: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Choose one token for each row of logits (B, V): ids (B,).

    Temperature 0 takes the most probable token. The order is Hugging Face's: repetition
    penalty, temperature, top-k, top-p, min-p. `previous` (B, n) holds the tokens so
    far, for the penalty.
    """
    if repetition_penalty != 1.0 and previous is not None:
        logits = penalise_repetition(logits, previous, repetition_penalty)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

# %% [markdown]
# Is a draw really as probable as it says? Draw many times and count.

# %% id="generate-count-draws"
draws = sample_next(here.expand(chapter.size.draws, -1), temperature=1.0,
                    generator=torch.Generator().manual_seed(1))
share = torch.bincount(draws, minlength=here.shape[1]) / len(draws)
worst = (share - here.softmax(-1)[0]).abs().max()
print(f"largest difference between probability and share of {len(draws):,} draws: "
      f"{worst:.4f}")
assert worst < 5 * 0.5 / len(draws) ** 0.5  # five standard errors of a share

# %% [markdown]
# **Exercise 10.4 (15 min, ★★): `sample_next`** in [workbook 10](../exercises/10_generation.ipynb). All of it in the right order; the check draws thousands of tokens and counts.
#
# Now all six ways on the same real distribution. Grey bars are what the model said, dark bars what is left to draw from.

# %% id="generate-draw-choice"
def chances(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, penalty=1.0,
            previous=None):
    """Probabilities from which sample_next would draw, (V,)."""
    logits = penalise_repetition(logits, previous, penalty) if penalty != 1 else logits
    logits = logits / max(temperature, 1e-4)
    for rule, value in ((keep_top_k, top_k), (keep_top_p, top_p), (keep_min_p, min_p)):
        logits = rule(logits, value) if value else logits
    return logits.softmax(-1)[0]

order = here[0].argsort(descending=True)[:16]

def draw_bars(ax, title, **settings):
    ax.bar(range(16), here.softmax(-1)[0, order], color="0.8")
    ax.bar(range(16), chances(here, **settings)[order], width=0.45, color="C0")
    ax.set(title=title, xticks=range(16))
    ax.set_xticklabels([tokenizer.decode([t]).strip() or "·" for t in order.tolist()],
                       rotation=90, fontsize=6)

# %% [markdown]
# The penalty panel treats the two best tokens as if they stood in the text already.

# %% id="generate-six-choices"
six = {"greedy (temperature 0)": {"temperature": 0.0},
       "temperature 2": {"temperature": 2.0}, "top-k 5": {"top_k": 5},
       "top-p 0.7": {"top_p": 0.7}, "min-p 0.3": {"min_p": 0.3},
       "penalty 1.3 on the first two": {"penalty": 1.3, "previous": order[None, :2]}}
fig, axes = plt.subplots(2, 3, figsize=(7, 4.2), sharey=True)
for ax, (title, settings) in zip(axes.flat, six.items()):
    draw_bars(ax, title, **settings)
    ax.set_ylim(0, min(1, 3 * here.softmax(-1).max().item()))
axes[0, 0].set_ylabel("probability")
axes[1, 0].set_ylabel("probability")
show(fig, "Six ways to change one distribution: grey is the model's, blue is what is "
          "drawn from; the greedy bar runs up to 1.")

# %% [markdown]
# Read the panels one by one. *Greedy* puts everything on one bar. *Temperature 2* lowers the first bars and lifts all others, most of which lie outside of
# the picture. *Top-k* cuts at a rank, *top-p* at a sum, *min-p* at a height. After a cut the rest grows, since probabilities must add up to 1. The
# *penalty* takes from two named tokens, whatever their rank.
#
# Which one to use? For facts, greedy: there is one right answer, and a draw can only miss it. For stories, a temperature near 0.8 with a top-p near 0.9 or
# a min-p near 0.05 is a common start. The penalty is a bandage: 1.1 helps a model that circles, 1.5 forbids it to say "the" twice.
#
# In a live notebook, move the sliders. Watch top-p and min-p while you raise the temperature.

# %% id="generate-widget" tags=["widget"]
def explore(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0):
    fig, ax = plt.subplots(figsize=(6, 2.6))
    draw_bars(ax, "", temperature=temperature, top_k=top_k, top_p=top_p if top_p < 1
              else None, min_p=min_p, penalty=penalty, previous=order[None, :2])
    ax.set_ylabel("probability")
    show(fig,
         f"{int((chances(here, temperature, top_k, top_p if top_p < 1 else None, min_p) > 0).sum())} tokens are left to draw from.")

try:
    from ipywidgets import interact
    interact(explore, temperature=(0.1, 3.0, 0.1), top_k=(0, 16),
             top_p=(0.05, 1.0, 0.05), min_p=(0.0, 1.0, 0.05), penalty=(1.0, 2.0, 0.1))
except ImportError:
    explore(top_p=0.7)

# %% [markdown]
# The rules differ most when the model's certainty changes from place to place. Count the candidates along one text:

# %% id="generate-candidates-along"
length = min(60, len(all_logits) - 1)
rules = {"top-k 20": lambda z: keep_top_k(z, 20),
         "top-p 0.9": lambda z: keep_top_p(z, 0.9),
         "min-p 0.1": lambda z: keep_min_p(z, 0.1)}
counts = {name: rule(all_logits[:length]).isfinite().sum(-1).cpu()
          for name, rule in rules.items()}
fig, ax = plt.subplots(figsize=(7, 2.8))
for (name, count), marker in zip(counts.items(), "os^"):
    ax.plot(count, marker=marker, markersize=3, label=name)
ax.set(xlabel="position in the text (tokens)", ylabel="tokens kept", yscale="log")
ax.legend()
show(fig, "Top-k keeps 20 everywhere; top-p and min-p keep one token where the model "
          "is sure and many where it is not.")

# %% [markdown]
# Follow the lines. In the middle of a phrase, or where the text repeats what it said before, there is one possible continuation, and two of the rules find that
# out by themselves. Where something new begins there are dozens. Top-k is the odd one out: where the model is sure, it still offers 19 wrong tokens. Drawn a hundred times in a text, even a
# small chance of a wrong token is a mistake almost certain to happen.

# %% id="generate-candidates-check"
assert (counts["top-k 20"] >= 20).all()
if chapter.max_steps is None:  # after two steps a model is equally unsure everywhere
    for name in ("top-p 0.9", "min-p 0.1"):
        assert counts[name].min() < counts[name].max()

# %% [markdown]
# **Exercise 10.9 (20 min, ★★★): `keep_typical`** in [workbook 10](../exercises/10_generation.ipynb). A cut that may drop the best token: what stays is about as surprising
# as the place lets you expect (Meister et al. 2022).
#
# ## 10.4 The cache
#
# The loop of 10.1 reads the whole text again for each token. For a prompt of $P$ tokens and $N$ new ones the model reads
# $P + (P+1) + \dots + (P+N-1)$ positions. It needs only $P + N - 1$ of them.

# %% id="generate-count-positions"
P, N = 256, 256
again = sum(range(P, P + N))
once = P + N - 1
print(f"positions read: {again:,} without a cache, {once} with one: {again / once:.0f} "
      "times as many")

# %% [markdown]
# What could we keep? A position looks back only, never ahead (chapter 4). So a token that comes later cannot change the keys and
# values of earlier ones. See it: the logits of the first positions do not move when the text grows.

# %% id="generate-prefix-unchanged"
with torch.inference_mode():
    short, long = model(text_ids[:, :16]), model(text_ids[:, :32])[:, :16]
print(f"largest difference: {(short - long).abs().max():.1e}")
assert torch.allclose(short, long, atol=1e-4)

# %% [markdown]
# So each layer may keep its keys and values, and the new token brings one row more. The query of the new token looks at all of
# them. Nothing is lost: queries of old tokens are never asked again. That store is the **KV cache**.

# %% id="generate-cache-picture"
fig, axes = plt.subplots(1, 2, figsize=(7, 2.4), sharey=True)
for ax, cached in zip(axes, (False, True)):
    work = torch.zeros(8, 12)
    for step in range(8):
        work[step, : step + 5] = 0.35 if cached else 1.0
        work[step, step + 4 if cached and step else 0 : step + 5] = 1.0
    ax.imshow(work, cmap="Greys", vmin=0, vmax=1.2, aspect="auto")
    ax.set(title="with a cache" if cached else "without", xlabel="position",
           xticks=range(0, 12, 2))
    ax.grid(False)
axes[0].set_ylabel("new token number")
show(fig, "Positions read for each of eight new tokens after a prompt of five: dark is "
          "computed, light comes from the cache.")

# %% [markdown]
# The memory is set aside once, for the longest text that can come. A cache that grows by `torch.cat` copies everything at each
# step. `update` is what the attention of chapter 4 calls, once in each layer: it hands in the keys and values of the new positions, and gets back
# all so far. What it gets are *views* of the memory, not copies. Each layer has its own count in `filled`, because while a token passes through the
# model, the lower layers already hold it and the upper ones do not.

# %% id="generate-kv-cache"
#| export
class KVCache:
    """Keys and values of all positions so far, in memory set aside once.

    Memory in bytes: 2 * layers * B * K * max_length * D * bytes per number. `update` is
    what attention calls.
    """

    def __init__(self, config, batch_size: int, max_length: int, device=None,
                 dtype: torch.dtype | None = None):
        shape = (batch_size, config.num_key_value_heads, max_length,
                 config.head_dim)  # (B, K, S, D)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.filled = [0] * config.num_hidden_layers
        self.max_length = max_length

    @property
    def length(self) -> int:
        """Positions that every layer holds."""
        return self.filled[-1]

    def update(self, k: torch.Tensor, v: torch.Tensor,
               layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k and v (B, K, T, D); return all so far, (B, K, S, D), as views."""
        start, end = self.filled[layer_idx], self.filled[layer_idx] + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions and {end} "
                             "are needed: make it longer")
        self.keys[layer_idx][:, :, start:end] = k
        self.values[layer_idx][:, :, start:end] = v
        self.filled[layer_idx] = end
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]

# %% [markdown]
# First by hand: the prompt in one go, then a single token. Its logits must be those of the whole text.

# %% id="generate-cache-by-hand"
cache = KVCache(model.config, batch_size=1, max_length=33, device=chapter.device)
with torch.inference_mode():
    model(text_ids[:, :32], kv_cache=cache)
    step = model(text_ids[:, 32:33], kv_cache=cache)  # (1, 1, V): one position read
    whole = model(text_ids[:, :33])[:, -1:]
assert cache.length == 33
assert torch.allclose(step, whole, atol=1e-4)

# %% [markdown]
# The price is memory, for every layer two tensors $(B, K, S, D)$:
#
# $$\text{bytes} = 2 \cdot \text{layers} \cdot B \cdot K \cdot S \cdot D \cdot \text{bytes per number}$$

# %% id="generate-cache-bytes"
def cache_bytes(config, batch_size, length, bytes_per_number=4):
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * batch_size * length * bytes_per_number

held = sum(t.nbytes for t in cache.keys + cache.values)
assert held == cache_bytes(model.config, 1, 33)
per_token, weights = cache_bytes(model.config, 1, 1), 4 * model.num_parameters()
print(f"{per_token:,} bytes a token; {weights // per_token:,} tokens of cache weigh as "
      "much as the model")

# %% [markdown]
# **Exercise 10.5 (20 min, ★★): `KVCache`** in [workbook 10](../exercises/10_generation.ipynb). Rebuild it without looking: memory set aside once, one count for each layer.
#
# **Exercise 10.7 (5 min, ★): `cache_gib`** in [workbook 10](../exercises/10_generation.ipynb). Predict how many GiB the cache of Llama 3 8B takes for four long chats.
#
# Before the loop, one check at the edge. Positions beyond the model's limit have no meaning, so asking for them is an error that says
# how many fit.

# %% id="generate-check-request"
#| export
def check_request(config, input_ids: torch.Tensor, max_new_tokens: int) -> None:
    """ValueError in plain words for a prompt that this model cannot continue."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give (B, T) "
                         "with at least one token per row")
    T, room = input_ids.shape[1], config.max_position_embeddings
    if T + max_new_tokens > room:
        raise ValueError(
            f"{T} prompt tokens and {max_new_tokens} new ones are {T + max_new_tokens} "
            f"positions, this model has {room}: "
            f"shorten the prompt or ask for at most {max(room - T, 0)} new tokens"
        )

# %% [markdown]
# The loop also serves rows of unequal length, which section 10.5 explains. Its memory for tokens, mask and positions is prepared here.

# %% id="generate-start-ids"
#| export
def start_ids(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, end: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Ids (B, end) with the prompt in them; for padded rows, mask and positions too."""
    B, T = input_ids.shape
    ids = input_ids.new_zeros(B, end)
    if attention_mask is None:
        ids[:, :T] = input_ids
        return ids, None, None
    # padding must not count as repetition
    ids[:, :T] = torch.where(attention_mask.bool(), input_ids, input_ids[:, -1:])
    mask = torch.cat((attention_mask, attention_mask.new_ones(B, end - T)), dim=1)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)

# %% [markdown]
# The loop itself, in the order of its lines: check the request, set memory aside, and then for each new token read what is new, take the last row of
# logits, choose, store, hand out. With a cache it reads the prompt once (the **prefill**) and then one position per step, without building a mask: a
# single new position may look at everything. Without a cache `start` stays 0, and that one line is the whole difference. Rows that have stopped repeat
# their stop token until all rows have.
#
# It is short on purpose: what happens here happens for every token. The function *yields* each
# token, so that one loop serves whole answers and streaming. `inference_mode` leaves out all bookkeeping for gradients.

# %% id="generate-next-tokens"
#| export
@torch.inference_mode()
def next_tokens(
    model,
    input_ids: torch.Tensor,
    max_new_tokens: int = 64,
    stop_ids: Sequence[int] = (),
    use_cache: bool = True,
    attention_mask: torch.Tensor | None = None,
    seed: int | None = None,
    **sampling,
) -> Iterator[torch.Tensor]:
    """Yield the next token of every row, (B,), up to `max_new_tokens` times.

    A stopped row repeats the first stop id.
    """
    check_request(model.config, input_ids, max_new_tokens)
    (B, T), device = input_ids.shape, input_ids.device
    end = T + max_new_tokens
    ids, mask, positions = start_ids(input_ids, attention_mask, end)
    cache = KVCache(model.config, B, end, device,
                    next(model.parameters()).dtype) if use_cache else None
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    stopped = torch.zeros(B, dtype=torch.bool, device=device)
    start = 0  # with a cache, later steps read one new position only
    for now in range(T, end):
        padding = {} if mask is None else {"attention_mask": mask[:, :now],
                                           "position_ids": positions[:, start:now]}
        logits = model(ids[:, start:now], kv_cache=cache, **padding)[:, -1]  # (B, V)
        chosen = sample_next(logits, previous=ids[:, :now], generator=generator,
                             **sampling)
        if len(stops):
            chosen = torch.where(stopped, stops[0], chosen)
            stopped |= torch.isin(chosen, stops)
        ids[:, now] = chosen
        yield chosen
        if len(stops) and stopped.all():
            return
        start = now if use_cache else 0

# %% [markdown]
# `generate` collects what the loop yields.

# %% id="generate-generate"
#| export
def generate(model, input_ids: torch.Tensor, max_new_tokens: int = 64,
             **options) -> torch.Tensor:
    """Continue every row of input_ids (B, T) by up to `max_new_tokens`: (B, T + new).

    Options are those of `next_tokens` and `sample_next`. Rows that reach a stop id
    early are filled up with the first stop id; generation ends when all have stopped.
    For rows of unequal length see `generate_batch`.
    """
    model.eval()
    new = list(next_tokens(model, input_ids, max_new_tokens, **options))
    return torch.cat((input_ids, torch.stack(new, dim=1)), dim=1) if new else input_ids

# %% [markdown]
# It repeats what the four lines of 10.1 gave, and the cache changes no token.

# %% id="generate-same-tokens"
assert (generate(model, prompt, 20) == by_hand).all()
with_cache, without = (generate(model, prompt, 64, use_cache=use_cache)
                       for use_cache in (True, False))
assert (with_cache == without).all()

# %% [markdown]
# Greedy text first, then three draws from the same prompt. The last two have the same heat; one has its tail cut.

# %% id="generate-samples"
samples = {"greedy": {}, "temperature 0.8": {"temperature": 0.8},
           "temperature 2": {"temperature": 2.0},
           "temperature 2, min-p 0.1": {"temperature": 2.0, "min_p": 0.1}}
for name, settings in samples.items():
    out = generate(model, prompt, 40, stop_ids=(tokenizer.eos_id,), seed=3, **settings)
    print(f"{name}: {tokenizer.decode(out[0].tolist(), skip_special=True)}\n")

# %% [markdown]
# **Before you run this**: the cache reads about 190 times fewer positions. Will it be 190 times faster? A step that reads one position
# still calls every layer and reads every weight. Guess a number.

# %% id="generate-measure"
import time

def seconds_per_token(use_cache):
    """Seconds that each new token took."""
    last, seconds = time.perf_counter(), []
    for _ in next_tokens(model, long_prompt, chapter.size.new_tokens,
                         use_cache=use_cache):
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    return torch.tensor(seconds)

stream_ids = tokenizer.encode(" ".join(valid_texts[:60]))
long_prompt = torch.tensor([stream_ids[: chapter.size.prompt_tokens]],
                           device=chapter.device)
runs = [(seconds_per_token(True), seconds_per_token(False))
        for _ in range(chapter.size.repeats)]  # in turn, so noise meets both
fast, slow = (torch.stack(times).median(0).values for times in zip(*runs))  # (N,) each

# %% [markdown]
# The time of every single token, the first one left out because it also pays for reading the prompt:

# %% id="generate-speed-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
for times, name in ((slow, "without a cache"), (fast, "with a cache")):
    ax.plot(range(1, len(times)), 1000 * times[1:], label=name)
ax.set(xlabel=f"new token number (after a prompt of {chapter.size.prompt_tokens})",
       ylabel="milliseconds per token", ylim=(0, None))
ax.legend()
show(fig, "Without a cache each token takes longer than the one before; with a cache "
          "the time per token stays flat.")

# %% [markdown]
# Why not 190 times? A step with the cache does little arithmetic, but it calls some hundred small operations, and each costs a few microseconds
# before it computes anything. It also reads every weight once for a single token. That floor is the flat line. The upper line grows with the text, so
# the gain grows with it: at ten times the length, the gap is far wider. On a GPU the floor is higher relative to the arithmetic, and a model as small
# as this one gains little there.
#
# This is the claim of the chapter. The time includes reading the prompt, which both do once.

# %% id="generate-speedup"
print(f"{len(fast) / fast.sum():.0f} tokens per second with a cache, "
      f"{len(slow) / slow.sum():.0f} without")
rate = chapter.record("generate/tokens_per_second", float(len(fast) / fast.sum()))
speedup = check("generate/cache_speedup", float(slow.sum() / fast.sum()))

# %% [markdown]
# **Exercise 10.10 (25 min, ★★★): `speculative`** in [workbook 10](../exercises/10_generation.ipynb). Another way to save time: speculative decoding (Leviathan et al. 2023).
# Predict the share of drafts that is accepted, then measure it.
#
# **Try it.** Write a cache that grows by `torch.cat`. At which length does it lose against this one?
#
# ## 10.5 Many prompts at once
#
# A step costs little more for eight rows than for one, since most of its time does not depend on the number of rows. But rows of one batch must be equally
# long. Three prompts of unequal length have to be **padded**. On which side?

# %% id="generate-three-prompts"
prompts = [tokenizer.encode(text)[:n] for text, n in zip(valid_texts[1:4], (4, 9, 16))]
alone = [generate(model, torch.tensor([p], device=chapter.device),
                  16)[0, len(p) :].tolist() for p in prompts]
for p, new in zip(prompts, alone):
    print(f"{tokenizer.decode(p)!r} -> {tokenizer.decode(new)!r}")

# %% [markdown]
# Try the obvious side first. Pad on the right and nothing hides the padding: the new tokens come after it, look at it, and stand at the wrong
# distance from their prompt. Watch it fail:

# %% id="generate-right-padding-fails"
T = max(map(len, prompts))
right = torch.tensor([p + [tokenizer.eos_id] * (T - len(p)) for p in prompts],
                     device=chapter.device)
wrong = generate(model, right, 16)[:, T:].tolist()
print("same as alone:", [w == a for w, a in zip(wrong, alone)])
with torch.inference_mode():
    next_alone = [model(torch.tensor([p], device=chapter.device))[0, -1]
                  for p in prompts]
    next_padded = model(right)[:, -1]
# the longest prompt has no padding
assert torch.allclose(next_padded[-1], next_alone[-1], atol=1e-3)
assert not torch.allclose(next_padded[0], next_alone[0], atol=1e-1)

# %% [markdown]
# Pad on the left, and every prompt ends where the new tokens begin. Two things must be told to the model: a **mask**, so that
# nobody looks at padding, and **positions**, so that the first real token stands at 0.

# %% id="generate-left-pad"
#| export
def left_pad(prompts: Sequence[Sequence[int]], pad_id: int = 0,
             device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as ids (B, T), padded on the left, and the mask: 1 for real tokens."""
    T = max(map(len, prompts))
    ids = [[pad_id] * (T - len(row)) + list(row) for row in prompts]
    real = [[0] * (T - len(row)) + [1] * len(row) for row in prompts]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)

# %% [markdown]
# The three prompts with the mask and the positions that the loop will use:

# %% id="generate-left-pad-figure"
padded, real = left_pad(prompts, tokenizer.eos_id)
ids, mask, positions = start_ids(padded, real, T + 3)
fig, ax = plt.subplots(figsize=(7, 1.9))
ax.imshow(mask, cmap="Greys", vmin=0, vmax=3, aspect="auto")
for (row, column), position in zip(mask.nonzero().tolist(),
                                   positions[mask.bool()].tolist()):
    ax.text(column, row, position, ha="center", va="center", fontsize=7,
            color="C1" if column >= T else "black")
ax.set(xlabel="column", ylabel="prompt", yticks=range(3), xticks=range(0, T + 3, 2))
ax.grid(False)
show(fig, "Three prompts padded on the left: white is padding that nobody sees, "
          "numbers are positions, new tokens in orange continue each row.")

# %% [markdown]
# One trap is inside the mask. A padded position may look at nobody, and a softmax over nothing is 0/0. Nobody should care, since nobody looks
# at that position. But its value is multiplied by a weight of 0 in the next layer, and 0 times NaN is NaN. So the model of chapter 7
# lets a padded position look at itself.

# %% id="generate-nan-trap"
assert torch.tensor([-torch.inf, -torch.inf]).softmax(0).isnan().all()
assert torch.isnan(torch.tensor(0.0) * torch.nan)

# %% [markdown]
# You will meet this trap as a loss or an answer that is NaN for some batches and fine for others: it depends on who is padded.
#
# `generate_batch` takes lists of any lengths and returns the new tokens of each, cut at the stop token.

# %% id="generate-generate-batch"
#| export
def generate_batch(
    model, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64,
    stop_ids: Sequence[int] = (), batch_size: int = 64, **options
) -> list[list[int]]:
    """Continue many prompts (lists of ids): their new tokens, without stop token."""
    device, answers = next(model.parameters()).device, []
    for first in range(0, len(prompts), batch_size):
        ids, real = left_pad(prompts[first : first + batch_size], device=device)
        mask = None if real.all() else real
        out = generate(model, ids, max_new_tokens, stop_ids=stop_ids,
                       attention_mask=mask, **options)
        for row in out[:, ids.shape[1] :].tolist():
            stop = next((i for i, token in enumerate(row) if token in stop_ids),
                        len(row))
            answers.append(row[:stop])
    return answers

# %% [markdown]
# Each prompt now gets what it gets alone, token for token. (This holds for greedy text. Draws share one random generator, so a row's draws depend on its
# neighbours.) And eight rows cost far less than eight calls:

# %% id="generate-batch-same"
assert generate_batch(model, prompts, 16) == alone

many = [tokenizer.encode(text)[:12] for text in valid_texts[:8]]
clock = time.perf_counter()
one_by_one = [generate_batch(model, [p], 32)[0] for p in many]
middle = time.perf_counter()
together = generate_batch(model, many, 32)
end = time.perf_counter()
print(f"one by one {middle - clock:.2f} s, together {end - middle:.2f} s")
gain = chapter.record("generate/batch_speedup", (middle - clock) / (end - middle))
assert together == one_by_one

# %% [markdown]
# **Exercise 10.6 (30 min, ★★★): `next_tokens`** in [workbook 10](../exercises/10_generation.ipynb). The whole loop, with cache, stops, seeds and padded rows. The check compares with
# a plain loop that reads everything again.
#
# ## 10.6 Text while it grows, and where it ends
#
# A reader wants to see each piece at once. But a token is a run of bytes (chapter 2), and a character can take several. Decode the
# tokens of a word one by one:

# %% id="generate-broken-pieces"
word = "Zoë 猫 🦊"
pieces = [tokenizer.decode([token]) for token in tokenizer.encode(word)]
print(pieces)
assert "".join(pieces) != word and tokenizer.decode(tokenizer.encode(word)) == word

# %% [markdown]
# Every � is half a character. The cure is to hold bytes back until they are whole, which Python's incremental decoder does.

# %% id="generate-incremental"
decoder = codecs.getincrementaldecoder("utf-8")("replace")
pieces = [decoder.decode(tokenizer.decode_bytes([token]))
          for token in tokenizer.encode(word)]
print(pieces)
assert "".join(pieces) == word

# %% [markdown]
# `stream` puts it into the loop, one row only. It ends at a **stop token**: `<|endoftext|>` after a document, `<|im_end|>` after a chat answer.

# %% id="generate-stream"
#| export
def stream(
    model, tokenizer, input_ids: torch.Tensor, max_new_tokens: int = 64,
    stop_ids: Sequence[int] = (), **options
) -> Iterator[str]:
    """Yield the continuation of input_ids (1, T) as text, piece by piece.

    The stop token is left out. A character may be spread over several tokens; its bytes
    are held back until it is whole.
    """
    model.eval()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for chosen in next_tokens(model, input_ids, max_new_tokens, stop_ids, **options):
        token = int(chosen[0])
        if token in stop_ids:
            break
        if piece := decoder.decode(tokenizer.decode_bytes([token], skip_special=True)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest

# %% [markdown]
# Here the pieces are collected with the time of each. In a terminal you would print them as they come.

# %% id="generate-stream-try"
clock, times, written = time.perf_counter(), [], ""
for piece in stream(model, tokenizer, prompt, 60, stop_ids=(tokenizer.eos_id,)):
    written += piece
    times.append(time.perf_counter() - clock)
print(written)
print(f"first piece after {1000 * times[0]:.0f} ms, all {len(times)} after "
      f"{1000 * times[-1]:.0f} ms")
assert "<|endoftext|>" not in written

# %% [markdown]
# **Exercise 10.8 (10 min, ★★): `text_pieces`** in [workbook 10](../exercises/10_generation.ipynb). A stream that breaks Greek letters and shows its stop token. Find both bugs.
#
# Two times matter to a reader: how long until the first piece, and how many pieces a second after that. The first grows with the prompt, the second is
# the flat line of 10.4.
#
# Without the stop token the model goes on after the end of the document: it was trained on one document behind the other, so it begins
# another.

# %% id="generate-no-stop"
out = generate(model, prompt, 100)[0].tolist()
print(tokenizer.decode(out))

# %% [markdown]
# ### The end of the context
#
# This model has a limit of positions, `max_position_embeddings`. Asking for more is an error, before any work is done:

# %% id="generate-too-long"
try:
    generate(model, prompt, max_new_tokens=model.config.max_position_embeddings)
except ValueError as error:
    print(error)
else:
    raise AssertionError("positions beyond the limit must be refused")

# %% [markdown]
# The limit is a promise, not a measurement. Training used shorter windows (chapter 9). **Before you run this**: will the loss go down all the
# way, since more text is more information, or will it go up somewhere?

# %% id="generate-loss-by-position"
from torch.nn import functional as F

S = model.config.max_position_embeddings
S = min(S, chapter.size.context_length)
stream_ids = tokenizer.encode_batch(valid_texts)
flat = torch.tensor([t for row in stream_ids for t in [*row, tokenizer.eos_id]])
whole = len(flat) // (S + 1) * (S + 1)
rows = flat[:whole].view(-1, S + 1)[: chapter.size.context_rows].to(chapter.device)
with torch.inference_mode():
    losses = torch.stack([F.cross_entropy(model(row[None, :-1])[0], row[1:],
                                          reduction="none")
                                          for row in rows]).mean(0).cpu()

# %% [markdown]
# Single positions jump up and down with the words that happen to stand there, so we smooth.

# %% id="generate-context-figure"
smooth = losses.unfold(0, 64, 8).mean(-1) / torch.log(torch.tensor(2.0))
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.plot(torch.arange(len(smooth)) * 8 + 32, smooth)
ax.set(xlabel="position (tokens)", ylabel="bits per token", ylim=(0, None))
show(fig, f"Loss by position over {len(rows)} rows of new text, mean of 64 neighbours: "
          "look for the place where it starts to rise.")

# %% [markdown]
# A rise marks the length that training really covered. Beyond it, the rotations of chapter 5 reach angles between far positions that no training step has
# ever seen. Chapter 5 also shows how to stretch them. So there are two ends: where the model gets worse, and where it must stop. A chat that grows past the limit must forget
# something: the command below drops the oldest questions with their answers, and says so.
#
# ## 10.7 A chat on the command line
#
# Last, a command that talks to any checkpoint folder: `python -m minimind.chat FOLDER`. It is a module of its own, made from the
# cells below. A folder is what chapter 7 saves, which is what Hugging Face saves, so Qwen3 and Llama folders of other people work too, as long as
# their tokenizer has the special tokens of chapter 2. Nothing is fetched from anywhere.
#
# Loading can fail in many ways: no folder, a missing file, a file cut short, weights of another size. The reader of a command wants one line that names the file
# and the reason, not a traceback.

# %% id="generate-chat-imports"
#| export chat
import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from minimind.generate import stream
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

# %% id="generate-chat-load"
#| export chat
class ChatError(Exception):
    """What went wrong and what to do, in one sentence for the reader."""


def load(folder: str | Path, device: str = "cpu") -> tuple[MiniMind, Tokenizer]:
    """Model and tokenizer of a checkpoint folder; ChatError when it is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ChatError(f"{folder} is not a folder: give a checkpoint folder such as "
                        "runs/latest/artifacts/sft")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ChatError(f"{folder} has no {name}: a checkpoint folder holds "
                            "config.json, model.safetensors and tokenizer.json")
    try:
        return MiniMind.from_pretrained(folder).to(device).eval(), Tokenizer.from_pretrained(folder)
    except Exception as error:  # a broken file can fail in many ways; no traceback for those
        raise ChatError(f"{folder} cannot be loaded: {error}") from error

# %% [markdown]
# Folders of other people name their stop tokens in `generation_config.json` or `config.json`.

# %% id="generate-chat-stops"
#| export chat
def stop_tokens(folder: str | Path, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer: the template's, and those of the folder's configs."""
    stops = {tokenizer.eos_id, tokenizer.im_end_id}
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        stops.update(eos if isinstance(eos, list) else [eos])
    return sorted(stop for stop in stops if stop is not None)

# %% [markdown]
# A conversation grows with each turn until it no longer fits beside the answer. Then the oldest question leaves together with its answer, since one without the
# other would confuse the model. A system message always stays. A single message that is too long is an error: cutting it would change what was asked.

# %% id="generate-chat-reply"
#| export chat
def fit(tokenizer: Tokenizer, messages: list[dict], room: int) -> tuple[list[int], int]:
    """Tokens of the newest turns that fit, and how many old messages were left out."""
    kept, system = list(messages), [m for m in messages[:1] if m["role"] == "system"]
    kept = kept[len(system) :]
    while True:
        ids = tokenizer.apply_chat_template(system + kept, add_generation_prompt=True)
        if len(ids) <= room or len(kept) == 1:
            break
        kept = kept[2:]  # one question with its answer
    if len(ids) > room:
        raise ChatError(f"the message is {len(ids)} tokens long and {room} fit: "
                        "shorten it, or lower --max-new-tokens")
    return ids, len(messages) - len(system) - len(kept)


def reply(
    model: MiniMind, tokenizer: Tokenizer, messages: list[dict], stop_ids: list[int],
    max_new_tokens: int = 128, **options
) -> Iterator[str]:
    """Yield the answer to `messages` in pieces; the oldest turns may be left out."""
    room = model.config.max_position_embeddings - max_new_tokens
    ids, left_out = fit(tokenizer, messages, room)
    if left_out:
        print(f"(the oldest {left_out} messages no longer fit into {room} tokens and "
              "are left out)", file=sys.stderr)
    device = next(model.parameters()).device
    yield from stream(model, tokenizer, torch.tensor([ids], device=device),
                      max_new_tokens, stop_ids, **options)

# %% [markdown]
# The options:

# %% id="generate-chat-parser"
#| export chat
def parser() -> argparse.ArgumentParser:
    """The command line of `python -m minimind.chat`."""
    p = argparse.ArgumentParser(
        prog="python -m minimind.chat",
        description="Talk to the model in a checkpoint folder: ours, or a Hugging Face "
                    "Qwen3 or Llama folder. Needs no network.",
        epilog='example: python -m minimind.chat runs/latest/artifacts/sft --prompt "Where does Garus live?"',
    )
    p.add_argument("folder", help="folder with config.json, model.safetensors and "
                                  "tokenizer.json")
    p.add_argument("--prompt", help="answer this one message and stop")
    p.add_argument("--system", help="a system message put before the conversation")
    p.add_argument("--raw", action="store_true", help="continue the text as it stands, "
                                                      "without the chat template (for "
                                                      "base models)")
    p.add_argument("--max-new-tokens", type=int, default=128,
                   help="longest answer (default 128)")
    p.add_argument("--temperature", type=float, default=0.0,
                   help="0 takes the most probable token each time (default)")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--min-p", type=float)
    p.add_argument("--repetition-penalty", type=float, default=1.0)
    p.add_argument("--seed", type=int, help="makes sampled answers repeat")
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    return p

# %% [markdown]
# An answer is printed while it grows. `--raw` leaves out the chat template: a base model knows no chat yet.

# %% id="generate-chat-answer"
#| export chat
def answer(args: argparse.Namespace, model: MiniMind, tokenizer: Tokenizer,
           messages: list[dict]) -> str:
    """Print the answer to the last message as it grows, and return it."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
             "max_new_tokens")
    options = {name: getattr(args, name) for name in names}
    stops = stop_tokens(args.folder, tokenizer)
    if args.raw:
        ids = torch.tensor([tokenizer.encode(messages[-1]["content"])],
                           device=args.device)
        pieces = stream(model, tokenizer, ids, stop_ids=stops, **options)
    else:
        pieces = reply(model, tokenizer, messages, stops, **options)
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text

# %% [markdown]
# One answer for `--prompt`, else a conversation. Errors end with exit code 1 and one line.

# %% id="generate-chat-main"
#| export chat
def chat(args: argparse.Namespace) -> None:
    """One answer for --prompt, else a conversation until an empty line."""
    model, tokenizer = load(args.folder, args.device)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is not None:
        answer(args, model, tokenizer,
               messages + [{"role": "user", "content": args.prompt}])
        return
    print("Write a message; an empty line ends the conversation.", file=sys.stderr)
    while text := next_line():
        question = {"role": "user", "content": text}
        try:
            said = answer(args, model, tokenizer, [*messages, question])
            messages += [question, {"role": "assistant", "content": said}]
        except ChatError as error:
            print(f"error: {error}", file=sys.stderr)


def next_line() -> str:
    """What the reader typed; "" at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parser().parse_args(arguments)
    try:
        chat(args)
    except (ChatError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0


if __name__ == "__main__" and "__file__" in globals():  # a notebook has no __file__
    sys.exit(main())

# %% [markdown]
# Try it from here. The base model continues text; a folder that is none gets a clear answer.

# %% id="generate-chat-try"
import contextlib
import io

def command(*arguments):
    """What `python -m minimind.chat` prints for these arguments, and its exit code."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        code = main(list(arguments))
    print(printed.getvalue().strip())
    return code

start_text = tokenizer.decode(prompt[0].tolist())
assert command(str(folder), "--raw", "--prompt", start_text, "--max-new-tokens",
               "30") == 0
assert command("no/such/folder", "--prompt", "Hello") == 1

# %% [markdown]
# And a question in the chat template, which this model has never seen:

# %% id="generate-chat-base"
assert command(str(folder), "--prompt", "Where do you live?", "--max-new-tokens",
               "30") == 0

# %% [markdown]
# It writes *something*, but not an answer. It has not learned that a question wants one, nor when to stop. That is chapter 11.
#
# ## Recap
#
# - A model gives scores; you choose. Temperature bends the distribution, top-k, top-p and min-p cut its tail, a penalty punishes repetition.
# - Causal attention lets every layer keep its keys and values: same tokens, and the time per token stays flat.
# - Unequal prompts are padded on the left, with a mask and with positions that start at the first real token.
# - A token can hold half a character; hold bytes back until they are whole. Stop at the stop token.
# - The context ends: refuse, or drop the oldest turns, but never silently.
#
# **Words**: greedy decoding, temperature, entropy, top-k, top-p (nucleus), min-p, repetition penalty, KV cache, prefill, left padding,
# streaming, stop token, context length.
#
# **Try it.** Beam search: keep the four best texts at each step. Is its text more probable than greedy's? Is it better?
#
# **Exercises:** 10.1 to 10.10, in place above, with checks in [workbook 10](../exercises/10_generation.ipynb).
#
# **Sources**: Holtzman et al. 2019, *The Curious Case of Neural Text Degeneration*, arXiv:1904.09751 (top-p, and why greedy repeats). Fan et al.
# 2018, arXiv:1805.04833 (top-k). Nguyen et al. 2024, arXiv:2407.01082 (min-p). Keskar et al. 2019, arXiv:1909.05858 (penalty). Meister et al.
# 2022, arXiv:2202.00666 (typical sampling). Leviathan et al. 2023, arXiv:2211.17192 (speculative decoding). Pope et al. 2022, arXiv:2211.05102 (the cost of generation, with caches). Next: chapter 11.
