"""A model divided among ranks: what each holds, one order of calls for all, replay from what was received, refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from lockstep import Ranks, Recorded, batch, deviation, loss_and_gradients, together

from agent.model import PRESETS, V3, ConfigError, huggingface
from agent.model.crossing import summed
from agent.model.decoding.decoder import Decoder
from agent.model.memory import PRECISIONS, Mesh, parameters, shares
from agent.model.moe import MoE
from agent.model.parallel import Echo, ExpertParallel
from agent.model.parallel.process_group import groups

CONFIG = replace(
    PRESETS["tiny"].config,
    vocab_size=64,
    hidden_size=48,
    num_hidden_layers=4,
    mtp_depth=2,
    moe_intermediate_size=32,
    intermediate_size=64,
    balance_alpha=0.01,
    initializer_range=0.05,
)


def place(rank: int, nodes: int, local: int) -> ExpertParallel:
    return ExpertParallel(rank, Echo(nodes), Echo(local))


def test_a_rank_holds_its_share_under_the_names_of_the_whole() -> None:
    whole = dict(V3(CONFIG).named_parameters())
    seen: set[str] = set()
    for rank in range(4):
        part = dict(V3(CONFIG, parallel=place(rank, 2, 2)).named_parameters())
        own = {name for name in part if ".experts." in name}
        assert {int(name.split(".experts.")[1].split(".")[0]) for name in own} == {2 * rank, 2 * rank + 1}
        assert part.keys() - own == {name for name in whole if ".experts." not in name}
        assert all(torch.equal(parameter, whole[name]) for name, parameter in part.items())
        assert not seen & own
        seen |= own
    assert seen == {name for name in whole if ".experts." in name}


def test_a_rank_holds_what_the_account_of_memory_says() -> None:
    share = shares(CONFIG, parameters(CONFIG), Mesh(dp=4, ep=4), PRECISIONS["fp32"])[0]
    part = V3(CONFIG, parallel=place(3, 2, 2))
    assert sum(p.numel() for p in part.parameters()) == share.parameters


def test_alone_is_not_divided() -> None:
    tokens = batch(CONFIG, 2, 8, 0)
    alone, plain = (loss_and_gradients(V3(CONFIG, parallel=parallel), tokens) for parallel in (place(0, 1, 1), None))
    assert alone["loss"] == plain["loss"]
    assert deviation(alone["gradients"], plain["gradients"]) == 0.0
    assert alone["crossing"] is plain["crossing"] is None


def test_layers_communicate_one_after_another_on_every_rank() -> None:
    """Layers have transports of their own here, so that the calls tell which layer they belong to."""
    ranks = Ranks(4, 2)
    layers = [ranks.group(f"{i}.") for i in range(CONFIG.num_moe_layers)]

    def work(rank: int) -> list[str]:
        model = V3(CONFIG, parallel=ranks.members[rank])
        moes = [module for module in model.modules() if isinstance(module, MoE)]
        for moe, group in zip(moes, layers, strict=True):
            moe.parallel = group[rank]
        loss_and_gradients(model, batch(CONFIG, 1, 6 + 5 * rank, rank))
        return [name for name, _ in groupby(call.hop.split(".")[0] for call in ranks.ranks[rank].calls)]

    forward = [str(i) for i in range(CONFIG.num_moe_layers)]
    assert ranks.run(work) == [[*forward, *forward[-2::-1]]] * 4
    ranks.agree()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_rank_repeats_its_step_alone_from_what_it_received(dtype: torch.dtype) -> None:
    ranks = Ranks(4, 2)
    tokens = batch(CONFIG, 4, 12, 1)
    found = ranks.run(lambda r: loss_and_gradients(V3(CONFIG, dtype, ranks.members[r]), tokens[r : r + 1]))
    for rank, one in enumerate(found):
        received = [rows.clone() for rows in ranks.ranks[rank].received]
        transport = Recorded(2, received)
        again = loss_and_gradients(
            V3(CONFIG, dtype, ExpertParallel(rank, transport, transport)), tokens[rank : rank + 1]
        )
        assert not received
        assert again["loss"] == one["loss"]
        assert all(torch.equal(gradient, again["gradients"][name]) for name, gradient in one["gradients"].items())
        assert again["crossing"] == one["crossing"]


def test_packed_documents_are_divided_like_others() -> None:
    tokens = batch(CONFIG, 4, 16, 2)
    documents = (torch.arange(tokens.shape[1]) // 7).expand_as(tokens).contiguous()
    whole = loss_and_gradients(V3(CONFIG), tokens, documents)
    ranks = Ranks(4, 2)
    found = ranks.run(
        lambda r: loss_and_gradients(V3(CONFIG, parallel=ranks.members[r]), tokens[r : r + 1], documents[r : r + 1])
    )
    loss, gradients, counts = together(found)
    assert loss == pytest.approx(whole["loss"], rel=1e-6)
    assert torch.equal(counts, whole["counts"])
    assert deviation(gradients, whole["gradients"]) < 1e-5


def test_crossings_of_all_layers_are_summed() -> None:
    model = V3(CONFIG, parallel=place(1, 2, 2))
    seen = []
    for module in model.modules():
        if isinstance(module, MoE):
            module.register_forward_hook(lambda _m, _a, out: seen.append(out[1].crossing))
    found = model.loss(batch(CONFIG, 2, 10, 0)).crossing
    assert found is not None
    assert len(seen) == CONFIG.num_moe_layers
    for side in ("limited", "unlimited"):
        total, parts = getattr(found, side), [getattr(one, side) for one in seen]
        for name in ("tokens", "copies", "unmerged", "nbytes"):
            assert getattr(total, name) == sum(getattr(part, name) for part in parts) > 0
        assert total.widest == max(part.widest for part in parts)
    assert summed([]) is None


def test_what_cannot_be_divided_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="ep: 8 routed experts do not divide among 3 ranks"):
        V3(CONFIG, parallel=place(0, 3, 1))
    with pytest.raises(ConfigError, match="rank: 4 is none of the 4 ranks"):
        place(4, 2, 2)
    with pytest.raises(ConfigError, match="ep: 4 ranks do not divide into expert groups of 3"):
        groups(0, 4, 3, 1)
    with pytest.raises(ConfigError, match=r"ep: .* groups of 0"):
        groups(0, 4, 0, 1)
    with pytest.raises(ConfigError, match="local: 4 ranks of an expert group do not divide into nodes of 3"):
        groups(0, 4, 4, 3)
    with pytest.raises(ConfigError, match="rank: 4 is none of 4 ranks"):
        groups(4, 4, 1, 1)
    with pytest.raises(ValueError, match="an echo gives back what is sent"):
        Echo(2).exchange(torch.zeros(3), [1, 2], [2, 1])
    with pytest.raises(ValueError, match="one of 4 ranks"):
        Decoder(V3(CONFIG, parallel=place(0, 2, 2)), 8)
    with pytest.raises(ValueError, match="load into a whole model"):
        huggingface.load(V3(CONFIG, parallel=place(0, 2, 2)), huggingface.export(V3(CONFIG)))
