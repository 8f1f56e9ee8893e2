# %% [markdown]
# # Workbook 7. The transformer
#
# You write the core of `minimind.model` yourself: the norm, the block, the mask, the
# decoder, and the counts of parameters and operations. Then you predict the size of a
# published model, find two bugs, cap the scores of attention as Gemma 2 does, and
# measure how the stream grows with depth. About two and a half hours; stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. Hints open one at a time. `solution("Block")` shows that
# one solution and no other.
#
# Letters as in the chapter: B batch, T positions, S keys, C model width, H query heads,
# K key/value heads, D head width, V vocabulary.

# %% id="setup"
# (filled in by the build)

# %% id="w07-imports"
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.attention import Attention, causal_mask
from minimind.model import ModelConfig, working_dtype
from minimind.moe import MoE, SwiGLU
from minimind.rope import apply_rope, rope_cos_sin, rope_frequencies

def start():
    """100 random vectors of width 256 and size 1, the same at each call."""
    return torch.randn(100, 256, generator=torch.Generator().manual_seed(7))

def matrix(layer):
    """The weights (256, 256) of a layer; they keep the size of a vector, on average."""
    return torch.randn(256, 256, generator=torch.Generator().manual_seed(layer)) / 16

# %% [markdown] exercise="RMSNorm"
# ## 1. RMSNorm
#
# Divide each vector by its root mean square, then scale each channel by a learned
# weight, which begins at 1:
# $$y_i = w_i \, \frac{x_i}{\sqrt{\frac{1}{C}\sum_j x_j^2 + \varepsilon}}$$
# LayerNorm (Ba et al. 2016, arXiv:1607.06450) would take the mean off first, and add a
# bias at the end; RMSNorm does neither. The result has the type of x, but the mean is
# taken in float32: in float16 the square of 300 is already infinite.
#
# <details><summary>Hint 1: each vector by itself</summary>
#
# The mean goes over the last dimension only. `keepdim=True` lets the result divide x.
#
# </details>
# <details><summary>Hint 2: the weight</summary>
#
# `nn.Parameter(torch.ones(...))`, called `weight`, so that it has Hugging Face's name.
# Under bfloat16 a float32 weight would make the result float32: `.to(x.dtype)`.
#
# </details>

# %% id="w07-rmsnorm" exercise="RMSNorm" points=2 minutes=10 difficulty=1 kind="rebuild"
class RMSNorm(nn.Module):
    """x (..., C) -> (..., C). Zhang and Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        ### BEGIN SOLUTION
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        mean_square = x.float().pow(2).mean(-1, keepdim=True)
        y = x / (mean_square + self.eps).sqrt()
        return y.to(x.dtype) * self.weight.to(x.dtype)
        ### END SOLUTION

# %% id="w07-rmsnorm-check"
check("RMSNorm")

# %% [markdown] exercise="Block"
# ## 2. One block
#
# `__init__` is given: two norms, an attention layer, a feed-forward layer. Write
# `forward`: the attention reads a normalised copy of the stream, and its result is
# added to the stream; then the feed-forward layer does the same with a norm of its own.
# $$x \leftarrow x + \text{attention}(\text{norm}_1(x)) \qquad
# x \leftarrow x + \text{feed-forward}(\text{norm}_2(x))$$
# The attention layer takes `(x, rotate, attention_mask, kv_cache)`; hand everything on.
#
# <details><summary>Hint 1: what is added to what?</summary>
#
# The stream itself is never normalised in here, only the copy that a layer reads.
#
# </details>
# <details><summary>Hint 2: one after the other</summary>
#
# The feed-forward layer reads what the attention has already added.
#
# </details>

# %% id="w07-block" exercise="Block" points=3 minutes=15 difficulty=1 kind="rebuild"
class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); (B, T, C) stays."""

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(C, eps)
        self.self_attn = Attention(
            C, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            norm=(lambda width: RMSNorm(width, eps)) if config.qk_norm else None,
            layer_idx=layer_idx,
        )
        self.post_attention_layernorm = RMSNorm(C, eps)
        if config.num_experts:
            self.mlp = MoE(C, config.moe_intermediate_size, config.num_experts,
                           config.num_experts_per_tok, config.norm_topk_prob)
        else:
            self.mlp = SwiGLU(C, config.intermediate_size)

    def forward(self, x: Tensor, rotate: Callable, attention_mask: Tensor | None = None,
                kv_cache=None) -> Tensor:
        ### BEGIN SOLUTION
        x = x + self.self_attn(self.input_layernorm(x), rotate, attention_mask,
                               kv_cache)
        return x + self.mlp(self.post_attention_layernorm(x))
        ### END SOLUTION

# %% id="w07-block-check"
check("Block")

# %% [markdown] exercise="full_mask"
# ## 3. One mask for all layers
#
# What attention gets to see is decided once, before the blocks. `past` positions are in
# the cache already, T new ones come; so there are $S = \text{past} + T$ keys. Return
#
# - `None`, the fast case, if no mask is given and the rows are plainly causal: nothing
#   is in the cache, or there is only one new position;
# - a mask with four dimensions as it is: it says everything already;
# - else a bool mask `(B or 1, 1, T, S)`, True where a query may look: causal, and if a
#   padding mask `(B, S)` is given (1 = real, 0 = padding), without the padded keys.
#
# A padded position has no key to look at, and its softmax would be 0 / 0; so every
# position may look at itself. A padding mask that is not `(B, S)` raises `ValueError`.
#
# <details><summary>Hint 1: shapes that broadcast</summary>
#
# `causal_mask(T, S)` is `(T, S)`; the padding mask is about keys, so it becomes
# `(B, 1, 1, S)`. `&` of both is `(B, 1, T, S)`. `&` wants bool on both sides.
#
# </details>
# <details><summary>Hint 2: itself</summary>
#
# The rows of the new positions are the last T of `torch.eye(S, dtype=torch.bool)`. Each
# key is allowed if it is real *or* the position itself, *and* not in the future.
#
# </details>

# %% id="w07-full-mask" exercise="full_mask" points=3 minutes=20 difficulty=2 kind="rebuild"
def full_mask(attention_mask: Tensor | None, past: int,
              input_ids: Tensor) -> Tensor | None:
    """The mask that attention reads: None for plain causal rows, else bool.

    input_ids is (B, T). The result is (B or 1, 1, T, S), True = may look.
    """
    ### BEGIN SOLUTION
    T = input_ids.size(1)
    if attention_mask is None and (past == 0 or T == 1):
        return None
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    mask = causal_mask(T, past + T).to(input_ids.device)[None, None]  # (1, 1, T, S)
    if attention_mask is None:
        return mask
    expected = (input_ids.size(0), past + T)
    if attention_mask.shape != expected:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; expected "
                         f"(B, past + T) = {expected}")
    itself = torch.eye(past + T, dtype=torch.bool, device=mask.device)[past:]
    return mask & (attention_mask.bool()[:, None, None, :] | itself)
    ### END SOLUTION

# %% id="w07-full-mask-check"
check("full_mask")

# %% [markdown] exercise="Decoder"
# ## 4. The decoder
#
# From ids to hidden vectors: embed; make the rotation and the mask, once for all
# layers; go through the blocks; normalise at the end. `__init__`, `frequencies` and
# `rotation` are given. Write `forward`:
#
# 1. Embed the ids, and convert the stream to `working_dtype(x)` (bfloat16 under
#    autocast, else what it is).
# 2. `past` is `kv_cache.length`, or 0 without a cache.
# 3. `self.rotation(position_ids, past, x)` and your `full_mask`.
# 4. Each block takes `(x, rotate, mask, kv_cache)`.
#
# <details><summary>Hint 1: the end</summary>
#
# The blocks never normalise the stream, so its size is whatever it has grown to. One
# norm of the decoder, `self.norm`, is still unused.
#
# </details>
# <details><summary>Hint 2: a loop</summary>
#
# `self.layers` is an `nn.ModuleList`; a `for` goes through it.
#
# </details>

# %% id="w07-decoder" exercise="Decoder" points=4 minutes=20 difficulty=2 kind="rebuild"
class Decoder(nn.Module):
    """Token ids (B, T) -> hidden vectors (B, T, C): embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i)
                                    for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        inv_freq, self.attention_factor = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self, seq_len: int | None = None) -> tuple[Tensor, float]:
        config = self.config
        return rope_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling,
            config.max_position_embeddings, seq_len
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, kv_cache=None,
    ) -> Tensor:
        ### BEGIN SOLUTION
        x = self.embed_tokens(input_ids)  # (B, T, C)
        x = x.to(working_dtype(x))
        past = kv_cache.length if kv_cache is not None else 0
        rotate = self.rotation(position_ids, past, x)
        mask = full_mask(attention_mask, past, input_ids)
        for layer in self.layers:
            x = layer(x, rotate, mask, kv_cache)
        return self.norm(x)
        ### END SOLUTION

    def rotation(self, position_ids: Tensor | None, past: int, x: Tensor) -> Callable:
        """The rotary turn of queries and keys, computed once for all layers."""
        if position_ids is None:
            position_ids = torch.arange(past, past + x.size(1), device=x.device)
        inv_freq = self.inv_freq.float()
        # the only kind that depends on the length
        if (self.config.rope_scaling or {}).get("rope_type") == "dynamic":
            inv_freq = self.frequencies(int(position_ids.max()) + 1)[0].to(x.device)
        tables = rope_cos_sin(position_ids, inv_freq, self.attention_factor)
        cos, sin = (table.to(x.dtype) for table in tables)  # (T, D) or (B, T, D)
        return lambda q, k: (apply_rope(q, cos, sin), apply_rope(k, cos, sin))

# %% id="w07-decoder-check"
check("Decoder")

# %% [markdown] exercise="count_parameters"
# ## 5. Parameters from the configuration
#
# Count without building anything. `matmul_parameters` counts the weights of all
# matrices that multiply a token: in each layer four in attention (queries and output $C
# \times HD$, keys and values $C \times KD$) and three of $C \times I$ in the
# feed-forward layer; once the output layer, $C \times V$. With experts (`num_experts` >
# 0), each is a feed-forward layer with $I$ = `moe_intermediate_size`; `experts` of them
# count, and a router of $C \times$ `num_experts`.
#
# `count_parameters` adds the rest: two norms of width $C$ in each layer and one at the
# end; with `qk_norm` two more of width $D$ in each layer; and a second $V \times C$ if
# the embedding is not tied. It counts all experts, or with `active=True` the
# `num_experts_per_tok` that work on one token.
#
# <details><summary>Hint 1: a number to compare with</summary>
#
# A dense model with everything 1 (widths, heads, layers, vocabulary), tied, with q/k
# norm: 4 + 3 + 1 in matrices, 2 + 2 + 1 in norms.
#
# </details>
# <details><summary>Hint 2: inactive, but not gone</summary>
#
# Only the number of experts depends on `active`. Everything else, the router too, works
# on every token.
#
# </details>

# %% id="w07-count-parameters" exercise="count_parameters" points=3 minutes=20 difficulty=2 kind="rebuild"
def matmul_parameters(config: ModelConfig, experts: int) -> int:
    """Weights that multiply one token when `experts` work on it, with the output."""
    ### BEGIN SOLUTION
    C, D = config.hidden_size, config.head_dim
    attention = 2 * C * D * (config.num_attention_heads + config.num_key_value_heads)
    feed_forward = 3 * C * config.intermediate_size
    if config.num_experts > 0:
        one, router = 3 * C * config.moe_intermediate_size, C * config.num_experts
        feed_forward = experts * one + router
    return config.num_hidden_layers * (attention + feed_forward) + C * config.vocab_size
    ### END SOLUTION

def count_parameters(config: ModelConfig, active: bool = False) -> int:
    """All parameters of a model, or with active=True those that work on one token."""
    ### BEGIN SOLUTION
    C = config.hidden_size
    heads = 2 * config.head_dim if config.qk_norm else 0
    norms = config.num_hidden_layers * (2 * C + heads) + C
    embedding = 0 if config.tie_word_embeddings else C * config.vocab_size
    experts = config.num_experts_per_tok if active else config.num_experts
    return matmul_parameters(config, experts) + norms + embedding
    ### END SOLUTION

# %% id="w07-count-parameters-check"
check("count_parameters")

# %% [markdown] exercise="flops_per_token"
# ## 6. Operations for a token
#
# A product with $N$ weights takes $2N$ operations. In each layer a token also meets the
# $T$ positions of its row twice, once in the scores and once in the mixing:
# $4 \cdot T \cdot H \cdot D$ in all (the masked half is counted too, as is usual).
# Backward takes twice as much as forward. (Chowdhery et al. 2022, arXiv:2204.02311.)
#
# <details><summary>Hint</summary>
#
# `matmul_parameters` of exercise 5, with as many experts as work on one token. Looking
# up an embedding multiplies nothing.
#
# </details>

# %% id="w07-flops" exercise="flops_per_token" points=2 minutes=10 difficulty=1 kind="rebuild"
def flops_per_token(config: ModelConfig, T: int, training: bool = True) -> int:
    """Floating point operations for one token of a row of T; training has backward."""
    ### BEGIN SOLUTION
    width = config.num_attention_heads * config.head_dim
    attention = 4 * T * config.num_hidden_layers * width
    forward = 2 * matmul_parameters(config, config.num_experts_per_tok) + attention
    return 3 * forward if training else forward
    ### END SOLUTION

# %% id="w07-flops-check"
check("flops_per_token")

# %% [markdown] exercise="qwen"
# ## 7. Predict: what does "0.6B" mean?
#
# Qwen3-0.6B (Yang et al. 2025, arXiv:2505.09388) has width 1024, 28 layers, 16 query
# heads and 8 key/value heads of 128 channels, feed-forward layers of 3072, q/k norm,
# 151,936 tokens, and a tied embedding. How many **millions** of parameters is that? Do
# it on paper, to three digits: the norms do not matter. And before you begin: which
# part is the largest, attention, feed-forward or the embedding?
#
# <details><summary>Hint 1: the layers</summary>
#
# $C = 1024$ is $2^{10}$, and $HD = 2048$: the heads are together wider than the stream.
#
# </details>
# <details><summary>Hint 2: in units of a million</summary>
#
# One layer: attention $2 \cdot 1024 \cdot 128 \cdot 24 \approx 6.3$, feed-forward
# $3 \cdot 1024 \cdot 3072 \approx 9.4$.
#
# </details>

# %% id="w07-qwen" exercise="qwen" points=1 minutes=10 difficulty=1 kind="beyond"
### BEGIN SOLUTION
predicted_millions = 596
### END SOLUTION

# %% id="w07-qwen-check"
check("qwen")

# %% [markdown] exercise="pre_norm_stack"
# ## 8. Two bugs
#
# A colleague wrote a stack of pre-norm layers, each of them just `tanh(norm(x) @ w)`.
# The shapes are right and it trains. There are two bugs. One **leaks**: an earlier
# output changes when only the last position changes. The other **loses the stream**:
# what an early layer wrote is almost gone after many layers. Find both and repair them
# in place.
#
# <details><summary>Hint 1: the leak</summary>
#
# Which line mixes positions? A norm must know nothing but its own vector.
#
# </details>
# <details><summary>Hint 2: the stream</summary>
#
# Compare the line that adds with the formula of exercise 2: what is on the left of the
# plus?
#
# </details>

# %% id="w07-pre-norm-stack" exercise="pre_norm_stack" points=3 minutes=10 difficulty=2 kind="beyond"
def pre_norm_stack(x, weights, eps=1e-6):
    """x (B, T, C) through one pre-norm layer for each matrix (C, C) in `weights`."""
    for w in weights:
        ### BEGIN SOLUTION
        size = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        x = x + torch.tanh(x / size @ w)
        ### END SOLUTION
        ### BEGIN STUB
        # size = (x.pow(2).mean() + eps).sqrt()
        # x = x / size + torch.tanh(x / size @ w)
        ### END STUB
    return x

# %% id="w07-pre-norm-stack-check"
check("pre_norm_stack")
### BEGIN HIDDEN TESTS
torch.manual_seed(41)
hidden_x, hidden_w = torch.randn(2, 9, 5), torch.randn(3, 5, 5)
hidden_whole = pre_norm_stack(hidden_x, hidden_w)
hidden_part = pre_norm_stack(hidden_x[:, :4], hidden_w)
assert torch.allclose(hidden_part, hidden_whole[:, :4], atol=1e-5)
assert torch.equal(pre_norm_stack(100 * hidden_x, 0 * hidden_w), 100 * hidden_x)
### END HIDDEN TESTS

# %% [markdown] exercise="capped_attention"
# ## 9. Scores that cannot explode: soft-capping
#
# Large scores make attention all or nothing, and then no gradient comes through. q/k
# norm is one cure. Gemma 2 (Gemma Team 2024, arXiv:2408.00118) has another: it bends
# the scores, so that none is larger than a cap (50 there, and 30 for the logits at the
# end):
# $$\text{capped} = \text{cap} \cdot \tanh\!\Big(\frac{\text{scores}}{\text{cap}}\Big)
# \qquad \text{scores} = \frac{q\,k^\top}{\sqrt{D}}$$
# Write causal attention with capped scores. Small scores hardly change: $\tanh(a)
# \approx a$.
#
# <details><summary>Hint 1: one order works, one does not</summary>
#
# Bend minus infinity: what comes out, and what share does it get?
#
# </details>
# <details><summary>Hint 2: try the ends</summary>
#
# A huge cap gives plain attention. A tiny cap makes all scores nearly equal: then each
# position gets the mean of the values so far.
#
# </details>

# %% id="w07-capped-attention" exercise="capped_attention" points=3 minutes=15 difficulty=2 kind="beyond"
def capped_attention(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """Causal attention whose scores are bent to at most `cap`; all are (B, H, T, D)."""
    ### BEGIN SOLUTION
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = cap * torch.tanh(scores / cap)
    hidden = ~causal_mask(q.shape[2]).to(q.device)
    return scores.masked_fill(hidden, -math.inf).softmax(dim=-1) @ v
    ### END SOLUTION

# %% id="w07-capped-attention-check"
check("capped_attention")

# %% [markdown] exercise="stream_size"
# ## 10. An experiment: how large does the stream grow?
#
# Before training, each layer writes something into the stream that has nothing to do
# with what is there. Take the plainest layer of this kind, a random matrix that keeps
# the size of a vector: $x \leftarrow x + \text{norm}(x)\,W_n$, from vectors of size
# (RMS) 1. Each layer adds a vector of size 1.
#
# **Predict first:** how large is the stream after 64 layers? Write the number into
# `predicted_size`. Then write `stream_size(layers)`: from `start()`, with `matrix(0)`,
# `matrix(1)`, ... and the norm of exercise 1 without a learned weight; return the root
# mean square of all numbers at the end, as a plain number. Fill the dict `measured` for
# 1, 4, 16 and 64 layers, and correct your prediction if it is more than a tenth off.
#
# <details><summary>Hint 1: adding vectors that do not know each other</summary>
#
# Two random vectors in 256 dimensions are almost at right angles. By Pythagoras the sum
# of two of size 1 has size $\sqrt 2$.
#
# </details>
# <details><summary>Hint 2: what follows from it?</summary>
#
# A late layer adds size 1 to a stream that is much larger: it changes little. GPT-2
# therefore begins with smaller weights where layers write into the stream, divided by
# the root of the number of layers.
#
# </details>

# %% id="w07-stream-size" exercise="stream_size" points=4 minutes=20 difficulty=2 kind="beyond"
### BEGIN SOLUTION
predicted_size = 8
### END SOLUTION

def stream_size(layers: int) -> float:
    """The size (RMS) of the stream after so many layers of random weights."""
    ### BEGIN SOLUTION
    x = start()
    for n in range(layers):
        x = x + F.rms_norm(x, (256,)) @ matrix(n)
    return x.pow(2).mean().sqrt().item()
    ### END SOLUTION

### BEGIN SOLUTION
measured = {layers: stream_size(layers) for layers in (1, 4, 16, 64)}
### END SOLUTION

# %% id="w07-stream-size-check"
check("stream_size")

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves the classes and functions of exercises 1 to 6 that pass to
# `student/model.py`. With `MINIMIND_STUDENT=student` before a command, the course
# trains the model that is built from them.

# %% id="w07-keep"
keep()
