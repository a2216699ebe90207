//! `polder recipes`: the settings of published experiments.

use polder::settings::SettingValue;
use polder::train::Recipe;
use serde_json::json;

use super::{Failure, print};

pub fn run(as_json: bool) -> Result<(), Failure> {
    let mut object = serde_json::Map::new();
    for recipe in Recipe::all() {
        let options = recipe.options()?;
        if as_json {
            let settings: serde_json::Map<_, _> =
                options.iter().map(|(name, value)| (name.to_string(), value.to_string().into())).collect();
            object.insert(recipe.name, json!({"source": recipe.source, "settings": settings}));
            continue;
        }
        let flag = |(name, value): (&str, &SettingValue)| match value {
            SettingValue::Flag(true) => format!("--{name}"),
            value => format!("--{name} {value}"),
        };
        let settings: Vec<String> = options.iter().map(flag).collect();
        print(&format!("{}\n  {}\n  from {}", recipe.name, settings.join(" "), recipe.source))?;
    }
    if as_json { print(&json!(object).to_string()) } else { Ok(()) }
}
