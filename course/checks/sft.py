"""Checks of workbook 11. What is trusted are plain loops over tokens, places and items; nothing here comes from minimind.sft."""

import json
import math

import torch

from course.checks.core import equal, exercise, fail, shaped, unchanged

MODULE = "sft"


class Letters:
    """A tokenizer of bytes, a few whole words and the special tokens of the chat template; it notes what the template got."""

    def __init__(self, words: tuple[bytes, ...] = ()) -> None:
        self.im_start_id, self.im_end_id, self.eos_id = 256, 257, 258
        special = [b"<|im_start|>", b"<|im_end|>", b"<|endoftext|>"]
        self.pieces = [bytes([i]) for i in range(256)] + special + list(words)
        self.words = {word: 259 + i for i, word in enumerate(words)}
        self.got: list[tuple] = []

    def token_bytes(self) -> list[bytes]:
        return self.pieces

    def decode(self, ids, skip_special: bool = False) -> str:
        return b"".join(self.pieces[i] for i in ids if not (skip_special and 256 <= i < 259)).decode("utf-8", "replace")

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The longest word that fits, else a byte; with `allow_special` the special tokens, too."""
        ids, data = [], text.encode()
        while data:
            known = [*self.words, *(self.pieces[256:259] if allow_special else ())]
            word = max((w for w in known if data.startswith(w)), key=len, default=data[:1])
            ids.append(self.pieces.index(word) if len(word) > 1 else word[0])
            data = data[len(word) :]
        return ids

    def apply_chat_template(self, messages, tools=None, add_generation_prompt=False, tokenize=True):
        self.got.append((messages, tools))
        first = f"<|im_start|>system\n{json.dumps(tools)}<|im_end|>\n" if tools else ""
        turns = [f"<|im_start|>{m['role']}\n{m.get('content') or ''}{self.calls(m)}<|im_end|>\n" for m in messages]
        text = first + "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")
        return self.encode(text, allow_special=True) if tokenize else text

    @staticmethod
    def calls(message) -> str:
        return "".join(json.dumps(call) for call in message.get("tool_calls") or [])


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def learned_by_loop(tokenizer: Letters, ids: list[int]) -> list[bool]:
    """One token after the other: outside, in a header, in a text."""
    state, header, mask = "outside", "", []
    for token in ids:
        mine = state == "text" and header == "assistant\n"
        mask.append(mine)
        if token == tokenizer.im_start_id:
            state, header = "header", ""
        elif token == tokenizer.im_end_id:
            state = "outside"
        elif state == "header":
            header += tokenizer.decode([token])
            state = "text" if "\n" in header else state
    return mask


def spelled(tokenizer: Letters, ids: list[int], mask) -> str:
    """The tokens with what is learned in brackets."""
    text, inside = "", False
    for token, mine in [*zip(ids, mask), (10, False)]:
        if bool(mine) != inside:
            text += "[" if mine else "]"
            inside = bool(mine)
        text += tokenizer.decode([token]) if token != 10 else "\\n"
    return text.removesuffix("\\n")


def mask_is(tokenizer: Letters, ids: list[int], got, words: str, likely: dict[str, list[bool]] | None = None) -> None:
    """The mask of these tokens; the first of `likely` that it is names the mistake."""
    given = spelled(tokenizer, ids, [False] * len(ids))
    if isinstance(got, torch.Tensor):
        got = got.tolist()
    if not isinstance(got, list | tuple):
        fail("it must return a list of True and False", given, got="nothing" if got is None else type(got).__name__)
    if len(got) != len(ids):
        fail("the mask must be as long as the ids", given, f"{len(ids)} values", f"{len(got)} values")
    if not all(isinstance(value, bool) or value in (0, 1) for value in got):
        fail("the mask must hold True and False", given, got=got)
    got, wanted = [bool(value) for value in got], learned_by_loop(tokenizer, ids)
    if got != wanted:
        words = next((w for w, wrong in (likely or {}).items() if got == wrong), words)
        fail(words, given, spelled(tokenizer, ids, wanted), spelled(tokenizer, ids, got))


# -- rebuild


@exercise("assistant_mask", keeps=["assistant_mask"])
def check_assistant_mask(assistant_mask):
    tokenizer = Letters()
    ids = tokenizer.apply_chat_template([turn("user", "hi"), turn("assistant", "yo")])
    right, end = learned_by_loop(tokenizer, ids), len(ids) - 2  # the place of the last <|im_end|>
    start = max(i for i, token in enumerate(ids) if token == tokenizer.im_start_id)
    text = start + 1 + len("assistant\n")
    range_of = lambda first, last: [first <= i < last for i in range(len(ids))]
    user = range_of(ids.index(10) + 1, ids.index(tokenizer.im_end_id) + 1)
    mask_is(tokenizer, ids, assistant_mask(tokenizer, ids), "these are not the tokens that the assistant writes (in brackets)", {
        "the <|im_end|> after the answer is not learned: the model would never stop": range_of(text, end),
        "the line end after <|im_end|> is learned; it belongs to no turn": range_of(text, end + 2),
        "the header is learned; the program writes it, not the model": range_of(start, end + 1),
        "the role is learned; the program writes it, not the model": range_of(start + 1, end + 1),
        "one place too early: the line end of the header is learned, and <|im_end|> is not": range_of(text - 1, end),
        "the line end of the header is learned; the text begins behind it": range_of(text - 1, end + 1),
        "one place too late: the first token of the answer is not learned, and it decides what follows": range_of(text + 1, end + 1),
        "the user's text is learned, and the answer is not": user,
        "the user's text is learned as well": [a or b for a, b in zip(right, user)],
        "everything is learned": [True] * len(ids),
        "nothing is learned": [False] * len(ids),
    })  # fmt: skip
    conversations = {
        "two answers: both are learned": [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")],
        "a user who writes the word assistant is still a user: only the header says who speaks": [turn("user", "assistant"), turn("assistant", "x")],
        "a user who writes the header's words is still a user": [turn("system", "be\nassistant\nnow"), turn("user", "assistant\nhi"),
                                                                 turn("assistant", "user\nhi")],
        "an answer with line ends is learned whole": [turn("user", "a"), turn("assistant", "\nb\n\nc\n")],
        "a conversation that begins with the assistant": [turn("assistant", "a"), turn("user", "b")],
        "an empty answer: its <|im_end|> is learned": [turn("user", "a"), turn("assistant", "")],
        "tool and system turns are not learned": [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("tool", "12")],
    }  # fmt: skip
    for words, messages in conversations.items():
        ids = tokenizer.apply_chat_template(messages)
        mask_is(tokenizer, ids, assistant_mask(tokenizer, ids), words)
    ids = [tokenizer.eos_id, 10, 10, *tokenizer.apply_chat_template([turn("assistant", "yo")])]
    mask_is(tokenizer, ids, assistant_mask(tokenizer, ids), "tokens before the first <|im_start|> belong to no turn, and change nothing")
    whole = tokenizer.apply_chat_template([turn("user", "hi"), turn("assistant", "yo")])
    for cut, words in ((len(whole) - 3, "a text without <|im_end|> goes to the end of the list"), (text, "a conversation that ends with its header"),
                       (text - 1, "a header without a line end has no text"), (text - 4, "a header without a line end has no text"),
                       (start + 1, "a conversation that ends with <|im_start|>"), (8, "a user turn"), (0, "no tokens")):  # fmt: skip
        mask_is(tokenizer, whole[:cut], assistant_mask(tokenizer, whole[:cut]), f"cut off: {words}")
    for merged in ((b"assistant\n", b"\n\n"), (b"assist", b"ant", b"user\n"), (b"assistant", b"user")):
        tokenizer = Letters(merged)
        ids = tokenizer.apply_chat_template([turn("user", "hi"), turn("assistant", "yo"), turn("user", "assistant"), turn("assistant", "a\n\nb")])
        words = f"the header may be cut into other tokens (here {', '.join(map(repr, merged))} are tokens): look at the bytes and at the decoded text"
        mask_is(tokenizer, ids, assistant_mask(tokenizer, ids), words)


@exercise("chat_example", after=["assistant_mask"], keeps=["chat_example"])
def check_chat_example(chat_example):
    tokenizer, messages = Letters(), [turn("user", "hi"), turn("assistant", "yo"), turn("user", "so"), turn("assistant", "no")]
    before = json.dumps(messages)
    whole = tokenizer.apply_chat_template(messages)
    mask, given = learned_by_loop(tokenizer, whole), "user: hi, assistant: yo, user: so, assistant: no"
    result = chat_example(tokenizer, messages)
    if not (isinstance(result, tuple | list) and len(result) == 2):
        fail("it must return two lists, ids and labels", given, got="nothing" if result is None else type(result).__name__)
    ids, labels = (list(part) for part in result)
    if ids != whole:
        fail("the ids are not those of the chat template", given, whole[:12], ids[:12])
    wanted = [token if mine else -100 for token, mine in zip(whole, mask)]
    start = max(i for i, token in enumerate(whole) if token == tokenizer.im_start_id)
    last = [label if i > start else -100 for i, label in enumerate(wanted)]
    labels_are(labels, wanted, given, {
        "the labels are shifted; here each stands under its own token": [*wanted[1:], -100],
        "the labels are shifted the wrong way; here each stands under its own token": [-100, *wanted[:-1]],
        "the labels are all tokens: where the assistant did not write, the label is -100": whole,
        "the labels are the wrong way round: -100 stands where the assistant wrote": [-100 if mine else token for token, mine in zip(whole, mask)],
        "where the assistant did not write, the label is -100; 0 is a token": [token if mine else 0 for token, mine in zip(whole, mask)],
        "the label is the token itself, not True or 1": [1 if mine else -100 for mine in mask],
        "only the last answer is learned; every answer is": last,
    })  # fmt: skip
    for length in (20, 26, len(whole) - 1, len(whole) + 5):
        ids, labels = (list(part) for part in chat_example(tokenizer, messages, length))
        given = f"a conversation of {len(whole)} tokens, max_length = {length}"
        if len(ids) != min(length, len(whole)):
            fail("max_length cuts the ids after that many tokens", given, f"{min(length, len(whole))} tokens", f"{len(ids)} tokens")
        if ids != whole[:length]:
            fail("the beginning stays, the end is cut off", given, whole[:4], ids[:4])
        labels_are(labels, wanted[:length], given, {})
    _tools(chat_example)
    chat_example(tokenizer, messages)
    if json.dumps(messages) != before:
        fail("the messages that were given have changed; make new dicts", given)


def labels_are(labels: list, wanted: list, given: str, likely: dict[str, list]) -> None:
    if len(labels) != len(wanted):
        fail("ids and labels must have the same length", given, f"{len(wanted)} labels", f"{len(labels)} labels")
    if labels != wanted:
        words = next((w for w, wrong in likely.items() if labels == wrong), "a label is the token itself where the assistant wrote it, else -100")
        place = next(i for i in range(len(wanted)) if labels[i] != wanted[i])
        fail(words, f"{given}; the first label that differs, at place {place}", wanted[place], labels[place])


def _tools(chat_example) -> None:
    tools, call = [{"name": "clock"}], [{"name": "clock", "arguments": {}}]
    ask = turn("user", "time?", tools=json.dumps(tools))
    tokenizer = Letters()
    messages = [ask, turn("assistant", "", tool_calls=json.dumps(call)), turn("tool", "12"), turn("assistant", "noon")]
    try:
        chat_example(tokenizer, messages)
    except (AttributeError, TypeError):
        pass
    got, received = tokenizer.got[-1] if tokenizer.got else ([], None)
    if received != tools:
        words = "tools in the first message must reach the template as objects (tools=...)"
        if isinstance(received, str):
            words = "the template got the tools as text: make objects of it with from_json"
        fail(words, f"messages[0] has tools {ask['tools']!r}", tools, received)
    if len(got) != 4 or got[1].get("tool_calls") != call:
        words = "tool_calls must reach the template as objects: from_json, in any message that has them"
        fail(words, "messages[1] has tool_calls as JSON text", call, got[1].get("tool_calls") if len(got) > 1 else None)
    if [m.get("content") for m in got] != ["time?", "", "12", "noon"] or [m["role"] for m in got] != [m["role"] for m in messages]:
        fail("the other parts of the messages must stay as they are", "a conversation with tool_calls")
    own = [{"name": "map"}]
    chat_example(tokenizer, [ask, turn("assistant", "x", tool_calls=call)], None, own)
    got, received = tokenizer.got[-1]
    if received != own:
        fail("tools that are given count more than those in the first message", "tools given, and tools in messages[0]", own, received)
    if got[1].get("tool_calls") != call:
        fail("tool_calls that are objects already must stay as they are", "messages[1] has tool_calls as a list", call, got[1].get("tool_calls"))
    chat_example(tokenizer, [turn("user", "a"), turn("assistant", "b", tool_calls=None)])
    if tokenizer.got[-1][1] is not None:
        fail("without tools, the template gets None", "no tools anywhere", None, tokenizer.got[-1][1])


def best_fit(lengths: list[int], width: int) -> list[int]:
    """The room that is left in each row, sorted: longest first, into the fullest row that has room."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, left in enumerate(room) if left >= length]
        if fits:
            room[min(fits, key=lambda i: room[i])] -= length
        else:
            room.append(width - length)
    return sorted(room)


def other_fit(lengths: list[int], width: int, choose, order=lambda lengths: sorted(lengths, reverse=True)) -> list[int]:
    """The same with another choice among the rows that fit, or another order."""
    room: list[int] = []
    for length in order(lengths):
        fits = [i for i, left in enumerate(room) if left >= length]
        if fits:
            room[choose(fits, room)] -= length
        else:
            room.append(width - length)
    return sorted(room)


def rows_are_whole(rows, lengths: list[int], width: int, given: str) -> list[list[int]]:
    """Every item once, by its number, and no row too full."""
    if not isinstance(rows, list | tuple) or not all(isinstance(row, list | tuple) for row in rows):
        fail("return a list of rows, each a list of item numbers", given, got="nothing" if rows is None else rows)
    items = [item for row in rows for item in row]
    if any(isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < len(lengths) for item in items) or \
            (sorted(items) == sorted(lengths) and sorted(items) != list(range(len(lengths)))):  # fmt: skip
        fail("a row must hold the numbers of its items, not their lengths", given, got=rows)
    if sorted(items) != list(range(len(lengths))):
        lost = sorted(set(range(len(lengths))) - set(items))
        fail(f"items are lost: {lost[:5]}" if lost else "an item stands in more than one place", given, got=rows)
    for row in rows:
        if not row:
            fail("there is an empty row", given, got=rows)
        if (used := sum(lengths[item] for item in row)) > width:
            fail(f"a row is too full: {' + '.join(str(lengths[i]) for i in row)} = {used} places of {width}", given, got=rows)
    return [list(row) for row in rows]


@exercise("pack", keeps=["pack"])
def check_pack(pack):
    fullest = lambda fits, room: min(fits, key=lambda i: room[i])
    emptiest = lambda fits, room: max(fits, key=lambda i: room[i])
    first, as_given = (lambda fits, room: fits[0]), (lambda lengths: lengths)
    cases = [([6, 4, 3], 10), ([5, 7, 2, 3, 6, 4, 2], 10), ([7, 6, 3, 4], 10), ([6, 8, 2, 4], 10), ([10, 10], 10), ([3], 10)]
    generator = torch.Generator().manual_seed(5)
    for width, most in ((32, 32), (64, 20), (50, 40)):
        cases.append((torch.randint(1, most + 1, (120,), generator=generator).tolist(), width))
    for lengths, width in cases:
        given = f"lengths {lengths if len(lengths) < 20 else f'{lengths[:6]} and 114 more'}, rows of {width}"
        before = list(lengths)
        rows = rows_are_whole(pack(lengths, width), before, width, given)
        if lengths != before or getattr(lengths, "changed_by_answer", False):
            fail("it changes the list of lengths; sort the numbers of the items instead", given)
        room = sorted(width - sum(lengths[item] for item in row) for row in rows)
        if room == best_fit(lengths, width):
            continue
        words = "these are not the rows of longest first, where it fits best"
        if len(rows) == len(lengths):
            words = "each item has a row of its own"
        elif (lengths, room) == ([6, 4, 3], [1, 6]):
            words = "no row is ever full: an item also fits where the room is exactly its length"
        elif room == other_fit(lengths, width, first):
            words = "each item goes into the first row that has room; it must be the one with the least room"
        elif room == other_fit(lengths, width, emptiest):
            words = "each item goes into the row with the most room; it must be the one with the least that is enough"
        elif room in (other_fit(lengths, width, fullest, as_given), other_fit(lengths, width, first, as_given)):
            words = "the items are taken as they come: the longest goes first"
        elif room in (other_fit(lengths, width, fullest, sorted), other_fit(lengths, width, first, sorted)):
            words = "the shortest goes first; it must be the longest"
        wanted = best_fit(lengths, width)
        fail(words, given, f"{len(wanted)} rows with room {wanted[:12]}", f"{len(rows)} rows with room {room[:12]}")
    if pack([], 10) != []:
        fail("no items, no rows", "pack([], 10)", [], pack([], 10))


def places(rows, width: int) -> dict[str, torch.Tensor]:
    """What lay_out must give, one place at a time."""
    empty = {"ids": 0, "labels": -100, "positions": 0, "owners": 0}
    table = {name: [[value] * width for _ in rows] for name, value in empty.items()}
    for r, row in enumerate(rows):
        flat = [(token, label, i, number) for number, (ids, labels) in enumerate(row, 1) for i, (token, label) in enumerate(zip(ids, labels))]
        for place, values in enumerate(flat):
            for name, value in zip(table, values):
                table[name][r][place] = int(value)
    return {name: torch.tensor(numbers) for name, numbers in table.items()}


@exercise("lay_out", keeps=["lay_out", "block_mask"])
def check_lay_out(lay_out, block_mask):
    first = [[([11, 12], [-100, 13]), ([21, 22, 23], [-100, 23, 24])]]
    second = [[([5], [6])], [([7, 8, 9, 10], [8, 9, 10, -100]), ([3], [4]), ([1, 2], [-100, 2])]]
    for rows, width in ((first, 6), (second, 7), (first, 5)):
        given = "conversations of " + " | ".join(", ".join(str(len(ids)) for ids, _ in row) for row in rows) + f" tokens in rows of {width}"
        result = lay_out(rows, width)
        if not isinstance(result, list | tuple) or len(result) != 4:
            fail("it must return four arrays: tokens, labels, positions, owners", given, got="nothing" if result is None else type(result).__name__)
        wanted = places(rows, width)
        run_on, own = torch.arange(width).expand(len(rows), -1), wanted["owners"]
        likely = {
            "labels": {"the padding has the label 0, and that is a token: it must be -100": wanted["labels"].masked_fill(own == 0, 0)},
            "positions": {"positions run on from one conversation to the next; they begin at 0 in each": run_on * (own > 0),
                          "positions run on from one conversation to the next, and into the padding": run_on,
                          "positions begin at 1; they begin at 0": (wanted["positions"] + 1) * (own > 0)},
            "owners": {"the owners are counted from 0, so the first one cannot be told from the padding": (own - 1).clamp(min=0),
                       "all have the same owner": (own > 0).long()},
        }  # fmt: skip
        for (name, expected), got in zip(wanted.items(), result):
            got = torch.as_tensor(got)
            shaped(got, (len(rows), width), f"{given}: {name}", hint=f"the {name} must be (B, T), with a number for each place")
            if got.is_floating_point() or got.dtype == torch.bool:
                fail(f"the {name} must be whole numbers", given, "int64", got.dtype)
            equal(got, expected, f"{given}: {name}", f"the {name} are not right", likely.get(name))
    _blocks(block_mask)


def _blocks(block_mask) -> None:
    owner = torch.tensor([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2]])
    given = "block_mask of the owners [1, 1, 2, 2, 0] and [1, 2, 2, 2, 2]"
    got = block_mask(owner)
    shaped(got, (2, 1, 5, 5), given, hint="the mask must be (B, 1, T, T): a dimension for the heads is missing or stands elsewhere")
    if got.dtype != torch.bool:
        fail("the mask must be of type bool, True where a position may look", given, "torch.bool", got.dtype)
    T = range(5)
    by_place = lambda rule: torch.tensor([[[rule(who, t, s) for s in T] for t in T] for who in owner.tolist()])
    for r in range(2):
        likely = {
            "a position sees later ones of its own conversation: the mask is causal as well": lambda who, t, s: who[t] == who[s],
            "this is the causal mask: strangers see each other": lambda who, t, s: s <= t,
            "a position may not see itself here": lambda who, t, s: who[t] == who[s] and s < t,
            "each position sees the strangers, and not its own": lambda who, t, s: who[t] != who[s] and s <= t,
            "a position sees later ones, not earlier ones": lambda who, t, s: who[t] == who[s] and s >= t,
            "the padding sees nothing, and its softmax would be empty: let it see itself": lambda who, t, s: who[t] == who[s] > 0 and s <= t,
        }  # fmt: skip
        equal(got[r, 0], by_place(lambda who, t, s: who[t] == who[s] and s <= t)[r], f"{given}: row {r}", "this is not the mask of this row",
              {words: by_place(rule)[r] for words, rule in likely.items()})  # fmt: skip


@exercise("Replay", keeps=["Replay"])
def check_replay(Replay):
    def plain(chats, texts, share, steps):
        order, done, read = [], 0, 0
        for step in range(steps):
            if math.floor((step + 1) * share) > read:
                order.append(texts[read])
                read += 1
            else:
                order.append(chats[done])
                done += 1
        return order

    chats, texts = list("abcdefghijklmnopqrstuvwxyz"), list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    for share in (0.25, 0.0, 0.5, 0.375, 0.75):
        given, replay = f"chats a, b, c, ..., texts A, B, C, ..., share {share:g}", Replay(chats, texts, share)
        wanted = plain(chats, texts, share, 24)
        try:
            got = [replay[step] for step in range(24)]
        except IndexError:
            fail("it asks for a batch that is not there yet: the chats are numbered without the text steps, and the texts without the chats", given)
        if got != wanted:
            shift = sum(each in texts for each in got)
            words = "this is another order"
            if any(not isinstance(each, str) for each in got):
                words = "replay[step] must return one batch"
            elif shift == 0:
                words = "no text is ever read"
            elif [each in texts for each in got] == [each in chats for each in wanted]:
                words = "chats and texts are swapped: `share` is that of the texts"
            elif [each in texts for each in got] == [each in texts for each in wanted]:
                words = "the right steps read text, but some batches are left out or read twice: each source is read in its order, without gaps"
            elif [each in texts for each in got[1:]] == [each in texts for each in wanted[:-1]]:
                words = "text comes one step late: of the first n steps, floor(n * share) read text, the step itself among them"
            fail(words, f"{given}: the first 24 steps", "".join(wanted), "".join(map(str, got)))
    replay = Replay(chats, texts, 0.25)
    late = [replay[step] for step in (7, 3, 5, 3, 0)]
    if late != ["B", "A", "e", "A", "a"]:
        fail("a step must give the same whatever was asked before: keep no counter", "share 0.25, the steps 7, 3, 5, 3, 0", "BAeAa", "".join(late))
    for share in (1, 1.5, -0.1):
        try:
            Replay(chats, texts, share)
        except ValueError:
            continue
        except Exception as error:
            fail(f"a share of {share} must be a ValueError", f"share {share}", "ValueError", type(error).__name__)
        fail(f"a share of {share} must be a ValueError, and here it passes in silence", f"share {share}", "ValueError")


# -- beyond


@exercise("mean_of_means")
def check_mean_of_means(predicted_tokens, predicted_parts, predicted_weight):
    given = "10 tokens with a mean of 3, and 190 with a mean of 1"
    answers = {
        "predicted_tokens": (predicted_tokens, 1.1, {"this is the mean of the two means; a mean over tokens adds up all losses first": 2.0,
                                                     "this is the sum of the losses; divide by the number of tokens": 220,
                                                     "this is the mean of the sums; divide by 200 tokens": 110, "the parts are swapped": 2.9}),
        "predicted_parts": (predicted_parts, 2.0, {"this is the mean over all tokens": 1.1, "this is the sum of both; divide by two parts": 4.0}),
        "predicted_weight": (predicted_weight, 19.0, {"it is the other way round: the token of the small part counts more": 1 / 19,
                                                      "in the mean over tokens they count the same; this was about the mean of the means": 1.0,
                                                      "the losses do not matter here, only how many tokens share one half": 57,
                                                      "compare with a token of the large part, not with one of all 200": 10.0}),
    }  # fmt: skip
    for name, (got, wanted, mistakes) in answers.items():
        if isinstance(got, bool) or not isinstance(got, int | float):
            fail(f"{name} must be a number", given, got=got)
        if abs(got - wanted) > 1e-3 * wanted:
            words = next((w for w, value in mistakes.items() if abs(got - value) < 1e-3 * value), "work it out once more")
            fail(f"{name}: {words}", given, got=got)


@exercise("pad_batch")
def check_pad_batch(pad_batch):
    cases = [([([5, 6, 7, 8], [-100, -100, 7, 8]), ([5, 9], [-100, 9])], 2),
             ([([1, 2, 3], [-100, 2, 3]), ([4, 5, 6, 7, 8], [-100, 5, -100, 7, 8]), ([9, 1], [-100, 1])], 3)]  # fmt: skip
    for examples, pad in cases:
        given = f"examples {examples}, pad_id = {pad}"
        batch = pad_batch(examples, pad)
        if not isinstance(batch, dict) or sorted(batch) != ["input_ids", "labels"]:
            fail("it must return a dict with input_ids and labels", given, got="nothing" if batch is None else batch)
        T = max(len(ids) for ids, _ in examples) - 1
        fill = lambda rows, value, T=T: torch.tensor([row + [value] * (T - len(row)) for row in rows])
        shaped(batch["input_ids"], (len(examples), T), f"{given}: input_ids", hint="a conversation of n tokens has n - 1 places")
        shaped(batch["labels"], (len(examples), T), f"{given}: labels")
        equal(batch["input_ids"], fill([ids[:-1] for ids, _ in examples], pad), f"{given}: input_ids", "the tokens were right before")
        right, same = [labels[1:] for _, labels in examples], [labels[:-1] for _, labels in examples]
        equal(batch["labels"], fill(right, -100), f"{given}: labels", "the labels are not right yet", {
            "both bugs are still there": fill(same, pad),
            "one bug is left: each place is asked for its own token, which it has just read": fill(same, -100),
            "one bug is left: the padding is learned, and nothing is easier": fill(right, pad),
            "the labels are shifted twice": fill([[*labels[2:], -100] for _, labels in examples], -100),
            "the label 0 is a token; the padding must have -100": fill(right, 0),
        })  # fmt: skip


@exercise("neftune")
def check_neftune(neftune):
    x = torch.randn(8, 50, 32)
    before = x.clone()
    got, again = neftune(x, 5.0), neftune(x, 5.0)
    unchanged("x", before, x)
    given = "random x (8, 50, 32), alpha = 5"
    shaped(got, x.shape, given, x.dtype)
    largest = 5 / math.sqrt(50 * 32)
    noise = got - x
    if not noise.any():
        fail("no noise was added", given)
    if torch.equal(noise, again - x):
        fail("two calls add the same noise; leave the seed alone", given)
    if min((noise.select(d, 0) - noise.select(d, 1)).abs().max() for d in range(3)) < 1e-4:
        fail("some numbers share their noise: each number of x gets its own", given)
    measured = noise.abs().max().item()
    sizes = {"the noise is between 0 and the largest; it must go below zero as well": None, "alpha / sqrt(T C) is missing: the noise goes up to 1": 1,
             "divide by the root: alpha / sqrt(T C), not alpha / (T C)": 5 / (50 * 32), "the root of C alone; T counts as well": 5 / math.sqrt(32),
             "the root of T alone; C counts as well": 5 / math.sqrt(50), "alpha is not divided": 5,
             "the number of rows counts here; it must not": 5 / math.sqrt(8 * 50 * 32), "alpha is not used": 1 / math.sqrt(50 * 32),
             "the noise is half as wide: it goes from -1 to 1": largest / 2, "T and C are added; multiply them": 5 / math.sqrt(82)}  # fmt: skip
    if noise.min() > -1e-4 or noise.max() < 1e-4:
        fail(next(iter(sizes)), given, f"-{largest:.4g} to {largest:.4g}", f"{noise.min():.4g} to {noise.max():.4g}")
    if not 0.98 < measured / largest < 1.0005:
        words = next((w for w, size in sizes.items() if size and 0.98 < measured / size < 1.0005), "the largest noise must be alpha / sqrt(T C)")
        if 0.5 < noise.std() / largest < 1.1 and measured > 2 * largest:
            words = "this noise is normal; it must be uniform"
        fail(words, given, f"at most {largest:.4g}", f"{measured:.4g}")
    if not 0.97 < noise.std() * math.sqrt(3) / largest < 1.03 or noise.mean().abs() > 0.03 * largest:
        fail("the noise must be uniform, with a mean of 0", given, f"a deviation of {largest / math.sqrt(3):.4g}", f"{noise.std():.4g}")
    for shape, alpha in (((4, 200, 16), 5.0), ((2, 40, 64), 15.0), ((1, 300, 8), 0.5)):
        x = torch.zeros(shape)
        most, largest = neftune(x, alpha).abs().max().item(), alpha / math.sqrt(shape[1] * shape[2])
        if not 0.98 < most / largest < 1.0005:
            fail("right for the first case, and not here", f"x {shape}, alpha = {alpha:g}", f"at most {largest:.4g}", f"{most:.4g}")
    if not 0.98 < neftune(torch.zeros(4, 50, 32)).abs().max().item() / (5 / 40) < 1.0005:
        fail("alpha is 5 where it is not given", "neftune(x)")
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = neftune(x, 1.0)
    if not y.requires_grad:
        fail("no gradient gets through; leave detach and no_grad out", "x with requires_grad=True")
    y.sum().backward()
    equal(x.grad, torch.ones(2, 3, 4), "the gradient of the sum", "noise is added, so the gradient of x is that of the result")


@exercise("fullness", after=["pack"])
def check_fullness(predicted_padded, predicted_in_order, predicted_packed, in_order, fullness, measured):
    def next_fit(lengths, width):
        rows, room = [], 0
        for number, tokens in enumerate(lengths):
            if tokens > room:
                rows, room = [*rows, []], width
            rows[-1].append(number)
            room -= tokens
        return rows

    lengths = torch.randint(1, 257, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    for some, width in (([5, 7, 2, 3, 6, 4], 10), ([4, 6, 10, 1], 10), ([1, 9, 1], 10), (lengths[:40], 256)):
        given = f"lengths {some if len(some) < 10 else f'{some[:6]} and 34 more'}, rows of {width}"
        rows, wanted = rows_are_whole(in_order(list(some), width), some, width, given), next_fit(some, width)
        if rows == wanted:
            continue
        words = "these are not the rows of items in their order"
        if [item for row in rows for item in row] != list(range(len(some))):
            words = "the items are not in their order, or a row that was left is used again"
        elif len(rows) > len(wanted):
            words = "a new row is opened too early: the item still fits, if only just"
        fail(words, given, wanted[:6], rows[:6])
    for rows, some, width, wanted in (([[0], [1, 2]], [5, 7, 2], 10, 0.7), ([[2, 0], [1]], [1, 3, 2], 4, 0.75), ([[0]], [8], 8, 1.0)):
        given, got = f"fullness({rows}, {some}, {width})", fullness(rows, some, width)
        if isinstance(got, bool) or not isinstance(got, int | float):
            fail("return one number", given, wanted, "nothing" if got is None else repr(got))
        if abs(got - wanted) > 1e-6:
            items = sum(len(row) for row in rows)
            words = {round(items / (len(rows) * width), 6): "the items are counted; add up their lengths",
                     round(wanted * len(rows), 6): "divide by all places: rows times width",
                     round(1 - wanted, 6): "this is the share that is empty",
                     round(wanted * width, 6): "divide by all places: rows times width",
                     round(wanted * len(rows) / items, 6): "divide by the places of the rows, not of as many rows as there are items",
                     round(100 * wanted, 6): "a share, not percent"}.get(round(got, 6), "another share of the places holds a token")  # fmt: skip
            fail(words, given, wanted, got)
    used = sum(lengths) / 256
    right = {"padded": used / 1000, "in order": used / len(next_fit(lengths, 256)), "packed": used / len(best_fit(lengths, 256))}
    if not isinstance(measured, dict) or set(measured) != set(right):
        fail('`measured` is {"padded": ..., "in order": ..., "packed": ...}', got=measured)
    for name, wanted in right.items():
        if not isinstance(measured[name], int | float) or abs(measured[name] - wanted) > 1e-6:
            words = f"measured[{name!r}] must be what your function gives for `lengths` and rows of 256"
            fail(words, "the 1,000 lengths", f"{wanted:.4f}", measured[name])
    predicted = {"padded": predicted_padded, "in order": predicted_in_order, "packed": predicted_packed}
    for name, got in predicted.items():
        if isinstance(got, bool) or not isinstance(got, int | float):
            fail(f"predicted_{name.replace(' ', '_')} must be a number", got=got)
        if abs(got - right[name]) > 0.05:
            words = "your measurement disagrees with it; look at it, think why, and correct the prediction"
            if 0.05 >= abs(got / 100 - right[name]):
                words = "a share, not percent"
            fail(f"predicted_{name.replace(' ', '_')}: {words}", got=got)
