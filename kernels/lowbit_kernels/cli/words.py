"""Word errors between transcripts, and the file of texts that ``--texts`` names."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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
        return {"rate": self.rate} | asdict(self)


def word_errors(pairs: Iterable[tuple[str, str]]) -> WordErrors:
    """Count word errors of (reference, hypothesis) pairs; case and punctuation do not count."""
    jiwer = require("jiwer", "audio")
    found = [jiwer.process_words(_normalize(wanted), _normalize(got)) for wanted, got in pairs]
    errors = [each.substitutions + each.deletions + each.insertions for each in found]
    words = sum(len(each.references[0]) for each in found)
    return WordErrors(sum(errors), words, sum(map(bool, errors)), len(found))


def _normalize(text: str) -> str:
    return " ".join(_NOT_WORD.sub(" ", text.lower()).split())


def read_texts(path: Path) -> dict[str, str]:
    """Read texts by file name: a JSON object, or lines of a name, a tab and the text.

    Raises:
        CommandError: naming the file, the line and the rule.
    """
    kind = "JSON" if path.suffix == ".json" else "UTF-8"
    try:
        content = path.read_text(encoding="utf-8")
        texts = json.loads(content) if kind == "JSON" else _from_lines(path, content)
    except FileNotFoundError:
        raise CommandError(f"--texts {path}: no such file") from None
    except OSError as error:
        raise CommandError(f"--texts {path}: cannot be read ({error})") from None
    except ValueError as error:
        raise CommandError(f"--texts {path}: not {kind} ({error})") from None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise CommandError(f"--texts {path}: must be an object of file names and texts")
    return texts


def _from_lines(path: Path, content: str) -> dict[str, str]:
    texts = {}
    for number, line in enumerate(content.splitlines(), 1):
        name, tab, text = line.partition("\t")
        if tab:
            texts[name] = text
        elif line.strip():
            raise CommandError(f"--texts {path}: line {number} has no tab between name and text")
    return texts
