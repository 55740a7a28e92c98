"""What every verb does around its work: read its configuration, and report errors in one line."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from pydantic import ValidationError

from defense.errors import DefenseError
from services.protocol.errors import ServiceError
from services.settings import Config, explained, read
from training.command.errors import UserError

KNOWN_ERRORS: Final = (UserError, DefenseError, ServiceError, OSError)
"""What is told in one line; everything else is a fault of the program."""

C = TypeVar("C", bound=Config)


def run(body: Callable[[C], int], kind: type[C], argv: Sequence[str] | None, *, prog: str) -> int:
    """Reads a verb's configuration from its flags and runs it; known errors become one line on stderr.

    Args:
        body: Takes the configuration and returns the exit code.
        kind: The configuration; its docstring says what the verb does.
        argv: The arguments; `sys.argv[1:]` if None.
        prog: The program's name, such as "python -m training.certify".

    Returns:
        The body's exit code; 2 after a known error; 130 after Ctrl-C.
    """
    config = read(kind, argv, prog=prog)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line a request would drown everything else
    try:
        return body(config)
    except ValidationError as error:  # of a configuration that the verb made
        lines = explained(error)
    except KNOWN_ERRORS as error:
        lines = [str(error)]
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    for line in lines:
        print(f"{prog}: error: {line}", file=sys.stderr)
    return 2
