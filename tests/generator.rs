//! The build script's generator: what kernels and Rust share has one definition, and no other layout or value gets past
//! a compiler.

#[path = "../build/arguments.rs"]
mod arguments;
#[path = "../build/constants.rs"]
mod constants;
#[path = "../build/cpp.rs"]
mod cpp;
#[path = "../build/registry.rs"]
mod registry;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use arguments::Arguments;
use constants::Constants;
use cpp::Source;

const HEADER: &str = "\
#include <stdint.h>
/// Rows of a tile.
constexpr int kTileRows = 4 * 32;
constexpr uint32_t kPieces = (kTileRows + 1) / 2;  // of a row
/// What happens to a sum.
enum Sum : uint32_t {
    kSumNone = 0,   // nothing
    kSumWrite = 1,  // it is written
};
/// Tiles: rows, threads.
#define POLDER_TILES(ROW) \\
    ROW(16, 1, 128)       \\
    ROW(64_BY_8, 2, 256)
";

const KERNELS: &str = "\
/// A part.
struct Piece {
    uint64_t first, n;
};
/// What a sum reads.
template <class S, class T = float>
struct Inner {
    const S* x;     // [rows, channels]
    uint32_t rows;  // of x
};
template <class S>
struct SumArgs {
    Inner<S> inner;
    const Piece* table;  // or null
    double eps;
    uint32_t channels, flags[2];
    float mean[kTileRows / 32];
    uint16_t last;
};
template <class S> void sum(const SumArgs<S>&) {}
POLDER_KERNEL(sum_f32, (sum<float, 2>), SumArgs<float>)
POLDER_HOST_KERNEL(sum_f64, sum<double>,
                   SumArgs<double>)
";

fn source(path: &str, text: &str) -> Source {
    Source { path: PathBuf::from(path), text: text.into() }
}

fn read_constants(header: &str) -> Result<Constants, String> {
    Constants::read(&[source("constants.cuh", header)])
}

fn read(kernels: &str) -> Result<Arguments, String> {
    let sources = [source("sum.cu", kernels)];
    let roots = registry::argument_types(&registry::registered(&sources)?, None);
    Arguments::read(&sources, &roots, &read_constants(HEADER)?)
}

fn error<T>(result: Result<T, String>) -> String {
    result.err().expect("an error")
}

/// The output of a compiler that must fail on this file, or none if it succeeds.
fn compile(mut command: Command, file: &Path, text: &str) -> Option<String> {
    fs::write(file, text).unwrap();
    let output = command.arg(file).output().unwrap();
    let messages = String::from_utf8_lossy(&output.stderr).into_owned();
    (!output.status.success()).then_some(messages)
}

/// What the C++ compiler says about these kernels if Rust was given the structs and constants of the unchanged sources.
fn compile_cpp(name: &str, header: &str, kernels: &str) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let definitions: String =
        kernels.lines().take_while(|line| !line.starts_with("POLDER")).collect::<Vec<_>>().join("\n");
    let types = BTreeSet::from(["SumArgs<float>".to_string()]);
    let checks = read_constants(HEADER).unwrap().to_assertions(Path::new("constants.cuh"));
    let checks = checks + &read(KERNELS).unwrap().to_assertions(&types);
    let mut command = Command::new(std::env::var("CXX").unwrap_or("c++".into()).split(' ').next_back().unwrap());
    command.args(["-std=c++17", "-fsyntax-only", "-x", "c++"]);
    compile(command, &folder.path().join(name), &format!("{header}{definitions}\n{checks}"))
}

/// What the Rust compiler says about generated structs.
fn compile_rust(name: &str, structs: &str) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let rustc = std::env::var("RUSTC").unwrap_or("rustc".into());
    let mut command = Command::new(rustc);
    command.args(["--edition", "2024", "--crate-type", "lib", "--emit", "metadata", "--out-dir"]).arg(folder.path());
    // The derives of device memory come from a crate that is not linked here.
    let structs = structs.replace(", bytemuck::Pod, bytemuck::Zeroable", "");
    let text = format!("#![allow(dead_code)]\ntrait Arguments {{ const NAME: &'static str; }}\n{structs}");
    compile(command, &folder.path().join(name), &text)
}

#[test]
fn both_compilers_accept_what_is_generated() {
    assert_eq!(compile_cpp("same.cc", HEADER, KERNELS), None);
    let structs = read(KERNELS).unwrap().to_rust();
    assert_eq!(compile_rust("same.rs", &structs), None);
    for expected in [
        "pub(crate) struct SumArgs {",
        "    /// or null\n    pub(crate) table: u64,",
        "    pub(crate) inner: Inner,",
        "    pub(crate) flags: [u32; 2],",
        "    pub(crate) mean: [f32; 4],",
        "/// A part.\n///\n/// Defined in `sum.cu`.",
        "#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]\npub(crate) struct Piece {",
    ] {
        assert!(structs.contains(expected), "{expected} is not in\n{structs}");
    }
}

#[test]
fn the_layout_is_that_of_c() {
    let all = read(KERNELS).unwrap();
    let found = all.find("SumArgs").unwrap();
    let offsets: Vec<(&str, usize)> = found.fields.iter().map(|field| (field.name.as_str(), field.offset)).collect();
    let expected =
        [("inner", 0), ("table", 16), ("eps", 24), ("channels", 32), ("flags", 36), ("mean", 44), ("last", 60)];
    assert_eq!(offsets, expected);
    assert_eq!((found.size, found.alignment), (64, 8));
    assert_eq!(all.find("Inner").unwrap().size, 16);
}

#[test]
fn a_shifted_field_ends_the_build() {
    let changes = [
        (
            "swapped",
            "const Piece* table;  // or null\n    double eps;",
            "double eps;\n    const Piece* table;",
            "table",
        ),
        ("added", "    double eps;", "    uint32_t more;\n    double eps;", "eps"),
        ("removed", "    double eps;\n", "", "eps"),
        ("narrower", "double eps;", "float eps;", "channels"),
        ("longer", "flags[2]", "flags[3]", "mean"),
        ("inner", "    const S* x; ", "    uint32_t before;\n    const S* x; ", "rows"),
        ("at the end", "    uint16_t last;\n", "    uint16_t last;\n    uint64_t more;\n", "its size differs"),
    ];
    for (what, from, to, named) in changes {
        assert!(KERNELS.contains(from), "{what}");
        // C++ that has changed since Rust was generated.
        let messages = compile_cpp("changed.cc", HEADER, &KERNELS.replace(from, to));
        let messages = messages.unwrap_or_else(|| panic!("{what}: the C++ compiler accepts it"));
        assert!(messages.contains(named), "{what}: {messages}");
        assert!(what == "removed" || messages.contains("of sum.cu") && messages.contains("arguments.rs"), "{messages}");
    }
    // Rust that is not what was generated.
    let structs = read(KERNELS).unwrap().to_rust();
    let (eps, table) = ("    pub(crate) eps: f64,\n", "    /// or null\n    pub(crate) table: u64,\n");
    let swapped = structs.replacen(table, "", 1).replacen(eps, &format!("{eps}{table}"), 1);
    let added = structs.replacen(eps, &format!("    pub(crate) more: u32,\n{eps}"), 1);
    for (what, changed) in
        [("swapped", swapped), ("added", added), ("narrower", structs.replacen("eps: f64", "eps: f32", 1))]
    {
        assert!(changed != structs, "{what}");
        let messages = compile_rust("changed.rs", &changed).unwrap_or_else(|| panic!("{what}: Rust accepts it"));
        assert!(messages.contains("SumArgs of sum.cu:12: "), "{what}: {messages}");
    }
}

#[test]
fn a_changed_constant_ends_the_build() {
    for (from, to, named) in [
        ("4 * 32", "4 * 33", "constants.cuh:3: TILE_ROWS is 128 in constants.rs"),
        ("kSumWrite = 1", "kSumWrite = 2", "constants.cuh:8: SUM_WRITE is 1 in constants.rs"),
    ] {
        let messages = compile_cpp("changed.cc", &HEADER.replace(from, to), KERNELS);
        let messages = messages.unwrap_or_else(|| panic!("{to} is accepted"));
        assert!(messages.contains(named), "{messages}");
    }
}

#[test]
fn constants_become_rust() {
    let found = read_constants(HEADER).unwrap();
    assert_eq!(found.value("kPieces"), Some(64));
    let rust = found.to_rust();
    for expected in [
        "/// Rows of a tile.\n///\n/// Defined in `constants.cuh`.\n#[allow(dead_code)]\n\
         pub(crate) const TILE_ROWS: usize = 128;",
        "/// of a row\n///",
        "/// it is written\n///\n/// Defined in `constants.cuh`.\n#[allow(dead_code)]\n\
         pub(crate) const SUM_WRITE: u32 = 1;",
        "macro_rules! polder_tiles {",
        "$row!(\"64_by_8\", 2, 256),",
    ] {
        assert!(rust.contains(expected), "{expected} is not in\n{rust}");
    }
}

#[test]
fn registrations_are_read_over_lines_and_parentheses() {
    let kernels = registry::registered(&[source("sum.cu", KERNELS)]).unwrap();
    let found: Vec<(&str, &str, bool)> =
        kernels.iter().map(|kernel| (kernel.name.as_str(), kernel.args.as_str(), kernel.host_only)).collect();
    assert_eq!(found, [("sum_f32", "SumArgs<float>", false), ("sum_f64", "SumArgs<double>", true)]);
    let sources = [PathBuf::from("sum.cu")];
    let rust = registry::to_rust(&kernels, &sources, &[("baseline", |_| true), ("avx2", |_| false)]);
    assert!(rust.contains("pub(crate) const SUM_F64: Kernel<arguments::SumArgs> = Kernel::new(1);"), "{rust}");
    assert!(rust.contains("(\"avx2\", [\n        polder_baseline_sum_f32,"), "{rust}");
}

#[test]
fn what_cannot_be_shared_is_named() {
    let changed = |from: &str, to: &str| error(read(&KERNELS.replace(from, to)));
    assert_eq!(changed("double eps;", "S eps;"), "sum.cu:15: the size of `S eps` depends on `S`");
    assert_eq!(changed("double eps;", "bool eps;"), "`bool` is not defined, for sum.cu:15");
    assert_eq!(
        changed("double eps;", "double eps = 1;"),
        "sum.cu:15: `double eps = 1` is not a field that Rust could share"
    );
    assert_eq!(changed("flags[2]", "flags[kTwo]"), "sum.cu:16: `kTwo` is neither a number nor a known constant");
    assert_eq!(
        changed("SumArgs<float>)", "OtherArgs)"),
        "`OtherArgs` is not defined, for a kernel that takes `OtherArgs`"
    );
    let twice = changed("struct Piece {", "struct Inner {\n};\nstruct Piece {");
    assert_eq!(twice, "`Inner` is defined twice: in sum.cu:2 and in sum.cu:9");
    assert_eq!(
        changed("sum<double>,\n", "sum<double>\n"),
        "sum.cu:22: expected POLDER_KERNEL(name, function, arguments)"
    );

    let changed = |from: &str, to: &str| error(read_constants(&HEADER.replace(from, to)));
    assert_eq!(changed("4 * 32", "4 * kOther"), "constants.cuh:3: `kOther` is neither a number nor a known constant");
    assert_eq!(changed("kPieces", "kTileRows"), "constants.cuh:4: `kTileRows` is also defined in constants.cuh:3");
    assert_eq!(
        changed("ROW(16, 1, 128)", "ROW(16, 1)"),
        "constants.cuh:11: no rows, or rows of different lengths in a table \
         `#define POLDER_NAME(ROW) ROW(label, 1) ...`"
    );
    assert!(changed("enum Sum : uint32_t", "enum Sum").contains("constants.cuh:6: expected `enum Name : uint32_t"));
}
