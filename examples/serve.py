"""Classify images over HTTP.

pip install fastapi uvicorn
python examples/serve.py --model mine.mindir [--port 8000]
curl --data-binary @photo.jpg 'http://127.0.0.1:8000/classify?top_k=1'
"""

import sys
from pathlib import Path

from jsonargparse.typing import PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.cli import parse, require_free_port  # noqa: E402
from src.device import prepare_environment  # noqa: E402
from src.errors import UserError, executable  # noqa: E402

MAX_BYTES = 10_000_000  # of a request
MAX_PIXELS = 25_000_000  # of an image
MAX_REQUESTS = 32  # at once; uvicorn's limit_concurrency would count idle connections too


def build_app(predictor):
    """Build the application: POST /classify takes a file's content and returns its best classes.

    Args:
        predictor: a `src.deploy.Predictor`.
    """
    from fastapi import Depends, FastAPI, HTTPException, Query, Request

    app = FastAPI()
    running = 0

    async def take_place():
        nonlocal running
        if running >= MAX_REQUESTS:
            raise HTTPException(503, "too many requests at once; send it again later")
        running += 1
        try:
            yield
        finally:
            running -= 1

    async def read_body(request: Request) -> bytes:
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_BYTES:
                raise HTTPException(413, f"more than {MAX_BYTES} bytes")
        return bytes(content)

    # A plain function: FastAPI runs it in a thread and serves other requests meanwhile.
    @app.post("/classify", dependencies=[Depends(take_place)])
    def classify(
        content: bytes = Depends(read_body), top_k: int = Query(5, ge=1, le=1000)
    ) -> list[dict]:
        result = next(predictor.stream([content], top_k))
        if isinstance(result, UserError):
            raise HTTPException(422, str(result))
        return [candidate._asdict() for candidate in result]

    return app


@executable
def main(argv: list[str]) -> None:
    """Serve until Ctrl-C."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--model", type=str, required=True, help="an exported file, weights or a run's folder"
        )
        parser.add_argument("--config", type=str, help="recipe of weights without a config.yaml")
        parser.add_argument("--port", type=PositiveInt, default=8000, help="to listen on")

    description = "Classify images over HTTP."
    _, arguments = parse(argv, "examples/serve.py", description, add_arguments, schema=None)
    require_free_port(arguments.port)
    prepare_environment()
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError:
        raise UserError("examples/serve.py needs FastAPI: pip install fastapi uvicorn") from None
    from src.deploy import Predictor

    predictor = Predictor(arguments.model, arguments.config, batch_size=1, max_pixels=MAX_PIXELS)
    app = build_app(predictor)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port)


if __name__ == "__main__":
    main()
