"""Products of the layers' linear maps in FP8. Lossy, and off unless asked for.

Owns which layers take part, and the layer that stands in for each while a stage trains: the same parameters under the
same names, so that what learns stays float32 and what is saved is what would be saved anyway. The products are
torchao's; this is the only file importing it, an extra. Does not know stages, nor which devices can do it.

Source: arXiv 2209.05433 for the format E4M3. Scales and which products are in 8 bits: torchao's recipe
`rowwise_with_gw_hp`. With q(x, d) = E4M3(s x) / s, s the power of 2 not above 448 over the largest magnitude along d,
products added up in float32:

    output = q(input, features) @ q(weight, features in).T    grad_input = q(grad, features) @ q(weight, all)
    grad_weight = grad.T @ input, in 16 bits

Of the recipes torchao has, this one scales every token by itself: what a token gives does not depend on the rows it is
packed with, so that a micro-batch's size, or the number of ranks, changes no more than the order of sums, as without
FP8. Nor is a count of tokens ever the inner size of a product in FP8, which would have to divide by 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.errors import UserError
from graftlm.model.causal import body_of
from graftlm.model.frozen import HeldLayers

RECIPE = "rowwise_with_gw_hp"
MULTIPLE = 16
"""What torch's product in FP8 wants a matrix's sizes to divide by."""


def hold_in_fp8(model: nn.Module, *, emulate: bool = False) -> HeldLayers:
    """Replace the linear layers of attention and MLP by ones whose products are in FP8, adapters excepted.

    Under an adapter that is the layer adapted. A layer whose sizes do not divide by 16 stays as it is, and so do
    embedding and head. `emulate`: the same numbers by products in float32, where the device has none in FP8.
    Raises UserError where torchao is missing.
    """
    ahead, back = _configs(emulate)
    found = tuple(_layers(body_of(model)))
    for parent, name, layer in found:
        setattr(parent, name, Fp8Linear(layer, ahead, back))
    return HeldLayers(found)


def require_torchao() -> None:
    """Raises UserError where torchao is missing."""
    _torchao()


def _layers(body: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for path, parent in body.named_modules():
        if ".lora_" in path:
            continue
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE):
                yield parent, name, layer


class Fp8Linear(nn.Linear):
    """Stands for a linear layer, with its own parameters. torchao's layer computes; this one knows every device's
    autocast, where torchao's asks for CUDA's alone, and what a weight that does not learn spares."""

    def __init__(self, layer: nn.Linear, ahead: Any, back: Any) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        turned = nn.Linear(self.out_features, self.in_features, bias=False, device="meta")
        convert = _torchao().convert_to_float8_training
        # In a tuple torch registers neither as a child: a parameter keeps its one name.
        self._computing = convert(layer, config=ahead), convert(turned, config=back)

    def forward(self, input: Tensor) -> Tensor:
        """Of (..., in_features), (..., out_features) in autocast's dtype, else in the input's own."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        return self.product(input) if self.weight.requires_grad else _FrozenProduct.apply(input, self)

    def product(self, input: Tensor) -> Tensor:
        """input @ weight.T + bias as torchao computes it, its gradients included."""
        plain = self._computing[0]
        plain.weight, plain.bias = self.weight, self.bias  # which may lie on another device since
        return plain(input)

    def product_back(self, grad: Tensor) -> Tensor:
        """grad @ weight as torchao's backward computes it: the product with the matrix turned."""
        turned = self._computing[1]
        turned.weight = nn.Parameter(self.weight.detach().t(), requires_grad=False)
        return turned(grad)


class _FrozenProduct(torch.autograd.Function):
    """The product of a weight that does not learn. torchao would keep the input, and compute that weight's gradient, in
    16 bits, all the same: as much work as both products in FP8."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Fp8Linear) -> Tensor:
        ctx.layer = layer
        output = layer.product(input)
        # torchao's is a view of a product no one else holds; autograd would forbid an adapter to add to it in place.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product_back(grad_outputs[0]), None


def _configs(emulate: bool) -> tuple[Any, Any]:
    """torchao's, of a layer, and of its turned matrix on the way back: there the gradient is what goes in."""
    torchao = _torchao()
    ahead = replace(torchao.Float8LinearConfig.from_recipe_name(RECIPE), emulate=emulate)
    back = torchao.Float8LinearConfig(
        cast_config_input=ahead.cast_config_grad_output,
        cast_config_weight=ahead.cast_config_weight_for_grad_input,
        gemm_config_output=ahead.gemm_config_grad_input,
        round_scales_to_power_of_2=ahead.round_scales_to_power_of_2,
        emulate=emulate,
    )
    return ahead, back


def _torchao() -> Any:
    try:
        import torchao.float8 as torchao
    except ImportError:
        raise UserError(
            "FP8 needs torchao, and it is not installed.",
            "Install it: pip install 'graftlm[fp8]' (or set stages.NAME.fp8=false).",
        ) from None
    return torchao
