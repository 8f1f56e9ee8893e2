# %% [markdown]
# # 10. Generation
#
# (first version: the code; the text follows)

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="generate-default-exp"
#| default_exp generate

# %% id="generate-imports"
#| export
import codecs
from collections.abc import Iterator, Sequence

import torch

# %% id="generate-filters"
#| export
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

# %% id="generate-sample-next"
#| export
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

# %% id="generate-kv-cache"
#| export
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

# %% id="generate-check-request"
#| export
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

# %% id="generate-next-tokens"
#| export
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

# %% id="generate-generate"
#| export
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

# %% id="generate-stream"
#| export
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

# %% id="generate-chat-imports"
#| export chat
import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from minimind.generate import stream
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

# %% id="generate-chat-load"
#| export chat
class ChatError(Exception):
    """What went wrong and what to do, in one sentence for the reader."""


def load(folder: str | Path, device: str = "cpu") -> tuple[MiniMind, Tokenizer]:
    """Model and tokenizer of a checkpoint folder; ChatError when it is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ChatError(f"{folder} is not a folder: give a checkpoint folder such as runs/latest/artifacts/sft")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ChatError(f"{folder} has no {name}: a checkpoint folder holds config.json, model.safetensors and tokenizer.json")
    try:
        return MiniMind.from_pretrained(folder).to(device).eval(), Tokenizer.from_pretrained(folder)
    except Exception as error:  # a broken file can fail in many ways: the reader needs the file and the reason, no traceback
        raise ChatError(f"{folder} cannot be loaded: {error}") from error

# %% id="generate-chat-stops"
#| export chat
def stop_tokens(folder: str | Path, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer: the template's, and those that generation_config.json or config.json name."""
    stops = {tokenizer.eos_id, tokenizer.im_end_id}
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        stops.update(eos if isinstance(eos, list) else [eos])
    return sorted(stop for stop in stops if stop is not None)

# %% id="generate-chat-reply"
#| export chat
def fit(tokenizer: Tokenizer, messages: list[dict], room: int) -> tuple[list[int], int]:
    """Tokens of the newest turns that fit into `room`, and how many of the oldest messages were left out."""
    kept, system = list(messages), [m for m in messages[:1] if m["role"] == "system"]
    kept = kept[len(system) :]
    while True:
        ids = tokenizer.apply_chat_template(system + kept, add_generation_prompt=True)
        if len(ids) <= room or len(kept) == 1:
            break
        kept = kept[2:]  # one question with its answer
    if len(ids) > room:
        raise ChatError(f"the message is {len(ids)} tokens long and {room} fit: shorten it, or lower --max-new-tokens")
    return ids, len(messages) - len(system) - len(kept)


def reply(model: MiniMind, tokenizer: Tokenizer, messages: list[dict], stop_ids: list[int], max_new_tokens: int = 128, **options) -> Iterator[str]:
    """Yield the assistant's answer to `messages` piece by piece, leaving out the oldest turns when they do not fit."""
    room = model.config.max_position_embeddings - max_new_tokens
    ids, left_out = fit(tokenizer, messages, room)
    if left_out:
        print(f"(the oldest {left_out} messages no longer fit into {room} tokens and are left out)", file=sys.stderr)
    device = next(model.parameters()).device
    yield from stream(model, tokenizer, torch.tensor([ids], device=device), max_new_tokens, stop_ids, **options)

# %% id="generate-chat-parser"
#| export chat
def parser() -> argparse.ArgumentParser:
    """The command line of `python -m minimind.chat`."""
    p = argparse.ArgumentParser(
        prog="python -m minimind.chat",
        description="Talk to the model in a checkpoint folder: ours, or a Hugging Face Qwen3 or Llama folder. Needs no network.",
        epilog='example: python -m minimind.chat runs/latest/artifacts/sft --prompt "Where does Garus live?"',
    )
    p.add_argument("folder", help="folder with config.json, model.safetensors and tokenizer.json")
    p.add_argument("--prompt", help="answer this one message and stop")
    p.add_argument("--system", help="a system message put before the conversation")
    p.add_argument("--raw", action="store_true", help="continue the text as it stands, without the chat template (for base models)")
    p.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default 128)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token each time (default)")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--min-p", type=float)
    p.add_argument("--repetition-penalty", type=float, default=1.0)
    p.add_argument("--seed", type=int, help="makes sampled answers repeat")
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    return p

# %% id="generate-chat-main"
#| export chat
def answer(args: argparse.Namespace, model: MiniMind, tokenizer: Tokenizer, messages: list[dict]) -> str:
    """Print the answer to the last message as it grows, and return it."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_new_tokens")
    options = {name: getattr(args, name) for name in names}
    stops = stop_tokens(args.folder, tokenizer)
    if args.raw:
        ids = torch.tensor([tokenizer.encode(messages[-1]["content"])], device=args.device)
        pieces = stream(model, tokenizer, ids, stop_ids=stops, **options)
    else:
        pieces = reply(model, tokenizer, messages, stops, **options)
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def chat(args: argparse.Namespace) -> None:
    """One answer for --prompt, else a conversation that ends with an empty line or end of input."""
    model, tokenizer = load(args.folder, args.device)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is not None:
        answer(args, model, tokenizer, messages + [{"role": "user", "content": args.prompt}])
        return
    print("Write a message; an empty line ends the conversation.", file=sys.stderr)
    while text := next_line():
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer(args, model, tokenizer, messages)})


def next_line() -> str:
    """What the reader typed; "" at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parser().parse_args(arguments)
    try:
        chat(args)
    except (ChatError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0


if __name__ == "__main__" and "__file__" in globals():  # a notebook has no __file__
    sys.exit(main())
