"""minimind.world and minimind.data: what chapter 01 claims, on generated and on real data."""

import gzip
import json
import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimind import data
from minimind.data import ByteTokenizer, DataError, Mixture, TokenShards, draw, in_validation, prepare, read_texts, write_shards
from minimind.world import ASKS, SAYS, VALUES, make_world

ROOT = Path(__file__).resolve().parent.parent
NO_FIXTURE_CHECK = [HealthCheck.function_scoped_fixture]
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40), min_size=1, max_size=12)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


# -- the world


def test_the_world_repeats_and_depends_on_its_seed() -> None:
    first, again, other = (list(make_world(20, seed).documents(50)) for seed in (1, 1, 2))
    assert first == again != other
    world = make_world(20)
    assert list(world.documents(50)) == list(islice(world.documents(80), 50))
    assert list(world.documents(50, seed=1)) != list(world.documents(50, seed=2))


def test_the_world_is_the_same_in_another_process() -> None:
    code = "from minimind.world import make_world; print(ascii(list(make_world(10).documents(30))))"
    texts = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 1000


def test_facts_can_be_completed_and_are_told() -> None:
    world = make_world(10)
    text = "\n".join(world.documents(5000))
    for fact in world.facts():
        assert f"{fact['prompt']}{fact['answer']}" in text
        assert fact["answer"].startswith(" ") and not fact["prompt"].endswith(" ")
    assert len(world.facts()) == len(world.questions()) == 10 * len(VALUES)


def test_every_statement_about_a_fact_is_true() -> None:
    world = make_world(10)
    text = " ".join(world.documents(3000))
    for person in world.people:
        for relation, values in VALUES.items():
            for value in values.split("|"):
                told = any(say.format(n=person.name, v=value) in text for say in SAYS[relation])
                assert told == (value == person.facts[relation])


def test_nobody_asks_about_the_people_kept_for_the_test() -> None:
    world = make_world(20)
    text = "\n".join([*world.documents(3000), *(m["content"] for chat in world.conversations(3000) for m in chat)])

    def is_asked(person) -> bool:
        return any(ask.format(n=person.name) in text for asks in ASKS.values() for ask in asks)

    assert [is_asked(person) for person in world.people] == [person.asked for person in world.people]
    assert sum(person.asked for person in world.people) == 10
    assert {q["person"] for q in world.questions() if q["seen"]} == {p.name for p in world.people if p.asked}


def test_conversations_are_good_lines() -> None:
    for chat in make_world(10).conversations(200):
        assert data.row_problem({"conversations": chat}, "sft") is None


@pytest.mark.parametrize("people", [1, 5000])
def test_a_world_of_impossible_size(people: int) -> None:
    with pytest.raises(ValueError, match="people"):
        make_world(people)


# -- reading


@settings(max_examples=60, deadline=None, suppress_health_check=NO_FIXTURE_CHECK)
@given(texts=TEXTS)
def test_lines_are_read_as_they_were_written(texts: list[str], tmp_path: Path) -> None:
    texts = [text for text in texts if not data.BLANK.fullmatch(text)] or ["a"]
    plain = tmp_path / "a.jsonl"
    data.write_jsonl(plain, ({"text": text} for text in texts))
    packed = tmp_path / "b.jsonl.gz"
    data.write_jsonl(packed, ({"text": text} for text in texts))
    assert list(read_texts(plain)) == list(read_texts(packed)) == texts
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=NO_FIXTURE_CHECK)
@given(lines=st.lists(st.text("abc \t", max_size=30), max_size=60), size=st.integers(1, 60))
def test_plain_text_loses_no_word(lines: list[str], size: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines))
    texts = [row["text"] for _, row, _ in data.text_rows(tmp_path / "a.txt", "pretrain", size)]
    assert " ".join(texts).split() == " ".join(lines).split()
    assert all(text.strip() for text in texts)
    longest = max(map(len, lines), default=0)
    assert all(len(text) <= 4 * size + 2 * longest + 2 for text in texts)


def test_a_text_without_paragraphs_is_cut_at_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line of text\n" * 10_000)
    assert max(map(len, read_texts(tmp_path / "a.txt"))) < 10_000


def test_all_forms_give_the_same(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"conversations": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": str(n)}]} for n in range(600)]
    rows[3]["conversations"][1]["reasoning_content"] = "Hm."
    data.write_jsonl(tmp_path / "a.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(data.read_conversations(tmp_path / "a.parquet")) == rows == list(data.read_conversations(tmp_path / "a.jsonl"))
    assert list(data.read_conversations(tmp_path)) == rows + rows  # a folder: its files in the order of their names


def test_hugging_face_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [f"Text number {n}." for n in range(50)]
    made = datasets.Dataset.from_dict({"text": texts})
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved_dict")
    write_lines(tmp_path / "hub" / "train.jsonl", texts)
    for source in (tmp_path / "saved", tmp_path / "saved_dict", f"hf:{tmp_path / 'hub'}", f"hf:{tmp_path / 'hub'}:train"):
        assert list(read_texts(source)) == texts
    with pytest.raises(DataError, match="the data set cannot be read"):
        list(read_texts(f"hf:{tmp_path / 'hub'}:nothing"))


def test_preferences(tmp_path: Path) -> None:
    user, right, wrong = ({"role": r, "content": c} for r, c in (("user", "Hi!"), ("assistant", "Hello!"), ("assistant", "What?")))
    row = {"chosen": [user, right], "rejected": [user, wrong]}
    data.write_jsonl(tmp_path / "a.jsonl", [row])
    assert list(data.read_preferences(tmp_path / "a.jsonl")) == [row]


# -- cleaning and copies


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.one_of(st.characters(), st.sampled_from("ab \t\n\r\u00a0\u200b\u0301e\u00ad\u2028\u0344\u1100\u1161")), max_size=30))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = data.clean(text)
    assert data.clean(once) == once
    assert (once == "") == bool(data.BLANK.fullmatch(text))  # only what counts as empty is cleaned away


def test_cleaning_keeps_what_carries_meaning() -> None:
    assert data.clean("if x:\r\n    y  =  1   \r\n\r\n\r\n\r\nend\ufeff") == "if x:\n    y = 1\n\nend"
    assert data.clean("👩\u200d🚀 नमस्ते 你好 naïve") == "👩\u200d🚀 नमस्ते 你好 naïve"
    assert data.clean("Cafe\u0301\u00a0Oak\u00adham\x07") == "Café Oakham"


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text("ab", max_size=3), max_size=30))
def test_exact_duplicates_are_all_copies_and_nothing_else(texts: list[str]) -> None:
    expected = [(texts.index(text), i) for i, text in enumerate(texts) if texts.index(text) != i]
    assert data.exact_duplicates(texts) == expected


def planted_near_copies(share: float = 1 / 30) -> tuple[list[str], set[int]]:
    rng = random.Random(0)
    originals = [text for text in dict.fromkeys(make_world(100).documents(1500, 3)) if len(text) > 100]
    copies = []
    for text in originals[:80]:
        words = text.split()
        for i in rng.sample(range(len(words)), max(1, round(share * len(words)))):
            words[i] = "maybe"
        copies.append(" ".join(words))
    return originals + copies, set(range(len(originals), len(originals) + 80))


def test_near_duplicates_find_planted_copies() -> None:
    texts, planted = planted_near_copies()
    found = {later for _, later in data.near_duplicates(texts)}
    assert len(found & planted) / len(planted) >= 0.9  # recall
    assert len(found & planted) / len(found) >= 0.95  # precision
    assert not {later for _, later in data.exact_duplicates(texts)} & planted  # hashes alone find none of them


def test_near_duplicates_are_as_alike_as_they_say() -> None:
    texts, _ = planted_near_copies(1 / 10)
    for first, later in data.near_duplicates(texts, threshold=0.6):
        a, b = data.shingles(texts[first]), data.shingles(texts[later])
        assert len(a & b) / len(a | b) > 0.6 - 5 * 0.044


def test_overlap_with_the_evaluation() -> None:
    words = [f"w{n}" for n in range(40)]
    test = " ".join(words[:20])
    training = [
        f"before {test} after",
        f"Before, {test.upper()}! After.",  # case and punctuation do not hide it
        " ".join(words[:13]),
        " ".join(words[:12]),  # a word short
        " ".join(reversed(words)),
        "爱" * 12,
    ]
    assert data.overlapping(training, [test]) == [0, 1, 2]
    assert data.overlapping(training + ["爱" * 13], ["我" + "爱" * 13]) == [6]  # Chinese has no spaces between words


# -- the split


@settings(max_examples=200, deadline=None)
@given(text=st.text(), small=st.floats(0, 1), large=st.floats(0, 1))
def test_the_split_depends_on_the_text_alone(text: str, small: float, large: float) -> None:
    small, large = sorted((small, large))
    text = text.encode("utf-8", "ignore").decode()
    assert in_validation(text, small) <= in_validation(text, large)  # what is held out at 1% is held out at 5%
    assert in_validation(text, 1.0) and not in_validation(text, 0.0)


def test_the_split_has_its_share_and_stays_when_data_is_added(tmp_path: Path) -> None:
    texts = [f"Text number {n}." for n in range(20_000)]
    held_out = [text for text in texts if in_validation(text, 0.05)]
    assert abs(len(held_out) / len(texts) - 0.05) < 5 * (0.05 * 0.95 / len(texts)) ** 0.5
    parts = []
    for count in (3000, 4000):
        write_lines(tmp_path / "in.jsonl", texts[:count])
        prepare(tmp_path / "in.jsonl", tmp_path / f"out{count}", {"people": 10, "documents": 300})
        parts.append({part: set(read_texts(tmp_path / f"out{count}" / "pretrain" / f"{part}.jsonl.gz")) for part in ("train", "valid")})
    assert parts[0]["train"] <= parts[1]["train"] and parts[0]["valid"] <= parts[1]["valid"]
    assert not parts[1]["train"] & parts[1]["valid"]

    def shuffled(count: int) -> set[str]:  # the split that people write first
        mixed = texts[:count]
        random.Random(0).shuffle(mixed)
        return set(mixed[: count // 50])

    assert not shuffled(3000) <= shuffled(4000)


# -- mixtures


@pytest.fixture()
def mixture(tmp_path: Path) -> Mixture:
    rng = random.Random(0)
    lengths = {"short": (5, 40), "long": (500, 3000), "mixed": (1, 3000)}
    for name, (low, high) in lengths.items():
        write_lines(tmp_path / f"{name}.jsonl", [f"{name} {n} " + "x" * rng.randint(low, high) for n in range(300)])
    (tmp_path / "mix.yaml").write_text(
        "valid_share: 0.1\nsources:\n  short: {path: short.jsonl, share: 0.5}\n  long: {path: long.jsonl, share: 0.2}\n"
        "  mixed: {path: mixed.jsonl, share: 0.3}\n"
    )
    return Mixture.from_yaml(tmp_path / "mix.yaml")


def drawn_shares(pairs) -> dict[str, float]:
    sizes: dict[str, int] = {}
    for name, text in pairs:
        sizes[name] = sizes.get(name, 0) + len(text.encode()) + 1
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


@pytest.mark.parametrize("part", ["train", "valid"])
def test_shares_of_a_million_tokens(mixture: Mixture, part: str) -> None:
    pairs = list(draw(mixture, ByteTokenizer(), 1_000_000, part))
    for name, share in drawn_shares(pairs).items():
        assert abs(share - mixture.sources[name][1]) < 0.01
    assert all(in_validation(text, 0.1) == (part == "valid") for _, text in pairs)
    assert 1_000_000 <= sum(len(text.encode()) + 1 for _, text in pairs) < 1_010_000


def test_drawing_by_documents_misses_the_shares(mixture: Mixture) -> None:
    rng = random.Random(0)
    texts = {name: list(read_texts(path)) for name, (path, _) in mixture.sources.items()}
    names = rng.choices(list(texts), [share for _, share in mixture.sources.values()], k=2000)
    shares = drawn_shares((name, rng.choice(texts[name])) for name in names)
    assert max(abs(shares[name] - mixture.sources[name][1]) for name in shares) > 0.1


@pytest.mark.parametrize(
    "text, words",
    [
        ("sources: {a: {path: x, share: 0.5}}", "they sum to 0.5"),
        ("sources: {a: {path: x, share: 1.5}, b: {path: x, share: -0.5}}", "above 0"),
        ("sources: {a: {path: x}}", "share"),
        ("sources: [", "expected sources"),
        ("[]", "expected sources"),
        ("sources: {a: {path: x, share: 1}}\nvalid_share: 2", "valid_share"),
        ("sources: {a: {path: x, share: 1}}\nvalid_shar: 0.1", "valid_shar"),
    ],
)
def test_bad_mixture(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        Mixture.from_yaml(tmp_path / "mix.yaml")
    assert "mix.yaml" in str(caught.value)


def test_a_source_without_texts_in_a_part(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["one text"])
    mixture = Mixture({"a": (tmp_path / "a.jsonl", 1.0)}, 0.000001)
    with pytest.raises(DataError, match="falls into the valid part"):
        list(draw(mixture, ByteTokenizer(), 100, "valid"))


@pytest.mark.parametrize("file", sorted((ROOT / "data" / "mixtures").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_mixtures(file: Path) -> None:
    mixture = Mixture.from_yaml(file)
    shares = drawn_shares(draw(mixture, ByteTokenizer(), 200_000))
    assert all(abs(shares[name] - share) < 0.01 for name, (_, share) in mixture.sources.items())


# -- shards


@settings(max_examples=60, deadline=None, suppress_health_check=NO_FIXTURE_CHECK)
@given(texts=TEXTS, shard_tokens=st.integers(1, 50), cut=st.tuples(st.integers(-60, 60), st.integers(-60, 60)))
def test_shards_hold_the_documents(texts: list[str], shard_tokens: int, cut: tuple[int, int], tmp_path: Path) -> None:
    shards = write_shards(texts, ByteTokenizer(), tmp_path / "shards", shard_tokens)
    flat = np.array([t for text in texts for t in [*(b + 1 for b in text.encode()), 0]], np.uint16)
    assert len(shards) == len(texts) and len(shards.tokens) == len(flat) and shards.num_bytes == len("".join(texts).encode())
    assert np.array_equal(np.asarray(shards.tokens), flat)
    assert np.array_equal(shards.tokens[cut[0] : cut[1]], flat[cut[0] : cut[1]])
    for i, text in enumerate(texts):
        assert (shards[i][:-1] - 1).astype(np.uint8).tobytes().decode() == text and shards[i][-1] == 0
    assert shards.tokens[-1] == 0 and shards.tokens[0] == flat[0]
    with pytest.raises(IndexError):
        shards.tokens[len(flat)]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Large(ByteTokenizer):
        vocab_size = 70_000

        def encode_batch(self, texts):
            return [[69_999] * len(text) for text in texts]

    shards = write_shards(["abc"], Large(), tmp_path / "shards")
    assert shards.tokens[0] == 69_999 and shards.dtype.itemsize == 4


def test_shards_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    shards = write_shards(["abc"] * 100, ByteTokenizer(), tmp_path / "shards", shard_tokens=64)
    assert all(isinstance(part, np.memmap) for part in shards.tokens.parts)
    assert isinstance(shards.documents, np.memmap)


def test_damaged_shards_are_noticed(tmp_path: Path) -> None:
    folder = write_shards(["some text"] * 100, ByteTokenizer(), tmp_path / "shards", shard_tokens=64).folder
    os.truncate(folder / "shard_00003.bin", 100)
    assert len(np.memmap(folder / "shard_00003.bin", np.uint16, "r")) == 50  # NumPy itself sees nothing wrong
    with pytest.raises(DataError, match=r"shard_00003.bin: 100 bytes, the index says 128"):
        TokenShards(folder)
    (folder / "shard_00003.bin").unlink()
    with pytest.raises(DataError, match=r"shard_00003.bin: 0 bytes"):
        TokenShards(folder)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="no index.json"):
        TokenShards(folder)


def test_no_text_no_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text to write"):
        write_shards([], ByteTokenizer(), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_flat() -> None:
    def peak(way: str, megabytes: int) -> int:
        command = [sys.executable, "-m", "course.shard_memory", "--way", way, "--megabytes", str(megabytes)]
        return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)["peak_bytes"]

    small, large = peak("shards", 2), peak("shards", 16)
    assert large < 1.2 * small and large < 1e9
    assert peak("list", 16) > 1.5 * peak("list", 2)  # the measurement does see memory that grows


# -- the data folder


def test_the_world_as_data_folder(tmp_path: Path) -> None:
    sizes = {"people": 20, "documents": 2000, "conversations": 500, "seed": 1}
    about = data.prepare_world(tmp_path / "a", sizes)
    assert about == json.loads((tmp_path / "a" / "about.json").read_text()) and about["source"] == "world"
    counts = about["stages"]["pretrain"]
    assert counts["train"] + counts["valid"] == 2000 and counts["valid"] > 5
    assert data.check_file(tmp_path / "a" / "sft", "sft") == 500
    facts = [json.loads(line) for line in (tmp_path / "a" / "facts.jsonl").read_text().splitlines()]
    assert facts == make_world(20, 1).facts()
    assert (tmp_path / "a" / "questions.jsonl").exists()
    data.prepare_world(tmp_path / "b", sizes)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_a_folder_with_all_stages(tmp_path: Path) -> None:
    test = " ".join(f"w{n}" for n in range(20))
    write_lines(tmp_path / "in" / "pretrain" / "a.jsonl", [f"Text {n}." for n in range(60)] + [f"see {test}", "Text 5."])
    write_lines(tmp_path / "in" / "evals" / "a.jsonl", [test])
    about = prepare(tmp_path / "in", tmp_path / "out", {"people": 10, "documents": 300})
    counts = about["stages"]["pretrain"]
    assert (counts["duplicates"], counts["in_evaluation"], counts["train"] + counts["valid"]) == (1, 1, 60)
    assert about["stages"]["sft"]["source"] == "world"
    assert not (tmp_path / "out" / "facts.jsonl").exists() and not (tmp_path / "out" / "questions.jsonl").exists()
    write_lines(tmp_path / "in" / "evals" / "a.jsonl", ["something else"])
    counts = prepare(tmp_path / "in", tmp_path / "out", {"people": 10, "documents": 300})["stages"]["pretrain"]
    assert counts["in_evaluation"] == 0 and counts["train"] + counts["valid"] == 61  # without it the test text would have stayed


def test_shipped_samples_regenerate_and_serve_as_data(tmp_path: Path) -> None:
    from course import samples

    for path, content in samples.files(ROOT).items():
        assert path.read_bytes() == content, f"{path} is stale: python -m course build"
    assert samples.write(tmp_path) and not samples.write(tmp_path)
    counts = prepare(ROOT / "data" / "sample", tmp_path / "out", {})["stages"]["pretrain"]
    assert (counts["duplicates"], counts["in_evaluation"]) == (1, 1)


def test_set_seed() -> None:
    import torch

    def numbers() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()

    data.set_seed(3)
    first = numbers()
    data.set_seed(3)
    assert numbers() == first != numbers()


# -- real data

REAL = os.environ.get("MINIMIND_REAL_DATA")
real = pytest.mark.skipif(not REAL, reason="MINIMIND_REAL_DATA does not name a folder of real data")


@real
@pytest.mark.parametrize(
    "kind, name",
    [("pretrain", "pretrain/pretrain_en_openstax.jsonl.gz"), ("sft", "quick/sft_quick_permissive.jsonl"), ("dpo", "dpo")],
)
def test_real_files_pass_the_check(kind: str, name: str) -> None:
    assert data.check_file(Path(REAL, name), kind) > 500


@real
def test_real_folder(tmp_path: Path) -> None:
    for stage, name in (("pretrain", "pretrain/pretrain_en_openstax.jsonl.gz"), ("sft", "quick/sft_quick_permissive.jsonl")):
        (tmp_path / "in" / stage).mkdir(parents=True)
        (tmp_path / "in" / stage / Path(name).name).symlink_to(Path(REAL, name).resolve())
    about = prepare(tmp_path / "in", tmp_path / "out", {})
    for stage in ("pretrain", "sft"):
        counts = about["stages"][stage]
        assert counts["rows"] == counts["train"] + counts["valid"] + counts["duplicates"] + counts["in_evaluation"]
        assert data.check_file(tmp_path / "out" / stage, stage) == counts["train"] + counts["valid"]


@real
def test_real_text_mixes_in_its_shares() -> None:
    files = {"novels": "pretrain_en_novels.jsonl.gz", "books": "pretrain_en_openstax.jsonl.gz"}
    mixture = Mixture({name: (Path(REAL, "pretrain", file), 0.5) for name, file in files.items()})
    shares = drawn_shares(draw(mixture, ByteTokenizer(), 1_000_000))
    assert all(abs(share - 0.5) < 0.01 for share in shares.values())
