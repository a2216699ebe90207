//! `polder picture`: landscapes and spectra drawn again from what is on disk.

use std::path::PathBuf;

use polder::report::{PictureSettings, pictures};
use serde_json::json;

use super::flags::Flags;
use super::{Failure, option, print};

#[derive(clap::Args)]
pub struct PictureArgs {
    /// Folders of landscapes, folders with a spectrum in curvature.json, or folders of runs with these in them
    #[arg(value_name = "FOLDER", required = true)]
    folders: Vec<PathBuf>,
    /// Folder for the pictures of one FOLDER [default: beside the files that they are drawn from]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    look: Flags<PictureSettings>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &PictureArgs) -> Result<(), Failure> {
    let settings = args.look.settings()?;
    if args.out.is_some() && args.folders.len() > 1 {
        let reason = format!("takes the pictures of one folder, not of {}", args.folders.len());
        return Err(option("out", reason).into());
    }
    let mut written = Vec::new();
    for folder in &args.folders {
        written.extend(pictures(folder, args.out.as_deref(), &settings)?);
    }
    if args.json {
        let paths: Vec<String> = written.iter().map(|path| path.display().to_string()).collect();
        return print(&json!({"pictures": paths}).to_string());
    }
    for path in written {
        print(&format!("picture: {}", path.display()))?;
    }
    Ok(())
}
