"""Objects that change: which there are in the arguments of a call, what can change in each, and how a change is told and made.

Both sides list the objects in the same order, so that a number names one. Used by course/grading/sandbox.py and course/grading/worker.py.
"""

from __future__ import annotations

import dataclasses
import random
import types

PLAIN = (bool, int, float, str, bytes, type(None))


def stateful(value: object) -> bool:
    """Objects with a state of their own, which is told as a whole."""
    import torch

    return isinstance(value, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler, random.Random))


def holds(value: object) -> bool:
    """Objects whose attributes are their content."""
    kind = type(value)
    if kind is types.SimpleNamespace or (dataclasses.is_dataclass(kind) and hasattr(value, "__dict__")):
        return True
    return str(getattr(kind, "__module__", "")).startswith("minimind.") and hasattr(value, "__dict__") and not callable(value)


def listed(top: object, closed: set[int] = frozenset()) -> list:
    """The objects inside a value that can change, except tensors; `closed` are ids of those not to look into."""
    found, seen, todo = [], set(closed), [top]
    while todo:
        value = todo.pop()
        parts = inside(value) if id(value) not in seen else None
        if parts is None:
            continue
        seen.add(id(value))
        if not isinstance(value, tuple):
            found.append(value)
        todo.extend(reversed(parts))
    return found


def inside(value: object) -> list | None:
    import torch

    if isinstance(value, (list, tuple, dict)):
        return [part for part in (value.values() if isinstance(value, dict) else value) if type(part) not in PLAIN]
    if stateful(value):
        return []
    if isinstance(value, torch.nn.Module):
        return [*value._modules.values(), *attributes(value).values()]
    return list(vars(value).values()) if holds(value) else None


def attributes(module) -> dict:
    """What a module has beside its parameters, buffers and modules."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}


def snapshot(value: object) -> list:
    """What is in an object now; two snapshots are equal when nothing changed. A state of its own always counts as changed."""
    import torch

    if isinstance(value, list):
        return list(value)
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    if stateful(value):
        return [object()]
    if isinstance(value, torch.nn.Module):
        parts = [value._modules, value._parameters, value._buffers, attributes(value)]
        return [value.training, *(part for each in parts for pair in each.items() for part in pair)]
    return [part for pair in vars(value).items() for part in pair]


def same(before: list, after: list) -> bool:
    return len(before) == len(after) and all(a is b or (type(a) is type(b) is str and a == b) for a, b in zip(before, after))


def told(value: object, encode) -> object:
    """What is in an object, as a code."""
    import torch

    if isinstance(value, list):
        return [encode(part) for part in value]
    if isinstance(value, dict):
        return [[encode(key), encode(part)] for key, part in value.items()]
    if isinstance(value, random.Random):
        return encode(value.getstate())
    if stateful(value):
        return encode(value.state_dict())
    if isinstance(value, torch.nn.Module):
        parts = (value._modules, value._parameters, value._buffers, attributes(value))
        return [bool(value.training), *([[name, encode(part)] for name, part in each.items()] for each in parts)]
    return [[name, encode(part)] for name, part in vars(value).items()]


def made(value: object, code: object, decode) -> None:
    """Make a change that was told. It is not trusted: names that would cover a method are left out. ValueError or TypeError if it is none."""
    import torch

    if isinstance(value, list):
        value[:] = [decode(part) for part in code]
    elif isinstance(value, dict):
        new = {decode(key): decode(part) for key, part in code}
        value.clear()
        value.update(new)
    elif isinstance(value, random.Random):
        value.setstate(decode(code))
    elif stateful(value):
        value.load_state_dict(decode(code))
    elif isinstance(value, torch.nn.Module):
        training, *parts = code
        kinds = (torch.nn.Module, torch.nn.Parameter, torch.Tensor)
        new = [{str(name): decode(part) for name, part in each} for each in parts]
        for each, kind in zip(new, kinds):
            if not all(part is None or isinstance(part, kind) for part in each.values()) or any("." in name for name in each):
                raise TypeError(f"not every part is a {kind.__name__}")
        for own, each in zip((value._modules, value._parameters, value._buffers), new):
            own.clear()
            own.update(each)
        for name in attributes(value).keys() - new[3].keys():
            del vars(value)[name]
        vars(value).update({name: part for name, part in new[3].items() if free(value, name)})
        value.training = bool(training)
    else:
        fields = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
        new = {str(name): decode(part) for name, part in code}
        new = {name: part for name, part in new.items() if name in fields or free(value, name)}
        vars(value).clear()
        vars(value).update(new)


def free(value: object, name: str) -> bool:
    """Whether an attribute may have this name: one that its class does not use."""
    return name.isidentifier() and not name.startswith("_") and not hasattr(type(value), name)
