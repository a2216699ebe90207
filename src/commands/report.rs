//! `polder report`: runs compared on one page.

use std::path::PathBuf;

use polder::report;
use polder::train::TrainError;

use super::{Failure, option, print, tell};

#[derive(clap::Args)]
pub struct ReportArgs {
    /// Folders that `polder train --out` wrote, with curvature.json and folders landscape… in them. Other paths are
    /// skipped
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The page [default: report.html, for a single RUN in its folder]
    #[arg(long, value_name = "FILE.html")]
    out: Option<PathBuf>,
    /// Also write each run's log for TensorBoard, to tensorboard/ in its folder
    #[arg(long)]
    tensorboard: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &ReportArgs) -> Result<(), Failure> {
    let report = report::report(&args.runs, args.out.as_deref(), args.tensorboard).map_err(|error| match error {
        TrainError::InUse { .. } => option("out", format!("{error}; give another place for the page")),
        error => error,
    })?;
    for skipped in &report.skipped {
        tell(&format!("skipped: {}", skipped.reason));
    }
    if args.json {
        let text = serde_json::to_string(&report).map_err(|error| option("json", error))?;
        return print(&text);
    }
    for group in &report.groups {
        print(&group.to_string())?;
    }
    if let Some(order) = &report.curvature_order {
        print(&order.to_string())?;
    }
    for path in &report.tensorboard {
        print(&format!("TensorBoard: {}", path.display()))?;
    }
    print(&format!("report: {}", report.report.display()))
}
