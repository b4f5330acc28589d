"""The campaign: faults by coordinates in a real training step, and what became of each of them."""
