"""DEIS: Adams-Bashforth with exponential weights on the noise prediction."""

from fastdiff.solvers.dpm import FEW_STEPS
from fastdiff.solvers.exponential import adams, check_order, falling_orders
from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import register
from fastdiff.table import Row


@register("deis", extra_point=True)
def deis(grid: Grid, *, order: int = 3, lower_order_final: bool | None = None) -> list[Row]:
    """Zhang and Chen 2023, with polynomials in the logarithm of rho = sigma / alpha, integrated exactly.

    Args:
        order: 1 to 4, values that a row extrapolates from.
        lower_order_final: the last rows fall in order; None: in walks of fewer than 15 rows.
    """
    check_order(order, 4)
    falls = len(grid) < FEW_STEPS if lower_order_final is None else lower_order_final
    return adams(grid, form="noise", predictor=falling_orders(len(grid), order, lower_order_final=falls))
