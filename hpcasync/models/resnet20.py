"""ResNet-20 for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hpcasync.models.shapes import image


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut without parameters (option A of the paper).

    Args:
        inputs: channels in.
        outputs: channels out; more channels than before are filled with zeros in the shortcut.
        stride: 1, or 2 to halve the image.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.extra = outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + shortcut)


def resnet20(shape: Sequence[int], classes: int) -> nn.Module:
    """Three stages of three blocks with 16, 32, 64 channels; 269 722 parameters for three channels and ten
    classes.

    Args:
        shape: ``(C, H, W)``.
        classes: the number of outputs.

    Source: He, Zhang, Ren & Sun 2016, "Deep residual learning for image recognition", section 4.2, n = 3;
    weights start as in He et al. 2015.
    """
    channels, _, _ = image("resnet20", shape)
    blocks = [Block(16, 16, 1) for _ in range(3)]
    for inputs, outputs in ((16, 32), (32, 64)):
        blocks += [Block(inputs, outputs, 2), Block(outputs, outputs, 1), Block(outputs, outputs, 1)]
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
