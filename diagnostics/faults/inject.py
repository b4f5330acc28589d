"""Injects one fault into one product of a real training step, below every sensor: in the operator's own result."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diagnostics.faults.corrupt import corrupt
from diagnostics.faults.places import TILE
from diagnostics.faults.spec import FaultSpec, FaultSpecError
from diagnostics.sensors.announced import Announced, watchers

_LAYER = re.compile(r"^layers\.(\d+)\.")
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
# A result with fewer rows than a tile has (an expert with few tokens) is passed over: the fault would be another one.
_FEWEST_ROWS = TILE
_HOPS = 4
_EXPERT = ".experts."


@dataclass(frozen=True, slots=True)
class _Work:
    """The linear whose products are being made now. weight: the storage that tells dgrad from wgrad."""

    name: str
    forward: bool
    weight: int


class Injector:
    """Corrupts one linear's result once while the context is open: around one step's forward and backward.

    Targets are the modules below `layers.N.` with a 2-D weight (MTP modules are not layers). The seed draws one. If it
    does not run, or has fewer rows than a tile (an expert with few tokens), another takes its place: in the backward,
    one drawn among those that ran; in the forward, which cannot know who will run, the next that does. `fired` says
    what was changed and where, or is None.

    Raises FaultSpecError when the model has no such layer.
    """

    def __init__(self, model: nn.Module, spec: FaultSpec) -> None:
        self.spec = spec
        self.fired: dict[str, Any] | None = None
        self._rng = random.Random(f"{spec.seed}/{spec.op}/{spec.fault}")
        layers = _linears_by_layer(model)
        if not layers:
            raise FaultSpecError("the model has no linear below layers.N")
        layer = spec.layer if spec.layer is not None else self._rng.choice(sorted(layers))
        if layer not in layers:
            raise FaultSpecError(f"layer is {layer}: the model has layers {min(layers)}..{max(layers)}")
        self._names = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 2}
        self._targets = layers[layer]
        self._drawn = self._rng.choice(self._targets)
        self._reached = False  # some linear of the layer has run in the forward
        self._experts_began = False  # ... and some expert of it
        self._ripe = False  # the drawn linear's turn has come, or passed
        self._ran: list[str] = []  # linears of the layer that ran and will make such a backward product
        self._work: _Work | None = None
        self._seen = _SeeLinears(self)
        self._below = _Corrupt(self)
        self._open = False  # announced products may be made after the context has closed
        self._modes = ExitStack()

    def __enter__(self) -> Injector:
        self._modes.enter_context(self._below)
        self._modes.enter_context(self._seen)
        self._open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open = False
        self._modes.close()

    def linear(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one F.linear of the forward, with its name known to the dispatch mode below."""
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        name = self._name_of(weight)
        if name is None:
            return func(*args, **kwargs)
        self._work = _Work(name, True, weight.data_ptr())
        out = func(*args, **kwargs)
        self._work = None
        if self.spec.op != "fprop":
            self._watch_backward(out, name, weight.data_ptr())
            source = args[0] if args else kwargs["input"]
            rows = weight.shape[0] if self.spec.op == "wgrad" else out.numel() // out.shape[-1]
            makes_it = weight.requires_grad if self.spec.op == "wgrad" else source.requires_grad
            if name in self._targets and makes_it and rows >= _FEWEST_ROWS:
                self._ran.append(name)
        return out

    def result(self, operands: tuple[Any, ...], out: Tensor) -> None:
        """One product has been made below: corrupt it if it is the one."""
        work = self._work
        if self.fired is not None or work is None:
            return
        enough = out.dim() == 2 and out.shape[0] >= _FEWEST_ROWS
        if work.forward:
            pass_, due = "fprop", self._due_in_forward(work.name)
        else:
            is_dgrad = any(isinstance(o, Tensor) and o.data_ptr() == work.weight for o in operands)
            pass_, due = "dgrad" if is_dgrad else "wgrad", work.name == self._drawn_that_ran()
        if pass_ == self.spec.op and due and enough:
            self._strike(work.name, pass_, out)

    def announced(self, product: Announced, out: Tensor) -> None:
        """One announced product has been made: the same choice as among those that torch's functions show."""
        name = self._name_of(product.weight)
        if name is None or not self._open:
            return
        forward = product.pass_ == "fprop"
        if forward and self.spec.op != "fprop" and name in self._targets:
            rows = product.weight.shape[0] if self.spec.op == "wgrad" else out.shape[0]
            if rows >= _FEWEST_ROWS:
                self._ran.append(name)
        if self.fired is not None or product.pass_ != self.spec.op or out.shape[0] < _FEWEST_ROWS:
            return
        if self._due_in_forward(name) if forward else name == self._drawn_that_ran():
            self._strike(name, product.pass_, out)

    def _strike(self, name: str, pass_: str, out: Tensor) -> None:
        self.fired = {"module": name, "op": pass_, "fault": self.spec.fault, "bit": self.spec.bit}
        self.fired |= {"dtype": str(out.dtype).removeprefix("torch."), "shape": list(out.shape)}
        self.fired |= corrupt(out, self.spec, self._rng)

    def _due_in_forward(self, name: str) -> bool:
        """Whether the drawn linear's turn has come, or has passed because it had nothing to do."""
        if name not in self._targets:
            self._ripe = self._ripe or self._reached
            return self._ripe
        self._reached = True
        self._ripe = self._ripe or name == self._drawn or self._past_drawn_expert(name)
        self._experts_began = self._experts_began or _EXPERT in name
        return self._ripe

    def _past_drawn_expert(self, name: str) -> bool:
        """Experts run in order and some not at all: a later one's product of the same kind (gate, up or down, which one
        expert may make after another's), or what follows them, shows that the turn is over."""
        if _EXPERT not in self._drawn:
            return False
        if _EXPERT not in name:
            return self._experts_began
        same = name.rpartition(".")[2] == self._drawn.rpartition(".")[2]
        return same and self._targets.index(name) > self._targets.index(self._drawn)

    def _drawn_that_ran(self) -> str | None:
        """The linear the seed draws among those that ran; settled at the first backward product."""
        if self._ran and self._drawn not in self._ran:
            self._drawn = self._rng.choice(self._ran)
        return self._drawn if self._ran else None

    def _name_of(self, weight: Tensor) -> str | None:
        """The weight's module, also through the cast that made a temporary of it."""
        name, node = self._names.get(id(weight)), weight.grad_fn
        for _ in range(_HOPS):
            if name is not None or node is None:
                break
            name = self._names.get(id(getattr(node, "variable", None)))
            node = node.next_functions[0][0] if node.next_functions else None
        return name

    def _watch_backward(self, out: Tensor, name: str, weight: int) -> None:
        """Know the name while the backward node runs. A view may lie between the result and its node."""
        node: Any = out.grad_fn
        while node is not None and node.name() not in ("MmBackward0", "AddmmBackward0"):
            node = node.next_functions[0][0] if node.next_functions else None
        if node is None:
            return

        def before(grads: tuple[Tensor | None, ...]) -> None:
            self._work = _Work(name, False, weight)

        def after(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
            self._work = None

        node.register_prehook(before)
        node.register_hook(after)


def _linears_by_layer(model: nn.Module) -> dict[int, list[str]]:
    layers: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        match = _LAYER.match(name)
        if match and parameter.dim() == 2:
            layers.setdefault(int(match[1]), []).append(name.removesuffix(".weight"))
    return layers


class _SeeLinears(TorchFunctionMode):
    """Names the linears of the forward as they run."""

    def __init__(self, injector: Injector) -> None:
        super().__init__()
        self._injector = injector

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return self._injector.linear(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        return (self._injector, *out) if func is watchers else out


class _Corrupt(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands where the kernels' results come out."""

    def __init__(self, injector: Injector) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._injector = injector

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            self._injector.result(args, out)
        return out
