//! The peers' main loop on a device made of memory: what an owner and a link can do
//! to it.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use guest_driver_model::net::{OwnerConfig, OwnerLayout, OwnerPort, PacketBurst};
use guest_driver_model::programs::ProgramError;
use guest_driver_model::programs::echo::{Echo, EchoArgs};
use guest_driver_model::programs::peer_loop::{PeerArgs, PeerProgram, run_on};
use guest_driver_model::programs::stop::Stop;
use guest_driver_model::programs::traffic::Traffic;
use guest_driver_model::programs::waiting::{Mode, WaitArgs};
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::transport::{Transport, TransportError};
use net_support::{IOVA, LinkWriter, TwoViews, frame};
use vhost_pci_device::abi::{self, DeviceConfig};

/// A device that answers nothing, and whose owner is this test.
struct Device {
    config: DeviceConfig,
    window: SharedMemory,
    doorbells: Mutex<Vec<u16>>,
    gone: Mutex<bool>,
}

impl Device {
    fn new(window: &SharedMemory) -> Self {
        let config = DeviceConfig {
            magic: abi::CONFIG_MAGIC.into(),
            window_len: window.len().into(),
            link_offset: abi::LINK_OFFSET.into(),
            link_len: abi::LINK_LEN.into(),
            control_offset: abi::CONTROL_OFFSET.into(),
            control_len: abi::CONTROL_LEN.into(),
            ..DeviceConfig::default()
        };
        Self { config, window: window.clone(), doorbells: Mutex::default(), gone: Mutex::default() }
    }

    /// The commands in the control ring: number and vring, kind, value.
    fn commands(&self) -> Vec<(u16, u16, u32, u64)> {
        let word = |at| self.window.load_u16(abi::CONTROL_OFFSET + at).unwrap();
        let buffer = |slot: u16| {
            let head = word(abi::CONTROL_AVAIL + 4 + 2 * u64::from(slot));
            self.window.load_u64(abi::CONTROL_OFFSET + abi::CONTROL_DESC + 16 * u64::from(head)).unwrap()
        };
        (0..word(abi::CONTROL_AVAIL + 2))
            .map(|slot| {
                let at = buffer(slot);
                (
                    self.window.load_u16(at).unwrap(),
                    self.window.load_u16(at + 2).unwrap(),
                    self.window.load_u32(at + 8).unwrap(),
                    self.window.load_u64(at + 16).unwrap(),
                )
            })
            .collect()
    }
}

impl Transport for Device {
    fn name(&self) -> &str {
        "memory"
    }
    fn config(&self) -> &DeviceConfig {
        &self.config
    }
    fn window(&self) -> &SharedMemory {
        &self.window
    }
    fn doorbell(&self, queue: u16) {
        self.doorbells.lock().unwrap().push(queue);
    }
    fn interrupt_fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        None
    }
    fn check(&self) -> Result<(), TransportError> {
        match *self.gone.lock().unwrap() {
            true => Err(TransportError::Gone { device: "memory".into(), why: "for this test" }),
            false => Ok(()),
        }
    }
}

/// An owner, its link, and the peer's device.
struct Bench {
    views: TwoViews,
    layout: OwnerLayout,
    link: LinkWriter,
    device: Device,
}

impl Bench {
    fn new() -> Self {
        let config = OwnerConfig { pairs: 2, ring_size: 64, ..OwnerConfig::default() };
        let len = OwnerLayout::new(config, 0, u64::MAX >> 8).unwrap().end();
        let views = TwoViews::new(len);
        let layout = OwnerLayout::new(config, 0, len).unwrap();
        let link = LinkWriter::new(config.features(), vec![views.mapping()], layout.infos(IOVA));
        let device = Device::new(&views.window);
        Self { views, layout, link, device }
    }

    fn owner(&self) -> OwnerPort {
        OwnerPort::new(&self.views.owner, &self.layout, IOVA).unwrap()
    }

    /// Runs the echo program while `test` plays the owner and the device.
    fn echo(&self, test: impl FnOnce(&Stop)) -> (Result<(), ProgramError>, Traffic) {
        let stop = Stop::default();
        thread::scope(|scope| {
            let peer = scope.spawn(|| {
                let mut program = Echo::new(&EchoArgs::default());
                let result = run_on(&self.device, &PeerArgs::default(), "echo", &mut program, &stop);
                (result, program.traffic())
            });
            // Also when the test fails: the scope waits for the peer.
            struct AtEnd<'a>(&'a Stop);
            impl Drop for AtEnd<'_> {
                fn drop(&mut self) {
                    self.0.request();
                }
            }
            let at_end = AtEnd(&stop);
            test(&stop);
            drop(at_end);
            peer.join().unwrap()
        })
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Sends frames on a pair and takes them back.
fn exchange(owner: &mut OwnerPort, pair: u16, count: usize) {
    let frames: Vec<_> = (0..count).map(|seed| frame(seed as u64, 60 + seed)).collect();
    let mut sent = 0;
    let mut back = PacketBurst::default();
    wait_for("the echo", || {
        sent += owner.tx_burst(pair, frames.iter().skip(sent).map(Vec::as_slice)).unwrap();
        owner.rx_burst(pair, &mut back, 64).unwrap();
        back.len() == count
    });
    assert!(back.frames().eq(frames.iter().map(Vec::as_slice)));
}

#[test]
fn a_link_that_comes_late_changes_and_goes_is_followed() {
    let bench = Bench::new();
    let mut first = bench.owner();
    let (result, traffic) = {
        let link = &mut bench.link.clone();
        bench.echo(|_| {
            thread::sleep(Duration::from_millis(20));
            link.write(&bench.views.window);
            exchange(&mut first, 0, 50);
            exchange(&mut first, 1, 50);
            // Odd: being changed; then another owner with fresh rings.
            bench.views.window.store_u64(8, 3).unwrap();
            thread::sleep(Duration::from_millis(20));
            let mut second = bench.owner();
            link.generation = 4;
            link.write(&bench.views.window);
            exchange(&mut second, 1, 50);
            // The device is restarted: the window is empty for a while.
            bench.views.window.zero(0, abi::DATA_OFFSET).unwrap();
            thread::sleep(Duration::from_millis(20));
            let mut third = bench.owner();
            link.generation = 2;
            link.write(&bench.views.window);
            exchange(&mut third, 0, 50);
            wait_for("one ATTACH in a fresh control ring", || {
                bench.device.commands() == [(abi::CTRL_ATTACH, 0, 0, 2)]
            });
        })
    };
    result.unwrap();
    assert_eq!((traffic.rx_packets, traffic.tx_packets, traffic.dropped), (200, 200, 0));
    // At the end the device was told.
    assert_eq!(bench.device.commands().last().unwrap().0, abi::CTRL_DETACH);
}

#[test]
fn a_broken_vring_is_reported_once_and_the_others_go_on() {
    let bench = Bench::new();
    let mut owner = bench.owner();
    let (result, _) = bench.echo(|_| {
        bench.link.write(&bench.views.window);
        exchange(&mut owner, 0, 10);
        // The owner's transmit queue of pair 0: an available index from nowhere.
        let places = bench.layout.vrings()[1].places;
        bench.views.owner.store_u16_release(places.avail + 2, 5000).unwrap();
        wait_for("the report", || bench.device.commands().len() == 2);
        exchange(&mut owner, 1, 50);
        thread::sleep(Duration::from_millis(20));
        let commands = bench.device.commands();
        assert_eq!(commands.len(), 2, "{commands:?}");
        assert_eq!(&commands[1].0, &abi::CTRL_FAULT);
        assert_eq!((commands[1].1, commands[1].2), (1, abi::FaultKind::AvailJump as u32));
    });
    result.unwrap();
}

#[test]
fn an_owner_that_cannot_be_served_does_not_end_the_program() {
    let bench = Bench::new();
    let mut owner = bench.owner();
    let (result, traffic) = bench.echo(|_| {
        // A disk; a page full of nonsense; one that announces what cannot be.
        let disk = LinkWriter { owner_device: 2, ..bench.link.clone() };
        disk.write(&bench.views.window);
        thread::sleep(Duration::from_millis(10));
        LinkWriter { magic: 7, generation: 4, ..bench.link.clone() }.write(&bench.views.window);
        thread::sleep(Duration::from_millis(10));
        let mut huge = bench.link.clone();
        huge.generation = 6;
        huge.mapping_count = Some(u32::MAX);
        huge.write(&bench.views.window);
        thread::sleep(Duration::from_millis(10));
        LinkWriter { generation: 8, ..bench.link.clone() }.write(&bench.views.window);
        exchange(&mut owner, 0, 10);
    });
    result.unwrap();
    assert_eq!(traffic.rx_packets, 10);
}

#[test]
fn a_device_that_is_gone_ends_the_program() {
    let bench = Bench::new();
    bench.link.write(&bench.views.window);
    let (result, _) = bench.echo(|_| {
        *bench.device.gone.lock().unwrap() = true;
        thread::sleep(Duration::from_millis(1500));
    });
    assert!(matches!(result, Err(ProgramError::Transport(TransportError::Gone { .. }))));
}

#[test]
fn interrupts_are_not_waited_for_where_there_are_none() {
    let bench = Bench::new();
    let wait = WaitArgs { mode: Mode::Interrupt, idle_us: 0 };
    let args = PeerArgs { wait, ..PeerArgs::default() };
    let mut program = Echo::new(&EchoArgs::default());
    let result = run_on(&bench.device, &args, "echo", &mut program, &Stop::default());
    assert!(matches!(result, Err(ProgramError::NoInterrupts { .. })));
}
