"""Checks of workbook 10. What is trusted are plain loops over one row, and the shares of many draws; nothing comes from minimind.generate."""

import math

import torch

from course.checks.core import close, equal, exercise, fail, shaped, unchanged

MODULE = "generate"
DRAWS = 4000
FOUR = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
GIVEN = "probabilities 0.5, 0.25, 0.15, 0.1"


def cut(logits: torch.Tensor, stays) -> torch.Tensor:
    """Minus infinity where `stays(row)`, a list of token numbers for each row, does not name a token."""
    result = torch.full_like(logits, -math.inf)
    for new, row in zip(result, logits, strict=True):
        for token in stays(row):
            new[token] = row[token]
    return result


def best_first(row: torch.Tensor) -> list[int]:
    return sorted(range(len(row)), key=lambda token: -float(row[token]))


def reaching(order: list[int], row: torch.Tensor, mass: float, below: bool = False, more: bool = False) -> list[int]:
    """The first tokens of an order until their probabilities reach `mass`. `below`: without the one that reaches it; `more`: one too many."""
    shares, total, kept = row.double().softmax(-1).tolist(), 0.0, []
    for token in order:
        if total >= mass - 1e-9:
            return kept[:-1] if below else kept + [token] * more
        kept.append(token)
        total += shares[token]
    return kept


def top_k(k: int):
    return lambda row: [token for token in range(len(row)) if row[token] >= row[best_first(row)[min(k, len(row)) - 1]]]


def top_p(p: float, **wrong):
    return lambda row: reaching(best_first(row), row, p, **wrong)


def min_p(p: float):
    def stays(row):
        shares = row.double().softmax(-1)
        return [token for token in range(len(row)) if shares[token] >= p * shares.max() - 1e-9]

    return stays


def surprise(row: torch.Tensor) -> tuple[list[float], float]:
    """-ln p of each token, and the entropy."""
    shares = row.double().softmax(-1).tolist()
    return [-math.log(share) if share else math.inf for share in shares], -sum(share * math.log(share) for share in shares if share)


def typical(mass: float, distance=lambda s, h: abs(s - h), **wrong):
    """Tokens in order of their distance from the entropy, until they reach `mass`."""
    def stays(row):
        surprises, entropy = surprise(row)
        return reaching(sorted(range(len(row)), key=lambda token: distance(surprises[token], entropy)), row, mass, **wrong)

    return stays


def a_filter(name: str, function, logits: torch.Tensor, value: float, stays, given: str, mistake: str, likely: dict | None = None) -> None:
    """A function that takes logits and a number, and cuts some tokens off."""
    before, logits, expected = logits, logits.clone(), cut(logits, stays)
    likely = {words: (wrong if isinstance(wrong, torch.Tensor | tuple) else cut(before, wrong)) for words, wrong in (likely or {}).items()}
    given = f"{given}; {name}(logits, {value})"
    got = function(logits, value)
    shaped(got, logits.shape, given, logits.dtype, "a filter returns logits of the same shape (B, V)")
    unchanged("logits", before, logits)
    shares = before.softmax(-1)
    common = {
        "the wrong tokens are cut: what was asked to stay has gone, and the others have stayed": torch.where(expected.isfinite(), -math.inf, before),
        "the right tokens are cut, with 0 in place of minus infinity; e to the power 0 is 1, so they can still be drawn":
            torch.where(expected.isfinite(), before, 0.0),
        "these are probabilities; return logits, so that the next filter can go on": torch.where(expected.isfinite(), shares, 0.0),
        "these are probabilities; return the logits that stay as they were": torch.where(expected.isfinite(), shares, -math.inf),
        "nothing is cut": before,
    }  # fmt: skip
    equal(got, expected, given, mistake, likely | common)


def random_logits(B: int = 3, V: int = 30) -> torch.Tensor:
    return 2 * torch.randn(B, V)


# -- rebuild


@exercise("cutting", keeps=["keep_top_k", "keep_min_p"])
def check_cutting(keep_top_k, keep_min_p):
    largest = "the k largest logits of each row stay, and no other"
    a_filter("keep_top_k", keep_top_k, FOUR, 2, top_k(2), GIVEN, largest, {
        "one token too few stays: the k-th best is the threshold, and it stays itself": top_k(1),
        "one token too many stays": top_k(3),
    })  # fmt: skip
    ties = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    a_filter("keep_top_k", keep_top_k, ties, 2, top_k(2), "logits 1, 2, 1, 0", "tokens 0 and 2 are equally good: both stay", {
        "tokens 0 and 2 are equally good, and only one of them stays; compare with the threshold instead of taking k places":
            (cut(ties, lambda row: [0, 1]), cut(ties, lambda row: [1, 2])),
        "what is as good as the last of the k best must stay": lambda row: [1],
    })  # fmt: skip
    a_filter("keep_top_k", keep_top_k, FOUR, 9, top_k(4), GIVEN, "where k is larger than the vocabulary, all tokens stay")
    two = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 5.0, 9.0, 7.0]])
    a_filter("keep_top_k", keep_top_k, two, 2, top_k(2), "two rows of logits, [3, 2, 1, 0] and [0, 5, 9, 7]", largest, {
        "the threshold of one row is used for all; each row has its own": cut(two, lambda row: [t for t in range(4) if row[t] >= 2]),
    })  # fmt: skip
    a_filter("keep_min_p", keep_min_p, FOUR, 0.25, min_p(0.25), GIVEN, "a token stays when its probability is at least p times the best one's", {
        "the probabilities are compared with p itself; compare with p times the best": lambda row: [0, 1],
        "the logits are compared; compare probabilities": FOUR.masked_fill(FOUR.amax(-1, keepdim=True) * 0.25 > FOUR, -math.inf),
    })  # fmt: skip
    same = torch.zeros(1, 3)
    a_filter("keep_min_p", keep_min_p, same, 1.0, min_p(1.0), "three equal logits", "what has exactly p times the best probability stays", {
        "what has exactly p times the best probability must stay": lambda row: [],
    })  # fmt: skip
    unlike = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
    a_filter("keep_min_p", keep_min_p, unlike, 0.5, min_p(0.5), "two rows of logits, [4, 0, 0] and [0, 0.1, 0]",
             "each row is compared with the best of its own", {
        "the best of all rows is used; each row has its own": cut(unlike, lambda row: [0] if row[0] == 4 else []),
    })  # fmt: skip
    logits = random_logits()
    for k in (1, 7, 30):
        a_filter("keep_top_k", keep_top_k, logits, k, top_k(k), "random logits (3, 30)", "right for four tokens, and not here")
    for p in (0.02, 0.1, 0.6):
        a_filter("keep_min_p", keep_min_p, logits, p, min_p(p), "random logits (3, 30)", "right for four tokens, and not here")


@exercise("keep_top_p", keeps=["keep_top_p"])
def check_keep_top_p(keep_top_p):
    mistake = "the fewest tokens stay that have p together: the best, the second, and so on until the sum is reached"
    spread = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    a_filter("keep_top_p", keep_top_p, spread, 0.5, top_p(0.5), "probabilities 0.4, 0.3, 0.2, 0.1", mistake, {
        "the tokens are added from the least probable on; begin with the best": lambda row: [3, 2, 1],
        "one token too few stays: 0.4 is not 0.5 yet, so the one that reaches p is needed": top_p(0.5, below=True),
        "one token too many stays: p is reached before the last one": top_p(0.5, more=True),
        "a token stays when its own probability is at least p; it is the sum that counts": lambda row: [],
    })  # fmt: skip
    a_filter("keep_top_p", keep_top_p, FOUR, 0.8, top_p(0.8), GIVEN, mistake, {
        "one token too few stays: 0.5 + 0.25 is not 0.8 yet, so the one that reaches p is needed": top_p(0.8, below=True),
        "one token too many stays: p is reached before the last one": top_p(0.8, more=True),
    })  # fmt: skip
    a_filter("keep_top_p", keep_top_p, FOUR, 0.3, top_p(0.3), GIVEN, "the best token always stays", {
        "nothing is left to draw from: the best token always stays": lambda row: [],
        "one token too many stays: the first alone reaches p": top_p(0.3, more=True),
    })  # fmt: skip
    shuffled = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.1, 0.5, 0.15]]).log()
    a_filter("keep_top_p", keep_top_p, shuffled, 0.8, top_p(0.8), "two rows, 0.1, 0.5, 0.15, 0.25 and 0.25, 0.1, 0.5, 0.15", mistake, {
        "the decisions stand in sorted order: carry each back to its own token": lambda row: [0, 1, 2],
        "the order of the sorting is used the wrong way round: it says which token has a rank, not which rank a token has":
            lambda row: [best_first(row).index(rank) for rank in range(3)],
        "the sum runs over the tokens as they stand in the vocabulary; sort them first":
            lambda row: reaching(list(range(4)), row, 0.8),
        "one token too few stays: the one that reaches p is needed": top_p(0.8, below=True),
    })  # fmt: skip
    four = torch.zeros(1, 4)
    given = "four tokens of probability 0.25; keep_top_p(logits, 0.5)"
    if (count := int(keep_top_p(four, 0.5).isfinite().sum())) != 2:
        words = "two of them have 0.5 together, and that is at least p" if count == 3 else "the fewest tokens that have p together stay, ties or not"
        fail(words, given, "2 tokens stay", f"{count} tokens")
    logits = random_logits()
    for p in (0.05, 0.5, 0.9, 0.99):
        a_filter("keep_top_p", keep_top_p, logits, p, top_p(p), "random logits (3, 30)", f"right for four tokens, and not here; {mistake}")
    again = cut(logits, top_k(6))
    a_filter("keep_top_p", keep_top_p, again, 0.9, top_p(0.9), "logits of which all but six are minus infinity", "what was cut before stays cut")


@exercise("penalise_repetition", keeps=["penalise_repetition"])
def check_penalise_repetition(penalise_repetition):
    logits, previous, penalty = torch.tensor([[3.0, -3.0, 1.0]]), torch.tensor([[0, 1]]), 1.5
    given = "logits 3, -3, 1; previous 0, 1; penalty 1.5"
    before = logits.clone()
    got = penalise_repetition(logits, previous, penalty)
    shaped(got, (1, 3), given, torch.float32)
    unchanged("logits", before, logits)
    equal(got, torch.tensor([[2.0, -4.5, 1.0]]), given, "a positive logit is divided by the penalty, a negative one is multiplied", {
        "a negative logit is divided, so the token becomes more likely: multiply it": torch.tensor([[2.0, -2.0, 1.0]]),
        "multiplied and divided are swapped: both tokens become more likely": torch.tensor([[4.5, -2.0, 1.0]]),
        "a positive logit is multiplied, so the token becomes more likely: divide it": torch.tensor([[4.5, -4.5, 1.0]]),
        "all tokens are penalised, also those that were not seen": torch.tensor([[2.0, -4.5, 2 / 3]]),
        "the tokens that were not seen are penalised": torch.tensor([[3.0, -3.0, 2 / 3]]),
        "the penalty is subtracted": torch.tensor([[1.5, -4.5, 1.0]]),
        "nothing is penalised": before,
    })  # fmt: skip
    twice = penalise_repetition(logits, torch.tensor([[0, 0, 0]]), 1.5)
    equal(twice, torch.tensor([[2.0, -3.0, 1.0]]), "logits 3, -3, 1; previous 0, 0, 0; penalty 1.5", "token 0 is penalised once", {
        "token 0 stands there three times and is penalised three times; once is enough": torch.tensor([[3 / 1.5**3, -3.0, 1.0]]),
    })  # fmt: skip
    small = torch.tensor([[-0.75, -0.25, 0.25, 0.75]])
    equal(penalise_repetition(small, torch.tensor([[0, 1, 2, 3]]), 2.0), torch.tensor([[-1.5, -0.5, 0.125, 0.375]]),
          "logits -0.75, -0.25, 0.25, 0.75; all were seen; penalty 2", "the border between divided and multiplied is 0")  # fmt: skip
    logits, previous = torch.randn(3, 12), torch.randint(0, 12, (3, 5))
    wanted = logits.clone()
    for row, seen in zip(wanted, previous.tolist(), strict=True):
        for token in set(seen):
            row[token] = row[token] / 1.3 if row[token] > 0 else row[token] * 1.3
    all_rows = logits.clone()
    for token in set(previous.flatten().tolist()):
        all_rows[:, token] = torch.where(logits[:, token] > 0, logits[:, token] / 1.3, logits[:, token] * 1.3)
    equal(penalise_repetition(logits, previous, 1.3), wanted, "random (3, 12), previous (3, 5), penalty 1.3", "right for one row, and not here", {
        "what stands in one row is penalised in all of them; each row has its own text": all_rows,
    })  # fmt: skip


def chances(logits: torch.Tensor, *rules) -> torch.Tensor:
    """Probabilities after some filters, one after the other."""
    for rule in rules:
        logits = cut(logits, rule)
    return logits.softmax(-1)


def drawn(sample_next, logits: torch.Tensor, expected: torch.Tensor, given: str, mistake: str, likely: dict | None = None, **options) -> None:
    """Draw often from one row and count; five standard errors are allowed."""
    shape = (DRAWS, logits.shape[-1])
    rows = logits.expand(*shape).contiguous()
    got = sample_next(rows, generator=torch.Generator().manual_seed(7), **options)
    shaped(got, (DRAWS,), given, torch.int64, "one token for each row: (B,)")
    share = got.bincount(minlength=shape[1]) / DRAWS

    def fits(wanted):
        room = 5 * (wanted * (1 - wanted) / DRAWS).sqrt() + 1e-6
        return bool(((share - wanted).abs() <= room).all())

    if not fits(expected[0]):
        words = next((words for words, wrong in (likely or {}).items() if fits(wrong[0])), mistake)
        if (share == 1).any() and not (expected == 1).any():
            words = "it always takes the same token; draw with the probabilities"
        fail(words, f"{given}, {DRAWS} draws", f"shares {rounded(expected[0])}", f"shares {rounded(share)}")


def rounded(shares: torch.Tensor) -> str:
    return ", ".join(f"{share:.2f}" for share in shares.tolist())


@exercise("sample_next", after=["cutting", "keep_top_p", "penalise_repetition"], keeps=["sample_next"])
def check_sample_next(sample_next):
    logits = torch.tensor([[1.0, 3.0, 2.9], [0.2, 0.1, 0.0]])
    got = sample_next(logits)
    given = "logits [1, 3, 2.9] and [0.2, 0.1, 0], temperature 0"
    shaped(got, (2,), given, torch.int64, "one token for each row: (B,)")
    equal(sample_next(logits.repeat(50, 1)), torch.tensor([1, 0] * 50), f"{given}, 50 times", "temperature 0, the default, takes the best token")
    _one_at_a_time(sample_next)
    _in_order(sample_next)
    _with_penalty(sample_next)
    rows = torch.tensor([[0.0, 60.0, 0.0], [60.0, 0.0, 0.0]])
    equal(sample_next(rows, 1.0), torch.tensor([1, 0]), "two rows, each with one token that is almost certain", "each row has its own distribution")
    wide = torch.zeros(1, 10_000)

    def draw(seed, noise):
        torch.manual_seed(noise)
        return sample_next(wide.repeat(4, 1), 1.0, generator=torch.Generator().manual_seed(seed)).tolist()

    if draw(1, 1) != draw(1, 2):
        fail("two generators with the same seed give different tokens: the generator is not used", "temperature 1, generator with seed 1, twice")
    if draw(1, 1) == draw(2, 1):
        fail("two generators with different seeds give the same tokens", "temperature 1, generators with seeds 1 and 2")
    if len(set(draw(3, 3))) == 1:
        fail("all rows get the same token: draw for each row", "four equal rows over 10,000 tokens", got=draw(3, 3))


def _one_at_a_time(sample_next) -> None:
    z = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    given = "probabilities 0.4, 0.3, 0.2, 0.1"
    plain = z.softmax(-1)
    drawn(sample_next, z, plain, f"{given}, temperature 1", "the tokens are not drawn with their probabilities", {
        "every token is drawn equally often: draw from the softmax of the logits": torch.full((1, 4), 0.25),
    }, temperature=1.0)  # fmt: skip
    drawn(sample_next, z, (z / 2).softmax(-1), f"{given}, temperature 2", "temperature divides the logits, before the softmax", {
        "temperature has no effect": plain,
        "the logits are multiplied by the temperature; divide": (z * 2).softmax(-1),
    }, temperature=2.0)  # fmt: skip
    for name, value, rule in (("top_k", 2, top_k(2)), ("top_p", 0.6, top_p(0.6)), ("min_p", 0.4, min_p(0.4))):
        drawn(sample_next, z, chances(z, rule), f"{given}, {name} {value}", f"{name} does not cut where it should", {
            f"{name} has no effect": plain,
        }, temperature=1.0, **{name: value})  # fmt: skip


def _in_order(sample_next) -> None:
    z = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    given = "probabilities 0.4, 0.3, 0.2, 0.1"
    cool, order = z / 0.5, "the order is penalty, temperature, top-k, top-p, min-p"
    drawn(sample_next, z, chances(cool, top_p(0.8)), f"{given}, temperature 0.5, top_p 0.8", order, {
        f"top-p cuts before the temperature is applied; {order}": (cut(z, top_p(0.8)) / 0.5).softmax(-1),
    }, temperature=0.5, top_p=0.8)  # fmt: skip
    drawn(sample_next, z, chances(cool, min_p(0.5)), f"{given}, temperature 0.5, min_p 0.5", order, {
        f"min-p cuts before the temperature is applied; {order}": (cut(z, min_p(0.5)) / 0.5).softmax(-1),
    }, temperature=0.5, min_p=0.5)  # fmt: skip
    drawn(sample_next, z, chances(z, top_k(2), top_p(0.55)), f"{given}, top_k 2, top_p 0.55", order, {
        f"top-p cuts before top-k; {order}": chances(z, top_p(0.55), top_k(2)),
    }, temperature=1.0, top_k=2, top_p=0.55)  # fmt: skip
    drawn(sample_next, z, chances(z, top_p(0.75), min_p(0.45)), f"{given}, top_p 0.75, min_p 0.45", order, {
        f"min-p cuts before top-p; {order}": chances(z, min_p(0.45), top_p(0.75)),
    }, temperature=1.0, top_p=0.75, min_p=0.45)  # fmt: skip


def _with_penalty(sample_next) -> None:
    z, seen = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0]])
    given = "logits 3, 2, 1; previous 0"
    got = sample_next(z, repetition_penalty=4.0, previous=seen)
    equal(got, torch.tensor([1]), f"{given}, repetition_penalty 4, temperature 0", "token 0 falls to 3/4, so token 1 is the most probable now", {
        "the penalty has no effect at temperature 0; it comes before the choice": torch.tensor([0]),
    })  # fmt: skip
    equal(sample_next(z, previous=seen), torch.tensor([0]), f"{given}, no penalty, temperature 0", "without a penalty, previous has no effect")
    equal(sample_next(z, repetition_penalty=4.0), torch.tensor([0]), "logits 3, 2, 1; repetition_penalty 4, previous None",
          "without previous there is nothing to penalise")  # fmt: skip
    after, rows = torch.tensor([[0.75, 2.0, 1.0]]), seen.expand(DRAWS, 1)
    drawn(sample_next, z, after.softmax(-1), f"{given}, repetition_penalty 4", "the penalty changes the logits before the draw", {
        "the penalty has no effect on draws": z.softmax(-1),
    }, temperature=1.0, repetition_penalty=4.0, previous=rows)  # fmt: skip
    drawn(sample_next, z, chances(after, top_k(2)), f"{given}, repetition_penalty 4, top_k 2", "the penalty comes first, before anything is cut", {
        "the penalty comes after top-k; it must come first": torch.tensor([[0.75, 2.0, -math.inf]]).softmax(-1),
    }, temperature=1.0, top_k=2, repetition_penalty=4.0, previous=rows)  # fmt: skip


def small_config(**changes):
    from minimind.model import ModelConfig

    sizes = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
                 max_position_embeddings=32, initializer_range=0.3, tie_word_embeddings=False)  # fmt: skip
    return ModelConfig.preset("tiny", **(sizes | changes))


@exercise("KVCache", keeps=["KVCache"])
def check_kv_cache(KVCache):
    config, made = small_config(num_hidden_layers=3), "KVCache(config, batch_size=2, max_length=5): 3 layers, 2 key/value heads of width 8"
    cache = KVCache(config, 2, 5)
    for name in ("keys", "values"):
        memory = getattr(cache, name)
        if not isinstance(memory, list | tuple) or len(memory) != 3:
            fail(f"`{name}` is a list with one tensor for each layer, made at the start", made, "3 tensors", got=type(memory).__name__)
        shaped(memory[0], (2, 2, 5, 8), f"{made}; {name}[0]", torch.float32, "the memory of a layer is (B, K, max_length, D), set aside at the start")
    empty = cache.length
    if empty != 0:
        fail("a new cache holds nothing", f"{made}; length", 0, empty)
    k, v = (torch.randn(3, 2, 2, 5, 8) for _ in range(2))  # for each layer
    _fills(cache, k, v, made)
    for layer in (2, 0):
        _full(cache, k, v, layer)
    for name, asked in (("dtype", torch.float64), ("device", "meta")):
        other = KVCache(config, 1, 4, **{name: asked})
        for part in ("keys", "values"):
            memory = getattr(other, part)[1]
            if asked not in (memory.dtype, memory.device.type):
                fail(f"{name} is not used for the memory", f"KVCache(config, 1, 4, {name}={asked}); {part}", asked, getattr(memory, name))


def _fills(cache, k: torch.Tensor, v: torch.Tensor, made: str) -> None:
    filled = [0, 0, 0]
    for layer, T in ((0, 2), (1, 2), (0, 1), (2, 2), (1, 1), (2, 1), (0, 2), (1, 2)):
        start, end = filled[layer], filled[layer] + T
        given = f"layer {layer} holds {start} positions and gets {T} more"
        result = cache.update(k[layer, :, :, start:end], v[layer, :, :, start:end], layer)
        if not (isinstance(result, tuple | list) and len(result) == 2):
            fail("update returns two tensors, all keys and all values so far", given, got=type(result).__name__)
        filled[layer] = end
        for name, got, whole in zip(("keys", "values"), result, (k, v), strict=True):
            wanted, right = whole[layer, :, :, :end], f"{given}; the {name}"
            hint = "update returns all positions so far: (B, K, S, D)"
            if isinstance(got, torch.Tensor) and got.shape[2:3] == (5,) and end < 5:
                hint = "it returns the whole memory, also positions that nobody has written yet"
            elif isinstance(got, torch.Tensor) and got.shape[2:3] == (T,) and end > T:
                hint = "it returns the new positions alone; attention needs all so far"
            elif isinstance(got, torch.Tensor) and got.shape[2] > end:
                hint = "all layers share one count; each layer fills at its own pace"
            shaped(got, wanted.shape, right, wanted.dtype, hint)
            other = v if whole is k else k
            if not close(got, wanted) and close(got[:, :, start:], wanted[:, :, start:]):
                fail("the new positions are right, the ones before are not: does another layer write to the same memory?", right)
            equal(got, wanted, right, "these are not the positions that this layer was given, in their order", {
                "keys and values are swapped": other[layer, :, :, :end],
                "the newest positions stand in front": torch.cat((wanted[:, :, start:], wanted[:, :, :start]), dim=2),
            })  # fmt: skip
        if layer and cache.length != min(filled):
            words = "length is the number of positions that every layer holds"
            if cache.length == max(filled):
                words += "; a layer further up does not have the newest ones yet"
            fail(words, f"the layers hold {filled}", min(filled), cache.length)
    for name, whole in (("keys", k), ("values", v)):
        equal(getattr(cache, name)[0], whole[0], f"{made}; {name}[0] after 5 positions", "the memory of a layer holds what it was given")


def _full(cache, k: torch.Tensor, v: torch.Tensor, layer: int) -> None:
    """Layer 0 has 5 of 5 positions, layer 2 has 3 of 5."""
    held, T = (5, 1) if layer == 0 else (3, 3)
    given = f"room for 5 positions, {held} are held, and {T} more come"
    new = torch.zeros(2, 2, T, 8)
    try:
        cache.update(new, new, layer)
    except ValueError:
        pass
    except Exception as error:
        fail("where the memory is full, raise ValueError in words of your own", given, "ValueError", f"{type(error).__name__}: {error}"[:200])
    else:
        fail("where the memory is full, it must raise ValueError", given, "ValueError", "no error")
    if layer == 2:
        try:
            got, _ = cache.update(k[2, :, :, 3:], v[2, :, :, 3:], 2)
        except ValueError:
            fail("after a refused update the count has moved on; count only what was written", f"{given}, and then 2", "5 positions", "ValueError")
        equal(got, k[2], f"{given}, and then the last 2", "a refused update must write nothing")


# -- the loop


def random_model(**changes):
    from minimind.model import MiniMind

    torch.manual_seed(3)
    return MiniMind(small_config(**changes)).eval()


def scripted(always: list[float] | None = None):
    """A model whose weights say the token's number plus one, or always these logits; and the log of what it was asked.

    It is a real model, so that an answer in another process can run it there: every layer adds nothing, and the last product is a table.
    """
    model, log = random_model(num_hidden_layers=1, hidden_size=64), []
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.dim() == 2:
                weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(torch.eye(40, 64))
        head.zero_()
        for token in range(40):
            head[(token + 1) % 40, token] = 1.0
        if always:
            embedding.copy_(torch.eye(1, 64).expand(40, -1))
            head.copy_(torch.tensor(always)[:, None] / 8 * torch.eye(1, 64))  # the norm makes 8 of a single 1 among 64 numbers

    def seen(_, args, named):
        ids = args[0] if args else named["input_ids"]
        log.append((ids.shape[1], named.get("kv_cache") is not None, named.get("attention_mask"), named.get("position_ids")))

    model.register_forward_pre_hook(seen, with_kwargs=True)
    return model, log


@torch.no_grad()
def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The plain loop: read everything again, take the best."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def collected(next_tokens, *args, given: str, **options) -> list[list[int]]:
    """All that it yields, one list for each row."""
    steps = list(next_tokens(*args, **options))
    for step in steps:
        shaped(step, args[1].shape[:1], given, torch.int64, "each step yields one token for each row: (B,)")
    return torch.stack(steps, dim=1).tolist() if steps else [[] for _ in args[1]]


@exercise("next_tokens", after=["sample_next", "KVCache"], keeps=["next_tokens"])
def check_next_tokens(next_tokens):
    _counts_on(next_tokens)
    _stops(next_tokens)
    _yields(next_tokens)
    _real(next_tokens)
    _padded(next_tokens)
    _draws(next_tokens)


def _counts_on(next_tokens) -> None:
    for use_cache in (True, False):
        model, log = scripted()
        ids = torch.tensor([[7, 3, 5], [1, 2, 20]])
        before = ids.clone()
        given = f"a model that says token + 1; prompts [7, 3, 5] and [1, 2, 20], 4 new tokens, use_cache={use_cache}"
        try:
            rows = collected(next_tokens, model, ids, 4, use_cache=use_cache, given=given)
        except ValueError as error:
            words = "with the cache, the model reads the prompt once and then one column a step; here it reads columns again, until the cache is full"
            if not use_cache and any(asked[1] for asked in log):
                words = "the cache is handed over only where use_cache is true"
            elif not log:
                words = "this request is fine, and it is refused"
            fail(words, given, got=f"ValueError: {error}"[:150])
        unchanged("input_ids", before, ids)
        if rows != [[6, 7, 8, 9], [21, 22, 23, 24]]:
            words = "these are not the tokens that the model says"
            if all(len(row) != 4 for row in rows):
                words = f"it yields {len(rows[0])} times; max_new_tokens is 4"
            elif rows[0][:3] == [5, 6, 7] or rows[0][0] == 5:
                words = "the prompt is handed out again; yield new tokens only"
            elif rows[0] == [6] * 4:
                words = "the chosen token is not read in the next step"
            elif rows[0][0] == 8:
                words = "the first row of logits is used; the next token belongs to the last one"
            fail(words, given, [[6, 7, 8, 9], [21, 22, 23, 24]], rows)
        widths = [asked[0] for asked in log]
        wanted = [3, 1, 1, 1] if use_cache else [3, 4, 5, 6]
        if any(cached != use_cache for _, cached, *_ in log):
            words = "no cache is handed to the model: kv_cache=cache" if use_cache else "the cache is handed over only where use_cache is true"
            fail(words, given)
        if widths != wanted:
            words = "with the cache, the model reads the prompt once and then one column a step" if use_cache else \
                "without the cache, the model must read all columns in each step"  # fmt: skip
            if len(widths) > 4:
                words = "the model is called once more than there are tokens to choose"
            fail(words, given, f"columns read: {wanted}", widths)
    if list(next_tokens(scripted()[0], torch.tensor([[1, 2]]), 0)):
        fail("with max_new_tokens = 0 there is nothing to yield", "max_new_tokens = 0")
    if (count := len(list(next_tokens(random_model(num_hidden_layers=1, max_position_embeddings=80), torch.tensor([[1]]))))) != 64:
        fail("max_new_tokens is 64 where it is not given", "no max_new_tokens", 64, count)


def _stops(next_tokens) -> None:
    ids = torch.tensor([[5], [1], [20]])
    for stop_ids, wanted in (((8, 3), [[6, 7, 8, 8, 8, 8], [2, 3, 8, 8, 8, 8], [21, 22, 23, 24, 25, 26]]),
                             ([8, 3, 22], [[6, 7, 8], [2, 3, 8], [21, 22, 8]]), ((21, 2, 6), [[6], [2], [21]])):  # fmt: skip
        model, log = scripted()
        given = f"a model that says token + 1; prompts [5], [1], [20]; stop_ids {list(stop_ids)}"
        rows = collected(next_tokens, model, ids, 6, stop_ids, given=given)
        if rows != wanted:
            words = "a row that has stopped goes on with the first of stop_ids, and the others as before"
            if len(rows[0]) > len(wanted[0]):
                words = "it goes on although all rows have stopped"
            elif len(rows[0]) < len(wanted[0]):
                words = "it ends before all rows have stopped, or before the last stop token was handed out"
            elif rows[0][3:] == [9, 10, 11]:
                words = "a row that has chosen a stop token goes on talking"
            elif rows[1][1] == 8:
                words = "a row that stops must hand out the stop token that it chose; only after that comes the first of stop_ids"
            elif rows[1][2:] == [3] * len(rows[1][2:]):
                words = "a stopped row goes on with the first of stop_ids, not with its own"
            fail(words, given, wanted, rows)
        if len(log) != len(wanted[0]):
            fail("the model is called again after all rows have stopped", given, f"{len(wanted[0])} calls", len(log))


def _yields(next_tokens) -> None:
    model, log = scripted()
    steps = iter(next_tokens(model, torch.tensor([[1, 2, 3]]), 6))
    next(steps)
    if len(log) > 1:
        fail("yield each token as soon as it is chosen; here the model has run on before the first one comes out",
             "the first of 6 tokens was taken", "1 call of the model", len(log))  # fmt: skip
    model, log = scripted()
    for prompt, count in ((torch.ones(1, 30, dtype=torch.long), 3), (torch.ones(1, 0, dtype=torch.long), 2)):
        given = f"a prompt of {prompt.shape[1]} tokens, {count} new ones, a model of 32 positions"
        try:
            list(next_tokens(model, prompt, count))
        except ValueError:
            pass
        except Exception as error:
            fail("call check_request before anything else", given, "ValueError", f"{type(error).__name__}: {error}"[:200])
        else:
            fail("this is not refused: call check_request first", given, "ValueError", "no error")
        if log:
            fail("the request must be checked before the model works", given)


def _real(next_tokens) -> None:
    model, prompt = random_model(), [3, 30, 12, 7]
    wanted = greedy(model, prompt, 12)
    for use_cache in (False, True):
        given = f"a small random model, a prompt of 4, 12 new tokens, use_cache={use_cache}"
        got = collected(next_tokens, model, torch.tensor([prompt]), 12, use_cache=use_cache, given=given)[0]
        if got != wanted:
            words = "not the tokens of a plain loop that takes the best of the last row"
            if use_cache and got[0] == wanted[0]:
                words = "with the cache other tokens come than without: is there one cache for all steps, and does each step read only what is new?"
            fail(words, given, wanted, got)
    double = random_model().double()
    try:
        got = collected(next_tokens, double, torch.tensor([prompt]), 3, given="the model in float64")[0]
    except RuntimeError as error:
        fail("the cache must have the type of the model's weights", "the model in float64", got=str(error)[:150])
    if got != greedy(double, prompt, 3):
        fail("the cache must have the type of the model's weights", "the model in float64", greedy(double, prompt, 3), got)


def _padded(next_tokens) -> None:
    model = random_model()
    prompts = [[9, 4], [3, 30, 12, 7, 7], [22, 6, 14]]
    alone = [greedy(model, prompt, 8) for prompt in prompts]
    ids = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    real = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    for use_cache in (True, False):
        given = f"three prompts of 2, 5 and 3 tokens, padded on the left, use_cache={use_cache}"
        rows = collected(next_tokens, model, ids, 8, use_cache=use_cache, attention_mask=real, given=given)
        if rows != alone:
            words = "padded rows get other tokens than each prompt alone"
            if rows[1] == alone[1]:
                words += "; the row without padding is right. Does the model get attention_mask and position_ids, for the columns that it reads?"
            fail(words, given, alone, rows)
    model, log = scripted()
    given = "prompts of 1 and 3 tokens, padded on the left, the second step with the cache"
    list(next_tokens(model, torch.tensor([[0, 0, 7], [5, 6, 7]]), 2, attention_mask=torch.tensor([[0, 0, 1], [1, 1, 1]])))
    *_, mask, places = log[1]
    if not isinstance(mask, torch.Tensor) or mask.tolist() != [[0, 0, 1, 1], [1, 1, 1, 1]]:
        fail("attention_mask must have all columns so far", given, "[0, 0, 1, 1] and [1, 1, 1, 1]", mask)
    if not isinstance(places, torch.Tensor) or places.tolist() != [[1], [3]]:
        words = "position_ids must be given for the columns that the model reads; the first real token of a row stands at 0"
        fail(words, given, "[1] and [3]", "nothing" if places is None else places)


def _draws(next_tokens) -> None:
    model, prompt = random_model(initializer_range=0.02), torch.tensor([[1, 2, 3]])

    def run(seed, noise=0, **options):
        torch.manual_seed(noise)
        return collected(next_tokens, model, prompt, 12, seed=seed, **{"temperature": 1.0} | options, given="temperature 1")[0]

    if run(1) != run(1, 1):
        fail("the same seed gives other tokens", "temperature 1, seed 1, twice")
    if run(1) == run(2):
        words = "two seeds give the same tokens" + ("; temperature has no effect: hand the options on" if run(1) == run(1, temperature=0.0) else "")
        fail(words, "temperature 1, seeds 1 and 2")
    if run(None, 1) == run(None, 2):
        fail("without a seed, two runs must not give the same tokens", "temperature 1, seed None, twice")
    if len(set(run(5))) == 1:
        fail("every draw of a run is the same: make the generator once, before the loop", "temperature 1, seed 5")
    model, _ = scripted(torch.linspace(3, 1, 40).tolist())
    given = "a model that always prefers token 0, then 1, then 2; prompt [1, 3]; repetition_penalty 9"
    got = collected(next_tokens, model, torch.tensor([[1, 3]]), 4, repetition_penalty=9.0, given=given)[0]
    if got != [0, 2, 4, 5]:
        words = "give sample_next all tokens so far as `previous`, the prompt and the new ones"
        if got == [0, 1, 2, 3]:
            words = "the prompt is missing in `previous`"
        elif got[1] == 0:
            words = "the new tokens are missing in `previous`"
        fail(words, given, [0, 2, 4, 5], got)
    model, _ = scripted([1.0, 0.9, 0.2] + [0.0] * 37)
    rows = collected(next_tokens, model, torch.tensor([[0, 7], [5, 7]]), 2, attention_mask=torch.tensor([[0, 1], [1, 1]]), repetition_penalty=1.5,
                     given="a prompt padded with token 0, repetition_penalty 1.5")  # fmt: skip
    if rows != [[0, 1], [0, 1]]:
        fail("padding must not count as repetition: the memory that start_ids gives has none", "padded with token 0, repetition_penalty 1.5",
             [[0, 1], [0, 1]], rows)  # fmt: skip


# -- beyond


@exercise("cache_gib")
def check_cache_gib(cache_gib):
    given = "32 layers, 8 key/value heads of width 128, 4 chats of 8,192 positions, 2 bytes a number"
    if not isinstance(cache_gib, int | float) or isinstance(cache_gib, bool):
        fail("write a number", given, got=cache_gib)
    mistakes = {
        "that counts the query heads; the cache holds keys and values, and there are 8 heads of them": 16.0,
        "that counts keys or values; both are kept": 2.0,
        "that counts 4 bytes a number; bfloat16 has 2": 8.0,
        "that is one chat; there are 4": 1.0,
        "these are bytes; divide by 2**30": 4.0 * 2**30,
        "that is one layer; there are 32": 0.125,
        "that counts gigabytes (10**9 bytes); a GiB has 2**30": 4.294967296,
        "these are bits": 32.0,
    }
    if abs(cache_gib / 4 - 1) > 1e-4:
        words = next((words for words, value in mistakes.items() if abs(cache_gib / value - 1) < 0.01),
                     "multiply: keys and values, layers, chats, heads, positions, width, bytes")  # fmt: skip
        fail(words, given, got=cache_gib)


@exercise("text_pieces")
def check_text_pieces(text_pieces):
    table = {i: bytes([i]) for i in range(256)} | {256: b"<|im_end|>", 257: b"<|endoftext|>", 258: "né".encode(), 259: "λό".encode()[1:]}
    greek = [*"λόγος".encode()]

    def joined(tokens, stops, given):
        pieces = list(text_pieces(tokens, table, stops))
        if not all(isinstance(piece, str) for piece in pieces):
            fail("it must yield text", given, got=pieces)
        return pieces

    given = "the bytes of λόγος one by one, then <|im_end|>, which is a stop token, then !"
    pieces = joined([*greek, 256, 33], [256, 257], given)
    text = "".join(pieces)
    if text != "λόγος":
        broken, shown = "\ufffd" in text, "im_end" in text or "!" in text
        words = "the text is not λόγος"
        if broken and shown:
            words = "both bugs are still there"
        elif broken:
            words = "one bug is left: half a character is shown before its other half has come"
        elif "!" in text:
            words = "it goes on after the stop token"
        elif shown:
            words = "one bug is left: the stop token is shown; look for it before anything is yielded"
        elif not text:
            words = "nothing comes out"
        fail(words, given, list("λόγος"), pieces)
    if pieces != list("λόγος"):
        fail("each character must come as soon as it is whole, and nothing empty", given, list("λόγος"), pieces)
    for tokens, stops, wanted, words in (
        ([104, 105, 257, 33], (256, 257), ["h", "i"], "there may be several stop tokens"),
        ([104, 105, 256, 33], (), ["h", "i", "<|im_end|>", "!"], "without stop_ids everything is shown"),
        ([258, 206, 259], (), ["né", "λό"], "a token may hold several characters, or end one and begin none"),
        (greek[:3], (), ["λ", "\ufffd"], "half a character at the very end must be marked, not lost"),
        ([*greek[:3], 256], [256], ["λ", "\ufffd"], "half a character before the stop token must be marked, not lost"),
        ([], (), [], "no tokens, no text"),
    ):
        got = joined(tokens, stops, f"tokens {tokens}, stop_ids {list(stops)}")
        if got != wanted:
            fail(words, f"tokens {tokens}, stop_ids {list(stops)}", wanted, got)


@exercise("keep_typical", after=["keep_top_p"])
def check_keep_typical(keep_typical):
    row = torch.tensor([[0.35, 0.275, 0.2, 0.1, 0.05, 0.025]]).log()
    surprises, entropy = surprise(row[0])
    given = f"probabilities 0.35, 0.275, 0.2, 0.1, 0.05, 0.025, surprises {rounded(torch.tensor(surprises))}, entropy {entropy:.2f}"
    mistake = "the tokens whose surprise is nearest to the entropy stay, until they have `mass` together"
    for mass in (0.3, 0.7):
        a_filter("keep_typical", keep_typical, row, mass, typical(mass), given, mistake, {
            "this is top-p: the order must be that of |surprise - entropy|. Look at the signs, the absolute value, and the base of the logarithm":
                top_p(mass),
            "the tokens furthest from the entropy are kept; begin with the smallest distance": typical(mass, lambda s, h: -abs(s - h)),
            "one token too few stays: the one that reaches `mass` is needed": typical(mass, below=True),
            "one token too many stays: `mass` is reached before": typical(mass, more=True),
        })  # fmt: skip
    a_filter("keep_typical", keep_typical, row, 0.05, typical(0.05), given, "at least one token always stays", {
        "nothing is left to draw from": lambda row: [],
        "one token too many stays": typical(0.05, more=True),
    })  # fmt: skip
    logits = random_logits()
    for mass in (0.2, 0.6, 0.95):
        a_filter("keep_typical", keep_typical, logits, mass, typical(mass), "random logits (3, 30)", f"right for one row, and not here; {mistake}", {
            "the entropy of all rows together is used; each row has its own": cut(logits, _with_entropy(logits, mass)),
        })  # fmt: skip
    again = cut(logits, top_k(6))
    a_filter("keep_typical", keep_typical, again, 0.6, typical(0.6), "logits of which all but six are minus infinity",
             "a token at minus infinity has probability 0: it stays out and adds nothing to the entropy, which must not become NaN")  # fmt: skip


def _with_entropy(logits: torch.Tensor, mass: float):
    total = sum(surprise(row)[1] for row in logits)
    return typical(mass, lambda s, h: abs(s - total))


@exercise("speculative")
def check_speculative(predicted_share, accept_drafts, measure, measured):
    _as_from_p(accept_drafts)
    _sure_drafts(accept_drafts)
    if not isinstance(predicted_share, int | float) or isinstance(predicted_share, bool):
        fail("write a number", "p = (0.5, 0.3, 0.2), q = (0.2, 0.3, 0.5)", got=predicted_share)
    told = measure(20_000)
    for name, result in (("measure(20_000)", told), ("measured", measured)):
        if not isinstance(result, dict) or set(result) != {"accepted", "tokens"}:
            fail('a dict with "accepted" and "tokens" is asked for', name, got=result)
        share, tokens = result["accepted"], torch.as_tensor(result["tokens"], dtype=torch.float32)
        if tokens.shape != (3,) or (tokens - torch.tensor([0.5, 0.3, 0.2])).abs().max() > 0.018:
            words = '"tokens" are the shares of tokens 0, 1 and 2 among those that come out, and that is p'
            if tokens.shape == (3,) and (tokens - torch.tensor([0.2, 0.3, 0.5])).abs().max() < 0.018:
                words = "these are the shares among the drafts; count the tokens that come out"
            fail(words, name, "near [0.5, 0.3, 0.2]", result["tokens"])
        if abs(float(share) - 0.7) > 0.017:
            words = "this is the share that was rejected" if abs(float(share) - 0.3) < 0.017 else "this is not the share of drafts that are accepted"
            if float(share) > 1:
                words = '"accepted" is a share, from 0 to 1'
            fail(words, f"{name}, drafts from q = (0.2, 0.3, 0.5)", "near 0.70", share)
    if not 0.69 <= predicted_share <= 0.71:
        words = "your measurement disagrees with your prediction; look at the first hint"
        if 0.29 <= predicted_share <= 0.31:
            words = "that is the share of rejected drafts, or of token 1 alone"
        fail(words, "p = (0.5, 0.3, 0.2), q = (0.2, 0.3, 0.5)", got=predicted_share)


def _accepted(accept_drafts, p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, given: str) -> tuple[torch.Tensor, torch.Tensor]:
    before = drafts.clone()
    result = accept_drafts(p, q, drafts)
    if not (isinstance(result, tuple | list) and len(result) == 2):
        fail("it returns two things: the tokens, and which drafts were accepted", given, got=type(result).__name__)
    tokens, accepted = result
    shaped(tokens, drafts.shape, f"{given}; the tokens", torch.int64)
    shaped(accepted, drafts.shape, f"{given}; which were accepted", torch.bool)
    unchanged("drafts", before, drafts)
    if (tokens != before)[accepted].any():
        fail("a draft that was accepted must come out as it is", given)
    return tokens, accepted


def _sure_drafts(accept_drafts) -> None:
    p = torch.tensor([0.5, 0.3, 0.2]).expand(200, -1)
    drafts = torch.arange(200) % 3
    given = "p = q = (0.5, 0.3, 0.2)"
    tokens, accepted = _accepted(accept_drafts, p, p.clone(), drafts, given)
    if not accepted.all() or not torch.equal(tokens, drafts):
        fail("where both models agree, every draft is accepted", given, "200 of 200", f"{int(accepted.sum())} of 200")
    given = "p = (0, 1, 0), q = (1/2, 0, 1/2): no draft can be right"
    p, q = torch.tensor([0.0, 1.0, 0.0]).expand(200, -1), torch.tensor([0.5, 0.0, 0.5]).expand(200, -1)
    tokens, accepted = _accepted(accept_drafts, p, q, drafts // 2 * 2 % 4, given)
    if accepted.any() or (tokens != 1).any():
        words = "these drafts have p = 0 and must be rejected" if accepted.any() else "a rejected draft is replaced by a draw from max(0, p - q)"
        fail(words, given, "none accepted, token 1 in every row", f"{int(accepted.sum())} accepted, {int((tokens == 1).sum())} times token 1")


def _as_from_p(accept_drafts) -> None:
    """Two kinds of rows, half of each, whose shares are known."""
    n = 6000
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]).repeat(n // 2, 1)
    q = torch.tensor([[0.2, 0.2, 0.6], [0.4, 0.3, 0.3]]).repeat(n // 2, 1)
    drafts = torch.multinomial(q, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    given = "3,000 rows with p = (0.5, 0.3, 0.2), q = (0.2, 0.2, 0.6), and as many with p = (0.1, 0.2, 0.7), q = (0.4, 0.3, 0.3)"
    tokens, accepted = _accepted(accept_drafts, p, q, drafts, given)
    for kind, (large, small) in enumerate(((p[0], q[0]), (p[1], q[1]))):
        here = torch.arange(n) % 2 == kind
        rate = [float(accepted[here & (drafts == token)].float().mean()) for token in range(3)]
        wanted = [min(1.0, float(large[token] / small[token])) for token in range(3)]
        if any(abs(a - b) > 0.085 for a, b in zip(rate, wanted, strict=True)):
            words = "a draft x is not accepted with probability min(1, p_x / q_x)"
            flipped = [min(1.0, float(small[token] / large[token])) for token in range(3)]
            if all(abs(a - b) < 0.085 for a, b in zip(rate, flipped, strict=True)):
                words = "p and q are swapped in the share: a draft that the large model likes must be accepted"
            elif all(abs(a - float(b)) < 0.085 for a, b in zip(rate, large, strict=True)):
                words = "a draft is accepted with probability p_x; divide by q_x"
            elif all(share in (0.0, 1.0) for share in rate):
                words = "the same draft is always accepted or always rejected; draw a random number for each row"
            wanted, rate = rounded(torch.tensor(wanted)), rounded(torch.tensor(rate))
            fail(words, f"p = ({rounded(large)}), q = ({rounded(small)}), 3,000 drafts", f"accepted of drafts 0, 1, 2: {wanted}", rate)
        share = tokens[here].bincount(minlength=3) / (n // 2)
        if (share - large).abs().max() > 0.05:
            words = "the tokens that come out do not have the shares of p; a rejected draft is replaced by a draw from max(0, p - q) of its own row"
            kept = torch.minimum(large, small)
            left = 1 - kept.sum()
            for mistake, redraw in {
                "a rejected draft is redrawn from p, and then the likely tokens come too often: redraw from max(0, p - q)": large,
                "a rejected draft is redrawn from q": small,
                "a rejected draft is redrawn from |p - q|; where q is larger, nothing is left": (large - small).abs() / (large - small).abs().sum(),
                "a rejected draft is redrawn from max(0, q - p)": (small - large).clamp(min=0) / (small - large).clamp(min=0).sum(),
                "a rejected draft is replaced by the best token": torch.nn.functional.one_hot(large.argmax(), 3).float(),
                "a rejected draft is redrawn evenly from all tokens": torch.full((3,), 1 / 3),
            }.items():
                if (share - kept - left * redraw).abs().max() < 0.03:
                    words = mistake
            if torch.equal(tokens, drafts):
                words = "rejected drafts come out all the same; redraw them"
            fail(words, f"p = ({rounded(large)}), q = ({rounded(small)}), 3,000 drafts", f"shares {rounded(large)}", f"shares {rounded(share)}")
