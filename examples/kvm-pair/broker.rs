//! The broker's process: the real broker, as a library.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use vhost_pci_switch::config;
use vhost_pci_switch::control::client;
use vhost_pci_switch::link::report::LinkReport;
use vhost_pci_switch::runtime::broker::Broker;

use crate::child::{Child, Parent};

/// The process, as its parent sees it.
#[derive(Debug)]
pub struct BrokerProcess {
    /// The process.
    pub process: Child,
    folder: PathBuf,
}

impl BrokerProcess {
    /// Starts it with these links, and the other lines of the configuration for each.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(folder: &Path, links: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mut text = format!("control_socket = {:?}\n", control(folder));
        for (name, more) in links {
            text += &format!(
                "[[link]]\nname = {name:?}\nowner_socket = {:?}\npeer_socket = {:?}\n{more}\n",
                owner_socket(folder, name),
                peer_socket(folder, name),
            );
        }
        let file = folder.join("broker.toml");
        std::fs::write(&file, text)?;
        let file = file.to_str().context("the folder for sockets has no plain name")?;
        Ok(Self { process: Child::start(&["broker", file])?, folder: folder.into() })
    }

    /// What its `status` says of a link.
    ///
    /// # Errors
    /// If it does not answer, or has no such link.
    pub fn link(&self, name: &str) -> anyhow::Result<LinkReport> {
        let report = client::status(&control(&self.folder))?;
        report.links.into_iter().find(|link| link.name == name).context("the broker lacks the link")
    }
}

/// Where an owner's VMM connects.
pub fn owner_socket(folder: &Path, link: &str) -> PathBuf {
    folder.join(format!("{link}-owner.sock"))
}

/// Where a peer's VMM connects.
pub fn peer_socket(folder: &Path, link: &str) -> PathBuf {
    folder.join(format!("{link}-peer.sock"))
}

fn control(folder: &Path) -> PathBuf {
    folder.join("control.sock")
}

/// The process.
///
/// # Errors
/// If the broker does not start.
pub fn run(parent: &Parent, file: &Path) -> anyhow::Result<()> {
    let config = match config::parse(&std::fs::read_to_string(file)?) {
        Ok(config) => config,
        Err(mistakes) => bail!("the configuration has mistakes: {mistakes:?}"),
    };
    let broker = Broker::start(&config)?;
    parent.obey(|_, line| bail!("{line:?} is nothing to do"))?;
    drop(broker);
    Ok(())
}
