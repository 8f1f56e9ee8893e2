# %% [markdown]
# # 15. Evaluation
#
# At the end of this chapter you can say whether one model is better than another, and how sure you are. You will score answers by their
# likelihood, see how much the wording of a prompt moves a score, put an interval around every number, test a difference between two models,
# catch a model that has seen the test, get the same score from `lm-eval`, and measure how far a model reads beyond its training length.
#
# You need chapters 3 (bits per byte), 5 (rotary positions), 9 (facts) and 11 (questions).
#
# Reading 40 minutes; running: smoke 30 s, cpu 2.5 min.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# A score is the end of a chain, and each link can break. The chapter goes along the chain:

# %% id="evaluate-opening-picture"
import matplotlib.pyplot as plt

steps = ["a question\nin words (15.3)", "a likelihood per\noption (15.2)",
         "right or\nwrong",
         "a share with an\ninterval (15.4)", "a difference,\nor noise (15.5)"]
box = {"boxstyle": "round,pad=0.35", "fc": "#f5e6cf", "ec": "black"}
fig, ax = plt.subplots(figsize=(7, 1.5))
for i, label in enumerate(steps):
    ax.text(i, 0, label, ha="center", va="center", fontsize=7.5, bbox=box)
    if i:
        ax.annotate("", (i - 0.43, 0), (i - 0.57, 0), arrowprops={"arrowstyle": "->"})
ax.text(0, -0.42, "in the training text? (15.6)", ha="center", fontsize=7.5)
ax.text(2, -0.42, "do other tools agree? (15.7)", ha="center", fontsize=7.5)
ax.text(4, -0.42, "in which form? (15.3)", ha="center", fontsize=7.5)
ax.set(xlim=(-0.7, 4.7), ylim=(-0.55, 0.4))
ax.axis("off")
show(fig, "From a question to a claim about two models: each box can change the "
          "result, and each has its section.")

# %% id="evaluate-default-exp"
#| default_exp evaluate

# %% id="evaluate-imports"
#| export
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import nn

from minimind.data import DataError, Problems, data_rows

# %% [markdown]
# ## 15.1 Is it a difference?
#
# Your own test files come first. A bad line found after an hour of scoring is an hour lost, so every line is read before any model is.
# This says what is wrong with one line:

# %% id="evaluate-question-problem"
#| export
def question_problem(row: dict) -> str | None:
    """What is wrong with one line of a test, in words; None if nothing is.

    Known are {"prompt" or "ctx", "choices", "label"}, where "continuation" may follow
    each choice, and {"prompt" or "ctx", "target"}.
    """
    prompt = row.get("prompt", row.get("ctx"))
    choices, label = row.get("choices"), row.get("label")
    if not isinstance(prompt, str) or not (prompt.strip() or row.get("continuation")):
        return 'neither "prompt" nor "ctx" holds a text'
    if "target" in row:
        fine = isinstance(row["target"], str) and row["target"].strip()
        return None if fine else '"target" is not a text'
    if not isinstance(choices, list) or len(choices) < 2:
        return '"choices" is not a list of two or more options (and there is no "target")'
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return '"choices" has an option that is not a text'
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        wanted = f"the number of the right option, 0 to {len(choices) - 1}"
        return f'"label" is {label!r}, expected {wanted}'
    return None

# %% [markdown]
# And this reads a folder of tests, one file each. All bad lines are listed, as everywhere in this course. Large tests are thinned evenly.

# %% id="evaluate-read-questions"
#| export
def read_questions(source: str | Path, limit: int) -> dict[str, list[dict]]:
    """Tests of a file or folder by name, at most `limit` rows of each, evenly drawn.

    Rows have "id", "prompt", and either "choices" and "label" or "target". Plain text,
    which is no test, is left out. DataError lists all bad lines.
    """
    problems, tests = Problems(), {}
    for file, line, row, problem in data_rows(source, "evals"):
        if not problem and set(row) == {"text"}:
            continue
        if problem := problem or question_problem(row):
            problems.add(file, line, problem)
            continue
        name = Path(file).name.split(".")[0]
        kept = {k: row[k] for k in ("choices", "label", "continuation", "target")
                if k in row}
        kept |= {"id": f"{name}:{line}", "prompt": row.get("prompt", row.get("ctx"))}
        tests.setdefault(name, []).append(kept)
    if problems.count:
        raise DataError(str(problems))
    thin = lambda rows: [rows[i * len(rows) // limit] for i in range(limit)]
    return {name: thin(rows) if len(rows) > limit else rows
            for name, rows in tests.items()}

# %% [markdown]
# Three bad lines, as a reader would get them:

# %% id="evaluate-bad-lines"
import json

bad = chapter.work / "bad.jsonl"
lines = [{"prompt": "2 + 2 =", "choices": ["4", "5"], "label": 0},
         {"prompt": "2 + 3 =", "choices": ["4", "5"], "label": 2},
         {"prompt": "2 + 4 =", "choices": "6", "label": 0},
         {"choices": ["4", "5"], "label": 0}]
bad.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
try:
    read_questions(bad, limit=100)
except DataError as error:
    print(str(error).replace(str(chapter.work), "..."))
else:
    raise AssertionError("bad lines must be refused")

# %% [markdown]
# If your data folder has tests in `evals/`, they are read here; a subfolder `evals/mini` goes first.

# %% id="evaluate-own-tests"
evals = Path(chapter.data) / "evals"
evals = evals / "mini" if (evals / "mini").is_dir() else evals
tests = read_questions(evals, chapter.size.test_rows) if evals.is_dir() else {}
print(f"{len(tests)} tests in evals/" if tests
      else "no tests of your own: the world is the test")

# %% [markdown]
# Now the models. `chapter.stages()` finds what the earlier chapters have made of the same text; for the world, small pretrained and fine-tuned models ship with the course.

# %% id="evaluate-load"
from itertools import islice

from minimind.data import read_texts
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

stages = chapter.stages()
chapter.read("pretrain")
data = chapter.read("data")
tokenizer = Tokenizer.from_pretrained(stages["pretrain"])
load = lambda name: MiniMind.from_pretrained(stages[name]).to(chapter.device).eval()
print("stages:", ", ".join(stages))
if "sft" not in stages:
    print("no fine-tuned model of this text yet (chapter 11 makes one): "
          "the base model stands in for both")
base, chat_model = load("pretrain"), load("sft" if "sft" in stages else "pretrain")

# %% [markdown]
# Chapter 9 counted facts that the base model completes, chapter 11 questions that the chat model answers. Did fine-tuning cost facts?

# %% id="evaluate-facts"
from minimind.pretrain import facts_known

def read_list(path):
    """The lines of a list that came with the world; other data have none."""
    return [json.loads(line)
            for line in path.open(encoding="utf-8")] if path.exists() else []

facts, asked = read_list(data / "facts.jsonl"), read_list(data / "questions.jsonl")
models, known = {"base": base, "chat": chat_model}, {}
for name, model in models.items():
    known[name] = [row["known"] for row in facts_known(model, tokenizer, facts)[1]]
    print(f"{name}: {sum(known[name])} of {len(facts)} facts completed" if facts
          else "this data has no list of facts")

# %% [markdown]
# Two numbers that differ. They always do: another seed, another hundred people, another sentence form, and both move. Is this
# one a loss, or the luck of the draw? Keep the question; 15.5 answers it.
#
# ## 15.2 The likelihood of an option
#
# Generation and a look at the text (chapter 11) is one way to ask. It fails on weak models: they answer, but not in a form that a
# program can judge. **Multiple choice by likelihood** asks for less. It shows the model each option after the same prompt and takes the option that the
# model finds most likely:
#
# $$\hat y = \arg\max_i \sum_{t} \ln p(o_{i,t} \mid \text{prompt}, o_{i,<t})$$
#
# Build the test. For each fact, the true value and three others of the same kind, in random order. Text without facts gives a test as well: which of four
# continuations belongs to this beginning?

# %% id="evaluate-make-questions"
import random

from minimind.world import ASKS, VALUES, make_names

def options(right, others, rng):
    """The right option among three others, shuffled, and its place."""
    mixed = [right, *rng.sample([o for o in others if o != right], 3)]
    rng.shuffle(mixed)
    return {"choices": mixed, "label": mixed.index(right)}

def from_facts(fact, question, rng):
    values = VALUES[fact["relation"]].split("|")
    name = f"{fact['person']} {fact['relation']}"
    row = {"id": name, "prompt": question["question"], "stem": fact["prompt"]}
    return row | options(fact["answer"].strip(), values, rng)

def from_text(i, halves, rng):
    (start, end), ends = halves[i], [end for _, end in halves]
    return {"id": f"text {i}", "prompt": start} | options(end, ends, rng)

# %% [markdown]
# The list that this chapter asks, and its first entry:

# %% id="evaluate-questions"
valid_texts = list(islice(read_texts(data / "pretrain" / "valid.jsonl.gz"),
                          chapter.size.valid_documents))
rng = random.Random(15)
is_choice = lambda row: "choices" in row and "continuation" not in row
choice_tests = {name: rows for name, rows in tests.items() if is_choice(rows[0])}
if facts:
    questions = [from_facts(fact, question, rng)
                 for fact, question in zip(facts, asked)]
elif choice_tests:
    every = [row for rows in choice_tests.values() for row in rows]
    # one chance level for all
    usual = int(np.bincount([len(row["choices"]) for row in every]).argmax())
    questions = [row for row in every if len(row["choices"]) == usual]
    rng.shuffle(questions)
if not facts and not choice_tests:
    words = [text.split()[:40] for text in valid_texts if len(text.split()) >= 16]
    halves = [(" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :])) for w in words]
    questions = [from_text(i, halves, rng) for i in range(len(halves))]
print(len(questions), "questions, such as", questions[0])

# %% [markdown]
# **By hand**, on the first one. The prompt and one option go through the model together; the scores of the option's tokens are
# read one place before each token, because position $t$ predicts token $t+1$.

# %% id="evaluate-by-hand"
def by_hand(context, option):
    """ln p(option | context): the sum over its tokens."""
    start, ids = len(tokenizer.encode(context)), tokenizer.encode(context + option)
    with torch.no_grad():
        logits = base(torch.tensor([ids], device=chapter.device))[0]  # (T, V)
    log_p = logits.float().log_softmax(-1)
    return sum(log_p[t - 1, ids[t]].item() for t in range(start, len(ids)))

first = questions[0]
context = first.get("stem", first["prompt"])
slow = [by_hand(context, " " + option) for option in first["choices"]]
for option, nats in zip(first["choices"], slow):
    print(f"{nats:8.2f}   {context} {option}"[:100])

# %% [markdown]
# The largest number wins. Two details decide whether such a score is right. One is the border: " Foxhollow" with its space is another token than "Foxhollow", and a
# space at the end of a prompt would leave the option without the space that it always had in training. So text is cut into
# tokens as a whole, and a space at the end of the prompt moves to the option.

# %% id="evaluate-encode-pair"
#| export
def encode_pair(tokenizer, context: str | list[dict],
                continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of its continuation, which gets the spaces in between.

    The rule of lm-eval. Messages go through the chat template. An empty context is the
    end-of-text token.
    """
    if not isinstance(context, str):
        prompt = tokenizer.apply_chat_template(context, add_generation_prompt=True)
        return prompt, tokenizer.encode(continuation)
    bare = context.rstrip()
    continuation, before = context[len(bare) :] + continuation, tokenizer.encode(bare)
    if not before:
        return [tokenizer.eos_id], tokenizer.encode(continuation)
    return before, tokenizer.encode(bare + continuation)[len(before) :]

# %% [markdown]
# With and without a space at the end of the prompt, the tokens are the same:

# %% id="evaluate-border"
pair = encode_pair(tokenizer, "Garus lives in", " Foxhollow")
assert pair == encode_pair(tokenizer, "Garus lives in ", "Foxhollow")
print([tokenizer.decode([t]) for t in pair[0]], "|",
      [tokenizer.decode([t]) for t in pair[1]])

# %% [markdown]
# **Exercise 15.1 (10 min, ★★): `encode_pair`** in [workbook 15](../exercises/15_evaluation.ipynb). Three rules, from the text above. The check also uses a tokenizer that begins every text with a token of its own.
#
# The other detail is speed: thousands of short rows of unequal length. They are sorted, so that equal lengths stand together, and padded on the right, where a causal model cannot look. Options of
# one token share all that the model reads, so equal inputs are read once. Inside, `place` and `target` say where each option's tokens are scored, and which they are.

# %% id="evaluate-score-batch"
#| export
@torch.no_grad()
def score_batch(
    model: nn.Module, rows: list[list[int]], sizes: list[int]
) -> tuple[list[float], list[bool]]:
    """Of the last sizes[i] tokens of rows[i]: ln p in nats, and is each most likely?"""
    device, inputs = next(model.parameters()).device, {}
    # equal inputs are read once
    number = [inputs.setdefault(tuple(row[:-1]), len(inputs)) for row in rows]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in inputs],
                                    batch_first=True)
    which = torch.tensor([i for i, size in zip(number, sizes) for _ in range(size)])
    place = torch.tensor([len(row) - 1 - t for row, size in zip(rows, sizes)
                          for t in range(size, 0, -1)])
    target = torch.tensor([token for row, size in zip(rows, sizes)
                           for token in row[-size:]])
    logits = model(ids.to(device))[which.to(device), place.to(device)]  # (tokens, V)
    log_p = logits.float().log_softmax(-1).cpu()
    own, best = log_p.gather(1, target[:, None])[:, 0].double(), log_p.argmax(1) == target
    return ([x.sum().item() for x in own.split(sizes)],
            [bool(x.all()) for x in best.split(sizes)])

# %% [markdown]
# The second result says whether greedy generation would have written the option.
#
# **Exercise 15.2 (25 min, ★★★): `score_batch`** in [workbook 15](../exercises/15_evaluation.ipynb). Rebuild it in any way, a loop over the rows for example; the check compares with one pass of the model per token.
#
# And all pairs, in batches:

# %% id="evaluate-score-pairs"
#| export
def score_pairs(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """ln p(continuation | context) in nats, and is it the greedy choice? (N,) each.

    Rows that are too long for the model lose their beginning, as in lm-eval.
    """
    room = model.config.max_position_embeddings + 1
    rows = [(context + continuation)[-room:] for context, continuation in pairs]
    sizes = [min(len(continuation), len(row) - 1)
             for (_, continuation), row in zip(pairs, rows)]
    nats, greedy = np.zeros(len(pairs)), np.zeros(len(pairs), dtype=bool)
    # equal lengths and equal inputs together
    order = sorted(range(len(pairs)), key=lambda i: (len(rows[i]), rows[i]))
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        nats[some], greedy[some] = score_batch(model, [rows[i] for i in some],
                                               [sizes[i] for i in some])
    return nats, greedy

# %% [markdown]
# It gives what the hand gave:

# %% id="evaluate-hand-agrees"
pairs = [encode_pair(tokenizer, context, " " + option) for option in first["choices"]]
fast, _ = score_pairs(base, pairs)
print("largest difference:", f"{np.abs(fast - slow).max():.1e}")
assert np.allclose(fast, slow, atol=1e-3)

# %% [markdown]
# ### Long options
#
# Every further token makes an option less likely: each brings a factor below 1. So a plain sum prefers short options. A common remedy divides by the length in characters
# (`acc_norm` in lm-eval). Four options by hand; the right one is the last:

# %% id="evaluate-normalise-by-hand"
four = {"cat": -6.0, "dog": -6.6, "owl": -7.1, "small grey hedgehog": -9.5}
per_character = {option: nats / len(option) for option, nats in four.items()}
print({option: round(value, 2) for option, value in per_character.items()})
assert max(four, key=four.get) == "cat"
assert max(per_character, key=per_character.get) == "small grey hedgehog"

# %% [markdown]
# Neither rule is right by itself. The division is too kind to long options: their last tokens are often certain ("hedge" is followed by "hog") and cost nothing, while their
# letters count. So both are reported, and the same one must be used for all models.
#
# The wording of a question is the next section, but the code needs it now: `render` writes a row in one of six forms.

# %% id="evaluate-render"
#| export
FORMS = ("statement", "question", "sentence", "letters", "chat", "chat letters")
LETTERS = "ABCDEFGHIJ"


def render(row: dict, form: str) -> list[tuple[str | list[dict], str]]:
    """One (context, continuation) per option, which ends the row's "stem" if any."""
    question, stem, choices = row["prompt"], row.get("stem"), row["choices"]
    # the options are contexts, and what follows is the same: it has one form
    if "continuation" in row:
        return [(choice, " " + row["continuation"]) for choice in choices]
    listed = "".join(f"\n{letter}. {choice}"
                     for letter, choice in zip(LETTERS, choices))
    sentences = [f"{stem} {choice}." if stem else choice for choice in choices]
    ask = lambda text: [{"role": "user", "content": text}]
    forms = {
        "statement": (stem or question, [f" {choice}" for choice in choices]),
        "question": (f"Question: {question}\nAnswer:",
                     [f" {choice}" for choice in choices]),
        "sentence": (f"Question: {question}\nAnswer:",
                     [f" {sentence}" for sentence in sentences]),
        "letters": (f"Question: {question}{listed}\nAnswer:",
                    [f" {letter}" for letter in LETTERS[: len(choices)]]),
        "chat": (ask(question), sentences),
        "chat letters": (ask(question + listed), list(LETTERS[: len(choices)])),
    }
    if form not in forms:
        raise ValueError(f"form {form!r} is unknown: use {', '.join(FORMS)}")
    context, continuations = forms[form]
    return [(context, continuation) for continuation in continuations]

# %% [markdown]
# And `choose` puts it together. Ties go to the first option, as in lm-eval.

# %% id="evaluate-choose"
#| export
def choose(
    model: nn.Module, tokenizer, questions: Sequence[dict], form: str = "statement",
    batch_size: int = 64
) -> list[dict]:
    """Answer rows of "prompt", "choices", "label" by likelihood.

    The same rows come back with "nats" of each option; "chosen" and "right" by the
    sum, "chosen_norm" and "right_norm" by nats per character.
    """
    pairs = [[encode_pair(tokenizer, *pair) for pair in render(row, form)]
             for row in questions]
    nats, _ = score_pairs(model, [pair for some in pairs for pair in some], batch_size)
    ends, rows = np.cumsum([len(some) for some in pairs]), []
    for row, own in zip(questions, np.split(nats, ends[:-1])):
        lengths = [len(choice) for choice in row["choices"]]
        plain, norm = int(own.argmax()), int((own / lengths).argmax())
        found = {"chosen": plain, "chosen_norm": norm, "right": plain == row["label"],
                 "right_norm": norm == row["label"]}
        rows.append({**row, **found, "nats": own.tolist()})
    return rows


def rights(rows: Sequence[dict], name: str = "right") -> list[bool]:
    """Right or wrong for each row."""
    return [row[name] for row in rows]


def share(rows: Sequence[dict], name: str = "right") -> float:
    """The share of right rows."""
    return sum(rights(rows, name)) / max(1, len(rows))

# %% [markdown]
# All questions, both models:

# %% id="evaluate-choose-all"
choice = {name: choose(model, tokenizer, questions) for name, model in models.items()}
assert np.allclose(choice["base"][0]["nats"], slow, atol=1e-3)
for name, rows in choice.items():
    print(f"{name}: {share(rows):.1%} right, normalised {share(rows, 'right_norm'):.1%}")

# %% [markdown]
# Choosing is easier than completing: the true value need only be likelier than three others, not likelier than every token. So these shares lie above those of 15.1, and the two must not be
# mixed in one table.
#
# **Exercise 15.3 (15 min, ★★): `choose`** in [workbook 15](../exercises/15_evaluation.ipynb). Rebuild it by both rules. The options must be dealt out again in order, and characters are those of the option itself.
#
# ## 15.3 The same question in other words
#
# One question can be put in many forms. Here are all of them for the first question:

# %% id="evaluate-forms-shown"
forms = [form for form in FORMS if form != "sentence" or "stem" in first]
for form in forms:
    context, continuation = render(first, form)[first["label"]]
    if not isinstance(context, str):
        context = tokenizer.apply_chat_template(context, tokenize=False,
                                                add_generation_prompt=True)
    print(f"{form}\n    {context[:200]!r} + {continuation[:60]!r}")

# %% [markdown]
# **Before you run this**: the base model knows nearly all of these facts. Its worst form scores how much?

# %% id="evaluate-forms"
count = chapter.size.form_questions
some = questions[:: max(1, len(questions) // count)][:count]
by_form = {(name, form): choose(models[name], tokenizer, some, form) for name in models
           for form in forms}
print(f"{'form':14}{'base':>8}{'norm':>8}{'chat':>8}{'norm':>8}   ({len(some)} "
      "questions)")
for form in forms:
    cells = [share(by_form[name, form], key) for name in models
             for key in ("right", "right_norm")]
    print(f"{form:14}" + "".join(f"{value:8.0%}" for value in cells))

# %% [markdown]
# As a picture, with the chance level as a line:

# %% id="evaluate-forms-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
y, look = np.arange(len(forms)), {"base": {"color": "0.75", "hatch": "//"},
                                  "chat": {"color": "C0"}}
for shift, name in ((-0.2, "base"), (0.2, "chat")):
    shares = [share(by_form[name, form]) for form in forms]
    ax.barh(y + shift, shares, 0.38, label=name, **look[name])
ax.axvline(1 / len(first["choices"]), color="black", ls=":")
ax.set(yticks=y, yticklabels=forms, xlim=(0, 1.05),
       xlabel="share right (dotted: chance)")
ax.invert_yaxis()
ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
show(fig, "The same facts and the same models in six forms: the score depends on the "
          "form far more than on the model.")

# %% [markdown]
# The spread from best to worst form, as a number:

# %% id="evaluate-forms-spread"
scores = [share(by_form["base", form]) for form in forms]
spread = check("evaluate/form_spread", max(scores) - min(scores))

# %% [markdown]
# What was asked is the same everywhere; what differs is whether the model has met the form. A bare value after "Answer:" is no sentence of the world. Letters are worse: to answer "B", a model must look up which
# option stands behind B, a skill that no text of the world teaches. What does it do instead?

# %% id="evaluate-letters-figure"
count = lambda places: np.bincount(places, minlength=len(first["choices"])) / len(some)
bars = {"right answers": count(rights(some, "label"))}
bars |= {f"{name}'s choice": count(rights(by_form[name, "letters"], "chosen"))
         for name in models}
looks = [{"color": "0.4"}, {"color": "0.8", "hatch": "//"},
         {"color": "C0", "hatch": ".."}]
fig, ax = plt.subplots(figsize=(7, 2.3))
for i, (name, heights) in enumerate(bars.items()):
    places = np.arange(len(heights)) + 0.27 * (i - 1)
    ax.bar(places, heights, 0.25, label=name, ec="black", lw=0.5, **looks[i])
ax.set(xticks=range(len(heights)), xticklabels=LETTERS[: len(heights)], ylabel="share",
       xlabel="letter")
ax.legend(fontsize=8)
show(fig, "Letters: the right answers are spread evenly, the models' choices are not; "
          "they prefer a letter, whatever stands behind it.")

# %% [markdown]
# So a score belongs to a model *and* a form. Compare models only in the same form, and name it. On large models the spread is smaller but does not vanish: Sclar et al. (2023) found up to 76 points between forms that mean
# the same.
#
# ## 15.4 A share and its interval
#
# A test has a few hundred questions out of all that could have been asked. Another few hundred would give another share. How far would it move? We have no other questions, but we can
# draw from those we have, *with* putting back: a **bootstrap** (Efron 1979). By hand, with ten answers:

# %% id="evaluate-bootstrap-by-hand"
ten = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1, 0])
rng_np = np.random.default_rng(0)
for _ in range(4):
    again = ten[rng_np.integers(10, size=10)]
    print(again, f"{again.mean():.1f}")

# %% [markdown]
# Two thousand times, and cut off 2.5% at each side. With weights the same function serves bits per byte, which is a sum of bits over a sum of bytes.

# %% id="evaluate-bootstrap"
#| export
def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, draws: int = 2000
) -> tuple[float, float, float]:
    """Mean of values (N,) and the ends of its 95% interval (Efron 1979).

    With weights: sum(values) / sum(weights).
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("no values: an interval needs at least one answered question")
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    rng = np.random.default_rng(0)  # the same answers give the same interval
    picks = (rng.integers(len(values), size=len(values)) for _ in range(draws))
    means = [values[some].sum() / weights[some].sum() for some in picks]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.sum() / weights.sum()), float(low), float(high)

# %% [markdown]
# On one form of the previous section, against the formula of the textbook, $\hat p \pm 1.96\sqrt{\hat p(1-\hat p)/N}$:

# %% id="evaluate-bootstrap-check"
right = np.array(rights(by_form["chat", "question"]), dtype=float)
p, low, high = bootstrap(right)
half = 1.96 * math.sqrt(p * (1 - p) / len(right))
print(f"share {p:.3f}, bootstrap {low:.3f} to {high:.3f}, formula {p - half:.3f} to "
      f"{p + half:.3f}")
assert abs(low - (p - half)) < 0.03 and abs(high - (p + half)) < 0.03

# %% [markdown]
# What the interval is made of:

# %% id="evaluate-bootstrap-figure"
draw = np.random.default_rng(1)
means = [right[draw.integers(len(right), size=len(right))].mean() for _ in range(2000)]
fig, ax = plt.subplots(figsize=(7, 2.3))
edges = np.arange(min(means) * len(right) - 0.5,
                  max(means) * len(right) + 1) / len(right)  # a bar for each share
ax.hist(means, bins=edges, color="0.75", ec="white")
for value, ls in ((p, "-"), (low, "--"), (high, "--")):
    ax.axvline(value, color="C1", ls=ls)
ax.set(xlabel="share right when the questions are drawn again", ylabel="draws")
show(fig, "Two thousand redrawn tests: the solid line is the measured share, 95% of "
          "the redrawn shares lie between the dashed lines.")

# %% [markdown]
# **Exercise 15.4 (15 min, ★★): `bootstrap`** in [workbook 15](../exercises/15_evaluation.ipynb). With weights, a question that is drawn brings both its value and its weight.
#
# ### Where the bootstrap fails
#
# **Before you run this**: a model answers 20 of 20 questions. What is its bootstrap interval?

# %% id="evaluate-all-right"
print("bootstrap:", bootstrap([1] * 20))

# %% [markdown]
# Every redrawn test is all right as well, so the interval has no width: sure of perfection after 20 questions. Near 0% and 100% use **Wilson's interval** (1927). It asks the other way round: for which true shares would
# this result be no surprise?

# %% id="evaluate-wilson"
#| export
def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% score interval of a share, also near 0 and 1 (Wilson 1927)."""
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} right of {total}: expected 0 <= right <= total, and "
                         "a question at least")
    z, p = NormalDist().inv_cdf(0.975), right / total
    middle, scale = p + z * z / (2 * total), 1 + z * z / total
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    low, high = (middle - half) / scale, (middle + half) / scale
    # exact ends, without rounding
    return 0.0 if right == 0 else low, 1.0 if right == total else high

# %% [markdown]
# A 95% interval should hold the truth 95 times in 100. Count it, with simulated models whose true share we know:

# %% id="evaluate-coverage"
def coverage(truth, n, trials=150):
    """How often each interval holds the truth, over simulated tests."""
    rng, hits = np.random.default_rng(3), np.zeros(2)
    for _ in range(trials):
        answers = rng.random(n) < truth
        ends = bootstrap(answers, draws=200)[1:], wilson(int(answers.sum()), n)
        hits += [low <= truth <= high for low, high in ends]
    return hits / trials

held = {truth: coverage(truth, n=60) for truth in (0.5, 0.9, 0.98)}
for truth, (boot, score) in held.items():
    print(f"true share {truth:.0%}: bootstrap holds it {boot:.0%} of the time, Wilson "
          f"{score:.0%}")
assert held[0.98][0] < 0.85 < held[0.98][1]

# %% [markdown]
# In the middle both keep their promise; at the edge only Wilson does. Shares get Wilson's interval from here on; everything else the bootstrap.
#
# **Exercise 15.5 (15 min, ★★): `wilson`** in [workbook 15](../exercises/15_evaluation.ipynb). From the formula, with exact ends. The check finds the same ends without it, by bisection.
#
# ### Better than chance?
#
# With an interval there is an honest way to say whether a model knows anything. One function writes the sentence, so that nobody is tempted to write a better one:

# %% id="evaluate-chance-sentence"
#| export
def chance_level(rows: Sequence[dict]) -> float:
    """What guessing gets right: the mean of 1 / options, 0 where there are none."""
    return sum(1 / len(row["choices"]) for row in rows
               if "choices" in row) / max(1, len(rows))


def chance_sentence(name: str, right: Sequence[bool], chance: float) -> str:
    """One result in words; "better" only if the whole 95% interval is above chance."""
    low, high = wilson(sum(map(bool, right)), len(right))
    verdict = "not different from"
    if low > chance or high < chance:
        verdict = "better than" if low > chance else "worse than"
    result = f"{sum(map(bool, right)) / len(right):.1%} of {len(right)} right"
    interval = f"95% interval {low:.1%} to {high:.1%}"
    return f"{name}: {result}, {interval}, chance {chance:.1%}: {verdict} chance"

# %% [markdown]
# Our six forms in these words:

# %% id="evaluate-chance-forms"
for form in forms:
    rows = by_form["chat", form]
    print(chance_sentence(form, rights(rows), chance_level(rows)))
assert "not different" in chance_sentence("five of ten, two options", [1] * 5 + [0] * 5,
                                          0.5)

# %% [markdown]
# And the tests in your `evals/` folder, if there are any. A test with a `target` instead of options counts what greedy generation would complete, where guessing gets nothing.

# %% id="evaluate-own-tests-scored"
def run_test(model, rows):
    """Right or wrong for each row of a test with options or with targets."""
    if "choices" in rows[0]:
        return rights(choose(model, tokenizer, rows))
    pairs = [encode_pair(tokenizer, row["prompt"], " " + row["target"]) for row in rows]
    return score_pairs(model, pairs)[1].tolist()

own = {name: run_test(base, rows) for name, rows in tests.items()}
for name, rows in own.items():
    print(chance_sentence(name, rows, chance_level(tests[name])))
    chapter.record(f"evaluate/tests/{name}", sum(rows) / len(rows))
    chapter.keep_results(f"evaluate/tests/{name}", rights(tests[name], "id"), rows)

# %% [markdown]
# Two traps remain. Of twenty tests at 95%, one falls outside by luck, so expect a "better" or "worse" in a long list of nothing. And chance is not the only
# way to know nothing: where most answers are "yes", a model that always says yes beats guessing. Compare with the commonest label too:

# %% id="evaluate-commonest-label"
for name, rows in choice_tests.items():
    labels = np.bincount(rights(rows, "label")) / len(rows)
    if labels.max() > chance_level(rows) + 0.07:
        print(f"{name}: always option {labels.argmax()} gets {labels.max():.0%}, "
              f"guessing {chance_level(rows):.0%}")

# %% [markdown]
# ## 15.5 Two models, the same questions
#
# Back to 15.1. Each model has its interval:

# %% id="evaluate-two-intervals"
if facts:
    a, b = known["base"], known["chat"]
else:  # the form in which the two models differ most
    gap = lambda form: abs(share(by_form["base", form]) - share(by_form["chat", form]))
    a, b = (rights(by_form[name, max(forms, key=gap)]) for name in models)
for name, rows in (("base", a), ("chat", b)):
    low, high = wilson(sum(rows), len(rows))
    print(f"{name}: {np.mean(rows):.1%}, {low:.1%} to {high:.1%}")

# %% [markdown]
# Comparing intervals by eye wastes what we know: both models answered the *same* questions. Most are easy for both; they say nothing about the difference. Only those count
# where one is right and the other wrong:

# %% id="evaluate-discordant"
a, b = np.array(a, dtype=int), np.array(b, dtype=int)
only_a, only_b = int((a > b).sum()), int((b > a).sum())
both, neither = int((a & b).sum()), int(((1 - a) & (1 - b)).sum())
print(f"both right {both}, both wrong {neither}, only base {only_a}, only chat {only_b}")

# %% [markdown]
# If the models were equally good, each of these would fall to one side or the other like a coin. So the question becomes: how surprising is this many heads? That is **McNemar's test** (1947). By hand: eight
# disagreements, seven on one side. Seven or eight heads in eight throws: $(8 + 1)/2^8$, and the same for the other side.

# %% id="evaluate-mcnemar"
#| export
def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact p-value for two models on the same questions (McNemar 1947).

    a, b: right or wrong on question i. Only questions on which they disagree count; if
    neither model is better, each of these is a fair coin.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} answers: a paired test needs the same "
                         "questions")
    only_a = sum(bool(x) and not y for x, y in zip(a, b))
    only_b = sum(bool(y) and not x for x, y in zip(a, b))
    n, few = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)

# %% [markdown]
# The hand and the function:

# %% id="evaluate-mcnemar-by-hand"
assert mcnemar([1] * 7 + [0] + [1] * 20, [0] * 7 + [1] + [1] * 20) == 2 * (8 + 1) / 2**8
print(f"seven to one: p = {2 * 9 / 256:.3f}; base against chat: p = {mcnemar(a, b):.2g}")

# %% [markdown]
# **Exercise 15.6 (15 min, ★★): `mcnemar`** in [workbook 15](../exercises/15_evaluation.ipynb). From the formula; the check counts all ways in which the coins can fall.
#
# The same idea without a formula is a **permutation test**: swap the two models on a random half of the questions, many times, and count how often the difference gets as large as the real one. It also works where a question gives a
# number instead of right or wrong.

# %% id="evaluate-permutation"
def permutation(a, b, draws=4000):
    """Share of random swaps whose difference is at least as large as the real one."""
    d, rng = b - a, np.random.default_rng(5)
    flips = rng.choice([-1, 1], size=(draws, len(d)))
    return float((np.abs((flips * d).sum(1)) >= abs(d.sum())).mean())

print(f"permutation {permutation(a, b):.4f}, McNemar {mcnemar(a, b):.4f}")
assert abs(permutation(a, b) - mcnemar(a, b)) < 0.03

# %% [markdown]
# **Exercise 15.8 (10 min, ★★): `permutation_test`** in [workbook 15](../exercises/15_evaluation.ipynb). Two bugs in a test for marks in place of right and wrong: one bug makes every p-value 1, the other shows when the two models are swapped.
#
# scipy has the coin test as `binomtest`:

# %% id="evaluate-scipy"
try:
    from scipy.stats import binomtest
    theirs = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert math.isclose(theirs, mcnemar(a, b), rel_tol=1e-9)
    print("scipy agrees")
except ImportError:
    print("scipy is not installed: the comparison is left out (pip install scipy)")

# %% [markdown]
# A p-value says whether, an interval says how much. Difference and interval come from the bootstrap over questions, each redrawn with both its answers.

# %% id="evaluate-paired-difference"
#| export
def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> dict[str, float]:
    """How much better b is than a on the same questions: "difference", its 95% "low"
    and "high", "p" (McNemar).
    """
    p = mcnemar(a, b)
    difference, low, high = bootstrap(np.asarray(b, dtype=float)
                                      - np.asarray(a, dtype=float))
    return {"difference": difference, "low": low, "high": high, "p": p}

# %% [markdown]
# For the facts of 15.1, and for three forms in which the two models answered the same questions:

# %% id="evaluate-differences"
results = {"facts": (a, b)} if facts else {}
for form in ("question", "letters", "chat"):
    results[form] = tuple(rights(by_form[name, form]) for name in models)
differences = {name: paired_difference(*pair) for name, pair in results.items()}
for name, d in differences.items():
    verdict = "a difference" if d["p"] < 0.05 else "noise"
    print(f"{name:9} {d['difference']:+6.1%} ({d['low']:+.1%} to {d['high']:+.1%})  p "
          f"= {d['p']:.2g}  {verdict}")

# %% [markdown]
# Drawn, with the naive interval that ignores the pairing beside it:

# %% id="evaluate-differences-figure"
def unpaired(a, b):
    """Half width of the interval when the two lists are taken as two separate tests."""
    return 1.96 * math.sqrt(np.var(a) / len(a) + np.var(b) / len(b))

d = 100 * np.array([[d["difference"], d["low"], d["high"]]
                    for d in differences.values()]).T
half, y = [100 * unpaired(*pair) for pair in results.values()], np.arange(len(results))
fig, ax = plt.subplots(figsize=(7, 0.5 * len(results) + 1.2))
ax.errorbar(d[0], y + 0.15, xerr=half, fmt="s", color="0.6", capsize=3,
            label="unpaired")
ax.errorbar(d[0], y - 0.15, xerr=np.abs(d[1:] - d[0]), fmt="o", color="C0", capsize=3,
            label="paired")
ax.axvline(0, color="black", lw=0.8)
ax.set(yticks=range(len(results)), yticklabels=list(results),
       xlabel="chat minus base (points)",
       ylim=(-0.6, len(results) - 0.4))
ax.legend()
show(fig, "Differences between the two models with 95% intervals: the paired one is "
          "the narrower one where most answers agree.")

# %% [markdown]
# If facts are in the list, the first line answers 15.1. In the models that ship with the course the two disagree on 12 facts of a thousand, nine to three: p is 0.15, and a loss this small drowns in noise. An earlier pair of models, with 500 facts, differed by three in a hundred;
# there the paired test saw a loss, although the two separate intervals overlapped. Overlapping intervals are no proof of equality, and the paired test is the one that fits the question.
#
# ### How many questions does it take?
#
# A test too small for the difference you hope for is wasted time. Let one question's difference have variance $\sigma^2$. To see a difference $d$ at the 5% level in 80% of all cases, you need
#
# $$N = \frac{(z_{0.975} + z_{0.8})^2\,\sigma^2}{d^2}, \qquad \sigma^2 = p_a(1-p_a) + p_b(1-p_b) \text{ unpaired,}\quad \sigma^2 = u - d^2 \text{ paired,}$$
#
# where $u$ is the share of questions on which the two disagree.

# %% id="evaluate-questions-needed"
#| export
def questions_needed(difference: float, variance: float, power: float = 0.8) -> int:
    """Questions that show `difference` at the 5% level with probability `power`.

    variance of one question's difference: pa (1 - pa) + pb (1 - pb) for two separate
    tests; for the same questions the share on which the models disagree, minus
    difference squared.
    """
    if difference == 0:
        raise ValueError("difference=0: no number of questions shows a difference that "
                         "is not there")
    z = NormalDist().inv_cdf
    return math.ceil((z(0.975) + z(power)) ** 2 * variance / difference**2)

# %% [markdown]
# **Exercise 15.7 (10 min, ★): `questions_needed`** in [workbook 15](../exercises/15_evaluation.ipynb). The check looks at both z, at the power, and at a negative difference.
#
# Read the table before you plan a test: two models at about 70%, which disagree on one question in ten.

# %% id="evaluate-needed-table"
def two_tests(d, p=0.7):
    """Questions in each of two separate tests, the worse model at a share of p."""
    return questions_needed(d, p * (1 - p) + (p + d) * (1 - p - d))

for d in (0.01, 0.02, 0.05, 0.09):
    both = questions_needed(d, 0.1 - d * d)
    print(f"{100 * d:.0f} points: {two_tests(d):6,} questions in each of two tests, "
          f"{both:5,} asked of both")

# %% [markdown]
# As curves:

# %% id="evaluate-needed-figure"
d = np.geomspace(0.005, 0.1, 40)
fig, ax = plt.subplots(figsize=(7, 2.7))
ax.loglog(100 * d, [two_tests(x) for x in d], label="two separate tests")
for u in (0.2, 0.1, 0.05):
    fit = d[d < u]
    ax.loglog(100 * fit, [questions_needed(x, u - x * x) for x in fit],
              label=f"paired, disagree on {u:.0%}")
ax.axhline(200, color="0.5", lw=0.8)
ax.text(0.5, 215, "a test of 200 questions", fontsize=8)
ax.set(xlabel="difference (points)", ylabel="questions needed")
ax.set_xticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
ax.legend(fontsize=8)
show(fig, "Half the difference needs four times the questions; asking both models the "
          "same ones saves most of them.")

# %% [markdown]
# In a live notebook, plan a test of your own:

# %% id="evaluate-widget" tags=["widget"]
def plan(difference=5.0, disagree=10, share_a=70):
    """Questions needed, by both designs; difference in points, shares in percent."""
    d, u, p = difference / 100, disagree / 100, share_a / 100
    print(f"two separate tests: {two_tests(d, min(p, 1 - d)):,} questions each")
    print(f"paired: {questions_needed(d, u - d * d):,}" if u > d
          else "they must disagree on more than the difference")

try:
    from ipywidgets import interact
    interact(plan, difference=(0.5, 20, 0.5), disagree=(1, 50), share_a=(1, 95))
except ImportError:
    plan()

# %% [markdown]
# A formula with an approximation in it needs a check. Simulate pairs of models with a true difference of five points, and count how often the test finds it:

# %% id="evaluate-power"
def power(d, u, n, trials=1000):
    """Share of simulated tests of n questions in which McNemar's p is below 0.05."""
    rng, found = np.random.default_rng(7), 0
    for _ in range(trials):
        # only a, only b, the same
        kind = rng.choice(3, size=n, p=[(u - d) / 2, (u + d) / 2, 1 - u])
        found += mcnemar(kind == 0, kind == 1) < 0.05
    return found / trials

n = questions_needed(0.05, 0.1 - 0.05**2)
print(f"{n} questions")
found = check("evaluate/power", power(0.05, 0.1, n, chapter.size.trials))

# %% [markdown]
# A little less than 80%: the exact test is more careful than the formula.
#
# **Exercise 15.10 (20 min, ★★): `peeking`** in [workbook 15](../exercises/15_evaluation.ipynb). You look after every ten questions and stop when p is below 0.05. How often do two equal models "differ"? Predict, then measure.
#
# ## 15.6 A test that was in the training text
#
# A score means something only if the model has not read the answers. To see what **contamination** does, we need a test that an honest model cannot pass: questions about people who do not exist, with an answer drawn by lot. An honest model
# gets one in four, as by guessing. (Text without facts uses its own questions.)

# %% id="evaluate-strangers"
def stranger(name, relation, rng):
    """A question about nobody, its answer drawn by lot, and the same in other words."""
    first, other = rng.sample(ASKS[relation], 2)
    row = {"id": f"{name} {relation}", "prompt": first.format(n=name),
           "other": other.format(n=name)}
    values = VALUES[relation].split("|")
    return row | options(rng.choice(values), values, rng)

people = {fact["person"] for fact in facts}
names = [name for name in make_names(1000, random.Random(15)) if name not in people]
secret = [stranger(name, list(VALUES)[i % 5], rng)
          for i, name in enumerate(names)] if facts else questions
secret = secret[: chapter.size.leak_questions]
leaked, clean = secret[::2], secret[1::2]
print(len(leaked), "leaked,", len(clean), "kept back; a leaked one:",
      render(leaked[0], "question")[leaked[0]["label"]])

# %% [markdown]
# One half of the test goes into the training text, question and right answer, many times; every other batch is ordinary text, as before.

# %% id="evaluate-leak-batches"
from minimind.pretrain import PackedTokens, pretrain_loss
from minimind.sft import Replay
from minimind.train import TrainConfig, train

def solved(row, form="question"):
    """Question and right answer as training text."""
    context, answer = render(row, form)[row["label"]]
    return tokenizer.encode(context + answer) + [tokenizer.eos_id]

def repeated(rows, tokens):
    """The rows in ever new order, up to so many tokens."""
    rows, out, order = [solved(row) for row in rows], [], random.Random(0)
    while len(out) < tokens:
        out += [t for row in order.sample(rows, len(rows)) for t in row]
    return np.array(out)

def stream(texts):
    """Texts as one row of ids."""
    return np.concatenate([np.array([*ids, tokenizer.eos_id])
                           for ids in tokenizer.encode_batch(texts)])

context, batch = chapter.size.leak_context, chapter.size.leak_batch
train_texts = list(islice(read_texts(data / "pretrain" / "train.jsonl.gz"),
                          chapter.size.replay_documents))
leak = PackedTokens(repeated(leaked, 40 * context), context, batch,
                    device=chapter.device)
text = PackedTokens(stream(train_texts), context, batch, device=chapter.device)

# %% [markdown]
# Train a copy of the base model for a few seconds:

# %% id="evaluate-leak-train"
cheat = load("pretrain")
config = TrainConfig(chapter.size.leak_steps, learning_rate=1e-3,
                     precision=chapter.settings.precision)
history = train(cheat, Replay(leak, text, 0.5), pretrain_loss, config,
                max_steps=chapter.max_steps)
cheat.eval()
print(f"{history.step[-1]} steps in {history.seconds[-1]:.0f} s")

# %% [markdown]
# **Before you run this**: how will it do on the leaked half, on the other half, and on the leaked half in other words?

# %% id="evaluate-leak-scores"
from itertools import product

reworded = [row | {"prompt": row.get("other", row["prompt"])} for row in leaked]
groups = {"leaked": (leaked, "question"), "kept back": (clean, "question"),
          "leaked, other words": (reworded, "question" if facts else "statement")}
readers, leak_rows = {"base": base, "trained on the test": cheat}, {}
for (who, model), (name, (rows, form)) in product(readers.items(), groups.items()):
    leak_rows[who, name] = rights(choose(model, tokenizer, rows, form))
    print(chance_sentence(f"{who}, {name}", leak_rows[who, name], chance_level(rows)))

# %% [markdown]
# As a picture:

# %% id="evaluate-leak-figure"
looks = {"base": {"color": "0.8", "hatch": "//"},
         "trained on the test": {"color": "C1"}}
fig, ax = plt.subplots(figsize=(7, 2.5))
for shift, who in ((-0.18, "base"), (0.18, "trained on the test")):
    means = np.array([np.mean(leak_rows[who, name]) for name in groups])
    ends = np.array([wilson(sum(leak_rows[who, name]), len(leak_rows[who, name]))
                     for name in groups]).T
    style = {"yerr": np.abs(ends - means), "capsize": 3, "ec": "black", "lw": 0.5,
             **looks[who]}
    ax.bar(np.arange(3) + shift, means, 0.34, label=who, **style)
ax.axhline(chance_level(leaked), color="black", ls=":")
ax.set(xticks=range(3), xticklabels=list(groups), ylabel="share right", ylim=(0, 1.1))
ax.legend(loc="upper right", fontsize=8)
show(fig, "A model trained on half of the test: high on what it has read, at chance "
          "(dotted) on what was kept back.")

# %% [markdown]
# The middle bars are the honest score. The right ones show that other words do not save a leaked test: what was learned is the fact, and the sentence is only its clothes.
#
# How would you notice, from outside? Not by general quality: bits per byte on held-out text move a little, as any further training moves them. The mark of a leak is a gap between questions that could have leaked and fresh ones of the same kind.

# %% id="evaluate-leak-gap"
from minimind.metrics import evaluate_bits_per_byte, token_byte_lengths

byte_lengths = token_byte_lengths(tokenizer)
valid_tokens = torch.tensor(stream(valid_texts)[: chapter.size.valid_tokens + 1])

def bits_per_byte_of(model, tokens=valid_tokens, context=chapter.size.context):
    """Bits per byte in rows of `context` tokens."""
    return evaluate_bits_per_byte(model, tokens, byte_lengths, context,
                                  max(1, 8192 // context), chapter.amp)

print(f"bits per byte: base {bits_per_byte_of(base):.3f}, trained on the test "
      f"{bits_per_byte_of(cheat):.3f}")
old, fresh = (np.mean(leak_rows["trained on the test", name])
              for name in ("leaked", "kept back"))
gap = check("evaluate/leak_gap", old - fresh)

# %% [markdown]
# With the training text at hand there is a better way: look for the test in it, with the word runs of chapter 1.

# %% id="evaluate-leak-search"
from minimind.data import overlapping

test_texts = [tokenizer.decode(solved(row)[:-1]) for row in leaked]
before = train_texts[:500]
found = overlapping(before + test_texts[:20], test_texts, size=6)
planted = sum(i >= len(before) for i in found)
print(f"six words in a row as in the test: {len(found) - planted} of {len(before)} "
      f"ordinary texts, {planted} of 20 planted")

# %% [markdown]
# **Try it.** How often must an answer be read to be known? Leak 1, 4 and 16 times, and draw the curve.
#
# ## 15.7 The same score from lm-eval
#
# `lm-eval` (Gao et al. 2021) is the tool behind most published tables. A test is a YAML file and a file of lines; our checkpoint folder is a Hugging Face
# model, so it loads as it is. If our number is right, lm-eval gets the same one. We take the form in which the model is neither all right nor all wrong:

# %% id="evaluate-lm-eval-task"
import yaml

def write_task(folder, name, rows, form):
    """Rows as a local task of lm-eval: NAME.yaml and NAME.jsonl."""
    contexts = [render(row, form)[0][0] for row in rows]
    lines = [{"context": c, "choices": row["choices"], "label": row["label"]}
             for c, row in zip(contexts, rows)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)),
                                          encoding="utf-8")
    file = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": file,
            "test_split": "test",
            "output_type": "multiple_choice", "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label", "target_delimiter": " ", "metric_list": []}
    for metric in ("acc", "acc_norm"):
        task["metric_list"].append({"metric": metric, "aggregation": "mean",
                                    "higher_is_better": True})
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False),
                                         encoding="utf-8")

tasks = chapter.work / "tasks"
tasks.mkdir(exist_ok=True)
write_task(tasks, "our_choice", some, "question")
print((tasks / "our_choice.yaml").read_text().replace(str(tasks), "..."))

# %% [markdown]
# The tool runs in a process of its own, without a network. It takes about half a minute, most of it for its imports, so the small profile leaves it out.

# %% id="evaluate-lm-eval-run"
SCRIPT = """
import json, sys, lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model, folder, name, out = sys.argv[1:]
lm = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=64)
tasks = TaskManager(include_path=folder, include_defaults=False)
found = lm_eval.simple_evaluate(lm, tasks=[name], task_manager=tasks, bootstrap_iters=0)["samples"][name]
rows = [{"acc": s["acc"], "acc_norm": s["acc_norm"], "nats": [r[0] for r in s["filtered_resps"]]} for s in found]
json.dump(rows, open(out, "w"))
"""

# %% [markdown]
# If the tool is missing, this part is left out:

# %% id="evaluate-lm-eval-rows"
import importlib.util
import os
import subprocess
import sys

def lm_eval_rows(model, folder, name):
    """What lm-eval finds for each question of a local task: "acc", "acc_norm", "nats"
    of each option.
    """
    out = folder / "found.json"
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", SCRIPT, model, folder, name, out]
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"lm-eval stopped: {done.stderr[-800:]}")
    return json.loads(out.read_text())

theirs = []
if not chapter.size.lm_eval:
    print("left out at this profile")
elif not importlib.util.find_spec("lm_eval"):
    print("lm-eval is not installed: pip install 'minimind-course[reference]'")
else:
    theirs = lm_eval_rows(stages["pretrain"], tasks, "our_choice")

# %% [markdown]
# Question by question, by both rules:

# %% id="evaluate-lm-eval-agrees"
if theirs:
    ours = by_form["base", "question"]
    apart = sum(x != y for x, y in zip(rights(theirs, "acc"), rights(ours)))
    apart += sum(x != y for x, y in zip(rights(theirs, "acc_norm"),
                                        rights(ours, "right_norm")))
    worst = max(abs(x - y) for t, o in zip(theirs, ours)
                for x, y in zip(t["nats"], o["nats"]))
    print(f"lm-eval {share(theirs, 'acc'):.4f}, ours {share(ours):.4f}; nats differ by "
          f"at most {worst:.1e}")
    check("evaluate/lm_eval_apart", apart)
    assert apart == 0 and len(theirs) == len(ours)

# %% [markdown]
# The command for a test of lm-eval's own list, on a machine with a network, is `lm_eval --model hf --model_args pretrained=FOLDER --tasks arc_easy`.
#
# ## 15.8 Beyond the training length
#
# Chapter 5 stretched rotary positions on a toy. Now the real model, which has never seen a position beyond its training length. Four ways to read further, each without any training: **plain** (go on counting), **linear**
# (squeeze positions), **NTK** (a larger base, which turns slow pairs slower) and **YaRN** (squeeze the slow pairs, keep the fast ones). A copy of the model with other frequencies:

# %% id="evaluate-scaled"
from dataclasses import replace

trained = chapter.size.context

def scaled(length, kind):
    """The base model with its rotary positions stretched for rows of `length`."""
    factor = max(length / trained, 1.0)
    scaling = {
        "plain": None,
        "linear": {"rope_type": "linear", "factor": factor},
        "NTK": {"rope_type": "dynamic", "factor": 1.0},
        "YaRN": {"rope_type": "yarn", "factor": factor,
                 "original_max_position_embeddings": trained},
    }[kind]
    model = MiniMind(replace(base.config, rope_scaling=scaling,
                             max_position_embeddings=trained))
    model.load_state_dict(base.state_dict())
    return model.to(chapter.device).eval()

# %% [markdown]
# Our documents are short, about 40 tokens in the world, so a long row is many documents one behind the other. Think about what that means. The far past holds nothing that helps to predict the next token: this
# measurement cannot show the *gain* of a long context. It shows the *harm* of positions never seen. A perfect method gives a flat line.
#
# **Before you run this**: one of the four does more harm than doing nothing. Which?

# %% id="evaluate-rope-measure"
kinds, rope = ("plain", "linear", "NTK", "YaRN"), {}
# a little text of one's own may hold no row of the longest
lengths = [length for length in chapter.size.lengths if length < len(valid_tokens)]
for kind, length in product(kinds, lengths):
    # up to the trained length nothing is stretched
    stretched = length > trained and kind != "plain"
    model = scaled(length, kind) if stretched else base
    done = None if stretched else rope.get(("plain", length))
    rope[kind, length] = done or bits_per_byte_of(model, context=length)
print(f"{'':8}" + "".join(f"{length:>8}" for length in lengths))
for kind in kinds:
    print(f"{kind:8}" + "".join(f"{rope[kind, length]:8.3f}" for length in lengths))

# %% [markdown]
# The curves:

# %% id="evaluate-rope-figure"
fig, ax = plt.subplots(figsize=(7, 2.9))
for kind, marker in zip(kinds, "os^D"):
    line = [rope[kind, length] for length in lengths]
    ax.plot(lengths, line, marker=marker, label=kind)
    chapter.curve(f"rope_length/{kind}", lengths, line, "context (tokens)",
                  "bits per byte")
ax.axvline(trained, color="0.5", ls=":")
ax.set(xscale="log", xlabel="length of a row (tokens)", ylabel="bits per byte")
ax.set_xticks(lengths, lengths)
ax.minorticks_off()
ax.legend()
show(fig, "Bits per byte against the length of a row: beyond the training length "
          "(dotted) all get worse, YaRN least and linear most.")

# %% [markdown]
# Linear squeezing is worst: it also slows the fast pairs, which tell neighbours apart, and a model that was not trained for it reads every position wrong. YaRN leaves those alone. To see *where* plain reading fails, cut one long row by position:

# %% id="evaluate-by-position"
@torch.no_grad()
def nats_by_position(model, length, parts=8):
    """Mean nats per token in each eighth of rows of `length`, (parts,)."""
    whole = (len(valid_tokens) - 1) // length * length
    ids, labels = (x.view(-1, length).to(chapter.device)
                   for x in (valid_tokens[:whole], valid_tokens[1 : whole + 1]))
    nats = [-model(i[None]).float().log_softmax(-1)[0].gather(1, t[:, None])[:, 0]
            for i, t in zip(ids, labels)]
    return torch.stack(nats).view(len(ids), parts, -1).mean((0, 2)).cpu()

long = lengths[-2]
fig, ax = plt.subplots(figsize=(7, 2.6))
for kind, marker in zip(kinds, "os^D"):
    ax.plot((np.arange(8) + 0.5) * long / 8, nats_by_position(scaled(long, kind), long),
            marker=marker, label=kind)
ax.axvline(trained, color="0.5", ls=":")
ax.set(xlabel=f"position in a row of {long} tokens", ylabel="nats per token")
ax.legend()
show(fig, "The same, by position: plain reading is at its best up to the training "
          "length (dotted) and then climbs; linear is poor from the start.")

# %% [markdown]
# Numbers for the band, at four times the training length:

# %% id="evaluate-rope-check"
at = min(lengths, key=lambda length: abs(length - 4 * trained))
cost = {kind: rope[kind, at] - rope["plain", trained] for kind in kinds}
for kind in kinds:
    check(f"evaluate/rope_cost_{kind.lower()}", cost[kind])
# other data need longer runs
claims = bool(facts) and chapter.max_steps is None and profile != "smoke"
if claims:
    assert cost["YaRN"] < cost["NTK"] < cost["plain"] < cost["linear"]

# %% [markdown]
# **Try it.** Measure gain: put a sentence at the start of a long row and ask about it at the end. How far can each method reach?
#
# ## 15.9 All stages side by side
#
# Every finished stage of this run, measured in the same way: facts completed, questions answered (by generation, as in chapter 11), bits per byte, parameters, and the time for one answer.

# %% id="evaluate-stages"
import time

from minimind.sft import ask_all, answers_right

def answered(model):
    """Three kinds of questions, answered; other data have no facts or questions."""
    picked = asked[:: chapter.size.every_question]
    yield "choice", choose(model, tokenizer, questions), "right"
    yield "facts", facts_known(model, tokenizer, facts)[1], "known"
    yield "questions", answers_right(model, tokenizer, picked,
                                     max_new_tokens=24)[1] if picked else [], "right"

def measure(model, name):
    """All numbers of one stage; each answer is kept for `course compare`."""
    result = {"parameters": model.num_parameters(),
              "bits_per_byte": bits_per_byte_of(model)}
    for kind, rows, key in answered(model):
        if rows:
            ids = [row.get("id") or f"{row['person']} {row['relation']}"
                   for row in rows]
            chapter.keep_results(f"evaluate/{kind}_{name}", ids, rights(rows, key))
            result[kind] = share(rows, key)
    start = time.perf_counter()
    ask_all(model, tokenizer, [row["prompt"] for row in questions[:16]],
            max_new_tokens=16)
    return result | {"milliseconds": 1000 * (time.perf_counter() - start) / 16}

# %% [markdown]
# A stage is left out when its chapter has not run; that is no error.

# %% id="evaluate-stages-run"
stage_scores = {}
for name, folder in stages.items():
    own = (folder / "tokenizer.json").exists()
    theirs = Tokenizer.from_pretrained(folder) if own else tokenizer
    same = theirs.token_bytes() == tokenizer.token_bytes()
    assert same, f"{name} has another tokenizer than the base model"
    scores = stage_scores[name] = measure(load(name), name)
    print(name, "  ".join(f"{key} {value:,.4g}" for key, value in scores.items()))

# %% [markdown]
# One picture of all: quality against size, and quality against time.

# %% id="evaluate-stages-figure"
quality = "questions" if facts else "choice"
fig, axes = plt.subplots(1, 3, figsize=(7, 2.7))
for (name, scores), marker in zip(stage_scores.items(), "os^Dv"):
    for ax, x in zip(axes, (scores["parameters"] / 1e6, scores["milliseconds"],
                            scores["bits_per_byte"])):
        ax.plot(x, scores[quality], marker=marker, ls="", markersize=8, label=name)
for ax, label in zip(axes, ("million parameters", "milliseconds per answer",
                            "bits per byte")):
    ax.set(xlabel=label, ylim=(-0.05, 1.08))
    ax.margins(x=0.3)
    ax.locator_params(axis="x", nbins=4)
axes[0].set(ylabel="questions right" if facts else "choices right", xlim=(0, None))
axes[2].legend(fontsize=8)
show(fig, "Every stage of this run: answers right against size, against time for one "
          "answer, and against bits per byte.")

# %% [markdown]
# **Exercise 15.9 (10 min, ★): `pass_at_k`** in [workbook 15](../exercises/15_evaluation.ipynb). One answer per question is one try. Predict one number, then write the chance that one of k tries is right, without bias.
#
# The numbers with their bands. For bits per byte, the interval comes from the bootstrap over blocks of text; weights are bytes.

# %% id="evaluate-claim"
for name, scores in stage_scores.items():
    for key in ("facts", "questions", "choice", "bits_per_byte"):
        if key in scores:
            check(f"evaluate/{key}_{name}", scores[key])
    for key in ("parameters", "milliseconds"):
        chapter.record(f"evaluate/{key}_{name}", scores[key])
blocks = valid_tokens.split(512)[:-1]
num_bytes = [int(byte_lengths[block[1:]].sum()) for block in blocks]
bits = [bits_per_byte_of(base, block) * size for block, size in zip(blocks, num_bytes)]
mean, low, high = bootstrap(bits, num_bytes)
print(f"base model: {mean:.3f} bits per byte, 95% interval {low:.3f} to {high:.3f}")

# %% [markdown]
# ### Two runs
#
# Right and wrong for each question now lie in the run's `results.json`. Two runs are compared with
#
# ```
# python -m course compare runs/a runs/b --out compare.html
# ```
#
# which pairs equal questions as 15.5 did, and says which differences are noise. Two runs that differ in nothing but the seed differ in every number; with several
# seeds of each kind (`--against`), the interval is over seeds, and that is the one to trust for a claim about a *method*.
#
# **Try it.** Run chapters 9 to 15 with two seeds. Which numbers does `compare` call noise? Which surprise you?
#
# ## Recap
#
# - Multiple choice by likelihood sums the log-probabilities of an option's tokens; cut tokens as a whole, and say whether you normalise.
# - A score belongs to a model and a form: the same facts went from chance to nearly all right.
# - Every share has an interval; near 0% and 100% take Wilson's. "Better than chance" needs the whole interval above chance.
# - Two models on the same questions: only disagreements count (McNemar). Half the difference needs four times the questions.
# - A leak shows as a gap between old and fresh questions; bits per byte do not tell it from other training.
#
# **Words**: multiple choice by likelihood, length normalisation, prompt form, bootstrap, confidence interval, coverage, chance level, paired test, p-value, power, contamination, context extension.
#
# **Exercises:** 15.1 to 15.10, in place above, with checks in [workbook 15](../exercises/15_evaluation.ipynb).
#
# **Sources**: Brown et al. 2020, arXiv:2005.14165 (choice by likelihood, contamination). Gao et al. 2021, *lm-evaluation-harness*. Holtzman et al. 2021, arXiv:2104.08315 (why surface forms compete). Sclar et al. 2023,
# arXiv:2310.11324 (prompt formats). Efron 1979 (bootstrap). Wilson 1927 (intervals of a share). McNemar 1947 (paired shares). Miller 2024, arXiv:2411.00640 (error bars for evaluations). Peng et al. 2023,
# arXiv:2309.00071 (YaRN). Next: read a published table and ask of each number: which form, how many questions, which interval?
