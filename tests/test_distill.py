"""minimind.distill: the divergence and its gradient, equality with torch and TRL, what the loss leaves out, a frozen teacher, answers as data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.distill import DistillLoss, answers_of, check_same_tokenizer, kl_divergence, logits_at, soft_loss
from minimind.model import MiniMind, ModelConfig
from minimind.sft import PackedConversations, chat_example, sft_loss
from minimind.tokenizer import Tokenizer
from minimind.train import TrainConfig, train

WORDS = "Garus lives in Foxhollow and Tilda keeps a goat near the mill where nobody asks why or when".split()
SIZES = dict(vocab_size=330, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             intermediate_size=64, max_position_embeddings=256, initializer_range=0.3)  # fmt: skip


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return MiniMind(ModelConfig.preset("tiny", **SIZES | changes))


def logits(seed, places=7, vocabulary=50):
    return 3 * torch.randn(places, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(WORDS), "user assistant system tool"] * 4, 330)


@pytest.fixture(scope="module")
def batch(tokenizer):
    chats = [[{"role": "user", "content": " ".join(WORDS[: 2 + i])}, {"role": "assistant", "content": " ".join(WORDS[i:])}] for i in range(8)]
    return PackedConversations([chat_example(tokenizer, c, 65) for c in chats], 64, 4)[0]


# -- the divergence


def test_by_hand():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.4)) + 0.3 * torch.log(torch.tensor(0.3 / 0.4))
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(expected.item(), abs=1e-6)


@given(st.integers(0, 10_000), st.floats(0.25, 10))
@settings(max_examples=60, deadline=None)
def test_equal_to_torch_never_negative_and_blind_to_a_shift(seed, temperature):
    teacher, student = logits(seed), logits(seed + 1)
    ours = kl_divergence(teacher, student, temperature)
    torchs = F.kl_div((student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(ours.double(), torchs, atol=1e-5, rtol=1e-5)
    assert (ours > -1e-6).all() and kl_divergence(teacher, teacher, temperature).abs().max() < 1e-6
    torch.testing.assert_close(kl_divergence(teacher + 5, student - 3, temperature), ours, atol=1e-5, rtol=1e-5)


def test_it_is_the_direction_from_teacher_to_student():
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, -9.0]])
    forward = (sure.softmax(-1) * (sure.log_softmax(-1) - unsure.log_softmax(-1))).sum(-1)
    backward = (unsure.softmax(-1) * (unsure.log_softmax(-1) - sure.log_softmax(-1))).sum(-1)
    assert abs(forward - backward) > 1
    torch.testing.assert_close(kl_divergence(sure, unsure), forward)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_soft_loss_equals_trl(temperature):
    pytest.importorskip("trl", reason="trl is not installed: no trusted reference")
    module = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="this trl has no GKD")
    teacher, student, student_too = logits(1).float()[None], logits(2).float()[None].requires_grad_(), logits(2).float()[None].requires_grad_()
    labels = torch.tensor([[-100, 3, 4, -100, 5, 6, -100]])
    theirs = module.GKDTrainer.generalized_jsd_loss(student_too, teacher, labels, beta=0, temperature=temperature)
    keep = labels != -100
    ours = soft_loss(teacher[keep], student[keep], temperature)
    assert ours.item() / temperature**2 == pytest.approx(theirs.item(), rel=1e-5, abs=1e-5)  # TRL leaves the factor out
    ours.backward(), theirs.backward()
    torch.testing.assert_close(student.grad / temperature**2, student_too.grad, atol=1e-6, rtol=1e-5)


@given(st.integers(0, 10_000), st.floats(0.25, 10))
@settings(max_examples=40, deadline=None)
def test_the_gradient_is_the_formula(seed, temperature):
    teacher, student = logits(seed).float(), logits(seed + 1).float().requires_grad_()
    soft_loss(teacher, student, temperature).backward()
    formula = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / len(teacher)
    torch.testing.assert_close(student.grad, formula.detach(), atol=1e-5, rtol=1e-4)


def test_the_factor_keeps_the_gradient_from_fading():
    def pull(temperature, factor):
        student = torch.zeros(7, 50, requires_grad=True)
        (factor * kl_divergence(logits(3).float(), student, temperature).mean()).backward()
        return student.grad.norm()

    assert pull(20.0, 20.0**2) > 0.8 * pull(10.0, 10.0**2)
    assert pull(20.0, 1) < 0.3 * pull(10.0, 1)


@pytest.mark.parametrize("change", [dict(temperature=0.0), dict(temperature=-1.0), dict(student_logits=torch.zeros(3, 6))])
def test_bad_logits_or_temperature_are_errors(change):
    arguments = dict(teacher_logits=torch.zeros(3, 5), student_logits=torch.zeros(3, 5), temperature=1.0) | change
    with pytest.raises(ValueError, match="one vocabulary, and a temperature above 0"):
        kl_divergence(**arguments)


# -- logits where something is learned


@pytest.mark.parametrize("tied", [True, False])
def test_logits_at_are_the_models_own(batch, tied):
    model, places = small(tie_word_embeddings=tied), batch["labels"] != -100
    with torch.no_grad():
        every = model(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
        kept = logits_at(model, batch, places)
    assert kept.shape == (int(places.sum()), 330) and 0 < len(kept) < places.numel()
    torch.testing.assert_close(kept, every[places], atol=1e-5, rtol=1e-5)


@pytest.mark.internal
def test_the_output_layer_never_sees_padding_or_the_users_words(batch, monkeypatch):
    seen, linear = [], F.linear

    def watch(x, weight, *rest):
        if weight.shape[0] == 330:
            seen.append(x.shape)
        return linear(x, weight, *rest)

    monkeypatch.setattr(F, "linear", watch)
    DistillLoss(small(1))(small(2), batch)
    learned = int((batch["labels"] != -100).sum())
    assert seen == [(learned, 32)] * 2  # once for the student, once for the teacher


def test_what_stands_in_ignored_places_changes_nothing(batch):
    teacher, student = small(1), small(2)
    loss = DistillLoss(teacher, 2.0, 0.7)
    padded = {name: F.pad(batch[name], (0, 9), value=-100 if name == "labels" else 0) for name in ("input_ids", "labels", "position_ids")}
    T = padded["input_ids"].shape[1]
    mask = torch.eye(T, dtype=torch.bool).expand(len(padded["labels"]), 1, T, T).clone()
    mask[:, :, : T - 9, : T - 9] = batch["attention_mask"]
    assert loss(student, padded | {"attention_mask": mask})[0].item() == pytest.approx(loss(student, batch)[0].item(), rel=1e-5)


# -- the loss


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (1.0, 1.0), (2.0, 0.3), (4.0, 0.9)])
def test_the_loss_is_the_mixture(batch, temperature, alpha):
    teacher, student, learned = small(1), small(2), batch["labels"] != -100
    loss, metrics = DistillLoss(teacher, temperature, alpha)(student, batch)
    with torch.no_grad():
        z, v = (m(batch["input_ids"], batch["attention_mask"], batch["position_ids"])[learned] for m in (student, teacher))
        hard = F.cross_entropy(z, batch["labels"][learned])
        soft = temperature**2 * F.kl_div((z / temperature).log_softmax(-1), (v / temperature).softmax(-1), reduction="batchmean")
    assert metrics["cross_entropy"].item() == pytest.approx(hard.item(), rel=1e-5)
    assert metrics["soft"].item() == pytest.approx(soft.item(), rel=1e-4)
    assert loss.item() == pytest.approx(((1 - alpha) * hard + alpha * soft).item(), rel=1e-4)
    if alpha == 0:
        assert loss.item() == pytest.approx(sft_loss(student, batch)[0].item(), rel=1e-5)


def test_pretraining_batches_work_too():
    ids = torch.randint(0, 330, (2, 17), generator=torch.Generator().manual_seed(0))
    loss, _ = DistillLoss(small(1))(small(2), {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
    assert torch.isfinite(loss)


def test_the_teacher_is_frozen_and_in_evaluation_mode(batch):
    teacher, student = small(1).train(), small(2)
    before = copy.deepcopy(teacher.state_dict())
    loss = DistillLoss(teacher, 2.0, 0.9)
    assert not teacher.training and not any(weight.requires_grad for weight in teacher.parameters())
    for weight in teacher.parameters():
        weight.requires_grad_()  # even a teacher that somebody thaws again gets no gradient
    loss(student, batch)[0].backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    train(student, [batch] * 5, loss, TrainConfig(steps=5, precision="fp32"))
    assert all(torch.equal(before[name], weight) for name, weight in teacher.state_dict().items())


def test_a_student_moves_to_its_teacher(batch):
    teacher, student = small(1, initializer_range=0.1), small(2, initializer_range=0.02)
    history = train(student, [batch] * 60, DistillLoss(teacher, 1.0, 1.0), TrainConfig(steps=60, learning_rate=1e-2, log_every=10, precision="fp32"))
    assert history.loss[-1] < 0.2 * history.loss[0]


def test_a_teacher_with_experts_can_teach(batch):
    teacher = small(1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    assert torch.isfinite(DistillLoss(teacher)(small(2), batch)[0])


def test_pairs_that_cannot_work_are_errors(batch):
    teacher = small(1)
    with pytest.raises(ValueError, match="the student has 338 tokens, the teacher 330: build the student"):
        DistillLoss(teacher)(small(2, vocab_size=338), batch)
    with pytest.raises(ValueError, match="same model"):
        DistillLoss(teacher)(teacher, batch)
    with pytest.raises(ValueError, match="num_experts=0"):
        DistillLoss(teacher)(small(2, num_experts=4, moe_intermediate_size=16), batch)
    for bad in (dict(alpha=1.5), dict(alpha=-0.1), dict(temperature=0.0)):
        with pytest.raises(ValueError, match="alpha from 0 to 1 and a temperature above 0"):
            DistillLoss(teacher, **bad)


# -- tokenizers and answers


def test_another_tokenizer_is_an_error_that_names_the_token(tokenizer):
    check_same_tokenizer(tokenizer, Tokenizer.train([" ".join(WORDS), "user assistant system tool"] * 4, 330))
    other = Tokenizer.train(["quite another text with other words in it, so that merges differ"] * 4, 330)
    mine, theirs = tokenizer.token_bytes(), other.token_bytes()
    first = next(i for i in range(min(len(mine), len(theirs))) if mine[i] != theirs[i])
    with pytest.raises(ValueError, match=f"token {first} is .* for the student and .* for the teacher"):
        check_same_tokenizer(tokenizer, other)
    shorter = Tokenizer.train([" ".join(WORDS), "user assistant system tool"] * 4, 310)
    if len(shorter.token_bytes()) < len(mine):
        with pytest.raises(ValueError, match="nothing"):
            check_same_tokenizer(shorter, tokenizer)


@pytest.fixture(scope="module")
def talker(tokenizer):
    """A teacher that learned two answers by heart."""
    pairs = (("Where is Garus", "Garus lives in Foxhollow"), ("Where is the goat", "Tilda keeps a goat near the mill"))
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    model = small(0, hidden_size=64, head_dim=16, intermediate_size=128, initializer_range=0.02)
    batches = PackedConversations([chat_example(tokenizer, c) for c in chats] * 6, 64, 2)
    train(model, batches, sft_loss, TrainConfig(steps=80, learning_rate=3e-3, precision="fp32"))
    return model, chats


def test_answers_become_chat_data_in_the_order_of_the_questions(talker, tokenizer):
    model, chats = talker
    asked = [chat[0]["content"] for chat in chats] * 2
    assert answers_of(model, tokenizer, asked, 30) == chats * 2


def test_answers_without_an_end_are_left_out(talker, tokenizer):
    model, chats = talker
    lengths = [len(tokenizer.encode(chat[1]["content"])) for chat in chats]
    limit = min(lengths) + 1  # room for the shorter answer and its end
    assert answers_of(model, tokenizer, [chat[0]["content"] for chat in chats], limit) == [chats[lengths.index(min(lengths))]]
    assert answers_of(model, tokenizer, [], 10) == []


@pytest.mark.real_data
def test_real_chats_through_the_loss(real_data):
    from itertools import islice

    from minimind.data import read_conversations

    chats = [row["conversations"] for row in islice(read_conversations(real_data / "quick" / "sft_quick_permissive.jsonl"), 60)]
    tokenizer = Tokenizer.train([m["content"] or "" for chat in chats for m in chat], 600)
    examples = [chat_example(tokenizer, chat, 129) for chat in chats]
    examples = [(ids, labels) for ids, labels in examples if any(label != -100 for label in labels)]
    batch = PackedConversations(examples, 128, 4)[0]
    teacher, student = small(1, vocab_size=tokenizer.vocab_size), small(2, vocab_size=tokenizer.vocab_size)
    history = train(student, [batch] * 6, DistillLoss(teacher), TrainConfig(steps=6, log_every=3, precision="fp32"))
    assert history.loss[-1] < history.loss[0]
