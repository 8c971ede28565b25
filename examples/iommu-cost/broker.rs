//! The broker's process.

use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, bail};
use vhost_pci_switch::config;
use vhost_pci_switch::runtime::broker::Broker;

use crate::child::{self, Child};

/// The links: with a peer's VMM that is strict, and with one like QEMU.
pub const LINKS: [&str; 2] = ["strict", "qemu"];

/// Starts the process and waits until it listens.
///
/// # Errors
/// If it does not.
pub fn start(folder: &Path) -> anyhow::Result<Child> {
    let child =
        Child::start(&["broker", folder.to_str().context("the folder for sockets has no plain name")?])?;
    (&child.stream).read_exact(&mut [0]).context("the broker does not start")?;
    Ok(child)
}

/// The process.
///
/// # Errors
/// If the broker does not start.
pub fn run(folder: &Path) -> anyhow::Result<()> {
    let mut parent = child::parent()?;
    let folder = folder.display();
    let mut text = format!("control_socket = \"{folder}/control.sock\"\n");
    for link in LINKS {
        text += &format!(
            "[[link]]\nname = \"{link}\"\nowner_socket = \"{folder}/{link}-owner.sock\"\n\
             peer_socket = \"{folder}/{link}-peer.sock\"\nwindow = \"64M\"\n"
        );
    }
    let config = match config::parse(&text) {
        Ok(config) => config,
        Err(mistakes) => bail!("the configuration has mistakes: {mistakes:?}"),
    };
    let broker = Broker::start(&config)?;
    parent.write_all(b".")?;
    // Until the parent is gone.
    let _ = parent.read(&mut [0]);
    drop(broker);
    Ok(())
}
