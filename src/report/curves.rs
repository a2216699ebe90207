//! Charts over epochs and over steps.

use std::collections::{BTreeMap, BTreeSet};

use super::chart::{self, ChartAxis, LEARNING_RATE, Line, Style, line_chart};
use super::drawing::escape;
use super::page::{charts, figure, legend, measure_name, measure_names, note, section};
use super::runs::{Epoch, Group, LoadedRun, numbers};
use super::statistics::{Measurement, RunStatistics};
use super::text::plain;
use crate::train::Record;

/// A step-wise curve of more points than this is drawn as a moving mean over its values.
const SMOOTH_FROM: usize = 100;

/// Means over runs of a number at some epochs or steps, with their 95 % intervals, which include the errors of
/// measurements. A single run has the error of the measurement alone.
fn line_over(style: usize, name: &str, runs: &[Vec<(u64, Measurement)>]) -> Line {
    let mut epochs = BTreeMap::<u64, Vec<&Measurement>>::new();
    for (epoch, number) in runs.iter().flatten() {
        epochs.entry(*epoch).or_default().push(number);
    }
    let has_band = runs.len() > 1 || epochs.values().flatten().any(|number| number.error.is_some());
    let (mut points, mut band) = (Vec::new(), Vec::new());
    for (epoch, numbers) in epochs {
        let statistics = RunStatistics::of(numbers.iter().map(|of| of.value).collect());
        let (at, mean) = (epoch as f64, statistics.mean);
        points.push([at, mean]);
        let error = numbers.iter().filter_map(|of| of.error).fold(0.0, f64::max);
        let half = statistics.interval.unwrap_or(0.0).hypot(error);
        band.extend(has_band.then_some([at, mean - half, mean + half]));
    }
    Line { name: name.into(), style: Style(style), points, band, raw: Vec::new(), window: None, markers: true }
}

/// The runs whose curves are drawn.
fn that_count(groups: &[Group]) -> impl Iterator<Item = &LoadedRun> {
    groups.iter().flat_map(Group::that_count)
}

/// The moving mean of a long line, over a fiftieth of its points around each, with its values behind it.
fn smoothed(line: Line) -> Line {
    let count = line.points.len();
    if count <= SMOOTH_FROM {
        return Line { window: Some(1), ..line };
    }
    let half = count / 100;
    // Sums and counts of the finite values before each point.
    let mut sums = vec![(0.0, 0usize)];
    for &[_, value] in &line.points {
        let (sum, finite) = sums[sums.len() - 1];
        sums.push(if value.is_finite() { (sum + value, finite + 1) } else { (sum, finite) });
    }
    let mean = |(index, &[at, value]): (usize, &[f64; 2])| {
        let ((before, first), (after, last)) = (sums[index.saturating_sub(half)], sums[(index + half + 1).min(count)]);
        [at, if value.is_finite() { (after - before) / (last - first) as f64 } else { f64::NAN }]
    };
    let points = line.points.iter().enumerate().map(mean).collect();
    Line { points, raw: line.points, window: Some(2 * half + 1), band: Vec::new(), markers: false, ..line }
}

/// A chart over epochs or steps, if any run has a finite number.
fn chart_over(
    groups: &[Group],
    title: &str,
    (over, unit): (&str, &str),
    of: impl Fn(&LoadedRun) -> Vec<(u64, Measurement)>,
) -> Option<String> {
    let line = |(index, group): (usize, &Group)| {
        let runs: Vec<_> = group.that_count().map(&of).collect();
        line_over(index, &group.name, &runs)
    };
    let lines = groups.iter().enumerate().map(line);
    let lines: Vec<Line> = if over == "step" { lines.map(smoothed).collect() } else { lines.collect() };
    let (low, high) = chart::range(lines.iter().flat_map(|line| line.points.iter().map(|point| point[0])))?;
    let margin = if low == high { 0.6 } else { 0.02 * (high - low) };
    let x = ChartAxis { whole: true, ..ChartAxis::exact(over, low - margin, high + margin, false) };
    let (drawing, data) = line_chart(&format!("{title} over {over}s"), x, unit, &lines)?;
    Some(figure(&format!("<b>{}</b>", escape(title)), &drawing, Some(&data)))
}

pub(super) fn learning(groups: &[Group]) -> Option<String> {
    let of = |number: fn(&Epoch) -> Option<f64>| {
        move |run: &LoadedRun| -> Vec<(u64, Measurement)> {
            let number = |epoch: &Epoch| Measurement::new(number(epoch).unwrap_or(f64::NAN), None);
            run.finished_epochs().map(|epoch| (epoch.epoch, number(epoch))).collect()
        }
    };
    let mut figures = String::new();
    let mut add = |title, unit, number| figures.extend(chart_over(groups, title, ("epoch", unit), of(number)));
    add("Training loss", "cross-entropy (nats)", |epoch| epoch.train_loss);
    add("Test loss", "cross-entropy (nats)", |epoch| epoch.test_loss);
    add("Test accuracy", "accuracy (%)", |epoch| Some(100.0 * epoch.test_accuracy));
    let averaged = |epoch: &Epoch| epoch.ema_test_accuracy.map(|share| 100.0 * share);
    let held_out = |epoch: &Epoch| epoch.validation_accuracy.map(|share| 100.0 * share);
    let any = |number: fn(&Epoch) -> Option<f64>| {
        that_count(groups).flat_map(LoadedRun::finished_epochs).any(|epoch| number(epoch).is_some())
    };
    if any(averaged) {
        add("Test accuracy of the averaged weights", "accuracy (%)", averaged);
    }
    if any(held_out) {
        add("Validation accuracy", "accuracy (%)", held_out);
    }
    let rates: BTreeSet<u64> =
        that_count(groups).flat_map(LoadedRun::finished_epochs).map(|epoch| epoch.lr.to_bits()).collect();
    if rates.len() > 1 {
        add("Learning rate of the epoch's last step", LEARNING_RATE, |epoch| Some(epoch.lr));
    }
    add("Gradient norm of the epoch's last step", "‖g‖", |epoch| epoch.gradient_norm);
    figures += &own_numbers(groups, "epoch");
    if figures.is_empty() {
        return None;
    }
    let mut content = legend(groups) + &charts(&figures);
    if groups.iter().any(|group| group.runs.len() > 1) {
        content += &note("Lines are means over the runs of a group, bands their 95 % intervals (Student's t).");
    }
    Some(section("Learning curves", &content))
}

pub(super) fn curvature_over_epochs(groups: &[Group]) -> Option<String> {
    // By run and name: the epochs and the numbers.
    type Series = BTreeMap<String, Vec<(u64, Measurement)>>;
    let series = |run: &LoadedRun| {
        let mut series = Series::new();
        for (epoch, measures) in run.curvatures() {
            for (name, number) in numbers(measures) {
                series.entry(name).or_default().push((epoch, number));
            }
        }
        (run.path.clone(), series)
    };
    let all: BTreeMap<_, Series> = that_count(groups).map(series).collect();
    let names = measure_names(all.values().flat_map(|series| series.keys().cloned()));
    let mut figures = String::new();
    for name in &names {
        let (title, unit) = measure_name(name);
        figures.extend(chart_over(groups, title, ("epoch", unit), |run| {
            all.get(&run.path).and_then(|series| series.get(name)).cloned().unwrap_or_default()
        }));
    }
    let text = "Bands are the 95 % intervals of the means over runs, with the errors of the measurements.";
    let content = legend(groups) + &charts(&figures) + &note(text);
    (!figures.is_empty()).then(|| section("Curvature during training", &content))
}

/// Numbers of the log that the report draws, their names for readers and their units on an axis. Numbers of a method
/// keep their names in the log.
const LOGGED: [(&str, &str, &str); 8] = [
    ("loss", "Loss of the batch", "cross-entropy (nats)"),
    ("accuracy", "Accuracy on the batch", "accuracy (%)"),
    ("lr", "Learning rate", LEARNING_RATE),
    ("gradient_norm", "Norm of the gradient", "‖g‖"),
    ("sharpness", "Rise of the loss by the perturbation", "L(w + ε) − L(w)"),
    ("cosine_gradients", "Cosine of the gradients at w and at w + ε", "cosine"),
    ("cosine_perturbation", "Cosine of the rounded and the intended perturbation", "cosine"),
    ("skipped", "Skipped steps", "steps so far"),
];

/// The numbers of a line of the log, by their names there.
fn logged(record: &Record) -> serde_json::Map<String, serde_json::Value> {
    match serde_json::to_value(record) {
        Ok(serde_json::Value::Object(numbers)) => numbers,
        _ => serde_json::Map::new(),
    }
}

/// Charts of the numbers of the log that have no chart of their own: those of steps, or a method's after epochs.
/// A number that is zero throughout, such as the count of skipped steps, is left out.
fn own_numbers(groups: &[Group], over: &str) -> String {
    type Series = BTreeMap<String, BTreeMap<u64, f64>>;
    let of_run = |run: &LoadedRun| {
        let mut series = Series::new();
        for record in &run.records {
            let (place, skip): (u64, &[&str]) = match record {
                Record::Step { step, .. } if over == "step" => (*step, &["step", "epoch", "images_per_second"]),
                Record::Epoch { epoch, method, skipped, .. } if over == "epoch" => {
                    let own = method.iter().filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)));
                    for (name, value) in own.chain([("skipped".to_string(), f64::from(*skipped))]) {
                        series.entry(name).or_default().insert(*epoch, value);
                    }
                    continue;
                }
                _ => continue,
            };
            for (name, value) in logged(record).iter().filter(|(name, _)| !skip.contains(&name.as_str())) {
                let percent = if name == "accuracy" { 100.0 } else { 1.0 };
                if value.is_number() || value.is_null() {
                    let value = percent * value.as_f64().unwrap_or(f64::NAN);
                    series.entry(name.clone()).or_default().insert(place, value);
                }
            }
        }
        (run.path.clone(), series)
    };
    let all: BTreeMap<_, Series> = that_count(groups).map(of_run).collect();
    let mut names: Vec<&String> = all.values().flat_map(BTreeMap::keys).collect::<BTreeSet<_>>().into_iter().collect();
    names.sort_by_key(|name| LOGGED.iter().position(|(logged, ..)| logged == name).unwrap_or(LOGGED.len()));
    let says_something = |series: &BTreeMap<u64, f64>| series.values().any(|value| value.is_finite() && *value != 0.0);
    names.retain(|&name| all.values().filter_map(|series| series.get(name)).any(says_something));
    let mut figures = String::new();
    for name in names {
        let known = LOGGED.iter().find(|(logged, ..)| logged == name);
        let shown = plain(&name.replace('_', " "));
        let (title, unit) = known.map_or((shown.as_str(), shown.as_str()), |&(_, title, unit)| (title, unit));
        figures.extend(chart_over(groups, title, (over, unit), |run| {
            let series = all.get(&run.path).and_then(|series| series.get(name)).into_iter().flatten();
            series.map(|(&place, &value)| (place, Measurement::new(value, None))).collect()
        }));
    }
    figures
}

/// The numbers that the log has of single steps.
pub(super) fn steps(groups: &[Group]) -> Option<String> {
    let figures = own_numbers(groups, "step");
    let text = "Of the logged steps. A long line is the mean over a fiftieth of its points, with the points behind it.";
    (!figures.is_empty()).then(|| section("Steps", &(legend(groups) + &charts(&figures) + &note(text))))
}
