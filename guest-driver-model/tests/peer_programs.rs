//! The peers' main loop on a device made of memory: what an owner and a link can do
//! to it.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use guest_driver_model::net::{
    OwnerConfig, OwnerLayout, OwnerPort, PacketBurst, receive_vring, transmit_vring,
};
use guest_driver_model::programs::device::DeviceArgs;
use guest_driver_model::programs::echo::{Echo, EchoArgs};
use guest_driver_model::programs::generate::{GenArgs, Generate};
use guest_driver_model::programs::peer_loop::{PeerArgs, PeerProgram, run_on, run_until};
use guest_driver_model::programs::run::RunArgs;
use guest_driver_model::programs::stop::Stop;
use guest_driver_model::programs::traffic::Traffic;
use guest_driver_model::programs::waiting::{Wait, WaitArgs};
use guest_driver_model::programs::{self, ProgramError};
use guest_driver_model::ring::split::layout::avail_event;
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::transport::{Transport, TransportError};
use net_support::{IOVA, LinkWriter, TwoViews, device_config, frame};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::{ClockId, clock_gettime};
use vhost_pci_device::abi::{self, DeviceConfig};

/// A device that answers nothing, and whose owner is this test.
struct Device {
    config: DeviceConfig,
    window: SharedMemory,
    doorbells: Mutex<Vec<u16>>,
    gone: Mutex<bool>,
    /// What all queues share, as under QEMU; there if the device has interrupts.
    interrupt: Option<EventFd>,
    /// By queue, for those that have one of their own.
    own_interrupts: Vec<EventFd>,
    /// What happens when the driver asks for the interrupt of queue 0.
    at_sleep: Mutex<Option<Box<dyn FnMut() + Send>>>,
}

impl Device {
    fn new(window: &SharedMemory) -> Self {
        let config = device_config(window);
        let (doorbells, gone) = (Mutex::default(), Mutex::default());
        Self {
            config,
            window: window.clone(),
            doorbells,
            gone,
            interrupt: None,
            own_interrupts: Vec::new(),
            at_sleep: Mutex::default(),
        }
    }

    fn interrupt(&self) {
        self.interrupt.as_ref().unwrap().write(1).unwrap();
    }

    /// The first command in the control ring, which is to be ATTACH: number, flags, value.
    fn attach(&self) -> (u16, u32, u64) {
        let at = abi::CONTROL_OFFSET + abi::CONTROL_DESC;
        let head = self.window.load_u16(abi::CONTROL_OFFSET + abi::CONTROL_AVAIL + 4).unwrap();
        let request = self.window.load_u64(at + 16 * u64::from(head)).unwrap();
        (
            self.window.load_u16(request).unwrap(),
            self.window.load_u32(request + 4).unwrap(),
            self.window.load_u64(request + 16).unwrap(),
        )
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
    fn interrupt_fd(&self, queue: u16) -> Option<BorrowedFd<'_>> {
        if queue == abi::QUEUE_CONTROL
            && let Some(at_sleep) = &mut *self.at_sleep.lock().unwrap()
        {
            at_sleep();
        }
        self.own_interrupts.get(usize::from(queue)).or(self.interrupt.as_ref()).map(AsFd::as_fd)
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
    /// How programs wait where the device has interrupts.
    wait: Wait,
    views: TwoViews,
    layout: OwnerLayout,
    link: LinkWriter,
    device: Device,
}

impl Bench {
    fn new() -> Self {
        Self::of(OwnerConfig { pairs: 2, ring_size: 64, ..OwnerConfig::default() })
    }

    fn of(config: OwnerConfig) -> Self {
        let len = OwnerLayout::new(config, 0, u64::MAX >> 8).unwrap().end();
        let views = TwoViews::new(len);
        let layout = OwnerLayout::new(config, 0, len).unwrap();
        let link = LinkWriter::new(config.features(), vec![views.mapping()], layout.infos(IOVA));
        let device = Device::new(&views.window);
        Self { wait: Wait::Interrupt, views, layout, link, device }
    }

    fn with_interrupts() -> Self {
        let mut bench = Self::new();
        bench.device.interrupt = Some(eventfd());
        bench
    }

    fn owner(&self) -> OwnerPort {
        OwnerPort::new(&self.views.owner, &self.layout, IOVA).unwrap()
    }

    /// Runs the echo program while `test` plays the owner and the device.
    fn echo(&self, test: impl FnOnce(&Stop)) -> (Result<(), ProgramError>, Traffic) {
        let (result, traffic, _) = self.run(Echo::new(&EchoArgs::default()), test);
        (result, traffic)
    }

    /// Runs a program while `test` plays the owner and the device; by interrupts if the
    /// device has them. Returns also the processor time that it took.
    fn run<P: PeerProgram + Send>(
        &self,
        mut program: P,
        test: impl FnOnce(&Stop),
    ) -> (Result<(), ProgramError>, Traffic, Duration) {
        let wait = if self.device.interrupt.is_some() { self.wait } else { Wait::Poll };
        let run = RunArgs { wait: WaitArgs { wait, idle_us: 0 }, ..RunArgs::default() };
        let args = PeerArgs { run, ..PeerArgs::default() };
        let stop = Stop::default();
        thread::scope(|scope| {
            let peer = scope.spawn(|| {
                let result = run_on(&self.device, &args, "test", &mut program, &stop);
                let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
                (result, program.traffic(), time.into())
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

fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap()
}

/// Those that sleep.
const WAITS: [Wait; 2] = [Wait::Interrupt, Wait::Adaptive(Duration::from_micros(20))];

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
    let wait = WaitArgs { wait: Wait::Interrupt, idle_us: 0 };
    let args = PeerArgs { run: RunArgs { wait, ..RunArgs::default() }, ..PeerArgs::default() };
    let mut program = Echo::new(&EchoArgs::default());
    let result = run_on(&bench.device, &args, "echo", &mut program, &Stop::default());
    assert!(matches!(result, Err(ProgramError::NoInterrupts { .. })));
}

/// The worst moment: the driver has found nothing, and has not asked for kicks yet, so
/// that its owner does not notify. Each packet that is slept over costs a second.
#[test]
fn work_that_arrives_before_the_kicks_are_asked_for_is_not_slept_over() {
    for wait in WAITS {
        arrives_before_the_kicks_are_asked_for(wait);
    }
}

fn arrives_before_the_kicks_are_asked_for(wait: Wait) {
    const EXCHANGES: u32 = 200;
    let bench = Bench { wait, ..Bench::with_interrupts() };
    let mut owner = bench.owner();
    bench.link.write(&bench.views.window);
    let interrupt = bench.device.interrupt.as_ref().unwrap().as_fd().try_clone_to_owned().unwrap();
    let back = Arc::new(AtomicU32::new(0));
    let unkicked = Arc::new(AtomicU32::new(0));
    let (counted, silent) = (back.clone(), unkicked.clone());
    let (packet, mut echoes, mut sent) = (frame(1, 60), PacketBurst::default(), 0);
    // The driver asks for the device's interrupt first of all when it goes to sleep.
    *bench.device.at_sleep.lock().unwrap() = Some(Box::new(move || {
        echoes.clear();
        let came = owner.rx_burst(0, &mut echoes, 64).unwrap() as u32;
        if counted.fetch_add(came, Ordering::Relaxed) + came < sent || sent == EXCHANGES {
            return;
        }
        sent += owner.tx_burst(0, [packet.as_slice()]).unwrap() as u32;
        match owner.needs_kick(transmit_vring(0)) {
            true => drop(nix::unistd::write(&interrupt, &1_u64.to_ne_bytes()).unwrap()),
            false => drop(silent.fetch_add(1, Ordering::Relaxed)),
        }
    }));
    let start = Instant::now();
    let (result, _, _) = bench.run(Echo::new(&EchoArgs::default()), |_| {
        wait_for("200 echoes", || back.load(Ordering::Relaxed) == EXCHANGES);
    });
    result.unwrap();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert!(unkicked.load(Ordering::Relaxed) > EXCHANGES / 2, "{unkicked:?}: the moment was another one");
}

/// The owner notifies only when it is asked to, at any moment of the driver's falling
/// asleep.
#[test]
fn each_packet_wakes_a_sleeping_driver() {
    for wait in WAITS {
        each_packet_wakes(wait);
    }
}

fn each_packet_wakes(wait: Wait) {
    let bench = Bench { wait, ..Bench::with_interrupts() };
    let mut owner = bench.owner();
    bench.link.write(&bench.views.window);
    let mut asleep = 0;
    let (result, traffic, _) = bench.run(Echo::new(&EchoArgs::default()), |_| {
        let packet = frame(1, 60);
        let mut back = PacketBurst::default();
        let start = Instant::now();
        for round in 0..200_u32 {
            assert_eq!(owner.tx_burst(0, [packet.as_slice()]).unwrap(), 1);
            if owner.needs_kick(transmit_vring(0)) {
                bench.device.interrupt();
                asleep += 1;
            }
            back.clear();
            // Without a sleep: what comes next is to meet the driver on its way to sleep.
            while owner.rx_burst(0, &mut back, 64).unwrap() == 0 {
                assert!(start.elapsed() < Duration::from_secs(20), "{asleep} of {round} kicked for");
                thread::yield_now();
            }
            let pause = Instant::now();
            while pause.elapsed() < Duration::from_nanos(u64::from(round) * 250) {
                std::hint::spin_loop();
            }
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    });
    result.unwrap();
    assert_eq!((traffic.rx_packets, traffic.tx_packets), (200, 200));
    assert!(asleep > 0, "the driver never asked for a kick");
}

/// A device with a vector for each queue.
#[test]
fn a_queue_that_has_an_interrupt_of_its_own_wakes_a_sleeping_driver_by_it() {
    let mut bench = Bench::with_interrupts();
    bench.device.own_interrupts = (0..5).map(|_| eventfd()).collect();
    let mut owner = bench.owner();
    bench.link.write(&bench.views.window);
    let (result, _) = bench.echo(|_| {
        let packet = frame(1, 60);
        let mut back = PacketBurst::default();
        for pair in [0, 1, 1, 0, 1] {
            let asleep = asleep_at(&bench, transmit_vring(pair));
            wait_for("the driver to fall asleep", asleep);
            owner.tx_burst(pair, [packet.as_slice()]).unwrap();
            assert!(owner.needs_kick(transmit_vring(pair)));
            let start = Instant::now();
            let own = &bench.device.own_interrupts[usize::from(abi::queue_of_vring(transmit_vring(pair)))];
            own.write(1).unwrap();
            back.clear();
            wait_for("the echo", || owner.rx_burst(pair, &mut back, 64).unwrap() > 0);
            assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
        }
    });
    result.unwrap();
}

/// Whether the driver has asked for a kick by the next entry of a vring.
fn asleep_at(bench: &Bench, vring: u16) -> impl FnMut() -> bool {
    let places = bench.layout.vrings()[usize::from(vring)].places;
    let word = |at| bench.views.owner.load_u16(at).unwrap();
    move || word(avail_event(&places)) == word(places.avail + 2)
}

#[test]
fn an_adaptive_driver_asks_for_no_kicks_while_it_looks_and_for_one_when_it_sleeps() {
    let packet = frame(1, 60);
    for (time, kicked) in [(Duration::from_secs(3600), false), (Duration::from_millis(1), true)] {
        let bench = Bench { wait: Wait::Adaptive(time), ..Bench::with_interrupts() };
        let mut owner = bench.owner();
        bench.link.write(&bench.views.window);
        let (result, _) = bench.echo(|_| {
            let mut back = PacketBurst::default();
            wait_for("the ATTACH", || !bench.device.commands().is_empty());
            let mut asleep = asleep_at(&bench, transmit_vring(0));
            for _ in 0..20 {
                // Long enough to find out, though not to be sure.
                let start = Instant::now();
                while !asleep() && (kicked || start.elapsed() < Duration::from_millis(5)) {
                    assert!(start.elapsed() < Duration::from_secs(20), "the driver does not fall asleep");
                    thread::yield_now();
                }
                owner.tx_burst(0, [packet.as_slice()]).unwrap();
                assert_eq!(owner.needs_kick(transmit_vring(0)), kicked);
                if kicked {
                    bench.device.interrupt();
                }
                back.clear();
                wait_for("the echo", || owner.rx_burst(0, &mut back, 64).unwrap() > 0);
            }
        });
        result.unwrap();
        let told = (abi::CTRL_ATTACH, abi::ATTACH_F_INTERRUPT | abi::ATTACH_F_SERVED, 2);
        let attach = bench.device.attach();
        assert_eq!(attach, told, "the device was not told that its interrupts are waited for");
    }
}

#[test]
fn a_change_of_the_link_wakes_a_sleeping_driver() {
    let bench = Bench::with_interrupts();
    bench.link.write(&bench.views.window);
    let (result, _, _) = bench.run(Echo::new(&EchoArgs::default()), |_| {
        let attached = |generation| bench.device.commands().contains(&(abi::CTRL_ATTACH, 0, 0, generation));
        let flagged = |generation| {
            wait_for("the ATTACH", || attached(generation));
            // Asleep by now, but for the second that its sleep lasts.
            thread::sleep(Duration::from_millis(100));
        };
        flagged(2);
        for generation in [4, 6, 8] {
            LinkWriter { generation, ..bench.link.clone() }.write(&bench.views.window);
            let start = Instant::now();
            bench.device.interrupt();
            wait_for("the ATTACH", || attached(generation));
            assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
            thread::sleep(Duration::from_millis(100));
        }
    });
    result.unwrap();
}

#[test]
fn a_program_that_waits_for_buffers_sleeps() {
    let bench = Bench::with_interrupts();
    let mut owner = bench.owner();
    bench.link.write(&bench.views.window);
    let (result, traffic, time) = bench.run(Generate::new(&GenArgs::default()), |_| {
        // All of the owner's buffers are full, and it takes nothing out.
        thread::sleep(Duration::from_millis(1500));
        // It does now, and the program goes on at once.
        let mut received = PacketBurst::default();
        let mut count = 0;
        let start = Instant::now();
        wait_for("packets", || {
            received.clear();
            count += owner.rx_burst(0, &mut received, 64).unwrap();
            if owner.needs_kick(receive_vring(0)) {
                bench.device.interrupt();
            }
            count >= 300
        });
        assert!(start.elapsed() < Duration::from_millis(900), "{:?}", start.elapsed());
    });
    result.unwrap();
    assert!(traffic.tx_packets >= 300);
    assert!(time < Duration::from_millis(500), "{time:?} of processor time");
}

/// An owner without mergeable buffers: a long packet fits none of them.
#[test]
fn a_packet_that_fits_no_buffer_counts_as_dropped() {
    let bench = Bench::of(OwnerConfig { pairs: 1, mergeable: false, ..OwnerConfig::default() });
    let mut owner = bench.owner();
    let (result, traffic) = bench.echo(|_| {
        bench.link.write(&bench.views.window);
        let (short, long) = (frame(1, 100), frame(2, 5000));
        for _ in 0..10 {
            let sent = owner.tx_burst(0, [long.as_slice(), short.as_slice()]).unwrap();
            assert_eq!(sent, 2);
        }
        let mut back = PacketBurst::default();
        wait_for("the short ones", || {
            owner.rx_burst(0, &mut back, 64).unwrap();
            back.len() == 10
        });
    });
    result.unwrap();
    assert_eq!((traffic.rx_packets, traffic.tx_packets, traffic.dropped), (20, 10, 10));
    assert_eq!((traffic.rx_bytes, traffic.tx_bytes), (51_000, 1000));
}

#[test]
fn a_program_that_waits_for_its_broker_ends_well_when_asked_to() {
    let device = DeviceArgs { socket: Some("/nonexistent/peer.sock".into()), ..DeviceArgs::default() };
    let stop = Stop::default();
    let run = |reconnect| {
        let run = RunArgs { reconnect, ..RunArgs::default() };
        let args = PeerArgs { device: device.clone(), run, ..PeerArgs::default() };
        run_until(&args, "echo", &mut Echo::new(&EchoArgs::default()), &stop)
    };
    thread::scope(|scope| {
        let waiting = scope.spawn(|| run(true));
        thread::sleep(Duration::from_millis(300));
        assert!(!waiting.is_finished());
        stop.request();
        waiting.join().unwrap().unwrap();
    });
    // Asked to before the first try.
    run(true).unwrap();
    assert!(matches!(run(false), Err(ProgramError::Transport(TransportError::Broker { .. }))));
}

#[test]
fn a_program_names_the_cause_of_its_end_once() {
    let error = programs::main(["sink", "--socket", "/nonexistent/peer.sock"]).unwrap_err();
    // As the binaries print it.
    let text = format!("{error:#}");
    assert_eq!(text.matches("No such file").count(), 1, "{text}");
    assert!(text.contains("/nonexistent/peer.sock"), "{text}");
}

/// They are said before anybody is looked for.
#[test]
fn packets_that_cannot_be_on_their_way_are_an_error() {
    let owner = "owner-forward --socket /nonexistent/a --socket /nonexistent/b --ring-size 256";
    for (more, what) in [
        ("--inject 129", "129 packets are to be on their way by each card, and 128 can be"),
        (
            "--inject 128 --size 3000",
            "a packet of 3000 bytes is to be on its way, and a buffer has room for 1536",
        ),
        ("--inject 128", "/nonexistent/a"),
    ] {
        let line = format!("{owner} {more}");
        let error = programs::main(line.split(' ')).unwrap_err().to_string();
        assert!(error.contains(what), "{line}: {error}");
    }
}
