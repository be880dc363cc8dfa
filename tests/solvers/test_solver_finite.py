"""Every solver on every kind of schedule, prediction type and number of steps: a finite table or a reason."""

import warnings

import pytest

from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build, names

SCHEDULES = {
    "vp": NoiseSchedule.linear(),
    "zero_terminal": NoiseSchedule.scaled_linear().rescale_zero_terminal_snr(),
    "flow": NoiseSchedule.flow(shift=3.0),
    "edm": NoiseSchedule.edm(),
}
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "edm")
STEPS = (1, 2, 3, 7, 20, 50)

UNDEFINED_AT_ALPHA_0 = ("epsilon", "edm")
NOISE_FORM = ("dpm", "dpm_sde", "dpm_single", "deis")


def reason(solver, kind, prediction_type, steps):
    """What the error says where a walk is impossible, None where there is one."""
    from_alpha_0 = kind in ("zero_terminal", "flow")
    if from_alpha_0 and prediction_type in UNDEFINED_AT_ALPHA_0:
        return "alpha = 0"
    if solver == "consistency" and prediction_type != "edm":
        return "prediction_type='edm'"
    if solver == "lcm" and prediction_type == "edm":
        return "told timesteps"
    # one step from alpha = 0 to the data is on a straight path
    if solver == "flow_heun" and (kind in ("vp", "edm") or (kind == "zero_terminal" and steps > 1)):
        return "alpha = 1 - sigma"
    if solver in NOISE_FORM and from_alpha_0:
        return "cannot start at alpha = 0"
    # v prediction is -x0 where alpha = 0, the only point of a walk of one step
    no_noise = prediction_type == "sample" or (prediction_type == "v_prediction" and from_alpha_0 and steps == 1)
    if solver == "ddim_inverse" and no_noise:
        return "says nothing about the noise"
    return None


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("solver", names())
def test_a_finite_table_or_a_reason(solver, kind):
    for prediction_type in PREDICTION_TYPES:
        for steps in STEPS:
            expected = reason(solver, kind, prediction_type, steps)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # no division by zero on the way either
                if expected is None:
                    assert sum(build(solver, SCHEDULES[kind], steps, prediction_type=prediction_type).ev) >= steps
                else:
                    with pytest.raises(ValueError, match=expected):
                        build(solver, SCHEDULES[kind], steps, prediction_type=prediction_type)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("euler", {"s_churn": -1.0}, "s_churn is -1"),
        ("edm", {"s_tmin": 3.0, "s_tmax": 2.0}, "s_tmin=3.0 and s_tmax=2.0"),
        ("edm", {"s_noise": float("nan")}, "s_noise is nan"),
        ("euler_a", {"eta": -0.1}, "eta is -0.1"),
        ("kdpm2_a", {"eta": 1.1}, "eta is 1.1"),
        ("lms", {"order": 5}, "order is 5"),
        ("lms", {"order": 0}, "order is 0"),
        ("lcm", {"timestep_scaling": 0.0}, "timestep_scaling=0.0"),
        ("lcm", {"original_inference_steps": 3}, "original_inference_steps = 3"),
        ("tcd", {"eta": 2.0}, "eta is 2.0"),
        ("consistency", {"prediction_type": "edm", "boundary_sigma": 2.0}, "boundary_sigma=2.0 is above"),
        ("heun", {"sigma_min": 0.5}, "sigma_min=0.5 and sigma_max=None need"),
        ("heun", {"final_sigmas_type": "one"}, "final_sigmas_type is 'one', accepted are zero, sigma_min"),
        ("repaint", {"jump_length": 0}, "jump_length is 0"),
        ("repaint", {"jump_n_sample": True}, "jump_n_sample is True"),
        ("repaint", {"inpaint": True}, "do not keep the known part"),
        ("heun", {"s_churn": 1.0}, "no option 's_churn', it takes none"),
        ("ddim_inverse", {"eta": 1.0}, "no option 'eta'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(solver, options, message):
    with pytest.raises(ValueError, match=message):
        build(solver, SCHEDULES["vp"], 5, **options)


@pytest.mark.parametrize("solver", names())
def test_every_solver_refuses_an_option_it_does_not_know(solver):
    with pytest.raises(ValueError, match=f"solver '{solver}' has no option 'churned'"):
        build(solver, SCHEDULES["vp"], 5, churned=1)
