"""guided-diffusion's sampling steps against the papers' formulas in float64, plain loops and Bayes' rule."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.compat.guided_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    betas_for_alpha_bar,
    get_named_beta_schedule,
    space_timesteps,
)

N = 12
SHAPE = (2, 3, 5)
BETAS = np.linspace(0.01, 0.4, N)
# x is of the order of 1 and a walk of 12 steps has a few dozen roundings: 1e-15 is the largest difference measured.
TIGHT = {"rtol": 1e-13, "atol": 1e-13}


def diffusion(mean="EPSILON", var="FIXED_SMALL", **settings):
    types = {"model_mean_type": ModelMeanType[mean], "model_var_type": ModelVarType[var], "loss_type": LossType.MSE}
    return GaussianDiffusion(**{"betas": BETAS, **types, **settings})


def network(x, t, scale=1.0):
    """Smooth, depends on the timestep, differs from sample to sample."""
    t = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return scale * (0.7 * torch.tanh(x + 0.1 * t) + 0.3 * x)


def learned(x, t, scale=1.0):
    return torch.cat([network(x, t, scale), 0.9 * torch.sin(3 * x)], dim=1)


def posterior(t, x0, x):
    """q(x_{t-1} | x_t, x_0) by Bayes' rule: the product of two Gaussians in x_{t-1}."""
    alphas_cumprod = np.cumprod(1 - BETAS)
    if t == 0:
        return x0, 0.0
    prior_mean, prior_variance = math.sqrt(alphas_cumprod[t - 1]) * x0, 1 - alphas_cumprod[t - 1]
    precision = 1 / prior_variance + (1 - BETAS[t]) / BETAS[t]
    return (prior_mean / prior_variance + math.sqrt(1 - BETAS[t]) * x / BETAS[t]) / precision, 1 / precision


def predict(mean_type, t, x, output):
    """x_0 from what the model predicts."""
    bar = float(np.cumprod(1 - BETAS)[t])
    if mean_type == "EPSILON":
        return (x - math.sqrt(1 - bar) * output) / math.sqrt(bar)
    if mean_type == "START_X":
        return output
    # the posterior's mean is linear in x_0: solve for it
    at_zero, slope = posterior(t, 0 * x, x)[0], posterior(t, 1.0, 0.0)[0]
    return (output - at_zero) / slope


def variance_of(var_type, t, v):
    small = posterior(max(t, 1), 0.0, 0.0)[1]
    if var_type == "FIXED_SMALL":
        return torch.full_like(v, posterior(t, 0.0, 0.0)[1])
    if var_type == "FIXED_LARGE":
        return torch.full_like(v, BETAS[t] if t > 0 else small)
    if var_type == "LEARNED":
        return v.exp()
    return torch.exp((v + 1) / 2 * math.log(BETAS[t]) + (1 - v) / 2 * math.log(small))


def ancestral_step(x, t, noise, mean_type="EPSILON", var_type="FIXED_SMALL", clip=True, denoised_fn=None, cond_fn=None):
    timesteps = torch.full((len(x),), t)
    output, v = learned(x, timesteps).chunk(2, dim=1)
    x0 = predict(mean_type, t, x, output)
    x0 = x0 if denoised_fn is None else denoised_fn(x0)
    x0 = x0.clamp(-1, 1) if clip else x0
    mean = output if mean_type == "PREVIOUS_X" else posterior(t, x0, x)[0]
    variance = variance_of(var_type, t, v)
    if cond_fn is not None:
        mean = mean + variance * cond_fn(x, timesteps)
    return (mean + variance.sqrt() * noise if t > 0 else mean), x0


def ddim_step(x, t, noise, eta, t_next=None, denoised_fn=None, cond_fn=None):
    """Song et al. 2021, equation 12; with t_next towards noise."""
    bars = np.append(np.cumprod(1 - BETAS), 1.0)  # at index -1 the data
    bar, bar_next = bars[t], bars[t - 1] if t_next is None else t_next
    timesteps = torch.full((len(x),), t)
    x0 = predict("EPSILON", t, x, network(x, timesteps))
    x0 = (x0 if denoised_fn is None else denoised_fn(x0)).clamp(-1, 1)
    eps = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
    if cond_fn is not None:
        eps = eps - math.sqrt(1 - bar) * cond_fn(x, timesteps)
        x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
    variance = eta**2 * (1 - bar_next) / (1 - bar) * (1 - bar / bar_next) if eta else 0.0
    return math.sqrt(bar_next) * x0 + math.sqrt(1 - bar_next - variance) * eps + math.sqrt(variance) * noise, x0


def walk(step, seed=0):
    """The loop over timesteps, with the draws of torch.randn_like."""
    torch.manual_seed(seed)
    x = torch.randn(SHAPE, dtype=torch.float64)
    start = x
    for t in range(N)[::-1]:
        x, _ = step(x, t, torch.randn_like(x))
    return start, x


def gradient(x, t):
    return 0.3 * torch.cos(2 * x) - 0.01 * t.to(x.dtype).view(-1, 1, 1)


def halve(x0):
    return x0 / 2


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "raw"])
@pytest.mark.parametrize("var_type", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("mean_type", ["EPSILON", "START_X", "PREVIOUS_X"])
def test_ancestral_walk(mean_type, var_type, clip):
    start, expected = walk(lambda x, t, z: ancestral_step(x, t, z, mean_type, var_type, clip), seed=1)
    model = learned if var_type.startswith("LEARNED") else network
    torch.manual_seed(1)
    torch.randn(SHAPE, dtype=torch.float64)
    result = diffusion(mean_type, var_type).p_sample_loop(model, SHAPE, noise=start, clip_denoised=clip)
    torch.testing.assert_close(result, expected, **TIGHT)


@pytest.mark.parametrize("var_type", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("denoised_fn", [None, halve], ids=["plain", "denoised_fn"])
@pytest.mark.parametrize("cond_fn", [None, gradient], ids=["plain", "cond_fn"])
def test_conditioned_ancestral_walk(var_type, denoised_fn, cond_fn):
    options = {"denoised_fn": denoised_fn, "cond_fn": cond_fn}
    start, expected = walk(lambda x, t, z: ancestral_step(x, t, z, var_type=var_type, **options))
    model = learned if var_type.startswith("LEARNED") else network
    torch.manual_seed(0)
    torch.randn(SHAPE, dtype=torch.float64)
    result = diffusion(var=var_type).p_sample_loop(model, SHAPE, noise=start, **options)
    torch.testing.assert_close(result, expected, **TIGHT)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("denoised_fn", [None, halve], ids=["plain", "denoised_fn"])
@pytest.mark.parametrize("cond_fn", [None, gradient], ids=["plain", "cond_fn"])
def test_ddim_walk(eta, denoised_fn, cond_fn):
    options = {"denoised_fn": denoised_fn, "cond_fn": cond_fn}
    start, expected = walk(lambda x, t, z: ddim_step(x, t, z, eta, **options))
    torch.manual_seed(0)
    torch.randn(SHAPE, dtype=torch.float64)
    result = diffusion(var="LEARNED_RANGE").ddim_sample_loop(learned, SHAPE, noise=start, eta=eta, **options)
    torch.testing.assert_close(result, expected, **TIGHT)


@pytest.mark.parametrize("denoised_fn", [None, halve], ids=["plain", "denoised_fn"])
def test_ddim_reversed(denoised_fn):
    x = torch.randn(SHAPE, dtype=torch.float64)
    bars = np.append(np.cumprod(1 - BETAS), 0.0)
    for t in range(N):
        out = diffusion().ddim_reverse_sample(network, x, torch.full((2,), t), denoised_fn=denoised_fn)
        expected, x0 = ddim_step(x, t, 0.0, 0.0, t_next=bars[t + 1], denoised_fn=denoised_fn)
        torch.testing.assert_close(out["sample"], expected, **TIGHT)
        torch.testing.assert_close(out["pred_xstart"], x0, **TIGHT)
    with pytest.raises(ValueError, match=r"eta is 0\.5"):
        diffusion().ddim_reverse_sample(network, x, torch.zeros(2, dtype=torch.int64), eta=0.5)


@pytest.mark.parametrize("var_type", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
def test_mean_and_variance(var_type):
    x = torch.randn(SHAPE, dtype=torch.float64)
    model = learned if var_type.startswith("LEARNED") else network
    for t in (0, 1, N - 1):
        out = diffusion(var=var_type).p_mean_variance(model, x, torch.full((2,), t))
        mean, x0 = ancestral_step(x, t, 0 * x, var_type=var_type)
        variance = variance_of(var_type, t, learned(x, torch.full((2,), t))[:, 3:])
        torch.testing.assert_close(out["mean"], mean, **TIGHT)
        torch.testing.assert_close(out["pred_xstart"], x0, **TIGHT)
        torch.testing.assert_close(out["variance"], variance, **TIGHT)
        if t > 0:
            torch.testing.assert_close(out["log_variance"], variance.log(), **TIGHT)
        assert all(value.shape == x.shape for value in out.values())


def test_forward_process():
    x, z, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.tensor([0, N - 1])
    bar = torch.tensor(np.cumprod(1 - BETAS)[[0, N - 1]]).view(2, 1, 1, 1)
    expected = bar.sqrt() * x.double() + (1 - bar).sqrt() * z.double()
    made = diffusion()
    for dtype in (torch.float32, torch.float64):
        x_t = made.q_sample(x.to(dtype), t, noise=z.to(dtype))
        # two products and a sum, each rounded once
        assert x_t.dtype == dtype
        torch.testing.assert_close(x_t.double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    last = made.q_sample(x.contiguous(memory_format=torch.channels_last), t, noise=z)
    assert last.is_contiguous(memory_format=torch.channels_last)
    mean, variance, log_variance = made.q_mean_variance(x, t)
    torch.testing.assert_close(mean.double(), bar.sqrt() * x.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), (1 - bar).expand(x.shape), rtol=1e-6, atol=0)
    torch.testing.assert_close(log_variance.double(), (1 - bar).log().expand(x.shape), rtol=1e-6, atol=0)
    torch.manual_seed(3)
    drawn = made.q_sample(x, t)
    torch.manual_seed(3)
    assert torch.equal(drawn, made.q_sample(x, t, noise=torch.randn_like(x)))


def test_posterior():
    x0, x = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    for t in (0, 1, 7):
        mean, variance, log_variance = diffusion().q_posterior_mean_variance(x0, x, torch.full((2,), t))
        expected, expected_variance = posterior(t, x0, x)
        torch.testing.assert_close(mean, expected, **TIGHT)
        assert variance.flatten()[0].item() == pytest.approx(expected_variance, rel=1e-12)
        clipped = posterior(max(t, 1), x0, x)[1]
        assert log_variance.flatten()[0].item() == pytest.approx(math.log(clipped), rel=1e-12)


def test_loops_are_their_progressive_loops():
    made, start = diffusion(), torch.randn(SHAPE)
    for loop in ("p_sample_loop", "ddim_sample_loop"):
        torch.manual_seed(0)
        outs = list(getattr(made, f"{loop}_progressive")(network, SHAPE, start))
        torch.manual_seed(0)
        assert torch.equal(outs[-1]["sample"], getattr(made, loop)(network, SHAPE, start))
        assert len(outs) == N
        assert torch.equal(outs[-1]["sample"], outs[-1]["pred_xstart"])  # the last step ends at x_0


def test_draws_are_the_originals():
    """torch.randn(*shape) and then one randn_like a step, also where DDIM adds no noise."""
    for loop in ("p_sample_loop", "ddim_sample_loop"):
        torch.manual_seed(5)
        getattr(diffusion(), loop)(network, SHAPE)
        after = torch.randn(1)
        torch.manual_seed(5)
        for _ in range(N + 1):
            torch.randn(SHAPE)
        assert torch.equal(after, torch.randn(1))


def test_a_timestep_for_each_sample():
    x, made = torch.randn(4, 3, 5), diffusion(var="LEARNED_RANGE")
    t = torch.tensor([0, 11, 4, 4])
    torch.manual_seed(0)
    together = made.p_sample(learned, x, t, cond_fn=gradient)
    torch.manual_seed(0)
    noise = torch.randn_like(x)
    for i in range(4):
        expected, x0 = ancestral_step(
            x[i : i + 1].double(), int(t[i]), noise[i : i + 1].double(), var_type="LEARNED_RANGE", cond_fn=gradient
        )
        # float32, x below 4: a dozen roundings of 2^-24, amplified by 1 / sqrt(ᾱ) = 4 at most
        torch.testing.assert_close(together["sample"][i : i + 1].double(), expected, rtol=0, atol=5e-6)
        torch.testing.assert_close(together["pred_xstart"][i : i + 1].double(), x0, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_samples_come_back_in_float32(dtype):
    x, t = torch.randn(SHAPE).to(dtype), torch.tensor([3, 9])
    for method in ("p_sample", "ddim_sample"):
        torch.manual_seed(0)
        low = getattr(diffusion(), method)(network, x, t)["sample"]
        assert low.dtype == torch.float32
        torch.manual_seed(0)
        noise = torch.randn_like(x)
        output = network(x, t).double()
        expected = [
            ancestral_step(x[i : i + 1].double(), int(t[i]), noise[i : i + 1].double())[0]
            if method == "p_sample"
            else ddim_step(x[i : i + 1].double(), int(t[i]), 0.0, 0.0)[0]
            for i in range(2)
        ]
        # the network runs in the low precision: its relative error is the bound, 1 / sqrt(ᾱ) at most 4
        atol = 8 * (output - network(x.double(), t)).abs().max().item()
        torch.testing.assert_close(low.double(), torch.cat(expected), rtol=0, atol=atol)


class Ops(TorchDispatchMode):
    """Names of the dispatched ops, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "made", [diffusion(var="LEARNED_RANGE"), diffusion(var="FIXED_LARGE")], ids=["learned", "fixed"]
)
@pytest.mark.parametrize("method", ["p_sample", "ddim_sample"])
def test_a_step_is_one_op(made, method):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 9])
    output = torch.randn(2, 6 if made.model_var_type == ModelVarType.LEARNED_RANGE else 3, 8, 8)
    step = getattr(made, method)
    step(lambda *_: output, x, t)  # copies the table
    with Ops() as ops:
        step(lambda *_: output, x, t)
    assert ops.names == ["aten::randn_like", "fastdiff::solver_step"]


def test_a_classifier_adds_no_op_to_a_fixed_variance():
    x, t, made = torch.randn(SHAPE), torch.tensor([3, 9]), diffusion()
    output, grad = torch.randn(SHAPE), torch.randn(SHAPE)
    made.p_sample(lambda *_: output, x, t)
    with Ops() as ops:
        made.p_sample(lambda *_: output, x, t, cond_fn=lambda *_: grad)
    assert ops.names == ["aten::randn_like", "fastdiff::solver_step"]


def test_overridden_methods_are_called():
    class Doubled(GaussianDiffusion):
        def p_mean_variance(self, *args, **kwargs):
            out = super().p_mean_variance(*args, **kwargs)
            return {**out, "mean": 2 * out["mean"], "pred_xstart": 2 * out["pred_xstart"]}

    x, t = torch.randn(SHAPE, dtype=torch.float64), torch.tensor([0, 0])
    settings = {
        name: getattr(diffusion(), name) for name in ("betas", "model_mean_type", "model_var_type", "loss_type")
    }
    for method in ("p_sample", "ddim_sample"):
        plain, doubled = (getattr(one, method)(network, x, t)["sample"] for one in (diffusion(), Doubled(**settings)))
        torch.testing.assert_close(doubled, 2 * plain, **TIGHT)


def test_steps_are_differentiable():
    x, t, made = torch.randn(SHAPE, dtype=torch.float64), torch.tensor([3, 9]), diffusion()
    with torch.enable_grad():
        x.requires_grad_()
        made.ddim_sample(network, x, t)["sample"].sum().backward()
    step, slope = 1e-6, torch.ones_like(x)
    ends = [made.ddim_sample(network, x.detach() + sign * step * slope, t)["sample"].sum() for sign in (1, -1)]
    # the central difference's own error: step^2 and roundings of 1e-15 / step
    assert x.grad.sum().item() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item(), abs=1e-7)


def test_spaced_diffusion_is_the_process_at_its_timesteps():
    full, told = diffusion(), []
    spaced = SpacedDiffusion(
        [1, 4, 11],
        betas=BETAS,
        model_mean_type=full.model_mean_type,
        model_var_type=full.model_var_type,
        loss_type=full.loss_type,
        rescale_timesteps=True,
    )
    np.testing.assert_allclose(spaced.alphas_cumprod, full.alphas_cumprod[[1, 4, 11]], rtol=1e-13)
    assert (spaced.num_timesteps, spaced.original_num_steps, spaced.timestep_map) == (3, N, [1, 4, 11])

    def model(x, t):
        told.append(t)
        return x

    out = spaced.p_sample(model, torch.randn(SHAPE), torch.tensor([2, 0]), cond_fn=model)
    assert out["sample"].shape == SHAPE
    for t in told:
        torch.testing.assert_close(t, torch.tensor([11.0, 1.0]) * 1000 / N)


def test_spaced_diffusion_over_all_timesteps_is_the_whole():
    types = {"model_mean_type": ModelMeanType.EPSILON, "model_var_type": ModelVarType.LEARNED_RANGE}
    spaced = SpacedDiffusion(range(N), betas=BETAS, loss_type=LossType.MSE, **types)
    start, samples = torch.randn(SHAPE, dtype=torch.float64), []
    for made in (spaced, diffusion(var="LEARNED_RANGE")):
        torch.manual_seed(0)
        samples.append(made.p_sample_loop(learned, SHAPE, start, model_kwargs={"scale": 0.5}, cond_fn=cond_with_scale))
    torch.testing.assert_close(*samples, **TIGHT)


def cond_with_scale(x, t, scale):
    return scale * gradient(x, t)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ("ddim5", {0, 4, 8, 12, 16}),
        ([3], {0, 10, 19}),  # 9.5 rounds to the even 10
        (2, {0, 19}),
        ("2,3", {0, 9, 10, 14, 19}),
        ([1, 1, 1], {0, 7, 14}),
    ],
    ids=str,
)
def test_space_timesteps(counts, expected):
    assert space_timesteps(20, counts) == expected


def test_beta_schedules():
    linear = get_named_beta_schedule("linear", 500)
    assert (linear[0], linear[-1], len(linear)) == pytest.approx((2e-4, 0.04, 500))
    cosine = np.cumprod(1 - get_named_beta_schedule("cosine", 100))
    expected = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (50, 0)]
    assert cosine[49] == pytest.approx(expected[0] / expected[1], rel=1e-12)
    assert max(betas_for_alpha_bar(10, lambda t: 1 - t, max_beta=0.5)) == 0.5


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="schedule_name is 'square'"):
        get_named_beta_schedule("square", 10)
    with pytest.raises(ValueError, match="no integer stride takes 19 of 20"):
        space_timesteps(20, "ddim19")
    with pytest.raises(ValueError, match="section 1 has only 10"):
        space_timesteps(20, [5, 11])
    for counts in ("ddimx", "5,,5", "", "-5", []):
        with pytest.raises(ValueError, match="section_counts is"):
            space_timesteps(20, counts)
    with pytest.raises(ValueError, match="use_timesteps is"):
        SpacedDiffusion([N], betas=BETAS)
    with pytest.raises(ValueError, match="model must return"):
        diffusion(var="LEARNED").p_sample(network, torch.randn(SHAPE), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="t must be of shape"):
        diffusion().p_sample(network, torch.randn(SHAPE), torch.tensor([0]))
    with pytest.raises(ValueError, match="noise must have the shape"):
        diffusion().q_sample(torch.randn(SHAPE), torch.tensor([0, 0]), noise=torch.randn(2, 3))


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_against_diffusers(method):
    diffusers = pytest.importorskip("diffusers")
    settings = {"trained_betas": BETAS.tolist(), "num_train_timesteps": N, "clip_sample": True}
    start = torch.randn(SHAPE)
    if method == "ddpm":
        scheduler = diffusers.DDPMScheduler(**settings, variance_type="learned_range")
        made, model, loop, options = diffusion(var="LEARNED_RANGE"), learned, "p_sample_loop", {}
    else:
        scheduler = diffusers.DDIMScheduler(**settings)
        made, model, loop, options = diffusion(), network, "ddim_sample_loop", {"eta": 0.7}
    scheduler.set_timesteps(N)
    generator, x = torch.Generator().manual_seed(0), start
    step_options = {} if method == "ddpm" else {"eta": 0.7, "use_clipped_model_output": True}
    for t in scheduler.timesteps:
        output = model(x, t.expand(2))
        x = scheduler.step(output, t, x, generator=generator, **step_options).prev_sample
    noise_of_the_walk = torch.Generator().manual_seed(0)
    original = torch.randn_like
    torch.randn_like = lambda like: torch.randn(like.shape, generator=noise_of_the_walk)
    try:
        result = getattr(made, loop)(model, SHAPE, start, **options)
    finally:
        torch.randn_like = original
    # both in float32, diffusers' tables too: 12 steps of a few roundings each; 4e-7 measured
    torch.testing.assert_close(result, x, rtol=0, atol=3e-6)
