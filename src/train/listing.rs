//! The list of all options of a run, with help texts and defaults: for `--help`, for the table in `docs/methods.md` and
//! for reading files of settings.

use std::fmt::Write as _;

use super::settings::{AdamWSettings, BaseName, GENERAL, SgdSettings};
use crate::optim::METHODS;
use crate::settings::{Choice, Kind, Range, Setting, Value};

/// An option of a run, for `--help` and documentation.
#[derive(Debug, Clone)]
pub struct RunOption {
    /// Its declaration. Where several methods declare it, the first.
    pub setting: Setting,
    /// What it is for: the help text, or several where it means different things to different methods.
    pub help: Vec<&'static str>,
    /// What it belongs to: Data, Model, Optimizer, Run, Curvature.
    pub heading: &'static str,
    /// The methods or base optimizers that have it, each with its default, and methods under which a base optimizer has
    /// another default. Empty for an option of every run.
    pub of: Vec<(&'static str, Value)>,
    /// Whether these are base optimizers.
    pub of_base: bool,
}

impl RunOption {
    /// Its default, if it has one: "0.05; asam 0.5, cr-sam and gnr 0.1, gam 0.02".
    pub fn default_text(&self) -> Option<String> {
        let all: Vec<(&str, String)> = match &self.of[..] {
            [] => vec![("", self.written((self.setting.default)()))],
            of => of.iter().map(|(name, value)| (*name, self.written(value.clone()))).collect(),
        };
        let mut groups: Vec<(&String, Vec<&str>)> = Vec::new();
        for (name, value) in &all {
            match groups.iter_mut().find(|(other, _)| *other == value) {
                Some((_, names)) => names.push(name),
                None => groups.push((value, vec![name])),
            }
        }
        // The most frequent value is the default, the first of several; for a base optimizer's option, SGD's.
        let most = groups.iter().map(|(_, names)| names.len()).max()?;
        let usual = groups.iter().position(|(_, names)| self.of_base || names.len() == most)?;
        let usual = groups.remove(usual).0;
        if usual.is_empty() {
            return None;
        }
        let mut text = usual.clone();
        for (index, (value, names)) in groups.iter().enumerate() {
            let _ = write!(text, "{} {} {value}", if index == 0 { ";" } else { "," }, names.join(" and "));
        }
        Some(text)
    }

    /// The names of the methods or base optimizers that have it.
    pub fn owners(&self) -> Vec<&'static str> {
        let names = self.of.iter().map(|(name, _)| *name);
        names.filter(|name| !self.of_base || BaseName::from_word(name).is_some()).collect()
    }

    /// A default as a user writes it; nothing for a value that is absent and for a flag that is not set.
    fn written(&self, value: Value) -> String {
        if matches!(value, Value::Absent | Value::Flag(false)) { String::new() } else { value.to_string() }
    }

    /// The help text with the methods, where they are few, and the default.
    pub fn full_help(&self) -> String {
        let mut help = self.help.join("; ");
        if !self.of_base && (2..=4).contains(&self.of.len()) {
            let methods: Vec<&str> = self.of.iter().map(|(name, _)| *name).collect();
            let _ = write!(help, " ({})", methods.join(", "));
        }
        if let Some(default) = self.default_text() {
            let _ = write!(help, " [default: {default}]");
        }
        help
    }

    /// What values it takes, for a table: its range or its words.
    pub fn values(&self) -> String {
        match (self.setting.kind, self.setting.range) {
            (Kind::Word(words) | Kind::Words(words), _) => {
                words.iter().map(|word| word.name).collect::<Vec<_>>().join(", ")
            }
            (kind, Range::Any) => kind.expected(),
            (_, range) => range.expected(),
        }
    }
}

/// All options of a run, in the order of `--help`.
pub fn options() -> Vec<RunOption> {
    let mut found = Vec::new();
    for (heading, settings) in GENERAL {
        let (first, rest) = match heading {
            // The method's options follow those that choose it, and the base's come last.
            "Optimizer" => settings.split_at(2),
            _ => (settings, &[][..]),
        };
        let general = |setting: &Setting| RunOption {
            setting: *setting,
            help: vec![setting.help()],
            heading,
            of: Vec::new(),
            of_base: false,
        };
        found.extend(first.iter().map(general));
        if heading == "Optimizer" {
            found.extend(of_methods());
            found.extend(rest.iter().map(general));
            found.extend(of_bases());
        }
    }
    found
}

/// Adds the options of a method or a base to a list in which each name occurs once.
fn gather(list: &mut Vec<RunOption>, owner: &'static str, options: &'static [Setting]) {
    for setting in options {
        let default = (setting.default)();
        match list.iter_mut().find(|option| option.setting.name == setting.name) {
            Some(option) => {
                option.of.push((owner, default));
                if !option.help.contains(&setting.help()) {
                    option.help.push(setting.help());
                }
            }
            None => list.push(RunOption {
                setting: *setting,
                help: vec![setting.help()],
                heading: "Optimizer",
                of: vec![(owner, default)],
                of_base: false,
            }),
        }
    }
}

/// The options that methods declare.
fn of_methods() -> Vec<RunOption> {
    let mut found = Vec::new();
    METHODS.iter().for_each(|entry| gather(&mut found, entry.name, (entry.new)().options()));
    found
}

pub(super) fn of_bases() -> Vec<RunOption> {
    let mut found = Vec::new();
    gather(&mut found, "sgd", SgdSettings::OPTIONS);
    gather(&mut found, "adamw", AdamWSettings::OPTIONS);
    found.iter_mut().for_each(|option| option.of_base = true);
    // The step size of such a method is that of gradient descent without momentum.
    let own_rate = METHODS.iter().filter(|entry| (entry.new)().own_rate().is_some());
    let momentum = found.iter_mut().find(|option| option.setting.name == "momentum");
    if let Some(option) = momentum {
        option.of.extend(own_rate.map(|entry| (entry.name, Value::Number(0.0))));
    }
    found
}

/// The declaration of an option, by name. Where several methods declare it, the first.
pub(super) fn find_option(name: &str) -> Option<Setting> {
    let declared = GENERAL.iter().flat_map(|(_, options)| options.iter());
    let bases = SgdSettings::OPTIONS.iter().chain(AdamWSettings::OPTIONS);
    let method = || METHODS.iter().find_map(|entry| (entry.new)().options().iter().find(|option| option.name == name));
    declared.chain(bases).find(|option| option.name == name).or_else(method).copied()
}
