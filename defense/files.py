"""Files that are whole or not there."""

import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file under another name beside `path`, flushes it to the disk, and renames it.

    A crash, also of the machine, leaves the old file or the new one. Makes the folder where needed.
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
