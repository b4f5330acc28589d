"""Expert parallelism: routed experts divided among ranks, tokens sent to them and home again in two hops."""

from agent.model.parallel.transport import Echo, ExpertParallel, Transport

__all__ = ["Echo", "ExpertParallel", "Transport"]
