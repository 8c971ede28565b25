//! `blk`: is the disk of the owner, whose bytes are in a file or a device of this guest.
//!
//! Owns: the disk, which outlives links and devices. Requests are carried out one after the other.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use vhost_pci_device::abi::queue_of_vring;

use super::ProgramError;
use super::device::DeviceArgs;
use super::quiet::Quiet;
use super::run::{LONGEST_SLEEP, Patience, ROUNDS, stop_on_signals, until_gone};
use super::session::{Session, Turn};
use super::stop::Stop;
use super::tally::Tally;
use super::unrest::{Unrest, UnrestArgs};
use super::waiting::{Idle, WaitArgs};
use crate::blk::disk::Disk;
use crate::blk::{BlkPort, Counters, FileDisk};
use crate::port::Port;
use crate::reach::Demand;
use crate::transport::Transport;

/// How long a disk may be held by another program.
const LOCKED: Duration = Duration::from_secs(5);

/// What `blk` can be told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct BlkArgs {
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// The file or block device whose bytes the disk has: as many as `size` in the link's configuration
    /// says
    #[arg(long, value_name = "PATH")]
    pub disk: PathBuf,
    /// Open it for reading only. The owner is told so by `read_only = true` in the link's configuration;
    /// without that, its writes fail
    #[arg(long)]
    pub read_only: bool,
    /// What the owner is told is the disk's serial number, at most 20 bytes; otherwise the file's name
    #[arg(long, value_name = "TEXT")]
    pub id: Option<String>,
    /// How to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Whether to pause.
    #[command(flatten)]
    pub unrest: UnrestArgs,
    /// When a broker is gone, wait for it to come back instead of ending
    #[arg(long)]
    pub reconnect: bool,
    /// Wait for a device that is not there yet, serve it, and when it is gone wait for the next
    #[arg(long)]
    pub wait_for_device: bool,
    /// Print one JSON object with all counters at the end
    #[arg(long)]
    pub json: bool,
}

/// Runs `blk`.
///
/// # Errors
/// If the device or the disk cannot be had, or is gone; if the disk is not of the size that the owner is told.
pub fn run(args: &BlkArgs) -> Result<(), ProgramError> {
    run_until(args, &stop_on_signals()?)
}

/// As [`run`], until `stop` is requested.
///
/// # Errors
/// As [`run`].
pub fn run_until(args: &BlkArgs, stop: &Stop) -> Result<(), ProgramError> {
    let name = args.disk.file_name().map(|name| name.to_string_lossy().into_owned());
    let id = args.id.clone().or(name).unwrap_or_default();
    let disk = open_disk(args, &id)
        .map_err(|source| ProgramError::Disk { path: args.disk.display().to_string(), source })?;
    let mut server = Server { args, stop, disk, served: Counters::default(), tally: Tally::default() };
    let result = until_gone(Patience::new(args.reconnect, args.wait_for_device), stop, |outage| {
        let transport = args.device.open()?;
        outage.is_over();
        tracing::info!(device = transport.name(), disk = %args.disk.display(), "the device is started");
        server.drive(&*transport)
    });
    server.report();
    result
}

/// Opens the disk. One who was killed while the kernel carries out its last write holds it until that is done.
fn open_disk(args: &BlkArgs, id: &str) -> io::Result<FileDisk> {
    let start = Instant::now();
    loop {
        match FileDisk::open(&args.disk, args.read_only, id) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && start.elapsed() < LOCKED => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// What outlives a device.
struct Server<'a> {
    args: &'a BlkArgs,
    stop: &'a Stop,
    disk: FileDisk,
    /// By ports that are gone.
    served: Counters,
    tally: Tally,
}

/// The counters, for people and as a JSON object.
#[derive(Serialize)]
struct Report {
    program: &'static str,
    #[serde(flatten)]
    served: Counters,
    faults: u64,
    links: u64,
    fetched_bytes: u64,
    stored_bytes: u64,
    sleeps: u64,
    rescued: u64,
}

impl Server<'_> {
    /// Drives one device until the program is to end (`Ok`) or the device is gone.
    fn drive(&mut self, transport: &dyn Transport) -> Result<(), ProgramError> {
        let mut session = Session::new(transport, self.args.wait.wait.needs_interrupts())?;
        let mut live = Live::default();
        let result = self.serve(&mut session, &mut live);
        self.served = self.served + live.served;
        self.tally += session.tally();
        session.end(result.is_ok());
        result
    }

    fn serve(&mut self, session: &mut Session<'_, BlkPort>, live: &mut Live) -> Result<(), ProgramError> {
        let mut idle = Idle::new(self.args.wait);
        let mut unrest = Unrest::new(self.args.unrest);
        let mut rounds = 0_u32;
        let mut checked = Instant::now();
        loop {
            let served = self.round(session, live)?;
            rounds += 1;
            if served > 0 {
                idle.reset();
            } else if !session.is_live() || idle.rest() {
                session.sleep_for(|live| (0..live.port.vrings()).collect(), None, LONGEST_SLEEP);
                rounds = ROUNDS;
            }
            unrest.after_round();
            if rounds >= ROUNDS {
                rounds = 0;
                session.follow_doorbell();
                if self.stop.is_requested() {
                    return Ok(());
                }
                if checked.elapsed() >= LONGEST_SLEEP || session.is_over() {
                    checked = Instant::now();
                    session.check()?;
                }
            }
        }
    }

    /// One request of each vring. Returns how many there were.
    fn round(&mut self, session: &mut Session<'_, BlkPort>, live: &mut Live) -> Result<usize, ProgramError> {
        let Some(Turn { port, transport, mut exchange }) = session.turn(|| ())? else { return Ok(0) };
        if live.generation != port.generation() {
            let has = self.disk.limits().len;
            if has != port.capacity() {
                let path = self.args.disk.display().to_string();
                return Err(ProgramError::DiskSize { path, has, told: port.capacity() });
            }
            self.served = self.served + live.served;
            live.generation = port.generation();
        }
        let (mut served, mut faulted) = (0, false);
        for vring in 0..port.vrings() {
            match port.serve(&mut exchange, vring, &mut self.disk) {
                Ok(true) => {
                    served += 1;
                    if port.needs_call(vring) {
                        transport.doorbell(queue_of_vring(vring));
                    }
                }
                Ok(false) => {}
                Err(_) => faulted = true,
            }
        }
        let before = std::mem::replace(&mut live.served, port.counters()).failed;
        if live.served.failed > before && live.quiet.allows_line() {
            let disk = self.args.disk.display();
            tracing::error!(%disk, failed = live.served.failed, "the disk fails; the owner is told of each request");
        }
        if faulted {
            session.report_faults();
        }
        Ok(served)
    }

    fn report(&self) {
        let Tally { faults, links, demand, sleeps } = self.tally;
        let Demand { fetched_bytes, stored_bytes, .. } = demand;
        let served = self.served;
        let report = Report {
            program: "blk",
            served,
            faults,
            links,
            fetched_bytes,
            stored_bytes,
            sleeps: sleeps.count,
            rescued: sleeps.rescued,
        };
        match serde_json::to_string(&report) {
            Ok(text) if self.args.json => super::say(&text),
            _ => super::say(&format!(
                "blk: {} requests, read {} bytes, wrote {} bytes, {} flushes, {} failed, {} refused; faults {faults}",
                served.requests,
                served.read_bytes,
                served.written_bytes,
                served.flushes,
                served.failed,
                served.refused,
            )),
        }
    }
}

/// The port of now.
#[derive(Default)]
struct Live {
    generation: u64,
    served: Counters,
    quiet: Quiet,
}
