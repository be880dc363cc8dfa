"""A solver's rows as `fastdiff.kernels.solver_step` reads them: one table, and for each row whose values it reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET
from fastdiff.prediction import FloatArray
from fastdiff.table import ROW_COLUMNS, Row


def pack_rows(rows: Sequence[Row]) -> tuple[FloatArray, list[list[int]]]:
    """The columns of the rows, and the values each of them reads.

    Returns:
        float64 [R, HISTORY_OFFSET + K], where the k-th history column belongs to the k-th tensor handed to the op;
        for each row the earlier rows whose remembered values these tensors are, newest first.
    """
    reads = [sorted((source for source, h in row.history.items() if h != 0.0), reverse=True) for row in rows]
    floats = np.zeros((len(rows), HISTORY_OFFSET + max(map(len, reads), default=0)))
    for column, name in enumerate(FLOAT_COLUMNS):
        if name in ROW_COLUMNS:  # c_next belongs to the sampler's loop
            floats[:, column] = [getattr(row, name) for row in rows]
    for i, (row, sources) in enumerate(zip(rows, reads)):
        floats[i, HISTORY_OFFSET : HISTORY_OFFSET + len(sources)] = [row.history[source] for source in sources]
    return floats, reads
