"""The patches of `accelerate`: one file for each part of a model that they replace."""

from mvar_kernels.patching.patches.attention import Attention, ScaleAttention
from mvar_kernels.patching.patches.base import Patch
from mvar_kernels.patching.patches.block import Block, MambaBlock
from mvar_kernels.patching.patches.fastvar import FastVARAttention
from mvar_kernels.patching.patches.head_norm import HeadNorm
from mvar_kernels.patching.patches.infinity import InfinityAttention, InfinityBlock
from mvar_kernels.patching.patches.mamba2 import Mamba2
from mvar_kernels.patching.patches.rotary import ComplexRotaryAttention, MapRotaryAttention
from mvar_kernels.patching.patches.sandwich_block import SandwichBlock

PATCHES: tuple[type[Patch], ...] = (
    FastVARAttention,
    InfinityAttention,
    Attention,
    ScaleAttention,
    MapRotaryAttention,
    ComplexRotaryAttention,
    MambaBlock,
    Block,
    InfinityBlock,
    SandwichBlock,
    HeadNorm,
    Mamba2,
)
"""The first that a module matches is its patch."""
