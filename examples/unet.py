"""A small U-Net (Ronneberger et al. 2015): down to coarse features level by level, then up with skip connections."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def convolutions(channels_in: int, channels_out: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch normalization and ReLU."""
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers += [
            nn.Conv2d(channels, channels_out, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Maps images (N, 3, H, W) to logits (N, classes, H, W); any H and W of at least 2 ** (levels - 1).

    `width` is the number of channels at full resolution; it doubles with every level.
    """

    def __init__(self, classes: int, width: int = 12, levels: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(convolutions(a, b) for a, b in itertools.pairwise([3, *widths]))
        self.up = nn.ModuleList(convolutions(a + b, a) for a, b in itertools.pairwise(widths))
        self.head = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        skips: list[Tensor] = []
        features = images
        for level, block in enumerate(self.down):
            features = block(features if level == 0 else F.max_pool2d(features, 2))
            skips.append(features)
        features = skips.pop()
        for block in reversed(self.up):
            skip = skips.pop()
            # To the size of the skip, not by a factor of 2: pooling rounds odd sizes down.
            features = F.interpolate(features, size=skip.shape[-2:], mode="nearest")
            features = block(torch.cat([skip, features], dim=1))
        return self.head(features)
