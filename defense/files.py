"""Files that are whole or not there."""

import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file by a flushed copy renamed into place: a crash leaves the old file or the new one.

    Makes the folder where needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.saving")
    try:
        with staging.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
