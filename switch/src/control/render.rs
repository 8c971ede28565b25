//! `status` as text for people.

use std::fmt::Write;

use super::BrokerReport;
use crate::config::Confine;
use crate::confine::Confinement;
use crate::link::report::{LinkReport, SideReport};

/// The whole report.
pub fn broker(report: &BrokerReport) -> String {
    let mut text = String::new();
    let packets = report.packets.map_or("unknown".into(), |packets| packets.to_string());
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "vhost-pci-switch {} (pid {}): {} link{}, packets through the broker: {packets}, guest memory mapped: {} B",
        report.version,
        report.pid,
        report.links.len(),
        if report.links.len() == 1 { "" } else { "s" },
        report.guest_bytes_mapped,
    );
    let _ = writeln!(text, "confinement: {}", confinement(&report.confinement));
    let guardian = report.guardian.map_or_else(|| "none".to_owned(), |pid| format!("pid {pid}"));
    let opener = report.opener.map_or_else(|| "none".to_owned(), |pid| format!("pid {pid}"));
    let _ = writeln!(text, "guardian: {guardian}\nopener: {opener}");
    for link in &report.links {
        write_link(&mut text, link);
    }
    text
}

/// What is in force, and what is not and why.
fn confinement(confinement: &Confinement) -> String {
    if confinement.policy == Confine::Off.name() {
        return "off".into();
    }
    let mut parts = Vec::new();
    parts.extend(confinement.system_calls.map(|count| format!("seccomp {count} system calls")));
    parts.extend(confinement.landlock_abi.map(|abi| format!("landlock ABI {abi}")));
    parts.extend(confinement.no_capabilities.then(|| "no capabilities".into()));
    parts.extend(confinement.no_new_privs.then(|| "no_new_privs".into()));
    parts.extend(confinement.missing.iter().map(|missing| format!("missing {missing}")));
    parts.join(", ")
}

fn write_link(text: &mut String, link: &LinkReport) {
    let reason = link.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
    let _ = writeln!(text, "\nlink {}: {}{reason}", link.name, link.state);
    write_side(text, "owner", &link.owner);
    if let Some(waiting) = &link.waiting_owner {
        write_side(text, "waiting", waiting);
    }
    if let Some(len) = link.dirty_log {
        let _ = writeln!(
            text,
            "  log      {len} B: the owner is being migrated, and the peer's driver marks what it writes"
        );
    }
    write_side(text, "peer", &link.peer);
    let window = &link.window;
    let _ = writeln!(
        text,
        "  window   {} MiB, {}, {} KiB of the owner in {} mapping{}, generation {}",
        window.len >> 20,
        window.phase,
        window.mapped_bytes >> 10,
        window.mappings.len(),
        if window.mappings.len() == 1 { "" } else { "s" },
        link.generation,
    );
    for mapping in &window.mappings {
        let _ = writeln!(
            text,
            "    iova {:#014x} + {:#012x} at window {:#014x}, {}{}",
            mapping.iova,
            mapping.len,
            mapping.window_offset,
            mapping.access,
            if mapping.confirmed { "" } else { ", not confirmed" },
        );
    }
    for vring in &link.vrings {
        let _ = writeln!(
            text,
            "  vring {}  {}, {} entries; kicks {}, calls {}{}",
            vring.index,
            vring.state,
            vring.size,
            vring.kicks,
            vring.calls,
            vring.indirect_because.as_ref().map_or(String::new(), |reason| format!(": {reason}")),
        );
    }
    let counters = &link.counters;
    let _ = writeln!(
        text,
        "  counters mappings made {}, revoked {}; notifications relayed {} ({} kicks, {} calls); messages owner {}, peer {}, control ring {}",
        counters.mappings_made,
        counters.mappings_revoked,
        counters.notifications_relayed,
        counters.kicks_relayed,
        counters.calls_relayed,
        counters.owner_messages,
        counters.peer_messages,
        counters.control_commands,
    );
    if counters.releases_asked > 0 || link.peer.quiesces {
        let _ = writeln!(
            text,
            "  lent     a device of the peer's VM uses the window; had to let go of something {} times, did in time {} times",
            counters.releases_asked, counters.releases_given,
        );
    }
    let has_iommu = link.owner.features.iter().any(|name| name == "VIRTIO_F_ACCESS_PLATFORM");
    if has_iommu || counters.iotlb_misses + counters.iommu_pushes > 0 {
        let _ = writeln!(
            text,
            "  iommu    one-way memory: {}{}; most of the owner at once {} KiB; misses {}, updates {}, invalidations {}, pushes {}; \
             denied {}, turned away {}; evicted {}; fetched {} ({} B), stored {} ({} B)",
            window.one_way,
            if window.widened { " (mapped with more access than the owner allows)" } else { "" },
            window.largest_mapped_bytes >> 10,
            counters.iotlb_misses,
            counters.iotlb_updates,
            counters.iotlb_invalidations,
            counters.iommu_pushes,
            counters.iotlb_denied,
            counters.iotlb_limited,
            counters.mappings_evicted,
            counters.fetches,
            counters.bytes_fetched,
            counters.stores,
            counters.bytes_stored,
        );
    }
    let limits = &link.limits;
    let _ = writeln!(
        text,
        "  limits   a second: {} messages, {} notifications, {} connections; {} regions of memory{}; {} ranges in the window",
        limits.messages_per_second,
        limits.notifications_per_second,
        limits.connections_per_second,
        limits.memory_regions,
        if limits.unsealed_memory { ", also such as can be shortened" } else { "" },
        limits.max_mappings,
    );
    if !counters.faults.is_empty() {
        let faults: Vec<_> = counters.faults.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        let _ = writeln!(text, "  faults   {}", faults.join(", "));
    }
}

fn write_side(text: &mut String, name: &str, side: &SideReport) {
    let driver = side.driver.as_ref().map_or(String::new(), |driver| format!(", driver {driver}"));
    let _ = writeln!(text, "  {name:<8} {} at {}{driver}", side.state, side.socket);
    if !side.features.is_empty() {
        let _ = writeln!(text, "           features {}", side.features.join(" "));
    }
}
