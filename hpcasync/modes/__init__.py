"""The ways to train together, as torch optimizers: Async, Sync, KStep, Hierarchical; and Guided around two of them."""

from hpcasync.modes.asynchronous import Async
from hpcasync.modes.base import Mode
from hpcasync.modes.guided import Guided
from hpcasync.modes.hierarchical import Hierarchical
from hpcasync.modes.kstep import KStep
from hpcasync.modes.sync import Sync

MODES = {"async": Async, "sync": Sync, "kstep": KStep, "hierarchical": Hierarchical}
"""Every mode by its name on the command line."""

__all__ = ["MODES", "Async", "Guided", "Hierarchical", "KStep", "Mode", "Sync"]
