"""What processes tell each other, where one alone can show it; test_distributed.py and test_bulk.py start several."""

import pytest

from fastdiff import processes as processes_module
from fastdiff.processes import Processes, StopTogether, launch_id


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


def test_a_launch_is_a_job_of_slurm_or_one_torchrun(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch_id() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launch_id() == "torchrun x"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    unnamed = launch_id()
    assert unnamed == launch_id()
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert launch_id() not in (unnamed, "torchrun none")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launch_id() == "SLURM job 7"


@pytest.mark.parametrize(("machines", "prefixed"), [("1", True), ("2", False)])
def test_a_start_has_entries_of_its_own_where_one_torchrun_counts_the_starts(monkeypatch, machines, prefixed):
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *given, **named: "store")
    monkeypatch.setattr("torch.distributed.PrefixStore", lambda prefix, store: (prefix, store))
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3", "MASTER_ADDR": "localhost"}
    for name, value in {**variables, "MASTER_PORT": "1", "GROUP_WORLD_SIZE": machines}.items():
        monkeypatch.setenv(name, value)
    assert processes_module._store() == (("start-3", "store") if prefixed else None)
