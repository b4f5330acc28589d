"""How many bytes the checks of a step have to read at least, and how fast this machine reads: what explains a cost."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.checks.registry import plan_of
from diagnostics.sensors.checks.thin import is_thin

# Eight times the L3 of the machines measured so far (32 MiB).
_BYTES = 1 << 28
_ROUNDS = 5


class Touched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, in a step without a guard, every operand and result once for each operator that has a check.

    identities: bytes of operators that an identity covers. products: of those, the products'. again: of those that are
    run once more, thin ones of the former too. saved: of what autograd keeps, when it is kept, once however many
    operators keep it, and whenever it is used.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.identities = self.products = self.again = self.saved = 0
        self._kept: set[tuple[object, ...]] = set()
        self._hooks = saved_tensors_hooks(self._keep, self._use)

    def __enter__(self) -> "Touched":
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        plan = plan_of(func)
        if plan is not None and plan.check is not None:
            size = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
            if not plan.again:
                self.identities += size
                self.products += size if plan.product else 0
            if plan.again or is_thin(Call(func, args, kwargs or {}, out)):
                self.again += size
        return out

    def _keep(self, tensor: Tensor) -> Tensor:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version)
        self.saved += 0 if key in self._kept else tensor.nbytes
        self._kept.add(key)
        return tensor

    def _use(self, tensor: Tensor) -> Tensor:
        self.saved += tensor.nbytes
        return tensor


def bytes_a_second(device: torch.device) -> float:
    """How fast a device reads memory outside its caches: the best of some sums, since other work only adds time."""
    memory = torch.ones(_BYTES // 4, device=device)
    took = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        memory.sum().item()  # waits for it
        took.append(time.perf_counter() - begin)
    return _BYTES / min(took)
