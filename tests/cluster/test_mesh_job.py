"""A job on a mesh as a user runs it: a device that stays bad is replaced by a spare, which gets the shard it had."""

import pytest
from cluster import incident
from test_main_job import Start, nodes, same_bits

pytestmark = pytest.mark.cluster
MESH = ("--mesh", "dp=4,ep=2", "--spares", "1", "--steps", "10", "--checkpoint-every", "4", "--seed", "7")


def test_a_spare_takes_the_shard_of_a_device_that_stays_bad_and_a_kill_costs_nothing(run: Start) -> None:
    clean = run(*MESH, name="mesh").finish()
    assert clean["incidents"] == []
    assert [c["step"] for c in clean["checkpoints"]] == [4, 8, 10]
    assert [rank["rank"] for rank in clean["state_bytes"]] == [0, 1, 2, 3]
    assert all(rank["replica"] > 0 for rank in clean["state_bytes"])
    document = run(*MESH, "--drill", "sdc@3:rank=1,fault=tile,persistent=1", "--drill", "kill@8:rank=3").finish()
    same_bits(document, clean)
    sdc = incident(document, "sdc")
    assert (sdc["verdict"], sdc["node"], sdc["resumed_from"]) == ("CORRUPT", "n1", "replica")
    assert [vote["node"] for vote in sdc["votes"]] == ["n1", "n1", "n2", "n3"]
    assert nodes(document, 2) == {0: "n0", 1: "n4", 2: "n2", 3: "n3"}
    assert incident(document, "crash")["resumed_from"] == "live"
    assert document["executed_steps"] <= 13
