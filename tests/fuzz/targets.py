"""Coverage-guided fuzzing (libFuzzer, by atheris) of all that reads bytes of somebody else's.

    python tests/fuzz/targets.py oip CORPUS_FOLDER -max_total_time=600
    make fuzz SECONDS=600        # every target, from the seeds that are made here

A target takes any bytes and either understands them or raises the errors that its documentation names. Anything else
that escapes it, a hang (-timeout) and memory beyond -rss_limit_mb are findings; libFuzzer leaves the bytes in a file.
"""

import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["services.protocol", "defense", "pydicom", "PIL"]):
    from defense.artifact import MANIFEST_FILE, load_artifact
    from defense.errors import ArtifactError
    from services.protocol import oip
    from services.protocol.decoding.worker import limit_memory
    from services.protocol.errors import ServiceError
    from services.protocol.images import decode_sized
    from services.protocol.limits import inflate

import numpy as np
from PIL import Image

SEEDS: Final = Path(__file__).parents[1] / "unit" / "services"
_MEMORY_BYTES: Final = 2 * 2**30
_INTERNAL: Final = 500
_NOT_IMPLEMENTED: Final = 501


def _refused(read: Callable[[], object]) -> None:
    """Runs it; what it refuses has to be the sender's fault, and said in words."""
    try:
        read()
    except MemoryError:  # beyond the limit, as in a worker process, which it ends
        pass
    except ServiceError as error:
        if error.status >= _INTERNAL and error.status != _NOT_IMPLEMENTED:
            raise
        str(error).encode()


def fuzz_oip(data: bytes) -> None:
    """A request and an answer of the Open Inference Protocol; the first two bytes say where the JSON ends."""
    length = int.from_bytes(data[:2], "little")
    body = data[2:]
    for json_length in (length % (len(body) + 2), None):
        _refused(lambda at=json_length: oip.decode_request(body, at, raw=oip.RawInput("x", (1, 1, 2, 2))))  # type: ignore[misc]
        _refused(lambda at=json_length: oip.decode_response(body, at))  # type: ignore[misc]


def fuzz_image(data: bytes) -> None:
    """An image file of any kind, by its content."""
    _refused(lambda: decode_sized(data, channels=3, size=(8, 8), max_pixels=1_000_000))


def fuzz_dicom(data: bytes) -> None:
    """What follows a DICOM file's preamble and magic."""
    file = bytes(128) + b"DICM" + data
    _refused(lambda: decode_sized(file, channels=1, size=(8, 8), max_pixels=1_000_000, frame=1))


def fuzz_inflate(data: bytes) -> None:
    """Compressed bodies."""
    for encoding in ("gzip", "deflate"):
        _refused(lambda one=encoding: inflate(data, one, max_bytes=100_000))  # type: ignore[misc]


_FOLDER: Final = Path(tempfile.mkdtemp(prefix="fuzz-"))


def fuzz_artifact(data: bytes) -> None:
    """An artifact: the manifest up to the first zero byte, the weights behind it."""
    manifest, _, weights = data.partition(b"\x00")
    (_FOLDER / MANIFEST_FILE).write_bytes(manifest)
    (_FOLDER / "weights.safetensors").write_bytes(weights)
    try:
        load_artifact(_FOLDER)
    except ArtifactError as error:
        str(error).encode()


def _oip_seeds() -> Iterator[bytes]:
    tensor = oip.Tensor("images", np.linspace(0, 1, 8, dtype=np.float32).reshape(1, 2, 2, 2))
    for binary in (True, False):
        body, headers = oip.encode_request([tensor], binary=binary)
        yield int(headers.get(oip.HEADER, "0")).to_bytes(2, "little") + body
    body, headers = oip.encode_response([(tensor, True)], model_name="m", model_version="1", parameters={"timeout": 5})
    yield int(headers[oip.HEADER]).to_bytes(2, "little") + body


def _image_seeds() -> Iterator[bytes]:
    levels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for mode in ("L", "RGB", "RGBA", "P", "I;16", "CMYK"):
        if mode == "I;16":
            image = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
        else:
            image = Image.fromarray(levels).convert(mode)
        for kind in ("PNG", "JPEG", "TIFF"):
            buffer = io.BytesIO()
            try:
                image.save(buffer, kind)
            except OSError:  # this kind has no such mode
                continue
            yield buffer.getvalue()


def _dicom_seeds() -> Iterator[bytes]:
    sys.path.insert(0, str(SEEDS))
    from dicom_files import compressed, dicom, encapsulated
    from pydicom.uid import ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless

    levels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    yield dicom(levels)[132:]
    yield dicom(levels.astype(np.uint16), ImplicitVRLittleEndian)[132:]
    yield encapsulated([compressed(levels, "JPEG2000")], JPEG2000Lossless, levels)[132:]
    yield encapsulated([bytes([1, 0, 0, 0, 64]) + bytes(59) + bytes(70)], RLELossless, levels)[132:]


def _inflate_seeds() -> Iterator[bytes]:
    import gzip
    import zlib

    yield gzip.compress(b"x" * 1000)
    yield zlib.compress(b"y" * 1000)


def _artifact_seeds() -> Iterator[bytes]:
    from safetensors.numpy import save

    weights = save({"denoiser.body.0.weight": np.zeros((2, 2), np.float32)})
    manifest = {
        "format_version": 1,
        "weights_file": "weights.safetensors",
        "weights_sha256": "0" * 64,
        "sanitizer": {"input": {"channels": 1, "height": 8, "width": 8}, "denoiser": "dncnn-small"},
    }
    yield json.dumps(manifest).encode() + b"\x00" + weights


TARGETS: Final[dict[str, tuple[Callable[[bytes], None], Callable[[], Iterator[bytes]]]]] = {
    "oip": (fuzz_oip, _oip_seeds),
    "image": (fuzz_image, _image_seeds),
    "dicom": (fuzz_dicom, _dicom_seeds),
    "inflate": (fuzz_inflate, _inflate_seeds),
    "artifact": (fuzz_artifact, _artifact_seeds),
}
"""What is fuzzed, each with its seeds."""


def main() -> None:
    """Fuzzes one target; the first two arguments are its name and the folder of its corpus, the rest libFuzzer's."""
    name, folder, *options = sys.argv[1:]
    target, seeds = TARGETS[name]
    corpus = Path(folder)
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    warnings.simplefilter("ignore")
    limit_memory(_MEMORY_BYTES)
    atheris.Setup([sys.argv[0], str(corpus), "-rss_limit_mb=4096", "-timeout=30", *options], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
