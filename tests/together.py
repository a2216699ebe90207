"""Starts two `polder` on one folder, for every pair of the commands that write. At least one must do its work. The other
does its work before or after it, or is told in one line that the folder is in use or taken (exit status 2). What was
written must equal the results of an undisturbed run, to the bit.

    python3 tests/together.py target/release/polder --rounds 100 --seed 1

Needs Python's standard library alone."""

import itertools
import pathlib
import shutil
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from small_run import Setup, Wrong, partial_files, work  # noqa: E402


def together(setup, names, folder, pause):
    """Runs two commands at a time, and returns which of them were told that they cannot."""
    for name in sorted(set(names), key=lambda name: name != "resume"):
        setup.prepare(name, folder)
    processes = []
    for name in names:
        processes.append(setup.start(setup.arguments(name, folder)))
        time.sleep(pause)
    told = []
    for name, process in zip(names, processes):
        _, error = process.communicate()
        lines = error.decode().splitlines()
        reasons = ("another process writes to it", "already holds")
        if process.returncode == 2 and len(lines) == 1 and any(reason in lines[0] for reason in reasons):
            told.append(name)
        elif process.returncode != 0:
            raise Wrong(f"{name} of {names}: exit status {process.returncode}: {error.decode()}")
    return told


def main():
    with work(__doc__, "rounds", 100) as (rounds, setup, chance):
        told_of = {}
        for round in range(rounds):
            for names in itertools.combinations_with_replacement(Setup.NAMES, 2):
                names = list(names)
                chance.shuffle(names)
                folder = setup.work / "together"
                told = together(setup, names, folder, chance.choice([0, 0, chance.uniform(0, 0.2)]))
                if len(told) == 2:
                    raise Wrong(f"{names}: neither did its work")
                for name in set(names):
                    # A command of which one was told and the other was not has results, as one that ran alone has.
                    if names.count(name) > told.count(name):
                        setup.compare(name, folder)
                if partial_files(folder):
                    raise Wrong(f"{names}: left behind: {', '.join(partial_files(folder))}")
                shutil.rmtree(folder)
                told_of.setdefault(" + ".join(sorted(names)), []).append(len(told))
        for pair, told in told_of.items():
            print(f"{pair:<24} {len(told)} rounds, one was told in {sum(told)}")
        print("all results equal those of undisturbed runs")


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"error: {wrong}")
