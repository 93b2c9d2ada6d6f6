"""`make bench`: the figures of the README, each measured side by side with a peer in one run.

python -m bench          # an hour on two quiet cores
python -m bench --quick  # tiny sizes: whether the scripts run, not how fast anything is
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

_FULL = (
    ("bench.unet_step", "--dtype", "bfloat16", "--rounds", "5"),
    ("bench.unet_step", "--dtype", "float32", "--rounds", "3"),
    ("bench.unet_step", "--model", "sdxl", "--dtype", "bfloat16", "--rounds", "3"),
    ("bench.unet_step", "--model", "sdxl", "--layers", "2", "--dtype", "float32", "--rounds", "3"),
    ("bench.load_memory",),
    ("bench.offload",),
    ("bench.shared_weights",),
    ("bench.flux_step", "--dtype", "bfloat16", "--rounds", "5"),
    ("bench.flux_step", "--dtype", "float32", "--rounds", "3"),
    ("bench.wan_step", "--dtype", "bfloat16", "--rounds", "5"),
    ("bench.wan_step", "--dtype", "float32", "--rounds", "5"),
    ("bench.shared_tokens", "--dtype", "float32", "--rounds", "5"),
    ("bench.vae_decode", "--dtype", "bfloat16", "--rounds", "3"),
    ("bench.wan_vae", "--dtype", "bfloat16", "--rounds", "3"),
    ("bench.wan_vae", "--dtype", "float32", "--rounds", "2"),
    ("bench.wan_vae", "--dtype", "bfloat16", "--encode", "--rounds", "3"),
    ("bench.wan_vae", "--dtype", "float32", "--encode", "--rounds", "2"),
    ("bench.wan_vae", "--dtype", "bfloat16", "--peaks"),
    ("bench.film_memory", "--dtype", "bfloat16"),
    ("bench.split_overhead", "--rounds", "9"),
    ("bench.split_overhead", "--real-width", "--steps", "2", "--rounds", "3"),
    ("bench.step_scheduling",),
    ("bench.transport",),
    ("bench.reference_flow",),
    ("bench.serving",),
    ("bench.mixed_load",),
    ("bench.overload",),
    ("bench.kills",),
    ("bench.rolling_restarts",),
)
QUICK = (
    ("bench.unet_step", "--tiny", "--size", "128", "--rounds", "1"),
    ("bench.unet_step", "--model", "sdxl", "--tiny", "--size", "128", "--rounds", "1"),
    ("bench.load_memory", "--tiny"),
    ("bench.offload", "--tiny", "--steps", "1"),
    ("bench.shared_weights", "--tiny"),
    ("bench.flux_step", "--tiny", "--rounds", "1"),
    ("bench.wan_step", "--tiny", "--rounds", "1"),
    ("bench.shared_tokens", "--tiny", "--rounds", "1"),
    ("bench.lora_step", "--tiny", "--size", "64", "--rounds", "1"),
    ("bench.vae_decode", "--tiny", "--rounds", "1"),
    ("bench.wan_vae", "--tiny", "--rounds", "1"),
    ("bench.wan_vae", "--tiny", "--rounds", "1", "--encode"),
    ("bench.wan_vae", "--tiny", "--peaks"),
    ("bench.film_memory", "--tiny"),
    ("bench.split_overhead", "--steps", "2", "--rounds", "1"),
    ("bench.step_scheduling", "--requests", "50", "--seeds", "1"),
    ("bench.transport", "--largest-mib", "1", "--rounds", "1"),
    ("bench.reference_flow", "--tensor-mib", "8", "--pictures", "2"),
    ("bench.serving", "--rounds", "1", "--requests", "3", "--clients", "2", "--most-steps", "4"),
    ("bench.mixed_load", "--requests", "4", "--most-steps", "8", "--rounds", "1"),
    ("bench.overload", "--rounds", "1", "--seconds", "2", "--steps", "2"),
    ("bench.kills", "--kills", "1", "--freezes", "0", "--denoisers", "2", "--clients", "2", "--requests", "2"),
    ("bench.rolling_restarts", "--restarts", "1", "--quiet-seconds", "1", "--clients", "1", "--requests", "2"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    for command in QUICK if parser.parse_args().quick else _FULL:
        sys.stdout.write(f"\n$ python -m {' '.join(command)}\n")
        sys.stdout.flush()
        subprocess.run([sys.executable, "-m", *command], env=environment, check=True)


if __name__ == "__main__":
    main()
