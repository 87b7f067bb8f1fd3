"""Files that no container reads, recognized by their first bytes, so that errors can name them."""

from pathlib import Path

from mezzotint.errors import NotACheckpoint, NotSafetensors
from mezzotint.hub import AnyPath

SNIFF_BYTES = 72
"""Bytes read from the start of a file."""
FAILED_DOWNLOADS = {
    b"version https://git-lfs": (
        "a pointer of Git LFS",
        "fetch the file that it points to: `git lfs pull`.",
    ),
    b"<!doctype html": ("an HTML page", "the download failed; download it again."),
    b"<html": ("an HTML page", "the download failed; download it again."),
    b"<?xml": ("an XML page", "the download failed; download it again."),
    b'{"': ("JSON text", "the download failed, or it is a configuration; name the weights."),
}
"""{first bytes of files that are no weights: (what they are, what to do)}"""
NOT_RUN = "use the safetensors version of the model; nothing in the file was run."
UNREAD_WEIGHTS = {
    b"GGUF": (
        "a GGUF file",
        "Mezzotint does not read GGUF; use the safetensors version of the model.",
    ),
    b"\x80\x02": ("a Python pickle", NOT_RUN),
    b"\x80\x04": ("a Python pickle", NOT_RUN),
    b"\x80\x05": ("a Python pickle", NOT_RUN),
}
"""{first bytes of weights that are not read, and may be intact: (what they are, what to do)}"""
UNREAD_SUFFIXES = {
    ".gguf": "a GGUF file",
    ".msgpack": "a Flax checkpoint",
    ".npz": "an archive of NumPy arrays, as MLX writes them",
    ".onnx": "an ONNX model",
    ".engine": "a TensorRT engine",
    ".plan": "a TensorRT engine",
}
"""{suffix of weight files that are not read: what they are}"""


def refuse_unread(file: AnyPath, start: bytes) -> None:
    """Check that the file's name, and `start`, its first bytes, are not of a known unread format.

    Raises  NotACheckpoint; NotSafetensors for weights in another kind of file
    """
    if kind := UNREAD_SUFFIXES.get(Path(file.name).suffix):
        raise NotSafetensors(f"{file}: is {kind}, which is not read", NOT_RUN)
    text = start.lstrip()
    start = text.lower() if text[:1] in (b"<", b"{") else start
    for kinds, error in ((FAILED_DOWNLOADS, NotACheckpoint), (UNREAD_WEIGHTS, NotSafetensors)):
        for magic, (kind, hint) in kinds.items():
            if start.startswith(magic):
                raise error(f"{file}: is {kind}, not a safetensors file", hint)
