import itertools

import numpy as np
import pytest
import torch

from fastdiff.loss import DiffusionLoss, loss_weights
from fastdiff.noise import normal
from fastdiff.schedule import NoiseSchedule

LENGTH = 100
SCHEDULES = {
    "linear": NoiseSchedule.linear(num_train_timesteps=LENGTH),
    "zero_terminal_snr": NoiseSchedule.scaled_linear(num_train_timesteps=LENGTH).rescale_zero_terminal_snr(),
    "flow": NoiseSchedule.flow(num_train_timesteps=LENGTH),
    "edm": NoiseSchedule.edm(num_train_timesteps=LENGTH),
}


def batch(size, *, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, channels, 3, 5), generator=generator, dtype=torch.uint8)
    return images, torch.arange(size) + 40, torch.arange(size) % 3


def zero_model(x, t, class_labels=None):
    return torch.zeros_like(x, requires_grad=True)


@pytest.mark.parametrize(
    ("prediction_type", "formula"),
    [
        ("epsilon", lambda snr: np.minimum(snr, 5) / snr),
        ("sample", lambda snr: np.minimum(snr, 5)),
        ("v_prediction", lambda snr: np.minimum(snr, 5) / (snr + 1)),
    ],
)
def test_min_snr_weights_are_those_of_the_paper(prediction_type, formula):
    schedule = SCHEDULES["linear"]
    weights = loss_weights(schedule, prediction_type, "min_snr", gamma=5)
    # The coefficients are float32 (6e-8 each) and enter squared, through a sum and a quotient: 20 roundings at most.
    np.testing.assert_allclose(weights, formula(schedule.snr), rtol=20 * 6e-8)


# Where alpha is 0, epsilon and edm say nothing of x0.
@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [
        *itertools.product(SCHEDULES, ["sample", "v_prediction", "flow_prediction"]),
        *itertools.product(["linear", "edm"], ["epsilon", "edm"]),
    ],
)
def test_min_snr_weighs_the_error_of_x0_alike_for_every_target(schedule, prediction_type):
    schedule = SCHEDULES[schedule]
    alpha, sigma, generator = schedule.alpha, schedule.sigma, np.random.default_rng(0)
    x0, eps, wrong_x0 = generator.standard_normal((3, LENGTH))
    table = schedule.training_table(prediction_type).double().numpy()
    # At the same x_t another x0 means another eps: the target's error is what the wrong x0 makes of it.
    inside = sigma > 1e-3  # where sigma is next to 0, x_t gives x0 away and the quotient below loses its digits
    x_t = alpha * x0 + sigma * eps
    wrong_eps = (x_t - alpha * wrong_x0)[inside] / sigma[inside]
    error = table[inside, 2] * (wrong_x0 - x0)[inside] + table[inside, 3] * (wrong_eps - eps[inside])
    weights = loss_weights(schedule, prediction_type, "min_snr", gamma=3)[inside]
    expected = np.minimum((alpha / sigma) ** 2, 3)[inside] * (wrong_x0 - x0)[inside] ** 2
    # The two terms of the target's error have one sign, so that its float32 coefficients (6e-8 each) cost it no more
    # than their own rounding, twice for the square; the weights may take 20 roundings, as above.
    np.testing.assert_allclose(weights * error**2, expected, rtol=22 * 6e-8, atol=1e-12)


def test_min_snr_at_zero_snr_is_the_limit():
    schedule = SCHEDULES["zero_terminal_snr"]
    assert schedule.snr[-1] == 0
    limits = {"epsilon": 1, "sample": 0, "v_prediction": 0}
    for prediction_type, limit in limits.items():
        weights = loss_weights(schedule, prediction_type, "min_snr")
        np.testing.assert_allclose(weights[-1], limit, atol=1e-12)
        assert np.isfinite(weights).all()


def test_uniform_weights_are_one():
    assert (loss_weights(SCHEDULES["flow"], "flow_prediction") == np.ones(LENGTH)).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction", "edm"])
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_loss_and_gradient_follow_the_definition(prediction_type, weighting):
    schedule = SCHEDULES["linear"]
    loss_of = DiffusionLoss(schedule=schedule, prediction_type=prediction_type, weighting=weighting, seed=7)
    images, indices, epochs = batch(6)
    seen = {}

    def model(x, t):
        seen.update(x=x, t=t)
        return (0.3 * x).requires_grad_()

    loss, output, grad = loss_of(model, images, None, indices, epochs, grad_scale=1 / 6)
    t = loss_of.timesteps(indices, epochs)
    noise = normal(images.shape, seed=7, sample_indices=indices, stream="train", draw=epochs).double()
    x0 = images.double() / 127.5 - 1
    a, b, c, d = schedule.training_table(prediction_type)[t].double().T.reshape(4, 6, 1, 1, 1)
    weight = torch.tensor(loss_weights(schedule, prediction_type, weighting))[t]
    error = output.double() - (c * x0 + d * noise)
    expected = weight * error.square().mean((1, 2, 3))
    # float32: products and sums of about ten roundings (6e-8 each) on values up to |x| = 5, squared.
    torch.testing.assert_close(seen["x"].double(), a * x0 + b * noise, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    expected_grad = weight.view(6, 1, 1, 1) * error * (2 / 30 / 6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen["t"], schedule.timestep_condition(prediction_type)[t], rtol=1e-6)


def test_a_sample_has_the_same_loss_in_any_batch():
    loss_of = DiffusionLoss(schedule=SCHEDULES["linear"], seed=3)
    images, indices, epochs = batch(8)
    whole, _, _ = loss_of(zero_model, images, None, indices, epochs)
    order = torch.tensor([5, 0, 3])
    part, _, _ = loss_of(zero_model, images[order], None, indices[order], epochs[order])
    assert torch.equal(part, whole[order])
    again, _, _ = loss_of(zero_model, images, None, indices, epochs + 1)
    assert not torch.isclose(again, whole).any()


def test_timesteps_are_uniform():
    loss_of = DiffusionLoss(schedule=SCHEDULES["linear"], seed=1)
    indices = torch.arange(100_000)
    counts = torch.bincount(loss_of.timesteps(indices, torch.zeros_like(indices)), minlength=LENGTH)
    # Binomial(1e5, 1/100) has standard deviation 31.5; 100 counts stay within 5 of them with probability 0.99994.
    assert len(counts) == LENGTH
    assert (counts - 1000).abs().max() < 5 * 31.5


def test_label_dropout_uses_the_null_class_at_its_rate():
    loss_of = DiffusionLoss(schedule=SCHEDULES["linear"], label_dropout=0.2, null_class=10, seed=2)
    indices = torch.arange(50_000)
    labels, epochs = indices % 10, indices % 7
    dropped = loss_of.drop_labels(labels, indices, epochs)
    changed = dropped != labels
    assert (dropped[changed] == 10).all()
    # Binomial(50000, 0.2) has standard deviation 89.
    assert abs(int(changed.sum()) - 10_000) < 5 * 89
    part = loss_of.drop_labels(labels[7:9], indices[7:9], epochs[7:9])
    assert torch.equal(part, dropped[7:9])


def test_evaluation_is_fixed_and_keeps_the_labels():
    loss_of = DiffusionLoss(schedule=SCHEDULES["linear"], label_dropout=0.9, null_class=10, weighting="min_snr")
    images, indices, _ = batch(9)
    seen = []

    def model(x, t, class_labels):
        seen.extend(class_labels.tolist())
        return torch.zeros_like(x)

    first = loss_of.evaluate(model, images, indices % 10, batch_size=4)
    second = loss_of.evaluate(model, images, indices % 10, batch_size=9)
    # Batches of another size change the order of no sum within a sample, only that of the mean: 9 roundings.
    torch.testing.assert_close(first, second, rtol=9 * 6e-8, atol=0)
    assert seen == 2 * (indices % 10).tolist()
    # Unweighted: a model that says 0 has the mean square of the noise. 270 normals: 1 with standard deviation 0.086.
    assert abs(float(first) - 1) < 5 * 0.086


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "p2"}, "weighting must be one of uniform, min_snr, got 'p2'"),
        ({"weighting": "min_snr", "gamma": 0}, "gamma must be greater than 0, got 0"),
        ({"gamma": float("nan")}, "gamma must be greater than 0, got nan"),
        ({"label_dropout": 1.5, "null_class": 3}, r"label_dropout must be in \[0, 1\], got 1.5"),
        ({"label_dropout": 0.1}, "label_dropout 0.1 needs a model with a null class"),
        ({"prediction_type": "score"}, "prediction_type is 'score'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(schedule=SCHEDULES["linear"], **options)
