"""Carries out what was decided: each action until its agent has answered or its time is over."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

from controller.core.actions import Action, EndJob, StartGeneration, StopGeneration
from controller.core.events import ActionResult
from controller.core.jobs import OVERRULED_BY_END, OVERRULED_BY_STOP

UNKNOWN = "unknown"


class Sessions(Protocol):
    """The live streams to the agents; they stamp every action with the epoch of their lease."""

    async def send(self, node: str, action: Action) -> bool:
        """Hand `action` to the stream of `node`; False if there is none. Says nothing about its effect."""


class Executor:
    """Keeps what agents have not answered, sends it, and sends it again to an agent that came back.

    Repeats are safe because agents remember the ids they have completed. At a start, `submit` what core holds as
    outstanding; it is resent with each node's hello.
    """

    def __init__(self, sessions: Sessions, local: Callable[[Action], Awaitable[None]]) -> None:
        """`local` carries out the actions without a node; it may see one twice after a crash and must not mind."""
        self._sessions = sessions
        self._local = local
        self._pending: dict[str, Action] = {}
        self._dropped: list[ActionResult] = []

    async def submit(self, actions: Sequence[Action]) -> None:
        """Carry out `actions` in order. They must be stored before; an id that is pending already is left alone."""
        for action in actions:
            if action.id in self._pending:
                continue
            if not action.node:
                await self._local(action)
                continue
            self._overrule(action)
            self._pending[action.id] = action
            await self._sessions.send(action.node, action)

    async def on_hello(self, node: str, completed: Collection[str]) -> None:
        """Send `node` again what it has not answered, unless it says that it is done: that answer is on its way."""
        for action in [item for item in self._pending.values() if item.node == node and item.id not in completed]:
            # An answer, or an order that overrules this one, may have come while an earlier one was being sent.
            if action.id in self._pending and not await self._sessions.send(node, action):
                return

    def on_result(self, action_id: str) -> None:
        """An answer to the action is stored; a repeated one changes nothing."""
        self._pending.pop(action_id, None)

    def pending(self) -> list[Action]:
        """What has no answer yet, in the order it was submitted."""
        return list(self._pending.values())

    def next_deadline(self) -> float | None:
        """When `expire` should be called next (seconds since 1970): 0.0 for at once, None if nothing is pending."""
        if self._dropped:
            return 0.0
        return min((action.deadline for action in self._pending.values()), default=None)

    def expire(self, now: float) -> list[ActionResult]:
        """Give up what was not answered by its deadline, or was overruled; the results are to be fed to core."""
        over = [action for action in self._pending.values() if action.deadline <= now]
        for action in over:
            self._drop(action, "no answer by its deadline")
        results = [_at(result, now) for result in self._dropped]
        self._dropped = []
        return results

    def _overrule(self, order: Action) -> None:
        """Drop what an order to stop, to end or to start anew makes pointless: sent later, it would do harm."""
        for action in list(self._pending.values()):
            if (action.node, action.job) == (order.node, order.job) and _overrules(order, action):
                self._drop(action, f"overruled by {order.id}")

    def _drop(self, action: Action, why: str) -> None:
        del self._pending[action.id]
        self._dropped.append(ActionResult(time=0.0, node=action.node, action_id=action.id, outcome=UNKNOWN, detail=why))


def _overrules(order: Action, action: Action) -> bool:
    if isinstance(order, EndJob):
        return isinstance(action, OVERRULED_BY_END)
    if isinstance(order, StopGeneration):
        return isinstance(action, OVERRULED_BY_STOP) and action.generation <= order.generation
    if isinstance(order, StartGeneration):
        return isinstance(action, OVERRULED_BY_STOP) and action.generation < order.generation
    return False


def _at(result: ActionResult, now: float) -> ActionResult:
    return ActionResult(
        time=now, node=result.node, action_id=result.action_id, outcome=result.outcome, detail=result.detail
    )
