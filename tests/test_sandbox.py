"""Answers in a process of their own: what comes out is data, what they may use is limited, and checks see them as if they were here."""

import copy
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import tokenizers
import torch
import yaml
from helpers_course import environment
from helpers_workbooks import NAMES, ROOT, book, changed, checks_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from course.checks import core
from course.grading import confine, graded
from course.grading.confine import Limits
from course.grading.sandbox import AnswerFailed, Remote, Sandbox, Server, protection
from course.grading.submission import Master, Submission, asked_for
from course.grading.wire import Channel, Decoder, Encoder, WireError
from minimind.model import ModelConfig
from tests import toy_workbook as toy

ANSWERS = {name: yaml.safe_load((ROOT / "tests" / "wrong_answers" / f"{name}.yaml").read_text()) for name in NAMES}


def chosen(name: str, exercise: str, kind: str, count: int) -> list[int]:
    """All honest answers; of the wrong ones two, or with MINIMIND_ALL_ANSWERS=1 all."""
    if kind == "right" or os.environ.get("MINIMIND_ALL_ANSWERS"):
        return list(range(count))
    return sorted(random.Random(f"{name} {exercise}").sample(range(count), min(2, count)))


CASES = [(name, exercise, kind, number) for name in NAMES for exercise, told in ANSWERS[name].items() for kind in ("wrong", "right")
         for number in chosen(name, exercise, kind, len(told[kind]))]  # fmt: skip
PLAIN = st.none() | st.booleans() | st.integers(max_value=10**6) | st.floats() | st.text(max_size=8)
KINDS = "tensor array scalar dict list size int float bytes dtype device slice meta set named x".split()
NAMESPACES = bool(confine.protection().startswith("own root"))
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what other processes use")
needs_namespaces = pytest.mark.skipif(not NAMESPACES, reason="this system allows no namespaces")


@pytest.fixture(scope="session")
def server():
    server = Server.start()
    yield server
    server.stop()


@pytest.fixture
def opened(server):
    """opened(source, names...): what an answer defines."""
    boxes = []

    def start(source: str, *names: str, seconds: int = 4, **options) -> dict:
        limits = Limits(cpu_seconds=seconds, wall_seconds=3 * seconds, memory_bytes=2**30)
        boxes.append(Sandbox(server, [{"name": "answer", "source": source, "answer": True, "names": list(names)}], limits, **options))
        found = boxes[-1].open()
        return found

    start.boxes = boxes
    yield start
    for box in boxes:
        box.close()


# --- the checks of the workbooks see answers as they are


@pytest.mark.parametrize("name, exercise, kind, number", CASES, ids=lambda value: str(value))
def test_checks_judge_from_afar_as_in_the_notebook(server, name, exercise, kind, number) -> None:
    """Each wrong answer is rejected with the same words, each honest one passes, although the check never touches the object itself.

    Two wrong answers of each exercise by default: a case takes a tenth of a second, there are about a thousand, and the same answers are all checked
    without a sandbox in test_workbooks.py. MINIMIND_ALL_ANSWERS=1 takes all.
    """
    told = ANSWERS[name][exercise][kind][number]
    workbook = book(name)
    code = told if kind == "right" else told.get("code") or changed(workbook.solution(exercise), told["change"])
    names = [n for e in workbook.exercises for n in asked_for(workbook.solution(e.name))]
    shared = [c.source for c in workbook.source.cells if c.kind == "code" and c.id.endswith("imports")]
    cells = [{"name": "workbook", "source": source, "answer": False, "names": []} for source in shared]
    cells += [{"name": e.name, "source": workbook.solution(e.name), "answer": False, "names": []} for e in workbook.exercises]
    cells.append({"name": exercise, "source": code, "answer": True, "names": names})
    box = Sandbox(server, cells, Limits(), in_place=checks_of(name)[exercise].in_place)
    try:
        if kind == "right":
            core.run(checks_of(name), exercise, box.open())
            return
        try:
            space = box.open()
        except Exception:  # an answer that cannot even be defined
            return
        with pytest.raises(core.CheckFailed) as caught:
            core.run(checks_of(name), exercise, space)
        assert told["says"] in str(caught.value) or "changes its argument" in told["says"]  # its changes stay over there, its result is wrong
    finally:
        box.close()


# --- values


def test_values_come_back_as_they_are(opened) -> None:
    same = opened("def same(*args, **named):\n    return args, named", "same")["same"]
    values = [
        None, True, 3, 2**100, -0.5, float("inf"), 1 + 2j, "é\n", b"\x00", [1, [2]], (1,), {1: "a", "b": [None]}, {3}, slice(1, None), range(3), ...,
        torch.float16, torch.Size([2]), torch.arange(6).reshape(2, 3).T, torch.zeros(0, 3), torch.tensor([True]), torch.tensor(1 + 1j),
        torch.randn(2, dtype=torch.bfloat16), torch.arange(4)[::2], torch.arange(2)[::2], torch.zeros(2).expand(3, 2), numpy.arange(3.0),
        numpy.float32(2.5),
    ]  # fmt: skip
    back, named = same(*values, key=[torch.ones(1)])
    for value, got in zip(values, back, strict=True):
        assert type(got) is type(value)
        same_value = torch.equal(got, value) and got.dtype == value.dtype if isinstance(value, torch.Tensor) else got == value
        assert numpy.all(same_value), value
    assert torch.equal(named["key"][0], torch.ones(1))
    assert same(float("nan"))[0][0] != same(float("nan"))[0][0]
    assert same(torch.empty(2, device="meta"))[0][0].device.type == "meta"
    assert back[18].stride() == values[18].stride()  # a transposed tensor stays one


def test_what_an_answer_returns_cannot_lie(opened) -> None:
    """Objects that claim to equal everything are handles here, and equal nothing; subclasses of plain types become plain."""
    source = """
import torch
class Yes:
    def __eq__(self, other): return True
    def __bool__(self): return True
    shape = (3,)
class Number(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
class Liar(torch.Tensor):
    @classmethod
    def __torch_function__(cls, f, types, args=(), kwargs=None): return True
def yes(): return Yes()
def number(): return Number(7)
def liar(): return torch.zeros(3).as_subclass(Liar)
def broken(): return torch.frombuffer(bytearray([2, 0, 255]), dtype=torch.bool)
"""
    found = opened(source, "yes", "number", "liar", "broken")
    assert isinstance(found["yes"](), Remote) and not found["yes"]() == 3 and 3 != found["yes"]()
    with pytest.raises(TypeError):
        torch.equal(found["yes"](), torch.zeros(3))
    assert type(found["number"]()) is int and found["number"]() != 8
    assert type(found["liar"]()) is torch.Tensor and not torch.equal(found["liar"](), torch.ones(3))
    assert found["broken"]().view(torch.uint8).tolist() == [1, 0, 1]


@settings(max_examples=300, deadline=None)
@given(st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=5), max_leaves=20), st.sampled_from(KINDS))
def test_malformed_values_are_refused(value, kind) -> None:
    """Whatever stands in a message, reading it gives a value or a WireError."""
    code = [kind, *value] if isinstance(value, list) else [kind, value]

    def refuse(code):
        raise WireError("unknown")

    try:
        Decoder([b"\x01\x02\x03\x04", b""], refuse)(code)
    except WireError:
        pass


def test_messages_have_limits() -> None:
    here, there = socket.socketpair()
    for junk in (b"\xff" * 16 + b"x", b"\x00" * 7 + b"\x02" + b"\x00" * 8 + b"[]", b"\x00" * 7 + b"\x01" + b"\x00" * 8 + b"{"):
        there.sendall(junk)
        with pytest.raises(WireError):
            Channel(here).receive(time.monotonic() + 1)
        here.close()
        here, there = socket.socketpair()
    with pytest.raises(WireError):  # half a message, and then nothing
        there.sendall(b"\x00")
        Channel(here).receive(time.monotonic() + 0.2)
    for code in (["list", [["bytes", 0]] * 3], ["list", [["packed", "q", 0]] * 3], ["list", [["tensor", "uint8", [2**26], [0], 0]] * 3],
                 ["range", [0, 10**9, 1]]):  # fmt: skip
        with pytest.raises(WireError):
            Decoder([bytes(2**26)], lambda code: None)(code)
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(WireError):
        Encoder(lambda value: None)(deep)


# --- objects that stay over there


def test_gradients_flow_through(opened) -> None:
    found = opened("import torch\ndef f(x, w):\n    return (x @ w).tanh(), x.sum().detach()", "f")
    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(3, 4)
    y, total = found["f"](x, w)
    assert y.requires_grad and not total.requires_grad
    (ours,) = torch.autograd.grad(y.pow(2).sum(), x)
    (theirs,) = torch.autograd.grad((x @ w).tanh().pow(2).sum(), x)
    assert torch.allclose(ours, theirs)
    with torch.no_grad():
        assert not found["f"](x, w)[0].requires_grad


def test_modules_are_mirrored(opened) -> None:
    """Parameters live here, code lives there: training and loading work as with a module of our own."""
    source = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)
        self.b.bias = self.a.bias if False else self.b.bias
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, x, f=None):
        self.calls += 1
        h = self.drop(self.a(x))
        return self.b(f(h) if f else h)
    def twice(self, x):
        return self(self(x))
"""
    made = opened(source, "Net")["Net"]
    net, twin = made(), nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert isinstance(net, nn.Module) and isinstance(net, made) and issubclass(made, nn.Module) and not isinstance(twin, made)
    twin.load_state_dict({"0.weight": net.a.weight, "0.bias": net.a.bias, "1.weight": net.b.weight, "1.bias": net.b.bias})
    net.eval()
    x = torch.randn(5, 2)
    assert torch.allclose(net(x), twin(x)) and torch.allclose(net.twice(x), twin(twin(x))) and torch.allclose(net.a(x), twin[0](x))
    assert torch.allclose(net(x, torch.relu), twin[1](twin[0](x).relu())) and torch.allclose(net(x, lambda h: h * 2), twin[1](twin[0](x) * 2))
    assert net.calls == 5
    for module in (net, twin):
        optimizer = torch.optim.AdamW(module.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).pow(2).sum().backward()
            optimizer.step()
    assert torch.allclose(net(x), twin(x), atol=1e-6)
    net.train()
    assert not torch.equal(net(x), net(x))  # dropout, and the random numbers go on


def test_inference_mode_and_passing_buffers(opened) -> None:
    """A generator under inference_mode gets tensors of the check; a buffer that is not saved stands in no state_dict."""
    source = """
import torch
from torch import nn
@torch.inference_mode()
def steps(f, x):
    for _ in range(2):
        x = f(x)
        yield x.sum()
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.register_buffer("passing", torch.ones(1), persistent=False)
        self.register_buffer("stays", torch.ones(1))
    def forward(self, x):
        return self.inner(x) * self.inner.passing
"""
    found = opened(source, "steps", "Net")
    assert [float(value) for value in found["steps"](lambda x: 2 * x, torch.ones(2))] == [4, 8]
    net = found["Net"]()
    assert sorted(net.state_dict()) == ["inner.bias", "inner.weight", "stays"] and sorted(dict(net.named_buffers())) == ["inner.passing", "stays"]
    net.inner.passing.zero_()
    assert not net(torch.ones(1, 2)).any()


def test_errors_keep_their_type_and_line(opened) -> None:
    source = "class Own(Exception):\n    pass\ndef value():\n    raise ValueError('no')\n" \
             "def own():\n    raise Own('mine')\ndef out():\n    raise SystemExit(0)"  # fmt: skip
    found = opened(source, "value", "own", "out")
    with pytest.raises(ValueError, match="no") as caught:
        found["value"]()
    assert caught.value.answer_line == "line 4: raise ValueError('no')"
    for name in ("own", "out"):
        with pytest.raises(RuntimeError):
            found[name]()


def test_functions_of_a_check_give_away_only_what_they_return(opened) -> None:
    """An answer may call what it was handed, and read public attributes; not globals, code, closures or modules."""
    names = ["__globals__", "__code__", "__closure__", "_private", "__class__"]
    source = f"""
def use(f, box):
    seen = []
    for name in {names}:
        f.__dict__["_path"] = (name,)
        try:
            seen.append(repr(f()))
        except AttributeError:
            pass
        f.__dict__["_path"] = ()
    return f(2), box.add(3), box.items, seen
"""
    class Box:
        def __init__(self):
            self.items, self._private = [1], 2

        def add(self, value):
            self.items.append(value)
            return len(self.items)

    assert opened(source, "use")["use"](lambda v: v * 10, Box()) == (20, 2, [1, 3], [])


def test_an_answer_cannot_change_what_a_check_computes_with(opened) -> None:
    """The attack works where an exercise allows changes in place, and there alone."""
    source = "import torch\ndef total(x, n):\n    x.zero_()\n    return torch.zeros(x.shape[1])"
    toy.check_total(opened(source, "total", in_place=True)["total"])
    with pytest.raises(AssertionError):
        toy.check_total(opened(source, "total")["total"])
    assert opened.boxes[-1].odd == {"changes its arguments in place"}
    x = torch.ones(2, 2)
    opened(source, "total")["total"](x, 1)
    assert torch.equal(x, torch.ones(2, 2)) and x.changed_by_answer


def test_exercises_are_hidden_in_the_package(opened) -> None:
    """`from minimind.attention import repeat_kv` is no answer to repeat_kv; without `hide` it would be."""
    source = "from minimind.attention import repeat_kv"
    assert opened(source, "repeat_kv")["repeat_kv"](torch.ones(1, 1, 1, 1), 2).shape == (1, 2, 1, 1)
    with pytest.raises(ImportError):
        opened(source, "repeat_kv", hide={"minimind.attention": ["repeat_kv"]})
    source = "from minimind.attention import causal_mask\nx = causal_mask(2).sum().item()"
    assert opened(source, "x", hide={"minimind.attention": ["repeat_kv"]}) == {"x": 3}


# --- what a check may hand to an answer, and get from it


@dataclass
class Settings:
    """A dataclass of a check."""

    width: int = 3
    names: tuple = ("a",)


class Doubling:
    """An object of a check: it can be entered, indexed and counted, and its methods be called."""

    def __init__(self):
        self.entered, self.left = 0, 0

    def __enter__(self):
        self.entered += 1
        return 7

    def __exit__(self, *_):
        self.left += 1

    def __len__(self):
        return 4

    def __getitem__(self, key):
        return 2 * key

    def __contains__(self, value):
        return value == 5

    def double(self, value):
        return 2 * value


def test_arguments_of_every_kind(opened, tmp_path) -> None:
    """Configurations, random numbers, tokenizers, files of tokens and iterators reach an answer in a form that it can use as ever."""
    source = """
import dataclasses, itertools, random, types
import numpy, tokenizers, torch
from minimind.model import ModelConfig
def config(c): return c.width + len(c.names), dataclasses.is_dataclass(c), dataclasses.replace(c, width=9).width
def space(c): return c.r * 2, isinstance(c, types.SimpleNamespace), types.SimpleNamespace(r=c.r + 1, deep=[c])
def ours(c): return isinstance(c, ModelConfig), dataclasses.replace(c, num_hidden_layers=7)
def draws(rng, generator): return rng.random(), rng.sample(range(100), 3), torch.rand(2, generator=generator)
def tokens(t): return isinstance(t, tokenizers.Tokenizer), t.encode("b a").ids
def total(array): return int(array[1:].sum()), type(array) is numpy.ndarray, array.dtype.name
def batches(rows): return [row.sum().item() for row in rows], [2 * i for i in itertools.islice(rows, 2)]
def managed(m):
    with m as entered:
        inside = len(m), m[4], 5 in m, 6 in m, m.double(3), bool(m)
    return entered, inside
def many(ids): return [i + 1 for i in ids], type(ids) is list
def words(text, data): return text.upper(), data[::-1], text.encode()
def firsts(values):
    for value in values:
        yield value
        if value > 1: return
"""
    names = "config space ours draws tokens total batches managed many words firsts".split()
    f = types.SimpleNamespace(**opened(source, *names))
    assert f.config(Settings()) == (4, True, 9)
    doubled, kind, back = f.space(types.SimpleNamespace(r=3))
    assert (doubled, kind, back.r, back.deep[0].r) == (6, True, 4, 3)
    there, changed_config = f.ours(ModelConfig(num_hidden_layers=2))
    assert there and type(changed_config) is ModelConfig and changed_config == ModelConfig(num_hidden_layers=7)
    rng, generator = random.Random(3), torch.Generator().manual_seed(4)
    twin, other = random.Random(3), torch.Generator().manual_seed(4)
    for _ in range(2):  # the second time they have gone on
        a, b, c = f.draws(rng, generator)
        assert a == twin.random() and b == twin.sample(range(100), 3) and torch.equal(c, torch.rand(2, generator=other))
    assert f.tokens(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, " ": 2}, "a"))) == (True, [0])
    array = numpy.memmap(tmp_path / "tokens", numpy.uint16, "w+", shape=3_000_000)
    array[:] = 2
    assert f.total(array) == (2 * (array.size - 1), True, "uint16")
    sums, more = f.batches(iter([torch.ones(2), torch.ones(3), numpy.ones(4)]))
    assert sums == [2, 3, 4] and more == []
    assert f.batches(torch.ones(i) for i in range(3))[0] == [0, 1, 2]
    manager = Doubling()
    assert f.managed(manager) == (7, (4, 8, True, False, 6, True)) and (manager.entered, manager.left) == (1, 1)
    ids = list(range(500_000))
    assert f.many(ids) == ([i + 1 for i in ids], True)
    assert f.words("é", b"ab") == ("É", b"ba", "é".encode())
    values = f.firsts(itertools.count())
    assert next(values) == 0 and list(values) == [1, 2] and list(values) == []


TRAINS = """
import torch
from torch import nn
def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = (model(x) - y).pow(2).mean()
    loss.backward()
    optimizer.step()
    return loss.item()
def backward(model, x):
    model(x).sum().backward()
def clipped(parameters):
    return nn.utils.clip_grad_norm_(parameters, 0.1)
def frozen(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.extra = nn.Parameter(torch.ones(2))
    model.eval()
    return model
class Twice(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.tensor(2.0))
    def forward(self, x):
        return self.scale * self.base(x)
def wrapped(model, settings):
    model[0] = Twice(model[0])
    model.settings = settings
    settings.done = True
    return model
def refused(model):
    model[2].weight.requires_grad_(False)
    raise ValueError("no")
def kept(state, rows):
    state["step"] += 1
    state["sums"].append(rows[0])
    rows[1].zero_()
"""
NAMES_OF_TRAINING = "step backward clipped frozen wrapped refused kept".split()


def two_layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_an_answer_trains_what_it_is_given(opened) -> None:
    """With in_place a model, its optimiser and all that hangs on them come back changed, exactly as in a notebook."""
    f = types.SimpleNamespace(**opened(TRAINS, *NAMES_OF_TRAINING, in_place=True))
    here: dict = {}
    exec(TRAINS, here)
    model, twin, x, y = two_layers(), two_layers(), torch.randn(5, 3), torch.randn(5, 2)
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        optimizer, other = kind(model.parameters(), 0.1), kind(twin.parameters(), 0.1)
        for _ in range(3):
            assert f.step(model, optimizer, x, y) == pytest.approx(here["step"](twin, other, x, y))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), twin.parameters()))
        assert len(optimizer.state) == len(other.state)
    f.backward(model, x)
    here["backward"](twin, x)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in zip(model.parameters(), twin.parameters()))  # added to what was there
    assert f.clipped(list(model.parameters())) == pytest.approx(float(here["clipped"](twin.parameters())))
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in zip(model.parameters(), twin.parameters()))
    assert f.frozen(model) is model and not model.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["extra"]


def test_an_answer_puts_its_own_modules_into_a_model(opened) -> None:
    f = types.SimpleNamespace(**opened(TRAINS, *NAMES_OF_TRAINING, in_place=True))
    model, settings, x = two_layers(), types.SimpleNamespace(r=2), torch.randn(5, 3)
    before = model[0](x).detach()
    assert f.wrapped(model, settings) is model and model.settings is settings and settings.done
    assert torch.allclose(model[0](x), 2 * before) and type(model[2]) is nn.Linear
    model(x).sum().backward()
    assert model[0].scale.grad is not None and model[0].base.weight.grad is not None
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model[0].scale.fill_(3)
    assert torch.allclose(model[0](x), 3 * before) and torch.allclose(twin[0](x), 2 * before)
    with pytest.raises(ValueError):
        f.refused(model)
    assert not model[2].weight.requires_grad  # what was changed before an error is changed
    state, rows = {"step": 1, "sums": []}, [torch.ones(2), torch.ones(2)]
    f.kept(state, rows)
    assert state["step"] == 2 and state["sums"][0] is rows[0] and not rows[1].any()


def test_without_in_place_nothing_changes(opened) -> None:
    """The same answers, where the exercise does not ask for changes."""
    f = types.SimpleNamespace(**opened(TRAINS, *NAMES_OF_TRAINING))
    model, twin, x, y = two_layers(), two_layers(), torch.randn(5, 3), torch.randn(5, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    f.step(model, optimizer, x, y)
    f.backward(model, x)
    assert f.frozen(model) is not model and model.training
    given_settings = types.SimpleNamespace(r=2)
    made = f.wrapped(model, given_settings)
    assert isinstance(made, nn.Module) and torch.allclose(made[0](x), 2 * twin[0](x)) and len(made) == 3 and not hasattr(given_settings, "done")
    state = {"step": 1}
    with pytest.raises(KeyError):
        f.kept(state, [torch.ones(2)])
    assert state == {"step": 1} and not optimizer.state
    assert all(torch.equal(a, b) and a.grad is None and a.requires_grad for a, b in zip(model.parameters(), twin.parameters()))
    assert opened.boxes[-1].odd


def test_a_change_cannot_cover_a_method(opened) -> None:
    """An answer that may change a model cannot make it lie about its parameters."""
    source = """
def spoil(model):
    model.parameters = model.named_parameters = lambda *a, **k: iter(())
    model.forward = lambda x: 0 * x
    model.note = 3
"""
    model = two_layers()
    opened(source, "spoil", in_place=True)["spoil"](model)
    assert model.note == 3 and len(list(model.parameters())) == 4 and "forward" not in vars(model)


# --- limits


ENDINGS = {
    "import os\nos._exit(0)": "ends the whole process",
    "while True: pass": "processor time|time: more",
    "import time\ntime.sleep(1000)": "time: more",
    "import ctypes\nctypes.string_at(0)": "SIGSEGV",
    "x = []\nwhile True:\n    try: x.append(bytearray(10**7))\n    except MemoryError: pass": "memory|processor time|time: more",
    "import os\nfor _ in range(9): os.fork()\nx = bytearray(10**8)\nimport time\ntime.sleep(50)": "",
}  # fmt: skip


@pytest.mark.parametrize("source", ENDINGS, ids=list(range(len(ENDINGS))))
def test_what_does_not_end_is_ended(opened, source) -> None:
    begun = time.monotonic()
    with pytest.raises((AnswerFailed, BlockingIOError), match=ENDINGS[source]):
        opened(source + "\nf = 1", "f", seconds=2)
    assert time.monotonic() - begun < 60


TAKES = """
import os, time
for _ in range(3):
    os.fork()
kept = []
for _ in range({steps}):
    kept.append(bytearray(os.urandom(2**20)) * {megabytes})
time.sleep({seconds})
f = 1
"""


def below(top: int) -> dict[int, int]:
    """Bytes of private memory of every process below one, looked up among all processes of the machine."""
    parents, found = {}, {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            told = dict(line.split(":", 1) for line in path.read_text().splitlines())
            parents[int(told["Pid"])] = int(told["PPid"]), 1024 * int(told.get("RssAnon", "0 kB").split()[0])
        except (OSError, ValueError):
            continue
    for pid in parents:
        above = pid
        while above in parents and above != top:
            above = parents[above][0]
        if above == top:
            found[pid] = parents[pid][1]
    return found


def most_taken(server, source: str, limits: Limits, namespaces: bool) -> tuple[str, int]:
    """How the answer ended, and the most that all its processes together had beyond what each began with."""
    peak, ended, told = 0, threading.Event(), ""

    def look():
        nonlocal peak
        loaded = below(server.process.pid)[server.process.pid]
        while not ended.is_set():
            peak = max(peak, sum(max(0, taken - loaded) for taken in below(server.process.pid).values()))

    watcher = threading.Thread(target=look)
    watcher.start()
    box = Sandbox(server, [{"name": "answer", "source": source, "answer": True, "names": ["f"]}], limits, namespaces=namespaces)
    try:
        box.open()
    except AnswerFailed as error:
        told = str(error)
    box.close()
    ended.set()
    watcher.join()
    return told, peak


@needs_linux
@pytest.mark.parametrize("namespaces", [pytest.param(True, marks=needs_namespaces), False])
def test_the_memory_of_all_processes_is_held_together(server, namespaces) -> None:
    """Eight processes of which none takes more than one may: each would stop far below its own limit."""
    limits = Limits(cpu_seconds=10, wall_seconds=20, memory_bytes=3 * 2**28)
    told, peak = most_taken(server, TAKES.format(steps=6, megabytes=50, seconds=5), limits, namespaces)  # 2.4 GB together
    assert "memory: more than 0.8 GB" in told
    assert limits.memory_bytes / 2 < peak < limits.memory_bytes + 2**28


@needs_linux
def test_the_watcher_is_what_holds_it() -> None:
    """The same with less memory and nobody who watches: the limit of one process does not hold the sum."""
    server = Server.start("from course.grading import worker\nworker.Meter.used = lambda self, allowed: 0")
    try:
        limits = Limits(cpu_seconds=10, wall_seconds=20, memory_bytes=2**27)
        told, peak = most_taken(server, TAKES.format(steps=1, megabytes=70, seconds=2), limits, NAMESPACES)  # 560 MB together
        assert told == "" and peak > limits.memory_bytes + 2**28
    finally:
        server.stop()


LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
HIDES = {
    "memory that belongs to no process": "import os\nfile = os.memfd_create('x')",
    "anonymous shared memory": "import mmap\nmap = mmap.mmap(-1, 2**20)",
    "shared memory of System V": LIBC + "if libc.shmget(0, 2**20, 0o1600) < 0: raise OSError(1, 'no')",
    "a new namespace": LIBC + "if libc.unshare(0x10000000): raise OSError(1, 'no')",
    "a socket to the network": "import socket\nsocket.socket()",
    "more processors": "import os\nos.sched_setaffinity(0, os.sched_getaffinity(0))",
}


@needs_linux
@pytest.mark.parametrize("what", HIDES)
def test_calls_that_are_refused(opened, what) -> None:
    """They work in an ordinary process, and not in one that is shut in."""
    subprocess.run([sys.executable, "-c", HIDES[what]], check=what != "a new namespace")
    with pytest.raises(PermissionError):
        opened(HIDES[what], "f")


@needs_linux
def test_the_kernel_ends_answers_first(opened) -> None:
    """Where memory runs out all the same, these processes go before any other, and cannot say otherwise."""
    source = """
score = int(open("/proc/self/oom_score_adj").read())
try:
    open("/proc/self/oom_score_adj", "w").write("0")
    changed = True
except OSError:
    changed = False
"""
    found = opened(source, "score", "changed")
    assert found["score"] == 1000 and not (found["changed"] and NAMESPACES)


def test_a_group_of_the_kernel_is_made_where_it_may_be(tmp_path) -> None:
    """In our own control group, or beside it where that one may have no children; nowhere else."""
    (tmp_path / "own").write_text("3:cpu:/x\n0::/user/session\n")
    for path, controllers in ((tmp_path / "user", "memory pids"), (tmp_path / "user" / "session", "")):
        path.mkdir()
        (path / "cgroup.subtree_control").write_text(controllers)
    group = confine.Group(Limits(), 5, tmp_path, tmp_path / "own")
    assert group.path.parent == tmp_path / "user"
    assert (group.path / "memory.max").read_text() == str(2 * 2**30 + 5) and (group.path / "pids.max").read_text() == "16"
    assert group.add(17) and (group.path / "cgroup.procs").read_text() == "17"
    (tmp_path / "user" / "cgroup.subtree_control").write_text("cpu")
    assert confine.Group(Limits(), 5, tmp_path, tmp_path / "own").path is None


def test_small_limits() -> None:
    """What is refused with small limits is allowed with larger ones: the limit is the reason."""
    server = Server.start()
    source = "x = bytearray(300 * 2**20)\nopen('large', 'wb').write(x[: 2 * 2**20])\nfiles = [open('/dev/null') for _ in range(80)]\nok = True"
    for limits, fine in ((Limits(), True), (Limits(memory_bytes=2**28), False), (Limits(file_bytes=2**20), False), (Limits(files=40), False)):
        box = Sandbox(server, [{"name": "answer", "source": source, "answer": True, "names": ["ok"]}], limits)
        if fine:
            assert box.open() == {"ok": True}
        else:
            with pytest.raises((MemoryError, OSError, AnswerFailed)):
                box.open()
        box.close()
    server.stop()


def test_namespaces_that_are_not_used_are_not_named() -> None:
    assert "own root folder" not in confine.protection(namespaces=False)


@needs_namespaces
def test_protection_is_what_it_says() -> None:
    found = protection()
    assert found["course hidden"] and found["network off"] and found["processes seen"] == 1
    assert found["way"].startswith("namespaces")


@needs_namespaces
def test_namespaces_are_what_hides_the_course(opened) -> None:
    """The same look sees nothing with them, and, as another user at most, what everybody may read without them."""
    here = str(ROOT / "course" / "grading" / "grade.py")
    source = f"import os\nseen = os.path.exists({here!r})\nnetwork = len(os.listdir('/sys/class/net')) if os.path.isdir('/sys/class/net') else 0"
    assert opened(source, "seen", "network") == {"seen": False, "network": 0}
    assert opened(source, "seen", "network", namespaces=False)["network"] > 0


@needs_namespaces
def test_a_course_in_tmp_has_its_package(tmp_path) -> None:
    """The answer's own /tmp must not cover a clone that lies in there."""
    shutil.copytree(ROOT / "course", tmp_path / "course", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "minimind").mkdir()
    (tmp_path / "minimind" / "__init__.py").write_text("here = 5")
    code = "from course.grading.sandbox import *\ns = Server.start()\n" \
           "b = Sandbox(s, [{'name': 'a', 'source': 'from minimind import here', 'answer': True, " \
           "'names': ['here']}], Limits()); print(b.open()); b.close(); s.stop()"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert "{'here': 5}" in done.stdout, done.stderr


# --- what a graded notebook takes from an answer


def test_the_check_says_whether_an_answer_may_change_what_it_is_given(tmp_path, monkeypatch) -> None:
    """Not the notebook's metadata, which come from a student's hands as often as not."""
    master = Master.read(toy.write_master(tmp_path))
    master.exercises["total"].facts["in_place"] = True
    for allowed in ([], ["repeat"]):
        found = {name: core.Check(name, print, (), (), name in allowed) for name in toy.STUBS}
        monkeypatch.setitem(core.REGISTERED, "course.checks.attention", found)
        monkeypatch.setattr(master, "name", "04_attention")
        made = graded.build(master, Submission(tmp_path, "Ada", {}, {}), {}, "", Limits().plain())
        settings = json.loads(eval(made["notebook"]["cells"][0]["source"].partition("begin(")[2][:-1]))
        assert [name for name, told in settings["exercises"].items() if told["in_place"]] == allowed


def test_only_asked_for_names_reach_the_checks(tmp_path) -> None:
    """An answer that defines `check`, `torch` or `canary` defines them for itself: the notebook takes what the stub asks for."""
    master = Master.read(toy.write_master(tmp_path))
    assert {name: e.names for name, e in master.exercises.items()} == {name: [name] for name in toy.STUBS}
    submission = Submission(tmp_path, "Ada", {"repeat": "# NBVAL_SKIP\n  # NBVAL_RAISES_EXCEPTION\ncheck = torch = None"}, {})
    made = graded.build(master, submission, {}, "", Limits().plain())
    settings = json.loads(eval(made["notebook"]["cells"][0]["source"].partition("begin(")[2][:-1]))
    assert settings["exercises"]["repeat"]["names"] == ["repeat"]
    cell = next(c for c in made["notebook"]["cells"] if c["source"].startswith("%%answer repeat"))
    assert "NBVAL_" not in cell["source"]
    roles = [row["role"] for row in made["plan"]]
    assert roles.count("canary") == 4 and roles.count("check") == roles.count("answer") == len(toy.STUBS)
