"""Paths of documents, and what they say about what is in there."""

from mimetypes import MimeTypes

LONGEST_PATH = 512  # bytes
_TYPES = MimeTypes()  # Python's own table: the same on every machine
_TYPES.add_type("text/markdown", ".md")
_TYPES.add_type("text/x-typescript", ".ts")  # not a video
_TYPES.add_type("application/toml", ".toml")
_TYPES.add_type("application/yaml", ".yaml")
_TYPES.add_type("application/yaml", ".yml")


def problem_with(path: str) -> str | None:
    """Why this is no path of a document: relative, without ``..`` and empty segments."""
    if not 1 <= len(path.encode()) <= LONGEST_PATH:
        return f"Must have 1 to {LONGEST_PATH} bytes."
    segments = path.split("/")
    if "" in segments:
        return "Must be relative, without empty segments."
    if ".." in segments or "." in segments:
        return "Must not have . or .. as segments."
    return None


def mime_type_of(path: str) -> str:
    kind, encoding = _TYPES.guess_type(path, strict=True)
    return kind if kind and not encoding else "text/plain"
