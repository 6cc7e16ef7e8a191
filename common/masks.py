"""Masks that cancel: 256-bit seeds agreed by pairs, streams of words from seeds, and vectors packed to their width.

A vector here holds integers modulo 2^bits, as uint32 words. Arithmetic wraps at 2^32, of which 2^bits is a divisor,
so that the upper bits are cut off once, when a vector is packed.

Proof sketch.

1. A pair's seed is HKDF-SHA256 of an X25519 secret under a label that names run, round and both devices: whoever
   lacks both private keys cannot tell it from 32 random bytes, whatever other seeds of the same devices they know
   (the gap Diffie-Hellman assumption, with HKDF as a random oracle). Test:
   `test_a_seed_changes_completely_with_run_round_or_pair`.
2. A stream is AES-256 in counter mode from zero under its seed, and a seed has one stream: whoever lacks the seed
   cannot tell it from random words. Test: `test_a_masked_vector_passes_every_test_of_uniformity`.
3. So a vector plus one stream that somebody does not know is, to them, uniform, whatever the vector.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

__all__ = ["Words", "add_streams", "agree_seed", "derive_seed", "pack_words", "packed_bytes", "unpack_words"]

Words = NDArray[np.uint32]

SEED_BYTES = 32
MAX_BITS = 32
LANES = 64
"""Values that are packed side by side, one per row of a table, so that every step is on whole rows."""

BLOCK_WORDS = 1 << 16
"""Words of stream made at a time: they stay in the cache of one core."""


def agree_seed(private: X25519PrivateKey, public: bytes, label: bytes, *parts: bytes) -> bytes:
    """Return the 32-byte seed of this key and another's public key, for one purpose named by `label` and `parts`.

    Raises:
        ValueError: The other key is not one (32 bytes, not of low order).
    """
    return derive_seed(private.exchange(X25519PublicKey.from_public_bytes(public)), label, *parts)


def derive_seed(secret: bytes, label: bytes, *parts: bytes) -> bytes:
    """Derive 32 bytes from `secret` by HKDF-SHA256; each part is written with its length, so no two lists collide."""
    info = b"".join(struct.pack(">I", len(part)) + part for part in (label, *parts))
    return HKDF(algorithm=SHA256(), length=SEED_BYTES, salt=None, info=info).derive(secret)


def add_streams(vector: Words, seeds: Iterable[tuple[bytes, bool]]) -> None:
    """Add each seed's stream to `vector`, shape (dim,), in place; or subtract it, where its flag is False."""
    if vector.dtype != np.uint32 or vector.ndim != 1:
        raise ValueError("masks are added to one vector of uint32 words")
    zeros = bytes(4 * min(BLOCK_WORDS, vector.size))
    buffer = bytearray(len(zeros))
    stream = np.frombuffer(buffer, dtype="<u4")
    for seed, is_added in seeds:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes, found {len(seed)}")
        cipher = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
        for start in range(0, vector.size, BLOCK_WORDS):
            block = vector[start : start + BLOCK_WORDS]
            cipher.update_into(zeros, buffer)  # a last block that is shorter leaves the end of the stream unused
            if is_added:
                np.add(block, stream[: block.size], out=block)
            else:
                np.subtract(block, stream[: block.size], out=block)


def packed_bytes(dim: int, bits: int) -> int:
    """Return how many bytes `pack_words` makes of `dim` values."""
    return -(-dim // LANES) * 8 * bits


def pack_words(vector: NDArray[Any], bits: int) -> bytes:
    """Pack the lowest `bits` bits of each of `vector`, shape (dim,), without a gap; filled up to 64 values."""
    _check_bits(bits)
    columns = -(-vector.size // LANES)
    lanes = np.zeros((LANES, columns), dtype=np.uint64)
    flat = lanes.reshape(-1)
    flat[: vector.size] = vector & ((1 << bits) - 1) if vector.dtype != np.uint32 else vector & np.uint32(2**bits - 1)
    packed = np.zeros((bits, columns), dtype="<u8")
    for lane in range(LANES):
        word, shift = divmod(lane * bits, 64)
        packed[word] |= lanes[lane] << np.uint64(shift)
        if shift + bits > 64:
            packed[word + 1] |= lanes[lane] >> np.uint64(64 - shift)
    return packed.tobytes()


def unpack_words(packed: bytes, dim: int, bits: int) -> Words:
    """Return the values that `pack_words` packed, shape (dim,).

    Raises:
        ValueError: Not as many bytes as `dim` values take.
    """
    _check_bits(bits)
    if len(packed) != packed_bytes(dim, bits):
        raise ValueError(f"{dim} values of {bits} bits take {packed_bytes(dim, bits)} bytes, found {len(packed)}")
    rows = np.frombuffer(packed, dtype="<u8").reshape(bits, -1)
    lanes = np.empty((LANES, rows.shape[1]), dtype=np.uint32)
    mask = np.uint64(2**bits - 1)
    for lane in range(LANES):
        word, shift = divmod(lane * bits, 64)
        values = rows[word] >> np.uint64(shift)
        if shift + bits > 64:
            values |= rows[word + 1] << np.uint64(64 - shift)
        lanes[lane] = values & mask
    return lanes.reshape(-1)[:dim]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"a modulus has between 1 and {MAX_BITS} bits")
