"""What processes tell each other, where one alone can show it; test_distributed.py and test_bulk.py start several."""

import pytest

from fastdiff.processes import Processes, StopTogether


def test_alone_everything_is_done_once_and_at_once():
    done = []
    alone = Processes()
    assert alone.first
    for act in (alone.first_does, alone.all_do, alone.first_of_machine_first):
        assert act(lambda: done.append(0) or len(done)) == len(done)
    assert len(done) == 3
    stop = StopTogether(alone)
    assert (stop(False), stop(True), stop.settle()) == (False, True, False)


@pytest.mark.parametrize(("local_rank", "order"), [(0, ["act", "meet", "meet"]), (1, ["meet", "act", "meet"])])
def test_the_first_of_a_machine_acts_before_its_others(monkeypatch, local_rank, order):
    seen = []

    def meet(errors, error):
        seen.append("meet")
        errors[:] = [error] * len(errors)

    monkeypatch.setattr("torch.distributed.all_gather_object", meet)
    processes = Processes(local_rank, 2, local_rank)
    assert processes.first_of_machine_first(lambda: seen.append("act") or "data") == "data"
    assert seen == order


def test_the_error_of_any_process_is_raised(monkeypatch):
    def meet(errors, error):
        errors[:] = [error, ValueError("the other's image is not readable")]

    monkeypatch.setattr("torch.distributed.all_gather_object", meet)
    with pytest.raises(ValueError, match="the other's image"):
        Processes(0, 2, 0).all_do(lambda: "data")
