"""Weights in and out of a model under their published names: all of them fit, or nothing is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agent.model.config import V3Config
from agent.model.huggingface.blocks import SUFFIX, dequantised, scale_shape
from agent.model.huggingface.keys import COPIES, keys
from agent.model.v3 import V3

#: What widens to fp32 without losing a bit. fp64 would lose some, so it is not among them.
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = torch.float8_e4m3fn
_SHOWN = 5  # keys in the short form of a message


class WeightsError(ValueError):
    """Weights that do not fit. ``missing`` and ``extra`` are keys; ``wrong`` are sentences that begin with one.

    The message names all of them, ``brief`` the first few of each and how many there are.
    """

    def __init__(self, missing: Sequence[str] = (), extra: Sequence[str] = (), wrong: Sequence[str] = ()) -> None:
        self.missing, self.extra, self.wrong = tuple(missing), tuple(extra), tuple(wrong)
        super().__init__(self._told(None))

    @property
    def brief(self) -> str:
        """The message with no more than a few keys of each kind."""
        return self._told(_SHOWN)

    def _told(self, most: int | None) -> str:
        kinds = (("missing", self.missing, ", "), ("extra", self.extra, ", "), ("", self.wrong, "; "))
        return "; ".join(_listed(title, found, joint, most) for title, found, joint in kinds if found)


class Description(NamedTuple):
    """What can be known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def load(model: V3, state_dict: Mapping[str, Tensor]) -> None:
    """Fill the model with weights in the published layout, one key per expert.

    Every key must be there and no other. Values are fp32, bf16 or fp16, or float8_e4m3fn with their
    ``weight_scale_inv`` [ceil(rows / 128), ceil(columns / 128)] beside them; parameters stay fp32. An MTP module's
    copies of embedding and head must equal the originals.

    Raises:
        WeightsError: names every missing and extra key and every value of a wrong dtype or shape. The model is then as
            it was.
        ValueError: the model lies on the meta device, or holds a share of its experts only.
    """
    if model.parallel is not None and model.parallel.ep > 1:
        raise ValueError(f"model: holds experts of one of {model.parallel.ep} ranks; load into a whole model")
    own = _own(model)
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError("model: it lies on the meta device and has nothing to load into; make it on another device")
    _refuse_other_values(state_dict)
    found = {key: Description(tensor.dtype, tuple(tensor.shape)) for key, tensor in state_dict.items()}
    check(model.config, found, {name: tuple(tensor.shape) for name, tensor in own.items()})
    refuse_other_copies(model.config, state_dict.__getitem__, found)
    with torch.no_grad():
        for key, name in keys(model.config).items():
            own[name].copy_(value(key, state_dict.__getitem__, found))


def export(model: V3, grads: bool = False) -> dict[str, Tensor]:
    """Copies of all weights under their published keys, fp32, in the order of the layers.

    With ``grads`` the gradients instead: the same keys, for every parameter that holds one. An expert that got no token
    holds none, nor do router biases.
    """
    own = _own(model)
    if grads:
        own = {name: p.grad for name, p in own.items() if p.grad is not None}
    return {key: own[name].detach().clone() for key, name in keys(model.config).items() if name in own}


def check(config: V3Config, found: Mapping[str, Description], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether weights fit a model, by their descriptions alone; ``shapes`` are those of its own tensors by our names.

    Raises:
        WeightsError: as :func:`load`.
    """
    wanted = keys(config)
    scales = {key + SUFFIX for key in wanted if key in found and found[key].dtype == _FP8}
    allowed = wanted.keys() | scales
    missing = [key for key in [*wanted, *sorted(scales)] if key not in found]
    extra = [key for key in found if key not in allowed and not _void(key, found[key])]
    wrong = [fault for key, name in wanted.items() if (fault := _fault(key, found, shapes[name]))]
    if any(key.startswith(f"model.layers.{config.num_hidden_layers + config.mtp_depth}.") for key in extra):
        wrong.append(f"the weights hold more layers or MTP modules than a model made with mtp={config.mtp_depth}")
    if missing or extra or wrong:
        raise WeightsError(missing, extra, wrong)


def value(key: str, read: Callable[[str], Tensor], found: Mapping[str, Description]) -> Tensor:
    """One weight in fp32; a quantised one is made whole. ``check`` has been passed."""
    if found[key].dtype == _FP8:
        return dequantised(read(key), read(key + SUFFIX))
    return read(key).to(torch.float32)


def refuse_other_copies(config: V3Config, read: Callable[[str], Tensor], found: Mapping[str, Description]) -> None:
    """One tensor serves the model and its MTP modules, so the published copies of it must not differ.

    Raises:
        WeightsError: one does.
    """
    originals = {"embedding": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    for k in range(config.mtp_depth):
        for ending, name in COPIES:
            copy, original = f"model.layers.{config.num_hidden_layers + k}.{ending}", originals[name]
            if not torch.equal(value(copy, read, found), value(original, read, found)):
                raise WeightsError(wrong=[f"{copy}: differs from {original}, and one tensor serves both"])


def _own(model: V3) -> dict[str, Tensor]:
    """Parameters and router biases by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _refuse_other_values(state_dict: Mapping[str, object]) -> None:
    wrong = [key for key, value in state_dict.items() if not _tensor(value)]
    if wrong:
        raise WeightsError(
            wrong=[f"{key}: a tensor that has memory expected, not {state_dict[key]!r:.40}" for key in wrong]
        )


def _tensor(candidate: object) -> bool:
    return isinstance(candidate, Tensor) and not candidate.is_meta


def _void(key: str, given: Description) -> bool:
    """Hugging Face has shared experts of no width where there are none."""
    return ".mlp.shared_experts." in key and 0 in given.shape


def _fault(key: str, found: Mapping[str, Description], shape: tuple[int, ...]) -> str | None:
    """What is wrong with the value of one key, if it is there."""
    if key not in found:
        return None
    given = found[key]
    if given.shape != shape:
        return f"{key}: shape {list(given.shape)}, not {list(shape)}"
    if given.dtype == _FP8 and len(shape) == 2:
        return _scale_fault(key + SUFFIX, found, scale_shape(shape))
    if given.dtype not in _WIDENED:
        return f"{key}: dtype {given.dtype}; fp32, bf16, fp16 or a matrix of float8_e4m3fn in blocks expected"
    return None


def _scale_fault(key: str, found: Mapping[str, Description], shape: tuple[int, ...]) -> str | None:
    if key not in found or found[key] == Description(torch.float32, shape):
        return None
    return f"{key}: {found[key].dtype} {list(found[key].shape)}, not torch.float32 {list(shape)}"


def _listed(title: str, found: Sequence[str], joint: str, most: int | None) -> str:
    shown = joint.join(found[:most])
    more = f" and {len(found) - most} more" if most is not None and len(found) > most else ""
    return f"{title} keys ({len(found)}): {shown}{more}" if title else shown + more
