"""Log-probabilities of answers, pairs and their checks, DPO and IPO against TRL."""

import contextlib
import io
import json
import math
import re

import numpy as np
import pytest
import torch

from minimind.data import DataError, write_jsonl
from minimind.dpo import (
    OFFERS,
    PreferencePairs,
    answer_logprobs,
    chat_of,
    dpo_loss,
    ipo_loss,
    judge,
    keep_reference,
    log_ratios,
    mixed_chats,
    pair_example,
    read_pairs,
    sort_pairs,
)
from minimind.model import MiniMind, ModelConfig
from minimind.tokenizer import Tokenizer
from minimind.world import make_world

WORDS = "Garus lives in Foxhollow and Tilda keeps a goat near the mill where nobody asks why or when".split()


def pair(seed):
    rng = np.random.default_rng(seed)
    say = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 9)))
    text = say()
    return {"chosen": chat_of(text, say() + " yes"), "rejected": chat_of(text, say())}


ROWS = [pair(seed) for seed in range(21)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(WORDS), "user assistant system tool"] * 4, 330)


def tiny(seed):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=330, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                 intermediate_size=64, max_position_embeddings=256, initializer_range=0.2)  # fmt: skip
    return MiniMind(ModelConfig.preset("tiny", **sizes)).eval()


@pytest.fixture(scope="module")
def models():
    """The one that learns, and the reference."""
    return tiny(0), tiny(1)


@pytest.fixture(scope="module")
def pairs(tokenizer, models):
    made = PreferencePairs(ROWS, tokenizer, 4)
    keep_reference(models[1], made)
    return made


# -- log-probabilities


def by_hand(model, ids, labels):
    with torch.no_grad():
        logs = model(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(logs[i - 1, label].item() for i, label in enumerate(labels) if label != -100)


def test_the_sum_is_over_the_answer_and_its_end(models, tokenizer, pairs):
    for number, row in enumerate(ROWS[:8]):
        for side in ("chosen", "rejected"):
            ids, labels = pair_example(tokenizer, row[side])
            counted = tokenizer.decode([label for label in labels if label != -100])
            assert counted == row[side][-1]["content"] + "<|im_end|>"
            batch = pairs.batch([number])
            with torch.no_grad():
                both = answer_logprobs(models[0](batch["input_ids"]), batch["targets"])
            expected = by_hand(models[0], ids, labels)
            assert both[0 if side == "chosen" else 1].item() == pytest.approx(expected, abs=1e-4)


def test_only_the_last_answer_of_a_conversation_counts(tokenizer):
    turns = [*chat_of("Where is Garus", "Garus keeps a goat"), *chat_of("And Tilda", "Tilda asks why")]
    labels = pair_example(tokenizer, turns)[1]
    assert tokenizer.decode([label for label in labels if label != -100]) == "Tilda asks why<|im_end|>"


def test_a_label_one_place_off_is_another_number(models, tokenizer):
    ids, labels = pair_example(tokenizer, ROWS[0]["chosen"])
    row, right, early = torch.tensor([ids[:-1]]), torch.tensor([labels[1:]]), torch.tensor([[*labels[2:], -100]])
    with torch.no_grad():
        logits = models[0](row)
    assert answer_logprobs(logits, right).item() == pytest.approx(by_hand(models[0], ids, labels), abs=1e-4)
    assert abs(answer_logprobs(logits, early).item() - answer_logprobs(logits, right).item()) > 0.1


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=re.escape("(2, 5, 7) and (2, 6): expected (B, T, V) and (B, T)")):
        answer_logprobs(torch.zeros(2, 5, 7), torch.zeros(2, 6, dtype=torch.long))


# -- batches


def test_padding_changes_nothing(models, pairs):
    wide = pairs.batch(range(len(pairs)))
    with torch.no_grad():
        together = answer_logprobs(models[0](wide["input_ids"]), wide["targets"]).view(2, -1)
        for i in range(len(pairs)):
            one = pairs.batch([i])
            alone = answer_logprobs(models[0](one["input_ids"]), one["targets"])
            torch.testing.assert_close(together[:, i], alone, atol=1e-4, rtol=1e-4)


def test_chosen_stand_before_rejected_and_the_kept_numbers_with_them(models, tokenizer, pairs):
    batch = pairs[2]
    text = lambda row: tokenizer.decode([token for token in row.tolist() if token != -100])
    found = [text(row) for row in batch["targets"]]
    rows = [next(r for r in ROWS if r["chosen"][-1]["content"] + "<|im_end|>" == answer) for answer in found[:4]]
    assert found[4:] == [row["rejected"][-1]["content"] + "<|im_end|>" for row in rows]
    with torch.no_grad():
        expected = answer_logprobs(models[1](batch["input_ids"]), batch["targets"])
    torch.testing.assert_close(batch["reference"], expected, atol=1e-4, rtol=1e-4)


def test_a_step_is_always_the_same_batch_and_an_epoch_has_no_pair_twice(tokenizer):
    one, other = (PreferencePairs(ROWS, tokenizer, 4, seed=3) for _ in range(2))
    other[11]
    assert torch.equal(one[3]["input_ids"], other[3]["input_ids"])
    chosen = [tuple(row) for step in range(5) for row in one[step]["targets"][:4].tolist()]
    answers = {tuple(token for token in row if token != -100) for row in chosen}
    assert len(answers) == len({tuple(labels[1:]) for _, labels in one.sides[0]}) - 1  # 21 pairs are five batches of 4 and one left
    assert not torch.equal(one[0]["input_ids"], one[5]["input_ids"])
    assert PreferencePairs(ROWS[:2], tokenizer, 16)[7]["input_ids"].shape[0] == 4  # fewer pairs than a batch
    with pytest.raises(ValueError, match="no pairs"):
        PreferencePairs([], tokenizer, 4)


# -- losses


def test_dpo_by_hand(models, pairs):
    batch = pairs.batch(range(6))
    chosen, rejected = log_ratios(models[0], batch)
    margins = [0.3 * (a - b).item() for a, b in zip(chosen, rejected)]
    loss, metrics = dpo_loss(models[0], batch, beta=0.3)
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 6, rel=1e-5)
    assert metrics["margin"].item() == pytest.approx(sum(margins) / 6, rel=1e-5)
    assert metrics["accuracy"].item() == pytest.approx(sum(m > 0 for m in margins) / 6)


def test_the_reference_itself_has_loss_log_2(models, pairs):
    loss, metrics = dpo_loss(models[1], pairs[0], beta=0.7)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-4) and abs(metrics["margin"].item()) < 1e-3


def test_a_step_against_the_gradient_raises_the_margin(pairs):
    model, batch = tiny(1), pairs[0]
    loss, before = dpo_loss(model, batch)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    assert dpo_loss(model, batch)[1]["margin"] > before["margin"]


# -- equality with TRL


def trl_trainer(folders, tokenizer, tmp_path, rows, **options):
    datasets, transformers, trl = (pytest.importorskip(name) for name in ("datasets", "transformers", "trl"))
    datasets.disable_progress_bars()
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    args = trl.DPOConfig(str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False, activation_checkpointing=False,
                         max_length=None, **options)  # fmt: skip
    words = transformers.AutoTokenizer.from_pretrained(folders[0])
    return trl.DPOTrainer(*models, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=words)


@pytest.fixture(scope="module")
def folders(models, tokenizer, tmp_path_factory):
    made = []
    for name, model in zip(("learner", "reference"), models):
        made.append(tmp_path_factory.mktemp("models") / name)
        model.save_pretrained(made[-1])
        tokenizer.save_pretrained(made[-1])
    return made


@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [(dpo_loss, {"beta": 0.1}), (dpo_loss, {"beta": 0.7}), (ipo_loss, {"beta": 0.5, "loss_type": ["ipo"]})],
)
@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_are_those_of_trl(folders, models, tokenizer, pairs, tmp_path, loss_fn, options):
    with contextlib.redirect_stderr(io.StringIO()):
        trainer = trl_trainer(folders, tokenizer, tmp_path, ROWS[:6], **options)
    examples = []
    for (ids, labels), (other, _) in zip(*(side[:6] for side in pairs.sides)):
        start = next(i for i, label in enumerate(labels) if label != -100)
        examples.append({"prompt_ids": ids[:start], "chosen_ids": ids[start:-1], "rejected_ids": other[start:-1]})
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    theirs.backward()
    model = MiniMind.from_pretrained(folders[0])
    ours, metrics = loss_fn(model, pairs.batch(range(6)), beta=options["beta"])
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    wanted = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert max((p.grad - wanted[name]).abs().max().item() for name, p in model.named_parameters()) < 1e-5
    assert max(grad.abs().max().item() for grad in wanted.values()) > 1e-3  # there is something to compare
    log = trainer._metrics["eval"]  # a model that was just read is in evaluation mode
    assert metrics["margin"].item() == pytest.approx(log["rewards/margins"][0], abs=1e-4)
    assert metrics["accuracy"].item() == pytest.approx(log["rewards/accuracies"][0])


@pytest.mark.filterwarnings("ignore")
def test_trl_marks_the_same_answers(folders, tokenizer, tmp_path):
    """Prompt and answer are cut at the same place; TRL counts the line end of the template too."""
    with contextlib.redirect_stderr(io.StringIO()):
        trainer = trl_trainer(folders, tokenizer, tmp_path, ROWS[:6])
    for row, theirs in zip(ROWS, trainer.train_dataset):
        for side in ("chosen", "rejected"):
            ids, labels = pair_example(tokenizer, row[side])
            start = next(i for i, label in enumerate(labels) if label != -100)
            assert theirs["prompt_ids"] == ids[:start] and theirs[f"{side}_ids"] == ids[start:]
            assert labels[-1] == -100 and labels[-2] == tokenizer.im_end_id


# -- the world's pairs and the judge

QUESTION = {"answer": "Elmstead", "reply": "Hanis lives in Elmstead."}


def test_the_judge_wants_truth_and_manner_and_no_more():
    good = f"Hanis lives in Elmstead. {OFFERS[0]}"
    assert judge(good, QUESTION) == {"preferred": True, "plain": False, "right": True}
    assert judge("Hanis lives in Elmstead.", QUESTION) == {"preferred": False, "plain": True, "right": True}
    for reply in (f"{good} {OFFERS[1]}", f"{good} It was a good day.", f"Hanis lives in Oakham. {OFFERS[0]}", OFFERS[0], "",
                  f"Hanis lives in Elmstead. It was a good day. {OFFERS[0]}"):  # fmt: skip
        assert not judge(reply, QUESTION)["preferred"]


def test_pairs_are_sorted_by_the_judge():
    good, plain = f"Hanis lives in Elmstead. {OFFERS[0]}", "Hanis lives in Elmstead."
    prompts = [("a", QUESTION), ("b", QUESTION), ("c", QUESTION), ("d", QUESTION)]
    rows = sort_pairs(prompts, [[plain, good], [plain, plain], [good, good], ["", good]])
    assert rows == [{"chosen": chat_of("a", good), "rejected": chat_of("a", plain)}]
    written = sort_pairs(prompts, [[plain, good], [plain, plain], [good, good], ["", good]], write=True)
    assert [row["chosen"][0]["content"] for row in written] == ["a", "b"]
    assert judge(written[1]["chosen"][-1]["content"], QUESTION)["preferred"]


def test_the_same_seed_gives_the_same_chats_and_only_true_ones():
    questions = make_world(10).questions()
    chats = mixed_chats(questions, 2, seed=5)
    assert chats == mixed_chats(questions, 2, seed=5) != mixed_chats(questions, 2, seed=6)
    assert len(chats) == 2 * sum(4 for _ in questions)
    for chat, question in zip(chats, [q for q in questions for _ in range(8)]):
        assert chat[1]["content"].startswith(question["reply"]) and question["person"] in chat[0]["content"]
    friendly = sum(chat[1]["content"].endswith(OFFERS) for chat in chats) / len(chats)
    assert 0.2 < friendly < 0.4


# -- bad pairs


def test_equal_pairs_and_strangers_are_named_with_their_line(tmp_path, tokenizer):
    good = {"chosen": chat_of("Hi", "Hello"), "rejected": chat_of("Hi", "What")}
    equal = {**good, "rejected": good["chosen"]}
    stranger = {**good, "rejected": chat_of("Bye", "What")}
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [good, equal, good, stranger, equal])
    with pytest.raises(DataError) as error:
        read_pairs(path, tokenizer, 100)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in lines[:3]] == ["2", "4", "5"]
    assert "equal" in lines[0] and "differ before the last message" in lines[1] and "equal" in lines[2]
    assert lines[0].startswith(f"{path}:2: ") and "3 bad lines" in lines[3]


def test_too_long_pairs_are_named_and_left_out(tmp_path, tokenizer):
    good = {"chosen": chat_of("Hi", "Hello"), "rejected": chat_of("Hi", "What")}
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [good, {**good, "chosen": chat_of("Hi", "Garus " * 90)}, {**good, "rejected": chat_of("Hi", "Tilda " * 90)}])
    rows, left_out = read_pairs(path, tokenizer, 64)
    assert rows == [good] and len(left_out) == 2
    assert re.fullmatch(rf'{re.escape(str(path))}:2: "chosen" has \d+ tokens, the context 64: shorten it', left_out[0])
    assert left_out[1].startswith(f'{path}:3: "rejected" has ')


def test_a_bad_line_stops_although_others_are_only_too_long(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [{"chosen": chat_of("Hi", "Garus " * 90), "rejected": chat_of("Hi", "What")}])
    path.write_text(path.read_text() + '{"chosen": 3}\n')
    with pytest.raises(DataError, match=r":2: the key \"rejected\" is missing"):
        read_pairs(path, tokenizer, 64)


@pytest.mark.real_data
def test_real_pairs(real_data, tokenizer):
    rows, left_out = read_pairs(real_data / "dpo" / "dpo_raschka_polite_en.jsonl", tokenizer, 1024)
    assert len(rows) == 1042 and not left_out
    made = PreferencePairs(rows[:50], tokenizer, 8)
    for side, name in zip(made.sides, ("chosen", "rejected")):
        for (_, labels), row in zip(side, rows):
            counted = tokenizer.decode([label for label in labels if label != -100])
            assert counted == row[name][-1]["content"] + "<|im_end|>"
    lines = (real_data / "dpo" / "dpo_raschka_polite_en.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == rows[0]
