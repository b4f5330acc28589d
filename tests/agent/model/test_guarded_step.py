"""A guarded step of the model, in each precision: every operator is covered, and no check fails itself."""

import pytest
import torch

from agent.model import PRESETS, V3
from diagnostics.sensors.guard import Guard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
CONFIG = PRESETS["tiny"].config
TOKENS = torch.randint(0, CONFIG.vocab_size, (2, 34), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("precision", DTYPES)
def test_every_operator_is_covered_and_no_check_fails(precision: str) -> None:
    model = V3(CONFIG, DTYPES[precision])
    model.initialise(5)
    guard = Guard(model)
    with guard.step() as step:
        model.loss(TOKENS).total.backward()
    assert (step.clean, step.skipped, guard.failures) == (True, {}, 0)
    assert {(row.operation, row.checked) for row in guard.coverage() if row.checked < 1} == set()
