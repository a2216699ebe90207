//! The promises of `polder::data`: exact contents, one clear error line for every kind of damage, and random choices
//! that are the same everywhere. With `POLDER_DATA=DIR` the published data sets in `DIR/cifar-10` and
//! `DIR/fashion-mnist` are read too.

use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use approx::abs_diff_eq;
use flate2::Compression;
use flate2::write::GzEncoder;
use polder::data::{
    DataError, ImageShape, Images, Split, StatisticsSource, SyntheticSpec, epoch_order, load, load_split, synthetic,
};
use proptest::prelude::*;
use tempfile::TempDir;

type TestResult = Result<(), Box<dyn Error>>;

/// The pixels of images in memory.
fn bytes(images: &Images) -> &[u8] {
    images.pixels.memory().expect("no folder of pictures that is too large")
}

// ---- Files to read --------------------------------------------------------------------------------------------------

/// Pixel bytes that differ between neighbouring positions, so that a wrong stride or order is noticed.
fn pattern(index: usize) -> u8 {
    ((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// CIFAR records with these label bytes, and pixels that continue from one record to the next.
fn cifar_records(labels: &[&[u8]], first_pixel: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (record, labels) in labels.iter().enumerate() {
        bytes.extend_from_slice(labels);
        bytes.extend((0..3072).map(|index| pattern(first_pixel + record * 3072 + index)));
    }
    bytes
}

fn idx_bytes(magic: u32, sizes: &[u32], values: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
    bytes.extend_from_slice(values);
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("a Vec takes all bytes");
    encoder.finish().expect("a Vec takes all bytes")
}

/// A folder with one CIFAR-10 training batch of three records and a test batch of two.
fn cifar10_folder() -> Result<TempDir, Box<dyn Error>> {
    let folder = TempDir::new()?;
    fs::write(folder.path().join("data_batch_1.bin"), cifar_records(&[&[6], &[9], &[0]], 0))?;
    fs::write(folder.path().join("test_batch.bin"), cifar_records(&[&[3], &[8]], 7))?;
    Ok(folder)
}

const TRAIN_LABELS: [u8; 4] = [2, 0, 4, 1];
const TEST_LABELS: [u8; 2] = [5, 3];

/// A folder with four training and two test images of 5x6 in plain IDX files.
fn idx_folder() -> Result<TempDir, Box<dyn Error>> {
    let folder = TempDir::new()?;
    let pixels: Vec<u8> = (0..4 * 30).map(pattern).collect();
    fs::write(folder.path().join("train-images-idx3-ubyte"), idx_bytes(0x803, &[4, 5, 6], &pixels))?;
    fs::write(folder.path().join("train-labels-idx1-ubyte"), idx_bytes(0x801, &[4], &TRAIN_LABELS))?;
    fs::write(folder.path().join("t10k-images-idx3-ubyte"), idx_bytes(0x803, &[2, 5, 6], &pixels[30..90]))?;
    fs::write(folder.path().join("t10k-labels-idx1-ubyte"), idx_bytes(0x801, &[2], &TEST_LABELS))?;
    Ok(folder)
}

/// The error of reading a folder, as its one line, with the folder's own path replaced by `DIR`.
fn error_line(folder: &Path) -> String {
    let error = match load(folder) {
        Ok(data) => panic!("{} was read as {}", folder.display(), data.name),
        Err(error) => error,
    };
    let line = error.to_string().replace(&folder.display().to_string(), "DIR");
    assert!(!line.contains('\n'), "more than one line: {line}");
    line
}

// ---- CIFAR ----------------------------------------------------------------------------------------------------------

#[test]
fn cifar10_planes_become_nhwc() -> TestResult {
    let folder = cifar10_folder()?;
    fs::write(folder.path().join("data_batch_2.bin"), cifar_records(&[&[4]], 3 * 3072))?;
    let data = load(folder.path())?;
    assert_eq!((data.name.as_str(), data.statistics), ("cifar-10", StatisticsSource::Published));
    assert_eq!(data.mean, [0.4914, 0.4822, 0.4465]);
    assert_eq!(data.std, [0.2470, 0.2435, 0.2616]);
    assert_eq!(data.train.shape, ImageShape { height: 32, width: 32, channels: 3 });
    assert_eq!((data.train.classes, data.test.classes), (10, 10));
    assert_eq!(data.train.labels, [6, 9, 0, 4]);
    assert_eq!(data.test.labels, [3, 8]);
    assert_eq!((bytes(&data.train).len(), bytes(&data.test).len()), (4 * 3072, 2 * 3072));
    for (images, first_pixel) in [(&data.train, 0), (&data.test, 7)] {
        for sample in 0..images.len() {
            for (y, x, channel) in (0..32).flat_map(|y| (0..32).flat_map(move |x| (0..3).map(move |c| (y, x, c)))) {
                let found = bytes(images)[((sample * 32 + y) * 32 + x) * 3 + channel];
                let expected = pattern(first_pixel + sample * 3072 + channel * 1024 + y * 32 + x);
                assert_eq!(found, expected, "sample {sample}, y {y}, x {x}, channel {channel}");
            }
        }
    }
    Ok(())
}

#[test]
fn cifar100_uses_the_fine_label() -> TestResult {
    let folder = TempDir::new()?;
    let archive = folder.path().join("cifar-100-binary");
    fs::create_dir(&archive)?;
    fs::write(archive.join("train.bin"), cifar_records(&[&[19, 99], &[0, 42]], 0))?;
    fs::write(archive.join("test.bin"), cifar_records(&[&[7, 20]], 5))?;
    let data = load(folder.path())?;
    assert_eq!(
        (data.name.as_str(), data.statistics, data.train.classes),
        ("cifar-100", StatisticsSource::Published, 100)
    );
    assert_eq!(data.mean, [0.5071, 0.4865, 0.4409]);
    assert_eq!(data.std, [0.2673, 0.2564, 0.2762]);
    assert_eq!(data.train.labels, [99, 42]);
    assert_eq!(data.test.labels, [20]);
    assert_eq!(bytes(&data.test)[..3], [pattern(5), pattern(5 + 1024), pattern(5 + 2048)]);

    fs::write(archive.join("test.bin"), cifar_records(&[&[20, 5]], 0))?;
    let line = error_line(folder.path());
    assert_eq!(line, "DIR/cifar-100-binary/test.bin: label 20 at sample 0, expected 0 to 19");
    Ok(())
}

#[test]
fn cifar10_is_found_in_the_archives_own_folder() -> TestResult {
    let folder = TempDir::new()?;
    let archive = folder.path().join("cifar-10-batches-bin");
    fs::create_dir(&archive)?;
    fs::write(archive.join("test_batch.bin"), cifar_records(&[&[3]], 0))?;
    assert_eq!(load_split(folder.path(), Split::Test)?.images.labels, [3]);
    assert_eq!(load_split(&archive, Split::Test)?.images.labels, [3]);
    Ok(())
}

#[test]
fn one_split_does_without_the_other() -> TestResult {
    let folder = cifar10_folder()?;
    let both = load(folder.path())?;
    fs::remove_file(folder.path().join("test_batch.bin"))?;
    let train = load_split(folder.path(), Split::Train)?;
    assert_eq!((train.images, train.mean, train.std), (both.train, both.mean, both.std));
    assert_eq!(error_line(folder.path()), "DIR: no test_batch.bin, which the test split needs");
    Ok(())
}

#[test]
fn a_gap_in_the_training_batches_is_an_error() -> TestResult {
    let folder = cifar10_folder()?;
    fs::write(folder.path().join("data_batch_3.bin"), cifar_records(&[&[1]], 0))?;
    assert_eq!(error_line(folder.path()), "DIR: no data_batch_2.bin, which the train split needs");
    fs::remove_file(folder.path().join("data_batch_3.bin"))?;
    fs::rename(folder.path().join("data_batch_1.bin"), folder.path().join("data_batch_2.bin"))?;
    assert_eq!(error_line(folder.path()), "DIR: no data_batch_1.bin, which the train split needs");
    Ok(())
}

#[test]
fn damaged_cifar_files_are_named() -> TestResult {
    let folder = cifar10_folder()?;
    let test_batch = folder.path().join("test_batch.bin");
    let good = fs::read(&test_batch)?;
    let cases: [(&[u8], &str); 5] = [
        (&good[..1000], "DIR/test_batch.bin: 1000 bytes, expected a positive multiple of 3073"),
        (&good[..2 * 3073 - 1], "DIR/test_batch.bin: 6145 bytes, expected a positive multiple of 3073"),
        (&[&good[..], &[0]].concat(), "DIR/test_batch.bin: 6147 bytes, expected a positive multiple of 3073"),
        (&[], "DIR/test_batch.bin: 0 bytes, expected a positive multiple of 3073"),
        (&[&good[..3073], &[10], &good[3074..]].concat(), "DIR/test_batch.bin: label 10 at sample 1, expected 0 to 9"),
    ];
    for (bytes, expected) in cases {
        fs::write(&test_batch, bytes)?;
        assert_eq!(error_line(folder.path()), expected);
    }
    fs::remove_file(&test_batch)?;
    fs::create_dir(&test_batch)?;
    assert_eq!(error_line(folder.path()), "DIR: no test_batch.bin, which the test split needs", "a folder is no file");
    fs::remove_dir(&test_batch)?;
    if cfg!(unix) {
        assert!(std::process::Command::new("mkfifo").arg(&test_batch).status()?.success());
        assert_eq!(error_line(folder.path()), "DIR/test_batch.bin: not a regular file");
    }
    Ok(())
}

/// An archive of single files often unpacks to folders that have the names of these files.
#[test]
fn folders_with_the_names_of_files_are_passed_over() -> TestResult {
    let folder = idx_folder()?;
    let expected = load(folder.path())?;
    for entry in fs::read_dir(folder.path())?.collect::<Result<Vec<_>, _>>()? {
        let name = entry.file_name().into_string().map_err(|_| "a name that is not UTF-8")?;
        let dotted = name.replace("-idx", ".idx");
        fs::rename(entry.path(), folder.path().join(&dotted))?;
        fs::create_dir(folder.path().join(&name))?;
        fs::copy(folder.path().join(&dotted), folder.path().join(&name).join(&name))?;
    }
    let found = load(folder.path())?;
    assert_eq!((found.train, found.test), (expected.train, expected.test));
    Ok(())
}

// ---- IDX ------------------------------------------------------------------------------------------------------------

#[test]
fn idx_files_are_read_plain_gzipped_and_dotted() -> TestResult {
    let folder = idx_folder()?;
    let plain = load(folder.path())?;
    assert_eq!(plain.name, folder.path().file_name().unwrap_or_default().to_string_lossy());
    assert_eq!(plain.train.shape, ImageShape { height: 5, width: 6, channels: 1 });
    assert_eq!(bytes(&plain.train), (0..120).map(pattern).collect::<Vec<_>>());
    assert_eq!(bytes(&plain.test), (30..90).map(pattern).collect::<Vec<_>>());
    assert_eq!(plain.train.labels, [2, 0, 4, 1]);
    assert_eq!(plain.test.labels, [5, 3]);
    assert_eq!((plain.train.classes, plain.test.classes), (6, 6), "the largest label of both splits is 5");

    let file = |name: &str| folder.path().join(name);
    fs::rename(file("train-images-idx3-ubyte"), file("train-images.idx3-ubyte"))?;
    let labels = fs::read(file("train-labels-idx1-ubyte"))?;
    fs::write(file("train-labels.idx1-ubyte.gz"), gzip(&labels))?;
    fs::remove_file(file("train-labels-idx1-ubyte"))?;
    // Two gzip members in sequence are one file. The first bytes of a file decide, not its name.
    let images = fs::read(file("t10k-images-idx3-ubyte"))?;
    fs::write(file("t10k-images-idx3-ubyte"), [gzip(&images[..20]), gzip(&images[20..])].concat())?;
    fs::rename(file("t10k-labels-idx1-ubyte"), file("t10k-labels-idx1-ubyte.gz"))?;
    let mixed = load(folder.path())?;
    assert_eq!((mixed.train, mixed.test), (plain.train, plain.test));
    Ok(())
}

#[test]
fn unknown_idx_statistics_come_from_the_training_images() -> TestResult {
    let folder = idx_folder()?;
    let of = |images: &Images| {
        let values: Vec<f64> = bytes(images).iter().map(|&value| f64::from(value) / 255.0).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64;
        (mean, variance.sqrt())
    };
    let close = |found: &[f32], expected: f64| {
        // One f32 rounding of a number below 1, and f64 sums beside it.
        assert!(
            found.len() == 1 && abs_diff_eq!(f64::from(found[0]), expected, epsilon = 1e-7),
            "{found:?} {expected}"
        );
    };
    let data = load(folder.path())?;
    let (mean, std) = of(&data.train);
    assert_eq!(data.statistics, StatisticsSource::TrainImages);
    close(&data.mean, mean);
    close(&data.std, std);

    for split in [Split::Train, Split::Test] {
        let one = load_split(folder.path(), split)?;
        assert_eq!((&one.mean, &one.std, one.statistics), (&data.mean, &data.std, StatisticsSource::TrainImages));
        assert_eq!(one.images, if split == Split::Train { data.train.clone() } else { data.test.clone() });
    }

    fs::remove_file(folder.path().join("train-images-idx3-ubyte"))?;
    fs::remove_file(folder.path().join("train-labels-idx1-ubyte"))?;
    let alone = load_split(folder.path(), Split::Test)?;
    assert_eq!((alone.mean, alone.std, alone.statistics), (vec![], vec![], StatisticsSource::Unknown));
    Ok(())
}

#[test]
fn a_constant_channel_can_be_divided_by() -> TestResult {
    let folder = idx_folder()?;
    fs::write(folder.path().join("train-images-idx3-ubyte"), idx_bytes(0x803, &[4, 5, 6], &[51; 120]))?;
    let data = load(folder.path())?;
    assert_eq!((data.mean, data.std), (vec![0.2], vec![1.0]));
    Ok(())
}

/// MNIST and Fashion-MNIST have the same file names and sizes.
#[test]
fn mnist_and_fashion_mnist_are_told_apart_by_their_labels() -> TestResult {
    let mnist = [
        [5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5, 3, 6, 1, 7, 2, 8, 6, 9],
        [7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 0, 6, 9, 0, 1, 5, 9, 7, 3, 4],
    ];
    let fashion = [
        [9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9, 5, 5, 7, 9, 1, 0, 6, 4],
        [9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4, 5, 7, 3, 4, 1, 2, 4, 8, 0],
    ];
    for (labels, name, mean, std) in [(mnist, "mnist", 0.1307, 0.3081), (fashion, "fashion-mnist", 0.2860, 0.3530)] {
        let folder = TempDir::new()?;
        let file = |name: &str| folder.path().join(name);
        let images = idx_bytes(0x803, &[20, 28, 28], &vec![7; 20 * 784]);
        for (prefix, labels) in ["train", "t10k"].into_iter().zip(labels) {
            fs::write(file(&format!("{prefix}-images-idx3-ubyte.gz")), gzip(&images))?;
            fs::write(file(&format!("{prefix}-labels-idx1-ubyte.gz")), gzip(&idx_bytes(0x801, &[20], &labels)))?;
        }
        let data = load(folder.path())?;
        assert_eq!((data.name.as_str(), data.statistics), (name, StatisticsSource::Published));
        assert_eq!((data.mean, data.std, data.train.classes), (vec![mean], vec![std], 10));
        for split in [Split::Train, Split::Test] {
            let one = load_split(folder.path(), split)?;
            assert_eq!((one.name.as_str(), one.mean, one.std), (name, vec![mean], vec![std]));
        }

        let mut wrong = labels[1];
        wrong[18] = 10;
        fs::write(file("t10k-labels-idx1-ubyte.gz"), gzip(&idx_bytes(0x801, &[20], &wrong)))?;
        let line = error_line(folder.path());
        assert_eq!(line, "DIR/t10k-labels-idx1-ubyte.gz: label 10 at sample 18, expected 0 to 9");
    }
    Ok(())
}

#[test]
fn damaged_idx_files_are_named() -> TestResult {
    let folder = idx_folder()?;
    let pixels: Vec<u8> = (0..60).map(pattern).collect();
    let good = idx_bytes(0x803, &[2, 5, 6], &pixels);
    let packed = gzip(&good);
    let mut wrong_checksum = packed.clone();
    let checksum = packed.len() - 8;
    wrong_checksum[checksum] ^= 1;
    let cases: [(Vec<u8>, &str); 18] = [
        (vec![], "0 bytes, expected 16"),
        (good[..9].to_vec(), "9 bytes, expected 16"),
        (good[..16].to_vec(), "16 bytes, expected 76"),
        (good[..75].to_vec(), "75 bytes, expected 76"),
        ([&good[..], &[0]].concat(), "more than 76 bytes, expected exactly those"),
        (idx_bytes(0x801, &[2, 5, 6], &pixels), "magic number 0x00000801, expected 0x00000803"),
        (idx_bytes(0xd03, &[2, 5, 6], &pixels), "magic number 0x00000d03, expected 0x00000803"),
        (idx_bytes(0x803, &[0, 5, 6], &[]), "header announces 0 x 5 x 6, expected positive sizes"),
        (idx_bytes(0x803, &[2, 0, 6], &[]), "header announces 2 x 0 x 6, expected positive sizes"),
        (
            idx_bytes(0x803, &[u32::MAX; 3], &pixels),
            "header announces 4294967295 x 4294967295 x 4294967295 bytes, more than this machine can address",
        ),
        // Addressable, but 16 TiB that do not exist: nothing may be reserved for them.
        (idx_bytes(0x803, &[1 << 30, 1 << 7, 1 << 7], &pixels), "76 bytes, expected 17592186044432"),
        (gzip(&idx_bytes(0x803, &[2, 1 << 20, 1 << 20], &pixels)), "76 bytes, expected 2199023255568"),
        // Nothing is read of images that have no labels.
        (
            gzip(&idx_bytes(0x803, &[1 << 30, 1 << 7, 1 << 7], &pixels)),
            "1073741824 images, expected 2, as many as there are labels in DIR/t10k-labels-idx1-ubyte",
        ),
        (
            b"<!DOCTYPE html>\n<html>".to_vec(),
            "not an IDX file, nor a gzip file with one; it begins with `<!DOCTYPE html>\\n`",
        ),
        (gzip(b"\x1b[31m"), "not an IDX file, nor a gzip file with one; it begins with `\\x1b[31m`"),
        (gzip(&[&good[..], &[0]].concat()), "more than 76 bytes, expected exactly those"),
        (packed[..packed.len() - 3].to_vec(), "damaged gzip file: "),
        (wrong_checksum, "damaged gzip file: "),
    ];
    let path = folder.path().join("t10k-images-idx3-ubyte");
    for (bytes, expected) in cases {
        fs::write(&path, &bytes)?;
        let line = error_line(folder.path());
        let expected = format!("DIR/t10k-images-idx3-ubyte: {expected}");
        assert!(if expected.ends_with(": ") { line.starts_with(&expected) } else { line == expected }, "{line}");
    }
    // Data after the last gzip member does not belong to it.
    for more in [&b"more"[..], b"\0\0more", b"\x1f"] {
        fs::write(&path, [&packed[..], more].concat())?;
        assert!(matches!(load(folder.path()), Err(DataError::Gzip { .. })));
    }
    Ok(())
}

/// Some downloads and tapes end in zeros up to a whole block.
#[test]
fn zeros_behind_a_gzip_file_are_ignored() -> TestResult {
    let folder = idx_folder()?;
    let expected = load(folder.path())?;
    let path = folder.path().join("t10k-images-idx3-ubyte");
    let packed = gzip(&fs::read(&path)?);
    for zeros in [1, 511, 100_000] {
        fs::write(&path, [&packed[..], &vec![0; zeros]].concat())?;
        assert_eq!(load(folder.path())?.test, expected.test);
    }
    Ok(())
}

/// The labels of EMNIST's letters begin at 1.
#[test]
fn classes_without_images_are_named() -> TestResult {
    let folder = idx_folder()?;
    let labels: Vec<u8> = (1..=26).collect();
    for (prefix, labels) in [("train", &labels[..]), ("t10k", &labels[3..7])] {
        let count = labels.len() as u32;
        let images = idx_bytes(0x803, &[count, 5, 6], &vec![9; 30 * labels.len()]);
        fs::write(folder.path().join(format!("{prefix}-images-idx3-ubyte")), images)?;
        fs::write(folder.path().join(format!("{prefix}-labels-idx1-ubyte")), idx_bytes(0x801, &[count], labels))?;
    }
    let mut data = load(folder.path())?;
    assert_eq!((data.train.classes, data.absent_classes()), (27, vec![0]));
    data.train.labels[4] = 1;
    assert_eq!(data.absent_classes(), [0], "a test image has label 5");
    data.train.labels[9] = 1;
    assert_eq!(data.absent_classes(), [0, 10]);
    Ok(())
}

/// A set of EMNIST with these labels and images of 5x6 as they are stored.
fn write_emnist(folder: &Path, set: &str, splits: [&[u8]; 2], suffix: &str) -> TestResult {
    for (split, labels) in ["train", "test"].into_iter().zip(splits) {
        let count = labels.len() as u32;
        let pixels: Vec<u8> = (0..30 * labels.len()).map(|index| pattern(index + set.len())).collect();
        for (name, bytes) in [
            ("images-idx3", idx_bytes(0x803, &[count, 5, 6], &pixels)),
            ("labels-idx1", idx_bytes(0x801, &[count], labels)),
        ] {
            let bytes = if suffix.is_empty() { bytes } else { gzip(&bytes) };
            fs::write(folder.join(format!("emnist-{set}-{split}-{name}-ubyte{suffix}")), bytes)?;
        }
    }
    Ok(())
}

#[test]
fn emnist_is_read_upright() -> TestResult {
    let labels: Vec<u8> = (1..=26).collect();
    for (below, suffix) in [("", ""), ("gzip", ".gz"), ("EMNIST/raw", "")] {
        let folder = TempDir::new()?;
        let place = folder.path().join(below);
        fs::create_dir_all(&place)?;
        write_emnist(&place, "letters", [&labels, &[4, 20]], suffix)?;
        let data = load(folder.path())?;
        assert_eq!((data.name.as_str(), data.statistics), ("emnist-letters", StatisticsSource::TrainImages));
        assert_eq!((&data.train.labels[24..], &data.test.labels[..]), (&[25, 26][..], &[4, 20][..]));
        assert_eq!((data.train.classes, data.test.classes, data.absent_classes()), (27, 27, vec![0]));
        for images in [&data.train, &data.test] {
            assert_eq!(images.shape, ImageShape { height: 6, width: 5, channels: 1 });
            for (index, &found) in bytes(images).iter().enumerate() {
                let (sample, row, column) = (index / 30, index / 5 % 6, index % 5);
                assert_eq!(found, pattern(sample * 30 + column * 6 + row + "letters".len()), "{below}: {index}");
            }
        }
        for (split, images) in [(Split::Train, &data.train), (Split::Test, &data.test)] {
            let one = load_split(folder.path(), split)?;
            assert_eq!((one.name.as_str(), &one.mean, &one.std), ("emnist-letters", &data.mean, &data.std));
            assert_eq!((one.images.shape, &one.images.pixels), (images.shape, &images.pixels));
        }
    }
    Ok(())
}

#[test]
fn the_path_of_a_file_tells_the_sets_of_emnist_apart() -> TestResult {
    let folder = TempDir::new()?;
    let sets = ["balanced", "byclass", "bymerge", "digits", "letters", "mnist"];
    for (set, label) in sets.into_iter().zip(1..) {
        write_emnist(folder.path(), set, [&[0, label], &[label]], if label % 2 == 0 { ".gz" } else { "" })?;
    }
    let expected = "DIR: holds two data sets, emnist-balanced and emnist-byclass; expected one, or the path of one of \
                    EMNIST's files";
    assert_eq!(error_line(folder.path()), expected);
    for (set, label) in sets.into_iter().zip(1..) {
        for content in ["train-images-idx3", "test-images-idx3", "train-labels-idx1", "test-labels-idx1"] {
            let suffix = if label % 2 == 0 { ".gz" } else { "" };
            let data = load(&folder.path().join(format!("emnist-{set}-{content}-ubyte{suffix}")))?;
            assert_eq!((data.name, data.train.labels), (format!("emnist-{set}"), vec![0, label]));
        }
    }
    // Beside the files of MNIST, whose names stand for many sets.
    for set in &sets[1..] {
        for (name, suffix) in [("images-idx3", ""), ("labels-idx1", ""), ("images-idx3", ".gz"), ("labels-idx1", ".gz")]
        {
            for split in ["train", "test"] {
                let _ = fs::remove_file(folder.path().join(format!("emnist-{set}-{split}-{name}-ubyte{suffix}")));
            }
        }
    }
    assert_eq!(load(folder.path())?.name, "emnist-balanced");
    fs::write(folder.path().join("train-labels-idx1-ubyte"), idx_bytes(0x801, &[2], &[0, 1]))?;
    assert!(error_line(folder.path()).starts_with("DIR: holds two data sets, MNIST and emnist-balanced;"));
    assert_eq!(load(&folder.path().join("emnist-balanced-test-labels-idx1-ubyte"))?.name, "emnist-balanced");

    // A file that is missing, and one that is none of them.
    fs::remove_file(folder.path().join("emnist-balanced-test-images-idx3-ubyte"))?;
    let line = error_line(&folder.path().join("emnist-balanced-test-labels-idx1-ubyte"));
    assert!(line.ends_with(": no emnist-balanced-test-images-idx3-ubyte[.gz], which the test split needs"), "{line}");
    let other = folder.path().join("emnist-greek-test-labels-idx1-ubyte");
    fs::write(&other, b"")?;
    assert!(matches!(load(&other), Err(DataError::NotAFolder { .. })));
    Ok(())
}

#[test]
fn idx_files_that_do_not_belong_together_are_named() -> TestResult {
    let folder = idx_folder()?;
    fs::write(folder.path().join("t10k-labels-idx1-ubyte"), idx_bytes(0x801, &[3], &[1, 2, 3]))?;
    let expected = "DIR/t10k-images-idx3-ubyte: 2 images, expected 3, as many as there are labels in \
                    DIR/t10k-labels-idx1-ubyte";
    assert_eq!(error_line(folder.path()), expected);

    let folder = idx_folder()?;
    fs::write(folder.path().join("t10k-images-idx3-ubyte"), idx_bytes(0x803, &[2, 6, 5], &[1; 60]))?;
    assert_eq!(error_line(folder.path()), "DIR: test images are 6x5x1, expected 5x6x1, as the training images are");

    let folder = idx_folder()?;
    fs::remove_file(folder.path().join("train-labels-idx1-ubyte"))?;
    assert_eq!(error_line(folder.path()), "DIR: no train-labels-idx1-ubyte[.gz], which the train split needs");
    Ok(())
}

/// Resumed runs recognise their images by it, so it must stay the same from version to version.
#[test]
fn the_checksum_of_images_covers_their_pixels_and_labels_alone() -> TestResult {
    let folder = idx_folder()?;
    let images = load(folder.path())?.train;
    assert_eq!(images.checksum(), "1842f4df");

    // Another form of the same file, and another number of classes.
    let path = folder.path().join("train-images-idx3-ubyte");
    fs::write(path.with_extension("gz"), gzip(&fs::read(&path)?))?;
    fs::rename(path.with_extension("gz"), &path)?;
    let mut packed = load(folder.path())?.train;
    packed.classes += 1;
    assert_eq!(packed.checksum(), images.checksum());

    let change = |change: fn(&mut Images)| {
        let mut images = images.clone();
        change(&mut images);
        images.checksum()
    };
    let mut changed = vec![
        images.checksum(),
        change(|images| {
            let mut pixels = bytes(images).to_vec();
            pixels[7] ^= 1;
            images.pixels = pixels.into();
        }),
        change(|images| images.labels[1] ^= 1),
        change(|images| images.labels.swap(0, 1)),
        change(|images| std::mem::swap(&mut images.shape.height, &mut images.shape.width)),
        images.clone().take(3)?.checksum(),
    ];
    changed.sort_unstable();
    changed.dedup();
    assert_eq!(changed.len(), 6);
    Ok(())
}

// ---- Folders --------------------------------------------------------------------------------------------------------

#[test]
fn paths_without_a_data_set_are_named() -> TestResult {
    let folder = TempDir::new()?;
    assert!(error_line(folder.path()).starts_with("DIR: no data set found; expected data_batch_1.bin"));
    assert!(matches!(load(&folder.path().join("absent")), Err(DataError::Io { path, .. }) if path.ends_with("absent")));
    let file = folder.path().join("file");
    fs::write(&file, "text")?;
    assert!(error_line(&file).starts_with("DIR: not a data set; expected a folder with data_batch_1.bin"));
    assert!(matches!(load_split(&file, Split::Test), Err(DataError::NotAFolder { .. })));
    Ok(())
}

#[test]
fn two_data_sets_in_one_folder_are_refused() -> TestResult {
    let folder = cifar10_folder()?;
    fs::write(folder.path().join("t10k-labels-idx1-ubyte"), [])?;
    assert_eq!(error_line(folder.path()), "DIR: holds two data sets, cifar-10 and IDX; expected a folder with one");
    Ok(())
}

#[test]
fn the_folders_of_torchvision_are_searched() -> TestResult {
    let root = TempDir::new()?;
    let raw = root.path().join("MyMNIST/raw");
    fs::create_dir_all(raw.parent().ok_or("a parent")?)?;
    fs::rename(idx_folder()?.keep(), &raw)?;
    assert_eq!(load(&root.path().join("MyMNIST"))?.name, "MyMNIST");
    fs::rename(root.path().join("MyMNIST"), root.path().join("FashionMNIST"))?;
    assert_eq!(load(root.path())?.train.labels, [2, 0, 4, 1]);
    fs::create_dir(root.path().join("MNIST"))?;
    fs::rename(idx_folder()?.keep(), root.path().join("MNIST/raw"))?;
    let line = "DIR: holds two data sets, MNIST/raw and FashionMNIST/raw; expected a folder with one";
    assert_eq!(error_line(root.path()), line);
    Ok(())
}

#[cfg(target_os = "linux")]
#[test]
fn paths_need_not_be_utf8() -> TestResult {
    use std::os::unix::ffi::OsStrExt;
    let root = TempDir::new()?;
    for (source, name) in [(idx_folder()?, &b"idx\xff"[..]), (cifar10_folder()?, b"\xe9t\xe9")] {
        let folder = root.path().join(std::ffi::OsStr::from_bytes(name));
        fs::rename(source.keep(), &folder)?;
        let data = load(&folder)?;
        assert!(data.train.len() > 2);
        assert_eq!(load_split(&folder, Split::Test)?.images, data.test);
        fs::write(folder.join(if name[0] == b'i' { "t10k-labels-idx1-ubyte" } else { "test_batch.bin" }), "")?;
        assert!(matches!(load(&folder), Err(error) if error.to_string().contains('\u{fffd}')));
    }
    Ok(())
}

// ---- Any damage -----------------------------------------------------------------------------------------------------

/// Cuts a file off, or changes bytes of it.
#[derive(Clone, Debug)]
enum Damage {
    Cut(prop::sample::Index),
    Change(Vec<(prop::sample::Index, u8)>),
    Append(Vec<u8>),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        any::<prop::sample::Index>().prop_map(Damage::Cut),
        prop::collection::vec((any::<prop::sample::Index>(), 1..=255u8), 1..4).prop_map(Damage::Change),
        prop::collection::vec(any::<u8>(), 1..40).prop_map(Damage::Append),
    ]
}

fn damaged(bytes: &[u8], damage: &Damage) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    match damage {
        Damage::Cut(index) => bytes.truncate(index.index(bytes.len())),
        Damage::Change(changes) => {
            for (index, mask) in changes {
                let index = index.index(bytes.len());
                bytes[index] ^= mask;
            }
        }
        Damage::Append(more) => bytes.extend_from_slice(more),
    }
    bytes
}

/// The result of `load` must be consistent even where damage cannot be detected, as in a changed pixel.
fn check_consistent(images: &Images) {
    assert!(!images.is_empty());
    assert_eq!(bytes(images).len(), images.len() * images.shape.bytes());
    assert!(images.labels.iter().all(|&label| (label as usize) < images.classes));
}

/// Damages one file and reads the folder: never a panic; always an error if the file's length no longer fits.
fn check_damage(folder: &Path, file: &str, damage: &Damage) -> Result<(), TestCaseError> {
    let path: PathBuf = folder.join(file);
    let fail = |error: std::io::Error| TestCaseError::fail(error.to_string());
    let good = fs::read(&path).map_err(fail)?;
    fs::write(&path, damaged(&good, damage)).map_err(fail)?;
    let result = load(folder);
    fs::write(&path, &good).map_err(fail)?;
    match result {
        Ok(data) => {
            prop_assert!(matches!(damage, Damage::Change(_)), "{damage:?} of {file} was not noticed");
            check_consistent(&data.train);
            check_consistent(&data.test);
        }
        Err(error) => {
            let line = error.to_string();
            prop_assert!(!line.contains('\n') && line.contains(&folder.display().to_string()), "{line}");
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn damaged_cifar_never_panics(train in any::<bool>(), damage in damage()) {
        let folder = cifar10_folder().map_err(|error| TestCaseError::fail(error.to_string()))?;
        // A file that is cut after a whole record is a valid, shorter file.
        if let Damage::Cut(index) = &damage {
            let length = index.index(3073 * if train { 3 } else { 2 });
            prop_assume!(length == 0 || length % 3073 != 0);
        }
        check_damage(folder.path(), if train { "data_batch_1.bin" } else { "test_batch.bin" }, &damage)?;
    }

    #[test]
    fn damaged_idx_never_panics(images in any::<bool>(), packed in any::<bool>(), damage in damage()) {
        let fail = |error: &dyn Error| TestCaseError::fail(error.to_string());
        let folder = idx_folder().map_err(|error| fail(&*error))?;
        let file = if images { "train-images-idx3-ubyte" } else { "t10k-labels-idx1-ubyte" };
        if packed {
            let path = folder.path().join(file);
            let bytes = gzip(&fs::read(&path).map_err(|error| fail(&error))?);
            fs::write(&path, bytes).map_err(|error| fail(&error))?;
        }
        check_damage(folder.path(), file, &damage)?;
    }

    /// Whatever the header says, the answer comes quickly and without the memory that it announces.
    #[test]
    fn any_idx_header_is_survived(
        header in prop::array::uniform16(any::<u8>()),
        magic in any::<bool>(),
        packed in any::<bool>(),
    ) {
        let fail = |error: &dyn Error| TestCaseError::fail(error.to_string());
        let folder = idx_folder().map_err(|error| fail(&*error))?;
        let mut bytes = header.to_vec();
        if magic {
            bytes[..4].copy_from_slice(&0x803u32.to_be_bytes());
        }
        bytes.extend_from_slice(&[9; 60]);
        let bytes = if packed { gzip(&bytes) } else { bytes };
        fs::write(folder.path().join("train-images-idx3-ubyte"), bytes).map_err(|error| fail(&error))?;
        prop_assert!(load(folder.path()).is_err());
    }
}

// ---- Subsets, label noise, order ------------------------------------------------------------------------------------

fn small_images(labels: Vec<u32>, classes: usize) -> Images {
    let shape = ImageShape { height: 2, width: 3, channels: 1 };
    let pixels = (0..labels.len() * shape.bytes()).map(pattern).collect::<Vec<u8>>().into();
    Images { pixels, labels, shape, classes }
}

#[test]
fn take_keeps_the_first_samples() -> TestResult {
    let images = small_images(vec![4, 3, 2, 1, 0], 5);
    let taken = images.clone().take(2)?;
    assert_eq!(taken, small_images(vec![4, 3], 5));
    assert_eq!(images.clone().take(5)?, images);
    for n in [0, 6] {
        let line = images.clone().take(n).map_err(|error| error.to_string());
        assert_eq!(line, Err(format!("cannot take {n} samples: expected 1 to 5")));
    }
    Ok(())
}

#[test]
fn label_noise_changes_the_asked_share_to_other_classes() -> TestResult {
    let labels: Vec<u32> = (0..3000).map(|index| index % 5).collect();
    let clean = small_images(labels, 5);
    for (fraction, expected) in [(0.0, 0), (0.1, 300), (0.2501, 750), (1.0, 3000)] {
        let noisy = clean.clone().with_label_noise(fraction, 11)?;
        let changed = clean.labels.iter().zip(&noisy.labels).filter(|(clean, noisy)| clean != noisy).count();
        assert_eq!(changed, expected, "fraction {fraction}");
        assert_eq!(bytes(&noisy), bytes(&clean));
        assert!(noisy.labels.iter().all(|&label| label < 5));
    }
    // Each of the 20 changes from one class to another is equally likely: 150 expected, standard deviation 11, 5 of
    // them allowed.
    let noisy = clean.clone().with_label_noise(1.0, 11)?;
    for (from, to) in (0..5).flat_map(|from| (0..5).map(move |to| (from, to))).filter(|(from, to)| from != to) {
        let count = clean.labels.iter().zip(&noisy.labels).filter(|&(&a, &b)| (a, b) == (from, to)).count();
        assert!(count.abs_diff(150) < 55, "{from} to {to}: {count}");
    }
    assert_ne!(clean.clone().with_label_noise(1.0, 12)?.labels, noisy.labels);
    Ok(())
}

#[test]
fn asymmetric_noise_turns_classes_into_their_neighbours() -> TestResult {
    let labels: Vec<u32> = (0..2000).map(|index| index % 10).collect();
    let clean = small_images(labels, 10);
    let own = [
        ("cifar-10", vec![(2, 0), (3, 5), (4, 7), (5, 3), (9, 1)]),
        ("mnist", vec![(2, 7), (3, 8), (5, 6), (6, 5), (7, 1)]),
        ("fashion-mnist", vec![(2, 6), (3, 4), (4, 3), (7, 5), (9, 7)]),
        ("mine", (0..10).map(|class| (class, (class + 1) % 10)).collect()),
    ];
    for (name, pairs) in own {
        for (fraction, expected) in [(0.0, 0), (0.2525, 51), (1.0, 200)] {
            let noisy = clean.clone().with_asymmetric_noise(fraction, 11, name)?;
            assert_eq!(bytes(&noisy), bytes(&clean));
            for (from, to) in (0..10).flat_map(|from| (0..10).map(move |to| (from, to))).filter(|(from, to)| from != to)
            {
                let count = clean.labels.iter().zip(&noisy.labels).filter(|&(&a, &b)| (a, b) == (from, to)).count();
                let all = if pairs.contains(&(from, to)) { expected } else { 0 };
                assert_eq!(count, all, "{name}, {fraction}: {from} to {to}");
            }
        }
    }
    let five = small_images((0..5).collect(), 5).with_asymmetric_noise(1.0, 3, "mnist")?;
    assert_eq!(five.labels, [1, 2, 3, 4, 0], "a set of that name with other classes");
    let noisy = |seed| clean.clone().with_asymmetric_noise(0.5, seed, "cifar-10").map(|images| images.labels);
    assert_ne!(noisy(1)?, noisy(2)?);
    assert_eq!(noisy(1)?, noisy(1)?);
    let line = small_images(vec![0, 0], 1).with_asymmetric_noise(0.5, 0, "mine").map_err(|error| error.to_string());
    assert_eq!(line, Err("label noise needs at least 2 classes, found 1".into()));
    Ok(())
}

#[test]
fn a_hold_out_and_the_rest_are_the_whole() -> TestResult {
    let labels: Vec<u32> = (0..1000).collect();
    let images = small_images(labels, 1000);
    let [rest, held] = images.clone().hold_out(0.1004, 3)?;
    assert_eq!((rest.len(), held.len()), (900, 100));
    let mut all: Vec<u32> = rest.labels.iter().chain(&held.labels).copied().collect();
    for part in [&rest, &held] {
        part.check()?;
        assert!(part.labels.is_sorted(), "the order of the files");
        for (image, &label) in bytes(part).chunks(6).zip(&part.labels) {
            assert_eq!(*image, bytes(&images)[label as usize * 6..][..6]);
        }
    }
    all.sort_unstable();
    assert_eq!(all, images.labels);
    // Spread over all: 50 of the first half expected, standard deviation 4.7.
    assert!(held.labels.iter().filter(|&&label| label < 500).count().abs_diff(50) < 24);
    assert_ne!(images.clone().hold_out(0.1004, 4)?[1], held);
    for fraction in [0.0, 0.0004, 0.9996, 1.0, -1.0, f64::NAN] {
        let line = images.clone().hold_out(fraction, 3).map_err(|error| error.to_string());
        assert_eq!(line, Err(format!("a hold-out of {fraction} of 1000 samples leaves a part without any")));
    }
    Ok(())
}

#[test]
fn label_noise_refuses_what_is_no_share() {
    let images = small_images(vec![0, 1], 2);
    for (fraction, shown) in [(-0.1, "-0.1"), (1.5, "1.5"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        let line = images.clone().with_label_noise(fraction, 0).map_err(|error| error.to_string());
        assert_eq!(line, Err(format!("label noise {shown}: expected a fraction from 0 to 1")));
    }
    let line = small_images(vec![0, 0], 1).with_label_noise(0.5, 0).map_err(|error| error.to_string());
    assert_eq!(line, Err("label noise needs at least 2 classes, found 1".into()));
}

/// The numbers come from a separate implementation of ChaCha8 (64-bit block counter, 64-bit stream) and of the shuffle.
#[test]
fn random_choices_have_their_documented_values() -> TestResult {
    let order = |seed, epoch| {
        let mut order = [u32::MAX; 12];
        epoch_order(seed, epoch, &mut order);
        order
    };
    assert_eq!(order(1, 0), [10, 7, 11, 6, 8, 0, 9, 4, 3, 2, 1, 5]);
    assert_eq!(order(1, 1), [0, 6, 4, 7, 5, 11, 9, 2, 8, 3, 10, 1]);
    assert_eq!(order((1 << 63) + 5, (1 << 40) + 3), [9, 7, 11, 8, 4, 5, 2, 0, 10, 1, 6, 3]);

    let mut large = vec![0; 50_000];
    epoch_order(7, 3, &mut large);
    assert_eq!(large[..8], [49494, 27799, 35943, 16366, 6300, 23340, 34098, 31048]);
    let weighted: u64 = (0..).zip(&large).map(|(index, &entry): (u64, _)| index * u64::from(entry)).sum();
    assert_eq!(weighted, 31_187_831_966_614);

    let noisy = small_images(vec![0, 1, 2, 3, 4, 0, 1, 2, 3, 4], 5).with_label_noise(0.5, 9)?;
    assert_eq!(noisy.labels, [0, 0, 3, 4, 3, 0, 1, 2, 4, 4]);
    Ok(())
}

#[test]
fn epoch_orders_are_uniform_permutations() {
    epoch_order(1, 2, &mut []);
    let mut single = [9];
    epoch_order(1, 2, &mut single);
    assert_eq!(single, [0]);

    // Over many epochs each of the 24 orders of 4 samples is equally likely: 1000 expected, standard deviation 31.
    let mut counts = std::collections::HashMap::new();
    for epoch in 0..24_000 {
        let mut order = [0; 4];
        epoch_order(5, epoch, &mut order);
        *counts.entry(order).or_insert(0u32) += 1;
    }
    assert_eq!(counts.len(), 24);
    assert!(counts.values().all(|count| count.abs_diff(1000) < 155), "{counts:?}");
}

// ---- Synthetic ------------------------------------------------------------------------------------------------------

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[test]
fn synthetic_is_balanced_and_normalisable() -> TestResult {
    let data = synthetic(&SyntheticSpec::default())?;
    assert_eq!((data.name.as_str(), data.statistics), ("synthetic", StatisticsSource::TrainImages));
    assert_eq!((data.train.len(), data.test.len()), (2048, 1024));
    assert_eq!(data.train.shape, ImageShape { height: 32, width: 32, channels: 3 });
    for images in [&data.train, &data.test] {
        check_consistent(images);
        assert_eq!(images.classes, 10);
        assert!(images.labels.iter().enumerate().all(|(index, &label)| label as usize == index % 10));
    }
    for channel in 0..3 {
        assert!((0.4..0.6).contains(&data.mean[channel]), "mean {:?}", data.mean);
        assert!((0.15..0.35).contains(&data.std[channel]), "std {:?}", data.std);
    }
    Ok(())
}

/// The same bytes on every platform and in every build.
#[test]
fn synthetic_has_its_documented_bytes() -> TestResult {
    let data = synthetic(&SyntheticSpec::default())?;
    assert_eq!((crc32(bytes(&data.train)), crc32(bytes(&data.test))), (0x940d_8608, 0x1414_8ec7));
    Ok(())
}

#[test]
fn a_larger_synthetic_set_begins_with_the_smaller() -> TestResult {
    let spec = SyntheticSpec { train: 30, test: 12, side: 11, seed: 3 };
    let small = synthetic(&spec)?;
    let large = synthetic(&SyntheticSpec { train: 50, test: 20, ..spec })?;
    assert_eq!(large.train.take(30)?, small.train);
    assert_eq!(large.test.take(12)?, small.test);
    assert_ne!(bytes(&small.train)[..12 * 363], bytes(&small.test)[..], "the splits must not share images");
    assert_ne!(synthetic(&SyntheticSpec { seed: 4, ..spec })?.train.pixels, small.train.pixels);
    Ok(())
}

#[test]
fn impossible_synthetic_sets_are_refused() {
    let good = SyntheticSpec { train: 1, test: 1, side: 8, seed: 0 };
    assert!(synthetic(&good).is_ok());
    let cases = [
        (SyntheticSpec { train: 0, ..good }, "synthetic data: train is 0, expected 1 to 4294967295"),
        (SyntheticSpec { test: 0, ..good }, "synthetic data: test is 0, expected 1 to 4294967295"),
        (SyntheticSpec { side: 7, ..good }, "synthetic data: side is 7, expected 8 to 1024"),
        (SyntheticSpec { side: 1025, ..good }, "synthetic data: side is 1025, expected 8 to 1024"),
    ];
    for (spec, expected) in cases {
        assert_eq!(synthetic(&spec).map(|data| data.name).map_err(|error| error.to_string()), Err(expected.into()));
    }
    // 12 PiB, more than an address space of 47 bits has.
    let huge = synthetic(&SyntheticSpec { train: u32::MAX as usize, side: 1024, ..good });
    assert!(matches!(huge, Err(DataError::SyntheticMemory { bytes: 13_510_798_878_965_760 })));
}

// ---- The published data sets ----------------------------------------------------------------------------------------

/// A folder in `POLDER_DATA`. Without it the test is skipped with a message.
fn published(name: &str) -> Option<PathBuf> {
    match std::env::var_os("POLDER_DATA") {
        Some(folder) => Some(Path::new(&folder).join(name)),
        None => {
            eprintln!("skipped: POLDER_DATA does not name a folder with {name}");
            None
        }
    }
}

/// Pixel checksums are those of NHWC arrays made by NumPy; the published means hold per channel, so they fix its order.
#[test]
fn cifar10_as_published() -> TestResult {
    let Some(folder) = published("cifar-10") else { return Ok(()) };
    let data = load(&folder)?;
    assert_eq!((data.train.len(), data.test.len()), (50_000, 10_000));
    assert_eq!(data.train.labels[..10], [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]);
    assert_eq!(data.test.labels[..10], [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]);
    assert_eq!(bytes(&data.train)[..6], [59, 62, 63, 43, 46, 45]);
    assert_eq!(bytes(&data.test)[..6], [158, 112, 49, 159, 111, 47]);
    assert_eq!((crc32(bytes(&data.train)), crc32(bytes(&data.test))), (0x680a_9ce0, 0xaf48_14f5));
    for channel in 0..3 {
        let values = bytes(&data.train).iter().skip(channel).step_by(3);
        let mean = values.map(|&value| f64::from(value)).sum::<f64>() / (255.0 * 50_000.0 * 1024.0);
        assert!(abs_diff_eq!(mean, f64::from(data.mean[channel]), epsilon = 5.1e-5), "rounded to four digits, {mean}");
    }
    Ok(())
}

#[test]
fn fashion_mnist_as_published() -> TestResult {
    let Some(folder) = published("fashion-mnist") else { return Ok(()) };
    let data = load(&folder)?;
    assert_eq!((data.name.as_str(), data.statistics), ("fashion-mnist", StatisticsSource::Published));
    assert_eq!((data.train.len(), data.test.len(), data.train.classes), (60_000, 10_000, 10));
    assert_eq!(data.train.shape, ImageShape { height: 28, width: 28, channels: 1 });
    assert_eq!((crc32(bytes(&data.train)), crc32(bytes(&data.test))), (0xae65_dccd, 0x1272_8439));
    let mean = bytes(&data.train).iter().map(|&value| f64::from(value)).sum::<f64>() / (255.0 * 60_000.0 * 784.0);
    assert!(abs_diff_eq!(mean, f64::from(data.mean[0]), epsilon = 5.1e-5), "rounded to four digits, {mean}");
    Ok(())
}

#[test]
fn a_label_far_beyond_the_others_is_an_error() -> TestResult {
    let folder = idx_folder()?;
    let count = 2100u32;
    let mut labels = [&[0, 0, 8, 1][..], &count.to_be_bytes()].concat();
    labels.extend((0..count).map(|sample| (sample % 3) as u8));
    labels[8 + 70] = 200;
    for name in ["train-labels-idx1-ubyte", "train-labels-idx1-ubyte.gz"] {
        let _ = fs::remove_file(folder.path().join(name));
    }
    fs::write(folder.path().join("train-labels-idx1-ubyte"), labels)?;
    let images = idx_bytes(0x803, &[count, 5, 6], &vec![1; 2100 * 30]);
    fs::write(folder.path().join("train-images-idx3-ubyte"), images)?;
    let message = load(folder.path()).unwrap_err().to_string();
    assert!(message.contains("label 200 at sample 70, but there are only"), "{message}");
    Ok(())
}
