"""M-VAR and VAR: scale-wise autoregressive image generation on optimized kernels.

Importing the package imports neither torch nor a module of the package: each name is imported at its first use, so that
`mvar --help` takes a fraction of a second.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "build": ("build",),
    "checkpoint": ("CheckpointError", "load_model", "load_tokenizer", "save"),
    "config": ("SCHEDULES", "ModelConfig"),
    "generate": ("Generated", "generate"),
    "initialise": ("initialise",),
    "model": ("MVAR", "VAR", "Model", "from_config"),
    "tokenizer": ("Tokenizer", "TokenizerConfig"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """The import of a module sets it as an attribute: not where a public function has its name."""
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
