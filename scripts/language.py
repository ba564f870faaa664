"""Check the language of comments, docstrings and names: see scripts/lint.

A sentence has its subject first, a name says what it means, and neither uses a word that scripts/language.toml lists.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("server", "scripts", "tests", "run.py")
_PARAGRAPH = re.compile(r"\n\s*\n|\n\s*(?=[-*] )")
_SENTENCE_START = r"(?:^|[.!?][\"'`)\]]*\s+)"


@dataclass(frozen=True)
class Rules:
    clauses: re.Pattern[str]
    phrases: re.Pattern[str]
    names: frozenset[str]
    exempt: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> "Rules":
        """Compile the rules from the text of a TOML file."""
        plan = tomllib.loads(text)
        return cls(
            # At the start of a comment a small letter opens a sentence, too.
            clauses=re.compile(
                rf"(?i:^({'|'.join(plan['clauses'])})\b)|{_SENTENCE_START}({'|'.join(plan['clauses'])})\b"
            ),
            phrases=re.compile(rf"(?i)\b({'|'.join(map(re.escape, plan['phrases']))})\b"),
            names=frozenset(plan["names"]),
            exempt=tuple(plan["exempt"]),
        )


@dataclass(frozen=True)
class Finding:
    line: int
    text: str


def main() -> int:
    rules = Rules.read((ROOT / "scripts/language.toml").read_text())
    findings = [f"{path}:{finding.line}: {finding.text}" for path in tracked() for finding in check_file(path, rules)]
    print(*findings, sep="\n", end="\n" if findings else "")
    if findings:
        print(f"{len(findings)} findings; docs/glossary.md has the words to write instead")
    return 1 if findings else 0


def tracked() -> list[str]:
    """List the Python files of the checkout that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FILES],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    return sorted(path for path in listed.stdout.splitlines() if path.endswith(".py") and (ROOT / path).exists())


def check_file(path: str, rules: Rules) -> list[Finding]:
    source = (ROOT / path).read_text()
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    findings = check_names(tokens, rules)
    if not path.startswith(rules.exempt):
        findings += check_prose([*docstrings(source), *comments(tokens)], rules)
    return sorted(findings, key=lambda finding: finding.line)


def check_names(tokens: Iterable[tokenize.TokenInfo], rules: Rules) -> list[Finding]:
    return [
        Finding(token.start[0], f"retired name {token.string!r}")
        for token in tokens
        if token.type == tokenize.NAME and token.string in rules.names
    ]


def check_prose(texts: Iterable[tuple[int, str]], rules: Rules) -> list[Finding]:
    findings = []
    for line, text in texts:
        for paragraph in _PARAGRAPH.split(text):
            words = " ".join(paragraph.split()).lstrip("-* ")
            if rules.clauses.search(words):
                findings.append(Finding(line, f"a sentence begins with a relative clause: {words[:80]!r}"))
            findings += [Finding(line, f"{found[0]!r} in {words[:80]!r}") for found in rules.phrases.finditer(words)]
    return findings


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield each docstring with the line it begins in; attributes have theirs below them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def comments(tokens: Iterable[tokenize.TokenInfo]) -> Iterator[tuple[int, str]]:
    """Yield each comment with its first line; lines of comments below each other are one."""
    first, last, texts = 0, -1, list[str]()
    for token in tokens:
        if token.type != tokenize.COMMENT or token.string.startswith("#!"):
            continue
        line, column = token.start
        stands_alone = not token.line[:column].strip()
        if not (stands_alone and line == last + 1):
            if texts:
                yield first, "\n".join(texts)
            first, texts = line, []
        texts.append(token.string.lstrip("#").strip())
        last = line if stands_alone else -1
    if texts:
        yield first, "\n".join(texts)


if __name__ == "__main__":
    sys.exit(main())
