"""Values that a stranger may write into a JSON file, and a document with one of them put in."""

import copy

from hypothesis import strategies as st

NESTED = []
for _ in range(200):
    NESTED = [NESTED]

values = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 2**24, 2**31, 2**63, 10**40, 1e308, float("inf")]),
    st.sampled_from([float("nan"), "", "x", "1", "\0", "../x", "/etc/passwd", "a" * 9999]),
    st.sampled_from([[], {}, [1], ["x"], {"x": 1}, NESTED, {"type": "default"}]),
    st.integers(),
    st.text(max_size=5),
)


def places(value, path=()):
    """Paths to everything inside a JSON value; of a long list or object the first few."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items)[:12]:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def spoilt(value, place: tuple, new):
    """A copy with `new` at a place."""
    value = copy.deepcopy(value)
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = new
    return value
