"""A job on a mesh as a user runs it: a device that stays bad is replaced by a spare, which gets the shard it had."""

import pytest
from cluster import Start, incident, nodes, same_bits

pytestmark = pytest.mark.cluster
MESH = ("--mesh", "dp=4,ep=2", "--spares", "1", "--steps", "10", "--checkpoint-every", "4", "--seed", "7")
LOSSES = ("--drill", "hang@6:rank=2", "--drill", "kill@8:rank=3")


def test_a_spare_takes_the_shard_of_a_device_that_stays_bad_and_lost_workers_cost_nothing(run: Start) -> None:
    clean = run(*MESH, name="mesh").finish()
    assert clean["incidents"] == []
    assert [c["step"] for c in clean["checkpoints"]] == [4, 8, 10]
    assert [rank["rank"] for rank in clean["state_bytes"]] == [0, 1, 2, 3]
    assert all(rank["replica"] > 0 for rank in clean["state_bytes"])
    document = run(*MESH, "--drill", "sdc@3:rank=1,fault=tile,persistent=1", *LOSSES).finish()
    same_bits(document, clean)
    sdc = incident(document, "sdc")
    assert (sdc["verdict"], sdc["node"], sdc["resumed_from"]) == ("CORRUPT", "n1", "replica")
    assert [vote["node"] for vote in sdc["votes"]] == ["n1", "n1", "n2", "n3"]
    assert nodes(document, 2) == {0: "n0", 1: "n4", 2: "n2", 3: "n3"}
    hang, crash = incident(document, "hang"), incident(document, "crash")
    assert (hang["node"], hang["injected_step"], hang["resumed_from"]) == ("n2", 6, "live")  # the others wait for it
    assert (crash["node"], crash["resumed_from"]) == ("n3", "live")
    assert document["executed_steps"] <= 14
