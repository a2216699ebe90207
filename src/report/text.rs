//! Names and numbers as text. A name from a file has no control characters and a limited length, wherever it is shown.

/// The most characters of a name from a file.
const LONGEST: usize = 200;

/// A name from a file in one line: white space becomes a space, other control characters the replacement character, and
/// a long name is cut.
pub(super) fn plain(text: &str) -> String {
    shortened(text, LONGEST)
}

/// The same with at most this many characters.
pub(super) fn shortened(text: &str, most: usize) -> String {
    // Marks that change the direction of writing could hide a part of the name.
    let is_hidden = |character: char| {
        character.is_control()
            || matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let shown = |character: char| match character {
        '\t' | '\n' | '\r' => ' ',
        character if is_hidden(character) => '\u{fffd}',
        character => character,
    };
    let mut characters = text.chars();
    let short: String = characters.by_ref().take(most).map(shown).collect();
    if characters.next().is_none() { short } else { short + "…" }
}

/// A number with four significant digits.
pub(super) fn digits(value: f64) -> String {
    significant(value, 4)
}

/// A number with this many significant digits.
pub(super) fn significant(value: f64, count: i32) -> String {
    if !value.is_finite() {
        return "not finite".into();
    }
    if value == 0.0 {
        return "0".into();
    }
    let exponent = value.abs().log10().floor() as i32;
    if !(-3..6).contains(&exponent) {
        let decimals = (count - 1).max(0) as usize;
        return format!("{value:.decimals$e}").replace('-', "−");
    }
    let decimals = (count - 1 - exponent).max(0) as usize;
    let text = format!("{value:.decimals$}");
    // Whole numbers such as epochs need no decimal zeros.
    let text = if value.fract() == 0.0 && text.contains('.') { format!("{value:.0}") } else { text };
    text.replace('-', "−")
}

/// A number with all its digits.
pub(super) fn exactly(value: f64) -> String {
    let text = if (1e-3..1e6).contains(&value.abs()) { value.to_string() } else { format!("{value:e}") };
    text.replace('-', "−")
}

/// A value and its errors, with the digits that the largest error allows: two of that error, but no more than five of
/// the value.
pub fn with_errors(value: f64, errors: &[f64]) -> (String, Vec<String>) {
    // A rounding residue is not an error.
    let errors: Vec<f64> = errors.iter().map(|&error| if error > 1e-9 * value.abs() { error } else { 0.0 }).collect();
    let largest = errors.iter().copied().fold(0.0, f64::max);
    let place = |value: f64| if value == 0.0 { f64::NEG_INFINITY } else { (value.abs().log10() + 1e-9).floor() };
    let is_plain = |value: f64| value == 0.0 || (1e-4..1e6).contains(&value.abs());
    if largest == 0.0 || !largest.is_finite() || !is_plain(value) || largest >= 1e6 {
        let each = errors.iter().map(|&error| significant(error, 2)).collect();
        return (digits(value), each);
    }
    let decimals = (1.0 - place(largest)).min(4.0 - place(value)).max(0.0) as usize;
    let error = |&error: &f64| {
        // An error that these digits would show as zero has its own.
        if error == 0.0 || place(error) >= -(decimals as f64) {
            format!("{error:.decimals$}")
        } else {
            significant(error, 2)
        }
    };
    (format!("{value:.decimals$}").replace('-', "−"), errors.iter().map(error).collect())
}

/// "1 run", "2 runs".
pub(super) fn counted<N: std::fmt::Display + PartialEq + From<u8>>(count: N, noun: &str) -> String {
    let ending = if count == N::from(1) { "" } else { "s" };
    format!("{count} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_follow_the_error() {
        let text = |value, errors: &[f64]| {
            let (value, errors) = with_errors(value, errors);
            format!("{value} ± {}", errors.join(", "))
        };
        assert_eq!(text(106.8266, &[21.1]), "107 ± 21");
        assert_eq!(text(82.0, &[2.0]), "82.0 ± 2.0");
        assert_eq!(text(85.55, &[21.1, 0.041]), "86 ± 21, 0.041");
        assert_eq!(text(-0.5, &[0.0]), "−0.5000 ± 0");
        assert_eq!(text(12.3456789, &[1e-6]), "12.346 ± 1.0e−6");
        assert_eq!(text(0.0, &[0.25]), "0.00 ± 0.25");
        assert_eq!(text(3e40, &[2e39]), "3.000e40 ± 2.0e39");
    }

    #[test]
    fn names_are_one_line_of_limited_length() {
        assert_eq!(plain("a\nb\u{1b}[31m\u{9b}c\u{202e}"), "a b\u{fffd}[31m\u{fffd}c\u{fffd}");
        assert_eq!(plain(&"é".repeat(1 << 20)).chars().count(), LONGEST + 1);
        assert_eq!(plain(&"é".repeat(LONGEST)), "é".repeat(LONGEST));
    }
}
