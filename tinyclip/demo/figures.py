"""The report's pictures: curves, a similarity matrix, scenes with their captions."""

import base64
import io
from typing import Any

import torch

from tinyclip.data.digits import captions
from tinyclip.demo.recipe import TEACHER, VARIANTS
from tinyclip.demo.runs import Scenes, evaluating, reader
from tinyclip.demo.summary import Row, mean_curve, select
from tinyclip.eval import encode_images, encode_texts
from tinyclip.models import CLIP

COLOURS = {
    TEACHER: "#6b7280",
    "scratch": "#d97706",
    "affinity": "#7c3aed",
    "inherited": "#0891b2",
    "both": "#16a34a",
}


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure that no window system is needed for."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the demo's curves need matplotlib: pip install 'tinyclip[demo]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def curves(rows: list[Row], noise: float = 0.0) -> bytes:
    """Accuracy against steps of the students, an SVG; the thick line is the mean of the seeds."""
    figure, axes = _axes(7, 3.6)
    for variant in VARIANTS:
        runs = select(rows, variant.name, noise)
        colour = COLOURS[variant.name]
        for run in runs if len(runs) > 1 else ():
            axes.plot(*zip(*run["curve"], strict=True), color=colour, alpha=0.3, linewidth=0.8)
        label = f"{variant.name}: {variant.words}"
        axes.plot(*zip(*mean_curve(runs), strict=True), color=colour, label=label)
    teacher = select(rows, TEACHER)
    last = sum(run["curve"][-1][1] for run in teacher) / len(teacher)
    axes.axhline(last, color=COLOURS[TEACHER], linestyle=":", label="the teacher, in the end")
    axes.set(xlabel="step", ylabel="validation scenes read exactly", ylim=(0, 1))
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small", loc="best")
    written = io.BytesIO()
    # Neither a date nor random names: the same runs give the same file.
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "tinyclip", "svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def similarities(model: CLIP, scenes: Scenes, count: int = 40) -> bytes:
    """Cosines of unseen scenes (rows) with their own captions (columns), a PNG."""
    labels = scenes.labels[:count]
    with evaluating(model):
        image = encode_images(model, scenes.images[:count])
        texts = [captions()[label] for label in labels.tolist()]
        text = encode_texts(model, reader().tokenizer, texts)
    figure, axes = _axes(5, 4.2)
    shown = axes.imshow((image @ text.T).cpu().numpy(), cmap="magma")
    axes.set(xlabel="caption", ylabel="scene")
    figure.colorbar(shown, label="cosine")
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=120, metadata={"Software": None})
    return written.getvalue()


def guesses(model: CLIP, scenes: Scenes, count: int = 8, best: int = 3) -> list[dict[str, Any]]:
    """Unseen scenes and the captions that a model finds most like them.

    Returns:
        For each scene ``png`` (bytes), ``truth`` and ``guesses``: (caption, probability) pairs.
    """
    with evaluating(model), torch.no_grad():
        image = encode_images(model, scenes.images[:count])
        text = encode_texts(model, reader().tokenizer, captions())
        odds = (model.logit_scale.exp() * image @ text.T).softmax(dim=1)
        top = odds.topk(best, dim=1)
    rows = zip(
        scenes.images, scenes.labels.tolist(), top.values.tolist(), top.indices.tolist(),
        strict=False,
    )  # fmt: skip
    return [
        {
            "png": picture(pixels),
            "truth": captions()[label],
            "guesses": [(captions()[i], p) for i, p in zip(indices, values, strict=True)],
        }
        for pixels, label, values, indices in rows
    ]


def picture(pixels: torch.Tensor, times: int = 6) -> bytes:
    """A scene as a model reads it, (3, 16, 32) in [-1, 1] -> a PNG, enlarged."""
    from PIL import Image

    bits = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(bits).resize((32 * times, 16 * times), Image.Resampling.NEAREST)
    written = io.BytesIO()
    image.save(written, format="png")
    return written.getvalue()


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
