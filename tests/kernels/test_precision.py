"""Tests that float32 is computed in float32 on any CPU, AMX included, and that the caller's settings are restored."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mvar
from mvar.cli.main import main
from mvar.models.tokenizer import Tokenizer
from mvar.train import run
from mvar.train.digits_tokenizer import STEPS, train_digits_tokenizer
from mvar.train.loop import Interrupted
from mvar_kernels import precision
from mvar_kernels.dispatch import Implementation, guarded
from mvar_kernels.precision import MAX_ERROR, float32_matmuls, is_true_float32, onednn_is_true, true_float32
from tests.helpers.bfloat16_products import amx, reduced

CPU = torch.device("cpu")


def _set_matmul(value: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = value


def _set_all(value: str) -> None:
    torch.backends.fp32_precision = value


NEW = pytest.mark.skipif(not precision.HAS_NEW, reason="torch before 2.9 has one interface")
PROGRAMS: dict[str, Callable[[], Any]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "matmul": lambda: _set_matmul("bf16"),
    "all": lambda: _set_all("bf16"),
    "mixed": lambda: (torch.set_float32_matmul_precision("medium"), _set_matmul("ieee"), _set_matmul("tf32")),
}
each_program = pytest.mark.parametrize(
    "program", [pytest.param(name, marks=NEW if name in ("matmul", "all", "mixed") else ()) for name in PROGRAMS]
)


@contextlib.contextmanager
def applied(name: str) -> Iterator[precision.Settings]:
    """Apply a program's precision settings, check that they are unchanged at exit, and restore the previous ones."""
    before = precision.settings()
    try:
        PROGRAMS[name]()
        changed = precision.settings()
        yield changed
        assert precision.settings() == changed
    finally:
        if precision.HAS_NEW:
            torch.backends.fp32_precision = "none"
        precision.restore(before)


def error(product: Callable[[], Tensor], exact: Tensor) -> float:
    return float((product() - exact).abs().max() / exact.abs().max())


def errors() -> list[float]:
    """Return the relative errors of matrix products in several forms, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(s, generator=generator) for s in ((512, 512), (512, 512), (512,)))
    heads = x.view(8, 64, 512), w.view(8, 64, 512)
    leaf = x.clone().requires_grad_()
    torch.nn.functional.linear(leaf, w, bias).backward(x)
    assert leaf.grad is not None
    return [
        error(lambda: x @ w, x.double() @ w.double()),
        error(lambda: torch.nn.functional.linear(x, w, bias), x.double() @ w.T.double() + bias.double()),
        error(lambda: heads[0] @ heads[1].mT, heads[0].double() @ heads[1].mT.double()),
        error(lambda: leaf.grad, x.double() @ w.double()),  # type: ignore[arg-type,return-value]
    ]


def test_amx_emulation_error() -> None:
    """The error of a 512×512 product on an Intel Xeon with AMX is 2.4e-3."""
    with amx():
        assert max(errors()) < MAX_ERROR
        with applied("medium"):
            assert 1e-3 < min(errors()) and max(errors()) < 1e-2


def test_float32_matmuls() -> None:
    before = precision.settings()
    for on_amx in (False, True):
        with amx() if on_amx else contextlib.nullcontext():
            for fast in (True, False):
                with float32_matmuls(CPU, fast=fast):
                    expected = "medium" if fast and onednn_is_true() else "highest"
                    assert torch.get_float32_matmul_precision() == expected
                    assert torch.backends.cudnn.allow_tf32 == fast
                    assert max(errors()) < MAX_ERROR
            assert not (on_amx and onednn_is_true())
    assert precision.settings() == before


def test_onednn_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with amx() as products:
        assert not onednn_is_true()
        rounded = products.rounded
        assert rounded > 0 and not onednn_is_true() and products.rounded == rounded


@pytest.mark.parametrize("tf32", [True, False])
def test_float32_matmuls_cuda(tf32: bool) -> None:
    """On CUDA, "medium" would mean bfloat16."""
    with float32_matmuls(torch.device("cuda"), fast=tf32):
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


@each_program
def test_true_float32(program: str) -> None:
    with amx(), applied(program):
        assert not is_true_float32() and reduced()
        with true_float32(CPU):
            assert is_true_float32() and max(errors()) < MAX_ERROR
        with pytest.raises(ZeroDivisionError), true_float32(CPU):
            _ = 1 / 0
        with true_float32(torch.device("cuda")):  # on CUDA, the program's TF32 setting is kept
            assert not is_true_float32()
        with float32_matmuls(CPU, fast=True), true_float32(CPU), float32_matmuls(CPU, fast=False):
            assert max(errors()) < MAX_ERROR


@NEW
def test_cudnn_fp32_precision_is_restored() -> None:
    before = precision.settings()
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # torch.backends.cudnn.allow_tf32 raises from here on
        changed = precision.settings()
        assert changed.cudnn is None
        with float32_matmuls(CPU, fast=True):
            assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        assert precision.settings() == changed
    finally:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert precision.settings() == before


def test_overlapping_threads() -> None:
    """True float32 stays in effect until the last call has finished."""
    ends = [threading.Event() for _ in range(2)]
    begun, done = threading.Semaphore(0), threading.Semaphore(0)

    def call(end: threading.Event) -> None:
        with true_float32(CPU):
            begun.release()
            assert end.wait(10)
        done.release()

    with amx(), applied("medium"):
        assert not is_true_float32()
        threads = [threading.Thread(target=call, args=(end,)) for end in ends]
        for thread in threads:
            thread.start()
            begun.acquire()
        ends[0].set()  # the first call ends while the second is still running
        done.acquire()
        assert is_true_float32()
        ends[1].set()
        done.acquire()
        assert not is_true_float32()
        for thread in threads:
            thread.join()


def small() -> tuple[mvar.MVAR, Tokenizer]:
    sizes = mvar.TokenizerConfig((1, 2, 4), num_codes=64, code_dim=16, ch=32, ch_mult=(1, 2), num_res_blocks=1)
    model, tokenizer = mvar.build(2, num_classes=5, tokenizer=sizes)
    assert isinstance(model, mvar.MVAR)
    return mvar.init_weights(model, hd=1.0, alng=0.1), tokenizer


@each_program
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_generate_ignores_global_precision(program: str, backend: str) -> None:
    pair = small()
    options: dict[str, Any] = {"dtype": torch.float32, "backend": backend, "more_smooth": True}
    expected = mvar.generate(*pair, [0, 1], **options)
    images = expected.images * 2 - 1
    tokens = pair[1].encode(images)
    decoded = pair[1].decode(tokens)
    with amx() as products, applied(program):
        got = mvar.generate(*pair, [0, 1], **options)
        rounded = products.rounded
        assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.images, expected.images)
        assert torch.equal(pair[1].encode(images), tokens)
        assert torch.equal(pair[1].decode(tokens), decoded)
        pair[1].revive_dead_codes(images)
        # Only the products of the initial measurement were rounded.
        assert products.rounded == rounded <= 5


def test_generate_ignores_autocast() -> None:
    pair = small()
    for dtype in (torch.float32, torch.bfloat16):
        options: dict[str, Any] = {"dtype": dtype, "backend": "reference"}
        expected = mvar.generate(*pair, [0, 1], **options)
        with torch.autocast("cpu", torch.bfloat16):
            got = mvar.generate(*pair, [0, 1], **options)
        assert torch.equal(got.images, expected.images)


def test_guarded_kernels_run_in_true_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def kernel(*inputs: Any) -> None:
        seen.append(is_true_float32())

    monkeypatch.setattr(precision, "_measured", lambda setting: False)
    with applied("medium"):
        found = guarded(Implementation(lambda *inputs: None, kernel, kernel), CPU)
        found.forward()
        assert found.backward is not None
        found.backward()
    assert seen == [True, True]


@each_program
def test_nearest_code_ignores_global_precision(program: str) -> None:
    """Codes and rows are far from zero and close together, so that bfloat16 products would select other codes."""
    generator = torch.Generator().manual_seed(0)
    quantizer = small()[1].quantize
    codes = 8 + torch.randn(64, 16, generator=generator) / 8
    quantizer.embedding.weight.data.copy_(codes)
    rows = codes[torch.randint(64, (2, 3000), generator=generator)]
    rows = rows + torch.randn(rows.shape, generator=generator) / 32
    right = torch.cdist(rows.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(2)
    with amx() as products, applied(program):
        assert torch.equal(quantizer.nearest(rows), right)  # more rows than are processed at a time
        assert products.rounded == 0 and quantizer.nearest(rows[:, :0]).shape == (2, 0)
        float32 = torch.addmm(codes.square().sum(1), rows.flatten(0, 1), codes.T, alpha=-2).argmin(1)
        assert float((float32 != right.flatten()).float().mean()) > 0.1


@pytest.mark.parametrize("end", [None, KeyboardInterrupt(), Interrupted("stopped", 15), ValueError("wrong")])
@pytest.mark.parametrize("tf32", ["0", "1"])
def test_train_command_restores_settings(
    tf32: str, end: BaseException | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []

    def train(*_: Any) -> None:
        found.extend(errors())
        torch.rand(1)
        if end is not None:
            raise end

    monkeypatch.setattr(run, "_run", train)
    random = torch.get_rng_state()
    arguments = ["train", "--preset", "digits", "--out", str(tmp_path), "--tf32", tf32, "--device", "cpu"]
    for program in PROGRAMS if precision.HAS_NEW else ("high", "medium"):
        with (
            amx(),
            applied(program),
            pytest.raises(SystemExit) if end is not None else contextlib.nullcontext(),
        ):
            main(arguments)
    assert max(found) < MAX_ERROR and torch.equal(torch.get_rng_state(), random)


@pytest.mark.slow
def test_digits_tokenizer_training_with_amx(tmp_path: Path) -> None:
    """The result is bitwise identical, and the caller's random state is unchanged."""
    files = [tmp_path / name for name in ("without", "with")]
    random = torch.get_rng_state()
    train_digits_tokenizer(files[0], shorten=1 / STEPS)
    with amx() as products, float32_matmuls(CPU, fast=True):
        measured = products.rounded
        train_digits_tokenizer(files[1], shorten=1 / STEPS)
        assert products.rounded == measured
    assert files[0].read_bytes() == files[1].read_bytes() and torch.equal(torch.get_rng_state(), random)
