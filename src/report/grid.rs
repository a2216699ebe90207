//! Accuracy over the settings in which runs differ: over one number as a line, over two as a heat map.

use std::collections::BTreeMap;

use super::chart::{self, ChartAxis, Line, Style, line_chart};
use super::drawing::{escape, hex};
use super::page::{charts, figure, note, scroll_box, section};
use super::picture::ColourMap;
use super::runs::{Group, differing, written};
use super::statistics::RunStatistics;
use super::text::plain;

/// Groups that agree in all settings but one or two, with their values of these and their accuracy in percent.
type Cells = Vec<(Vec<f64>, RunStatistics)>;

/// A section with a chart for each set of groups that differ in the same one or two numbers. These are the settings
/// with the most values: one with three or more, or two with two or more.
pub(super) fn accuracy_over_settings(groups: &[Group]) -> Option<String> {
    let keys = differing(groups);
    let value = |group: &Group, key: &str| {
        let found = group.runs.first()?.settings.get(key)?;
        found.as_float().or(found.as_integer().map(|whole| whole as f64)).filter(|value| value.is_finite())
    };
    let count = |key: &String| different(groups.iter().filter_map(|group| value(group, key))).len();
    let mut numbers: Vec<(usize, &String)> = keys.iter().map(|key| (count(key), key)).collect();
    numbers.retain(|(count, _)| *count >= 2);
    numbers.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
    let axes: Vec<&str> = match numbers[..] {
        [(_, first), (_, second), ..] => vec![first, second],
        [(3.., only)] => vec![only],
        _ => return None,
    };
    let mut sets = BTreeMap::<String, Cells>::new();
    for group in groups {
        let Some(place) = axes.iter().map(|key| value(group, key)).collect::<Option<Vec<f64>>>() else { continue };
        let accuracy = group.test_accuracy().percent();
        if !accuracy.mean.is_finite() {
            continue;
        }
        let others = keys.iter().filter(|key| !axes.contains(&key.as_str()));
        let part = |key: &String| {
            let found = group.runs.first()?.settings.get(key.as_str())?;
            let text = written(found);
            Some(if key == "optimizer" { text } else { format!("{} {text}", plain(key)) })
        };
        sets.entry(others.filter_map(part).collect::<Vec<_>>().join(", ")).or_default().push((place, accuracy));
    }
    let content = if axes.len() == 1 { lines(axes[0], sets) } else { maps(&axes, sets) };
    (!content.is_empty()).then(|| section("Accuracy over settings", &content))
}

/// The different values, in their order.
fn different(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.dedup();
    values
}

fn title(set: &str, axes: &str) -> String {
    let of = if set.is_empty() { String::new() } else { format!("{set}: ") };
    format!("{of}test accuracy over {axes}")
}

/// A chart for each set with at least three groups.
fn lines(key: &str, sets: BTreeMap<String, Cells>) -> String {
    let mut figures = String::new();
    for (set, mut cells) in sets.into_iter().filter(|(_, cells)| cells.len() >= 3) {
        cells.sort_by(|(a, _), (b, _)| a[0].total_cmp(&b[0]));
        let band = cells.iter().filter_map(|(place, of)| {
            let half = of.interval?;
            Some([place[0], of.mean - half, of.mean + half])
        });
        let line = Line {
            name: set.clone(),
            style: Style(0),
            points: cells.iter().map(|(place, of)| [place[0], of.mean]).collect(),
            band: band.collect(),
            raw: Vec::new(),
            window: None,
            markers: true,
        };
        let title = title(&set, key);
        let chart = ChartAxis::fitting(key, cells.iter().map(|(place, _)| place[0]))
            .and_then(|x| line_chart(&title, x, "accuracy (%)", &[line]));
        figures.extend(chart.map(|(drawing, _)| figure(&format!("<b>{}</b>", escape(&title)), &drawing, None)));
    }
    if figures.is_empty() {
        return figures;
    }
    charts(&figures)
        + &note("After the last finished epoch. Bands are the 95 % interval of the mean over the runs of a group.")
}

/// A heat map for each set that fills at least two rows and two columns. All have the same colours.
fn maps(axes: &[&str], sets: BTreeMap<String, Cells>) -> String {
    let means = sets.values().flatten().map(|(_, of)| of.mean);
    let Some((low, high)) = chart::range(means) else { return String::new() };
    let several = sets.values().flatten().any(|(_, of)| of.values.len() > 1);
    let values = |cells: &Cells, axis: usize| different(cells.iter().map(|(place, _)| place[axis]));
    let mut content = String::new();
    for (set, cells) in &sets {
        let (rows, columns) = (values(cells, 0), values(cells, 1));
        if rows.len() < 2 || columns.len() < 2 {
            continue;
        }
        let head: String = columns.iter().map(|value| format!("<th scope=\"col\">{value}</th>")).collect();
        let row = |row: &f64| {
            let cell = |column: &f64| match cells.iter().find(|(place, _)| place == &[*row, *column]) {
                None => "<td class=\"text\">–</td>".into(),
                Some((_, of)) => {
                    let share = if high > low { (of.mean - low) / (high - low) } else { 0.5 };
                    let colour = ColourMap::BlueYellow.at(share);
                    let count = of.values.len();
                    let runs = if several { format!(" ({count})") } else { String::new() };
                    format!(
                        "<td style=\"padding:0.4em 0.8em;background:{};color:{}\">{of}{runs}</td>",
                        hex(colour),
                        readable_on(colour)
                    )
                }
            };
            let cells: String = columns.iter().map(cell).collect();
            format!("<tr><th scope=\"row\">{row}</th>{cells}</tr>\n")
        };
        let body: String = rows.iter().map(row).collect();
        let caption = format!("{} (%)", title(set, &format!("{} and {}", axes[0], axes[1])));
        let corner = escape(&format!("{} \\ {}", axes[0], axes[1]));
        let table = format!(
            "<table>\n<caption>{}</caption>\n<thead><tr><th scope=\"col\">{corner}</th>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>",
            escape(&caption)
        );
        content += &scroll_box(&caption, &table);
    }
    if content.is_empty() {
        return content;
    }
    let over = if several {
        "; mean ± half of its 95 % interval (Student's t) over seeds, and in brackets the number of runs"
    } else {
        ""
    };
    content + &note(&format!("After the last finished epoch{over}. Brighter is more accurate."))
}

/// Black or white, whichever has the higher contrast on a colour (WCAG's relative luminance).
fn readable_on(colour: [u8; 3]) -> &'static str {
    let linear = colour.map(|part| {
        let part = f64::from(part) / 255.0;
        if part <= 0.04045 { part / 12.92 } else { ((part + 0.055) / 1.055).powf(2.4) }
    });
    let luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    if luminance > 0.179 { "#000000" } else { "#ffffff" }
}
