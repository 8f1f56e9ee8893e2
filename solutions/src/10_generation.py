# %% [markdown]
# # Workbook 10. Generation
#
# You write the module `minimind.generate` yourself, from stubs: the ways to choose a
# token, the cache, and the loop. Then you work out what a cache weighs, find two bugs,
# and write two methods from the literature. About two and a half hours; stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. Hints open one at a time. `solution("keep_top_p")` shows
# that one solution and no other.
#
# Letters as in the chapter: B rows, T positions, S positions so far, V vocabulary,
# K key/value heads, D head width.

# %% id="setup"
# (filled in by the build)

# %% id="w10-imports"
import codecs
from collections.abc import Iterator, Sequence

import torch

from minimind.generate import check_request, start_ids
from minimind.model import MiniMind, ModelConfig

# %% [markdown] exercise="cutting"
# ## 1. Cut the tail: top-k and min-p
#
# Both take logits `(B, V)` and return them with minus infinity in place of the tokens
# that may not be drawn. `keep_top_k` keeps the $k$ largest of each row; tokens exactly
# as good as the last of them stay too. `keep_min_p` keeps token $i$ where
# $$p_i \ge p \cdot \max_j p_j$$
# and needs no sorting. (Chapter section 10.3.)
#
# <details><summary>Hint 1: a threshold for each row</summary>
#
# `topk(k).values` holds the $k$ largest logits of each row, the largest first. Which
# of them must a token reach? Keep it as a column `(B, 1)`, so that it meets each row.
#
# </details>
# <details><summary>Hint 2: too few tokens</summary>
#
# `topk` refuses a `k` that is larger than the vocabulary. Take the smaller of the two.
#
# </details>
# <details><summary>Hint 3: min-p</summary>
#
# Compare probabilities, and cut logits. `amax(-1, keepdim=True)` is the best of each
# row, as a column.
#
# </details>

# %% id="w10-cutting" exercise="cutting" points=3 minutes=10 difficulty=1 kind="rebuild"
def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest of logits (B, V), and ties of the last; -inf elsewhere.

    Fan et al. 2018, arXiv:1805.04833.
    """
    ### BEGIN SOLUTION
    last = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < last, -torch.inf)
    ### END SOLUTION


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep tokens at least p times as probable as the most probable one.

    Nguyen et al. 2024, arXiv:2407.01082.
    """
    ### BEGIN SOLUTION
    shares = logits.softmax(-1)
    best = shares.amax(-1, keepdim=True)  # (B, 1)
    return logits.masked_fill(shares < p * best, -torch.inf)
    ### END SOLUTION

# %% id="w10-cutting-check"
check("cutting")

# %% [markdown] exercise="keep_top_p"
# ## 2. Top-p
#
# Keep the *fewest* tokens whose probabilities add up to at least $p$: the best one,
# the second, and so on, until the sum is reached. With 0.5, 0.25, 0.15, 0.1 and
# $p = 0.8$ the first two give 0.75, so the third is needed. The best token always
# stays. (Section 10.3.)
#
# <details><summary>Hint 1: a rule for one token</summary>
#
# A token stays if those that are better than it have not reached $p$ yet.
#
# </details>
# <details><summary>Hint 2: tools</summary>
#
# `sort(descending=True)` gives the sorted values and where each of them stood.
# `cumsum(-1)` is the running total, each token itself included.
#
# </details>
# <details><summary>Hint 3: back to the order of the vocabulary</summary>
#
# `empty.scatter(-1, order, decision)` writes each decision to the place that `order`
# names. Or sort the order itself: `order.argsort(-1)` says which rank a token has.
#
# </details>

# %% id="w10-keep-top-p" exercise="keep_top_p" points=3 minutes=15 difficulty=2 kind="rebuild"
def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the fewest tokens of each row whose probabilities add up to at least p.

    Holtzman et al. 2019, arXiv:1904.09751.
    """
    ### BEGIN SOLUTION
    shares, order = logits.softmax(-1).sort(descending=True)  # (B, V) each
    before = shares.cumsum(-1) - shares  # what the better ones have together
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(drop, -torch.inf)
    ### END SOLUTION

# %% id="w10-keep-top-p-check"
check("keep_top_p")

# %% [markdown] exercise="penalise_repetition"
# ## 3. The repetition penalty
#
# Every token that stands in `previous` becomes less likely, once, however often it
# stands there. With penalty $\theta$, a logit $z$ of such a token becomes
# $$z' = \begin{cases} z / \theta & \text{if } z > 0 \\
# z \cdot \theta & \text{else} \end{cases}$$
# All others stay as they are. (Section 10.3.)
#
# <details><summary>Hint 1: which tokens were seen?</summary>
#
# Make a table `(B, V)` of False, and write True where `previous` points, row by row:
# `scatter` does that.
#
# </details>
# <details><summary>Hint 2: two cases</summary>
#
# `torch.where(condition, a, b)` chooses number by number. You need it twice.
#
# </details>

# %% id="w10-penalise-repetition" exercise="penalise_repetition" points=2 minutes=10 difficulty=1 kind="rebuild"
def penalise_repetition(logits: torch.Tensor, previous: torch.Tensor,
                        penalty: float) -> torch.Tensor:
    """Make the tokens in `previous` (B, n) less likely in logits (B, V).

    Keskar et al. 2019, arXiv:1909.05858.
    """
    ### BEGIN SOLUTION
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, previous, True)
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lower, logits)
    ### END SOLUTION

# %% id="w10-penalise-repetition-check"
check("penalise_repetition")

# %% [markdown] exercise="sample_next"
# ## 4. Choose one token
#
# Put them together, in the order of Hugging Face: repetition penalty, temperature,
# top-k, top-p, min-p, draw. What is `None` is left out, and so is the penalty where it
# is 1 or where `previous` is `None`. Temperature 0 takes the most probable token, after
# the penalty. (Sections 10.2 and 10.3.)
#
# <details><summary>Hint 1: temperature 0</summary>
#
# Nothing can be divided by 0. Return early, with `argmax`.
#
# </details>
# <details><summary>Hint 2: the draw</summary>
#
# `torch.multinomial(probabilities, 1, generator=...)` draws one for each row and
# returns `(B, 1)`; you return `(B,)`. It wants probabilities, and you have logits.
#
# </details>

# %% id="w10-sample-next" exercise="sample_next" points=3 minutes=15 difficulty=2 kind="rebuild"
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

    `previous` (B, n) holds the tokens so far, for the penalty.
    """
    ### BEGIN SOLUTION
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
    ### END SOLUTION

# %% id="w10-sample-next-check"
check("sample_next")

# %% [markdown]
# For the next exercise you need some sizes of a model. This is where they stand:

# %% id="w10-config"
print(ModelConfig.preset("tiny"))

# %% [markdown] exercise="KVCache"
# ## 5. The cache
#
# Memory for the keys and values of `max_length` positions is set aside once, in
# `self.keys` and `self.values`: a list each, with one tensor
# `(B, K, max_length, D)` for each layer. Attention calls `update` once in every layer:
# write the new positions behind those that this layer holds, and return all so far.
# The lower layers already hold a token while the upper ones do not, so each layer
# counts for itself; `length` is what *every* layer holds. When the memory is full,
# raise `ValueError` and write nothing. K, D and the number of layers stand in
# `config`. (Section 10.4.)
#
# <details><summary>Hint 1: what to remember</summary>
#
# A list with one whole number for each layer: how many positions it holds.
#
# </details>
# <details><summary>Hint 2: writing into memory</summary>
#
# The new positions stand at `[:, :, start:end]`, with `start` the layer's count and
# `end` that plus the number of new positions, `k.shape[2]`.
#
# </details>
# <details><summary>Hint 3: length</summary>
#
# The layers are called in order, so the last one holds the fewest. Or take the
# smallest count.
#
# </details>

# %% id="w10-kv-cache" exercise="KVCache" points=4 minutes=20 difficulty=2 kind="rebuild"
class KVCache:
    """Keys and values of all positions so far, of all layers."""

    def __init__(self, config, batch_size: int, max_length: int, device=None,
                 dtype: torch.dtype | None = None):
        """`config` is a ModelConfig; B is `batch_size`."""
        ### BEGIN SOLUTION
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.filled = [0] * config.num_hidden_layers
        self.max_length = max_length
        ### END SOLUTION

    @property
    def length(self) -> int:
        """Positions that every layer holds."""
        ### BEGIN SOLUTION
        return min(self.filled)
        ### END SOLUTION

    def update(self, k: torch.Tensor, v: torch.Tensor,
               layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k and v (B, K, T, D) behind what is there; all so far, (B, K, S, D)."""
        ### BEGIN SOLUTION
        start = self.filled[layer_idx]
        end = start + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"{end} positions, and memory for {self.max_length}")
        self.keys[layer_idx][:, :, start:end] = k
        self.values[layer_idx][:, :, start:end] = v
        self.filled[layer_idx] = end
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]
        ### END SOLUTION

# %% id="w10-kv-cache-check"
check("KVCache")

# %% [markdown] exercise="next_tokens"
# ## 6. The loop
#
# Read the prompt, choose a token for each row, hand it out, read it, and so on. Two
# helpers of section 10.4 are there already:
#
# - `check_request(config, prompt, count)` raises `ValueError` when that many new tokens
#   are more than the model has positions. Call it first.
# - `start_ids(prompt, mask, end)` returns three things: memory for `end` tokens with
#   the prompt in it, `(B, end)`; for rows padded on the left, the mask `(B, end)` and
#   the positions `(B, end)`. Without a mask, these two are `None`.
#
# The model is called as `model(ids, kv_cache=cache)` and, for padded rows, with
# `attention_mask` (of all columns so far) and `position_ids` (of the columns that it
# reads now). It returns logits `(B, T, V)`. With the cache, it reads the prompt once
# and then one column a step; without, all columns each time.
#
# A row that has chosen one of `stop_ids` goes on with the *first* of `stop_ids`; when
# all rows have stopped, the loop ends. `seed` makes the draws repeat. (Sections 10.4
# and 10.5.)
#
# <details><summary>Hint 1: the steps in order</summary>
#
# Check; memory; cache (`KVCache` with room for `end` positions, in the type of the
# model's weights); generator. Then, for each new column: read, take the last row of
# logits, choose, deal with stops, store, yield.
#
# </details>
# <details><summary>Hint 2: one number is the whole difference</summary>
#
# Let `start` be the first column that the model has not read yet. Without a cache it
# stays 0.
#
# </details>
# <details><summary>Hint 3: stops</summary>
#
# Keep a bool for each row. `torch.where(stopped, first_stop, chosen)` replaces, and
# `torch.isin(chosen, stops)` finds the rows that stop now. In this order: the stop
# token itself is handed out.
#
# </details>

# %% id="w10-next-tokens" exercise="next_tokens" points=5 minutes=30 difficulty=3 kind="rebuild"
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

    `sampling` are the options of `sample_next`.
    """
    ### BEGIN SOLUTION
    check_request(model.config, input_ids, max_new_tokens)
    (B, T), device = input_ids.shape, input_ids.device
    end = T + max_new_tokens
    ids, mask, positions = start_ids(input_ids, attention_mask, end)
    dtype = next(model.parameters()).dtype
    cache = KVCache(model.config, B, end, device, dtype) if use_cache else None
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    stopped = torch.zeros(B, dtype=torch.bool, device=device)
    start = 0
    for now in range(T, end):
        padding = {}
        if mask is not None:
            padding["attention_mask"] = mask[:, :now]
            padding["position_ids"] = positions[:, start:now]
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
    ### END SOLUTION

# %% id="w10-next-tokens-check"
check("next_tokens")

# %% [markdown]
# Your loop with your cache on a model that was never trained: nonsense, but the same
# nonsense with and without the cache.

# %% id="w10-loop-try"
torch.manual_seed(1)
config = ModelConfig.preset("tiny", vocab_size=300, max_position_embeddings=64,
                            initializer_range=0.3)
model, prompt = MiniMind(config).eval(), torch.tensor([[5, 77, 210]])
for use_cache in (True, False):
    print([int(token) for token in next_tokens(model, prompt, 12, use_cache=use_cache)])

# %% [markdown] exercise="cache_gib"
# ## 7. Predict: what a cache weighs
#
# Llama 3 8B (Grattafiori et al. 2024, arXiv:2407.21783) has 32 layers, 32 query heads,
# 8 key/value heads, and heads of width 128. How much memory does the cache take for 4
# chats of 8,192 positions each, in bfloat16? Write the number of GiB ($2^{30}$ bytes)
# into `cache_gib`. A formula counts as a number. (Section 10.4.)
#
# <details><summary>Hint 1: which heads?</summary>
#
# Only keys and values are kept. Queries are asked once.
#
# </details>
# <details><summary>Hint 2: one position of one chat</summary>
#
# In one layer: 8 heads times 128 numbers for the key, as many for the value, two bytes
# each. That is 4,096 bytes.
#
# </details>

# %% id="w10-cache-gib" exercise="cache_gib" points=2 minutes=5 difficulty=1 kind="beyond"
### BEGIN SOLUTION
cache_gib = 2 * 32 * 4 * 8 * 8192 * 128 * 2 / 2**30
### END SOLUTION

# %% id="w10-cache-gib-check"
check("cache_gib")

# %% [markdown] exercise="text_pieces"
# ## 8. Two bugs
#
# A colleague turns tokens into text while they come. `bytes_of[token]` are the bytes of
# a token, and a character may be spread over several tokens. English looked fine for a
# week. Then a user wrote in Greek and got `��`, and another one saw `<|im_end|>` under
# each answer. Find both bugs, and repair them in place. (Section 10.6.)
#
# <details><summary>Hint 1: half a character</summary>
#
# The incremental decoder keeps incomplete bytes for the next call. What does
# `final=True` tell it?
#
# </details>
# <details><summary>Hint 2: the order</summary>
#
# Follow a stop token through the loop, line by line.
#
# </details>

# %% id="w10-text-pieces" exercise="text_pieces" points=3 minutes=10 difficulty=2 kind="beyond"
def text_pieces(tokens, bytes_of: dict[int, bytes], stop_ids: Sequence[int] = ()):
    """Yield text for the tokens up to a stop token, each character when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        ### BEGIN SOLUTION
        if token in stop_ids:
            break
        piece = decoder.decode(bytes_of[token])
        if piece:
            yield piece
        ### END SOLUTION
        ### BEGIN STUB
        # piece = decoder.decode(bytes_of[token], final=True)
        # if piece:
        #     yield piece
        # if token in set(stop_ids):
        #     break
        ### END STUB
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest

# %% id="w10-text-pieces-check"
check("text_pieces")
### BEGIN HIDDEN TESTS
hidden_bytes = {i: bytes([i]) for i in range(256)} | {256: b"<|im_end|>"}
hidden_text = "ß 東京 👩‍🚀"
hidden_pieces = list(text_pieces([*hidden_text.encode(), 256, 33], hidden_bytes, [256]))
assert hidden_pieces == list(hidden_text)
### END HIDDEN TESTS

# %% [markdown] exercise="keep_typical"
# ## 9. Typical tokens
#
# Top-p always keeps the most probable token. People do not talk like that: what they
# say is about as surprising as the place lets you expect, not less. Locally typical
# sampling (Meister et al. 2022, arXiv:2202.00666) compares the surprise of each token,
# $-\ln p_i$, with the mean surprise, the entropy $h = -\sum_j p_j \ln p_j$:
# $$d_i = \big|\, {-\ln p_i} - h \,\big|$$
# It keeps the tokens with the smallest $d_i$: the fewest that have at least
# probability `mass` together. So the best token may go. A token whose logit is minus
# infinity already stays out, and it adds nothing to the entropy.
#
# <details><summary>Hint 1: it is top-p in another order</summary>
#
# In exercise 2 the tokens stood in the order of their probability. Here they stand in
# the order of $d$, the smallest first. The rest is the same.
#
# </details>
# <details><summary>Hint 2: minus infinity</summary>
#
# For such a token $p \ln p$ is 0 times minus infinity, which is NaN. `torch.where` or
# `nansum` leaves it out.
#
# </details>
# <details><summary>Hint 3: two orders</summary>
#
# `d.argsort(-1)` is the order; `gather(-1, order)` brings the probabilities into it.
#
# </details>

# %% id="w10-keep-typical" exercise="keep_typical" points=4 minutes=20 difficulty=3 kind="beyond"
def keep_typical(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """Keep the fewest tokens, in order of |surprise - entropy|, that reach `mass`."""
    ### BEGIN SOLUTION
    logs = logits.log_softmax(-1)  # (B, V)
    shares = logs.exp()
    entropy = -(shares * logs).nansum(-1, keepdim=True)  # (B, 1)
    order = (-logs - entropy).abs().argsort(-1)
    ordered = shares.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= mass)
    return logits.masked_fill(drop, -torch.inf)
    ### END SOLUTION

# %% id="w10-keep-typical-check"
check("keep_typical")

# %% [markdown] exercise="speculative"
# ## 10. An experiment: let a small model guess
#
# Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192): a small model drafts a
# token from its probabilities $q$, and the large one, with probabilities $p$, checks
# it. Draft $x$ is accepted with probability
# $$\min\!\big(1,\; p_x / q_x\big)$$
# A rejected draft is replaced by a token drawn in proportion to $\max(0,\, p - q)$.
# The result is a draw from $p$, exactly, whatever the small model is worth. The large
# model can check several drafts in one pass, and that is what saves time.
#
# **Predict first:** with $p = (0.5, 0.3, 0.2)$ and $q = (0.2, 0.3, 0.5)$, which share
# of the drafts will be accepted? Write it into `predicted_share` (within 0.01).
#
# Then write `accept_drafts`, and `measure`: it checks many drafts from this $q$, and
# tells the share that is accepted and the shares of the three tokens that come out.
# `measured` is what it tells about 20,000 drafts.
#
# <details><summary>Hint 1: the prediction</summary>
#
# Token $x$ is drafted with probability $q_x$, and then accepted with
# $\min(1, p_x / q_x)$. The product is the smaller of two numbers. Add it up.
#
# </details>
# <details><summary>Hint 2: accept with a probability</summary>
#
# `torch.rand(B)` is below $a$ with probability $a$. Each row needs a number of its
# own. `p.gather(-1, drafts[:, None])[:, 0]` is the probability of each row's draft.
#
# </details>
# <details><summary>Hint 3: where nothing is left</summary>
#
# Where $p = q$, there is nothing to redraw from, and `multinomial` refuses a row of
# zeros. But no such draft is ever rejected: redraw only for the rejected rows.
#
# </details>

# %% id="w10-speculative" exercise="speculative" points=4 minutes=25 difficulty=3 kind="beyond"
### BEGIN SOLUTION
predicted_share = 0.2 + 0.3 + 0.2
### END SOLUTION

def accept_drafts(p: torch.Tensor, q: torch.Tensor,
                  drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Check drafts (B,) from q (B, V) against p (B, V).

    Returns the tokens (B,) and which drafts were accepted, bool (B,).
    """
    ### BEGIN SOLUTION
    place = drafts[:, None]
    chance = (p.gather(-1, place) / q.gather(-1, place))[:, 0]
    accepted = torch.rand(len(drafts)) < chance
    tokens = drafts.clone()
    if not accepted.all():
        rest = (p - q).clamp(min=0)[~accepted]
        tokens[~accepted] = torch.multinomial(rest, 1)[:, 0]
    return tokens, accepted
    ### END SOLUTION


def measure(count: int = 20_000) -> dict:
    """{"accepted": share of the drafts, "tokens": shares of the three tokens}."""
    ### BEGIN SOLUTION
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.2]).expand(count, -1)
    q = torch.tensor([0.2, 0.3, 0.5]).expand(count, -1)
    tokens, accepted = accept_drafts(p, q, torch.multinomial(q, 1)[:, 0])
    shares = tokens.bincount(minlength=3) / count
    return {"accepted": accepted.float().mean().item(), "tokens": shares.tolist()}
    ### END SOLUTION

### BEGIN SOLUTION
measured = measure()
### END SOLUTION

# %% id="w10-speculative-check"
check("speculative")

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves the functions of exercises 1 to 6 that pass to `student/generate.py`.
# With `MINIMIND_STUDENT=student` before a command, the course uses them: the chat of
# section 10.7 then chooses its words with your code.

# %% id="w10-keep"
keep()
