"""Checks of workbook 6. What is trusted is plain loops over tokens with torch's functions; nothing here comes from minimind."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from course.checks.core import equal, exercise, fail, shaped, unchanged

MODULE = "moe"

PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
NO_GRADIENT = "no gradient gets through; leave detach, .data, numpy and no_grad out"


def gated(x: torch.Tensor, weights: list[torch.Tensor], gate=F.silu) -> torch.Tensor:
    """SwiGLU from its matrices (I, C), (I, C), (C, I)."""
    a, b, c = weights
    return (gate(x @ a.T) * (x @ b.T)) @ c.T


def same_gradients(results: list[torch.Tensor], inputs: list[list[torch.Tensor]], names: list[str], given: str, missing: str) -> None:
    """The gradients of the first result, with respect to its inputs, are those of the second."""
    if not results[0].requires_grad:
        fail(NO_GRADIENT, given)
    direction = torch.linspace(-1, 1, results[0].numel()).view_as(results[0])
    found = [torch.autograd.grad((y * direction).sum(), some, retain_graph=True, allow_unused=True) for y, some in zip(results, inputs, strict=True)]
    for name, got, wanted in zip(names, *found, strict=True):
        wanted = torch.zeros(()) if wanted is None else wanted
        got = torch.zeros_like(wanted) if got is None else got
        if wanted.abs().max() > 1e-6 and got.abs().max() == 0:
            fail(missing.format(name=name), given)
        equal(got, wanted.expand_as(got), f"{given}, the gradient of {name}", "the values are right, and a gradient is not")


# -- rebuild


@exercise("SwiGLU", keeps=["SwiGLU"])
def check_swiglu(SwiGLU):
    layer, x = SwiGLU(4, 6), torch.randn(5, 4)
    state = layer.state_dict()
    if more := sorted(name for name in state if name.endswith("bias")):
        fail("the three matrices have no bias", "SwiGLU(4, 6)", list(PARTS), more)
    if sorted(state) != sorted(PARTS):
        fail("the layer must have three matrices with the names of the docstring, and nothing else", "SwiGLU(4, 6)", sorted(PARTS), sorted(state))
    for name, shape in zip(PARTS, ((6, 4), (6, 4), (4, 6)), strict=True):
        shaped(state[name], shape, f"SwiGLU(4, 6), {name}", hint="gate and up lead from C = 4 to I = 6, down leads back; nn.Linear(inputs, outputs)")
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.copy_(torch.randn(tensor.shape))
    w = [layer.state_dict()[name] for name in PARTS]
    given = "random x (5, 4) and SwiGLU(4, 6)"
    y = layer(x)
    shaped(y, (5, 4), given, torch.float32, "the layer gives back the shape that it got: (..., C). Is down_proj used?")
    gate, up, down = w
    with torch.no_grad():
        equal(y, gated(x, w), given, "it is not down(silu(gate(x)) * up(x))", {
            "silu is on the wrong projection: it belongs to the gate": gated(x, [up, gate, down]),
            "silu is missing": gated(x, w, lambda z: z),
            "the gate is the logistic function alone; silu(z) is z times that": gated(x, w, torch.sigmoid),
            "the gate is relu; it must be silu": gated(x, w, torch.relu),
            "the gate is gelu; it must be silu": (gated(x, w, F.gelu), gated(x, w, lambda z: F.gelu(z, approximate="tanh"))),
            "silu must act on the gate alone, not on the product": F.silu((x @ gate.T) * (x @ up.T)) @ down.T,
            "silu must act on the gate alone, not on both projections": (F.silu(x @ gate.T) * F.silu(x @ up.T)) @ down.T,
            "gate and up are added; they must be multiplied, number by number": (F.silu(x @ gate.T) + x @ up.T) @ down.T,
            "up_proj is not used": F.silu(x @ gate.T) @ down.T,
        })  # fmt: skip
        x = torch.randn(2, 3, 4)
        shaped(layer(x), (2, 3, 4), "x (2, 3, 4)")
        equal(layer(x), gated(x, w), "x (2, 3, 4)", "right for one row of vectors, and not here: the layer must work on the last dimension")
    x.requires_grad_()
    mine = [layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight]
    w = [each.detach().clone().requires_grad_() for each in mine]
    same_gradients([layer(x), gated(x, w)], [[*mine, x], [*w, x]], [*PARTS, "x"], "x (2, 3, 4)", "no gradient reaches {name}")


@exercise("route", keeps=["route"])
def check_route(route):
    logits = torch.tensor([[1.0, 2.0, 5.0], [6.0, 3.0, 1.0], [3.0, 1.0, 4.0]]).log()
    given = "p = [[.125, .25, .625], [.6, .3, .1], [.375, .125, .5]], logits = ln p, top_k = 2, norm_topk_prob = False"
    p = logits.softmax(-1)
    plain = torch.tensor([[0.0, 0.25, 0.625], [0.6, 0.3, 0.0], [0.375, 0.0, 0.5]])
    got = _spread(route(logits, 2, False), 3, 3, 2, given)
    equal(got, plain, f"{given}; shown are the weights by expert", "the weights are not the largest probabilities", {
        "these are the smallest probabilities": torch.tensor([[0.125, 0.25, 0.0], [0.0, 0.3, 0.1], [0.375, 0.125, 0.0]]),
        "the weights are logits; the softmax is missing": logits * (plain > 0),
        "the softmax goes over the tokens; each token shares itself out over the experts, the last dimension": logits.softmax(0) * (plain > 0),
        "the weights sum to one, although norm_topk_prob is False": plain / plain.sum(-1, keepdim=True),
        "the right experts, and not the probabilities that they had": torch.tensor([[0.0, 0.625, 0.25], [0.3, 0.6, 0.0], [0.5, 0.0, 0.375]]),
    })  # fmt: skip
    normed, (best, places) = plain / plain.sum(-1, keepdim=True), p.sort(-1, descending=True)
    given = given.replace("False", "True")
    got = _spread(route(logits, 2, True), 3, 3, 2, given)
    equal(got, normed, f"{given}; shown are the weights by expert", "the weights of a token must sum to one", {
        "norm_topk_prob is not used": plain,
        "the weights are divided by the sum over the tokens; it must be the sum over the chosen experts of one token":
            torch.zeros(3, 3).scatter(1, places[:, :2], best[:, :2] / best[:, :2].sum(0)),
        "a second softmax makes the weights too even; divide by their sum": torch.where(plain > 0, plain, -math.inf).softmax(-1),
        "all weights are divided by one sum": plain / plain.sum(),
    })  # fmt: skip
    equal(_spread(route(logits, 2), 3, 3, 2, given), normed, "the same, without the third argument", "norm_topk_prob is True where it is not given")
    for N, E, k in ((7, 4, 1), (5, 6, 3), (4, 3, 3)):
        logits = (3 * torch.randn(N, E)).requires_grad_()
        before, p = logits.detach().clone(), logits.softmax(-1)
        wanted = p * _chosen_mask(p, k)
        for norm in (False, True):
            given = f"random logits ({N}, {E}), top_k = {k}, norm_topk_prob = {norm}"
            got = _spread(route(logits, k, norm), N, E, k, given)
            right = wanted / wanted.sum(-1, keepdim=True) if norm else wanted
            equal(got, right.detach(), given, "right for three experts, and not here")
            same_gradients([got, right], [[logits], [logits]], ["router_logits"], given, "no gradient reaches {name}")
        unchanged("router_logits", before, logits.detach())
    logits = (4 * torch.randn(6, 5)).bfloat16()
    given = "logits (6, 5) in bfloat16, top_k = 2"
    wanted = logits.float().softmax(-1)
    wanted = wanted * _chosen_mask(wanted, 2)
    equal(_spread(route(logits, 2, False), 6, 5, 2, given), wanted, given, "the softmax is not in float32: bfloat16 has three digits")


def _chosen_mask(p: torch.Tensor, k: int) -> torch.Tensor:
    """1 where an expert is among the k likeliest of its token."""
    rank = (p.unsqueeze(1) > p.unsqueeze(2)).sum(-1)  # (N, E): how many experts are likelier
    return (rank < k).to(p.dtype)


def _spread(result: object, N: int, E: int, k: int, given: str, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
    """Weights and chosen experts as one (N, E) matrix, so that their order does not matter."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        fail("it returns two things: the weights and the chosen experts", given, got=type(result).__name__)
    weights, chosen = result
    shaped(chosen, (N, k), f"{given}; the chosen experts", hint="there is one number for each token and each of its k experts: (N, k)")
    if chosen.is_floating_point() or chosen.dtype == torch.bool:
        fail("the second result holds numbers of experts: whole numbers. Are weights and experts swapped?", given, "torch.int64", chosen.dtype)
    if chosen.dtype != torch.int64:
        fail("the numbers of the experts must be of type int64, as topk gives them", given, "torch.int64", chosen.dtype)
    if chosen.min() < 0 or chosen.max() >= E or any(len(set(row)) < k for row in chosen.tolist()):
        fail(f"each token needs {k} different experts, with numbers from 0 to {E - 1}", given, got=chosen)
    shaped(weights, (N, k), f"{given}; the weights", dtype, "there is one weight for each token and each of its k experts: (N, k)")
    return torch.zeros(N, E, dtype=weights.dtype).scatter(1, chosen, weights)


def one_by_one(experts, tokens, weights, chosen) -> torch.Tensor:
    """A loop over tokens and their experts."""
    return torch.stack([sum(w * experts[e](token.unsqueeze(0))[0] for w, e in zip(ws, es, strict=True))
                        for token, ws, es in zip(tokens, weights, chosen.tolist(), strict=True)])  # fmt: skip


def times(factor: int, seen: list | None = None):
    """An expert that multiplies, and writes down how many rows it gets."""

    def expert(rows):
        if seen is not None:
            seen.append((factor, rows.numel()))
        return rows * factor

    return expert


@exercise("dispatch", keeps=["dispatch"])
def check_dispatch(dispatch):
    experts, tokens = [times(1), times(10), times(100)], torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    chosen, weights = torch.tensor([[2], [0], [2], [1]]), torch.tensor([[0.5], [1.0], [0.25], [0.5]])
    given = "experts: times 1, 10, 100; tokens 1, 2, 3, 4; chosen experts 2, 0, 2, 1; weights .5, 1, .25, .5"
    wanted = one_by_one(experts, tokens, weights, chosen)
    got = dispatch(experts, tokens, weights, chosen)
    shaped(got, (4, 1), given, torch.float32, "the result has a row for each token, in the order of the tokens: (N, C)")
    equal(got.flatten(), wanted.flatten(), given, "each token must get its own expert's output, times its weight", {
        "the rows are left in the order of the experts: bring them back to their tokens": torch.tensor([2.0, 20.0, 50.0, 75.0]),
        "the weights are missing": torch.tensor([100.0, 2.0, 300.0, 40.0]),
        "the values stand in the order of the experts, the weights in the order of the tokens": torch.tensor([25.0, 1.0, 150.0, 40.0]),
        "the tokens are cut into slices as they come: sort them by expert first": torch.tensor([150.0, 1.0, 100.0, 10.0]),
    })  # fmt: skip
    tokens, chosen = tokens[:3], torch.tensor([[0, 2], [1, 0], [2, 1]])
    weights = torch.tensor([[0.5, 0.25], [0.75, 0.5], [0.25, 0.5]])
    given = "the same experts; tokens 1, 2, 3; chosen [[0, 2], [1, 0], [2, 1]]; weights [[.5, .25], [.75, .5], [.25, .5]]"
    got = dispatch(experts, tokens, weights, chosen)
    shaped(got, (3, 1), given, hint="the results of a token's k experts must be added: one row for each token")
    wanted = one_by_one(experts, tokens, weights, chosen)
    first = [one_by_one(experts, tokens, weights[:, j : j + 1], chosen[:, j : j + 1]) for j in (0, 1)]
    owners = torch.arange(6) % 3
    visits = torch.stack([w * experts[e](tokens[r])[0] for w, e, r in zip(weights.flatten(), chosen.flatten(), owners, strict=True)])
    equal(got.flatten(), wanted.flatten(), given, "with two experts for a token the results are not those of a loop over tokens", {
        "only one expert of each token counts": (first[0].flatten(), first[1].flatten()),
        "one result of a token overwrites the other: add them": tuple(
            torch.tensor([[first[j][n, 0] for n, j in enumerate(last)]]).flatten() for last in ((1, 0, 0), (0, 1, 1))),
        "the visits are given to the wrong tokens: visit j belongs to token j // k":
            torch.zeros(3).index_add(0, owners, visits),
        "the results of a token are averaged; its weights already do that": (wanted / 2).flatten(),
    })  # fmt: skip
    _lean(dispatch)
    for E, k, used in ((4, 1, 4), (4, 2, 4), (5, 3, 3), (6, 1, 2)):
        same_as_loop(dispatch, E, k, used)
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).bfloat16()
    got = dispatch(experts, torch.randn(5, 4).bfloat16(), torch.rand(5, 2), torch.tensor([[0, 1]] * 5))
    shaped(got, (5, 4), "tokens (5, 4) in bfloat16, weights in float32; the result", torch.bfloat16)


def _lean(dispatch) -> None:
    """Each expert once, on its own tokens."""
    seen: list = []
    chosen = torch.tensor([[0, 3], [1, 3], [0, 1], [3, 0], [1, 0]])
    given = "five tokens, top-2 of four experts; nobody chose expert 2"
    dispatch([times(f, seen) for f in range(4)], torch.randn(5, 1), torch.rand(5, 2), chosen)
    rows = sum(count for _, count in seen)
    if rows > 10:
        fail("the experts compute more rows than there are visits: run each on its own tokens only", given, "10 rows for all experts", f"{rows} rows")
    calls = sum(count > 0 for _, count in seen)
    if calls > 3:
        fail("an expert runs more than once: give it all of its tokens in one call", given, "3 calls", f"{calls} calls")


def same_as_loop(function, E: int, k: int, used: int) -> None:
    """Values and gradients equal those of the loop over tokens; the first and the last expert stay empty where not all are in use."""
    experts = nn.ModuleList(nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 3)) for _ in range(E))
    names = [f"expert {name}" for name, _ in experts.named_parameters()]
    first = 0 if used == E else 1
    chosen = torch.stack([torch.randperm(used)[:k] + first for _ in range(9)])
    tokens, weights = torch.randn(9, 3, requires_grad=True), torch.rand(9, k, requires_grad=True)
    before = [t.detach().clone() for t in (tokens, weights, chosen)]
    given = f"nine random tokens, {E} experts, {used} of them in use, k = {k}"
    wanted, got = one_by_one(experts, tokens, weights, chosen), function(experts, tokens, weights, chosen)
    shaped(got, (9, 3), given)
    empty = "an expert without tokens breaks it" if used < E else "the values are not those of a loop over tokens"
    equal(got.detach(), wanted.detach(), given, empty)
    inputs = [tokens, weights, *experts.parameters()]
    same_gradients([got, wanted], [inputs, inputs], ["tokens", "weights", *names], given, "the values are right, but no gradient reaches {name}")
    for name, old, new in zip(("tokens", "weights", "chosen"), before, (tokens, weights, chosen), strict=True):
        unchanged(name, old, new.detach() if new.requires_grad else new)


def moe_output(state: dict, tokens: torch.Tensor, E: int, k: int, norm: bool) -> torch.Tensor:
    """What the layer must give for rows (N, C), from its own matrices."""
    experts = [lambda rows, e=e: gated(rows, [state[f"experts.{e}.{part}"] for part in PARTS]) for e in range(E)]
    p = (tokens @ state["gate.weight"].T).softmax(-1)
    weights, chosen = p.sort(-1, descending=True)
    weights = weights[:, :k]
    return one_by_one(experts, tokens, weights / weights.sum(-1, keepdim=True) if norm else weights, chosen[:, :k])


@exercise("MoE", after=["SwiGLU", "route", "dispatch"], keeps=["MoE"])
def check_moe(MoE):
    layer, x = MoE(4, 6, 3, 2, False), torch.randn(2, 5, 4)
    parts = {"gate.weight", *(f"experts.{e}.{part}" for e in range(3) for part in PARTS)}
    given = "MoE(4, 6, num_experts=3, num_experts_per_tok=2, norm_topk_prob=False) and random x (2, 5, 4)"
    if set(layer.state_dict()) != parts:
        fail("the weights must be those of the router and of the experts, with their names", given, sorted(parts), sorted(layer.state_dict()))
    state = {name: (0.5 if name == "gate.weight" else 1) * torch.randn(tensor.shape) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)
    rows = x.flatten(0, 1)
    y = layer(x)
    shaped(y, (2, 5, 4), given, torch.float32, "the layer gives back the shape that it got: (..., C)")
    wanted = moe_output(state, rows, 3, 2, False).view(2, 5, 4)
    equal(y.detach(), wanted, given, "it is not the weighted sum of the two likeliest experts", {
        "norm_topk_prob is not handed on": moe_output(state, rows, 3, 2, True).view(2, 5, 4),
        "num_experts_per_tok is not handed on: one expert is used for each token": (
            moe_output(state, rows, 3, 1, False).view(2, 5, 4), moe_output(state, rows, 3, 1, True).view(2, 5, 4)),
        "num_experts_per_tok is not handed on: all experts are used": moe_output(state, rows, 3, 3, False).view(2, 5, 4),
        "x is added to the result; the model of chapter 7 does that, not this layer": wanted + x,
    })  # fmt: skip
    _keeps_logits(layer, state, x, given)
    for shape, E, k, norm in (((7, 4), 3, 2, True), ((2, 3, 2, 4), 4, 1, False), ((1, 4), 3, 3, False)):
        layer = MoE(4, 6, E, k, norm)
        state = {name: torch.randn(tensor.shape) for name, tensor in layer.state_dict().items()}
        layer.load_state_dict(state)
        x = torch.randn(shape)
        given = f"x {tuple(shape)}, {E} experts, k = {k}, norm_topk_prob = {norm}"
        y = layer(x)
        shaped(y, shape, given, hint="the layer gives back the shape that it got, however many dimensions stand before the last")
        equal(y.detach(), moe_output(state, x.flatten(0, -2), E, k, norm).view(shape), given, "right for the first case, and not here")
    _moe_gradients(MoE)
    for k in (0, 4):
        try:
            MoE(4, 6, 3, k)
        except ValueError:
            continue
        fail("num_experts_per_tok must be from 1 to num_experts; leave the given ValueError in", f"MoE(4, 6, num_experts=3, num_experts_per_tok={k})")


def _keeps_logits(layer, state, x, given) -> None:
    """router_logits after a call."""
    logits = getattr(layer, "router_logits", None)
    if logits is None:
        fail("self.router_logits is not set; the balance loss needs it", given, "router_logits (10, 3)")
    shaped(logits, (10, 3), f"{given}; router_logits", hint="router_logits has a row for each token: (N, E), here (10, 3)")
    raw = x.flatten(0, 1) @ state["gate.weight"].T
    equal(logits.detach(), raw, f"{given}; router_logits", "router_logits must be what the router gives for each token", {
        "router_logits holds probabilities; keep what comes before the softmax": raw.softmax(-1),
    })  # fmt: skip
    if not logits.requires_grad:
        fail("router_logits has no gradient: the balance loss could not train the router. Leave detach out", given)
    layer(x[:1])
    shaped(layer.router_logits, (5, 3), "a second call, with x (1, 5, 4); router_logits", hint="router_logits must belong to the last call")


def _moe_gradients(MoE) -> None:
    layer, x = MoE(4, 6, 3, 2), torch.randn(6, 4, requires_grad=True)
    state = {name: tensor.detach().clone().requires_grad_() for name, tensor in layer.state_dict().items()}
    mine = dict(layer.named_parameters())
    names = sorted(mine)
    results = [layer(x), moe_output(state, x, 3, 2, True)]
    equal(results[0].detach(), results[1].detach(), "MoE(4, 6, 3, 2), without norm_topk_prob", "norm_topk_prob is True where it is not given")
    inputs = [[*(mine[n] for n in names), x], [*(state[n] for n in names), x]]
    same_gradients(results, inputs, [*names, "x"], "x (6, 4), three experts, k = 2", "the values are right, but no gradient reaches {name}")


def balance(logits: torch.Tensor, k: int, real: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """f and P, token by token."""
    p = logits.float().softmax(-1)
    real = torch.ones(len(p)) if real is None else real.flatten().float()
    visits, mean = torch.zeros(p.shape[1]), torch.zeros(p.shape[1])
    for row, counts in zip(p, real.tolist(), strict=True):
        for e in sorted(range(len(row)), key=lambda e: -row[e].item())[:k]:
            visits[e] += counts
        mean = mean + counts * row
    return visits / real.sum(), mean / real.sum()


@exercise("load_balancing_loss", keeps=["load_balancing_loss"])
def check_load_balancing_loss(load_balancing_loss):
    p = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.7, 0.2], [0.5, 0.1, 0.4]])
    logits = p.log()
    given = "p = [[.7, .2, .1], [.6, .3, .1], [.1, .7, .2], [.5, .1, .4]] of four tokens, E = 3, k = 1"
    got = load_balancing_loss(logits, 3, 1)
    shaped(got, (), given, torch.float32, "the loss is one number")
    f, P = balance(logits, 1)
    mistakes = {
        "the factor E is missing": (f * P).sum(),
        "the mean over the experts is taken, and the factor E is missing too": (f * P).mean(),
        "f is not used: this number is the same whatever the router does": (torch.tensor(1.0), torch.tensor(3.0)),
        "this is E times the sum of the squares of f: counting has no gradient, so nothing would be learned": 3 * (f * f).sum(),
        "this is E times the sum of the squares of P; f must be counted": 3 * (P * P).sum(),
        "f or P is a sum over the tokens; divide both by the number of tokens": (12 * (f * P).sum(), 48 * (f * P).sum()),
        "the softmax goes over the tokens; it must go over the experts": torch.tensor(0.75),
        "the probabilities are missing: these are logits": 3 * (f * logits.mean(0)).sum(),
    }
    equal(got, 3 * (f * P).sum(), given, "it is not E times the sum of f times P", mistakes)
    logits = torch.randn(8, 4)
    given = "random logits (8, 4), k = 2"
    got, (f, P), (f1, _) = load_balancing_loss(logits, 4, 2), balance(logits, 2), balance(logits, 1)
    equal(got, 4 * (f * P).sum(), given, "with k = 2 the visits are wrong", {
        "only the best expert of each token is counted; top_k is not used": 4 * (f1 * P).sum(),
        "the visits are divided by k too; the loss of an even router is k": 2 * (f * P).sum(),
    })  # fmt: skip
    even = load_balancing_loss(torch.eye(6), 6, 1)
    equal(even, torch.tensor(1.0), "logits torch.eye(6), k = 1: a perfectly even router", "an even router must have the loss k")
    short = (4 * torch.randn(6, 5)).bfloat16()
    f, P = balance(short, 2)
    got = load_balancing_loss(short, 5, 2)
    shaped(got, (), "logits in bfloat16", torch.float32)
    equal(got, 5 * (f * P).sum(), "logits (6, 5) in bfloat16", "the softmax is not in float32: bfloat16 has three digits", tolerance=1e-5)
    _balance_layers(load_balancing_loss)
    _balance_gradient(load_balancing_loss)


def _balance_layers(load_balancing_loss) -> None:
    layers = [2 * torch.randn(6, 4) for _ in range(3)]
    f, P = balance(torch.cat(layers), 2)
    each = torch.stack([4 * torch.dot(*balance(layer, 2)) for layer in layers])
    mistakes = {
        "the mean of the layers' losses is taken; all layers together are one long batch": each.mean(),
        "the sum of the layers' losses is taken; all layers together are one long batch": each.sum(),
        "only one layer is used": tuple(each),
    }
    for kind in (list, tuple):
        equal(load_balancing_loss(kind(layers), 4, 2), 4 * (f * P).sum(), f"a {kind.__name__} of three layers' random logits (6, 4), k = 2",
              "with several layers it is wrong", mistakes)  # fmt: skip
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    given = f"two layers' random logits (6, 4), k = 2, attention_mask = {mask.tolist()}"
    real, layers = mask.flatten().float(), layers[:2]
    both, twice, mixed = torch.cat(layers), real.repeat(2), real.repeat_interleave(2)
    f, P = balance(both, 2, twice)
    plain_f, plain_P = balance(both, 2)
    wanted = 4 * (f * P).sum()
    for what in (mask, mask.bool(), mask.float()):
        equal(load_balancing_loss(layers, 4, 2, what), wanted, given, "with attention_mask it is wrong", {
            "attention_mask is not used": 4 * (plain_f * plain_P).sum(),
            "padding is left out of f, but it counts in P": 4 * (f * plain_P).sum(),
            "padding is left out of P, but it counts in f": 4 * (plain_f * P).sum(),
            "0 and 1 of the mask are swapped: 1 is a real token": 4 * torch.dot(*balance(both, 2, 1 - twice)),
            "the mask is stretched in the wrong order: the layers follow each other, so all tokens of the mask come, then all again":
                4 * torch.dot(*balance(both, 2, mixed)),
            "divide by the number of real tokens, not of all": (wanted / 4, wanted / 2),
        }, tolerance=1e-5)  # fmt: skip
    equal(load_balancing_loss(layers[0], 4, 1, attention_mask=mask), 4 * torch.dot(*balance(layers[0], 1, real)),
          "one layer with attention_mask, k = 1", "right for two layers, and not for one")  # fmt: skip


def _balance_gradient(load_balancing_loss) -> None:
    logits = torch.randn(7, 4, requires_grad=True)
    before = logits.detach().clone()
    f, P = balance(logits, 1)
    same_gradients([load_balancing_loss(logits, 4, 1).view(1), 4 * (f.detach() * P).sum().view(1)], [[logits], [logits]], ["router_logits"],
                   "random logits (7, 4), k = 1", "no gradient reaches {name}: P must keep its gradient")  # fmt: skip
    unchanged("router_logits", before, logits.detach())


# -- beyond


def written_number(value: object, wanted: float, name: str, given: str, mistakes: dict[str, float], words: str) -> None:
    """A number that the reader wrote down."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        fail(f"{name} must be a number", given, got=repr(value))
    for mistake, wrong in mistakes.items():
        if value == wrong:
            words = mistake
    if value != wanted:
        fail(f"{name}: {words}", given, got=value)


@exercise("widths")
def check_widths(same_width, stored, used):
    C, width, expert, router = 512, 8 * 512 / 3, 3 * 160 * 448, 8 * 160
    written_number(same_width, 64 * math.ceil(width / 64), "same_width", "C = 512, two matrices C x 4C", {
        "it is not rounded up to a multiple of 64": math.ceil(width), "it is rounded down; up was asked for": 64 * math.floor(width / 64),
        "this is the width of the plain layer; SwiGLU has three matrices, so it must be narrower": 4 * C,
        "the plain layer has two matrices of 4 C^2 weights each": 64 * math.ceil(width / 128),
        "SwiGLU has three matrices, not two": 8 * C,
    }, "solve 3 C I = 8 C^2 for I, then round up")  # fmt: skip
    layer = "C = 160, I = 448, eight experts, a router"
    written_number(stored, 8 * expert + router, "stored", layer, {
        "the router is missing: a row of C numbers for each expert": 8 * expert, "this is one expert; all eight lie in memory": expert,
        "this is one expert and the router; all eight lie in memory": expert + router,
        "an expert has three matrices, not two": 8 * 2 * 160 * 448 + router, "the router has no bias": 8 * expert + router + 8,
        "this is what two experts need; all eight lie in memory": 2 * expert + router,
    }, "eight experts of 3 C I weights, and a router of E C")  # fmt: skip
    written_number(used, 2 * expert + router, "used", f"{layer}, top-2", {
        "the router is missing: every token is compared with all of its rows": 2 * expert, "this is all that is stored": 8 * expert + router,
        "the whole router works for each token, not only two of its rows": 2 * expert + 2 * 160, "top-2 uses two experts": expert + router,
    }, "two experts of 3 C I weights, and the whole router")  # fmt: skip


@exercise("by_expert")
def check_by_expert(by_expert):
    experts, tokens = [times(1), times(10), times(100)], torch.tensor([[1.0], [2.0], [3.0]])
    given = "experts: times 1, 10, 100; tokens 1, 2, 3; chosen 2, 0, 1; weights .5, 1, .25"
    one = torch.tensor([[0.5], [1.0], [0.25]]), torch.tensor([[2], [0], [1]])
    got = by_expert(experts, tokens, *one)
    shaped(got, (3, 1), given)
    equal(got, one_by_one(experts, tokens, *one), given, "k = 1 with all experts in use was right before, and is wrong now")
    two = torch.tensor([[0.5, 0.25], [1.0, 0.5], [0.25, 0.5]]), torch.tensor([[2, 0], [0, 1], [1, 2]])
    given = "the same; chosen [[2, 0], [0, 1], [1, 2]]; weights [[.5, .25], [1, .5], [.25, .5]]"
    each = two[0] * torch.tensor([[100, 1], [1, 10], [10, 100]]) * tokens  # what a token gets from its first and second choice
    first = [one_by_one(experts, tokens, two[0][:, :1], two[1][:, j : j + 1]) for j in (0, 1)]
    equal(by_expert(experts, tokens, *two).flatten(), each.sum(1), given, "k = 2 is wrong", {
        "k = 2 is wrong: one expert of a token overwrites the other. Which line must add?": each[[0, 1, 2], [0, 1, 1]],
        "k = 2 is wrong: both experts of a token get the weight of its first choice": sum(first).flatten(),
    })  # fmt: skip
    empty = torch.tensor([[0.5], [1.0], [0.25]]), torch.tensor([[2], [0], [2]])
    given = "the same experts and tokens; chosen 2, 0, 2, so expert 1 has no token; weights .5, 1, .25"
    got = by_expert(experts, tokens, *empty)
    equal(got.flatten(), one_by_one(experts, tokens, *empty).flatten(), given, "an expert without tokens makes it wrong", {
        "an expert without tokens makes it wrong: the experts after it do not run any more": torch.tensor([0.0, 2.0, 0.0]),
    })  # fmt: skip
    for E, k, used in ((4, 1, 4), (4, 2, 4), (5, 3, 3)):
        same_as_loop(by_expert, E, k, used)


@exercise("biased_route")
def check_biased_route(biased_route, updated_bias):
    p = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.5, 0.45, 0.05], [0.3, 0.4, 0.3]])
    logits, bias = p.log(), torch.tensor([-0.3, 0.0, 0.05])
    given = "p = [[.5, .3, .2], [.7, .2, .1], [.5, .45, .05], [.3, .4, .3]], bias = [-.3, 0, .05], top_k = 1"
    got = _spread(biased_route(logits, bias, 1), 4, 3, 1, given)

    def takes(*experts, weights=p):
        return torch.stack([weights[n] * F.one_hot(torch.tensor(e), 3) for n, e in enumerate(experts)])

    equal(got, takes(1, 0, 1, 1), f"{given}; shown are the weights by expert", "choose by p + bias, weigh by p", {
        "the bias has no effect": takes(0, 0, 0, 1),
        "the bias must not be in the weights: it counts when experts are chosen, and only then": takes(1, 0, 1, 1, weights=p + bias),
        "the bias is subtracted; it must be added": takes(0, 0, 0, 0),
        "the weights must be p, not made to sum to one": takes(1, 0, 1, 1, weights=torch.ones(4, 3)),
        "the bias is added to the logits; it must be added to the probabilities": (
            takes(0, 0, 1, 1), takes(0, 0, 1, 1, weights=(logits + bias).softmax(-1))),
    })  # fmt: skip
    for N, E, k in ((6, 5, 2), (7, 4, 1), (3, 4, 4)):
        logits, bias = torch.randn(N, E, requires_grad=True), 0.3 * torch.randn(E)
        before = bias.clone()
        p, score = logits.softmax(-1), logits.detach().softmax(-1) + bias
        wanted = p * _chosen_mask(score, k)
        given = f"random logits ({N}, {E}), random bias, top_k = {k}"
        got = _spread(biased_route(logits, bias, k), N, E, k, given)
        inside = logits.detach() + bias
        equal(got.detach(), wanted.detach(), given, "right for one expert, and not here", {
            "the bias is added to the logits; it must be added to the probabilities": (
                p * _chosen_mask(inside.softmax(-1), k), inside.softmax(-1) * _chosen_mask(inside, k)),
            "the weights must be p, not made to sum to one": (wanted / wanted.sum(-1, keepdim=True)).detach(),
        })  # fmt: skip
        same_gradients([got, wanted], [[logits], [logits]], ["router_logits"], given, "no gradient reaches {name}")
        unchanged("bias", before, bias)
    short = (4 * torch.randn(6, 5)).bfloat16()
    p = short.float().softmax(-1)
    got = _spread(biased_route(short, torch.zeros(5), 2), 6, 5, 2, "logits (6, 5) in bfloat16")
    equal(got, p * _chosen_mask(p, 2), "logits (6, 5) in bfloat16, no bias", "the softmax is not in float32")
    _updates(updated_bias)


def _updates(updated_bias) -> None:
    bias, chosen = torch.tensor([0.5, 0.0, -0.25, 0.0]), torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]])
    given = "bias = [.5, 0, -.25, 0], chosen = [[0, 1], [0, 1], [0, 2], [0, 1]], speed = 0.1: counts 4, 3, 1, 0, mean 2"
    given_bias, given_chosen, bias, gap = bias, chosen, bias.clone(), torch.tensor([-2.0, -1.0, 1.0, 2.0])
    before = given_chosen.clone()
    got = updated_bias(given_bias, given_chosen, 0.1)
    shaped(got, (4,), given, torch.float32, "there is one bias for each expert, also for those that nobody chose: (E,)")
    equal(got, bias + 0.1 * gap.sign(), given, "the step must be speed, down for the crowded and up for the others", {
        "the sign is wrong: a crowded expert must go down": bias - 0.1 * gap.sign(),
        "each step has the same size: take the sign of the difference": (bias + 0.1 * gap, bias + 0.1 * gap / 8, bias + 0.1 * gap / 2),
        "the step does not depend on speed": bias + gap.sign(),
        "only the first choice of each token is counted": bias + 0.1 * torch.tensor([-1.0, 1, 1, 1]),
        "the old bias is lost: the step is added to it": 0.1 * gap.sign(),
    })  # fmt: skip
    unchanged("bias", bias, given_bias)
    unchanged("chosen", before, given_chosen)
    got = updated_bias(torch.zeros(2), torch.tensor([[0], [1]]), 0.1)
    equal(got, torch.zeros(2), "two experts with a token each", "an expert with exactly its share keeps its bias")
    got = updated_bias(torch.zeros(3), torch.tensor([[0], [0], [0], [1], [1]]), 0.02)
    words = "right for the first case, and not here"
    likely = {"experts that nobody chose are not in the mean of the counts": torch.tensor([-0.02, 0.02, 0.02])}
    equal(got, torch.tensor([-0.02, -0.02, 0.02]), "counts 3, 2, 0 and speed = 0.02", words, likely)


def follow(logits: torch.Tensor, speed: float, updates: int) -> list[float]:
    """The largest count over the mean, before the first update and after each."""
    p, bias, path = logits.softmax(-1), torch.zeros(logits.shape[1]), []
    for _ in range(updates + 1):
        counts = torch.tensor([(p + bias).argmax(-1).eq(e).sum().item() for e in range(len(bias))])
        path.append(len(bias) * max(counts.tolist()) / sum(counts.tolist()))
        bias = torch.where(counts * len(bias) > len(p), bias - speed, torch.where(counts * len(bias) < len(p), bias + speed, bias))
    return path


@exercise("overload", after=["biased_route"])
def check_overload(predicted_speed, overload, measured):
    p = torch.tensor([[0.4, 0.35, 0.25], [0.45, 0.3, 0.25], [0.5, 0.2, 0.3], [0.55, 0.25, 0.2], [0.6, 0.15, 0.25], [0.65, 0.2, 0.15]])
    given, path = f"p = {[[round(v, 2) for v in row] for row in p.tolist()]}, speed = 0.04", follow(p.log(), 0.04, 8)
    got = [overload(p.log(), 0.04, updates) for updates in range(7)]
    if isinstance(got[0], bool) or not isinstance(got[0], int | float):
        fail("return a float; `.item()` makes one of a tensor", f"{given}, updates = 0", path[0], repr(got[0]))

    def same(a, b):
        return all(abs(x - y) < 1e-3 for x, y in zip(a, b, strict=True))

    if not same(got, path[:7]):
        words, at = "this is not the largest count over the mean count", next(i for i in range(7) if abs(got[i] - path[i]) > 1e-3)
        if same(got[1:], path[:6]) or same(got, path[1:8]):
            words = "the number of updates is off by one: update so often, then choose once more"
        elif at == 0:
            words = "before the first update expert 0 has all six tokens: the largest count is 6, the mean over three experts is 2"
        elif same(got, path[:1] * 7):
            words = "the load does not change: is the new bias used in the next choice?"
        fail(words, f"{given}, updates = {at}", round(path[at], 3), round(got[at], 3))
    draw = torch.Generator().manual_seed(6)
    logits = torch.randn(800, 8, generator=draw) + torch.tensor([2.0, 1, 1, 0, 0, 0, -1, -2])
    right = {speed: follow(logits, speed, 100)[-1] for speed in (0.1, 0.01, 0.001)}
    told = {speed: round(value, 2) for speed, value in right.items()}
    if not isinstance(measured, dict) or sorted(measured) != sorted(right):
        fail("`measured` is a dict: each of the three speeds to its overload", expected="{0.1: ..., 0.01: ..., 0.001: ...}", got=measured)
    for speed, value in right.items():
        if not isinstance(measured[speed], int | float) or abs(measured[speed] - value) > 0.06:
            fail("`measured` must hold what your function gives for `lopsided` after 100 updates", f"speed {speed}", told[speed], measured[speed])
    if predicted_speed not in right:
        fail("predicted_speed is 0.1, 0.01 or 0.001", got=predicted_speed)
    if predicted_speed != min(right, key=right.get):
        words = "a fast bias overshoots" if predicted_speed == 0.1 else "a slow one has not arrived after 100 updates"
        fail(f"your measurement disagrees with your prediction: {words}", expected=told, got=predicted_speed)
