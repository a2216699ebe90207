//! `polder curvature`: how flat the loss is around trained weights.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use polder::curvature::{Density, Estimate, Rise};
use polder::report::{spectrum_pictures, with_errors};
use polder::settings::Choice;
use polder::train::{
    CurvatureFile, CurvatureMeter, CurvatureSettings, Distribution, Finding, Findings, MeanOver, Measure, TrainError,
    checksum, hold, write_whole,
};
use serde_json::json;

use super::flags::Flags;
use super::model::{MeasureSettings, ModelArgs, Samples};
use super::{Bar, Failure, counted, print, stop_on_signals, tell};

#[derive(clap::Args)]
pub struct CurvatureArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: Flags<MeasureSettings>,
    #[command(flatten)]
    settings: Flags<CurvatureSettings>,
    /// Write curvature.json, curvature.csv and, with a spectrum, spectrum.csv and pictures of it to this folder.
    /// Measures are added to those of the same weights, images and settings that it holds
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn run(args: &CurvatureArgs) -> Result<ExitCode, Failure> {
    let mut settings = args.settings.settings()?;
    settings.check_combination()?;
    let MeasureSettings { split, samples, bn } = args.images.settings()?;
    // Measures are added over the images of those that the folder holds.
    let there = args.out.as_ref().map(|out| CurvatureFile::read(&out.join("curvature.json"))).transpose()?.flatten();
    let there = there.and_then(|file| usize::try_from(file.samples?).ok());
    let most = there.unwrap_or_else(|| CurvatureMeter::usual_samples(&settings.measure));
    let usual = Samples::Usual { most, bn };
    let subject = args.model.open(split, samples.map_or(usual, Samples::First))?;
    // The file without its findings: what they are of.
    let (count, batch_size) = (subject.images.len(), subject.batch_size);
    let checksums = [checksum(&subject.init)?, subject.images.checksum()];
    let file = |found: &Findings, settings: &CurvatureSettings| {
        CurvatureFile::new(found, settings, (count, split.word()), (batch_size, bn.mode()), checksums.clone())
    };
    // A folder that cannot be written to, or that holds other measurements, is an error before the work.
    let mut target = None;
    if let Some(out) = &args.out {
        let held = hold(out)?;
        let earlier = earlier(out, &file(&Findings::default(), &settings), &mut settings.measure)?;
        target = Some((out, held, earlier));
    }
    let images = (&*subject.data, &subject.images);
    let mut meter =
        CurvatureMeter::new(&subject.device, &subject.network(), images, subject.normalization, batch_size, bn.mode())?;
    let [parameters, statistics] =
        subject.load(&subject.init, [meter.plan().parameters(), meter.plan().statistics_layout()])?;
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signals(&stop, "pass", None);
    let bar = Bar::new();
    let mut progress = |measure: Measure, done, of| bar.show(&measure.to_string(), done, of);
    let found = meter.measure(&stop, parameters.view(), statistics.view(), &settings, &mut progress);
    drop(bar);
    let Some(found) = TrainError::unless_stopped(found)? else {
        tell("interrupted; nothing was written");
        return Ok(ExitCode::from(130));
    };
    // Nothing is written if every measure failed.
    if !found.list.is_empty() && found.list.iter().all(|(_, finding)| matches!(finding, Finding::NotFinite)) {
        return Err(subject.weights_error(Finding::NOT_FINITE.into()).into());
    }
    let mut file = CurvatureFile { subject: subject.title.clone(), ..file(&found, &settings) };
    if let Some((out, held, earlier)) = target {
        if let Some(earlier) = earlier {
            file.add(earlier);
        }
        held.check()?;
        write(out, &file)?;
    }
    if args.model.json {
        print(&json!(file).to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let CurvatureFile { passes, .. } = &file;
    let of = |name: &str| passes.get(name).copied().unwrap_or_default();
    print(&format!(
        "{}, {split} split: {}; {}, {} alone, {} with the Hessian",
        subject.name,
        counted(count as u64, "sample"),
        counted(of("gradients"), "gradient"),
        if of("losses") == 1 { "1 loss".into() } else { format!("{} losses", of("losses")) },
        counted(of("products"), "product"),
    ))?;
    for (measure, finding) in &file.list() {
        print(&format!("{:<19} {}", measure.to_string(), words(finding, &file)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The measurements that the folder holds already. Takes those out of the wanted ones.
fn earlier(out: &Path, file: &CurvatureFile, wanted: &mut Vec<Measure>) -> Result<Option<CurvatureFile>, TrainError> {
    let path = out.join("curvature.json");
    let Some(earlier) = CurvatureFile::read(&path)? else { return Ok(None) };
    let occupied = |reason: String| TrainError::Occupied { path: path.clone(), reason };
    if let Some(what) = file.difference(wanted, &earlier) {
        return Err(occupied(format!("holds measurements of other {what}")));
    }
    let known: Vec<Measure> = earlier.list().iter().map(|(measure, _)| *measure).collect();
    let (there, left): (Vec<Measure>, Vec<Measure>) = wanted.iter().partition(|measure| known.contains(measure));
    if there.is_empty() {
        return Ok(Some(earlier));
    }
    let names = there.iter().map(Measure::to_string).collect::<Vec<_>>().join(", ");
    if left.is_empty() {
        return Err(occupied(format!("already holds {names}")));
    }
    tell(&format!("{}: already holds {names}", path.display()));
    *wanted = left;
    Ok(Some(earlier))
}

/// Writes the measurements. `curvature.json` is the last file, so that a folder that has it is whole.
fn write(out: &Path, file: &CurvatureFile) -> Result<(), TrainError> {
    let list = file.list();
    write_whole(&out.join("curvature.csv"), table(&list).as_bytes())?;
    for (_, finding) in &list {
        if let Finding::Density(Density { nodes, weights }) = finding {
            let lines: String = nodes.iter().zip(weights).map(|(node, weight)| format!("{node},{weight}\n")).collect();
            write_whole(&out.join("spectrum.csv"), format!("node,weight\n{lines}").as_bytes())?;
            spectrum_pictures(nodes, weights, &file.subject, out)?;
        }
    }
    write_whole(&out.join("curvature.json"), format!("{}\n", json!(file)).as_bytes())
}

/// A CSV table with a line for each number.
fn table(list: &[(Measure, Finding)]) -> String {
    let mut text = "measure,of,value,error\n".to_string();
    for (measure, finding) in list {
        for (of, value, error) in finding.numbers() {
            let error = error.map_or(String::new(), |error| error.to_string());
            text += &format!("{measure},{of},{value},{error}\n");
        }
    }
    text
}

/// A finding as text, in one line or several.
fn words(finding: &Finding, file: &CurvatureFile) -> String {
    // Those of the file, because its earlier measures may have been taken with others than this command's.
    let setting = |name: &str| file.settings.get(name).and_then(serde_json::Value::as_u64).unwrap_or_default();
    let (probes, most) = (setting("probes"), setting("steps"));
    match finding {
        Finding::Number(value) => digits(*value),
        Finding::Rounded { value, rounding_error } => {
            format!("{} (rounding of the losses)", plus_minus(*value, *rounding_error))
        }
        Finding::Ratio { mean, not_risen } => {
            let left = if *not_risen > 0 { format!("; {not_risen} more do not rise") } else { String::new() };
            format!("{} ({}{left})", with_error(mean), counted(mean.probes, "part"))
        }
        Finding::Mean(estimate, of) => {
            let of = if *of == MeanOver::Parts { "part" } else { "probe" };
            format!("{} ({})", with_error(estimate), counted(estimate.probes, of))
        }
        Finding::None(reason) => format!("none: {reason}"),
        Finding::NotFinite => format!("none: {}", Finding::NOT_FINITE),
        Finding::Rise { rise: Rise { one_step, largest }, steps, .. } => {
            format!("{} (one step {}, {} of ascent)", digits(*largest), digits(*one_step), counted(*steps, "step"))
        }
        Finding::Steepest { value, steps, .. } => format!("{} ({} of ascent)", digits(*value), counted(*steps, "step")),
        Finding::Layers(layers) => {
            let line = |(name, estimate): &(String, Estimate)| format!("\n  {name:<30} {}", with_error(estimate));
            format!("({}){}", counted(probes, "probe"), layers.iter().map(line).collect::<String>())
        }
        Finding::Extrema { minima, maxima } => {
            let lines = |found: &Distribution| {
                let of_count = |(count, lines): (usize, &usize)| format!("{count}: {lines}");
                found.histogram.iter().enumerate().map(of_count).collect::<Vec<_>>().join(", ")
            };
            let line = |name: &str, found: &Distribution| {
                format!("\n  {name} {} (lines by count: {})", with_error(&found.mean), lines(found))
            };
            format!("({}){}{}", counted(probes, "line"), line("minima", minima), line("maxima", maxima))
        }
        Finding::Eigenvalues { pairs, converged } => {
            let each: Vec<String> = pairs.iter().map(|(value, residual)| plus_minus(*value, *residual)).collect();
            let ratio = Finding::first_over_fifth(pairs);
            let ratio = ratio.map_or(String::new(), |ratio| format!("; first over fifth {}", digits(ratio)));
            let open = if *converged { "" } else { "; not all within the tolerance" };
            format!("{}{ratio}{open}", each.join(", "))
        }
        Finding::Density(Density { nodes, .. }) => {
            let least = nodes.iter().copied().fold(f64::INFINITY, f64::min);
            let largest = nodes.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let (probes, most) = (counted(probes, "probe"), counted(most, "step"));
            format!("{} … {} ({probes} of {most})", digits(least), digits(largest))
        }
    }
}

/// A value and its standard error, if it has one.
fn with_error(Estimate { value, standard_error, .. }: &Estimate) -> String {
    match standard_error {
        Some(error) => plus_minus(*value, *error),
        None => digits(*value),
    }
}

/// A value and its error, with the digits that the error allows.
fn plus_minus(value: f64, error: f64) -> String {
    let (value, errors) = with_errors(value, &[error]);
    // A terminal's text is often read by programs, which know the hyphen alone.
    format!("{value} ± {}", errors.concat()).replace('−', "-")
}

/// At least four significant digits.
fn digits(value: f64) -> String {
    if value == 0.0 || (1e-2..1e6).contains(&value.abs()) { format!("{value:.4}") } else { format!("{value:.4e}") }
}
