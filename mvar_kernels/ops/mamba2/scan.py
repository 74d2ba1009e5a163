"""ssd_scan: the bare recurrence of Mamba-2 (arXiv 2405.21060), its public function, checks and autograd.

Per head, with Δ_t > 0 and A < 0:

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t ⊗ B_t           (P×N)
    y_t = h_t C_t + D x_t

Bidirectional: a backward scan over the whole sequence would let a coarse scale see finer ones, so the
backward direction runs inside each scale, with its own Δ' and A', and the same x, B and C (hence
the same C Bᵀ). r_t = 0 at the last token of each scale:

    r_t = exp(Δ'_t A') (r_{t+1} + Δ'_{t+1} x_{t+1} ⊗ B_{t+1})
    y_t = h_t C_t + r_t C_t + D x_t

Equal to: flip each scale, scan from zero, leave out each token's own term, flip back. Hydra (arXiv
2407.09941) is the quasi-separable ancestor.
"""

from torch import Tensor

from mvar_kernels import validation
from mvar_kernels.custom_op import RegisteredOp
from mvar_kernels.dispatch import Op, check_name
from mvar_kernels.ops.mamba2.inputs import Scan

_MODULES = {"cpu": "native", "triton": "triton", "mamba_ssm": "mamba_ssm", "reference": "reference"}
_OP = Op("ssd_scan", __package__, _MODULES)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    scales: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan a sequence from a given state; returns the outputs and the state after the last token.

    Args:
        x: (B, L, H, P), float16, bfloat16, float32 or float64.
        dt: Δ, (B, L, H), positive, or (B, L, 2, H) for both directions (forward first); dtype of x, or float32
            with 16-bit x, as rounding Δ moves every decay.
        A: (H,), negative, or (2, H) for both directions.
        B, C: (B, L, N), dtype of x, shared by all heads, or (B, L, G, N): of G groups of H/G heads, those of group g
            from head g·H/G on.
        D: (H,) or, of each channel, (H, P), weight of the skip; None for none.
        initial_state: (B, H, P, N) before the first token, float32 (float64 for float64); None for zero.
        scales: tokens per scale; needed when bidirectional, not used else.
        backend: "auto", or a name of :func:`mvar_kernels.backends`, which then must take the inputs.

    Returns:
        y (B, L, H, P) in the dtype of x, and the last forward state (B, H, P, N) in float32 (float64
        for float64). Inputs are never written to. A NaN or infinity at one token is in all that follows it, and may
        reach up to 63 tokens before it: chunks of 16, 32 or 64 tokens, on every backend, are matmuls in which what
        a token cannot see is multiplied by 0. Other batch rows stay as they are.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
        BackendError: the named backend cannot run on these inputs.
    """
    op = "ssd_scan"
    sizes: dict[str, int] = {}
    validation.tensor(op, "x", x, "B L H P", sizes)
    both = isinstance(A, Tensor) and A.dim() == 2
    validation.tensor(op, "A", A, "2 H" if both else "H", sizes, like=x)
    acc = validation.accumulator(x.dtype)
    steps = (x.dtype,) if x.dtype == acc else (x.dtype, acc)
    validation.tensor(op, "dt", dt, "B L 2 H" if both else "B L H", sizes, like=x, dtypes=steps)
    grouped = isinstance(B, Tensor) and B.dim() == 4
    validation.tensor(op, "B", B, "B L G N" if grouped else "B L N", sizes, like=x)
    validation.tensor(op, "C", C, "B L G N" if grouped else "B L N", sizes, like=x)
    validation.same_dtype(op, "x", x=x, B=B, C=C)
    if grouped:
        validation.groups(op, "B", sizes["G"], sizes["H"])
        B, C = B.flatten(2), C.flatten(2)
    if x.shape[1] < 1:
        raise ValueError(f"{op}: x: expected at least one token, got L=0")
    if D is None:
        D = A.new_zeros(sizes["H"])
    validation.tensor(op, "D", D, "H P" if isinstance(D, Tensor) and D.dim() == 2 else "H", sizes, like=x)
    if initial_state is None:
        initial_state = x.new_zeros([sizes[d] for d in "BHPN"], dtype=acc)
    validation.tensor(op, "initial_state", initial_state, "B H P N", sizes, like=x, dtypes=(acc,))
    scales = validation.directions(op, both, scales, x.shape[1])
    check_name(backend)
    y, state = _ssd_scan(Scan(x, dt, A, B, C, D, initial_state, scales), backend)
    return y, state


def _fake(call: Scan) -> tuple[Tensor, Tensor]:
    return call.x.new_empty(call.x.shape), call.state.new_empty(call.state.shape)


_ssd_scan = RegisteredOp(_OP, Scan, _fake, outputs=2)
