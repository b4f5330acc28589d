"""Compares what activation checkpointing makes again in the backward with what the forward made, bit for bit.

Identity. An operator is a function of its operands: what it makes of the same values has the same bits. Which values
are the same follows from what made them (`origins`): the key of a result is its operator, the numbers it was given, and
the names of its operands; a result is named by its key. So nothing depends on how the two runs are aligned: one that
stops early, leaves out what a policy kept, or takes a weight's cast from autocast's cache finds the same keys, and what
has no equal in the forward is not compared. There is no tolerance.

What is compared is the hash of `multilinear`; on a CPU of what is small the bytes themselves, and of what is large the
hash of the sums, mod 2^64, of those 64-bit words that lie a multiple of COLUMNS words apart, which takes a tenth of the
time. One changed word always shows, and several unless in every column of words they add up to nothing; COLUMNS is a
prime, so that lanes, rows and tiles share none.

Sees: every transient fault in either run of an operator that is run again, down to the last bit; a value that changed
between two operators of the forward, a weight that changed between the two runs. The alarm names the operator: on a CPU
what was made of a wrong value is not compared.
Does not see: a defect that gives the same wrong answer twice; wrong inputs of the region; what is not run again (the
region's end, where the second run stops early, and what a policy kept); what becomes of a value after its last use.
Does not compare: operators that draw random numbers or add in no fixed order on GPUs, and grouped products, which leave
rows unwritten; on GPUs nor what is made of their results. On CPUs such results go by their content: what follows a
dropout is compared if both runs drew the same numbers, and not if they did not. Nor does it compare what follows a read
of memory that nobody has written, or that was written to since the forward read it, or that a kernel made which torch
does not show.
Cost: one pass over a result in either run, and some 50 us for each operator of a region.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from diagnostics.sensors.checks.arguments import tensors, written_by
from diagnostics.sensors.checks.gemm import fp32_precision
from diagnostics.sensors.checks.kinds import is_in_place, kind_of, name_of
from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.checks.recompute import dropout_of, results_of, why_not
from diagnostics.sensors.checks.rows import PER_DIFFERENCE, bits
from diagnostics.sensors.digest import stamp
from diagnostics.sensors.origins import Name, Origins, fills, layout
from diagnostics.sensors.places import Place
from diagnostics.sensors.saved import in_order

SENSOR = "fingerprint"
UNMATCHED = "the forward made nothing of these values: what is made again is not compared"

# What is no larger is kept itself: hashing takes 30 us, whatever the size.
SMALL_BYTES = 1 << 12
# What is larger is added up first: 60 GB/s in the caches instead of 8, and 20 us for the sums' hash.
LARGE_BYTES = 1 << 16
COLUMNS = 1021

# Write all of their first argument, whatever it held.
_OVERWRITES = frozenset({"copy_", "fill_", "zero_"})
# What torch.tensor calls when it has made one.
_FROM_HOST = frozenset({"lift_fresh", "lift_fresh_copy"})
# Rows that are in no group are not written.
_UNNAMED = _FROM_HOST | {"_grouped_mm", "_scaled_grouped_mm"}
_MULTIPLIES = frozenset({"product", "attention", "convolution"})

# The name of memory that nobody has written. What is made of it goes by its content, as on GPUs nothing can.
_BLANK = "blank"

Print = int | bytes | Tensor


@dataclass(slots=True)
class Record:
    """What the forward made. prints: of each result, with its strides; None if it was not drawn. covered: its call
    counts as checked."""

    number: int
    place: Place
    covered: bool
    prints: list[tuple[Print, tuple[int, ...]]] | None


@dataclass(frozen=True, slots=True)
class Compared:
    """A result that was made again. reading: fp32 [1] on its device, 0 or PER_DIFFERENCE."""

    result: str
    reading: Tensor
    shape: tuple[int, ...]


class Fingerprints:
    """The records of one step. Everything here runs under `quiet`, and nothing waits for a device."""

    def __init__(self) -> None:
        self._records: dict[Hashable, Record] = {}
        self._origins = Origins()

    def look(
        self, call: Call, place: Place, covered: bool, drawn: Callable[[], bool], all_drawn: bool
    ) -> tuple[Record | None, list[Compared]] | None:
        """An operator of a checkpointed region has run: keep what it made, or compare it.

        place, covered: of this call. drawn: whether its result is hashed, asked in the forward. all_drawn: whether all
        are. If it was made again, the forward's record, None without one, and what was compared; else None.
        """
        results, changed = _made(call.out), _changed(call)
        if not results and not changed:
            return None
        in_forward = torch._C._current_autograd_node() is None
        device = (results or changed)[0].device.type
        if _has_no_name(call, device):
            for each in (*results, *changed):
                self._origins.call(each, _content(each) if all_drawn else None)
            return None
        key = self._key(call, device)
        record = self._records.get(key) if key is not None else None
        if record is None and key is not None and in_forward:
            prints = _prints(call, results or changed) if drawn() else None
            record = self._records[key] = Record(len(self._records), place, covered, prints)
            compared: list[Compared] = []
        elif record is not None:
            compared = self._compared(record, results or changed, in_forward)
        else:
            compared = []
        wrong = any(_on_host(each) and bool(each.reading) for each in compared)
        for at, each in enumerate((*results, *changed)):
            if record is not None and not wrong:
                self._origins.call(each, (record.number, at))
            else:
                self._origins.call(each, _content(each) if all_drawn else None)
        return None if in_forward else (record, compared)

    def changed(self, call: Call) -> None:
        """An operator has run outside of any region, or unseen: what it wrote to is another value."""
        for each in _changed(call):
            self._origins.wrote(each)

    def appeared(self, call: Call) -> None:
        """Memory was asked for, and nobody knows what it holds, or it came from the host, and goes by its content."""
        known = name_of(call.func) in _FROM_HOST
        for each in (*_made(call.out), *_changed(call)):
            blank = _BLANK if each.device.type == "cpu" else None
            self._origins.call(each, _content(each) if known else blank)

    def given(self, out: Tensor) -> None:
        """A kernel that nobody sees has made this: it goes by its content."""
        self._origins.call(out, _content(out))

    def clear(self) -> None:
        """Forget everything."""
        self._records.clear()
        self._origins.clear()

    def _compared(self, record: Record, results: list[Tensor], in_forward: bool) -> list[Compared]:
        if record.prints is None:
            return []
        found = []
        for at, (result, (first, strides)) in enumerate(zip(results, record.prints, strict=False)):
            if result.stride() == strides:
                reading = _reading(result, first, _print(result))
                found.append(Compared("out" if at == 0 else f"out{at}", reading, tuple(result.shape)))
        if in_forward:  # twice the same: memory may have changed that nobody saw change
            if any(not _on_host(each) or bool(each.reading) for each in found):
                record.prints = None
            return []
        return found

    def _key(self, call: Call, device: str) -> Hashable | None:
        """What the operator was given; None if an operand holds nothing yet, or has no memory of its own."""
        func, args = call.func, call.args
        given: list[Hashable] = [func, *_settings(kind_of(func), device)]
        if name_of(func) in _OVERWRITES and fills(args[0]):
            given.append(layout(args[0]))
            args = args[1:]
        for value in (*args, *call.kwargs.items()):
            name = self._named(value)
            if name is None:
                return None
            given.append(name)
        return tuple(given)

    def _named(self, value: Any) -> Name | None:
        if isinstance(value, Tensor):
            name = self._origins.of(value)
            return None if name is not None and name[0] is _BLANK else name
        if isinstance(value, (list, tuple)):
            names = [self._named(each) for each in value]
            return None if any(name is None for name in names) else tuple(names)
        return type(value), value


@cache
def changes(func: OpOverload) -> bool:
    """Whether an operator that no check wants still has to be told to the fingerprints."""
    return kind_of(func) == "blank" or is_in_place(func) or name_of(func) in _FROM_HOST


def _made(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else tensors(out)


def _changed(call: Call) -> list[Tensor]:
    return written_by(call.func, call.args, call.kwargs) if is_in_place(call.func) else []


def _has_no_name(call: Call, device: str) -> bool:
    """Whether a result is not a function of the operands' values."""
    if call.func.namespace != "aten" or name_of(call.func) in _UNNAMED:
        return True
    return why_not(call.func, device, dropout_of(call)) is not None


def _settings(kind: str, device: str) -> tuple[Name, ...]:
    """What else the bits depend on: threads share sums, and products may be made in less than fp32."""
    threads = torch.get_num_threads() if device == "cpu" else 0
    if kind not in _MULTIPLIES:
        return (threads,)
    return threads, fp32_precision(device)


def _on_host(compared: Compared) -> bool:
    return compared.reading.device.type == "cpu"


def _content(t: Tensor) -> Name | None:
    """A name for what a tensor holds, whoever made it; None where the host would have to wait, or where more lies."""
    return ("holds", _print(t)) if t.device.type == "cpu" and fills(t) else None


def _prints(call: Call, results: list[Tensor]) -> list[tuple[Print, tuple[int, ...]]]:
    return [(_print(each), each.stride()) for each in results[: results_of(call.func, len(results))]]


def _print(t: Tensor) -> Print:
    if t.device.type == "cpu" and t.nbytes <= SMALL_BYTES:
        return bits(t.detach()).numpy().tobytes()
    values = in_order(t)
    return stamp(_summed(values) if t.device.type == "cpu" and t.nbytes > LARGE_BYTES else values)


def _summed(t: Tensor) -> Tensor:
    """int64 [COLUMNS]: the sums of every COLUMNS-th 64-bit word; `t` itself where it cannot be seen as such words."""
    if not t.is_contiguous() or t.nbytes % 8 or t.storage_offset() * t.element_size() % 8:
        return t
    words = bits(t.detach()).view(-1).view(torch.int64)
    whole = len(words) // COLUMNS * COLUMNS
    sums = words[:whole].view(-1, COLUMNS).sum(0)
    sums[: len(words) - whole] += words[whole:]
    return sums


def _reading(result: Tensor, first: Print, second: Print) -> Tensor:
    equal: Any = first == second
    if isinstance(equal, Tensor):
        return torch.where(equal, 0.0, PER_DIFFERENCE).reshape(1)
    return result.new_full((1,), 0.0 if equal else PER_DIFFERENCE, dtype=torch.float32)
