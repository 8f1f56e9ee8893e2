"""`python -m minimind.chat FOLDER`: ours and other people's folders, errors in one line, no network."""

import io
import json
import socket
import subprocess
import sys

import pytest
import torch

from minimind import chat
from minimind.model import MiniMind, ModelConfig
from minimind.tokenizer import Tokenizer

SIZES = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             intermediate_size=64, max_position_embeddings=96, tie_word_embeddings=False)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    torch.manual_seed(0)
    MiniMind(ModelConfig.preset("tiny", **SIZES, initializer_range=0.3)).save_pretrained(folder)
    Tokenizer.train(["one two three four five user assistant"] * 3, 320).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the chat opened a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def copy(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_one_shot_prints_an_answer_and_repeats_itself(folder, capsys):
    arguments = [str(folder), "--prompt", "one two", "--max-new-tokens", "12"]
    outputs = []
    for _ in range(2):
        assert chat.main(arguments) == 0
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out and outputs[0].out.strip() and not outputs[0].err


def test_raw_continues_the_text_without_the_template(folder, capsys, monkeypatch):
    seen = []
    real = chat.stream
    monkeypatch.setattr(chat, "stream", lambda model, tokenizer, ids, *a, **k: seen.append(ids[0].tolist()) or real(model, tokenizer, ids, *a, **k))
    assert chat.main([str(folder), "--raw", "--prompt", "one two", "--max-new-tokens", "3"]) == 0
    assert chat.main([str(folder), "--prompt", "one two", "--system", "three", "--max-new-tokens", "3"]) == 0
    tokenizer = Tokenizer.from_pretrained(folder)
    assert seen[0] == tokenizer.encode("one two")
    assert tokenizer.decode(seen[1]) == "<|im_start|>system\nthree<|im_end|>\n<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_remembers_its_turns_and_ends_with_the_input(folder, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(chat, "stream", lambda model, tokenizer, ids, *a, **k: seen.append(tokenizer.decode(ids[0])) or iter(["five"]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert chat.main([str(folder), "--max-new-tokens", "8"]) == 0
    assert len(seen) == 2 and "user\none" in seen[1] and "assistant\nfive<|im_end|>" in seen[1] and "user\ntwo" in seen[1]


def test_a_long_conversation_drops_its_oldest_turns_and_says_so(folder, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(chat, "stream", lambda model, tokenizer, ids, *a, **k: seen.append(tokenizer.decode(ids[0])) or iter(["five"]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"one two three {i}\n" for i in "abcdef")))
    assert chat.main([str(folder), "--system", "four", "--max-new-tokens", "8"]) == 0
    assert "three a" in seen[0] and "three a" not in seen[-1] and "three f" in seen[-1] and "system\nfour" in seen[-1]
    assert "no longer fit" in capsys.readouterr().err


def test_a_message_that_cannot_fit_is_an_error(folder, capsys):
    assert chat.main([str(folder), "--prompt", "one two " * 100]) == 1
    assert "shorten it" in capsys.readouterr().err


def test_a_message_too_long_does_not_end_the_conversation(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two " * 100 + "\none\n"))
    assert chat.main([str(folder), "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr()
    assert "shorten it" in printed.err and printed.out.strip()


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_folders_written_by_transformers(kind, folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    shared = {k: v for k, v in SIZES.items()}
    config = getattr(transformers, f"{kind}Config")(**shared, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert chat.main([str(tmp_path), "--prompt", "one two", "--max-new-tokens", "10"]) == 0
    ours = capsys.readouterr().out.rstrip("\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "one two"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=10, do_sample=False, eos_token_id=[0, 2], pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    assert ours == tokenizer.decode(out, skip_special_tokens=True).rstrip("\n")


def test_stop_tokens_come_from_the_folder(folder, tmp_path):
    target = copy(folder, tmp_path / "other")
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert {0, 2, 7, 9} <= set(chat.stop_tokens(target, Tokenizer.from_pretrained(target)))


def damage_cut(target):
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def damage_size(target):
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))


def damage_json(target):
    (target / "config.json").write_text("{")


def damage_missing(target):
    (target / "tokenizer.json").unlink()


def damage_tokenizer(target):
    (target / "tokenizer.json").write_text("not a tokenizer")


@pytest.mark.parametrize("damage", [damage_cut, damage_size, damage_json, damage_missing, damage_tokenizer])
def test_a_damaged_folder_gives_one_clear_line(damage, folder, tmp_path, capsys):
    target = copy(folder, tmp_path / "broken")
    damage(target)
    assert chat.main([str(target), "--prompt", "one"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(target) in error and "Traceback" not in error


def test_no_folder(capsys):
    assert chat.main(["no/such/folder", "--prompt", "one"]) == 1
    assert "no/such/folder is not a folder" in capsys.readouterr().err


def test_the_command_itself(folder, root):
    start = [sys.executable, "-m", "minimind.chat"]
    run = lambda *arguments: subprocess.run([*start, *arguments], cwd=root, capture_output=True, text=True, timeout=240)
    help_ = run("--help")
    assert help_.returncode == 0 and "example: python -m minimind.chat" in help_.stdout
    done = run(str(folder), "--prompt", "one", "--max-new-tokens", "5")
    assert done.returncode == 0 and done.stderr == ""
