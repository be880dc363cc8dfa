"""The processes that torchrun starts, where they need each other for little: who goes first, and whether all agree."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

import torch.distributed as dist

WAIT = datetime.timedelta(days=30)


class Processes:
    """This process among `size`, by torchrun's environment variables; alone without them. Enter it to connect them.

    A process that leaves by an error takes the others along: they wait for it in vain, and torchrun ends them.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._connected = False

    @classmethod
    def of_environment(cls) -> Processes:
        """From RANK, WORLD_SIZE and LOCAL_RANK."""
        rank, size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        return cls(rank, size, local_rank)

    def __enter__(self) -> Processes:
        if self.size > 1 and not dist.is_initialized():
            # one process may have far more to do than another before they meet
            dist.init_process_group("gloo", timeout=WAIT)
            self._connected = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._connected:
            dist.destroy_process_group()

    def device_name(self, name: str) -> str:
        """`name`, or the GPU of this process where it leaves the choice and there are several processes."""
        import torch

        if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name

    def first_does(self, action: Callable[[], None]) -> None:
        """The first process acts while the others wait; its error is raised in all of them."""
        if self.size == 1:
            action()
            return
        error: list[Exception | None] = [None]
        if self.rank == 0:
            try:
                action()
            except (ValueError, OSError) as raised:
                error[0] = raised
        dist.broadcast_object_list(error, src=0)
        if error[0] is not None:
            raise error[0]

    def all_true(self, value: bool) -> bool:
        """Whether it is true in all processes; they wait for each other."""
        if self.size == 1:
            return value
        values: list[bool | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return all(values)
