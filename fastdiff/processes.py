"""The processes that torchrun starts: who they are, what they tell each other, and how a run of theirs is named."""

from __future__ import annotations

import datetime
import os
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

WAIT = datetime.timedelta(days=30)
# What one process can do while the others wait: load data, draw a picture, write a checkpoint. A machine that is lost
# without a word is found out after this time.
TRAINING_WAIT = datetime.timedelta(hours=1)
# What a reader of data, a model or a file raises for what its user gave it.
EXPECTED = (ValueError, OSError, RuntimeError, ImportError)


class Processes:
    """This process among `size`, by torchrun's environment variables; alone without them. Enter it to connect them.

    A process that leaves by an error takes the others along: they wait for it in vain, and torchrun ends them.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, *, training: bool = False) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._training = training
        self._connected = False

    @classmethod
    def of_environment(cls, *, training: bool = False) -> Processes:
        """From RANK, WORLD_SIZE and LOCAL_RANK. training: they exchange gradients, by NCCL where there are GPUs."""
        rank, size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        return cls(rank, size, local_rank, training=training)

    def __enter__(self) -> Processes:
        if self.size > 1 and not dist.is_initialized():
            # one process may have far more to do than another before they meet
            gpus = self._training and torch.cuda.is_available()
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            wait = TRAINING_WAIT if self._training else WAIT
            dist.init_process_group(backend, timeout=wait, store=_store(), rank=self.rank, world_size=self.size)
            self._connected = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # NCCL would wait for what a lost process never sends
        if self._connected and (kind is None or dist.get_backend() == "gloo"):
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def device_name(self, name: str) -> str:
        """`name`, or the GPU of this process where it leaves the choice and there are several processes."""
        if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name

    def first_does(self, action: Callable[..., Result], *arguments: Any) -> Result:
        """What the first process makes of it while the others wait, in all of them; an error of it, too.

        It is pickled on its way.
        """
        if self.size == 1:
            return action(*arguments)
        outcome = [_outcome(lambda: action(*arguments)) if self.first else (None, None)]
        dist.broadcast_object_list(outcome, src=0)
        result, error = outcome[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def all_do(self, action: Callable[[], Result]) -> Result:
        """Every process acts; the error of one is raised in all."""
        if self.size == 1:
            return action()
        result, error = _outcome(action)
        errors: list[Exception | None] = [None] * self.size
        dist.all_gather_object(errors, error)
        for raised in filter(None, errors):
            raise raised
        return result  # type: ignore[return-value]

    def first_of_machine_first(self, action: Callable[[], Result]) -> Result:
        """Every process acts, the first of each machine before its others, which find what it has downloaded."""
        early = self.all_do(lambda: None if self.local_rank else action())
        late = self.all_do(lambda: action() if self.local_rank else None)
        result = late if self.local_rank else early
        return result  # type: ignore[return-value]

    def all_true(self, value: bool) -> bool:
        """Whether it is true in all processes; they wait for each other."""
        if self.size == 1:
            return value
        values: list[bool | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return all(values)

    def add(self, values: Tensor) -> Tensor:
        """The sum over all processes of `values` on the CPU, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


class StopTogether:
    """Whether any process wishes to stop: all learn it at the same call, the one after the wish, and none waits for it.

    The processes exchange a number on the CPU while they do their next step.
    """

    def __init__(self, processes: Processes) -> None:
        self._alone = processes.size == 1
        self._wish = torch.zeros(1, dtype=torch.int32)
        self._exchange: dist.Work | None = None

    def __call__(self, wish: bool) -> bool:
        """Alone, what it is told; else whether any process wished to stop at the call before."""
        if self._alone:
            return wish
        answer = self.settle()
        self._wish.fill_(wish)
        self._exchange = dist.all_reduce(self._wish, dist.ReduceOp.MAX, async_op=True)
        return answer

    def settle(self) -> bool:
        """Wait for the exchange under way, which must be over when the processes part."""
        if self._exchange is None:
            return False
        self._exchange.wait()
        self._exchange = None
        return bool(self._wish)


def launch_id() -> str | None:
    """What all starts of this program by one command have in common: by SLURM, requeued too, or by torchrun; else None.

    The SLURM job, or torchrun's --rdzv-id (--standalone makes a new one), or without one torchrun's own process.
    """
    job, run = os.environ.get("SLURM_JOB_ID"), os.environ.get("TORCHELASTIC_RUN_ID")
    if job:
        return f"SLURM job {job}"
    if run is None:
        return None
    return f"torchrun {run}" if run != "none" else f"torchrun on {socket.gethostname()}, process {_parent()}"


def _parent() -> str:
    """Number and, where Linux tells it, start of the process above: in a container the number is always the same."""
    parent = os.getppid()
    try:
        status = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return str(parent)
    # its name, in parentheses, may hold anything; the start is field 22
    return f"{parent} of {status.rpartition(')')[2].split()[19]}"


def launch_command(command: str) -> str:
    """`command` ("fastdiff train ...") as it was started: on as many processes, if torchrun did it.

    What torchrun was told of the machines' meeting place is not known here; several machines need it again.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return command
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    words = ["torchrun", *(["--standalone"] if machines == 1 else ["--nnodes", str(machines)])]
    words += ["--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0":
        words += ["--max-restarts", restarts]
    # without the dashes torchrun would take some options of ours for its own
    return f"{shlex.join(words)} -m fastdiff -- {command.removeprefix('fastdiff ')}"


def _store() -> dist.Store | None:
    """Where the processes find each other; None leaves it to PyTorch.

    torchrun keeps its store when it starts the processes again, and those would look for the dead ones at the addresses
    they find in it: each start has entries of its own. On several machines each torchrun counts the starts differently;
    there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 must be set where they are started, which makes a new store each time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _outcome(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except EXPECTED as error:
        return None, error
