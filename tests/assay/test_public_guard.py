"""`assay.Guard` around other people's models and loops: it sees every product, and changes no bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from struck import largest, product
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import assay

IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


def llama(attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).train()


def deepseek(attention: str = "sdpa", experts: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    made = transformers.DeepseekV3ForCausalLM._from_config(
        config, attn_implementation=attention, experts_implementation=experts
    )
    return made.train()


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def equal(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama, sdpa": llama,
    "llama, eager": lambda: llama("eager"),
    "deepseek, sdpa": deepseek,
    "deepseek, eager": lambda: deepseek("eager"),
    "deepseek, grouped experts": lambda: deepseek("sdpa", "grouped_mm"),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_product_of_a_hugging_face_model_is_checked(name: str) -> None:
    """Each product in turn is corrupted from outside, by a mode around the step and by one inside it."""
    model = MODELS[name]()
    guard = assay.Guard(model)
    backward(model)
    plain = grads(model)
    with guard.step() as step:
        backward(model)
    assert step.clean, step.alarms
    assert not step.skipped
    assert equal(plain, grads(model))
    with product() as counter:
        backward(model)
    for at in range(counter.count):
        with product(at), guard.step() as step:
            backward(model)
        assert not step.clean, at
        if at % 5 == 0:
            with guard.step() as step, product(at):
                backward(model)
            assert not step.clean, at
    with product(0), assay.Guard(model, enabled=False).step() as step:  # the control: nobody looks
        backward(model)
    assert step.clean


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_autocast(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(16, 32, requires_grad=True)

    def run() -> None:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = checkpoint(model, x, use_reentrant=reentrant).float().square().sum()
        loss.backward()

    run()
    plain = grads(model)
    guard = assay.Guard(model)
    with guard.step() as step:
        run()
    assert step.clean
    assert equal(plain, grads(model))
    with product() as counter:
        run()
    # Three for each of two linears, and the forward made again: but for its end where recomputation stops early.
    assert counter.count == 6 + (2 if reentrant else 1)
    for at in range(counter.count):
        with product(at, largest(30.0)), guard.step() as step:
            run()
        assert not step.clean, at


def test_gradient_accumulation() -> None:
    model = llama()
    guard = assay.Guard(model)

    def run() -> None:
        model.zero_grad()
        for ids in IDS.split(1):
            model(input_ids=ids, labels=ids).loss.backward()

    run()
    plain = grads(model)
    with guard.step() as step:
        run()
    assert step.clean
    assert equal(plain, grads(model))
    with product() as counter:
        run()
    with product(counter.count - 1), guard.step() as step:
        run()
    assert not step.clean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_of_one_token_repeated_raises_no_alarm(attention: str, dtype: torch.dtype) -> None:
    """All sums are of terms that are alike, and what attention gives back is nothing but noise."""
    model = llama(attention).to(dtype)
    optimizer, guard = torch.optim.SGD(model.parameters(), lr=1e-2), assay.Guard(model)
    ids = torch.zeros(2, 512, dtype=torch.long)
    for _ in range(4):
        with guard.step() as step:
            model(input_ids=ids, labels=ids).loss.backward()
        assert step.clean, step.alarms
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_scaled_inputs_outliers_and_first_steps_raise_no_alarm(scale: float) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = assay.Guard(model, optimizer)
    for _ in range(20):
        x = torch.randn(16, 32) * scale
        x[:, 3] *= 1000
        with guard.step() as step:
            F.cross_entropy(model(x), torch.arange(16) % 8).backward()
        assert step.clean, step.alarms
        optimizer.step()
        optimizer.zero_grad()


def test_a_budget_samples_and_coverage_says_what_it_bought() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    guard = assay.Guard(model, budget=0.02)
    x = torch.randn(64, 64)
    for _ in range(30):
        with guard.step():
            model(x).square().sum().backward()
    products = [row for row in guard.coverage() if row.operation in ("mm", "addmm")]
    share = sum(row.checked * row.calls for row in products) / sum(row.calls for row in products)
    assert 0 < share < 1
    assert any("not drawn" in row.reason for row in products)
    full = assay.Guard(model)
    with full.step():
        model(x).square().sum().backward()
    assert all(row.checked == 1 for row in full.coverage() if row.operation in ("mm", "addmm"))


def test_a_sample_that_draws_nothing_is_no_error() -> None:
    model = nn.Linear(8, 8)
    guard = assay.Guard(model, budget=0.01)
    guard.sampler.share = 1e-4
    for _ in range(3):
        with guard.step() as step:
            model(torch.ones(4, 8)).sum().backward()
    assert step.clean
    assert all(row.checked == 0 for row in guard.coverage())


def test_nothing_to_check_raises() -> None:
    with pytest.raises(assay.NothingToCheck, match="belong inside"), assay.Guard(nn.Linear(2, 2)).step():
        pass


def test_data_parallel_training_is_guarded_unchanged(tmp_path: Any) -> None:
    """One gloo rank is enough for DistributedDataParallel's hooks and buckets to run."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        parallel = nn.parallel.DistributedDataParallel(model)
        guard = assay.Guard(parallel)
        x = torch.randn(8, 16)

        def run() -> None:
            parallel.zero_grad()
            parallel(x).square().sum().backward()

        run()
        plain = grads(model)
        with guard.step() as step:
            run()
        assert step.clean
        assert equal(plain, grads(model))
        with product() as counter:
            run()
        for at in range(counter.count):
            with product(at), guard.step() as step:
                run()
            assert not step.clean
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def compiler() -> Iterator[None]:
    """What was compiled is forgotten: guards of other tests would say that they cannot see it."""
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
def test_where_a_part_is_compiled_kept_tensors_are_listed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].compile(backend="eager")
    guard = assay.Guard(model)
    with guard.step() as step:
        model[0](torch.ones(2, 4)).sum().backward()
    assert step.clean
    assert [each.reason for each in guard.coverage() if each.operation == "saved tensors"] == [
        "the model, or a part of it, is compiled: hooks for what autograd keeps would compile it anew"
    ]


@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_stays_compiled_and_its_products_are_checked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    compiled: Any = torch.compile(model)
    x = torch.randn(16, 32)

    def run() -> None:
        model.zero_grad()
        compiled(x).square().sum().backward()

    run()
    plain = grads(model)
    guard = assay.Guard(compiled, again=0)
    with guard.step() as step:
        run()
    assert step.clean
    assert step.checks == 5
    assert equal(plain, grads(model))
    assert any("torch.compile" in row.reason for row in guard.coverage())
    with product(2), guard.step() as step:
        run()
    # The outsider's mode makes torch run the model uncompiled; the guard sees what then runs.
    assert not step.clean


def test_the_package_imports_without_torch() -> None:
    code = "import sys, assay; assert 'torch' not in sys.modules; assay.Guard; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has Alarm"):
        assay.Gard  # type: ignore[attr-defined]  # noqa: B018
