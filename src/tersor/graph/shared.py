"""A convolution that stores a part of its filters and makes the others from them."""

from __future__ import annotations

import torch
from torch import nn

from tersor.tensors.orbits import SharedFilters, num_images


class SharedConv2d(nn.Module):
    """A 2-D convolution of `out_channels` filters of which one in `images` is stored.

    Filter o is `scale`[o] times image `element`[o] of the stored filter `source`[o], with the images
    of `transform` (see `tensors.orbits`). With "negate" an image is the stored filter itself, so the
    stored ones alone are convolved and their outputs copied: half the multiplications. `weight`
    (out_channels / images, in_channels, kh, kw), `scale` (out_channels,) and `bias` are learned;
    `source` and `element` (out_channels,) int64 are part of the state dict.
    """

    source: torch.Tensor
    element: torch.Tensor

    def __init__(self, like: nn.Conv2d, transform: str) -> None:
        """A layer of the sizes, type and place of `like` (ungrouped), all its filters zero."""
        super().__init__()
        weight = like.weight
        stored = len(weight) // num_images(transform)
        self.transform = transform
        self.out_channels, self.in_channels = like.out_channels, like.in_channels
        self.kernel_size, self.stride, self.dilation = like.kernel_size, like.stride, like.dilation
        self.padding, self.padding_mode = like.padding, like.padding_mode
        self._edges = list(like._reversed_padding_repeated_twice)
        self.weight = nn.Parameter(weight.new_zeros(stored, *weight.shape[1:]))
        self.scale = nn.Parameter(weight.new_zeros(len(weight)))
        self.bias = None if like.bias is None else nn.Parameter(torch.zeros_like(like.bias))
        for name in ("source", "element"):
            places = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
            self.register_buffer(name, places)
        self.requires_grad_(weight.requires_grad).train(like.training)

    def fill_(self, filters: SharedFilters) -> None:
        """Take over fitted filters."""
        with torch.no_grad():
            self.weight.copy_(filters.bases)
            self.scale.copy_(filters.scale)
            self.source.copy_(filters.source)
            self.element.copy_(filters.element)

    def filters(self) -> torch.Tensor:
        """All filters (out_channels, in_channels, kh, kw), made from the stored ones."""
        stored = SharedFilters(self.transform, self.weight, self.source, self.element, self.scale)
        return stored.filters()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Outputs (N, out_channels, H, W) of `images` (N, in_channels, H, W)."""
        negated = self.transform == "negate"
        weight = self.weight if negated else self.filters()
        bias = None if negated else self.bias
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            images = nn.functional.pad(images, self._edges, mode=self.padding_mode)
            padding = (0, 0)
        outputs = nn.functional.conv2d(images, weight, bias, self.stride, padding, self.dilation)
        if not negated:
            return outputs
        outputs = outputs.index_select(1, self.source)
        outputs = outputs * self.scale.to(outputs.dtype)[:, None, None]
        if self.bias is None:
            return outputs
        return outputs + self.bias.to(outputs.dtype)[:, None, None]

    def plain(self) -> nn.Conv2d:
        """The ordinary convolution that computes the same, all its filters stored."""
        layer: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            layer.weight.copy_(self.filters())
            if self.bias is not None and layer.bias is not None:
                layer.bias.copy_(self.bias)
        return layer.requires_grad_(self.weight.requires_grad).train(self.training)

    def extra_repr(self) -> str:
        """What the printed form tells."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, stored={len(self.weight)}, transform={self.transform}"
        )
