"""Scoring by likelihood, intervals, paired tests, and what may be called better than chance."""

import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data import DataError
from minimind.evaluate import (
    FORMS,
    bootstrap,
    chance_level,
    chance_sentence,
    choose,
    encode_pair,
    mcnemar,
    paired_difference,
    question_problem,
    questions_needed,
    read_questions,
    render,
    score_pairs,
    wilson,
)
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).resolve().parent.parent / "data" / "checkpoints" / "pretrain"
ROW = {"prompt": "Where does Garus live?", "stem": "Garus lives in", "choices": ["Foxhollow", "Ashford", "Oakham", "Thornton"], "label": 1}


@pytest.fixture(scope="module")
def model():
    return MiniMind.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def rows():
    """Options of one to six tokens, prompts of very different lengths."""
    rng = random.Random(0)
    names, values = ["Garus", "Tilda", "Joren", "Kalo"], ["Foxhollow", "a cat", "a small grey goat", "red", "honey rolls and apple pie", "x"]
    make = lambda: " ".join(f"{rng.choice(names)} lives in {rng.choice(values)}." for _ in range(rng.randint(0, 30)))
    prompts = [f"{make()} {rng.choice(names)} likes".strip() for _ in range(40)]
    return [{"id": str(i), "prompt": prompt, "choices": rng.sample(values, 4), "label": i % 4} for i, prompt in enumerate(prompts)]


# -- likelihood


def slow(model, tokenizer, context, continuation):
    """ln p(continuation | context), one token at a time, each in a pass of its own."""
    ids, total = tokenizer.encode(context), 0.0
    for token in tokenizer.encode(context + continuation)[len(ids) :]:
        total += model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token].item()
        ids = [*ids, token]
    return total


def test_a_batch_gives_what_single_tokens_give(model, tokenizer, rows):
    with torch.no_grad():
        for row, scored in zip(rows[:6], choose(model, tokenizer, rows[:6], batch_size=5)):
            expected = [slow(model, tokenizer, row["prompt"], " " + option) for option in row["choices"]]
            assert np.allclose(scored["nats"], expected, atol=1e-4)
            assert scored["chosen"] == int(np.argmax(expected)) and scored["right"] == (scored["chosen"] == row["label"])
            assert scored["chosen_norm"] == int(np.argmax([n / len(o) for n, o in zip(expected, row["choices"])]))


def test_the_batch_size_changes_nothing(model, tokenizer, rows):
    one, many = choose(model, tokenizer, rows, batch_size=1), choose(model, tokenizer, rows, batch_size=64)
    assert np.allclose([r["nats"] for r in one], [r["nats"] for r in many], atol=1e-4)
    assert [r["chosen"] for r in one] == [r["chosen"] for r in many]


def test_greedy_is_what_generation_would_write(model, tokenizer):
    from minimind.generate import generate_batch

    prompts = ["One day", "The pet of", "When it began to rain,"]
    written = [tokenizer.decode(ids) for ids in generate_batch(model, [tokenizer.encode(p) for p in prompts], 5)]
    pairs = [(tokenizer.encode(p), tokenizer.encode(p + w)[len(tokenizer.encode(p)) :]) for p, w in zip(prompts, written)]
    wrong = [(a, [*b[:-1], (b[-1] + 1) % tokenizer.vocab_size]) for a, b in pairs]
    assert score_pairs(model, pairs)[1].all() and not score_pairs(model, wrong)[1].any()


def test_a_row_longer_than_the_model_loses_its_beginning(model, tokenizer):
    long, end = tokenizer.encode("Garus lives in Foxhollow. " * 400), tokenizer.encode(" Tilda")
    room = model.config.max_position_embeddings
    assert len(long) > room
    assert score_pairs(model, [(long, end)])[0][0] == pytest.approx(score_pairs(model, [(long[-room + len(end) - 1 :], end)])[0][0], abs=1e-4)


def test_the_border_between_prompt_and_option(tokenizer):
    for context in ("Garus lives in", "Garus lives in "):
        a, b = encode_pair(tokenizer, context, " Foxhollow" if context[-1] != " " else "Foxhollow")
        assert tokenizer.decode(a) == "Garus lives in" and tokenizer.decode(b) == " Foxhollow"
    assert encode_pair(tokenizer, "", "Foxhollow") == ([tokenizer.eos_id], tokenizer.encode("Foxhollow"))
    chat, _ = encode_pair(tokenizer, [{"role": "user", "content": "Hello <|im_end|>"}], "Hi")
    assert chat.count(tokenizer.im_end_id) == 1, "what a user writes is no special token"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_asks_the_same_question(form):
    pairs = render(ROW, form)
    assert len(pairs) == 4 and len({str(context) for context, _ in pairs}) == 1 and len({option for _, option in pairs}) == 4
    context, option = pairs[1]
    shown = str(context) + option
    assert "Ashford" in shown and "Garus" in shown and ("B" in option if "letters" in form else "Ashford" in option)


def test_contexts_as_options_and_unknown_forms():
    row = {"prompt": "", "continuation": "was tired.", "choices": ["Because Ann", "Because Bob"], "label": 0}
    assert render(row, "letters") == [("Because Ann", " was tired."), ("Because Bob", " was tired.")]
    with pytest.raises(ValueError, match="form 'poem' is unknown: use statement"):
        render(ROW, "poem")


# -- the same numbers as lm-eval

LM_EVAL = """
import json, sys, lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
lm = HFLM(pretrained=sys.argv[1], device="cpu", dtype="float32", batch_size=8)
tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)
found = lm_eval.simple_evaluate(lm, tasks=["local"], task_manager=tasks, bootstrap_iters=0)
rows = [[s["acc"], s["acc_norm"], [r[0] for r in s["filtered_resps"]]] for s in found["samples"]["local"]]
json.dump({"rows": rows, "results": found["results"]["local"]}, open(sys.argv[3], "w"))
"""


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")
def test_equal_to_lm_eval_question_by_question(model, tokenizer, rows, tmp_path):
    lines = [json.dumps({"context": row["prompt"], "choices": row["choices"], "label": row["label"]}) for row in rows]
    (tmp_path / "local.jsonl").write_text("\n".join(lines))
    task = {"task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "local.jsonl")}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "label", "target_delimiter": " ",
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]}  # fmt: skip
    (tmp_path / "local.yaml").write_text(json.dumps(task))
    out = tmp_path / "found.json"
    from helpers_course import environment

    offline = environment(tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"), TOKENIZERS_PARALLELISM="false")
    done = subprocess.run([sys.executable, "-c", LM_EVAL, CHECKPOINT, tmp_path, out], env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, ours = json.loads(out.read_text()), choose(model, tokenizer, rows)
    assert [r[0] for r in theirs["rows"]] == [float(r["right"]) for r in ours]
    assert [r[1] for r in theirs["rows"]] == [float(r["right_norm"]) for r in ours]
    assert np.allclose([r[2] for r in theirs["rows"]], [r["nats"] for r in ours], atol=1e-3)
    assert theirs["results"]["acc,none"] == np.mean([r["right"] for r in ours])
    assert theirs["results"]["acc_norm,none"] == np.mean([r["right_norm"] for r in ours])
    assert [r["right"] for r in ours] != [r["right_norm"] for r in ours], "rows on which both rules agree prove nothing about the second"


# -- intervals


def test_bootstrap_of_a_share_is_about_the_formula():
    right = np.random.default_rng(0).random(500) < 0.7
    mean, low, high = bootstrap(right)
    half = 1.96 * math.sqrt(mean * (1 - mean) / 500)
    assert mean == right.mean() and (low, high) == pytest.approx((mean - half, mean + half), abs=0.006)
    assert bootstrap(right) == bootstrap(right), "the same answers give the same interval"
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_weights_make_it_a_ratio():
    bits, size = np.array([100.0, 10.0, 40.0]), np.array([50.0, 20.0, 40.0])
    mean, low, high = bootstrap(bits, size)
    assert mean == pytest.approx(150 / 110) and 0.5 <= low < mean < high <= 2


def test_wilson_by_hand_and_by_scipy():
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # Wilson 1927; R: prop.test(8, 10, correct = FALSE)
    stats = pytest.importorskip("scipy.stats")
    for right, total in ((0, 7), (3, 7), (199, 200), (50, 200)):
        theirs = stats.binomtest(right, total).proportion_ci(method="wilson")
        assert wilson(right, total) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    for right, total in ((3, 2), (-1, 5), (0, 0)):
        with pytest.raises(ValueError, match="expected 0 <= right <= total"):
            wilson(right, total)


def test_an_interval_that_holds_chance_is_never_called_better():
    for total in (10, 97, 200, 1000):
        for right in range(total + 1):
            for chance in (0.0, 0.2, 0.25, 1 / 3, 0.5):
                low, high = wilson(right, total)
                text = chance_sentence("test", [True] * right + [False] * (total - right), chance)
                verdict = text.rsplit(": ", 1)[1]
                assert (verdict == "better than chance") == (low > chance) and (verdict == "worse than chance") == (high < chance)
                assert verdict in ("better than chance", "worse than chance", "not different from chance")


def test_the_sentence_says_what_was_measured():
    text = chance_sentence("arc_easy", [1] * 55 + [0] * 145, 0.25)
    assert text == "arc_easy: 27.5% of 200 right, 95% interval 21.8% to 34.1%, chance 25.0%: not different from chance"
    assert "not different" in chance_sentence("none of 60 targets", [0] * 60, 0.0), "rounding must not lift nothing above nothing"
    assert chance_level([{"choices": ["a", "b"]}, {"choices": ["a", "b", "c", "d"]}]) == 0.375 and chance_level([{"target": "a"}]) == 0


# -- pairs


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(deadline=None, max_examples=60)
def test_mcnemar_is_the_coin_test(pairs):
    stats = pytest.importorskip("scipy.stats")
    a, b = zip(*pairs)
    apart, only_a = sum(x != y for x, y in pairs), sum(x and not y for x, y in pairs)
    expected = stats.binomtest(only_a, apart, 0.5).pvalue if apart else 1.0
    assert mcnemar(a, b) == pytest.approx(expected) == mcnemar(b, a)


def test_mcnemar_by_hand():
    assert mcnemar([1] * 7 + [0], [0] * 7 + [1]) == 18 / 256
    assert mcnemar([1, 0], [1, 0]) == 1 and mcnemar([1] * 6, [0] * 6) == 2 / 64
    with pytest.raises(ValueError, match="2 and 3 answers: a paired test needs the same questions"):
        mcnemar([1, 0], [1, 0, 1])


def test_a_paired_difference_has_the_sign_of_the_second():
    found = paired_difference([0] * 50 + [1] * 50, [1] * 20 + [0] * 30 + [1] * 50)
    assert found["difference"] == pytest.approx(0.2) and 0.1 < found["low"] < 0.2 < found["high"] < 0.3 and found["p"] < 1e-5
    same = paired_difference([1, 0, 1], [1, 0, 1])
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)


def test_the_number_of_questions_gives_the_power_it_promises():
    """Two separate tests, normal approximation: by simulation."""
    a, b = 0.6, 0.7
    n = questions_needed(b - a, a * (1 - a) + b * (1 - b))
    assert n == 354  # (1.95996 + 0.84162)^2 * 0.45 / 0.01 = 353.2
    rng = np.random.default_rng(0)
    x, y = rng.binomial(n, a, 4000) / n, rng.binomial(n, b, 4000) / n
    z = np.abs(x - y) / np.sqrt((x * (1 - x) + y * (1 - y)) / n)
    assert (z > 1.96).mean() == pytest.approx(0.8, abs=0.025)
    assert questions_needed(0.01, 0.1) == pytest.approx(4 * questions_needed(0.02, 0.1), rel=0.01)
    with pytest.raises(ValueError, match="difference=0"):
        questions_needed(0, 0.1)


# -- reading


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"prompt": "a", "choices": ["b", "c"], "label": 1}, None),
        ({"ctx": "a", "choices": ["b", "c"], "label": 0}, None),
        ({"prompt": "", "continuation": "a", "choices": ["b", "c"], "label": 0}, None),
        ({"prompt": "a", "target": "b"}, None),
        ({"prompt": "", "choices": ["b", "c"], "label": 0}, 'neither "prompt" nor "ctx"'),
        ({"choices": ["b", "c"], "label": 0}, 'neither "prompt" nor "ctx"'),
        ({"prompt": "a", "choices": ["b"], "label": 0}, "two or more options"),
        ({"prompt": "a", "choices": "bc", "label": 0}, "two or more options"),
        ({"prompt": "a", "choices": ["b", " "], "label": 0}, "an option that is not a text"),
        ({"prompt": "a", "choices": ["b", 3], "label": 0}, "an option that is not a text"),
        ({"prompt": "a", "choices": ["b", "c"], "label": 2}, '"label" is 2, expected the number of the right option, 0 to 1'),
        ({"prompt": "a", "choices": ["b", "c"], "label": -1}, '"label" is -1'),
        ({"prompt": "a", "choices": ["b", "c"], "label": True}, '"label" is True'),
        ({"prompt": "a", "choices": ["b", "c"], "label": "b"}, "\"label\" is 'b'"),
        ({"prompt": "a", "choices": ["b", "c"]}, '"label" is None'),
        ({"prompt": "a", "target": ""}, '"target" is not a text'),
    ],
)
def test_what_is_wrong_with_a_line(row, problem):
    found = question_problem(row)
    assert found is None if problem is None else problem in found


def test_all_bad_lines_are_listed_with_their_place(tmp_path):
    good = {"prompt": "a", "choices": ["b", "c"], "label": 1}
    (tmp_path / "good.jsonl").write_text(json.dumps(good))
    lines = [json.dumps(good), "{", json.dumps(good | {"label": 9}), "", json.dumps([1])]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_questions(tmp_path, 10)
    text = str(caught.value)
    assert all(f"bad.jsonl:{n}: " in text for n in (2, 3, 5)) and "3 bad lines" in text and "good.jsonl" not in text


def test_tests_are_thinned_evenly_and_text_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": f"p{i}", "choices": ["b", "c"], "label": i % 2}) for i in range(100)))
    (tmp_path / "text.jsonl").write_text('{"text": "only a text"}')
    tests = read_questions(tmp_path, 10)
    assert list(tests) == ["a"] and [row["prompt"] for row in tests["a"]] == [f"p{i}" for i in range(0, 100, 10)]
    assert len({row["id"] for row in tests["a"]}) == 10 and len(read_questions(tmp_path, 1000)["a"]) == 100


@pytest.mark.real_data
def test_real_benchmarks(real_data, model, tokenizer):
    """Read them all; a model of 1.5M parameters that has read a made-up world knows nothing of them."""
    tests = read_questions(real_data / "evals" / "mini", 60)
    assert len(tests) == 15 and all(len(rows) == 60 for rows in tests.values())
    better = 0
    for rows in tests.values():
        if "choices" in rows[0]:
            right = [row["right"] for row in choose(model, tokenizer, rows[:30])]
            better += "better than chance" in chance_sentence("x", right, chance_level(rows[:30]))
    assert better <= 3
