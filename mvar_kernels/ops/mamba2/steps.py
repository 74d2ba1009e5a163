"""Where mamba2_mixer's steps are: among its inputs' columns, or beside them."""

from collections.abc import Sequence

from torch import Tensor


def steps_of(inputs: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """dt (B, L, directions·H) before its bias. `inputs`: [zxbcdt], whose last columns are a view of it, or [zxbc, dt].

    Of their gradients likewise.
    """
    return inputs[1] if len(inputs) == 2 else inputs[0][..., inputs[0].shape[-1] - params[2].numel() :]
