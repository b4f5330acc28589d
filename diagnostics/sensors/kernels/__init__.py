"""Checks made in the pass that makes the data, for GPUs: Triton kernels, imported only where a CUDA device asks.

Compared with the references under Triton's interpreter; none has run on a GPU yet, so none has been timed there.
"""
