//! The machine protocol of QEMU (QMP): one JSON object a line, over a socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(30);

/// A connection that has not spoken yet, or one that is ready for commands.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    greeted: bool,
}

impl Qmp {
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(Self { stream: BufReader::new(stream), greeted: false })
    }

    /// Runs one command and gives what it returned. Events are dropped.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        if !self.greeted {
            // QEMU speaks first, and takes commands only after this one.
            self.receive()?;
            self.request("qmp_capabilities", &json!({}))?;
            self.greeted = true;
        }
        self.request(command, arguments)
    }

    fn request(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        self.stream.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut answer = self.receive()?;
            if let Some(error) = answer.get("error") {
                bail!("QMP {command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line).context("reading from QMP")?;
        if read == 0 {
            bail!("QEMU closed QMP");
        }
        serde_json::from_str(&line).with_context(|| format!("not JSON, from QMP: {line}"))
    }
}
