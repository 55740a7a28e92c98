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
    """Holds a lock that other processes respect, and that ends with this one, however it ends.

    Args:
        path: The lock's file; made, and left behind.
        wait: Whether to wait for it.

    Yields:
        Whether it is held; always, with `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def claim(path: Path, settings: dict[str, JsonValue]) -> None:
    """Notes in a file with which settings the results beside it are made, and refuses to mix them with others.

    Settings that are None now, or were, are not compared. "images" may grow: what is there is continued.

    Raises:
        UserError: The results beside it were made with other settings; they are left as they are.
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
