"""Sampling with VAR's `sample_with_top_k_top_p_`: other random numbers, so only on request."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from mvar_kernels.ops.sample_tokens.op import sample_tokens
from mvar_kernels.patching.patches.base import Patch

NAME = "sample_with_top_k_top_p_"
"""the function of FoundationVision/VAR that filters logits (B, l, V) in place and samples tokens (B, l, n)"""


class Sampling(Patch):
    """Methods that call `sample_with_top_k_top_p_` sample with `sample_tokens` instead, without a sort.

    A method runs with other globals than its module's, in which the function has been exchanged; the module itself
    stays what it is. With `more_smooth`, where the filtered logits are read again, the original samples.
    """

    ops = "sample_tokens, with other random numbers"
    attributes = ()
    required = ()

    @classmethod
    def overrides(cls, original: type) -> dict[str, Any]:
        supported = {name: m for name, m in methods_of(original).items() if unsupported_reason(m) is None}
        return {name: _sampling_method(method) for name, method in supported.items()}


def methods_of(cls: type) -> dict[str, Callable[..., Any]]:
    """The methods of a class that call the function, before `accelerate`, without those that are overridden."""
    attributes: dict[str, Any] = {}
    for base in cls.__mro__:
        if issubclass(base, nn.Module) and "original_forward" not in vars(base):
            attributes = {**vars(base), **attributes}
    found: dict[str, Callable[..., Any]] = {}
    for name, method in attributes.items():
        inner = inspect.unwrap(method) if isinstance(method, FunctionType) else None
        if isinstance(inner, FunctionType) and NAME in inner.__code__.co_names and NAME in inner.__globals__:
            found[name] = method
    return found


def unsupported_reason(method: Callable[..., Any]) -> str | None:
    """Why the sampling of a method cannot be replaced, or None."""
    inner: Any = inspect.unwrap(method)
    return _unsupported(inner, inner.__globals__[NAME])


@functools.cache
def _unsupported(inner: Any, original: Any) -> str | None:
    names = ["logits_BlV", "top_k", "top_p", "rng", "num_samples"]
    if not isinstance(original, FunctionType) or list(inspect.signature(original).parameters) != names:
        return f"{NAME}: expected a function of {', '.join(names)}"
    if _may_read_filtered_logits(inner):
        return f"it may read the logits again after {NAME} has filtered them"
    return None if _filters_alike(original) else f"{NAME} does not keep the codes that sample_tokens keeps"


def _may_read_filtered_logits(function: Any) -> bool:
    """Whether logits may be read after the call that filters them in place, by their name in the order of the lines or
    in the next iteration of a loop, or by another name; other than with the argument `more_smooth`. True also for
    functions whose source is not there, and for those that set globals, which would be lost."""
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    except (OSError, SyntaxError):
        return True
    if any(isinstance(node, ast.Global) for node in nodes):
        return True
    smooth = {id(node) for statement in _only_if_smooth(nodes, function) for node in ast.walk(statement)}
    lines = {id(node): outer.lineno for outer in nodes if isinstance(outer, ast.stmt) for node in ast.walk(outer)}
    for call in nodes:
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == NAME):
            continue
        here = call.lineno
        loops = (n for n in nodes if isinstance(n, ast.For | ast.While) and n.lineno <= here <= (n.end_lineno or 0))
        loop = next(loops, None)  # the outermost
        first, last = (here, here) if loop is None else (loop.lineno, loop.end_lineno or here)
        given = [*call.args[:1], *(option.value for option in call.keywords if option.arg in ("logits_BlV", None))]
        inside = {id(node): node for argument in given for node in ast.walk(argument)}
        for name in {node.id for node in inside.values() if isinstance(node, ast.Name)}:
            # The rest of the loop, its next iteration up to the call, what follows; reads before assignments in a line.
            uses = [
                (1 if line < here else 0 if line <= last else 2, line, isinstance(node.ctx, ast.Store))
                for node in nodes
                if isinstance(node, ast.Name) and node.id == name and id(node) not in smooth | inside.keys()
                if (line := lines[id(node)]) >= first
            ]
            if (uses and not min(uses)[-1]) or any(_is_view(node, name) for node in nodes):
                return True
    return False


def _only_if_smooth(nodes: list[ast.AST], function: Any) -> Iterator[ast.stmt]:
    """The statements that run with the argument `more_smooth` alone."""
    if "more_smooth" in inspect.signature(function).parameters:
        for node in nodes:
            if isinstance(node, ast.If) and ast.unparse(node.test) in ("more_smooth", "not more_smooth"):
                yield from node.body if isinstance(node.test, ast.Name) else node.orelse


_VIEWS = frozenset(
    "contiguous data detach expand flatten float mT narrow permute reshape select squeeze to transpose unflatten "
    "unsqueeze view".split()
)


def _is_view(node: ast.AST, name: str) -> bool:
    """Whether a statement gives another name to the tensor `name`, or to a view of it."""
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) or node.value is None:
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
    for value in values:
        while isinstance(value, ast.Subscript | ast.Call | ast.Attribute):
            if isinstance(value, ast.Attribute) and value.attr not in _VIEWS:
                break
            value = value.func if isinstance(value, ast.Call) else value.value
        if isinstance(value, ast.Name) and value.id == name:
            return not all(isinstance(target, ast.Name) and target.id == name for target in targets)
    return False


def _filters_alike(original: Callable[..., Tensor]) -> bool:
    """Whether the function keeps the same codes as sample_tokens, by 1,000 samples of each of six rows."""
    generator = torch.Generator("cpu").manual_seed(0)
    logits = 2 * torch.randn(2, 3, 32, generator=generator, dtype=torch.float32, device="cpu")
    for top_k, top_p in ((1, 0.0), (5, 0.0), (0, 0.7), (6, 0.8)):
        options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "rng": generator, "num_samples": 1000}
        expected, got = (sample(logits.clone(), **options) for sample in (original, _Sampler(original)))
        kept = [torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, tokens, True) for tokens in (expected, got)]
        if not torch.equal(*kept):
            return False
    return True


class _Sampler:
    """`sample_with_top_k_top_p_` for one generation, whose calls are the scales of the seed's images."""

    def __init__(self, original: Callable[..., Tensor]) -> None:
        self._original = original
        self._seed: Tensor | None = None
        self._calls = 0

    def __call__(
        self,
        logits_BlV: Tensor,
        top_k: int = 0,
        top_p: float = 0.0,
        rng: torch.Generator | None = None,
        num_samples: int = 1,
    ) -> Tensor:
        """(B, l, V) → (B, l, num_samples)"""
        if num_samples < 1:  # without replacement
            return self._original(logits_BlV, top_k=top_k, top_p=top_p, rng=rng, num_samples=num_samples)
        device = logits_BlV.device
        if self._seed is None:
            drawn_on = device if rng is None else rng.device
            self._seed = torch.randint(2**63 - 1, (), generator=rng, device=drawn_on, dtype=torch.int64).to(device)
        # As in VAR, filters up to 0 are off.
        filters: dict[str, Any] = {"top_k": max(top_k, 0), "top_p": min(top_p, 1.0) if top_p > 0 else 1.0}
        scale_index, self._calls = self._calls, self._calls + 1
        tokens = sample_tokens(logits_BlV, **filters, seed=self._seed, scale_index=scale_index, num_samples=num_samples)
        return tokens.view(*logits_BlV.shape[:2], num_samples)


def _sampling_method(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)
    original = inspect.unwrap(method).__globals__[NAME]

    @functools.wraps(method)
    def generate(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options)
        given.apply_defaults()
        if given.arguments.get("more_smooth"):
            return method(*args, **options)
        return _with_global(method, NAME, _Sampler(original))(*args, **options)

    return generate


def _with_global(function: Any, name: str, value: Any) -> Any:
    """A copy of a function, inside its decorators, for which a global has another value."""
    wrapped = getattr(function, "__wrapped__", None)
    namespace, closure = function.__globals__, function.__closure__
    if wrapped is None:
        namespace = {**namespace, name: value}
    else:
        copy = _with_global(wrapped, name, value)
        closure = tuple(CellType(copy) if cell.cell_contents is wrapped else cell for cell in closure or ())
    result = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    result.__kwdefaults__ = function.__kwdefaults__
    return result
