//! What a hostile owner does to its rings and to its card, attack by attack.

use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_WRITE};

use super::forge::{NEXT, Piece};
use super::owner::Rig;
use crate::link::VringInfo;
use crate::net::{receive_vring, transmit_vring};
use crate::programs::ProgramError;
use crate::ring::layout::DESC_LEN;
use crate::transport::bare::REACHED_LEN;
use crate::transport::virtio_pci::Registers;

const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

type Done = Result<(), ProgramError>;

/// One way not to behave.
pub struct OwnerAttack {
    /// Its name.
    pub name: &'static str,
    /// Which formats it is for.
    pub formats: Formats,
    /// Faults of a ring, as `status` counts them, one of which the peer's driver has to find; none: it need not.
    pub faults: &'static [&'static str],
    /// It is not about one of the rings.
    pub once: bool,
    /// Does it, with a card that was reset and fresh rings, to one of the rings.
    pub run: fn(&mut Rig, u16) -> Done,
}

/// Formats of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Formats {
    /// Split rings only.
    Split,
    /// Packed rings only.
    Packed,
    /// Either.
    Both,
}

impl OwnerAttack {
    /// Whether it can be made on this format, and if on both, whether it is this one's turn.
    pub fn is_in_turn(&self, packed: bool, turn: bool) -> bool {
        match self.formats {
            Formats::Split => !packed,
            Formats::Packed => packed,
            Formats::Both => packed == turn,
        }
    }
}

const fn ring(
    name: &'static str,
    formats: Formats,
    faults: &'static [&'static str],
    run: fn(&mut Rig, u16) -> Done,
) -> OwnerAttack {
    OwnerAttack { name, formats, faults, once: false, run }
}

const fn card(name: &'static str, run: fn(&mut Rig, u16) -> Done) -> OwnerAttack {
    OwnerAttack { name, formats: Formats::Both, faults: &[], once: true, run }
}

const NOT_THERE: &[&str] = &["ring_unmapped", "ring_access"];
const TOO_LONG: &[&str] = &["ring_length", "ring_chain_too_long", "ring_unmapped", "ring_access"];

/// All of them.
pub const ATTACKS: &[OwnerAttack] = &[
    ring("chain-loop", Formats::Split, &["ring_chain_too_long"], chain_loop),
    ring("chain-endless", Formats::Packed, &["ring_chain_too_long"], chain_endless),
    ring("next-outside", Formats::Split, &["ring_descriptor_index"], next_outside),
    ring("head-outside", Formats::Split, &["ring_descriptor_index"], head_outside),
    ring("id-outside", Formats::Packed, &["ring_descriptor_index"], id_outside),
    ring("avail-jumps", Formats::Split, &["ring_avail_jump"], avail_jumps),
    ring("avail-back-and-forth", Formats::Split, &[], avail_back_and_forth),
    ring("indirect-nested", Formats::Both, &["ring_indirect"], indirect_nested),
    ring("indirect-with-next", Formats::Both, &["ring_indirect"], indirect_with_next),
    ring("indirect-odd-length", Formats::Both, &["ring_indirect"], indirect_odd_length),
    ring("indirect-huge", Formats::Both, &["ring_indirect", "ring_unmapped", "ring_access"], indirect_huge),
    ring("indirect-loop", Formats::Split, &["ring_chain_too_long"], indirect_loop),
    ring("indirect-next-outside", Formats::Split, &["ring_descriptor_index"], indirect_next_outside),
    ring("indirect-nowhere", Formats::Both, NOT_THERE, indirect_nowhere),
    ring("address-nowhere", Formats::Both, NOT_THERE, address_nowhere),
    ring("address-wraps", Formats::Both, NOT_THERE, address_wraps),
    ring("across-the-end", Formats::Both, NOT_THERE, across_the_end),
    ring("length-0", Formats::Both, &["ring_length"], length_0),
    ring("length-4-GiB", Formats::Both, TOO_LONG, length_4_gib),
    ring("wrong-direction", Formats::Both, &["ring_direction"], wrong_direction),
    ring("readable-after-writable", Formats::Both, &["ring_direction"], readable_after_writable),
    ring("headers", Formats::Both, &[], headers),
    ring("used-written-by-driver", Formats::Both, &[], used_written),
    ring("events", Formats::Both, &[], events),
    ring("rewritten-rings", Formats::Both, &[], rewritten_rings),
    ring("rewritten-tables", Formats::Both, &[], rewritten_tables),
    card("unmapped-in-flight", unmapped_in_flight),
    card("kick-loop", kick_loop),
    card("kicks-of-no-queue", kicks_of_no_queue),
    card("queue-addresses", queue_addresses),
    card("queue-sizes", queue_sizes),
    card("features", features),
    card("reset-in-flight", reset_in_flight),
    card("status-out-of-order", status_out_of_order),
    card("config-written", config_written),
    card("config-space-written", config_space_written),
];

fn chain_loop(rig: &mut Rig, vring: u16) -> Done {
    let good = rig.good(vring);
    let back = rig.random.below(3) as u16;
    rig.offer(vring, |_, forge| Ok(forge.chain(&[good, good, Piece { next: Some(back), ..good }])?))
}

fn chain_endless(rig: &mut Rig, vring: u16) -> Done {
    let endless = Piece { flags: rig.good(vring).flags | NEXT, len: 16, ..rig.good(vring) };
    rig.offer(vring, |_, forge| Ok(forge.chain(&vec![endless; forge.size().into()])?))
}

fn next_outside(rig: &mut Rig, vring: u16) -> Done {
    let good = rig.good(vring);
    let far = rig.random.below(60_000) as u16;
    rig.offer(vring, |_, forge| {
        let next = Some(forge.size() + far);
        Ok(forge.chain(&[good, Piece { next, ..good }])?)
    })
}

fn head_outside(rig: &mut Rig, vring: u16) -> Done {
    let far = rig.random.below(60_000) as u16;
    rig.offer(vring, |_, forge| Ok(forge.head(forge.size() + far)?))
}

fn id_outside(rig: &mut Rig, vring: u16) -> Done {
    let good = rig.good(vring);
    let far = rig.random.below(60_000) as u16;
    rig.offer(vring, |_, forge| Ok(forge.chain(&[Piece { next: Some(forge.size() + far), ..good }])?))
}

fn avail_jumps(rig: &mut Rig, vring: u16) -> Done {
    let far = rig.random.below(60_000) as u16;
    rig.offer(vring, |_, forge| Ok(forge.available(forge.size() + 1 + far)?))
}

fn avail_back_and_forth(rig: &mut Rig, vring: u16) -> Done {
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
fn table(rig: &Rig, len: u32) -> Piece {
    Piece { addr: rig.spare().1, len, flags: INDIRECT, next: None }
}

fn indirect_nested(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    rig.offer(vring, |rig, forge| {
        let inner = Piece { addr: at.1 + 0x1000, len: 2 * DESC_LEN, flags: INDIRECT, next: None };
        forge.table(at.0, &[good, inner, good])?;
        forge.table(at.0 + 0x1000, &[good, good])?;
        Ok(forge.chain(&[table(rig, 3 * DESC_LEN)])?)
    })
}

fn indirect_with_next(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    rig.offer(vring, |rig, forge| {
        forge.table(at.0, &[good, good])?;
        Ok(forge.chain(&[table(rig, 2 * DESC_LEN), good])?)
    })
}

fn indirect_odd_length(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    let len = rig.random.one(&[0, 1, 15, 17, 40, 0xffff], 0);
    rig.offer(vring, |rig, forge| {
        forge.table(at.0, &[good, good, good])?;
        Ok(forge.chain(&[table(rig, len)])?)
    })
}

fn indirect_huge(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    let len = rig.random.one(&[0xffff_fff0, 0x8000_0000, 0x10_0000], 0xffff_fff0);
    rig.offer(vring, |rig, forge| {
        forge.table(at.0, &[good; 200])?;
        Ok(forge.chain(&[table(rig, len)])?)
    })
}

fn indirect_loop(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    rig.offer(vring, |rig, forge| {
        forge.table(at.0, &[good, good, Piece { next: Some(0), ..good }])?;
        Ok(forge.chain(&[table(rig, 3 * DESC_LEN)])?)
    })
}

fn indirect_next_outside(rig: &mut Rig, vring: u16) -> Done {
    let (good, at) = (rig.good(vring), rig.spare());
    let next = Some(3 + rig.random.below(60_000) as u16);
    rig.offer(vring, |rig, forge| {
        forge.table(at.0, &[good, good, Piece { next, ..good }])?;
        Ok(forge.chain(&[table(rig, 3 * DESC_LEN)])?)
    })
}

fn indirect_nowhere(rig: &mut Rig, vring: u16) -> Done {
    let addr = nowhere(rig);
    rig.offer(vring, |_, forge| {
        Ok(forge.chain(&[Piece { addr, len: 3 * DESC_LEN, flags: INDIRECT, next: None }])?)
    })
}

/// An address at which there is no memory.
fn nowhere(rig: &mut Rig) -> u64 {
    let high = rig.random.number() | 1 << 62;
    rig.random.one(&[0xfee0_0000, 0xf000_0000_0000, high & !(1 << 63), 1 << 46], 1 << 46)
}

fn address_nowhere(rig: &mut Rig, vring: u16) -> Done {
    let good = Piece { addr: nowhere(rig), ..rig.good(vring) };
    rig.offer(vring, |_, forge| Ok(forge.chain(&[good])?))
}

fn address_wraps(rig: &mut Rig, vring: u16) -> Done {
    let addr = u64::MAX - rig.random.below(200);
    let good = Piece { addr, len: 4096, ..rig.good(vring) };
    rig.offer(vring, |_, forge| Ok(forge.chain(&[good])?))
}

/// Where what the card reaches ends: behind an IOMMU the rig's own memory, without one the guest's, below
/// the hole for devices.
fn end_of_reach(rig: &Rig) -> u64 {
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

/// Whether another VM's stores could hit what this guest's kernel lives on, if it wrote to whatever
/// address comes: without an IOMMU, where the ring says where to write.
fn is_suicide(rig: &Rig, vring: u16) -> bool {
    vring == receive_vring(0) && !rig.bare.is_behind_iommu()
}

fn across_the_end(rig: &mut Rig, vring: u16) -> Done {
    let (good, end) = (rig.good(vring), end_of_reach(rig));
    let inside = 12 + rig.random.below(200);
    rig.offer(vring, |_, forge| Ok(forge.chain(&[Piece { addr: end - inside, len: 1500, ..good }])?))
}

fn length_0(rig: &mut Rig, vring: u16) -> Done {
    let good = Piece { len: 0, ..rig.good(vring) };
    rig.offer(vring, |_, forge| Ok(forge.chain(&[good])?))
}

fn length_4_gib(rig: &mut Rig, vring: u16) -> Done {
    let good = Piece { len: u32::MAX - rig.random.below(2) as u32, ..rig.good(vring) };
    rig.offer(vring, |_, forge| Ok(forge.chain(&[good, good])?))
}

fn wrong_direction(rig: &mut Rig, vring: u16) -> Done {
    let good = rig.good(vring);
    rig.offer(vring, |_, forge| Ok(forge.chain(&[Piece { flags: good.flags ^ WRITE, ..good }])?))
}

fn readable_after_writable(rig: &mut Rig, vring: u16) -> Done {
    let good = rig.good(vring);
    let mixed = [Piece { flags: WRITE, ..good }, Piece { flags: 0, ..good }];
    rig.offer(vring, |_, forge| Ok(forge.chain(&mixed)?))
}

fn headers(rig: &mut Rig, vring: u16) -> Done {
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

/// Where both sides of a ring say what they want, and the device what it used.
fn used_ranges(rig: &Rig, vring: u16) -> Vec<(u64, u64)> {
    let Some(places) = rig.places(vring) else { return Vec::new() };
    let size = u64::from(places.size);
    match rig.is_packed() {
        true => vec![(places.avail, 4), (places.used, 4)],
        false => vec![(places.avail, 2), (places.avail + 4 + 2 * size, 2), (places.used, 6 + 8 * size)],
    }
}

fn used_written(rig: &mut Rig, vring: u16) -> Done {
    let Some(places) = rig.places(vring) else { return Ok(()) };
    // The used index, or the place in a packed ring, before the start: the peer goes on there.
    let value = rig.random.word() as u16;
    let at = if rig.is_packed() { 0 } else { 2 };
    rig.reached.memory.store_u16(places.used + at, value)?;
    rig.bait();
    rig.start()?;
    rig.dwell();
    let ranges = [used_ranges(rig, vring), used_ranges(rig, vring ^ 1)].concat();
    rig.scribble(&ranges, 20, |rig| {
        rig.bait();
        rig.kick();
    });
    Ok(())
}

fn events(rig: &mut Rig, vring: u16) -> Done {
    rig.start()?;
    let ranges = used_ranges(rig, vring);
    let ranges: Vec<_> = ranges.into_iter().map(|(start, len)| (start, len.min(4))).collect();
    rig.scribble(&ranges, 40, |rig| {
        rig.bait();
        rig.kick();
    });
    Ok(())
}

fn rewritten_rings(rig: &mut Rig, vring: u16) -> Done {
    if is_suicide(rig, vring) {
        return Ok(());
    }
    rig.start()?;
    let Some(forge) = rig.forge(vring) else { return Ok(()) };
    let mut ranges = used_ranges(rig, vring);
    ranges.extend([forge.descriptors(); 4]);
    if let Some(places) = rig.places(vring).filter(|_| !rig.is_packed()) {
        ranges.push((places.avail, 4 + 2 * u64::from(places.size)));
    }
    rig.scribble(&ranges, 60, |rig| {
        rig.bait();
        rig.kick();
    });
    Ok(())
}

fn rewritten_tables(rig: &mut Rig, vring: u16) -> Done {
    if is_suicide(rig, vring) {
        return Ok(());
    }
    let (good, at) = (rig.good(vring), rig.spare());
    if let Some(mut forge) = rig.forge(vring) {
        for _ in 0..forge.size() {
            forge.table(at.0, &[Piece { len: 64, ..good }; 8])?;
            forge.chain(&[table(rig, 8 * DESC_LEN)])?;
        }
    }
    rig.start()?;
    rig.scribble(&[(at.0, u64::from(8 * DESC_LEN))], 40, |rig| {
        if vring == receive_vring(0) {
            rig.bait();
        }
        rig.kick();
    });
    Ok(())
}

fn unmapped_in_flight(rig: &mut Rig, _: u16) -> Done {
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

fn kick_loop(rig: &mut Rig, _: u16) -> Done {
    rig.start()?;
    rig.bait();
    for_a_while(500, || rig.bare.kick(transmit_vring(0)));
    rig.dwell();
    Ok(())
}

fn kicks_of_no_queue(rig: &mut Rig, _: u16) -> Done {
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

fn queue_addresses(rig: &mut Rig, _: u16) -> Done {
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

fn queue_sizes(rig: &mut Rig, _: u16) -> Done {
    for size in [0, 1, 2, 3, 100, 255, 257, 1 << 15, 0xffff] {
        rig.fresh()?;
        let infos: Vec<_> = rig.infos().into_iter().map(|info| VringInfo { size, ..info }).collect();
        rig.start_with(rig.features(), &infos);
        rig.bait();
        rig.dwell();
    }
    Ok(())
}

fn features(rig: &mut Rig, _: u16) -> Done {
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

fn reset_in_flight(rig: &mut Rig, _: u16) -> Done {
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

fn status_out_of_order(rig: &mut Rig, _: u16) -> Done {
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

fn config_written(rig: &mut Rig, _: u16) -> Done {
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

fn config_space_written(rig: &mut Rig, _: u16) -> Done {
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
