"""The README's pictures: ``python scripts/pictures.py`` writes docs/pictures.

The learning curve is drawn from ``data/results/wild_digits.json``. The two views of JupyterLab are
screenshots that the browser test left in ``artifacts/browser`` (``make test`` with Chromium).
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from tlcourse import arms, plots

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
ARMS = {
    "probe, then fine-tune": "pre-trained: probe, then fine-tune",
    "fine-tune": "pre-trained: fine-tune",
    "probe": "pre-trained: frozen, linear probe",
    "scratch": "from scratch, tuned",
    "pixels": "logistic regression on pixels",
    "random features": "random frozen features",
}
SCREENSHOTS = {"lesson_01_explorer.png": "lesson_01.png", "exercise_03.png": "exercise_03.png"}


def draw_learning_curve(path: Path) -> None:
    """Accuracy over labels for every arm, with 95 % intervals."""
    found = arms.recorded("wild_digits")
    curves = {text: [found[n].scores[arm] for n in found] for arm, text in ARMS.items()}
    figure, ax = plots.subplots(figsize=(9.0, 4.2))
    plots.plot_learning_curve(list(found), curves, chance=0.1, ax=ax)
    ax.set(ylim=(0, 1), title="Reading wild digits from a few labels", ylabel="test accuracy")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="mean of 5 draws, 95 % interval")
    figure.savefig(path, dpi=110)


def copy_screenshots() -> list[str]:
    """Shrink the screenshots to 1,000 pixels of width; returns what is missing."""
    from PIL import Image

    missing = []
    for name, target in SCREENSHOTS.items():
        source = ROOT / "artifacts" / "browser" / name
        if not source.is_file():
            missing.append(str(source.relative_to(ROOT)))
            continue
        with Image.open(source) as picture:
            picture.thumbnail((1000, 1400))
            picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
                PICTURES / target, optimize=True
            )
    return missing


def main() -> int:
    PICTURES.mkdir(parents=True, exist_ok=True)
    draw_learning_curve(PICTURES / "learning_curve.png")
    missing = copy_screenshots()
    for name in missing:
        print(f"missing: {name}; run the browser test first", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
