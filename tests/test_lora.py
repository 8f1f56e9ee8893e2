"""Adapters: the layer, targets, merging, files; against autograd, by-hand cases and PEFT."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from minimind.lora import (
    LoRAConfig,
    LoRALinear,
    adapter_weights,
    adapters,
    add_lora,
    find_targets,
    linear_names,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    trained_parameters,
)
from minimind.model import MiniMind, ModelConfig

SIZES = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             intermediate_size=64, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
ATTENTION, FEED_FORWARD = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(40).view(2, 20) * 7 % 320


def fresh(**changes):
    torch.manual_seed(0)
    return MiniMind(ModelConfig.preset("tiny", **SIZES | changes)).eval()


def shaken(model):
    """Random numbers in both matrices of every adapter, as if it were trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter_weights(model).values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def adapted(targets=None, r=3, alpha=12.0, **changes):
    return shaken(add_lora(fresh(**changes), LoRAConfig(r, alpha, targets or ATTENTION + FEED_FORWARD)))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS)


# -- one layer


def test_a_layer_by_hand():
    base = nn.Linear(2, 3, bias=True)
    layer = LoRALinear(base, rank=1, alpha=4.0)
    x = torch.tensor([[3.0, 1.0]])
    assert torch.equal(layer(x), base(x)), "B starts at zero"
    with torch.no_grad():
        layer.lora_A.weight.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.weight.copy_(torch.tensor([[2.0], [0.0], [1.0]]))
    torch.testing.assert_close(layer(x) - base(x), torch.tensor([[16.0, 0.0, 8.0]]))  # alpha / r * B (A x), A x = 2
    torch.testing.assert_close(layer.change(), torch.tensor([[8.0, -8.0], [0.0, 0.0], [4.0, -4.0]]))


def test_gradients_are_those_of_a_weight_that_was_changed():
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5, bias=False), torch.randn(4, 6)
    layer = LoRALinear(base.requires_grad_(False), rank=2, alpha=3.0)
    nn.init.normal_(layer.lora_B.weight)
    A, B = (weight.detach().clone().requires_grad_(True) for weight in (layer.lora_A.weight, layer.lora_B.weight))
    (x @ (base.weight + 1.5 * B @ A).T).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.weight.grad, A.grad)
    torch.testing.assert_close(layer.lora_B.weight.grad, B.grad)
    assert base.weight.grad is None


def test_it_starts_like_peft():
    peft = pytest.importorskip("peft")
    module = nn.Sequential(nn.Linear(400, 300, bias=False))
    theirs = dict(peft.get_peft_model(module, peft.LoraConfig(r=8, target_modules=["0"])).named_parameters())
    ours = LoRALinear(nn.Linear(400, 300, bias=False), 8, 8.0)
    for part in ("lora_A", "lora_B"):
        weight, own = theirs[f"base_model.model.0.{part}.default.weight"], getattr(ours, part).weight
        assert weight.shape == own.shape
        torch.testing.assert_close(weight.abs().max(), own.abs().max(), rtol=0.02, atol=0)
        torch.testing.assert_close(weight.std(), own.std(), rtol=0.05, atol=0)


def test_a_rank_below_one_is_an_error():
    with pytest.raises(ValueError, match="rank 0: an adapter has at least rank 1"):
        LoRALinear(nn.Linear(2, 2), 0, 1.0)


# -- a model


@pytest.mark.parametrize("targets", [ATTENTION, FEED_FORWARD, ["q_proj", "layers.1.mlp.up_proj"]])
def test_only_the_targets_get_adapters_and_only_adapters_train(targets):
    model, base = add_lora(fresh(), LoRAConfig(2, 4.0, targets)), fresh()
    assert torch.equal(logits(model), logits(base))
    assert list(adapters(model)) == find_targets(base, targets)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_weights(model))
    shapes = [base.get_submodule(name).weight.shape for name in adapters(model)]
    assert trained_parameters(model) == sum(2 * (out + into) for out, into in shapes)


def test_names_fit_whole_words_only():
    assert find_targets(fresh(), ["model.layers.0.self_attn.q_proj"]) == ["model.layers.0.self_attn.q_proj"]
    assert len(find_targets(fresh(), ["q_proj"])) == 2
    with pytest.raises(ValueError, match="'_proj'"):
        find_targets(fresh(), ["_proj"])


@pytest.mark.parametrize("targets", [["q_proj", "query"], ["embed_tokens"], []])
def test_a_target_that_is_not_there_is_an_error_that_lists_what_is(targets):
    model = fresh()
    with pytest.raises(ValueError, match="down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj") as error:
        add_lora(model, LoRAConfig(2, 4.0, targets))
    assert "'q_proj'" not in str(error.value)
    assert torch.equal(logits(model), logits(fresh())) and trained_parameters(model) == model.num_parameters(), "the model stays as it was"


def test_adapters_cannot_be_added_twice():
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(adapted(), LoRAConfig(1, 1.0, ["q_proj"]))


def test_training_moves_the_adapters_and_nothing_else():
    from minimind.pretrain import pretrain_loss
    from minimind.train import TrainConfig, train

    model, base = add_lora(fresh(), LoRAConfig(4, 8.0, FEED_FORWARD)), fresh()
    batch = {"input_ids": IDS, "labels": IDS.roll(-1, 1)}
    history = train(model, [batch] * 20, pretrain_loss, TrainConfig(steps=20, learning_rate=1e-2, log_every=1, precision="fp32"))
    assert history.loss[-1] < history.loss[0] - 0.1
    remove_lora(model)
    assert all(torch.equal(weight, base.state_dict()[name]) for name, weight in model.state_dict().items())


def test_experts_and_a_free_output_layer():
    model = add_lora(fresh(num_experts=2, moe_intermediate_size=32), LoRAConfig(1, 2.0, FEED_FORWARD))
    assert len(adapters(model)) == 2 * 2 * 3
    assert "lm_head" in linear_names(fresh(tie_word_embeddings=False))


def test_the_cache_gives_the_same_text():
    from minimind.generate import generate

    model = adapted()
    whole = IDS[:1, :5]
    for _ in range(8):
        with torch.no_grad():
            whole = torch.cat((whole, model(whole)[:, -1:].argmax(-1)), 1)
    assert torch.equal(generate(model, IDS[:1, :5], 8), whole)


# -- merging


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"qk_norm": False}, {"num_experts": 2, "moe_intermediate_size": 32}])
def test_merging_keeps_the_logits(changes):
    model, base = adapted(**changes), fresh(**changes)
    merged = merge_lora(copy.deepcopy(model))
    exact = lambda some: logits(copy.deepcopy(some).double())  # merged in 32 bits, compared without the rounding of every product
    torch.testing.assert_close(exact(merged), exact(model), atol=1e-5, rtol=0)
    assert (logits(merged) - logits(base)).abs().max() > 0.1, "the adapters do something"
    assert list(merged.state_dict()) == list(base.state_dict()) and trained_parameters(merged) == base.num_parameters()


def test_a_merged_model_is_a_plain_model_folder(tmp_path):
    merged = merge_lora(adapted())
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(MiniMind.from_pretrained(tmp_path)), logits(merged))


def test_what_is_off_cannot_be_merged_removed_or_saved(tmp_path):
    merged = merge_lora(adapted())
    for act in (merge_lora, remove_lora, lambda model: save_adapter(model, tmp_path / "a")):
        with pytest.raises(ValueError, match="never added, or are merged or removed already"):
            act(merged)
    assert not (tmp_path / "a").exists()


# -- files


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = adapted(["q_proj", "down_proj"])
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(fresh(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model)) and again.lora_config == model.lora_config
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"], "nothing half-written is left"


def test_saving_into_a_folder_keeps_its_other_files(tmp_path):
    fresh().save_pretrained(tmp_path / "model")
    save_adapter(adapted(), tmp_path / "model")
    assert torch.equal(logits(MiniMind.from_pretrained(tmp_path / "model")), logits(fresh()))


def reread(folder, change):
    """Change what the adapter's config holds."""
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "damaged or incomplete"),
        (lambda f: reread(f, lambda v: v.pop("r")), "damaged or incomplete.*'r'"),
        (lambda f: reread(f, lambda v: v.update(r=2)), "lora_A.weight has shape"),
        (lambda f: reread(f, lambda v: v.update(target_modules=["q_proj"])), "is unexpected"),
        (lambda f: reread(f, lambda v: v.update(target_modules=ATTENTION)), "o_proj.lora_A.weight is missing"),
        (lambda f: reread(f, lambda v: v.update(target_modules=["qkv"])), "no linear layer is called 'qkv'; the layers are down_proj"),
        (lambda f: reread(f, lambda v: v.update(target_modules="all-linear")), "pattern 'all-linear'"),
        (lambda f: reread(f, lambda v: v.update(use_rslora=True)), "use_rslora is True"),
        (lambda f: reread(f, lambda v: v.update(use_dora=True)), "use_dora is True"),
        (lambda f: reread(f, lambda v: v.update(rank_pattern={"q_proj": 4})), "rank_pattern is"),
        (lambda f: reread(f, lambda v: v.update(bias="all")), "bias is 'all'"),
        (lambda f: reread(f, lambda v: v.update(peft_type="IA3")), "peft_type is 'IA3'"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"cut"), "damaged or cut short"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_and_the_model_stays_as_it_was(tmp_path, spoil, message):
    save_adapter(adapted(["q_proj", "v_proj"]), tmp_path)
    spoil(tmp_path)
    model = fresh()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(fresh())) and trained_parameters(model) == model.num_parameters()


# -- PEFT


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    fresh().save_pretrained(folder)
    return folder


def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("targets", [ATTENTION, FEED_FORWARD, ["q_proj", "layers.1.mlp.up_proj"]])
def test_peft_reads_what_we_save(base_folder, tmp_path, targets):
    peft = pytest.importorskip("peft")
    model = adapted(targets)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        loaded = peft.PeftModel.from_pretrained(theirs(base_folder), tmp_path).eval()  # a weight that is missing would warn
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, logits(model), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(loaded.merge_and_unload()(IDS).logits, logits(merge_lora(model)), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about its own names
@pytest.mark.parametrize("targets", [ATTENTION, FEED_FORWARD])
def test_we_read_what_peft_saves(base_folder, tmp_path, targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    made = peft.get_peft_model(theirs(base_folder), peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False)).eval()
    made.save_pretrained(tmp_path)
    model = load_adapter(MiniMind.from_pretrained(base_folder), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), made(IDS).logits, atol=1e-4, rtol=1e-4)
        assert (logits(model) - logits(fresh())).abs().max() > 0.1


# -- the world and real data


def test_the_newcomers_of_the_chapter_are_in_no_text():
    from minimind.world import SAYS, VALUES, make_world

    world, other = make_world(100, 1), make_world(40, 2)
    people = list(zip(world.names[100:110], other.people))
    told = {form.format(n=name, v=p.facts[r]) for name, p in people for r in VALUES for form in SAYS[r]}
    assert not {name for name, _ in people} & {person.name for person in world.people}
    assert not any(sentence in text for text in world.documents(3000, 1) for sentence in told)


@pytest.mark.real_data
def test_an_identity_is_learned_from_real_rows(real_data):
    from pathlib import Path

    from minimind.data import read_conversations
    from minimind.sft import PackedConversations, chat_example, sft_loss
    from minimind.tokenizer import Tokenizer
    from minimind.train import TrainConfig, train

    folder = Path(__file__).resolve().parent.parent / "data" / "checkpoints" / "sft"
    tokenizer = Tokenizer.from_pretrained(folder)
    rows = [row["conversations"] for row in read_conversations(real_data / "sft" / "lora_identity_template.jsonl")]
    batches = PackedConversations([chat_example(tokenizer, row, 257) for row in rows], 256, 2)
    model = add_lora(MiniMind.from_pretrained(folder), LoRAConfig(2, 8.0, FEED_FORWARD))
    history = train(model, batches, sft_loss, TrainConfig(steps=30, learning_rate=3e-3, log_every=1, precision="fp32"))
    assert sum(history.loss[-5:]) < 0.85 * sum(history.loss[:5])  # 9.2 to 6.9: a model of the world, and words that it has never read
