//! Requests of front-ends, with the fuzzer's numbers in them.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use vhost_pci_fuzz::front::{
    CHANNEL, FEATURES, FRONTEND, LOG_ALL, MEMORY, OWNER_PROTOCOL, PEER_PROTOCOL, PLATFORM, PUSH, Pool,
    STRICT_WIRING,
};
use vhost_pci_fuzz::input::Input;
use vhost_pci_switch::link::descriptor::{Eventfd, MemoryFile};
use vhost_pci_switch::link::message::{IotlbMessage, PushEntry, RegionRequest, Request};

fn memory(number: usize) -> MemoryFile {
    static FILES: OnceLock<[MemoryFile; 3]> = OnceLock::new();
    let files = FILES.get_or_init(|| {
        std::array::from_fn(|number| {
            let file = File::from(Pool::of_process().memory[number].try_clone().expect("a descriptor"));
            let metadata = file.metadata().expect("a file");
            MemoryFile::new(OwnedFd::from(file), metadata.dev(), metadata.ino())
        })
    });
    files[number % 3].clone()
}

pub fn eventfd(number: u32) -> Eventfd {
    static EVENTFDS: OnceLock<[Eventfd; 6]> = OnceLock::new();
    let eventfds = EVENTFDS.get_or_init(|| {
        std::array::from_fn(|number| {
            let fd = Pool::of_process().eventfds[number].as_fd().try_clone_to_owned().expect("a descriptor");
            Eventfd::new(fd).with_number(Some(number as u64))
        })
    });
    eventfds[number as usize % 6].clone()
}

pub fn channel() -> UnixStream {
    UnixStream::pair().expect("descriptors").0
}

/// A region that can be.
pub fn region(slot: u64, file: usize) -> RegionRequest {
    let guest = slot * 2 * MEMORY;
    let file_len = if file % 3 == 2 { MEMORY / 2 } else { MEMORY };
    RegionRequest {
        guest,
        frontend: FRONTEND + guest,
        len: file_len,
        offset: 0,
        file: memory(file),
        file_len,
    }
}

/// A log that can be.
pub fn log(len: u64) -> Request {
    Request::SetLogBase { file: memory(0), file_len: MEMORY, offset: 0, len }
}

fn any_region(input: &mut Input<'_>) -> RegionRequest {
    let choice = input.byte();
    let usual = region(u64::from(choice & 7), usize::from(choice >> 3 & 3));
    match choice >> 5 {
        0..=3 => usual,
        // Pieces of a file, that may touch.
        4 | 5 => {
            let (at, len) = (input.below(16) << 16, (1 + input.below(16)) << 16);
            RegionRequest { guest: at, frontend: FRONTEND + at, len, offset: at, ..usual }
        }
        _ => RegionRequest {
            guest: input.field(0),
            frontend: input.field(FRONTEND),
            len: input.field(0),
            offset: input.field(0),
            ..usual
        },
    }
}

pub fn request(input: &mut Input<'_>) -> Request {
    let number = input.byte();
    let index = match input.byte() {
        few @ 0..0xf0 => u32::from(few % 5),
        _ => input.double(),
    };
    let any_fd = |input: &mut Input<'_>| match input.byte() {
        0..16 => None,
        number => Some(eventfd(number.into())),
    };
    match number % 30 {
        0 => Request::SetOwner,
        1 => Request::ResetOwner,
        2 => Request::GetFeatures,
        3 => Request::SetFeatures(match input.byte() {
            few @ 0..0xe0 => {
                let log = if few & 0x40 == 0 { 0 } else { LOG_ALL };
                let features =
                    [FEATURES, FEATURES | PLATFORM, FEATURES | 3 << 34, FEATURES | PLATFORM | 3 << 34];
                features[usize::from(few % 4)] | log
            }
            _ => input.quad(),
        }),
        4 => Request::GetProtocolFeatures,
        5 => Request::SetProtocolFeatures(match input.byte() {
            few @ 0..0xe0 => [
                OWNER_PROTOCOL,
                OWNER_PROTOCOL | CHANNEL | PUSH,
                PEER_PROTOCOL,
                PEER_PROTOCOL | STRICT_WIRING,
            ][usize::from(few % 4)],
            _ => input.quad(),
        }),
        6 => Request::GetQueueNum,
        7 => Request::GetMaxMemSlots,
        8 | 9 => Request::SetMemTable((0..input.below(12)).map(|_| any_region(input)).collect()),
        10 | 11 => Request::AddMemReg(any_region(input)),
        12 | 13 => {
            let region = any_region(input);
            Request::RemMemReg { guest: region.guest, frontend: region.frontend, len: region.len }
        }
        14 => Request::SetVringNum { index, num: input.field(0) as u32 },
        15 => {
            let page = FRONTEND + 4096 * u64::from(input.byte() % 16);
            Request::SetVringAddr { index, desc: page, avail: page + 0x400, used: page + 0x600 }
        }
        16 => Request::SetVringAddr {
            index,
            desc: input.field(FRONTEND),
            avail: input.field(FRONTEND),
            used: input.field(FRONTEND),
        },
        17 => Request::SetVringBase { index, base: input.field(0) as u32 },
        18 | 19 => Request::GetVringBase { index },
        20 => Request::SetVringKick { index, fd: any_fd(input) },
        21 => Request::SetVringCall { index, fd: any_fd(input) },
        22 => Request::SetVringErr { index, fd: any_fd(input) },
        23 | 24 => Request::SetVringEnable { index, enable: input.coin() },
        25 => match input.byte() % 6 {
            4 => log(1 + input.below(MEMORY)),
            5 => Request::SetLogBase {
                file: memory(usize::from(input.byte())),
                file_len: MEMORY,
                offset: input.field(0),
                len: input.field(0),
            },
            0 => Request::GetConfig { offset: input.field(0) as u32, len: input.field(0) as u32 },
            1 => Request::SetConfig,
            2 => Request::GetShmemConfig,
            _ => Request::SetBackendChannel(channel()),
        },
        26 | 27 => {
            let [iova, size, frontend] = addresses(input);
            let (perm, kind) = (input.byte() % 5, input.byte() % 6);
            Request::Iotlb(IotlbMessage { iova, size, frontend, perm, kind })
        }
        _ => {
            let entry = |input: &mut Input<'_>| {
                let [iova, size, frontend] = addresses(input);
                PushEntry { iova, size, frontend, perm: input.byte() % 5 }
            };
            let reset = input.coin();
            Request::IommuPush { reset, entries: (0..input.below(9)).map(|_| entry(input)).collect() }
        }
    }
}

/// IOVA, length, and where it is in the front-end.
fn addresses(input: &mut Input<'_>) -> [u64; 3] {
    match input.byte() {
        page @ 0..192 => {
            let page = 4096 * u64::from(page % 24);
            [page, 4096 * (1 + input.below(4)), FRONTEND + 4096 * input.below(24)]
        }
        _ => [input.field(0), input.field(0), input.field(FRONTEND)],
    }
}
