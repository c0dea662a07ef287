"""Words of a text, as they are searched for: the same function for what is stored and for what is asked.

Its one invariant: if a query's words, in their distances, occur in a text's words, the query is in the text.

Case and width are folded (NFKC, casefold). Chinese, Japanese and Korean have no blanks between words: every pair of
neighbouring characters is a word there, so that any two characters or more are found wherever they stand. Places
count characters in such runs and words elsewhere, and so tell distances in both. Words of two scripts that touch each
other are two words.
"""

import hashlib
import re
import sys
import unicodedata
from base64 import b64encode
from collections.abc import Iterator
from functools import cache
from typing import Final, Literal, NamedTuple

SEARCHED_BYTES: Final = 64 * 2**10
LAST_PLACE: Final = 16_383
"""The last place that a tsvector keeps apart from those behind it (PostgreSQL's limits on text search)."""
_LONGEST_WORD: Final = 100

_CJK: Final = (
    "\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff"
    "\u1100-\u11ff\U00020000-\U000323af"
)


def _marks() -> str:
    """All combining marks, as ranges of a character class: they are parts of the words that they stand in."""
    points = [point for point in range(sys.maxunicode + 1) if unicodedata.category(chr(point)).startswith("M")]
    ranges: list[list[int]] = []
    for point in points:
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in ranges)


_LETTER: Final = rf"(?:(?![{_CJK}])[^\W_]|[{_marks()}])"
# Most words are ASCII or begin so: that part is found as a whole, not letter by letter.
_ASCII: Final = rf"[0-9A-Za-z]++(?:(?=[^\x00-\x7f]){_LETTER}++)?"
_RUNS: Final = re.compile(rf"(?P<ascii>{_ASCII})|(?P<cjk>[{_CJK}]++)|(?P<word>{_LETTER}++)")
_LETTERS: Final = frozenset({"Lu", "Ll", "Lt", "Lo"})


@cache
def _script(character: str) -> str:
    """What a letter's name begins with, which is its script; empty for digits and marks, which go with any."""
    if unicodedata.category(character) not in _LETTERS:
        return ""
    return unicodedata.name(character, "").partition(" ")[0]


def _words(run: str) -> Iterator[str]:
    """A run of letters and digits, parted where the script changes."""
    if run.isascii():
        yield run
        return
    start, script = 0, ""
    for place, character in enumerate(run):
        found = _script(character)
        if found and script and found != script:
            yield run[start:place]
            start = place
        script = found or script
    yield run[start:]


# Characters that show nothing by themselves (variation selectors, joiners, soft hyphens): words go on across them.
IGNORED: Final = "[\u00ad\u200b-\u200d\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
_IGNORED: Final = re.compile(IGNORED)
# What PostgreSQL 15 does not fold: its lower case keeps these as they are.
_UNFOLDED: Final = {"ss": "(ss|ß)", "σ": "[σς]", "i\u0307": "(i\u0307|İ)"}


def fold(text: str) -> str:
    return unicodedata.normalize("NFKC", _IGNORED.sub("", text)).casefold()


Kind = Literal["word", "pair", "end", "single"]


class Word(NamedTuple):
    """A word at its place. `kind` tells a pair of a CJK run from the run's last character, and from a word."""

    text: str
    place: int
    kind: Kind


def places(text: str) -> Iterator[Word]:
    """The words of a folded text with their places, from 1 on."""
    return map(Word._make, _placed(text))


def _placed(text: str) -> Iterator[tuple[str, int, Kind]]:
    place = 1
    for run in _RUNS.finditer(text):
        found = run.group()
        if run.lastgroup == "cjk":
            for start in range(len(found) - 1):
                yield found[start : start + 2], place + start, "pair"
            yield found[-1], place + len(found) - 1, "end" if len(found) > 1 else "single"
            place += len(found)
        elif found.isascii() and len(found) <= _LONGEST_WORD:
            yield found, place, "word"
            place += 1
        else:
            for word in _words(found):
                yield _short(word), place, "word"
                place += 1


def _short(word: str) -> str:
    """The word, or for a very long one something of its own that fits into the index."""
    if len(word) <= _LONGEST_WORD:
        return word
    return word[:_LONGEST_WORD] + hashlib.sha256(word.encode()).hexdigest()[:16]


def own_prefix(user_id: str) -> str:
    """What makes a user's words their own: the index then holds no list that grows with other users' texts."""
    return b64encode(hashlib.sha256(user_id.encode()).digest()[:6], altchars=b"ab").decode()


def vector(user_id: str, text: str) -> tuple[str, bool]:
    """The text of a tsvector, and whether the text is too long for its places to be trusted."""
    cut = text.encode("utf-8", "replace")[:SEARCHED_BYTES].decode("utf-8", "ignore")
    own = own_prefix(user_id)
    by_word: dict[str, list[int]] = {}
    last = 0
    for word, place, _ in _placed(fold(cut)):
        if word in by_word:
            by_word[word].append(place)
        else:
            by_word[word] = [place]
        last = place
    if last > LAST_PLACE:
        by_word = {word: [min(place, LAST_PLACE) for place in found] for word, found in by_word.items()}
    # A tsvector keeps 256 places of a word; a word that comes more often is as good as one without place.
    is_long = last > LAST_PLACE or any(len(found) > 255 for found in by_word.values())
    return " ".join(f"'{own}{word}':{','.join(map(str, found[:255]))}" for word, found in by_word.items()), is_long


# ── asking ──────────────────────────────────────────────────────────────────────────────────────

_PARTS: Final = re.compile(r'"([^"]*)"|(\S+)')


def query(user_id: str, asked: str) -> tuple[str, str] | None:
    """Two tsqueries: the words in their distances, and the words alone; None where nothing can be searched for.

    All words must occur, those in quotes as a phrase; so must the parts of what was written without a blank.
    """
    own = own_prefix(user_id)
    phrases = [_phrase(own, fold(part)) for part in _parts(asked)]
    phrases = [phrase for phrase in phrases if phrase[0]]
    if not phrases:
        return None
    return " & ".join(f"({exact})" for exact, _ in phrases), " & ".join(loose for _, loose in phrases)


def _parts(asked: str) -> list[str]:
    return [quoted or bare for quoted, bare in _PARTS.findall(asked)]


def _asked(text: str) -> list[Word]:
    """As `places`, without the last characters of runs: the pairs before them say as much."""
    return [word for word in places(text) if word.kind != "end"]


def _phrase(own: str, text: str) -> tuple[str, str]:
    found = _asked(text)
    # A character by itself is the first of a pair, or the last of a run: what begins with it is both.
    lexemes = [f"'{own}{word.text}'" + (":*" if word.kind == "single" else "") for word in found]
    exact = ""
    for index, (word, lexeme) in enumerate(zip(found, lexemes, strict=True)):
        exact += f" <{word.place - found[index - 1].place}> " if index else ""
        exact += lexeme
    return exact, " & ".join(lexemes)


def long_patterns(asked: str) -> list[str]:
    """Regular expressions (PostgreSQL's) for the phrases, by which texts too long for places are judged."""
    return [pattern for part in _parts(asked) if (pattern := _pattern(fold(part)))]


def _pattern(text: str) -> str:
    pieces = [piece for run in _RUNS.finditer(text) for piece in _pieces(run)]
    if len(pieces) == 1 and (pieces[0][1] != "cjk" or len(pieces[0][0]) <= 2):
        return ""  # one word: the index has said enough
    pattern = ""
    before = ""
    for found, script in pieces:
        if pattern:  # two words of one script would be one word without something between them
            pattern += "[^[:alnum:]]" + ("+" if script == before != "cjk" else "*")
        pattern += found
        before = script
    for folded, either in _UNFOLDED.items():
        pattern = pattern.replace(folded, either)
    return pattern


def _pieces(run: re.Match[str]) -> Iterator[tuple[str, str]]:
    """A run's words, each with its script; a CJK run as a whole."""
    if run.lastgroup == "cjk":
        yield run.group(), "cjk"
    else:
        for word in _words(run.group()):
            yield word, next(filter(None, map(_script, word)), "")


def find(asked: str, text: str) -> int:
    """About where in `text` a query's first match stands: of a whole part of it, else of one of its words; else 0."""
    folded, origins = _folded_with_origins(text)
    whole = sorted({fold(part).strip() for part in _parts(asked)}, key=len, reverse=True)
    words = [word.text for part in _parts(asked) for word in _asked(fold(part))]
    for needle in [*whole, *words]:
        if needle and (place := folded.find(needle)) >= 0:
            return origins[place]
    return 0


def _folded_with_origins(text: str) -> tuple[str, list[int]]:
    """The folded text, and for each of its characters where it comes from; character by character."""
    pieces: list[str] = []
    origins: list[int] = []
    for place, character in enumerate(text):
        piece = character.lower() if character.isascii() else fold(character)
        pieces.append(piece)
        origins += [place] * len(piece)
    return "".join(pieces), origins
