"""Files of arrays: whole ones, and those that no reader of ours may accept."""

import io
import os
import pickle
import random
import struct
import zipfile

import numpy as np


class Bomb:
    """Makes a folder, `marker` in the present one, when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("marker",)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def zipped(files: dict[str, bytes], form: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip of files, each named NAME.npy."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", form) as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy_of(text: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """Return a .npy file with any header."""
    body = text.encode().ljust(117) + b"\n"
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(body))
    return b"\x93NUMPY" + version + size + body + data


def hostile_array(rng: random.Random) -> tuple[str, bytes]:
    """Return (what, file) of an array that no reader of ours may accept."""
    pickles = [
        ("a pickle", pickle.dumps(Bomb())),
        ("an object array", npy(np.array([Bomb()], dtype=object))),
        ("a pickled array", pickle.dumps(np.arange(3))),
    ]
    if rng.randrange(4) == 0:
        return rng.choice(pickles)

    def shaped(descr: str, shape: str, order: str = "False") -> bytes:
        return npy_of(f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}", bytes(64))

    shapes = ["(1000000000000,)", "(-1,)", "(-4, 4, 4)", "(4, 4)", "(99999999999999999999,)", "(1,)" * 3, "(4, -4, -4)"]
    shapes += ["(9223372036854775807, 2, 2)", "(1, 1, 9999999999999)", "()", "(True,)", "(1.5,)", "None"]
    shapes.append(f"({'1,' * 60})")
    texts = ["__import__('os').mkdir('marker')", "(" * 100, "-" * 9000 + "1", "{" * 100, "1\n  2", "'''", "{'descr': ("]
    kinds = ["f8", "f4", ">f2", ">i4", "i8", "u4", "i2", "?", "c8", "U3", "S4", "M8[s]", "V5"]
    odd_arrays = [np.zeros((2, 2, 2), kind) for kind in kinds]
    odd_arrays += [np.zeros(3, [("a", "i4"), ("b", "f2")]), np.zeros(3, "i8")]
    cases = [
        ("a zip", zipped({"tokens": npy(np.zeros(100_000, np.int32))}, zipfile.ZIP_DEFLATED)),
        *((f"header {text[:30]}", npy_of(text)) for text in texts),
        *((f"header 2.0 {text[:30]}", npy_of(text, version=b"\2\0")) for text in texts),
        *((f"shape {shape[:30]} {dtype}", shaped(dtype, shape)) for shape in shapes for dtype in ("<i4", "<f2", "<i8")),
        *((f"Fortran order {order}", shaped("<f2", "(2, 2, 2)", order)) for order in ("True", "1")),
        *((f"dtype {array.dtype}", npy(array)) for array in odd_arrays),
        ("nothing", b""),
        ("noise", rng.randbytes(300)),
    ]
    return rng.choice(cases)
