//! The embedded device (feature `device`): a guest that reads and writes registers and configuration space
//! at any offset in any width, resets and moves BARs, and a broker that maps, unmaps, wires, says what
//! it likes, dies and comes back; the hypervisor and the honest parts are those of the device's own tests.
//!
//! Asserted besides: what is in force at the hypervisor follows from the registers; the window shows
//! what was mapped and nothing else, has no hole, and cannot be written where it is read-only; after a reset
//! nothing is left; a device that was treated so still works; no descriptor, thread or registration stays.
#![no_main]
#![allow(missing_docs)]

#[path = "device/broker.rs"]
mod broker;
#[path = "device/guest.rs"]
mod guest;
#[path = "../../../vhost-pci-device/tests/support/mod.rs"]
mod support;
#[path = "device/window.rs"]
mod window;

use std::sync::Once;
use std::thread;

use libfuzzer_sys::fuzz_target;
use vhost_pci_fuzz::census::Census;
use vhost_pci_fuzz::front::Pool;
use vhost_pci_fuzz::ignore_sigpipe;
use vhost_pci_fuzz::input::Input;

use crate::broker::Hostile;
use crate::guest::Identity;
use crate::support::broker::Features;
use crate::support::{Bench, PAGE, VRINGS, eventually};
use crate::window::{DATA, Shown};

/// Steps of one input at most.
const STEPS: usize = 60;
/// Deaths of the broker in one input at most.
const DEATHS: u8 = 2;
/// The device's windows; half of each is read-only.
const WINDOWS: [u64; 4] = [4 << 20, 16 << 20, 12 << 20, 1 << 30];

fuzz_target!(|bytes: &[u8]| {
    static FIRST: Once = Once::new();
    FIRST.call_once(|| {
        ignore_sigpipe();
        // Lines are made, as they would be, and thrown away.
        tracing_subscriber::fmt().with_writer(std::io::sink).init();
        let _ = (Pool::of_process(), window::files());
        drop(Bench::started());
    });
    let before = Census::take();
    let mut input = Input::new(bytes);
    match input.byte() {
        // A broker that means harm from its first message on.
        choice @ 0xe0.. => broker::no_broker(&mut input, choice),
        choice => play(&mut input, choice),
    }
    before.is_as_before();
});

fn play(input: &mut Input<'_>, choice: u8) {
    let window_len = WINDOWS[usize::from(choice & 3)];
    let bench = Bench::with(Features { window_len, config_window_len: window_len, ..Features::default() });
    let vmm = bench.vmm.clone();
    window::empty_eventfds();
    let mut game = Game {
        identity: Identity::of(&bench.guest.device),
        shown: Shown::new(window_len),
        hostile: Hostile::default(),
        bench,
        is_fresh: false,
        deaths: 0,
    };
    if choice & 4 != 0 {
        game.start();
    }
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        game.step(input);
        game.check();
    }
    // Another connection is made for it, if nobody knows what this one is up to, but not often.
    let works = choice & 8 != 0 && (!game.hostile.is_out_of_step || choice & 0x30 == 0x30);
    game.end(works);
    assert_eq!((vmm.registered(), vmm.traps().len(), vmm.slots().len()), ((0, 0), 0, 0));
}

struct Game {
    bench: Bench,
    identity: Identity,
    /// What the guest is to find in the window.
    shown: Shown,
    hostile: Hostile,
    /// Nobody has touched a register since the driver's last start.
    is_fresh: bool,
    deaths: u8,
}

impl Game {
    fn step(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        match choice % 24 {
            0..=6 => self.access(choice, input),
            7 => self.start(),
            8 => {
                self.is_fresh = false;
                match choice / 24 % 3 {
                    0 => self.bench.guest.device.reset(),
                    1 => self.bench.guest.flr(),
                    _ => self.bench.guest.device.bar_write(0, 20, &[0]),
                }
                self.after_guest();
            }
            9 => self.settle(),
            10..=13 => self.hostile.map(&self.bench, &mut self.shown, input),
            14 | 15 => self.hostile.unmap(&self.bench, &mut self.shown, input),
            16 | 17 => self.hostile.wire(&self.bench, input),
            18 => self.hostile.say(&self.bench, &mut self.shown, input),
            19 => {
                let eventfd = &Pool::of_process().eventfds[input.below(6) as usize];
                let _ = nix::unistd::write(eventfd, &1_u64.to_ne_bytes());
                self.hostile.fill(&self.bench, choice / 24);
            }
            20 => self.bench.vmm.refuse((choice / 24) & 1 != 0, (choice / 24) & 2 != 0),
            // It takes 50 milliseconds and more.
            21 if self.deaths < DEATHS && input.byte() >= 0xe0 => {
                self.deaths += 1;
                self.bench.broker.die(true);
                eventually("the loss", || !self.bench.guest.device.snapshot().connected);
                self.shown.clear();
                self.hostile.is_out_of_step = false;
                self.bench.broker.come_back();
            }
            22 => self.race(input),
            _ => self.shown.store(&self.bench, input),
        }
    }

    fn access(&mut self, choice: u8, input: &mut Input<'_>) {
        self.is_fresh = false;
        guest::access(&self.bench.guest.device, choice, input);
        self.after_guest();
    }

    /// A guest's access may have been a reset.
    fn after_guest(&mut self) {
        if !self.bench.guest.device.snapshot().live {
            self.shown.clear();
        }
    }

    /// An honest driver, whatever was before it.
    fn start(&mut self) {
        self.bench.vmm.refuse(false, false);
        // BARs are moved while they do not decode.
        self.bench.guest.device.config_write(4, &[0, 0]);
        self.bench.guest.start();
        self.shown.clear();
        self.is_fresh = true;
    }

    /// The broker comes to know of it.
    fn settle(&mut self) {
        let is_connected = self.bench.guest.device.snapshot().connected;
        if self.is_fresh && is_connected && !self.hostile.is_out_of_step {
            self.bench.broker.wait_until_started(VRINGS + 1);
        }
    }

    /// Another processor of the guest's, beside the broker's requests.
    fn race(&mut self, input: &mut Input<'_>) {
        let accesses = input.bytes(96).to_vec();
        thread::scope(|scope| {
            let device = &self.bench.guest.device;
            scope.spawn(move || {
                for _ in 0..4 {
                    let mut accesses = Input::new(&accesses);
                    while !accesses.is_empty() {
                        guest::access(device, accesses.byte(), &mut accesses);
                    }
                }
            });
            for _ in 0..input.below(8) {
                // Who is first nobody knows.
                self.shown.clear();
                match input.below(4) {
                    0 => self.hostile.unmap(&self.bench, &mut self.shown, input),
                    1 => self.hostile.wire(&self.bench, input),
                    _ => self.hostile.map(&self.bench, &mut self.shown, input),
                }
            }
        });
        self.is_fresh = false;
        self.bench.guest.device.reset();
        self.shown.clear();
    }

    fn check(&mut self) {
        self.identity.check(&self.bench);
        if !self.hostile.is_out_of_step {
            self.shown.check(&self.bench);
        }
    }

    fn end(mut self, works: bool) {
        if works {
            if self.hostile.is_out_of_step {
                self.bench.broker.die(true);
                eventually("the loss", || !self.bench.guest.device.snapshot().connected);
                self.hostile.is_out_of_step = false;
            }
            self.bench.broker.come_back();
            eventually("a broker", || self.bench.guest.device.snapshot().connected);
            self.bench.guest.device.reset();
            self.start();
            self.settle();
            eventually("a mapping", || self.hostile.map_page(&self.bench, &mut self.shown, DATA));
            assert_eq!(self.bench.guest.window_load(DATA), Ok(window::mark(0, 0)));
            assert_eq!(self.bench.guest.window_load(DATA + PAGE), Ok(0));
        }
        self.bench.guest.device.reset();
        self.shown.clear();
        self.identity.check(&self.bench);
        // Also what nobody knows of: a closed window shows nothing.
        self.shown.check(&self.bench);
    }
}
