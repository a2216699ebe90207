//! Constants that kernels and Rust share. Their one source is C++ headers; this writes them as Rust.
//!
//! Read are, in those headers alone:
//! - `constexpr TYPE kName = EXPRESSION;` of integers: `pub(crate) const NAME: usize`;
//! - `enum Name : uint32_t { kFirst = 0, ... };`: a `pub(crate) const FIRST: u32` for each value;
//! - a table `#define POLDER_NAME(ROW) ROW(label, number, ...) ...`: a macro `polder_name!(row)` that makes an array of
//!   `row!("label", number, ...)`, the label in lower case.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use crate::cpp::{self, Place, Source, Token, TokenKind};

/// A named number.
pub struct Constant {
    pub name: String,
    pub value: i64,
    /// `usize`, or `u32` for an enumerator.
    pub rust_type: &'static str,
    pub docs: Vec<String>,
    pub place: Place,
}

/// A table of rows of numbers, each with a label.
pub struct Table {
    pub name: String,
    pub rows: Vec<(String, Vec<i64>)>,
    pub docs: Vec<String>,
    pub place: Place,
}

#[derive(Default)]
pub struct Constants {
    pub constants: BTreeMap<String, Constant>,
    pub tables: Vec<Table>,
}

impl Constants {
    /// Reads the shared headers, in the order of their inclusion.
    ///
    /// # Errors
    /// A text that names the place: a definition that cannot be read, or two of one name.
    pub fn read(headers: &[Source]) -> Result<Self, String> {
        let mut all = Self::default();
        for header in headers {
            all.read_code(header)?;
            all.read_tables(header)?;
        }
        Ok(all)
    }

    /// A constant's value by its name in C++.
    pub fn value(&self, name: &str) -> Option<i64> {
        self.constants.get(name).map(|constant| constant.value)
    }

    fn add(&mut self, constant: Constant) -> Result<(), String> {
        if let Some(other) = self.constants.get(&constant.name) {
            return Err(format!("{}: `{}` is also defined in {}", constant.place, constant.name, other.place));
        }
        self.constants.insert(constant.name.clone(), constant);
        Ok(())
    }

    fn read_code(&mut self, header: &Source) -> Result<(), String> {
        let tokens = cpp::tokens(&header.text);
        let mut docs: Vec<String> = Vec::new();
        let mut at = 0;
        while at < tokens.len() {
            let place = Place { path: header.path.clone(), line: tokens[at].line };
            if tokens[at].kind == TokenKind::Comment {
                docs.push(tokens[at].text.clone());
                at += 1;
            } else if tokens[at].is("constexpr") {
                let end = position(&tokens, at, ";").ok_or_else(|| format!("{place}: a constant without an end"))?;
                let equals = position(&tokens[..end], at, "=").filter(|&equals| equals > at + 1);
                let equals = equals.ok_or_else(|| format!("{place}: a constant without a value"))?;
                let name = tokens[equals - 1].text.clone();
                let value = self.evaluate(&tokens[equals + 1..end], &place)?;
                let mut docs = std::mem::take(&mut docs);
                docs.extend(trailing(&tokens, end));
                self.add(Constant { name, value, rust_type: "usize", docs, place })?;
                at = end + 1;
            } else if tokens[at].is("enum") {
                at = self.read_enum(&tokens, at, std::mem::take(&mut docs), &place)?;
            } else {
                docs.clear();
                at += 1;
            }
        }
        Ok(())
    }

    /// Reads an enumeration from `enum` on; returns where the code goes on.
    fn read_enum(&mut self, tokens: &[Token], at: usize, docs: Vec<String>, place: &Place) -> Result<usize, String> {
        let unreadable = || format!("{place}: expected `enum Name : uint32_t {{ kName = 0, ... }};`");
        let header: Vec<&str> = tokens[at..].iter().take(5).map(|token| token.text.as_str()).collect();
        let ["enum", _, ":", "uint32_t", "{"] = header[..] else { return Err(unreadable()) };
        let end = position(tokens, at, "}").ok_or_else(unreadable)?;
        let mut next = at + 5;
        while next < end {
            if matches!(tokens[next].kind, TokenKind::Comment | TokenKind::Trailing) {
                next += 1;
                continue;
            }
            if !tokens.get(next + 1).is_some_and(|token| token.is("=")) {
                return Err(unreadable());
            }
            let stop = position(&tokens[..end], next, ",").unwrap_or(end);
            let last =
                (next + 2..stop).take_while(|&i| tokens[i].kind != TokenKind::Trailing).last().unwrap_or(next) + 1;
            let name = tokens[next].text.clone();
            let place = Place { line: tokens[next].line, ..place.clone() };
            let value = self.evaluate(&tokens[(next + 2).min(last)..last], &place)?;
            let own = trailing(tokens, if stop == end { last - 1 } else { stop });
            let docs = if own.is_empty() { docs.clone() } else { own };
            self.add(Constant { name, value, rust_type: "u32", docs, place })?;
            next = stop + 1;
        }
        Ok(end + 1)
    }

    fn read_tables(&mut self, header: &Source) -> Result<(), String> {
        let lines: Vec<&str> = header.text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let Some(definition) = line.strip_prefix("#define POLDER_") else { continue };
            let place = Place { path: header.path.clone(), line: index + 1 };
            let unreadable =
                |what: &str| format!("{place}: {what} in a table `#define POLDER_NAME(ROW) ROW(label, 1) ...`");
            let Some((name, rest)) = definition.split_once("(ROW)") else { continue };
            let mut body = rest.to_string();
            let mut last = index;
            while lines[last].ends_with('\\') {
                last += 1;
                body.push_str(lines.get(last).ok_or_else(|| unreadable("a table without an end"))?);
            }
            let (mut rows, body) = (Vec::new(), body.replace('\\', " "));
            for row in body.split("ROW(").skip(1) {
                let (row, _) = row.split_once(')').ok_or_else(|| unreadable("a row without an end"))?;
                let mut cells = row.split(',').map(str::trim);
                let label = cells.next().unwrap_or_default().to_lowercase();
                let numbers: Result<Vec<i64>, _> = cells.map(str::parse).collect();
                rows.push((label, numbers.map_err(|_| unreadable("something that is not a number"))?));
            }
            if rows.is_empty() || rows.iter().any(|row| row.1.len() != rows[0].1.len()) {
                return Err(unreadable("no rows, or rows of different lengths"));
            }
            let above = lines[..index].iter().rev().take_while(|line| line.starts_with("///"));
            let mut docs: Vec<String> = above.map(|line| line.trim_start_matches('/').trim().to_string()).collect();
            docs.reverse();
            self.tables.push(Table { name: format!("polder_{}", name.to_lowercase()), rows, docs, place });
        }
        Ok(())
    }

    fn evaluate(&self, tokens: &[Token], place: &Place) -> Result<i64, String> {
        let text: Vec<&str> = tokens.iter().map(|token| token.text.as_str()).collect();
        cpp::evaluate(&text.join(" "), &|name| self.value(name)).map_err(|error| format!("{place}: {error}"))
    }

    /// The constants as Rust.
    pub fn to_rust(&self) -> String {
        let mut text = String::from("// Written by build.rs from the constants that the kernels' headers share.\n");
        for Constant { name, value, rust_type, docs, place } in self.constants.values() {
            write_docs(&mut text, "", docs, place);
            let _ = writeln!(text, "#[allow(dead_code)]\npub(crate) const {}: {rust_type} = {value};", rust_name(name));
        }
        for Table { name, rows, docs, place } in &self.tables {
            write_docs(&mut text, "", docs, place);
            let _ = writeln!(text, "macro_rules! {name} {{\n    ($row:ident) => {{\n        [");
            for (label, numbers) in rows {
                let numbers: Vec<String> = numbers.iter().map(i64::to_string).collect();
                let _ = writeln!(text, "            $row!(\"{label}\", {}),", numbers.join(", "));
            }
            let _ = writeln!(text, "        ]\n    }};\n}}\npub(crate) use {name};");
        }
        text
    }

    /// Assertions for the C++ compiler that every constant of a header has the value that Rust was given.
    pub fn to_assertions(&self, header: &Path) -> String {
        let of_header = self.constants.values().filter(|constant| constant.place.path == header);
        of_header.fold(String::new(), |mut text, Constant { name, value, place, .. }| {
            let rust = rust_name(name);
            let _ = writeln!(text, "static_assert({name} == {value}, \"{place}: {rust} is {value} in constants.rs\");");
            text
        })
    }
}

/// `kMaxTerms` as `MAX_TERMS`.
pub fn rust_name(name: &str) -> String {
    let name = name.strip_prefix('k').unwrap_or(name);
    let mut result = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !result.is_empty() {
            result.push('_');
        }
        result.extend(letter.to_uppercase());
    }
    result
}

/// Documentation from C++ comments, which names the place of the definition.
pub fn write_docs(text: &mut String, indent: &str, docs: &[String], place: &Place) {
    for line in docs {
        let _ = writeln!(text, "{indent}/// {line}");
    }
    if !docs.is_empty() {
        let _ = writeln!(text, "{indent}///");
    }
    let _ = writeln!(text, "{indent}/// Defined in `{}`.", place.path.display());
}

/// Where `mark` stands next, from `at` on.
fn position(tokens: &[Token], at: usize, mark: &str) -> Option<usize> {
    (at..tokens.len()).find(|&i| tokens[i].is(mark))
}

/// The comment behind token `at`, if it is on the same line.
fn trailing(tokens: &[Token], at: usize) -> Vec<String> {
    let line = tokens[at].line;
    let next = tokens.get(at + 1).filter(|token| token.kind == TokenKind::Trailing && token.line == line);
    next.map(|token| token.text.clone()).into_iter().collect()
}
