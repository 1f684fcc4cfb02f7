"""What a file is that is no UTF-8 text: its format, or its encoding, and how to make text of it."""

import codecs

MARKUP_MAGIC = b"%PDF-", b"{\\rtf"  # these formats may be UTF-8 all the same
FORMAT_MAGIC = {  # by their first bytes
    b"%PDF-": "a PDF file: make text of it, such as with pdftotext",
    b"{\\rtf": "a rich text file (RTF): save it as plain text, in UTF-8",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a file of an older Office (.doc, .xls): save it as plain text, in UTF-8",
    b"\x1f\x8b": "compressed (gzip): unpack it, such as with gunzip",
    b"BZh": "compressed (bzip2): unpack it, such as with bunzip2",
    b"\xfd7zXZ\0": "compressed (xz): unpack it, such as with unxz",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): unpack it, such as with unzstd",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"Rar!\x1a\x07": "a RAR archive: unpack it",
    b"\x89PNG\r\n\x1a\n": "a picture (PNG), and no text",
    b"\xff\xd8\xff": "a picture (JPEG), and no text",
    b"GIF8": "a picture (GIF), and no text",
    b"PK\x03\x04": "a zip archive: unpack it",
}
ZIP_DOCUMENTS = {  # archives that are documents have such names at their beginning
    b"word/": "a Word document (.docx): save it as plain text, in UTF-8",
    b"xl/": "an Excel workbook (.xlsx): save what you want of it as plain text, in UTF-8",
    b"ppt/": "a PowerPoint file (.pptx): save it as plain text, in UTF-8",
    b"opendocument.": "an OpenDocument file: save it as plain text, in UTF-8",
    b"epub+zip": "an e-book (EPUB): make text of it, such as with pandoc -t plain",
}
ENCODINGS = {  # Python's names and iconv's; where two fit as well, the one that is more common comes first
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
    """What a file with these first bytes is, and what to do with it; empty if nobody knows."""
    found = next((what for magic, what in FORMAT_MAGIC.items() if head.startswith(magic)), "")
    if head.startswith(b"PK"):
        return next((what for name, what in ZIP_DOCUMENTS.items() if name in head[:8192]), found)
    return found


def candidate_encodings(data: bytes) -> list[str]:
    """The encodings of ENCODINGS in which some bytes read as text of a language, the likeliest one first."""
    from charset_normalizer import from_bytes  # here, as a file that is text does not need it

    wide = b"\0" in data or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # a zero for each new line
    asked = [name for name in ENCODINGS if wide == name.startswith("utf")]
    found = [
        (name, match.chaos, match.coherence)
        for match in from_bytes(data[: len(data) // 2 * 2] if wide else data, cp_isolation=asked, enable_fallback=False)
        for name in match.could_be_from_charset
        if name in asked and (not wide or min(str(match)) < "\x80")
    ]
    found = [one for one in found if one[1] <= min(chaos for _, chaos, _ in found) + 0.07]
    found = [one for one in found if one[2] >= max(coherence for *_, coherence in found) - 0.1]
    return sorted((name for name, *_ in found), key=asked.index)


def describe_non_text(name: str, what: str, head: bytes, data: bytes, at: int) -> str:
    """The sentence about a file that is no UTF-8 text.

    Args:
        name: what to call the file.
        what: what of it is wrong.
        head: its beginning.
        data: its bytes around the place, of which the one `at` is the first that does not fit.
    """
    if known := identify_format(head):
        return f"{name} is {known}"
    mended = data.decode(errors="replace")
    if sum(c > "\x7f" for c in mended) > 4 * mended.count("\ufffd"):
        remedy = "iconv -c -f UTF-8 -t UTF-8" if data[at] else "tr -d '\\000'"
        return f"{name} is UTF-8 text that is damaged: {what}; mend it, or leave such bytes out with {remedy}"
    start = data.rfind(b"\n", 0, at - 2**15) + 1 if at > 2**15 else 0  # no character is cut at the end of a line
    end = data.find(b"\n", at + 2**15)
    part = data[start : end if end >= 0 else len(data)]
    here, readings = at - start, dict[str, str]()
    for encoding in candidate_encodings(part):
        place = len(part[:here].decode(encoding, "ignore"))
        text = part.decode(encoding, "replace").replace("\ufeff", "")
        readings.setdefault(" ".join(text[max(0, place - 15) : place + 15].split()), ENCODINGS[encoding])
    if not readings:
        return f"{name} is not UTF-8 text: {what}; it is a binary file, or in an encoding that is rare"
    shown = list(readings.items())[:3]
    best = shown[0][1]
    return (
        f"{name} is not UTF-8 text: {what}; there it reads {', '.join(f'{text!r} as {name}' for text, name in shown)}: "
        f"convert it{' from what is right' * (len(shown) > 1)}, such as with iconv -f {best} -t UTF-8"
    )
