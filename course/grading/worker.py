"""The side of the answers: a server that has loaded torch once and forks a confined process for each exercise.

    python -m course.grading.worker SOCKET

The server itself never runs an answer. For each connection it forks a keeper, which forks the process that is shut in (course/grading/confine.py) and
watches its memory; the keeper says on the connection how that process ended. The answer's process talks to the grader over a socket of its own
and can send nothing but values (course/grading/wire.py): whether a value is right is decided elsewhere.
"""

from __future__ import annotations

import array
import ast
import builtins
import contextlib
import copy
import dataclasses
import importlib
import inspect
import io
import json
import linecache
import os
import pickle
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

from course.grading import confine, objects, syscalls
from course.grading.meter import Meter
from course.grading.wire import Channel, Closed, Decoder, Encoder, WireError

ROOT = Path(__file__).resolve().parents[2]
TEXT = 4000  # characters of a message or a traceback that are kept
IMPORTABLE = ("torch", "numpy", "minimind", "math", "builtins", "collections", "tokenizers")


# --- the process of the answer ------------------------------------------------------------------------------------------------------------------


class Nothing:
    """What `check`, `keep`, `display` and the like are in here: they do nothing. The grader checks by itself."""

    def __call__(self, *args, **kwargs):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __iter__(self):
        return iter(())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def __repr__(self):
        return "nothing"


class QuietModule(types.ModuleType):
    """The tools of the course, which are not here."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class QuietFinder:
    """Makes `import course` and all below it give a QuietModule."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "course" or name.startswith("course."):
            return importlib.machinery.ModuleSpec(name, QuietFinder, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return QuietModule(spec.name)

    @staticmethod
    def exec_module(module):
        return None


class Callback:
    """A function or an object of the grader that an answer got as an argument; it runs over there."""

    def __init__(self, worker, handle, path=()):
        self.__dict__.update(_worker=worker, _handle=handle, _path=path)

    def __call__(self, *args, **kwargs):
        return self._worker.callback(self._handle, self._path, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self._worker.callback_attribute(self, name)

    def _protocol(self, how, *args):
        return self._worker.callback(self._handle, self._path, args, {}, how)

    def __iter__(self):
        return self._protocol("iter")

    def __next__(self):
        return self._protocol("next")

    def __len__(self):
        return self._protocol("len")

    def __bool__(self):
        return True

    def __getitem__(self, key):
        return self._protocol("getitem", key)

    def __contains__(self, value):
        return self._protocol("contains", value)

    def __enter__(self):
        return self._protocol("enter")

    def __exit__(self, *_):
        return self._protocol("exit")


class AnswerError(Exception):
    """An exception of the grader's side, raised again in the answer that called back."""


class LiveEncoder(Encoder):
    """Tensors that carry a gradient go out as numbers, and are remembered for the way back."""

    def __init__(self, worker) -> None:
        super().__init__(lambda value: worker.other(self, value))
        self.live, self.known = [], {}

    def __call__(self, value, depth=0):
        import torch

        if id(value) in self.known:
            return list(self.known[id(value)])
        if isinstance(value, torch.nn.Parameter):
            return ["parameter", ["tensor", *self.tensor(value)], bool(value.requires_grad)]
        if isinstance(value, torch.Tensor):
            value = value.as_subclass(torch.Tensor) if type(value) is not torch.Tensor else value
            if value.requires_grad:
                self.live.append(value)
                return ["live", len(self.live) - 1]
        return super().__call__(value, depth)


class Worker:
    """Runs cells, then serves calls on what they defined."""

    def __init__(self, channel: Channel, in_place: bool = False) -> None:
        self.in_place = in_place
        self.channel, self.objects, self.graphs, self.number = channel, {}, {}, 0
        self.space = types.ModuleType("__main__")
        sys.modules["__main__"] = self.space
        quiet = Nothing()
        self.space.__dict__.update(get_ipython=lambda: quiet, display=quiet, check=quiet, keep=quiet)

    # values out

    def keep(self, value: object) -> int:
        self.number += 1
        self.objects[self.number] = value
        return self.number

    def encoder(self) -> Encoder:
        return LiveEncoder(self)

    def other(self, encoder, value):
        """Subclasses of plain types become plain; everything else stays here and a handle goes out."""
        import numpy
        import torch

        if isinstance(value, Callback):
            return ["yours", value._handle, list(value._path)]
        for kind in (bool, int, float, complex, str, bytes):
            if isinstance(value, kind):
                return encoder(kind.__new__(kind, value) if kind is not str else str.__str__(value) + "")
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return ["named", type(value).__name__, list(value._fields), [encoder(v) for v in value]]
        for kind in (tuple, list, set, frozenset):
            if isinstance(value, kind):
                return [kind.__name__, [encoder(v) for v in kind(value)]]
        if isinstance(value, dict):
            return ["dict", [[encoder(k), encoder(v)] for k, v in dict(value).items()]]
        if isinstance(value, torch.Generator):
            return ["generator", encoder(value.get_state())]
        if isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
            return encoder(numpy.asarray(value).view(numpy.ndarray))
        kind = type(value)
        if dataclasses.is_dataclass(kind) and kind.__module__.startswith("minimind.") and hasattr(sys.modules.get(kind.__module__), kind.__name__):
            return ["data", kind.__module__, kind.__name__, [[f.name, encoder(getattr(value, f.name))] for f in dataclasses.fields(value)]]
        return ["remote", self.keep(value), self.describe(encoder, value)]

    def describe(self, encoder, value) -> dict:
        import torch

        told = {"type": type(value).__name__, "name": str(getattr(value, "__name__", ""))[:100]}
        if isinstance(value, type):
            told["kind"] = "class"
            told["bases"] = [f"{b.__module__}.{b.__qualname__}" for b in value.__mro__[1:]]
        elif isinstance(value, torch.nn.Module):
            told["kind"] = "module"
            told["bases"] = [f"{b.__module__}.{b.__qualname__}" for b in type(value).__mro__]
            told["tree"] = [[name, self.keep(module), type(module).__name__] for name, module in value.named_modules()]
            told["state"] = self.state(encoder, value)
        elif callable(value):
            told["kind"] = "function"
        else:
            told["kind"] = "object"
        if told["kind"] in ("class", "function"):
            told["doc"] = str(getattr(value, "__doc__", None) or "")[:TEXT]
            try:
                parameters = inspect.signature(value).parameters.values()
                told["parameters"] = [[p.name, int(p.kind), p.default is not p.empty] for p in parameters]
            except (ValueError, TypeError):
                pass
        return told

    def state(self, encoder, module) -> list:
        """Every parameter and buffer by name; an alias (tied weights) names the first of its kind."""
        seen, rows = {}, []
        passing = {f"{name}.{last}".lstrip(".") for name, each in module.named_modules() for last in each._non_persistent_buffers_set}
        for kind, pairs in (("parameter", module.named_parameters(remove_duplicate=False)), ("buffer", module.named_buffers(remove_duplicate=False))):
            for name, tensor in pairs:
                kind = "passing" if name in passing else kind
                if id(tensor) in seen:
                    rows.append([kind, name, seen[id(tensor)], None, False])
                else:
                    seen[id(tensor)] = name
                    rows.append([kind, name, None, ["tensor", *encoder.tensor(tensor)], bool(tensor.requires_grad)])
                kind = "buffer" if kind == "passing" else kind
        return rows

    def reply(self, message: dict, value: object, arguments=None) -> None:
        encoder = self.encoder()
        if arguments is not None and self.in_place:
            encoder.known = arguments.known()
        message["ok"] = encoder(value)
        if arguments is not None:
            message["changed"] = arguments.changes(encoder, self.in_place)
        if encoder.live:
            self.number += 1
            self.graphs[self.number] = (list(encoder.live), arguments)
            message["graph"] = self.number
            message["live"] = [["tensor", *encoder.tensor(t)] for t in encoder.live]
        self.channel.send(message, encoder.buffers)

    def failed(self, error: BaseException, arguments) -> None:
        """Tell an error, and what had been changed by then."""
        message = {"error": self.error(error)}
        encoder = self.encoder()
        try:
            encoder.known = arguments.known() if self.in_place else {}
            message["changed"] = arguments.changes(encoder, self.in_place)
            if encoder.live:
                del message["changed"]
        except Exception:
            encoder.buffers.clear()
        self.channel.send(message, encoder.buffers if "changed" in message else [])

    # values in

    def decoder(self, buffers, arguments) -> Decoder:
        decoder = Decoder(buffers, lambda code: self.arrived(decoder, code, arguments))
        return decoder

    def arrived(self, decoder, code, arguments):
        import torch

        kind = code[0]
        if kind == "leaf":  # a tensor argument: remembered, so that gradients and changes in place find the way back
            tensor = decoder(code[2])
            if code[1] and not tensor.is_inference():
                tensor.requires_grad_()
            arguments.add(tensor)
            return tensor
        if kind == "mine":
            arguments.closed.append(self.objects[code[1]])
            return self.objects[code[1]]
        if kind == "callback":
            return Callback(self, code[1])
        if kind == "name":
            value = importlib.import_module(code[1])
            for part in code[2].split("."):
                value = getattr(value, part)
            return value
        if kind == "generator":
            generator = torch.Generator()
            generator.set_state(decoder(code[1]))
            arguments.generators.append(generator)
            return generator
        if kind == "together":
            return _Unpickler(io.BytesIO(bytes(decoder.buffers[code[1]])), self, decoder, arguments).load()
        if kind == "module":  # one of ours, with the numbers that the grader's side has now
            module = self.objects[code[1]]
            arguments.mirror(module, decoder, code[2], code[3])
            return module
        raise WireError(f"unknown value {kind}")

    def callback(self, handle, path, args, kwargs, how="call"):
        encoder = self.encoder()
        message = {"op": "callback", "how": how, "target": handle, "path": list(path), "args": encoder(list(args)), "kwargs": encoder(kwargs)}
        if encoder.live:
            message["live"] = [["tensor", *encoder.tensor(t)] for t in encoder.live]
        self.channel.send(message, encoder.buffers)
        return self.wait()

    def callback_attribute(self, proxy, name):
        self.channel.send({"op": "attribute", "target": proxy._handle, "path": [*proxy._path, name]}, [])
        value = self.wait()
        return Callback(self, proxy._handle, (*proxy._path, name)) if isinstance(value, Nothing) else value

    def wait(self):
        """The reply to a call back; the grader may call us in between."""
        while True:
            message, buffers = self.channel.receive()
            if "op" in message:
                self.serve(message, buffers)
                continue
            if "error" in message:
                kind = getattr(builtins, message["error"], AnswerError)
                raise kind(message["text"])
            if message.get("callable"):
                return Nothing()
            return self.decoder(buffers, Arguments())(message["ok"])

    # running

    def run(self, cells: list[dict]) -> None:
        for cell in cells:
            if cell["name"] == "workbook":
                self.execute_parts(cell["source"])
                continue
            given = {name: self.space.__dict__.get(name) for name in cell.get("spare", ())}
            try:
                self.execute(cell["name"], cell["source"])
                self.space.__dict__.update(given)
            except BaseException as error:
                if cell["answer"]:
                    self.channel.send({"error": self.error(error), "cell": cell["name"]}, [])
                    return
        self.reply({}, {name: self.space.__dict__[name] for name in cells[-1]["names"] if name in self.space.__dict__})

    def execute_parts(self, source: str) -> None:
        """A cell of the workbook itself, statement by statement: what needs the tools of the course does not work here, the rest does."""
        for node in ast.parse(source).body:
            try:
                exec(compile(ast.Module([node], []), "<workbook>", "exec", dont_inherit=True), self.space.__dict__)
            except Exception:
                continue

    def execute(self, name: str, source: str) -> None:
        filename = f"<{name}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        exec(compile(source, filename, "exec", dont_inherit=True), self.space.__dict__)

    def error(self, error: BaseException) -> dict:
        try:
            text = str(error)[:TEXT]
        except BaseException:
            text = "(its text cannot be shown)"
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith("<") and f.filename != "<string>"]
        if isinstance(error, SyntaxError) and not frames:
            where = f"line {error.lineno}: {(error.text or '').strip()}"
        else:
            where = f"line {frames[-1].lineno}: {(frames[-1].line or '').strip()}" if frames else ""
        kinds = [k.__name__ for k in type(error).__mro__ if getattr(builtins, k.__name__, None) is k]
        return {"type": type(error).__name__[:100], "kinds": kinds, "text": text, "where": where[:300]}

    def serve(self, message: dict, buffers: list) -> None:
        import torch

        arguments = Arguments()
        operation = message["op"]
        try:
            if operation == "vjp":
                self.backward(message, self.decoder(buffers, arguments))
                return
            decode = self.decoder(buffers, arguments)
            environment = message["env"]
            torch.set_grad_enabled(environment["grad"])
            torch.set_default_dtype(decode(environment["dtype"]))
            torch.set_rng_state(decode(environment["rng"]))
            before = torch.get_rng_state()
            decode(message["owner"])  # the module whose method is called, with its numbers
            target = decode(message["target"])
            args, kwargs = decode(message["given"])
            arguments.look([args, kwargs])
            autocast, kept = decode(environment["autocast"]), {}
            with contextlib.ExitStack() as around:
                around.enter_context(torch.autocast("cpu", dtype=autocast, enabled=autocast is not None))
                if environment["watched"]:
                    around.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: remember(kept, t), lambda t: t))
                value = self.operate(operation, target, args, kwargs)
            self.reply({"kept": list(kept.values())}, [value, not torch.equal(before, torch.get_rng_state())], arguments)
        except Closed:
            raise
        except BaseException as error:
            self.failed(error, arguments)

    def operate(self, operation, target, args, kwargs):
        if operation == "call":
            return target(*args, **kwargs)
        if operation == "getattr":
            return getattr(target, *args)
        if operation == "setattr":
            return setattr(target, *args)
        if operation == "getitem":
            return target[args[0]]
        if operation == "setitem":
            target[args[0]] = args[1]
            return None
        if operation == "copy":
            return copy.deepcopy(target)
        if operation == "isinstance":
            return isinstance(target, args[0])
        return {"len": len, "iter": iter, "next": self.next, "bool": bool, "contains": lambda t, v: v in t,
                "enter": lambda t: t.__enter__(), "exit": lambda t: t.__exit__(None, None, None)}[operation](target, *args)  # fmt: skip

    @staticmethod
    def next(iterator):
        try:
            return [next(iterator)]
        except StopIteration:
            return []

    def backward(self, message, decode) -> None:
        import torch

        live, arguments = self.graphs[message["graph"]]
        leaves = [t for t, *_, trained in arguments.tensors if trained]
        for leaf in leaves:
            leaf.grad = None
        grads = decode(message["grads"])
        pairs = [(t, g) for t, g in zip(live, grads) if g is not None]
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs], retain_graph=True)
        self.reply({}, [None if leaf.grad is None else leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None


class Arguments:
    """What came in with one call, and what happened to it."""

    def __init__(self) -> None:
        self.tensors, self.generators, self.closed, self.objects = [], [], [], []

    def all_tensors(self):
        return [t for t, *_ in self.tensors]

    def add(self, tensor) -> None:
        """Remember a tensor: its numbers, its gradient and whether it learns may change."""
        grad = tensor.grad if tensor.is_leaf else None
        self.tensors.append((tensor, version(tensor), grad, version(grad), tensor.requires_grad))

    def look(self, given) -> None:
        """Remember the other objects that may change."""
        self.objects = [(each, objects.snapshot(each)) for each in objects.listed(given, closed={id(each) for each in self.closed})]

    def known(self) -> dict:
        """How to say that a value is one of the arguments."""
        found = {id(each): ("argument", number) for number, (each, _) in enumerate(self.objects)}
        return found | {id(tensor): ("tensor argument", number) for number, tensor in enumerate(self.all_tensors())}

    def mirror(self, module, decoder, rows, training) -> None:
        import torch

        self.closed.append(module)
        named = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
        for name, code, requires_grad in rows:
            tensor, new = named[name], decoder(code)
            with torch.no_grad():
                if tensor.shape == new.shape:
                    tensor.copy_(new)
                else:
                    tensor.data = new
            if tensor.is_leaf and tensor.is_floating_point():
                tensor.requires_grad_(requires_grad)
            self.add(tensor)
        for name, value in training:
            module.get_submodule(name).training = value

    def changes(self, encoder, in_place: bool) -> dict:
        """What is to be told: without `in_place` what changed, but for buffers not how."""
        told = {"tensors": [], "grads": [], "trained": [], "objects": [], "generators": []}
        for index, (tensor, before, grad, grad_before, trained) in enumerate(self.tensors):
            if version(tensor) != before:
                told["tensors"].append([index, ["tensor", *encoder.tensor(tensor)]])
            now = tensor.grad if in_place and tensor.is_leaf else None
            if in_place and (now is not grad or version(now) != grad_before):
                told["grads"].append([index, None if now is None else ["tensor", *encoder.tensor(now)]])
            if in_place and tensor.is_leaf and tensor.requires_grad != trained:
                told["trained"].append([index, tensor.requires_grad])
        for index, (each, before) in enumerate(self.objects):
            if not objects.same(before, objects.snapshot(each)):
                told["objects"].append([index, self.inside(encoder, each) if in_place or isinstance(each, random.Random) else None])
        told["generators"] = [encoder(g.get_state()) for g in self.generators]
        return told

    @staticmethod
    def inside(encoder, each):
        known = encoder.known.pop(id(each), None)  # its content, not its name
        try:
            return objects.told(each, encoder)
        finally:
            if known:
                encoder.known[id(each)] = known


def version(tensor) -> int:
    """How often a tensor was written to; tensors made under inference_mode do not count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def remember(kept: dict, tensor):
    """Note how many numbers a tensor that autograd keeps has in memory."""
    storage = tensor.untyped_storage()
    kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
    return tensor


class _Unpickler(pickle.Unpickler):
    """Reads what the grader sent as a whole."""

    def __init__(self, file, worker, decoder, arguments) -> None:
        super().__init__(file)
        self.worker, self.decoder, self.arguments, self.known = worker, decoder, arguments, {}

    def persistent_load(self, told):
        import torch

        kind = told[0]
        if kind == "code":
            self.known[told[1]] = made = self.decoder(told[2])
            return made
        if kind == "callback":
            return Callback(self.worker, told[1])
        if kind == "known tensor":
            return self.arguments.tensors[told[1]][0]
        if kind in ("known code", "known data"):
            return self.known[told[1]]
        if kind == "data":
            made = object.__new__(dataclasses.make_dataclass(told[2], list(told[3])))
            made.__dict__.update(told[3])
            self.known[told[1]] = made
            return made
        _, code, trained, parameter, grad = told
        tensor = self.decoder(code)
        if parameter:
            tensor = torch.nn.Parameter(tensor, requires_grad=trained)
        elif trained:
            tensor.requires_grad_()
        tensor.grad = None if grad is None else self.decoder(grad)
        self.arguments.add(tensor)
        return tensor


def answer(data: socket.socket, job: dict) -> None:
    """Everything that the confined process does, until the grader hangs up."""
    for name in [n for n in sys.modules if n == "course" or n.startswith("course.")]:
        del sys.modules[name]
    sys.meta_path.insert(0, QuietFinder)
    sys.argv = ["answer"]
    channel = Channel(data)
    worker = Worker(channel, job.get("in_place", False))
    for name, module in job.get("give", {}).items():
        worker.space.__dict__[name] = getattr(importlib.import_module(module), name)
    hide(job.get("hide", {}))
    worker.run(job["cells"])
    while True:
        message, buffers = channel.receive()
        worker.serve(message, buffers)


def hide(names: dict[str, list[str]]) -> None:
    """Take the functions that an exercise asks for out of the package: an import of them is no answer."""
    for module_name, hidden in names.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        shown = types.ModuleType(module_name, module.__doc__)
        shown.__dict__.update({k: v for k, v in module.__dict__.items() if k not in hidden and not k.startswith("__")})
        shown.__dict__["__name__"] = module_name
        sys.modules[module_name] = shown
        package, _, last = module_name.rpartition(".")
        if package in sys.modules:
            setattr(sys.modules[package], last, shown)


# --- the server and the keeper ------------------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Load what every answer needs, once; nothing here may start a thread that stays, because threads do not survive a fork."""
    import matplotlib.pyplot  # noqa: F401  looks for fonts, which takes seconds
    import numpy  # noqa: F401
    import torch
    import torch.nn.functional  # noqa: F401

    torch.set_num_threads(1)
    torch.ones(2, 2, device="meta").tril()  # the first one imports 800 modules
    sys.path[:] = [str(ROOT), *[p for p in sys.path if p and Path(p).resolve() != ROOT]]


def receive_job(control: socket.socket) -> tuple[dict, socket.socket]:
    descriptors = array.array("i")
    text, ancillary, _, _ = control.recvmsg(4, socket.CMSG_LEN(4))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[:4])
    job = bytearray()
    while len(job) < int.from_bytes(text, "big"):
        piece = control.recv(2**20)
        if not piece:
            raise EOFError
        job += piece
    return json.loads(bytes(job)), socket.socket(fileno=descriptors[0])


def keeper(control: socket.socket) -> None:
    """Start the confined process, watch it, and say how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    job, data = receive_job(control)
    limits = confine.Limits(**job["limits"])
    confine.prctl(confine.SET_CHILD_SUBREAPER, 1) if sys.platform.startswith("linux") else None
    meter = Meter(os.getpid())
    loaded = meter.bytes_of(os.getpid())  # torch and what else the server has; its children begin with as much
    group = confine.Group(limits, loaded)
    way = confine.enter_namespaces() if job.get("namespaces", True) else ""
    folder = "" if way else tempfile.mkdtemp(prefix="answer-")
    wait, go = os.pipe()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            for each in (control.fileno(), ready, go):
                os.close(each)
            grouped = os.read(wait, 1) == b"1"
            os.close(wait)
            shut_in(way, limits, data, tell, grouped, folder)
            answer(data, job)
        finally:
            os._exit(0)
    data.close()
    for each in (tell, wait):
        os.close(each)
    os.write(go, b"1" if group.add(child) else b"0")
    os.close(go)
    with contextlib.suppress(OSError):  # it must get its turn beside the processes that it watches
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    protection = os.read(ready, 200).decode() or "not started"
    control.sendall((json.dumps({"protection": protection}) + "\n").encode())
    reason, peak = watch(child, control, limits, meter, loaded)
    group.remove()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        control.sendall((json.dumps({"ended": reason, "peak": peak}) + "\n").encode())
    except OSError:
        pass


def shut_in(way: str, limits: confine.Limits, data: socket.socket, tell: int, grouped: bool, folder: str) -> None:
    if sys.platform.startswith("linux"):
        confine.prctl(confine.SET_PDEATHSIG, signal.SIGKILL)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    keep = {data.fileno(), tell, 0, 1, 2}
    for number in range(3, 1024):
        if number not in keep:
            try:
                os.close(number)
            except OSError:
                pass
    parts = ["control group"] if grouped else []
    confine.first_to_go()
    if way:
        confine.new_root(ROOT, limits)
        parts.append("namespaces")
        os.chdir("/tmp")
    else:
        os.chmod(folder, 0o777)
        os.chdir(folder)
    os.environ.clear()
    os.environ.update(HOME=os.getcwd(), TMPDIR=os.getcwd(), PATH="/usr/bin:/bin", LANG="C.UTF-8", OMP_NUM_THREADS="1", MPLBACKEND="agg",
                      HF_HUB_OFFLINE="1", MPLCONFIGDIR=os.getcwd())  # fmt: skip
    if confine.drop_rights(100_000 + os.getppid() % 400_000 if way != "root" else 100_000 + int.from_bytes(os.urandom(2), "big")):
        parts.append("another user")
    confine.set_limits(limits)
    parts.append("limits")
    if syscalls.install():
        parts.append("filter")
    os.write(tell, " + ".join(parts).encode())
    os.close(tell)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)


def watch(child: int, control: socket.socket, limits: confine.Limits, meter: Meter, loaded: int) -> tuple[str, int]:
    """Wait for the end; end it when its processes together take too much memory, or when the grader hangs up. How it ended, and the most it took."""
    peak, allowed = 0, limits.memory_bytes + loaded
    while True:
        done, status, spent = os.wait4(child, os.WNOHANG)
        if done:
            break
        readable, _, _ = select.select([control], [], [], confine.LOOK)
        now = meter.used(allowed)
        peak = max(peak, now)
        if readable or now > allowed:
            end(child, meter)
            return "stopped by the grader" if readable else f"memory: more than {limits.memory_bytes / 2**30:.1f} GB", peak
    end(child, meter)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and spent.ru_utime + spent.ru_stime > limits.cpu_seconds - 1):
            return f"processor time: more than {limits.cpu_seconds} seconds", peak
        if number == signal.SIGKILL:  # nobody else may: the kernel found no memory
            return f"memory: more than {limits.memory_bytes / 2**30:.1f} GB", peak
        return f"killed by signal {signal.Signals(number).name}", peak
    return "ended itself", peak


def end(child: int, meter: Meter) -> None:
    """Kill the process and everything below us, until nothing is left. The first process of a namespace takes the others with it."""
    for _ in range(1000):
        for pid in (child, *meter.below()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.002)
            continue
        return


def main(path: str) -> None:
    """Serve until standard input closes."""
    prepare()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(64)
    while True:
        readable, _, _ = select.select([listener, 0], [], [])
        if 0 in readable and not os.read(0, 1):
            return
        if listener not in readable:
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            try:
                listener.close()
                keeper(connection)
            except (OSError, EOFError, ValueError) as error:
                sys.stderr.write(f"sandbox: {error}\n")
            finally:
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
