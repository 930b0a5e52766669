"""Colors have the names that people give them, and colors between two names have neither for certain."""

from __future__ import annotations

import numpy as np
import pytest

from mqformer_jax.synthesize.color_names import TERMS, term_certainties, term_shares


def certainties_of(color: str) -> np.ndarray:
    pixels = np.tile(np.array([list(bytes.fromhex(color))], np.uint8), (50, 1))
    return term_certainties(*term_shares(pixels), 0.6, 0.12)


@pytest.mark.parametrize("term", TERMS)
def test_plain_colors_get_only_their_own_color_term(term):
    plain = "000000 ffffff 808080 e00000 ff8000 ffee00 10a020 1040e0 8020a0 ff80c0 5c3510"
    color = dict(zip(TERMS, plain.split()))[term]
    certainties = certainties_of(color)
    assert [t for t, certainty in zip(TERMS, certainties) if certainty > 0] == [term]


@pytest.mark.parametrize(
    "color, either",
    [("108080", "green blue"), ("800020", "red"), ("c8b070", "yellow brown"), ("b8b8b8", "white grey")],
)
def test_intermediate_colors_have_zero_certainty_for_both_terms(color, either):
    certainties = certainties_of(color)
    assert all(certainties[TERMS.index(term)] == 0 for term in either.split()) and certainties.max() == 0
