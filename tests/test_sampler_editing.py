"""Editing and conditioning: in-painting, inversion, interpolation, classifier guidance, rescaled guidance, latents."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastdiff import noise, solvers
from fastdiff.interpolation import slerp
from fastdiff.latent import LatentSpace, mask_like
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import run_table

SHAPE = (3, 2, 5, 4)
SCHEDULE = NoiseSchedule.linear()


def smooth_model(x: Tensor, t: Tensor, **_) -> Tensor:
    """A deterministic stand-in for a network: bounded, elementwise, and different at every timestep."""
    return torch.tanh(0.5 * x + 0.001 * t.to(x.dtype).view(-1, *[1] * (x.ndim - 1)))


def make(model=smooth_model, solver="ddim", steps=10, schedule=SCHEDULE, **kwargs) -> Sampler:
    return Sampler(model, schedule, solver=solver, num_inference_steps=steps, **kwargs)


def gaussian_model(schedule: NoiseSchedule):
    """The exact noise of data x0 ~ N(0, 1): x_t is N(0, 1) on a variance-preserving schedule, so eps = sigma * x."""
    sigma = torch.tensor(schedule.sigma, dtype=torch.float32)

    def model(x: Tensor, t: Tensor, **_) -> Tensor:
        return sigma[t.long()].view(-1, *[1] * (x.ndim - 1)) * x

    return model


FLOW_OR_EDM = {"flow_heun": NoiseSchedule.flow(), "edm": NoiseSchedule.edm(), "consistency": NoiseSchedule.edm()}


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 7), SHAPE, (2, 1, 2, 3, 4)], ids=["vector", "1d", "2d", "3d"])
@pytest.mark.parametrize("solver", solvers.names())
def test_every_solver_in_every_trailing_shape_equals_its_table_in_float64(solver, shape):
    schedule = FLOW_OR_EDM.get(solver, SCHEDULE)
    prediction = {"flow_heun": "flow_prediction", "edm": "edm", "consistency": "edm"}.get(solver, "v_prediction")
    clip_sample = None if solver == "pndm" else 1.5  # pndm forms no x0
    options = {"repaint": {"jump_length": 2, "jump_n_sample": 2}}.get(solver, {})
    sampler = make(
        solver=solver,
        steps=7,
        schedule=schedule,
        prediction_type=prediction,
        clip_sample=clip_sample,
        solver_options=options,
    )
    image = torch.linspace(-1, 1, math.prod(shape)).view(shape)
    mask = (image > 0).float()
    painted = {"mask": mask, "known": image} if sampler.table.keeps_known else {}
    start = noise.normal(shape, seed=11, stream="initial")
    # an inversion starts from what it is given, here from the same
    given = {"noise": start} if solver == "ddim_inverse" else {}
    got = sampler.sample(shape, seed=11, **painted, **given)

    def step_noise(stream: int, draw: int) -> Tensor:
        return noise.normal(shape, seed=11, stream={0: "initial", 1: "step"}[stream], draw=draw).double()

    largest = []

    def model(x: Tensor, t: float) -> Tensor:
        largest.append(x.abs().max())
        return smooth_model(x, torch.full((shape[0],), t))

    x = start.double() * sampler.table.init_noise_sigma
    want = run_table(sampler.table, model, x, step_noise, **{name: value.double() for name, value in painted.items()})
    # Coefficients are right to half an ulp and a row rounds a few times, 32 ulp of the largest state for each row;
    # sums of history coefficients h, up to 12 here, magnify that.
    gain = max(1.0, float(abs(sampler.table.h).sum(1).max(initial=0.0)))
    assert (got - want).abs().max() <= 32 * 2**-23 * max(largest) * len(sampler.table) * gain


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "dpmpp_2m", "unipc", "heun"])
def test_simple_inpainting_keeps_what_is_known_and_paints_the_rest(solver):
    known = torch.linspace(-1, 1, math.prod(SHAPE)).view(SHAPE)
    mask = torch.zeros(1, 1, 5, 4)
    mask[..., :2] = 1
    sampler = make(solver=solver)
    painted = sampler.sample(SHAPE, seed=3, mask=mask, known=known)
    assert torch.equal(painted[..., :2], known[..., :2])
    free = sampler.sample(SHAPE, seed=3)
    assert not torch.equal(painted[..., 2:], known[..., 2:])
    # an elementwise model and the noise of the sample: the unknown part is that of a sample without a mask
    assert torch.equal(painted[..., 2:], free[..., 2:])


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_the_known_part_is_at_the_noise_level_of_the_state_before_every_model_call(solver):
    """Over many samples the model sees mean alpha * known and standard deviation sigma where the mask is 1."""
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((int(t[0]), x[:, 0].mean().item(), x[:, 0].std().item()))
        return torch.zeros_like(x)

    shape = (20_000, 1)
    make(model, solver).sample(shape, mask=torch.ones(shape), known=torch.full(shape, 0.8))
    for t, mean, std in seen[1:]:
        # five standard errors of 20,000 normals
        assert abs(mean - SCHEDULE.alpha[t] * 0.8) <= 5 * SCHEDULE.sigma[t] / math.sqrt(shape[0])
        assert abs(std / SCHEDULE.sigma[t] - 1) <= 5 / math.sqrt(2 * shape[0])


def test_repaint_harmonises_and_keeps_the_known_part():
    calls = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return smooth_model(x, t)

    known = torch.linspace(-1, 1, math.prod(SHAPE)).view(SHAPE)
    mask = (known > 0).float()
    sampler = make(model, "repaint", steps=6, solver_options={"jump_length": 2, "jump_n_sample": 3})
    painted = sampler.sample(SHAPE, mask=mask, known=known)
    assert torch.equal(painted[known > 0], known[known > 0])
    # each of the two inner stretches of two steps is walked three times
    assert len(calls) == 6 + 2 * 2 * 2
    assert calls != sorted(calls, reverse=True)


def test_a_finished_table_without_mask_columns_refuses_a_mask():
    sampler = Sampler(smooth_model, SCHEDULE, solver=solvers.build("ddim", SCHEDULE, 4))
    with pytest.raises(ValueError, match="in-painting table"):
        sampler.sample(SHAPE, mask=torch.ones(SHAPE), known=torch.ones(SHAPE))


def test_inversion_and_ddim_give_the_image_back():
    """The round trip's error falls with the steps, like the first-order method it is."""
    schedule = NoiseSchedule.scaled_linear(beta_start=0.00085, beta_end=0.012)
    image = torch.linspace(-1, 1, math.prod(SHAPE)).view(SHAPE)
    errors = []
    for steps in (25, 50, 100, 200):
        noised = make(solver="ddim_inverse", steps=steps, schedule=schedule).sample(SHAPE, init_image=image)
        back = make(steps=steps, schedule=schedule).sample(SHAPE, noise=noised)
        errors.append(float((back - image).abs().max()))
    assert errors[-1] < 0.05
    for coarse, fine in itertools.pairwise(errors):
        assert 1.5 < coarse / fine < 3


def test_an_inverted_image_is_edited_by_another_condition():
    def model(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        """The exact noise of data at the point `shift`."""
        alpha, sigma = (
            torch.tensor(table, dtype=torch.float32)[t.long()].view(-1, 1) for table in (SCHEDULE.alpha, SCHEDULE.sigma)
        )
        return (x - alpha * shift) / sigma

    there, here = torch.full((2, 1), -0.5), torch.full((2, 1), 0.7)
    inverted = make(model, "ddim_inverse", steps=50).sample(
        (2, 3), init_image=there.expand(2, 3), model_kwargs={"shift": there}
    )
    edited = make(model, steps=50).sample((2, 3), noise=inverted, model_kwargs={"shift": here})
    torch.testing.assert_close(edited, here.expand(2, 3), atol=1e-4, rtol=0)


def test_slerp_walks_the_arc():
    a, b = noise.normal((4, 3, 16, 16), seed=0), noise.normal((4, 3, 16, 16), seed=1)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    middle = slerp(a, b, 0.5)
    # noise in, noise out: the length stays between those of the ends, a straight line would lose 30 %
    lengths = torch.stack([value.flatten(1).norm(dim=1) for value in (a, b)])
    assert ((middle.flatten(1).norm(dim=1) / lengths.mean(0) - 1).abs() < 0.02).all()
    weights = torch.tensor([0.0, 0.25, 0.5, 1.0])
    each = torch.cat([slerp(a[i : i + 1], b[i : i + 1], float(weights[i])) for i in range(4)])
    torch.testing.assert_close(slerp(a, b, weights), each, rtol=0, atol=0)
    torch.testing.assert_close(slerp(a, 2 * a, 0.25), 1.25 * a)
    with pytest.raises(ValueError, match="weight"):
        slerp(a, b, torch.zeros(3))
    with pytest.raises(ValueError, match="one shape"):
        slerp(a, b[:2], 0.5)


def test_two_images_are_interpolated_by_way_of_their_noises():
    """Data N(0, 1): the noise of an image is the image itself, so the arc between the noises is that of the images."""
    model = gaussian_model(SCHEDULE)
    images = noise.normal((2, 3, 16, 16), seed=0)
    inverted = make(model, "ddim_inverse", steps=200).sample((2, 3, 16, 16), init_image=images)
    between = slerp(inverted[:1], inverted[1:], 0.3)
    drawn = make(model, steps=200).sample((1, 3, 16, 16), noise=between)
    # both walks are of first order: 200 steps leave a few thousandths of an image
    torch.testing.assert_close(drawn, slerp(images[:1], images[1:], 0.3), atol=0.02, rtol=0)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m"])
def test_classifier_guidance_samples_the_posterior(solver):
    """Data N(0, 1) seen through noise of variance 1/4: the posterior of an observation 2 is N(1.6, 0.2)."""
    variance, observed = 0.25, 2.0
    alpha, sigma = (torch.tensor(table, dtype=torch.float32) for table in (SCHEDULE.alpha, SCHEDULE.sigma))

    def cond_fn(x: Tensor, t: Tensor, **_) -> Tensor:
        a, s = alpha[t.round().long()].view(-1, 1), sigma[t.round().long()].view(-1, 1)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            likelihood = -((observed - a * x) ** 2) / (2 * (s**2 + variance))
            return torch.autograd.grad(likelihood.sum(), x)[0]

    # ddpm shifts the mean by the gradient at the start of a step, its error is four times that of the others
    sampler = make(gaussian_model(SCHEDULE), solver, steps=1000 if solver == "ddpm" else 250)
    draws = sampler.sample((8_000, 1), cond_fn=cond_fn)
    # four standard errors of 8,000 draws are 0.02 and 3 %; the steps of a first-order method add at most as much again
    assert abs(draws.mean().item() - 1.6) < 0.04
    assert abs(draws.std().item() / math.sqrt(0.2) - 1) < 0.06


def test_cond_fn_gets_the_model_kwargs_and_its_result_is_checked():
    seen = []

    def cond_fn(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append((x.shape, x.dtype, t.tolist(), label.tolist()))
        return torch.zeros(1)

    with pytest.raises(ValueError, match="cond_fn must return"):
        make().sample(SHAPE, cond_fn=cond_fn, model_kwargs={"label": torch.arange(3)})
    assert seen == [(torch.Size(SHAPE), torch.float32, [999] * 3, [0, 1, 2])]
    with pytest.raises(ValueError, match="cond_fn"):
        make(schedule=NoiseSchedule.edm(), prediction_type="edm", solver="euler").sample(SHAPE, cond_fn=cond_fn)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_guidance_rescale_equals_a_float64_loop(rescale):
    def model(x: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        return weight.to(x.dtype).view(-1, 1, 1, 1) * smooth_model(x, t)

    kwargs = {"weight": torch.tensor([0.9, 1.1, 0.5])}
    uncond = {"weight": torch.tensor([0.4, 0.8, 0.9])}
    sampler = make(model, steps=5, guidance_scale=4.0, guidance_rescale=rescale)
    got = sampler.sample(SHAPE, seed=4, model_kwargs=kwargs, uncond_kwargs=uncond)
    x = noise.normal(SHAPE, seed=4, stream="initial").double()
    steps = [int(t) for t in sampler.table.timesteps]
    for t, next_alpha, next_sigma in zip(steps, [*SCHEDULE.alpha[steps[1:]], 1.0], [*SCHEDULE.sigma[steps[1:]], 0.0]):
        times = torch.full((3,), t)
        c, u = model(x, times, **kwargs), model(x, times, **uncond)
        guided = u + 4.0 * (c - u)
        ratio = c.flatten(1).std(1) / guided.flatten(1).std(1)
        eps = guided * (rescale * ratio + 1 - rescale).view(-1, 1, 1, 1)
        x = next_alpha * (x - SCHEDULE.sigma[t] * eps) / SCHEDULE.alpha[t] + next_sigma * eps
    # float32 against float64: 2^-24 of states up to 1 / alpha = 160, over five rows
    assert (got - x).abs().max() < 1e-4
    with pytest.raises(ValueError, match="guidance_rescale"):
        make(guidance_rescale=1.5)
    with pytest.raises(ValueError, match=r"guidance_rescale=0\.5 needs a guidance_scale"):
        make(guidance_rescale=0.5)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1)], ids=["constant", "one_value"])
def test_guidance_rescale_leaves_an_output_without_deviation_alone(shape):
    def model(x: Tensor, t: Tensor, level: Tensor) -> Tensor:
        return torch.zeros_like(x) + level.view(-1, *[1] * (x.ndim - 1))

    levels = {"model_kwargs": {"level": torch.tensor([0.1, 0.3])}, "uncond_kwargs": {"level": torch.tensor([0.2, 0.1])}}
    plain, rescaled = (make(model, guidance_scale=2.0, guidance_rescale=rescale) for rescale in (0.0, 0.7))
    assert torch.equal(rescaled.sample(shape, **levels), plain.sample(shape, **levels))


def test_an_inversion_needs_something_to_invert():
    with pytest.raises(ValueError, match="init_image is needed"):
        make(solver="ddim_inverse").sample(SHAPE)


class Halving:
    """A toy autoencoder: latents are 2x2 means, decoding repeats them."""

    config = SimpleNamespace(scaling_factor=0.5, shift_factor=0.1)

    def encode(self, images: Tensor):
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mean))

    def decode(self, latents: Tensor):
        return SimpleNamespace(sample=latents.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_latent_space_scales_and_undoes_it():
    images = noise.normal((2, 3, 4, 6), seed=0).repeat_interleave(2, -1).repeat_interleave(2, -2)
    space = LatentSpace(Halving())
    latents = space.encode(images)
    torch.testing.assert_close(latents, (images[..., ::2, ::2] - 0.1) * 0.5)
    torch.testing.assert_close(space.decode(latents), images)
    assert LatentSpace(Halving(), scaling_factor=2.0).scaling_factor == 2.0
    with pytest.raises(TypeError, match="encode"):
        LatentSpace(object())


def test_sampling_in_latent_space_takes_and_returns_images():
    space = Halving()
    sampler, plain = make(vae=space), make()
    latents = plain.sample((2, 3, 4, 4), seed=5)
    assert torch.equal(sampler.sample((2, 3, 4, 4), seed=5), LatentSpace(space).decode(latents))

    image = noise.normal((2, 3, 8, 8), seed=9)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1  # covers one column of latents and half of another, which is painted
    painted = sampler.sample((2, 3, 4, 4), seed=5, mask=mask, known=image)
    assert torch.allclose(painted[..., :2], space.decode(LatentSpace(space).encode(image) / 0.5 + 0.1).sample[..., :2])
    assert not torch.allclose(painted[..., 2:4], image[..., 2:4], atol=0.1)
    edited = sampler.sample((2, 3, 4, 4), init_image=image, strength=0.1)
    assert (edited - painted).abs().max() > 0


def test_a_latent_mask_keeps_only_what_is_known_as_a_whole():
    mask = torch.ones(1, 1, 8, 8)
    mask[..., 0, 7] = 0
    small = mask_like(mask, (2, 4, 4, 4))
    expected = torch.ones(1, 1, 4, 4)
    expected[..., 0, 3] = 0
    assert torch.equal(small, expected)
    assert mask_like(expected, (2, 4, 4, 4)) is expected


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_latent_masks_have_the_axes_of_the_latents(axes):
    mask = torch.ones(1, 1, *[6] * axes)
    mask[..., 5] = 0
    expected = torch.ones(1, 1, *[3] * axes)
    expected[..., 2] = 0
    assert torch.equal(mask_like(mask, (2, 4, *[3] * axes)), expected)
    with pytest.raises(ValueError, match="mask must have as many axes as the latents"):
        mask_like(mask[0, 0], (2, 4, *[3] * axes))
    with pytest.raises(TypeError, match="init_image must be a tensor, got ndarray"):
        make(vae=Halving()).sample((2, 3, 4, 4), init_image=torch.zeros(2, 3, 8, 8).numpy())


def test_diffusers_autoencoder_as_the_latent_space():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    images = make(vae=vae, steps=3).sample((2, 4, 8, 8), seed=1)
    latents = make(steps=3).sample((2, 4, 8, 8), seed=1)
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images, expected)
    source = noise.normal((2, 3, 16, 16), seed=2).clamp(-1, 1)
    with torch.no_grad():
        code = vae.encode(source).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(LatentSpace(vae).encode(source), code)
    assert make(vae=vae, steps=3).sample((2, 4, 8, 8), init_image=source, strength=0.5).shape == (2, 3, 16, 16)
