"""The base steps in plain numpy, one formula each: what the kernels must equal, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

f32 = np.float32


def base_step(
    base: str, state: dict[str, np.ndarray], grad: np.ndarray, group: Mapping[str, Any], count: int
) -> tuple[np.ndarray, np.float32]:
    """The step ``d = -lr u`` of a base optimizer, and the factor that decoupled weight decay puts on ``w``.

    Updates the base's vectors in ``state`` (float32). Source: torch.optim, the optimizers of the same names; ema: torch's
    SGD with dampening = momentum, but for its first step.
    """
    lr, decay, eps = f32(group["lr"]), group["weight_decay"], f32(group["eps"])
    keep = f32(1)
    g = grad
    if base == "adamw":
        keep = f32(1 - group["lr"] * decay)
    elif decay:
        g = g + f32(decay) * state["w"]
    if base == "sgd":
        return -lr * g, keep
    if base in ("momentum", "nesterov"):
        mu = f32(group["momentum"])
        v = state["momentum_buffer"] = mu * state["momentum_buffer"] + g
        return -lr * (g + mu * v if base == "nesterov" else v), keep
    if base == "ema":
        mu = group["momentum"]
        v = state["momentum_buffer"] = f32(mu) * state["momentum_buffer"] + f32(1 - mu) * g
        return -lr * v, keep
    if base == "rmsprop":
        a = group["alpha"]
        s = state["square_avg"] = f32(a) * state["square_avg"] + f32(1 - a) * g * g
        return -lr * g / (np.sqrt(s) + eps), keep
    if base == "adagrad":
        s = state["sum"] = state["sum"] + g * g
        return -lr * g / (np.sqrt(s) + eps), keep
    b1, b2 = group["betas"]
    m = state["exp_avg"] = state["exp_avg"] + f32(1 - b1) * (g - state["exp_avg"])
    s = state["exp_avg_sq"] = f32(b2) * state["exp_avg_sq"] + f32(1 - b2) * g * g
    if base == "amsgrad":
        s = state["max_exp_avg_sq"] = np.maximum(state["max_exp_avg_sq"], s)
    step = f32(group["lr"] / (1 - b1**count))
    root = f32(np.sqrt(1 - b2**count))
    return -step * m / (np.sqrt(s) / root + eps), keep
