"""Where the shared parameters live: in one process, or in shared-memory windows of a node."""

from hpcasync.store.base import IDLE, Store, Worker
from hpcasync.store.layout import Layout, Piece, Shard, make_layout
from hpcasync.store.local import LocalStore, aligned_zeros
from hpcasync.store.window import WindowStore

__all__ = ["IDLE", "Layout", "LocalStore", "Piece", "Shard", "Store", "WindowStore", "Worker"]
__all__ += ["aligned_zeros", "make_layout"]
