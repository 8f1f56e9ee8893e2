"""minimind.train: the schedule, the groups, accumulation, precision, and checkpoints that survive a kill and continue bit for bit."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minimind import train as module
from minimind.train import (
    CheckpointError,
    History,
    Run,
    TrainConfig,
    keep_memory,
    learning_rate_at,
    load_checkpoint,
    make_optimizer,
    optimizer_groups,
    pick_precision,
    save_checkpoint,
    token_shares,
    train,
    train_step,
)

ROOT = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


class Batches:
    """Batch i is always the same; rows have different numbers of real tokens."""

    def __init__(self, shift=0, rows=6):
        self.shift, self.rows = shift, rows

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step - self.shift)
        ids = torch.randint(0, 30, (self.rows, 9), generator=generator)
        labels = ids[:, 1:].clone()
        labels[: step % self.rows, 3:] = -100
        return {"input_ids": ids[:, :-1], "labels": labels}


def new_model(seed=0, width=16, dropout=0.1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(30, width), nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, 30))


def loss_fn(model, batch):
    logits = model(batch["input_ids"]).float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    return loss, {"accuracy": (logits.argmax(-1) == batch["labels"]).float().mean()}


def config(**changes):
    return TrainConfig(**(dict(steps=20, learning_rate=1e-2, precision="fp32", log_every=3) | changes))


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- schedule and optimiser


def test_schedule_by_hand():
    ten = TrainConfig(steps=10, learning_rate=1.0, warmup=0.2, decay=0.5, final_lr=0.0)
    assert [round(learning_rate_at(step, ten), 9) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1001])
@pytest.mark.parametrize("warmup,decay,final", [(0.0, 0.0, 0.0), (0.02, 0.5, 0.1), (0.5, 0.5, 0.0), (0.9, 0.9, 0.1)])
def test_schedule_is_positive_and_never_above_its_peak(steps, warmup, decay, final):
    c = TrainConfig(steps=steps, learning_rate=2.0, warmup=warmup, decay=decay, final_lr=final)
    rates = [learning_rate_at(step, c) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_groups_hold_every_trained_weight_once_and_vectors_do_not_decay():
    model = new_model()
    model[0].weight.requires_grad = False
    decay, no_decay = optimizer_groups(model, 0.3)
    assert decay["weight_decay"] == 0.3 and no_decay["weight_decay"] == 0.0
    assert [id(p) for p in decay["params"]] == [id(model[3].weight)]
    assert {id(p) for p in no_decay["params"]} == {id(model[1].weight), id(model[1].bias), id(model[3].bias)}


def test_train_equals_a_plain_loop_in_torch():
    c = config(steps=6, warmup=0.5, grad_clip=0.5, weight_decay=0.1)
    ours, plain = new_model(dropout=0.0), new_model(dropout=0.0)
    train(ours, Batches(), loss_fn, c)
    matrices, vectors = [plain[0].weight, plain[3].weight], [plain[1].weight, plain[1].bias, plain[3].bias]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False, foreach=False)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, c)
        loss_fn(plain, Batches()[step])[0].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_clipping_caps_the_step_and_zero_switches_it_off():
    norms = {}
    for clip in (0.0, 1e-3):
        model = nn.Linear(4, 1, bias=False)
        run = Run(model, config(grad_clip=clip))
        run.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = model.weight.detach().clone()
        run.config.learning_rate, run.config.warmup = 1.0, 0.0
        train_step(run, model, [{"x": torch.ones(1, 4)}], lambda m, b: (100 * m(b["x"]).sum(), {}))
        norms[clip] = (model.weight - before).norm().item()
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3) and norms[0.0] == pytest.approx(200, rel=1e-3)


# -- accumulation


def split(batch, parts):
    return [dict(zip(batch, rows, strict=True)) for rows in zip(*(tensor.chunk(parts) for tensor in batch.values()), strict=True)]


class Micro:
    """The rows of Batches, cut into `parts` micro-batches."""

    def __init__(self, parts):
        self.parts = parts

    def __getitem__(self, index):
        return split(Batches()[index // self.parts], self.parts)[index % self.parts]


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_accumulation_does_not_change_the_training(parts, monkeypatch):
    def final(batches, accumulation):
        model = new_model(dropout=0.0)
        history = train(model, batches, loss_fn, config(steps=8, accumulation=accumulation))
        return model, history

    whole, whole_history = final(Batches(), 1)
    cut, cut_history = final(Micro(parts), parts)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert cut_history.loss == pytest.approx(whole_history.loss, abs=1e-4) and cut_history.tokens == whole_history.tokens
    # Without the safeguard, the mean of means trains another model.
    monkeypatch.setattr(module, "token_shares", lambda b: (torch.full((len(b),), 1 / len(b)), torch.tensor(0)))
    wrong, _ = final(Micro(parts), parts)
    assert max((a - b).abs().max().item() for a, b in zip(whole.parameters(), wrong.parameters(), strict=True)) > 1e-3


def test_token_shares():
    rows = [torch.tensor([[1, 2, 3, -100]]), torch.tensor([[5, -100, -100, -100]])]
    shares, tokens = token_shares([{"labels": row} for row in rows])
    assert shares.tolist() == [0.75, 0.25] and tokens == 4
    assert token_shares([{"x": rows[0]}] * 4)[0].tolist() == [0.25] * 4
    assert token_shares([{"labels": torch.full((1, 3), -100)}])[0].tolist() == [0.0]  # no 0 / 0


# -- precision and memory


def test_precision_is_what_the_machine_can_do(monkeypatch):
    for fast, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(module, "has_fast_bfloat16", lambda fast=fast: fast)
        for wanted in ("auto", "bf16", "fp16"):
            dtype, reason = pick_precision("cpu", wanted)
            assert dtype == expected and ("processor" in reason or "as asked" in reason)
        assert pick_precision("cpu", "fp32") == (None, "fp32, as asked")
    for has, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: has)
        assert pick_precision("cuda", "auto")[0] == expected and pick_precision("cuda", "fp16")[0] == torch.float16
    with pytest.raises(ValueError, match="bf61"):
        pick_precision("cpu", "bf61")


def test_keep_memory_can_be_switched_both_ways_and_train_switches_it_on(monkeypatch):
    assert keep_memory(False) == keep_memory(True)
    calls = []
    monkeypatch.setattr(module, "keep_memory", lambda on=True: calls.append(on))
    train(new_model(), Batches(), loss_fn, config(steps=1))
    assert calls == [True]


def float16(monkeypatch):
    monkeypatch.setattr(module, "pick_precision", lambda device, wanted: (torch.float16, "for this test"))


def test_float16_skips_a_step_that_overflows_and_halves_the_scale(monkeypatch):
    float16(monkeypatch)
    model = new_model()
    run = Run(model, config())
    before = [p.detach().clone() for p in model.parameters()]
    scale = run.scaler.get_scale()
    train_step(run, model, Batches(), lambda m, b: (loss_fn(m, b)[0] * 1e38, {}))
    assert run.scaler.get_scale() == scale / 2 and run.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    train_step(run, model, Batches(), loss_fn)
    assert not torch.equal(before[0], model[0].weight)


# -- the loop


def test_a_step_never_waits_for_the_device(monkeypatch):
    model = new_model()
    run, batch = Run(model, config(grad_clip=1.0)), [Batches()[0]]
    train_step(run, model, batch, loss_fn)  # the optimiser sets itself up
    run.step = 0

    def refuse(tensor, *_):
        raise AssertionError("a tensor was turned into a number inside a step")

    for name in ("item", "__float__", "__int__", "__bool__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    train_step(run, model, batch, loss_fn)
    monkeypatch.undo()
    assert run.step == 1


def test_history_has_means_real_tokens_and_evaluations():
    modes, heard = [], []

    def evaluate(model):
        modes.append(model.training or torch.is_grad_enabled())
        return {"score": 1.0}

    model = new_model()
    c = config(steps=10, log_every=4, eval_every=5)
    history = train(model, Batches(), loss_fn, c, evaluate=evaluate, on_log=lambda h: heard.append(h.step[-1]))
    assert history.step == heard == [4, 8, 10] and modes == [False, False] and model.training
    assert history.tokens[-1] == sum((Batches()[i]["labels"] != -100).sum().item() for i in range(10))
    assert [(e["step"], e["score"]) for e in history.evals] == [(5, 1.0), (10, 1.0)] and history.evals[-1]["tokens"] == history.tokens[-1]
    assert set(history.metrics[0]) == {"accuracy"} and all(speed > 0 for speed in history.tokens_per_second)
    every = train(new_model(), Batches(), loss_fn, config(steps=10, log_every=1))
    assert history.loss[0] == pytest.approx(sum(every.loss[:4]) / 4, abs=1e-5)


def test_max_steps_stops_earlier_on_the_same_schedule():
    short, whole = (train(new_model(), Batches(), loss_fn, config(log_every=1), max_steps=n) for n in (5, None))
    assert short.step == [1, 2, 3, 4, 5] and short.lr == whole.lr[:5] and short.loss == whole.loss[:5]


@pytest.mark.skipif(not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_trains_the_same_model_and_its_checkpoint_is_a_plain_one(tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes for one small model
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30))
    plain = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30))
    plain.load_state_dict(model.state_dict())
    history = train(model, Batches(), loss_fn, config(log_every=1, compile=True), tmp_path, max_steps=3)
    assert history.loss == pytest.approx(train(plain, Batches(), loss_fn, config(log_every=1), max_steps=3).loss, abs=1e-4)
    assert load_checkpoint(tmp_path)["model"].keys() == plain.state_dict().keys()


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_good_checkpoint(tmp_path):
    def breaks(model, batch):
        loss, metrics = loss_fn(model, batch)
        return (loss * float("nan") if breaks.calls == 8 else loss), metrics | {"calls": setattr(breaks, "calls", breaks.calls + 1) or 0.0}

    breaks.calls = 0
    with pytest.raises(FloatingPointError, match="between steps 6 and 9"):
        train(new_model(), Batches(), breaks, config(save_every=3), folder=tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 6


# -- resume


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("stop", [1, 7, 12])
def test_resume_is_bit_for_bit(tmp_path, monkeypatch, precision, stop):
    kind = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    monkeypatch.setattr(module, "pick_precision", lambda device, wanted: (kind, "for this test"))
    c = config(accumulation=2, save_every=stop, log_every=5, weight_decay=0.1)
    straight, broken = new_model(), new_model()
    history = train(straight, Batches(), loss_fn, c, evaluate=lambda m: 1.0)

    class Stop(Exception):
        pass

    class Dies(Batches):
        def __getitem__(self, step):
            if step == 2 * stop + 1:
                raise Stop
            return super().__getitem__(step)

    with pytest.raises(Stop):
        train(broken, Dies(), loss_fn, c, tmp_path, evaluate=lambda m: 1.0)
    resumed = new_model(seed=9)
    resumed_history = train(resumed, Batches(), loss_fn, c, tmp_path, resume=True, evaluate=lambda m: 1.0)
    assert same_weights(straight, resumed)
    for name in ("step", "loss", "metrics", "lr", "grad_norm", "tokens", "evals"):
        assert getattr(history, name) == getattr(resumed_history, name), name
    again = train(new_model(seed=5), Batches(), loss_fn, c, tmp_path, resume=True)  # finished: nothing left to do
    assert again.step == history.step


@pytest.mark.parametrize("part", ["model", "optimizer", "random", "data", "step"])
def test_every_part_of_a_checkpoint_is_needed(tmp_path, part):
    c = config(warmup=0.5)
    straight = new_model()
    train(straight, Batches(), loss_fn, c)
    train(new_model(), Batches(), loss_fn, c, tmp_path, max_steps=10)
    state, fresh = load_checkpoint(tmp_path), Run(new_model(seed=3), c).state()
    batches = Batches(shift=10) if part == "data" else Batches()
    if part == "step":  # the schedule starts again, the data do not
        state["step"], batches = 0, Batches(shift=-10)
    elif part != "data":
        state[part] = fresh[part]
    save_checkpoint(tmp_path, state)
    resumed = new_model(seed=9)
    train(resumed, batches, loss_fn, c, tmp_path, resume=True)
    assert not same_weights(straight, resumed)


def test_resume_without_a_checkpoint_starts_at_zero_and_without_resume_starts_afresh(tmp_path):
    first = train(new_model(), Batches(), loss_fn, config(), tmp_path, resume=True)
    second = train(new_model(), Batches(), loss_fn, config(), tmp_path)
    assert first.step == second.step and first.loss == second.loss


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_train import *
c = config(steps=150, log_every=1, save_every=4)
train(new_model(), Batches(), loss_fn, c, sys.argv[1], resume=True, on_log=lambda h: print(h.step[-1], flush=True))
"""


def spawn(code, *arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code).replace("{tests!r}", repr(str(ROOT / "tests"))), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@posix
def test_a_run_killed_with_signal_9_continues_bit_for_bit(tmp_path):
    victim = spawn(SCRIPT, tmp_path / "killed")
    for line in victim.stdout:
        if int(line) == 30:
            victim.kill()
            break
    assert victim.wait() == -signal.SIGKILL
    assert 28 <= load_checkpoint(tmp_path / "killed")["step"] < 150
    second, lived = spawn(SCRIPT, tmp_path / "killed"), spawn(SCRIPT, tmp_path / "lived")
    steps = [int(line) for line in second.communicate()[0].split()]
    lived.communicate()
    assert steps[0] > 1 and steps[-1] == 150
    a, b = load_checkpoint(tmp_path / "killed"), load_checkpoint(tmp_path / "lived")
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in b["model"])
    assert a["history"]["loss"] == b["history"]["loss"] and torch.equal(a["random"]["torch"], b["random"]["torch"])


# -- writing

WRITER = """
import os, resource, signal, sys, torch
import minimind.train as module
kind, folder = sys.argv[1:]
def plain(folder, state):
    torch.save(state, os.path.join(folder, "checkpoint.pt"))
module.save_checkpoint(folder, {"step": 1, "weights": torch.zeros(50_000)})
new = {"step": 2, "weights": torch.ones(50_000)}
if kind.endswith("kill"):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
if kind.endswith("full"):  # Python ignores the signal, so the write fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
if kind == "ours-before-rename":
    module.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
try:
    (plain if kind.startswith("plain") else module.save_checkpoint)(folder, new)
except (module.CheckpointError, RuntimeError, OSError) as error:
    print(type(error).__name__, error)
"""


@posix
@pytest.mark.parametrize("kind", ["plain-kill", "ours-kill", "ours-before-rename", "plain-full", "ours-full"])
def test_the_last_good_checkpoint_survives_a_kill_or_a_full_disk_during_the_write(tmp_path, kind):
    process = spawn(WRITER, kind, tmp_path)
    printed, _ = process.communicate()
    if "full" not in kind:
        assert process.returncode in (-signal.SIGXFSZ, -signal.SIGKILL)
    if kind.startswith("plain"):  # without the safeguard the only copy is gone
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_checkpoint(tmp_path)
        return
    assert load_checkpoint(tmp_path)["step"] == 1
    if kind == "ours-full":
        assert printed.startswith("CheckpointError") and "untouched" in printed
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    save_checkpoint(tmp_path, {"step": 3})  # what was left behind is in nobody's way
    assert load_checkpoint(tmp_path)["step"] == 3 and len(list(tmp_path.iterdir())) == 1


def test_no_space_left_is_a_clear_error(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"step": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left.*untouched"):
        save_checkpoint(tmp_path, {"step": 2})
    assert load_checkpoint(tmp_path)["step"] == 1 and len(list(tmp_path.iterdir())) == 1


# -- reading


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        load_checkpoint(tmp_path)
    path = save_checkpoint(tmp_path, Run(new_model(), config()).state())
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_checkpoint(tmp_path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"step": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_another_size_and_other_settings_are_refused_by_name(tmp_path):
    train(new_model(), Batches(), loss_fn, config(), tmp_path)
    with pytest.raises(CheckpointError, match=r"0\.weight: \(30, 16\) in the checkpoint, \(30, 24\) in the model"):
        train(new_model(width=24), Batches(), loss_fn, config(), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="4.weight: missing in the checkpoint"):
        train(nn.Sequential(*new_model(), nn.Linear(30, 30)), Batches(), loss_fn, config(), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="learning_rate: 0.01 then, 0.02 now"):
        train(new_model(), Batches(), loss_fn, config(learning_rate=2e-2), tmp_path, resume=True)
    assert train(new_model(), Batches(), loss_fn, config(log_every=7, save_every=2), tmp_path, resume=True).step  # these may change


def test_history_starts_empty():
    assert History() == History() and History().step == []
    assert make_optimizer(new_model(), config()).defaults["fused"]
