"""The encoding of a text file: named in the settings, or detected from the first lines."""

import codecs
from itertools import chain
from pathlib import Path

from stages.data.compressed import open_bytes

# Encodings that detection chooses from: among all encodings, a rare one often fits a short text best.
_LIKELY = ("big5", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp1252")
_SAMPLE = 256 * 1024  # bytes that encoding detection reads


def detected(path: Path) -> str:
    """The encoding of the file's first lines; UTF-8 when no encoding fits, so that reading reports the bad byte."""
    with open_bytes(path) as file:
        sample = file.read(_SAMPLE)
    if len(sample) == _SAMPLE:
        sample = sample[: sample.rfind(b"\n") + 1] or sample
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if _mostly_utf8(sample):
        return "utf-8"
    if _chinese(sample):
        return "gb18030"
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=list(_LIKELY)).best()
    return best.encoding if best else "utf-8"


def _mostly_utf8(sample: bytes) -> bool:
    """Whether a sample is UTF-8; a few broken bytes are errors in the file, not a sign of another encoding."""
    text = sample.decode("utf-8", "replace")
    return text.count("\ufffd") * 10 <= len(text) - len(text.encode("ascii", "ignore"))


def _chinese(sample: bytes) -> bool:
    """Whether a sample decodes as GB18030, mostly to common characters: text in another encoding does not.

    EUC-KR text is the exception, but nearly all of its characters are Hangul when it is decoded as EUC-KR.
    """
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(sample)
    except UnicodeDecodeError:
        return False
    han = "".join(char for char in text if "一" <= char <= "鿿")
    common = len(han.encode("gb2312", "ignore")) // 2
    hangul = sum("가" <= char <= "힣" for char in sample.decode("euc_kr", "ignore"))
    return common > 0.65 * sum(char > "\x7f" for char in text) and hangul < 0.9 * len(han)


def undecodable(path: Path, encoding: str) -> str:
    """The message that names the first byte of the file that the encoding cannot decode, and its line."""
    decoder, offset = codecs.getincrementaldecoder(encoding)(), 0
    with open_bytes(path) as file:
        for number, line in enumerate(chain(file, [b""]), 1):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(line, final=not line)
            except UnicodeError as error:
                byte = offset - held + getattr(error, "start", 0)  # UTF-16 without a byte order mark has no `start`
                where = f"{path}:{number if line else number - 1}: byte {byte}"
                return f"{where} of the file is not {encoding}; fix it, or name the encoding with `encoding:`"
            offset += len(line)
    return f"`{path}` is not {encoding}; name its encoding with `encoding:`"
