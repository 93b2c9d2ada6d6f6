"""Runs a function on every rank of a group of processes, as the denoiser's ranks do, and brings the results back."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed, multiprocessing

from services.common.parallel_degrees import ParallelDegrees
from services.modeling.parallel.mesh import mesh_of

TIMEOUT_SECONDS = 120


def on_ranks(degrees: ParallelDegrees, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(mesh, *args)` returns on each rank, in order; `work` must be importable (defined at module level).

    Raises:
        AssertionError: it failed on a rank; with that rank's traceback.
    """
    with TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [
            context.Process(target=_run, args=(Path(folder), rank, degrees, work, args))
            for rank in range(degrees.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT_SECONDS)
            process.kill()
        outcomes = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(degrees.ranks)]
    failures = [trace for _, trace in outcomes if trace]
    assert not failures, "\n".join(failures)
    return [result for result, _ in outcomes]


def _run(folder: Path, rank: int, degrees: ParallelDegrees, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    outcome: tuple[Any, str]
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=degrees.ranks
        )
        outcome = work(mesh_of(degrees, torch.device("cpu")), *args), ""
    except Exception:
        outcome = None, f"rank {rank}: {traceback.format_exc()}"
    torch.save(outcome, folder / f"{rank}.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()
