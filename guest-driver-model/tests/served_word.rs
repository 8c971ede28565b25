//! What a program says that it serves, in the control area (`docs/vhost-pci-device.md`, 9.1).
#![allow(clippy::unwrap_used, dead_code)]

mod net_support;

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use guest_driver_model::net::OwnerConfig;
use guest_driver_model::programs::forward::{ForwardArgs, run_on};
use guest_driver_model::programs::run::RunArgs;
use guest_driver_model::programs::stop::Stop;
use guest_driver_model::programs::waiting::{Wait, WaitArgs};
use guest_driver_model::transport::Transport;
use net_support::side::{Side, beside};
use vhost_pci_device::abi;

/// The generation that is said to be served.
fn said(side: &Side) -> u64 {
    let at = abi::CONTROL_OFFSET + abi::CONTROL_LEN - abi::CONTROL_SERVED_FROM_END;
    side.views.window.load_u64_acquire(at).unwrap()
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        thread::yield_now();
    }
}

fn run(wait: Wait, sides: [&Side; 2], test: impl FnOnce()) {
    let run = RunArgs { wait: WaitArgs { wait, idle_us: 0 }, ..RunArgs::default() };
    let args = ForwardArgs { run, ..ForwardArgs::default() };
    let program = |stop: &Stop| run_on(sides.map(|side| &side.device as &dyn Transport), &args, stop);
    beside(&sides, program, test).0.unwrap();
    assert_eq!(sides.map(said), [0, 0], "when it has ended");
}

#[test]
fn the_generation_is_said_while_it_is_served_and_none_when_the_link_is_down() {
    let sides = [Side::new(OwnerConfig::default()), Side::new(OwnerConfig::default())];
    let [left, right] = &sides;
    run(Wait::Poll, [left, right], || {
        drop((left.start(2), right.start(6)));
        wait_until("what is served is not said", || (said(left), said(right)) == (2, 6));
        left.show(4, 0);
        wait_until("what is not served is still said", || said(left) == 0);
        left.show(8, abi::LINK_S_UP | abi::LINK_S_OWNER);
        wait_until("what is served again is not said", || said(left) == 8);
    });
}

#[test]
fn who_sleeps_serves_nothing() {
    let sides = [Side::new(OwnerConfig::default()), Side::new(OwnerConfig::default())];
    let [left, right] = &sides;
    run(Wait::Interrupt, [left, right], || {
        drop((left.start(2), right.start(2)));
        // It has looked before it sleeps, with a link that is up.
        let looks = left.device.looks.load(Ordering::Relaxed);
        wait_until("it does not sleep", || left.device.looks.load(Ordering::Relaxed) > looks + 3);
        wait_until("it sleeps and says that it serves", || (said(left), said(right)) == (0, 0));
    });
}
