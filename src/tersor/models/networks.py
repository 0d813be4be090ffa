"""The study's networks and the small one of the demonstration, all by torchvision's names and parameters."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from tersor.errors import ModelError


def resnet18(num_classes: int = 10) -> nn.Module:
    """torchvision's ResNet-18 (He 2016) with a 3x3 stem of stride 1 and no first pooling, for 32x32 images:
    11.17 M parameters at 10 classes."""
    from torchvision.models import resnet18 as build

    module: nn.Module = build(num_classes=num_classes)
    module.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    module.maxpool = nn.Identity()
    return module


def vgg16(num_classes: int = 1000) -> nn.Module:
    """torchvision's VGG-16 (Simonyan 2015), ImageNet shape: 138.36 M parameters at 1000 classes."""
    from torchvision.models import vgg16 as build

    module: nn.Module = build(num_classes=num_classes)
    return module


def vgg16_bn(num_classes: int = 1000) -> nn.Module:
    """torchvision's VGG-16 with batch normalisation."""
    from torchvision.models import vgg16_bn as build

    module: nn.Module = build(num_classes=num_classes)
    return module


def torchvision_model(name: str, num_classes: int | None) -> nn.Module:
    """Any classifier of torchvision by its own name, untrained. Raises UnknownNameError."""
    from torchvision import models

    from tersor.errors import UnknownNameError
    from tersor.registry import did_you_mean

    names = models.list_models(module=models)
    if name not in names:
        raise UnknownNameError(
            f"unknown torchvision model {name!r}; torchvision {len(names)} classifiers are listed by "
            "torchvision.models.list_models()." + did_you_mean(name, names)
        )
    options = {} if num_classes is None else {"num_classes": num_classes}
    try:
        module: nn.Module = models.get_model(name, **options)
    except (TypeError, ValueError) as error:
        raise ModelError(f"torchvision:{name} cannot be built with {options}: {error}") from None
    return module


class DigitsNet(nn.Module):
    """Three convolutions and a linear layer for 8x8 digits: input (N, 1, 8, 8), output (N, num_classes)."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        widths = (1, 32, 64, 64)
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(narrow, wide, 3, padding=1, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU(inplace=True),
            ]
        layers.insert(6, nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(256, 128), nn.ReLU(inplace=True), nn.Linear(128, num_classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, 1, 8, 8)."""
        return self.classifier(torch.flatten(self.pool(self.features(images)), 1))  # type: ignore[no-any-return]


def digits_net(num_classes: int = 10) -> nn.Module:
    """The demonstration's network for scikit-learn's digits."""
    return DigitsNet(num_classes)
