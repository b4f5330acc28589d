"""Checks made in the pass that makes the data, for GPUs: Triton kernels, imported only where a CUDA device asks.

Compared with the references under Triton's interpreter and on an H200, where they were timed (docs/sensing.md).
"""
