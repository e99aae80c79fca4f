"""Independent references, and what it takes to compare with them.

Nothing here calls the code under test: attention is a loop over batch, heads and queries, and the
rules of a mask are read from its fields, one pair of positions at a time.
"""

import math
import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from transformer_annotated import Mask

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def draw(*shape: int, seed: object, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on `seed` alone; drawn in float64, so equal in every dtype."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter of `module` anew, keyed by (seed, name).

    A fresh norm has weight 1 and bias 0, and fresh biases are 0: an error in them would not show.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            new = draw(*parameter.shape, seed=(seed, name), dtype=torch.float64)
            if parameter.ndim >= 2:
                new = new / math.sqrt(parameter.shape[-1])
            else:
                new = 0.5 * new + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            parameter.copy_(new)
    return module


def assert_close(ours: Tensor, theirs: Tensor, what: str = "output", tolerance: float = 0) -> None:
    """Equal within the tolerance of the dtype, and of the same shape and dtype."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} != {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype} != {theirs.dtype}"
    assert bool(torch.isfinite(ours).all()), f"{what} is not finite"
    worst = (ours - theirs).abs().max().item() if ours.numel() else 0.0
    allowed = tolerance or TOLERANCE[ours.dtype]
    assert worst <= allowed, f"{what} differs by {worst:.3g}, more than {allowed:.3g}"


def gradients(output: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of a fixed random weighting of `output` with respect to each leaf.

    The weighting has mean-square 1 over the whole tensor, so gradients do not grow with its size.
    """
    weighting = draw(*output.shape, seed="weighting", dtype=output.dtype)
    loss = (output * weighting).sum() / math.sqrt(output.numel())
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def assert_same(
    ours: Tensor,
    theirs: Tensor,
    our_leaves: Mapping[str, Tensor],
    their_leaves: Mapping[str, Tensor] | None = None,
) -> None:
    """Equal outputs, and equal gradients for each pair of leaves of the same name."""
    assert_close(ours, theirs)
    our_gradients = gradients(ours, our_leaves)
    their_gradients = gradients(theirs, their_leaves or our_leaves)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert_close(gradient, their_gradients[name], f"gradient of {name}")


# A mask, one pair at a time ---------------------------------------------------------------------


def may_see(mask: Mask | None, b: int, i: int, j: int, T: int, S: int) -> bool:
    """Whether query i of T may see key j of S in sentence b; the last query is at the last key."""
    if mask is None:
        return True
    here = S - T + i
    if mask.causal and j > here:
        return False
    if mask.window is not None and abs(here - j) >= mask.window:
        return False
    if mask.padding is not None and not mask.padding[b, j]:
        return False
    if mask.allowed is not None:
        rule = mask.allowed if mask.allowed.ndim == 2 else mask.allowed[b % len(mask.allowed)]
        return bool(rule[i, j])
    return True


def loop_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention as the definition reads: for each query, a weighted mean of the visible values."""
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    output = []
    for b in range(B):
        for h in range(H):
            kv = h // (H // K)  # H/K neighbouring query heads share one key head
            for i in range(T):
                seen = [j for j in range(S) if may_see(mask, b, i, j, T, S)]
                if not seen:
                    output.append(0.0 * (q[b, h, i].sum() + k.sum()) + 0.0 * v[b, kv].sum(dim=0))
                    continue
                scores = []
                for j in seen:
                    score = (q[b, h, i] * k[b, kv, j]).sum()
                    score = score / math.sqrt(d) if scale is None else score * scale
                    if softcap is not None:
                        score = softcap * torch.tanh(score / softcap)
                    if bias is not None:
                        score = score + bias.expand(B, H, T, S)[b, h, i, j]
                    scores.append(torch.exp(score))
                total = torch.stack(scores).sum()
                weighted = [e / total * v[b, kv, j] for e, j in zip(scores, seen, strict=True)]
                output.append(torch.stack(weighted).sum(dim=0))
    return torch.stack(output).view(B, H, T, -1)


# Weights of torch's own Transformer --------------------------------------------------------------

ATTENTION = {
    "in_proj_weight": ["q_proj.weight", "k_proj.weight", "v_proj.weight"],
    "in_proj_bias": ["q_proj.bias", "k_proj.bias", "v_proj.bias"],
    "out_proj.weight": ["out_proj.weight"],
    "out_proj.bias": ["out_proj.bias"],
}


def layer_map(cross: bool) -> dict[str, list[str]]:
    """For each tensor of a stock layer, those of ours that it holds, one below the other."""
    parts = {"self_attn": "self_attention"}
    parts |= {"multihead_attn": "cross_attention"} if cross else {}
    names = {
        f"{theirs}.{name}": [f"{ours}.{part}" for part in sources]
        for theirs, ours in parts.items()
        for name, sources in ATTENTION.items()
    }
    norms = [*parts.values(), "ffn"]
    for kind in ("weight", "bias"):
        names[f"linear1.{kind}"] = [f"ffn.up.{kind}"]
        names[f"linear2.{kind}"] = [f"ffn.down.{kind}"]
        for number, sublayer in enumerate(norms, start=1):
            names[f"norm{number}.{kind}"] = [f"residuals.{sublayer}.norm.{kind}"]
    return names


def model_map(encoder: int, decoder: int, final_norm: bool) -> dict[str, list[str]]:
    """The same for a whole `nn.Transformer` of that many layers."""
    names = {}
    for stack, depth, cross in (("encoder", encoder, False), ("decoder", decoder, True)):
        for i in range(depth):
            for theirs, ours in layer_map(cross).items():
                prefix = f"{stack}.layers.{i}."
                names[prefix + theirs] = [prefix + name for name in ours]
        if final_norm:
            for kind in ("weight", "bias"):
                names[f"{stack}.norm.{kind}"] = [f"{stack}.norm.{kind}"]
    return names


def gather(names: Mapping[str, Iterable[str]], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors, joined and renamed as the stock module has them."""
    return {theirs: torch.cat([ours[name] for name in parts]) for theirs, parts in names.items()}


def copy_weights(names: Mapping[str, list[str]], ours: nn.Module, theirs: nn.Module) -> None:
    """Load our weights into a stock module; a tensor left out or left over is an error."""
    theirs.load_state_dict(gather(names, ours.state_dict()), strict=True)


def assert_same_model(
    names: Mapping[str, list[str]],
    ours: nn.Module,
    theirs: nn.Module,
    our_output: Tensor,
    their_output: Tensor,
    inputs: Mapping[str, Tensor],
) -> None:
    """Equal outputs, and equal gradients for the inputs and for each mapped parameter."""
    assert_close(our_output, their_output)
    mapped = {name for parts in names.values() for name in parts}
    parameters = {k: p for k, p in ours.named_parameters() if k in mapped}
    assert parameters.keys() == mapped
    our_gradients = gradients(our_output, {**inputs, **parameters})
    their_gradients = gradients(
        their_output, {**inputs, **{k: p for k, p in theirs.named_parameters() if k in names}}
    )
    for name in inputs:
        assert_close(our_gradients[name], their_gradients[name], f"gradient of {name}")
    for name, gradient in gather(names, our_gradients).items():
        assert_close(gradient, their_gradients[name], f"gradient of {name}")
