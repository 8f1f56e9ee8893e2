"""Checks of workbook 1. What is trusted are plain loops over characters and words, hashlib, NumPy and torch; nothing comes from minimind.data."""

import hashlib
import itertools
import math
import random
import re
import unicodedata
from collections import Counter

import numpy as np
import torch

from course.checks.core import exercise, fail

MODULE = "data"
HIDDEN = {*map(chr, range(9)), *map(chr, range(0x0B, 0x20)), *map(chr, range(0x7F, 0xA0)), "\xad", "\u200b", "\ufeff"}


def same(got: object, expected: object, given: object, mistake: str, likely: dict[str, object] | None = None) -> None:
    """Plain values are equal; else the mistake whose result is `got` is named."""
    if got is None and expected is not None:
        fail("it returns nothing; is there a `return`?", given)
    if got != expected:
        mistake = next((words for words, wrong in (likely or {}).items() if got == wrong), mistake)
        fail(mistake, given, expected, got)


def seen(text: object) -> str:
    """A text with its invisible signs written out."""
    return ascii(text)


# -- rebuild


def spelled(text: str) -> str:
    """What clean must give, by lines and words; only for texts whose blanks are spaces and tabs."""
    for end in ("\r\n", "\r", "\u2028", "\u2029"):
        text = text.replace(end, "\n")
    text = unicodedata.normalize("NFC", "".join(" " if c == "\xa0" else c for c in text if c not in HIDDEN))
    lines = []
    for line in text.split("\n"):
        bare = line.lstrip(" \t")
        inside = [part for part in re.split("([ \t]+)", bare.rstrip(" \t")) if part]
        inside = [part if len(part) == 1 or part.strip(" \t") else " " for part in inside]
        lines.append((line[: len(line) - len(bare)] if inside else "") + "".join(inside))
    paragraphs, empty = [], 0
    for line in lines:
        empty = 0 if line else empty + 1
        if empty < 2:
            paragraphs.append(line)
    return "\n".join(paragraphs).strip()


CASES = (  # text, what it becomes, and the mistake that each mistaken result stands for
    ("a\r\nb\rc\u2028d\u2029e", "a\nb\nc\nd\ne", "line ends of every kind become \\n", {
        "\\r\\n is one line end, and here it became two": "a\n\nb\nc\nd\ne",
        "only \\r\\n is turned into \\n; a lonely \\r is a line end too, and so are U+2028 and U+2029": "a\nbc\u2028d\u2029e",
        "a lonely \\r was taken for an invisible sign: turn line ends before you remove signs": "a\nbc\nd\ne",
        "U+2028 and U+2029 are line ends too": "a\nb\nc\u2028d\u2029e",
    }),
    ("a\xa0b", "a b", "the no-break space becomes a space", {
        "the no-break space was removed, and two words became one": "ab", "the no-break space U+00A0 is still there": "a\xa0b"}),
    ("so\xadft\u200b \ufeffsi\x07gns", "soft signs", "what SIGNS matches must go", {
        "invisible signs became spaces; they go": "so ft si gns", "invisible signs are still there": "so\xadft\u200b \ufeffsi\x07gns"}),
    ("Cafe\u0301", "Caf\xe9", "letter and accent become one character, in the form NFC", {
        "this is the form NFD; NFC puts letter and accent together": "Cafe\u0301", "the accent is lost": "Cafe"}),
    ("\ufb01ne \xb2", "\ufb01ne \xb2", "the form NFC keeps signs such as \ufb01 and \xb2", {
        "this is the form NFKC, which changes what a text says": "fine 2"}),
    ("e\u200b\u0301", "\xe9", "a sign between a letter and its accent keeps them apart", {
        "NFC came before the signs went: the letter and its accent did not meet": "e\u0301"}),
    ("a  b \t c", "a b c", "several blanks between two visible characters become one space", {
        "several blanks in a row are still there": "a  b \t c", "the blanks between words are lost": "abc"}),
    ("if x:\n    y  =  1\n\tz", "if x:\n    y = 1\n\tz", "the indent of a line stays: only blanks between two visible characters become one", {
        "the indents are lost; they are the meaning of code": "if x:\ny = 1\nz",
        "the indents shrank; only blanks between two visible characters become one": "if x:\n y = 1\n\tz",
        "blanks inside of a line are still there": "if x:\n    y  =  1\n\tz"}),
    ("a\tb", "a\tb", "a single tab between two words stays", {"a single tab became a space; only two or more blanks do": "a b"}),
    ("a  \nb\t\n c", "a\nb\n c", "blanks at the end of every line go", {
        "only the last line lost the blanks at its end: with flags=re.MULTILINE, $ stands at the end of each": "a  \nb\t\n c",
        "line ends are lost": "a b c", "the indent of the next line is lost": "a\nb\nc"}),
    ("a\n\n\n\nb\n\nc\nd", "a\n\nb\n\nc\nd", "three or more line ends in a row become two", {
        "three or more line ends in a row are still there": "a\n\n\n\nb\n\nc\nd", "paragraphs are lost: two line ends stay two": "a\nb\nc\nd",
        "a single line end became two": "a\n\nb\n\nc\n\nd"}),
    ("a\n\n \n\nb", "a\n\nb", "a line of blanks is an empty line: take the blanks at line ends away first", {}),
    (" \n a b \n ", "a b", "blanks around the text go", {
        "the blanks at the beginning are still there": "\n a b", "the blanks around the text are still there": "\n a b\n"}),
    ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680", "the joiner U+200D holds an emoji together; it is not among the SIGNS", {}),
    ("a\nb", "a\nb", "a line end between two lines stays", {"line ends were taken for blanks": "a b"}),
)  # fmt: skip


@exercise("clean", keeps=["clean"])
def check_clean(clean):
    for text, wanted, mistake, likely in CASES:
        got = clean(text)
        if got is not None and not isinstance(got, str):
            fail("it must return a text", f"clean({seen(text)})", seen(wanted), type(got).__name__)
        same(
            seen(got) if got is not None else None,
            seen(wanted),
            f"clean({seen(text)})",
            mistake,
            {words: seen(wrong) for words, wrong in likely.items()},
        )
    rng, letters = random.Random(0), "ab  \t\n\n\r\u00a0\u200b\u0301e\u00ad\u2028.\x07\x85"
    for _ in range(200):
        text = "".join(rng.choices(letters, k=rng.randint(0, 14)))
        once = clean(text)
        same(seen(clean(once)), seen(once), f"clean(clean({seen(text)}))", "cleaning twice must be cleaning once: is the order of the steps right?")
        same(
            seen(once),
            seen(spelled(text)),
            f"clean({seen(text)})",
            "right for the cases above, and not here; a loop over lines and words gives something else",
        )


def digest(text: str) -> bytes:
    hashed = hashlib.blake2b(digest_size=16)
    hashed.update(text.encode("utf-8"))
    return hashed.digest()


@exercise("copies", keeps=["fingerprint", "exact_duplicates"])
def check_copies(fingerprint, exact_duplicates):
    got, text = fingerprint("na\xefve"), "na\xefve".encode()
    if got is not None and not isinstance(got, bytes):
        fail("a fingerprint is bytes", "fingerprint('na\xefve')", "16 bytes", f"{type(got).__name__} {got}")
    same(got, digest("na\xefve"), "fingerprint('na\xefve')", "this is not the BLAKE2b hash of the UTF-8 bytes", {
        "these are the 64 bytes of the full hash: ask for a digest of 16": hashlib.blake2b(text).digest(),
        "this is a longer hash cut off; ask for a digest of 16 bytes": hashlib.blake2b(text).digest()[:16],
        "this is another hash of 16 bytes, MD5": hashlib.md5(text).digest(),
        "this is SHA-256, cut off": hashlib.sha256(text).digest()[:16],
        "this is BLAKE2s; take BLAKE2b": hashlib.blake2s(text, digest_size=16).digest(),
        "the text was encoded as Latin-1; take UTF-8": hashlib.blake2b("na\xefve".encode("latin-1"), digest_size=16).digest(),
    })  # fmt: skip
    texts = ["a", "b", "a", "c", "a", "b"]
    got = exact_duplicates(texts)
    given = f"exact_duplicates({texts})"
    if got is not None and not isinstance(got, list):
        fail("it returns a list of pairs", given, "a list", type(got).__name__)
    same([tuple(pair) if isinstance(pair, list) else pair for pair in got] if got is not None else None, [(0, 2), (0, 4), (1, 5)], given,
         "each copy gives one pair: the first place of its text, and its own", {
        "the pairs are the wrong way round: (first, later)": [(2, 0), (4, 0), (5, 1)],
        "a third copy belongs to the first place too, not to the copy before it": [(0, 2), (2, 4), (1, 5)],
        "only one copy of each text was found": [(0, 2), (1, 5)],
        "every two equal texts give a pair here; a copy belongs to the first place only": [(0, 2), (0, 4), (2, 4), (1, 5)],
        "every text is a pair with itself here; only copies count": [(0, 0), (1, 1), (0, 2), (3, 3), (0, 4), (1, 5)],
        "these are the texts; give their places": [("a", "a"), ("a", "a"), ("b", "b")],
    })  # fmt: skip
    for texts in ([], ["x"], ["x", "X", "x "]):
        same(exact_duplicates(texts), [], f"exact_duplicates({texts})", "there is no copy here: texts must be equal to the last letter")
    rng = random.Random(0)
    texts = [str(rng.randint(0, 30)) for _ in range(60)]
    wanted = [(texts.index(text), i) for i, text in enumerate(texts) if texts.index(text) != i]
    same([tuple(pair) for pair in exact_duplicates(tuple(texts))], wanted,
         "60 random texts, as a tuple", "right for six texts, and not here")  # fmt: skip


def runs_of(text: str, size: int) -> list[tuple]:
    """Runs of words, with the words found letter by letter."""
    words, word = [], ""
    for c in text.lower() + " ":
        if "\u3400" <= c <= "\u9fff":
            words += [word, c]
            word = ""
        elif c.isalnum() or c == "_":
            word += c
        else:
            words.append(word)
            word = ""
    words = [word for word in words if word]
    return list(zip(*(words[i:] for i in range(size)), strict=False))


@exercise("overlapping", keeps=["word_runs", "overlapping"])
def check_overlapping(word_runs, overlapping):
    def runs(text, size):
        found = word_runs(text, size)
        if found is None:
            fail("word_runs gives nothing; yield each run, or return a list", f"word_runs({text!r}, {size})")
        return list(found)

    text = "One two, three four FIVE."
    given = f"word_runs({text!r}, 3)"
    got = runs(text, 3)
    if len(got) != 3:
        words = {2: "the last run is missing", 4: "there is one run too many", 5: "a run at the end is too short: each has `size` words",
                 1: "one run was found; there is one from every word on", 0: "no run was found"}  # fmt: skip
        fail(words.get(len(got), "five words have three runs of 3"), given, "3 runs", f"{len(got)} runs")
    if len(set(got)) != 3:
        fail("different runs must give different numbers", given, "3 different ones", got)
    if runs("one two three", 3) != got[:1]:
        words = "case and punctuation do not count: the run must be equal to the first one of the text above"
        fail(words, "word_runs('one two three', 3)", got[:1], runs("one two three", 3))
    if runs("four five one", 3)[0] in got or runs("three two one", 3)[0] in got:
        fail(
            "a run with other words, or with the same words in another order, is another run", "word_runs('three two one', 3)", "a number of its own"
        )
    if len(runs("ab c", 2)) == 1 and runs("ab c", 2) == runs("a bc", 2):
        fail("'ab c' and 'a bc' are different runs: put something between the words", "word_runs('ab c', 2)", got=runs("ab c", 2))
    same(
        len(runs("\u4f60\u597d\uff0c\u4e16\u754c", 2)),
        3,
        "word_runs('\u4f60\u597d\uff0c\u4e16\u754c', 2)",
        "every Chinese character is a word: use WORD",
    )
    for text, size in (("one two", 3), ("", 1), ("one two three", 13)):
        same(runs(text, size), [], f"word_runs({text!r}, {size})", "a text of fewer words has no run")
    same(len(runs(" ".join("abcdefghijklmno"), 13)), 3, "15 words, and the size that is not given", "without a size, runs have 13 words")
    same(len(list(word_runs(" ".join("abcdefghijklmno")))), 3, "word_runs of 15 words", "without a size, runs have 13 words")
    _accused(overlapping)


def _accused(overlapping) -> None:
    texts = ["The cat sat on the mat.", "A dog sat on a mat", "on the mat SAT the cat", "sat on"]
    tests = ["It sat on the roof", "cat, sat"]
    given = f"overlapping({texts}, {tests}, 3)"
    got = overlapping(texts, tests, 3)
    if got is not None and not isinstance(got, list):
        fail("it returns a list of positions", given, "a list", type(got).__name__)
    same(got, [0], given, "a text that shares one run of 3 words with one test text is found, and no other", {
        "these are the texts; give their positions": texts[:1],
        "these are the positions that share nothing": [1, 2, 3],
        "single words were compared, not runs of 3": [0, 1, 2, 3],
        "a run may not reach from one test text into the next: take the runs of each": [0, 2],
        "all runs must be in the test here; one is enough": [],
        "nothing was found; one shared run is enough": [],
    })  # fmt: skip
    tests = ["x y z", "q sat on a r"]
    same(overlapping(texts, tests, 3), [1], f"overlapping({texts}, {tests}, 3)", "every test text counts, not only the first, and all of its runs")
    for size, wanted in ((1, [0, 1, 2, 3]), (2, [0, 1, 3]), (3, [1]), (4, [])):
        same(overlapping(texts, ["It sat on a roof"], size), wanted, f"overlapping({texts}, ['It sat on a roof'], {size})",
             "the size that is given must be used on both sides")  # fmt: skip
    same(overlapping(texts, [], 1), [], f"overlapping({texts}, [], 1)", "without a test text nothing is found")
    words = "a b c d e f g h i j k l m n"
    same(
        overlapping([words, words[:23]], [words]),
        [0],
        "texts of 14 and 12 words, that stand in the test; without a size",
        "without a size, runs have 13 words",
    )
    rng = random.Random(0)
    for _ in range(10):
        texts, tests = ([" ".join(rng.choices(["ab", "Cd,", "e", "f!"], k=rng.randint(0, 7))) for _ in range(n)] for n in (8, 3))
        known = {run for test in tests for run in runs_of(test, 3)}
        wanted = [i for i, text in enumerate(texts) if known & set(runs_of(text, 3))]
        same(overlapping(texts, tests, 3), wanted, f"overlapping({texts}, {tests}, 3)", "right for small cases, and not here")


def number(text: str, share: float, start: int = 0, order: str = "big", bits: int = 64) -> bool:
    return int.from_bytes(digest(text)[start : start + 8], order) < share * 2**bits


@exercise("in_validation", after=["copies"], keeps=["in_validation"])
def check_in_validation(in_validation):
    texts = [f"text {i}" for i in range(300)]
    got = [in_validation(text, 0.1) for text in texts]
    given = "300 texts, a share of 0.1"
    if not all(isinstance(held, bool) for held in got):
        fail("it returns True or False", "in_validation('text 0', 0.1)", "a bool", f"{type(got[0]).__name__} {got[0]}")
    if got != [in_validation(text, 0.1) for text in texts]:
        fail("the same text went to another side when it was asked again: no chance may decide", given)
    if got != [in_validation(text, 0.1) for text in reversed(texts)][::-1]:
        fail("in another order the texts go to other sides: a text must decide alone", given)
    held = sum(got)
    mistakes = {
        "the bytes were read from the smallest on: take \"big\"": [number(text, 0.1, order="little") for text in texts],
        "these are the last 8 bytes of the fingerprint; take the first": [number(text, 0.1, 8) for text in texts],
        "the sides are swapped: below the limit means held out": [not number(text, 0.1) for text in texts],
        "all 16 bytes were read, so the number is too large for the limit": [int.from_bytes(digest(text), "big") < 0.1 * 2**64 for text in texts],
        "the limit is share times 2 to the power 63; take 64": [number(text, 0.1, bits=63) for text in texts],
    }  # fmt: skip
    wanted = [number(text, 0.1) for text in texts]
    if got != wanted:
        words = next(
            (words for words, wrong in mistakes.items() if got == wrong), "other texts are held out than by the first 8 bytes of the fingerprint"
        )
        place = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
        fail(
            words,
            f"{given}; the first that differs is 'text {place}'",
            f"{wanted[place]}, and {sum(wanted)} held out",
            f"{got[place]}, and {held} held out",
        )
    for share in (0.0, 0.01, 0.5, 1.0):
        same([in_validation(text, share) for text in texts], [number(text, share) for text in texts], f"300 texts, a share of {share}",
             "right for a share of 0.1, and not here")  # fmt: skip


def drawn_by(texts: dict, share: dict, tokens: int, count: bool = False, end: int = 1, chars: bool = False) -> list:
    """What draw_texts must give, and with its likely mistakes."""
    streams = {name: itertools.cycle(values) for name, values in texts.items()}
    had, out = Counter(), []
    total = spent = 0
    while spent < tokens:
        behind = [(share[name] * total - had[name], -i, name) for i, name in enumerate(texts)]
        name = sorted(behind)[-1][2]
        text = next(streams[name])
        cost = len(text if chars else text.encode()) + end
        had[name] += 1 if count else cost
        total += 1 if count else cost
        spent += cost
        out.append((name, text))
    return out


@exercise("draw_texts")
def check_draw_texts(draw_texts):
    def some(texts, share, tokens):
        found = draw_texts(texts, share, tokens)
        if found is None:
            fail("it gives nothing; yield each pair, or return a list", f"draw_texts({texts}, {share}, {tokens})")
        return [tuple(pair) for pair in itertools.islice(found, 500)]

    texts, share = {"long": ["aaaaaaa", "bbbbbbb"], "short": ["c", "d", "e"]}, {"long": 0.5, "short": 0.5}
    given = f"draw_texts({texts}, {share}, 32)"
    got = some(texts, share, 32)
    if len(got) >= 500:
        fail("it never ends: stop when `tokens` tokens are drawn", given, got=str(got[:4]))
    wanted = drawn_by(texts, share, 32)
    mistakes = {
        "documents are counted, or the sources take turns; tokens decide, so a long text counts for more": drawn_by(texts, share, 32, count=True),
        "the end of a text costs one token too": drawn_by(texts, share, 32, end=0),
        "one text too many was drawn: stop when `tokens` tokens are drawn": drawn_by(texts, share, 33),
        "one text too few was drawn: go on while the total is below `tokens`": wanted[:-1],
        "the pairs are (source, text)": [pair[::-1] for pair in wanted],
        "of two that are equally far behind, the one that is named first wins": drawn_by(dict(reversed(texts.items())), share, 32),
        "a source that ran out is left out; it begins again": [pair for i, pair in enumerate(wanted) if pair not in wanted[:i]],
        "every source gives its first text again and again": [(name, texts[name][0]) for name, _ in wanted],
    }  # fmt: skip
    same(got, wanted, given, "the next text must come from the source furthest behind", mistakes)
    same(some(texts, share, 0), [], given.replace("32)", "0)"), "nothing is to be drawn")
    same(some(texts, share, 1), wanted[:1], given.replace("32)", "1)"), "the first source begins, and its first text is enough")
    uneven, accents = {"long": 0.25, "short": 0.75}, {"long": ["\u4f60\u597d\u4f60\u597d"], "short": ["\xe9\xe9", "x"]}
    same(some(texts, uneven, 64), drawn_by(texts, uneven, 64), f"draw_texts({texts}, {uneven}, 64)", "the shares that are given must be used", {
        "the shares are not used": drawn_by(texts, share, 64),
        "the shares are swapped": drawn_by(texts, {"long": 0.75, "short": 0.25}, 64),
    })  # fmt: skip
    same(some(accents, share, 64), drawn_by(accents, share, 64), f"draw_texts({accents}, {share}, 64)",
         "a text costs one token for each of its bytes", {
        "characters are counted; a text costs one token for each of its bytes": drawn_by(accents, share, 64, chars=True),
    })  # fmt: skip
    rng = random.Random(0)
    texts = {name: ["x" * rng.randint(1, most) for _ in range(5)] for name, most in (("a", 4), ("b", 30), ("c", 9))}
    share = {"a": 0.5, "b": 0.25, "c": 0.25}
    got = some(texts, share, 900)
    sizes = Counter()
    for name, text in got:
        sizes[name] += len(text) + 1
    worst = max(abs(sizes[name] - share[name] * sizes.total()) for name in share)
    if worst > 31:
        fail(
            "a share is off by more than the longest text",
            "three sources with shares 0.5, 0.25, 0.25, 900 tokens",
            "at most 31 tokens off",
            f"{worst:.0f} tokens off",
        )
    same(got, drawn_by(texts, share, 900), "three sources with shares 0.5, 0.25, 0.25, 900 tokens", "right for small cases, and not here")


@exercise("JoinedArray", keeps=["JoinedArray"])
def check_joined(JoinedArray):
    parts = [np.array(part, dtype="<u2") for part in ([10, 11, 12], [], [13, 14], [15])]
    whole, given = np.concatenate(parts), "parts [10, 11, 12], [], [13, 14], [15]"
    array = JoinedArray([part.copy() for part in parts])
    same(len(array), 6, f"len of {given}", "the length is the number of all elements", {
        "this is the number of parts": 4, "this is the length of the first part": 3, "this is where the last part begins": 5,
    })  # fmt: skip
    for i in (0, 2, 3, 4, 5, -1, -6):
        got, wanted = array[i], int(whole[i])
        if got is None:
            fail("it returns nothing; is there a `return`?", f"a[{i}] of {given}", wanted)
        if isinstance(got, np.ndarray) and got.ndim or not isinstance(got, int | np.integer | np.ndarray):
            fail("a[i] is one number", f"a[{i}] of {given}", wanted, f"{type(got).__name__} {got}")
        if isinstance(got, bool | np.generic | np.ndarray):
            fail(
                "a[i] must be an int of Python: a number of two bytes would overflow in the reader's sums",
                f"a[{i}] of {given}",
                "int",
                type(got).__name__,
            )
        words = "negative numbers count from the end" if i < 0 else "the element is taken from the wrong part, or from the wrong place in it"
        same(got, wanted, f"a[{i}] of {given}", words)
    for i in (6, 100, -7):
        try:
            got = array[i]
        except IndexError:
            continue
        except Exception as error:
            fail("where there is no element, it must raise IndexError", f"a[{i}] of {given}", "IndexError", type(error).__name__)
        fail("where there is no element, it must raise IndexError", f"a[{i}] of {given}", "IndexError", got)
    _slices(array, whole, given)
    single = JoinedArray([np.arange(70_000, 70_004, dtype="<u4")])
    if single[1] != 70_001 or single[1:3].tolist() != [70_001, 70_002] or single[1:3].dtype != np.dtype("<u4"):
        fail("the type of the parts must stay: here numbers of four bytes", "one part [70000, ..., 70003], a[1] and a[1:3]", "70001, [70001 70002]",
             f"{single[1]}, {single[1:3]}")  # fmt: skip
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 60_000, n).astype("<u2") for n in (7, 1, 12, 5)]
    array, whole = JoinedArray(parts), np.concatenate(parts)
    for start, stop in rng.integers(-3, 28, (40, 2)).tolist():
        got, wanted = array[start:stop].tolist(), whole[start:stop].tolist()
        same(got, wanted, f"a[{start}:{stop}] of parts with 7, 1, 12 and 5 elements", "right for small cases, and not here")


def _slices(array, whole, given) -> None:
    for where in (slice(0, 3), slice(3, 5), slice(1, 2), slice(1, 5), slice(2, 6), slice(None), slice(4, None), slice(-2, None), slice(None, -1),
                  slice(2, 4), slice(3, 3), slice(5, 2), slice(6, 9), slice(4, 100), slice(None, None, 1)):  # fmt: skip
        text = f"a[{'' if where.start is None else where.start}:{'' if where.stop is None else where.stop}] of {given}"
        got, wanted = array[where], whole[where]
        if not isinstance(got, np.ndarray):
            fail("a slice is one array", text, wanted, f"{type(got).__name__} {got}")
        if got.dtype != wanted.dtype:
            fail("a slice has the type of the parts" + (", also when it is empty" if not len(wanted) else ""), text, wanted.dtype, got.dtype)
        mistake = "the slice is not right"
        if not len(wanted):
            mistake = "a slice that a list would give as empty must be empty"
        elif len(got) < len(wanted):
            mistake = "elements are missing: a slice may reach over the border of two parts, and to the end"
        elif len(got) > len(wanted):
            mistake = "there are too many elements: for a part that begins at a, a slice begins at start - a, but at least at 0, and ends at stop - a"
        same(got.tolist(), wanted.tolist(), text, mistake)
    for where in (slice(0, 6, 2), slice(None, None, -1)):
        try:
            got = array[where]
        except IndexError:
            continue
        same(
            np.asarray(got).tolist(),
            whole[where].tolist(),
            f"a[{where}] of {given}",
            "a slice with a step is right, or it raises IndexError; this is neither",
        )


# -- beyond


@exercise("predicted_folder")
def check_predicted_folder(predicted_folder):
    given = "300,000 tokens of text in 2,000 documents, a vocabulary of 6,400, shards of 65,536 tokens"
    if not isinstance(predicted_folder, dict) or set(predicted_folder) != {"shards", "bytes"}:
        fail("`predicted_folder` is a dict with two numbers", given, '{"shards": ..., "bytes": ...}', predicted_folder)
    tokens, places = 300_000 + 2_000, 2_000 + 1
    same(predicted_folder["shards"], math.ceil(tokens / 65_536), f"{given}: shards", "divide the tokens by 65,536, and round up", {
        "the last file is not full, and it is a file all the same: round up": tokens // 65_536,
        "there is no file more than needed": math.ceil(tokens / 65_536) + 1,
    })  # fmt: skip
    same(predicted_folder["bytes"], 2 * tokens + 8 * places, f"{given}: bytes", "count the tokens, their bytes, and the numbers of documents.bin", {
        "the ends of the documents are tokens too": 2 * (tokens - 2_000) + 8 * places,
        "documents.bin is missing: 8 bytes for each of its numbers": 2 * tokens,
        "documents.bin holds one number more than there are documents": 2 * tokens + 8 * (places - 1),
        "a vocabulary of 6,400 needs two bytes for each token, not four": 4 * tokens + 8 * places,
        "one byte holds numbers up to 255 only": tokens + 8 * places,
        "shards are as long as their tokens; the last one is not filled up": 2 * 5 * 65_536 + 8 * places,
        "the numbers of documents.bin take 8 bytes each": 2 * tokens + 2 * places,
    })  # fmt: skip


@exercise("split_clean", after=["clean", "copies", "in_validation"])
def check_split_clean(split_clean):
    def parts(texts, share):
        got = split_clean(texts, share)
        if not (isinstance(got, tuple | list) and len(got) == 2):
            fail("it returns two lists: the training part, and the one held out", "split_clean(texts, share)", got=type(got).__name__)
        return [list(part) for part in got]

    texts = [f"text {i}" for i in range(40)]
    twice = [text + end for text in texts for end in ("", " ")]
    train, valid = parts(twice, 0.5)
    given = "40 texts, each a second time with a space at its end, a share of 0.5"
    wanted = [[text for text in texts if not number(text, 0.5)], [text for text in texts if number(text, 0.5)]]
    both = sorted(set(train) & set(valid))
    if both:
        fail(
            "a text stands in both parts: what is compared before cleaning differs, and after cleaning it is the same",
            given,
            "no text in both",
            both[:3],
        )
    if len(train) + len(valid) > 40:
        fail("a copy is still there: look for copies among cleaned texts", given, "40 texts", f"{len(train) + len(valid)} texts")
    if sorted(train + valid) != sorted(texts):
        fail(
            "the texts of both parts together must be the cleaned texts, each once",
            given,
            "40 texts",
            f"{len(train) + len(valid)} texts, such as {(train + valid)[:2]}",
        )
    later = parts(["one more", *twice], 0.5)
    moved = sorted(set(train) & set(later[1]) | set(valid) & set(later[0]))
    if moved:
        fail("one more text at the front, and others change sides: the side must depend on the text alone", given, "no text that moves", moved[:3])
    for got, right, name in zip((train, valid), wanted, ("training part", "part held out"), strict=True):
        same(
            got,
            right,
            f"{given}: the {name}",
            "the texts must go where in_validation sends them, in order",
            {"the parts are swapped": wanted[0] if right is wanted[1] else wanted[1]},
        )
    dirty = [f"  dirty{' ' * (i % 3 + 1)}text {i // 2}\r\n" for i in range(60)]
    train, valid = parts(dirty, 0.5)
    right = [f"dirty text {i}" for i in range(30)]
    for got, held in ((train, False), (valid, True)):
        same(got, [text for text in right if number(text, 0.5) == held], "60 texts with blanks, 30 after cleaning",
             "the cleaned texts must come out, and the cleaned text decides the side")  # fmt: skip
    for share in (0.0, 0.1, 1.0):
        right = [[t for t in texts if not number(t, share)], [t for t in texts if number(t, share)]]
        same(parts(texts, share), right, f"40 texts, a share of {share}",
             "the share that is given must be used")  # fmt: skip


@exercise("scaled_shares")
def check_scaled_shares(scaled_shares):
    sizes = {"large": 1_000_000, "small": 10_000}
    given = f"scaled_shares({sizes}, 0.5, 2_000_000)"
    got = scaled_shares(dict(sizes), 0.5, 2_000_000)
    if got is None:
        fail("it returns nothing; is there a `return`?", given)
    if not isinstance(got, dict) or list(got) != list(sizes):
        fail("it returns a dict with the names of the sources", given, list(sizes), got)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in got.values()):
        fail("each name has a pair (share, passes)", given, "{'large': (..., ...), ...}", got)

    def close(a, b):
        return all(abs(x - y) <= 1e-6 * max(1, abs(y)) for x, y in zip(a, b, strict=True))

    shares, passes = ([float(pair[i]) for pair in got.values()] for i in (0, 1))
    wanted = torch.softmax(0.5 * torch.tensor([1e6, 1e4], dtype=torch.float64).log(), 0).tolist()
    if not close(shares, wanted):
        by_size = [100 / 101, 1 / 101]
        mistakes = {
            "alpha has no effect: these are the shares by size": by_size,
            "the powers are not divided by their sum": [share**0.5 for share in by_size],
            "these are powers of the sizes; divide them by their sum": [1000.0, 100.0],
            "the exponent is 1 / alpha; it is alpha": [1e4 / (1e4 + 1), 1 / (1e4 + 1)],
            "the shares are multiplied by alpha instead of raised to it": [0.5 * share for share in by_size],
            "this is a softmax of the shares; they are raised to the power alpha": torch.softmax(0.5 * torch.tensor(by_size), 0).tolist(),
            "all sources get the same share, as with alpha = 0": [0.5, 0.5],
        }  # fmt: skip
        words = next(
            (words for words, wrong in mistakes.items() if close(shares, wrong)), "the shares are not the scaled ones: powers, divided by their sum"
        )
        fail(words, given, [round(share, 4) for share in wanted], [round(share, 4) for share in shares])
    right = [share * 2_000_000 / size for share, size in zip(wanted, sizes.values(), strict=True)]
    if not close(passes, right):
        mistakes = {
            "these are tokens; divide them by the size of the source": [share * 2_000_000 for share in wanted],
            "the passes are those of shares by size": [2_000_000 / 1_010_000] * 2,
            "the size is divided by the tokens drawn: the other way round": [1 / each for each in right],
            "the share is not used: each source gives only its share of the tokens": [2.0, 200.0],
            "passes are not rounded": [float(round(each)) for each in right],
            "passes are not cut off": [float(int(each)) for each in right],
        }  # fmt: skip
        words = next(
            (words for words, wrong in mistakes.items() if close(passes, wrong)), "passes are share times tokens, divided by the size of the source"
        )
        fail(words, given, [round(each, 4) for each in right], passes)
    for alpha in (0.0, 0.3, 1.0, 2.0):
        sizes = {"en": 300_000, "de": 70_000, "sw": 900, "is": 900}
        got = scaled_shares(dict(sizes), alpha, 50_000)
        wanted = torch.softmax(alpha * torch.tensor(list(sizes.values()), dtype=torch.float64).log(), 0).tolist()
        shares, passes = ([float(pair[i]) for pair in got.values()] for i in (0, 1))
        if not (close(shares, wanted) and close(passes, [share * 50_000 / size for share, size in zip(wanted, sizes.values(), strict=True)])):
            fail("right for two sources, and not here: a softmax of alpha times the logarithm of the sizes gives other shares",
                 f"scaled_shares({sizes}, {alpha}, 50_000)",
                 [round(share, 4) for share in wanted], [round(share, 4) for share in shares])  # fmt: skip


def agree(sketches: list, rows: int, bands: slice = slice(None), some=any) -> set:
    """Pairs that meet, each pair and each band looked at."""
    count = len(sketches[0]) // rows if sketches else 0
    places = [range(b * rows, b * rows + rows) for b in range(count)][bands]
    return {(i, j) for i, j in itertools.combinations(range(len(sketches)), 2)
            if some(all(sketches[i][k] == sketches[j][k] for k in band) for band in places)}  # fmt: skip


def two_sketches(J: float, seed: int) -> list[tuple[int, ...]]:
    """The pair that the workbook's sketch_pair makes."""
    chance = random.Random(seed)
    first = [chance.getrandbits(32) for _ in range(128)]
    return [tuple(first), tuple(n if chance.random() < J else chance.getrandbits(32) for n in first)]


@exercise("candidates")
def check_candidates(predicted_share, candidates, measured):
    sketches = [(1, 2, 3, 4, 9), (1, 2, 7, 8, 9), (5, 6, 3, 4, 9), (3, 4, 1, 2, 9), (5, 2, 3, 8, 9)]
    given = f"candidates({sketches}, 2)"
    got = candidates(list(sketches), 2)
    if got is not None and not isinstance(got, set | frozenset):
        fail("it returns a set of pairs", given, "a set", type(got).__name__)
    wanted = agree(sketches, 2)
    loose = {(i, j) for i, j in itertools.combinations(range(5), 2) if any(a == b for a, b in zip(sketches[i][:4], sketches[j][:4], strict=True))}
    if got is not None and {tuple(sorted(pair)) for pair in got} == wanted | {(0, 3), (1, 3), (2, 3)}:
        fail("the same numbers in different bands are no meeting: the place of the band belongs to the key", given, wanted, got)
    same(got, wanted, given, "two sketches meet if they agree on all numbers of at least one band", {
        "one equal number is enough here; all numbers of a band must agree": loose,
        "all bands must agree here; one is enough": agree(sketches, 2, some=all),
        "only the first band is used": agree(sketches, 2, slice(0, 1)), "only the last band is used": agree(sketches, 2, slice(-1, None)),
        "the pairs are the wrong way round: (i, j) with i < j": {(j, i) for i, j in wanted},
        "pairs are there in both orders, or with themselves: only i < j": wanted | {(j, i) for i, j in wanted} | {(i, i) for i in range(5)},
        "what is left over at the end is no band: here one number": set(itertools.combinations(range(5), 2)),
        "bands overlap here; each begins where the one before it ends": wanted | {(0, 4), (1, 4)},
    })  # fmt: skip
    same(
        candidates([(1, 2, 3)] * 3, 3),
        {(0, 1), (0, 2), (1, 2)},
        "candidates of three equal sketches of 3 numbers, 3 rows",
        "three that are equal make three pairs",
    )
    same(candidates([(1, 2), (1, 2)], 3), set(), "candidates([(1, 2), (1, 2)], 3)", "a sketch of two numbers has no band of three")
    same(candidates([(1, 2, 3)], 1), set(), "candidates([(1, 2, 3)], 1)", "one sketch alone meets nobody")
    rng = random.Random(0)
    for rows in (1, 2, 3, 4, 6):
        many = [tuple(rng.choices(range(3), k=12)) for _ in range(6)]
        same(candidates(list(many), rows), agree(many, rows), f"candidates({many}, {rows})", "a loop over all pairs and bands finds others")
    curve = {J: 1 - (1 - J**5) ** 25 for J in (0.3, 0.5, 0.7)}
    if not isinstance(measured, dict) or sorted(measured) != sorted(curve):
        fail("`measured` is a dict from 0.3, 0.5 and 0.7 to the share of pairs that meet", expected="{0.3: ..., 0.5: ..., 0.7: ...}", got=measured)
    for J, right in curve.items():
        given = f"measured[{J}], 400 pairs in bands of 5"
        if not isinstance(measured[J], int | float) or not 0 <= measured[J] <= 1:
            fail("a share lies between 0 and 1: divide by the number of pairs", given, got=measured[J])
        wanted = sum(bool(agree(two_sketches(J, seed), 5)) for seed in range(400)) / 400
        if abs(measured[J] - wanted) > 1e-9:
            words = "this is not the share of the 400 pairs that meet"
            words = "this is the curve, and not a measurement" if abs(measured[J] - right) < 1e-9 else words
            fail(words, given, wanted, measured[J])
    right = curve[0.5]
    given = "pairs of similarity 0.5, 25 bands of 5"
    if not isinstance(predicted_share, int | float) or abs(predicted_share - right) > 0.01:
        mistakes = {"this is one band": 0.5**5, "this is the share that does not meet": 1 - right, "this is 5 bands of 25": 1 - (1 - 0.5**25) ** 5,
                    "all bands together are no sum: several may agree at once": 25 * 0.5**5}  # fmt: skip
        words = next((words for words, wrong in mistakes.items() if isinstance(predicted_share, int | float) and abs(predicted_share - wrong) < 0.01),
                     "the measurement disagrees with your prediction")  # fmt: skip
        fail(words, given, got=predicted_share)
