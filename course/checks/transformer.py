"""Checks of workbook 7. What is trusted is torch's own norm, kernel and operation counter, and plain loops; nothing here comes from minimind."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from course.checks.core import close, equal, exercise, fail, shaped, unchanged

MODULE = "model"


def sizes(**changes) -> SimpleNamespace:
    """A small configuration."""
    usual = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
             "intermediate_size": 20, "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "rope_theta": 100.0, "rope_scaling": None,
             "tie_word_embeddings": True, "qk_norm": True, "num_experts": 0, "num_experts_per_tok": 1, "moe_intermediate_size": 0,
             "norm_topk_prob": False}  # fmt: skip
    return SimpleNamespace(**usual | changes)


def told(config: SimpleNamespace, *names: str) -> str:
    return ", ".join(f"{name} {getattr(config, name)}" for name in names)


def shuffled(module: nn.Module) -> dict[str, torch.Tensor]:
    """Give every parameter random numbers, norms too; the numbers by name."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 0.5) + (parameter.dim() == 1))
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


# -- rebuild


@exercise("RMSNorm", keeps=["RMSNorm"])
def check_rms_norm(RMSNorm):
    given = "RMSNorm(2, eps=0) and the vectors [3, 4] and [0.6, 0.8]"
    norm, x = RMSNorm(2, 0.0), torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    names = {name: tuple(p.shape) for name, p in norm.named_parameters()}
    if names != {"weight": (2,)}:
        fail("the norm has one parameter, `weight`, with a number for each channel", "RMSNorm(2)", {"weight": (2,)}, names)
    equal(norm.weight, torch.ones(2), "the weight of RMSNorm(2)", "the weight must begin at 1, so that a new norm scales nothing")
    y = norm(x)
    shaped(y, (2, 2), given, torch.float32)
    unchanged("x", torch.tensor([[3.0, 4.0], [0.6, 0.8]]), x)
    right = x / torch.tensor([[12.5**0.5], [0.5**0.5]])
    equal(y, right, given, "the vectors are not divided by their root mean square", {
        "the mean is of all vectors together, so one position knows the others: take it over the last dimension": x / x.pow(2).mean().sqrt(),
        "the mean goes over the wrong dimension: it must be over the channels, the last one": x / x.pow(2).mean(0).sqrt(),
        "this divides by the length, the root of the sum; divide by the root of the mean": x / x.norm(dim=-1, keepdim=True),
        "the root is missing": x / x.pow(2).mean(-1, keepdim=True),
        "this is LayerNorm: RMSNorm does not take the mean off": F.layer_norm(x, (2,), eps=0.0),
        "the vector is multiplied by its root mean square, not divided": x * torch.tensor([[12.5**0.5], [0.5**0.5]]),
        "nothing is normalised": x,
    })  # fmt: skip
    norm, x = RMSNorm(5, eps=0.5), torch.randn(2, 3, 5)
    weight = shuffled(norm)["weight"]
    trusted = lambda x, w=weight, eps=0.5: F.rms_norm(x, (5,), w, eps)
    given = "random x (2, 3, 5), random weight, eps = 0.5"
    plain = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    equal(norm(x), trusted(x), given, "it differs from torch's own rms_norm", {
        "the weight is not used": trusted(x, None),
        "eps is not used, or is always 1e-6: use the one that was given": (trusted(x, eps=0.0), trusted(x, eps=1e-6)),
        "eps stands outside the root; it is added to the mean of the squares": weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 0.5),
        "eps is squared": trusted(x, eps=0.25),
        "the weight is added; every channel is multiplied by it": plain + weight,
    }, 1e-5)  # fmt: skip
    zeros = RMSNorm(3)(torch.zeros(1, 3))
    equal(zeros, torch.zeros(1, 3), "a vector of zeros", "a vector of zeros stays zero, thanks to eps")
    tiny = torch.full((1, 3), 1e-3)
    equal(RMSNorm(3)(tiny), F.rms_norm(tiny, (3,), eps=1e-6), "RMSNorm(3) and the vector [0.001, 0.001, 0.001]", "without eps it must be 1e-6")
    low = norm(x.bfloat16())
    if low.dtype != torch.bfloat16:
        fail("the type must stay: a stream in bfloat16 comes back in bfloat16", "x in bfloat16", torch.bfloat16, low.dtype)
    equal(low.float(), trusted(x), "x in bfloat16", "in bfloat16 it is far off", tolerance=0.05)
    equal(RMSNorm(3)(torch.full((1, 3), 300.0).half()).float(), torch.ones(1, 3), "the vector [300, 300, 300] in float16",
          "the squares do not fit into float16: take the mean in float32", tolerance=0.01)  # fmt: skip
    trained = RMSNorm(3)(torch.ones(1, 3))
    if not trained.requires_grad:
        fail("the weight gets no gradient: it must be an nn.Parameter, and nothing may be detached", "RMSNorm(3)")


class Kept:
    """The least that a kv_cache must do."""

    def __init__(self) -> None:
        self.layers: dict = {}

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, k, v, layer_idx):
        if layer_idx in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer_idx], (k, v), strict=True))
        self.layers[layer_idx] = k, v
        return k, v


def turning(places: torch.Tensor, D: int, theta: float):
    """RoPE in the half-split layout, for positions (T,) or (B, T)."""
    angles = places[..., None].float() * theta ** (-torch.arange(0, D, 2) / D)  # (..., T, D/2)
    if angles.dim() == 3:
        angles = angles[:, None]

    def turned(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)

    return lambda q, k: (turned(q), turned(k))


def plain_block(x, w, c, rotate, allowed=None, way="pre", prefix=""):
    """One block from the named weights `w`, with torch's kernel; `way` is "pre", or a mistake."""
    w = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
    norm = lambda x, name: F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], c.rms_norm_eps)

    def attend(x):
        q, k, v = (F.linear(x, w[f"self_attn.{n}_proj.weight"]).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for n in "qkv")
        if c.qk_norm:
            q, k = norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm")
        q, k = rotate(q, k)
        y = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=allowed is None, enable_gqa=True)
        return F.linear(y.transpose(1, 2).flatten(2), w["self_attn.o_proj.weight"])

    def feed(x):
        gate, up = (F.linear(x, w[f"mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        return F.linear(F.silu(gate) * up, w["mlp.down_proj.weight"])

    one, two = "input_layernorm", "post_attention_layernorm"
    if way == "post":
        x = norm(x + attend(x), one)
        return norm(x + feed(x), two)
    if way == "parallel":
        return x + attend(norm(x, one)) + feed(norm(x, two))
    if way == "same copy":
        return x + attend(norm(x, one)) + feed(norm(x, one))
    if way == "normed stream":
        x = norm(x, one)
        x = norm(x + attend(x), two)
        return x + feed(x)
    y = attend(x if way == "no first norm" else norm(x, two if way == "swapped" else one))
    x = y if way == "no first path" else x + y
    z = feed(x if way == "no second norm" else norm(x, one if way in ("swapped", "first norm twice") else two))
    return z if way == "no second path" else x if way == "no feed-forward" else x + z


WAYS = {
    "the norm stands outside (post-norm): normalise what a layer reads, not the stream": "post",
    "this is a parallel block: the feed-forward layer must read what the attention has added": "parallel",
    "the feed-forward layer reads the copy that the attention got; it needs a new one, of the new stream": "same copy",
    "the stream itself is normalised: only the copy that a layer reads may be": "normed stream",
    "the attention reads the stream without a norm": "no first norm",
    "the feed-forward layer reads the stream without a norm": "no second norm",
    "the attention replaces the stream; its result must be added": "no first path",
    "the feed-forward layer replaces the stream; its result must be added": "no second path",
    "the first norm is used twice": "first norm twice",
    "the two norms are swapped": "swapped",
    "the feed-forward layer is missing": "no feed-forward",
}


@exercise("Block", after=["RMSNorm"], keeps=["Block"])
def check_block(Block):
    c, x = sizes(), torch.randn(2, 5, 12)
    rotate = turning(torch.arange(5), 6, 100.0)
    given = "a block of width 12 with 4 heads over 2, random weights, random x (2, 5, 12)"
    block = Block(c, 3)
    w = shuffled(block)
    if "mlp.gate_proj.weight" not in w or len(w) != 11:
        fail("the block must have the parts of __init__ and no other weights", given, got=sorted(w))
    before = x.clone()
    with torch.no_grad():
        y = block(x, rotate)
        shaped(y, (2, 5, 12), given, torch.float32, "a block gives back the shape that it got: (B, T, C)")
        unchanged("x", before, x)
        likely = {words: plain_block(x, w, c, rotate, way=way) for words, way in WAYS.items()}
        likely["rotate is not handed on"] = plain_block(x, w, c, lambda q, k: (q, k))
        equal(y, plain_block(x, w, c, rotate), given, "it differs from the formula", likely)
        own = torch.ones(5, 5, dtype=torch.bool).tril() & ~torch.ones(5, 5, dtype=torch.bool).tril(-2)
        equal(block(x, rotate, own[None, None]), plain_block(x, w, c, rotate, own), "a mask of the last two positions",
              "attention_mask has not the effect that it should have", {"attention_mask is not handed on": y})  # fmt: skip
        cache = Kept()
        parts = [block(x[:, a:b], turning(torch.arange(a, b), 6, 100.0), None, cache) for a, b in ((0, 3), (3, 4), (4, 5))]
        if not cache.layers:
            fail("kv_cache is not handed on", "three positions, then one, then one, with a kv_cache")
        equal(torch.cat(parts, dim=1), y, "three positions, then one, then one, with a kv_cache", "with a cache the result must be the same")
        plain = Block(sizes(qk_norm=False), 0)
        w = shuffled(plain)
        equal(plain(x, rotate), plain_block(x, w, sizes(qk_norm=False), rotate), "the same without q/k norm", "right with q/k norm, and not without")
        routed = Block(sizes(num_experts=3, moe_intermediate_size=8), 0)
        shaped(routed(x, rotate), (2, 5, 12), "a block with three experts")
    y = block(x.clone().requires_grad_(), turning_nothing)
    if not y.requires_grad:
        fail("no gradient gets through; leave detach, .data and no_grad out", "x with requires_grad=True")


def turning_nothing(q, k):
    return q, k


def looks(T: int, S: int, padding=None, itself: bool = True, start: int | None = None) -> torch.Tensor:
    """The mask, one entry at a time; `start` is the position of the first query."""
    start = S - T if start is None else start
    rows = [[[s <= start + t and (p is None or bool(p[s]) or (itself and s == start + t)) for s in range(S)] for t in range(T)]
            for p in ([None] if padding is None else padding.tolist())]  # fmt: skip
    return torch.tensor(rows)[:, None]


@exercise("full_mask", keeps=["full_mask"])
def check_full_mask(full_mask):
    ids = lambda B, T: torch.zeros(B, T, dtype=torch.long)

    def masked(attention_mask, past, T, given, B=1):
        mask = full_mask(attention_mask, past, ids(B, T))
        if mask is None:
            fail("None says that nothing but causality counts; here more is needed", given, got=None)
        shaped(mask, (1 if attention_mask is None else B, 1, T, past + T), given, hint="the mask is (B or 1, 1, T, S), with S = past + T keys")
        if mask.dtype != torch.bool:
            fail("the mask must be of type bool", given, torch.bool, mask.dtype)
        return mask

    for past, T in ((0, 4), (0, 1), (5, 1)):
        if (got := full_mask(None, past, ids(2, T))) is not None:
            fail("these rows are plainly causal: None is the fast case", f"no attention_mask, past = {past}, T = {T}", None, got)
    given = "no attention_mask, past = 3, T = 2"
    equal(masked(None, 3, 2, given, 2), looks(2, 5), given, "with a cache the new queries stand at the end: query t at position past + t", {
        "the queries are counted from the first key; they stand at past and later": looks(2, 5, start=0),
    })  # fmt: skip
    padding = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    before = padding.clone()
    given = "attention_mask = [[0, 1, 1, 1], [1, 1, 1, 1]], past = 0, T = 4"
    got, right = masked(padding, 0, 4, given, 2), looks(4, 4, padding)
    unchanged("attention_mask", before, padding)
    free = (padding.bool()[:, None, None] | torch.eye(4, dtype=torch.bool)).expand(2, 1, 4, 4)
    equal(got[0, 0], right[0, 0], f"{given}: the first row", "the mask of the padded row is not right", {
        "a padded position has no key at all, and its softmax is 0 / 0: let each position look at itself": looks(4, 4, padding, itself=False)[0, 0],
        "the padding mask is laid over the queries; it says which keys may be seen": looks(4, 4)[0, 0] & padding[0].bool()[:, None],
        "padding is not hidden": looks(4, 4)[0, 0],
        "1 means real, and here real positions are hidden": looks(4, 4, 1 - padding)[0, 0],
        "the future is not hidden: the mask must be causal too": free[0, 0],
        "the future is not hidden, and a padded position has no key": padding[0].bool().expand(4, 4),
    })  # fmt: skip
    equal(got[1, 0], right[1, 0], f"{given}: the second row", "each text has its own padding; the second one has none")
    for kind in (torch.bool, torch.float32):
        equal(masked(padding.to(kind), 0, 4, f"{given}, as {kind}", 2), right, f"{given}, as {kind}", "a padding mask may be of any type")
    given = "attention_mask = [[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]], past = 3, T = 2"
    padding = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
    equal(masked(padding, 3, 2, given, 2), looks(2, 5, padding), given, "with a cache, a query at position past + t may look at itself", {
        "itself is counted from the first key; the new positions are the last T rows of the identity":
            looks(2, 5, padding, itself=False) | (torch.eye(5, dtype=torch.bool)[:2] & looks(2, 5)),
    })  # fmt: skip
    given = "attention_mask = [[1, 0, 1]], past = 2, T = 1"
    equal(masked(torch.tensor([[1, 0, 1]]), 2, 1, given), looks(1, 3, torch.tensor([[1, 0, 1]])), given, "one new position has padding too")
    whole = torch.rand(2, 1, 3, 4) < 0.5
    if not close(full_mask(whole, 1, ids(2, 3)), whole):
        fail("a mask with four dimensions says everything already: hand it back as it is", "attention_mask (2, 1, 3, 4), past = 1, T = 3")
    for shape, past, T in (((2, 4), 3, 4), ((3, 4), 0, 4), ((2, 5), 0, 4), ((1, 4), 0, 4)):
        given = f"attention_mask {shape}, past = {past}, input_ids (2, {T})"
        try:
            full_mask(torch.ones(shape, dtype=torch.long), past, ids(2, T))
        except ValueError:
            continue
        except Exception as error:
            fail("a padding mask that is not (B, past + T) must raise ValueError", given, "ValueError", type(error).__name__)
        fail("a padding mask that is not (B, past + T) must raise ValueError; here it passes in silence", given)


def plain_decoder(ids, w, c, places=None, allowed=None, norm=True, layers=None):
    x = w["embed_tokens.weight"][ids]
    rotate = turning(torch.arange(ids.shape[1]) if places is None else places, c.head_dim, c.rope_theta)
    for number in range(c.num_hidden_layers) if layers is None else layers:
        x = plain_block(x, w, c, rotate, allowed, prefix=f"layers.{number}.")
    return F.rms_norm(x, x.shape[-1:], w["norm.weight"], c.rms_norm_eps) if norm else x


@exercise("Decoder", after=["RMSNorm", "Block", "full_mask"], keeps=["Decoder"])
def check_decoder(Decoder):
    c, ids = sizes(), torch.randint(11, (2, 6))
    decoder = Decoder(c)
    w = shuffled(decoder)
    given = "two layers of width 12, random weights, random ids (2, 6)"
    with torch.no_grad():
        y = decoder(ids)
        shaped(y, (2, 6, 12), given, torch.float32, "ids (B, T) become hidden vectors (B, T, C)")
        equal(y, plain_decoder(ids, w, c), given, "it differs from the same model in plain torch", {
            "the norm at the end is missing": plain_decoder(ids, w, c, norm=False),
            "each layer reads the embedding, so only the last one counts": plain_decoder(ids, w, c, layers=[1]),
            "the blocks come in the wrong order": plain_decoder(ids, w, c, layers=[1, 0]),
            "only the first block is used": plain_decoder(ids, w, c, layers=[0]),
            "the blocks are not used": plain_decoder(ids, w, c, layers=[]),
            "every position is turned as if it were position 0": plain_decoder(ids, w, c, torch.zeros(6)),
        })  # fmt: skip
        padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        equal(decoder(ids, padding), plain_decoder(ids, w, c, allowed=looks(6, 6, padding)), f"{given}, the first row has two padded positions",
              "attention_mask has not the effect that it should have", {"attention_mask is not handed to full_mask": y})  # fmt: skip
        places = torch.tensor([[0, 0, 0, 1, 2, 3], [4, 5, 6, 7, 8, 9]])
        equal(decoder(ids, position_ids=places), plain_decoder(ids, w, c, places), f"{given}, position_ids of its own for each row",
              "position_ids has not the effect that it should have", {"position_ids is not handed to rotation": y})  # fmt: skip
        _decoded_in_parts(decoder, ids, y)
        _decoded_in_parts(decoder, ids, decoder(ids, padding), padding)
        with torch.autocast("cpu", torch.bfloat16):
            low = decoder(ids)
        if low.dtype != torch.bfloat16:
            fail("under autocast the stream must have its type: convert it once, after the embedding", "autocast to bfloat16", torch.bfloat16,
                 low.dtype)  # fmt: skip


def _decoded_in_parts(decoder, ids, y, padding=None) -> None:
    cache, parts = Kept(), []
    for first, last in ((0, 3), (3, 4), (4, 6)):
        parts.append(decoder(ids[:, first:last], None if padding is None else padding[:, :last], kv_cache=cache))
        if sorted(cache.layers) != [0, 1]:
            fail("kv_cache must reach every block", "three positions with a kv_cache", "layers 0 and 1 in the cache", sorted(cache.layers))
    given = "three positions, then one, then two, with a kv_cache" + (" and padding" if padding is not None else "")
    equal(parts[0], y[:, :3], given, "the first part must be as without a cache")
    equal(parts[1], y[:, 3:4], f"{given}: the second part", "past must be kv_cache.length as it is before the blocks: it says where the new "
          "positions stand, for the rotation and for the mask")  # fmt: skip
    equal(parts[2], y[:, 4:], f"{given}: the third part", "with two new positions the mask must know how many are in the cache")


def shapes_of(c: SimpleNamespace, experts: int) -> dict[str, list[tuple[int, ...]]]:
    """Every weight of a model by its shape, as a list of what is there."""
    layers = range(c.num_hidden_layers)
    wide, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    inner = c.moe_intermediate_size if c.num_experts else c.intermediate_size
    one = [(c.hidden_size, inner), (c.hidden_size, inner), (inner, c.hidden_size)]
    return {
        "q, o": [(c.hidden_size, wide), (wide, c.hidden_size)] * len(layers),
        "k, v": [(c.hidden_size, narrow)] * (2 * len(layers)),
        "feed": one * (experts if c.num_experts else 1) * len(layers),
        "router": [(c.hidden_size, c.num_experts)] * len(layers) if c.num_experts else [],
        "output": [(c.vocab_size, c.hidden_size)],
        "norms": [(c.hidden_size,)] * (2 * len(layers)),
        "last norm": [(c.hidden_size,)],
        "heads": [(c.head_dim,)] * (2 * len(layers)) if c.qk_norm else [],
        "embedding": [] if c.tie_word_embeddings else [(c.vocab_size, c.hidden_size)],
    }


def total(shapes: dict, *left_out: str) -> int:
    return sum(math.prod(shape) for part, found in shapes.items() if part not in left_out for shape in found)


VECTORS = ("norms", "last norm", "heads", "embedding")
CASES = (
    sizes(hidden_size=10, vocab_size=1000, tie_word_embeddings=True),
    sizes(hidden_size=10, vocab_size=1000, tie_word_embeddings=False, qk_norm=False, num_hidden_layers=3),
    sizes(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=7),
    sizes(num_experts=4, moe_intermediate_size=9, tie_word_embeddings=False, num_key_value_heads=1, intermediate_size=33),
)


@exercise("count_parameters", keeps=["matmul_parameters", "count_parameters"])
def check_count_parameters(matmul_parameters, count_parameters):
    for c in CASES:
        given = told(c, "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
                     "vocab_size", "num_experts", "moe_intermediate_size", "tie_word_embeddings", "qk_norm")  # fmt: skip
        every = shapes_of(c, c.num_experts)
        for experts in sorted({c.num_experts, c.num_experts_per_tok}):
            shapes, got = shapes_of(c, experts), matmul_parameters(c, experts)
            _number(got, f"matmul_parameters({experts} experts); {given}")
            small = total({"": [(c.hidden_size, c.num_key_value_heads * c.head_dim)]}) * 2 * c.num_hidden_layers
            _counted(got, total(shapes, *VECTORS), f"matmul_parameters(..., {experts}); {given}", {
                "the output layer is missing: it multiplies every token, tied or not": total(shapes, "output", *VECTORS),
                "the router is missing": total(shapes, "router", *VECTORS),
                "keys and values have fewer heads than queries: K, not H":
                    total(shapes, "k, v", *VECTORS) + small * c.num_attention_heads // c.num_key_value_heads,
                "the feed-forward layer has three matrices: gate, up and down": total(shapes, *VECTORS) - total({"": shapes["feed"]}) // 3,
                "attention has four matrices: the output projection is missing": total(shapes, *VECTORS) - total({"": shapes["q, o"]}) // 2,
                "all experts are counted; it must be as many as `experts` says": total(every, *VECTORS),
                "the output layer stands once, not in every layer":
                    total(shapes, *VECTORS) + (c.num_hidden_layers - 1) * c.hidden_size * c.vocab_size,
                "one layer is counted, not all": (total(shapes, "output", *VECTORS)) // c.num_hidden_layers + c.hidden_size * c.vocab_size,
                "with experts there is no dense feed-forward layer beside them":
                    total(shapes, *VECTORS) + 3 * c.num_hidden_layers * c.hidden_size * c.intermediate_size,
                "the experts have moe_intermediate_size, not intermediate_size":
                    total(shapes, "feed", *VECTORS) + 3 * experts * c.num_hidden_layers * c.hidden_size * c.intermediate_size,
            })  # fmt: skip
        for active in (False, True):
            shapes = shapes_of(c, c.num_experts_per_tok if active else c.num_experts)
            got = count_parameters(c, active) if active else count_parameters(c)
            _number(got, f"count_parameters(active={active}); {given}")
            other = shapes_of(c, c.num_experts if active else c.num_experts_per_tok)
            _counted(got, total(shapes), f"count_parameters(..., active={active}); {given}", {
                "active=True counts num_experts_per_tok experts, active=False all of them": total(other),
                "the tied embedding is counted twice: it is one matrix": total(shapes) + c.vocab_size * c.hidden_size,
                "an embedding that is not tied is a second matrix": total(shapes, "embedding"),
                "the last norm is missing": total(shapes, "last norm"),
                "the norms are missing": total(shapes, "norms", "last norm", "heads"),
                "the norms in the layers are missing": total(shapes, "norms"),
                "the norms of queries and keys are missing: two of width D in each layer": total(shapes, "heads"),
                "there are two norms in each layer": total(shapes) - c.num_hidden_layers * c.hidden_size,
                "without qk_norm there are no norms of queries and keys": total(shapes) + 2 * c.num_hidden_layers * c.head_dim,
                "queries and keys have a norm each, of width D, shared by all heads":
                    total(shapes, "heads") + c.num_hidden_layers * c.head_dim * (c.num_attention_heads + c.num_key_value_heads),
            })  # fmt: skip


def _number(got, given) -> None:
    if isinstance(got, bool) or not isinstance(got, int | float) or got != int(got):
        fail("return a whole number", given, got=got)


def _counted(got, wanted, given, likely) -> None:
    if got != wanted:
        fail(next((words for words, value in likely.items() if got == value), "the count is not right"), given, wanted, got)


def counted_flops(c: SimpleNamespace, T: int, heads: int | None = None) -> int:
    """What torch counts for one row, forward, divided by T; tensors without memory."""
    H, shapes = heads or c.num_attention_heads, shapes_of(c, c.num_experts_per_tok)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        for part, found in shapes.items():
            for shape in found if part not in VECTORS else ():
                torch.empty(T, shape[0]) @ torch.empty(shape)
        for _ in range(c.num_hidden_layers):
            q = torch.empty(H, T, c.head_dim)
            (q @ q.mT) @ q
    return counter.get_total_flops() // T


@exercise("flops_per_token", after=["count_parameters"], keeps=["flops_per_token"])
def check_flops_per_token(flops_per_token):
    for c in (sizes(num_hidden_layers=5, num_attention_heads=6, head_dim=2), *CASES):
        matrices = total(shapes_of(c, c.num_experts_per_tok), *VECTORS)
        for T in (8, 1, 50):
            given = f"T = {T}, " + told(c, "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "num_experts",
                                        "num_experts_per_tok")  # fmt: skip
            forward = counted_flops(c, T)
            meeting = forward - 2 * matrices
            got = flops_per_token(c, T, training=False)
            _number(got, given)
            wasted = 2 * (total(shapes_of(c, c.num_experts), *VECTORS) - matrices)
            _counted(got, forward, f"forward only; {given}", {
                "a product with N weights takes N multiplications and N additions": forward - matrices,
                "attention itself costs too: 4 T H D in each layer": 2 * matrices,
                "scores and mixing are two products with T positions: 4 T H D, not 2": forward - meeting // 2,
                "attention is counted for one layer": 2 * matrices + meeting // c.num_hidden_layers,
                "each query head has its own scores: H, not K": counted_flops(c, T, c.num_key_value_heads),
                "all experts are counted; a token visits num_experts_per_tok of them": forward + wasted,
                "training=False leaves backward out": 3 * forward,
                "norms and looking up an embedding are no products": forward + 2 * (total(shapes_of(c, c.num_experts_per_tok)) - matrices),
                "this does not depend on T as it should: each token meets T positions": 2 * matrices + meeting // T,
            })  # fmt: skip
            _counted(flops_per_token(c, T), 3 * forward, f"training; {given}", {
                "backward is missing: it takes twice as much as forward": forward,
                "backward takes twice as much as forward, so training is three times forward": 2 * forward,
                "forward is missing in the sum": 4 * forward,
            })  # fmt: skip


# -- beyond


@exercise("qwen")
def check_qwen(predicted_millions):
    given = "Qwen3-0.6B"
    if isinstance(predicted_millions, bool) or not isinstance(predicted_millions, int | float):
        fail("write a number, in millions", given, got=predicted_millions)
    c = sizes(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072,
              vocab_size=151_936)  # fmt: skip
    shapes = shapes_of(c, 0)
    right = total(shapes) / 1e6
    near = lambda value: abs(predicted_millions - value) < 0.6
    mistakes = {
        "write it in millions": total(shapes),
        "the embedding is missing: it is a quarter of the model": total(shapes, "output") / 1e6,
        "the embedding is counted twice: it is tied": (total(shapes) + math.prod(shapes["output"][0])) / 1e6,
        "a feed-forward layer has three matrices; and the heads are together wider than the stream: 16 of 128 are 2048":
            right - 28 * 3 * 1024**2 / 1e6,
        "keys and values have 8 heads, not 16": right + 28 * 2 * 1024 * 1024 / 1e6,
        "attention has four matrices: q, k, v and the output": right - 28 * 1024 * 2048 / 1e6,
        "that is one layer": total(shapes, "output") / 28e6,
        "the name is rounded; three digits were asked for": 600.0,
    }
    if near(right):
        return "feed-forward 264, attention 176, embedding 156 million; without its embedding it is a 0.44B"
    if abs(predicted_millions - total(shapes)) < 1e6:
        fail("write it in millions", given, got=predicted_millions)
    fail(next((words for words, value in mistakes.items() if near(value)), "this is not the sum of embedding, attention and feed-forward layers"),
         given, got=predicted_millions)  # fmt: skip


def plain_stack(x, weights, eps=1e-6, leak=False, lost=False):
    """What pre_norm_stack must give; the options are its bugs."""
    for w in weights:
        copy = F.rms_norm(x, x.shape if leak else x.shape[-1:], eps=eps)
        x = (copy if lost else x) + torch.tanh(torch.einsum("btc,cd->btd", copy, w))
    return x


@exercise("pre_norm_stack")
def check_pre_norm_stack(pre_norm_stack):
    x, weights = torch.randn(2, 4, 6) * torch.tensor([1.0, 3.0, 0.2, 2.0])[:, None], torch.randn(3, 6, 6)
    before = x.clone()
    given = "random x (2, 4, 6), three random matrices"
    got = pre_norm_stack(x, weights)
    shaped(got, (2, 4, 6), given, torch.float32)
    unchanged("x", before, x)
    equal(got, plain_stack(x, weights), given, "it is still not the stack of a plain loop", {
        "both bugs are still there": plain_stack(x, weights, leak=True, lost=True),
        "one bug is left: change the last position, and earlier outputs change; over what is the mean taken?": plain_stack(x, weights, leak=True),
        "one bug is left: the layers add to the normalised copy, so the stream is scaled down at every layer": plain_stack(x, weights, lost=True),
        "the norm is gone: a layer must read a normalised copy": _unnormed(x, weights),
    })  # fmt: skip
    for eps in (0.5, 1e-6):
        equal(pre_norm_stack(x, weights[:1], eps), plain_stack(x, weights[:1], eps), f"{given[:20]}, one matrix, eps = {eps:g}",
              "right with the usual eps, and not with others")  # fmt: skip


def _unnormed(x, weights):
    for w in weights:
        x = x + torch.tanh(x @ w)
    return x


def plain_capped(q, k, v, cap, way="right"):
    """Capped attention, from the shares; `way` may be a mistake."""
    T, D = q.shape[-2:]
    later = torch.tensor([[s > t for s in range(T)] for t in range(T)])
    scores = torch.einsum("bhtd,bhsd->bhts", q, k)
    scores = scores if way in ("unscaled", "late scale") else scores / D**0.5
    if way == "mask first":
        scores = scores.masked_fill(later, -math.inf)
    bent = {"clamp": scores.clamp(-cap, cap), "no cap": scores, "no outer cap": (scores / cap).tanh(), "no inner cap": cap * scores.tanh(),
            "after softmax": scores}.get(way, cap * (scores / cap).tanh())  # fmt: skip
    bent = bent / D**0.5 if way == "late scale" else bent
    if way not in ("mask first", "no mask"):
        bent = bent.masked_fill(later, -math.inf)
    shares = bent.softmax(-1)
    if way == "after softmax":
        shares = cap * (shares / cap).tanh()
    return shares @ v


@exercise("capped_attention")
def check_capped_attention(capped_attention):
    q, k, v = 3 * torch.randn(3, 2, 2, 5, 4)
    before = [each.clone() for each in (q, k, v)]
    given = "random q, k, v (2, 2, 5, 4) of size 3, cap = 3"
    got = capped_attention(q, k, v, 3.0)
    shaped(got, (2, 2, 5, 4), given, torch.float32)
    for name, old, now in zip("qkv", before, (q, k, v), strict=True):
        unchanged(name, old, now)
    equal(got, plain_capped(q, k, v, 3.0), given, "it is not attention with capped scores", {
        words: plain_capped(q, k, v, 3.0, way) for words, way in {
            "the future can be seen: the mask came first, and the tanh turned minus infinity into minus the cap": "mask first",
            "the future can be seen: the causal mask is missing": "no mask",
            "the scores are not bent": "no cap",
            "the scores are cut off at the cap, so there is no gradient beyond it; tanh bends them": "clamp",
            "the scores are divided by the cap inside tanh, and must be multiplied by it outside": "no outer cap",
            "the scores must be divided by the cap inside tanh": "no inner cap",
            "the scores are not divided by the root of D": "unscaled",
            "the root of D divides after the tanh; the cap is for the scores that are already divided": "late scale",
            "the shares are bent; it must be the scores, before the softmax": "after softmax",
        }.items()
    })  # fmt: skip
    equal(capped_attention(q, k, v, 1e5), F.scaled_dot_product_attention(q, k, v, is_causal=True), "the same with cap = 100000",
          "with a huge cap it must be torch's own attention", tolerance=1e-3)  # fmt: skip
    means = v.cumsum(2) / torch.arange(1, 6)[:, None]
    equal(capped_attention(q, k, v, 1e-6), means, "the same with cap = 0.000001", "with a tiny cap every position gets the mean of the values so far")
    q, k, v = torch.randn(3, 1, 3, 7, 2)
    equal(capped_attention(q, k, v, 0.5), plain_capped(q, k, v, 0.5), "random q, k, v (1, 3, 7, 2), cap = 0.5", "right for the first case, not here")


def grown(layers: int, way: str = "right") -> float:
    """The size of the stream, in double precision; `way` may be a mistake."""
    x = torch.randn(100, 256, generator=torch.Generator().manual_seed(7)).double()
    for layer in range(layers):
        number = 0 if way == "same matrix" else layer + (way == "from one")
        w = torch.randn(256, 256, generator=torch.Generator().manual_seed(number)).double() / 16
        copy = x if way == "no norm" else x / x.square().mean(1, keepdim=True).sqrt()
        x = copy @ w + (0 if way == "no path" else copy if way == "copy" else x)
    return float(x.square().mean().sqrt())


def near(got: float, value: float) -> bool:
    return abs(got - value) <= 1e-3 * value


@exercise("stream_size")
def check_stream_size(predicted_size, stream_size, measured):
    depths = (1, 4, 16, 64)
    right = {layers: grown(layers) for layers in depths}
    mistakes = {"without a norm each layer doubles the square of the size: let a layer read a normalised copy": "no norm",
                "the result replaces the stream; it must be added": "no path",
                "the result is added to the normalised copy; it must be added to the stream": "copy",
                "every layer has the same matrix; layer n has matrix(n)": "same matrix", "the first matrix is matrix(0)": "from one"}  # fmt: skip
    for layers in (4, 1, 16, 64):
        got = stream_size(layers)
        given = f"stream_size({layers})"
        if isinstance(got, bool) or not isinstance(got, int | float):
            fail("return the size as a plain number", given, round(right[layers], 4), type(got).__name__)
        if not near(got, right[layers]):
            words = next((words for words, way in mistakes.items() if near(got, grown(layers, way))), "this is not the size of the stream")
            words = "the size is the root of the mean of the squares; the root is missing" if near(got, right[layers] ** 2) else words
            words = "the size is the root of the mean of the squares, not of their sum" if near(got, 160 * right[layers]) else words
            fail(words, given, round(right[layers], 4), round(got, 4))
    if not isinstance(measured, dict) or set(measured) != set(depths):
        fail("`measured` is a dict with the size after 1, 4, 16 and 64 layers", got=measured)
    if any(not isinstance(measured[n], int | float) or not near(measured[n], right[n]) for n in depths):
        fail("`measured` must hold what stream_size gives", expected={n: round(value, 3) for n, value in right.items()}, got=measured)
    if isinstance(predicted_size, bool) or not isinstance(predicted_size, int | float):
        fail("predicted_size is a number", got=predicted_size)
    if abs(predicted_size - right[64]) > 0.1 * right[64]:
        words = "your measurement disagrees with your prediction: look at it, and correct the prediction"
        if abs(predicted_size - 65) <= 2:
            words += "; sizes add up only where vectors point the same way"
        fail(words, got=predicted_size)
