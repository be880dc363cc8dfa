"""`GaussianDiffusion`: the diffusion of guided-diffusion in its own interface."""

from __future__ import annotations

import math

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastdiff.compat.guided_diffusion.betas import betas_for_alpha_bar, get_named_beta_schedule
from fastdiff.compat.guided_diffusion.losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from fastdiff.compat.guided_diffusion.model_types import LossType, ModelMeanType, ModelVarType
from fastdiff.compat.guided_diffusion.reverse_process import Function, ModelKwargs, ReverseProcess

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "get_named_beta_schedule",
    "mean_flat",
    "normal_kl",
]


class GaussianDiffusion(ReverseProcess):
    """Forward process, sampling steps and losses.

    Everywhere x is [B, C, *spatial] of any float dtype and t int64 [B] on the same device, a timestep for each sample.
    `model(x, t, **model_kwargs)` returns a tensor like x, or [B, 2C, *spatial] for a learned variance;
    `denoised_fn(x_0)` acts on the prediction before it is clipped; `cond_fn(x, t, **model_kwargs)` is the gradient of
    log p(y | x).

    Args:
        betas: [N] in (0, 1), the last one may be 1.
        model_mean_type, model_var_type: what the model predicts.
        loss_type: what `training_losses` computes.
        rescale_timesteps: tell the model t * 1000 / N, as floats.

    Attributes:
        num_timesteps: N.
        betas, alphas_cumprod, alphas_cumprod_prev, alphas_cumprod_next, sqrt_alphas_cumprod,
            sqrt_one_minus_alphas_cumprod, log_one_minus_alphas_cumprod, sqrt_recip_alphas_cumprod,
            sqrt_recipm1_alphas_cumprod, posterior_variance, posterior_log_variance_clipped, posterior_mean_coef1,
            posterior_mean_coef2: float64 [N] (Ho et al. 2020, equations 4 to 7).
    """

    def __init__(
        self,
        *,
        betas: ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ) -> None:
        super().__init__(betas, model_mean_type, model_var_type, rescale_timesteps)
        self.loss_type = LossType(loss_type)

    def training_losses(
        self,
        model: Function,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each sample at its timestep, [B], differentiable.

        Args:
            noise: like x_start; None: torch.randn_like(x_start).

        Returns:
            "loss"; for the two squared errors also "mse" and, where the variance is learned, "vb": the bound, which
            reaches the variance alone (Nichol and Dhariwal 2021, equation 16).
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            return {"loss": loss * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else loss}
        model_output = self._evaluate(model, x_t, t, model_kwargs)
        mean, terms = model_output[:, : x_start.shape[1]], {}
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            target = self.q_posterior_mean_variance(x_start, x_t, t)[0]
        else:
            target = x_start if self.model_mean_type == ModelMeanType.START_X else noise
        terms["mse"] = terms["loss"] = mean_flat((target - mean) ** 2)
        if self._learned:
            frozen = torch.cat([mean.detach(), model_output[:, x_start.shape[1] :]], dim=1)
            bound = self._vb_terms_bpd(lambda *_: frozen, x_start, x_t, t, clip_denoised=False)["output"]
            # 1000 timesteps of the bound weigh as much as the squared error of one.
            scale = self.num_timesteps / 1000 if self.loss_type == LossType.RESCALED_MSE else 1.0
            terms["vb"] = bound * scale
            terms["loss"] = terms["mse"] + terms["vb"]
        return terms

    def _vb_terms_bpd(
        self,
        model: Function,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """A timestep's term of the bound (Ho et al. 2020, equation 5) in bits a dimension, "output" [B], and
        "pred_xstart": KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the decoder's negative log-likelihood.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        decoder_nll = -discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        output = torch.where(t == 0, mean_flat(decoder_nll), mean_flat(kl)) / math.log(2)
        return {"output": output, "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in bits a dimension, [B]: the part of the bound without a parameter."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2)

    @torch.no_grad()
    def calc_bpd_loop(
        self, model: Function, x_start: Tensor, clip_denoised: bool = True, model_kwargs: ModelKwargs = None
    ) -> dict[str, Tensor]:
        """The whole variational bound in bits a dimension, one draw of noise a timestep, from N - 1 to 0.

        Returns:
            "total_bpd" and "prior_bpd" [B]; "vb", "xstart_mse" and "mse" (of eps) [B, N] in the order of the walk.
        """
        terms: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in range(self.num_timesteps)[::-1]:
            t = torch.full((x_start.shape[0],), i, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            terms["vb"].append(out["output"])
            terms["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            terms["mse"].append(mean_flat((eps - noise) ** 2))
        prior_bpd = self._prior_bpd(x_start)
        stacked = {name: torch.stack(values, dim=1) for name, values in terms.items()}
        return {"total_bpd": stacked["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **stacked}
