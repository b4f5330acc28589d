"""How far a checkpoint is trusted: captured, durable, verified; or revoked on evidence."""

from dataclasses import replace

from controller.core.actions import AskHuman, PromoteCheckpoint, RevokeCheckpoints
from controller.core.change import Change
from controller.core.events import CheckpointCaptured, CheckpointDurable, ShardRefused, StepFinal
from controller.core.incidents import join, open_incident
from controller.core.state import UNDER_WAY, Checkpoint, Job

KEPT = 64  # remembered of each job: restores reach back to the newest good one or two


def captured(change: Change, event: CheckpointCaptured) -> None:
    """A checkpoint is on its way; its step must be seen final before it is trusted."""
    job = change.state.jobs.get(event.job)
    if job is not None and event.step not in job.checkpoints and 0 < event.generation <= job.generation:
        _remember(change.job(event.job), Checkpoint(event.step, event.generation, "", "captured"))


def durable(change: Change, event: CheckpointDurable) -> None:
    """A checkpoint is on storage: verified once its step is final with the same chain."""
    known = change.state.jobs.get(event.job)
    if known is None or not 0 < event.generation <= known.generation:
        return
    mark = known.checkpoints.get(event.step) or Checkpoint(event.step, event.generation, "", "captured")
    if mark.trust == "revoked" and event.generation > mark.generation:
        mark = Checkpoint(event.step, event.generation, "", "captured")  # a later generation wrote the step anew
    if mark.trust != "captured":
        return
    job = change.job(event.job)
    _remember(job, replace(mark, trust="durable"))
    _agree(change, job, event.step, event.chain)


def step_final(change: Change, job: Job, event: StepFinal) -> None:
    """A step is final; if it is a checkpoint's, that much of its proof is there."""
    mark = job.checkpoints.get(event.step)
    if mark is not None and mark.trust in ("captured", "durable") and not mark.final:
        job.checkpoints[event.step] = replace(mark, final=True)
        _agree(change, job, event.step, event.chain)


def shard_refused(change: Change, event: ShardRefused) -> None:
    """A restore met a bad shard and fell back: the outage is the checkpoint's, and nobody may use it again."""
    known = change.state.jobs.get(event.job)
    if known is None or not 0 < event.generation <= known.generation:
        return
    mark = known.checkpoints.get(event.step)
    if mark is not None and (mark.trust == "revoked" or mark.generation >= event.generation):
        return  # told again, maybe of one that was written anew since
    job = change.job(event.job)
    text = f"checkpoint {event.step} was refused: {event.shard}: {event.reason}"
    newer = [step for step, item in job.checkpoints.items() if step > event.step and item.trust != "revoked"]
    # A generation restores before it writes anything: the refused one is of an older.
    _remember(job, Checkpoint(event.step, event.generation - 1, "", "revoked"))
    incident = _blame(change, job, event, text) if job.status in UNDER_WAY else ""
    # The action distrusts all later ones too: right while the refused one is the newest, as in every restore.
    if not newer:
        change.act(RevokeCheckpoints, job, "", text, incident=incident, since_step=event.step)


def _blame(change: Change, job: Job, event: ShardRefused, text: str) -> str:
    """The incident of a refused shard: the open outage, or a new one whose restart is already under way."""
    if event.generation != job.generation:
        return ""
    if job.outage:
        join(change, job.outage, job, "checkpoint", text)
    else:
        job.outage = open_incident(change, job, "checkpoint", text, node=event.node, before_commit=True)
        change.incident(job.outage).restart_generation = job.generation
    return job.outage


def _agree(change: Change, job: Job, step: int, chain: str) -> None:
    """Compare the chains of the step and of its checkpoint, and promote what is both final and on storage."""
    mark = job.checkpoints[step]
    if mark.chain and chain and mark.chain != chain:
        job.checkpoints[step] = replace(mark, trust="revoked")
        question = f"The checkpoint of step {step} does not continue the committed chain. Where did its bits change?"
        change.act(AskHuman, job, "", "it is not promoted", question=question)
        return
    promoted = mark.final and mark.trust == "durable"
    job.checkpoints[step] = replace(mark, chain=mark.chain or chain, trust="verified" if promoted else mark.trust)
    if promoted:
        reason = f"all ranks agree on step {step}, whose checks had all passed"
        change.act(PromoteCheckpoint, job, "", reason, step=step)


def _remember(job: Job, mark: Checkpoint) -> None:
    job.checkpoints[mark.step] = mark
    for old in sorted(job.checkpoints)[:-KEPT]:
        del job.checkpoints[old]
