"""What the commands know of the presets without importing torch; a test holds it against agent.model."""

from collections.abc import Mapping
from types import MappingProxyType

#: Main layers by preset: the range of a drill's `layer`.
LAYERS: Mapping[str, int] = MappingProxyType({"tiny": 3, "small": 4})
#: Routed experts of each layer that has some: a mesh divides them.
EXPERTS: Mapping[str, int] = MappingProxyType({"tiny": 8, "small": 16})
#: Bytes of training state of one rank: parameters, master weights and two moments in fp32. Twice of it are in slots.
STATE_BYTES: Mapping[str, int] = MappingProxyType({"tiny": 2_100_000 * 16, "small": 8_500_000 * 16})
#: Ids of every preset: bytes and eight marks.
VOCABULARY = 264
#: Bytes of that state for one id: a row of the embedding and one of the head, 16 bytes an element.
ID_BYTES: Mapping[str, int] = MappingProxyType({"tiny": 2 * 128 * 16, "small": 2 * 256 * 16})
#: Tokens of one sample, MTP's included: no shorter corpus can be trained on.
SAMPLE_TOKENS: Mapping[str, int] = MappingProxyType({"tiny": 130, "small": 258})
#: Replays by a suspect of a held step, at most.
REPLAYS = 2
#: Share of operators without an identity that a step runs again, unless the order says otherwise.
AGAIN = 1 / 16


def state_bytes(preset: str, vocab_size: int | None) -> int:
    """Bytes of training state of one rank, with a vocabulary other than the preset's if there is one."""
    return STATE_BYTES[preset] + ((vocab_size or VOCABULARY) - VOCABULARY) * ID_BYTES[preset]
