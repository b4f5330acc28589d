"""The thresholds of the decisions, in one place, each with its reason."""

from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be tuned without touching a rule. Times are in seconds."""

    # A survivor's lost collective reaches us before or after the report of its cause; reports leave an agent at once
    # and cross a network in milliseconds, a raylet's death is seen in 32 ms: one second is ample and barely felt.
    cause_wait_s: float = 1.0
    # An agent reconnects after 50 ms first. A link that is down for a second is not a hiccup.
    link_grace_s: float = 1.0
    # A new controller meets no links at all. Agents back off to 2 s at most, so twice that is silence.
    reconnect_grace_s: float = 4.0
    # Importing torch and starting an actor takes 1.4 s alone, some 4 s beside a training run on two cores.
    standby_wait_s: float = 5.0
    # How long a job waits for a lost node when no spare is left. Ray itself gives a cluster 60 s.
    node_return_s: float = 60.0
    # Starting with a spare in a member's place uses the spare up, so late members get this long to show up: on a
    # crowded machine (load 18 on two cores) a cold start of torch has taken more than twenty seconds.
    spare_start_s: float = 60.0
    # Cold starts of torch on a loaded two-core machine take tens of seconds; two minutes is a broken installation.
    pending_s: float = 120.0
    # The gate of every rank is held meanwhile, and gloo's own limit is 30 s: the vote must have come or be given up.
    third_vote_s: float = 20.0
    # The last step's records and the exits travel by different sockets of one agent; this is only for what was lost.
    finish_wait_s: float = 30.0
    # A standby that cannot be made is tried again after 0.2 s, then 0.4 s: what fails three times running on every node
    # (a corpus that cannot be read, a broken installation) will not get better by waiting.
    standby_failures: int = 3
    # A restart costs about half a second, a loop of them costs a night (one public report counts 44).
    fruitless_restarts: int = 5
    # Corrupting a step and then its redo is a fault that stayed. Faults further apart are weighed as suspicion: a gate
    # that catches each of them loses one redo, a restart on the second would cost more than it saves.
    recurrence_steps: int = 0
    # Suspicion of a device never heard of: a mean of 5 %, worth ten observations, so that one fault does not decide.
    prior_bad: float = 0.5
    prior_good: float = 9.5
    # Of 353 nodes that returned from repair, half failed again within seven days: older evidence counts half.
    suspicion_half_life_s: float = 7 * 86400.0
    # What a verdict weighs against a device, in confirmed faults. That a fault did not reproduce lowers nothing: of 18
    # published incidents every one came from a permanently bad device, and 1 of 50 reruns of one of them differed.
    corrupt_weight: float = 1.0
    # An alarm that nobody could judge: mostly a tight tolerance. Three of them make a suspect, none takes a device out.
    undecided_weight: float = 0.25
    # Every device computed the same: the tolerance was at fault, and is widened.
    false_alarm_weight: float = 0.0
    # (0.5 + 1) / 11 = 0.14: one confirmed corruption makes a suspect.
    suspect_at: float = 0.1
    # (0.5 + 2) / 12 = 0.21: two within 32 hours, or three within a week, whatever the jobs and steps, take a device
    # out. One may be a particle's; two are not: six silent corruptions in 54 days on 16,384 GPUs (arXiv 2407.21783,
    # table 5), bad devices among them, are 5e-5 a device and week, so two in one week 1e-9. Each further one that is
    # waited for costs a job some 1/q steps beside a device that corrupts a fraction q of them.
    quarantine_at: float = 0.2
    # How long an agent has to answer: it ends processes in milliseconds, promotes in 0.1 s; the rest is for reconnects.
    action_s: float = 20.0
    # Warm workers are prepared as slowly as a job starts.
    prepare_s: float = 120.0

    def changed(self, values: dict[str, float]) -> "Policy":
        """This policy with some fields replaced; what is unknown, negative or not finite is left as it was."""
        known = {item.name: item.type for item in fields(self)}
        taken = {name: value for name, value in values.items() if name in known and isfinite(value) and value >= 0}
        typed: dict[str, Any] = {name: int(value) if known[name] is int else value for name, value in taken.items()}
        return replace(self, **typed)
