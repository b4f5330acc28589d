"""Where the tests of kernels run: under Triton's interpreter, or compiled on a GPU (ASSAY_TEST_DEVICE=cuda).

Operands are made on the CPU and results are judged there: the kernels alone run where they are to run.
"""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.sensors.kernels import product, quantised

DEVICE = torch.device(os.environ.get("ASSAY_TEST_DEVICE", "cpu"))
CPU = torch.device("cpu")


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, and those of dataclasses, on the device with the strides they have."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{each.name: moved(getattr(value, each.name), device) for each in fields(value)})
    return value


def _there(function: Any, *operands: Any) -> Any:
    return moved(function(*(moved(operand, DEVICE) for operand in operands)), CPU)


def quantise(
    x: Tensor,
    along: Tensor,
    down: Tensor | None = None,
    tiled: bool = False,
    scaling: quantised.Scaling | None = None,
) -> quantised.Quantised:
    """See `quantised.quantise`."""
    made: quantised.Quantised = _there(quantised.quantise, x, along, down, tiled, scaling)
    return made


def multiply(left: Tensor, right: Tensor, signs: Tensor) -> product.Product:
    """See `product.multiply`."""
    made: product.Product = _there(product.multiply, left, right, signs)
    return made


def multiply_quantised(left: quantised.Quantised, right: quantised.Quantised, signs: Tensor) -> product.Product:
    """See `product.multiply_quantised`."""
    made: product.Product = _there(product.multiply_quantised, left, right, signs)
    return made
