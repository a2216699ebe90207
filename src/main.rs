//! The command line: `polder train`, `sweep`, `eval`, `corrupt`, `curvature`, `landscape`, `picture`, `report`,
//! `devices`, `models`, `recipes`, `completions`, `man`.
//!
//! Exit codes: 0 done; 1 the machine failed, or a loss diverged; 2 bad usage or input, reported in one line; 130 a
//! run or a landscape was interrupted, with everything saved.

mod commands;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use commands::{
    corrupt, curvature, devices, eval, flags, landscape, manual, models, picture, recipes, report, sweep, tell_error,
    train,
};

/// Sharpness-aware training on hand-written kernels, on the CPU or on a GPU.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a network; without options, a ResNet-8 with SAM on a generated image set
    #[command(allow_negative_numbers = true)]
    Train(Box<train::TrainArgs>),
    /// Train networks over a grid of options, and compare them on one page
    #[command(allow_negative_numbers = true)]
    Sweep(Box<sweep::SweepArgs>),
    /// Measure loss and accuracy of trained weights
    #[command(allow_negative_numbers = true)]
    Eval(eval::EvalArgs),
    /// Write corrupted test images in the layout of CIFAR-10-C, for eval --corruption
    #[command(allow_negative_numbers = true)]
    Corrupt(corrupt::CorruptArgs),
    /// Measure how flat the loss is around trained weights
    #[command(allow_negative_numbers = true)]
    Curvature(curvature::CurvatureArgs),
    /// Map the loss on a line or a plane around trained weights, and draw it
    #[command(allow_negative_numbers = true)]
    Landscape(landscape::LandscapeArgs),
    /// Draw landscapes and spectra again, with another look
    #[command(allow_negative_numbers = true)]
    Picture(picture::PictureArgs),
    /// Compare runs on one HTML page: accuracy, learning curves, curvature, loss landscapes, settings
    Report(report::ReportArgs),
    /// List the devices that this program can use
    Devices {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// List the networks with their parameters, floating-point operations and memory
    Models {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// List the settings of published experiments that `train --recipe` knows
    Recipes {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Print a script that completes commands and options in a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages to a folder: polder.1 and one for each command
    Man {
        /// The folder
        #[arg(value_name = "DIR")]
        folder: std::path::PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are printed in full. Of an error, clap's first paragraph is printed as one line.
            if error.use_stderr() && error.kind() != clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
                let text = error.render().to_string();
                let message: Vec<&str> =
                    text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
                use clap::error::{ContextKind, ContextValue};
                let kinds = [ContextKind::SuggestedSubcommand, ContextKind::SuggestedArg, ContextKind::SuggestedValue];
                let similar = kinds.into_iter().find_map(|kind| match error.get(kind)? {
                    ContextValue::String(name) => Some(name.clone()),
                    ContextValue::Strings(names) => names.first().cloned(),
                    _ => None,
                });
                let similar = similar.map_or(String::new(), |name| format!("; did you mean {name}?"));
                let message = message.join(" ");
                tell_error(&format!("{}{similar} (see --help)", message.strip_prefix("error: ").unwrap_or(&message)));
            } else if let Err(error) = error.print()
                && error.kind() != std::io::ErrorKind::BrokenPipe
            {
                tell_error(&format!("standard output: {error}"));
                return ExitCode::FAILURE;
            }
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let done = match cli.command {
        Command::Train(args) => train::run(*args),
        Command::Sweep(args) => sweep::run(&args),
        Command::Eval(args) => eval::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Corrupt(args) => corrupt::run(&args),
        Command::Curvature(args) => curvature::run(&args),
        Command::Landscape(args) => landscape::run(&args),
        Command::Picture(args) => picture::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Report(args) => report::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Devices { json } => devices::run(json).map(|()| ExitCode::SUCCESS),
        Command::Models { json } => models::run(json).map(|()| ExitCode::SUCCESS),
        Command::Recipes { json } => recipes::run(json).map(|()| ExitCode::SUCCESS),
        Command::Completions { shell } => manual::completions(shell, Cli::command()).map(|()| ExitCode::SUCCESS),
        Command::Man { folder } => manual::pages(&folder, Cli::command()).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        tell_error(&flags::message(&error));
        error.exit_code()
    })
}
