//! Commands of the peer's driver, which come over the control ring (`docs/vhost-pci-device.md`, 9).

use std::time::Instant;

use vhost_pci_device::abi;

use super::fault::Fault;
use super::message::{CommandId, Effect};
use super::peer::AttachedDriver;
use super::state::Link;

impl Link {
    /// Takes one command of the peer's driver.
    pub(super) fn command(
        &mut self,
        command: CommandId,
        request: &abi::ControlRequest,
        (readable, writable): (u64, u64),
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        self.counters.control_commands += 1;
        let generation = self.generations.link;
        let Some(peer) = self.peer.as_mut() else {
            return effects.push(Effect::Answer(command, abi::CTRL_INVALID, false));
        };
        let status = match request.command.value() {
            abi::CTRL_ATTACH if request.value.value() != generation => abi::CTRL_STALE,
            abi::CTRL_ATTACH => {
                let has = |flag| request.flags.value() & flag != 0;
                // An MSI-X table has 2048 entries at most.
                let vectors = request.len.value().min(2048) as u32;
                peer.driver = Some(AttachedDriver {
                    generation,
                    interrupt: has(abi::ATTACH_F_INTERRUPT),
                    vectors: if has(abi::ATTACH_F_DOORBELL) { vectors } else { 0 },
                    quiesces: has(abi::ATTACH_F_QUIESCE),
                    says_served: has(abi::ATTACH_F_SERVED),
                });
                if !has(abi::ATTACH_F_QUIESCE) {
                    self.release.forget();
                }
                self.unsettled = true;
                abi::CTRL_OK
            }
            abi::CTRL_DETACH => {
                peer.driver = None;
                self.release.forget();
                self.unsettled = true;
                abi::CTRL_OK
            }
            abi::CTRL_RELEASE => {
                let table = request.value.value();
                let quiesces = peer.driver.is_some_and(|driver| driver.quiesces);
                match quiesces && table <= self.generations.table {
                    false => abi::CTRL_INVALID,
                    true if self.release.give(table) => {
                        self.unsettled = true;
                        abi::CTRL_OK
                    }
                    true => abi::CTRL_STALE,
                }
            }
            abi::CTRL_FAULT => self.ring_fault(request, effects),
            // A command of a driver that serves an earlier link must not reach into this one.
            abi::CTRL_MAP | abi::CTRL_FETCH | abi::CTRL_STORE
                if peer.driver.is_none_or(|driver| driver.generation != generation) =>
            {
                abi::CTRL_STALE
            }
            abi::CTRL_MAP | abi::CTRL_FETCH | abi::CTRL_STORE => {
                return self.take_want(command, request, readable, writable, now, effects);
            }
            _ => abi::CTRL_UNKNOWN,
        };
        effects.push(Effect::Answer(command, status, false));
    }

    fn ring_fault(&mut self, request: &abi::ControlRequest, effects: &mut Vec<Effect>) -> u32 {
        let vring = request.vring.value();
        let kind = abi::FaultKind::from_number(request.kind.value());
        let (Some(kind), true) = (kind, vring < self.config.max_vrings()) else {
            return abi::CTRL_INVALID;
        };
        let fault = Fault::Ring { vring, kind, value: request.value.value() };
        self.count(&fault, "owner", effects);
        let err = self.owner.as_ref().and_then(|owner| owner.vrings()[usize::from(vring)].err.clone());
        effects.extend(err.map(Effect::Signal));
        abi::CTRL_OK
    }
}
