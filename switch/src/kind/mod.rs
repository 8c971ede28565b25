//! The kinds of device that an owner can have: all that the broker knows of what a device is for.
//! The rest of it moves memory, vrings and notifications, whatever they are for.
//!
//! | file | what it holds |
//! |---|---|
//! | [`net`] | a network card |
//! | [`block`] | a disk |
//!
//! A new kind is a [`Kind`] in a file of its own, named in [`KINDS`].

pub mod block;
pub mod net;

use serde::{Deserialize, Serialize};

/// A kind of device.
#[derive(Debug)]
pub struct Kind {
    /// The `profile` of the configuration.
    pub name: &'static str,
    /// What mistakes in the configuration call its link.
    pub table: &'static str,
    /// The virtio device number.
    pub virtio_id: u32,
    /// The keys of a link's configuration that are its own. The first says how many vrings there are.
    pub keys: &'static [&'static str],
    /// Reads these keys.
    pub read: fn(&mut dyn Keys) -> Option<Device>,
    /// The names of its features, by bit.
    pub feature_names: &'static [(u32, &'static str)],
}

/// Every kind; the first is what a link has unless its configuration says otherwise.
pub const KINDS: [&Kind; 2] = [&net::NET, &block::BLOCK];

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Kind {}

/// An owner's device, as its link's configuration has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// What kind it is of.
    #[serde(with = "by_name")]
    pub kind: &'static Kind,
    /// The features of the kind that the owner is offered, besides those of every device.
    pub features: u64,
    /// Vrings, in the numbering of the kind, from 0 on.
    pub vrings: u16,
    /// What the owner's front-end counts as queues (VHOST_USER_GET_QUEUE_NUM).
    pub queues: u16,
    /// The configuration space that its front-end asks for (VHOST_USER_GET_CONFIG), at most
    /// `MAX_OWNER_CONFIG` bytes; empty: the front-end has one of its own.
    pub config: Vec<u8>,
}

impl Device {
    /// The configuration's key that says how many vrings there are.
    pub fn vrings_key(&self) -> &'static str {
        self.kind.keys.first().copied().unwrap_or("profile")
    }
}

/// A kind in a message between processes of one program.
mod by_name {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{KINDS, Kind};

    pub fn serialize<S: Serializer>(kind: &&'static Kind, serializer: S) -> Result<S::Ok, S::Error> {
        kind.name.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<&'static Kind, D::Error> {
        let name = String::deserialize(deserializer)?;
        KINDS
            .into_iter()
            .find(|kind| kind.name == name)
            .ok_or_else(|| D::Error::custom("no kind of that name"))
    }
}

/// The keys of a link in the configuration file. What is wrong with one is noted there, and the
/// answer is `None`.
pub trait Keys {
    /// From 1 to `most`; `default` unless the file says otherwise.
    fn count(&mut self, key: &str, default: u16, most: u16) -> Option<u16>;

    /// `false` unless the file says otherwise.
    fn flag(&mut self, key: &str) -> Option<bool>;

    /// Bytes, for which `check` has no objection. The file has to say it.
    fn size(&mut self, key: &str, check: fn(u64) -> Result<(), String>) -> Option<u64>;
}

const fn bit(number: u32) -> u64 {
    1 << number
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhost_pci_device::abi;

    struct Most;

    impl Keys for Most {
        fn count(&mut self, _: &str, _: u16, most: u16) -> Option<u16> {
            Some(most)
        }

        fn flag(&mut self, _: &str) -> Option<bool> {
            Some(true)
        }

        fn size(&mut self, _: &str, _: fn(u64) -> Result<(), String>) -> Option<u64> {
            Some(1 << 40)
        }
    }

    #[test]
    fn the_largest_device_of_each_kind_fits_the_link_area() {
        for kind in KINDS {
            let device = (kind.read)(&mut Most).expect("nothing is wrong");
            assert_eq!(device.kind, kind);
            assert_eq!(device.vrings, abi::MAX_VRINGS, "{}", kind.name);
            assert!(device.config.len() <= abi::MAX_OWNER_CONFIG as usize);
            let named = kind.feature_names.iter().fold(0, |bits, (number, _)| bits | bit(*number));
            assert_eq!(device.features & !named, 0, "{}: features without a name", kind.name);
            // What is not the device's own is not its to offer (virtio 1.3, 2.2).
            assert_eq!(device.features >> 24, 0);
        }
    }
}
