"""DICOM files made in memory, each with a patient who must not be heard of again."""

import io
import struct
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage

SECRETS = ("SENTINEL^NAME", "SENTINEL-ID", "19010203", "SENTINEL HOSPITAL", "SENTINEL COMMENT", "SENTINEL-PRIVATE")


def dataset(values: np.ndarray, *, photometric: str = "MONOCHROME2", frames: bool = False, **elements: Any) -> Dataset:
    """A data set around stored values: (H,W), or (H,W,3) in colors, after an axis of frames if there are several."""
    made = Dataset()
    made.SOPClassUID, made.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.826.0.1.3680043.8.498.1"
    made.PatientName, made.PatientID, made.PatientBirthDate, made.InstitutionName, made.ImageComments, _ = SECRETS
    made.private_block(0x0009, SECRETS[-1], create=True).add_new(1, "LO", SECRETS[-1])
    shape = values.shape[1:] if frames else values.shape
    made.Rows, made.Columns, made.SamplesPerPixel = *shape[:2], 3 if shape[2:] else 1
    if frames:
        made.NumberOfFrames = len(values)
    if shape[2:]:
        made.PlanarConfiguration = 0
    made.PhotometricInterpretation = photometric
    made.BitsAllocated = made.BitsStored = 8 * values.itemsize
    made.HighBit = made.BitsStored - 1
    made.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in elements.items():
        setattr(made, name, value)
    if "BitsStored" in elements:
        made.HighBit = made.BitsStored - 1
    made.PixelData = values.tobytes() + b"\0" * (values.nbytes % 2)
    made["PixelData"].VR = "OW" if values.itemsize > 1 else "OB"
    return made


def written(made: Dataset, syntax: UID = ExplicitVRLittleEndian) -> bytes:
    """The file of a data set whose pixels are as the transfer syntax has them."""
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicom(values: Any, syntax: UID = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A file with stored values; RLE is encoded by pydicom, and uncompressed syntaxes need no encoder."""
    array = np.asarray(values)
    if syntax == ExplicitVRBigEndian:
        array = array.astype(array.dtype.newbyteorder(">"))
    made = dataset(array, **elements)
    if syntax == RLELossless:
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        made.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
    return written(made, syntax)


def encapsulated(parts: list[bytes], syntax: UID, values: Any, *, has_bot: bool = True, **elements: Any) -> bytes:
    """A file with frames that somebody else compressed; `values` tells their layout."""
    made = dataset(np.asarray(values), **elements)
    made.PixelData = encapsulate(parts, has_bot=has_bot)
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    return written(made, syntax)


def raw_encapsulated(items: bytes, syntax: UID, values: Any, **elements: Any) -> bytes:
    """A file whose pixel data is exactly these bytes, and the delimiter."""
    whole = encapsulated([b"frame!"], syntax, values, **elements)
    start = whole.index(struct.pack("<HH", 0x7FE0, 0x0010)) + 12
    return whole[:start] + items + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def item(data: bytes) -> bytes:
    """An item of encapsulated pixel data."""
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(data)) + data


def lookup_table(first: int, entries: list[int], bits: int, *, signed: bool = False) -> Dataset:
    """The item of a sequence of lookup tables."""
    made = Dataset()
    made.add_new(0x00283002, "SS" if signed else "US", [len(entries), first, bits])
    made.add_new(0x00283006, "OW", np.asarray(entries, np.uint16).tobytes())
    return made


def compressed(image: np.ndarray, kind: str, **options: Any) -> bytes:
    """An image as Pillow writes it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()
