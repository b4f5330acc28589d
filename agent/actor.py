"""The shell of a worker as Ray ships it: puts our packages first on the path, then becomes agent.worker.Worker.

Ray sends this class by value (see agent.gang), so it runs before anything named `agent` is imported in the worker: a
user's own `agent/` in a Ray working_dir cannot shadow ours.
"""

import importlib
import os
import sys
from typing import Any


class WorkerActor:
    """Forwards to agent.worker.Worker, which imports torch; the gang that creates it never does.

    `root` is the folder that holds our packages; `environment` is set before torch and gloo are loaded.
    """

    def __init__(self, root: str, environment: dict[str, str], arguments: tuple[str, ...]) -> None:
        os.environ.update(environment)
        sys.path[:] = [root, *(entry for entry in sys.path if entry != root)]
        ours = ("agent", "assay", "diagnostics")
        for name in [n for n in sys.modules if n.partition(".")[0] in ours]:
            if not str(getattr(sys.modules[name], "__file__", "") or "").startswith(root):
                del sys.modules[name]
        self._worker: Any = importlib.import_module("agent.worker").Worker(*arguments)

    def prepare(self, spec: str) -> Any:
        """See agent.worker.Worker.prepare."""
        return self._worker.prepare(spec)

    def run(self, assignment: dict[str, Any]) -> Any:
        """See agent.worker.Worker.run."""
        return self._worker.run(assignment)

    def replay(self, request: dict[str, Any]) -> Any:
        """See agent.worker.Worker.replay."""
        return self._worker.replay(request)
