"""LeNet-5 with ReLU and max-pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hpcasync.models.shapes import image

_SIDE = 32  # the input of the paper; smaller images get a border of zeros


def lenet5(shape: Sequence[int], classes: int) -> nn.Module:
    """Convolutions of 6 and 16 maps (5 x 5), each pooled, then 120, 84, ``classes``.

    Images below 32 x 32 are padded to it on all sides, as the paper does with 28 x 28; larger ones are taken
    as they are. 61 706 parameters for one channel and ten classes.

    Args:
        shape: ``(C, H, W)``.
        classes: the number of outputs.

    Source: LeCun, Bottou, Bengio & Haffner 1998, "Gradient-based learning applied to document recognition".
    """
    channels, height, width = image("lenet5", shape)
    extra_h, extra_w = max(0, _SIDE - height), max(0, _SIDE - width)
    left, top = extra_w // 2, extra_h // 2
    rows, columns = ((max(_SIDE, side) - 4) // 2 for side in (height, width))
    features = 16 * ((rows - 4) // 2) * ((columns - 4) // 2)
    return nn.Sequential(
        nn.ZeroPad2d((left, extra_w - left, top, extra_h - top)),
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(features, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )
