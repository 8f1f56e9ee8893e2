"""Checks of workbook 14. What is trusted is torch: its distributions, its kl_div and cross_entropy, and models run in full; nothing here comes
from minimind.distill.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical
from torch.distributions import kl_divergence as trusted

from course.checks.core import close, equal, exercise, fail, shaped, unchanged

MODULE = "distill"
NO_GRADIENT = "no gradient gets through to the student; leave detach, .data, numpy and no_grad to the teacher"


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """KL(p || q) at each place, by torch.distributions."""
    return trusted(Categorical(logits=p_logits.float() / tau), Categorical(logits=q_logits.float() / tau))


def pair_of_logits(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher's and a student's."""
    return 2 * torch.randn(shape), 2 * torch.randn(shape)


# -- rebuild


@exercise("kl_divergence", keeps=["kl_divergence"])
def check_kl_divergence(kl_divergence):
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.4, 0.4])
    v, z = p.log() + 1, q.log() - 2  # softmax does not mind
    given = "teacher p = (0.7, 0.2, 0.1), student q = (0.2, 0.4, 0.4), as logits"
    before = v.clone(), z.clone()
    got = kl_divergence(v, z)
    shaped(got, (), given, torch.float32, "there is one number for each place: the last dimension, the vocabulary, is summed up")
    right = (p * (p / q).log()).sum()
    equal(got, right, given, "this is not the sum of p (ln p - ln q)", {
        "teacher and student are swapped: this is KL(q || p)": (q * (q / p).log()).sum(),
        "this is a mean over the vocabulary; a sum over it was asked for": right / 3,
        "these are bits; nats were asked for": right / math.log(2),
        "this is the cross-entropy; the entropy of the teacher must be subtracted": -(p * q.log()).sum(),
        "the sign is wrong": -right,
        "the softmax is missing: logits are no probabilities": ((v.exp() * (v - z)).sum(), (v * (v - z)).sum()),
        "the logarithms are missing": (p * (p - q)).sum(),
    })  # fmt: skip
    unchanged("teacher_logits", before[0], v)
    unchanged("student_logits", before[1], z)
    given += ", temperature 2"
    cold = torch.distributions.Categorical
    equal(kl_divergence(v, z, 2.0), kl(v, z, 2), given, "temperature 2 has not the effect that it should have", {
        "the temperature is not used": right,
        "the temperature multiplies the logits; it must divide them": kl(v, z, 0.5),
        "only the teacher is softened; both must be": trusted(cold(logits=v / 2), cold(logits=z)),
        "only the student is softened; both must be": trusted(cold(logits=v), cold(logits=z / 2)),
        "the factor temperature squared belongs to the loss, not to the distance": 4 * kl(v, z, 2),
        "the result is divided by the temperature instead of the logits": right / 2,
    })  # fmt: skip
    v, z = pair_of_logits(2, 3, 7)
    got = kl_divergence(v, z, 1.5)
    shaped(got, (2, 3), "random logits (2, 3, 7)")
    equal(got, kl(v, z, 1.5), "random logits (2, 3, 7), temperature 1.5", "right for one place, and not for many")
    _sure(kl_divergence)
    low = [x.to(torch.bfloat16) for x in (v, z)]
    got = kl_divergence(*low)
    shaped(got, (2, 3), "logits in bfloat16", torch.float32)
    equal(got, kl(*low), "logits in bfloat16", "make the logits float32 first: bfloat16 has three digits")
    _student_gradient(kl_divergence, v, z)
    _bad_input(kl_divergence)


def _sure(kl_divergence) -> None:
    sure, even = torch.tensor([[200.0, 0.0, 0.0]]), torch.zeros(1, 3)
    for who, teacher, student, right in (("teacher", sure, even, math.log(3)), ("student", even, sure, 400 / 3 - math.log(3))):
        given, wanted = f"a {who} with logits (200, 0, 0), and the other one with zeros", torch.tensor([right])
        got = kl_divergence(teacher, student)
        shaped(got, (1,), given)
        if not torch.isfinite(got).all():
            fail("a probability rounds to 0 and its logarithm is lost: use log_softmax, not the logarithm of softmax", given, wanted, got)
        equal(got, wanted, given, "a probability rounds to 0 here: use log_softmax, not the logarithm of softmax")


def _student_gradient(kl_divergence, v, z) -> None:
    ours = z.clone().requires_grad_()
    y = kl_divergence(v, ours, 1.5)
    if not y.requires_grad:
        fail(NO_GRADIENT, "student logits with requires_grad=True")
    (got,) = torch.autograd.grad(y.sum(), ours)
    wanted = (Categorical(logits=z / 1.5).probs - Categorical(logits=v / 1.5).probs) / 1.5
    equal(got, wanted, "the gradient for the student's logits, temperature 1.5", "it is not (q - p) / temperature")


def _bad_input(kl_divergence) -> None:
    shape, words = torch.zeros, "must raise ValueError"
    for what, teacher, student, tau in (("a vocabulary of 5 and one of 6", shape(3, 5), shape(3, 6), 1.0), ("1 place and 3 places", shape(1, 5),
                                        shape(3, 5), 1.0), ("temperature 0", shape(3, 5), shape(3, 5), 0.0),
                                        ("temperature -1", shape(3, 5), shape(3, 5), -1.0)):  # fmt: skip
        try:
            kl_divergence(teacher, student, tau)
        except ValueError:
            continue
        except Exception as error:
            fail(f"it {words}", what, "ValueError", type(error).__name__)
        fail(f"it {words}, and here it passes in silence", what)


@exercise("soft_loss", after=["kl_divergence"], keeps=["soft_loss"])
def check_soft_loss(soft_loss):
    v, z = pair_of_logits(4, 5)
    given = "random logits (4, 5), temperature 3"
    got, each = soft_loss(v, z, 3.0), kl(v, z, 3)
    shaped(got, (), given, torch.float32, "it is one number: the mean over the places")
    equal(got, 9 * each.mean(), given, "it is not the mean of temperature squared times KL", {
        "the factor is missing: the gradient would fade with heat": each.mean(),
        "the factor is the temperature; it must be its square": 3 * each.mean(),
        "this is the sum over the places; a mean was asked for": (9 * each.sum(), each.sum()),
        "the temperature is not handed on": (9 * kl(v, z).mean(), kl(v, z).mean()),
        "teacher and student are swapped": 9 * kl(z, v, 3).mean(),
        "this is a mean over the vocabulary too": 9 * each.mean() / 5,
        "it is divided by the square; the gradient fades, so multiply": each.mean() / 9,
    })  # fmt: skip
    ours = z.clone().requires_grad_()
    y = soft_loss(v, ours, 3.0)
    if not y.requires_grad:
        fail(NO_GRADIENT, "student logits with requires_grad=True")
    (gradient,) = torch.autograd.grad(y, ours)
    wanted = 3 * (Categorical(logits=z / 3).probs - Categorical(logits=v / 3).probs) / 4
    equal(gradient, wanted, "the gradient for the student's logits", "it is not temperature * (q - p) / N")


def small(seed: int, **changes):
    """A MiniMind of one layer."""
    from minimind.model import MiniMind, ModelConfig

    torch.manual_seed(seed)
    sizes = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
             "intermediate_size": 16, "max_position_embeddings": 128, "initializer_range": 0.4}  # fmt: skip
    return MiniMind(ModelConfig.preset("tiny", **(sizes | changes)))


def chat_batch(masks: bool = True) -> dict:
    """Two rows of eight places; the first row holds two conversations."""
    ids, labels = torch.randint(0, 24, (2, 8)), torch.randint(0, 24, (2, 8))
    labels[0, :3], labels[0, 5], labels[1, 4:] = -100, -100, -100
    if not masks:
        return {"input_ids": ids, "labels": labels}
    owner = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2], [1] * 8])
    mask = (owner[:, :, None] == owner[:, None, :]).tril()[:, None]
    places = torch.tensor([[0, 1, 2, 3, 0, 2, 4, 6], [0, 1, 3, 4, 6, 7, 9, 12]])  # only distances matter to RoPE, so they are uneven
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": places}


def in_full(model, batch: dict, **without) -> torch.Tensor:
    """Every logit, by the model itself."""
    return model(batch["input_ids"], without.get("mask", batch.get("attention_mask")), without.get("positions", batch.get("position_ids")))


@exercise("logits_at", keeps=["logits_at"])
def check_logits_at(logits_at):
    for tied, masks in ((True, True), (False, True), (True, False)):
        model, batch = small(1, tie_word_embeddings=tied), chat_batch(masks)
        places = batch["labels"] != -100
        kind = f"{'tied' if tied else 'with an lm_head'}, {'two chats in a row' if masks else 'without masks'}"
        given = f"a MiniMind of 24 tokens, {kind}, 8 of 16 places"
        with torch.no_grad():
            got, wanted = logits_at(model, batch, places), in_full(model, batch)
            shaped(got, (int(places.sum()), 24), given, hint="there is one row of logits for each place that is True: (N, V)")
            likely = {"these are the logits of other places": wanted[~places][: len(got)]}
            if masks:
                likely |= {
                    "attention_mask is not handed on: conversations in one row see each other": in_full(model, batch, mask=None)[places],
                    "position_ids are not handed on: each conversation counts its own positions": in_full(model, batch, positions=None)[places],
                    "attention_mask and position_ids are not handed on": in_full(model, batch, mask=None, positions=None)[places],
                }  # fmt: skip
            if not tied:
                hidden = model.model(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
                likely["this model has an output matrix of its own, lm_head; the embedding was taken"] = \
                    (hidden @ model.model.embed_tokens.weight.T)[places]  # fmt: skip
            equal(got, wanted[places], given, "these are not the model's own logits", likely)
    for tied in (True, False):
        _skips(logits_at, tied)


def _skips(logits_at, tied: bool) -> None:
    """A model whose hidden vectors are NaN where nobody asks: 0 times NaN in the gradient shows who asked."""
    hidden, matrix, other = torch.randn(2, 5, 4), torch.randn(7, 4), torch.randn(7, 4)
    places = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])
    hidden[~places] = math.nan
    model, inner = nn.Module(), nn.Module()
    inner.forward = lambda *_, **__: hidden
    inner.embed_tokens = nn.Embedding.from_pretrained(matrix if tied else other, freeze=False)
    model.model, model.lm_head = inner, None
    model.forward = lambda *_, **__: (hidden.nan_to_num() @ matrix.T)
    if not tied:
        model.lm_head = nn.Linear(4, 7, bias=False)
        model.lm_head.weight = nn.Parameter(matrix.clone())
    weight = inner.embed_tokens.weight if tied else model.lm_head.weight
    given = f"a model of 7 tokens, {'tied' if tied else 'with an lm_head'}; 4 of 10 places"
    got = logits_at(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long)}, places)
    shaped(got, (4, 7), given)
    wasted = "the output layer sees every place: take the rows that count out of the hidden vectors, and multiply only those"
    if not got.requires_grad:
        fail(wasted, given)
    equal(got, hidden[places] @ matrix.T, given, "these are not the hidden vectors times the output matrix")
    (gradient,) = torch.autograd.grad(got.sum(), weight, allow_unused=True)
    if gradient is None or gradient.isnan().any():
        fail(wasted, given, "products of 4 places", "products of 10 places")
    equal(gradient, hidden[places].sum(0).expand(7, 4), f"{given}: the gradient for the output matrix", "the gradient is not right")


def parts_of(student, teacher, batch: dict, tau: float, where: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and soft loss, by torch, from all logits."""
    places = batch["labels"] != -100 if where is None else where
    mine, wanted = (in_full(model, batch)[places] for model in (student, teacher))
    hard = F.cross_entropy(in_full(student, batch).flatten(0, 1), batch["labels"].flatten())
    return hard, tau**2 * F.kl_div((mine / tau).log_softmax(-1), (wanted / tau).softmax(-1), reduction="batchmean")


@exercise("DistillLoss", after=["kl_divergence", "soft_loss", "logits_at"], keeps=["DistillLoss"])
def check_distill_loss(DistillLoss):
    teacher, student, batch = small(1), small(2), chat_batch()
    with torch.no_grad():
        hard, soft = parts_of(student, teacher, batch, 2.0)
        everywhere = parts_of(student, teacher, batch, 2.0, torch.ones(2, 8, dtype=torch.bool))[1]
        turned = parts_of(teacher, student, batch, 2.0)[1]
    given = "two small models, two rows with 8 labels, temperature 2"
    for alpha in (0.3, 0.0, 1.0):
        here = f"{given}, alpha = {alpha}"
        loss, metrics = _result(DistillLoss(teacher, 2.0, alpha)(student, batch), here)
        mixed = (1 - alpha) * hard + alpha * soft
        equal(loss.detach(), mixed, here, "this is not the mixture of both losses", {
            "alpha weighs the cross-entropy here; it is the weight of the teacher": alpha * hard + (1 - alpha) * soft,
            "the soft loss is a mean over every place; only places with a label count": (1 - alpha) * hard + alpha * everywhere,
            "teacher and student are swapped in the soft loss": (1 - alpha) * hard + alpha * turned,
            "the factor temperature squared is missing; soft_loss has it": (1 - alpha) * hard + alpha * soft / 4,
            "the cross-entropy is not weighed by 1 - alpha": hard + alpha * soft,
            "the temperature is not handed on": (1 - alpha) * hard + alpha * parts_of(student, teacher, batch, 1.0)[1].detach(),
        })  # fmt: skip
        for name, wanted in (("cross_entropy", hard), ("soft", soft)):
            value = metrics[name]
            value = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(float(value))
            equal(value, wanted, f"{here}: {name}", f"{name} in the metrics is the part before it is weighed")
    loss, _ = _result(DistillLoss(teacher)(student, batch), "temperature and alpha not given")
    with torch.no_grad():
        wanted = 0.1 * hard + 0.9 * parts_of(student, teacher, batch, 1.0)[1]
    equal(loss.detach(), wanted, "temperature and alpha not given", "without arguments the temperature is 1 and alpha 0.9")
    plain = chat_batch(masks=False)
    with torch.no_grad():
        hard, soft = parts_of(student, teacher, plain, 1.5)
    loss, _ = _result(DistillLoss(teacher, 1.5, 0.5)(student, plain), "a batch without masks")
    equal(loss.detach(), (hard + soft) / 2, "a batch without masks", "right with masks, and not without")
    _gradients(DistillLoss, batch)
    _frozen(DistillLoss, student, batch)
    for what, options in (("alpha = 1.5", {"alpha": 1.5}), ("alpha = -0.1", {"alpha": -0.1}), ("temperature = 0", {"temperature": 0.0}),
                          ("temperature = -1", {"temperature": -1.0})):  # fmt: skip
        try:
            DistillLoss(teacher, **options)
        except ValueError:
            continue
        except Exception as error:
            fail("it must raise ValueError", what, "ValueError", type(error).__name__)
        fail("it must raise ValueError, and here it passes in silence", what)


def _result(result, given: str) -> tuple[torch.Tensor, dict]:
    if not (isinstance(result, tuple | list) and len(result) == 2 and isinstance(result[1], dict)):
        fail("it must return two things: the loss, and a dict of its parts", given, got=type(result).__name__)
    shaped(result[0], (), given, torch.float32, "the loss is one number")
    if set(result[1]) != {"cross_entropy", "soft"}:
        fail("the parts are cross_entropy and soft", given, ["cross_entropy", "soft"], sorted(result[1]))
    return result


def _gradients(DistillLoss, batch: dict) -> None:
    teacher, student = small(1), small(2)
    loss, _ = DistillLoss(teacher, 2.0, 0.3)(student, batch)
    if not loss.requires_grad:
        fail(NO_GRADIENT, "a student whose weights want a gradient")
    weights = list(student.parameters())
    got = torch.autograd.grad(loss, weights, allow_unused=True)
    hard, soft = parts_of(student, teacher, batch, 2.0)
    wanted = torch.autograd.grad(0.7 * hard + 0.3 * soft, weights)
    for ours, theirs in zip(got, wanted, strict=True):
        if ours is None:
            fail(NO_GRADIENT, "a student whose weights want a gradient")
        equal(ours, theirs, "the gradient for the student's weights", "the loss is right, and the gradient is not", tolerance=1e-3)


def _frozen(DistillLoss, student, batch: dict) -> None:
    teacher = small(1)
    teacher.model.norm = nn.Sequential(teacher.model.norm, nn.Dropout(0.5))
    teacher.train()
    loss = DistillLoss(teacher, 1.0, 1.0)
    with torch.no_grad():
        got = loss(student, batch)[0]
        teacher.eval()
        wanted = parts_of(student, teacher, batch, 1.0)[1]
    equal(got, wanted, "a teacher with dropout, in training mode", "put the teacher into evaluation mode: here its dropout is at work")
    held = loss.teacher
    if not isinstance(held, nn.Module):
        fail("keep the teacher as self.teacher", given=type(held).__name__)
    if any(weight.requires_grad for weight in held.parameters()):
        fail("the teacher's weights still want a gradient: an optimiser could move the teacher towards the student", "self.teacher.parameters()")


@functools.cache
def words():
    """A small tokenizer."""
    from minimind.tokenizer import Tokenizer

    text = "Where is Hanis and who keeps the goat. Hanis lives in Elmstead near the mill and Tilda keeps a goat."
    return Tokenizer.train([text, "system user assistant tool"] * 4, 330)


def said_by(teacher, ids: list[int], limit: int) -> list[int]:
    """The greedy continuation, one full pass for each token, with the stop token if it comes."""
    new = []
    with torch.no_grad():
        while len(new) < limit and not (new and new[-1] in (words().im_end_id, words().eos_id)):
            new.append(int(teacher(torch.tensor([ids + new]))[0, -1].argmax()))
    return new


@functools.cache
def talker():
    """A teacher that speaks nonsense, and often stops."""
    teacher = small(TALKER, vocab_size=words().vocab_size, hidden_size=32, head_dim=16, tie_word_embeddings=False).eval()
    pieces = [token.decode(errors="replace") for token in words().token_bytes()]
    often = {words().im_end_id: 2.0, words().eos_id: 2.0, words().im_start_id: 1.5, pieces.index(" "): 1.5, pieces.index("\n"): 1.5}
    letters = [float(len(piece) > 1 and piece.strip().isalpha()) for piece in pieces]  # so that it can be read
    weight = torch.tensor([often.get(i, plain) for i, plain in enumerate(letters)])
    with torch.no_grad():
        teacher.lm_head.weight *= weight[:, None]
    return teacher


TALKER = 2
QUESTIONS = ["Where is Hanis", "Who keeps the goat", "the mill", "Tilda", "goat", "Hanis lives near the mill and keeps a goat", "in Elmstead", "who",
             "a mill", "Where", "lives", "Hanis and Tilda"]  # fmt: skip


@functools.cache
def interview(limit: int, skip: bool = True) -> tuple:
    """(question, tokens, closed, text) for each question."""
    rows = []
    for question in QUESTIONS:
        prompt = words().apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        new = said_by(talker(), prompt, limit + 1)
        stop = next((i for i, token in enumerate(new) if token in (words().im_end_id, words().eos_id)), len(new))
        rows.append((question, stop < limit, words().decode(new[:stop][:limit], skip_special=skip)))
    return tuple(rows)


@exercise("answers_of", keeps=["answers_of"])
def check_answers_of(answers_of):
    for limit in (8, 5, 3):
        given = f"{len(QUESTIONS)} questions to a teacher that speaks nonsense, max_new_tokens = {limit}"
        rows = interview(limit)
        pairs = [(question, text.strip()) for question, closed, text in rows if closed and text.strip()]
        wanted = [[{"role": "user", "content": question}, {"role": "assistant", "content": text}] for question, text in pairs]
        got = answers_of(talker(), words(), QUESTIONS, limit)
        if got == wanted:
            continue
        if not isinstance(got, list) or not all(isinstance(chat, list) and all(isinstance(m, dict) for m in chat) for chat in got):
            fail("it must return a list of conversations, each a list of messages", given, wanted[:1], got if not isinstance(got, list) else got[:1])
        fail(_likely(rows, wanted, got), given, *_first_difference(wanted, got))
    if (got := answers_of(talker(), words(), [], 4)) != []:
        fail("without questions there are no conversations", "no questions", [], got)


def _likely(rows, wanted: list, got: list) -> str:
    """What went wrong, in words."""
    if got and any(len(chat) != 2 or set(chat[0]) != {"role", "content"} or set(chat[-1]) != {"role", "content"} for chat in got):
        return "a conversation has two messages, each with role and content: the user's question and the assistant's answer"
    if any((chat[0]["role"], chat[1]["role"]) != ("user", "assistant") for chat in got):
        return "first comes the user, then the assistant"
    asked, said = [chat[0]["content"] for chat in got], [chat[1]["content"] for chat in got]
    texts = {question: text.strip() for question, _, text in rows}
    if sorted(map(str, got)) == sorted(map(str, wanted)):
        return "the conversations must come in the order of the questions"
    if any(question not in texts for question in asked):
        return "the user's message must be the question as it was asked"
    if any(not answer.strip() for answer in said):
        return "an answer that is empty, but for spaces and line ends, must be left out"
    if any(answer != answer.strip() for answer in said):
        return "strip the answers: spaces and line ends around them do not belong to the text"
    if "<|" in "".join(said):
        return "special tokens stand in the text: decode with skip_special=True"
    if all(texts[q] == answer for q, answer in zip(asked, said, strict=True)):
        unclosed = [q for q, closed, text in rows if not closed and text.strip()]
        if any(question in asked for question in unclosed):
            return "an answer that was not closed must be left out: a student would learn to ramble"
        return "an answer that was closed, and is not empty, is missing"
    if sorted(asked) == sorted(chat[0]["content"] for chat in wanted) and sorted(said) == sorted(chat[1]["content"] for chat in wanted):
        return "the answers stand beside the wrong questions: bring them back into the order of the questions"
    return "these are not the teacher's greedy answers; is add_generation_prompt given, and are both stop tokens?"


def _first_difference(wanted: list, got: list) -> tuple:
    for right, ours in zip(wanted, got, strict=False):
        if right != ours:
            return right, ours
    return f"{len(wanted)} conversations", f"{len(got)} conversations"


# -- beyond


@exercise("share_at_two")
def check_share_at_two(share_at_two):
    given = "6,400 tokens, one logit of 10, all others 0, temperature 2"
    if not isinstance(share_at_two, int | float) or isinstance(share_at_two, bool):
        fail("write a number", given, got=share_at_two)

    def share(logit, others=6399):
        return math.exp(logit) / (math.exp(logit) + others)

    if abs(share_at_two - share(5)) <= 0.02 * share(5):
        return
    mistakes = {
        "this is the share at temperature 1": share(10),
        "this is half of the share at temperature 1; the temperature divides the logit, and then comes e to its power": share(10) / 2,
        "the temperature multiplies the logit here; it must divide": share(20),
        "this is a percentage; write the share, between 0 and 1": 100 * share(5),
        "all other tokens count: there are 6,399 of them, each with e to the power 0": share(5, 1),
        "the softmax must give 1 in sum: divide by the sum of all": math.exp(5) / 6399,
        "the softmax takes e to the power of the logit": 5 / (5 + 6399),
        "the share is not divided twice: only the logit": share(10) ** 2,
    }
    close_to = (told for told, value in mistakes.items() if abs(share_at_two - value) <= 0.005 * value)
    fail(next(close_to, "the best token weighs e to the power 10 / 2, and each of the 6,399 others e to the power 0"), given, got=share_at_two)


def plain_step(student, teacher, ids, labels, tau, swap=False, over=None) -> torch.Tensor:
    """The soft loss by torch, from the tables of two chains; the last two make the mistakes."""
    mine, wanted = (model.weight.detach()[ids] for model in (student, teacher))
    each = kl(mine, wanted, tau) if swap else kl(wanted, mine, tau)
    kept = each[labels != -100]
    return tau**2 * (kept.mean() if over is None else kept.sum() / over)


@exercise("distill_step")
def check_distill_step(distill_step):
    for rows, tau in ((3, 2.0), (1, 0.5)):
        student, teacher = nn.Embedding(6, 6), nn.Embedding(6, 6)
        ids, labels = torch.randint(0, 6, (rows, 7)), torch.randint(0, 6, (rows, 7))
        labels[:, 4:], labels[0, 0] = -100, -100
        rest = (student, teacher, ids, labels, tau)
        count = int((labels != -100).sum())
        given = f"random models of 6 tokens, ids ({rows}, 7), {count} of {labels.numel()} places have a label, temperature {tau}"
        got, wanted = distill_step(*rest), plain_step(*rest)
        shaped(got, (), given)
        padding = "one bug is left: places without a label add nothing to the sum, and still they are counted when it is divided"
        equal(got.detach(), wanted, given, "this is still not the soft loss", {
            "both bugs are still there": plain_step(*rest, swap=True, over=labels.numel()),
            padding: plain_step(*rest, over=labels.numel()),
            "one bug is left: this is KL(student || teacher), which hardly minds a word that the student forgot": plain_step(*rest, swap=True),
            "this is the sum now; divide it by the number of places that have a label": plain_step(*rest, over=1),
            "it is divided by the number of rows now; divide by the number of places that have a label": plain_step(*rest, over=rows),
            "the places without a label count now": tau**2 * kl(teacher.weight[ids], student.weight[ids], tau).mean().detach(),
        })  # fmt: skip
        if not got.requires_grad:
            fail(NO_GRADIENT, given)


def between(v, z, beta, mix=None, weights=None) -> torch.Tensor:
    """JSD in float64, straight from the formula."""
    p, q = (Categorical(logits=x.double()).probs for x in (v, z))
    a, b = (beta, 1 - beta) if mix is None else mix
    c, d = (beta, 1 - beta) if weights is None else weights
    m = a * p + b * q
    return (c * torch.xlogy(p, p / m).sum(-1) + d * torch.xlogy(q, q / m).sum(-1)).float()


@exercise("jsd", after=["kl_divergence"])
def check_jsd(jsd):
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.4, 0.4])
    v, z = p.log() + 1, q.log() - 2
    given = "teacher p = (0.7, 0.2, 0.1), student q = (0.2, 0.4, 0.4), as logits, beta = 0.3"
    got, beta = jsd(v, z, 0.3), 0.3
    shaped(got, (), given, torch.float32, "there is one number for each place")
    blend = Categorical(logits=beta * v + 0.7 * z)
    equal(got, between(v, z, 0.3), given, "this is not beta KL(p || m) + (1 - beta) KL(q || m)", {
        "the two are mixed the wrong way round: m = beta p + (1 - beta) q": between(v, z, 0.3, mix=(0.7, 0.3)),
        "the two distances are weighed the wrong way round: beta belongs to KL(p || m)": between(v, z, 0.3, weights=(0.7, 0.3)),
        "teacher and student are swapped": between(z, v, 0.3),
        "beta is not used in the mixture": between(v, z, 0.3, mix=(0.5, 0.5)),
        "beta is not used in the sum of the two distances": (between(v, z, 0.3, weights=(0.5, 0.5)), between(v, z, 0.3, weights=(1, 1))),
        "beta is not used": between(v, z, 0.5),
        "the logits are mixed; the mixture m is one of probabilities": beta * trusted(Categorical(logits=v), blend)
            + 0.7 * trusted(Categorical(logits=z), blend),
        "the mixture stands on the left: KL(m || p) was taken for KL(p || m)": _turned(p, q, beta),
    })  # fmt: skip
    v, z = pair_of_logits(2, 3, 7)
    for beta, wanted, words in ((0.0, kl(v, z), "beta = 0 is KL(teacher || student)"), (1.0, kl(z, v), "beta = 1 is KL(student || teacher)")):
        equal(jsd(v, z, beta), wanted, f"random logits (2, 3, 7), beta = {beta}", words, {
            "the two ends are swapped: beta = 0 is KL(teacher || student), the forward one": kl(z, v) if beta == 0 else kl(v, z),
            "the formula itself gives 0 at both ends; they are defined apart": torch.zeros(2, 3),
        })  # fmt: skip
    for beta in (0.1, 0.5, 0.9):
        got = jsd(v, z, beta)
        shaped(got, (2, 3), f"random logits (2, 3, 7), beta = {beta}", torch.float32)
        equal(got, between(v, z, beta), f"random logits (2, 3, 7), beta = {beta}", "right for one place, and not for many")
    equal(jsd(v, z), between(v, z, 0.5), "random logits, beta not given", "without beta it must be 0.5")
    _far_apart(jsd)
    low = [x.to(torch.bfloat16) for x in (v, z)]
    shaped(jsd(*low), (2, 3), "logits in bfloat16", torch.float32)
    equal(jsd(*low), between(*low, 0.5), "logits in bfloat16", "make the logits float32 first: bfloat16 has three digits")
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    y = jsd(v, ours, 0.3)
    if not y.requires_grad:
        fail(NO_GRADIENT, "student logits with requires_grad=True")
    equal(torch.autograd.grad(y.sum(), ours)[0], torch.autograd.grad(between(v, theirs, 0.3).sum(), theirs)[0],
          "the gradient for the student's logits, beta = 0.3", "the numbers are right, and the gradient is not: nothing may be detached")  # fmt: skip


def _turned(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * (m * (m / p).log()).sum() + (1 - beta) * (m * (m / q).log()).sum()


def _far_apart(jsd) -> None:
    v, z = torch.tensor([[300.0, 0.0, 0.0]]), torch.tensor([[0.0, 300.0, 0.0]])
    for beta in (0.5, 0.2):
        wanted = torch.tensor([-beta * math.log(beta) - (1 - beta) * math.log(1 - beta)])
        given, got = f"a teacher and a student that are sure of different tokens (logits 300 and 0), beta = {beta}", jsd(v, z, beta)
        words = "a probability rounds to 0 and its logarithm is lost: stay with logarithms, also for the mixture"
        if not torch.isfinite(got).all():
            fail(words, given, wanted, got)
        equal(got, wanted, given, words)


def top_k_of(v, z, k, own=False, first=False, rest=True, swap=False, scale=False) -> torch.Tensor:
    """KL over k + 1 classes in float64, place by place; the options make the mistakes."""
    out = []
    for a, b in zip(v.flatten(0, -2), z.flatten(0, -2), strict=True):
        p, q = (Categorical(logits=x.double()).probs for x in (a, b))
        best = list(range(k)) if first else p.topk(k).indices.tolist()
        theirs = q.topk(k).indices.tolist() if own else best
        p, q = torch.stack([p[i] for i in best]), torch.stack([q[i] for i in theirs])
        if scale:
            p, q = p / p.sum(), q / q.sum()
        elif rest and k < len(a):
            p, q = (torch.cat((x, 1 - x.sum()[None])) for x in (p, q))
        p, q = (q, p) if swap else (p, q)
        out.append((p * (p.log() - q.log())).sum())
    return torch.stack(out).view(v.shape[:-1]).float()


@functools.cache
def shares_kept() -> dict:
    """What the experiment must find, with the same logits."""
    chance = torch.Generator().manual_seed(0)
    v = -1.2 * torch.log(torch.arange(1, 1001).float()) + torch.randn(200, 1000, generator=chance)
    z = v + torch.randn(200, 1000, generator=chance)
    return {k: (top_k_of(v, z, k).mean() / kl(v, z).mean()).item() for k in (1, 4, 16, 64, 256)}


@exercise("top_k_divergence", after=["kl_divergence"])
def check_top_k(predicted_k, top_k_divergence, measured):
    p, q = torch.tensor([[0.1, 0.5, 0.05, 0.35]]), torch.tensor([[0.3, 0.2, 0.4, 0.1]])
    v, z = p.log() + 1, q.log() - 1
    for k in (1, 2):
        given = f"p = (0.1, 0.5, 0.05, 0.35), q = (0.3, 0.2, 0.4, 0.1), as logits, k = {k}"
        got = top_k_divergence(v, z, k)
        shaped(got, (1,), given, hint="there is one number for each place")
        equal(got.float(), top_k_of(v, z, k), given, "this is not the KL of k tokens and the rest", {
            "the rest of the probability is left out: it is a class of its own": top_k_of(v, z, k, rest=False),
            "the k shares are made to sum to 1; the rest of the probability must stay, as a class of its own": top_k_of(v, z, k, scale=True),
            "the student's own best tokens are taken; it is asked about the teacher's": top_k_of(v, z, k, own=True),
            "these are the first k tokens; the teacher's k best were asked for": top_k_of(v, z, k, first=True),
            "teacher and student are swapped": (top_k_of(v, z, k, swap=True), top_k_of(z, v, k)),
            "this is the full KL": kl(v, z),
        })  # fmt: skip
    v, z = pair_of_logits(2, 3, 7)
    for k in (1, 3, 6, 7):
        got = top_k_divergence(v, z, k)
        shaped(got, (2, 3), f"random logits (2, 3, 7), k = {k}")
        if not torch.isfinite(got).all():
            fail("with every token among the best, the rest is 0; 0 times the logarithm of 0 is 0", f"random logits (2, 3, 7), k = {k}", got=got)
        told = "right for one place, and not for many: the best are those of each place"
        told = "with every token among the best, this is the full KL" if k == 7 else told
        equal(got.float(), top_k_of(v, z, k), f"random logits (2, 3, 7), k = {k}", told, tolerance=1e-3)
    right = shares_kept()
    if not isinstance(measured, dict) or set(measured) != set(right):
        fail("`measured` is a dict: each of the five k to its share", expected=sorted(right), got=measured)
    for k, wanted in right.items():
        share = measured[k].item() if isinstance(measured[k], torch.Tensor) and measured[k].numel() == 1 else measured[k]
        if not isinstance(share, int | float) or not close(torch.tensor(float(share)), torch.tensor(wanted), 5e-3):
            fail("`measured` must hold the mean of the top-k divergence, divided by the mean of the full KL", f"k = {k}", round(wanted, 4), share)
    if predicted_k not in right:
        fail("predicted_k is one of 1, 4, 16, 64 and 256", got=predicted_k)
    if predicted_k != min(k for k, share in right.items() if share >= 0.5):
        fail("your measurement disagrees with your prediction: look at it, and correct the prediction", got=predicted_k)
