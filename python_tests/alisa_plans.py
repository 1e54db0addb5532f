"""Plans of ALISA's schedule for property tests."""

from hypothesis import strategies as st

from tokcore.algorithms.alisa import Plan, half_budget

SHARES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


@st.composite
def plans(draw, most=12):
    p1 = draw(st.integers(0, most))
    p2 = draw(st.integers(p1, most + 2))
    return Plan(draw(SHARES), draw(SHARES), p1, p2)


def half(ratio):
    return lambda n: half_budget(n, ratio)
