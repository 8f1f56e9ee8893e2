"""Choosing tokens, the cache, batches, streaming: against by-hand cases, properties, and Hugging Face's generate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minimind.generate import (
    KVCache,
    generate,
    generate_batch,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    left_pad,
    next_tokens,
    penalise_repetition,
    sample_next,
    stream,
)
from minimind.model import MiniMind, ModelConfig
from minimind.tokenizer import Tokenizer

SIZES = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             intermediate_size=64, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MiniMind(ModelConfig.preset("tiny", **SIZES)).eval()


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["Zoë sees 猫 and 🦊.", "one two three four five"] * 3, 320)


def prompt(n, seed=0):
    return torch.randint(40, 320, (1, n), generator=torch.Generator().manual_seed(seed))


class Scripted(nn.Module):
    """Says the given tokens one after the other, whatever it reads."""

    def __init__(self, tokens, vocab_size=320):
        super().__init__()
        self.tokens, self.vocab_size, self.weight = list(tokens), vocab_size, nn.Parameter(torch.zeros(1))
        self.config = ModelConfig.preset("tiny", **SIZES)

    def forward(self, ids, attention_mask=None, position_ids=None, kv_cache=None):
        logits = torch.zeros(*ids.shape, self.vocab_size)
        logits[:, -1, self.tokens.pop(0) if self.tokens else 0] = 1
        return logits


# -- choosing


def test_temperature_zero_is_the_best_token_and_high_temperature_is_not():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample_next(logits).tolist() == [1]
    draws = sample_next(logits.expand(500, -1), temperature=5.0, generator=torch.Generator().manual_seed(0))
    assert set(draws.tolist()) == {0, 1, 2}


def test_a_seed_repeats_a_draw_and_another_seed_does_not(model):
    run = lambda seed: generate(model, prompt(5), 20, temperature=2.0, seed=seed).tolist()
    assert run(1) == run(1) != run(2)


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40), st.floats(0.05, 1.0))
@settings(max_examples=60, deadline=None)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(values, p):
    logits = torch.tensor([values])
    kept = keep_top_p(logits, p).isfinite()[0]
    probabilities = logits.softmax(-1)[0]
    assert kept[probabilities.argmax()]
    assert probabilities[kept].sum() >= p - 1e-5
    if kept.sum() > 1:  # without its least probable token the set would be too small
        assert probabilities[kept].sum() - probabilities[kept].min() < p + 1e-5


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40), st.integers(1, 50), st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_top_k_and_min_p_never_drop_the_best(values, k, p):
    logits = torch.tensor([values])
    for cut in (keep_top_k(logits, k), keep_min_p(logits, p)):
        assert cut.isfinite()[0, logits.argmax()]
    assert keep_top_k(logits, k).isfinite().sum() >= min(k, len(values))


def test_equal_to_the_processors_of_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(3)) * 3
    seen = torch.randint(0, 200, (4, 30), generator=torch.Generator().manual_seed(4))
    pairs = [
        (keep_top_k(logits, 7), processors.TopKLogitsWarper(7)),
        (keep_top_p(logits, 0.8), processors.TopPLogitsWarper(0.8)),
        (keep_min_p(logits, 0.1), processors.MinPLogitsWarper(0.1)),
        (penalise_repetition(logits, seen, 1.4), processors.RepetitionPenaltyLogitsProcessor(1.4)),
    ]
    for ours, processor in pairs:
        torch.testing.assert_close(ours, processor(seen, logits.clone()))


def test_repetition_penalty_lowers_positive_and_negative_logits():
    logits = torch.tensor([[2.0, -2.0, 0.5]])
    after = penalise_repetition(logits, torch.tensor([[0, 1]]), 2.0)
    assert after.tolist() == [[1.0, -4.0, 0.5]]


# -- the cache


def test_the_cache_changes_no_token(model):
    for length in (1, 7, 30):
        ids = prompt(length, seed=length)
        assert torch.equal(generate(model, ids, 30), generate(model, ids, 30, use_cache=False))


def test_a_wrong_cache_does_change_tokens(model, monkeypatch):
    """The comparison above can fail: a cache that forgets its first position gives other tokens."""
    whole = generate(model, prompt(7), 30)
    update = KVCache.update

    def forgetful(self, k, v, layer_idx):
        k, v = update(self, k, v, layer_idx)
        return (k[:, :, 1:], v[:, :, 1:]) if k.shape[2] > 7 else (k, v)

    monkeypatch.setattr(KVCache, "update", forgetful)
    assert not torch.equal(whole, generate(model, prompt(7), 30))


def test_the_cache_never_moves_and_says_when_it_is_full(model):
    cache = KVCache(model.config, 1, 4)
    places = [t.data_ptr() for t in cache.keys + cache.values]
    one = torch.randn(1, 2, 1, 8)
    for position in range(4):
        for layer in range(2):
            k, _ = cache.update(one, one, layer)
        assert k.shape[2] == cache.length == position + 1
        assert k.data_ptr() == cache.keys[1].data_ptr()
    assert places == [t.data_ptr() for t in cache.keys + cache.values]
    with pytest.raises(ValueError, match="holds 4 positions and 5 are needed"):
        cache.update(one, one, 0)


def test_a_step_with_the_cache_reads_one_position(model, monkeypatch):
    widths = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, *a, **k: widths.append(ids.shape[1]) or forward(ids, *a, **k))
    generate(model, prompt(9), 5)
    assert widths == [9, 1, 1, 1, 1]


def test_greedy_equals_transformers(model, theirs):
    ids = prompt(6)
    settings = dict(max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(model, ids, 30), theirs.generate(ids, **settings))
    penalised = theirs.generate(ids, repetition_penalty=1.3, **settings)
    assert torch.equal(generate(model, ids, 30, repetition_penalty=1.3), penalised)


# -- batches


def test_unequal_prompts_give_what_each_gives_alone(model):
    prompts = [prompt(n, seed=n)[0].tolist() for n in (1, 4, 11, 11, 20)]
    for options in ({}, {"repetition_penalty": 1.5}, {"use_cache": False}):
        alone = [generate(model, torch.tensor([p]), 12, **options)[0, len(p) :].tolist() for p in prompts]
        assert generate_batch(model, prompts, 12, **options) == alone
        assert generate_batch(model, prompts, 12, batch_size=2, **options) == alone


def test_padding_without_a_mask_gives_other_tokens(model):
    prompts = [prompt(n, seed=n)[0].tolist() for n in (2, 11)]
    alone = generate(model, torch.tensor([prompts[0]]), 12)[0, 2:].tolist()
    ids, real = left_pad(prompts)
    assert generate(model, ids, 12, attention_mask=real)[0, 11:].tolist() == alone
    assert generate(model, ids, 12)[0, 11:].tolist() != alone


def test_batch_equals_transformers_with_left_padding(model, theirs):
    ids, real = left_pad([prompt(n, seed=n)[0].tolist() for n in (3, 9)])
    reference = theirs.generate(ids, attention_mask=real, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(model, ids, 15, attention_mask=real), reference)


def test_rows_stop_one_by_one(model):
    prompts = [prompt(n, seed=n)[0].tolist() for n in (3, 5, 8)]
    free = generate_batch(model, prompts, 20)
    stop = free[1][4]
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate_batch(model, prompts, 20, stop_ids=(stop,)) == cut
    assert any(len(row) < 20 for row in cut)


# -- streaming and the end


def test_characters_arrive_whole(tokenizer):
    text = "Zoë sees 猫 and 🦊."
    tokens = tokenizer.encode(text)
    pieces = list(stream(Scripted([*tokens, tokenizer.eos_id]), tokenizer, prompt(2), 60, stop_ids=(tokenizer.eos_id,), use_cache=False))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert "\ufffd" in "".join(tokenizer.decode([t]) for t in tokens)  # decoding one by one, as a naive stream does, would break it


def test_half_a_character_at_the_end_is_marked(tokenizer):
    first_byte = tokenizer.encode_bytes("猫".encode()[:1])
    assert "".join(stream(Scripted(first_byte), tokenizer, prompt(2), 1, use_cache=False)) == "\ufffd"


def test_the_stop_token_ends_the_stream_and_is_not_shown(tokenizer):
    tokens = tokenizer.encode("one two") + [tokenizer.im_end_id] + tokenizer.encode(" three")
    assert "".join(stream(Scripted(tokens), tokenizer, prompt(2), 40, stop_ids=(tokenizer.im_end_id,), use_cache=False)) == "one two"


def test_stream_equals_generate(model, tokenizer):
    ids = generate(model, prompt(4), 25)[0, 4:].tolist()
    assert "".join(stream(model, tokenizer, prompt(4), 25)) == tokenizer.decode(ids, skip_special=True)


def test_beyond_the_context_is_an_error_before_any_work(model):
    with pytest.raises(ValueError, match="60 prompt tokens and 5 new ones are 65 positions, this model has 64.*at most 4"):
        generate(model, prompt(60), 5)
    assert generate(model, prompt(60), 4).shape == (1, 64)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, torch.empty(1, 0, dtype=torch.long), 5)


def test_nothing_to_generate(model):
    assert generate(model, prompt(4), 0).shape == (1, 4)
    assert list(next_tokens(model, prompt(4), 0)) == []
