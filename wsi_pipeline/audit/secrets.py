"""From a slide's texts to what is searched for: whole values, and the words and numbers in them.

Rules, each for a reason:

- A *phrase* is a part of a value (parts end at ``|``, ``;``, ``=``, line ends, tags of XML) of 8 characters
  or more with two words at least, one of them none of the program's own, or three, unless the program
  itself writes that very phrase.
- A *word* has 4 letters or more and is none of the program's own words. Shorter ones (Kim, Lee) are found
  inside their phrases only: alone they stand in every text.
- A *code* has letters and digits, 5 characters at least, or 6 digits with separators: barcodes, accession
  numbers, serial numbers, dates, UIDs. Sizes (``240x240``), versions and DICOM's own UIDs are none.
- A *number* has 6 digits or more and is no size of the slide's levels. Decimal numbers and lists of numbers
  are measurements.
- Names of fields (``ScanScope ID``, tags of XML) are the vendor's vocabulary; their values are what counts.
- A date that is also the day on which the output was made proves nothing and is told.

Anything that the slide's file name holds is kept by design, as the slide's name: it is told, not a finding.
"""

from __future__ import annotations

import datetime
import html
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from wsi_pipeline.audit.own import WORD, own_text, own_versions, own_words
from wsi_pipeline.audit.texts import SlideText

__all__ = ["Secret", "Secrets", "find_secrets"]

_PARTS = re.compile(r"[|;=\r\n\0\t<>\"]+")
_MARKUP = re.compile(r"=\s*\"([^\"]*)\"|=\s*'([^']*)'|<!--(.*?)-->|>([^<]+)<", re.DOTALL)
_LIST = re.compile(r"[+-]?\d+(\.\d+)?(\s*,\s*[+-]?\d+(\.\d+)?)+")
_TOKEN = re.compile(r"[^\W_]+(?:[-_.:/@^+][^\W_]+)*")
_NUMBER = re.compile(r"[+-]?\d*\.?\d+(e[+-]?\d+)?")
_SIZE = re.compile(r"\d+x\d+(x\d+)?")
_VERSION = re.compile(r"v?\d{1,4}(\.\d{1,4}){1,2}")
_DATE = re.compile(r"\d{1,2}\.\d{1,2}\.(19|20)\d\d|(19|20)\d\d\.\d{1,2}\.\d{1,2}")
_DICOM_ROOT = "1.2.840.10008."
_LONGEST, _WINDOW = 96, 48


@dataclass(frozen=True, slots=True)
class Secret:
    """A text to search for, the field that it comes from, and whether it counts only as a whole word."""

    text: str
    field: str
    whole_word: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """``searched``: what must not occur; ``in_name``: what occurs in the file name and is kept with it;
    ``common``: how many words were left out alone because the program writes them itself; ``today``: dates
    that are also the day of the conversion."""

    searched: tuple[Secret, ...]
    in_name: tuple[Secret, ...]
    common: int
    today: tuple[str, ...]


def find_secrets(
    texts: Iterable[SlideText],
    name: str,
    sizes: Collection[int] = (),
    days: Collection[datetime.date] = (),
) -> Secrets:
    """What to search for. ``name``: the slide's file name; ``sizes``: of its levels; ``days``: on which the
    output was written."""
    found: dict[str, Secret] = {}
    common: set[str] = set()
    forms = ("%Y-%m-%d", "%Y%m%d", "%Y:%m:%d", "%d.%m.%Y")
    spellings = {day.strftime(form) for day in days for form in forms}
    today = set()
    texts = list(texts)
    fields = {item.field.partition(".")[2].casefold() for item in texts}
    for item in texts:
        parts = (part for part in _parts(item.text) if part.casefold() not in fields)
        for text in (text for part in parts for text in _candidates(part, common, sizes)):
            if text in spellings:
                today.add(text)
            else:
                found.setdefault(text.casefold(), Secret(text, item.field, len(text) < 12))
    folded = name.casefold()
    in_name = tuple(secret for key, secret in found.items() if key in folded)
    searched = tuple(secret for key, secret in found.items() if key not in folded)
    return Secrets(searched=searched, in_name=in_name, common=len(common), today=tuple(sorted(today)))


def _parts(text: str) -> Iterator[str]:
    """What a value consists of: fields of a line, attributes and text of XML."""
    text = html.unescape(text)
    pieces = (
        ["".join(groups) for groups in _MARKUP.findall(text)] if text.lstrip().startswith("<") else [text]
    )
    for piece in pieces:
        for part in _PARTS.split(piece):
            stripped = part.strip(" ,'{}[]()")
            if stripped and not _LIST.fullmatch(stripped) and not _is_measure(stripped):
                yield stripped


def _candidates(part: str, common: set[str], sizes: Collection[int]) -> Iterator[str]:
    words = WORD.findall(part)
    if len(part) >= 8 and len(words) >= 2 and _tells(part, words):
        yield from _windows(part)
    for match in _TOKEN.finditer(part):
        token = match.group()
        for piece in dict.fromkeys([token, *WORD.findall(token)]):
            if _is_secret(piece, common, sizes):
                yield from _windows(piece)


def _tells(part: str, words: list[str]) -> bool:
    """Whether a phrase says something: more than numbers, and nothing that the program writes itself."""
    if all(_is_measure(word) or len(word) < 3 for word in words) and not any(map(str.isalpha, words)):
        return False
    if len(words) < 3 and all(word.casefold() in own_words() for word in words):
        return False
    return any(word.isalpha() for word in words) and part.casefold() not in own_text()


def _is_measure(text: str) -> bool:
    folded = text.casefold()
    if _NUMBER.fullmatch(folded):
        return not (folded.isdigit() and len(folded) >= 6)
    if _SIZE.fullmatch(folded) or text in own_versions():
        return True
    return bool(_VERSION.fullmatch(folded)) and not _DATE.fullmatch(folded)


def _is_secret(token: str, common: set[str], sizes: Collection[int]) -> bool:
    folded = token.casefold()
    if _is_measure(token) or token.startswith(_DICOM_ROOT):
        return False
    if folded.isdigit():
        return int(folded) not in sizes
    letters = sum(map(str.isalpha, folded))
    digits = sum(map(str.isdigit, folded))
    if not digits:
        if letters < 4:
            return False
        if all(word in own_words() for word in WORD.findall(folded)):
            common.add(folded)
            return False
        return True
    if not letters and digits < 6:
        return False
    return letters + digits >= 4 and len(folded) >= 5 and folded not in own_words()


def _windows(text: str) -> Iterator[str]:
    """A long text is searched for by its beginning, middle and end: a part of it is a leak too."""
    middle = len(text) // 2
    starts = (0, middle, len(text) - _WINDOW) if len(text) > _LONGEST else (0,)
    length = _WINDOW if len(text) > _LONGEST else len(text)
    for window in (text[start : start + length].strip() for start in starts):
        if window.isalnum() or window.casefold() not in own_text():
            yield window
