"""Files that several processes share: one takes a run at a time, and all have the same settings."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import JsonValue

from defense.files import replace_file
from training.command.errors import UserError


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds an inter-process lock file, which is released however this process ends; yields whether it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def claim(path: Path, settings: dict[str, JsonValue]) -> None:
    """Records in a file the settings of the results beside it, and refuses to mix them with others.

    Settings that are or were None are not compared; "images" may grow. Raises UserError, and leaves the results as they
    are, if other settings differ.
    """
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        old = json.loads(path.read_bytes()) if path.exists() else {}
        merged = {**old, **{name: value for name, value in settings.items() if value is not None}}
        changes = [
            f"{name} was {old[name]}, is {value}"
            for name, value in merged.items()
            if old.get(name, value) != value and not (name == "images" and value > old[name])
        ]
        if changes:
            raise UserError(f"{path.parent} was made otherwise ({'; '.join(changes)}): use the same, or another --out")
        replace_file(path, (json.dumps(merged, indent=1) + "\n").encode())
