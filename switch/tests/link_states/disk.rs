//! An owner whose device is a disk: what its front-end is told of it, and what the peer is.

use vhost_pci_device::abi;
use vhost_pci_switch::config::LinkConfig;
use vhost_pci_switch::kind;
use vhost_pci_switch::link::Side;
use vhost_pci_switch::link::message::{Reply, Request};

use crate::bench::{Bench, REGIONS, config};

const CONFIG: u64 = 1 << 9;

fn disk() -> Bench {
    let device = kind::block::device(8 << 20, 2, false);
    let mut bench = Bench::with(LinkConfig { device, ..config() });
    bench.connect(Side::Owner);
    bench
}

fn number(bench: &mut Bench, request: Request) -> u64 {
    bench.owner_raw(request);
    match bench.owner_reply {
        Some(Reply::Number(number)) => number,
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn a_disk_has_a_configuration_space_and_a_network_card_has_none() {
    let mut bench = disk();
    assert_ne!(number(&mut bench, Request::GetProtocolFeatures) & CONFIG, 0);
    assert_eq!(number(&mut bench, Request::GetQueueNum), 2);
    bench.owner_raw(Request::GetConfig { offset: 0, len: 96 });
    let Some(Reply::Config(bytes)) = bench.owner_reply.take() else { panic!() };
    assert_eq!((bytes.len(), &bytes[..8]), (96, &(8_u64 << 20 >> 9).to_le_bytes()[..]));
    assert_eq!((bytes[34], &bytes[60..]), (2, &[0; 36][..]));
    let mut card = Bench::new();
    card.connect(Side::Owner);
    assert_eq!(number(&mut card, Request::GetProtocolFeatures) & CONFIG, 0);
}

#[test]
fn what_cannot_be_answered_of_it_is_declined_and_the_session_goes_on() {
    let mut bench = disk();
    for (offset, len, is_answered) in
        [(0, 256, true), (255, 1, true), (0, 257, false), (256, 1, false), (u32::MAX, u32::MAX, false)]
    {
        let before = bench.faults("config");
        bench.owner_raw(Request::GetConfig { offset, len });
        match bench.owner_reply.take() {
            Some(Reply::Config(bytes)) => assert!(is_answered && bytes.len() == len as usize),
            Some(Reply::Declined) => assert!(!is_answered && bench.faults("config") == before + 1),
            other => panic!("{other:?}"),
        }
    }
    bench.owner_raw(Request::SetConfig);
    assert!(matches!(bench.owner_reply, Some(Reply::Declined)));
    assert!(bench.is_connected(Side::Owner));
}

#[test]
fn the_peers_driver_is_told_what_the_owner_was() {
    let mut bench = disk();
    bench.peer_up();
    bench.owner_up(&REGIONS);
    bench.work();
    assert!(bench.is_up());
    let contents = &bench.published.0;
    assert_eq!((contents.owner_device, contents.config.len()), (2, 60));
    assert!(contents.config.len() <= abi::MAX_OWNER_CONFIG as usize);
    assert_eq!(bench.report().device, "block");
    bench.owner_raw(Request::SetVringNum { index: 2, num: 64 });
    let Some(Reply::Refused(reason)) = &bench.owner_reply else { panic!() };
    assert!(reason.contains("2 vrings (num_queues"), "{reason}");
}
