"""The rival: a diffusers pipeline behind HTTP that makes one picture at a time, as most people begin.

    python -m bench.diffusers_server --port 7100

POST / takes a JSON object with prompt, steps, sampler, guidance_scale and seed; the answer is a PNG. GET / answers when
the model is loaded. Encoding the PNG is not under the lock.
"""

from __future__ import annotations

import argparse
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from services.common.manifest import DEMO_MODEL_PATH

SCHEDULERS: dict[str, type[Any]] = {
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
}
"""diffusers' scheduler by our name of the sampler: those that take our timesteps, and so draw our pictures."""


class OneAtATime:
    """The demo model in a diffusers pipeline, under a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipeline: Any = StableDiffusionPipeline.from_pretrained(
            DEMO_MODEL_PATH, torch_dtype=torch.float32, safety_checker=None
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._config = self._pipeline.scheduler.config

    def draw(self, request: dict[str, Any]) -> Image.Image:
        """The picture of one request."""
        scheduler = SCHEDULERS[request["sampler"]].from_config(self._config, timestep_spacing="linspace")
        with self._lock:
            self._pipeline.scheduler = scheduler
            image: Image.Image = self._pipeline(
                request["prompt"],
                num_inference_steps=request["steps"],
                guidance_scale=request["guidance_scale"],
                generator=torch.Generator("cpu").manual_seed(request["seed"]),
            ).images[0]
        return image


class Handler(BaseHTTPRequestHandler):
    """Serves the pipeline that the server holds."""

    protocol_version = "HTTP/1.1"
    pipeline: OneAtATime

    def do_GET(self) -> None:
        """Whether it serves."""
        self._answer("text/plain", b"serving")

    def do_POST(self) -> None:
        """A picture."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        file = io.BytesIO()
        self.pipeline.draw(request).save(file, "PNG")
        self._answer("image/png", file.getvalue())

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: a line a request is of no use here."""

    def _answer(self, media_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    Handler.pipeline = OneAtATime()
    ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
