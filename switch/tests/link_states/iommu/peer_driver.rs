//! The peer's driver: commands, and that each has one answer.

use std::collections::BTreeMap;

use vhost_pci_device::abi;
use vhost_pci_switch::link::Event;
use vhost_pci_switch::link::iommu::demand::Task;
use vhost_pci_switch::link::iommu::iotlb::Piece;
use vhost_pci_switch::link::message::CommandId;

use crate::bench::Bench;

/// What became of a command.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A `CTRL_*` status.
    Status(u32),
    /// Copied, between these pieces.
    Copied(Vec<Piece>),
}

/// Commands since the control ring was reset.
#[derive(Debug, Default)]
pub struct Commands {
    open: BTreeMap<CommandId, (Task, u64, u64)>,
    done: BTreeMap<CommandId, Outcome>,
}

impl Commands {
    pub fn answered(&mut self, id: CommandId, status: u32) {
        self.open.remove(&id).unwrap_or_else(|| panic!("{id:?} is answered and was not open"));
        self.done.insert(id, Outcome::Status(status));
    }

    pub fn copied(&mut self, id: CommandId, task: Task, pieces: &[Piece]) -> (u64, u64) {
        let open = self.open.remove(&id);
        let (asked, iova, len) = open.unwrap_or_else(|| panic!("{id:?} is carried out and was not open"));
        assert_eq!(asked, task);
        self.done.insert(id, Outcome::Copied(pieces.to_vec()));
        (iova, len)
    }

    /// The ring is empty: what was asked before has no answer any more.
    pub fn reset(&mut self) {
        self.open.clear();
        self.done.clear();
    }

    pub fn open(&self) -> usize {
        self.open.len()
    }

    pub fn outcome(&self, id: CommandId) -> Option<&Outcome> {
        self.done.get(&id)
    }
}

impl Bench {
    /// Gives a command and does not wait.
    pub fn gives(&mut self, command: u16, iova: u64, len: u64, flags: u32) -> CommandId {
        let request = abi::ControlRequest {
            command: command.into(),
            value: iova.into(),
            len: len.into(),
            flags: flags.into(),
            ..Default::default()
        };
        self.gives_raw(&request, len, len)
    }

    /// Tells that the driver serves the present link, as it has to before other commands.
    pub fn attaches(&mut self) {
        let generation = self.published.1.into();
        let flags = if self.report().peer.quiesces { abi::ATTACH_F_QUIESCE } else { 0 };
        let attach = abi::ControlRequest {
            command: abi::CTRL_ATTACH.into(),
            value: generation,
            flags: flags.into(),
            ..Default::default()
        };
        let id = self.next_command();
        self.commands.open.insert(id, (Task::Map, 0, 0));
        self.apply(Event::Command(id, attach, 0, 0));
    }

    /// Gives a command as the driver that serves the present link.
    pub fn gives_raw(&mut self, request: &abi::ControlRequest, readable: u64, writable: u64) -> CommandId {
        self.attaches();
        self.gives_unattached(request, readable, writable)
    }

    pub fn gives_unattached(
        &mut self,
        request: &abi::ControlRequest,
        readable: u64,
        writable: u64,
    ) -> CommandId {
        let id = self.next_command();
        let task = match request.command.value() {
            abi::CTRL_FETCH => Task::Fetch,
            abi::CTRL_STORE => Task::Store,
            _ => Task::Map,
        };
        self.commands.open.insert(id, (task, request.value.value(), request.len.value()));
        self.apply(Event::Command(id, *request, readable, writable));
        id
    }

    pub fn fetch(&mut self, iova: u64, len: u64) -> CommandId {
        self.gives(abi::CTRL_FETCH, iova, len, 0)
    }

    pub fn store(&mut self, iova: u64, len: u64) -> CommandId {
        self.gives(abi::CTRL_STORE, iova, len, 0)
    }

    pub fn map(&mut self, iova: u64, len: u64, access: u32) -> CommandId {
        self.gives(abi::CTRL_MAP, iova, len, access)
    }

    /// What became of a command when nothing is left to do.
    pub fn outcome(&mut self, id: CommandId) -> Outcome {
        self.settle();
        self.commands
            .outcome(id)
            .unwrap_or_else(|| panic!("{id:?} is still open: {:#?}", self.report()))
            .clone()
    }

    /// The status with which a command ends.
    pub fn status(&mut self, id: CommandId) -> u32 {
        match self.outcome(id) {
            Outcome::Status(status) => status,
            Outcome::Copied(_) => panic!("{id:?} was carried out"),
        }
    }

    /// Whether a command's copy was made.
    pub fn copies(&mut self, id: CommandId) -> bool {
        matches!(self.outcome(id), Outcome::Copied(_))
    }
}
