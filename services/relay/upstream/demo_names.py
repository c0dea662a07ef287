"""How the demo model hears a name, and hears that it is asked for one.

Its one invariant: it would rather miss a name than take a word for one that is none.

- `我叫…`, `我的名字是…`, `my name is …` say a name outright: any run of letters that is no question
  word; digits may follow, as in User17 or 用户17.
- `我是…` says one only if it looks like one: a Latin word in capitals and small letters, `小…` or `阿…`,
  or two to four characters that begin with a common family name and do not end like a trade or a place.
- `I am …`, `I'm …` say one only if a capitalised word follows that is no nationality and no weekday, and
  nothing but punctuation, a conjunction or the end comes after it: "I am Alice", not "I am fine".
"""

import re
from collections.abc import Iterable, Iterator

_HEARD_CHARACTERS = 5_000

_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = r"[^\W\d_" + _HAN + r"][^\W" + _HAN + r"]*(?:['’.-][^\W" + _HAN + r"]+)*"
_LATIN = rf"{_WORD}(?: {_WORD}){{0,2}}"
_OPENING = r"[\s:：「『“\"'‘《]*"

# A Chinese name ends where its run of characters ends, or where one of these goes on with the sentence.
_GOES_ON = "的|了|吗|呢|吧|啊|呀|哦|是|很|今年|来自|住在|在|和|也|请|想|现在|目前|喜欢|这|那|，|。"
_SAID_OUTRIGHT = re.compile(rf"(?:我叫|本人叫|我(?:的)?名字(?:就)?(?:是|叫)){_OPENING}(?:做|作)?{_OPENING}")
_SAID_BY_BEING = re.compile(rf"(?<![要就也不都])我(?:就)?是{_OPENING}")
_NUMBERED = r"(?:[0-9A-Za-z_-]*[0-9A-Za-z](?![0-9A-Za-z_-]))?"
_HAN_NAME = re.compile(rf"(?P<name>[{_HAN}]{{1,4}}?(?:·[{_HAN}]{{1,8}}?)*{_NUMBERED})(?=$|[^{_HAN}·]|{_GOES_ON})")
_HAN_RUN = re.compile(rf"[{_HAN}]+")
_LATIN_NAME = re.compile(_LATIN)
_QUESTION_WORDS = ("什么", "甚么", "啥", "谁", "誰", "什麼", "何人", "何名", "何许", "哪", "怎")
_NOT_AFTER_CALL = ("了", "过", "你", "他", "她", "它", "您", "人", "车", "外卖", "大家", "别", "不", "个", "一")

_FAMILY_NAMES = frozenset(
    "赵钱孙李周吴郑王冯陈卫蒋沈韩杨朱秦尤许何吕张孔曹严华金魏陶姜谢邹章苏潘葛范彭鲁韦马苗凤方俞任袁柳"
    "鲍史唐费薛雷贺倪汤罗毕郝邬常乐傅皮齐康伍余顾孟黄穆萧尹姚邵汪毛狄戴宋庞熊纪舒项祝董梁杜阮蓝席季贾路"
    "江童颜郭梅林钟徐邱骆高夏蔡田樊胡凌霍万柯管卢莫丁邓龚洪包左石崔吉程陆翁段侯宁甘武刘龙叶黎白欧文曾"
    "沙关游辛简饶苟涂肖叢聂冉覃敖赖屠温阎易廖岳曲温庄晏柴瞿连向古桂牛闫"
    "趙錢孫吳鄭馮陳衛蔣韓楊許呂張嚴華謝鄒蘇魯馬鳳魯賀倪湯羅畢樂顧黃蕭龐紀項賈顏鐘駱萬盧鄧龔陸寧劉龍葉關聶賴閻莊連"
)
_DOUBLE_FAMILY_NAMES = ("欧阳", "司马", "诸葛", "上官", "司徒", "东方", "尉迟", "公孙", "慕容", "令狐", "皇甫", "端木")
_ENDS_LIKE_NO_NAME = tuple("人员師师者家户手客长長们們的吗呢吧了啊级国校司室部店厅")
_TRADES = (
    "学生",
    "先生",
    "医生",
    "女生",
    "男生",
    "考生",
    "新生",
    "老板",
    "白领",
    "马上",
    "高中生",
    "经理",
    "教授",
    "会计",
)

_SAID_IN_ENGLISH = re.compile(r"\bmy\s+name(?:\s+is|['’]?s)\s+(?:called\s+)?[\"'“‘]?", re.IGNORECASE)
_BEING_IN_ENGLISH = re.compile(r"\bI(?:\s+am|\s*['’]m)\s+[\"“]?", re.IGNORECASE)
_AFTER_BEING = re.compile(r"[\"”]?\s*(?:$|[^\w\s]|(?:and|but|from|or|by|the)\b|[\n])")
_NO_NAMES = frozenset(
    """
    i he she it you we they your my a an the this that not what who where when why how so just
    no unknown none nothing secret important dr mr mrs ms sir madam ok okay sorry sure here back done going trying
    looking american british english chinese german french spanish italian japanese korean indian russian canadian
    australian dutch swedish irish mexican brazilian european asian african christian muslim jewish catholic buddhist
    monday tuesday wednesday thursday friday saturday sunday
    """.split()  # noqa: SIM905 - a list of words reads best as words
)

_ASKED = (
    re.compile(r"我(?:到底|究竟)?(?:叫|是)(?:做|作|个)?(?:什么|甚么|什麼|啥|谁|誰|哪位|何)"),
    re.compile(r"我(?:的)?名字(?:到底)?(?:是|叫)?(?:什么|甚么|什麼|啥|谁)"),
    re.compile(r"(?:知道|记得|記得|说出|告诉我)我(?:的)?(?:名字|叫|是)"),
    re.compile(r"\bwhat(?:\s+is|['’]?s|\s+was)\s+my\s+name\b", re.IGNORECASE),
    re.compile(r"\bwho\s+am\s+i\b", re.IGNORECASE),
    re.compile(r"\b(?:know|remember|recall|say|tell\s+me)\s+(?:what\s+)?my\s+name\b", re.IGNORECASE),
)


def is_chinese(text: str) -> bool:
    """Whether the text holds a Chinese character."""
    return _HAN_RUN.search(text) is not None


def asks_for_name(text: str) -> bool:
    """Whether somebody wants to hear their own name."""
    return any(pattern.search(_ends(text)) for pattern in _ASKED)


def latest_name(texts: Iterable[str], *, outright_only: bool = False) -> str | None:
    """The name given last in these texts, oldest first; `outright_only` leaves out 我是… and I am …."""
    name = None
    for text in map(_ends, texts):
        found = sorted([*_outright(text), *([] if outright_only else _by_being(text))])
        if found:
            name = found[-1][1]
    return name


def _ends(text: str) -> str:
    """Of a very long text its beginning and its end: who pastes a book does not introduce himself within."""
    return text if len(text) <= 2 * _HEARD_CHARACTERS else text[:_HEARD_CHARACTERS] + "\n" + text[-_HEARD_CHARACTERS:]


def _outright(text: str) -> Iterator[tuple[int, str]]:
    for start in _SAID_OUTRIGHT.finditer(text):
        rest = text[start.end() :]
        if not rest.startswith(_QUESTION_WORDS + _NOT_AFTER_CALL) and (name := _leading_name(rest)):
            yield start.end(), name
    for start in _SAID_IN_ENGLISH.finditer(text):
        rest = text[start.end() :]
        if (name := _leading_name(rest)) and not name.startswith(_QUESTION_WORDS):
            yield start.end(), name


def _by_being(text: str) -> Iterator[tuple[int, str]]:
    for start in _SAID_BY_BEING.finditer(text):
        if name := _plausible_han_name(text[start.end() :]) or _plausible_latin_name(text[start.end() :]):
            yield start.end(), name
    for start in _BEING_IN_ENGLISH.finditer(text):
        if name := _plausible_latin_name(text[start.end() :]) or _plausible_han_name(text[start.end() :]):
            yield start.end(), name


def _leading_name(rest: str) -> str | None:
    if found := _HAN_NAME.match(rest):
        return found["name"]
    if found := _HAN_RUN.match(rest):  # a longer run that nothing ends: the usual length of a name
        return found[0][: 4 if found[0].startswith(_DOUBLE_FAMILY_NAMES) else 3]
    return _latin_words(rest)


def _latin_words(rest: str) -> str | None:
    """One word, or several as long as all are capitalised."""
    found = _LATIN_NAME.match(rest)
    if found is None:
        return None
    words = found[0].split()
    if words[0].lower() in _NO_NAMES:
        return None
    count = 1
    while words[0][0].isupper() and count < len(words) and words[count][0].isupper() and words[count] != "I":
        count += 1
    return " ".join(words[:count]).rstrip(".'’-")


def _plausible_han_name(rest: str) -> str | None:
    found = _HAN_NAME.match(rest)
    if found is None:
        return None
    name = found["name"]
    goes_on = rest[len(name) : len(name) + 1]
    if name.endswith(_ENDS_LIKE_NO_NAME + _TRADES) or goes_on in {"的", "在", "想", "很"}:
        return None
    if name.startswith(_QUESTION_WORDS) or not 2 <= len(name.partition("·")[0]) <= 4:
        return None
    return name if name[0] in _FAMILY_NAMES | {"小", "阿"} or name.startswith(_DOUBLE_FAMILY_NAMES) else None


def _plausible_latin_name(rest: str) -> str | None:
    name = _latin_words(rest)
    if name is None or not all(word[0].isupper() and not word.isupper() for word in name.split()):
        return None
    if name.endswith(("'s", "’s")) or _HAN_RUN.match(rest[len(name) :].lstrip()):
        return None
    return name if _AFTER_BEING.match(rest[len(name) :]) else None
