"""True float32 matmuls on every CPU, and the settings of torch for their precision.

With `torch.set_float32_matmul_precision("medium")` float32 matmuls run in oneDNN, which may round the operands to
bfloat16. On a CPU with AMX it does: the error of a 512×512 matmul is 2.4e-3 of its largest value instead of 5e-7. On
AVX-512 CPUs without AMX the same setting gives oneDNN's true float32, on AMD Zen 5 at 2.2 times the speed of MKL's. So
the error of a setting is measured here, once in a process.

The settings are global: they are changed for the duration of a call and then restored.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_ERROR = 1e-5
"""Of a true float32 matmul, relative to its largest value; 5e-7 is usual, TF32 has 3e-4 and bfloat16 2e-3."""

# As Any: the types of these modules lack the attributes that torch adds.
_MKLDNN: Any = torch.backends.mkldnn
_CUDNN: Any = torch.backends.cudnn
_CUBLAS: Any = torch.backends.cuda.matmul
TRUE = ("none", "ieee")  # the values of fp32_precision with which operands are not rounded
NEW_NAMES = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
# torch has two interfaces to one set of settings, the second one since version 2.9. Where they were made to differ, the
# functions of the first raise RuntimeError.
HAS_NEW = hasattr(_MKLDNN, "matmul")
PER_OPERATOR: tuple[Any, ...] = (_MKLDNN.matmul, _MKLDNN.conv, _CUBLAS, _CUDNN.conv, _CUDNN.rnn) if HAS_NEW else ()


class Settings(NamedTuple):
    """All settings for the precision of float32 matmuls. None: torch raises, as the two interfaces differ."""

    matmul: str | None
    cudnn: bool | None
    per_operator: tuple[str, ...]


def settings() -> Settings:
    """The current settings."""
    return Settings(
        _unless_mixed(torch.get_float32_matmul_precision),
        _unless_mixed(lambda: _CUDNN.allow_tf32),
        tuple(operator.fp32_precision for operator in PER_OPERATOR),
    )


def restore(before: Settings) -> None:
    """Restore settings."""
    if before.matmul is not None:
        torch.set_float32_matmul_precision(before.matmul)
    if before.cudnn is not None:
        _CUDNN.allow_tf32 = before.cudnn
    for operator, value in zip(PER_OPERATOR, before.per_operator, strict=True):
        if operator.fp32_precision != value:
            operator.fp32_precision = "none"  # which follows the setting of the backend
        if operator.fp32_precision != value:
            operator.fp32_precision = value


def is_true_float32() -> bool:
    """Whether float32 matmuls on the CPU have errors below :data:`MAX_ERROR` with the current settings."""
    if not HAS_NEW:
        name = torch.get_float32_matmul_precision()
        return name == "highest" or _measured(NEW_NAMES[name])
    matmul, conv = (operator.fp32_precision for operator in PER_OPERATOR[:2])
    return conv in TRUE and (matmul in TRUE or _measured(matmul))


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """A context with true float32 matmuls on a CPU, whatever the settings. On a GPU TF32 is the caller's choice."""
    claim = None
    try:
        if device.type == "cpu" and not torch.compiler.is_compiling():
            with _lock:
                if _claims or not is_true_float32():
                    newest = next(reversed(_claims.values())).matmul if _claims else "highest"
                    claim = _enter(_Request(newest if is_true_float32() else "highest", None))
        yield
    finally:
        if claim is not None:
            _leave(claim)


@contextmanager
def float32_matmuls(device: torch.device, *, fast: bool) -> Iterator[None]:
    """A context in which float32 matmuls are, if `fast`, in TF32 on a GPU, and on a CPU oneDNN's if those are true.

    Otherwise they are true float32, of cuBLAS, cuDNN and torch's BLAS.
    """
    claim = None
    try:
        name = "highest"
        if fast:
            name = "high" if device.type == "cuda" else "medium" if onednn_is_true() else "highest"
        claim = _enter(_Request(name, fast))
        yield
    finally:
        if claim is not None:
            _leave(claim)


def onednn_is_true() -> bool:
    """Whether float32 matmuls on this CPU are true with "medium"."""
    with _lock:
        before = settings()
        try:
            if HAS_NEW:
                _MKLDNN.matmul.fp32_precision = NEW_NAMES["medium"]
            else:
                torch.set_float32_matmul_precision("medium")
            return _measured(NEW_NAMES["medium"])
        finally:
            restore(before)


class _Request(NamedTuple):
    matmul: str
    """as torch.set_float32_matmul_precision names it"""
    cudnn: bool | None
    """whether cuDNN may use TF32; None: as it is"""


# Calls of several threads overlap in any order. The settings of the newest running call are in force; the last one to
# end restores the settings from before the first.
_lock = threading.RLock()
_claims: dict[object, _Request] = {}
_before: list[Settings] = []


def _enter(wanted: _Request) -> object:
    claim = object()
    with _lock:
        if not _claims:
            _before[:] = [settings()]
        _claims[claim] = wanted
        try:
            _apply(wanted)
        except BaseException:
            _leave(claim)
            raise
    return claim


def _leave(claim: object) -> None:
    with _lock:
        del _claims[claim]
        if not _claims:
            restore(_before.pop())
        else:
            restore(_before[0])
            for wanted in _claims.values():
                _apply(wanted)


def _apply(wanted: _Request) -> None:
    if _unless_mixed(torch.get_float32_matmul_precision) is not None:
        torch.set_float32_matmul_precision(wanted.matmul)
    else:
        _MKLDNN.matmul.fp32_precision = NEW_NAMES[wanted.matmul]
        _CUBLAS.fp32_precision = "ieee" if wanted.matmul == "highest" else "tf32"
    if HAS_NEW and _MKLDNN.conv.fp32_precision not in TRUE:
        _MKLDNN.conv.fp32_precision = "ieee"
    if wanted.cudnn is None:
        return
    if _unless_mixed(lambda: _CUDNN.allow_tf32) is not None:
        _CUDNN.allow_tf32 = wanted.cudnn
    else:
        for operator in (_CUDNN.conv, _CUDNN.rnn):
            operator.fp32_precision = "tf32" if wanted.cudnn else "ieee"


def _unless_mixed(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return None


@cache
def _measured(setting: str) -> bool:
    """Whether matmuls are true with the current setting. Measured, as it does not follow from the name of the CPU."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    matmuls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (torch.mm, (random(512, 512), random(512, 512))),
        (torch.mm, (random(256, 96).T, random(256, 160))),  # a weight's gradient
        (torch.addmm, (random(192), random(2, 256), random(192, 256).T)),  # a linear layer of two rows
        (torch.addmm, (random(192), random(128, 256), random(192, 256).T)),
        (torch.bmm, (random(4, 96, 64), random(4, 80, 64).mT)),
    ]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return all(_error(matmul, operands) < MAX_ERROR for matmul, operands in matmuls)


def _error(matmul: Callable[..., Tensor], operands: tuple[Tensor, ...]) -> float:
    exact = matmul(*(t.double() for t in operands))
    return float((matmul(*operands) - exact).abs().max() / exact.abs().max())
