"""Kills `polder` with SIGKILL at random moments, lets it go on or begin again, and compares the results with those of an
undisturbed run, to the bit.

    python3 tests/kill.py target/release/polder --kills 200 --seed 1

Needs Python's standard library alone."""

import pathlib
import shutil
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from small_run import Setup, Wrong, partial_files, work  # noqa: E402


def go_on(setup, name, folder):
    """What a user does after a crash: a run is resumed if its folder holds one, everything else begins again."""
    if name in ("train", "resume") and (folder / "config.toml").exists():
        return setup.arguments("resume", folder)
    return setup.arguments(name, folder)


def is_whole(name, folder):
    """`curvature` writes curvature.json last, and has nothing left to measure where it is there."""
    return name == "curvature" and (folder / "curvature.json").exists()


def main():
    with work(__doc__, "kills", 200) as (kills, setup, chance):
        longest = {}
        for name in Setup.NAMES:
            folder = setup.work / "timed" / name
            setup.prepare(name, folder)
            begun = time.monotonic()
            setup.check(setup.arguments(name, folder))
            longest[name] = time.monotonic() - begun
        killed = dict.fromkeys(Setup.NAMES, 0)
        rounds = 0
        while sum(killed.values()) < kills:
            name = Setup.NAMES[rounds % len(Setup.NAMES)]
            folder = setup.work / "killed"
            setup.prepare(name, folder)
            arguments = setup.arguments(name, folder)
            # Several crashes in sequence, and then none.
            for _ in range(chance.randint(1, 3)):
                process = setup.start(arguments)
                time.sleep(chance.uniform(0, longest[name]))
                process.kill()
                _, error = process.communicate()
                if process.returncode == 0:
                    break
                if process.returncode != -9:
                    raise Wrong(f"{' '.join(arguments)}: exit status {process.returncode}: {error.decode()}")
                killed[name] += 1
                arguments = go_on(setup, name, folder)
                if is_whole(name, folder):
                    break
            if process.returncode != 0 and not is_whole(name, folder):
                setup.check(arguments)
            setup.compare(name, folder)
            if partial_files(folder):
                raise Wrong(f"{name}: left behind: {', '.join(partial_files(folder))}")
            shutil.rmtree(folder)
            rounds += 1
        counts = ", ".join(f"{name} {count}" for name, count in killed.items())
        print(f"{sum(killed.values())} kills ({counts}): all results equal those of undisturbed runs")


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"error: {wrong}")
