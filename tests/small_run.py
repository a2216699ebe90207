"""A small data set, a run on it, and what of its results must be equal to the bit. For kill.py and together.py."""

import argparse
import contextlib
import json
import pathlib
import random
import shutil
import struct
import subprocess
import tempfile

# What a log says about time.
TIMES = {"seconds", "images_per_second"}


class Wrong(Exception):
    """A result that is not what it should be."""


def write_data(folder):
    """Two classes of 8x9 images in IDX files: the class decides which half is bright."""
    folder.mkdir(parents=True)
    for images, labels, count in [("train-images", "train-labels", 96), ("t10k-images", "t10k-labels", 50)]:
        classes = [sample * 7 % 3 % 2 for sample in range(count)]
        pixels = bytes(
            (pixel // 36 == label) * 120 + (sample * 31 + pixel * 17) % 97
            for sample, label in enumerate(classes)
            for pixel in range(72)
        )
        (folder / f"{images}-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 8, 9) + pixels)
        (folder / f"{labels}-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + bytes(classes))


class Setup:
    """The commands that write, each with a folder of its own for its undisturbed results."""

    NAMES = ("train", "resume", "curvature", "landscape", "report")

    def __init__(self, program, work):
        self.program, self.work = program, work
        self.data = work / "data"
        write_data(self.data)
        self.run = work / "run"
        self.begun = work / "begun"
        self.check(self.arguments("train", self.run))
        self.check(self.arguments("train", self.begun, epochs=1))
        self.expected = {}
        for name in self.NAMES:
            folder = work / "expected" / name
            self.prepare(name, folder)
            self.check(self.arguments(name, folder))
            self.expected[name] = self.results(name, folder)

    def arguments(self, name, folder, epochs=3):
        """The command that writes to a folder."""
        cpu = ["--device", "cpu", "--threads", "1"]
        of_run = ["--run", str(self.run), *cpu, "--out", str(folder)]
        lines = ["--epochs", str(epochs), "--batch-size", "16", "--log-every", "1", "--curvature-every", "1"]
        measures = ["--curvature-probes", "2", "--curvature-measures", "grad-norm,trace"]
        return {
            "train": ["train", "--data", str(self.data), "--model", "resnet8", *cpu, *lines, *measures,
                      "--out", str(folder)],
            "resume": ["train", "--resume", str(folder), "--epochs", str(epochs)],
            "curvature": ["curvature", *of_run, "--batch-size", "48", "--measure",
                          "grad-norm,trace,top-eigenvalues,spectrum", "--probes", "3", "--steps", "8", "--top", "1"],
            "landscape": ["landscape", *of_run, "--points", "5", "--samples", "48"],
            "report": ["report", str(self.run), "--out", str(folder / "page.html")],
        }[name]

    def prepare(self, name, folder):
        """Makes what the command needs to find in its folder."""
        if name == "resume":
            shutil.copytree(self.begun, folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)

    def start(self, arguments):
        return subprocess.Popen(
            [self.program, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def check(self, arguments):
        """Runs a command to its end, which must be a good one."""
        process = self.start(arguments)
        _, error = process.communicate()
        if process.returncode != 0:
            raise Wrong(f"{' '.join(arguments)}: exit status {process.returncode}: {error.decode()}")

    def results(self, name, folder):
        """What the command found, without what says when."""
        if name in ("train", "resume"):
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            log = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
            return {
                "config.toml": (folder / "config.toml").read_bytes(),
                "model.safetensors": (folder / "model.safetensors").read_bytes(),
                "checkpoint": checkpoint(folder / "checkpoint" / "state.safetensors"),
                "log.jsonl": log,
            }
        if name == "report":
            names = ["page.html"]
        elif name == "curvature":
            names = ["curvature.json", "curvature.csv", "spectrum.csv", "spectrum.svg", "spectrum.png", "spectrum.pdf"]
        else:
            names = ["landscape.json", "landscape.csv", "direction-1.safetensors", "direction-2.safetensors",
                     "loss.npy", "accuracy.npy"]
            names += [path.name for path in folder.iterdir() if path.suffix in (".png", ".svg", ".pdf")]
            if len(names) < 8:
                raise Wrong(f"{folder}: pictures are missing: {names}")
        return {name: (folder / name).read_bytes() for name in sorted(names)}

    def compare(self, name, folder):
        """Checks the results in a folder against those of an undisturbed run."""
        found, expected = self.results(name, folder), self.expected[name]
        different = [key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key)]
        if different:
            raise Wrong(f"{name}: {folder}: other than undisturbed: {', '.join(sorted(different))}")


def checkpoint(path):
    """Tensors and steps of a checkpoint, without its seconds and the checksum over all."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    return header, metadata["settings"], metadata["step"], data[8 + length :]


def partial_files(folder):
    return [str(path) for path in pathlib.Path(folder).rglob("*.partial")]


@contextlib.contextmanager
def work(description, count, default):
    """Reads the command line: the program, how many (`--kills` or `--rounds`), and a seed. Gives the number, the small
    run in a temporary folder, and the random numbers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument(f"--{count}", dest="count", type=int, default=default)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        yield options.count, Setup(options.program, pathlib.Path(folder)), random.Random(options.seed)
