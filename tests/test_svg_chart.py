"""Charts are drawn where their numbers are, hide no spike, and are told apart without colour."""

import re

import numpy as np
import pytest

from train.pages.svg_chart import LEFT, PLACES, TOP, Chart, Curve, Frame, _smoothed, _ticks, draw_chart, number

HOSTILE = "<script>&\"'"


def points(svg: str, kind: str) -> np.ndarray:
    """Return the points [N, 2] of the first path of a class."""
    path = re.search(rf'<path class="{kind}" d="M([^"Z]*)', svg)
    assert path is not None, svg
    return np.array([pair.split() for pair in path[1].split("L")], dtype=np.float64)


def test_a_curve_goes_through_its_values_in_both_scales() -> None:
    steps, values = np.array([0.0, 5.0, 10.0]), np.array([1.0, 10.0, 100.0])
    html = draw_chart(Chart("t", "u", "log"), [Curve("", steps, values)])
    logarithmic, linear = html.split('class="chart linear"')
    x, y = points(logarithmic, "c0").T
    assert np.allclose(np.diff(x), x[1] - x[0]) and np.allclose(np.diff(y), y[1] - y[0])  # a straight line
    x, y = points(linear, "c0").T
    assert (y[0] - y[1]) / (y[0] - y[2]) == pytest.approx(9 / 99, abs=0.01)
    assert ">100</text>" in logarithmic and ">10</text>" in logarithmic


def test_no_spike_is_lost_where_many_values_share_a_place() -> None:
    values = np.ones(20 * PLACES)
    values[1234], values[4000] = 9.0, 0.25
    html = draw_chart(Chart("t", "u", "log"), [Curve("", np.arange(len(values), dtype=float), values)])
    faint, strong = points(html, "f0 raw"), points(html, "c0")
    low, high = (Frame((0, 1), (np.log10(0.25), np.log10(9.0)), True).down(np.array(v)) for v in (0.25, 9.0))
    assert np.ptp(faint[:, 1]) == pytest.approx(float(low - high), rel=0.1)
    assert len(strong) <= PLACES + 1 and np.ptp(strong[:, 1]) < 0.1 * np.ptp(faint[:, 1])


def test_the_moving_mean_is_the_slow_one() -> None:
    values = np.random.default_rng(0).random(300)
    for i, mean in enumerate(_smoothed(values).tolist()):
        reach = min(5, i)
        assert mean == pytest.approx(values[i - reach : i + reach + 1].mean())


def test_what_is_not_finite_is_marked_and_what_has_no_logarithm_left_out() -> None:
    values = np.array([1.0, np.nan, 2.0, np.inf, 0.0, 3.0])
    html = draw_chart(Chart("t", "u", "log"), [Curve("", np.arange(6.0), values)])
    assert html.count("l6 6m0 -6l-6 6") == 2 * 2  # of both scales
    assert len(points(html, "c0")) == 3 and "nan" not in html and "inf" not in html
    assert draw_chart(Chart("t", "u", "log"), [Curve("", np.arange(2.0), np.array([0.0, 1.0]))]) == ""
    assert draw_chart(Chart("t", "u", "zero"), [Curve("", np.arange(2.0), np.zeros(2))]) == ""  # says nothing


def test_curves_have_a_dash_a_name_and_their_letters_apart() -> None:
    same = [Curve(HOSTILE, np.arange(9.0), np.full(9, 2.0), i) for i in range(3)]
    html = draw_chart(Chart(HOSTILE, HOSTILE, "zero", letters=True, level=(1.0, HOSTILE)), same)
    assert "<script" not in html and html.count("&lt;script&gt;&amp;&quot;&#x27;") >= 6
    letters = re.findall(r'class="end" x="[\d.]+" y="([\d.]+)">([A-Z])<', html)
    assert {letter for _, letter in letters} == set("ABC")
    heights = sorted(float(y) for y, _ in letters)
    assert min(np.diff(heights)) >= 11
    assert {f"c{i}" for i in range(3)} <= set(re.findall(r'class="(c\d)"', html))


def test_the_band_and_the_level_lie_where_they_should() -> None:
    steps = np.arange(3.0)
    chart = Chart("t", "u", "zero", band=(steps, np.full(3, 1.0), np.full(3, 3.0)), level=(4.0, "above"), marks=[1.0])
    html = draw_chart(chart, [Curve("", steps, np.array([0.0, 2.0, 4.0]))])
    frame = Frame((0, 2), (0, 4 * 1.06), False)
    assert np.allclose(points(html, "band")[:, 1], np.repeat(frame.down(np.array([3.0, 1.0])), 3), atol=0.06)
    level = re.search(rf'class="level" d="M{LEFT:g} ([\d.]+)H', html)
    assert level is not None and float(level[1]) == pytest.approx(TOP + float(frame.down(np.array(4.0))), abs=0.06)
    mark = re.search(r'class="mark" d="M([\d.]+) 0V', html)
    assert mark is not None and float(mark[1]) == pytest.approx(frame.width / 2, abs=0.06)


def test_ticks_are_round_and_inside() -> None:
    assert _ticks(0.0, 103.0, log=False) == [0, 25, 50, 75, 100]
    assert _ticks(np.log10(0.9), np.log10(1100.0), log=True) == [1, 10, 100, 1000]
    assert _ticks(np.log10(2.0), np.log10(2.4), log=True) == pytest.approx([2.0, 2.1, 2.2, 2.3, 2.4])
    for low, high in ((1e-9, 3e-9), (-7.0, 1e6), (0.999, 1.0)):
        found = _ticks(low, high, log=False)
        assert 3 <= len(found) <= 8 and low <= found[0] and found[-1] <= high * (1 + 1e-9)


def test_numbers_are_short() -> None:
    spoken = {12345.0: "12.35k", 100000.0: "100k", 1.5e6: "1.5M", 2e11: "200G", 1234.5: "1,234", 0.12345: "0.1235"}
    spoken |= {0.0: "0", 3e-5: "3e-5", 2.5e-12: "2.5e-12", -0.5: "-0.5", 0.001: "0.001"}
    assert {value: number(value) for value in spoken} == spoken
