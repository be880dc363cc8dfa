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
    "fastdiff": "this package's own kernels: q_sample, p_sample, mse, solver_step, noise, dropout (group norm: above)",
    "compiled": "CPU only: a compiled graph's own time, with those of its kernels that carry no name",
    "dispatch": "CPU only: Python, the dispatcher, allocation and views, all that computes nothing",
    "other": "names that no rule knows",
}

_OPERATOR = re.compile(r"(aten|mkldnn|mkldnn_prepacked|onednn|fastdiff|prims|torchvision|inductor)::")


def _named(names: str) -> str:
    """A pattern of operators with exactly these names, in place ("add_") or not."""
    return f"::({'|'.join(names.split())})_?$"


# The first rule that is found in the name decides.
_OPERATOR_RULES = (
    # They only call others, or touch no data.
    (
        "dispatch",
        _named(
            "view _unsafe_view _reshape_alias reshape flatten unflatten as_strided expand expand_as permute transpose t"
            " numpy_T mT movedim unsqueeze squeeze select slice narrow chunk split split_with_sizes tensor_split unbind"
            " alias detach lift_fresh view_as unfold diagonal broadcast_tensors broadcast_to set"
            " empty empty_like empty_strided new_empty new_empty_strided resize resize_as"
            " to contiguous type_as float resolve_conj resolve_neg result_type can_cast size stride is_nonzero"
            " matmul einsum quantile dropout layer_norm group_norm conv1d conv2d conv3d requires_grad"
            " _nnpack_available _fused_sdp_choice _assert_tensor_metadata _has_compatible_shallow_copy_type"
        ),
    ),
    ("optimizer", r"::(_fused_(adam|adamw|sgd|adagrad)_?|_foreach_|_amp_)"),
    ("attention", r"attention|softmax"),
    ("group_norm", r"group_norm|layer_norm|batch_norm"),
    ("convolution", r"conv"),
    ("matmul", r"mkl.*linear|" + _named("addmm mm bmm baddbmm addbmm linear mv addmv dot vdot _scaled_mm")),
    ("random", r"rand|normal_|uniform|bernoulli|dropout|multinomial"),
    ("resize", r"upsample|avg_pool|max_pool|interpolate|::(constant_)?pad|_pad_"),
    (
        "copy",
        _named(
            "_to_copy copy clone _local_scalar_dense item cat _cat stack repeat tile roll flip masked_fill fill zero"
            " zeros zeros_like ones ones_like full full_like new_zeros new_ones new_full arange linspace scalar_tensor"
            " index index_select index_put _index_put_impl gather scatter scatter_add embedding"
            " embedding_dense_backward select_backward slice_backward _to_dense to_mkldnn mkldnn_reorder_conv2d_weight"
        ),
    ),
    (
        "reduction",
        _named(
            "sum sum_to_size mean var std var_mean std_mean amax amin aminmax _aminmax max min any all prod norm"
            " linalg_vector_norm cumsum cumprod sort topk argmax argmin argsort logsumexp nonzero equal"
        ),
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
    ("group_norm", r"^_(group_norm\w*|moments|normalise|backward_(sums|dx))_kernel$"),
    ("fastdiff", r"^_(q_sample|p_sample|mse|solver_step|normal|uniform|dropout)_kernel$"),
    # Libraries. Layout first: cuDNN converts by kernels that name convolution types.
    ("copy", r"(nchw|nhwc|chw|hwc)\w*To\w*(nchw|nhwc|chw|hwc)|\b(memcpy|memset)\b|nhwcAddPadding|nchwAddPadding"),
    ("copy", r"genericTranspose|batched_transpose|transpose_?(kernel|warp|readWrite)|tensorTransform"),
    ("optimizer", r"multi_tensor_apply|fused_?adam|lpnorm_cleanup"),
    ("attention", r"sdpa|fmha|flash_|FlashAttn|attention|softmax"),
    ("group_norm", r"group_?norm|layer_?norm|RowwiseMoments|ComputeFusedParams|ComputeBackwardFusedParams"),
    ("group_norm", r"ComputeInternalGradients|Compute1dBackward|GammaBeta\w*Backward|batch_?norm|\bbn_(fw|bw)"),
    ("resize", r"upsample|avg_?pool|max_?pool|pooling|_pad\w*_kernel|pad_kernel"),
    ("convolution", r"fprop|dgrad|wgrad|implicit_gemm|convol|conv_?[123]d|conv_depthwise|winograd|s\d*cudnn"),
    ("convolution", r"igemm_|miopen|im2col|col2im|vol2col|first_layer|fft[12]d|_5x_cudnn|\bcudnn|cask|ConvAsm"),
    ("matmul", r"gemm|gemv|nvjet|cublas|Cijk_|splitK|split_k|dot_kernel|dot_product|cutlass"),
    ("random", r"distribution|philox|curand|rocrand|bernoulli|dropout|randperm|randint"),
    ("copy", r"copy|CatArray|FillFunctor|fill_|transpose|arange|index_|indexSelect|gather|scatter|embedding|triu_tril"),
    ("reduction", r"reduce|\bcub\b|thrust|_scan|sort|histogram|nll_loss|mse_loss|argm(ax|in)"),
    ("elementwise", r"elementwise|pointwise|jitted|op_(generic_)?tensor_kernel|silu|where_kernel"),
)
_HOST_RULES = (
    ("compiled", r"^## Call CompiledFxGraph"),
    ("dispatch", r"^(autograd::engine|torch::autograd|Optimizer\.|Torch-Compiled Region|TorchDynamo|AOTDispatcher)"),
    ("dispatch", r"^(Pregraph bytecode|CompiledFunction|ProfilerStep|\w+Backward\d*$|detach$)"),
)


def classify(name: str) -> str:
    """The class, a key of `CLASSES`, of a CUDA kernel, an operator such as "aten::addmm" or another profiled event.

    Inductor's kernels count by what they do: "triton_poi_fused_native_group_norm_silu_3" is "group_norm", a bias that
    is added after a convolution is "elementwise".
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
