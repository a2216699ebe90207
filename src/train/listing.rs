//! The list of all options of a run, with help texts and defaults: for `--help`, for the table in `docs/methods.md` and
//! for reading files of settings.

use std::fmt::Write as _;

use super::settings::{AdamWSettings, BaseName, GENERAL, MuonSettings, NO_MOMENTUM, SgdSettings, is_offered};
use crate::optim::METHODS;
use crate::settings::{Choice, Range, Setting, SettingKind, number};

/// A method or a base optimizer that has an option.
#[derive(Debug, Clone)]
pub struct Owner {
    /// Its name.
    pub name: &'static str,
    /// Its declaration of the option.
    pub setting: Setting,
    /// The default: the declaration's, or another one that a method gives to an option of its base optimizer.
    pub default: String,
}

/// An option of a run, for `--help` and documentation.
#[derive(Debug, Clone)]
pub struct RunOption {
    /// Its declaration. Where several methods declare it, the first.
    pub setting: Setting,
    /// What it belongs to: Data, Model, Optimizer, Run, Curvature.
    pub heading: &'static str,
    /// The methods or base optimizers that have it. Empty for an option of every run.
    pub of: Vec<Owner>,
    /// Whether these are base optimizers.
    pub of_base: bool,
}

impl RunOption {
    /// An option that all runs have.
    pub const fn general(setting: Setting, heading: &'static str) -> Self {
        Self { setting, heading, of: Vec::new(), of_base: false }
    }

    /// What it is for: the help text, or several where it means different things to different methods.
    pub fn help(&self) -> String {
        let mut texts = vec![self.setting.help()];
        for owner in &self.of {
            if !texts.contains(&owner.setting.help()) {
                texts.push(owner.setting.help());
            }
        }
        texts.join("; ")
    }

    /// Its default, if it has one: "0.05; asam 0.5, cr-sam and gnr 0.1, gam 0.02".
    pub fn default_text(&self) -> String {
        if self.of.is_empty() {
            return self.setting.default_text();
        }
        self.common_first(|owner| owner.default.clone())
    }

    /// What values it takes: its range or its words.
    pub fn values(&self) -> String {
        if self.of.is_empty() {
            return values(&self.setting);
        }
        self.common_first(|owner| values(&owner.setting))
    }

    /// A text for each owner, as one: the most frequent text, the first of several, then those of others with their
    /// names. For an option of base optimizers SGD's comes first.
    fn common_first(&self, text: impl Fn(&Owner) -> String) -> String {
        let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
        for owner in &self.of {
            let text = text(owner);
            match groups.iter_mut().find(|(other, _)| *other == text) {
                Some((_, names)) => names.push(owner.name),
                None => groups.push((text, vec![owner.name])),
            }
        }
        let most = groups.iter().map(|(_, names)| names.len()).max().unwrap_or(0);
        let usual = groups.iter().position(|(_, names)| self.of_base || names.len() == most);
        let Some(usual) = usual else { return String::new() };
        let mut all = groups.remove(usual).0;
        for (index, (text, names)) in groups.iter().enumerate() {
            let _ = write!(all, "{} {} {text}", if index == 0 { ";" } else { "," }, names.join(" and "));
        }
        all
    }

    /// The methods or base optimizers that have it, in words: "gsam, looksam", "all but sgd, adamw". Empty for an
    /// option of every run.
    pub fn owners(&self) -> String {
        let has = |name: &str| self.of.iter().any(|owner| owner.name == name);
        let names =
            |of: bool| METHODS.iter().map(|entry| entry.name).filter(|name| has(name) == of).collect::<Vec<_>>();
        let bases = || BaseName::ALL.iter().map(|base| base.word()).filter(|name| has(name)).collect::<Vec<_>>();
        match (self.of_base, names(true), names(false)) {
            _ if self.of.is_empty() => String::new(),
            (true, ..) => bases().join(", "),
            (false, have, lack) if lack.len() < have.len() => format!("all but {}", lack.join(", ")),
            (false, have, _) => have.join(", "),
        }
    }

    /// The help text with the methods, where there are several, and the default.
    pub fn full_help(&self) -> String {
        let mut help = self.help();
        if !self.of_base && self.of.len() > 1 {
            let _ = write!(help, " ({})", self.owners());
        }
        let default = self.default_text();
        if !default.is_empty() {
            let _ = write!(help, " [default: {default}]");
        }
        help
    }
}

/// The values of a declaration.
fn values(setting: &Setting) -> String {
    match (setting.kind, setting.range) {
        (SettingKind::Word(words) | SettingKind::Words(words), _) => {
            words.iter().map(|word| word.name).collect::<Vec<_>>().join(", ")
        }
        (kind, Range::Any) => kind.expected(),
        (kind @ SettingKind::Numbers, range) => format!("{}, each {}", kind.expected(), range.expected()),
        (_, range) => range.expected(),
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
        found.extend(first.iter().map(|setting| general(setting, heading)));
        if heading == "Optimizer" {
            found.extend(of_methods());
            found.extend(rest.iter().map(|setting| general(setting, heading)));
            found.extend(of_bases());
        }
    }
    found
}

/// A general option, with the methods that have it unless all have.
fn general(setting: &Setting, heading: &'static str) -> RunOption {
    let mut option = RunOption::general(*setting, heading);
    let offered = |entry: &&crate::optim::Entry| is_offered(setting.name, &*(entry.new)(), entry.base.is_none());
    let of: Vec<Owner> = METHODS.iter().filter(offered).map(|entry| owner(entry.name, setting)).collect();
    if of.len() < METHODS.len() {
        option.of = of;
    }
    option
}

fn owner(name: &'static str, setting: &Setting) -> Owner {
    Owner { name, setting: *setting, default: setting.default_text() }
}

/// Adds the options of a method or a base to a list in which each name occurs once.
fn gather(list: &mut Vec<RunOption>, name: &'static str, options: &'static [Setting]) {
    for setting in options {
        let owner = owner(name, setting);
        match list.iter_mut().find(|option| option.setting.name == setting.name) {
            Some(option) => option.of.push(owner),
            None => list.push(RunOption { of: vec![owner], ..RunOption::general(*setting, "Optimizer") }),
        }
    }
}

/// The options that methods declare.
fn of_methods() -> Vec<RunOption> {
    let mut found = Vec::new();
    METHODS.iter().for_each(|entry| gather(&mut found, entry.name, (entry.new)().options()));
    found
}

/// The options that base optimizers declare.
pub(super) fn of_bases() -> Vec<RunOption> {
    let mut found = Vec::new();
    gather(&mut found, BaseName::Sgd.word(), SgdSettings::OPTIONS);
    gather(&mut found, BaseName::AdamW.word(), AdamWSettings::OPTIONS);
    gather(&mut found, BaseName::Muon.word(), MuonSettings::OPTIONS);
    found.iter_mut().for_each(|option| option.of_base = true);
    let without = METHODS.iter().filter(|entry| (entry.new)().has_momentum());
    let momentum = found.iter_mut().find(|option| option.setting.name == "momentum");
    if let Some(option) = momentum {
        let setting = option.setting;
        option.of.extend(without.map(|entry| Owner { default: number(NO_MOMENTUM), ..owner(entry.name, &setting) }));
    }
    found
}

/// The declaration of an option, by name. Where several methods declare it, the first.
pub(super) fn find_option(name: &str) -> Option<Setting> {
    let declared = GENERAL.iter().flat_map(|(_, options)| options.iter());
    let bases = SgdSettings::OPTIONS.iter().chain(AdamWSettings::OPTIONS).chain(MuonSettings::OPTIONS);
    let method = || METHODS.iter().find_map(|entry| (entry.new)().options().iter().find(|option| option.name == name));
    declared.chain(bases).find(|option| option.name == name).or_else(method).copied()
}

/// The option whose name is most like this one, if there is any like it.
pub(super) fn similar_option(name: &str) -> Option<&'static str> {
    let names = options().into_iter().map(|option| option.setting.name);
    let likeness = names.map(|other| (strsim::jaro_winkler(name, other), other));
    let (likeness, other) = likeness.max_by(|(a, _), (b, _)| a.total_cmp(b))?;
    (likeness > 0.85).then_some(other)
}
