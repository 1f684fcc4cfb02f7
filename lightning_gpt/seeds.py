"""Seeds made of several numbers."""

import hashlib


def mix(*parts: int) -> int:
    """One 64-bit seed from several numbers; a hash and no sum, for (1, 2) and (2, 1) must differ."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())
