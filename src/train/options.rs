//! Options by name, as a file or a command line gives them: reading, layering, and what they mean together.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use toml::Spanned;

use super::listing::find_option;
use super::settings::{Chosen, RunSettings};
use super::{TrainError, settings};
use crate::settings::{Kind, SettingError, Value};

/// Values of some options by name. Defaults, a file and a command line are layers: [`Options::over`] puts one on
/// another, and [`Options::resolve`] fills in the defaults below.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Options(BTreeMap<String, Value>);

impl Options {
    /// The settings of the run in a folder.
    ///
    /// # Errors
    /// [`TrainError::NoRun`]; those of [`Options::from_file`].
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
    pub fn resolve(&self) -> Result<RunSettings, TrainError> {
        settings::resolve(self)
    }
}

impl FromIterator<(String, Value)> for Options {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(text: &str) -> Options {
        Options::from_toml(text).unwrap()
    }

    fn message(text: &str) -> String {
        layer(text).resolve().unwrap_err().to_string()
    }

    #[test]
    fn an_upper_layer_drops_what_its_choice_takes_away() {
        let below = layer(
            "optimizer = \"gnr\"\noracle = \"sam\"\noracle-rho = 0.2\nevery = 2\nmomentum = 0.8\nepochs = 3\nlr = 0.2",
        );
        let names = |above: &str| -> Vec<String> {
            layer(above).over(below.clone()).iter().map(|(name, _)| name.to_string()).collect()
        };
        assert_eq!(names("optimizer = \"sam\""), ["epochs", "lr", "momentum", "optimizer"]);
        assert_eq!(names("optimizer = \"looksam\""), ["epochs", "every", "lr", "momentum", "optimizer"]);
        assert_eq!(names("optimizer = \"adamw\""), ["epochs", "lr", "optimizer"]);
        let other_base = ["base", "epochs", "every", "lr", "optimizer", "oracle", "oracle-rho"];
        assert_eq!(names("base = \"adamw\""), other_base);
        let other_oracle = ["epochs", "every", "lr", "momentum", "optimizer", "oracle"];
        assert_eq!(names("oracle = \"loss\""), other_oracle);
        let in_steps = ["every", "lr", "momentum", "optimizer", "oracle", "oracle-rho", "steps"];
        assert_eq!(names("steps = 9"), in_steps);
        // The upper layer's own options stay, even those that have no meaning: that is an error to be reported.
        let kept = layer("optimizer = \"sgd\"\nrho = 0.1").over(below.clone());
        assert!(
            kept.has("rho") && kept.resolve().unwrap_err().to_string() == "rho: has no meaning for `optimizer` sgd"
        );
    }

    #[test]
    fn settings_are_written_and_read_back() {
        let text = "optimizer = \"cr-sam\"\nalpha = 1\nmean = [0.4914, 0.5]\nseed = 7\ncurvature-every = 2\n\
            curvature-measures = [\"trace\"]";
        let settings = layer(text).resolve().unwrap();
        let written = settings.to_toml().unwrap();
        for line in
            ["alpha = 1.0", "mean = [0.4914, 0.5]", "beta = 0.01", "curvature-measures = [\"trace\"]", "epochs = 10"]
        {
            assert!(written.lines().any(|other| other == line), "{line}: {written}");
        }
        let again = layer(&written).resolve().unwrap();
        assert_eq!(again.to_toml().unwrap(), written);
        again.continues(&settings).unwrap();
        let longer = layer(&format!("{written}steps = 9").replace("epochs = 10\n", "")).resolve().unwrap();
        longer.continues(&settings).unwrap();
        let other = layer(&written.replace("alpha = 1.0", "alpha = 0.5")).resolve().unwrap();
        assert_eq!(other.continues(&settings).unwrap_err().to_string(), "alpha: cannot change when a run is resumed");
        assert_eq!(settings.to_json().unwrap()["alpha"], 1.0);
    }

    #[test]
    fn every_mistake_names_the_setting() {
        for (text, expected) in [
            ("optimizer = \"sgdd\"", "optimizer: sgdd, expected one of sgd, adamw, sam"),
            ("model = \"resnet9\"", "model: resnet9, expected one of resnet8"),
            ("base = \"adamw\"\nmomentum = 0.5", "momentum: has no meaning for adamw"),
            ("curvature-probes = 5", "curvature-probes: has no meaning without `curvature-every`"),
            ("curvature-every = 1\ncurvature-probes = 0", "curvature-probes: 0, expected at least 1"),
            ("optimizer = \"gnr\"\noracle-rho = 0.1", "oracle-rho: has no meaning for `oracle` loss"),
            ("epochs = 1\nsteps = 2", "steps: cannot be given together with `epochs`"),
            ("batch-size = 6\nmicro-batch = 4", "micro-batch: 4, expected a divisor of `batch-size` 6"),
            ("threads = 2000", "threads: 2000, expected at most 1024"),
        ] {
            let found = message(text);
            assert!(found.starts_with(expected), "{text}: {found}");
        }
        for (text, expected) in [
            ("lr = 1\n\nspeed = 2", "line 3: `speed` is not an option"),
            ("seed = -1", "line 1: seed: expected a whole number, 0 or more"),
            ("nesterov = 1", "line 1: nesterov: expected true or false"),
            ("lr = ", "line 1: "),
        ] {
            let found = Options::from_toml(text).unwrap_err();
            assert!(found.starts_with(expected), "{text}: {found}");
        }
    }

    #[test]
    fn every_method_resolves_and_is_read_back() {
        for entry in crate::optim::METHODS {
            let settings = layer(&format!("optimizer = \"{}\"", entry.name)).resolve().unwrap();
            let written = settings.to_toml().unwrap();
            assert_eq!(layer(&written).resolve().unwrap().to_toml().unwrap(), written, "{}", entry.name);
            let own_rate = settings.method().unwrap().own_rate().is_some();
            assert_eq!(written.contains("momentum = 0.0"), own_rate, "{}", entry.name);
            assert_eq!(
                written.contains("schedule = "),
                !own_rate || written.contains("rho-schedule"),
                "{}",
                entry.name
            );
        }
    }
}
