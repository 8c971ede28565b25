//! Sizes as people write them: `4096`, `64K`, `512M`, `2G`.

use thiserror::Error;

/// What is wrong with a size.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SizeError {
    /// Not digits with at most one unit behind them.
    #[error("'{0}' is not a size: write a number with K, M, G or T behind it, as in \"512M\"")]
    Malformed(String),
    /// More than 64 bits.
    #[error("'{0}' is larger than 64 bits")]
    TooLarge(String),
}

/// Reads a size in bytes; K, M, G and T are powers of 1024.
///
/// # Errors
/// When the text is no size, or one that 64 bits do not hold.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let trimmed = text.trim();
    let digits = trimmed.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match trimmed[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(SizeError::Malformed(text.into())),
    };
    let digits = digits.trim_end();
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(SizeError::Malformed(text.into()));
    }
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| SizeError::TooLarge(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("64K"), Ok(64 << 10));
        assert_eq!(parse_size("2 GiB"), Ok(2 << 30));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "G", "-1", "1X", "1.5G", "0x10"] {
            assert!(matches!(parse_size(text), Err(SizeError::Malformed(_))), "{text}");
        }
        assert!(matches!(parse_size("99999999T"), Err(SizeError::TooLarge(_))));
    }
}
