"""The three ways to train together, as torch optimizers: Async, Sync, KStep; and Guided around two of them."""

from hpcasync.modes.asynchronous import Async
from hpcasync.modes.base import Mode
from hpcasync.modes.guided import Guided
from hpcasync.modes.kstep import KStep
from hpcasync.modes.sync import Sync

MODES = {"async": Async, "sync": Sync, "kstep": KStep}
"""Every mode by its name on the command line."""

__all__ = ["MODES", "Async", "Guided", "KStep", "Mode", "Sync"]
