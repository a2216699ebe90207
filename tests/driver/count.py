#!/usr/bin/env python3
"""Tables of the kernels' accesses to memory, from the counts that the stand-in driver wrote (DRIVER_COUNT).

    count.py COUNTS [LESS] [--lines] [--limits KERNELS SECTORS WAVEFRONTS]

The counts LESS, of a run that is the beginning of the other, are subtracted. KiB count sectors of 32 bytes. "of least"
is the ratio of the sectors, or of the wavefronts of shared memory, to the minimum for contiguous accesses without bank
conflicts. With --lines, each kernel is followed by its lines of PTX that took a twentieth more than the minimum. With
--limits, no kernel whose name begins with KERNELS may exceed these ratios.
"""
import argparse
import collections
import sys


def read(path):
    """Launches by kernel, and counts by kernel and line: sectors read and written, their minimum, wavefronts, their minimum."""
    launches, lines = collections.Counter(), {}
    with open(path) as file:
        for fields in (line.rstrip("\n").split("\t") for line in file):
            if len(fields) == 2:
                launches[fields[0]] = int(fields[1])
            else:
                lines[fields[0], fields[-1]] = [int(field) for field in fields[1:-1]]
    return launches, lines


def multiples(read, written, least_sectors, wavefronts, least_wavefronts):
    """Sectors and wavefronts as multiples of the minimum; 1 if there are none."""
    pairs = (read + written, least_sectors), (wavefronts, least_wavefronts)
    return [taken / least if least else 1.0 for taken, least in pairs]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("counts")
    parser.add_argument("less", nargs="?")
    parser.add_argument("--lines", action="store_true")
    parser.add_argument("--limits", nargs=3, metavar=("KERNELS", "SECTORS", "WAVEFRONTS"))
    arguments = parser.parse_args()
    launches, lines = read(arguments.counts)
    if arguments.less:
        fewer, less = read(arguments.less)
        launches.subtract(fewer)
        for key, counts in lines.items():
            lines[key] = [more - one for more, one in zip(counts, less.get(key, [0] * 5))]
    by_kernel = collections.defaultdict(dict)
    for (kernel, line), counts in lines.items():
        by_kernel[kernel][line] = counts
    columns = f"{'launches':>8} {'KiB read':>9} {'written':>9} {'of least':>8} {'wavefronts':>10} {'of least':>8}"
    print(f"{'kernel':44} {columns}")
    beyond, looked_at = [], 0
    for kernel in sorted(kernel for kernel, count in launches.items() if count > 0):
        totals = [sum(column) for column in zip(*by_kernel[kernel].values())] or [0] * 5
        sectors, wavefronts = multiples(*totals)
        of_memory = f"{totals[0] // 32:9} {totals[1] // 32:9} {sectors:8.3f} {totals[3]:10} {wavefronts:8.3f}"
        row = f"{kernel:44} {launches[kernel]:8} {of_memory}"
        print(row)
        if arguments.lines:
            for line, counts in by_kernel[kernel].items():
                sectors_of_line, wavefronts_of_line = multiples(*counts)
                if max(sectors_of_line, wavefronts_of_line) >= 1.05:
                    ratios = f"{sectors_of_line:.2f} times the sectors, {wavefronts_of_line:.2f} times the wavefronts"
                    print(f"    {ratios}: {line}")
        if arguments.limits and kernel.startswith(arguments.limits[0]):
            looked_at += 1
            if sectors > float(arguments.limits[1]) or wavefronts > float(arguments.limits[2]):
                beyond.append(row)
    if arguments.limits and looked_at == 0:
        sys.exit(f"no kernel's name begins with {arguments.limits[0]}")
    if beyond:
        sys.exit("more than the limits:\n" + "\n".join(beyond))


main()
