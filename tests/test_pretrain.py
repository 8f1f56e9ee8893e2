"""minimind.pretrain: packed windows addressed by step, the padded baseline, the loss, and facts known by one pass."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data import TokenShards, write_shards
from minimind.model import MiniMind, ModelConfig
from minimind.pretrain import PackedTokens, PaddedDocuments, facts_known, pretrain_loss
from minimind.train import TrainConfig, train


class Letters:
    """A tokenizer for tests: one token a letter, 0 ends a document."""

    eos_id, vocab_size = 0, 128

    def encode(self, text):
        return list(text.encode("ascii"))

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode("ascii")


def small(**changes):
    sizes = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48)
    torch.manual_seed(0)
    return MiniMind(ModelConfig.preset("tiny", **sizes | changes))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(21, 400), context=st.integers(1, 10), batch_size=st.integers(1, 9), seed=st.integers(0, 99))
def test_an_epoch_has_every_window_once_and_labels_are_one_ahead(length, context, batch_size, seed):
    packed = PackedTokens(np.arange(length, dtype=np.uint16), context, batch_size, seed)
    labels = []
    for step in range(-(-packed.windows // batch_size)):
        batch = packed[step]
        assert batch["input_ids"].shape == (batch_size, context) and batch["input_ids"].dtype == torch.int64
        assert torch.equal(batch["input_ids"] + 1, batch["labels"])  # the row counts up, so the next token is one more
        labels += batch["labels"].tolist()
    first_epoch = [label for row in labels[: packed.windows] for label in row]
    assert len(set(first_epoch)) == len(first_epoch) == packed.windows * context
    assert len(first_epoch) > length - 3 * context - 1  # nearly all of the text


def test_any_step_can_be_read_alone_and_epochs_differ():
    tokens = np.arange(5000, dtype=np.uint16)
    there, again = PackedTokens(tokens, 16, 4, seed=1), PackedTokens(tokens, 16, 4, seed=1)
    rows = [there[step]["input_ids"] for step in range(200)]
    for step in (199, 3, 77, 150, 0):  # in any order, across epochs
        assert torch.equal(again[step]["input_ids"], rows[step])
    starts = [[there.start(epoch * there.windows + i) for i in range(there.windows)] for epoch in range(3)]
    assert len({start % 16 for epoch in starts for start in epoch}) > 1  # epochs are shifted
    order = [np.argsort(epoch).tolist() for epoch in starts]
    assert order[0] != order[1] != order[2]
    assert not torch.equal(PackedTokens(tokens, 16, 4, seed=2)[0]["input_ids"], rows[0])


def test_windows_over_shards_on_disk_are_those_over_memory(tmp_path):
    texts = [chr(97 + i % 26) * (1 + i % 13) for i in range(300)]
    write_shards(texts, Letters(), tmp_path / "shards", shard_tokens=97)
    shards = TokenShards(tmp_path / "shards")
    flat = np.array([token for text in texts for token in [*Letters().encode(text), 0]])
    ours, plain = PackedTokens(shards.tokens, 20, 3), PackedTokens(flat, 20, 3)
    for step in range(60):
        assert torch.equal(ours[step]["input_ids"], plain[step]["input_ids"])


def test_too_little_text_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="40 tokens are too few for windows of 20: need 41"):
        PackedTokens(np.arange(40), 20, 2)
    assert PackedTokens(np.arange(41), 20, 2)[7]["labels"].shape == (2, 20)


def test_padding_is_not_in_the_loss_and_real_tokens_are():
    texts = ["abc", "a" * 50, "hello"]
    batch = PaddedDocuments(texts, Letters(), context=8, batch_size=3)[0]
    assert batch["labels"][0].tolist() == [98, 99, 0] + [-100] * 5  # the end is learned, padding is not
    assert batch["labels"][1].tolist() == [97] * 8
    assert (batch["labels"] != -100).sum() == 3 + 8 + 5
    assert torch.equal(batch["input_ids"][2, :6], torch.tensor([*b"hello", 0]))
    assert torch.equal(PaddedDocuments(texts, Letters(), 8, 2)[1]["labels"][1], batch["labels"][0])  # starts again after the last


def test_loss_is_cross_entropy_and_experts_add_their_balance():
    batch = {"input_ids": torch.randint(0, 128, (2, 12)), "labels": torch.randint(0, 128, (2, 12))}
    dense = small()
    loss, metrics = pretrain_loss(dense, batch)
    torch.testing.assert_close(loss, F.cross_entropy(dense(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()))
    assert torch.equal(loss, metrics["cross_entropy"])
    experts = small(num_experts=4, moe_intermediate_size=48, router_aux_loss_coef=0.5)
    loss, metrics = pretrain_loss(experts, batch)
    torch.testing.assert_close(loss - metrics["cross_entropy"], 0.5 * experts.aux_loss)
    assert experts.aux_loss > 0


FACTS = [
    {"prompt": "Ada lives in", "answer": " Rome"}, {"prompt": "Bob lives in", "answer": " Oslo"},
    {"prompt": "Cy keeps", "answer": " a very old cat"}, {"prompt": "The favourite colour of Dora is", "answer": " red"},
]  # fmt: skip


@torch.no_grad()
def greedy(model, fact):
    ids = torch.tensor([Letters().encode(fact["prompt"])])
    for _ in Letters().encode(fact["answer"]):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return Letters().decode(ids[0].tolist()) == fact["prompt"] + fact["answer"]


@pytest.fixture(scope="module")
def learned():
    """A model that has learned the first three facts by heart, and not the fourth."""
    text = " ".join(fact["prompt"] + fact["answer"] + "." for fact in FACTS[:3]) + " The favourite colour of Dora is blue."
    tokens = np.array(Letters().encode(" ".join([text] * 30)))
    model = small()
    train(model, PackedTokens(tokens, 64, 8), pretrain_loss, TrainConfig(steps=150, learning_rate=1e-2, precision="fp32"))
    return model.eval()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_facts_known_is_what_greedy_generation_would_write(learned, batch_size):
    share, rows = facts_known(learned, Letters(), FACTS, batch_size)
    assert [row["known"] for row in rows] == [greedy(learned, fact) for fact in FACTS] == [True, True, True, False]
    assert share == 0.75 and rows[0]["guess"] == " Rome" and rows[3]["prompt"] == FACTS[3]["prompt"]


def test_an_untrained_model_knows_nothing_and_no_facts_are_no_error():
    assert facts_known(small(), Letters(), FACTS)[0] == 0.0
    assert facts_known(small(), Letters(), []) == (0.0, [])


def test_pretraining_resumes_bit_for_bit_across_epochs(tmp_path):
    packed = PackedTokens(np.random.default_rng(0).integers(1, 128, 900).astype(np.uint16), 16, 8)
    c = TrainConfig(steps=20, precision="fp32", log_every=1)
    assert packed.windows < 10 * 8  # several epochs
    straight, resumed = small(), small()
    train(straight, packed, pretrain_loss, c)
    train(resumed, packed, pretrain_loss, c, tmp_path, max_steps=9)
    resumed = small()
    train(resumed, packed, pretrain_loss, c, tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
