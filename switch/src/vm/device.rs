//! One link's device in a running VM: what QEMU is told to add and to remove, in each role. Adding is done whole,
//! or taken back.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use qapi::Dictionary;
use qapi::qmp;
use serde_json::{Value, json};

use super::qmp::{Connection, QmpError};
use crate::control::PluggedLink;
use crate::kind::net::NET;

/// The name that QEMU has for virtio device 38, of which it and Linux know no more: the peer's device.
const PEER_VIRTIO_ID: u32 = 38;
/// Bytes of its config space.
const PEER_CONFIG_LEN: u32 = 64;
/// How long QEMU may take to let go of a connection whose device is gone.
const BUSY: Duration = Duration::from_secs(5);
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// Whose device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The VM whose memory is shared.
    Owner,
    /// The VM that sees it.
    Peer,
}

impl Role {
    /// For people, and in QEMU's names.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Peer => "peer",
        }
    }
}

/// Where and how a device is plugged.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// QEMU's name of a free port that can be plugged into.
    pub bus: Option<String>,
    /// Further properties of the device.
    pub options: Vec<(String, Value)>,
}

/// A property as on QEMU's command line: `on` and `off` are what they say, numbers numbers.
///
/// # Errors
/// When it is no `NAME=VALUE`.
pub fn option(text: &str) -> Result<(String, Value), String> {
    let (name, value) =
        text.split_once('=').ok_or("a property is written NAME=VALUE, as iommu_platform=on")?;
    let value = match (value, value.parse::<i64>()) {
        ("on", _) => json!(true),
        ("off", _) => json!(false),
        (_, Ok(number)) => json!(number),
        (text, _) => json!(text),
    };
    Ok((name.into(), value))
}

/// The name of everything that is added for a link.
fn name(link: &str, role: Role) -> String {
    format!("vp-{link}-{}", role.name())
}

/// Adds the link's device.
///
/// # Errors
/// When QEMU refuses a step, or does not answer. What was added before is removed then, if it answers.
pub fn add(vm: &mut Connection, link: &PluggedLink, role: Role, place: &Place) -> Result<(), QmpError> {
    let id = name(&link.name, role);
    vm.run(&qmp::chardev_add { id: id.clone(), backend: backend(link, role) })?;
    let added = netdev(link, role, &id)
        .map_or(Ok(()), |netdev| vm.run(&qmp::netdev_add(netdev)).map(drop))
        .and_then(|()| vm.run(&device(link, role, &id, place)).map(drop));
    if let Err(error) = &added
        && !error.is_final()
    {
        // What is there of it.
        let _ = vm.run(&qmp::netdev_del { id: id.clone() });
        let _ = remove_chardev(vm, &id);
    }
    added
}

/// Removes the link's device, when its guest has let go of it; and where it has let go of it before, as one that
/// took longer than it had, what is left.
///
/// # Errors
/// When there is nothing of it, its guest does not let go of it within `time`, or QEMU does not answer.
pub fn remove(vm: &mut Connection, link: &str, role: Role, time: Duration) -> Result<(), QmpError> {
    let id = name(link, role);
    let missing = match vm.run(&qmp::device_del { id: id.clone() }) {
        Err(error) if error.is_missing() => Some(error),
        result => {
            result?;
            vm.wait_deleted(&id, time)?;
            None
        }
    };
    // Only cards have a netdev.
    let had_netdev = was_there(vm.run(&qmp::netdev_del { id: id.clone() }))?;
    let had_chardev = remove_chardev(vm, &id)?;
    match missing {
        Some(error) if !had_netdev && !had_chardev => Err(error),
        _ => Ok(()),
    }
}

/// QEMU lets go of a connection a moment after the device. Says whether there was one: QEMU 11.1 removes that of a
/// card together with its netdev.
fn remove_chardev(vm: &mut Connection, id: &str) -> Result<bool, QmpError> {
    let deadline = Instant::now() + BUSY;
    loop {
        match was_there(vm.run(&qmp::chardev_remove { id: id.into() })) {
            Err(QmpError::Refused { .. }) if Instant::now() < deadline => thread::sleep(BUSY_PAUSE),
            result => return result,
        }
    }
}

/// Whether what was to be removed was there.
fn was_there<T>(removed: Result<T, QmpError>) -> Result<bool, QmpError> {
    match removed {
        Ok(_) => Ok(true),
        Err(error) if error.is_missing() => Ok(false),
        Err(error) => Err(error),
    }
}

fn backend(link: &PluggedLink, role: Role) -> qmp::ChardevBackend {
    let path: &Path = match role {
        Role::Owner => &link.owner_socket,
        Role::Peer => &link.peer_socket,
    };
    let path = qmp::UnixSocketAddress { abstract_: None, tight: None, path: path.display().to_string() };
    let socket = qmp::ChardevSocket {
        base: qmp::ChardevCommon::default(),
        addr: qmp::SocketAddressLegacy::unix(path.into()),
        server: Some(false),
        nodelay: None,
        reconnect: None,
        telnet: None,
        tls_authz: None,
        tls_creds: None,
        tn3270: None,
        wait: None,
        websocket: None,
    };
    qmp::ChardevBackend::socket(socket.into())
}

fn is_card(link: &PluggedLink, role: Role) -> bool {
    role == Role::Owner && link.profile == NET.name
}

fn netdev(link: &PluggedLink, role: Role, id: &str) -> Option<qmp::Netdev> {
    is_card(link, role).then(|| qmp::Netdev::vhost_user {
        id: id.into(),
        vhost_user: qmp::NetdevVhostUserOptions {
            chardev: id.into(),
            queues: Some(i64::from(link.vrings / 2)),
            vhostforce: None,
        },
    })
}

fn device(link: &PluggedLink, role: Role, id: &str, place: &Place) -> qmp::device_add {
    let mut properties = Dictionary::new();
    let mut set = |name: &str, value: Value| drop(properties.insert(name.into(), value));
    let driver = match role {
        Role::Peer => {
            set("chardev", json!(id));
            set("virtio-id", json!(PEER_VIRTIO_ID));
            set("num_vqs", json!(1 + link.vrings));
            set("config_size", json!(PEER_CONFIG_LEN));
            "vhost-user-test-device-pci"
        }
        Role::Owner if is_card(link, role) => {
            set("netdev", json!(id));
            set("disable-legacy", json!("on"));
            if link.vrings > 2 {
                // Two vectors a pair, and two more.
                set("mq", json!(true));
                set("vectors", json!(link.vrings + 2));
            }
            "virtio-net-pci"
        }
        Role::Owner => {
            set("chardev", json!(id));
            set("num-queues", json!(link.vrings));
            "vhost-user-blk-pci"
        }
    };
    for (name, value) in &place.options {
        set(name, value.clone());
    }
    qmp::device_add {
        driver: driver.into(),
        bus: place.bus.clone(),
        id: Some(id.into()),
        arguments: properties,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn properties_are_written_as_on_qemus_command_line() {
        assert_eq!(option("ats=on").unwrap(), ("ats".into(), json!(true)));
        assert_eq!(option("mq=off").unwrap(), ("mq".into(), json!(false)));
        assert_eq!(option("vectors=6").unwrap(), ("vectors".into(), json!(6)));
        assert_eq!(option("mac=02:00:00:00:00:01").unwrap().1, json!("02:00:00:00:00:01"));
        assert!(option("ats").is_err());
    }

    fn added(profile: &str, vrings: u16, role: Role) -> Value {
        let link =
            PluggedLink { name: "l".into(), profile: profile.into(), vrings, ..PluggedLink::default() };
        let place = Place { bus: Some("rp".into()), options: vec![option("ats=on").unwrap()] };
        serde_json::to_value(device(&link, role, "vp-l", &place)).unwrap()
    }

    #[test]
    fn each_role_and_kind_has_its_device() {
        let card = added("net", 4, Role::Owner);
        assert_eq!(
            (&card["driver"], &card["mq"], &card["vectors"]),
            (&json!("virtio-net-pci"), &json!(true), &json!(6))
        );
        assert_eq!((&card["bus"], &card["ats"], &card["id"]), (&json!("rp"), &json!(true), &json!("vp-l")));
        assert_eq!(added("block", 1, Role::Owner)["driver"], "vhost-user-blk-pci");
        let peer = added("net", 2, Role::Peer);
        assert_eq!((&peer["virtio-id"], &peer["num_vqs"]), (&json!(38), &json!(3)));
    }
}
