"""Which version answers: switched in one assignment after the new one passed its self-test, and back again.

A request uses the version that it began with to its end, and its answer names it. The previous version stays loaded,
so that rolling back needs neither disk nor test.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
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
    """The version that answers, and those it may be replaced by. An async context manager.

    Args:
        first: the version to begin with.
        build: prepares other versions.
        repository: where they come from; None: nowhere.
        settings: the service's settings.
        own: the account that self-tests' queries are charged to.

    Raises:
        InvalidInput: the self-test images cannot be read.
    """

    def __init__(
        self, first: Version, build: Build, repository: Repository | None, settings: GatewaySettings, own: Account
    ) -> None:
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

    async def __aexit__(self, *_raised: object) -> None:
        """Closes all versions."""
        await asyncio.gather(*self._retiring)
        for one in (self.current, self._before):
            if one is not None:
                await one.__aexit__(None, None, None)

    def numbers(self) -> tuple[str, ...]:
        """The versions that could be loaded, ascending, as the disk has them now."""
        return self._repository.numbers() if self._repository is not None else (self.current.number,)

    async def load(self, number: str | None = None) -> Defense:
        """Switches to a version (None: the newest) once it passes its self-test; returns the version that answers now.

        Raises:
            NotFound: there is no such version.
            Conflict: another change is under way, or the version is incomplete, takes other images or classes, or
                failed its self-test.
            ServiceError: the victim failed during the self-test.
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
        """Switches back to the previous version; repeating it undoes that.

        Raises:
            Conflict: another change is under way, or there is no previous version.
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
        """Compares the victim's answers to raw images and to those that the candidate sanitizes.

        Raises:
            Conflict: the answers to the stored images agree too rarely.
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
    """Refuses a version that takes other images or answers other classes."""
    if candidate.shape != current.shape:
        raise Conflict(
            f"version {candidate.number} takes images {candidate.shape} (channels, height, width), and those of "
            f"version {current.number} are {current.shape}: start another gateway for it"
        )
    labels, known = candidate.manifest.labels, current.manifest.labels
    if labels and known and labels != known:
        raise Conflict(f"version {candidate.number} was learned for the classes {labels}, and here they are {known}")


def _stored_images(folder: Path | None, shape: tuple[int, int, int]) -> Array | None:
    """A folder's images, (N,C,H,W), sorted by name; None without a folder. Raises InvalidInput if they are unusable."""
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
    """Loads the newest version on SIGHUP while the context lasts, where the signal can be handled."""
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
