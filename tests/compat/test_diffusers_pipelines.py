"""Accelerated, diffusers' own pipelines draw the same images from the same seed, and stay what they were otherwise."""

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines as tiny  # noqa: E402

from fastdiff.compat.diffusers import FastDDIMScheduler, accelerate  # noqa: E402
from fastdiff.compat.diffusers.pipeline import restore  # noqa: E402

SCHEDULERS = [
    "DDPM",
    "DDIM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "UniPCMultistep",
    "DEISMultistep",
    "LCM",
    "PNDM",
    "LMSDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "TCD",
]
FEW = ["DDIM", "EulerAncestralDiscrete", "DPMSolverMultistep", "PNDM"]
# 8-bit levels. The promise is 1; float32 rounding through the steps and the decoder is 5e-4 at most in these tests.
LEVELS = 0.005


def scheduler(name: str) -> Any:
    options = {"skip_prk_steps": True} if name == "PNDM" else {}  # as Stable Diffusion is shipped
    return getattr(diffusers, f"{name}Scheduler").from_config(tiny.scheduler_config(), **options)


def photograph(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, **options: Any) -> np.ndarray:
    """Images float32 [N, H, W, C] in [0, 1] after four steps from seed 0."""
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 4, **options}
    if "text_encoder" in pipe.components:
        options = {"prompt": "abc dog", **options}
    return pipe(output_type="np", **options).images


def assert_same_images(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    # neither constant nor clipped away
    assert expected.std() > 0.1
    assert ((expected > 0) & (expected < 1)).mean() > 0.5
    assert np.abs(actual - expected).max() * 255 <= LEVELS


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny.stable_diffusion(tmp_path)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_draws_the_same_images(pipe: Any, name: str) -> None:
    pipe.scheduler = scheduler(name)
    options = {"prompt": ["abc", "a dog"], "guidance_scale": 3.0, "num_inference_steps": 5}
    expected = draw(pipe, **options)
    assert accelerate(pipe) is pipe
    assert type(pipe.scheduler).__name__ == f"Fast{name}Scheduler"
    assert_same_images(draw(pipe, **options), expected)


@pytest.mark.parametrize("name", ["DDPM", "EulerDiscrete", "DPMSolverMultistep", "LCM"])
def test_a_callers_own_timesteps(pipe: Any, name: str) -> None:
    pipe.scheduler = scheduler(name)
    timesteps = [999, 759, 499, 259] if name == "LCM" else [900, 500, 300, 20]
    expected = draw(pipe, timesteps=timesteps)
    assert_same_images(draw(accelerate(pipe), timesteps=timesteps), expected)


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_unconditional_pipelines_draw_the_same_images(name: str) -> None:
    pipe = tiny.ddpm()
    if name == "DDIM":
        pipe = tiny.quiet(diffusers.DDIMPipeline(pipe.unet, diffusers.DDIMScheduler()))
    options = {"batch_size": 3, **({"eta": 0.7} if name == "DDIM" else {})}
    expected = draw(pipe, **options)
    assert_same_images(draw(accelerate(pipe), **options), expected)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("task", ["img2img", "inpaint", "inpaint with 9 channels", "xl"])
def test_other_pipelines_draw_the_same_images(task: str, name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if task == "xl":
        pipe = tiny.stable_diffusion_xl(tmp_path)
    else:
        pipe = tiny.stable_diffusion(tmp_path, in_channels=9 if "9" in task else 4)
        kind = diffusers.StableDiffusionImg2ImgPipeline
        options = {"image": photograph(), "strength": 0.8, "num_inference_steps": 5}
        if "inpaint" in task:
            kind = diffusers.StableDiffusionInpaintPipeline
            mask = torch.zeros(1, 1, 16, 16)
            mask[..., :9] = 1
            options = {**options, "mask_image": mask, "height": 16, "width": 16}
        pipe = tiny.quiet(kind(**pipe.components, requires_safety_checker=False))
    pipe.scheduler = scheduler(name)
    expected = draw(pipe, **options)
    assert_same_images(draw(accelerate(pipe), **options), expected)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(
    "options",
    [
        {"num_images_per_prompt": 2},
        {"prompt": ["abc", "a dog"], "generator": [3, 4]},
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0, "guidance_rescale": 0.7},
    ],
    ids=["num_images_per_prompt", "generator list", "unguided", "rescaled guidance"],
)
def test_options_of_a_call(pipe: Any, name: str, options: dict[str, Any]) -> None:
    pipe.scheduler = scheduler(name)

    def images() -> np.ndarray:
        generators = {}
        if "generator" in options:
            generators = {"generator": [torch.Generator().manual_seed(seed) for seed in options["generator"]]}
        return draw(pipe, **{**options, **generators})

    expected = images()
    accelerate(pipe)
    assert_same_images(images(), expected)


@pytest.mark.parametrize("name", FEW)
def test_callbacks_see_and_change_the_latents(pipe: Any, name: str) -> None:
    def run() -> tuple[np.ndarray, list[tuple[int, float, torch.Tensor]]]:
        seen = []

        def callback(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append((step, float(timestep), tensors["latents"].clone()))
            return {"latents": tensors["latents"] * 0.9} if step == 1 else {}

        return draw(pipe, callback_on_step_end=callback), seen

    pipe.scheduler = scheduler(name)
    expected, expected_steps = run()
    accelerate(pipe)
    actual, steps = run()
    assert_same_images(actual, expected)
    assert [step[:2] for step in steps] == [step[:2] for step in expected_steps]
    assert len(steps) == (5 if name == "PNDM" else 4)  # its first step is two
    for (_, _, ours), (_, _, theirs) in zip(steps, expected_steps):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_a_saved_pipeline_names_diffusers_own_scheduler(pipe: Any, tmp_path: Path) -> None:
    expected = draw(accelerate(pipe))
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert "fastdiff" not in (tmp_path / "saved" / "model_index.json").read_text()
    loaded = tiny.quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved"))
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    assert dict(loaded.scheduler.config).items() >= tiny.scheduler_config().items()
    assert_same_images(draw(loaded), expected)
    assert_same_images(draw(accelerate(loaded)), expected)


def test_a_scheduler_put_in_by_hand_is_saved_under_its_own_name(pipe: Any, tmp_path: Path) -> None:
    pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(loaded.scheduler) is FastDDIMScheduler
    # loaded without fastdiff from here on
    accelerate(loaded).save_pretrained(tmp_path / "again")
    assert "fastdiff" not in (tmp_path / "again" / "model_index.json").read_text()


def test_restore_gives_back_the_pipeline(pipe: Any) -> None:
    expected, names = draw(pipe), set(vars(pipe.unet))
    accelerate(pipe, compile="repeated_blocks", cuda_graph=True)
    assert set(vars(pipe.unet)) - names == {"forward"}
    assert restore(pipe) is pipe
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert pipe.config["scheduler"] == ("diffusers", "DDIMScheduler")
    assert not any("forward" in vars(module) for module in pipe.unet.modules())
    assert pipe.unet.conv_in.weight.is_contiguous()
    # the same operations on the same numbers
    assert np.array_equal(draw(pipe), expected)


def test_the_last_call_decides_and_calls_do_not_pile_up(pipe: Any) -> None:
    accelerate(pipe, compile=True, cuda_graph=True)
    scheduler, forward = pipe.scheduler, pipe.unet.forward
    accelerate(pipe, compile=True, cuda_graph=True)
    assert pipe.scheduler is scheduler
    assert pipe.unet.forward.original == forward.original == type(pipe.unet).forward.__get__(pipe.unet)
    accelerate(pipe, channels_last=False)
    assert "forward" not in vars(pipe.unet)
    assert pipe.unet.conv_in.weight.is_contiguous()


def test_the_unet_stays_the_same_object(pipe: Any, tmp_path: Path) -> None:
    unet, config = pipe.unet, dict(pipe.unet.config)
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    accelerate(pipe, cuda_graph=True)
    assert pipe.unet is unet
    assert dict(unet.config) == config
    assert unet.dtype == torch.float32
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert {name: value.tolist() for name, value in unet.state_dict().items()} == {
        name: value.tolist() for name, value in weights.items()
    }
    unet.save_pretrained(tmp_path / "unet")
    loaded = type(unet).from_pretrained(tmp_path / "unet")
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    # without a CUDA device nothing is captured
    assert draw(pipe).std() > 0.1


def test_a_1x1_conv_decides_its_layout_and_gives_it_back(pipe: Any) -> None:
    block = next(module for module in pipe.unet.modules() if type(module).__name__ == "Transformer2DModel")
    before = {name: weight.stride() for name, weight in pipe.unet.named_parameters()}
    accelerate(pipe)
    channels = block.proj_out.in_channels
    assert block.proj_out.weight.stride() == (channels, 1, channels, channels)
    restore(pipe)
    assert {name: weight.stride() for name, weight in pipe.unet.named_parameters()} == before


def test_dtype_is_that_of_all_models(pipe: Any) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = draw(pipe, latents=latents.float())
    accelerate(pipe, dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    actual = draw(pipe, latents=latents)
    # Eight bits of mantissa through four steps: 0.028 at most over three starts. Other noise would make it 1.
    assert 0 < np.abs(actual - expected).mean() < 0.1 * expected.std()


def test_step_noise_from_a_seed_does_not_know_the_batch(pipe: Any) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"eta": 1.0, "generator": None}
    accelerate(pipe, noise_seed=7)
    both = draw(pipe, latents=latents, prompt=["abc", "a dog"], **options)
    first = draw(pipe, latents=latents[:1], prompt="abc", **options)
    assert_same_images(both[:1], first)
    other = draw(accelerate(pipe, noise_seed=8), latents=latents[:1], prompt="abc", **options)
    assert np.abs(other - first).mean() > 0.01


@pytest.mark.parametrize("compile", [True, "repeated_blocks"])
def test_without_a_compiler_it_runs_eagerly_with_one_warning(
    pipe: Any, compile: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no working C++ compiler found")

        return call

    expected = draw(pipe)
    monkeypatch.setattr(torch, "compile", broken)
    accelerate(pipe, compile=compile)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = draw(pipe)
    assert_same_images(actual, expected)
    assert [str(one.message) for one in caught if "torch.compile failed" in str(one.message)] == [
        "torch.compile failed, so the model runs uncompiled: RuntimeError: no working C++ compiler found"
    ]


@pytest.mark.parametrize("compile", [True, "repeated_blocks"])
def test_compiled_it_draws_the_same_images(pipe: Any, compile: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    # traced by torch.compile, but not translated: Inductor's minute would say nothing about this package
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    expected = draw(pipe)
    accelerate(pipe, compile=compile)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile failed")
        assert_same_images(draw(pipe), expected)
    replaced = [type(module).__name__ for module in pipe.unet.modules() if "forward" in vars(module)]
    assert replaced == (["UNet2DConditionModel"] if compile is True else ["BasicTransformerBlock"] * 4)
    # once for all steps; the four blocks share what is compiled for each of the two layouts their inputs have
    assert len(graphs) < (2 if compile is True else 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_captured_graphs_draw_the_same_images(pipe: Any, compile: bool) -> None:
    pipe.to("cuda")
    expected = draw(pipe)
    accelerate(pipe, cuda_graph=True, compile=compile)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the step cannot be captured")
        first, second = draw(pipe), draw(pipe, prompt="a cat")
    assert_same_images(first, expected)
    assert np.abs(second - first).mean() > 0.01
    # a graph reads the weights where they are, also after they have moved
    with torch.no_grad():
        pipe.unet.conv_out.weight.zero_()
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.data.clone()
    assert np.abs(draw(pipe) - first).mean() > 0.01


def test_bad_input_is_named_and_changes_nothing(pipe: Any) -> None:
    pipe.scheduler = diffusers.SASolverScheduler.from_config(tiny.scheduler_config())
    with pytest.raises(ValueError, match=r"SASolverScheduler has no fused counterpart.*DDIM.*scheduler=False"):
        accelerate(pipe)
    assert type(pipe.scheduler) is diffusers.SASolverScheduler
    assert pipe.unet.conv_in.weight.is_contiguous()
    with pytest.raises(ValueError, match="noise_seed needs a fused scheduler, got SASolverScheduler"):
        accelerate(pipe, scheduler=False, noise_seed=1)
    with pytest.raises(ValueError, match=r"compile must be one of True, False, .*'repeated_blocks', got 'blocks'"):
        accelerate(pipe, scheduler=False, compile="blocks")
    with pytest.raises(TypeError, match=r"dtype must be None or a torch\.dtype, got 'float16'"):
        accelerate(pipe, scheduler=False, dtype="float16")
    with pytest.raises(ValueError, match="compile must be True or False for UNet2DModel"):
        accelerate(tiny.ddpm(), compile="repeated_blocks")
    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline, got UNet2DConditionModel"):
        accelerate(pipe.unet)
    pipe.unet = None
    with pytest.raises(ValueError, match=r"pipe must have a U-Net at pipe.unet, got StableDiffusionPipeline"):
        accelerate(pipe, scheduler=False)


def test_a_scheduler_without_counterpart_can_stay(pipe: Any) -> None:
    pipe.scheduler = diffusers.SASolverScheduler.from_config(tiny.scheduler_config())
    expected = draw(pipe)
    accelerate(pipe, scheduler=False)
    assert type(pipe.scheduler) is diffusers.SASolverScheduler
    assert_same_images(draw(pipe), expected)
