"""Inputs of linears that are made again for the backward pass instead of kept.

A linear keeps its input for the gradient of its weight. Norm and GeGLU make theirs in one pass
over memory from what they keep themselves, so that the linear can keep how instead. Autograd asks
for the input when the linear's backward pass begins and lets it go when that ends; until then its
memory is whoever's still reads it, as the residual connection does.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import Module

from megatron_glm.errors import GLMError


def give_recipe(x: Tensor, again: Callable[[], Tensor]) -> None:
    """Says how `x`, the input of a linear, is made again.

    again: gives the same bits once more, from tensors that are kept for the backward pass anyway.
    """
    x.recipe = again


def apply_linear(linear: Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """linear(x), which keeps the recipe of `x` where it has one, and `x` itself where it has none.

    linear: one of Megatron's, which returns its output [..., out] and its bias.

    Raises:
        GLMError: the linear keeps something else than its input.
    """
    output, bias = linear(x)
    recipe = getattr(x, "recipe", None)
    if recipe is not None and output.requires_grad:
        _keep_recipe(output, x, recipe)
    return output, bias


def _keep_recipe(output: Tensor, x: Tensor, recipe: Callable[[], Tensor]) -> None:
    # Behind the linear there may be a reduction over ranks; before it, an alias of x.
    node, memory = output.grad_fn, x.untyped_storage()._cdata
    while node is not None:
        kept = getattr(node, "saved_tensors", ())
        for tensor, slot in zip(kept, getattr(node, "_raw_saved_tensors", ()), strict=True):
            if tensor is not None and tensor.untyped_storage()._cdata == memory:
                slot.register_hooks(lambda x: x.shape, lambda shape: recipe().view(shape))
                return
        node = node.next_functions[0][0] if node.next_functions else None
    raise GLMError(
        "--glm-recompute-norms-and-geglu: a linear does not keep its input as it came; drop the "
        "flag"
    )
