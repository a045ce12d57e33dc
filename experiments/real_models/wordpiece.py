"""The WordPiece tokenizer of uncased BERT models."""

import pathlib
import unicodedata
from collections.abc import Iterator

# Blocks of ideographs, each of which is a word.
IDEOGRAPHS = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
# Categories of characters that are left out: control, format, private use and surrogates.
CONTROL = ("Cc", "Cf", "Co", "Cs")
LONGEST_WORD = 100


class WordPiece:
    """Splits text into words and each word, from the left, into the longest pieces of a vocabulary.

    Args:
        vocabulary: a file with one piece a line; pieces that continue a word begin with ``##``.

    Reference:
        Devlin et al. 2019, the uncased models.
    """

    def __init__(self, vocabulary: pathlib.Path):
        self.ids = {piece: i for i, piece in enumerate(vocabulary.read_text(encoding="utf-8").splitlines())}

    def __call__(self, text: str, max_length: int) -> list[int]:
        """The ids of a text with its marks, cut to ``max_length``."""
        return self.marked(self.pieces(text), max_length)

    def marked(self, pieces: list[int], max_length: int) -> list[int]:
        """``[CLS]``, the first pieces and ``[SEP]``, at most ``max_length`` in all."""
        return [self.ids["[CLS]"], *pieces[: max_length - 2], self.ids["[SEP]"]]

    def pieces(self, text: str) -> list[int]:
        """The ids of all pieces of a text."""
        return [i for word in words(text) for i in self._word(word)]

    def _word(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word) <= LONGEST_WORD:
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.ids), None)
            if end is None:
                break
            found.append(self.ids[prefix + word[start:end]])
            start = end
        return found if start == len(word) else [self.ids["[UNK]"]]


def words(text: str) -> Iterator[str]:
    """The words of a text in lower case without accents; a mark or an ideograph is a word."""
    kept = (c for c in text if c in "\t\n\r" or (unicodedata.category(c) not in CONTROL and c != "\ufffd"))
    spaced = "".join(f" {c} " if any(a <= ord(c) <= b for a, b in IDEOGRAPHS) else c for c in kept)
    bare = (c for c in unicodedata.normalize("NFD", spaced) if unicodedata.category(c) != "Mn")
    # One character at a time: the vocabulary has no other sigma at the end of a word.
    yield from "".join(f" {c} " if _is_mark(c) else c.lower() for c in bare).split()


def _is_mark(c: str) -> bool:
    """True for punctuation, and for the other signs of ASCII."""
    return unicodedata.category(c)[0] == "P" or (c.isascii() and c.isprintable() and not c.isalnum() and c != " ")
