"""SA-Solver: stochastic Adams methods for a reverse equation with any amount of noise."""

import math
from collections.abc import Callable

from fastdiff.solvers.exponential import adams, check_order, falling_orders
from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import register
from fastdiff.table import Row

SOLVER_TYPES = {"exact": "exact", "simplified": "half_length"}


@register("sa", extra_point=True)
def sa(
    grid: Grid,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float | Callable[[float], float] = 1.0,
    predict_x0: bool = True,
    solver_type: str = "exact",
    lower_order_final: bool = True,
) -> list[Row]:
    """Xue et al. 2023, algorithm 1, predicting, evaluating and correcting with one model evaluation a row.

    Args:
        predictor_order: 1 to 4, values that the predictor extrapolates from.
        corrector_order: 0 (no corrector) to 4, values that the corrector interpolates, the new one included.
        tau: at least 0, the amount of noise: 0 is the probability-flow ODE, 1 the reverse SDE; or a function of a
            point's noise level sigma / alpha. The paper uses an interval in the middle of the walk.
        predict_x0: the data-prediction form, else the noise-prediction form.
        solver_type: "exact" integrals, or "simplified" for order 2 of the data form (the paper's code, diffusers).
        lower_order_final: the last rows fall in order, the predictor's to 1.
    """
    check_order(predictor_order, 4)
    if corrector_order != 0:
        check_order(corrector_order, 4)
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"solver_type is {solver_type!r}, accepted are {', '.join(SOLVER_TYPES)}")
    n = len(grid)
    levels = [float(s / a) if a > 0 else math.inf for a, s in zip(grid.alpha[:-1], grid.sigma[:-1], strict=True)]
    taus = [tau(level) if callable(tau) else tau for level in levels]
    for value in taus:
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"tau is {value}, a finite number of at least 0 is needed")
    correctors = [min(corrector_order, i + 2) for i in range(n)]
    if lower_order_final:
        correctors = [min(count, n - i + 1) for i, count in enumerate(correctors)]
    return adams(
        grid,
        form="data" if predict_x0 else "noise",
        predictor=falling_orders(n, predictor_order, lower_order_final=lower_order_final),
        corrector=correctors,
        tau=taus,
        slope=SOLVER_TYPES[solver_type] if predict_x0 else "exact",
    )
