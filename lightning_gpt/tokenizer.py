"""Text to token ids and back."""

import torch
from torch import Tensor


def _codes(text: str) -> Tensor:
    """Unicode code points of a text, int32 (T,); in one go, as a loop over a million characters is slow."""
    return torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32) if text else torch.empty(0).int()


class CharTokenizer:
    """One token per character; a character's id is its place in `vocabulary`, which is sorted."""

    def __init__(self, vocabulary: str):
        self.vocabulary = "".join(sorted(set(vocabulary)))
        self._codes = _codes(self.vocabulary)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def unknown(self, text: str) -> str:
        """The characters of `text` that have no id, sorted."""
        return "".join(sorted(set(text) - set(self.vocabulary)))

    def encode(self, text: str) -> Tensor:
        """Token ids (T,), int64.

        Raises:
            ValueError: a character is not in the vocabulary; all such characters are named.
        """
        if unknown := self.unknown(text):
            raise ValueError(
                f"the text has characters that this vocabulary of {len(self)} lacks: {unknown[:40]!r}; "
                f"leave them out, or train on a text that has them. It knows {self.vocabulary[:100]!r}"
            )
        return torch.searchsorted(self._codes, _codes(text))

    def decode(self, ids: Tensor) -> str:
        return "".join(self.vocabulary[i] for i in ids.flatten().tolist())


class TokenIds:
    """Ids written as numbers, "464 3290 ", for files of tokens whose tokenizer is elsewhere."""

    vocabulary = ("0",)  # what to begin with where nothing else is said

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def unknown(self, text: str) -> str:
        """The words of `text` that are no id, or all of it if it has none."""
        words = text.split()
        return " ".join(word for word in words if not (word.isdecimal() and int(word) < self.size)) if words else text

    def encode(self, text: str) -> Tensor:
        """Token ids (T,), int64.

        Raises:
            ValueError: a word is no id; all such words are named.
        """
        if (unknown := self.unknown(text)) or not text:
            raise ValueError(
                f"this model knows token ids from 0 to {self.size - 1}, written as numbers, and no {unknown[:40]!r}"
            )
        return torch.tensor([int(word) for word in text.split()])

    def decode(self, ids: Tensor) -> str:
        return "".join(f"{i} " for i in ids.flatten().tolist())
