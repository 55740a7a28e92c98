"""The gateway's plainest job on other servers, each in its own natural way, for `benchmarks.throughput`.

    python -m benchmarks.peers fastapi --artifact ... --victim-url ... --port 0

An image comes as a form's file and is decoded, sanitized by PyTorch, and sent to the victim as a tensor; the scores
are answered as JSON, without what else the gateway does: bounds, deadlines, accounts, retries, votes. FastAPI sanitizes
every image alone in a thread; LitServe and Ray Serve batch.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final

import anyio.to_thread
import httpx
import numpy as np
import numpy.typing as npt
import torch
import uvicorn
from fastapi import FastAPI, File, UploadFile

from defense.artifact import load_artifact
from services.gateway.on_ray import wait_to_be_ended
from services.protocol import oip
from services.protocol.images import decode_image

Array = npt.NDArray[np.float32]

BATCH: Final = 64
"""Most images in one batch of those that batch."""

WAIT_S: Final = 0.002
"""How long theirs wait for more."""


class Pipeline:
    """The parts of the job."""

    def __init__(self, artifact: Path) -> None:
        """Loads the sanitizer."""
        loaded = load_artifact(artifact)
        self._shape = loaded.manifest.input.dimensions
        self._sanitizer = loaded.sanitizer.eval().to(memory_format=torch.channels_last)

    def decode(self, data: bytes) -> Array:
        """An image (C,H,W) from a file's bytes."""
        channels, height, width = self._shape
        return decode_image(data, channels=channels, size=(height, width))

    def sanitize(self, images: Array) -> Array:
        """(N,C,H,W) to the same."""
        with torch.inference_mode():
            batch = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
            sanitized: Array = self._sanitizer(batch).contiguous().numpy()
            return sanitized


def request(images: Array) -> Mapping[str, Any]:
    """What `httpx` posts to the victim."""
    body, headers = oip.encode_request([oip.Tensor(oip.INPUT, images)])
    return {"content": body, "headers": headers}


def scores(response: httpx.Response) -> Array:
    """What the victim answered: (N,K)."""
    response.raise_for_status()
    outputs = oip.decode_response(response.content, oip.header_length(response.headers.get(oip.HEADER)))
    (answer,) = outputs.values()
    return answer


def answer(row: Array) -> dict[str, Any]:
    """What a client is told of its image, from the scores (K,)."""
    return {"label": int(row.argmax()), "probabilities": row.tolist()}


def _fastapi(artifact: Path, victim: str, port: int) -> None:
    app, pipeline, http = FastAPI(), Pipeline(artifact), httpx.AsyncClient(timeout=60)

    @app.post("/predict")
    async def predict(file: Annotated[UploadFile, File()]) -> dict[str, Any]:
        image = pipeline.decode(await file.read())
        sanitized = await anyio.to_thread.run_sync(pipeline.sanitize, image[None])
        return answer(scores(await http.post(victim, **request(sanitized)))[0])

    with socket.create_server(("127.0.0.1", port), backlog=1024) as listener:
        _announce("fastapi", listener.getsockname()[1])
        uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listener])


def _litserve(artifact: Path, victim: str, port: int) -> None:
    import litserve

    from benchmarks.litserve_peer import Served

    # Its servers and workers are processes that would outlive it.
    os.setpgrp()
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    port = port or _free_port()
    server = litserve.LitServer(
        Served(artifact, victim, max_batch_size=BATCH, batch_timeout=WAIT_S), accelerator="cpu", workers_per_device=1
    )
    _announce_once_it_listens("litserve", port)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error", access_log=False)


def _ray(artifact: Path, victim: str, port: int) -> None:
    import ray
    from ray import serve

    app = FastAPI()

    @serve.deployment(max_ongoing_requests=256)
    @serve.ingress(app)
    class Served:
        def __init__(self) -> None:
            self.pipeline, self.http = Pipeline(artifact), httpx.AsyncClient(timeout=60)

        @app.post("/predict")
        async def predict(self, file: Annotated[UploadFile, File()]) -> dict[str, Any]:
            return await self.defend(self.pipeline.decode(await file.read()))

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_S)
        async def defend(self, images: list[Array]) -> list[dict[str, Any]]:
            sanitized = await anyio.to_thread.run_sync(self.pipeline.sanitize, np.stack(images))
            return [answer(row) for row in scores(await self.http.post(victim, **request(sanitized)))]

    port = port or _free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Served.bind())  # type: ignore[attr-defined]
    _announce("ray", port)
    try:
        wait_to_be_ended()
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _announce(name: str, port: int) -> None:
    print(f"{name} listening on http://127.0.0.1:{port}", flush=True)


def _announce_once_it_listens(name: str, port: int) -> None:
    def wait() -> None:
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return _announce(name, port)
            time.sleep(0.1)

    threading.Thread(target=wait, daemon=True).start()


PEERS: Final[Mapping[str, Callable[[Path, str, int], None]]] = {
    "fastapi": _fastapi,
    "litserve": _litserve,
    "ray": _ray,
}


def main() -> int:
    """Serves until it is told to end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--artifact", type=Path, required=True, help="the sanitizer")
    parser.add_argument("--victim-url", required=True, help="the hospital's")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    PEERS[given.peer](given.artifact.absolute(), f"{given.victim_url}/predict", given.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
