"""`course bench`: what it counts, and that one small run writes what it prints."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from course import bench
from minimind.model import MiniMind, ModelConfig
from minimind.sft import chat_example
from minimind.tokenizer import Tokenizer
from minimind.world import World

ROOT = Path(__file__).resolve().parent.parent


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(ROOT / "data/checkpoints/tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A little text in the form of a data folder."""
    world, root = World(people=10, seed=1), tmp_path_factory.mktemp("data")
    rows = {"pretrain": [{"text": t} for t in world.documents(300)],
            "sft": [{"conversations": c} for c in world.conversations(60)]}
    for stage, lines in rows.items():
        (root / stage).mkdir()
        (root / stage / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_padding_is_not_counted(tokenizer, tmp_path):
    """Real tokens by hand: documents cut to the row, packed rows all real, packed chats without their padding."""
    args = arguments("--batch", "2", "--row", "16", "--chat-row", "64")
    texts = ["Garus lives in Foxhollow.", "No.", "One day Tilda found a brass key by the river, so the gate broke. It was a good day."] * 20
    task = bench.Task("pretrain", texts, tokenizer, args, torch.device("cpu"), tmp_path)
    lengths = [min(len(tokenizer.encode(text)) + 1, 16) for text in texts]
    first = bench.WARMUP * 2
    assert min(lengths) < max(lengths) == 16
    assert task.padded_tokens(3, 2) == sum(lengths[first : first + 6])
    assert task.packed_tokens(3) == 3 * 2 * 16
    ids, labels = task.padded[1]
    assert (labels[lengths[1] :] == -100).all() and len(ids) == 16

    chats = [[{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]] * 40
    task = bench.Task("chat", chats, tokenizer, args, torch.device("cpu"), tmp_path)
    size = len(chat_example(tokenizer, chats[0])[0])
    assert task.padded_tokens(2, 2) == 4 * size, "all tokens of a conversation, not the row of 64"
    rows = task.packed[bench.WARMUP]["input_ids"]
    assert task.packed_tokens(1) == rows.numel() - int((rows == 0).sum()) < rows.numel(), "64 is no multiple of the length: there is padding"


def test_the_model_sees_the_same_text_in_rows_for_trainer(tokenizer, tmp_path):
    args = arguments("--batch", "2", "--row", "16")
    texts = list(World(people=10, seed=1).documents(40))
    rows = bench.Task("pretrain", texts, tokenizer, args, torch.device("cpu"), tmp_path).rows(5)
    stream = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert torch.cat([row["input_ids"] for row in rows]).tolist() == stream[: 5 * 16]


@pytest.mark.timeout(600)
def test_one_small_run(folder, tmp_path, capsys, monkeypatch):
    """As on a machine without a compiler: compiling twice would take most of the time."""
    monkeypatch.setattr("course.machine.compiler", lambda: None)
    out = tmp_path / "bench.json"
    args = arguments("--models", "tiny", "--text", "pretrain,chat", "--loops", "ours,uncompiled,plain,trainer", "--steps", "1", "--rounds", "1",
                     "--batch", "2", "--row", "64", "--chat-row", "256", "--data", str(folder), "--out", str(out))
    assert bench.main(args) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert [(row["model"], row["text"]) for row in result["rows"]] == [("tiny", "pretrain"), ("tiny", "chat")]
    assert result["compiled"] is False and "no C++ compiler" in printed
    for row in result["rows"]:
        speed = row["tokens_per_second"]
        assert set(speed) == {"ours", "plain", "trainer"} and min(speed.values()) > 0
        assert row["ratio"]["plain"] == pytest.approx(speed["ours"] / speed["plain"])
        assert f"{row['ratio']['plain']:.2f}x plain" in printed
    fill = result["rows"][1]["fill"]
    assert 0 < fill < 0.5, "chats are far shorter than a row of 256"
    # Three quarters of the plain loop's work is padding: this ratio holds on any machine.
    assert result["rows"][1]["ratio"]["plain"] > 1.5
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("can", [True, False])
def test_ours_is_compiled_where_that_can_be(can, tokenizer, tmp_path, monkeypatch):
    args, compiled = arguments("--batch", "2", "--row", "16", "--steps", "1"), []
    args.compile = can
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or function)
    task = bench.Task("pretrain", list(World(people=10, seed=1).documents(40)), tokenizer, args, torch.device("cpu"), tmp_path)
    model = MiniMind(ModelConfig.preset("tiny", num_hidden_layers=1))
    for loop in (bench.uncompiled, bench.ours):
        seconds, tokens = loop(model, task, args, torch.device("cpu"))
        assert seconds > 0 and tokens == 2 * 16
    assert compiled == (["pretrain_loss"] if can else []), "model and loss as one, and `uncompiled` never"


@pytest.mark.parametrize("words, named", [(("--loops", "ours,magic"), "magic"), (("--text", "poems"), "poems"), (("--models", "huge"), "huge")])
def test_unknown_names_are_named(words, named, capsys):
    assert bench.main(arguments(*words)) == 2
    assert named in capsys.readouterr().out
