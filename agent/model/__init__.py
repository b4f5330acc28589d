"""The DeepSeek-V3 model (arXiv 2412.19437), one file per idea of the paper."""

from agent.model import huggingface
from agent.model.config import ConfigError, V3Config, Yarn
from agent.model.presets import PRESETS, Preset
from agent.model.router import Router, updated_bias
from agent.model.v3 import V3, LossOutput, V3Output

__all__ = [
    "PRESETS",
    "V3",
    "ConfigError",
    "LossOutput",
    "Preset",
    "Router",
    "V3Config",
    "V3Output",
    "Yarn",
    "huggingface",
    "updated_bias",
]
