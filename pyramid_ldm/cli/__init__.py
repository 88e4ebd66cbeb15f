"""The command line: one small file a command."""

import argparse
import errno
import sys
from collections.abc import Sequence
from typing import NoReturn

from pyramid_ldm import __version__
from pyramid_ldm.cli import demo, encode, evaluate, info, latents, reconstruct, sample, train_ae, train_flow
from pyramid_ldm.config.base import ConfigError
from pyramid_ldm.errors import UserError

COMMANDS = (demo, train_ae, encode, train_flow, sample, reconstruct, latents, evaluate, info)
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
    try:
        finished = bool(chosen.run(chosen))
    except (UserError, ConfigError) as error:
        return _complain(str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _complain(
                f"no space left on the disk ({error.filename or 'while writing'}); free some and run again"
            )
        if isinstance(error, PermissionError):
            return _complain(f"{error.filename}: permission denied")
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for --help
            raise
        return _complain("out of GPU memory; lower train.batch_size or --batch-size, or set model.checkpoint_factors")
    finally:
        _leave_processes()
    return DONE if finished else INTERRUPTED


def _complain(message: str) -> int:
    # An error that crossed a loader's worker process arrives with that process's traceback; the message ends it.
    print(f"pyramid-ldm: {message.strip().splitlines()[-1].split('UserError: ')[-1]}", file=sys.stderr)
    return WRONG_INPUT


def _leave_processes() -> None:
    if "pyramid_ldm.training.runtime" in sys.modules:
        sys.modules["pyramid_ldm.training.runtime"].finish()
