"""Where the marks of a chart go, in percent of its plot; report.html.jinja draws them.

Everything is placed in percent and text keeps its size, so that one drawing fits a phone, a desktop and paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from kit.convert.figures import Figure, Node, Text, brief, figure, general
from kit.convert.pareto import pareto_front

PLOT_HEIGHT = 220  # pixels, as in report.css.jinja
LINE_HEIGHT, CHARACTER = 15, 6.5  # pixels of a label's text
NARROW = 260  # pixels of a plot on a phone
MARKED = 64  # a line of more points than that shows none of them
LOG_RATIO = 20  # values that spread over more than that are placed by their logarithm


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, in percent of the plot.

    Attributes:
        label: what it measures, with its unit.
        low: value at 0 %.
        high: value at 100 %.
        log: whether it is logarithmic.
        form: how a tick is written.
    """

    label: str
    low: float
    high: float
    log: bool = False
    form: Callable[[float], str] = brief

    @classmethod
    def around(
        cls, label: str, values: Iterable[float], *, padding: float = 0.0, log: bool | None = None, **more: Callable
    ) -> Axis:
        """The axis that holds values, with a share of it as padding; logarithmic if they spread far."""
        values = list(values)
        low, high = min(values), max(values)
        if log is None:
            log = low > 0 and high / low > LOG_RATIO
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        if log:
            factor = (high / low) ** padding
            return cls(label, low / factor, high * factor, True, **more)
        room = (high - low) * padding
        bottom = max(low - room, 0.0) if low >= 0 else low - room
        return cls(label, bottom, high + room, False, **more)

    def place(self, value: float) -> float:
        """Percent of the way from low to high."""
        if self.log:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Place and text of three to six round values."""
        values = _round_values(self.low, self.high, self.log)
        return [(self.place(value), self.form(value).replace(".0 ", " ")) for value in values]


def _round_values(low: float, high: float, log: bool, most: int = 5) -> list[float]:
    """Round values from low to high, at most so many."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [v for p in powers for d in digits if low <= (v := d * 10.0**p) <= high]
            if len(found) <= most:
                break
        while len(found) > most:
            found = found[::2]
        if len(found) >= 2:
            return found
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


@dataclass(frozen=True)
class Mark:
    """A point, in percent from the left and from the top, with what it says when pointed at."""

    x: float
    y: float
    figure: Figure
    title: str


@dataclass
class Line:
    """A line through points.

    Attributes:
        name: of what it shows.
        style: number of its colour and dashes.
        marks: its points.
        source: address of the list that it draws, where its points do not say that themselves.
        label_y: height of the label at its end, percent from the top.
    """

    name: Text | str
    style: int
    marks: list[Mark]
    source: str = ""
    label_y: float = 0.0

    @property
    def points(self) -> str:
        """As a polyline has it."""
        return " ".join(f"{mark.x:.3f},{mark.y:.3f}" for mark in self.marks)

    @property
    def shown_marks(self) -> list[Mark]:
        """Points to draw: all of a short line, none of a long one."""
        return self.marks if len(self.marks) <= MARKED else []


@dataclass
class LineChart:
    """Lines over one pair of axes.

    Attributes:
        title: what is shown.
        x: from left to right.
        y: from bottom to top.
        lines: at least one.
        first_last: two figures to write beside a single long line.
    """

    title: str
    x: Axis
    y: Axis
    lines: list[Line]
    first_last: tuple[Figure, Figure] | None = None

    @property
    def description(self) -> str:
        """In words, for those who do not see it."""
        return "; ".join(f"{line.name}: from {line.marks[0].title} to {line.marks[-1].title}" for line in self.lines)

    @property
    def names(self) -> bool:
        """Whether the lines have to be told apart."""
        return len(self.lines) > 1


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: list[tuple[Text | str, int, list[tuple[float, Node]], str]],
    x_name: Callable[[float], str] = general,
) -> LineChart:
    """A line chart.

    Args:
        title: what is shown.
        x_label: of the axis.
        y_label: of the axis.
        series: name, style, points (x, number) and the address of the list that they are, if they are one.
        x_name: what a point's x is called.
    """
    xs = [x for _, _, points, _ in series for x, _ in points]
    x_axis = Axis.around(x_label, xs, log=False)
    y_axis = Axis.around(y_label, [node.value for _, _, points, _ in series for _, node in points], padding=0.08)
    lines = []
    for name, style, points, source in series:
        marks = [
            Mark(
                x_axis.place(x),
                100 - y_axis.place(node.value),
                figure(node, general),
                f"{x_name(x)}: {node.value:.6g}",
            )
            for x, node in points
        ]
        lines.append(Line(name, style, marks, source))
    for line, top in zip(lines, _apart([line.marks[-1].y for line in lines]), strict=True):
        line.label_y = top
    return LineChart(title, x_axis, y_axis, lines)


def _apart(places: list[float]) -> list[float]:
    """Heights in percent, moved so that labels of a text line do not overlap."""
    gap = 100 * LINE_HEIGHT / PLOT_HEIGHT
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    if order and (over := moved[order[-1]] - 100) > 0:
        moved[order[-1]] -= over
        for after, before in pairwise(reversed(order)):
            moved[before] = min(moved[before], moved[after] - gap)
    return moved


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: its box in percent, its heat from 0 to 100, and what it says."""

    x: float
    y: float
    width: float
    height: float
    heat: float
    figure: Figure
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Numbers as colours.

    Attributes:
        title: what is shown.
        columns: label and place of each column that has one, percent.
        column_label: what the columns are.
        rows: label and place of each row, percent.
        row_label: what the rows are.
        cells: the numbers.
        low: the smallest (heat 0), with a scale of its own.
        high: the largest (heat 100).
        largest: where that is; empty where the scale is given, or where it is in several cells.
        log: whether heat follows the logarithm.
        written: whether cells show their numbers.
    """

    title: str | Text
    columns: list[tuple[float, str]]
    column_label: str
    rows: list[tuple[float, str]]
    row_label: str
    cells: list[Cell]
    low: Figure | str
    high: Figure | str
    largest: str = ""
    log: bool = False
    written: bool = False

    @property
    def description(self) -> str:
        """In words, for those who do not see it."""
        range_ = f"from {self.low} to {self.high}"
        return f"{len(self.rows)} rows ({self.row_label}), {range_}" + (
            f", largest at {self.largest}" * bool(self.largest)
        )


def heat_map(
    title: str | Text,
    rows: list[str],
    columns: list[str],
    numbers: dict[tuple[int, int], Node],
    *,
    row_label: str,
    column_label: str,
    unit: tuple[float, float, str, str] | None = None,
    form: Callable[[float], str] = general,
    written: bool = False,
    most_columns: int = 8,
) -> HeatMap:
    """A heat map.

    Args:
        title: what is shown.
        rows: their labels.
        columns: their labels; some are left out where there are many.
        numbers: by row and column; cells without a number stay empty.
        row_label: what a row is.
        column_label: what a column is.
        unit: lowest and highest value of a scale that is given, and how they are written; else that of the numbers.
        form: how a number is written.
        written: show the numbers in the cells.
        most_columns: labels, at most.
    """
    smallest = min(numbers.values(), key=lambda node: node.value)
    largest = max(numbers.values(), key=lambda node: node.value)
    tops = [place for place, node in numbers.items() if node.value == largest.value]
    low, high = unit[:2] if unit else (smallest.value, largest.value)
    axis = Axis.around("", [low, high]) if low < high else None
    width, height = 100 / len(columns), 100 / len(rows)
    cells = [
        Cell(
            column * width,
            row * height,
            width,
            height,
            axis.place(node.value) if axis else 0.0,
            figure(node, form),
            f"{rows[row]}, {column_label} {columns[column]}: {node.value:.6g}",
        )
        for (row, column), node in sorted(numbers.items())
    ]
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(columns) / step <= most_columns)
    return HeatMap(
        title=title,
        columns=[((i + 0.5) * width, label) for i, label in enumerate(columns) if i % every == 0],
        column_label=column_label,
        rows=[((i + 0.5) * height, label) for i, label in enumerate(rows)],
        row_label=row_label,
        cells=cells,
        low=unit[2] if unit else figure(smallest, form),
        high=unit[3] if unit else figure(largest, form),
        largest="" if unit or len(tops) > 1 else f"{rows[tops[0][0]]}, {column_label} {columns[tops[0][1]]}",
        log=bool(axis and axis.log),
        written=written,
    )


@dataclass
class Dot:
    """A model in a scatter plot.

    Attributes:
        name: the model's.
        label: its name, shortened.
        style: number of its colour.
        x: percent from the left.
        y: percent from the top.
        x_figure: what stands on the x axis.
        y_figure: what stands on the y axis.
        on_front: whether no other model is better in both.
        anchor: "start" or "end": the side on which the label lies.
        shift: pixels by which the label is moved down.
    """

    name: str
    label: str
    style: int
    x: float
    y: float
    x_figure: Figure
    y_figure: Figure
    on_front: bool = False
    anchor: str = "start"
    shift: float = 0.0


@dataclass
class Scatter:
    """Quality against cost, with the front of those that no other beats in both."""

    title: str
    better: str
    x: Axis
    y: Axis
    dots: list[Dot] = field(default_factory=list)

    @property
    def description(self) -> str:
        """In words, for those who do not see it."""
        return "; ".join(f"{dot.name}: {dot.x_figure}, {dot.y_figure}" for dot in self.dots)

    @property
    def front(self) -> str:
        """The front as a polyline."""
        dots = sorted((dot for dot in self.dots if dot.on_front), key=lambda dot: dot.x)
        return " ".join(f"{dot.x:.3f},{dot.y:.3f}" for dot in dots)


def scatter(
    title: str,
    x_label: str,
    y_label: str,
    points: list[tuple[str, int, Node, Node]],
    *,
    x_form: Callable[[float], str],
    y_form: Callable[[float], str],
    more_is_better: bool = False,
) -> Scatter:
    """Models as points; low y is better, and low x unless `more_is_better`."""
    x_axis = Axis.around(x_label, [x.value for _, _, x, _ in points], padding=0.15, log=False, form=x_form)
    y_axis = Axis.around(y_label, [y.value for _, _, _, y in points], padding=0.15)
    sign = -1 if more_is_better else 1
    plot = Scatter(title, f"lower {'right' if more_is_better else 'left'} is better", x_axis, y_axis)
    front = pareto_front(np.array([[sign * x.value, y.value] for _, _, x, y in points]))
    for (name, style, x, y), on_front in zip(points, front.tolist(), strict=True):
        left, top = x_axis.place(x.value), 100 - y_axis.place(y.value)
        label = name if len(name) <= 22 else name[:21] + "…"
        figures = figure(x, x_form), figure(y, y_form)
        plot.dots.append(Dot(name, label, style, left, top, *figures, on_front, "start" if left < 50 else "end"))
    taken: list[tuple[float, float, float]] = []
    for dot in plot.dots:
        left, middle = dot.x / 100 * NARROW, dot.y / 100 * PLOT_HEIGHT
        width = len(dot.label) * CHARACTER + 10
        start = left if dot.anchor == "start" else left - width
        for shift in (0, -LINE_HEIGHT, LINE_HEIGHT, -2 * LINE_HEIGHT, 2 * LINE_HEIGHT):
            box = (start, start + width, middle + shift)
            if not any(box[0] < b and a < box[1] and abs(box[2] - m) < LINE_HEIGHT for a, b, m in taken):
                break
        dot.shift = shift
        taken.append(box)
    return plot


@dataclass(frozen=True)
class Interval:
    """A difference with its interval, in percent of the plot."""

    low: float
    middle: float
    high: float
    zero: float


def intervals(rows: list[Node]) -> list[Interval]:
    """Where `low`, `difference` and `high` of each row, and zero, lie on one axis."""
    ends = [row[key].value for row in rows for key in ("low", "high", "difference")]
    low, high = min(0.0, *ends), max(0.0, *ends)
    axis = Axis("", low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
    return [
        Interval(*(axis.place(v) for v in (row["low"].value, row["difference"].value, row["high"].value, 0.0)))
        for row in rows
    ]
