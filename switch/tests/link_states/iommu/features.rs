//! Negotiation of the project's own protocol features.

use vhost_pci_switch::link::Side;
use vhost_pci_switch::link::features::{ACCESS_PLATFORM, PROTOCOL_IOMMU_PUSH, PROTOCOL_SHMEM_STRICT};
use vhost_pci_switch::link::message::{IotlbMessage, Reply, Request};

use super::owner_vmm::{BEHIND, BUFFERS, Kind};
use super::page_table::PAGE;
use crate::bench::{Bench, config};
use crate::front_end::{Ask, FEATURES, FRONTEND, owner_protocol_features};

const REPLY_ACK: u64 = 1 << 3;
const BACKEND_REQ: u64 = 1 << 5;
const SHMEM: u64 = 1 << 22;

#[test]
fn a_bit_without_those_that_it_depends_on_ends_the_session() {
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    bench.owner(Ask::Protocol(PROTOCOL_IOMMU_PUSH));
    assert!(!bench.is_connected(Side::Owner));
    for without in [REPLY_ACK, BACKEND_REQ, SHMEM] {
        bench.connect(Side::Peer);
        let all = vhost_pci_switch::link::peer::protocol_features() | PROTOCOL_SHMEM_STRICT;
        bench.peer(Request::SetProtocolFeatures(all & !without));
        assert!(!bench.is_connected(Side::Peer), "{without:#x}");
    }
}

#[test]
fn a_bit_of_the_other_side_ends_the_session() {
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    bench.owner(Ask::Protocol(owner_protocol_features() | PROTOCOL_SHMEM_STRICT));
    assert!(!bench.is_connected(Side::Owner));
    bench.connect(Side::Peer);
    bench.peer(Request::SetProtocolFeatures(
        vhost_pci_switch::link::peer::protocol_features() | PROTOCOL_IOMMU_PUSH,
    ));
    assert!(!bench.is_connected(Side::Peer));
}

#[test]
fn a_push_without_its_feature_or_without_an_iommu_ends_the_session() {
    let push = || Ask::Push(false, vec![(BUFFERS, PAGE, BEHIND, 3)]);
    let mut bench = Bench::iommu();
    bench.owner(push());
    assert!(!bench.is_connected(Side::Owner));
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    bench.owner(Ask::Protocol(owner_protocol_features()));
    bench.owner(Ask::Features(FEATURES));
    bench.owner(push());
    assert!(!bench.is_connected(Side::Owner));
}

#[test]
fn an_iotlb_message_of_a_front_end_that_pushes_is_declined_and_ignored() {
    let mut bench = Bench::iommu_with(config(), Kind::Pushes, false);
    bench.guest_maps(0..1, 3);
    let update = IotlbMessage {
        iova: BUFFERS + 8 * PAGE,
        size: PAGE,
        frontend: FRONTEND + BEHIND,
        perm: 3,
        kind: IotlbMessage::UPDATE,
    };
    for message in [update, IotlbMessage { iova: BUFFERS, kind: IotlbMessage::INVALIDATE, ..update }] {
        bench.iotlb(message);
        assert!(matches!(bench.owner_reply, Some(Reply::Declined)), "{:?}", bench.owner_reply);
    }
    assert!(bench.is_connected(Side::Owner) && bench.is_up());
    let fetch = bench.fetch(BUFFERS, 64);
    assert!(bench.copies(fetch));
}

#[test]
fn an_iotlb_message_without_an_iommu_ends_the_session() {
    let mut bench = Bench::up();
    bench.owner(Ask::Invalidate(0, PAGE));
    assert!(!bench.is_connected(Side::Owner));
    assert_eq!(bench.faults("unsupported"), 1);
}

#[test]
fn how_a_front_end_tells_of_its_iommu_cannot_change_while_a_vring_runs() {
    let mut bench = Bench::iommu();
    bench.owner(Ask::Protocol(owner_protocol_features() | PROTOCOL_IOMMU_PUSH));
    assert!(!bench.is_connected(Side::Owner));
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    // Before: as often as it likes.
    for features in [FEATURES, FEATURES | ACCESS_PLATFORM, FEATURES, FEATURES | ACCESS_PLATFORM] {
        bench.owner(Ask::Features(features));
        bench.owner(Ask::Protocol(owner_protocol_features()));
        assert!(bench.is_connected(Side::Owner));
    }
}
