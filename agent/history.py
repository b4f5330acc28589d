"""What an agent remembers of its orders across its lives: which are done, and the newest controller it has obeyed."""

import json
import logging
from collections import OrderedDict
from pathlib import Path

from agent.actions import Outcome

log = logging.getLogger(__name__)

#: A controller repeats an order until it has the result, within minutes; this many orders are days of incidents.
CAPACITY = 512


class History:
    """Completed actions with their outcomes, and the highest controller epoch; a small file in `folder`.

    Invariants: the epoch never falls; an action's first outcome stays.
    """

    def __init__(self, folder: Path, capacity: int = CAPACITY) -> None:
        self._path = folder / "actions.json"
        self._capacity = capacity
        self._outcomes: OrderedDict[str, Outcome] = OrderedDict()
        self.controller_epoch = 0
        self._load()

    def accept(self, epoch: int) -> bool:
        """Whether a controller of `epoch` may command this agent; a higher one deposes the former."""
        if epoch < self.controller_epoch:
            return False
        if epoch > self.controller_epoch:
            self.controller_epoch = epoch
            self._save()
        return True

    def complete(self, action_id: str, outcome: Outcome) -> None:
        """Remember what became of an action."""
        if action_id in self._outcomes:
            return
        self._outcomes[action_id] = outcome
        while len(self._outcomes) > self._capacity:
            self._outcomes.popitem(last=False)
        self._save()

    def outcome(self, action_id: str) -> Outcome | None:
        """What became of an action, or None if it was not completed or is forgotten."""
        return self._outcomes.get(action_id)

    def completed(self) -> list[str]:
        """The ids of completed actions, the newest last."""
        return list(self._outcomes)

    def _load(self) -> None:
        try:
            document = json.loads(self._path.read_text())
            self.controller_epoch = int(document["controller_epoch"])
            self._outcomes.update((key, Outcome(outcome, detail)) for key, outcome, detail in document["completed"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read and begins anew: %s", self._path, error)

    def _save(self) -> None:
        """Replace the file whole: a crash leaves the old one or the new one."""
        completed = [[key, outcome.outcome, outcome.detail] for key, outcome in self._outcomes.items()]
        temporary = self._path.with_name("actions.json.new")
        try:
            temporary.write_text(json.dumps({"controller_epoch": self.controller_epoch, "completed": completed}))
            temporary.rename(self._path)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error)
