from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from minimind.metrics import cross_entropy

class PackedTokens:
    """Full windows of one long row of tokens, in shuffled epochs; `[step]` is always the same batch.

    Window i of an epoch is `tokens[i*context + shift : ... + context + 1]`; every epoch has its own order and shift,
    so that each token is seen once an epoch and never twice at the same place.
    """

    def __init__(self, tokens, context: int, batch_size: int, seed: int = 0, device: torch.device | str = "cpu"):
        if len(tokens) < 2 * context + 1:
            raise ValueError(f"{len(tokens)} tokens are too few for windows of {context}: need {2 * context + 1}, shorten the context or add text")
        self.tokens, self.context, self.batch_size, self.seed, self.device = tokens, context, batch_size, seed, device
        self.windows = (len(tokens) - 1) // context - 1  # one less leaves room for the shift
        self.epoch, self.starts = -1, np.empty(0, dtype=np.int64)

    def start(self, position: int) -> int:
        """First token of the window at `position` of the endless row of shuffled epochs."""
        epoch, index = divmod(position, self.windows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.starts = epoch, rng.permutation(self.windows) * self.context + rng.integers(self.context)
        return int(self.starts[index])

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        first = step * self.batch_size
        starts = [self.start(position) for position in range(first, first + self.batch_size)]
        rows = np.stack([self.tokens[start : start + self.context + 1] for start in starts])
        rows = torch.from_numpy(rows.astype(np.int64)).to(self.device)  # (B, T+1)
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}

class PaddedDocuments:
    """One document a row, tokenised when asked for and padded to `context`: what most tutorials do. The slow baseline."""

    def __init__(self, texts: Sequence[str], tokenizer, context: int, batch_size: int, device: torch.device | str = "cpu"):
        self.texts, self.tokenizer, self.context, self.batch_size, self.device = texts, tokenizer, context, batch_size, device

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        ids = torch.full((self.batch_size, self.context + 1), self.tokenizer.eos_id)
        labels = torch.full((self.batch_size, self.context), -100)
        for row in range(self.batch_size):
            text = self.texts[(step * self.batch_size + row) % len(self.texts)]
            tokens = torch.tensor(self.tokenizer.encode(text) + [self.tokenizer.eos_id])[: self.context + 1]
            ids[row, : len(tokens)] = tokens
            labels[row, : len(tokens) - 1] = tokens[1:]
        return {"input_ids": ids[:, :-1].to(self.device), "labels": labels.to(self.device)}

def pretrain_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
    """Cross-entropy of the next token (nats), plus the balance loss of a model with experts."""
    loss = cross_entropy(model(batch["input_ids"]), batch["labels"])
    if not model.config.num_experts:
        return loss, {"cross_entropy": loss}
    return loss + model.config.router_aux_loss_coef * model.aux_loss, {"cross_entropy": loss}

@torch.no_grad()
def facts_known(model: nn.Module, tokenizer, facts: Sequence[dict], batch_size: int = 64) -> tuple[float, list[dict]]:
    """Share of facts whose every answer token is the most likely one after the prompt, and one row per fact.

    One forward pass reads prompt and answer together. Each position sees only earlier tokens, so all answer tokens
    come first exactly when greedy completion would write the answer.
    """
    device, rows = next(model.parameters()).device, []
    for first in range(0, len(facts), batch_size):
        some = facts[first : first + batch_size]
        prompts = [tokenizer.encode(fact["prompt"]) for fact in some]
        answers = [tokenizer.encode(fact["answer"]) for fact in some]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(p + a) for p, a in zip(prompts, answers)], batch_first=True)
        best = model(ids.to(device)).argmax(-1).tolist()  # (B, T)
        for fact, prompt, answer, row in zip(some, prompts, answers, best):
            guess = row[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            rows.append({**fact, "guess": tokenizer.decode(guess), "known": guess == answer})
    return sum(row["known"] for row in rows) / max(1, len(rows)), rows
