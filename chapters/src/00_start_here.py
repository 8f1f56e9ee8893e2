# %% [markdown]
# # 0. Start here
#
# In ten minutes you will have checked your machine, seen where this course goes, found out what to read first, and talked
# with a language model that this course trained. From chapter 1 on, you build that model yourself: the text it
# reads, the tokenizer, attention, the training loop, and the chat.
#
# You need Python: functions, classes, lists and dictionaries. You need school algebra. Everything else is built in
# the chapters, and the self-test below tells you what to look up before you begin.
#
# Reading 8 minutes; running: smoke 5 s, cpu 8 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# ## 0.1 Is this machine ready?
#
# `course doctor` looks at your Python, your memory and your processor, and names the profile that fits. A *profile* is the one
# dial of this course: it sets every size, from the number of training steps to the width of the model. Here is the
# short form of its answer.

# %% id="start-machine"
from course.machine import describe

machine = describe()
for key in ("python", "torch", "cores", "memory_gb", "gpu", "bf16"):
    print(f"{key:10} {machine.get(key)}")

# %% [markdown]
# The versions must be at least Python 3.11 and torch 2.11. If the next cell complains, run `python -m course doctor`
# in a terminal: it says what is missing and what to do.

# %% id="start-versions"
import sys

import torch

python = sys.version.split()[0]
assert sys.version_info >= (3, 11), f"Python {python} is too old: this course needs 3.11"
torch_version = tuple(int(part) for part in torch.__version__.split(".")[:2])
assert torch_version >= (2, 11), f"torch {torch.__version__} is older than 2.11"

# %% [markdown]
# ## 0.2 The map
#
# A language model is a function that takes a text and says how likely each next piece of text is. Everything in this
# course makes that function, feeds it, trains it, or asks it something. Each chapter builds one part and adds it to a small package called
# `minimind`, which the later chapters import. Follow the arrows: each box uses only what stands before it.

# %% id="start-map"
import matplotlib.pyplot as plt

STAGES = {  # what a row is about: the chapters in it
    "text in": ["01 data", "02 tokenizer", "03 counting"],
    "the model": ["04 attention", "05 positions", "06 experts", "07 transformer"],
    "training": ["08 training loop", "09 pretraining"],
    "talking": ["10 generation", "11 chat (SFT)"],
    "improving": ["12 LoRA", "13 DPO", "14 distillation", "15 evaluation"],
}
colours = ["#e8e8e8", "#cfe3f2", "#fbe3c0", "#d5ead8", "#f3d9e6"]

# %% [markdown]
# The next cell only draws. Skip its code and look at the picture.

# %% id="start-map-draw"
fig, ax = plt.subplots(figsize=(7, 4))
for row, (stage, boxes) in enumerate(STAGES.items()):
    y = -row
    ax.text(-0.1, y, stage, ha="right", va="center", fontweight="bold")
    for column, box in enumerate(boxes):
        ax.text(0.55 + 1.35 * column, y, box, ha="center", va="center", fontsize=9,
                bbox={"boxstyle": "round,pad=0.45", "fc": colours[row], "ec": "black"})
        if column:
            ax.annotate("", (1.35 * column + 0.02, y), (1.35 * column - 0.28, y),
                        arrowprops={"arrowstyle": "->"})
    if row:
        ax.annotate("", (0.55, y + 0.3), (0.55, y + 0.7),
                    arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-1.0, 5.4), ylim=(-4.5, 0.5))
ax.axis("off")
show(fig, "The course in five rows: text becomes numbers, numbers pass through the "
          "model, training sets its weights, it talks, and then it is improved.")

# %% [markdown]
# Four words will come back in every chapter:
#
# - A **token** is a piece of text with a number: often a word, sometimes a syllable or one byte (chapter 2).
# - A **parameter** (or weight) is a number inside the model that training changes. The laptop model has about 1.5 million.
# - **Pretraining** means: guess the next token of a lot of text, and correct the weights after each guess (chapter 9).
# - **SFT**, supervised fine-tuning, means: go on training on questions with good answers, so that the model answers (chapter 11).
#
# ## 0.3 What do you know already?
#
# Ten questions. Decide for each before you look further down. Nobody sees your score.

# %% id="start-questions"
QUIZ = [
    ("A has shape (2, 3) and B has shape (3, 5). The shape of A @ B is",
     ["(2, 5)", "(3, 3)", "(5, 2)"], "a", "matrices"),
    ("x has shape (4, 1) and y has shape (1, 3). The shape of x + y is",
     ["an error", "(4, 3)", "(4, 1)"], "b", "matrices"),
    ("x.transpose(0, 1) of a tensor of shape (2, 7) has shape",
     ["(2, 7)", "(14,)", "(7, 2)"], "c", "tensors"),
    ("The derivative of x * x at x = 3 is", ["9", "6", "3"], "b", "gradients"),
    ("Gradient descent changes a weight",
     ["against its gradient", "along its gradient", "at random"], "a", "gradients"),
    ("softmax([0, 0]) is", ["[0, 0]", "[1, 1]", "[0.5, 0.5]"], "c", "probability"),
    ("A fair die shows a six twice in a row with probability", ["1/6", "1/36", "2/6"],
     "b", "probability"),
    ("log(a * b) equals", ["log a * log b", "log a + log b", "log(a + b)"], "b",
     "logarithms"),
    ("A model is perfect on its training text and bad on new text. It has",
     ["overfitted", "underfitted", "converged"], "a", "validation"),
    ("How many bytes does 'é' take in UTF-8?", ["1", "2", "4"], "b", "bytes"),
]

# %% [markdown]
# Read them here:

# %% id="start-print-questions"
for number, (question, options, _, _) in enumerate(QUIZ, 1):
    print(f"{number:2}. {question}   "
          + "   ".join(f"{letter}) {option}" for letter, option in zip("abc", options)))

# %% [markdown]
# Write your ten letters into `my_answers`, in order, with `?` where you do not know, and run the two cells below. (The letters there
# now belong to nobody in particular: they get seven right.)

# %% id="start-my-answers"
my_answers = "abcbacaaa?"

# %% [markdown]
# Each subject has a place where it is explained, in this course or elsewhere.

# %% id="start-score"
READ = {
    "matrices": "chapter 4, section 1; Zhang et al. (2023), Dive into Deep Learning, "
                "section 2.3",
    "tensors": "Zhang et al. (2023), Dive into Deep Learning, section 2.1",
    "gradients": "chapter 3, the neural bigram; Zhang et al. (2023), sections 2.4 and "
                 "2.5",
    "probability": "chapter 3, counting; Zhang et al. (2023), section 2.6",
    "logarithms": "chapter 3, why the loss is a logarithm",
    "validation": "chapter 1, the split; Zhang et al. (2023), section 3.6",
    "bytes": "chapter 2, section 1",
}


def score(answers: str) -> tuple[int, list[str]]:
    """Right answers out of ten, and the subjects to read up on, each once."""
    if len(answers) != len(QUIZ) or set(answers) - set("abc?"):
        raise ValueError(f"my_answers must be {len(QUIZ)} letters, each a, b, c or ?: "
                         f"got {answers!r}")
    wrong = [subject for given, (_, _, right, subject) in zip(answers, QUIZ)
             if given != right]
    return len(QUIZ) - len(wrong), list(dict.fromkeys(wrong))


# %% [markdown]
# Your score, and what to read first:

# %% id="start-score-show"
right, subjects = score(my_answers)
print(f"{right} of {len(QUIZ)} right.")
for subject in subjects:
    print(f"  {subject:12} -> {READ[subject]}")

# %% [markdown]
# With eight or more, go on. With five to seven, read the pages named above as you reach the chapters. With fewer, spend
# an evening on them first: the chapters will be much easier. The scoring itself can be checked.

# %% id="start-score-check"
assert score("".join(right for _, _, right, _ in QUIZ)) == (10, [])
assert score("?" * 10)[0] == 0 and len(score("?" * 10)[1]) == len(READ)

# %% [markdown]
# ## 0.4 A first talk
#
# The course ships a small model, trained by these very notebooks on a laptop. It has read short texts about a village of
# invented people and nothing else: it knows where Hanis and Zandine live, and it has never heard of France. Load it, and its tokenizer:

# %% id="start-load"
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

folder = chapter.read("sft")
model, tokenizer = MiniMind.from_pretrained(folder), Tokenizer.from_pretrained(folder)
millions = model.num_parameters() / 1e6
print(f"{millions:.2f} million parameters, {tokenizer.vocab_size} tokens")

# %% [markdown]
# The people it knows are listed with the data. We take five of them whom the chat training never asked about, so an answer
# must come from what the model read in pretraining.

# %% id="start-people"
import json

rows = [json.loads(line) for line in (chapter.read("data") / "questions.jsonl").open()]
fresh = [row for row in rows if not row["seen"]][:: max(1, len(rows) // 12)][:5]

# %% [markdown]
# **Predict before you run:** 1.5 million parameters, ten minutes of training on two cores. How many of the five will it get right?

# %% id="start-talk"
from minimind.sft import ask

replies = [ask(model, tokenizer, row["question"]) for row in fresh]
for row, reply in zip(fresh, replies):
    print(f"you:      {row['question']}\nminimind: {reply}   "
          f"({'right' if row['answer'] in reply else 'wrong: ' + row['answer']})\n")

# %% [markdown]
# Now ask something outside its world. A model answers whether it knows or not, and it sounds as sure as before. Keep this in mind
# whenever you read the words of a larger one.

# %% id="start-outside"
print(ask(model, tokenizer, "What is the capital of France?"))
print(ask(model, tokenizer, "Who are you?"))
assert all(replies), "an empty reply: the checkpoint in data/checkpoints/sft is damaged"

# %% [markdown]
# Ask your own. In a terminal, `python -m minimind.chat data/checkpoints/sft` opens a chat that goes on until you close it.
# In JupyterLab, type into the box and press Enter.

# %% id="start-chat-widget" tags=["widget"]
import ipywidgets as widgets

first = f"Where does {fresh[0]['person']} live?"
question = widgets.Text(value=first, description="you", continuous_update=False,
                        layout={"width": "80%"})
reply = widgets.HTML()


def answer_now(_=None) -> None:
    """Ask the model what stands in the box."""
    reply.value = f"<b>minimind</b>: {ask(model, tokenizer, question.value)}"


question.observe(answer_now, "value")
answer_now()
widgets.VBox([question, reply])

# %% [markdown]
# ## 0.5 What it sees
#
# The model never sees letters. Your question reaches it as a list of numbers, and it returns one probability for every token it knows.
# This is the whole interface, and chapters 2 to 9 fill it in.

# %% id="start-inside"
chat = [{"role": "user", "content": fresh[0]["question"]}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
print(prompt)
with torch.no_grad():
    probabilities = model(torch.tensor([prompt]))[0, -1].softmax(-1)
assert abs(probabilities.sum().item() - 1) < 1e-4

# %% [markdown]
# Its five likeliest first tokens:

# %% id="start-first-token"
top = probabilities.topk(5)
fig, ax = plt.subplots(figsize=(6, 2.2))
labels = [repr(tokenizer.decode([i])) for i in top.indices.tolist()]
ax.barh(labels[::-1], top.values.tolist()[::-1])
ax.set(xlabel="probability", xlim=(0, 1))
show(fig, f"The model's first token after the question: most of the probability goes "
          f"to {labels[0]}.")

# %% [markdown]
# ## 0.6 How to work with this book
#
# - Each chapter opens and runs alone. What it needs from earlier chapters comes from your newest run, or from small files that ship with the course.
# - Run one cell at a time. Where the text says **predict**, write your guess down first; the surprise is the lesson.
# - Change numbers and run again. Nothing you do in a chapter can break another one.
# - The whole course runs with `make course`, and shows its results in one page, `runs/latest/report.html`.
#
# ## Recap
#
# - A language model turns a list of tokens into a probability for each possible next token.
# - The course builds it in fifteen chapters; each adds one module to `minimind`.
# - One dial, the profile, sets all sizes: `smoke` to try, `cpu` for a laptop, `t4` and `gpu` for graphics cards.
# - A model answers with the same confidence inside and outside of what it knows.
# - The shipped model is the one you will have trained yourself after chapter 11.
#
# **Words of this chapter:** token, parameter, pretraining, SFT, profile.
#
# **Sources.** Zhang, Lipton, Li and Smola (2023), *Dive into Deep Learning*. The size and the names of the model follow MiniMind (Gong 2024);
# the way a chapter builds its code follows Raschka (2024), *Build a Large Language Model (From Scratch)*, and Karpathy's nanoGPT (2022).
# Next: chapter 1, where the text comes from.
