"""minimind.moe: feed-forward, routing, dispatch and balance loss against a dense computation and Hugging Face's block."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.moe import MoE, SwiGLU, dispatch, load_balancing_loss, route


def dense(experts, tokens, weights, chosen):
    """Every expert on every token: too much work, and nothing to get wrong."""
    full = torch.zeros(len(tokens), len(experts)).scatter(1, chosen, weights)
    return sum(full[:, i : i + 1] * expert(tokens) for i, expert in enumerate(experts))


def gradients(module, y):
    return torch.autograd.grad(y.pow(2).sum(), list(module.parameters()), retain_graph=True, allow_unused=True)


def test_swiglu_is_its_formula():
    layer, x = SwiGLU(8, 12), torch.randn(3, 5, 8)
    gate, up, down = layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight
    z = x @ gate.T
    torch.testing.assert_close(layer(x), (z * torch.sigmoid(z) * (x @ up.T)) @ down.T)


def test_route_takes_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 3.5]])
    weights, chosen = route(logits, 2, norm_topk_prob=False)
    assert chosen.tolist() == [[1, 2], [2, 0]]
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, chosen))
    torch.testing.assert_close(route(logits, 2)[0].sum(-1), torch.ones(2))


@settings(max_examples=40, deadline=None)
@given(N=st.integers(1, 30), E=st.integers(1, 6), k=st.integers(1, 6), norm=st.booleans(), seed=st.integers(0, 99))
def test_dispatch_equals_dense(N, E, k, norm, seed):
    k = min(k, E)
    torch.manual_seed(seed)
    moe, x = MoE(6, 7, E, k, norm), torch.randn(N, 6)
    weights, chosen = route(moe.gate(x), k, norm)
    torch.testing.assert_close(moe(x), dense(moe.experts, x, weights, chosen), atol=1e-5, rtol=1e-4)


def test_gradients_equal_dense_and_an_unused_expert_gets_none():
    torch.manual_seed(0)
    moe, x = MoE(6, 7, 4, 1, norm_topk_prob=False), torch.randn(20, 6).abs()
    with torch.no_grad():
        moe.gate.weight[2] = -10  # no token ever goes to expert 2
    weights, chosen = route(moe.gate(x), 1, False)
    assert 2 not in chosen
    for ours, reference in zip(gradients(moe, moe(x)), gradients(moe, dense(moe.experts, x, weights, chosen)), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)
    assert all(gradient.abs().max() == 0 for gradient in gradients(moe.experts[2], moe(x)))


def test_the_dense_reference_catches_results_left_in_sorted_order():
    torch.manual_seed(0)
    moe, x = MoE(6, 7, 4, 1, norm_topk_prob=False), torch.randn(20, 6)
    weights, chosen = route(moe.gate(x), 1, False)
    order = chosen.flatten().argsort(stable=True)
    unsorted = dispatch(moe.experts, x, weights, chosen)[order]
    assert not torch.allclose(unsorted, dense(moe.experts, x, weights, chosen), atol=1e-4)


def test_each_expert_runs_once_whatever_the_number_of_tokens():
    moe, calls = MoE(6, 7, 4, 2), []
    for expert in moe.experts:
        expert.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    moe(torch.randn(2, 50, 6))
    assert len(calls) == 4 and sum(calls) == 2 * 50 * 2


def test_balance_loss_of_even_and_collapsed_routers():
    torch.manual_seed(0)
    logits = torch.randn(5000, 4)
    assert load_balancing_loss(logits, 4, 1).item() == pytest.approx(1, abs=0.02)
    assert load_balancing_loss(logits + torch.tensor([30.0, 0, 0, 0]), 4, 1).item() == pytest.approx(4, abs=1e-3)


def test_balance_loss_gradient_lowers_the_crowded_expert():
    logits = (torch.randn(100, 4) + torch.tensor([2.0, 0, 0, 0])).requires_grad_()
    load_balancing_loss(logits, 4, 1).backward()
    assert logits.grad.sum(0)[0] > 0 > logits.grad.sum(0)[1:].max()  # descent lowers logit 0 and raises the others


def test_top_1_with_normalised_weights_gives_the_router_no_gradient():
    torch.manual_seed(0)
    for norm, learns in ((True, False), (False, True)):
        moe = MoE(6, 7, 4, 1, norm_topk_prob=norm)
        moe(torch.randn(50, 6)).pow(2).sum().backward()
        assert (moe.gate.weight.grad.abs().max() > 1e-4) == learns


def test_copy_after_a_forward_pass():
    moe = MoE(6, 7, 4, 2)
    moe(torch.randn(5, 6))
    assert moe.router_logits.shape == (5, 4) and copy.deepcopy(moe).router_logits is None


def test_runs_under_autocast():
    moe, x = MoE(8, 16, 4, 2), torch.randn(3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    torch.testing.assert_close(y.float(), moe(x), atol=3e-2, rtol=3e-2)
    y.float().sum().backward()


def test_more_experts_for_a_token_than_there_are():
    with pytest.raises(ValueError, match="num_experts_per_tok is 5: it must be 1 to num_experts = 4"):
        MoE(6, 7, 4, 5)


@pytest.mark.parametrize(("k", "norm"), [(1, False), (2, False), (2, True)])
def test_equals_hugging_face_block(k, norm):
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.manual_seed(k)
    config = transformers.Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=k, norm_topk_prob=norm)
    config._experts_implementation = "eager"
    theirs, ours, x = Qwen3MoeSparseMoeBlock(config), MoE(16, 24, 4, k, norm), torch.randn(2, 9, 16)
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.gate.weight)
        theirs.experts.gate_up_proj.copy_(torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in ours.experts]))
        theirs.experts.down_proj.copy_(torch.stack([e.down_proj.weight for e in ours.experts]))
    y, reference = ours(x), theirs(x)
    torch.testing.assert_close(y, reference, atol=1e-5, rtol=1e-4)
    y.pow(2).sum().backward()
    reference.pow(2).sum().backward()
    close = dict(atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.gate.weight.grad, theirs.gate.weight.grad, **close)
    for i, expert in enumerate(ours.experts):
        gate_up = torch.cat([expert.gate_proj.weight.grad, expert.up_proj.weight.grad])
        torch.testing.assert_close(gate_up, theirs.experts.gate_up_proj.grad[i], **close)
        torch.testing.assert_close(expert.down_proj.weight.grad, theirs.experts.down_proj.grad[i], **close)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_balance_loss_equals_hugging_face(k, masked):
    pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    torch.manual_seed(k)
    layers = tuple(torch.randn(2 * 7, 4, requires_grad=True) for _ in range(3))
    mask = (torch.arange(7) < torch.tensor([[5], [7]])).long() if masked else None
    ours, theirs = load_balancing_loss(layers, 4, k, mask), load_balancing_loss_func(layers, 4, k, mask)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True):
        torch.testing.assert_close(a, b)


def test_silu_has_its_dip_where_the_figure_says():
    z = torch.linspace(-3, 0, 3001)
    value, at = F.silu(z).min(0)
    assert value.item() == pytest.approx(-0.278, abs=1e-3) and z[at].item() == pytest.approx(-1.278, abs=0.01)
