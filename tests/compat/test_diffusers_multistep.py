"""The façades of diffusers' exponential integrators against the originals they replace."""

import inspect
import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff.compat.diffusers as compat
from benchmarks.solver_cases import float64_module

MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC, DEIS, EDM = "UniPCMultistepScheduler", "DEISMultistepScheduler", "EDMDPMSolverMultistepScheduler"
NAMES = (MULTI, SINGLE, UNIPC, DEIS, EDM)
EACH = pytest.mark.parametrize("name", NAMES)
SHAPE = (2, 3, 5, 7)
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
STOCHASTIC = [
    (MULTI, {"algorithm_type": "sde-dpmsolver++"}),
    (MULTI, {"algorithm_type": "sde-dpmsolver", **SIGMA_MIN}),
    (SINGLE, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    (EDM, {"algorithm_type": "sde-dpmsolver++"}),
]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def pair(name, config):
    """The original, and the façade made from its configuration."""
    original = getattr(diffusers, name)(**config)
    return original, getattr(compat, f"Fast{name}").from_config(original.config)


def model(x, t):
    """A smooth network, computed in float32 or float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, t_wide = x.to(wide), torch.as_tensor(t).to(wide)
    return (0.6 * torch.tanh(0.7 * x_wide + torch.sin(0.01 * t_wide)) + 0.2 * x_wide).to(x.dtype)


def walk(scheduler, steps, *, begin=None, dtype=torch.float32, generator=None, edit=None, start=None, **set_timesteps):
    """The end of a walk from fixed noise; edit(x, i) may change the sample before step i."""
    scheduler.set_timesteps(**({"num_inference_steps": steps} if steps else {}), **set_timesteps)
    if dtype == torch.float64:
        scheduler.sigmas = scheduler.sigmas.float().double()  # the points of the float32 walk
    if begin is not None:
        scheduler.set_begin_index(begin)
    unit = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) if start is None else start
    x = unit.to(dtype) * float(scheduler.init_noise_sigma if begin is None else 1.0)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator or torch.Generator().manual_seed(2)
    for i, t in enumerate(scheduler.timesteps[begin or 0 :]):
        x = x if edit is None else edit(x, i)
        output = model(scheduler.scale_model_input(x, t), t)
        if getattr(scheduler.config, "variance_type", None):
            output = torch.cat([output, torch.full_like(output, 3.0)], 1)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def relative(got, want):
    assert got.shape == want.shape
    assert got.isfinite().all()
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def off_by(original, got, *args, **kwargs):
    """How far from a float64 walk over its own points an original is that computes its weights in float32."""
    name = type(original).__name__
    exact = getattr(float64_module(name), name).from_config(original.config)
    return relative(got, walk(exact, *args, dtype=torch.float64, **kwargs))


def dpm_configs(algorithms):
    for order, algorithm, kind in itertools.product((1, 2, 3), algorithms, ("midpoint", "heun")):
        if (order, algorithm) == (3, "sde-dpmsolver"):
            continue  # diffusers has none
        config = {"solver_order": order, "algorithm_type": algorithm, "solver_type": kind}
        yield config if "++" in algorithm else {**config, **SIGMA_MIN}


def cases():
    vp = [
        {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
        {"prediction_type": "sample", "thresholding": True, "sample_max_value": 1.5},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        FLOW,
        {"prediction_type": "flow_prediction"},
        {"trained_betas": [0.001 + 0.0001 * i for i in range(200)], "num_train_timesteps": 200},
    ]
    spacings = [{"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}]
    zero_snr = [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}]
    multi = [*dpm_configs(("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")), *spacings, *zero_snr]
    multi += [
        {"lower_order_final": False, **SIGMA_MIN},
        {"euler_at_final": True, **SIGMA_MIN},
        {"use_lu_lambdas": True},
    ]
    multi += [{"variance_type": "learned_range"}, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}]
    multi += [{"algorithm_type": "dpmsolver", "thresholding": True, **SIGMA_MIN}]
    single = [*dpm_configs(("dpmsolver++", "dpmsolver", "sde-dpmsolver++"))]
    single += [{"solver_order": 3, "lower_order_final": True, **SIGMA_MIN}, {"variance_type": "learned"}]
    unipc = [
        {"solver_order": order, "solver_type": kind, "predict_x0": predict_x0, **SIGMA_MIN}
        for order, kind, predict_x0 in itertools.product((1, 2, 3, 4), ("bh1", "bh2"), (True, False))
    ]
    unipc += [{"disable_corrector": [0, 3]}, {"lower_order_final": False, **SIGMA_MIN}, *spacings, *zero_snr]
    unipc += [{**FLOW, "shift_terminal": 0.02}]
    without = [config for config in vp if config != {"prediction_type": "flow_prediction"}]
    deis = [{"solver_order": order} for order in (1, 2, 3)] + [{"lower_order_final": False}, *spacings]
    edm = [{**c, "prediction_type": p} for c in dpm_configs(("dpmsolver++",)) for p in ("epsilon", "v_prediction")]
    edm += [{"sigma_schedule": "exponential", "algorithm_type": "sde-dpmsolver++"}, SIGMA_MIN, {"thresholding": True}]
    for name, configs in {
        MULTI: multi + vp,
        SINGLE: single + vp,
        UNIPC: unipc + vp,
        DEIS: deis + without,
        EDM: edm,
    }.items():
        for config in configs:
            short = {k: "..." if isinstance(v, list) else v for k, v in config.items()}
            yield pytest.param(name, config, id="-".join([name[:-18], *(f"{k}={v}" for k, v in short.items())]))


@pytest.mark.parametrize(("name", "config"), list(cases()))
def test_walks_equal_the_originals(name, config):
    original, fast = pair(name, config)
    for steps, begin in ((10, None), (12, 5), (16, None)):
        want = walk(original, steps, begin=begin)
        # DEIS takes its weights from differences of float32 logarithms and is off by up to 5e-5 in 16 steps.
        bound = 1e-5 + (off_by(original, want, steps, begin=begin) if name == DEIS else 0)
        assert relative(walk(fast, steps, begin=begin), want) < bound
        assert torch.equal(fast.timesteps, original.timesteps)
        assert torch.equal(fast.sigmas, original.sigmas)


@pytest.mark.parametrize(
    ("name", "config", "steps"),
    [
        (DEIS, {"solver_order": 3}, 100),
        (MULTI, {"algorithm_type": "dpmsolver", "prediction_type": "v_prediction", **SIGMA_MIN}, 1),
        (MULTI, {"solver_order": 3}, 200),
    ],
    ids=["deis-3-100", "dpmsolver-1", "dpmsolver++-3-200"],
)
def test_where_float32_weights_lose_digits_the_facade_is_nearer_to_float64(name, config, steps):
    original, fast = pair(name, config)
    error = off_by(original, walk(fast, steps), steps)
    # the state itself is float32, up to 1 / alpha = 160 times as large as x0
    assert error < 1e-5
    assert error < off_by(original, walk(original, steps), steps)


@EACH
def test_configuration_goes_round(name, tmp_path):
    original, fast = pair(name, {"solver_order": 3})
    assert isinstance(fast, type(original))
    ours = {k: v for k, v in fast.config.items() if not k.startswith("_")}
    assert ours == {k: v for k, v in original.config.items() if not k.startswith("_")}
    back = type(original).from_config(fast.config)
    assert type(back) is type(original)
    fast.save_pretrained(tmp_path)
    loaded = type(fast).from_pretrained(tmp_path)
    as_original = type(original).from_pretrained(tmp_path)
    assert torch.equal(walk(loaded, 7), walk(fast, 7))
    assert torch.equal(walk(as_original, 7), walk(original, 7))
    assert (
        inspect.signature(type(fast).step).parameters.keys() == inspect.signature(type(original).step).parameters.keys()
    )


@pytest.mark.parametrize(
    ("name", "config", "arguments"),
    [
        (MULTI, {}, {"timesteps": [999, 700, 500, 320, 90, 10]}),
        (SINGLE, {"solver_order": 3}, {"timesteps": [999, 700, 500, 320, 90, 10]}),
        (MULTI, {**FLOW, "use_dynamic_shifting": True}, {"num_inference_steps": 8, "mu": 1.1}),
        (SINGLE, {**FLOW, "use_dynamic_shifting": True}, {"num_inference_steps": 8, "mu": 1.1}),
        (DEIS, {**FLOW, "use_dynamic_shifting": True}, {"num_inference_steps": 8, "mu": 1.1}),
        (UNIPC, {**FLOW, "use_dynamic_shifting": True}, {"num_inference_steps": 8, "mu": 1.1}),
        (UNIPC, FLOW, {"sigmas": np.array([0.95, 0.7, 0.6, 0.3, 0.1])}),
    ],
    ids=["multi", "single", "multi-mu", "single-mu", "deis-mu", "unipc-mu", "unipc-sigmas"],
)
def test_given_timesteps_sigmas_and_shifts(name, config, arguments):
    original, fast = pair(name, config)
    want = walk(original, None, **arguments)
    bound = 1e-5 + (off_by(original, want, None, **arguments) if name == DEIS else 0)  # as above
    assert relative(walk(fast, None, **arguments), want) < bound
    assert torch.equal(fast.sigmas, original.sigmas)


@EACH
def test_float16_in_and_out(name):
    original, fast = pair(name, {})
    got, theirs = walk(fast, 10, dtype=torch.float16), walk(original, 10, dtype=torch.float16)
    exact = walk(original, 10)
    assert got.dtype == theirs.dtype == torch.float16
    # Storing 10 samples and x0 in float16 leaves errors of some 2^-11; the original computes in it, too.
    assert relative(got, exact) <= max(1.5 * relative(theirs, exact), 4 * 2**-11)


@pytest.mark.parametrize(
    ("name", "config"), STOCHASTIC, ids=[f"{n[:-18]}-{c['algorithm_type']}" for n, c in STOCHASTIC]
)
def test_a_generator_per_image(name, config):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    original, fast = pair(name, config)
    want = walk(original, 8, generator=generators())
    assert relative(walk(fast, 8, generator=generators()), want) < 1e-5
    assert relative(walk(fast, 8, generator=generators()[::-1]), want) > 1e-2


def test_given_noise_takes_the_place_of_a_generator():
    original, fast = pair(MULTI, {"algorithm_type": "sde-dpmsolver++"})
    x, noise = torch.randn(2, *SHAPE)
    steps = []
    for scheduler in (fast, original):
        scheduler.set_timesteps(5)
        steps.append(scheduler.step(model(x, 9), scheduler.timesteps[0], x, variance_noise=noise).prev_sample)
    assert relative(*steps) < 1e-5


@EACH
def test_a_sample_that_is_not_contiguous(name):
    original, fast = pair(name, {})
    x = torch.randn(768).as_strided((4, 3, 8, 8), (1, 256, 32, 4))
    assert x.stride() == (1, 256, 32, 4)
    got, want = walk(fast, 8, start=x), walk(original, 8, start=x)
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
@EACH
def test_values_left_by_others_do_not_enter_a_new_walk(name, order):
    original, fast = pair(name, {"solver_order": order})
    x = torch.randn(SHAPE)
    residual, past = 0.1 * x, [x + 0.2, x + 0.15, x + 0.1]
    ends = []
    for scheduler in (fast, original):
        scheduler.set_timesteps(10)
        scheduler.model_outputs = past[:order]
        state = x
        for t in scheduler.timesteps[: order + 1]:
            state = scheduler.step(residual, t, state).prev_sample
        ends.append(state)
        assert len(scheduler.model_outputs) == order
    assert relative(*ends) < 1e-5


@EACH
def test_a_sample_changed_between_steps_is_met_as_in_the_original(name):
    """A pipeline blends in a known image, or a callback edits: the stages of a single-step group keep their start."""
    original, fast = pair(name, {"solver_order": 3})

    def edit(x, i):
        return torch.where(torch.arange(7) < 3, 0.5, x) if i % 2 else x

    assert relative(walk(fast, 9, edit=edit), walk(original, 9, edit=edit)) < 1e-5


@EACH
def test_a_walk_that_starts_late_without_a_begin_index(name):
    original, fast = pair(name, {"solver_order": 3})
    ends = []
    for scheduler in (fast, original):
        scheduler.set_timesteps(20)
        x = 0.3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        for t in scheduler.timesteps[7:]:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        ends.append(x)
    bound = 1e-5 + (3e-5 if name == DEIS else 0)  # of the original, as above
    assert relative(*ends) < bound


@EACH
def test_as_many_steps_as_timesteps(name):
    """Rounding repeats some of them; the original divides by the length of the step between."""
    _, fast = pair(name, {"num_train_timesteps": 25, "beta_end": 0.5} if name != EDM else {"num_train_timesteps": 25})
    fast.set_timesteps(25)
    fast.set_begin_index(0)
    x = torch.randn(SHAPE)
    for t in fast.timesteps:
        x = fast.step(model(x, t), t, x).prev_sample
    assert x.isfinite().all()


@EACH
def test_one_timestep_for_the_batch(name):
    _, fast = pair(name, {})
    fast.set_timesteps(5)
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match="one timestep for the batch"):
        fast.step(x, fast.timesteps[:2], x)


@EACH
def test_a_step_before_set_timesteps(name):
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match="set_timesteps"):
        pair(name, {})[1].step(x, 5, x)


class Ops(TorchDispatchMode):
    """Lists the dispatched operations that compute something: not views, not metadata."""

    VIEWS = ("view", "slice", "select", "detach", "alias", "unsqueeze", "expand", "as_strided", "_local_scalar_dense")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "config", "extra"),
    [(name, {"solver_order": 3}, []) for name in NAMES]
    + [(name, {"thresholding": True}, ["dynamic_threshold"]) for name in NAMES]
    + [(name, config, ["randn"]) for name, config in STOCHASTIC],
)
def test_one_op_a_step(name, config, extra):
    _, fast = pair(name, config)
    fast.set_timesteps(8)
    x = torch.randn(SHAPE)
    options = {"generator": torch.Generator().manual_seed(0)} if "randn" in extra else {}
    for i, t in enumerate(fast.timesteps):
        with Ops() as ops:
            prev_sample = fast.step(x, t, x, **options).prev_sample
        if i:  # the first step packs the rows
            assert ops.names == [*extra, "solver_step"]
        x = prev_sample


@pytest.mark.parametrize(
    ("name", "config", "option"),
    [
        (UNIPC, {"solver_p": diffusers.DDIMScheduler()}, "solver_p"),
        (UNIPC, {"solver_order": 5}, "solver_order"),
        (UNIPC, {"predict_x0": False, "prediction_type": "flow_prediction"}, "predict_x0"),
        (MULTI, {"solver_order": 4}, "solver_order"),
        (MULTI, {"prediction_type": "score"}, "prediction_type"),
        (MULTI, {"algorithm_type": "dpmsolver", "prediction_type": "flow_prediction", **SIGMA_MIN}, "algorithm_type"),
        (SINGLE, {"algorithm_type": "dpmsolver", "prediction_type": "flow_prediction", **SIGMA_MIN}, "algorithm_type"),
        (DEIS, {"solver_order": 4}, "solver_order"),
        (DEIS, {"prediction_type": "flow_prediction"}, "use_flow_sigmas"),
        (EDM, {"prediction_type": "sample"}, "prediction_type"),
    ],
)
def test_options_it_cannot_honour_are_named(name, config, option):
    with pytest.raises(ValueError, match=option):
        getattr(compat, f"Fast{name}")(**config)


@pytest.mark.parametrize("name", [MULTI, UNIPC])
def test_noise_is_added_in_float16_at_zero_terminal_snr(name):
    """sigma = 4096 at the last timestep: its square is infinite in float16."""
    original, fast = pair(name, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    image, noise = torch.randn(2, *SHAPE)
    for scheduler in (original, fast):
        scheduler.set_timesteps(5)
    want = original.add_noise(image, noise, fast.timesteps[:2])
    assert torch.equal(fast.add_noise(image, noise, fast.timesteps[:2]), want)
    got = fast.add_noise(image.half(), noise.half(), fast.timesteps[:2])
    assert got.dtype == torch.float16
    # inputs and output rounded to float16
    assert relative(got, want) < 2 * 2**-11
    assert not original.add_noise(image.half(), noise.half(), fast.timesteps[:2])[0].any()


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
def test_unipc_ends_at_x0_where_the_original_gives_nan(kind, predict_x0):
    original, fast = pair(UNIPC, {"solver_type": kind, "predict_x0": predict_x0})
    assert walk(original, 6).isnan().any() != (kind == "bh2" and predict_x0)
    assert walk(fast, 6).isfinite().all()


def test_a_timestep_that_is_not_listed_is_taken_for_the_last():
    original, fast = pair(MULTI, {})
    x = torch.randn(SHAPE)
    ends = []
    for scheduler in (fast, original):
        scheduler.set_timesteps(6)
        ends.append(scheduler.step(model(x, 3), 3, x).prev_sample)
    assert relative(*ends) < 1e-5
