"""Draw docs/figures/architecture.png, CvT-13 at 224 px: `python docs/figures/architecture.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

CONVOLUTION, ATTENTION, PLAIN, TOKEN, INK = "#f4b26b", "#9cc3e6", "#e9ecef", "#d98cb3", "#263238"
STAGES = [  # convolution, token grid, channels, heads, blocks
    ("7 × 7 convolution, stride 4", "56 × 56", 64, 1, 1),
    ("3 × 3 convolution, stride 2", "28 × 28", 192, 3, 2),
    ("3 × 3 convolution, stride 2", "14 × 14", 384, 6, 10),
]


def draw_box(axes: Axes, x: float, y: float, w: float, h: float, text: str, color: str, **style):
    """Draw a rounded box with its lower left corner at (x, y) and centred text."""
    shape = {"boxstyle": "round,pad=0,rounding_size=0.12", "ec": INK, "lw": 1.1, "fc": color}
    axes.add_patch(FancyBboxPatch((x, y), w, h, **{**shape, **style}))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=10, color=INK)


def draw_arrow(axes: Axes, *points: tuple[float, float]):
    """Draw a line through the points that ends in an arrow head."""
    xs, ys = zip(*points[:-1])
    axes.plot(xs, ys, color=INK, lw=1.3, solid_joinstyle="round")
    style = {"arrowstyle": "-|>", "lw": 1.3, "color": INK, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)


def draw_network(axes: Axes):
    """Draw image, three stages and head in the upper half."""
    draw_box(axes, 0.1, 6.0, 1.5, 1.5, "image\n3 × 224 × 224", PLAIN)
    x = 2.1
    for number, (kernel, size, channels, heads, blocks) in enumerate(STAGES, 1):
        draw_arrow(axes, (x - 0.5, 6.75), (x, 6.75))
        frame = {"lw": 1.0, "ls": (0, (4, 3)), "ec": "#78909c"}
        draw_box(axes, x, 5.05, 3.5, 3.75, "", "white", **frame)
        axes.text(x + 0.2, 8.35, f"Stage {number}", fontsize=12, weight="bold", color=INK)
        embedding = f"Convolutional token embedding\n{kernel}\nLayerNorm"
        draw_box(axes, x + 0.2, 6.9, 3.1, 1.25, embedding, CONVOLUTION)
        draw_arrow(axes, (x + 1.75, 6.9), (x + 1.75, 6.45))
        plural = "block" if blocks == 1 else "blocks"
        transformer = f"{blocks} transformer {plural}, {heads} head{'s' * (heads > 1)}"
        draw_box(axes, x + 0.2, 5.65, 3.1, 0.8, transformer, ATTENTION)
        shape = f"{size} tokens × {channels}"
        axes.text(x + 1.75, 5.32, shape, ha="center", va="center", fontsize=10, color=INK)
        if number == 3:
            draw_box(axes, x + 1.95, 6.5, 1.3, 0.34, "+ class token", TOKEN, lw=0.9)
        x += 4.0
    draw_arrow(axes, (x - 0.5, 6.75), (x, 6.75))
    draw_box(axes, x, 5.9, 1.75, 1.7, "class token\nLayerNorm\nLinear\n1,000 logits", TOKEN)


def draw_block(axes: Axes):
    """Draw one transformer block with its convolutional projection in the lower half."""
    draw_box(axes, 0.1, 0.1, 15.75, 4.3, "", "#fafafa", lw=0.8, ec="#b0bec5")
    title = "Transformer block with convolutional projection (stage 1: N = 3,136 tokens)"
    axes.text(0.35, 4.02, title, fontsize=12, weight="bold", color=INK)
    axes.text(0.35, 2.28, "tokens", fontsize=10, color=INK, ha="left")
    middle = 2.1
    draw_arrow(axes, (0.35, middle), (1.3, middle))
    draw_box(axes, 1.3, middle - 0.4, 1.15, 0.8, "LayerNorm", PLAIN)
    rows = [("Q", 1, "3,136", 3.25), ("K", 2, "784", 2.1), ("V", 2, "784", 0.95)]
    for name, stride, tokens, y in rows:
        start = [(2.45, middle), (2.75, middle), (2.75, y), (3.1, y)]
        draw_arrow(axes, *(start if y != middle else [(2.45, y), (3.1, y)]))
        text = f"3 × 3 depthwise convolution\nstride {stride}, BatchNorm"
        draw_box(axes, 3.1, y - 0.36, 2.75, 0.72, text, CONVOLUTION)
        draw_arrow(axes, (5.85, y), (7.05, y))
        axes.text(6.42, y + 0.12, tokens, ha="center", fontsize=9, color=INK)
        draw_box(axes, 7.05, y - 0.3, 1.15, 0.6, f"Linear {name}", PLAIN)
        end = [(8.2, y), (8.55, y), (8.55, middle), (8.9, middle)]
        draw_arrow(axes, *(end if y != middle else [(8.2, y), (8.9, y)]))
    draw_box(axes, 8.9, middle - 0.55, 1.6, 1.1, "multi-head\nattention\nLinear", ATTENTION)
    draw_arrow(axes, (10.5, middle), (11.0, middle))
    draw_sum(axes, 11.18, middle)
    draw_arrow(axes, (0.85, middle), (0.85, 0.37), (11.18, 0.37), (11.18, middle - 0.18))
    draw_arrow(axes, (11.36, middle), (12.1, middle))
    draw_box(axes, 12.1, middle - 0.4, 1.1, 0.8, "LayerNorm", PLAIN)
    draw_arrow(axes, (13.2, middle), (13.5, middle))
    draw_box(axes, 13.5, middle - 0.55, 1.1, 1.1, "MLP, × 4\nQuick-\nGELU", PLAIN)
    draw_arrow(axes, (14.6, middle), (14.97, middle))
    draw_sum(axes, 15.15, middle)
    draw_arrow(axes, (11.7, middle), (11.7, 0.9), (15.15, 0.9), (15.15, middle - 0.18))
    draw_arrow(axes, (15.33, middle), (15.75, middle))


def draw_sum(axes: Axes, x: float, y: float):
    """Draw the addition of a residual branch."""
    axes.add_patch(plt.Circle((x, y), 0.18, fc="white", ec=INK, lw=1.1))
    axes.text(x, y - 0.01, "+", ha="center", va="center", fontsize=12, color=INK)


def main():
    figure, axes = plt.subplots(figsize=(16, 9))
    axes.set(xlim=(0, 16), ylim=(0, 9))
    axes.axis("off")
    draw_network(axes)
    draw_block(axes)
    output = Path(__file__).with_suffix(".png")
    figure.savefig(output, dpi=100, bbox_inches="tight", pad_inches=0.08)


if __name__ == "__main__":
    main()
