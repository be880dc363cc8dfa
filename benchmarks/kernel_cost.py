"""What the compiled kernels cost, read from their binaries: python -m benchmarks.kernel_cost

Needs no GPU. The cases are those of tests/kernels/static_check.py: each launcher's own arguments, compiled for five
targets. SASS instructions per element count the whole listing, bytes per element one pass over global memory; both are
what a measured time will be held against, and are no times themselves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from fastdiff.environment import environment

SCRIPT = Path(__file__).parents[1] / "tests" / "kernels" / "static_check.py"
TARGET = "sm_90"


def table(costs: dict[str, dict[str, dict]]) -> str:
    """Markdown: a line for each case, with its figures for sm_90 and the targets it was compiled for."""
    lines = [
        f"| kernel ({TARGET}) | instructions per element | bytes per element | registers | spills | compiled for |",
        "|---|---|---|---|---|---|",
    ]
    for name, targets in costs.items():
        figures = targets[TARGET]
        spilled = sum(target["spilled"] for target in targets.values())
        lines.append(
            f"| {name} | {figures['instructions']:.1f} | {figures['bytes_per_element']} | {figures['registers']} "
            f"| {spilled} | {', '.join(targets)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON and the page")
    options = parser.parse_args()
    # the interpreter cannot compile kernels that call other kernels' functions
    done = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    costs = json.loads(done.stdout)
    day = datetime.date.today().isoformat()
    command = shlex.join(["python", "-m", "benchmarks.kernel_cost", *sys.argv[1:]])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kernel-cost_{TARGET.replace('_', '')}_{day}"
    report = {"command": command, "date": day, "environment": environment(), "costs": costs}
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    versions = f"torch {report['environment']['torch']}, triton {report['environment']['triton']}"
    page = f"# Static cost of the kernels\n\n`{command}`, {day}, {versions}, no GPU.\n\n{table(costs)}\n"
    path.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
