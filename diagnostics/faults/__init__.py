"""Faults injected on purpose, below every sensor; no detector may import this."""
