"""k-diffusion's sampling functions against loops written in float64 from the papers, and against diffusers."""

import collections
import itertools
import math
import sys
import types

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff.compat.k_diffusion as K
from fastdiff.compat.k_diffusion import sampling

SHAPE = (2, 3, 5)
SIGMAS = torch.tensor([9.0, 4.0, 2.5, 0.8, 0.3, 0.1], dtype=torch.float64)
WALKS = {"to_zero": torch.cat([SIGMAS, torch.zeros(1, dtype=torch.float64)]), "to_0.1": SIGMAS}


def denoise(x, sigma, scale=1.0):
    """Smooth in both, and different for each sample."""
    sigma = sigma.view(-1, *[1] * (x.ndim - 1))
    return 0.9 * scale * torch.tanh(x / (1 + sigma)) + 0.05 * x / (1 + sigma**2)


def at(x, sigma):
    return denoise(x, torch.full((len(x),), sigma, dtype=x.dtype))


def slope(x, sigma):
    """dx/dsigma of the probability-flow ODE."""
    return (x - at(x, sigma)) / sigma


def karras_2(x, sigmas, draw, corrected, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """Karras et al. 2022, algorithm 2; `corrected` chooses the second evaluation."""
    for sigma, target in itertools.pairwise(sigmas):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0
        hat = sigma + gamma * sigma
        x = x + math.sqrt(hat**2 - sigma**2) * s_noise * draw(sigma, target)
        d = slope(x, hat)
        if target > 0 and corrected == "heun":
            d = (d + slope(x + (target - hat) * d, target)) / 2
        elif target > 0 and corrected == "dpm_2":
            middle = math.exp((math.log(hat) + math.log(target)) / 2)
            d = slope(x + (middle - hat) * d, middle)
        x = x + (target - hat) * d
    return x


def split(sigma, target, eta):
    """Noise of the posterior q(x_target | x_sigma, x0), scaled by eta, and what is left for the ODE."""
    up = eta * target * math.sqrt((sigma**2 - target**2) / sigma**2)
    return math.sqrt(target**2 - up**2), up


def ancestral(x, sigmas, draw, method, eta=1.0, s_noise=1.0):
    for sigma, target in itertools.pairwise(sigmas):
        down, up = split(sigma, target, eta)
        d = slope(x, sigma)
        if method == "euler" or target == 0:
            x = x + (down - sigma) * d
        elif method == "dpm_2":
            middle = math.sqrt(sigma * down)
            x = x + (down - sigma) * slope(x + (middle - sigma) * d, middle)
        else:  # DPM-Solver++(2S): exact for a constant x0, which is taken at the middle in ln sigma
            middle = math.sqrt(sigma * down)
            x0 = at(middle / sigma * x + (1 - middle / sigma) * at(x, sigma), middle)
            x = down / sigma * x + (1 - down / sigma) * x0
        if target > 0:
            x = x + up * s_noise * draw(sigma, target)
    return x


def dpmpp_sde(x, sigmas, draw, eta=1.0, s_noise=1.0, r=0.5):
    for sigma, target in itertools.pairwise(sigmas):
        x0 = at(x, sigma)
        if target == 0:
            x = x0
            continue
        middle = math.exp((1 - r) * math.log(sigma) + r * math.log(target))
        down, up = split(sigma, middle, eta)
        there = down / sigma * x + (1 - down / sigma) * x0 + up * s_noise * draw(sigma, middle)
        x0 = x0 + (at(there, middle) - x0) / (2 * r)
        down, up = split(sigma, target, eta)
        x = down / sigma * x + (1 - down / sigma) * x0 + up * s_noise * draw(sigma, target)
    return x


def dpmpp_multistep(x, sigmas, draw, order, eta=0.0, s_noise=1.0, solver_type="midpoint"):
    """The linear part exactly, x0 by its Taylor polynomial in ln sigma from differences of past values."""
    past = []  # (lambda, x0), newest first
    for sigma, target in itertools.pairwise(sigmas):
        now, x0 = -math.log(sigma), at(x, sigma)
        past = [(now, x0), *past][:order]
        if target == 0:
            return x0
        h = -math.log(target) - now
        y = (1 + eta) * h
        x = target / sigma * math.exp(-eta * h) * x + (1 - math.exp(-y)) * x0
        if len(past) > 1:
            first = (x0 - past[1][1]) / (now - past[1][0])
            half = 0.5 * (1 - math.exp(-y)) * h if solver_type == "midpoint" else h * (1 - (1 - math.exp(-y)) / y)
            if len(past) > 2:
                older = (past[1][1] - past[2][1]) / (past[1][0] - past[2][0])
                second = (first - older) / (now - past[2][0])
                first = first + second * (now - past[1][0])
                # half of the integral of s² e^{-y (1 - s)} y ds, k-diffusion's weight
                x = x + second * h**2 * (0.5 - (1 - (1 - math.exp(-y)) / y) / y)
            x = x + half * first
        if eta:
            x = x + target * math.sqrt(1 - math.exp(-2 * eta * h)) * s_noise * draw(sigma, target)
    return x


def adams_bashforth(x, sigmas, draw, order):
    slopes = []
    for i in range(len(sigmas) - 1):
        slopes.append(slope(x, sigmas[i]))
        nodes = range(i, max(i - order, -1), -1)
        for j in nodes:
            others = [sigmas[k] for k in nodes if k != j]

            def basis(sigma, j=j, others=others):
                return math.prod((sigma - other) / (sigmas[j] - other) for other in others)

            x = x + quad(basis, sigmas[i], sigmas[i + 1], epsabs=1e-13, epsrel=1e-13)[0] * slopes[j]
    return x


CHURN = {"s_churn": 2.0, "s_tmin": 0.2, "s_tmax": 5.0, "s_noise": 1.01}
NOISE = {"eta": 0.6, "s_noise": 0.9}
CASES = {
    "euler": ("sample_euler", karras_2, {"corrected": None}, {}),
    "euler-churn": ("sample_euler", karras_2, {"corrected": None}, CHURN),
    "heun": ("sample_heun", karras_2, {"corrected": "heun"}, {}),
    "heun-churn": ("sample_heun", karras_2, {"corrected": "heun"}, CHURN),
    "heun-all-churned": ("sample_heun", karras_2, {"corrected": "heun"}, {"s_churn": 40.0}),
    "dpm_2": ("sample_dpm_2", karras_2, {"corrected": "dpm_2"}, {}),
    "dpm_2-churn": ("sample_dpm_2", karras_2, {"corrected": "dpm_2"}, CHURN),
    "euler_a": ("sample_euler_ancestral", ancestral, {"method": "euler"}, {}),
    "euler_a-eta": ("sample_euler_ancestral", ancestral, {"method": "euler"}, NOISE),
    "dpm_2_a": ("sample_dpm_2_ancestral", ancestral, {"method": "dpm_2"}, {}),
    "dpm_2_a-eta": ("sample_dpm_2_ancestral", ancestral, {"method": "dpm_2"}, NOISE),
    "2s_a": ("sample_dpmpp_2s_ancestral", ancestral, {"method": "2s"}, {}),
    "2s_a-ode": ("sample_dpmpp_2s_ancestral", ancestral, {"method": "2s"}, {"eta": 0.0}),
    "sde": ("sample_dpmpp_sde", dpmpp_sde, {}, {}),
    "sde-eta-r": ("sample_dpmpp_sde", dpmpp_sde, {}, {**NOISE, "r": 1 / 3}),
    "2m": ("sample_dpmpp_2m", dpmpp_multistep, {"order": 2}, {}),
    "2m_sde": ("sample_dpmpp_2m_sde", dpmpp_multistep, {"order": 2}, {"eta": 1.0}),
    "2m_sde-heun": ("sample_dpmpp_2m_sde", dpmpp_multistep, {"order": 2}, {**NOISE, "solver_type": "heun"}),
    "3m_sde": ("sample_dpmpp_3m_sde", dpmpp_multistep, {"order": 3, "solver_type": "heun"}, {"eta": 1.0}),
    "3m_sde-eta": ("sample_dpmpp_3m_sde", dpmpp_multistep, {"order": 3, "solver_type": "heun"}, NOISE),
    "lms": ("sample_lms", adams_bashforth, {"order": 4}, {}),
    "lms-2": ("sample_lms", adams_bashforth, {"order": 2}, {"order": 2}),
}
STOCHASTIC = ["sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"]
FUNCTIONS = sorted({case[0] for case in CASES.values()})


def start(dtype=torch.float64, seed=0):
    return 9 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def independent(x):
    return lambda *_: torch.randn_like(x)


def run(name, x, sigmas, **options):
    """A sampling function with independent noise also where it would ask for a Brownian tree."""
    if name in STOCHASTIC:
        options.setdefault("noise_sampler", independent(x))
    return getattr(sampling, name)(denoise, x, sigmas, disable=True, **options)


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("case", CASES)
def test_walks_and_draws(case, walk):
    """Equal images from equal seeds: the formulas, and the number and order of the draws."""
    name, reference, variant, options = CASES[case]
    x = start()
    torch.manual_seed(3)
    expected = reference(x, WALKS[walk].tolist(), independent(x), **{**variant, **options})
    after = torch.randn(2)
    torch.manual_seed(3)
    result = run(name, x, WALKS[walk], **options)
    # 6 steps in float64 of states below 30: 2e-15 measured
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)
    assert torch.equal(after, torch.randn(2))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_callback_reports_each_step(name):
    reports, x = [], start()
    run(name, x, WALKS["to_zero"], callback=reports.append)
    assert [report["i"] for report in reports] == list(range(6))
    assert torch.equal(torch.stack([report["sigma"] for report in reports]), SIGMAS)
    assert torch.equal(torch.stack([report["sigma_hat"] for report in reports]), SIGMAS)
    assert torch.equal(reports[0]["x"], x)
    for report in reports:
        torch.testing.assert_close(report["denoised"], denoise(report["x"], report["sigma"].expand(2)))


def test_callback_reports_the_churned_state():
    reports, x = [], start()
    torch.manual_seed(0)
    run("sample_heun", x, SIGMAS, callback=reports.append, s_churn=1.0)
    hat = SIGMAS[:-1] * 1.2
    torch.testing.assert_close(torch.stack([report["sigma_hat"] for report in reports]), hat)
    torch.manual_seed(0)
    noise = torch.randn_like(x)
    torch.testing.assert_close(reports[0]["x"], x + (hat[0] ** 2 - SIGMAS[0] ** 2).sqrt() * noise)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_extra_args_and_low_precision(name):
    for dtype, atol in ((torch.float32, 5e-7), (torch.float16, 2e-3)):
        options = {"eta": 0.0} if "ancestral" in name or "sde" in name else {}
        low = run(name, start(dtype), WALKS["to_zero"].float(), extra_args={"scale": 0.5}, **options)
        high = run(name, start(dtype).double(), WALKS["to_zero"], extra_args={"scale": 0.5}, **options)
        assert low.dtype == dtype
        # measured 7e-8 and 3e-4, a few roundings of the last states, which are of the order of 1
        torch.testing.assert_close(low.double(), high, rtol=0, atol=atol)


class Ops(TorchDispatchMode):
    """Names of the dispatched ops, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_op_after_each_evaluation(name):
    x, evaluations = start(torch.float32), []

    def model(x, sigma):
        evaluations.append(sigma)
        return x

    getter = {"noise_sampler": lambda *_: x} if name in STOCHASTIC else {}
    counts = []
    for steps in (2, 5):
        evaluations.clear()
        with Ops() as ops:
            getattr(sampling, name)(model, x, WALKS["to_zero"][-steps - 1 :], disable=True, **getter)
        assert ops.names.count("fastdiff::solver_step") == len(evaluations)
        counts.append(collections.Counter(ops.names))
    # what three more steps bring: their fused ops, a randn_like each, and scalars on the host for the noise sampler
    more = counts[1] - counts[0]
    assert more.pop("fastdiff::solver_step") >= 3
    assert more.pop("aten::randn_like", 0) in (0, 3)
    assert set(more) <= {"aten::lift_fresh", "aten::_to_copy", "aten::detach"}, more


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "heun", "lms"])
def test_against_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    classes = {"euler_ancestral": "EulerAncestral", "lms": "LMS"}
    scheduler = getattr(diffusers, f"{classes.get(name, name.title())}DiscreteScheduler")()
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    options = {}
    if name == "euler_ancestral":
        options["noise_sampler"] = lambda *_: torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    # Heun's are listed once for each evaluation
    levels = torch.unique(scheduler.sigmas.double()).flip(0)
    x = start() / 9 * levels[0]
    result = run(f"sample_{name}", x, levels, **options)
    generator.manual_seed(0)
    drawn = {"generator": generator} if name == "euler_ancestral" else {}
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist()):
        scheduler.scale_model_input(x, t)
        x = scheduler.step((x - at(x, sigma)) / sigma, t, x, **drawn).prev_sample.double()
    # diffusers keeps sigmas, and some states, in float32: 1e-7 measured
    torch.testing.assert_close(result, x, rtol=0, atol=1e-6)


def test_noise_samplers_are_told_levels_of_their_interval():
    told = []

    def sampler(sigma, sigma_next):
        told.append((sigma.item(), sigma_next.item()))
        return torch.zeros(SHAPE)

    run("sample_dpmpp_sde", start(torch.float32), WALKS["to_zero"].float(), noise_sampler=sampler, r=0.5)
    pairs = list(itertools.pairwise(SIGMAS.tolist()))
    expected = [(s, end) for s, t in pairs for end in (math.sqrt(s * t), t)]
    np.testing.assert_allclose(told, expected, rtol=1e-6)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_brownian_tree_is_the_default(name, monkeypatch):
    class BrownianTree:  # a path with W(t) = t * w, whose increments therefore add up
        def __init__(self, t0, w0, t1, entropy):
            self.w = torch.randn(w0.shape, generator=torch.Generator().manual_seed(entropy % 2**31), dtype=w0.dtype)

        def __call__(self, t0, t1):
            assert t0 < t1
            return (t1 - t0) * self.w

    x = start()
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(ImportError, match=r"torchsde.*default_noise_sampler"):
        getattr(sampling, name)(denoise, x, SIGMAS, disable=True)
    torchsde = types.ModuleType("torchsde")
    torchsde.BrownianTree = BrownianTree
    monkeypatch.setitem(sys.modules, "torchsde", torchsde)
    torch.manual_seed(4)
    default = getattr(sampling, name)(denoise, x, SIGMAS, disable=True)
    torch.manual_seed(4)
    tree = sampling.BrownianTreeNoiseSampler(x, SIGMAS.min(), SIGMAS.max())
    assert torch.equal(default, run(name, x, SIGMAS, noise_sampler=tree))
    batched = sampling.BrownianTreeNoiseSampler(x, 0.1, 9.0, seed=[5, 6])
    noise = batched(torch.tensor(4.0), torch.tensor(2.0))
    for i, seed in enumerate((5, 6)):
        w = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        torch.testing.assert_close(noise[i], -w * math.sqrt(2))  # the path from 4 down to 2
    with pytest.raises(ValueError, match="seed holds 3 seeds"):
        sampling.BrownianTreeNoiseSampler(x, 0.1, 9.0, seed=[1, 2, 3])


def test_the_real_brownian_tree_is_one_path():
    """torchsde's: unit variance over any interval, and increments of neighbouring ones that add up."""
    pytest.importorskip("torchsde")
    x = torch.zeros(4, 3, 16, 16, dtype=torch.float64)
    tree = sampling.BrownianTreeNoiseSampler(x, 0.1, 9.0, seed=3)
    ends = [torch.tensor(value, dtype=torch.float64) for value in (8.0, 3.0, 0.5)]
    first, second, whole = (tree(a, b) * (a - b).sqrt() for a, b in [ends[:2], ends[1:], ends[::2]])
    # the tree bisects to a tolerance of 1e-6 of its interval
    torch.testing.assert_close(first + second, whole, atol=1e-2, rtol=0)
    # five standard errors of 3,072 normals
    assert abs(tree(*ends[:2]).std().item() - 1) < 5 / math.sqrt(2 * x.numel())
    assert torch.equal(sampling.BrownianTreeNoiseSampler(x, 0.1, 9.0, seed=3)(*ends[:2]), tree(*ends[:2]))


def test_sigmas():
    karras = sampling.get_sigmas_karras(5, 0.1, 10.0, rho=3.0).double()
    expected = [(10 ** (1 / 3) + i / 4 * (0.1 ** (1 / 3) - 10 ** (1 / 3))) ** 3 for i in range(5)]
    np.testing.assert_allclose(karras, [*expected, 0], rtol=1e-6)
    exponential = sampling.get_sigmas_exponential(3, 0.1, 10.0)
    np.testing.assert_allclose(exponential, [10, 1, 0.1, 0], rtol=1e-6)
    bent = sampling.get_sigmas_polyexponential(3, 0.1, 10.0, rho=2.0)
    np.testing.assert_allclose(bent, [10, 10**-0.5, 0.1, 0], rtol=1e-6)
    vp = sampling.get_sigmas_vp(3, beta_d=10.0, beta_min=0.2, eps_s=0.5)
    expected = [math.sqrt(math.exp(5 * t * t + 0.2 * t) - 1) for t in (1, 0.75, 0.5)]
    np.testing.assert_allclose(vp, [*expected, 0], rtol=1e-6)
    assert karras.dtype == torch.float64
    assert sampling.get_sigmas_vp(3).dtype == torch.get_default_dtype()
    assert torch.equal(sampling.append_zero(torch.tensor([2.0])), torch.tensor([2.0, 0.0]))


def test_pieces():
    x, x0 = start(), start(seed=1)
    torch.testing.assert_close(sampling.to_d(x, torch.tensor([2.0, 4.0]), x0)[1], (x[1] - x0[1]) / 4)
    torch.testing.assert_close(sampling.to_d(x, torch.tensor(2.0), x0), (x - x0) / 2)
    for kind in (float, torch.tensor):
        down, up = sampling.get_ancestral_step(kind(2.0), kind(1.0), eta=0.5)
        assert float(up) == pytest.approx(0.5 * math.sqrt(3 / 4))
        assert float(down) ** 2 + float(up) ** 2 == pytest.approx(1)
    assert sampling.get_ancestral_step(2.0, 1.0, eta=0.0) == (1.0, 0.0)


def test_bad_input_is_named():
    x = start()
    for sigmas in (torch.tensor([[1.0, 0.0]]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="sigmas must be of shape"):
            run("sample_euler", x, sigmas)
    for sigmas in (torch.tensor([1.0, 0.0, 0.5]), torch.tensor([1.0, -1.0]), torch.tensor([math.nan, 1.0])):
        with pytest.raises(ValueError, match="numbers above 0"):
            run("sample_euler", x, sigmas)
    with pytest.raises(ValueError, match="rise"):
        run("sample_euler_ancestral", x, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="solver_type"):
        run("sample_dpmpp_2m_sde", x, SIGMAS, solver_type="trapezoid")
    with pytest.raises(ValueError, match="order"):
        run("sample_lms", x, SIGMAS, order=5)
    assert K.sampling is sampling
