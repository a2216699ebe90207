//! Compiles `kernels/*.cu` twice: always with the host C++ compiler, once per instruction set, and with nvcc into one
//! fatbin per source where nvcc is found (`NVCC`, `CUDA_HOME` or `CUDA_PATH`, `PATH`).
//!
//! It also makes Rust of what kernels and Rust share, of which the C++ sources are the one definition:
//! - `registry.rs`: an id for every `POLDER_KERNEL(name, ...)`, and the table of its host entry points;
//! - `arguments.rs`: the structs that the kernels take;
//! - `constants.rs`: the constants in the headers [`SHARED`].
//!
//! Both compilers check that the structs have the layout, and the constants the values, that were computed here.
//!
//! Environment:
//! - `POLDER_REQUIRE_CUDA=1`: a missing nvcc is an error instead of a note.
//! - `POLDER_SANITIZE=1`: the host code is built with the address and undefined-behaviour sanitizers.

#[path = "build/arguments.rs"]
mod arguments;
#[path = "build/compile.rs"]
mod compile;
#[path = "build/constants.rs"]
mod constants;
#[path = "build/cpp.rs"]
mod cpp;
#[path = "build/registry.rs"]
mod registry;

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use arguments::Arguments;
use constants::Constants;
use cpp::Source;
use registry::Kernel;

/// The headers whose constants Rust has too.
const SHARED: [&str; 2] = ["kernels/include/constants.cuh", "kernels/host/launch.hpp"];

/// The structs that the host's runtime and Rust share, which no kernel takes.
const RUNTIME: [&str; 2] = ["PolderLaunch", "PolderFault"];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    for option in ["REQUIRE_CUDA", "CUDA_TARGETS", "SANITIZE"] {
        println!("cargo:rerun-if-env-changed=POLDER_{option}");
    }
    for path in ["kernels", "build.rs", "build"] {
        println!("cargo:rerun-if-changed={path}");
    }

    // Long jobs begin first: nvcc's, and for each compiler the long sources.
    let long_first = |mut sources: Vec<PathBuf>| {
        sources.sort_by_key(|source| std::cmp::Reverse(fs::metadata(source).map_or(0, |found| found.len())));
        sources
    };
    let device_sources = long_first(files("kernels", &["cu"]));
    let all = long_first([files("kernels/host", &["cu"]), device_sources.clone()].concat());
    let kernels = registry::registered(&read(&all)).unwrap_or_else(|error| panic!("{error}"));
    let checked = write_shared(&out, &all, &kernels).unwrap_or_else(|error| panic!("{error}"));
    let sets = compile::instruction_sets();
    let write_registry = |sets: &[&compile::InstructionSet]| {
        let sets: Vec<_> = sets.iter().map(|set| (set.name, set.builds)).collect();
        write(&out.join("registry.rs"), &registry::to_rust(&kernels, &all, &sets));
    };
    if is_lint() {
        write_registry(&sets.iter().collect::<Vec<_>>());
        compile::write_fatbins(&out, &compile::Fatbins::default());
        return;
    }
    let mut jobs = Vec::new();
    // Checks take seconds, and without them a mistake would show after minutes.
    compile::plan_checks(&checked, &mut jobs);
    let for_devices: Vec<_> = checked.iter().filter(|(source, _)| device_sources.contains(source)).cloned().collect();
    let fatbins = compile::plan_cuda(&out, &for_devices, &mut jobs);
    let (built, objects) = compile::plan_host(&out, &all, &sets, &mut jobs);
    compile::run_all(jobs);
    compile::link_host(&objects);
    write_registry(&built);
    compile::write_fatbins(&out, &fatbins);
}

/// Writes `arguments.rs` and `constants.rs`, and for every source a file that includes it and checks the layout of what
/// it shares with Rust. Returns the sources, each with that file.
///
/// # Errors
/// Those of [`Arguments::read`] and [`Constants::read`].
fn write_shared(out: &Path, sources: &[PathBuf], kernels: &[Kernel]) -> Result<Vec<(PathBuf, PathBuf)>, String> {
    let constants = Constants::read(&read(&SHARED.map(PathBuf::from)))?;
    let headers = [files("kernels/include", &["cuh"]), files("kernels/host", &["hpp", "cuh"])].concat();
    let runtime: BTreeSet<String> = RUNTIME.iter().map(|name| name.to_string()).collect();
    let roots = registry::argument_types(kernels, None).union(&runtime).cloned().collect();
    let arguments = Arguments::read(&read(&[sources.to_vec(), headers].concat()), &roots, &constants)?;
    write(&out.join("constants.rs"), &constants.to_rust());
    write(&out.join("arguments.rs"), &arguments.to_rust());
    let folder = out.join("checked");
    fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut checked = Vec::new();
    let of_runtime = (PathBuf::from("kernels/host/launch.hpp"), runtime, constants.to_assertions(Path::new(SHARED[1])));
    let of_sources = sources.iter().enumerate().map(|(index, source)| {
        let types = registry::argument_types(kernels, Some(index));
        (source.clone(), types, constants.to_assertions(Path::new(SHARED[0])))
    });
    for (source, types, of_constants) in of_sources.chain([of_runtime]) {
        let file = folder.join(source.file_name().expect("a file")).with_extension("cu");
        let structs = arguments.to_assertions(&types);
        write(&file, &format!("#include \"{}\"\n{of_constants}{structs}", source.display()));
        checked.push((source, file));
    }
    Ok(checked)
}

/// The files of a folder with one of these extensions, sorted.
fn files(folder: &str, extensions: &[&str]) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{folder}: {e}"));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap_or_else(|e| panic!("{folder}: {e}")).path())
        .filter(|path| path.extension().is_some_and(|found| extensions.iter().any(|extension| found == *extension)))
        .collect();
    files.sort();
    files
}

fn read(paths: &[PathBuf]) -> Vec<Source> {
    let text = |path: &PathBuf| fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    paths.iter().map(|path| Source { path: path.clone(), text: text(path) }).collect()
}

/// Writes a generated file, unless it is there as it should be: what depends on it would be built again.
fn write(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|found| found == text) {
        return;
    }
    fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// Whether cargo runs clippy, which links nothing and so needs no kernels: minutes of compilers for seconds of lints.
fn is_lint() -> bool {
    env::var_os("RUSTC_WORKSPACE_WRAPPER").is_some_and(|wrapper| wrapper.to_string_lossy().contains("clippy"))
}
