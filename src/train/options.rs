//! Options by name, as a file or a command line gives them: reading, layering, and what they mean together.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use toml::Spanned;

use super::files::{MOST_SETTINGS, read_settings, read_text};
use super::listing::{find_option, similar_option};
use super::settings::{Chosen, RunSettings};
use super::{TrainError, settings};
use crate::settings::{Setting, SettingKind, SettingValue, number};

/// Values of some options by name. Defaults, a file and a command line are layers: [`Options::over`] puts one on
/// another, and [`Options::resolve`] fills in the defaults below.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Options(BTreeMap<String, SettingValue>);

impl Options {
    /// The settings of the run in a folder.
    ///
    /// # Errors
    /// [`TrainError::NoRun`]; those of [`Options::from_file`].
    pub fn of_run(run: &Path) -> Result<Self, TrainError> {
        Self::from_file(&file_of_run(run)?)
    }

    /// Reads a TOML file of settings, of at most one mebibyte. It may be a pipe without a name, such as `/dev/stdin`.
    ///
    /// # Errors
    /// The file, an unknown key, or a value of another type.
    pub fn from_file(path: &Path) -> Result<Self, TrainError> {
        let text = read_settings(path)?;
        Self::from_toml(&text).map_err(|reason| TrainError::Settings { path: path.into(), reason })
    }

    /// Reads some settings of the run in a folder, and ignores all others. So a run of a method that has no name here
    /// can be read, too.
    ///
    /// # Errors
    /// Those of [`Options::of_run`].
    pub fn some_of_run(run: &Path, names: &[&str]) -> Result<Self, TrainError> {
        let file = file_of_run(run)?;
        let text = read_text(&file, MOST_SETTINGS)?;
        let read = || -> Result<_, String> {
            let entries = entries(&text)?;
            entries.iter().filter(|entry| names.contains(&&*entry.name)).map(Entry::read).collect()
        };
        read().map(Self).map_err(|reason| TrainError::Settings { path: file, reason })
    }

    /// Reads settings from TOML. The error says what is wrong and in which line.
    pub(super) fn from_toml(text: &str) -> Result<Self, String> {
        entries(text)?.iter().map(Entry::read).collect::<Result<_, _>>().map(Self)
    }

    /// The line of an option in a file of settings, counted from 1; none where the file does not have it.
    pub(super) fn line_in(file: &Path, name: &str) -> Option<usize> {
        let text = read_text(file, MOST_SETTINGS).ok()?;
        entries(&text).ok()?.iter().find(|entry| entry.name == name).map(|entry| entry.line)
    }

    /// The value of an option, if the layer has one.
    pub fn get(&self, name: &str) -> Option<&SettingValue> {
        self.0.get(name)
    }

    /// Gives an option a value.
    pub fn set(&mut self, name: &str, value: SettingValue) {
        self.0.insert(name.into(), value);
    }

    /// Gives an option the value that it has in another layer, or none.
    pub(super) fn copy(&mut self, name: &str, other: &Self) {
        match other.get(name) {
            Some(value) => self.set(name, value.clone()),
            None => drop(self.0.remove(name)),
        }
    }

    /// The same without these options.
    #[must_use]
    pub fn without(mut self, names: &[&str]) -> Self {
        self.0.retain(|name, _| !names.contains(&&**name));
        self
    }

    /// Whether the layer has a value of this option.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Names and values, in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &SettingValue)> {
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

impl FromIterator<(String, SettingValue)> for Options {
    fn from_iter<I: IntoIterator<Item = (String, SettingValue)>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

/// The file of settings in the folder of a run.
pub(super) fn file_of_run(run: &Path) -> Result<PathBuf, TrainError> {
    let file = run.join("config.toml");
    match std::fs::metadata(&file) {
        Ok(_) => Ok(file),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Err(TrainError::NoRun { path: run.into() })
        }
        Err(error) => Err(TrainError::io(file)(error)),
    }
}

/// An entry of a file of settings.
struct Entry {
    name: String,
    value: toml::Value,
    /// Counted from 1.
    line: usize,
}

/// The line of a position in a text, counted from 1.
fn line(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// Why a text is not TOML, in one line that begins with the line of the text.
pub(crate) fn toml_error(text: &str, error: &toml::de::Error) -> String {
    let place = error.span().map(|span| format!("line {}: ", line(text, span.start))).unwrap_or_default();
    format!("{place}{}", error.message().replace('\n', "; "))
}

/// The section of a run's file that records its images. It holds no settings.
const RECORD: &str = "images";

/// The entries of a file of settings, in its order, without the record of a run's images.
fn entries(text: &str) -> Result<Vec<Entry>, String> {
    let found: HashMap<Spanned<String>, Spanned<toml::Value>> =
        toml::from_str(text).map_err(|error| toml_error(text, &error))?;
    let entry = |(name, value): (Spanned<String>, Spanned<toml::Value>)| Entry {
        line: line(text, name.span().start),
        name: name.into_inner(),
        value: value.into_inner(),
    };
    let is_record = |entry: &Entry| entry.name == RECORD && entry.value.is_table();
    let mut entries: Vec<Entry> = found.into_iter().map(entry).filter(|entry| !is_record(entry)).collect();
    entries.sort_by_key(|entry| entry.line);
    Ok(entries)
}

impl Entry {
    /// The option and its value, which may still be out of the option's range, or a name that only other crates know.
    fn read(&self) -> Result<(String, SettingValue), String> {
        let Self { name, value, line } = self;
        let Some(option) = find_option(name) else {
            if value.is_table() {
                return Err(format!("line {line}: [{name}]: a file of settings has no sections"));
            }
            let similar = similar_option(name).map(|similar| format!("; did you mean `{similar}`?"));
            return Err(format!("line {line}: `{name}` is not an option{}", similar.unwrap_or_default()));
        };
        match from_toml(&option, value) {
            Ok(value) => Ok((name.clone(), value)),
            Err(expected) => Err(format!("line {line}: {name}: {value}, expected {expected}")),
        }
    }
}

/// A value of TOML as one of an option; otherwise what is expected.
fn from_toml(option: &Setting, value: &toml::Value) -> Result<SettingValue, String> {
    let number = |value: &toml::Value| value.as_float().or(value.as_integer().map(|whole| whole as f64));
    let read = || {
        Some(match (option.kind, value) {
            (SettingKind::Flag, toml::Value::Boolean(value)) => SettingValue::Flag(*value),
            (SettingKind::Count, toml::Value::Integer(value)) => SettingValue::Count(u64::try_from(*value).ok()?),
            (SettingKind::Number, value) => SettingValue::Number(number(value)?),
            (SettingKind::Text, toml::Value::String(value)) => SettingValue::Text(value.clone()),
            (SettingKind::Word(_), toml::Value::String(value)) => SettingValue::Word(value.clone()),
            (SettingKind::Numbers, toml::Value::Array(list)) => {
                SettingValue::Numbers(list.iter().map(number).collect::<Option<_>>()?)
            }
            (SettingKind::Words(_), toml::Value::Array(list)) => {
                SettingValue::Words(list.iter().map(|item| Some(item.as_str()?.to_string())).collect::<Option<_>>()?)
            }
            (SettingKind::Texts, toml::Value::Array(list)) => {
                SettingValue::Texts(list.iter().map(|item| Some(item.as_str()?.to_string())).collect::<Option<_>>()?)
            }
            _ => return None,
        })
    };
    let words = matches!(option.kind, SettingKind::Word(_) | SettingKind::Words(_));
    let expected = || format!("{}{}", option.kind.expected(), if words { ", in quotes" } else { "" });
    read().ok_or_else(expected)
}

/// A value as TOML; none for one that is absent.
pub(super) fn to_toml(value: &SettingValue) -> Option<String> {
    let text = |text: &String| toml::Value::String(text.clone()).to_string();
    // TOML tells floating-point numbers from whole ones.
    let number = |value: &f64| match number(*value) {
        text if text.contains(|letter: char| !letter.is_ascii_digit() && letter != '-') => text.to_lowercase(),
        whole => format!("{whole}.0"),
    };
    let list = |items: Vec<String>| format!("[{}]", items.join(", "));
    Some(match value {
        SettingValue::Absent => return None,
        SettingValue::Flag(_) | SettingValue::Count(_) => value.to_string(),
        SettingValue::Number(value) => number(value),
        SettingValue::Text(value) | SettingValue::Word(value) => text(value),
        SettingValue::Numbers(values) => list(values.iter().map(number).collect()),
        SettingValue::Words(values) | SettingValue::Texts(values) => list(values.iter().map(text).collect()),
    })
}

/// A value for JSON; null for one that is absent.
pub(super) fn to_json(value: &SettingValue) -> serde_json::Value {
    match value {
        SettingValue::Absent => serde_json::Value::Null,
        SettingValue::Flag(value) => (*value).into(),
        SettingValue::Count(value) => (*value).into(),
        // JSON has no infinity.
        SettingValue::Number(value) if !value.is_finite() => value.to_string().into(),
        SettingValue::Number(value) => (*value).into(),
        SettingValue::Text(value) | SettingValue::Word(value) => value.as_str().into(),
        SettingValue::Numbers(values) => values.iter().copied().collect(),
        SettingValue::Words(values) | SettingValue::Texts(values) => values.iter().map(String::as_str).collect(),
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
            ("optimizer = \"sgdd\"", "optimizer: sgdd, expected one of sgd, adamw, muon, sam"),
            ("model = \"resnet9\"", "model: resnet9, expected one of resnet8"),
            ("base = \"adamw\"\nmomentum = 0.5", "momentum: has no meaning for `base` adamw"),
            ("optimizer = \"adamw\"\nmomentum = 0.5", "momentum: has no meaning for `optimizer` adamw"),
            ("momentum = 1.0", "momentum: 1, expected a number from 0 to below 1"),
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
            ("epoch = 3", "line 1: `epoch` is not an option; did you mean `epochs`?"),
            ("lr = 1\n[train]\nseed = 3", "line 2: [train]: a file of settings has no sections"),
            ("seed = -1", "line 1: seed: -1, expected a whole number, 0 or more"),
            ("nesterov = 1", "line 1: nesterov: 1, expected true or false"),
            ("p-norm = 2", "line 1: p-norm: 2, expected one of 2, inf, in quotes"),
            ("lr = ", "line 1: "),
        ] {
            let found = Options::from_toml(text).unwrap_err();
            assert!(found.starts_with(expected), "{text}: {found}");
        }
        let far = Options::from_toml("seed = 3\nwidth = 2").unwrap_err();
        assert_eq!(far, "line 2: `width` is not an option");
    }

    #[test]
    fn numbers_are_written_as_a_user_writes_them() {
        let text = |value: f64| to_toml(&SettingValue::Number(value)).unwrap();
        for (value, expected) in [(1e-8, "1e-8"), (0.05, "0.05"), (1.0, "1.0"), (-2.0, "-2.0"), (5e-4, "5e-4")] {
            assert_eq!(text(value), expected);
            let read: toml::Table = toml::from_str(&format!("x = {expected}")).unwrap();
            assert_eq!(read["x"].as_float(), Some(value));
        }
        for value in [f64::INFINITY, f64::NEG_INFINITY, 1e300, 123456789.5] {
            let read: toml::Table = toml::from_str(&format!("x = {}", text(value))).unwrap();
            assert_eq!(read["x"].as_float(), Some(value), "{}", text(value));
        }
    }

    #[test]
    fn some_settings_of_a_run_are_read_whatever_the_others_are() {
        let folder = tempfile::tempdir().unwrap();
        let config = "optimizer = \"my-method\"\nmy-own = 3\nmodel = \"resnet20\"\nseed = 4\n";
        std::fs::write(folder.path().join("config.toml"), config).unwrap();
        let found = Options::some_of_run(folder.path(), &["model", "seed", "data"]).unwrap();
        assert_eq!(found.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["model", "seed"]);
        assert_eq!(found.resolve().unwrap().model.model.name(), "resnet20");
        let found = Options::some_of_run(folder.path(), &["optimizer"]).unwrap();
        let file = folder.path().join("config.toml");
        let error = found.resolve().unwrap_err().of_file(&Options::default(), Some(&file)).to_string();
        assert!(error.contains("config.toml: line 1: optimizer: my-method, expected one of sgd"), "{error}");
        assert!(matches!(Options::some_of_run(&folder.path().join("none"), &[]), Err(TrainError::NoRun { .. })));
    }

    #[test]
    fn every_method_resolves_and_is_read_back() {
        for entry in crate::optim::METHODS {
            let settings = layer(&format!("optimizer = \"{}\"", entry.name)).resolve().unwrap();
            let written = settings.to_toml().unwrap();
            assert_eq!(layer(&written).resolve().unwrap().to_toml().unwrap(), written, "{}", entry.name);
            let own_rate = settings.method().unwrap().own_rate().is_some();
            let has_momentum = settings.method().unwrap().has_momentum();
            assert_eq!(written.contains("momentum = 0.0"), has_momentum, "{}", entry.name);
            assert_eq!(
                written.contains("schedule = "),
                !own_rate || written.contains("rho-schedule"),
                "{}",
                entry.name
            );
        }
    }
}
