"""Looks into the machine code of the GPU's kernels for what the sources mean by it: products on tensor cores fed by asynchronous
copies, 16-byte accesses where a kernel streams, and no memory of a thread's own, which spilled or indexed registers would need. On
9.0 a kernel may be launched before the one before it is done, so each has to wait before it touches global memory, and none may load
through the cache for what is constant during a kernel, which knows of no such wait. It prints how many instructions the tensor cores'
loops take for each product.

    sass.py CUOBJDUMP FOLDER_WITH_FATBINS
"""

import pathlib
import re
import subprocess
import sys

# A kernel whose name matches the first must have the instruction that the second matches.
STREAMS = r"(perturb|perturb_linf)_f32_\w+|(sgd|adamw)\d_f32|(squares|products|differences|check_finite|finish_gradient|commit|axpy)_f32|finish_scaled_gradient|convert_f32_\w+"
STREAMS += r"|unscale|rounded_difference_\w+|(relu|relu_backward|add|add_to|average_pool|shortcut)_\w+"
STREAMS += r"|batch_norm_(moments|normalize|sums|input)_f32"
RULES = [
    (r"conv_tensor_\w+", r"HMMA\.16(816|88)\.F32", "tensor cores"),
    (r"conv_tensor_\w+", r"LDGSTS\.E\.(BYPASS\.)?128", "asynchronous copies of 16 bytes"),
    # Both operands of a TF32 weight gradient run across the depth, where ldmatrix has no transposition of 32 bits.
    (r"conv_tensor_(?!weight_gradient_\w+_tf32)\w+", r"LDSM\.16", "ldmatrix"),
    (STREAMS, r"LDG\.E\.([A-Z]+\.)*128", "16-byte loads"),
    (r"conv_(forward|input_gradient|weight_gradient)_\d+_f32", r"LDG\.E\.([A-Z]+\.)*128", "16-byte loads"),
]


WAITS = r"\bACQBULK\b"  # griddepcontrol.wait
GLOBAL = r"\b(LDG|STG|LDGSTS|ATOM|ATOMG|RED|REDG|LD|ST)\b"


def waits_first(text):
    wait, access = re.search(WAITS, text), re.search(GLOBAL, text)
    return wait and (not access or wait.start() < access.start())


def per_product(text):
    """Instructions for each HMMA in the shortest loop that has some and copies meanwhile; none without such a loop."""
    lines = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    places = {at: number for number, (at, _) in enumerate(lines)}
    loops = []
    for number, (at, line) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if target and int(target[1], 16) < at:
            body = [line for _, line in lines[places[int(target[1], 16)] : number + 1]]
            products = sum("HMMA" in line for line in body)
            if products and any("LDGSTS" in line for line in body):
                loops.append((len(body), products))
    return min(loops)[0] / min(loops)[1] if loops else None


def kernels(cuobjdump, fatbin):
    """The machine code of every kernel, by architecture and name."""
    text = subprocess.run([cuobjdump, "-sass", fatbin], check=True, capture_output=True, text=True).stdout
    code, target, name = {}, None, None
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            target = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            name = (target, match[1])
            code[name] = []
        elif name:
            code[name].append(line)
    return {name: "\n".join(lines) for name, lines in code.items()}


def main():
    cuobjdump, folder = sys.argv[1:]
    fatbins = sorted(pathlib.Path(folder).glob("*.fatbin"))
    code = {key: text for fatbin in fatbins for key, text in kernels(cuobjdump, fatbin).items()}
    targets = sorted({target for target, _ in code})
    faults = [f"{target} {name}: local memory" for (target, name), text in code.items() if re.search(r"\b(LDL|STL)\b", text)]
    early = {key: text for key, text in code.items() if key[0] == "sm_90"}
    waiting = [key for key, text in early.items() if waits_first(text)]
    print(f"waits for the kernel before it touches memory: {len(waiting)} of {len(early)} kernels")
    faults += [f"{target} {name}: touches memory before it has waited" for target, name in early.keys() - set(waiting)]
    faults += [f"{target} {name}: loads as constant" for (target, name), text in early.items() if re.search(r"LDG\S*CONSTANT", text)]
    for kernel, instruction, what in RULES:
        matching = {key: text for key, text in code.items() if re.fullmatch(kernel, key[1])}
        missing = [f"{target} {name}: no {what}" for (target, name), text in matching.items() if not re.search(instruction, text)]
        print(f"{what}: {len(matching) - len(missing)} of {len(matching)} kernels")
        faults += missing or ([] if matching else [f"no kernel is called {kernel}"])
    for which in ["forward", "input_gradient", "weight_gradient"]:
        tiles = {name: per_product(text) for (_, name), text in early.items() if re.fullmatch(rf"conv_tensor_{which}_\w+_f16", name)}
        faults += [f"sm_90 {name}: no loop of products and copies" for name, ratio in tiles.items() if ratio is None]
        listed = [f"{ratio:.2f} ({name.removeprefix(f'conv_tensor_{which}_')})" for name, ratio in sorted(tiles.items()) if ratio]
        print(f"instructions per product, {which}: {', '.join(listed)}")
    print(f"{len(code)} kernels for {', '.join(targets)}; local memory in none" if not faults else "\n".join(faults))
    sys.exit(bool(faults) or len(targets) < 2)


main()
