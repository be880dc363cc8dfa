"""diffusers' models with fused norms compute what they computed, keep what they hold, and come back as they were."""

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines as tiny  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D  # noqa: E402

from fastdiff.compat.diffusers import accelerate, fused_modules, restore  # noqa: E402
from fastdiff.compat.diffusers.fused_modules import (  # noqa: E402
    ORIGINALS,
    AppliedSiLU,
    FusedGroupNorm,
    FusedGroupNormSiLU,
    FusedResnetBlock2D,
    fuse_norms,
    unfuse_norms,
)
from fastdiff.kernels import dispatch  # noqa: E402

# Both sides round each of a few dozen operations in float32, in another order: 2^-24 each, a random walk over the
# depth, and a division by a group's deviation magnifies what came before by at most a few times. Measured 1e-6.
RELATIVE = 1e-5
BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other width": {"out_channels": 24, "groups_out": 6},
    "scale-shift": {"time_embedding_norm": "scale_shift"},
    "no embedding": {"temb_channels": None},
    "no embedding, as in a VAE": {"temb_channels": None, "time_embedding_norm": "group"},
    "up": {"up": True},
    "down": {"down": True, "time_embedding_norm": "scale_shift", "skip_time_act": True},
    "fir": {"up": True, "kernel": "fir"},
    "sde_vp": {"down": True, "kernel": "sde_vp"},
    "scaled output": {"output_scale_factor": 2**0.5, "dropout": 0.3},
    "wide shortcut": {"conv_2d_out_channels": 40, "conv_shortcut_bias": False},
}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused modules run here as on a GPU, on the kernel's reference."""
    monkeypatch.setattr(fused_modules, "use_triton", lambda tensor: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each call of the fused operation."""
    seen: list[dict[str, Any]] = []
    operation = fused_modules.group_norm_silu

    def spy(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        return operation(x, *args, **kwargs)

    monkeypatch.setattr(fused_modules, "group_norm_silu", spy)
    return seen


def block(**options: Any) -> ResnetBlock2D:
    torch.manual_seed(0)
    made = ResnetBlock2D(**{"in_channels": 16, "temb_channels": 12, "groups": 4, **options})
    return tiny._lively(made).to(memory_format=torch.channels_last)


def unet() -> UNet2DModel:
    return tiny.ddpm().unet


def arguments(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 16, 10, 6, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(batch, 12, generator=generator)


def run(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        result = model(*args, **kwargs)
    return result if isinstance(result, Tensor) else result[0]


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=RELATIVE * float(expected.abs().max()))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_a_block_computes_the_same(options: dict[str, Any], calls: list[dict[str, Any]]) -> None:
    model, (x, embedding) = block(**options), arguments()
    if options.get("temb_channels", 12) is None:
        embedding = None  # type: ignore[assignment]
    expected = run(model, x, embedding)
    fuse_norms(model)
    assert type(model) is FusedResnetBlock2D
    actual = run(model, x, embedding)
    assert_close(actual, expected)
    assert actual.stride() == expected.stride()
    first, second = calls
    assert first["silu"]
    assert second["silu"]
    assert (second["scale"] is not None) == (options.get("time_embedding_norm") == "scale_shift")
    # the bias of the first conv for all samples, or with the embedding for each
    assert second["channel_bias"].dim() == (2 if embedding is not None and second["scale"] is None else 1)


@pytest.mark.usefixtures("fused")
def test_gradients_are_the_same() -> None:
    model, (x, embedding) = block(), arguments()
    gradients = []
    for _ in range(2):
        inputs = [x.clone().requires_grad_(), embedding.clone().requires_grad_()]
        weight = torch.randn(2, 16, 10, 6, generator=torch.Generator().manual_seed(2))
        loss = (model(*inputs) * weight).sum()
        gradients.append(torch.autograd.grad(loss, [*inputs, *model.parameters()]))
        fuse_norms(model)
    assert len(gradients[0]) == 2 + 10
    for actual, expected in zip(gradients[1], gradients[0]):
        # a sum of up to 120 products more than the outputs
        torch.testing.assert_close(actual, expected, rtol=0, atol=10 * RELATIVE * float(expected.abs().max()))


@pytest.mark.usefixtures("fused")
def test_an_embedding_that_is_not_projected_is_added_as_it_is() -> None:
    model, (x, _) = block(temb_channels=None), arguments()
    embedding = torch.randn(2, 16, 10, 6)
    expected = run(model, x, embedding)
    fuse_norms(model)
    assert_close(run(model, x, embedding), expected)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("kind", ["UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"])
def test_a_whole_model_computes_the_same(kind: str, calls: list[dict[str, Any]]) -> None:
    model, inputs = whole(kind)
    expected = run(model, *inputs)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    fuse_norms(model)
    assert {type(norm) for norm in norms} == {FusedGroupNorm, FusedGroupNormSiLU}
    assert_close(run(model, *inputs), expected)
    assert len(calls) == len(norms)
    # the norms of attention have no activation
    assert sum(call["silu"] for call in calls) == len(norms) - attentions(model)


def whole(kind: str) -> tuple[nn.Module, tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(1)
    model: nn.Module
    if kind == "UNet2DModel":
        model, inputs = unet(), (torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 900]))
    elif kind == "UNet2DConditionModel":
        text = torch.randn(2, 5, tiny.WIDTH, generator=generator)
        model, inputs = tiny._unet(4), (torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(500), text)
    else:
        model, inputs = tiny._vae(), (torch.randn(2, 3, 16, 16, generator=generator),)
    assert isinstance(model, (UNet2DModel, UNet2DConditionModel, AutoencoderKL))
    return model.to(memory_format=torch.channels_last), inputs  # type: ignore[call-overload]


def attentions(model: nn.Module) -> int:
    kinds = ("Transformer2DModel", "Attention")
    return sum(type(module).__name__ in kinds and _has_norm(module) for module in model.modules())


def _has_norm(module: nn.Module) -> bool:
    return any(isinstance(child, nn.GroupNorm) for child in module.children())


@pytest.mark.skipif(not dispatch.HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_the_kernel_itself_runs_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=0")
    model, (x, embedding) = block(time_embedding_norm="scale_shift"), arguments()
    expected = run(model, x, embedding)
    fuse_norms(model)
    monkeypatch.setattr(dispatch, "INTERPRET", True)
    assert_close(run(model, x, embedding), expected)


@pytest.mark.usefixtures("fused")
def test_in_other_layouts_a_block_runs_as_before(calls: list[dict[str, Any]]) -> None:
    model, (x, embedding) = block().to(memory_format=torch.contiguous_format), arguments()
    x = x.contiguous()
    expected = run(model, x, embedding)
    fuse_norms(model)
    assert torch.equal(run(model, x, embedding), expected)
    assert calls == []


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_last_norm_and_activation_agree_in_any_layout(channels_last: bool) -> None:
    model = tiny._vae().decoder
    x = torch.randn(2, 4, 1, 1)  # no layout at all
    if channels_last:
        model, x = whole("AutoencoderKL")[0].decoder, torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    expected = run(model, x)
    fuse_norms(model)
    assert_close(run(model, x), expected)


def test_on_a_cpu_nothing_changes_at_all() -> None:
    model, inputs = whole("UNet2DModel")
    expected = run(model, *inputs)
    fuse_norms(model)
    assert torch.equal(run(model, *inputs), expected)


@pytest.mark.usefixtures("fused")
def test_the_way_back_is_exact() -> None:
    model, inputs = whole("UNet2DConditionModel")
    before, expected = classes(model), run(model, *inputs)
    state = {name: vars(module).copy() for name, module in model.named_modules()}
    keys, weights = list(model.state_dict()), [id(weight) for weight in model.parameters()]
    fuse_norms(model)
    assert classes(model) != before
    assert list(model.state_dict()) == keys
    assert [id(weight) for weight in model.parameters()] == weights
    fuse_norms(model)
    unfuse_norms(model)
    assert classes(model) == before
    assert {name: vars(module) for name, module in model.named_modules()} == state
    assert torch.equal(run(model, *inputs), expected)


@pytest.mark.usefixtures("fused")
def test_a_copy_is_fused_and_comes_back_alone() -> None:
    model, inputs = whole("UNet2DModel")
    before = classes(model)
    fuse_norms(model)
    twin = copy.deepcopy(model)
    assert classes(twin) == classes(model)
    assert torch.equal(run(twin, *inputs), run(model, *inputs))
    unfuse_norms(twin)
    assert classes(twin) == before
    assert classes(model) != before


@pytest.mark.usefixtures("fused")
def test_an_adapter_around_the_conv_is_called(calls: list[dict[str, Any]]) -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Conv2d) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    model, (x, embedding) = block(), arguments()
    fuse_norms(model)
    model.conv1 = Adapted(model.conv1)
    fused = run(model, x, embedding)
    # the embedding alone: the bias is in the adapted conv's output
    assert torch.equal(calls[1]["channel_bias"], model.time_emb_proj(torch.nn.functional.silu(embedding)))
    unfuse_norms(model)
    assert_close(fused, run(model, x, embedding))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("name", ["norm1", "norm2", "nonlinearity"])
@pytest.mark.parametrize("hook", ["forward", "pre", "own forward"])
def test_a_hooked_norm_or_activation_leaves_its_block_alone(name: str, hook: str) -> None:
    model = block()
    module = getattr(model, name)
    if hook == "own forward":
        module.forward = type(module).forward.__get__(module)
    else:
        register = module.register_forward_hook if hook == "forward" else module.register_forward_pre_hook
        register(lambda *args: None)
    fuse_norms(model)
    assert type(model) is ResnetBlock2D
    assert type(module) not in ORIGINALS


@pytest.mark.usefixtures("fused")
def test_a_hook_on_the_conv_is_called() -> None:
    model, (x, embedding) = block(), arguments()
    expected = run(model, x, embedding)
    fuse_norms(model)
    shapes = []
    model.conv1.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    assert_close(run(model, x, embedding), expected)
    assert shapes == [(2, 16, 10, 6)]


@pytest.mark.usefixtures("fused")
def test_modules_that_hold_on_to_the_old_method_stay_right() -> None:
    # as a library does that moves weights in before a forward and out after it
    model, inputs = whole("UNet2DModel")
    expected = run(model, *inputs)
    fuse_norms(model)
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, ResnetBlock2D)):
            module.forward = module.forward
    assert_close(run(model, *inputs), expected)
    unfuse_norms(model)
    assert torch.equal(run(model, *inputs), expected)


@pytest.mark.usefixtures("fused")
def test_weights_that_come_only_for_a_modules_forward_are_there_in_time() -> None:
    offloading = pytest.importorskip("accelerate")
    model, inputs = whole("UNet2DModel")
    expected = run(model, *inputs)
    fuse_norms(model)
    offloading.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert_close(run(model, *inputs), expected)


@pytest.mark.parametrize("activation", ["mish", "gelu", "relu"])
def test_other_activations_stay(activation: str) -> None:
    model = block(non_linearity=activation)
    fuse_norms(model)
    assert type(model) is ResnetBlock2D
    assert type(model.norm1) is FusedGroupNorm


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("norm", ["ada_group", "spatial"])
def test_conditional_norms_stay(norm: str) -> None:
    torch.manual_seed(0)
    # SpatialNorm has 32 groups
    model = ResnetBlockCondNorm2D(in_channels=32, temb_channels=12, groups=4, time_embedding_norm=norm).eval()
    embedding = torch.randn(2, 12) if norm == "ada_group" else torch.randn(2, 12, 4, 4)
    x = torch.randn(2, 32, 8, 8)
    expected = run(model, x, embedding)
    fuse_norms(model)
    assert type(model) is ResnetBlockCondNorm2D
    assert_close(run(model, x, embedding), expected)


def test_subclasses_and_norms_without_weights_stay() -> None:
    class Own(ResnetBlock2D):
        pass

    model = nn.ModuleList([Own(in_channels=8, temb_channels=None, groups=2), nn.GroupNorm(2, 8, affine=False)])
    fuse_norms(model)
    assert type(model[0]) is Own
    assert type(model[1]) is nn.GroupNorm


@pytest.mark.usefixtures("fused")
def test_gradient_checkpointing_goes_on_working() -> None:
    model, inputs = whole("UNet2DModel")
    gradients = []
    for checkpointing in (False, True):
        fuse_norms(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        loss = model(*inputs)[0].square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in gradients[0])
    assert all(torch.equal(actual, expected) for actual, expected in zip(*gradients))


@pytest.mark.usefixtures("fused")
def test_it_compiles_into_one_graph() -> None:
    model, inputs = whole("UNet2DConditionModel")
    expected = run(model, *inputs)
    fuse_norms(model)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    assert_close(run(compiled, *inputs), expected)
    assert len(graphs) == 1


@pytest.mark.usefixtures("fused")
def test_accelerate_fuses_the_unet_and_the_vae_and_restore_does_not_leave_a_trace(tmp_path: Any) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    before = [classes(model) for model in (pipe.unet, pipe.vae)]
    options = {"prompt": "abc dog", "num_inference_steps": 2, "output_type": "np"}

    def draw() -> Tensor:
        return torch.from_numpy(pipe(**options, generator=torch.Generator().manual_seed(0)).images)

    expected = draw()
    accelerate(pipe)
    assert type(pipe.unet.conv_norm_out) is FusedGroupNormSiLU
    assert type(pipe.vae.decoder.conv_act) is AppliedSiLU
    # 8-bit levels: the promise is 1
    assert float((draw() - expected).abs().max()) * 255 < 0.005
    pipe.unet.save_pretrained(tmp_path / "unet")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert list(loaded.state_dict()) == list(pipe.unet.state_dict())
    accelerate(pipe, fused_norm=False)
    assert [classes(model) for model in (pipe.unet, pipe.vae)] == before
    accelerate(pipe)
    restore(pipe)
    assert [classes(model) for model in (pipe.unet, pipe.vae)] == before
    assert torch.equal(draw(), expected)
