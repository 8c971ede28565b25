//! WIRE, and what masking does to it.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::os::fd::AsFd;

use support::broker::{NOTIFY, ON, take_count};
use support::guest::{CONFIG_VECTOR, DATA as MSI, REGISTERS_AT};
use support::sys::borrow;
use support::{Bench, VRINGS};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const QUEUE: u32 = 1;
const VECTOR: u16 = 1;
const MESSAGE: u32 = MSI + VECTOR as u32;

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

#[test]
fn a_wired_interrupt_comes_straight_and_the_brokers_own_beside_it() {
    let bench = Bench::started();
    let kick = event();
    assert!(bench.broker.wire(QUEUE, ON, &[borrow(&kick)]));
    kick.write(1).unwrap();
    assert_eq!(bench.vmm.interrupts(MESSAGE), 1);
    bench.broker.call(QUEUE);
    assert_eq!(bench.vmm.interrupts(MESSAGE), 1);
    assert!(bench.broker.wire(QUEUE, 0, &[]));
    kick.write(1).unwrap();
    assert_eq!(bench.vmm.interrupts(MESSAGE), 0);
    bench.broker.call(QUEUE);
    assert_eq!(bench.vmm.interrupts(MESSAGE), 1);
    assert!(bench.broker.wire(QUEUE, 0, &[]), "the end of what is not wired");
    assert!(bench.broker.wire(QUEUE, NOTIFY, &[]));
}

#[test]
fn a_signal_from_before_the_wire_arrives_with_it() {
    let bench = Bench::started();
    let kick = event();
    kick.write(3).unwrap();
    assert!(bench.broker.wire(QUEUE, ON, &[borrow(&kick)]));
    assert_eq!(bench.vmm.interrupts(MESSAGE), 1);
}

#[test]
fn a_wired_notification_goes_straight_instead_of_to_the_broker() {
    let bench = Bench::started();
    let call = event();
    assert!(bench.broker.wire(QUEUE, ON | NOTIFY, &[borrow(&call)]));
    bench.guest.notify(QUEUE as u16);
    assert_eq!((take_count(borrow(&call)), bench.broker.kicks(QUEUE)), (1, 0));
    let other = event();
    assert!(bench.broker.wire(QUEUE, ON | NOTIFY, &[borrow(&other)]));
    bench.guest.notify(QUEUE as u16);
    assert_eq!(
        (take_count(borrow(&call)), take_count(borrow(&other))),
        (0, 1),
        "the second replaces the first"
    );
    assert!(bench.broker.wire(QUEUE, NOTIFY, &[]));
    bench.guest.notify(QUEUE as u16);
    assert_eq!((take_count(borrow(&other)), bench.broker.kicks(QUEUE)), (0, 1));
}

#[test]
fn a_notification_that_is_an_exit_is_never_written_to_what_was_given() {
    let bench = Bench::started();
    let call = event();
    assert!(bench.broker.wire(QUEUE, ON | NOTIFY, &[borrow(&call)]));
    let offset = bench.guest.notify_address(QUEUE as u16) - REGISTERS_AT;
    bench.guest.device.bar_write(0, offset, &[1, 0]);
    bench.broker.wait_for_kick(QUEUE);
    assert_eq!(take_count(borrow(&call)), 0);
}

#[test]
fn what_comes_while_a_vector_is_masked_is_pending_and_arrives_once() {
    let bench = Bench::started();
    let kick = event();
    assert!(bench.broker.wire(QUEUE, ON, &[borrow(&kick)]));
    for whole in [false, true] {
        let mask = |masked| match whole {
            true => bench.guest.set_all_masked(masked),
            false => bench.guest.set_masked(VECTOR, masked),
        };
        mask(true);
        assert_eq!(bench.guest.pending(), 0);
        for _ in 0..5 {
            kick.write(1).unwrap();
        }
        assert_eq!(bench.vmm.interrupts(MESSAGE), 0);
        assert_eq!(bench.guest.pending(), 1 << VECTOR);
        mask(false);
        assert_eq!(bench.vmm.interrupts(MESSAGE), 1);
        assert_eq!(bench.guest.pending(), 0);
        kick.write(1).unwrap();
        assert_eq!(bench.vmm.interrupts(MESSAGE), 1);
    }
}

#[test]
fn masking_is_of_one_vector_and_takes_the_brokers_signals_too() {
    let bench = Bench::started();
    bench.guest.set_masked(VECTOR, true);
    bench.broker.call(QUEUE);
    bench.broker.call(0);
    assert_eq!((bench.vmm.interrupts(MSI), bench.vmm.interrupts(MESSAGE)), (1, 0));
    assert_eq!(bench.guest.pending(), 1 << VECTOR);
    bench.guest.set_masked(VECTOR, false);
    assert_eq!(bench.vmm.interrupts(MESSAGE), 1);
}

#[test]
fn a_wire_while_masked_waits_for_the_unmasking() {
    let bench = Bench::started();
    let kick = event();
    bench.guest.set_masked(VECTOR, true);
    assert!(bench.broker.wire(QUEUE, ON, &[borrow(&kick)]));
    kick.write(1).unwrap();
    assert_eq!((bench.vmm.interrupts(MESSAGE), bench.guest.pending()), (0, 1 << VECTOR));
    bench.guest.set_masked(VECTOR, false);
    assert_eq!(bench.vmm.interrupts(MESSAGE), 1);
}

#[test]
fn without_bus_mastering_or_msix_nothing_is_sent_and_nothing_lost() {
    let bench = Bench::started();
    let kick = event();
    assert!(bench.broker.wire(QUEUE, ON, &[borrow(&kick)]));
    let device = &bench.guest.device;
    device.config_write(4, &0x0002_u16.to_le_bytes());
    kick.write(1).unwrap();
    assert_eq!((bench.vmm.interrupts(MESSAGE), bench.vmm.registered().0), (0, 0));
    device.config_write(4, &0x0006_u16.to_le_bytes());
    assert_eq!(bench.vmm.interrupts(MESSAGE), 1);
    device.config_write(bench.guest.msix() + 2, &0_u16.to_le_bytes());
    kick.write(1).unwrap();
    assert_eq!(bench.vmm.interrupts(MESSAGE), 0);
    bench.guest.set_all_masked(false);
    assert_eq!(bench.vmm.interrupts(MESSAGE), 1);
}

#[test]
fn a_reprogrammed_vector_sends_the_new_message() {
    let bench = Bench::started();
    let kick = event();
    assert!(bench.broker.wire(QUEUE, ON, &[borrow(&kick)]));
    let data = REGISTERS_AT + 0x4000 + 16 * u64::from(VECTOR) + 8;
    bench.guest.store(data, &0x99_u32.to_le_bytes());
    kick.write(1).unwrap();
    assert_eq!((bench.vmm.interrupts(MESSAGE), bench.vmm.interrupts(0x99)), (0, 1));
}

#[test]
fn wires_follow_a_bar_that_moves() {
    let bench = Bench::started();
    let call = event();
    assert!(bench.broker.wire(QUEUE, ON | NOTIFY, &[borrow(&call)]));
    bench.guest.device.assign_bar(0, GuestAddress(0xd000_0000));
    let notify = bench.guest.notify_address(QUEUE as u16) - REGISTERS_AT + 0xd000_0000;
    assert!(bench.vmm.ioeventfd(bench.guest.notify_address(QUEUE as u16)).is_none());
    bench.vmm.store(notify, &[1, 0]);
    assert_eq!(take_count(borrow(&call)), 1);
}

#[test]
fn what_the_hypervisor_refuses_is_refused_and_relayed() {
    let bench = Bench::started();
    let (kick, call) = (event(), event());
    assert!(bench.broker.wire(2, ON, &[borrow(&kick)]));
    assert!(!bench.broker.wire(QUEUE, ON, &[borrow(&kick)]), "one interrupt an eventfd");
    bench.vmm.refuse(true, true);
    assert!(!bench.broker.wire(QUEUE, ON, &[borrow(&call)]));
    assert!(!bench.broker.wire(QUEUE, ON | NOTIFY, &[borrow(&call)]));
    bench.vmm.refuse(false, false);
    bench.guest.notify(QUEUE as u16);
    bench.broker.call(QUEUE);
    bench.broker.wait_for_kick(QUEUE);
    assert_eq!(bench.vmm.interrupts(MESSAGE), 1);
    let snapshot = bench.guest.device.snapshot();
    assert_eq!((snapshot.wired_interrupts, snapshot.wired_notifications), (1, 0));
}

#[test]
fn a_refused_replacement_leaves_the_queue_unwired() {
    let bench = Bench::started();
    let (first, second) = (event(), event());
    assert!(bench.broker.wire(2, ON, &[borrow(&second)]));
    assert!(bench.broker.wire(QUEUE, ON, &[borrow(&first)]));
    assert!(!bench.broker.wire(QUEUE, ON, &[borrow(&second)]));
    first.write(1).unwrap();
    assert_eq!(bench.vmm.interrupts(MESSAGE), 0);
}

#[test]
fn nothing_is_wired_before_the_start_or_to_a_queue_that_is_not_enabled() {
    let bench = Bench::new();
    support::eventually("the connection", || bench.guest.device.snapshot().connected);
    let kick = event();
    assert!(!bench.broker.wire(QUEUE, ON, &[borrow(&kick)]));
    bench.start();
    assert!(!bench.broker.wire(u32::from(VRINGS) + 1, ON, &[borrow(&kick)]));
    assert!(bench.broker.wire(QUEUE, ON, &[borrow(&kick)]));
    bench.guest.set_status(0);
    assert!(!bench.broker.wire(QUEUE, ON, &[borrow(&kick)]));
    assert!(bench.broker.wire(QUEUE, 0, &[]));
    assert_eq!(bench.vmm.registered(), (0, 0));
}

#[test]
fn a_driver_that_polls_gets_no_interrupts_and_its_wire_stands() {
    let bench = Bench::started();
    bench.guest.set_common(22, QUEUE, 2);
    bench.guest.set_common(26, 0xffff, 2);
    let kick = event();
    assert!(bench.broker.wire(QUEUE, ON, &[borrow(&kick)]));
    kick.write(1).unwrap();
    assert_eq!(bench.vmm.interrupts(MESSAGE), 0);
    bench.guest.set_common(26, CONFIG_VECTOR.into(), 2);
    assert_eq!(bench.vmm.interrupts(MSI + u32::from(CONFIG_VECTOR)), 1);
}

#[test]
fn what_is_no_eventfd_is_not_wired_even_while_masked() {
    let bench = Bench::started();
    bench.guest.set_masked(VECTOR, true);
    let (reader, writer) = std::io::pipe().unwrap();
    let memory = support::file(support::PAGE);
    for fd in [reader.as_fd(), writer.as_fd(), memory.as_fd()] {
        assert!(!bench.broker.wire(QUEUE, ON, &[fd]));
        assert!(!bench.broker.wire(QUEUE, ON | NOTIFY, &[fd]));
    }
    assert_eq!(bench.guest.device.snapshot().wired_interrupts, 0);
    assert!(bench.broker.wire(QUEUE, ON, &[borrow(&event())]));
}

#[test]
fn an_interrupt_that_the_hypervisor_refused_comes_when_it_refuses_no_more() {
    let bench = Bench::started();
    let kick = event();
    bench.guest.set_masked(VECTOR, true);
    assert!(bench.broker.wire(QUEUE, ON, &[borrow(&kick)]));
    bench.vmm.refuse(true, false);
    bench.guest.set_masked(VECTOR, false);
    kick.write(1).unwrap();
    assert_eq!(bench.vmm.interrupts(MESSAGE), 0);
    bench.vmm.refuse(false, false);
    let mut count = 0;
    support::eventually("the interrupt", || {
        count += bench.vmm.interrupts(MESSAGE);
        count > 0
    });
    std::thread::sleep(std::time::Duration::from_millis(250));
    assert_eq!(count + bench.vmm.interrupts(MESSAGE), 1);
}

#[test]
fn an_interrupt_that_was_refused_comes_without_a_broker_too() {
    let bench = Bench::started();
    bench.guest.set_masked(VECTOR, true);
    bench.broker.call(QUEUE);
    bench.vmm.refuse(true, false);
    bench.broker.die(true);
    support::eventually("the loss", || !bench.guest.device.snapshot().connected);
    bench.guest.set_masked(VECTOR, false);
    assert_eq!(bench.vmm.interrupts(MESSAGE), 0);
    bench.vmm.refuse(false, false);
    support::eventually("the interrupt", || bench.vmm.interrupts(MESSAGE) == 1);
}
