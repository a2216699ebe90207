//! What our sides of the comparisons with PyTorch share: they answer each command, a line on standard input, with one line of JSON.

use std::error::Error;
use std::io::{BufRead, Write};

use serde_json::{Value, json};

pub type Answer<T = Value> = Result<T, Box<dyn Error>>;

/// Answers the words of every command until `quit`; what it cannot do, with `{"error": "..."}`.
pub fn serve(mut answer: impl FnMut(&[&str]) -> Answer) -> Answer<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        if words[..] == ["quit"] {
            break;
        }
        let answer = answer(&words).unwrap_or_else(|error| json!({ "error": error.to_string() }));
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

pub fn unknown(words: &[&str]) -> Answer {
    Err(format!("unknown command `{}`", words.join(" ")).into())
}

pub fn number<T: std::str::FromStr>(word: &str) -> Answer<T> {
    word.parse().map_err(|_| format!("{word}: not a number").into())
}
