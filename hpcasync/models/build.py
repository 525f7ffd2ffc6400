"""Build a model from its name and check that it fits the data before any rank starts to train."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hpcasync.errors import UsageError, unknown
from hpcasync.models.allcnn import allcnn
from hpcasync.models.lenet5 import lenet5
from hpcasync.models.logistic import logistic
from hpcasync.models.mlp import mlp
from hpcasync.models.resnet20 import resnet20

MODELS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "logistic": logistic,
    "mlp": mlp,
    "lenet5": lenet5,
    "allcnn": allcnn,
    "resnet20": resnet20,
}
_ALIASES = {"lenet": "lenet5", "resnet": "resnet20"}


def known() -> tuple[str, ...]:
    """The names of the built-in models."""
    return tuple(MODELS)


def build(name: str, shape: Sequence[int], classes: int) -> nn.Module:
    """Build the model ``name`` for samples of ``shape`` and check it with one sample of zeros.

    Args:
        name: a built-in name, or ``package.module:function``; the function is called with ``shape=`` and
            ``classes=`` as far as it takes them, and returns the model.
        shape: of one sample: ``(C, H, W)`` or ``(F,)``.
        classes: the width of the output.

    Returns:
        The model in training mode, on the CPU.

    Raises:
        UsageError: an unknown name, a function that cannot be had or fails, a model without trainable
            parameters, or one that does not fit the data.
    """
    shape = tuple(int(d) for d in shape)
    if not shape or min(shape) < 1:
        raise UsageError(f"shape is {shape}, expected (C, H, W) or (F,) with positive numbers")
    if classes < 1:
        raise UsageError(f"classes is {classes}, expected at least 1")
    key = name.lower().replace("-", "").replace("_", "")
    key = _ALIASES.get(key, key)
    if key in MODELS:
        model = MODELS[key](shape, classes)
    elif ":" in name:
        model = _imported(name, shape, classes)
    else:
        raise unknown("model", name, [*MODELS, *_ALIASES], "Or name your own as package.module:function.")
    _check(name, model, shape, classes)
    return model


def _imported(name: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    # A console script does not search the folder it is started in, where a user's own model usually lies.
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"model {name!r}: cannot import {module_name!r} ({error}); check the name, and that its "
            "folder is the current one or on PYTHONPATH"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise unknown(f"function in {module_name}", function_name, names)
    try:
        model = function(**_arguments(function, shape, classes))
    except Exception as error:
        raise UsageError(
            f"model {name!r}: {function_name} failed with {type(error).__name__}: {error}; expected it to "
            f"accept shape={shape} and classes={classes}, or no arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model {name!r}: {function_name} returned a {type(model).__name__}, expected a torch.nn.Module"
        )
    return model


def _arguments(function: Callable[..., object], shape: tuple[int, ...], classes: int) -> dict[str, object]:
    offered: dict[str, object] = {"shape": shape, "classes": classes}
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function written in C does not tell
        return offered
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {p.name: offered[p.name] for p in parameters if p.name in offered}


def _check(name: str, model: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    if not any(p.requires_grad and p.numel() for p in model.parameters()):
        raise UsageError(
            f"model {name!r} has no trainable parameter, expected at least one; nothing would be learned"
        )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # one sample is enough for batch normalisation only in this mode, and no statistics change
    try:
        with torch.no_grad():
            out = model(torch.zeros(1, *shape))
    except Exception as error:
        raise UsageError(
            f"model {name!r} does not take samples of shape {shape}: {error}{_wanted(model)}; choose "
            "another model or reshape the data"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(out, torch.Tensor) or out.shape != (1, classes):
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise UsageError(
            f"model {name!r} returns {got} for one sample of shape {shape}, expected (1, {classes}): one "
            "number per class; change the last layer or the number of classes"
        )


def _wanted(model: nn.Module) -> str:
    """What the first layer expects, for the message."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return f"; its first layer expects ({module.in_channels}, H, W)"
        if isinstance(module, nn.Linear):
            return f"; its first layer expects {module.in_features} features"
    return ""
