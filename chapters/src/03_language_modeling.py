# %% [markdown]
# # 3. Language modeling
#
# Plain first version. Reading 30 minutes; running: smoke 10 s, cpu 40 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="language-default-exp"
#| default_exp metrics

# %% id="language-imports"
#| export
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn import functional as F

from minimind.tokenizer import Tokenizer

# %% id="language-cross-entropy"
#| export
def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Mean of -ln p(label) in nats over all labels but ignore_index.

    logits (B, T, V); labels (B, T), already shifted: labels[b, t] is the target of position t.
    Computed in float32 whatever the precision of the logits. Raises ValueError where shapes differ.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} need labels {tuple(logits.shape[:-1])}, not {tuple(labels.shape)}")
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=ignore_index)


# %% id="language-perplexity"
#| export
def perplexity(nats: float) -> float:
    """e to the mean nats per token: as unsure as a fair choice among so many tokens."""
    return math.exp(nats)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """All nats of a text in bits, over its length in UTF-8 bytes."""
    if num_bytes <= 0:
        raise ValueError(f"num_bytes={num_bytes}: a text must have at least one byte")
    return nats / math.log(2) / num_bytes


# %% id="language-byte-lengths"
#| export
def token_byte_lengths(tokenizer: Tokenizer) -> torch.Tensor:
    """Bytes of text that each token stands for, (V,); 0 for special tokens, which are no text."""
    lengths = torch.tensor([len(token) for token in tokenizer.token_bytes()])
    lengths[list(tokenizer.special_ids.values())] = 0
    return lengths


# %% id="language-evaluate"
#| export
@torch.no_grad()
def total_nats(model: Callable, tokens: torch.Tensor, context: int, batch_size: int, amp: torch.dtype | None) -> float:
    """Sum of -ln p over every token but the first, each predicted once from at most `context` tokens before it."""
    device = next((p.device for p in model.parameters()), tokens.device) if isinstance(model, torch.nn.Module) else tokens.device
    steps = (len(tokens) - 1) // context * context
    inputs, labels = tokens[:steps].view(-1, context), tokens[1 : steps + 1].view(-1, context)  # (N, T)
    batches = list(zip(inputs.split(batch_size), labels.split(batch_size)))
    if steps < len(tokens) - 1:  # the rest, shorter than a window
        batches.append((tokens[None, steps:-1], tokens[None, steps + 1 :]))
    nats = 0.0
    for x, y in batches:
        with torch.autocast(device.type, amp) if amp else nullcontext():
            logits = model(x.to(device))  # (B, T, V)
        nats += cross_entropy(logits, y.to(device)).item() * y.numel()
    return nats


def evaluate_bits_per_byte(model: Callable, tokens, byte_lengths: torch.Tensor, context: int = 256,
                           batch_size: int = 32, amp: torch.dtype | None = None) -> float:
    """Bits per byte of `model` on one stream of ids (1-D), read in windows of `context` tokens.

    model: any callable (B, T) ids -> (B, T, V) logits; a module is put in eval mode meanwhile.
    Document ends are predicted as well, but have no bytes. Raises ValueError for fewer than two tokens.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.long) if torch.is_tensor(tokens) else torch.tensor([int(t) for t in tokens])
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens: at least two are needed, one to read and one to predict")
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        nats = total_nats(model, tokens, context, batch_size, amp)
    finally:
        if was_training:
            model.train()
    return bits_per_byte(nats, int(byte_lengths[tokens[1:]].sum()))

# %% id="language-run"
assert abs(cross_entropy(torch.zeros(1, 2, 7), torch.tensor([[1, 2]])).item() - math.log(7)) < 1e-6
