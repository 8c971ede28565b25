//! The floor: two VMs, each in a process of its own, and two eventfds, each the one's
//! KVM_IOEVENTFD and the other's KVM_IRQFD. No device, no broker, no vhost-user.

use std::sync::Arc;

use anyhow::Context;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::child::{Child, Parent};
use crate::cpu;
use crate::guest::{Ends, Guest};
use crate::layout::{DOORBELLS, FIRST_VECTOR};
use crate::pair::Pair;
use crate::sys::fd::eventfd;
use crate::vcpu::{Nothing, Processor};
use crate::vm::{Msi, Vm};

/// Starts the two processes and joins their VMs.
///
/// # Errors
/// If KVM or the system refuses.
pub fn start() -> anyhow::Result<Pair> {
    let there = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let back = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let mut owner = Child::start(&["bare", &cpu::OWNER.to_string()])?;
    let mut peer = Child::start(&["bare", &cpu::PEER.to_string()])?;
    owner.give("doorbell", &there)?;
    peer.give("interrupt", &there)?;
    peer.give("doorbell", &back)?;
    owner.give("interrupt", &back)?;
    Ok(Pair { owner, peer })
}

/// The process.
///
/// # Errors
/// If there is no KVM, or the parent is gone.
pub fn run(parent: &Parent, place: usize) -> anyhow::Result<()> {
    let vm = Arc::new(Vm::new()?);
    let processor = Processor::start(&vm, place, Arc::new(Nothing))?;
    let ends = Ends { doorbell: DOORBELLS, value: 0, vector: FIRST_VECTOR };
    let guest = Guest { vm: &vm, processor: &processor, ends };
    let mut eventfds = Vec::new();
    parent.obey(|parent, line| match line {
        "doorbell" => {
            let eventfd = eventfd(parent.take()?);
            vm.add_ioeventfd(&eventfd, ends.doorbell).context("KVM_IOEVENTFD")?;
            eventfds.push(eventfd);
            Ok(String::new())
        }
        "interrupt" => {
            let eventfd = eventfd(parent.take()?);
            let gsi = vm.add_route(Msi::vector(ends.vector)).context("KVM_SET_GSI_ROUTING")?;
            vm.add_irqfd(&eventfd, gsi).context("KVM_IRQFD")?;
            // KVM lets go of an eventfd that no process has open any more.
            eventfds.push(eventfd);
            Ok(String::new())
        }
        line => guest.obey(line),
    })
}
