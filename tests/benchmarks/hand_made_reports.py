"""Reports made by hand, and runs that need no real environment."""

from benchmarks import runner, store


def record(run="one", status="done", **figures):
    """A row's record of a run."""
    made = {"run": run, "status": status, "seconds": 1.0}
    if status == "done":
        made |= {"ms": 10.0, "low_ms": 9.0, "high_ms": 12.0, "samples_ms": [9.0, 10.0, 12.0]}
    return made | figures


RUN = {
    "command": "python -m benchmarks all",
    "started": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789ab",
    "environment": {
        "torch": "2.11.0",
        "triton": "3.6.0",
        "cuda": "13.0",
        "gpus": [{"name": "NVIDIA H200", "memory_gib": 139.8, "capability": "sm_90"}],
        "cpu": "a processor",
        "cores": 16,
        "torch_threads": 16,
        "packages": {"diffusers": "0.40.0"},
    },
    "ceilings": {
        "copy_bytes_per_s": 4e12,
        "matmul_flops_per_s": {"float32": 5e13, "bfloat16": 8e14},
        "instructions_per_s": 3e13,
    },
}


def make_report(rows, device="h200", quick=False):
    """A report from {key: record or list of records}, with a run for each id."""
    report = store.new_report({"device": device, "quick": quick, "source": "abc"}, "2026-01-02")
    for key, records in rows.items():
        section, workload, contender = key.split("/")
        for one in records if isinstance(records, list) else [records]:
            store.add(report, key, {"contender": contender, **one, "section": section, "workload": workload})
            report["runs"].setdefault(one["run"], RUN)
    return report


def fix_environment(monkeypatch):
    """Versions and sources that stay what they are: collecting them takes a second, and somebody may edit a file."""
    monkeypatch.setattr(store, "environment", lambda: RUN["environment"] | {"python": "3.12.1", "cudnn": 91000})
    monkeypatch.setattr(runner, "environment", lambda: RUN["environment"])
    monkeypatch.setattr(store, "source_digest", lambda: "abc")
    monkeypatch.setattr(store, "commit", lambda: None)
    # collecting garbage costs more than everything else here
    monkeypatch.setattr(runner, "_release", lambda device: None)
