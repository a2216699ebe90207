//! Reads which kernels the sources register, and writes the tables by which Rust finds and launches them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::cpp::{Place, Source};

/// A kernel as its source registers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    pub name: String,
    /// The type of its argument, as the source spells it.
    pub args: String,
    /// Whether it exists on the host alone.
    pub host_only: bool,
    /// The index of its source.
    pub source: usize,
}

impl Kernel {
    /// The name of its argument struct.
    pub fn args_name(&self) -> &str {
        self.args.split('<').next().unwrap_or_default()
    }
}

/// The kernels in the order in which the sources register them.
///
/// # Errors
/// A text that names the place: a registration that cannot be read.
pub fn registered(sources: &[Source]) -> Result<Vec<Kernel>, String> {
    let markers = [("POLDER_KERNEL(", false), ("POLDER_RESIDENT_KERNEL(", false), ("POLDER_HOST_KERNEL(", true)];
    let mut kernels = Vec::new();
    for (source, Source { path, text }) in sources.iter().enumerate() {
        for (index, line) in text.lines().enumerate() {
            let found = markers.iter().find_map(|(marker, host_only)| Some((line.strip_prefix(marker)?, *host_only)));
            let Some((first, host_only)) = found else { continue };
            // A registration may take several lines.
            let mut registration = first.to_string();
            let mut following = text.lines().skip(index + 1);
            let unreadable = || {
                let place = Place { path: path.clone(), line: index + 1 };
                format!("{place}: expected POLDER_KERNEL(name, function, arguments)")
            };
            let parameters = loop {
                match parameters(&registration) {
                    Some(parameters) => break parameters,
                    None => registration.push_str(following.next().ok_or_else(unreadable)?.trim()),
                }
            };
            let [name, _, args, ..] = &parameters[..] else { return Err(unreadable()) };
            kernels.push(Kernel { name: name.clone(), args: args.clone(), host_only, source });
        }
    }
    Ok(kernels)
}

/// The parameters of a macro up to its closing parenthesis, split at the commas outside of parentheses; none if that is
/// missing.
fn parameters(text: &str) -> Option<Vec<String>> {
    let (mut found, mut depth) = (vec![String::new()], 0);
    for letter in text.chars() {
        match letter {
            ')' if depth == 0 => return Some(found.iter().map(|one| one.trim().to_string()).collect()),
            ',' if depth == 0 => found.push(String::new()),
            _ => {
                depth += i32::from(letter == '(') - i32::from(letter == ')');
                found.last_mut().expect("one at least").push(letter);
            }
        }
    }
    None
}

/// The argument types of the kernels of one source, or of all.
pub fn argument_types(kernels: &[Kernel], source: Option<usize>) -> BTreeSet<String> {
    let of_source = kernels.iter().filter(|kernel| source.is_none_or(|source| kernel.source == source));
    of_source.map(|kernel| kernel.args.clone()).collect()
}

/// An instruction set's name, and whether a source is built for it.
pub type Set<'a> = (&'a str, fn(&Path) -> bool);

/// The text of `registry.rs`: `NAMES`, the host entry points per instruction set, from the oldest to the newest, and
/// `id::NAME` for every kernel.
pub fn to_rust(kernels: &[Kernel], sources: &[PathBuf], sets: &[Set<'_>]) -> String {
    let mut text = String::from("// Written by build.rs from the POLDER_KERNEL lines of kernels/.\n");
    let count = kernels.len();
    let _ = writeln!(text, "/// Every kernel's name, NUL-terminated for the host runtime.");
    let _ = writeln!(text, "pub(crate) static NAMES: [&std::ffi::CStr; {count}] = [");
    for Kernel { name, .. } in kernels {
        let _ = writeln!(text, "    c\"{name}\",");
    }
    let _ = writeln!(text, "];\n/// Every kernel's argument struct.\nstatic ARGUMENTS: [&str; {count}] = [");
    for kernel in kernels {
        let _ = writeln!(text, "    \"{}\",", kernel.args_name());
    }
    let _ = writeln!(text, "];\n/// Whether a kernel exists on the host alone.");
    let _ = writeln!(text, "pub(crate) static HOST_ONLY: [bool; {count}] = [");
    for Kernel { host_only, .. } in kernels {
        let _ = writeln!(text, "    {host_only},");
    }
    let _ = writeln!(text, "];\nunsafe extern \"C\" {{");
    for (set, builds) in sets {
        for Kernel { name, .. } in kernels.iter().filter(|kernel| builds(&sources[kernel.source])) {
            let _ = writeln!(text, "    fn polder_{set}_{name}(args: *const std::ffi::c_void);");
        }
    }
    let _ =
        writeln!(text, "}}\n/// Instruction sets from the oldest to the newest, with the entry point of every kernel.");
    let _ = writeln!(text, "pub(crate) static HOST: [(&str, [HostEntry; {count}]); {}] = [", sets.len());
    for (index, (set, _)) in sets.iter().enumerate() {
        let _ = writeln!(text, "    (\"{set}\", [");
        for Kernel { name, source, .. } in kernels {
            let newest =
                sets[..=index].iter().rfind(|(_, builds)| builds(&sources[*source])).expect("the first set has all");
            let _ = writeln!(text, "        polder_{}_{name},", newest.0);
        }
        let _ = writeln!(text, "    ]),");
    }
    text.push_str("];\n");
    write_ids(kernels, &mut text);
    text
}

/// Writes the module of ids. An id knows the struct that its kernel takes.
fn write_ids(kernels: &[Kernel], text: &mut String) {
    text.push_str("/// An id for every kernel.\n#[allow(dead_code)]\npub(crate) mod id {\n");
    text.push_str("    use crate::device::{ComputeKernels, Kernel, arguments};\n");
    for (index, kernel) in kernels.iter().enumerate() {
        let (name, args) = (kernel.name.to_uppercase(), kernel.args_name());
        let _ = writeln!(text, "    pub(crate) const {name}: Kernel<arguments::{args}> = Kernel::new({index});");
    }
    // A kernel that exists for every type can be chosen by type.
    let find = |name: String| kernels.iter().find(|kernel| kernel.name == name);
    for kernel in kernels {
        let Some(base) = kernel.name.strip_suffix("_f64") else { continue };
        if ["f32", "f16", "bf16"].iter().all(|suffix| find(format!("{base}_{suffix}")).is_some()) {
            let (base, args) = (base.to_uppercase(), kernel.args_name());
            let fields = ["f32", "f64", "f16", "bf16"].map(|field| format!("{field}: {base}_{}", field.to_uppercase()));
            let _ = writeln!(text, "    pub(crate) const {base}: ComputeKernels<arguments::{args}> =");
            let _ = writeln!(text, "        ComputeKernels {{ {} }};", fields.join(", "));
        }
    }
    text.push_str("}\n");
}
