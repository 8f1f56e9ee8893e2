"""minimind.model: the whole model against Hugging Face, its predictions against measurements, and its files."""

import copy
import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minimind import model as model_module
from minimind.model import (
    PRESETS,
    MiniMind,
    ModelConfig,
    RMSNorm,
    config_from_json,
    config_to_json,
    count_parameters,
    flops_per_token,
    training_memory,
)
from minimind.rope import to_half_split, to_interleaved

SMALL = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48, max_position_embeddings=64, initializer_range=0.1, rope_theta=5e4,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
FAMILIES = {
    "llama": dict(qk_norm=False),
    "qwen3": {},
    "qwen3 untied": dict(tie_word_embeddings=False),
    "qwen3_moe": EXPERTS,
    "qwen3_moe top-1 normalised": EXPERTS | dict(num_experts_per_tok=1, norm_topk_prob=True),
}
SCALINGS = {
    "plain": None,
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return MiniMind(ModelConfig(**SMALL | changes)).eval()


def some_ids(B=2, T=40, V=97):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def auto():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers").AutoModelForCausalLM


# -- equality with transformers


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_hugging_face_in_both_directions(auto, tmp_path, family, scaling):
    ours = make(**FAMILIES[family], rope_scaling=SCALINGS[scaling])
    ids = some_ids(T=100 if scaling == "dynamic" else 48)  # "dynamic" changes only beyond the trained length
    ours.save_pretrained(tmp_path / "ours")
    theirs = auto.from_pretrained(tmp_path / "ours").eval()
    assert theirs.config.model_type == family.split()[0]
    logits = theirs(ids).logits
    assert logits.std() > 0.1  # equal logits say little where all are near zero
    torch.testing.assert_close(ours(ids), logits, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    back = MiniMind.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(back(ids), logits, atol=1e-4, rtol=0)
    ours.config.router_aux_loss_coef = back.config.router_aux_loss_coef
    assert back.config == ours.config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_files_as_hugging_face(auto, tmp_path, family):
    ours = make(**FAMILIES[family])
    ours.save_pretrained(tmp_path / "ours")
    auto.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    a, b = load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert ("lm_head.weight" in a) == (not ours.config.tie_word_embeddings)


@torch.no_grad()
def test_padding_mask_equals_hugging_face(auto, tmp_path):
    ours = make(**EXPERTS)
    ours.save_pretrained(tmp_path / "m")
    theirs = auto.from_pretrained(tmp_path / "m").eval()
    ids, mask = some_ids(T=12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    logits, reference = ours(ids, mask), theirs(ids, attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(logits[mask.bool()], reference.logits[mask.bool()], atol=1e-4, rtol=0)
    ours(ids)
    reference = theirs(ids, output_router_logits=True)
    torch.testing.assert_close(ours.aux_loss, reference.aux_loss, atol=1e-5, rtol=1e-4)


def test_gradients_equal_hugging_face(auto, tmp_path):
    ours, ids = make(), some_ids()
    ours.save_pretrained(tmp_path / "m")
    theirs = auto.from_pretrained(tmp_path / "m")
    F.cross_entropy(ours(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_both_spellings_of_rotary_settings(spelling):
    scaling = SCALINGS["yarn"]
    values = config_to_json(ModelConfig(**SMALL, rope_scaling=scaling))
    if spelling == "old":
        del values["rope_parameters"]
        values["rope_scaling"] = {"type": "yarn"} | {k: v for k, v in scaling.items() if k != "rope_type"}
    else:
        del values["rope_theta"], values["rope_scaling"]
    config = config_from_json(values)
    assert (config.rope_theta, config.rope_scaling) == (5e4, scaling)


# -- properties


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
@torch.no_grad()
def test_causal(changes):
    model, ids = make(**changes), some_ids()
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 97
    difference = (model(ids) - model(changed)).abs().amax((0, 2))
    assert difference[:20].max() < 1e-5 and difference[20:].min() > 1e-5


@torch.no_grad()
def test_left_padding_changes_nothing():
    model, ids = make(), some_ids(B=1, T=9)
    padded, mask = F.pad(ids, (4, 0)), torch.tensor([[0] * 4 + [1] * 9])
    torch.testing.assert_close(model(padded, mask)[:, 4:], model(ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(padded)[:, 4:], model(ids), atol=1e-3)  # the mask is what does it
    positions = torch.cat([torch.zeros(4, dtype=torch.long), torch.arange(9)])[None]
    torch.testing.assert_close(model(padded, mask, position_ids=positions)[:, 4:], model(ids), atol=1e-5, rtol=1e-4)


class SimpleCache:
    def __init__(self):
        self.layers = {}

    @property
    def length(self):
        return self.layers[0][0].size(2) if self.layers else 0

    def update(self, k, v, layer_idx):
        if layer_idx in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer_idx], (k, v), strict=True))
        self.layers[layer_idx] = (k, v)
        return k, v


@pytest.mark.parametrize("pieces", [[10, 1, 1], [4, 5, 3], [12]])
@torch.no_grad()
def test_in_pieces_with_a_cache(pieces):
    model, ids, cache = make(), some_ids(T=12), SimpleCache()
    logits = torch.cat([model(piece, kv_cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(ids), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_cache_with_padding():
    model, ids, mask, cache = make(), some_ids(T=12), torch.ones(2, 12, dtype=torch.long), SimpleCache()
    mask[0, :3] = 0
    logits = torch.cat([model(ids[:, :7], mask[:, :7], kv_cache=cache), model(ids[:, 7:], mask, kv_cache=cache)], dim=1)
    torch.testing.assert_close(logits[mask.bool()], model(ids, mask)[mask.bool()], atol=1e-5, rtol=1e-4)


def test_a_mask_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 11\); expected \(B, past \+ T\) = \(2, 12\)"):
        make()(some_ids(T=12), torch.ones(2, 11))


def test_rmsnorm():
    x, norm = torch.randn(4, 32), RMSNorm(32)
    torch.testing.assert_close(norm(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
    torch.testing.assert_close(norm(x).pow(2).mean(-1), torch.ones(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
@torch.no_grad()
def test_first_loss_is_ln_v(preset):
    torch.manual_seed(0)
    model, ids = MiniMind(ModelConfig.preset(preset)), some_ids(4, 128, 2048)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(2048), rel=0.02)


def test_aux_loss_is_zero_for_dense_and_differentiable_for_experts():
    dense, experts = make(), make(**EXPERTS)
    dense(some_ids())
    assert dense.aux_loss.shape == () and dense.aux_loss == 0
    experts(some_ids())
    experts.aux_loss.backward()
    assert experts.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
    assert copy.deepcopy(experts).aux_loss is None  # a copy after a forward pass, as for a reference model


def test_runs_under_autocast():
    model, ids = make(**EXPERTS), some_ids()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


# -- predictions


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("tiny", 1_496_800, 1_496_800),
        ("minimind2-small", 25_829_888, 25_829_888),
        ("minimind3", 63_912_192, 63_912_192),
        ("minimind3-moe", 198_416_640, 63_936_768),
    ],
)
def test_sizes_of_the_presets(preset, total, active):
    config = ModelConfig.preset(preset)
    assert (count_parameters(config), count_parameters(config, active=True)) == (total, active)


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=False), dict(qk_norm=False)])
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_predicted_exactly(preset, changes):
    config = ModelConfig.preset(preset, **changes)
    with torch.device("meta"):
        assert MiniMind(config).num_parameters() == count_parameters(config)


def test_unknown_preset():
    with pytest.raises(ValueError, match="no preset 'huge'; the presets are tiny"):
        ModelConfig.preset("huge")


@pytest.mark.parametrize("changes", [{}, EXPERTS, dict(qk_norm=False, tie_word_embeddings=False)])
@pytest.mark.parametrize("training", [False, True])
def test_flops_within_ten_percent(changes, training):
    model = make(**changes)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(some_ids(2, 64))
        if training:
            logits.sum().backward()
    assert counter.get_total_flops() / (2 * 64) == pytest.approx(flops_per_token(model.config, 64, training), rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("preset", "changes", "T"),
    [("tiny", {}, 128), ("tiny", dict(qk_norm=False), 128), ("tiny-moe", {}, 128), ("tiny-moe", dict(num_experts_per_tok=2), 128),
     ("tiny", {}, 340), ("tiny", {}, 512), ("tiny", {}, 640)],  # two blocks of queries, one not full; and the fused kernel
)
def test_memory_within_ten_percent(preset, changes, T, precision):
    """Activations: all memory that autograd holds, each counted once, parameters left out. The rest is counted as it lies there."""
    B, config = 4, ModelConfig.preset(preset, **changes)
    model, ids, kept = MiniMind(config), some_ids(B, T, 2048), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            kept[memory.data_ptr()] = memory
        return tensor

    optimizer = torch.optim.AdamW(model.parameters())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten()) + model.aux_loss
    predicted = training_memory(config, B, T, precision, device="cpu")
    assert sum(memory.nbytes() for memory in kept.values()) == pytest.approx(predicted["activations"], rel=0.1)
    loss.backward()
    optimizer.step()
    gradients = sum(p.grad.nbytes for p in model.parameters())
    states = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert gradients == predicted["gradients"] and states == pytest.approx(predicted["optimizer"], rel=0.001)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_memory_on_a_gpu():
    config = ModelConfig.preset("minimind2-small")
    model = MiniMind(config).cuda()
    optimizer, ids = torch.optim.AdamW(model.parameters(), fused=True), some_ids(16, 340, 6400).cuda()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
    peak = torch.cuda.max_memory_allocated()
    # 15%: allocator blocks and workspaces of the kernels are on top of what the formula counts
    assert peak == pytest.approx(training_memory(config, 16, 340, "bf16")["total"], rel=0.15)


# -- files


def rewrite(folder: Path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def saved(tmp_path):
    make().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"{NAME} is missing"),
        (lambda t: t.update({NAME + "s": t.pop(NAME)}), f"{NAME} is missing.*{NAME}s is unexpected"),
        (lambda t: t.update({NAME: torch.zeros(48, 33)}), rf"{NAME} has shape \(48, 33\), the config asks for \(48, 32\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_a_weight_that_does_not_fit_is_named(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        MiniMind.from_pretrained(saved)


def test_without_strict_loading_the_model_would_be_wrong_in_silence(saved):
    right, wrong, tensors = MiniMind.from_pretrained(saved), make(seed=1), load_file(saved / "model.safetensors")
    tensors.pop(NAME)
    wrong.load_state_dict(tensors, strict=False)
    assert not torch.allclose(right(some_ids()), wrong(some_ids()), atol=1e-3)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
        MiniMind.from_pretrained(saved)


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def test_a_checkpoint_of_another_size(saved):
    edit_config(saved, hidden_size=64)
    with pytest.raises(ValueError, match=r"does not fit its config.json, 20 weights: .*has shape \(.*the config asks for"):
        MiniMind.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="gpt2"), "model_type is 'gpt2'; this model reads llama, qwen3, qwen3_moe"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'; this model only has 'silu'"),
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "longrope"),
    ],
)
def test_configurations_that_we_do_not_have(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        MiniMind.from_pretrained(saved)


def test_a_folder_without_a_model(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        MiniMind.from_pretrained(tmp_path)
    (saved / "config.json").write_text('{"model_type": "qwen3", "hid')
    with pytest.raises(ValueError, match="config.json is damaged or incomplete"):
        MiniMind.from_pretrained(saved)


def test_experts_without_qk_norm_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="set qk_norm=True"):
        make(**EXPERTS, qk_norm=False).save_pretrained(tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["while writing", "before the rename"])
def test_a_failed_save_leaves_the_old_model(saved, monkeypatch, when):
    before = load_file(saved / "model.safetensors")

    def half(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def stop(draft, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_module, *(("save_file", half) if when == "while writing" else ("replace_folder", stop)))
    with pytest.raises((OSError, KeyboardInterrupt)):
        make(seed=1).save_pretrained(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["m"]  # no drafts left behind
    after = load_file(saved / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_save_killed_between_its_two_renames_is_found_again(saved, monkeypatch):
    before, rename, calls = load_file(saved / "model.safetensors"), os.replace, []

    def second_is_the_last(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_is_the_last)
    with pytest.raises(KeyboardInterrupt):
        make(seed=1).save_pretrained(saved)
    assert not saved.exists()
    after = MiniMind.from_pretrained(saved).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_saving_keeps_other_files(saved):
    (saved / "tokenizer.json").write_text("{}")
    other = make(seed=1)
    other.save_pretrained(saved)
    assert (saved / "tokenizer.json").read_text() == "{}"
    torch.testing.assert_close(MiniMind.from_pretrained(saved)(some_ids()), other(some_ids()))


# -- a published model: llama2.c's 260 thousand parameters, trained by Andrej Karpathy on TinyStories


def read_llama2c(path: Path, half_split: bool = True) -> MiniMind:
    data = path.read_bytes()
    C, I, layers, H, K, V, T = struct.unpack("7i", data[:28])
    D, numbers, at = C // H, np.frombuffer(data, dtype="<f4", offset=28), 0

    def take(*shape):
        nonlocal at
        at += math.prod(shape)
        return torch.tensor(numbers[at - math.prod(shape) : at].reshape(shape))

    config = ModelConfig(
        vocab_size=abs(V), hidden_size=C, num_hidden_layers=layers, num_attention_heads=H, num_key_value_heads=K, head_dim=D, intermediate_size=I,
        max_position_embeddings=T, rms_norm_eps=1e-5, rope_theta=1e4, qk_norm=False, tie_word_embeddings=V > 0,
    )  # fmt: skip
    tensors = {"model.embed_tokens.weight": take(abs(V), C)}
    shapes = {
        "input_layernorm": (C,),
        "self_attn.q_proj": (H * D, C), "self_attn.k_proj": (K * D, C), "self_attn.v_proj": (K * D, C), "self_attn.o_proj": (C, H * D),
        "post_attention_layernorm": (C,), "mlp.gate_proj": (I, C), "mlp.down_proj": (C, I), "mlp.up_proj": (I, C),
    }  # fmt: skip
    for name, shape in shapes.items():
        for i, weight in enumerate(take(layers, *shape)):
            if half_split and name in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = to_half_split(weight, D)
            tensors[f"model.layers.{i}.{name}.weight"] = weight
    tensors["model.norm.weight"] = take(C)
    model = MiniMind(config)
    model.load_state_dict(tensors)
    return model.eval()


def read_llama2c_pieces(path: Path, V: int) -> list[bytes]:
    data, at, pieces = path.read_bytes(), 4, []
    for _ in range(V):
        size = struct.unpack_from("i", data, at + 4)[0]
        pieces.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return pieces


@pytest.mark.real_data
@torch.no_grad()
def test_stories260K_speaks_english():
    root = os.environ.get("MINIMIND_REAL_DATA")
    if not root:
        pytest.skip("MINIMIND_REAL_DATA is not set: the published llama2.c model is not read")
    folder = Path(root) / "reference" / "stories260K"
    model, ids = read_llama2c(folder / "stories260K.bin"), torch.tensor([[1]])
    for _ in range(150):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    text = b"".join(read_llama2c_pieces(folder / "tok512.bin", model.config.vocab_size)[i] for i in ids[0, 1:].tolist()).decode()
    assert text.strip().startswith("Once upon a time, there was a little")
    everyday = (
        "once upon a time there was little girl boy named lily tim she he they loved to play and the with her his in one day saw big park it is"
    )
    words = [word.strip('.,!?"').lower() for word in text.split()]
    assert sum(word in everyday.split() for word in words) / len(words) > 0.4, text

    def loss(model):
        return F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).item()

    # without the permutation everything loads, and the model no longer understands its own story
    assert loss(model) < 0.7 < loss(read_llama2c(folder / "stories260K.bin", half_split=False))


def test_the_permutation_has_an_inverse():
    weight = torch.randn(32, 16)
    assert torch.equal(to_interleaved(to_half_split(weight, 8), 8), weight) and not torch.equal(to_half_split(weight, 8), weight)
