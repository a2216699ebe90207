//! `polder completions` and `polder man`: what shells and `man` know of the program, from its flags.

use std::path::Path;

use clap::Command;
use polder::train::TrainError;

use super::{Failure, print};

/// Prints the script for a shell.
pub fn completions(shell: clap_complete::Shell, mut command: Command) -> Result<(), Failure> {
    let (name, mut script) = (command.get_name().to_string(), Vec::new());
    clap_complete::generate(shell, &mut command, name, &mut script);
    print(String::from_utf8_lossy(&script).trim_end())
}

/// Writes a page for the program and one for each command.
pub fn pages(folder: &Path, command: Command) -> Result<(), Failure> {
    let io = |source| TrainError::Io { path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
    clap_mangen::generate_to(command, folder).map_err(io)?;
    print(&format!("manual pages: {}", folder.display()))
}
