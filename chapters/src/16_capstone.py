# %% [markdown]
# # 16. Capstone: your own model
#
# At the end of this chapter you know whether your modules are right where it counts. A small model learns on the modules that you kept from the
# workbooks, and a second one on the course's own, from the same weights and the same batches. Their loss curves must agree. Then you talk with a
# chat model that runs on your code.
#
# You need one `keep()` from a workbook, of any chapter. Without one, this chapter runs on the course's modules alone, and says so.
#
# Reading 8 minutes; running: smoke 20 s, cpu 60 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# ## 16.1 Which modules are yours?
#
# `keep()` saves what passes its check to the folder `student/`, and the environment variable `MINIMIND_STUDENT` tells the package to use it. It is
# read when `minimind` is imported for the first time, so it must be set before. If nobody has set it, and there is such a folder, it is yours:

# %% id="capstone-folder"
import os

from course import artifacts, student

folder = os.environ.get("MINIMIND_STUDENT")
if folder is None:
    folder = "student" if (artifacts.home() / "student").is_dir() else ""
os.environ["MINIMIND_STUDENT"] = folder
mine = student.modules()  # imports minimind

# %% [markdown]
# Module by module:

# %% id="capstone-modules"
from pathlib import Path

import minimind

for path in sorted(Path(minimind.__file__).parent.glob("[a-z]*.py")):
    names = ", ".join(mine.get(path.stem, []))
    print(f"{path.stem:10} {'yours: ' + names if names else 'of the course'}")
if not mine:
    print("\nNothing is kept yet: below, both models are the course's own.")

# %% [markdown]
# Whatever you have not kept is the course's own, even inside a module of yours. So one kept function is enough to go on.
#
# ## 16.2 One run, twice
#
# Two runs can differ for three reasons that say nothing about your code: other starting weights, other batches, other random numbers while training.
# So all three are fixed. The batches are made here, once, and lie in a file:

# %% id="capstone-batches"
import random
from itertools import islice

import torch

from minimind.data import read_texts
from minimind.tokenizer import Tokenizer

tokenizer = Tokenizer.from_pretrained(chapter.read("sft"))
data = chapter.read("data")
steps, batch = chapter.steps(chapter.size.steps), chapter.size.batch
width = chapter.size.context + 1
texts = islice(read_texts(data / "pretrain" / "train.jsonl.gz"), chapter.size.texts)
ids = [token for row in tokenizer.encode_batch(list(texts))
       for token in [*row, tokenizer.eos_id]]
rows = [ids[i : i + width] for i in range(0, len(ids) - width, width)]
random.Random(16).shuffle(rows)
assert len(rows) >= steps * batch, "too little text: lower steps in the profile"
rows = torch.tensor(rows[: steps * batch]).view(steps, batch, width)  # (steps, B, T+1)
torch.save(rows, chapter.work / "rows.pt")
print(f"{steps} steps of {batch} rows of {width - 1} tokens")

# %% [markdown]
# A process that has imported your modules cannot take them back, so each run is a process of its own. This is all that it does. The first run saves
# the weights that it starts from, and the second one starts from them too, because your model may draw its random numbers in another order.

# %% id="capstone-program"
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from minimind.data import set_seed
from minimind.model import MiniMind, ModelConfig
from minimind.pretrain import pretrain_loss
from minimind.train import TrainConfig, train

folder, out, vocab_size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rows = torch.load(folder / "rows.pt")
batches = [{"input_ids": row[:, :-1], "labels": row[:, 1:]} for row in rows]
set_seed(0)
model = MiniMind(ModelConfig.preset("tiny", vocab_size=vocab_size))
if (folder / "start.pt").exists():
    model.load_state_dict(torch.load(folder / "start.pt"))
else:
    torch.save(model.state_dict(), folder / "start.pt")
config = TrainConfig(len(rows), precision="fp32", log_every=1)
history = train(model, batches, pretrain_loss, config)
Path(out).write_text(json.dumps({"loss": history.loss, "norm": history.grad_norm}))
"""
(chapter.work / "start.pt").unlink(missing_ok=True)

# %% [markdown]
# And this starts such a process, with your modules or without:

# %% id="capstone-run"
import json
import subprocess
import sys

def in_process(program: str, name: str, modules: str, *arguments: str) -> object:
    """Run a program with the modules of this folder ("": the course's); what it
    wrote."""
    out = chapter.work / f"{name}.json"
    out.unlink(missing_ok=True)
    path = os.pathsep.join([str(artifacts.home()), os.environ.get("PYTHONPATH", "")])
    told = os.environ | {"MINIMIND_STUDENT": modules, "PYTHONPATH": path}
    command = [sys.executable, "-c", program, str(chapter.work), str(out), *arguments]
    done = subprocess.run(command, env=told, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"the run on {modules or 'the course'} stopped: {last}")
    return json.loads(out.read_text())

size = str(tokenizer.vocab_size)
course = in_process(PROGRAM, "course", "", size)
yours = in_process(PROGRAM, "yours", folder, size)
print(f"loss: {course['loss'][0]:.3f} to {course['loss'][-1]:.3f} on the course's "
      f"modules, {yours['loss'][0]:.3f} to {yours['loss'][-1]:.3f} on yours")

# %% [markdown]
# ## 16.3 Both curves
#
# **Before you look**: if your attention let each position see one place into the future, would your curve lie above the other one, or below?

# %% id="capstone-figure"
import matplotlib.pyplot as plt
import numpy as np

a, b = np.array(course["loss"]), np.array(yours["loss"])
apart = np.abs(a - b)
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), width_ratios=(3, 2))
count = np.arange(1, len(a) + 1)
left.plot(count, a, lw=4, color="0.75", ls="-", label="the course's modules")
left.plot(count, b, lw=1.3, color="C0", ls="-", label="yours" if mine else "again")
left.set(xlabel="step", ylabel="loss (nats per token)")
left.legend()
right.semilogy(count, np.maximum(apart, 1e-9), color="C1", ls="-")
right.axhline(0.05, color="black", ls=":")
right.set(xlabel="step", ylabel="difference of the two losses", ylim=(5e-10, 10))
show(fig, "Left: the loss of both runs; the thin line must lie on the thick one. "
          "Right: how far apart they are, where 1e-9 stands for equal; a difference "
          "above the dotted line is no rounding.")
chapter.curve("capstone/course", count, a)
chapter.curve("capstone/yours", count, b)

# %% [markdown]
# A model that sees the future learns to copy it, so its curve lies *below*. A curve that is better than the reference is as wrong as one that is worse.
#
# ## 16.4 Rounding, or a bug?
#
# Two right programs need not give equal numbers. $(a + b) + c$ and $a + (b + c)$ differ in the last of the seven digits of float32, and a product of
# matrices is a long sum. So in the first step, where the weights are the same, the losses may differ by about $10^{-6}$. Each step of training turns that
# into slightly other weights, and the difference grows, slowly and without a direction. A bug looks different:
#
# | what you see | what it is |
# |---|---|
# | exactly equal | the same operations in the same order (or nothing of yours is used) |
# | the first loss within 0.0001, later a few thousandths, to both sides | rounding |
# | the first loss differs more | the model itself: attention, RoPE, the feed-forward part, the loss |
# | the first loss agrees, then the curves part | what training uses: gradients, the optimiser, the schedule |
#
# As assertions:

# %% id="capstone-agree"
norms = np.array(course["norm"]), np.array(yours["norm"])
turned = abs(norms[0][0] - norms[1][0]) / norms[0][0]
print(f"first loss {apart[0]:.1e} apart, first gradient {turned:.1e}, at most "
      f"{apart.max():.1e} later")
assert apart[0] < 1e-4, "the first loss differs: your model computes something else"
assert turned < 1e-3, "the first gradient differs: is a gradient cut off somewhere?"
assert apart.max() < 0.05, "the curves part: something that training uses is not right"
for name, value in (("first", apart[0]), ("most", apart.max()), ("last", b[-1])):
    check(f"capstone/{name}", value)

# %% [markdown]
# The check in a workbook looks at one function at a time. This looks at all of them together, and at nothing else: a curve that agrees says that your
# modules do the course's work in the course's place.
#
# The same tests that hold for the course's package also run on yours:
#
# ```
# python -m course student
# ```
#
# prints which modules are yours and runs the course's tests of these modules, and of the model, with your functions in their place.
#
# ## 16.5 Talk
#
# So few steps make no chat model. Therefore the weights of chapter 11 go into a model that is built on your modules: your attention reads, your sampler
# writes, where you have kept them.

# %% id="capstone-chat"
from minimind.model import MiniMind
from minimind.sft import ask_all

questions = ["Where does Hanis live?", "What pet does Kara have?", "Who are you?",
             "Kara found an old map. Hanis found a drum. What did Kara find?",
             "Kara has 5 candles. Hanis gives 3 more to Kara. How many candles does "
             "Kara have?"]
model = MiniMind.from_pretrained(chapter.read("sft")).eval()
answers = ask_all(model, tokenizer, questions, max_new_tokens=32)
for question, answer in zip(questions, answers):
    print(f"{question}\n    {answer}")

# %% [markdown]
# And the same questions to the course's own:

# %% id="capstone-same-answers"
ASK = """
import json, sys
from pathlib import Path
from minimind.model import MiniMind
from minimind.sft import ask_all
from minimind.tokenizer import Tokenizer

folder, out, model, questions = sys.argv[1:]
tokenizer, model = Tokenizer.from_pretrained(model), MiniMind.from_pretrained(model)
answers = ask_all(model.eval(), tokenizer, json.loads(questions), max_new_tokens=32)
Path(out).write_text(json.dumps(answers))
"""
theirs = in_process(ASK, "answers", "", str(chapter.read("sft")), json.dumps(questions))
same = sum(x == y for x, y in zip(answers, theirs))
print(f"{same} of {len(questions)} answers are the same, word by word")
check("capstone/same_answers", same / len(questions))
assert same >= len(questions) - 1, "greedy answers differ: look at generate and its cache"

# %% [markdown]
# Without sampling the most likely token is written, and rounding changes it only where two are all but equally likely. One answer of five may differ for
# that reason, two may not.
#
# In a terminal, as long as you like:
#
# ```
# MINIMIND_STUDENT=student python -m minimind.chat data/checkpoints/sft
# ```
#
# **Try it.** Open `student/attention.py`, let `causal_mask` show one key too many, and run this chapter again. Which assertion stops it, and what does
# the figure show?
#
# **Try it.** Run the whole course on your modules: `MINIMIND_STUDENT=student make course`. Then compare it with a run on the course's own by
# `python -m course compare`.
#
# ## Recap
#
# - `student/` has what you kept; `MINIMIND_STUDENT` puts it into the package, function by function.
# - To compare two implementations, fix weights, batches and random numbers, and look at the first step before the curve.
# - Rounding is small, grows slowly and has no direction; a bug shows in the first loss, the first gradient, or a curve that parts from the other.
# - A loss that is better than the reference is a bug until you know why.
#
# **Words**: reference implementation, regression test, rounding error, contract test.
#
# **Sources**: Karpathy 2019, *A recipe for training neural networks* (fix the seed, overfit one batch, verify the loss at the start). Goldberg 1991,
# *What every computer scientist should know about floating-point arithmetic* (why sums depend on their order).
