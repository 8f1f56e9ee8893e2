"""Checks of workbook 8. What is trusted is torch's own optimisers and plain loops; nothing here comes from minimind."""

import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course.checks.core import close, equal, exercise, fail, shaped, unchanged

MODULE = "train"


def settings(**changes) -> SimpleNamespace:
    """What learning_rate_at reads."""
    return SimpleNamespace(**({"steps": 10, "learning_rate": 1.0, "warmup": 0.2, "decay": 0.5, "final_lr": 0.0} | changes))


def told(config: SimpleNamespace) -> str:
    return ", ".join(f"{name} {value}" for name, value in vars(config).items())


def rates(c: SimpleNamespace, start: int = 1, late: int = 0, whole=round, share: bool = True, pick=min) -> torch.Tensor:
    """The schedule from the corners of its lines; the options are mistakes."""
    rise, fall = (max(1, whole(part * c.steps)) for part in (c.warmup, c.decay))
    low = c.final_lr if share else c.final_lr / c.learning_rate
    found = []
    for s in range(c.steps):
        up = np.interp(s + start, [0, rise], [0.0, 1.0])
        down = np.interp(c.steps - s - late, [0, fall], [low, 1.0])
        found.append(c.learning_rate * pick(up, down))
    return torch.tensor(found, dtype=torch.float64)


@exercise("learning_rate_at", keeps=["learning_rate_at"])
def check_learning_rate_at(learning_rate_at):
    def all_rates(c):
        found = [learning_rate_at(step, c) for step in range(c.steps)]
        if not isinstance(found[0], int | float):
            fail("the rate of a step is one number", told(c), got=found[0])
        return torch.tensor(found, dtype=torch.float64)

    ten = settings(warmup=0.3)
    equal(all_rates(ten), rates(ten), told(ten), "the rates are not the smallest of the three lines", {
        "step 0 has the rate 0 and teaches nothing: steps count from 0, so it is (s + 1) / w": rates(ten, start=0),
        "the rise is one step too early: it is (s + 1) / w": rates(ten, start=2),
        "the fall is one step too early: S - s steps are left at step s, and the last step still moves": rates(ten, late=1),
        "the fall is one step too late: S - s steps are left at step s": rates(ten, late=-1),
        "this is the largest of the lines; take the smallest": rates(ten, pick=max),
        "there is no fall": rates(settings(warmup=0.3, final_lr=1.0)),
        "there is no rise": rates(settings(warmup=0.0)),
    })  # fmt: skip
    high = settings(learning_rate=2.0, final_lr=0.3)
    equal(all_rates(high), rates(high), told(high), "right for a peak of 1 that falls to 0, and not here", {
        "learning_rate, the peak, is not used": rates(high) / 2,
        "final_lr is not used: the rate must fall to this share of the peak, not to 0": rates(settings(learning_rate=2.0)),
        "final_lr is a share of the peak, and here it is a rate": rates(high, share=False),
        "at the end it jumps: the fall goes from 1 down to final_lr, as f + (1 - f) (S - s) / d":
            torch.tensor([2 * min((s + 1) / 2, 1, max(0.3, (10 - s) / 5)) for s in range(10)]),
    })  # fmt: skip
    none = settings(warmup=0.0, decay=0.0)
    equal(all_rates(none), rates(none), told(none), "without warm-up and decay the rate is the peak at every step")
    for more in ({"warmup": 0.17, "decay": 0.36}, {"steps": 7, "warmup": 0.9, "decay": 0.9, "final_lr": 0.3}, {"steps": 1}):
        other = settings(**more)
        equal(all_rates(other), rates(other), told(other), "right for the cases before, and not here",
              {"w and d must be rounded; here they are cut off": rates(other, whole=int)})  # fmt: skip


def marked_model() -> nn.Sequential:
    """A model whose parameters each hold one number: 0 to 7."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 3), nn.Linear(4, 4), nn.RMSNorm(4))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(number)
    return model


@exercise("optimizer_groups", keeps=["optimizer_groups"])
def check_optimizer_groups(optimizer_groups):
    model = marked_model()
    names = [name for name, _ in model.named_parameters()]
    for index, kind in ((0, "Embedding"), (1, "LayerNorm"), (2, "Conv1d"), (3, "Linear"), (4, "RMSNorm")):
        names = [name.replace(f"{index}.", f"{kind}.") for name in names]
    matrices = {name for name, p in zip(names, model.parameters(), strict=True) if p.dim() > 1}
    given = "a model of Embedding, LayerNorm, Conv1d, Linear and RMSNorm, weight_decay = 0.3"
    decaying, others = _groups(optimizer_groups(model, 0.3), names, given)
    rates_ = [group["weight_decay"] for group in optimizer_groups(model, 0.3)]
    if decaying == set(names) - matrices and rates_[0] == 0:
        fail("the groups stand in the wrong order: the one that decays comes first", given, sorted(matrices), sorted(decaying))
    if decaying != matrices:
        words = "the group that decays does not have exactly the parameters of two or more dimensions"
        mistakes = {
            "the gains of the norms decay too: they are called weight, but they are vectors": {n for n in names if n.endswith("weight")},
            "everything decays": set(names),
            "vectors decay and matrices do not": set(names) - matrices,
            "the embedding must decay too: it is a matrix": matrices - {"Embedding.weight"},
            "only parameters of exactly two dimensions decay; it must be two or more": matrices - {"Conv1d.weight"},
            "only parameters of three dimensions decay; it must be two or more": {"Conv1d.weight"},
        }
        words = next((told_ for told_, wrong in mistakes.items() if decaying == wrong), words)
        fail(words, given, sorted(matrices), sorted(decaying))
    if others != set(names) - matrices:
        fail("the group without decay must hold all vectors: what no group holds is never trained", given, sorted(set(names) - matrices),
             sorted(others))  # fmt: skip
    if rates_ != [0.3, 0.0]:
        fail("the first group decays by the weight_decay that was given, the second by 0", given, [0.3, 0.0], rates_)
    for frozen in (0, 7):
        list(model.parameters())[frozen].requires_grad_(False)
    left = set(names) - {names[0], names[7]}
    both = _groups(optimizer_groups(model, 0.3), names, f"the same; {names[0]} and {names[7]} are frozen")
    if set().union(*both) != left:
        fail("frozen parameters (requires_grad is False) do not belong into the optimiser", f"the same; {names[0]} and {names[7]} are frozen",
             sorted(left), sorted(set().union(*both)))  # fmt: skip
    tied = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    groups = optimizer_groups(tied, 0.1)
    if (count := sum(len(list(group["params"])) for group in groups)) != 1:
        fail("a tied weight must be in one group, once; torch refuses it otherwise", "Embedding and Linear that share one weight", 1, count)


def _groups(groups, names: list[str], given: str) -> list[set]:
    """The names of the parameters in both groups, told by the number that each holds."""
    form = {"params", "weight_decay"}
    if not isinstance(groups, list | tuple) or len(groups) != 2 or not all(isinstance(g, dict) and form <= set(g) for g in groups):
        fail('it returns a list of two dicts, each with "params" and "weight_decay"', given, got=type(groups).__name__)
    found = []
    for group in groups:
        params = list(group["params"])
        if other := [type(p).__name__ for p in params if not isinstance(p, torch.Tensor)]:
            fail('"params" holds the parameters themselves', given, "tensors", other[0])
        held = [names[int(p.detach().flatten()[0])] for p in params]
        if twice := sorted({name for name in held if held.count(name) > 1}):
            fail("a parameter stands twice in a group", given, got=twice)
        if stale := [name for name, p in zip(held, params, strict=True) if not p.requires_grad and "frozen" not in given]:
            fail("these are copies without a gradient: an optimiser must get the parameters themselves, not p.data or p.detach()", given, got=stale)
        found.append(set(held))
    if both := sorted(found[0] & found[1]):
        fail("a parameter is in both groups", given, got=both)
    return found


def micro(*labels) -> list[dict]:
    return [{"labels": torch.tensor(rows)} for rows in labels]


@exercise("token_shares", keeps=["token_shares"])
def check_token_shares(token_shares):
    def shares_of(batches, given):
        result = token_shares(batches)
        if not (isinstance(result, tuple | list) and len(result) == 2):
            fail("it returns two things: the shares, and the number of real tokens", given, got=type(result).__name__)
        shares, tokens = result
        shaped(shares, (len(batches),), f"{given}: the shares", hint="there is one share for each micro-batch")
        if not shares.is_floating_point():
            fail("shares are floats", given, got=shares.dtype)
        if isinstance(tokens, torch.Tensor) and tokens.dim():
            fail("the number of real tokens is one number, that of all micro-batches together", given, got=tokens)
        return shares, tokens

    batches = micro([5, 0, 7, 2], [3, -100, -100, -100], [3, -100, -100, -100])
    given = "labels [5, 0, 7, 2], [3, -100, -100, -100], [3, -100, -100, -100]"
    shares, tokens = shares_of(batches, given)
    equal(shares, torch.tensor([4, 1, 1]) / 6, given, "a share is the real tokens of a micro-batch, divided by those of all", {
        "these are the numbers of tokens; divide them by their sum": torch.tensor([4.0, 1.0, 1.0]),
        "every micro-batch counts the same, so a lonely token counts as much as four": torch.full((3,), 1 / 3),
        "padding is counted as if it were text: only labels other than -100 are real": torch.tensor([0.0, 3.0, 3.0]) / 6,
        "the label 0 is a token like any other; only -100 is padding": torch.tensor([3, 1, 1]) / 5,
        "the shares are turned round": torch.tensor([1 / 4, 1.0, 1.0]),
    })  # fmt: skip
    if int(tokens) != 6:
        fail("the number of real tokens is not right", given, 6, tokens)
    batches = micro([[1, 2, -100], [4, -100, -100]], [[-100, 1, 2], [3, 1, 2]])
    shares, tokens = shares_of(batches, "two micro-batches of two rows, with 3 and 5 real tokens")
    equal(shares, torch.tensor([3, 5]) / 8, "two micro-batches of two rows, with 3 and 5 real tokens", "all rows of a micro-batch count")
    if int(tokens) != 8:
        fail("the number of real tokens is not right", "two micro-batches with 3 and 5 real tokens", 8, tokens)
    shares, tokens = shares_of(micro([-100, -100], [-100, -100]), "every label is -100")
    equal(shares, torch.zeros(2), "every label is -100", "without a real token all shares are 0", {
        "0 / 0 is NaN, and one NaN in the loss ruins all weights": torch.full((2,), math.nan),
    })  # fmt: skip
    if int(tokens) != 0:
        fail("there is no real token here", "every label is -100", 0, tokens)
    one, _ = shares_of(micro([-100, 9]), "one micro-batch with one real token")
    equal(one, torch.ones(1), "one micro-batch with one real token", "a single micro-batch has the whole share")
    shares, tokens = shares_of([{"x": torch.ones(2)}] * 4, "four batches without labels")
    equal(shares, torch.full((4,), 0.25), "four batches without labels", "batches without labels get equal shares")
    if int(tokens) != 0:
        fail("batches without labels count 0 tokens", "four batches without labels", 0, tokens)


# -- one step


def text_batches(count: int, seed: int = 5) -> list[dict]:
    """Micro-batches with 8, 2, 5, 8, ... real tokens."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for number in range(count):
        ids = torch.randint(7, (2, 5), generator=generator)
        labels = ids[:, 1:].clone()
        if number % 3:
            labels[:, 1:] = -100
        if number % 3 == 2:
            labels[0] = ids[0, 1:]
        batches.append({"input_ids": ids[:, :-1], "labels": labels})
    return batches


def tiny_model() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 7))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model


def loss_of(model, batch):
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1).float(), batch["labels"].flatten())


PACE = {"learning_rate": 0.02, "warmup": 0.5}


def plain_steps(count, accumulation=1, grad_clip=1.0, dtype=None, weigh="tokens", clear=True, clip=True, stride=None, logged="tokens"):
    """What `count` steps must give, from torch's own AdamW and a plain loop; the options from `weigh` on are mistakes."""
    model, batches = tiny_model(), text_batches(12)
    decaying, vectors = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW([{"params": decaying, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], 0.02, (0.9, 0.95))
    schedule = rates(settings(**PACE, final_lr=0.1))
    sums, tokens = {"loss": 0.0, "bytes": 0.0, "grad_norm": 0.0}, 0
    for s in range(count):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule[s])
        start = s * (accumulation if stride is None else stride)
        parts = batches[start : start + accumulation]
        real = [int((b["labels"] > -1).sum()) for b in parts]
        tokens += sum(real)
        for b, n in zip(parts, real, strict=True):
            weight, noted = ({"tokens": n / sum(real), "equal": 1 / len(parts), "sum": 1.0}[way] for way in (weigh, logged))
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = loss_of(model, b)
            (loss * weight).backward()
            sums["loss"] += float(loss.detach()) * noted
            sums["bytes"] += (2 if dtype else 4) * noted
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters()))
        sums["grad_norm"] += norm
        if clip and grad_clip and norm > grad_clip:
            for p in model.parameters():
                p.grad *= grad_clip / norm
        optimizer.step()
        if clear:
            optimizer.zero_grad()
    return {"step": count, "tokens": tokens, "window": sums, "lr": float(schedule[count - 1]), "weights": flat(model.parameters())}


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


@exercise("train_step", after=["learning_rate_at", "token_shares"], keeps=["train_step", "try_steps"])
def check_train_step(try_steps):
    given = "one step with one batch"
    got, wanted = try_steps(tiny_model(), text_batches(12), 1, **PACE), plain_steps(1)
    if got["step"] != 1:
        fail("run.step must count the steps, one for each call", given, 1, got["step"])
    if got["tokens"] != wanted["tokens"]:
        fail("run.tokens must count the real tokens", given, wanted["tokens"], got["tokens"])
    _rates(got, wanted, given)
    if got["graphs"]:
        fail("what stands in run.window still has its graph, and with it the memory of the whole step: detach it", given, got=got["graphs"])
    equal(flat(got["weights"]), wanted["weights"], f"{given}, the weights", "the weights differ from those of torch's own AdamW", {
        "the weights did not move: is there a backward, and does the scaler step the optimiser?": flat(tiny_model().parameters()),
    }, 1e-5)  # fmt: skip
    _window(got["window"], wanted, given, {
        "grad_norm is the norm after clipping; log the one before, which clip_grad_norm_ returns":
            {"grad_norm": 1.0, "loss": math.inf, "bytes": math.inf},
    })  # fmt: skip
    given = "four steps"
    got, wanted = try_steps(tiny_model(), text_batches(12), 4, **PACE), plain_steps(4)
    if (got["step"], got["tokens"]) != (4, wanted["tokens"]):
        words = "every step reads the same batch: step s reads number s * a and the a - 1 after it" if got["tokens"] == 32 else \
            "run.step and run.tokens must go on counting"  # fmt: skip
        fail(words, given, (4, wanted["tokens"]), (got["step"], got["tokens"]))
    _rates(got, wanted, given)
    equal(flat(got["weights"]), wanted["weights"], f"{given}, the weights", "right for one step, and not here", {
        "the gradients are never cleared, so each step also repeats all steps before": plain_steps(4, clear=False)["weights"],
        "the gradients are not clipped": plain_steps(4, clip=False)["weights"],
    }, 1e-5)  # fmt: skip
    _window(got["window"], wanted, given, {
        "each step overwrites the one before: run.window holds sums since the last line of the log": _last(1, 4),
    })  # fmt: skip
    _accumulated(try_steps)
    _clipped(try_steps)
    _scaled(try_steps)


def _rates(got, wanted, given) -> None:
    if any(abs(rate - wanted["lr"]) > 1e-9 for rate in got["lr"]):
        words = "the rate is not that of this step"
        if abs(got["lr"][0] - wanted["lr"]) < 1e-9:
            words = "only the first group gets the rate of this step; the vectors have a group too"
        elif all(abs(rate - 0.02) < 1e-9 for rate in got["lr"]):
            words = "the rate is never set: write learning_rate_at into every group"
        fail(words, f"{given}, the rates of both groups", [wanted["lr"]] * 2, got["lr"])


def _last(first: int, count: int, **options) -> dict:
    """The window as if only the last of several steps had been written down."""
    before, after = (plain_steps(n, **options)["window"] for n in (count - first, count))
    return {name: after[name] - before[name] for name in after}


def _window(window, wanted, given, likely=None) -> None:
    right = wanted["window"]
    if missing := sorted(set(right) - set(window)):
        fail(f"run.window has no {missing[0]!r}: it takes the loss, each metric, and grad_norm", given, sorted(right), sorted(window))
    if set(window) != set(right):
        fail("run.window holds the loss, each metric, and grad_norm, and nothing else", given, sorted(right), sorted(window))
    for name, value in right.items():
        if abs(window[name] - value) > 1e-3 * max(1.0, abs(value)):
            words = f"the sum of {name!r} in run.window is not right"
            for mistake, wrong in (likely or {}).items():
                if abs(window[name] - wrong[name]) < 1e-4 * max(1.0, abs(wrong[name])):
                    words = mistake
                    break
            fail(words, given, round(value, 4), round(window[name], 4))


def _accumulated(try_steps) -> None:
    given = "two steps of three micro-batches with 8, 2 and 5 real tokens"
    got, wanted = try_steps(tiny_model(), text_batches(12), 2, accumulation=3, **PACE), plain_steps(2, 3)
    if got["tokens"] != wanted["tokens"]:
        fail("the tokens of all micro-batches count, once each", given, wanted["tokens"], got["tokens"])
    wrong = {words: plain_steps(2, 3, **change)["weights"] for words, change in {
        "every micro-batch counts the same: multiply its loss by its share of the tokens": {"weigh": "equal"},
        "step s must read the micro-batches s * a to s * a + a - 1: these overlap with those of the step before": {"stride": 1},
        "the second step reads the same micro-batches as the first": {"stride": 0},
    }.items()}  # fmt: skip
    equal(flat(got["weights"]), wanted["weights"], f"{given}, the weights", "right for one micro-batch, and not here", wrong, 1e-5)
    _window(got["window"], wanted, given, {
        "what goes into run.window must be weighted by the shares too: it is a mean over tokens": plain_steps(2, 3, logged="sum")["window"],
        "in run.window every micro-batch counts the same: weight it by its share": plain_steps(2, 3, logged="equal")["window"],
        "only one micro-batch is written down": {"bytes": 2 * 4 * 5 / 15, "loss": math.inf, "grad_norm": math.inf},
    })  # fmt: skip


def _clipped(try_steps) -> None:
    for clip in (0.01, 0.0):
        given = f"three steps, grad_clip = {clip}"
        # Adam hides the size of a gradient, but not that one is clipped more than the next.
        got, wanted = try_steps(tiny_model(), text_batches(12), 3, grad_clip=clip, **PACE), plain_steps(3, grad_clip=clip)
        mistakes = {"grad_clip is not used; the norm is always cut to 1": plain_steps(3)} if clip else {
            "grad_clip = 0 means no clipping; here it made every gradient 0": plain_steps(3, grad_clip=1e-12),
            "grad_clip = 0 means no clipping; here the norm is still cut to 1": plain_steps(3, grad_clip=1.0)}  # fmt: skip
        equal(flat(got["weights"]), wanted["weights"], f"{given}, the weights", "the gradients are not clipped as they should be",
              {words: each["weights"] for words, each in mistakes.items()}, 1e-5)  # fmt: skip
        _window(got["window"], wanted, given)


def _scaled(try_steps) -> None:
    given = "three steps with a loss scale of 64, grad_clip = 0.5"
    got, wanted = try_steps(tiny_model(), text_batches(12), 3, scale=64.0, grad_clip=0.5, **PACE), plain_steps(3, grad_clip=0.5)
    if got["scale"] == 64:
        fail("the scaler never changes its scale: call run.scaler.update() after each step", given, 128.0, 64.0)
    norm, right = got["window"]["grad_norm"], wanted["window"]["grad_norm"]
    if abs(norm / right - 1) > 0.02:
        words = "the norm, and with it the clipping, is not that of the true gradient"
        if norm > 10 * right:
            words = "the gradients are clipped while they are still scaled: unscale_ comes before the clipping"
        fail(words, given, round(right, 4), round(norm, 4))
    equal(flat(got["weights"]), wanted["weights"], f"{given}, the weights", "with a scale the weights must be the same as without", tolerance=1e-4)
    _window(got["window"], wanted, given)
    given = "two steps, run.dtype = bfloat16"
    got, wanted = try_steps(tiny_model(), text_batches(12), 2, dtype=torch.bfloat16, **PACE), plain_steps(2, dtype=torch.bfloat16)
    if abs(got["window"]["bytes"] - wanted["window"]["bytes"]) > 1e-3:
        fail("the model did not run under autocast to run.dtype: its logits have 4 bytes and should have 2", given, 2.0, got["window"]["bytes"] / 2)
    if abs(got["window"]["loss"] - wanted["window"]["loss"]) > 0.05:
        fail("under autocast the loss is far off", given, wanted["window"]["loss"], got["window"]["loss"])


# -- beyond


def torch_adamw(w, gradients, lr, betas, weight_decay, eps, kind=torch.optim.AdamW):
    """The weights after each gradient, from torch."""
    weight = nn.Parameter(w.clone())
    optimizer = kind([weight], lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
    after = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        state = optimizer.state[weight]
        after.append((weight.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()))
    return after


@exercise("adamw_step")
def check_adamw_step(adamw_step):
    w, g, m, v = torch.tensor([[1.0, -2.0], [0.5, -0.1], [0.0, 0.0], [0.0, 0.0]]).clone().unbind()
    before = [each.clone() for each in (w, g, m, v)]
    given = "w = [1, -2], g = [0.5, -0.1], m = v = 0, t = 1, lr = 0.1"
    result = adamw_step(w, g, m, v, 1, 0.1)
    for name, old, now in zip("wgmv", before, (w, g, m, v), strict=True):
        unchanged(name, old, now)
    if not (isinstance(result, tuple | list) and len(result) == 3):
        fail("it returns three things: the weights, m and v", given, got=type(result).__name__)
    for name, each in zip(("w", "m", "v"), result, strict=True):
        shaped(each, (2,), f"{given}: the new {name}", torch.float32)
    equal(result[1], torch.tensor([0.05, -0.01]), f"{given}: m", "m is beta1 times the old m, plus (1 - beta1) times g", {
        "m is already divided by 1 - beta1^t; keep the plain mean, and divide only in the quotient": g,
        "beta1 and 1 - beta1 are swapped": 0.9 * g, "the betas are swapped": 0.05 * g,
    }, 1e-6)  # fmt: skip
    equal(result[2], torch.tensor([0.0125, 0.0005]), f"{given}: v", "v is beta2 times the old v, plus (1 - beta2) times g squared", {
        "g is not squared in v": 0.05 * g, "beta2 and 1 - beta2 are swapped": 0.95 * g**2, "the betas are swapped": 0.1 * g**2,
        "v is already divided by 1 - beta2^t; keep the plain mean, and divide only in the quotient": g**2,
    }, 1e-6)  # fmt: skip
    sign, plain = torch.sign(g), 0.1 * g / (0.05 * g**2).sqrt()
    equal(result[0], 0.99 * w - 0.1 * sign, f"{given}: w", "the new weights are not those of the formula", {
        "the means are not divided by the part that they have seen, 1 - beta^t": 0.99 * w - 0.1 * plain,
        "the weights do not decay": w - 0.1 * sign,
        "the decay is not multiplied by the rate": 0.9 * w - 0.1 * sign,
        "the decay has the wrong sign: it makes the weights larger": 1.01 * w - 0.1 * sign,
        "the step goes uphill: subtract the quotient": 0.99 * w + 0.1 * sign,
        "the root of v is missing": 0.99 * w - 0.1 * g / g**2,
        "the step is decayed too: the decay is of the old w": 0.99 * (w - 0.1 * sign),
        "the exponent of 1 - beta^t must be t, which counts from 1": 0.99 * w - 0.1 * (0.1 / 0.19) * g / ((0.05 / 0.0975) * g**2).sqrt(),
    }, 1e-6)  # fmt: skip
    _many_steps(adamw_step)


def _many_steps(adamw_step) -> None:
    w, gradients = torch.randn(3, 4), [torch.randn(3, 4) * 10.0 ** -(n % 4) for n in range(6)]
    options = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.5, "eps": 0.05}
    given = f"random w (3, 4), step 6, {', '.join(f'{name} {value}' for name, value in options.items())}"
    trusted = {kind: torch_adamw(w, gradients, **options, kind=kind) for kind in (torch.optim.AdamW, torch.optim.Adam)}
    ours, m, v = w, torch.zeros(3, 4), torch.zeros(3, 4)
    for t, g in enumerate(gradients, 1):
        before = [each.clone() for each in (ours, g, m, v)]
        new = adamw_step(ours, g, m, v, t, **options)
        for name, old, now in zip(("w", "g", "m", "v"), before, (ours, g, m, v), strict=True):
            unchanged(name, old, now)
        wanted = trusted[torch.optim.AdamW][t - 1]
        if not close(new[0], wanted[0], 1e-5):
            _blame(new[0], before, t, options, wanted, given.replace("step 6", f"step {t}"))
        for name, got, right in zip(("m", "v"), new[1:], wanted[1:], strict=True):
            equal(got, right, f"{given.replace('step 6', f'step {t}')}: {name}", "right at the first step, and not here", tolerance=1e-5)
        ours, m, v = new


def _blame(got, before, t, options, wanted, given) -> None:
    w, g, m, v = (each.double() for each in before)
    (b1, b2), lr, decay, eps = options["betas"], options["lr"], options["weight_decay"], options["eps"]
    m, v = torch.lerp(g, m, b1), torch.lerp(g * g, v, b2)
    top, below = m / (1 - b1**t), v / (1 - b2**t)
    first, second = m / (1 - b1), v / (1 - b2)
    equal(got, wanted[0], given, "right at the first step, and not here: it differs from torch.optim.AdamW", {
        "eps stands inside the root; it is added to the root": w * (1 - lr * decay) - lr * top / (below + eps).sqrt(),
        "eps is not added": w * (1 - lr * decay) - lr * top / below.sqrt(),
        "eps is added to v before it is divided by 1 - beta2^t": w * (1 - lr * decay) - lr * top / (v.sqrt() + eps) * math.sqrt(1 - b2**t),
        "the betas are not used; they may be others than 0.9 and 0.95": w * (1 - lr * decay) - lr * (0.9 * before[2] + 0.1 * g) / (1 - 0.9**t),
        "weight_decay is not used": w - lr * top / (below.sqrt() + eps),
        "the exponent t is missing in 1 - beta^t": w * (1 - lr * decay) - lr * first / (second.sqrt() + eps),
    }, 1e-5)  # fmt: skip


@exercise("spike")
def check_spike(predicted_spike):
    given = "m = 0.001, v = 0.001 squared, then a gradient of 1"
    if isinstance(predicted_spike, bool) or not isinstance(predicted_spike, int | float):
        fail("write a number", given, got=predicted_spike)
    m, v = torch_adamw_means()
    right = m / v**0.5
    mistakes = {
        "the second mean forgets too: one gradient of 1 makes v 0.05, not 1": 0.1,
        "the root is missing: v is a mean of squares": m / v,
        "with v near 0 the step would be huge, but v sees the spike as well, in the same step": 1000.0,
        "v still has its old value here; it is updated before the weight moves": m / 0.001,
        "that is the full rate, the size of every step before; the two means do not forget at the same speed": 1.0,
        "the old mean and the new gradient count 0.9 and 0.1, not the other way round": (0.9 + 0.1 * 0.001) / v**0.5,
        "beta1 and beta2 are not the same: 1 - beta2 is 0.05": m / (0.9 * 1e-6 + 0.1) ** 0.5,
        "the weight moves down, against the gradient; the question is how far, so leave the sign out": -right,
    }
    if abs(predicted_spike - right) <= 0.02 * right:
        return "so one bad batch moves the weight less than half a usual step; the damage comes after it"
    words = next((words for words, value in mistakes.items() if abs(predicted_spike - value) <= 0.02 * abs(value)),
                 "divide the new m by the root of the new v")
    fail(words, given, got=predicted_spike)


def torch_adamw_means() -> tuple[float, float]:
    """Both means after a thousand gradients of 0.001 and one of 1."""
    gradients = [torch.tensor(0.001, dtype=torch.float64)] * 400 + [torch.tensor(1.0, dtype=torch.float64)]
    *_, (_, m, v) = torch_adamw(torch.tensor(0.0, dtype=torch.float64), gradients, 1e-3, (0.9, 0.95), 0.0, 1e-8)
    return float(m), float(v)


def lion_by_hand(w, g, m, lr, first, second, decay) -> tuple[list, list]:
    """Lion, one number at a time."""
    new, kept = [], []
    for weight, gradient, mean in zip(w.flatten().tolist(), g.flatten().tolist(), m.flatten().tolist(), strict=True):
        mixed = mean * first + gradient - first * gradient
        way = (mixed > 0) - (mixed < 0)
        new.append(weight - lr * way - lr * decay * weight)
        kept.append(mean * second + gradient - second * gradient)
    return new, kept


@exercise("lion_step")
def check_lion_step(lion_step):
    w, g = torch.tensor([1.0, 1.0, -2.0, 4.0, 3.0]), torch.tensor([0.5, -0.1, -1.0, -0.01, 0.0])
    m = torch.tensor([0.0, 0.1, 0.1, 0.1, 0.0])
    given = "w = [1, 1, -2, 4, 3], g = [0.5, -0.1, -1, -0.01, 0], m = [0, 0.1, 0.1, 0.1, 0], lr = 0.1"
    result = lion_step(w, g, m, 0.1)
    if not (isinstance(result, tuple | list) and len(result) == 2):
        fail("it returns two things: the weights and m", given, got=type(result).__name__)
    shaped(result[0], (5,), given, torch.float32)
    shaped(result[1], (5,), given, torch.float32)
    signs = lambda x: torch.tensor([float((v > 0) - (v < 0)) for v in x.tolist()])
    way = signs(torch.lerp(g, m, 0.9))
    equal(result[0], 0.99 * w - 0.1 * way, f"{given}: w", "the new weights are not those of the formula", {
        "the sign is missing: each weight moves by the rate, however small its gradient": 0.99 * w - 0.1 * torch.lerp(g, m, 0.9),
        "this is the sign of the gradient alone; the old mean has a say": 0.99 * w - 0.1 * signs(g),
        "the direction is the sign of the mean that is kept (beta2); it must be of the one with beta1":
            0.99 * w - 0.1 * signs(torch.lerp(g, m, 0.99)),
        "this is the sign of the old mean alone": 0.99 * w - 0.1 * signs(m),
        "beta1 and 1 - beta1 are swapped": 0.99 * w - 0.1 * signs(torch.lerp(m, g, 0.9)),
        "the weights do not decay": w - 0.1 * way,
        "the decay is not multiplied by the rate": 0.9 * w - 0.1 * way,
        "the step goes uphill: subtract": 0.99 * w + 0.1 * way,
        "the decay has the wrong sign": 1.01 * w - 0.1 * way,
    }, 1e-6)  # fmt: skip
    equal(result[1], torch.lerp(g, m, 0.99), f"{given}: m", "m is beta2 times the old m, plus (1 - beta2) times g", {
        "the mean that is kept has beta2, not beta1": torch.lerp(g, m, 0.9),
        "m keeps the sign; keep the mean itself": way,
        "beta2 and 1 - beta2 are swapped": torch.lerp(m, g, 0.99),
        "m is not updated": m,
    }, 1e-6)  # fmt: skip
    w, g, m = torch.randn(3, 5, 7)
    before = [each.clone() for each in (w, g, m)]
    result = lion_step(w, g, m, 0.03, (0.6, 0.7), 0.4)
    for name, old, now in zip("wgm", before, (w, g, m), strict=True):
        unchanged(name, old, now)
    for name, got, wanted in zip("wm", result, lion_by_hand(w, g, m, 0.03, 0.6, 0.7, 0.4), strict=True):
        equal(got, torch.tensor(wanted).view(5, 7), f"random (5, 7), lr 0.03, betas (0.6, 0.7), weight_decay 0.4: {name}",
              "right with the usual betas and decay, and not with others: use the arguments", tolerance=1e-5)  # fmt: skip


def plain_fit(w, steps, lr, max_norm, scale, last_only=False, early=False, whole=False):
    """What fit must give, with its gradient written out; the options are its bugs."""
    w = w.double()
    for parts in steps:
        gradients = [2 * x.double().T @ (x.double() @ w - y.double()) / len(y) / len(parts) for x, y in parts]
        total = gradients[-1] if last_only else sum(gradients)
        size = float(total.norm()) * (scale if early else 1)
        limit = min(1.0, max_norm / size) if size else 1.0
        w = w - lr * total * (1 if whole else limit)
    return w


@exercise("fit")
def check_fit(fit):
    x, y = torch.randn(12, 3), torch.randn(12)
    steps = [list(zip(x.roll(n, 0).chunk(3), y.roll(n).chunk(3), strict=True)) for n in range(4)]
    given = "four steps of three micro-batches (x (4, 3), y (4,)), scale 16, max_norm 0.5"
    start = torch.zeros(3)
    got = fit(start, steps, 0.1, 0.5, 16.0)
    shaped(got, (3,), given, torch.float32)
    unchanged("w", torch.zeros(3), start)
    arguments = (start, steps, 0.1, 0.5, 16.0)
    equal(got, plain_fit(*arguments), given, "it is still not the fit of a plain loop", {
        "both bugs are still there": plain_fit(*arguments, last_only=True, early=True),
        "one bug is left: only the last micro-batch of a step counts; where must the gradient be cleared?": plain_fit(*arguments, last_only=True),
        "one bug is left: the norm is taken while the gradient is still scaled, so every step is 16 times too small":
            plain_fit(*arguments, early=True),
        "the gradient is not clipped any more": plain_fit(*arguments, whole=True),
        "the gradient is not clipped any more, and only the last micro-batch counts": plain_fit(*arguments, whole=True, last_only=True),
    })  # fmt: skip
    for scale, limit in ((1.0, 100.0), (8.0, 100.0), (1000.0, 0.01)):
        equal(fit(start, steps, 0.2, limit, scale), plain_fit(start, steps, 0.2, limit, scale), f"the same with scale {scale:g}, max_norm {limit:g}",
              "right with scale 16 and max_norm 0.5, and not here")  # fmt: skip


class Disk:
    """A disk in memory that remembers what a power cut after each of its orders would leave."""

    def __init__(self, files: dict[str, bytes], order=lambda names: names) -> None:
        self.files, self.order, self.after = dict(files), order, []
        self.safe = set(files)

    def note(self, what: str) -> None:
        self.after.append((what, {name: data if name in self.safe else b"" for name, data in self.files.items()}))

    def names(self) -> list[str]:
        return self.order(list(self.files))

    def _there(self, name: str) -> None:
        if name not in self.files:
            raise FileNotFoundError(f"there is no file {name}")

    def write(self, name: str, data: bytes) -> None:
        self.files[name] = bytes(data)
        self.safe.discard(name)
        self.note(f"write({name!r}, ...)")

    def sync(self, name: str) -> None:
        self._there(name)
        self.safe.add(name)
        self.note(f"sync({name!r})")

    def rename(self, old: str, new: str) -> None:
        self._there(old)
        self.files[new] = self.files.pop(old)
        (self.safe.add if old in self.safe else self.safe.discard)(new)
        self.safe.discard(old)
        self.note(f"rename({old!r}, {new!r})")

    def delete(self, name: str) -> None:
        self._there(name)
        del self.files[name]
        self.note(f"delete({name!r})")


def saved(step: int) -> bytes:
    return b"checkpoint of step %d" % step


GOOD = {saved(step): step for step in (1, 2, 3, 6, 8, 9, 12, 900, 1000, 1100, 123456)}


def called(step: int) -> str:
    return "step-" + str(step).zfill(6) + ".pt"


@exercise("save_newest")
def check_save_newest(save_newest):
    disk = Disk({})
    save_newest(disk, 12, saved(12))
    _every_moment(disk, [], 12, 3, "an empty disk, step 12")
    old = {called(step): saved(step) for step in (3, 6, 9)}
    cases = (("the checkpoints of steps 3, 6 and 9", {}, list), ("the same, listed in another order", {}, lambda names: names[::-1]),
             ("the same, and zz.part of a run that was killed", {"zz.part": b"half"}, sorted))  # fmt: skip
    for label, more, order in cases:
        disk = Disk(old | more, order)
        save_newest(disk, 12, saved(12))
        _every_moment(disk, [3, 6, 9], 12, 3, label)
    disk = Disk({called(step): saved(step) for step in (3, 6)})
    save_newest(disk, 9, saved(9), 3)
    _every_moment(disk, [3, 6], 9, 3, "the checkpoints of steps 3 and 6")
    for last, before in ((1, [900]), (2, [8, 900, 1000, 1100]), (5, [1, 2])):
        disk = Disk({called(step): saved(step) for step in before})
        save_newest(disk, 123456, saved(123456), last)
        _every_moment(disk, before, 123456, last, f"the checkpoints of steps {before}, last = {last}")


def _every_moment(disk: Disk, before: list[int], step: int, last: int, label: str) -> None:
    given = f"{label}; step {step} is saved"
    names = sorted(disk.files)
    if called(step) not in disk.files:
        words = "the new checkpoint is not there under its name"
        if any(called(step) in files for _, files in disk.after):
            words = "the new checkpoint was deleted again: names() lists in any order, so sort them"
        fail(words, given, called(step), names)
    least = min(last, len(before))
    for what, files in disk.after:
        whole = {name for name, data in files.items() if data in GOOD and name == called(GOOD[data])}
        if damaged := sorted({name for name in files if name.endswith(".pt")} - whole):
            words = "a power cut here leaves a damaged checkpoint under its final name"
            if what.startswith("write"):
                words += ": write beside it, under another name, and rename"
            elif what.startswith("rename"):
                words += ": sync comes before the rename, or the name is there and the bytes are not"
            fail(words, f"{given}; the power goes after {what}", got=damaged)
        if len(whole) < least:
            words = "the old one goes last, when the new one is in place"
            if "zz.part" in files:
                words = "what does not end in .pt is none, and must not be counted"
            elif called(step) in whole:
                words = "too many old ones are deleted"
            fail(f"a power cut here leaves fewer than {least} whole checkpoints: {words}", f"{given}; the power goes after {what}", got=sorted(whole))
    wanted = [called(s) for s in sorted([*before, step])[-last:]]
    kept = [name for name in names if name.endswith(".pt")]
    if kept != wanted:
        words = "these are not the newest checkpoints"
        if len(kept) > len(wanted):
            words = "too many checkpoints are left"
        elif len(kept) < len(wanted):
            words = "too few checkpoints are left"
        fail(words, given, wanted, kept)
    if rest := [name for name in names if not name.endswith(".pt") and name != "zz.part"]:
        fail("a file that is no checkpoint stays behind: rename it into its place", given, got=rest)


WAYS = ("flat", "decay", "average")


def noisy_run(way: str, rate: float = 0.3, keep: float = 0.98, late: int = 0, biased: bool = False) -> float:
    """The experiment, with the sum of what each step does written out."""
    w = np.ones(1000)
    mean = np.zeros(1000) if biased else np.ones(1000)
    for t in range(200):
        eta = rate * np.interp(t + late, [100, 200], [1.0, 0.0]) if way == "decay" else rate
        w = (1 - eta) * w - eta * torch.randn(1000, generator=torch.Generator().manual_seed(t)).numpy()
        mean += (1 - keep) * (w - mean)
    end = mean if way == "average" else w
    return float(end @ end) / 2000


def near(got: float, value: float) -> bool:
    return abs(got - value) <= 2e-4 * value


@exercise("final_loss")
def check_final_loss(predicted_best, final_loss, measured):
    right = {way: noisy_run(way) for way in WAYS}
    mistakes = {
        "flat": {"that is the loss of the run with decay": right["decay"]},
        "decay": {"the rate does not fall": right["flat"], "the rate falls one step too early": noisy_run("decay", late=1)},
        "average": {"that is the loss of w, not of its average": right["flat"],
                    "the average must begin at 1, like w": noisy_run("average", biased=True),
                    "0.98 and 0.02 are swapped": noisy_run("average", keep=0.02),
                    "that is an average with 0.95 and 0.05": noisy_run("average", keep=0.95)},
    }  # fmt: skip
    for way in WAYS:
        got = final_loss(way)
        if isinstance(got, bool) or not isinstance(got, int | float):
            fail("return the loss as a plain number", f'final_loss("{way}")', round(right[way], 5), type(got).__name__)
        if not near(got, right[way]):
            words = "this is not the loss of the run that was asked for"
            general = {"the loss is half of the mean of the squares": 2 * right[way],
                       "the loss is a mean over the weights, not a sum": 1000 * right[way]}  # fmt: skip
            words = next((told_ for told_, value in {**general, **mistakes[way]}.items() if near(got, value)), words)
            fail(words, f'final_loss("{way}")', round(right[way], 5), round(got, 5))
    if not isinstance(measured, dict) or set(measured) != set(WAYS):
        fail('`measured` is a dict with the loss of "flat", "decay" and "average"', got=measured)
    if any(not isinstance(measured[way], int | float) or not near(measured[way], right[way]) for way in WAYS):
        fail("`measured` must hold what final_loss gives", expected={way: round(value, 5) for way, value in right.items()}, got=measured)
    if predicted_best not in WAYS:
        fail('predicted_best is "flat", "decay" or "average"', got=predicted_best)
    if predicted_best != min(right, key=right.get):
        fail("your measurement disagrees with your prediction: look at it, and correct the prediction", got=predicted_best)
