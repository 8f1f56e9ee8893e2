"""Checks of workbook 3. What is trusted is torch's cross-entropy, and plain loops over tokens; nothing here comes from minimind.metrics."""

import bisect
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course.checks.core import equal, exercise, fail, shaped, unchanged

MODULE = "metrics"

P = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])  # rows sum to one


def close(value: object, wanted: float, given: str, mistake: str, likely: dict[str, float | tuple] | None = None, tolerance: float = 1e-4) -> None:
    """A plain number equals the expected one; else the mistake whose result it is is named."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        what = "it returns nothing; is there a `return`?" if value is None else "return a plain number; `.item()` makes one of a tensor"
        fail(what, given, wanted, repr(value))

    def near(other: float) -> bool:
        return math.isclose(value, other, rel_tol=tolerance, abs_tol=tolerance * 1e-3)

    if near(wanted):
        return
    for words, wrong in (likely or {}).items():
        if any(near(float(each)) for each in (wrong if isinstance(wrong, tuple) else (wrong,))):
            mistake = words
            break
    fail(mistake, given, float(f"{wanted:.6g}"), float(f"{value:.6g}"))


def refuses(function, given: str, what: str) -> None:
    """Calling it raises ValueError."""
    try:
        function()
    except ValueError:
        return
    except Exception as error:
        fail(f"{what} must raise ValueError", given, "ValueError", type(error).__name__)
    fail(f"{what} must raise ValueError, and here it passes in silence", given)


# -- rebuild


@exercise("cross_entropy", keeps=["cross_entropy"])
def check_cross_entropy(cross_entropy):
    logits, labels = (P.log() + 1).unsqueeze(0), torch.tensor([[0, 2, 1]])
    before = logits.clone(), labels.clone()
    given = "logits 1 + ln p with p = [[[.5, .25, .25], [.1, .6, .3], [.2, .2, .6]]], labels [[0, 2, 1]], so the p of the labels are .5, .3, .2"
    got = cross_entropy(logits, labels)
    shaped(got, (), given, torch.float32, "the loss is one number, the mean over all labels")
    s = -torch.tensor([0.5, 0.3, 0.2]).log()
    over_positions = logits.log_softmax(1)[0, [0, 1, 2], [0, 2, 1]]
    equal(got, s.mean(), given, "it is not the mean of -ln p", {
        "this is the sum of the surprises; take the mean": s.sum(),
        "the minus sign is missing: a surprise is never negative": -s.mean(),
        "this is in bits; the loss is in nats": s.mean() / math.log(2),
        "this is the perplexity; the loss is its logarithm": s.mean().exp(),
        "this is -ln of the mean probability; take the mean of the logarithms": -torch.tensor((0.5 + 0.3 + 0.2) / 3).log(),
        "the softmax is missing: logits are not yet logarithms of probabilities": s.mean() - 1,
        "the softmax goes over the positions; it must go over the vocabulary, the last dimension": -over_positions.mean(),
        "this is the mean probability; the logarithm is missing": torch.tensor((0.5 + 0.3 + 0.2) / 3),
        "this is a softmax of a softmax: give the loss the logits": F.cross_entropy(P, labels[0]),
    })  # fmt: skip
    unchanged("logits", before[0], logits)
    unchanged("labels", before[1], labels)
    _ignored(cross_entropy, logits, s)
    for shape, wrong in (((1, 4, 3), (1, 3)), ((2, 3, 4), (3, 2)), ((3, 2, 4), (2, 3)), ((2, 3, 4), (6,))):
        what = "labels of a shape that does not fit the logits"
        refuses(lambda shape=shape, wrong=wrong: cross_entropy(torch.zeros(shape), torch.zeros(wrong, dtype=torch.long)),
                f"logits {shape}, labels {wrong}", what)  # fmt: skip
    large = torch.zeros(1, 2, 5, dtype=torch.float16)
    large[..., 0] = 60000
    got = cross_entropy(large, torch.tensor([[0, 1]]))
    shaped(got, (), "logits in float16, one of them 60,000", torch.float32)
    equal(
        got,
        torch.tensor(30000.0),
        "float16 logits [60000, 0, 0, 0, 0] twice, labels 0 and 1",
        "large logits overflow: never compute e to a large logit",
    )
    short, labels = (4 * torch.randn(3, 5, 9)).bfloat16(), torch.randint(9, (3, 5))
    got = cross_entropy(short, labels)
    shaped(got, (), "logits in bfloat16", torch.float32)
    expected = F.cross_entropy(short.float().view(-1, 9), labels.view(-1))
    equal(got, expected, "random logits (3, 5, 9) in bfloat16", "it is not computed in float32: bfloat16 has three digits")
    mine, theirs = (torch.linspace(-2, 2, 90).sin().view(2, 5, 9).clone().requires_grad_() for _ in range(2))
    labels = torch.randint(9, (2, 5))
    got, expected = cross_entropy(mine, labels), F.cross_entropy(theirs.view(-1, 9), labels.view(-1))
    if not got.requires_grad:
        fail("no gradient gets through; leave detach, .data, numpy, .item() and no_grad out", "logits with requires_grad=True")
    got.backward()
    expected.backward()
    equal(mine.grad, theirs.grad, "random logits (2, 5, 9)", "the gradient is not that of torch's cross-entropy")


def _ignored(cross_entropy, logits, s) -> None:
    labels = torch.tensor([[0, -100, 1]])
    given = "the same logits, labels [[0, -100, 1]]"
    equal(cross_entropy(logits, labels), s[[0, 2]].mean(), given, "a label of -100 must not count", {
        "the ignored position is left out of the sum, and counts in N all the same": s[[0, 2]].sum() / 3,
        "the ignored position is not left out": (s.mean(), (s[[0, 2]].sum() + -P[1, 0].log()) / 3, (s[[0, 2]].sum() + -P[1, 2].log()) / 3),
    })  # fmt: skip
    got = cross_entropy(logits, torch.tensor([[0, 2, 1]]), ignore_index=0)
    equal(got, s[1:].mean(), "the same logits, labels [[0, 2, 1]], ignore_index = 0", "ignore_index is not used")


@exercise("bits_per_byte", keeps=["perplexity", "bits_per_byte"])
def check_bits_per_byte(perplexity, bits_per_byte):
    for nats, wanted in ((math.log(10), 10.0), (0.0, 1.0), (2.5, 12.1825)):
        close(perplexity(nats), wanted, f"perplexity({nats:.4g})", "perplexity is e to the nats", {
            "this is 2 to the nats; nats belong to e": 2**nats,
            "the sign is wrong: more surprise means a larger perplexity": math.exp(-nats),
            "perplexity is e to the nats, not the nats": nats,
        })  # fmt: skip
    for bits, size in ((8, 1), (10, 4), (3, 12)):
        nats = bits * math.log(2)
        close(bits_per_byte(nats, size), bits / size, f"bits_per_byte({bits} * ln 2, {size}): {bits} bits over {size} byte(s)",
               "it is not the nats in bits, over the bytes", {
            "multiply and divide are swapped: a nat is 1 / ln 2 = 1.44 bits": nats * math.log(2) / size,
            "these are nats per byte: divide by ln 2": nats / size,
            "these are bits; divide by the number of bytes": bits,
            "bytes over bits: the fraction is upside down": size / bits,
            "the bits are multiplied by the bytes; divide": bits * size,
        })  # fmt: skip
    for size in (0, -3):
        refuses(lambda size=size: bits_per_byte(1.0, size), f"bits_per_byte(1.0, {size})", "a text without bytes")


class SomeTokenizer:
    """The least that a tokenizer has."""

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.tokens, self.vocab_size = tokens, len(tokens)
        self.special_ids = {tokens[i].decode(): i for i in special}

    def token_bytes(self) -> list[bytes]:
        return list(self.tokens)


@exercise("token_byte_lengths", keeps=["token_byte_lengths"])
def check_token_byte_lengths(token_byte_lengths):
    tokens = [b"<|end|>", b"a", "é".encode(), b" the", b"\xe4", b"<|user|>", "你".encode()]
    given = "tokens <|end|>, a, é, ' the', half a letter (one byte), <|user|>, 你; <|end|> and <|user|> are special"
    got = token_byte_lengths(SomeTokenizer(tokens, [0, 5]))
    shaped(got, (7,), given, hint="there is one length for each token of the vocabulary, the special ones included: (V,)")
    if got.is_floating_point() or got.dtype == torch.bool:
        fail("lengths are whole numbers", given, "torch.int64", got.dtype)
    equal(got, torch.tensor([0, 1, 2, 4, 1, 0, 3]), given, "it is not the number of bytes of each token", {
        "a special token stands for no text: its length is 0": torch.tensor([7, 1, 2, 4, 1, 8, 3]),
        "letters are counted; é has two bytes and 你 three": (torch.tensor([0, 1, 1, 4, 1, 0, 1]), torch.tensor([0, 1, 1, 4, 0, 0, 1])),
        "letters are counted, and special tokens too": torch.tensor([7, 1, 1, 4, 1, 8, 1]),
        "the first tokens are set to 0; special_ids says which ones are special": torch.tensor([0, 0, 2, 4, 1, 8, 3]),
        "only one special token is set to 0": (torch.tensor([0, 1, 2, 4, 1, 8, 3]), torch.tensor([7, 1, 2, 4, 1, 0, 3])),
    })  # fmt: skip
    got = token_byte_lengths(SomeTokenizer([b"ab", b"c", b"<|x|>"], [2]))
    equal(got, torch.tensor([2, 1, 0]), "tokens ab, c, <|x|>; the last is special", "right for the first vocabulary, and not here")
    got = token_byte_lengths(SomeTokenizer([b"ab", b"c"], []))
    equal(got, torch.tensor([2, 1]), "tokens ab, c; nothing is special", "right with special tokens, and not without")


def running(V: int, seen: list | None = None):
    """A model whose logits depend on all ids since the start of its window; it writes down the shapes that it gets."""
    table = 2 * torch.randn(V, V, generator=torch.Generator().manual_seed(V))

    def model(ids):
        if seen is not None:
            seen.append(tuple(ids.shape))
        return table[ids.cumsum(-1) % V]

    return model


def by_token(model, tokens: torch.Tensor, context: int) -> float:
    """The surprise of each token but the first, one after the other."""
    total = 0.0
    for place in range(1, len(tokens)):
        start = (place - 1) // context * context
        total -= model(tokens[None, start:place])[0, -1].log_softmax(-1)[tokens[place]].item()
    return total


@exercise("total_nats", after=["cross_entropy"], keeps=["total_nats"])
def check_total_nats(total_nats):
    tokens, table = torch.tensor([0, 1, 2, 0, 1, 2, 2]), P.log()
    before = tokens.clone()
    s = -table[tokens[:-1], tokens[1:]]
    given = "seven ids [0, 1, 2, 0, 1, 2, 2], context = 4, batch_size = 2, and a table of p(next | this); six tokens are predicted"
    close(total_nats(lambda ids: table[ids], tokens, 4, 2, None), s.sum().item(), given, "it is not the sum of the six surprises", {
        "this is the mean; the sum was asked for": s.mean(),
        "the end of the text is lost: the last window is shorter, and must count": s[:4].sum(),
        "the means of the batches are added; multiply each by its number of labels": s[:4].mean() + s[4:].mean(),
        "the mean of a batch is multiplied by context; the last one has fewer labels": 4 * (s[:4].mean() + s[4:].mean()),
        "these are bits; the sum in nats was asked for": s.sum() / math.log(2),
        "the first token of the second window is never predicted: cut inputs and labels, not the text": s.sum() - s[3],
        "the labels are not shifted: the model is asked for what it just read": (
            -table[tokens[:-1], tokens[:-1]].sum(), -table[tokens, tokens].sum()),
        "the minus sign is wrong": -s.sum(),
    })  # fmt: skip
    unchanged("tokens", before, tokens)
    for length, context, batch_size in (
        (13, 4, 2),
        (13, 4, 99),
        (14, 4, 2),
        (5, 9, 2),
        (9, 8, 2),
        (2, 5, 1),
        (2, 1, 3),
        (30, 1, 7),
        (12, 2, 1),
        (18, 4, 2),
    ):
        tokens, seen = torch.randint(7, (length,)), []
        given = f"{length} ids, context = {context}, batch_size = {batch_size}"
        got = total_nats(running(7, seen), tokens, context, batch_size, None)
        _fed(seen, length, context, batch_size, given)
        words = "the windows do not begin at 0, context, 2 * context and so on"
        close(got, by_token(running(7), tokens, context), f"{given}, a model that uses its whole window", words)
    _amp(lambda model, tokens, amp: total_nats(model, tokens, 6, 2, amp))


def _fed(seen: list[tuple], length: int, context: int, batch_size: int, given: str) -> None:
    """What the model got."""
    if any(len(shape) != 2 for shape in seen):
        fail("the model must get ids (B, T)", given, "two dimensions", seen)
    if (longest := max(T for _, T in seen)) > context:
        fail("the model reads more than `context` tokens at once", given, f"T at most {context}", f"T = {longest}")
    if (most := max(B for B, _ in seen)) > batch_size:
        fail("a batch has more than batch_size windows", given, f"B at most {batch_size}", f"B = {most}")
    if (count := sum(B * T for B, T in seen)) != length - 1:
        fail("every token but the first must be predicted exactly once", given, f"{length - 1} predictions", f"{count}")
    full = (length - 1) // context
    if len(seen) > -(-full // batch_size) + ((length - 1) % context > 0):
        fail("the model is called too often: put up to batch_size windows into one batch", given, got=f"shapes {seen}")


def _amp(function) -> None:
    """Whether the model runs in the type of amp."""
    model = nn.Sequential(nn.Embedding(11, 32), nn.Linear(32, 11))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape))
    tokens = torch.randint(11, (21,))
    windows = [tokens[start : start + 7] for start in (0, 6, 12)] + [tokens[18:]]

    def nats(amp):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return sum(F.cross_entropy(model(w[:-1]).float(), w[1:], reduction="sum").item() for w in windows)

    full, short = nats(False), nats(True)
    words = "amp must only change the type in which the model runs"
    close(function(model, tokens, None), full, "a small network, 21 ids, amp = None", words, {"autocast runs although amp is None": short}, 1e-5)
    got = function(model, tokens, torch.bfloat16)
    given = "a small network, 21 ids, amp = torch.bfloat16"
    if abs(got - full) < abs(short - full) / 4:
        fail("amp is not used: the model runs in float32", given, float(f"{short:.6g}"), float(f"{got:.6g}"))
    close(got, short, given, words, tolerance=2e-3)


@exercise("evaluate_bits_per_byte", after=["total_nats", "bits_per_byte"], keeps=["evaluate_bits_per_byte"])
def check_evaluate(evaluate_bits_per_byte):
    sizes, tokens = torch.tensor([0, 3, 2, 5, 1]), torch.tensor([3, 1, 0, 2, 4, 1, 1])
    table = 2 * torch.randn(5, 5)
    nats = -table.log_softmax(-1)[tokens[:-1], tokens[1:]].sum().item()
    given = "ids [3, 1, 0, 2, 4, 1, 1], lengths [0, 3, 2, 5, 1], a table of logits; the predicted tokens have 12 bytes"
    got = evaluate_bits_per_byte(lambda ids: table[ids], tokens, sizes)
    bits = nats / math.log(2)
    close(got, bits / 12, given, "it is not the surprise in bits, over the bytes of the predicted tokens", {
        "the bytes of the first token are counted; it is not predicted": bits / 17,
        "the bytes of the inputs are counted; count those of the labels": bits / 14,
        "these are nats per byte; make bits of them": nats / 12,
        "these are bits per token": (bits / 6, bits / 7),
        "these are nats per token": (nats / 6, nats / 7),
        "the mean surprise is divided by the bytes; total_nats is already the sum": (bits / 6 / 12, bits / 7 / 12),
        "the lengths of the whole vocabulary are summed; those of the tokens of the text were asked for": bits / 11,
    })  # fmt: skip
    _streams(evaluate_bits_per_byte)
    _modes(evaluate_bits_per_byte, sizes)
    bytes_of = torch.arange(1, 12)

    def in_nats(model, tokens, amp):
        return evaluate_bits_per_byte(model, tokens, bytes_of, 6, 2, amp) * math.log(2) * bytes_of[tokens[1:]].sum().item()

    _amp(in_nats)


def _streams(evaluate_bits_per_byte) -> None:
    """Types of ids, and what is handed on."""
    sizes, ids = torch.arange(7) + 1, torch.randint(7, (40,))

    def wanted(context, ids=ids):
        return by_token(running(7), ids, context) / math.log(2) / sizes[ids[1:]].sum().item()

    few = ids[:20]
    for kind, some in (
        ("a tensor of int32", few.int()),
        ("a numpy array of uint16", few.numpy().astype(np.uint16)),
        ("a numpy array of int32", few.numpy().astype(np.int32)),
    ):
        close(evaluate_bits_per_byte(running(7), some, sizes), wanted(256, few), f"20 ids as {kind}", "right for a tensor of int64, and not here")
    seen: list = []
    got = evaluate_bits_per_byte(running(7, seen), ids, sizes, context=5, batch_size=3)
    likely = {"context is not handed on": wanted(256), "context and batch_size are swapped": wanted(3)}
    close(got, wanted(5), "40 ids, context = 5, batch_size = 3", "with a short context it is wrong", likely)
    if max(B for B, _ in seen) != 3:
        fail("batch_size is not handed on", "40 ids, context = 5, batch_size = 3", "B = 3", f"B = {max(B for B, _ in seen)}")
    seen = []
    evaluate_bits_per_byte(running(7, seen), torch.zeros(34 * 256 + 2, dtype=torch.long), sizes)
    if (most := tuple(max(part) for part in zip(*seen, strict=True))) != (32, 256):
        fail("without the arguments, batch_size is 32 and context 256", "8,706 ids", "batches up to (32, 256)", f"up to {most}")
    for few in (0, 1):
        refuses(lambda few=few: evaluate_bits_per_byte(running(7), torch.zeros(few, dtype=torch.long), sizes), f"{few} ids", "fewer than two ids")
    two = torch.tensor([2, 3])
    close(evaluate_bits_per_byte(running(7), two, sizes), wanted(256, two), "two ids", "two ids are enough: one to read, one to predict")


def watched(training: bool) -> tuple[nn.Module, list]:
    """A model, and a list of what happens to it: calls and changes of its mode."""
    model, events = nn.Sequential(nn.Embedding(5, 5)), []

    def train(mode=True):
        events.append(bool(mode))
        model.training = bool(mode)
        return model

    model.training = training
    model.train = train  # eval() calls it too
    model.register_forward_pre_hook(lambda module, args: events.append("call"))
    return model, events


def _modes(evaluate_bits_per_byte, sizes) -> None:
    for training, ids in ((True, [1, 2, 3]), (False, [1, 2, 3]), (True, [1, 2, 99, 3])):
        model, events = watched(training)
        given = f"a module in {'training' if training else 'eval'} mode" + (", and an id that is too large" if 99 in ids else "")
        try:
            evaluate_bits_per_byte(model, torch.tensor(ids), sizes)
        except Exception as error:
            if 99 not in ids:
                raise error
        now = training
        for event in events:
            if event == "call" and now:
                fail("the module runs in training mode; call eval() before", given)
            now = now if event == "call" else event
        if now != training:
            words = "the module is left in eval mode" if training else "the module came in eval mode and is left in training mode"
            fail(f"{words}{' after an error: use try and finally' if 99 in ids else '; give it back in the mode in which it came'}", given)


# -- beyond


@exercise("three_numbers")
def check_three_numbers(first_loss, mixed, first_bits):
    V, half = 32_000, -(math.log(0.9) + math.log(0.1)) / 2
    answers = (
        ("first_loss", first_loss, math.log(V), "32,000 tokens, all as likely", "each token has p = 1 / 32,000; the loss is -ln p", {
            "this is in bits; nats were asked for": math.log2(V), "this is a logarithm to base 10": math.log10(V),
            "this is the perplexity; the loss is its logarithm": float(V), "this is a probability; the loss is -ln of it": 1 / V,
            "the loss is -ln p, and is not negative": -math.log(V),
        }),
        ("mixed", mixed, math.exp(half), "p = 0.9 for one half, 0.1 for the other", "take the mean of the surprises, then e to it", {
            "this is one over the mean probability; the mean is over the surprises": 2.0,
            "this is the mean of the two perplexities; the mean is over the surprises": (1 / 0.9 + 1 / 0.1) / 2,
            "this is the mean surprise; the perplexity is e to it": half, "this is a probability; the perplexity is one over it": math.exp(-half),
            "this is 2 to the mean surprise in nats; nats belong to e": 2**half,
        }),
        ("first_bits", first_bits, math.log2(V) / 4, "32,000 tokens, 4 bytes in a token", "the bits of a token, over its 4 bytes", {
            "these are nats per byte; make bits of them": math.log(V) / 4, "these are bits per token": math.log2(V),
            "these are nats per token": math.log(V), "the bytes divide: a token's surprise is shared out over them": math.log2(V) * 4,
            "a nat is more than a bit: divide by ln 2": math.log(V) * math.log(2) / 4, "a byte has 8 bits, but they are not those": 8.0,
        }),
    )  # fmt: skip
    for name, value, wanted, given, words, likely in answers:
        if isinstance(value, bool) or not isinstance(value, int | float):
            fail(f"{name} must be a number", given, got=repr(value))
        hits = [mistake for mistake, wrong in likely.items() if math.isclose(value, wrong, rel_tol=0.005)]
        if not math.isclose(value, wanted, rel_tol=0.01):
            fail(f"{name}: {(hits or [words])[0]}", given, got=float(f"{value:.4g}"))


@exercise("validation_loss")
def check_validation_loss(validation_loss):
    table = P.log()
    ids = torch.tensor([0, 1, 2, 0, 0, 2, 1, 2])
    s, read = -table[ids[:-1], ids[1:]], -table[ids[:-1], ids[:-1]]
    given = "eight ids [0, 1, 2, 0, 0, 2, 1, 2], context = 4, a table of p(next | this); seven labels"

    def stretched(x):
        return ((x[:4].mean() + x[4:].mean()) * 4 / 7).item()

    close(validation_loss(lambda x: table[x], ids, 4), s.mean().item(), given, "it is still not the mean surprise of the seven labels", {
        "both bugs are still there": stretched(read),
        "one bug is left: a model that repeats what it read would be called perfect. What does labels hold?": read.mean(),
        "one bug is left: the last window has three labels, and its mean is multiplied by four": stretched(s),
        "the last window is lost": (s[:4].sum() / 7, s[:4].mean()),
        "the mean of the two windows' means is not the mean over all labels": (s[:4].mean() + s[4:].mean()) / 2,
        "this is the sum; divide by the number of labels": s.sum(),
    })  # fmt: skip
    for length, context in ((9, 4), (6, 20), (12, 5), (7, 1), (2, 3)):
        ids = torch.randint(7, (length,))
        got = validation_loss(running(7), ids, context)
        close(got, by_token(running(7), ids, context) / (length - 1), f"{length} ids, context = {context}", "right for the first case, and not here")


def smooth(counts: torch.Tensor, d: float, mistake: str = "") -> torch.Tensor:
    """Interpolated Kneser-Ney, one probability at a time; `mistake` names what to do wrong."""
    c = counts.tolist()
    V = len(c)
    N = [sum(c[v][w] > 0 for v in range(V)) for w in range(V)]
    if mistake == "often":
        N = [sum(c[v][w] for v in range(V)) for w in range(V)]
    T = [sum(c[v][w] > 0 for w in range(V)) for v in range(V)]
    if mistake == "swapped":
        N, T = T, N
    total, U = sum(N), sum(n > 0 for n in N)
    q = [(max(n - d, 0) + d * U / V) / total for n in N]
    if mistake == "plain":
        q = [n / total for n in N]
    if mistake == "alike":
        q = [1 / V] * V
    if mistake == "lost":
        q = [max(n - d, 0) / total for n in N]
    rows = []
    for v in range(V):
        n = sum(c[v])
        if n == 0:
            rows.append({"nan": [math.nan] * V, "zero": [0.0] * V, "even": [1 / V] * V}.get(mistake, q))
        elif mistake == "taken":
            rows.append([max(c[v][w] - d, 0) / n for w in range(V)])
        elif mistake == "below":
            rows.append([(c[v][w] - d + d * T[v] * q[w]) / n for w in range(V)])
        elif mistake == "once":
            rows.append([(max(c[v][w] - d, 0) + d * q[w]) / n for w in range(V)])
        else:
            rows.append([(max(c[v][w] - d, 0) + d * T[v] * q[w]) / n for w in range(V)])
    return torch.tensor(rows)


LIKELY = {
    "q counts how often a token came; it must count in how many different contexts": "often",
    "N and T are swapped: T belongs to rows, N to columns": "swapped",
    "q is not smoothed: a token that was never seen gets probability 0": "plain",
    "q must not be the same for all tokens": "alike",
    "what q took away is not handed out over all tokens": "lost",
    "what was taken away is not handed out: d T(v) q(w) is missing": "taken",
    "a count of 0 becomes negative: take nothing away from it": "below",
    "d is taken from each of the T(v) tokens of a row, and handed out only once": "once",
}


@exercise("kneser_ney")
def check_kneser_ney(kneser_ney):
    counts = torch.tensor([[0.0, 4.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    before = counts.clone()
    given = "counts [[0, 4, 1, 0], [0, 0, 0, 0], [3, 1, 2, 0], [0, 1, 0, 0]], d = 0.75; before the tokens stood N = 1, 3, 2, 0 different ones"
    wanted = {name: smooth(counts, 0.75, name) for name in ("", "nan", "zero", "even", *LIKELY.values())}
    turned = smooth(counts.T, 0.75)
    got = kneser_ney(counts)
    shaped(got, (4, 4), given, hint="there is one probability for each pair: (V, V)")
    rows = [0, 2, 3]
    if torch.allclose(got[rows].double(), wanted[""][rows].double(), atol=1e-5):
        equal(got, wanted[""], given, "a row that was never seen is wrong: it is q itself", {
            "a row that was never seen becomes NaN: its sum is 0": wanted["nan"],
            "a row that was never seen becomes 0: it is q itself": wanted["zero"],
            "a row that was never seen is not all alike: it is q itself": wanted["even"],
        })  # fmt: skip
    likely = {words: wanted[name][rows] for words, name in LIKELY.items()}
    likely["rows and columns are swapped: the rows of counts are what came first"] = turned[rows]
    equal(got[rows], wanted[""][rows], f"{given}; shown are rows 0, 2 and 3", "the rows that were seen are not those of the formula", likely)
    unchanged("counts", before, counts)
    for V, d in ((6, 0.5), (9, 0.9), (5, 0.75)):
        counts = (torch.rand(V, V) * torch.rand(V, V) * 6 - 0.8).clamp(min=0).floor()
        counts[0, 1], counts[V - 1] = 3, 0
        right, got, given = smooth(counts, d), kneser_ney(counts, d), f"random counts ({V}, {V}), d = {d}"
        equal(got, right, given, "right for the first case, and not here")
        equal(got.sum(1).float(), torch.ones(V), f"{given}; the sums of the rows", "every row must sum to one")


def some_text(source: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """What the workbook's text(n, seed) gives."""
    upto, at, ids = source.cumsum(-1).tolist(), 0, []
    for share in torch.rand(n, generator=torch.Generator().manual_seed(seed)).tolist():
        at = min(bisect.bisect(upto[at], share), len(upto) - 1)
        ids.append(at)
    return torch.tensor(ids)


def rate(table: torch.Tensor) -> float:
    """The entropy rate, by following the shares."""
    table = table.double()
    shares = torch.full((len(table),), 1 / len(table), dtype=torch.float64)
    for _ in range(3000):
        shares = shares @ table
    return -(shares[:, None] * table * table.log()).sum().item()


@exercise("floor", after=["kneser_ney"])
def check_floor(predicted_below, entropy_rate, losses, measured):
    two = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    rows = -(two * two.log()).sum(-1)
    given = "p = [[.9, .1], [.5, .5]]: of a long text, 5 of 6 tokens are 0"
    close(entropy_rate(two), rate(two), given, "it is not the mean surprise of the rows, by how often each row is used", {
        "every row counts alike; weigh each by how often its token comes": rows.mean(),
        "this is in bits; nats were asked for": rate(two) / math.log(2),
        "this is the sum over the rows; weigh each by how often its token comes": rows.sum(),
        "the minus sign is missing": -rate(two),
        "this is the entropy of single tokens: the one before is not used": -(5 / 6 * math.log(5 / 6) + 1 / 6 * math.log(1 / 6)),
        "the shares are multiplied from the wrong side: shares @ table": rows.sum() / 2,
    })  # fmt: skip
    for V in (3, 6):
        table = (2 * torch.randn(V, V)).softmax(-1)
        close(entropy_rate(table), rate(table), f"a random table ({V}, {V})", "right for two tokens, and not here", tolerance=1e-3)
    source = (1.5 * torch.randn(30, 30, generator=torch.Generator().manual_seed(3))).softmax(-1)
    new, right = some_text(source, 10_000, 2), {}
    for n in (300, 3_000, 30_000):
        ids = some_text(source, n, 1)
        table = smooth(torch.bincount(30 * ids[:-1] + ids[1:], minlength=900).view(30, 30), 0.75)
        right[n] = tuple(-table[x[:-1], x[1:]].log().mean().item() for x in (ids, new))
    for n in (300, 3_000):
        _two_losses(losses(n), right[n], f"losses({n})", 3e-5)
    if not isinstance(measured, dict) or sorted(measured) != sorted(right):
        fail("`measured` is a dict: the three numbers of tokens to their two losses", expected="{300: ..., 3_000: ..., 30_000: ...}", got=measured)
    for n, wanted in right.items():
        _two_losses(measured[n], wanted, f"measured[{n}]", 0.01)
    if predicted_below not in ("counted", "new", "both", "neither"):
        fail('predicted_below is "counted", "new", "both" or "neither"', got=predicted_below)
    if predicted_below != "counted":
        told = f"H = {rate(source):.2f}; counted text {right[300][0]:.2f}, new text {right[300][1]:.2f}"
        fail("your measurement disagrees with your prediction: what is below the floor was learned by heart", told, got=predicted_below)


def _two_losses(got: object, wanted: tuple[float, float], given: str, tolerance: float) -> None:
    if not isinstance(got, tuple | list) or len(got) != 2:
        fail("there are two losses: on the counted text, and on new text", given, got=got)
    bits = tuple(value / math.log(2) for value in wanted)
    for name, value, right, other, bit in zip(("counted", "new"), got, wanted, wanted[::-1], bits, strict=True):
        close(value, right, f"{given}, the loss on {name} text", "the loss is not that of the smoothed counts of text(n, 1)", {
            "the two losses are swapped, or both are of the same text": other,
            "this is in bits; nats were asked for": bit,
            "the minus sign is missing": -right,
        }, tolerance)  # fmt: skip
