"""The training run: configuration, loop, evaluation, progress, records, tables and plots."""

from hpcasync.train.config import TrainConfig, make_config, read_config

__all__ = ["TrainConfig", "make_config", "read_config"]
