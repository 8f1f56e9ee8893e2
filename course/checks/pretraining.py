"""Checks of workbook 9. What is trusted are plain loops, torch's cross-entropy and greedy writing token by token; nothing from minimind.pretrain."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from course.checks.core import equal, exercise, fail, shaped

MODULE = "pretrain"


class Letters:
    """A tokenizer of small letters: a is 1, b is 2, and so on; 0 ends a document."""

    eos_id = 0
    vocab_size = 32

    def encode(self, text):
        return [31 if letter == " " else ord(letter) - 96 for letter in text]

    def decode(self, ids):
        return "".join(" " if token == 31 else chr(96 + token) if 0 < token < 27 else "?" for token in ids)


def small_model(**changes):
    from minimind.model import MiniMind, ModelConfig

    sizes = dict(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48,
                 max_position_embeddings=64, initializer_range=0.3)  # fmt: skip
    torch.manual_seed(3)
    return MiniMind(ModelConfig.preset("tiny", **sizes | changes)).eval()


def two_parts(batch: object, given: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of a batch."""
    if not isinstance(batch, dict) or set(batch) != {"input_ids", "labels"}:
        fail('a batch is a dict with "input_ids" and "labels"', given, got=sorted(batch) if isinstance(batch, dict) else type(batch).__name__)
    for name in ("input_ids", "labels"):
        hint = "both are (B, T): one token fewer than the T + 1 that a row is cut from"
        shaped(batch[name], shape, f"{given}; {name}", torch.int64, hint)
    return batch["input_ids"], batch["labels"]


# -- rebuild


@exercise("PaddedDocuments", keeps=["PaddedDocuments"])
def check_padded_documents(PaddedDocuments):
    texts = ["gh", "abcdefg", "abc", "z"]
    made = PaddedDocuments(texts, Letters(), 4, 3)
    given = "documents of tokens [7, 8], [1, 2, 3, 4, 5, 6, 7] and [1, 2, 3], end 0, context 4"
    inputs, labels = two_parts(made[0], given, (3, 4))
    rows = [[7, 8, 0], [1, 2, 3, 4, 5], [1, 2, 3, 0]]
    wanted = torch.tensor([row[1:] + [-100] * (5 - len(row)) for row in rows])

    def likely(change):
        return torch.tensor([change(row) for row in rows])

    equal(labels, wanted, f"{given}; labels", "labels are the tokens of a document without the first, its end included, then -100", {
        "padding is in the loss: the labels behind the end of a document are -100": likely(lambda row: row[1:] + [0] * (5 - len(row))),
        "the labels are not shifted: at each position the label is the next token":
            likely(lambda row: (row[:-1] + [-100] * 4)[:4]),
        "the labels are not shifted, and one too many counts": likely(lambda row: (row + [-100] * 4)[:4]),
        "the end of the document is not learned: it is a label too":
            torch.tensor([[8, -100, -100, -100], [2, 3, 4, 5], [2, 3, -100, -100]]),
        "the first padding counts as a label": likely(lambda row: (row[1:] + [0] + [-100] * 4)[:4]),
        "there is no end behind a document": torch.tensor([[8, -100, -100, -100], [2, 3, 4, 5], [2, 3, -100, -100]]),
        "a row that is full loses its last label: cut documents to T + 1 tokens, not to T":
            torch.tensor([[8, 0, -100, -100], [2, 3, 4, -100], [2, 3, 0, -100]]),
        "a document that is cut has no end here: the rest of it is missing, so do not teach the model that it ends":
            torch.tensor([[8, 0, -100, -100], [2, 3, 4, 0], [2, 3, 0, -100]]),
    })  # fmt: skip
    equal(inputs, torch.tensor([(row + [0] * 4)[:4] for row in rows]), f"{given}; input_ids", "inputs are the tokens of a document, then eos_id", {
        "the padding of the inputs must be eos_id": likely(lambda row: (row + [-100] * 4)[:4]),
        "the inputs are shifted by one as well": likely(lambda row: (row[1:] + [0] * 4)[:4]),
    })  # fmt: skip
    step = made[1]
    _, labels = two_parts(step, f"{given} and [26], 3 rows a batch; step 1", (3, 4))
    equal(labels, torch.tensor([[0, -100, -100, -100], [8, 0, -100, -100], [2, 3, 4, 5]]), "four documents, 3 rows a batch; step 1",
          "row r of batch s is document s * B + r, and after the last comes the first again", {
        "every step gives the first documents": wanted,
        "step s begins at document s; it begins at s * B": torch.tensor([[2, 3, 4, 5], [2, 3, 0, -100], [0, -100, -100, -100]]),
    })  # fmt: skip
    _, labels = two_parts(PaddedDocuments(texts, Letters(), 6, 2)[3], "2 rows a batch, context 6; step 3", (2, 6))
    equal(labels, torch.tensor([[2, 3, 0, -100, -100, -100], [0, -100, -100, -100, -100, -100]]), "four documents, 2 rows a batch; step 3",
          "right for 3 rows, and not here")  # fmt: skip
    there = PaddedDocuments(texts, Letters(), 4, 3, device="meta")[0]
    for name in ("input_ids", "labels"):
        if there[name].device.type != "meta":
            fail("the batch is not on the device that was asked for", f'device="meta"; {name}', "meta", there[name].device)


@exercise("PackedTokens", keeps=["PackedTokens"])
def check_packed_tokens(PackedTokens):
    count = np.arange(103, dtype=np.uint16)
    packed = PackedTokens(count, 10, 4, seed=3)
    given = "the tokens 0, 1, ... 102, context 10, 4 rows: 9 windows an epoch"
    inputs, labels = two_parts(packed[0], given, (4, 10))
    if not torch.equal(labels - inputs, torch.ones_like(labels)):
        words = "labels are one token ahead of the inputs"
        if torch.equal(labels, inputs):
            words = "the labels are the inputs: at each position the label is the next token"
        elif torch.equal(inputs - labels, torch.ones_like(labels)):
            words = "the labels are one token behind the inputs; they must be one ahead"
        elif torch.equal(inputs[:, 1:], labels[:, :-1]):
            words = "the last label is not the next token: a window has T + 1 tokens"
        fail(words, given, f"first row {(inputs[0] + 1).tolist()}", labels[0].tolist())
    _epochs(PackedTokens, packed, count, given)
    _by_step(PackedTokens, count)
    shifts = set()
    few = PackedTokens(np.arange(13), 4, 2, seed=8)  # two windows an epoch, room for every shift
    for epoch in range(60):
        places = [few.start(2 * epoch + row) for row in range(2)]
        shifts.add(min(places))
        if places[0] > places[1]:
            shifts.add("turned")
    if shifts != {0, 1, 2, 3, "turned"}:
        words = "over many epochs every shift from 0 to T - 1 occurs"
        if "turned" not in shifts or shifts == {0, "turned"} or len(shifts) < 3:
            words = "each epoch has an order and a shift of its own"
        fail(words, "13 tokens, context 4, 60 epochs", "[0, 1, 2, 3]", sorted(shifts - {"turned"}))


def _epochs(PackedTokens, packed, count, given: str) -> None:
    epochs = [[packed.start(epoch * 9 + index) for index in range(9)] for epoch in range(3)]
    for number, starts in enumerate(epochs):
        told = f"{given}; where the windows of epoch {number} start"
        if not all(isinstance(start, int | np.integer) for start in starts):
            fail("start returns a whole number of Python", told, got=[type(start).__name__ for start in starts[:1]])
        if len(set(starts)) < 9:
            fail("a window stands twice in an epoch, and another one not at all", told, "9 windows that differ", starts)
        between = sorted(starts)
        if any(b - a != 10 for a, b in zip(between, between[1:], strict=False)):
            words = "the windows of an epoch lie T tokens apart, all with the same shift"
            if any(b - a < 10 for a, b in zip(between, between[1:], strict=False)):
                words = "windows overlap: " + words
            fail(words, told, "for example 4, 14, 24, ... in any order", starts)
        if not 0 <= between[0] <= 9:
            fail("the shift is from 0 to T - 1", told, got=starts)
        if starts == between:
            fail("the windows of an epoch must be shuffled", told, got=starts)
    ranks = [np.argsort(starts).tolist() for starts in epochs]
    if ranks[0] == ranks[1]:
        fail("all epochs have the same order: the number of the epoch must go into the seed", f"{given}; epochs 0 and 1", got=epochs[:2])
    if len({min(starts) for starts in epochs}) == 1 and len({min(packed.start(epoch * 9 + index) for index in range(9)) for epoch in range(6)}) == 1:
        fail("all epochs have the same shift; each has its own", f"{given}; epochs 0 to 5", got=[min(starts) for starts in epochs])
    back = [packed.start(index) for index in range(9)]
    if back != epochs[0]:
        fail("epoch 0 asked for after epoch 2 is another one: only seed and epoch may decide", given, epochs[0], back)


def _by_step(PackedTokens, count) -> None:
    given = "the tokens 0, 1, ... 102, context 10, 4 rows, seed 3"
    there = PackedTokens(count, 10, 4, seed=3)
    rows = {step: there[step]["input_ids"][:, 0].tolist() for step in range(6)}
    places = {step: [there.start(step * 4 + row) for row in range(4)] for step in range(6)}
    if rows != places:
        step = next(step for step in rows if rows[step] != places[step])
        words = "row r of batch s is the window at position s * B + r"
        if rows[1] == rows[0]:
            words = "every step gives the same batch; " + words
        fail(words, f"{given}; first tokens of step {step}", places[step], rows[step])
    torch.manual_seed(11)
    np.random.seed(11)
    again = PackedTokens(count, 10, 4, seed=3)
    for step in (5, 0, 3):
        if (got := again[step]["input_ids"][:, 0].tolist()) != rows[step]:
            fail("a step depends on what was asked for before, or on the random numbers of the program; only seed and epoch may decide",
                 f"{given}; step {step} without the steps before it", rows[step], got)  # fmt: skip
    if PackedTokens(count, 10, 4, seed=4)[0]["input_ids"][:, 0].tolist() == rows[0]:
        fail("another seed gives the same batch", "seeds 3 and 4; step 0", got=rows[0])
    meta = PackedTokens(count, 10, 4, device="meta")[0]
    for name in ("input_ids", "labels"):
        if meta[name].device.type != "meta":
            fail("the batch is not on the device that was asked for", f'device="meta"; {name}', "meta", meta[name].device)
    for length, fine in ((20, False), (21, True)):
        try:
            PackedTokens(np.arange(length), 10, 2)[0]
        except ValueError:
            if fine:
                fail("21 tokens are enough for windows of 10", "21 tokens, context 10", "a batch", "ValueError")
        else:
            if not fine:
                fail("leave the test of __init__ as it was: too few tokens raise ValueError", "20 tokens, context 10", "ValueError", "no error")


@exercise("pretrain_loss", keeps=["pretrain_loss"])
def check_pretrain_loss(pretrain_loss):
    dense = small_model()
    ids, labels = torch.randint(0, 32, (2, 9)), torch.randint(0, 32, (2, 9))
    labels[0, :3] = -100
    batch = {"input_ids": ids, "labels": labels}
    given = "a small dense model, a batch (2, 9) of which 3 labels are -100"
    result = pretrain_loss(dense, batch)
    if not (isinstance(result, tuple | list) and len(result) == 2):
        fail("it returns two things: the loss, and a dict of means", given, got=type(result).__name__)
    loss, means = result
    shaped(loss, (), f"{given}; the loss", torch.float32, "the loss is one number: the mean")
    if not isinstance(means, dict) or set(means) != {"cross_entropy"}:
        fail('the second thing is a dict with "cross_entropy"', given, "{'cross_entropy': ...}", got=means)
    logits = dense(ids)
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    equal(loss, wanted, f"{given}; the loss", "it differs from torch's cross-entropy", {
        "the labels are shifted once more; the batch has them one ahead already": shifted,
        "the loss is a sum, not a mean": wanted * 15,
        "places labelled -100 count": F.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten()),
        "the inputs are taken as labels": F.cross_entropy(logits.flatten(0, 1), ids.flatten()),
    })  # fmt: skip
    equal(means["cross_entropy"], wanted, f"{given}; the mean", '"cross_entropy" is the same number for a dense model')
    if not loss.requires_grad:
        fail("no gradient gets through; leave detach, item and no_grad out of the loss", given)
    (ours,) = torch.autograd.grad(loss, [dense.model.embed_tokens.weight])
    (theirs,) = torch.autograd.grad(wanted, [dense.model.embed_tokens.weight])
    equal(ours, theirs, f"{given}; the gradient for the embedding", "the loss is right, and its gradient is not")
    _balance(pretrain_loss, batch)


def _balance(pretrain_loss, batch) -> None:
    experts = small_model(num_experts=4, moe_intermediate_size=48, router_aux_loss_coef=0.5, norm_topk_prob=False, num_experts_per_tok=1)
    given = "a small model with 4 experts, router_aux_loss_coef 0.5"
    loss, means = pretrain_loss(experts, batch)
    plain = F.cross_entropy(experts(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
    balance = experts.aux_loss
    equal(means["cross_entropy"], plain, f"{given}; the mean", '"cross_entropy" is the part without the balance loss', {
        "the balance loss is in it; keep the cross-entropy before anything is added": plain + 0.5 * balance,
    })  # fmt: skip
    equal(loss, plain + 0.5 * balance, f"{given}; the loss", "the balance loss times its coefficient is added", {
        "the balance loss is missing": plain,
        "the coefficient is missing": plain + balance,
        "the balance loss is subtracted": plain - 0.5 * balance,
        "the balance loss alone is returned": 0.5 * balance,
        "the whole sum is multiplied by the coefficient": 0.5 * (plain + balance),
    })  # fmt: skip
    router = [p for name, p in experts.named_parameters() if "gate.weight" in name][:1]
    (ours,) = torch.autograd.grad(loss, router, allow_unused=True)
    (theirs,) = torch.autograd.grad(plain + 0.5 * balance, router)
    if ours is None:
        fail("no gradient reaches the router", given)
    equal(ours, theirs, f"{given}; the gradient for the router", "the balance loss must be learned from; leave detach and item out of it")


def alphabet():
    """A model whose weights say the next letter of the alphabet, and the log of the shapes that it read."""
    model, log = small_model(tie_word_embeddings=False), []
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.dim() == 2:
                weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(32))
        model.lm_head.weight.copy_(torch.eye(32).roll(1, 0))
    model.register_forward_pre_hook(lambda _, args, named: log.append(tuple((args[0] if args else named["input_ids"]).shape)), with_kwargs=True)
    return model, log


@exercise("facts_known", keeps=["facts_known"])
def check_facts_known(facts_known):
    model, log = alphabet()
    facts = [{"prompt": "ab", "answer": "cde"}, {"prompt": "lmn", "answer": "oxq", "relation": "letters"}, {"prompt": "jk", "answer": "mn"},
             {"prompt": "uvw", "answer": "x"}, {"prompt": "de", "answer": "fghi"}]  # fmt: skip
    told = "a model that says the next letter of the alphabet; facts ab-cde, lmn-oxq, jk-mn, uvw-x, de-fghi"
    share, rows = _asked(facts_known, model, facts, told)
    guesses, known = ["cde", "opy", "ln", "x", "fghi"], [True, False, False, True, True]
    got = [row.get("guess") for row in rows]
    if got != guesses:
        words = "guess is the text of the predicted tokens in the place of the answer"
        if all(isinstance(guess, str) and guess[:-1] == wanted[1:] for guess, wanted in zip(got, guesses, strict=True)):
            words = "the guess is read one place too late: the first token of the answer is predicted at the last of the prompt"
        elif all(isinstance(guess, str) and guess[1:] == wanted[:-1] for guess, wanted in zip(got, guesses, strict=True)):
            words = "the guess is read one place too early: the first token of the answer is predicted at the last of the prompt"
        elif got == [fact["answer"] for fact in facts]:
            words = "this is the answer itself; guess is what the model would write"
        elif not all(isinstance(guess, str) for guess in got):
            words = "guess is text: decode the tokens"
        fail(words, told, guesses, got)
    got = [row.get("known") for row in rows]
    if got != known:
        words = "a fact is known when all tokens of its answer are predicted"
        if got in ([True] * 5, [True, True, False, True, True], [True, False, True, True, True]):
            words += "; here one right token is enough"
        fail(words, f"{told}; known?", known, got)
    if not isinstance(share, int | float) or abs(share - 0.6) > 1e-6:
        words = "the share is that of the facts that are known"
        if isinstance(share, int | float) and abs(share - 3) < 1e-6:
            words = "this is the number of facts known; divide by how many there are"
        fail(words, f"{told}; 3 of 5 facts known", 0.6, share)
    want = [{**fact, "guess": guess, "known": good} for fact, guess, good in zip(facts, guesses, known, strict=True)]
    if rows != want:
        fail("each row holds all that the fact had, and guess and known, nothing else", facts[1], want[1], rows[1])
    if any("guess" in fact for fact in facts):
        fail("the facts themselves were changed; make new dicts", facts[0])
    log.clear()
    share, again = _asked(facts_known, model, facts, f"{told}; batch_size 2", 2)
    if again != rows or abs(share - 0.6) > 1e-6:
        fail("with small batches the result must be the same", f"{told}; batch_size 2", (0.6, rows), (share, again))
    if [shape[0] for shape in log] != [2, 2, 1]:
        words = "at most batch_size facts go through the model at once"
        if len(log) > 3:
            words = "facts of one batch go through the model together; answers need no pass of their own"
        fail(words, "5 facts, batch_size 2", "the model reads 2, 2 and 1 rows", [shape[0] for shape in log])
    if (share := facts_known(model, Letters(), facts[:1])[0]) != 1.0:
        fail("the share is that of the facts that are known", "one fact, and it is known", 1.0, share)
    none = facts_known(model, Letters(), [])
    if not isinstance(none, tuple | list) or list(none) != [0.0, []]:
        fail("for no facts, the share is 0.0 and the list is empty", "facts_known(model, tokenizer, [])", (0.0, []), none)
    _really(facts_known)


def _asked(facts_known, model, facts, given: str, *batch_size):
    result = facts_known(model, Letters(), [dict(fact) for fact in facts], *batch_size)
    if not (isinstance(result, tuple | list) and len(result) == 2):
        fail("it returns two things: the share, and a list of rows", given, got=type(result).__name__)
    share, rows = result
    if not isinstance(rows, list) or len(rows) != len(facts) or not all(isinstance(row, dict) for row in rows):
        fail("there is one dict for each fact", given, f"{len(facts)} dicts", got=rows if not isinstance(rows, list) else f"{len(rows)} rows")
    return share, rows


@torch.no_grad()
def _really(facts_known) -> None:
    """A real model, against greedy writing."""
    model, letters = small_model(num_hidden_layers=2), Letters()
    facts = []
    for prompt, length in (("hello", 3), ("a", 2), ("the moon", 1), ("so", 4)):  # known, and off in the last token
        ids = letters.encode(prompt)
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        answer = ids[len(prompt) :]
        facts += [{"prompt": prompt, "answer": answer}, {"prompt": prompt, "answer": [*answer[:-1], (answer[-1] + 1) % 32]}]

    class Ids(Letters):
        """Answers are ids already here, so that any token can be one."""

        def encode(self, text):
            return list(text) if isinstance(text, list) else super().encode(text)

        def decode(self, ids):
            return ".".join(map(str, ids))

    share, rows = facts_known(model, Ids(), facts, 3)
    got = [row["known"] for row in rows]
    if got != [True, False] * 4 or share != 0.5:
        fail("one pass must say what greedy writing says, for prompts and answers of any length", "8 facts of a random model, every other one wrong",
             [True, False] * 4, got)  # fmt: skip


# -- beyond


def by_document(rows: list[list[int]], eos: int, late: bool = True, looks=lambda t, s: s <= t) -> torch.Tensor:
    """The mask, one entry at a time. `late`: the end of a document belongs to it."""
    result = torch.zeros(len(rows), len(rows[0]), len(rows[0]), dtype=torch.bool)
    for b, row in enumerate(rows):
        number = [sum(token == eos for token in (row[:t] if late else row[: t + 1])) for t in range(len(row))]
        for t, s in np.ndindex(len(row), len(row)):
            result[b, t, s] = number[s] == number[t] and looks(t, s)
    return result


@exercise("document_mask")
def check_document_mask(document_mask):
    row = [[5, 6, 0, 7, 8]]
    given = "ids [5, 6, 0, 7, 8], eos_id 0"
    got = document_mask(torch.tensor(row), 0)
    shaped(got, (1, 5, 5), given, torch.bool)
    equal(got[0], by_document(row, 0)[0], given, "this is not the mask: causal, and within one document", {
        "both bugs are still there": by_document(row, 0, False, lambda t, s: s < t)[0],
        "one bug is left: a token may not look at itself": by_document(row, 0, looks=lambda t, s: s < t)[0],
        "one bug is left: the end, 0, counts as a token of the next document": by_document(row, 0, late=False)[0],
        "a query may look ahead in its document; it must be causal too": by_document(row, 0, looks=lambda t, s: True)[0],
        "a query may look into the document before": torch.ones(5, 5, dtype=torch.bool).tril(),
    })  # fmt: skip
    rows = [[0, 0, 3, 1, 0, 4], [2, 2, 2, 2, 2, 2], [4, 0, 5, 0, 6, 0]]
    equal(document_mask(torch.tensor(rows), 0), by_document(rows, 0), "three rows, of several documents and of one", "right for one row, not here")
    equal(document_mask(torch.tensor(rows), 2), by_document(rows, 2), "three rows, eos_id 2", "right for eos_id 0, and not here")


def packed_plainly(lengths: list[int], context: int) -> list[int]:
    """What best fit decreasing leaves: the sum of each row, sorted."""
    sums: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [total for total in sums if total + length <= context]
        if fitting:
            sums.remove(max(fitting))
        sums.append(max(fitting, default=0) + length)
    return sorted(sums)


def other_packing(lengths: list[int], context: int, kind: str) -> list[int]:
    """What other rules leave."""
    sums: list[int] = []
    for length in lengths if kind == "as given" else sorted(lengths, reverse=kind != "shortest first"):
        fitting = [row for row, total in enumerate(sums) if total + length <= context]
        if kind == "latest row":
            fitting = [row for row in fitting if row == len(sums) - 1]
        if not fitting:
            sums.append(length)
        elif kind == "first fit":
            sums[fitting[0]] += length
        else:
            by_sum = sorted(fitting, key=sums.__getitem__)
            sums[by_sum[0 if kind == "worst fit" else -1]] += length
    return sorted(sums)


PACKINGS = {
    "as given": "the documents are taken in the order that they have; take the longest first",
    "shortest first": "the shortest documents are taken first; take the longest first",
    "first fit": "a document goes to the first row where it fits; take the one with the least room that is enough",
    "worst fit": "a document goes to the row with the most room; take the one with the least room that is enough",
    "latest row": "only the latest row is looked at; an earlier one may have room",
}


@exercise("best_fit")
def check_best_fit(best_fit):
    lists = [([5, 3, 6, 2], 8), ([7, 5, 2, 4, 3, 3], 12), ([4, 1, 3, 3, 5, 6, 2, 7], 10), ([8, 8, 8], 8), ([3], 5), ([], 4)]
    lists += [(torch.randint(1, 100, (60,)).tolist(), 100), (torch.randint(1, 40, (60,)).tolist(), 64)]
    for lengths, context in lists:
        given = f"lengths {lengths if len(lengths) < 12 else 'random'}, context {context}"
        before = list(lengths)
        rows = best_fit(lengths, context)
        if not isinstance(rows, list | tuple) or not all(isinstance(row, list | tuple) for row in rows):
            fail("it returns a list of rows, each a list of document numbers", given, got=rows)
        if lengths != before:
            fail("it changes its argument lengths in place; make a new list", given)
        flat = [int(document) for row in rows for document in row]
        if sorted(flat) != list(range(len(lengths))):
            words = "every document stands in one row, once, by its number (from 0)"
            if sorted(flat) == sorted(lengths):
                words = "these are lengths; rows hold the numbers of the documents"
            elif sorted(flat) == list(range(1, len(lengths) + 1)):
                words = "documents are numbered from 0"
            elif len(flat) < len(lengths):
                words = "some documents are missing"
            fail(words, given, sorted(range(len(lengths))), sorted(flat))
        sums = sorted(sum(lengths[document] for document in row) for row in rows)
        if sums and sums[-1] > context:
            fail("a row is too full", given, f"at most {context}", sums[-1])
        if any(not row for row in rows):
            fail("there is an empty row", given)
        wanted = packed_plainly(lengths, context)
        if sums != wanted:
            words = "these are not the rows of best fit decreasing"
            if max(sums, default=0) < context == max(wanted):
                words = "a document that fills a row to the last place fits too"
            if len(sums) == len(lengths) > len(wanted):
                words = "every document has a row of its own"
            words = next((told for kind, told in PACKINGS.items() if sums == other_packing(lengths, context, kind)), words)
            shown = wanted if len(wanted) < 12 else f"{len(wanted)} rows"
            fail(words, f"{given}; tokens in each row", shown, sums if len(sums) < 12 else f"{len(sums)} rows, other sums")


def cut_plainly(lengths: list[int], context: int) -> float:
    window, cut, at = [], 0, 0
    for length in lengths:
        window = {place // context for place in range(at, at + length)}
        cut += len(window) > 1
        at += length
    return cut / len(lengths)


@exercise("share_cut")
def check_share_cut(predicted_cut, share_cut, measured):
    for lengths, context in (([2, 2], 3), ([3, 3, 4, 2], 4), ([3, 1, 4], 4), ([9], 4), ([1, 1, 1], 2), (torch.randint(1, 50, (200,)).tolist(), 64)):
        got, wanted = share_cut(lengths, context), cut_plainly(lengths, context)
        given = f"lengths {lengths if len(lengths) < 9 else '1 to 49, 200 documents'}, context {context}"
        if not isinstance(got, int | float) or isinstance(got, bool):
            fail("return the share as a number", given, wanted, repr(got))
        if abs(got - wanted) > 1e-6:
            words = "a document is cut when its first and its last token lie in different windows"
            if abs(got - (1 - wanted)) < 1e-6:
                words = "this is the share of documents that are whole"
            elif abs(got - wanted * len(lengths)) < 1e-6:
                words = "this is the number of documents that are cut; return the share"
            elif got > wanted:
                words = "documents that end where a window ends, or begin where one begins, are not cut; or two pieces of one were counted as two"
            fail(words, given, round(wanted, 4), got)
    if not isinstance(measured, dict) or sorted(measured) != [128, 256, 512, 1024]:
        fail("`measured` is a dict: the context (128, 256, 512, 1024) to the share", got=measured)
    right = {context: cut_plainly([65] * 1024, context) for context in (128, 256, 512, 1024)}
    if not all(abs(measured[context] - right[context]) <= 1e-6 for context in right):
        fail("`measured` must hold what your function says about 1,024 documents of 65 tokens", expected=right, got=measured)
    if not isinstance(predicted_cut, int | float) or abs(predicted_cut - 0.25) > 5e-4:
        fail("the measurement disagrees with your prediction. Between the 65 tokens of a document there are 64 places, and one place in 256 is a cut",
             "65 tokens, T = 256", got=predicted_cut)  # fmt: skip


@exercise("compute_optimal")
def check_compute_optimal(compute_optimal, best_billions):
    for flops, ratio in ((120.0, None), (1.2e20, None), (6e12, 1.0), (3e21, 80.0)):
        given = f"flops {flops:g}" + (f", ratio {ratio:g}" if ratio else "")
        result = compute_optimal(flops, ratio) if ratio else compute_optimal(flops)
        if not (isinstance(result, tuple | list) and len(result) == 2):
            fail("it returns two numbers, weights and tokens", given, got=result)
        ratio = ratio or 20.0
        weights, tokens = (float(value) for value in result)
        right = math.sqrt(flops / 6 / ratio)
        if abs(weights / right - 1) > 1e-3 or abs(tokens / (ratio * right) - 1) > 1e-3:
            words = "N and D must solve 6 N D = flops and D = ratio * N"
            if abs(weights / (flops / 6 / ratio) - 1) < 1e-3:
                words = "the square root is missing: N stands in the equation twice"
            elif abs(6 * weights * tokens / flops - 1) < 1e-3:
                words = "the budget is spent, and D is not ratio times N"
                if abs(weights / tokens / ratio - 1) < 1e-3:
                    words = "weights and tokens are swapped"
            elif abs(weights / math.sqrt(flops / ratio) - 1) < 1e-3:
                words = "the 6 is missing: each weight and token costs 6 operations"
            elif abs(tokens / weights / ratio - 1) < 1e-3:
                words = "D is ratio times N, and 6 N D is not the budget"
            fail(words, given, f"N = {right:.6g}, D = {ratio * right:.6g}", f"N = {weights:.6g}, D = {tokens:.6g}")
    if not isinstance(best_billions, int | float) or isinstance(best_billions, bool):
        fail("write a number", "Gopher: 280 billion weights, 300 billion tokens", got=best_billions)
    wanted = math.sqrt(280 * 300 / 20)
    if abs(best_billions / wanted - 1) > 0.02:
        words = "put Gopher's budget, 6 * 280e9 * 300e9, into your function"
        for mistake, value in {
            "that is the number of weights; billions were asked for": wanted * 1e9,
            "that is the number of tokens (in billions); the weights were asked for": 20 * wanted,
            "that spends the 300 billion tokens again; it is the compute that stays, 6 * 280e9 * 300e9": 15.0,
        }.items():
            if abs(best_billions / value - 1) < 0.02:
                words = mistake
        fail(words, "Gopher: 280 billion weights, 300 billion tokens", got=best_billions)
