"""Identifies the format or encoding of a file that is not UTF-8 text, and says how to convert it."""

import codecs

MARKUP_MAGIC = b"%PDF-", b"{\\rtf"  # files of these formats may be valid UTF-8
FORMAT_MAGIC = {  # first bytes of a file: what it is
    b"%PDF-": "a PDF file: convert it to text, for example with pdftotext",
    b"{\\rtf": "a rich text file (RTF): save it as plain text in UTF-8",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Microsoft Office file (.doc, .xls): save it as plain text in UTF-8",
    b"\x1f\x8b": "compressed (gzip): decompress it, for example with gunzip",
    b"BZh": "compressed (bzip2): decompress it, for example with bunzip2",
    b"\xfd7zXZ\0": "compressed (xz): decompress it, for example with unxz",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): decompress it, for example with unzstd",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"Rar!\x1a\x07": "a RAR archive: unpack it",
    b"\x89PNG\r\n\x1a\n": "an image (PNG), not text",
    b"\xff\xd8\xff": "an image (JPEG), not text",
    b"GIF8": "an image (GIF), not text",
    b"PK\x03\x04": "a zip archive: unpack it",
}
ZIP_DOCUMENTS = {  # file name near the start of a zip archive: the document that it is
    b"word/": "a Word document (.docx): save it as plain text in UTF-8",
    b"xl/": "an Excel workbook (.xlsx): save the cells you need as plain text in UTF-8",
    b"ppt/": "a PowerPoint file (.pptx): save it as plain text in UTF-8",
    b"opendocument.": "an OpenDocument file: save it as plain text in UTF-8",
    b"epub+zip": "an e-book (EPUB): convert it to text, for example with pandoc -t plain",
}
ENCODINGS = {  # Python's name: iconv's name; of equally good matches, the more common encoding comes first
    "utf_16": "UTF-16",
    "utf_16_le": "UTF-16LE",
    "utf_16_be": "UTF-16BE",
    "utf_32": "UTF-32",
    "cp1252": "WINDOWS-1252",
    "cp1250": "WINDOWS-1250",
    "cp1251": "WINDOWS-1251",
    "koi8_r": "KOI8-R",
    "cp866": "CP866",
    "cp1253": "WINDOWS-1253",
    "cp1254": "WINDOWS-1254",
    "cp1255": "WINDOWS-1255",
    "cp1256": "WINDOWS-1256",
    "cp1257": "WINDOWS-1257",
    "iso8859_2": "ISO-8859-2",
    "gb18030": "GB18030",
    "cp932": "CP932",
    "euc_jp": "EUC-JP",
    "big5": "BIG5",
    "cp949": "CP949",
    "cp850": "CP850",
    "mac_roman": "MACINTOSH",
}


def identify_format(head: bytes) -> str:
    """Returns what a file with these first bytes is and how to convert it; empty if unknown."""
    description = next((what for magic, what in FORMAT_MAGIC.items() if head.startswith(magic)), "")
    if head.startswith(b"PK"):
        return next((what for name, what in ZIP_DOCUMENTS.items() if name in head[:8192]), description)
    return description


def candidate_encodings(data: bytes) -> list[str]:
    """Returns the encodings in which the bytes are plausible text of some language, in the order of ENCODINGS."""
    from charset_normalizer import from_bytes  # imported here because UTF-8 text does not need it

    # in UTF-16 and UTF-32 each newline has a zero byte
    is_wide = b"\0" in data or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    candidates = [name for name in ENCODINGS if is_wide == name.startswith("utf")]
    data = data[: len(data) // 2 * 2] if is_wide else data
    found = [
        (name, match.chaos, match.coherence)
        for match in from_bytes(data, cp_isolation=candidates, enable_fallback=False)
        for name in match.could_be_from_charset
        if name in candidates and (not is_wide or min(str(match)) < "\x80")
    ]
    found = [match for match in found if match[1] <= min(chaos for _, chaos, _ in found) + 0.07]
    found = [match for match in found if match[2] >= max(coherence for *_, coherence in found) - 0.1]
    return sorted((name for name, *_ in found), key=candidates.index)


def describe_non_text(name: str, reason: str, head: bytes, data: bytes, index: int) -> str:
    """Returns the error message for a file that is not UTF-8 text.

    Args:
        name: the file's name in the message.
        reason: which byte is invalid.
        head: the first bytes of the file.
        data: the bytes around the first invalid one, which is at `index`.
    """
    if known := identify_format(head):
        return f"{name} is {known}"
    repaired = data.decode(errors="replace")
    if sum(c > "\x7f" for c in repaired) > 4 * repaired.count("\ufffd"):
        remedy = "iconv -c -f UTF-8 -t UTF-8" if data[index] else "tr -d '\\000'"
        return f"{name} is damaged UTF-8 text: {reason}; repair it, or remove such bytes with {remedy}"
    start = data.rfind(b"\n", 0, index - 2**15) + 1 if index > 2**15 else 0  # full lines cut no character
    end = data.find(b"\n", index + 2**15)
    part = data[start : end if end >= 0 else len(data)]
    index, readings = index - start, dict[str, str]()  # readings: text shown -> encoding
    for encoding in candidate_encodings(part):
        pos = len(part[:index].decode(encoding, "ignore"))
        text = part.decode(encoding, "replace").replace("\ufeff", "")
        readings.setdefault(" ".join(text[max(0, pos - 15) : pos + 15].split()), ENCODINGS[encoding])
    if not readings:
        return f"{name} is not UTF-8 text: {reason}; it is a binary file or has a rare encoding"
    shown = list(readings.items())[:3]
    best = shown[0][1]
    return (
        f"{name} is not UTF-8 text: {reason}; it reads {', '.join(f'{text!r} as {name}' for text, name in shown)}: "
        f"convert it{' from the right one' * (len(shown) > 1)}, for example with iconv -f {best} -t UTF-8"
    )
