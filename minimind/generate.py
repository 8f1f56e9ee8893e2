# Made from chapters/src/10_generation.py by `python -m course build`. Do not edit.

import codecs
from collections.abc import Iterator, Sequence

import torch


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest of logits (B, V), and ties of the last of them; the others become -inf (Fan et al. 2018, arXiv:1805.04833)."""
    last = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < last, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the fewest tokens whose probabilities add up to at least p (Holtzman et al. 2019, arXiv:1904.09751)."""
    probabilities, order = logits.softmax(-1).sort(descending=True)  # (B, V) each
    before = probabilities.cumsum(-1) - probabilities  # what the better tokens already add up to
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(drop, -torch.inf)


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep tokens at least p times as probable as the most probable one (Nguyen et al. 2024, arXiv:2407.01082)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def penalise_repetition(logits: torch.Tensor, previous: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make the tokens in `previous` (B, n) less likely: divide positive logits, multiply negative ones (Keskar et al. 2019, arXiv:1909.05858)."""
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, previous, True)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_next(
    logits: torch.Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    previous: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Choose one token for each row of logits (B, V): ids (B,). Temperature 0 takes the most probable token.

    The order is Hugging Face's: repetition penalty, temperature, top-k, top-p, min-p. `previous` (B, n) holds the
    tokens so far, for the penalty.
    """
    if repetition_penalty != 1.0 and previous is not None:
        logits = penalise_repetition(logits, previous, repetition_penalty)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class KVCache:
    """Keys and values of all positions so far, of all layers, in memory that is set aside once.

    Memory in bytes: 2 * layers * B * K * max_length * D * bytes per number. `update` is what attention calls.
    """

    def __init__(self, config, batch_size: int, max_length: int, device=None, dtype: torch.dtype | None = None):
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)  # (B, K, S, D)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.filled = [0] * config.num_hidden_layers
        self.max_length = max_length

    @property
    def length(self) -> int:
        """Positions that every layer holds."""
        return self.filled[-1]

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k and v (B, K, T, D) behind what is there; return all so far, (B, K, S, D), as views."""
        start, end = self.filled[layer_idx], self.filled[layer_idx] + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions and {end} are needed: make it longer")
        self.keys[layer_idx][:, :, start:end] = k
        self.values[layer_idx][:, :, start:end] = v
        self.filled[layer_idx] = end
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]


def check_request(config, input_ids: torch.Tensor, max_new_tokens: int) -> None:
    """ValueError in plain words for a prompt that this model cannot continue by `max_new_tokens`."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give (B, T) with at least one token per row")
    T, room = input_ids.shape[1], config.max_position_embeddings
    if T + max_new_tokens > room:
        raise ValueError(
            f"{T} prompt tokens and {max_new_tokens} new ones are {T + max_new_tokens} positions, this model has {room}: "
            f"shorten the prompt or ask for at most {max(room - T, 0)} new tokens"
        )


@torch.inference_mode()
def next_tokens(
    model,
    input_ids: torch.Tensor,
    max_new_tokens: int = 64,
    stop_ids: Sequence[int] = (),
    use_cache: bool = True,
    attention_mask: torch.Tensor | None = None,
    seed: int | None = None,
    **sampling,
) -> Iterator[torch.Tensor]:
    """Yield the next token of every row, (B,), up to `max_new_tokens` times; a stopped row repeats its first stop id."""
    check_request(model.config, input_ids, max_new_tokens)
    (B, T), device = input_ids.shape, input_ids.device
    end = T + max_new_tokens
    ids = torch.empty(B, end, dtype=torch.long, device=device)
    ids[:, :T] = input_ids
    mask = positions = None
    if attention_mask is not None:
        ids[:, :T] = torch.where(attention_mask.bool(), input_ids, input_ids[:, -1:])  # padding is no repetition
        mask = torch.cat((attention_mask, attention_mask.new_ones(B, max_new_tokens)), dim=1)  # (B, end)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = KVCache(model.config, B, end, device, next(model.parameters()).dtype) if use_cache else None
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    stopped = torch.zeros(B, dtype=torch.bool, device=device)
    start = 0
    for now in range(T, end):
        padding = {} if mask is None else {"attention_mask": mask[:, :now], "position_ids": positions[:, start:now]}
        logits = model(ids[:, start:now], kv_cache=cache, **padding)[:, -1]  # (B, V)
        chosen = sample_next(logits, previous=ids[:, :now], generator=generator, **sampling)
        if len(stops):
            chosen = torch.where(stopped, stops[0], chosen)
            stopped = stopped | torch.isin(chosen, stops)
        ids[:, now] = chosen
        yield chosen
        if len(stops) and stopped.all():
            return
        start = now if use_cache else 0


def generate(model, input_ids: torch.Tensor, max_new_tokens: int = 64, **options) -> torch.Tensor:
    """Continue every row of input_ids (B, T) by up to `max_new_tokens`: (B, T + new).

    Options are those of `next_tokens` and `sample_next`. Rows that reach a stop id early are filled up with the first
    stop id; generation ends when all have stopped. For rows of unequal length see `generate_batch`.
    """
    model.eval()
    new = list(next_tokens(model, input_ids, max_new_tokens, **options))
    return torch.cat((input_ids, torch.stack(new, dim=1)), dim=1) if new else input_ids


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int = 0, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length as ids (B, T) with padding on the left, and the mask (B, T) that is 1 for real tokens."""
    T = max(map(len, prompts))
    ids = [[pad_id] * (T - len(row)) + list(row) for row in prompts]
    real = [[0] * (T - len(row)) + [1] * len(row) for row in prompts]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def generate_batch(
    model, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, stop_ids: Sequence[int] = (), batch_size: int = 64, **options
) -> list[list[int]]:
    """Continue many prompts (lists of ids) at once: for each its new tokens, without prompt and stop token."""
    device, answers = next(model.parameters()).device, []
    for first in range(0, len(prompts), batch_size):
        ids, real = left_pad(prompts[first : first + batch_size], device=device)
        mask = None if real.all() else real
        out = generate(model, ids, max_new_tokens, stop_ids=stop_ids, attention_mask=mask, **options)
        for row in out[:, ids.shape[1] :].tolist():
            stop = next((i for i, token in enumerate(row) if token in stop_ids), len(row))
            answers.append(row[:stop])
    return answers


def stream(model, tokenizer, input_ids: torch.Tensor, max_new_tokens: int = 64, stop_ids: Sequence[int] = (), **options) -> Iterator[str]:
    """Yield the continuation of input_ids (1, T) as text, piece by piece, without the stop token.

    A character may be spread over several tokens; its bytes are held back until it is whole.
    """
    model.eval()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for chosen in next_tokens(model, input_ids, max_new_tokens, stop_ids, **options):
        token = int(chosen[0])
        if token in stop_ids:
            break
        if piece := decoder.decode(tokenizer.decode_bytes([token], skip_special=True)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
