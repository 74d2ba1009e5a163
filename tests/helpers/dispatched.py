"""Runs an op through PyTorch's dispatcher, as under torch.compile, instead of the shortcut of eager mode."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mvar_kernels import custom_op
from mvar_kernels.custom_op import RegisteredOp
from mvar_kernels.ops.adaln.op import _adaln, _gated_adaln
from mvar_kernels.ops.group_norm_silu.op import _group_norm_silu
from mvar_kernels.ops.mamba2.mixer import _mamba2_mixer
from mvar_kernels.ops.mamba2.scan import _ssd_scan
from mvar_kernels.ops.sample_tokens.op import _sample_tokens, _soft_embedding
from mvar_kernels.ops.scale_attention.op import _scale_attention

OPS: tuple[RegisteredOp[Any], ...] = (
    _adaln,
    _gated_adaln,
    _scale_attention,
    _ssd_scan,
    _mamba2_mixer,
    _sample_tokens,
    _soft_embedding,
    _group_norm_silu,
)


def dispatched(op: str, run: Callable[[], object]) -> dict[str, Sequence[Any]]:
    """Arguments of the last calls of the op's forward and backward operators, by operator name."""
    (registered,) = (known for known in OPS if known.op.name == op)
    found: dict[str, Sequence[Any]] = {}

    def watched(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (found.update({name: arguments}), operator(*arguments))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(custom_op, "_is_eager", lambda tensors: False)
        for name, attribute in ((op, "_overload"), (f"{op}_backward", "_backward_overload")):
            if hasattr(registered, attribute):
                patch.setattr(registered, attribute, watched(name, getattr(registered, attribute)))
        run()
    return found
