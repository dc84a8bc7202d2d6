"""The yardsticks are what they say, against slow references."""

import math
import time

import numpy as np
import pytest

from memformer.data import order2_bits_per_byte, xz_bits_per_byte, yardsticks


@pytest.mark.parametrize("part", [1, 3, 1 << 20])
def test_the_order2_model_against_a_dictionary(monkeypatch, part):
    monkeypatch.setattr(yardsticks, "_PART", part)
    training, held_out = [b"abracadabra", b"abba"], [b"abracab", b"x"]
    bits, count = 0.0, 0
    for text in held_out:
        padded = b"\0\0" + text
        for i in range(2, len(padded)):
            probability = 1 / 256
            for order in (0, 1, 2):
                following = [
                    (b"\0\0" + t)[j]
                    for t in training
                    for j in range(2, len(t) + 2)
                    if (b"\0\0" + t)[j - order : j] == padded[i - order : i]
                ]
                n, distinct = len(following), len(set(following))
                if n:
                    probability = (following.count(padded[i]) + distinct * probability) / (n + distinct)
            bits -= math.log2(probability)
            count += 1
    assert order2_bits_per_byte(training, held_out) == pytest.approx(bits / count, rel=1e-12)


def test_xz_counts_all_documents_in_one_stream():
    noise = np.random.default_rng(0).bytes(20_000)
    assert 8 < xz_bits_per_byte([noise]) < 8.1
    assert 4 < xz_bits_per_byte([noise, noise]) < 4.1


def test_the_order2_model_reads_many_short_documents_as_fast_as_one():
    """Its tables are gone through once, not once for each of them."""
    text = np.random.default_rng(0).bytes(3000)
    held_out = [text[i : i + 3] for i in range(0, 3000, 3)]

    def seconds(documents):
        before = time.process_time()
        order2_bits_per_byte([text], documents)
        return time.process_time() - before

    assert seconds(held_out) < 20 * seconds([text])
