"""The example task: asked for verse or for prose, write that. A program can check it.

In Tiny Shakespeare the lines of verse begin with a capital letter, and those of prose are broken where the page ends.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.io import atomic_write
from ..data.corpus import TINY_SHAKESPEARE

KINDS = "verse", "prose"
MIN_LINES = 2  # one line alone may be either
SPEECH = re.compile(r"([A-Z][A-Za-z' ]*):\n((?:[^\n]+\n){2,})")  # a heading and at least two lines


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


def pieces(speech: str, max_chars: int) -> Iterator[list[str]]:
    """A speech's lines in runs of at most max_chars characters, each of at least MIN_LINES."""
    run: list[str] = []
    for line in [*speech.splitlines(keepends=True), ""]:
        if not line or sum(map(len, run)) + len(line) > max_chars:
            if len(run) >= MIN_LINES:
                yield run
            run = []
        run.append(line)


def demonstrations(output: str, max_chars: int = 250, split: float = 0.9) -> None:
    """Write demonstrations for the example task, speeches of Tiny Shakespeare with what they are, as JSON lines.

    There are as many of verse as of prose. A long speech gives several. The speakers of the prompts are shuffled, so
    that only the first word tells what to write, and not who speaks.

    Args:
        output: the JSONL file to write.
        max_chars: longest example, prompt and completion together.
        split: fraction of the text to take speeches from; the rest is what pre-training validates on.
    """
    text = TINY_SHAKESPEARE.read_text(encoding="utf-8")
    found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}  # speaker and completion
    speeches = SPEECH.findall(text[: int(split * len(text))])
    room = max_chars - 1 - max((len(prompt_for(KINDS[0], speaker)) for speaker, _ in speeches), default=0)
    for speaker, speech in speeches:
        for lines in pieces(speech, room):
            if kind := kind_of(lines):
                found[kind].append((speaker, "".join(lines) + "\n"))
    count = min(map(len, found.values()))
    if not count:
        raise ValueError(f"no speech is as short as max_chars={max_chars}: give a larger number")
    shuffled = random.Random(1337)
    chosen = [(kind, *pair) for kind in KINDS for pair in shuffled.sample(found[kind], count)]
    shuffled.shuffle(chosen)
    speakers = shuffled.sample([speaker for _, speaker, _ in chosen], len(chosen))
    records = [
        {"prompt": prompt_for(kind, speaker), "completion": completion}
        for speaker, (kind, _, completion) in zip(speakers, chosen, strict=True)
    ]
    atomic_write(Path(output), "".join(f"{json.dumps(record)}\n" for record in records).encode())
    print(f"{count:,} speeches in verse and as many in prose are in {output}")
