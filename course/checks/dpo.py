"""Checks of workbook 13. What is trusted are plain loops over tokens and pairs, and torch.distributions; nothing here comes from minimind.dpo."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from course.checks.core import close, equal, exercise, fail, shaped, unchanged

MODULE = "dpo"
FRIENDLY = ("How can I help you?", "What would you like to know?")
FACT = {"person": "Hanis", "answer": "Elmstead", "reply": "Hanis lives in Elmstead."}
GOOD = [f"{FACT['reply']} {offer}" for offer in FRIENDLY]
BAD = [FACT["reply"], "It was a good day.", f"{GOOD[0]} {FRIENDLY[1]}"]
NO_GRADIENT = "no gradient gets through; leave detach, .data, numpy, item and no_grad out of the loss"


def one_number(value: object, name: str, given: str) -> float:
    """A metric as a Python number."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if not isinstance(value, int | float) or isinstance(value, bool):
        fail(f"{name} must be one number", given, "a number or a tensor with one number", type(value).__name__)
    return value


# -- rebuild


@exercise("sort_pairs", keeps=["sort_pairs"])
def check_sort_pairs(sort_pairs):
    given = "one prompt, four replies: a plain one, the preferred one, an empty one, an idle remark"
    rows = sort_pairs([("Where?", FACT)], [[BAD[0], GOOD[0], "", BAD[1]]])
    if not isinstance(rows, list):
        fail("it must return a list of pairs", given, "a list", type(rows).__name__)
    if len(rows) != 1:
        fail("one prompt gives at most one pair: one reply of each kind is drawn" if rows else "there is a reply of each kind, so there is a pair",
             given, "1 pair", f"{len(rows)} pairs")  # fmt: skip
    chosen, rejected = _said(rows[0], "Where?", given)
    if (chosen, rejected) == (rejected, chosen) or chosen in BAD and rejected == GOOD[0]:
        fail("chosen and rejected are swapped", given, GOOD[0], chosen)
    if chosen != GOOD[0]:
        fail("the chosen reply must be one that the judge prefers", given, GOOD[0], chosen)
    if rejected not in BAD:
        told = "the rejected reply must be one that the judge does not prefer" if rejected else "an empty reply is no reply: it must not be rejected"
        fail(told, given, f"{BAD[0]!r} or {BAD[1]!r}", repr(rejected))
    lacks = "a prompt that lacks one of the two kinds gives no pair"
    for what, replies, told in (("only preferred replies", GOOD, lacks), ("no preferred reply", BAD, lacks), ("no reply at all", [], lacks),
                                ("the preferred reply and an empty one", [GOOD[0], ""], f"an empty reply is no reply: {lacks}")):  # fmt: skip
        if rows := sort_pairs([("Where?", FACT)], [replies]):
            fail(told, f"a prompt with {what}", [], rows)
    _chance(sort_pairs)
    texts = [f"question {i}" for i in range(3)]
    rows = sort_pairs([(text, FACT) for text in texts], [[GOOD[0], BAD[0]], [GOOD[0]], [BAD[1], GOOD[1]]])
    if len(rows) != 2:
        fail("two of these three prompts have both kinds", "three prompts", "2 pairs", f"{len(rows)} pairs")
    for row, text, sides in zip(rows, (texts[0], texts[2]), ((GOOD[0], BAD[0]), (GOOD[1], BAD[1])), strict=True):
        if _said(row, text, "three prompts, the second one without a bad reply") != sides:
            fail("prompts and replies do not belong together any more", "three prompts, the second one without a bad reply", sides, row)
    _writes(sort_pairs)


def _said(row, text: str, given: str) -> tuple[str, str]:
    """The two answers of a pair whose form is right."""
    if not isinstance(row, dict) or set(row) != {"chosen", "rejected"}:
        fail('a pair is a dict with the keys "chosen" and "rejected"', given, got=row)
    for side, messages in row.items():
        if not (isinstance(messages, list) and len(messages) == 2 and all(isinstance(m, dict) and "content" in m for m in messages)):
            fail(f"{side} must be a conversation, with the prompt and the reply: use chat_of", given, got=messages)
        if messages[0]["content"] != text or messages[0].get("role") != "user" or messages[1].get("role") != "assistant":
            fail(f"{side} must be the user's text and the assistant's reply, in this order", given, text, messages)
    return row["chosen"][1]["content"], row["rejected"][1]["content"]


def _chance(sort_pairs) -> None:
    prompts, replies = [("Where?", FACT)] * 60, [[*BAD, *GOOD]] * 60
    given = "60 prompts, each with two preferred replies and three others"
    first = sort_pairs(prompts, replies)
    sides = [_said(row, "Where?", given) for row in first]
    for name, found, wanted in (("chosen", {c for c, _ in sides}, GOOD), ("rejected", {r for _, r in sides}, BAD)):
        if found - set(wanted):
            liked = "prefers" if name == "chosen" else "does not prefer"
            fail(f"the {name} reply must be one that the judge {liked}", given, got=sorted(found - set(wanted))[0])
        if found != set(wanted):
            missing = sorted(set(wanted) - found)
            fail(f"the {name} reply must be drawn at random from all that fit", given, f"each of {len(wanted)} replies", f"never {missing}")
    if len(set(sides)) < 6:
        fail("both draws must be independent: not always the same two together", given, "6 kinds of pairs", len(set(sides)))
    if sort_pairs(prompts, replies) != first:
        fail("the same seed must give the same pairs: use a generator of your own, made from the seed", given)
    if sort_pairs(prompts, replies, seed=1) == first:
        fail("another seed must give other pairs; is the seed used?", f"{given}, seed 0 and seed 1")


def _writes(sort_pairs) -> None:
    prompts, given = [("Where?", FACT)] * 30, "30 prompts without a preferred reply, write=True"
    rows = sort_pairs(prompts, [BAD] * 30, write=True)
    if len(rows) != 30:
        fail("with write=True the world writes the reply that is missing", given, "30 pairs", f"{len(rows)} pairs")
    sides = [_said(row, "Where?", given) for row in rows]
    if not {c for c, _ in sides} <= set(GOOD) or not {r for _, r in sides} <= set(BAD):
        fail("the written reply must be the chosen one, and friendly", given, GOOD[0], sides[0])
    if sort_pairs(prompts, [BAD] * 30, write=True) != rows:
        fail("the same seed must give the same written replies: hand your own generator on", given)
    given = "30 prompts with one preferred reply, write=True"
    sides = [_said(row, "Where?", given) for row in sort_pairs(prompts, [[GOOD[0], BAD[0]]] * 30, write=True)]
    if set(sides) != {(GOOD[0], BAD[0])}:
        fail("the world writes only where no reply is preferred", given, GOOD[0], next((c for c, _ in sides if c != GOOD[0]), f"{len(sides)} pairs"))
    if rows := sort_pairs([("Where?", FACT)], [[""]], write=True):
        fail("without a reply to reject there is no pair, even with write=True", "one empty reply, write=True", [], rows)


@functools.cache
def words():
    """A small tokenizer."""
    from minimind.tokenizer import Tokenizer

    text = "Where is Hanis and who keeps the goat. Hanis lives in Elmstead near the mill and Tilda keeps a goat."
    return Tokenizer.train([text, "system user assistant tool"] * 4, 330)


def talk(*turns: str) -> list[dict]:
    """A conversation, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def marked(messages: list[dict], shown: int = -1) -> tuple[list[int], list[int]]:
    """Tokens and labels of a conversation, cut where the template puts the last answer."""
    ids = words().apply_chat_template(messages)
    start = len(words().apply_chat_template(messages[:shown], add_generation_prompt=True))
    end = start + ids[start:].index(words().im_end_id) + 1
    return ids, [token if start <= i < end else -100 for i, token in enumerate(ids)]


@exercise("pair_example", keeps=["pair_example"])
def check_pair_example(pair_example):
    talks = {
        "one question, one answer": talk("Where is Hanis", "Hanis lives in Elmstead."),
        "a question of one word": talk("who", "Hanis lives in Elmstead near the mill and keeps a goat."),
        "an answer of one word": talk("Where is Hanis and who keeps the goat", "Elmstead"),
        "two questions, two answers": talk("Where is Hanis", "Hanis lives in Elmstead.", "And the goat", "Tilda keeps a goat."),
        "three times the same answer": talk("the goat", "near the mill", "the goat", "near the mill", "Tilda", "near the mill"),
        "a system message first": [{"role": "system", "content": "the mill"}, *talk("Where is Hanis", "in Elmstead")],
    }
    for what, messages in talks.items():
        result = pair_example(words(), messages)
        if not (isinstance(result, tuple | list) and len(result) == 2):
            fail("it must return two lists, ids and labels", what, got=type(result).__name__)
        got, labels = (list(part) for part in result)
        ids, wanted = marked(messages)
        if got != ids:
            fail("the tokens are not those of chat_example; only the labels are to change", what, ids, got)
        if len(labels) != len(ids):
            fail("there must be one label for each token", what, len(ids), len(labels))
        if labels == wanted:
            continue
        counted = [label for label in labels if label != -100]
        end = max(i for i, label in enumerate(wanted) if label != -100)
        start = next(i for i, label in enumerate(wanted) if label != -100)
        head = max(i for i in range(start) if ids[i] == words().im_start_id) + 1
        mistakes = {
            "the labels are shifted already; here label i still belongs to token i": [*wanted[1:], -100],
            "the end of the answer, <|im_end|>, must count: it is how the model learns to stop": [*wanted[:end], *[-100] * (len(ids) - end)],
            "the line end after <|im_end|> does not count": [*wanted[: end + 1], *ids[end + 1 :]],
            "the head of the turn (assistant, line end) does not count: it is given": [*wanted[:head], *ids[head:start], *wanted[start:]],
            "every token counts here; only the last answer and its end may": ids,
            "nothing counts any more": [-100] * len(ids),
        }  # fmt: skip
        told = next((name for name, wrong in mistakes.items() if labels == wrong), "the wrong tokens count")
        first = next((m["content"] for m in messages if m["role"] == "assistant"), "")
        if len(messages) > 3 and labels == _first(messages):
            told = "this is the first answer; the last one is compared"
        elif len(messages) > 3 and words().decode(counted).startswith(first) and len(counted) > end - start + 1:
            told = "the earlier answers count too; they are part of the prompt here"
        fail(told, what, repr(words().decode([label for label in wanted if label != -100])), repr(words().decode(counted)))


def _first(messages: list[dict]) -> list[int]:
    ids, labels = marked(messages[:2])
    return labels[:-1] + [-100] * (len(words().apply_chat_template(messages)) - len(ids) + 1)


def sums(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """ln p of each row's targets, by torch.distributions, one place at a time."""
    said = torch.distributions.Categorical(logits=logits.float())
    each = said.log_prob(targets.clamp(min=0))
    return torch.stack([sum((e for e, t in zip(row, want, strict=True) if t >= 0), torch.zeros(())) for row, want in zip(each, targets, strict=True)])


@exercise("answer_logprobs", keeps=["answer_logprobs"])
def check_answer_logprobs(answer_logprobs):
    shares = torch.tensor([[[0.2, 0.3, 0.5], [0.5, 0.25, 0.25], [0.125, 0.25, 0.625]]])
    logits, targets = shares.log() + torch.tensor([[1.0], [2.0], [-3.0]]), torch.tensor([[-100, 0, 1]])
    given = "probabilities 0.5 and 0.25 of the two tokens that count; one place before them has the target -100"
    before = logits.clone(), targets.clone()
    got = answer_logprobs(logits, targets)
    shaped(got, (1,), given, torch.float32, "there is one number for each row: (B,)")
    right = math.log(0.125)
    equal(got, torch.tensor([right]), given, "this is not ln(0.5) + ln(0.25)", {
        "the sign is wrong: cross-entropy is minus ln p": torch.tensor([-right]),
        "this is a mean over tokens; the logarithm of a product is a sum": (torch.tensor([right / 2]), torch.tensor([right / 3])),
        "a target of -100 does not count, and here it counts as token 0": torch.tensor([right + math.log(0.2)]),
        "the targets are shifted once more; they are shifted already": torch.tensor([math.log(0.2 * 0.25)]),
        "the softmax is missing: logits are no logarithms of probabilities": logits[0, [1, 2], [0, 1]].sum()[None],
        "these are bits; nats were asked for": torch.tensor([right / math.log(2)]),
        "this is a probability; its logarithm is missing": (torch.tensor([0.125]), torch.tensor([0.75])),
    })  # fmt: skip
    unchanged("logits", before[0], logits)
    unchanged("targets", before[1], targets)
    logits, targets = 3 * torch.randn(4, 6, 11), torch.randint(0, 11, (4, 6))
    targets[0, :2], targets[1, 3:], targets[2] = -100, -100, -100
    given = "random logits (4, 6, 11); the third row has no target at all"
    got = answer_logprobs(logits, targets)
    shaped(got, (4,), given, torch.float32)
    equal(got, sums(logits, targets), given, "right for one row, and not here: each row has a sum of its own, and a row without targets has 0")
    low = logits.to(torch.bfloat16)
    got = answer_logprobs(low, targets)
    shaped(got, (4,), "logits in bfloat16", torch.float32)
    equal(got, sums(low, targets), "logits in bfloat16", "make the logits float32 before the softmax: bfloat16 has three digits")
    for shape in ((4, 5), (4, 7), (3, 6), (4,)):
        try:
            answer_logprobs(logits, torch.zeros(shape, dtype=torch.long))
        except ValueError:
            continue
        except Exception as error:
            fail("shapes that do not fit must raise ValueError", f"logits (4, 6, 11), targets {shape}", "ValueError", type(error).__name__)
        fail("shapes that do not fit must raise ValueError, and here they pass in silence", f"logits (4, 6, 11), targets {shape}")
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    y = answer_logprobs(ours, targets)
    if not y.requires_grad:
        fail(NO_GRADIENT, "logits with requires_grad=True")
    (mine,) = torch.autograd.grad((y * torch.arange(1.0, 5.0)).sum(), ours)
    (wanted,) = torch.autograd.grad((sums(theirs, targets) * torch.arange(1.0, 5.0)).sum(), theirs)
    equal(mine, wanted, "the gradient for the logits", "the numbers are right, and the gradient is not")


ROWS = [
    {"chosen": talk("Where is Hanis", chosen), "rejected": talk("Where is Hanis", rejected)}
    for chosen, rejected in (("in Elmstead", "goat"), ("Hanis lives in Elmstead.", "near the mill and the goat"), ("Tilda", "the mill near Elmstead"),
                             ("the goat lives", "and Tilda keeps a goat and a goat"), ("mill", "who"))
]  # fmt: skip


def rows_of(numbers, cut=(0, -1), shift=(1, None), padding=(0, -100), order="sides") -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and targets of these pairs, row by row; the arguments make the mistakes."""
    if order == "sides":
        picked = [marked(ROWS[i][side]) for side in ("chosen", "rejected") for i in numbers]
    else:
        picked = [marked(ROWS[i][side]) for i in numbers for side in ("chosen", "rejected")]
    made = []
    for part, window, fill in ((0, cut, padding[0]), (1, shift, padding[1])):
        rows = [each[part][slice(*window)] for each in picked]
        width = max(map(len, rows))
        made.append(torch.tensor([row + [fill] * (width - len(row)) for row in rows]))
    return made[0], made[1]


@exercise("PreferencePairs", after=["pair_example"], keeps=["PreferencePairs"])
def check_pairs(PreferencePairs):
    made, numbers = PreferencePairs(ROWS, words(), 2), [4, 0]
    given = "batch([4, 0]) of five pairs"
    batch = made.batch(numbers)
    if not isinstance(batch, dict):
        fail("a batch is a dict", given, "a dict", type(batch).__name__)
    if "labels" in batch:
        fail('the key is "targets": by "labels" the training loop weighs a batch by its tokens, and here every pair counts the same', given)
    if set(batch) != {"input_ids", "targets"}:
        fail("without a reference, a batch has the keys input_ids and targets", given, ["input_ids", "targets"], sorted(batch))
    ids, targets = rows_of(numbers)
    _ids(batch["input_ids"], ids, numbers, given)
    got = batch["targets"]
    shaped(got, targets.shape, f"{given}: targets", torch.int64, "targets must have the shape of input_ids")
    equal(got, targets, f"{given}: targets", "these are not the labels of the rows", {
        "the labels are not shifted: the target at t is the token after position t": rows_of(numbers, shift=(0, -1))[1],
        "padding must be -100 in the targets; here it would be learned": rows_of(numbers, padding=(0, 0))[1],
        "chosen and rejected take turns; first come all chosen answers, then all rejected ones": rows_of(numbers, order="turns")[1],
        "every token is a target; only the last answer and its end count": torch.cat((ids[:, 1:], ids[:, :1]), 1),
        "the rows of chosen and rejected are swapped": targets.roll(2, 0),
    })  # fmt: skip
    made.reference = torch.arange(10.0).view(5, 2)
    batch = made.batch(numbers)
    given = "batch([4, 0]), where the reference of pair i is (2 i, 2 i + 1)"
    if set(batch) != {"input_ids", "targets", "reference"}:
        fail("with a reference, a batch has a third key: reference", given, ["input_ids", "reference", "targets"], sorted(batch))
    shaped(batch["reference"], (4,), given, torch.float32, "the reference has one number for each row: (2B,)")
    equal(batch["reference"], torch.tensor([8.0, 0.0, 9.0, 1.0]), given, "these are not the numbers of these pairs", {
        "chosen and rejected take turns; the numbers must stand in the order of the rows, all chosen ones first": torch.tensor([8.0, 9.0, 0.0, 1.0]),
        "these are the first pairs, and not those that were asked for": (torch.tensor([0.0, 2.0, 1.0, 3.0]), torch.arange(4.0)),
        "chosen and rejected are swapped": torch.tensor([9.0, 1.0, 8.0, 0.0]),
    })  # fmt: skip
    for numbers in (range(5), [2], [3, 1, 2]):
        batch, (ids, targets) = made.batch(numbers), rows_of(numbers)
        given = f"batch({numbers})"
        _ids(batch["input_ids"], ids, numbers, given)
        equal(batch["targets"], targets, given, "right for two pairs, and not here")
        wanted = torch.tensor([2.0 * i + side for side in (0, 1) for i in numbers])
        equal(batch["reference"], wanted, given, "right for two pairs, and not here")
    far = PreferencePairs(ROWS, words(), 2, device="meta")
    far.reference = torch.zeros(5, 2)
    for name, tensor in far[0].items():
        if tensor.device.type != "meta":
            fail(f"{name} is not on self.device; a GPU would refuse it", 'device="meta"', "meta", tensor.device.type)


def _ids(got, ids, numbers, given) -> None:
    hint = "a batch of B pairs has 2B rows, as long as its longest"
    if isinstance(got, torch.Tensor) and got.dim() == 2 and len(got) == len(ids):
        hint = "T is the longest row of this batch"
        if got.shape[1] == ids.shape[1] + 1:
            hint = "each row must lose its last token: nothing comes after it"
    shaped(got, ids.shape, f"{given}: input_ids", torch.int64, hint)
    lead = torch.stack([row.roll(int((row == 0).sum())) for row in ids])
    equal(got, ids, f"{given}: input_ids", "these are not the tokens of the rows", {
        "each row must lose its last token, not its first": rows_of(numbers, cut=(1, None))[0],
        "padding must be 0 in input_ids: -100 is no token": rows_of(numbers, padding=(-100, -100))[0],
        "chosen and rejected take turns; first come all chosen answers, then all rejected ones": rows_of(numbers, order="turns")[0],
        "the rows of chosen and rejected are swapped": ids.roll(len(numbers), 0),
        "the padding stands on the left; it must stand on the right": lead,
    })  # fmt: skip


CHAIN = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])  # probability of the next of three tokens


def chain(table: torch.Tensor) -> nn.Embedding:
    """A model whose logits depend on the last token alone."""
    return nn.Embedding.from_pretrained(table.clone(), freeze=False)


def small_batch() -> dict:
    """Chosen 0 -> 1 -> 0, with 1/2 * 1/2; rejected 0 -> 2, with 1/4. The reference gave 1/8 and 1/2."""
    batch = {"input_ids": torch.tensor([[0, 1], [0, 2]]), "targets": torch.tensor([[1, 0], [2, -100]])}
    return batch | {"reference": torch.tensor([1 / 8, 1 / 2]).log()}


def random_batch(B: int, V: int = 6, T: int = 5) -> dict:
    """Pairs of random tokens; some do not count."""
    ids, targets = torch.randint(0, V, (2 * B, T)), torch.randint(0, V, (2 * B, T))
    targets[torch.rand(2 * B, T) < 0.4] = -100
    targets[:, 0] = 1
    return {"input_ids": ids, "targets": targets, "reference": -6 * torch.rand(2 * B)}


def row_sums(table: torch.Tensor, batch: dict) -> torch.Tensor:
    """ln p of each row under a chain, with its gradient."""
    logs = torch.log_softmax(table, -1)
    pairs = [zip(row, want, strict=True) for row, want in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True)]
    return torch.stack([sum(logs[a, b] for a, b in row if b >= 0) for row in pairs])


@exercise("dpo_loss", after=["answer_logprobs"], keeps=["log_ratios", "dpo_loss"])
def check_dpo_loss(log_ratios, dpo_loss):
    model, batch = chain(CHAIN.log() + 0.7), small_batch()
    given = "one pair: p(chosen) = 1/4, p_ref = 1/8; p(rejected) = 1/4, p_ref = 1/2"
    result = log_ratios(model, batch)
    if not (isinstance(result, tuple | list) and len(result) == 2):
        fail("log_ratios must return two tensors, for the chosen and the rejected answers", given, got=type(result).__name__)
    for part in result:
        shaped(part, (1,), f"{given}: log_ratios", torch.float32, "each of the two is (B,)")
    log = math.log
    equal(torch.cat(tuple(result)), torch.tensor([log(2), -log(2)]), f"{given}: log_ratios, chosen and rejected", "a log-ratio is ln p - ln p_ref", {
        "chosen and rejected are swapped": torch.tensor([-log(2), log(2)]),
        "the ratio is upside down: the model stands above, the reference below": torch.tensor([-log(2), log(2)]),
        "the reference is not used": torch.tensor([log(1 / 4), log(1 / 4)]),
        "the reference is added; a ratio of probabilities is a difference of logarithms": torch.tensor([log(1 / 32), log(1 / 8)]),
        "these are means over tokens; the answer is compared as a whole": torch.tensor([log(1 / 2) - log(1 / 8), log(1 / 4) - log(1 / 2)]),
    })  # fmt: skip
    model, batch = chain(torch.randn(6, 6)), random_batch(3)
    ratios = (row_sums(model.weight, batch) - batch["reference"]).detach()
    equal(torch.cat(tuple(log_ratios(model, batch))), ratios, "three random pairs: log_ratios", "right for one pair, and not for three", {
        "the rows are taken in turns; the first half is chosen, the second rejected": torch.cat((ratios[::2], ratios[1::2])),
    })  # fmt: skip
    _loss_by_hand(dpo_loss, f"{given}, beta = 0.5")
    _loss_of_many(dpo_loss)


def _metrics(result, given: str) -> tuple[torch.Tensor, float, float]:
    """Loss, margin and accuracy, if they have the right form."""
    if not (isinstance(result, tuple | list) and len(result) == 2 and isinstance(result[1], dict)):
        fail("it must return two things: the loss, and a dict of metrics", given, got=type(result).__name__)
    loss, metrics = result
    shaped(loss, (), given, torch.float32, "the loss is one number, the mean over the pairs")
    if not {"margin", "accuracy"} <= set(metrics):
        fail("the metrics are margin and accuracy", given, ["accuracy", "margin"], sorted(metrics))
    return loss, *(one_number(metrics[name], name, given) for name in ("margin", "accuracy"))


def _loss_by_hand(dpo_loss, given: str) -> None:
    model, log, one = chain(CHAIN.log()), math.log, torch.tensor
    loss, margin, accuracy = _metrics(dpo_loss(model, small_batch(), beta=0.5), given)
    equal(loss, one(-log(2 / 3)), given, "the loss is not -ln(sigmoid(margin))", {
        "the margin has the wrong sign: the better the chosen answer, the smaller the loss": one(-log(1 / 3)),
        "beta is not used": one(-log(4 / 5)),
        "the minus sign is missing: this falls where it should rise": one(log(2 / 3)),
        "the logarithm is missing": (one(2 / 3), one(-2 / 3)),
        "beta divides; it must multiply": one(log(1 + 4**-2)),
    })  # fmt: skip
    if abs(margin - log(2)) > 1e-4:
        words = "the margin is beta times the difference of the log-ratios"
        fail("the margin in the metrics lacks beta" if abs(margin - log(4)) < 1e-4 else words, given, log(2), margin)
    if accuracy != 1:
        fail("the margin is above 0, so the accuracy is 1", given, 1.0, accuracy)
    _, margin, _ = _metrics(dpo_loss(model, small_batch()), given)
    if abs(margin - 0.1 * log(4)) > 1e-4:
        fail("without beta it must be 0.1", "the same pair, beta not given", 0.1 * log(4), margin)
    far = small_batch() | {"reference": torch.tensor([0.0, -600.0])}
    loss, _, _ = _metrics(dpo_loss(model, far, beta=0.5), "one pair with a margin near -300")
    equal(loss, one(300.0), "one pair with a margin near -300", "the sigmoid rounds to 0 and its logarithm is lost: take both in one step",
          tolerance=1e-2)  # fmt: skip


def _loss_of_many(dpo_loss) -> None:
    table, batch = torch.randn(6, 6), random_batch(3)
    same = batch["input_ids"][0], batch["targets"][0], batch["reference"][0]
    batch["input_ids"][3], batch["targets"][3], batch["reference"][3] = same  # the first pair is a tie
    batch["reference"][[1, 5]], batch["reference"][[2, 4]] = -30.0, 20.0
    model, own = chain(table), table.clone().requires_grad_()
    ratios = row_sums(own, batch) - batch["reference"]
    margins = 0.3 * (ratios[:3] - ratios[3:])
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(margins, torch.ones(3))
    given = "three pairs: one tie, one in the right order, one in the wrong one; beta = 0.3"
    loss, margin, accuracy = _metrics(dpo_loss(model, batch, 0.3), given)
    equal(loss, wanted, given, "the loss is a mean over the pairs", {
        "this is the sum over the pairs; a mean was asked for": wanted * 3,
        "the sigmoid of the mean margin is not the mean of the sigmoids": F.softplus(-margins.mean()),
    })  # fmt: skip
    if abs(margin - margins.mean().item()) > 1e-3:
        fail("the margin in the metrics is a mean over the pairs", given, margins.mean().item(), margin)
    if abs(accuracy - 1 / 3) > 1e-4:
        tie = abs(accuracy - 2 / 3) < 1e-4
        told = "a tie is not the right order: the margin must be above 0" if tie else "accuracy is the share of margins above 0"
        fail(told, given, "1 of 3", f"{accuracy:.4g}")
    same_gradient(loss, wanted, model, own)


def same_gradient(loss, wanted, model, own) -> None:
    """The gradient for the model's weights is that of the plain loop."""
    if not loss.requires_grad:
        fail(NO_GRADIENT, "a model whose weights want a gradient")
    (mine,) = torch.autograd.grad(loss, model.weight, allow_unused=True)
    if mine is None:
        fail(NO_GRADIENT, "a model whose weights want a gradient")
    (theirs,) = torch.autograd.grad(wanted, own)
    equal(mine, theirs, "the gradient for the model's weights", "the loss is right, and the gradient is not: something is detached on the way")


# -- beyond


@exercise("best_share")
def check_best_share(best_share):
    given = "reference 0.3 and 0.7, 80 of 100 wins, beta = 0.5"
    if not isinstance(best_share, int | float) or isinstance(best_share, bool):
        fail("write a number", given, got=best_share)

    def share(weight, before=3 / 7):
        return before * weight / (1 + before * weight)

    wanted = share(16)
    if abs(best_share - wanted) <= 0.01 * wanted:
        return
    mistakes = {
        "this is the share of wins. The model weighs its own reference by it, and beta says how much": 0.8,
        "the reference is missing: its 0.3 and 0.7 are weighed": share(16, 1),
        "beta multiplies the reward here; the weight is e to the power r / beta": share(4**0.5),
        "beta is not used: this is the best model for beta = 1": share(4),
        "the reference is the wrong way round: friendly has 0.3": share(16, 7 / 3),
        "the reward of the friendly answer is the higher one": share(1 / 16),
        "this is the weight; it must be divided by the sum of both weights": 0.3 * 16,
        "the weight is e to the power r / beta, with the reward ln 4; here 0.8 itself is the reward": share(math.exp(0.8 / 0.5)),
    }
    close_to = (words for words, value in mistakes.items() if abs(best_share - value) < 0.01 * value)
    words = "take the reward difference ln(0.8 / 0.2); weigh the reference by e to the power r / beta; make both shares sum to 1"
    fail(next(close_to, words), given, got=best_share)


def margins_of(model, reference, ids, prompt, length, beta, late: int = 0, end: int = 0, turns: bool = False) -> torch.Tensor:
    """The margins, one token at a time; the last three make the mistakes."""
    logs = [torch.log_softmax(one.weight.detach(), -1) for one in (model, reference)]
    total = []
    for row, first, stop in zip(ids.tolist(), prompt.tolist(), length.tolist(), strict=True):
        places = range(first + late, min(stop + late + end, len(row)))
        total.append(sum(logs[0][row[p - 1], row[p]] - logs[1][row[p - 1], row[p]] for p in places))
    total = torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in total])
    chosen, rejected = (total[::2], total[1::2]) if turns else total.chunk(2)
    return beta * (chosen - rejected)


@exercise("margins")
def check_margins(margins):
    model, reference = chain(torch.randn(6, 6)), chain(torch.randn(6, 6))
    for B in (2, 1, 3, 4):
        ids, prompt, length = torch.randint(0, 6, (2 * B, 7)), torch.randint(1, 4, (2 * B,)), torch.randint(4, 7, (2 * B,))
        prompt[0], length[0] = 2, 5
        given = f"{B} random pair{'s' * (B > 1)}, rows of 7 tokens, prompts of {prompt.tolist()}, with the answers {length.tolist()}"
        rest = (model, reference, ids, prompt, length, 0.5)
        got, wanted = margins(*rest), margins_of(*rest)
        shaped(got, (B,), given)
        if B == 1:
            equal(got, wanted, given, "right for two pairs, and not for one", {})
            continue
        equal(got, wanted, given, "these are still not the margins", {
            "both bugs are still there": margins_of(*rest, late=1, turns=True),
            "one bug is left: the first token of each answer is missing, and a place of the padding counts": margins_of(*rest, late=1),
            "one bug is left: rows of different pairs are subtracted; the first half is chosen, the second rejected": margins_of(*rest, turns=True),
            "the last token of the prompt counts now; it is not part of the answer": (margins_of(*rest, late=-1, end=1), margins_of(*rest, late=-1)),
            "the first padding counts now: an answer ends before the place `length`": margins_of(*rest, end=1),
            "the last token of each answer is missing now": margins_of(*rest, end=-1),
            "chosen and rejected are swapped now": -wanted,
        })  # fmt: skip


def simpo(total: torch.Tensor, lengths: torch.Tensor, beta: float, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and margins of SimPO, from the sums."""
    means, B = total / lengths, len(total) // 2
    margins = torch.stack([beta * (means[i] - means[i + B]) for i in range(B)])
    return F.binary_cross_entropy_with_logits(margins - gamma, torch.ones(len(margins))), margins


@exercise("simpo_loss", after=["answer_logprobs"])
def check_simpo_loss(simpo_loss):
    model, log, one = chain(CHAIN.log()), math.log, torch.tensor
    given = "chosen: three tokens of 1/2, 1/4 and 1/4; rejected: one token of 1/4; beta = 2, gamma = 0.5, no reference"
    batch = {"input_ids": torch.tensor([[0, 1, 1], [0, 2, 2]]), "targets": torch.tensor([[1, 1, 1], [2, -100, -100]])}
    loss, margin, _ = _metrics(simpo_loss(model, batch, beta=2.0, gamma=0.5), given)
    right, lost = 2 * (log(1 / 32) / 3 - log(1 / 4)), 2 * (log(1 / 32) - log(1 / 4))

    def of(margin, gamma=0.5):
        return one(math.log1p(math.exp(gamma - margin)))

    equal(loss, of(right), given, "the loss is not -ln(sigmoid(margin - gamma))", {
        "these are sums; SimPO compares means over the tokens that count": of(lost),
        "the lengths count the padding; only targets that are not -100 count": of(lost / 3),
        "gamma is not used": of(right, 0.0),
        "gamma is added: the chosen answer must win by more than gamma, so it is subtracted": of(right, -0.5),
        "gamma is multiplied by beta; it stands outside of the bracket": of(right, 1.0),
        "beta is not used": of(right / 2),
        "the sign is wrong: the better the chosen answer, the smaller the loss": (of(-right), of(-right, -0.5)),
        "the minus sign is missing": -of(right),
    })  # fmt: skip
    if abs(margin - right) > 1e-4:
        told = "the margin is beta times the difference of the means"
        told = "the margin in the metrics is without gamma" if abs(margin - right + 0.5) < 1e-4 else told
        fail(told, given, right, margin)
    loss, margin, _ = _metrics(simpo_loss(model, batch), "the same pair, beta and gamma not given")
    equal(loss, of(right, 1.0), "the same pair, beta and gamma not given", "without an argument, beta is 2 and gamma is 1")
    table, batch = torch.randn(6, 6), random_batch(3)
    table[1] = 0.0
    for part in ("input_ids", "targets"):
        batch[part][3] = batch[part][0]  # a tie
    model, own = chain(table), table.clone().requires_grad_()
    lengths = one([sum(t >= 0 for t in row) for row in batch["targets"].tolist()])
    order = simpo(row_sums(table, batch), lengths, 1.0, 0.0)[1]
    if order[1] < 0:
        batch = {name: part[[0, 4, 2, 3, 1, 5]] for name, part in batch.items()}
    if order[2] > 0:
        batch = {name: part[[0, 1, 5, 3, 4, 2]] for name, part in batch.items()}
    lengths = one([sum(t >= 0 for t in row) for row in batch["targets"].tolist()])
    wanted, margins = simpo(row_sums(own, batch), lengths, 0.7, 3.0)
    given = "three pairs: one tie, one in the right order, one in the wrong one; beta = 0.7, gamma = 3"
    loss, margin, accuracy = _metrics(simpo_loss(model, batch, 0.7, 3.0), given)
    equal(loss, wanted, given, "right for one pair, and not for three", {"this is the sum over the pairs; a mean was asked for": wanted * 3})
    if abs(margin - margins.mean().item()) > 1e-3:
        fail("the margin in the metrics is a mean over the pairs", given, margins.mean().item(), margin)
    if abs(accuracy - 1 / 3) > 1e-4:
        told = "accuracy is the share of margins above 0, without gamma, and a tie is not the right order"
        fail(told, given, "1 of 3", f"{accuracy:.4g}")
    same_gradient(loss, wanted, model, own)


KINDS = ("dpo", "smoothed", "ipo")


def losses(kind: str, g: float, beta: float = 0.5, epsilon: float = 0.1) -> float:
    """The three losses of one gap."""
    if kind == "ipo":
        return (g - 0.5 / beta) * (g - 0.5 / beta)
    up, down = math.log1p(math.exp(-beta * g)), math.log1p(math.exp(beta * g))
    return up if kind == "dpo" else (1 - epsilon) * up + epsilon * down


def descend(kind: str, steps: int, rate: float = 0.4, logits: int = 2) -> float:
    """The gap after gradient descent, from the slopes worked out on paper."""
    g = 0.0
    for _ in range(steps):
        win = 1 / (1 + math.exp(-0.5 * g))
        slope = {"dpo": 0.5 * (win - 1), "smoothed": 0.5 * (win - 0.9), "ipo": 2 * (g - 1)}[kind]
        g -= logits * rate * slope
    return g


@exercise("final_gap")
def check_final_gap(predicted_gap, gap_loss, final_gap, measured):
    for kind, options in ((kind, options) for kind in KINDS for options in ({}, {"beta": 2.0, "epsilon": 0.3})):
        gaps = [-3.0, 0.0, 0.7, 5.0]
        given = f"gap_loss({kind!r}, g) at g = -3, 0, 0.7 and 5, {options or 'beta = 0.5, epsilon = 0.1'}"
        got = torch.stack([torch.as_tensor(gap_loss(kind, torch.tensor(g), **options)).float() for g in gaps])
        beta, epsilon = options.get("beta", 0.5), options.get("epsilon", 0.1)

        def table(kind, beta, epsilon, sign=1, gaps=gaps):
            return torch.tensor([losses(kind, sign * g, beta, epsilon) for g in gaps])

        equal(got, table(kind, beta, epsilon), given, f"this is not the loss {kind!r}", {
            "the smoothed loss has its two shares the wrong way round": table("smoothed", beta, 1 - epsilon),
            "IPO's goal is 1 / (2 beta)": (table("ipo", beta / 2, 0), table("ipo", 1 / beta, 0), table("ipo", 1.0, 0)),
            "epsilon has no effect: this is the loss of DPO": table("dpo", beta, epsilon),
            "beta is not used": table(kind, 1.0, epsilon),
            "the sign is wrong: a larger gap is a smaller loss": table(kind, beta, epsilon, -1),
        })  # fmt: skip
    for kind, steps in ((kind, steps) for steps in (0, 2, 50) for kind in KINDS):
        got, wanted = final_gap(kind, steps), descend(kind, steps)
        if not isinstance(got, int | float) or isinstance(got, bool):
            fail("return the gap as a number of Python", f"final_gap({kind!r}, {steps})", wanted, repr(got))
        if abs(got - wanted) > 1e-3 * max(1, abs(wanted)):
            _wrong_gap(kind, steps, got, wanted)
    right = {kind: [descend(kind, 60), descend(kind, 600)] for kind in KINDS}
    if not isinstance(measured, dict) or set(measured) != set(KINDS):
        fail("`measured` is a dict: each kind to its list of two gaps", expected=sorted(KINDS), got=measured)
    for kind, wanted in right.items():
        got = measured[kind]
        if not (isinstance(got, list | tuple) and len(got) == 2 and all(isinstance(g, int | float) for g in got)
                and close(torch.tensor(got, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64), 1e-3)):  # fmt: skip
            fail("`measured` must hold what your function gives after 60 and after 600 steps", kind, [round(g, 3) for g in wanted], got)
    _prediction(predicted_gap)


def _wrong_gap(kind: str, steps: int, got: float, wanted: float) -> None:
    told = "these are not the steps that were asked for: rate 0.4, both logits move, from 0 and 0"
    for words, value in {
        "the gap shrinks: go down the slope, not up": descend(kind, steps, -0.4) if steps < 3 else math.nan,
        "only one of the two logits moves": descend(kind, steps, logits=1),
        "this is the margin; the gap was asked for, without beta": 0.5 * wanted,
        "it makes one step too few": descend(kind, max(0, steps - 1)),
        "it makes one step too many": descend(kind, steps + 1),
    }.items():
        if abs(got - value) < 1e-3 * max(1, abs(value)):
            told = words
            break
    fail(told, f"final_gap({kind!r}, {steps})", round(wanted, 4), got)


def _prediction(predicted_gap) -> None:
    given = "the smoothed loss, beta = 0.5, epsilon = 0.1"
    if not isinstance(predicted_gap, int | float) or isinstance(predicted_gap, bool):
        fail("write a number into `predicted_gap`", given, got=predicted_gap)
    wanted = math.log(9) / 0.5
    if abs(predicted_gap - wanted) > 0.05 * wanted:
        told = "the measurement disagrees with your prediction: the slope is 0 where sigmoid(beta * gap) is 0.9"
        if abs(predicted_gap - math.log(9)) < 0.1:
            told = "this is the margin where it stops; the gap is the margin divided by beta"
        elif abs(predicted_gap - 1) < 0.05:
            told = "this is where IPO stops"
        fail(told, given, got=predicted_gap)
