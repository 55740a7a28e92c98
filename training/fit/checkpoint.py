"""A run of `zo_fit` on disk: a checkpoint, replaced atomically, and a journal of the queries that survives a kill.

The checkpoint is one safetensors file of tensors and JSON metadata. The journal gets a line before every request, so
that images sent after the last checkpoint, whose answers are gone after kill -9, are still booked, as "lost".
"""

import errno
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from defense.files import replace_file
from training.command.errors import UserError

FILE_NAME: Final = "checkpoint.safetensors"
JOURNAL_NAME: Final = "queries.journal"
LOST: Final = "lost"
"""The purpose under which queries are booked whose answers were lost with a killed process."""

_METADATA_KEY: Final = "state"


@dataclass
class Checkpoint:
    """All that a run needs to continue: JSON `state` (step, ledger, settings, history, ...) and `tensors` by name."""

    state: dict[str, Any]
    tensors: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Writes the checkpoint into `folder`, replacing an older one only when this one is complete."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        data = save_tensors(tensors, metadata={_METADATA_KEY: json.dumps(self.state)})
        replace_file(folder / FILE_NAME, data)

    @classmethod
    def load(cls, folder: Path) -> "Checkpoint":
        """Reads the checkpoint in `folder`; UserError if there is none or it is invalid."""
        path = folder / FILE_NAME
        if not path.exists():
            raise UserError(f"{folder} holds no checkpoint to resume from: leave out --resume to start anew")
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads((file.metadata() or {})[_METADATA_KEY])
                return cls(state, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path} is no checkpoint of zo_fit: {error}; name another --out") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as named tensors."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, slots in state.items() for name, value in slots.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under `prefix/name`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undoes `prefixed`: those of the tensors that stand under `prefix`."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def state_copy(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state that later training does not change."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


class Journal:
    """An append-only file of (purpose, images) lines in a run's folder, flushed before a request leaves.

    Raises UserError if another run writes there: two ledgers would each allow the whole budget.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / JOURNAL_NAME).open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UserError(f"another run is writing to {folder}: wait for it, or name another --out") from error

    def write(self, purpose: str, images: int) -> None:
        """Records that `images` are about to be sent; on OSError nothing may be sent."""
        line = f"{purpose} {images}\n".encode()
        if self._file.write(line) != len(line):  # which a disk that is getting full may do without an error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @staticmethod
    def total(folder: Path) -> int:
        """All images that the journal in `folder` records; 0 without a journal.

        An incomplete last line was cut by a crash before its request left, and does not count. Raises UserError if the
        file is not a journal.
        """
        path = folder / JOURNAL_NAME
        if not path.exists():
            return 0
        lines = path.read_bytes().split(b"\n")[:-1]
        try:
            return sum(int(line.rsplit(b" ", 1)[1]) for line in lines)
        except (IndexError, ValueError) as error:
            raise UserError(f"{path} is no journal of queries; name another --out") from error


def resumed_ledger(folder: Path, booked: dict[str, int]) -> dict[str, int]:
    """The checkpoint's ledger, plus as "lost" what the journal holds beyond it.

    Raises UserError if the journal is invalid or records less than the checkpoint.
    """
    lost = Journal.total(folder) - sum(booked.values())
    if lost < 0:
        raise UserError(
            f"{folder / JOURNAL_NAME} records fewer queries than the checkpoint, so it was cut: name another --out"
        )
    return {**booked, LOST: booked.get(LOST, 0) + lost} if lost else dict(booked)
