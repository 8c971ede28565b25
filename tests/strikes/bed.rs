//! A broker with two links, and the programs at their ends: who is started how, and whether all is
//! as it should be.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;
use vhost_pci_tests::{Process, Random, Usage};

use crate::program::{Arrivals, Counts, Program};

/// For whatever should take a moment.
pub const SOON: Duration = Duration::from_secs(40);
/// How long a peer's VMM has to confirm a change of its window, milliseconds.
pub const CONFIRM_MS: u64 = 500;

/// The processes that can be struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Owner,
    Peer,
    Broker,
}

/// What an owner's device can be like.
const RINGS: &[&[&str]] = &[
    &[],
    &["--packed"],
    &["--in-order"],
    &["--packed", "--in-order"],
    &["--no-event-idx", "--no-mergeable"],
    &["--packed", "--no-event-idx", "--indirect"],
];
/// What its IOMMU can be like. The first two are not as rare as the others.
const IOMMUS: &[&[&str]] = &[
    &[],
    &[],
    &[],
    &["--iommu", "static", "--iommu-like-qemu"],
    &["--iommu", "static", "--iommu-push"],
    &["--iommu", "per-packet", "--iommu-like-qemu"],
];
const WAITS: &[&[&str]] =
    &[&["--wait", "interrupt"], &["--wait", "adaptive=50"], &["--wait", "poll", "--idle-us", "100"]];

/// One end of a link: the program that is there, and those that were.
pub struct End {
    name: String,
    pub program: Option<Program>,
    arrivals: Arc<Arrivals>,
    /// Of the programs that have ended.
    past: Counts,
    /// How many there were.
    started: u32,
    /// How the present one was started, as far as the broker has more or less for it.
    kind: String,
    /// What it was told.
    arguments: String,
}

impl End {
    fn new(link: &str, side: &str) -> Self {
        Self {
            name: format!("{link}-{side}"),
            program: None,
            arrivals: Arrivals::new(),
            past: Counts::default(),
            started: 0,
            kind: String::new(),
            arguments: String::new(),
        }
    }

    /// What arrives here.
    pub fn arrivals(&self) -> &Arrivals {
        &self.arrivals
    }

    /// The name of its present, or last, program.
    pub fn incarnation(&self) -> String {
        format!("{}-{}", self.name, self.started)
    }

    /// What that was told.
    pub fn arguments(&self) -> &str {
        &self.arguments
    }

    /// What the present program has counted.
    pub fn counts(&self) -> Counts {
        self.program.as_ref().map(Program::counts).unwrap_or_default()
    }

    /// What all of its programs have counted.
    pub fn all_counts(&self) -> Counts {
        self.past.and(self.counts())
    }

    /// The program has ended, or ends now.
    pub fn end(&mut self) -> Result<()> {
        if let Some(mut program) = self.program.take() {
            program.process.kill()?;
            self.past = self.past.and(program.last_counts());
        }
        Ok(())
    }
}

/// A link.
pub struct Link {
    pub owner: End,
    pub peer: End,
}

impl Link {
    fn new(name: &str) -> Self {
        Self { owner: End::new(name, "owner"), peer: End::new(name, "peer") }
    }

    pub fn ends(&self) -> [&End; 2] {
        [&self.owner, &self.peer]
    }
}

/// All of it. The directory is removed at the end, unless it is kept.
pub struct Bed {
    dir: TempDir,
    programs: PathBuf,
    pub broker: Option<Process>,
    brokers: u32,
    /// The link whose programs are struck.
    pub struck: Link,
    /// The one that nobody touches.
    pub other: Link,
}

impl Bed {
    /// Starts everything.
    pub fn start(random: &mut Random) -> Result<Self> {
        let own = std::env::current_exe().context("where this program is")?;
        let programs = own.parent().context("this program is in no directory")?.to_owned();
        // Short and below /tmp: a socket's path may have no more than 107 bytes.
        let dir = tempfile::Builder::new().prefix("torture-").tempdir_in("/tmp").context("a directory")?;
        let mut text = format!(
            "control_socket = {:?}\nconfirm_timeout_ms = {CONFIRM_MS}\n",
            dir.path().join("control.sock")
        );
        for link in ["struck", "other"] {
            let [owner, peer] = ["owner", "peer"].map(|side| dir.path().join(format!("{link}-{side}.sock")));
            text += &format!("[[link]]\nname = {link:?}\nowner_socket = {owner:?}\npeer_socket = {peer:?}\n");
        }
        fs::write(dir.path().join("broker.toml"), text)?;
        let (struck, other) = (Link::new("struck"), Link::new("other"));
        let mut bed = Self { dir, programs, broker: None, brokers: 0, struck, other };
        bed.start_broker()?;
        bed.start_program(Role::Owner, random)?;
        bed.start_program(Role::Peer, random)?;
        bed.start_other()?;
        Ok(bed)
    }

    /// Leaves the directory when this is dropped.
    pub fn keep(&mut self) -> &Path {
        self.dir.disable_cleanup(true);
        self.dir.path()
    }

    pub fn start_broker(&mut self) -> Result<()> {
        self.brokers += 1;
        let mut command = Command::new(self.programs.join("vhost-pci-switch"));
        command.args(["run", "--config"]).arg(self.dir.path().join("broker.toml"));
        let log = self.dir.path().join(format!("broker-{}.log", self.brokers));
        let mut broker = Process::spawn("broker", command, &log)?;
        broker.wait_log("the broker listens", SOON)?;
        self.broker = Some(broker);
        Ok(())
    }

    fn command(&self, program: &[&str], socket: &str) -> Command {
        let mut command = Command::new(self.programs.join("vhost-pci-guest"));
        command.args(program).arg("--reconnect").arg("--socket").arg(self.dir.path().join(socket));
        command
    }

    /// Starts the struck link's owner or peer, in one of the ways there are.
    pub fn start_program(&mut self, role: Role, random: &mut Random) -> Result<()> {
        let size = (64 + random.below(1437)).to_string();
        let (kind, program, socket): (String, &[&str], _) = match role {
            Role::Owner => {
                let iommu = random.one(IOMMUS);
                let arguments = [&["owner", "--mode", "both"], *random.one(RINGS), *iommu].concat();
                (iommu.join(" "), &arguments.clone(), "struck-owner.sock")
            }
            Role::Peer if random.percent(50) => {
                ("QEMU".to_owned(), &["gen", "--vmm-like-qemu"], "struck-peer.sock")
            }
            Role::Peer => ("strict".to_owned(), &["gen"], "struck-peer.sock"),
            Role::Broker => bail!("the broker is no guest's program"),
        };
        // Packets that are copied by command take their time.
        let slow = kind.contains("per-packet") || random.percent(50);
        let rate = if slow { "4000" } else { "20000" };
        let mut command = self.command(program, socket);
        command.args(*random.one(WAITS)).args(["--rate", rate, "--size", &size]);
        self.place(role, kind, command)
    }

    fn place(&mut self, role: Role, kind: String, command: Command) -> Result<()> {
        let end = match role {
            Role::Owner => &mut self.struck.owner,
            _ => &mut self.struck.peer,
        };
        place(end, kind, command, self.dir.path())
    }

    fn start_other(&mut self) -> Result<()> {
        let paced = ["--wait", "interrupt", "--rate", "2000", "--size", "256"];
        let mut owner = self.command(&["owner", "--mode", "both", "--packed"], "other-owner.sock");
        owner.args(paced);
        let mut peer = self.command(&["gen"], "other-peer.sock");
        peer.args(paced);
        place(&mut self.other.owner, String::new(), owner, self.dir.path())?;
        place(&mut self.other.peer, String::new(), peer, self.dir.path())
    }

    /// The process that plays this part.
    pub fn process(&mut self, role: Role) -> Option<&mut Process> {
        match role {
            Role::Owner => self.struck.owner.program.as_mut().map(|program| &mut program.process),
            Role::Peer => self.struck.peer.program.as_mut().map(|program| &mut program.process),
            Role::Broker => self.broker.as_mut(),
        }
    }

    /// Sends a signal to who plays this part.
    pub fn signal(&mut self, role: Role, signal: Signal) -> Result<()> {
        self.process(role).context("it does not run")?.signal(signal)
    }

    /// Fails if a process has ended by itself. `but`: those that may.
    pub fn all_run(&mut self, but: &[Role]) -> Result<()> {
        for role in [Role::Owner, Role::Peer, Role::Broker] {
            if !but.contains(&role)
                && let Some(process) = self.process(role)
                && let Some(status) = process.exited()?
            {
                let (name, log) = (process.name().to_owned(), process.log());
                bail!("{name} ended by itself ({status}):\n{log}");
            }
        }
        for end in [&mut self.other.owner, &mut self.other.peer] {
            let Some(program) = &mut end.program else { continue };
            if let Some(status) = program.process.exited()? {
                bail!("{} ended by itself ({status}):\n{}", program.process.name(), program.process.log());
            }
        }
        Ok(())
    }

    /// What the programs at the struck link's ends are, as far as the broker has more or less for
    /// them.
    pub fn kind(&self) -> String {
        format!("{} | {}", self.struck.owner.kind, self.struck.peer.kind)
    }

    /// What the broker has.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.broker.as_ref().context("there is no broker")?.pid()).context("what the broker has")
    }

    /// The states of the links, as the broker says.
    pub fn states(&self) -> Result<Vec<String>> {
        let mut command = Command::new(self.programs.join("vhost-pci-switch"));
        command.args(["status", "--json", "--control-socket"]).arg(self.dir.path().join("control.sock"));
        let output = command.output()?;
        ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
        let status: Value = serde_json::from_slice(&output.stdout)?;
        let links = status.get("links").and_then(Value::as_array).context("status has no links")?;
        let state = |link: &Value| {
            let text = |name: &str| link.get(name).map(Value::to_string).unwrap_or_default();
            format!("{} {} {}", text("name"), text("state"), text("reason"))
        };
        Ok(links.iter().map(state).collect())
    }
}

fn place(end: &mut End, kind: String, command: Command, dir: &Path) -> Result<()> {
    end.started += 1;
    end.kind = kind;
    let name = end.incarnation();
    let log = dir.join(format!("{name}.log"));
    // How it was started, for who looks into a failure.
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
    end.arguments = arguments.join(" ");
    fs::write(&log, format!("{}\n", end.arguments))?;
    end.program = Some(Program::start(&name, command, &log, end.arrivals.clone())?);
    Ok(())
}
