//! `polder sweep`: runs over a grid of options, several at a time.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use polder::report::report;
use polder::settings::SettingValue;
use polder::train::{Options, Recipe, TrainError, hold, options, write_whole};
use serde::{Deserialize, Serialize};
use serde_json::json;
use signal_hook::iterator::Signals;

use super::flags::{Flags, OfRun};
use super::{Failure, counted, ending_signals, option, print, shown, tell, tell_error};

#[derive(clap::Args)]
pub struct SweepArgs {
    /// Values of an option, each of which is combined with those of every other --vary: --vary rho=0.05,0.1,0.2 --vary
    /// seed=0,1,2. Values that contain commas are separated by semicolons
    #[arg(long, value_name = "OPTION=VALUES", required_unless_present = "case", help_heading = "Sweep")]
    vary: Vec<String>,
    /// Options that belong together: --case "optimizer=sgd" --case "optimizer=sam rho=0.1". Each case is combined with
    /// every value of --vary
    #[arg(long, value_name = "OPTION=VALUE …", help_heading = "Sweep")]
    case: Vec<String>,
    /// The folder of the sweep, with a folder for each run. The same command continues a sweep
    #[arg(long, value_name = "DIR", help_heading = "Sweep")]
    out: PathBuf,
    /// Runs at the same time. Each gets its share of the CPU's cores, unless --threads is given
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=512), help_heading = "Sweep")]
    jobs: u16,
    #[command(flatten)]
    options: Flags<OfRun>,
    /// Begin with the settings of a published experiment (see `polder recipes`); other options replace them
    #[arg(long, value_name = "NAME", conflicts_with = "config", help_heading = "Run")]
    recipe: Option<String>,
    /// Read options from this file; those on the command line replace them
    #[arg(long, value_name = "FILE.toml", help_heading = "Run")]
    config: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long, help_heading = "Run")]
    json: bool,
}

/// The most runs of a sweep.
const MOST_RUNS: usize = 10_000;

/// The file of the results.
const RESULTS: &str = "sweep.json";

/// One run of a sweep.
struct Planned {
    /// The name of its folder.
    name: String,
    /// The same without the seed.
    group: String,
    /// Threads of the CPU; 0 for its share of the cores.
    threads: usize,
    /// Its settings as TOML.
    settings: String,
}

/// The result of a run, as `sweep.json` keeps it.
#[derive(Clone, Serialize, Deserialize)]
struct Finished {
    /// Test accuracy; none if the run diverged.
    accuracy: Option<f64>,
    /// The best accuracy of an epoch on the validation images, if there are any.
    validation: Option<f64>,
}

/// What `polder train --json` prints, as far as it is needed here.
#[derive(Deserialize)]
struct Printed {
    interrupted: bool,
    diverged: bool,
    test: Option<PrintedTest>,
    best_validation_accuracy: Option<f64>,
}

#[derive(Deserialize)]
struct PrintedTest {
    accuracy: f64,
}

type Assignment = (String, SettingValue, String);

/// `OPTION=VALUE` as an option, its value and its text.
fn assignment(flag: &str, name: &str, text: &str) -> Result<Assignment, TrainError> {
    let list = options();
    let Some(found) = list.iter().find(|found| found.setting.name == name) else {
        return Err(option(flag, format!("{name}: there is no such option of `polder train`")));
    };
    let value = found.setting.parse(text).map_err(|error| option(flag, error))?;
    Ok((name.into(), value, text.into()))
}

fn split<'a>(flag: &str, text: &'a str) -> Result<(&'a str, &'a str), TrainError> {
    let parts = text.split_once('=').filter(|(name, value)| !name.is_empty() && !value.is_empty());
    let (name, value) =
        parts.ok_or_else(|| option(flag, format!("{text}: expected an option and its value, such as rho=0.1")))?;
    Ok((name.trim().trim_start_matches("--"), value.trim()))
}

/// All combinations, in the order of the flags: the last one changes fastest.
fn combinations(args: &SweepArgs) -> Result<Vec<Vec<Assignment>>, TrainError> {
    let mut axes: Vec<Vec<Vec<Assignment>>> = Vec::new();
    if !args.case.is_empty() {
        let case = |text: &String| -> Result<Vec<Assignment>, TrainError> {
            let parts = text.split_whitespace().map(|part| split("case", part));
            parts.map(|part| part.and_then(|(name, value)| assignment("case", name, value))).collect()
        };
        axes.push(args.case.iter().map(case).collect::<Result<_, _>>()?);
    }
    for text in &args.vary {
        let (name, values) = split("vary", text)?;
        let separator = if values.contains(';') { ';' } else { ',' };
        let one = |value: &str| assignment("vary", name, value.trim()).map(|found| vec![found]);
        axes.push(values.split(separator).map(one).collect::<Result<_, _>>()?);
    }
    let all = axes.iter().try_fold(1usize, |product, axis| product.checked_mul(axis.len()));
    if all.is_none_or(|all| all > MOST_RUNS) {
        return Err(option("vary", format!("more than {MOST_RUNS} runs")));
    }
    let mut found = vec![Vec::new()];
    for axis in axes {
        let with = |before: &Vec<Assignment>| {
            let before = before.clone();
            axis.iter().map(move |more| [&before[..], more].concat()).collect::<Vec<_>>()
        };
        found = found.iter().flat_map(with).collect();
    }
    for combination in &found {
        let mut names: Vec<&str> = combination.iter().map(|(name, ..)| name.as_str()).collect();
        names.sort_unstable();
        let twice = names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        if let Some(name) = twice.or(names.iter().copied().find(|name| args.options.given.has(name))) {
            return Err(option("vary", format!("{name} is given twice")));
        }
    }
    Ok(found)
}

/// The name of a folder from options and values.
fn folder_name(parts: &[&Assignment]) -> String {
    let part = |(name, _, text): &&Assignment| {
        let last = Path::new(text).file_name().map_or_else(|| text.clone(), |last| last.to_string_lossy().into_owned());
        let safe =
            |character: char| if character.is_alphanumeric() || ".-+".contains(character) { character } else { '-' };
        format!("{name}-{}", last.chars().map(safe).collect::<String>())
    };
    parts.iter().map(part).collect::<Vec<_>>().join("_")
}

/// The runs with their settings, all checked.
fn plan(args: &SweepArgs) -> Result<Vec<Planned>, TrainError> {
    let below = match (&args.config, &args.recipe) {
        (Some(file), _) => Options::from_file(file)?,
        (None, Some(name)) => Recipe::find(name)?.options()?,
        (None, None) => Options::default(),
    };
    let mut planned: Vec<Planned> = Vec::new();
    for combination in combinations(args)? {
        let (seeds, others): (Vec<&Assignment>, _) = combination.iter().partition(|(name, ..)| name == "seed");
        let chosen: Options = combination.iter().map(|(name, value, _)| (name.clone(), value.clone())).collect();
        let all = chosen.over(args.options.given.clone().over(below.clone()));
        let group = folder_name(&others);
        let name = folder_name(&[others, seeds].concat());
        let settings = all.resolve().map_err(|error| match error {
            TrainError::Setting { name: setting, reason } => {
                let reason = format!("{reason} (in the run {name})");
                TrainError::Setting { name: setting, reason }
            }
            error => error,
        })?;
        let settings = settings.with_absolute_paths();
        if planned.iter().any(|other| other.name == name) {
            return Err(option("vary", format!("two runs have the name {name}")));
        }
        planned.push(Planned { name, group, threads: settings.run.threads, settings: settings.to_toml()? });
    }
    Ok(planned)
}

/// The results of earlier parts of the sweep.
fn results(path: &Path) -> Result<BTreeMap<String, Finished>, TrainError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(source) => return Err(TrainError::Io { path: path.into(), source }),
    };
    serde_json::from_str(&text).map_err(|error| TrainError::Results { path: path.into(), reason: error.to_string() })
}

/// A file about a run, which does not lie in its folder.
fn beside(args: &SweepArgs, run: &Planned, ending: &str) -> PathBuf {
    args.out.join("settings").join(format!("{}.{ending}", run.name))
}

/// Writes the settings of a run, which stay the same for the whole sweep.
fn keep_settings(args: &SweepArgs, run: &Planned) -> Result<(), TrainError> {
    let path = beside(args, run, "toml");
    match std::fs::read_to_string(&path) {
        Ok(found) if found == run.settings => Ok(()),
        Ok(_) => {
            let reason = format!("{}: the sweep there has other settings; choose another folder", path.display());
            Err(option("out", reason))
        }
        Err(_) => write_whole(&path, run.settings.as_bytes()),
    }
}

/// How often a signal has asked the sweep to stop: once, so that every run stops after its step, or again, so that all
/// stop at once.
struct Asked(Arc<AtomicUsize>);

impl Asked {
    fn by_signals() -> Self {
        let asked = Arc::new(AtomicUsize::new(0));
        // Without handlers a signal ends the program, but the work can go on.
        if let Ok(mut signals) = Signals::new(ending_signals()) {
            let count = asked.clone();
            let listen = move || {
                for _ in signals.forever() {
                    if count.fetch_add(1, Ordering::Relaxed) == 0 {
                        tell("stopping after this step of each run; send the signal again to stop at once");
                    }
                }
            };
            drop(std::thread::Builder::new().spawn(listen));
        }
        Self(asked)
    }

    fn to_stop(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    fn to_stop_at_once(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 1
    }
}

/// Why a run has no result.
enum Unfinished {
    Stopped,
    Failed(String),
}

/// Trains one run in a process of its own, from where it was stopped.
fn train(args: &SweepArgs, run: &Planned, asked: &Asked) -> Result<Finished, Unfinished> {
    let failed = |error: std::io::Error| Unfinished::Failed(error.to_string());
    let (folder, messages) = (args.out.join(&run.name), beside(args, run, "log"));
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command.args(["train", "--json", "--quiet"]);
    if folder.join("config.toml").exists() {
        command.arg("--resume").arg(&folder);
    } else {
        command.arg("--config").arg(beside(args, run, "toml")).arg("--out").arg(&folder);
    }
    if run.threads == 0 {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        command.arg("--threads").arg((cores / usize::from(args.jobs)).max(1).to_string());
    }
    // A signal of the terminal reaches this process alone, which passes it on once: a second one would stop a run
    // without saving it.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let log = File::create(&messages).map_err(failed)?;
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().map_err(failed)?;
    let mut told = false;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            break status;
        }
        if asked.to_stop() && !std::mem::replace(&mut told, true) {
            interrupt(&mut child);
        }
        if asked.to_stop_at_once() {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    // One line, which fits the pipe.
    let mut line = String::new();
    child.stdout.take().map_or(Ok(0), |mut out| out.read_to_string(&mut line)).map_err(failed)?;
    match serde_json::from_str::<Printed>(&line) {
        Ok(printed) if printed.interrupted => Err(Unfinished::Stopped),
        Ok(printed) if printed.diverged || printed.test.is_some() => Ok(Finished {
            accuracy: printed.test.map(|test| test.accuracy),
            validation: printed.best_validation_accuracy,
        }),
        _ if asked.to_stop() => Err(Unfinished::Stopped),
        _ => {
            let text = std::fs::read_to_string(&messages).unwrap_or_default();
            let last = text.lines().rev().find(|line| !line.is_empty());
            let last = last.map(|line| line.strip_prefix("error: ").unwrap_or(line));
            Err(Unfinished::Failed(last.map_or_else(|| status.to_string(), String::from)))
        }
    }
}

/// Asks a run to stop after its step.
fn interrupt(child: &mut Child) {
    // A run that has just ended needs no signal.
    #[cfg(unix)]
    if let Some(process) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(process, rustix::process::Signal::TERM);
    }
    #[cfg(not(unix))]
    let _ = child.kill();
}

/// What the runs of a sweep have come to.
struct Progress<'a> {
    waiting: VecDeque<&'a Planned>,
    done: BTreeMap<String, Finished>,
    failed: Vec<(String, String)>,
    /// That of writing the results, which ends the sweep.
    error: Option<TrainError>,
}

/// Trains what is left, `args.jobs` runs at a time.
fn train_all<'a>(
    args: &SweepArgs,
    planned: &'a [Planned],
    done: BTreeMap<String, Finished>,
    asked: &Asked,
) -> Progress<'a> {
    let waiting = planned.iter().filter(|run| !done.contains_key(&run.name)).collect();
    let shared = Mutex::new(Progress { waiting, done, failed: Vec::new(), error: None });
    let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
    std::thread::scope(|scope| {
        for _ in 0..args.jobs {
            scope.spawn(|| {
                while !asked.to_stop() {
                    let Some(run) = lock().waiting.pop_front() else { return };
                    let ended = train(args, run, asked);
                    let mut progress = lock();
                    match ended {
                        Ok(found) => {
                            progress.done.insert(run.name.clone(), found.clone());
                            tell_result(args.json, &run.name, &found, (progress.done.len(), planned.len()));
                            if let Err(error) = keep_results(args, &progress.done) {
                                progress.error.get_or_insert(error);
                                progress.waiting.clear();
                            }
                        }
                        Err(Unfinished::Stopped) => return,
                        Err(Unfinished::Failed(reason)) => {
                            tell_error(&format!("{}: {reason}", run.name));
                            progress.failed.push((run.name.clone(), reason));
                        }
                    }
                }
            });
        }
    });
    shared.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn tell_result(json: bool, name: &str, found: &Finished, (done, of): (usize, usize)) {
    let result = match found.accuracy {
        Some(share) => format!("test accuracy {} %", shown(100.0 * share, 2)),
        None => "diverged".into(),
    };
    let line = format!("{done}/{of}  {name}: {result}");
    // A closed pipe does not end a sweep.
    if json { tell(&line) } else { drop(print(&line)) }
}

fn keep_results(args: &SweepArgs, done: &BTreeMap<String, Finished>) -> Result<(), TrainError> {
    let path = args.out.join(RESULTS);
    let text = serde_json::to_string_pretty(done);
    let text = text.map_err(|error| TrainError::Results { path: path.clone(), reason: error.to_string() })?;
    write_whole(&path, text.as_bytes())
}

/// The group of runs with the best mean on the validation images, and this mean.
fn best_on_validation<'a>(planned: &'a [Planned], done: &BTreeMap<String, Finished>) -> Option<(&'a str, f64)> {
    // A group counts if all its runs are finished and none diverged.
    let mut groups = BTreeMap::<&str, Vec<Option<f64>>>::new();
    for run in planned {
        let found = done.get(&run.name).filter(|found| found.accuracy.is_some());
        groups.entry(&run.group).or_default().push(found.and_then(|found| found.validation));
    }
    if groups.len() < 2 {
        return None;
    }
    let mean = |(group, shares): (&'a str, Vec<Option<f64>>)| {
        let count = shares.len() as f64;
        Some((group, shares.into_iter().sum::<Option<f64>>()? / count))
    };
    groups.into_iter().filter_map(mean).max_by(|(_, a), (_, b)| a.total_cmp(b))
}

pub fn run(args: &SweepArgs) -> Result<ExitCode, Failure> {
    if args.out.as_os_str().is_empty() {
        return Err(option("out", "empty, expected a folder").into());
    }
    let planned = plan(args)?;
    let _held = hold(&args.out)?;
    let settings = args.out.join("settings");
    std::fs::create_dir_all(&settings).map_err(|source| TrainError::Io { path: settings, source })?;
    planned.iter().try_for_each(|run| keep_settings(args, run))?;
    let done = results(&args.out.join(RESULTS))?;
    let asked = Asked::by_signals();
    let Progress { done, failed, error, .. } = train_all(args, &planned, done, &asked);
    error.map_or(Ok(()), Err)?;
    let finished = planned.iter().filter(|run| done.contains_key(&run.name)).count();
    let interrupted = asked.to_stop() && finished + failed.len() < planned.len();
    let folders: Vec<PathBuf> = planned.iter().map(|run| args.out.join(&run.name)).filter(|run| run.exists()).collect();
    let page = args.out.join("report.html");
    let report = if finished > 0 { Some(report(&folders, Some(&page), false)?) } else { None };
    let best = best_on_validation(&planned, &done);
    if args.json {
        let failed: Vec<_> = failed.iter().map(|(name, reason)| json!({"run": name, "reason": reason})).collect();
        let best = best.map(|(group, mean)| json!({"runs": group, "mean_accuracy": mean}));
        print(
            &json!({
                "runs": planned.len(), "finished": finished, "failed": failed, "interrupted": interrupted,
                "results": done, "best_on_validation": best, "report": report,
            })
            .to_string(),
        )?;
    } else if let Some(report) = &report {
        for group in &report.groups {
            print(&group.to_string())?;
        }
        if let Some((group, mean)) = best {
            print(&format!("best on the validation images: {group} ({} % on average)", shown(100.0 * mean, 2)))?;
        }
        print(&format!("report: {}", report.report.display()))?;
    }
    if interrupted {
        tell(&format!(
            "interrupted after {} of {}; the same command goes on",
            finished,
            counted(planned.len() as u64, "run")
        ));
        return Ok(ExitCode::from(130));
    }
    if !failed.is_empty() {
        tell_error(&format!("{} failed; the same command tries again", counted(failed.len() as u64, "run")));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
