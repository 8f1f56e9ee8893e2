"""Checks of workbook 5. What is trusted are complex numbers: a pair is one, and a turn is a product. Nothing here comes from minimind.rope."""

import math

import torch

from course.checks.core import NotKept, close, equal, exercise, fail, shaped, unchanged

MODULE = "rope"
LENGTHS = "a turn keeps the length of every pair"


def speeds_of(D: int, base: float = 100.0) -> torch.Tensor:
    """Radians for each position of each pair, (D/2,)."""
    return torch.tensor([base ** (-2 * i / D) for i in range(D // 2)])


def table(positions: torch.Tensor, speeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, the angles twice in a row."""
    angles = positions.double()[..., None] * speeds.double()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def turned(x: torch.Tensor, positions: torch.Tensor, speeds: torch.Tensor, pairs: str = "halves", sign: int = 1) -> torch.Tensor:
    """x turned as complex numbers, with the pairs of either layout."""
    D = x.shape[-1]
    a, b = (x[..., : D // 2], x[..., D // 2 :]) if pairs == "halves" else (x[..., 0::2], x[..., 1::2])
    angles = sign * positions.double()[..., None] * speeds.double()
    while angles.dim() < x.dim():
        angles = angles.unsqueeze(-3)
    z = torch.complex(a.double(), b.double()) * torch.polar(torch.ones_like(angles), angles)
    joined = torch.cat((z.real, z.imag), -1) if pairs == "halves" else torch.stack((z.real, z.imag), -1).flatten(-2)
    return joined.to(x.dtype)


# -- rebuild


@exercise("rope_cos_sin", keeps=["rope_cos_sin"])
def check_rope_cos_sin(rope_cos_sin):
    speeds, places = torch.tensor([1.0, 0.5]), torch.arange(3)
    given = "positions 0, 1, 2; speeds 1 and 0.5"
    result = rope_cos_sin(places, speeds)
    if not (isinstance(result, tuple | list) and len(result) == 2):
        fail("it must return two tensors, cos and sin", given, got=type(result).__name__)
    cos, sin = result
    for name, got in (("cos", cos), ("sin", sin)):
        shaped(got, (3, 4), f"{given}: {name}", torch.float32, "each is (T, D): the D/2 angles stand twice")
    angles = places[:, None] * speeds
    twice = torch.cat((angles, angles), -1)
    equal(cos, twice.cos(), f"{given}: cos", "the cosines are not right", {
        "sine and cosine are swapped": twice.sin(),
        "each angle stands twice before the next; all of them must stand in a row, and then again": angles.repeat_interleave(2, -1).cos(),
        "the angles are taken as degrees; speeds are radians for each position": torch.deg2rad(twice).cos(),
        "these are the angles; cos and sin are missing": twice,
    })  # fmt: skip
    equal(sin, twice.sin(), f"{given}: sin", "the sines are not right", {"the sign of sin is wrong: the pairs would turn backwards": -twice.sin()})
    cos, sin = rope_cos_sin(places, speeds, 1.5)
    equal(cos, 1.5 * twice.cos(), f"{given}, attention_factor 1.5: cos", "the factor multiplies cos and sin", {
        "attention_factor is not used": twice.cos(),
        "attention_factor multiplies the angles; it must multiply cos and sin": (1.5 * twice).cos(),
    })  # fmt: skip
    equal(sin, 1.5 * twice.sin(), f"{given}, attention_factor 1.5: sin", "the factor multiplies cos and sin, both")
    both = torch.tensor([[0, 1, 2], [5, 6, 7]])
    cos, sin = rope_cos_sin(both, speeds)
    shaped(cos, (2, 3, 4), "positions (2, 3), one row for each text")
    equal(cos[1], rope_cos_sin(both[1], speeds)[0], "positions (2, 3), one row for each text", "each text has its own positions")
    far = torch.tensor([1000, 1001])
    cos, _ = rope_cos_sin(far, speeds.to(torch.bfloat16))
    equal(cos.float(), table(far, speeds)[0], "positions 1000 and 1001, speeds in bfloat16", "compute the angles in float32: bfloat16 has no 1001",
          tolerance=2e-3)  # fmt: skip


@exercise("apply_rope", after=["rope_cos_sin"], keeps=["apply_rope"])
def check_apply_rope(apply_rope):
    speeds, places = torch.tensor([math.pi / 2, 0.0]), torch.arange(2)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(2, 1)[None, None]
    given = "x = [1, 2, 3, 4] at positions 0 and 1; the first pair turns by a quarter, the second not at all"
    got = apply_rope(x, *table(places, speeds))
    shaped(got, (1, 1, 2, 4), given, torch.float32)
    equal(got[0, 0, 0], x[0, 0, 0], "x = [1, 2, 3, 4] at position 0", "at position 0 nothing is turned", {
        "sine and cosine are swapped": (torch.tensor([-3.0, -4.0, 1.0, 2.0]), torch.tensor([-2.0, 1.0, -4.0, 3.0])),
    })  # fmt: skip
    right = {pairs: turned(x, places, speeds, pairs)[0, 0, 1] for pairs in ("halves", "neighbours")}
    layout = next((pairs for pairs, wanted in right.items() if close(got[0, 0, 1], wanted)), None)
    if layout is None:
        equal(got[0, 0, 1], right["halves"], given, "this is no turn of pairs: (a, b) becomes (a cos - b sin, a sin + b cos)", {
            "the pairs turn the wrong way: compare the sign of sin in (a cos - b sin, a sin + b cos)":
                tuple(turned(x, places, speeds, pairs, -1)[0, 0, 1] for pairs in right),
            "the halves are swapped, but none is negated": torch.tensor([3.0, 2.0, 1.0, 4.0]),
            "nothing is turned": x[0, 0, 0],
            "the pairs are neighbours, but their angles are taken from cos[..., 0::2]: the angles stand twice in a row, "
            "so pair i has the angle i of the first half": torch.tensor([-2.0, 1.0, -4.0, 3.0]),
        })  # fmt: skip
    _turns(apply_rope, layout)
    if layout == "neighbours":
        return NotKept("it pairs neighbours, the interleaved layout of the paper. The course's checkpoints need the other one, "
                       "so keep() leaves this one out")  # fmt: skip
    return "it pairs channel i with i + D/2, the half-split layout of Hugging Face"


def _turns(apply_rope, layout: str) -> None:
    D, places = 8, torch.arange(6)
    speeds, x = speeds_of(D), torch.randn(2, 3, 6, D)
    before = x.clone()
    cos, sin = table(places, speeds)
    got = apply_rope(x, cos, sin)
    unchanged("x", before, x)
    shaped(got, x.shape, "random x (2, 3, 6, 8)")
    if not close(got.norm(dim=-1), x.norm(dim=-1)):
        worst = (got.norm(dim=-1) - x.norm(dim=-1)).abs().max()
        fail(f"the lengths change; {LENGTHS}", "random x (2, 3, 6, 8)", "the norms of x", f"norms that differ by up to {worst:.2g}")
    equal(got, turned(x, places, speeds, layout), "random x (2, 3, 6, 8), positions 0 to 5", "some pairs turn by the angle of another pair", {
        "the pairs are neighbours, but their angles are not those of the first half of cos and sin":
            turned(x, places, speeds[torch.arange(D // 2) * 2 % (D // 2)], "neighbours"),
    })  # fmt: skip
    own = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]])
    equal(apply_rope(x, *table(own, speeds)), turned(x, own, speeds, layout), "cos and sin (2, 6, 8): each text has its own positions",
          "cos and sin may be (B, T, D): put the dimension of the heads between B and T")  # fmt: skip
    low = apply_rope(x.to(torch.bfloat16), cos, sin)
    if low.dtype != torch.bfloat16:
        fail("the type must stay: queries in bfloat16 come back in bfloat16", "x in bfloat16", torch.bfloat16, low.dtype)


def order(heads: int, D: int, to: str) -> torch.Tensor:
    """Which row of the old matrix stands in each row of the new one."""
    if to == "halves":
        inside = [*range(0, D, 2), *range(1, D, 2)]
    else:
        inside = [i // 2 + (i % 2) * (D // 2) for i in range(D)]
    return torch.tensor([h * D + i for h in range(heads) for i in inside])


@exercise("layouts", keeps=["to_half_split", "to_interleaved"])
def check_layouts(to_half_split, to_interleaved):
    rows = torch.arange(12.0)[:, None]
    for name, function, to in (("to_half_split", to_half_split, "halves"), ("to_interleaved", to_interleaved, "neighbours")):
        given = f"{name}: a matrix of 12 rows, holding 0 to 11, head_dim 6 (two heads)"
        got = function(rows, 6)
        shaped(got, (12, 1), given)
        other = "neighbours" if to == "halves" else "halves"
        equal(got.flatten(), rows[order(2, 6, to)].flatten(), given, "the rows are in the wrong order", {
            "this is the other direction": rows[order(2, 6, other)].flatten(),
            "the rows of all heads are mixed; each head is reordered by itself": rows[order(1, 12, to)].flatten(),
            "nothing was reordered": rows.flatten(),
        })  # fmt: skip
        weight = torch.randn(3 * 8, 5)
        equal(function(weight, 8), weight[order(3, 8, to)], f"{name}: random (24, 5), head_dim 8", "right for head_dim 6, and not here")


def ramp_of(D: int, theta: float, trained: int, fast: float = 32, slow: float = 1) -> torch.Tensor:
    """YaRN's ramp, one pair at a time."""
    def pair(turns):
        return D * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), D - 1)
    high += 0.001 * (low == high)
    return torch.tensor([min(max((i - low) / (high - low), 0.0), 1.0) for i in range(D // 2)])


@exercise("yarn_ramp", keeps=["yarn_ramp"])
def check_yarn_ramp(yarn_ramp):
    given = "head_dim 64, theta 10,000, trained with 4,096 positions"
    got, wanted = yarn_ramp(64, 1e4, 4096), ramp_of(64, 1e4, 4096)
    shaped(got, (32,), given, torch.float32, "there is one share for each pair: (D/2,)")
    if got.min() < 0 or got.max() > 1:
        fail("a share is from 0 to 1: cut off what lies outside", given, "0 to 1", f"{got.min():.3g} to {got.max():.3g}")
    turns = 4096 * 1e4 ** (-2 * torch.arange(32) / 64) / (2 * math.pi)
    equal(got, wanted, given, "the ramp does not stand between the pairs that turn 32 times and once", {
        "the ramp runs the wrong way: fast pairs are kept, with a share of 0": 1 - wanted,
        "the borders are not rounded: floor for the fast one, ceil for the slow one": _unrounded(64, 1e4, 4096),
        "2 pi is missing: a turn is 2 pi radians": ramp_of(64, 1e4, round(4096 * 2 * math.pi)),
        "the share grows with the pair, not with its turns": ((32 - turns) / 31).clamp(0, 1),
    })  # fmt: skip
    more = {"beta_fast": 16, "beta_slow": 2}
    for D, theta, trained, options in ((32, 100.0, 24, {}), (128, 1e6, 32768, {}), (64, 1e4, 4096, more), (8, 1e4, 4, {}), (8, 10.0, 942, {}),
                                       (8, 10.0, 15_078, {})):
        given = f"yarn_ramp({D}, {theta:g}, {trained}, {options})"
        equal(yarn_ramp(D, theta, trained, **options), ramp_of(D, theta, trained, *options.values()), given,
              "right for the first case, and not here; the borders lie between 0 and D - 1, and must not be equal", tolerance=1e-6)  # fmt: skip


def _unrounded(D, theta, trained):
    low, high = (D * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1))
    return ((torch.arange(D // 2) - low) / (high - low)).clamp(0, 1)


@exercise("rope_frequencies", after=["yarn_ramp"], keeps=["rope_frequencies"])
def check_rope_frequencies(rope_frequencies):
    plain, given = speeds_of(8, 1e4), "rope_frequencies(8, 10_000)"
    result = rope_frequencies(8, 1e4)
    if not (isinstance(result, tuple) and len(result) == 2):
        fail("it returns two things: the speeds, and the factor on cos and sin", given, got=type(result).__name__)
    speeds, factor = result
    shaped(speeds, (4,), given, torch.float32, "there is one speed for each pair: (D/2,)")
    equal(speeds, plain, given, "the speeds are not base to the power -2 i / D", {
        "the sign of the exponent is wrong: later pairs are slower": 1 / plain,
        "the exponent is -i / D; it must be -2 i / D": torch.tensor([1e4 ** (-i / 8) for i in range(4)]),
        "the exponent is divided by D/2 twice": torch.tensor([1e4 ** (-4 * i / 8) for i in range(4)]),
    })  # fmt: skip
    if factor != 1:
        fail("without scaling, the factor on cos and sin is 1", given, 1.0, factor)
    speeds, factor = rope_frequencies(8, 1e4, {"rope_type": "linear", "factor": 4.0})
    if factor != 1:
        fail("linear scaling leaves cos and sin as they are: the factor on them is 1", "linear scaling by 4", 1.0, factor)
    equal(speeds, plain / 4, "linear scaling by 4", "linear scaling divides every speed by the factor", {
        "linear scaling has no effect": plain, "the speeds are multiplied: the text would be shortened, not stretched": plain * 4,
        "the base is scaled instead of the speeds": speeds_of(8, 4e4),
    })  # fmt: skip
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    equal(rope_frequencies(8, 1e4, dynamic, 100, 50)[0], plain, "dynamic scaling, trained with 100 positions, 50 now",
          "up to the trained length dynamic scaling changes nothing")  # fmt: skip
    equal(rope_frequencies(8, 1e4, dynamic, 100)[0], plain, "dynamic scaling, trained with 100 positions, no seq_len",
          "without seq_len the length now is the trained length, and dynamic scaling changes nothing")  # fmt: skip
    raised = 1e4 * (2.0 * 300 / 100 - 1) ** (8 / 6)
    equal(rope_frequencies(8, 1e4, dynamic, 100, 300)[0], speeds_of(8, raised), "dynamic scaling by 2, trained with 100 positions, 300 now",
          "the base must be raised by (factor * length / trained - (factor - 1)) to the power D / (D - 2)", {
        "dynamic scaling has no effect": plain,
        "the exponent D / (D - 2) is missing": speeds_of(8, 1e4 * 5.0),
        "the factor is not used": speeds_of(8, 1e4 * 3.0 ** (8 / 6)),
    })  # fmt: skip
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    speeds, factor = rope_frequencies(64, 1e4, yarn)
    ramp, plain = ramp_of(64, 1e4, 4096), speeds_of(64, 1e4)
    given = "YaRN by 4, trained with 4,096 positions"
    equal(speeds, plain * (1 - ramp) + plain / 4 * ramp, given, "blend the plain and the slowed speed by the ramp", {
        "the blend runs the wrong way: where the ramp is 1, the speed is divided": plain * ramp + plain / 4 * (1 - ramp),
        "this is linear scaling": plain / 4, "YaRN has no effect": plain,
    }, tolerance=1e-6)  # fmt: skip
    if abs(factor - (0.1 * math.log(4) + 1)) > 1e-6:
        fail("YaRN's factor on cos and sin is 0.1 ln(factor) + 1", "YaRN by 4", round(0.1 * math.log(4) + 1, 4), factor)
    if rope_frequencies(64, 1e4, {**yarn, "attention_factor": 1.25})[1] != 1.25:
        fail("an attention_factor that is given counts", "YaRN with attention_factor 1.25", 1.25)
    tripled = {"rope_type": "dynamic", "factor": 3.0}
    raised = speeds_of(8, 1e4 * 7.0 ** (8 / 6))
    equal(rope_frequencies(8, 1e4, tripled, 100, 300)[0], raised, "dynamic scaling by 3, trained with 100 positions, 300 now",
          "right for a factor of 2, and not here: (factor * length / trained - (factor - 1))")  # fmt: skip
    doubled, ramp = rope_frequencies(64, 1e4, {"rope_type": "yarn", "factor": 2.0}, 8192), ramp_of(64, 1e4, 8192)
    equal(doubled[0], plain * (1 - ramp) + plain / 2 * ramp, "YaRN by 2, with max_position_embeddings = 8,192 and no other length",
          "without original_max_position_embeddings, the trained length is max_position_embeddings", tolerance=1e-6)  # fmt: skip
    if abs(doubled[1] - (0.1 * math.log(2) + 1)) > 1e-6:
        fail("YaRN's factor on cos and sin is 0.1 ln(factor) + 1", "YaRN by 2", round(0.1 * math.log(2) + 1, 4), doubled[1])
    unknown, short = {"rope_type": "longer", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}
    for what, options in (("an unknown kind", unknown), ("yarn without a length", short), ("dynamic without a length", dynamic)):
        try:
            rope_frequencies(8, 1e4, options)
        except ValueError:
            continue
        except Exception as error:
            fail(f"{what} must raise ValueError", options, "ValueError", type(error).__name__)
        fail(f"{what} must raise ValueError, and here it passes in silence", options)


# -- beyond


@exercise("smallest_base")
def check_smallest_base(smallest_base):
    wanted = (8000 / math.pi) ** (64 / 62)
    given = "64 channels; the slowest pair, number 31, at most half a turn in 8,000 positions"
    if not isinstance(smallest_base, int | float):
        fail("write a number", given, got=smallest_base)
    words = "solve 8,000 * base^(-62/64) = pi for the base"
    mistakes = {
        "half a turn is pi radians, and here it is a whole one": (8000 / (2 * math.pi)) ** (64 / 62),
        "the slowest pair is number 31, with the exponent -62/64, not -1": 8000 / math.pi,
        "this is the number of positions": 8000.0,
        "half a turn is pi radians, not 180": (8000 / 180) ** (64 / 62),
    }
    for mistake, value in mistakes.items():
        if abs(smallest_base / value - 1) < 0.01:
            words = mistake
    if abs(smallest_base / wanted - 1) > 0.02:
        fail(words, given, got=smallest_base)


@exercise("scores_of_new", after=["rope_cos_sin", "apply_rope"])
def check_scores_of_new(scores_of_new):
    D = 8
    speeds, q, k = speeds_of(D), torch.randn(1, 2, 2, D), torch.randn(1, 2, 6, D)
    given = "two new queries at positions 4 and 5, six keys"
    got = scores_of_new(q, k, speeds)
    shaped(got, (1, 2, 2, 6), given)
    here, all_places = torch.arange(4, 6), torch.arange(6)

    def scores(places, sign=1):
        return tuple(turned(q, places, speeds, pairs) @ turned(k, all_places, speeds, pairs, sign).mT for pairs in ("halves", "neighbours"))

    if close(got, scores(here)[1]):
        return "in the interleaved layout"
    restart = torch.arange(2)
    equal(got, scores(here)[0], given, "these are not the scores of turned queries and keys", {
        "both bugs are still there": scores(restart, -1),
        "one bug is left: the positions of the queries begin at 0 again; they are the last ones": scores(restart),
        "one bug is left: move everything by 10 positions, and the scores change. Do both turn the same way?": scores(here, -1),
    })  # fmt: skip


@exercise("partial_rope", after=["apply_rope"])
def check_partial_rope(partial_rope):
    x, places, speeds = torch.randn(2, 3, 5, 12), torch.arange(5), speeds_of(4)
    before = x.clone()
    got = partial_rope(x, *table(places, speeds))
    given = "random x (2, 3, 5, 12), cos and sin (5, 4)"
    shaped(got, x.shape, given, hint="what is not turned must still be there")
    unchanged("x", before, x)
    wanted = {pairs: torch.cat((turned(x[..., :4], places, speeds, pairs), x[..., 4:]), -1) for pairs in ("halves", "neighbours")}
    if not close(got, wanted["neighbours"]):
        last = torch.cat((x[..., :-4], turned(x[..., -4:], places, speeds)), -1)
        swapped = torch.cat((x[..., 4:], turned(x[..., :4], places, speeds)), -1)
        zeros = torch.cat((turned(x[..., :4], places, speeds), torch.zeros_like(x[..., 4:])), -1)
        equal(got, wanted["halves"], given, "the first 4 channels of each head are turned, the other 8 stay", {
            "the last channels are turned; it must be the first": last,
            "the turned channels stand behind the others": swapped,
            "the channels that are not turned are lost": zeros,
            "nothing is turned": x,
        })  # fmt: skip
    full = torch.randn(1, 1, 5, 4)
    both = [turned(full, places, speeds, pairs) for pairs in wanted]
    if not any(close(partial_rope(full, *table(places, speeds)), each) for each in both):
        fail("where cos and sin are as wide as x, every channel is turned", "x (1, 1, 5, 4), cos and sin (5, 4)")


def first_below(base: float, level: float = 0.5) -> int:
    """The first distance at which two equal vectors agree less than `level`."""
    distances = torch.arange(0, 100_000).double()
    agreement = (distances[:, None] * speeds_of(64, base).double()).cos().mean(1)
    return int((agreement < level).nonzero()[0])


@exercise("agreement")
def check_agreement(predicted_longer, agrees_until, measured):
    for base in (100.0, 1e4, 1e6):
        got, wanted = agrees_until(base), first_below(base)
        if not isinstance(got, int) or isinstance(got, bool):
            fail("return the distance as a whole number", f"agrees_until({base:g})", wanted, repr(got))
        if got != wanted:
            words = "this is not the first distance at which the mean of the cosines is below 0.5"
            if got == wanted - 1:
                words = "this is the last distance where they still agree; the first where they do not was asked for"
            fail(words, f"agrees_until({base:g}), 32 pairs", wanted, got)
    right = {base: first_below(base) for base in (100, 10_000, 1_000_000)}
    if measured != right:
        fail("`measured` is a dict with the distance for the bases 100, 10_000 and 1_000_000", expected=sorted(right), got=measured)
    if predicted_longer not in ("twice", "four times", "a hundred times"):
        fail('predicted_longer is "twice", "four times" or "a hundred times"', got=predicted_longer)
    if predicted_longer != "four times":
        fail("your measurement disagrees with your prediction: look at it, and correct the prediction", got=predicted_longer)
