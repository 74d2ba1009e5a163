"""A model for inference: weights in one dtype, biases fused, weights prepacked for oneDNN.

The parameters of the recurrence and of q/k norm stay in float32 (:data:`FLOAT32`).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvar.inference.labels import class_rows
from mvar.inference.onednn import PrepackedFeedForward, PrepackedLinear, can_prepack
from mvar.inference.only import OnlyForInference
from mvar.models.blocks import Block, MVARBlock
from mvar.models.layers import Attention, CausalAttention, FeedForward, IntraScaleAttention, Mamba2, State, separate_dt
from mvar.models.transformer import Model, ScaleTransformer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TABLE = 0.75
"""Of the modulation layers' elements. With ImageNet's 1,000 classes a table has 0.98 of them in d16 and 0.52 in d30."""
FLOAT32 = ("A_log", "dt_bias", ".D", "scale_mul_1H11", "in_proj.weight")
"""Ends of the names of weights whose rounding would change every decay or temperature; dt is a part of in_proj."""


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError unless it is None or a dtype of inference."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}; got {dtype}")


class InferenceModel(OnlyForInference, ScaleTransformer):
    """A model for inference alone, in one dtype: returned by :func:`mvar.load_model` with a dtype.

    :func:`mvar.generate` uses it as it is, and so do :func:`mvar.edit`, :func:`mvar.log_likelihood` and
    :func:`mvar.classify`, without a copy.

    Args:
        model: whose submodules are taken over and converted, so that it must not be used afterwards. Tensors that need
            no conversion are shared.
        dtype: of weights and activations.
        labels: the only classes that will be used, besides the unconditional one: the vectors of their modulation are
            computed here and replace the modulation layers, a third of M-VAR's weights, if they take three quarters of
            their memory or less. None for all classes.
        blocks: the blocks of the model, if they are to be loaded one after another; None for `model.blocks`.
    """

    modulation_table: Tensor | None
    table_rows: Tensor

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype,
        *,
        labels: Sequence[int] | Tensor | None = None,
        blocks: Iterable[Block] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.class_names, self.dtype = model.config, model.class_names, dtype
        C = self.config.channels
        self.vector_sizes = [*(3 * block.branches * C for block in model.typed_blocks()), 2 * C]
        classes = None if labels is None else _tabulated_classes(model, labels, sum(self.vector_sizes))
        self.class_emb, self.lvl_embed = model.class_emb.to(dtype), model.lvl_embed.to(dtype)
        self.pos_start, self.pos_1LC = _frozen(model.pos_start, dtype), _frozen(model.pos_1LC, dtype)
        self.register_buffer("lvl_1L", model.lvl_1L)
        self.word_embed, self.head = _linear(model.word_embed, dtype), _linear(model.head, dtype)
        self.head_nm = model.head_nm
        self.head_nm.ada_lin = _modulation_layer(model.head_nm.ada_lin, dtype)
        self.shared_ada_lin = _modulation_layer(model.shared_ada_lin, dtype)
        self.register_buffer("modulation_table", None)
        # Unlike a loop variable, map keeps no reference to a block while the next one is loaded.
        converted = map(partial(InferenceBlock, dtype=dtype), blocks or model.typed_blocks())
        self.blocks = nn.ModuleList(converted if classes is None else self._with_table(classes, converted))
        self.eval().requires_grad_(False)

    def _with_table(self, classes: Tensor, blocks: "Iterable[InferenceBlock]") -> "Iterator[InferenceBlock]":
        """Yield the blocks, and replace all modulation layers by their outputs for these classes."""
        cond = self.class_emb(classes)
        shared = self.shared_ada_lin(cond)
        table = cond.new_empty(len(classes), sum(self.vector_sizes))
        columns = iter(table.split(self.vector_sizes, -1))
        for block in blocks:
            next(columns).copy_(block.modulation(shared))
            block.drop_modulation()
            yield block
        next(columns).copy_(self.head_nm.ada_lin(cond))
        self.register_buffer("modulation_table", table)
        # The index of other classes is out of range, so that they raise an error instead of using a wrong row.
        rows = torch.full((self.config.num_classes + 1,), len(classes), dtype=torch.int64, device=cond.device)
        rows[classes] = torch.arange(len(classes), dtype=torch.int64, device=cond.device)
        self.register_buffer("table_rows", rows)
        del self.shared_ada_lin, self.head_nm

    def modulation_vectors(self, labels: Tensor, cond: Tensor) -> Sequence[Tensor]:
        if self.modulation_table is None:
            return super().modulation_vectors(labels, cond)
        return self.modulation_table[self.table_rows[labels]].split(self.vector_sizes, -1)

    def check_labels(self, labels: Tensor, name: str = "model") -> None:
        """Raise ValueError for a class that is not among those that the model was loaded for.

        Args:
            name: of the model, for messages.
        """
        if self.modulation_table is None:
            return
        missing = labels[self.table_rows[labels] == len(self.modulation_table)]
        if len(missing):
            known = (self.table_rows[:-1] < len(self.modulation_table)).nonzero().flatten().tolist()
            classes = ", ".join(map(str, known[:5])) + ", …" * (len(known) > 5)
            raise ValueError(f"labels: the {name} was loaded for the classes {classes} only, got {int(missing[0])}")

    # Prepacked weights are opaque to PyTorch: it would copy, save and load a model without them.
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("an InferenceModel has no state dict: load the model without dtype")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("an InferenceModel takes no state dict: load the model without dtype")

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("an InferenceModel cannot be copied: load it again")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an InferenceModel cannot be copied or pickled: load it again")


def _tabulated_classes(model: Model, labels: Sequence[int] | Tensor, columns: int) -> Tensor | None:
    """The classes of the table, with the unconditional one; None if it would save less than a quarter of the layers."""
    unconditional, device = model.config.num_classes, model.lvl_1L.device
    classes = class_rows(labels, unconditional + 1, device).unique()
    classes = torch.cat([classes[classes < unconditional], classes.new_tensor([unconditional])])
    layers = sum(p.numel() for name, p in model.named_parameters() if "ada_" in name)
    return classes if len(classes) * columns <= MAX_TABLE * layers else None


class InferenceBlock(Block):
    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        attn = block.attn
        if isinstance(attn, CausalAttention):
            self.attn = InferenceCausalAttention(attn, dtype)
        else:
            self.attn = InferenceAttention(attn, dtype)
        self.mamba = InferenceMamba2(block.mamba, dtype) if isinstance(block, MVARBlock) else None
        self.ffn = _feed_forward(block.ffn, dtype)
        if hasattr(block, "ada_gss"):
            self.ada_gss = _frozen(block.ada_gss, dtype)
        else:
            self.ada_lin = _modulation_layer(block.ada_lin, dtype)

    def drop_modulation(self) -> None:
        """Remove the modulation layer, or the offset to a shared one."""
        if hasattr(self, "ada_gss"):
            del self.ada_gss
        else:
            del self.ada_lin

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


def _modulation_layer(layer: nn.Module, dtype: torch.dtype) -> Any:
    """A modulation layer in `dtype`; the identity, in place of a shared one, unchanged."""
    if isinstance(layer, nn.Identity):
        return layer
    activation, linear = cast(nn.Sequential, layer)
    return nn.Sequential(activation, _linear(cast(nn.Linear, linear), dtype))


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
