"""UniPC: a multistep predictor, and a corrector of one order more from the same model evaluations."""

from collections.abc import Collection

from fastdiff.solvers.exponential import adams, check_order, falling_orders
from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import register
from fastdiff.table import Row

# B1(h) = h and B2(h) = exp(h) - 1 of the paper, in the terms of `Interval.weights`. They cancel out of every step but
# the predictor of order 2 and the corrector of order 1, whose coefficient is set to 1/2.
SOLVER_TYPES = {"bh1": "half_length", "bh2": "half_constant"}


@register("unipc", extra_point=True)
def unipc(
    grid: Grid,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
) -> list[Row]:
    """Zhao et al. 2023, section 3: predictor of order p, corrector of order p + 1, one evaluation a row.

    Args:
        order: 1 to 4, values that the predictor extrapolates from.
        solver_type: "bh1" or "bh2", the paper's B(h).
        predict_x0: the data-prediction form, else the noise-prediction form.
        lower_order_final: the last rows fall in order to 1.
        disable_corrector: rows whose step is not corrected.
    """
    check_order(order, 4)
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"solver_type is {solver_type!r}, accepted are {', '.join(SOLVER_TYPES)}")
    predictor = falling_orders(len(grid), order, lower_order_final=lower_order_final)
    return adams(
        grid,
        form="data" if predict_x0 else "noise",
        predictor=predictor,
        corrector=[0 if i in disable_corrector else min(p, i + 1) + 1 for i, p in enumerate(predictor)],
        slope=SOLVER_TYPES[solver_type],
    )
