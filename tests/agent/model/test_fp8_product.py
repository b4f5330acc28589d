"""The three products of an FP8 linear: what they multiply, their gradients, their bits, and who is not in FP8."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.model import PRESETS, V3
from agent.model.fp8 import Emulation, Fp8, Recipe, Summary, read, summarise
from agent.model.fp8.emulation import quantised
from agent.model.linear import Linear
from diagnostics.faults.inject import Injector
from diagnostics.faults.spec import OPS, FaultSpec, Op
from diagnostics.sensors.guard import Guard

FP8 = torch.float8_e4m3fn


def linear(inner: int = 200, outer: int = 150) -> Linear:
    made = Linear(inner, outer, FP8)
    made.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return made


def activation(tokens: int = 70, inner: int = 200) -> Tensor:
    x = torch.randn(tokens, inner, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    return x.requires_grad_()


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(power_of_two=False)])
def test_forward_and_gradients_are_those_of_the_dequantised_operands(recipe: Recipe) -> None:
    """Reference: autograd in float64 through products whose operands are quantised by themselves, pass by pass."""
    module, x = linear(), activation()
    module.fp8 = Fp8(Emulation(recipe))
    y = module(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    y.backward(grad)

    left = quantised(x.detach(), 1, 128, recipe).double().requires_grad_()
    right = quantised(module.weight.detach(), 128, 128, recipe).double()
    true = F.linear(left, right)
    true.backward(quantised(grad, 1, 128, recipe).double())
    by_token = quantised(x.detach(), 128, 1, recipe).double()
    weight = torch.zeros(150, 200, dtype=torch.float64, requires_grad=True)
    F.linear(by_token, weight).backward(quantised(grad, 128, 1, recipe).double())

    assert y.dtype == torch.bfloat16
    assert relative(y, true) < 2.0**-8  # one rounding to bf16
    assert left.grad is not None
    assert relative(x.grad, left.grad) < 2.0**-8
    assert weight.grad is not None
    assert module.weight.grad is not None
    assert module.weight.grad.dtype == torch.float32
    assert relative(module.weight.grad, weight.grad) < 1e-6  # the fp32 sum itself


def relative(found: Tensor | None, true: Tensor) -> float:
    assert found is not None
    return float((found.detach().double() - true.detach()).norm() / true.detach().norm())


def test_it_is_not_the_product_of_the_unquantised_operands() -> None:
    """The control: FP8 errs by some per cent an element."""
    module, x = linear(), activation()
    assert 0.01 < relative(module(x), F.linear(x.detach().double(), module.weight.detach().double())) < 0.05


@pytest.mark.parametrize("needs", ["x", "weight"])
def test_only_what_is_asked_for_is_made(needs: str) -> None:
    module, x = linear(), activation()
    x.requires_grad_(needs == "x")
    module.weight.requires_grad_(needs == "weight")
    module(x).float().sum().backward()
    assert (x.grad is not None, module.weight.grad is not None) == (needs == "x", needs == "weight")


def test_other_fp32_products_keep_their_bits() -> None:
    """The setting that lets FP8's products go through bf16 is the process's own, and is put back."""
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    before = a @ b
    module, x = linear(), activation()
    module(x).float().sum().backward()
    assert torch.equal(a @ b, before)


def test_which_linears_are_fp8() -> None:
    model = V3(PRESETS["tiny"].config, compute_dtype=FP8)
    quantising = {name for name, m in model.named_modules() if isinstance(m, Linear) and m.fp8 is not None}
    plain = {name for name, m in model.named_modules() if isinstance(m, Linear)} - quantising
    routers = {f"{block}.moe.router.centroids" for block in ("layers.1", "layers.2", "mtp.0.block")}
    assert plain == {"head", "mtp.0.projection", *routers}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_model_trains_and_says_what_was_quantised() -> None:
    model = V3(PRESETS["tiny"].config, compute_dtype=FP8)
    tokens = torch.randint(0, 256, (2, 130), generator=torch.Generator().manual_seed(4))
    result = model.loss(tokens)
    result.total.backward()
    wide = V3(PRESETS["tiny"].config).loss(tokens)
    assert float(result.main) == pytest.approx(float(wide.main), rel=2e-3)
    assert float(result.main) != float(wide.main)
    summaries = summarise(read(tallies(model)))
    assert [(s.tensor, s.pass_) for s in summaries] == [
        ("activation", "fprop"),
        ("weight", "fprop"),
        ("gradient", "dgrad"),
    ]
    names = dict(model.named_modules())
    for summary in summaries:
        assert {summary.amax_module, summary.saturation_module, summary.underflow_module} <= names.keys()
        assert summary.amax > 0
        assert 0 <= summary.saturation < 0.05
        assert 0 <= summary.underflow <= 1
    largest = max(float(m.weight.detach().abs().max()) for m in model.modules() if isinstance(m, Linear) and m.fp8)
    assert summaries[1].amax == largest


def tallies(model: nn.Module) -> list[tuple[str, object]]:
    found = [(name, m.fp8) for name, m in model.named_modules() if isinstance(m, Linear) and m.fp8]
    return [(name, tally) for name, fp8 in found for tally in fp8.tallies]


def test_a_summary_takes_not_a_number_for_the_worst() -> None:
    one, other = Fp8(), Fp8()
    one.activation.add(torch.tensor([float("nan"), 0.0, 0.0, 1.0]), 4)
    other.activation.add(torch.tensor([9.0, 1.0, 1.0, 4.0]), 4)
    (found,) = summarise(read([("a", one.activation), ("b", other.activation)]))
    assert isinstance(found, Summary)
    assert (found.amax_module, found.saturation_module, found.saturation) == ("a", "b", 0.25)
    assert (found.underflow_module, found.underflow) == ("b", 0.25)


_PROGRAM = """
import hashlib, torch
from agent.model import PRESETS, V3
torch.set_num_threads(1)
model = V3(PRESETS["tiny"].config, compute_dtype=torch.float8_e4m3fn)
tokens = torch.randint(0, 256, (2, 130), generator=torch.Generator().manual_seed(4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(3):
    optimizer.zero_grad()
    model.loss(tokens).total.backward()
    optimizer.step()
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""


def test_two_processes_make_the_same_bits() -> None:
    run = [sys.executable, "-c", _PROGRAM]
    first, second = (subprocess.run(run, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second
    assert len(first.strip()) == hashlib.sha256().digest_size * 2


@pytest.mark.parametrize("op", OPS)
def test_the_last_bit_of_a_product_is_seen_by_making_it_again(op: Op) -> None:
    torch.manual_seed(0)
    model = V3(PRESETS["tiny"].config, torch.float8_e4m3fn)
    tokens = torch.randint(0, 256, (1, 9))
    for again, clean in ((1.0, False), (0.0, True)):  # the second is the control: below the identity's floor
        guard = Guard(model, again=again)
        with Injector(model, FaultSpec(1, op, "bitflip", 0, seed=3)) as injector, guard.step(1) as step:
            model.loss(tokens).total.backward()
        assert injector.fired is not None
        assert ("recompute" in {alarm.sensor for alarm in step.alarms}) is not clean
        assert not guard.failures
