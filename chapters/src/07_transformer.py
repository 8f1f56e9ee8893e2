# %% [markdown]
# # 7. The transformer
#
# You have attention, rotary positions and feed-forward layers. This chapter puts them together into the model that the rest of the course trains. Before anything is trained,
# you will predict from the configuration alone how many parameters it has, how many operations a token costs and how many bytes a training step needs, and then measure all three.
#
# At the end you can
#
# - write RMSNorm and a pre-norm block, and show why both the norm and the residual path are needed;
# - build the whole model, with or without experts, and say what its first loss will be;
# - predict parameters exactly, and FLOPs and training memory within 10%;
# - save a folder that Hugging Face loads, and load theirs, with the same logits.
#
# You need chapters 4 to 6. Reading 40 minutes; running: smoke 20 s, cpu 40 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="model-default-exp"
#| default_exp model

# %% id="model-imports"
#| export
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minimind.attention import MATRICES_UP_TO, QUERY_BLOCK, Attention, causal_mask
from minimind.moe import MoE, SwiGLU, load_balancing_loss
from minimind.rope import apply_rope, rope_cos_sin, rope_frequencies

# %% [markdown]
# The whole model in one picture. Read it from the bottom to the top.

# %% id="model-picture"
import matplotlib.pyplot as plt


def step(ax, y, text, colour="#dce9f7", x=2.0):
    ax.text(x, y, text, ha="center", va="center", size=10,
            bbox=dict(boxstyle="round", fc=colour, ec="black"))


fig, ax = plt.subplots(figsize=(6.5, 5))
ax.plot([0, 0], [0.5, 8.4], color="black", lw=5, solid_capstyle="butt")
for y, text, colour in ((2.2, "RMSNorm → attention", "#dce9f7"),
                        (4.2, "RMSNorm → feed-forward", "#f7e3d0")):
    step(ax, y, text, colour, x=2.4)
    read, add = (dict(arrowstyle="->",
                      connectionstyle=f"angle,angleA={a},angleB={90 - a}")
                      for a in (0, 90))
    ax.annotate("", (1.1, y), (0, y - 0.7), arrowprops=read)
    ax.annotate("", (0.05, y + 0.7), (2.4, y + 0.3), arrowprops=add)
    ax.text(-0.4, y + 0.7, "+", size=16, ha="center", va="center")
around = {
    0.2: "token ids (B, T) → embedding (B, T, C)",
    6.4: "the next block, and so on",
    7.5: "RMSNorm",
    8.7: "output layer → logits (B, T, V)",
}
for y, text in around.items():
    step(ax, y, text, "white", x=0)
ax.add_patch(plt.Rectangle((-0.9, 1.1), 5, 4.3, fill=False, ls="--"))
ax.text(4.2, 3.3, "one block,\nrepeated", size=10, va="center")
ax.set(xlim=(-2.6, 5.6), ylim=(-0.2, 9.1))
ax.axis("off")
show(fig, "The model: a stream of vectors (thick line) runs from the embedding to the "
          "logits, and every block reads a normalised copy of it and adds its result.")

# %% [markdown]
# ## 7.1 Why not simply stack the layers?
#
# Take 24 feed-forward layers from chapter 6 and chain them, each one working on the output of the last. Follow the size of the vectors, as the root mean square of their numbers.
# What do you expect after 24 layers, when all weights are drawn with standard deviation 0.05?

# %% id="model-stack"
from minimind.data import set_seed


def stack(spread, number=24):
    set_seed(7)
    layers = [SwiGLU(160, 448) for _ in range(number)]
    for layer in layers:
        for weight in layer.parameters():
            nn.init.normal_(weight, std=spread)
    return layers


def rms(x):
    return x.detach().pow(2).mean().sqrt().item()

# %% [markdown]
# `step` says how a layer and its input make the next vector, so that other ways can be tried later.

# %% id="model-stack-run"
def sizes(step, spread):
    set_seed(1)
    x, seen = torch.randn(100, 160), []
    with torch.no_grad():
        for layer in stack(spread):
            x = step(layer, x)
            seen.append(rms(x))
    return seen


for spread in (0.05, 0.08):
    chained = sizes(lambda layer, x: layer(x), spread)
    print(f"spread {spread}:", "  ".join(f"{size:.1e}" for size in chained[:7]))
assert sizes(lambda layer, x: layer(x), 0.05)[-1] == 0

# %% [markdown]
# With the smaller weights the signal is gone after six layers: each layer shrinks it, until float32 has no smaller number. With weights 1.6 times larger it explodes. No choice is safe
# for every depth, so models use two tools.
#
# **The residual path.** A layer does not replace its input, it adds to it: `x + layer(x)`. Whatever a layer does, the input gets through, and so does the gradient.
#
# **The norm.** Each layer reads a copy of the stream that is scaled to size 1, so it never matters how large the stream has grown.
#
# ## 7.2 RMSNorm
#
# Divide a vector by its root mean square, then scale every channel by a learned weight (Zhang and Sennrich 2019):
#
# $$y_i = w_i \, \frac{x_i}{\sqrt{\frac{1}{C}\sum_j x_j^2 + \varepsilon}}$$
#
# By hand for the vector (3, 4): the mean square is (9 + 16) / 2 = 12.5, its root 3.54.

# %% id="model-rmsnorm-by-hand"
x = torch.tensor([3.0, 4.0])
y = x / (x.pow(2).mean() + 1e-6).sqrt()
print(y, "size now", rms(y))

# %% [markdown]
# $\varepsilon$ keeps a vector of zeros from dividing by zero. In the class, torch's own `F.rms_norm` does the same in one call:

# %% id="model-rmsnorm-class"
#| export
class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale each channel.

    x (..., C) -> (..., C). Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

# %% [markdown]
# It equals the formula, and an input a thousand times as large gives the same output:

# %% id="model-rmsnorm-check"
norm, vectors = RMSNorm(160), torch.randn(5, 160)
by_hand = vectors / (vectors.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
torch.testing.assert_close(norm(vectors), by_hand)
torch.testing.assert_close(norm(1000 * vectors), norm(vectors), atol=1e-4, rtol=1e-4)

# %% [markdown]
# **Exercise 7.1 (10 min, ★): `RMSNorm`** in [workbook 7](../exercises/07_transformer.ipynb). Write it from the formula, without `F.rms_norm` if you like; the check compares with torch's own, in bfloat16 too.
#
# Now four ways to stack the same 24 layers: without tools, with the residual path alone, and with a norm in one of two places. Which of them survive both spreads?

# %% id="model-residual-run"
norm = RMSNorm(160)
ways = {
    "layer(x)": lambda layer, x: layer(x),
    "x + layer(x)": lambda layer, x: x + layer(x),
    "x + layer(norm(x))": lambda layer, x: x + layer(norm(x)),
    "norm(x + layer(x))": lambda layer, x: norm(x + layer(x)),
}

# %% [markdown]
# Each of them, with small weights on the left and larger ones on the right:

# %% id="model-residual-picture"
fig, axes = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
for ax, spread in zip(axes, (0.05, 0.08)):
    for name, step in ways.items():
        ax.plot(range(1, 25), sizes(step, spread), label=name)
    ax.set(yscale="log", ylim=(1e-6, 1e6), xlabel="layer",
           title=f"weights with spread {spread}")
axes[0].set_ylabel("size of the vectors (RMS)")
axes[1].legend(loc="lower right")
show(fig, "Size of the vectors through 24 layers: without a norm they vanish or "
          "explode, with a norm in either place they stay near 1.")

# %% [markdown]
# The two ways with a norm look alike here. Backward they do not. Take the gradient of some function of the result with respect to the input of the first layer:

# %% id="model-residual-gradient"
def gradient_size(step, spread):
    set_seed(1)
    start = x = torch.randn(100, 160, requires_grad=True)
    for layer in stack(spread):
        x = step(layer, x)
    (norm(x) * torch.randn(100, 160)).sum().backward()
    return rms(start.grad)


pre, post = (gradient_size(ways[name], 0.08)
             for name in ("x + layer(norm(x))", "norm(x + layer(x))"))
print(f"gradient at the first layer: norm inside {pre:.1f}, norm outside {post:.0f}")
assert post > 5 * pre

# %% [markdown]
# **Post-norm** (the 2017 design) normalises the stream itself, so that the gradient passes through every norm and is multiplied each time. **Pre-norm** leaves the stream alone
# and normalises only what a layer reads: one path from end to start has nothing but additions. It trains without a careful warm-up (Xiong et al. 2020), and all models of this course use it.
#
# **Exercise 7.10 (20 min, ★★): `stream_size`** in [workbook 7](../exercises/07_transformer.ipynb). The norm keeps what a layer reads at size 1, but the stream itself grows. Predict its size after 64 layers, then measure it.
#
# ## 7.3 Sizes in one place
#
# Everything that defines a model goes into one dataclass. Its names are Hugging Face's, because `config.json` will hold them.

# %% id="model-config"
#| export
@dataclass
class ModelConfig:
    """Sizes of a model; the names are those of Hugging Face's config.json.

    num_experts = 0 is a dense model.
    """

    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1408
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = True
    qk_norm: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.01
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = field(default_factory=lambda: [0, 2])
    pad_token_id: int | None = 0

    @classmethod
    def preset(cls, name: str, **changes) -> "ModelConfig":
        """A named size (see PRESETS), with changes to its fields."""
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ValueError(f"no preset {name!r}; the presets are {known}")
        return cls(**PRESETS[name] | changes)

# %% [markdown]
# The presets: `tiny` is what a laptop trains in minutes, the others are MiniMind's published sizes. The `-moe` ones have four experts of which one is used.

# %% id="model-presets"
#| export
TINY = dict(
    vocab_size=2048, hidden_size=160, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=40, intermediate_size=448,
    max_position_embeddings=1024,
)
MINIMIND3 = dict(
    hidden_size=768, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
    head_dim=96, intermediate_size=2432,
)
PRESETS = {
    "tiny": TINY,
    "tiny-moe": TINY | dict(num_experts=4, moe_intermediate_size=448),
    "minimind2-small": dict(qk_norm=False, rms_norm_eps=1e-5),
    "minimind3": MINIMIND3,
    "minimind3-moe": MINIMIND3 | dict(num_experts=4, moe_intermediate_size=2432),
}

# %% [markdown]
# ## 7.4 One block
#
# Two lines of `forward` are the picture above: read a normalised copy, add the result. The attention is chapter 4's, the feed-forward layer chapter 6's. With `qk_norm`, queries and keys get an
# RMSNorm of their own, for each head, which keeps scores from growing during training (Dehghani et al. 2023; Qwen3 does this, Llama does not).

# %% id="model-block"
#| export
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
        x = x + self.self_attn(self.input_layernorm(x), rotate, attention_mask,
                               kv_cache)
        return x + self.mlp(self.post_attention_layernorm(x))

# %% [markdown]
# **Exercise 7.2 (15 min, ★): `Block`** in [workbook 7](../exercises/07_transformer.ipynb). Write `forward`; the check knows eleven other ways to connect the same parts, and tells you which one you built.
#
# **Exercise 7.8 (10 min, ★★): `pre_norm_stack`** in [workbook 7](../exercises/07_transformer.ipynb). Two bugs in three lines of pre-norm: one leaks the future, one loses the stream.
#
# **Exercise 7.9 (15 min, ★★): `capped_attention`** in [workbook 7](../exercises/07_transformer.ipynb). Gemma 2 keeps scores from growing without q/k norm: it bends them with a tanh. Where does the mask go, before or after?
#
# **Try it.** Build the parallel block of GPT-J and PaLM, `x + attention(norm(x)) + mlp(norm(x))`. What can it do faster, and what can it no longer do?
#
# ## 7.5 Around the blocks
#
# Two things are needed once for all layers: who may look at whom, and the rotation of chapter 5.
#
# The mask first. `None` is the fast case: plain causal rows. Rows of different length are padded, and then a mask says which positions are real.

# %% id="model-full-mask"
#| export
def full_mask(attention_mask: Tensor | None, past: int,
              input_ids: Tensor) -> Tensor | None:
    """The mask that attention reads: None for plain causal rows, else bool.

    The result is (B or 1, 1, T, S), True = may look. attention_mask is None, a padding
    mask (B, S) with 1 = real, or already (B, 1, T, S).
    """
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
    # A padded position may look at itself: a row without any key would be 0 / 0.
    itself = torch.eye(past + T, dtype=torch.bool, device=mask.device)[past:]
    return mask & (attention_mask.bool()[:, None, None, :] | itself)

# %% [markdown]
# A row of four tokens, whose first is padding:

# %% id="model-full-mask-check"
ids = torch.zeros(1, 4, dtype=torch.long)
assert full_mask(None, 0, ids) is None
print(full_mask(torch.tensor([[0, 1, 1, 1]]), 0, ids)[0, 0].int())

# %% [markdown]
# Row t says what position t may see. Nobody but position 0 itself looks at position 0.
#
# **Exercise 7.3 (20 min, ★★): `full_mask`** in [workbook 7](../exercises/07_transformer.ipynb). Write all its cases: nothing given, a cache, padding, a finished mask, a wrong shape. The check builds each mask one entry at a time.
#
# Under mixed precision, matrix products run in bfloat16, and torch converts their inputs each time. If the stream already has that type, nothing needs converting:

# %% id="model-working-dtype"
#| export
def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products here: autocast's, else the dtype of x."""
    kind = x.device.type
    on = torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype

# %% [markdown]
# The decoder turns token ids into hidden vectors: look up the embedding, send the stream through all blocks, normalise once more at the end, because the stream has grown on its way.
# Positions are whole numbers from 0, or from where a cache of earlier tokens ends (chapter 10). Their cosines and sines are computed once for each call and shared by all layers; the `rotation` that
# is handed to each block is a function that already knows them.

# %% id="model-decoder"
#| export
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
        x = self.embed_tokens(input_ids)  # (B, T, C)
        # one cast here instead of one in every matrix product
        x = x.to(working_dtype(x))
        past = kv_cache.length if kv_cache is not None else 0
        rotate = self.rotation(position_ids, past, x)
        mask = full_mask(attention_mask, past, input_ids)
        for layer in self.layers:
            x = layer(x, rotate, mask, kv_cache)
        return self.norm(x)

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

# %% [markdown]
# **Exercise 7.4 (20 min, ★★): `Decoder`** in [workbook 7](../exercises/07_transformer.ipynb). Write `forward` from embedding to last norm, with padding, positions and a cache; the check rebuilds the model in plain torch.
#
# Weights start as draws from one normal distribution, whose spread is `initializer_range`; norms start at 1.

# %% id="model-initialise"
#| export
def initialise(module: nn.Module, spread: float) -> None:
    """Draw every matrix from a normal distribution; vectors (norms) stay at 1."""
    for parameter in module.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=spread)

# %% [markdown]
# With experts, the balance loss of chapter 6 is taken over the router logits of all layers. Padding is left out, or it would count as tokens that love one expert.

# %% id="model-balance-loss"
#| export
def balance_loss(decoder: Decoder, attention_mask: Tensor | None, x: Tensor) -> Tensor:
    """Balance loss of the last forward pass, whose result is x (B, T, C): a scalar.

    0 for a dense model.
    """
    config = decoder.config
    if not config.num_experts:
        return torch.zeros((), device=x.device)
    is_padding = attention_mask is not None and attention_mask.shape == x.shape[:2]
    router_logits = [layer.mlp.router_logits for layer in decoder.layers]
    mask = attention_mask if is_padding else None
    return load_balancing_loss(router_logits, config.num_experts,
                               config.num_experts_per_tok, mask)

# %% [markdown]
# The model adds the output layer. In small models a third or more of the weights would be in the two V × C matrices at both ends, so they share one (**tied embeddings**, Press and Wolf 2017): the vector that stands for a word when
# reading is the vector that scores it when writing.

# %% id="model-minimind"
#| export
class MiniMind(nn.Module):
    """A decoder-only language model: token ids (B, T) -> logits (B, T, V).

    The names of its parameters are Hugging Face's.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        # Tied models own one matrix, not two: the embedding is the output layer.
        tied, C, V = config.tie_word_embeddings, config.hidden_size, config.vocab_size
        self.lm_head = None if tied else nn.Linear(C, V, bias=False)
        self.aux_loss: Tensor | None = None
        initialise(self, config.initializer_range)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, kv_cache=None,
    ) -> Tensor:
        """input_ids (B, T) -> logits (B, T, V).

        attention_mask: None (causal), padding (B, S) with 1 = real, or bool (B, 1, T,
        S) with True = may look. position_ids (T,) or (B, T); by default they count on
        from what kv_cache already holds.
        """
        x = self.model(input_ids, attention_mask, position_ids, kv_cache)
        self.aux_loss = balance_loss(self.model, attention_mask, x)
        output = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(x, output.weight)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def __getstate__(self) -> dict:
        # aux_loss belongs to one forward pass; a copy of the model starts without it.
        return self.__dict__ | {"aux_loss": None}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face model folder; see save_model."""
        save_model(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MiniMind":
        """Read a Hugging Face model folder in float32; see load_model."""
        return load_model(Path(folder))

# %% [markdown]
# Follow one batch of two rows of 40 tokens through it. A hook on each part writes down the shape of what comes out:

# %% id="model-shapes"
set_seed(0)
model = MiniMind(ModelConfig.preset("tiny"))
ids = torch.randint(0, 2048, (2, 40))
shapes = {}

def write_down(name):
    return lambda module, given, result: shapes.update({name: tuple(result.shape)})

hooks = [model.model.get_submodule(name).register_forward_hook(write_down(name))
         for name in ("embed_tokens", "layers.0.self_attn.q_proj",
                      "layers.0.mlp.gate_proj", "layers.0", "norm")]
shapes["logits"] = tuple(model(ids).shape)
for hook in hooks:
    hook.remove()
print(*(f"{name:26} {shape}" for name, shape in shapes.items()), sep="\n")
assert shapes["logits"] == (2, 40, 2048)

# %% [markdown]
# The stream keeps its shape (B, T, C) from the embedding to the last norm; only inside a block is it wider or narrower. The logits at position t score all V candidates for token t + 1.
#
# Now the property that everything rests on: changing a later token never changes an earlier prediction.

# %% id="model-causality"
changed = ids.clone()
changed[:, 25] = (changed[:, 25] + 1) % 2048
with torch.no_grad():
    difference = (model(ids) - model(changed)).abs().amax((0, 2))  # (T,)
assert difference[:25].max() < 1e-5 and difference[25:].min() > 1e-4

# %% [markdown]
# Position by position:

# %% id="model-causality-picture"
fig, ax = plt.subplots(figsize=(6, 2.3))
ax.bar(range(40), difference, color="#0072B2")
ax.axvline(24.5, color="#D55E00", ls="--")
ax.set(xlabel="position", ylabel="change of logits")
show(fig, "Largest change of the logits when token 25 is replaced: nothing moves "
          "before it, everything from it on does.")

# %% [markdown]
# **Try it.** Left-pad a short row, pass the padding mask, and show that the logits of its real tokens equal those of the row alone. Why does it work although the positions have moved?
#
# ## 7.6 The first loss
#
# An untrained model knows nothing, so its best guess is the same probability for all V tokens: a loss of ln V (chapter 3). For V = 2048 that is 7.62. Does our model start there? And what if the weights are drawn
# ten times larger? Write down both guesses.

# %% id="model-first-loss"
import math


def first_loss(spread):
    set_seed(1)
    model = MiniMind(ModelConfig.preset("tiny", initializer_range=spread))
    ids = torch.randint(0, 2048, (8, 65))
    with torch.no_grad():
        logits = model(ids[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, ids[:, 1:].flatten()).item()

losses = {spread: first_loss(spread)
          for spread in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)}
check("transformer/first_loss_over_ln_v", losses[0.02] / math.log(2048))
print({spread: round(loss, 2) for spread, loss in losses.items()})

# %% [markdown]
# The usual 0.02 starts within one percent of ln V. Ten times as much starts at 10.7:

# %% id="model-first-loss-picture"
fig, ax = plt.subplots(figsize=(5.5, 2.6))
ax.plot(list(losses), list(losses.values()), "o-", label="first loss")
ax.axhline(math.log(2048), color="#D55E00", ls="--", label="ln V")
ax.set(xscale="log", xlabel="initializer_range (standard deviation of the weights)",
       ylabel="loss (nats)")
ax.legend()
show(fig, "First loss against the spread of the initial weights: small weights start "
          "at ln V, large ones start worse than knowing nothing.")

# %% [markdown]
# The final norm makes every hidden vector of size 1, so a logit is a sum of C products with weights of spread s: its spread is $s\sqrt{C}$, 0.25 for s = 0.02 and 2.5 for s = 0.2. A spread of 2.5 is confident nonsense. A first loss far from ln V
# is the cheapest bug detector that you have: check it before every training run.
#
# **Try it.** The mean of the loss over random logits of spread σ is about $\ln V + \sigma^2/2$. Test this on the curve above. Where does it fail, and why?
#
# ## 7.7 Parameters
#
# Count them from the picture: attention has C × HD twice and C × KD twice, a feed-forward layer has 3 CI, and the embedding V × C is used once more as the output layer. Norms add a few vectors.

# %% id="model-count-parameters"
#| export
def matmul_parameters(config: ModelConfig, experts: int) -> int:
    """Weights that multiply one token when `experts` work on it, with the output."""
    C, D = config.hidden_size, config.head_dim
    attention = 2 * C * D * (config.num_attention_heads + config.num_key_value_heads)
    feed_forward = 3 * C * config.intermediate_size
    if config.num_experts:
        one, router = 3 * C * config.moe_intermediate_size, C * config.num_experts
        feed_forward = experts * one + router
    return config.num_hidden_layers * (attention + feed_forward) + C * config.vocab_size

# %% [markdown]
# The norms are vectors: two of width C in each block, one of width D for queries and one for keys, and the last one. An embedding that
# is not tied is a second matrix that only looks up and never multiplies.

# %% id="model-count-all"
#| export
def count_parameters(config: ModelConfig, active: bool = False) -> int:
    """All parameters of a model, or with active=True those that work on one token."""
    C = config.hidden_size
    heads = 2 * config.head_dim if config.qk_norm else 0
    norms = config.num_hidden_layers * (2 * C + heads) + C
    embedding = 0 if config.tie_word_embeddings else C * config.vocab_size
    experts = config.num_experts_per_tok if active else config.num_experts
    return matmul_parameters(config, experts) + norms + embedding

# %% [markdown]
# Predict all presets and compare with the real thing. Building 198 million parameters would take 800 MB; on torch's `meta` device tensors have shapes and no memory.

# %% id="model-count-check"
published = {"minimind2-small": 25.83, "minimind3": 64, "minimind3-moe": 198}
for name in PRESETS:
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        built = MiniMind(config).num_parameters()
    assert count_parameters(config) == built
    active = count_parameters(config, active=True)
    print(f"{name:16} {built:>12,}   active {active:>11,}   published "
          f"{published.get(name, '-')} M")

# %% [markdown]
# All five are exact. A tied embedding counts once, and `active` leaves out the experts that a token does not visit. Where do the parameters sit?

# %% id="model-count-picture"
names = list(PRESETS)
configs = [ModelConfig.preset(name) for name in names]
total = torch.tensor([count_parameters(c) for c in configs])
embedding = torch.tensor([c.vocab_size * c.hidden_size for c in configs])
heads = [c.num_hidden_layers * (c.num_attention_heads + c.num_key_value_heads)
         for c in configs]
attention = torch.tensor([2 * h * c.hidden_size * c.head_dim
                          for h, c in zip(heads, configs)])
fig, ax = plt.subplots(figsize=(7, 2.8))
left = torch.zeros(len(names))
rest = total - embedding - attention
for part, label, hatch in ((embedding, "embedding", ""), (attention, "attention", "//"),
                           (rest, "feed-forward", "..")):
    ax.barh(names, part / total, left=left, label=label, hatch=hatch, edgecolor="white")
    left = left + part / total
ax.set(xlabel="share of all parameters", xlim=(0, 1))
ax.invert_yaxis()
ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
show(fig, "Where the parameters are: the tiny model spends a fifth on its vocabulary, "
          "larger ones and those with experts spend most on feed-forward layers.")

# %% [markdown]
# **Exercise 7.5 (20 min, ★★): `count_parameters`** in [workbook 7](../exercises/07_transformer.ipynb). Count from the configuration alone, with experts and without; the check lists every weight by its shape.
#
# **Exercise 7.7 (10 min, ★): `qwen`** in [workbook 7](../exercises/07_transformer.ipynb). On paper: how many million parameters has Qwen3-0.6B, and is 0.6 a fair name?
#
# ## 7.8 Operations
#
# A product of a vector with an N-weight matrix takes N multiplications and N additions: 2N **FLOPs**. Scores and mixing in attention add 4·T·H·D in each layer, since every token meets T others twice. Backward needs two products for each
# one of forward, so training costs three times as much.

# %% id="model-flops"
#| export
def flops_per_token(config: ModelConfig, T: int, training: bool = True) -> int:
    """Floating point operations for one token of a row of T.

    Training is forward and backward, three times forward alone. A product with N weights
    is 2N operations. Scores and mixing take 4 * T * H * D a layer; the masked half is
    counted too, as is usual (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    """
    width = config.num_attention_heads * config.head_dim
    attention = 4 * T * config.num_hidden_layers * width
    forward = 2 * matmul_parameters(config, config.num_experts_per_tok) + attention
    return 3 * forward if training else forward

# %% [markdown]
# torch can count every operation that really runs. (The readable attention kernel is forced here, because the counter does not look into the fused one.)

# %% id="model-flops-check"
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

B, T = chapter.size.batch, chapter.size.context
for name in ("tiny", "tiny-moe"):
    model = MiniMind(ModelConfig.preset(name))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randint(0, 2048, (B, T))).sum().backward()
    measured = counter.get_total_flops() / (B * T)
    predicted = flops_per_token(model.config, T)
    print(f"{name:9} predicted {predicted:,}, counted {measured:,.0f} a token")
    ratio = check(f"transformer/flops_{name}", predicted / measured)
    assert 0.9 < ratio < 1.1

# %% [markdown]
# For short rows the weights dominate, and "6 × parameters for a token" is a good rule. When does attention take over?

# %% id="model-flops-picture"
lengths = [2**i for i in range(6, 17)]
fig, ax = plt.subplots(figsize=(5.5, 2.6))
for name in ("tiny", "minimind2-small", "minimind3"):
    config = ModelConfig.preset(name)
    ax.plot(lengths, [1 - flops_per_token(config, 0) / flops_per_token(config, T)
                      for T in lengths], label=name)
ax.axhline(0.5, color="grey", ls=":", lw=1)
ax.set(xscale="log", xlabel="tokens in a row (T)", ylabel="share of operations",
       ylim=(0, 1))
ax.legend()
show(fig, "Share of all operations that attention scores take: half of all work at "
          "about 1,200 tokens in the tiny model, 3,200 and 5,200 in the others.")

# %% [markdown]
# **Exercise 7.6 (10 min, ★): `flops_per_token`** in [workbook 7](../exercises/07_transformer.ipynb). Rebuild it without looking; the check lets torch count on tensors that take no memory.
#
# ## 7.9 Memory
#
# A training step holds five things. Parameters, their gradients and Adam's two averages are 4 + 4 + 8 = 16 bytes for each parameter in float32. The fourth is **activations**: what the forward pass keeps because backward will need it. The fifth is short but large: the loss works on B × T × V
# float32 numbers, and at its peak their gradient exists twice.
#
# What is kept can be read off the formulas. A product keeps its input. $a \odot b$ keeps both. The fused attention keeps q, k, v, its output and one number for each row, and never the T × T scores. Where chapter 4.8 found two matrix products faster (a processor, 16 bits, short rows), each head keeps its shares: T × T of them in one block, fewer in several.

# %% id="model-activations"
#| export
def activation_bytes(config: ModelConfig, number: int, norm: int,
                     table: int = 0) -> int:
    """Bytes that autograd keeps for one token.

    `number` a value, `norm` a value that goes through a norm; `table`: mean length of a
    row in the table of shares that each head keeps, 0 with the fused kernel.
    """
    C, V, H = config.hidden_size, config.vocab_size, config.num_attention_heads
    q, k = H * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = (norm + number) * C + number * (3 * q + 2 * k)  # q, output twice; k, v
    if table:  # the shares, but no copy of the output
        attention += number * (H * table - q)
    if config.qk_norm:
        attention += norm * (q + k)
    feed_forward = (norm + number) * C + 4 * number * config.intermediate_size
    if config.num_experts:
        visits = config.num_experts_per_tok
        one = number * (4 * config.moe_intermediate_size + 2 * C)
        feed_forward = (norm + number) * C + visits * one
    output = (norm + number) * C + 4 * V  # log-softmax in float32
    return config.num_hidden_layers * (attention + feed_forward) + output

# %% [markdown]
# The five parts together. Under autocast the weights stay in float32, and each matrix is also kept as a 16-bit copy. The total is the peak
# of a step whose gradients of an earlier batch are still there (accumulation, chapter 8).

# %% id="model-memory"
#| export
def training_memory(
    config: ModelConfig, batch: int, T: int, precision: str = "bf16",
    device: str = "cuda"
) -> dict[str, int]:
    """Bytes at the peak of a training step with AdamW, by part, and their total.

    precision is fp32, or bf16 / fp16 for autocast. On the CPU a norm keeps two float32
    values for each number, on CUDA one, and short rows in bf16 keep the table of shares.
    """
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision is {precision!r}; expected fp32, bf16 or fp16")
    number = 4 if precision == "fp32" else 2
    parameters = 4 * count_parameters(config)
    copies = 0 if number == 4 else 2 * matmul_parameters(config, config.num_experts)
    norm = 8 if device == "cpu" else number
    matrices = device == "cpu" and precision == "bf16" and T <= MATRICES_UP_TO
    starts = range(0, T, QUERY_BLOCK)  # each block: its queries times the keys it reads
    ends = [min(start + QUERY_BLOCK, T) for start in starts]
    shares = sum((end - start) * end for start, end in zip(starts, ends))
    table = shares // T if matrices else 0
    kept = activation_bytes(config, number, norm, table)
    memory = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": 2 * parameters,  # Adam's two running averages
        "activations": copies + batch * T * kept,
        "loss": batch * T * 8 * config.vocab_size,  # gradient in and out of softmax
    }
    return memory | {"total": sum(memory.values())}

# %% [markdown]
# Now the measurement. Autograd lets us look at each tensor that it keeps, with two hooks: one is called when a tensor is stored, the other when it is fetched. Several may share one memory, so count each memory once, and leave out the parameters.

# %% id="model-measure-activations"
def kept_bytes(model, loss_of):
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            kept[memory.data_ptr()] = memory  # held, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model)
    return sum(memory.nbytes() for memory in kept.values())

# %% [markdown]
# For the peak of everything, a second tool sees every operation. It adds up the memory of all tensors that operations return, and subtracts it when Python lets go of them.

# %% id="model-measure-peak"
import weakref

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Inside `with PeakMemory() as memory:` now and peak are bytes of live tensors."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for memory in (t.untyped_storage() for t in tensors):
            if id(memory) not in self.live:
                self.add(memory)
        return result

    def add(self, memory):
        self.live.add(id(memory))
        self.now += memory.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(memory, self.drop, id(memory), memory.nbytes())

    def drop(self, key, size):
        self.live.discard(key)
        self.now -= size

# %% [markdown]
# Measure two steps, so that gradients and Adam's averages exist when the second backward pass begins:

# %% id="model-memory-measure"
def measure(name, precision):
    ids = torch.randint(0, 2048, (B, T))

    def loss_of(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(ids).float().flatten(0, 1)
            return F.cross_entropy(logits, ids.flatten()) + 0.01 * model.aux_loss

    with PeakMemory() as memory:
        model = MiniMind(ModelConfig.preset(name))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        loss_of(model).backward()
        optimizer.step()
        memory.peak = 0
        loss_of(model).backward()
    return {"activations": kept_bytes(model, loss_of), "total": memory.peak}

# %% [markdown]
# Predicted, measured, and their ratio, for two models in two precisions:

# %% id="model-memory-check"
rows = []
for name in ("tiny", "tiny-moe"):
    for precision in ("fp32", "bf16"):
        predicted = training_memory(ModelConfig.preset(name), B, T, precision,
                                    device="cpu")
        measured = measure(name, precision)
        rows.append((f"{name}\n{precision}", predicted, measured["total"]))
        for what, value in measured.items():
            ratio = predicted[what] / value
            print(f"{name:8} {precision} {what:11} {predicted[what] / 1e6:6.1f} MB, "
                  f"measured {value / 1e6:6.1f} MB: {ratio:.3f}")
            assert 0.9 < ratio < 1.1
memory_ratio = check("transformer/memory_tiny_bf16", rows[1][1]["total"] / rows[1][2])

# %% [markdown]
# The same numbers by part. The black line is the measured peak:

# %% id="model-memory-picture"
fig, ax = plt.subplots(figsize=(7, 3))
bottom = [0.0] * len(rows)
for part, hatch in zip(("parameters", "gradients", "optimizer", "activations", "loss"),
                       ("", "//", "..", "xx", "--")):
    values = [predicted[part] / 1e6 for _, predicted, _ in rows]
    ax.bar(range(len(rows)), values, 0.5, bottom=bottom, label=part, hatch=hatch,
           edgecolor="white")
    bottom = [b + v for b, v in zip(bottom, values)]
for i, (_, _, peak) in enumerate(rows):
    ax.hlines(peak / 1e6, i - 0.35, i + 0.35, color="black", lw=2,
              label=None if i else "measured peak")
ax.set_xticks(range(len(rows)), [name for name, _, _ in rows])
ax.set(ylabel="MB", xlim=(-0.6, 5.2))
ax.legend(loc="right")
show(fig, "Predicted memory of a training step by part, and the measured peak: in "
          "small models activations and the loss are nearly all of it.")

# %% [markdown]
# The parts that grow with the batch dominate. The 16 bytes for each parameter catch up as models grow: at batch 32 and rows of 340 on a GPU they are 4% of the total for `tiny` and 41% for `minimind3-moe`:

# %% id="model-memory-presets"
print(f"{'GB':16} params  grads   Adam  activ.  loss  total")
for name in PRESETS:
    memory = training_memory(ModelConfig.preset(name), batch=32, T=340,
                             precision="bf16")
    print(f"{name:16}" + "".join(f"{size / 1e9:7.2f}" for size in memory.values()))

# %% [markdown]
# **Try it.** Activation checkpointing keeps only the input of each block and computes the rest again. Predict memory and FLOPs of `minimind3` with it. When is it worth it?
#
# ## 7.10 The same model as Hugging Face's
#
# A checkpoint of this course is a Hugging Face model folder with two files: `config.json` holds the sizes, `model.safetensors` the weights by name. Nothing is converted, because our names are theirs.
# What kind of model it is follows from two fields: with experts it is a Qwen3-MoE, with q/k norm a Qwen3, and with neither a Llama.
#
# The safetensors format is a list of names, types and shapes, followed by the bare numbers. Unlike a pickle, reading it cannot run code, which matters for files from strangers.

# %% id="model-config-json"
#| export
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "qwen3_moe": "Qwen3MoeForCausalLM"}
MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size",
              "norm_topk_prob", "router_aux_loss_coef")


def config_to_json(config: ModelConfig) -> dict:
    """The config.json that transformers reads; it decides the kind of model."""
    if config.num_experts and not config.qk_norm:
        raise ValueError("a model with experts but without q/k norm is no Hugging Face "
                         "architecture: set qk_norm=True")
    kind = "qwen3_moe" if config.num_experts else "qwen3" if config.qk_norm else "llama"
    values = {f.name: getattr(config, f.name) for f in fields(config)
              if f.name != "qk_norm"}
    if kind != "qwen3_moe":
        values = {name: value for name, value in values.items()
                  if name not in MOE_FIELDS}
    # transformers 5 reads rope_parameters, older versions rope_theta and rope_scaling
    rope = {"rope_type": "default"} | (config.rope_scaling or {})
    values["rope_parameters"] = rope | {"rope_theta": config.rope_theta}
    fixed = {"hidden_act": "silu", "attention_bias": False, "use_cache": True,
             "dtype": "float32"}
    return {"model_type": kind, "architectures": [ARCHITECTURES[kind]]} | values | fixed

# %% [markdown]
# Reading is the harder direction. Rotary settings have two spellings in the wild: `rope_theta` and `rope_scaling` in older files, one dictionary `rope_parameters` in newer ones. And a file may ask for what
# our model does not have, such as biases or a sliding window. Ignoring such a field would give wrong logits without an error, so it is refused by name.

# %% id="model-config-from-json"
#| export
def config_from_json(values: dict, source: str = "config.json") -> ModelConfig:
    """A ModelConfig from a Hugging Face config.json.

    Raises ValueError naming what this model does not have.
    """
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{source}: model_type is {kind!r}; this model reads "
                         f"{', '.join(ARCHITECTURES)}")
    refuse_unsupported(values, source)
    heads, experts = values.get("num_attention_heads"), values.get("num_local_experts")
    found = values | rotary_fields(values) | {
        "qk_norm": kind != "llama",
        "num_experts": (values.get("num_experts", experts) or 0) * (kind == "qwen3_moe"),
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
    }
    names = {f.name for f in fields(ModelConfig)}
    return ModelConfig(**{name: found[name] for name in names if name in found})


def rotary_fields(values: dict) -> dict:
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or values.get("rope_theta")
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    scaling = None if rope["rope_type"] == "default" else rope
    return {"rope_theta": theta or 10000.0, "rope_scaling": scaling}

# %% [markdown]
# What a file asks for and the model does not have is refused; a field that is absent, or at its usual value, passes.

# %% id="model-refuse-unsupported"
#| export
def refuse_unsupported(values: dict, source: str) -> None:
    expected = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "quantization_config": None,
    }
    for name, value in expected.items():
        if values.get(name, value) not in (value, None):
            raise ValueError(f"{source}: {name} is {values[name]!r}; this model only "
                             f"has {value!r}")

# %% [markdown]
# Saving must survive a full disk and a kill at any moment. So nothing is ever written into the folder that others read: a draft is written beside it, and when the draft is whole, a rename puts it
# in place. A rename either happens or does not. There are two of them here, and `recover` repairs the moment between.

# %% id="model-save"
#| export
def save_model(model: MiniMind, folder: Path) -> None:
    """Write config.json and model.safetensors into folder, all or nothing.

    The files are written beside the folder first and then renamed, so that a kill or a
    full disk leaves either the old model or the new one. Other files in the folder
    (tokenizer) are kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if folder.is_dir():
            shutil.copytree(folder, draft, dirs_exist_ok=True)
        config = json.dumps(config_to_json(model.config), indent=2)
        (draft / "config.json").write_text(config + "\n")
        tensors = {name: tensor.detach().cpu().contiguous()
                   for name, tensor in model.state_dict().items()}
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        replace_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)

# %% [markdown]
# The two renames: the old folder steps aside, the draft takes its place. A kill between them leaves no folder of that name, but the old one
# beside it; whoever comes next puts it back.

# %% id="model-replace"
#| export
def replace_folder(draft: Path, folder: Path) -> None:
    """Put draft in the place of folder; in between, the old one is .NAME.old."""
    draft.chmod(0o755)  # mkdtemp makes it private
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(draft, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """After a kill: bring the old folder back, or remove it if the new one is there."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir():
        os.replace(old, folder)

# %% [markdown]
# Loading is strict: every weight of the model must be in the file, with its shape, and nothing else. All problems are listed by name, since one wrong size usually makes twenty of them.

# %% id="model-load"
#| export
def load_model(folder: Path) -> MiniMind:
    """A model from a Hugging Face folder.

    Raises ValueError or FileNotFoundError that names the file or the weight.
    """
    recover(folder)
    path = folder / "model.safetensors"
    for needed in (folder / "config.json", path):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing: {folder} is not a model "
                                    "folder")
    config = read_config(folder / "config.json")
    tensors = read_weights(path)
    model = MiniMind(config)
    check_weights(model.state_dict(), tensors, path)
    model.load_state_dict(tensors)
    return model


def read_config(path: Path) -> ModelConfig:
    try:
        return config_from_json(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}): save the model "
                         "again") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name; ValueError when it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): copy it again or "
                         "save it again") from error

# %% [markdown]
# Three kinds of problem: missing, unexpected, of another shape.

# %% id="model-check-weights"
#| export
def check_weights(expected: dict[str, Tensor], tensors: dict[str, Tensor],
                  path: Path) -> None:
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is unexpected" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the config asks for "
        f"{tuple(expected[name].shape)}"
        for name in expected.keys() & tensors.keys()
        if tensors[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:10])
        raise ValueError(f"{path} does not fit its config.json, {len(problems)} "
                         f"weights: {shown}")

# %% [markdown]
# The test, in both directions and for all three families: save ours and let `transformers` load it, then save theirs and load it. The logits must agree within 1e-4.

# %% id="model-hugging-face"
import importlib.util
from contextlib import redirect_stderr
from io import StringIO

families = {"llama": dict(qk_norm=False), "qwen3": {},
            "qwen3_moe": dict(num_experts=4, moe_intermediate_size=96)}
small = dict(
    vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=192,
)
if importlib.util.find_spec("transformers"):
    from transformers import AutoModelForCausalLM
else:
    families = {}
    print("transformers is not installed: this comparison is left out")

# %% [markdown]
# Small models with random weights are enough: a wrong sign, a swapped layout or a missing norm would show in every logit.

# %% id="model-hugging-face-check"
ids = torch.randint(0, 256, (2, 48))
folder = chapter.work / "parity"
for family, changes in families.items():
    set_seed(3)
    ours = MiniMind(ModelConfig(**small, **changes))
    ours.save_pretrained(folder / family)
    with redirect_stderr(StringIO()):  # their progress bars
        theirs = AutoModelForCausalLM.from_pretrained(folder / family)
        theirs.save_pretrained(folder / f"{family}-theirs")
    back = MiniMind.from_pretrained(folder / f"{family}-theirs")
    with torch.no_grad():
        logits = theirs(ids).logits
        there, again = ((model(ids) - logits).abs().max() for model in (ours, back))
    print(f"{type(theirs).__name__:20} ours to theirs {there:.1e}, theirs to ours "
          f"{again:.1e}")
    assert there < 1e-4 and again < 1e-4

# %% [markdown]
# ## 7.11 Where it breaks
#
# **A weight that did not load.** torch's `load_state_dict(strict=False)` skips what it cannot place. Rename one weight in a copy, load it that way, and look at the logits. No error appears:

# %% id="model-silent-weight"
set_seed(3)
ours = MiniMind(ModelConfig(**small))
tensors = dict(ours.state_dict())
mlp = "model.layers.1.mlp"
tensors[f"{mlp}.down_project.weight"] = tensors.pop(f"{mlp}.down_proj.weight")
other = MiniMind(ModelConfig(**small))
other.load_state_dict(tensors, strict=False)
print(f"logits differ by {(ours(ids) - other(ids)).abs().max():.3f}, their spread is "
      f"{ours(ids).std():.3f}")
assert not torch.allclose(ours(ids), other(ids), atol=1e-4)

# %% [markdown]
# One matrix is random, and the model would only be a little worse: the kind of bug that lives for months. Our loader names it:

# %% id="model-strict-weight"
ours.save_pretrained(folder / "renamed")
save_file(tensors, folder / "renamed" / "model.safetensors")
try:
    MiniMind.from_pretrained(folder / "renamed")
except ValueError as error:
    message = str(error).replace(str(folder), "...")
print(message)
assert "down_proj.weight is missing" in message
assert "down_project.weight is unexpected" in message

# %% [markdown]
# **The other rotary layout.** Llama's original files pair neighbouring channels, Hugging Face's pair the two halves (chapter 5). All shapes agree, so everything loads. How far off are the logits?

# %% id="model-rope-layout"
from minimind.rope import to_interleaved

swapped = MiniMind(ModelConfig(**small | dict(qk_norm=False)))
before = swapped(ids)
with torch.no_grad():
    for layer in swapped.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.copy_(to_interleaved(projection.weight, 16))
difference = (swapped(ids) - before).detach().abs().amax((0, 2))  # (T,)
print(f"position 0: {difference[0]:.1e}, position 1: {difference[1]:.1e}, last: "
      f"{difference[-1]:.1e}")
assert difference[0] < 1e-5 < difference[-1]

# %% [markdown]
# Position 0 agrees exactly, because it is not rotated and sees only itself; later positions drift. So when a loaded model is almost right, look at the first position: if it agrees and the next does not, the
# positions are handled differently. If it disagrees too, look at norms and weights.
#
# ## Recap
#
# - A block reads a normalised copy of the stream and adds its result; without residual path and norm the signal dies within a few layers.
# - The first loss of a healthy model is ln V.
# - Parameters follow exactly from the configuration; operations are 6 for each active weight and token, plus attention.
# - Training memory is 16 bytes for each parameter, plus activations and loss that grow with B × T.
# - A checkpoint folder is Hugging Face's, and loading is strict.
#
# **Exercises:** 7.1 to 7.10, in place above, with checks in [workbook 7](../exercises/07_transformer.ipynb).
#
# **Words**: residual stream, RMSNorm, pre-norm, post-norm, block, tied embeddings, q/k norm, initialisation, FLOP, activation, optimizer state, peak memory, checkpoint folder, strict loading.
#
# **Sources**: Zhang and Sennrich 2019, *Root Mean Square Layer Normalization*, arXiv:1910.07467. Xiong et al. 2020, *On Layer Normalization in the Transformer Architecture*, arXiv:2002.04745. Press and Wolf 2017, *Using the Output Embedding*, arXiv:1608.05859. Dehghani et al. 2023, *Scaling Vision Transformers to 22 Billion Parameters*, arXiv:2302.05442. Touvron et al. 2023, *LLaMA*,
# arXiv:2302.13971. Yang et al. 2025, *Qwen3 Technical Report*, arXiv:2505.09388. Chowdhery et al. 2022, *PaLM*, arXiv:2204.02311. Next: chapter 8 trains it.
