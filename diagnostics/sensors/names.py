"""Names of the places where products happen: from the weight of a product back to the parameter it came from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

UNNAMED = "<unnamed>"

# From a weight as it enters the product back to its parameter: a cast, a transpose, a view and one to spare.
_HOPS = 4


class WeightNames:
    """Maps the weight of a product to its module, e.g. `layers.1.moe.experts.3.gate`.

    Weights may be temporaries (`weight.to(bfloat16)`); their autograd graph leads back to the parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._by_id = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters()}

    def of(self, weight: Tensor) -> str:
        """The module's name, or UNNAMED when no parameter of the model lies behind the weight."""
        name = self._by_id.get(id(weight))
        node: Any = weight.grad_fn
        for _ in range(_HOPS):
            if name is not None or node is None:
                break
            name = self._by_id.get(id(getattr(node, "variable", None)))
            node = node.next_functions[0][0] if node.next_functions else None
        return name or UNNAMED
