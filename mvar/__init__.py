"""M-VAR and VAR: scale-wise autoregressive image generation on optimised kernels."""

from mvar.build import build
from mvar.checkpoint import CheckpointError, load_model, load_tokenizer, save
from mvar.config import SCHEDULES, ModelConfig
from mvar.generate import Generated, generate
from mvar.initialise import initialise
from mvar.model import MVAR, VAR, Model, from_config
from mvar.tokenizer import Tokenizer, TokenizerConfig

__version__ = "0.1.0"

__all__ = [
    "MVAR",
    "SCHEDULES",
    "VAR",
    "CheckpointError",
    "Generated",
    "Model",
    "ModelConfig",
    "Tokenizer",
    "TokenizerConfig",
    "build",
    "from_config",
    "generate",
    "initialise",
    "load_model",
    "load_tokenizer",
    "save",
]
