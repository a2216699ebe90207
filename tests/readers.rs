//! Files of any contents: every reader answers with what the file holds or with an error, in bounded time and memory.
//! More than a hundred thousand damaged files are made from valid ones with a fixed seed.

#[path = "readers/bodies.rs"]
mod bodies;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bodies::{TARGETS, gzip, layouts, picture_of, png};
use polder::data::{DataError, LoadOptions, load, load_with};
use polder::report::report;
use polder::train::landscape::{Heights, Landscape};
use polder::train::{Checkpoint, CurvatureFile, Options, TrainError, checksum, weights};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tempfile::TempDir;

// ---- Memory and time ------------------------------------------------------------------------------------------------

struct Counting;

thread_local! {
    /// Bytes that this thread has allocated and not freed, and their maximum since the last measurement began.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let live = LIVE.get() + bytes;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Buffers and tables that do not depend on the input.
const CONSTANT: usize = 1 << 20;

/// Runs a reader on an input of so many bytes, and checks its time and its memory.
pub fn measured<T>(bytes: usize, reader: impl FnOnce() -> T) -> T {
    let (before, start) = (LIVE.get(), Instant::now());
    PEAK.set(before);
    let result = reader();
    let (most, took) = ((PEAK.get() - before) as usize, start.elapsed());
    assert!(most <= 10 * bytes + CONSTANT, "{most} bytes of memory for {bytes} bytes of input");
    assert!(took < Duration::from_secs(10), "{took:?} for {bytes} bytes");
    result
}

// ---- Damage ---------------------------------------------------------------------------------------------------------

/// A change of a file.
#[derive(Clone, Debug)]
enum Damage {
    Flip(Index, u8),
    Truncate(Index),
    Insert(Index, Vec<u8>),
    /// Repeats a part of the file at another place.
    Duplicate(Index, Index, Index),
    /// Puts the bytes of an extreme number over those at a place.
    Number(Index, usize),
    /// Puts a text in place of the digits that follow a place.
    Text(Index, usize),
}

const NUMBERS: [&[u8]; 7] =
    [&[0xff; 4], &[0x7f, 0xff, 0xff, 0xff], &[0; 4], &[0, 0, 0, 1], &[0xff; 8], &[0; 8], &[0, 0, 0, 0, 0, 0, 0, 0x80]];
const TEXTS: [&str; 14] = [
    "1e999",
    "-1",
    "0",
    "18446744073709551616",
    "9223372036854775807",
    "1e308",
    "-0.0",
    "null",
    "[]",
    "{}",
    "NaN",
    "\"\\u001b[31m\\n\"",
    "[[[[[[[[[[[[[[[[",
    "\u{0}",
];

fn damage() -> impl Strategy<Value = Damage> {
    let place = any::<Index>;
    prop_oneof![
        (place(), 1..=255u8).prop_map(|(at, mask)| Damage::Flip(at, mask)),
        place().prop_map(Damage::Truncate),
        (place(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        (place(), place(), place()).prop_map(|(from, length, to)| Damage::Duplicate(from, length, to)),
        (place(), 0..NUMBERS.len()).prop_map(|(at, which)| Damage::Number(at, which)),
        (place(), 0..TEXTS.len()).prop_map(|(at, which)| Damage::Text(at, which)),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    let place = |index: &Index| index.index(bytes.len() + 1);
    match damage {
        Damage::Flip(at, mask) => {
            let at = place(at);
            bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= mask);
        }
        Damage::Truncate(at) => bytes.truncate(place(at)),
        Damage::Insert(at, new) => {
            let at = place(at);
            bytes.splice(at..at, new.iter().copied());
        }
        Damage::Duplicate(from, length, to) => {
            let (from, to) = (place(from), place(to));
            let part = bytes[from..from + length.index(bytes.len() - from + 1)].to_vec();
            bytes.splice(to..to, part);
        }
        Damage::Number(at, which) => {
            let at = place(at);
            bytes[at..].iter_mut().zip(NUMBERS[*which]).for_each(|(byte, &new)| *byte = new);
        }
        Damage::Text(at, which) => {
            let at = place(at);
            let start = bytes[at..].iter().position(u8::is_ascii_digit).map_or(at, |offset| at + offset);
            let digits = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit() || **byte == b'.').count();
            bytes.splice(start..start + digits, TEXTS[*which].bytes());
        }
    }
}

/// Most inputs are damaged valid files, some are any bytes.
fn inputs(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let damaged =
        (prop::sample::select(seeds), prop::collection::vec(damage(), 0..4)).prop_map(|(mut bytes, damage)| {
            damage.iter().for_each(|damage| apply(&mut bytes, damage));
            bytes
        });
    prop_oneof![9 => damaged, 1 => prop::collection::vec(any::<u8>(), 0..200)]
}

/// A folder in memory where there is one: these tests write many files.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    folder.expect("a folder for files")
}

fn run(name: &str, cases: u32) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of this name");
    let folder = scratch();
    for seed in (target.seeds)() {
        assert!((target.body)(folder.path(), &seed), "a valid file is refused");
    }
    let config = Config { cases, failure_persistence: None, max_shrink_time: 20_000, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]));
    let accepted = Cell::new(0);
    let found = runner.run(&inputs((target.seeds)()), |input| {
        accepted.set(accepted.get() + u32::from((target.body)(folder.path(), &input)));
        Ok(())
    });
    found.unwrap_or_else(|error| panic!("{name}: {error}"));
    // Otherwise only the first lines of a reader would have been tried.
    assert!(accepted.get() > cases / 100, "{} of {cases} files were accepted", accepted.get());
}

#[test]
fn damaged_idx_files() {
    run("idx", 20_000);
}

#[test]
fn damaged_gzip_files() {
    run("gzip", 15_000);
}

#[test]
fn damaged_cifar_files() {
    run("cifar", 10_000);
}

#[test]
fn damaged_pickles() {
    run("pickle", 5_000);
}

#[test]
fn damaged_archives() {
    run("archive", 3_000);
}

#[test]
fn damaged_matlab_files() {
    run("svhn", 5_000);
}

#[test]
fn damaged_arrays() {
    run("npy", 10_000);
}

#[test]
fn damaged_corrupted_images() {
    run("corrupted", 3_000);
}

#[test]
fn damaged_pictures() {
    run("picture", 4_000);
}

#[test]
fn damaged_weights() {
    run("weights", 15_000);
}

#[test]
fn damaged_checkpoints() {
    run("checkpoint", 15_000);
}

#[test]
fn damaged_settings() {
    run("config", 10_000);
}

#[test]
fn damaged_logs() {
    run("log", 5_000);
}

#[test]
fn damaged_findings() {
    run("curvature", 5_000);
}

#[test]
fn damaged_landscapes() {
    run("landscape", 5_000);
}

// ---- What is no file ------------------------------------------------------------------------------------------------

/// A reader, and where its file lies in a folder.
type Reader = (&'static str, fn(&Path) -> Result<(), TrainError>);

/// The readers of files whose length is known not to exceed some limit.
fn limited_readers() -> Vec<Reader> {
    fn grid(folder: &Path) -> Result<(), TrainError> {
        let landscape =
            Landscape { title: String::new(), subject: String::new(), axes: vec![], settings: Default::default() };
        Heights::open(folder, &landscape).map(drop)
    }
    let weights = |folder: &Path| {
        let layouts = layouts();
        weights::load(&folder.join("model.safetensors"), [&layouts[0], &layouts[1]]).map(drop)
    };
    let page = |folder: &Path| report(&[folder.into()], None, false).map(drop);
    vec![
        ("model.safetensors", weights),
        ("config.toml", |folder| Options::of_run(folder).map(drop)),
        ("config.toml", |folder| Options::some_of_run(folder, &["seed"]).map(drop)),
        ("config.toml", page),
        ("log.jsonl", page),
        ("curvature.json", |folder| CurvatureFile::read(&folder.join("curvature.json")).map(drop)),
        ("landscape.json", |folder| Landscape::read(folder).map(drop)),
        ("landscape.csv", grid),
    ]
}

/// All readers.
fn readers() -> Vec<Reader> {
    let mut readers = limited_readers();
    readers.push(("model.safetensors", |folder| checksum(&folder.join("model.safetensors")).map(drop)));
    readers.push(("checkpoint/state.safetensors", |folder| Checkpoint::load(folder).map(drop)));
    readers
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_no_file_is_refused_at_once() {
    for (name, reader) in readers() {
        let folder = scratch();
        fs::create_dir(folder.path().join("checkpoint")).unwrap();
        fs::write(folder.path().join("config.toml"), "optimizer = \"sgd\"\n").unwrap();
        fs::write(folder.path().join("log.jsonl"), bodies::LOG).unwrap();
        let path = folder.path().join(name);
        let refused = |what: &str| {
            let message = measured(1 << 17, || reader(folder.path())).unwrap_err().to_string();
            assert!(message.ends_with(&format!("{name}: not a regular file")), "{what}: {message}");
        };
        let _ = fs::remove_file(&path);
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        refused("a device");
        fs::remove_file(&path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        refused("a pipe");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused("a folder");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn settings_come_from_a_pipe_without_a_name() {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"seed = 9\n").unwrap();
    drop(writer);
    let path = PathBuf::from(format!("/proc/self/fd/{}", reader.as_raw_fd()));
    assert_eq!(Options::from_file(&path).unwrap().resolve().unwrap().run.seed, 9);

    let (reader, mut writer) = std::io::pipe().unwrap();
    let endless = std::thread::spawn(move || while writer.write_all(b"# more\n").is_ok() {});
    let path = PathBuf::from(format!("/proc/self/fd/{}", reader.as_raw_fd()));
    let error = measured(1 << 20, || Options::from_file(&path)).unwrap_err();
    assert!(matches!(error, TrainError::TooLong { limit: 1_048_576, .. }), "{error}");
    drop(reader);
    endless.join().unwrap();
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

fn sparse(path: &Path, start: &[u8], bytes: u64) {
    fs::write(path, start).unwrap();
    File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

#[test]
fn no_more_is_read_than_headers_promise() {
    let folder = scratch();
    for seed in (TARGETS[0].seeds)() {
        (TARGETS[0].body)(folder.path(), &seed);
    }
    let refused = || measured(1 << 16, || load(folder.path())).unwrap_err();
    let header = |sizes: &[u32]| -> Vec<u8> {
        [0x800 + sizes.len() as u32].iter().chain(sizes).flat_map(|word| word.to_be_bytes()).collect()
    };
    let images = folder.path().join("train-images-idx3-ubyte");
    let good = fs::read(&images).unwrap();
    // Longer than promised, and as long as promised, but without labels.
    sparse(&images, &header(&[4, 3, 2]), 3 << 30);
    assert!(matches!(refused(), DataError::TrailingBytes { expected: 40, .. }));
    sparse(&images, &header(&[1 << 30, 3, 1]), (3 << 30) + 16);
    assert!(matches!(refused(), DataError::Count { images: 0x4000_0000, labels: 4, .. }));
    let zeros = |sizes: &[u32]| gzip(&[header(sizes), vec![0; 64 << 20]].concat());
    fs::write(&images, zeros(&[4, 3, 2])).unwrap();
    assert!(matches!(refused(), DataError::TrailingBytes { expected: 40, .. }));
    fs::write(&images, zeros(&[64 << 10, 32, 32])).unwrap();
    assert!(matches!(refused(), DataError::Count { images: 0x1_0000, labels: 4, .. }));
    fs::write(&images, good).unwrap();

    // The labels of the test images are compared with those images, too.
    sparse(&folder.path().join("t10k-labels-idx1-ubyte"), &header(&[1 << 30]), (1 << 30) + 8);
    assert!(matches!(refused(), DataError::Count { images: 2, labels: 0x4000_0000, .. }));
}

/// A header of any size is refused before memory is taken for its pixels.
#[test]
fn no_memory_is_taken_for_the_pixels_that_a_picture_claims() {
    let jpeg = |side: u16| {
        let mut bytes = picture_of("baseline.jpg");
        let frame = bytes.windows(2).position(|marker| marker == [0xff, 0xc0]).unwrap();
        for at in [frame + 5, frame + 7] {
            bytes[at..at + 2].copy_from_slice(&side.to_be_bytes());
        }
        bytes
    };
    let webp = |side: u16| {
        let mut bytes = picture_of("lossy.webp");
        for at in [26, 28] {
            bytes[at..at + 2].copy_from_slice(&side.to_le_bytes());
        }
        bytes
    };
    let (width, height) = (100_000, 100_000);
    for claiming in [png(width, height, &[]), jpeg(65_000), jpeg(16_000), webp(16_383)] {
        let folder = scratch();
        for (name, bytes) in [("train/a/1.png", &claiming), ("test/a/1.png", &png(1, 1, &[1, 2, 3]))] {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        for size in [None, Some(8)] {
            let options = LoadOptions { image_size: size, ..LoadOptions::default() };
            let error = measured(1 << 16, || load_with(folder.path(), &options, &mut |_, _| true)).unwrap_err();
            assert!(matches!(&error, DataError::Picture { .. }), "{error}");
            let line = error.to_string();
            println!("{line}");
            assert!(line.contains("train/a/1.png: ") && !line.contains(char::is_control), "{line}");
        }
    }
}

/// What a pickle names many times, or encodes many times, is not there many times.
#[test]
fn a_pickle_takes_no_more_memory_than_its_file() {
    let folder = scratch();
    fs::write(folder.path().join("test_batch"), b"").unwrap();
    let text = [&b"\x80\x02X\x40\x42\x0f\x00"[..], &[b'a'; 1_000_000], b"q\x01"].concat();
    let parts: [&[u8]; 5] =
        [b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R", b"]", b"(", b")q\x02", b"h\x01h\x01\x86q\x01"];
    for part in parts {
        let pickle = [&text[..], &part.repeat(20_000), b"."].concat();
        fs::write(folder.path().join("data_batch_1"), &pickle).unwrap();
        let error = measured(pickle.len() / 3, || load(folder.path())).unwrap_err();
        assert!(matches!(error, DataError::Pickle { .. }), "{error}");
    }
}

#[test]
fn files_longer_than_any_of_their_kind_are_refused() {
    let folder = scratch();
    for (name, reader) in limited_readers() {
        let path = folder.path().join(name);
        fs::write(folder.path().join("config.toml"), "optimizer = \"sgd\"\n").unwrap();
        fs::write(folder.path().join("log.jsonl"), bodies::LOG).unwrap();
        sparse(&path, b"", 5 << 30);
        let error = measured(1 << 17, || reader(folder.path())).unwrap_err();
        assert!(matches!(&error, TrainError::TooLong { path: named, .. } if *named == path), "{error}");
        fs::remove_file(&path).unwrap();
    }
}

// ---- Names in files -------------------------------------------------------------------------------------------------

/// A safetensors file with this header and data.
fn safetensors_file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn weights_error(bytes: &[u8]) -> String {
    let (folder, layouts) = (scratch(), layouts());
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    weights::load(&path, [&layouts[0], &layouts[1]]).unwrap_err().to_string()
}

#[test]
fn a_tensor_that_is_named_twice_is_refused() {
    let tensor = |name: &str| format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#);
    let twice = format!("{{{},{}}}", tensor("fc.bias"), tensor("fc.bi\\u0061s"));
    let message = weights_error(&safetensors_file(&twice, &[0; 8]));
    assert!(message.contains("two tensors are named `fc.bias`"), "{message}");

    let folder = scratch();
    fs::create_dir(folder.path().join("checkpoint")).unwrap();
    let path = folder.path().join("checkpoint/state.safetensors");
    fs::write(path, safetensors_file(&twice, &[0; 8])).unwrap();
    let message = Checkpoint::load(folder.path()).unwrap_err().to_string();
    assert!(message.ends_with("state.safetensors: damaged: two tensors are named `fc.bias`"), "{message}");
}

#[test]
fn names_from_files_are_escaped_and_shortened() {
    let tensor = |name: &str| format!(r#"{{"{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#);
    let message = weights_error(&safetensors_file(&tensor(r"\n\u001b[31mred\u202e"), &[0; 8]));
    assert!(message.contains(r"unknown `\n\u{1b}[31mred\u{202e}`"), "{message}");
    let long = weights_error(&safetensors_file(&tensor(&"x".repeat(1 << 20)), &[0; 8]));
    assert!(long.contains(&format!("unknown `{}…`", "x".repeat(80))) && long.len() < 500, "{long}");
    // A hole in the offsets, which the format's own reader reports with the name.
    let hole = format!(r#"{{"{}\n":{{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}}}"#, "y".repeat(1 << 20));
    let long = weights_error(&safetensors_file(&hole, &[0; 16]));
    assert!(long.contains("not a safetensors file") && long.len() < 500 && !long.contains('\n'), "{long}");

    let folder = scratch();
    let path = folder.path().join("config.toml");
    for text in ["\"a\\u001b[31m\\n\" = 3\n", &format!("{} = 3\n", "k".repeat(1 << 19)), "optimizer = \"\\u001b\\n\"\n"]
    {
        fs::write(&path, text).unwrap();
        let message =
            Options::from_file(&path).and_then(|options| options.resolve().map(drop)).unwrap_err().to_string();
        assert!(message.len() < 3000 && !message.contains(char::is_control), "{message:?}");
    }
}
