# %% [markdown]
# # Workbook 1. Data
#
# You write the parts of `minimind.data` that decide what a model reads: one spelling
# for one text, copies, test questions, the split, the mixture, and a row of tokens in
# many files. Then you repair a split that leaks, turn up small languages, and measure
# how often near copies meet. About two and a half hours; stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. A check that fails names the likely mistake and shows the
# smallest case. Hints open one at a time. `solution("clean")` shows that one solution
# and no other.

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# `SIGNS` matches the invisible signs of section 1.3, `WORD` a word of section 1.6.

# %% id="w01-imports"
import hashlib
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np

SIGNS = "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\ufeff]"
WORD = r"[\u3400-\u9fff]|\w+"

# %% [markdown] exercise="clean"
# ## 1. One spelling
#
# Write `clean`, so that texts that look the same are the same, and nothing that carries
# meaning goes:
#
# 1. every line end (`\r\n`, `\r`, U+2028, U+2029) becomes `\n`;
# 2. the no-break space U+00A0 becomes a space;
# 3. what `SIGNS` matches goes;
# 4. letters take the Unicode form NFC;
# 5. two or more spaces or tabs **between** two visible characters of a line become one
#    space (the indent of a line stays);
# 6. spaces and tabs at the end of a line go;
# 7. three or more line ends in a row become two, and blanks around the text go.
#
# Cleaning twice must be cleaning once, so mind the order. (Chapter section 1.3.)
#
# <details><summary>Hint 1: tools</summary>
#
# `re.sub(pattern, new, text)`, `str.replace`, `unicodedata.normalize("NFC", text)`,
# `str.strip`.
#
# </details>
# <details><summary>Hint 2: looking without taking</summary>
#
# `(?<=\S)` stands behind a visible character and `(?=\S)` before one, and neither takes
# it. With `flags=re.MULTILINE`, `$` stands at the end of every line.
#
# </details>
# <details><summary>Hint 3: order</summary>
#
# An invisible sign may stand between a letter and its accent, or between `\r` and `\n`.
# Line ends first, then signs, then letters, then blanks.
#
# </details>

# %% id="w01-clean" exercise="clean" points=4 minutes=20 difficulty=2 kind="rebuild"
def clean(text: str) -> str:
    """The text in one spelling: line ends, Unicode form, spaces. Twice is as once."""
    ### BEGIN SOLUTION
    text = re.sub("\r\n?|\u2028|\u2029", "\n", text).replace("\xa0", " ")
    text = unicodedata.normalize("NFC", re.sub(SIGNS, "", text))
    text = re.sub(r"(?<=\S)[ \t]{2,}(?=\S)", " ", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
    ### END SOLUTION

# %% id="w01-clean-check"
check("clean")

# %% [markdown] exercise="copies"
# ## 2. Exact copies
#
# `fingerprint` gives 16 bytes that stand for a text: the BLAKE2b hash of its UTF-8
# bytes, with a digest of 16 bytes. `exact_duplicates` finds every text that was there
# before and gives the pairs `(first, later)`: the place where the text stood for the
# first time, and the place of the copy. Keep fingerprints, not texts. (Section 1.4.)
#
# <details><summary>Hint 1: the hash</summary>
#
# `hashlib.blake2b(data, digest_size=...)`, and `.digest()` for the bytes.
#
# </details>
# <details><summary>Hint 2: the table</summary>
#
# A dict from fingerprint to the first place. `setdefault(key, i)` puts `i` there if the
# key is new, and returns what stands there.
#
# </details>

# %% id="w01-copies" exercise="copies" points=2 minutes=10 difficulty=1 kind="rebuild"
def fingerprint(text: str) -> bytes:
    """16 bytes that stand for a text."""
    ### BEGIN SOLUTION
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
    ### END SOLUTION


def exact_duplicates(texts: Iterable[str]) -> list[tuple[int, int]]:
    """Pairs (first, later) of positions that hold the same text."""
    ### BEGIN SOLUTION
    first, pairs = {}, []
    for i, text in enumerate(texts):
        original = first.setdefault(fingerprint(text), i)
        if original != i:
            pairs.append((original, i))
    return pairs
    ### END SOLUTION

# %% id="w01-copies-check"
check("copies")

# %% [markdown] exercise="overlapping"
# ## 3. Test questions in the training text
#
# `word_runs` gives one number for each run of `size` words of a text, in order; equal
# runs give equal numbers (`hash` of a string does). Words are what `WORD` finds in the
# text **in small letters**, so that case and punctuation do not count. `overlapping`
# gives the positions of all texts that share at least one run with any of the test
# texts. (Section 1.6.)
#
# <details><summary>Hint 1: runs</summary>
#
# `re.findall(WORD, ...)` gives the words. How many runs of 3 words have 5 words?
#
# </details>
# <details><summary>Hint 2: looking up</summary>
#
# One set holds the runs of all test texts. `set.isdisjoint` says whether it shares
# nothing with a list or another set.
#
# </details>

# %% id="w01-overlapping" exercise="overlapping" points=3 minutes=15 difficulty=2 kind="rebuild"
def word_runs(text: str, size: int = 13) -> Iterator[int]:
    """Hashes of all runs of `size` words, without case and punctuation."""
    ### BEGIN SOLUTION
    words = re.findall(WORD, text.lower())
    for i in range(len(words) - size + 1):
        yield hash(" ".join(words[i : i + size]))
    ### END SOLUTION


def overlapping(
    texts: Iterable[str], evaluation: Iterable[str], size: int = 13
) -> list[int]:
    """Positions of texts that share a run of `size` words with a test text."""
    ### BEGIN SOLUTION
    known = {run for text in evaluation for run in word_runs(text, size)}
    runs = (word_runs(text, size) for text in texts)
    return [i for i, found in enumerate(runs) if not known.isdisjoint(found)]
    ### END SOLUTION

# %% id="w01-overlapping-check"
check("overlapping")

# %% [markdown] exercise="in_validation"
# ## 4. A split that stays
#
# A text is held out if the first 8 bytes of its fingerprint, read as a whole number
# with the largest byte first ("big"), are below `share` times $2^{64}$. So the text
# alone decides: not its place, not the other texts, not the day. (Section 1.7.)
#
# <details><summary>Hint</summary>
#
# `int.from_bytes(data, "big")`.
#
# </details>

# %% id="w01-in-validation" exercise="in_validation" points=2 minutes=5 difficulty=1 kind="rebuild"
def in_validation(text: str, share: float) -> bool:
    """Whether a text is held out; that depends on the text alone and never changes."""
    ### BEGIN SOLUTION
    return int.from_bytes(fingerprint(text)[:8], "big") < share * 2**64
    ### END SOLUTION

# %% id="w01-in-validation-check"
check("in_validation")

# %% [markdown] exercise="draw_texts"
# ## 5. Mixing by tokens
#
# The heart of `draw`, without files. Each source is a list of texts, read in order and
# **from its start again** when it runs out. Always take the next text of the source
# that is furthest behind,
# $$\text{behind}_s = \text{share}_s \cdot \text{total} - \text{drawn}_s,$$
# counted in tokens: `total` of all sources so far, `drawn` of this one. Where two are
# equally far behind, the one that is named first wins. A text costs one token for each
# of its bytes, and one for its end. Yield `(source, text)` while `total` is below
# `tokens`. (Section 1.8.)
#
# <details><summary>Hint 1: reading in a circle</summary>
#
# Keep a place for each source and take it modulo the length of its list; or see what
# `itertools.cycle` does.
#
# </details>
# <details><summary>Hint 2: the furthest behind</summary>
#
# `max` with a `key`. Of equal ones it returns the first.
#
# </details>

# %% id="w01-draw-texts" exercise="draw_texts" points=4 minutes=20 difficulty=2 kind="rebuild"
def draw_texts(
    texts: dict[str, list[str]], share: dict[str, float], tokens: int
) -> Iterator[tuple[str, str]]:
    """(source, text) until `tokens` are drawn, from the source furthest behind."""
    ### BEGIN SOLUTION
    drawn, place, total = dict.fromkeys(texts, 0), dict.fromkeys(texts, 0), 0
    while total < tokens:
        name = max(texts, key=lambda name: share[name] * total - drawn[name])
        text = texts[name][place[name] % len(texts[name])]
        place[name] += 1
        size = len(text.encode()) + 1
        drawn[name] += size
        total += size
        yield name, text
    ### END SOLUTION

# %% id="w01-draw-texts-check"
check("draw_texts")

# %% [markdown] exercise="JoinedArray"
# ## 6. Many files, one row
#
# `JoinedArray` holds several arrays (the shards on disk) and reads like one. Write the
# two methods that are missing:
#
# - `len(a)` is the number of all elements;
# - `a[7]` and `a[-1]` give one element, as an `int`, and `IndexError` where there is
#   none; `a[3:9]` gives a slice as one array of the same type, also where it reaches
#   over the border of two files, and an empty one where a list would give an empty
#   list. A slice with a step may raise `IndexError`.
#
# Do not join all parts: on disk they may be larger than the memory. (Section 1.9.)
#
# <details><summary>Hint 1: which part holds element i?</summary>
#
# `self.starts` is `[0, 3, 5]` for parts of 3 and 2 elements. `np.searchsorted` finds a
# place in it: with "right", the first start that is larger than `i`.
#
# </details>
# <details><summary>Hint 2: slices</summary>
#
# `where.indices(len(self))` gives start, stop and step, without negative numbers. For a
# part that begins at `a`, they are `start - a` and `stop - a`, but at least 0.
#
# </details>
# <details><summary>Hint 3: negative numbers and errors for nothing</summary>
#
# `range(n)[i]` treats `i` as a list of `n` elements would.
#
# </details>

# %% id="w01-joined" exercise="JoinedArray" points=4 minutes=25 difficulty=3 kind="rebuild"
class JoinedArray:
    """Memory-mapped files that read like one 1-D array: `len(a)`, `a[7]`, `a[3:9]`."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.dtype = parts, parts[0].dtype
        self.starts = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        ### BEGIN SOLUTION
        return int(self.starts[-1])
        ### END SOLUTION

    def __getitem__(self, where):
        ### BEGIN SOLUTION
        if not isinstance(where, slice):
            i = range(len(self))[where]
            part = int(np.searchsorted(self.starts, i, "right")) - 1
            return int(self.parts[part][i - self.starts[part]])
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise IndexError("take a plain slice first, then [::step]")
        pairs = zip(self.parts, self.starts)
        pieces = [part[max(0, start - a) : max(0, stop - a)] for part, a in pairs]
        full = [piece for piece in pieces if len(piece)]
        return np.asarray(full[0]) if len(full) == 1 else np.concatenate(pieces)
        ### END SOLUTION

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)

# %% id="w01-joined-check"
check("JoinedArray")

# %% [markdown] exercise="predicted_folder"
# ## 7. Predict: how large is the folder?
#
# Before you write a large corpus, work out on paper what it will take. Texts of 300,000
# tokens in 2,000 documents are written by `write_shards` with a vocabulary of 6,400 and
# `shard_tokens=65_536`. Each document gets one token more, for its end;
# `documents.bin` holds numbers of 8 bytes, one for the start of each document and one
# for the end of the last. Write into `predicted_folder`:
#
# - `"shards"`: how many files `shard_....bin`;
# - `"bytes"`: how many bytes in all `.bin` files together.
#
# <details><summary>Hint 1: bytes for each token</summary>
#
# Two bytes hold numbers up to 65,535.
#
# </details>
# <details><summary>Hint 2: the tokens</summary>
#
# 300,000 of text and 2,000 ends.
#
# </details>

# %% id="w01-predicted-folder" exercise="predicted_folder" points=2 minutes=10 difficulty=1 kind="beyond"
### BEGIN SOLUTION
predicted_folder = {"shards": 5, "bytes": 302_000 * 2 + 2_001 * 8}
### END SOLUTION

# %% id="w01-predicted-folder-check"
check("predicted_folder")

# %% [markdown] exercise="split_clean"
# ## 8. Two bugs
#
# A colleague cleans texts, drops copies and splits them. The validation loss is too
# good to be true, and it changes when texts are added. There are two bugs, each in one
# line: with one, the **same text stands in both parts** after cleaning; with the other,
# a text **changes sides** when another one is put before it. Repair both in place.
#
# <details><summary>Hint 1: two spellings</summary>
#
# Try it with a text and the same text with a space at its end. What is compared with
# what?
#
# </details>
# <details><summary>Hint 2: who decides?</summary>
#
# The side may depend on the text alone. You wrote a function for that.
#
# </details>

# %% id="w01-split-clean" exercise="split_clean" points=3 minutes=10 difficulty=2 kind="beyond"
def split_clean(texts: Iterable[str], share: float) -> tuple[list[str], list[str]]:
    """Cleaned texts without copies: the training part, and the part held out."""
    train, valid, seen = [], [], set()
    for text in texts:
        ### BEGIN SOLUTION
        text = clean(text)
        key = fingerprint(text)
        ### END SOLUTION
        ### BEGIN STUB
        # key, text = fingerprint(text), clean(text)
        ### END STUB
        if key in seen:
            continue
        seen.add(key)
        ### BEGIN SOLUTION
        held_out = in_validation(text, share)
        ### END SOLUTION
        ### BEGIN STUB
        # held_out = random.Random(len(seen)).random() < share
        ### END STUB
        (valid if held_out else train).append(text)
    return train, valid

# %% id="w01-split-clean-check"
check("split_clean")
### BEGIN HIDDEN TESTS
hidden_texts = [f"hidden {i // 2}{'  ' * (i % 2)}" for i in range(200)]
hidden_train, hidden_valid = split_clean(hidden_texts, 0.3)
hidden_unique = sorted(f"hidden {i}" for i in range(100))
assert sorted(hidden_train + hidden_valid) == hidden_unique
assert hidden_valid == [t for t in hidden_texts[::2] if t in hidden_valid]
### END HIDDEN TESTS

# %% [markdown] exercise="scaled_shares"
# ## 9. Turn up the small ones
#
# XLM-R (Conneau et al. 2020, arXiv:1911.02116) was trained on a hundred languages, the
# largest thousands of times as large as the smallest. Taken by size, the model would
# hardly see the small ones. So the shares are scaled: with $n_s$ tokens in source $s$,
# $$\text{share}_s = \frac{p_s^{\,\alpha}}{\sum_t p_t^{\,\alpha}}
# \quad\text{with}\quad p_s = \frac{n_s}{\sum_t n_t}$$
# $\alpha = 1$ takes them by size, $\alpha = 0$ all alike; XLM-R used 0.3. The price:
# small sources are repeated. Give for each source its share, and how often it is read
# from its start to its end when `tokens` tokens are drawn:
# $\text{share}_s \cdot \text{tokens} / n_s$.
#
# <details><summary>Hint 1: two steps</summary>
#
# First all powers, then divide by their sum. The sum of the $n$ cancels out.
#
# </details>
# <details><summary>Hint 2: one dict</summary>
#
# The result maps each name to a pair `(share, passes)`.
#
# </details>

# %% id="w01-scaled-shares" exercise="scaled_shares" points=3 minutes=10 difficulty=1 kind="beyond"
def scaled_shares(
    sizes: dict[str, int], alpha: float, tokens: int
) -> dict[str, tuple[float, float]]:
    """For each source its share, and its passes when `tokens` tokens are drawn."""
    ### BEGIN SOLUTION
    total = sum(sizes.values())
    powers = {name: (size / total) ** alpha for name, size in sizes.items()}
    shares = {name: power / sum(powers.values()) for name, power in powers.items()}
    return {name: (shares[name], shares[name] * tokens / sizes[name]) for name in sizes}
    ### END SOLUTION

# %% id="w01-scaled-shares-check"
check("scaled_shares")

# %% [markdown] exercise="candidates"
# ## 10. An experiment: who meets?
#
# Banding (Broder 1997; Leskovec, Rajaraman and Ullman, *Mining of Massive Datasets*,
# chapter 3) finds likely near copies without comparing all pairs. A sketch of 128
# numbers is cut into bands of `rows` numbers each; what is left over at the end is not
# used. Two texts meet if they agree on **all** numbers of **at least one** band, at the
# same place. Write `candidates`.
#
# **Predict first**, for pairs of similarity 0.5 and 25 bands of 5: which share of them
# meets? Write it into `predicted_share`; a formula counts as a number (section 1.5).
#
# Then measure with `sketch_pair(J, seed)`, which makes two sketches whose numbers agree
# with probability J: for J of 0.3, 0.5 and 0.7, the share of the pairs of 400 seeds
# (0 to 399) that meet in bands of 5. Fill the dict `measured`, from J to share.
#
# <details><summary>Hint 1: a table for each band</summary>
#
# A dict whose keys are the band's place **and** its numbers, as a tuple, and whose
# values are the texts that have them. Only texts under the same key can meet.
#
# </details>
# <details><summary>Hint 2: the prediction</summary>
#
# One band agrees with probability $J^5$. All 25 differ with probability
# $(1 - J^5)^{25}$.
#
# </details>

# %% id="w01-candidates" exercise="candidates" points=4 minutes=25 difficulty=3 kind="beyond"
### BEGIN SOLUTION
predicted_share = 1 - (1 - 0.5**5) ** 25
### END SOLUTION

def sketch_pair(J: float, seed: int) -> list[tuple[int, ...]]:
    """Two sketches of 128 numbers, each pair of numbers equal with probability J."""
    rng = random.Random(seed)
    one = [rng.getrandbits(32) for _ in range(128)]
    other = [n if rng.random() < J else rng.getrandbits(32) for n in one]
    return [tuple(one), tuple(other)]


def candidates(sketches: list[tuple[int, ...]], rows: int) -> set[tuple[int, int]]:
    """Pairs (i, j), i < j, of sketches that agree on all `rows` numbers of a band."""
    ### BEGIN SOLUTION
    met = set()
    for start in range(0, len(sketches[0]) - rows + 1, rows):
        table = {}
        for j, sketch in enumerate(sketches):
            same = table.setdefault(sketch[start : start + rows], [])
            met.update((i, j) for i in same)
            same.append(j)
    return met
    ### END SOLUTION

### BEGIN SOLUTION
measured = {
    J: sum(len(candidates(sketch_pair(J, seed), 5)) for seed in range(400)) / 400
    for J in (0.3, 0.5, 0.7)
}
### END SOLUTION

# %% id="w01-candidates-check"
check("candidates")

# %% [markdown]
# What scaling does, for a large, a middle and a small source of 100, 5 and 0.1 million
# tokens, when 100 million are drawn: its share, and how often it is read.

# %% id="w01-scaled-try"
sizes = {"large": 10**8, "middle": 5 * 10**6, "small": 10**5}
for alpha in (1.0, 0.7, 0.3, 0.0):
    plan = scaled_shares(sizes, alpha, 10**8)
    told = (f"{name} {share:5.1%}, {n:5.1f}x" for name, (share, n) in plan.items())
    print(f"alpha {alpha}: ", "  ".join(told))

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves the functions of exercises 1 to 4 and 6 that pass to `student/data.py`.
# With `MINIMIND_STUDENT=student` before a command, the course uses them: your split
# then decides what every model of the course is tested on.

# %% id="w01-keep"
keep()
