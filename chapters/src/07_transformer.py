# %% [markdown]
# # 7. The transformer

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="model-default-exp"
#| default_exp model

# %% id="model-imports"
#| export
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minimind.attention import Attention, causal_mask
from minimind.moe import MoE, SwiGLU, load_balancing_loss
from minimind.rope import apply_rope, rope_cos_sin, rope_frequencies

# %% id="model-rmsnorm-class"
#| export
class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale each channel; x (..., C) -> (..., C).

    Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

# %% id="model-config"
#| export
@dataclass
class ModelConfig:
    """Sizes of a model; the names are those of Hugging Face's config.json. num_experts = 0 is a dense model."""

    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1408
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = True
    qk_norm: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.01
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = field(default_factory=lambda: [0, 2])
    pad_token_id: int | None = 0

    @classmethod
    def preset(cls, name: str, **changes) -> "ModelConfig":
        """A named size: tiny, tiny-moe, minimind2-small, minimind3 or minimind3-moe, with changes to its fields."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls(**PRESETS[name] | changes)

# %% id="model-presets"
#| export
TINY = dict(
    vocab_size=2048, hidden_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=40, intermediate_size=448, max_position_embeddings=1024,
)
MINIMIND3 = dict(
    hidden_size=768, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=96,
    intermediate_size=2432,
)
PRESETS = {
    "tiny": TINY,
    "tiny-moe": TINY | dict(num_experts=4, moe_intermediate_size=448),
    "minimind2-small": dict(qk_norm=False, rms_norm_eps=1e-5),
    "minimind3": MINIMIND3,
    "minimind3-moe": MINIMIND3 | dict(num_experts=4, moe_intermediate_size=2432),
}

# %% id="model-block"
#| export
class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed-forward(norm(x)); x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(C, eps)
        self.self_attn = Attention(
            C, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            norm=(lambda width: RMSNorm(width, eps)) if config.qk_norm else None, layer_idx=layer_idx,
        )
        self.post_attention_layernorm = RMSNorm(C, eps)
        if config.num_experts:
            self.mlp = MoE(C, config.moe_intermediate_size, config.num_experts,
                           config.num_experts_per_tok, config.norm_topk_prob)
        else:
            self.mlp = SwiGLU(C, config.intermediate_size)

    def forward(self, x: Tensor, rotate: Callable, attention_mask: Tensor | None = None, kv_cache=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, attention_mask, kv_cache)
        return x + self.mlp(self.post_attention_layernorm(x))

# %% id="model-working-dtype"
#| export
def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products will have here: autocast's, else the dtype of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

# %% id="model-decoder"
#| export
class Decoder(nn.Module):
    """Token ids (B, T) -> hidden vectors (B, T, C): embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        inv_freq, self.attention_factor = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self, seq_len: int | None = None) -> tuple[Tensor, float]:
        config = self.config
        return rope_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings, seq_len
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, kv_cache=None,
    ) -> Tensor:
        x = self.embed_tokens(input_ids)                                # (B, T, C)
        x = x.to(working_dtype(x))  # one cast here instead of one in every matrix product
        past = kv_cache.length if kv_cache is not None else 0
        rotate = self.rotation(position_ids, past, x)
        mask = full_mask(attention_mask, past, input_ids)
        for layer in self.layers:
            x = layer(x, rotate, mask, kv_cache)
        return self.norm(x)

    def rotation(self, position_ids: Tensor | None, past: int, x: Tensor) -> Callable:
        """The rotary turn of queries and keys, its cos and sin computed once for all layers."""
        if position_ids is None:
            position_ids = torch.arange(past, past + x.size(1), device=x.device)
        inv_freq = self.inv_freq.float()
        if (self.config.rope_scaling or {}).get("rope_type") == "dynamic":  # the only kind that depends on the length
            inv_freq = self.frequencies(int(position_ids.max()) + 1)[0].to(x.device)
        cos, sin = rope_cos_sin(position_ids, inv_freq, self.attention_factor)  # (T, D) or (B, T, D)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        return lambda q, k: (apply_rope(q, cos, sin), apply_rope(k, cos, sin))

# %% id="model-full-mask"
#| export
def full_mask(attention_mask: Tensor | None, past: int, input_ids: Tensor) -> Tensor | None:
    """The mask that attention reads: None for plain causal rows, else bool (B or 1, 1, T, S), True = may look.

    attention_mask is None, a padding mask (B, S) with 1 = real, or already (B, 1, T, S).
    """
    T = input_ids.size(1)
    if attention_mask is None and (past == 0 or T == 1):
        return None
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    mask = causal_mask(T, past + T).to(input_ids.device)[None, None]    # (1, 1, T, S)
    if attention_mask is None:
        return mask
    if attention_mask.shape != (input_ids.size(0), past + T):
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; expected (B, past + T) = {(input_ids.size(0), past + T)}")
    # A padded position may look at itself: a row without any key would be 0 / 0.
    own = torch.arange(past, past + T, device=input_ids.device)[:, None] == torch.arange(past + T, device=input_ids.device)
    return mask & (attention_mask.bool()[:, None, None, :] | own)

# %% id="model-minimind"
#| export
class MiniMind(nn.Module):
    """A decoder-only language model: token ids (B, T) -> logits (B, T, V). Parameter names are Hugging Face's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        # Tied models reuse the embedding as the output layer, so they own one matrix, not two.
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.aux_loss: Tensor | None = None
        self.initialise()

    def initialise(self) -> None:
        """All matrices from a normal distribution with standard deviation initializer_range; norms stay 1."""
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, kv_cache=None,
    ) -> Tensor:
        """input_ids (B, T) -> logits (B, T, V).

        attention_mask: None (causal), padding (B, S) with 1 = real, or bool (B, 1, T, S) with True = may look.
        position_ids (T,) or (B, T); by default they count on from what kv_cache already holds.
        """
        x = self.model(input_ids, attention_mask, position_ids, kv_cache)
        self.aux_loss = self.balance_loss(attention_mask, x)
        return F.linear(x, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def balance_loss(self, attention_mask: Tensor | None, x: Tensor) -> Tensor:
        config = self.config
        if not config.num_experts:
            return torch.zeros((), device=x.device)
        padding = attention_mask if attention_mask is not None and attention_mask.shape == x.shape[:2] else None
        router_logits = [layer.mlp.router_logits for layer in self.model.layers]
        return load_balancing_loss(router_logits, config.num_experts, config.num_experts_per_tok, padding)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def __getstate__(self) -> dict:
        # aux_loss belongs to one forward pass; a copy or a pickle of the model starts without it.
        return self.__dict__ | {"aux_loss": None}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face model folder: config.json and model.safetensors. See save_model."""
        save_model(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MiniMind":
        """Read a Hugging Face model folder (Qwen3, Qwen3-MoE or Llama) in float32. See load_model."""
        return load_model(Path(folder))

# %% id="model-config-json"
#| export
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef")


def config_to_json(config: ModelConfig) -> dict:
    """The config.json that transformers reads: q/k norm and experts decide between Llama, Qwen3 and Qwen3-MoE."""
    if config.num_experts and not config.qk_norm:
        raise ValueError("a model with experts but without q/k norm is no Hugging Face architecture: set qk_norm=True")
    kind = "qwen3_moe" if config.num_experts else "qwen3" if config.qk_norm else "llama"
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "qk_norm"}
    if kind != "qwen3_moe":
        values = {name: value for name, value in values.items() if name not in MOE_FIELDS}
    # transformers 5 reads rope_parameters, older versions read rope_theta and rope_scaling.
    values["rope_parameters"] = {"rope_type": "default"} | (config.rope_scaling or {}) | {"rope_theta": config.rope_theta}
    fixed = {"hidden_act": "silu", "attention_bias": False, "use_cache": True, "dtype": "float32"}
    return {"model_type": kind, "architectures": [ARCHITECTURES[kind]]} | values | fixed

# %% id="model-config-from-json"
#| export
def config_from_json(values: dict, source: str = "config.json") -> ModelConfig:
    """A ModelConfig from a Hugging Face config.json; raises ValueError naming what this model does not have."""
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{source}: model_type is {kind!r}; this model reads {', '.join(ARCHITECTURES)}")
    values = dict(values)
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    values["rope_theta"] = rope.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    values["qk_norm"] = kind != "llama"
    values["num_experts"] = values.get("num_experts", values.get("num_local_experts", 0)) if kind == "qwen3_moe" else 0
    values["num_key_value_heads"] = values.get("num_key_value_heads") or values.get("num_attention_heads")
    values["head_dim"] = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    refuse_unsupported(values, source)
    names = {f.name for f in fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in values.items() if name in names})


def refuse_unsupported(values: dict, source: str) -> None:
    expected = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "quantization_config": None,
    }
    for name, value in expected.items():
        if values.get(name, value) not in (value, None):
            raise ValueError(f"{source}: {name} is {values[name]!r}; this model only has {value!r}")

# %% id="model-save"
#| export
def save_model(model: MiniMind, folder: Path) -> None:
    """Write config.json and model.safetensors into folder, all or nothing.

    The files are written beside the folder first and then renamed, so that a kill or a full disk
    leaves either the old model or the new one. Other files in the folder (tokenizer) are kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if folder.is_dir():
            shutil.copytree(folder, draft, dirs_exist_ok=True)
        (draft / "config.json").write_text(json.dumps(config_to_json(model.config), indent=2) + "\n")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        replace_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def replace_folder(draft: Path, folder: Path) -> None:
    """Put draft in the place of folder. Two renames: in between, the old one lies beside it as .NAME.old."""
    draft.chmod(0o755)  # mkdtemp makes it private
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(draft, folder)
    shutil.rmtree(old, ignore_errors=True)

# %% id="model-load"
#| export
def load_model(folder: Path) -> MiniMind:
    """A model from a Hugging Face folder. Raises ValueError or FileNotFoundError that names the file or the weight."""
    path = folder / "model.safetensors"
    for needed in (folder / "config.json", path):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing: {folder} is not a model folder")
    config = config_from_json(json.loads((folder / "config.json").read_text()), str(folder / "config.json"))
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): copy it again or save it again") from error
    model = MiniMind(config)
    check_weights(model.state_dict(), tensors, path)
    model.load_state_dict(tensors)
    return model


def check_weights(expected: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is unexpected" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the config asks for {tuple(expected[name].shape)}"
        for name in expected.keys() & tensors.keys() if tensors[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:10])
        raise ValueError(f"{path} does not fit its config.json, {len(problems)} weights: {shown}")

# %% id="model-count-parameters"
#| export
def matmul_parameters(config: ModelConfig, experts: int) -> int:
    """Weights that multiply one token when `experts` experts work on it, output layer included."""
    C, D = config.hidden_size, config.head_dim
    attention = 2 * C * config.num_attention_heads * D + 2 * C * config.num_key_value_heads * D
    feed_forward = 3 * C * config.intermediate_size
    if config.num_experts:
        feed_forward = experts * 3 * C * config.moe_intermediate_size + C * config.num_experts
    return config.num_hidden_layers * (attention + feed_forward) + C * config.vocab_size


def count_parameters(config: ModelConfig, active: bool = False) -> int:
    """All parameters of a model, or with active=True those that work on one token."""
    C = config.hidden_size
    norms = config.num_hidden_layers * (2 * C + 2 * config.head_dim * config.qk_norm) + C
    embedding = 0 if config.tie_word_embeddings else C * config.vocab_size
    experts = config.num_experts_per_tok if active else config.num_experts
    return matmul_parameters(config, experts) + norms + embedding

# %% id="model-flops"
#| export
def flops_per_token(config: ModelConfig, T: int, training: bool = True) -> int:
    """Floating point operations for one token of a row of T: forward, or forward and backward (three times that).

    A product with N weights is 2N operations. Scores and mixing take 4 * T * H * D a layer; the masked
    half is counted too, as is usual (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    """
    attention = 4 * T * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    forward = 2 * matmul_parameters(config, config.num_experts_per_tok) + attention
    return 3 * forward if training else forward

# %% id="model-activations"
#| export
def activation_bytes(config: ModelConfig, number: int, norm: int) -> int:
    """Bytes that autograd keeps for one token; `number` a value, `norm` a value that goes through a norm."""
    C, V = config.hidden_size, config.vocab_size
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = (norm + number) * C + number * (3 * q + 2 * k)          # norm, its output; q, output twice; k, v
    if config.qk_norm:
        attention += norm * (q + k)
    feed_forward = (norm + number) * C + 4 * number * config.intermediate_size
    if config.num_experts:
        visits = config.num_experts_per_tok
        feed_forward = (norm + number) * C + visits * number * (4 * config.moe_intermediate_size + 2 * C)
    output = (norm + number) * C + 4 * V                                # log-softmax in float32
    return config.num_hidden_layers * (attention + feed_forward) + output

# %% id="model-memory"
#| export
def training_memory(
    config: ModelConfig, batch: int, T: int, precision: str = "bf16", device: str = "cuda"
) -> dict[str, int]:
    """Bytes at the peak of a training step with AdamW: parameters, gradients, optimizer, activations, loss, total.

    precision is fp32, or bf16 / fp16 for autocast, where the weights stay in float32 and each
    matrix is also kept as a 16-bit copy. The total assumes that gradients of an earlier batch are
    there (accumulation). On the CPU a norm keeps two float32 values for each number, on CUDA one.
    """
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision is {precision!r}; expected fp32, bf16 or fp16")
    number = 4 if precision == "fp32" else 2
    parameters = 4 * count_parameters(config)
    copies = 0 if precision == "fp32" else 2 * matmul_parameters(config, config.num_experts)
    memory = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": 2 * parameters,                                    # Adam's two running averages
        "activations": copies + batch * T * activation_bytes(config, number, 8 if device == "cpu" else number),
        "loss": batch * T * 8 * config.vocab_size,                      # gradient of logits, in and out of softmax
    }
    return memory | {"total": sum(memory.values())}
