"""Façades of one-step schedulers: a timestep a sample, several threads, noise by the contract."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers_walk import ONE_STEP, SHAPE, model, pair, scale

import fastdiff.noise

one_step = pytest.mark.parametrize("name", ONE_STEP)
DRAWING = ("DDPMScheduler", "DDIMScheduler", "LCMScheduler", "EulerAncestralDiscreteScheduler", "TCDScheduler")
PLACES = (4, 0, 2)


def ready(name, steps=6, **config):
    """A façade after set_timesteps, and the options of `step` that let it draw noise."""
    _, ours = pair(name, **config)
    ours.set_timesteps(num_inference_steps=steps)
    return ours, {"eta": 0.8} if name == "DDIMScheduler" else {}


def batch(n=3, dtype=torch.float32):
    return torch.linspace(-2, 2, n * 105).view(n, 3, 5, 7).to(dtype)


def generators(name, ours, n):
    if "generator" not in inspect.signature(ours.step).parameters:
        return [{} for _ in range(n)]
    return [{"generator": torch.Generator().manual_seed(seed)} for seed in range(n)]


@one_step
def test_a_timestep_a_sample_is_as_many_scalar_steps(name):
    ours, options = ready(name)
    x, t = batch(), ours.timesteps[list(PLACES)]
    m = x.sin()
    alone = []
    for i, drawn in enumerate(generators(name, ours, 3)):
        ours.set_timesteps(6)
        alone.append(ours.step(m[i : i + 1], t[i], x[i : i + 1], return_dict=False, **drawn, **options))
    drawn = {key: [one[key] for one in generators(name, ours, 3)] for key in generators(name, ours, 1)[0]}
    together = ours.step(m, t, x, return_dict=False, **drawn, **options)
    for k, values in enumerate(together):
        torch.testing.assert_close(values, torch.cat([one[k] for one in alone]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EDMEulerScheduler"])
def test_churn_of_a_timestep_a_sample(name):
    ours, _ = ready(name)
    x, t = batch(), ours.timesteps[list(PLACES)]
    # of the three only the first two churn
    options = {"s_churn": 4.0, "s_tmin": float(ours.sigmas[3]), "s_tmax": float(ours.sigmas[0])}
    options |= {"s_tmin": float(ours.sigmas[2])}
    alone = [
        ours.step(x[i : i + 1].sin(), t[i], x[i : i + 1], generator=torch.Generator().manual_seed(i), **options)
        for i in range(3)
    ]
    drawn = [torch.Generator().manual_seed(i) for i in range(3)]
    together = ours.step(x.sin(), t, x, generator=drawn, **options)
    expected = torch.cat([one.prev_sample for one in alone])
    torch.testing.assert_close(together.prev_sample, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "EDMEulerScheduler"])
def test_model_input_of_a_timestep_a_sample(name):
    ours, _ = ready(name)
    x, t = batch(), ours.timesteps[list(PLACES)]
    expected = torch.cat([ours.scale_model_input(x[i : i + 1], t[i]) for i in range(3)])
    torch.testing.assert_close(ours.scale_model_input(x, t), expected, rtol=1e-6, atol=0)


@one_step
def test_a_timestep_that_is_not_listed_poisons_its_sample(name):
    ours, _ = ready(name)
    x, t = batch(), ours.timesteps[list(PLACES)].clone()
    t[1] = 12345
    nan = ours.step(x.sin(), t, x).prev_sample.isnan().flatten(1)
    assert nan.all(1).tolist() == [False, True, False]
    assert nan.any(1).tolist() == [False, True, False]


@one_step
def test_a_vector_of_another_length_is_refused(name):
    ours, _ = ready(name)
    with pytest.raises(ValueError, match=r"scalar or \[3\]"):
        ours.step(batch(), ours.timesteps[:2], batch())


@one_step
def test_threads_share_a_scheduler(name):
    ours, _ = ready(name, steps=20)

    def walk(offset):
        x, drawn = batch() + offset, generators(name, ours, 8)[offset]
        for t in ours.timesteps:
            x = ours.step(model(scale(ours, x, t), t), t, x, return_dict=False, **drawn)[0]
        return x

    expected = [walk(offset) for offset in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for got, one in zip(pool.map(walk, range(8)), expected):
            assert torch.equal(got, one)


@pytest.mark.parametrize("name", DRAWING)
def test_contract_noise_is_that_of_fastdiff_noise(name):
    ours, options = ready(name)
    x, t = batch(2), ours.timesteps[3]
    ours.use_noise_contract(11)
    got = ours.step(x.sin(), t, x, **options).prev_sample
    noise = fastdiff.noise.normal((2, 3, 5, 7), seed=11, draw=3)
    ours.use_noise_contract(None)
    ours._noise = lambda *_: noise
    torch.testing.assert_close(got, ours.step(x.sin(), t, x, **options).prev_sample, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", DRAWING)
def test_contract_noise_does_not_depend_on_the_batch(name):
    ours, options = ready(name)
    x, t = batch(), ours.timesteps[list(PLACES)]
    seeds, indices = torch.tensor([7, 8, 7]), torch.tensor([0, 5, 9])
    ours.use_noise_contract(seeds, indices)
    together = ours.step(x.sin(), t, x, **options).prev_sample
    for i in (1, 2):
        ours.use_noise_contract(int(seeds[i]), indices[i : i + 1])
        alone = ours.step(x[i : i + 1].sin(), t[i], x[i : i + 1], **options).prev_sample
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-6)


def test_contract_noise_takes_no_generator():
    ours, _ = ready("DDPMScheduler")
    ours.use_noise_contract(1)
    with pytest.raises(ValueError, match="generator must be None"):
        ours.step(batch(), ours.timesteps[0], batch(), generator=torch.Generator())


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True])
def test_contract_noise_needs_a_seed(seed):
    with pytest.raises(ValueError, match="seed must be"):
        ready("DDPMScheduler")[0].use_noise_contract(seed)


def test_contract_noise_needs_a_listed_timestep():
    ours, _ = ready("DDIMScheduler", steps=10)
    ours.use_noise_contract(1)
    with pytest.raises(ValueError, match="timestep 17 is not"):
        ours.step(batch(), 17, batch(), eta=1.0)


def test_the_contract_is_the_engine_s_own_walk():
    """DDPM under the contract draws the images of `fastdiff.Sampler` with the same seed."""
    from fastdiff import NoiseSchedule, Sampler

    ours, _ = ready("DDPMScheduler", steps=8, timestep_spacing="trailing", clip_sample=False)
    ours.use_noise_contract(5)

    def network(x, t):
        return torch.tanh(0.5 * x + 1e-4 * t.view(-1, 1, 1, 1))

    sampler = Sampler(
        network,
        NoiseSchedule.linear(),
        solver="ddpm",
        num_inference_steps=8,
        prediction_type="epsilon",
        timestep_spacing="trailing",
    )
    x = fastdiff.noise.normal(SHAPE, seed=5, stream="initial")
    for t in ours.timesteps:
        x = ours.step(network(x, t.expand(SHAPE[0])), t, x).prev_sample
    torch.testing.assert_close(x, sampler.sample(SHAPE, seed=5), rtol=1e-4, atol=1e-4)
