//! Where a scenario finds what it runs (QEMU, kernel, initramfs, the project's programs), and
//! its own directory for sockets and logs.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::unistd::{Gid, Uid, chown, geteuid};
use tempfile::TempDir;

use crate::guest::GuestConfig;
use crate::process::Process;

/// The number of the user and the group that may do nothing.
const NOBODY: u32 = 65_534;

/// The files made by `tests/vm/prepare`, the project's programs, and a directory that is removed
/// when the sandbox is dropped, unless [`Sandbox::keep`] was called.
#[derive(Debug)]
pub struct Sandbox {
    vm: PathBuf,
    built: PathBuf,
    dir: TempDir,
}

impl Sandbox {
    /// Fails when `tests/vm/prepare` has not run.
    pub fn open() -> Result<Self> {
        let vm = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/vm");
        for file in ["qemu", "vmlinux", "initramfs"] {
            let path = vm.join(file);
            ensure!(path.exists(), "there is no {}: run tests/vm/prepare", path.display());
        }
        let program = std::env::current_exe().context("where this program is")?;
        let built = program.parent().context("this program is in no directory")?.to_owned();
        // Short and below /tmp: a socket's path may have no more than 107 bytes.
        let dir =
            tempfile::Builder::new().prefix("vm-").tempdir().context("a directory for sockets and logs")?;
        Ok(Self { vm: vm.canonicalize()?, built, dir })
    }

    /// For sockets and logs.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Leaves the directory when the sandbox is dropped, for whoever looks into a failure.
    pub fn keep(&mut self) {
        self.dir.disable_cleanup(true);
    }

    /// Describes a guest; [`GuestConfig::spawn`] starts it. Its logs are `NAME.serial.log`
    /// and `NAME.qemu.log`.
    pub fn guest(&self, name: &str) -> GuestConfig<'_> {
        GuestConfig::new(self, name)
    }

    /// Starts a program on the host. What it writes goes to `NAME.log`.
    pub fn process(&self, name: &str, command: Command) -> Result<Process> {
        Process::spawn(name, command, &self.dir().join(format!("{name}.log")))
    }

    /// The QEMU of `target/vm`.
    pub fn qemu(&self) -> PathBuf {
        self.vm.join("qemu")
    }

    /// The guests' kernel, an ELF file.
    pub fn kernel(&self) -> PathBuf {
        self.vm.join("vmlinux")
    }

    /// The guests' first file system, an unpacked cpio archive: busybox, modules and `/init`.
    pub fn initramfs(&self) -> PathBuf {
        self.vm.join("initramfs")
    }

    /// A file of the packages that `target/vm` was made of.
    pub fn unpacked(&self, path: &str) -> PathBuf {
        self.vm.join("tree").join(path)
    }

    /// A program of these packages, with their libraries.
    pub fn unpacked_program(&self, path: &str) -> Command {
        let mut command = Command::new(self.vm.join("run"));
        command.arg(path);
        command
    }

    /// The command of a program of the workspace, run by user nobody where this one is root's. The directory is
    /// then nobody's, and has the program, as nobody may not look where it was built.
    pub fn command_of_nobody(&self, name: &str) -> Result<Command> {
        let built = self.program(name)?;
        if !geteuid().is_root() {
            return Ok(Command::new(built));
        }
        let program = self.dir().join(name);
        if !program.exists() && fs::hard_link(&built, &program).is_err() {
            fs::copy(&built, &program)
                .with_context(|| format!("cannot copy {} to {}", built.display(), program.display()))?;
        }
        chown(self.dir(), Some(Uid::from_raw(NOBODY)), Some(Gid::from_raw(NOBODY)))
            .with_context(|| format!("cannot give {} to nobody", self.dir().display()))?;
        let mut command = Command::new(program);
        command.uid(NOBODY).gid(NOBODY);
        Ok(command)
    }

    /// A program of the workspace, built for the host in the same profile as this one.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let path = self.built.join(name);
        ensure!(path.exists(), "there is no {}: tests/vm/run builds it", path.display());
        Ok(path)
    }

    /// A program of the workspace, built static, to be run in a guest.
    pub fn guest_program(&self, name: &str) -> Result<PathBuf> {
        let profile = self.built.file_name().context("this program is in no directory")?;
        let path = self.built.join("../x86_64-unknown-linux-gnu").join(profile).join(name);
        ensure!(path.exists(), "there is no {}: tests/vm/run builds it", path.display());
        Ok(path)
    }
}
