"""Tests of the masks: seeds, streams and packing. What a masked vector looks like is in test_secagg.py."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from common.masks import add_streams, agree_seed, derive_seed, pack_words, packed_bytes, unpack_words
from common.privacy import Randomness

PLACE = (b"run", b"round", b"one device", b"other device")


def key(number: int) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(Randomness.rehearsal(number).bytes(32))


def public(private: X25519PrivateKey) -> bytes:
    return private.public_key().public_bytes_raw()


def test_both_sides_agree_on_one_seed():
    assert agree_seed(key(1), public(key(2)), b"x", *PLACE) == agree_seed(key(2), public(key(1)), b"x", *PLACE)


@pytest.mark.parametrize("changed", range(4))
def test_a_seed_changes_completely_with_run_round_or_pair(changed):
    other = [part + b"'" if at == changed else part for at, part in enumerate(PLACE)]
    one, two = (agree_seed(key(1), public(key(2)), b"x", *parts) for parts in (PLACE, other))
    differing = bin(int.from_bytes(one, "big") ^ int.from_bytes(two, "big")).count("1")
    assert 80 < differing < 176  # half of 256 bits, within six standard deviations


def test_parts_of_a_label_do_not_run_into_each_other():
    assert derive_seed(bytes(32), b"x", b"ab", b"c") != derive_seed(bytes(32), b"x", b"a", b"bc")


def test_every_bit_of_a_256_bit_seed_takes_both_values_and_no_two_seeds_share_a_part():
    keys = [key(number) for number in range(30)]
    seeds = [agree_seed(one, public(two), b"x") for at, one in enumerate(keys) for two in keys[:at]]
    bits = np.unpackbits(np.frombuffer(b"".join(seeds), dtype=np.uint8)).reshape(len(seeds), 256)
    share = bits.mean(axis=0)
    # 435 seeds: a bit's share of ones is one half, within six standard deviations. Flower's masks had 28 such bits.
    assert np.abs(share - 0.5).max() < 6 * 0.5 / len(seeds) ** 0.5
    assert len({seed[:8] for seed in seeds}) == len({seed[-8:] for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("other", [bytes(32), (1).to_bytes(32, "little"), b"short"])
def test_a_key_that_is_none_is_refused(other):
    with pytest.raises(ValueError, match=r"."):
        agree_seed(key(1), other, b"x")


@pytest.mark.parametrize("dim", [1, 1000, (1 << 16) + 7])
def test_a_stream_is_the_counter_mode_of_its_seed(dim):
    seed = Randomness.rehearsal(3).bytes(32)
    vector = np.zeros(dim, dtype=np.uint32)
    add_streams(vector, [(seed, True)])
    plain = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor().update(bytes(4 * dim))
    assert vector.tobytes() == plain


def test_a_stream_added_and_subtracted_cancels():
    vector = Randomness.rehearsal(4).integers(2**32, 5000).astype(np.uint32)
    masked = vector.copy()
    one, two = bytes(31) + b"1", bytes(31) + b"2"
    add_streams(masked, [(one, True), (two, False)])
    assert (masked != vector).mean() > 0.99
    add_streams(masked, [(two, True), (one, False)])
    assert (masked == vector).all()


def test_what_is_not_one_vector_of_words_or_no_seed_is_refused():
    with pytest.raises(ValueError, match="uint32"):
        add_streams(np.zeros(4, dtype=np.int64), [])
    with pytest.raises(ValueError, match="32 bytes"):
        add_streams(np.zeros(4, dtype=np.uint32), [(bytes(16), True)])


def naive_pack(vector: np.ndarray, bits: int) -> bytes:
    """Value by value: lane i holds the i-th sixty-fourth of the vector, column by column a number of 64 * bits bits."""
    columns = -(-vector.size // 64)
    padded = [int(value) % 2**bits for value in vector] + [0] * (64 * columns - vector.size)
    words = [[0] * columns for _ in range(bits)]
    for column in range(columns):
        number = sum(padded[lane * columns + column] << (lane * bits) for lane in range(64))
        for word in range(bits):
            words[word][column] = (number >> (64 * word)) % 2**64
    return b"".join(value.to_bytes(8, "little") for row in words for value in row)


@settings(max_examples=60, deadline=None)
@given(dim=st.integers(1, 300), bits=st.integers(1, 32), seed=st.integers(0, 2**32))
def test_packing_takes_the_modulus_width_and_unpacks_to_the_same(dim, bits, seed):
    vector = Randomness.rehearsal(seed).integers(2**32, dim).astype(np.uint32)
    packed = pack_words(vector, bits)
    assert packed == naive_pack(vector, bits)
    assert len(packed) == packed_bytes(dim, bits)
    assert (unpack_words(packed, dim, bits) == vector % np.uint64(2**bits)).all()


def test_a_million_coordinates_of_17_bits_take_17_bits_each():
    assert packed_bytes(1 << 20, 17) == (1 << 20) * 17 // 8


def test_another_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match="take 136 bytes, found 135"):
        unpack_words(bytes(135), 64, 17)
    with pytest.raises(ValueError, match="between 1 and 32 bits"):
        pack_words(np.zeros(4, dtype=np.uint32), 33)
