"""Noise schedules: what the forward process x_t = alpha_t * x0 + sigma_t * eps is at every training timestep."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastdiff.prediction import FloatArray, check_prediction_type, model_input_scale, prediction_target
from fastdiff.spacing import SIGMA_SPACINGS, exponential_sigmas, karras_sigmas

TimestepSpacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """A forward process x_t = alpha_t * x0 + sigma_t * eps on N training timesteps, 0 (least noise) to N - 1 (most).

    Build one with `linear`, `scaled_linear`, `cosine`, `sigmoid`, `from_betas`, `flow` or `edm`.
    Every table is a read-only float64 array [N].

    Attributes:
        kind: "vp" (variance preserving, alpha² + sigma² = 1), "flow" (alpha = 1 - sigma) or "edm" (alpha = 1).
        alpha, sigma: scale of the data and of the noise; alpha is sqrt(alphas_cumprod), not 1 - beta.
        config: what `from_config` needs to build the schedule again.
        sigma_data: standard deviation of the data assumed by the "edm" prediction type (Karras et al. 2022, table 1).

    A "vp" schedule also has, under the names of guided-diffusion: betas, alphas_cumprod, alphas_cumprod_prev,
    alphas_cumprod_next, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, log_one_minus_alphas_cumprod,
    sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod, posterior_variance, posterior_log_variance_clipped,
    posterior_mean_coef1 and posterior_mean_coef2 (Ho et al. 2020, equations 4 to 7). Asking another kind for one of
    them is an AttributeError.
    """

    kind: Literal["vp", "flow", "edm"]
    alpha: FloatArray
    sigma: FloatArray
    config: Mapping[str, Any]
    sigma_data: float = 0.5
    vp_tables: Mapping[str, FloatArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for table in (self.alpha, self.sigma, *self.vp_tables.values()):
            table.setflags(write=False)

    def __getattr__(self, name: str) -> FloatArray:
        tables = self.__dict__.get("vp_tables", {})  # not yet there while copy or pickle rebuild the object
        if name in tables:
            return tables[name]
        reason = (
            ""
            if tables
            else f" (a {self.__dict__.get('kind')} schedule has no betas, nor the tables derived from them)"
        )
        raise AttributeError(f"NoiseSchedule has no attribute {name!r}{reason}")

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.config.items() if name not in ("type", "betas"))
        return f"NoiseSchedule({self.config['type']}: {settings})"

    @classmethod
    def linear(cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """betas evenly spaced from beta_start to beta_end, both in (0, 1) (Ho et al. 2020, section 4)."""
        _check_betas(num_train_timesteps, beta_start=beta_start, beta_end=beta_end)
        betas = np.linspace(beta_start, beta_end, num_train_timesteps)
        return cls._from_betas(betas, _beta_config("linear", num_train_timesteps, beta_start, beta_end))

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """sqrt(beta) evenly spaced; both ends in (0, 1) (latent diffusion, Rombach et al. 2022: 0.00085 to 0.012)."""
        _check_betas(num_train_timesteps, beta_start=beta_start, beta_end=beta_end)
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
        return cls._from_betas(betas, _beta_config("scaled_linear", num_train_timesteps, beta_start, beta_end))

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, max_beta: float = 0.999) -> NoiseSchedule:
        """alphas_cumprod follows cos², betas capped at max_beta in (0, 1) (Nichol and Dhariwal 2021, equation 17)."""
        _check_betas(num_train_timesteps, max_beta=max_beta)
        ends = np.cos((np.linspace(0, 1, num_train_timesteps + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
        config = {"type": "cosine", "num_train_timesteps": num_train_timesteps, "max_beta": max_beta}
        return cls._from_betas(np.minimum(1 - ends[1:] / ends[:-1], max_beta), config)

    @classmethod
    def sigmoid(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """betas on a logistic curve over [-6, 6], between two values in (0, 1) (GeoDiff, Xu et al. 2022)."""
        _check_betas(num_train_timesteps, beta_start=beta_start, beta_end=beta_end)
        logistic = 1 / (1 + np.exp(-np.linspace(-6, 6, num_train_timesteps)))
        betas = logistic * (beta_end - beta_start) + beta_start
        return cls._from_betas(betas, _beta_config("sigmoid", num_train_timesteps, beta_start, beta_end))

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> NoiseSchedule:
        """Any betas [N], each in (0, 1); the last one may be 1, which makes the terminal signal-to-noise ratio zero."""
        values = np.array(betas, dtype=np.float64)
        if values.ndim != 1 or values.size == 0:
            raise ValueError(
                f"betas has shape {values.shape}, a one-dimensional array with at least one value is needed"
            )
        if not ((values > 0).all() and (values[:-1] < 1).all() and values[-1] <= 1):
            raise ValueError(
                f"betas range from {values.min()} to {values.max()}, accepted is (0, 1), for the last one (0, 1]"
            )
        return cls._from_betas(values, {"type": "from_betas", "betas": values.tolist()})

    @classmethod
    def flow(cls, num_train_timesteps: int = 1000, shift: float = 1.0) -> NoiseSchedule:
        """Straight paths: alpha = 1 - sigma, sigma_t = shift * s / (1 + (shift - 1) * s) with s = (t + 1) / N.

        Rectified flow (Liu et al. 2023) with the resolution-dependent shift > 0 of Esser et al. 2024, equation 23.
        """
        _check_count(num_train_timesteps)
        _check_positive(shift=shift)
        fraction = np.arange(1, num_train_timesteps + 1) / num_train_timesteps
        sigma = shift * fraction / (1 + (shift - 1) * fraction)
        config = {"type": "flow", "num_train_timesteps": num_train_timesteps, "shift": shift}
        return cls("flow", 1 - sigma, sigma, config)

    @classmethod
    def edm(
        cls,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        num_train_timesteps: int = 1000,
    ) -> NoiseSchedule:
        """alpha = 1 and sigma spaced from sigma_min to sigma_max as in Karras et al. 2022, equation 5 with rho = 7."""
        _check_count(num_train_timesteps)
        _check_positive(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data)
        if sigma_min >= sigma_max:
            raise ValueError(f"sigma_min={sigma_min} must be less than sigma_max={sigma_max}")
        sigma = karras_sigmas(sigma_min, sigma_max, num_train_timesteps)[::-1].copy()
        limits = {"sigma_min": sigma_min, "sigma_max": sigma_max, "sigma_data": sigma_data}
        config = {"type": "edm", "num_train_timesteps": num_train_timesteps, **limits}
        return cls("edm", np.ones_like(sigma), sigma, config, sigma_data)

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """This "vp" schedule, rescaled so that alphas_cumprod ends at exactly 0 (Lin et al. 2024, algorithm 1)."""
        if self.kind != "vp" or self.num_train_timesteps < 2:
            raise ValueError(
                f"rescale_zero_terminal_snr needs a vp schedule of at least 2 timesteps, "
                f"this one is {self.kind!r} with {self.num_train_timesteps}"
            )
        root = self.sqrt_alphas_cumprod
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return self._from_betas(betas, {**self.config, "rescale_zero_terminal_snr": True}, alphas_cumprod)

    @classmethod
    def _from_betas(
        cls, betas: FloatArray, config: dict[str, Any], alphas_cumprod: FloatArray | None = None
    ) -> NoiseSchedule:
        if alphas_cumprod is None:
            alphas_cumprod = np.asarray(np.cumprod(1 - betas), dtype=np.float64)
        tables = _vp_tables(betas, alphas_cumprod)
        alpha, sigma = tables["sqrt_alphas_cumprod"], tables["sqrt_one_minus_alphas_cumprod"]
        return cls("vp", alpha, sigma, config, vp_tables=tables)

    def to_config(self) -> dict[str, Any]:
        """What `from_config` needs to build this schedule again; survives JSON without loss."""
        return json.loads(json.dumps(dict(self.config)))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule a `to_config` dictionary describes, with bit-equal tables."""
        settings = dict(config)
        kind, rescale = settings.pop("type", None), settings.pop("rescale_zero_terminal_snr", False)
        constructors: dict[Any, Callable[..., NoiseSchedule]] = {
            "linear": cls.linear,
            "scaled_linear": cls.scaled_linear,
            "cosine": cls.cosine,
            "sigmoid": cls.sigmoid,
            "from_betas": cls.from_betas,
            "flow": cls.flow,
            "edm": cls.edm,
        }
        if kind not in constructors:
            raise ValueError(f"config has type={kind!r}, accepted are {', '.join(constructors)}")
        try:
            schedule = constructors[kind](**settings)
        except TypeError as error:
            raise ValueError(f"config {dict(config)} does not describe a {kind!r} schedule: {error}") from None
        return schedule.rescale_zero_terminal_snr() if rescale else schedule

    @property
    def num_train_timesteps(self) -> int:
        """N, the number of training timesteps."""
        return len(self.alpha)

    @property
    def snr(self) -> FloatArray:
        """Signal-to-noise ratio alpha² / sigma² [N] (Kingma et al. 2021, equation 2)."""
        return (self.alpha / self.sigma) ** 2

    @property
    def noise_level(self) -> FloatArray:
        """[N] k-diffusion's sigma, which is sigma / alpha; for "flow" sigma itself, which is finite at alpha = 0."""
        if self.kind == "flow":
            return self.sigma
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    def from_noise_level(self, noise_level: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """(alpha, sigma) of this kind of process at any noise level above 0; the inverse of `noise_level`."""
        level = np.asarray(noise_level, dtype=np.float64)
        if self.kind == "flow":
            return 1 - level, level
        if self.kind == "edm":
            return np.ones_like(level), level
        return 1 / np.hypot(1, level), 1 / np.hypot(1, 1 / level)

    def nearest(self, alpha: ArrayLike, sigma: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """(alpha, sigma) of this kind of process with the signal-to-noise ratio of the given ones, of any scale."""
        alpha, sigma = np.asarray(alpha, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
        if self.kind == "edm" and not alpha.all():
            raise ValueError("an edm schedule has alpha = 1: no point of it has alpha = 0")
        scale = {"vp": np.hypot(alpha, sigma), "flow": alpha + sigma, "edm": alpha}[self.kind]
        return alpha / scale, sigma / scale

    def at(self, timesteps: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """(alpha, sigma) at timesteps in [0, N - 1]; between two of them the noise level is interpolated linearly."""
        index = np.asarray(timesteps, dtype=np.float64)
        if not ((index >= 0) & (index <= self.num_train_timesteps - 1)).all():
            raise ValueError(f"timesteps are {index}, accepted is [0, {self.num_train_timesteps - 1}]")
        whole = np.round(index).astype(np.int64)
        if (whole == index).all():
            return self.alpha[whole], self.sigma[whole]
        alpha, sigma = self.from_noise_level(np.interp(index, np.arange(self.num_train_timesteps), self.noise_level))
        exact = whole == index  # keeps alpha = 0, where the noise level is infinite
        return np.where(exact, self.alpha[whole], alpha), np.where(exact, self.sigma[whole], sigma)

    def timestep_of(self, noise_level: ArrayLike) -> FloatArray:
        """The fractional timestep of a noise level > 0, interpolated in its logarithm and held inside [0, N - 1]."""
        level = np.asarray(noise_level, dtype=np.float64)
        return np.interp(np.log(level), np.log(self.noise_level), np.arange(self.num_train_timesteps))

    def timesteps(
        self,
        num_inference_steps: int,
        spacing: str = "trailing",
        *,
        steps_offset: int = 0,
        extra_point: bool = False,
        rounded: bool = True,
        original_inference_steps: int | None = None,
    ) -> NDArray[Any]:
        """Training timesteps [num_inference_steps] from most to least noise (Lin et al. 2024, table 2).

        Args:
            num_inference_steps: 1 to N.
            spacing: "trailing" starts at N - 1; "linspace" spans [0, N - 1]; "leading" ends at 0 and so misses the
                noisiest timesteps. One step of "linspace" is N - 1 (diffusers takes 0 there, which is no noise at all).
            steps_offset: added to "leading" timesteps, for models trained that way.
            extra_point: lay out one point more and leave out the last, as DPM-Solver does for "linspace" and "leading";
                with num_inference_steps = N there is no further timestep and all N are taken.
            rounded: int64 timesteps; False keeps "linspace" fractional (float64), as k-diffusion does.
            original_inference_steps: take every so manieth timestep of a walk of this many steps, at least
                num_inference_steps: models distilled from such a walk know no others (Luo et al. 2023, section 4.3).
        """
        total, steps = self.num_train_timesteps, num_inference_steps
        _check_steps(steps, total)
        if original_inference_steps is not None:
            if steps > original_inference_steps:
                raise ValueError(
                    f"num_inference_steps is {steps}, accepted are 1 to original_inference_steps = "
                    f"{original_inference_steps}"
                )
            all_of_them = self.timesteps(original_inference_steps, spacing, steps_offset=steps_offset, rounded=rounded)
            return all_of_them[np.arange(steps) * original_inference_steps // steps]
        if spacing not in get_args(TimestepSpacing):
            raise ValueError(f"timestep_spacing is {spacing!r}, accepted are {', '.join(get_args(TimestepSpacing))}")
        points = steps + 1 if extra_point and steps < total else steps
        if spacing == "linspace":
            exact = np.linspace(0, total - 1, points)[::-1] if points > 1 else np.array([total - 1.0])
        elif spacing == "leading":
            exact = (np.arange(points) * (total // points))[::-1] + float(steps_offset)
        else:
            # Rounding in the sum of arange may add a point below 1.
            exact = np.arange(total, 0, -total / steps)[:steps].round() - 1
        chosen = exact[:steps].round().astype(np.int64) if rounded else exact[:steps].astype(np.float64)
        if chosen.min() < 0 or chosen.max() > total - 1:
            raise ValueError(f"steps_offset={steps_offset} moves timesteps out of [0, {total - 1}]")
        return chosen

    def sigmas(
        self,
        num_inference_steps: int,
        spacing: str,
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> FloatArray:
        """Noise levels [num_inference_steps], falling, over the schedule's range or [sigma_min, sigma_max].

        spacing is "karras", "exponential", "beta" or "logsnr": see `fastdiff.spacing`.
        """
        _check_steps(num_inference_steps, self.num_train_timesteps)
        if spacing not in SIGMA_SPACINGS:
            raise ValueError(f"sigma_spacing is {spacing!r}, accepted are {', '.join(SIGMA_SPACINGS)} and None")
        low = float(self.noise_level[0]) if sigma_min is None else sigma_min
        high = float(self.noise_level[-1]) if sigma_max is None else sigma_max
        if not math.isfinite(high):
            raise ValueError(
                f"sigma_spacing={spacing!r} needs a finite largest noise level, but alpha = 0 at the last timestep; "
                "use a timestep spacing or give sigma_max"
            )
        if not 0 < low <= high:
            raise ValueError(f"sigma_min={low} and sigma_max={high} are not 0 < sigma_min <= sigma_max")
        if spacing == "logsnr" and self.kind == "flow":
            if high >= 1:
                raise ValueError("sigma_spacing='logsnr' needs alpha > 0 everywhere: give a sigma_max below 1")
            ratio = exponential_sigmas(low / (1 - low), high / (1 - high), num_inference_steps)
            return ratio / (1 + ratio)
        return SIGMA_SPACINGS[spacing](low, high, num_inference_steps)

    def condition(self, prediction_type: str, timesteps: ArrayLike, alpha: FloatArray, sigma: FloatArray) -> FloatArray:
        """What a model is told at points with these, possibly fractional, timesteps.

        "edm": ln(sigma / alpha) / 4 (Karras et al. 2022, table 1), a ValueError where alpha = 0. Other prediction
        types: sigma * N on a flow schedule (as diffusers' flow matching), else the timestep itself.
        """
        if check_prediction_type(prediction_type) == "edm":
            if not alpha.all():
                raise ValueError("prediction_type='edm' is undefined where alpha = 0: sigma / alpha is infinite there")
            return np.log(sigma / alpha) / 4
        if self.kind == "flow":
            return sigma * self.num_train_timesteps
        return np.asarray(timesteps, dtype=np.float64)

    def timestep_condition(self, prediction_type: str) -> FloatArray:
        """`condition` at every training timestep, float64 [N]."""
        return self.condition(prediction_type, np.arange(self.num_train_timesteps), self.alpha, self.sigma)

    def training_table(self, prediction_type: str, device: torch.device | str | None = None) -> torch.Tensor:
        """float32 [N, 4], columns input_x0, input_eps, target_x0, target_eps.

        The model's input is input_x0 * x0 + input_eps * eps, its target target_x0 * x0 + target_eps * eps.
        """
        self.timestep_condition(prediction_type)  # raises where the model could not be told the noise level
        scale = model_input_scale(prediction_type, self.alpha, self.sigma, self.sigma_data)
        target = prediction_target(prediction_type, self.alpha, self.sigma, self.sigma_data)
        columns = np.stack(np.broadcast_arrays(scale * self.alpha, scale * self.sigma, *target), axis=1)
        return torch.from_numpy(columns).to(device=device, dtype=torch.float32)


def _vp_tables(betas: FloatArray, alphas_cumprod: FloatArray) -> dict[str, FloatArray]:
    previous = np.append(1.0, alphas_cumprod[:-1])
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    with np.errstate(divide="ignore"):
        return {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": previous,
            "alphas_cumprod_next": np.append(alphas_cumprod[1:], 0.0),
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
            "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
            "posterior_variance": variance,
            # The first variance is 0; like guided-diffusion, its logarithm is that of the second.
            "posterior_log_variance_clipped": np.log(
                np.append(variance[1:2] if len(variance) > 1 else 1e-20, variance[1:])
            ),
            "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alphas_cumprod),
            "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
        }


def _check_count(num_train_timesteps: int) -> None:
    if not isinstance(num_train_timesteps, (int, np.integer)) or num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps is {num_train_timesteps!r}, an integer of at least 1 is needed")


def _check_betas(num_train_timesteps: int, **betas: float) -> None:
    _check_count(num_train_timesteps)
    for name, value in betas.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}, accepted is (0, 1)")


def _beta_config(kind: str, num_train_timesteps: int, beta_start: float, beta_end: float) -> dict[str, Any]:
    return {"type": kind, "num_train_timesteps": num_train_timesteps, "beta_start": beta_start, "beta_end": beta_end}


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, a finite number above 0 is needed")


def _check_steps(num_inference_steps: int, num_train_timesteps: int) -> None:
    if not isinstance(num_inference_steps, (int, np.integer)) or not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps!r}, accepted are the integers 1 to {num_train_timesteps} "
            "(num_train_timesteps)"
        )
