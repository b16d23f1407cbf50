"""Tables of the labels that a network gives under pairs of masks, made up at random for tests."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from certipatch.defenses.patchcleanser.algorithms import UNKNOWN, double_masking

many = settings(deadline=None, max_examples=1000)
CASES = {"agreed", "disagreer", "majority"}


def random_table(rng, most=6):
    """A symmetric table of few labels: one of them frequent, some rows all of one label.

    Drawn evenly, a table of 6 masks would hardly ever be certified or have a unanimous row.
    """
    n, labels, share = rng.integers(1, most + 1), rng.integers(1, 4), rng.choice([0.5, 0.9, 1.0])
    table = np.where(rng.random((n, n)) < share, rng.integers(labels), rng.integers(labels, size=(n, n)))
    table = np.triu(table) + np.triu(table, 1).T
    if rng.random() < 0.5:
        i = rng.integers(n)
        table[i, :] = table[:, i] = rng.integers(labels)
    return table


@st.composite
def tables(draw):
    """A symmetric table that hypothesis can shrink: small, three labels, a unanimous row now and then."""
    n = draw(st.integers(1, 5))
    table = np.zeros((n, n), dtype=np.int64)
    table[np.triu_indices(n)] = draw(
        st.lists(st.integers(0, 2), min_size=n * (n + 1) // 2, max_size=n * (n + 1) // 2)
    )
    table = np.triu(table) + np.triu(table, 1).T
    if draw(st.booleans()):
        i = draw(st.integers(0, n - 1))
        table[i, :] = table[:, i] = draw(st.integers(0, 2))
    return table


def decide(table):
    """Algorithm 1 of the library on a stored table."""
    return double_masking(table.diagonal().tolist(), lambda i: table[i].tolist())


def start(table):
    """What is known after the first round: the one-mask labels."""
    known = np.full_like(table, UNKNOWN)
    np.fill_diagonal(known, table.diagonal())
    return known
