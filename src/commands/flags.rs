//! Flags from the declarations of settings: names, help, defaults and values of the library's options, for clap.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser, ValueParser};
use clap::{Arg, ArgAction, ArgMatches, Command, Error, FromArgMatches};
use polder::settings::{Choice, Kind, OptionType, Setting, Value, Word};
use polder::train::{CurvatureSettings, ModelName, Options, TrainError, options};

/// The message of an error, in which settings are named as flags: `--batch-size`.
pub fn message(error: &TrainError) -> String {
    match error {
        TrainError::Setting { name, reason } => format!("--{name}: {}", with_flags(reason)),
        TrainError::Model(reason) => format!("--model: {reason}"),
        TrainError::RunExists { path } => {
            let path = path.display();
            format!("{error}; `--resume {path}` continues a run, another --out starts a new one")
        }
        error => error.to_string(),
    }
}

/// Settings between backticks become flags.
fn with_flags(text: &str) -> String {
    let run = options();
    let is_setting = |name: &str| {
        let names = run.iter().map(|option| option.setting.name);
        names.chain(CurvatureSettings::OPTIONS.iter().map(|setting| setting.name)).any(|other| other == name)
    };
    let parts = text.split('`').enumerate().map(|(index, part)| match index % 2 {
        0 => part.into(),
        _ if is_setting(part) => format!("--{part}"),
        _ => format!("`{part}`"),
    });
    parts.collect()
}

/// A value parser for one of a few words.
pub fn choice<T: Choice + Send + Sync>() -> ValueParser {
    let parser = possible(T::WORDS).try_map(|word| T::from_word(&word).ok_or("unknown word"));
    ValueParser::new(parser)
}

/// A value parser for the name of a model.
pub fn model() -> ValueParser {
    let Kind::Word(words) = ModelName::KIND else { return clap::value_parser!(ModelName).into() };
    ValueParser::new(possible(words).try_map(|word| word.parse::<ModelName>()))
}

fn possible(words: &'static [Word]) -> PossibleValuesParser {
    PossibleValuesParser::new(words.iter().map(|word| PossibleValue::new(word.name).help(word.help())))
}

/// The flag of an option.
fn flag(setting: &Setting, heading: &'static str, help: String) -> Arg {
    let arg = Arg::new(setting.name).long(setting.name).value_name(setting.value_name).help(with_flags(&help));
    let arg = if heading.is_empty() { arg } else { arg.help_heading(heading) };
    match setting.kind {
        Kind::Flag => arg.num_args(0..=1).default_missing_value("true").value_parser(clap::value_parser!(bool)),
        Kind::Count => arg.value_parser(clap::value_parser!(u64)),
        Kind::Number => arg.value_parser(clap::value_parser!(f64)),
        Kind::Text => arg.value_parser(clap::value_parser!(String)),
        Kind::Word(words) => arg.value_parser(possible(words)),
        Kind::Numbers => {
            let arg = arg.action(ArgAction::Append).value_delimiter(',').allow_hyphen_values(true);
            arg.value_parser(clap::value_parser!(f32))
        }
        Kind::Words(words) => arg.action(ArgAction::Append).value_delimiter(',').value_parser(possible(words)),
    }
}

/// The value that was given for an option.
fn given(setting: &Setting, matches: &ArgMatches) -> Option<Value> {
    let name = setting.name;
    Some(match setting.kind {
        Kind::Flag => Value::Flag(*matches.get_one(name)?),
        Kind::Count => Value::Count(*matches.get_one(name)?),
        Kind::Number => Value::Number(*matches.get_one(name)?),
        Kind::Text => Value::Text(matches.get_one::<String>(name)?.clone()),
        Kind::Word(_) => Value::Word(matches.get_one::<String>(name)?.clone()),
        Kind::Numbers => Value::Numbers(matches.get_many(name)?.copied().collect()),
        Kind::Words(_) => Value::Words(matches.get_many::<String>(name)?.cloned().collect()),
    })
}

/// The flags of `polder train`: the options that were given.
pub struct RunFlags(pub Options);

impl clap::Args for RunFlags {
    fn augment_args(command: Command) -> Command {
        command.args(options().iter().map(|option| flag(&option.setting, option.heading, option.full_help())))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for RunFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let value = |setting: &Setting| Some((setting.name.to_string(), given(setting, matches)?));
        Ok(Self(options().iter().filter_map(|option| value(&option.setting)).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The flags of `polder curvature` that say what to measure.
pub struct CurvatureFlags(pub Options);

impl clap::Args for CurvatureFlags {
    fn augment_args(command: Command) -> Command {
        let with_default = |setting: &Setting| format!("{} [default: {}]", setting.help(), (setting.default)());
        command.args(CurvatureSettings::OPTIONS.iter().map(|setting| flag(setting, "", with_default(setting))))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for CurvatureFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let value = |setting: &Setting| Some((setting.name.to_string(), given(setting, matches)?));
        Ok(Self(CurvatureSettings::OPTIONS.iter().filter_map(value).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
