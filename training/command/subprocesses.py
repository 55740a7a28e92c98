"""Child processes of the tools: services that are started, waited for, and stopped whatever happens."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from training.command.errors import UserError

logger = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 120.0
_STOP_TIMEOUT_S: Final = 15.0
_LISTENING: Final = " listening on "


class ProcessFailed(UserError):  # noqa: N818 - says what happened
    """A child process ended with an error, or never became ready; the message names its log."""


def run_verb(module: str, arguments: Sequence[str], log: Path) -> None:
    """Runs `python -m module arguments`, output to the terminal and the command to the log; raises ProcessFailed."""
    command = [sys.executable, "-m", module, *arguments]
    printable = " ".join(["python", *command[1:]])
    logger.info("$ %s", printable)
    with log.open("a") as file:
        file.write(f"$ {printable}\n")
    with _terminated(subprocess.Popen(command, env=_environment())) as process:
        code = process.wait()
    if code != 0:
        raise ProcessFailed(f"this command failed with code {code}: {printable}")


@contextmanager
def service(module: str, arguments: Sequence[str], log: Path) -> Iterator[str]:
    """Runs a service on a free port of this machine within the context; yields its URL once it listens.

    Args:
        module: "services.hospital" or "services.gateway".
        arguments: Its flags, without host and port.
        log: Its errors go there.

    Raises:
        ProcessFailed: It ended, or did not listen within `START_TIMEOUT_S`.
    """
    command = [sys.executable, "-m", module, "--port", "0", *arguments]
    logger.info("$ %s", " ".join(["python", *command[1:]]))
    announcement = log.with_suffix(".out")
    with log.open("w") as errors, announcement.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=_environment())
    with _terminated(process):
        yield _announced_url(process, announcement, log)


def _environment() -> dict[str, str]:
    """This process's environment, without a proxy for this machine's services."""
    already = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    excepted = ",".join(filter(None, [already, "127.0.0.1", "localhost"]))
    return {**os.environ, "NO_PROXY": excepted, "no_proxy": excepted}


def _announced_url(process: subprocess.Popen[bytes], announcement: Path, log: Path) -> str:
    """Waits for the line in which a service logs its URL."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        line = announcement.read_text()
        if line.endswith("\n") and _LISTENING in line:
            return line.strip().rpartition(_LISTENING)[2]
        if process.poll() is not None:
            raise ProcessFailed(
                f"the service ended with code {process.returncode}: see {log}\n{log.read_text()[-2000:]}"
            )
        time.sleep(0.05)
    raise ProcessFailed(f"the service did not listen within {START_TIMEOUT_S:.0f} seconds: see {log}")


@contextmanager
def _terminated(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Terminates the process at the end of the context, and kills it if that does not help."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
