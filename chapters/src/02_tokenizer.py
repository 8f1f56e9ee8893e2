# %% [markdown]
# # 2. Tokenizer
#
# Plain first version. Reading 30 minutes; running: smoke 10 s, cpu 40 s.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="tokenizer-default-exp"
#| default_exp tokenizer

# %% id="tokenizer-imports"
#| export
import json
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

# %% id="tokenizer-special-tokens"
#| export
SPECIAL_TOKENS = (  # the names and ids of MiniMind (Gong 2024): a token's place here is its id
    "<|endoftext|> <|im_start|> <|im_end|> "
    "<|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
    "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<|audio_start|> <|audio_end|> <|audio_pad|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single> "
    "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think> "
    "<|buffer1|> <|buffer2|> <|buffer3|> <|buffer4|> <|buffer5|> <|buffer6|> <|buffer7|> <|buffer8|> <|buffer9|>"
).split()
HIDDEN_TOKENS = 21  # the first 21 never show in an answer; tool calls and thoughts (21 to 26) may

# %% id="tokenizer-pattern"
#| export
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # the endings of English: it's, they're
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a run of letters, with the space (or one sign) before it
    r"|\p{N}"  # each digit alone
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # line ends, other blanks
)

# %% id="tokenizer-byte-letters"
#| export
def byte_letters() -> dict[int, str]:
    """One printable letter for each of the 256 bytes, as GPT-2 chose them (Radford et al. 2019).

    Bytes that print as themselves keep their letter; the others get the letters from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable}
    hidden = [b for b in range(256) if b not in letters]
    return letters | {b: chr(256 + i) for i, b in enumerate(hidden)}

# %% id="tokenizer-chat-template"
#| export
TOOLS_BEFORE = (
    "# Tools\n\nYou can call the functions below. Each line between the tags describes one as JSON.\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nTo call one, write its name and arguments as JSON between tags:\n"
    '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
)

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages and messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- BEFORE }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- AFTER + '<|im_end|>\\n' }}
{%- elif messages and messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'system' and loop.first %}
    {%- elif message.role == 'user' or message.role == 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- set thought = message.reasoning_content %}
        {%- if thought is not string and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {%- if thought is string %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- set content = content.lstrip('\\n') %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n' if content or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' }}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""".replace("BEFORE", repr(TOOLS_BEFORE)).replace("AFTER", repr(TOOLS_AFTER))

# %% id="tokenizer-check-messages"
#| export
CHAT_ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages: list[dict]) -> None:
    """Raise ValueError naming the first message that the chat template cannot render."""
    if not messages:
        raise ValueError("messages is empty: give at least one {'role': ..., 'content': ...}")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in CHAT_ROLES:
            raise ValueError(f"message {i}: role {role!r} is not one of {', '.join(CHAT_ROLES)}")
        if role == "system" and i:
            raise ValueError(f"message {i}: a system message may only come first")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"message {i}: content must be text, not {type(content).__name__}")

# %% id="tokenizer-render-assistant"
#| export
Piece = tuple[str, bool]  # text, and whether the template wrote it (then it may hold special tokens)


def dump(value: object) -> str:
    """JSON as transformers writes it in a template: no escapes for letters beyond ASCII."""
    return json.dumps(value, ensure_ascii=False)


def render_assistant(message: dict) -> list[Piece]:
    """One reply: its thought if it has one, its text, its tool calls."""
    content, thought = message.get("content") or "", message.get("reasoning_content")
    if not isinstance(thought, str) and "</think>" in content:
        thought = content.split("</think>")[0].split("<think>")[-1]
        content = content.split("</think>")[-1]
    content, pieces = content.lstrip("\n"), [("<|im_start|>assistant\n", True)]
    if isinstance(thought, str):
        pieces += [("<think>\n", True), (thought.strip("\n"), False), ("\n</think>\n\n", True)]
    pieces += [(content, False)]
    for i, call in enumerate(message.get("tool_calls") or []):
        call = call.get("function") or call
        arguments = call["arguments"] if isinstance(call["arguments"], str) else dump(call["arguments"])
        pieces += [("\n" if content or i else "", True), ("<tool_call>\n", True)]
        pieces += [(f'{{"name": {dump(call["name"])}, "arguments": {arguments}}}', False), ("\n</tool_call>", True)]
    return pieces + [("<|im_end|>\n", True)]

# %% id="tokenizer-render-chat"
#| export
def render_chat(messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False) -> list[Piece]:
    """The conversation as pieces; joined, they are what CHAT_TEMPLATE gives.

    messages: dicts with role and content, an assistant's also reasoning_content and tool_calls.
    Raises ValueError for a message that cannot be rendered.
    """
    check_messages(messages)
    pieces, first = [], messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools or first is not None:
        pieces += [("<|im_start|>system\n", True), (first or "", False)]
    if tools:
        pieces += [("\n\n" if first is not None else "", True), (TOOLS_BEFORE, True)]
        pieces += [("\n" + dump(tool), False) for tool in tools] + [(TOOLS_AFTER, True)]
    if tools or first is not None:
        pieces += [("<|im_end|>\n", True)]
    for i, message in enumerate(messages):
        before, after = ("" if not 0 <= j < len(messages) else messages[j]["role"] for j in (i - 1, i + 1))
        if message["role"] == "user":
            pieces += [("<|im_start|>user\n", True), (message["content"], False), ("<|im_end|>\n", True)]
        elif message["role"] == "assistant":
            pieces += render_assistant(message)
        elif message["role"] == "tool":
            pieces += [("<|im_start|>user" if before != "tool" else "", True), ("\n<tool_response>\n", True)]
            pieces += [(message["content"], False), ("\n</tool_response>", True)]
            pieces += [("<|im_end|>\n" if after != "tool" else "", True)]
    return pieces + ([("<|im_start|>assistant\n", True)] if add_generation_prompt else [])

# %% id="tokenizer-class"
#| export
class Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019) with a chat template.

    Wraps the `tokenizers` library. A saved folder is also what transformers.AutoTokenizer reads.
    """

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: str = CHAT_TEMPLATE):
        self.backend, self.chat_template = backend, chat_template
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items()}
        self.hidden_ids = {i for i, token in added.items() if token.special}
        missing = [name for name in SPECIAL_TOKENS[:3] if name not in self.special_ids]
        if missing:
            raise ValueError(f"this tokenizer has no special token {missing[0]}: the course needs {', '.join(SPECIAL_TOKENS[:3])}")
        self.eos_id, self.im_start_id, self.im_end_id = (self.special_ids[name] for name in SPECIAL_TOKENS[:3])
        # A second copy that knows no special tokens: to it, their spelling is text like any other.
        self.plain = tokenizers.Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"added_tokens": []}))
        self._bytes = self._make_bytes()

    def _make_bytes(self) -> list[bytes]:
        tokens = [self.backend.id_to_token(i) for i in range(self.backend.get_vocab_size())]
        special, byte = set(self.special_ids), {letter: b for b, letter in byte_letters().items()}
        return [t.encode() if t in special else bytes(byte[c] for c in t) for t in tokens]

    @property
    def vocab_size(self) -> int:
        """Number of tokens V, special tokens included."""
        return len(self._bytes)

    def token_bytes(self) -> list[bytes]:
        """For each id the bytes that it stands for; a special token's are its spelling."""
        return list(self._bytes)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from texts until there are vocab_size tokens, or until no pair occurs twice."""
        least = len(SPECIAL_TOKENS) + 256
        if vocab_size < least:
            raise ValueError(f"vocab_size={vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and 256 bytes make {least}")
        backend = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, special_tokens=SPECIAL_TOKENS,
            initial_alphabet=list(byte_letters().values()), show_progress=False)
        backend.train_from_iterator(texts, trainer)
        saved = json.loads(backend.to_str())
        for token in saved["added_tokens"]:
            token["special"] = token["id"] < HIDDEN_TOKENS
        return cls(tokenizers.Tokenizer.from_str(json.dumps(saved)))

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of one text. A special token's spelling is plain text unless allow_special."""
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: list[str], allow_special: bool = False) -> list[list[int]]:
        """Ids of many texts, on all cores. Raises ValueError for text with half a surrogate pair."""
        coder = self.backend if allow_special else self.plain
        try:
            return [e.ids for e in coder.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:
            bad = next((t for t in texts if not isinstance(t, str)), None)
            if bad is not None:
                raise TypeError(f"encode takes text (str), not {type(bad).__name__}") from None
            raise ValueError("the text holds half a surrogate pair and has no UTF-8 form: decode its source with errors='replace'") from None

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: what is valid UTF-8 as text, every other byte as its own token."""
        ids = []
        for part in re.split("([\udc80-\udcff])", data.decode("utf-8", "surrogateescape")):
            lone = len(part) == 1 and 0xDC80 <= ord(part) <= 0xDCFF
            ids += [self.plain.token_to_id(byte_letters()[ord(part) - 0xDC00])] if lone else self.encode(part)
        return ids

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The bytes that the ids stand for."""
        ids = [int(i) for i in ids]
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is outside this vocabulary (0 to {self.vocab_size - 1})")
        return b"".join(self._bytes[i] for i in ids if not (skip_special and i in self.hidden_ids))

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of the ids; bytes that are no valid UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors="replace")

    def apply_chat_template(self, messages: list[dict], tools: list[dict] | None = None,
                            add_generation_prompt: bool = False, tokenize: bool = True) -> list[int] | str:
        """A conversation as ids (or as text). Only the template's own special tokens become such ids."""
        pieces = render_chat(messages, tools, add_generation_prompt)
        if not tokenize:
            return "".join(text for text, _ in pieces)
        ids, run = [], ""
        for text, ours in pieces:
            for part in re.split(r"(<[^<>]*>)", text) if ours else [text]:
                if ours and part in self.special_ids:
                    ids, run = ids + self.encode(run) + [self.special_ids[part]], ""
                else:
                    run += part
        return ids + self.encode(run)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072,
            "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
            "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Read a folder that save_pretrained (or Hugging Face) wrote."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: is {folder} a folder with a tokenizer?")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is damaged ({error}): write it again with save_pretrained") from None
        template = Path(folder) / "chat_template.jinja"
        return cls(backend, template.read_text(encoding="utf-8") if template.exists() else CHAT_TEMPLATE)

# %% id="tokenizer-run"
import gzip

texts = [json.loads(line)["text"] for line in gzip.open(chapter.read("data") / "pretrain" / "train.jsonl.gz", "rt", encoding="utf-8")]
for line in gzip.open(chapter.read("data") / "sft" / "train.jsonl.gz", "rt", encoding="utf-8"):
    texts += [message["content"] or "" for message in json.loads(line)["conversations"]]
tokenizer = Tokenizer.train(texts, chapter.size.vocab_size)
with chapter.write("tokenizer") as folder:
    tokenizer.save_pretrained(folder)
assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
