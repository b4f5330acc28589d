"""DeepSeek-V3 as Hugging Face knows it: its configuration, and its weights in the layout they were published in.

transformers is never imported here; the tests compare with it.
"""

from agent.model.huggingface.blocks import dequantised
from agent.model.huggingface.configuration import config, document
from agent.model.huggingface.exchange import Description, WeightsError, check, export, load, refuse_other_copies, value
from agent.model.huggingface.keys import BIAS, COPIES, keys, modules_in
from agent.model.huggingface.published import DEEPSEEK_V3

__all__ = [
    "BIAS",
    "COPIES",
    "DEEPSEEK_V3",
    "Description",
    "WeightsError",
    "check",
    "config",
    "dequantised",
    "document",
    "export",
    "keys",
    "load",
    "modules_in",
    "refuse_other_copies",
    "value",
]
