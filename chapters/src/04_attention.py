# %% [markdown]
# # 4. Attention
#
# (first version: the code; the text follows)

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="attention-default-exp"
#| default_exp attention

# %% id="attention-imports"
#| export
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

# %% id="attention-causal-mask"
#| export
def causal_mask(T: int, S: int | None = None, device: torch.device | str | None = None) -> torch.Tensor:
    """Which of S keys each of the last T positions may look at, as bool (T, S); True means "may look".

    The queries are the last T of S positions, so query i stands at position S - T + i. Without a cache S is T.
    """
    S = T if S is None else S
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)

# %% id="attention-repeat-kv"
#| export
def repeat_kv(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """Give every key/value head to `repeats` query heads: (B, K, S, D) -> (B, K * repeats, S, D)."""
    return x.repeat_interleave(repeats, dim=1)

# %% id="attention-weights"
#| export
def attention_weights(
    q: torch.Tensor, k: torch.Tensor, attention_mask: torch.Tensor | None = None, is_causal: bool = False
) -> torch.Tensor:
    """Shares of attention, (B, H, T, S); each row sums to 1. q is (B, H, T, D), k is (B, K, S, D).

    `attention_mask` is bool, True means "may look", and broadcasts to (B, H, T, S); `is_causal` adds the causal mask.
    """
    k = repeat_kv(k, q.shape[1] // k.shape[1])  # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    if is_causal:
        scores = scores.masked_fill(~causal_mask(*scores.shape[-2:], device=q.device), -math.inf)
    return scores.softmax(dim=-1)

# %% id="attention-function"
#| export
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), the readable way: memory grows with T * S.

    q is (B, H, T, D), k and v are (B, K, S, D) with K dividing H (Ainslie et al. 2023, arXiv:2305.13245). Returns (B, H, T, D).
    """
    weights = attention_weights(q, k, attention_mask, is_causal)
    return weights @ repeat_kv(v, q.shape[1] // v.shape[1])

# %% id="attention-class"
#| export
class Attention(nn.Module):
    """Causal self-attention with grouped queries, for x of shape (B, T, C); parameter names are Hugging Face's.

    `norm` makes a normalisation of width D for queries and keys, before rotation (Qwen3). The position encoding is not
    part of this class: `rotate` takes (q, k) of shape (B, H, T, D) and (B, K, T, D) and returns them with positions.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        norm: Callable[[int], nn.Module] | None = None,
        bias: bool = False,
        layer_idx: int = 0,
    ):
        super().__init__()
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({num_key_value_heads}): each key/value head serves the same number of query heads"
            )
        self.head_dim, self.layer_idx = head_dim, layer_idx
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = norm(head_dim) if norm else nn.Identity()
        self.k_norm = norm(head_dim) if norm else nn.Identity()

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,
        rotate: Callable | None = None,
        attention_mask: torch.Tensor | None = None,
        kv_cache=None,
    ) -> torch.Tensor:
        """Return (B, T, C). A bool `attention_mask` (True: may look) must include causality; None means causal.

        `kv_cache` has `.update(k, v, layer_idx)`, which returns the keys and values of all positions so far.
        """
        T = x.shape[1]
        q = self.q_norm(self.split_heads(self.q_proj(x)))  # (B, H, T, D)
        k = self.k_norm(self.split_heads(self.k_proj(x)))  # (B, K, T, D)
        v = self.split_heads(self.v_proj(x))  # (B, K, T, D)
        if rotate is not None:
            q, k = rotate(q, k)
        if kv_cache is not None:
            k, v = kv_cache.update(k, v, self.layer_idx)  # (B, K, S, D)
        S = k.shape[2]
        if attention_mask is None and 1 < T < S:  # torch's is_causal would count from the first key, not from the last
            attention_mask = causal_mask(T, S, device=x.device)
        is_causal = attention_mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=is_causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))
