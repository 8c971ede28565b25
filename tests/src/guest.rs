//! A virtual machine under test: how its QEMU is started, and what can be asked of it.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};
use serde_json::{Value, json};

use crate::console::{Console, Output};
use crate::newc::Archive;
use crate::process::{self, Process};
use crate::qmp::Qmp;
use crate::sandbox::Sandbox;

/// `mitigations=off` and `cryptomgr.notests` spare each boot 0.8 s under TCG. A guest that panics
/// restarts, which a running command then reports.
const KERNEL_ARGS: &str = "console=ttyS0 quiet panic=-1 mitigations=off cryptomgr.notests";

/// What a guest shall be. Made by [`Sandbox::guest`].
#[derive(Debug)]
pub struct GuestConfig<'a> {
    sandbox: &'a Sandbox,
    name: String,
    memory_mib: u32,
    args: Vec<OsString>,
    kernel_args: Vec<String>,
    modules: Vec<String>,
    files: Vec<(String, PathBuf)>,
    /// Which QEMU of this guest, if it moves from one to another, and where its state comes from.
    incoming: Option<(u32, String)>,
}

impl<'a> GuestConfig<'a> {
    pub(crate) fn new(sandbox: &'a Sandbox, name: &str) -> Self {
        Self {
            sandbox,
            name: name.to_owned(),
            memory_mib: 512,
            args: Vec::new(),
            kernel_args: Vec::new(),
            modules: Vec::new(),
            files: Vec::new(),
            incoming: None,
        }
    }

    /// Instead of 512 MiB.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// More arguments for QEMU.
    #[must_use]
    pub fn args<S: Into<OsString>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// One more word on the kernel command line.
    #[must_use]
    pub fn kernel_arg(mut self, arg: &str) -> Self {
        self.kernel_args.push(arg.to_owned());
        self
    }

    /// Kernel modules to load at boot, in this order, each with what it depends on. `tests/vm/prepare`
    /// says which there are; in the guest, `modprobe` knows the same.
    #[must_use]
    pub fn modules<'m>(mut self, modules: impl IntoIterator<Item = &'m str>) -> Self {
        self.modules.extend(modules.into_iter().map(str::to_owned));
        self
    }

    /// Puts a copy of a file of the host into the guest, with the same permissions. Not below /tmp,
    /// which the guest covers.
    #[must_use]
    pub fn file(mut self, path_in_guest: &str, path_on_host: impl Into<PathBuf>) -> Self {
        self.files.push((path_in_guest.to_owned(), path_on_host.into()));
        self
    }

    /// Another QEMU of a guest that was started like this, which waits at a migration URI for the guest's
    /// state. Its logs have the number in their names.
    #[must_use]
    pub fn incoming(mut self, number: u32, uri: &str) -> Self {
        self.incoming = Some((number, uri.to_owned()));
        self.args(["-incoming", uri])
    }

    /// Starts QEMU and waits for nothing: several guests can boot at the same time.
    pub fn spawn(self) -> Result<Guest> {
        let initramfs = self.initramfs().with_context(|| format!("guest {}: its initramfs", self.name))?;
        let number = self.incoming.as_ref().map_or(String::new(), |(number, _)| format!("-{number}"));
        let logs = Logs {
            serial: self.sandbox.dir().join(format!("{}{number}.serial.log", self.name)),
            qemu: self.sandbox.dir().join(format!("{}{number}.qemu.log", self.name)),
        };
        process::new_log(&logs.qemu)?;
        process::new_log(&logs.serial)?;

        // Connected sockets, handed over as standard input and output: no file names, no moment
        // at which nobody listens, and an end-of-file as soon as QEMU is gone.
        let (console, console_qemu) = UnixStream::pair()?;
        let (qmp, qmp_qemu) = UnixStream::pair()?;
        let memory = self.memory_mib;
        let mut command = Command::new(self.sandbox.qemu());
        command.args(["-no-user-config", "-nodefaults"]);
        let options: [(&str, OsString); 16] = [
            ("-name", self.name.clone().into()),
            ("-display", "none".into()),
            ("-nic", "none".into()),
            ("-M", "q35,memory-backend=m".into()),
            ("-accel", "tcg,thread=multi".into()),
            ("-cpu", "max".into()),
            ("-m", format!("{memory}M").into()),
            ("-object", format!("memory-backend-memfd,id=m,size={memory}M,share=on").into()),
            ("-kernel", self.sandbox.kernel().into()),
            ("-initrd", initramfs.into()),
            ("-append", self.kernel_command_line().into()),
            ("-serial", format!("file:{}", logs.serial.display()).into()),
            ("-chardev", "socket,id=vm-console,fd=0".into()),
            ("-serial", "chardev:vm-console".into()),
            ("-chardev", "socket,id=vm-qmp,fd=1".into()),
            ("-object", "monitor-qmp,id=vm-monitor,chardev=vm-qmp".into()),
        ];
        for (option, value) in options {
            command.arg(option).arg(value);
        }
        command.args(&self.args).stdin(OwnedFd::from(console_qemu)).stdout(OwnedFd::from(qmp_qemu));
        let started = Instant::now();
        Ok(Guest {
            qemu: Process::spawn_with_pipes(&self.name, command, &logs.qemu)?,
            console: Console::new(console),
            qmp: Qmp::new(qmp)?,
            started,
            logs,
        })
    }

    fn kernel_command_line(&self) -> String {
        let mut line = format!("{KERNEL_ARGS} vp.name={} vp.modules={}", self.name, self.modules.join(","));
        for arg in &self.kernel_args {
            line.push(' ');
            line.push_str(arg);
        }
        line
    }

    /// The common initramfs, or a copy of it with this guest's own files appended.
    fn initramfs(&self) -> Result<PathBuf> {
        if self.files.is_empty() {
            return Ok(self.sandbox.initramfs());
        }
        let path = self.sandbox.dir().join(format!("{}.initramfs", self.name));
        if self.incoming.is_some() && path.exists() {
            return Ok(path);
        }
        let mut bytes = fs::read(self.sandbox.initramfs())?;
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let mut archive = Archive::new(bytes);
        for (path_in_guest, path_on_host) in &self.files {
            let content = fs::read(path_on_host).with_context(|| path_on_host.display().to_string())?;
            let mode = fs::metadata(path_on_host)?.permissions().mode();
            archive.file(path_in_guest, mode, &content)?;
        }
        fs::write(&path, archive.finish()?)?;
        Ok(path)
    }
}

#[derive(Debug)]
struct Logs {
    serial: PathBuf,
    qemu: PathBuf,
}

/// A running virtual machine. Dropping it kills QEMU.
#[derive(Debug)]
pub struct Guest {
    qemu: Process,
    console: Console,
    qmp: Qmp,
    started: Instant,
    logs: Logs,
}

impl Guest {
    /// Waits until the guest takes commands. Returns how long that took since QEMU's start.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<Duration> {
        self.console.wait_ready(timeout).map_err(|error| self.explain("waiting for its start", error))?;
        Ok(self.started.elapsed())
    }

    /// Runs a shell command, of one or more lines, as root in the guest, with nothing as its
    /// input. A program that shall go on running must not keep the command's output:
    /// `daemon >/tmp/log 2>&1 &`. Of several lines the last one's exit code counts; begin with
    /// `set -e` where each must succeed.
    ///
    /// A command that takes longer than `timeout` is not stopped, and holds up the next one.
    pub fn sh(&mut self, command: &str, timeout: Duration) -> Result<Output> {
        self.console
            .run(command, timeout)
            .map_err(|error| self.explain(&format!("running `{command}`"), error))
    }

    /// As [`Guest::sh`], but a command that fails is an error, and what it wrote comes without
    /// the white space at its end.
    pub fn sh_ok(&mut self, command: &str, timeout: Duration) -> Result<String> {
        let Output { code, text } = self.sh(command, timeout)?;
        if code != 0 {
            let error =
                anyhow!("it ended with {code} and wrote:\n  {}", text.trim_end().replace('\n', "\n  "));
            return Err(self.explain(&format!("running `{command}`"), error));
        }
        Ok(text.trim_end().to_owned())
    }

    /// Restarts the guest from within, without warning its drivers, and waits until it takes
    /// commands again. Returns how long that took.
    pub fn reboot(&mut self, timeout: Duration) -> Result<Duration> {
        let from = Instant::now();
        let again = self.console.send("reboot -f").and_then(|_| self.console.wait_ready(timeout));
        again.map_err(|error| self.explain("rebooting", error))?;
        Ok(from.elapsed())
    }

    /// The guest has moved to this QEMU; its old one is killed.
    pub fn moved_to(&mut self, mut next: Self) {
        next.console.go_on_with(&self.console);
        *self = next;
    }

    /// Asks QEMU itself, in its machine protocol.
    pub fn qmp(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.qmp.execute(command, arguments).map_err(|error| self.explain("asking QEMU", error))
    }

    /// Ends QEMU in good order and says how it ended.
    pub fn quit(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.qmp("quit", &json!({}))?;
        self.qemu.wait(timeout).map_err(|error| self.explain("quitting", error))
    }

    /// Ends QEMU as a crash would (SIGKILL).
    pub fn kill(&mut self) -> Result<()> {
        self.qemu.kill()
    }

    /// QEMU's process: its id, its signals, its end.
    pub fn qemu(&mut self) -> &mut Process {
        &mut self.qemu
    }

    /// What the guest's kernel wrote.
    pub fn serial_log(&self) -> &Path {
        &self.logs.serial
    }

    /// Says of which guest, during what, and quotes what the guest and QEMU last wrote.
    fn explain(&mut self, during: &str, error: Error) -> Error {
        // A QEMU that has just closed its sockets needs a moment to be dead.
        let state = match self.qemu.wait(Duration::from_millis(200)) {
            Ok(status) => format!("QEMU ended: {status}"),
            Err(_) => "QEMU runs".to_owned(),
        };
        let tails = process::tail(&self.logs.serial) + &process::tail(&self.logs.qemu);
        anyhow!("guest {}, {during}: {error:#}\n  {state}{tails}", self.qemu.name())
    }
}
