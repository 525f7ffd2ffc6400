"""The same rules under a virtual clock: many workers, real gradients, one process, no MPI, the same bits for a seed."""

from hpcasync.simulate.config import SimulateConfig, make_simulate_config

__all__ = ["SimulateConfig", "make_simulate_config"]
