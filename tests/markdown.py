"""Markdown, as far as tests read it: headings, links and code blocks, as GitHub shows them."""

import re
from collections.abc import Iterator

_FENCED = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """Return the anchors of all headings; the second of one name ends in ``-1``."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCED.sub("", text)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def links(text: str) -> list[str]:
    """Return the targets of all links outside of code."""
    prose = re.sub(r"`[^`\n]+`", "", _FENCED.sub("", text))
    return _LINK.findall(prose)


def blocks(text: str, language: str) -> Iterator[str]:
    """Yield the contents of the code blocks in a language."""
    for _, found, content in _FENCED.findall(text):
        if found == language:
            yield content


def section(text: str, heading: str) -> str:
    """Return all that stands below a heading, down to the next one of its level or above."""
    level, title = heading.split(" ", 1)
    lines = _FENCED.sub(lambda block: block[0].replace("#", "\0"), text).splitlines()
    start = lines.index(f"{level} {title}") + 1
    ends = (index for index, line in enumerate(lines) if index >= start and re.match(rf"#{{1,{len(level)}}} ", line))
    return "\n".join(lines[start : next(ends, len(lines))]).replace("\0", "#")


def table(text: str) -> list[tuple[str, ...]]:
    """Return the rows of the first table, without its heading."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|")) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append(tuple(cell.strip() for cell in line.strip("|").split(" | ")))
    return rows
