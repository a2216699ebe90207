//! The commands, and what they share: printing, progress bars, signals.

pub mod corrupt;
pub mod curvature;
pub mod devices;
pub mod eval;
pub mod flags;
pub mod landscape;
pub mod manual;
mod model;
pub mod models;
pub mod picture;
pub mod recipes;
pub mod report;
pub mod sweep;
pub mod train;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use polder::data::DataError;
use polder::train::TrainError;

/// "1 step", "2 steps".
fn counted<N: std::fmt::Display + PartialEq + From<u8>>(count: N, noun: &str) -> String {
    let ending = if count == N::from(1) { "" } else { "s" };
    format!("{count} {noun}{ending}")
}

/// A number with so many decimals, and a large one with an exponent.
fn shown(value: f64, decimals: usize) -> String {
    if value.abs() < 1e6 { format!("{value:.decimals$}") } else { format!("{value:.2e}") }
}

/// The error of a run whose images are no longer where they were, with what to do; any other one as it is.
fn moved_images(error: TrainError) -> TrainError {
    match error {
        TrainError::Data(DataError::Io { path, source }) => {
            option("data", format!("{}: {source}; give the new place of the run's images", path.display()))
        }
        error => error,
    }
}

/// An option that cannot be used, by its name without dashes.
fn option(name: &str, reason: impl ToString) -> TrainError {
    TrainError::setting(name, reason.to_string())
}

/// Why a command failed.
pub enum Failure {
    /// The work, or its input.
    Work(TrainError),
    /// Standard output could not be written.
    Output(std::io::Error),
}

impl Failure {
    /// 2 for input that cannot be used, 1 for a failure of the machine.
    pub fn exit_code(&self) -> ExitCode {
        let input = matches!(self, Self::Work(error) if error.is_input());
        ExitCode::from(if input { 2 } else { 1 })
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        Self::Work(error)
    }
}

/// Text without control characters, which a terminal would obey, except the ends of lines. They are written as in JSON,
/// so JSON keeps its meaning.
fn harmless(text: &str) -> String {
    let mut harmless = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            character if character.is_control() && !matches!(character, '\n' | '\t') => {
                harmless += &format!("\\u{:04x}", u32::from(character));
            }
            character => harmless.push(character),
        }
    }
    harmless
}

/// Prints to standard output. A closed pipe is not an error.
///
/// # Errors
/// Any other reason why the text could not be written.
fn print(text: &str) -> Result<(), Failure> {
    match writeln!(std::io::stdout(), "{}", harmless(text)) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::Output(error)),
        _ => Ok(()),
    }
}

/// Prints to standard error. A failure to print is ignored.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", harmless(text));
}

/// Prints an error to standard error; on a terminal the word is red, unless `NO_COLOR` is set.
pub fn tell_error(text: &str) {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let word = if std::io::stderr().is_terminal() && !plain { "\u{1b}[1;31merror:\u{1b}[0m" } else { "error:" };
    let _ = writeln!(std::io::stderr(), "{word} {}", harmless(text));
}

/// A progress bar on a terminal, for work of several parts.
struct Bar(Option<ProgressBar>);

impl Bar {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:12} {pos}/{len}, {eta} left  {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self(bar)
    }

    fn show(&self, part: &str, done: usize, of: usize) {
        let Some(bar) = &self.0 else { return };
        if bar.message() != part {
            bar.reset();
            bar.set_message(part.to_string());
        }
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// The signals that ask the program to end. One that was ignored when the program started (by `nohup`, say) stays
/// ignored.
fn ending_signals() -> Vec<i32> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    // Linux says which signals are ignored. Elsewhere none is assumed to be.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0).collect()
}

/// Stops the work after its current step (called `step`) at the first SIGINT, SIGTERM or SIGHUP, and the program at
/// the second.
fn stop_on_signals(stop: &Arc<AtomicBool>, step: &'static str, bar: Option<ProgressBar>) {
    use signal_hook::flag::{register, register_conditional_shutdown};
    for signal in ending_signals() {
        // In this order the first signal sets what the second one finds set. Without a handler a signal ends the
        // program unsaved, but the work can go on.
        let _ = register_conditional_shutdown(signal, 130, stop.clone()).and_then(|_| register(signal, stop.clone()));
    }
    // Only the message needs a thread. The work also goes on if none can be made.
    let asked = stop.clone();
    let tell_once = move || {
        while !asked.load(Ordering::Relaxed) {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let text = format!("stopping after this {step}; send the signal again to stop at once");
        match &bar {
            Some(bar) => bar.println(text),
            None => tell(&text),
        }
    };
    drop(std::thread::Builder::new().spawn(tell_once));
}
