"""A network of your own, made small and fast with a folder of images that nobody has labelled.

    tersor compress examples/my_model.py:net --weights my_weights.pt --data folder:photos \\
        --size "8x smaller" --drop 1 --out small

`photos` holds images, in any folders; photos/dataset.json may say {"size": [32, 32], "mean": [...], "std": [...]}
as they were in training. small/model.tersor runs anywhere, without this file and without torch.
"""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two stages with a shortcut each, and a head: whatever runs can be compressed."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.left = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.last = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W)."""
        x = self.stem(images)
        x = torch.relu(x + self.norm(self.left(x)))
        x = torch.relu(self.last(self.down(x)))
        return self.head(x.mean((2, 3)))


def net() -> nn.Module:
    """What the command line calls; --weights puts the trained weights in."""
    return Net()
