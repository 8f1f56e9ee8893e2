# %% [markdown]
# # Workbook 2. Tokenizer
#
# You write the heart of `minimind.tokenizer` yourself: learning merges, applying them,
# and a chat that nobody can break out of. Then you repair a faster way to learn, let
# merges fail by chance, and measure another way to cut words. About two and a half
# hours; stop anywhere.
#
# Write your code in place of the line that raises `NotImplementedError`, run the cell,
# then run the check under it. A check that fails names the likely mistake and shows the
# smallest case. Hints open one at a time. `solution("pairs")` shows that one solution
# and no other.
#
# Words as in the chapter: a *piece* is a part of the text that no merge leaves, its
# *units* are bytes at first, and each merge makes two neighbours one unit.

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# What is given: the first id of a merged token, the rendering of single messages, and
# a small training for exercise 9, with 300 merges learned from 60 of the world's texts.

# %% id="w02-imports"
import json
import random
import re
from collections import Counter

from minimind.tokenizer import (
    FIRST_MERGE,
    Tokenizer,
    byte_ids,
    parse_messages,
    render_assistant,
    render_system,
    split_text,
)
from minimind.world import make_world

world_texts = list(make_world(20, 1).documents(120, 1))
trained = Tokenizer.train(world_texts[:60], FIRST_MERGE + 300)
held_out = Counter(piece for text in world_texts[60:] for piece in split_text(text))
vocabulary = {token: i for i, token in enumerate(trained.token_bytes())}

# %% [markdown] exercise="pairs"
# ## 1. Count pairs, merge a pair
#
# `count_pairs` gets pieces, each a tuple of units with the number of times that it
# occurs. A pair of neighbours counts once for each place where it stands, times the
# count of its piece. So `{("h", "a", "t"): 3}` gives `{("h", "a"): 3, ("a", "t"): 3}`.
#
# `merge_pair` walks through one piece from left to right and puts `new` wherever the
# pair stands. A unit that was used is used up: the pair (a, a) can be merged once in
# `aaa`. (Chapter section 2.2.)
#
# <details><summary>Hint 1: neighbours</summary>
#
# `zip(units, units[1:])` gives all pairs of neighbours; it gives none for a single
# unit.
#
# </details>
# <details><summary>Hint 2: walking</summary>
#
# Keep a place `i`. If the pair stands at `i`, write `new` and go two places on; else
# write the unit and go one. The result must be a tuple, because pieces are keys of a
# dict.
#
# </details>

# %% id="w02-pairs" exercise="pairs" points=3 minutes=10 difficulty=1 kind="rebuild"
def count_pairs(pieces: dict[tuple, int]) -> Counter:
    """How often each pair of neighbours occurs; pieces maps units to their count."""
    ### BEGIN SOLUTION
    found = Counter()
    for units, count in pieces.items():
        for pair in zip(units, units[1:]):
            found[pair] += count
    return found
    ### END SOLUTION


def merge_pair(units: tuple, pair: tuple, new) -> tuple:
    """Put `new` in every place of `pair`, from left to right; places do not overlap."""
    ### BEGIN SOLUTION
    merged, i = [], 0
    while i < len(units):
        if units[i : i + 2] == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(units[i])
            i += 1
    return tuple(merged)
    ### END SOLUTION

# %% id="w02-pairs-check"
check("pairs")

# %% [markdown] exercise="learn_merges"
# ## 2. Learn the merges
#
# `best_pair` chooses the pair with the highest count. Of equal counts the pair with the
# smaller ids wins, compared left id first.
#
# `learn_merges` repeats: count, choose, merge. Merge number $i$, counted from 0, makes
# the unit `FIRST_MERGE + i`. It returns the pairs in the order in which they were
# learned, at most `num_merges`, and stops early when no pair occurs twice. The check
# compares with the trainer of the library `tokenizers`. (Section 2.4.)
#
# <details><summary>Hint 1: highest count, smallest ids</summary>
#
# `min` and `max` take a `key`. Tuples are compared from left to right, and a minus
# sign turns "high" into "low".
#
# </details>
# <details><summary>Hint 2: the pieces after a merge</summary>
#
# Make a new dict: every piece merged, with its old count. Do not write into the dict
# that you were given.
#
# </details>
# <details><summary>Hint 3: when to stop</summary>
#
# Three reasons: enough merges, no pairs at all, or a best pair that occurs once.
#
# </details>

# %% id="w02-learn-merges" exercise="learn_merges" points=4 minutes=20 difficulty=2 kind="rebuild"
def best_pair(pairs: dict[tuple[int, int], int]) -> tuple[int, int]:
    """The pair with the highest count; of equal ones the one with the smallest ids."""
    ### BEGIN SOLUTION
    return min(pairs, key=lambda pair: (-pairs[pair], pair))
    ### END SOLUTION


def learn_merges(
    pieces: dict[tuple[int, ...], int], num_merges: int
) -> list[tuple[int, int]]:
    """Up to num_merges pairs, as they are learned; merge i makes unit FIRST_MERGE + i.

    pieces: ids of the bytes of each piece, and its count.
    """
    ### BEGIN SOLUTION
    merges = []
    while len(merges) < num_merges:
        pairs = count_pairs(pieces)
        if not pairs or pairs[best_pair(pairs)] < 2:
            break
        pair, new = best_pair(pairs), FIRST_MERGE + len(merges)
        merges.append(pair)
        pieces = {merge_pair(units, pair, new): n for units, n in pieces.items()}
    return merges
    ### END SOLUTION

# %% id="w02-learn-merges-check"
check("learn_merges")

# %% [markdown] exercise="apply_merges"
# ## 3. Apply the merges
#
# A new piece is encoded by the same walk. `ranks` holds for each pair its place in the
# list of merges. Of all pairs in the piece take the one of the **lowest rank**, merge
# it wherever it stands, and look again; stop when no pair of the piece is known.
# (Section 2.5.)
#
# <details><summary>Hint 1: pairs without a rank</summary>
#
# Most pairs of a piece were never learned. Leave them out, or give them a rank that is
# worse than any.
#
# </details>
# <details><summary>Hint 2: which unit does a merge make?</summary>
#
# The one of exercise 2: `FIRST_MERGE` plus the rank.
#
# </details>

# %% id="w02-apply-merges" exercise="apply_merges" points=3 minutes=15 difficulty=2 kind="rebuild"
def apply_merges(
    units: tuple[int, ...], ranks: dict[tuple[int, int], int]
) -> tuple[int, ...]:
    """Merge the units of one piece, the pair of the lowest rank first."""
    ### BEGIN SOLUTION
    while known := [pair for pair in zip(units, units[1:]) if pair in ranks]:
        pair = min(known, key=ranks.get)
        units = merge_pair(units, pair, FIRST_MERGE + ranks[pair])
    return units
    ### END SOLUTION

# %% id="w02-apply-merges-check"
check("apply_merges")

# %% [markdown] exercise="render_chat"
# ## 4. Render a chat
#
# A chat becomes a list of pieces `(text, ours)`: `ours` is True for what the template
# writes, False for what a person or a model wrote. A message of a user is
#
# ```
# <|im_start|>user⏎ ... <|im_end|>⏎
# ```
#
# Results of tools come in a turn of the user as well, each as
# `⏎<tool_response>⏎ ... ⏎</tool_response>`. Results that follow one another share
# **one** turn: the first opens it with `<|im_start|>user`, the last closes it. With
# `add_generation_prompt` the text ends with `<|im_start|>assistant⏎`.
#
# Given are `parse_messages(messages, tools)`, which checks both and reads the JSON
# text in them; `render_system(content, tools)`, the opening, with `None` as content
# where there is no system message; and `render_assistant(message)`. (Section 2.8.)
#
# <details><summary>Hint 1: the plan</summary>
#
# Parse; render the opening; go through the messages and add what each one's role asks
# for. The system message is done by then.
#
# </details>
# <details><summary>Hint 2: first and last result</summary>
#
# A result opens the turn if the message before it is none of role `tool`, and closes it
# if the one after it is none. Beware of `messages[i - 1]` where `i` is 0, and of
# `messages[i + 1]` at the end: a slice of the roles is empty there, and no error.
#
# </details>
# <details><summary>Hint 3: how the result may be cut</summary>
#
# The check joins neighbours of the same kind before it compares. Only the text and the
# True or False of each letter matter.
#
# </details>

# %% id="w02-render-chat" exercise="render_chat" points=4 minutes=20 difficulty=2 kind="rebuild"
def render_chat(
    messages: list[dict], tools: list[dict] | str | None = None,
    add_generation_prompt: bool = False,
) -> list[tuple[str, bool]]:
    """A conversation in pieces: each a text, and whether the template wrote it."""
    ### BEGIN SOLUTION
    messages, tools = parse_messages(messages, tools)
    roles = [message["role"] for message in messages]
    opening = messages[0]["content"] if roles[0] == "system" else None
    pieces = render_system(opening, tools)
    for i, (role, message) in enumerate(zip(roles, messages)):
        said = (message["content"], False)
        if role == "user":
            pieces += [("<|im_start|>user\n", True), said, ("<|im_end|>\n", True)]
        elif role == "assistant":
            pieces += render_assistant(message)
        elif role == "tool":
            if roles[:i][-1:] != ["tool"]:
                pieces.append(("<|im_start|>user", True))
            pieces.append(("\n<tool_response>\n", True))
            pieces += [said, ("\n</tool_response>", True)]
            if roles[i + 1 : i + 2] != ["tool"]:
                pieces.append(("<|im_end|>\n", True))
    if add_generation_prompt:
        pieces.append(("<|im_start|>assistant\n", True))
    return pieces
    ### END SOLUTION

# %% id="w02-render-chat-check"
check("render_chat")

# %% [markdown] exercise="piece_ids"
# ## 5. Special tokens, only from us
#
# Turn the pieces into ids. In text that is **ours**, a special token's spelling becomes
# its one id; in text that is not, the same letters are plain text. So nobody can end
# their turn by typing `<|im_end|>`.
#
# One more thing: all text between two special tokens is encoded **in one go**, whoever
# wrote its parts. A token may reach from our text into theirs, and the ids must be
# those of the joined string. `coder.encode(text)` gives the ids of plain text,
# `coder.special_ids` a dict from spelling to id. (Section 2.8.)
#
# <details><summary>Hint 1: two variables</summary>
#
# Keep the ids so far, and the text that waits. A special token empties the waiting
# text into the ids. What must happen at the end?
#
# </details>
# <details><summary>Hint 2: cutting our own text</summary>
#
# `re.split` keeps what a group in its pattern matched: with `r"(<[^<>]+>)"`, `a<b>c`
# becomes `["a", "<b>", "c"]`. Not all of these are special: `<tools>` is not.
#
# </details>

# %% id="w02-piece-ids" exercise="piece_ids" points=4 minutes=20 difficulty=3 kind="rebuild"
def piece_ids(coder, pieces: list[tuple[str, bool]]) -> list[int]:
    """The ids of a rendered chat; only our own pieces hold special tokens."""
    ### BEGIN SOLUTION
    special, ids, waiting = coder.special_ids, [], ""
    for text, ours in pieces:
        for part in re.split(r"(<[^<>]+>)", text) if ours else [text]:
            if ours and part in special:
                ids += [*coder.encode(waiting), special[part]]
                waiting = ""
            else:
                waiting += part
    return ids + coder.encode(waiting)
    ### END SOLUTION

# %% id="w02-piece-ids-check"
check("piece_ids")

# %% [markdown] exercise="predicted_tokens"
# ## 6. Predict: how many tokens?
#
# Take the text `Zoë's 24 cats: 你好!` and count on paper, with the rules of sections
# 2.1 and 2.3:
#
# - `"no merges"`: its tokens for a tokenizer that has learned nothing;
# - `"all merges"`: its tokens for one that has learned every piece as a whole, the
#   fewest that merges can ever reach.
#
# <details><summary>Hint 1: no merges</summary>
#
# One token for each byte. Letters with a sign above take two bytes, Chinese letters
# three.
#
# </details>
# <details><summary>Hint 2: all merges</summary>
#
# One token for each piece. A space goes with the letters or signs after it, but never
# with a digit, and every digit stands alone.
#
# </details>

# %% id="w02-predicted-tokens" exercise="predicted_tokens" points=2 minutes=10 difficulty=2 kind="beyond"
### BEGIN SOLUTION
predicted_tokens = {"no merges": 23, "all merges": 9}
### END SOLUTION

# %% id="w02-predicted-tokens-check"
check("predicted_tokens")

# %% [markdown] exercise="learn_fast"
# ## 7. Two bugs
#
# `learn_merges` counts all pairs anew for each merge, although only pieces that hold
# the merged pair change. A colleague keeps the counts up to date instead, which is how
# the libraries are fast. There are two bugs, each in one line. With one, the **same
# pair is learned again**, though it does not stand anywhere any more. With the other,
# pairs that a merge makes are **chosen too late**. Find both and repair them in place.
#
# <details><summary>Hint 1: look at a small case</summary>
#
# One piece `a b c`, that occurs 5 times. Merge (a, b) by hand: which pairs were there
# before, which are there now? Then print `pairs` after the first merge.
#
# </details>
# <details><summary>Hint 2: what goes, what comes</summary>
#
# All pairs of the old piece go, not only the merged one; all pairs of the new piece
# come. Each as often as the piece occurs.
#
# </details>

# %% id="w02-learn-fast" exercise="learn_fast" points=3 minutes=15 difficulty=2 kind="beyond"
def learn_fast(
    pieces: dict[tuple[int, ...], int], num_merges: int
) -> list[tuple[int, int]]:
    """The merges of learn_merges, by counts that are kept up to date."""
    pieces, pairs, learned = dict(pieces), Counter(count_pairs(pieces)), []
    while pairs and len(learned) < num_merges:
        best = best_pair(pairs)
        if pairs[best] < 2:
            break
        learned.append(best)
        for old in [units for units in pieces if best in zip(units, units[1:])]:
            count, new = pieces.pop(old), FIRST_MERGE + len(learned) - 1
            merged = merge_pair(old, best, new)
            pieces[merged] = count
            ### BEGIN SOLUTION
            pairs.subtract(count_pairs({old: count}))
            pairs.update(count_pairs({merged: count}))
            ### END SOLUTION
            ### BEGIN STUB
            # pairs.subtract({best: count})
            # pairs.update(count_pairs({merged: 1}))
            ### END STUB
    return learned

# %% id="w02-learn-fast-check"
check("learn_fast")
### BEGIN HIDDEN TESTS
hidden_pieces = {(65, 66, 67, 66): 3, (66, 67): 2, (65, 65, 65): 4, (67, 66, 67): 5}
assert learn_fast(hidden_pieces, 9) == learn_merges(hidden_pieces, 9)
### END HIDDEN TESTS

# %% [markdown] exercise="bpe_dropout"
# ## 8. Merges that fail by chance
#
# A name is always cut in the same way, so a model hardly ever sees its letters. BPE
# dropout (Provilkov et al. 2020, arXiv:1910.13267) lets merges fail while the training
# data are encoded. Before **each** step, every place where a merge is possible is left
# out with probability $p$. Of the places that remain, the one of lowest rank is merged
# (of equal ranks the leftmost); then all places draw anew. The walk ends when no place
# remains. With $p = 0$ this is exercise 3; with $p = 1$ only bytes are left.
#
# Use `rng.random()`, a number from 0 up to but not including 1, so that the same seed
# gives the same tokens.
#
# <details><summary>Hint 1: places, not pairs</summary>
#
# A pair that stands at two places draws twice. So collect `(rank, place)` of all that
# remain; `min` of such tuples is the lowest rank, and of equal ones the leftmost.
#
# </details>
# <details><summary>Hint 2: merging at one place</summary>
#
# `units[:i]`, the new unit, `units[i + 2:]`.
#
# </details>

# %% id="w02-bpe-dropout" exercise="bpe_dropout" points=4 minutes=20 difficulty=2 kind="beyond"
def bpe_dropout(
    units: tuple[int, ...], ranks: dict[tuple[int, int], int], p: float, seed: int = 0
) -> tuple[int, ...]:
    """Merge the units of one piece; each possible merge fails with probability p."""
    rng = random.Random(seed)
    ### BEGIN SOLUTION
    while True:
        pairs = enumerate(zip(units, units[1:]))
        possible = [(ranks[pair], i) for i, pair in pairs if pair in ranks]
        places = [place for place in possible if rng.random() >= p]
        if not places:
            return units
        rank, i = min(places)
        units = (*units[:i], FIRST_MERGE + rank, *units[i + 2 :])
    ### END SOLUTION

# %% id="w02-bpe-dropout-check"
check("bpe_dropout")

# %% [markdown] exercise="longest_match"
# ## 9. An experiment: the longest token first
#
# WordPiece (Schuster and Nakajima 2012; used by BERT) cuts without any merges: at each
# place, it takes the longest token of the vocabulary that fits, and goes on behind it.
# Write `longest_match`. `vocabulary` maps the bytes of each token to its id and holds
# all single bytes.
#
# Use it with the vocabulary that 300 **merges** have made. **Predict first:** for texts
# of the world that the training has not seen, which needs fewer tokens? Write
# "merges", "longest match" or "equal" into `predicted_fewer`.
#
# Then measure: `held_out` has the pieces of 60 such texts and how often each occurs.
# Fill the dict `measured` with the number of tokens for `"merges"` and for
# `"longest match"`. `trained.encode(piece)` applies the merges.
#
# <details><summary>Hint 1: the longest first</summary>
#
# Try ends from the far one to the near one, and stop at the first that gives a token.
# A single byte always fits.
#
# </details>
# <details><summary>Hint 2: counting</summary>
#
# The tokens of a piece count as often as the piece occurs. `longest_match` wants bytes:
# `piece.encode()`.
#
# </details>
# <details><summary>Hint 3: why they differ</summary>
#
# A merge that was learned early may take a letter that a longer token would need.
# Print some pieces where the two differ.
#
# </details>

# %% id="w02-longest-match" exercise="longest_match" points=4 minutes=20 difficulty=2 kind="beyond"
### BEGIN SOLUTION
predicted_fewer = "longest match"
### END SOLUTION

def longest_match(data: bytes, vocabulary: dict[bytes, int]) -> list[int]:
    """Ids of one piece: at each place the longest token that fits."""
    ### BEGIN SOLUTION
    ids = []
    while data:
        end = len(data)
        while data[:end] not in vocabulary:
            end -= 1
        ids.append(vocabulary[data[:end]])
        data = data[end:]
    return ids
    ### END SOLUTION

### BEGIN SOLUTION
measured = {
    "merges": sum(len(trained.encode(piece)) * n for piece, n in held_out.items()),
    "longest match": sum(
        len(longest_match(piece.encode(), vocabulary)) * n
        for piece, n in held_out.items()
    ),
}
### END SOLUTION

# %% id="w02-longest-match-check"
check("longest_match")

# %% [markdown]
# What your dropout does to a word, with the 300 merges: rare ways to cut it, and the
# common one.

# %% id="w02-dropout-try"
merges = json.loads(trained.backend.to_str())["model"]["merges"]
ranks = {tuple(map(trained.backend.token_to_id, m)): r for r, m in enumerate(merges)}
word = tuple(byte_ids()[byte] for byte in b" market")
for seed in range(6):
    ids = bpe_dropout(word, ranks, 0.3, seed)
    print("|".join(trained.decode([i]) for i in ids))

# %% [markdown]
# ## Keep what is yours
#
# `keep()` saves the functions of exercises 1 to 5 that pass to `student/tokenizer.py`.
# With `MINIMIND_STUDENT=student` before a command, the course uses them: your template
# and your protection then stand in every chat.

# %% id="w02-keep"
keep()
