"""The gradient of a perceptron by a compiled kernel, without autograd."""

from __future__ import annotations

import itertools

import numpy as np
from torch import nn

from hpcasync.data import Split
from hpcasync.kernels.perceptron import NONE, RELU, SIGMOID, TANH, perceptron_gradient, scratch_size
from hpcasync.store import aligned_zeros

_ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: RELU, nn.Tanh: TANH, nn.Sigmoid: SIGMOID}


class Perceptron:
    """Gradients of ``Sequential(Flatten, Linear, activation, ..., Linear)``, each on one thread; threads may call at once.

    The bits depend on the processor's vector width and instructions, not on threads or on what else is under way.

    Args:
        model: for which ``fits`` is true.
        starts: first element of each parameter in a flat copy.
        samples: of the training split.
        lanes: threads that may call at the same time.
    """

    def __init__(self, model: nn.Module, starts: tuple[int, ...], samples: Split, lanes: int) -> None:
        layers = _layers(model)
        linear = [m for m in layers if isinstance(m, nn.Linear)]
        self._widths = np.array([linear[0].in_features, *(m.out_features for m in linear)], np.int64)
        places, place = [], 0
        for m, after in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(m, nn.Linear):
                bias = m._parameters["bias"] is not None
                places.append((starts[place], starts[place + 1] if bias else -1, _ACTIVATIONS.get(type(after), NONE)))  # type: ignore[arg-type]
                place += 1 + bias
        self._places = np.array(places, np.int64)
        self._x, self._labels, self._factor, self._offset = samples.flat()
        self._scratch = [np.empty(0, np.float32) for _ in range(lanes)]

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether ``model`` is of that form, at most one activation after a layer, every parameter trained and no hook."""
        if type(model) is not nn.Sequential or any(not p.requires_grad for p in model.parameters()):
            return False
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()):
            return False
        first = next(iter(model.children()), None)
        if type(first) is nn.Flatten and (first.start_dim, first.end_dim) != (1, -1):
            return False
        layers = _layers(model)
        kinds = [type(m) for m in layers]
        if not kinds or kinds[0] is not nn.Linear or kinds[-1] is not nn.Linear or len(set(map(id, layers))) < len(layers):
            return False
        return all(b is nn.Linear or (b in _ACTIVATIONS and a is nn.Linear) for a, b in itertools.pairwise(kinds))

    def __call__(self, lane: int, w: np.ndarray, indices: np.ndarray, out: np.ndarray) -> tuple[float, bool]:
        """The gradient of the mean cross-entropy of the samples ``indices`` at ``w``.

        Args:
            lane: of this thread, 0 .. lanes-1.
            w: float32 (total,), a flat copy of the parameters.
            indices: int64, of the samples.
            out: float32 (total,), receives the gradient; gaps between parameters stay as they are.

        Returns:
            The loss, and whether the gradient is finite.
        """
        size = scratch_size(self._widths, len(indices))
        if self._scratch[lane].size < size:
            self._scratch[lane] = aligned_zeros(1, size)[0]
        loss, finite = perceptron_gradient(
            w, out, self._x, self._labels, indices, self._factor, self._offset, self._widths, self._places, self._scratch[lane]
        )
        return loss, finite


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = list(model.children())
    return layers[1:] if layers and type(layers[0]) is nn.Flatten else layers
