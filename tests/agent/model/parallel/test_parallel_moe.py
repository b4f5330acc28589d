"""A layer divided among ranks gives each token what the whole layer gives it; faults in the division are seen."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import Exchange, Ranks, deviation
from torch import Tensor

from agent.model import PRESETS, V3Config
from agent.model.crossing import NodeLimitExceeded, compare, token_bytes
from agent.model.moe import MoE
from agent.model.parallel import Echo, ExpertParallel
from agent.model.parallel.hop import Tokens
from agent.model.parallel.own import own_sum
from diagnostics.sensors.guard import Guard

CONFIG = replace(
    PRESETS["tiny"].config,
    hidden_size=144,  # an FP8 block and a part of one
    moe_intermediate_size=16,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
#: Worst relative difference of outputs, of gradients. The choice of experts is the same, bit for bit. fp32: other order
#: of sums. bf16: partial sums are rounded once a hop (2^-9 each). FP8: so are gradients, before they are quantised.
#: Measured over 500 examples: 7e-7, 1e-6; 3e-3, 0.018; 3e-3, 0.11 (an expert with one token, one code away).
TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (1e-2, 5e-2), "fp8": (1e-2, 0.3)}


def layer(config: V3Config, dtype: torch.dtype, parallel: ExpertParallel | None = None, seed: int = 0) -> MoE:
    """Weights by name, so that a part has those of the whole."""
    moe = MoE(config, dtype, parallel)
    for name, parameter in moe.named_parameters():
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed))
    return moe


def rows(count: int, config: V3Config, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return (x if dtype == torch.float32 else x.bfloat16()).requires_grad_()


def work(moe: MoE, x: Tensor, seed: int) -> dict[str, Any]:
    """Forward and backward of a random linear function of the output."""
    y, load = moe(x, 1)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    ((y * weight).sum() + load.balance).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, "gradients": gradients, "counts": load.counts, "crossing": load.crossing}


def whole(config: V3Config, dtype: torch.dtype, tokens: list[int], seed: int, bias: Tensor | None = None) -> Any:
    """The whole layer on each rank's tokens in turn: the router sees the same rows in the same shape."""
    found, total = [], {}
    for rank, count in enumerate(tokens):
        moe = layer(config, dtype, seed=seed)
        if bias is not None:
            moe.router.router_bias.copy_(bias)
        found.append(work(moe, rows(count, config, dtype, seed + rank), seed + rank))
        for name, gradient in found[-1]["gradients"].items():
            total[name] = total.get(name, 0) + gradient
    return found, total


def divided(ranks: Ranks, config: V3Config, dtype: torch.dtype, tokens: list[int], seed: int, bias: Any = None) -> Any:
    def one(rank: int) -> dict[str, Any]:
        moe = layer(config, dtype, ranks.members[rank], seed)
        if bias is not None:
            moe.router.router_bias.copy_(bias)
        return work(moe, rows(tokens[rank], config, dtype, seed + rank), seed + rank)

    found, total = ranks.run(one), {}
    for each in found:
        for name, gradient in each["gradients"].items():
            total[name] = total.get(name, 0) + gradient
    return found, total


LAYOUTS = st.sampled_from([(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2)])


@settings(max_examples=25, deadline=None)
@given(
    layout=LAYOUTS,
    data=st.data(),
    kind=st.sampled_from(sorted(DTYPES)),
    kept=st.integers(1, 4),
    top=st.integers(2, 4),  # one gate alone is constant, so its gradient is nothing but rounding
    seed=st.integers(0, 999),
    favoured=st.lists(st.integers(0, 15), max_size=3),
)
def test_a_divided_layer_equals_the_whole(
    layout: tuple[int, int], data: st.DataObject, kind: str, kept: int, top: int, seed: int, favoured: list[int]
) -> None:
    tokens = data.draw(st.lists(st.integers(1, 9), min_size=layout[0], max_size=layout[0]))
    config = replace(CONFIG, topk_group=kept, num_experts_per_tok=top)
    bias = torch.zeros(16)
    bias[favoured] = 5.0  # most tokens then go to few experts, and some ranks receive nothing
    ranks, dtype = Ranks(*layout), DTYPES[kind]
    wanted, wanted_gradients = whole(config, dtype, tokens, seed, bias)
    found, gradients = divided(ranks, config, dtype, tokens, seed, bias)
    ranks.agree()
    out, back = TOLERANCES[kind]
    for one, other in zip(found, wanted, strict=True):
        assert one["y"].dtype == torch.float32
        assert torch.equal(one["counts"], other["counts"])
        assert deviation({"y": one["y"]}, {"y": other["y"]}) < out
        assert deviation({"x": one["x"]}, {"x": other["x"]}) < back
    assert gradients.keys() == wanted_gradients.keys()
    assert deviation(gradients, wanted_gradients) < back


@pytest.mark.parametrize("layout", [(4, 1), (4, 2), (4, 4)])
def test_two_destinations_swapped_are_seen(layout: tuple[int, int]) -> None:
    tokens = [6] * 4
    wanted, wanted_gradients = whole(CONFIG, torch.float32, tokens, 1)
    right, right_gradients = divided(Ranks(*layout), CONFIG, torch.float32, tokens, 1)
    wrong, wrong_gradients = divided(Ranks(*layout, order=[1, 0, 2, 3]), CONFIG, torch.float32, tokens, 1)
    for found, gradients, low, high in ((right, right_gradients, 0, 1e-5), (wrong, wrong_gradients, 0.1, 10)):
        away = max(deviation({"y": f["y"]}, {"y": w["y"]}) for f, w in zip(found, wanted, strict=True))
        assert low <= away < high
        assert low <= deviation(gradients, wanted_gradients) < high


@pytest.mark.parametrize("kind", sorted(DTYPES))
@pytest.mark.parametrize("layout", [(4, 1), (4, 2)])
def test_two_runs_have_equal_bits(kind: str, layout: tuple[int, int]) -> None:
    one, other = (divided(Ranks(*layout), CONFIG, DTYPES[kind], [9, 1, 5, 8], 7) for _ in range(2))
    assert all(
        torch.equal(a["y"], b["y"]) and torch.equal(a["x"], b["x"]) for a, b in zip(one[0], other[0], strict=True)
    )
    assert all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())


@pytest.mark.parametrize("kind", sorted(DTYPES))
def test_what_travels(kind: str) -> None:
    ranks = Ranks(4, 2)
    divided(ranks, CONFIG, DTYPES[kind], [9, 1, 5, 8], 7)
    hidden, top = (CONFIG.hidden_size,), (CONFIG.num_experts_per_tok,)
    flat = torch.float32 if kind == "fp32" else torch.bfloat16
    sent = (torch.uint8, (CONFIG.hidden_size + 4 * 2,)) if kind == "fp8" else (flat, hidden)
    out = [(torch.int64, (3,)), sent, (torch.float32, top), (torch.int64, top)]
    forward = [(hop, *call) for hop in ("across", "within") for call in out]
    forward += [("within", flat, hidden), ("across", flat, hidden)]
    backward = [("across", flat, hidden), ("within", flat, hidden)]
    backward += [(hop, *call) for hop in ("within", "across") for call in ((flat, hidden), (torch.float32, top))]
    for rank in ranks.ranks:
        assert rank.calls == [Exchange(*call) for call in forward + backward]


@pytest.mark.parametrize("kind", sorted(DTYPES))
@pytest.mark.parametrize("layout", [(4, 1), (4, 2), (4, 4), (8, 2)])
def test_what_leaves_a_node_is_counted(kind: str, layout: tuple[int, int]) -> None:
    ranks, tokens, dtype = Ranks(*layout), [7] * layout[0], DTYPES[kind]
    found, _ = divided(ranks, CONFIG, dtype, tokens, 3)
    nodes = layout[0] // layout[1]
    sizes = {"fp32": 4 * 144, "bf16": 2 * 144, "fp8": 144 + 4 * 2}
    for rank, one in enumerate(found):
        limited, free = one["crossing"].limited, one["crossing"].unlimited
        abroad = [
            rows[:1].nbytes * sum(others) for name, rows, others in ranks.ranks[rank].sent[:2] if name == "across"
        ]
        assert limited.nbytes == (abroad[1] if abroad else 0) == limited.copies * sizes[kind]
        assert token_bytes(144, kind) == sizes[kind]
        assert limited.copies <= limited.unmerged
        assert limited.tokens == free.tokens == 7
        assert limited.widest <= CONFIG.topk_group
        choice = layer(CONFIG, dtype, seed=3).router(rows(7, CONFIG, dtype, 3 + rank)).scores
        assert one["crossing"] == compare(
            choice, torch.full((7,), rank // layout[1]), CONFIG, copy_bytes=sizes[kind], nodes=nodes
        )
    total = [sum(getattr(one["crossing"], side).copies for one in found) for side in ("limited", "unlimited")]
    assert total == [0, 0] if nodes == 1 else total[0] < total[1] or nodes == 2


def test_without_groups_the_node_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(choice: Tensor, config: V3Config) -> Tensor:
        return choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    monkeypatch.setattr("agent.model.router.chosen_experts", free)
    place = ExpertParallel(0, Echo(4), Echo(1))
    with pytest.raises(NodeLimitExceeded, match="topk_group is 2"):
        layer(CONFIG, torch.float32, place)(rows(40, CONFIG, torch.float32, 0), 1)
    # Groups that do not divide among the nodes make no promise, so nothing is asserted.
    odd = replace(CONFIG, n_group=2, topk_group=1)
    layer(odd, torch.float32, place)(rows(40, odd, torch.float32, 0), 1)


@pytest.mark.parametrize("kind", sorted(DTYPES))
def test_all_tokens_go_elsewhere(kind: str) -> None:
    """Everybody's experts are rank 3's: it alone works, three ranks compute no expert and take part all the same."""
    bias = torch.zeros(16)
    bias[12:] = 100.0
    ranks = Ranks(4, 2)
    found, _ = divided(ranks, CONFIG, DTYPES[kind], [5] * 4, 2, bias)
    ranks.agree()
    assert [any("experts" in name for name in one["gradients"]) for one in found] == [False] * 3 + [True]
    assert all(bool(one["x"].any()) for one in found)


@pytest.mark.parametrize("place", [ExpertParallel(r, Echo(w), Echo(4 // w)) for r, w in ((0, 4), (3, 2), (1, 1))])
@pytest.mark.parametrize("kind", sorted(DTYPES))
def test_an_echo_warms_up_any_rank(place: ExpertParallel, kind: str) -> None:
    moe = layer(CONFIG, DTYPES[kind], place)
    work(moe, rows(40, CONFIG, DTYPES[kind], 0), 0)
    assert all(p.grad is not None for p in moe.parameters())


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
def test_the_sensors_see_every_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = layer(CONFIG, DTYPES[kind], ExpertParallel(2, Echo(2), Echo(2)))
    guard = Guard(moe, again=0)
    named, append = [], guard.log.append
    monkeypatch.setattr(guard.log, "append", lambda site, found: (named.append(site.module), append(site, found)))
    with guard.step(1) as sense:
        work(moe, rows(64, CONFIG, DTYPES[kind], 0), 0)
    # The router, the shared expert's three linears and those of four experts, each in three passes.
    products = [row for row in guard.coverage() if row.operation in ("mm", "fp8")]
    assert sum(row.calls for row in products) == 3 * (1 + 3 + 4 * 3)
    assert all(row.checked == 1 for row in products)
    assert sense.clean
    assert not sense.skipped
    assert {f"experts.{n}.{op}" for n in range(8, 12) for op in ("gate", "up", "down")} < set(named)


@pytest.mark.parametrize("count", [0, 3])
def test_without_work_a_rank_still_has_a_way_back(count: int) -> None:
    """Otherwise its backward would leave out exchanges, and the others would wait for it."""
    x, gates = torch.ones(count, 8, requires_grad=True), torch.zeros(count, 2, requires_grad=True)
    tokens = Tokens(x, gates, torch.full((count, 2), -1))
    y = own_sum(tokens, 2, 64, lambda *_: pytest.fail("no expert has rows"))
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert y.shape == (count, 8)
    assert x.grad is not None
    assert gates.grad is not None
    assert not y.any()
    assert not x.grad.any()
    assert not gates.grad.any()
