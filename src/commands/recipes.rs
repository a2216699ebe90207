//! `polder recipes`: the settings of published experiments.

use polder::train::RECIPES;
use serde_json::json;

use super::{Failure, print};

pub fn run(as_json: bool) -> Result<(), Failure> {
    let mut object = serde_json::Map::new();
    for recipe in RECIPES {
        let options = recipe.options()?;
        let settings: Vec<(&str, String)> = options.iter().map(|(name, value)| (name, value.to_string())).collect();
        if as_json {
            let settings: serde_json::Map<_, _> =
                settings.into_iter().map(|(name, value)| (name.to_string(), value.into())).collect();
            object.insert(recipe.name.into(), json!({"source": recipe.source, "settings": settings}));
            continue;
        }
        let settings: Vec<String> = settings.iter().map(|(name, value)| format!("--{name} {value}")).collect();
        print(&format!("{}\n  {}\n  from {}", recipe.name, settings.join(" "), recipe.source))?;
    }
    if as_json { print(&json!(object).to_string()) } else { Ok(()) }
}
