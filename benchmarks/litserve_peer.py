"""LitServe's part of `benchmarks.peers`: its workers are processes that import it."""

from pathlib import Path
from typing import Any

import httpx
import litserve
import numpy as np
from fastapi import Request

from benchmarks.peers import Array, Pipeline, answer, request, scores


class Served(litserve.LitAPI):  # type: ignore[misc]
    """The job of `benchmarks.peers`; `settings` are LitServe's own."""

    def __init__(self, artifact: Path, victim: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._artifact, self._victim = artifact, victim

    def setup(self, device: str) -> None:
        """Runs once a worker."""
        self._pipeline, self._http = Pipeline(self._artifact), httpx.Client(timeout=60)

    def decode_request(self, request: Request) -> Any:
        """What LitServe calls a request is its form."""
        return self._pipeline.decode(request["file"].file.read())

    def batch(self, inputs: list[Array]) -> Array:
        """Images to one array."""
        return np.stack(inputs)

    def predict(self, images: Array) -> Array:
        """A batch's scores."""
        return scores(self._http.post(self._victim, **request(self._pipeline.sanitize(images))))

    def unbatch(self, output: Array) -> list[Array]:
        """Scores of each image."""
        return list(output)

    def encode_response(self, output: Array) -> dict[str, Any]:
        """What is answered."""
        return answer(output)
