"""Keeps the memory of a step for the next one: by default glibc gives large blocks back, and every step faults anew."""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
#: Blocks below it come from the heap, and as much free memory stays at the heap's end. Larger than any block of a step.
_KEPT = 1 << 30


def keep_memory() -> bool:
    """Let this process keep freed memory for its next allocations; False where the C library is not glibc.

    A step allocates and frees the same activations as the one before. Measured on `small` in bf16 (vocabulary 4096, 2
    threads): 15,000 page faults and 28 ms of the kernel's time in each step, none with this.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
