# %% [markdown]
# # 6. Feed-forward layers and mixtures of experts

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% id="moe-default-exp"
#| default_exp moe

# %% id="moe-imports"
#| export
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %% id="moe-swiglu-class"
#| export
class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)), x (..., C) -> (..., C).

    Shazeer 2020, arXiv:2002.05202. The parameter names are Hugging Face's.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

# %% id="moe-route"
#| export
def route(router_logits: Tensor, top_k: int, norm_topk_prob: bool = True) -> tuple[Tensor, Tensor]:
    """Choose experts: router_logits (N, E) -> weights (N, top_k), chosen experts (N, top_k).

    The softmax runs in float32. With norm_topk_prob the weights of a token sum to 1.
    """
    probs = router_logits.softmax(-1, dtype=torch.float32)  # (N, E)
    weights, chosen = probs.topk(top_k, dim=-1)             # (N, top_k) each
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen

# %% id="moe-class"
#| export
class MoE(nn.Module):
    """A feed-forward layer of num_experts SwiGLUs; each token uses num_experts_per_tok of them.

    x (..., C) -> (..., C). After a forward pass, router_logits (N, num_experts) holds the scores
    of all N tokens, for load_balancing_loss. Parameter names are those of Hugging Face's
    Qwen3-MoE checkpoint files: gate.weight, experts.0.gate_proj.weight, ...
    Shazeer et al. 2017, arXiv:1701.06538; Fedus, Zoph and Shazeer 2021, arXiv:2101.03961.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        norm_topk_prob: bool = True,
    ):
        super().__init__()
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(f"num_experts_per_tok is {num_experts_per_tok}: it must be 1 to num_experts = {num_experts}")
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(hidden_size, moe_intermediate_size) for _ in range(num_experts))
        self.router_logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)                                       # (N, C)
        self.router_logits = self.gate(tokens)                          # (N, E)
        weights, chosen = route(self.router_logits, self.num_experts_per_tok, self.norm_topk_prob)
        return self.dispatch(tokens, weights.to(x.dtype), chosen).view_as(x)

    def dispatch(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Sort the N * top_k visits by expert, run each expert once on its slice, add the results."""
        top_k = chosen.size(1)
        visits = chosen.flatten()                                       # (N * top_k,)
        order = visits.argsort(stable=True)
        token_of = order // top_k                                       # the token behind each sorted visit
        load = visits.bincount(minlength=len(self.experts)).tolist()
        slices = tokens.index_select(0, token_of).split(load)           # one (load, C) per expert
        y = torch.cat([expert(part) for expert, part in zip(self.experts, slices)])
        y = y * weights.flatten().index_select(0, order).unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, token_of, y.to(tokens.dtype))

    def __getstate__(self) -> dict:
        # router_logits belongs to one forward pass; a copy or a pickle of the layer starts without it.
        return self.__dict__ | {"router_logits": None}

# %% id="moe-balance-loss"
#| export
def load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor],
    num_experts: int,
    top_k: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """E * sum over experts of (share of visits) * (mean probability); top_k when perfectly even.

    router_logits is one (N, E) tensor or one for each layer; all layers are pooled, as Hugging
    Face does. attention_mask (B, T), 1 = real, leaves padding out. Fedus et al. 2021, equations 4-6.
    """
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    logits = torch.cat(layers)                                          # (L * N, E)
    probs = logits.softmax(-1, dtype=torch.float32)
    chosen = probs.topk(top_k, dim=-1).indices                          # (L * N, top_k)
    real = torch.ones_like(probs[:, 0])
    if attention_mask is not None:
        real = attention_mask.flatten().to(probs.dtype).repeat(len(layers))
    visits = torch.zeros_like(probs[0]).index_add(0, chosen.flatten(), real.repeat_interleave(top_k))
    return num_experts * ((visits / real.sum()) * (real @ probs / real.sum())).sum()
