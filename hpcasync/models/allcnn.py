"""All-CNN-C: only convolutions, strides in place of pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hpcasync.models.shapes import image


def allcnn(shape: Sequence[int], classes: int) -> nn.Module:
    """Nine convolutions and a global average; 1 369 738 parameters for three channels and ten classes.

    The last 3 x 3 convolution keeps its border (the paper drops it), so that images of any size, down to one
    pixel, go through.

    Args:
        shape: ``(C, H, W)``.
        classes: the number of outputs.

    Source: Springenberg, Dosovitskiy, Brox & Riedmiller 2015, "Striving for simplicity: the all convolutional
    net", tables 1 and 2, model C.
    """
    channels, _, _ = image("allcnn", shape)
    return nn.Sequential(
        nn.Dropout(0.2),
        *_layer(channels, 96),
        *_layer(96, 96),
        *_layer(96, 96, stride=2),
        nn.Dropout(0.5),
        *_layer(96, 192),
        *_layer(192, 192),
        *_layer(192, 192, stride=2),
        nn.Dropout(0.5),
        *_layer(192, 192),
        *_layer(192, 192, side=1),
        *_layer(192, classes, side=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _layer(inputs: int, outputs: int, *, side: int = 3, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2), nn.ReLU()
