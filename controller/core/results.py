"""What became of actions: proofs, repeats, and what to do about those that failed or were never answered."""

from controller.core.actions import EndJob, Replay, StartGeneration, StopGeneration
from controller.core.change import Change
from controller.core.events import ActionResult
from controller.core.gates import no_vote
from controller.core.jobs import prove
from controller.core.restarts import report
from controller.core.state import UNDER_WAY, Job


def action_result(change: Change, event: ActionResult) -> None:
    """An agent carried an action out, could not, or never answered."""
    action = change.state.outstanding.pop(event.action_id, None)
    known = change.state.jobs.get(action.job) if action is not None else None
    if action is None or known is None or action.generation != known.generation:
        return
    job = change.job(known.id)
    if isinstance(action, StopGeneration | EndJob) and event.outcome == "done" and job.holds(action.node):
        prove(change, job, job.generation, f"{action.node} ended its workers")
    elif isinstance(action, StopGeneration):
        _stop_again(change, job, action)
    elif isinstance(action, StartGeneration) and event.outcome != "done" and job.status in UNDER_WAY:
        _not_started(change, job, action, event)
    elif isinstance(action, Replay) and event.outcome != "done":
        no_vote(change, job, action.id, f"the replay on {action.node} {event.outcome}: {event.detail}")


def _stop_again(change: Change, job: Job, action: StopGeneration) -> None:
    """An order to stop had no effect that we know of: repeat it while the proof is still wanted."""
    if job.restart is not None and job.generation not in job.proofs and change.state.nodes[action.node].linked:
        change.act(StopGeneration, job, action.node, action.reason, incident=action.incident)


def _not_started(change: Change, job: Job, action: StartGeneration, event: ActionResult) -> None:
    """A rank never came up. Refused: it is proven not to run. No answer: only its absence is suspected."""
    refused = event.outcome == "failed"
    text = f"{action.node} did not start its ranks: {event.detail or event.outcome}"
    if refused:
        job.exits.update({place.rank: "error" for place in action.ranks if place.rank not in job.exits})
    report(
        change,
        job,
        "crash" if refused else "node",
        text,
        known=True,
        node=action.node,
        proof=text if refused else "",
        gone=not refused,
    )
