"""Colours have the names that people give them, and colours between two names have neither for certain."""

from __future__ import annotations

import numpy as np
import pytest

from mqformer_jax.synthesize.colour_names import TERMS, judge, term_shares


@pytest.mark.parametrize("term", TERMS)
def test_plain_colours_have_their_names(term):
    plain = "000000 ffffff 808080 e00000 ff8000 ffee00 10a020 1040e0 8020a0 ff80c0 5c3510"
    colour = dict(zip(TERMS, plain.split()))[term]
    beliefs = judge(*term_shares(np.tile(np.array([list(bytes.fromhex(colour))], np.uint8), (50, 1))), 0.6, 0.12)
    assert [t for t, belief in zip(TERMS, beliefs) if belief > 0] == [term]


@pytest.mark.parametrize(
    "colour, either",
    [("108080", "green blue"), ("800020", "red"), ("c8b070", "yellow brown"), ("b8b8b8", "white grey")],
)
def test_between_two_colours_neither_is_certain_nor_denied(colour, either):
    beliefs = judge(*term_shares(np.tile(np.array([list(bytes.fromhex(colour))], np.uint8), (50, 1))), 0.6, 0.12)
    assert all(beliefs[TERMS.index(term)] == 0 for term in either.split()) and beliefs.max() == 0
