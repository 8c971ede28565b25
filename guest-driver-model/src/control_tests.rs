//! The control ring against a device that answers from within the doorbell.
#![allow(clippy::unwrap_used)]

use std::sync::Mutex;

use vhost_pci_device::abi::DeviceConfig;

use super::*;
use crate::transport::TransportError;

/// What the device does with a command.
#[derive(Clone, Copy)]
enum Device {
    Answers(u32),
    Silent,
    ClaimsTooMuch,
}

/// Command, vring, flags, kind, value.
type Seen = (u16, u16, u32, u32, u64);

struct Fake {
    config: DeviceConfig,
    window: SharedMemory,
    device: Mutex<(Device, u16)>,
    seen: Mutex<Vec<Seen>>,
}

const AREA: u64 = abi::CONTROL_OFFSET;
/// More than any answer here takes.
const PATIENCE: Duration = Duration::from_secs(2);

fn attach(generation: u64, interrupt: bool) -> Command {
    Command::Attach { generation, interrupt, doorbell: None, quiesce: false, says_served: false }
}

impl Fake {
    fn new(device: Device) -> Self {
        let window = SharedMemory::private(1 << 20).unwrap();
        let config = DeviceConfig {
            control_offset: AREA.into(),
            control_len: abi::CONTROL_LEN.into(),
            ..DeviceConfig::default()
        };
        Self { config, window, device: Mutex::new((device, 0)), seen: Mutex::default() }
    }

    fn answer(&self) {
        let mut device = self.device.lock().unwrap();
        let word = |at| self.window.load_u16(AREA + at).unwrap();
        while device.1 != word(abi::CONTROL_AVAIL + 2) {
            let slot = u64::from(device.1 % abi::CONTROL_RING_SIZE);
            let head = word(abi::CONTROL_AVAIL + 4 + 2 * slot);
            let descriptor = |index: u16| AREA + abi::CONTROL_DESC + 16 * u64::from(index);
            let request = self.window.load_u64(descriptor(head)).unwrap();
            let second = self.window.load_u16(descriptor(head) + 14).unwrap();
            let response = self.window.load_u64(descriptor(second)).unwrap();
            let window = &self.window;
            self.seen.lock().unwrap().push((
                window.load_u16(request).unwrap(),
                window.load_u16(request + 2).unwrap(),
                window.load_u32(request + 4).unwrap(),
                window.load_u32(request + 8).unwrap(),
                window.load_u64(request + 16).unwrap(),
            ));
            let len = match device.0 {
                Device::Silent => return,
                Device::Answers(status) => {
                    window.store_u32(response, status).unwrap();
                    8
                }
                Device::ClaimsTooMuch => 9,
            };
            let used = AREA + abi::CONTROL_USED;
            window.store_u32(used + 4 + 8 * slot, head.into()).unwrap();
            window.store_u32(used + 8 + 8 * slot, len).unwrap();
            device.1 += 1;
            window.store_u16_release(used + 2, device.1).unwrap();
        }
    }
}

impl Transport for Fake {
    fn name(&self) -> &str {
        "fake"
    }
    fn config(&self) -> &DeviceConfig {
        &self.config
    }
    fn window(&self) -> &SharedMemory {
        &self.window
    }
    fn doorbell(&self, queue: u16) {
        assert_eq!(queue, abi::QUEUE_CONTROL);
        self.answer();
    }
    fn interrupt_fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        None
    }
    fn check(&self) -> Result<(), TransportError> {
        Ok(())
    }
}

#[test]
fn commands_arrive_as_the_abi_says_and_are_answered() {
    let device = Fake::new(Device::Answers(abi::CTRL_OK));
    let mut ring = ControlRing::new(&device).unwrap();
    for _ in 0..20 {
        let fault = Command::Fault { vring: 3, kind: FaultKind::Unmapped, value: 0x1234 };
        for command in [attach(6, true), fault, Command::Detach] {
            ring.call(&device, command, PATIENCE).unwrap();
        }
    }
    let seen = device.seen.lock().unwrap();
    assert_eq!(seen.len(), 60);
    assert_eq!(seen[57], (abi::CTRL_ATTACH, 0, abi::ATTACH_F_INTERRUPT, 0, 6));
    assert_eq!(seen[58], (abi::CTRL_FAULT, 3, 0, FaultKind::Unmapped as u32, 0x1234));
    assert_eq!(seen[59], (abi::CTRL_DETACH, 0, 0, 0, 0));
}

#[test]
fn a_refusal_is_told_apart_from_silence() {
    let device = Fake::new(Device::Answers(abi::CTRL_STALE));
    let mut ring = ControlRing::new(&device).unwrap();
    let error = ring.call(&device, attach(2, false), PATIENCE).unwrap_err();
    assert!(matches!(error, ControlError::Refused { status: abi::CTRL_STALE, .. }));

    let device = Fake::new(Device::Silent);
    let mut ring = ControlRing::new(&device).unwrap();
    let short = Duration::from_millis(1);
    for _ in 0..SLOTS {
        let error = ring.call(&device, Command::Detach, short).unwrap_err();
        assert!(matches!(error, ControlError::Timeout { .. }));
    }
    // What the device has not given back is not used again.
    assert_eq!(ring.send(&device, Command::Detach), Err(ControlError::Full));
    // It wakes up at last: all are answered, and there is room.
    device.device.lock().unwrap().0 = Device::Answers(abi::CTRL_OK);
    device.answer();
    assert_eq!(ring.answers().unwrap().len(), SLOTS as usize);
    ring.call(&device, Command::Detach, PATIENCE).unwrap();
}

#[test]
fn a_device_that_breaks_the_ring_is_found_out() {
    let device = Fake::new(Device::ClaimsTooMuch);
    let mut ring = ControlRing::new(&device).unwrap();
    assert!(matches!(ring.call(&device, Command::Detach, PATIENCE), Err(ControlError::Ring(_))));
}

#[test]
fn another_control_area_is_noticed() {
    let device = Fake::new(Device::Answers(abi::CTRL_OK));
    let mut ring = ControlRing::new(&device).unwrap();
    for generation in 0..100 {
        ring.call(&device, attach(generation, false), PATIENCE).unwrap();
        assert!(ring.is_current(), "commands do not touch the mark");
    }
    device.window.zero(AREA, abi::CONTROL_LEN).unwrap();
    assert!(!ring.is_current());
}

#[test]
fn an_attachment_says_how_many_vectors_the_doorbell_function_has() {
    let attach = |doorbell| {
        let request =
            Command::Attach { generation: 4, interrupt: true, doorbell, quiesce: false, says_served: false }
                .to_abi();
        (request.flags.value(), request.value.value(), request.len.value())
    };
    assert_eq!(attach(None), (abi::ATTACH_F_INTERRUPT, 4, 0));
    assert_eq!(attach(Some(8)), (abi::ATTACH_F_INTERRUPT | abi::ATTACH_F_DOORBELL, 4, 8));
}

#[test]
fn a_driver_says_that_a_device_uses_the_window_and_that_it_let_go() {
    let attach = Command::Attach {
        generation: 4,
        interrupt: false,
        doorbell: None,
        quiesce: true,
        says_served: false,
    }
    .to_abi();
    assert_eq!(attach.flags.value(), abi::ATTACH_F_QUIESCE);
    let release = Command::Release { table: 10 }.to_abi();
    assert_eq!((release.command.value(), release.value.value()), (abi::CTRL_RELEASE, 10));
}
