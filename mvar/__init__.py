"""M-VAR and VAR: scale-wise autoregressive image generation on optimized kernels.

Importing the package imports neither torch nor a module of the package: each name is imported at its first use, so that
`mvar --help` takes a fraction of a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvar.checkpoint import load_model, load_tokenizer, save
    from mvar.inference.api import generate
    from mvar.inference.edit import edit
    from mvar.inference.likelihood import Classification, LogLikelihood, classify, log_likelihood
    from mvar.inference.model import InferenceModel
    from mvar.inference.results import Generated
    from mvar.inference.tokenizer import InferenceTokenizer
    from mvar.models.config import SCHEDULES, ModelConfig
    from mvar.models.factory import build
    from mvar.models.init_weights import init_weights
    from mvar.models.tokenizer import Tokenizer, TokenizerConfig
    from mvar.models.transformer import MVAR, VAR, Model, from_config
    from mvar.utils.state_dict import CheckpointError

__version__ = "0.1.0"

_MODULES = {
    "checkpoint": ("load_model", "load_tokenizer", "save"),
    "inference.api": ("generate",),
    "inference.edit": ("edit",),
    "inference.likelihood": ("Classification", "LogLikelihood", "classify", "log_likelihood"),
    "inference.model": ("InferenceModel",),
    "inference.results": ("Generated",),
    "inference.tokenizer": ("InferenceTokenizer",),
    "models.config": ("SCHEDULES", "ModelConfig"),
    "models.factory": ("build",),
    "models.init_weights": ("init_weights",),
    "models.tokenizer": ("Tokenizer", "TokenizerConfig"),
    "models.transformer": ("MVAR", "VAR", "Model", "from_config"),
    "utils.state_dict": ("CheckpointError",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "MVAR",
    "SCHEDULES",
    "VAR",
    "CheckpointError",
    "Classification",
    "Generated",
    "InferenceModel",
    "InferenceTokenizer",
    "LogLikelihood",
    "Model",
    "ModelConfig",
    "Tokenizer",
    "TokenizerConfig",
    "build",
    "classify",
    "edit",
    "from_config",
    "generate",
    "init_weights",
    "load_model",
    "load_tokenizer",
    "log_likelihood",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
