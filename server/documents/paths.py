"""Paths of documents, and what they say about what is in there."""

import unicodedata
from mimetypes import MimeTypes

MAX_PATH_BYTES = 512
MAX_DECOMPOSED_BYTES = 3 * MAX_PATH_BYTES  # of such a path in any other normalization form
_TYPES = MimeTypes()  # Python's own table: the same on every machine
_TYPES.add_type("text/markdown", ".md")
_TYPES.add_type("text/x-typescript", ".ts")  # not a video
_TYPES.add_type("application/toml", ".toml")
_TYPES.add_type("application/yaml", ".yaml")
_TYPES.add_type("application/yaml", ".yml")


def normalize(path: str) -> str:
    """Return the path in Unicode NFC, so that macOS, which sends NFD, and others name the same document.

    One that is too long stays as it is: the time that it takes grows with the square of the length.
    """
    return unicodedata.normalize("NFC", path) if len(path.encode()) <= MAX_DECOMPOSED_BYTES else path


def problem_with(path: str) -> str | None:
    """Return the rule that a path of a document breaks, or None."""
    if not 1 <= len(path.encode()) <= MAX_PATH_BYTES:
        return f"Must have 1 to {MAX_PATH_BYTES} bytes."
    segments = path.split("/")
    if "" in segments:
        return "Must be relative, without empty segments."
    if ".." in segments or "." in segments:
        return "Must not have . or .. as segments."
    if "\\" in path:
        return "Must not have backslashes."
    if any(unicodedata.category(character) == "Cc" for character in path):
        return "Must not have control characters."
    if not unicodedata.is_normalized("NFC", path):
        return "Must be in Unicode NFC."
    return None


def mime_type_of(path: str) -> str:
    kind, encoding = _TYPES.guess_type(path, strict=True)
    return kind if kind and not encoding else "text/plain"
