"""Filter skeletons: the learned importance of every stripe, one position of one filter ("Pruning Filter in Filter",
Meng 2020)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from tersor.errors import ModelError


class Skeletons(nn.Module):
    """A skeleton I (O, kh, kw) for every convolution with a kernel larger than 1x1, from ones.

    The weight in use is W * I, spread over the inputs (eq. 2). W and I are what the optimizer sees, while
    the network itself always holds the product: it stays an ordinary network, whatever runs it. By the
    chain rule, G being the gradient of the product, W has G * I and I has the sum over inputs of G * W,
    and from strength * sum |I| (eq. 4) strength * sign(I).
    """

    def __init__(self, network: nn.Module, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.names: list[str] = []
        self.products: list[nn.Parameter] = []
        for name, layer in network.named_modules():
            if not isinstance(layer, nn.Conv2d) or layer.kernel_size == (1, 1):
                continue
            if parametrize.is_parametrized(layer, "weight"):
                continue
            weight = layer.get_parameter("weight")
            if not weight.requires_grad or any(weight is held for held in self.products):
                continue
            self.names.append(name)
            self.products.append(weight)
        if not self.names:
            raise ModelError(
                f"stripes: {type(network).__name__} has no convolution with a kernel larger than 1x1 and a "
                "trainable weight of its own; train without stripes"
            )
        self.weights = nn.ParameterList(p.detach().clone() for p in self.products)
        self.skeletons = nn.ParameterList(
            torch.ones(p.shape[0], *p.shape[2:], device=p.device) for p in self.products
        )

    @torch.no_grad()
    def split_gradients_(self) -> None:
        """Turn the gradients of the products into those of weights and skeletons."""
        for product, weight, skeleton in self._parts():
            if product.grad is None:
                weight.grad = skeleton.grad = None
                continue
            weight.grad = product.grad * skeleton[:, None]
            skeleton.grad = (
                (product.grad * weight).sum(1).add_(skeleton.sign(), alpha=self.strength)
            )
            product.grad = None

    @torch.no_grad()
    def fold_(self) -> None:
        """Put the products into the network."""
        for product, weight, skeleton in self._parts():
            torch.mul(weight, skeleton[:, None], out=product)

    def _parts(self) -> list[tuple[nn.Parameter, nn.Parameter, nn.Parameter]]:
        return list(zip(self.products, self.weights, self.skeletons, strict=True))
