"""The command line: parsing, and errors as one sentence. A command imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Sequence

import tyro

from fastdiff.cli_commands import Command, Parser
from fastdiff.cli_runners import FAILED, INTERRUPTED, run
from fastdiff.profile_config import FIGURES

# also what the parser exits with
BAD_ARGUMENT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for bad arguments, 130 after Ctrl-C, otherwise 1.

    arguments: without the program's name; None takes those of the process. An error is one sentence on stderr; with
    FASTDIFF_TRACEBACK=1 it is raised, to see where it comes from.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--"]:
        words = words[1:]  # after torchrun's own options; some versions of Python pass it on
    name = _command_name(words)
    try:
        command = _parse(words)
        return run(command)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("FASTDIFF_TRACEBACK") == "1":
            raise
        return _report(name, error)


def _command_name(words: list[str]) -> str:
    inner = {"profile": ("sample", "train"), "checkpoint": ("verify", "inspect"), "eval": ("samples", "likelihood")}
    if words and words[0] in inner:
        return " ".join(words[:2] if words[1:2] and words[1] in inner[words[0]] else words[:1])
    return words[0] if words and words[0] in ("sample", "train", "generate", "verify", "env") else ""


def _parse(words: list[str]) -> Command:
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            flat = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
            return tyro.cli(Parser, args=words, prog="fastdiff", config=flat)  # type: ignore[call-overload]
    except SystemExit as stop:
        if stop.code in (0, None):
            if words[:1] == ["profile"]:
                print(FIGURES)
            raise
        raise ValueError(_first_paragraph(captured.getvalue())) from None


def _first_paragraph(message: str) -> str:
    """The sentence in the parser's message: a title, the sentence, a rule, help; framed if the output is UTF-8."""
    lines = [line.strip(" │╭╮╰╯") for line in message.splitlines()[1:]]
    while lines and _is_rule(lines[0]):
        lines.pop(0)
    sentence = " ".join(itertools.takewhile(lambda line: not _is_rule(line), lines)).strip()
    # a dataclass that refuses its values is reported under the name of its class
    sentence = re.sub(r"^Error parsing ((Sample|Train|Generate|what): )?", "", sentence)
    return sentence.rstrip(".") or "the arguments could not be read"


def _is_rule(line: str) -> bool:
    return set(line) <= set("-─")


def _report(name: str, error: Exception) -> int:
    """One sentence on stderr, and the exit status of the error."""
    message = " ".join(str(error).split()) or type(error).__name__
    bad_argument = isinstance(error, (ValueError, TypeError)) and type(error).__name__ != "CheckpointError"
    expected = bad_argument or isinstance(error, (OSError, ImportError, RuntimeError, ArithmeticError, ValueError))
    if not expected:
        message = f"{type(error).__name__}: {message} (FASTDIFF_TRACEBACK=1 shows where)"
    print(f"{' '.join(['fastdiff', name]).strip()}: error: {message}", file=sys.stderr)
    return BAD_ARGUMENT if bad_argument else FAILED
