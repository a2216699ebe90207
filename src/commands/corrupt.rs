//! `polder corrupt`: writes corrupted test images in the layout of CIFAR-10-C.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use polder::data::{CORRUPTIONS, Corruption, ImageShape, Images, LoadOptions, SEVERITIES, Split};
use polder::device::HostOptions;
use polder::settings;
use polder::train::{TrainError, hold, open_split, write_npy};

use super::flags::Flags;
use super::{Bar, Failure, option, print, stop_on_signals, tell};

/// The most classes of a set with corruptions, CIFAR-100-C.
const MOST_CLASSES: usize = 100;

settings! {
    /// Which images, and how to corrupt them.
    pub struct CorruptSettings {
        /// A data set of images of 32 x 32 pixels in colour, such as CIFAR-10
        data: Option<String> = None, as "PATH";
        /// Which images
        split: Split = Split::Test;
        /// The first N images
        samples: Option<usize> = None, else "all", in at_least(1);
        /// Seed of noise and of random directions and shifts
        seed: u64 = 0;
        /// CPU threads; 0 takes one per core
        threads: usize = 0, in at_most(HostOptions::MOST_THREADS as u64);
    }
}

#[derive(clap::Args)]
pub struct CorruptArgs {
    #[command(flatten)]
    images: Flags<CorruptSettings>,
    /// The corruptions, separated by commas; all if this is not given
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    corruptions: Vec<String>,
    /// The folder for the files, which must be empty or not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(args: &CorruptArgs) -> Result<ExitCode, Failure> {
    let CorruptSettings { data, split, samples, seed, threads } = args.images.settings()?;
    let data = data.ok_or_else(|| option("data", "missing; expected the folder of a data set"))?;
    let corruptions = chosen(&args.corruptions)?;
    // Every image is read for each corruption.
    let options = LoadOptions { memory: Some(u64::MAX), without_statistics: true, ..LoadOptions::default() };
    let found = open_split(&data, split, &options, &mut |_, _| true)?;
    let images = match samples {
        Some(count) => found.images.take(count).map_err(|error| option("samples", error))?,
        None => found.images,
    };
    check_images(&images)?;
    let held = hold(&args.out)?;
    check_empty(&args.out)?;
    let threads = match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signals(&stop, "image", None);
    let bar = Bar::new();
    for corruption in &corruptions {
        let Some(pixels) = all_severities(corruption, &images, (seed, threads), &stop, &bar)? else {
            drop(bar);
            tell("interrupted; the folder has no labels.npy, so it is not complete");
            return Ok(ExitCode::from(130));
        };
        held.check()?;
        let shape = [(SEVERITIES * images.len()) as u64, 32, 32, 3];
        write_npy(&args.out.join(format!("{}.npy", corruption.name)), &pixels, &shape)?;
    }
    drop(bar);
    // The last file: a folder with it is complete.
    let labels: Vec<u8> = images.labels.iter().map(|&label| label as u8).collect::<Vec<u8>>().repeat(SEVERITIES);
    held.check()?;
    write_npy(&args.out.join("labels.npy"), &labels, &[labels.len() as u64])?;
    let (count, of) = (corruptions.len(), images.len());
    print(&format!("{count} corruptions of {of} images at {SEVERITIES} severities in {}", args.out.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Fails for images that CIFAR-10-C and CIFAR-100-C have no place for, before anything is written.
fn check_images(images: &Images) -> Result<(), TrainError> {
    let ImageShape { height, width, channels } = images.shape;
    if (height, width, channels) != (32, 32, 3) || images.classes > MOST_CLASSES {
        let found = format!("images of {} in {} classes", images.shape, images.classes);
        return Err(option("data", format!("{found}, expected 32x32x3 in at most {MOST_CLASSES}, as CIFAR has")));
    }
    Ok(())
}

fn chosen(names: &[String]) -> Result<Vec<&'static Corruption>, TrainError> {
    if names.is_empty() {
        return Ok(CORRUPTIONS.iter().collect());
    }
    let find = |name: &String| {
        let known = || CORRUPTIONS.iter().map(|corruption| corruption.name).collect::<Vec<_>>().join(", ");
        Corruption::find(name).ok_or_else(|| option("corruptions", format!("{name}, expected some of {}", known())))
    };
    names.iter().map(find).collect()
}

/// Fails if a folder has anything in it.
fn check_empty(folder: &Path) -> Result<(), TrainError> {
    let io = |source| TrainError::Io { path: folder.into(), source };
    match std::fs::read_dir(folder).map_err(io)?.next() {
        None => Ok(()),
        Some(_) => Err(option("out", format!("{} is not empty", folder.display()))),
    }
}

/// The images at every severity, one after another; none if it was stopped.
fn all_severities(
    corruption: &Corruption,
    images: &Images,
    (seed, threads): (u64, usize),
    stop: &AtomicBool,
    bar: &Bar,
) -> Result<Option<Vec<u8>>, TrainError> {
    let done = AtomicUsize::new(0);
    let mut pixels = Vec::with_capacity(SEVERITIES * images.len() * images.shape.bytes());
    for severity in 1..=SEVERITIES {
        let found = std::thread::scope(|scope| {
            let work = scope.spawn(|| corruption.images(images, severity, (seed, threads), stop, &done));
            while !work.is_finished() {
                bar.show(corruption.name, done.load(Ordering::Relaxed), SEVERITIES * images.len());
                std::thread::sleep(Duration::from_millis(20));
            }
            work.join()
        });
        let found = found.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let Some(found) = found? else { return Ok(None) };
        pixels.extend(found);
    }
    Ok(Some(pixels))
}
