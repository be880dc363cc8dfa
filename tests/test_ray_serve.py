"""The deployment for Ray Serve, for real: two replicas on this machine, asked over HTTP and by a handle."""

import contextlib
import http.client
import io
import json
import secrets
import select
import shutil
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.checkpoint import load_model
from fastdiff.generate import packaged_model
from fastdiff.sampler import Sampler

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

from fastdiff.examples.ray_serve import ImageRequest, Options, application  # noqa: E402

REPLICAS, ONGOING, QUEUED = 2, 4, 8
# 64 images of 1000 steps are at least 16,000 calls of a model with 4 places: minutes
LONG = ImageRequest(num_images=64, num_inference_steps=1000, solver="ddpm")
REQUESTS = [
    ImageRequest(num_images=3, num_inference_steps=3, seed=1),
    ImageRequest(num_images=2, num_inference_steps=4, seed=2, solver="ddim", guidance_scale=2.0, class_label=7),
    ImageRequest(num_images=5, num_inference_steps=5, seed=3, solver="euler_a"),
    ImageRequest(num_images=1, num_inference_steps=2, seed=4, solver="heun", class_label=0),
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def processes_with(text: str) -> list[str]:
    """The command lines that hold it."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if text in line]


@pytest.fixture(scope="module")
def deployment():
    """A handle and the port. Everything on the loopback, nothing in the home folder and nothing in /dev/shm."""
    # the paths of sockets in it must be short
    folder, port = tempfile.mkdtemp(prefix="ray-", dir="/tmp"), free_port()
    with pytest.MonkeyPatch.context() as patch:
        # of all processes that Ray starts
        patch.setenv("TRITON_INTERPRET", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # a busy machine may take longer than the 5 s after which Serve kills a proxy that starts
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
        patch.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "120")
        ray.init(
            num_cpus=REPLICAS,
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=80 * 2**20,  # Ray takes no less than 75 MB
            _node_ip_address="127.0.0.1",
            _plasma_directory=folder,
            _temp_dir=folder,
        )
        try:
            # it waits a minute for the proxy, and no longer on a busy machine; `serve.run` has time
            with contextlib.suppress(TimeoutError):
                serve.start(http_options={"host": "127.0.0.1", "port": port})
            options = Options(
                num_replicas=REPLICAS,
                num_gpus=0,
                batch_size=4,
                max_ongoing_requests=ONGOING,
                max_queued_requests=QUEUED,
            )
            yield serve.run(application(options), name="fastdiff"), port
        finally:
            serve.shutdown()
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
    deadline = time.monotonic() + 30
    while processes_with(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(folder) == []


def post(port: int, asked: dict) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/images", json.dumps(asked), {"Content-Type": "application/json"})
    return connection


def answer(port: int, asked: dict) -> tuple[int, bytes]:
    with contextlib.closing(post(port, asked)) as connection:
        response = connection.getresponse()
        return response.status, response.read()


def alone(asked: ImageRequest) -> np.ndarray:
    """float32 [N, C, H, W] by a sampler of its own, one image at a time."""
    loaded = load_model(packaged_model())
    sampler = Sampler(
        loaded.model,
        loaded.schedule,
        solver=asked.solver,
        num_inference_steps=asked.num_inference_steps,
        prediction_type=loaded.prediction_type,
        guidance_scale=asked.guidance_scale,
    )
    images = [
        sampler.sample(
            (1, 1, 8, 8),
            seed=asked.seed,
            sample_indices=torch.tensor([i]),
            model_kwargs={"class_labels": torch.tensor([i % 10 if asked.class_label is None else asked.class_label])},
        )
        for i in range(asked.num_images)
    ]
    return torch.cat(images).numpy()


def levels(samples: np.ndarray) -> np.ndarray:
    """[N, C, H, W] in [-1, 1] as levels of 8 bits [N, H, W, C], not rounded."""
    return (samples.clip(-1, 1).transpose(0, 2, 3, 1) + 1) * 127.5


def test_images_are_those_of_a_solo_run_whoever_else_is_served(deployment):
    handle, port = deployment
    requests = REQUESTS * 2
    with ThreadPoolExecutor(len(requests)) as pool:
        by_http = [pool.submit(answer, port, {**asked.model_dump(), "format": "npz"}) for asked in requests]
        answers = [future.result() for future in by_http]
    by_handle = [response.result(timeout_s=120) for response in [handle.draw.remote(asked) for asked in REQUESTS]]
    assert [status for status, _ in answers] == [200] * len(requests)
    arrays = [np.load(io.BytesIO(content))["arr_0"] for _, content in answers]
    for asked, first, second, samples in zip(REQUESTS, arrays, arrays[len(REQUESTS) :], by_handle):
        expected = alone(asked)
        assert first.dtype == np.uint8
        assert samples.dtype == np.float32
        # the company changes the last bits of convolutions: at most one level of 8 bits, and half of one by rounding
        assert abs(levels(samples) - levels(expected)).max() <= 1
        for array in (first, second):
            assert array.shape == (asked.num_images, 8, 8, 1)
            assert abs(array - levels(expected)).max() <= 1.5
    status, content = answer(port, {"num_images": 4, "num_inference_steps": 3, "seed": 1})
    assert status == 200
    # two rows of two, with a pixel around each
    assert Image.open(io.BytesIO(content)).size == (19, 19)


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        ({"solver": "magic"}, 400, "known solvers are"),
        ({"class_label": 10}, 400, "class_label must be in [0, 9], got 10"),
        ({"num_inference_steps": 0}, 422, "greater than or equal to 1"),
        ({"sede": 1}, 422, "sede"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(deployment, asked, status, message):
    got, content = answer(deployment[1], asked)
    assert got == status
    assert message in content.decode()


def test_more_than_the_queue_holds_are_refused_and_clients_that_leave_free_their_places(deployment):
    handle, port = deployment
    by_handle = handle.draw.remote(LONG)
    connections: list[http.client.HTTPConnection] = []
    answered: list = []
    try:
        while not answered:
            # Serve does not count those that it is just assigning
            assert len(connections) < 3 * (REPLICAS * ONGOING + QUEUED)
            connections.append(post(port, LONG.model_dump()))
            answered, _, _ = select.select([connection.sock for connection in connections], [], [], 0.2)
        refusals = [connection.getresponse() for connection in connections if connection.sock in answered]
        assert {refusal.status for refusal in refusals} == {503}
        assert b"backpressure" in refusals[0].read()
        assert len(connections) > QUEUED
    finally:
        by_handle.cancel()
        for connection in connections:
            connection.close()
    # all places were taken for minutes; a refusal says that somebody has not left yet
    for asked in REQUESTS:
        while (got := answer(port, asked.model_dump()))[0] == 503:
            time.sleep(0.1)
        assert got[0] == 200
    with pytest.raises(serve.exceptions.RequestCancelledError):
        by_handle.result(timeout_s=30)
