//! Numbers of the command line: what each may be, and what is said of one that it may not be. What is
//! refused here would otherwise be cut, or mean something that nobody asked for.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::pattern;

/// The longest time between two packets, or for which anything is kept.
const LONGEST: Duration = Duration::from_secs(1_000_000);

/// Packets a second: more than none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate(f64);

impl Rate {
    /// `None` for what is no rate.
    pub fn new(packets_a_second: f64) -> Option<Self> {
        (packets_a_second > 0.0 && packets_a_second.is_finite()).then_some(Self(packets_a_second))
    }

    /// The part of it that one of so many has.
    pub fn share(self, of: u16) -> Self {
        Self((self.0 / f64::from(of.max(1))).max(f64::MIN_POSITIVE))
    }

    /// Packets that are due after this time; none is due at its beginning.
    pub fn due(self, elapsed: Duration) -> u64 {
        (elapsed.as_secs_f64() * self.0) as u64
    }

    /// Between two packets.
    pub fn interval(self) -> Duration {
        Duration::try_from_secs_f64(1.0 / self.0).map_or(LONGEST, |interval| interval.min(LONGEST))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rate = text.parse().ok().and_then(Self::new);
        rate.ok_or_else(|| "no rate: give packets a second, more than 0, such as 5000 or 0.5".to_owned())
    }
}

/// A time, seconds: 0 or more.
pub(super) fn seconds(text: &str) -> Result<f64, String> {
    let time = text.parse().ok().filter(|time: &f64| *time >= 0.0 && time.is_finite());
    time.ok_or_else(|| "no time: give seconds, 0 or more, such as 10 or 0.5".to_owned())
}

/// A time, seconds: more than 0, and no longer than anybody waits.
pub(super) fn positive(text: &str) -> Result<f64, String> {
    let most = LONGEST.as_secs_f64();
    let time = text.parse().ok().filter(|time: &f64| *time > 0.0 && *time <= most);
    time.ok_or_else(|| format!("no time: give seconds, more than 0 and at most {most}, such as 300 or 0.5"))
}

/// A length of memory that is given in MiB. Returns bytes.
pub(super) fn mebibytes(text: &str) -> Result<u64, String> {
    let bytes = text.parse().ok().filter(|mib| *mib > 0).and_then(|mib: u64| mib.checked_mul(1 << 20));
    // What lies beyond is an offset in no file.
    let bytes = bytes.filter(|bytes| i64::try_from(*bytes).is_ok());
    bytes.ok_or_else(|| format!("no length of memory: give MiB, 1 to {}", i64::MAX >> 20))
}

/// Length of a frame that can be checked, bytes.
pub(super) fn frame_len(text: &str) -> Result<usize, String> {
    let (least, most) = (pattern::MIN_LEN, pattern::MAX_LEN);
    let len = text.parse().ok().filter(|len| (least..=most).contains(len));
    len.ok_or_else(|| format!("no length of a frame: give bytes, {least} to {most}"))
}

/// An address, in decimal or in hexadecimal.
pub(super) fn address(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| format!("{error}; give a number such as 0 or 0x100000000"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_no_rate_is_refused_and_what_is_one_has_packets_at_their_times() {
        for text in ["nan", "inf", "-inf", "0", "-0.0", "-5", "1e999", "", "fast", "5k"] {
            assert!(text.parse::<Rate>().unwrap_err().contains("more than 0"), "{text}");
        }
        let rate: Rate = "1000".parse().unwrap();
        let times = [0, 999, 1000, 1_500_000].map(Duration::from_micros);
        assert_eq!(times.map(|elapsed| rate.due(elapsed)), [0, 0, 1, 1500]);
        assert_eq!((rate.interval(), rate.share(4).interval()), (times[2], Duration::from_millis(4)));
        // No rate has a time that there is not.
        for text in ["1e-300", "5e-324", "1e308"] {
            let rate: Rate = text.parse().unwrap();
            assert!(rate.share(u16::MAX).interval() <= LONGEST, "{text}");
            rate.due(Duration::MAX);
        }
    }

    #[test]
    fn no_bit_of_a_number_is_cut_off() {
        assert_eq!((mebibytes("64"), mebibytes("1")), (Ok(64 << 20), Ok(1 << 20)));
        assert_eq!(mebibytes("8796093022207"), Ok((i64::MAX as u64 >> 20) << 20));
        for text in ["0", "-1", "8796093022208", "17592186044480", "18446744073709551616", "64M"] {
            assert!(mebibytes(text).unwrap_err().contains("1 to 8796093022207"), "{text}");
        }
        assert_eq!((frame_len("30"), frame_len("65535")), (Ok(30), Ok(65_535)));
        for text in ["29", "65536", "0", "-1", "x"] {
            assert!(frame_len(text).unwrap_err().contains("30 to 65535"), "{text}");
        }
        assert_eq!((seconds("0"), seconds("1.5")), (Ok(0.0), Ok(1.5)));
        assert!(["nan", "inf", "-1", "x"].into_iter().all(|text| seconds(text).is_err()));
        assert_eq!((positive("0.5"), positive("1000000")), (Ok(0.5), Ok(1e6)));
        assert!(["0", "nan", "inf", "-1", "1e7", "x"].into_iter().all(|text| positive(text).is_err()));
        assert_eq!((address("0x10"), address("16")), (Ok(16), Ok(16)));
        assert!(address("x").unwrap_err().contains("0x100000000"));
    }
}
