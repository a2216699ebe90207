//! Runs the bodies of `tests/readers.rs` on what a fuzzer finds. The fuzzer limits time and memory itself.

#[path = "../../tests/readers/bodies.rs"]
mod bodies;

use std::path::Path;
use std::sync::OnceLock;

use tempfile::TempDir;

/// Runs a reader. The tests measure it here.
fn measured<T>(_bytes: usize, reader: impl FnOnce() -> T) -> T {
    reader()
}

/// Gives an input to the body of this name.
pub fn run(name: &str, input: &[u8]) {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        folder.expect("a folder for files")
    });
    let target = bodies::TARGETS.iter().find(|target| target.name == name).expect("a target of this name");
    (target.body)(folder.path(), input);
}

/// Writes the valid inputs of every target to `corpus/` below a folder, for the fuzzer to start from.
pub fn write_corpus(folder: &Path) -> std::io::Result<()> {
    for target in &bodies::TARGETS {
        let corpus = folder.join("corpus").join(target.name);
        std::fs::create_dir_all(&corpus)?;
        for (index, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(corpus.join(format!("seed-{index}")), seed)?;
        }
    }
    Ok(())
}
