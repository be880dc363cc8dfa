"""A trial: one thing that can go wrong, tried a number of times."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

Attempt = Callable[[int], str | None]
# of so many attempts at least four in five must have compared something
ENOUGH = 40
Setup = Callable[[Path], AbstractContextManager[Attempt]]


class NotSurvived(Exception):
    """An attempt ended otherwise than the promise says."""


class NotHere(Exception):
    """The trial cannot be made on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """setup(folder) prepares and hands out attempt(number), which raises where the promise is broken.

    An attempt that ends before it has compared anything returns why: it survives, but too many of those are a failure.

    Attributes:
        name: for the option --only.
        promise: the row of the table that it belongs to.
        tried: what one attempt is.
        short, full: how many attempts a test and the whole run make; 0 where tests of another file try the same.
        setup: the folder is empty and goes away afterwards. It raises NotHere where something is missing.
    """

    name: str
    promise: str
    tried: str
    short: int
    full: int
    setup: Setup


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """tried attempts, of which survived; the first failure, and the number of its attempt (None: not that of one).

    void: how many of those that survived compared nothing. absent: why it was not tried at all.
    """

    tried: int = 0
    survived: int = 0
    void: int = 0
    seconds: float = 0.0
    failure: str | None = None
    number: int | None = None
    absent: str | None = None

    @property
    def ok(self) -> bool:
        """Nothing went wrong, or nothing could be tried."""
        return self.failure is None


def trial(*, promise: str, tried: str, short: int, full: int) -> Callable[[Callable[[Path], Iterator[Attempt]]], Trial]:
    """Makes a Trial of a generator function that yields attempt(number) once; its name with dashes is the trial's."""

    def decorate(function: Callable[[Path], Iterator[Attempt]]) -> Trial:
        name = function.__name__.replace("_", "-")
        return Trial(name=name, promise=promise, tried=tried, short=short, full=full, setup=contextmanager(function))

    return decorate


def require(condition: object, what: str) -> None:
    """Raise NotSurvived saying what is wrong unless condition holds."""
    if not condition:
        raise NotSurvived(what)


def run(
    trial: Trial, numbers: range, folder: Path, *, told: Callable[[int, bool], None] = lambda number, ok: None
) -> Outcome:
    """Make the attempts of these numbers and go on after a failure; told(number, survived) after each."""
    began = time.perf_counter()
    tried = survived = void = 0
    failure = first = None
    try:
        with trial.setup(folder) as attempt:
            for number in numbers:
                tried += 1
                try:
                    void += attempt(number) is not None
                    survived += 1
                except Exception as error:
                    if failure is None:
                        failure, first = describe(error), number
                told(number, tried == survived)
    except NotHere as error:
        return Outcome(absent=str(error))
    except Exception as error:
        failure = failure or f"setup: {describe(error)}"
    if failure is None and tried >= ENOUGH and void > tried / 5:
        failure = f"{void} of {tried} attempts compared nothing"
    seconds = time.perf_counter() - began
    return Outcome(tried=tried, survived=survived, void=void, seconds=seconds, failure=failure, number=first)


def describe(error: Exception) -> str:
    """What is wrong; where it came up, too, for what is no verdict of the trial."""
    if isinstance(error, NotSurvived):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name} line {place.lineno})"
