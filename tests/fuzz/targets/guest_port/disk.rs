//! A disk in memory, of which every so many accesses fail, and what a driver asks of it.

use std::io;

use guest_driver_model::blk::request::{ID_LEN, Limits};
use guest_driver_model::blk::{self, BlkPort};
use guest_driver_model::control::Exchange;
use guest_driver_model::port::Port;

use crate::VRINGS;

/// Bytes of the disk.
pub const CAPACITY: u64 = 32 << 10;
/// Accesses from one that fails to the next.
const FAILS: u32 = 23;

/// The disk.
pub struct Disk {
    bytes: Vec<u8>,
    accesses: u32,
}

impl Default for Disk {
    fn default() -> Self {
        Self { bytes: vec![0; CAPACITY as usize], accesses: 0 }
    }
}

impl Disk {
    fn access(&mut self) -> io::Result<()> {
        self.accesses += 1;
        if self.accesses.is_multiple_of(FAILS) { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }
}

impl blk::Disk for Disk {
    fn limits(&self) -> Limits {
        Limits { len: CAPACITY, read_only: false }
    }

    fn id(&self) -> [u8; ID_LEN] {
        [b'f'; ID_LEN]
    }

    // A range beyond its end is a panic.
    fn read_at(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.access()?;
        into.copy_from_slice(&self.bytes[at as usize..][..into.len()]);
        Ok(())
    }

    fn write_at(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        self.access()?;
        self.bytes[at as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.access()
    }
}

/// One call of the driver that serves it.
pub fn step(port: &mut BlkPort, disk: &mut Disk, exchange: &mut dyn Exchange, choice: u8, budget: usize) {
    let vring = u16::from(choice >> 2 & 7);
    match choice & 3 {
        0 | 1 => {
            for _ in 0..budget % 16 {
                let before = port.counters().requests;
                let Ok(served) = port.serve(exchange, vring, disk) else { break };
                assert_eq!(port.counters().requests, before + u64::from(served));
                if !served {
                    break;
                }
            }
        }
        2 => {
            let _ = port.set_kicks(vring, budget & 1 != 0);
        }
        _ => {
            let _ = (port.needs_call(vring), port.pause(), port.demand());
        }
    }
    assert!(port.faults().len() <= VRINGS);
}
