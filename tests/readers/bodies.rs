//! What holds for every reader of files, whatever the bytes. `tests/readers.rs` runs these bodies on damaged files, and
//! the fuzz targets of `fuzz/` run them on what a fuzzer finds. A body never panics unless a reader is wrong. The
//! program around it measures time and memory in `measured`.

use std::fs;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use flate2::read::{GzDecoder, MultiGzDecoder, ZlibDecoder};
use image::ImageReader;
use polder::arena::{Initial, Layout, TensorKind};
use polder::data::{Corrupted, DataError, Dataset, Images, LoadOptions, load, load_with};
use polder::report::report;
use polder::train::landscape::{Heights, Landscape};
use polder::train::{Checkpoint, Options, weights};
use safetensors::tensor::{Dtype, TensorView};

use super::measured;

#[path = "files.rs"]
mod files;

// The fuzz targets do not use all of them.
#[allow(unused_imports)]
pub use files::{gzip, picture as picture_of, png};

/// A kind of file, and what its reader is given.
pub struct Target {
    pub name: &'static str,
    /// Valid inputs, for a start.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Puts an input where its reader looks, in a folder of its own, and reads it. Returns whether it was accepted.
    pub body: fn(&Path, &[u8]) -> bool,
}

pub const TARGETS: [Target; 15] = [
    Target { name: "idx", seeds: || idx_seeds(false), body: |folder, input| idx(folder, input, false) },
    Target { name: "gzip", seeds: || idx_seeds(true), body: |folder, input| idx(folder, input, true) },
    Target { name: "cifar", seeds: cifar_seeds, body: cifar },
    Target { name: "pickle", seeds: pickle_seeds, body: pickle },
    Target { name: "archive", seeds: archive_seeds, body: archive },
    Target { name: "svhn", seeds: svhn_seeds, body: svhn },
    Target { name: "npy", seeds: npy_seeds, body: npy },
    Target { name: "corrupted", seeds: corrupted_seeds, body: corrupted },
    Target { name: "picture", seeds: picture_seeds, body: picture },
    Target { name: "weights", seeds: weights_seeds, body: read_weights },
    Target { name: "checkpoint", seeds: checkpoint_seeds, body: checkpoint },
    Target { name: "config", seeds: config_seeds, body: config },
    Target { name: "log", seeds: log_seeds, body: |folder, input| result(folder, "log.jsonl", input) },
    Target { name: "curvature", seeds: curvature_seeds, body: |folder, input| result(folder, "curvature.json", input) },
    Target { name: "landscape", seeds: landscape_seeds, body: landscape },
];

fn write(path: PathBuf, bytes: impl AsRef<[u8]>) {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).expect("a folder in the scratch folder");
    }
    fs::write(path, bytes).expect("a file in the scratch folder");
}

/// An error is one line without control characters, and not a long one.
fn check_error(error: &impl std::fmt::Display) -> bool {
    let line = error.to_string();
    assert!(!line.contains(char::is_control), "{line:?}");
    assert!(line.len() < 10_000, "an error of {} bytes", line.len());
    false
}

// ---- IDX and gzip ---------------------------------------------------------------------------------------------------

const IDX_FILES: [&str; 4] =
    ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"];

fn idx_files() -> [Vec<u8>; 4] {
    let file = |sizes: &[u32], values: &mut dyn Iterator<Item = u8>| {
        let mut bytes = (0x800 + sizes.len() as u32).to_be_bytes().to_vec();
        bytes.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
        bytes.extend(values);
        bytes
    };
    [
        file(&[4, 3, 2], &mut (0..24)),
        file(&[4], &mut [2, 0, 4, 1].into_iter()),
        file(&[2, 3, 2], &mut (90..102)),
        file(&[2], &mut [5, 3].into_iter()),
    ]
}

/// The first byte of an input says which of the four files it replaces.
fn idx_seeds(packed: bool) -> Vec<Vec<u8>> {
    let files = (0..).zip(idx_files());
    files.map(|(which, file)| [vec![which], if packed { gzip(&file) } else { file }].concat()).collect()
}

/// What a gzip file holds. Zeros may follow it.
fn unpacked(bytes: &[u8]) -> Option<Vec<u8>> {
    let whole = bytes.iter().rposition(|&byte| byte != 0)? + 1;
    (whole..=bytes.len()).find_map(|end| {
        let mut plain = Vec::new();
        MultiGzDecoder::new(&bytes[..end]).take(1 << 20).read_to_end(&mut plain).ok().map(|_| plain)
    })
}

/// The sizes and values of an IDX file, read in the simplest way.
fn parse_idx(bytes: &[u8], dimensions: usize) -> Option<(Vec<usize>, &[u8])> {
    let magic = [0, 0, 8, dimensions as u8];
    let (sizes, values) = bytes.strip_prefix(&magic)?.split_at_checked(4 * dimensions)?;
    let sizes: Vec<usize> =
        sizes.chunks(4).map(|size| size.iter().fold(0, |sum, &byte| sum << 8 | usize::from(byte))).collect();
    let product = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size))?;
    (product > 0 && product == values.len()).then_some((sizes, values))
}

fn idx(folder: &Path, input: &[u8], packed: bool) -> bool {
    let Some((&which, bytes)) = input.split_first() else { return false };
    let which = usize::from(which) % 4;
    let mut files = idx_files();
    files[which] = bytes.to_vec();
    for (name, file) in IDX_FILES.iter().zip(&files) {
        write(folder.join(name), file);
    }
    // A file is packed or not as its first bytes say.
    if bytes.starts_with(&[0x1f, 0x8b]) {
        files[which] = unpacked(bytes).unwrap_or_default();
    } else if packed {
        return false;
    }
    let promised = files[which].len();
    let found = measured(input.len() + promised, || load(folder));
    let split = |images: &[u8], labels: &[u8]| {
        let (sizes, pixels) = parse_idx(images, 3)?;
        let (count, labels) = parse_idx(labels, 1)?;
        (sizes[0] == count[0]).then(|| (sizes[1..].to_vec(), pixels.to_vec(), labels.to_vec()))
    };
    let parsed = split(&files[0], &files[1]).zip(split(&files[2], &files[3]));
    match (found, parsed) {
        (Ok(data), Some((train, test))) => {
            for (images, (shape, pixels, labels)) in [(&data.train, train), (&data.test, test)] {
                assert_eq!([images.shape.height, images.shape.width, images.shape.channels], [shape[0], shape[1], 1]);
                assert_eq!(images.pixels, pixels.into());
                assert_eq!(images.labels, labels.into_iter().map(u32::from).collect::<Vec<_>>());
            }
            check_data(&data)
        }
        (Err(error), None) => check_error(&error),
        (Err(error @ (DataError::SparseLabels { .. } | DataError::Label { .. })), _) => check_error(&error),
        (Err(error @ DataError::ShapeMismatch { .. }), Some((train, test))) => {
            assert_ne!(train.0, test.0);
            check_error(&error)
        }
        (Ok(_), None) => panic!("an IDX file was read that is none"),
        (Err(error), Some(_)) => panic!("an IDX file was refused: {error}"),
    }
}

fn check_data(data: &Dataset) -> bool {
    data.check().expect("what was read is consistent");
    assert!(data.absent_classes().len() < data.train.classes);
    true
}

// ---- CIFAR ----------------------------------------------------------------------------------------------------------

const CIFAR: [(&str, &[usize]); 4] = [
    ("ten/data_batch_1.bin", &[10]),
    ("ten/test_batch.bin", &[10]),
    ("hundred/train.bin", &[20, 100]),
    ("hundred/test.bin", &[20, 100]),
];

fn cifar_record(labels: &[u8]) -> Vec<u8> {
    labels.iter().copied().chain((0..3072u32).map(|index| (index * 7 % 251) as u8)).collect()
}

fn cifar_seeds() -> Vec<Vec<u8>> {
    let seed = |which: u8, records: &[&[u8]]| {
        records.iter().fold(vec![which], |bytes, labels| [bytes, cifar_record(labels)].concat())
    };
    vec![seed(0, &[&[3], &[9]]), seed(1, &[&[0]]), seed(2, &[&[19, 99]]), seed(3, &[&[0, 5], &[7, 42]])]
}

fn cifar(folder: &Path, input: &[u8]) -> bool {
    let Some((&which, bytes)) = input.split_first() else { return false };
    let which = usize::from(which) % 4;
    for (name, classes) in CIFAR {
        write(folder.join(name), cifar_record(&vec![1; classes.len()]));
    }
    let (name, classes) = CIFAR[which];
    write(folder.join(name), bytes);
    let set = folder.join(if which < 2 { "ten" } else { "hundred" });
    let found = measured(bytes.len(), || load(&set));
    let record = classes.len() + 3072;
    let good = !bytes.is_empty()
        && bytes.len() % record == 0
        && bytes
            .chunks(record)
            .all(|record| record.iter().zip(classes).all(|(&label, &most)| usize::from(label) < most));
    match found {
        Ok(data) => {
            assert!(good, "a CIFAR file was read that is none");
            let images: &Images = if which % 2 == 0 { &data.train } else { &data.test };
            assert_eq!(images.len(), bytes.len() / record);
            for (index, record) in bytes.chunks(record).enumerate() {
                assert_eq!(images.labels[index], u32::from(record[classes.len() - 1]));
                let pixels = images.bytes_of(index..index + 1).unwrap();
                for (place, &value) in record[classes.len()..].iter().enumerate() {
                    assert_eq!(pixels[place % 1024 * 3 + place / 1024], value);
                }
            }
            check_data(&data)
        }
        Err(error) => {
            assert!(!good, "a CIFAR file was refused: {error}");
            check_error(&error)
        }
    }
}

// ---- Other formats of data sets -------------------------------------------------------------------------------------

/// What a folder or file holds must be consistent, or an error of one line.
fn check_load(bytes: usize, path: &Path) -> bool {
    match measured(bytes, || load(path)) {
        Ok(data) => check_data(&data),
        Err(error) => check_error(&error),
    }
}

fn pickle_seeds() -> Vec<Vec<u8>> {
    vec![files::pickled_batch("labels", &[3, 9]), files::pickled_batch("labels", &[0])]
}

fn pickle(folder: &Path, input: &[u8]) -> bool {
    let good = files::pickled_batch("labels", &[1]);
    write(folder.join("data_batch_1"), input);
    write(folder.join("test_batch"), &good);
    check_load(input.len() + good.len(), folder)
}

fn archive_seeds() -> Vec<Vec<u8>> {
    let batch = files::pickled_batch("labels", &[3]);
    let names = ["cifar-10-batches-py/test_batch", "./cifar-10-batches-py/data_batch_1"];
    // Not packed: what a fuzzer changes in a packed file is refused by its checksum.
    vec![files::tar(&names.map(|name| (name, &batch[..])))]
}

/// How many bytes a damaged file still holds, at most 16 MiB.
fn unpacked_bytes(reader: impl Read) -> usize {
    let mut bytes = Vec::new();
    // What was read before an error counts.
    let _ = reader.take(1 << 24).read_to_end(&mut bytes);
    bytes.len()
}

fn archive(folder: &Path, input: &[u8]) -> bool {
    let path = folder.join("cifar-10-python.tar.gz");
    let packed = if input.starts_with(&[0x1f, 0x8b]) { input.to_vec() } else { gzip(input) };
    write(path.clone(), &packed);
    let unpacked = unpacked_bytes(GzDecoder::new(&packed[..]));
    check_load(packed.len() + unpacked, &path)
}

fn svhn_seeds() -> Vec<Vec<u8>> {
    let (images, labels) = (vec![7; 3072], [10]);
    let variables =
        [files::mat_variable("X", &[32, 32, 3, 1], &images), files::mat_variable("y", &[1, 1], &labels)].concat();
    let plain = [&files::mat(&[])[..], &variables].concat();
    vec![plain, files::svhn(&[3, 1])]
}

fn svhn(folder: &Path, input: &[u8]) -> bool {
    write(folder.join("train_32x32.mat"), input);
    let good = files::svhn(&[1]);
    write(folder.join("test_32x32.mat"), &good);
    // How much a compressed variable may hold: all that begins anywhere as one.
    let unpacked: usize = (128..input.len().min(128 + 4096))
        .filter(|&at| input[at] == 0x78)
        .map(|at| unpacked_bytes(ZlibDecoder::new(&input[at..])))
        .sum();
    check_load(input.len() + good.len() + 3072 + unpacked, folder)
}

const NPY_FILES: [&str; 4] = ["train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy"];

fn npy_files() -> [Vec<u8>; 4] {
    [
        files::npy("|u1", &[3, 2, 2], &[8; 12]),
        files::npy(">i2", &[3], &[0, 1, 0, 0, 0, 2]),
        files::npy("|u1", &[1, 2, 2], &[9; 4]),
        files::npy("<u4", &[1], &[1, 0, 0, 0]),
    ]
}

fn npy_seeds() -> Vec<Vec<u8>> {
    (0..).zip(npy_files()).map(|(which, file)| [vec![which], file].concat()).collect()
}

fn npy(folder: &Path, input: &[u8]) -> bool {
    let Some((&which, bytes)) = input.split_first() else { return false };
    let mut files = npy_files();
    files[usize::from(which) % 4] = bytes.to_vec();
    for (name, file) in NPY_FILES.iter().zip(&files) {
        write(folder.join(name), file);
    }
    check_load(input.len(), folder)
}

/// The first byte of an input says whether it replaces the labels or the images.
fn corrupted_seeds() -> Vec<Vec<u8>> {
    let images = files::npy("|u1", &[5, 32, 32, 3], &[4; 5 * 3072]);
    vec![[vec![0], files::npy("|u1", &[5], &[1, 2, 3, 4, 5])].concat(), [vec![1], images].concat()]
}

fn corrupted(folder: &Path, input: &[u8]) -> bool {
    let Some((&which, bytes)) = input.split_first() else { return false };
    for (seed, name) in corrupted_seeds().iter().zip(["labels.npy", "fog.npy"]) {
        write(folder.join(name), if seed[0] == which % 2 { bytes } else { &seed[1..] });
    }
    let read = || {
        let corrupted = Corrupted::open(folder)?;
        (1..=5).map(|severity| corrupted.read("fog", severity)).collect::<Result<Vec<_>, _>>()
    };
    match measured(input.len() + 5 * 3072, read) {
        Ok(found) => found.iter().all(|part| part.images.check().is_ok()),
        Err(error) => check_error(&error),
    }
}

fn picture_seeds() -> Vec<Vec<u8>> {
    [files::png(2, 3, &[7; 18]), files::png(1, 1, &[0, 255, 3])]
        .into_iter()
        .chain(files::PICTURES.map(files::picture))
        .collect()
}

/// How many bytes a picture has by its header, in whole blocks of 16x16 pixels. Few bytes can hold many pixels of one
/// colour, so a reader may take this much; none if that is above the reader's limit for a picture.
fn promised(input: &[u8]) -> usize {
    let Ok(reader) = ImageReader::new(Cursor::new(input)).with_guessed_format() else { return 0 };
    let Ok((width, height)) = reader.into_dimensions() else { return 0 };
    let bytes = 4 * [width, height].map(|side| u128::from(side).next_multiple_of(16)).iter().product::<u128>();
    if bytes > 1 << 29 { 0 } else { bytes as usize }
}

fn picture(folder: &Path, input: &[u8]) -> bool {
    // What a picture is, its first bytes say.
    for (name, bytes) in [("train/a/1.png", input), ("test/b/1.png", &files::png(3, 2, &[7; 18]))] {
        write(folder.join(name), bytes);
    }
    let options = LoadOptions { image_size: Some(4), ..LoadOptions::default() };
    // The decoders have tables and buffers of their own.
    let read = || load_with(folder, &options, &mut |_, _| true);
    match measured(input.len() + promised(input) + (1 << 21), read) {
        Ok(data) => check_data(&data),
        Err(error) => check_error(&error),
    }
}

// ---- Weights and checkpoints ----------------------------------------------------------------------------------------

pub fn layouts() -> [Layout; 2] {
    let tensor = |name: &str, kind| (name.to_string(), kind, Initial::Constant(0.0));
    [
        Layout::new(vec![
            tensor("conv.weight", TensorKind::Convolution { kernel: 2, inputs: 1, outputs: 3 }),
            tensor("fc.weight", TensorKind::Linear { inputs: 3, outputs: 2 }),
            tensor("fc.bias", TensorKind::Bias(2)),
        ]),
        Layout::new(vec![tensor("bn.running_mean", TensorKind::RunningMean(3))]),
    ]
}

fn weights_seeds() -> Vec<Vec<u8>> {
    let tensors = [
        ("conv.weight", vec![3, 1, 2, 2]),
        ("fc.weight", vec![2, 3]),
        ("fc.bias", vec![2]),
        ("bn.running_mean", vec![3]),
    ];
    let file = |dtype: Dtype, width: usize| {
        let data: Vec<Vec<u8>> =
            tensors.iter().map(|(_, shape)| vec![60; width * shape.iter().product::<usize>()]).collect();
        let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
            (*name, TensorView::new(dtype, shape.clone(), data).expect("as many bytes as the shape says"))
        });
        safetensors::serialize(views, None).expect("valid tensors")
    };
    vec![file(Dtype::F32, 4), file(Dtype::F16, 2), file(Dtype::F64, 8)]
}

fn read_weights(folder: &Path, input: &[u8]) -> bool {
    let (path, again) = (folder.join("model.safetensors"), folder.join("again.safetensors"));
    write(path.clone(), input);
    let layouts = layouts();
    let read = |path: &Path| weights::load(path, [&layouts[0], &layouts[1]]);
    match measured(input.len(), || read(&path)) {
        Ok(found) => {
            let model = [(&layouts[0], &found[0][..]), (&layouts[1], &found[1][..])];
            weights::save(&again, &model).expect("a file in the scratch folder");
            let bits = |found: &[Vec<f32>; 2]| {
                found.each_ref().map(|values| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
            };
            assert_eq!(bits(&read(&again).expect("what was written is read")), bits(&found));
            true
        }
        Err(error) => check_error(&error),
    }
}

fn checkpoint_seeds() -> Vec<Vec<u8>> {
    let tensors =
        ["weights", "statistics", "momentum", "second_moment", "memory", "scalars", "counters", "totals", "loss_scale"];
    let words = [("settings", "seed = 1\n"), ("step", "12"), ("seconds", "3.5")];
    let data: Vec<Vec<u8>> = (0..9).map(|index| vec![index; 8 * usize::from(index % 4)]).collect();
    let mut sum = flate2::Crc::new();
    data.iter().for_each(|bytes| sum.update(bytes));
    words.iter().for_each(|(_, word)| sum.update(word.as_bytes()));
    let checksum = format!("{:08x}", sum.sum());
    let entries =
        words.into_iter().chain([("checksum", &*checksum)]).map(|(key, word)| (key.to_string(), word.to_string()));
    let views = tensors.iter().zip(&data).map(|(name, data)| {
        (*name, TensorView::new(Dtype::F32, vec![data.len() / 4], data).expect("as many bytes as the shape says"))
    });
    vec![safetensors::serialize(views, Some(entries.collect())).expect("valid tensors")]
}

fn checkpoint(folder: &Path, input: &[u8]) -> bool {
    write(folder.join("checkpoint/state.safetensors"), input);
    match measured(input.len(), || Checkpoint::load(folder)) {
        Ok(found) => {
            let found = found.expect("the file is there");
            assert!(found.weights.len() * 4 <= input.len() && found.settings.len() <= input.len());
            true
        }
        Err(error) => check_error(&error),
    }
}

// ---- Text -----------------------------------------------------------------------------------------------------------

fn config_seeds() -> Vec<Vec<u8>> {
    let layer = Options::default();
    let defaults = layer.resolve().and_then(|settings| settings.to_toml()).expect("the defaults are valid");
    vec![defaults.into_bytes(), b"optimizer = \"sam\"\nrho = 0.1\nmean = [0.5, 0.5, 0.5]\nepochs = 3\n".to_vec()]
}

fn config(folder: &Path, input: &[u8]) -> bool {
    let path = folder.join("config.toml");
    write(path.clone(), input);
    let read = || Options::from_file(&path).and_then(|options| options.resolve()?.to_toml());
    match measured(input.len(), read) {
        Ok(text) => {
            write(path.clone(), &text);
            assert_eq!(read().expect("what was written is read"), text);
            true
        }
        Err(error) => check_error(&error),
    }
}

/// The log of a run.
pub const LOG: &str = concat!(
    r#"{"kind":"step","step":1,"epoch":1,"loss":2.5,"accuracy":0.25,"lr":0.1,"images_per_second":10.0,"#,
    r#""gradient_norm":null,"dropped":3,"skipped":1}"#,
    "\n",
    r#"{"kind":"epoch","epoch":1,"step":2,"train_loss":2.0,"train_accuracy":0.5,"test_loss":2.25,"test_accuracy":0.25,"#,
    r#""lr":0.1,"gradient_norm":1.5,"images_per_second":10.0,"seconds":3.0,"skipped":0}"#,
    "\n",
    r#"{"kind":"curvature","epoch":1,"step":2,"measures":{"trace":{"probes":7,"standard_error":0.25,"value":1.5}}}"#,
    "\n",
);
const CURVATURE: &str = concat!(
    r#"{"samples":64,"split":"train","passes":{"gradients":3},"weights":null,"settings":{"bn":"train"},"measures":{"#,
    r#""trace":{"probes":7,"standard_error":0.25,"value":1.5},"spectrum":{"nodes":[-1.0,2.0],"weights":[0.25,0.75]},"#,
    r#""top-eigenvalues":{"converged":true,"first_over_fifth":null,"residuals":[0.1,0.2],"values":[4.0,2.0]},"#,
    r#""layer-traces":{"layers":{"fc":{"standard_error":0.25,"value":1.5}},"probes":7}}}"#,
);
const LANDSCAPE: [&str; 2] = [
    r#"{"title":"bowl","axes":[{"name":"first","values":[-1.0,0.0,1.0]},{"name":"second","values":[0.0,2.0]}]}"#,
    "x,y,loss,accuracy\n-1,0,0.5,0.25\n0,0,0.25,0.5\n1,0,0.5,0.75\n-1,2,inf,0.1\n0,2,2.5,0.1\n",
];

fn log_seeds() -> Vec<Vec<u8>> {
    vec![LOG.into()]
}

fn curvature_seeds() -> Vec<Vec<u8>> {
    vec![CURVATURE.into()]
}

/// A run with this file, read by its report.
fn result(folder: &Path, name: &str, input: &[u8]) -> bool {
    write(folder.join("config.toml"), "optimizer = \"sgd\"\n");
    write(folder.join("log.jsonl"), LOG);
    write(folder.join(name), input);
    check_report(folder, input.len())
}

fn check_report(run: &Path, bytes: usize) -> bool {
    // The page has a fixed part of some hundred kilobytes, and is made in memory.
    match measured(bytes + (1 << 17), || report(&[run.into()], Some(&run.join("report.html")), false)) {
        Ok(found) => found.skipped.iter().all(|skipped| check_error(&skipped.reason)),
        Err(error) => check_error(&error),
    }
}

fn landscape_seeds() -> Vec<Vec<u8>> {
    let pairs = (0..).zip(LANDSCAPE);
    pairs.map(|(which, text)| [vec![which], text.into()].concat()).collect()
}

fn landscape(folder: &Path, input: &[u8]) -> bool {
    let Some((&which, bytes)) = input.split_first() else { return false };
    let files = ["landscape.json", "landscape.csv"];
    let inner = folder.join("landscape");
    for (name, text) in files.iter().zip(LANDSCAPE) {
        write(inner.join(name), text);
    }
    write(inner.join(files[usize::from(which) % 2]), bytes);
    // A report holds the whole grid, whose size is a product.
    let described = measured(bytes.len(), || Landscape::read(&inner));
    let points = described
        .as_ref()
        .map_or(0, |found| found.axes.iter().fold(1, |product: usize, axis| product.saturating_mul(axis.values.len())));
    if points > 10_000 {
        return false;
    }
    write(folder.join("config.toml"), "optimizer = \"sgd\"\n");
    write(folder.join("log.jsonl"), LOG);
    let reported = check_report(folder, bytes.len() + 32 * points);
    let opened = described.and_then(|found| Ok((measured(bytes.len(), || Heights::open(&inner, &found))?, found)));
    match opened {
        Ok((heights, found)) => {
            assert!(heights.list().len() <= found.len());
            reported
        }
        Err(error) => check_error(&error),
    }
}
