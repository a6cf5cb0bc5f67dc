"""A text in, the same text cleaned out, or what of it is repeated, in a language, or personal: the steps on one text.

Apart from `_clean`, which every command imports: these patterns take as long to compile as all the rest of it.
"""

import html
import re
from collections import Counter

_FENCED = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r"(^ *```.*?^ *```[^\n]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)

# Invisible are controls, soft hyphen, zero-width space, marks of direction, word joiner and byte order mark. U+200C and
# U+200D stay: emoji and some scripts need them.
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
    """Indentation stays, but the two full-width blanks that start a Chinese paragraph."""
    words = line.lstrip(" \t\u3000")
    indent = line[: len(line) - len(words)].replace("\u3000", "")
    return indent + re.sub("[ \t\u3000]+", " ", words).rstrip(" ") if words else ""


# https://html.spec.whatwg.org/multipage/indices.html#elements-3, and old ones that pages still have, but not `data`,
# `label`, `time` and such, which are as likely names in XML.
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
# With the semicolon, so that `?a=1&copy=2` stays; pages forget it after `&nbsp` alone. Twice escaped: `&amp;nbsp;`.
_ENTITY = re.compile(r"&(?:amp;)*(?:(#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});|nbsp)")


def _html(text: str) -> str:
    """Until nothing changes, because pages are escaped once too often. A tag that ends a block becomes a line end."""
    while True:
        pieces = _QUOTED.split(text) if "<" in text or "&" in text else [text]
        for number in range(0, len(pieces), 2):
            piece = pieces[number]
            if "<" in piece:
                piece = _without(piece, _COMMENT, _COMMENT_END)
                piece = _without(piece, _SCRIPT, _SCRIPT_END)
                piece = _TAG.sub(_instead, _DOCTYPE.sub("", piece))
            if "&" in piece:
                piece = _ENTITY.sub(lambda found: html.unescape(f"&{found[1] or 'nbsp'};"), piece)
            pieces[number] = piece
        new = "".join(pieces)
        if new == text:
            return text
        text = new


def _instead(tag: re.Match[str]) -> str:
    return "\n" if tag[1] else " " if tag[2] else ""


def _without(text: str, start: re.Pattern[str], end: re.Pattern[str]) -> str:
    """Leave out what stands between `start` and the next `end`, both too; one without the other stays."""
    kept, at = [], 0
    for close in end.finditer(text):
        begin = start.search(text, at, close.start())
        kept.append(text[at : begin.start() if begin else close.end()])
        at = close.end()
    return "".join(kept) + text[at:]


# Signs of GB/T 15834, China's standard of punctuation, stay full-width, as ，。：；？！（）［］～／－ do; between ASCII
# letters and digits full stop, slash and dash do not, as in `７．４` and `ｍｇ／ｄＬ`. NFKC would write `10⁹` as `109`.
_ALWAYS = str.maketrans({code: code - 0xFEE0 for code in map(ord, "％＋＝＜＞＊＃＠＆＄＾｜＼｀")})
_ALWAYS |= {
    code: code - 0xFEE0 for first, last in ("０９", "ＡＺ", "ａｚ") for code in range(ord(first), ord(last) + 1)
}
_FULL = re.compile("[％＋＝＜＞＊＃＠＆＄＾｜＼｀０-９Ａ-Ｚａ-ｚ．／－]")
_BETWEEN = re.compile("(?<=[0-9A-Za-z])[．／－](?=[0-9A-Za-z])")


def _width(text: str) -> str:
    """Character by character: the result is as long as the text."""
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
    """Is at least this share of the text in the language, by its script?"""
    counts = [len(script.findall(text)) for script in _SCRIPTS]
    han, kana, _, latin, _ = counts
    least = share * sum(counts)
    return latin >= least if language == "en" else han >= least and 10 * kana <= han


def repeated(text: str) -> float:
    """The share of its characters, blanks at the ends of lines aside, in lines that it had before."""
    seen: set[str] = set()
    again = whole = 0
    for line in map(str.strip, text.split("\n")):
        whole += len(line)
        if line in seen:
            again += len(line)
        elif len(_LETTER.findall(line)) >= 5:
            seen.add(line)
    return again / max(whole, 1)


# An address may hold a mobile number, and an identity card number is all digits: hence the order.
_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}")
# GB 11643-1999: place, date of birth, number, check character.
_ID_CARD = re.compile(
    r"(?<![\d.])[1-9][0-9]{5}(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx](?![0-9A-Za-z])"
)
_MOBILE = re.compile(r"(?<![\d.])(?:(?:\+|00)?86[- ]?)?1[3-9][0-9](?:[- ]?[0-9]{4}){2}(?!\d|\.\d)")


def masked(text: str, found: Counter[str]) -> str:
    """The text with its personal data masked and counted in `found`. Full-width digits are found too."""
    for kind, pattern, mask in (
        ("email", _EMAIL, "[邮箱]"),
        ("id_card", _ID_CARD, "[身份证号]"),
        ("mobile", _MOBILE, "[手机号]"),
    ):
        kept, at = [], 0
        for match in pattern.finditer(_width(text)):
            if kind == "id_card" and not _checks(match[0]):
                continue
            found[kind] += 1
            kept += [text[at : match.start()], mask]
            at = match.end()
        text = "".join(kept) + text[at:]
    return text


def _checks(number: str) -> bool:
    """ISO 7064, MOD 11-2: the digits times 2**17 … 2**0, X as 10, leave 1."""
    digits = [10 if digit in "Xx" else int(digit) for digit in number]
    return sum(digit << (17 - place) for place, digit in enumerate(digits)) % 11 == 1
