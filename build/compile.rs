//! Compiles the kernels: by the host's C++ compiler once per instruction set, and by nvcc into one fatbin per source.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::SystemTime;

/// Compute capabilities, times ten, that machine code can be made for. Code for 80 also runs on 86 and 89, which add
/// nothing that these kernels could use.
const TARGETS: [&str; 6] = ["80", "86", "89", "90", "100", "120"];
/// Those that it is made for unless `POLDER_CUDA_TARGETS` names others. Each adds a run of ptxas over all kernels.
const USUAL_TARGETS: &str = "80 90";

/// nvcc's arguments for the targets, and for PTX. From PTX the driver makes code for the other chips from 90 on.
///
/// # Panics
/// If `POLDER_CUDA_TARGETS` names none, or an unknown one.
fn target_arguments() -> Vec<String> {
    let chosen = env::var("POLDER_CUDA_TARGETS").unwrap_or_else(|_| USUAL_TARGETS.into());
    let mut arguments = Vec::new();
    for target in chosen.split([' ', ',']).filter(|target| !target.is_empty()) {
        let known = TARGETS.join(", ");
        assert!(TARGETS.contains(&target), "POLDER_CUDA_TARGETS: `{target}` is unknown; possible are {known}");
        arguments.push(format!("-gencode=arch=compute_{target},code=sm_{target}"));
    }
    assert!(!arguments.is_empty(), "POLDER_CUDA_TARGETS names no target");
    arguments.push("-gencode=arch=compute_90,code=compute_90".into());
    arguments
}

/// Sources whose kernels run on the CPU only where it emulates a GPU, for tests. One instruction set is enough for
/// those.
const EMULATED: [&str; 3] = ["conv.cu", "conv_tensor.cu", "gradient.cu"];

/// Sources whose kernels gain from vectors of 64 bytes.
const WIDE: [&str; 4] = ["conv_direct.cu", "conv_winograd.cu", "batch_norm.cu", "batch_norm_tangent.cu"];

/// Sources whose kernels use the CPU's matrix units.
const SPLIT: [&str; 3] = ["conv_split.cu", "conv_split_winograd.cu", "peak.cu"];

/// One run of a compiler.
pub type Job = Box<dyn FnOnce() + Send>;

/// Runs the jobs on as many threads as cargo gives the build.
pub fn run_all(jobs: Vec<Job>) {
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

/// An instruction set that host code is built for. Kernels of a source that is not built for it come from the newest
/// older set that has them.
pub struct InstructionSet {
    /// Its name in symbols.
    pub name: &'static str,
    flags: &'static [&'static str],
    /// The compiler's level of optimisation.
    level: u32,
    /// Whether a source is built for it.
    pub builds: fn(&Path) -> bool,
}

/// The instruction sets for the target, from the oldest to the newest.
pub fn instruction_sets() -> Vec<InstructionSet> {
    const AVX2: &[&str] = &["-mavx2", "-mfma", "-mf16c"];
    const AVX512: &[&str] = &["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"];
    const AMX: &[&str] = &[
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512bf16",
        "-mamx-tile",
        "-mamx-bf16",
    ];
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch != "x86_64") {
        return vec![InstructionSet { name: "baseline", flags: &[], level: 3, builds: |_| true }];
    }
    // Convolutions gain from it, and batch norm, which then has registers for more neighbouring channels. Everything
    // else is bound by memory.
    let avx512 = InstructionSet {
        name: "avx512",
        flags: AVX512,
        level: 3,
        builds: |source| is_one_of(source, &WIDE) || is_one_of(source, &SPLIT),
    };
    // With matrix units.
    let amx = InstructionSet { name: "amx", flags: AMX, level: 3, builds: |source| is_one_of(source, &SPLIT) };
    // Builds with sanitizers are for tests, on recent machines.
    if sanitize() {
        return vec![InstructionSet { name: "avx2", flags: AVX2, level: 3, builds: |_| true }, avx512, amx];
    }
    vec![
        // For processors without AVX2, and for tests. The third level took the compiler 1.2 to 4 times as long.
        InstructionSet { name: "baseline", flags: &[], level: 2, builds: |_| true },
        InstructionSet { name: "avx2", flags: AVX2, level: 3, builds: |source| !is_one_of(source, &EMULATED) },
        avx512,
        amx,
    ]
}

fn is_one_of(source: &Path, names: &[&str]) -> bool {
    names.iter().any(|name| source.ends_with(name))
}

/// The host compiler's configuration: C++17, with the sanitizers where `POLDER_SANITIZE` asks for them. Multiplications
/// and additions are contracted only where the source says so, so that a source rounds alike on every instruction set.
fn host_compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").warnings(true).extra_warnings(true);
    build.opt_level(3).flag("-fno-exceptions").flag("-fno-rtti").flag("-fno-math-errno").flag("-ffp-contract=off");
    build.flag_if_supported("-fno-trapping-math").flag_if_supported("-Wno-unknown-pragmas");
    // Line tables only, as in the Rust profile. Full debug information would take the compiler a third longer and make
    // the objects four times as large.
    build.flag("-g1");
    if sanitize() {
        build.opt_level(1).flag("-fsanitize=address,undefined").flag("-fno-sanitize-recover=all");
        build.flag("-fno-omit-frame-pointer");
        // The address sanitizer finds what a wrapped pointer leads to. Without this check gcc takes a sixth less time.
        build.flag("-fno-sanitize=pointer-overflow");
    }
    build
}

fn sanitize() -> bool {
    env::var("POLDER_SANITIZE").is_ok_and(|value| value == "1")
}

/// Adds a job for every source and every instruction set that the compiler supports, unless the object is up to date.
/// Returns the supported sets and all objects.
pub fn plan_host<'a>(
    out: &Path,
    sources: &[PathBuf],
    sets: &'a [InstructionSet],
    jobs: &mut Vec<Job>,
) -> (Vec<&'a InstructionSet>, Vec<PathBuf>) {
    let (mut built, mut objects) = (Vec::new(), Vec::new());
    for set in sets {
        let mut build = host_compiler();
        if !sanitize() {
            build.opt_level(set.level);
        }
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
        // A CPU that emulates a GPU takes the oldest kernels: long sources have a GPU's launch shapes in those alone.
        if std::ptr::eq(set, &sets[0]) {
            build.define("POLDER_EMULATES_GPU", None);
        }
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

/// Compiles the runtime and links it and the kernels into one library.
pub fn link_host(objects: &[PathBuf]) {
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

/// Compiles one `.cu` as C++. The note of the command is removed first and written last, so that an object that a
/// failure left is not taken for up to date.
fn compile(compiler: Command, source: &Path, object: &Path) {
    let (line, note) = (words(&compiler), object.with_extension("command"));
    let _ = fs::remove_file(&note);
    let mut command = compiler;
    command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(object);
    run(command, &format!("compiling {} for the CPU", source.display()));
    fs::write(note, line).expect("a writable OUT_DIR");
}

/// Adds a job for every file that checks a source's layout, unless it has been compiled since the last change. It makes
/// no code.
pub fn plan_checks(sources: &[(PathBuf, PathBuf)], jobs: &mut Vec<Job>) {
    for (source, checked) in sources {
        let done = checked.with_extension("checked");
        let mut command = host_compiler().define("POLDER_ISA", "checked").get_compiler().to_command();
        command.args(["-fsyntax-only", "-I.", "-x", "c++"]).arg(checked);
        let line = words(&command);
        let is_done = fs::read_to_string(&done).unwrap_or_default() == line;
        if is_done && !is_older(&done, source) && !is_older(&done, checked) {
            continue;
        }
        let what = format!("checking the layout of what {} and Rust share", source.display());
        jobs.push(Box::new(move || {
            run(command, &what);
            fs::write(&done, line).expect("a writable OUT_DIR");
        }));
    }
}

/// Whether an object is older than its source or a header, or was built by a different command.
fn is_stale(object: &Path, source: &Path, compiler: &Command) -> bool {
    let built_by = fs::read_to_string(object.with_extension("command")).unwrap_or_default();
    built_by != words(compiler) || is_older(object, source)
}

/// A command line, without its environment.
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

/// nvcc from `NVCC`, `CUDA_HOME`/`CUDA_PATH` or `PATH`.
fn find_nvcc() -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return Some(PathBuf::from(nvcc));
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os).map(|home| PathBuf::from(home).join("bin"));
    let paths: Vec<PathBuf> = env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    homes.chain(paths).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

/// Machine code for GPUs.
#[derive(Default)]
pub struct Fatbins {
    /// None without nvcc.
    paths: Vec<PathBuf>,
    /// nvcc's version, numbered as by the driver: 13000 for 13.0. 0 without nvcc.
    version: i32,
}

/// nvcc's version, from the line `Cuda compilation tools, release 13.0, V13.0.88`.
fn nvcc_version(nvcc: &Path) -> i32 {
    let output = Command::new(nvcc).arg("--version").output();
    let output = output.unwrap_or_else(|e| panic!("cannot start nvcc {}: {e}", nvcc.display()));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let release = text.split("release ").nth(1).and_then(|rest| rest.split(',').next());
    let numbers = release.and_then(|release| release.split_once('.'));
    let parsed = numbers.and_then(|(major, minor)| Some((major.parse::<i32>().ok()?, minor.parse::<i32>().ok()?)));
    let (major, minor) = parsed.unwrap_or_else(|| panic!("{} --version names no release: {text}", nvcc.display()));
    1000 * major + 10 * minor
}

/// Adds a job for every device source, given with the source that checks its layout. Each becomes a fatbin of its own.
pub fn plan_cuda(out: &Path, sources: &[(PathBuf, PathBuf)], jobs: &mut Vec<Job>) -> Fatbins {
    let Some(nvcc) = find_nvcc() else {
        if env::var("POLDER_REQUIRE_CUDA").is_ok_and(|value| value == "1") {
            panic!("POLDER_REQUIRE_CUDA=1, but nvcc was not found (looked at NVCC, CUDA_HOME, CUDA_PATH and PATH)")
        }
        println!(
            "cargo:warning=nvcc was not found (NVCC, CUDA_HOME, CUDA_PATH, PATH): polder is built for the CPU only"
        );
        return Fatbins::default();
    };
    let targets = target_arguments();
    let mut fatbins = Fatbins { paths: Vec::new(), version: nvcc_version(&nvcc) };
    for (source, checked) in sources {
        let fatbin = out.join(source.file_stem().expect("a file")).with_extension("fatbin");
        fatbins.paths.push(fatbin.clone());
        let (nvcc, targets, source, checked) = (nvcc.clone(), targets.clone(), source.clone(), checked.clone());
        jobs.push(Box::new(move || compile_cuda(&nvcc, &targets, &source, &checked, &fatbin)));
    }
    fatbins
}

/// Writes `fatbins.rs`: `FATBINS`, each source's name and machine code, and `CUDA_VERSION`, of the nvcc that made them.
pub fn write_fatbins(out: &Path, fatbins: &Fatbins) {
    let mut text = String::from("// Written by build.rs: one fatbin per kernel source; empty and 0 without nvcc.\n");
    let _ = writeln!(text, "pub(crate) const CUDA_VERSION: i32 = {};", fatbins.version);
    text.push_str("pub(crate) static FATBINS: &[(&str, &[u8])] = &[\n");
    for fatbin in &fatbins.paths {
        let name = fatbin.file_stem().expect("a file").to_string_lossy();
        let _ = writeln!(text, "    ({name:?}, include_bytes!({:?})),", fatbin.display().to_string());
    }
    text.push_str("];\n");
    fs::write(out.join("fatbins.rs"), text).expect("a writable OUT_DIR");
}

/// Compiles one source with nvcc, through the file that checks its layout, unless the fatbin is newer. A kernel that
/// spills registers, which ptxas reports, ends the build.
fn compile_cuda(nvcc: &Path, targets: &[String], source: &Path, checked: &Path, fatbin: &Path) {
    let mut command = Command::new(nvcc);
    command.args(["--fatbin", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "--extended-lambda", "-lineinfo"]);
    // Compression makes a fatbin, which has line tables, seven times smaller in every binary.
    command.args(["-Xfatbin", "-compress-all", "-Xptxas", "-v", "-Wno-deprecated-gpu-targets"]).args(targets);
    command.arg("-I.").arg(checked).arg("-o").arg(fatbin);
    let line = words(&command);
    let note = fatbin.with_extension("command");
    if fs::read_to_string(&note).unwrap_or_default() == line && !is_older(fatbin, source) && !is_older(fatbin, checked)
    {
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
