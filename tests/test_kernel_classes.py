"""Kernels are told apart by name. The names are those of cuDNN 9, cuBLAS 13, CUTLASS, torch 2.11-2.15 and Inductor."""

import re
from pathlib import Path

import pytest

from fastdiff.kernel_classes import CLASSES, classify

NATIVE = "void at::native::"
HIDDEN = "void at::native::(anonymous namespace)::"
KERNELS = {
    "convolution": (
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x256x64_warpgroupsize2x1x1_g1"
        "_execute_split_k_kernel__5x_cudnn",
        "sm90_xmma_dgrad_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x64x32_warpgroupsize1x1x1_g1"
        "_execute_segment_k_on_kernel__5x_cudnn",
        "sm80_xmma_wgrad_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x128x16_stage4",
        "sm75_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize256x128x32_stage1_warpsize4x2x1",
        "cutlass3x_sm100_tensorop_s128x256x16implicit_gemm_fprop_f16_f16_f32_void_f16_f32_128x256x64_dyn_cga",
        "cutlass3x_sm100_tensorop_s128x128x16_conv2d_dgrad_dual_bn_stat_f16_f16_f32_f16_128x128x64_dyn_cga_ndhwc",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc_align8>"
        "(cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc_align8::Params)",
        "void cudnn::cnn::conv2d_grouped_direct_kernel<false, true, true, false, false, true, 0, 0, int, int, char4>",
        "void cudnn::winograd_nonfused::winogradWgradData4x4<float, float>(WinogradDataParams)",
        "void implicit_convolve_sgemm<float, float, int, 128, 5, 5, 3, 3, 3, 0, true, true, true>(int, int, int)",
        "volta_fp16_s884cudnn_fp16_256x64_ldg8_relu_f2f_exp_small_nhwc_tn_v1",
        "void cask_cudnn::first_layer_fwd_kernel<int=4, int=7, int=7, int=64>(cask_cudnn::FirstLayerFwdParams)",
        f"{HIDDEN}conv_depthwise2d_forward_kernel<3, float, int>(at::GenericPackedTensorAccessor<float const, 4ul>)",
        "triton_tem_fused_convolution_5",
    ),
    "matmul": (
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "nvjet_tst_64x64_64x8_2x1_v_bz_splitK_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel"
        "__5x_cublas",
        "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x64x8_stage3_warpsize2x2x1_ffma",
        "ampere_bf16_s16816gemm_bf16_256x128_ldg8_f2f_stages_32x3_nn",
        "void cutlass::Kernel2<cutlass_80_simt_sgemm_64x64_8x5_nn_align1>(cutlass_80_simt_sgemm_64x64_8x5_nn::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, false>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>",
        "triton_tem_fused_addmm_relu_3",
    ),
    "attention": (
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 64, 64, 4, false, false, cutlass::half_t> >",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64, 64, 8> >",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel::Params)",
        "fmha_cutlassB_bf16_aligned_128x128_k128_sm80",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1_kernel0_0",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>(float*, float const*)",
        "triton_tem_fused_flex_attention_0",
    ),
    "group_norm": (
        f"{HIDDEN}RowwiseMomentsCUDAKernel<float>(long, float, float const*, float*, float*)",
        f"{HIDDEN}RowwiseMomentsChannelsLastCUDAKernel<c10::BFloat16, float>(long, long, long, long, c10::BFloat16)",
        f"{HIDDEN}ComputeFusedParamsCUDAKernel<c10::BFloat16, float>(long, long, long, float const*, float const*)",
        f"{HIDDEN}ComputeInternalGradientsContiguousCUDAKernel<1, float>(long, float const*, float const*)",
        f"{HIDDEN}Compute1dBackwardFusedParamsCUDAKernel<float>(long, long, float const*, float const*, float const*)",
        f"{HIDDEN}GammaBeta1dBackwardCUDAKernel1<float>(long, long, long, float const*, float const*, float const*)",
        f"{NATIVE}vectorized_elementwise_kernel<8, at::native::(anonymous namespace)::GroupNorm1dForward<float, float>("
        "at::Tensor const&, at::Tensor const&)::{lambda(float, float, float)#1}, std::array<char*, 4ul>, true>(int)",
        f"{HIDDEN}vectorized_layer_norm_kernel<float, float, false>(int, float, float const*)",
        "triton_red_fused_native_group_norm_15",
        "triton_per_fused_native_group_norm_backward_0",
        "triton_poi_fused_native_group_norm_silu_3",
        "graph_0_cpp_fused_native_group_norm_silu_0",
    ),
    "elementwise": (
        f"{NATIVE}vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>, true>",
        f"{NATIVE}vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::silu_kernel(at::Tensor"
        "IteratorBase&)::{lambda()#1}::operator()() const::{lambda()#2}::operator()() const::{lambda(float)#1}>",
        f"{NATIVE}elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::BinaryFunctor<float, float,"
        " float, at::native::binary_internal::MulFunctor<float> > >(at::TensorIteratorBase&)::{lambda(int)#1}>(int)",
        "triton_poi_fused_convolution_silu_7",
        "triton_poi_fused_add_mul_0",
        "graph_3_cpp_fused_silu_1",
        "cpp_fused_add_convolution_mul_12",
    ),
    "reduction": (
        f"{NATIVE}reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float, at::native::sum_"
        "functor<float, float, float>::operator()(at::TensorIterator&)::{lambda(float, float)#1}>, unsigned int> >",
        "void at_cuda_detail::cub::DeviceReduceSingleTileKernel<at_cuda_detail::cub::DeviceReducePolicy<float, int> >",
        "triton_per_fused_mean_pow_sub_4",
        "triton_red_fused_var_mean_2",
    ),
    "resize": (
        f"{HIDDEN}upsample_nearest2d_nhwc_out_frame<c10::BFloat16, &at::native::nearest_neighbor_compute_source_index>",
        f"{HIDDEN}avg_pool2d_out_cuda_frame_nhwc<float, float, int>(int, float const*, long, long, long, int, int)",
    ),
    "copy": (
        "Memcpy DtoD (Device -> Device)",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true,"
        " (cudnnKernelDataType_t)2>(cudnn::engines_precompiled::nchw2nhwc_params_t<float>, __nv_bfloat16 const*)",
        "void cudnn::ops::nhwcToNchwKernel<__half, __half, float, true, false, (cudnnKernelDataType_t)0>",
        f"{NATIVE}elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda("
        "at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda()#12}::operator()() const>",
        f"{HIDDEN}CatArrayBatchedCopy_vectorized<at::native::(anonymous namespace)::OpaqueType<4u>, unsigned int>",
        f"{NATIVE}vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >(int)",
        f"{NATIVE}vectorized_gather_kernel<16, int>(char*, char*, int*, int, long, long, long, long, bool)",
        "triton_poi_fused__to_copy_0",
        "triton_poi_fused_cat_clone_11",
        "graph_0_cpp_fused__to_copy_2",
    ),
    "random": (
        f"{HIDDEN}distribution_elementwise_grid_stride_kernel<float, 4, at::native::templates::cuda>",
        f"{HIDDEN}fused_dropout_kernel_vec<float, float, unsigned int, 1, 2, bool>(at::cuda::detail)",
    ),
    "optimizer": (
        f"{HIDDEN}multi_tensor_apply_kernel<at::native::(anonymous namespace)::FusedOptimizerTensorListMetadata<4>,"
        " at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, (at::native::ADAM_MODE)1, false> >",
        f"{HIDDEN}multi_tensor_apply_kernel<at::native::(anonymous namespace)::TensorListMetadata<2>,"
        " at::native::TernaryOpScalarFunctor<float, 2, 2, 0>, at::native::LerpFunctor<float>, float>",
        f"{HIDDEN}multi_tensor_apply_kernel<at::native::(anonymous namespace)::TensorListMetadata<1>,"
        " at::native::LpNormFunctor<float, (at::native::NormType)1, float, 1, 1, 0>, float*, long const*>",
    ),
    "fastdiff": ("_p_sample_kernel",),
    "compiled": ("## Call CompiledFxGraph fps52ymkx4o2zpk7lawliipiuyo2grdqjuw7chhfmasbagas7qls ##",),
    "dispatch": (
        "Torch-Compiled Region: 0/0",
        "autograd::engine::evaluate_function: ConvolutionBackward0",
        "torch::autograd::AccumulateGrad",
        "CompiledFunctionBackward",
        "SiluBackward0",
    ),
    "other": ("void somebody::mystery<int>(int)",),
}
OPERATORS = {
    "convolution": "mkldnn_convolution convolution _convolution convolution_backward _slow_conv2d_forward thnn_conv2d",
    "matmul": "addmm mm bmm baddbmm linear mkldnn_linear",
    "attention": "_scaled_dot_product_flash_attention_for_cpu scaled_dot_product_attention _softmax",
    "group_norm": "native_group_norm native_group_norm_backward native_layer_norm",
    "elementwise": "add add_ mul silu silu_backward sigmoid rsqrt where lerp_ clamp gelu",
    "reduction": "sum mean var_mean linalg_vector_norm aminmax topk",
    "resize": "upsample_nearest2d upsample_nearest2d_backward avg_pool2d constant_pad_nd",
    "copy": "copy_ _to_copy clone cat fill_ zero_ zeros index_select embedding arange _local_scalar_dense",
    "random": "randn normal_ bernoulli_ native_dropout",
    "optimizer": "_fused_adamw_ _foreach_lerp_ _foreach_norm _foreach_mul_",
    "dispatch": "view reshape permute as_strided t empty empty_strided resize_ to contiguous dropout detach select"
    " matmul group_norm conv2d unbind expand",
}
CASES = [(kind, name) for kind, names in KERNELS.items() for name in names]
CASES += [(kind, f"aten::{name}") for kind, names in OPERATORS.items() for name in names.split()]
CASES += [("convolution", "mkldnn::_convolution_pointwise"), ("matmul", "mkldnn::_linear_pointwise")]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[name[:60] for _, name in CASES])
def test_class_of(kind, name):
    assert classify(name) == kind


def test_every_class_is_explained_and_has_names():
    assert set(CLASSES) == set(KERNELS) | set(OPERATORS)


def test_every_kernel_of_this_package_is_known():
    expected, got = {}, {}
    for path in (Path(__file__).parent.parent / "kernels").glob("*.py"):
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE):
            expected[name] = "group_norm" if path.name.startswith("group") else "fastdiff"
            got[name] = classify(name)
    assert len(expected) >= 5
    assert got == expected
