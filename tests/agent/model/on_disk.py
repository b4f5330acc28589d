"""Models on disk, as a rank of a run and as the tool write them."""

from pathlib import Path

from agent.checkpoint.capture import Capture
from agent.checkpoint.manifest import Manifest
from agent.checkpoint.storage import Storage
from agent.model import V3
from agent.model.files.own import save
from agent.slots import SlotRecord
from agent.training.layout import StateLayout
from diagnostics.sensors.digest import digest


def saved(path: Path, model: V3) -> Path:
    save(path, model.config, model.state_dict().__getitem__)
    return path


def checkpoint(root: Path, model: V3) -> Path:
    """As a rank of a run writes it."""
    layout = StateLayout(model)
    state = layout.view(memoryview(bytearray(layout.nbytes)))
    layout.capture(model, state)
    state.exp_avg.fill_(0.5)
    origin = ("job", 1, 6, 0, "", "", "tiny", 7, 1, "fp32", 1, "corpus", "here", 0.0, ())
    described = Manifest(*origin, vocab_size=model.config.vocab_size, pack="stream")
    capture = Capture(Storage(root, "job"), layout, described, lambda kind, body, urgent: None)
    capture.start(SlotRecord(1, 6, digest(state.words), 0), state)
    capture.finalise(6)
    capture.close()
    return root / "job" / "step-00000006"
