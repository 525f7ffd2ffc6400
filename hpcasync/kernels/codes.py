"""What a pass is made of, in numbers: the stages' codes, and the places of their settings in the vectors a kernel reads."""

from __future__ import annotations

BASES = {"sgd": 0, "momentum": 1, "nesterov": 2, "rmsprop": 3, "adam": 4, "adamw": 5, "amsgrad": 6, "ema": 7, "adagrad": 8}
"""Codes of the base steps; their state vectors are named in ``hpcasync.rules.base``."""

VARIANTS = {"none": 0, "opposed": 1, "opposed-strength": 2, "consistency": 3, "rate": 4}
"""Codes of the modifiers."""

GRADIENTS = {"own": 0, "compensated": 1, "compensated-adaptive": 2, "sum": 3, "ring": 4, "round": 5, "groups": 6}
"""Codes of the gradient stages: which gradient the base step is given."""

PLAN = {
    name: i
    for i, name in enumerate(
        ("base", "variant", "masked", "vectors", "gradient", "window", "uncorrected", "guarded", "boxed", "own_copy")
    )
}
"""Places of the settings that are whole numbers and that a rule fixes once: codes, rows, yes or no."""

HYPER = {
    name: i
    for i, name in enumerate(
        (
            "lr", "weight_decay", "momentum", "alpha", "beta1", "beta2", "eps",
            "trend_beta", "shrink", "floor", "up", "down",
            "compensation", "square_decay", "square_eps", "low", "high", "moving_rate",
        )
    )
}  # fmt: skip
"""Places of the hyper-parameters in the ``hyper`` vector."""
