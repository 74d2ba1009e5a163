"""Every op's spec by name, for tests and benchmarks."""

from collections.abc import Mapping

from mvar_kernels.ops.adaln.spec import SPECS as ADALN
from mvar_kernels.ops.group_norm_silu.spec import SPECS as GROUP_NORM
from mvar_kernels.ops.mamba2.spec import SPECS as MAMBA2
from mvar_kernels.ops.sample_tokens.spec import SPECS as SAMPLE
from mvar_kernels.ops.scale_attention.spec import SPECS as ATTENTION
from mvar_kernels.testing.spec import Spec

SPECS: Mapping[str, Spec] = {spec.op: spec for spec in (*ADALN, *ATTENTION, *MAMBA2, *SAMPLE, *GROUP_NORM)}
