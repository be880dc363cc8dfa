"""From profiler events to totals: nesting on a CPU; kernels, graph replays, launches and waits on a GPU."""

import pytest

from fastdiff.profile_events import CALL, Event, summarise

CONV = "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64__5x_cudnn"


def call(start, end):
    return Event(CALL, start, end, annotation=True)


def nested(*operators):
    """Operators of one thread from (name, start, end)."""
    return [Event(f"aten::{name}", start, end) for name, start, end in operators]


def launches(summary):
    return {key: total.launches for key, total in summary.totals.items() if total.launches}


def test_the_innermost_convolution_is_the_launch():
    events = [call(0, 100), *nested(("conv2d", 10, 90), ("convolution", 11, 89), ("_convolution", 12, 88))]
    events += nested(("mkldnn_convolution", 20, 80), ("empty", 22, 25), ("resize_", 25, 26))
    summary = summarise(events, on_device=False)
    assert launches(summary) == {("aten::mkldnn_convolution", "convolution"): 1}
    assert summary.totals["aten::mkldnn_convolution", "convolution"].ns == 60 - 3 - 1
    assert summary.totals["dispatch", "dispatch"].ns == 100 - 56


def test_a_convolution_that_copies_is_two_launches():
    events = [call(0, 100), *nested(("convolution_backward", 10, 90), ("to", 50, 60), ("_to_copy", 51, 59))]
    summary = summarise([*events, *nested(("copy_", 52, 58))], on_device=False)
    assert launches(summary) == {("aten::convolution_backward", "convolution"): 1, ("aten::copy_", "copy"): 1}
    assert summary.totals["aten::convolution_backward", "convolution"].ns == 80 - 10


def test_what_an_operator_makes_for_itself_is_no_launch():
    number = nested(("mul", 10, 50), ("to", 20, 40), ("_to_copy", 21, 39), ("copy_", 22, 38))
    zeros = nested(("sum", 50, 70), ("fill_", 55, 60))
    bias = nested(("addmm", 70, 90), ("expand", 72, 73), ("copy_", 74, 80))
    events = [call(0, 100), *number, *zeros, *bias]
    assert launches(summarise(events, on_device=False)) == {
        ("aten::mul", "elementwise"): 1,
        ("aten::sum", "reduction"): 1,
        ("aten::addmm", "matmul"): 1,
    }


def test_what_an_owner_calls_is_its_work():
    attention = nested(("_scaled_dot_product_attention_math", 0, 50), ("matmul", 1, 20), ("bmm", 2, 19))
    attention += nested(("_softmax", 21, 30), ("bmm", 31, 40))
    optimizer = nested(("_foreach_lerp_", 50, 90), ("lerp_", 51, 60), ("lerp_", 61, 70), ("lerp_", 95, 99))
    assert launches(summarise([call(0, 100), *attention, *optimizer], on_device=False)) == {
        ("aten::bmm", "attention"): 2,
        ("aten::_softmax", "attention"): 1,
        ("aten::lerp_", "optimizer"): 2,
        ("aten::lerp_", "elementwise"): 1,
    }


def test_compiled_graph_with_and_without_kernel_names():
    graph = Event("## Call CompiledFxGraph f0 ##", 10, 90)
    convolution = nested(("mkldnn_convolution", 20, 50))
    named = [Event("graph_0_cpp_fused_native_group_norm_silu_0", 50, 80)]
    unnamed = summarise([call(0, 100), graph, *convolution], on_device=False)
    assert unnamed.totals[graph.name, "compiled"].ns == 80 - 30
    assert sum(launches(unnamed).values()) == 1
    summary = summarise([call(0, 100), graph, *convolution, *named], on_device=False)
    assert summary.totals[named[0].name, "group_norm"].launches == 1
    assert summary.totals[graph.name, "compiled"].ns == 80 - 30 - 30


def test_threads_do_not_nest_and_other_calls_do_not_count():
    events = [call(0, 100), call(200, 300)]
    events += [Event("aten::linear", 10, 90, thread=1), Event("aten::addmm", 20, 80, thread=2)]
    events += [Event("aten::silu", 120, 130), Event("aten::silu", 220, 230)]
    summary = summarise(events, on_device=False)
    assert summary.calls == 2
    assert launches(summary) == {
        ("aten::linear", "matmul"): 1,
        ("aten::addmm", "matmul"): 1,
        ("aten::silu", "elementwise"): 1,
    }


def test_gpu_counts_what_ran_launches_and_waits():
    kernels = [Event(CONV, 100 + i, 130 + i, on_device=True) for i in range(3)]
    kernels += [Event("_p_sample_kernel", 150, 155, on_device=True), Event("Memset (Device)", 156, 157, on_device=True)]
    # the profiler repeats annotations on the device's side
    kernels += [Event(CALL, 100, 200, on_device=True, annotation=True)]
    kernels += [Event(name, 90, 200, on_device=True) for name in ("ProfilerStep#1", "Stream Wait Event")]
    host = ["cudaGraphLaunch", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaMemsetAsync", "cudaMemcpyAsync"]
    host += ["cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaStreamIsCapturing", "cudaEventRecord"]
    events = [call(0, 50), *kernels, *(Event(name, i, i + 1) for i, name in enumerate(host))]
    events += [Event("cudaDeviceSynchronize", 60, 90), Event("aten::conv2d", 1, 40)]
    summary = summarise(events, on_device=True)
    assert {key: (total.ns, total.launches) for key, total in summary.totals.items()} == {
        (CONV, "convolution"): (90, 3),
        ("_p_sample_kernel", "fastdiff"): (5, 1),
        ("Memset (Device)", "copy"): (1, 1),
    }
    assert summary.host_launches == 6
    assert summary.synchronisations == 3


@pytest.mark.parametrize(
    ("name", "launch", "wait"),
    [
        ("hipLaunchKernel", 1, 0),
        ("hipExtModuleLaunchKernel", 1, 0),
        ("hipGraphLaunch", 1, 0),
        ("hipMemcpyWithStream", 1, 1),
        ("cuMemcpyDtoH_v2", 1, 1),
        ("cudaStreamWaitEvent", 0, 0),
        ("cudaOccupancyMaxActiveBlocksPerMultiprocessor", 0, 0),
    ],
)
def test_runtime_calls(name, launch, wait):
    summary = summarise([call(0, 10), Event(name, 1, 2)], on_device=True)
    assert (summary.host_launches, summary.synchronisations) == (launch, wait)


def test_no_call_among_the_events():
    with pytest.raises(ValueError, match="must hold a range named"):
        summarise([Event("aten::add", 0, 1)], on_device=False)
