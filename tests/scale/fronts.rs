//! Processes with the front-ends of many links: for each the model of an owner's VMM and the
//! model of a peer's. They bring one link up after the other and then do nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use guest_driver_model::link::LinkPage;
use guest_driver_model::net::{OwnerConfig, OwnerLayout};
use guest_driver_model::owner::{OwnerMemory, OwnerVmm};
use guest_driver_model::programs::stop::Stop;
use guest_driver_model::transport::Transport;
use guest_driver_model::transport::model::{ModelTransport, Vmm};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::close;
use serde::{Deserialize, Serialize};
use vhost_pci_tests::Process;

use crate::SOON;
use crate::broker::socket;

/// Descriptors of a link's front-ends, and some that the process itself has.
const DESCRIPTORS: u64 = 24;
const OWN_DESCRIPTORS: u64 = 100;
/// An owner's memory, bytes.
const MEMORY: u64 = 1 << 20;
/// How long a link may take to come up.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the process is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Where the sockets are.
    #[arg(long)]
    folder: PathBuf,
    /// The first link, and the one after the last.
    #[arg(long)]
    from: u32,
    #[arg(long)]
    to: u32,
}

/// How a link came up.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Time {
    /// Whether the owner was there first.
    pub peer_second: bool,
    /// From the connection of the second side to UP in the link page, milliseconds.
    pub ms: f64,
}

/// The last line that the process writes when all is up.
const ALL_UP: &str = "all links are up";

/// The processes.
pub struct Fronts(Vec<Process>);

impl Fronts {
    /// Brings up the first `links` of a broker; returns when all are.
    pub fn start(folder: &Path, links: u32) -> Result<Self> {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let share = u32::try_from(most.saturating_sub(OWN_DESCRIPTORS) / DESCRIPTORS).unwrap_or(u32::MAX);
        ensure!(share > 0, "{most} descriptors a process are too few");
        let mut processes = Vec::new();
        for from in (0..links).step_by(share as usize) {
            let to = links.min(from.saturating_add(share));
            let mut command = Command::new(std::env::current_exe().context("where this program is")?);
            command.args(["fronts", "--from", &from.to_string(), "--to", &to.to_string(), "--folder"]);
            command.arg(folder);
            let name = format!("fronts-{from}");
            let mut process = Process::spawn(&name, command, &folder.join(format!("{name}.log")))?;
            // One after the other: links are not to slow each other down.
            process.wait_log(ALL_UP, SOON + PATIENCE)?;
            processes.push(process);
        }
        Ok(Self(processes))
    }

    /// How each link came up.
    pub fn times(&self) -> Result<Vec<Time>> {
        let logs = self.0.iter().map(Process::log).collect::<String>();
        let lines = logs.lines().filter(|line| line.starts_with('{'));
        lines.map(|line| serde_json::from_str(line).context(line.to_owned())).collect()
    }

    /// All leave, at once.
    pub fn leave(mut self) -> Result<()> {
        self.0.iter_mut().try_for_each(Process::kill)
    }
}

/// A link's two front-ends.
#[expect(dead_code, reason = "they hold their connections open")]
struct Front {
    memory: OwnerMemory,
    owner: OwnerVmm,
    peer: ModelTransport,
}

/// Brings up links and waits to be ended.
pub fn run(args: &Args) -> Result<()> {
    let stop = Stop::on_signals().context("signal handlers")?;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    // The kernel makes room for descriptors now, not while a link comes up.
    let room = u64::from(args.to - args.from) * DESCRIPTORS + OWN_DESCRIPTORS;
    let highest = i32::try_from(room.min(most) - 1).context("descriptors")?;
    close(fcntl(std::io::stderr(), FcntlArg::F_DUPFD_CLOEXEC(highest))?)?;
    let mut fronts = Vec::new();
    for link in args.from..args.to {
        let (front, time) = bring_up(&args.folder, link).with_context(|| format!("link {link}"))?;
        println!("{}", serde_json::to_string(&time)?);
        fronts.push(front);
    }
    println!("{ALL_UP}");
    while !stop.is_requested() {
        thread::sleep(Duration::from_secs(1));
    }
    drop(fronts);
    Ok(())
}

fn bring_up(folder: &Path, link: u32) -> Result<(Front, Time)> {
    let memory = OwnerMemory::new(MEMORY, 0).context("the owner's memory")?;
    let config = OwnerConfig { ring_size: 64, ..OwnerConfig::default() };
    let layout = OwnerLayout::new(config, 0, memory.len())?;
    let places: Vec<_> = layout.vrings().iter().map(|vring| vring.places).collect();
    let features = config.features();
    let owner = || -> Result<OwnerVmm> {
        let mut owner = OwnerVmm::connect(&socket(folder, link, "owner"), places.len() as u16)?;
        owner.start(features, &memory, &places, |_| 0)?;
        Ok(owner)
    };
    let peer = || ModelTransport::connect_as(&socket(folder, link, "peer"), Vmm::default());
    let peer_second = link % 2 == 1;
    let start;
    let (owner, peer) = if peer_second {
        let first = owner()?;
        start = Instant::now();
        (first, peer()?)
    } else {
        let first = peer()?;
        start = Instant::now();
        (owner()?, first)
    };
    wait_until_up(&peer, start)?;
    let time = Time { peer_second, ms: start.elapsed().as_secs_f64() * 1e3 };
    Ok((Front { memory, owner, peer }, time))
}

fn wait_until_up(peer: &ModelTransport, start: Instant) -> Result<()> {
    let page = LinkPage::new(peer.window(), peer.config())?;
    let mut latest = None;
    while start.elapsed() < PATIENCE {
        let generation = page.generation();
        if latest != Some(generation) {
            latest = Some(generation);
            if page.snapshot().is_ok_and(|snapshot| snapshot.up) {
                return Ok(());
            }
        }
        thread::yield_now();
    }
    Err(anyhow!("the link did not come up: {:?}", page.snapshot()))
}
