//! Flags from the declarations of settings: names, help, defaults and values of options, for clap.

use std::marker::PhantomData;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Arg, ArgAction, ArgMatches, Command, Error, FromArgMatches};
use polder::report::PictureSettings;
use polder::settings::{Configurable, Setting, SettingKind, SettingValue, Word};
use polder::train::{CurvatureSettings, Options, RunOption, TrainError, options};

use super::Failure;
use super::landscape::LandscapeSettings;
use super::model::{MeasureSettings, WeightsSettings};

/// The message of a failure, in which settings are named as flags: `--batch-size`.
pub fn message(failure: &Failure) -> String {
    let error = match failure {
        Failure::Output(error) => return format!("standard output: {error}"),
        Failure::Work(error) => error,
    };
    match error {
        TrainError::Setting { name, reason } => format!("--{name}: {}", with_flags(reason)),
        TrainError::Device(polder::device::Error::Unavailable { .. }) => format!("--device: {error}"),
        TrainError::RunExists { path } => {
            let path = path.display();
            format!("{error}; `--resume {path}` continues a run, another --out starts a new one")
        }
        TrainError::Occupied { .. } => format!("{error}; choose another --out"),
        error => error.to_string(),
    }
}

/// Settings between backticks become flags.
fn with_flags(text: &str) -> String {
    let run = options();
    let own = [
        CurvatureSettings::OPTIONS,
        WeightsSettings::OPTIONS,
        MeasureSettings::OPTIONS,
        LandscapeSettings::OPTIONS,
        PictureSettings::OPTIONS,
    ];
    let is_setting = |name: &str| {
        let names = run.iter().map(|option| option.setting.name);
        names.chain(own.into_iter().flatten().map(|setting| setting.name)).any(|other| other == name)
    };
    let parts = text.split('`').enumerate().map(|(index, part)| match index % 2 {
        0 => part.into(),
        _ if is_setting(part) => format!("--{part}"),
        _ => format!("`{part}`"),
    });
    parts.collect()
}

/// A list of options that become flags.
pub trait FlagList {
    /// The options, in the order of `--help`.
    fn list() -> Vec<RunOption>;
}

impl<S: Configurable + Default> FlagList for S {
    fn list() -> Vec<RunOption> {
        S::default().options().iter().map(|setting| RunOption::general(*setting, "")).collect()
    }
}

/// The options of `polder train`.
pub struct OfRun;

impl FlagList for OfRun {
    fn list() -> Vec<RunOption> {
        options()
    }
}

/// The flags of a list, and the values that were given for them.
pub struct Flags<L> {
    /// The values that were given.
    pub given: Options,
    list: PhantomData<L>,
}

impl<S: Configurable + Default> Flags<S> {
    /// The given values over the defaults.
    ///
    /// # Errors
    /// A value out of its range.
    pub fn settings(&self) -> Result<S, TrainError> {
        let mut settings = S::default();
        for (name, value) in self.given.iter() {
            settings.set(name, value)?;
        }
        Ok(settings)
    }
}

impl<L: FlagList> clap::Args for Flags<L> {
    fn augment_args(command: Command) -> Command {
        command.args(L::list().iter().map(flag))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<L: FlagList> FromArgMatches for Flags<L> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let list = L::list();
        let value = |option: &RunOption| Some((option.setting.name.to_string(), given(&option.setting, matches)?));
        Ok(Self { given: list.iter().filter_map(value).collect(), list: PhantomData })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The flag of an option.
fn flag(option: &RunOption) -> Arg {
    let setting = &option.setting;
    let help = with_flags(&option.full_help());
    let arg = Arg::new(setting.name).long(setting.name).value_name(setting.value_name).help(help);
    let arg = if option.heading.is_empty() { arg } else { arg.help_heading(option.heading) };
    let kind = setting.kind;
    match kind {
        SettingKind::Flag => arg.num_args(0..=1).default_missing_value("true").value_parser(clap::value_parser!(bool)),
        SettingKind::Count => arg.value_parser(move |text: &str| text.parse::<u64>().map_err(|_| kind.expected())),
        SettingKind::Number => arg.value_parser(move |text: &str| text.parse::<f64>().map_err(|_| kind.expected())),
        SettingKind::Text => arg.value_parser(clap::value_parser!(String)),
        SettingKind::Word(words) => arg.value_parser(possible(words)),
        SettingKind::Numbers => {
            let arg = arg.action(ArgAction::Append).value_delimiter(',').allow_hyphen_values(true);
            arg.value_parser(clap::value_parser!(f64))
        }
        SettingKind::Words(words) => arg.action(ArgAction::Append).value_delimiter(',').value_parser(possible(words)),
        SettingKind::Texts => {
            arg.action(ArgAction::Append).value_delimiter(',').value_parser(clap::value_parser!(String))
        }
    }
}

fn possible(words: &'static [Word]) -> PossibleValuesParser {
    PossibleValuesParser::new(words.iter().map(|word| PossibleValue::new(word.name).help(word.help())))
}

/// The value that was given for an option.
fn given(setting: &Setting, matches: &ArgMatches) -> Option<SettingValue> {
    let name = setting.name;
    Some(match setting.kind {
        SettingKind::Flag => SettingValue::Flag(*matches.get_one(name)?),
        SettingKind::Count => SettingValue::Count(*matches.get_one(name)?),
        SettingKind::Number => SettingValue::Number(*matches.get_one(name)?),
        SettingKind::Text => SettingValue::Text(matches.get_one::<String>(name)?.clone()),
        SettingKind::Word(_) => SettingValue::Word(matches.get_one::<String>(name)?.clone()),
        SettingKind::Numbers => SettingValue::Numbers(matches.get_many(name)?.copied().collect()),
        SettingKind::Words(_) => SettingValue::Words(matches.get_many::<String>(name)?.cloned().collect()),
        SettingKind::Texts => SettingValue::Texts(matches.get_many::<String>(name)?.cloned().collect()),
    })
}
