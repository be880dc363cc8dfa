"""One training iteration as an object: batch, flips, noise, forward and backward by pieces, then the update.

All that differs from step to step (which images, of which epochs, the learning rate, the weight of the average) lies in
tensors on the device that are written before the iteration starts. The iteration itself reads nothing of the host, so
on a GPU it is captured once, whole, and then replayed.

Several processes cut a batch into the same pieces as one does and take contiguous runs of them: with the same number of
pieces, each is computed to the same bits by any number of processes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastdiff.activation_memory import ActivationMemory
from fastdiff.compilation import CompiledOrEager, compile_options, cudnn_benchmark
from fastdiff.cuda_graph import capture
from fastdiff.data import BatchOrder, Dataset, random_flip
from fastdiff.ema import EMA
from fastdiff.host_memory import keep_host_memory
from fastdiff.loss import DiffusionLoss
from fastdiff.parallel import gathered, share
from fastdiff.processes import Processes
from fastdiff.shards import whole
from fastdiff.train_config import TrainConfig
from fastdiff.train_setup import conditions, pieces_each
from fastdiff.train_update import Update
from fastdiff.unet import UNet

# The first call also allocates what libraries keep for good; the second one shows the activations alone.
MEASURED_CALLS = 2


class _OutOfMemory(Exception):
    """While gradients were computed: no weight has moved yet."""


class TrainStep:
    """Advances a model by one optimizer step a call, and its moving average with it.

    `model` is put into training mode and changed in place; `dataset` (uint8), model and objective are on one device.
    Of `config` the options of the step are used: batch_size, gradient_accumulation_steps, horizontal_flip, the learning
    rate and its schedule, weight_decay, max_grad_norm, ema_decay, seed, compile, cuda_graph, fsdp, deterministic, task.
    processes: those that share each batch, each with a TrainStep of its own; without them, one alone.

    One process that runs out of memory cuts its batches into twice as many pieces from then on, with one warning; among
    several, torch.OutOfMemoryError says which option to raise. On a CPU the process keeps its freed memory
    (`keep_host_memory`).

    Attributes:
        ema: the moving average; `averages` gives what to sample from.
        activation_bytes: what the forward pass of one piece of the batch keeps for its backward pass, the weights that
            autocast has cast included; None before the first step, for a compiled model on a CPU and with shards.

    Raises ValueError for cuda_graph=True without a CUDA device or with several processes, and for a batch that cannot
    be shared evenly.
    """

    def __init__(
        self,
        model: UNet,
        objective: DiffusionLoss,
        dataset: Dataset,
        config: TrainConfig,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.objective, self.dataset, self.config = model.train(), objective, dataset, config
        self._processes = processes = processes or Processes()
        self.device = device = dataset.images.device
        if config.cuda_graph is True and device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a CUDA device, got {device}")
        if config.cuda_graph is True and processes.size > 1:
            raise ValueError(f"cuda_graph=True needs a single process, got {processes.size}")
        if device.type == "cpu":
            keep_host_memory()
        self._captures = device.type == "cuda" and config.cuda_graph is not False and processes.size == 1
        self._advance: Callable[[], None] | None = None
        self._pieces = pieces_each(config, processes.size)
        self.ema = EMA(model, config.ema_decay)
        self._parallel = share(model, self.ema.model, objective.dtype, processes, fsdp=config.fsdp)
        self._network = (
            CompiledOrEager(self._parallel.network, **compile_options(device, training=True))
            if config.compile
            else self._parallel.network
        )
        self.activation_bytes: int | None = None
        self._measurable = (device.type == "cuda" or not config.compile) and not (config.fsdp and processes.size > 1)
        self._measured = 0
        self._condition = conditions(config)
        self._order = BatchOrder(config.seed, len(dataset), config.batch_size, device=device)
        share_size = config.batch_size // processes.size
        self._share = slice(processes.rank * share_size, (processes.rank + 1) * share_size)
        self._indices, self._epochs = torch.zeros(2, share_size, dtype=torch.int64, device=device)
        self._losses = torch.zeros(share_size, device=device)
        self._gradient_norm = torch.zeros((), device=device)
        self._update = Update(model, self.ema, config)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Do step `step`, counted from 0, without waiting for the device.

        Returns the weighted loss of each sample of this process, float32 [batch_size / processes], and the norm of the
        whole gradient before clipping, a float32 scalar. Both are on the device, and the next call overwrites them.
        Where the norm is not finite, the weights are as they were and stay so.
        """
        indices, epochs = self._order.batch(step)
        self._indices.copy_(indices[self._share])
        self._epochs.copy_(epochs[self._share])
        self._update.prepare(step)
        while not self._advanced():
            self._cut_finer(step)
        return self._losses, self._gradient_norm

    def _advanced(self) -> bool:
        """Do the iteration; whether it fitted into memory."""
        try:
            if self._advance is None:
                self._advance = self._captured() if self._captures else self._iterate
            self._advance()
        except _OutOfMemory:
            return False
        return True

    def _cut_finer(self, step: int) -> None:
        """Choose at least twice as many pieces after one did not fit into memory; several processes are told to."""
        self._advance = None
        self._update.drop_gradients()
        batch, pieces = self.config.batch_size, self._pieces * self._processes.size
        images, processes = batch // pieces, self._processes.size
        fewest = 2 * pieces if processes == 1 else pieces + processes
        finer = next((count for count in range(fewest, batch + 1, processes) if batch % count == 0), None)
        if finer is None:
            raise torch.OutOfMemoryError(
                f"{images} images at a time, a batch in {pieces} pieces, do not fit into memory"
            )
        if processes > 1:
            raise torch.OutOfMemoryError(
                f"{images} images at a time do not fit into memory: gradient_accumulation_steps must be {finer} or more"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._pieces, self._measured = finer, 0
        warnings.warn(
            f"{images} images at a time do not fit into memory: from step {step + 1} on they are {batch // finer},"
            f" as with gradient_accumulation_steps {finer}",
            stacklevel=3,
        )

    def _captured(self) -> Callable[[], None]:
        """What replays the iteration, or the iteration itself where it cannot be captured; one warning says why."""
        state = [*self.state().values(), *self.ema.model.state_dict().values()]
        before: list[Tensor] = []

        def reset() -> None:
            for value, old in zip(state, before):
                value.copy_(old)

        try:
            before.extend(value.clone() for value in state)
            replay, _ = capture(self._iterate, reset, self.device, None)
        except (RuntimeError, _OutOfMemory) as error:
            torch.cuda.synchronize(self.device)  # the warm-up may still be running on its own stream
            self._update.drop_gradients()
            if isinstance(error, _OutOfMemory):
                raise
            reason = str(error).strip().splitlines()[0]
            message = f"the training step cannot be captured in a CUDA graph, so it runs eagerly: {reason}"
            warnings.warn(message, stacklevel=4)
            replay = self._iterate
        finally:
            reset()  # from the warm-up
        return replay

    def _iterate(self) -> None:
        losses = self._gradients()
        self._gradient_norm.copy_(self._update())
        self._losses.copy_(losses)

    def _gradients(self) -> Tensor:
        """The losses of this process's share of the batch; the gradients of the whole batch lie in the weights then."""
        pieces = list(zip(self._indices.chunk(self._pieces), self._epochs.chunk(self._pieces)))
        losses = []
        benchmark = self.config.compile and not self.config.deterministic
        try:
            # One autocast around all pieces: it keeps the weights that it has cast.
            with cudnn_benchmark(benchmark), self._parallel.precision():
                for number, (indices, epochs) in enumerate(pieces, start=1):
                    with self._parallel.adding(last=number == len(pieces)):
                        losses.append(self._accumulate(indices, epochs))
        except torch.OutOfMemoryError as error:
            # without the error's traceback, which holds on to the activations
            raise _OutOfMemory(str(error)) from None
        return torch.cat(losses)

    def _accumulate(self, indices: Tensor, epochs: Tensor) -> Tensor:
        """The losses of one piece of the batch; its gradients are added to those of the pieces before it."""
        config = self.config
        images, labels = self.dataset.batch(indices)
        if config.horizontal_flip:
            images = random_flip(images, seed=config.seed, sample_indices=indices, epochs=epochs)
        model_kwargs = {}
        if self.model.config.dropout:
            model_kwargs["dropout_keys"] = torch.stack([torch.full_like(indices, config.seed), indices, epochs], dim=1)
        measuring = self._measurable and self._measured < MEASURED_CALLS
        with ActivationMemory(self.model, self.device) if measuring else contextlib.nullcontext() as memory:
            loss, prediction, gradient = self.objective(
                self._network,
                images,
                labels,
                indices,
                epochs,
                condition=self._condition(images),
                model_kwargs=model_kwargs,
                grad_scale=self._parallel.gradient_scale / config.batch_size,
            )
        if memory is not None:
            self.activation_bytes = memory.bytes
            self._measured += 1
        with torch.autocast(self.device.type, enabled=False):
            prediction.backward(gradient=gradient)
        return loss

    def averages(self, *, keep: bool = True) -> UNet | None:
        """The model to sample from, whole: `ema.model`, or if that is in shards a copy.

        All processes must ask at once; those that do not `keep` it may get None.
        """
        return gathered(self.ema.model, keep=keep)

    def state(self) -> dict[str, Tensor]:
        """The weights and the optimizer's state, by the names of a checkpoint: this process's, and not copied."""
        return self._update.state()

    def whole_state(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The same, whole; of shards in copies on the CPU. All processes must ask at once, {} unless they `keep` it."""
        state = {}
        for name, value in self.state().items():
            full = whole(value)
            if keep:
                state[name] = full if full is value else full.cpu()
        return state

    def load_state(self, averages: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Take over whole averaged weights and what `whole_state` gave, in place."""
        self._update.load_state(averages, tensors)
