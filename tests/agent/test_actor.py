"""A user's own `agent` package in the worker's folder cannot shadow ours."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import pickle, sys
import agent  # the user's: it is imported before ours, as Ray's working_dir would have it
actor = pickle.loads(open(sys.argv[1], "rb").read())
try:
    actor(ROOT, {}, ())
except TypeError:
    pass  # our Worker wants arguments: it was found
print(sys.modules["agent.worker"].__file__)
"""


def test_our_packages_come_first(tmp_path: Path) -> None:
    shadow = tmp_path / "work" / "agent"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise_if_used = True\n")
    (shadow / "worker.py").write_text("raise RuntimeError('the wrong agent')\n")
    pickled = tmp_path / "actor"
    dump = (
        "import sys; from ray import cloudpickle; from agent import actor; cloudpickle.register_pickle_by_value(actor);"
        "open(sys.argv[1], 'wb').write(cloudpickle.dumps(actor.WorkerActor))"
    )
    subprocess.run([sys.executable, "-c", dump, str(pickled)], cwd=ROOT, check=True)
    (tmp_path / "work" / "main.py").write_text(SCRIPT.replace("ROOT", repr(str(ROOT))))
    command = [sys.executable, "main.py", str(pickled)]
    done = subprocess.run(command, cwd=tmp_path / "work", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT / "agent" / "worker.py")
