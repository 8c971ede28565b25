//! A configuration from its file.

use std::fs;
use std::path::Path;

use thiserror::Error;

use super::{Config, parse};

/// Why a file gives no configuration.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{summary}")]
pub struct LoadError {
    /// A line for each mistake, with the file's name and the line in it.
    pub mistakes: Vec<String>,
    /// How many those are, or why the file cannot be read.
    pub summary: String,
}

/// Reads a configuration file.
///
/// # Errors
/// When it cannot be read, or has mistakes: all of them.
pub fn load(path: &Path) -> Result<Config, LoadError> {
    let read = fs::read_to_string(path);
    let path = path.display();
    let text = read.map_err(|error| LoadError {
        mistakes: Vec::new(),
        summary: format!("cannot read {path}: {error}"),
    })?;
    parse(&text).map_err(|mistakes| {
        let plural = if mistakes.len() == 1 { "" } else { "s" };
        LoadError {
            summary: format!("{path} has {} mistake{plural}", mistakes.len()),
            mistakes: mistakes.iter().map(|m| format!("{path}:{}: {}", m.line, m.message)).collect(),
        }
    })
}
