"""Mamba-2 in Triton: forward.py and mixer_forward.py, backward.py and mixer_backward.py; chunk.py has the formulas."""

import triton
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.dispatch import Implementation
from mvar_kernels.ops.mamba2.inputs import Mixer, Scan
from mvar_kernels.ops.mamba2.triton.backward import ssd_scan_backward
from mvar_kernels.ops.mamba2.triton.forward import ssd_scan
from mvar_kernels.ops.mamba2.triton.mixer_backward import mamba2_mixer_backward
from mvar_kernels.ops.mamba2.triton.mixer_forward import mamba2_mixer

LARGEST_N = LARGEST_P = 256
# The backward holds a state and its gradient. With P = N = 256 it takes 368,672 bytes of shared memory in bfloat16, of
# Hopper's 232,448; with half of such a state 221,216.
LARGEST_STATE = 128 * 256
OLDEST_TRITON = (3, 5)  # 3.4, which torch 2.8 brings, has no tl.range(disable_licm=)


def _unsupported(first: Tensor, state: Tensor) -> str | None:
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {triton.__version__}: expected {'.'.join(map(str, OLDEST_TRITON))} or newer"
    reason = tiling.unsupported_dtype(first)
    if reason is not None:
        return reason
    P, N = state.shape[-2:]
    if P <= LARGEST_P and N <= LARGEST_N and P * N <= LARGEST_STATE:
        return None
    return f"state: P={P}, N={N}: above {LARGEST_P}, {LARGEST_N} or P·N={LARGEST_STATE}, what a program has memory for"


def _unsupported_scan(call: Scan) -> str | None:
    return _unsupported(call.x, call.state)


def _unsupported_mixer(call: Mixer) -> str | None:
    return _unsupported(call.zxbcdt, call.ssm)


ssd_scan_triton = Implementation(_unsupported_scan, ssd_scan, ssd_scan_backward)
mamba2_mixer_triton = Implementation(_unsupported_mixer, mamba2_mixer, mamba2_mixer_backward)
