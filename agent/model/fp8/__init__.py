"""FP8 products of DeepSeek-V3 (arXiv 2412.19437, section 3.3): one recipe, one interface, three back ends."""

from agent.model.fp8.blocks import Blocks
from agent.model.fp8.choose import BackendUnavailable, backend_for
from agent.model.fp8.emulation import Emulation
from agent.model.fp8.product import Fp8, activation_dtype
from agent.model.fp8.recipe import Backend, Recipe
from agent.model.fp8.tally import Found, Summary, Tally, read, summarise

__all__ = [
    "Backend",
    "BackendUnavailable",
    "Blocks",
    "Emulation",
    "Found",
    "Fp8",
    "Recipe",
    "Summary",
    "Tally",
    "activation_dtype",
    "backend_for",
    "read",
    "summarise",
]
