"""What the attention layers of a model do while it draws: their routing, their attention maps, and their factors."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dydila_kernels import DyDiLAttention, reference
from examples.dydi_lit.layers import ReLULinearAttention, SoftmaxAttention
from examples.dydi_lit.model import DiffusionTransformer


def attention_layers(model: DiffusionTransformer) -> list[nn.Module]:
    """The attention layer of every block, in order."""
    return [block.attention for block in model.blocks]  # type: ignore[misc]


class Usage:
    """How often each class of image took each choice of each router, per block."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def add(self, block: int, attention: DyDiLAttention, x: Tensor, labels: Tensor, num_classes: int) -> None:
        """Counts the decisions for tokens x (B, N, d) of images of the classes `labels` (B,).

        A label of `num_classes` or more, which is no class, is left out.
        """
        routing = attention.routing(x)
        for name, index in routing.indices.items():
            choices = len(routing.usage[name])
            of_class = labels < num_classes
            places = (labels[of_class, None] * choices + index[of_class]).flatten()
            counted = torch.bincount(places, minlength=num_classes * choices).view(num_classes, choices).cpu()
            before = self.counts[name].get(block)
            self.counts[name][block] = counted if before is None else before + counted

    def shares(self, name: str, classes: Sequence[int]) -> Tensor:
        """(blocks, classes, choices) float64: the share of the tokens that took each choice of router `name`.

        The names are those of `dydila_kernels.Routing`; KeyError where no layer has such a router. A class that was
        never drawn has NaN.
        """
        if name not in self.counts:
            raise KeyError(name)
        counts = torch.stack([counts for _, counts in sorted(self.counts[name].items())])[:, list(classes)].double()
        return counts / counts.sum(-1, keepdim=True)


@contextmanager
def watching(
    model: DiffusionTransformer, see: Callable[[int, nn.Module, Tensor, Tensor, Tensor], None]
) -> Iterator[None]:
    """Calls `see(block, attention, x, timesteps, labels)` before every attention layer of every pass.

    x (B, N, d) are the layer's tokens, timesteps and labels (B,) what the model was given.
    """
    given: dict[str, Tensor] = {}

    def remember(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        given["timesteps"], given["labels"] = arguments[1], arguments[2]

    def look_of(block: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, arguments: see(block, layer, arguments[0], given["timesteps"], given["labels"])

    hooks = [model.register_forward_pre_hook(remember)]
    hooks += [layer.register_forward_pre_hook(look_of(block)) for block, layer in enumerate(attention_layers(model))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class AttentionMap:
    """The weights (N,) float32 of one query token on all keys; their magnitudes sum to 1."""

    title: str
    formula: str
    weights: Tensor

    @property
    def entropy(self) -> float:
        """Of the magnitudes, as a share of its largest value log N: 1 is even, 0 is one key."""
        magnitudes = self.weights.abs()
        return float(torch.special.entr(magnitudes).sum() / max(torch.tensor(len(magnitudes)).log(), 1e-12))

    @property
    def largest_tenth(self) -> float:
        """The share of all magnitudes that the largest tenth of them holds; at least one counts."""
        return float(self.weights.abs().topk(max(len(self.weights) // 10, 1)).values.sum())


@torch.no_grad()
def attention_maps(attention: nn.Module, x: Tensor, query: int) -> list[AttentionMap]:
    """The attention of one token as the layer's components are added, within this one layer; x (N, d).

    The first map is what linear attention without any component makes of this layer's Q and K. Each next one takes
    one stage more of the same layer: nothing is trained anew. With several heads it is the mean over the heads. No
    map has the normalization of the layer in it, which scales the whole row, but in a layer of DiT the softmax. Layers
    without one weight for each token, those of PixArt-Sigma, EDiT and DiG, have no map.
    """
    if not isinstance(attention, SoftmaxAttention | ReLULinearAttention | DyDiLAttention):
        return []
    x = x[None]
    if isinstance(attention, SoftmaxAttention):
        q, k, _ = attention.qkv(x).chunk(3, dim=-1)
        q, k = (rearrange(t, "1 n (h e) -> h n e", h=attention.num_heads) for t in (q, k))
        logits = q[:, query, None] @ k.mT / q.shape[-1] ** 0.5
        return [_named("softmax attention", "softmax(QK$^T$/√e)", logits.softmax(-1).mean(0)[0])]

    heads = attention.num_heads

    def weights(q: Tensor, k: Tensor) -> Tensor:
        q, k = (rearrange(t, "1 n (h e) -> h n e", h=heads) for t in (q, k))
        return (q[:, query, None] @ k.mT).mean(0)[0]

    q, k, _ = attention.qkv(x).chunk(3, dim=-1)
    maps = [_named("linear attention", "ReLU(Q) ReLU(K)$^T$", weights(F.relu(q), F.relu(k)))]
    if isinstance(attention, ReLULinearAttention):
        return maps

    gamma, routers = attention.measure.gamma, attention.measure.routers()

    def measured(tokens: Tensor, number: int) -> Tensor:  # Eq. 6
        return reference.power(tokens, reference.choose(gamma, reference.route(tokens, routers[number])))

    if attention.differential is None:
        formula = "φ(Q) φ(K)$^T$"
        if attention.projection_q is not None and attention.projection_k is not None:
            q, k = attention.projection_q(x), attention.projection_k(x)
            maps.append(_named("dynamic projection", "ReLU(Q') ReLU(K')$^T$", weights(F.relu(q), F.relu(k))))
            formula = "φ(Q') φ(K')$^T$"
        return [*maps, _named("dynamic measure kernel", formula, weights(measured(q, 0), measured(k, 1)))]

    assert attention.projection_q is not None and attention.projection_k is not None
    qt, kt = measured(q, 0), measured(k, 1)
    qr, kr = measured(attention.projection_q(x), 2), measured(attention.projection_k(x), 3)
    maps.append(_named("dynamic measure kernel", "φ(Q) φ(K)$^T$", weights(qt, kt)))
    maps.append(_named("redundancy: routed projections", "φ(Q') φ(K')$^T$", weights(qr, kr)))

    lam, differential_routers = attention.differential.lam, attention.differential.routers()

    def factor(tokens: Tensor, redundant: Tensor, number: int) -> Tensor:  # Eq. 7
        pair = torch.cat([tokens, redundant], dim=-1)
        return reference.choose(lam, reference.route(pair, differential_routers[number]))

    lam_q = factor(qt, qr, 0)
    if attention.differential_kind == "map":  # Eq. 10
        difference = weights(qt, kt) - lam_q[0, query] * weights(qr, kr)
        return [*maps, _named("map differential", "φ(Q) φ(K)$^T$ − λ φ(Q') φ(K')$^T$", difference)]
    lam_k = factor(kt, kr, 1)
    difference = weights(reference.difference(qt, qr, lam_q), reference.difference(kt, kr, lam_k))  # Eq. 8
    return [*maps, _named("token differential", "(φ(Q)−λφ(Q')) (φ(K)−λφ(K'))$^T$", difference)]


def _named(title: str, formula: str, weights: Tensor) -> AttentionMap:
    total = weights.abs().sum()
    return AttentionMap(title, formula, (weights / torch.where(total > 0, total, 1)).cpu())


@dataclass(frozen=True)
class Lambdas:
    """The differential factors of a block: mean, least and greatest of the table, and the mean over the tokens."""

    mean: float
    least: float
    greatest: float
    used: float


def lambdas_of(model: DiffusionTransformer, usage: Usage, classes: Sequence[int]) -> list[Lambdas]:
    """One entry for each block; empty for a model without a token differential operator.

    `used` weighs each factor by how often the tokens of queries, and of keys where they have factors, took it.
    """
    layers = [layer for layer in attention_layers(model) if isinstance(layer, DyDiLAttention)]
    tables = [layer.differential.lam.detach().cpu().double() for layer in layers if layer.differential is not None]
    if not tables:
        return []
    sides = [name for name in ("differential_q", "differential_k") if name in usage.counts]
    shares = torch.stack([usage.shares(name, classes).mean(1) for name in sides]).mean(0)  # (blocks, choices)
    return [
        Lambdas(float(table.mean()), float(table.min()), float(table.max()), float(table @ share))
        for table, share in zip(tables, shares, strict=True)
    ]
