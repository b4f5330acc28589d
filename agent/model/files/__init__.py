"""Weights on disk: safetensors read and written one tensor at a time, so that no model has to fit in memory."""
