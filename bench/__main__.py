"""`make bench`: the figures of the README, each measured side by side with a peer in one run.

python -m bench          # a quarter of an hour on two quiet cores
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
    ("bench.vae_decode", "--dtype", "bfloat16", "--rounds", "3"),
    ("bench.split_overhead", "--rounds", "9"),
    ("bench.split_overhead", "--real-width", "--steps", "2", "--rounds", "3"),
)
_QUICK = (
    ("bench.unet_step", "--tiny", "--size", "128", "--rounds", "1"),
    ("bench.vae_decode", "--tiny", "--rounds", "1"),
    ("bench.split_overhead", "--steps", "2", "--rounds", "1"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    for command in _QUICK if parser.parse_args().quick else _FULL:
        sys.stdout.write(f"\n$ python -m {' '.join(command)}\n")
        sys.stdout.flush()
        subprocess.run([sys.executable, "-m", *command], env=environment, check=True)


if __name__ == "__main__":
    main()
