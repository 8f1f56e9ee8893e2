"""Profiles: every mistake is an error that names the file and the key."""

import shutil

import pytest
import yaml

from course.profile import MODELS, ProfileError, load, load_file, names

NAMES = ["cpu", "gpu", "smoke", "t4"]


@pytest.fixture
def course(tmp_path, root):
    """A copy of the profiles and of the names of the chapters, to spoil."""
    shutil.copytree(root / "profiles", tmp_path / "profiles")
    (tmp_path / "chapters").mkdir()
    for path in (root / "chapters" / "src").glob("*.py"):
        (tmp_path / "chapters" / f"{path.stem}.ipynb").write_text("{}")
    return tmp_path


def spoil(course, change) -> str:
    """Load profiles/cpu.yaml after `change` edited it; the message of the error that this must give."""
    path = course / "profiles" / "cpu.yaml"
    raw = yaml.safe_load(path.read_text())
    change(raw)
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ProfileError) as caught:
        load("cpu", course)
    return str(caught.value)


def test_the_four_profiles_are_valid(root):
    assert names(root) == NAMES
    for name in NAMES:
        profile = load(name, root)
        assert profile.name == name and profile.world["people"] >= 5


def test_every_section_names_a_chapter(root):
    chapters = {path.stem for path in (root / "chapters" / "src").glob("*.py")}
    for name in NAMES:
        profile = load(name, root)
        assert set(profile.chapters) | set(profile.seconds) <= chapters, name


def test_models_are_the_presets_of_the_package():
    from minimind.model import ModelConfig

    for name in MODELS:
        ModelConfig.preset(name)
    with pytest.raises((KeyError, ValueError)):
        ModelConfig.preset("no-such-model")


def test_a_profile_must_exist(root):
    with pytest.raises(ProfileError, match="'smokey'; did you mean 'smoke'"):
        load("smokey", root)


@pytest.mark.parametrize(
    "key, change, words",
    [
        ("modle", lambda raw: raw.update(modle="tiny"), "did you mean 'model'"),
        ("model", lambda raw: raw.update(model="minimind9"), "minimind9"),
        ("precision", lambda raw: raw.update(precision="fp8"), "fp8"),
        ("device", lambda raw: raw.update(device="gpu0"), "gpu0"),
        ("machine", lambda raw: raw.pop("machine"), "missing"),
        ("name", lambda raw: raw.update(name="other"), "differs from the name of the file"),
        ("world: peopel", lambda raw: raw["world"].update(peopel=3), "did you mean 'people'"),
        ("world: people", lambda raw: raw["world"].update(people=0), "out of range"),
        ("world: people", lambda raw: raw["world"].update(people=20.5), "whole number"),
        ("world: seed", lambda raw: raw["world"].update(seed=True), "expected a number"),
        ("budget: minutes", lambda raw: raw["budget"].update(minutes=-1), "out of range"),
        ("budget: minutes", lambda raw: raw["budget"].update(minutes=float("nan")), "expected a number"),
        ("chapters: 04_atention", lambda raw: raw["chapters"].update({"04_atention": {}}), "did you mean '04_attention'"),
        ("chapters: 99_nothing", lambda raw: raw["chapters"].update({"99_nothing": {}}), "no such chapter"),
        ("chapters: attention", lambda raw: raw["chapters"].update(attention={}), "such as 04_attention"),
        ("chapters: 04_attention: steps", lambda raw: raw["chapters"].update({"04_attention": {"steps": -5}}), "out of range"),
        ("chapters: 04_attention: two words", lambda raw: raw["chapters"].update({"04_attention": {"two words": 5}}), "Python name"),
        ("chapters: 04_attention", lambda raw: raw["chapters"].update({"04_attention": 7}), "size: value"),
        ("expected: x/y", lambda raw: raw.update(expected={"x/y": [3, 2]}), "above high"),
        ("expected: x/y", lambda raw: raw.update(expected={"x/y": [3]}), "low, high"),
        ("expected: x/y", lambda raw: raw.update(expected={"x/y": [None, None]}), "low, high"),
        ("expected: x/y", lambda raw: raw.update(expected={"x/y": ["a", 2]}), "expected a number"),
        ("expected: x", lambda raw: raw.update(expected={"x": [1, 2]}), "pretrain/bits_per_byte"),
        ("seconds: 04_attention", lambda raw: raw.update(seconds={"04_attention": -2}), "out of range"),
        ("seconds: 4_attention", lambda raw: raw.update(seconds={"4_attention": 2}), "such as 04_attention"),
    ],
)
def test_a_wrong_key_is_named(course, key, change, words):
    message = spoil(course, change)
    assert f"profiles/cpu.yaml: {key}: " in message and words in message, message


@pytest.mark.parametrize("text, words", [("name: cpu\nname: gpu\n", "'name' stands twice"), ("- 1\n", "found list"), ("a: b: c\n", "not valid YAML")])
def test_a_file_that_cannot_be_read_as_keys(course, text, words):
    (course / "profiles" / "cpu.yaml").write_text(text)
    with pytest.raises(ProfileError, match="profiles/cpu.yaml") as caught:
        load("cpu", course)
    assert words in str(caught.value)


def test_yaml_alone_would_take_the_second_of_two_keys_and_read_3e_4_as_text():
    """Why the profile has a reader of its own."""
    assert yaml.safe_load("a: 1\na: 2") == {"a": 2}
    assert yaml.safe_load("rate: 3e-4") == {"rate": "3e-4"}


def test_numbers_with_exponents_are_numbers(course):
    path = course / "profiles" / "cpu.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["chapters"]["04_attention"] = {"rate": "RATE", "name": "abc"}
    path.write_text(yaml.safe_dump(raw).replace("RATE", "3e-4"))
    size = load("cpu", course).sizes("04_attention")
    assert size.rate == 3e-4 and size.name == "abc"


def test_an_unknown_size_names_profile_and_key(root):
    profile = load("smoke", root)
    profile.chapters["04_attention"] = {"steps": 5}
    size = profile.sizes("04_attention")
    assert size.steps == 5
    with pytest.raises(AttributeError, match=r"profiles/smoke.yaml: no size 'stesp' under chapters: 04_attention:; did you mean 'steps'"):
        size.stesp  # noqa: B018
    with pytest.raises(AttributeError, match="not in a chapter"):
        size.steps = 6


def test_overrides_are_checked_like_the_file(root):
    assert load("gpu", root, ["model=minimind3"]).model == "minimind3"
    assert load("cpu", root, ["world.people=7", "precision=fp32"]).world["people"] == 7
    for text, words in [
        ("modle=tiny", "did you mean 'model'"),
        ("model", "expected key=value"),
        ("world.peopel=7", "did you mean 'people'"),
        ("world.people=0", "out of range"),
        ("chapters.99_nothing.steps=1", "no section 'chapters.99_nothing'"),
        ("chapters.00_start_here.no_such_size=1", "no_such_size"),
    ]:
        with pytest.raises(ProfileError) as caught:
            load("cpu", root, [text])
        assert words in str(caught.value), text


def test_a_copy_elsewhere_is_named_by_its_path(tmp_path, root):
    copy = tmp_path / "profile.yaml"
    copy.write_text((root / "profiles" / "cpu.yaml").read_text())
    assert load_file(copy, root).raw == load("cpu", root).raw
    copy.write_text("name: cpu\n")
    with pytest.raises(ProfileError, match=str(copy)):
        load_file(copy, root)
