# Made from chapters/src/10_generation.py by `python -m course build`. Do not edit.

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from minimind.generate import stream
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer


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


def stop_tokens(folder: str | Path, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer: the template's, and those that generation_config.json or config.json name."""
    stops = {tokenizer.eos_id, tokenizer.im_end_id}
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        stops.update(eos if isinstance(eos, list) else [eos])
    return sorted(stop for stop in stops if stop is not None)


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
