"""How both tools end."""

import sys
from collections.abc import Callable

from pyramid_ldm.errors import UserError


def exit_code(name: str, work: Callable[[], object]) -> int:
    """0 done; 2 the input is wrong or the system fails, said in one line; 130 after Ctrl-C, when the same command goes
    on."""
    try:
        work()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{name}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0
