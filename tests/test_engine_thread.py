"""The engine's thread: futures from many threads and coroutines, cancelled and not, and what an error leaves."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastdiff import NoiseSchedule
from fastdiff.engine import Engine, Request
from fastdiff.engine_thread import EngineThread

SHAPE = (1, 4, 4)
LONG = Request(solver="ddpm", num_inference_steps=1000)


class Gated:
    """A model whose calls wait for `open`; it tells when the first one began, and counts them."""

    def __init__(self) -> None:
        self.calls = 0
        self.began, self.open = threading.Event(), threading.Event()

    def __call__(self, x, t):
        self.calls += 1
        self.began.set()
        assert self.open.wait(60)
        return torch.tanh(x)


def new_engine(model=torch.tanh, places: int = 4) -> Engine:
    return Engine(lambda x, t: model(x), NoiseSchedule.linear(), SHAPE, batch_sizes=(1, places))


def request(seed: int) -> Request:
    return Request(solver=("ddim", "dpmpp_2m")[seed % 2], num_inference_steps=2 + seed % 3, seed=seed)


def test_requests_of_many_threads_get_their_own_samples():
    expected = new_engine().run([request(seed) for seed in range(40)])
    thread = EngineThread(new_engine())
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(lambda seed: thread.submit(request(seed)).result(60), range(40)))
    thread.close()
    for sample, one in zip(samples, expected):
        assert torch.equal(sample, one)


def test_a_coroutine_that_is_cancelled_frees_its_place_before_the_next_step():
    model = Gated()
    engine = Engine(model, NoiseSchedule.linear(), SHAPE, batch_sizes=(1,))
    thread = EngineThread(engine)

    async def draw(one):
        return await asyncio.wrap_future(thread.submit(one))

    async def scenario():
        first = asyncio.create_task(draw(LONG))
        await asyncio.to_thread(model.began.wait, 60)
        second = asyncio.create_task(draw(request(3)))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        model.open.set()
        return await asyncio.wait_for(second, 60)

    sample = asyncio.run(scenario())
    thread.close()
    assert not engine.busy
    # the step of the long request that was under way, and the two of the other
    assert model.calls == 3
    assert torch.equal(sample, new_engine().run([request(3)])[0])


def test_a_refused_request_raises_and_the_others_go_on():
    thread = EngineThread(new_engine())
    refused, other = thread.submit(Request(solver="magic", num_inference_steps=2)), thread.submit(request(1))
    with pytest.raises(ValueError, match="known solvers are"):
        refused.result(60)
    assert other.result(60).shape == SHAPE
    thread.check()
    thread.close()


def test_an_error_of_a_step_reaches_all_and_ends_the_thread():
    calls = []

    def fail(x):
        calls.append(x)
        if len(calls) > 2:
            raise ValueError("out of order")
        return torch.tanh(x)

    thread = EngineThread(new_engine(fail, places=2))
    thread.submit(Request(solver="ddim", num_inference_steps=2)).result(60)
    # more than there are places: one waits
    futures = []
    for seed in range(5):
        try:
            futures.append(thread.submit(request(seed)))
        except RuntimeError:
            break
    for future in futures:
        with pytest.raises(RuntimeError, match="the engine has stopped: out of order"):
            future.result(60)
    for act in (thread.check, lambda: thread.submit(request(0))):
        with pytest.raises(RuntimeError, match="the engine has stopped: out of order"):
            act()
    thread.close()


def test_closing_cancels_what_is_not_done():
    model = Gated()
    thread = EngineThread(Engine(model, NoiseSchedule.linear(), SHAPE, batch_sizes=(1,)))
    running = thread.submit(LONG)
    assert model.began.wait(60)
    waiting = thread.submit(LONG)
    model.open.set()
    thread.close()
    assert running.cancelled()
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        thread.submit(LONG)


def test_a_first_request_that_the_model_refuses_does_not_end_the_thread():
    thread = EngineThread(new_engine())
    wrong = thread.submit(Request(num_inference_steps=2, model_kwargs={"label": torch.tensor([1])}))
    with pytest.raises(TypeError, match="label"):
        wrong.result(60)
    assert torch.equal(thread.submit(request(3)).result(60), new_engine().run([request(3)])[0])
    thread.close()
