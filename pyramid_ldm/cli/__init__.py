"""The command line: one small file a command."""

import argparse
import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from pyramid_ldm import __version__
from pyramid_ldm.cli import (
    check,
    curate,
    demo,
    encode,
    evaluate,
    info,
    latents,
    reconstruct,
    sample,
    train_ae,
    train_flow,
)
from pyramid_ldm.errors import UserError

COMMANDS = (demo, check, curate, train_ae, encode, train_flow, sample, reconstruct, latents, evaluate, info)
DONE, WRONG_INPUT, INTERRUPTED = 0, 2, 130  # 1 is what Python makes of an exception: a bug


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 2 wrong input, 130 interrupted (a bug raises, which is 1)."""
    parser = _Parser(prog="pyramid-ldm", description="Train your own model of 2K images from a folder of photographs.")
    parser.add_argument("--version", action="version", version=f"pyramid-ldm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for module in COMMANDS:
        command = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=f"{module.HELP}.\n\nexample: {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    chosen = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata, by the hundred; what costs pixels is an error
    try:
        finished = bool(chosen.run(chosen))
    except KeyboardInterrupt:
        print("pyramid-ldm: stopped; what is whole stays, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except Exception as error:
        message = _of_the_input(error)
        if message is None or os.environ.get("PYRAMID_LDM_TRACEBACK"):
            raise
        print(f"pyramid-ldm: {message}", file=sys.stderr)
        return WRONG_INPUT
    finally:
        _leave_processes()
    return DONE if finished else INTERRUPTED


def _of_the_input(error: Exception) -> str | None:
    """What to say, in a line, of an error that is not ours: the user's input, or the system's. None for a bug."""
    if isinstance(error, UserError):
        return " ".join(str(error).split("\n"))
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or "while writing"
            return f"no space left on the disk ({where}); free some and run again"
        if error.errno is None:  # raised by a library
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{where or 'the system'}: {(error.strerror or type(error).__name__).lower()}"
    # torch's own types, which are not imported for --help.
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory; lower train.batch_size or --batch-size, or set model.checkpoint_factors"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of memory; lower train.batch_size (raise train.accumulate as much), --batch-size or data.workers"
    return None


def _leave_processes() -> None:
    if "pyramid_ldm.training.runtime" in sys.modules:
        sys.modules["pyramid_ldm.training.runtime"].finish()
