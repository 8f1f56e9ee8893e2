"""Bad input: each kind gets `file:line: what is wrong`, before anything is written, and each safeguard is needed.

The second half of a case says what to switch off; then the bad input must pass, or end in an error that no reader understands.
"""

import contextlib
import errno
import gzip
import json
import os
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimind import data
from minimind.data import DataError, check_file, prepare, read_texts, write_shards

GOOD = b'{"text": "Tilda lives in Oakham."}\n'
USER, ASSISTANT = {"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}


def chat(*messages: dict) -> bytes:
    return json.dumps({"conversations": list(messages)}).encode() + b"\n"


def pair(chosen: list, rejected: list) -> bytes:
    return json.dumps({"chosen": chosen, "rejected": rejected}).encode() + b"\n"


def no_problem(*args) -> None:
    return None


# name: (kind, the bad line, words of the message, the safeguard)
LINES = {
    "not JSON": ("pretrain", b'{"text": "Tilda\n', "not JSON", None),
    "not JSON, deeply nested": ("pretrain", b"[" * 100_000 + b"\n", "not JSON", None),
    "not an object": ("pretrain", b'["Tilda"]\n', "the line is a JSON list", None),
    "wrong key": ("pretrain", b'{"txt": "Tilda"}\n', 'the key "text" is missing; found: "txt"', None),
    "text is a number": ("pretrain", b'{"text": 7}\n', '"text" is int', "text_problem"),
    "empty text": ("pretrain", b'{"text": " \\u200b\\n"}\n', '"text" is empty', "text_problem"),
    "NUL written out": ("pretrain", b'{"text": "a\\u0000b"}\n', "NUL byte at character 2", "text_problem"),
    "NUL in the file": ("pretrain", b'{"text": "a\0b"}\n', "NUL byte at byte 12", None),
    "half a character": ("pretrain", b'{"text": "\\ud83d"}\n', "half a character", "text_problem"),
    "wrong encoding": ("pretrain", '{"text": "café"}\n'.encode("latin-1"), "not UTF-8 (byte 0xe9 at byte 14)", None),
    "wrong keys of a chat": ("sft", b'{"messages": []}\n', 'the key "conversations" is missing; found: "messages"', None),
    "empty chat": ("sft", chat(), "the list is empty", "chat_problem"),
    "wrong role": ("sft", chat(USER, {"role": "bot", "content": "Hello!"}), "conversations[1] has the role 'bot'", "chat_problem"),
    "wrong order": ("sft", chat(ASSISTANT, USER), "in the order assistant, user", "chat_problem"),
    "no answer": ("sft", chat(USER), "ending with assistant", "chat_problem"),
    "two questions": ("sft", chat(USER, USER, ASSISTANT), "in the order user, user, assistant", "chat_problem"),
    "empty answer": ("sft", chat(USER, {"role": "assistant", "content": ""}), '"conversations[1].content" is empty', "message_problem"),
    "no content": ("sft", chat(USER, {"role": "assistant"}), '"conversations[1].content" is NoneType', "message_problem"),
    "message is a string": ("sft", b'{"conversations": ["Hi!"]}\n', "conversations[0] is str", "message_problem"),
    "pair without rejected": ("dpo", b'{"chosen": []}\n', 'the key "rejected" is missing', None),
    "pair with two prompts": (
        "dpo",
        pair([USER, ASSISTANT], [{**USER, "content": "Bye!"}, ASSISTANT]),
        "must answer the same prompt",
        None,
    ),
}
FIRST = {"pretrain": GOOD, "sft": chat(USER, ASSISTANT), "dpo": pair([USER, ASSISTANT], [USER, {**ASSISTANT, "content": "What?"}])}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, line, words, safeguard = LINES[name]
    file = tmp_path / "bad.jsonl"
    file.write_bytes(FIRST[kind] + line + FIRST[kind])
    with pytest.raises(DataError) as caught:
        check_file(file, kind)
    assert f"{file}:2: " in str(caught.value) and words in str(caught.value)
    assert "1 bad line;" in str(caught.value)
    if safeguard and safeguard != "message_problem":
        monkeypatch.setattr(data, safeguard, no_problem)
        assert check_file(file, kind) == 3  # without the safeguard nobody notices
    elif safeguard:
        monkeypatch.setattr(data, safeguard, no_problem)
        with contextlib.suppress(TypeError):  # a string has no role
            assert check_file(file, kind) == 3
    elif "JSON" not in name and "NUL" not in name and "encoding" not in name:
        monkeypatch.setattr(data, "row_problem", no_problem)
        assert check_file(file, kind) == 3


def test_each_form_of_good_line_passes(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": '[{"name": "sum"}]'}
    tool, system = {"role": "tool", "content": "3"}, {"role": "system", "content": "# Tools", "tools": "[]"}
    thought = {"role": "assistant", "content": "3.", "reasoning_content": "One and two."}
    chats = [chat(USER, ASSISTANT), chat(system, USER, call), chat(system, USER, call, tool, call, tool, tool, thought, USER, ASSISTANT)]
    (tmp_path / "chats.jsonl").write_bytes(b"\n".join(chats) + b"\n \n")  # blank lines hold nothing that could be lost
    assert check_file(tmp_path / "chats.jsonl", "sft") == 3
    (tmp_path / "text.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b'{"text": "a", "id": 1}')
    assert list(read_texts(tmp_path / "text.jsonl")) == ["Tilda lives in Oakham.", "a"]


def test_all_bad_lines_are_listed_the_first_20_in_full(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b"".join(b"?\n" if n % 3 else GOOD for n in range(1, 91)))
    with pytest.raises(DataError) as caught:
        check_file(file, "pretrain")
    *full, rest, total = str(caught.value).splitlines()
    bad = [n for n in range(1, 91) if n % 3]
    assert [int(line.removeprefix(f"{file}:").split(":")[0]) for line in full] == bad[:20]
    listed = []
    for span in rest.removeprefix(f"{file}: also lines ").split(", "):
        low, _, high = span.partition("-")
        listed += range(int(low), int(high or low) + 1)
    assert listed == bad[20:]
    assert total.startswith("60 bad lines; nothing was written")


def test_problems_of_a_whole_folder_come_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"?\n")
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(DataError) as caught:
        check_file(tmp_path, "pretrain")
    text = str(caught.value)
    assert f"{tmp_path / 'a.jsonl'}:2: not JSON" in text
    assert f"{tmp_path / 'b.jsonl'}:1: the file is empty" in text
    assert f"{tmp_path / 'c.txt'}:2: not UTF-8" in text
    assert "3 bad lines" in text


def test_problems_of_all_stages_come_together(tmp_path: Path) -> None:
    for stage, content in {"pretrain": b"?\n", "sft": chat(USER), "dpo": b"{}\n", "evals": b"[]\n"}.items():
        (tmp_path / "in" / stage).mkdir(parents=True)
        (tmp_path / "in" / stage / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "in", tmp_path / "out", {})
    for stage in ("pretrain", "sft", "dpo", "evals"):
        assert f"{tmp_path / 'in' / stage / 'x.jsonl'}:1: " in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        (gzip.compress(GOOD * 1000)[:-30], "broken gzip"),
        (gzip.compress(GOOD * 1000)[:60] + b"\xff" * 20, "broken gzip"),
        (gzip.compress(GOOD * 1000)[:-8] + b"\0" * 8, "broken gzip"),
        (b"<html>not found</html>", "the content is not gzip"),
        (b"", "the file is empty"),
    ],
    ids=["cut off", "damaged", "wrong checksum", "not gzip", "empty"],
)
def test_broken_gzip(content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.jsonl.gz"
    file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        check_file(file, "pretrain")
    with pytest.raises(DataError, match=words):
        list(read_texts(file))
    if words == "broken gzip":  # what a reader would see without the safeguard
        with pytest.raises((EOFError, zlib.error, gzip.BadGzipFile)):
            with gzip.open(file) as opened:
                opened.read()


def test_gzip_under_another_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_bytes(gzip.compress(GOOD))
    assert list(read_texts(tmp_path / "text.jsonl")) == ["Tilda lives in Oakham."]


def test_10_megabytes_on_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "long.jsonl"
    file.write_bytes(GOOD + b'{"text": "' + b"x" * 10_000_000 + b'"}\n' + GOOD + b"?\n")
    with pytest.raises(DataError) as caught:
        check_file(file, "pretrain")
    assert f"{file}:2: the line has 10,000,013 bytes" in str(caught.value)
    assert f"{file}:4: not JSON" in str(caught.value)  # the lines after it keep their numbers
    monkeypatch.setattr(data, "MAX_LINE", 20_000_000)
    file.write_bytes(file.read_bytes().replace(b"?\n", GOOD))
    assert check_file(file, "pretrain") == 4


def test_the_longest_line_allowed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_LINE", len(GOOD) - 1)
    (tmp_path / "a.jsonl").write_bytes(GOOD + GOOD.strip())
    assert check_file(tmp_path / "a.jsonl", "pretrain") == 2
    monkeypatch.setattr(data, "MAX_LINE", len(GOOD) - 2)
    with pytest.raises(DataError, match="2 bad lines"):
        check_file(tmp_path / "a.jsonl", "pretrain")


def test_utf16_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("Tilda lives in Oakham.".encode("utf-16"))
    with pytest.raises(DataError, match=r"text.txt:1: .*UTF-16: convert it with `iconv"):
        check_file(tmp_path / "text.txt", "pretrain")


def test_missing_file_and_folder_without_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        check_file(tmp_path / "nothing.jsonl", "pretrain")
    with pytest.raises(DataError, match="no file in this folder can be read"):
        check_file(tmp_path, "pretrain")
    (tmp_path / "notes.docx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"known are .jsonl, .json, .txt, .parquet"):
        check_file(tmp_path, "pretrain")
    with pytest.raises(DataError, match="unknown kind of file"):
        check_file(tmp_path / "notes.docx", "pretrain")


@pytest.mark.parametrize("content", [b"", b"\n \n\n"], ids=["no bytes", "blank lines"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_empty_file(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}:1: the file is empty"):
        check_file(tmp_path / name, "pretrain")


def test_plain_text_is_no_chat(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hi!\n")
    with pytest.raises(DataError, match="plain text where chats are expected"):
        check_file(tmp_path / "a.txt", "sft")


def test_broken_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None, ""] * 100}), file)
    with pytest.raises(DataError) as caught:
        check_file(file, "pretrain")
    assert f'{file}:2: the key "text" is missing' in str(caught.value) and f'{file}:3: "text" is empty' in str(caught.value)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet:1: broken Parquet"):
        check_file(file, "pretrain")


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str):
        raise ImportError(name)

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(data.importlib, "import_module", absent)
    with pytest.raises(DataError, match=f"pip install {package}"):
        check_file(tmp_path / "a.parquet" if package == "pyarrow" else "hf:someone/texts", "pretrain")


def test_data_set_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="the data set cannot be read"):
        check_file(f"hf:{tmp_path}/nothing", "pretrain")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no file size limit on this system")
def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    import resource

    texts = [f"{n} {os.urandom(50).hex()}" for n in range(20_000)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # to the writer, a limit on the size of a file looks as a full disk does: a write fails half-way
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        with pytest.raises(DataError, match="the disk is full; nothing was kept"):
            prepare(tmp_path / "in.jsonl", tmp_path / "out", {})
        with pytest.raises(DataError, match="the disk is full; nothing was kept"):
            write_shards(texts, data.ByteTokenizer(), tmp_path / "shards")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_no_space_left_on_the_device(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the disk is full") as caught, data.new_folder(tmp_path / "out") as folder:
        (folder / "x.jsonl.gz").symlink_to("/dev/full")
        data.write_jsonl(folder / "x.jsonl.gz", [{"text": os.urandom(50_000).hex()}])
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_older_result(tmp_path: Path) -> None:
    tokenizer = data.ByteTokenizer()
    write_shards(["first"], tokenizer, tmp_path / "shards")

    def texts():
        yield "second"
        raise DataError("in the middle")

    with pytest.raises(DataError, match="in the middle"):
        write_shards(texts(), tokenizer, tmp_path / "shards")
    assert len(data.TokenShards(tmp_path / "shards").tokens) == len("first") + 1
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_too_few_texts_to_hold_some_back(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("One short text.")
    with pytest.raises(DataError, match="too few to hold some back"):
        prepare(tmp_path / "in.txt", tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_nothing_is_dropped_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "in" / "pretrain").mkdir(parents=True)
    texts = [f"Text number {n}." for n in range(100)]
    (tmp_path / "in" / "pretrain" / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, *texts[:7]]))
    (tmp_path / "in" / "pretrain" / "b.csv").write_text("a,b")
    about = prepare(tmp_path / "in", tmp_path / "out", {"people": 10, "documents": 200})
    counts = about["stages"]["pretrain"]
    assert counts["rows"] == 107 == counts["train"] + counts["valid"] + counts["duplicates"] + counts["in_evaluation"]
    assert counts["duplicates"] == 7
    kept = [t for part in ("train", "valid") for t in read_texts(tmp_path / "out" / "pretrain" / f"{part}.jsonl.gz")]
    assert sorted(kept) == sorted(texts)
    said = capsys.readouterr().out
    assert "b.csv was not read" in said and "has no sft/: the world's data is used" in said
    assert json.loads((tmp_path / "out" / "about.json").read_text()) == about


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), kind=st.sampled_from(["pretrain", "sft", "dpo", "evals"]), name=st.sampled_from(["a.jsonl", "a.txt"]))
def test_any_bytes_pass_or_give_a_data_error(content: bytes, kind: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with contextlib.suppress(DataError):
        assert check_file(file, kind) > 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["text", "conversations", "chosen", "rejected", "role", "content", "tool_calls"]), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(row=JSON, kind=st.sampled_from(["pretrain", "sft", "dpo", "evals"]))
def test_any_json_is_judged_without_falling_over(row: object, kind: str) -> None:
    problem = data.row_problem(row, kind)
    assert problem is None or problem.strip()
    if problem is None and kind == "pretrain":
        assert data.clean(row["text"])  # what passes the check is never cleaned away
