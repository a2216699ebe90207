//! Reads as much C++ as the kernels' shared definitions use: tokens with their lines, and the comments between them.

use std::fmt;
use std::path::PathBuf;

/// A source file.
pub struct Source {
    /// Its path from the package's root.
    pub path: PathBuf,
    pub text: String,
}

/// A line of a source, as compilers name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub path: PathBuf,
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenKind {
    /// An identifier, a keyword or a number.
    Word,
    /// One character.
    Mark,
    /// A comment on a line of its own, without its slashes.
    Comment,
    /// A comment behind code, without its slashes.
    Trailing,
}

#[derive(Debug, Clone)]
pub struct Token {
    pub kind: TokenKind,
    pub text: String,
    pub line: usize,
}

impl Token {
    pub fn is(&self, text: &str) -> bool {
        matches!(self.kind, TokenKind::Word | TokenKind::Mark) && self.text == text
    }
}

/// The tokens of a source. Preprocessor lines and the contents of string literals are left out.
pub fn tokens(text: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut directive = false;
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        let was_directive = directive;
        directive = (was_directive || line.trim_start().starts_with('#')) && line.ends_with('\\');
        if was_directive || line.trim_start().starts_with('#') {
            continue;
        }
        let (code, comment) = match line.find("//") {
            Some(at) => (&line[..at], Some(line[at..].trim_start_matches('/').trim())),
            None => (line, None),
        };
        let before = found.len();
        let mut rest = code;
        while let Some(first) = rest.chars().next() {
            let word = |c: char| c.is_alphanumeric() || c == '_';
            if first == '"' {
                rest = rest[1..].split_once('"').map_or("", |(_, after)| after);
                continue;
            }
            let length = if word(first) { rest.find(|c| !word(c)).unwrap_or(rest.len()) } else { first.len_utf8() };
            let kind = if word(first) { TokenKind::Word } else { TokenKind::Mark };
            if !first.is_whitespace() {
                found.push(Token { kind, text: rest[..length].to_string(), line: number });
            }
            rest = &rest[length..];
        }
        if let Some(comment) = comment {
            let kind = if found.len() > before { TokenKind::Trailing } else { TokenKind::Comment };
            found.push(Token { kind, text: comment.to_string(), line: number });
        }
    }
    found
}

/// The value of an integer expression of literals, names that `named` knows, `+ - * / <<` and parentheses.
pub fn evaluate(text: &str, named: &dyn Fn(&str) -> Option<i64>) -> Result<i64, String> {
    let tokens = tokens(text);
    let mut at = 0;
    let value = shift(&tokens, &mut at, named)?;
    match tokens.get(at) {
        Some(token) => Err(format!("unexpected `{}` in `{text}`", token.text)),
        None => Ok(value),
    }
}

type Named<'a> = &'a dyn Fn(&str) -> Option<i64>;

fn shift(tokens: &[Token], at: &mut usize, named: Named<'_>) -> Result<i64, String> {
    let mut value = sum(tokens, at, named)?;
    while tokens.get(*at).is_some_and(|t| t.is("<")) && tokens.get(*at + 1).is_some_and(|t| t.is("<")) {
        *at += 2;
        value <<= sum(tokens, at, named)?;
    }
    Ok(value)
}

fn sum(tokens: &[Token], at: &mut usize, named: Named<'_>) -> Result<i64, String> {
    let mut value = product(tokens, at, named)?;
    while let Some(mark) = tokens.get(*at).filter(|t| t.is("+") || t.is("-")) {
        *at += 1;
        let next = product(tokens, at, named)?;
        value = if mark.is("+") { value + next } else { value - next };
    }
    Ok(value)
}

fn product(tokens: &[Token], at: &mut usize, named: Named<'_>) -> Result<i64, String> {
    let mut value = factor(tokens, at, named)?;
    while let Some(mark) = tokens.get(*at).filter(|t| t.is("*") || t.is("/")) {
        *at += 1;
        let next = factor(tokens, at, named)?;
        value = if mark.is("*") { value * next } else { value.checked_div(next).ok_or("a division by zero")? };
    }
    Ok(value)
}

fn factor(tokens: &[Token], at: &mut usize, named: Named<'_>) -> Result<i64, String> {
    let token = tokens.get(*at).ok_or("an expression that ends too early")?;
    *at += 1;
    if token.is("(") {
        let value = shift(tokens, at, named)?;
        let closed = tokens.get(*at).is_some_and(|t| t.is(")"));
        *at += 1;
        return if closed { Ok(value) } else { Err("a parenthesis that is not closed".into()) };
    }
    let known = token.text.parse().ok().or_else(|| named(&token.text));
    known.ok_or_else(|| format!("`{}` is neither a number nor a known constant", token.text))
}
