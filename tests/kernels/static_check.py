"""Compiles every kernel for GPUs that are not there and prints what the binaries cost, as JSON.

Run by test_static.py with TRITON_INTERPRET=0. Each case calls a launcher on CPU tensors; the kernel is replaced by a
recorder, and the recorded arguments give the signature and the specialisation that a launch on a GPU would derive.
"""

import importlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from group_norm_launch import GROUP_NORM_KERNELS, launch_group_norm

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHAPE = (2, 3, 64, 64)
CHANNELS_LAST = torch.channels_last
CONTIGUOUS = torch.contiguous_format


@dataclass(frozen=True, kw_only=True)
class Case:
    """A launch and what its sm_90 binary may cost.

    Attributes:
        module, kernel: the kernel function and the fastdiff.kernels module it lives in.
        launch: calls the launcher.
        instructions: most SASS instructions per element, over the whole listing.
        bytes_per_element: what is read and written per element, scalars aside; None where it is not a budget.
        vectorised: every access is 16 bytes wide for 4-byte types and 8 or more for 2-byte types.
        shared: the kernel may use shared memory.
        targets: what it is compiled for.
    """

    module: str
    kernel: str
    launch: Callable[[], object]
    instructions: float
    bytes_per_element: int | None = None
    vectorised: bool = True
    shared: bool = False
    targets: tuple[str, ...] = ("sm_90",)


def _like(dtype: torch.dtype, memory_format: torch.memory_format, channels: int = 3) -> torch.Tensor:
    return torch.empty(SHAPE[0], channels, *SHAPE[2:], dtype=dtype).contiguous(memory_format=memory_format)


def launch_p_sample(
    *,
    state: torch.dtype = torch.float32,
    model: torch.dtype | None = torch.float32,
    memory_format: torch.memory_format = CHANNELS_LAST,
    guided: bool = False,
    n_slots: int = 0,
    noise: str | None = "kernel",
    learned: bool = False,
    mask: bool = False,
    strided: bool = False,
) -> None:
    from fastdiff.kernels.device_table import HISTORY_OFFSET
    from fastdiff.kernels.p_sample import _p_sample_op

    batch = SHAPE[0]

    def like(dtype: torch.dtype, channels: int = 3) -> torch.Tensor:
        value = _like(dtype, memory_format, channels)
        return torch.empty(*value.shape, 2, dtype=dtype)[..., 0] if strided else value

    model_output = None if model is None else like(model, 6 if learned else 3)
    history = None
    if n_slots:
        history = torch.stack([like(torch.float32).permute(0, 2, 3, 1)] * n_slots).permute(0, 1, 4, 2, 3)
    in_kernel = noise == "kernel"
    next_input = like(state if model is None else model)
    _p_sample_op(
        like(state),
        model_output,
        torch.empty(50, HISTORY_OFFSET + n_slots),
        torch.empty(50, 3, dtype=torch.int32),
        torch.empty(batch, dtype=torch.int32),
        model_output if guided else None,
        history,
        like(torch.float32) if noise == "given" else None,
        torch.empty(batch, dtype=torch.int64) if in_kernel else None,
        torch.empty(batch, dtype=torch.int64) if in_kernel else None,
        None,
        None,
        None,
        torch.empty(1, 1, *SHAPE[2:]).expand(SHAPE) if mask else None,
        like(torch.float32) if mask else None,
        torch.cat([next_input] * 2) if guided else next_input,
        None,
    )


def launch_normal(memory_format: torch.memory_format) -> None:
    from fastdiff.kernels.philox import _normal_op

    per_sample = torch.empty(SHAPE[0], dtype=torch.int64)
    _normal_op(per_sample, per_sample, per_sample, 1, list(SHAPE), memory_format == CHANNELS_LAST)


def launch_q_sample(
    pixels: torch.dtype,
    out: torch.dtype,
    memory_format: torch.memory_format = CHANNELS_LAST,
    *,
    pixels_format: torch.memory_format | None = None,
    noise: str = "kernel",
) -> None:
    from fastdiff.kernels.q_sample import _q_sample_op

    per_sample = torch.empty(SHAPE[0], dtype=torch.int64)
    x_start = _like(pixels, pixels_format or memory_format)
    given = _like(out, memory_format) if noise == "given" else None
    keys = [None] * 3 if noise == "given" else [per_sample] * 3
    _q_sample_op(x_start, per_sample, torch.empty(1000, 4), given, *keys, out, memory_format == CHANNELS_LAST)


def launch_mse(
    dtype: torch.dtype,
    memory_format: torch.memory_format = CHANNELS_LAST,
    *,
    pixels: torch.dtype = torch.float32,
    target: str = "epsilon",
) -> None:
    from fastdiff.kernels.mse import _mse_op

    per_sample = torch.empty(SHAPE[0], dtype=torch.int64)
    model_output, x_start = _like(dtype, memory_format), _like(pixels, memory_format)
    table, weight, one = torch.empty(1000, 4), torch.empty(SHAPE[0]), torch.empty(1)
    _mse_op(model_output, x_start, per_sample, table, target, weight, None, *[per_sample] * 3, one)


def launch_solver_step(
    dtype: torch.dtype, memory_format: torch.memory_format = CHANNELS_LAST, *, n_history: int = 0, noise: bool = False
) -> None:
    from fastdiff.kernels import solver_step
    from fastdiff.kernels.device_table import HISTORY_OFFSET

    solver_step.use_triton = lambda tensor: True  # its op branches on the device by itself
    value = _like(dtype, memory_format)
    floats, row = torch.empty(50, HISTORY_OFFSET + n_history), torch.empty(1, dtype=torch.int64)
    given = value if noise else None
    solver_step._run(value, value, floats, row, [value] * n_history, given, None, n_history > 0, False, dtype)


def launch_dropout(dtype: torch.dtype, memory_format: torch.memory_format = CHANNELS_LAST) -> None:
    from fastdiff.kernels.dropout import _dropout_op

    _dropout_op(_like(dtype, memory_format), 0.1, torch.empty(SHAPE[0], 3, dtype=torch.int64), 5)


def launch_uniform() -> None:
    from fastdiff.kernels.uniform import _uniform_words_op

    _uniform_words_op(*[torch.empty(1024, dtype=torch.int64)] * 3, 3)


def _group_norm(
    instructions: float,
    bytes_per_element: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kernel: str = "_group_norm_kernel",
    *,
    everything: bool = False,
    targets: tuple[str, ...] = ("sm_90",),
) -> Case:
    module = "group_norm_backward" if "backward" in kernel else "group_norm"
    return Case(
        module=module,
        kernel=kernel,
        launch=lambda: launch_group_norm(module, kernel, shape, dtype, everything=everything),
        instructions=instructions,
        bytes_per_element=bytes_per_element,
        shared=True,
        targets=targets,
    )


def _p_sample(instructions: float, bytes_per_element: int | None = None, **options) -> Case:
    own = {name: options.pop(name) for name in ("targets", "vectorised", "shared") if name in options}
    return Case(
        module="p_sample",
        kernel="_p_sample_kernel",
        launch=lambda: launch_p_sample(**options),
        instructions=instructions,
        bytes_per_element=bytes_per_element,
        **own,
    )


def _other(name: str, instructions: float, bytes_per_element: int, launch: Callable[[], object], **options) -> Case:
    return Case(
        module={"normal": "philox"}.get(name, name),
        kernel=f"_{name}_kernel",
        launch=launch,
        instructions=instructions,
        bytes_per_element=bytes_per_element,
        **options,
    )


fp32, bf16, fp16, uint8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8

# Instructions: as measured plus a tenth, at most the budget of the design (90; 110 guided with history, 25 without
# noise, 180 with one Philox call a lane). Bytes: the state is read and written, all else accessed once.
CASES = {
    "p_sample": _p_sample(80, 16),
    "p_sample bf16 model": _p_sample(80, 12, model=bf16),
    "p_sample guided, history": _p_sample(98, 32, guided=True, n_slots=1),
    "p_sample guided bf16 model, history": _p_sample(100, 24, guided=True, n_slots=1, model=bf16, targets=TARGETS),
    "p_sample without noise": _p_sample(25, 16, noise=None),
    "p_sample without noise, bf16 model": _p_sample(26, 12, noise=None, model=bf16),
    "p_sample noise given": _p_sample(32, 20, noise="given"),
    "p_sample fp16, noise given": _p_sample(34, 12, noise="given", state=fp16, model=fp16),
    "p_sample start row": _p_sample(74, 12, model=None),
    "p_sample learned variance": _p_sample(103, 20, learned=True, vectorised=False),
    "p_sample broadcast mask": _p_sample(106, 24, mask=True, vectorised=False),
    # Triton 3.6 turns the lanes of this one's noise through 2 kB of shared memory, 3.9 does not
    "p_sample contiguous": _p_sample(168, 16, memory_format=CONTIGUOUS, vectorised=False, shared=True),
    "p_sample contiguous without noise": _p_sample(25, 16, memory_format=CONTIGUOUS, noise=None),
    "p_sample strided": _p_sample(180, 16, memory_format=CONTIGUOUS, strided=True, vectorised=False, targets=TARGETS),
    "normal": _other("normal", 50, 4, lambda: launch_normal(CHANNELS_LAST), targets=TARGETS),
    "normal contiguous": _other("normal", 172, 4, lambda: launch_normal(CONTIGUOUS), vectorised=False),
    "q_sample": _other("q_sample", 55, 8, lambda: launch_q_sample(fp32, fp32), targets=TARGETS),
    "q_sample bf16": _other("q_sample", 58, 4, lambda: launch_q_sample(bf16, bf16)),
    "q_sample uint8": _other("q_sample", 60, 3, lambda: launch_q_sample(uint8, bf16)),
    "q_sample contiguous": _other(
        "q_sample", 147, 8, lambda: launch_q_sample(fp32, fp32, CONTIGUOUS), vectorised=False
    ),
    "q_sample contiguous uint8 to channels-last": _other(
        "q_sample", 105, 3, lambda: launch_q_sample(uint8, bf16, pixels_format=CONTIGUOUS), vectorised=False
    ),
    "q_sample noise given": _other("q_sample", 12, 12, lambda: launch_q_sample(fp32, fp32, noise="given")),
    "q_sample bf16, noise given": _other("q_sample", 15, 6, lambda: launch_q_sample(bf16, bf16, noise="given")),
    "solver_step": _other("solver_step", 25, 12, lambda: launch_solver_step(fp32), targets=TARGETS),
    "solver_step fp16, noise, history": _other(
        "solver_step", 48, 14, lambda: launch_solver_step(fp16, n_history=2, noise=True), targets=TARGETS
    ),
    "mse": _other("mse", 62, 8, lambda: launch_mse(fp32), shared=True, targets=TARGETS),
    "mse bf16": _other("mse", 64, 4, lambda: launch_mse(bf16), shared=True),
    "mse bf16, v_prediction, uint8": _other(
        "mse", 70, 5, lambda: launch_mse(bf16, pixels=uint8, target="v_prediction"), shared=True, targets=TARGETS
    ),
    "mse contiguous": _other("mse", 160, 8, lambda: launch_mse(fp32, CONTIGUOUS), shared=True, vectorised=False),
    "dropout": _other("dropout", 23, 8, lambda: launch_dropout(fp32), targets=TARGETS),
    "dropout bf16": _other("dropout", 25, 4, lambda: launch_dropout(bf16), targets=TARGETS),
    "dropout contiguous": _other("dropout", 68, 8, lambda: launch_dropout(fp32, CONTIGUOUS), vectorised=False),
    # three int64 read, four written
    "uniform": _other("uniform", 123, 56, launch_uniform, targets=TARGETS),
}


# One pass reads and writes a plane once, 8 or 4 bytes an element, backward 12 or 6; two passes together 12 or 6 and 20
# or 10. Shared memory holds sums on their way between warps. What a loop runs several times is listed once.
CIFAR, SMALL, BATCH_1 = (256, 128, 32, 32), (256, 256, 16, 16), (1, 128, 32, 32)
LATENT, LATENT_64, LATENT_SMALL, LARGE = (2, 320, 64, 64), (64, 320, 64, 64), (16, 1280, 8, 8), (256, 128, 64, 64)
MOMENTS, NORMALISE = GROUP_NORM_KERNELS["group_norm"][1:]
BACKWARD, SUMS, DX = GROUP_NORM_KERNELS["group_norm_backward"]
CASES |= {
    "group_norm 128 at 32": _group_norm(20, 8, CIFAR, fp32),
    "group_norm 128 at 32, bf16": _group_norm(20, 4, CIFAR, bf16, targets=TARGETS),
    "group_norm 128 at 32, bf16, everything": _group_norm(23, 4, CIFAR, bf16, everything=True),
    "group_norm 128 at 32, bf16, batch 1": _group_norm(22, 4, BATCH_1, bf16),
    "group_norm 256 at 16, bf16": _group_norm(19, 4, SMALL, bf16),
    "group_norm 1280 at 8, everything": _group_norm(27, 8, LATENT_SMALL, fp32, everything=True, targets=TARGETS),
    "group_norm 1280 at 8, bf16": _group_norm(25, 4, LATENT_SMALL, bf16),
    "group_norm 128 at 64": _group_norm(20, 8, LARGE, fp32),
    "moments 320 at 64": _group_norm(33, 4, LATENT, fp32, MOMENTS),
    "moments 320 at 64, bf16, everything": _group_norm(37, 2, LATENT, bf16, MOMENTS, everything=True, targets=TARGETS),
    "moments 128 at 64, bf16": _group_norm(24, 2, LARGE, bf16, MOMENTS),
    "normalise 320 at 64": _group_norm(26, 8, LATENT, fp32, NORMALISE),
    "normalise 320 at 64, bf16, everything": _group_norm(
        31, 4, LATENT, bf16, NORMALISE, everything=True, targets=TARGETS
    ),
    "normalise 128 at 64, bf16": _group_norm(23, 4, LARGE, bf16, NORMALISE),
    "backward 128 at 32": _group_norm(34, 12, CIFAR, fp32, BACKWARD),
    "backward 128 at 32, bf16, everything": _group_norm(53, 6, CIFAR, bf16, BACKWARD, everything=True, targets=TARGETS),
    "backward 256 at 16, bf16": _group_norm(39, 6, SMALL, bf16, BACKWARD),
    "backward 1280 at 8, bf16, everything": _group_norm(55, 6, LATENT_SMALL, bf16, BACKWARD, everything=True),
    "backward sums 320 at 64, bf16, everything": _group_norm(
        75, 4, LATENT, bf16, SUMS, everything=True, targets=TARGETS
    ),
    "backward sums 128 at 64": _group_norm(38, 8, LARGE, fp32, SUMS),
    "backward dx 320 at 64, bf16, everything": _group_norm(
        81, 6, LATENT_64, bf16, DX, everything=True, targets=TARGETS
    ),
    "backward dx 128 at 64": _group_norm(44, 12, LARGE, fp32, DX),
}


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.arguments: dict = {}
        self.options: dict = {}

    def __getitem__(self, grid):
        return self.record

    def record(self, *arguments, **keywords) -> None:
        names = self.kernel.arg_names
        self.arguments = dict(zip(names, arguments)) | {k: v for k, v in keywords.items() if k in names}
        self.options = {name: value for name, value in keywords.items() if name not in names}


def specialise(kernel, arguments: dict) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) as Triton's launcher derives them from the values of the arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name] = "fp32"
            aligned = False
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def read_sass(cubin: bytes, bin_directory: Path) -> tuple[dict[str, int], Counter]:
    """Resources (REG, STACK, SHARED, LOCAL) and the count of each instruction of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def cuobjdump(option: str) -> str:
            command = [bin_directory / "cuobjdump", option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        resources = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", cuobjdump("-res-usage"))}
        listing = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", cuobjdump("-sass"), re.M)
    return resources, Counter(name for name in listing if name != "NOP")


def access_sizes(ttgir: str, tile: str = r"\d+") -> list[int]:
    """Bytes per element of each load and store of global memory that is a tile wide; any vector by default."""
    widths = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i8": 1}
    accesses = re.findall(rf"tt\.(?:load|store) .*tensor<{tile}x!tt\.ptr<(\w+)>", ttgir)
    return [widths[element] for element in accesses]


def measure(case: Case, target_name: str) -> dict:
    """Compile one case for one target and read its costs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"fastdiff.kernels.{case.module}")
    kernel = getattr(module, case.kernel)
    recorder = Recorder(kernel)
    setattr(module, case.kernel, recorder)
    try:
        case.launch()
    finally:
        setattr(module, case.kernel, kernel)
    cuda = target_name.startswith("sm_")
    target = GPUTarget("cuda", int(target_name[3:]), 32) if cuda else GPUTarget("hip", target_name, 64)
    source = ASTSource(kernel, *specialise(kernel, recorder.arguments))
    compiled = triton.compile(source, target=target, options=recorder.options)
    result = {"fp_fusion": recorder.options.get("enable_fp_fusion", True), "shared": compiled.metadata.shared}
    if not cuda:
        spills = re.findall(r"(?:spill_count|private_segment_fixed_size):\s*(\d+)", compiled.asm["amdgcn"])
        return {**result, "spilled": sum(map(int, spills))}
    bin_directory = Path(triton.__file__).parent / "backends/nvidia/bin"
    resources, instructions = read_sass(compiled.asm["cubin"], bin_directory)
    spills = sum(count for name, count in instructions.items() if name.startswith(("LDL", "STL")))
    if "BLOCK_SIZE" in recorder.arguments:
        elements, sizes = recorder.arguments["BLOCK_SIZE"], access_sizes(compiled.asm["ttgir"])
    else:
        rows, lanes = recorder.arguments["ROWS"], recorder.arguments["LANES"]
        elements, sizes = rows * lanes, access_sizes(compiled.asm["ttgir"], f"{rows}x{lanes}")
    elements_per_thread = elements // (recorder.options["num_warps"] * 32)

    def wide(bits: int) -> int:
        return sum(n for name, n in instructions.items() if name.startswith(("LDG", "STG")) and f".{bits}" in name)

    return {
        **result,
        "spilled": spills + resources["STACK"] + resources["LOCAL"],
        "registers": resources["REG"],
        "instructions": instructions.total() / elements_per_thread,
        "bytes_per_element": sum(sizes),
        # 16 bytes a thread for 4-byte types; 8 for 2-byte types, which 16-byte accesses of 8 elements also satisfy
        "wide_expected": sum(math.ceil(elements_per_thread * size / 16) for size in sizes if size == 4),
        "wide": wide(128),
        "half_expected": sum(elements_per_thread * size // 8 for size in sizes if size == 2),
        "half": wide(64) + 2 * (wide(128) - sum(elements_per_thread * size // 16 for size in sizes if size == 4)),
    }


if __name__ == "__main__":
    json.dump({name: {t: measure(case, t) for t in case.targets} for name, case in CASES.items()}, sys.stdout)
