"""Line charts and histograms as SVG, with a value for every point on hover."""

import math
from collections.abc import Iterable, Sequence
from html import escape

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34
MOST_POINTS = 600
Points = Sequence[tuple[float, float]]


def line_chart(series: Sequence[tuple[str, Points]]) -> str:
    """One line for each named series; long ones are thinned to what a screen shows.

    Args:
        series: (name, points by step); the n-th has the class `s<n>` of the style sheet.
    """
    lines = [(name, _thinned([p for p in points if _finite(p)])) for name, points in series]
    points = [point for _, line in lines for point in line]
    if not points:
        return "<p>no values</p>"
    xs, ys = _ticks(*_range(x for x, _ in points)), _ticks(*_range(y for _, y in points))
    parts = [_axes(xs, ys, "step")]
    for number, (name, line) in enumerate(lines):
        place = [(_scale(x, xs, True), _scale(y, ys, False)) for x, y in line]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in place)
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        for (x, y), (a, b) in zip(line, place, strict=True):
            title = escape(f"{name}: {y:.4g} at step {x:g}")
            parts.append(
                f'<circle class="dot s{number}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
                f"<title>{title}</title></circle>"
            )
    return _svg(parts)


def histogram(values: Sequence[float], unit: str, bins: int = 24) -> str:
    """Counts of values in bins of equal width."""
    if not values:
        return "<p>no values</p>"
    low, high = min(values), max(values)
    width = max((high - low) / bins, 1e-9)
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    xs, ys = _ticks(low, max(high, low + 1)), _ticks(0, max(counts))
    parts = [_axes(xs, ys, unit)]
    for i, count in enumerate(counts):
        a, b = (_scale(low + (i + j) * width, xs, True) for j in (0, 1))
        top, bottom = _scale(count, ys, False), _scale(0, ys, False)
        title = escape(f"{count} between {low + i * width:.4g} and {low + (i + 1) * width:.4g}")
        parts.append(
            f'<rect class="bar" x="{a:.1f}" y="{top:.1f}" width="{max(b - a - 1, 1):.1f}" '
            f'height="{bottom - top:.1f}"><title>{title}</title></rect>'
        )
    return _svg(parts)


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _finite(point: tuple[float, float]) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _thinned(points: Points) -> Points:
    step = max(1, -(-len(points) // MOST_POINTS))
    return points if step == 1 else [*points[:-1:step], points[-1]]


def _range(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    return min(known), max(known)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, at most six, that enclose the range."""
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def _scale(value: float, ticks: Sequence[float], across: bool) -> float:
    share = (value - ticks[0]) / (ticks[-1] - ticks[0])
    if across:
        return LEFT + share * (WIDTH - LEFT - RIGHT)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axes(xs: Sequence[float], ys: Sequence[float], below: str) -> str:
    parts = []
    for y in ys:
        at = _scale(y, ys, False)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{at + 4:.1f}">{y:.4g}</text>')
    for x in xs:
        at = _scale(x, xs, True)
        parts.append(f'<text class="tick middle" x="{at:.1f}" y="{HEIGHT - 16}">{x:.4g}</text>')
    parts.append(
        f'<text class="tick middle" x="{WIDTH / 2}" y="{HEIGHT - 2}">{escape(below)}</text>'
    )
    return "".join(parts)
