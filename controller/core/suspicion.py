"""How much a device is doubted: a Beta-Bernoulli estimate over all jobs whose evidence fades with time."""

from controller.core.policy import Policy
from controller.core.state import Suspicion


def faded(suspicion: Suspicion | None, now: float, policy: Policy) -> float:
    """Blamed faults of a device, each counting half after every half-life (seconds); 0.0 for an unknown device."""
    if suspicion is None:
        return 0.0
    if policy.suspicion_half_life_s <= 0.0:
        return suspicion.bad
    # A clock that went backwards must not make old evidence grow.
    age = max(0.0, now - suspicion.at)
    return float(suspicion.bad * 2.0 ** (-age / policy.suspicion_half_life_s))


def blamed(suspicion: Suspicion | None, now: float, policy: Policy) -> Suspicion:
    """The suspicion after one more confirmed corruption.

    There is no counterpart that lowers it: a replay that does not reproduce the fault says nothing about a device
    (one published GEMM failed 2e-9 of the time), so only time does.
    """
    at = now if suspicion is None else max(now, suspicion.at)
    return Suspicion(bad=faded(suspicion, now, policy) + 1.0, at=at)


def mean(suspicion: Suspicion | None, now: float, policy: Policy) -> float:
    """Posterior mean of Beta(prior_bad + bad, prior_good): the estimated chance that the device is bad, in [0, 1]."""
    bad = policy.prior_bad + faded(suspicion, now, policy)
    total = bad + policy.prior_good
    return bad / total if total > 0.0 else 0.0
