"""Checks of workbook 12. What is trusted are plain matrix products, one changed weight at a time, and counting; nothing here comes from minimind."""

import copy
import math
from collections import OrderedDict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from course.checks.core import close, equal, exercise, fail, shaped, unchanged

MODULE = "lora"

HAND_A, HAND_B = torch.tensor([[1.0, -1.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
PARTS = ("lora_A", "lora_B")


def tree(**parts: nn.Module) -> nn.Sequential:
    """Modules in a row, with names."""
    return nn.Sequential(OrderedDict(parts))


def small_model() -> nn.Sequential:
    """Names as in a real model; it takes numbers of tokens, (B, T)."""
    layers = [tree(self_attn=tree(q_proj=nn.Linear(8, 6), norm=nn.LayerNorm(6), o_proj=nn.Linear(6, 8, bias=False)),
                   mlp=tree(up_proj=nn.Linear(8, 12), act=nn.SiLU(), down_proj=nn.Linear(12, 8))) for _ in range(2)]  # fmt: skip
    return tree(embed_proj=nn.Embedding(20, 8), layers=nn.Sequential(*layers), lm_head=nn.Linear(8, 20, bias=False))


IDS = torch.arange(6).view(2, 3)
LAYERS = [f"layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")] + ["lm_head"]


def settings(targets: list[str], r: int = 2, alpha: float = 6.0) -> SimpleNamespace:
    """What a LoRAConfig holds."""
    return SimpleNamespace(r=r, lora_alpha=alpha, target_modules=targets)


def refused(act, what: str, given: object, kind: type = ValueError) -> str:
    """`act()` must raise; the text of the error is returned."""
    try:
        act()
    except kind as error:
        return str(error)
    except NotImplementedError:
        raise
    except Exception as error:
        fail(f"{what} must be a {kind.__name__}, with a text that says why", given, kind.__name__, f"{type(error).__name__}: {error}")
    fail(f"{what} must be a {kind.__name__}, and here it passes in silence", given, kind.__name__)


def is_model(value: object, given: str, what: str) -> None:
    if value is None:
        fail(f"{what} returns nothing; is there a `return`?", given)
    if not isinstance(value, nn.Module):
        fail(f"{what} must return the model", given, "a module", type(value).__name__)


def shake(model: nn.Module) -> None:
    """Random numbers in both thin matrices, as if they were trained."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape) * 0.5)


# -- rebuild


@exercise("LoRALinear", keeps=["LoRALinear"])
def check_lora_linear(LoRALinear):
    base, given = nn.Linear(2, 3), "LoRALinear(nn.Linear(2, 3), rank=2, alpha=6)"
    layer = LoRALinear(base, 2, 6.0)
    wanted = {"base_layer.weight": (3, 2), "base_layer.bias": (3,), "lora_A.weight": (2, 2), "lora_B.weight": (3, 2)}
    got = {name: tuple(weight.shape) for name, weight in layer.named_parameters()}
    if set(got) != set(wanted):
        words = "a thin matrix has a bias; leave it out (bias=False)" if {"lora_A.bias", "lora_B.bias"} & set(got) else \
            "its parts must be base_layer, lora_A and lora_B, and no other weights"  # fmt: skip
        fail(words, given, sorted(wanted), sorted(got))
    if got != wanted:
        fail("a thin matrix has the wrong shape: A goes from `in` to the rank, B from the rank to `out`", given, wanted, got)
    x = torch.tensor([[3.0, 1.0]])
    with torch.no_grad():
        y = layer(x)
        if layer.lora_B.weight.any() and not layer.lora_A.weight.any():
            fail("A starts random and B at zero; here it is the other way round", given)
        if layer.lora_B.weight.any():
            fail("B must start at zero, so that the layer starts as it was", given, torch.zeros(3, 2), layer.lora_B.weight)
        equal(y, base(x), f"{given}, x = [3, 1], B still zero", "with B at zero the layer must give what the old one gives", {
            "the old layer is left out: W x belongs to the sum": torch.zeros(1, 3), "the bias of the old layer is lost": x @ base.weight.T,
        })  # fmt: skip
        layer.lora_A.weight.copy_(HAND_A)
        layer.lora_B.weight.copy_(HAND_B)
        product = HAND_B @ HAND_A
        given += ", A = [[1, -1], [0, 1]], B = [[2, 0], [0, 1], [1, 1]]"
        scales = {"the scale is missing: the change is multiplied by alpha / r": 1.0,
                  "the change is multiplied by alpha; it must be alpha / r": 6.0,
                  "the change is multiplied by r / alpha; it must be alpha / r": 2 / 6,
                  "the change is divided by the root of r; it must be alpha / r": 6 / math.sqrt(2),
                  "the change is multiplied by alpha and by r; it must be divided by r": 12.0}  # fmt: skip
        equal(layer(x) - base(x), x @ (3 * product).T, f"{given}, x = [3, 1]: what the change adds", "it must add alpha / r times B (A x)",
              {"the adapter adds nothing": torch.zeros(1, 3)} | {words: x @ (s * product).T for words, s in scales.items()})  # fmt: skip
        change = layer.change()
        shaped(change, (3, 2), f"{given}: change()", hint="the change has the shape of W: (out, in), so it is B times A")
        equal(change, 3 * product, f"{given}: change()", "it must be alpha / r times B A", {
            "W is in it; only what is added to W was asked for": 3 * product + base.weight,
        } | {words: s * product for words, s in scales.items()})  # fmt: skip
    _start_of_lora(LoRALinear)
    _gradients_of_lora(LoRALinear)
    for rank in (0, -1):
        refused(lambda rank=rank: LoRALinear(nn.Linear(2, 2), rank, 1.0), f"a rank of {rank}", f"LoRALinear(nn.Linear(2, 2), {rank}, 1.0)")


def _start_of_lora(LoRALinear) -> None:
    A = LoRALinear(nn.Linear(400, 300, bias=False), 8, 8.0).lora_A.weight.detach()
    given = "A of LoRALinear(nn.Linear(400, 300), 8, 8.0)"
    if not A.any():
        fail("A starts at zero as well: then neither of the two ever moves, since each is the other's gradient", given)
    if A.abs().max() > 0.0501 or not 0.95 < A.std() * math.sqrt(3) / 0.05 < 1.05:
        fail("A must start uniform within 1 / root of `in`, here 0.05; then its standard deviation is 0.029", given,
             "largest 0.05, deviation 0.029", f"largest {A.abs().max():.3g}, deviation {A.std():.3g}")  # fmt: skip
    wide = LoRALinear(nn.Linear(3, 2).double(), 1, 1.0)
    if wide.lora_A.weight.dtype != torch.float64 or wide.lora_B.weight.dtype != torch.float64:
        fail("the thin matrices must have the type of the old weights", "nn.Linear(3, 2).double()", torch.float64, wide.lora_A.weight.dtype)


def _gradients_of_lora(LoRALinear) -> None:
    torch.manual_seed(3)
    base = nn.Linear(5, 4)
    layer, x = LoRALinear(base, 3, 2.0), torch.randn(2, 6, 5, requires_grad=True)
    shake(layer)
    given = "random x (2, 6, 5), rank 3, alpha 2, random A and B"
    change = layer.change().detach()
    y = layer(x)
    shaped(y, (2, 6, 4), given, hint="it goes from (..., in) to (..., out), with any dimensions before")
    A, B = (getattr(layer, part).weight.detach().clone().requires_grad_() for part in PARTS)
    inside = x.detach().clone().requires_grad_()
    wanted = F.linear(inside, base.weight.detach() + 2 / 3 * B @ A, base.bias.detach())
    equal(y, wanted, given, "it differs from one layer with the weight W + alpha / r * B A")
    equal(change, 2 / 3 * B @ A, f"{given}: change()", "it must be alpha / r times B A")
    if not y.requires_grad:
        fail("no gradient gets through; leave detach, .data and no_grad out of forward", given)
    y.square().sum().backward()
    wanted.square().sum().backward()
    for name, ours, theirs in (("A", layer.lora_A.weight.grad, A.grad), ("B", layer.lora_B.weight.grad, B.grad), ("x", x.grad, inside.grad)):
        if ours is None:
            fail(f"no gradient reaches {name}; leave detach and .data out of forward", given)
        equal(ours, theirs, f"{given}: the gradient of {name}", f"the gradient of {name} is not that of one layer with a changed weight")


@exercise("find_targets", keeps=["find_targets"])
def check_find_targets(find_targets):
    model = small_model()
    given = f"a model with the layers {', '.join(LAYERS)}"
    cases = [
        (["q_proj"], LAYERS[0:5:4], "one target, one layer in each of the two blocks"),
        (["layers.0.mlp.up_proj"], LAYERS[2:3], "a full name"),
        (["0.mlp.up_proj", "lm_head"], [LAYERS[2], LAYERS[8]], "the end of a name, and a name without a dot"),
        (["down_proj", "q_proj"], [LAYERS[i] for i in (0, 3, 4, 7)], "two targets"),
        (["q_proj", "layers.1.self_attn.q_proj"], LAYERS[0:5:4], "two targets that fit the same layer"),
    ]
    for targets, wanted, what in cases:
        try:
            got = find_targets(model, targets)
        except ValueError as error:
            fail(f"targets that fit are refused: a target is a full name or the end of one ({what})", f"{given}; targets {targets}", wanted, error)
        if not isinstance(got, list) or not all(isinstance(name, str) for name in got):
            fail("return a list of full names", f"targets {targets}", wanted, "nothing" if got is None else got)
        if got == wanted:
            continue
        words = f"these are not the layers that fit ({what})"
        if len(set(got)) < len(got):
            words = "a layer that fits two targets must stand there once"
        elif sorted(got) == sorted(wanted):
            words = "the right layers in the wrong order: the order of the model, not that of the targets"
        fail(words, f"{given}; targets {targets}", wanted, got)
    for target, what in (("proj", "a part of a word"), ("embed_proj", "an embedding, which is no linear layer"), ("mlp", "a block of layers"),
                         ("layers.0", "the beginning of a name"), ("self_attn", "a word in the middle of a name")):  # fmt: skip
        refused(lambda target=target: find_targets(model, [target]), f"the target {target!r} is {what}, fits no layer, and so it",
                f"{given}; targets [{target!r}]")  # fmt: skip
    text = refused(lambda: find_targets(model, ["q_proj", "query"]), "one target of two fits nothing; this", f"{given}; targets ['q_proj', 'query']")
    if "query" not in text:
        fail("the text of the error must name the target that fits nothing", "targets ['q_proj', 'query']", "a text with 'query' in it", text)
    if "down_proj" not in text or "lm_head" not in text:
        fail("the text of the error must name the layers that there are", "targets ['q_proj', 'query']", "a text with down_proj, lm_head, ...", text)
    text = refused(lambda: find_targets(model, []), "an empty list of targets", f"{given}; targets []")
    if "down_proj" not in text:
        fail("the text of the error must name the layers that there are", "targets []", "a text with down_proj, lm_head, ...", text)


@exercise("add_lora", after=["LoRALinear", "find_targets"], keeps=["adapters", "add_lora"])
def check_add_lora(adapters, add_lora):
    plain = small_model()
    old, y = copy.deepcopy(plain.state_dict()), plain(IDS).detach()
    targets, chosen = ["q_proj", "layers.1.mlp.up_proj"], [LAYERS[0], LAYERS[4], LAYERS[6]]
    given = f"r = 2, lora_alpha = 6, target_modules = {targets}"
    _add_refuses(adapters, add_lora)
    model = add_lora(plain, settings(targets))
    is_model(model, given, "add_lora")
    names = {name for name, _ in model.named_parameters()}
    wanted = {f"{layer}.{part}.weight" for layer in chosen for part in PARTS}
    found = {name for name in names if ".lora_" in name}
    if found != wanted:
        words = "not one adapter was put in" if not found else "the adapters do not stand where they should"
        fail(words, given, sorted(wanted), sorted(found))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    if trained != wanted:
        words = "not only the thin matrices train"
        if trained == names:
            words = "nothing is frozen: every old weight still trains"
        elif not trained:
            words = "the adapters are frozen too: freeze first, then put them in"
        elif trained - wanted and all(name.rpartition(".")[0].removesuffix(".base_layer") not in chosen for name in trained - wanted):
            words = "only the layers with adapters are frozen; all other weights of the model must be, too"
        fail(words, given, sorted(wanted), f"{len(trained)} weights: {', '.join(sorted(trained)[:6])} ...")
    kept = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items() if ".lora_" not in name}
    if set(kept) != set(old) or not all(torch.equal(kept[name], old[name]) for name in old):
        fail("the old weights must stay as they were, each under its name (inside an adapter: base_layer)", given)
    equal(model(IDS).detach(), y, f"{given}: the output", "a model with fresh adapters must give what it gave before")
    if not hasattr(model, "lora_config") or getattr(model.lora_config, "lora_alpha", None) != 6.0:
        fail("the settings must be kept as model.lora_config", given)
    with torch.no_grad():
        shake(model)
        plain = small_model()
        plain.load_state_dict({name: old[name] + (3 * _product(model, name) if name.removesuffix(".weight") in chosen else 0) for name in old})
        equal(model(IDS), plain(IDS), f"{given}, random A and B: the output", "r and lora_alpha do not reach the layers: the scale must be 3")
    listed = adapters(model)
    if not isinstance(listed, dict):
        fail("adapters must return a dict from full name to layer", given, chosen, type(listed).__name__)
    if list(listed) != chosen:
        fail("adapters must list all layers with an adapter by full name, in the order of the model, and nothing else", given, chosen, list(listed))
    for name, layer in listed.items():
        if not (isinstance(layer, nn.Module) and close(layer.lora_B.weight, model.get_submodule(name).lora_B.weight)):
            fail("adapters must give the layers themselves", f"{given}; {name}", "a LoRALinear", type(layer).__name__)
    refused(lambda: add_lora(model, settings(["lm_head"])), "a model that has adapters already", "add_lora twice")


def _product(model, name: str) -> torch.Tensor:
    A, B = (model.get_submodule(f"{name.removesuffix('.weight')}.{part}").weight for part in PARTS)
    return B @ A


def _add_refuses(adapters, add_lora) -> None:
    plain = small_model()
    refused(lambda: adapters(plain), "to ask a model without any for its adapters", "adapters(model)")
    for targets in (["q_proj", "query"], []):
        given = f"target_modules = {targets}"
        refused(lambda targets=targets: add_lora(plain, settings(targets)), "targets that do not fit", given)
        if any(".lora_" in name for name in plain.state_dict()) or not all(weight.requires_grad for weight in plain.parameters()):
            fail("a model that is refused must stay as it was: look for the targets before you freeze or replace anything", given)


@exercise("merge_lora", after=["LoRALinear", "add_lora"], keeps=["remove_lora", "merge_lora"])
def check_merge_lora(add_lora, remove_lora, merge_lora):
    for name, act in (("remove_lora", remove_lora), ("merge_lora", merge_lora)):
        refused(lambda act=act: act(small_model()), f"{name} on a model without adapters", f"{name}(model)")
    plain = small_model()
    old = copy.deepcopy(plain.state_dict())
    for name, act, share in (("remove_lora", remove_lora, 0.0), ("merge_lora", merge_lora, 2.0)):
        model = add_lora(copy.deepcopy(plain), settings(["q_proj", "down_proj"], 3, 6.0))
        shake(model)
        with torch.no_grad():
            products = {n: _product(model, n) for n in old if n.endswith(("q_proj.weight", "down_proj.weight"))}
            y = model(IDS)
        wanted = {n: weight + share * products.get(n, 0.0) for n, weight in old.items()}
        given = f"{name}: q_proj and down_proj with random adapters, r = 3, alpha = 6"
        back = act(model)
        is_model(back, given, name)
        now = back.state_dict()
        if list(now) != list(old):
            words = "the adapters are still there" if any(".lora_" in n for n in now) else "the names are not those of the plain model any more"
            fail(f"{words}: put each old layer back in its place", given, sorted(old)[:4], sorted(now)[:4])
        for n in old:
            likely = {} if n not in products else {
                "nothing was added: this is the model before training": old[n],
                "the changes were added; remove_lora gives back the model as it was": old[n] + 2 * products[n],
                "alpha / r was left out: add what change() gives": old[n] + products[n],
                "the change was added twice": old[n] + 4 * products[n],
                "the change is subtracted": old[n] - 2 * products[n],
                "the weight was replaced by its change; add them": 2 * products[n],
            }  # fmt: skip
            equal(now[n], wanted[n], f"{given}; {n}", "this weight is not what it should be", {w: v for w, v in likely.items()
                  if not close(v, wanted[n])})  # fmt: skip
        _trains_again(back, name, given)
        if name == "merge_lora":
            equal(back(IDS).detach(), y, f"{given}: the output", "merged, the model must give what it gave with adapters")
        if hasattr(back, "lora_config"):
            fail("lora_config must go with the adapters: a model that has it looks like one that still has adapters", given)
        refused(lambda back=back, act=act: act(back), f"a second {name}", f"{name} twice")


def _trains_again(model, name: str, given: str) -> None:
    frozen = [n for n, weight in model.named_parameters() if not weight.requires_grad]
    if frozen:
        fail(f"after {name} all weights must train again; {len(frozen)} are still frozen", given, got=", ".join(frozen[:4]))
    try:
        model(IDS).square().sum().backward()
        weight = model.get_submodule(LAYERS[0]).weight
        reached = weight.is_leaf and weight.grad is not None
    except Exception:  # in the grader
        reached = False
    if not reached:
        fail("the merged weights still hang on A and B, so no gradient stays with them: add the change within torch.no_grad()", given)


@exercise("adapter_weights", after=["LoRALinear", "add_lora"], keeps=["adapter_weights"])
def check_adapter_weights(add_lora, adapter_weights):
    model = add_lora(small_model(), settings(["o_proj", "up_proj"], 3))
    shake(model)
    layers = [LAYERS[i] for i in (1, 2, 5, 6)]
    given = f"adapters of rank 3 on {', '.join(layers)}"
    got, wanted = adapter_weights(model), [f"{layer}.{part}.weight" for layer in layers for part in PARTS]
    if not isinstance(got, dict):
        fail("it must return a dict from name to matrix", given, wanted[:2], "nothing" if got is None else type(got).__name__)
    if list(got) != wanted:
        words = "these are not the names that PEFT uses"
        if set(got) == set(wanted):
            words = "the right names in another order: A and B of a layer, then the next layer"
        elif any("base_layer" in name for name in got):
            words = "the old weights do not belong into the file: only lora_A and lora_B"
        elif len(got) < len(wanted):
            words = "some are missing: two matrices for each layer"
        elif all(f"{name}.weight" in wanted for name in got):
            words = "the names must end with .weight"
        fail(words, given, wanted[:4], list(got)[:4])
    for name in wanted:
        equal(got[name], model.get_parameter(name), f"{given}: {name}", "this name has another matrix", {
            "the matrix is transposed": model.get_parameter(name).mT,
        })  # fmt: skip
    refused(lambda: adapter_weights(small_model()), "a model without adapters", "adapter_weights(model)")


# -- beyond


@exercise("seven_billion")
def check_seven_billion(predicted_weights, predicted_gb):
    C, inner, small, r, layers = 4096, 14336, 1024, 16, 32
    shapes = [(C, C), (C, small), (C, small), (C, C), (C, inner), (C, inner), (inner, C)]  # in, out
    wanted = sum(layers * r * (into + out) for into, out in shapes)
    given = "32 layers, width 4,096, feed-forward 14,336, 32 query and 8 key/value heads of 128, rank 16"
    if isinstance(predicted_weights, bool) or not isinstance(predicted_weights, int | float):
        fail("predicted_weights must be a number", given, got=predicted_weights)
    mistakes = {
        "k_proj and v_proj are narrower: 8 heads of 128": layers * r * (4 * 2 * C + 3 * (C + inner)),
        "an adapter has r (in + out) weights, not r times in times out": sum(layers * r * into * out for into, out in shapes),
        "only A is counted; B has weights, too": sum(layers * r * into for into, _ in shapes),
        "only B is counted; A has weights, too": sum(layers * r * out for _, out in shapes),
        "this is one layer; there are 32": wanted // layers,
        "this is without the rank": wanted // r,
        "these are the four matrices of attention; the feed-forward has three more": sum(layers * r * (i + o) for i, o in shapes[:4]),
        "these are the three of the feed-forward; attention has four more": sum(layers * r * (i + o) for i, o in shapes[4:]),
        "the feed-forward has three matrices: gate_proj, up_proj and down_proj": wanted - layers * r * (C + inner),
        "k_proj and v_proj are two matrices": wanted - layers * r * (C + small),
    }
    if predicted_weights != wanted:
        words = next((w for w, value in mistakes.items() if predicted_weights == value), "count r (in + out) for each of the seven, times the layers")
        fail(words, given, got=f"{predicted_weights:,}")
    if isinstance(predicted_gb, bool) or not isinstance(predicted_gb, int | float):
        fail("predicted_gb must be a number", given, got=predicted_gb)
    gigabytes = 12 * wanted / 1e9
    if abs(predicted_gb / gigabytes - 1) > 0.02:
        mistakes = {"AdamW keeps two averages for each weight, and there is the gradient: 12 bytes": 2 / 3,
                    "the gradient and two averages are three numbers, here one is counted": 1 / 3,
                    "the weights themselves were not asked for: a gradient and two averages are 12 bytes": 4 / 3,
                    "a number in 32 bits has 4 bytes": 1 / 4, "these are megabytes": 1000, "these are bytes": 1e9,
                    "this is for all weights; only the adapters train": 7.24e9 / wanted}  # fmt: skip
        words = next((w for w, factor in mistakes.items() if abs(predicted_gb / (factor * gigabytes) - 1) < 0.02), "12 bytes for each trained weight")
        fail(words, f"{wanted:,} weights that train", got=predicted_gb)


@exercise("train_adapters", after=["LoRALinear", "add_lora"])
def check_train_adapters(train_adapters):
    for r, alpha, names in ((2, 8.0, ["second"]), (1, 3.0, ["first", "second"])):
        torch.manual_seed(r)
        plain = tree(first=nn.Linear(6, 8), act=nn.Tanh(), second=nn.Linear(8, 3))
        x, y = torch.randn(16, 6), torch.randn(16, 3)
        start = (plain(x) - y).square().mean().item()
        given = f"a model of two layers, random x (16, 6) and y (16, 3), adapters on {names}, r = {r}, alpha = {alpha:g}"
        result = train_adapters(copy.deepcopy(plain), names, x, y, r, alpha)
        if not (isinstance(result, tuple | list) and len(result) == 2 and isinstance(result[0], float) and isinstance(result[1], dict)):
            fail("it must return the last loss and a dict", given, "a number and a dict", "nothing" if result is None else result)
        loss, changes = result
        if sorted(changes) != names:
            fail("the dict must have the full names of the layers", given, names, list(changes))
        for name, change in changes.items():
            shaped(change, plain.get_submodule(name).weight.shape, f"{given}: what to add to {name}")
        if abs(loss - start) < 1e-6 and not any(change.any() for change in changes.values()):
            fail("the loss stands still and the adapters are as they were: the optimiser was made before they were there, and the old weights, "
                 "which are all that it has, are frozen", given, f"less than {start:.4f}", f"{loss:.4f}")  # fmt: skip
        if not any(change.any() for change in changes.values()):
            fail("the loss fell, but the adapters have not moved: the old weights were trained, and they must stay as they are", given)
        now = loss_with(plain, changes, x, y)
        if abs(now - loss) > 1e-4 * max(1.0, loss):
            words = "the old weights plus the changes are not the model that was trained: are the old weights frozen?"
            scaled = loss_with(plain, {name: alpha / r * change for name, change in changes.items()}, x, y)
            if abs(scaled - loss) < 1e-4 * max(1.0, loss):
                words = "one bug is left: the model learned, but the changes that are returned are too small: alpha / r is missing"
            fail(words, f"{given}: the loss with the changes added to a fresh model", f"{loss:.4f}", f"{now:.4f}")
        if loss > 0.9 * start:
            fail("it learns hardly anything: in 40 steps the loss must fall by a tenth", given, f"less than {0.9 * start:.4f}", f"{loss:.4f}")
        for name, change in changes.items():
            if (rank := int(torch.linalg.matrix_rank(change.detach(), rtol=1e-4))) > r:
                fail("the change has a higher rank than its adapter can have", f"{given}: {name}", r, rank)


def loss_with(plain: nn.Module, changes: dict, x: torch.Tensor, y: torch.Tensor) -> float:
    """The loss of a model with these changes added to its weights."""
    model = copy.deepcopy(plain)
    with torch.no_grad():
        for name, change in changes.items():
            model.get_submodule(name).weight.add_(change)
        return (model(x) - y).square().mean().item()


def by_rows(weight: torch.Tensor, change: torch.Tensor, magnitude: list[float] | None = None) -> torch.Tensor:
    """DoRA's matrix, one row at a time."""
    rows = []
    for i, (old, new) in enumerate(zip(weight.tolist(), (weight + change).tolist(), strict=True)):
        length = math.hypot(*new)
        wanted = math.hypot(*old) if magnitude is None else magnitude[i]
        rows.append([wanted * value / length for value in new])
    return torch.tensor(rows)


@exercise("dora_weight")
def check_dora_weight(dora_weight):
    weight, change = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]), torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, 1.0]])
    given = "W = [[3, 4], [0, 2], [1, 0]]"
    zero = torch.zeros(3, 2)
    got = dora_weight(weight, zero)
    shaped(got, (3, 2), f"{given}, no change", hint="it has the shape of W: (out, in)")
    equal(got, weight, f"{given}, no change", "without a change, W must come out", {
        "these are directions of length one; multiply each row by its magnitude": by_rows(weight, zero, [1.0, 1.0, 1.0]),
        "the norm is that of the columns; it must be that of each row (each output)": weight.norm(dim=1)[:, None] * weight / weight.norm(dim=0),
        "the norm is that of the whole matrix; it must be that of each row": weight.norm(dim=1)[:, None] * weight / weight.norm(),
        "each row is still multiplied by its length: divide by the norm": weight.norm(dim=1)[:, None] * weight,
    })  # fmt: skip
    given += ", dW = [[1, -1], [2, 0], [0, 1]]"
    turned, lengths, before = weight + change, weight.norm(dim=1), weight.clone()
    dora_weight(weight, change)
    unchanged("weight", before, weight)
    equal(dora_weight(weight, change), by_rows(weight, change), given, "the rows must point along W + dW, and be as long as those of W", {
        "the change is not used": weight,
        "this is plain LoRA, W + dW: the rows must be as long as those of W, so divide by the norms of W + dW and multiply by those of W": turned,
        "W is divided by its length before the change is added; divide the sum": weight + lengths[:, None] * change,
    })  # fmt: skip
    equal(dora_weight(weight, change, torch.tensor([2.0, 1.0, 3.0])), by_rows(weight, change, [2.0, 1.0, 3.0]), f"{given}, magnitude = [2, 1, 3]",
          "the rows must have the lengths that are given", {
        "magnitude is not used": by_rows(weight, change),
        "magnitude multiplies the lengths of W; it takes their place": by_rows(weight, change, [10.0, 2.0, 3.0]),
    })  # fmt: skip
    for out, into in ((4, 7), (6, 6), (5, 2)):
        weight, change = torch.randn(out, into), torch.randn(out, into)
        before, wanted = change.clone(), by_rows(weight, change)
        equal(dora_weight(weight, change), wanted, f"random W and dW ({out}, {into})", "right for a small matrix, and not here")
        unchanged("change", before, change)
    _gradients_of_dora(dora_weight)


def _gradients_of_dora(dora_weight) -> None:
    weight, upstream = torch.randn(3, 4), torch.randn(3, 4)
    change, magnitude = torch.randn(3, 4).requires_grad_(), torch.tensor([1.0, 2.0, 0.5]).requires_grad_()
    got = dora_weight(weight, change, magnitude)
    given = "random W and dW (3, 4), magnitude [1, 2, 0.5]"
    if not got.requires_grad:
        fail("no gradient gets through; only the norm is detached", given)
    (got * upstream).sum().backward()
    turned = (weight + change).detach()
    lengths = turned.norm(dim=1, keepdim=True)
    direction = turned / lengths
    constant = magnitude.detach()[:, None] / lengths * upstream
    if change.grad is None or not change.grad.any():
        fail("no gradient reaches dW: only the norm is detached, not what is divided by it", given)
    if magnitude.grad is None:
        fail("no gradient reaches the magnitude: only the norm is detached", given)
    equal(change.grad, constant, f"{given}: the gradient of dW", "with the norm as a constant, the gradient is m / norm times the one that arrives", {
        "a gradient flows through the norm: detach it": constant - direction * (constant * direction).sum(dim=1, keepdim=True),
    })  # fmt: skip
    equal(magnitude.grad, (upstream * direction).sum(dim=1), f"{given}: the gradient of the magnitude", "the magnitude's gradient is not right")


@exercise("first_step", after=["LoRALinear"])
def check_first_step(predicted_plain, predicted_root, first_step, measured):
    for r, alpha in ((8, 1.0), (32, 8.0), (128, 8.0), (32, 32.0)):
        got, wanted = first_step(r, alpha), (alpha / r) ** 2 * r / 3  # (A x) has mean squares of 1/3
        given = f"first_step({r}, {alpha:g})"
        if not isinstance(got, float):
            fail("return one number, not a tensor", given, f"about {wanted:.3g}", "nothing" if got is None else repr(got))
        mistakes = {
            "the sum over the outputs was taken; the mean over them was asked for": 128,
            "the sum over the seeds was taken; the mean over them was asked for": 30,
            "the scale counts twice: once in the gradient of B and once in what B adds": r / alpha,
            "the output rose: subtract the gradient, and measure before minus after": -1,
            "the loss is the sum of the outputs; here it is their mean": 1 / 128,
        }
        if not 0.7 < got / wanted < 1.3:
            words = "after one step of learning rate 1 on B the output should have fallen by another distance"
            words = next((w for w, factor in mistakes.items() if abs(factor - 1) > 0.3 and 0.7 < got / (factor * wanted) < 1.3), words)
            if got == 0:
                words = "nothing moved: is the output before kept, and the layer asked again after the step?"
            fail(words, given, f"about {wanted:.3g}", f"{got:.3g}")
        if abs(got / wanted - 1) < 1e-6:
            fail("this is the formula; measure it", given, got=got)
        if first_step(r, alpha) != got:
            fail("two calls give two numbers: set the seed before each layer is made", given, got, first_step(r, alpha))
    alphas = {"plain": lambda r: 8, "root": lambda r: 8 * math.sqrt(r)}
    whole = isinstance(measured, dict) and set(measured) == set(alphas)
    if not whole or not all(isinstance(row, dict) and set(row) == {8, 32, 128} for row in measured.values()):
        fail('`measured` is {"plain": {8: ..., 32: ..., 128: ...}, "root": {8: ..., 32: ..., 128: ...}}', got=measured)
    for kind, alpha_for in alphas.items():
        for r, got in measured[kind].items():
            wanted = first_step(r, alpha_for(r))
            if not isinstance(got, int | float) or abs(got / wanted - 1) > 1e-3:
                words = f"measured[{kind!r}][{r}] is not what your function gives at a scale of {alpha_for(r) / r:.3g}"
                if kind == "root" and got == measured["plain"][r]:
                    words = "these are the plain ones: to divide by the root with a layer that divides by r, hand it a larger alpha"
                fail(words, "alpha = 8", f"{wanted:.4g}", got)
    for name, got, wanted in (("predicted_plain", predicted_plain, 16), ("predicted_root", predicted_root, 1)):
        if isinstance(got, bool) or not isinstance(got, int | float):
            fail(f"{name} must be a number", got=got)
        if abs(got / wanted - 1) > 0.005:
            words = f"your measurement disagrees with {name}: divide the step at rank 8 by that at rank 128, think why, and correct it"
            if abs(got * wanted - 1) < 0.01:
                words = f"{name} is upside down: how many times smaller is the step at rank 128?"
            elif abs(got / wanted - 1) < 0.2:
                words = f"{name} is close; the exact factor of the mean was asked for, and it is a power of two"
            fail(words, got=got)
