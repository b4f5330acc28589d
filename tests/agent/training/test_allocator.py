"""Memory of one step is there for the next: no page is faulted in twice."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, statistics, sys, torch
from agent.training.allocator import keep_memory
if sys.argv[1] == "kept":
    assert keep_memory()
def step():
    torch.ones(1 << 24).sum()  # 64 MiB
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def faults_of_a_step():
    before = faults()
    step()
    return faults() - before
print(int(statistics.median([faults_of_a_step() for _ in range(40)][-10:])))
"""


@pytest.mark.parametrize(("how", "at_most", "at_least"), [("kept", 100, 0), ("as it comes", 10**9, 1000)])
def test_a_block_that_was_freed_is_used_again(how: str, at_most: int, at_least: int) -> None:
    """The second case is the control: glibc as it comes maps the block anew each time.

    The last of many steps count: the heap grows in the first ones, whenever something small was put into the gap.
    """
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, timeout=60)
    assert at_least <= int(done.stdout) <= at_most
