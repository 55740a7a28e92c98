"""The surrogate in a run of `zo_fit`: what it sees, and how it outlives a kill.

Its answers go to append-only files beside the checkpoint, which holds its weights and how many answers counted then.
"""

import math
import os
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from defense.surrogates import Surrogate
from training.command.errors import UserError
from training.fit.checkpoint import optimizer_tensors, prefixed, restore_optimizer, under

FOLDER_NAME: Final = "surrogate"


class Student:
    """A surrogate and its files; of several processes only one `writes`. `trained`: its first long training is done."""

    def __init__(self, surrogate: Surrogate, run: Path, *, writes: bool = True) -> None:
        self.surrogate = surrogate
        self.folder = run / FOLDER_NAME
        self.trained = False
        self.writes = writes
        self._saved = 0

    def save(self) -> dict[str, Tensor]:
        """Writes the answers that are new, and returns what belongs into the checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        answers = self.surrogate.values
        for column, rows in answers.rows(self._saved).items():
            with self._file(column).open("ab") as file:
                file.write(rows.contiguous().numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())  # the checkpoint that names them is written through, too
        self._saved = len(answers)
        return {
            **prefixed("network", self.surrogate.network.state_dict()),
            **prefixed("optimizer", optimizer_tensors(self.surrogate.optimizer)),
            "count/values": torch.tensor(self._saved),
            "generator": self.surrogate.generator.get_state(),
            "trained": torch.tensor(self.trained),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes back to what `save` returned; answers that came later are cut off."""
        self.surrogate.network.load_state_dict(under("network", tensors))
        restore_optimizer(self.surrogate.optimizer, under("optimizer", tensors))
        self.surrogate.generator.set_state(tensors["generator"])
        self.trained = bool(tensors["trained"])
        answers, self._saved = self.surrogate.values, int(tensors["count/values"])
        answers.append({name: self._read(self._file(name), empty) for name, empty in answers.rows().items()})

    def _read(self, path: Path, empty: Tensor) -> Tensor:
        """The saved rows of a column's file, which is cut to them."""
        count = self._saved
        size = count * math.prod(empty.shape[1:]) * empty.element_size()
        data = bytearray(path.read_bytes()[:size]) if path.exists() else bytearray()
        if len(data) < size:
            raise UserError(f"{path} holds fewer answers than the checkpoint names, so it was cut: name another --out")
        if self.writes and path.exists():
            os.truncate(path, size)
        return torch.frombuffer(data, dtype=empty.dtype).view(count, *empty.shape[1:]) if count else empty

    def delete(self) -> None:
        """Removes what it learned from."""
        if not self.writes:
            return
        for path in self.folder.glob("*.rows"):
            path.unlink()
        if self.folder.exists():
            self.folder.rmdir()

    def _file(self, column: str) -> Path:
        return self.folder / f"values-{column}.rows"
