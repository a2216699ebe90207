//! Pictures that stay in their files and are decoded as they are needed: every result has the bits that it has with all
//! pictures in memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use polder::data::{
    DataError, Dataset, Images, LoadOptions, Pixels, Split, StatisticsSource, load_split_with, load_with,
};
use polder::device::{self, Slice};
use polder::kernels::batch_norm::Mode;
use polder::plan::Shape;
use polder::train::{
    CurvatureMeter, Evaluator, Options, Progress, Summary, TrainError, Training, normalization, open_device, weights,
};
use tempfile::TempDir;

/// Training and test images of the folder. Neither divides into batches of 8.
const COUNTS: [usize; 2] = [50, 13];
const SIDE: u32 = 12;

/// The path of a picture. Pictures of one class have names in the order of their numbers.
fn picture(data: &Path, split: &str, index: usize) -> PathBuf {
    let count = if split == "train" { COUNTS[0] } else { COUNTS[1] };
    data.join(split).join(format!("class {}", index * 3 / count)).join(format!("{index:03}.png"))
}

/// A picture of some colours and stripes.
fn draw(file: &Path, seed: u32, side: u32) {
    let pixel = |x: u32, y: u32| image::Rgb([3, 5, 11].map(|factor| (seed * 29 * factor + x * y * 7 + x * seed) as u8));
    image::RgbImage::from_fn(side, side, pixel).save(file).unwrap();
}

/// A folder with `pictures/`, in three classes.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("pictures");
    for (split, count) in [("train", COUNTS[0]), ("test", COUNTS[1])] {
        for index in 0..count {
            let file = picture(&data, split, index);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            draw(&file, index as u32 + if split == "test" { 1000 } else { 0 }, SIDE);
        }
    }
    folder
}

fn options(memory: Option<u64>) -> LoadOptions {
    LoadOptions { memory, ..LoadOptions::default() }
}

fn load(data: &Path, memory: Option<u64>) -> Dataset {
    load_with(data, &options(memory), &mut |_, _| true).unwrap()
}

fn is_streamed(images: &Images) -> bool {
    matches!(images.pixels, Pixels::Files(_))
}

// ---- The data set ---------------------------------------------------------------------------------------------------

#[test]
fn a_set_in_files_is_that_in_memory() {
    let folder = folder();
    let data = folder.path().join("pictures");
    let (memory, files) = (load(&data, None), load(&data, Some(0)));
    assert_eq!((&memory.mean, &memory.std, memory.statistics), (&files.mean, &files.std, files.statistics));
    let alike = |memory: &Images, files: &Images| {
        assert!(!is_streamed(memory) && is_streamed(files));
        files.check().unwrap();
        assert_eq!((memory.len(), memory.shape, &memory.labels), (files.len(), files.shape, &files.labels));
        assert_eq!(memory.checksum(), files.checksum());
        assert_eq!(&files.clone().into_memory().unwrap(), memory);
        let some = 3..files.len() - 2;
        assert_eq!(memory.bytes_of(some.clone()).unwrap(), files.bytes_of(some).unwrap());
    };
    alike(&memory.train, &files.train);
    alike(&memory.test, &files.test);
    alike(&memory.train.clone().take(31).unwrap(), &files.train.clone().take(31).unwrap());
    let parts = [&memory, &files].map(|data| data.train.clone().hold_out(0.3, 5).unwrap());
    parts[0].iter().zip(&parts[1]).for_each(|(memory, files)| alike(memory, files));
    let noisy = [&memory, &files].map(|data| data.train.clone().with_label_noise(0.5, 5).unwrap());
    alike(&noisy[0], &noisy[1]);
    let again = Dataset::new("again", files.train.clone(), files.test.clone()).unwrap();
    assert_eq!((again.mean, again.std), (memory.mean, memory.std));
    let mut wrong = files.train.clone();
    wrong.labels.pop();
    assert!(matches!(wrong.check(), Err(DataError::PixelCount { .. })));
}

/// A split that takes more than the limit stays in its files, and no other.
#[test]
fn the_limit_is_on_the_bytes_of_a_split() {
    let folder = folder();
    let data = folder.path().join("pictures");
    let image = u64::from(SIDE * SIDE * 3);
    for (memory, streamed) in [(13 * image - 1, [true, true]), (13 * image, [true, false]), (50 * image, [false; 2])] {
        let found = load(&data, Some(memory));
        assert_eq!([is_streamed(&found.train), is_streamed(&found.test)], streamed, "{memory}");
    }
    let half = LoadOptions { image_size: Some(6), memory: Some(13 * image / 4), ..LoadOptions::default() };
    let found = load_with(&data, &half, &mut |_, _| true).unwrap();
    assert_eq!([is_streamed(&found.train), is_streamed(&found.test)], [true, false], "pictures of half the side");
    let whole = load_with(&data, &LoadOptions { memory: None, ..half }, &mut |_, _| true).unwrap();
    assert_eq!(found.train.into_memory().unwrap(), whole.train);
}

#[test]
fn reading_is_told_and_can_be_stopped() {
    let folder = folder();
    let data = folder.path().join("pictures");
    for memory in [None, Some(0)] {
        let mut told = Vec::new();
        load_with(&data, &options(memory), &mut |done, of| {
            told.push((done, of));
            true
        })
        .unwrap();
        let of_train = told.iter().take_while(|(_, of)| *of == COUNTS[0]).count();
        for (part, count) in [(&told[..of_train], COUNTS[0]), (&told[of_train..], COUNTS[1])] {
            assert!(part.is_sorted() && part.iter().all(|(_, of)| *of == count), "{told:?}");
            assert_eq!(part.last(), Some(&(count, count)), "{told:?}");
        }
        let mut calls = 0;
        let stopped = load_with(&data, &options(memory), &mut |_, _| {
            calls += 1;
            false
        });
        assert!(matches!(stopped, Err(DataError::Stopped)));
        assert_eq!(calls, 1);
    }
}

/// A damaged picture is an error when the set is opened, before anything is trained. The pictures of the other split
/// are read only for statistics.
#[test]
fn a_damaged_picture_is_found_when_the_set_is_opened() {
    let folder = folder();
    let data = folder.path().join("pictures");
    let damaged = picture(&data, "train", 20);
    let whole = fs::read(&damaged).unwrap();
    fs::write(&damaged, &whole[..whole.len() / 2]).unwrap();
    let other = picture(&data, "train", 30);
    draw(&other, 1, SIDE + 1);
    for memory in [None, Some(0)] {
        let resized = LoadOptions { image_size: Some(8), ..options(memory) };
        let error = load_with(&data, &resized, &mut |_, _| true).unwrap_err().to_string();
        assert!(error.contains("020.png: not a picture that can be read"), "{error}");
        let open = |without_statistics| {
            let options = LoadOptions { without_statistics, ..options(memory) };
            load_split_with(&data, Split::Test, &options, &mut |_, _| true)
        };
        assert!(open(false).is_err());
        let test = open(true).unwrap();
        assert_eq!((test.images.len(), test.statistics), (COUNTS[1], StatisticsSource::Unknown));
        assert!(test.mean.is_empty() && test.std.is_empty());
    }
    fs::write(&damaged, whole).unwrap();
    let error = load_with(&data, &options(Some(0)), &mut |_, _| true).unwrap_err();
    assert!(matches!(error, DataError::PictureSizes { .. }), "{error}");
}

/// Pictures that are gone or another one since the set was opened.
#[test]
fn a_picture_that_has_changed_is_named() {
    let folder = folder();
    let data = folder.path().join("pictures");
    let train = load(&data, Some(0)).train;
    let file = picture(&data, "train", 7);
    draw(&file, 4321, SIDE);
    let error = train.bytes_of(0..50).unwrap_err().to_string();
    assert!(error.ends_with("007.png: the picture has changed since the data set was opened"), "{error}");
    fs::remove_file(&file).unwrap();
    let error = train.bytes_of(7..8).unwrap_err().to_string();
    assert!(error.contains("007.png: No such file"), "{error}");
    assert!(train.bytes_of(8..50).is_ok());
}

// ---- Training -------------------------------------------------------------------------------------------------------

/// A run over the pictures, with these settings beside.
fn training(folder: &Path, settings: &str, memory: Option<u64>) -> Training<'static> {
    let file = folder.join(format!("{:?}.toml", std::thread::current().id()));
    let data = folder.join("pictures");
    let memory = memory.map(|memory| format!("image-memory = {memory}\n")).unwrap_or_default();
    let general = "batch-size = 8\nschedule = \"constant\"\ndevice = \"cpu\"\nthreads = 2\n";
    fs::write(&file, format!("data = {:?}\n{general}{memory}{settings}", data.to_str().unwrap())).unwrap();
    Training::new(Options::from_file(&file).unwrap().resolve().unwrap())
}

/// Files of a run, and its log without what depends on the clock.
#[derive(PartialEq)]
struct Found(Vec<serde_json::Value>, Vec<(String, Vec<u8>)>);

fn found(run: &Path) -> Found {
    let log = fs::read_to_string(run.join("log.jsonl")).unwrap();
    let mut records: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for record in &mut records {
        let record = record.as_object_mut().unwrap();
        record.remove("seconds");
        record.remove("images_per_second");
    }
    let names = ["model", "best", "ema", "swa"].map(|name| format!("{name}.safetensors"));
    let files = names.into_iter().filter(|name| run.join(name).exists());
    Found(records, files.map(|name| (name.clone(), fs::read(run.join(name)).unwrap())).collect())
}

fn same(one: &Found, other: &Found, what: &str) {
    assert_eq!(one.0, other.0, "{what}");
    assert!(one.1 == other.1, "{what}: other bits in a file");
}

/// Runs of 12 steps in epochs of 6, in memory, in files, and in files with a pause after 7 steps.
#[test]
fn runs_from_files_have_the_bits_of_runs_from_memory() {
    let folder = folder();
    let mut found_so_far: Vec<Found> = Vec::new();
    for (index, settings) in [
        "log-every = 1",
        "augment = \"none\"\nno-shuffle = true",
        "random-resized-crop = 0.3\ncolor-jitter = [0.4, 0.4, 0.4, 0.1]\nmicro-batch = 4",
        "mixup = 0.4\ncutmix = 1.0\ncutout = 3\nm-sharpness = 4",
        "validation = 0.2\nlabel-noise = 0.3\noptimizer = \"cr-sam\"",
        "swa = 1\nema = 0.9\nlabel-noise = 0.5\nlabel-noise-kind = \"asymmetric\"\ntrain-size = 48",
        "optimizer = \"sampa\"\nbase = \"adamw\"",
        "curvature-every = 1\ncurvature-measures = [\"grad-norm\", \"m-sharpness\"]\ncurvature-samples = 21",
    ]
    .into_iter()
    .enumerate()
    {
        let at = |name: &str| folder.path().join(format!("{index} {name}"));
        let run = |name: &str, memory, steps: u64| -> Summary {
            let training = training(folder.path(), &format!("{settings}\nsteps = {steps}"), memory);
            let training = if at(name).exists() { training.resume(at(name)) } else { training.out(at(name)) };
            training.run().unwrap()
        };
        let memory = run("memory", None, 12);
        let files = run("files", Some(0), 12);
        assert_eq!((memory.test, memory.best_validation_accuracy), (files.test, files.best_validation_accuracy));
        let expected = found(&at("memory"));
        same(&expected, &found(&at("files")), settings);
        assert!(found_so_far.iter().all(|other| *other != expected), "{settings} changed nothing");
        found_so_far.push(expected);
        // The test in the middle of an epoch is a line of its own, and an average over epochs needs a whole run.
        if settings.starts_with("log-every") || settings.contains("swa") || settings.contains("curvature") {
            continue;
        }
        run("parts", Some(0), 7);
        // Where the pictures are may change in between.
        run("parts", if index % 2 == 0 { None } else { Some(0) }, 12);
        let parts = found(&at("parts"));
        assert!(parts.1 == found_so_far[index].1, "{settings}: other bits after a pause");
    }
}

#[test]
fn predictions_for_pictures_in_files_are_those_for_pictures_in_memory() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    training(folder.path(), "steps = 6", None).out(at("first")).run().unwrap();
    let labels = [("memory", None), ("files", Some(0))].map(|(name, memory)| {
        let settings = format!("steps = 6\ntrain-size = 45\nbootstrap = {:?}", at("first").to_str().unwrap());
        training(folder.path(), &settings, memory).out(at(name)).run().unwrap();
        fs::read(at(name).join("labels.npy")).unwrap()
    });
    assert_eq!(labels[0], labels[1]);
    same(&found(&at("memory")), &found(&at("files")), "bootstrap");
}

/// Stops a run as soon as `when` says so.
fn stopped(training: Training<'_>, when: impl Fn(&Progress) -> bool) -> Result<Summary, TrainError> {
    let stop = AtomicBool::new(false);
    training.run_with(&stop, &mut |progress| {
        if when(&progress) {
            stop.store(true, Ordering::Relaxed);
        }
    })
}

#[test]
fn a_run_that_is_stopped_goes_on_with_the_same_bits() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let run = || training(folder.path(), "epochs = 2", Some(0));
    run().out(at("whole")).run().unwrap();
    let summary = stopped(run().out(at("start")), |progress| matches!(progress, Progress::Start { .. })).unwrap();
    assert!(summary.interrupted && summary.steps == 0);
    let summary = stopped(run().out(at("test")), |progress| matches!(progress, Progress::Testing)).unwrap();
    assert!(summary.interrupted && summary.steps == 6);
    for name in ["start", "test"] {
        run().resume(at(name)).run().unwrap();
        same(&found(&at("whole")), &found(&at(name)), name);
    }
    let reading = stopped(run().out(at("reading")), |progress| matches!(progress, Progress::Reading { .. }));
    assert!(matches!(reading, Err(TrainError::Device(device::Error::Stopped))));
    assert!(!at("reading").exists(), "nothing was begun");
}

/// A picture that becomes unreadable ends the run when its turn comes. What was trained before is saved, and with the
/// picture as it was the run goes on to the same bits.
#[test]
fn a_picture_that_becomes_unreadable_ends_the_run_in_one_line() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    // Of the last step of an epoch, and not among those that are decoded ahead when the epoch begins.
    let file = picture(&folder.path().join("pictures"), "train", 45);
    let whole = fs::read(&file).unwrap();
    let run = || training(folder.path(), "epochs = 3\nno-shuffle = true", Some(0));
    run().out(at("whole")).run().unwrap();
    training(folder.path(), "epochs = 1\nno-shuffle = true", Some(0)).out(at("one epoch")).run().unwrap();
    let model = |name: &str| fs::read(at(name).join("model.safetensors")).unwrap();
    let damages: [(&str, &dyn Fn()); 3] = [
        ("gone", &|| fs::remove_file(&file).unwrap()),
        ("damaged", &|| fs::write(&file, &whole[..whole.len() / 2]).unwrap()),
        ("changed", &|| draw(&file, 777, SIDE)),
    ];
    for (name, damage) in damages {
        let epochs = Mutex::new(0);
        let error = run().out(at(name)).run_with(&AtomicBool::new(false), &mut |progress| {
            if matches!(progress, Progress::Epoch(_)) {
                *epochs.lock().unwrap() += 1;
                damage();
            }
        });
        let error = error.unwrap_err();
        let line = error.to_string();
        assert!(line.contains("045.png: ") && !line.contains('\n') && error.is_input(), "{name}: {line}");
        assert_eq!(*epochs.lock().unwrap(), 1, "{name}");
        assert!(model(name) != model("one epoch"), "{name}: the steps of the second epoch are lost");
        fs::write(&file, &whole).unwrap();
        run().resume(at(name)).run().unwrap();
        same(&found(&at("whole")), &found(&at(name)), name);
    }
    // A picture of the test: its epoch is not lost.
    let file = picture(&folder.path().join("pictures"), "test", 2);
    let whole = fs::read(&file).unwrap();
    let error = run().out(at("untested")).run_with(&AtomicBool::new(false), &mut |progress| {
        if matches!(progress, Progress::Testing) {
            fs::remove_file(&file).unwrap();
        }
    });
    assert!(error.unwrap_err().is_input());
    assert!(model("untested") == model("one epoch"));
    fs::write(&file, &whole).unwrap();
    run().resume(at("untested")).run().unwrap();
    same(&found(&at("whole")), &found(&at("untested")), "untested");
}

// ---- Evaluation -----------------------------------------------------------------------------------------------------

#[test]
fn evaluations_and_measurements_of_files_are_those_of_memory() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    training(folder.path(), "steps = 3", None).out(at("run")).run().unwrap();
    let model = Options::of_run(&at("run")).unwrap().resolve().unwrap().model().unwrap();
    let network = |images: Shape, classes: usize| model.trace(images, classes);
    let device = open_device("cpu", 2).unwrap();
    let mut results = Vec::new();
    for memory in [None, Some(0)] {
        let data = load(&at("pictures"), memory);
        let normalization = normalization(None, None, (&data.mean, &data.std), 3).unwrap();
        let mut evaluator =
            Evaluator::new(&device, &network, ("data", &data.test), normalization, 8, Mode::Eval).unwrap();
        let layouts = evaluator.layouts();
        let loaded = weights::load(&at("run").join("model.safetensors"), layouts).unwrap();
        let [parameters, statistics] = loaded.map(|values| device.upload(&values).unwrap());
        let mut all = Vec::new();
        let mut keep = |logits: Slice<'_, f32>| {
            all.extend(logits.to_vec()?);
            Ok(())
        };
        let test = evaluator.evaluate(parameters.view(), statistics.view(), &mut keep).unwrap();
        // Other images in place of these, of the other kind too.
        let other = data.train.clone().take(COUNTS[1]).unwrap();
        evaluator.replace_images("other", &other).unwrap();
        let replaced = evaluator.evaluate(parameters.view(), statistics.view(), &mut keep).unwrap();
        evaluator.replace_images("test", &data.test.clone().into_memory().unwrap()).unwrap();
        let again = evaluator.evaluate(parameters.view(), statistics.view(), |_| Ok(())).unwrap();
        assert_eq!(again, test);
        assert_ne!(again, replaced);
        assert_eq!(all.len(), 2 * COUNTS[1] * 3);
        let mut meter = CurvatureMeter::new(&device, &network, ("data", &other), normalization, 5, Mode::Eval).unwrap();
        let norm = meter.at(parameters.view(), statistics.view(), |curvature| curvature.gradient_norm()).unwrap();
        results.push((test, replaced, all, norm));
    }
    assert!(results[0] == results[1], "{:?}", (&results[0].0, &results[1].0));
    // A picture that is gone ends the evaluation.
    let data = load(&at("pictures"), Some(0));
    let normalization = normalization(None, None, (&data.mean, &data.std), 3).unwrap();
    let mut evaluator = Evaluator::new(&device, &network, ("data", &data.test), normalization, 8, Mode::Eval).unwrap();
    fs::remove_file(picture(&at("pictures"), "test", 11)).unwrap();
    let [parameters, statistics] =
        evaluator.layouts().map(|layout| device.upload(&vec![0.1f32; layout.len()]).unwrap());
    let error = evaluator.evaluate(parameters.view(), statistics.view(), |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("011.png: ") && error.is_input(), "{error}");
}
