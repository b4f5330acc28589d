"""Decoding: latent caches with absorbed projections, and MTP modules that draft what the main model then verifies."""

from agent.model.decoding.cache import CacheBytes, LatentCache, cache_bytes
from agent.model.decoding.choice import Choice, Greedy, Sampling
from agent.model.decoding.decoder import Decoder, Extended
from agent.model.decoding.drafting import Drafter
from agent.model.decoding.generation import Generation, generate

__all__ = [
    "CacheBytes",
    "Choice",
    "Decoder",
    "Drafter",
    "Extended",
    "Generation",
    "Greedy",
    "LatentCache",
    "Sampling",
    "cache_bytes",
    "generate",
]
