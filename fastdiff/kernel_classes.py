"""What kind of work a kernel or operator does, told from its name in a profile.

The names come from cuDNN, cuBLAS, CUTLASS, PyTorch, Inductor and this package on a GPU, and from ATen, oneDNN and
Inductor on a CPU. A name that no rule knows is "other".
"""

from __future__ import annotations

import functools
import re

# Class: what it holds. Also the legend of the printed table.
CLASSES = {
    "convolution": "convolutions, forward and backward, by cuDNN, oneDNN or Inductor",
    "matmul": "matrix products",
    "attention": "fused attention; softmax",
    "group_norm": "group norm and what is fused with it; layer norm, whose kernels share its names",
    "elementwise": "one pass over tensors: activations, sums, scale and shift, Inductor's pointwise kernels",
    "reduction": "sums, means, sorts and scans, Inductor's reductions",
    "resize": "nearest-neighbour upsampling, average pooling, padding",
    "copy": "copies, changes of layout or dtype, concatenation, indexing, fills",
    "random": "torch's random numbers, dropout",
    "optimizer": "optimizer step, moving average, gradient clipping: all multi-tensor operations",
    "fastdiff": "this package's own kernels: q_sample, p_sample, mse, solver_step, noise (group norm is above)",
    "compiled": "CPU only: a compiled graph's own time, with those of its kernels that carry no name",
    "dispatch": "CPU only: Python, the dispatcher, allocation and views, all that computes nothing",
    "other": "names that no rule knows",
}

_OPERATOR = re.compile(r"(aten|mkldnn|mkldnn_prepacked|onednn|fastdiff|prims|torchvision|inductor)::")

# The first rule that is found in the name decides.
_OPERATOR_RULES = (
    # Operators that only call others, or touch no data.
    (
        "dispatch",
        r"::(view|_unsafe_view|_reshape_alias|reshape|flatten|unflatten|as_strided_?|expand|expand_as|permute|transpose_?"
        r"|t_?|numpy_T|mT|movedim|unsqueeze_?|squeeze_?|select|slice|narrow|chunk|split|split_with_sizes|tensor_split|unbind"
        r"|alias|detach_?|lift_fresh|view_as|unfold|diagonal|movedim|broadcast_tensors|broadcast_to"
        r"|empty|empty_like|empty_strided|new_empty|new_empty_strided|resize_|resize_as_|set_"
        r"|to|contiguous|type_as|float|resolve_conj|resolve_neg|dropout|result_type|can_cast|size|stride|is_nonzero"
        r"|_nnpack_available|_fused_sdp_choice|_has_compatible_shallow_copy_type|requires_grad_|matmul|einsum"
        r"|_assert_tensor_metadata|_assert_async|layer_norm|group_norm|conv[123]d|_convolution_mode)$",
    ),
    ("optimizer", r"::(_fused_(adam|adamw|sgd|adagrad)_?|_foreach_|_amp_)"),
    ("attention", r"attention|softmax"),
    ("group_norm", r"group_norm|layer_norm|batch_norm"),
    ("convolution", r"conv"),
    (
        "matmul",
        r"::(addmm|mm|bmm|baddbmm|addbmm|linear|_linear|mv|addmv|dot|vdot|mkldnn_linear|_scaled_mm)|mkl.*linear",
    ),
    ("random", r"rand|normal_|uniform|bernoulli|dropout|multinomial"),
    ("resize", r"upsample|avg_pool|max_pool|interpolate|::(constant_)?pad|_pad_"),
    (
        "copy",
        r"::(_to_copy|copy_?|clone|_local_scalar_dense|item|cat|_cat|stack|repeat|tile|roll|flip|masked_fill_?|fill_?|zero_"
        r"|zeros|zeros_like|ones|ones_like|full|full_like|new_zeros|new_ones|new_full|arange|linspace|eye|scalar_tensor"
        r"|index|index_select|index_put_?|_index_put_impl_|gather|scatter_?|scatter_add_?|embedding|embedding_dense_backward"
        r"|_to_dense|to_mkldnn|mkldnn_reorder_conv2d_weight|select_backward|slice_backward|_reorder_conv\w*_weight)$",
    ),
    (
        "reduction",
        r"::_?(sum|sum_to_size|mean|var|std|var_mean|std_mean|amax|amin|aminmax|max|min|any|all|prod|norm|linalg_vector_norm"
        r"|cumsum|cumprod|sort|topk|argmax|argmin|argsort|quantile|logsumexp|bincount|histc|nonzero|unique\w*|equal)$",
    ),
    ("fastdiff", r"^fastdiff::"),
    ("elementwise", r"^(aten|prims|mkldnn)::"),
)

_COPIES = r"_to_copy|clone|copy|cat|stack|slice|select|index|embedding|expand|permute|transpose|view|full|zeros|arange"
_KERNEL_RULES = (
    # Inductor names a kernel after the operators it came from; templates hold one large operator.
    ("attention", r"triton_tem_fused.*attention"),
    ("convolution", r"triton_tem_fused.*conv"),
    ("matmul", r"triton_tem_fused"),
    ("optimizer", r"triton_for_fused"),
    ("group_norm", r"(triton|cpp)_\w*fused.*(group_norm|layer_norm)"),
    ("copy", rf"(triton_poi|cpp)_fused_(({_COPIES})_)+\d+$"),
    ("reduction", r"triton_(red|per|split_scan)_fused"),
    ("random", r"(triton_poi|cpp)_fused_(inductor_(random|seeds)_)+\d+$"),
    ("elementwise", r"triton_\w*fused|cpp_fused"),
    # This package's.
    ("group_norm", r"^_(group_norm|moments|normalise)\w*_kernel$"),
    ("fastdiff", r"^_(q_sample|p_sample|mse|solver_step|normal|uniform_words)_kernel$"),
    # Libraries. Layout first: cuDNN converts by kernels that name convolution types.
    ("copy", r"(nchw|nhwc|chw|hwc)\w*To\w*(nchw|nhwc|chw|hwc)|\b(memcpy|memset)\b|nhwcAddPadding|nchwAddPadding"),
    (
        "copy",
        r"genericTranspose|batched_transpose|transpose_?(kernel|warp|readWrite)|tensorTransform|SubTensorOpWithScalar",
    ),
    ("optimizer", r"multi_tensor_apply|fused_?adam|lpnorm_cleanup"),
    ("attention", r"sdpa|fmha|flash_|FlashAttn|attention|softmax"),
    ("group_norm", r"group_?norm|layer_?norm|RowwiseMoments|ComputeFusedParams|ComputeBackwardFusedParams"),
    (
        "group_norm",
        r"ComputeInternalGradients|GammaBeta\w*(Backward|CUDAKernel)|batch_?norm|\bbn_(fw|bw)|Compute1dBackward",
    ),
    ("resize", r"upsample|avg_?pool|max_?pool|pooling|_pad\w*_kernel|pad_kernel|adaptive"),
    (
        "convolution",
        r"fprop|dgrad|wgrad|implicit_gemm|convol|conv_?[123]d|conv_depthwise|winograd|scudnn|s\d+cudnn|igemm_",
    ),
    ("convolution", r"miopen|im2col|col2im|vol2col|first_layer|fft[12]d|_5x_cudnn|\bcudnn|cask|xmma_cudnn|ConvAsm"),
    ("matmul", r"gemm|gemv|nvjet|cublas|Cijk_|splitK|split_k|dot_kernel|dot_product|cutlass|\bgmma|bmm_"),
    ("random", r"distribution|philox|curand|rocrand|bernoulli|dropout|randperm|randint"),
    (
        "copy",
        r"copy_|copy\b|Copy|CatArray|cat_array|FillFunctor|fill_|transpose|arange|index_|index[A-Z]|gather|scatter",
    ),
    ("copy", r"embedding|triu_tril|take_put|flip_"),
    (
        "reduction",
        r"reduce|\bcub\b|::cub::|thrust|_scan|sort|MeanOps|NormTwoOps|histogram|nll_loss|mse_loss|argm(ax|in)",
    ),
    ("elementwise", r"elementwise|pointwise|unrolled_|jitted|op_(generic_)?tensor_kernel|GeluCUDA|silu|where_kernel"),
)
_HOST_RULES = (
    ("compiled", r"^## Call CompiledFxGraph"),
    ("dispatch", r"^(autograd::engine|torch::autograd|Optimizer\.|Torch-Compiled Region|TorchDynamo|AOTDispatcher)"),
    ("dispatch", r"^(Pregraph bytecode|CompiledFunction|ProfilerStep|\w+Backward\d*$|detach$)"),
)


def classify(name: str) -> str:
    """The class, a key of `CLASSES`, of a CUDA kernel, an operator such as "aten::addmm" or an event of torch's profiler.

    Inductor's kernels count by what they do: "triton_poi_fused_native_group_norm_silu_3" is "group_norm", a bias that is
    added after a convolution is "elementwise".
    """
    return _classify(name)


@functools.lru_cache(maxsize=65536)
def _classify(name: str) -> str:
    rules = _COMPILED_OPERATOR_RULES if _OPERATOR.match(name) else _COMPILED_KERNEL_RULES
    return next((kind for kind, rule in rules if rule.search(name)), "other")


def _compiled(rules: tuple[tuple[str, str], ...], flags: int) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((kind, re.compile(rule, flags)) for kind, rule in rules)


_COMPILED_OPERATOR_RULES = _compiled(_OPERATOR_RULES, 0)
_COMPILED_KERNEL_RULES = _compiled((*_HOST_RULES, *_KERNEL_RULES), re.IGNORECASE)
