# Made from chapters/src/05_rope.py by `python -m course build`. Do not edit.

import math

import torch


def yarn_ramp(head_dim: int, theta: float, trained_length: int, beta_fast: float = 32, beta_slow: float = 1) -> torch.Tensor:
    """Share of interpolation for each pair, (D/2,): 0 keeps the frequency, 1 divides it by the factor.

    A pair that turns more than `beta_fast` times within the trained length is kept, one that turns less than `beta_slow`
    times is slowed down, and the share grows linearly in between (Peng et al. 2023, arXiv:2309.00071).
    """

    def pair_with(turns: float) -> float:  # the pair, as a fraction, that makes this many turns in the trained length
        return head_dim * math.log(trained_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(beta_fast)), 0)
    high = min(math.ceil(pair_with(beta_slow)), head_dim - 1)
    high = high + 0.001 if low == high else high
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def rope_frequencies(
    head_dim: int,
    theta: float = 1e6,
    scaling: dict | None = None,
    max_position_embeddings: int | None = None,
    seq_len: int | None = None,
) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair of channels, (D/2,) in radians, and the factor on cos and sin.

    `scaling` is Hugging Face's `rope_scaling`: {"rope_type": "linear" | "dynamic" | "yarn", "factor": ...}. "dynamic" needs
    the trained length (`max_position_embeddings`) and stretches only for a `seq_len` beyond it; "yarn" takes the trained
    length from `original_max_position_embeddings` in the dict, else from `max_position_embeddings`.
    Source: Su et al. 2021, arXiv:2104.09864. Raises ValueError for an unknown kind or a missing length.
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factor = scaling.get("factor", 1.0)
    original = scaling.get("original_max_position_embeddings")
    trained = max_position_embeddings or original if kind == "dynamic" else original or max_position_embeddings
    if kind not in ("default", "linear", "dynamic", "yarn"):
        raise ValueError(f"rope_scaling kind {kind!r} is unknown: use default, linear, dynamic or yarn")
    if kind in ("dynamic", "yarn") and not trained:
        raise ValueError(f"rope_scaling kind {kind!r} needs the length that the model was trained with: pass max_position_embeddings")
    if kind == "dynamic":
        stretch = factor * max(seq_len or trained, trained) / trained - (factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    inv_freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (D/2,)
    if kind == "linear":
        return inv_freq / factor, 1.0
    if kind == "yarn":
        ramp = yarn_ramp(head_dim, theta, trained, scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
        default_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        return inv_freq * (1 - ramp) + inv_freq / factor * ramp, scaling.get("attention_factor") or default_factor
    return inv_freq, 1.0


def rope_cos_sin(
    positions: torch.Tensor, inv_freq: torch.Tensor, attention_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position times frequency, each (..., T, D), for `positions` (T,) or (B, T).

    The D/2 angles stand twice in a row, as the half-split layout needs. Computed in float32: bfloat16 has no whole
    numbers above 256, so positions in it would fall together.
    """
    angles = positions[..., None].float() * inv_freq  # (..., T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (..., T, D)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a), where a and b are the two halves of the last dimension: a quarter turn of every pair."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (B, H, T, D) by its positions; cos and sin are (T, D) or (B, T, D).

    Half-split layout, as Hugging Face: channel i is paired with channel i + D/2.
    """
    cos, sin = cos.unsqueeze(-3).to(x.dtype), sin.unsqueeze(-3).to(x.dtype)  # (..., 1, T, D)
    return x * cos + rotate_half(x) * sin


def apply_rope_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (B, H, T, D) by its positions in the layout of the paper: channel 2i is paired with channel 2i + 1.

    Takes the same cos and sin (..., T, D) as `apply_rope`; the angles of the pairs are their first half.
    """
    cos, sin = (t[..., : x.shape[-1] // 2].unsqueeze(-3).to(x.dtype) for t in (cos, sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def to_half_split(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of q_proj or k_proj (heads * D, C) from the interleaved to the half-split layout."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of q_proj or k_proj (heads * D, C) from the half-split to the interleaved layout."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
