"""The training objective: noise the images, ask the model, weigh its squared error.

Everything random about a sample (its timestep, its noise, whether it loses its label) is a function of (seed, sample
index, epoch), so the loss of a sample does not depend on the batch around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastdiff.kernels.mse import mse
from fastdiff.kernels.q_sample import q_sample
from fastdiff.kernels.uniform import uniform_words
from fastdiff.schedule import NoiseSchedule

WEIGHTINGS = ("uniform", "min_snr")
# Held-out noise comes from the last epoch there could be, which no training run reaches.
EVALUATION_EPOCH = 2**32 - 1


def loss_weights(
    schedule: NoiseSchedule, prediction_type: str, weighting: str = "uniform", *, gamma: float = 5.0
) -> np.ndarray:
    """The factor, float64 [N], of the squared error of the model's own output at each timestep.

    "uniform" is 1: the simple loss of Ho et al. 2020 for epsilon, lambda(sigma) = 1 / c_out^2 of Karras et al. 2022 for
    edm.

    "min_snr" weighs the squared error of x_0 by min(SNR, gamma) (Hang et al. 2023, section 3.4). An error e of the
    model's output is an error e * dx_0/dtarget of x_0, so its factor is min(SNR, gamma) * (dx_0/dtarget)^2, which is
    min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) for sample and min(SNR, gamma) / (SNR + 1) for v_prediction.

    Raises ValueError for an unknown weighting and gamma <= 0.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if not gamma > 0:
        raise ValueError(f"gamma must be greater than 0, got {gamma}")
    if weighting == "uniform":
        return np.ones(schedule.num_train_timesteps)
    table = schedule.training_table(prediction_type).double().cpu().numpy()
    input_x0, input_eps, target_x0, target_eps = table.T
    # The floor turns the two ends, zero and infinite SNR, into the limits of the formulas there.
    input_x0, input_eps = np.maximum(input_x0, 1e-30), np.maximum(input_eps, 1e-30)
    x0_per_target = input_eps / (target_x0 * input_eps - target_eps * input_x0)
    return np.minimum((input_x0 / input_eps) ** 2, gamma) * x0_per_target**2


@dataclass(frozen=True, eq=False, kw_only=True)
class DiffusionLoss:
    """The objective on one device; its tables are built once and agree with each other.

    null_class: the class index that means "no label"; needed where label_dropout > 0.
    dtype: in which the noised images are handed to the model.
    """

    schedule: NoiseSchedule
    prediction_type: str = "epsilon"
    weighting: str = "uniform"
    gamma: float = 5.0
    label_dropout: float = 0.0
    null_class: int | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    table: Tensor = field(init=False, repr=False)
    weights: Tensor = field(init=False, repr=False)
    timestep_conditions: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1], got {self.label_dropout}")
        if self.label_dropout > 0 and self.null_class is None:
            raise ValueError(f"label_dropout {self.label_dropout} needs a model with a null class")
        weights = loss_weights(self.schedule, self.prediction_type, self.weighting, gamma=self.gamma)
        conditions = self.schedule.timestep_condition(self.prediction_type)
        tables = {
            "table": self.schedule.training_table(self.prediction_type, self.device),
            "weights": torch.tensor(weights, dtype=torch.float32, device=self.device),
            "timestep_conditions": torch.tensor(conditions, dtype=torch.float32, device=self.device),
        }
        for name, value in tables.items():
            object.__setattr__(self, name, value)

    def timesteps(self, sample_indices: Tensor, epochs: Tensor) -> Tensor:
        """Uniform timesteps int64 [B] in [0, N)."""
        word = uniform_words(self.seed, sample_indices, stream="timestep", draw=epochs)[0]
        return (word * self.schedule.num_train_timesteps) >> 32

    def drop_labels(self, labels: Tensor, sample_indices: Tensor, epochs: Tensor) -> Tensor:
        """Replace a fraction `label_dropout` of `labels` int64 [B] by the null class (Ho & Salimans 2022)."""
        if self.null_class is None or self.label_dropout == 0:
            return labels
        word = uniform_words(self.seed, sample_indices, stream="label_dropout", draw=epochs)[0]
        return labels.masked_fill(word < round(self.label_dropout * 2**32), self.null_class)

    def __call__(
        self,
        model: Callable[..., Tensor],
        images: Tensor,
        labels: Tensor | None,
        sample_indices: Tensor,
        epochs: Tensor,
        *,
        condition: Tensor | None = None,
        model_kwargs: Mapping[str, Tensor] | None = None,
        grad_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted loss float32 [B], the model's output, and grad_scale * d loss[b] / d output, like the output.

        images: uint8 (or float in [-1, 1]) [B, C, H, W]; labels int64 [B] or None; sample_indices, epochs int64 [B];
        condition: what the model takes under this name, or None. model_kwargs: what else it takes, by name.
        To train, call `output.backward(gradient=grad)`: the gradient comes with the loss, in the same pass.
        """
        t = self.timesteps(sample_indices, epochs)
        if labels is not None:
            labels = self.drop_labels(labels, sample_indices, epochs)
        kwargs = {**_model_kwargs(labels, condition), **(model_kwargs or {})}
        return self._loss(model, images, kwargs, t, self.weights[t], self.seed, sample_indices, epochs, grad_scale)

    @torch.no_grad()
    def evaluate(
        self,
        model: Callable[..., Tensor],
        images: Tensor,
        labels: Tensor | None,
        *,
        condition: Tensor | None = None,
        batch_size: int = 256,
        seed: int = 0,
    ) -> Tensor:
        """Mean unweighted squared error of the model's output, a float32 scalar on the device.

        Every image has one fixed timestep and noise, so two models, or one model twice, are compared on the same
        questions. The timesteps spread evenly over all images (multiples of the golden ratio modulo 1), which random
        ones do not.
        """
        count = len(images)
        fractions = np.arange(count) * ((5**0.5 - 1) / 2) % 1
        timesteps = torch.tensor((fractions * self.schedule.num_train_timesteps).astype(np.int64), device=self.device)
        indices = torch.arange(count, device=self.device)
        epochs = torch.full_like(indices, EVALUATION_EPOCH)
        losses = []
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            kwargs = {name: value[part] for name, value in _model_kwargs(labels, condition).items()}
            loss, _, _ = self._loss(
                model, images[part], kwargs, timesteps[part], None, seed, indices[part], epochs[part], 1.0
            )
            losses.append(loss)
        return torch.cat(losses).mean()

    def _loss(
        self,
        model: Callable[..., Tensor],
        images: Tensor,
        kwargs: dict[str, Tensor],
        t: Tensor,
        weight: Tensor | None,
        seed: int,
        sample_indices: Tensor,
        epochs: Tensor,
        grad_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_t = q_sample(
            images, t, self.table, seed=seed, sample_indices=sample_indices, draw=epochs, out_dtype=self.dtype
        )
        output = model(x_t, self.timestep_conditions[t], **kwargs)
        # mse regenerates the noise instead of reading it back.
        loss, grad = mse(
            output.detach(),
            images,
            t,
            self.table,
            target=self.prediction_type,
            weight=weight,
            seed=seed,
            sample_indices=sample_indices,
            draw=epochs,
            grad_scale=grad_scale,
        )
        return loss, output, grad


def _model_kwargs(labels: Tensor | None, condition: Tensor | None) -> dict[str, Tensor]:
    given = {"class_labels": labels, "condition": condition}
    return {name: value for name, value in given.items() if value is not None}
