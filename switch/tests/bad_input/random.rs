//! Thousands of short sessions of random bytes, half-right messages and random
//! descriptors on both sockets. Seeded: a failure can be repeated.

use std::os::fd::OwnedFd;

use crate::bench::{Bench, settled_descriptors};
use crate::raw::{OWNER_PROTOCOL, PEER_PROTOCOL, Raw, eventfd, memfd, message};

const SESSIONS: usize = 3000;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// A field as an attacker would choose it: small, near a limit, or anything.
    fn field(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(4),
            1 => 1 << self.below(64),
            2 => u64::MAX - self.below(8192),
            3 => crate::raw::FRONTEND + (self.below(1 << 10) << 4),
            4 => self.below(64) << 12,
            _ => self.next(),
        }
    }

    fn payload(&mut self) -> Vec<u8> {
        match self.below(4) {
            0 => Vec::new(),
            1 => (0..self.below(6)).flat_map(|_| self.field().to_ne_bytes()).collect(),
            2 => [self.below(3) as u32, self.field() as u32]
                .iter()
                .flat_map(|word| word.to_ne_bytes())
                .collect(),
            _ => {
                let len = self.below(80);
                self.bytes(len)
            }
        }
    }

    fn fds(&mut self) -> Vec<OwnedFd> {
        let count = [0, 0, 0, 1, 1, 2, 8, 33][self.below(8) as usize];
        (0..count).map(|_| if self.below(2) == 0 { memfd() } else { eventfd() }).collect()
    }
}

fn session(random: &mut Random, raw: &Raw) {
    for _ in 0..=random.below(6) {
        let fds = random.fds();
        let bytes = match random.below(4) {
            0 => {
                let len = 1 + random.below(60);
                random.bytes(len)
            }
            kind => {
                let request = 1 + random.below(45) as u32;
                let flags = if kind == 1 { random.next() as u32 } else { 1 | (random.below(2) as u32) << 3 };
                let mut bytes = message(request, flags, &random.payload());
                if random.below(8) == 0 {
                    bytes.truncate(1 + random.below(bytes.len() as u64) as usize);
                }
                bytes
            }
        };
        raw.send(&bytes, &fds);
    }
}

#[test]
fn random_sessions_leave_the_broker_alive_and_clean() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let (owner_socket, peer_socket) = bench.left();
    let mut random = Random(0x5eed_0123_4567_89ab);
    for count in 0..SESSIONS {
        let peer = count % 2 == 1;
        let mut raw = Raw::connect(if peer { &peer_socket } else { &owner_socket });
        if random.below(2) == 0 {
            raw.negotiate(if peer { PEER_PROTOCOL } else { OWNER_PROTOCOL });
        }
        session(&mut random, &raw);
        raw.half_close();
        raw.closed();
    }
    bench.wait_until("all gone", |report| report.owner.state == "absent" && report.peer.state == "absent");
    bench.descriptors_are(open);
    let faults = bench.faults();
    assert!(faults.values().sum::<u64>() > SESSIONS as u64 / 4, "{faults:?}");
    bench.right_link_works();
    let (peer, window) = Raw::peer(&peer_socket);
    let owner = Raw::owner(&owner_socket);
    bench.wait_until("up", |report| report.state == "up");
    drop((owner, peer));
    window.join().unwrap();
    bench.descriptors_are(open);
}
