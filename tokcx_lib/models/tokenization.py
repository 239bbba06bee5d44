"""Token ids of a text that is read piece by piece: those of the whole text, whatever the tokenizer.

A text is text: where the name of a special token, such as ``[CLS]``, stands in it, its characters are tokenised.

Where a tokenizer separates words at white space before all else, as BERT's does, a text may be cut there. Others look
across lines: byte-level ones make one token of several line breaks, others have no words at all. Their texts are read
in windows that overlap, and two windows are joined where they have the same tokens, in the middle of what they share.
If they have not, as in a long run without a space, the first of them is doubled, so the time stays in proportion to
the text. A unigram model weighs all ways to cut a word, and among equal ones rounding decides: there windows are
joined between words alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers.models import Unigram
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

PIECE = 2**20  # characters of a text that are tokenised at once
LONGEST = 10_000_000  # characters that may hang together: a bound for the memory
# Characters between the beginnings of two windows, and of what they share. A run that repeats itself may be cut in
# several ways, and which way then depends on where a window ends: with a prime step, windows do not agree by chance.
STEP, SHARED = 65_537, 8_192
AHEAD = 8  # windows tokenised at once


def read_ids(tokenizer, text: str | Iterable[str]) -> Iterator[np.ndarray]:
    """Token ids of a text, without special tokens: arrays (n,), int64, which together are those of the whole.

    Parameters
    ----------
    tokenizer : a fast tokenizer of transformers; text : a string, or the pieces of one, read as they are needed.

    Raises
    ------
    ValueError
        If the text is no string or pieces of one; if the tokenizer cannot read it, reads a part of it as a special
        token, or as one whole that is longer than LONGEST characters.
    """
    pieces = _pieces(text)
    special = _special(tokenizer)
    numbers = np.array(sorted(special), dtype=np.int64)
    for ids in _by_lines(tokenizer, pieces) if _cuts_at_spaces(tokenizer) else _by_windows(tokenizer, pieces):
        if len(found := ids[np.isin(ids, numbers)]):
            raise ValueError(f"text: expected text, got {special[found[0]]!r}, which this tokenizer reads as special")
        yield ids


def _pieces(text) -> Iterator[str]:
    """Pieces of a text, none longer than PIECE."""
    if isinstance(text, str):
        text = [text]
    if not isinstance(text, Iterable):
        raise ValueError(f"text: expected a string or pieces of one, got {type(text).__name__}")
    for piece in text:
        if not isinstance(piece, str):
            raise ValueError(f"text: expected a string or pieces of one, got {type(piece).__name__}")
        yield from (piece[i : i + PIECE] for i in range(0, len(piece), PIECE))


def _special(tokenizer) -> dict[int, str]:
    """Special tokens by id, without that of unknown words, which a text may well have."""
    backend = tokenizer.backend_tokenizer
    special = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    # The model's own: GPT-2 names the end of a text for it, which no word becomes. Unigram models do not tell.
    unknown = getattr(backend.model, "unk_token", tokenizer.unk_token)
    return {i: content for i, content in special.items() if content != unknown}


def _encode(tokenizer, texts: list[str], places: bool = False) -> list:
    """Encodings of several texts, special tokens in them taken for text; with their places in it, if asked for."""
    backend = tokenizer.backend_tokenizer
    encode = backend.encode_batch if places else backend.encode_batch_fast
    as_text = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return encode(texts, add_special_tokens=False)
    except Exception as error:  # the library raises no narrower kind
        raise ValueError(f"text: expected text that this tokenizer can read, got {error}") from error
    finally:
        backend.encode_special_tokens = as_text


def _cuts_at_spaces(tokenizer) -> bool:
    """Whether a text may be cut at white space for sure: no token, added ones included, spans any or asks for it."""
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder().values()
    return (
        isinstance(backend.pre_tokenizer, BertPreTokenizer)
        and (backend.normalizer is None or isinstance(backend.normalizer, BertNormalizer))
        and not any(token.content.split() != [token.content] for token in added)
        and not any(token.lstrip or token.rstrip for token in added if not token.special)
    )


def _by_lines(tokenizer, pieces: Iterator[str]) -> Iterator[np.ndarray]:
    """Ids of a text that may be cut at white space."""
    for text in _cut_at_spaces(pieces):
        # The lines of a piece are shared out over all cores.
        encoded = _encode(tokenizer, text.split("\n"))
        yield np.fromiter((i for line in encoded for i in line.ids), dtype=np.int64)


def _cut_at_spaces(pieces: Iterator[str]) -> Iterator[str]:
    """The text again, each piece but the last ended by a line break or, where there is none, by a space."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        cut = (piece.rfind("\n") + 1) or (piece.rfind(" ") + 1)
        if cut and size + cut >= PIECE // 2:
            yield "".join([*held, piece[:cut]])
            held, size = [], 0
            piece = piece[cut:]
        held.append(piece)
        size += len(piece)
        _require_short(size)
    yield "".join(held)


def _require_short(size: int) -> None:
    if size > LONGEST:
        raise ValueError(f"text: expected words, got {size:,} characters that this tokenizer cannot read in pieces")


def _by_windows(tokenizer, pieces: Iterator[str]) -> Iterator[np.ndarray]:
    """Ids of a text whose windows are joined where they agree."""
    windows = _Windows(tokenizer, pieces)
    first, count = 0, 1  # the window at hand: its first step, and how many it spans
    begun, before = 0, None  # where its part of the text begins, and its tokens there as the window before has them
    window = windows.tokens(first, count)
    while windows.go_on(first + count):
        following = windows.tokens(first + count, 1)
        seam = (first + count) * STEP + SHARED // 2
        here = _around(seam, window)
        if _both_sides(seam, here) and np.array_equal(here, _around(seam, following)):
            yield _between(begun, seam, window)[1]
            first, count, window = first + count, 1, following
            begun, before = seam, here
            windows.forget(first)
            continue
        count *= 2
        _require_short(count * STEP)
        window = windows.tokens(first, count)
        if before is not None and not np.array_equal(before, _around(begun, window)):
            found = f"got one that it cannot, at character {begun:,}"
            raise ValueError(f"text: expected one that this tokenizer can read in pieces, {found}")
    yield _between(begun, np.inf, window)[1]


def _between(start: float, stop: float, tokens: np.ndarray) -> np.ndarray:
    """Those of some tokens (3, n) that begin in a stretch of the text."""
    return tokens[:, (start <= tokens[0]) & (tokens[0] < stop)]


def _around(seam: int, tokens: np.ndarray) -> np.ndarray:
    """The tokens in the middle of what two windows share: near the end of either, the whole may have others."""
    return _between(seam - SHARED // 4, seam + SHARED // 4, tokens)


def _both_sides(seam: int, tokens: np.ndarray) -> bool:
    """Whether places where a text can be cut lie on both sides of a seam."""
    places = tokens[0, tokens[2] > 0]
    return places.size > 0 and places[0] < seam <= places[-1]


class _Windows:
    """The windows of a text, which is read as they are asked for. Step i begins at its character i * STEP."""

    def __init__(self, tokenizer, pieces: Iterator[str]):
        self._tokenizer, self._pieces = tokenizer, pieces
        self._words = isinstance(tokenizer.backend_tokenizer.model, Unigram)
        self._text, self._start = "", 0  # what is held of the text, and where that begins
        self._ahead: dict[int, np.ndarray] = {}  # windows of one step, tokenised on all cores before their turn

    def go_on(self, step: int) -> bool:
        """Whether there is more of the text than the window that ends at a step, and shares what comes then."""
        end = step * STEP + SHARED
        self._read(end + 1)
        return end < self._start + len(self._text)

    def tokens(self, first: int, count: int) -> np.ndarray:
        """The tokens (3, n) of a window that spans `count` steps: places in the text, ids, and where it can be cut."""
        if count > 1:
            self._read((first + count) * STEP + SHARED)
            return self._tokenised([(first, count)])[0]
        if first not in self._ahead:
            self._read((first + AHEAD) * STEP + SHARED)
            steps = [i for i in range(first, first + AHEAD) if i == first or self.go_on(i)]
            self._ahead = dict(zip(steps, self._tokenised([(i, 1) for i in steps])))
        return self._ahead[first]

    def forget(self, step: int) -> None:
        """Let go of the text before a step."""
        self._text, self._start = self._text[step * STEP - self._start :], step * STEP

    def _read(self, stop: int) -> None:
        parts, size = [self._text], self._start + len(self._text)
        while size < stop and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            size += len(piece)
        self._text = "".join(parts)

    def _tokenised(self, windows: list[tuple[int, int]]) -> list[np.ndarray]:
        starts = [first * STEP for first, _ in windows]
        texts = [
            self._text[start - self._start : start - self._start + count * STEP + SHARED]
            for start, (_, count) in zip(starts, windows)
        ]
        encoded = _encode(self._tokenizer, texts, places=True)
        return [_as_array(start, window, self._words) for start, window in zip(starts, encoded)]


def _as_array(start: int, window, words: bool) -> np.ndarray:
    """The tokens (3, n) of a window from its encoding; it can be cut before every token, or only before every word."""
    places = [start + place for place, _ in window.offsets]
    word = np.array(window.word_ids if words else range(len(places)), dtype=np.int64)
    return np.array([places, window.ids, np.diff(word, prepend=-1) != 0], dtype=np.int64)
