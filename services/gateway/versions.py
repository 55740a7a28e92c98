"""Which version answers: changed in one assignment, once the new one has passed its self-test; and back again.

A request uses the version that it began with to its end, so that every answer is of one version, which it names. The
one before stays loaded, so that the way back needs neither disk nor test.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import anyio.to_thread
import numpy as np

from defense.errors import ArtifactError
from services.gateway.accounting import Account
from services.gateway.config import GatewaySettings
from services.gateway.defense import Build, Defense
from services.gateway.repository import Repository, Version, probes
from services.gateway.shadow import disagreements
from services.protocol.errors import Conflict, InvalidInput, NotFound, ServiceError, TooLarge, UnsupportedMedia
from services.protocol.images import decode_image
from services.upstream import Array

logger = logging.getLogger(__name__)

PURPOSE: Final = "self-test"
"""Under which the queries of self-tests are counted."""

_HANGUP: Final = 1  # SIGHUP, which `signal` has no name for where there is no such thing

MAX_STORED: Final = 256
"""Images of a self-test, at most."""


class Versions:
    """The version that answers, and those it may be changed for. An async context manager.

    Args:
        first: the version to begin with.
        build: makes others ready.
        repository: where they come from; None: there are none.
        settings: the service's settings.
        own: the account of the self-tests' queries.

    Attributes:
        current: the version that answers.

    Raises:
        InvalidInput: the stored images cannot be read.
    """

    def __init__(
        self, first: Version, build: Build, repository: Repository | None, settings: GatewaySettings, own: Account
    ) -> None:
        """Opens no connection yet."""
        self.current = build(first)
        self._build = build
        self._repository = repository
        self._settings = settings
        self._own = own
        self._before: Defense | None = None
        self._changing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self._stored = _stored_images(settings.self_test, self.current.shape)

    async def __aenter__(self) -> Self:
        """Puts the first version to work."""
        await self.current.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes all versions."""
        await asyncio.gather(*self._retiring)
        for one in (self.current, self._before):
            if one is not None:
                await one.__aexit__(kind, error, trace)

    def numbers(self) -> tuple[str, ...]:
        """The versions that could be loaded, ascending, as the disk has them now."""
        return self._repository.numbers() if self._repository is not None else (self.current.number,)

    async def load(self, number: str | None = None) -> Defense:
        """Changes for a version, once it has passed its self-test; until then, and if it does not, nothing changes.

        Args:
            number: which; None: the newest.

        Returns:
            the version that answers now; one that did already stays as it is.

        Raises:
            NotFound: there is no such version.
            Conflict: another change is going on, the version is not whole or takes other images or classes, or it
                failed its self-test.
            ServiceError: the victim failed when the self-test asked it.
        """
        if self._changing.locked():
            raise Conflict("another version is being loaded; ask again when that is done")
        async with self._changing:
            version = await anyio.to_thread.run_sync(self._read, number)
            if (version.number, version.artifact.manifest.id) == (self.current.number, self.current.manifest.id):
                return self.current
            candidate = await anyio.to_thread.run_sync(self._build, version)
            _check_alike(candidate, self.current)
            await candidate.__aenter__()
            try:
                await self._test(candidate)
            except BaseException:
                await candidate.__aexit__(None, None, None)
                raise
            self._switch(candidate)
        return candidate

    async def roll_back(self) -> Defense:
        """Changes back to the version before, which is still loaded; once more, and the later one is back.

        Raises:
            Conflict: another change is going on, or there was no version before.
        """
        if self._changing.locked():
            raise Conflict("another version is being loaded; ask again when that is done")
        if self._before is None:
            raise Conflict("there was no other version since the gateway started; load one by its number")
        self._before, self.current = self.current, self._before
        self._tell()
        return self.current

    def _read(self, number: str | None) -> Version:
        if self._repository is None:
            raise NotFound("this gateway has no repository to load from")
        if number is not None and number not in self._repository.numbers():
            raise NotFound(f"there is no version {number[:20]!r}; there are {', '.join(self._repository.numbers())}")
        try:
            return self._repository.load(number)
        except ArtifactError as error:
            raise Conflict(str(error)) from error

    def _switch(self, candidate: Defense) -> None:
        oldest = self._before
        self._before, self.current = self.current, candidate
        if oldest is not None:
            task = asyncio.create_task(oldest.retire())
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        self._tell()

    def _tell(self) -> None:
        logger.warning("version %s answers now (artifact %s)", self.current.number, self.current.manifest.id)

    async def _test(self, candidate: Defense) -> None:
        """Asks the victim about images as they are and as the candidate sanitizes them.

        Raises:
            Conflict: too few of the stored images are answered alike.
            ServiceError: the victim failed, or gave no valid answer.
        """
        stored = self._stored
        images = probes(candidate.shape) if stored is None else stored
        with self._own.bill(PURPOSE, 2 * len(images)) as bill:
            sanitized = await candidate.pipeline.ask(images, bill)
            if stored is None:
                return
            raw = await candidate.pipeline.forward(images, bill)
        alike = 1 - disagreements(raw, sanitized, self._settings.shadow_dice) / len(images)
        if alike < self._settings.self_test_agreement:
            raise Conflict(
                f"version {candidate.number} failed its self-test: the model answers {alike:.0%} of the "
                f"{len(images)} stored images as it does without the sanitizer, and "
                f"{self._settings.self_test_agreement:.0%} is asked for"
            )


def _check_alike(candidate: Defense, current: Defense) -> None:
    """Clients go on as they did: the same images in, the same classes out."""
    if candidate.shape != current.shape:
        raise Conflict(
            f"version {candidate.number} takes images {candidate.shape} (channels, height, width), and those of "
            f"version {current.number} are {current.shape}: start another gateway for it"
        )
    labels, known = candidate.manifest.labels, current.manifest.labels
    if labels and known and labels != known:
        raise Conflict(f"version {candidate.number} was learned for the classes {labels}, and here they are {known}")


def _stored_images(folder: Path | None, shape: tuple[int, int, int]) -> Array | None:
    """The images of a folder, (N,C,H,W), in the order of their names; None without a folder.

    Raises:
        InvalidInput: there are no images, too many, or a file is not an image.
    """
    if folder is None:
        return None
    files = sorted(one for one in folder.rglob("*") if one.is_file()) if folder.is_dir() else []
    if not 0 < len(files) <= MAX_STORED:
        raise InvalidInput(f"--self-test {folder} holds {len(files)} files; 1 to {MAX_STORED} images are needed")
    images = []
    for file in files:
        try:
            images.append(decode_image(file.read_bytes(), channels=shape[0], size=shape[1:]))
        except (InvalidInput, TooLarge, UnsupportedMedia) as error:
            raise InvalidInput(f"--self-test: {file} cannot be used: {error}") from error
    return np.stack(images)


@contextmanager
def reloading_on_hangup(versions: Versions) -> Iterator[None]:
    """Loads the newest version whenever the process receives SIGHUP, as long as the context lasts.

    Where there is no such signal, or this is not the main thread, nothing is changed.
    """
    loop = asyncio.get_running_loop()
    loads: set[asyncio.Task[None]] = set()

    async def load() -> None:
        try:
            await versions.load()
        except ServiceError as error:
            logger.error("version %s goes on answering: %s", versions.current.number, error)

    def begin() -> None:
        task = loop.create_task(load())
        loads.add(task)
        task.add_done_callback(loads.discard)

    listening = False
    with suppress(NotImplementedError, RuntimeError, ValueError):
        loop.add_signal_handler(_HANGUP, begin)
        listening = True
    try:
        yield
    finally:
        if listening:
            loop.remove_signal_handler(_HANGUP)
        for task in loads:
            task.cancel()
