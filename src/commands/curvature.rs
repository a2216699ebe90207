//! `polder curvature`: how flat the loss is around trained weights.

use std::path::PathBuf;

use polder::curvature::{Density, Estimate, Rise};
use polder::report::spectrum_picture;
use polder::settings::Choice;
use polder::train::{
    CurvatureFile, CurvatureMeter, CurvatureSettings, Finding, Findings, MeanOver, Measure, TrainError, checksum, hold,
    write_whole,
};
use serde_json::json;

use super::flags::Flags;
use super::model::{MeasureSettings, ModelArgs, Samples};
use super::{Bar, Failure, counted, print};

#[derive(clap::Args)]
pub struct CurvatureArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: Flags<MeasureSettings>,
    #[command(flatten)]
    settings: Flags<CurvatureSettings>,
    /// Write curvature.json, curvature.csv and, with a spectrum, spectrum.csv and pictures of it to this folder
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn run(args: &CurvatureArgs) -> Result<(), Failure> {
    let settings = args.settings.settings()?;
    settings.check_combination()?;
    let MeasureSettings { split, samples, bn } = args.images.settings()?;
    let subject = args.model.open(split, samples.map_or(Samples::Usual, Samples::First))?;
    let batch_size = subject.batch_size;
    // A folder that cannot be written to, or that already holds measurements, is an error before the work.
    let mut held = None;
    if let Some(out) = &args.out {
        held = Some(hold(out)?);
        if out.join("curvature.json").exists() {
            let reason = "already holds measurements (curvature.json)".into();
            return Err(TrainError::Occupied { path: out.clone(), reason }.into());
        }
    }
    let images = (&*subject.data, &subject.images);
    let mut meter =
        CurvatureMeter::new(&subject.device, &subject.network(), images, subject.normalization, batch_size, bn.mode())?;
    let [parameters, statistics] = subject.load(&subject.init, meter.plan())?;
    let bar = Bar::new();
    let mut progress = |measure: Measure, done, of| bar.show(&measure.to_string(), done, of);
    let found = meter.measure(parameters.view(), statistics.view(), &settings, &mut progress);
    drop(bar);
    let found = found?;
    // Nothing is written if every measure failed.
    if !found.list.is_empty() && found.list.iter().all(|(_, finding)| matches!(finding, Finding::NotFinite)) {
        return Err(subject.weights_error(Finding::NOT_FINITE.into()).into());
    }
    let samples = subject.images.len();
    let weights = checksum(&subject.init)?;
    let file = CurvatureFile::new(&found, &settings, (samples, split.word()), (batch_size, bn.mode()), weights);
    let object = json!(file);
    if let Some(out) = &args.out {
        write_whole(&out.join("curvature.json"), format!("{object}\n").as_bytes())?;
        write_whole(&out.join("curvature.csv"), table(&found).as_bytes())?;
        for (_, finding) in &found.list {
            if let Finding::Density(Density { nodes, weights }) = finding {
                let lines: String =
                    nodes.iter().zip(weights).map(|(node, weight)| format!("{node},{weight}\n")).collect();
                write_whole(&out.join("spectrum.csv"), format!("node,weight\n{lines}").as_bytes())?;
                spectrum_picture(nodes, weights, out)?;
            }
        }
    }
    drop(held);
    if args.model.json {
        return print(&object.to_string());
    }
    print(&format!(
        "{}, {split} split: {samples} samples; {}, {} with the Hessian",
        subject.name,
        counted(found.passes.gradients, "gradient"),
        counted(found.passes.products, "product"),
    ))?;
    for (measure, finding) in &found.list {
        print(&format!("{:<19} {}", measure.to_string(), words(finding, &settings)))?;
    }
    Ok(())
}

/// A CSV table with a line for each number.
fn table(found: &Findings) -> String {
    let mut text = "measure,of,value,error\n".to_string();
    for (measure, finding) in &found.list {
        for (of, value, error) in finding.numbers() {
            let error = error.map_or(String::new(), |error| error.to_string());
            text += &format!("{measure},{of},{value},{error}\n");
        }
    }
    text
}

/// A finding as text, in one line or several.
fn words(finding: &Finding, settings: &CurvatureSettings) -> String {
    let CurvatureSettings { probes, steps: most, .. } = settings;
    match finding {
        Finding::Number(value) => digits(*value),
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
            format!("({}){}", counted(*probes, "probe"), layers.iter().map(line).collect::<String>())
        }
        Finding::Extrema([minima, maxima]) => {
            format!("{} minima, {} maxima ({})", with_error(minima), with_error(maxima), counted(*probes, "line"))
        }
        Finding::Eigenvalues { pairs, converged } => {
            let each: Vec<String> =
                pairs.iter().map(|(value, residual)| format!("{} ± {}", digits(*value), digits(*residual))).collect();
            let ratio = Finding::first_over_fifth(pairs);
            let ratio = ratio.map_or(String::new(), |ratio| format!("; first over fifth {}", digits(ratio)));
            let open = if *converged { "" } else { "; not all within the tolerance" };
            format!("{}{ratio}{open}", each.join(", "))
        }
        Finding::Density(Density { nodes, .. }) => {
            let least = nodes.iter().copied().fold(f64::INFINITY, f64::min);
            let largest = nodes.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let (probes, most) = (counted(*probes, "probe"), counted(*most, "step"));
            format!("{} … {} ({probes} of {most})", digits(least), digits(largest))
        }
    }
}

/// A value and its standard error, if it has one.
fn with_error(Estimate { value, standard_error, .. }: &Estimate) -> String {
    match standard_error {
        Some(error) => format!("{} ± {}", digits(*value), digits(*error)),
        None => digits(*value),
    }
}

/// At least four significant digits.
fn digits(value: f64) -> String {
    if value == 0.0 || (1e-2..1e6).contains(&value.abs()) { format!("{value:.4}") } else { format!("{value:.4e}") }
}
