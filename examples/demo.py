"""A page that classifies an image and shows what the network looks at.

    pip install gradio
    python examples/demo.py [--model WEIGHTS [--config RECIPE]] [--port 7860]

WEIGHTS is a weight file or a run's folder; by default the pretrained cvt_nano on CIFAR-10.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from jsonargparse.typing import PositiveInt
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.cli import parse, require_free_port  # noqa: E402
from src.device import prepare_environment  # noqa: E402
from src.errors import UserError, executable, join_names  # noqa: E402


def explain(predictor, image: str | Image.Image) -> tuple[dict[str, float], Image.Image]:
    """Return the probability of each class, by name, and a picture of the attention.

    Args:
        predictor: a `src.deploy.Predictor` of weights, with runtime mode "pynative": attention maps
            are recorded by hooks, which a compiled graph does not run.
        image: a file or an image, of any size.
    """
    from src.deploy.attention_image import save_attention

    inputs = predictor.prepare(image)
    candidates = predictor.classify(inputs[None], top_k=5)[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attention.png"
        save_attention(predictor, inputs, "image", path)
        with Image.open(path) as picture:
            picture.load()
    return {candidate.name: candidate.probability for candidate in candidates}, picture


def build_page(predictor):
    """Build the page: an image to drop, the classes and the attention map."""
    import gradio

    def run(image: str | None):
        if image is None:  # the cross above the image
            return None, None
        try:
            return explain(predictor, image)
        except UserError as error:
            raise gradio.Error(str(error)) from None

    return gradio.Interface(
        run,
        # The file itself: Gradio's conversion to RGB makes images with 16 bits nearly white.
        gradio.Image(type="filepath", image_mode=None, label="image"),
        [gradio.Label(label="classes"), gradio.Image(label="attention", format="png")],
        title="CvT",
        description=f"Classes: {join_names(predictor.class_names or ['unnamed'], 20)}",
        flagging_mode="never",
        analytics_enabled=False,
    )


@executable
def main(argv: list[str]) -> None:
    """Serve the page until Ctrl-C."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--model", type=str, help="weights or a run's folder; default: cvt_nano on CIFAR-10"
        )
        parser.add_argument("--config", type=str, help="recipe of weights without a config.yaml")
        parser.add_argument("--port", type=PositiveInt, default=7860, help="of the page")

    description = "Serve a page that classifies an image and shows the attention."
    _, arguments = parse(argv, "examples/demo.py", description, add_arguments, schema=None)
    if arguments.model and Path(arguments.model).suffix in (".mindir", ".onnx"):
        raise UserError(
            f"--model {arguments.model}: is an exported file, whose attention is not accessible; "
            "give the weights"
        )
    require_free_port(arguments.port)
    prepare_environment()
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("examples/demo.py needs Gradio: pip install gradio") from None
    from src.deploy import Predictor
    from src.weights import pretrained_folder

    model = arguments.model or pretrained_folder("cvt_nano", "cifar10")
    predictor = Predictor(model, arguments.config, runtime={"mode": "pynative"})
    explain(predictor, Image.new("RGB", (64, 64)))  # an error if it has no class token to look from
    page = build_page(predictor)
    page.launch(server_name="127.0.0.1", server_port=arguments.port, quiet=False)


if __name__ == "__main__":
    main()
