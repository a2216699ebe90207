//! The page: sections of tables and charts, in one file without references to others.

use std::collections::{BTreeSet, HashMap};

use super::chart::{self, ChartAxis, FAINT, Line, Panel, SMALL, Style, line_chart};
use super::drawing::{Anchor, Drawing, Ink, Medium, SERIES, SERIES_ON_DARK, VectorPath, escape, hex};
use super::landscape::{self, Levels, LoadedLandscape};
use super::picture::ColourMap;
use super::runs::{Epoch, Group, LoadedRun, Outcome, are_comparable, differing, has_repeated_seeds, numbers};
use super::statistics::{MeasuredStatistics, RunStatistics, best, means};
use super::text::{counted, digits, plain, shortened};
use super::{CurvatureOrder, SkippedPath, curves, grid, spectrum};

/// The line by which a page is known as one of polder's.
pub(super) const GENERATOR: &str = "<meta name=\"generator\" content=\"polder\">";

/// The names of more groups than this are no title.
const MOST_NAMES: usize = 8;

/// The whole page.
pub(super) fn page(groups: &[Group], order: Option<&CurvatureOrder>, skipped: &[SkippedPath]) -> String {
    let runs: usize = groups.iter().map(|group| group.runs.len()).sum();
    let names: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
    let title = match runs {
        1 => format!("Run {}", names.join("")),
        _ if names.len() > MOST_NAMES => format!("{runs} runs in {} groups", names.len()),
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
        grid::accuracy_over_settings(groups),
        left_out(groups, skipped),
        curves::learning(groups),
        curves::steps(groups),
        curves::curvature_over_epochs(groups),
        final_curvature(groups, order),
        layers(groups),
        extrema(groups),
        spectra(groups),
        landscapes(groups),
        settings(groups),
        list_of_runs(groups),
    ];
    let sections: String = sections.into_iter().flatten().collect();
    format!(
        concat!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n",
            "{generator}\n",
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n",
            "<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n",
            "<h1>{title}</h1>\n<p class=\"faint\">{subject}</p>\n{contents}<main>\n{sections}</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
        ),
        generator = GENERATOR,
        title = escape(&title),
        style = style,
        script = include_str!("page.js"),
        subject = escape(&subject(groups)),
        contents = contents(&sections),
        sections = sections,
    )
}

/// Model and data, if all runs have the same.
fn subject(groups: &[Group]) -> String {
    let first = groups.iter().flat_map(|group| &group.runs).next();
    let differ = differing(groups);
    let common = |key: &&str| !differ.iter().any(|other| other == key);
    let keys = ["model", "data", "epochs", "batch-size"].into_iter().filter(common);
    let part = |key: &str, value: String| match key {
        "epochs" if value == "1" => "1 epoch".into(),
        "epochs" => format!("{value} epochs"),
        "batch-size" => format!("batch size {value}"),
        _ => value,
    };
    let parts = keys.filter_map(|key| Some((key, first?.setting(key)))).filter(|(_, value)| !value.is_empty());
    let version = format!("reported by polder {}", env!("CARGO_PKG_VERSION"));
    let parts = parts.map(|(key, value)| part(key, value)).chain([version]);
    parts.collect::<Vec<_>>().join(" · ")
}

/// The id of a section.
fn slug(title: &str) -> String {
    title.to_lowercase().replace(' ', "-")
}

/// The list of contents, of the sections that there are.
fn contents(sections: &str) -> String {
    let titles = sections.split("<h2>").skip(1).filter_map(|part| part.split("</h2>").next());
    let item = |title: &str| format!("<li><a href=\"#{}\">{title}</a></li>", slug(title));
    format!("<nav aria-label=\"Contents\"><ul>{}</ul></nav>\n", titles.map(item).collect::<String>())
}

pub(super) fn section(title: &str, content: &str) -> String {
    let id = slug(title);
    format!("<section id=\"{id}\">\n<h2>{}</h2>\n{content}</section>\n", escape(title))
}

/// The tag of a cell with text instead of a number.
const TEXT: &str = "<td class=\"text\">";

/// A cell with text.
fn text_cell(text: &str) -> String {
    format!("{TEXT}{}</td>", escape(if text.is_empty() { "–" } else { text }))
}

/// A box that scrolls sideways where its contents are wider than the page.
pub(super) fn scroll_box(name: &str, content: &str) -> String {
    let name = escape(name);
    format!("<div class=\"table\" tabindex=\"0\" role=\"region\" aria-label=\"{name}\">{content}</div>\n")
}

/// More groups than this are the rows of a table. Fewer are its columns, with as many rows as there are quantities.
const MOST_COLUMNS: usize = 5;

/// A table of quantities by groups: the names of the quantities, the heads of the groups, and the cells of each
/// quantity.
fn table_by_group(caption: &str, corner: [&str; 2], groups: Vec<String>, rows: Vec<(String, Vec<String>)>) -> String {
    if groups.len() <= MOST_COLUMNS {
        let head: Vec<String> = std::iter::once(corner[0].to_string()).chain(groups).collect();
        let rows: Vec<Vec<String>> =
            rows.into_iter().map(|(name, cells)| std::iter::once(name).chain(cells).collect()).collect();
        return table(caption, &head, &rows);
    }
    let head: Vec<String> =
        std::iter::once(corner[1].to_string()).chain(rows.iter().map(|(name, _)| name.clone())).collect();
    let row = |(index, group): (usize, String)| {
        let cells = rows.iter().filter_map(|(_, cells)| cells.get(index).cloned());
        std::iter::once(group).chain(cells).collect()
    };
    let rows: Vec<Vec<String>> = groups.into_iter().enumerate().map(row).collect();
    table(caption, &head, &rows)
}

/// A table; the cells are HTML.
fn table(caption: &str, head: &[String], rows: &[Vec<String>]) -> String {
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
    let text = escape(caption);
    let table = format!(
        "<table>\n<caption>{text}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>"
    );
    scroll_box(caption, &table)
}

pub(super) fn note(text: &str) -> String {
    format!("<p class=\"faint\">{}</p>\n", escape(text))
}

/// The cells of a column. The best one is marked if it is better than the others by more than the error.
fn with_best(statistics: &[RunStatistics], unit: &str, highest: Option<bool>) -> Vec<String> {
    let best = highest.and_then(|highest| best(&means(statistics), highest));
    let cell = |(index, statistics): (usize, &RunStatistics)| {
        let unit = if statistics.mean.is_finite() { unit } else { "" };
        let class = if best == Some(index) { " class=\"best\"" } else { "" };
        format!("<td{class}>{statistics}{unit}</td>")
    };
    statistics.iter().enumerate().map(cell).collect()
}

fn accuracy(groups: &[Group]) -> Option<String> {
    let column = |number: fn(&Group) -> RunStatistics| groups.iter().map(number).collect::<Vec<_>>();
    let accuracies: Vec<RunStatistics> = column(Group::test_accuracy).iter().map(RunStatistics::percent).collect();
    if accuracies.iter().all(|statistics| statistics.values.is_empty()) {
        return Some(section("Accuracy", &note("No epoch has been finished yet.")));
    }
    let (comparable, repeated) = (are_comparable(groups), groups.iter().any(has_repeated_seeds));
    let finished = groups.iter().all(Group::is_finished);
    let judged = comparable && !repeated && finished;
    let losses = with_best(&column(Group::test_loss), "", judged.then_some(false));
    let cells = with_best(&accuracies, " %", judged.then_some(true));
    let swa: Vec<RunStatistics> = column(Group::swa_test_accuracy).iter().map(RunStatistics::percent).collect();
    let has_swa = swa.iter().any(|statistics| !statistics.values.is_empty());
    let swa = with_best(&swa, " %", judged.then_some(true));
    let rows: Vec<Vec<String>> = groups
        .iter()
        .enumerate()
        .map(|(index, group)| {
            let swa = has_swa.then(|| swa[index].clone());
            let first = [key(index, group), cells[index].clone()].into_iter().chain(swa);
            let rest = [
                losses[index].clone(),
                runs_that_count(group),
                epochs_done(group),
                group.seconds().to_string(),
                group.images_per_second().to_string(),
            ];
            first.chain(rest).collect()
        })
        .collect();
    let swa = if has_swa { &["SWA test accuracy"][..] } else { &[] };
    let rest = ["Test loss", "Runs", "Epochs", "Training time (s)", "Images/s"];
    let head: Vec<String> =
        ["Group", "Test accuracy"].iter().chain(swa).chain(&rest).map(|name| name.to_string()).collect();
    let mut content = table("Test accuracy and loss of the groups", &head, &rows);
    let several = groups.iter().any(|group| group.runs.len() > 1);
    let mut text = "After the last finished epoch".to_string();
    if several {
        text += "; mean ± half of its 95 % interval (Student's t) over the runs of a group, which differ in nothing but the seed";
    }
    text += match (groups.len() > 1, several) {
        (false, _) => ".",
        _ if !comparable => ". The groups have different test images, so none is called the best.",
        _ if !finished => ". No group is called the best, because a group has no finished run.",
        _ if repeated => ". No group is called the best, because some runs of a group have the same seed.",
        (true, true) => {
            ". A group is called the best if it leads every other one by more than twice the error of the difference."
        }
        (true, false) => ". No group is called the best, because single runs have no error over seeds.",
    };
    content += &note(&text);
    for group in groups {
        let lasts: BTreeSet<u64> = group.that_count().filter_map(|run| Some(run.last_epoch()?.epoch)).collect();
        let open = group.runs.iter().map(|run| (run, run.outcome())).filter(|(_, how)| *how != Outcome::Finished);
        for (run, how) in open {
            let left_out =
                if group.that_count().any(|other| other.path == run.path) { "" } else { "; not in the mean" };
            content += &note(&format!("{}: {how}{left_out}.", run.path.display()));
        }
        if has_repeated_seeds(group) {
            content += &note(&format!("{}: some runs have the same seed, so the interval is too small.", group.name));
        }
        if lasts.len() > 1 {
            content += &note(&format!("{}: the runs ended after different epochs.", group.name));
        }
    }
    Some(section("Accuracy", &content))
}

/// How many runs the numbers of a group are of, out of all.
fn runs_that_count(group: &Group) -> String {
    let (count, all) = (group.that_count().count(), group.runs.len());
    if count == all { all.to_string() } else { format!("{count} of {all}") }
}

/// The logged epochs, out of those requested.
fn epochs_done(group: &Group) -> String {
    let done: BTreeSet<u64> = group.that_count().map(|run| run.last_epoch().map_or(0, |last| last.epoch)).collect();
    let done = done.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    let planned = group.runs.first().map(|run| run.setting("epochs")).unwrap_or_default();
    if planned.is_empty() || planned == done { done } else { format!("{done} of {}", escape(&planned)) }
}

fn left_out(groups: &[Group], skipped: &[SkippedPath]) -> Option<String> {
    let runs = groups.iter().flat_map(|group| &group.runs).filter(|run| run.unreadable > 0);
    let line = |run: &LoadedRun| {
        let (lines, was) = (counted(run.unreadable, "line"), if run.unreadable == 1 { "was" } else { "were" });
        note(&format!("{}: {lines} could not be read and {was} skipped.", run.path.join("log.jsonl").display()))
    };
    let stale = |run: &LoadedRun| {
        let (files, path) = (run.stale.join(", "), run.path.display());
        note(&format!("{path}: left out because the weights of the run have changed: {files}."))
    };
    let others = groups.iter().flat_map(|group| &group.runs).filter(|run| !run.stale.is_empty());
    let skipped = skipped.iter().map(|skipped| note(&format!("Left out: {}", skipped.reason)));
    let notes: String = runs.map(line).chain(others.map(stale)).chain(skipped).collect();
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
pub(super) fn legend(groups: &[Group]) -> String {
    if groups.len() < 2 {
        return String::new();
    }
    let item = |(index, group): (usize, &Group)| format!("<li data-series=\"{index}\">{}</li>", key(index, group));
    format!("<ul class=\"legend\">{}</ul>\n", groups.iter().enumerate().map(item).collect::<String>())
}

/// A drawing with its caption, and the data of a chart for the page's script.
pub(super) fn figure(caption: &str, drawing: &Drawing, data: Option<&str>) -> String {
    let data = data.map(|data| format!(" data-chart=\"{}\"", escape(data))).unwrap_or_default();
    format!("<figure{data}><figcaption>{caption}</figcaption>{}</figure>\n", drawing.svg(Medium::Page))
}

pub(super) fn charts(figures: &str) -> String {
    format!("<div class=\"charts\">\n{figures}</div>\n")
}

pub(super) fn runs(groups: &[Group]) -> impl Iterator<Item = &LoadedRun> {
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
pub(super) fn measure_name(name: &str) -> (&str, &str) {
    MEASURES.iter().find(|(measure, ..)| *measure == name).map_or((name, name), |&(_, title, unit)| (title, unit))
}

/// Each name once: the known ones in their order, then the others.
pub(super) fn measure_names(all: impl Iterator<Item = String>) -> Vec<String> {
    let mut names: Vec<String> = all.collect::<BTreeSet<_>>().into_iter().collect();
    names.sort_by_key(|name| MEASURES.iter().position(|(measure, ..)| measure == name).unwrap_or(MEASURES.len()));
    names
}

fn final_curvature(groups: &[Group], order: Option<&CurvatureOrder>) -> Option<String> {
    let found: Vec<_> = groups.iter().map(Group::curvature).collect();
    let names = measure_names(found.iter().flatten().map(|(name, _)| name.clone()));
    if names.is_empty() {
        return None;
    }
    let row = |name: &String| {
        let cell = |numbers: &Vec<(String, MeasuredStatistics)>| {
            let statistics = numbers.iter().find(|(other, _)| other == name);
            statistics.map_or("–".into(), |(_, statistics)| statistics.to_string())
        };
        (escape(measure_name(name).0), found.iter().map(cell).collect())
    };
    let rows: Vec<_> = names.iter().map(row).collect();
    let heads = groups.iter().enumerate().map(|(index, group)| key(index, group)).collect();
    let mut content = table_by_group("Measures of curvature", ["Measure", "Group"], heads, rows);
    let all = || found.iter().flatten().map(|(_, statistics)| statistics);
    if all().any(|of| of.measurement_error.is_some()) {
        content += &note(
            "± is the error of a measurement: the standard error of a mean over random probes, the residual of an eigenvalue.",
        );
    }
    if all().any(|of| of.runs.interval.is_some()) {
        content += &note("seeds ± is half of the mean's 95 % interval over the runs of a group.");
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
    let mut names: Vec<&str> = found.iter().flatten().map(|(name, _)| name.as_str()).collect();
    names.sort_by_cached_key(|name| network_order(name));
    names.dedup();
    let rows: HashMap<&str, usize> = names.iter().enumerate().map(|(row, &name)| (name, row)).collect();
    let x = layers_axis(found.iter().flatten().map(|(_, statistics)| statistics))?;
    // The error bars of many groups need room within a row.
    let (row, width) = ((6.0 + 3.5 * groups.len() as f64).max(16.0), 720.0);
    let height = 8.0 + row * names.len() as f64 + 42.0;
    let mut drawing = Drawing::new(width, height, "traces of the layers' blocks of the Hessian");
    let panel = Panel { left: 210.0, top: 8.0, right: width - 16.0, bottom: height - 42.0 };
    let y = |index: usize| panel.top + row * (index as f64 + 0.5);
    let rules = (0..names.len()).map(|index| vec![[panel.left, y(index)], [panel.right, y(index)]]).collect();
    drawing.shape(VectorPath { paths: rules, stroke: Some((Ink::Text(0.11), 1.0)), ..VectorPath::default() });
    for (index, name) in names.iter().enumerate() {
        let at = [panel.left - 8.0, y(index) + 0.35 * SMALL];
        drawing.label(at, shortened(name, 30), SMALL, Anchor::End, FAINT);
    }
    if !x.logarithmic && x.low < 0.0 {
        let zero = panel.x(x.place(0.0));
        drawing.line(vec![[zero, panel.top], [zero, panel.bottom]], Ink::Text(0.45), 1.0);
    }
    panel.x_ticks(&mut drawing, &x);
    for (index, (group, traces)) in groups.iter().zip(&found).enumerate() {
        // The groups lie beside each other within a row, so that their error bars show.
        let shift = row * 0.7 * ((index as f64 + 0.5) / groups.len() as f64 - 0.5);
        for (name, statistics) in traces {
            let mean = statistics.mean();
            let (place, Some(layer)) = (x.place(mean.mean), rows.get(name.as_str())) else { continue };
            if !place.is_finite() {
                continue;
            }
            let (at, error) = (y(*layer) + shift, mean.error.unwrap_or(0.0));
            let ends = [-error, error].map(|error| x.place(mean.mean + error));
            // A bar that reaches to zero or below has no end on a logarithmic axis.
            let ends = ends.map(|end| panel.x(if end.is_finite() { end.clamp(0.0, 1.0) } else { 0.0 }));
            if error > 0.0 {
                drawing.line(ends.map(|end| [end, at]).to_vec(), Style(index).ink(0.85), 1.5);
            }
            let paths = vec![Style(index).marker([panel.x(place), at], 3.2)];
            let tip = Some(format!("{}: {name} {statistics}", group.name));
            let fill = Some(Style(index).ink(0.85));
            drawing.shape(VectorPath { paths, closed: true, fill, tip, ..VectorPath::default() });
        }
    }
    let svg = drawing.svg(Medium::Page).replacen("<svg ", "<svg class=\"tall\" ", 1);
    let text = "Bars are one error to each side, of the measurement and over seeds together.";
    let content = legend(groups) + &scroll_box("Traces of layers", &svg) + &note(text);
    Some(section("Curvature by layer", &content))
}

/// The place of a tensor in the network, as far as torchvision's names tell: what comes before the numbered blocks, the
/// blocks, and the classifier; within a block `conv1`, `bn1`, `conv2` and so on.
fn network_order(name: &str) -> (u8, Vec<(u64, u8)>, String) {
    let part = match name {
        _ if name.starts_with("layer") || name.starts_with("features") => 1,
        _ if name.starts_with("fc") || name.starts_with("classifier") => 2,
        _ => 0,
    };
    let component = |component: &str| {
        let word = component.trim_end_matches(|c: char| c.is_ascii_digit());
        let number = component[word.len()..].parse().unwrap_or(u64::MAX);
        let rank = match word {
            "conv" | "weight" => 0,
            "bn" | "bias" => 1,
            _ => 2,
        };
        (number, rank)
    };
    (part, name.split('.').map(component).collect(), name.into())
}

/// The axis of the traces of layers, with room for their errors.
fn layers_axis<'a>(traces: impl Iterator<Item = &'a MeasuredStatistics> + Clone) -> Option<ChartAxis> {
    let label = "trace of the layer's block of the Hessian";
    let axis = ChartAxis::fitting(label, traces.clone().map(|of| of.runs.mean))?;
    let sides: &[f64] = if axis.logarithmic { &[0.0, 1.0] } else { &[-1.0, 1.0] };
    let ends = traces
        .map(MeasuredStatistics::mean)
        .flat_map(|of| sides.iter().map(move |side| of.mean + side * of.error.unwrap_or(0.0)));
    ChartAxis::fitting(label, ends)
}

/// How many random lines have how many local minima and maxima of the loss.
fn extrema(groups: &[Group]) -> Option<String> {
    let mut rows = Vec::new();
    for group in groups {
        for (name, lines) in ["minima", "maxima"].into_iter().zip(group.extrema()) {
            if !lines.is_empty() {
                rows.push((format!("{}: {name}", group.name), lines));
            }
        }
    }
    // A file may hold any numbers; lines of ten steps have at most nine inner points.
    let most = rows.iter().map(|(_, lines)| lines.len()).max()?.min(32);
    let head: Vec<String> = std::iter::once(String::new()).chain((0..most).map(|count| count.to_string())).collect();
    let row = |(name, lines): &(String, Vec<usize>)| {
        let of = |count: usize| lines.get(count).map_or_else(|| "0".into(), usize::to_string);
        std::iter::once(escape(name)).chain((0..most).map(of)).collect()
    };
    let rows: Vec<Vec<String>> = rows.iter().map(row).collect();
    let caption = "Random lines by their number of local minima and maxima of the loss";
    Some(section("Extrema along random lines", &table(caption, &head, &rows)))
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
    let content = legend(groups) + &scroll_box("Spectra", &svg) + &note(text);
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
    if let Some(levels) = Levels::of(&planes, Levels::MOST, ColourMap::BlueYellow) {
        let mut figures = String::new();
        for place in &plane {
            let title = format!("loss over two directions, {}", place.landscape.title);
            let drawing = landscape::contour_chart(place.landscape, &title, &levels);
            figures.extend(drawing.map(|drawing| figure(&place.caption(), &drawing, None)));
        }
        content += &charts(&figures);
        let bar = landscape::colour_bar(&levels).svg(Medium::Page);
        content += &bar.replacen("<svg ", "<svg class=\"bar\" ", 1);
        content += &note(
            "The same colours mean the same loss in all pictures; lighter is higher. A cross marks the origin, a ring the lowest point.",
        );
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
            figures.extend(drawing.map(|(drawing, data)| figure(&caption, &drawing, Some(&data))));
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
        let value = |group: &Group, key: &str| group.runs.first().map(|run| run.setting(key)).unwrap_or_default();
        let row = |key: &String| {
            (escape(&plain(key)), groups.iter().map(|group| text_cell(&value(group, key))).collect::<Vec<_>>())
        };
        let mut rows: Vec<_> = differ.iter().map(row).collect();
        let seeds = |group: &Group| group.runs.iter().map(|run| run.setting("seed")).collect::<Vec<_>>().join(", ");
        rows.push(("seed".into(), groups.iter().map(|group| text_cell(&seeds(group))).collect()));
        let heads = groups.iter().map(|group| escape(&group.name)).collect();
        content += &table_by_group("Settings that differ", ["Setting", "Group"], heads, rows);
    }
    let first = runs(groups).next()?;
    let single = runs(groups).count() == 1;
    let common = first.settings.keys().filter(|&key| !differ.contains(key) && (key != "seed" || single));
    let rows: Vec<Vec<String>> = common.map(|key| vec![escape(&plain(key)), text_cell(&first.setting(key))]).collect();
    if !rows.is_empty() {
        let summary = if single { "All settings" } else { "Settings in common" };
        let table = table(summary, &["Setting".into(), "Value".into()], &rows);
        content += &format!("<details><summary>{summary} ({})</summary>\n{table}</details>\n", rows.len());
    }
    Some(section("Settings", &content))
}

fn list_of_runs(groups: &[Group]) -> Option<String> {
    let mut rows = Vec::new();
    for group in groups {
        for run in &group.runs {
            let (steps, skipped) = run.steps();
            let (last, best) = (run.last_epoch(), run.best_epoch());
            let of = |epoch: Option<&Epoch>, text: fn(&Epoch) -> String| epoch.map_or("–".into(), text);
            let loss = |epoch: &Epoch| epoch.test_loss.map_or("not finite".into(), digits);
            let accuracy = |epoch: &Epoch| format!("{:.2} %", 100.0 * epoch.test_accuracy);
            let step_time = last.filter(|_| steps > 0).map_or("–".into(), |last| digits(last.seconds / steps as f64));
            rows.push(vec![
                format!("<code>{}</code>", escape(&run.path.display().to_string())),
                text_cell(&group.name),
                escape(&run.setting("seed")),
                text_cell(&run.outcome().to_string()),
                steps.to_string(),
                skipped.to_string(),
                of(last, accuracy),
                of(last, loss),
                of(best, |epoch| format!("{:.2} % after epoch {}", 100.0 * epoch.test_accuracy, epoch.epoch)),
                of(last, |epoch| digits(epoch.seconds)),
                step_time,
                run.images_per_second().map_or("–".into(), digits),
                text_cell(&run.device),
                text_cell(&run.date),
            ]);
        }
    }
    let head = [
        "Run",
        "Group",
        "Seed",
        "State",
        "Steps",
        "Skipped",
        "Test accuracy",
        "Test loss",
        "Best test accuracy",
        "Training time (s)",
        "Seconds a step",
        "Images/s",
        "Device",
        "Last line (UTC)",
    ];
    let content = table("Runs", &head.map(String::from), &rows) + &numbers_as_csv(groups);
    Some(section("Runs", &content))
}

/// The most lines of the table of epochs in the page.
const MOST_CSV_LINES: usize = 20_000;

/// Links to the numbers of all epochs and of the curvature at the end, as CSV within the page.
fn numbers_as_csv(groups: &[Group]) -> String {
    let cell = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let number = |value: Option<f64>| value.filter(|value| value.is_finite()).map_or(String::new(), |v| v.to_string());
    let mut epochs =
        "run,group,seed,epoch,train_loss,test_loss,test_accuracy,lr,gradient_norm,images_per_second,seconds\n"
            .to_string();
    let mut curvature = "run,group,seed,measure,value,error\n".to_string();
    for group in groups {
        for run in &group.runs {
            let (path, seed) = (run.path.display().to_string(), run.setting("seed"));
            let run_cells = format!("{},{},{}", cell(&path), cell(&group.name), cell(&seed));
            for epoch in run.finished_epochs() {
                let &Epoch { test_accuracy, lr, images_per_second, seconds, .. } = epoch;
                let losses = [epoch.train_loss, epoch.test_loss, Some(test_accuracy), Some(lr), epoch.gradient_norm];
                let numbers = losses.into_iter().chain([Some(images_per_second), Some(seconds)]).map(number);
                epochs += &format!("{run_cells},{},{}\n", epoch.epoch, numbers.collect::<Vec<_>>().join(","));
            }
            for (name, found) in run.final_curvature().iter().flat_map(|found| numbers(&found.measures)) {
                let (value, error) = (number(Some(found.value)), number(found.error));
                curvature += &format!("{run_cells},{},{value},{error}\n", cell(&name));
            }
        }
    }
    let lines = epochs.lines().count();
    let mut links = Vec::new();
    for (name, text, fits) in [("epochs", epochs, lines <= MOST_CSV_LINES), ("curvature", curvature, true)] {
        if text.lines().count() > 1 && fits {
            let data = percent_encoded(&text);
            links
                .push(format!("<a download=\"{name}.csv\" href=\"data:text/csv;charset=utf-8,{data}\">{name}.csv</a>"));
        }
    }
    let mut content =
        if links.is_empty() { String::new() } else { format!("<p>The numbers: {}</p>\n", links.join(", ")) };
    if lines > MOST_CSV_LINES {
        content += &note("The epochs are too many for a table in the page; log.jsonl in the folder of a run has them.");
    }
    content
}

/// Text for a link, where letters, digits and a few signs stand for themselves.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(2 * text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b',' | b'/' => {
                encoded.push(char::from(byte))
            }
            _ => encoded += &format!("%{byte:02X}"),
        }
    }
    encoded
}
