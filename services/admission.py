"""How much work a service accepts at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from services.protocol.errors import Overloaded

RETRY_AFTER_S = 1.0


class Admission:
    """Bounds the accepted, unfinished work in images; an idle service takes a request of any size."""

    def __init__(self, max_images: int) -> None:
        self._max_images = max_images
        self._images = 0

    @property
    def images(self) -> int:
        """Images in work."""
        return self._images

    def check(self, images: int) -> None:
        """Raises Overloaded if `admit` would, before more work is put into the request."""
        if self._images and self._images + images > self._max_images:
            raise Overloaded(f"{self._images} images are in work already; come back later", retry_after=RETRY_AFTER_S)

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Counts a request as long as the context lasts. Raises Overloaded if too many images are in work."""
        self.check(images)
        self._images += images
        try:
            yield
        finally:
            self._images -= images
