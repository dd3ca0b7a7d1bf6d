"""The rotation equals transformers' to the bit, and its gradient autograd's."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from graftlm.model.rotary import Rotation, rotated


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rotation_and_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x_THD = torch.randn(7, 3, 8, dtype=wide).to(dtype)
    cos_TD, sin_TD = torch.randn(2, 7, 8, dtype=wide)  # also the halves differ, as no model's do
    grad_THD = torch.randn(7, 3, 8, dtype=wide)
    found, expected = (x_THD.clone().requires_grad_() for _ in range(2))
    turned = rotated(found, Rotation(cos_TD, sin_TD))
    across_HTD = expected.to(wide).transpose(0, 1)[None]
    across = apply_rotary_pos_emb(across_HTD, across_HTD, cos_TD[None], sin_TD[None])[0]
    assert turned.dtype == wide
    assert torch.equal(turned, across[0].transpose(0, 1))
    turned.backward(grad_THD)
    across.backward(grad_THD.transpose(0, 1)[None])
    assert found.grad is not None
    assert expected.grad is not None
    # 16 bits are rounded from float32s that may differ in their last place.
    assert torch.allclose(found.grad.to(wide), expected.grad.to(wide), rtol=torch.finfo(dtype).eps, atol=1e-15)
