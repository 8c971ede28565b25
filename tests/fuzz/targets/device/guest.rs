//! What a guest does to registers and configuration space, and what they are in any case.

use vhost_pci_device::Device;
use vhost_pci_fuzz::input::Input;

use crate::support::Bench;

/// Common configuration: offset and width of each register.
const COMMON: [(u64, usize); 19] = [
    (0, 4),
    (4, 4),
    (8, 4),
    (12, 4),
    (16, 2),
    (18, 2),
    (20, 1),
    (21, 1),
    (22, 2),
    (24, 2),
    (26, 2),
    (28, 2),
    (30, 2),
    (32, 4),
    (36, 4),
    (40, 4),
    (44, 4),
    (48, 4),
    (52, 4),
];
/// The structures of BAR 0, and what is behind them.
const STRUCTURES: [u64; 8] = [0, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x8000];
const MSIX_TABLE: u64 = 0x4000;
/// Where the BARs' registers are, and their lengths' low bits.
const BARS: [u16; 2] = [0x10, 0x18];
const COMMAND_MEMORY: u8 = 2;

/// One access, mostly one that makes sense.
pub fn access(device: &Device, choice: u8, input: &mut Input<'_>) {
    match choice / 7 % 9 {
        0 => {
            let (offset, width) = COMMON[input.below(COMMON.len() as u64) as usize];
            let value = value(input);
            device.bar_write(0, offset, &value.to_le_bytes()[..width]);
        }
        1 => {
            let at = MSIX_TABLE + 16 * input.below(6) + 4 * input.below(4);
            device.bar_write(0, at, &value(input).to_le_bytes()[..4]);
        }
        2 => {
            let (bar, offset) = (bar(input), offset(input));
            device.bar_write(bar, offset, &bytes(input));
        }
        3 => {
            let (bar, offset) = (bar(input), offset(input));
            let mut data = vec![0xa5; usize::from(input.byte())];
            device.bar_read(bar, offset, &mut data);
        }
        4 => device.config_write(input.word() & 0x1ff, &bytes(input)),
        5 => {
            let mut data = vec![0xa5; usize::from(input.byte())];
            device.config_read(input.word() & 0x1ff, &mut data);
        }
        // The command register, and that of MSI-X.
        6 => match input.byte() {
            few @ 0..0xc0 => device.config_write(4, &[few & 7, 4]),
            flags => device.config_write(0x42, &[0, flags << 6]),
        },
        // A BAR.
        7 => {
            let at = 0x10 + 4 * (input.below(4) as u16);
            let half = match input.byte() % 6 {
                0 => u32::MAX,
                1 => 0xe000_0000,
                2 => 0x10,
                3 => 0,
                4 => u32::from(input.byte()) << 24,
                _ => input.double(),
            };
            device.config_write(at, &half.to_le_bytes());
        }
        // By the access window in configuration space (virtio 1.3, 4.1.4.9).
        _ => {
            let Some(window) = capability(device, |bytes| bytes[0] == 9 && bytes[3] == 5) else { return };
            device.config_write(window + 4, &[input.below(4) as u8]);
            device.config_write(window + 8, &(offset(input) as u32).to_le_bytes());
            device.config_write(window + 12, &input.pick(&[1_u32, 2, 4, 4, 3, 0, 8, u32::MAX]).to_le_bytes());
            if input.coin() {
                device.config_write(window + 16, &value(input).to_le_bytes()[..4]);
            } else {
                device.config_read(window + 16, &mut [0; 4]);
            }
        }
    }
}

/// Mostly that of the registers.
fn bar(input: &mut Input<'_>) -> u8 {
    match input.byte() {
        0..0xd0 => 0,
        other => other % 8,
    }
}

fn value(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        few @ 0..0xc0 => u64::from(few),
        0xc0..0xd0 => 0xffff,
        0xd0..0xe0 => 0xfee0_1000,
        0xe0..0xf0 => 1 << input.below(64),
        _ => input.quad(),
    }
}

fn offset(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        choice @ 0..0xe0 => {
            let within = if choice & 8 == 0 { 0 } else { u64::from(input.byte()) };
            STRUCTURES[usize::from(choice) % STRUCTURES.len()] + within
        }
        choice @ 0xe0..0xf0 => STRUCTURES[usize::from(choice) % STRUCTURES.len()].wrapping_sub(2),
        _ => input.field(0),
    }
}

/// Of a width that is one, or of any.
fn bytes(input: &mut Input<'_>) -> Vec<u8> {
    let choice = input.byte();
    match choice % 6 {
        width @ 0..4 => value(input).to_le_bytes()[..1 << width].to_vec(),
        4 => vec![choice; usize::from(input.byte())],
        _ => input.bytes(80).to_vec(),
    }
}

/// The first capability that is so.
fn capability(device: &Device, is: impl Fn(&[u8; 8]) -> bool) -> Option<u16> {
    let mut pointer = [0];
    device.config_read(0x34, &mut pointer);
    for _ in 0..64 {
        if pointer[0] == 0 {
            return None;
        }
        let mut bytes = [0; 8];
        device.config_read(pointer[0].into(), &mut bytes);
        if is(&bytes) {
            return Some(pointer[0].into());
        }
        pointer[0] = bytes[1];
    }
    panic!("the list of capabilities has no end")
}

/// What no guest changes of configuration space.
pub struct Identity {
    bytes: [u8; 256],
    writable: Vec<u16>,
}

impl Identity {
    /// Of a device that nobody has touched.
    pub fn of(device: &Device) -> Self {
        let mut bytes = [0; 256];
        device.config_read(0, &mut bytes);
        let at = |is: &dyn Fn(&[u8; 8]) -> bool| capability(device, is).expect("a capability");
        let msix = at(&|bytes| bytes[0] == 0x11);
        let express = at(&|bytes| bytes[0] == 0x10);
        let window = at(&|bytes| bytes[0] == 9 && bytes[3] == 5);
        let mut writable = vec![4, 5, 0x3c, msix + 2, msix + 3, express + 8, express + 9, window + 4];
        writable.extend((0x10..0x20).chain(window + 8..window + 20));
        Self { bytes, writable }
    }

    /// It is what it was; and what is in force at the hypervisor is what the registers say.
    pub fn check(&self, bench: &Bench) {
        let mut now = [0; 256];
        bench.guest.device.config_read(0, &mut now);
        for (at, (before, now)) in self.bytes.iter().zip(&now).enumerate() {
            assert!(self.writable.contains(&(at as u16)) || before == now, "{at:#x} has become {now:#x}");
        }
        let decodes = now[4] & COMMAND_MEMORY != 0;
        let bars = bench.guest.device.bars();
        let address = |at: u16| u64::from_le_bytes(std::array::from_fn(|byte| now[usize::from(at) + byte]));
        for (bar, at) in bars.iter().zip(BARS) {
            let kind = if bar.prefetchable { 0xc } else { 4 };
            assert_eq!(address(at) & (bar.len - 1), kind, "what is no address of BAR {}", bar.bar);
        }
        let traps = bench.vmm.traps();
        for trap in &traps {
            let index = bars.iter().position(|bar| bar.bar == trap.bar).expect("a BAR of the device");
            assert!(decodes && trap.address.0 == address(BARS[index]) & !0xf, "{trap:?}");
            assert_eq!(trap.len, bars[index].len);
        }
        let slots = bench.vmm.slots();
        let window = traps.iter().find(|trap| trap.bar == 2);
        assert_eq!(slots.len(), if window.is_some() { 3 } else { 0 });
        let mut next = window.map_or(0, |trap| trap.address.0);
        for (slot, read_only) in slots.iter().zip([true, false, true]) {
            assert_eq!((slot.address.0, slot.read_only), (next, read_only));
            next += slot.len;
        }
        let (irqfds, ioeventfds) = bench.vmm.registered();
        let live = bench.guest.device.snapshot().live;
        assert!(live || (irqfds, ioeventfds) == (0, 0), "{irqfds} {ioeventfds} of a device that is not live");
        assert!(ioeventfds == 0 || traps.iter().any(|trap| trap.bar == 0), "notifications of no place");
    }
}
