"""Values between the grader and a process that it does not trust: JSON for the shape, raw bytes for the numbers, nothing that can run.

What arrives from an answer is rebuilt from exact types only; everything else stays where it is and travels as a handle (`Remote`). So a value that
comes out of an answer cannot lie about equality: it is plain data.

| what                                  | from a check to an answer                         | from an answer to a check                          |
|---------------------------------------|---------------------------------------------------|----------------------------------------------------|
| None, numbers, str, bytes, slice, ... | as they are                                       | as they are; subclasses become the plain type      |
| list, tuple, dict, set                | as they are; tuple and dict classes of a check    | as they are; a named tuple becomes one with the    |
|                                       | become plain                                      | same fields                                        |
| long lists of int or of float         | as bytes, up to 4 million numbers                 | the same                                           |
| tensors (strided, on the cpu)         | numbers, gradient wanted or not, memory order     | the same; gradients flow back through the call     |
| numpy arrays and scalars, memmap      | numbers, at most 64 MB a message                  | the same; subclasses become plain arrays           |
| SimpleNamespace                       | as it is                                          | as it is                                           |
| dataclass of minimind                 | as it is                                          | rebuilt, without running its code                  |
| dataclass of a check                  | a dataclass with the same fields, no methods      | -                                                  |
| objects of torch, numpy, minimind,    | a copy: optimisers, schedulers, configurations,   | a handle; attributes, calls, items, iteration,     |
| tokenizers, random, ...               | random.Random, Tokenizer, datasets                | `with`, len and `in` are asked over there          |
| torch.Generator, random.Random        | a copy; ours goes on where theirs stopped         | Generator: a copy; Random: a handle                |
| torch modules                         | a copy; its own class if torch or minimind has    | parameters and buffers live here, code over there; |
|                                       | it, else the nearest such base class: build test  | can be called, trained, loaded, copied             |
|                                       | models from nn.Sequential and the like            |                                                    |
| functions and classes that torch,     | by name                                           | a handle that can be called                        |
| numpy, minimind ... have              |                                                   |                                                    |
| other functions, generators,          | stay here and are called back; also iteration,    | a handle; generators are read one value at a time  |
| iterators, context managers, objects  | items, `with`, public attributes; numbers go and  |                                                    |
|                                       | come without gradients                            |                                                    |

Arguments that refer to each other (a model, its parameters, its optimiser) still do so over there. What an answer changes in its arguments (numbers,
gradients, requires_grad, lists, dicts, attributes, modules put in the place of others, states of optimisers) comes back only where the check is
registered with `in_place=True`; elsewhere it is noted and dropped.
"""

from __future__ import annotations

import array
import json
import math
import socket
import struct
import time
import types
from collections.abc import Callable

LARGEST = 64 * 2**20  # bytes of one message
IN_ALL = 2**30  # bytes that one side takes from the other, all messages together: a check may keep what it gets
DEEPEST = 60  # lists in lists
NODES = 500_000  # values in one message
HEAD = struct.Struct(">QQ")
PACKED, MOST_PACKED = 64, 4_000_000  # a list of at least so many whole numbers, or floats, goes as bytes; and of at most so many
PACKABLE = {int: "q", float: "d"}


class WireError(RuntimeError):
    """The other side sent what is not a message, too much of it, or nothing in time."""


class Closed(WireError):
    """The other side is gone."""


class TooLate(WireError):
    """No answer before the deadline."""


class Channel:
    """Messages over a socket: a JSON object and a list of byte strings."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.taken = sock, 0

    def send(self, message: object, buffers: list[bytes] = (), deadline: float | None = None) -> None:
        text = json.dumps([message, [len(b) for b in buffers]]).encode()
        total = len(text) + sum(len(b) for b in buffers)
        if total > LARGEST:
            raise WireError(f"a message of {total:,} bytes: at most {LARGEST:,} are allowed")
        try:
            self._limit(deadline)
            self.sock.sendall(HEAD.pack(len(text), total - len(text)) + text)
            for buffer in buffers:
                self._limit(deadline)
                self.sock.sendall(buffer)
        except TimeoutError:
            raise TooLate("the answer did not read its input in time") from None
        except OSError as error:
            raise Closed(f"the process of the answer is gone ({error.__class__.__name__})") from None

    def receive(self, deadline: float | None = None) -> tuple[object, list[bytes]]:
        length, rest = HEAD.unpack(self._read(HEAD.size, deadline))
        if length + rest > LARGEST:
            raise WireError(f"a message of {length + rest:,} bytes: at most {LARGEST:,} are allowed")
        self.taken += length + rest
        if self.taken > IN_ALL:
            raise WireError(f"more than {IN_ALL:,} bytes in all")
        text, data = self._read(length, deadline), self._read(rest, deadline)
        try:
            message, sizes = json.loads(bytes(text))
            if not all(type(n) is int and n >= 0 for n in sizes) or sum(sizes) != len(data):
                raise ValueError("sizes")
        except (ValueError, TypeError, RecursionError):
            raise WireError("not a message of the worker") from None
        buffers, start = [], 0
        for size in sizes:
            buffers.append(data[start : start + size])
            start += size
        return message, buffers

    def _limit(self, deadline: float | None) -> None:
        if deadline is None:
            self.sock.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TooLate("time is up")
        self.sock.settimeout(left)

    def _read(self, count: int, deadline: float | None) -> bytearray:
        data = bytearray()
        while len(data) < count:
            try:
                self._limit(deadline)
                piece = self.sock.recv(min(count - len(data), 2**20))
            except TimeoutError:
                raise TooLate("time is up") from None
            except OSError as error:
                raise Closed(f"the process of the answer is gone ({error.__class__.__name__})") from None
            if not piece:
                raise Closed("the process of the answer ended")
            data += piece
        return data

    def close(self) -> None:
        self.sock.close()


class Encoder:
    """Turns a value into JSON; `other(value)` gives the code of what is no plain data."""

    def __init__(self, other: Callable[[object], list]) -> None:
        self.other, self.buffers = other, []

    def buffer(self, data: bytes) -> int:
        self.buffers.append(data)
        return len(self.buffers) - 1

    def __call__(self, value: object, depth: int = 0) -> object:
        import numpy
        import torch

        if depth > DEEPEST:
            raise WireError(f"a value nested more than {DEEPEST} deep")
        kind, again = type(value), lambda v: self(v, depth + 1)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if abs(value) < 2**63 else ["int", hex(value)]
        if kind is float:
            return value if math.isfinite(value) else ["float", repr(value)]
        if kind is complex:
            return ["complex", again(value.real), again(value.imag)]
        if kind is list and len(value) >= PACKED and len(kinds := set(map(type, value))) == 1 and (letter := PACKABLE.get(kinds.pop())):
            try:
                return ["packed", letter, self.buffer(array.array(letter, value).tobytes())]
            except OverflowError:  # a number of more than 64 bits
                pass
        if kind is list or kind is tuple or kind is set or kind is frozenset:
            return [kind.__name__, [again(v) for v in value]]
        if kind is torch.Size:
            return ["size", [int(v) for v in value]]
        if kind is dict:
            return ["dict", [[again(k), again(v)] for k, v in value.items()]]
        if kind is bytes or kind is bytearray:
            return [kind.__name__, self.buffer(bytes(value))]
        if kind is types.SimpleNamespace:
            return ["space", [[name, again(each)] for name, each in vars(value).items()]]
        if kind is slice:
            return ["slice", [again(v) for v in (value.start, value.stop, value.step)]]
        if kind is range:
            return ["range", [again(v) for v in (value.start, value.stop, value.step)]]
        if value is ...:
            return ["ellipsis"]
        if kind is torch.dtype:
            return ["dtype", str(value).removeprefix("torch.")]
        if kind is torch.device:
            return ["device", str(value)]
        if kind is torch.Tensor and value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized:
            return ["tensor", *self.tensor(value)]
        if kind is torch.Tensor and value.device.type == "meta":
            return ["meta", str(value.dtype).removeprefix("torch."), list(value.shape)]
        if kind is numpy.ndarray and value.dtype.kind in "biufc":
            return ["array", value.dtype.str, list(value.shape), self.buffer(value.tobytes())]
        if isinstance(value, numpy.generic) and value.dtype.kind in "biufc":
            return ["scalar", value.dtype.str, [], self.buffer(value.tobytes())]
        return self.other(value)

    def tensor(self, value) -> list:
        """dtype, shape, memory order of the axes, and the bytes."""
        import torch

        value = value.detach().resolve_conj().resolve_neg()
        order = sorted(range(value.dim()), key=lambda axis: -value.stride(axis))  # keeps a transposed tensor transposed
        dense = value.permute(order).contiguous()
        flat = dense.flatten().as_strided((dense.numel(),), (1,))  # one number may come with any stride
        data = flat.view(torch.uint8).numpy().tobytes() if dense.numel() else b""
        return [str(value.dtype).removeprefix("torch."), list(value.shape), order, self.buffer(data)]


class Decoder:
    """Rebuilds a value; `other(code)` rebuilds what is no plain data, or raises WireError."""

    def __init__(self, buffers: list[bytes], other: Callable[[list], object]) -> None:
        self.buffers, self.other, self.count, self.used = buffers, other, 0, 0

    def buffer(self, index: object) -> bytes:
        """The bytes of a value; a message cannot name the same bytes again and again."""
        data = self.buffers[_size(index)]
        self.used += len(data)
        if self.used > 2 * LARGEST:
            raise WireError("the same bytes too often")
        return data

    def __call__(self, code: object, depth: int = 0) -> object:
        self.count += 1
        if depth > DEEPEST or self.count > NODES:
            raise WireError("a value too deep or too large")
        if code is None or type(code) in (bool, int, float, str):
            return code
        if type(code) is not list or not code or type(code[0]) is not str:
            raise WireError("a value that is none")
        try:
            return self.compound(code, lambda v: self(v, depth + 1))
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
            if isinstance(error, WireError):
                raise
            raise WireError(f"a value that cannot be rebuilt ({error.__class__.__name__}: {str(error)[:200]})") from None

    def compound(self, code: list, again: Callable) -> object:
        import torch

        kind = code[0]
        if kind == "int":
            return int(code[1], 16)
        if kind == "float":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[code[1]]
        if kind == "complex":
            return complex(float(code[1]), float(code[2]))
        if kind in ("list", "tuple", "set", "frozenset"):
            return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](again(v) for v in _list(code[1]))
        if kind == "packed" and code[1] in PACKABLE.values():
            data = self.buffer(code[2])
            if len(data) > 8 * MOST_PACKED:
                raise WireError(f"a list of more than {MOST_PACKED:,} numbers")
            packed = array.array(code[1])
            packed.frombytes(bytes(data))
            return packed.tolist()
        if kind == "space":
            found = {name: again(each) for name, each in _list(code[1])}
            if not all(type(name) is str and name.isidentifier() and not name.startswith("__") for name in found):
                raise WireError("no names")
            return types.SimpleNamespace(**found)
        if kind == "size":
            return torch.Size([_size(v) for v in code[1]])
        if kind == "dict":
            return {again(k): again(v) for k, v in _list(code[1])}
        if kind in ("bytes", "bytearray"):
            return (bytes if kind == "bytes" else bytearray)(self.buffer(code[1]))
        if kind in ("slice", "range"):
            made = (slice if kind == "slice" else range)(*[again(v) for v in _list(code[1])])
            if kind == "range" and not 0 <= len(made) <= MOST_PACKED:  # short to tell, and endless to go through
                raise WireError("a range too long")
            return made
        if kind == "ellipsis":
            return ...
        if kind == "dtype":
            return _dtype(code[1])
        if kind == "device":
            return torch.device(code[1])
        if kind == "tensor":
            return self.tensor(*code[1:])
        if kind == "meta":
            return torch.empty([_size(n) for n in code[2]], dtype=_dtype(code[1]), device="meta")
        if kind in ("array", "scalar"):
            return self.array(*code[1:], scalar=kind == "scalar")
        return self.other(code)

    def tensor(self, dtype: str, shape: list, order: list, index: int):
        import torch

        dtype, shape, data = _dtype(dtype), [_size(n) for n in shape], self.buffer(index)
        if sorted(order) != list(range(len(shape))) or math.prod(shape) * dtype.itemsize != len(data):
            raise WireError("a tensor whose shape and bytes disagree")
        moved = [shape[axis] for axis in order]
        if not data:
            return torch.empty(moved, dtype=dtype).permute(_inverse(order))
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        flat = flat.ne(0) if dtype is torch.bool else flat.view(dtype)  # a byte 2 in a bool tensor would be neither True nor False
        return flat.view(moved).permute(_inverse(order))

    def array(self, dtype: str, shape: list, index: int, scalar: bool):
        import numpy

        dtype, shape, data = numpy.dtype(str(dtype)), [_size(n) for n in shape], self.buffer(index)
        if dtype.kind not in "biufc" or math.prod(shape) * dtype.itemsize != len(data):
            raise WireError("an array whose shape and bytes disagree")
        if dtype.kind == "b":
            made = (numpy.frombuffer(data, numpy.uint8) != 0).reshape(shape)
        else:
            made = numpy.frombuffer(bytearray(data), dtype).reshape(shape)
        return made[()] if scalar else made


def _inverse(order: list[int]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]


def _list(value: object) -> list:
    if type(value) is not list:
        raise WireError("no list")
    return value


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise WireError("no size")
    return value


def _dtype(name: object):
    import torch

    found = getattr(torch, name, None) if type(name) is str and name.isidentifier() else None
    if type(found) is not torch.dtype:
        raise WireError(f"no dtype: {str(name)[:40]}")
    return found
