"""Checks of workbook 2. What is trusted is the library `tokenizers`, Python's `str.replace` and `re`, and Jinja; nothing is minimind.tokenizer's."""

import functools
import json
import random
import re
from collections import Counter

import jinja2
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from course.checks.core import exercise, fail

MODULE = "tokenizer"

FIRST = 292  # the id of the first merge: after 36 special tokens and 256 bytes
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # byte-level libraries number the bytes in this order
CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
A, B, C, D, E = (36 + LETTERS.index(letter) for letter in "abcde")


def same(got: object, expected: object, given: object, mistake: str, likely: dict[str, object] | None = None) -> None:
    """Plain values are equal; else the mistake whose result is `got` is named."""
    if got is None and expected is not None:
        fail("it returns nothing; is there a `return`?", given)
    if got != expected:
        mistake = next((words for words, wrong in (likely or {}).items() if got == wrong), mistake)
        fail(mistake, given, expected, got)


def a_tuple(value: object, given: str) -> None:
    if value is not None and not isinstance(value, tuple):
        fail("it must return a tuple: pieces are keys of a dict", given, "a tuple", f"{type(value).__name__} {value}")


def ids_of(word: str) -> tuple[int, ...]:
    """The ids of the bytes of a word in plain letters."""
    return tuple(36 + LETTERS.index(letter) for letter in word)


def in_letters(ids) -> str:
    """Ids as letters, so that a message can be read; merged units as numbers."""
    if not isinstance(ids, tuple | list):
        return str(ids)
    known = [LETTERS[i - 36] if isinstance(i, int) and 36 <= i < FIRST else str(i) for i in ids]
    return f"{tuple(ids)}, which is {' '.join(known)}"


@functools.cache
def words_of(seed: int, letters: str = "abcd", count: int = 12) -> dict[str, int]:
    """Random words and how often each occurs."""
    rng = random.Random(seed)
    return {"".join(rng.choices(letters, k=rng.randint(1, 9))): rng.randint(1, 6) for _ in range(count)}


def trained(texts, merges: int, cut) -> Tokenizer:
    """The library's byte-level BPE, with up to so many merges."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = cut
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, min_frequency=2, initial_alphabet=LETTERS, show_progress=False)
    library.train_from_iterator(texts, trainer)
    return library


def merges_of(library: Tokenizer) -> list[tuple[int, int]]:
    model = json.loads(library.to_str())["model"]
    return [(36 + model["vocab"][left], 36 + model["vocab"][right]) for left, right in model["merges"]]


@functools.cache
def library_merges(seed: int, merges: int, letters: str = "abcd") -> tuple[tuple[int, int], ...]:
    words = words_of(seed, letters)
    texts = [" ".join([word] * count) for word, count in words.items()]
    return tuple(merges_of(trained(texts, merges, pre_tokenizers.WhitespaceSplit())))


# -- rebuild


@exercise("pairs", keeps=["count_pairs", "merge_pair"])
def check_pairs(count_pairs, merge_pair):
    given = 'count_pairs({("h", "a", "t"): 3, ("a", "t", "a", "t"): 2})'
    pieces = {("h", "a", "t"): 3, ("a", "t", "a", "t"): 2}
    got = count_pairs(pieces)
    if got is not None and not isinstance(got, dict):
        fail("count_pairs returns a dict of pairs, such as a Counter", given, "a dict", type(got).__name__)
    same(got, {("h", "a"): 3, ("a", "t"): 7, ("t", "a"): 2}, given, "each place counts as often as its piece occurs", {
        "the counts of the pieces are not used: a piece that occurs 3 times has each of its pairs 3 times":
            {("h", "a"): 1, ("a", "t"): 3, ("t", "a"): 1},
        "a pair that stands twice in a piece counts twice; here each piece counts its pair once": {("h", "a"): 3, ("a", "t"): 5, ("t", "a"): 2},
        "the order in a pair matters: (a, t) and (t, a) are two pairs": {("a", "h"): 3, ("a", "t"): 9},
        "only every second pair is counted: (0, 1), (2, 3); the pairs are all neighbours": {("h", "a"): 3, ("a", "t"): 4},
        "a count is lost where a pair was met before: add to what is there": {("h", "a"): 3, ("a", "t"): 2, ("t", "a"): 2},
    })  # fmt: skip
    same(pieces, {("h", "a", "t"): 3, ("a", "t", "a", "t"): 2}, given, "it changes the dict that it was given")
    for pieces in ({}, {("a",): 5}, {(): 2}):
        same(count_pairs(pieces), {}, f"count_pairs({pieces})", "a single unit has no neighbour, so there is no pair")
    same(count_pairs({("a", "a", "a"): 4}), {("a", "a"): 8}, 'count_pairs({("a", "a", "a"): 4})', "(a, a) stands at two places in a a a")
    for seed in range(5):
        words = words_of(seed)
        places = {(x, y): sum(len(re.findall(f"(?={x}{y})", w)) * c for w, c in words.items()) for x in "abcd" for y in "abcd"}
        wanted = {pair: count for pair, count in places.items() if count}
        same(count_pairs({tuple(w): c for w, c in words.items()}), wanted, f"count_pairs of {words}", "right for small cases, and not here")
    _merge(merge_pair)


def _merge(merge_pair) -> None:
    given = 'merge_pair(("c", "h", "a", "t"), ("a", "t"), 300)'
    got = merge_pair(("c", "h", "a", "t"), ("a", "t"), 300)
    a_tuple(got, given)
    same(got, ("c", "h", 300), given, "the pair must become the new unit, and everything else stays", {
        "the parts are joined; put `new` there, whatever it is": ("c", "h", "at"),
        "the second unit of the pair is still there: after a hit go two places on": ("c", "h", 300, "t"),
        "the units before the pair are lost": (300,), "nothing was merged": ("c", "h", "a", "t"),
    })  # fmt: skip
    given = 'merge_pair(("a", "a", "a"), ("a", "a"), 300)'
    same(merge_pair(("a", "a", "a"), ("a", "a"), 300), (300, "a"), given, "a unit can be used once, from left to right", {
        "the middle one is used twice: after a hit go two places on": (300, 300),
        "the walk goes from right to left": ("a", 300), "the last unit is lost": (300,),
    })  # fmt: skip
    given = "merge_pair((1, 2, 1, 2, 3), (1, 2), 9)"
    same(merge_pair((1, 2, 1, 2, 3), (1, 2), 9), (9, 9, 3), given, "the pair must be merged wherever it stands", {
        "only the first place was merged": (9, 1, 2, 3), "only the last place was merged": (1, 2, 9, 3),
        "the last unit is lost": (9, 9),
    })  # fmt: skip
    given = "merge_pair((1, 1, 1, 1), (1, 1), 1)"
    same(merge_pair((1, 1, 1, 1), (1, 1), 1), (1, 1), given, "what was merged was merged again: one walk, and each place once")
    for units in ((), (1,), (2, 1)):
        got = merge_pair(units, (1, 2), 9)
        a_tuple(got, f"merge_pair({units}, (1, 2), 9)")
        same(got, units, f"merge_pair({units}, (1, 2), 9)", "there is nothing to merge, so the units come back as they are")
    rng = random.Random(0)
    for _ in range(40):
        word, pair = "".join(rng.choices("ab", k=rng.randint(0, 9))), "".join(rng.choices("ab", k=2))
        got = merge_pair(tuple(word), tuple(pair), "X")
        same(got, tuple(word.replace(pair, "X")), f"merge_pair({tuple(word)}, {tuple(pair)}, 'X')", "Python's str.replace gives something else")


@exercise("learn_merges", after=["pairs"], keeps=["best_pair", "learn_merges"])
def check_learn_merges(best_pair, learn_merges):
    given = "best_pair({(40, 50): 2, (41, 30): 7, (90, 25): 7, (60, 10): 7, (41, 20): 7, (1, 1): 1})"
    pairs = {(40, 50): 2, (41, 30): 7, (90, 25): 7, (60, 10): 7, (41, 20): 7, (1, 1): 1}
    same(best_pair(dict(pairs)), (41, 20), given, "the highest count wins, and of equal counts the smallest ids", {
        "of equal counts the first one met was taken; take the smallest ids": (41, 30),
        "of equal counts the largest ids were taken; take the smallest": (90, 25),
        "the right ids were compared first; compare the left ones first": (60, 10),
        "this is the lowest count": (1, 1),
    })  # fmt: skip
    few = {(9, 5): 3, (8, 6): 3}
    same(best_pair(dict(few)), (8, 6), f"best_pair({few})", "the right ids were compared first; compare the left ones first")
    few = {(9, 5): 30, (1, 2): 4}
    same(best_pair(dict(few)), (9, 5), f"best_pair({few})", "the count comes first, the ids only where counts are equal")
    pieces = {(A, B, C): 5, (A, B): 2, (C, D): 3}
    given = f"the pieces abc (5 times), ab (2 times), cd (3 times), as ids ({A} to {D}); num_merges = 9"
    got = learn_merges(dict(pieces), 9)
    if got is not None and not isinstance(got, list):
        fail("it returns the list of merges, each a pair of ids", given, "a list", type(got).__name__)
    same(got, [(A, B), (FIRST, C), (C, D)], given, "the merges are not right: count, choose, merge, and again", {
        "only one merge was learned: repeat until no pair occurs twice": [(A, B)],
        "the pieces were not merged, so the same pair wins again and again": [(A, B)] * 9,
        "a merge makes the unit FIRST_MERGE + i, where i counts from 0": [(A, B), (FIRST + 1, C), (C, D)],
        "the pairs are chosen once, at the beginning: count again after each merge": [(A, B), (B, C), (C, D)],
    })  # fmt: skip
    for count in (0, 1, 2):
        same(learn_merges(dict(pieces), count), [(A, B), (FIRST, C)][:count], f"the same pieces, num_merges = {count}",
             "at most num_merges pairs are learned")  # fmt: skip
    for pieces, wanted in (({}, []), ({(A,): 9}, []), ({(A, B): 1, (C, D): 2}, [(C, D)]), ({(A, B, C): 1}, [])):
        same(learn_merges(dict(pieces), 5), wanted, f"learn_merges({pieces}, 5)",
             "it must stop where no pair occurs twice, or where there is no pair")  # fmt: skip
    pieces = {(A, B, A, B): 3, (B, A): 3}
    before = dict(pieces)
    got = learn_merges(pieces, 3)
    same(pieces, before, f"learn_merges({before}, 3)", "it changes the dict that it was given; make a new one")
    same(got, [(A, B), (B, A), (FIRST, FIRST)], f"learn_merges({before}, 3)",
         "a merge is made wherever its pair stands, and of equal counts the smallest ids win")  # fmt: skip
    for seed in range(12):
        words = words_of(seed)
        got = learn_merges({ids_of(word): count for word, count in words.items()}, 15)
        wanted = list(library_merges(seed, 15))
        if got != wanted:
            place = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
            fail(f"the library `tokenizers` learns other merges; the first that differs is number {place}", f"the words {words}, 15 merges",
                 wanted[place : place + 1], got[place : place + 1])  # fmt: skip


def library_pieces(merges) -> models.BPE:
    """The library's model with these merges; its ids are ours less 36."""
    names = list(LETTERS)
    for left, right in merges:
        names.append(names[left - 36] + names[right - 36])
    pairs = [(names[left - 36], names[right - 36]) for left, right in merges]
    return models.BPE({name: i for i, name in enumerate(names)}, pairs)


@exercise("apply_merges", after=["pairs"], keeps=["apply_merges"])
def check_apply_merges(apply_merges):
    ranks = {(B, C): 0, (A, B): 1, (FIRST, D): 2}
    given = f"the units a b c ({A}, {B}, {C}), ranks (b, c): 0 and (a, b): 1"
    got = apply_merges((A, B, C), dict(ranks))
    a_tuple(got, given)
    same(got, (A, FIRST), given, "the pair of the lowest rank is merged first", {
        "the leftmost pair was merged, not the one of the lowest rank": (FIRST + 1, C),
        "the pair of the highest rank was merged; the lowest comes first": (FIRST + 1, C),
        "nothing was merged": (A, B, C), "a merge makes the unit FIRST_MERGE + rank; this is the rank": (A, 0),
        "a merge makes the unit FIRST_MERGE + rank, and ranks begin at 0": (A, FIRST + 1),
    })  # fmt: skip
    given = "the units b c d, ranks (b, c): 0 and (bc, d): 2"
    same(apply_merges((B, C, D), dict(ranks)), (FIRST + 2,), given, "it must look again after a merge: the new unit can be merged too", {
        "it stops too early; look again until no pair is known": (FIRST, D),
    })  # fmt: skip
    given = "the units b c b c, ranks (b, c): 0"
    same(apply_merges((B, C, B, C), dict(ranks)), (FIRST, FIRST), given, "the pair must be merged wherever it stands", {
        "only its first place was merged": (FIRST, B, C),
    })  # fmt: skip
    for units in ((), (A,), (A, A, D), (D, C, B, A)):
        same(apply_merges(units, dict(ranks)), units, f"the units {units}, of which no pair has a rank", "nothing may be merged")
    same(apply_merges((A, B), {}), (A, B), "the units a b, and no ranks at all", "nothing may be merged")
    for seed in range(6):
        merges = library_merges(seed, 12)
        ranks, library = {pair: i for i, pair in enumerate(merges)}, library_pieces(merges)
        for word in (*words_of(seed), *words_of(seed + 50, count=6)):
            wanted = tuple(36 + token.id for token in library.tokenize(word))
            same(apply_merges(ids_of(word), dict(ranks)), wanted, f"the units of {word}, ranks {ranks}",
                 "the library `tokenizers` merges in another way")  # fmt: skip


# What people say stands between \1 and \2, so that the rendered text tells who wrote each letter.
CHAT = jinja2.Environment().from_string(
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}\n<tool_response>\n\1{{ m.content }}\2\n</tool_response>"
    "{{ '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}"
    "{% else %}<|im_start|>{{ m.role }}\n\1{{ m.content }}\2<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if prompt }}"
)


def runs(rendered: str) -> list[tuple[str, bool]]:
    """Text with marks, as pieces."""
    return [(text, i % 2 == 0) for i, text in enumerate(re.split("[\1\2]", rendered)) if text]


def joined(pieces) -> list[tuple[str, bool]]:
    """Neighbours of one kind as one piece, so that it does not matter how the text was cut."""
    out = []
    for text, ours in pieces:
        if text and out and out[-1][1] == ours:
            out[-1] = out[-1][0] + text, ours
        elif text:
            out.append((text, ours))
    return out


def chat(*said: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in said]


@exercise("render_chat", keeps=["render_chat"])
def check_render_chat(render_chat):
    messages = chat(("user", "Hi"))
    given = f"render_chat({messages})"
    got = render_chat(messages)
    if got is not None and not (isinstance(got, list) and all(isinstance(p, tuple | list) and len(p) == 2 for p in got)):
        fail("it returns a list of pieces, each (text, ours)", given, [("<|im_start|>user\n", True), "..."], got)
    right = [("<|im_start|>user\n", True), ("Hi", False), ("<|im_end|>\n", True)]
    same(joined(got or []), right, given, "this is not how a user's message is rendered", {
        "what the user wrote is marked as ours; then it could hold special tokens": [("<|im_start|>user\nHi<|im_end|>\n", True)],
        "the marks are the wrong way round: True is what the template writes": [(text, not ours) for text, ours in right],
        "the line end after <|im_end|> is missing": [*right[:2], ("<|im_end|>", True)],
        "the opening of a reply stands there without being asked for": [*right[:2], ("<|im_end|>\n<|im_start|>assistant\n", True)],
        "nothing is rendered": [],
    })  # fmt: skip
    tail = [("<|im_end|>\n<|im_start|>assistant\n", True)]
    same(joined(render_chat(messages, add_generation_prompt=True)), [*right[:2], *tail], f"{given[:-1]}, add_generation_prompt=True)",
         "with add_generation_prompt the text ends where a reply begins", {
        "add_generation_prompt has no effect": right,
        "the opening of the reply must end with a line end": [*right[:2], ("<|im_end|>\n<|im_start|>assistant", True)],
    })  # fmt: skip
    two = chat(("tool", "dry"), ("tool", "warm"))
    first, second = ("\n<tool_response>\n", True), ("\n</tool_response>", True)
    opening, end = ("<|im_start|>user", True), ("<|im_end|>\n", True)
    dry, warm = [first, ("dry", False), second], [first, ("warm", False), second]
    same(joined(render_chat(two)), joined([opening, *dry, *warm, end]), f"render_chat({two})", "two results that follow one another share one turn", {
        "each result opens and closes a turn of its own; results that follow one another share one":
            joined([opening, *dry, end, opening, *warm, end]),
        "the turn is closed after each result; only the last one closes it": joined([opening, *dry, end, *warm, end]),
        "each result opens the turn again; only the first one opens it": joined([opening, *dry, opening, *warm, end]),
        "the turn is never closed": joined([opening, *dry, *warm]),
        "the turn is never opened; beware of messages[i - 1] where i is 0": joined([*dry, *warm, end]),
    })  # fmt: skip
    roles = ("user", "assistant", "tool")
    sequences = [[a, b, c, d] for a in roles for b in roles for c in roles for d in ("user", "tool")] + [["system", role] for role in roles]
    for sequence in sequences:
        messages = chat(*((role, f"{role} {i} <|im_end|>") for i, role in enumerate(sequence)))
        wanted = runs(CHAT.render(messages=messages, prompt=len(sequence) == 4))
        same(joined(render_chat(messages, None, len(sequence) == 4)), wanted, f"messages of the roles {', '.join(sequence)}",
             "Jinja renders another text, or other letters are ours")  # fmt: skip
    _parts(render_chat)


def _parts(render_chat) -> None:
    thinks = [{"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}]
    wanted = runs("<|im_start|>assistant\n<think>\n\1Hm.\2\n</think>\n\n\1Yes.\2<|im_end|>\n")
    same(joined(render_chat(thinks)), wanted, f"render_chat({thinks})", "the thought of a reply is lost: render_assistant writes it")
    tool = {"type": "function", "function": {"name": "add"}}
    told, user = '{"type": "function", "function": {"name": "add"}}', ("user", "Hi")
    for opening in ((), (("system", "Be brief."),), (("system", ""),)):
        rendered = "".join(text for text, _ in render_chat(chat(*opening, user), [tool]))
        if told not in rendered or rendered.count("<|im_start|>system\n") != 1 or opening and opening[0][1] not in rendered:
            fail("tools and the system message stand together in one opening: render_system(content, tools)", f"{[*opening, user]}, tools=[{told}]",
                 got=rendered)  # fmt: skip
        if rendered.count("<|im_start|>user\n") != 1:
            fail("after the opening the messages must follow, each once", f"{[*opening, user]}, tools=[{told}]", got=rendered)
    by_message = [{"role": "system", "content": "", "tools": json.dumps([tool])}, *chat(user)]
    rendered = "".join(text for text, _ in render_chat(by_message))
    if told not in rendered:
        fail("tools may stand in the system message, as JSON text: go on with what parse_messages returns", by_message, told, rendered)
    empty = "".join(text for text, _ in render_chat(chat(("system", ""), user)))
    if not empty.startswith("<|im_start|>system\n<|im_end|>\n"):
        fail("a system message that is empty is still one; only None means that there is none", [("system", ""), user], got=empty)
    for bad in ([], [{"role": "bot", "content": "x"}], chat(user, ("system", "late"))):
        try:
            render_chat(bad)
        except ValueError:
            continue
        except Exception as error:
            fail("parse_messages refuses this with a ValueError; call it first", bad, "ValueError", type(error).__name__)
        fail("parse_messages refuses this with a ValueError; call it first", bad, "ValueError", "a rendered chat")


class Words:
    """A coder in which every run of letters, and every other character, is one token; the library finds them."""

    def __init__(self) -> None:
        names = ["<|im_start|>", "<|im_end|>", "<tool_call>", *"he hello llo user tools x im end tool call start".split(), *"<|>_/\n"]
        self.library = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="x"))
        self.library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[^a-z]"), "isolated")
        self.special_ids = {name: i for i, name in enumerate(names[:3])}

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        ids = []
        for i, part in enumerate(re.split(r"(<\|im_start\|>|<\|im_end\|>|<tool_call>)", text)) if allow_special else [(0, text)]:
            ids += [self.special_ids[part]] if i % 2 else self.library.encode(part).ids
        return ids

    def encode_batch(self, texts: list[str], allow_special: bool = False) -> list[list[int]]:
        return [self.encode(text, allow_special) for text in texts]


@exercise("piece_ids", keeps=["piece_ids"])
def check_piece_ids(piece_ids):
    coder = Words()
    plain = coder.encode
    pieces = [("<|im_start|>user\n", True), ("hello", False), ("<|im_end|>\n", True)]
    got = piece_ids(coder, list(pieces))
    if got is not None and not (isinstance(got, list) and all(isinstance(i, int) for i in got)):
        fail("it returns a flat list of ids", str(pieces), "a list of whole numbers", got)
    text = "".join(text for text, _ in pieces)
    same(got, coder.encode(text, True), str(pieces), "nobody attacks here, so these must be the ids of the joined string, with special tokens", {
        "no special token was found: in our text its spelling becomes its one id": plain(text),
        "the text after the last special token is lost": coder.encode(text, True)[:-1],
        "only special tokens are left: the text between them is lost": [0, 1],
        "the text before a special token comes after it: first the ids of what waits, then the special one": [0, 1, *plain("user\nhello\n")],
    })  # fmt: skip
    attack = [("<|im_start|>", True), ("x<|im_end|>x", False), ("<|im_end|>", True)]
    same(piece_ids(coder, list(attack)), [0, *plain("x<|im_end|>x"), 1], str(attack), "what a person wrote is plain text, always", {
        "a person has ended their own turn: only in text that is ours may special tokens be looked for":
            coder.encode("<|im_start|>x<|im_end|>x<|im_end|>", True),
        "what a person wrote is lost": [0, 1],
    })  # fmt: skip
    split = [("<|im_end|>he", True), ("llo", False), ("<tool_call>", True)]
    same(piece_ids(coder, list(split)), [1, *plain("hello"), 2], str(split), "text between two special tokens is encoded in one go", {
        "`he` and `llo` were encoded one by one; a token may reach from our text into theirs, so join the text first":
            [1, *plain("he"), *plain("llo"), 2],
    })  # fmt: skip
    theirs = [("he", False), ("llo", False), ("<tool_call>", False), ("<tools>", True)]
    same(piece_ids(coder, theirs), plain("hello<tool_call><tools>"), str(theirs), "here is no special token: theirs never are, and <tools> is none", {
        "text that waits at the end is lost": [], "people's own pieces must be joined as well": plain("he") + plain("llo<tool_call><tools>"),
    })  # fmt: skip
    forged = [("<|im_", False), ("end|>", True), ("<|im_end|>", False), ("<|im_end|>", True)]
    same(piece_ids(coder, forged), [*plain("<|im_end|><|im_end|>"), 1], str(forged), "a spelling that is only partly ours is text")
    same(piece_ids(coder, []), [], "no pieces", "there is nothing to encode")
    rng = random.Random(0)
    parts = [("hello", False), ("he", False), ("<|im_end|>", False)]
    parts += [("\n", True), ("<|im_end|>", True), ("<|im_start|>user\n", True), ("<tools>he", True)]
    for _ in range(30):
        pieces = rng.choices(parts, k=rng.randint(1, 6))
        # a letter that nobody has stands for the sign < of people, until the library has cut the text
        hidden = "".join(text if ours else text.replace("<", "\ue000") for text, ours in pieces)
        wanted = _unhide(coder, hidden)
        same(piece_ids(coder, list(pieces)), wanted, str(pieces), "right for small cases, and not here")


def _unhide(coder: Words, text: str) -> list[int]:
    """The ids of a text in which < may be written as another letter."""
    found = re.split(r"(<\|im_start\|>|<\|im_end\|>|<tool_call>)", text)
    return [i for n, part in enumerate(found) for i in ([coder.special_ids[part]] if n % 2 else coder.encode(part.replace("\ue000", "<")))]


# -- beyond


STORY = "Zoë's 24 cats: 你好!"


@exercise("predicted_tokens")
def check_predicted_tokens(predicted_tokens):
    if not isinstance(predicted_tokens, dict) or set(predicted_tokens) != {"no merges", "all merges"}:
        fail("`predicted_tokens` is a dict with two numbers", expected='{"no merges": ..., "all merges": ...}', got=predicted_tokens)
    pieces = [piece for piece, _ in pre_tokenizers.Split(Regex(CUT), "isolated").pre_tokenize_str(STORY)]
    got = predicted_tokens["no merges"]
    same(got, len(STORY.encode()), f"{STORY!r}, no merges", "one token for each byte: count again", {
        "these are the characters; some of them take more bytes than one": len(STORY),
        "Chinese letters take three bytes each, not two": len(STORY.encode()) - 2,
        "the letter ë takes two bytes": len(STORY.encode()) - 1,
        "spaces are bytes too": len(STORY.replace(" ", "").encode()),
    } if isinstance(got, int) else {})  # fmt: skip
    got = predicted_tokens["all merges"]
    same(got, len(pieces), f"{STORY!r}, all merges", "one token for each piece: cut again by the rules of section 2.3", {
        "these are the words between blanks; signs, digits and endings are pieces of their own": len(STORY.split()),
        "every digit is a piece of its own": len(pieces) - 1,
        "one piece is missing: every digit stands alone, and a digit takes no space with it": len(pieces) - 2,
        "one piece is too many: a run of Chinese letters is one piece, a space goes with the letters after it, and 's stays together":
            len(pieces) + 1,
    })  # fmt: skip


def slow(pieces: dict, merges: int, subtract=True, all_counts=True) -> list:
    """Merges by counts that are kept, with and without the two bugs."""
    pieces, learned = dict(pieces), []
    count = lambda units, n: Counter({}) + Counter([p for p in zip(units, units[1:], strict=False) for _ in range(n)])
    totals = Counter()
    for units, n in pieces.items():
        totals += count(units, n)
    while totals and len(learned) < merges:
        best = sorted(totals, key=lambda p: (-totals[p], p))[0]
        if totals[best] < 2:
            break
        learned.append(best)
        for units in [u for u in pieces if best in zip(u, u[1:], strict=False)]:
            n, out = pieces.pop(units), []
            for unit in units:  # a plain walk with a look back
                if out and (out[-1], unit) == best:
                    out[-1] = FIRST + len(learned) - 1
                else:
                    out.append(unit)
            pieces[tuple(out)] = n
            totals.subtract(count(units, n) if subtract else {best: n})
            totals.update(count(tuple(out), n if all_counts else 1))
    return learned


@exercise("learn_fast", after=["pairs", "learn_merges"])
def check_learn_fast(learn_fast):
    pieces = {(A, B, C): 5, (C, D): 3, (D, E): 2}
    given = "the pieces abc (5 times), cd (3 times), de (2 times), num_merges = 5"
    got = learn_fast(dict(pieces), 5)
    if got is not None and not isinstance(got, list):
        fail("it returns the list of merges, each a pair of ids", given, "a list", type(got).__name__)
    right = [(A, B), (FIRST, C), (C, D), (D, E)]
    same(got, right, given, "these are still not the merges", {
        "pairs that are gone still count, so one is learned again. Which pairs stood in the old piece? (The other bug hides behind this one.)":
            slow(pieces, 5, False),
        "one bug is left: pairs that a merge makes count too little. How often does the new piece occur?": slow(pieces, 5, True, False),
    })  # fmt: skip
    before = dict(pieces)
    learn_fast(pieces, 5)
    same(pieces, before, given, "it changes the dict that it was given")
    for few, wanted in (({}, []), ({(A,): 4}, []), ({(A, B): 1}, []), ({(A, B): 2}, [(A, B)])):
        same(learn_fast(dict(few), 5), wanted, f"learn_fast({few}, 5)", "it must stop where no pair occurs twice, or where there is no pair")
    same(learn_fast(dict(pieces), 1), right[:1], f"{given[:-1]}1", "at most num_merges pairs are learned")
    for seed in range(12):
        words = words_of(seed, "abc")
        got = learn_fast({ids_of(word): count for word, count in words.items()}, 12)
        same(got, list(library_merges(seed, 12, "abc")), f"the words {words}, 12 merges", "the library `tokenizers` learns other merges")


@exercise("bpe_dropout", after=["apply_merges"])
def check_bpe_dropout(bpe_dropout):
    ranks = {(A, B): 0, (B, C): 1, (FIRST, C): 2}
    for seed in range(3):
        given = f"the units a b c a, ranks (a, b): 0, (b, c): 1, (ab, c): 2, p = 0, seed {seed}"
        got = bpe_dropout((A, B, C, A), dict(ranks), 0.0, seed)
        a_tuple(got, given)
        same(got, (FIRST + 2, A), given, "with p = 0 nothing fails: the result is that of apply_merges", {
            "p is the probability that a merge fails; here it is that of success": (A, B, C, A),
            "it stops after one step": (FIRST, C, A), "nothing is merged": (A, B, C, A),
            "the merge of the highest rank came first": (A, FIRST + 1, A),
        })  # fmt: skip
        same(bpe_dropout((A, B, C, A), dict(ranks), 1.0, seed), (A, B, C, A), given.replace("p = 0", "p = 1"), "with p = 1 every merge fails")
    for units in ((), (A,), (C, B, A)):
        same(bpe_dropout(units, dict(ranks), 0.5), units, f"the units {units}, p = 0.5", "there is nothing to merge")
    for seed in range(4):
        merges = library_merges(seed, 12)
        known, library = {pair: i for i, pair in enumerate(merges)}, library_pieces(merges)
        for word in words_of(seed):
            wanted = tuple(36 + token.id for token in library.tokenize(word))
            same(bpe_dropout(ids_of(word), dict(known), 0.0, seed), wanted, f"the units of {word}, ranks {known}, p = 0",
                 "with p = 0 the result is that of apply_merges")  # fmt: skip
    first, again = ([bpe_dropout((A, B, A, B, A, B), dict(ranks), 0.5, seed) for seed in range(1, 41)] for _ in range(2))
    for seed, (once, twice) in enumerate(zip(first, again), 1):
        if once != twice:
            fail("the same seed must give the same tokens: take every random number from rng", f"(a b) x 3, p = 0.5, seed {seed} twice", once, twice)
    if len(set(first[:6])) == 1:
        fail("six seeds give the same tokens: is the seed used, and does any merge fail?", "a b a b a b, p = 0.5, seeds 1 to 6", got=first[0])
    _shares(bpe_dropout, ranks)


def _shares(bpe_dropout, ranks) -> None:
    """How often each result comes, with 400 seeds; the standard deviation of a share is at most 0.025."""

    def share(units, p, result) -> float:
        if (units, p) not in seen:
            seen[units, p] = Counter(bpe_dropout(units, dict(ranks), p, seed) for seed in range(400))
        return seen[units, p][result] / 400

    seen = {}
    left = share((A, B), 0.25, (A, B))
    if not 0.15 < left < 0.35:
        words = "a single possible merge fails with probability p"
        words = "p is the probability that a merge fails; here it is that of success" if left > 0.6 else words
        fail(words, "a b, p = 0.25, 400 seeds", "a b stays in about 0.25 of them", left)
    one = (A, B, A, B), 0.5
    left, both = share(*one, (A, B, A, B)), share(*one, (FIRST, FIRST))
    given = "a b a b, p = 0.5, 400 seeds"
    if left > 0.375:
        fail("both places failed together: each draws for itself, also where it is the same pair", given, "none merged in about 0.25 of them", left)
    if left < 0.15:
        fail("merges fail too seldom: when no place remains, the walk ends", given, "none merged in about 0.25 of them", left)
    if both < 0.31:
        fail("a place that failed once fails for ever: after each merge all places draw anew", given, "both merged in about 0.375 of them", both)
    if both > 0.45:
        fail("where one place remains, both are merged: only the places that remain", given, "both merged in about 0.375 of them", both)
    three = (A, B, C), 0.5
    right, none, whole = (share(*three, result) for result in ((A, FIRST + 1), (A, B, C), (FIRST + 2,)))
    given = "a b c, ranks (a, b): 0, (b, c): 1, (ab, c): 2, p = 0.5, 400 seeds"
    if right < 0.15:
        fail("where the best merge fails, the next best must have its chance", given, "(b, c) merged in about 0.25 of them", right)
    if right > 0.4:
        fail("of the places that remain the one of lowest rank is merged", given, "(b, c) merged in about 0.25 of them", right)
    if not (0.15 < none < 0.35 and 0.15 < whole < 0.35):
        fail("after each merge all places draw anew, also the new ones", given, "all merged in about 0.25, none in about 0.25", f"{whole} and {none}")


@functools.cache
def of_the_world() -> tuple[Tokenizer, Tokenizer, dict[str, int]]:
    """The library's merges of 60 texts, its longest match with the same vocabulary, and the pieces of 60 other texts in letters."""
    from minimind.world import make_world

    texts = list(make_world(20, 1).documents(120, 1))
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CUT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    merges = trained(texts[:60], 300, cut)
    longest = Tokenizer(word_piece(merges.get_vocab()))
    longest.pre_tokenizer = cut
    return merges, longest, texts[60:]


def word_piece(vocabulary: dict[str, int]) -> models.WordPiece:
    known = {**vocabulary, "[none]": len(vocabulary)}
    return models.WordPiece(known, unk_token="[none]", max_input_chars_per_word=1000, continuing_subword_prefix="")


@exercise("longest_match")
def check_longest_match(predicted_fewer, longest_match, measured):
    small = {b"a": 1, b"b": 2, b"c": 3, b"d": 4, b"ab": 5, b"bcd": 6, b"abc": 7}
    given = "longest_match(b'abcd', vocabulary) with a, b, c, d, ab: 5, bcd: 6, abc: 7"
    got = longest_match(b"abcd", dict(small))
    if got is not None and not isinstance(got, list):
        fail("it returns a list of ids", given, "a list", type(got).__name__)
    same(got, [7, 4], given, "at each place take the longest token that fits", {
        "the shortest token that fits was taken": [1, 2, 3, 4],
        "the search for a longer token ended too early: ab fits, and abc fits too": [5, 3, 4],
        "the text was cut from its end; begin at the front": [1, 6],
        "the rest of the text is lost: go on behind the token": [7], "these are the tokens; return their ids": [b"abc", b"d"],
    })  # fmt: skip
    gap = {b"a": 1, b"b": 2, b"c": 3, b"abc": 7}
    same(longest_match(b"abc", gap), [7], "longest_match(b'abc', vocabulary) with a, b, c, abc: 7, and no ab",
         "ab is no token, but abc is: a longer one may fit where a shorter one does not")  # fmt: skip
    same(longest_match(b"", dict(small)), [], "longest_match(b'', vocabulary)", "nothing gives no tokens")
    rng = random.Random(0)
    for _ in range(30):
        words = {"".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(12)} | set("abc")
        ids = {word: i for i, word in enumerate(sorted(words))}
        text = "".join(rng.choices("abc", k=rng.randint(1, 14)))
        wanted = [token.id for token in word_piece(ids).tokenize(text)]
        got = longest_match(text.encode(), {word.encode(): i for word, i in ids.items()})
        same(got, wanted, f"longest_match({text.encode()}, {ids})", "the WordPiece of the library `tokenizers` gives other tokens")
    if not isinstance(measured, dict) or set(measured) != {"merges", "longest match"}:
        fail("`measured` is a dict with two numbers", expected='{"merges": ..., "longest match": ...}', got=measured)
    merges, longest, texts = of_the_world()
    for name, library in (("merges", merges), ("longest match", longest)):
        pieces = Counter(token for text in texts for token, _ in library.pre_tokenizer.pre_tokenize_str(text))
        lengths = {piece: len(library.model.tokenize(piece)) for piece in pieces}
        same(measured[name], sum(lengths[piece] * n for piece, n in pieces.items()), f'measured["{name}"], the tokens of all held-out pieces',
             "this is not the number of tokens", {
            "each piece was counted once; its tokens count as often as it occurs": sum(lengths.values()),
            "these are the pieces, not their tokens": sum(pieces.values()),
        })  # fmt: skip
    right = min(measured, key=measured.get)
    if predicted_fewer != right:
        words = "the measurement disagrees with your prediction; correct it, and look at some pieces where the two differ"
        fail(words, str(measured), got=predicted_fewer)
