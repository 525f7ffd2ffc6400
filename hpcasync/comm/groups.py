"""Groups of ranks, each on one node, and the first ranks of the groups: what hierarchical training meets in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hpcasync.comm.agree import raise_together
from hpcasync.comm.collectives import MPICollectives, OneRank
from hpcasync.comm.world import World


def split(world: World, groups: int | None = None) -> tuple[World, World | None, int]:
    """Split the ranks into groups that each lie on one node. Collective.

    Args:
        world: all ranks.
        groups: how many, a multiple of the nodes; by default one per node. The ranks of a node are shared out evenly.

    Returns:
        This rank's group as a world of its own (of one node); the world of the groups' first ranks, ``None`` on the
        others; and the number of groups.

    Raises:
        UsageError: groups that are no multiple of the nodes, or more of them than a node has ranks.
    """
    count = world.nodes if groups is None else groups
    raise_together(world, groups_problem(groups, world.nodes, world.local_size))
    if world.size == 1:
        return world, world, 1
    per_node = count // world.nodes
    inside = world.local_rank * per_node // world.local_size
    comm = world.comm.Split(world.node * per_node + inside, world.rank)
    group = _world_of(world, comm, nodes=1)
    heads = world.comm.Split(0 if comm.rank == 0 else _undefined(), world.rank)
    return group, _world_of(world, heads, nodes=world.nodes) if comm.rank == 0 else None, count


def groups_problem(groups: int | None, nodes: int, ranks: int) -> str | None:
    """Why ``split`` refuses so many groups on these nodes with ``ranks`` each; None: it does not."""
    count = nodes if groups is None else groups
    if count < 1 or count % nodes:
        return f"groups={groups}: expected a multiple of the {nodes} nodes; each group lies on one node"
    if count // nodes > ranks:
        return f"groups={groups}: {count // nodes} per node, but a node has {ranks} rank(s)"
    return None


def free(part: World | None, world: World) -> None:
    """Give the communicator of a part back. Collective over the part."""
    if part is not None and part.comm is not None and part is not world:
        part.comm.Free()


def _world_of(world: World, comm: Any, *, nodes: int) -> World:
    """The ranks of ``comm`` as a world; with several nodes only the first rank of each group is in it."""
    one = nodes == 1
    polite = getattr(world.collectives, "polite", False)
    return replace(
        world,
        rank=comm.rank,
        size=comm.size,
        local_rank=comm.rank if one else 0,
        local_size=comm.size if one else 1,
        node=0 if one else world.node,
        nodes=nodes,
        comm=comm,
        node_comm=comm if one else None,
        leaders=None,
        collectives=MPICollectives(comm, polite=polite) if comm.size > 1 else OneRank(),
    )


def _undefined() -> int:
    from mpi4py import MPI

    return int(MPI.UNDEFINED)
