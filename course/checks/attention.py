"""Checks of workbook 4. What is trusted is torch's own kernel, and plain loops; nothing here comes from minimind."""

import math

import torch
import torch.nn.functional as F

from course.checks.core import close, equal, exercise, fail, shaped, unchanged

MODULE = "attention"

QUERIES = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # the hand-worked case of the chapter, and a second row
KEYS = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
VALUES = torch.tensor([[0.0, 0.0], [1.0, 3.0], [0.0, 1.0], [2.0, 0.0]])
HAND = "q = [[2, 0], [0, 1]], k = [[0, 2], [2, 0], [0, 2], [1, 1]], one head"


def heads(H: int = 4, K: int = 2, T: int = 5, S: int | None = None, D: int = 8, B: int = 2) -> list[torch.Tensor]:
    """Random queries, keys and values."""
    return [torch.randn(B, n, length, D) for n, length in ((H, T), (K, S or T), (K, S or T))]


def looks_back(T: int, S: int) -> torch.Tensor:
    """The causal mask, one entry at a time."""
    return torch.tensor([[s <= S - T + t for s in range(S)] for t in range(T)])


def shared(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """Each head for `repeats` queries in a row."""
    return torch.stack([x[:, h // repeats] for h in range(x.shape[1] * repeats)], dim=1)


def dealt(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """The other order: 0, 1, 0, 1."""
    return torch.cat([x] * repeats, dim=1)


def shares(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Shares of attention from torch's kernel: with the identity as values, its output is the shares."""
    identity = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return F.scaled_dot_product_attention(q, k, identity, mask, enable_gqa=True)


# -- rebuild


@exercise("causal_mask", keeps=["causal_mask"])
def check_causal_mask(causal_mask):
    mask = causal_mask(3)
    shaped(mask, (3, 3), "causal_mask(3)")
    if mask.dtype != torch.bool:
        fail("the mask must be of type bool, True where a query may look", "causal_mask(3)", "torch.bool", mask.dtype)
    full = torch.ones(3, 3, dtype=torch.bool)
    equal(mask, looks_back(3, 3), "causal_mask(3)", "the mask is not the causal one: row i is query i, column s is key s", {
        "True and False are swapped: True means that a query may look": ~looks_back(3, 3),
        "rows and columns are swapped: row i is the query, and it looks back": full.triu(),
        "a position may not see itself here, and then the first row is empty: the diagonal belongs to the mask": full.tril(-1),
        "each position sees one key too many: the very word that it must predict": full.tril(1),
        "nothing is hidden": full,
    })  # fmt: skip
    late = causal_mask(2, 4)
    shaped(late, (2, 4), "causal_mask(2, 4)", hint="the mask has one row for each query and one column for each key: (T, S)")
    equal(late, looks_back(2, 4), "causal_mask(2, 4)", "with S = 4 and T = 2 the queries stand at positions 2 and 3", {
        "the queries are counted from the first key: they are the last T of S positions, so query i stands at S - T + i":
            torch.ones(2, 4, dtype=torch.bool).tril(),
    })  # fmt: skip
    for T, S in ((1, 1), (1, 6), (4, 4), (3, 7), (6, 6)):
        equal(causal_mask(T, S), looks_back(T, S), f"causal_mask({T}, {S})", "right for small cases, and not here")
    if (device := causal_mask(2, device="meta").device.type) != "meta":
        fail("the mask is not made on the device that was asked for; a GPU would refuse it", 'causal_mask(2, device="meta")', "meta", device)


@exercise("repeat_kv", keeps=["repeat_kv"])
def check_repeat_kv(repeat_kv):
    x = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    y = repeat_kv(x, 2)
    given = "two heads, holding 10 and 20, repeats = 2"
    shaped(y, (1, 4, 1, 1), given, hint="the heads are dimension 1 of (B, K, S, D); only that one grows")
    equal(y.flatten(), shared(x, 2).flatten(), given, "each head must stand twice in a row", {
        "the heads come in the order 0, 1, 0, 1: query heads that stand together share a head, so it must be 0, 0, 1, 1": dealt(x, 2).flatten(),
    })  # fmt: skip
    x = torch.randn(2, 3, 4, 5)
    before = x.clone()
    for repeats in (1, 2, 4):
        y = repeat_kv(x, repeats)
        shaped(y, (2, 3 * repeats, 4, 5), f"x (2, 3, 4, 5), repeats = {repeats}", x.dtype)
        equal(y, shared(x, repeats), f"random x (2, 3, 4, 5), repeats = {repeats}", "positions or channels were mixed: only heads are repeated")
    unchanged("x", before, x)
    x.requires_grad_()
    y = repeat_kv(x, 2)
    if not y.requires_grad:
        fail("no gradient gets through; leave detach, .data, numpy and no_grad out", "x with requires_grad=True")
    y.sum().backward()
    equal(x.grad, torch.full_like(x, 2.0), "the gradient of the sum, repeats = 2", "each head was used twice, so its gradient is 2 everywhere")


@exercise("attention_weights", after=["causal_mask", "repeat_kv"], keeps=["attention_weights"])
def check_attention_weights(attention_weights):
    q, k = QUERIES[None, None], KEYS[None, None]
    got = attention_weights(q, k)
    shaped(got, (1, 1, 2, 4), HAND, torch.float32, "there is one share for each query and key: (B, H, T, S)")
    raw = QUERIES @ KEYS.T
    equal(got[0, 0], (raw / math.sqrt(2)).softmax(-1), HAND, "the shares are not softmax(q k / root of D)", {
        "the scores are not divided by the root of D": raw.softmax(-1),
        "the scores are divided by D, not by its root": (raw / 2).softmax(-1),
        "the scores are multiplied by the root of D instead of divided": (raw * math.sqrt(2)).softmax(-1),
        "the scores are divided by the root of the number of keys; D is the width of a head": (raw / 2).softmax(-1),
        "these are scores; the softmax is missing": raw / math.sqrt(2),
        "the softmax goes over the queries; each query shares itself out over the keys, the last dimension": (raw / math.sqrt(2)).softmax(-2),
    })  # fmt: skip
    _masks(attention_weights)
    _groups(attention_weights)


def _masks(attention_weights) -> None:
    q, k = QUERIES[None, None], KEYS[None, None]
    scores = QUERIES @ KEYS.T / math.sqrt(2)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    given = f"{HAND}, attention_mask = {mask.int().tolist()} (1: may look)"
    before = mask.clone()
    got = attention_weights(q, k, attention_mask=mask)
    unchanged("attention_mask", before, mask)
    equal(got[0, 0], scores.masked_fill(~mask, -math.inf).softmax(-1), given, "the mask is not applied as it should be", {
        "attention_mask is not used": scores.softmax(-1),
        "the mask is read the wrong way round: True means may look": scores.masked_fill(mask, -math.inf).softmax(-1),
        "the shares are set to zero after the softmax, so a row does not sum to one: set the scores to minus infinity before it":
            scores.softmax(-1) * mask,
        "forbidden scores are set to 0, and e to the power 0 is 1: those keys still get a share": scores.masked_fill(~mask, 0.0).softmax(-1),
    })  # fmt: skip
    got = attention_weights(q, k, is_causal=True)
    top_left = torch.ones(2, 4, dtype=torch.bool).tril()
    equal(got[0, 0], scores.masked_fill(~looks_back(2, 4), -math.inf).softmax(-1), f"{HAND}, is_causal = True",
          "the causal mask is not applied as it should be", {
        "is_causal is not used": scores.softmax(-1),
        "the causal mask is counted from the first key; two queries of four positions stand at positions 2 and 3":
            scores.masked_fill(~top_left, -math.inf).softmax(-1),
    })  # fmt: skip
    both = attention_weights(q, k, attention_mask=mask, is_causal=True)
    allowed = mask & looks_back(2, 4)
    equal(both[0, 0], scores.masked_fill(~allowed, -math.inf).softmax(-1), f"{given}, is_causal = True",
          "with both masks, a query may look only where both allow it", {
        "with both masks only the causal one is used": scores.masked_fill(~looks_back(2, 4), -math.inf).softmax(-1),
        "with both masks only attention_mask is used": scores.masked_fill(~mask, -math.inf).softmax(-1),
    })  # fmt: skip


def _groups(attention_weights) -> None:
    q, k, _ = heads()
    before = q.clone(), k.clone()
    got = attention_weights(q, k)
    given = "random q (2, 4, 5, 8), k (2, 2, 5, 8): four query heads, two key heads"
    shaped(got, (2, 4, 5, 5), given)
    equal(got, shares(q, k), given, "with fewer key heads than query heads the shares are wrong", {
        "query heads 0 and 1 must share key head 0; here it is 0 and 2": shares(q, dealt(k, 2)),
        "the scores are divided by the root of the number of positions; D is the width of a head":
            (q @ shared(k, 2).mT / math.sqrt(5)).softmax(-1),
    })  # fmt: skip
    unchanged("q", before[0], q)
    unchanged("k", before[1], k)
    more = heads(H=12, K=2, B=1)[:2]
    equal(attention_weights(*more), shares(*more), "12 query heads, two key heads", "right for four heads over two, and not here")
    for options, allowed in (({"is_causal": True}, looks_back(5, 5)), ({"attention_mask": torch.rand(2, 1, 5, 5) < 0.6}, None)):
        if allowed is None:
            options["attention_mask"] |= torch.eye(5, dtype=torch.bool)
            allowed = options["attention_mask"]
        equal(attention_weights(q, k, **options), shares(q, k, allowed), f"{given}, {next(iter(options))}", "it differs from torch's own kernel")


@exercise("attention", after=["repeat_kv", "attention_weights"], keeps=["attention"])
def check_attention(attention):
    q, k, v = QUERIES[None, None], KEYS[None, None], VALUES[None, None]
    given = f"{HAND}, v = [[0, 0], [1, 3], [0, 1], [2, 0]]"
    w = (QUERIES @ KEYS.T / math.sqrt(2)).softmax(-1)
    got = attention(q, k, v)
    shaped(got, (1, 1, 2, 2), given, torch.float32, "for each query the result is a mean of values: (B, H, T, D)")
    equal(got[0, 0], w @ VALUES, given, "the values are not mixed by the shares", {
        "the keys are mixed instead of the values": w @ KEYS,
        "this is the plain mean of the values: the shares are not used": VALUES.mean(0).expand(2, 2),
        "this is the sum of the values: the shares are not used": VALUES.sum(0).expand(2, 2),
    })  # fmt: skip
    q, k, v = heads()
    given = "random q (2, 4, 5, 8), k and v (2, 2, 5, 8)"
    shaped(attention(q, k, v), q.shape, given)
    equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v, enable_gqa=True), given, "grouped heads come out wrong", {
        "the values of query heads 0 and 1 must come from head 0; here they come from 0 and 1": shares(q, k) @ dealt(v, 2),
        "keys and values are given to the query heads in the order 0, 1, 0, 1": F.scaled_dot_product_attention(q, dealt(k, 2), dealt(v, 2)),
    })  # fmt: skip
    full = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    own = (torch.rand(2, 1, 5, 5) < 0.6) | torch.eye(5, dtype=torch.bool)
    for name, options, mask in (("is_causal", {"is_causal": True}, looks_back(5, 5)), ("attention_mask", {"attention_mask": own}, own)):
        expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        equal(attention(q, k, v, **options), expected, f"{given}, {name}", f"{name} has not the effect that it should have",
              {f"{name} is not handed on": full})  # fmt: skip
    both = F.scaled_dot_product_attention(q, k, v, own & looks_back(5, 5), enable_gqa=True)
    equal(attention(q, k, v, own, True), both, f"{given}, both masks, given by position", "the arguments are q, k, v, attention_mask, is_causal")
    more = heads(H=12, K=2, B=1)
    equal(attention(*more), F.scaled_dot_product_attention(*more, enable_gqa=True), "12 query heads, two key/value heads",
          "right for four heads over two, and not here: each key/value head is repeated H / K times")  # fmt: skip
    _gradients(attention, q, k, v)


def _gradients(attention, q, k, v) -> None:
    results = []
    for function in (attention, lambda *qkv: F.scaled_dot_product_attention(*qkv, enable_gqa=True)):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        y = function(*inputs)
        if not y.requires_grad:
            fail("no gradient gets through; leave detach, .data, numpy and no_grad out", "q, k, v with requires_grad=True")
        results.append(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), inputs, allow_unused=True))
    for name, ours, theirs in zip("qkv", *results, strict=True):
        if ours is None:
            fail(f"no gradient reaches {name}", "q, k, v with requires_grad=True")
        equal(ours, theirs, f"the gradient for {name}", "the values are right, and the gradient is not that of torch's kernel")


@exercise("grouped_attention", after=["causal_mask"], keeps=["grouped_attention"])
def check_grouped_attention(grouped_attention):
    q, k, v = heads(H=4, K=2, T=3)
    mask = looks_back(3, 3)
    given = "random q (2, 4, 3, 8), k and v (2, 2, 3, 8), the causal mask of 3"
    got = grouped_attention(q, k, v, mask)
    shaped(got, (2, 4, 3, 8), given, q.dtype, "the result has the shape of q: (B, H, T, D)")
    raw = q @ shared(k, 2).mT

    def mixed(scores, allowed=mask, values=None):
        return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ (shared(v, 2) if values is None else values)

    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    equal(got, expected, given, "it differs from torch's own kernel; look at the order in which heads and positions become rows", {
        "the scores are not divided by the root of D": mixed(raw),
        "the scores are divided by D, not by its root": mixed(raw / 8),
        "the mask is not used": mixed(raw / math.sqrt(8), torch.ones_like(mask)),
        "query heads 0 and 1 must share key head 0; here it is 0 and 2": F.scaled_dot_product_attention(q, dealt(k, 2), dealt(v, 2), mask),
    })  # fmt: skip
    for H, K, T, S in ((4, 4, 3, 3), (4, 1, 3, 3), (6, 2, 2, 7), (2, 2, 1, 4)):
        q, k, v = heads(H, K, T, S)
        expected = F.scaled_dot_product_attention(q, k, v, looks_back(T, S), enable_gqa=True)
        equal(grouped_attention(q, k, v, looks_back(T, S)), expected, f"{H} query heads, {K} key/value heads, T = {T}, S = {S}",
              "right for four heads over two, and not here")  # fmt: skip
    q, k, v = heads(T=4)
    own = (torch.rand(2, 1, 4, 4) < 0.5) | torch.eye(4, dtype=torch.bool)
    equal(grouped_attention(q, k, v, own), F.scaled_dot_product_attention(q, k, v, own, enable_gqa=True), "a mask (2, 1, 4, 4), one for each text",
          "the mask must broadcast to (B, H, T, S), so apply it while the scores have this shape")  # fmt: skip
    own[0, 0, 1] = False
    got = grouped_attention(q, k, v, own)[0, :, 1]
    wanted = shared(v, 2).mean(2)[0]
    equal(got, wanted, "a row that may look nowhere", "such a row gets the mean of all values", {
        "a row that may look nowhere becomes NaN, because every score is minus infinity: use the smallest number of the type instead":
            torch.full_like(wanted, math.nan),
    })  # fmt: skip
    _keeps_little(grouped_attention)


def _keeps_little(grouped_attention) -> None:
    """With a key head for every eight query heads, repeated keys would be eight times as many numbers as there are."""
    q, k, v = (t.requires_grad_() for t in heads(H=16, K=2, T=2, S=64, D=32, B=1))
    kept = []

    def pack(tensor):
        kept.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = grouped_attention(q, k, v, looks_back(2, 64))
    if not y.requires_grad:
        fail("no gradient gets through; leave detach, .data, numpy and no_grad out", "q, k, v with requires_grad=True")
    if max(kept) >= 8 * k.numel():
        fail("the numbers are right, but the keys or values are repeated on the way (a product that broadcasts them copies them too): "
             "put the queries that share a head into one matrix", "16 query heads, 2 key/value heads, S = 64, D = 32",
             f"at most {k.numel()} numbers in a tensor that is kept", max(kept))  # fmt: skip


class Kept:
    """The least that a kv_cache must do."""

    def __init__(self):
        self.layers = {}

    def update(self, k, v, layer_idx):
        if layer_idx in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer_idx], (k, v), strict=True))
        self.layers[layer_idx] = k, v
        return k, v


def layer_output(layer, x, mask=None, rotate=None, join=True):
    """What the layer must give, with its own matrices and torch's kernel."""
    B, T, _ = x.shape
    q, k, v = (p(x).view(B, T, -1, 8).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if rotate:
        q, k = rotate(q, k)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    y = y.transpose(1, 2).reshape(B, T, -1)
    return layer.o_proj(y) if join else y


@exercise("Attention", after=["causal_mask", "repeat_kv", "attention_weights", "attention"], keeps=["Attention"])
def check_attention_layer(Attention):
    layer, x = Attention(32, 4, 2, 8, layer_idx=3), torch.randn(2, 6, 32)
    given = "Attention(32, 4, 2, 8) and random x (2, 6, 32)"
    parts = {f"{name}_proj.weight" for name in "qkvo"}
    if set(layer.state_dict()) != parts:
        fail("the layer must have the four matrices of Projections and no other weights", given, sorted(parts), sorted(layer.state_dict()))
    y = layer(x)
    shaped(y, (2, 6, 32), given, torch.float32, "the layer gives back the shape that it got: (B, T, C)")
    with torch.no_grad():
        y, full = layer(x), torch.ones(6, 6, dtype=torch.bool)
        q, k, v = layer.project(x)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        equal(y, layer_output(layer, x), given, "it differs from torch's own kernel", {
            "each position sees later ones: without attention_mask the layer must be causal": layer_output(layer, x, full),
            "the heads are joined in the wrong order, which mixes positions: move the heads behind the positions first":
                layer.o_proj(mixed.reshape(2, 6, 32)),
            "o_proj is missing": layer_output(layer, x, join=False),
        })  # fmt: skip
        changed = x.clone()
        changed[:, -1] += 1
        if not close(layer(changed)[:, :-1], y[:, :-1], 1e-6):
            fail("it leaks: an earlier output changes when only the last input changes", given)
        own = torch.ones(6, 6, dtype=torch.bool).tril() & ~torch.ones(6, 6, dtype=torch.bool).tril(-3)
        equal(layer(x, attention_mask=own), layer_output(layer, x, own), f"{given}, a mask of the last three positions",
              "attention_mask has not the effect that it should have", {
            "attention_mask is not used": layer_output(layer, x),
        })  # fmt: skip
        equal(layer(x, attention_mask=full), layer_output(layer, x, full), f"{given}, a mask that allows everything",
              "a mask that is given already says everything; here the causal mask was added to it")  # fmt: skip
        turned = lambda q, k: (q * 2, k + 1)
        equal(layer(x, rotate=turned), layer_output(layer, x, rotate=turned), f"{given}, rotate = (2 q, k + 1)", "rotate is not handed to project", {
            "rotate is not used": layer_output(layer, x),
        })  # fmt: skip
        _with_cache(layer, x, y)


def _with_cache(layer, x, y) -> None:
    equal(layer(x[:, :2]), y[:, :2], "the first two positions of x alone", "right for six positions, and not for two")
    cache = Kept()
    parts = [layer(x[:, :3], kv_cache=cache), layer(x[:, 3:4], kv_cache=cache), layer(x[:, 4:], kv_cache=cache)]
    if not cache.layers:
        fail("kv_cache is not used: call its update with the new keys and values", "three positions, then one, then two, with a kv_cache")
    if 3 not in cache.layers:
        fail("the cache must be told which layer this is: hand it self.layer_idx", "layer_idx = 3", [3], sorted(cache.layers))
    if cache.layers[3][0].shape[1] != 2:
        fail("the cache must keep the keys as they come, for 2 heads; repeated ones take more memory", "kv_cache after 6 positions",
             "keys (2, 2, 6, 8)", f"keys {tuple(cache.layers[3][0].shape)}")  # fmt: skip
    for name, part, start, stop in zip(("three", "one more", "two more"), parts, (0, 3, 4), (3, 4, 6), strict=True):
        equal(part, y[:, start:stop], f"{name} position(s), with a kv_cache", "with a cache the result must be that of the whole text at once; "
              "new queries stand at the end of all keys, and torch's is_causal counts from the first key")  # fmt: skip
    cache, own = Kept(), looks_back(6, 6) & ~looks_back(6, 6).tril(-3)
    layer(x[:, :3], attention_mask=own[:3, :3], kv_cache=cache)
    equal(layer(x[:, 3:], attention_mask=own[3:], kv_cache=cache), layer_output(layer, x, own)[:, 3:],
          "three positions, then three, with a kv_cache and a mask (3, 6) of the last three positions",
          "with a cache a mask that is given must still be used, and it already says everything")  # fmt: skip


# -- beyond


def plain_heads(x, wq, wk, wv, wo, H, scale=None, join=True):
    """What multi_head must give."""
    B, T, C = x.shape
    q, k, v = ((x @ w).view(B, T, H, C // H).transpose(1, 2) for w in (wq, wk, wv))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return (y.transpose(1, 2) if join else y).reshape(B, T, C) @ wo


@exercise("multi_head")
def check_multi_head(multi_head):
    x, *w = torch.randn(2, 4, 8), *(torch.randn(8, 8) for _ in range(4))
    given = "random x (2, 4, 8), four matrices (8, 8), H = 2"
    got = multi_head(x, *w, 2)
    shaped(got, (2, 4, 8), given)
    wide = 1 / math.sqrt(8)
    equal(got, plain_heads(x, *w, 2), given, "it is still not multi-head attention", {
        "both bugs are still there": plain_heads(x, *w, 2, wide, join=False),
        "one bug is left: change the last input, and earlier outputs change; look at how the heads are joined": plain_heads(x, *w, 2, join=False),
        "one bug is left, and it does not leak: the shares are too even. By the root of which width must the scores be divided?":
            plain_heads(x, *w, 2, wide),
        "the scores are not divided at all any more": plain_heads(x, *w, 2, 1.0),
    })  # fmt: skip
    for H in (1, 4, 8):
        equal(multi_head(x, *w, H), plain_heads(x, *w, H), f"the same with H = {H}", "right for two heads, and not here")


@exercise("sliding_mask", after=["causal_mask"])
def check_sliding_mask(sliding_mask):
    got = sliding_mask(4, 2)
    shaped(got, (4, 4), "sliding_mask(4, 2)")
    if got.dtype != torch.bool:
        fail("the mask must be of type bool, True where a query may look", "sliding_mask(4, 2)", "torch.bool", got.dtype)

    def band(T, low, high=0):
        return torch.tensor([[low <= s - t <= high for s in range(T)] for t in range(T)])

    equal(got, band(4, -1), "sliding_mask(4, 2)", "each position must see itself and the one before it", {
        "the window is one too long: it counts the position itself": band(4, -2),
        "a position must see itself: the window counts it": band(4, -2, -1),
        "the window reaches into the future": band(4, -1, 1),
        "the window lies in the future: row i is the query, and it looks back": band(4, 0, 1),
        "nothing old is hidden: this is the causal mask": band(4, -3),
        "True and False are swapped: True means that a query may look": ~band(4, -1),
    })  # fmt: skip
    for T, window in ((5, 1), (5, 5), (6, 9), (7, 3)):
        equal(sliding_mask(T, window), band(T, 1 - window), f"sliding_mask({T}, {window})", "right for a window of 2, and not here")


def by_distance(H, T, S, slopes, sign=-1, masked=True):
    """A bias that grows with the distance, one entry at a time."""
    def entry(h, t, s):
        distance = S - T + t - s
        return -math.inf if masked and distance < 0 else sign * slopes[h] * distance

    return torch.tensor([[[entry(h, t, s) for s in range(S)] for t in range(T)] for h in range(H)])


def slopes_of(H: int) -> list[float]:
    return [2 ** (-8 * (h + 1) / H) for h in range(H)]


@exercise("alibi_bias", after=["causal_mask"])
def check_alibi_bias(alibi_bias):
    given = "alibi_bias(2, 3): slopes 1/16 and 1/256"
    got = alibi_bias(2, 3)
    shaped(got, (2, 3, 3), given, torch.float32, "there is one bias for each head, query and key: (H, T, S)")
    wanted, right = by_distance(2, 3, 3, slopes_of(2)), slopes_of(2)
    equal(got, wanted, given, "the bias is not minus the slope times the distance", {
        "the sign is wrong: far keys must lose, and here they gain": by_distance(2, 3, 3, right, 1),
        "the future is not hidden: a later key gets minus infinity": by_distance(2, 3, 3, right, masked=False),
        "the future is not hidden: a later key gets minus infinity, not a bias by its distance":
            torch.minimum(by_distance(2, 3, 3, right, masked=False), by_distance(2, 3, 3, right, 1, masked=False)),
        "the slopes begin one too early: the first is 2 to the power -8 / H, not 1": by_distance(2, 3, 3, [1.0, 2.0**-4]),
        "the slopes are those of 8 heads: the exponent is -8 (h + 1) / H": by_distance(2, 3, 3, [0.5, 0.25]),
        "all heads have the same slope": by_distance(2, 3, 3, [right[0]] * 2),
        "the slopes are in the wrong order: the first head has the steepest": by_distance(2, 3, 3, right[::-1]),
    })  # fmt: skip
    late = alibi_bias(2, 1, 4)
    shaped(late, (2, 1, 4), "alibi_bias(2, 1, 4)")
    equal(late, by_distance(2, 1, 4, right), "alibi_bias(2, 1, 4): one new query of four positions",
          "distances are counted from the wrong place: query i stands at position S - T + i")  # fmt: skip
    for H, T, S in ((8, 5, 5), (4, 2, 6), (1, 3, 3)):
        equal(alibi_bias(H, T, S), by_distance(H, T, S, slopes_of(H)), f"alibi_bias({H}, {T}, {S})", "right for two heads, and not here")


@exercise("reach", after=["attention", "sliding_mask"])
def check_reach(predicted_reach, reach, measured):
    for layers, window, T in ((1, 1, 48), (1, 4, 48), (2, 3, 48), (3, 4, 48), (4, 8, 10), (4, 8, 48)):
        got, wanted = reach(layers, window, T), min(T, 1 + layers * (window - 1))
        if not isinstance(got, int) or isinstance(got, bool):
            fail("return the number of positions as a whole number", f"reach({layers}, {window}, {T})", wanted, repr(got))
        words = "the last output does not depend on so many positions"
        if got == T and wanted < T:
            words = "every position counts here: is the window used as the mask, and is a gradient of exactly zero left out?"
        elif layers > 1 and got == window:
            words = "this is the reach of one layer: each layer must read what the layer before it wrote"
        elif got == min(T, layers * window) or got == wanted - 1:
            words = "it is off by one or more: count all positions whose gradient is not zero, the last one among them"
        elif 0 < got < wanted:
            words = "some positions are lost: with large scores a share can round to exactly zero; begin with 0.1 * torch.randn(...)"
        if got != wanted:
            fail(words, f"reach({layers}, {window}, {T})", wanted, got)
    if not isinstance(measured, dict) or sorted(measured) != [1, 2, 3, 4]:
        fail("`measured` is a dict: the number of layers (1, 2, 3, 4) to the reach", expected="{1: ..., 2: ..., 3: ..., 4: ...}", got=measured)
    right = {layers: 1 + layers * 7 for layers in range(1, 5)}
    if measured != right:
        fail("`measured` must hold what your function measures with a window of 8, in 48 positions", "a window of 8", right, measured)
    if not isinstance(predicted_reach, int | float) or predicted_reach != right[4]:
        words = "the measurement disagrees with your prediction. Each layer reaches `window - 1` further back than the one before it"
        fail(words, "4 layers with a window of 8", got=predicted_reach)
