//! `polder report` and the pictures, over generated folders in which every number is known.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use approx::abs_diff_eq;
use polder::report::{
    ColourMap, PictureFormat, PictureName, PictureSettings, landscape_pictures, pictures, report, spectrum_pictures,
};
use polder::train::{checksum, hold};
use serde_json::{Value, json};
use tempfile::TempDir;
use tiny_skia::Pixmap;

/// A line of the log for an epoch, by loss, accuracy and seconds.
fn epoch(epoch: u64, test_loss: Option<f64>, test_accuracy: f64, seconds: f64) -> String {
    let train_loss = test_loss.map(|loss| 0.5 * loss);
    json!({
        "kind": "epoch", "epoch": epoch, "step": 10 * epoch, "train_loss": train_loss, "train_accuracy": 0.5,
        "test_loss": test_loss, "test_accuracy": test_accuracy, "lr": 0.1 / epoch as f64, "gradient_norm": 2.0,
        "images_per_second": 100.0 * epoch as f64, "seconds": seconds, "skipped": 3,
    })
    .to_string()
}

fn curvature(epoch: u64, measures: &Value) -> String {
    json!({"kind": "curvature", "epoch": epoch, "step": 10 * epoch, "measures": measures}).to_string()
}

/// Makes the folder of a run.
fn run(parent: &Path, name: &str, settings: &str, log: &[String]) -> PathBuf {
    let folder = parent.join(name);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("config.toml"), settings).unwrap();
    std::fs::write(folder.join("log.jsonl"), log.join("\n") + "\n").unwrap();
    folder
}

/// A landscape with so many points on each side of the origin, of which `rows` rows were evaluated.
fn landscape(folder: &Path, title: &str, axes: usize, rows: usize, loss: impl Fn(f64, f64) -> f64) {
    std::fs::create_dir_all(folder).unwrap();
    let values: Vec<f64> = (-5..=5).map(|index| f64::from(index) / 5.0).collect();
    let names = ["first <b>direction</b>", "second direction"];
    let described: Vec<Value> = names[..axes].iter().map(|name| json!({"name": name, "values": values})).collect();
    let description = json!({"title": title, "axes": described, "seed": 0});
    std::fs::write(folder.join("landscape.json"), description.to_string()).unwrap();
    let mut lines = vec![if axes == 2 { "x,y,loss,accuracy" } else { "x,loss,accuracy" }.to_string()];
    for &y in if axes == 2 { &values[..] } else { &[0.0] } {
        for &x in &values {
            let place = if axes == 2 { format!("{x},{y}") } else { x.to_string() };
            lines.push(format!("{place},{},0.5", loss(x, y)));
        }
    }
    lines.truncate(1 + rows);
    std::fs::write(folder.join("landscape.csv"), lines.join("\n") + "\n").unwrap();
}

/// Writes the report of these runs and returns it with the numbers.
fn page(runs: &[PathBuf]) -> (String, polder::report::Report) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("page.html");
    let found = report(runs, Some(&out), false).unwrap();
    let html = std::fs::read_to_string(&out).unwrap();
    check_page(&html);
    (html, found)
}

/// Checks that every picture is well-formed XML, and that the page loads and runs nothing.
fn check_page(html: &str) {
    for part in html.split("<svg").skip(1) {
        let svg = format!("<svg{}</svg>", part.split("</svg>").next().unwrap());
        let document = roxmltree::Document::parse(&svg).unwrap_or_else(|error| panic!("{error}: {svg}"));
        for number in document.descendants().filter_map(|node| node.attribute("d")) {
            assert!(!number.contains("NaN") && !number.contains("inf"), "{}", &number[..number.len().min(200)]);
        }
    }
    let bare = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    let bare = bare.replace("\"http://www.w3.org/2000/svg\"", "");
    for foreign in ["http://", "https://", "<link", "<img", "src=", "url(", "@import", "fetch(", "import("] {
        assert!(!bare.contains(foreign), "{foreign}");
    }
    assert_eq!(html.matches("<script").count(), 1, "the page's own");
    let (opened, closed) = (html.matches("<section").count(), html.matches("</section>").count());
    assert_eq!(opened, closed);
    for title in headings(html) {
        let id = title.to_lowercase().replace(' ', "-");
        assert!(html.contains(&format!("<section id=\"{id}\">")) && html.contains(&format!("href=\"#{id}\"")), "{id}");
    }
    assert_eq!(html.matches("<table>").count(), html.matches("<caption>").count());
    let boxes = html.matches("tabindex=\"0\"").count();
    assert_eq!(html.matches("tabindex=\"0\" role=\"region\" aria-label=\"").count(), boxes, "a scroll box has a name");
    for data in html.split("data-chart=\"").skip(1) {
        let text = data.split('"').next().unwrap().replace("&quot;", "\"").replace("&#39;", "'");
        let text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
        let chart: Value = serde_json::from_str(&text).unwrap();
        assert!(!chart["lines"].as_array().unwrap().is_empty(), "{text}");
    }
    assert!(html.ends_with("</html>\n"));
}

fn headings(html: &str) -> Vec<&str> {
    html.split("<h2>").skip(1).map(|part| part.split("</h2>").next().unwrap()).collect()
}

/// The row of a table with this name, without tags.
fn row(html: &str, name: &str) -> Vec<String> {
    let found = html.split("<tr>").skip(1).map(|row| row.split("</tr>").next().unwrap());
    let cells = |row: &str| -> Vec<String> {
        let cells = row.split("</th>").flat_map(|part| part.split("</td>"));
        let plain = |cell: &str| {
            // The text between two tags.
            cell.split('<').map(|part| part.split_once('>').map_or(part, |(_, text)| text)).collect::<String>()
        };
        cells.map(plain).collect()
    };
    found.map(cells).find(|cells| cells[0] == name).unwrap_or_else(|| panic!("no row {name}"))
}

#[test]
fn runs_that_differ_in_the_seed_alone_are_one_group_with_its_mean_and_interval() {
    let folder = tempfile::tempdir().unwrap();
    let sgd = |seed: u64, loss: f64, accuracy: f64| {
        let log = [epoch(1, Some(2.0), 0.1, 10.0), epoch(2, Some(loss), accuracy, 14.0 + seed as f64)];
        run(folder.path(), &format!("sgd-{seed}"), &format!("optimizer = \"sgd\"\nlr = 0.1\nseed = {seed}\n"), &log)
    };
    let sam = |name: &str, rho: f64, accuracy: f64| {
        let settings = format!("optimizer = \"sam\"\nrho = {rho}\nlr = 0.1\nseed = 0\n");
        run(folder.path(), name, &settings, &[epoch(1, Some(0.9), accuracy, 30.0)])
    };
    let runs = [sgd(0, 0.5, 0.80), sam("a", 0.05, 0.70), sgd(1, 0.6, 0.82), sgd(2, 0.7, 0.84), sam("b", 0.1, 0.60)];
    let (html, found) = page(&runs);

    let names: Vec<&str> = found.groups.iter().map(|group| group.name.as_str()).collect();
    assert_eq!(names, ["sgd", "sam, rho 0.05", "sam, rho 0.1"]);
    let group = &found.groups[0];
    assert_eq!(group.runs, [&runs[0], &runs[2], &runs[3]].map(Clone::clone));
    let close = |a: f64, b: f64| abs_diff_eq!(a, b, epsilon = 1e-12);
    assert!(close(group.test_accuracy.mean, 0.82) && close(group.test_accuracy.deviation.unwrap(), 0.02));
    assert!(close(group.test_loss.mean, 0.6) && close(group.test_loss.deviation.unwrap(), 0.1));
    assert!(close(group.seconds.mean, 15.0) && close(group.seconds.deviation.unwrap(), 1.0));
    // The first epoch's 100 images/s for 10 s, the second's 200 for 4, 5 or 6 s.
    let rates = [1800.0 / 14.0, 2000.0 / 15.0, 2200.0 / 16.0];
    for (found, expected) in group.images_per_second.values.iter().zip(rates) {
        assert!(close(*found, expected), "{found} and {expected}");
    }
    // Student's t with two degrees of freedom is 4.302653.
    let half = 4.302652729696142 * 0.02 / 3.0f64.sqrt();
    assert!(abs_diff_eq!(group.test_accuracy.interval.unwrap(), half, epsilon = 1e-9));
    let single = &found.groups[1].test_accuracy;
    assert_eq!((single.deviation, single.interval), (None, None));
    let figure = html.split("<figure").find(|figure| figure.contains("<b>Test accuracy</b>")).unwrap();
    let data = figure.split("data-chart=\"").nth(1).unwrap().split('"').next().unwrap().replace("&quot;", "\"");
    let chart: Value = serde_json::from_str(&data).unwrap();
    let band: Vec<[f64; 3]> = serde_json::from_value(chart["lines"][0]["band"].clone()).unwrap();
    for (found, expected) in band[1].iter().zip([2.0, 82.0 - 100.0 * half, 82.0 + 100.0 * half]) {
        assert!(abs_diff_eq!(*found, expected, epsilon = 1e-3), "{band:?}");
    }

    assert_eq!(row(&html, "sgd")[1..6], ["82.0 ± 5.0 %", "0.60 ± 0.25", "3", "2", "15.0 ± 2.5"]);
    assert_eq!(row(&html, "sam, rho 0.1")[1..4], ["60 %", "0.9000", "1"]);
    assert!(html.contains("<td class=\"best\">82.0 ± 5.0 %</td><td class=\"best\">0.60 ± 0.25</td>"));
    assert_eq!(html.matches("class=\"best\"").count(), 2);
    assert_eq!(row(&html, "rho"), ["rho", "–", "0.05", "0.1", ""]);
    assert_eq!(row(&html, "seed"), ["seed", "0, 1, 2", "0", "0", ""]);
    assert_eq!(row(&html, "lr"), ["lr", "0.1", ""], "what all have in common");
    assert_eq!(
        row(&html, runs[2].to_str().unwrap())[1..11],
        ["sgd", "1", "finished", "20", "3", "82.00 %", "0.6000", "82.00 % after epoch 2", "15", "0.7500"]
    );
}

/// Over two settings the cells have the mean, half of its interval and the number of runs. Single runs have no
/// interval.
#[test]
fn a_heat_map_has_intervals_over_seeds() {
    let folder = tempfile::tempdir().unwrap();
    let runs = |seeds: u64| {
        let mut runs = Vec::new();
        for (rho, decay, seed) in [0.1, 0.2]
            .iter()
            .flat_map(|rho| [0.0, 0.5].iter().flat_map(move |decay| (0..seeds).map(move |seed| (*rho, *decay, seed))))
        {
            let settings = format!("optimizer = \"sam\"\nrho = {rho:?}\nweight-decay = {decay:?}\nseed = {seed}\n");
            let accuracy = rho + 0.4 * decay + 0.02 * seed as f64;
            let name = format!("{rho}-{decay}-{seed} of {seeds}");
            runs.push(run(folder.path(), &name, &settings, &[epoch(1, Some(1.0), accuracy, 1.0)]));
        }
        runs
    };
    let section = |seeds: u64| {
        let (html, _) = page(&runs(seeds));
        html.split("<h2>Accuracy over settings</h2>").nth(1).unwrap().split("</section>").next().unwrap().to_string()
    };
    let (several, single) = (section(3), section(1));
    // 12, 32, 22 and 42 % with a deviation of 2 % over three seeds.
    for mean in [12, 32, 22, 42] {
        assert!(several.contains(&format!(">{mean}.0 ± 5.0 (3)</td>")), "{several}");
    }
    assert!(several.contains("95 % interval (Student&#39;s t)") || several.contains("95 % interval (Student's t)"));
    assert!(!single.contains("interval") && !single.contains('±'), "{single}");
}

/// The same images may lie in different places; other images may lie in the same place.
#[test]
fn runs_are_grouped_by_their_images_and_not_by_where_these_lay() {
    let folder = tempfile::tempdir().unwrap();
    let images =
        |checksum: &str| format!("\n[images]\nclasses = 4\ntrain = {{ count = 8, checksum = {checksum:?} }}\n");
    let add = |name: &str, data: &str, checksum: &str, seed: u64| {
        let settings = format!("optimizer = \"sam\"\ndata = {data:?}\nseed = {seed}\n{}", images(checksum));
        run(folder.path(), name, &settings, &[epoch(1, Some(1.0), 0.5, 1.0)])
    };
    let runs = [add("a", "/here", "01", 0), add("b", "/there", "01", 1), add("c", "/here", "02", 0)];
    let (_, found) = page(&runs);
    let sizes: Vec<usize> = found.groups.iter().map(|group| group.runs.len()).collect();
    assert_eq!(sizes, [2, 1], "{found:?}");
    // Results over the same test images are compared, and runs of one seed have no interval.
    let more = |name: &str, seed: u64, test: &str, accuracy: f64| {
        let test = format!("[images]\ntest = {{ count = 8, checksum = {test:?} }}\n");
        let settings = format!("optimizer = \"{name}\"\nseed = {seed}\n{test}");
        run(folder.path(), &format!("{name}-{seed}-{accuracy}"), &settings, &[epoch(1, Some(1.0), accuracy, 1.0)])
    };
    let sgd = [more("sgd", 0, "01", 0.5), more("sgd", 1, "01", 0.501)];
    let best = |others: [PathBuf; 2]| page(&[&sgd[..], &others].concat()).0.contains("class=\"best\"");
    assert!(best([more("sam", 0, "01", 0.9), more("sam", 1, "01", 0.901)]));
    assert!(!best([more("asam", 0, "02", 0.9), more("asam", 1, "02", 0.901)]), "other test images");
    assert!(!best([more("gsam", 0, "01", 0.9), more("gsam", 0, "01", 0.901)]), "one seed twice");
    // What was measured is no setting of the training.
    let settings = ["curvature-every = 1\n", "log-every = 5\nthreads = 2\n"];
    let measured = |index: usize| {
        let settings = format!("optimizer = \"sam\"\nseed = {index}\n{}", settings[index]);
        run(folder.path(), &format!("measured-{index}"), &settings, &[epoch(1, Some(1.0), 0.5, 1.0)])
    };
    assert_eq!(page(&[measured(0), measured(1)]).1.groups.len(), 1);
}

#[test]
fn a_section_is_there_only_if_there_is_something_to_show() {
    let folder = tempfile::tempdir().unwrap();
    let log = [epoch(1, Some(1.0), 0.5, 3.0), epoch(2, Some(0.9), 0.55, 6.0)];
    let bare = run(folder.path(), "bare", "optimizer = \"sgd\"\n", &log);
    let (html, found) = page(std::slice::from_ref(&bare));
    assert_eq!(headings(&html), ["Accuracy", "Learning curves", "Settings", "Runs"]);
    assert_eq!(found.curvature_order, None);
    assert!(!html.contains("class=\"best\"") && !html.contains("class=\"legend\""), "there is one group only");
    assert!(html.contains("Learning rate"), "it changes");

    let measures = json!({
        "trace": {"value": 10.0, "standard_error": 1.0, "probes": 5},
        "top-eigenvalues": {"values": [4.0, 2.0], "residuals": [0.1, 0.1], "first_over_fifth": null},
        "spectrum": {"nodes": [-1.0, 0.0, 8.0], "weights": [0.2, 0.7, 0.1]},
        "layer-traces": {"probes": 5, "layers": {"fc.weight": {"value": 3.0, "standard_error": 0.1}}},
        "extrema": {"minima": {"value": 0.25}, "maxima": {"value": 0.5}, "lines": 4},
    });
    let log = [log[0].clone(), curvature(1, &measures), log[1].clone()];
    let full = run(folder.path(), "full", "optimizer = \"sam\"\n", &log);
    landscape(&full.join("landscape"), "plane", 2, 121, |x, y| 0.1 + x * x + y * y);
    landscape(&full.join("landscape-line"), "line", 1, 11, |x, _| 0.1 + x * x);
    landscape(&full.join("landscape-empty"), "EMPTY", 2, 0, |_, _| 0.0);
    // A landscape that has not begun.
    landscape(&full.join("landscape-other"), "OTHER", 2, 0, |_, _| 0.0);
    std::fs::remove_file(full.join("landscape-other/landscape.csv")).unwrap();
    let (html, _) = page(&[bare, full]);
    let expected = [
        "Accuracy",
        "Learning curves",
        "Curvature during training",
        "Curvature at the end",
        "Curvature by layer",
        "Spectrum of the Hessian",
        "Loss landscapes",
        "Settings",
        "Runs",
    ];
    assert_eq!(headings(&html), expected);
    for measure in ["Trace of the Hessian", "Largest eigenvalue", "Local minima along random lines"] {
        assert!(html.contains(&format!("<b>{measure}</b>")), "{measure}");
    }
    let at_the_end = html.split("<h2>Curvature at the end</h2>").nth(1).unwrap();
    let measures = ["Trace of the Hessian", "Largest eigenvalue", "Local minima along random lines"];
    for (measure, value) in measures.into_iter().zip(["10.0 ± 1.0", "4.00 ± 0.10", "0.2500"]) {
        assert_eq!(row(at_the_end, measure)[1..3], ["–", value]);
    }
    assert!(at_the_end.contains("Measured after epoch 1."));
    assert!(html.contains("aria-label=\"loss over two directions, plane"));
    assert!(html.contains("aria-label=\"Loss along a line, line: "));
    assert!(!html.contains("EMPTY") && !html.contains("OTHER"));
}

/// A run with a trace in `curvature.json`.
fn traced(parent: &Path, name: &str, settings: &str, trace: f64, error: Option<f64>) -> PathBuf {
    let path = run(parent, name, settings, &[epoch(1, Some(1.0), 0.5, 3.0)]);
    let trace = json!({"value": trace, "standard_error": error, "probes": 4});
    let whole = json!({"samples": 1000, "split": "train", "measures": {"trace": trace}});
    std::fs::write(path.join("curvature.json"), whole.to_string()).unwrap();
    path
}

#[test]
fn the_order_by_curvature_has_errors_and_does_not_depend_on_the_order_of_the_runs() {
    let folder = tempfile::tempdir().unwrap();
    let sgd: Vec<PathBuf> = (0..3)
        .map(|seed| {
            let settings = format!("optimizer = \"sgd\"\nseed = {seed}\n");
            traced(folder.path(), &format!("sgd-{seed}"), &settings, 85.5 + 0.05 * f64::from(seed), Some(21.1))
        })
        .collect();
    let sam = traced(folder.path(), "sam", "optimizer = \"sam\"\n", 70.0, Some(18.0));
    let gam = traced(folder.path(), "gam", "optimizer = \"gam\"\n", 2.0, Some(0.5));
    let text = "Trace of the Hessian, the largest first: sgd (86 ± 21) ≈ sam (70 ± 18) > gam (2.00 ± 0.50). \
                ≈: the difference is within twice its error.";
    let runs = [sam, sgd[0].clone(), gam, sgd[1].clone(), sgd[2].clone()];
    for turn in 0..runs.len() {
        let mut runs = runs.clone();
        runs.rotate_left(turn);
        let (html, found) = page(&runs);
        let order = found.curvature_order.unwrap();
        assert_eq!(order.to_string(), text);
        let below: Vec<Option<bool>> = order.groups.iter().map(|group| group.is_below_previous).collect();
        assert_eq!(below, [None, Some(false), Some(true)]);
        assert!(html.contains(&text.replace('>', "&gt;")));
    }
    let (html, found) = page(&runs);
    let at_the_end = html.split("Curvature at the end</h2>").nth(1).unwrap();
    assert_eq!(row(at_the_end, "Trace of the Hessian")[1..4], ["70 ± 18", "86 ± 21, seeds ± 0.12", "2.00 ± 0.50"]);
    let trace = &found.groups[1].curvature["trace"];
    assert!(abs_diff_eq!(trace["measurement_error"].as_f64().unwrap(), 21.1, epsilon = 1e-9), "shared by the seeds");
    assert!(abs_diff_eq!(trace["deviation"].as_f64().unwrap(), 0.05, epsilon = 1e-9));
}

#[test]
fn no_group_is_the_best_within_the_error() {
    let folder = tempfile::tempdir().unwrap();
    let make = |optimizer: &str, accuracies: &[f64]| -> Vec<PathBuf> {
        let run = |(seed, &accuracy): (usize, &f64)| {
            let settings = format!("optimizer = \"{optimizer}\"\nseed = {seed}\n");
            run(folder.path(), &format!("{optimizer}-{seed}"), &settings, &[epoch(1, Some(1.0), accuracy, 3.0)])
        };
        accuracies.iter().enumerate().map(run).collect()
    };
    let near = [make("sgd", &[0.1828, 0.2000]), make("sam", &[0.1854, 0.1886])].concat();
    assert!(!page(&near).0.contains("class=\"best\""), "19.14 ± 1.22 is not above 18.70 ± 0.23");
    let far = [near, make("gam", &[0.30, 0.31])].concat();
    assert_eq!(page(&far).0.matches("class=\"best\"").count(), 1);
    let single = [make("adamw", &[0.5]), make("gsam", &[0.6])].concat();
    let (html, _) = page(&single);
    assert!(!html.contains("class=\"best\"") && html.contains("single runs have no error"));
}

#[test]
fn eigenvalues_keep_their_residuals_and_whether_they_have_converged() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str, values: [f64; 5], converged: bool| {
        let found = json!({"values": values, "residuals": [0.5, 0.01, 0.01, 0.01, 0.01], "converged": converged});
        let log = [epoch(1, Some(1.0), 0.5, 3.0), curvature(1, &json!({"top-eigenvalues": found}))];
        run(folder.path(), name, &format!("optimizer = \"{name}\"\n"), &log)
    };
    let runs = [
        make("sgd", [10.0, 5.0, 4.0, 3.0, 2.0], true),
        make("sam", [8.0, 3.0, 2.0, 1.0, -0.5], false),
        make("gam", [8.0, 3.0, 2.0, 1.0, 0.001], true),
    ];
    let (html, found) = page(&runs);
    let at_the_end = html.split("Curvature at the end</h2>").nth(1).unwrap();
    let expected = ["10.00 ± 0.50", "8.00 ± 0.50; not within the tolerance", "8.00 ± 0.50"];
    assert_eq!(row(at_the_end, "Largest eigenvalue")[1..4], expected);
    // The fifth is negative, or zero within its residual.
    assert_eq!(row(at_the_end, "Largest eigenvalue over the fifth")[1..4], ["5", "–", "–"]);
    assert_eq!(found.groups[1].curvature["top eigenvalue"]["not_converged"], 1);
}

/// The lines of all runs of a group are counted together.
#[test]
fn lines_are_counted_by_their_extrema() {
    let folder = tempfile::tempdir().unwrap();
    let add = |seed: u64, minima: &[usize], maxima: &[usize]| {
        let of = |histogram: &[usize]| json!({"value": 0.5, "standard_error": 0.1, "histogram": histogram});
        let measures = json!({"extrema": {"lines": 9, "minima": of(minima), "maxima": of(maxima)}});
        let log = [epoch(1, Some(1.0), 0.5, 1.0), curvature(1, &measures)];
        run(folder.path(), &seed.to_string(), &format!("optimizer = \"sgd\"\nseed = {seed}\n"), &log)
    };
    let (html, _) = page(&[add(0, &[7, 2], &[4, 4, 1]), add(1, &[8, 0, 1], &[9])]);
    assert_eq!(row(&html, "sgd: minima")[..4], ["sgd: minima", "15", "2", "1"]);
    assert_eq!(row(&html, "sgd: maxima")[..4], ["sgd: maxima", "13", "4", "1"]);
}

#[test]
fn traces_of_layers_have_error_bars() {
    let folder = tempfile::tempdir().unwrap();
    let bars = |error: Value| {
        let layers = json!({"conv": {"value": 3.0, "standard_error": error}, "fc": {"value": 5.0}});
        let log =
            [epoch(1, Some(1.0), 0.5, 3.0), curvature(1, &json!({"layer-traces": {"probes": 4, "layers": layers}}))];
        let path = run(folder.path(), "run", "optimizer = \"sgd\"\n", &log);
        let (html, _) = page(&[path]);
        assert_eq!(html.contains("sgd: conv 3.0 ± 1.0"), error.is_number());
        let chart = html.split("Curvature by layer</h2>").nth(1).unwrap().split("</svg>").next().unwrap();
        chart.matches("stroke=\"var(--series-0)\"").count()
    };
    assert_eq!((bars(json!(1.0)), bars(Value::Null)), (1, 0));
}

/// Numbers from one end of the double range to the other.
fn extremes() -> Vec<f64> {
    let sizes = [f64::MIN_POSITIVE, 5e-324, 1e-300, 1e-160, 1e-30, 1e-4, 7.0, 30.0, 1e16, 5e30, 1e200, f64::MAX];
    sizes.into_iter().flat_map(|size| [size, -size]).chain([0.0, 1.0, 1.0 + 1e-15]).collect()
}

#[test]
fn any_finite_numbers_have_finite_coordinates_and_ticks() {
    let folder = tempfile::tempdir().unwrap();
    let numbers = extremes();
    for (index, &first) in numbers.iter().enumerate() {
        let log: Vec<String> = numbers[index..]
            .iter()
            .enumerate()
            .flat_map(|(at, &second)| {
                let at = 2 * at as u64 + 1;
                // One chart for each pair, by the name of the measure.
                let pair = |value: f64| json!({format!("pair {at}"): {"value": value}});
                let line = |epoch: u64, value: f64| curvature(epoch, &pair(value));
                [line(at, first), line(at + 1, second)]
            })
            .collect();
        let path = run(folder.path(), "run", "optimizer = \"sgd\"\n", &log);
        let (html, _) = page(&[path]);
        let charts: Vec<&str> = html.split("<svg").filter(|chart| chart.contains("over epochs")).collect();
        assert_eq!(charts.len(), numbers.len() - index);
        for chart in charts {
            let ticks = chart.matches("text-anchor=\"end\"").count();
            assert!(ticks >= 1, "{first}: {chart}");
        }
    }
}

#[test]
fn landscapes_of_any_finite_numbers_have_finite_coordinates() {
    let folder = tempfile::tempdir().unwrap();
    for (low, high) in [(30.0, 5e30), (1e-30, 1e-4), (1e-300, 7.0), (-1e308, 1e308), (0.0, 5e-324), (5e-324, 1e308)] {
        for axes in [1, 2] {
            let out = folder.path().join(format!("{axes}"));
            landscape(&out, "t", axes, 121, |x, y| if x * y + x > 0.3 { high } else { low });
            let count = landscape_pictures(&out).unwrap().len();
            assert!(count > 0);
            for name in ["contour", "surface", "curve"].iter().filter(|name| out.join(format!("{name}.svg")).exists()) {
                check_picture(&out.join(name));
            }
        }
    }
}

/// The seconds that something takes.
fn seconds(work: impl FnOnce()) -> f64 {
    let start = std::time::Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

#[test]
fn long_logs_and_lines_take_time_in_proportion_and_little_space() {
    let folder = tempfile::tempdir().unwrap();
    let make = |count: u64| {
        let log: Vec<String> = (1..=count)
            .map(|at| {
                epoch(at, Some(1.0 + (at % 97) as f64 + if at == count / 3 { 500.0 } else { 0.0 }), 0.5, at as f64)
            })
            .collect();
        let path = run(folder.path(), &format!("run-{count}"), "optimizer = \"sgd\"\n", &log);
        let values: Vec<f64> = (0..count).map(|index| index as f64).collect();
        let line = path.join("landscape-line");
        std::fs::create_dir(&line).unwrap();
        let described = json!({"title": "t", "axes": [{"name": "a", "values": values}]});
        std::fs::write(line.join("landscape.json"), described.to_string()).unwrap();
        let rows: String = values.iter().map(|value| format!("{value},{},0.5\n", 1.0 + (value % 89.0))).collect();
        std::fs::write(line.join("landscape.csv"), format!("x,loss,accuracy\n{rows}")).unwrap();
        path
    };
    let (short, long) = (make(2_000), make(60_000));
    let mut html = String::new();
    let least = (0..3).map(|_| seconds(|| drop(page(std::slice::from_ref(&short))))).fold(f64::INFINITY, f64::min);
    let took = seconds(|| html = page(std::slice::from_ref(&long)).0);
    assert!(took < 10.0 * 30.0 * least + 1.0, "{took} s for thirty times as many lines as {least} s");
    assert!(html.len() < 1_000_000, "{}", html.len());
    assert!(!html.contains("epochs.csv") && html.contains("too many for a table in the page"));
    // The one high value still shows: it is the top of its chart.
    let chart = html.split("<b>Test loss</b>").nth(1).unwrap().split("</svg>").next().unwrap();
    let path = chart.split("<path d=\"M").find(|path| path.contains("stroke=\"var(--series-0)\"")).unwrap();
    let heights = path.split('"').next().unwrap().split('L').filter_map(|point| point.split(' ').nth(1)?.parse().ok());
    let mut heights: Vec<f64> = heights.collect();
    heights.sort_by(f64::total_cmp);
    assert!(heights[0] < heights[heights.len() / 2] - 50.0, "{}", heights[0]);
}

#[test]
fn damaged_results_are_left_out_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let log = [epoch(1, Some(1.0), 0.5, 3.0)];
    let paths: Vec<PathBuf> = ["a", "b", "c"]
        .map(|name| run(folder.path(), name, &format!("optimizer = \"sgd\"\nrho = 0.{}\n", name.len()), &log))
        .into();
    std::fs::write(paths[0].join("curvature.json"), "{\"samples\": 3}").unwrap();
    landscape(&paths[1].join("landscape"), "bowl", 2, 121, |x, y| x * x + y * y);
    std::fs::write(paths[1].join("landscape/landscape.json"), "[]").unwrap();
    std::fs::write(paths[2].join("config.toml"), "lr = = 3\n").unwrap();
    let output = polder(&folder, &["a", "b", "c", "--json"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{told}");
    let reasons = ["a/curvature.json: no `measures`", "b/landscape/landscape.json: ", "c/config.toml: line 1: "];
    assert_eq!(told.lines().count(), 3, "{told}");
    let html = std::fs::read_to_string(folder.path().join("report.html")).unwrap();
    check_page(&html);
    for (reason, line) in reasons.into_iter().zip(told.lines()) {
        assert!(line.starts_with(&format!("skipped: {reason}")), "{line}");
        assert!(html.contains(&format!("Left out: {reason}")), "{reason}");
    }
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (found["skipped"][0]["path"].as_str(), found["groups"][0]["runs"].as_array().unwrap().len()),
        (Some("a"), 2)
    );
    assert!(mistake(&folder, &["c"]).contains("c/config.toml: line 1: "), "nothing is left to report");
}

#[cfg(unix)]
#[test]
fn pipes_and_devices_in_place_of_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let log = [epoch(1, Some(1.0), 0.5, 3.0)];
    let make = |name: &str| {
        let path = run(folder.path(), name, "optimizer = \"sgd\"\n", &log);
        landscape(&path.join("landscape"), "bowl", 2, 121, |x, y| x * x + y * y);
        path
    };
    make("good");
    let files = ["log.jsonl", "config.toml", "curvature.json", "landscape/landscape.json", "landscape/landscape.csv"];
    for file in files {
        for pipe in [true, false] {
            let path = make("odd").join(file);
            let _ = std::fs::remove_file(&path);
            if pipe {
                assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
            } else {
                std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
            }
            let output = polder(&folder, &["good", "odd"]);
            let told = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.success(), "{told}");
            assert_eq!(told, format!("skipped: odd/{file}: not a regular file\n"));
            std::fs::remove_dir_all(folder.path().join("odd")).unwrap();
        }
    }
}

#[test]
fn names_from_files_reach_no_terminal_raw() {
    let folder = tempfile::tempdir().unwrap();
    let evil = "red\u{1b}[31m\nline\u{9b}2J";
    let long = "x".repeat(1 << 19);
    let make = |name: &str, value: &str| {
        let settings = format!("optimizer = \"own\"\nown = {}\n", json!(value));
        let measures = json!({value: {"value": 1.0}, "layer-traces": {"layers": {value: {"value": 1.0}}}});
        let path = run(folder.path(), name, &settings, &[epoch(1, Some(1.0), 0.5, 1.0), curvature(1, &measures)]);
        landscape(&path.join("landscape"), value, 2, 121, |x, y| x * x + y);
        landscape(&path.join("landscape-line"), value, 1, 11, |x, _| x * x);
        path
    };
    let paths = [make("a", evil), make("b", &long)];
    let (html, found) = page(&paths);
    assert!(html.len() < 400_000, "{}", html.len());
    assert!(found.groups.iter().all(|group| group.name.len() < 300), "{:?}", found.groups);
    let output = polder(&folder, &["a", "b"]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && told.len() < 2000, "{told}");
    assert!(told.lines().count() == 3 && !told.contains(['\u{1b}', '\u{9b}']), "{told:?}");
    // The name of a folder.
    let output = polder(&folder, &["no\u{1b}[31mne"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("no\\u001b[31mne"), "{told:?}");
}

#[test]
fn measures_outside_the_file_of_curvature_come_from_the_log() {
    let folder = tempfile::tempdir().unwrap();
    // Measures that are not in `curvature.json` come from the log.
    let measures =
        json!({"trace": {"value": 7.0}, "grad-norm": {"value": 3.0}, "power-iteration": {"values": [-5.0, 1.0]}});
    let d = run(folder.path(), "d", "optimizer = \"gam\"\n", &[epoch(1, Some(1.0), 0.5, 1.0), curvature(1, &measures)]);
    let whole = json!({"samples": 1000, "split": "train", "measures": {"trace": {"value": 9.0}}});
    std::fs::write(d.join("curvature.json"), whole.to_string()).unwrap();
    let (html, found) = page(std::slice::from_ref(&d));
    let mut means: Vec<f64> = found.groups[0].curvature.values().map(|of| of["mean"].as_f64().unwrap()).collect();
    means.sort_by(f64::total_cmp);
    assert_eq!(means, [-5.0, 3.0, 9.0]);
    assert!(html.contains("Measured over 1000 training images, other measures after epoch 1."), "{html}");
    // Results of other weights than the current ones are left out, and the page says so.
    std::fs::write(d.join("model.safetensors"), "weights").unwrap();
    let whole =
        json!({"measures": {"trace": {"value": 9.0}}, "weights": checksum(&d.join("model.safetensors")).unwrap()});
    std::fs::write(d.join("curvature.json"), whole.to_string()).unwrap();
    let (html, _) = page(std::slice::from_ref(&d));
    assert!(!html.contains("other weights by now"), "{html}");
    std::fs::write(d.join("model.safetensors"), "trained on").unwrap();
    let (html, found) = page(std::slice::from_ref(&d));
    assert!(html.contains("left out because the weights of the run have changed: curvature.json."), "{html}");
    assert!(found.groups[0].curvature.values().any(|of| of["mean"] == 7.0), "{:?}", found.groups);
}

#[test]
fn what_users_write_is_text() {
    let folder = tempfile::tempdir().unwrap();
    let evil = "<script>alert('\"&')<";
    let settings = "optimizer = \"sgd\"\nmodel = \"<b>bold</b>\"\ndata = \"/x/<i>\\\"&\"\n";
    let measures = json!({
        "<u>measure</u>": {"value": 1.0},
        "layer-traces": {"layers": {"<s>layer</s>": {"value": 1.0}}},
    });
    let log = [epoch(1, Some(1.0), 0.5, 1.0), curvature(1, &measures), "<p>no json".into()];
    let path = run(folder.path(), evil, settings, &log);
    landscape(&path.join("landscape-<a>"), "<em>title\u{1}</em>", 2, 121, |x, y| x * x + y);
    landscape(&path.join("landscape-<c>"), "<em>title</em>", 1, 5, |x, _| x * x);
    let other = run(folder.path(), "other", &settings.replace("<i>", "<q>"), &log);
    let (html, _) = page(&[path.clone(), other]);
    for tag in ["<script>alert", "<b>bold", "<i>", "<q>", "<u>", "<s>", "<em>", "<a>", "<c>", "<p>no", "<b>direction"] {
        assert!(!html.contains(tag), "{tag}");
    }
    let told =
        ["&lt;b&gt;bold", "&lt;i&gt;&quot;&amp;", "&lt;u&gt;measure", "&lt;em&gt;title", "&lt;script&gt;alert(&#39;"];
    for text in told {
        assert!(html.contains(text), "{text}");
    }
    for svg in
        landscape_pictures(&path.join("landscape-<a>")).unwrap().iter().filter(|path| path.ends_with("contour.svg"))
    {
        let text = std::fs::read_to_string(svg).unwrap();
        assert!(
            roxmltree::Document::parse(&text)
                .unwrap()
                .descendants()
                .any(|n| n.text() == Some("<em>title\u{fffd}</em>"))
        );
    }
}

#[test]
fn lines_that_cannot_be_read_are_skipped_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let good = epoch(1, Some(1.0), 0.5, 3.0);
    let log = ["nonsense".into(), good.clone(), String::new(), good[..good.len() / 2].into()];
    let path = run(folder.path(), "run", "optimizer = \"sgd\"\n", &log);
    // The last line ends inside a character.
    let mut bytes = std::fs::read(path.join("log.jsonl")).unwrap();
    bytes.extend("{\"é".bytes().take(3));
    std::fs::write(path.join("log.jsonl"), bytes).unwrap();
    let (html, found) = page(&[path]);
    assert_eq!(found.unreadable_lines, 3);
    assert!(html.contains("3 lines could not be read and were skipped"));
    assert_eq!(row(&html, "sgd")[1..3], ["50 %", "1"]);
}

#[test]
fn losses_that_are_not_finite_leave_gaps_and_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let make = |seed: u64, last: Option<f64>| {
        let log = [epoch(1, Some(1.0), 0.5, 3.0), epoch(2, None, 0.1, 6.0), epoch(3, last, 0.1, 9.0)];
        run(folder.path(), &format!("run-{seed}"), &format!("optimizer = \"sgd\"\nseed = {seed}\n"), &log)
    };
    let (html, found) = page(&[make(0, Some(2.0)), make(1, None)]);
    // A run that ends without a finite loss has diverged, and the mean is that of the other one.
    assert_eq!((found.groups[0].test_loss.mean, found.groups[0].diverged.len()), (2.0, 1));
    assert_eq!(row(&html, "sgd")[2], "2");
    assert!(html.contains("diverged in epoch 3"));

    let nothing = run(folder.path(), "nothing", "optimizer = \"sgd\"\n", &[epoch(1, None, 0.1, 3.0)]);
    let (html, found) = page(&[nothing]);
    assert_eq!(row(&html, "sgd")[2], "not finite");
    assert_eq!(serde_json::to_value(&found).unwrap()["groups"][0]["test_loss"]["mean"], Value::Null);
    assert!(!html.contains("<b>Test loss</b>") && html.contains("<b>Test accuracy</b>"));
}

#[test]
fn one_epoch_or_none_is_enough() {
    let folder = tempfile::tempdir().unwrap();
    let one = run(folder.path(), "one", "optimizer = \"sgd\"\nepochs = 4\n", &[epoch(1, Some(1.0), 0.5, 3.0)]);
    let (html, _) = page(&[one]);
    assert_eq!(row(&html, "sgd")[4], "1 of 4");
    let chart = html.split("<b>Test loss</b>").nth(1).unwrap().split("</svg>").next().unwrap();
    assert!(chart.contains("<title>sgd: 1 at 1</title>"), "its marker");
    assert!(!chart.contains(">0</text>"), "the epoch below it is 1: {chart}");

    let step = json!({
        "kind": "step", "step": 7, "epoch": 1, "loss": 2.0, "accuracy": 0.1, "lr": 0.1, "images_per_second": 10.0,
        "gradient_norm": 1.0, "skipped": 1,
    });
    let path = run(folder.path(), "none", "optimizer = \"sgd\"\n", &[step.to_string()]);
    let (html, _) = page(std::slice::from_ref(&path));
    assert!(html.contains("No epoch has been finished yet."));
    assert_eq!(row(&html, path.to_str().unwrap())[4..10], ["7", "1", "–", "–", "–", "–"]);
}

#[test]
fn a_folder_named_twice_is_one_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = run(folder.path(), "one", "optimizer = \"sgd\"\n", &[epoch(1, Some(1.0), 0.5, 3.0)]);
    let (_, found) = page(&[path.clone(), path.join("../one")]);
    assert_eq!((found.groups.len(), found.groups[0].runs.len()), (1, 1));
}

/// The colour of a picture at a relative place.
fn pixel(picture: &Pixmap, x: f64, y: f64) -> [u8; 3] {
    let at = |share: f64, length: u32| (share * f64::from(length)) as u32;
    let pixel = picture.pixel(at(x, picture.width()), at(y, picture.height())).unwrap();
    [pixel.red(), pixel.green(), pixel.blue()]
}

fn brightness(colour: [u8; 3]) -> u32 {
    colour.iter().map(|&channel| u32::from(channel)).sum()
}

fn millimetres(svg: &roxmltree::Document, key: &str) -> f64 {
    svg.root_element().attribute(key).unwrap().strip_suffix("mm").unwrap().parse().unwrap()
}

fn check_picture(stem: &Path) -> Pixmap {
    let text = std::fs::read_to_string(stem.with_extension("svg")).unwrap();
    let document = roxmltree::Document::parse(&text).unwrap();
    let size = ["width", "height"].map(|key| millimetres(&document, key));
    assert!(document.descendants().all(|node| node.attribute("d").is_none_or(|d| !d.contains("NaN"))));
    assert!(
        !text.contains("currentColor") && !text.contains("var("),
        "a file of its own has no page to take colours from"
    );
    let picture = Pixmap::decode_png(&std::fs::read(stem.with_extension("png")).unwrap()).unwrap();
    let pixels = size.map(|length| (length / 25.4 * 288.0).round());
    assert_eq!([picture.width(), picture.height()].map(f64::from), pixels);
    assert_eq!(pixel(&picture, 0.002, 0.002), [255; 3], "on white");
    picture
}

#[test]
fn a_landscape_over_two_directions_becomes_contours_and_a_surface() {
    let folder = tempfile::tempdir().unwrap();
    landscape(folder.path(), "bowl", 2, 121, |x, y| 1.0 + x * x + 3.0 * y * y);
    let written = landscape_pictures(folder.path()).unwrap();
    let names: Vec<_> = written.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    let of = |name: &str| ["svg", "png", "pdf"].map(|format| format!("{name}.{format}"));
    assert_eq!(names, ["contour", "surface", "accuracy"].map(of).concat());
    let contour = check_picture(&folder.path().join("contour"));
    // Near the cross in the middle, towards an edge along the flat direction, and the steep one.
    let [middle, aside, above] =
        [(0.42, 0.45), (0.2, 0.45), (0.45, 0.12)].map(|(x, y)| brightness(pixel(&contour, x, y)));
    assert!(middle < aside && aside < above, "{middle} {aside} {above}");
    let surface = check_picture(&folder.path().join("surface"));
    assert_ne!(pixel(&surface, 0.5, 0.5), [255; 3]);
    let whole = std::fs::read_to_string(folder.path().join("contour.svg")).unwrap();
    assert!(!whole.contains("lowest") && whole.contains("first &lt;b&gt;direction&lt;/b&gt;"));

    // If only the lower half was evaluated, the upper half is blank.
    landscape(folder.path(), "bowl", 2, 60, |x, y| 1.0 + x * x + 3.0 * y * y);
    landscape_pictures(folder.path()).unwrap();
    let half = check_picture(&folder.path().join("contour"));
    assert_eq!(pixel(&half, 0.3, 0.3), [255; 3]);
    assert_ne!(pixel(&half, 0.3, 0.7), [255; 3]);
    let text = std::fs::read_to_string(folder.path().join("contour.svg")).unwrap();
    assert!(text.contains("60 of 121 points evaluated"));
}

#[test]
fn points_that_are_not_finite_are_the_highest() {
    let folder = tempfile::tempdir().unwrap();
    let corner = |x: f64, y: f64| match (x > 0.5, y > 0.5) {
        (true, true) => f64::INFINITY,
        (false, true) => f64::NAN,
        _ => 1.0 + x * x,
    };
    landscape(folder.path(), "corners", 2, 121, corner);
    landscape_pictures(folder.path()).unwrap();
    let contour = check_picture(&folder.path().join("contour"));
    let [infinite, low] = [(0.67, 0.11), (0.42, 0.6)].map(|(x, y)| brightness(pixel(&contour, x, y)));
    assert!(infinite > low, "{infinite} {low}");
    check_picture(&folder.path().join("surface"));
    let text = std::fs::read_to_string(folder.path().join("contour.svg")).unwrap();
    assert!(text.contains("33 not finite, drawn as the highest"), "3 rows of 11");

    landscape(folder.path(), "nothing", 2, 121, |_, _| f64::NAN);
    assert!(landscape_pictures(folder.path()).unwrap().is_empty());
}

#[test]
fn levels_are_logarithmic_where_the_loss_spans_decades() {
    let folder = tempfile::tempdir().unwrap();
    landscape(folder.path(), "decades", 2, 121, |x, y| 1e-3 * (10.0 * (x * x + y * y)).exp());
    landscape_pictures(folder.path()).unwrap();
    let text = std::fs::read_to_string(folder.path().join("contour.svg")).unwrap();
    for level in [">0.01<", ">1<", ">1000<"] {
        assert!(text.contains(level), "{level}");
    }
    // The lowest of many decades is not zero.
    landscape(folder.path(), "line", 1, 11, |x, _| 2.0 * (50.0 * x * x).exp());
    landscape_pictures(folder.path()).unwrap();
    let ticks = texts(&std::fs::read_to_string(folder.path().join("curve.svg")).unwrap());
    assert!(ticks.contains(&"1e20".into()) && ticks.iter().filter(|name| *name == "0").count() == 1, "{ticks:?}");
    landscape(folder.path(), "flat", 2, 121, |_, _| 0.25);
    landscape_pictures(folder.path()).unwrap();
    check_picture(&folder.path().join("contour"));
    check_picture(&folder.path().join("surface"));
}

#[test]
fn a_landscape_over_one_direction_becomes_a_curve_as_far_as_it_goes() {
    let folder = tempfile::tempdir().unwrap();
    for rows in [11, 4, 1] {
        landscape(folder.path(), "line", 1, rows, |x, _| if x == 0.0 { f64::NAN } else { 1.0 + x * x });
        let written = landscape_pictures(folder.path()).unwrap();
        assert_eq!(written, ["curve.svg", "curve.png", "curve.pdf"].map(|name| folder.path().join(name)));
        check_picture(&folder.path().join("curve"));
        let text = std::fs::read_to_string(&written[0]).unwrap();
        assert!(text.contains("accuracy (%)") && text.contains("loss (left)"));
        assert_eq!(text.contains("points evaluated"), rows < 11);
        assert_eq!(text.contains("1 not finite, left out"), rows == 11);
    }
    // A row without its end may lack digits: 2 rows and the beginning of a third.
    let path = folder.path().join("landscape.csv");
    std::fs::write(&path, "x,loss,accuracy\n-1,2,0.5\n-0.8,1.64,0.5\n-0.6,1.36,0.").unwrap();
    landscape_pictures(folder.path()).unwrap();
    assert!(std::fs::read_to_string(folder.path().join("curve.svg")).unwrap().contains("2 of 11 points evaluated"));
}

#[test]
fn a_spectrum_becomes_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let draw = |nodes: &[f64], weights: &[f64]| spectrum_pictures(nodes, weights, "a · b · c", folder.path()).unwrap();
    let written = draw(&[-1.0, 0.0, 9.0], &[0.3, 0.6, 0.1]);
    assert_eq!(written, ["svg", "png", "pdf"].map(|format| folder.path().join(format!("spectrum.{format}"))));
    check_picture(&folder.path().join("spectrum"));
    let text = std::fs::read_to_string(&written[0]).unwrap();
    assert!(text.contains(">a · b · c</text>") && text.contains(">Spectral density of the Hessian</text>"), "{text}");
    assert!(draw(&[], &[]).is_empty());
    assert!(draw(&[f64::NAN], &[1.0]).is_empty());
    assert!(!draw(&[2.0], &[1.0]).is_empty(), "one eigenvalue alone");
}

#[test]
fn damaged_landscapes_are_told_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let description = folder.path().join("landscape.json");
    std::fs::write(folder.path().join("landscape.csv"), "x,loss,accuracy\n").unwrap();
    let axis = |values: &str| format!("{{\"title\": \"t\", \"axes\": [{{\"name\": \"a\", \"values\": {values}}}]}}");
    let cases = [
        ("{".to_string(), "EOF"),
        ("{\"title\": \"t\", \"axes\": []}".into(), "0 axes, expected one or two"),
        (axis("[0]"), "`a`: expected two or more, finite and rising"),
        (axis("[0, 1, 1]"), "`a`: expected two or more, finite and rising"),
    ];
    for (text, reason) in cases {
        std::fs::write(&description, text).unwrap();
        let message = landscape_pictures(folder.path()).unwrap_err().to_string();
        assert!(message.starts_with(&format!("{}: ", description.display())) && message.contains(reason), "{message}");
    }
    std::fs::remove_file(folder.path().join("landscape.csv")).unwrap();
    std::fs::write(&description, axis("[0, 1]")).unwrap();
    let message = landscape_pictures(folder.path()).unwrap_err().to_string();
    assert!(message.contains("landscape.csv: No such file"), "{message}");
}

#[test]
fn event_files_are_what_tensorboard_writes_itself() {
    let folder = tempfile::tempdir().unwrap();
    // Logs of every method once had the counters of CR-SAM.
    let line = json!({
        "kind": "epoch", "epoch": 1, "step": 300, "train_loss": 1.25, "train_accuracy": 0.5, "test_loss": null,
        "test_accuracy": 0.75, "lr": 0.1, "gradient_norm": 2.0, "images_per_second": 800.0, "seconds": 1.0, "skipped": 3,
        "dropped_alpha": 0, "dropped_beta": 0,
    });
    let measures = json!({"trace": {"value": -40.0}, "top-eigenvalues": {"values": [12.5]}, "spectrum": {"nodes": []}});
    let measured = json!({"kind": "curvature", "epoch": 1, "step": 300, "measures": measures}).to_string();
    let path = run(folder.path(), "run", "optimizer = \"sgd\"\n", &[line.to_string(), measured]);
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
    let log = std::fs::OpenOptions::new().write(true).open(path.join("log.jsonl")).unwrap();
    log.set_modified(time).unwrap();
    let found = report(std::slice::from_ref(&path), None, true).unwrap();
    assert_eq!(found.report, path.join("report.html"));
    assert_eq!(found.tensorboard, [path.join("tensorboard/events.out.tfevents.polder")]);
    let bytes = std::fs::read(&found.tensorboard[0]).unwrap();
    // The same events, written by the record writer of TensorBoard 2.21.
    let expected = concat!(
        "1800000000000000a37f4b220900000040fc54d9411a0d627261696e2e4576656e743a32eced8f9dc40000000000000040f1",
        "e57d0900000040fc54d94110ac022ab5010a170a1065706f63682f747261696e5f6c6f7373150000a03f0a1b0a1465706f63",
        "682f747261696e5f6163637572616379150000003f0a1a0a1365706f63682f746573745f6163637572616379150000403f0a",
        "0f0a0865706f63682f6c7215cdcccc3d0a1a0a1365706f63682f6772616469656e745f6e6f726d15000000400a1e0a176570",
        "6f63682f696d616765735f7065725f7365636f6e6415000048440a140a0d65706f63682f736b697070656415000040408c56",
        "9bf24700000000000000bac3fb9b0900000040fc54d94110ac022a390a1f0a186375727661747572652f746f705f65696765",
        "6e76616c756515000048410a160a0f6375727661747572652f747261636515000020c2bc2a0e67",
    );
    assert_eq!(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), expected);
}

fn polder(folder: &TempDir, arguments: &[&str]) -> Output {
    command(folder, "report", arguments)
}

fn command(folder: &TempDir, name: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polder"));
    command.arg(name).args(arguments).current_dir(folder.path()).stdin(Stdio::null()).output().unwrap()
}

/// The message of a mistake: exit code 2, nothing on standard output, one line on standard error.
fn mistake(folder: &TempDir, arguments: &[&str]) -> String {
    mistake_of(folder, "report", arguments)
}

fn mistake_of(folder: &TempDir, name: &str, arguments: &[&str]) -> String {
    let output = command(folder, name, arguments);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    assert_eq!(message.lines().count(), 1, "{arguments:?}: {message}");
    message
}

#[test]
fn the_command_writes_the_page_and_prints_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    for (name, optimizer, accuracy) in [("a", "sgd", 0.5), ("b", "sam", 0.625)] {
        run(folder.path(), name, &format!("optimizer = \"{optimizer}\"\n"), &[epoch(1, Some(1.0), accuracy, 4.0)]);
    }
    let output = polder(&folder, &["a", "b", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["report"], "report.html");
    assert_eq!(found["groups"][1]["name"], "sam");
    assert_eq!(
        found["groups"][1]["test_accuracy"],
        json!({"mean": 0.625, "deviation": null, "interval": null, "values": [0.625]})
    );
    assert_eq!(found["groups"][1]["runs"], json!(["b"]));
    assert!(folder.path().join("report.html").is_file(), "of several runs in the current folder");

    let output = polder(&folder, &["a"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().next(), Some("sgd: test accuracy 50 %, test loss 1 (1 run)"));
    assert!(folder.path().join("a/report.html").is_file(), "of one run in its folder");
    check_page(&std::fs::read_to_string(folder.path().join("a/report.html")).unwrap());
    assert!(!folder.path().join("a/tensorboard").exists(), "not asked for");
}

#[test]
fn paths_without_results_are_skipped_and_told() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), "good", "optimizer = \"sgd\"\n", &[epoch(1, Some(1.0), 0.5, 3.0)]);
    run(folder.path(), "silent", "optimizer = \"sgd\"\n", &["{\"kind\":".into()]);
    run(folder.path(), "begun", "optimizer = \"sgd\"\n", &[]);
    std::fs::remove_file(folder.path().join("begun/log.jsonl")).unwrap();
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    std::fs::write(folder.path().join("page.html"), "").unwrap();
    let paths = ["page.html", "silent", "missing", "good", "begun", "empty"];
    let output = polder(&folder, &paths);
    let told = String::from_utf8(output.stderr).unwrap();
    let of_several = folder.path().join("report.html").is_file() && !folder.path().join("good/report.html").exists();
    assert!(output.status.success() && of_several, "the place depends on the arguments alone: {told}");
    let reasons = [
        "page.html: not a run folder (it has no config.toml)",
        "silent/log.jsonl: no line of the log can be read, so there is nothing to report",
        "missing: No such file or directory (os error 2)",
        "begun/log.jsonl: No such file or directory (os error 2)",
        "empty: not a run folder (it has no config.toml)",
    ];
    assert_eq!(told, reasons.map(|reason| format!("skipped: {reason}\n")).concat());
    let output = polder(&folder, &["good", "silent", "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["skipped"], json!([{"path": "silent", "reason": reasons[1]}]));
}

#[test]
fn mistakes_are_told_in_one_line_that_names_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let log = [epoch(1, Some(1.0), 0.5, 3.0)];
    run(folder.path(), "good", "optimizer = \"sgd\"\n", &log);
    assert!(mistake(&folder, &[]).contains("<RUN>"));
    assert!(mistake(&folder, &["missing"]).contains("missing: No such file or directory"));
    assert!(mistake(&folder, &["missing", "page.html"]).contains("missing: No such file or directory"));
    assert!(!folder.path().join("report.html").exists(), "nothing is written of a comparison that failed");
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    assert!(mistake(&folder, &["empty"]).contains("empty: not a run folder (it has no config.toml)"));
    std::fs::write(folder.path().join("page.html"), "").unwrap();
    assert!(mistake(&folder, &["page.html", "empty"]).contains("page.html: not a run folder (it has no config.toml)"));
    run(folder.path(), "broken", "optimizer = \"sgd\"\nspeed = 3\n", &log);
    assert!(mistake(&folder, &["broken"]).contains("broken/config.toml: line 2: `speed` is not an option"));
    std::fs::write(folder.path().join("broken/config.toml"), "optimizer = \"sgd\"\n\nlr = = 3\n").unwrap();
    assert!(mistake(&folder, &["broken"]).contains("broken/config.toml: line 3: "));
    run(folder.path(), "silent", "optimizer = \"sgd\"\n", &["{\"kind\":".into()]);
    assert!(mistake(&folder, &["silent"]).contains("silent/log.jsonl: no line of the log can be read"));
    std::fs::remove_file(folder.path().join("silent/log.jsonl")).unwrap();
    assert!(mistake(&folder, &["silent"]).contains("silent/log.jsonl: No such file"));
    assert!(mistake(&folder, &["good", "--out", "no/such/page.html"]).contains("no/such/page.html: No such file"));
    assert!(mistake(&folder, &["good", "--out", "good"]).contains("good: Is a directory"));
    assert!(!folder.path().join("good.partial").exists(), "what was begun is removed");
}

/// The wall times of the events in a file for TensorBoard.
fn event_times(bytes: &[u8]) -> Vec<f64> {
    let (mut times, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        // After the length, its checksum and the tag of the field.
        times.push(f64::from_le_bytes(bytes[at + 13..at + 21].try_into().unwrap()));
        at += 16 + length;
    }
    times
}

#[test]
fn events_have_the_times_of_their_steps() {
    let folder = tempfile::tempdir().unwrap();
    let step = |step: u64| {
        json!({
            "kind": "step", "step": step, "epoch": 1, "loss": 2.0, "accuracy": 0.1, "lr": 0.1,
            "images_per_second": 10.0, "gradient_norm": 1.0, "skipped": 0,
        })
        .to_string()
    };
    let measured = curvature(2, &json!({"trace": {"value": 1.0}}));
    let log = [step(5), epoch(1, Some(1.0), 0.5, 8.0), step(15), epoch(2, Some(1.0), 0.5, 20.0), measured];
    let path = run(folder.path(), "run", "optimizer = \"sgd\"\n", &log);
    let end = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
    std::fs::OpenOptions::new().write(true).open(path.join("log.jsonl")).unwrap().set_modified(end).unwrap();
    let found = report(std::slice::from_ref(&path), None, true).unwrap();
    let times = event_times(&std::fs::read(&found.tensorboard[0]).unwrap());
    let before: Vec<f64> = times.iter().map(|time| 1_700_000_000.0 - time).collect();
    assert_eq!(before, [16.0, 16.0, 12.0, 6.0, 0.0, 0.0]);
}

#[test]
fn numbers_of_steps_are_drawn_unless_they_are_zero_throughout() {
    let folder = tempfile::tempdir().unwrap();
    let step = |step: u64| {
        json!({
            "kind": "step", "step": step, "epoch": 1, "loss": 2.0 + (step % 7) as f64, "accuracy": 0.1, "lr": 0.1,
            "images_per_second": 10.0, "gradient_norm": 1.0, "cosine_gradients": 0.5, "sharpness": 0.25,
            "dropped_alpha": step, "dropped_beta": 0, "skipped": 0,
        })
        .to_string()
    };
    let log: Vec<String> = (1..=500).map(step).chain([epoch(1, Some(1.0), 0.5, 3.0)]).collect();
    let path = run(folder.path(), "run", "optimizer = \"sgd\"\n", &log);
    let (html, _) = page(&[path]);
    let steps = html.split("<h2>Steps</h2>").nth(1).unwrap().split("</section>").next().unwrap();
    for title in
        ["Loss of the batch", "Cosine of the gradients", "Rise of the loss by the perturbation", "dropped alpha"]
    {
        assert!(steps.contains(&format!("<b>{title}")), "{title}");
    }
    assert!(!steps.contains("<b>dropped beta") && !steps.contains("<b>Skipped steps"), "zero throughout");
    // The mean over a window, before the values themselves.
    let loss = steps.split("<figure").nth(1).unwrap();
    assert!(loss.contains("<b>Loss of the batch") && loss.contains("stroke-opacity=\"0.3\""));
    assert!(loss.contains("&quot;raw&quot;:[[1.0,3.0]"));
    let learning = html.split("<h2>Learning curves</h2>").nth(1).unwrap().split("</section>").next().unwrap();
    assert!(learning.contains("<b>Skipped steps"), "three of the epoch");
}

#[test]
fn the_page_holds_its_numbers_as_csv() {
    let folder = tempfile::tempdir().unwrap();
    let log = [
        epoch(1, Some(2.0), 0.625, 3.0),
        epoch(2, None, 0.5, 6.0),
        curvature(2, &json!({"trace": {"value": 8.0, "standard_error": 0.5, "probes": 4}})),
    ];
    let path = run(folder.path(), "a \"b\"", "optimizer = \"sgd\"\nseed = 7\n", &log);
    let (html, _) = page(std::slice::from_ref(&path));
    let table = |name: &str| {
        let link = html.split(&format!("download=\"{name}.csv\" href=\"data:text/csv;charset=utf-8,")).nth(1).unwrap();
        let mut bytes = Vec::new();
        let mut rest = link.split('"').next().unwrap().bytes();
        while let Some(byte) = rest.next() {
            let hex: String =
                if byte == b'%' { rest.by_ref().take(2).map(char::from).collect() } else { String::new() };
            bytes.push(if byte == b'%' { u8::from_str_radix(&hex, 16).unwrap() } else { byte });
        }
        String::from_utf8(bytes).unwrap()
    };
    let run = format!("\"{}\",\"sgd\",\"7\"", path.display().to_string().replace('"', "\"\""));
    let epochs = "run,group,seed,epoch,train_loss,test_loss,test_accuracy,lr,gradient_norm,images_per_second,seconds";
    assert_eq!(table("epochs"), format!("{epochs}\n{run},1,1,2,0.625,0.1,2,100,3\n{run},2,,,0.5,0.05,2,200,6\n"));
    assert_eq!(table("curvature"), format!("run,group,seed,measure,value,error\n{run},\"trace\",8,0.5\n"));
}

#[test]
fn many_groups_are_rows() {
    let folder = tempfile::tempdir().unwrap();
    let make = |rho: u32| {
        let settings = format!("optimizer = \"sam\"\nrho = 0.{rho}\n");
        traced(folder.path(), &format!("{rho}"), &settings, f64::from(rho), Some(0.5))
    };
    let runs: Vec<PathBuf> = (1..=9).map(make).collect();
    let (html, _) = page(&runs);
    let settings = html.split("<h2>Settings</h2>").nth(1).unwrap();
    assert_eq!(row(settings, "Setting")[..2], ["Setting", "Value"], "what all have in common");
    assert_eq!(row(settings, "sam, rho 0.3"), ["sam, rho 0.3", "0.3", "–", ""]);
    let at_the_end = html.split("<h2>Curvature at the end</h2>").nth(1).unwrap();
    assert_eq!(row(at_the_end, "sam, rho 0.3")[1], "3.00 ± 0.50");
}

#[test]
fn contours_show_the_basin() {
    let folder = tempfile::tempdir().unwrap();
    // Most of the plane is near the minimum, and the edges are far above.
    landscape(folder.path(), "basin", 2, 121, |x, y| 2.18 + 114.0 * (0.5 * x * x + 0.5 * y * y).powi(3));
    landscape_pictures(folder.path()).unwrap();
    let text = std::fs::read_to_string(folder.path().join("contour.svg")).unwrap();
    let document = roxmltree::Document::parse(&text).unwrap();
    let labels: Vec<f64> = document
        .descendants()
        .filter(|node| node.attribute("text-anchor") == Some("start"))
        .filter_map(|node| node.text()?.parse().ok())
        .collect();
    assert!(labels.iter().filter(|&&level| level < 5.0).count() >= 3, "levels below 5: {labels:?}");
    // The same texts on the lines of the levels.
    let on_lines = document.descendants().filter(|node| node.attribute("text-anchor") == Some("middle"));
    let levels: Vec<f64> = on_lines.filter_map(|node| node.text()?.parse().ok()).collect();
    assert!(levels.iter().filter(|level| labels.contains(level)).count() >= 4, "{levels:?}");
    let contour = check_picture(&folder.path().join("contour"));
    // Within the former lowest band: at 0 and at 0.6 from the minimum.
    let (side, left, top, width, height) = (300.0, 58.0, 34.0, 454.0, 376.0);
    let at = |x: f64, y: f64| {
        pixel(&contour, (left + side * (0.5 + 0.5 * x)) / width, (top + side * (0.5 - 0.5 * y)) / height)
    };
    assert_ne!(at(0.13, 0.03), at(0.53, 0.33));
}

#[test]
fn layers_are_in_the_order_of_the_network() {
    let folder = tempfile::tempdir().unwrap();
    let names = [
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
        "layer1.0.conv1.weight",
        "layer1.0.bn1.weight",
        "layer1.0.conv2.weight",
        "layer1.0.downsample.0.weight",
        "layer1.10.conv1.weight",
        "layer2.0.conv1.weight",
        "fc.weight",
        "fc.bias",
    ];
    let layers: serde_json::Map<String, Value> =
        names.map(|name| (name.into(), json!({"value": 1.0}))).into_iter().collect();
    let log = [epoch(1, Some(1.0), 0.5, 1.0), curvature(1, &json!({"layer-traces": {"layers": layers}}))];
    let (html, _) = page(&[run(folder.path(), "run", "optimizer = \"sgd\"\n", &log)]);
    let chart = html.split("Curvature by layer</h2>").nth(1).unwrap().split("</svg>").next().unwrap();
    let places = names.map(|name| chart.find(&format!(">{name}</text>")).unwrap());
    assert!(places.is_sorted(), "{places:?}");
}

#[test]
fn learning_rates_are_on_a_linear_axis_whatever_their_range() {
    let folder = tempfile::tempdir().unwrap();
    let log: Vec<String> = (1..=100).map(|at| epoch(at, Some(1000.0 / at as f64), 0.5, at as f64)).collect();
    let (html, _) = page(&[run(folder.path(), "run", "optimizer = \"sgd\"\n", &log)]);
    let is_logarithmic = |title: &str| {
        let figure = html.split("<figure").find(|figure| figure.contains(&format!("<b>{title}"))).unwrap();
        figure.split("&quot;y&quot;:{").nth(1).unwrap().split('}').next().unwrap().contains("&quot;log&quot;:true")
    };
    assert!(is_logarithmic("Test loss") && !is_logarithmic("Learning rate"), "both span two decades");
}

/// A landscape of a known run.
fn known_landscape(folder: &Path) {
    landscape(folder, "bowl", 2, 121, |x, y| 1.0 + x * x + 3.0 * y * y);
    let path = folder.join("landscape.json");
    let mut described: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    described["subject"] = json!("sam · resnet8 · CIFAR-10");
    std::fs::write(path, described.to_string()).unwrap();
}

/// The contours of a landscape with some settings: as SVG, as PNG, and the streams of the PDF.
fn contour(folder: &Path, change: impl FnOnce(&mut PictureSettings)) -> (String, Pixmap, Vec<String>) {
    let mut settings = PictureSettings { draw: vec![PictureName::Contour], ..PictureSettings::default() };
    change(&mut settings);
    let out = tempfile::tempdir().unwrap();
    let written = pictures(folder, Some(out.path()), &settings).unwrap();
    let read = |index: usize| std::fs::read(&written[index]).unwrap();
    let svg = String::from_utf8(read(0)).unwrap();
    roxmltree::Document::parse(&svg).unwrap();
    (svg, Pixmap::decode_png(&read(1)).unwrap(), streams(&read(2)))
}

/// The objects of a PDF outside of its streams, and then the streams, with each byte as a character.
fn streams(pdf: &[u8]) -> Vec<String> {
    use std::io::Read;
    assert!(pdf.starts_with(b"%PDF-") && pdf.ends_with(b"%%EOF"));
    let text = |bytes: &[u8]| bytes.iter().map(|&byte| char::from(byte)).collect::<String>();
    let whole = text(pdf);
    let mut found = vec![String::new()];
    for part in whole.split("\nendstream") {
        let Some((before, stream)) = part.split_once("stream\n") else {
            found[0] += part;
            continue;
        };
        found[0] += before;
        let bytes: Vec<u8> = stream.chars().map(|character| character as u8).collect();
        let mut plain = Vec::new();
        flate2::read::ZlibDecoder::new(&bytes[..]).read_to_end(&mut plain).unwrap();
        found.push(text(&plain));
    }
    found
}

/// The texts of an SVG.
fn texts(svg: &str) -> Vec<String> {
    let document = roxmltree::Document::parse(svg).unwrap();
    let labels = document.descendants().filter(|node| node.has_tag_name("text"));
    labels.map(|node| node.text().unwrap().to_string()).collect()
}

#[test]
fn a_picture_is_text_and_lines_in_pdf() {
    let folder = tempfile::tempdir().unwrap();
    known_landscape(folder.path());
    let (svg, _, pdf) = contour(folder.path(), |_| {});
    assert_eq!(texts(&svg)[..2], ["sam · resnet8 · CIFAR-10", "bowl"]);
    let page = pdf.iter().find(|stream| stream.contains("BT\n")).unwrap();
    assert_eq!(page.matches("Tj").count(), texts(&svg).len(), "{page}");
    assert!(page.matches(" l\n").count() > 100 && !pdf[0].contains("/Image"), "contours are lines");
    assert!(pdf[0].contains("/BaseFont /POLDER+DejaVuSans") && pdf[0].contains("/FontFile2"), "{}", pdf[0]);
    // Every character of the labels can be found again, with its place in the embedded font.
    let characters = pdf.iter().find(|stream| stream.contains("beginbfchar")).unwrap();
    for character in texts(&svg).concat().chars() {
        let code = format!("{:04X}>", u32::from(character));
        assert!(characters.to_uppercase().contains(&code), "{character}: {characters}");
    }
    // The same files give the same bytes.
    assert_eq!(contour(folder.path(), |_| {}).2, pdf);
}

#[test]
fn size_and_ground_of_a_picture_are_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    known_landscape(folder.path());
    let size = |svg: &str| {
        let document = roxmltree::Document::parse(svg).unwrap();
        ["width", "height"].map(|key| millimetres(&document, key))
    };
    let (svg, png, pdf) = contour(folder.path(), |look| {
        (look.width, look.height, look.dpi, look.transparent) = (Some(84.0), Some(70.0), 300.0, true);
    });
    assert_eq!(size(&svg), [84.0, 70.0]);
    assert_eq!([png.width(), png.height()], [992, 827], "84 mm and 70 mm at 300 per inch");
    assert_eq!(png.pixel(0, 0).unwrap().alpha(), 0);
    assert!(!svg.contains("<rect"), "nothing behind it");
    let corner = |text: &str| text.split("MediaBox [0 0 ").nth(1).unwrap().split(']').next().unwrap().to_string();
    let points: Vec<f64> = corner(&pdf[0]).split(' ').map(|length| length.parse().unwrap()).collect();
    assert!((points[0] - 84.0 * 72.0 / 25.4).abs() < 0.01 && (points[1] - 70.0 * 72.0 / 25.4).abs() < 0.01);
    let (svg, png, _) = contour(folder.path(), |look| look.width = Some(84.0));
    assert!(svg.contains("<rect") && png.pixel(0, 0).unwrap().alpha() == 255);
    let [width, height] = size(&svg);
    assert!(width == 84.0 && height > 50.0 && height < 84.0, "the axes stay square: {height}");
    let (svg, _, _) = contour(folder.path(), |look| look.height = Some(70.0));
    assert!(size(&svg)[1] == 70.0 && size(&svg)[0] > 70.0);
    // The resolution is in the PNG: 300 per inch are 11811 per metre.
    let out = folder.path().join("out");
    let look = PictureSettings { dpi: 300.0, ..PictureSettings::default() };
    pictures(folder.path(), Some(&out), &look).unwrap();
    let bytes = std::fs::read(out.join("surface.png")).unwrap();
    let chunk = [&b"pHYs"[..], &11811u32.to_be_bytes(), &11811u32.to_be_bytes(), &[1]].concat();
    assert!(bytes.windows(chunk.len()).any(|part| part == chunk));
}

#[test]
fn title_and_font_of_a_picture_are_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    known_landscape(folder.path());
    let (usual, usual_png, _) = contour(folder.path(), |_| {});
    let (svg, _, _) = contour(folder.path(), |look| look.title = Some("Own <title>".into()));
    assert_eq!(texts(&svg)[0], "Own <title>");
    assert_eq!(texts(&svg)[1..], texts(&usual)[2..], "instead of both lines");
    let (svg, _, _) = contour(folder.path(), |look| look.title = Some(String::new()));
    assert_eq!(texts(&svg), texts(&usual)[2..]);
    let long = "word ".repeat(30);
    let (svg, _, _) = contour(folder.path(), |look| look.title = Some(long.clone()));
    assert!(texts(&svg)[..3].iter().all(|line| line.starts_with("word word")), "it is wrapped: {:?}", texts(&svg));

    let (svg, png, pdf) = contour(folder.path(), |look| look.font = "serif".into());
    assert!(svg.contains("font-family=\"DejaVu Serif, ") && pdf[0].contains("POLDER+DejaVuSerif"));
    assert_ne!(png.data(), usual_png.data());
    let file = folder.path().join("own.ttf");
    std::fs::write(&file, dejavu::sans_mono::bold()).unwrap();
    let (svg, _, pdf) = contour(folder.path(), |look| look.font = file.to_str().unwrap().into());
    assert!(svg.contains("font-family=\"&#39;DejaVu Sans Mono&#39;, "), "{}", &svg[..400]);
    assert!(pdf[0].contains("POLDER+DejaVuSansMono-Bold"));
    // Labels of 11 units are twice as large if there are half as many units in the same width.
    let units = |size: f64| {
        let (svg, _, _) = contour(folder.path(), |look| (look.font_size, look.width) = (size, Some(150.0)));
        let width = svg.split("viewBox=\"0 0 ").nth(1).unwrap().split(' ').next().unwrap().to_string();
        width.parse::<f64>().unwrap()
    };
    assert!(abs_diff_eq!(units(6.0) / units(12.0), 2.0, epsilon = 1e-3));
}

#[test]
fn levels_and_colours_of_a_picture_are_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    known_landscape(folder.path());
    // Labels of the colour bar begin at their place.
    let bar = |svg: &str| -> Vec<f64> {
        let document = roxmltree::Document::parse(svg).unwrap();
        let labels = document.descendants().filter(|node| node.attribute("text-anchor") == Some("start"));
        labels.filter_map(|node| node.text()?.parse().ok()).collect()
    };
    let (usual, _, _) = contour(folder.path(), |_| {});
    let (svg, _, _) = contour(folder.path(), |look| look.levels = Some(vec![1.25, 2.0, 3.5]));
    assert_eq!(bar(&svg), [1.25, 2.0, 3.5]);
    let (svg, _, _) = contour(folder.path(), |look| look.level_count = 4);
    assert!(bar(&svg).len() < bar(&usual).len(), "{:?} and {:?}", bar(&svg), bar(&usual));
    let grey = |svg: &str| {
        let colours = svg.split("fill=\"#").skip(1).map(|rest| rest[..6].to_string());
        colours.filter(|colour| colour[..2] != colour[2..4] || colour[2..4] != colour[4..6]).count() == 0
    };
    let (svg, _, _) = contour(folder.path(), |look| look.colour_map = ColourMap::Grey);
    assert!(grey(&svg) && !grey(&usual));
    for map in [ColourMap::Viridis, ColourMap::Magma, ColourMap::Coolwarm] {
        assert_ne!(contour(folder.path(), |look| look.colour_map = map).0, usual, "{map}");
    }
    let look = PictureSettings { format: vec![PictureFormat::Pdf], ..PictureSettings::default() };
    let names = |paths: Vec<PathBuf>| {
        paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names(pictures(folder.path(), None, &look).unwrap()), ["contour.pdf", "surface.pdf", "accuracy.pdf"]);
}

#[test]
fn the_command_draws_what_a_run_has_and_mistakes_are_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = run(folder.path(), "run", "optimizer = \"sam\"\n", &[epoch(1, Some(1.0), 0.5, 3.0)]);
    known_landscape(&path.join("landscape"));
    landscape(&path.join("landscape-line"), "line", 1, 11, |x, _| 1.0 + x * x);
    let measures = json!({"spectrum": {"nodes": [-1.0, 0.0, 8.0], "weights": [0.2, 0.7, 0.1]}});
    let found = json!({"subject": "sam · resnet8 · CIFAR-10", "measures": measures});
    std::fs::write(path.join("curvature.json"), found.to_string()).unwrap();
    let output = command(&folder, "picture", &["run", "--draw", "curve,contour,spectrum", "--format", "pdf"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected = ["landscape/contour.pdf", "landscape-line/curve.pdf", "spectrum.pdf"];
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(told, expected.map(|path| format!("picture: run/{path}\n")).concat());

    std::fs::create_dir(folder.path().join("empty")).unwrap();
    std::fs::write(folder.path().join("no.ttf"), "no font").unwrap();
    let plane = "run/landscape";
    for (wrong, words) in [
        (&["absent"][..], &["absent: No such file or directory"][..]),
        (&["empty"], &["empty: has no landscape"]),
        (&["run", "--out", "o"], &["--out: ", "2 landscapes"]),
        (&[plane, "run/landscape-line", "--out", "o"], &["--out: ", "one folder"]),
        (&[plane, "--colour-map", "rainbow"], &["--colour-map", "rainbow", "viridis"]),
        (&[plane, "--levels", "2,1"], &["--levels: 2,1", "each above the last"]),
        (&[plane, "--levels", "nan"], &["--levels"]),
        (&[plane, "--level-count", "1"], &["--level-count: 1"]),
        (&[plane, "--width", "20"], &["--width: ", "too little room"]),
        (&[plane, "--height", "5"], &["--height: ", "too little room"]),
        (&[plane, "--width", "-3"], &["--width: -3"]),
        (&[plane, "--dpi", "0"], &["--dpi: 0"]),
        (&[plane, "--dpi", "20000"], &["--dpi: 20000", "pixels"]),
        (&[plane, "--font-size", "inf"], &["--font-size: inf"]),
        (&[plane, "--font-size", "1e-9", "--width", "80"], &["--font-size: ", "too small"]),
        (&[plane, "--font-size", "1e9", "--format", "svg"], &["--font-size: ", "too large"]),
        (&[plane, "--width", "10001", "--format", "svg"], &["--width: 10001, expected at most 10000"]),
        (&[plane, "--font", "no.ttf"], &["--font: no.ttf", "sans, serif, mono"]),
        (&[plane, "--font", "absent.ttf"], &["--font: absent.ttf: No such file"]),
        (&[plane, "--draw", "curve"], &["run/landscape: has none of the pictures"]),
        (&[plane, "--format", "gif"], &["--format", "gif"]),
    ] {
        let message = mistake_of(&folder, "picture", wrong);
        assert!(words.iter().all(|word| message.contains(word)), "{wrong:?}: {message}");
    }
    let held = hold(&path.join("landscape")).unwrap();
    assert!(mistake_of(&folder, "picture", &[plane]).contains("landscape: another process writes to it"));
    drop(held);
}

#[test]
fn labels_of_wide_ranges_lie_apart() {
    let folder = tempfile::tempdir().unwrap();
    for (ends, loss) in [(1e3, 1e20), (1e-7, 1.0), (12_345.0, 3e-9), (0.333, 5e5)] {
        let values = [-ends, 0.0, ends];
        let axis = |name: &str| json!({"name": name, "values": values});
        let description = json!({"title": "t", "axes": [axis("direction 1"), axis("direction 2")]});
        std::fs::write(folder.path().join("landscape.json"), description.to_string()).unwrap();
        let rows = values.iter().flat_map(|y| values.map(|x| (x, *y)));
        let row = |(x, y): (f64, f64)| format!("{x},{y},{},0.5\n", loss * (1.0 + x.abs() / ends + (y / ends).powi(2)));
        let text: String = rows.map(row).collect();
        std::fs::write(folder.path().join("landscape.csv"), format!("x,y,loss,accuracy\n{text}")).unwrap();
        for width in [None, Some(120.0), Some(90.0), Some(70.0)] {
            let look = PictureSettings { width, title: Some(String::new()), ..PictureSettings::default() };
            for picture in pictures(folder.path(), None, &look).unwrap() {
                if picture.extension().is_some_and(|extension| extension == "svg") {
                    check_labels(&std::fs::read_to_string(&picture).unwrap(), &picture, ends);
                }
            }
        }
    }
}

/// Checks that no two labels of a picture overlap, as far as the width of a digit tells.
fn check_labels(svg: &str, path: &Path, ends: f64) {
    let document = roxmltree::Document::parse(svg).unwrap();
    let labels =
        document.descendants().filter(|node| node.has_tag_name("text") && node.attribute("transform").is_none());
    let boxes: Vec<(f64, f64, f64, &str)> = labels
        .map(|node| {
            let number = |key: &str| node.attribute(key).unwrap().parse::<f64>().unwrap();
            let text = node.text().unwrap();
            // A digit of DejaVu Sans has 0.636 of the size.
            let width = 0.63 * number("font-size") * text.chars().count() as f64;
            let left = match node.attribute("text-anchor").unwrap() {
                "start" => number("x"),
                "middle" => number("x") - 0.5 * width,
                _ => number("x") - width,
            };
            (left, left + width, number("y"), text)
        })
        .collect();
    for (index, a) in boxes.iter().enumerate() {
        for b in &boxes[index + 1..] {
            let apart = a.1 <= b.0 || b.1 <= a.0 || (a.2 - b.2).abs() >= 10.0;
            assert!(apart, "{} with ends at {ends}: {a:?} and {b:?}", path.display());
        }
    }
}

#[test]
fn runs_that_diverged_or_are_unfinished_are_marked_and_not_in_the_means() {
    let folder = tempfile::tempdir().unwrap();
    let make = |optimizer: &str, seed: u64, accuracies: &[f64], diverged: bool| {
        let mut log: Vec<String> =
            (1..).zip(accuracies).map(|(at, &share)| epoch(at, Some(1.0), share, at as f64)).collect();
        if diverged {
            let last: Value = serde_json::from_str(&epoch(log.len() as u64 + 1, None, 0.0, 99.0)).unwrap();
            let mut last = last.as_object().unwrap().clone();
            last.insert("diverged".into(), true.into());
            last.insert("device".into(), "NVIDIA H200".into());
            log.push(json!(last).to_string());
        }
        let settings = format!("optimizer = \"{optimizer}\"\nepochs = 3\nseed = {seed}\ndevice = \"auto\"\n");
        run(folder.path(), &format!("{optimizer}-{seed}"), &settings, &log)
    };
    let runs = [
        make("sgd", 0, &[0.5, 0.6, 0.7], false),
        make("sgd", 1, &[0.5, 0.6], true),
        make("sgd", 2, &[0.5], false),
        make("sgd", 3, &[0.5, 0.6, 0.72], false),
        make("sam", 0, &[0.3, 0.4], false),
        make("gam", 0, &[0.45], true),
        make("gam", 1, &[], true),
    ];
    let (html, found) = page(&runs);
    assert_eq!(row(&html, "sgd")[1..5], ["71 ± 13 %", "1 ± 0", "2 of 4", "3"]);
    assert_eq!(found.groups[0].test_accuracy.values, [0.7, 0.72], "of the finished runs");
    assert_eq!(
        (&found.groups[0].diverged, &found.groups[0].unfinished),
        (&vec![runs[1].clone()], &vec![runs[2].clone()])
    );
    assert_eq!(row(&html, "sam")[1..5], ["40 %", "1", "1", "2 of 3"], "what an unfinished run has");
    assert_eq!(row(&html, "gam")[1..5], ["45 %", "1", "2", "0, 1 of 3"], "before it diverged");
    assert!(!html.contains("class=\"best\"") && html.contains("a group has no finished run"));
    let states = |path: &PathBuf| row(&html, path.to_str().unwrap())[3..8].join(" | ");
    assert_eq!(states(&runs[0]), "finished | 30 | 3 | 70.00 % | 1");
    assert_eq!(states(&runs[1]), "diverged in epoch 3 | 30 | 3 | 60.00 % | 1");
    assert_eq!(states(&runs[2]), "unfinished, 1 of 3 epochs | 10 | 3 | 50.00 % | 1");
    assert_eq!(states(&runs[6]), "diverged in epoch 1 | 10 | 3 | – | –");
    assert!(html.contains(&format!("{}: diverged in epoch 3; not in the mean.", runs[1].display())));
    assert!(row(&html, runs[1].to_str().unwrap()).contains(&"NVIDIA H200".to_string()), "the chip of the log");
    assert!(row(&html, runs[0].to_str().unwrap()).contains(&"auto".to_string()), "a log without it");
    let curve = html.split("<b>Test accuracy</b>").nth(1).unwrap().split("</svg>").next().unwrap();
    assert!(curve.contains("<title>sgd: 71 at 3</title>") && curve.contains("<title>gam: 45 at 1</title>"), "{curve}");
    assert!(!curve.contains("<title>gam: 0 at "), "what the epoch in which it diverged has: {curve}");
    let line = found.groups[0].to_string();
    assert_eq!(line, "sgd: test accuracy 71 ± 13 %, test loss 1 ± 0 (4 runs, 1 diverged, 1 unfinished)");

    let steps = run(folder.path(), "steps", "optimizer = \"sgd\"\nsteps = 25\n", &[epoch(1, Some(1.0), 0.5, 1.0)]);
    let (html, _) = page(std::slice::from_ref(&steps));
    assert_eq!(row(&html, steps.to_str().unwrap())[3], "unfinished, 10 of 25 steps");
}

#[test]
fn a_page_in_the_folder_of_a_run_waits_for_no_other_command() {
    let folder = tempfile::tempdir().unwrap();
    let path = run(folder.path(), "run", "optimizer = \"sgd\"\n", &[epoch(1, Some(1.0), 0.5, 3.0)]);
    let held = hold(&path).unwrap();
    let message = mistake(&folder, &["run"]);
    assert!(message.contains("--out: run: another process writes to it; give another place"), "{message}");
    assert!(!path.join("report.html").exists());
    let output = polder(&folder, &["run", "--out", "elsewhere.html"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    drop(held);
    assert!(polder(&folder, &["run"]).status.success() && path.join("report.html").is_file());
    // A page replaces a page, and no other file.
    assert!(polder(&folder, &["run"]).status.success());
    for other in ["run/config.toml", "run/log.jsonl"] {
        let before = std::fs::read(folder.path().join(other)).unwrap();
        let message = mistake(&folder, &["run", "--out", other]);
        assert!(message.contains(&format!("{other}: is there, and is no report of polder")), "{message}");
        assert_eq!(std::fs::read(folder.path().join(other)).unwrap(), before);
    }
}

#[test]
fn curves_of_steps_bring_their_values_for_the_script_to_smooth() {
    let folder = tempfile::tempdir().unwrap();
    let step = |at: u64| {
        json!({
            "kind": "step", "step": at, "epoch": 1, "loss": (at % 7) as f64, "accuracy": 0.5, "lr": 0.1,
            "images_per_second": 10.0, "gradient_norm": 1.0, "skipped": 0,
        })
        .to_string()
    };
    let of = |count: u64| {
        let log: Vec<String> = (1..=count).map(step).chain([epoch(1, Some(1.0), 0.5, 1.0)]).collect();
        let (html, _) = page(&[run(folder.path(), &format!("run-{count}"), "optimizer = \"sgd\"\n", &log)]);
        let figure = html.split("<figure").find(|figure| figure.contains("<b>Loss of the batch")).unwrap().to_string();
        let data = figure.split("data-chart=\"").nth(1).unwrap().split('"').next().unwrap().replace("&quot;", "\"");
        let chart: Value = serde_json::from_str(&data).unwrap();
        chart["lines"][0].clone()
    };
    let short = of(50);
    assert_eq!((&short["window"], short["parts"].as_array().unwrap().len()), (&1.into(), 50));
    assert_eq!(short["parts"][9], json!([10.0, 3.0, 1]));
    let long = of(500);
    assert_eq!((&long["window"], long["parts"].as_array().unwrap().len()), (&11.into(), 500));
    let longest = of(10_000);
    let parts = longest["parts"].as_array().unwrap();
    assert!(parts.len() <= 720 && longest["window"] == 201, "{}", parts.len());
    let count: u64 = parts.iter().map(|part| part[2].as_u64().unwrap()).sum();
    let sum: f64 = parts.iter().map(|part| part[1].as_f64().unwrap() * part[2].as_f64().unwrap()).sum();
    assert!(count == 10_000 && (sum / 10_000.0 - 3.0).abs() < 0.01, "{count} {sum}");
}
