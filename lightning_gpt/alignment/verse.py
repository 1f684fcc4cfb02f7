"""The example task: asked for verse or for prose, write that. A program can check it.

In Tiny Shakespeare the lines of verse begin with a capital letter, and those of prose are broken where the page ends.
"""

import json
import random
import re
from pathlib import Path

from ..checkpoint.io import atomic_write
from ..data.corpus import TINY_SHAKESPEARE

KINDS = "verse", "prose"
SPEECH = re.compile(r"([A-Z][A-Za-z' ]*):\n((?:[^\n]+\n){3,})")  # a heading and at least three lines


def kind_of(lines: list[str]) -> str | None:
    """verse if each line begins with a capital letter, prose if at least a third of them do not, else None."""
    capital = [line.lstrip("'(-").lstrip()[:1].isupper() for line in lines]
    if not lines or all(capital):
        return "verse" if lines else None
    return "prose" if capital.count(False) * 3 >= len(lines) else None


def prompt_for(kind: str, speaker: str) -> str:
    return f"{kind}\n\n{speaker}:\n"


def is_followed(kind: str, text: str) -> bool:
    """Whether a continuation of `prompt_for` is of the kind that was asked for; the cut last line does not count."""
    lines = text.split("\n\n")[0].split("\n")
    complete = lines if "\n\n" in text else lines[:-1]
    return kind_of([line for line in complete if line]) == kind


def demonstrations(output: str, max_chars: int = 250, split: float = 0.9) -> None:
    """Write demonstrations for the example task, speeches of Tiny Shakespeare with what they are, as JSON lines.

    There are as many of verse as of prose. A speech that is longer than max_chars ends after one of its lines.

    Args:
        output: the JSONL file to write.
        max_chars: longest example, prompt and completion together.
        split: fraction of the text to take speeches from; the rest is what pre-training validates on.
    """
    text = TINY_SHAKESPEARE.read_text(encoding="utf-8")
    found: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
    for speaker, speech in SPEECH.findall(text[: int(split * len(text))]):
        lines, kind = f"{speech}\n".splitlines(keepends=True), kind_of(speech.splitlines())
        prompt = prompt_for(kind or "", speaker)
        while lines and len(prompt) + sum(map(len, lines)) > max_chars:
            lines.pop()
        if kind is not None and kind_of([line for line in lines if line.strip()]) == kind:
            found[kind].append({"prompt": prompt, "completion": "".join(lines)})
    count = min(map(len, found.values()))
    if not count:
        raise ValueError(f"no speech is as short as max_chars={max_chars}: give a larger number")
    shuffled = random.Random(1337)
    records = [record for kind in KINDS for record in shuffled.sample(found[kind], count)]
    shuffled.shuffle(records)
    atomic_write(Path(output), "".join(f"{json.dumps(record)}\n" for record in records).encode())
    print(f"{count:,} speeches in verse and as many in prose are in {output}")
