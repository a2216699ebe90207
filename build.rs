//! Compiles `kernels/*.cu` twice: always with the host C++ compiler, once per instruction set, and with nvcc into one fatbin
//! where nvcc is found (`NVCC`, `CUDA_HOME` or `CUDA_PATH`, `PATH`).
//!
//! It also scans the sources for `POLDER_KERNEL(name, ...)` and writes `registry.rs`: an id for every kernel and the table of
//! its host entry points. Environment:
//! - `POLDER_REQUIRE_CUDA=1`: a missing nvcc is an error instead of a note.
//! - `POLDER_SANITIZE=1`: the host code is built with the address and undefined-behaviour sanitizers.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::SystemTime;

/// Machine code for chips of compute capability 8.x (that of 8.0 runs on 8.6 and 8.9, which have nothing that these kernels could use)
/// and 9.0, and PTX for everything later.
const TARGETS: [&str; 3] = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
];

/// Sources of which the CPU's own launch shapes use nothing: there they play the GPU, for tests, which one instruction set serves.
const GPU_SHAPES: [&str; 3] = ["conv.cu", "conv_tensor.cu", "gradient.cu"];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "POLDER_REQUIRE_CUDA", "POLDER_SANITIZE"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=build.rs");

    // The long jobs are best begun first: nvcc's, and of all compilers those on long sources.
    let long_first = |mut sources: Vec<PathBuf>| {
        sources.sort_by_key(|source| std::cmp::Reverse(fs::metadata(source).map_or(0, |found| found.len())));
        sources
    };
    let device_sources = long_first(sources(Path::new("kernels")));
    let all = long_first([sources(Path::new("kernels/host")), device_sources.clone()].concat());
    let sets = instruction_sets();
    if is_lint() {
        write_registry(&out, &all, &sets.iter().collect::<Vec<_>>());
        write_fatbins(&out, &[]);
        return;
    }
    let mut jobs = Vec::new();
    let fatbins = plan_cuda(&out, &device_sources, &mut jobs);
    let (built, objects) = plan_host(&out, &all, &sets, &mut jobs);
    run_all(jobs);
    link_host(&objects);
    write_registry(&out, &all, &built);
    write_fatbins(&out, &fatbins);
}

/// Whether cargo runs clippy, which links nothing and so needs no kernels: minutes of compilers for seconds of lints.
fn is_lint() -> bool {
    env::var_os("RUSTC_WORKSPACE_WRAPPER").is_some_and(|wrapper| wrapper.to_string_lossy().contains("clippy"))
}

/// One source to compile by one compiler.
type Job = Box<dyn FnOnce() + Send>;

/// Runs the jobs on as many threads as cargo gives the build.
fn run_all(jobs: Vec<Job>) {
    let threads = env::var("NUM_JOBS").ok().and_then(|count| count.parse().ok()).unwrap_or(1);
    let queue = Mutex::new(jobs.into_iter());
    let next = || queue.lock().expect("no job runs under the lock").next();
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(job) = next() {
                    job();
                }
            });
        }
    });
}

/// The `.cu` files of a folder, sorted.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a readable folder entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    files.sort();
    files
}

/// An instruction set the host code is built for: its name in symbols, the compiler's flags, and which sources are built for it. The
/// other sources' kernels are those of the newest older set that has them.
struct InstructionSet {
    name: &'static str,
    flags: &'static [&'static str],
    builds: fn(&Path) -> bool,
}

fn instruction_sets() -> Vec<InstructionSet> {
    const AVX2: &[&str] = &["-mavx2", "-mfma", "-mf16c"];
    const AVX512: &[&str] = &["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"];
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch != "x86_64") {
        return vec![InstructionSet { name: "baseline", flags: &[], builds: |_| true }];
    }
    // All but the convolution is bound by memory.
    let avx512 =
        InstructionSet { name: "avx512", flags: AVX512, builds: |source| is_one_of(source, &["conv_direct.cu"]) };
    // The sanitizers' builds are for tests, on machines of today.
    if sanitize() {
        return vec![InstructionSet { name: "avx2", flags: AVX2, builds: |_| true }, avx512];
    }
    vec![
        InstructionSet { name: "baseline", flags: &[], builds: |_| true },
        InstructionSet { name: "avx2", flags: AVX2, builds: |source| !is_one_of(source, &GPU_SHAPES) },
        avx512,
    ]
}

fn is_one_of(source: &Path, names: &[&str]) -> bool {
    names.iter().any(|name| source.ends_with(name))
}

/// One compiler configuration for the host: C++17, contraction only where the source asks for it (so that the same source
/// rounds alike on every instruction set), and the sanitizers where they are asked for.
fn host_compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").warnings(true).extra_warnings(true);
    build.opt_level(3).flag("-fno-exceptions").flag("-fno-rtti").flag("-fno-math-errno").flag("-ffp-contract=off");
    build.flag_if_supported("-fno-trapping-math").flag_if_supported("-Wno-unknown-pragmas");
    // Lines alone, as the Rust profile has them, whatever cargo's word for that is: where every variable lies would take the compiler
    // a third longer, and the objects four times the room.
    build.flag("-g1");
    if sanitize() {
        build.opt_level(1).flag("-fsanitize=address,undefined").flag("-fno-sanitize-recover=all");
        build.flag("-fno-omit-frame-pointer");
        // What pointers that wrap lead to is checked anyway; without them gcc takes a sixth less time.
        build.flag("-fno-sanitize=pointer-overflow");
    }
    build
}

fn sanitize() -> bool {
    env::var("POLDER_SANITIZE").is_ok_and(|value| value == "1")
}

/// Adds a job for every source and every instruction set that the compiler supports, where the object is out of date; returns
/// those sets and all objects.
fn plan_host<'a>(
    out: &Path,
    sources: &[PathBuf],
    sets: &'a [InstructionSet],
    jobs: &mut Vec<Job>,
) -> (Vec<&'a InstructionSet>, Vec<PathBuf>) {
    let (mut built, mut objects) = (Vec::new(), Vec::new());
    for set in sets {
        let mut build = host_compiler();
        if !set.flags.iter().all(|flag| build.is_flag_supported(flag).unwrap_or(false)) {
            println!("cargo:warning=the C++ compiler does not know {}: its kernels are left out", set.flags.join(" "));
            continue;
        }
        for flag in set.flags {
            build.flag(flag);
        }
        let folder = out.join(set.name);
        fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        build.define("POLDER_ISA", set.name);
        for source in sources.iter().filter(|source| (set.builds)(source)) {
            let object = folder.join(source.file_name().expect("a file")).with_extension("o");
            let compiler = build.get_compiler().to_command();
            if is_stale(&object, source, &compiler) {
                let (source, object) = (source.clone(), object.clone());
                jobs.push(Box::new(move || compile(compiler, &source, &object)));
            }
            objects.push(object);
        }
        built.push(set);
    }
    (built, objects)
}

/// Compiles the runtime and makes one library of it and the kernels.
fn link_host(objects: &[PathBuf]) {
    host_compiler().objects(objects).file("kernels/host/runtime.cpp").compile("polder_host");
    if sanitize() {
        let gcc = host_compiler().get_compiler();
        for runtime in ["asan", "ubsan"] {
            let file = format!("lib{runtime}.so");
            let found = Command::new(gcc.path()).arg(format!("-print-file-name={file}")).output();
            if let Ok(found) = found {
                let path = PathBuf::from(String::from_utf8_lossy(&found.stdout).trim());
                if let Some(folder) = path.parent() {
                    println!("cargo:rustc-link-search=native={}", folder.display());
                }
            }
            println!("cargo:rustc-link-lib=dylib={runtime}");
        }
    }
}

/// Compiles one `.cu` as C++. The note of the command goes first and comes last, so that what a failure leaves is not taken for
/// up to date.
fn compile(compiler: Command, source: &Path, object: &Path) {
    let (line, note) = (words(&compiler), object.with_extension("command"));
    let _ = fs::remove_file(&note);
    let mut command = compiler;
    command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(object);
    run(command, &format!("compiling {} for the CPU", source.display()));
    fs::write(note, line).expect("a writable OUT_DIR");
}

/// Whether an object is older than its source or a header, or was built by another command.
fn is_stale(object: &Path, source: &Path, compiler: &Command) -> bool {
    let built_by = fs::read_to_string(object.with_extension("command")).unwrap_or_default();
    built_by != words(compiler) || is_older(object, source)
}

/// A command as it is typed, without its environment.
fn words(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn is_older(output: &Path, source: &Path) -> bool {
    let Some(made) = modified(output) else { return true };
    let headers = ["kernels/include", "kernels/host"].iter().flat_map(|folder| {
        let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{folder}: {e}"));
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "cuh" || extension == "hpp"))
    });
    headers.chain([source.to_path_buf()]).any(|input| modified(&input).is_none_or(|time| time > made))
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

/// Runs a compiler; a failure ends the build with its output.
fn run(mut command: Command, what: &str) {
    let output = command.output().unwrap_or_else(|e| panic!("{what}: cannot start {command:?}: {e}"));
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let standard = String::from_utf8_lossy(&output.stdout);
        panic!("{what} failed ({}):\n{command:?}\n{standard}{messages}", output.status);
    }
    for line in messages.lines().filter(|line| line.contains("warning")) {
        println!("cargo:warning={line}");
    }
}

/// A kernel as its source registers it.
struct Kernel {
    name: String,
    /// Whether it exists on the host alone.
    host_only: bool,
    source: PathBuf,
}

/// The kernels in the order in which the sources register them.
fn registered(sources: &[PathBuf]) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for source in sources {
        let text = fs::read_to_string(source).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
        for line in text.lines() {
            let markers =
                [("POLDER_KERNEL(", false), ("POLDER_RESIDENT_KERNEL(", false), ("POLDER_HOST_KERNEL(", true)];
            for (marker, host_only) in markers {
                if let Some(rest) = line.strip_prefix(marker) {
                    let name = rest.split(',').next().unwrap_or_default().trim().to_string();
                    kernels.push(Kernel { name, host_only, source: source.clone() });
                }
            }
        }
    }
    kernels
}

/// Writes `registry.rs`: `NAMES`, the host entry points per instruction set, and `id::NAME` for every kernel.
fn write_registry(out: &Path, sources: &[PathBuf], sets: &[&InstructionSet]) {
    let kernels = registered(sources);
    let mut text = String::from("// Written by build.rs from the POLDER_KERNEL lines of kernels/.\n");
    let count = kernels.len();
    let _ = writeln!(text, "/// Every kernel's name, NUL-terminated for the host runtime.");
    let _ = writeln!(text, "pub(crate) static NAMES: [&std::ffi::CStr; {count}] = [");
    for Kernel { name, .. } in &kernels {
        let _ = writeln!(text, "    c\"{name}\",");
    }
    let _ = writeln!(text, "];\n/// Whether a kernel exists on the host alone.");
    let _ = writeln!(text, "pub(crate) static HOST_ONLY: [bool; {count}] = [");
    for Kernel { host_only, .. } in &kernels {
        let _ = writeln!(text, "    {host_only},");
    }
    let _ = writeln!(text, "];\nunsafe extern \"C\" {{");
    for set in sets {
        for Kernel { name, .. } in kernels.iter().filter(|kernel| (set.builds)(&kernel.source)) {
            let _ = writeln!(text, "    fn polder_{}_{name}(args: *const std::ffi::c_void);", set.name);
        }
    }
    let _ =
        writeln!(text, "}}\n/// Instruction sets from the oldest to the newest, with the entry point of every kernel.");
    let _ = writeln!(text, "pub(crate) static HOST: [(&str, [Entry; {count}]); {}] = [", sets.len());
    for (index, set) in sets.iter().enumerate() {
        let _ = writeln!(text, "    (\"{}\", [", set.name);
        for Kernel { name, source, .. } in &kernels {
            let newest =
                sets[..=index].iter().rfind(|set| (set.builds)(source)).expect("the first set builds everything");
            let _ = writeln!(text, "        polder_{}_{name},", newest.name);
        }
        let _ = writeln!(text, "    ]),");
    }
    let _ = writeln!(
        text,
        "];\n/// An id for every kernel.\n#[allow(dead_code)]\npub(crate) mod id {{\n    use super::KernelId;"
    );
    for (index, Kernel { name, .. }) in kernels.iter().enumerate() {
        let _ = writeln!(text, "    pub(crate) const {}: KernelId = KernelId({index});", name.to_uppercase());
    }
    // A kernel that exists for every type can be chosen by type.
    let has = |name: String| kernels.iter().any(|kernel| kernel.name == name);
    for base in kernels.iter().filter_map(|kernel| kernel.name.strip_suffix("_f64")) {
        if ["f32", "f16", "bf16"].iter().all(|suffix| has(format!("{base}_{suffix}"))) {
            let base = base.to_uppercase();
            let fields = ["f32", "f64", "f16", "bf16"].map(|field| format!("{field}: {base}_{}", field.to_uppercase()));
            let _ = writeln!(
                text,
                "    pub(crate) const {base}: crate::device::ComputeKernels = crate::device::ComputeKernels {{ {} }};",
                fields.join(", ")
            );
        }
    }
    text.push_str("}\n");
    fs::write(out.join("registry.rs"), text).expect("a writable OUT_DIR");
}

/// nvcc from `NVCC`, `CUDA_HOME`/`CUDA_PATH` or `PATH`.
fn find_nvcc() -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return Some(PathBuf::from(nvcc));
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os).map(|home| PathBuf::from(home).join("bin"));
    let paths: Vec<PathBuf> = env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    homes.chain(paths).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

/// Adds a job for every device source, each of which becomes a fatbin of its own; returns their paths, none without nvcc.
fn plan_cuda(out: &Path, sources: &[PathBuf], jobs: &mut Vec<Job>) -> Vec<PathBuf> {
    let Some(nvcc) = find_nvcc() else {
        if env::var("POLDER_REQUIRE_CUDA").is_ok_and(|value| value == "1") {
            panic!("POLDER_REQUIRE_CUDA=1, but nvcc was not found (looked at NVCC, CUDA_HOME, CUDA_PATH and PATH)")
        }
        println!(
            "cargo:warning=nvcc was not found (NVCC, CUDA_HOME, CUDA_PATH, PATH): polder is built for the CPU only"
        );
        return Vec::new();
    };
    let mut fatbins = Vec::new();
    for source in sources {
        let fatbin = out.join(source.file_stem().expect("a file")).with_extension("fatbin");
        fatbins.push(fatbin.clone());
        let (nvcc, source) = (nvcc.clone(), source.clone());
        jobs.push(Box::new(move || compile_cuda(&nvcc, &source, &fatbin)));
    }
    fatbins
}

/// Writes `fatbins.rs`: `FATBINS`, each source's name and machine code.
fn write_fatbins(out: &Path, fatbins: &[PathBuf]) {
    let mut text = String::from("// Written by build.rs: one fatbin per kernel source; empty without nvcc.\n");
    text.push_str("pub(crate) static FATBINS: &[(&str, &[u8])] = &[\n");
    for fatbin in fatbins {
        let name = fatbin.file_stem().expect("a file").to_string_lossy();
        let _ = writeln!(text, "    ({name:?}, include_bytes!({:?})),", fatbin.display().to_string());
    }
    text.push_str("];\n");
    fs::write(out.join("fatbins.rs"), text).expect("a writable OUT_DIR");
}

/// nvcc on one source, unless its fatbin is newer. A register spill is printed by ptxas and ends the build: a kernel that
/// spills is a fault here, not a detail.
fn compile_cuda(nvcc: &Path, source: &Path, fatbin: &Path) {
    let mut command = Command::new(nvcc);
    command.args(["--fatbin", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "--extended-lambda", "-lineinfo"]);
    // Compressed, line tables and all, a fatbin takes a seventh of the room in every binary.
    command.args(["-Xfatbin", "-compress-all", "-Xptxas", "-v", "-Wno-deprecated-gpu-targets"]).args(TARGETS);
    command.arg(source).arg("-o").arg(fatbin);
    let line = words(&command);
    let note = fatbin.with_extension("command");
    if fs::read_to_string(&note).unwrap_or_default() == line && !is_older(fatbin, source) {
        return;
    }
    let _ = fs::remove_file(&note);
    let output = command.output().unwrap_or_else(|e| panic!("cannot start nvcc {}: {e}", nvcc.display()));
    let messages = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        panic!("nvcc failed on {} ({}):\n{line}\n{messages}", source.display(), output.status);
    }
    for line in messages.lines() {
        let spills = line.contains("spill") && !line.contains(" 0 bytes spill stores, 0 bytes spill loads");
        assert!(!spills, "{}: registers spill:\n{messages}", source.display());
        if line.contains("warning") {
            println!("cargo:warning={line}");
        }
    }
    fs::write(note, line).expect("a writable OUT_DIR");
}
