"""The Merkle tree of RFC 6962 (section 2.1): one hash that stands for a list of byte strings in their order."""

import hashlib
from collections.abc import Sequence

EMPTY = hashlib.sha256().digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """MTH(D[n]): SHA-256 of nothing for no leaves; H(0x00 || d) for one; H(0x01 || MTH(left) || MTH(right)) with the largest
    power of two below n on the left.
    """
    level = [hashlib.sha256(b"\x00" + leaf).digest() for leaf in leaves]
    if not level:
        return EMPTY
    # Pairing neighbours and carrying an odd last one up gives the tree that the recursive definition describes.
    while len(level) > 1:
        pairs = [hashlib.sha256(b"\x01" + left + right).digest() for left, right in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]
