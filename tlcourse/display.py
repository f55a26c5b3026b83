"""Showing results in a notebook so that the saved file reads well without a kernel too."""

from __future__ import annotations

import base64
import html
import io
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHART_COLOURS = 8000  # more than a chart has, its softened edges included
_UNSEEN_DIFFERENCE = 0.5  # mean over the pixels, of 255 levels


def in_notebook() -> bool:
    """True in a Jupyter kernel (also Colab's), False in a plain script or terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


def publish(bundle: dict[str, Any]) -> None:
    """Show one output in the notebook.

    Args:
        bundle: MIME type -> content of the same thing; the front end takes the richest that
            it can show, and all of them are saved.
    """
    from IPython.display import display

    display(bundle, raw=True)


def show_widget(widget: Any, text: str, picture: str = "") -> None:
    """Show a widget; where there is no kernel, ``picture`` (HTML) and ``text`` stand for it."""
    if not in_notebook():
        print(text)
        return
    publish(
        {
            "application/vnd.jupyter.widget-view+json": {
                "version_major": 2,
                "version_minor": 0,
                "model_id": widget.model_id,
            },
            "text/html": f"{picture}<p><em>{text}</em></p>",
            "text/plain": text,
        }
    )


def png(figure: Figure) -> bytes:
    """A figure as PNG, at its own dpi, cropped to what is drawn, on white.

    A chart keeps 256 colours, which makes it a third as large; a figure that would look
    different in them, such as photographs, keeps all.
    """
    from PIL import Image, ImageChops, ImageStat

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(
        drawn,
        format="png",
        dpi=figure.dpi,
        bbox_inches="tight",
        facecolor="white",
        pil_kwargs={"compress_level": 1},
    )
    with Image.open(drawn) as file:
        picture = file.convert("RGB")
    if picture.getcolors(_CHART_COLOURS) is not None:
        reduced = picture.quantize(256)
        difference = ImageChops.difference(picture, reduced.convert("RGB"))
        if max(ImageStat.Stat(difference).mean) < _UNSEEN_DIFFERENCE:
            picture = reduced
    # Without matplotlib's version in it, the same picture is the same bytes.
    picture.save(packed, "PNG", optimize=True)
    return packed.getvalue()


def image_html(data: bytes, text: str) -> str:
    """An ``<img>`` with alternative text, at its size in pixels.

    Jupyter gives every ``image/png`` output the same alternative text, "Image"; inside an
    HTML output the text is ours, in JupyterLab, Colab, nbconvert and on GitHub.

    Args:
        data: a PNG file.
        text: what a reader who cannot see the picture should know.
    """
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    source = base64.b64encode(data).decode("ascii")
    return (
        f'<img alt="{html.escape(text)}" width="{width}" height="{height}" decoding="sync" '
        f'style="max-width: 100%; height: auto" src="data:image/png;base64,{source}">'
    )


def preformatted(text: str, role: str = "") -> str:
    """Printed text as HTML, every character as it is."""
    role = f' role="{role}"' if role else ""
    return f'<pre style="white-space: pre-wrap; margin: 0.5em 0"{role}>{html.escape(text)}</pre>'
