//! What a process has used, as the kernel counts it.

use std::fs;
use std::time::Duration;

use anyhow::Context;

/// CPU time and bytes read and written by system calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU time of all threads that live.
    pub cpu: Duration,
    /// Bytes through read and write calls, whatever they were made on.
    pub io_bytes: u64,
}

impl Usage {
    /// Of the process with this number.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let mut nanos = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task")).context("the broker's threads")? {
            // A thread that has just ended has no file any more.
            let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
            nanos += first_number(&text).unwrap_or(0);
        }
        let io = fs::read_to_string(format!("/proc/{pid}/io")).context("the broker's system calls")?;
        let bytes = |key: &str| io.lines().find_map(|line| line.strip_prefix(key)).and_then(first_number);
        let io_bytes = bytes("rchar: ").zip(bytes("wchar: ")).map(|(read, written)| read + written);
        Ok(Self {
            cpu: Duration::from_nanos(nanos),
            io_bytes: io_bytes.context("/proc/PID/io has no counts")?,
        })
    }

    /// What was used since an earlier moment.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(earlier.cpu),
            io_bytes: self.io_bytes.saturating_sub(earlier.io_bytes),
        }
    }
}

fn first_number(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn work_and_writes_are_counted() {
        let before = Usage::of(std::process::id()).unwrap();
        let mut sum = 0_u64;
        for number in 0..3_000_000_u64 {
            sum = std::hint::black_box(sum.wrapping_add(number));
        }
        fs::write("/dev/null", vec![0; 4096]).unwrap();
        let used = Usage::of(std::process::id()).unwrap().since(before);
        assert!(used.cpu > Duration::ZERO);
        assert!(used.io_bytes >= 4096);
    }
}
