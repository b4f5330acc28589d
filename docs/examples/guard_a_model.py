"""Guards a Hugging Face model, makes one of its products wrong, and shows what the guard says.

    python docs/examples/guard_a_model.py

Needs transformers. The fault is put below the guard by a dispatch mode, as a broken multiplier would: one bit of one
element of one matrix product's result.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import assay


class BrokenMultiplier(TorchDispatchMode):
    """Flips a bit of the n-th matrix product of whatever runs while it is open."""

    def __init__(self, product: int, bit: int) -> None:
        super().__init__()
        self.left, self.bit = product, bit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            if self.left == 0:
                out.view(torch.int32).view(-1)[out.numel() // 3] ^= 1 << self.bit
            self.left -= 1
        return out


def main() -> None:
    """Three clean steps, one with a fault, one clean step again."""
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM._from_config(shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = assay.Guard(model, optimizer)
    text = torch.randint(0, 256, (4, 64))
    for number in range(5):
        broken = number == 3
        fault: AbstractContextManager[Any] = BrokenMultiplier(product=20, bit=27) if broken else nullcontext()
        with guard.step() as step, fault:
            loss = model(input_ids=text, labels=text).loss
            loss.backward()
        if step.clean:
            optimizer.step()
            print(f"step {number}: loss {loss:.3f}, {step.checks} checks, clean: committed")
        else:
            first = step.alarms[0]
            print(f"step {number}: loss {loss:.3f}, {step.checks} checks, {len(step.alarms)} alarms: not committed")
            print(f"    {first.sensor}: {first.module} ({first.operation}, {first.pass_}) reads {first.reading:.3g}")
            print(f"    {first.location}")
        optimizer.zero_grad()
    lost = [row for row in guard.coverage() if row.checked < 1]
    print(f"{len(guard.coverage())} kinds of work, {len(lost)} of them not checked in full")
    for row in lost:
        print(f"    {row.module}: {row.operation}: {row.reason}")


if __name__ == "__main__":
    main()
