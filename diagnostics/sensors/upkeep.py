"""Watches what an optimizer does between guarded steps: its arithmetic by sample, and the state at rest by hash.

Identity. An optimizer that updates each parameter by itself (SGD, Adam, AdamW and their like) does to a copy of one
parameter, with its gradient and moments, bit for bit what it does to the original. So before every step one parameter
is drawn and copied, and after it a second optimizer of the same class repeats its update. And what the optimizer wrote
must still be there when the next guarded step begins: parameters and moments are hashed after the update and before
their next use.

That each parameter is updated by itself is known of torch's own classes. Any other must show it: its alarms count once
EARNED updates in a row, from the first, have been repeated. One of which two updates could not be repeated (it clips by
a norm over all parameters, or keeps something elsewhere), or that draws random numbers, is not asked again, and
coverage says so.

Found wrong, a tensor stays wrong: every later step alarms for it until good values are loaded (a parameter's into the
model, a moment's into the optimizer, after a wrong update both), or somebody says `forget`. No later update repairs it,
and dropping a step's gradients does not either.

Updates are copied after all other hooks before the step and compared before all others after it, and what is at rest is
hashed after those: our hooks go to the ends whenever a guarded step begins.

Exact: bits are compared, and an alarm reads infinity.
Does not see: a defect that repeats on the same device (the copy is updated there too); an update of a parameter that
was not drawn (the chance is 1 in the number of parameters a step; a wrong value that was written is then at rest, and
looks right); the first updates of a class that is not torch's, and all but the first wrong one later; a write between
two guarded steps by anybody's intent: it is an alarm as well, see `forget`; so is one by a hook of all optimizers
(`register_optimizer_step_post_hook`), which runs after ours. Cost: the update of one parameter, and two passes over
parameters and moments; under a budget, of as many tensors as are drawn; for a class that is not torch's, the states of
the generators of random numbers (0.13 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.sensors.coverage import broken
from diagnostics.sensors.digest import Stamp, differ, stamp
from diagnostics.sensors.multilinear import splitmix64
from diagnostics.sensors.sampling import NOT_DRAWN, Sampler
from diagnostics.sensors.stopwatch import Stopwatch
from diagnostics.sensors.twin import Randomness, Twin, is_torchs

AT_REST = "at rest"
UPDATE = "optimizer"
CORRUPTED = (AT_REST, UPDATE)  # sensors of the state itself
EARNED = 8  # updates: a norm that clips, or a projection, shows at the start of a training more than later

CLOSURE = "a closure runs the model again: nothing is copied before"
ARGUMENTS = "its step is given more than a closure"
DRAWS = "its step draws random numbers, which the update of one parameter alone does not draw again"
NOT_BY_ITSELF = "its update of a parameter cannot be repeated from that parameter alone"


_PARAMETERS, _MOMENTS = "parameters", "moments"


class Looked(NamedTuple):
    """One thing that was checked, or was not because of `reason`: an update, or a tensor at rest."""

    operation: str
    checked: bool
    reason: str = ""


class Wrong(NamedTuple):
    """One tensor that was found wrong; what: "digest", or the class of the optimizer whose update differs."""

    sensor: str
    name: str
    what: str
    shape: tuple[int, ...]


class Upkeep:
    """What is known of the optimizer's state, and what has been found wrong in it and not been put right.

    Where the next step is watched the sampler draws whether an update is repeated, and which tensors are hashed, by the
    number of the update; where it is not, neither is done. A check that fails itself does not stop the optimizer: it is
    counted in `failures`, and said in `looked`.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, sampler: Sampler) -> None:
        self.failures = 0
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._optimizer = optimizer
        self._sampler = sampler
        self._steps = 0
        self._inside = 0  # calls of step within each other: a subclass's calls that of its base
        self._copied: _Copied | None = None
        self._repeated = self._missed = 0  # updates, of an optimizer that is not torch's
        self._not_asked = ""  # why no update is repeated any more
        self._digests: dict[str, Stamp] = {}
        self._found: dict[Wrong, set[str]] = {}  # not told yet; by what must be loaded until it is right again
        self._told: dict[Wrong, set[str]] = {}
        self._looked: list[Looked] = []
        self._clock = Stopwatch()
        self._last_before = optimizer.register_step_pre_hook(self._before).id
        self._first_after = optimizer.register_step_post_hook(self._after).id
        self._last_after = optimizer.register_step_post_hook(self._end).id
        optimizer.register_load_state_dict_post_hook(lambda _: self._loaded(_MOMENTS))
        model.register_load_state_dict_post_hook(lambda *_: self._loaded(_PARAMETERS))  # type: ignore[no-untyped-call]

    def found(self) -> list[Wrong]:
        """Where an update or the state at rest was wrong, and still is as far as is known; it is compared now."""
        with self._clock.running(self._device()):
            if self._digests:
                self._tried(AT_REST, self._compare)
            self._told.update(self._found)
            self._found = {}
            self._digests = {}
            self._inside, self._copied = 0, None  # of a step that failed
            self._to_the_ends()
        return list(self._told)

    def _compare(self) -> None:
        known = [each for each in self._state() if each[0] in self._digests]
        wrong = differ([(self._digests[name], stamp(value)) for name, _, value in known])
        for (name, part, value), differs in zip(known, wrong, strict=True):
            self._looked.append(Looked(AT_REST, True))
            if differs:
                self._found[Wrong(AT_REST, name, "digest", tuple(value.shape))] = {part}

    def looked(self) -> list[Looked]:
        """What was checked since this was asked last, and what was not."""
        looked, self._looked = self._looked, []
        return looked

    def spent(self) -> float:
        """Seconds that the checks took since this was asked last, as far as the device is through with them."""
        return self._clock.taken()

    def forget(self) -> None:
        """The state is as it should be, whoever changed it: nothing is compared until the next update."""
        self._digests.clear()
        self._told.clear()

    def _loaded(self, part: str) -> None:
        """Parameters or moments are good again, and nothing is compared until the next update."""
        self._digests.clear()
        for wrong in (self._found, self._told):
            for each, parts in list(wrong.items()):
                parts.discard(part)
                if not parts:
                    del wrong[each]

    def _to_the_ends(self) -> None:
        """Of the hooks that others registered meanwhile."""
        before: Any = self._optimizer._optimizer_step_pre_hooks
        after: Any = self._optimizer._optimizer_step_post_hooks
        for hooks, ours, last in (
            (before, self._last_before, True),
            (after, self._first_after, False),
            (after, self._last_after, True),
        ):
            if ours in hooks:
                hooks.move_to_end(ours, last)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._digests = {}
        self._inside += 1
        if self._inside > 1:
            return
        self._steps += 1
        if not self._sampler.watches:
            return
        updated = [
            (group, p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None and p.numel()
        ]
        if not updated:
            return
        reason = _why_not(args, kwargs) or self._not_asked or ("" if self._draws(0) else NOT_DRAWN)
        if reason:
            self._looked.append(Looked("update", False, reason))
            return
        with self._clock.running(self._device()):
            self._tried("update", lambda: self._copy(*updated[splitmix64(self._steps) % len(updated)]))

    def _copy(self, group: dict[str, Any], original: nn.Parameter) -> None:
        unlike = _unlike(original) or (None if original.grad is None else _unlike(original.grad))
        if unlike is not None:
            self._looked.append(Looked("update", False, unlike))
            return
        randomness = None if is_torchs(self._optimizer) else Randomness(original.device)
        try:
            twin = Twin(self._optimizer, group, original)
        except (TypeError, ValueError, RuntimeError) as reason:
            why = f"{type(self._optimizer).__name__} cannot be made a second time: {reason}"
            self._looked.append(Looked("update", False, why))
            return
        finally:
            if randomness is not None:
                randomness.restore()
        name = self._names.get(id(original), "<not of the model>")
        self._copied = _Copied(name, original, twin, randomness)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._inside = max(0, self._inside - 1)
        if self._inside:
            return
        copied, self._copied = self._copied, None
        if copied is not None:
            with self._clock.running(self._device()):
                self._tried("update", lambda: self._repeat(*copied))

    def _end(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._inside or not self._sampler.watches:
            return
        with self._clock.running(self._device()):
            self._tried(AT_REST, self._hash)

    def _hash(self) -> None:
        for number, (name, _, value) in enumerate(self._state(), start=1):
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

    def _repeat(self, name: str, original: nn.Parameter, twin: Twin, randomness: Randomness | None) -> None:
        if randomness is None:
            self._judge(twin.repeats(original), name, original)
        elif randomness.moved():
            self._not_asked = DRAWS
            self._looked.append(Looked("update", False, DRAWS))
        else:
            try:
                repeated = twin.repeats(original)
            finally:
                randomness.restore()
            self._earn(repeated, name, original)

    def _earn(self, repeated: bool, name: str, original: nn.Parameter) -> None:
        """Of a class that is not torch's, a second update that was not repeated says more of it than of the device."""
        self._repeated += repeated
        self._missed += not repeated
        if self._missed > 1:
            self._not_asked = NOT_BY_ITSELF
        if repeated or (self._missed == 1 and self._repeated >= EARNED):
            self._judge(repeated, name, original)
        else:
            self._looked.append(Looked("update", False, NOT_BY_ITSELF))

    def _judge(self, repeated: bool, name: str, original: nn.Parameter) -> None:
        if not repeated:
            moments = any(isinstance(value, Tensor) for value in self._optimizer.state.get(original, {}).values())
            wrong = Wrong(UPDATE, name, type(self._optimizer).__name__, tuple(original.shape))
            self._found[wrong] = {_PARAMETERS, _MOMENTS} if moments else {_PARAMETERS}
        self._looked.append(Looked("update", True))

    def _draws(self, number: int) -> bool:
        """Numbers are those of this update; its key is mixed, or it would draw as the step with that key does."""
        return self._sampler.draws(splitmix64(self._steps), number)

    def _device(self) -> torch.device:
        return next((p.device for group in self._optimizer.param_groups for p in group["params"]), torch.device("cpu"))

    def _state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Every tensor at rest, with its name and what it is one of."""
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                name = self._names.get(id(p), f"<parameter {id(p):x}>")
                yield name, _PARAMETERS, p.detach()
                for key, value in self._optimizer.state.get(p, {}).items():
                    if isinstance(value, Tensor):
                        yield f"{name}.{key}", _MOMENTS, value


class _Copied(NamedTuple):
    """A parameter that is about to be updated, and the generators' states before, where they matter."""

    name: str
    original: nn.Parameter
    twin: Twin
    randomness: Randomness | None


def _why_not(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a step that is called like this is not repeated; args[0] is the optimizer."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is not None:
        return CLOSURE
    more = [*args[2:], *(value for name, value in kwargs.items() if name != "closure")]
    return ARGUMENTS if any(value is not None for value in more) else ""


def _unlike(t: Tensor) -> str | None:
    """Why a tensor's memory cannot be read as it lies."""
    return None if t.layout is torch.strided else f"a tensor of layout {t.layout}"
