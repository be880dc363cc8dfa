"""torch.compile that may fail: without a working C++ compiler, the eager result and one warning."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any


class CompiledOrEager:
    """Calls torch.compile(function, dynamic=False) or, if its first call fails to compile, the function itself.

    Static shapes, because Inductor plans channels-last layouts for them only; a new shape compiles anew. An error of
    the function itself (a wrong argument, say) is raised as it is: it comes up in the eager call too.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        import torch

        self._eager = function
        self._compiled: Callable[..., Any] | None = torch.compile(function, dynamic=False, **options)
        self._works = False
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._works and self._compiled is not None:
            return self._compiled(*args, **kwargs)
        with self._lock:
            if self._compiled is None:
                return self._eager(*args, **kwargs)
            try:
                result = self._compiled(*args, **kwargs)
            except Exception as error:  # a compiler may raise anything
                result = self._eager(*args, **kwargs)
                self._compiled = None
                reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
                warnings.warn(f"torch.compile failed, so the model runs uncompiled: {reason}", stacklevel=2)
            else:
                self._works = True
            return result
