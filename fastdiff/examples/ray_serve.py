"""Images over HTTP from many GPUs: Ray Serve with one fastdiff engine on each, on one machine or on a cluster.

    serve run fastdiff.examples.ray_serve:application checkpoint=/shared/runs/photos num_replicas=8
    serve run fastdiff.examples.ray_serve:application num_gpus=0          # the packaged digits, on the CPU

    curl --json '{"class_label": 3, "num_images": 4, "seed": 7}' localhost:8000/images > threes.png

From Python, without HTTP:

    handle = serve.run(application(Options()))
    samples = handle.draw.remote(ImageRequest(seed=7)).result()  # or: await handle.draw.remote(...)
"""

from __future__ import annotations

import asyncio
import io
import math
from typing import Literal

import numpy as np
import ray
import torch
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from fastdiff.checkpoint import load_model
from fastdiff.engine import Engine, Request
from fastdiff.engine_thread import EngineThread
from fastdiff.generate import find_checkpoint
from fastdiff.images import image_grid, save_png, to_uint8

app = FastAPI(title="fastdiff")


class Options(BaseModel):
    """What `serve run` takes as name=value. A checkpoint must be readable at the same path on every machine."""

    model_config = ConfigDict(extra="forbid")
    checkpoint: str | None = None
    num_replicas: int = 1
    num_gpus: float = 1
    # places in a model call: a power of two; a guided image takes two
    batch_size: int = 16
    compile: bool = False
    # in each replica
    max_ongoing_requests: int = 32
    # in front of them all; who comes then is refused with status 503
    max_queued_requests: int = 64


class ImageRequest(BaseModel):
    """What to draw: the same fields give the same images, whoever else is served. Image i is that of sample i."""

    model_config = ConfigDict(extra="forbid")
    class_label: int | None = Field(default=None, description="a model with classes draws all in turn without it")
    num_images: int = Field(default=1, ge=1, le=64)
    seed: int = Field(default=0, ge=0, lt=2**63)
    solver: str = "dpmpp_2m"
    num_inference_steps: int = Field(default=15, ge=1, le=1000)
    guidance_scale: float | None = None
    format: Literal["png", "npz"] = Field(
        default="png", description="one picture of all, or uint8 [N, H, W, C] as arr_0"
    )


@serve.deployment
@serve.ingress(app)
class Images:
    """One replica: an engine on its own GPU."""

    def __init__(self, options: Options) -> None:
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        loaded = load_model(find_checkpoint(options.checkpoint), device=device)
        config = loaded.model.config
        if config.condition_channels:
            raise ValueError("checkpoint must be one of task generate, a model of task superres needs its images")
        self.num_classes = config.num_classes
        sizes = [2**i for i in range(options.batch_size.bit_length())]
        engine = Engine(
            loaded.model,
            loaded.schedule,
            (config.in_channels, config.sample_size, config.sample_size),
            prediction_type=loaded.prediction_type,
            batch_sizes=sizes,
            compile=options.compile,
        )
        # no client waits for compilation and capture
        for size in sizes:
            engine.run(self.requests(ImageRequest(num_images=1, num_inference_steps=1)) * size)
        self.engine = EngineThread(engine)

    def requests(self, asked: ImageRequest) -> list[Request]:
        """A request for each image."""
        if self.num_classes is None:
            if asked.class_label is not None:
                raise ValueError(f"class_label must be None for a model without classes, got {asked.class_label}")
            arguments: list[dict[str, torch.Tensor]] = [{}] * asked.num_images
        else:
            if asked.class_label not in (None, *range(self.num_classes)):
                raise ValueError(f"class_label must be in [0, {self.num_classes - 1}], got {asked.class_label}")
            classes = range(self.num_classes) if asked.class_label is None else [asked.class_label]
            labels = torch.tensor(classes)[torch.arange(asked.num_images) % len(classes)]
            arguments = [{"class_labels": label} for label in labels.split(1)]
        return [
            Request(
                solver=asked.solver,
                num_inference_steps=asked.num_inference_steps,
                guidance_scale=asked.guidance_scale,
                seed=asked.seed,
                sample_index=i,
                model_kwargs=given,
            )
            for i, given in enumerate(arguments)
        ]

    async def draw(self, asked: ImageRequest) -> np.ndarray:
        """float32 [N, C, H, W]. A client that leaves frees its places: Serve cancels this coroutine."""
        futures = [self.engine.submit(one) for one in self.requests(asked)]
        try:
            samples = await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            for future in futures:
                future.cancel()
        images = torch.stack(samples).cpu()
        if not images.isfinite().all():
            raise FloatingPointError(f"samples of seed {asked.seed} with {asked.solver} are not finite")
        return images.numpy()

    @app.post("/images", response_class=Response)
    async def answer(self, asked: ImageRequest) -> Response:
        """The images as a PNG or an npz file."""
        try:
            samples = await self.draw(asked)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        images, file = to_uint8(torch.from_numpy(samples)), io.BytesIO()
        if asked.format == "npz":
            np.savez(file, images.permute(0, 2, 3, 1).numpy())
            return Response(file.getvalue(), media_type="application/octet-stream")
        save_png(image_grid(images, columns=math.ceil(len(images) ** 0.5)), file)
        return Response(file.getvalue(), media_type="image/png")

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has stopped."""
        self.engine.check()


def application(options: Options) -> serve.Application:
    """For `serve run` and `serve.run`."""
    return Images.options(  # type: ignore[attr-defined]  # the decorator has made a deployment of the class
        num_replicas=options.num_replicas,
        ray_actor_options={"num_gpus": options.num_gpus},
        max_ongoing_requests=options.max_ongoing_requests,
        max_queued_requests=options.max_queued_requests,
    ).bind(options)
