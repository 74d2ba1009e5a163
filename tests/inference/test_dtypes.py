"""Tests of the fastest dtype: it follows the measured times, which are measured once and change no setting."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from mvar import digits
from mvar.inference import dtypes, prepare
from mvar.inference.dtypes import MIN_SPEEDUP, ROUNDS, fastest_dtype, linear_rates
from mvar_kernels import precision
from tests.models.test_defaults import default

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unmeasured() -> Iterator[None]:
    """Measure in each test, and again after it."""
    dtypes._linear_rates.cache_clear()
    yield
    dtypes._linear_rates.cache_clear()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float, float], list[torch.dtype]]:
    """A function that sets the seconds of calls in float32 and bfloat16, and returns the list of the calls' dtypes.

    Most calls in bfloat16 are disturbed and take `disturbed` times as long.
    """

    def set_seconds(float32: float, bfloat16: float, disturbed: float = 1.0) -> list[torch.dtype]:
        calls: list[torch.dtype] = []

        def thread_seconds(dtype: torch.dtype) -> float:
            calls.append(dtype)
            if dtype == torch.float32:
                return float32
            return bfloat16 if len(calls) % 3 == 0 else disturbed * bfloat16

        monkeypatch.setattr(dtypes, "can_prepack", lambda device, dtype: True)
        monkeypatch.setattr(dtypes, "_linear_call", lambda dtype: dtype)
        monkeypatch.setattr(dtypes, "_thread_seconds", thread_seconds)
        return calls

    return set_seconds


@pytest.mark.parametrize(
    ("float32", "bfloat16", "disturbed", "expected"),
    [
        (1e-3, 0.5e-3, 1, torch.bfloat16),
        (1e-3, 0.5e-3, 5, torch.bfloat16),  # the fastest call counts
        (1e-3, 1e-3 / (1.01 * MIN_SPEEDUP), 1, torch.bfloat16),
        (1e-3, 1e-3 / (0.99 * MIN_SPEEDUP), 1, torch.float32),
        (1e-3, 1e-3, 1, torch.float32),
        (1e-3, 1.5e-3, 1, torch.float32),
    ],
)
def test_choice_follows_the_times(
    clock: Callable[..., list[torch.dtype]], float32: float, bfloat16: float, disturbed: float, expected: torch.dtype
) -> None:
    calls = clock(float32, bfloat16, disturbed)
    assert fastest_dtype(CPU) == expected
    assert calls == [torch.float32, torch.bfloat16] * (1 + ROUNDS)
    gflop = 2 * 16 * 16384 * 64 / 1e9
    assert linear_rates() == pytest.approx({torch.float32: gflop / float32, torch.bfloat16: gflop / bfloat16})


def test_slow_calls_are_few(clock: Callable[..., list[torch.dtype]]) -> None:
    calls = clock(1e-3, 0.2)
    assert fastest_dtype(CPU) == torch.float32 and len(calls) == 4


def test_unsupported_bfloat16_is_not_measured(
    clock: Callable[..., list[torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = clock(1e-3, 1e-9)
    monkeypatch.setattr(dtypes, "can_prepack", lambda device, dtype: dtype != torch.bfloat16)
    assert fastest_dtype(CPU) == torch.float32 and linear_rates() == {} and calls == []


def test_threads_measure_once(clock: Callable[..., list[torch.dtype]], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, start, found = clock(1e-3, 0.5e-3), threading.Barrier(8), []
    thread_seconds = dtypes._thread_seconds

    def slow(call: Callable[[], Tensor]) -> float:
        time.sleep(1e-3)  # lets the other threads run
        return thread_seconds(call)

    monkeypatch.setattr(dtypes, "_thread_seconds", slow)

    def find() -> None:
        start.wait()
        found.append(fastest_dtype(CPU))

    threads = [threading.Thread(target=find) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [torch.bfloat16] * 8 and len(calls) == 2 * (1 + ROUNDS)


@pytest.mark.parametrize("context", ["plain", "defaults", "inference mode", "autocast", "gradients"])
def test_measurement_does_not_depend_on_settings(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed runs in the layers' own dtype, in true float32; the random numbers of the program stay the same."""
    thread_seconds, ran = dtypes._thread_seconds, []

    def timed(call: Callable[[], Tensor]) -> float:
        out = call()
        ran.append((out.dtype, out.device, out.is_inference(), out.requires_grad, precision.is_true_float32()))
        return thread_seconds(call)

    monkeypatch.setattr(dtypes, "_thread_seconds", timed)
    monkeypatch.setattr(precision, "_measured", lambda setting: False)  # as with AMX
    contexts = {
        "plain": nullcontext(),
        "defaults": default(torch.float64, "meta"),
        "inference mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "gradients": torch.enable_grad(),
    }
    random_state = torch.get_rng_state()
    before = precision.settings()
    torch.set_float32_matmul_precision("medium")
    try:
        with contexts[context]:
            rates = linear_rates()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        precision.restore(before)
    assert torch.equal(torch.get_rng_state(), random_state)
    if rates == {}:
        pytest.skip("oneDNN prepacks no bfloat16 on this CPU")
    assert set(ran) == {(dtype, CPU, False, False, True) for dtype in (torch.float32, torch.bfloat16)}
    assert list(rates) == [torch.float32, torch.bfloat16] and all(0.01 < rate < 1e5 for rate in rates.values())


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_gpu(capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fastest_dtype(torch.device("cuda", 0)) == expected
    assert fastest_dtype(torch.device("meta")) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_uses_the_fastest_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "fastest_dtype", lambda device: dtype)
    model, tokenizer = digits.pretrained()
    assert prepare.own_dtype(prepare.prepared_model(model, None)) == dtype
    assert prepare.prepared_tokenizer(tokenizer, None).decoder.conv_out.weight.dtype == dtype
