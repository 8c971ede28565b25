//! The owner's driver against a device, or a peer, that writes what it likes into the owner's rings and
//! buffers. No packet is longer than one can be, and nobody gives back more than there was.
#![no_main]

use std::cell::RefCell;

use guest_driver_model::net::{MAX_FRAME, OwnerConfig, OwnerLayout, OwnerPort, PacketBurst};
use libfuzzer_sys::fuzz_target;
use vhost_pci_fuzz::input::Input;
use vhost_pci_fuzz::memory::Guarded;
use vhost_pci_fuzz::packets::{Spec, packets, tcp};
use vhost_pci_fuzz::scribbler::{scribble, words};

const LEN: usize = 128 << 10;
/// Where the owner's memory starts, as its device names it.
const IOVA: u64 = 0x40_0000_0000;
const STEPS: usize = 200;

thread_local! {
    static MEMORY: RefCell<Guarded> = RefCell::new(Guarded::new(LEN));
}

fuzz_target!(|bytes: &[u8]| {
    MEMORY.with_borrow_mut(|memory| {
        memory.clear();
        let mut input = Input::new(bytes);
        let bits = input.byte();
        let sizes = input.byte();
        let config = OwnerConfig {
            pairs: 1,
            ring_size: 1 << (sizes & 7).min(6),
            buffer_len: [128, 192, 1600, 256][usize::from(sizes >> 3 & 3)],
            mergeable: bits & 1 != 0,
            indirect: bits & 2 != 0,
            event_idx: bits & 4 != 0,
            packed: bits & 8 != 0,
            in_order: bits & 16 != 0,
            offloads: bits & 32 != 0,
        };
        let Ok(layout) = OwnerLayout::new(config, 0, LEN as u64) else { return };
        let mut port = OwnerPort::new(memory.memory(), &layout, IOVA).expect("it fits");
        let mut burst = PacketBurst::default();
        for _ in 0..STEPS {
            if input.is_empty() {
                return;
            }
            match input.byte() {
                0xf8.. => {
                    let scribbling = scribble(memory.memory(), words(&mut input, LEN as u64));
                    (0..4).for_each(|_| step(&mut port, &mut burst, &mut input));
                    drop(scribbling);
                }
                choice if choice & 1 == 0 => device_writes(memory, &layout, &mut input),
                _ => step(&mut port, &mut burst, &mut input),
            }
        }
    });
});

fn step(port: &mut OwnerPort, burst: &mut PacketBurst, input: &mut Input<'_>) {
    let choice = input.byte();
    match choice % 8 {
        0..=2 => {
            burst.clear();
            let budget = usize::from(choice >> 3);
            if let Ok(count) = port.rx_burst(0, burst, budget) {
                assert!(count == burst.len() && count <= budget);
            }
            assert!(burst.frames().all(|frame| frame.len() <= MAX_FRAME));
        }
        3 | 4 => {
            let mut packets = packets(input);
            if choice & 8 != 0 {
                packets.push(tcp(input));
            }
            if let Ok(count) = port.tx_burst(0, packets.iter().map(Spec::packet)) {
                assert!(count <= packets.len());
            }
        }
        5 => {
            let _ = port.reap_transmitted(0);
        }
        6 => {
            let _ = (port.needs_kick(u16::from(choice >> 3 & 3)), port.set_calls_for_room(0));
        }
        _ => {
            let _ = port.set_calls(u16::from(choice >> 3 & 1), choice & 0x80 != 0);
        }
    }
}

/// One store of the device's, mostly one that makes sense.
fn device_writes(memory: &mut Guarded, layout: &OwnerLayout, input: &mut Input<'_>) {
    let choice = input.byte();
    let vring = &layout.vrings()[usize::from(choice & 1)];
    let places = vring.places;
    let slot = u64::from(input.byte()) % u64::from(places.size);
    match choice >> 1 & 7 {
        // A used element, then the index.
        0 | 1 => {
            let (id, len) = (u32::from(input.byte()), u32::from(input.word()));
            let element = [id.to_le_bytes(), len.to_le_bytes()].concat();
            memory.put(places.used + 4 + 8 * slot, &element);
        }
        2 => memory.put(places.used + 2, &u16::from(input.byte()).to_le_bytes()),
        3 => memory.put(places.used + 2, &input.word().to_le_bytes()),
        // A used descriptor of a packed ring: length, id, flags.
        4 | 5 => {
            let (len, id) = (u32::from(input.word()), u16::from(input.byte()));
            let flags = input.pick(&[0x8080_u16, 0x8082, 0, 0x80, 0x8000]);
            let bytes = [&len.to_le_bytes()[..], &id.to_le_bytes(), &flags.to_le_bytes()].concat();
            memory.put(places.desc + 16 * slot + 8, &bytes);
        }
        // A packet's header.
        6 => {
            let buffer = vring.buffers + slot * 64 * u64::from(1 + input.byte() % 25);
            let mut header = [0; 12];
            let given = input.bytes(12);
            header[..given.len()].copy_from_slice(given);
            memory.put(buffer + 52, &header);
        }
        _ => {
            let at = u64::from(input.word()) * 2;
            memory.put(at, input.bytes(16));
        }
    }
}
