//! What a hostile peer does to its device, to the window and to the owner's rings, attack by attack.

use std::time::Duration;

use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

use super::forge::{Forge, Piece};
use super::owner_attacks::write;
use super::peer::Rig;
use crate::link::LinkSnapshot;
use crate::programs::ProgramError;
use crate::ring::layout::DESC_LEN;
use crate::transport::TransportError;
use crate::transport::virtio_pci::config_space::{COMMAND, COMMAND_MASTER, COMMAND_MEMORY};

type Done = Result<(), ProgramError>;

/// One way not to behave.
pub struct PeerAttack {
    /// Its name.
    pub name: &'static str,
    /// Does it, with a device that is started and a link that is up.
    pub run: fn(&mut Rig, &LinkSnapshot) -> Done,
}

const fn attack(name: &'static str, run: fn(&mut Rig, &LinkSnapshot) -> Done) -> PeerAttack {
    PeerAttack { name, run }
}

/// All of them.
pub const ATTACKS: &[PeerAttack] = &[
    attack("link-page-written", link_page),
    attack("witness-written", witness),
    attack("window-written", whole_window),
    attack("used-rings-written", used_rings),
    attack("used-index-jumps", used_index),
    attack("rings-rewritten", rings),
    attack("control-ring-written", control_ring),
    attack("commands", commands),
    attack("denied-storm", denied),
    attack("doorbell-loop", doorbells),
    attack("doorbells-of-no-queue", no_doorbells),
    attack("registers-written", registers),
    attack("status-out-of-order", status),
    attack("reset-in-flight", resets),
    attack("function-reset-in-flight", function_resets),
    attack("config-space-written", config_space),
    attack("decoding-off-and-on", decoding),
    attack("bars-moved", bars),
];

fn link_page(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    let area = (rig.config.link_offset.value(), rig.config.link_len.value());
    rig.for_a_while(|rig| rig.scribble(&[area, (area.0, 64)], &[]));
    Ok(())
}

fn witness(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    let start = rig.config.control_offset.value() + rig.config.control_len.value();
    let area = (start, rig.config.data_offset.value() - start);
    rig.for_a_while(|rig| rig.scribble(&[area, (start, 3 * 4096)], &[]));
    Ok(())
}

fn whole_window(rig: &mut Rig, link: &LinkSnapshot) -> Done {
    let mut ranges: Vec<_> =
        link.mappings.iter().map(|mapping| (mapping.window_offset, mapping.len)).collect();
    ranges.push((0, rig.window.len()));
    rig.for_a_while(|rig| {
        rig.scribble(&ranges, &[]);
        let queue = 1 + rig.random.below(4) as u16;
        rig.bare.kick(queue);
    });
    Ok(())
}

/// The ranges that the device's side of the owner's rings writes.
fn used(rig: &Rig, link: &LinkSnapshot) -> Vec<(u64, u64)> {
    let rings = rig.rings(link).into_iter();
    rings
        .map(|(places, packed)| match packed {
            true => (places.desc, u64::from(DESC_LEN) * u64::from(places.size)),
            false => (places.used, 6 + 8 * u64::from(places.size)),
        })
        .collect()
}

fn call_all(rig: &Rig, link: &LinkSnapshot) {
    (0..link.vrings.len() as u16).for_each(|vring| rig.bare.kick(1 + vring));
}

fn used_rings(rig: &mut Rig, link: &LinkSnapshot) -> Done {
    let ranges = used(rig, link);
    rig.for_a_while(|rig| rig.scribble(&ranges, &[]));
    call_all(rig, link);
    std::thread::sleep(Duration::from_millis(50));
    Ok(())
}

fn used_index(rig: &mut Rig, link: &LinkSnapshot) -> Done {
    let rings = rig.rings(link);
    rig.for_a_while(|rig| {
        for (places, packed) in &rings {
            let value = rig.random.word() as u16;
            // The index of a split ring; a length, id and flags of a packed one, and the device's events.
            let at = match packed {
                true if rig.random.below(2) == 0 => places.used + 2 * rig.random.below(2),
                true => places.desc + 16 * rig.random.below(places.size.into()) + 8 + 2 * rig.random.below(4),
                false => places.used + 2,
            };
            let _ = rig.window.store_u16(at, value);
        }
        call_all(rig, link);
        std::thread::sleep(Duration::from_micros(200));
    });
    Ok(())
}

fn rings(rig: &mut Rig, link: &LinkSnapshot) -> Done {
    let mut ranges = used(rig, link);
    for (places, packed) in rig.rings(link) {
        let size = u64::from(places.size);
        ranges.push((places.desc, u64::from(DESC_LEN) * size));
        ranges.push((places.avail, if packed { 4 } else { 6 + 2 * size }));
        ranges.push((places.used, 4));
    }
    rig.for_a_while(|rig| rig.scribble(&ranges, &[]));
    call_all(rig, link);
    std::thread::sleep(Duration::from_millis(50));
    Ok(())
}

fn control_ring(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    let (start, len) = (rig.config.control_offset.value(), rig.config.control_len.value());
    let addresses = [start, start + 2048, start + len, 0];
    rig.for_a_while(|rig| {
        rig.scribble(&[(start, 2048), (start, 2048), (start, len)], &addresses);
        if rig.random.below(8) == 0 {
            rig.bare.kick(0);
        }
    });
    Ok(())
}

/// A command as section 9 has it: command, vring, flags, kind, value and length.
fn command(rig: &mut Rig, at: u64, link: &LinkSnapshot) -> Done {
    let (random, window) = (&mut rig.random, &rig.window);
    let iova = match random.below(4) {
        0 => link.mappings.first().map_or(0, |mapping| mapping.iova),
        1 => random.word(),
        _ => random.below(1 << 32),
    };
    let value = if random.below(3) == 0 { link.generation } else { iova };
    window.store_u16(at, random.below(8) as u16)?;
    window.store_u16(at + 2, random.word() as u16)?;
    window.store_u32(at + 4, random.word() as u32)?;
    window.store_u32(at + 8, random.word() as u32)?;
    window.store_u32(at + 12, 0)?;
    window.store_u64(at + 16, value)?;
    Ok(window.store_u64(at + 24, random.word())?)
}

/// Sends commands, each in the next descriptors of the control ring.
fn send(rig: &mut Rig, mut make: impl FnMut(&mut Rig, u64) -> Done) -> Done {
    let places = rig.control_ring();
    let buffers = rig.config.control_offset.value() + 2048;
    // The mark, without which the ring is not ours.
    let end = rig.config.control_offset.value() + rig.config.control_len.value();
    rig.window.store_u64(end - 8, 1)?;
    let mut forge = Forge::new(&rig.window, places, false, 0);
    let mut nth = 0;
    let mut result = Ok(());
    rig.for_a_while(|rig| {
        let at = buffers + nth % 16 * 4096;
        nth += 1;
        let data = rig.random.below(4096) as u32;
        let pieces = [
            Piece { addr: at, len: 32, ..Piece::default() },
            Piece { addr: at + 64, len: 8 + data, flags: VRING_DESC_F_WRITE as u16, next: None },
        ];
        let sent = make(rig, at).and_then(|()| Ok(forge.chain(&pieces)?));
        if let Err(error) = sent {
            result = Err(error);
        }
        if nth % 8 == 0 {
            rig.bare.kick(0);
            // Answers take their time; who does not wait overruns the ring, which is another attack.
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    result
}

fn commands(rig: &mut Rig, link: &LinkSnapshot) -> Done {
    send(rig, |rig, at| command(rig, at, link))
}

fn denied(rig: &mut Rig, link: &LinkSnapshot) -> Done {
    let mut attached = false;
    send(rig, |rig, at| {
        command(rig, at, link)?;
        let (number, value) = match std::mem::replace(&mut attached, true) {
            false => (1, link.generation),
            true => (4 + rig.random.below(3) as u16, rig.random.below(1 << 36)),
        };
        rig.window.store_u16(at, number)?;
        rig.window.store_u32(at + 4, u32::from(number == 4) * 3)?;
        rig.window.store_u64(at + 16, value)?;
        Ok(rig.window.store_u64(at + 24, 64)?)
    })
}

fn doorbells(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    let queues = u64::from(rig.config.max_vrings.value()) + 1;
    rig.for_a_while(|rig| {
        let queue = rig.random.below(queues) as u16;
        rig.bare.kick(queue);
    });
    Ok(())
}

fn no_doorbells(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    rig.for_a_while(|rig| {
        let at = rig.random.below(rig.bare.notify_len());
        let (width, value) = (rig.random.below(3), rig.random.word());
        write(rig.bare.notify(), width, at, value);
    });
    Ok(())
}

fn registers(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    rig.for_a_while(|rig| {
        let (width, value, at) = (rig.random.below(3), rig.random.word(), rig.random.below(64));
        match rig.random.below(4) {
            0 => write(rig.bare.device(), width, at, value),
            // The status is an attack of its own.
            _ if at == 20 => {}
            _ => write(rig.bare.common(), width, at, value),
        }
    });
    Ok(())
}

fn status(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    for _ in 0..20 {
        let status = rig.random.number() as u8;
        rig.bare.set_status(status);
        let micros = rig.random.below(2000);
        std::thread::sleep(Duration::from_micros(micros));
        rig.bare.kick(0);
    }
    Ok(())
}

fn again(rig: &mut Rig) -> Done {
    let address = "the device".to_owned();
    let started = rig.bare.start_device(&rig.reached);
    started.map_err(|source| TransportError::Init { address, source }.into())
}

fn resets(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    for _ in 0..10 {
        let micros = rig.random.below(20_000);
        std::thread::sleep(Duration::from_micros(micros));
        rig.bare.set_status(0);
        again(rig)?;
    }
    Ok(())
}

fn function_resets(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    for _ in 0..3 {
        let kept = rig.bare.keep_config_space();
        // What the system answers changes nothing.
        let _ = rig.bare.reset_function();
        rig.bare.restore_config_space(&kept);
        again(rig)?;
    }
    Ok(())
}

fn config_space(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    rig.for_a_while(|rig| {
        // Not the BARs, which are an attack of their own.
        let at = match rig.random.below(2) {
            0 => 4 + rig.random.below(12),
            _ => 0x28 + rig.random.below(0xd0),
        };
        let bytes = rig.random.word().to_le_bytes();
        let _ = rig.bare.write_config_space(at, bytes.get(..1).unwrap_or_default());
    });
    Ok(())
}

fn decoding(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    let kept = rig.bare.keep_config_space();
    let both = COMMAND_MEMORY | COMMAND_MASTER;
    for without in [COMMAND_MEMORY, COMMAND_MASTER, both, COMMAND_MEMORY] {
        let command = u16::from_le_bytes([kept[4], kept[5]]) & !without;
        let _ = rig.bare.write_config_space(COMMAND.into(), &command.to_le_bytes());
        // Nobody answers, or everybody does.
        let window = rig.window.clone();
        for _ in 0..200 {
            let _ = rig.random.scribble(&window, (0, 320 << 10), &[]);
            rig.bare.kick(1);
        }
        rig.bare.restore_config_space(&kept);
    }
    Ok(())
}

fn bars(rig: &mut Rig, _: &LinkSnapshot) -> Done {
    let kept = rig.bare.keep_config_space();
    for _ in 0..4 {
        for bar in 0..6 {
            let place = rig.random.one(&[0, 0xffff_ffff, 0xfe00_0000, 0x8000_0000, 1 << 20], 0);
            let _ = rig.bare.write_config_space(0x10 + 4 * bar, &u32::to_le_bytes(place));
            let window = rig.window.clone();
            for _ in 0..20 {
                let _ = rig.random.scribble(&window, (0, 64 << 10), &[]);
            }
        }
        rig.bare.restore_config_space(&kept);
    }
    Ok(())
}
