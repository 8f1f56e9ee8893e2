"""minimind.attention against hand-worked cases, its properties, torch's fused kernel and Hugging Face's Qwen3 layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minimind import attention as module
from minimind.attention import (
    MATRICES_UP_TO,
    Attention,
    attention,
    attention_in_blocks,
    attention_weights,
    causal_mask,
    grouped_attention,
    matrices_are_faster,
    repeat_kv,
)


def heads(B=2, H=4, K=2, T=7, S=None, D=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    S = T if S is None else S
    return [torch.randn(B, n, length, D, generator=generator) for n, length in ((H, T), (K, S), (K, S))]


class Cache:
    """The least that a kv_cache must do."""

    def __init__(self):
        self.kept = {}

    def update(self, k, v, layer_idx):
        if layer_idx in self.kept:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.kept[layer_idx], (k, v), strict=True))
        self.kept[layer_idx] = k, v
        return k, v


def test_causal_mask_by_hand():
    assert causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert causal_mask(1, 5).all() and causal_mask(3).dtype == torch.bool


@given(T=st.integers(1, 12), old=st.integers(0, 12))
def test_causal_mask_is_the_end_of_the_square_one(T, old):
    assert torch.equal(causal_mask(T, T + old), causal_mask(T + old)[old:])


def test_one_row_by_hand():
    k = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    v = torch.tensor([[0.0, 0.0], [1.0, 3.0], [0.0, 1.0], [2.0, 0.0]])
    parts = [math.exp(0), math.exp(4 / math.sqrt(2)), math.exp(0), math.exp(2 / math.sqrt(2))]
    expected = [(parts[1] + 2 * parts[3]) / sum(parts), (3 * parts[1] + parts[2]) / sum(parts)]
    got = attention(torch.tensor([[[[2.0, 0.0]]]]), k[None, None], v[None, None]).flatten()
    assert torch.allclose(got, torch.tensor(expected))


@settings(max_examples=30, deadline=None)
@given(T=st.integers(1, 9), old=st.integers(0, 5), K=st.sampled_from([1, 2, 4]), D=st.integers(1, 9), seed=st.integers(0, 99))
def test_shares_sum_to_one_and_never_look_ahead(T, old, K, D, seed):
    q, k, _ = heads(H=4, K=K, T=T, S=T + old, D=D, seed=seed)
    shares = attention_weights(q, k, is_causal=True)
    assert shares.shape == (2, 4, T, T + old)
    assert torch.allclose(shares.sum(-1), torch.ones(2, 4, T), atol=1e-5)
    assert (shares.masked_select(~causal_mask(T, T + old)) == 0).all()


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("mask", ["none", "causal", "own"])
def test_value_and_gradients_equal_the_fused_kernel(K, mask):
    own = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    options = {"none": {}, "causal": {"is_causal": True}, "own": {"attention_mask": own | torch.eye(7, dtype=torch.bool)}}[mask]
    results = []
    for function in (attention, F.scaled_dot_product_attention):
        inputs = [t.requires_grad_() for t in heads(K=K)]
        if function is attention:
            y = function(*inputs, **options)
        else:
            renamed = {{"attention_mask": "attn_mask"}.get(name, name): value for name, value in options.items()}
            y = function(*inputs, **renamed, enable_gqa=True)
        weight = torch.linspace(-1, 1, y.numel()).view_as(y)
        results.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)


def test_grouped_queries_equal_repeated_heads():
    q, k, v = heads(K=2)
    assert repeat_kv(torch.tensor([1, 2]).view(1, 2, 1, 1), 2).flatten().tolist() == [1, 1, 2, 2]
    torch.testing.assert_close(attention(q, k, v), attention(q, repeat_kv(k, 2), repeat_kv(v, 2)))
    grouped, full = Attention(32, 4, 2, 8), Attention(32, 4, 4, 8)
    full.load_state_dict(grouped.state_dict() | {
        name: grouped.state_dict()[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
        for name in ("k_proj.weight", "v_proj.weight")
    })  # fmt: skip
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(grouped(x), full(x))


def future_gradient(layer, x, **options):
    """The largest gradient of any output with respect to a later input."""
    x = x.clone().requires_grad_()
    y, largest = layer(x, **options), 0.0
    for t in range(x.shape[1] - 1):
        (gradient,) = torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)
        largest = max(largest, gradient[:, t + 1 :].abs().max().item())
    return largest


def test_layer_is_causal_and_the_test_finds_leaks():
    torch.manual_seed(0)
    layer, x = Attention(32, 4, 2, 8), torch.randn(2, 6, 32)
    assert future_gradient(layer, x) == 0
    off_by_one = torch.ones(6, 6, dtype=torch.bool).tril(1)
    assert future_gradient(layer, x, attention_mask=off_by_one) > 0
    assert future_gradient(layer, x, attention_mask=torch.ones(6, 6, dtype=torch.bool)) > 0


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 4), min_size=1, max_size=6), norm=st.booleans())
def test_cached_decoding_equals_full(cuts, norm):
    """In pieces of any size: position by position, a prompt and then single tokens, or several tokens at once."""
    torch.manual_seed(0)
    layer, x = Attention(32, 4, 2, 8, norm=nn.RMSNorm if norm else None, layer_idx=3), torch.randn(2, sum(cuts), 32)
    cache = Cache()
    pieces = [layer(piece, kv_cache=cache) for piece in x.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x), atol=1e-5, rtol=1e-4)
    assert set(cache.kept) == {3} and cache.kept[3][0].shape == (2, 2, sum(cuts), 8)


def test_a_mask_that_counts_from_the_first_key_would_be_wrong():
    """Shows that the safeguard for several new tokens with a cache is needed: torch's own is_causal differs."""
    q, k, v = heads(T=3, S=7)
    right = attention(q, k, v, attention_mask=causal_mask(3, 7))
    torch.testing.assert_close(attention(q, k, v, is_causal=True), right)
    assert not torch.allclose(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), right, atol=1e-2)


def test_mask_keeps_packed_conversations_apart():
    torch.manual_seed(0)
    layer, x = Attention(32, 4, 2, 8), torch.randn(1, 10, 32)
    document = torch.tensor([[0] * 4 + [1] * 6])
    mask = (document[:, None, :, None] == document[:, None, None, :]) & causal_mask(10)
    together = layer(x, attention_mask=mask)
    torch.testing.assert_close(together[:, :4], layer(x[:, :4]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[:, 4:], layer(x[:, 4:]), atol=1e-5, rtol=1e-4)


def test_weights_are_those_of_forward():
    torch.manual_seed(0)
    layer, x = Attention(32, 4, 2, 8, norm=nn.RMSNorm), torch.randn(2, 6, 32)
    _, _, v = layer.project(x)
    y = layer.weights(x) @ repeat_kv(v, 2)
    torch.testing.assert_close(layer.o_proj(y.transpose(1, 2).flatten(2)), layer(x), atol=1e-5, rtol=1e-4)


def test_rotate_and_norm_come_in_the_order_of_qwen3():
    """Norm, then rotation, then cache."""
    seen = []

    class Mark(nn.Module):
        def forward(self, x):
            seen.append("norm")
            return x

    def rotate(q, k):
        seen.append("rotate")
        assert q.shape == (1, 4, 3, 8) and k.shape == (1, 2, 3, 8)
        return q, k

    class Marked(Cache):
        def update(self, *args):
            seen.append("cache")
            return super().update(*args)

    Attention(32, 4, 2, 8, norm=lambda width: Mark())(torch.randn(1, 3, 32), rotate=rotate, kv_cache=Marked())
    assert seen == ["norm", "norm", "rotate", "cache"]


def test_heads_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match=r"num_attention_heads \(4\).*num_key_value_heads \(3\)"):
        Attention(32, 4, 3, 8)


@pytest.mark.parametrize("bias", [False, True])
def test_equals_hugging_face_qwen3(bias):
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    from minimind.rope import apply_rope

    config = transformers.Qwen3Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=bias)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = Qwen3Attention(config, layer_idx=0)
    ours = Attention(32, 4, 2, 8, norm=lambda width: nn.RMSNorm(width, eps=config.rms_norm_eps), bias=bias)
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the same
    x = torch.randn(2, 6, 32)
    cos, sin = Qwen3RotaryEmbedding(config)(x, torch.arange(6)[None])
    mask = torch.zeros(6, 6).masked_fill(~causal_mask(6), -math.inf)[None, None]
    expected, _ = theirs(x, position_embeddings=(cos, sin), attention_mask=mask)
    got = ours(x, rotate=lambda q, k: (apply_rope(q, cos, sin), apply_rope(k, cos, sin)))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


# -- two matrix products instead of the fused kernel


def value_and_gradients(function, *inputs):
    """What `function` returns, and the gradients of a loss that weighs every number differently."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad((y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), inputs)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask", ["causal", "own"])
def test_grouped_attention_is_attention(groups, mask):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, groups, 9, 8), torch.randn(2, groups, 9, 8)
    allowed = causal_mask(9) if mask == "causal" else (torch.rand(2, 1, 9, 9) > 0.5) | torch.eye(9, dtype=torch.bool)
    ours = value_and_gradients(lambda *qkv: grouped_attention(*qkv, allowed), q, k, v)
    theirs = value_and_gradients(lambda *qkv: attention(*qkv, allowed), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_row_that_may_look_nowhere_spoils_no_gradient():
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    allowed = causal_mask(3)
    allowed[0, 0] = False
    for tensor in value_and_gradients(lambda *qkv: grouped_attention(*qkv, allowed), q, k, v):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("T", [1, 6, 12, 14])
@pytest.mark.parametrize("mask", ["causal", "own"])
def test_blocks_change_nothing(T, mask, monkeypatch):
    """Blocks of 6: less than one, one, two, and two with a rest."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, 2, T, 8), torch.randn(2, 2, T, 8)
    allowed = causal_mask(T) if mask == "causal" else causal_mask(T) & (torch.rand(2, 1, T, T) > 0.5) | torch.eye(T, dtype=torch.bool)
    whole = value_and_gradients(lambda *qkv: grouped_attention(*qkv, allowed), q, k, v)
    monkeypatch.setattr(module, "QUERY_BLOCK", 6)
    keys = []
    monkeypatch.setattr(module, "grouped_attention", lambda q, k, v, m: keys.append(k.shape[2]) or grouped_attention(q, k, v, m))
    for a, b in zip(value_and_gradients(lambda *qkv: attention_in_blocks(*qkv, allowed), q, k, v), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert keys == [min(end, T) for end in range(6, T + 6, 6)], "a block reads no key behind it"


def test_when_the_matrices_are_taken():
    short, long = torch.randn(1, 2, 8, 4), torch.randn(1, 2, MATRICES_UP_TO + 1, 4)
    low = short.bfloat16()
    assert matrices_are_faster(low, low)
    assert not matrices_are_faster(short, short), "float32: the kernel is as fast"
    assert not matrices_are_faster(long.bfloat16(), long.bfloat16()), "long rows: the table is too large"
    assert not matrices_are_faster(low[:, :, :1], low), "one new token with a cache"
    with torch.autocast("cpu", torch.bfloat16):
        assert matrices_are_faster(short, short)
    with torch.no_grad():
        assert not matrices_are_faster(low, low), "no backward pass: the kernel is faster"


@pytest.mark.internal
@pytest.mark.parametrize("mask", ["causal", "own"])
def test_the_layer_gives_the_same_by_both_ways(mask, monkeypatch):
    torch.manual_seed(0)
    layer, x = Attention(64, 4, 2, 16), torch.randn(2, 20, 64)
    allowed = None if mask == "causal" else causal_mask(20).expand(2, 1, 20, 20) & (torch.rand(2, 1, 20, 20) > 0.3) | torch.eye(20, dtype=torch.bool)

    def gradients():
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, attention_mask=allowed)
        return y.detach().float(), *torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))

    taken = []
    monkeypatch.setattr(module, "attention_in_blocks", lambda *a: taken.append(1) or attention_in_blocks(*a))
    ours = gradients()
    monkeypatch.setattr(module, "matrices_are_faster", lambda q, k: False)
    kernel = gradients()
    assert len(taken) == 1
    for a, b in zip(ours, kernel, strict=True):
        assert (a - b).norm() < 0.02 * b.norm(), "more than 16-bit rounding apart"
