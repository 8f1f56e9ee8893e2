"""Run answers as untrusted code, and use what they define from here as if it were here.

`Sandbox.open(...)` runs cells in a confined process and gives, for every name that they define, plain data or a stand-in (`Remote`): calling it
sends the arguments over, and what comes back is data. The check and its verdict stay in this process, where no answer ever runs.

    python -m course.grading.sandbox      says which protection is on
"""

from __future__ import annotations

import array
import builtins
import collections
import dataclasses
import importlib
import inspect
import io
import json
import keyword
import operator
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy
import torch
from torch import nn

from course.grading import objects
from course.grading.confine import Limits
from course.grading.wire import Channel, Closed, Decoder, Encoder, TooLate, WireError

ROOT = Path(__file__).resolve().parents[2]
SERVER = "MINIMIND_SANDBOX"  # names the socket of a server that is already there
BY_NAME = ("torch", "numpy", "minimind", "math", "builtins", "collections", "random", "types", "pathlib", "datetime", "decimal", "fractions",
           "functools", "itertools", "operator", "string", "tokenizers", "tiktoken")  # fmt: skip
PROTOCOLS = {"iter": iter, "next": next, "len": len, "getitem": operator.getitem, "contains": operator.contains, "enter": lambda v: v.__enter__(),
             "exit": lambda v, *_: bool(v.__exit__(None, None, None)), "call": lambda v, *args, **kwargs: v(*args, **kwargs)}  # fmt: skip
PLAIN = (bool, int, float, str, bytes, list, tuple, dict, set, frozenset, torch.dtype, torch.device)
CALLBACKS = 100_000  # calls back in one exercise


class AnswerFailed(Exception):
    """The answer could not be run, or its process ended; the text says why."""


class NotDefined:
    """Stands for a name that the answer does not define."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __repr__(self) -> str:
        return f"nothing: your cell does not define {self.__name__}"

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"the answer does not define {self.__name__}")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotImplementedError(f"the answer does not define {self.__name__}")


class Server:
    """The process that forks sandboxes: a running one, or one of our own."""

    def __init__(self, path: str, process: subprocess.Popen | None = None, folder: str | None = None) -> None:
        self.path, self.process, self.folder = path, process, folder

    @classmethod
    def start(cls, first: str = "") -> Server:
        """Start a server; it ends with this process. `first` is code that it runs before, for tests."""
        if not hasattr(os, "fork"):
            raise RuntimeError("answers can be run apart only on Linux and macOS; on Windows use WSL")
        folder = tempfile.mkdtemp(prefix="grade-")
        path = os.path.join(folder, "s")
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                       "OPENBLAS_NUM_THREADS": "1", "LANG": "C.UTF-8", "MPLBACKEND": "agg", "PYTHONDONTWRITEBYTECODE": "1",
                       "HOME": os.path.expanduser("~")}  # fmt: skip  (matplotlib keeps what it knows about fonts there)
        code = f"{first}\nimport sys\nfrom course.grading.worker import main\nmain(sys.argv[1])"
        process = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, cwd=folder, env=environment, start_new_session=True)
        deadline = time.monotonic() + 300  # a cold disk and a busy machine
        while not os.path.exists(path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server of the sandboxes did not start")
            time.sleep(0.02)
        return cls(path, process, folder)

    @classmethod
    def find(cls) -> Server:
        """The server that the environment names, else a new one."""
        path = os.environ.get(SERVER)
        return cls(path) if path and os.path.exists(path) else cls.start()

    def connect(self) -> socket.socket:
        control = socket.socket(socket.AF_UNIX)
        for _ in range(100):
            try:
                control.connect(self.path)
                return control
            except (ConnectionRefusedError, BlockingIOError):  # between bind and listen
                time.sleep(0.05)
        raise RuntimeError("the server of the sandboxes does not answer")

    def stop(self) -> None:
        if self.process:
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)


class Sandbox:
    """One confined process, from this side."""

    def __init__(self, server: Server, cells: list[dict], limits: Limits, hide: dict | None = None, namespaces: bool = True,
                 in_place: bool = False, give: dict | None = None) -> None:  # fmt: skip
        """`cells` are {"name", "source", "answer", "names"}: the last one is the answer itself, and its names are handed out.

        `give` has names of the course's own that stand there from the start, with their modules; `hide` what the package does not show.
        """
        self.limits, self.callbacks, self.number = limits, {}, 0
        self.in_place, self.odd = in_place, set()
        self.left = limits.wall_seconds  # of waiting for this process
        self.control = server.connect()
        here, there = socket.socketpair()
        job = {"cells": cells, "limits": limits.plain(), "hide": hide or {}, "give": give or {}, "namespaces": namespaces, "in_place": in_place}
        job = json.dumps(job).encode()
        self.control.sendmsg([len(job).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [there.fileno()]))])
        self.control.sendall(job)
        there.close()
        self.channel = Channel(here)
        self.lines = self.control.makefile("r")
        self.control.settimeout(60)
        self.protection = json.loads(self.lines.readline() or '{"protection": "not started"}')["protection"]
        self.ended: str | None = None
        self.peak = 0

    def open(self) -> dict[str, object]:
        """What the answer's own cell defined. Raises AnswerFailed."""
        reply, _ = self.receive()
        return reply

    def close(self) -> None:
        """End the process."""
        if self.ended is None:
            self.finish("stopped by the grader")
        self.channel.close()
        self.lines.close()
        self.control.close()

    def finish(self, reason: str | None = None) -> str:
        """How the process ended; it is ended when it has not."""
        if self.ended is None:
            try:
                if reason:
                    self.control.sendall(b"stop")
                self.control.settimeout(10)
                told = json.loads(self.lines.readline() or "{}")
                self.ended, self.peak = reason or told.get("ended", "ended"), told.get("peak", 0)
            except (OSError, ValueError):
                self.ended = reason or "lost"
        return self.ended

    # talking

    def send(self, message: dict, buffers: list[bytes]) -> None:
        if self.ended:
            raise AnswerFailed(self.why(self.ended))
        begun = time.monotonic()
        try:
            self.channel.send(message, buffers, begun + self.left)
        except TooLate:
            raise AnswerFailed(self.why(self.finish(f"time: more than {self.limits.wall_seconds:g} seconds"))) from None
        except Closed:
            raise AnswerFailed(self.why(self.finish())) from None
        finally:
            self.left -= time.monotonic() - begun

    @staticmethod
    def why(reason: str) -> str:
        """What to tell the student about how the process ended."""
        return "this answer ends the whole process" if reason == "ended itself" else f"the process of this answer was ended ({reason})"

    def receive(self, sent: Sent | None = None) -> tuple[object, dict]:
        """The next reply, decoded; calls back are served in between."""
        while True:
            if self.ended:
                raise AnswerFailed(self.why(self.ended))
            try:
                begun = time.monotonic()
                try:
                    message, buffers = self.channel.receive(begun + self.left)
                finally:
                    self.left -= time.monotonic() - begun
                if type(message) is not dict:
                    raise WireError("not a message of the worker")
                if message.get("op") in ("callback", "attribute"):
                    self.number += 1
                    if self.number > CALLBACKS:
                        raise WireError("too many calls back")
                    self.called_back(message, buffers)
                    continue
                if "error" in message:
                    self.changes(message, buffers, sent)
                    raise remote_error(message["error"])
                return self.decode_reply(message, buffers, sent), message
            except TooLate:
                raise AnswerFailed(self.why(self.finish(f"time: more than {self.limits.wall_seconds:g} seconds"))) from None
            except Closed:
                raise AnswerFailed(self.why(self.finish())) from None
            except WireError as error:
                raise AnswerFailed(self.why(self.finish(f"it sent what is not a value: {error}"))) from None

    def decode_reply(self, message: dict, buffers: list[bytes], sent: Sent | None = None) -> object:
        try:
            return self._decode_reply(message, buffers, sent)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            if isinstance(error, WireError):
                raise
            raise WireError(error.__class__.__name__) from None

    def _decode_reply(self, message: dict, buffers: list[bytes], sent: Sent | None) -> object:
        live = message.get("live", [])
        plain = Decoder(buffers, lambda code: self.rebuild(plain, code, []))
        tensors = [plain(code) for code in live] if type(live) is list else []
        if not all(isinstance(t, torch.Tensor) for t in tensors):
            raise WireError("no tensor")
        if tensors and torch.is_grad_enabled():
            leaves = sent.leaves() if sent else []
            dummy = torch.zeros((), requires_grad=True)
            tensors = list(_Bridge.apply(self, message.get("graph"), tensors, message.get("kept"), dummy, *leaves))
        decoder = Decoder(buffers, lambda code: self.rebuild(decoder, code, tensors, sent))
        value = decoder(message.get("ok"))
        self.changes(message, buffers, sent, tensors)
        return value

    def changes(self, message: dict, buffers: list[bytes], sent: Sent | None, tensors: list = ()) -> None:
        """Make the changes that an answer made to what it was given, where its exercise allows it; else only note them."""
        if sent and type(message.get("changed")) is dict:
            decoder = Decoder(buffers, lambda code: self.rebuild(decoder, code, tensors, sent))
            if sent.apply(message["changed"], decoder, self.in_place):
                self.odd.add("changes its arguments in place")

    def rebuild(self, decoder: Decoder, code: list, tensors: list, sent: Sent | None = None) -> object:
        kind = code[0]
        if kind in ("argument", "tensor argument") and sent and self.in_place:
            found = (sent.objects if kind == "argument" else sent.tensors)[code[1]]
            if type(code[1]) is not int or code[1] < 0:
                raise WireError("no argument")
            return found
        if kind == "data":
            return _dataclass(code[1], code[2], [[name, decoder(part)] for name, part in code[3]])
        if kind == "parameter":
            return nn.Parameter(decoder(code[1]), requires_grad=bool(code[2]))
        if kind == "live":
            return tensors[code[1]]
        if kind == "named":
            _, name, fields, values = code
            if not all(type(f) is str and f.isidentifier() and not keyword.iskeyword(f) and not f.startswith("_") for f in fields):
                raise WireError("no field names")
            return collections.namedtuple("Answer", fields)(*[decoder(v) for v in values])
        if kind == "generator":
            generator = torch.Generator()
            generator.set_state(decoder(code[1]))
            return generator
        if kind == "yours":
            value = self.callbacks[code[1]]
            for part in code[2]:
                value = public(value, part)
            return value
        if kind == "remote":
            return self.stand_in(decoder, code[1], code[2])
        raise WireError("unknown value")

    def stand_in(self, decoder: Decoder, handle: int, told: dict) -> object:
        if type(handle) is not int or type(told) is not dict:
            raise WireError("no handle")
        kind = told.get("kind")
        if kind == "module":
            return _mirror(self, decoder, handle, told)
        return {"class": RemoteClass, "function": RemoteFunction}.get(kind, Remote)(self, handle, told)

    def called_back(self, message: dict, buffers: list[bytes]) -> None:
        """An answer calls a function of the check. Only what was handed to it can be called, and only public names of it."""
        try:
            value = self.callbacks[message["target"]]
            for part in message["path"]:
                value = public(value, part)
            if message["op"] == "attribute":
                if callable(value) and not isinstance(value, (torch.Tensor, nn.Module)):
                    self.send({"ok": None, "callable": True}, [])
                    return
            else:
                live = message.get("live", [])
                tensors = [Decoder(buffers, lambda c: self.rebuild(None, c, []))(code) for code in live]
                decoder = Decoder(buffers, lambda code: self.rebuild(decoder, code, tensors))
                args, kwargs = decoder(message["args"]), decoder(message["kwargs"])
                if type(args) is not list or type(kwargs) is not dict or not all(type(k) is str for k in kwargs):
                    raise WireError("no arguments")
                value = PROTOCOLS[message["how"]](value, *args, **kwargs)
            encoder = self.encoder(Sent())
            self.send({"ok": encoder.whole(value)}, encoder.buffers)
        except (AnswerFailed, WireError):
            raise
        except Exception as error:
            self.send({"error": type(error).__name__, "text": str(error)[:2000]}, [])

    def encoder(self, sent: Sent) -> Encoder:
        return _Sender(self, sent)

    def request(self, operation: str, target: list, *args, kwargs: dict | None = None, owner: Mirror | None = None) -> object:
        """One operation on something of the answer."""
        sent = Sent()
        encoder = self.encoder(sent)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        environment = {
            "grad": torch.is_grad_enabled(), "dtype": encoder(torch.get_default_dtype()), "autocast": encoder(autocast),
            "rng": ["tensor", *encoder.tensor(torch.get_rng_state())], "watched": _hooks_are_set(),
        }  # fmt: skip
        message = {
            "op": operation, "env": environment, "owner": owner.encode(encoder) if owner is not None else None,
            "target": target(encoder) if callable(target) else target, "given": encoder.whole([list(args), dict(kwargs or {})]),
        }  # fmt: skip
        sent.objects = objects.listed([list(args), dict(kwargs or {})], closed=sent.closed)
        self.send(message, encoder.buffers)
        return self.answer_to(sent)

    def answer_to(self, sent: Sent) -> object:
        value, _ = self.receive(sent)
        if type(value) is not list or len(value) != 2:
            raise AnswerFailed(self.why(self.finish("it sent what is not a value")))
        value, random = value
        if random is True:  # it used random numbers: ours go on too, but by one step of our own, so that an answer cannot choose them
            torch.rand(())
        return value

    def gradients(self, graph: int, grads: list) -> list:
        encoder = self.encoder(Sent())
        self.send({"op": "vjp", "graph": graph, "grads": encoder(list(grads))}, encoder.buffers)
        value, _ = self.receive()
        return value


def _hooks_are_set() -> bool:
    """Whether a check looks at what autograd keeps (torch.autograd.graph.saved_tensors_hooks)."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return bool(top and top(True))


def public(value: object, name: object) -> object:
    """An attribute that an answer may reach on something that a check handed to it."""
    if type(name) is not str or name.startswith("_") or inspect.ismodule(value):
        raise AttributeError(str(name)[:100])
    found = getattr(value, name)
    if inspect.ismodule(found) or name in ("f_globals", "gi_frame", "tb_frame", "cr_frame"):
        raise AttributeError(name)
    return found


def remote_error(told: object) -> Exception:
    """The exception that an answer raised: its own type where that is a built-in one."""
    if type(told) is not dict:
        return AnswerFailed("an error without a text")
    text, where = str(told.get("text", ""))[:4000], str(told.get("where", ""))[:300]
    for name in told.get("kinds", []) if type(told.get("kinds")) is list else []:
        kind = getattr(builtins, name, None) if type(name) is str else None
        if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (Exception, StopIteration, StopAsyncIteration):
            try:
                error = kind(text)
            except TypeError:  # UnicodeDecodeError wants five arguments
                continue
            break
    else:
        error = RuntimeError(f"{str(told.get('type'))[:100]}: {text}")
    error.answer_type, error.answer_line = str(told.get("type"))[:100], where
    if where and not isinstance(error, NotImplementedError):
        error.add_note(f"in the answer, {where}")
    return error


class Sent:
    """What went over with one call, so that gradients and changes in place find the way back."""

    def __init__(self) -> None:
        self.tensors, self.boxes, self.generators, self.own_buffers = [], [], [], set()
        self.objects, self.closed = [], set()

    def leaves(self) -> list:
        return [t for t in self.tensors if t.requires_grad]

    def apply(self, changed: dict, decoder: Decoder, in_place: bool) -> bool:
        """Make the changes in place that the answer made to its arguments; True where some were left out.

        Only exercises that ask for it may change what a check computes with: an answer that sets its input to zero, and returns zeros, would
        otherwise look right to a check that computes the expected result afterwards. Buffers of the answer's own modules always follow.
        """
        left_out = False
        for index, code in _pairs(changed.get("tensors"), len(self.tensors)):
            target = self.tensors[index]
            if not in_place and id(target) not in self.own_buffers:
                target.changed_by_answer = left_out = True  # for checks that forbid it
                continue
            new = decoder(code)
            if isinstance(new, torch.Tensor) and new.shape == target.shape:
                with torch.no_grad():
                    target.copy_(new)
        for index, code in _pairs(changed.get("grads"), len(self.tensors)) if in_place else ():
            target, new = self.tensors[index], decoder(code)
            if new is None or (isinstance(new, torch.Tensor) and new.shape == target.shape):
                target.grad = None if new is None else new.to(target.dtype)
        for index, on in _pairs(changed.get("trained"), len(self.tensors)) if in_place else ():
            if self.tensors[index].is_leaf and self.tensors[index].is_floating_point():
                self.tensors[index].requires_grad_(on is True)
        for index, code in _pairs(changed.get("objects"), len(self.objects)):
            if not in_place and not isinstance(self.objects[index], random.Random):
                left_out = left_out or not objects.stateful(self.objects[index])
                continue
            try:
                objects.made(self.objects[index], code, decoder)
            except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
                raise WireError(f"a change that cannot be made ({type(error).__name__})") from None
        for generator, code in zip(self.generators, changed.get("generators") or []):
            try:
                generator.set_state(decoder(code))
            except (RuntimeError, TypeError):
                pass
        return left_out


def _pairs(value: object, count: int) -> list:
    if type(value) is not list:
        return []
    return [p for p in value if type(p) is list and len(p) == 2 and type(p[0]) is int and 0 <= p[0] < count]


class _Together(Exception):
    """A value has parts whose identity matters: it is sent as a whole."""


class _Sender(Encoder):
    """Values that go to an answer."""

    def __init__(self, sandbox: Sandbox, sent: Sent) -> None:
        super().__init__(self.rest)
        self.sandbox, self.sent = sandbox, sent

    def whole(self, value) -> list:
        """A value, and where its parts refer to each other, or may be changed, all of it at once (pickled, which is safe in this direction)."""
        sent, before = self.sent, (len(self.buffers), len(self.sent.tensors), len(self.sent.generators))
        try:
            if self.sandbox.in_place:
                raise _Together
            return self(value)
        except _Together:
            del self.buffers[before[0] :], sent.tensors[before[1] :], sent.generators[before[2] :]
        file = io.BytesIO()
        _Pickler(file, self).dump(value)
        return ["together", self.buffer(file.getvalue())]

    def __call__(self, value, depth=0):
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            if isinstance(value, nn.Parameter) or (value.is_leaf and value.grad is not None):
                raise _Together
            self.sent.tensors.append(value)
            return ["leaf", bool(value.requires_grad), ["tensor", *self.tensor(value)]]
        return super().__call__(value, depth)

    def rest(self, value):
        if isinstance(value, Remote):
            return ["mine", value._handle]
        if isinstance(value, Mirror):
            return value.encode(self)
        if isinstance(value, torch.Generator):
            self.sent.generators.append(value)
            return ["generator", ["tensor", *self.tensor(value.get_state())]]
        if isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":  # a memory-mapped array, for example
            return self(numpy.asarray(value))
        name = by_name(value)
        if name:
            return ["name", *name]
        if type(value) is not bool and isinstance(value, (nn.Module, types.SimpleNamespace, tuple, dict)) or travels(value):
            raise _Together
        for kind in (int, float, str):
            if isinstance(value, kind):
                return self(kind(value))
        return ["callback", self.callback(value)]

    def callback(self, value) -> int:
        for handle, known in self.sandbox.callbacks.items():
            if known is value:
                return handle
        handle = len(self.sandbox.callbacks) + 1
        self.sandbox.callbacks[handle] = value
        return handle


def travels(value: object) -> bool:
    """Objects that go over as copies: of a class that the other process can import, or a dataclass."""
    kind = type(value)
    if kind.__module__ == "builtins" or callable(value) and not isinstance(value, nn.Module):
        return False
    return bool(by_name(kind)) or dataclasses.is_dataclass(kind)


def _dataclass(module: object, name: object, fields: list) -> object:
    """A dataclass of the course's package, with what an answer put into its fields."""
    if type(module) is not str or type(name) is not str or not module.startswith("minimind."):
        raise WireError("no dataclass")
    kind = getattr(sys.modules.get(module), name, None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module):
        raise WireError("no dataclass")
    if [each for each, _ in fields] != [field.name for field in dataclasses.fields(kind)]:
        raise WireError("not its fields")
    made = object.__new__(kind)
    for each, value in fields:
        object.__setattr__(made, each, value)
    return made


def by_name(value: object) -> list | None:
    """Where the other process can import this function or class from."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not (callable(value) and type(module) is str and type(name) is str and module.partition(".")[0] in BY_NAME):
        return None
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return [module, name] if found is value else None


class _Pickler(pickle.Pickler):
    """A value as a whole. Tensors go as raw bytes, functions of the check stay here, and a module of a class of the check becomes one of the
    nearest class that the other process can import."""

    def __init__(self, file, sender: _Sender) -> None:
        super().__init__(file, protocol=4)
        self.sender, self.numbers, self.kept = sender, {}, []

    def persistent_id(self, value):
        kind = type(value)
        if value is None or value is ... or isinstance(value, PLAIN):
            return None
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, (Remote, Mirror, torch.Generator)):
            if id(value) in self.numbers:
                return ("known code", self.numbers[id(value)])
            code = self.sender.rest(value)
            return ("code", self.number(value), code)
        if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinMethodType, type)):
            return None if by_name(value) else ("callback", self.sender.callback(value))
        if isinstance(value, (nn.Module, numpy.ndarray, numpy.generic)) or objects.stateful(value) or kind.__module__ == "builtins" and by_name(kind):
            return None
        if by_name(kind) or kind.__module__ in ("_random", "numpy.random._pickle"):
            return None
        if dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
            if id(value) in self.numbers:
                return ("known data", self.numbers[id(value)])
            return ("data", self.number(value), kind.__name__, vars(value))
        return ("callback", self.sender.callback(value))

    def number(self, value) -> int:
        self.kept.append(value)
        self.numbers[id(value)] = len(self.kept) - 1
        return len(self.kept) - 1

    def tensor(self, value):
        sent = self.sender.sent
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            return ("code", self.number(value), Encoder.__call__(self.sender, value))
        if id(value) in self.numbers:
            return ("known tensor", self.numbers[id(value)])
        self.numbers[id(value)] = len(sent.tensors)
        sent.tensors.append(value)
        grad = value.grad if value.is_leaf else None
        return ("tensor", ["tensor", *self.sender.tensor(value)], bool(value.requires_grad), isinstance(value, nn.Parameter),
                None if grad is None else ["tensor", *self.sender.tensor(grad)])  # fmt: skip

    def reducer_override(self, value):
        if isinstance(value, nn.Module) and not by_name(type(value)):
            base = next(b for b in type(value).__mro__ if by_name(b))
            return base.__new__, (base,), value.__dict__
        for plain in (int, float, str, tuple, list, dict):
            if isinstance(value, plain) and not by_name(type(value)):
                return plain, (plain(value),)
        if isinstance(value, numpy.memmap):
            return numpy.asarray(value).__reduce_ex__(4)
        return NotImplemented


class _Bridge(torch.autograd.Function):
    """Lets gradients flow through a call to the other process."""

    @staticmethod
    def forward(ctx, sandbox, graph, tensors, kept, dummy, *leaves):
        ctx.sandbox, ctx.graph, ctx.count = sandbox, graph, len(leaves)
        ctx.shapes = [leaf.shape for leaf in leaves]
        made = tuple(t.clone() for t in tensors)
        if type(kept) is list and len(kept) < 1000 and all(type(n) is int and 0 <= n <= 2**28 for n in kept):
            ctx.save_for_backward(*[torch.empty(n) for n in kept])  # what it keeps over there, for checks that look at it; never touched
        ctx.mark_non_differentiable(*[t for t in made if not (t.is_floating_point() or t.is_complex())])
        return made

    @staticmethod
    def backward(ctx, *grads):
        found = ctx.sandbox.gradients(ctx.graph, list(grads))
        if type(found) is not list or len(found) != ctx.count:
            raise AnswerFailed("the answer gave no gradients")
        found = [g if isinstance(g, torch.Tensor) and g.shape == s else None for g, s in zip(found, ctx.shapes)]
        return None, None, None, None, None, *found


class Remote:
    """Something of the answer that is no plain data. It equals nothing but itself, so it cannot lie about being right."""

    def __init__(self, sandbox: Sandbox, handle: int, told: dict) -> None:
        self.__dict__.update(_sandbox=sandbox, _handle=handle, _told=told)

    def _do(self, operation, *args, kwargs=None):
        return self._sandbox.request(operation, ["mine", self._handle], *args, kwargs=kwargs)

    def __call__(self, *args, **kwargs):
        return self._do("call", *args, kwargs=kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(f"{self!r} has no attribute {name!r} here")
        return self._do("getattr", name)

    def __setattr__(self, name, value):
        self._do("setattr", name, value)

    def __getitem__(self, key):
        return self._do("getitem", key)

    def __setitem__(self, key, value):
        self._do("setitem", key, value)

    def __len__(self):
        return _exact(self._do("len"), int)

    def __bool__(self):
        return _exact(self._do("bool"), bool)

    def __contains__(self, value):
        return _exact(self._do("contains", value), bool)

    def __iter__(self):
        iterator = self._do("iter")
        if not isinstance(iterator, Remote):
            raise TypeError(f"{self!r} gives no iterator")
        while True:
            step = iterator._do("next")
            if not step:
                return
            yield step[0]

    def __next__(self):
        step = self._do("next")
        if not step:
            raise StopIteration
        return step[0]

    def __enter__(self):
        return self._do("enter")

    def __exit__(self, *_):
        self._do("exit")
        return False

    def __repr__(self):
        return f"<{str(self._told.get('type'))[:60]} of the answer>"


class RemoteFunction(Remote):
    """A function of the answer."""

    def __init__(self, sandbox, handle, told) -> None:
        super().__init__(sandbox, handle, told)
        parameters = []
        for row in told.get("parameters") or []:
            try:
                name, kind, optional = row
                default = None if optional else inspect.Parameter.empty
                parameters.append(inspect.Parameter(name, inspect._ParameterKind(kind), default=default))
            except (ValueError, TypeError):
                continue
        try:
            signature = inspect.Signature(parameters) if "parameters" in told else None
        except ValueError:
            signature = None
        name = str(told.get("name") or told.get("type"))[:100]
        self.__dict__.update(__name__=name, __qualname__=name, __doc__=str(told.get("doc", ""))[:4000], __module__="answer")
        if signature:
            self.__dict__["__signature__"] = signature

    def __get__(self, instance, owner=None):
        """Bound like a function when a check puts it into a class."""
        if instance is None:
            return self
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __repr__(self):
        return f"<{self.__name__} of the answer>"


class RemoteClass(RemoteFunction):
    """A class of the answer."""

    @property
    def __bases__(self):
        found = []
        for name in self._told.get("bases") or []:
            module, _, last = str(name).rpartition(".")
            if module.partition(".")[0] in BY_NAME:
                found.append(getattr(sys.modules.get(module), last, None))
        return tuple(b for b in found if isinstance(b, type)) or (object,)

    def __instancecheck__(self, value):
        if isinstance(value, Mirror):
            return _exact(self._sandbox.request("isinstance", value.encode, self), bool)
        return isinstance(value, Remote) and _exact(value._do("isinstance", self), bool)

    def __get__(self, instance, owner=None):
        return self


def _exact(value: object, kind: type) -> object:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__} from the answer")
    return value


class Mirror(nn.Module):
    """A torch module of the answer: its parameters and buffers are here, its code is there. Calls send the numbers along."""

    def __init__(self, sandbox: Sandbox, root: Mirror | None, handle: int, kind: str) -> None:
        super().__init__()
        object.__setattr__(self, "_remote", (sandbox, root or self, handle, kind))

    def _get_name(self):
        return self._remote[3]

    def encode(self, encoder: _Sender) -> list:
        """This module as an argument: the handle, and what the numbers of its whole tree are now."""
        _, _, handle, _ = self._remote
        rows, seen = [], set()
        encoder.sent.closed.add(id(self))
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            encoder.sent.tensors.append(tensor)
            if not isinstance(tensor, nn.Parameter):
                encoder.sent.own_buffers.add(id(tensor))
            rows.append([name, ["tensor", *encoder.tensor(tensor)], bool(tensor.requires_grad)])
        return ["module", handle, rows, [[name, module.training] for name, module in self.named_modules() if isinstance(module, Mirror)]]

    def forward(self, *args, **kwargs):
        return self._remote[0].request("call", self.encode, *args, kwargs=kwargs)

    def __getitem__(self, key):
        if type(key) is int and list(self._modules) == [str(number) for number in range(len(self._modules))]:  # a Sequential or ModuleList
            return list(self._modules.values())[key]
        return self._remote[0].request("getitem", self.encode, key)

    def __len__(self):
        return _exact(self._remote[0].request("len", self.encode), int)

    def __bool__(self):
        return True

    def __iter__(self):
        return iter([self[number] for number in range(len(self))])

    def __deepcopy__(self, memo):
        """A copy is made over there, and mirrored."""
        return self._remote[0].request("copy", self.encode)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_remote" not in self.__dict__:
                raise
        sandbox = self._remote[0]
        value = sandbox.request("getattr", self.encode, name)
        if isinstance(value, RemoteFunction) and not isinstance(value, RemoteClass):
            return lambda *args, **kwargs: sandbox.request("call", ["mine", value._handle], *args, kwargs=kwargs, owner=self)
        return value


def _mirror(sandbox: Sandbox, decoder: Decoder, handle: int, told: dict) -> Mirror:
    """Build the mirror of a module from what was told about it."""
    modules: dict[str, Mirror] = {}
    for name, number, kind in told["tree"]:
        if type(number) is not int or type(name) is not str:
            raise WireError("no module")
        made = modules[name] = Mirror(sandbox, modules.get(""), handle if name == "" else number, str(kind)[:100])
        if name:
            parent, _, last = name.rpartition(".")
            modules[parent]._modules[last] = made  # add_module would ask the other process for the name
    tensors = {}
    for kind, name, alias, code, requires_grad in told["state"]:
        owner, _, last = name.rpartition(".")
        if alias is not None:
            tensor = tensors[alias]
        else:
            tensor = decoder(code)
            if kind == "parameter":
                tensor = nn.Parameter(tensor, requires_grad=bool(requires_grad) and tensor.is_floating_point())
        tensors[name] = tensor
        if not isinstance(tensor, torch.Tensor):
            raise WireError("no tensor")
        if kind == "passing":  # a buffer that stands in no state_dict
            modules[owner]._non_persistent_buffers_set.add(last)
        (modules[owner]._parameters if kind == "parameter" else modules[owner]._buffers)[last] = tensor
    return modules[""]


def protection() -> dict:
    """Which protection this machine allows, measured by trying it."""
    here, port = str(ROOT / "course" / "grading" / "sandbox.py"), _listening()
    probe = f"""
import os, socket
def look():
    processes = len([p for p in os.listdir("/proc") if p.isdigit()])
    seen = {{"files": os.path.exists({here!r}), "network": True, "processes": processes}}
    try:
        socket.create_connection(("127.0.0.1", {port}), 1).close()
    except OSError:
        seen["network"] = False
    return seen
"""
    server = Server.start()
    try:
        sandbox = Sandbox(server, [{"name": "probe", "source": probe, "answer": True, "names": ["look"]}], Limits(wall_seconds=30))
        seen = sandbox.open()["look"]()
        sandbox.close()
    finally:
        server.stop()
    return {"way": sandbox.protection, "course hidden": not seen["files"], "network off": not seen["network"], "processes seen": seen["processes"],
            "another user": "another user" in sandbox.protection}  # fmt: skip


_listener: socket.socket | None = None


def _listening() -> int:
    """A port on this machine that answers, so that "no network" is a measurement."""
    global _listener
    if _listener is None:
        _listener = socket.create_server(("127.0.0.1", 0))
    return _listener.getsockname()[1]


if __name__ == "__main__":
    for key, value in protection().items():
        print(f"{key:15} {value}")
