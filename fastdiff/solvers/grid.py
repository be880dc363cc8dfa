"""The walk of a solver: its points, and at each of them the model's conditioning and what its output says about x0."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from fastdiff.prediction import FloatArray, model_input_scale, prediction_target
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import Row

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Process:
    """The process a grid's points belong to, from which follows what the model does at further ones."""

    schedule: NoiseSchedule
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None

    def guidance(self, timesteps: FloatArray) -> FloatArray:
        """The guidance scale at training timesteps."""
        fraction = timesteps / self.schedule.num_train_timesteps
        return _guidance(self.guidance_scale, self.guidance_interval, fraction)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Points i = 0..n-1 at which the model is evaluated, from most to least noise, and the end i = n.

    At point i a solver's state is alpha[i] * x0 + sigma[i] * eps. That is the process' own x, or for an exploding grid
    x / alpha with alpha[i] = 1. (An exploding grid keeps x itself on a flow schedule, which is walked on its straight
    path, and at a point with alpha = 0, where x / alpha does not exist: a step may change from one to the other.)
    A walk normally ends at alpha = 1, sigma = 0.

    Attributes:
        alpha, sigma: [n + 1].
        t, c_in: [n] the model's conditioning, and the scale that makes the state its input.
        target: [n, 2] what the model predicts, coefficients of x0 and eps.
        x0_from, eps_from: [n, 2] coefficients of the state and of the model's output in x0 and in eps.
        gradient_scale: [n] coefficient, in the model's output, of a classifier's gradient in the process' x.
        guidance_scale: [n].
        lim: x0 is clipped to [-lim, lim].
        prediction_type, sigma_data: of the model.
        init_noise_sigma: factor of the unit noise that the walk starts from: 1 for a variance-preserving state
            (x_T ~ N(0, I), Ho et al. 2020), else sigma[0].
        process, timesteps: the schedule's part in the grid, and the points' possibly fractional training timesteps [n];
            None for a grid of bare points, which knows no others.
    """

    alpha: FloatArray
    sigma: FloatArray
    t: FloatArray
    c_in: FloatArray
    target: FloatArray
    x0_from: FloatArray
    eps_from: FloatArray
    gradient_scale: FloatArray
    guidance_scale: FloatArray
    lim: float
    prediction_type: str
    sigma_data: float
    init_noise_sigma: float
    process: Process | None = None
    timesteps: FloatArray | None = None

    @classmethod
    def over(
        cls,
        schedule: NoiseSchedule,
        timesteps: ArrayLike,
        alpha: FloatArray,
        sigma: FloatArray,
        *,
        prediction_type: str,
        exploding: bool,
        clip_sample: float | None,
        guidance_scale: float | None,
        guidance_interval: tuple[float, float] | None,
        end: tuple[float, float] = (1.0, 0.0),
    ) -> Grid:
        """The grid over points alpha, sigma [n] of the process, at possibly fractional training timesteps [n].

        Args:
            end: (alpha, sigma) of the process at the end of the walk.
        """
        index = np.asarray(timesteps, dtype=np.float64)
        alphas, sigmas = np.append(alpha, end[0]), np.append(sigma, end[1])
        # state = x / divisor
        divisor = np.where(alphas > 0, alphas, 1.0) if exploding and schedule.kind != "flow" else np.ones_like(alphas)
        alphas, sigmas = alphas / divisor, sigmas / divisor
        scale = model_input_scale(prediction_type, alpha, sigma, schedule.sigma_data)
        process = Process(schedule=schedule, guidance_scale=guidance_scale, guidance_interval=guidance_interval)
        return cls.from_points(
            alphas,
            sigmas,
            schedule.condition(prediction_type, index, alpha, sigma),
            prediction_type=prediction_type,
            c_in=scale * divisor[:-1],
            sigma_data=schedule.sigma_data,
            clip_sample=clip_sample,
            guidance_scale=process.guidance(index),
            gradient_unit=divisor[:-1],
            init_noise_sigma=1.0 if schedule.kind == "vp" and not exploding else float(sigmas[0]),
            process=process,
            timesteps=index,
        )

    @classmethod
    def from_points(
        cls,
        alpha: FloatArray,
        sigma: FloatArray,
        t: ArrayLike,
        *,
        prediction_type: str,
        c_in: ArrayLike | None = None,
        sigma_data: float = 0.5,
        clip_sample: float | None = None,
        guidance_scale: ArrayLike = 1.0,
        gradient_unit: ArrayLike = 1.0,
        init_noise_sigma: float = 1.0,
        process: Process | None = None,
        timesteps: FloatArray | None = None,
    ) -> Grid:
        """A grid from the state's own points, the end included.

        Args:
            alpha, sigma: [n + 1] of the state.
            t: [n] the model's conditioning.
            c_in: [n] scale of the state that makes it the model's input; None: the prediction type's own.
            guidance_scale: of every row, or [n].
            gradient_unit: process' x over state; a classifier's gradient is taken in the process' x.
            process, timesteps: as in the attributes, for solvers that evaluate the model between the points.

        Raises:
            ValueError: the prediction type does not determine x0 at one of the points.
        """
        alpha, sigma = np.asarray(alpha, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
        condition = np.asarray(t, dtype=np.float64)
        at, sd = alpha[:-1], sigma[:-1]
        target_x0, target_eps = prediction_target(prediction_type, at, sd, sigma_data)
        x0_from, eps_from = _solve(target_x0, target_eps, at, sd, prediction_type, condition)
        gradient_scale = -sd * np.asarray(gradient_unit) / np.where(at > 0, eps_from[:, 1], 1)
        if c_in is None:
            c_in = model_input_scale(prediction_type, at, sd, sigma_data)
        return cls(
            alpha=alpha,
            sigma=sigma,
            t=condition,
            c_in=np.broadcast_to(np.asarray(c_in, dtype=np.float64), at.shape),
            target=np.stack([target_x0, target_eps], axis=1),
            x0_from=x0_from,
            eps_from=eps_from,
            # eps - sigma * gradient (Dhariwal and Nichol 2021, algorithm 2); at alpha = 0 the gradient is zero.
            gradient_scale=np.where(at > 0, gradient_scale, 0),
            guidance_scale=np.broadcast_to(np.asarray(guidance_scale, dtype=np.float64), at.shape),
            lim=_clip_range(clip_sample),
            prediction_type=prediction_type,
            sigma_data=sigma_data,
            init_noise_sigma=init_noise_sigma,
            process=process,
            timesteps=timesteps,
        )

    def timestep(self, i: int) -> float:
        """The training timestep of point i; ValueError for a grid of bare points."""
        return float(self._known(self.timesteps)[i])

    def level(self, timestep: float) -> tuple[float, float]:
        """(alpha, sigma) of the process at a training timestep; ValueError for a grid of bare points."""
        alpha, sigma = self._known(self.process).schedule.at([timestep])
        return float(alpha[0]), float(sigma[0])

    def point(self, alpha: float, sigma: float, *, timestep: float | None = None) -> Grid:
        """The grid of one further point (alpha, sigma) of the state, of any scale, with the end of this grid.

        Args:
            timestep: its training timestep; None: that of its signal-to-noise ratio, held inside the schedule.

        Raises:
            ValueError: a grid of bare points, which does not know the model's conditioning elsewhere; or a prediction
                type that does not determine x0 there.
        """
        process = self._known(self.process)
        schedule = process.schedule
        own_alpha, own_sigma = schedule.nearest([alpha], [sigma])
        if timestep is None:
            index = schedule.timestep_of(own_sigma if schedule.kind == "flow" else own_sigma / own_alpha)
        else:
            index = np.array([timestep])
        # process' x = divisor * state
        divisor = np.hypot(own_alpha, own_sigma) / math.hypot(alpha, sigma)
        scale = model_input_scale(self.prediction_type, own_alpha, own_sigma, self.sigma_data)
        return Grid.from_points(
            np.append(alpha, self.alpha[-1]),
            np.append(sigma, self.sigma[-1]),
            schedule.condition(self.prediction_type, index, own_alpha, own_sigma),
            prediction_type=self.prediction_type,
            c_in=scale * divisor,
            sigma_data=self.sigma_data,
            clip_sample=None if self.lim == math.inf else self.lim,
            guidance_scale=process.guidance(index),
            gradient_unit=divisor,
            process=process,
            timesteps=index,
        )

    def told(self, i: int, alpha: float, sigma: float) -> Grid:
        """The grid of one state (alpha, sigma) for which the model is told that it is at point i.

        Raises:
            ValueError: state and output together do not determine x0 and eps.
        """
        one = slice(i, i + 1)
        state = np.array([alpha]), np.array([sigma])
        target_x0, target_eps = self.target[one].T
        x0_from, eps_from = _solve(target_x0, target_eps, *state, self.prediction_type, self.t[one])
        return replace(
            self,
            alpha=np.append(state[0], self.alpha[-1]),
            sigma=np.append(state[1], self.sigma[-1]),
            t=self.t[one],
            c_in=self.c_in[one],
            target=self.target[one],
            x0_from=x0_from,
            eps_from=eps_from,
            gradient_scale=self.gradient_scale[one],
            guidance_scale=self.guidance_scale[one],
            timesteps=None if self.timesteps is None else self.timesteps[one],
        )

    @staticmethod
    def _known(value: T | None) -> T:
        if value is None:
            raise ValueError("this grid knows its own points only, and the solver needs the process between them")
        return value

    def __len__(self) -> int:
        return len(self.t)

    @property
    def log_snr(self) -> FloatArray:
        """[n + 1] lambda = ln(alpha / sigma), -inf where alpha = 0 and inf at the end."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    def row(self, i: int, **columns: Any) -> Row:
        """A row that evaluates the model at point i, with the solver's own columns."""
        px, pm = self.x0_from[i].tolist()
        point: dict[str, Any] = {
            "t": float(self.t[i]),
            "c_in": float(self.c_in[i]),
            "px": px,
            "pm": pm,
            "lim": self.lim,
            "g": float(self.guidance_scale[i]),
            "mg": float(self.gradient_scale[i]),
            "at": (float(self.alpha[i]), float(self.sigma[i])),
        }
        return Row(**(point | columns))

    def epsilon(self, i: int, *, clipped: bool = False) -> tuple[float, float, float]:
        """eps at point i as coefficients of (state, x0, model output); clipped: consistent with the clipped x0."""
        if clipped:
            return 1 / float(self.sigma[i]), -float(self.alpha[i] / self.sigma[i]), 0.0
        from_x, from_m = self.eps_from[i].tolist()
        return from_x, 0.0, from_m

    def posterior(self, i: int) -> tuple[float, float, float, float]:
        """The Gaussian q(x_next | x, x0) from point i to i + 1 for any alpha and sigma.

        With alpha_ts = alpha / alpha_next and the transition's variance beta = sigma² - alpha_ts² * sigma_next² (Kingma
        et al. 2021, appendix A.2), mean and variance follow from Bayes' rule; a variance-preserving process gives
        equations 6 and 7 of Ho et al. 2020.

        Returns:
            coefficient of x, coefficient of x0, variance, and the variance if x0 were not known but x0 ~ N(0, I), which
            is beta for a variance-preserving process (Ho et al. 2020, section 3.2).
        """
        alpha_ts = self.alpha[i] / self.alpha[i + 1]
        variance, variance_next = self.sigma[i] ** 2, self.sigma[i + 1] ** 2
        total, total_next = variance + self.alpha[i] ** 2, variance_next + self.alpha[i + 1] ** 2
        beta = max(variance - alpha_ts**2 * variance_next, 0.0)
        return (
            float(alpha_ts * variance_next / variance),
            float(self.alpha[i + 1] * beta / variance),
            float(beta * variance_next / variance),
            float(beta * total_next / total),
        )

    def split_noise(self, i: int, eta: float) -> tuple[float, float]:
        """(sigma_down, sigma_up) of a step from point i: sigma_down² + sigma_up² = sigma_next².

        sigma_up is eta in [0, 1] times the posterior's standard deviation, so eta = 1 is an ancestral step.

        Raises:
            ValueError: eta is not in [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}, accepted is [0, 1]")
        up = eta * math.sqrt(self.posterior(i)[2])
        # The part of the noise that x and x_next share; sigma_next² - up² would cancel where it is small.
        shared = self.alpha[i] * self.sigma[i + 1] / (self.alpha[i + 1] * self.sigma[i])
        return float(self.sigma[i + 1]) * math.hypot(math.sqrt(1 - eta**2), eta * float(shared)), up


def _solve(
    target_x0: FloatArray,
    target_eps: FloatArray,
    alpha: FloatArray,
    sigma: FloatArray,
    prediction_type: str,
    condition: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """x0 and eps [n, 2] in terms of state = alpha * x0 + sigma * eps and output = target_x0 * x0 + target_eps * eps."""
    determinant = alpha * target_eps - sigma * target_x0
    if not determinant.all():
        where = np.flatnonzero(determinant == 0)[0]
        if sigma[where] == 0:
            raise ValueError(
                f"prediction_type={prediction_type!r} says nothing about the noise at timestep {condition[where]:g}, "
                "where sigma = 0: use a model with another prediction type"
            )
        raise ValueError(
            f"prediction_type={prediction_type!r} does not determine x0 at timestep {condition[where]:g}, where "
            "alpha = 0 (zero signal-to-noise ratio): use a model with another prediction type, or a timestep_spacing "
            "such as 'leading' that leaves this timestep out"
        )
    x0_from = np.stack([target_eps / determinant, -sigma / determinant], axis=1)
    return x0_from, np.stack([-target_x0 / determinant, alpha / determinant], axis=1)


def _clip_range(clip_sample: float | None) -> float:
    if clip_sample is None:
        return math.inf
    if isinstance(clip_sample, bool) or not clip_sample > 0:
        raise ValueError(f"clip_sample is {clip_sample!r}, a range above 0 such as 1.0 or None is needed")
    return float(clip_sample)


def _guidance(scale: float | None, interval: tuple[float, float] | None, fraction: FloatArray) -> FloatArray:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"guidance_scale is {scale}, a finite number is needed")
    if interval is None:
        return np.full_like(fraction, 1.0 if scale is None else scale)
    if scale is None:
        raise ValueError(f"guidance_interval={interval} needs a guidance_scale")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval is {interval}, two numbers 0 <= low <= high <= 1 are needed")
    return np.where((fraction >= interval[0]) & (fraction <= interval[1]), scale, 1.0)
