"""A pad to draw a digit on: eight by eight cells, as in scikit-learn's digits."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets
import numpy as np

from tlcourse import display
from tlcourse.panes import Pane, capture

if TYPE_CHECKING:
    import torch

SIZE = 8
FULL = 16  # ink in a cell that is all black
MAX_UPLOAD_BYTES = 10_000_000
MAX_UPLOAD_PIXELS = 50_000_000
# Drawn for this pad, so no model has seen them: "." no ink, "+" half, "#" full.
EXAMPLES = {
    0: "..+##+.. ..#++#.. .+#..#+. .#+..+#. .#+..+#. .+#..#+. ..#++#.. ..+##+..",
    1: "...+#... ..+##... .+###... ...##... ...##... ...##... ...##... ..+##+..",
    2: "..+##+.. .+#++#+. .....#+. ....+#.. ...+#+.. ..+#+... .+#+.... .+#####.",
    3: ".+####.. ....+#+. ....+#.. ..+##+.. ....+#+. .....#+. .+..+#+. .+###+..",
    4: "....+#.. ...+##.. ..+##+.. .+#+#+.. .#++#++. .######. ....#+.. ....#+..",
    5: "..####+. ..#+.... ..#+.... ..###+.. ....+#+. .....#+. ..+.+#+. ..+##+..",
    6: "...+#+.. ..+#+... ..#+.... .+#+#+.. .##++#+. .##..+#. .+#++#+. ..+##+..",
    7: ".+#####. ....+#+. ....+#.. ...+#+.. ..+###+. ...#+... ..+#.... ..+#....",
    8: "..+##+.. .+#++#+. .+#..#+. ..+##+.. ..+##+.. .+#..#+. .+#++#+. ..+##+..",
    9: "..+##+.. .+#++#+. .+#..##. .+#++##. ..+##+#. .....+#. ....+#+. ..+##+..",
}
_CSS = """<style>
.tl-pad .widget-button, .tl-pad .jupyter-button { margin: 0; padding: 0; min-width: 0;
  border: 1px solid #999; box-shadow: none; }
.tl-message { line-height: 1.4; margin: 4px 2px; }
.tl-pad button:focus-visible { outline: 3px solid #D55E00; outline-offset: -2px; }
</style>"""


def draw_digit(on_predict: Callable[[np.ndarray], Any] | None = None, example: int = 3) -> DigitPad:
    """Show a pad: click on cells, take an example, or upload a picture of a digit.

    Args:
        on_predict: called with the image after every change, see ``DigitPad.image``; what it
            plots or prints appears beside the pad. It is called once before anything is
            shown, so its error is the cell's error.
        example: the digit, 0 to 9, that is there at the start.

    Returns:
        The pad; later cells read what was drawn from it.
    """
    if example not in EXAMPLES:
        raise ValueError(f"example must be a digit, 0 to 9, got {example!r}")
    pad = DigitPad(on_predict, example)
    picture = pad.pane.widget.value
    display.show_widget(
        pad.widget,
        f"Drawing pad, showing the digit {example}. Run the cell to draw your own.",
        picture or display.preformatted(EXAMPLES[example].replace(" ", "\n")),
    )
    return pad


class DigitPad:
    """What the reader drew.

    Attributes:
        image: float array, shape (8, 8), in [0, 16]: ink, as in scikit-learn's digits.
        widget: the pad.
        pane: where the result of ``on_predict`` appears.
    """

    def __init__(self, on_predict: Callable[[np.ndarray], Any] | None, example: int) -> None:
        self._on_predict = on_predict
        self._cells = [ipywidgets.Button() for _ in range(SIZE * SIZE)]
        self._message = ipywidgets.HTML()
        self.image = example_image(example)
        self.pane = Pane(self._predicted())
        # One style for each shade, shared by all cells of that shade.
        self._shades = [_shade(level) for level in range(FULL + 1)]
        self._paint()
        self.widget = self._lay_out(example)

    def to_tensor(self) -> torch.Tensor:
        """The drawing, not yet a network's input: float32 tensor, shape (8, 8), in [0, 16]."""
        import torch

        return torch.tensor(self.image, dtype=torch.float32)

    def draw(self, image: np.ndarray) -> None:
        """Replace the drawing.

        Args:
            image: shape (8, 8), in [0, 16].

        Raises:
            ValueError: if shape or values are others.
        """
        image = np.array(image, dtype=float)
        if image.shape != (SIZE, SIZE) or not (image.min() >= 0 and image.max() <= FULL):
            raise ValueError(
                f"image must have the shape ({SIZE}, {SIZE}) and values in [0, {FULL}], got the "
                f"shape {image.shape} and values in [{image.min():g}, {image.max():g}]"
            )
        self.image = image
        self._paint()
        self.pane.show(self._predicted)

    def _predicted(self) -> str:
        if self._on_predict is None:
            return ""
        call = self._on_predict
        return capture(lambda: call(self.image.copy()), "Result for the drawing")

    def _paint(self) -> None:
        for cell, ink in zip(self._cells, self.image.flat, strict=True):
            cell.style = self._shades[round(ink)]

    def _toggle(self, at: int) -> None:
        image = self.image.copy()
        image.flat[at] = 0 if image.flat[at] >= FULL / 2 else FULL
        self.draw(image)

    def _choose(self, change: dict[str, Any]) -> None:
        if change["new"] is not None:
            self._message.value = ""
            self.draw(example_image(change["new"]))

    def _upload(self, change: dict[str, Any]) -> None:
        for name, content in _uploads(change["new"]):
            try:
                image = image_from_file(content)
            except ValueError as error:
                text = html.escape(f"{name}: {error}")
                self._message.value = (
                    f'<p role="alert" class="tl-message"><b>Not used.</b> {text}</p>'
                )
            else:
                self._message.value = ""
                self.draw(image)

    def _lay_out(self, example: int) -> ipywidgets.Widget:
        square = ipywidgets.Layout(width="28px", height="28px")
        for at, cell in enumerate(self._cells):
            cell.layout = square
            cell.tooltip = f"row {at // SIZE + 1}, column {at % SIZE + 1}"
            cell.on_click(lambda _, at=at: self._toggle(at))
        grid = ipywidgets.GridBox(
            self._cells,
            layout=ipywidgets.Layout(grid_template_columns=f"repeat({SIZE}, 28px)", grid_gap="0"),
        )
        grid.add_class("tl-pad")
        wide = ipywidgets.Layout(width="224px")
        clear = ipywidgets.Button(description="Clear", layout=wide)
        clear.on_click(lambda _: self.draw(np.zeros((SIZE, SIZE))))
        examples = ipywidgets.Dropdown(
            options=[("take an example", None), *((str(digit), digit) for digit in EXAMPLES)],
            layout=wide,
        )
        examples.observe(self._choose, names="value")
        upload = ipywidgets.FileUpload(
            accept="image/*", multiple=False, description="Upload a picture", layout=wide
        )
        upload.observe(self._upload, names="value")
        tools = [ipywidgets.HTML(_CSS), grid, clear, examples, upload, self._message]
        left = ipywidgets.VBox(tools, layout=ipywidgets.Layout(flex="0 0 250px"))
        return ipywidgets.HBox(
            [left, self.pane.widget], layout=ipywidgets.Layout(flex_flow="row wrap")
        )

    def _ipython_display_(self) -> None:
        """Nothing: the pad is already in the page when a cell ends in ``draw_digit()``."""


def example_image(digit: int) -> np.ndarray:
    """One of the examples: float array, shape (8, 8), in [0, 16]."""
    ink = {".": 0, "+": FULL // 2, "#": FULL}
    return np.array([[ink[cell] for cell in row] for row in EXAMPLES[digit].split()], dtype=float)


def image_from_file(content: bytes) -> np.ndarray:
    """A picture of one digit, dark on light or light on dark, as scikit-learn has its digits.

    The digit is cut out, fills the height or the width, and each cell holds the mean of its
    part of the picture, as the 32x32 originals were counted in blocks of 4x4.

    Args:
        content: a file that Pillow reads: PNG, JPEG, WebP, ...

    Returns:
        Float array, shape (8, 8), in [0, 16].

    Raises:
        ValueError: if the file is too large, no image, or shows nothing.
    """
    from PIL import Image, ImageOps

    if len(content) > MAX_UPLOAD_BYTES:
        raise ValueError(
            f"expected at most {MAX_UPLOAD_BYTES // 10**6} MB, got {len(content) / 1e6:.1f} MB"
        )
    try:
        with Image.open(io.BytesIO(content)) as file:
            if file.width * file.height > MAX_UPLOAD_PIXELS:
                raise ValueError(f"too large: {file.width} x {file.height} pixels")
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("expected a whole image, such as PNG or JPEG") from None
    paper = Image.new("RGBA", picture.size, "white")
    grey = np.asarray(Image.alpha_composite(paper, picture).convert("L"), dtype=float) / 255
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(border))
    if ink.max() < 0.2:
        raise ValueError("expected a digit that differs from its background; all is one shade")
    ink = np.clip(ink / ink.max(), 0, 1)
    rows, columns = (np.flatnonzero((ink > 0.4).any(axis=axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(ink.shape)
    square = np.zeros((side, side))
    top, left = (side - ink.shape[0]) // 2, (side - ink.shape[1]) // 2
    square[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    cells = Image.fromarray(square.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.clip(np.asarray(cells, dtype=float) * FULL, 0, FULL)


def _uploads(value: Any) -> list[tuple[str, bytes]]:
    """Name and content of uploaded files, from either form of ``FileUpload.value``."""
    if isinstance(value, dict):  # ipywidgets 7: name -> file
        return [(name, bytes(file["content"])) for name, file in value.items()]
    return [(file["name"], bytes(file["content"])) for file in value]


def _shade(level: int) -> ipywidgets.Widget:
    light = round(255 * (1 - level / FULL))
    return ipywidgets.ButtonStyle(button_color=f"rgb({light}, {light}, {light})")
