"""Blocks on real Ray: a worker that dies loses the fault that killed it, and nothing else; a rerun does nothing again.

In a process of its own, since Ray reads how to authenticate once a process.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.campaign.kept import collected, lines_of, path_of

PROGRAM = """
import json, os, sys
from pathlib import Path
from benchmarks.campaign.pool import Block, Pool

class Toy:
    def line(self, block, index):
        with open(sys.argv[1] + "/calls", "a") as calls:
            calls.write(f"{index}\\n")
        if index == 2:
            os._exit(9)
        return {"index": index, "place": block.place}

def make(folder=sys.argv[1]):
    sys.argv = ["", folder]  # of the actor's process
    return Toy()

def lost(block, index):
    return {"index": index, "place": block.place, "lost": True}

blocks = [Block(0, "a", (0, 1, 2, 3)), Block(1, "b", (4, 5))]
with Pool(1) as pool:
    for _ in range(2):  # the second time there is nothing to do
        done = [block.number for block in pool.run(make, blocks, Path(sys.argv[1]), lost)]
        print(done, file=sys.__stdout__, flush=True)
"""


@pytest.mark.cluster
def test_what_kills_its_process_is_recorded_and_the_rest_is_done_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[0, 1], [0, 1]]
    lines = collected(tmp_path, [0, 1])
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["index"] for line in lines if line.get("lost")] == [2]
    assert [line["place"] for line in lines_of(path_of(tmp_path, 1))] == ["b", "b"]
    calls = [int(call) for call in (tmp_path / "calls").read_text().splitlines()]
    assert sorted(calls) == [0, 1, 2, 2, 3, 4, 5]  # twice for the one that kills: the first time may be an accident
