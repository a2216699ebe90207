//! The protocol between a script and our side: one command per line on standard input, one line of JSON as the answer.

use std::error::Error;
use std::io::{BufRead, Write};

use serde_json::{Value, json};

pub type Answer<T = Value> = Result<T, Box<dyn Error>>;

/// Passes the words of every command to `answer` until `quit`. An error becomes the answer `{"error": "..."}`.
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
