"""Packed documents train as each would alone: loss and gradients are the token-weighted means of their own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agent.model import PRESETS, V3, V3Config, Yarn
from agent.model import attention as attention_module
from agent.model.moe import RouterLoad
from agent.model.packing import Packed, Spans
from agent.model.router import document_balance_loss, sequence_balance_loss

DEPTH, TIME = 2, 29
CONFIG = replace(
    PRESETS["tiny"].config,
    hidden_size=48,
    num_hidden_layers=2,
    q_lora_rank=24,
    kv_lora_rank=20,
    v_head_dim=12,
    intermediate_size=64,
    moe_intermediate_size=24,
    mtp_depth=DEPTH,
    initializer_range=0.08,
    balance_alpha=0.5,  # large, so that a balance taken over the wrong tokens shows
    yarn=Yarn(),
)
#: Documents in two windows of TIME + 1 + DEPTH tokens: some are shorter than an MTP module looks ahead, and the last of
#: the first window ends inside what only labels see.
LENGTHS = ((11, 1, 2, 15, 3), (3, 24, 5))
Terms = tuple[Tensor, list[Tensor], list[RouterLoad]]


def model_of(config: V3Config = CONFIG) -> V3:
    model = V3(config)
    model.initialise(5)
    return model


def windows() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 256, (2, TIME + 1 + DEPTH), generator=torch.Generator().manual_seed(2))
    return tokens, torch.tensor([[d for d, size in enumerate(row) for _ in range(size)] for row in LENGTHS])


def alone() -> list[tuple[Tensor, Tensor, list[int]]]:
    """Each document by itself, and how many of its positions i have t_{i+a} in it, for each distance a.

    ``V3.loss`` wants 1 + D tokens more than there are positions: what the document lacks are tokens of another one.
    """
    found = []
    tokens, _ = windows()
    for row, lengths in zip(tokens, LENGTHS, strict=True):
        for size, own in zip(lengths, row.split(lengths), strict=True):
            end = sum(lengths[: lengths.index(size)]) + size
            positions = size - max(end - TIME, 0)
            if positions <= 0:
                continue
            given = torch.nn.functional.pad(own, (0, positions + 1 + DEPTH - size), value=100 + len(found))
            documents = (torch.arange(len(given)) >= size).long()
            found.append((given[None], documents[None], [min(positions, max(size - a, 0)) for a in range(DEPTH + 2)]))
    return found


def terms(model: V3, tokens: Tensor, documents: Tensor, monkeypatch: pytest.MonkeyPatch) -> Terms:
    """The parts of the loss that carry gradient, before they are added up."""
    with monkeypatch.context() as patch:
        patch.setattr(V3, "_total", lambda _self, main, ahead, loads: (main, ahead, loads))
        found: Terms = model.loss(tokens, documents)  # type: ignore[assignment]
    return found


def mean_of_each_alone(model: V3, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The total loss, every part of it the mean over documents with the tokens it is taken over as weights."""
    ones = alone()
    whole = [sum(counts[a] for _, _, counts in ones) for a in range(DEPTH + 2)]
    total = torch.zeros(())
    for tokens, documents, counts in ones:
        share = [count / all_ for count, all_ in zip(counts, whole, strict=True)]
        main, ahead, loads = terms(model, tokens, documents, monkeypatch)
        total = total + share[1] * main
        total = total + CONFIG.mtp_weight / DEPTH * sum(share[k + 1] * loss for k, loss in enumerate(ahead, start=1))
        distances = [0] * (len(loads) - DEPTH) + list(range(1, DEPTH + 1))
        total = total + sum(share[a] * load.balance for a, load in zip(distances, loads, strict=True))
    return total


def gradients(model: V3, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differences(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Packed against alone: relative difference of the loss, and of each gradient in L2 norm."""
    model = model_of()
    wanted = mean_of_each_alone(model, monkeypatch)
    found = model.loss(*windows()).total
    apart = {"loss": float((found - wanted).abs().detach() / wanted.detach())}
    ours, theirs = gradients(model, found), gradients(model, wanted)
    assert ours.keys() == theirs.keys()
    for name in ours:
        apart[name] = float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12))
    return apart


def test_packed_windows_have_the_loss_and_gradients_of_each_document_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(alone()) == 7
    found = differences(monkeypatch)
    assert max(found.values()) < 1e-5, max(found.items(), key=lambda item: item[1])


@pytest.mark.parametrize("part", ["attention", "labels", "balance", "modules"])
def test_without_each_part_of_it_documents_would_cross(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative controls: the packed side loses one part, each document alone cannot notice."""
    model = model_of()
    wanted = mean_of_each_alone(model, monkeypatch).detach()
    if part == "attention":
        whole = attention_module.causal_attention
        monkeypatch.setattr(
            attention_module, "causal_attention", lambda q, k, v, scale, _apart: whole(q, k, v, scale, None)
        )
    elif part == "labels":
        monkeypatch.setattr(Spans, "within", lambda self, ahead: torch.ones(2, TIME, dtype=torch.bool))
    elif part == "balance":
        monkeypatch.setattr(
            "agent.model.moe.document_balance_loss",
            lambda scores, member, config: sequence_balance_loss(scores, member.shape[0], config),
        )
    else:
        plain = Spans.packed
        monkeypatch.setattr(Spans, "packed", lambda self, _ahead: plain(self, 0))
    assert float((model.loss(*windows()).total - wanted).abs().detach() / wanted) > 1e-4


def test_no_gradient_flows_from_one_document_to_another() -> None:
    """Not even the smallest: what is masked has the weight 0."""
    model = model_of()
    tokens, documents = windows()
    tokens = tokens % 200
    tokens[0, : LENGTHS[0][0]] += 50
    own = set(tokens[0, : LENGTHS[0][0]].tolist()) - set(tokens[0, LENGTHS[0][0] :].tolist())
    assert len(own) > 5
    packed = Spans(documents[:1], tokens[:1], TIME).packed(0)
    for documents_of, crosses in ((packed, False), (None, True)):
        model.zero_grad()
        states = model._trunk(tokens[:1, :TIME], documents_of)[0]
        states[LENGTHS[0][0] :].square().sum().backward()
        gradient = model.embedding.grad
        assert gradient is not None
        assert bool(gradient[sorted(own)].any()) == crosses


def test_one_document_in_each_window_is_the_plain_loss() -> None:
    model = model_of()
    tokens, _ = windows()
    plain = model.loss(tokens)
    packed = model.loss(tokens, torch.zeros_like(tokens))
    for one, other in zip(plain, packed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


class Operations(TorchDispatchMode):
    """Writes down every kernel that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_without_documents_no_operation_is_added() -> None:
    """The sensors and the replay know the steps of a plain window."""
    tokens, documents = windows()
    spans = Spans(None, tokens, TIME)
    assert (spans.within(1), spans.packed(0)) == (None, None)
    model = model_of()
    with Operations() as plain:
        model.loss(tokens)
    with Operations() as packed:
        model.loss(tokens, documents)
    attentions, routers = CONFIG.num_hidden_layers + DEPTH, CONFIG.num_moe_layers
    for name, extra in (("masked_fill_.Scalar", attentions), ("bmm.default", 2 * routers), ("ne.Tensor", 1)):
        counts = [operations.seen.count(f"aten.{name}") for operations in (plain, packed)]
        assert counts[1] - counts[0] >= extra, name
    assert plain.seen.count("aten.bmm.default") == attentions + routers  # values, and gathering experts
    assert plain.seen.count("aten.masked_fill.Scalar") == routers  # node-limited routing's own


def test_documents_of_a_single_token_have_no_label_and_no_nan() -> None:
    model = model_of()
    tokens, _ = windows()
    result = model.loss(tokens, torch.arange(tokens.numel()).view_as(tokens))
    result.total.backward()
    assert (float(result.main), float(result.mtp)) == (0.0, 0.0)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_packed_windows_train_in_bf16() -> None:
    model = V3(CONFIG, compute_dtype=torch.bfloat16)
    model.initialise(5)
    wanted = model_of().loss(*windows()).main
    assert float(model.loss(*windows()).main) == pytest.approx(float(wanted), rel=0.02)


@pytest.mark.parametrize(
    "documents", [torch.zeros(2, TIME, dtype=torch.int64), torch.zeros(2, TIME + 1 + DEPTH, dtype=torch.int32)]
)
def test_documents_of_another_shape_or_type_are_refused(documents: Tensor) -> None:
    with pytest.raises(ValueError, match=r"documents: int64 \[2, 32\] expected"):
        model_of().loss(windows()[0], documents)


@settings(max_examples=40, deadline=None)
@given(
    starts=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3), ahead=st.integers(0, 2)
)
def test_spans_say_what_a_plain_loop_says(starts: list[list[bool]], ahead: int) -> None:
    documents = torch.tensor(starts).long().cumsum(1) * 5 - 3
    time = 9
    spans = Spans(documents, documents, time)
    packed, within = spans.packed(ahead), spans.within(ahead)
    assert isinstance(packed, Packed)
    assert within is not None
    for b, row in enumerate(documents.tolist()):
        assert within[b].tolist() == [row[i + ahead] == row[i] for i in range(time)]
        assert packed.apart[b].tolist() == [[row[i] != row[j] for j in range(time)] for i in range(time)]
        for i in range(time):
            owners = packed.member[b, :, i].nonzero().flatten().tolist()
            assert owners == ([len({*row[: i + 1]}) - 1] if row[i + ahead] == row[i] else [])


def test_balance_by_document_is_the_mean_of_each_alone() -> None:
    scores = torch.rand(14, CONFIG.n_routed_experts, generator=torch.Generator().manual_seed(1))
    member = torch.zeros(1, 2, 14)
    member[0, 0, :5] = 1
    member[0, 1, 5:12] = 1  # the last two count nowhere
    alone = [sequence_balance_loss(part, 1, CONFIG) for part in (scores[:5], scores[5:12])]
    torch.testing.assert_close(document_balance_loss(scores, member, CONFIG), (5 * alone[0] + 7 * alone[1]) / 12)
    assert float(document_balance_loss(scores, torch.zeros(1, 2, 14), CONFIG)) == 0.0
