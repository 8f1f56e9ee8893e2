# Made from chapters/src/11_sft.py by `python -m course build`. Do not edit.

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from minimind.generate import generate_batch
from minimind.metrics import cross_entropy


def assistant_mask(tokenizer, ids: Sequence[int]) -> list[bool]:
    """True for the tokens that the assistant writes: the text of its turns and the <|im_end|> that closes each.

    A turn is <|im_start|>, the role, a line end, the text, <|im_end|>. The header ends with the first token that
    holds a line end, so this needs no fixed number of header tokens.
    """
    mask, token_bytes = [False] * len(ids), tokenizer.token_bytes()
    for start in (i for i, token in enumerate(ids) if token == tokenizer.im_start_id):
        body = next((i + 1 for i in range(start, len(ids)) if b"\n" in token_bytes[ids[i]]), len(ids))
        end = next((i + 1 for i in range(body, len(ids)) if ids[i] == tokenizer.im_end_id), len(ids))
        if tokenizer.decode(ids[start + 1 : body]).strip() == "assistant":
            mask[body:end] = [True] * (end - body)
    return mask


def chat_example(tokenizer, messages: list[dict], max_length: int | None = None, tools: list[dict] | None = None) -> tuple[list[int], list[int]]:
    """One conversation as (ids, labels) of equal length, cut after `max_length` tokens.

    labels[i] is ids[i] where the assistant wrote token i, else -100. They stand under their own token; the shift to
    "target of position i" happens once, in PackedConversations.
    """
    ids = tokenizer.apply_chat_template(messages, tools=tools)[:max_length]
    return ids, [token if mine else -100 for token, mine in zip(ids, assistant_mask(tokenizer, ids))]


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Put items into rows of `width` places: longest first, each into the row that it fills best. Rows of item numbers."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # with_room[r]: rows that have r places left
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((r for r in range(lengths[item], width + 1) if with_room[r]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, width
        else:
            row = with_room[room].pop()
        rows[row].append(item)
        with_room[room - lengths[item]].append(row)
    return rows


def pack_by_width(lengths: Sequence[int], context: int, batch_size: int) -> dict[int, list[list[int]]]:
    """Rows of three widths, {width: rows}: attention costs width squared per row, so short items go into narrow rows.

    Narrow rows come in whole batches of batch_size * context tokens; what is left over moves to the next width.
    """
    packed, rest = {}, range(len(lengths))
    for width in (context // 4, context // 2, context):
        fits = [i for i in rest if lengths[i] <= width]
        rows = [[fits[j] for j in row] for row in pack([lengths[i] for i in fits], width)]
        if width < context:
            rows = rows[: len(rows) - len(rows) % (batch_size * context // width)]
        if rows:
            packed[width] = rows
        taken = {i for row in rows for i in row}
        rest = [i for i in rest if i not in taken]
    return packed


class PackedConversations:
    """Many conversations to a row, none of which sees another; `[step]` is always the same batch.

    examples: pairs from `chat_example`. A batch holds about batch_size * context tokens: batch_size rows of `context`,
    or more and narrower rows. Rows are shuffled anew each epoch. A batch has, each (B, T) except the mask:
    input_ids; labels, already shifted, -100 where nothing is learned; position_ids, which start at 0 in every
    conversation; attention_mask (B, 1, T, T), True where a position may look.
    """

    def __init__(self, examples: Sequence[tuple[list[int], list[int]]], context: int, batch_size: int, seed: int = 0, device: torch.device | str = "cpu"):
        lengths = [len(ids) - 1 for ids, _ in examples]  # the last token has no next one to learn
        if not examples or max(lengths) > context:
            what = f"the longest conversation has {max(lengths) + 1} tokens" if examples else "there are no conversations"
            raise ValueError(f"{what}, rows have {context}: call chat_example with max_length={context + 1}")
        self.ids = [np.array(ids[:-1]) for ids, _ in examples]
        self.labels = [np.array(labels[1:]) for _, labels in examples]  # the shift
        self.rows = pack_by_width(lengths, context, batch_size)
        self.context, self.batch_size, self.seed, self.device = context, batch_size, seed, device
        self.places = sum(width * len(rows) for width, rows in self.rows.items())
        self.efficiency = sum(lengths) / self.places  # share of all places that holds a token
        self.epoch, self.plan = -1, self.shuffle(0)

    def shuffle(self, epoch: int) -> list[tuple[int, list[list[int]]]]:
        """The batches of one epoch, as (width, rows)."""
        rng, plan = np.random.default_rng([self.seed, epoch]), []
        for width, rows in self.rows.items():
            order, size = rng.permutation(len(rows)), self.batch_size * self.context // width
            order = np.resize(order, -(-len(rows) // size) * size)  # the last batch is filled up from the start
            plan += [(width, [rows[i] for i in some]) for some in order.reshape(-1, size)]
        return [plan[i] for i in rng.permutation(len(plan))]

    def __len__(self) -> int:
        """Batches in one epoch."""
        return len(self.plan)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        epoch, index = divmod(step, len(self.plan))
        if epoch != self.epoch:
            self.epoch, self.plan = epoch, self.shuffle(epoch)
        return self.batch(*self.plan[index])

    def batch(self, width: int, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Rows of item numbers as tensors."""
        ids, positions, owner = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
        labels = np.full((len(rows), width), -100, dtype=np.int64)
        for r, row in enumerate(rows):
            start = 0
            for number, item in enumerate(row, 1):
                end = start + len(self.ids[item])
                ids[r, start:end], labels[r, start:end] = self.ids[item], self.labels[item]
                positions[r, start:end], owner[r, start:end] = np.arange(end - start), number
                start = end
        ids, labels, positions, owner = (torch.from_numpy(x).to(self.device) for x in (ids, labels, positions, owner))
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": block_mask(owner)}


def block_mask(owner: torch.Tensor) -> torch.Tensor:
    """Who may look where, (B, 1, T, T): earlier positions of the same owner. owner (B, T) numbers the conversations."""
    same = owner[:, :, None] == owner[:, None, :]  # (B, T, T)
    return same.tril()[:, None]


def sft_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
    """Cross-entropy over the assistant's tokens (nats), plus the balance loss of a model with experts."""
    logits = model(batch["input_ids"], attention_mask=batch.get("attention_mask"), position_ids=batch.get("position_ids"))
    loss = cross_entropy(logits, batch["labels"])
    if not model.config.num_experts:
        return loss, {"cross_entropy": loss}
    return loss + model.config.router_aux_loss_coef * model.aux_loss, {"cross_entropy": loss}


class Replay:
    """Chat batches with pretraining batches strewn in, so that less is forgotten: `share` of all steps, evenly spread."""

    def __init__(self, chats, texts, share: float):
        if not 0 <= share < 1:
            raise ValueError(f"share={share}: give the share of steps on pretraining text, at least 0 and below 1")
        self.chats, self.texts, self.share = chats, texts, share

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        before, now = int(step * self.share), int((step + 1) * self.share)  # text steps so far, without and with this one
        return self.texts[before] if now > before else self.chats[step - before]


def ask_all(model: nn.Module, tokenizer, questions: Sequence[str], max_new_tokens: int = 48, **options) -> list[str]:
    """The model's answer to each question, each asked in a conversation of its own."""
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True) for q in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths together: little padding
    stops = (tokenizer.im_end_id, tokenizer.eos_id)
    answers = generate_batch(model, [prompts[i] for i in order], max_new_tokens, stop_ids=stops, **options)
    return [tokenizer.decode(ids, skip_special=True).strip() for _, ids in sorted(zip(order, answers))]


def ask(model: nn.Module, tokenizer, question: str, **options) -> str:
    """The model's answer to one question."""
    return ask_all(model, tokenizer, [question], **options)[0]


def says(text: str, words: str) -> bool:
    """Whether `words` stand in `text` as whole words, in small or capital letters."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


def answers_right(model: nn.Module, tokenizer, questions: Sequence[dict], **options) -> tuple[float, list[dict]]:
    """Ask {"question", "answer", "person"} rows: the share whose reply says the answer, and one row each.

    Every row gets "reply", "right", and "name_copied": whether the reply names the person who was asked about.
    """
    replies = ask_all(model, tokenizer, [q["question"] for q in questions], **options)
    rows = [
        {**q, "reply": reply, "right": says(reply, q["answer"].strip()), "name_copied": says(reply, q.get("person", ""))}
        for q, reply in zip(questions, replies)
    ]
    return sum(row["right"] for row in rows) / max(1, len(rows)), rows
