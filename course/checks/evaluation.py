"""Checks of workbook 15. What is trusted are plain loops, exact fractions, bisection and enumeration; nothing comes from minimind.evaluate."""

import functools
import itertools
import math
import re
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from course.checks.core import equal, exercise, fail

MODULE = "evaluate"


class Words:
    """A tokenizer of words: a word and the space before it are one token. With `start`, every text begins with a token of its own."""

    eos_id = 0

    def __init__(self, start: bool = False) -> None:
        self.known, self.start = {"<end>": 0, "<start>": 1}, [1] if start else []

    def encode(self, text: str) -> list[int]:
        return self.start + [self.known.setdefault(word, len(self.known)) for word in re.findall(r" ?\w+|\s|[^\w\s]", text)]

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False, tokenize: bool = True) -> list[int] | str:
        text = "".join(f"#{message['role']}: {message['content']}\n" for message in messages) + "#assistant:" * add_generation_prompt
        return self.encode(text) if tokenize else text

    def words(self, ids: list[int]) -> list[str]:
        names = list(self.known)
        return [names[i] if 0 <= i < len(names) else f"<{i}>" for i in ids]


def numbers(value: object, count: int, given: str, what: str) -> list[float]:
    """A list of so many numbers."""
    try:
        found = [float(each) for each in value]
    except (TypeError, ValueError):
        fail(f"{what}: a list of numbers was expected", given, got=type(value).__name__)
    if len(found) != count:
        fail(f"{what}: there must be one for each row", given, f"{count} numbers", f"{len(found)} numbers")
    return found


# -- rebuild


@exercise("encode_pair", keeps=["encode_pair"])
def check_encode_pair(encode_pair):
    tokenizer, starts = Words(), Words(start=True)

    def cut(context, continuation, by=tokenizer):
        result = encode_pair(by, context, continuation)
        if not (isinstance(result, tuple | list) and len(result) == 2):
            fail("it returns two lists of ids: of the context, and of the continuation", f"{context!r} and {continuation!r}", got=result)
        return tuple(by.words(list(ids)) for ids in result)

    def compare(got, wanted, given, mistake, likely=()):
        for words, wrong in likely:
            if got == wrong:
                mistake = words
        if got != wanted:
            fail(mistake, given, wanted, got)

    wanted = ["Garus", " lives", " in"], [" Foxhollow"]
    compare(cut("Garus lives in", " Foxhollow"), wanted, "'Garus lives in' and ' Foxhollow'", "the ids are not those of the two parts", [
        ("the first list has the ids of the context alone, the second those of the continuation alone", (wanted[0], sum(wanted, []))),
        ("the first list has the ids of the context alone, the second those of the continuation alone", (sum(wanted, []), wanted[1])),
        ("the two are in the wrong order: the context comes first", wanted[::-1]),
    ])  # fmt: skip
    compare(cut("Garus lives in ", "Foxhollow"), wanted, "'Garus lives in ' and 'Foxhollow'",
            "a space at the end of the context must move to the beginning of the continuation", [
        ("the space at the end of the context is lost; it belongs to the continuation", (wanted[0], ["Foxhollow"])),
        ("the space at the end of the context is lost; it belongs to the continuation", (wanted[0], [])),
        ("the space at the end of the context stays there; move it to the continuation", ([*wanted[0], " "], ["Foxhollow"])),
        ("the space at the end of the context stays there; move it to the continuation", ([*wanted[0], " "], [])),
    ])  # fmt: skip
    compare(cut("Garus", ", too"), (["Garus"], [",", " too"]), "'Garus' and ', too'", "no space belongs between the two where none was")
    compare(cut("Garus lives in  ", "Foxhollow"), (wanted[0], [" ", " Foxhollow"]), "'Garus lives in  ' (two spaces) and 'Foxhollow'",
            "all spaces at the end of the context move")  # fmt: skip
    got = cut("Garus lives in", " Foxhollow", starts)
    compare(got, (["<start>", *wanted[0]], wanted[1]), "the same, with a tokenizer that begins every text with <start>",
            "cut both as one text, and leave out the ids of the context", [
        ("the continuation is cut alone; here that gives it a <start> in the middle of the row", (["<start>", *wanted[0]], ["<start>", *wanted[1]])),
    ])  # fmt: skip
    for context, continuation, spaced in (("", "Foxhollow", ["Foxhollow"]), ("  ", "Foxhollow", [" ", " Foxhollow"])):
        compare(cut(context, continuation), (["<end>"], spaced), f"{context!r} and {continuation!r}",
                "a context of nothing is the one token tokenizer.eos_id, and spaces still move", [
            ("the context is empty, so nothing would predict the first token: use tokenizer.eos_id", ([], spaced)),
        ])  # fmt: skip
    chat = [{"role": "user", "content": "Where does Garus live?"}]
    template = tokenizer.words(tokenizer.apply_chat_template(chat, add_generation_prompt=True))
    compare(cut(chat, "In Foxhollow."), (template, ["In", " Foxhollow", "."]), "a list of one message, and 'In Foxhollow.'",
            "messages go through the chat template, and the continuation is cut alone", [
        ("without add_generation_prompt=True the model is not asked to answer",
         (tokenizer.words(tokenizer.apply_chat_template(chat)), ["In", " Foxhollow", "."])),
    ])  # fmt: skip


def little_model(vocab_size: int = 64) -> nn.Module:
    """A transformer with random weights, whose predictions are far from even."""
    from minimind.model import MiniMind, ModelConfig

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32}
    model = MiniMind(ModelConfig(vocab_size=vocab_size, max_position_embeddings=64, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)
    return model.requires_grad_(False)


def slowly(model: nn.Module, ids: list[int], size: int, shift: int = 0) -> list[float]:
    """ln p of each of the last `size` tokens, one pass of the model for each."""
    places = range(len(ids) - size, len(ids))
    return [model(torch.tensor([ids[: t + shift]]))[0, -1].float().log_softmax(-1)[ids[t]].item() for t in places]


@exercise("score_batch", keeps=["score_batch"])
def check_score_batch(score_batch):
    table = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]])
    model = nn.Embedding.from_pretrained(table.log(), freeze=False)
    given = "a model of 3 tokens with p(next | last) = [[.5, .3, .2], [.1, .8, .1], [.25, .25, .5]], the row 0, 1, 2, the last 2 tokens"
    found = score_batch(model, [[0, 1, 2]], [2])
    if not (isinstance(found, tuple | list) and len(found) == 2):
        fail("it returns two lists: nats, and whether greedy", given, got=type(found).__name__)
    right = math.log(0.3) + math.log(0.1)
    likely = {
        "the logits at position t predict token t + 1: read each token one place earlier": (math.log(0.8) + math.log(0.5),),
        "this is the mean of the tokens; the sum was asked for": (right / 2,),
        "these are bits; nats are natural logarithms": (right / math.log(2),),
        "this is the probability, not its logarithm": (0.3 * 0.1,),
        "the sign is wrong: the logarithm of a probability is not positive": (-right,),
        "only the last token is scored": (math.log(0.1),),
        "only the first token is scored": (math.log(0.3),),
    }
    nats = numbers(found[0], 1, given, "nats")
    equal(torch.tensor(nats), torch.tensor([right]), given, "this is not ln p of the last two tokens",
          {words: tuple(torch.tensor([value]) for value in values) for words, values in likely.items()})  # fmt: skip
    for row, size, wanted in (([0, 1, 2], 2, False), ([2, 0, 0], 1, True), ([0, 1, 1], 1, True), ([0, 1, 1], 2, False), ([1, 0, 0, 0], 3, False),
                              ([1, 1, 2], 2, False), ([1, 1, 1, 0], 3, False), ([2, 2, 2], 2, True)):  # fmt: skip
        got = score_batch(model, [row], [size])[1]
        if len(got) != 1 or bool(got[0]) != wanted:
            fail("greedy must be True where each of the last tokens is the most likely one in its place, and only then",
                 f"the same model, the row {row}, the last {size}", [wanted], got)  # fmt: skip
    _mixed(score_batch)
    low = nn.Embedding.from_pretrained((8 * torch.randn(50, 50)).to(torch.bfloat16))
    row = [7, 3, 20, 33, 5]
    wanted = sum(low.weight[a].float().log_softmax(-1)[b].item() for a, b in itertools.pairwise(row[1:]))
    equal(torch.tensor(numbers(score_batch(low, [row], [3])[0], 1, "bfloat16", "nats")), torch.tensor([wanted]), "logits in bfloat16",
          "take the logits to float32 before the softmax: bfloat16 has two to three digits", tolerance=1e-4)  # fmt: skip


def _mixed(score_batch) -> None:
    model, rows = little_model(), [[5, 9, 3, 3, 8, 1], [7, 2], [5, 9, 3, 3, 8, 4], [11, 60, 33, 2, 1, 17, 40, 12], [1, 2, 3]]
    sizes = [2, 1, 1, 4, 2]
    given = f"a random transformer, rows of {', '.join(str(len(row)) for row in rows)} tokens, sizes {sizes}"
    before = [list(row) for row in rows]
    nats, greedy = score_batch(model, rows, sizes)
    if rows != before:
        fail("it changes the rows that it was given", given)
    nats = torch.tensor(numbers(nats, 5, given, "nats"))
    apart = [slowly(model, row, size) for row, size in zip(rows, sizes, strict=True)]
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    log_p = model(padded).log_softmax(-1)
    from_end = [sum(log_p[i, 7 - size + j, token].item() for j, token in enumerate(row[-size:])) for i, (row, size) in enumerate(zip(rows, sizes))]
    whole = [sum(slowly(model, row, len(row) - 1)) for row in rows]
    equal(nats, torch.tensor([sum(each) for each in apart]), given, "it differs from one pass of the model per token", {
        "short rows are read where the filling stands: count from the end of the row, not of the padded tensor": torch.tensor(from_end),
        "the whole row is scored; only its last tokens were asked for": torch.tensor(whole),
    })  # fmt: skip
    written = []
    for start in ([4], [9, 9, 2]):
        for _ in range(3):
            start = [*start, model(torch.tensor([start]))[0, -1].argmax().item()]
        written.append(start)
    written.append([*written[0][:-1], (written[0][-1] + 1) % 64])
    got = [bool(each) for each in score_batch(model, written, [3, 3, 3])[1]]
    if got != [True, True, False]:
        fail("greedy says what the model would write itself", "two rows that it wrote, and one with another last token", [True, True, False], got)


@exercise("choose", after=["encode_pair"], keeps=["choose"])
def check_choose(choose):
    model, tokenizer = little_model(), Words()
    options = ["a cat", "a small grey goat", "rolls", "the red boat of Tilda", "x"]
    people = ["Garus", "Tilda", "Joren", "Kalo"]
    rows = [{"prompt": f"What does {people[i % 4]} like?", "stem": f"{people[i % 4]} likes" + " more" * (i // 4),
             "choices": options[i % 3 : i % 3 + 2 + i % 2], "label": i % 2, "id": f"q{i}"} for i in range(12)]  # fmt: skip
    rows.append({"prompt": "Kalo has", "choices": ["rolls", "rolls"], "label": 1, "id": "twins"})
    copies = [dict(row) for row in rows]
    given = "13 questions with two or three options, a random transformer, form 'statement'"
    answered = choose(model, tokenizer, rows)
    if rows != copies:
        fail("it changes the rows that it was given; make new ones", given)
    _rows(answered, rows, given)
    every = [_nats(model, tokenizer, row.get("stem") or row["prompt"], row["choices"]) for row in rows]
    for row, got, nats in zip(rows, answered, every, strict=True):
        if len(got["nats"]) != len(nats):
            fail("there is one score for each option; questions may have different numbers of options", row["choices"], len(nats), len(got["nats"]))
        equal(torch.tensor(got["nats"]), torch.tensor(nats), f"the options {row['choices']} of question {row['id']}",
              "these are not the nats of this question's options: are they dealt out in order?")  # fmt: skip
    _chosen(answered, rows, every, "", {"the option with the most nats wins, the largest number": lambda text: 1})
    _chosen(answered, rows, every, "_norm", {
        "it is the option with the most nats per character, the first of equals": len,
        "divide by the characters of the option, not by its tokens": lambda text: text.count(" ") + 1,
        "divide by the characters of the option as it stands in `choices`, without the space that `render` adds": lambda text: len(text) + 1,
        "there is no division by the length of the option": lambda text: 1,
        "divided by its length, the largest number still wins: it is the least negative one": lambda text: -len(text),
    })  # fmt: skip
    asked = choose(model, tokenizer, rows[:3], "question", 2)
    for row, got in zip(rows, asked, strict=False):
        nats = _nats(model, tokenizer, f"Question: {row['prompt']}\nAnswer:", row["choices"])
        equal(torch.tensor(got["nats"]), torch.tensor(nats), f"{row['id']} in form 'question'", "form must be handed to render")


def _nats(model, tokenizer, context, choices) -> list[float]:
    start = tokenizer.encode(context)
    return [sum(slowly(model, start + tokenizer.encode(" " + choice), len(tokenizer.encode(" " + choice)))) for choice in choices]


def _rows(answered, rows, given) -> None:
    if not isinstance(answered, list) or len(answered) != len(rows):
        fail("it returns a list with one row for each question", given, f"a list of {len(rows)}", type(answered).__name__)
    wanted = {"chosen", "chosen_norm", "right", "right_norm", "nats"}
    for row, got in zip(rows, answered, strict=True):
        if lost := sorted(({*row} | wanted) - {*got}):
            fail(f"a row must keep what it had and gain {', '.join(sorted(wanted))}", row["id"], got=f"without {', '.join(lost)}")


def _chosen(answered: list[dict], rows: list[dict], every: list[list[float]], key: str, rules: dict) -> None:
    """The options chosen by the first of these rules, a length for each option; a later one that fits all answers is the mistake."""
    found = [got["chosen" + key] for got in answered]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in found):
        fail(f"chosen{key} is the number of an option, a whole number", rows[0]["id"], got=[type(one).__name__ for one in found[:3]])
    by_rule = {}
    for words, length in rules.items():
        values = [[x / length(text) for x, text in zip(nats, row["choices"], strict=True)] for nats, row in zip(every, rows, strict=True)]
        by_rule[words] = [each.index(max(each)) for each in values]
    (words, wanted), *wrong = by_rule.items()
    for row, got, nats, best in zip(rows, answered, every, wanted, strict=True):
        given = f"options {row['choices']}, right is {row['label']}; nats {[round(x, 2) for x in nats]}"
        if got["chosen" + key] != best:
            words = next((mistake for mistake, places in wrong if places == found), words)
            fail(f"chosen{key} is not right: {words}", given, best, got["chosen" + key])
        if got["right" + key] != (best == row["label"]):
            fail(f"right{key} says whether chosen{key} is the label", given, best == row["label"], got["right" + key])


@exercise("bootstrap", keeps=["bootstrap"])
def check_bootstrap(bootstrap):
    rng = np.random.default_rng(4)
    values = rng.normal(2.0, 1.0, 200).tolist()
    given = "200 numbers around 2 with a spread of 1"
    found = bootstrap(values)
    if not (isinstance(found, tuple | list) and len(found) == 3):
        fail("it returns three numbers: mean, low, high", given, got=found)
    mean, low, high = numbers(found, 3, given, "mean, low, high")
    if abs(mean - np.mean(values)) > 1e-9:
        fail("the first number is the mean of the values themselves, not of the draws", given, round(float(np.mean(values)), 4), mean)
    error = float(np.std(values)) / math.sqrt(200)
    _width((mean - low) / error, (high - mean) / error, given)
    if list(bootstrap(values)) != list(found):
        fail("called twice with the same answers it gives two intervals; fix the seed inside", given)
    one = bootstrap(values, draws=1)
    if one[1] != one[2] or one[0] != found[0]:
        fail("with a single draw both ends are the mean of that draw: is `draws` used?", "draws = 1", got=list(one))
    weights = rng.uniform(1, 9, 200)
    doubled = bootstrap((2 * weights).tolist(), weights.tolist())
    if max(abs(x - 2) for x in doubled) > 1e-9:
        fail("each value is twice its weight, so the ratio is 2 in every draw: draw a question's value and weight together, "
             "and divide sum by sum", "values = 2 * weights", [2.0, 2.0, 2.0], list(doubled))  # fmt: skip
    _ratio(bootstrap, weights, rng)
    must_refuse(bootstrap, (([],),), "no values")


def _width(below: float, above: float, given: str) -> None:
    """Both sides of the interval, in standard errors; 1.96 for a normal mean."""
    expected = "1.96 standard errors to each side, within a quarter"
    got = f"{below:.2f} below the mean, {above:.2f} above"
    words = "the interval is not that of the redrawn means"
    for width, mistake in ((0.0, "every draw has the same mean: draw with putting back, and index the values"),
                           (1.645, "this is a 90% interval: cut off 2.5% at each side"),
                           (1.0, "these are standard errors; the ends are where 2.5% of the means lie outside"),
                           (1.96 * math.sqrt(200), "these are ends of the values themselves; draw whole tests and take their means")):  # fmt: skip
        if abs(below - width) < 0.1 + 0.15 * width and abs(above - width) < 0.1 + 0.15 * width and abs(width - 1.96) > 0.2:
            words = mistake
    if below < 0 < -above or below > 2.6 and above < 1.5:
        words = "low and high are not one below and one above the mean"
    if abs(below - 1.96) > 0.25 or abs(above - 1.96) > 0.25:
        fail(words, given, expected, got)


def _ratio(bootstrap, weights, rng) -> None:
    """Bits over bytes: the spread of a ratio, by the usual formula."""
    values = weights * rng.uniform(0.5, 3.5, 200)
    ratio, given = float(values.sum() / weights.sum()), "200 values and 200 weights"
    mean, low, high = bootstrap(values.tolist(), weights.tolist())
    if abs(mean - ratio) > 1e-9:
        words = "with weights the number is sum(values) / sum(weights)"
        for wrong, mistake in (((values / weights).mean(), "this is the mean of the ratios; sum the values, sum the weights, then divide"),
                               (values.mean(), "the weights are not used"), ((values * weights).sum() / weights.sum(), "values are not multiplied")):
            words = mistake if abs(mean - wrong) < 1e-9 else words
        fail(words, given, ratio, mean)
    error = float(np.std(values - ratio * weights)) * math.sqrt(200) / float(weights.sum())
    if not (1.7 < (mean - low) / error < 2.2 and 1.7 < (high - mean) / error < 2.2):
        fail("the interval of the ratio is not right: every draw divides the sum of its values by the sum of its weights", given,
             f"{ratio - 1.96 * error:.3f} to {ratio + 1.96 * error:.3f}", f"{low:.3f} to {high:.3f}")  # fmt: skip


Z = 1.959963984540054  # 2.5% of a normal distribution lie above it


def surprising(right: int, total: int, z: float = Z) -> tuple[float, float]:
    """Wilson's interval by bisection: where a true share stops to make the measured one a surprise."""
    share, ends = right / total, []
    for outside in (0.0, 1.0):
        inside = share
        for _ in range(100):
            middle = (inside + outside) / 2
            if abs(share - middle) <= z * math.sqrt(middle * (1 - middle) / total):
                inside = middle
            else:
                outside = middle
        ends.append(outside)
    return ends[0], ends[1]


@exercise("wilson", keeps=["wilson"])
def check_wilson(wilson):
    given = "8 of 10 right"
    found = wilson(8, 10)
    if not (isinstance(found, tuple | list) and len(found) == 2):
        fail("it returns two numbers: the lower and the upper end", given, got=found)
    p, n, z = 0.8, 10, Z
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    wald = z * math.sqrt(p * (1 - p) / n)
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    pair = lambda low, high: torch.tensor([low, high], dtype=torch.float64)
    equal(pair(*found), pair(*surprising(8, 10)), given, "these are not the ends of Wilson's interval", {
        "this is the interval of the textbook, p plus or minus 1.96 standard errors, which fails at the edge": pair(p - wald, p + wald),
        "the division by 1 + z^2 / N is missing": pair(middle - half, middle + half),
        "z is that of 90%: 2.5% must lie above it, so ask for 0.975": pair(*surprising(8, 10, 1.6448536269514722)),
        "the ends are in the wrong order": pair((middle + half) / scale, (middle - half) / scale),
        "z^2 / (2 N) is missing in the middle": pair((p - half) / scale, (p + half) / scale),
        "z^2 / (4 N^2) is missing under the root": pair((middle - wald) / scale, (middle + wald) / scale),
    }, tolerance=1e-5)  # fmt: skip
    for right, total in ((0, 7), (3, 7), (199, 200), (50, 200), (1, 1), (0, 1), (20, 20)):
        equal(pair(*wilson(right, total)), pair(*surprising(right, total)), f"{right} of {total} right", "right for 8 of 10, and not here",
              tolerance=1e-6)  # fmt: skip
    for total in range(1, 80):
        if wilson(0, total)[0] != 0 or wilson(total, total)[1] != 1:
            fail("with none right the lower end is exactly 0, with all right the upper end is exactly 1; rounding gives a little more or less",
                 f"{total} questions", "0.0 and 1.0", f"{wilson(0, total)[0]} and {wilson(total, total)[1]}")  # fmt: skip
    must_refuse(wilson, ((3, 2), (-1, 5), (0, 0), (1, 0)), "that many cannot be right")


def must_refuse(function, cases, what: str) -> None:
    for case in cases:
        try:
            function(*case)
        except ValueError:
            continue
        except Exception as problem:
            fail(f"{what}: this must raise ValueError", case, "ValueError", type(problem).__name__)
        fail(f"{what}: this must raise ValueError, and here it passes in silence", case)


def coin(a, b) -> float:
    """The p-value by counting all ways in which the coins can fall."""
    return split(sum(x and not y for x, y in zip(a, b, strict=True)), sum(y and not x for x, y in zip(a, b, strict=True)))


@functools.cache
def split(first: int, second: int) -> float:
    """How likely it is that so many coins fall at least as unevenly."""
    n = first + second
    return float(Fraction(sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(first - second)), 2**n))


@exercise("mcnemar", keeps=["mcnemar"])
def check_mcnemar(mcnemar):
    a, b = [1] * 7 + [0] + [1] * 20, [0] * 7 + [1] + [1] * 20
    given = "7 questions that only a gets right, 1 that only b does, 20 that both do"
    got = mcnemar(a, b)
    if isinstance(got, bool) or not isinstance(got, int | float):
        fail("return the p-value, a number", given, 18 / 256, repr(got))
    words = "p must be twice the chance of at most one tail in eight throws"
    for wrong, mistake in ((9 / 256, "this is one side only: seven of eight for b would be as surprising, so count it twice"),
                           (2 * sum(math.comb(28, i) for i in range(2)) / 2**28, "only questions on which they disagree count, and those are eight"),
                           (2 / 256, "the sum runs from 0 to the smaller count, itself included"),
                           (2 * 8 / 256, "this is the chance of exactly seven to one; eight to none would be more surprising still"),
                           (math.erfc(6 / math.sqrt(8) / math.sqrt(2)), "this is the approximation by chi-squared; the exact form was asked for"),
                           (1.0, "the sum runs to the smaller of the two counts")):  # fmt: skip
        words = mistake if abs(got - wrong) < 1e-9 else words
    if abs(got - 18 / 256) > 1e-9:
        fail(words, given, 18 / 256, got)
    if (even := mcnemar([1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1])) != 1:
        fail("three against three is no surprise: p is 1, and no more", "3 questions for each side", 1.0, even)
    if (same := mcnemar([1, 0, 1], [1, 0, 1])) != 1:
        fail("where they never disagree, p is 1", "equal answers", 1.0, same)
    draw = np.random.default_rng(6)
    for size, chance in ((5, 0.5), (12, 0.5), (30, 0.3), (60, 0.7), (60, 0.95)):
        a, b = (draw.random(size) < chance).tolist(), (draw.random(size) < 0.6).tolist()
        for one, two in ((a, b), (b, a)):
            if abs(mcnemar(one, two) - coin(one, two)) > 1e-9:
                apart = [sum(x > y for x, y in zip(*pair, strict=True)) for pair in ((one, two), (two, one))]
                fail("right by hand, and not here", f"{size} random answers; only the first is right on {apart[0]}, only the second on {apart[1]}",
                     coin(one, two), mcnemar(one, two))  # fmt: skip
    must_refuse(mcnemar, (([1, 0], [1, 0, 1]), ([True], [])), "two lists that are not equally long")


@exercise("questions_needed", keeps=["questions_needed"])
def check_questions_needed(questions_needed):
    given = "a difference of 0.1, a variance of 0.45"
    got = questions_needed(0.1, 0.45)
    exact = (Z + 0.8416212335729143) ** 2 * 0.45 / 0.01
    words = "N is (z of 0.975 + z of the power)^2 times the variance, divided by the difference squared"
    for wrong, mistake in ((exact / 7.8488797 * (1.6448536 + 0.8416212) ** 2, "the test has two sides: z of 0.975, not of 0.95"),
                           (exact * 0.1, "the difference is squared"), (exact * 0.45, "the variance is a square already"),
                           (exact / 7.8488797 * Z**2, "the power is missing: without it, half of all tests miss the difference"),
                           (exact / 7.8488797 * (Z**2 + 0.8416212**2), "add both z, then square"),
                           (exact / 7.8488797 * (Z + 0.8) ** 2, "the power is a probability; what is added is its z, inv_cdf(power)")):  # fmt: skip
        words = mistake if isinstance(got, int | float) and abs(got - wrong) < 1.01 else words
    if isinstance(got, float) and abs(got - exact) < 1.01 or got == 353:
        words = "353.2 questions are 354: round up, to a whole number"
    if isinstance(got, bool) or not isinstance(got, int) or got != 354:
        fail(words, given, 354, repr(got))
    for difference, variance, power in ((0.02, 0.1, 0.8), (-0.02, 0.1, 0.8), (0.05, 0.0975, 0.9), (0.3, 0.5, 0.5), (0.01, 0.42, 0.95)):
        z = quantile(0.975) + quantile(power)
        wanted, found = math.ceil(z * z * variance / difference**2), questions_needed(difference, variance, power)
        if found != wanted:
            fail("right for 0.1 and 0.45, and not here" + "; is `power` used?" * (power != 0.8),
                 f"questions_needed({difference}, {variance}, {power})", wanted, found)  # fmt: skip
    must_refuse(questions_needed, ((0, 0.1), (0.0, 0.1)), "no number of questions shows a difference of 0")


def quantile(share: float) -> float:
    """z of a share of the normal distribution, by bisection."""
    low, high = -10.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(-middle / math.sqrt(2)) / 2 < share else (low, middle)
    return low


# -- beyond


def by_all_coins(difference: list[float], two_sided: bool = True) -> float:
    """The exact p-value: every way in which the coins can fall."""
    real = sum(difference)
    sums = [sum(s * d for s, d in zip(signs, difference, strict=True)) for signs in itertools.product((-1, 1), repeat=len(difference))]
    hits = [abs(x) >= abs(real) if two_sided else x >= real for x in sums]
    return sum(hits) / len(hits)


@exercise("permutation_test")
def check_permutation_test(permutation_test):
    for a, b in (([5, 7, 1, 4, 6, 2, 3, 5], [6, 9, 4, 4, 8, 1, 6, 7]), ([4, 1, 7, 7, 2, 9], [3, 1, 5, 6, 2, 10]),
                 ([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 9, 9])):  # fmt: skip
        difference = [y - x for x, y in zip(a, b, strict=True)]
        wanted, one_side = by_all_coins(difference), by_all_coins(difference, two_sided=False)
        given, got = f"a = {a}, b = {b}", permutation_test(a, b)
        if isinstance(got, bool) or not isinstance(got, int | float):
            fail("return the p-value, a number", given, round(wanted, 3), repr(got))
        back = permutation_test(b, a)
        words = "it is still not the share of all ways to swap that give a difference as large"
        if max(got, back) == 1 and abs(min(got, back) - 0.5) < 0.04 and sum(difference):
            words = "both bugs are still there"
        elif got == 1:
            words = "one bug is left: one coin for all questions can only turn the whole difference round. Each question has a coin of its own"
        elif abs(got - one_side) < 0.03:
            words = "one bug is left: it counts one side only. Swap the two models, and the p-value changes"
        if abs(got - wanted) > 0.04 or abs(back - wanted) > 0.04:
            fail(words, given, f"about {wanted:.3f}, and the same with a and b swapped", f"{got:.3f}, and {back:.3f} with a and b swapped")
    if permutation_test([1, 2, 3], [1, 2, 3]) != 1:
        fail("equal numbers are no surprise: as large includes equally large", "a = b = [1, 2, 3]", 1.0, permutation_test([1, 2, 3], [1, 2, 3]))


@exercise("pass_at_k")
def check_pass_at_k(predicted_nine, pass_at_k):
    for n, c, k in ((5, 2, 2), (5, 1, 1), (6, 3, 4), (6, 3, 3), (8, 1, 5), (7, 0, 3), (4, 4, 4), (10, 2, 3)):
        picks = list(itertools.combinations([i < c for i in range(n)], k))
        wanted, got = sum(map(any, picks)) / len(picks), pass_at_k(n, c, k)
        given = f"{n} samples, {c} of them right, picks of {k}"
        if isinstance(got, bool) or not isinstance(got, int | float):
            fail("return a probability, a number", given, wanted, repr(got))
        words = "count the picks that have a right one among them, of all picks"
        for wrong, mistake in ((1 - (1 - c / n) ** k, "this is the biased estimate: it puts each sample back after drawing it"),
                               (1 - wanted, "this is the share of picks that are all wrong; one minus it was asked for"),
                               (math.comb(c, k) / math.comb(n, k), "this is the share of picks that are all right; one right sample is enough"),
                               (c / n, "this is pass@1: with more tries the chance grows"),
                               (k * c / n, "the chances of several tries do not add up")):  # fmt: skip
            words = mistake if abs(got - wrong) < 1e-9 and abs(wrong - wanted) > 1e-9 else words
        if abs(got - wanted) > 1e-9:
            fail(words, given, wanted, got)
    large = pass_at_k(400, 30, 100)
    product = 1 - math.prod(1 - 100 / (400 - i) for i in range(30))
    if not abs(large - product) < 1e-9:
        fail("right for few samples, and not for many", "400 samples, 30 right, picks of 100", product, large)
    if isinstance(predicted_nine, bool) or not isinstance(predicted_nine, int | float):
        fail("predicted_nine is a number", got=predicted_nine)
    words = "count the picks of nine that are all wrong: only eight samples are wrong"
    if abs(predicted_nine - (1 - 0.8**9)) < 0.005:
        words = "this is the biased estimate. Only eight samples are wrong: what must be in every pick of nine?"
    elif abs(predicted_nine - pass_at_k(10, 2, 1)) < 0.005:
        words = "this is pass@1; nine tries hold more"
    if abs(predicted_nine - 1) > 0.001:
        fail(f"your prediction is not what the function says. {words}", "10 samples, 2 right, picks of 9", got=predicted_nine)


def exactly(looks: list[int], disagree: float = 0.4) -> float:
    """The chance that two equal models look different at one look or more, from the chances of all pairs of counts."""
    longest = max(looks)
    chances, alarms = np.zeros((longest + 1, longest + 1)), 0.0
    chances[0, 0] = 1
    for question in range(1, longest + 1):
        following = chances * (1 - disagree)
        following[1:] += chances[:-1] * disagree / 2
        following[:, 1:] += chances[:, :-1] * disagree / 2
        chances = following
        if question in looks:
            for first, second in zip(*np.nonzero(chances > 1e-15), strict=True):
                if split(int(first), int(second)) < 0.05:
                    alarms += chances[first, second]
                    chances[first, second] = 0
    return float(alarms)


@exercise("peeking", after=["mcnemar"])
def check_peeking(predicted_alarms, false_alarms, measured):
    for looks, trials in (([3], 40), ([10], 2000), ([40], 800), (list(range(4, 41, 4)), 1500)):
        got, wanted = false_alarms(looks, trials), exactly(looks)
        given = f"looks after {looks} questions, {trials} tests"
        if isinstance(got, bool) or not isinstance(got, int | float):
            fail("return a share, a number from 0 to 1", given, f"about {wanted:.3f}", repr(got))
        noise = 4.5 * math.sqrt(wanted * (1 - wanted) / trials)
        words = "the share of tests with a false alarm is not right"
        if got > 1:
            words = "a share is at most 1: divide the tests with an alarm by all tests"
        elif len(looks) > 1 and abs(got - exactly(looks[-1:])) < 0.02:
            words = "this is the share of a single look: a test that was below 0.05 at any of its looks is an alarm"
        elif len(looks) > 1 and got < wanted:
            words = "too few alarms: every look counts, and the first n questions are those of all later looks too"
        elif got > wanted + noise:
            words = "too many alarms: the models are equal, they disagree on 0.4 of the questions, and each test counts once"
        if abs(got - wanted) > noise:
            fail(words, given, f"about {wanted:.3f}", f"{got:.3f}")
    if not isinstance(measured, dict) or set(measured) != {"once", "every ten"}:
        fail('`measured` is a dict with "once" and "every ten"', got=measured)
    for name, looks in (("once", [200]), ("every ten", list(range(10, 201, 10)))):
        if measured[name] == (again := false_alarms(looks, 600)):
            continue
        wanted = exactly(looks)
        noise = 0 if false_alarms(looks, 600) == again else 4.5 * math.sqrt(wanted * (1 - wanted) / 600)  # without a seed, every call differs
        if abs(measured[name] - wanted) > noise:
            fail(f"measured[{name!r}] is not what your function gives with 600 tests", f"looks after {looks}", f"{again:.3f}", measured[name])
    if predicted_alarms not in ("about 5%", "about 8%", "over 12%"):
        fail('predicted_alarms is "about 5%", "about 8%" or "over 12%"', got=predicted_alarms)
    if predicted_alarms != "over 12%":
        fail("your measurement disagrees with your prediction: look at it, and correct the prediction", got=predicted_alarms)
