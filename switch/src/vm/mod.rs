//! `plug` and `unplug` with the VMs' QMP sockets: the link in the broker and its devices in running VMs, by the
//! operator's process and with the operator's rights. Where a step fails, those before it are taken
//! back, and the error says which VM refused and why (`docs/hotplug.md`).
//!
//! | file | what it holds |
//! |---|---|
//! | this | the order of the steps |
//! | [`device`] | one device, added or removed |
//! | [`qmp`] | the connection to a QEMU |

pub mod device;
pub mod qmp;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use thiserror::Error;

use self::device::{Place, Role, add, option, remove};
use self::qmp::{Connection, QmpError};
use crate::control::PluggedLink;
use crate::control::client::{self, ClientError};

/// The VMs whose devices come and go with the link.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct VmArgs {
    /// The QMP socket of the owner's VM: its device is plugged or unplugged, too
    #[arg(long, value_name = "SOCKET")]
    pub owner_qmp: Option<PathBuf>,
    /// QEMU's name of the port to plug the owner's device into
    #[arg(long, value_name = "BUS", requires = "owner_qmp")]
    pub owner_bus: Option<String>,
    /// A further property of the owner's device, as mac=02:00:00:00:00:01; may be given several times
    #[arg(long, value_name = "NAME=VALUE", requires = "owner_qmp", value_parser = option)]
    pub owner_option: Vec<(String, Value)>,
    /// The QMP socket of the peer's VM, likewise
    #[arg(long, value_name = "SOCKET")]
    pub peer_qmp: Option<PathBuf>,
    /// QEMU's name of the port to plug the peer's device into
    #[arg(long, value_name = "BUS", requires = "peer_qmp")]
    pub peer_bus: Option<String>,
    /// A further property of the peer's device, as iommu_platform=on; may be given several times
    #[arg(long, value_name = "NAME=VALUE", requires = "peer_qmp", value_parser = option)]
    pub peer_option: Vec<(String, Value)>,
    /// How many seconds a guest may take to let go of its device
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub guest_timeout: f64,
}

/// Why a link and its devices are not as they were to be.
#[derive(Debug, Error)]
pub enum VmError {
    /// The broker.
    #[error(transparent)]
    Broker(#[from] ClientError),
    /// The broker has no such link.
    #[error("there is no link '{link}'; there are: {}", .known.join(", "))]
    NoLink {
        /// What was asked for.
        link: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// A VM.
    #[error("the {role}'s VM ({qmp}): {why}{}", also(.undone))]
    Vm {
        /// Which.
        role: &'static str,
        /// Its QMP socket.
        qmp: String,
        /// Why.
        why: QmpError,
        /// What came of taking back what was done before.
        undone: Vec<String>,
    },
    /// The time is no time.
    #[error("--guest-timeout is not a number of seconds")]
    Timeout,
}

fn also(undone: &[String]) -> String {
    undone.iter().map(|line| format!("; {line}")).collect()
}

/// A VM that takes part.
struct Vm<'a> {
    role: Role,
    path: &'a Path,
    connection: Connection,
    place: Place,
    time: Duration,
}

impl Vm<'_> {
    fn add(&mut self, link: &PluggedLink) -> Result<(), QmpError> {
        add(&mut self.connection, link, self.role, &self.place)
    }

    fn remove(&mut self, link: &str) -> Result<(), QmpError> {
        remove(&mut self.connection, link, self.role, self.time)
    }

    fn failed(&self, why: QmpError, undone: Vec<String>) -> VmError {
        failed(self.role, self.path, why, undone)
    }

    /// What came of taking a step back, which is wanted when another VM has failed.
    fn undone(&self, done: &str, result: Result<(), QmpError>) -> String {
        let who = self.role.name();
        match result {
            Ok(()) => format!("the {who}'s device was {done} again"),
            Err(error) => format!("and the {who}'s device could not be {done} again: {error}"),
        }
    }
}

fn failed(role: Role, path: &Path, why: QmpError, undone: Vec<String>) -> VmError {
    VmError::Vm { role: role.name(), qmp: path.display().to_string(), why, undone }
}

impl VmArgs {
    fn vm(&self, role: Role) -> Result<Option<Vm<'_>>, VmError> {
        let (path, bus, options) = match role {
            Role::Owner => (&self.owner_qmp, &self.owner_bus, &self.owner_option),
            Role::Peer => (&self.peer_qmp, &self.peer_bus, &self.peer_option),
        };
        let Some(path) = path else { return Ok(None) };
        let time = Duration::try_from_secs_f64(self.guest_timeout).map_err(|_| VmError::Timeout)?;
        let connection = Connection::open(path).map_err(|error| failed(role, path, error, Vec::new()))?;
        let place = Place { bus: bus.clone(), options: options.clone() };
        Ok(Some(Vm { role, path, connection, place, time }))
    }
}

/// Begins a link, and then plugs its device into the peer's VM, and its device into the owner's.
///
/// # Errors
/// When a step fails. Those before it are taken back then, and what came of that is said.
pub fn plug(socket: &Path, link: &str, args: &VmArgs) -> Result<PluggedLink, VmError> {
    // Who cannot be asked is found out before anything changes.
    let (mut peer, mut owner) = (args.vm(Role::Peer)?, args.vm(Role::Owner)?);
    let link = client::plug(socket, link)?;
    let end = || match client::unplug(socket, &link.name) {
        Ok(()) => "the link was unplugged again".to_owned(),
        Err(error) => format!("and the link could not be unplugged again: {error}"),
    };
    if let Some(peer) = &mut peer
        && let Err(error) = peer.add(&link)
    {
        return Err(peer.failed(error, vec![end()]));
    }
    if let Some(owner) = &mut owner
        && let Err(error) = owner.add(&link)
    {
        let mut undone = Vec::new();
        if let Some(peer) = &mut peer {
            let result = peer.remove(&link.name);
            undone.push(peer.undone("unplugged", result));
        }
        undone.push(end());
        return Err(owner.failed(error, undone));
    }
    Ok(link)
}

/// Unplugs a link's device from the owner's VM, and from the peer's, and then ends the link.
///
/// # Errors
/// When a step fails. Those before it are taken back then, and what came of that is said.
pub fn unplug(socket: &Path, link: &str, args: &VmArgs) -> Result<(), VmError> {
    let (mut peer, mut owner) = (args.vm(Role::Peer)?, args.vm(Role::Owner)?);
    let report = client::status(socket)?;
    let names = report.links.iter().map(|known| known.name.clone()).collect();
    let known = report.links.into_iter().find(|known| known.name == link);
    let known = known.ok_or_else(|| VmError::NoLink { link: link.into(), known: names })?;
    let known = PluggedLink {
        name: known.name,
        owner_socket: known.owner.socket.into(),
        peer_socket: known.peer.socket.into(),
        profile: known.device,
        vrings: known.max_vrings,
    };
    if let Some(owner) = &mut owner
        && let Err(error) = owner.remove(link)
    {
        return Err(owner.failed(error, vec!["nothing else was changed".into()]));
    }
    if let Some(peer) = &mut peer
        && let Err(error) = peer.remove(link)
    {
        let undone = owner.as_mut().map(|owner| {
            let result = owner.add(&known);
            owner.undone("plugged", result)
        });
        return Err(peer.failed(error, undone.into_iter().chain(["the link stays".into()]).collect()));
    }
    Ok(client::unplug(socket, link)?)
}
