"""Watches what an optimizer does between guarded steps: its arithmetic by sample, and the state at rest by hash.

Identity. An optimizer that updates each parameter by itself (SGD, Adam, AdamW and their like) does to a copy of one
parameter, with its gradient and moments, bit for bit what it does to the original. So before every step one parameter
is drawn and copied, and after it a second optimizer of the same class repeats its update. And what the optimizer wrote
must still be there when the next guarded step begins: parameters and moments are hashed after the update and before
their next use.

Exact: bits are compared, and an alarm reads infinity.
Does not see: a defect that repeats on the same device (the copy is updated there too); an update of a parameter that
was not drawn (the chance is 1 in the number of parameters a step; a wrong value that was written is then at rest, and
looks right); a write between two guarded steps by anybody's intent: it is an alarm as well, see `forget`. Cost: the
update of one parameter, and two passes over parameters and moments; under a budget, of as many tensors as are drawn.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.sensors.coverage import broken
from diagnostics.sensors.digest import Stamp, differ, stamp
from diagnostics.sensors.multilinear import splitmix64
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.readings import Site
from diagnostics.sensors.rows import same
from diagnostics.sensors.sampling import NOT_DRAWN, Sampler

AT_REST = "at rest"
UPDATE = "optimizer"


class Looked(NamedTuple):
    """One thing that was checked, or was not because of `reason`: an update, or a tensor at rest."""

    operation: str
    checked: bool
    reason: str = ""


class Upkeep:
    """What is known of the optimizer's state, and what has been found wrong since the last guarded step began.

    The sampler draws whether an update is repeated, and which tensors are hashed, by the number of the update. A check
    that fails itself does not stop the optimizer: it is counted in `failures`, and said in `looked`.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, sampler: Sampler) -> None:
        self.failures = 0
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._optimizer = optimizer
        self._sampler = sampler
        self._steps = 0
        self._copied: tuple[str, nn.Parameter, Optimizer] | None = None
        self._digests: dict[str, Stamp] = {}
        self._found: list[Site] = []
        self._looked: list[Looked] = []
        self._seconds = 0.0
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        optimizer.register_load_state_dict_post_hook(lambda _: self.forget())
        model.register_load_state_dict_post_hook(lambda *_: self.forget())  # type: ignore[no-untyped-call]

    def found(self) -> list[Site]:
        """Where an update or the state at rest was wrong since this was asked last; the state is compared now."""
        begin = time.perf_counter()
        if self._digests:
            self._tried(AT_REST, self._compare)
        found, self._found = self._found, []
        self._digests = {}
        self._seconds += time.perf_counter() - begin
        return found

    def _compare(self) -> None:
        known = [(name, value) for name, value in self._state() if name in self._digests]
        wrong = differ([(self._digests[name], stamp(value)) for name, value in known])
        for (name, value), differs in zip(known, wrong, strict=True):
            self._looked.append(Looked(AT_REST, True))
            if differs:
                self._found.append(Site(AT_REST, name, "digest", "step", tuple(value.shape)))

    def looked(self) -> list[Looked]:
        """What was checked since this was asked last, and what was not."""
        looked, self._looked = self._looked, []
        return looked

    def spent(self) -> float:
        """Seconds that the checks took since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def forget(self) -> None:
        """The state was changed on purpose, e.g. loaded: nothing is compared until the next update."""
        self._digests.clear()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1
        updated = [
            (group, p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None and p.numel()
        ]
        if not updated:
            return
        if len(args) > 1 or kwargs.get("closure") is not None:  # args[0] is the optimizer
            self._looked.append(Looked("update", False, "a closure runs the model again: nothing is copied before"))
        elif not self._draws(0):
            self._looked.append(Looked("update", False, NOT_DRAWN))
        else:
            begin = time.perf_counter()
            self._tried("update", lambda: self._copy(*updated[splitmix64(self._steps) % len(updated)]))
            self._seconds += time.perf_counter() - begin

    def _copy(self, group: dict[str, Any], original: nn.Parameter) -> None:
        unlike = _unlike(original) or (None if original.grad is None else _unlike(original.grad))
        if unlike is not None:
            self._looked.append(Looked("update", False, unlike))
            return
        try:
            second = _twin(self._optimizer, group, original)
        except (TypeError, ValueError, RuntimeError) as reason:
            why = f"{type(self._optimizer).__name__} cannot be made a second time: {reason}"
            self._looked.append(Looked("update", False, why))
            return
        self._copied = (self._names.get(id(original), "<not of the model>"), original, second)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        begin = time.perf_counter()
        copied, self._copied = self._copied, None
        if copied is not None:
            self._tried("update", lambda: self._repeat(*copied))
        self._digests = {}
        self._tried(AT_REST, self._hash)
        self._seconds += time.perf_counter() - begin

    def _hash(self) -> None:
        for number, (name, value) in enumerate(self._state(), start=1):
            unlike = _unlike(value)
            if unlike is None and self._draws(number):
                self._digests[name] = stamp(value)
            else:
                self._looked.append(Looked(AT_REST, False, unlike or NOT_DRAWN))

    def _tried(self, operation: str, work: Callable[[], None]) -> None:
        """See `Inspection.tried`."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - see above
            self.failures += 1
            self._looked.append(Looked(operation, False, broken(error)))

    def _repeat(self, name: str, original: nn.Parameter, second: Optimizer) -> None:
        twin = second.param_groups[0]["params"][0]
        with quiet():
            second.step()
            if not same(twin.detach(), original.detach()):
                kind = type(self._optimizer).__name__
                self._found.append(Site(UPDATE, name, kind, "step", tuple(original.shape)))
        self._looked.append(Looked("update", True))

    def _draws(self, number: int) -> bool:
        """Numbers are those of this update; its key is mixed, or it would draw as the step with that key does."""
        return self._sampler.draws(splitmix64(self._steps), number)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                name = self._names.get(id(p), f"<parameter {id(p):x}>")
                yield name, p.detach()
                for key, value in self._optimizer.state.get(p, {}).items():
                    if isinstance(value, Tensor):
                        yield f"{name}.{key}", value


def _twin(optimizer: Optimizer, group: dict[str, Any], original: nn.Parameter) -> Optimizer:
    """An optimizer of the same class and state that holds a copy of one parameter and its gradient."""
    with quiet():
        twin = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
        twin.grad = None if original.grad is None else original.grad.detach().clone()
        options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        made: Any = type(optimizer)
        second: Optimizer = made([{"params": [twin], **options}])
        second.state[twin] = copy.deepcopy(optimizer.state.get(original, {}))
        return second


def _unlike(t: Tensor) -> str | None:
    """Why a tensor's memory cannot be read as it lies."""
    return None if t.layout is torch.strided else f"a tensor of layout {t.layout}"
