//! What a hostile owner does to its rings and to its card, attack by attack.

mod areas;
mod card;
mod chains;

use super::owner::Rig;
use crate::programs::ProgramError;

pub use card::write;

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
    ring("chain-loop", Formats::Split, &["ring_chain_too_long"], chains::chain_loop),
    ring("chain-endless", Formats::Packed, &["ring_chain_too_long"], chains::chain_endless),
    ring("next-outside", Formats::Split, &["ring_descriptor_index"], chains::next_outside),
    ring("head-outside", Formats::Split, &["ring_descriptor_index"], chains::head_outside),
    ring("id-outside", Formats::Packed, &["ring_descriptor_index"], chains::id_outside),
    ring("avail-jumps", Formats::Split, &["ring_avail_jump"], chains::avail_jumps),
    ring("avail-back-and-forth", Formats::Split, &[], chains::avail_back_and_forth),
    ring("indirect-nested", Formats::Both, &["ring_indirect"], chains::indirect_nested),
    ring("indirect-with-next", Formats::Both, &["ring_indirect"], chains::indirect_with_next),
    ring("indirect-odd-length", Formats::Both, &["ring_indirect"], chains::indirect_odd_length),
    ring(
        "indirect-huge",
        Formats::Both,
        &["ring_indirect", "ring_unmapped", "ring_access"],
        chains::indirect_huge,
    ),
    ring("indirect-loop", Formats::Split, &["ring_chain_too_long"], chains::indirect_loop),
    ring("indirect-next-outside", Formats::Split, &["ring_descriptor_index"], chains::indirect_next_outside),
    ring("indirect-nowhere", Formats::Both, NOT_THERE, chains::indirect_nowhere),
    ring("address-nowhere", Formats::Both, NOT_THERE, chains::address_nowhere),
    ring("address-wraps", Formats::Both, NOT_THERE, chains::address_wraps),
    ring("across-the-end", Formats::Both, NOT_THERE, chains::across_the_end),
    ring("length-0", Formats::Both, &["ring_length"], chains::length_0),
    ring("length-4-GiB", Formats::Both, TOO_LONG, chains::length_4_gib),
    ring("wrong-direction", Formats::Both, &["ring_direction"], chains::wrong_direction),
    ring("readable-after-writable", Formats::Both, &["ring_direction"], chains::readable_after_writable),
    ring("headers", Formats::Both, &[], chains::headers),
    ring("used-written-by-driver", Formats::Both, &[], areas::used_written),
    ring("events", Formats::Both, &[], areas::events),
    ring("rewritten-rings", Formats::Both, &[], areas::rewritten_rings),
    ring("rewritten-tables", Formats::Both, &[], areas::rewritten_tables),
    card("unmapped-in-flight", card::unmapped_in_flight),
    card("kick-loop", card::kick_loop),
    card("kicks-of-no-queue", card::kicks_of_no_queue),
    card("queue-addresses", card::queue_addresses),
    card("queue-sizes", card::queue_sizes),
    card("features", card::features),
    card("reset-in-flight", card::reset_in_flight),
    card("status-out-of-order", card::status_out_of_order),
    card("config-written", card::config_written),
    card("config-space-written", card::config_space_written),
];
