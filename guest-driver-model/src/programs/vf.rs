//! `vf`: puts a network card of the peer's VM, a virtual function for example, in front of an owner. What the
//! owner transmits the card sends out of the owner's memory, and it receives into the buffers that the owner
//! posted. Follows the link, as `session` does for programs that move packets themselves.

use std::time::{Duration, Instant};

use serde::Serialize;
use vhost_pci_device::abi::{self, queue_of_vring};

use super::quantity::seconds;
use super::quiet::Quiet;
use super::run::{LONGEST_SLEEP, Outage, Patience, ROUNDS, stop_on_signals, until_gone};
use super::stop::Stop;
use super::waiting::{Idle, Sleeps, WaitArgs, sleep};
use super::{ProgramError, say};
use crate::control::{Command, ControlError, ControlExchange, ControlRing};
use crate::link::{LinkError, LinkPage};
use crate::net::{receive_vring, transmit_vring};
use crate::nic::{Counts, Lent, Nic, NicError, Pass, PassError, Piece, Round, VirtioNet, Way};
use crate::reach::Demand;
use crate::shm::SharedMemory;
use crate::transport::vfio::VfioTransport;
use crate::transport::{Pairing, Transport};

/// What `vf` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct VfArgs {
    /// The PCI address of the vhost-pci device, or `auto` for the first one there is
    #[arg(long, value_name = "ADDRESS", default_value = "auto")]
    pub device: String,
    /// The PCI address of the network card: a virtual function, bound to vfio-pci or to no driver
    #[arg(long, value_name = "ADDRESS")]
    pub nic: String,
    /// How to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Print one JSON object with all counters at the end
    #[arg(long)]
    pub json: bool,
    /// Print one JSON object with all counters (since the start) four times a second, and at the end
    #[arg(long)]
    pub json_lines: bool,
    /// End this many seconds after the start
    #[arg(long, value_parser = seconds)]
    pub seconds: Option<f64>,
    /// When the device or its broker is gone, wait for it to come back instead of ending
    #[arg(long)]
    pub reconnect: bool,
    /// Test: after so many packets have been sent, have the card read where it was not let
    #[arg(long, value_name = "PACKETS", hide = true)]
    pub stray_after: Option<u64>,
}

/// Between two looks at device and card, and two lines.
const LOOK: Duration = Duration::from_millis(250);
/// How long the device may take to answer a command.
const ANSWER: Duration = Duration::from_millis(500);
/// Between two looks for a link, where no interrupt tells of it.
const LINK_PAUSE: Duration = Duration::from_millis(1);
/// The same where one does.
const LINK_SLEEP: Duration = Duration::from_millis(20);
/// The number of the packet that goes where the card was not let.
const STRAY: u64 = u64::MAX;
/// Its length, bytes.
const STRAY_LEN: u32 = 60;

/// What a line says.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Tally {
    #[serde(flatten)]
    counts: Counts,
    /// Bytes of packets that this program's processor copied.
    copied_bytes: u64,
    /// Buffers that the card has: to receive into.
    lent_rx: usize,
    /// The same to send.
    lent_tx: usize,
    /// Times that a link came up.
    links: u64,
    /// Links that cannot be served.
    refused: u64,
    /// Times that the device was told that something was let go of.
    releases: u64,
    /// Buffers that the card had of a link of which all was said to be let go of: 0.
    held_at_release: usize,
    /// Milliseconds since the program's start.
    at_ms: u64,
    /// Times that an owner broke a vring.
    faults: u64,
    /// Ranges that the device was asked to map.
    maps_asked: u64,
    /// Times that the mapping table was read because it had changed.
    table_reads: u64,
    /// Packets that went where the card was not let: tried, and said to be sent.
    strays: u64,
    strays_sent: u64,
    /// Where the card was not let, and was to read.
    stray_at: u64,
    sleeps: u64,
    notified: u64,
    /// The last line of the program.
    end: bool,
}

/// Runs `vf`.
///
/// # Errors
/// If device or card cannot be had, or the card cannot be kept from the owner's memory.
pub fn run(args: &VfArgs) -> Result<(), ProgramError> {
    let stop = stop_on_signals()?;
    // Before the device: when the program is killed the kernel closes what was opened first first, and the
    // card is to stop before the window goes.
    let mut nic = VirtioNet::open(&args.nic, args.wait.wait.needs_interrupts())?;
    tracing::info!(nic = nic.name(), mac = ?MacAddress(nic.mac()), "the card is taken; give the owner's card this address");
    let mut report = Report { start: Instant::now(), told: Instant::now(), tally: Tally::default() };
    let patience = Patience::new(args.reconnect, false);
    let result = until_gone(patience, &stop, |outage| once(args, &mut nic, &mut report, &stop, outage));
    if args.json || args.json_lines {
        report.tell(true);
    }
    result
}

struct MacAddress([u8; 6]);

impl std::fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

struct Report {
    start: Instant,
    told: Instant,
    /// Of the links that are over.
    tally: Tally,
}

impl Report {
    fn tell(&mut self, end: bool) {
        self.told = Instant::now();
        let at_ms = self.start.elapsed().as_millis() as u64;
        let line = Tally { at_ms, copied_bytes: SharedMemory::counted_bytes(), end, ..self.tally };
        if let Ok(text) = serde_json::to_string(&line) {
            say(&text);
        }
    }
}

/// Works with the device until it is gone, or the program is to end.
fn once(
    args: &VfArgs,
    nic: &mut VirtioNet,
    report: &mut Report,
    stop: &Stop,
    outage: &mut Outage,
) -> Result<(), ProgramError> {
    // Also while the device is away.
    nic.check()?;
    let address = Some(args.device.as_str()).filter(|address| *address != "auto");
    let transport = VfioTransport::open(address)?;
    outage.is_over();
    let mut session = Session::new(&transport, nic, args, report)?;
    let result = session.serve(stop);
    let ended = session.end(result.is_ok());
    result.and(ended)
}

struct Session<'a> {
    transport: &'a VfioTransport,
    nic: &'a mut VirtioNet,
    args: &'a VfArgs,
    report: &'a mut Report,
    page: LinkPage,
    /// Of which copies of packets are counted.
    window: SharedMemory,
    control: Option<ControlRing>,
    pass: Option<Pass>,
    /// What the links before this one counted.
    before: (Counts, Demand),
    doorbell: Option<Pairing>,
    /// The generation that is not served.
    refused: Option<u64>,
    /// The device waits for what was let go of, or may.
    owes_release: bool,
    sleeps: Sleeps,
    quiet: Quiet,
}

impl<'a> Session<'a> {
    fn new(
        transport: &'a VfioTransport,
        nic: &'a mut VirtioNet,
        args: &'a VfArgs,
        report: &'a mut Report,
    ) -> Result<Self, ProgramError> {
        if args.wait.wait.needs_interrupts() && transport.interrupt_fd(abi::QUEUE_CONTROL).is_none() {
            return Err(ProgramError::NoInterrupts { device: transport.name().to_owned() });
        }
        Ok(Self {
            transport,
            nic,
            args,
            page: LinkPage::new(transport.window(), transport.config())?,
            window: transport.window().counted(),
            control: None,
            pass: None,
            before: (report.tally.counts, Demand::default()),
            doorbell: None,
            refused: None,
            owes_release: false,
            sleeps: Sleeps::default(),
            quiet: Quiet::default(),
            report,
        })
    }

    fn serve(&mut self, stop: &Stop) -> Result<(), ProgramError> {
        let mut idle = Idle::new(self.args.wait);
        let (mut rounds, mut looked) = (0, Instant::now());
        while !stop.is_requested() {
            self.follow_link()?;
            match self.round()? {
                0 if idle.rest() => self.sleep()?,
                0 => {}
                _ => idle.reset(),
            }
            rounds += 1;
            if rounds < ROUNDS && !self.args.wait.wait.needs_interrupts() {
                continue;
            }
            rounds = 0;
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                self.look()?;
            }
            let over = |seconds: f64| self.report.start.elapsed().as_secs_f64() >= seconds;
            if self.args.seconds.is_some_and(over) {
                break;
            }
        }
        Ok(())
    }

    /// Brings what is lent up to the link page's generation.
    fn follow_link(&mut self) -> Result<(), ProgramError> {
        let generation = self.page.generation();
        if self.pass.as_ref().is_some_and(|pass| pass.generation() == generation)
            || (self.refused == Some(generation) && !self.owes_release)
        {
            return Ok(());
        }
        self.let_go()?;
        let snapshot = match self.page.snapshot() {
            Ok(snapshot) => snapshot,
            Err(LinkError::Changing) => return Ok(()),
            Err(LinkError::NotMapped) => {
                (self.control, self.owes_release) = (None, false);
                return Ok(());
            }
            Err(error) => return self.refuse(generation, &error),
        };
        if !self.control.as_ref().is_some_and(ControlRing::is_current) {
            self.control = Some(ControlRing::new(self.transport)?);
        }
        if self.owes_release {
            self.owes_release = !self.release(snapshot.table_generation)?;
        }
        if !snapshot.up {
            self.refused = Some(snapshot.generation);
            return Ok(());
        }
        self.doorbell = self.transport.pair(self.page.link_id());
        // Before the card reaches anything.
        if !self.attach(snapshot.generation)? {
            return Ok(());
        }
        match Pass::start(&self.window, &self.page, &snapshot, self.nic) {
            Ok(pass) => {
                let [rx, tx] = [receive_vring(0), transmit_vring(0)].map(queue_of_vring);
                // 8.4: an earlier driver may have used buffers and died before it said so.
                self.transport.doorbell(rx);
                self.transport.doorbell(tx);
                if self.quiet.allows_line() {
                    tracing::info!(
                        generation,
                        iommu = snapshot.iommu,
                        "the link is up: the card serves the owner"
                    );
                }
                self.report.tally.links += 1;
                self.pass = Some(pass);
                self.refused = None;
            }
            Err(PassError::Nic(error)) => return Err(error.into()),
            Err(error) => {
                self.tell(Command::Detach)?;
                self.refuse(snapshot.generation, &error)?;
            }
        }
        Ok(())
    }

    fn refuse(&mut self, generation: u64, error: &dyn std::fmt::Display) -> Result<(), ProgramError> {
        if self.quiet.allows_line() {
            tracing::error!(device = self.transport.name(), "cannot serve this owner: {error}");
        }
        self.report.tally.refused += 1;
        self.refused = Some(generation);
        Ok(())
    }

    /// Whether the device is attached to with a card that uses the window.
    fn attach(&mut self, generation: u64) -> Result<bool, ProgramError> {
        let interrupt = self.args.wait.wait.needs_interrupts();
        let doorbell = self.doorbell.map(|doorbell| doorbell.vectors);
        self.tell(Command::Attach { generation, interrupt, doorbell, quiesce: true, says_served: false })
    }

    /// Tells the device that all that is not in the table of this generation was let go of. Whether that
    /// is all that it waits for.
    fn release(&mut self, table: u64) -> Result<bool, ProgramError> {
        let tally = &mut self.report.tally;
        tally.releases += 1;
        if self.pass.is_none() {
            tally.held_at_release += self.nic.held();
        }
        self.tell(Command::Release { table })
    }

    /// Gives the device a command and waits for its answer. Whether it said yes.
    fn tell(&mut self, command: Command) -> Result<bool, ProgramError> {
        let Some(control) = self.control.as_mut().filter(|control| control.is_current()) else {
            // Its area begins anew, and nobody is attached.
            self.control = None;
            return Ok(false);
        };
        match control.call(self.transport, command, ANSWER) {
            Ok(()) => Ok(true),
            Err(ControlError::Refused { status: abi::CTRL_STALE, .. }) => Ok(false),
            Err(error) => {
                if self.quiet.allows_line() {
                    tracing::warn!(device = self.transport.name(), "{error}");
                }
                // A driver that is not attached is not waited for.
                Ok(matches!(error, ControlError::Refused { .. })
                    && matches!(command, Command::Release { .. }))
            }
        }
    }

    /// Has the card let go of all that it reaches of the link, if there is one.
    fn let_go(&mut self) -> Result<(), NicError> {
        let Some(mut pass) = self.pass.take() else { return Ok(()) };
        self.owes_release = true;
        pass.end(self.nic)?;
        let counts = &mut self.before.0;
        *counts = *counts + pass.counts();
        self.before.1 += pass.demand();
        self.sum();
        Ok(())
    }

    /// Moves buffers. Gives how many.
    fn round(&mut self) -> Result<usize, ProgramError> {
        let Some(pass) = &mut self.pass else { return Ok(0) };
        let control = self.control.as_mut();
        let interrupt = self.args.wait.wait.needs_interrupts();
        let mut exchange = control
            .map(|ring| ControlExchange::new(ring, self.transport, interrupt).of_link(pass.generation()));
        let round = match pass.round(self.nic, &mut exchange) {
            Ok(round) => round,
            Err(PassError::Nic(error)) => return Err(error.into()),
            Err(error) => {
                let generation = pass.generation();
                self.let_go()?;
                self.tell(Command::Detach)?;
                self.owes_release = false;
                self.refuse(generation, &error)?;
                return Ok(0);
            }
        };
        let Round { moved, release, calls, faults } = round;
        for (vring, _) in
            [receive_vring(0), transmit_vring(0)].into_iter().zip(calls).filter(|(_, call)| *call)
        {
            self.transport.doorbell(queue_of_vring(vring));
        }
        if let Some(table) = release
            && !self.release(table)?
            && let Some(pass) = &mut self.pass
        {
            pass.release_again();
        }
        for fault in faults.into_iter().flatten() {
            self.report.tally.faults += 1;
            if self.quiet.allows_line() {
                tracing::warn!("{fault}; not served until the link changes");
            }
            self.tell(fault.into())?;
        }
        self.stray();
        Ok(moved)
    }

    /// Has the card try to read behind all that it was let reach, if that is to be tried now.
    fn stray(&mut self) {
        let (Some(after), Some(pass)) = (self.args.stray_after, &self.pass) else { return };
        if self.report.tally.strays > 0 || pass.counts().tx_packets < after {
            return;
        }
        let bus = pass.end_of_reach(self.nic);
        if self.nic.lend(Way::Send, &[Piece { bus, len: STRAY_LEN }], STRAY) == Lent::Yes {
            tracing::warn!("test: the card is to read at {bus:#x}, where it was not let");
            self.report.tally.strays += 1;
            self.report.tally.stray_at = bus;
            self.nic.publish(Way::Send);
        }
    }

    /// Now and then: whether device and card are there, and what there is to say.
    fn look(&mut self) -> Result<(), ProgramError> {
        self.transport.check()?;
        match self.pass.as_mut().map(|pass| pass.check(self.nic)) {
            Some(Err(PassError::Nic(error))) => return Err(error.into()),
            Some(_) => {}
            None => self.nic.check()?,
        }
        // A ring that begins anew is attached to anew.
        let doorbell = self.transport.pair(self.page.link_id());
        let is_new = self.control.as_ref().is_some_and(|control| !control.is_current());
        if is_new {
            self.control = Some(ControlRing::new(self.transport)?);
        }
        if (is_new || doorbell != self.doorbell)
            && let Some(generation) = self.pass.as_ref().map(Pass::generation)
        {
            self.doorbell = doorbell;
            self.attach(generation)?;
        }
        self.transport.follow_doorbell();
        self.sum();
        if self.args.json_lines && self.report.told.elapsed() >= LOOK {
            self.report.tell(false);
        }
        Ok(())
    }

    /// Brings what is reported up to date.
    fn sum(&mut self) {
        let now = |pass: &Pass| (pass.counts(), pass.demand(), pass.lent(), pass.strays());
        let (counts, demand, [lent_rx, lent_tx], strays) = self.pass.as_ref().map(now).unwrap_or_default();
        let demand = self.before.1 + demand;
        let tally = &mut self.report.tally;
        tally.counts = self.before.0 + counts;
        (tally.lent_rx, tally.lent_tx) = (lent_rx, lent_tx);
        tally.strays_sent = tally.strays_sent.max(strays);
        (tally.maps_asked, tally.table_reads) = (demand.maps, demand.table_reads);
        (tally.sleeps, tally.notified) = (self.sleeps.count, self.sleeps.notified);
    }

    /// Sleeps until owner, device or card have something.
    fn sleep(&mut self) -> Result<(), ProgramError> {
        let Some(control) = self.transport.interrupt_fd(abi::QUEUE_CONTROL) else {
            std::thread::sleep(LINK_PAUSE);
            return Ok(());
        };
        self.transport.follow_doorbell();
        let mut work = false;
        if let Some(pass) = &mut self.pass {
            work = match pass.set_notified(self.nic, true) {
                Ok(work) => work || pass.generation() != self.page.generation(),
                // It shows again with the next round.
                Err(_) => true,
            };
        }
        if !work {
            let kicks = [receive_vring(0), transmit_vring(0)].map(queue_of_vring);
            let mut events = vec![control];
            events.extend(kicks.iter().flat_map(|queue| self.transport.interrupt_fds(*queue)));
            events.extend(self.nic.interrupts());
            let most = if self.pass.is_some() { LOOK.min(LONGEST_SLEEP) } else { LINK_SLEEP };
            // What waits for the device to be asked again nobody announces.
            let pause = self.pass.as_ref().and_then(Pass::pause);
            let most = pause.map_or(most, |pause| pause.clamp(LINK_PAUSE, most));
            // A device without interrupts of its own is looked at more often.
            let most = if self.nic.interrupts().is_empty() { LINK_PAUSE } else { most };
            self.sleeps.count += 1;
            let woken = sleep(&events, &[], most);
            self.sleeps.notified += u64::from(woken == super::waiting::Woken::ByEvent);
        }
        if let Some(pass) = &mut self.pass {
            let _ = pass.set_notified(self.nic, false);
        }
        Ok(())
    }

    /// Lets go of the window, and then tells the device so, if it is there.
    fn end(mut self, tell: bool) -> Result<(), ProgramError> {
        self.let_go()?;
        if tell {
            self.tell(Command::Detach)?;
        }
        self.sum();
        Ok(())
    }
}
