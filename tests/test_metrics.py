"""minimind.metrics: loss, perplexity and bits per byte, against sums by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.metrics import bits_per_byte, cross_entropy, evaluate_bits_per_byte, perplexity, token_byte_lengths
from minimind.tokenizer import Tokenizer

V = 11


def test_cross_entropy_is_the_mean_surprise():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, V, dtype=torch.float64), torch.randint(V, (2, 5))
    labels[0, 3] = labels[1, 0] = -100
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    by_hand = [-math.log(p[b, t, labels[b, t]]) for b in range(2) for t in range(5) if labels[b, t] != -100]
    assert cross_entropy(logits, labels).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_an_untrained_model_costs_ln_v():
    assert cross_entropy(torch.zeros(3, 4, V), torch.randint(V, (3, 4))).item() == pytest.approx(math.log(V))
    assert perplexity(math.log(V)) == pytest.approx(V)


def test_large_logits_of_low_precision_do_not_overflow():
    logits = torch.zeros(1, 1, V, dtype=torch.float16)
    logits[0, 0, 0] = 60000
    assert cross_entropy(logits, torch.tensor([[0]])).item() == 0
    assert cross_entropy(logits, torch.tensor([[1]])).item() == pytest.approx(60000, rel=1e-3)


def test_gradient_is_prediction_minus_label():
    logits = torch.randn(1, 3, V, requires_grad=True)
    labels = torch.tensor([[1, 2, 3]])
    cross_entropy(logits, labels).backward()
    expected = (logits.detach().softmax(-1) - torch.nn.functional.one_hot(labels, V)) / 3
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"logits \(1, 4, 11\) need labels \(1, 4\), not \(1, 3\)"):
        cross_entropy(torch.zeros(1, 4, V), torch.zeros(1, 3, dtype=torch.long))


def test_bits_per_byte_of_a_fair_coin():
    assert bits_per_byte(8 * math.log(2), 1) == pytest.approx(8)
    with pytest.raises(ValueError, match="num_bytes=0"):
        bits_per_byte(1.0, 0)


class Table(torch.nn.Module):
    """A bigram with random logits and dropout, to see eval mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.logits = torch.nn.Parameter(torch.randn(V, V))
        self.drop = torch.nn.Dropout(0.5)
        self.modes, self.shapes = [], []

    def forward(self, ids):
        self.modes.append(self.training)
        self.shapes.append(tuple(ids.shape))
        return self.drop(self.logits)[ids]


LENGTHS = torch.arange(V) % 3 + (torch.arange(V) == 1)


def by_hand(tokens: torch.Tensor) -> float:
    log_p = Table().logits.detach().log_softmax(-1)
    nats = -sum(log_p[a, b].item() for a, b in zip(tokens[:-1], tokens[1:], strict=True))
    return nats / math.log(2) / LENGTHS[tokens[1:]].sum().item()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 90), st.integers(1, 40), st.integers(1, 9))
def test_each_token_is_predicted_once_whatever_the_windows(length, context, batch_size):
    tokens = torch.randint(1, V, (length,), generator=torch.Generator().manual_seed(length))
    tokens[-1] = 1  # has bytes
    found = evaluate_bits_per_byte(Table(), tokens, LENGTHS, context, batch_size)
    assert found == pytest.approx(by_hand(tokens), rel=1e-4)


def test_windows_never_exceed_the_context_and_the_mode_is_restored():
    model, tokens = Table(), torch.randint(V, (100,))
    model.train()
    evaluate_bits_per_byte(model, tokens, LENGTHS, context=16, batch_size=4)
    assert model.training and not any(model.modes)
    assert all(b <= 4 and t <= 16 for b, t in model.shapes) and sum(b * t for b, t in model.shapes) == 99
    assert model.logits.grad is None


def test_the_mode_is_restored_after_an_error():
    model = Table()
    with pytest.raises(IndexError):
        evaluate_bits_per_byte(model.train(), torch.tensor([1, 2, V + 3, 1]), LENGTHS)
    assert model.training


def test_functions_arrays_and_autocast():
    tokens = np.array([1, 2, 3, 4, 1], dtype=np.uint16)
    uniform = lambda ids: torch.zeros(*ids.shape, V)  # noqa: E731
    expected = 4 * math.log2(V) / LENGTHS[[2, 3, 4, 1]].sum().item()
    assert evaluate_bits_per_byte(uniform, tokens, LENGTHS) == pytest.approx(expected, rel=1e-5)
    linear = torch.nn.Sequential(torch.nn.Embedding(V, 16), torch.nn.Linear(16, V))
    full = evaluate_bits_per_byte(linear, tokens, LENGTHS)
    assert evaluate_bits_per_byte(linear, tokens, LENGTHS, amp=torch.bfloat16) == pytest.approx(full, rel=0.02)


def test_too_short_a_stream_is_refused():
    with pytest.raises(ValueError, match="1 tokens: at least two"):
        evaluate_bits_per_byte(lambda ids: torch.zeros(*ids.shape, V), torch.tensor([1]), LENGTHS)


def test_byte_lengths_add_up_to_the_text():
    tokenizer = Tokenizer.train(["naïve cats eat. 你好"] * 20, 400)
    lengths = token_byte_lengths(tokenizer)
    text = "naïve dogs <|im_end|> 你们好 123\n"
    assert lengths.shape == (tokenizer.vocab_size,) and lengths[:36].sum() == 0
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[[*tokenizer.encode(text), tokenizer.eos_id]].sum() == len(text.encode())


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    """The same knowledge (each byte independent and uniform) told in two vocabularies costs the same."""
    text = "low lower lowest " * 20
    for size in (292, 330):
        tokenizer = Tokenizer.train([text], size)
        lengths = token_byte_lengths(tokenizer)
        ids = torch.tensor(tokenizer.encode(text))
        nats = lengths[ids].sum().item() * math.log(256)  # a token of n bytes has p = 256^-n
        assert bits_per_byte(nats, len(text)) == pytest.approx(8)
