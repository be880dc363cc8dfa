"""What of the captured steps can be tested on any machine: who waits for whom."""

import pytest
import torch

from fastdiff import cuda_graph


class Stream:
    """Stands in for a CUDA stream: notes what it waits for."""

    def __init__(self, log: list, name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        return f"event of {self.name}"


def test_a_call_on_another_stream_waits_for_the_last_one(monkeypatch):
    log: list[str] = []
    lock = cuda_graph.StreamLock()
    for name in ("first", "second", "third"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, name=name: Stream(log, name))
        with lock:
            lock.device = torch.device("cuda", 0)
    assert log == ["second waits for event of first", "third waits for event of second"]


def test_the_lock_is_free_after_an_error():
    lock = cuda_graph.StreamLock()
    with pytest.raises(ValueError, match="step"), lock:
        raise ValueError("step")
    with lock:
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_failed_capture_leaves_stream_and_generator_usable():
    device = torch.device("cuda", torch.cuda.current_device())
    value = torch.ones(1, device=device)
    before = torch.cuda.current_stream(device)
    with pytest.raises(RuntimeError):
        cuda_graph.capture(lambda: value.add_(value.item()), lambda: None, device, None)
    assert torch.cuda.current_stream(device) == before
    assert torch.randn(4, device=device).isfinite().all()
    cuda_graph.capture(lambda: value.add_(1), lambda: None, device, None)[0]()
