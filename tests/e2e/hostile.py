"""A corpus of hostile inputs, by name; add what was met. Each is a body, its media type, and the statuses it may get.

Bombs are small here and large where they go off.
"""

import gzip
import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from dicom_files import dicom
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit

from services.protocol import oip

BAD = (400,)
LARGE = (413,)
UNKNOWN = (415,)
READ = (200,)


@dataclass(frozen=True)
class Hostile:
    """One input.

    Attributes:
        name: what it is.
        body: all of it.
        statuses: what may be answered; 200 for what is odd, and an image all the same.
        headers: beside the length.
        path: where it is sent.
    """

    name: str
    body: bytes
    statuses: tuple[int, ...]
    headers: dict[str, str | bytes] = field(default_factory=lambda: {"Content-Type": "image/png"})
    path: str = "/predict"


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG that claims to be so large, whatever its data."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


GREY = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
PNG = encoded(GREY)
JPEG = encoded(GREY, "JPEG")


def images() -> Iterator[Hostile]:
    """Image files, and what calls itself one."""
    bad = [
        ("empty", b""),
        ("one zero byte", b"\x00"),
        ("a million zero bytes", bytes(10**6)),
        ("text", b"hello, I am a scan"),
        ("html", b"<html><script>alert(1)</script></html>"),
        ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"),
        ("pdf", b"%PDF-1.7\n1 0 obj\n"),
        ("zip", b"PK\x03\x04" + bytes(60)),
        ("gif", encoded(GREY, "GIF")),
        ("webp magic", b"RIFF\x00\x00\x00\x00WEBPVP8 "),
        ("bmp", encoded(GREY, "BMP")),
        ("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("pickle", b"cos\nsystem\n(S'true'\ntR."),
        ("png magic alone", PNG[:8]),
        ("png without data", PNG[:33]),
        ("png cut in its data", PNG[: len(PNG) // 2]),
        ("png with a wrong checksum", PNG[:40] + bytes([PNG[40] ^ 255]) + PNG[41:]),
        ("png of no width", png_of(0, 9, b"")),
        ("png with garbage for data", png_of(16, 16, b"\xff" * 64)),
        ("jpeg magic alone", b"\xff\xd8\xff"),
        ("jpeg cut in its head", JPEG[:30]),
        ("tiff that points to itself", b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00"),
        ("tiff with a million tags", b"II*\x00\x08\x00\x00\x00\xff\xff" + bytes(64)),
        ("png behind a script", b"#!/bin/sh\n" + PNG),
    ]
    for name, body in bad:
        yield Hostile(name, body, BAD + UNKNOWN)
    bombs = [
        ("png of 60,000 x 60,000", png_of(60_000, 60_000, zlib.compress(bytes(10**6), 9))),
        ("png of 2^31 x 2^31", png_of(2**31 - 1, 2**31 - 1, b"")),
        ("1 x 100,000,000", png_of(1, 100_000_000, zlib.compress(bytes(10**6), 9))),
        ("100,000,000 x 1", png_of(100_000_000, 1, zlib.compress(bytes(10**6), 9))),
    ]
    for name, body in bombs:
        yield Hostile(name, body, LARGE + BAD)
    yield Hostile(
        "png whose text inflates to a gigabyte",
        PNG[:33] + png_chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(64 * 2**20), 9)) + PNG[33:],
        BAD + READ,
    )
    odd = [
        ("1 x N", encoded(GREY.resize((1, 3000)))),
        ("N x 1", encoded(GREY.resize((3000, 1)))),
        ("1 x 1", encoded(GREY.resize((1, 1)))),
        ("16 bits", encoded(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257))),
        ("palette with transparency", encoded(GREY.convert("P"), transparency=0)),
        ("cmyk", encoded(GREY.convert("CMYK"), "JPEG")),
        ("turned by exif", encoded(GREY, "JPEG", exif=_orientation(6))),
        ("exif with an orientation that there is not", encoded(GREY, "JPEG", exif=_orientation(77))),
        ("polyglot: an image, then a zip file", PNG + b"PK\x03\x04" + bytes(60)),
        ("polyglot: an image, then a script", JPEG + b"<?php system('id'); ?>"),
        ("jpeg cut near its end", JPEG[:-20]),
        ("animated png", encoded(GREY, save_all=True, append_images=[GREY.rotate(90)])),
    ]
    for name, body in odd:
        yield Hostile(name, body, READ + BAD + UNKNOWN)


def _orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def dicoms() -> Iterator[Hostile]:
    """DICOM files; `dicom_files` has many more, for the decoder alone."""
    media = {"Content-Type": "application/dicom"}
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    good = dicom(levels)
    files = [
        ("preamble alone", bytes(128) + b"DICM"),
        ("cut in its pixels", good[:-100]),
        ("cut in its header", good[:200]),
        ("no pixels", good[: good.index(b"\xe0\x7f\x10\x00")]),
        ("more rows than pixels", dicom(levels, Rows=60_000, Columns=60_000)),
        ("no rows", dicom(levels, Rows=0)),
        ("a jpeg that is none", dicom(levels, ExplicitVRLittleEndian).replace(b"1.2.840.10008.1.2.1\x00", _uid())),
        ("deflated garbage", bytes(128) + b"DICM" + _deflated_garbage()),
        ("an element of 4 GB", good[:132] + b"\x10\x00\x10\x00PN\x00\x00" + b"OB\x00\x00\xff\xff\xff\xfe"),
        ("sequences in sequences", good[:-528] + b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0" * 5000),
    ]
    for name, body in files:
        yield Hostile(f"dicom: {name}", body, BAD + LARGE + UNKNOWN, media)


def _uid() -> bytes:
    return str(JPEGBaseline8Bit).encode().ljust(20, b"\x00")[:20]


def _deflated_garbage() -> bytes:
    good = dicom(np.zeros((4, 4), np.uint8), DeflatedExplicitVRLittleEndian)
    return good[132:-20] + b"\xff" * 40


def tensors() -> Iterator[Hostile]:
    """Malformed messages of the Open Inference Protocol, of every kind."""
    entry = {"name": "x", "shape": [1, 1, 32, 32], "datatype": "FP32"}
    data = [0.5] * 1024

    def message(*inputs: object, **more: object) -> bytes:
        return json.dumps({"inputs": list(inputs), **more}).encode()

    bad = [
        ("no json", b"{"),
        ("not utf-8", b'{"inputs": "\xff\xfe"}'),
        ("a list", b"[]"),
        ("no inputs", b"{}"),
        ("inputs that are no list", b'{"inputs": {}}'),
        ("no tensor", message()),
        ("null", message(None)),
        ("no name", message({**entry, "name": None, "data": data})),
        ("twice the same", message({**entry, "data": data}, {**entry, "data": data})),
        ("two inputs", message({**entry, "data": data}, {**entry, "name": "y", "data": data})),
        ("a shape that is none", message({**entry, "shape": "1", "data": data})),
        ("a negative shape", message({**entry, "shape": [-1, 1, 32, 32], "data": data})),
        ("a shape that overflows", message({**entry, "shape": [2**62, 2**62, 4, 4], "data": data})),
        ("a shape of zero images", message({**entry, "shape": [0, 1, 32, 32], "data": []})),
        ("a shape of a thousand axes", message({**entry, "shape": [1] * 1000, "data": [1]})),
        ("too few numbers", message({**entry, "data": data[:-1]})),
        ("too many numbers", message({**entry, "data": [*data, 1]})),
        ("words for numbers", message({**entry, "data": ["x"] * 1024})),
        ("numbers beyond float32", message({**entry, "data": [1e300] * 1024})),
        ("NaN", message({**entry, "data": data}).replace(b"0.5", b"NaN", 1)),
        ("infinity", message({**entry, "data": data}).replace(b"0.5", b"1e999", 1)),
        ("an unknown datatype", message({**entry, "datatype": "FP128", "data": data})),
        ("FP16 in json", message({**entry, "datatype": "FP16", "data": data})),
        ("brackets without end", b'{"inputs": ' + b"[" * 100_000),
        ("objects without end", b'{"a":' * 100_000),
        ("a number of a million digits", b'{"inputs": [' + b"9" * 10**6 + b"]}"),
        ("an unknown output", message({**entry, "data": data}, outputs=[{"name": "weights"}])),
        ("an id that is no string", message({**entry, "data": data}, id=5)),
        ("a timeout that is none", message({**entry, "data": data}, parameters={"timeout": -5})),
    ]
    media = {"Content-Type": oip.JSON_TYPE}
    for name, body in bad:
        yield Hostile(f"tensors: {name}", body, BAD, media)
    for kind, parameter in (("shared memory", "shared_memory_region"),):
        yield Hostile(f"tensors: {kind}", message({**entry, "parameters": {parameter: "/dev/mem"}}), (400, 501), media)
    body, headers = oip.encode_request([oip.Tensor("x", np.zeros((1, 1, 32, 32), np.float32))])
    length = int(headers[oip.HEADER])
    for name, one, at in (
        ("binary: a byte missing", body[:-1], length),
        ("binary: a byte too many", body + b"\x00", length),
        ("binary: header beyond the body", body, len(body) + 1),
        ("binary: header of 10^30", body, 10**30),
        ("binary: header in the middle of the json", body, length // 2),
        ("binary: raw of the wrong size", bytes(100), 0),
    ):
        yield Hostile(name, one, BAD, {**headers, oip.HEADER: str(at)})
    for at in (b"-1", b"x", "٣".encode(), b"1.5", b""):
        yield Hostile(f"binary: header {at!r}", body, BAD, {**headers, oip.HEADER: at})


def bodies() -> Iterator[Hostile]:
    """Forms, encodings and paths."""
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    file = part % (b"file", b'; filename="a.png"', PNG)
    forms = [
        ("no boundary in the body", PNG),
        ("no end", file),
        ("another field", part % (b"image", b'; filename="a.png"', PNG) + b"--x--\r\n"),
        ("a file that is a field", part % (b"file", b"", b"text") + b"--x--\r\n"),
        ("two files", file * 2 + b"--x--\r\n"),
        ("a thousand fields", part % (b"a", b"", b"b") * 1000 + file + b"--x--\r\n"),
        ("a field of 2 MB", part % (b"a", b"", b"b" * 2**21) + file + b"--x--\r\n"),
        ("a frame that is a path", part % (b"frame", b"", b"../../etc") + file + b"--x--\r\n"),
    ]
    for name, body in forms:
        yield Hostile(f"form: {name}", body, BAD + LARGE, boundary)
    yield Hostile("form: without a boundary", file, BAD, {"Content-Type": "multipart/form-data"})
    path = part % (b"file", b'; filename="../../etc/passwd\x00.png"', PNG) + b"--x--\r\n"
    yield Hostile("form: a file name that is a path", path, READ + BAD, boundary)
    bomb = gzip.compress(bytes(64 * 2**20), 9)
    for media in ("image/png", oip.JSON_TYPE, oip.BINARY_TYPE):
        encodings = {"Content-Type": media, "Content-Encoding": "gzip"}
        yield Hostile(f"{media}: a gzip bomb", bomb, LARGE, encodings)
        yield Hostile(f"{media}: half a gzip file", gzip.compress(PNG)[:-10], BAD, encodings)
        yield Hostile(f"{media}: no gzip file", PNG, BAD, encodings)
        yield Hostile(f"{media}: brotli", PNG, UNKNOWN, {**encodings, "Content-Encoding": "br"})
        yield Hostile(f"{media}: gzip twice", bomb, UNKNOWN, {**encodings, "Content-Encoding": "gzip, gzip"})
    yield Hostile("more than the bound", bytes(5 * 2**20), LARGE)
    yield Hostile("a media type of its own", PNG, UNKNOWN, {"Content-Type": "text/html"})
    yield Hostile("a media type of a million letters", PNG, (400, 415, 431), {"Content-Type": "x" * 60_000})
    for path_ in ("/predict/../../etc/passwd", "/v2/models/%00/infer", "/v2/models/..%2f..%2f/infer", "/" + "a" * 5000):
        yield Hostile(f"path {path_[:40]}", PNG, (400, 404, 405, 415), path=path_)


CORPUS = [*images(), *dicoms(), *tensors(), *bodies()]
