"""What the demo model gives for a summary: an extract, and it says so.

Its one invariant: it makes nothing up: every line is the beginning of a message, but for the last, which is a name
that the user gave.
"""

import re
from typing import Final

from services.relay.transcript import read
from services.relay.upstream.demo_names import is_chinese, latest_name

_LINE_CHARACTERS: Final = 120
_FEW_CHARACTERS: Final = 12
_ALL_CHARACTERS: Final = 700
_HEADING: Final = "Extract by the demo model, which cannot summarise:"
_HEADING_IN_CHINESE: Final = "演示模型的摘录（它不会作摘要）："
_NAMED: Final = "The user has said: my name is "
_NAMED_IN_CHINESE: Final = "用户说过：我叫"
_OWN_LINES: Final = (_HEADING, _HEADING_IN_CHINESE, _NAMED, _NAMED_IN_CHINESE)
_SPEAKERS_IN_CHINESE: Final = {"User": "用户", "Assistant": "助手", "Tool": "工具"}
_SENTENCE_ENDS: Final = re.compile(r"[.!?](?=\s)|[。！？]|\n")


def extract(asked: str) -> str:
    """The first sentences of each message, the newest ones that there is room for, in the language of the user."""
    before, entries = read(asked)
    own_words = [text for label, text in entries if label == "User"]
    chinese = is_chinese(" ".join(own_words) or before)
    name = latest_name(own_words) or latest_name([before], outright_only=True)
    lines = [line for line in before.splitlines() if line.strip() and not line.startswith(_OWN_LINES)]
    for label, text in entries:
        # Said by anyone else, it is nobody's name here.
        if label == "User" or latest_name([text], outright_only=True) is None:
            lines.append(_line(label, text, chinese=chinese))
    while len(lines) > 1 and sum(map(len, lines)) > _ALL_CHARACTERS:
        del lines[0]
    if name is not None:
        spaced = name if is_chinese(name) else f" {name}"
        lines.append(f"{_NAMED_IN_CHINESE}{spaced}。" if chinese else f"{_NAMED}{name}.")
    return "\n".join([_HEADING_IN_CHINESE if chinese else _HEADING, *lines])


def _line(label: str, text: str, *, chinese: bool) -> str:
    said = _beginning(text)
    return f"{_SPEAKERS_IN_CHINESE.get(label, label)}：{said}" if chinese else f"{label}: {said}"


def _beginning(text: str) -> str:
    """Whole sentences, until they say more than a greeting."""
    text = text.strip()
    end = next((found.end() for found in _SENTENCE_ENDS.finditer(text) if found.end() > _FEW_CHARACTERS), len(text))
    sentence = " ".join(text[:end].split())
    return sentence if len(sentence) <= _LINE_CHARACTERS else sentence[:_LINE_CHARACTERS] + "…"
