//! The card's own registers, and memory that is taken away while it works.

use std::time::{Duration, Instant};

use super::Done;
use super::chains::{end_of_reach, nowhere};
use crate::link::VringInfo;
use crate::net::transmit_vring;
use crate::programs::hostile::owner::Rig;
use crate::transport::bare::REACHED_LEN;
use crate::transport::virtio_pci::Registers;

pub fn unmapped_in_flight(rig: &mut Rig, _: u16) -> Done {
    for _ in 0..4 {
        rig.fresh()?;
        rig.start()?;
        for _ in 0..4 {
            rig.bait();
            rig.kick();
        }
        let Rig { bare, reached, .. } = rig;
        bare.unmap(reached);
        bare.map(reached)?;
        rig.bait();
        rig.kick();
    }
    rig.dwell();
    Ok(())
}

fn for_a_while(millis: u64, mut strike: impl FnMut()) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(millis) {
        (0..64).for_each(|_| strike());
    }
}

pub fn kick_loop(rig: &mut Rig, _: u16) -> Done {
    rig.start()?;
    rig.bait();
    for_a_while(500, || rig.bare.kick(transmit_vring(0)));
    rig.dwell();
    Ok(())
}

pub fn kicks_of_no_queue(rig: &mut Rig, _: u16) -> Done {
    rig.start()?;
    let (mut random, len) = (rig.random.clone(), rig.bare.notify_len());
    for_a_while(200, || {
        let (at, value) = (random.below(len), random.word());
        match random.below(3) {
            0 => rig.bare.notify().write8(at, value as u8),
            1 => rig.bare.notify().write16(at & !1, value as u16),
            _ => rig.bare.notify().write32(at & !3, value as u32),
        }
    });
    rig.dwell();
    Ok(())
}

pub fn queue_addresses(rig: &mut Rig, _: u16) -> Done {
    for _ in 0..6 {
        rig.fresh()?;
        let mut infos = rig.infos();
        let (bus, unmapped) = (rig.reached.bus, nowhere(rig));
        let end = end_of_reach(rig);
        for info in &mut infos {
            let VringInfo { desc, avail, used, .. } = info;
            for (place, align) in [(desc, 16), (avail, 2), (used, 4)] {
                let bad = match rig.random.below(5) {
                    0 if rig.bare.is_behind_iommu() => rig.random.word(),
                    0 => rig.random.number() | 1 << 40,
                    1 => unmapped,
                    2 => end - 16,
                    3 => bus + rig.random.below(REACHED_LEN / 2),
                    _ => *place,
                };
                // One that is not aligned, or not in a memory that is shared, costs the VMM its connection.
                *place = if rig.random.below(8) == 0 { bad } else { bad & !(align - 1) };
            }
        }
        rig.start_with(rig.features(), &infos);
        rig.bait();
        rig.dwell();
    }
    Ok(())
}

pub fn queue_sizes(rig: &mut Rig, _: u16) -> Done {
    for size in [0, 1, 2, 3, 100, 255, 257, 1 << 15, 0xffff] {
        rig.fresh()?;
        let infos: Vec<_> = rig.infos().into_iter().map(|info| VringInfo { size, ..info }).collect();
        rig.start_with(rig.features(), &infos);
        rig.bait();
        rig.dwell();
    }
    Ok(())
}

pub fn features(rig: &mut Rig, _: u16) -> Done {
    let good = rig.features();
    for bits in [u64::MAX, 0, 1, good & !(1 << 32), good | 1 << 63, rig.random.number(), rig.random.number()]
    {
        rig.fresh()?;
        rig.bare.negotiate_blindly(bits);
        let infos = rig.infos();
        rig.bare.queues_blindly(&infos);
        rig.bait();
        rig.dwell();
    }
    Ok(())
}

pub fn reset_in_flight(rig: &mut Rig, _: u16) -> Done {
    for _ in 0..10 {
        rig.fresh()?;
        rig.start()?;
        for _ in 0..4 {
            rig.bait();
            rig.kick();
        }
        let micros = rig.random.below(3000);
        std::thread::sleep(Duration::from_micros(micros));
    }
    Ok(())
}

pub fn status_out_of_order(rig: &mut Rig, _: u16) -> Done {
    let infos = rig.infos();
    for _ in 0..30 {
        let status = rig.random.number() as u8;
        rig.bare.set_status(status);
        if rig.random.below(4) == 0 {
            rig.bare.queues_blindly(&infos);
        }
        rig.kick();
    }
    rig.dwell();
    Ok(())
}

pub fn config_written(rig: &mut Rig, _: u16) -> Done {
    rig.start()?;
    let mut random = rig.random.clone();
    for_a_while(100, || {
        let (at, value) = (random.below(64), random.word());
        let device = random.below(2) == 0;
        let width = random.below(3);
        if device {
            write(rig.bare.device(), width, at, value);
        } else {
            write(rig.bare.common(), width, at, value);
        }
    });
    rig.dwell();
    Ok(())
}

/// Writes a register's byte, half or word.
pub fn write(registers: &impl Registers, width: u64, at: u64, value: u64) {
    match width {
        0 => registers.write8(at, value as u8),
        1 => registers.write16(at & !1, value as u16),
        _ => registers.write32(at & !3, value as u32),
    }
}

pub fn config_space_written(rig: &mut Rig, _: u16) -> Done {
    rig.start()?;
    rig.bait();
    let kept = rig.bare.keep_config_space();
    for _ in 0..200 {
        let (at, value) = (4 + rig.random.below(252), rig.random.word());
        rig.bare.write_config_space(at, &value.to_le_bytes()[..1 + at as usize % 2]).ok();
    }
    rig.bare.restore_config_space(&kept);
    rig.dwell();
    Ok(())
}
