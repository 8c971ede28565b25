//! A device of the peer's VM that uses the window, and its driver: nothing that was lent to it is
//! taken away before the driver said that it let go, or had its time.

use vhost_pci_device::abi;
use vhost_pci_switch::link::descriptor::MemoryFile;

use crate::bench::Bench;

/// What the device may reach.
#[derive(Debug, Default)]
pub struct Lent {
    mappings: Vec<abi::Mapping>,
    /// Drivers that let their time pass, so far.
    late: u64,
}

impl Bench {
    /// The driver attaches, and lends its device all that the link page shows.
    pub fn lends(&mut self) -> u32 {
        self.forget_lent();
        let request = abi::ControlRequest {
            command: abi::CTRL_ATTACH.into(),
            flags: (abi::ATTACH_F_INTERRUPT | abi::ATTACH_F_QUIESCE).into(),
            value: self.published.1.into(),
            ..Default::default()
        };
        let status = self.says(&request);
        if status == abi::CTRL_OK {
            // What it has, it keeps until it lets go.
            let new: Vec<_> = self.published.0.mappings.clone();
            let known = &self.lent.mappings;
            let new: Vec<_> = new.into_iter().filter(|mapping| !known.contains(mapping)).collect();
            self.lent.mappings.extend(new);
        }
        status
    }

    /// The device lets go of what the link page does not show any more, and the driver says so.
    pub fn releases(&mut self) -> u32 {
        self.lets_go();
        self.says_released(self.table_generation)
    }

    /// The device lets go of what the link page does not show any more.
    pub fn lets_go(&mut self) {
        let shown = &self.published.0.mappings;
        self.lent.mappings.retain(|mapping| shown.contains(mapping));
    }

    pub fn says_released(&mut self, table: u64) -> u32 {
        self.says(&abi::ControlRequest {
            command: abi::CTRL_RELEASE.into(),
            value: table.into(),
            ..Default::default()
        })
    }

    fn says(&mut self, request: &abi::ControlRequest) -> u32 {
        let (status, effects) = self.command(request);
        self.run(effects);
        self.look();
        status
    }

    /// Ranges that the device may reach.
    pub fn lent(&self) -> usize {
        self.lent.mappings.len()
    }

    /// A driver that is not attached has no device.
    fn forget_lent(&mut self) {
        if !self.report().peer.quiesces {
            self.lent.mappings.clear();
        }
    }

    /// The VMM is asked to take this out of the window.
    pub fn check_released(&mut self, placement: &iommu::Placement<MemoryFile>) {
        if self.lent.mappings.is_empty() {
            return;
        }
        self.forget_lent();
        let late = self.faults("window_unreleased");
        if late > self.lent.late {
            self.lent.late = late;
            self.lent.mappings.clear();
        }
        let start = placement.range().iova().start().raw();
        let held = self.lent.mappings.iter().any(|mapping| mapping.iova.value() == start);
        assert!(!held, "{placement:?} is unmapped while a device of the peer's VM has it");
    }
}
