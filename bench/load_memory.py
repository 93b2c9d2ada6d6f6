"""Peak memory of loading a UNet of Stable Diffusion 1.5's real sizes, ours against diffusers' `from_pretrained`.

A file of 860 M random weights (3.2 GiB in float32, half of it in float16 and bfloat16) is loaded by a process of its
own for each case. "peak" is the kernel's peak of the resident set (VmHWM), which counts pages of the mapped file that
were read; "anonymous" and "file" are the peaks of what can't be dropped and of those pages, sampled every 5 ms; "left"
is the resident set once it is loaded. All are less what the process had before. The ratio is that of the peak, the
stricter figure, to the weights' bytes in the dtype asked for.

    OMP_WAIT_POLICY=PASSIVE python -m bench.load_memory
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DConditionModel

from bench.real_width import SD15_UNET
from services.common.manifest import Part
from services.denoiser.models.sd_unet import load_sd_unet
from services.modeling.components import read_json
from services.modeling.placement import place, placement_of
from services.modeling.weights import open_checkpoint

_GIB = 2**30
_TINY = {"block_out_channels": (32, 64, 64, 64)}
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Case:
    """One way to load.

    Args:
        stored: dtype of the file.
        loaded: dtype asked for.
        who: "ours", "ours, budget 0" (no memory for faster forms of the weights), or "diffusers".
    """

    stored: str
    loaded: str
    who: str


CASES = (
    Case("float32", "float32", "ours"),
    Case("float32", "float32", "ours, budget 0"),
    Case("float32", "float32", "diffusers"),
    Case("float16", "float32", "ours"),
    Case("float16", "float32", "ours, budget 0"),
    Case("float16", "float32", "diffusers"),
    Case("bfloat16", "bfloat16", "ours"),
    Case("bfloat16", "bfloat16", "ours, budget 0"),
    Case("bfloat16", "bfloat16", "diffusers"),
    Case("bfloat16", "float8_e4m3fn", "ours"),
)


@dataclass(frozen=True)
class Memory:
    """Bytes: of the weights in the dtype asked for, the peaks of loading them, and what is left after it."""

    weights: int
    peak: int
    anonymous: int
    file: int
    left: int


def main() -> None:
    """Measures every case in a process of its own and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a UNet of 32 to 64 channels, to try the script out")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        folder, case = options.load
        sys.stdout.write(json.dumps(asdict(measure(Path(folder), Case(**json.loads(case))))))
    elif options.save:
        save(Path(options.save[0]), options.save[1], tiny=options.tiny)
    else:
        compare(CASES[1:3] if options.tiny else CASES, ["--tiny"] if options.tiny else [])


def compare(cases: Sequence[Case], flags: list[str]) -> None:
    """The cases, each file written when it is first needed."""
    sys.stdout.write(f"{'':42}{'weights':>9}{'peak':>8}{'anonymous':>11}{'file':>7}{'left':>7}  GiB{'ratio':>8}\n")
    with tempfile.TemporaryDirectory() as root:
        for case in cases:
            folder = Path(root) / case.stored
            if not folder.exists():
                in_child([*flags, "--save", str(folder), case.stored])
            memory = Memory(**json.loads(in_child(["--load", str(folder), json.dumps(asdict(case))])))
            sys.stdout.write(line(case, memory))
            sys.stdout.flush()


def in_child(arguments: list[str]) -> bytes:
    """What this script prints with these arguments."""
    command = [sys.executable, "-m", "bench.load_memory", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def save(folder: Path, dtype: str, *, tiny: bool) -> None:
    """Writes a UNet of random weights in diffusers' layout, in one file."""
    unet = UNet2DConditionModel(**(SD15_UNET | (_TINY if tiny else {})))
    unet.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100GB")


def measure(folder: Path, case: Case) -> Memory:
    """Loads in this process, which has done nothing else."""
    load = _diffusers if case.who == "diffusers" else _ours
    torch.ones(64, 64) @ torch.ones(64, 64)  # what torch's libraries take for themselves
    Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
    resident = memory_status("VmRSS")
    with Sampler() as sampler:
        network, weights = load(folder, case)
    left = memory_status("VmRSS") - resident
    del network
    return Memory(weights, memory_status("VmHWM") - resident, sampler.more("RssAnon"), sampler.more("RssFile"), left)


def _ours(folder: Path, case: Case) -> tuple[object, int]:
    part = Part(dtype=case.loaded, memory_budget=0 if case.who == "ours, budget 0" else None)
    placement = placement_of(part, torch.device("cpu"))
    config = read_json(folder / "config.json")
    unet = load_sd_unet(
        open_checkpoint(folder),
        config,
        device=placement.loading_device,
        dtype=placement.dtype,
        float8=placement.float8,
    )
    placed = place(unet, placement, unet.weight_blocks(), unet.full_precision())
    return placed, placed.weights.account.resident_bytes


def _diffusers(folder: Path, case: Case) -> tuple[object, int]:
    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=getattr(torch, case.loaded))
    return unet, sum(parameter.nbytes for parameter in unet.parameters())


class Sampler:
    """Looks at the kinds of memory of this process again and again, on a thread of its own."""

    def __init__(self) -> None:
        self._before = self._looked()
        self._peaks = dict(self._before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def more(self, kind: str) -> int:
        """Most bytes of a kind beyond those that there were at first."""
        return self._peaks[kind] - self._before[kind]

    def _looked(self) -> dict[str, int]:
        return {kind: memory_status(kind) for kind in ("RssAnon", "RssFile")}

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(_SAMPLE_SECONDS)
            self._peaks = {kind: max(self._peaks[kind], size) for kind, size in self._looked().items()}


def memory_status(field: str, process: int | Literal["self"] = "self") -> int:
    """A field of a process's status in /proc, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1]) * 1024


def line(case: Case, memory: Memory) -> str:
    """A row of the table."""
    name = f"{case.stored} file, {case.loaded}: {case.who}"
    sizes = "".join(
        f"{size / _GIB:{width}.2f}"
        for size, width in zip(
            (memory.weights, memory.peak, memory.anonymous, memory.file, memory.left), (9, 8, 11, 7, 7), strict=True
        )
    )
    return f"{name:42}{sizes}     {memory.peak / memory.weights:8.2f}\n"


if __name__ == "__main__":
    main()
