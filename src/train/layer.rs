//! Options by name, as a file or a command line gives them: reading, layering, and what they mean together.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use toml::Spanned;

use super::settings::{Chosen, Settings, find_option};
use super::{TrainError, settings};
use crate::settings::{Kind, SettingError, Value};

/// Values of some options by name. Defaults, a file and a command line are layers: [`Layer::over`] puts one on another,
/// and [`Layer::resolve`] fills in the defaults below.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Layer(BTreeMap<String, Value>);

impl Layer {
    /// The settings of the run in a folder.
    ///
    /// # Errors
    /// [`TrainError::NoRun`]; those of [`Layer::from_file`].
    pub fn of_run(run: &Path) -> Result<Self, TrainError> {
        let file = run.join("config.toml");
        if !file.is_file() {
            return Err(TrainError::NoRun { path: run.into() });
        }
        Self::from_file(&file)
    }

    /// Reads a TOML file of settings.
    ///
    /// # Errors
    /// The file, an unknown key, or a value of another type.
    pub fn from_file(path: &Path) -> Result<Self, TrainError> {
        let text = std::fs::read_to_string(path).map_err(TrainError::io(path))?;
        Self::from_toml(&text).map_err(|reason| TrainError::Settings { path: path.into(), reason })
    }

    /// Reads settings from TOML. The error says what is wrong and in which line.
    pub(super) fn from_toml(text: &str) -> Result<Self, String> {
        let line = |at: usize| format!("line {}", text[..at].matches('\n').count() + 1);
        let entries: HashMap<Spanned<String>, Spanned<toml::Value>> = toml::from_str(text).map_err(|error| {
            let place = error.span().map(|span| format!("{}: ", line(span.start))).unwrap_or_default();
            format!("{place}{}", error.message().replace('\n', "; "))
        })?;
        let mut entries: Vec<_> = entries.into_iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        let read = |(name, value): (Spanned<String>, Spanned<toml::Value>)| {
            let place = line(name.span().start);
            let name = name.into_inner();
            let unknown = || format!("{place}: `{name}` is not an option");
            let option = find_option(&name).ok_or_else(unknown)?;
            let value = from_toml(option.kind, value.into_inner())
                .ok_or_else(|| format!("{place}: {name}: expected {}", option.kind.expected()))?;
            Ok((name, value))
        };
        entries.into_iter().map(read).collect::<Result<_, _>>().map(Self)
    }

    /// The value of an option, if the layer has one.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// Gives an option a value.
    pub fn set(&mut self, name: &str, value: Value) {
        self.0.insert(name.into(), value);
    }

    /// Gives an option the value that it has in another layer, or none.
    pub(super) fn copy(&mut self, name: &str, other: &Self) {
        match other.get(name) {
            Some(value) => self.set(name, value.clone()),
            None => drop(self.0.remove(name)),
        }
    }

    /// Whether the layer has a value of this option.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Names and values, in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// These options, and those of `below` that this layer does not have. An optimizer that is chosen here drops the
    /// options below that it does not have.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        let mut merged = below.0.clone();
        merged.extend(self.0.clone());
        let merged = Self(merged);
        let chosen = Chosen::by(&merged).ok();
        let reconsidered = self.has("optimizer") || self.has("base");
        let keep = |name: &str| {
            let offered = !reconsidered || chosen.as_ref().is_none_or(|chosen| chosen.has(name));
            // An option that depends on another one goes where this layer turns that one off.
            let condition = find_option(name).and_then(|option| option.only_with);
            let off = condition
                .is_some_and(|condition| self.get(&condition.option()).is_some_and(|other| !condition.accepts(other)));
            // A run is measured in epochs or in steps: a choice here hides the other one below.
            let hidden = matches!(name, "epochs" | "steps") && (self.has("epochs") || self.has("steps"));
            offered && !off && !hidden
        };
        Self(merged.0.into_iter().filter(|(name, _)| self.has(name) || keep(name)).collect())
    }

    /// All settings: these options over the defaults, each value checked.
    ///
    /// # Errors
    /// [`TrainError::Setting`]: a value out of its range, an option that the chosen optimizer does not have, or values
    /// that contradict each other.
    pub fn resolve(&self) -> Result<Settings, TrainError> {
        settings::resolve(self)
    }
}

impl FromIterator<(String, Value)> for Layer {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

/// A value of TOML as one of this kind.
fn from_toml(kind: Kind, value: toml::Value) -> Option<Value> {
    let number = |value: &toml::Value| value.as_float().or(value.as_integer().map(|whole| whole as f64));
    Some(match (kind, value) {
        (Kind::Flag, toml::Value::Boolean(value)) => Value::Flag(value),
        (Kind::Count, toml::Value::Integer(value)) => Value::Count(u64::try_from(value).ok()?),
        (Kind::Number, value) => Value::Number(number(&value)?),
        (Kind::Text, toml::Value::String(value)) => Value::Text(value),
        (Kind::Word(_), toml::Value::String(value)) => Value::Word(value),
        (Kind::Numbers, toml::Value::Array(list)) => {
            Value::Numbers(list.iter().map(|item| Some(number(item)? as f32)).collect::<Option<_>>()?)
        }
        (Kind::Words(_), toml::Value::Array(list)) => {
            Value::Words(list.iter().map(|item| Some(item.as_str()?.to_string())).collect::<Option<_>>()?)
        }
        _ => return None,
    })
}

/// A value for TOML; none for one that is absent.
///
/// # Errors
/// A count that TOML cannot hold.
pub(super) fn to_toml(name: &str, value: &Value) -> Result<Option<toml::Value>, SettingError> {
    let text = |text: &String| toml::Value::String(text.clone());
    // The shortest decimal number that is this f32, not the digits of its f64.
    let number = |value: &f32| toml::Value::Float(value.to_string().parse().unwrap_or(f64::from(*value)));
    Ok(Some(match value {
        Value::Absent => return Ok(None),
        Value::Flag(value) => toml::Value::Boolean(*value),
        Value::Count(value) => toml::Value::Integer(i64::try_from(*value).map_err(|_| SettingError::Meaningless {
            name: name.into(),
            reason: format!("as {value}: a file of settings holds at most {}", i64::MAX),
        })?),
        Value::Number(value) => toml::Value::Float(*value),
        Value::Text(value) | Value::Word(value) => text(value),
        Value::Numbers(values) => toml::Value::Array(values.iter().map(number).collect()),
        Value::Words(values) => toml::Value::Array(values.iter().map(text).collect()),
    }))
}

/// A value for JSON; null for one that is absent.
pub(super) fn to_json(value: &Value) -> serde_json::Value {
    let number = |value: &f32| serde_json::json!(value.to_string().parse::<f64>().unwrap_or(f64::from(*value)));
    match value {
        Value::Absent => serde_json::Value::Null,
        Value::Flag(value) => (*value).into(),
        Value::Count(value) => (*value).into(),
        Value::Number(value) => (*value).into(),
        Value::Text(value) | Value::Word(value) => value.as_str().into(),
        Value::Numbers(values) => values.iter().map(number).collect(),
        Value::Words(values) => values.iter().map(String::as_str).collect(),
    }
}
