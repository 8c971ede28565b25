//! A link's state as `status` shows it.

use std::collections::BTreeMap;

use iommu::Access;
use serde::{Deserialize, Serialize};

use super::features;
use super::message::{Side, shown_at};
use super::notify::Way;
use super::owner::OwnerSession;
use super::peer::PeerSession;
use super::state::Link;
use super::vring::Vring;
use super::wiring::End;
use crate::config::{LinkConfig, OneWay};

/// One link, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkReport {
    /// The link's name.
    pub name: String,
    /// Queues that the owner's device may have.
    #[serde(default)]
    pub max_vrings: u16,
    /// What kind of device the owner has: the configuration's `profile`.
    #[serde(default)]
    pub device: String,
    /// `up`, `waiting` or `failed`.
    pub state: String,
    /// Why it failed, or what it waits for.
    pub reason: Option<String>,
    /// The generation of the link page.
    pub generation: u64,
    /// The owner's side.
    pub owner: SideReport,
    /// The second VMM of the owner's side, if there is one: it waits for the link.
    #[serde(default)]
    pub waiting_owner: Option<SideReport>,
    /// Length of the dirty log in which the peer's driver marks what it writes, bytes, while the owner is migrated.
    #[serde(default)]
    pub dirty_log: Option<u64>,
    /// The peer's side.
    pub peer: SideReport,
    /// The peer's window.
    pub window: WindowReport,
    /// The owner's vrings.
    pub vrings: Vec<VringReport>,
    /// What its VMMs and guests may do and bring.
    #[serde(default)]
    pub limits: LimitsReport,
    /// Counts since the broker started.
    pub counters: CountersReport,
}

/// One side of a link.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideReport {
    /// `absent`, `connected`, or `started` when its device runs.
    pub state: String,
    /// The socket that its VMM connects to.
    pub socket: String,
    /// Virtio features that the guest's driver accepted, by name.
    pub features: Vec<String>,
    /// vhost-user protocol features that the VMM accepted, by name.
    pub protocol_features: Vec<String>,
    /// `none`, `polling` or `interrupt`: the driver in the peer's guest.
    pub driver: Option<String>,
    /// Whether a device of the peer's VM uses the window, and has to let go of what leaves it.
    #[serde(default)]
    pub quiesces: bool,
}

/// The peer's window.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowReport {
    /// Its length, bytes.
    pub len: u64,
    /// `closed`, `open`, `releasing`, `revoking`, `residue` or `reopening`.
    pub phase: String,
    /// Bytes of the owner that the peer has, or may have, mapped.
    pub mapped_bytes: u64,
    /// The most that this was since the broker started.
    pub largest_mapped_bytes: u64,
    /// `refuse` or `widen`: what becomes of memory that the owner's IOMMU allows one
    /// direction only.
    pub one_way: String,
    /// Whether ranges are mapped with more access than the owner allows.
    pub widened: bool,
    /// The ranges of the owner that the peer has, or may have, mapped.
    pub mappings: Vec<MappingReport>,
}

/// One range of the owner's memory in the window.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappingReport {
    /// First address, as the owner's driver names it.
    pub iova: u64,
    /// Length, bytes.
    pub len: u64,
    /// Where it is in the window.
    pub window_offset: u64,
    /// What the owner allows: `read`, `write` or `read-write`.
    pub access: String,
    /// Whether the peer's VMM confirmed it.
    pub confirmed: bool,
}

/// One vring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VringReport {
    /// Its number.
    pub index: u16,
    /// `stopped`, `started` (not enabled) or `live`.
    pub state: String,
    /// Entries.
    pub size: u32,
    /// IOVA of the descriptor table, or of a packed ring.
    pub desc: u64,
    /// IOVA of the available ring, or of the driver's event suppression area.
    pub avail: u64,
    /// IOVA of the used ring, or of the device's event suppression area.
    pub used: u64,
    /// How kicks reach the peer: `direct`, by the `doorbell` function, `relayed` or
    /// `none`; `changing` while one is being asked to, `waiting` for the driver to attach.
    pub kicks: String,
    /// How calls reach the owner, likewise.
    pub calls: String,
    /// Why something is not direct that could be.
    pub indirect_because: Option<String>,
}

/// The limits of a link, as configured. Who meets one is counted under its name, but
/// `memory_regions` as `memory_region` and `max_mappings` as `mappings_evicted`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitsReport {
    /// Regions of memory that the owner's VMM may bring.
    pub memory_regions: usize,
    /// Whether memory is taken that the owner's VMM can shorten.
    pub unsealed_memory: bool,
    /// Messages, and answers on the back-end channel, of each VMM a second.
    pub messages_per_second: u32,
    /// Notifications that are relayed a second.
    pub notifications_per_second: u32,
    /// Connections to each socket a second.
    pub connections_per_second: u32,
    /// Ranges in the window.
    pub max_mappings: usize,
}

/// Counts since the broker started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountersReport {
    /// Mappings of the owner's memory that the peer's VMM confirmed.
    pub mappings_made: u64,
    /// Mappings that are known to be gone.
    pub mappings_revoked: u64,
    /// Times that the peer's driver was asked to have its device let go of what leaves the window.
    #[serde(default)]
    pub releases_asked: u64,
    /// Times that it did so in time.
    #[serde(default)]
    pub releases_given: u64,
    /// Kicks relayed to the peer.
    pub kicks_relayed: u64,
    /// Calls relayed to the owner.
    pub calls_relayed: u64,
    /// Both together.
    pub notifications_relayed: u64,
    /// Connections of the owner's VMM.
    pub owner_connections: u64,
    /// Times that an owner's VMM which had waited took the link over from another.
    #[serde(default)]
    pub takeovers: u64,
    /// Connections of the peer's VMM.
    pub peer_connections: u64,
    /// vhost-user messages of the owner's VMM.
    pub owner_messages: u64,
    /// vhost-user messages of the peer's VMM.
    pub peer_messages: u64,
    /// Commands of the peer's driver.
    pub control_commands: u64,
    /// Misses that the owner's VMM was told of.
    pub iotlb_misses: u64,
    /// IOTLB updates of the owner's VMM.
    pub iotlb_updates: u64,
    /// IOTLB invalidations of the owner's VMM.
    pub iotlb_invalidations: u64,
    /// Messages of pushed changes of the owner's VMM.
    pub iommu_pushes: u64,
    /// Commands of the peer's driver that the owner's IOMMU does not allow.
    pub iotlb_denied: u64,
    /// Commands turned away because too many were denied.
    pub iotlb_limited: u64,
    /// MAP commands of the peer's driver.
    pub maps_asked: u64,
    /// Mappings taken out of the window to make room for others.
    pub mappings_evicted: u64,
    /// FETCH commands carried out.
    pub fetches: u64,
    /// Bytes of the owner's memory copied to the peer by them.
    pub bytes_fetched: u64,
    /// STORE commands carried out.
    pub stores: u64,
    /// Bytes of the peer's copied to the owner's memory by them.
    pub bytes_stored: u64,
    /// Faults, by kind.
    pub faults: BTreeMap<String, u64>,
}

/// Writes a link's report. What only the runtime knows (relayed notifications)
/// stays zero.
pub fn of(link: &Link) -> LinkReport {
    LinkReport {
        name: link.config.name.clone(),
        max_vrings: link.config.max_vrings(),
        state: match (&link.failure, link.is_up()) {
            (Some(_), _) => "failed",
            (None, true) => "up",
            (None, false) => "waiting",
        }
        .into(),
        reason: link.failure.clone().or_else(|| waits_for(link).map(str::to_owned)),
        generation: link.generations.link,
        device: link.config.device.kind.name.into(),
        owner: owner(link),
        waiting_owner: link.waiting.as_ref().map(|owner| of_owner(link, owner)),
        dirty_log: (link.published.log.1 > 0).then_some(link.published.log.1),
        peer: peer(link),
        window: window(link),
        vrings: vrings(link),
        limits: limits(&link.config),
        counters: counters(link),
    }
}

fn limits(config: &LinkConfig) -> LimitsReport {
    LimitsReport {
        memory_regions: config.memory_regions,
        unsealed_memory: config.unsealed_memory,
        messages_per_second: config.rates.messages,
        notifications_per_second: config.rates.notifications,
        connections_per_second: config.rates.connections,
        max_mappings: config.max_mappings,
    }
}

/// What a link that is not up waits for.
fn waits_for(link: &Link) -> Option<&'static str> {
    let owner_runs = link.owner.as_ref().is_some_and(|owner| owner.vrings().iter().any(Vring::is_live));
    let peer_runs = link.peer.as_ref().is_some_and(PeerSession::is_started);
    match (&link.owner, &link.peer) {
        _ if link.is_up() => None,
        (None, _) => Some("the owner's VMM is not connected"),
        (_, None) => Some("the peer's VMM is not connected"),
        _ if !owner_runs => Some("the owner's driver has not started its device"),
        _ if !peer_runs => Some("the peer's driver has not started its device"),
        (Some(owner), _) if owner.has_iommu() => {
            Some("the owner's IOMMU has not mapped its vrings, or the peer's window is being changed")
        }
        _ => Some("the peer's window is being changed"),
    }
}

fn owner(link: &Link) -> SideReport {
    let socket = link.config.owner_socket.display().to_string();
    match &link.owner {
        Some(owner) => of_owner(link, owner),
        None => absent(socket),
    }
}

fn of_owner(link: &Link, owner: &OwnerSession) -> SideReport {
    let socket = link.config.owner_socket.display().to_string();
    SideReport {
        state: if owner.has_live_vring() { "started" } else { "connected" }.into(),
        socket,
        features: features::names(owner.features(), Some(link.config.device.kind)),
        protocol_features: features::protocol_names(owner.protocol()),
        driver: None,
        quiesces: false,
    }
}

fn peer(link: &Link) -> SideReport {
    let socket = link.config.peer_socket.display().to_string();
    let Some(peer) = &link.peer else {
        return absent(socket);
    };
    SideReport {
        state: if peer.is_started() { "started" } else { "connected" }.into(),
        socket,
        features: features::names(peer.features(), None),
        protocol_features: features::protocol_names(peer.protocol()),
        driver: peer.driver.map(|driver| if driver.interrupt { "interrupt" } else { "polling" }.into()),
        quiesces: peer.driver.is_some_and(|driver| driver.quiesces),
    }
}

fn absent(socket: String) -> SideReport {
    SideReport { state: "absent".into(), socket, ..SideReport::default() }
}

fn window(link: &Link) -> WindowReport {
    let mappings: Vec<MappingReport> = link
        .window
        .owner_ranges()
        .map(|(placement, confirmed)| MappingReport {
            iova: placement.range().iova().start().raw(),
            len: placement.window().len(),
            window_offset: shown_at(placement, link.config.window_len).raw(),
            access: match link
                .shown
                .allowed(placement.range().iova().start())
                .unwrap_or(placement.range().access())
            {
                Access::Read => "read",
                Access::Write => "write",
                Access::ReadWrite => "read-write",
            }
            .into(),
            confirmed,
        })
        .collect();
    WindowReport {
        len: link.peer.as_ref().map_or(link.config.window_len, PeerSession::window_len),
        phase: match link.window.phase_name() {
            "open" if link.release.is_owed() => "releasing",
            phase => phase,
        }
        .into(),
        mapped_bytes: link.window.owner_bytes(),
        largest_mapped_bytes: link.window.counters().largest,
        one_way: link.config.one_way.name().into(),
        widened: link.config.one_way == OneWay::Widen
            && link.owner.as_ref().is_some_and(OwnerSession::has_iommu),
        mappings,
    }
}

fn vrings(link: &Link) -> Vec<VringReport> {
    let Some(owner) = &link.owner else {
        return Vec::new();
    };
    (0..)
        .zip(owner.vrings())
        .map(|(index, vring)| {
            let config = vring.started();
            let [kicks, calls] = [Side::Owner, Side::Peer].map(|from| link.way(End { vring: index, from }));
            VringReport {
                index,
                state: match config {
                    None => "stopped",
                    Some(_) if vring.enabled => "live",
                    Some(_) => "started",
                }
                .into(),
                size: config.map_or(0, |config| u32::from(config.size)),
                desc: config.map_or(0, |config| config.desc.raw()),
                avail: config.map_or(0, |config| config.avail.raw()),
                used: config.map_or(0, |config| config.used.raw()),
                kicks: way(kicks).into(),
                calls: way(calls).into(),
                indirect_because: because(kicks).or(because(calls)).map(Into::into),
            }
        })
        .collect()
}

fn way(way: Way) -> &'static str {
    match way {
        Way::None => "none",
        Way::Direct => "direct",
        Way::Doorbell => "doorbell",
        Way::Changing => "changing",
        Way::Waiting => "waiting",
        Way::Relayed(_) => "relayed",
    }
}

fn because(way: Way) -> Option<&'static str> {
    match way {
        Way::Relayed(reason) => reason,
        Way::Waiting => Some("kicks wait for the peer's driver to attach"),
        Way::None | Way::Direct | Way::Doorbell | Way::Changing => None,
    }
}

fn counters(link: &Link) -> CountersReport {
    let window = link.window.counters();
    let demand = link.demand_counters;
    CountersReport {
        iotlb_misses: demand.misses,
        iotlb_updates: demand.updates,
        iotlb_invalidations: demand.invalidations,
        iommu_pushes: demand.pushes,
        iotlb_denied: demand.denied,
        iotlb_limited: demand.limited,
        maps_asked: demand.maps,
        mappings_evicted: demand.evictions,
        fetches: demand.fetches,
        bytes_fetched: demand.bytes_fetched,
        stores: demand.stores,
        bytes_stored: demand.bytes_stored,
        mappings_made: window.made,
        mappings_revoked: window.revoked,
        releases_asked: link.release.counters().asked,
        releases_given: link.release.counters().given,
        owner_connections: link.counters.owner_connections,
        takeovers: link.counters.takeovers,
        peer_connections: link.counters.peer_connections,
        owner_messages: link.counters.owner_messages,
        peer_messages: link.counters.peer_messages,
        control_commands: link.counters.control_commands,
        faults: link.counters.faults.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect(),
        ..CountersReport::default()
    }
}
