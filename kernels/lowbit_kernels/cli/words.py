"""Word errors between transcripts, and the file of texts that ``--texts`` names."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit_kernels.cli.errors import CommandError, require

_NOT_WORD = re.compile(r"[^\w\s']")


@dataclass(frozen=True)
class WordErrors:
    """Counts over all transcripts.

    Args:
        errors: words to change, add or remove.
        words: words of the references.
        changed: transcripts with an error.
        transcripts: all transcripts.
    """

    errors: int
    words: int
    changed: int
    transcripts: int

    @property
    def rate(self) -> float:
        """Errors a word of the references; errors a word said where they are empty."""
        return self.errors / max(self.words, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "rate": self.rate,
            "errors": self.errors,
            "words": self.words,
            "changed": self.changed,
            "transcripts": self.transcripts,
        }


def word_errors(pairs: Iterable[tuple[str, str]]) -> WordErrors:
    """Count word errors of (reference, hypothesis) pairs; case and punctuation do not count."""
    jiwer = require("jiwer", "audio")
    errors = words = changed = transcripts = 0
    for reference, hypothesis in pairs:
        wanted, got = _normalize(reference), _normalize(hypothesis)
        if wanted:
            found = jiwer.process_words(wanted, got)
            mistakes = found.substitutions + found.deletions + found.insertions
        else:
            mistakes = len(got.split())
        errors += mistakes
        words += len(wanted.split())
        changed += mistakes > 0
        transcripts += 1
    return WordErrors(errors, words, changed, transcripts)


def _normalize(text: str) -> str:
    return " ".join(_NOT_WORD.sub(" ", text.lower()).split())


def read_texts(path: Path) -> dict[str, str]:
    """Read texts by file name: a JSON object, or lines of a name, a tab and the text.

    Raises:
        CommandError: naming the file, the line and the rule.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CommandError(f"--texts {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--texts {path}: cannot be read ({error})") from None
    if path.suffix == ".json":
        return _from_json(path, content)
    texts = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        name, tab, text = line.partition("\t")
        if not tab:
            raise CommandError(f"--texts {path}: line {number} has no tab between name and text")
        texts[name] = text
    return texts


def _from_json(path: Path, content: str) -> dict[str, str]:
    try:
        texts = json.loads(content)
    except ValueError as error:
        raise CommandError(f"--texts {path}: not JSON ({error})") from None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise CommandError(f"--texts {path}: must be an object of file names and texts")
    return texts
