//! Settings that are declared once: name, help, range and default of every option, without a command line and without
//! a file format.
//!
//! [`settings!`](crate::settings!) declares a struct of settings. It writes the struct, its `Default`, a list of its
//! options (`OPTIONS`) and [`Configurable`], with which options are read and written by name. The command line, files
//! of settings, checks, `--help` and tables in the documentation are all made from that list.
//! [`words!`](crate::words!) declares a choice between a few words.
//!
//! ```
//! use polder::settings::{Configurable, SettingValue};
//!
//! polder::words! {
//!     /// How a product with the Hessian is computed.
//!     pub enum Product {
//!         /// From the derivative of the network
//!         Exact = "exact",
//!         /// From the difference of two gradients
//!         Difference = "difference",
//!     }
//! }
//!
//! polder::settings! {
//!     /// A method with a radius.
//!     #[derive(Debug, Clone, Copy, PartialEq)]
//!     pub struct Example {
//!         /// Radius of the perturbation
//!         rho: f64 = 0.05, as "RHO", in positive;
//!         /// Run the full step every K steps
//!         full_every: u64 = 5, as "K", in at_least(1);
//!         /// Products with the Hessian
//!         product: Product = Product::Difference;
//!         /// Distance of the two gradients
//!         distance: f64 = 0.01, in positive, with product = "difference";
//!         /// Scale a longer gradient down to this norm
//!         clip: Option<f64> = None, in positive;
//!     }
//!     code {
//!         /// Weights before this one are scaled. No option: it follows from the network.
//!         scaled_len: usize = usize::MAX;
//!     }
//! }
//!
//! let mut example = Example::default();
//! example.set("full-every", &SettingValue::Count(2)).unwrap();
//! assert_eq!(example, Example { full_every: 2, ..Example::default() });
//! assert_eq!(example.get("product"), Some(SettingValue::Word("difference".into())));
//!
//! let error = example.set("rho", &SettingValue::Number(0.0)).unwrap_err();
//! assert_eq!(error.to_string(), "rho: 0, expected a finite number above 0");
//! let names: Vec<&str> = Example::OPTIONS.iter().map(|option| option.name).collect();
//! assert_eq!(names, ["rho", "full-every", "product", "distance", "clip"]);
//! assert_eq!(Example::OPTIONS[0].help(), "Radius of the perturbation");
//! assert_eq!((Example::OPTIONS[0].default)(), SettingValue::Number(0.05));
//! ```
//!
//! # Syntax
//!
//! A field is written `name: type = default`, then optional parts in this order, then a semicolon:
//! - `, else "the batch size"`: what holds where the value of an `Option` is `None`, in words;
//! - `, as "RHO"`: what the value is called in `--help`; without it the kind's own word, such as `N`;
//! - `, in positive`: the range, one of the functions in [`range`](mod@range);
//! - `, with other`: the option has a meaning only where the option `other` of the same struct is on (a flag that is
//!   set, a number above 0, a value that is there); `, with other = "word"`: only where it has this value.
//!
//! A field's type is `bool`, `u64`, `usize`, `f64`, `String`, an enum of `words!`, `Vec<f32>`, `Vec<f64>`,
//! `Vec<String>`, a `Vec` of such an enum, or an `Option` of any of these. Attributes of the struct are kept; the
//! struct needs no derive. Its first doc line and those of its fields are the help texts, and a field named
//! `full_every` is the option `full-every`. The block `code { … }` holds fields that are no options; leave it out
//! where there are none.

use std::fmt;

/// The value of an option, whatever its type.
#[derive(Debug, Clone, PartialEq)]
pub enum SettingValue {
    /// No value, of an option that may be left out.
    Absent,
    /// Yes or no.
    Flag(bool),
    /// A whole number, 0 or more.
    Count(u64),
    /// A floating-point number.
    Number(f64),
    /// Any text.
    Text(String),
    /// One of a few words.
    Word(String),
    /// Several numbers.
    Numbers(Vec<f64>),
    /// Several of a few words.
    Words(Vec<String>),
    /// Several texts without a comma.
    Texts(Vec<String>),
}

impl fmt::Display for SettingValue {
    /// As a user writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("none"),
            Self::Flag(value) => write!(f, "{value}"),
            Self::Count(value) => write!(f, "{value}"),
            Self::Number(value) => f.write_str(&number(*value)),
            Self::Text(value) | Self::Word(value) => f.write_str(value),
            Self::Numbers(values) => {
                f.write_str(&values.iter().map(|value| number(*value)).collect::<Vec<_>>().join(","))
            }
            Self::Words(values) | Self::Texts(values) => f.write_str(&values.join(",")),
        }
    }
}

/// A number as a user writes it: small ones with an exponent, others without.
pub(crate) fn number(value: f64) -> String {
    if value != 0.0 && value.abs() < 1e-3 { format!("{value:e}") } else { value.to_string() }
}

/// What values an option takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettingKind {
    /// [`SettingValue::Flag`].
    Flag,
    /// [`SettingValue::Count`].
    Count,
    /// [`SettingValue::Number`].
    Number,
    /// [`SettingValue::Text`].
    Text,
    /// [`SettingValue::Word`], one of these.
    Word(&'static [Word]),
    /// [`SettingValue::Numbers`].
    Numbers,
    /// [`SettingValue::Words`], some of these.
    Words(&'static [Word]),
    /// [`SettingValue::Texts`].
    Texts,
}

impl SettingKind {
    /// What a value is called in `--help` where the declaration does not say.
    pub const fn value_name(self) -> &'static str {
        match self {
            Self::Flag => "BOOL",
            Self::Count => "N",
            Self::Number => "X",
            Self::Text => "TEXT",
            Self::Word(_) => "KIND",
            Self::Numbers => "A,B,C",
            Self::Words(_) | Self::Texts => "LIST",
        }
    }

    /// For an error: what was expected.
    pub fn expected(self) -> String {
        let list = |words: &[Word]| words.iter().map(|word| word.name).collect::<Vec<_>>().join(", ");
        match self {
            Self::Flag => "true or false".into(),
            Self::Count => "a whole number, 0 or more".into(),
            Self::Number => "a number".into(),
            Self::Text => "a text".into(),
            Self::Word(words) => format!("one of {}", list(words)),
            Self::Numbers => "a list of numbers".into(),
            Self::Words(words) => format!("a list of {}", list(words)),
            Self::Texts => "a list of texts".into(),
        }
    }
}

/// One of the words of a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    /// As a user writes it.
    pub name: &'static str,
    #[doc(hidden)]
    pub doc: &'static str,
}

impl Word {
    /// What it means, in one line.
    pub fn help(&self) -> &'static str {
        plain(self.doc)
    }
}

/// A doc comment as a help text: without the space that begins it and the full stop that ends it.
fn plain(doc: &'static str) -> &'static str {
    let text = doc.trim();
    text.strip_suffix('.').unwrap_or(text)
}

/// The numbers that an option takes.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Range {
    /// All of the option's type.
    Any,
    /// Finite numbers above 0.
    Positive,
    /// Numbers above 0, and infinity.
    AboveZero,
    /// Finite numbers, 0 or more.
    NotNegative,
    /// Numbers from 0 to 1.
    Fraction,
    /// Numbers from 0 to 1, without 1.
    BelowOne,
    /// Numbers above 0, up to this.
    UpTo(u64),
    /// Counts of at least this.
    AtLeast(u64),
    /// Counts of at most this.
    AtMost(u64),
    /// Counts from the first to the second.
    Between(u64, u64),
}

impl Range {
    /// What is expected, for an error: "a finite number above 0".
    pub fn expected(self) -> String {
        match self {
            Self::Any => "any value".into(),
            Self::Positive => "a finite number above 0".into(),
            Self::AboveZero => "a number above 0, or inf".into(),
            Self::NotNegative => "a finite number, 0 or more".into(),
            Self::Fraction => "a number from 0 to 1".into(),
            Self::BelowOne => "a number from 0 to below 1".into(),
            Self::UpTo(most) => format!("a number above 0, at most {most}"),
            Self::AtLeast(least) => format!("at least {least}"),
            Self::AtMost(most) => format!("at most {most}"),
            Self::Between(least, most) if most == least + 1 => format!("{least} or {most}"),
            Self::Between(least, most) => format!("{least} to {most}"),
        }
    }

    /// Whether a value is within the range, or each number of a list. An absent value is.
    pub fn contains(self, value: &SettingValue) -> bool {
        match (self, value) {
            (Self::Any, _) | (_, SettingValue::Absent) => true,
            (_, SettingValue::Numbers(values)) => {
                values.iter().all(|value| self.contains(&SettingValue::Number(*value)))
            }
            (Self::Positive, SettingValue::Number(value)) => *value > 0.0 && value.is_finite(),
            (Self::AboveZero, SettingValue::Number(value)) => *value > 0.0,
            (Self::NotNegative, SettingValue::Number(value)) => *value >= 0.0 && value.is_finite(),
            (Self::Fraction, SettingValue::Number(value)) => (0.0..=1.0).contains(value),
            (Self::BelowOne, SettingValue::Number(value)) => (0.0..1.0).contains(value),
            (Self::UpTo(most), SettingValue::Number(value)) => *value > 0.0 && *value <= most as f64,
            (Self::AtLeast(least), SettingValue::Count(value)) => *value >= least,
            (Self::AtMost(most), SettingValue::Count(value)) => *value <= most,
            (Self::Between(least, most), SettingValue::Count(value)) => (least..=most).contains(value),
            _ => false,
        }
    }
}

/// The ranges by the names that [`settings!`](crate::settings!) uses: `in positive`, `in at_least(1)`.
pub mod range {
    use super::Range;

    /// Finite numbers above 0.
    pub const fn positive() -> Range {
        Range::Positive
    }

    /// Numbers above 0, and infinity.
    pub const fn above_zero() -> Range {
        Range::AboveZero
    }

    /// Finite numbers, 0 or more.
    pub const fn not_negative() -> Range {
        Range::NotNegative
    }

    /// Numbers from 0 to 1.
    pub const fn fraction() -> Range {
        Range::Fraction
    }

    /// Numbers from 0 to 1, without 1.
    pub const fn below_one() -> Range {
        Range::BelowOne
    }

    /// Numbers above 0, up to `most`.
    pub const fn up_to(most: u64) -> Range {
        Range::UpTo(most)
    }

    /// Counts of at least `least`.
    pub const fn at_least(least: u64) -> Range {
        Range::AtLeast(least)
    }

    /// Counts of at most `most`.
    pub const fn at_most(most: u64) -> Range {
        Range::AtMost(most)
    }

    /// Counts from `least` to `most`.
    pub const fn between(least: u64, most: u64) -> Range {
        Range::Between(least, most)
    }
}

/// When an option has a meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    field: &'static str,
    value: Option<&'static str>,
}

impl Condition {
    #[doc(hidden)]
    pub const fn new(field: &'static str, value: Option<&'static str>) -> Self {
        Self { field, value }
    }

    /// The name of the other option.
    pub fn option(&self) -> String {
        self.field.replace('_', "-")
    }

    /// The value that the other option must have; none where it must only be on.
    pub fn value(&self) -> Option<&'static str> {
        self.value
    }

    /// Whether the other option of these settings is as the condition asks.
    pub fn holds(&self, settings: &dyn Configurable) -> bool {
        settings.get(&self.option()).is_some_and(|found| self.accepts(&found))
    }

    /// Whether this value of the other option is as the condition asks.
    pub fn accepts(&self, other: &SettingValue) -> bool {
        match self.value {
            Some(value) => other.to_string() == value,
            None => !matches!(other, SettingValue::Absent | SettingValue::Flag(false) | SettingValue::Count(0)),
        }
    }
}

/// The declaration of one option.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// In kebab case: `batch-size`.
    pub name: &'static str,
    #[doc(hidden)]
    pub doc: &'static str,
    /// What values it takes.
    pub kind: SettingKind,
    /// What a value is called in `--help`.
    pub value_name: &'static str,
    /// Which of these values it takes.
    pub range: Range,
    /// Its value if none is given.
    pub default: fn() -> SettingValue,
    /// What holds where it has no value, in words; empty where the declaration does not say.
    pub otherwise: &'static str,
    /// Which other option gives it a meaning, if it needs one.
    pub only_with: Option<Condition>,
}

impl Setting {
    /// The largest count of any option: a file of settings holds no larger one.
    pub const MOST: u64 = i64::MAX as u64;

    /// What it is for.
    pub fn help(&self) -> &'static str {
        plain(self.doc)
    }

    /// Its default as a user writes it, or what holds without a value; empty where there is nothing to say.
    pub fn default_text(&self) -> String {
        match (self.default)() {
            SettingValue::Absent => self.otherwise.into(),
            SettingValue::Flag(false) => String::new(),
            value => value.to_string(),
        }
    }

    /// The value that a text means. Parts of a list are separated by commas.
    ///
    /// # Errors
    /// As [`Setting::check`].
    pub fn parse(&self, text: &str) -> Result<SettingValue, SettingError> {
        let wrong = || SettingError::Type { name: self.name, found: text.into(), expected: self.kind.expected() };
        let parts = || text.split(',').map(|part| part.trim().to_string());
        let value = match self.kind {
            SettingKind::Flag => SettingValue::Flag(text.parse().map_err(|_| wrong())?),
            SettingKind::Count => SettingValue::Count(text.parse().map_err(|_| wrong())?),
            SettingKind::Number => SettingValue::Number(text.parse().map_err(|_| wrong())?),
            SettingKind::Text => SettingValue::Text(text.into()),
            SettingKind::Word(_) => SettingValue::Word(text.into()),
            SettingKind::Words(_) => SettingValue::Words(parts().collect()),
            SettingKind::Texts => SettingValue::Texts(parts().collect()),
            SettingKind::Numbers => {
                SettingValue::Numbers(parts().map(|part| part.parse().map_err(|_| wrong())).collect::<Result<_, _>>()?)
            }
        };
        self.check(&value)?;
        Ok(value)
    }

    /// Fails for a value of another type or out of the range.
    ///
    /// # Errors
    /// [`SettingError::Type`], [`SettingError::Range`].
    pub fn check(&self, value: &SettingValue) -> Result<(), SettingError> {
        let words_are_known =
            |words: &[Word], found: &[String]| found.iter().all(|name| words.iter().any(|word| word.name == name));
        let fits = match (self.kind, value) {
            (_, SettingValue::Absent) => (self.default)() == SettingValue::Absent,
            (SettingKind::Flag, SettingValue::Flag(_))
            | (SettingKind::Count, SettingValue::Count(_))
            | (SettingKind::Number, SettingValue::Number(_) | SettingValue::Count(_))
            | (SettingKind::Text, SettingValue::Text(_))
            | (SettingKind::Numbers, SettingValue::Numbers(_))
            | (SettingKind::Texts, SettingValue::Texts(_)) => true,
            (SettingKind::Word(words), SettingValue::Word(name) | SettingValue::Text(name)) => {
                words_are_known(words, std::slice::from_ref(name))
            }
            (SettingKind::Words(words), SettingValue::Words(names)) => words_are_known(words, names),
            _ => false,
        };
        let (name, found) = (self.name, value.to_string());
        if !fits {
            return Err(SettingError::Type { name, found, expected: self.kind.expected() });
        }
        let number = match (self.kind, value) {
            (SettingKind::Number, SettingValue::Count(count)) => &SettingValue::Number(*count as f64),
            (_, SettingValue::Count(count)) if *count > Self::MOST => {
                return Err(SettingError::Range { name, found, expected: Range::AtMost(Self::MOST).expected() });
            }
            _ => value,
        };
        if self.range.contains(number) {
            Ok(())
        } else {
            Err(SettingError::Range { name, found, expected: self.range.expected() })
        }
    }
}

/// An option that cannot be set. A message names the option as a file of settings does: `batch-size`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SettingError {
    /// The struct has no such option.
    #[error("{name}: unknown option")]
    Unknown {
        /// The name that was given.
        name: String,
    },
    /// A value of another type, or a word that is not known.
    #[error("{name}: {found}, expected {expected}")]
    Type {
        /// The option.
        name: &'static str,
        /// Its value.
        found: String,
        /// What it takes.
        expected: String,
    },
    /// A value that contradicts the others.
    #[error("{name}: {reason}")]
    Contradiction {
        /// The option.
        name: &'static str,
        /// What it contradicts. Other options are named between backticks.
        reason: &'static str,
    },
    /// An option that has no meaning beside the values of others.
    #[error("{name}: has no meaning {reason}")]
    Meaningless {
        /// The option.
        name: String,
        /// Beside what: "for `optimizer` sgd". Other options are named between backticks.
        reason: String,
    },
    /// A number out of its range.
    #[error("{name}: {found}, expected {expected}")]
    Range {
        /// The option.
        name: &'static str,
        /// Its value.
        found: String,
        /// What it takes.
        expected: String,
    },
}

impl SettingError {
    /// The name of the option.
    pub fn name(&self) -> &str {
        match self {
            Self::Unknown { name } | Self::Meaningless { name, .. } => name,
            Self::Type { name, .. } | Self::Contradiction { name, .. } | Self::Range { name, .. } => name,
        }
    }

    /// What is wrong with it: the message without the name.
    pub fn reason(&self) -> String {
        let text = self.to_string();
        text.split_once(": ").map_or(text.clone(), |(_, reason)| reason.into())
    }
}

/// A struct whose options are read and written by name; [`settings!`](crate::settings!) writes the implementation.
pub trait Configurable {
    /// Its options, in the order of the declaration.
    fn options(&self) -> &'static [Setting];

    /// The value of an option; `None` if there is no such option.
    fn get(&self, name: &str) -> Option<SettingValue>;

    /// Sets an option.
    ///
    /// # Errors
    /// An option that the struct does not have, a value of another type or out of its range. The old value stays.
    fn set(&mut self, name: &str, value: &SettingValue) -> Result<(), SettingError>;

    /// Whether an option has a meaning beside the values of the others (see [`Setting::only_with`]); false where there
    /// is no such option.
    fn applies(&self, name: &str) -> bool
    where
        Self: Sized,
    {
        applies(self, name)
    }

    /// Checks the range of every option. Code that fills in the fields itself calls this; [`Configurable::set`] checks
    /// each value.
    ///
    /// # Errors
    /// [`SettingError::Range`] of the first option that is out of its range.
    fn check(&self) -> Result<(), SettingError> {
        self.options().iter().try_for_each(|option| match self.get(option.name) {
            Some(value) => option.check(&value),
            None => Ok(()),
        })
    }
}

/// [`Configurable::applies`] for settings whose type is not known.
pub fn applies(settings: &dyn Configurable, name: &str) -> bool {
    let option = settings.options().iter().find(|option| option.name == name);
    option.is_some_and(|option| option.only_with.is_none_or(|condition| condition.holds(settings)))
}

/// A type that an option can have.
pub trait OptionType: Sized {
    /// What values it takes.
    const KIND: SettingKind;

    /// As a value.
    fn to_value(&self) -> SettingValue;

    /// From a value; `None` for one of another type.
    fn from_value(value: &SettingValue) -> Option<Self>;
}

impl OptionType for bool {
    const KIND: SettingKind = SettingKind::Flag;

    fn to_value(&self) -> SettingValue {
        SettingValue::Flag(*self)
    }

    fn from_value(value: &SettingValue) -> Option<Self> {
        if let SettingValue::Flag(value) = value { Some(*value) } else { None }
    }
}

impl OptionType for u64 {
    const KIND: SettingKind = SettingKind::Count;

    fn to_value(&self) -> SettingValue {
        SettingValue::Count(*self)
    }

    fn from_value(value: &SettingValue) -> Option<Self> {
        if let SettingValue::Count(value) = value { Some(*value) } else { None }
    }
}

impl OptionType for usize {
    const KIND: SettingKind = SettingKind::Count;

    fn to_value(&self) -> SettingValue {
        SettingValue::Count(*self as u64)
    }

    fn from_value(value: &SettingValue) -> Option<Self> {
        if let SettingValue::Count(value) = value { Self::try_from(*value).ok() } else { None }
    }
}

impl OptionType for f64 {
    const KIND: SettingKind = SettingKind::Number;

    fn to_value(&self) -> SettingValue {
        SettingValue::Number(*self)
    }

    /// A whole number is a number, too.
    fn from_value(value: &SettingValue) -> Option<Self> {
        match value {
            SettingValue::Number(value) => Some(*value),
            SettingValue::Count(value) => Some(*value as f64),
            _ => None,
        }
    }
}

impl OptionType for String {
    const KIND: SettingKind = SettingKind::Text;

    fn to_value(&self) -> SettingValue {
        SettingValue::Text(self.clone())
    }

    fn from_value(value: &SettingValue) -> Option<Self> {
        if let SettingValue::Text(value) = value { Some(value.clone()) } else { None }
    }
}

impl OptionType for Vec<String> {
    const KIND: SettingKind = SettingKind::Texts;

    fn to_value(&self) -> SettingValue {
        SettingValue::Texts(self.clone())
    }

    fn from_value(value: &SettingValue) -> Option<Self> {
        if let SettingValue::Texts(values) = value { Some(values.clone()) } else { None }
    }
}

impl OptionType for Vec<f64> {
    const KIND: SettingKind = SettingKind::Numbers;

    fn to_value(&self) -> SettingValue {
        SettingValue::Numbers(self.clone())
    }

    fn from_value(value: &SettingValue) -> Option<Self> {
        if let SettingValue::Numbers(values) = value { Some(values.clone()) } else { None }
    }
}

impl OptionType for Vec<f32> {
    const KIND: SettingKind = SettingKind::Numbers;

    /// Each as the shortest decimal number that is this f32, not the digits of its f64.
    fn to_value(&self) -> SettingValue {
        let decimal = |value: &f32| value.to_string().parse().unwrap_or(f64::from(*value));
        SettingValue::Numbers(self.iter().map(decimal).collect())
    }

    fn from_value(value: &SettingValue) -> Option<Self> {
        let SettingValue::Numbers(values) = value else { return None };
        Some(values.iter().map(|value| *value as f32).collect())
    }
}

impl<T: OptionType> OptionType for Option<T> {
    const KIND: SettingKind = T::KIND;

    fn to_value(&self) -> SettingValue {
        self.as_ref().map_or(SettingValue::Absent, T::to_value)
    }

    fn from_value(value: &SettingValue) -> Option<Self> {
        match value {
            SettingValue::Absent => Some(None),
            value => T::from_value(value).map(Some),
        }
    }
}

/// A choice between a few words; [`words!`](crate::words!) writes the implementation.
pub trait Choice: Copy + 'static {
    /// The words, in the order of the declaration.
    const WORDS: &'static [Word];

    /// All values, in the same order.
    const ALL: &'static [Self];

    /// The word of this value.
    fn word(self) -> &'static str;

    /// The value of a word; `None` for any other text.
    fn from_word(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|value| value.word() == word)
    }
}

impl<T: Choice> OptionType for T {
    const KIND: SettingKind = SettingKind::Word(T::WORDS);

    fn to_value(&self) -> SettingValue {
        SettingValue::Word(self.word().into())
    }

    fn from_value(value: &SettingValue) -> Option<Self> {
        if let SettingValue::Word(word) | SettingValue::Text(word) = value { Self::from_word(word) } else { None }
    }
}

impl<T: Choice> OptionType for Vec<T> {
    const KIND: SettingKind = SettingKind::Words(T::WORDS);

    fn to_value(&self) -> SettingValue {
        SettingValue::Words(self.iter().map(|value| value.word().to_string()).collect())
    }

    fn from_value(value: &SettingValue) -> Option<Self> {
        let SettingValue::Words(words) = value else { return None };
        words.iter().map(|word| T::from_word(word)).collect()
    }
}

/// A text that is not one of the words of a choice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{found}: expected {}", SettingKind::Word(words).expected())]
pub struct UnknownWord {
    /// The text.
    pub found: String,
    /// The words.
    pub words: &'static [Word],
}

/// The name of an option in kebab case, from that of its field; of the same length.
#[doc(hidden)]
pub const fn kebab<const N: usize>(field: &str) -> [u8; N] {
    let (bytes, mut name, mut index) = (field.as_bytes(), [0; N], 0);
    while index < N {
        name[index] = if bytes[index] == b'_' { b'-' } else { bytes[index] };
        index += 1;
    }
    name
}

/// Whether a field is the one that an option is named after.
#[doc(hidden)]
pub fn is_named(field: &str, option: &str) -> bool {
    field.len() == option.len() && field.bytes().zip(option.bytes()).all(|(a, b)| a == b || (a, b) == (b'_', b'-'))
}

/// Declares a choice between a few words: an enum, [`Choice`](crate::settings::Choice), `Display` and `FromStr`. Each
/// word has one line of help. See [`settings`](mod@crate::settings).
#[macro_export]
macro_rules! words {
    (
        $(#[$meta:meta])*
        $visibility:vis enum $name:ident {
            $($(#[doc = $doc:literal])+ $variant:ident = $word:literal),+ $(,)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        $visibility enum $name {
            $($(#[doc = $doc])+ $variant),+
        }

        impl $crate::settings::Choice for $name {
            const WORDS: &'static [$crate::settings::Word] =
                &[$($crate::settings::Word { name: $word, doc: concat!($($doc),+) }),+];
            const ALL: &'static [Self] = &[$(Self::$variant),+];

            fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }
        }

        impl ::std::str::FromStr for $name {
            type Err = $crate::settings::UnknownWord;

            fn from_str(text: &str) -> ::std::result::Result<Self, $crate::settings::UnknownWord> {
                let words = <Self as $crate::settings::Choice>::WORDS;
                <Self as $crate::settings::Choice>::from_word(text)
                    .ok_or_else(|| $crate::settings::UnknownWord { found: text.into(), words })
            }
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.pad($crate::settings::Choice::word(*self))
            }
        }
    };
}

/// Declares a struct of settings: the struct, its `Default`, the list `OPTIONS` and
/// [`Configurable`](crate::settings::Configurable). See [`settings`](mod@crate::settings) for the syntax and an
/// example.
#[macro_export]
macro_rules! settings {
    (
        $(#[$meta:meta])*
        $visibility:vis struct $name:ident {
            $(
                $(#[doc = $doc:literal])+
                $field:ident : $type:ty = $default:expr
                $(, else $otherwise:literal)?
                $(, as $value_name:literal)?
                $(, in $range:ident $(($($bound:expr),+))?)?
                $(, with $other:ident $(= $word:literal)?)?
                ;
            )*
        }
        $(code {
            $($(#[$code_meta:meta])* $code_field:ident : $code_type:ty = $code_default:expr;)*
        })?
    ) => {
        $(#[$meta])*
        $visibility struct $name {
            $($(#[doc = $doc])+ pub $field: $type,)*
            $($($(#[$code_meta])* pub $code_field: $code_type,)*)?
        }

        impl ::std::default::Default for $name {
            fn default() -> Self {
                Self {
                    $($field: $default,)*
                    $($($code_field: $code_default,)*)?
                }
            }
        }

        impl $name {
            /// The options, in the order of the fields.
            pub const OPTIONS: &'static [$crate::settings::Setting] = &[$({
                const FIELD: &str = stringify!($field);
                const NAME: [u8; FIELD.len()] = $crate::settings::kebab(FIELD);
                const KIND: $crate::settings::SettingKind = <$type as $crate::settings::OptionType>::KIND;
                #[allow(unused_mut, unused_assignments)]
                const SETTING: $crate::settings::Setting = {
                    let mut value_name = KIND.value_name();
                    $(value_name = $value_name;)?
                    let mut range = $crate::settings::Range::Any;
                    $(range = $crate::settings::range::$range($($($bound),+)?);)?
                    let mut otherwise = "";
                    $(otherwise = $otherwise;)?
                    let mut only_with = None;
                    $(
                        let mut value: Option<&'static str> = None;
                        $(value = Some($word);)?
                        only_with = Some($crate::settings::Condition::new(stringify!($other), value));
                    )?
                    $crate::settings::Setting {
                        name: match ::std::str::from_utf8(&NAME) {
                            Ok(name) => name,
                            Err(_) => FIELD,
                        },
                        doc: concat!($($doc),+),
                        kind: KIND,
                        value_name,
                        range,
                        default: || {
                            let default: $type = $default;
                            $crate::settings::OptionType::to_value(&default)
                        },
                        otherwise,
                        only_with,
                    }
                };
                SETTING
            }),*];
        }

        impl $crate::settings::Configurable for $name {
            fn options(&self) -> &'static [$crate::settings::Setting] {
                Self::OPTIONS
            }

            #[allow(unused_variables)]
            fn get(&self, name: &str) -> Option<$crate::settings::SettingValue> {
                $(
                    if $crate::settings::is_named(stringify!($field), name) {
                        return Some($crate::settings::OptionType::to_value(&self.$field));
                    }
                )*
                None
            }

            fn set(
                &mut self,
                name: &str,
                value: &$crate::settings::SettingValue,
            ) -> ::std::result::Result<(), $crate::settings::SettingError> {
                let unknown = || $crate::settings::SettingError::Unknown { name: name.into() };
                let option = Self::OPTIONS.iter().find(|option| option.name == name).ok_or_else(unknown)?;
                option.check(value)?;
                $(
                    if $crate::settings::is_named(stringify!($field), name) {
                        let found = <$type as $crate::settings::OptionType>::from_value(value);
                        self.$field = found.ok_or_else(|| $crate::settings::SettingError::Type {
                            name: option.name,
                            found: value.to_string(),
                            expected: option.kind.expected(),
                        })?;
                    }
                )*
                Ok(())
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    words! {
        /// A shape.
        pub enum Shape {
            /// With corners.
            Square = "square",
            /// Without any
            Round = "round",
        }
    }

    settings! {
        /// Every type that an option can have.
        #[derive(Debug, Clone, PartialEq)]
        pub struct Everything {
            /// A flag that
            /// takes two lines.
            is_on: bool = false;
            /// A count
            count_of_things: usize = 3, as "K", in at_least(2);
            /// Another count
            most: u64 = 0, in at_most(9);
            /// A number
            radius: f64 = 1e-8, in positive;
            /// A share
            share: f64 = 0.0, in fraction;
            /// A number that may be absent
            weight: Option<f64> = None, else "that of the radius", in not_negative;
            /// A share that is not the whole
            decay: f64 = 0.5, in below_one;
            /// One or two
            sides: usize = 2, in between(1, 2);
            /// A text
            path: String = "here".into();
            /// A word
            shape: Shape = Shape::Square;
            /// Numbers
            mean: Option<Vec<f32>> = None;
            /// Words
            shapes: Vec<Shape> = vec![Shape::Round, Shape::Square], with is_on;
            /// A number for round things
            bend: f64 = 2.0, with shape = "round";
        }
        code {
            /// Not an option.
            length: usize = 7;
        }
    }

    settings! {
        /// Nothing to set.
        pub struct Nothing {}
    }

    fn option(name: &str) -> &'static Setting {
        Everything::OPTIONS.iter().find(|option| option.name == name).unwrap()
    }

    #[test]
    fn a_text_is_a_value_of_the_kind_and_within_the_range() {
        let kind = |kind, range| Setting { kind, range, ..Everything::OPTIONS[0] };
        let parsed = |setting: Setting, text: &str| setting.parse(text).ok();
        let (number, numbers) =
            (kind(SettingKind::Number, Range::Positive), kind(SettingKind::Numbers, Range::Fraction));
        assert_eq!(parsed(number, "1e-3"), Some(SettingValue::Number(1e-3)));
        assert_eq!(parsed(kind(SettingKind::Flag, Range::Any), "true"), Some(SettingValue::Flag(true)));
        assert_eq!(parsed(kind(SettingKind::Count, Range::AtLeast(2)), "2"), Some(SettingValue::Count(2)));
        assert_eq!(parsed(numbers, "0.5, 1"), Some(SettingValue::Numbers(vec![0.5, 1.0])));
        for (setting, wrong) in [(number, "0"), (number, "x"), (numbers, "0.5,2"), (numbers, "")] {
            assert_eq!(parsed(setting, wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_declaration_has_name_help_kind_range_and_default() {
        let names: Vec<&str> = Everything::OPTIONS.iter().map(|option| option.name).collect();
        let expected = [
            "is-on",
            "count-of-things",
            "most",
            "radius",
            "share",
            "weight",
            "decay",
            "sides",
            "path",
            "shape",
            "mean",
            "shapes",
            "bend",
        ];
        assert_eq!(names, expected);
        assert_eq!(option("is-on").help(), "A flag that takes two lines");
        assert_eq!((option("count-of-things").value_name, option("most").value_name), ("K", "N"));
        assert_eq!(option("count-of-things").range.expected(), "at least 2");
        assert_eq!((option("count-of-things").default)(), SettingValue::Count(3));
        assert_eq!(option("radius").default_text(), "1e-8");
        let without = ["weight", "mean", "is-on"].map(|name| option(name).default_text());
        assert_eq!(without, ["that of the radius", "", ""]);
        assert_eq!((option("shapes").default)().to_string(), "round,square");
        let SettingKind::Word(words) = option("shape").kind else { panic!("a word") };
        assert_eq!(
            words.iter().map(|word| (word.name, word.help())).collect::<Vec<_>>(),
            [("square", "With corners"), ("round", "Without any")]
        );
        assert_eq!(Everything::default().length, 7);
        assert!(Nothing::OPTIONS.is_empty() && Nothing {}.get("path").is_none());
    }

    #[test]
    fn defaults_can_be_read_and_written_back() {
        let defaults = Everything::default();
        let mut copy = Everything { count_of_things: 9, radius: 3.0, path: String::new(), ..Everything::default() };
        copy.shapes.clear();
        let settings: &mut dyn Configurable = &mut copy;
        for option in settings.options() {
            let value = defaults.get(option.name).unwrap();
            assert_eq!(value, (option.default)(), "{}", option.name);
            settings.set(option.name, &value).unwrap();
        }
        assert_eq!(copy, defaults);
        copy.check().unwrap();
    }

    #[test]
    fn a_value_of_another_type_or_out_of_range_is_refused_and_changes_nothing() {
        let mut settings = Everything::default();
        let wrong = [
            ("nothing", SettingValue::Flag(true), "nothing: unknown option"),
            ("length", SettingValue::Count(1), "length: unknown option"),
            ("is_on", SettingValue::Flag(true), "is_on: unknown option"),
            ("count-of-things", SettingValue::Count(1), "count-of-things: 1, expected at least 2"),
            ("count-of-things", SettingValue::Number(4.0), "count-of-things: 4, expected a whole number, 0 or more"),
            ("most", SettingValue::Count(10), "most: 10, expected at most 9"),
            ("radius", SettingValue::Number(f64::NAN), "radius: NaN, expected a finite number above 0"),
            ("radius", SettingValue::Count(0), "radius: 0, expected a finite number above 0"),
            ("radius", SettingValue::Absent, "radius: none, expected a number"),
            ("share", SettingValue::Number(1.5), "share: 1.5, expected a number from 0 to 1"),
            ("most", SettingValue::Count(u64::MAX), "most: 18446744073709551615, expected at most 9223372036854775807"),
            ("decay", SettingValue::Number(1.0), "decay: 1, expected a number from 0 to below 1"),
            ("sides", SettingValue::Count(3), "sides: 3, expected 1 or 2"),
            ("weight", SettingValue::Number(-1.0), "weight: -1, expected a finite number, 0 or more"),
            ("shape", SettingValue::Word("oval".into()), "shape: oval, expected one of square, round"),
            ("shapes", SettingValue::Words(vec!["oval".into()]), "shapes: oval, expected a list of square, round"),
            ("path", SettingValue::Flag(true), "path: true, expected a text"),
        ];
        for (name, value, message) in wrong {
            assert_eq!(settings.set(name, &value).unwrap_err().to_string(), message);
        }
        assert_eq!(settings, Everything::default());
        settings.set("weight", &SettingValue::Count(2)).unwrap();
        settings.set("mean", &SettingValue::Numbers(vec![0.4914])).unwrap();
        assert_eq!(settings.get("mean").unwrap().to_string(), "0.4914");
        settings.set("shape", &SettingValue::Text("round".into())).unwrap();
        assert_eq!(
            (settings.weight, settings.mean.clone(), settings.shape),
            (Some(2.0), Some(vec![0.4914]), Shape::Round)
        );
        settings.radius = -1.0;
        assert!(matches!(settings.check(), Err(SettingError::Range { name: "radius", .. })));
    }

    #[test]
    fn an_option_applies_where_the_other_one_is_as_it_asks() {
        let mut settings = Everything::default();
        assert!(settings.applies("path") && !settings.applies("nothing"));
        assert!(!settings.applies("bend") && !settings.applies("shapes"));
        settings.shape = Shape::Round;
        settings.is_on = true;
        assert!(settings.applies("bend") && settings.applies("shapes"));
        let condition = option("bend").only_with.unwrap();
        assert_eq!((condition.option(), condition.value()), ("shape".to_string(), Some("round")));
    }
}
