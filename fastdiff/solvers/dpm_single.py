"""DPM-Solver and DPM-Solver++, single-step: groups of 1 to 3 rows that all start from the group's first state."""

import math
from collections.abc import Sequence
from dataclasses import replace

from fastdiff.solvers.dpm import check_eta, slope_of
from fastdiff.solvers.exponential import THIRD_ORDERS, Interval, check_order, divided_difference, positions, row
from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import SolverFunction, register
from fastdiff.table import Row


def group_orders(grid: Grid, order: int) -> list[int]:
    """[n] 1, 2, .., order, 1, 2, ..: the order of each row, which says how far into its group it is.

    A step from alpha = 0 and one to sigma = 0 are infinitely long in lambda: each is a group of its own.
    """
    first = [1] if grid.alpha[0] == 0 else []
    last = [1] if grid.sigma[-1] == 0 else []
    between = max(len(grid) - len(first) - len(last), 0)
    return [*first, *(k % order + 1 for k in range(between)), *last][: len(grid)]


def _stage_weights(
    interval: Interval, nodes: list[float], solver_type: str, third_order: str, alpha_next: float
) -> list[float]:
    if len(nodes) == 3 and solver_type == "midpoint":
        # the slope between the first and the last value alone (Lu et al. 2022a, algorithm 2)
        first, last = interval.weights([nodes[0], nodes[2]])
        return [first, 0.0, last]
    weights = interval.weights(nodes, slope=slope_of(solver_type))
    if len(nodes) == 3 and third_order == "diffusers" and interval.std > 0:
        weights = [w - 2 * alpha_next * d for w, d in zip(weights, divided_difference(nodes), strict=True)]
    return weights


def singlestep(
    grid: Grid,
    *,
    form: str,
    orders: Sequence[int],
    solver_type: str,
    eta: float = 0.0,
    third_order: str = "exact",
    save_start: bool = False,
) -> list[Row]:
    """Rows of the orders given, where a row of order k goes from the point k - 1 before it to the next point.

    Without noise the group's first state follows from the present one and the values since. With noise it does not, so
    a row that does not evaluate the model saves it at the head of a group of more than one row.

    Args:
        orders: [n] groups 1, 2, .., as `group_orders` makes them.
        solver_type: "midpoint" or "heun"; heun takes the exact integrals and is of its full order on any grid, midpoint
            of order 3 is that only where lambda is evenly spaced.
        eta: tau² of `exponential`.
        save_start: save a group's first state without noise too, for a caller who may change the state within a group.
        third_order: "exact"; "diffusers" reproduces the sign of the second difference that diffusers has for the SDE.
    """
    if third_order not in THIRD_ORDERS:
        raise ValueError(f"third_order is {third_order!r}, accepted are {', '.join(THIRD_ORDERS)}")
    if len(orders) != len(grid) or any(o not in (1, k + 1) for o, k in zip(orders, [0, *orders], strict=False)):
        raise ValueError(f"orders is {list(orders)}, groups 1, 2, .. of altogether {len(grid)} rows are needed")
    tau, log_snr = math.sqrt(eta), grid.log_snr
    save_start = save_start or tau > 0
    rows: list[Row] = []
    index: list[int] = []  # row of each point
    saved = 0
    # the previous row of the group: its state was decay * first state + the sum of before
    decay = 1.0
    before: dict[int, float] = {}
    for i, order in enumerate(orders):
        start = i + 1 - order
        if order == 1 and save_start and i + 1 < len(grid) and orders[i + 1] == 2:
            saved = len(rows)
            rows.append(Row(ev=False, cx=1.0, ux=1.0))
        index.append(len(rows))
        interval = Interval.between(grid, start, i + 1, form=form, tau=tau)
        h = float(log_snr[i + 1] - log_snr[start])
        if order > 1 and not math.isfinite(h):
            raise ValueError(
                f"row {i} is of order {order}, but a group that starts at alpha = 0 or ends at sigma = 0 is of order 1"
            )
        nodes = positions(grid, start, i + 1, range(start + 1, i + 1))
        at = list(nodes.values())
        values = _stage_weights(interval, at, solver_type, third_order, float(grid.alpha[i + 1]))
        weights = {index[k]: weight for k, weight in zip(nodes, values, strict=True)}
        if order == 1:
            rows.append(row(grid, i, interval, weights, form=form, at=index[i]))
        elif save_start:
            weights[saved] = interval.decay
            rows.append(row(grid, i, replace(interval, decay=0.0), weights, form=form, at=index[i]))
        else:
            ratio = interval.decay / decay
            change = {k: weights.get(k, 0.0) - ratio * before.get(k, 0.0) for k in weights | before}
            rows.append(row(grid, i, replace(interval, decay=ratio), change, form=form, at=index[i]))
        decay, before = interval.decay, weights
    return rows


def _ode(form: str) -> SolverFunction:
    def solver(
        grid: Grid, *, order: int = 2, solver_type: str = "heun", orders: Sequence[int] | None = None
    ) -> list[Row]:
        """Single-step DPM-Solver++ (Lu et al. 2022b, algorithm 1) or DPM-Solver (Lu et al. 2022a, algorithms 1 and 2).

        Intermediate points are points of the grid, so n rows evaluate the model n times.

        Args:
            order: 1 to 3, rows in a group.
            solver_type: "heun" or "midpoint", see `singlestep`.
            orders: [n] groups other than those of `group_orders`.
        """
        check_order(order, 3)
        return singlestep(
            grid, form=form, orders=group_orders(grid, order) if orders is None else orders, solver_type=solver_type
        )

    return solver


@register("dpmpp_single_sde", extra_point=True)
def dpmpp_single_sde(
    grid: Grid,
    *,
    order: int = 2,
    solver_type: str = "heun",
    eta: float = 1.0,
    orders: Sequence[int] | None = None,
    third_order: str = "exact",
) -> list[Row]:
    """`dpmpp_single` on the reverse SDE; eta >= 0 is tau² of `exponential`, third_order as in `singlestep`."""
    check_order(order, 3)
    check_eta(eta)
    groups = group_orders(grid, order) if orders is None else orders
    return singlestep(grid, form="data", orders=groups, solver_type=solver_type, eta=eta, third_order=third_order)


dpmpp_single = register("dpmpp_single", extra_point=True)(_ode("data"))
dpm_single = register("dpm_single", extra_point=True)(_ode("noise"))
