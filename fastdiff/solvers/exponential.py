"""Exponential integrators in lambda = ln(alpha / sigma), the log of the signal-to-noise ratio, on any grid.

Written for the data prediction v = x0, the exact solution of the diffusion equation over an interval of length h in
lambda, with s in [0, 1] the fraction of it that is done, is (Lu et al. 2022b, proposition 4.1; Xue et al. 2023
for tau > 0)

    x_next = (sigma_next / sigma) * exp(-tau² h) * x
             + (1 + tau²) * alpha_next * h * ∫ exp(-(1 + tau²) h (1 - s)) v(s) ds
             + sigma_next * sqrt(1 - exp(-2 tau² h)) * z

and for the noise prediction v = eps (Lu et al. 2022a, proposition 3.1)

    x_next = (alpha_next / alpha) * x - (1 + tau²) * sigma_next * h * ∫ exp(h (1 - s)) v(s) ds
             + tau * sigma_next * sqrt(exp(2 h) - 1) * z

A method replaces v(s) by a polynomial through remembered values. tau = 0 is the probability-flow ODE, tau = 1 the
reverse SDE. Only ratios of alpha and sigma enter, so the formulas hold in every scaling of the state.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdiff.solvers.grid import Grid
from fastdiff.table import Row

THIRD_ORDERS = ("exact", "half", "diffusers")


def phi(k: int, z: float) -> float:
    """φ_k(z) = ∫₀¹ e^{z(1-s)} s^{k-1} / (k-1)! ds for k >= 1 (Hochbruck and Ostermann 2010, equation 2.10)."""
    if abs(z) < 1.5:  # φ_k(z) = Σ_j z^j / (j + k)!, where the recursion below would cancel
        return sum(z**j / math.factorial(j + k) for j in range(25))
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def lagrange_integrals(nodes: Sequence[float], z: float) -> list[float]:
    """∫₀¹ ℓ_j(s) e^{z(1-s)} ds of each Lagrange basis polynomial ℓ_j on distinct nodes; z finite."""
    moments = [math.factorial(k) * phi(k + 1, z) for k in range(len(nodes))]
    integrals = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        rising = np.poly(others)[::-1] if others else np.ones(1)  # coefficients of s^0, s^1, ...
        integrals.append(float(rising @ moments) / math.prod(node - other for other in others))
    return integrals


def divided_difference(nodes: Sequence[float]) -> list[float]:
    """Weights of values at distinct nodes in the leading coefficient of the polynomial through them."""
    return [1 / math.prod(a - b for k, b in enumerate(nodes) if k != j) for j, a in enumerate(nodes)]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """x_next = decay * x + scale * ∫₀¹ e^{exponent (1-s)} v(s) ds + std * z.

    `constant` is the weight of a v that does not change, in a form that holds where h is infinite: from alpha = 0 (data
    form) or to sigma = 0. `scale` and `exponent` are infinite or NaN there, and only a single node may be used.
    """

    decay: float
    constant: float
    scale: float
    exponent: float
    std: float

    @classmethod
    def between(cls, grid: Grid, i: int, j: int, *, form: str, tau: float = 0.0) -> "Interval":
        """The interval from point i to point j of a grid; `form` is "data" or "noise".

        A step to sigma = 0 is x0 itself and has no noise, whatever tau is.

        Raises:
            ValueError: the noise form from alpha = 0, where the state says nothing about x0.
        """
        alpha, sigma = float(grid.alpha[i]), float(grid.sigma[i])
        alpha_next, sigma_next = float(grid.alpha[j]), float(grid.sigma[j])
        h = float(grid.log_snr[j] - grid.log_snr[i])
        if sigma_next == 0:
            tau = 0.0
        q = 1 + tau**2
        if form == "data":
            shrink = alpha * sigma_next / (sigma * alpha_next)  # exp(-h), also where h is infinite
            decay = sigma_next / sigma * shrink ** (tau**2)
            std = sigma_next * math.sqrt(max(1 - shrink ** (2 * tau**2), 0.0))
            return cls(
                decay=decay, constant=alpha_next - alpha * decay, scale=q * alpha_next * h, exponent=-q * h, std=std
            )
        if alpha == 0:
            raise ValueError(
                "a solver in noise-prediction form cannot start at alpha = 0 (zero signal-to-noise ratio): use one in "
                "data-prediction form, such as 'dpmpp', or a timestep_spacing such as 'leading'"
            )
        decay = alpha_next / alpha
        grown = sigma * decay  # sigma_next * exp(h)
        std = tau * math.sqrt(max(grown**2 - sigma_next**2, 0.0))
        scale = -q * sigma_next * h if sigma_next else math.nan
        return cls(decay=decay, constant=q * (sigma_next - grown), scale=scale, exponent=h, std=std)

    def weights(self, nodes: Sequence[float], *, slope: str = "exact") -> list[float]:
        """Weights of values at `nodes` (positions s; the first is 0 unless it is alone) whose polynomial stands for v.

        Args:
            slope: of a linear v the integral of the slope's part: "exact", or one of two that agree to its order:
                half of `constant` (DPM-Solver's midpoint, UniPC's B2) or half of `scale` (UniPC's B1).
        """
        if len(nodes) == 1:
            return [self.constant]
        if len(nodes) == 2 and slope != "exact":
            weight = (self.constant if slope == "half_constant" else self.scale) / 2 / nodes[1]
            return [self.constant - weight, weight]
        return [self.scale * integral for integral in lagrange_integrals(nodes, self.exponent)]


def positions(grid: Grid, start: int, end: int, points: Iterable[int]) -> dict[int, float]:
    """Where points stand in the interval between two of them: 0 at the start, 1 at the end; the start comes first.

    A point with alpha = 0 is infinitely far away and has no weight, and of points at one place the first one counts.
    Only the start does where the interval is infinitely long (from alpha = 0, to sigma = 0) or has no length.
    """
    log_snr = grid.log_snr
    h = log_snr[end] - log_snr[start]
    found = {start: 0.0}
    if h == 0 or not math.isfinite(h):
        return found
    for k in points:
        s = float((log_snr[k] - log_snr[start]) / h)
        if math.isfinite(s) and s not in found.values():
            found[k] = s
    return found


def row(grid: Grid, i: int, interval: Interval, weights: dict[int, float], *, form: str, at: int | None = None) -> Row:
    """The row at point i that applies an interval.

    Args:
        weights: of the values of rows by index; `at` is this row's own index (None: i).
    """
    own = weights.get(i if at is None else at, 0.0)
    history = {k: weight for k, weight in weights.items() if k != (i if at is None else at) and weight}
    # eps consistent with x0, so that clipping and thresholding of x0 are felt in the noise form too
    ux, u0, um = (0.0, 1.0, 0.0) if form == "data" else grid.epsilon(i, clipped=True)
    columns: dict[str, Any] = {
        "cx": interval.decay + own * ux,
        "c0": own * u0,
        "cm": own * um,
        "ux": ux,
        "u0": u0,
        "um": um,
    }
    return grid.row(i, **columns, history=history, cz=interval.std, draws=interval.std > 0)


def adams(
    grid: Grid,
    *,
    form: str,
    predictor: Sequence[int],
    corrector: Sequence[int] | None = None,
    tau: Sequence[float] | float = 0.0,
    slope: str = "exact",
    third_order: str = "exact",
) -> list[Row]:
    """Multistep rows: Adams-Bashforth in lambda, and Adams-Moulton as a corrector that costs no model evaluation.

    The corrector repeats the step that led to point i with the value at i among its nodes. Prediction and correction
    share their linear part and their noise, so the corrected state is x plus a combination of remembered values:
    neither the previous state nor its noise is kept.

    Args:
        predictor: [n] how many values each step extrapolates from, its own included.
        corrector: [n] how many values the corrector of each step interpolates, the new one included; 0: none.
        tau: [n] or one for all steps.
        slope: see `Interval.weights`.
        third_order: weight of the second difference in a step of order 3. "exact" is the integral of the parabola;
            "half" is half of it (diffusers, and k-diffusion's 3M), of order 2 in fact; "diffusers" is "half" for an
            ODE, and for tau > 0 what diffusers takes there, half of the integral minus alpha_next.
    """
    if third_order not in THIRD_ORDERS:
        raise ValueError(f"third_order is {third_order!r}, accepted are {', '.join(THIRD_ORDERS)}")
    taus = np.broadcast_to(np.asarray(tau, dtype=np.float64), len(grid))
    rows: list[Row] = []
    interval: Interval | None = None
    predicted: dict[int, float] = {}
    for i in range(len(grid)):
        correction: dict[int, float] = {}
        count = corrector[i - 1] if corrector is not None and i > 0 else 0
        nodes = positions(grid, i - 1, i, range(i, max(i - count, -1), -1)) if count else {}
        # Without a node at the new value the step was infinitely long or had no length: nothing can correct it.
        if interval is not None and i in nodes:
            if count == 1:
                nodes = {i: 1.0}
            correction = dict(zip(nodes, interval.weights(list(nodes.values()), slope=slope), strict=True))
            for k, weight in predicted.items():
                correction[k] = correction.get(k, 0.0) - weight
        interval = Interval.between(grid, i, i + 1, form=form, tau=float(taus[i]))
        nodes = positions(grid, i, i + 1, range(i - 1, max(i - predictor[i], -1), -1))
        values = interval.weights(list(nodes.values()), slope=slope)
        if len(nodes) == 3 and third_order != "exact":
            half = interval.scale * phi(3, interval.exponent)
            excess = half + float(grid.alpha[i + 1]) * (third_order == "diffusers" and interval.std > 0)
            values = [w - excess * d for w, d in zip(values, divided_difference(list(nodes.values())), strict=True)]
        predicted = dict(zip(nodes, values, strict=True))
        total = {k: interval.decay * weight for k, weight in correction.items()}
        for k, weight in predicted.items():
            total[k] = total.get(k, 0.0) + weight
        rows.append(row(grid, i, interval, total, form=form))
    return rows


def falling_orders(n: int, order: int, *, lower_order_final: bool, euler_at_final: bool = False) -> list[int]:
    """[n] `order`, or where lower_order_final 1 in the last step, 2 in the one before, and so on."""
    orders = [min(order, n - i) if lower_order_final else order for i in range(n)]
    return [*orders[:-1], 1] if euler_at_final else orders


def check_order(order: int, highest: int) -> None:
    """ValueError unless order is 1 to highest."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise ValueError(f"order is {order!r}, accepted are the integers 1 to {highest}")
