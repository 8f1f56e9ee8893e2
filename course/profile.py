"""The one dial: profiles/<name>.yaml, read and checked in one place.

A misspelled key, a value of the wrong kind or out of range, and a key that stands twice are errors that name the file and the key.
The sizes of a chapter have names that the chapter chooses; asking for one that is not there is an error as well.
"""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from course.artifacts import home

MODELS = ("tiny", "tiny-moe", "minimind2-small", "minimind3", "minimind3-moe")  # the presets of minimind.model.ModelConfig
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
KEYS = ("name", "machine", "model", "precision", "device", "data", "budget", "world", "chapters", "expected", "seconds")
RANGES = {  # section: {key: (low, high)}; numbers outside are errors
    "budget": {"minutes": (0.1, 100_000), "memory_gb": (0.5, 10_000)},
    "world": {"seed": (0, 2**31 - 1), "people": (5, 100_000), "documents": (1, 100_000_000), "conversations": (1, 100_000_000)},
}


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file and the key."""


class Sizes:
    """The sizes of one chapter as attributes: `chapter.size.steps`."""

    def __init__(self, values: dict, file: str, section: str) -> None:
        self.__dict__.update(_values=dict(values), _where=(file, section))

    def __getattr__(self, key: str) -> object:
        file, section = self._where
        if key.startswith("__"):  # copy and pickle probe for these
            raise AttributeError(key)
        if key not in self._values:
            raise AttributeError(f"{file}: no size {key!r} under chapters: {section}:{_hint(key, self._values)}")
        return self._values[key]

    def __setattr__(self, key: str, value: object) -> None:
        raise AttributeError(f"sizes are set in {self._where[0]}, not in a chapter (tried to set {key!r})")

    def __dir__(self) -> list[str]:
        return sorted(self._values)

    def __repr__(self) -> str:
        return f"Sizes({', '.join(f'{key}={value!r}' for key, value in self._values.items())})"


@dataclass
class Profile:
    """One checked profile. `bands` maps a metric to (low, high), None where open; `seconds` a chapter to its expected run time."""

    name: str
    file: str  # as shown to people
    machine: str
    model: str
    precision: str
    device: str
    data: str
    budget: dict[str, float]
    world: dict[str, int]
    chapters: dict[str, dict]
    bands: dict[str, tuple[float | None, float | None]]
    seconds: dict[str, float]
    raw: dict = field(repr=False)  # as read, with overrides: written into a run's folder

    def sizes(self, chapter: str) -> Sizes:
        """The sizes of chapter "04_attention"."""
        return Sizes(self.chapters.get(chapter, {}), self.file, chapter)


def names(root: Path | None = None) -> list[str]:
    """The profiles there are."""
    return sorted(path.stem for path in ((root or home()) / "profiles").glob("*.yaml"))


def load(name: str, root: Path | None = None, overrides: Iterable[str] = ()) -> Profile:
    """Read profiles/<name>.yaml, apply `overrides` ("model=minimind3", "chapters.09_pretraining.steps=100") and check it all.

    Raises ProfileError, which names the file and the key.
    """
    root = root or home()
    path = root / "profiles" / f"{name}.yaml"
    if not path.is_file():
        raise ProfileError(f"there is no profile {name!r}{_hint(name, names(root))}")
    return load_file(path, root, overrides)


def load_file(path: Path, root: Path | None = None, overrides: Iterable[str] = ()) -> Profile:
    """Like `load`, for a file anywhere, such as the copy that each run keeps."""
    root = root or home()
    file = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProfileError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ProfileError(f"{file}: expected keys such as `model: tiny`, found {type(raw).__name__}")
    for override in overrides:
        _override(raw, override, file)
    return _check(raw, file, root)


def _hint(key: str, known: Iterable[str]) -> str:
    """'; did you mean ...?', or the list of what is known."""
    known = [str(name) for name in known]
    near = difflib.get_close_matches(str(key), known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}" if known else "; there are none"


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 3e-4 is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _override(raw: dict, text: str, file: str) -> None:
    """Apply one "key=value" or "section.key=value"; the key must be there already (a size) or be one that profiles know."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ProfileError(f"--set {text}: expected key=value, for example --set model=minimind3")
    place = raw
    for depth, part in enumerate(parts[:-1]):
        if not isinstance(place.get(part), dict):
            raise ProfileError(f"--set {text}: {file} has no section {'.'.join(parts[: depth + 1])!r}{_hint(part, place)}")
        place = place[part]
    known = KEYS if len(parts) == 1 else [*place, *RANGES.get(parts[0], {})]
    if parts[-1] not in known and parts[0] != "expected":
        raise ProfileError(f"--set {text}: {file} has no key {key.strip()!r}{_hint(parts[-1], known)}")
    try:
        place[parts[-1]] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ProfileError(f"--set {text}: the value is not valid YAML: {error}") from None


def _check(raw: dict, file: str, root: Path) -> Profile:
    def fail(key: str, message: str) -> None:
        raise ProfileError(f"{file}: {key}: {message}")

    def number(key: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            fail(key, f"expected a number, found {value!r}")
        if not low <= value <= high:
            fail(key, f"{value} is out of range, allowed is {low:g} to {high:g}")

    def section(key: str) -> dict:
        value = raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            fail(key, f"expected `name: value` lines, found {value!r}")
        for name in value:
            if not isinstance(name, str):
                fail(f"{key}: {name}", "expected a name (write it in quotes if it is a number)")
        return value

    for key in raw:
        if key not in KEYS:
            fail(str(key), f"no such key{_hint(key, KEYS)}")
    for key in KEYS[:8]:
        if key not in raw:
            fail(key, "this key is missing")
    for key in ("name", "machine", "data"):
        if not isinstance(raw[key], str) or not raw[key].strip():
            fail(key, f"expected a word, found {raw[key]!r}")
    for key, allowed in (("model", MODELS), ("precision", PRECISIONS), ("device", DEVICES)):
        if raw[key] not in allowed:
            fail(key, f"{raw[key]!r} is not known{_hint(raw[key], allowed)}")
    if file.startswith("profiles/") and raw["name"] != Path(file).stem:
        fail("name", f"{raw['name']!r} differs from the name of the file")
    for key, ranges in RANGES.items():
        for name, value in section(key).items():
            if name not in ranges:
                fail(f"{key}: {name}", f"no such key{_hint(name, ranges)}")
            number(f"{key}: {name}", value, *ranges[name])
            if key == "world" and not isinstance(value, int):
                fail(f"{key}: {name}", f"expected a whole number, found {value!r}")
    chapters = {}
    for name, sizes in section("chapters").items():
        _chapter_name(name, root, lambda message, name=name: fail(f"chapters: {name}", message))
        if sizes is not None and not isinstance(sizes, dict):
            fail(f"chapters: {name}", f"expected `size: value` lines, found {sizes!r}")
        chapters[name] = sizes or {}
        for key, value in chapters[name].items():
            where = f"chapters: {name}: {key}"
            if not isinstance(key, str) or not key.isidentifier() or key.startswith("_"):
                fail(where, "the name of a size must be a Python name, because chapters read it as chapter.size.NAME")
            for part in _leaves(value):
                if isinstance(part, int | float) and not isinstance(part, bool):
                    number(where, part, 0)
    bands = {}
    for name, band in section("expected").items():
        where = f"expected: {name}"
        if not re.fullmatch(r"[a-z0-9_-]+(/[a-z0-9_-]+)+", name):
            fail(where, "expected a name such as pretrain/bits_per_byte")
        if not isinstance(band, list) or len(band) != 2 or band == [None, None]:
            fail(where, f"expected [low, high] with null for an open end, found {band!r}")
        for limit in band:
            if limit is not None:
                number(where, limit)
        if None not in band and band[0] > band[1]:
            fail(where, f"low {band[0]} is above high {band[1]}")
        bands[name] = (band[0], band[1])
    for name, value in section("seconds").items():
        _chapter_name(name, root, lambda message, name=name: fail(f"seconds: {name}", message))
        number(f"seconds: {name}", value, 0, 10**7)
    return Profile(
        raw["name"], file, raw["machine"], raw["model"], raw["precision"], raw["device"], raw["data"],
        dict(section("budget")), dict(section("world")), chapters, bands, dict(section("seconds")), raw,
    )  # fmt: skip


def _leaves(value: object) -> Iterable[object]:
    """The plain values in nested lists and mappings."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _chapter_name(name: str, root: Path, fail) -> None:
    """`name` is NN_topic, and there is such a chapter."""
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", name):
        fail("expected the name of a chapter, such as 04_attention")
    folder = root / "chapters"
    known = {path.stem for path in (*folder.glob("*.ipynb"), *folder.glob("src/*.py")) if re.match(r"\d\d_", path.stem)}
    if known and name not in known:
        fail(f"no such chapter{_hint(name, sorted(known))}")
