import ctypes
import math
import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minimind.data import set_seed

@dataclass
class TrainConfig:
    """Settings of one training run. `warmup`, `decay` are shares of the steps, `final_lr` a share of the peak."""

    steps: int
    learning_rate: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.5
    final_lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0  # 0 switches clipping off
    accumulation: int = 1  # micro-batches per step
    precision: str = "auto"  # auto, bf16, fp16 or fp32
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0  # 0: only at the end
    save_every: int = 0  # 0: only at the end
    compile: bool = False

def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Learning rate of `step` (from 0): a linear rise, a flat middle, a linear fall (Hu et al. 2024, arXiv:2404.06395)."""
    rise = (step + 1) / max(1, round(config.warmup * config.steps))
    fall = (config.steps - step) / max(1, round(config.decay * config.steps))
    return config.learning_rate * min(1.0, rise, config.final_lr + (1 - config.final_lr) * fall)

def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices (embeddings too) decay, vectors (norm gains, biases) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]

def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), all parameters of a group updated in one kernel."""
    groups = optimizer_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)

def token_shares(batches: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each micro-batch's share of the real tokens (labels other than -100), and their number.

    A loss that is a mean over its own micro-batch must be weighted by this share, so that the sum
    is the mean over all tokens. Batches without "labels" count equally.
    """
    if "labels" not in batches[0]:
        return torch.full((len(batches),), 1 / len(batches)), torch.tensor(0)
    counts = torch.stack([(batch["labels"] != -100).sum() for batch in batches])
    return counts / counts.sum().clamp(min=1), counts.sum()

def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (emulation is slower than float32)."""
    flags = {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"}
    if hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(flag) for flag in flags)
    info = Path("/proc/cpuinfo")
    return info.exists() and bool(flags & set(info.read_text().split()))

def pick_precision(device: torch.device | str, wanted: str = "auto") -> tuple[torch.dtype | None, str]:
    """The autocast type for `device` (None is plain float32) and the reason, in words.

    `wanted` is auto, bf16, fp16 or fp32. What the machine cannot do fast is replaced, and the reason says so.
    """
    if wanted not in ("auto", "bf16", "fp16", "fp32"):
        raise ValueError(f"precision {wanted!r}: choose auto, bf16, fp16 or fp32")
    gpu = torch.device(device).type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else has_fast_bfloat16()
    best = "bf16" if has_bf16 else "fp16" if gpu else "fp32"
    possible = {"auto": best, "bf16": best, "fp16": "fp16" if gpu else best, "fp32": "fp32"}
    got = possible[wanted]
    reason = f"{got}, as asked" if got == wanted else f"{got}: {'this GPU' if gpu else 'this processor'} {REASONS[got]}"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[got], reason


REASONS = {"bf16": "multiplies bfloat16 in hardware", "fp16": "has no bfloat16", "fp32": "has no fast 16-bit numbers"}

def keep_memory(on: bool = True) -> bool:
    """Let the C library keep freed memory for the next step; False where it cannot be told to (only glibc can).

    By default glibc fetches each large block from the kernel, which clears every page of it, and gives it back when freed.
    A training step frees and fetches the same blocks again and again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    size = 2**30 if on else 2**17  # 2**17 is glibc's own choice
    return all([mallopt(M_MMAP_THRESHOLD, size), mallopt(M_TRIM_THRESHOLD, size)])


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers from malloc.h

class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says which and what to do."""


def save_checkpoint(folder: str | Path, state: dict) -> Path:
    """Write `state` to `folder`/checkpoint.pt so that a kill at any moment leaves the old file or the new one whole."""
    final = Path(folder) / "checkpoint.pt"
    part = final.with_suffix(".part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk before the name points to them
        os.replace(part, final)  # one step for every reader: old file before, new file after
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{final}: could not be written ({error}); the last good checkpoint is untouched") from error
    return final

def load_checkpoint(folder: str | Path) -> dict:
    """Read `folder`/checkpoint.pt to the CPU; CheckpointError when it is missing or damaged. Runs no code from the file."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise CheckpointError(f"{path}: no checkpoint there; start without resume")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for a damaged file
        raise CheckpointError(f"{path}: truncated or damaged ({path.stat().st_size:,} bytes); delete it and start again") from error

def random_state() -> dict:
    """The state of every random generator that a training step may use, in types that load safely."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": (kind, keys.tolist(), *rest), "python": random.getstate()}


def set_random_state(state: dict) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])

def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Strict loading; CheckpointError names the weights that are missing, unexpected or of another shape."""
    own = model.state_dict()
    wrong = [f"{name}: missing in the checkpoint" for name in own if name not in weights]
    wrong += [f"{name}: not in this model" for name in weights if name not in own]
    wrong += [
        f"{name}: {tuple(weights[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(f"checkpoint of another model, {len(wrong)} weights differ, such as\n  " + "\n  ".join(wrong[:3]))
    model.load_state_dict(weights)

@dataclass
class History:
    """What a run logged, one entry per log line; a mean is over the steps since the line before."""

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # mean
    metrics: list[dict] = field(default_factory=list)  # means of what loss_fn returned beside the loss
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)  # mean, before clipping
    tokens: list[int] = field(default_factory=list)  # real tokens since step 0
    seconds: list[float] = field(default_factory=list)  # of training, without evaluation and saving
    tokens_per_second: list[float] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)  # {"step", "tokens", and what evaluate returned}

class Run:
    """Everything that changes while training: what a checkpoint must hold to continue bit for bit."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        self.model, self.config = model, config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.dtype, self.reason = pick_precision(self.device, config.precision)
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.history = History()
        self.step, self.tokens, self.seconds = 0, torch.tensor(0, device=self.device), 0.0
        self.window: dict[str, torch.Tensor] = {}  # sums since the last log line, on the device
        self.window_start = (0, 0, 0.0)  # step, tokens, seconds of the last log line
        self.clock = time.perf_counter()

    def tick(self, count: bool = True) -> None:
        """Add the time since the last tick to the training seconds (or, with count=False, leave it out)."""
        now = time.perf_counter()
        self.seconds += (now - self.clock) * count
        self.clock = now

    def state(self) -> dict:
        """The checkpoint: all of the above, plus the random state and the settings."""
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds, "window": self.window,
            "window_start": self.window_start, "history": asdict(self.history),
            "config": asdict(self.config), "random": random_state(),
        }  # fmt: skip

    def restore(self, state: dict) -> None:
        """Continue from a checkpoint; CheckpointError when its settings or sizes are not these."""
        check_same_settings(state["config"], asdict(self.config))
        load_weights(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.window_start = state["step"], state["seconds"], tuple(state["window_start"])
        self.tokens = state["tokens"].to(self.device)
        self.window = {name: value.to(self.device) for name, value in state["window"].items()}
        self.history = History(**state["history"])
        set_random_state(state["random"])

def check_same_settings(saved: dict, given: dict) -> None:
    """A resumed run must have the settings that it began with; only how often it reports and saves may change."""
    free = {"log_every", "eval_every", "save_every"}
    changed = [f"{key}: {saved[key]!r} then, {given[key]!r} now" for key in given if key not in free and saved.get(key) != given[key]]
    if changed:
        raise CheckpointError("cannot resume with other settings (" + "; ".join(changed) + "); give the same, or start without resume")

def train_step(run: Run, model: nn.Module, batches, loss_fn: Callable) -> None:
    """One optimiser step over `accumulation` micro-batches. Nothing here waits for the device."""
    config, first = run.config, run.step * run.config.accumulation
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(run.step, config)
    micro = [batches[first + i] for i in range(config.accumulation)]
    shares, tokens = token_shares(micro)
    for batch, share in zip(micro, shares.unbind()):
        with torch.autocast(run.device.type, run.dtype) if run.dtype else nullcontext():
            loss, metrics = loss_fn(model, batch)
        run.scaler.scale(loss * share).backward()
        for name, value in {**metrics, "loss": loss}.items():
            value = value.detach() if torch.is_tensor(value) else torch.tensor(float(value))
            run.window[name] = run.window.get(name, 0) + value.float() * share
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.parameters, config.grad_clip or math.inf)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.window["grad_norm"] = run.window.get("grad_norm", 0) + norm
    run.tokens, run.step = run.tokens + tokens, run.step + 1

def write_log(run: Run) -> None:
    """Move the sums of the window into the history; the only place where the loop waits for the device."""
    step, tokens, seconds = run.window_start
    means = {name: float(value) / (run.step - step) for name, value in run.window.items()}
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(f"the loss is {means['loss']} between steps {step} and {run.step}: lower learning_rate or raise warmup")
    now, history = int(run.tokens), run.history
    run.tick()
    history.step.append(run.step)
    history.loss.append(means.pop("loss"))
    history.grad_norm.append(means.pop("grad_norm"))
    history.metrics.append(means)
    history.lr.append(run.optimizer.param_groups[0]["lr"])
    history.tokens.append(now)
    history.seconds.append(run.seconds)
    history.tokens_per_second.append((now - tokens) / max(run.seconds - seconds, 1e-9))
    run.window, run.window_start = {}, (run.step, now, run.seconds)

def write_evaluation(run: Run, evaluate: Callable) -> None:
    """Append what `evaluate(model)` returns (a dict, or one number) to the history, in evaluation mode, without gradients."""
    run.tick()
    run.model.eval()
    with torch.no_grad():
        result = evaluate(run.model)
    run.model.train()
    run.tick(count=False)
    result = result if isinstance(result, dict) else {"value": result}
    run.history.evals.append({"step": run.step, "tokens": int(run.tokens), **result})

def train(
    model: nn.Module, batches, loss_fn: Callable, config: TrainConfig, folder: str | Path | None = None, resume: bool = False,
    evaluate: Callable | None = None, on_log: Callable[[History], None] | None = None, max_steps: int | None = None,
) -> History:  # fmt: skip
    """Train `model` in place on `batches[0]`, `batches[1]`, ... and return what was logged.

    `batches[i]` is a dict of tensors on the model's device, the same for the same `i`: then the data position is the
    step, and `resume` continues bit for bit from `folder`/checkpoint.pt (from step 0 when there is none).
    `loss_fn(model, batch)` returns the mean loss over the real tokens and a dict of further means.
    `max_steps` stops earlier, on the same schedule.
    """
    set_seed(config.seed)
    run = Run(model, config)
    if run.device.type == "cpu":
        keep_memory()
    if resume and folder and (Path(folder) / "checkpoint.pt").exists():
        run.restore(load_checkpoint(folder))
    fast = torch.compile(model) if config.compile else model
    last = min(config.steps, max_steps or config.steps)
    due = lambda every: run.step == last or (every > 0 and run.step % every == 0)
    model.train()
    while run.step < last:
        train_step(run, fast, batches, loss_fn)
        if due(config.log_every):
            write_log(run)
            if on_log:
                on_log(run.history)
        if evaluate and due(config.eval_every):
            write_evaluation(run, evaluate)
        if folder and due(config.save_every):
            run.tick()
            save_checkpoint(folder, run.state())
            run.tick(count=False)
    return run.history
