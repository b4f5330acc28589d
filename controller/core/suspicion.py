"""How much a device is doubted: a Beta-Bernoulli estimate over all jobs whose evidence fades with time."""

from dataclasses import asdict, replace
from typing import Any

from controller.core.events import Device
from controller.core.policy import Policy
from controller.core.state import Suspicion

#: What undecided verdicts may add up to, in confirmed faults: of none of them is known that the device was at fault.
MOST_DOUBT = 1.0


def faded(suspicion: Suspicion | None, now: float, policy: Policy) -> float:
    """Faults held against a device, each counting half after every half-life (seconds); 0.0 for an unknown device."""
    if suspicion is None:
        return 0.0
    if policy.suspicion_half_life_s <= 0.0:
        return suspicion.bad
    # A clock that went backwards must not make old evidence grow.
    age = max(0.0, now - suspicion.at)
    return float(suspicion.bad * 2.0 ** (-age / policy.suspicion_half_life_s))


def blamed(suspicion: Suspicion | None, now: float, policy: Policy) -> Suspicion:
    """The suspicion after one more confirmed corruption, or results of one device that contradict each other.

    There is no counterpart that lowers it: a replay that does not reproduce the fault says nothing about a device
    (one published GEMM failed 2e-9 of the time), so only time does.
    """
    raised = _weighed(suspicion, now, policy, policy.corrupt_weight)
    return replace(raised, faults=raised.faults + 1)


def doubted(suspicion: Suspicion | None, now: float, policy: Policy) -> Suspicion:
    """The suspicion after an alarm of which nobody could tell whether the device was at fault."""
    before = faded(suspicion, now, policy)
    raised = _weighed(suspicion, now, policy, policy.undecided_weight)
    return replace(raised, bad=max(before, min(raised.bad, MOST_DOUBT)), undecided=raised.undecided + 1)


def excused(suspicion: Suspicion | None, now: float, policy: Policy) -> Suspicion:
    """The suspicion after a false alarm: every device computed the same, so the tolerance was at fault."""
    raised = _weighed(suspicion, now, policy, policy.false_alarm_weight)
    return replace(raised, false_alarms=raised.false_alarms + 1)


def merged(one: Suspicion, other: Suspicion, now: float, policy: Policy) -> Suspicion:
    """What two names of one device have against them, together."""
    return Suspicion(
        bad=faded(one, now, policy) + faded(other, now, policy),
        at=max(now, one.at, other.at),
        faults=one.faults + other.faults,
        undecided=one.undecided + other.undecided,
        false_alarms=one.false_alarms + other.false_alarms,
        last=max(one.last, other.last),
    )


def mean(suspicion: Suspicion | None, now: float, policy: Policy) -> float:
    """Posterior mean of Beta(prior_bad + bad, prior_good): the estimated chance that the device is bad, in [0, 1]."""
    bad = policy.prior_bad + faded(suspicion, now, policy)
    total = bad + policy.prior_good
    return bad / total if total > 0.0 else 0.0


def document(device: Device, suspicion: Suspicion | None, policy: Policy) -> dict[str, Any]:
    """What people read of a device, with all that `aged` needs to say how it stands at another time."""
    known = suspicion or Suspicion(0.0, 0.0)
    fades = {name: getattr(policy, name) for name in ("suspicion_half_life_s", "prior_bad", "prior_good")}
    return {"device": device.uuid, "serial": device.serial, **asdict(known), "fades": fades}


def aged(entry: dict[str, Any], now: float) -> dict[str, Any]:
    """The document of a device as it stands at `now`: its mean and the evidence for it, to three digits.

    `last_at` is when something was last held against it, or cleared as a false alarm; None if nothing ever was.
    """
    policy = replace(Policy(), **entry["fades"])
    known = Suspicion(entry["bad"], entry["at"])
    return {
        "device": entry["device"],
        "serial": entry["serial"],
        "mean": round(mean(known, now, policy), 3),
        "evidence": round(faded(known, now, policy), 3),
        "faults": entry["faults"],
        "undecided": entry["undecided"],
        "false_alarms": entry["false_alarms"],
        "last_at": entry["last"] or None,
    }


def _weighed(suspicion: Suspicion | None, now: float, policy: Policy, weight: float) -> Suspicion:
    known = suspicion or Suspicion(0.0, now)
    at = max(now, known.at)
    return replace(known, bad=faded(suspicion, now, policy) + weight, at=at, last=at)
