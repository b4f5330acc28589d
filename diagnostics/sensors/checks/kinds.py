"""What kind of operation an aten operator is: which sensor it wants, and what a list of coverage calls it."""

from __future__ import annotations

from functools import cache

import torch

from diagnostics.sensors.checks.arguments import targets

# aten's names by class, for operators that torch's own tags (pointwise, reduction, ...) do not place.
_FAMILIES = {
    "product": "mm addmm bmm baddbmm addbmm mv addmv dot vdot addr _grouped_mm _scaled_mm _scaled_grouped_mm _int_mm",
    "convolution": "convolution _convolution convolution_backward mkldnn_convolution",
    "attention": "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward"
    " _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward"
    " _scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward"
    " _scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward"
    " _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_fused_attention_overrideable_backward"
    " _flash_attention_forward _flash_attention_backward _efficient_attention_forward _efficient_attention_backward"
    " _cudnn_attention_forward _cudnn_attention_backward",
    "softmax": "_softmax _safe_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data",
    "norm": "native_layer_norm native_layer_norm_backward _fused_rms_norm _fused_rms_norm_backward"
    " native_group_norm native_group_norm_backward native_batch_norm native_batch_norm_backward",
    "loss": "nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward mse_loss mse_loss_backward"
    " smooth_l1_loss smooth_l1_loss_backward huber_loss huber_loss_backward",
    "router": "topk sort cumsum bincount histc",
    "reduction": "sum mean amax amin aminmax max min var std var_mean std_mean prod norm linalg_vector_norm argmax"
    " argmin any all logsumexp count_nonzero cumprod logcumsumexp cummax cummin",
    "move": "embedding embedding_dense_backward gather index_select index index_copy index_copy_ index_add index_add_"
    " scatter scatter_ scatter_add scatter_add_ index_put index_put_ _index_put_impl_ _unsafe_index cat stack clone"
    " copy copy_ _to_copy constant_pad_nd repeat roll flip slice_backward select_backward slice_scatter select_scatter"
    " masked_select take index_fill index_fill_ _embedding_bag repeat_interleave nonzero tril triu tril_ triu_",
    "view": "_unsafe_view _reshape_alias detach_",
    "random": "randperm multinomial poisson",
    "blank": "empty empty_like empty_strided empty_permuted new_empty new_empty_strided resize_ set_",
    "creation": "zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full arange linspace eye"
    " scalar_tensor zero_ fill_ lift_fresh",
    "elementwise": "where masked_fill masked_fill_ silu_backward gelu_backward sigmoid_backward tanh_backward"
    " threshold_backward leaky_relu_backward clamp one_hot __iand__ __ior__ __ixor__",
}
_KINDS = {name: kind for kind, names in _FAMILIES.items() for name in names.split()}

# Optimizers' operators over lists of tensors: each element is computed by itself.
_ELEMENTWISE = ("_foreach_", "_fused_adam", "_fused_sgd", "_fused_adagrad")


@cache
def name_of(func: torch._ops.OpOverload) -> str:
    """The operator's name without its library and overload: "add_" of aten.add_.Tensor."""
    return str(func.overloadpacket.__name__)


@cache
def is_view(func: torch._ops.OpOverload) -> bool:
    """Whether the operator only looks at its argument's memory in another way: nothing is computed or moved."""
    returned = [value.alias_info for value in func._schema.returns]
    aliased = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    return aliased or _KINDS.get(name_of(func)) == "view"


@cache
def is_in_place(func: torch._ops.OpOverload) -> bool:
    """Whether the operator writes to an argument (`out=` overloads included), whether its schema says so or not."""
    return bool(targets(func))


@cache
def kind_of(func: torch._ops.OpOverload) -> str:
    """The operator's class: "view", "random", "blank" (memory that nobody has written), "creation", "product",
    "attention", "softmax", "norm", "loss", "router", "convolution", "reduction", "move", "elementwise" or "unknown"."""
    name = name_of(func)
    if is_view(func) or torch.Tag.inplace_view in func.tags:
        return "view"
    known = _KINDS.get(name)
    if known is not None:
        return known
    if torch.Tag.nondeterministic_seeded in func.tags:
        return "random"
    if torch.Tag.pointwise in func.tags or name.startswith(_ELEMENTWISE) or _functional_is_pointwise(func):
        return "elementwise"
    if torch.Tag.reduction in func.tags:
        return "reduction"
    return "unknown"


def _functional_is_pointwise(func: torch._ops.OpOverload) -> bool:
    """In-place operators carry no tag of their own: add_ is what add is."""
    name = name_of(func)
    if not name.endswith("_") or name.endswith("__"):
        return False
    packet = getattr(torch.ops.aten, name.rstrip("_"), None)
    overload = getattr(packet, func._overloadname, None) if packet is not None else None
    return overload is not None and torch.Tag.pointwise in overload.tags
