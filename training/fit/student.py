"""The surrogate in a run of `zo_fit`: what it sees, and how it outlives a kill.

Its answers go to append-only files beside the checkpoint, which holds its weights and how many answers counted then.
"""

import math
import os
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from defense.objectives import ScoreKind
from defense.surrogates import Answers, Surrogate
from training.command.errors import UserError
from training.fit.checkpoint import optimizer_tensors, prefixed, restore_optimizer, under

FOLDER_NAME: Final = "surrogate"


class Student:
    """A surrogate, and its place on disk.

    Attributes:
        surrogate: It.
        folder: Where its answers are kept.
        trained: Whether its first long training is done.
        writes: Whether its place on disk is this one's to change; of several processes, the first one's.
    """

    def __init__(self, surrogate: Surrogate, run: Path, *, writes: bool = True) -> None:
        self.surrogate = surrogate
        self.folder = run / FOLDER_NAME
        self.trained = False
        self.writes = writes
        self._saved = {"values": 0, "slopes": 0}

    def watch(self, z: Tensor, points: Tensor, owners: Tensor, images: Tensor, scores: Tensor, kind: ScoreKind) -> None:
        """Learns from one call of the black box.

        Args:
            z: (N, *shape) points around which a gradient is estimated.
            points: (M, *shape) points that were evaluated.
            owners: (M,) which of the N each belongs to.
            images: (M, C, H, W) what the victim saw.
            scores: (M, K) what it answered.
            kind: What the scores are.
        """
        at_z = (points.flatten(1) == z.flatten(1)[owners]).all(1).nonzero().squeeze(1)
        if not len(at_z):  # central differences: any one of an image's points stands for it
            at_z = torch.stack([(owners == owner).nonzero()[0, 0] for owner in owners.unique()])
            self.surrogate.observe(images[at_z], scores[at_z], kind)
            return
        self.surrogate.observe(images[at_z], scores[at_z], kind)
        if self.surrogate.settings.slope_weight > 0 and len(points) > len(at_z):
            place = torch.empty(len(z), dtype=torch.int64, device=owners.device)
            place[owners[at_z]] = at_z
            other = torch.ones(len(points), dtype=torch.bool, device=owners.device)
            other[at_z] = False
            base = place[owners[other]]
            self.surrogate.observe_slopes(images[base], images[other] - images[base], scores[base], scores[other], kind)

    def save(self) -> dict[str, Tensor]:
        """Writes the answers that are new, and returns what belongs into the checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, answers in self._tables().items():
            for column, rows in answers.rows(self._saved[name]).items():
                with self._file(name, column).open("ab") as file:
                    file.write(rows.contiguous().numpy().tobytes())
                    file.flush()
                    os.fsync(file.fileno())  # the checkpoint that names them is written through, too
            self._saved[name] = len(answers)
        return {
            **prefixed("network", self.surrogate.network.state_dict()),
            **prefixed("optimizer", optimizer_tensors(self.surrogate.optimizer)),
            **{f"count/{name}": torch.tensor(count) for name, count in self._saved.items()},
            "generator": self.surrogate.generator.get_state(),
            "trained": torch.tensor(self.trained),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes back to what `save` returned; answers that came later are cut off."""
        self.surrogate.network.load_state_dict(under("network", tensors))
        restore_optimizer(self.surrogate.optimizer, under("optimizer", tensors))
        self.surrogate.generator.set_state(tensors["generator"])
        self.trained = bool(tensors["trained"])
        for name, answers in self._tables().items():
            count = int(tensors[f"count/{name}"])
            rows = {}
            for column, empty in answers.rows().items():
                rows[column] = self._read(self._file(name, column), empty, count)
            answers.append(rows)
            self._saved[name] = count

    def _read(self, path: Path, empty: Tensor, count: int) -> Tensor:
        """The first `count` rows of a column's file, which is cut to them."""
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

    def _tables(self) -> dict[str, Answers]:
        return {"values": self.surrogate.values, "slopes": self.surrogate.slopes}

    def _file(self, table: str, column: str) -> Path:
        return self.folder / f"{table}-{column}.rows"
