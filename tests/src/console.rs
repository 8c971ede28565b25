//! The host's end of the command loop that `vm/init` runs on a guest's second serial port.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// More than this from one command is a guest gone wild.
const OUTPUT_LIMIT: usize = 64 << 20;

/// What a command in a guest did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit code; 128 and the signal's number if a signal ended it.
    pub code: i32,
    /// What it wrote to standard output and standard error, as it came.
    pub text: String,
}

/// A line by which the guest speaks for itself, rather than for a command.
#[derive(Debug, PartialEq, Eq)]
enum Marker {
    Ready,
    Broken(String),
    Done { id: u64, code: i32 },
}

impl Marker {
    fn parse(line: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?.strip_prefix("@@")?;
        if line == "READY" {
            return Some(Self::Ready);
        }
        if let Some(reason) = line.strip_prefix("BROKEN ") {
            return Some(Self::Broken(reason.to_owned()));
        }
        let (id, code) = line.strip_prefix("DONE ")?.split_once(' ')?;
        Some(Self::Done { id: id.parse().ok()?, code: code.parse().ok()? })
    }
}

/// The serial line, and what came over it and was not used yet.
#[derive(Debug)]
pub struct Console {
    stream: UnixStream,
    unread: Vec<u8>,
    last_id: u64,
}

impl Console {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, unread: Vec::new(), last_id: 0 }
    }

    /// Goes on with the loop that this console was of, whose guest has moved to another QEMU.
    pub fn go_on_with(&mut self, before: &Self) {
        self.last_id = before.last_id;
    }

    /// Waits for the start of the loop, at boot or after a reboot.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.next_marker(deadline).context("the guest is not ready")?.1 {
                Marker::Ready => return Ok(()),
                Marker::Broken(reason) => bail!("the guest is not as it should be: {reason}"),
                Marker::Done { .. } => {}
            }
        }
    }

    /// Runs a command; it may have several lines.
    pub fn run(&mut self, command: &str, timeout: Duration) -> Result<Output> {
        let deadline = Instant::now() + timeout;
        let sent = self.send(command)?;
        loop {
            match self.next_marker(deadline)? {
                (text, Marker::Done { id, code }) if id == sent => {
                    // The guest puts a newline before its marker.
                    let text = text.strip_suffix(b"\n").unwrap_or(&text);
                    return Ok(Output { code, text: String::from_utf8_lossy(text).into_owned() });
                }
                // Of an earlier command, which took longer than its caller waited.
                (_, Marker::Done { .. }) => {}
                (text, marker) => {
                    bail!(
                        "the guest restarted meanwhile ({marker:?}), after {:?}",
                        String::from_utf8_lossy(&text)
                    )
                }
            }
        }
    }

    /// Sends a command and waits for nothing.
    pub fn send(&mut self, command: &str) -> Result<u64> {
        self.last_id += 1;
        let line = if command.contains('\n') {
            let hex: String = command.bytes().map(|byte| format!("{byte:02x}")).collect();
            format!("{} eval \"$(echo {hex} | xxd -r -p)\"\n", self.last_id)
        } else {
            format!("{} {command}\n", self.last_id)
        };
        self.stream.write_all(line.as_bytes()).context("sending the command")?;
        Ok(self.last_id)
    }

    /// The next marker, and what came before it.
    fn next_marker(&mut self, deadline: Instant) -> Result<(Vec<u8>, Marker)> {
        // Where the first line that was not looked at begins.
        let mut from = 0;
        loop {
            while let Some(length) = self.unread[from..].iter().position(|&byte| byte == b'\n') {
                let end = from + length;
                if let Some(marker) = Marker::parse(&self.unread[from..end]) {
                    let rest = self.unread.split_off(end + 1);
                    let mut text = std::mem::replace(&mut self.unread, rest);
                    text.truncate(from);
                    return Ok((text, marker));
                }
                from = end + 1;
            }
            ensure!(self.unread.len() <= OUTPUT_LIMIT, "the guest wrote more than {OUTPUT_LIMIT} bytes");
            self.read_more(deadline)?;
        }
    }

    fn read_more(&mut self, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let so_far = || format!("it wrote until then {:?}", String::from_utf8_lossy(&self.unread));
        // A timeout of zero would mean to wait for ever.
        ensure!(!left.is_zero(), "no answer in time; {}", so_far());
        self.stream.set_read_timeout(Some(left))?;
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => bail!("the virtual machine is gone; {}", so_far()),
            Ok(count) => self.unread.extend_from_slice(&bytes[..count]),
            // The deadline is looked at by the next call.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error).with_context(so_far),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn pair() -> Result<(Console, UnixStream)> {
        let (host, guest) = UnixStream::pair()?;
        Ok((Console::new(host), guest))
    }

    #[test]
    fn output_is_exact_with_and_without_a_last_newline() -> Result<()> {
        let (mut console, mut guest) = pair()?;
        guest.write_all(b"a\n@@DON\nE\n\n@@DONE 1 0\nb\n@@DONE 2 7\n")?;
        assert_eq!(console.run("x", SOON)?, Output { code: 0, text: "a\n@@DON\nE\n".to_owned() });
        assert_eq!(console.run("y", SOON)?, Output { code: 7, text: "b".to_owned() });
        Ok(())
    }

    #[test]
    fn a_late_answer_to_an_earlier_command_is_dropped() -> Result<()> {
        let (mut console, mut guest) = pair()?;
        guest.write_all(b"par")?;
        assert!(console.run("slow", Duration::from_millis(20)).is_err());
        guest.write_all(b"tial\n@@DONE 1 0\nnew\n@@DONE 2 0\n")?;
        assert_eq!(console.run("next", SOON)?.text, "new");
        Ok(())
    }

    #[test]
    fn a_restart_during_a_command_is_an_error() -> Result<()> {
        let (mut console, mut guest) = pair()?;
        guest.write_all(b"half\n@@READY\n")?;
        let error = format!("{:#}", console.run("x", SOON).err().context("it should fail")?);
        assert!(error.contains("restarted") && error.contains("half"), "{error}");
        Ok(())
    }

    #[test]
    fn a_module_that_does_not_load_and_a_machine_that_is_gone_are_errors() -> Result<()> {
        let (mut console, mut guest) = pair()?;
        guest.write_all(b"@@BROKEN modprobe x: no such thing\n@@READY\n")?;
        let error = format!("{:#}", console.wait_ready(SOON).err().context("it should fail")?);
        assert!(error.contains("modprobe x: no such thing"), "{error}");
        console.wait_ready(SOON)?;
        drop(guest);
        assert!(console.wait_ready(SOON).is_err());
        Ok(())
    }
}
