//! The formats of data sets beside CIFAR's binary version and IDX (`tests/data.rs`): CIFAR's Python version, CIFAR's
//! archives, SVHN, arrays of NumPy, CIFAR-10-C and pictures by class. The files are made here or, in
//! `fixtures/formats/`, by Python's own libraries. With `POLDER_DATA=DIR` the test images of the published CIFAR-10 in
//! `DIR/cifar-10` are read in several formats.

#[path = "readers/files.rs"]
mod files;

use std::error::Error;
use std::fs;
use std::path::Path;

use files::{PICTURES, gzip, mat, mat_variable, npy, pickled_batch, pickled_images, picture, pixel, png, svhn, tar};
use polder::data::{
    Corrupted, DataError, Dataset, ImageShape, Images, LoadOptions, Split, StatisticsSource, load, load_split,
    load_split_with, load_with,
};
use tempfile::TempDir;

type TestResult = Result<(), Box<dyn Error>>;

/// The pixels of images in memory.
fn bytes(images: &Images) -> &[u8] {
    images.pixels.memory().expect("no folder of pictures that is too large")
}

/// A data set whose pictures are resized.
fn load_sized(path: &Path, image_size: Option<usize>) -> Result<Dataset, DataError> {
    load_with(path, &LoadOptions { image_size, ..LoadOptions::default() }, &mut |_, _| true)
}

/// The error of reading a path, as its one line, with the folder's own path replaced by `DIR`.
fn error_line(folder: &Path, path: &Path) -> String {
    let error = match load(path) {
        Ok(data) => panic!("{} was read as {}", path.display(), data.name),
        Err(error) => error,
    };
    let line = error.to_string().replace(&folder.display().to_string(), "DIR");
    assert!(!line.contains(char::is_control) && line.len() < 1000, "{line:?}");
    line
}

/// A folder with these files.
fn folder_of(files: &[(&str, Vec<u8>)]) -> Result<TempDir, Box<dyn Error>> {
    let folder = TempDir::new()?;
    for (name, bytes) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().ok_or("a parent")?)?;
        fs::write(path, bytes)?;
    }
    Ok(folder)
}

fn fixture(name: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats").join(name);
    fs::read(&path).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// Checks an image whose planes lie one after another in a file, the first pixel at this place; each plane by rows, or
/// by columns.
fn check_planes(pixels: &[u8], first: usize, by_columns: bool) {
    assert_eq!(pixels.len(), 3072);
    for (index, &found) in pixels.iter().enumerate() {
        let (y, x, channel) = (index / 96, index / 3 % 32, index % 3);
        let place = if by_columns { 32 * x + y } else { 32 * y + x };
        assert_eq!(found, pixel(first + 1024 * channel + place), "y {y}, x {x}, channel {channel}");
    }
}

// ---- CIFAR's Python version -----------------------------------------------------------------------------------------

fn python_files() -> [(&'static str, Vec<u8>); 3] {
    [
        ("cifar-10-batches-py/data_batch_1", pickled_batch("labels", &[6, 9, 0])),
        ("cifar-10-batches-py/data_batch_2", pickled_batch("labels", &[4])),
        ("cifar-10-batches-py/test_batch", pickled_batch("labels", &[3, 8])),
    ]
}

fn check_cifar10(data: &Dataset) {
    assert_eq!((data.name.as_str(), data.statistics), ("cifar-10", StatisticsSource::Published));
    assert_eq!((data.mean[0], data.std[0], data.train.classes), (0.4914, 0.2470, 10));
    assert_eq!((&data.train.labels[..], &data.test.labels[..]), (&[6, 9, 0, 4][..], &[3, 8][..]));
    for (image, first) in bytes(&data.train).chunks(3072).zip([0, 3072, 6144, 0]) {
        check_planes(image, first, false);
    }
    data.check().expect("what was read is consistent");
}

#[test]
fn pickled_batches_are_read() -> TestResult {
    let folder = folder_of(&python_files())?;
    check_cifar10(&load(folder.path())?);
    check_cifar10(&load(&folder.path().join("cifar-10-batches-py"))?);
    assert_eq!(load_split(folder.path(), Split::Test)?.images.labels, [3, 8]);

    // The names of CIFAR-100's files are too common to be looked for alone.
    let folder =
        folder_of(&[("train", pickled_batch("fine_labels", &[99, 0])), ("test", pickled_batch("fine_labels", &[42]))])?;
    assert!(error_line(folder.path(), folder.path()).starts_with("DIR: no data set found"));
    fs::write(folder.path().join("meta"), "")?;
    let data = load(folder.path())?;
    assert_eq!((data.name.as_str(), data.train.classes), ("cifar-100", 100));
    assert_eq!((data.train.labels, data.test.labels), (vec![99, 0], vec![42]));
    Ok(())
}

#[test]
fn pickles_of_every_protocol_are_read() -> TestResult {
    for protocol in 2..=5 {
        let batch = fixture(&format!("batch.{protocol}.pickle"))?;
        let folder = folder_of(&[("data_batch_1", batch.clone()), ("test_batch", batch)])?;
        let data = load(folder.path())?;
        assert_eq!((data.train.labels.clone(), data.test.labels.clone()), (vec![7], vec![7]), "protocol {protocol}");
        check_planes(bytes(&data.train), 0, false);
    }
    Ok(())
}

/// The line for a file in place of a batch.
fn batch_error(bytes: Vec<u8>) -> Result<String, Box<dyn Error>> {
    let folder = folder_of(&[("data_batch_1", bytes), ("test_batch", pickled_batch("labels", &[1]))])?;
    Ok(error_line(folder.path(), folder.path()))
}

#[test]
fn a_pickle_executes_nothing() -> TestResult {
    let marker = TempDir::new()?;
    let touched = marker.path().join("touched");
    let command = format!("touch {}", touched.display());
    let call = |name: &str| [b"\x80\x02c", name.as_bytes(), b"\n(X", &[command.len() as u8, 0, 0, 0]].concat();
    for (name, shown) in [
        ("os\nsystem", "os.system"),
        ("posix\nsystem", "posix.system"),
        ("builtins\neval", "builtins.eval"),
        ("__builtin__\neval", "__builtin__.eval"),
        ("numpy\nload", "numpy.load"),
        ("numpy.core.multiarray\nfromfile", "numpy.core.multiarray.fromfile"),
        ("_codecs\ndecode", "_codecs.decode"),
        ("a\u{1b}[31m\nb", "a\\x1b[31m.b"),
    ] {
        let line = batch_error([call(name), command.clone().into_bytes(), b"tR.".to_vec()].concat())?;
        let says = format!("the pickle names `{shown}`, which no data set needs; nothing of it was executed");
        assert_eq!(line, format!("DIR/data_batch_1: {says}"));
    }
    // The name from two texts, as in later protocols.
    let line = batch_error(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.".to_vec())?;
    assert!(line.contains("`os.system`"), "{line}");
    // A name as long as the file is shortened.
    let long = [&b"\x80\x02c"[..], &[b'a'; 100_000], b"\nb\n."].concat();
    assert!(batch_error(long)?.len() < 300);
    assert!(!touched.exists());
    Ok(())
}

#[test]
fn other_operations_of_pickles_are_refused() -> TestResult {
    let line = |body: &[u8]| batch_error([b"\x80\x02", body].concat());
    // Instances, persistent identifiers, extensions, sets, the text protocol's numbers.
    for operation in [b'i', b'o', 0x81, 0x92, b'P', b'Q', 0x82, 0x83, 0x84, 0x8f, 0x91, b'I', b'L', b'S', b'2', b'0'] {
        let found = line(&[operation, b'a', b'\n', b'b', b'\n', b'.'])?;
        assert!(
            found.ends_with(&format!("operation {operation:#04x} at byte 2, which a data set does not use")),
            "{found}"
        );
    }
    for (body, reason) in [
        (&b"K\x01."[..], "it holds no dictionary"),
        (b"}.", "it has no `data`"),
        (b".", "it takes a value where there is none"),
        (b"e", "it ends a sequence that has no beginning"),
        (b"(R", "it takes a value where there is none"),
        (b"}}R", "a call without arguments"),
        (b"})R", "a call that makes no array"),
        (b"cnumpy\nndarray\n)R.", "a call that makes no array"),
        (b"cnumpy\ndtype\n)R.", "a type without a name"),
        (b"})b.", "a state of what is no array"),
        (b"}K\x01b.", "a state that is no tuple"),
        (b"}K\x01a.", "it appends to what is no list"),
        (b"](K\x01u.", "it puts items into what is no dictionary"),
        (b"}(K\x01u.", "it puts items into what is no dictionary"),
        (b"h\x05.", "it uses value 5 before it stores it"),
        (b"\x8a\x09aaaaaaaaa.", "a number of 9 bytes, expected at most 8"),
        (b"}K", "it ends at byte 4, before its last value does"),
        (b"X\xff\xff\xff\xffa", "it ends at byte 8, before its last value does"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffa", "it ends at byte 12, before its last value does"),
        (b"}.}", "1 bytes behind its end"),
    ] {
        assert_eq!(line(body)?, format!("DIR/data_batch_1: not a pickle with images: {reason}"), "{body:?}");
    }
    let found = batch_error(b"<!DOCTYPE html>".to_vec())?;
    assert!(found.contains("it begins with `<!DOCTYPE ht`, and not with a protocol"), "{found}");
    assert!(batch_error(Vec::new())?.contains("it begins with ``"));
    Ok(())
}

/// Deep nesting, copies of copies, many marks and stored values: each ends in one line, in little memory and time
/// (`tests/readers.rs` measures both).
#[test]
fn bombs_in_pickles_end_in_one_line() -> TestResult {
    let many = "more values than a data set of its length has";
    let repeated = |part: &[u8], times: usize| [b"\x80\x02", &part.repeat(times)[..], b"."].concat();
    for part in [&b"]"[..], b"(", b"}", b"\x85", b")\x85", b"]q\x01", b"(]", b"K\x01"] {
        let bytes = [&b"\x80\x02)"[..], &repeated(part, 10_000)[2..]].concat();
        let found = batch_error(bytes)?;
        assert!(found.contains(many) || found.contains("it holds no dictionary"), "{found}");
    }
    // Every tuple holds the one before it twice: 2^30 leaves, if they were copied.
    let doubled = repeated(b"h\x01h\x01\x86q\x01", 30);
    let found = batch_error([&b"\x80\x02)q\x01"[..], &doubled[2..]].concat())?;
    assert!(found.contains("it holds no dictionary"), "{found}");
    // A long text that is encoded again and again.
    let encoded = repeated(b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R", 1000);
    let text = [&b"\x80\x02X\xa0\x86\x01\x00"[..], &[b'a'; 100_000], b"q\x01"].concat();
    let found = batch_error([text, encoded[2..].to_vec()].concat())?;
    assert!(found.contains(many) || found.contains("it holds no dictionary"), "{found}");
    Ok(())
}

#[test]
fn batches_of_other_contents_are_named() -> TestResult {
    let good = pickled_batch("labels", &[3, 8]);
    let replaced = |from: &[u8], to: &[u8]| {
        let at = good.windows(from.len()).position(|window| window == from).expect("the part is there");
        [&good[..at], to, &good[at + from.len()..]].concat()
    };
    let columns = "unsigned bytes";
    for (bytes, reason) in [
        (replaced(b"U\x06labels", b"U\x06label_"), "not a pickle with images: it has no `labels`".to_string()),
        (
            replaced(b"U\x02u1", b"U\x02f4"),
            format!("not a pickle with images: `data` is an array of f4, expected rows of 3072 {columns}"),
        ),
        (
            replaced(b"M\x00\x0c\x86", b"M\x00\x06\x86"),
            format!("not a pickle with images: `data` is an array of [2, 1536], expected rows of 3072 {columns}"),
        ),
        (
            replaced(b"M\x02\x00M", b"M\x03\x00M"),
            format!(
                "not a pickle with images: `data` is an array of 3 rows and 6144 bytes, expected rows of 3072 {columns}"
            ),
        ),
        (replaced(b"b\x89T", b"b\x88T"), "not a pickle with images: an array that is not in C order".to_string()),
        (replaced(b"K\x03K\x08e", b"K\x03U\x01ae"), "not a pickle with images: `labels` is no list of integers".into()),
        (replaced(b"K\x03K\x08e", b"K\x03K\x0ae"), "label 10 at sample 1, expected 0 to 9".into()),
        (replaced(b"K\x03K\x08e", b"K\x03J\xff\xff\xff\xffe"), "label -1 at sample 1, expected 0 to 9".into()),
        (
            replaced(b"K\x03K\x08e", b"K\x03e"),
            "2 images, expected 1, as many as there are labels in DIR/data_batch_1".into(),
        ),
    ] {
        assert_eq!(batch_error(bytes)?, format!("DIR/data_batch_1: {reason}"));
    }
    Ok(())
}

#[test]
fn a_batch_that_is_cut_off_anywhere_is_an_error() -> TestResult {
    let good = pickled_batch("labels", &[3]);
    let folder = folder_of(&[("data_batch_1", good.clone()), ("test_batch", good.clone())])?;
    load(folder.path())?;
    for length in 0..good.len() {
        fs::write(folder.path().join("data_batch_1"), &good[..length])?;
        assert!(
            matches!(load(folder.path()), Err(DataError::Pickle { .. } | DataError::PickleName { .. })),
            "{length}"
        );
    }
    Ok(())
}

// ---- CIFAR's archives -----------------------------------------------------------------------------------------------

fn archive(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    tar(&files.iter().map(|(name, bytes)| (*name, &bytes[..])).collect::<Vec<_>>())
}

fn python_archive() -> Vec<u8> {
    let [one, two, test] = python_files();
    // In another order than the images, beside a file that is not read.
    archive(&[two, test, ("cifar-10-batches-py/readme.html", vec![b'<'; 700]), one])
}

#[test]
fn archives_are_read_unopened() -> TestResult {
    let folder = folder_of(&[("cifar-10-python.tar.gz", gzip(&python_archive()))])?;
    let path = folder.path().join("cifar-10-python.tar.gz");
    check_cifar10(&load(folder.path())?);
    check_cifar10(&load(&path)?);
    assert_eq!(load_split(&path, Split::Test)?.images.labels, [3, 8]);
    assert_eq!(load_split(&path, Split::Train)?.images.labels, [6, 9, 0, 4]);

    // What was unpacked in the same folder is the same data set.
    let unpacked = folder.path().join("cifar-10-batches-py");
    fs::create_dir(&unpacked)?;
    fs::write(unpacked.join("test_batch"), pickled_batch("labels", &[5]))?;
    assert_eq!(load_split(folder.path(), Split::Test)?.images.labels, [5]);
    assert_eq!(load_split(&path, Split::Test)?.images.labels, [3, 8], "the archive that is named");

    let other = folder_of(&[
        ("cifar-10-python.tar.gz", gzip(&python_archive())),
        ("cifar-100-binary.tar.gz", gzip(&archive(&[]))),
    ])?;
    let line = error_line(other.path(), other.path());
    let both = "cifar-10-python.tar.gz and cifar-100-binary.tar.gz";
    assert_eq!(line, format!("DIR: holds two data sets, {both}; expected a folder with one"));
    Ok(())
}

#[test]
fn archives_of_every_version_are_read() -> TestResult {
    let record = |labels: &[u8]| [labels, &(0..3072).map(pixel).collect::<Vec<_>>()].concat();
    for (name, files, train, test) in [
        (
            "cifar-10-binary.tar.gz",
            [
                ("cifar-10-batches-bin/test_batch.bin", record(&[4])),
                ("cifar-10-batches-bin/data_batch_1.bin", record(&[2])),
            ],
            2,
            4,
        ),
        (
            "cifar-100-binary.tar.gz",
            [("./cifar-100-binary/train.bin", record(&[1, 77])), ("./cifar-100-binary/test.bin", record(&[0, 5]))],
            77,
            5,
        ),
        (
            "cifar-100-python.tar.gz",
            [
                ("cifar-100-python/train", pickled_batch("fine_labels", &[88])),
                ("cifar-100-python/test", pickled_batch("fine_labels", &[6])),
            ],
            88,
            6,
        ),
    ] {
        let folder = folder_of(&[(name, gzip(&archive(&files)))])?;
        let data = load(folder.path())?;
        assert_eq!((data.train.labels.clone(), data.test.labels.clone()), (vec![train], vec![test]), "{name}");
        check_planes(bytes(&data.test), 0, false);
    }
    // From Python's tarfile, with its extended headers.
    let folder = folder_of(&[("cifar-10-python.tar.gz", fixture("cifar-10-python.tar.gz")?)])?;
    assert_eq!(load(folder.path())?.train.labels, [4]);
    Ok(())
}

#[test]
fn damaged_archives_are_named() -> TestResult {
    let good = gzip(&python_archive());
    let [one, _, test] = python_files();
    let mut checksum = good.clone();
    let end = checksum.len() - 6;
    checksum[end] ^= 1;
    let cut = python_archive()[..20_000].to_vec();
    let twice = archive(&[test.clone(), one.clone(), test.clone()]);
    let wrong = archive(&[(test.0, vec![0; 9]), one.clone()]);
    for (bytes, line) in [
        (
            checksum,
            "DIR/cifar-10-python.tar.gz: damaged archive: corrupt gzip stream does not have a matching checksum",
        ),
        (b"<html>".to_vec(), "DIR/cifar-10-python.tar.gz: damaged archive: unexpected end of file"),
        (gzip(&archive(&[test])), "DIR/cifar-10-python.tar.gz: no data_batch_1, which the train split needs"),
        (
            gzip(&twice),
            "DIR/cifar-10-python.tar.gz: damaged archive: two files are named cifar-10-batches-py/test_batch",
        ),
        (gzip(&cut), "DIR/cifar-10-python.tar.gz/cifar-10-batches-py/data_batch_1: "),
        (
            gzip(&wrong),
            "DIR/cifar-10-python.tar.gz/cifar-10-batches-py/test_batch: not a pickle with images: it begins",
        ),
    ] {
        let folder = folder_of(&[("cifar-10-python.tar.gz", bytes)])?;
        let found = error_line(folder.path(), folder.path());
        assert!(found.starts_with(line), "{found}");
    }
    for length in (0..good.len()).step_by(7) {
        let folder = folder_of(&[("cifar-10-python.tar.gz", good[..length].to_vec())])?;
        error_line(folder.path(), folder.path());
    }
    Ok(())
}

/// An archive of a megabyte or so that would unpack to more than half a gigabyte.
#[test]
fn an_archive_unpacks_to_a_bounded_length() -> TestResult {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut header = tar(&[("zeros", &[])])[..512].to_vec();
    header[124..136].copy_from_slice(b"07777777777\0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    std::io::Write::write_all(&mut encoder, &header)?;
    let zeros = vec![0; 1 << 20];
    for _ in 0..513 {
        std::io::Write::write_all(&mut encoder, &zeros)?;
    }
    let folder = folder_of(&[("cifar-10-python.tar.gz", encoder.finish()?)])?;
    let says = "DIR/cifar-10-python.tar.gz: damaged archive: it unpacks to more than 536870912 bytes";
    assert_eq!(error_line(folder.path(), folder.path()), says);
    Ok(())
}

// ---- SVHN -----------------------------------------------------------------------------------------------------------

#[test]
fn svhn_is_read() -> TestResult {
    let folder = folder_of(&[("train_32x32.mat", svhn(&[10, 3, 1])), ("test_32x32.mat", svhn(&[9, 10]))])?;
    let data = load(folder.path())?;
    assert_eq!((data.name.as_str(), data.statistics), ("svhn", StatisticsSource::TrainImages));
    assert_eq!((&data.train.labels[..], &data.test.labels[..], data.train.classes), (&[0, 3, 1][..], &[9, 0][..], 10));
    assert_eq!(data.train.shape, ImageShape { height: 32, width: 32, channels: 3 });
    for (index, image) in bytes(&data.train).chunks(3072).enumerate() {
        check_planes(image, 3072 * index, true);
    }
    let test = load_split(folder.path(), Split::Test)?;
    assert_eq!((test.mean, test.std, test.images), (data.mean, data.std, data.test));

    // More images are used if their file is the path.
    fs::write(folder.path().join("extra_32x32.mat"), svhn(&[7]))?;
    assert_eq!(load(folder.path())?.train.labels, [0, 3, 1]);
    let extra = folder.path().join("extra_32x32.mat");
    let data = load(&extra)?;
    assert_eq!((data.train.labels.clone(), data.test.labels.clone()), (vec![0, 3, 1, 7], vec![9, 0]));
    check_planes(&bytes(&data.train)[3 * 3072..], 0, true);

    fs::remove_file(folder.path().join("train_32x32.mat"))?;
    assert_eq!(load_split(folder.path(), Split::Test)?.statistics, StatisticsSource::Unknown);
    assert_eq!(error_line(folder.path(), &extra), "DIR: no train_32x32.mat, which the train split needs");
    Ok(())
}

#[test]
fn matlab_files_from_scipy_are_read() -> TestResult {
    for name in ["svhn.mat", "svhn-double.mat"] {
        let folder = folder_of(&[("train_32x32.mat", fixture(name)?), ("test_32x32.mat", fixture(name)?)])?;
        let data = load(folder.path())?;
        assert_eq!(data.train.labels, [0, 3], "{name}");
        // The generator's array is images x channels x columns x rows, so each plane lies by columns.
        for (index, image) in bytes(&data.train).chunks(3072).enumerate() {
            check_planes(image, 3072 * index, true);
        }
    }
    Ok(())
}

#[test]
fn other_matlab_files_are_named() -> TestResult {
    let images = |count: u32| mat_variable("X", &[32, 32, 3, count], &vec![7; 3072 * count as usize]);
    let labels = |labels: &[u8]| mat_variable("y", &[labels.len() as u32, 1], labels);
    let mut damaged = svhn(&[1, 2]);
    let at = damaged.len() - 2;
    damaged[at] ^= 0x55;
    let not = "DIR/test_32x32.mat: not a MATLAB file of SVHN:";
    let hdf5 = [&b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: now"[..], &[b' '; 69], b"\x00\x02IM"].concat();
    for (bytes, line) in [
        (Vec::new(), format!("{not} it begins with ``, expected a little-endian MATLAB file of version 5")),
        (hdf5, format!("{not} it begins with `MATLAB 7.3 MAT-file, Platform: GLNXA64, `, expected a little-endian")),
        (mat(&[images(1)]), format!("{not} it has no variable y")),
        (mat(&[labels(&[1])]), format!("{not} it has no variable X")),
        (mat(&[images(2), labels(&[1])]), "DIR/test_32x32.mat: 2 images, expected 1, as many as there are".into()),
        (mat(&[images(1), labels(&[11])]), "DIR/test_32x32.mat: label 11 at sample 0, expected 0 to 10".into()),
        (
            mat(&[mat_variable("X", &[3, 32, 32, 1], &[0; 3072]), labels(&[1])]),
            format!("{not} X has 3 x 32 x 32 x 1 numbers of kind 2, expected 32 x 32 x 3 x N unsigned bytes"),
        ),
        (
            mat(&[mat_variable("X", &[32, 32, 3, 1], &[0; 3070]), labels(&[1])]),
            format!("{not} X has 32 x 32 x 3 x 1 numbers of kind 2, expected as many as its 3070 bytes are"),
        ),
        // The images are looked at first: labels for a million of them would not be worth their memory.
        (
            mat(&[mat_variable("X", &[32, 32, 3, 1 << 20], &[0; 3072]), mat_variable("y", &[1 << 20, 1], &[1; 5])]),
            format!("{not} X has 32 x 32 x 3 x 1048576 numbers of kind 2, expected as many as its 3072 bytes are"),
        ),
        (damaged, format!("{not} damaged: ")),
        (svhn(&[1])[..200].to_vec(), "DIR/test_32x32.mat: 200 bytes, expected ".into()),
    ] {
        let folder = folder_of(&[("train_32x32.mat", svhn(&[1])), ("test_32x32.mat", bytes)])?;
        let found = error_line(folder.path(), folder.path());
        assert!(found.starts_with(&line), "{found}");
    }
    let good = svhn(&[1, 2]);
    for length in 0..good.len() {
        let folder = folder_of(&[("train_32x32.mat", good[..length].to_vec()), ("test_32x32.mat", svhn(&[1]))])?;
        error_line(folder.path(), folder.path());
    }
    Ok(())
}

// ---- Arrays of NumPy ------------------------------------------------------------------------------------------------

fn npy_folder() -> Result<TempDir, Box<dyn Error>> {
    let pixels: Vec<u8> = (0..90).map(pixel).collect();
    folder_of(&[
        ("train_images.npy", npy("|u1", &[3, 5, 6], &pixels)),
        ("train_labels.npy", npy("<i8", &[3], bytemuck::cast_slice(&[2i64, 0, 1]))),
        ("test_images.npy", npy("|u1", &[2, 5, 6], &pixels[..60])),
        ("test_labels.npy", npy("|u1", &[2], &[1, 3])),
    ])
}

#[test]
fn arrays_are_read() -> TestResult {
    let folder = npy_folder()?;
    let data = load(folder.path())?;
    assert_eq!(data.name, folder.path().file_name().unwrap_or_default().to_string_lossy());
    assert_eq!(data.train.shape, ImageShape { height: 5, width: 6, channels: 1 });
    assert_eq!(bytes(&data.train), (0..90).map(pixel).collect::<Vec<_>>());
    assert_eq!((&data.train.labels[..], &data.test.labels[..]), (&[2, 0, 1][..], &[1, 3][..]));
    assert_eq!((data.train.classes, data.test.classes), (4, 4), "the largest label of both splits is 3");
    let test = load_split(folder.path(), Split::Test)?;
    assert_eq!((test.mean, test.std, test.images), (data.mean, data.std, data.test));

    // Colours, and labels of another type and byte order, from NumPy itself.
    fs::write(folder.path().join("train_images.npy"), fixture("images.npy")?)?;
    fs::write(folder.path().join("train_labels.npy"), fixture("labels.npy")?)?;
    let train = load_split(folder.path(), Split::Train)?;
    assert_eq!(train.images.shape, ImageShape { height: 4, width: 5, channels: 3 });
    assert_eq!((train.images.labels.clone(), train.mean.len()), (vec![2, 0, 1], 3));
    assert_eq!(bytes(&train.images), (0..180).map(pixel).collect::<Vec<_>>());
    assert!(
        error_line(folder.path(), folder.path())
            .ends_with("test images are 5x6x1, expected 4x5x3, as the training images are")
    );

    for file in ["train_images.npy", "train_labels.npy"] {
        fs::remove_file(folder.path().join(file))?;
    }
    assert_eq!(load_split(folder.path(), Split::Test)?.statistics, StatisticsSource::Unknown);
    assert_eq!(error_line(folder.path(), folder.path()), "DIR: no train_images.npy, which the train split needs");
    Ok(())
}

#[test]
fn other_arrays_are_named() -> TestResult {
    let zeros = |dtype: &str, sizes: &[usize], bytes: usize| npy(dtype, sizes, &vec![0; bytes]);
    let header = |text: &str| [b"\x93NUMPY\x01\x00", &(text.len() as u16).to_le_bytes()[..], text.as_bytes()].concat();
    let images = "DIR/train_images.npy:";
    let labels = "DIR/train_labels.npy:";
    let expected = "expected images x rows x columns, or images x rows x columns x channels (1 to 4)";
    let fortran = header("{'descr': '|u1', 'fortran_order': True, 'shape': (3, 5, 6), }");
    for (name, bytes, line) in [
        ("train_images.npy", Vec::new(), format!("{images} it begins with ``, and not as a .npy file does")),
        ("train_images.npy", b"PK\x03\x04".to_vec(), format!("{images} it begins with `PK\\x03\\x04`, and")),
        (
            "train_images.npy",
            zeros("<f4", &[3, 5, 6], 360),
            format!("{images} an array of 3 x 5 x 6 and type <f4, expected unsigned"),
        ),
        (
            "train_images.npy",
            zeros("|u1", &[3, 30], 90),
            format!("{images} an array of 3 x 30 and type |u1, {expected}"),
        ),
        (
            "train_images.npy",
            zeros("|u1", &[3, 3, 5, 6], 270),
            format!("{images} an array of 3 x 3 x 5 x 6 and type |u1, {expected}"),
        ),
        ("train_images.npy", zeros("|u1", &[3, 0, 6], 0), format!("{images} it has no elements, or more than")),
        (
            "train_images.npy",
            zeros("|u1", &[1 << 40, 1 << 40, 6], 0),
            format!("{images} it has no elements, or more than"),
        ),
        ("train_images.npy", zeros("|u1", &[3, 5, 6], 89), format!("{images} 217 bytes, expected 218")),
        (
            "train_images.npy",
            zeros("|u1", &[3, 5, 6], 91),
            format!("{images} more than 218 bytes, expected exactly those"),
        ),
        (
            "train_images.npy",
            zeros("|u1", &[4, 5, 6], 120),
            format!("{images} 4 images, expected 3, as many as there are labels in {}", &labels[..20]),
        ),
        (
            "train_images.npy",
            [fortran, vec![0; 90]].concat(),
            format!("{images} it is in Fortran order, expected C order"),
        ),
        (
            "train_images.npy",
            header(&"[".repeat(500)),
            format!("{images} it has the header of a record, not of numbers"),
        ),
        (
            "train_images.npy",
            header(&"(".repeat(60_000)),
            format!("{images} a .npy header that is cut off or too long"),
        ),
        (
            "train_images.npy",
            b"\x93NUMPY\x02\x00\xff\xff\xff\xff{".to_vec(),
            format!("{images} a .npy header that is cut off"),
        ),
        ("train_images.npy", header("{'descr': '|u1'}"), format!("{images} damaged: ")),
        (
            "train_labels.npy",
            zeros("<f8", &[3], 24),
            format!("{labels} an array of 3 and type <f8, expected a vector of integers"),
        ),
        (
            "train_labels.npy",
            zeros("|u1", &[3, 1], 3),
            format!("{labels} an array of 3 x 1 and type |u1, expected a vector of integers"),
        ),
        (
            "train_labels.npy",
            npy("<i4", &[3], bytemuck::cast_slice(&[0, 1, -5i32])),
            format!("{labels} label -5 at sample 2, expected 0 to 65535"),
        ),
        (
            "train_labels.npy",
            npy("<u8", &[3], bytemuck::cast_slice(&[0, u64::MAX, 5])),
            format!("{labels} an array of 3 and type <u8, expected labels"),
        ),
    ] {
        let folder = npy_folder()?;
        fs::write(folder.path().join(name), bytes)?;
        let found = error_line(folder.path(), folder.path());
        assert!(found.starts_with(&line), "{found}\n{line}");
    }
    Ok(())
}

// ---- CIFAR-10-C -----------------------------------------------------------------------------------------------------

#[test]
fn corrupted_images_are_read_by_severity() -> TestResult {
    let pixels: Vec<u8> = (0..10 * 3072).map(pixel).collect();
    let folder = folder_of(&[
        ("labels.npy", npy("|u1", &[10], &[4, 9, 4, 9, 4, 9, 4, 9, 4, 9])),
        ("zoom_blur.npy", npy("|u1", &[10, 32, 32, 3], &pixels)),
        ("saturate.npy", npy("|u1", &[10, 32, 32, 3], &vec![9; pixels.len()])),
        ("gaussian_noise.npy", npy("|u1", &[10, 32, 32, 3], &vec![5; pixels.len()])),
        ("fog.npy", npy("|u1", &[10, 32, 32], &[0; 10240])),
        ("frost.npy", npy("|u1", &[9, 32, 32, 3], &vec![5; 9 * 3072])),
    ])?;
    let corrupted = Corrupted::open(folder.path())?;
    assert_eq!(corrupted.names, ["gaussian_noise", "zoom_blur", "frost", "fog", "saturate"]);
    assert!(Corrupted::is_of_benchmark("fog") && !Corrupted::is_of_benchmark("saturate"));
    for severity in 1..=5 {
        let found = corrupted.read("zoom_blur", severity)?;
        assert_eq!((found.name.as_str(), found.images.classes), ("cifar-10-c", 10));
        assert_eq!((&found.images.labels[..], found.mean[0]), (&[4, 9][..], 0.4914));
        assert_eq!(*bytes(&found.images), pixels[(severity - 1) * 6144..severity * 6144]);
    }
    let line = |name: &str, severity| match corrupted.read(name, severity) {
        Ok(_) => panic!("{name} was read"),
        Err(error) => error.to_string().replace(&folder.path().display().to_string(), "DIR"),
    };
    let present = "it has gaussian_noise, zoom_blur, frost, fog, saturate";
    assert_eq!(line("../snow", 1), format!("DIR: no ../snow.npy; {present}"));
    assert!(line("fog", 1).starts_with("DIR/fog.npy: an array of 10 x 32 x 32 and type |u1, expected N x 32 x 32 x 3"));
    assert_eq!(line("frost", 2), "DIR/frost.npy: 9 images, expected 10, as many as there are labels in DIR/labels.npy");
    let says = "DIR: holds corrupted test images; only an evaluation with a corruption reads them";
    assert_eq!(error_line(folder.path(), folder.path()), says);

    fs::write(folder.path().join("labels.npy"), npy("|u1", &[9], &[1; 9]))?;
    assert!(matches!(Corrupted::open(folder.path()), Err(DataError::Npy { .. })));
    fs::write(folder.path().join("labels.npy"), npy("|u1", &[10], &[99; 10]))?;
    assert_eq!(Corrupted::open(folder.path())?.read("zoom_blur", 1)?.name, "cifar-100-c");
    Ok(())
}

// ---- Pictures by class ----------------------------------------------------------------------------------------------

/// A picture of one colour.
fn plain(width: u32, height: u32, colour: [u8; 3]) -> Vec<u8> {
    png(width, height, &colour.repeat((width * height) as usize))
}

#[test]
fn pictures_are_read_by_class() -> TestResult {
    let gradient: Vec<u8> = (0..60).map(pixel).collect();
    let folder = folder_of(&[
        ("train/dog/2.png", plain(4, 5, [1, 2, 3])),
        ("train/dog/10.PNG", png(4, 5, &gradient)),
        ("train/cat/x.png", plain(4, 5, [4, 5, 6])),
        ("train/cat/.hidden.png", b"not read".to_vec()),
        ("train/cat/notes.txt", b"not read".to_vec()),
        ("val/dog/1.png", plain(4, 5, [7, 8, 9])),
        ("val/eel/1.png", plain(4, 5, [250, 0, 9])),
    ])?;
    let data = load(folder.path())?;
    assert_eq!(data.name, folder.path().file_name().unwrap_or_default().to_string_lossy());
    assert_eq!(data.train.shape, ImageShape { height: 5, width: 4, channels: 3 });
    assert_eq!((&data.train.labels[..], &data.test.labels[..]), (&[0, 1, 1][..], &[1, 2][..]));
    assert_eq!((data.train.classes, data.test.classes), (3, 3), "the classes of both splits");
    let expected = [[4, 5, 6].repeat(20), gradient, [1, 2, 3].repeat(20)].concat();
    assert_eq!(bytes(&data.train), expected);
    assert_eq!(bytes(&data.test), [[7, 8, 9].repeat(20), [250, 0, 9].repeat(20)].concat());
    let test = load_split(folder.path(), Split::Test)?;
    assert_eq!((test.images, test.mean, test.std), (data.test, data.mean, data.std));

    fs::remove_dir_all(folder.path().join("train"))?;
    let test = load_split(folder.path(), Split::Test)?;
    assert_eq!((test.statistics, test.images.classes), (StatisticsSource::Unknown, 2));
    assert_eq!(error_line(folder.path(), folder.path()), "DIR: no train, which the train split needs");
    fs::create_dir(folder.path().join("test"))?;
    assert!(matches!(load_split(folder.path(), Split::Test), Err(DataError::Ambiguous { .. })));
    Ok(())
}

#[test]
fn pictures_are_cut_and_resized() -> TestResult {
    // Columns 0, 1 | 2, 3, 4, 5 | 6, 7: the middle square has halves of 100 and 200, and what is cut off is 0.
    let row = [[0; 6], [100; 6], [200; 6], [0; 6]].concat();
    let folder = folder_of(&[
        ("train/a/wide.png", png(8, 4, &row.repeat(4))),
        ("train/a/small.png", plain(1, 1, [9, 8, 7])),
        ("test/a/high.png", plain(3, 11, [50, 60, 70])),
    ])?;
    let line = error_line(folder.path(), folder.path());
    let says =
        "DIR/train/a/wide.png: 4x8x3, expected 1x1x3 as DIR/train/a/small.png is; `image-size` makes them the same";
    assert_eq!(line, says);
    let data = load_sized(folder.path(), Some(4))?;
    assert_eq!(data.train.shape, ImageShape { height: 4, width: 4, channels: 3 });
    assert_eq!(bytes(&data.train)[..48], [9, 8, 7].repeat(16));
    assert_eq!(bytes(&data.train)[48..], [[100; 6], [200; 6]].concat().repeat(4));
    assert_eq!(bytes(&data.test), [50, 60, 70].repeat(16));
    // Halves of the width, each the mean of what it covers, with a share of its neighbour.
    let options = LoadOptions { image_size: Some(2), ..LoadOptions::default() };
    let images = load_split_with(folder.path(), Split::Train, &options, &mut |_, _| true)?.images;
    let half = bytes(&images);
    assert!((100..130).contains(&half[12]) && (170..=200).contains(&half[15]), "{half:?}");

    for size in [0, 20_000, usize::MAX] {
        assert!(load_sized(folder.path(), Some(size)).is_err());
    }
    let error = load_sized(Path::new("synthetic"), Some(8)).map(|data| data.name);
    assert!(matches!(error, Err(DataError::NotResized { name: "synthetic", .. })));
    Ok(())
}

/// JPEG and WebP, grey and transparent pictures.
#[test]
fn pictures_of_several_kinds_are_read() -> TestResult {
    use image::{DynamicImage, GrayImage, Luma, Rgb, RgbImage, Rgba, RgbaImage};
    let folder = TempDir::new()?;
    let class = folder.path().join("train/a");
    fs::create_dir_all(&class)?;
    let colour: DynamicImage = RgbImage::from_pixel(16, 16, Rgb([200, 100, 50])).into();
    let pictures: [(&str, DynamicImage); 4] = [
        ("1.jpg", colour.clone()),
        ("2.webp", colour),
        ("3.png", GrayImage::from_pixel(16, 16, Luma([77])).into()),
        ("4.png", RgbaImage::from_pixel(16, 16, Rgba([1, 2, 3, 0])).into()),
    ];
    for (name, picture) in pictures {
        picture.save(class.join(name))?;
    }
    let images = load_split(folder.path(), Split::Train)?.images;
    let jpeg = &bytes(&images)[..768];
    assert!(jpeg.iter().zip([200, 100, 50].repeat(256)).all(|(&found, expected)| found.abs_diff(expected) < 4));
    let others = [[200, 100, 50].repeat(256), vec![77; 768], [1, 2, 3].repeat(256)].concat();
    assert_eq!(bytes(&images)[768..], others);
    Ok(())
}

/// Other programs' JPEG, baseline and progressive, and WebP, lossy and lossless.
#[test]
fn pictures_of_other_programs_are_read() -> TestResult {
    for name in PICTURES {
        let folder = folder_of(&[(&format!("train/a/{name}"), picture(name))])?;
        let images = load_split(folder.path(), Split::Train)?.images;
        assert_eq!(images.shape, ImageShape { height: 5, width: 6, channels: 3 });
        let most = if name == "lossless.webp" { 0 } else { 12 };
        for (index, &found) in bytes(&images).iter().enumerate() {
            let expected = (40 * (index % 3) + 20 * (index / 18) + 10 * (index / 3 % 6)) as u8;
            assert!(found.abs_diff(expected) <= most, "{name}, {index}: {found} instead of {expected}");
        }
    }
    Ok(())
}

#[test]
fn pictures_that_cannot_be_read_are_named() -> TestResult {
    let good = plain(8, 8, [1, 2, 3]);
    let sized = |width: u32, height: u32| {
        let mut header = [b"IHDR", &width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
        let mut crc = flate2::Crc::new();
        crc.update(&header);
        header.extend(crc.sum().to_be_bytes());
        [&good[..12], &header, &good[33..]].concat()
    };
    for bytes in [
        sized(16_385, 1),
        sized(1, 20_000),
        sized(16_384, 16_384),
        sized(0, 8),
        sized(8, 800),
        Vec::new(),
        b"<html>".to_vec(),
        good[..good.len() / 2].to_vec(),
    ] {
        let folder =
            folder_of(&[("train/a/1.png", good.clone()), ("train/a/2.png", bytes), ("test/a/1.png", good.clone())])?;
        for size in [None, Some(8)] {
            let line = match load_sized(folder.path(), size) {
                Ok(_) => panic!("a damaged picture was read"),
                Err(error) => error.to_string().replace(&folder.path().display().to_string(), "DIR"),
            };
            assert!(line.starts_with("DIR/train/a/2.png: "), "{line}");
        }
    }
    Ok(())
}

// ---- The published data sets ----------------------------------------------------------------------------------------

/// The published test images in each format that can hold them.
#[test]
fn every_format_of_the_published_cifar10_has_the_same_images() -> TestResult {
    let Some(data) = std::env::var_os("POLDER_DATA") else {
        eprintln!("skipped: POLDER_DATA does not name a folder with cifar-10");
        return Ok(());
    };
    let expected = load_split(&Path::new(&data).join("cifar-10"), Split::Test)?.images;
    let labels = expected.labels.iter().map(|&label| label as u8).collect::<Vec<_>>();
    let plane = |image: &[u8], channel: usize| image.iter().skip(channel).step_by(3).copied().collect::<Vec<_>>();
    let planes: Vec<u8> = bytes(&expected)
        .chunks(3072)
        .flat_map(|image| [0, 1, 2].map(|channel| plane(image, channel)).concat())
        .collect();
    let pickle = pickled_images("labels", &labels, &planes);
    let packed = gzip(&tar(&[("cifar-10-batches-py/test_batch", &pickle)]));
    let arrays = [npy("|u1", &[10_000, 32, 32, 3], bytes(&expected)), npy("|u1", &[10_000], &labels)];
    let [images, truth] = arrays;
    for files in [
        vec![("test_batch", pickle)],
        vec![("cifar-10-python.tar.gz", packed)],
        vec![("test_images.npy", images), ("test_labels.npy", truth)],
    ] {
        let folder = folder_of(&files)?;
        assert!(load_split(folder.path(), Split::Test)?.images == expected, "{}", files[0].0);
    }
    Ok(())
}
