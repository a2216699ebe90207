//! Writes valid files to `corpus/`, for the fuzzer to start from: `cargo run --example corpus` in this folder.

fn main() -> std::io::Result<()> {
    polder_fuzz::write_corpus(std::path::Path::new(env!("CARGO_MANIFEST_DIR")))
}
