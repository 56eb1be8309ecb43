from hypothesis import given
from hypothesis import strategies as st

from qat_lightning.compare.pareto import pareto_front

# few values, so that there are ties
points = st.lists(st.none() | st.tuples(*[st.integers(0, 3).map(float)] * 3), max_size=12)


def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


@given(points)
def test_nothing_beats_the_front_and_something_on_it_beats_all_else(points):
    front = pareto_front(points)
    on = [point for point, is_on in zip(points, front, strict=True) if is_on]
    for point, is_on in zip(points, front, strict=True):
        if point is None:
            assert not is_on
        else:
            assert is_on == (not any(beats(other, point) for other in on))


@given(points)
def test_equal_points_are_on_the_front_together(points):
    front = pareto_front(points)
    for point in {*points} - {None}:
        assert len({is_on for other, is_on in zip(points, front, strict=True) if other == point}) == 1


@given(points, st.randoms())
def test_the_order_does_not_matter(points, random):
    order = random.sample(range(len(points)), len(points))
    front = pareto_front(points)
    assert pareto_front([points[i] for i in order]) == [front[i] for i in order]


@given(points.filter(lambda points: any(points)))
def test_there_is_a_front_where_there_is_a_point(points):
    assert any(pareto_front(points))


def test_a_difference_within_the_tolerance_beats_nobody():
    points = [(0.98, -1.000), (0.98, -1.001), (0.97, -1.0005), (0.98, -1.2)]
    assert pareto_front(points) == [True, False, False, False]
    assert pareto_front(points, (0.001, 0.01)) == [True, True, False, False]


@given(points.filter(lambda points: any(points)), st.floats(0, 3))
def test_there_is_a_front_with_any_tolerance(points, tolerance):
    width = len(next(point for point in points if point))
    assert any(pareto_front(points, [tolerance] * width))


def test_a_difference_of_exactly_the_tolerance_does_not_count():
    assert 0.9805 - 0.98 > 0.0005, "by the error of arithmetic"
    assert pareto_front([(0.98, 1.0), (0.9805, 1.0)], (0.0005, 0.0)) == [True, True]
