"""Options of a training run, validated; the attribute docstrings become the help texts of the command line."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

from fastdiff.unet_config import PRESETS

# Field: (lowest value, first value too large, what is accepted in words).
BOUNDS = {
    **dict.fromkeys(
        (
            "image_size",
            "num_train_timesteps",
            "steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "checkpoint_every",
            "keep_last",
            "keep_every",
        ),
        (1, 2**31, "at least 1"),
    ),
    **dict.fromkeys(("warmup_steps", "sample_every"), (0, 2**31, "at least 0")),
    **dict.fromkeys(("learning_rate", "max_grad_norm", "min_snr_gamma"), (1e-30, float("inf"), "greater than 0")),
    "weight_decay": (0, float("inf"), "at least 0"),
    **dict.fromkeys(("label_dropout", "dropout"), (0, 1, "in [0, 1)")),
    "superres_factor": (2, 65, "in [2, 64]"),
    "ema_decay": (0, 1, "in [0, 1)"),
    "seed": (0, 2**63, "in [0, 2^63)"),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of a training run; the defaults are the recipe of the packaged digits model."""

    task: Literal["generate", "superres"] = "generate"
    """generate: draw images like those of the dataset. superres: restore its images from a lower resolution (without
    labels and their options)."""
    superres_factor: int = 2
    """How many times smaller the images are that task superres starts from."""
    dataset: str = "digits"
    """What to learn: digits (bundled with scikit-learn), mnist, cifar10, or folder:PATH of images."""
    data_root: str = "data"
    """Where mnist and cifar10 are kept, and downloaded to when missing."""
    image_size: int | None = None
    """Resize images to this many pixels a side; None keeps their size."""
    horizontal_flip: bool = False
    """Mirror every image with probability 1/2, anew in each epoch."""
    class_conditional: bool = True
    """Tell the model the class, where the dataset has labels."""
    output: str = "runs/digits"
    """Folder of the run: checkpoints step-N, log.jsonl, loss.png, samples/."""
    model: str = "digits"
    """U-Net preset: digits, cifar10 or imagenet64. Image size, channels and classes follow the dataset."""
    dropout: float | None = None
    """Share of the activations that the residual blocks drop while training; None keeps the preset's."""
    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid", "flow", "edm"] = "cosine"
    """Noise schedule."""
    num_train_timesteps: int = 1000
    """Number of noise levels of the schedule."""
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm"] = "v_prediction"
    """What the model predicts: the noise, the image, the velocity, the flow, or EDM's preconditioned mix."""
    weighting: Literal["uniform", "min_snr"] = "uniform"
    """Loss weight of each noise level: 1, or min-SNR (Hang et al. 2023)."""
    min_snr_gamma: float = 5.0
    """Bound of the SNR for weighting min_snr."""
    label_dropout: float = 0.1
    """Fraction of labels replaced by the null class, which classifier-free guidance needs. Ignored without labels."""
    steps: int = 2500
    """Optimizer steps in all, including those before a resume."""
    batch_size: int = 128
    """Images per optimizer step, on all processes together."""
    gradient_accumulation_steps: int = 1
    """Compute each batch in this many equal pieces, to save memory; several processes share them, one each at least."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: constant, or a half cosine down to 0 at the last step."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; None does not clip."""
    ema_decay: float = 0.995
    """Decay of the moving average of the weights, which is what samples; it warms up from 0.1."""
    seed: int = 0
    """Seed of everything random: initial weights, data order, noise, timesteps, label dropout, dropout, flips."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU where there is one. Under torchrun each process takes its own."""
    fsdp: bool = False
    """Under torchrun: share out weights, gradients and optimizer state among the processes (FSDP2), instead of a copy
    for each (DDP)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype of the model; auto is bfloat16 on GPUs that have it, float32 elsewhere."""
    compile: bool = False
    """Compile the model with torch.compile; not with fsdp."""
    cuda_graph: Literal["auto", True, False] = "auto"
    """Capture the whole training step in a CUDA graph, so that small batches do not wait for the host; auto does so in
    a single process on a GPU."""
    deterministic: bool = False
    """Use only algorithms that give the same bits in every run on the same hardware; slower on a GPU."""
    log_every: int = 50
    """Steps between readings of the loss; only then does the host wait for the device."""
    checkpoint_every: int = 500
    """Steps between checkpoints (and measurements of the held-out loss). The last step always writes one."""
    keep_last: int | None = None
    """Remove all checkpoints but this many of the newest; None keeps all."""
    keep_every: int | None = None
    """With keep_last: keep those of a multiple of this many steps, too."""
    sample_every: int = 500
    """Steps between pictures of samples; 0 draws none."""
    progress: bool = True
    """Show a progress bar."""
    resume: bool = False
    """Continue the run in `output` from its newest undamaged checkpoint. A program that torchrun or SLURM starts again
    does so by itself, if there is one."""

    def __post_init__(self) -> None:
        if self.model not in PRESETS:
            raise ValueError(f"model must be one of {', '.join(PRESETS)}, got {self.model!r}")
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(hint)))}, got {value!r}")
            if hint in (int, int | None) and value is not None and type(value) is not int:
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if name in BOUNDS and value is not None:
                low, stop, accepted = BOUNDS[name]
                if not low <= value < stop:  # NaN fails as well
                    raise ValueError(f"{name} must be {accepted}, got {value}")
        if self.batch_size % self.gradient_accumulation_steps:
            accepted = f"a divisor of batch_size {self.batch_size}"
            raise ValueError(f"gradient_accumulation_steps must be {accepted}, got {self.gradient_accumulation_steps}")
        if self.fsdp and self.compile:
            raise ValueError("compile must be False with fsdp, got True")

    def command(self) -> str:
        """The shell command that makes this run: the options that differ from the defaults."""
        words = ["fastdiff", "train"]
        for option in fields(self):
            value, flag = getattr(self, option.name), option.name.replace("_", "-")
            if value != option.default and option.name != "resume":
                words += (
                    [f"--{flag}" if value else f"--no-{flag}"]
                    if isinstance(option.default, bool)
                    else [f"--{flag}", str(value)]
                )
        return shlex.join(words)
