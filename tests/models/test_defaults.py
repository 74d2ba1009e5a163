"""Tests that results do not depend on torch's default dtype and device, which belong to the calling program."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mvar
from mvar.digits import pretrained
from mvar.train.objective import Objective
from mvar_kernels.dispatch import OPS, unavailable
from mvar_kernels.testing.contract import differentiable
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Spec
from tests.helpers.paths import ROOT

DEFAULTS = [(torch.bfloat16, "cpu"), (torch.float16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")]
defaults = pytest.mark.parametrize(
    ("dtype", "device"), DEFAULTS, ids=[f"{dtype}-{device}".removeprefix("torch.") for dtype, device in DEFAULTS]
)


@contextmanager
def default(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def same(got: list[Tensor], right: list[Tensor]) -> bool:
    return len(got) == len(right) and all(
        g.dtype == r.dtype and g.device == r.device and torch.equal(g, r) for g, r in zip(got, right, strict=True)
    )


# Triton uses the smallest case, as it may run in the interpreter.
BACKENDS = [backend for backend in ("reference", "cpu", "triton") if unavailable(backend) is None]
CASES = [(op, backend) for op in SPECS for backend in BACKENDS if backend in OPS[op].modules]
SMALL = {"scale_attention": "diagonal_norm", "ssd_scan": "bidirectional_odd", "mamba2_mixer": "bidirectional_odd"}


@cache
def inputs(op: str, backend: str) -> dict[str, Tensor]:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    made = SPECS[op].inputs(case_of(SPECS[op], backend), torch.Generator().manual_seed(0))
    return {name: t.to(device, torch.float32) for name, t in made.items()}


def case_of(spec: Spec, backend: str) -> object:
    names = [case.name for case in spec.cases]
    wanted = SMALL.get(spec.op, names[2]) if backend != "triton" else names[0]
    return spec.cases[names.index(wanted)]


def outputs_and_grads(op: str, backend: str) -> list[Tensor]:
    """Outputs and gradients of an op."""
    spec = SPECS[op]
    grads = differentiable(spec, backend)
    leaves = {name: t.clone().requires_grad_(name in grads) for name, t in inputs(op, backend).items()}
    outs = spec.call(leaves, case_of(spec, backend), backend)  # type: ignore[arg-type]
    wanted = [t for t in leaves.values() if t.requires_grad]
    grads = torch.autograd.grad(outs, wanted, [torch.ones_like(o) for o in outs]) if wanted else ()
    return [*(o.detach() for o in outs), *grads]


@cache
def expected_outputs_and_grads(op: str, backend: str) -> list[Tensor]:
    return outputs_and_grads(op, backend)


@defaults
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_ops(op: str, backend: str, dtype: torch.dtype, device: str) -> None:
    right = expected_outputs_and_grads(op, backend)
    with default(dtype, device):
        got = outputs_and_grads(op, backend)
    assert same(got, right)


def run_models() -> dict[str, list[Tensor]]:
    """Results of building, encoding, generating, training and loading under the current defaults."""
    config = mvar.TokenizerConfig((1, 2, 3), num_codes=64, code_dim=8, ch=32, ch_mult=(1, 1), num_res_blocks=1)
    found = {}
    for name, sizes in (("mvar", {}), ("var", {"architecture": "var", "shared_adaln": True})):
        model, tokenizer = mvar.build(1, num_classes=4, tokenizer=config, **sizes)
        found[f"{name} weights"] = [*model.state_dict().values(), *tokenizer.state_dict().values()]
        out = mvar.generate(model, tokenizer, [0, 3], more_smooth=True, dtype=torch.float32)
        found[f"{name} images"] = [out.images, out.tokens]
        mask = torch.zeros(6, 6, dtype=torch.bool, device="cpu")
        mask[:, 3:] = True
        edited = mvar.edit(model, tokenizer, out.images, mask, None, fill=True, dtype=torch.float32)
        found[f"{name} edits"] = [edited.images, edited.tokens]
        scored = mvar.classify(model, tokenizer, out.images, scales=2, keep=2)
        likelihood = mvar.log_likelihood(model, tokenizer, out.images)
        found[f"{name} scores"] = [scored.labels, scored.log_likelihood, scored.exact, likelihood.bits_per_token]
        labels = out.tokens[:, 0] % 4
        tokens = tokenizer.encode(out.images * 2 - 1)
        logits = model(labels, tokenizer.teacher_forcing_inputs(tokens))
        found[f"{name} logits"] = [tokens, tokenizer.decode(tokens), logits.detach()]
        model.train()
        torch.default_generator.manual_seed(0)
        loss = Objective(model)(labels, tokenizer.teacher_forcing_inputs(tokens), tokens, newest_weight=0.3).loss
        loss.backward()
        found[f"{name} gradients"] = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    trained = tokenizer.train()(out.images * 2 - 1)
    found["tokenizer training"] = [trained.images.detach(), trained.vq_loss.detach(), trained.hits]
    loaded, its_tokenizer = pretrained()
    found["loaded"] = [*loaded.state_dict().values(), *its_tokenizer.state_dict().values()]
    return found


@cache
def expected_run_models() -> dict[str, list[Tensor]]:
    return run_models()


@defaults
def test_models(dtype: torch.dtype, device: str) -> None:
    right = expected_run_models()
    with torch.random.fork_rng(devices=[]), default(dtype, device):
        got = run_models()
    assert {name: same(got[name], right[name]) for name in right} == dict.fromkeys(right, True)


FACTORIES = {
    *("empty", "zeros", "ones", "full", "arange", "linspace", "logspace", "eye", "tensor", "scalar_tensor"),
    *("rand", "randn", "randint", "randperm", "normal", "empty_strided"),
}
LAYERS = {"Linear", "Conv1d", "Conv2d", "ConvTranspose2d", "Embedding", "RMSNorm", "GroupNorm", "LayerNorm"}


def missing_dtype_or_device(path: Path) -> list[str]:
    """Places that rely on defaults: tensors without dtype and device, layers (and their tensors) without dtype."""
    found, tree = [], ast.parse(path.read_text())
    layers = [
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in ("__init__", "add_modulation")
        for node in ast.walk(function)
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name):
            continue
        names = {keyword.arg for keyword in node.keywords}
        maker = f"{node.func.value.id}.{node.func.attr}"
        missing: set[str] = set()
        if node.func.value.id == "torch" and node.func.attr in FACTORIES and None not in names:
            missing = {"dtype"} - names if node in layers else {"dtype", "device"} - names
        elif maker in {f"nn.{layer}" for layer in LAYERS}:
            missing = {"dtype"} - names
        if missing:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {maker} without {' and '.join(sorted(missing))}")
    return found


def test_factories_have_explicit_dtype_and_device() -> None:
    """Layers need no device: they are made under `with torch.device(…)`, on the CPU by build and on meta by loaders."""
    files = [path for package in ("mvar", "mvar_kernels") for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 50
    assert [place for path in files for place in missing_dtype_or_device(path)] == []
