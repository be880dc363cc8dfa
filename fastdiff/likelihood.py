"""How well a model knows images: its variational bound and its loss by timestep; `fastdiff eval likelihood`.

The noise of an image is a function of (seed, index, timestep): results do not depend on the size of a batch but for
the rounding of the model.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff import superres
from fastdiff.checkpoint import Checkpoint, load_model
from fastdiff.data import Dataset, load_dataset
from fastdiff.device import resolve_device
from fastdiff.environment import versions
from fastdiff.eval_config import EvalLikelihoodConfig
from fastdiff.generate import find_checkpoint
from fastdiff.kernels.mse import mse
from fastdiff.kernels.q_sample import q_sample
from fastdiff.loss import EVALUATION_EPOCH
from fastdiff.prediction import FloatArray, model_input_scale, prediction_target
from fastdiff.schedule import NoiseSchedule

Model = Callable[..., Tensor]
# The noise of timestep t is draw FIRST_DRAW - t: no epoch of training, nor that of the held-out loss.
FIRST_DRAW = EVALUATION_EPOCH - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Bound:
    """The terms of Ho et al. 2020, equation 5, in bits a dimension, float64 on the CPU.

    prior: [B] KL(q(x_T | x_0) || N(0, I)). terms: [B, N]; column t >= 1 is KL(q(x_{t-1} | x_t, x_0) ||
    p(x_{t-1} | x_t)), column 0 the decoder's -log p(x_0 | x_1), both at one draw of x_t.
    """

    prior: Tensor
    terms: Tensor

    @property
    def total(self) -> Tensor:
        """[B] an upper bound on the negative log-likelihood, but for the noise of one draw."""
        return self.prior + self.terms.sum(1)


@torch.no_grad()
def variational_bound(
    model: Model,
    schedule: NoiseSchedule,
    prediction_type: str,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    condition: Callable[[Tensor], Tensor] | None = None,
    variance: str = "fixed_large",
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Bound:
    """The bound of each image: one model call a timestep, at one draw of noise.

    The prediction of x_0 is clipped to [-1, 1]. The decoder is the Gaussian of x_0 given x_1 integrated over each
    pixel's bin (equation 13), with the normal distribution function itself, where published code approximates it by a
    tanh and takes no probability for less than 1e-12.

    Args:
        model: called as model(x_t, t, class_labels=..., condition=...), with the keywords that are given.
        schedule, prediction_type: as in training; a "vp" schedule, because the others have no steps to bound.
        images: uint8 [B, C, H, W]; labels: int64 [B].
        condition: makes what the model is shown of a batch of images.
        variance: "fixed_large" is beta, "fixed_small" that of the posterior (Ho et al. 2020, section 3.2). The decoder
            has the posterior's at timestep 1 with both, as that at 0 is 0.
        batch_size: images at once.

    Raises ValueError for another schedule, and for one that ends in pure noise with a model that predicts the noise.
    """
    if schedule.kind != "vp":
        raise ValueError(f"bits_per_dim needs a schedule of kind vp, this model's is {schedule.kind}")
    total = schedule.num_train_timesteps
    from_input, from_output = _x0_coefficients(schedule, prediction_type)
    precision, constant = _kl_coefficients(schedule, variance)
    decoder_std = float(np.exp(0.5 * schedule.posterior_log_variance_clipped[0]))
    table = schedule.training_table(prediction_type, images.device)
    conditions = _timestep_conditions(schedule, prediction_type, images.device)
    priors, rows = [], []
    bar = tqdm(total=-(-len(images) // batch_size) * total, unit=" steps", disable=not progress)
    for indices, kwargs in _batches(images, labels, condition, batch_size):
        part = images[indices]
        x0 = part.double() * (2 / 255) - 1
        terms = torch.empty(len(part), total, dtype=torch.float64, device=images.device)
        for step in range(total):
            t = torch.full_like(indices, step)
            x_t = q_sample(part, t, table, seed=seed, sample_indices=indices, draw=FIRST_DRAW - step)
            output = model(x_t, conditions[t], **kwargs).double()
            predicted = (from_input[step] * x_t.double() + from_output[step] * output).clamp(-1, 1)
            if step == 0:
                nats = -pixel_log_probability(x0, predicted, decoder_std)
            else:
                nats = precision[step] * (x0 - predicted) ** 2 + constant[step]
            terms[:, step] = nats.flatten(1).mean(1)
            bar.update()
        end_mean, end_variance = schedule.alpha[-1] * x0, float(schedule.sigma[-1] ** 2)
        priors.append((0.5 * (end_variance + end_mean**2 - 1 - math.log(end_variance))).flatten(1).mean(1).cpu())
        rows.append(terms.cpu())
    bar.close()
    return Bound(prior=torch.cat(priors) / math.log(2), terms=torch.cat(rows) / math.log(2))


@torch.no_grad()
def loss_by_timestep(
    model: Model,
    schedule: NoiseSchedule,
    prediction_type: str,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    condition: Callable[[Tensor], Tensor] | None = None,
    bins: int = 10,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Mean squared error of the model's output, unweighted, float32 [B, bins] on the CPU.

    Bin i is the timesteps [i N / bins, (i + 1) N / bins), rounded down. An image has one timestep in each; over the
    images they spread evenly, as in `DiffusionLoss.evaluate`. Other arguments as in `variational_bound`, of any
    schedule. Raises ValueError for more bins than timesteps.
    """
    edges = bin_edges(schedule, bins)
    table = schedule.training_table(prediction_type, images.device)
    conditions = _timestep_conditions(schedule, prediction_type, images.device)
    fractions = torch.arange(len(images), dtype=torch.float64) * ((5**0.5 - 1) / 2) % 1
    losses = []
    for indices, kwargs in _batches(images, labels, condition, batch_size):
        part, columns = images[indices], []
        for low, high in itertools.pairwise(edges):
            t = low + (fractions[indices.cpu()] * (high - low)).long().to(images.device)
            draw = FIRST_DRAW - t
            x_t = q_sample(part, t, table, seed=seed, sample_indices=indices, draw=draw)
            output = model(x_t, conditions[t], **kwargs)
            loss, _ = mse(output, part, t, table, target=prediction_type, seed=seed, sample_indices=indices, draw=draw)
            columns.append(loss)
        losses.append(torch.stack(columns, 1).cpu())
    return torch.cat(losses)


def bin_edges(schedule: NoiseSchedule, bins: int) -> list[int]:
    """Timesteps, bins + 1 of them, from 0 to N."""
    total = schedule.num_train_timesteps
    if not 1 <= bins <= total:
        raise ValueError(f"bins must be 1 to {total}, the timesteps of this model, got {bins}")
    return [i * total // bins for i in range(bins + 1)]


def _batches(
    images: Tensor, labels: Tensor | None, condition: Callable[[Tensor], Tensor] | None, batch_size: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Indices int64 [<= batch_size] on the device of the images, and what the model is given besides x_t and t."""
    for indices in torch.arange(len(images), device=images.device).split(batch_size):
        kwargs = {} if labels is None else {"class_labels": labels[indices]}
        if condition is not None:
            kwargs["condition"] = condition(images[indices])
        yield indices, kwargs


def _timestep_conditions(schedule: NoiseSchedule, prediction_type: str, device: torch.device) -> Tensor:
    """float32 [N], what the model is told."""
    return torch.tensor(schedule.timestep_condition(prediction_type), dtype=torch.float32, device=device)


def _x0_coefficients(schedule: NoiseSchedule, prediction_type: str) -> tuple[FloatArray, FloatArray]:
    """(a, b) with x_0 = a * input + b * output of a model without error, [N] each."""
    alpha, sigma = schedule.alpha, schedule.sigma
    scale = model_input_scale(prediction_type, alpha, sigma, schedule.sigma_data)
    target_x0, target_eps = prediction_target(prediction_type, alpha, sigma, schedule.sigma_data)
    determinant = scale * (target_eps * alpha - target_x0 * sigma)
    if not determinant.all():
        raise ValueError(
            f"bits_per_dim is undefined for prediction_type={prediction_type!r} where alpha = 0: it does not tell x_0"
        )
    return target_eps / determinant, -scale * sigma / determinant


def _kl_coefficients(schedule: NoiseSchedule, variance: str) -> tuple[FloatArray, FloatArray]:
    """(p, c) with KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) = p * (x_0 - predicted x_0)² + c, [N] each, t >= 1.

    Both Gaussians have the mean of Ho et al. 2020, equation 7, one with the true and one with the predicted x_0.
    """
    if variance not in ("fixed_large", "fixed_small"):
        raise ValueError(f"variance must be fixed_large or fixed_small, got {variance!r}")
    true = np.exp(schedule.posterior_log_variance_clipped)
    step = schedule.betas if variance == "fixed_large" else true
    ratio = true / step
    return 0.5 * schedule.posterior_mean_coef1**2 / step, 0.5 * (ratio - 1 - np.log(ratio))


def pixel_log_probability(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log of the mass of N(mean, std²) in the bins of 8-bit pixels x in [-1, 1], like x; exact far from the mean too.

    A bin reaches 1 / 255 to both sides, the first and the last to infinity (Ho et al. 2020, equation 13).
    """
    low = torch.where(x < -0.999, -math.inf, (x - 1 / 255 - mean) / std)
    high = torch.where(x > 0.999, math.inf, (x + 1 / 255 - mean) / std)
    # on the left of the mean nothing is lost by rounding: mirror what lies on the right
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log1p(-torch.exp(lower - upper))


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Means over images, each with the standard error that the choice of images gives it.

    bits_per_dim, prior_bits_per_dim, decoder_bits_per_dim: the bound and its first and last part, None where it was
    left out. losses: for each bin its first timestep, the one after its last, the mean squared error of the model's
    output and its standard error.
    """

    bits_per_dim: float | None
    bits_per_dim_standard_error: float | None
    prior_bits_per_dim: float | None
    decoder_bits_per_dim: float | None
    variance: str | None
    losses: tuple[tuple[int, int, float, float], ...]
    prediction_type: str
    checkpoint: str
    dataset: str
    num_images: int
    seed: int
    device: str
    versions: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        names = ("first_timestep", "stop_timestep", "mean_squared_error", "standard_error")
        return {**self.__dict__, "losses": [dict(zip(names, row)) for row in self.losses]}

    def describe(self) -> str:
        """A table."""
        lines = [f"{self.num_images:,} images of {self.dataset}, {self.checkpoint}"]
        if self.bits_per_dim is not None:
            lines.append(
                f"bits/dim  {self.bits_per_dim:.4f} ± {self.bits_per_dim_standard_error:.4f} (variational bound, "
                f"{self.variance}; prior {self.prior_bits_per_dim:.2g}, decoder {self.decoder_bits_per_dim:.4f})"
            )
        lines += ["", f"timesteps    mean squared error ({self.prediction_type})"]
        for first, stop, loss, error in self.losses:
            lines.append(f"{first:>4} - {stop - 1:<4}  {loss:.5f} ± {error:.5f}")
        return "\n".join(lines)


def evaluate_likelihood(config: EvalLikelihoodConfig, *, progress: bool = False) -> Likelihood:
    """Evaluate a checkpoint. Raises ValueError naming the option that does not fit it, and CheckpointError."""
    device = resolve_device(config.device)
    directory = find_checkpoint(config.checkpoint)
    loaded = load_model(directory, device=device, weights=config.weights)
    dataset = _dataset(config, loaded).to(device)
    images, labels = dataset.images[: config.num], dataset.labels
    labels = None if labels is None or loaded.model.config.num_classes is None else labels[: config.num]
    shown = None
    if loaded.config.get("task") == "superres":
        shown = functools.partial(superres.condition, factor=loaded.config["superres_factor"])
    arguments = (loaded.model, loaded.schedule, loaded.prediction_type, images, labels)
    common: dict[str, Any] = {"condition": shown, "seed": config.seed, "batch_size": config.batch_size}
    edges = bin_edges(loaded.schedule, config.bins)
    bound = None
    if config.bits_per_dim:
        bound = variational_bound(*arguments, **common, variance=config.variance, progress=progress)
    losses = loss_by_timestep(*arguments, **common, bins=config.bins).double()
    result = Likelihood(
        bits_per_dim=None if bound is None else bound.total.mean().item(),
        bits_per_dim_standard_error=None if bound is None else _standard_error(bound.total),
        prior_bits_per_dim=None if bound is None else bound.prior.mean().item(),
        decoder_bits_per_dim=None if bound is None else bound.terms[:, 0].mean().item(),
        variance=None if bound is None else config.variance,
        losses=tuple(
            (first, stop, column.mean().item(), _standard_error(column))
            for (first, stop), column in zip(itertools.pairwise(edges), losses.T)
        ),
        prediction_type=loaded.prediction_type,
        checkpoint=str(directory),
        dataset=f"{dataset.name} ({config.split})",
        num_images=len(images),
        seed=config.seed,
        device=str(device),
        versions=versions("numpy"),
    )
    if not all(math.isfinite(row[2]) for row in result.losses):
        raise FloatingPointError(f"the losses of {directory} are not finite")
    return result


def _standard_error(values: Tensor) -> float:
    """Of the mean; 0 for a single value."""
    return float(values.std(correction=min(1, len(values) - 1)) / len(values) ** 0.5)


def _dataset(config: EvalLikelihoodConfig, loaded: Checkpoint) -> Dataset:
    """The images, of the shape and the classes that the model knows."""
    spec, model = config.dataset or loaded.config.get("dataset"), loaded.model.config
    if spec is None:
        raise ValueError("dataset must be given: the checkpoint does not say what it was trained on")
    if model.out_channels != model.in_channels:
        raise ValueError(
            "likelihood takes models of a fixed variance, this one predicts more channels than it is given"
        )
    dataset = load_dataset(spec, split=config.split, image_size=model.sample_size, root=config.data_root)
    if dataset.image_shape[0] != model.in_channels:
        raise ValueError(
            f"dataset {spec} has images of {dataset.image_shape[0]} channels, this model takes {model.in_channels}"
        )
    if model.num_classes is not None and dataset.num_classes != model.num_classes:
        raise ValueError(
            f"dataset {spec} has {dataset.num_classes or 'no'} classes, this model was trained with {model.num_classes}"
        )
    return dataset
