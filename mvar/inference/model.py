"""A model for inference: weights in one dtype, modulation layers joined, biases fused, weights prepacked for oneDNN.

The parameters of the recurrence and of q/k norm stay in float32: rounding them would change every decay.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mvar.inference.onednn import PrepackedFeedForward, PrepackedLinear, can_prepack
from mvar.models.blocks import Block, MVARBlock
from mvar.models.layers import Attention, CausalAttention, FeedForward, IntraScaleAttention, Mamba2, State, separate_dt
from mvar.models.modulation import JoinedModulation, Modulation
from mvar.models.transformer import Model, ScaleTransformer


class InferenceModel(ScaleTransformer):
    """Version of :class:`mvar.Model` for inference, without dropout and gradients.

    Args:
        model: whose submodules are taken over and converted, so that it must not be used afterwards. Tensors that need
            no conversion are shared.
        dtype: of weights and activations.
    """

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = model.config
        self.class_emb, self.lvl_embed = model.class_emb.to(dtype), model.lvl_embed.to(dtype)
        self.pos_start, self.pos_1LC = _frozen(model.pos_start, dtype), _frozen(model.pos_1LC, dtype)
        self.register_buffer("lvl_1L", model.lvl_1L)
        self.joined_modulation = _joined_modulation(model, dtype)
        self.word_embed = _linear(model.word_embed, dtype)
        self.blocks = nn.ModuleList(InferenceBlock(block, dtype) for block in model.typed_blocks())
        self.head = _linear(model.head, dtype)

    def modulation(self, cond: Tensor, expand: Callable[[Tensor], Tensor] = lambda rows: rows) -> Modulation:
        vectors: Modulation = self.joined_modulation(cond, expand)
        return vectors


class InferenceBlock(Block):
    """A block without its modulation layer."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        attn = block.attn
        if isinstance(attn, CausalAttention):
            self.attn = InferenceCausalAttention(attn, dtype)
        else:
            self.attn = InferenceAttention(attn, dtype)
        self.mamba = InferenceMamba2(block.mamba, dtype) if isinstance(block, MVARBlock) else None
        self.ffn = _feed_forward(block.ffn, dtype)

    def empty_state(self, batch: int) -> State:
        carries: Mamba2 | CausalAttention = self.mamba or cast(CausalAttention, self.attn)
        return carries.empty_state(batch)

    def mixers(self) -> Sequence[nn.Module]:
        return (self.attn,) if self.mamba is None else (self.attn, self.mamba)


class _FusedBias(Attention):
    """Attention whose q, k and v biases are the bias of mat_qkv."""

    def __init__(self, attention: Attention, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.heads = attention.heads
        self.mat_qkv: nn.Module = _linear(cast(nn.Linear, attention.mat_qkv), dtype, attention.qkv_bias())
        self.proj = _linear(attention.proj, dtype)
        if hasattr(attention, "scale_mul_1H11"):
            self.scale_mul_1H11 = _frozen(attention.scale_mul_1H11, torch.float32)

    def qkv(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.mat_qkv(x)
        return qkv.unflatten(-1, (3, self.heads, -1))


class InferenceAttention(_FusedBias, IntraScaleAttention):
    pass


class InferenceCausalAttention(_FusedBias, CausalAttention):
    def __init__(self, attention: CausalAttention, dtype: torch.dtype) -> None:
        super().__init__(attention, dtype)
        self.num_tokens = attention.num_tokens


class InferenceMamba2(Mamba2):
    """Mixer with a separate float32 linear layer for dt if :func:`separate_dt`."""

    def __init__(self, mixer: Mamba2, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.state_sizes = mixer.state_sizes
        self.dt_bias, self.A_log, self.D = (_frozen(t, torch.float32) for t in (mixer.dt_bias, mixer.A_log, mixer.D))
        self.conv1d, self.norm = mixer.conv1d.to(dtype), mixer.norm.to(dtype)
        weight, columns = mixer.in_proj.weight, mixer.dt_bias.numel()
        self.dt_proj: nn.Module | None = None
        if separate_dt(weight.device, dtype):
            weight, dt_weight = weight.split([len(weight) - columns, columns])
            self.dt_proj = _linear_of(dt_weight, None, torch.float32)
        self.in_proj = _linear_of(weight, None, dtype)
        self.out_proj = _linear(mixer.out_proj, dtype)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.dt_proj is None:
            return self.in_proj(x), None
        return self.in_proj(x), self.dt_proj(x.float()).unflatten(-1, self.dt_bias.shape)


def _joined_modulation(model: Model, dtype: torch.dtype) -> JoinedModulation:
    shared = model.config.shared_adaln
    layers = [model.shared_ada_lin] if shared else [block.ada_lin for block in model.typed_blocks()]
    offsets = [_frozen(block.ada_gss.flatten(0, 2), dtype) for block in model.typed_blocks()] if shared else []
    *linears, head = (
        cast(nn.Linear, cast(nn.Sequential, layer)[-1]).to(dtype) for layer in (*layers, model.head_nm.ada_lin)
    )
    joined = JoinedModulation(linears, head, offsets)
    joined.linear = _linear(joined.linear, dtype)
    return joined


def _frozen(t: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(t.detach().to(dtype), requires_grad=False)


def _linear(layer: nn.Linear, dtype: torch.dtype, bias: Tensor | None = None) -> nn.Linear:
    return _linear_of(layer.weight, layer.bias if bias is None else bias, dtype)


def _linear_of(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype, device="meta")
    layer.weight = _frozen(weight, dtype)
    if bias is not None:
        layer.bias = _frozen(bias, dtype)
    return PrepackedLinear(layer) if can_prepack(weight.device, dtype) else layer  # type: ignore[return-value]


class FusedFeedForward(FeedForward):
    """GELU in the epilogue of fc1's matmul, by cuBLASLt: the hidden activations are written once and read once.

    On CUDA `torch._addmm_activation` is the tanh approximation whichever library multiplies, on a CPU erf.
    """

    def __init__(self, ffn: FeedForward) -> None:
        nn.Module.__init__(self)
        self.fc1, self.fc2 = ffn.fc1, ffn.fc2

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch._addmm_activation(self.fc1.bias, x.flatten(0, -2), self.fc1.weight.t(), use_gelu=True)
        return self.fc2(hidden).view(x.shape)


def _feed_forward(ffn: FeedForward, dtype: torch.dtype) -> FeedForward:
    device = ffn.fc1.weight.device
    if can_prepack(device, dtype):
        return PrepackedFeedForward(ffn.to(dtype))  # type: ignore[return-value]
    # Float32 stays as PyTorch computes it: an epilogue's approximation of tanh is made for 16 bits.
    if device.type == "cuda" and torch.version.hip is None and dtype in (torch.float16, torch.bfloat16):
        return FusedFeedForward(ffn.to(dtype))
    return ffn.to(dtype)
