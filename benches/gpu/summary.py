"""Gathers what run.sh has left in RESULTS into RESULTS/DATE-DEVICE.json, and prints it as a table.

    summary.py RESULTS          after a call of run.sh; the exit status is 1 if something failed
    summary.py FILE.json        the tables of docs/results.md, in Markdown
"""

import datetime
import json
import pathlib
import re
import sys


def rows(results):
    """The last status of each stage and name, in the order in which they first ran, and the seconds of all tries."""
    found = {}
    for line in (results / "rows.tsv").read_text().splitlines():
        try:
            stage, name, status, seconds = line.split("\t")
            before = found.get((stage, name), {"seconds": 0})["seconds"]
            found[stage, name] = {"stage": stage, "name": name, "status": status, "seconds": before + int(seconds)}
        except ValueError:
            print(f"rows.tsv: not a row: {line}", file=sys.stderr)
    return list(found.values())


def loaded(path):
    """A file of JSON; none if it was cut off."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return None


def benches(results):
    """Seconds of each of criterion's benchmarks, and bytes or elements per second where it counts them."""
    found = []
    for path in sorted(results.glob("criterion*/**/new/estimates.json")):
        about, estimates = loaded(path.parent / "benchmark.json"), loaded(path)
        if about is None or estimates is None:
            continue
        # Without early launches, criterion's results are in a folder of their own.
        order = ", in order" if "criterion-in-order" in path.parts else ""
        bench = {"name": about["full_id"] + order, "seconds": estimates["median"]["point_estimate"] * 1e-9}
        for unit, amount in (about.get("throughput") or {}).items():
            bench[f"{unit.lower()}_per_s"] = amount / bench["seconds"]
        found.append(bench)
    add_shares(found)
    return found


def add_shares(benches):
    """Of convolutions in f16 the share of the measured peak of `mma`, of kernels that are bound by memory the share of
    the faster copy in their group."""
    mma = [bench["elements_per_s"] for bench in benches if bench["name"].startswith("tensor cores")]
    for bench in benches:
        group = bench["name"].rpartition("/")[0]
        copies = [
            other["bytes_per_s"] for other in benches
            if other["name"] in (f"{group}/copy", f"{group}/convert_f32_f32") and "bytes_per_s" in other
        ]
        if bench["name"].startswith("conv f16") and mma:
            bench["share"] = bench["elements_per_s"] / mma[0]
        elif "bytes_per_s" in bench and copies:
            bench["share"] = bench["bytes_per_s"] / max(copies)


def training(results):
    """Each training run: its options, and accuracy and seconds of its epochs."""
    found = []
    for path in sorted((results / "train").glob("*/log.jsonl")):
        # A line that was cut off is not there when the run goes on.
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        epochs = [record for record in map(json.loads, lines) if record["kind"] == "epoch"]
        found.append({"method": path.parent.name, "epochs": epochs})
    return found


def gather(results):
    machine = (results / "machine.txt").read_text().splitlines()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "rows": rows(results),
        "benches": benches(results),
        "peers": {path.stem: loaded(path) for path in sorted((results / "peers").glob("*.json"))},
        "training": training(results),
    }


def count(rows):
    states = [row["status"].split()[0] for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "none"


def paired(found):
    """(file, result, role, contender) of each comparison of a step with PyTorch."""
    for name, peer in found["peers"].items():
        for result in (peer or {}).get("results") or []:
            if isinstance(result, dict) and "pytorch" in result:
                for role, contender in result["pytorch"].items():
                    if role != "again":  # the same form once more, for the noise
                        yield name, result, role, contender


def show(found):
    """The table at the end of a call: what passed is counted, everything else is named."""
    for line in found["machine"]:
        print(line)
    for stage in dict.fromkeys(row["stage"] for row in found["rows"]):
        of_stage = [row for row in found["rows"] if row["stage"] == stage]
        print(f"{stage:16} {count(of_stage)}, {sum(row['seconds'] for row in of_stage)} s")
        for row in of_stage:
            if row["status"] != "ok":
                print(f"  {row['name']:46} {row['status']:10} {row['seconds']:5} s")
    for bench in found["benches"]:
        share = f"{100 * bench['share']:4.0f} %" if "share" in bench else ""
        print(f"{bench['name']:70} {bench['seconds'] * 1e6:11.1f} µs {share}")
    for name, result, role, contender in paired(found):
        ratios = [f"{key} {ratio['median']:.2f}" for key, ratio in contender["ratios"].items()]
        print(f"{name:46} over {contender['form']}, {role}: {', '.join(ratios)}")
    for run in found["training"]:
        if run["epochs"]:
            last = run["epochs"][-1]
            print(f"train {run['method']:8} epoch {last['epoch']}: test accuracy {last.get('test_accuracy')}")


def markdown(found):
    print(f"Measured on {found['date']}: {'; '.join(found['machine'])}\n")
    print("| checks | |\n|---|---|")
    for stage in dict.fromkeys(row["stage"] for row in found["rows"]):
        of_stage = [row for row in found["rows"] if row["stage"] == stage]
        rest = [f"{row['name']} {row['status']}" for row in of_stage if row["status"] != "ok"]
        print(f"| {stage} | {count(of_stage)}{'; ' if rest else ''}{', '.join(rest)} |")
    print("\n| benchmark | µs | per second | share of the copy, or of `mma` |\n|---|---|---|---|")
    for bench in found["benches"]:
        rates = [f"{bench[key]:.3g} {key.split('_')[0]}" for key in bench if key.endswith("_per_s")]
        share = f"{100 * bench['share']:.0f} %" if "share" in bench else ""
        print(f"| {bench['name']} | {bench['seconds'] * 1e6:.1f} | {', '.join(rates)} | {share} |")
    print("\n| model, method | ours, images/s | PyTorch's form | ratio |\n|---|---|---|---|")
    for _, result, role, contender in paired(found):
        for precision, ratio in contender["ratios"].items():
            rate = result["ours"][precision]["images_per_s"]["median"]
            print(f"| {result['model']}, {result['method']}, {precision} | {rate:.0f} | {role}: {contender['form']} "
                  f"| {ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f}) |")
    print("\n| ResNet-18 on CIFAR-10 | epochs | seconds | test accuracy |\n|---|---|---|---|")
    seconds = {row["name"]: row["seconds"] for row in found["rows"] if row["stage"] == "train"}
    for run in found["training"]:
        last = run["epochs"][-1] if run["epochs"] else {}
        accuracy = f"{100 * last['test_accuracy']:.2f} %" if last else ""
        print(f"| {run['method']} | {len(run['epochs'])} | {seconds.get(run['method'], 0)} | {accuracy} |")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path = pathlib.Path(sys.argv[1])
    if path.is_file():
        return markdown(json.loads(path.read_text()))
    found = gather(path)
    # nvidia-smi's line is "NAME, VERSION, ...". Without it the first line is of polder's own list.
    first = (found["machine"] or ["unknown"])[0]
    device = re.sub(r"[^A-Za-z0-9]+", "-", first.split(",")[0]).strip("-")
    (path / f"{found['date']}-{device}.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    sys.exit(any(row["status"].startswith(("FAILED", "timeout", "missing")) for row in found["rows"]))


main()
