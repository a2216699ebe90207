"""Checks the machine code of the GPU's kernels.

    sass.py CUOBJDUMP FOLDER_WITH_FATBINS

- The convolutions on tensor cores use tensor-core products and asynchronous copies; streaming kernels use 16-byte
  accesses.
- No kernel uses local memory, which spilled or indexed registers would need.
- At most one thread of a block divides in double precision, which is slow on consumer GPUs, or by a number of 64 bits,
  which is slow on all. The kernels that do are named here.
- With programmatic dependent launch (compute capability 9.0 and later), a kernel can start before the previous one has
  finished. So every kernel waits before it touches global memory, and none loads through the read-only cache, which
  does not respect the wait.

It also prints the instructions per product in the loops of the tensor-core kernels.
"""

import itertools
import pathlib
import re
import subprocess
import sys

# Names of the streaming kernels.
STREAMS = r"(perturb|perturb_linf)_f32_\w+|(sgd|adamw)\d_f32"
STREAMS += r"|(squares|products|check_finite|finish_gradient|commit|axpy)_f32"
STREAMS += r"|finish_scaled_gradient|convert_f32_\w+"
STREAMS += r"|unscale|rounded_difference_\w+|(relu|relu_backward|add|add_to|average_pool|shortcut)_\w+"
STREAMS += r"|(bias|bias_slope|bias_curve|embed_tokens|embed_tokens_backward)_\w+"
STREAMS += r"|batch_norm_(moments|normalize|sums|input)_f32"
# Every kernel whose name matches the first pattern must have an instruction that matches the second.
RULES = [
    (r"conv_tensor_\w+", r"HMMA\.16(816|88)\.F32", "tensor cores"),
    (r"conv_tensor_\w+", r"LDGSTS\.E\.(BYPASS\.)?128", "asynchronous copies of 16 bytes"),
    # A weight gradient of 32-bit operands would have to transpose both, and ldmatrix cannot transpose 32-bit elements.
    (r"conv_tensor_(?!weight_gradient_\w+_(tf32|bf16x3|bf16x6))\w+", r"LDSM\.16", "ldmatrix"),
    (STREAMS, r"LDG\.E\.([A-Z]+\.)*128", "16-byte loads"),
    (r"conv_(forward|input_gradient|weight_gradient)_\d+_f32", r"LDG\.E\.([A-Z]+\.)*128", "16-byte loads"),
]


# The start of a division in double precision, and of one of 64-bit integers.
DIVIDES = r"\bMUFU\.RCP64H\b|\bI2F\.[US]64\.RP\b"
# Kernels in which one thread of a block divides.
ONE_THREAD_DIVIDES = r"perturb_(f32_\w+|along\d_f32|adaptive_f32|normal_f32)|(adamw\d|sassha|moving_average)_f32"
ONE_THREAD_DIVIDES += r"|unscale|gather_f32|gradient_pieces_f32|finish_scaled_gradient|conv_tensor_weight_gradient_\w+"
ONE_THREAD_DIVIDES += r"|muon_(gram|update)_f32|mean_loss_f32|mix_batch_\w+|direction_scale|curvature_from_losses"
ONE_THREAD_DIVIDES += r"|cr_sam_coefficients|clip_coefficients|gam_coefficients|ascent_coefficients|quotient|rejection"
ONE_THREAD_DIVIDES += r"|adgd_rates"
# A thread for each channel; and Pillow's arithmetic on bytes, whose bits are wanted.
FEW_DIVIDE = r"batch_norm_(running|statistics|parameters_tangent)_f32|augment(_large)?_batch_\w+"

WAITS = r"\bACQBULK\b"  # griddepcontrol.wait
GLOBAL = r"\b(LDG|STG|LDGSTS|ATOM|ATOMG|RED|REDG|LD|ST)\b"


def waits_first(text):
    wait, access = re.search(WAITS, text), re.search(GLOBAL, text)
    return wait and (not access or wait.start() < access.start())


def per_product(text):
    """Instructions per HMMA in the shortest loop with both HMMA and asynchronous copies; None if there is none."""
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
    local = [key for key, text in code.items() if re.search(r"\b(LDL|STL)\b", text)]
    faults = [f"{target} {name}: local memory" for target, name in local]
    divide = {name for (_, name), text in code.items() if re.search(DIVIDES, text)}
    named = {name for _, name in code if re.fullmatch(f"{ONE_THREAD_DIVIDES}|{FEW_DIVIDE}", name)}
    print(f"divisions in double precision or of 64 bits: in {len(divide)} kernels")
    faults += [f"{name}: every thread divides in double precision or by a number of 64 bits" for name in divide - named]
    early = {key: text for key, text in code.items() if int(key[0].removeprefix("sm_")) >= 90}
    waiting = [key for key, text in early.items() if waits_first(text)]
    print(f"waits for the kernel before it touches memory: {len(waiting)} of {len(early)} kernels")
    faults += [f"{target} {name}: touches memory before it has waited" for target, name in early.keys() - set(waiting)]
    constant = [key for key, text in early.items() if re.search(r"LDG\S*CONSTANT", text)]
    faults += [f"{target} {name}: loads through the read-only cache" for target, name in constant]
    for kernel, instruction, what in RULES:
        matching = {key: text for key, text in code.items() if re.fullmatch(kernel, key[1])}
        without = [key for key, text in matching.items() if not re.search(instruction, text)]
        missing = [f"{target} {name}: no {what}" for target, name in without]
        print(f"{what}: {len(matching) - len(missing)} of {len(matching)} kernels")
        faults += missing or ([] if matching else [f"no kernel is called {kernel}"])
    passes, types = ["forward", "input_gradient", "weight_gradient"], ["f16", "bf16x3", "bf16x6"]
    for which, stored in itertools.product(passes, types):
        pattern = rf"conv_tensor_{which}_\w+_{stored}"
        tiles = {key: per_product(text) for key, text in early.items() if re.fullmatch(pattern, key[1])}
        without = [" ".join(key) for key, ratio in tiles.items() if ratio is None]
        faults += [f"{kernel}: no loop of products and copies" for kernel in without]
        ratios = {
            name.removeprefix(f"conv_tensor_{which}_"): ratio
            for (target, name), ratio in sorted(tiles.items())
            if ratio and target == "sm_90"
        }
        listed = ", ".join(f"{ratio:.2f} ({name})" for name, ratio in ratios.items())
        print(f"instructions per product, {which} in {stored}: {listed}")
    print(f"{len(code)} kernels for {', '.join(targets)}; local memory in none" if not faults else "\n".join(faults))
    sys.exit(bool(faults) or len(targets) < 2)


main()
