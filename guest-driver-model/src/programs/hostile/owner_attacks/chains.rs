//! What descriptors can say that they must not.

use std::time::Duration;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_WRITE};

use super::Done;
use crate::programs::hostile::forge::{NEXT, Piece};
use crate::programs::hostile::owner::Rig;
use crate::ring::layout::DESC_LEN;
use crate::transport::bare::REACHED_LEN;

const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

pub fn chain_loop(rig: &mut Rig, vring: u16) -> Done {
    let good = rig.good(vring);
    let back = rig.random.below(3) as u16;
    rig.offer(vring, |_, forge| Ok(forge.chain(&[good, good, Piece { next: Some(back), ..good }])?))
}

pub fn chain_endless(rig: &mut Rig, vring: u16) -> Done {
    let endless = Piece { flags: rig.good(vring).flags | NEXT, len: 16, ..rig.good(vring) };
    rig.offer(vring, |_, forge| Ok(forge.chain(&vec![endless; forge.size().into()])?))
}

pub fn next_outside(rig: &mut Rig, vring: u16) -> Done {
    let good = rig.good(vring);
    let far = rig.random.below(60_000) as u16;
    rig.offer(vring, |_, forge| {
        let next = Some(forge.size() + far);
        Ok(forge.chain(&[good, Piece { next, ..good }])?)
    })
}

pub fn head_outside(rig: &mut Rig, vring: u16) -> Done {
    let far = rig.random.below(60_000) as u16;
    rig.offer(vring, |_, forge| Ok(forge.head(forge.size() + far)?))
}

pub fn id_outside(rig: &mut Rig, vring: u16) -> Done {
    let good = rig.good(vring);
    let far = rig.random.below(60_000) as u16;
    rig.offer(vring, |_, forge| Ok(forge.chain(&[Piece { next: Some(forge.size() + far), ..good }])?))
}

pub fn avail_jumps(rig: &mut Rig, vring: u16) -> Done {
    let far = rig.random.below(60_000) as u16;
    rig.offer(vring, |_, forge| Ok(forge.available(forge.size() + 1 + far)?))
}

pub fn avail_back_and_forth(rig: &mut Rig, vring: u16) -> Done {
    rig.start()?;
    let Some(forge) = rig.forge(vring) else { return Ok(()) };
    for _ in 0..20 {
        rig.bait();
        let index = rig.random.below(2 * u64::from(forge.size())) as u16;
        forge.available(index.wrapping_sub(forge.size()))?;
        rig.kick();
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.dwell();
    Ok(())
}

/// A piece that says that the table is there, of so many bytes.
pub fn table(rig: &Rig, len: u32) -> Piece {
    Piece { addr: rig.spare().1, len, flags: INDIRECT, next: None }
}

pub fn indirect_nested(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    rig.offer(vring, |rig, forge| {
        let inner = Piece { addr: at.1 + 0x1000, len: 2 * DESC_LEN, flags: INDIRECT, next: None };
        forge.table(at.0, &[good, inner, good])?;
        forge.table(at.0 + 0x1000, &[good, good])?;
        Ok(forge.chain(&[table(rig, 3 * DESC_LEN)])?)
    })
}

pub fn indirect_with_next(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    rig.offer(vring, |rig, forge| {
        forge.table(at.0, &[good, good])?;
        Ok(forge.chain(&[table(rig, 2 * DESC_LEN), good])?)
    })
}

pub fn indirect_odd_length(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    let len = rig.random.one(&[0, 1, 15, 17, 40, 0xffff], 0);
    rig.offer(vring, |rig, forge| {
        forge.table(at.0, &[good, good, good])?;
        Ok(forge.chain(&[table(rig, len)])?)
    })
}

pub fn indirect_huge(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    let len = rig.random.one(&[0xffff_fff0, 0x8000_0000, 0x10_0000], 0xffff_fff0);
    rig.offer(vring, |rig, forge| {
        forge.table(at.0, &[good; 200])?;
        Ok(forge.chain(&[table(rig, len)])?)
    })
}

pub fn indirect_loop(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    rig.offer(vring, |rig, forge| {
        forge.table(at.0, &[good, good, Piece { next: Some(0), ..good }])?;
        Ok(forge.chain(&[table(rig, 3 * DESC_LEN)])?)
    })
}

pub fn indirect_next_outside(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    let next = Some(3 + rig.random.below(60_000) as u16);
    rig.offer(vring, |rig, forge| {
        forge.table(at.0, &[good, good, Piece { next, ..good }])?;
        Ok(forge.chain(&[table(rig, 3 * DESC_LEN)])?)
    })
}

pub fn indirect_nowhere(rig: &mut Rig, vring: u16) -> Done {
    let addr = nowhere(rig);
    rig.offer(vring, |_, forge| {
        Ok(forge.chain(&[Piece { addr, len: 3 * DESC_LEN, flags: INDIRECT, next: None }])?)
    })
}

/// An address at which there is no memory.
pub fn nowhere(rig: &mut Rig) -> u64 {
    let high = rig.random.number() | 1 << 62;
    rig.random.one(&[0xfee0_0000, 0xf000_0000_0000, high & !(1 << 63), 1 << 46], 1 << 46)
}

pub fn address_nowhere(rig: &mut Rig, vring: u16) -> Done {
    let good = Piece { addr: nowhere(rig), ..rig.good(vring) };
    rig.offer(vring, |_, forge| Ok(forge.chain(&[good])?))
}

pub fn address_wraps(rig: &mut Rig, vring: u16) -> Done {
    let addr = u64::MAX - rig.random.below(200);
    let good = Piece { addr, len: 4096, ..rig.good(vring) };
    rig.offer(vring, |_, forge| Ok(forge.chain(&[good])?))
}

/// Where what the card reaches ends: behind an IOMMU the rig's own memory, without one the guest's, below
/// the hole for devices.
pub fn end_of_reach(rig: &Rig) -> u64 {
    if rig.bare.is_behind_iommu() {
        return rig.reached.bus + REACHED_LEN;
    }
    let text = std::fs::read_to_string("/proc/iomem").unwrap_or_default();
    let ends = text
        .lines()
        .filter(|line| line.ends_with("System RAM"))
        .filter_map(|line| u64::from_str_radix(line.split_whitespace().next()?.split_once('-')?.1, 16).ok());
    ends.filter(|end| *end < 1 << 31).max().unwrap_or(0).next_multiple_of(16 << 20)
}

pub fn across_the_end(rig: &mut Rig, vring: u16) -> Done {
    let (good, end) = (rig.good(vring), end_of_reach(rig));
    let inside = 12 + rig.random.below(200);
    rig.offer(vring, |_, forge| Ok(forge.chain(&[Piece { addr: end - inside, len: 1500, ..good }])?))
}

pub fn length_0(rig: &mut Rig, vring: u16) -> Done {
    let good = Piece { len: 0, ..rig.good(vring) };
    rig.offer(vring, |_, forge| Ok(forge.chain(&[good])?))
}

pub fn length_4_gib(rig: &mut Rig, vring: u16) -> Done {
    let good = Piece { len: u32::MAX - rig.random.below(2) as u32, ..rig.good(vring) };
    rig.offer(vring, |_, forge| Ok(forge.chain(&[good, good])?))
}

pub fn wrong_direction(rig: &mut Rig, vring: u16) -> Done {
    let good = rig.good(vring);
    rig.offer(vring, |_, forge| Ok(forge.chain(&[Piece { flags: good.flags ^ WRITE, ..good }])?))
}

pub fn readable_after_writable(rig: &mut Rig, vring: u16) -> Done {
    let good = rig.good(vring);
    let mixed = [Piece { flags: WRITE, ..good }, Piece { flags: 0, ..good }];
    rig.offer(vring, |_, forge| Ok(forge.chain(&mixed)?))
}

pub fn headers(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare().0 + 0x8000);
    rig.offer(vring, |rig, forge| {
        for chain in 0..u64::from(forge.size()) {
            let start = at + 256 * chain;
            for _ in 0..16 {
                rig.random.scribble(&rig.reached.memory, (start, 64), &[])?;
            }
            forge.chain(&[Piece { addr: good.addr + 256 * chain, ..good }])?;
        }
        Ok(())
    })
}
