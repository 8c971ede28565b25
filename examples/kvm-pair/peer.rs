//! The peer's process: a VM with the vhost-pci device embedded.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use vhost_pci_device::{Device, Options};

use crate::bus::Bus;
use crate::child::Parent;
use crate::cpu;
use crate::driver::Function;
use crate::guest::{Ends, Guest};
use crate::layout::FIRST_VECTOR;
use crate::owner::VRING;
use crate::relay::Relay;
use crate::user::User;
use crate::vcpu::Processor;
use crate::vm::Vm;
use crate::vmm::KvmVmm;

/// The virtqueue of the vring.
const QUEUE: u16 = 1 + VRING;

/// The process. `relay`: each eventfd that the device registers goes through another process.
///
/// # Errors
/// If there is no KVM or no broker.
pub fn run(parent: &Parent, socket: &Path, relay: bool) -> anyhow::Result<()> {
    let vm = Arc::new(Vm::new()?);
    let bus = Arc::new(Bus::default());
    let relay = relay.then(Relay::start).transpose()?;
    let vmm = Arc::new(KvmVmm::new(Arc::clone(&vm), Arc::clone(&bus), relay));
    let device = Arc::new(Device::connect(socket, vmm.clone(), Options::default())?);
    bus.plug(&device);
    let processor = Processor::start(&vm, cpu::PEER, bus.clone())?;
    let mut function = Function::place(&device, &bus)?;
    function.start()?;
    let vector = FIRST_VECTOR + QUEUE as u8;
    let ends = Ends { doorbell: function.doorbell(QUEUE), value: QUEUE, vector };
    let guest = Guest { vm: &vm, processor: &processor, ends };
    let mut user = None;
    parent.obey(|_, line| {
        match line {
            "start" => function.start()?,
            "reset" => function.reset()?,
            "flr" => {
                function.reset_function()?;
                function = Function::place(&device, &bus)?;
            }
            "mask" => function.mask(QUEUE, true),
            "unmask" => function.mask(QUEUE, false),
            "pending" => return Ok(u8::from(function.is_pending(QUEUE)).to_string()),
            "use" => user = Some(User::start(&vm, &processor, &vmm, &device, &function)?),
            line => match line.strip_prefix("window ") {
                Some(line) => return user.as_mut().context("nobody uses the window")?.obey(line),
                None => return guest.obey(line),
            },
        }
        Ok(String::new())
    })
}
