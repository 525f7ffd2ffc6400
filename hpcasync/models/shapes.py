"""The shapes that models accept."""

from __future__ import annotations

from collections.abc import Sequence

from hpcasync.errors import UsageError


def image(model: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """``shape`` as ``(C, H, W)``.

    Raises:
        UsageError: the samples are no images.
    """
    if len(shape) != 3:
        raise UsageError(
            f"model {model!r} takes images (C, H, W), the samples have shape {tuple(shape)}; choose mlp or "
            "logistic, or reshape the data"
        )
    channels, height, width = shape
    return channels, height, width
