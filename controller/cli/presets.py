"""What the commands know of the presets without importing torch; a test holds it against agent.model."""

from collections.abc import Mapping
from types import MappingProxyType

#: Main layers by preset: the range of a drill's `layer`.
LAYERS: Mapping[str, int] = MappingProxyType({"tiny": 3, "small": 4})
#: Bytes of training state of one rank: parameters, master weights and two moments in fp32. Twice of it are in slots.
STATE_BYTES: Mapping[str, int] = MappingProxyType({"tiny": 2_100_000 * 16, "small": 8_500_000 * 16})
