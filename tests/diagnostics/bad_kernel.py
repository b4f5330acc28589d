"""A kernel that gets one product wrong, below the sensors."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


class BadKernel(TorchDispatchMode):
    """Adds an error to one element of the n-th product's result; counts the products."""

    def __init__(self, at: int = -1, error: float = 1.0) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            if self.count == self.at:
                out.view(-1)[out.numel() // 3] += self.error
            self.count += 1
        return out
