"""Where the shared parameters live: in one process, in shared-memory windows of a node, or dealt out over nodes."""

from hpcasync.store.base import NOTES, Store
from hpcasync.store.clocks import IDLE
from hpcasync.store.layout import Layout, Piece, Shard, make_layout
from hpcasync.store.local import LocalStore, aligned_zeros
from hpcasync.store.placement import shard_size
from hpcasync.store.remote import RemoteStore
from hpcasync.store.window import Torn, WindowStore
from hpcasync.store.worker import Worker

__all__ = ["IDLE", "NOTES", "Layout", "LocalStore", "Piece", "RemoteStore", "Shard", "Store", "Torn", "WindowStore", "Worker"]
__all__ += ["aligned_zeros", "make_layout", "shard_size"]
