//! `polder devices`: the devices that this program can use.

use polder::device;
use serde_json::json;

use super::{Failure, print};

pub fn run(json: bool) -> Result<(), Failure> {
    let devices = device::available();
    if json {
        let list: Vec<_> = devices
            .iter()
            .map(|(name, found)| match found {
                Ok(description) => json!({"name": name, "usable": true, "description": description}),
                Err(reason) => json!({"name": name, "usable": false, "reason": reason}),
            })
            .collect();
        return print(&json!({"devices": list}).to_string());
    }
    for (name, found) in devices {
        match found {
            Ok(description) => print(&format!("{name:<8} {description}"))?,
            Err(reason) => print(&format!("{name:<8} not usable: {reason}"))?,
        }
    }
    Ok(())
}
