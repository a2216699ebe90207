//! The page: sections of tables and charts, in one file without references to others.

use std::collections::BTreeSet;

use super::chart::{self, ChartAxis, FAINT, Line, Panel, SMALL, Style, digits, line_chart, significant};
use super::drawing::{Anchor, Drawing, Ink, Medium, SERIES, SERIES_ON_DARK, VectorPath, escape, hex};
use super::landscape::{self, Levels, LoadedLandscape};
use super::runs::{Epoch, Group, LoadedRun, Measures, RunStatistics, differing, numbers};
use super::{CurvatureOrder, spectrum};

/// The whole page.
pub(super) fn page(groups: &[Group], order: Option<&CurvatureOrder>) -> String {
    let runs: usize = groups.iter().map(|group| group.runs.len()).sum();
    let names: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
    let title = match runs {
        1 => format!("Run {}", names.join("")),
        _ => format!("{runs} runs: {}", names.join("; ")),
    };
    let variables = |colours: &[[u8; 3]]| {
        let lines = colours.iter().enumerate().map(|(index, &colour)| format!("--series-{index}: {};", hex(colour)));
        lines.collect::<Vec<_>>().join(" ")
    };
    let style =
        include_str!("page.css").replace("LIGHT", &variables(&SERIES)).replace("DARK", &variables(&SERIES_ON_DARK));
    let sections = [
        accuracy(groups),
        left_out(groups),
        learning(groups),
        curvature_over_epochs(groups),
        final_curvature(groups, order),
        layers(groups),
        spectra(groups),
        landscapes(groups),
        settings(groups),
        list_of_runs(groups),
    ];
    format!(
        concat!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n",
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n",
            "<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n",
            "<h1>{title}</h1>\n<p class=\"faint\">{subject}</p>\n{sections}</body>\n</html>\n"
        ),
        title = escape(&title),
        style = style,
        subject = escape(&subject(groups)),
        sections = sections.into_iter().flatten().collect::<String>(),
    )
}

/// Model and data, if all runs have the same.
fn subject(groups: &[Group]) -> String {
    let first = groups.iter().flat_map(|group| &group.runs).next();
    let differ = differing(groups);
    let common = |key: &&str| !differ.iter().any(|other| other == key);
    let keys = ["model", "data", "epochs", "batch-size"].into_iter().filter(common);
    let part = |key: &str, value: String| match key {
        "epochs" => format!("{value} epochs"),
        "batch-size" => format!("batch size {value}"),
        _ => value,
    };
    let parts = keys.filter_map(|key| Some((key, first?.setting(key)))).filter(|(_, value)| !value.is_empty());
    parts.map(|(key, value)| part(key, value)).collect::<Vec<_>>().join(" · ")
}

fn section(title: &str, content: &str) -> String {
    format!("<section>\n<h2>{}</h2>\n{content}</section>\n", escape(title))
}

/// The tag of a cell with text instead of a number.
const TEXT: &str = "<td class=\"text\">";

/// A cell with text.
fn text_cell(text: &str) -> String {
    format!("{TEXT}{}</td>", escape(if text.is_empty() { "–" } else { text }))
}

/// A table; the cells are HTML.
fn table(head: &[String], rows: &[Vec<String>]) -> String {
    let column = |(index, cell): (usize, &String)| {
        // The heading over text is aligned like the text.
        let text = rows.first().and_then(|row| row.get(index)).is_some_and(|cell| cell.starts_with(TEXT));
        format!("<th scope=\"col\"{}>{cell}</th>", if text { " class=\"text\"" } else { "" })
    };
    let head: String = head.iter().enumerate().map(column).collect();
    let row = |row: &Vec<String>| {
        let mut cells = row.iter();
        let name = cells.next().map(|name| format!("<th scope=\"row\">{name}</th>")).unwrap_or_default();
        // A cell may bring its own tag with a class.
        let cells = cells.map(|cell| if cell.starts_with("<td") { cell.clone() } else { format!("<td>{cell}</td>") });
        format!("<tr>{name}{}</tr>\n", cells.collect::<String>())
    };
    let rows: String = rows.iter().map(row).collect();
    format!(
        "<div class=\"table\" tabindex=\"0\"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )
}

fn note(text: &str) -> String {
    format!("<p class=\"faint\">{}</p>\n", escape(text))
}

/// Mean ± deviation, with the digits that the deviation allows.
pub(super) fn plus_minus(statistics: &RunStatistics) -> String {
    let RunStatistics { mean, deviation, values } = statistics;
    if values.is_empty() {
        return "–".into();
    }
    if !mean.is_finite() {
        let wild = values.iter().filter(|value| !value.is_finite()).count();
        return if values.len() == 1 {
            "not finite".into()
        } else {
            format!("not finite in {wild} of {}", values.len())
        };
    }
    // A rounding residue of equal numbers is not a deviation.
    let deviation = deviation.map(|deviation| if deviation > 1e-9 * mean.abs() { deviation } else { 0.0 });
    match deviation {
        Some(deviation) if deviation > 0.0 && (1e-4..1e6).contains(&mean.abs()) => {
            // Two digits of the deviation, but no more than five of the mean.
            let place = |value: f64| (value.abs().log10() + 1e-9).floor();
            let decimals = (1.0 - place(deviation)).min(4.0 - place(*mean)).max(0.0) as usize;
            format!("{mean:.decimals$} ± {deviation:.decimals$}").replace('-', "−")
        }
        Some(deviation) => format!("{} ± {}", digits(*mean), significant(deviation, 2)),
        None => digits(*mean),
    }
}

fn percent(statistics: &RunStatistics) -> RunStatistics {
    RunStatistics::of(statistics.values.iter().map(|value| 100.0 * value).collect())
}

/// The cells of a column. The best one is marked if there are several.
fn with_best(statistics: &[RunStatistics], unit: &str, highest: bool) -> Vec<String> {
    let means: Vec<f64> = statistics.iter().map(|statistics| statistics.mean).collect();
    let best = chart::range(means.iter().copied()).map(|(low, high)| if highest { high } else { low });
    let finite = means.iter().filter(|mean| mean.is_finite()).count();
    let cell = |statistics: &RunStatistics| {
        let unit = if statistics.mean.is_finite() { unit } else { "" };
        let text = format!("{}{unit}", plus_minus(statistics));
        let class = if finite > 1 && Some(statistics.mean) == best { " class=\"best\"" } else { "" };
        format!("<td{class}>{text}</td>")
    };
    statistics.iter().map(cell).collect()
}

fn accuracy(groups: &[Group]) -> Option<String> {
    let column = |number: fn(&Group) -> RunStatistics| groups.iter().map(number).collect::<Vec<_>>();
    let accuracies: Vec<RunStatistics> = column(Group::test_accuracy).iter().map(percent).collect();
    if accuracies.iter().all(|statistics| statistics.values.is_empty()) {
        return Some(section("Accuracy", &note("No epoch has been finished yet.")));
    }
    let losses = with_best(&column(Group::test_loss), "", false);
    let cells = with_best(&accuracies, " %", true);
    let rows: Vec<Vec<String>> = groups
        .iter()
        .enumerate()
        .map(|(index, group)| {
            vec![
                key(index, group),
                cells[index].clone(),
                losses[index].clone(),
                group.runs.len().to_string(),
                epochs_done(group),
                plus_minus(&group.seconds()),
                plus_minus(&group.images_per_second()),
            ]
        })
        .collect();
    let head = ["Group", "Test accuracy", "Test loss", "Runs", "Epochs", "Training time (s)", "Images/s"];
    let mut content = table(&head.map(String::from), &rows);
    if groups.iter().any(|group| group.runs.len() > 1) {
        content += &note(
            "After the last epoch; mean ± standard deviation over the runs of a group, which differ in nothing but the seed.",
        );
    } else {
        content += &note("After the last epoch.");
    }
    for group in groups {
        let seeds: BTreeSet<String> = group.runs.iter().map(|run| run.setting("seed")).collect();
        let lasts: BTreeSet<u64> = group.runs.iter().filter_map(|run| Some(run.epochs().last()?.epoch)).collect();
        if seeds.len() < group.runs.len() {
            content += &note(&format!("{}: some runs have the same seed, so the deviation is too small.", group.name));
        }
        if lasts.len() > 1 {
            content += &note(&format!("{}: the runs ended after different epochs.", group.name));
        }
    }
    Some(section("Accuracy", &content))
}

/// The logged epochs, out of those requested.
fn epochs_done(group: &Group) -> String {
    let done: BTreeSet<u64> = group.runs.iter().map(|run| run.epochs().last().map_or(0, |last| last.epoch)).collect();
    let done = done.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    let planned = group.runs.first().map(|run| run.setting("epochs")).unwrap_or_default();
    if planned.is_empty() || planned == done { done } else { format!("{done} of {}", escape(&planned)) }
}

fn left_out(groups: &[Group]) -> Option<String> {
    let runs = groups.iter().flat_map(|group| &group.runs).filter(|run| run.unreadable > 0);
    let line = |run: &LoadedRun| {
        let (lines, was) = match run.unreadable {
            1 => ("1 line".into(), "was"),
            count => (format!("{count} lines"), "were"),
        };
        note(&format!("{}: {lines} could not be read and {was} skipped.", run.path.join("log.jsonl").display()))
    };
    let stale = |run: &LoadedRun| {
        let (files, path) = (run.stale.join(", "), run.path.display());
        note(&format!("{path}: left out because the weights of the run have changed: {files}."))
    };
    let others = groups.iter().flat_map(|group| &group.runs).filter(|run| !run.stale.is_empty());
    let notes: String = runs.map(line).chain(others.map(stale)).collect();
    (!notes.is_empty()).then_some(notes)
}

/// A group's name with a sample of its line.
fn key(index: usize, group: &Group) -> String {
    let mut drawing = Drawing::new(38.0, 12.0, "");
    Style(index).sample(&mut drawing, [1.0, 6.0], 36.0);
    let sample = drawing.svg(Medium::Page).replace("<svg ", "<svg aria-hidden=\"true\" class=\"sample\" ");
    let sample = sample.replace(" role=\"img\" aria-label=\"\"><title></title>", ">");
    format!("<span class=\"key\">{sample}{}</span>", escape(&group.name))
}

/// The legend of the groups; empty if there is only one.
fn legend(groups: &[Group]) -> String {
    if groups.len() < 2 {
        return String::new();
    }
    let item = |(index, group): (usize, &Group)| format!("<li>{}</li>", key(index, group));
    format!("<ul class=\"legend\">{}</ul>\n", groups.iter().enumerate().map(item).collect::<String>())
}

fn figure(caption: &str, drawing: &Drawing) -> String {
    format!("<figure><figcaption>{caption}</figcaption>{}</figure>\n", drawing.svg(Medium::Page))
}

fn charts(figures: &str) -> String {
    format!("<div class=\"charts\">\n{figures}</div>\n")
}

/// Means and ranges over runs of a number at some epochs.
fn line_over_epochs(style: usize, name: &str, runs: &[Vec<(u64, f64)>]) -> Line {
    let epochs: BTreeSet<u64> = runs.iter().flatten().map(|&(epoch, _)| epoch).collect();
    let (mut points, mut band) = (Vec::new(), Vec::new());
    for epoch in epochs {
        let at = |run: &Vec<(u64, f64)>| run.iter().find(|(other, _)| *other == epoch).map(|&(_, value)| value);
        let values: Vec<f64> = runs.iter().filter_map(at).collect();
        let (low, high) = chart::range(values.iter().copied()).unwrap_or((f64::NAN, f64::NAN));
        points.push([epoch as f64, RunStatistics::of(values).mean]);
        band.push([epoch as f64, low, high]);
    }
    if runs.len() < 2 {
        band.clear();
    }
    Line { name: name.into(), style: Style(style), points, band, markers: true }
}

/// A chart over epochs, if any run has a finite number.
fn chart_over_epochs(
    groups: &[Group],
    title: &str,
    unit: &str,
    of: impl Fn(&LoadedRun) -> Vec<(u64, f64)>,
) -> Option<String> {
    let line = |(index, group): (usize, &Group)| {
        let runs: Vec<_> = group.runs.iter().map(&of).collect();
        line_over_epochs(index, &group.name, &runs)
    };
    let lines: Vec<Line> = groups.iter().enumerate().map(line).collect();
    let (low, high) = chart::range(lines.iter().flat_map(|line| line.points.iter().map(|point| point[0])))?;
    let margin = if low == high { 0.6 } else { 0.02 * (high - low) };
    let x = ChartAxis { whole: true, ..ChartAxis::exact("epoch", low - margin, high + margin, false) };
    let drawing = line_chart(&format!("{title} over epochs"), x, unit, &lines)?;
    Some(figure(&format!("<b>{}</b>", escape(title)), &drawing))
}

fn learning(groups: &[Group]) -> Option<String> {
    let of = |number: fn(&Epoch) -> Option<f64>| {
        move |run: &LoadedRun| -> Vec<(u64, f64)> {
            run.epochs().iter().map(|epoch| (epoch.epoch, number(epoch).unwrap_or(f64::NAN))).collect()
        }
    };
    let mut figures = String::new();
    let mut add = |title, unit, number| figures.extend(chart_over_epochs(groups, title, unit, of(number)));
    add("Training loss", "cross-entropy (nats)", |epoch| epoch.train_loss);
    add("Test loss", "cross-entropy (nats)", |epoch| epoch.test_loss);
    add("Test accuracy", "accuracy (%)", |epoch| Some(100.0 * epoch.test_accuracy));
    let rates: BTreeSet<u64> = runs(groups).flat_map(LoadedRun::epochs).map(|epoch| epoch.lr.to_bits()).collect();
    if rates.len() > 1 {
        add("Learning rate of the epoch's last step", "learning rate", |epoch| Some(epoch.lr));
    }
    add("Gradient norm of the epoch's last step", "‖g‖", |epoch| epoch.gradient_norm);
    if figures.is_empty() {
        return None;
    }
    let mut content = legend(groups) + &charts(&figures);
    if groups.iter().any(|group| group.runs.len() > 1) {
        content += &note("Lines are means over the runs of a group, bands reach from the lowest run to the highest.");
    }
    Some(section("Learning curves", &content))
}

fn runs(groups: &[Group]) -> impl Iterator<Item = &LoadedRun> {
    groups.iter().flat_map(|group| &group.runs)
}

/// Measures in the order of the report, their names for readers, and their units on an axis.
const MEASURES: [(&str, &str, &str); 16] = [
    ("trace", "Trace of the Hessian", "Tr(H)"),
    ("hutch++", "Trace of the Hessian, by Hutch++", "Tr(H)"),
    ("grad-norm", "Norm of the gradient", "‖∇L‖"),
    ("normalized-trace", "Normalised trace", "Tr(H)/‖∇L‖"),
    ("top eigenvalue", "Largest eigenvalue", "λ1"),
    ("power eigenvalue", "Eigenvalue largest in magnitude", "λ"),
    ("λ1/λ5", "Largest eigenvalue over the fifth", "λ1/λ5"),
    ("vhv", "Curvature along the gradient", "vᵀHv"),
    ("vhv-difference", "Curvature along the gradient, by a difference", "vᵀHv"),
    ("sharpness", "Rise of the loss within ρ", "loss"),
    ("sharpness, one step", "Rise of the loss by one step of ρ", "loss"),
    ("m-sharpness", "Rise of the loss within ρ, by parts", "loss"),
    ("approximation-ratio", "Share of the rise that one step finds", "ratio"),
    ("gnr", "ρ max ‖∇L‖ within ρ", "loss"),
    ("minima", "Local minima along random lines", "number per line"),
    ("maxima", "Local maxima along random lines", "number per line"),
];

/// Name and unit of a measure. An unknown measure keeps its name in the log.
fn measure_name(name: &str) -> (&str, &str) {
    MEASURES.iter().find(|(measure, ..)| *measure == name).map_or((name, name), |&(_, title, unit)| (title, unit))
}

/// Each name once: the known ones in their order, then the others.
fn measure_names(all: impl Iterator<Item = String>) -> Vec<String> {
    let mut names: Vec<String> = all.collect::<BTreeSet<_>>().into_iter().collect();
    names.sort_by_key(|name| MEASURES.iter().position(|(measure, ..)| measure == name).unwrap_or(MEASURES.len()));
    names
}

fn curvature_over_epochs(groups: &[Group]) -> Option<String> {
    let measured = runs(groups).flat_map(LoadedRun::curvatures);
    let names = measure_names(measured.flat_map(|(_, measures)| numbers(measures)).map(|(name, _)| name));
    let value = |measures: &Measures, name: &str| {
        numbers(measures).into_iter().find(|(other, _)| other == name).map(|(_, value)| value)
    };
    let mut figures = String::new();
    for name in &names {
        let (title, unit) = measure_name(name);
        figures.extend(chart_over_epochs(groups, title, unit, |run| {
            run.curvatures().into_iter().filter_map(|(epoch, measures)| Some((epoch, value(measures, name)?))).collect()
        }));
    }
    (!figures.is_empty()).then(|| section("Curvature during training", &(legend(groups) + &charts(&figures))))
}

fn final_curvature(groups: &[Group], order: Option<&CurvatureOrder>) -> Option<String> {
    let found: Vec<_> = groups.iter().map(Group::curvature).collect();
    let names = measure_names(found.iter().flatten().map(|(name, _)| name.clone()));
    if names.is_empty() {
        return None;
    }
    // There can be many measures, so that they are rows and the groups are columns.
    let mut head = vec!["Measure".to_string()];
    head.extend(groups.iter().enumerate().map(|(index, group)| key(index, group)));
    let row = |name: &String| {
        let cell = |numbers: &Vec<(String, RunStatistics)>| {
            let statistics = numbers.iter().find(|(other, _)| other == name);
            statistics.map_or("–".into(), |(_, statistics)| plus_minus(statistics))
        };
        let mut row = vec![escape(measure_name(name).0)];
        row.extend(found.iter().map(cell));
        row
    };
    let rows: Vec<_> = names.iter().map(row).collect();
    let mut content = table(&head, &rows);
    if groups.iter().any(|group| group.runs.len() > 1) {
        content += &note("Mean ± standard deviation over the runs of a group.");
    }
    content += &measured_over(groups);
    if let Some(order) = order {
        content += &format!("<p>{}</p>\n", escape(&order.to_string()));
    }
    Some(section("Curvature at the end", &content))
}

/// Notes on the images that the curvature at the end was measured over: one if all groups have the same.
fn measured_over(groups: &[Group]) -> String {
    let over = |group: &Group| -> Option<(String, String)> {
        let each: BTreeSet<String> = group.runs.iter().filter_map(|run| Some(run.final_curvature()?.over)).collect();
        let over = each.into_iter().collect::<Vec<_>>().join("; ");
        (!over.is_empty()).then(|| (group.name.clone(), over))
    };
    let measured: Vec<_> = groups.iter().filter_map(over).collect();
    match measured.first() {
        Some((_, first)) if measured.iter().all(|(_, over)| over == first) => note(&format!("Measured {first}.")),
        _ => measured.iter().map(|(name, over)| note(&format!("{name}: measured {over}."))).collect(),
    }
}

/// The traces of layers, one row of points for each layer.
fn layers(groups: &[Group]) -> Option<String> {
    let found: Vec<_> = groups.iter().map(Group::layer_traces).collect();
    let mut names: Vec<&String> = Vec::new();
    for (name, _) in found.iter().flatten() {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let means = || found.iter().flatten().map(|(_, statistics)| statistics.mean);
    let x = ChartAxis::fitting("trace of the layer's block of the Hessian", means())?;
    let (row, width) = (16.0, 720.0);
    let height = 8.0 + row * names.len() as f64 + 42.0;
    let mut drawing = Drawing::new(width, height, "traces of the layers' blocks of the Hessian");
    let panel = Panel { left: 210.0, top: 8.0, right: width - 16.0, bottom: height - 42.0 };
    let y = |index: usize| panel.top + row * (index as f64 + 0.5);
    let rules = (0..names.len()).map(|index| vec![[panel.left, y(index)], [panel.right, y(index)]]).collect();
    drawing.shape(VectorPath { paths: rules, stroke: Some((Ink::Text(0.11), 1.0)), ..VectorPath::default() });
    for (index, name) in names.iter().enumerate() {
        drawing.label([panel.left - 8.0, y(index) + 0.35 * SMALL], name.as_str(), SMALL, Anchor::End, FAINT);
    }
    panel.x_ticks(&mut drawing, &x);
    for (index, (group, traces)) in groups.iter().zip(&found).enumerate() {
        for (name, statistics) in traces {
            let place = x.place(statistics.mean);
            let Some(layer) = names.iter().position(|other| *other == name).filter(|_| place.is_finite()) else {
                continue;
            };
            let paths = vec![Style(index).marker([panel.x(place), y(layer)], 3.6)];
            let tip = Some(format!("{}: {name} {}", group.name, plus_minus(statistics)));
            let fill = Some(Style(index).ink(0.85));
            drawing.shape(VectorPath { paths, closed: true, fill, tip, ..VectorPath::default() });
        }
    }
    let svg = drawing.svg(Medium::Page).replacen("<svg ", "<svg class=\"tall\" ", 1);
    let content = format!("{}<div class=\"table\" tabindex=\"0\">{svg}</div>\n", legend(groups));
    Some(section("Curvature by layer", &content))
}

fn spectra(groups: &[Group]) -> Option<String> {
    let mut densities = Vec::new();
    for (index, group) in groups.iter().enumerate() {
        let density = group.spectrum().and_then(|density| spectrum::usable(&density.nodes, &density.weights));
        densities.extend(density.map(|(density, _, _)| (group.name.as_str(), Style(index), density)));
    }
    let title = "density of the Hessian's eigenvalues";
    let drawing = spectrum::spectrum(title, &densities, (720.0, 320.0), 12.0)?;
    let svg = drawing.svg(Medium::Page).replacen("<svg ", "<svg class=\"wide\" ", 1);
    let text = "Of the first run of each group that has one; every peak smoothed to a hundredth of the range of all.";
    let content = format!("{}<div class=\"table\" tabindex=\"0\">{svg}</div>\n{}", legend(groups), note(text));
    Some(section("Spectrum of the Hessian", &content))
}

/// A landscape with its group's index and name, its run and its folder.
struct Place<'a> {
    style: usize,
    group: &'a Group,
    run: &'a LoadedRun,
    folder: &'a str,
    landscape: &'a LoadedLandscape,
}

impl Place<'_> {
    fn caption(&self) -> String {
        let Self { group, run, folder, landscape, .. } = self;
        let seed = if group.runs.len() > 1 { format!(", seed {}", run.setting("seed")) } else { String::new() };
        let remark = landscape.remark().map(|remark| format!(" ({remark})")).unwrap_or_default();
        let title = if landscape.title.is_empty() { folder } else { landscape.title.as_str() };
        format!("<b>{}</b> {}", escape(&format!("{}{seed}", group.name)), escape(&format!("{title}{remark}")))
    }
}

fn landscapes(groups: &[Group]) -> Option<String> {
    let mut places = Vec::new();
    for (style, group) in groups.iter().enumerate() {
        for run in &group.runs {
            let found = run.landscapes.iter();
            places.extend(found.map(|(folder, landscape)| Place { style, group, run, folder, landscape }));
        }
    }
    let (plane, line): (Vec<&Place>, Vec<&Place>) = places.iter().partition(|place| place.landscape.axes.len() == 2);
    let mut content = String::new();

    let planes: Vec<&LoadedLandscape> = plane.iter().map(|place| place.landscape).collect();
    if let Some(levels) = Levels::of(&planes) {
        let mut figures = String::new();
        for place in &plane {
            let title = format!("loss over two directions, {}", place.landscape.title);
            let drawing = landscape::contour_chart(place.landscape, &title, &levels, false);
            figures.extend(drawing.map(|drawing| figure(&place.caption(), &drawing)));
        }
        content += &charts(&figures);
        content += &landscape::colour_bar(&levels).svg(Medium::Page);
        content +=
            &note("The same colours mean the same loss in all pictures; lighter is higher. A cross marks the origin.");
    }

    // Landscapes of the same name belong together.
    let folders: BTreeSet<&str> = line.iter().map(|place| place.folder).collect();
    let mut figures = String::new();
    for folder in folders {
        let these: Vec<&&Place> = line.iter().filter(|place| place.folder == folder).collect();
        let axes = || these.iter().filter_map(|place| place.landscape.axes.first());
        let Some((low, high)) = chart::range(axes().flat_map(|axis| axis.values.iter().copied())) else { continue };
        let name = axes().next().map_or("", |axis| axis.name.as_str());
        let titles: BTreeSet<&str> = these.iter().map(|place| place.landscape.title.as_str()).collect();
        let title = titles.into_iter().collect::<Vec<_>>().join("; ");
        let mut add = |what: &str, unit: &str, values: &dyn Fn(&LoadedLandscape) -> Vec<f64>| {
            let draw = |place: &&&Place| {
                let values = values(place.landscape).into_iter();
                landscape::line(place.landscape, values, &place.group.name, Style(place.style))
            };
            let lines: Vec<Line> = these.iter().map(draw).collect();
            let drawing = line_chart(
                &format!("{what} along a line, {title}"),
                ChartAxis::exact(name, low, high, false),
                unit,
                &lines,
            );
            let caption = format!("<b>{what}</b> {}", escape(&title));
            figures.extend(drawing.map(|drawing| figure(&caption, &drawing)));
        };
        add("Loss", "loss", &|landscape| landscape::losses(landscape).collect());
        add("Accuracy", "accuracy (%)", &|landscape| landscape.accuracy.iter().map(|share| 100.0 * share).collect());
    }
    if !figures.is_empty() {
        content += &(legend(groups) + &charts(&figures));
        for place in &line {
            content.extend(
                place
                    .landscape
                    .remark()
                    .map(|remark| note(&format!("{}: {remark}", place.run.path.join(place.folder).display()))),
            );
        }
    }
    (!content.is_empty()).then(|| section("Loss landscapes", &content))
}

fn settings(groups: &[Group]) -> Option<String> {
    let differ = differing(groups);
    let mut content = String::new();
    if !differ.is_empty() || runs(groups).count() > 1 {
        let mut head = vec!["Setting".to_string()];
        head.extend(groups.iter().map(|group| escape(&group.name)));
        let value = |group: &Group, key: &str| group.runs.first().map(|run| run.setting(key)).unwrap_or_default();
        let mut rows: Vec<Vec<String>> = Vec::new();
        for key in &differ {
            let mut row = vec![escape(key)];
            row.extend(groups.iter().map(|group| text_cell(&value(group, key))));
            rows.push(row);
        }
        let seeds = |group: &Group| group.runs.iter().map(|run| run.setting("seed")).collect::<Vec<_>>().join(", ");
        let mut row = vec!["seed".to_string()];
        row.extend(groups.iter().map(|group| text_cell(&seeds(group))));
        rows.push(row);
        content += &table(&head, &rows);
    }
    let first = runs(groups).next()?;
    let single = runs(groups).count() == 1;
    let common = first.settings.keys().filter(|&key| !differ.contains(key) && (key != "seed" || single));
    let rows: Vec<Vec<String>> = common.map(|key| vec![escape(key), text_cell(&first.setting(key))]).collect();
    if !rows.is_empty() {
        let table = table(&["Setting".into(), "Value".into()], &rows);
        let summary = if single { "All settings" } else { "Settings in common" };
        content += &format!("<details><summary>{summary} ({})</summary>\n{table}</details>\n", rows.len());
    }
    Some(section("Settings", &content))
}

fn list_of_runs(groups: &[Group]) -> Option<String> {
    let mut rows = Vec::new();
    for group in groups {
        for run in &group.runs {
            let (steps, skipped) = run.steps();
            let seconds = run.epochs().last().map_or("–".into(), |last| digits(last.seconds));
            rows.push(vec![
                format!("<code>{}</code>", escape(&run.path.display().to_string())),
                text_cell(&group.name),
                escape(&run.setting("seed")),
                steps.to_string(),
                skipped.to_string(),
                seconds,
                run.images_per_second().map_or("–".into(), digits),
            ]);
        }
    }
    let head = ["Run", "Group", "Seed", "Steps", "Skipped", "Training time (s)", "Images/s"].map(String::from);
    Some(section("Runs", &table(&head, &rows)))
}
