"""What a rank becomes when it joins its group: without a mesh one of equals, on a mesh the holder of a shard."""

from agent.model.parallel.process_group import groups
from agent.training.collective import PATIENCE, Group, run
from agent.training.division import Division, Replicated
from agent.training.engine import Engine
from agent.training.shards import ShardLayout
from agent.training.sources import ShardSource, Source, WholeSource
from agent.training.transaction import Transaction
from agent.training.zero import Zero1


def seated(engine: Engine, group: Group) -> int:
    """Give the engine its rank's experts and links to the others; returns how many ranks exchange tokens.

    Every rank of the generation calls it. Raises PeerLost.
    """
    mesh = engine.spec.mesh
    if mesh is None:
        return 1
    engine.take(group.rank, run(groups, group.rank, mesh.dp, mesh.ep, mesh.local, PATIENCE))
    return mesh.ep


def divided(engine: Engine, group: Group, transaction: Transaction) -> tuple[Division, Source]:
    """How this job's ranks divide reduction, update and state. Every rank calls it. Raises PeerLost."""
    layout = engine.layout
    if not isinstance(layout, ShardLayout):
        return Replicated(layout, group), WholeSource(group, transaction)
    division = Zero1(layout, group)
    return division, ShardSource(group, transaction, layout, division)
