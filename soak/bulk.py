"""Bulk sampling: killed on its way and resumed by another number of processes, to the same bytes."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from fastdiff.bulk import generate_many
from fastdiff.bulk_config import BulkConfig
from soak.children import command, launch, stop
from soak.trial import Attempt, require, trial

NUM, BLOCK = 301, 4
WORDS = ("generate", "--num", str(NUM), "--batch-size", str(BLOCK), "--num-inference-steps", "4", "--device", "cpu")
# processes of the killed run and of the one that goes on; None is no torchrun
SIZES = ((2, None), (2, 3), (None, 2), (None, None))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@trial(promise="Bulk sampling counts every image once", tried="SIGKILL at 30 %, then resumed", short=1, full=4)
def killed_bulk(folder: Path) -> Iterator[Attempt]:
    generate_many(
        BulkConfig(out=folder / "whole", num=NUM, batch_size=BLOCK, num_inference_steps=4, device="cpu", seed=5)
    )
    whole = contents(folder / "whole")
    require(len(whole) == NUM + 1, f"the whole run wrote {len(whole)} files, not {NUM} and their description")

    def attempt(number: int) -> None:
        first, second = SIZES[number % len(SIZES)]
        out, words = folder / str(number), (*WORDS, "--seed", "5", "--out", str(folder / str(number)))
        running = launch(command(*words, processes=first))
        try:
            deadline = time.monotonic() + 180
            while len(list(out.glob("*.png"))) < 0.3 * NUM and time.monotonic() < deadline:
                require(running.poll() is None, f"the run ended before it could be killed: {running.returncode}")
                time.sleep(0.002)
            time.sleep(random.Random(number).uniform(0, 0.02))
        finally:
            stop(running)
        running.communicate()
        before = {name: value for name, value in contents(out).items() if not name.startswith(".")}
        require(0.3 * NUM <= len(before) <= NUM, f"{len(before)} files were there after the kill")
        require(before.items() <= whole.items(), "a file that the killed run wrote is not as it should be")
        going_on = launch(command(*words, "--resume", "--json", processes=second))
        try:
            output, _ = going_on.communicate(timeout=300)
        finally:
            stop(going_on)
        require(going_on.returncode == 0, f"resumed, it ended with {going_on.returncode}: {output[-500:]}")
        require(contents(out) == whole, "the folder is not that of a run that was not killed")
        drawn = sum(int(count) for count in re.findall(r'"drawn": (\d+)', output))
        # a block of which a file was missing is drawn whole
        left = NUM - (len(before) - 1)
        require(left <= drawn <= left + BLOCK * (first or 1), f"{left} images were missing and {drawn} were drawn")
        shutil.rmtree(out)

    yield attempt
