#!/usr/bin/env python3
"""A table of test accuracy and flatness: five methods over several seeds.

    cargo build --release
    python3 benches/flatness.py --data cifar-10        # a folder with CIFAR-10's binary files

Every run is one `polder train` and one `polder curvature`; both commands are printed. Their results are saved in the
run's folder, and a command whose result is saved is not run again.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

METHODS = {
    "SGD": "--optimizer sgd",
    "SAM": "--optimizer sam --rho 0.05",
    # With the default alpha of 0.1 the term log A makes the outputs flat on so short a run.
    "CR-SAM": "--optimizer cr-sam --rho 0.1 --alpha 0.02",
    "GNR": "--optimizer gnr --hvp exact --rho 0.1 --alpha 0.1",
    "SA-SAM": "--optimizer sa-sam --eta0 0.1 --theta0 1",
}


def call(command, kept):
    """What a command prints; read from the file `kept` if the same command was run before."""
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["command"] != command:
            sys.exit(f"{kept}: written by another command; choose another --out")
        return found["printed"]
    print("$", shlex.join(command), file=sys.stderr, flush=True)
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        sys.exit(ended.returncode)
    printed = json.loads(ended.stdout)
    kept.write_text(json.dumps({"command": command, "printed": printed}))
    return printed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--polder", default="target/release/polder")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="runs/flatness", type=Path)
    parser.add_argument("--train-size", default=10_000, type=int)
    parser.add_argument("--epochs", default=6, type=int)
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--probes", default=20, type=int)
    arguments = parser.parse_args()

    rows = {name: [] for name in METHODS}
    for seed in range(arguments.seeds):
        for name, options in METHODS.items():
            run = arguments.out / f"{name.lower()}-{seed}"
            common = ["--data", arguments.data, "--json"]
            size = ["--train-size", str(arguments.train_size), "--epochs", str(arguments.epochs)]
            train = [arguments.polder, "train", *options.split(), *size, "--seed", str(seed)]
            trained = call([*train, *common, "--out", str(run)], run / "trained.json")
            measure = [arguments.polder, "curvature", "--model", "resnet8", "--samples", "1000"]
            init = ["--init", str(run / "model.safetensors"), "--probes", str(arguments.probes)]
            measures = call([*measure, *init, *common], run / "measured.json")["measures"]
            values = [measures[measure]["value"] for measure in ("trace", "grad-norm", "normalized-trace")]
            rows[name].append([100 * trained["test"]["accuracy"], *values])
            print(f"{name} {seed}:", *(f"{value:.4g}" for value in rows[name][-1]), file=sys.stderr, flush=True)

    print("| method | test accuracy, % | Tr(H) | ‖∇L‖ | Tr(H)/‖∇L‖ |")
    print("|---|---|---|---|---|")
    for name, runs in rows.items():
        cells = []
        for values, digits in zip(zip(*runs), (2, 0, 3, 0)):
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
