//! The peer's process: its VMM, as a model, and its driver, which maps pages and uses them.
//! Its parent tells it what to do, a line at a time.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use guest_driver_model::control::{Command, ControlExchange, ControlRing, Exchange, Job, Outcome, Request};
use guest_driver_model::link::LinkPage;
use guest_driver_model::translate::{Access, Translation};
use guest_driver_model::transport::Transport;
use guest_driver_model::transport::model::{ModelTransport, Vmm};
use vhost_pci_device::abi::PAGE_SIZE;

use crate::child::{self, Child};
use crate::cpu;
use crate::user::User;

/// How long the link may take to come up.
const PATIENCE: Duration = Duration::from_secs(10);

/// The process, as its parent sees it.
#[derive(Debug)]
pub struct Peer {
    lines: BufReader<UnixStream>,
    _process: Child,
}

impl Peer {
    /// Starts a peer of this link, which is `"strict"` or `"qemu"`.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn start(folder: &Path, link: &str) -> anyhow::Result<Self> {
        let folder = folder.to_str().context("the folder for sockets has no plain name")?;
        let process = Child::start(&["peer", folder, link])?;
        let lines = BufReader::new(process.stream.try_clone()?);
        Ok(Self { lines, _process: process })
    }

    /// Waits until the link is up.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn wait_until_up(&mut self) -> anyhow::Result<()> {
        self.tell("up").map(drop)
    }

    /// Has the page at this IOVA mapped. Gives how long that took, and where it is.
    ///
    /// # Errors
    /// If the broker does not map it.
    pub fn map(&mut self, iova: u64) -> anyhow::Result<(Duration, u64)> {
        let answer = self.tell(&format!("map {iova}"))?;
        let (took, offset) = answer.split_once(' ').context("an answer without a time")?;
        Ok((Duration::from_nanos(took.parse()?), offset.parse()?))
    }

    /// Has a thread use what is at this offset of the window, or rest.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn set_use(&mut self, offset: Option<u64>) -> anyhow::Result<()> {
        match offset {
            Some(offset) => self.tell(&format!("use {offset}")).map(drop),
            None => self.tell("rest").map(drop),
        }
    }

    fn tell(&mut self, what: &str) -> anyhow::Result<String> {
        writeln!(self.lines.get_ref(), "{what}")?;
        let mut answer = String::new();
        self.lines.read_line(&mut answer)?;
        ensure!(answer.ends_with('\n'), "the peer's process ended when told to {what}");
        match answer.trim().strip_prefix("error ") {
            Some(error) => bail!("the peer cannot {what}: {error}"),
            None => Ok(answer.trim().into()),
        }
    }
}

/// The process.
///
/// # Errors
/// If the broker is not there.
pub fn run(folder: &Path, link: &str) -> anyhow::Result<()> {
    let parent = child::parent()?;
    let vmm = if link == "strict" { Vmm::Strict } else { Vmm::LikeQemu };
    let device = ModelTransport::connect_as(&folder.join(format!("{link}-peer.sock")), vmm)?;
    let window = device.window().clone();
    let user = User::spawn(move |offset| {
        // In bounds: the driver checked it. What is read and written does not matter.
        let _ = window.load_u64(offset).and_then(|value| window.store_u64(offset, value.wrapping_add(1)));
    })?;
    let page = LinkPage::new(device.window(), device.config())?;
    let mut driver = Driver { device, page, ring: None };
    let mut lines = BufReader::new(parent.try_clone()?);
    let mut line = String::new();
    while lines.read_line(&mut line)? > 0 {
        let answer = match line.trim().split_once(' ').unwrap_or((line.trim(), "")) {
            ("up", _) => driver.wait_until_up().map(|()| "done".into()),
            ("map", iova) => {
                driver.map(iova.parse()?).map(|(took, offset)| format!("{} {offset}", took.as_nanos()))
            }
            ("use", offset) => {
                user.set(Some(offset.parse()?));
                Ok("done".into())
            }
            ("rest", _) => {
                user.set(None);
                Ok("done".into())
            }
            other => bail!("started by hand? {other:?} is nothing to do"),
        };
        writeln!(&parent, "{}", answer.unwrap_or_else(|error| format!("error {error:#}")))?;
        line.clear();
    }
    Ok(())
}

struct Driver {
    device: ModelTransport,
    page: LinkPage,
    ring: Option<ControlRing>,
}

impl Driver {
    fn wait_until_up(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        let link = loop {
            match self.page.snapshot() {
                // Each vring that starts makes another generation, and is another link to attach to.
                Ok(link) if link.up && link.vrings.iter().all(|vring| vring.enabled) => break link,
                _ => ensure!(start.elapsed() < PATIENCE, "the link does not come up"),
            }
            thread::sleep(Duration::from_millis(1));
        };
        let mut ring = ControlRing::new(&self.device)?;
        ring.call(
            &self.device,
            Command::Attach {
                generation: link.generation,
                interrupt: false,
                doorbell: None,
                quiesce: false,
                says_served: false,
            },
            PATIENCE,
        )?;
        self.ring = Some(ring);
        Ok(())
    }

    fn map(&mut self, iova: u64) -> anyhow::Result<(Duration, u64)> {
        let ring = self.ring.as_mut().context("the link is not up")?;
        let mut exchange = ControlExchange::new(ring, &self.device, false);
        let request = Request::Map { iova, len: PAGE_SIZE, access: Access::READ_WRITE };
        exchange.clear();
        let data = exchange.reserve(0).context("no room in the control area")?;
        let mut jobs = [Job::new(request, data)];
        cpu::guest();
        let start = Instant::now();
        exchange.carry_out(&mut jobs);
        let took = start.elapsed();
        cpu::host();
        ensure!(jobs[0].outcome == Outcome::Done, "it answers {:?}", jobs[0].outcome);
        let mut translation = Translation::new(&self.page.table()?.mappings);
        match translation.translate(iova, PAGE_SIZE as u32, Access::READ_WRITE) {
            Ok(offset) => Ok((took, offset)),
            Err(fault) => bail!("what was mapped is not in the table: {fault:?}"),
        }
    }
}
