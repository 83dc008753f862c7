"""Draw the picture of the idea, for light and for dark pages: `python docs/idea.py`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent
WIDTH, HEIGHT, COLUMN = 900, 372, 300
LIGHT = {
    "text": "#1f2328", "faint": "#656d76", "line": "#8c959f", "panel": "#f6f8fa",
    "file": "#ffffff", "teacher": "#9a6324", "teacher_fill": "#fdf1e0",
    "student": "#0b6e4f", "student_fill": "#e0f5ee",
}  # fmt: skip
DARK = {
    "text": "#e6edf3", "faint": "#9198a1", "line": "#7d8590", "panel": "#161b22",
    "file": "#0d1117", "teacher": "#f0b46a", "teacher_fill": "#3a2a14",
    "student": "#5fd3ae", "student_fill": "#10362b",
}  # fmt: skip
LIST = (0.55, 0.2, 0.1, 0.06)  # the teacher's listed tokens at one position
TAIL = 0.09


class Drawing:
    """SVG elements in one set of colours."""

    def __init__(self, colours: dict[str, str]) -> None:
        self.colours, self.elements = colours, list[str]()

    def text(
        self, x: float, y: float, words: str, kind: str, size: int, anchor: str = "middle"
    ) -> None:
        weight = "bold" if size > 14 else "normal"
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" fill="{self.colours[kind]}" font-size="{size}" '
            f'font-weight="{weight}" text-anchor="{anchor}">{words}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, fill: str, stroke: str) -> None:
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8" '
            f'fill="{self.colours[fill]}" stroke="{self.colours[stroke]}"/>'
        )

    def model(self, x: float, y: float, kind: str, words: str) -> None:
        self.box(x - 90, y, 180, 40, f"{kind}_fill", kind)
        self.text(x, y + 25, words, kind, 15)

    def file(self, x: float, y: float, words: str) -> None:
        self.box(x - 90, y, 180, 34, "file", "line")
        self.text(x, y + 22, words, "text", 13)

    def arrow(self, x: float, y: float, words: str) -> None:
        """Downwards, 34 long, with what happens on its right."""
        colour = self.colours["line"]
        self.elements.append(
            f'<path d="M{x:g} {y + 3:g} v22 m-5 -6 l5 7 l5 -7" fill="none" stroke="{colour}" '
            'stroke-width="1.5"/>'
        )
        self.text(x + 14, y + 21, words, "faint", 12, anchor="start")

    def bars(self, x: float, y: float) -> None:
        """The teacher's list at one position, and the tail as one outcome."""
        for number, mass in enumerate((*LIST, TAIL)):
            height, left = 70 * mass / LIST[0], x + 28 * number + (12 if number == len(LIST) else 0)
            colour = self.colours["line" if number == len(LIST) else "teacher"]
            self.elements.append(
                f'<rect x="{left:g}" y="{y - height:g}" width="20" height="{height:g}" rx="2" '
                f'fill="{colour}"/>'
            )
        self.text(x + 52, y + 16, "top-k tokens", "faint", 12)
        self.text(x + 134, y + 16, "tail", "faint", 12)


def idea(colours: dict[str, str]) -> str:
    """The three steps: fine-tune, sample and score, distil."""
    drawing = Drawing(colours)
    titles = ("1  Fine-tune", "2  Sample and score", "3  Distil")
    notes = ("teacher loaded", "teacher loaded, once", "no teacher loaded")
    for number, (title, note) in enumerate(zip(titles, notes, strict=True)):
        drawing.box(number * COLUMN + 8, 8, COLUMN - 16, HEIGHT - 16, "panel", "panel")
        drawing.text(number * COLUMN + 28, 38, title, "text", 17, anchor="start")
        kind = "student" if number == 2 else "teacher"
        drawing.text(number * COLUMN + 28, 58, note, kind, 12, anchor="start")
    first, second, third = (number * COLUMN + COLUMN / 2 for number in range(3))

    drawing.model(first, 80, "teacher", "Teacher")
    drawing.arrow(first, 120, "answers prompts")
    drawing.file(first, 154, "answers")
    drawing.arrow(first, 188, "fine-tune on them")
    drawing.model(first, 222, "student", "Student")

    drawing.model(second, 80, "student", "Student")
    drawing.arrow(second, 120, "answers prompts")
    drawing.file(second, 154, "rollouts")
    drawing.arrow(second, 188, "scored by the")
    drawing.model(second, 222, "teacher", "Teacher")
    drawing.arrow(second, 262, "writes")
    drawing.file(second, 296, "cache")

    drawing.file(third, 80, "cache")
    drawing.bars(third - 72, 202)
    drawing.arrow(third, 222, "reverse KL")
    drawing.model(third, 256, "student", "Student")
    drawing.text(third, 322, "learns from its own answers", "faint", 12)

    label = "Teacher and student make a cache once; the student is then trained on it alone."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="system-ui, sans-serif" role="img" aria-label="{label}">',
            *drawing.elements,
            "</svg>\n",
        ]
    )


def pictures() -> dict[str, str]:
    """The files beside this script, by name."""
    return {"idea-light.svg": idea(LIGHT), "idea-dark.svg": idea(DARK)}


if __name__ == "__main__":
    for name, text in pictures().items():
        (ROOT / name).write_text(text, encoding="utf-8")
