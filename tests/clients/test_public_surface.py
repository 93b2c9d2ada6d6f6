"""The public surface is `safelight.__all__`, and importing it costs little."""

from __future__ import annotations

import subprocess
import sys

import safelight
from tests.clients.processes import ROOT

PUBLIC = [
    "Accepted",
    "Adapter",
    "AdapterReport",
    "AsyncClient",
    "CheckpointError",
    "Client",
    "DeadlineExceededError",
    "DeadlineUnreachableError",
    "DownloadError",
    "EmbeddedStack",
    "Event",
    "FieldViolation",
    "FingerprintMismatchError",
    "FluxImagePipeline",
    "FluxPipelineConfig",
    "GeneratedImage",
    "GenerationOptions",
    "GenerationResult",
    "InternalError",
    "InvalidRequestError",
    "LeaseExpiredError",
    "LoraConfig",
    "Model",
    "ModelRestartingError",
    "NonFiniteError",
    "OutOfMemoryError",
    "OverloadedError",
    "Preview",
    "Progress",
    "Queued",
    "Receipt",
    "RequestCancelledError",
    "RetryPolicy",
    "SDImagePipeline",
    "SDPipelineConfig",
    "SDXLImagePipeline",
    "SDXLPipelineConfig",
    "SafelightError",
    "StageDrainingError",
    "StageSeconds",
    "StageUnavailableError",
    "TensorCorruptError",
    "UnknownAdapterError",
    "UnknownModelError",
    "UnsupportedError",
    "VideoReader",
    "WanPipelineConfig",
    "WanVideoPipeline",
    "fetch_model",
    "load_video",
    "save_video",
]


def test_the_public_names_are_these() -> None:
    assert safelight.__all__ == PUBLIC


def test_the_public_names_are_sorted_and_exist() -> None:
    assert sorted(safelight.__all__) == safelight.__all__
    assert all(hasattr(safelight, name) for name in safelight.__all__)


def test_importing_brings_no_warning_no_torch_and_no_command_line() -> None:
    script = "import safelight, sys; print(sorted({'torch', 'typer', 'rich', 'transformers'} & set(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT / "clients" / "python")}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
