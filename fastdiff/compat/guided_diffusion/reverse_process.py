"""The steps from x_t to x_{t-1} (Ho et al. 2020; Nichol and Dhariwal 2021; Song et al. 2021) and the walks they make.

A step besides the model is the noise and one fused op. It is made of `p_mean_variance` and its like in plain PyTorch
where there is a `denoised_fn`, a `cond_fn` of DDIM (which moves x_0 after it was clipped), or a subclass that overrides
`p_mean_variance`, `condition_mean` or `condition_score`. Arithmetic and results are in float32, also for samples of a
lower precision, and in float64 for float64 ones. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.compat.guided_diffusion.forward_process import ForwardProcess, arithmetic_dtype
from fastdiff.compat.guided_diffusion.model_types import ModelMeanType, ModelVarType
from fastdiff.compat.guided_diffusion.rows import ddim_reverse_rows, ddim_rows, fixed_variance, p_sample_rows
from fastdiff.kernels.solver_step import solver_step
from fastdiff.prediction import FloatArray

Function = Callable[..., Tensor]
ModelKwargs = dict[str, Any] | None


class ReverseProcess(ForwardProcess):
    """p(x_{t-1} | x_t) of a model and the samples it draws; see `GaussianDiffusion`."""

    def __init__(
        self,
        betas: ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        rescale_timesteps: bool,
    ) -> None:
        super().__init__(betas)
        self.model_mean_type = ModelMeanType(model_mean_type)
        self.model_var_type = ModelVarType(model_var_type)
        self.rescale_timesteps = rescale_timesteps
        self._learned = self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        variance, log_variance = fixed_variance(self.schedule, self.model_var_type.name)
        self._tables |= {"variance": variance, "log_variance": log_variance}

    def p_mean_variance(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t) and the prediction of x_0, all of the shape of x.

        Returns:
            "mean", "variance", "log_variance" and "pred_xstart", which is clipped to [-1, 1] if clip_denoised.
        """
        model_output = self._evaluate(model, x, t, model_kwargs)
        log_variance = self._log_variance(model_output, x, t)
        # a fixed variance may be 0 at t = 0, where its logarithm is clipped
        variance = log_variance.exp() if self._learned else self._extract("variance", t, x)
        mean = model_output[:, : x.shape[1]]
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            pred_xstart = self._predict_xstart_from_xprev(x, t, mean)
        elif self.model_mean_type == ModelMeanType.START_X:
            pred_xstart = mean
        else:
            pred_xstart = self._predict_xstart_from_eps(x, t, mean)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        if self.model_mean_type != ModelMeanType.PREVIOUS_X:
            mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        variance, log_variance = variance.expand(x.shape), log_variance.expand(x.shape)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _wrap_model(self, model: Function) -> Function:
        return model

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def _evaluate(self, model: Function, x: Tensor, t: Tensor, model_kwargs: ModelKwargs) -> Tensor:
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be of shape [{x.shape[0]}], a timestep for each sample, got {list(t.shape)}")
        model_output = self._wrap_model(model)(x, self._scale_timesteps(t), **(model_kwargs or {}))
        shape = (x.shape[0], x.shape[1] * (2 if self._learned else 1), *x.shape[2:])
        if model_output.shape != shape:
            raise ValueError(
                f"model must return {list(shape)} for model_var_type={self.model_var_type.name}, "
                f"got {list(model_output.shape)}"
            )
        return model_output

    def _log_variance(self, model_output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The logarithm of the variance of p(x_{t-1} | x_t), broadcasting with x."""
        if self.model_var_type == ModelVarType.LEARNED:
            return model_output[:, x.shape[1] :]
        if self.model_var_type == ModelVarType.LEARNED_RANGE:  # Nichol and Dhariwal 2021, equation 15
            low = self._extract("posterior_log_variance_clipped", t, x)
            return low + (model_output[:, x.shape[1] :] + 1) / 2 * (self._extract("log_betas", t, x) - low)
        return self._extract("log_variance", t, x)

    def condition_mean(
        self,
        cond_fn: Function,
        p_mean_var: dict[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
    ) -> Tensor:
        """The mean of `p_mean_variance` moved by variance * gradient (Dhariwal and Nichol 2021, algorithm 1)."""
        return p_mean_var["mean"] + p_mean_var["variance"] * self._gradient(cond_fn, x, t, model_kwargs)

    def condition_score(
        self,
        cond_fn: Function,
        p_mean_var: dict[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """`p_mean_variance` with eps - sqrt(1 - ᾱ_t) * gradient for eps (Dhariwal and Nichol 2021, algorithm 2)."""
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        sigma = self._extract("sqrt_one_minus_alphas_cumprod", t, x)
        eps = eps - sigma * self._gradient(cond_fn, x, t, model_kwargs)
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    def _gradient(self, cond_fn: Function, x: Tensor, t: Tensor, model_kwargs: ModelKwargs) -> Tensor:
        gradient = self._wrap_model(cond_fn)(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return gradient.to(arithmetic_dtype(x))

    def _is_fused(self, *methods: str) -> bool:
        return all(getattr(type(self), name) is getattr(ReverseProcess, name) for name in methods)

    def _step(
        self,
        make_rows: Callable[..., FloatArray],
        settings: tuple[Any, ...],
        x: Tensor,
        model_output: Tensor,
        t: Tensor,
        **arguments: Any,
    ) -> dict[str, Tensor]:
        """Row t of make_rows(schedule, *settings), a table that is made and copied to the device once."""
        dtype = arithmetic_dtype(x)
        key = (make_rows, *settings, x.device, dtype)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(make_rows(self.schedule, *settings), dtype=dtype, device=x.device)
        table = self._on_device[key]
        sample, pred_xstart = solver_step(x, model_output, table, t, return_x0=True, out_dtype=dtype, **arguments)
        return {"sample": sample, "pred_xstart": pred_xstart}

    def p_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """One ancestral step, {"sample": x_{t-1}, "pred_xstart": x_0}; without noise at t = 0.

        The noise is torch.randn_like(x), drawn after the model was called and before cond_fn is.
        """
        if denoised_fn is not None or not self._is_fused("p_mean_variance", "condition_mean"):
            out = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
            noise = torch.randn_like(x)
            if cond_fn is not None:
                out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
            std = (0.5 * out["log_variance"]).exp() * (t != 0).view(-1, *(1,) * (x.ndim - 1))
            return {"sample": out["mean"] + std * noise, "pred_xstart": out["pred_xstart"]}
        model_output = self._evaluate(model, x, t, model_kwargs)
        noise = torch.randn_like(x)
        history: tuple[Tensor, ...] = ()
        if cond_fn is not None:
            gradient = self._gradient(cond_fn, x, t, model_kwargs)
            history = (gradient * self._log_variance(model_output, x, t).exp() if self._learned else gradient,)
        settings = (self.model_mean_type.name, clip_denoised, self.model_var_type.name)
        return self._step(p_sample_rows, settings, x, model_output, t, noise=noise, history=history)

    def ddim_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: ModelKwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """{"sample": x_{t-1}, "pred_xstart": x_0}: Song et al. 2021, equation 12, with eps from the clipped x_0.

        The noise is torch.randn_like(x), drawn last, also for eta = 0, which has no use for it.
        """
        if denoised_fn is None and cond_fn is None and self._is_fused("p_mean_variance"):
            model_output = self._evaluate(model, x, t, model_kwargs)
            settings: tuple[Any, ...] = (self.model_mean_type.name, clip_denoised, eta)
        else:
            out = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
            if cond_fn is not None:
                out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
            model_output, settings = out["pred_xstart"], (ModelMeanType.START_X.name, False, eta)
        noise = torch.randn_like(x)
        return self._step(ddim_rows, settings, x, model_output, t, noise=noise if eta else None)

    def ddim_reverse_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: ModelKwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """{"sample": x_{t+1}, "pred_xstart": x_0}: a step of the deterministic walk (eta = 0) towards noise."""
        if eta != 0.0:
            raise ValueError(f"eta is {eta}, but only the deterministic walk, eta = 0, can be reversed")
        if denoised_fn is None and self._is_fused("p_mean_variance"):
            model_output = self._evaluate(model, x, t, model_kwargs)
            settings = (self.model_mean_type.name, clip_denoised)
        else:
            out = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
            model_output, settings = out["pred_xstart"], (ModelMeanType.START_X.name, False)
        return self._step(ddim_reverse_rows, settings, x, model_output, t)

    def p_sample_loop(self, model: Function, shape: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        """The last sample of `p_sample_loop_progressive`, which has the arguments."""
        return _last(self.p_sample_loop_progressive(model, shape, *args, **kwargs))

    def p_sample_loop_progressive(
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """`p_sample` from t = N - 1 to 0 under torch.no_grad; yields what each step returns.

        Args:
            noise: x at t = N - 1, of this shape; None: torch.randn(*shape) on the device.
            device: of the walk; None: that of the model's parameters, or of the noise where it has none, else the CPU.
            progress: show a bar.
        """
        step = functools.partial(
            self.p_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
        )
        return self._walk(step, model, shape, noise, device, progress)

    def ddim_sample_loop(self, model: Function, shape: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        """The last sample of `ddim_sample_loop_progressive`, which has the arguments."""
        return _last(self.ddim_sample_loop_progressive(model, shape, *args, **kwargs))

    def ddim_sample_loop_progressive(
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """`ddim_sample` from t = N - 1 to 0; arguments as in `p_sample_loop_progressive`."""
        step = functools.partial(
            self.ddim_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            eta=eta,
        )
        return self._walk(step, model, shape, noise, device, progress)

    def _walk(
        self,
        step: Callable[[Tensor, Tensor], dict[str, Tensor]],
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        if device is None:
            first = next(iter(model.parameters()), noise) if isinstance(model, torch.nn.Module) else noise
            device = "cpu" if first is None else first.device
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in tqdm(range(self.num_timesteps)[::-1], disable=not progress):
            with torch.no_grad():
                out = step(x, torch.full((shape[0],), i, device=device))
            yield out
            x = out["sample"]


def _last(outs: Iterator[dict[str, Tensor]]) -> Tensor:
    for out in outs:
        sample = out["sample"]
    return sample
