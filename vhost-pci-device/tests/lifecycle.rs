//! Starting, resetting and losing the broker: what the broker is told, and when.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use support::broker::{Broker, Features, NOTIFY, ON, SET_VRING_ENABLE};
use support::guest::{CONFIG_VECTOR, DATA as MSI, Guest};
use support::sys::borrow;
use support::vmm::FakeVmm;
use support::{Bench, PAGE, VRINGS, eventually, file};
use vhost_pci_device::{Device, DeviceError, Options};
use vmm_sys_util::eventfd::EventFd;

const DATA: u64 = 2 << 20;
const GET_VRING_BASE: u32 = 11;

#[test]
fn the_broker_is_told_of_a_start_and_of_no_memory() {
    let bench = Bench::started();
    let (protocol, features) = bench.broker.accepted();
    assert_eq!(features, 1 << 30 | 1 << 32);
    assert_eq!(protocol, 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 22 | 1 << 60 | 1 << 61);
    let queues = 0..=u32::from(VRINGS);
    let enabled: Vec<_> = queues.clone().map(|queue| (SET_VRING_ENABLE, queue)).collect();
    assert_eq!(bench.broker.take_told(), enabled);
    bench.guest.set_status(0);
    bench.broker.wait_until_stopped();
    let stopped: Vec<_> = enabled.into_iter().chain(queues.map(|queue| (GET_VRING_BASE, queue))).collect();
    assert_eq!(bench.broker.take_told(), stopped);
    assert_eq!(bench.broker.memory_messages(), 0, "nothing of the guest's memory is shared");
}

#[test]
fn notifications_and_interrupts_are_the_brokers_without_wires() {
    let bench = Bench::started();
    for queue in 0..=VRINGS {
        bench.guest.notify(queue);
        assert_eq!(bench.broker.kicks(queue.into()), 1);
        bench.broker.call(queue.into());
        assert_eq!(bench.vmm.interrupts(MSI + u32::from(queue)), 1);
    }
    assert_eq!(bench.vmm.registered(), (usize::from(CONFIG_VECTOR) + 1, usize::from(VRINGS) + 1));
}

#[test]
fn a_notification_that_is_an_exit_is_relayed() {
    let bench = Bench::new();
    bench.vmm.refuse(false, true);
    bench.start();
    bench.guest.notify(1);
    bench.broker.wait_for_kick(1);
    assert_eq!(bench.vmm.registered().1, 0);
}

#[test]
fn at_the_end_of_a_reset_nothing_is_in_reach_and_only_then_the_broker_hears_of_it() {
    let hooked = Arc::new(std::sync::Mutex::new(None::<(Arc<FakeVmm>, usize)>));
    let broker = Broker::new(Features::default());
    let hook = {
        let hooked = hooked.clone();
        Arc::new(move |code| {
            // Messages of the stop are checked against what is registered when they come.
            if let Some((vmm, seen)) = &mut *hooked.lock().unwrap()
                && matches!(code, SET_VRING_ENABLE | GET_VRING_BASE)
            {
                assert_eq!(vmm.registered(), (0, 0));
                *seen += 1;
            }
        })
    };
    let vmm = FakeVmm::new();
    let device = Device::new(broker.connector_with(hook), vmm.clone(), Options { requester_id: 0x18 });
    let device = Arc::new(device.unwrap());
    vmm.attach(&device);
    let bench = Bench { broker, vmm: vmm.clone(), guest: Guest::new(device, vmm.clone()) };
    for flr in [false, true] {
        bench.start();
        let memory = file(PAGE);
        let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        eventually("the start is settled", || bench.broker.map(DATA, PAGE, &memory, 0, true));
        assert!(bench.broker.wire(1, ON, &[borrow(&kick)]));
        assert!(bench.broker.wire(1, ON | NOTIFY, &[borrow(&call)]));
        *hooked.lock().unwrap() = Some((vmm.clone(), 0));
        if flr {
            bench.guest.flr();
            bench.guest.enable();
        } else {
            bench.guest.set_status(0);
        }
        assert_eq!(vmm.registered(), (0, 0));
        assert_eq!(bench.guest.window_load(DATA), Ok(0));
        bench.broker.wait_until_stopped();
        eventually("the stop", || {
            hooked.lock().unwrap().as_ref().unwrap().1 == 2 * (usize::from(VRINGS) + 1)
        });
        *hooked.lock().unwrap() = None;
        kick.write(1).unwrap();
        assert_eq!(vmm.interrupts(MSI + 1), 0);
    }
}

#[test]
fn a_vcpu_does_not_wait_for_a_broker_that_takes_its_time() {
    let bench = Bench::with(Features { stop_pause: Duration::from_millis(200), ..Features::default() });
    bench.start();
    let before = Instant::now();
    for _ in 0..10 {
        bench.guest.set_status(0);
        bench.guest.start();
    }
    assert!(before.elapsed() < Duration::from_millis(200), "{:?}", before.elapsed());
    bench.broker.wait_until_started(VRINGS + 1);
    eventually("the last of the starts", || {
        let memory = file(PAGE);
        bench.broker.map(DATA, PAGE, &memory, 0, true)
    });
}

#[test]
fn a_mapping_that_meets_a_reset_is_refused_when_the_broker_knows_of_it() {
    let bench = Bench::with(Features { stop_pause: Duration::from_millis(20), ..Features::default() });
    bench.start();
    bench.broker.take_told();
    bench.guest.set_status(0);
    assert!(!bench.broker.map(DATA, PAGE, &file(PAGE), 0, true));
    assert_eq!(bench.broker.take_told().last(), Some(&(GET_VRING_BASE, u32::from(VRINGS))));
}

#[test]
fn a_device_goes_on_without_its_broker_and_starts_again_with_the_next() {
    let bench = Bench::started();
    let memory = file(PAGE);
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    assert!(bench.broker.map(DATA, PAGE, &memory, 0, true));
    assert!(bench.broker.wire(1, ON, &[borrow(&kick)]));
    assert!(bench.broker.wire(1, ON | NOTIFY, &[borrow(&call)]));
    bench.vmm.interrupts(MSI);
    bench.broker.die(true);
    eventually("the loss is seen", || !bench.guest.device.snapshot().connected);
    assert_eq!(bench.guest.window_load(DATA), Ok(0));
    let snapshot = bench.guest.device.snapshot();
    assert_eq!((snapshot.wired_interrupts, snapshot.wired_notifications), (0, 0));
    assert_eq!((bench.guest.status(), snapshot.live), (15, true));
    // It is seen before the interrupt comes.
    let mut woken = 0;
    eventually("the driver is woken to look", || {
        woken += bench.vmm.interrupts(MSI);
        woken > 0
    });
    assert_eq!(woken, 1);
    bench.guest.notify(1);
    assert_eq!(bench.vmm.registered(), (usize::from(CONFIG_VECTOR) + 1, usize::from(VRINGS) + 1));

    bench.broker.come_back();
    bench.broker.wait_until_started(VRINGS + 1);
    eventually("the window", || bench.broker.map(DATA, PAGE, &memory, 0, true));
    assert_eq!(bench.guest.window_load(DATA), Ok(1));
    assert_eq!(bench.broker.kicks(1), 1, "what was rung meanwhile");
}

#[test]
fn a_device_that_was_reset_without_broker_stays_stopped_with_the_next() {
    let bench = Bench::started();
    bench.broker.die(true);
    bench.guest.set_status(0);
    bench.broker.come_back();
    eventually("another connection", || bench.broker.connections() == 2);
    eventually("it is used", || bench.guest.device.snapshot().connected);
    assert!(!bench.broker.map(DATA, PAGE, &file(PAGE), 0, true));
    bench.start();
}

#[test]
fn a_back_end_that_cannot_serve_the_device_is_told_from_a_broker() {
    let good = Features::default();
    for (features, what) in [
        (Features { protocol: good.protocol & !(1 << 61), ..good }, "SHMEM_STRICT"),
        (Features { protocol: good.protocol & !(1 << 22), ..good }, "SHMEM"),
        (Features { window_len: 4 << 20, ..good }, "another length than the config space's"),
        (Features { window_len: 0, ..good }, "no window"),
    ] {
        let result = Device::new(Broker::new(features).connector(), FakeVmm::new(), Options::default());
        assert!(matches!(result, Err(DeviceError::Broker(_))), "{what}");
    }
    let nobody = Device::connect("/nonexistent/socket".as_ref(), FakeVmm::new(), Options::default());
    assert!(matches!(nobody, Err(DeviceError::Connect(_))));
}

#[test]
fn without_wiring_a_wire_ends_the_connection() {
    let good = Features::default();
    let bench = Bench::with(Features { protocol: good.protocol & !(1 << 60), ..good });
    bench.start();
    assert_eq!(bench.broker.accepted().0 & 1 << 60, 0);
    let channel = bench.broker.channel();
    let event = EventFd::new(0).unwrap();
    support::broker::send(
        &channel,
        &support::broker::message(support::broker::WIRE, 9, &[0; 8]),
        &[borrow(&event)],
    )
    .unwrap();
    eventually("another connection", || bench.broker.connections() == 2);
}

#[test]
fn a_device_goes_at_once_though_its_broker_hangs() {
    let bench = Bench::with(Features { stop_pause: Duration::from_secs(60), ..Features::default() });
    bench.start();
    bench.guest.set_status(0);
    let disables = usize::from(VRINGS) + 1;
    let mut told = bench.broker.take_told().len();
    eventually("the broker hangs in the stop", || {
        told += bench.broker.take_told().len();
        told >= 2 * disables
    });
    let before = Instant::now();
    let Bench { vmm, guest, .. } = bench;
    drop(guest);
    assert!(before.elapsed() < Duration::from_secs(1), "{:?}", before.elapsed());
    assert!(vmm.traps().is_empty() && vmm.slots().is_empty());
    assert_eq!(vmm.registered(), (0, 0));
}
