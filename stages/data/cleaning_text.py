"""The cleaning steps on one text: edits, the share of repeated lines, the language, and personal data.

A module apart from `cleaning`, which every command imports: these patterns take as long to compile as all of `cleaning`
takes to import.
"""

import html
import re
from collections import Counter

_FENCED = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r"(^ *```.*?^ *```[^\n]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)

# Invisible characters: controls, soft hyphen, zero-width space, marks of direction, word joiner, byte order mark.
# U+200C and U+200D stay: emoji and some scripts need them.
_LINE_END = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
)
_BLANK = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f]")


def _whitespace(text: str) -> str:
    text = _BLANK.sub(" ", _INVISIBLE.sub("", _LINE_END.sub("\n", text)))
    pieces = _FENCED.split(text)
    for number in range(0, len(pieces), 2):
        lines = [_one_blank(line) for line in pieces[number].split("\n")]
        pieces[number] = re.sub("\n{3,}", "\n\n", "\n".join(lines))
    return "".join(pieces).strip()


def _one_blank(line: str) -> str:
    """The line with single blanks. Its indentation stays, except full-width blanks, which start Chinese paragraphs."""
    words = line.lstrip(" \t\u3000")
    indent = line[: len(line) - len(words)].replace("\u3000", "")
    return indent + re.sub("[ \t\u3000]+", " ", words).rstrip(" ") if words else ""


# Elements of https://html.spec.whatwg.org/multipage/indices.html#elements-3, and old elements that pages still have,
# without `data`, `label`, `time` and the like, which may as well be names in XML.
_BLOCK = (
    "address|article|aside|blockquote|body|br|caption|center|col|colgroup|dd|details|div|dl|dt|fieldset|figcaption|"
    "figure|footer|form|h[1-6]|head|header|hr|html|legend|li|main|nav|ol|optgroup|option|p|pre|section|table|tbody|tfoot|"
    "thead|title|tr|ul"
)
_INLINE = (
    "a|abbr|acronym|audio|b|bdi|bdo|big|button|canvas|cite|code|del|dfn|em|embed|font|i|iframe|img|input|ins|kbd|mark|"
    "meta|noscript|q|rp|rt|ruby|s|samp|script|select|small|span|strike|strong|style|sub|sup|svg|textarea|tt|u|video|wbr"
)
_TAG = re.compile(rf"</?(?:({_BLOCK})|(td|th)|{_INLINE})(?:\s[^<>=]*=[^<>]*|\s*/?)>", re.IGNORECASE)
_COMMENT, _COMMENT_END = re.compile("<!--"), re.compile("-->")
_DOCTYPE = re.compile(r"<!doctype\b[^<>]*>", re.IGNORECASE)
_SCRIPT = re.compile(r"<(?:script|style)(?:\s[^<>]*)?>", re.IGNORECASE)
_SCRIPT_END = re.compile(r"</(?:script|style)\s*>", re.IGNORECASE)
# Entities need their semicolon, so that `?a=1&copy=2` stays; pages omit it only after `&nbsp`. `&amp;nbsp;` is an
# entity that was escaped twice.
_ENTITY = re.compile(r"&(?:amp;)*(?:(#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});|nbsp)")


def _html(text: str) -> str:
    """The text without HTML, cleaned until nothing changes: pages may be escaped twice. Block tags become line ends."""
    while True:
        pieces = _QUOTED.split(text) if "<" in text or "&" in text else [text]
        for number in range(0, len(pieces), 2):
            piece = pieces[number]
            if "<" in piece:
                piece = _without(piece, _COMMENT, _COMMENT_END)
                piece = _without(piece, _SCRIPT, _SCRIPT_END)
                piece = _TAG.sub(_replacement, _DOCTYPE.sub("", piece))
            if "&" in piece:
                piece = _ENTITY.sub(lambda entity: html.unescape(f"&{entity[1] or 'nbsp'};"), piece)
            pieces[number] = piece
        new = "".join(pieces)
        if new == text:
            return text
        text = new


def _replacement(tag: re.Match[str]) -> str:
    """A line end for a block's tag, a blank for a table cell's, nothing for any other."""
    return "\n" if tag[1] else " " if tag[2] else ""


def _without(text: str, start: re.Pattern[str], end: re.Pattern[str]) -> str:
    """The text without each `start`, the next `end` and what is between them. One without the other stays."""
    kept, at = [], 0
    for close in end.finditer(text):
        begin = start.search(text, at, close.start())
        kept.append(text[at : begin.start() if begin else close.end()])
        at = close.end()
    return "".join(kept) + text[at:]


# Signs of GB/T 15834, China's standard of punctuation, stay full-width: ，。：；？！（）［］～／－. Between ASCII
# letters and digits full stop, slash and dash become ASCII, as in `７．４` and `ｍｇ／ｄＬ`. NFKC would turn `10⁹` into
# `109`.
_ALWAYS = str.maketrans({code: code - 0xFEE0 for code in map(ord, "％＋＝＜＞＊＃＠＆＄＾｜＼｀")})
_ALWAYS |= {
    code: code - 0xFEE0 for first, last in ("０９", "ＡＺ", "ａｚ") for code in range(ord(first), ord(last) + 1)
}
_FULL = re.compile("[％＋＝＜＞＊＃＠＆＄＾｜＼｀０-９Ａ-Ｚａ-ｚ．／－]")
_BETWEEN = re.compile("(?<=[0-9A-Za-z])[．／－](?=[0-9A-Za-z])")


def _width(text: str) -> str:
    """The text with full-width letters, digits and some signs as ASCII. It keeps its length."""
    if not _FULL.search(text):
        return text
    return _BETWEEN.sub(lambda sign: chr(ord(sign[0]) - 0xFEE0), text.translate(_ALWAYS))


EDITS = {"whitespace": _whitespace, "html": _html, "width": _width}

_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\uff66-\uff9f"
_HANGUL = "\uac00-\ud7a3"
_LATIN = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
_OTHER = rf"[^\W\d_{_HAN}{_KANA}{_HANGUL}{_LATIN}]+"
_SCRIPTS = [re.compile(unit) for unit in (f"[{_HAN}]", f"[{_KANA}]", f"[{_HANGUL}]", f"[{_LATIN}]+", _OTHER)]
_LETTER = re.compile(r"[^\W_]")


def is_in(text: str, language: str, share: float) -> bool:
    """Whether at least this share of the text is in the language, by script."""
    counts = [len(script.findall(text)) for script in _SCRIPTS]
    han, kana, _, latin, _ = counts
    least = share * sum(counts)
    return latin >= least if language == "en" else han >= least and 10 * kana <= han


def repeated_share(text: str) -> float:
    """The share of a text's characters in lines that repeat an earlier line; blanks around lines do not count."""
    earlier: set[str] = set()
    repeated = whole = 0
    for line in map(str.strip, text.split("\n")):
        whole += len(line)
        if line in earlier:
            repeated += len(line)
        elif len(_LETTER.findall(line)) >= 5:
            earlier.add(line)
    return repeated / max(whole, 1)


# In the order of masking: an e-mail address may hold a mobile number, and so may an identity card number.
_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}")
# GB 11643-1999: place, date of birth, number, check character.
_ID_CARD = re.compile(
    r"(?<![\d.])[1-9][0-9]{5}(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx](?![0-9A-Za-z])"
)
_MOBILE = re.compile(r"(?<![\d.])(?:(?:\+|00)?86[- ]?)?1[3-9][0-9](?:[- ]?[0-9]{4}){2}(?!\d|\.\d)")


class Masker:
    """Masks personal data, and counts what it masked."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """How many of `email`, `id_card` and `mobile` were masked."""

    def __call__(self, text: str) -> str:
        """The text with its personal data masked, in full-width digits too."""
        for name, pattern, mask in (
            ("email", _EMAIL, "[邮箱]"),
            ("id_card", _ID_CARD, "[身份证号]"),
            ("mobile", _MOBILE, "[手机号]"),
        ):
            kept, at = [], 0
            for match in pattern.finditer(_width(text)):
                if name == "id_card" and not _has_check_character(match[0]):
                    continue
                self.counts[name] += 1
                kept += [text[at : match.start()], mask]
                at = match.end()
            text = "".join(kept) + text[at:]
        return text


def _has_check_character(number: str) -> bool:
    """Whether the number is valid by ISO 7064, MOD 11-2: the sum of digits times 2**17 … 2**0, X as 10, is 1 mod 11."""
    digits = [10 if digit in "Xx" else int(digit) for digit in number]
    return sum(digit << (17 - place) for place, digit in enumerate(digits)) % 11 == 1
