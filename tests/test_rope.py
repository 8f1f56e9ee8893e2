"""minimind.rope: cases by hand, properties of rotations, and equality with Hugging Face in all kinds of scaling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.attention import Attention
from minimind.rope import (
    apply_rope,
    apply_rope_interleaved,
    rope_cos_sin,
    rope_frequencies,
    rotate_half,
    to_half_split,
    to_interleaved,
    yarn_ramp,
)

BOTH = pytest.mark.parametrize("rotate", [apply_rope, apply_rope_interleaved])


def turned(x, positions, rotate=apply_rope, theta=1e4):
    return rotate(x, *rope_cos_sin(positions, rope_frequencies(x.shape[-1], theta)[0]))


def test_one_pair_by_hand():
    inv_freq, factor = rope_frequencies(2, 1e4)
    assert inv_freq.tolist() == [1.0] and factor == 1.0
    got = turned(torch.tensor([3.0, 4.0]).expand(1, 1, 3, 2), torch.tensor([0, 1, 2]))[0, 0]
    for m in range(3):
        expected = [3 * math.cos(m) - 4 * math.sin(m), 3 * math.sin(m) + 4 * math.cos(m)]
        assert torch.allclose(got[m], torch.tensor(expected), atol=1e-5)


def test_frequencies_by_hand():
    inv_freq, _ = rope_frequencies(8, 10_000)
    assert torch.allclose(inv_freq, torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_rotate_half_is_a_quarter_turn():
    assert rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-3.0, -4.0, 1.0, 2.0]
    x = torch.randn(2, 3, 4, 8)
    assert torch.equal(rotate_half(rotate_half(x)), -x)


@BOTH
@settings(max_examples=30, deadline=None)
@given(half=st.integers(1, 20), start=st.integers(0, 5000), theta=st.sampled_from([100.0, 1e4, 1e6]), seed=st.integers(0, 99))
def test_norms_are_kept(rotate, half, start, theta, seed):
    x = torch.randn(2, 3, 5, 2 * half, generator=torch.Generator().manual_seed(seed))
    y = turned(x, start + torch.arange(5), rotate, theta)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), atol=1e-4, rtol=1e-4)


@BOTH
@settings(max_examples=30, deadline=None)
@given(shift=st.integers(0, 2000), theta=st.sampled_from([100.0, 1e4, 1e6]), seed=st.integers(0, 99))
def test_scores_depend_on_distances_only(rotate, shift, theta, seed):
    q, k = torch.randn(2, 1, 2, 6, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def scores(shift):
        positions = torch.arange(6) + shift
        return turned(q, positions, rotate, theta) @ turned(k, positions, rotate, theta).transpose(-2, -1)

    torch.testing.assert_close(scores(shift), scores(0), atol=5e-3, rtol=1e-3)  # angles are float32: 2000 rad +- 1e-4


def test_the_shift_test_finds_a_wrong_sign():
    q, k = torch.randn(2, 1, 1, 6, 16, generator=torch.Generator().manual_seed(0))
    inv_freq = rope_frequencies(16, 1e4)[0]

    def scores(shift):
        cos, sin = rope_cos_sin(torch.arange(6) + shift, inv_freq)
        return apply_rope(q, cos, sin) @ apply_rope(k, cos, -sin).transpose(-2, -1)

    assert (scores(5) - scores(0)).abs().max() > 0.1


@settings(max_examples=30, deadline=None)
@given(half=st.integers(1, 16), heads=st.integers(1, 4), seed=st.integers(0, 99))
def test_layouts_differ_by_a_permutation(half, heads, seed):
    generator, D = torch.Generator().manual_seed(seed), 2 * half
    x, weight = torch.randn(2, heads, 5, D, generator=generator), torch.randn(heads * D, 7, generator=generator)
    evens_first = torch.cat((torch.arange(0, D, 2), torch.arange(1, D, 2)))
    positions = torch.arange(5)
    torch.testing.assert_close(turned(x, positions, apply_rope_interleaved)[..., evens_first], turned(x[..., evens_first], positions))
    assert torch.equal(to_half_split(weight, D).view(heads, D, 7), weight.view(heads, D, 7)[:, evens_first])
    assert torch.equal(to_interleaved(to_half_split(weight, D), D), weight)
    assert torch.equal(to_half_split(to_interleaved(weight, D), D), weight)


def test_a_layer_converted_between_layouts_gives_the_same_output():
    torch.manual_seed(0)
    layer, x = Attention(32, 4, 2, 8), torch.randn(2, 6, 32)
    cos, sin = rope_cos_sin(torch.arange(6), rope_frequencies(8, 100)[0])
    before = layer(x, rotate=lambda q, k: (apply_rope_interleaved(q, cos, sin), apply_rope_interleaved(k, cos, sin)))
    half_split = lambda q, k: (apply_rope(q, cos, sin), apply_rope(k, cos, sin))  # noqa: E731
    assert not torch.allclose(layer(x, rotate=half_split), before, atol=1e-3), "the layouts must differ for the test to mean something"
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj):
            projection.weight.copy_(to_half_split(projection.weight, 8))
    torch.testing.assert_close(layer(x, rotate=half_split), before, atol=1e-5, rtol=1e-4)


def test_positions_may_differ_between_rows():
    x = torch.randn(2, 3, 4, 8)
    positions = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 0]])
    both = turned(x, positions)
    for row in range(2):
        torch.testing.assert_close(both[row : row + 1], turned(x[row : row + 1], positions[row]))


def test_half_precision_input_keeps_its_type_and_its_positions():
    inv_freq = rope_frequencies(8)[0]
    cos, sin = rope_cos_sin(torch.arange(1000, 1003), inv_freq)
    assert cos.dtype == torch.float32 and not torch.equal(cos[0], cos[1])
    assert apply_rope(torch.randn(1, 1, 3, 8, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16


SCALINGS = [
    ({"rope_type": "linear", "factor": 4.0}, None),
    ({"rope_type": "dynamic", "factor": 4.0}, None),
    ({"rope_type": "dynamic", "factor": 4.0}, 300),
    ({"rope_type": "dynamic", "factor": 4.0}, 5000),
    ({"rope_type": "dynamic", "factor": 1.0}, 5000),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, None),
    ({"rope_type": "yarn", "factor": 4.0}, None),
    ({"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 24, "beta_fast": 4.0, "beta_slow": 2.0}, None),
    ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.5}, None),
]


@pytest.mark.parametrize("theta", [100.0, 1e4, 1e6])
@pytest.mark.parametrize("head_dim", [8, 40, 64])
@pytest.mark.parametrize(("scaling", "seq_len"), SCALINGS)
def test_scaling_equals_hugging_face(scaling, seq_len, head_dim, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.Qwen3Config(hidden_size=64, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=1024,
                                      rope_parameters={**scaling, "rope_theta": theta})  # fmt: skip
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=seq_len)
    got, factor = rope_frequencies(head_dim, theta, scaling, max_position_embeddings=1024, seq_len=seq_len)
    torch.testing.assert_close(got, expected, atol=0, rtol=1e-5)
    assert factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("scaling", [None, SCALINGS[0][0], SCALINGS[5][0]])
def test_rotation_equals_hugging_face(scaling):
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": 1e4}
    config = transformers.Qwen3Config(hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=1024, rope_parameters=parameters)
    q, k, positions = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.stack((torch.arange(9), torch.arange(50, 59)))
    cos, sin = rope_cos_sin(positions, *rope_frequencies(16, 1e4, scaling, 1024))
    for ours, theirs in zip(
        (apply_rope(q, cos, sin), apply_rope(k, cos, sin)),
        apply_rotary_pos_emb(q, k, *Qwen3RotaryEmbedding(config)(q, positions)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_scaling_kinds_do_what_they_say():
    plain = rope_frequencies(32, 100.0)[0]
    yarn, factor = rope_frequencies(32, 100.0, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 200})
    assert yarn[0] == plain[0] and torch.isclose(yarn[-1], plain[-1] / 8) and factor > 1
    dynamic = rope_frequencies(32, 100.0, {"rope_type": "dynamic", "factor": 1.0}, max_position_embeddings=100, seq_len=800)[0]
    assert dynamic[0] == 1 and torch.isclose(dynamic[-1], plain[-1] / 8, rtol=1e-4)
    assert torch.equal(rope_frequencies(32, 100.0, {"rope_type": "dynamic", "factor": 4.0}, 100, seq_len=90)[0], plain)
    ramp = yarn_ramp(32, 100.0, 200)
    assert ramp[0] == 0 and ramp[-1] == 1 and (ramp.diff() >= 0).all()


def test_the_old_key_type_is_understood():
    assert torch.equal(rope_frequencies(8, 1e4, {"type": "linear", "factor": 2.0})[0], rope_frequencies(8, 1e4)[0] / 2)


@pytest.mark.parametrize(("scaling", "words"), [
    ({"rope_type": "llama3", "factor": 2.0}, "llama3.*default, linear, dynamic or yarn"),
    ({"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings"),
    ({"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings"),
])  # fmt: skip
def test_unknown_or_incomplete_scaling_is_an_error(scaling, words):
    with pytest.raises(ValueError, match=words):
        rope_frequencies(8, 1e4, scaling)
