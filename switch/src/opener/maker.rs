//! Makes the sockets that a configuration names, and removes what it made. Whoever has one may
//! write to the sockets' folders.

use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::unistd::Group;

use super::OpenError;
use super::socket::{self, Made};
use crate::config::{self, Config, LinkConfig};
use crate::link::Side;
use crate::runtime::admission::Rule;

/// A link's sockets, and what is to be known to serve them.
#[derive(Debug)]
pub struct Opened {
    /// The link's part of the configuration.
    pub config: LinkConfig,
    /// Who may be the owner.
    pub owner_rule: Rule,
    /// Who may be the peer, and its doorbell function.
    pub peer_rule: Rule,
    /// The owner's socket, the peer's, and the doorbell function's if there is one.
    pub listeners: Vec<UnixListener>,
}

/// Makes sockets. Dropping it removes those that it made.
#[derive(Debug)]
pub struct Maker {
    /// Where the configuration is read, if it may be read again.
    file: Option<PathBuf>,
    /// As it was read last.
    config: Config,
    /// As it was at the start: all sockets are of one group.
    group: Option<Group>,
    control: Option<Made>,
    links: HashMap<String, Vec<Made>>,
}

impl Maker {
    /// One for this configuration, which is that of `file`.
    ///
    /// # Errors
    /// When the sockets' group is none.
    pub fn new(config: Config, file: Option<&Path>) -> Result<Self, OpenError> {
        let group = socket::group(config.group.as_deref())?;
        let file = file.map(Path::to_owned);
        Ok(Self { file, config, group, control: None, links: HashMap::new() })
    }

    /// Reads the configuration anew: links are opened by it from now on.
    ///
    /// # Errors
    /// When it has mistakes, or there is no file. That of before holds then.
    pub fn read(&mut self) -> Result<Config, OpenError> {
        let file = self.file.as_deref().ok_or(OpenError::NoFile)?;
        self.config = config::load(file)?;
        Ok(self.config.clone())
    }

    /// Makes the control socket.
    ///
    /// # Errors
    /// When it cannot be listened on.
    pub fn control(&mut self) -> Result<UnixListener, OpenError> {
        let (listener, made) = socket::bind(&self.config.control_socket, self.group.as_ref())?;
        self.control = Some(made);
        Ok(listener)
    }

    /// Makes the sockets of a link that the configuration names.
    ///
    /// # Errors
    /// When it does not, or they cannot all be listened on, or a rule names somebody whom the host does
    /// not know. Nothing is left behind then.
    pub fn open(&mut self, link: &str) -> Result<Opened, OpenError> {
        let Some(config) = self.config.links.iter().find(|config| config.name == link) else {
            return Err(OpenError::NoLink {
                link: link.into(),
                known: self.config.links.iter().map(|link| link.name.clone()).collect(),
            });
        };
        if self.links.contains_key(link) {
            return Err(OpenError::Twice(link.into()));
        }
        let (owner_rule, peer_rule) = (Rule::new(config, Side::Owner)?, Rule::new(config, Side::Peer)?);
        let (mut listeners, mut made) = (Vec::new(), Vec::new());
        for path in sockets(config) {
            match socket::bind(path, self.group.as_ref()) {
                Ok((listener, socket)) => {
                    listeners.push(listener);
                    made.push(socket);
                }
                Err(error) => {
                    made.into_iter().for_each(Made::remove);
                    listeners.into_iter().for_each(socket::abandon);
                    return Err(error.into());
                }
            }
        }
        self.links.insert(link.into(), made);
        Ok(Opened { config: config.clone(), owner_rule, peer_rule, listeners })
    }

    /// Removes the sockets of a link.
    pub fn close(&mut self, link: &str) {
        self.links.remove(link).into_iter().flatten().for_each(Made::remove);
    }

    /// Removes all.
    pub fn close_all(&mut self) {
        let links = self.links.drain().flat_map(|(_, made)| made);
        self.control.take().into_iter().chain(links).for_each(Made::remove);
    }

    /// Leaves all where they are, for the next broker to replace.
    pub fn abandon(&mut self) {
        self.links.clear();
        self.control = None;
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        self.close_all();
    }
}

/// The paths of a link's sockets, in the order of [`Opened::listeners`].
pub fn sockets(link: &LinkConfig) -> impl Iterator<Item = &PathBuf> {
    [Some(&link.owner_socket), Some(&link.peer_socket), link.doorbell_socket.as_ref()].into_iter().flatten()
}

/// The folders of a configuration's sockets, each once.
pub fn folders(config: &Config) -> Vec<PathBuf> {
    let paths = config.links.iter().flat_map(sockets).chain([&config.control_socket]);
    let mut folders: Vec<_> = paths.filter_map(|socket| socket.parent()).map(Path::to_owned).collect();
    folders.sort();
    folders.dedup();
    folders
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn config(folder: &Path, links: &[&str]) -> Config {
        let at = |name: String| folder.join(name).display().to_string();
        let mut text = format!("control_socket = {:?}\n", at("control".into()));
        for link in links {
            let (owner, peer) = (at(format!("{link}-o")), at(format!("{link}-p")));
            text += &format!("[[link]]\nname = {link:?}\nowner_socket = {owner:?}\npeer_socket = {peer:?}\n");
        }
        config::parse(&text).unwrap()
    }

    #[test]
    fn only_links_of_the_configuration_are_opened_and_each_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut maker = Maker::new(config(folder.path(), &["a", "b"]), None).unwrap();
        let opened = maker.open("a").unwrap();
        assert_eq!((opened.listeners.len(), opened.config.name.as_str()), (2, "a"));
        assert!(matches!(maker.open("a"), Err(OpenError::Twice(_))));
        let error = maker.open("c").unwrap_err().to_string();
        assert!(error.contains("no link 'c'; it has: a, b"), "{error}");
        maker.close("a");
        assert!(!folder.path().join("a-o").exists() && !folder.path().join("a-p").exists());
        assert!(maker.open("a").is_ok());
    }

    #[test]
    fn a_link_whose_second_socket_is_taken_leaves_no_first_one() {
        let folder = tempfile::tempdir().unwrap();
        let mut maker = Maker::new(config(folder.path(), &["a"]), None).unwrap();
        std::fs::write(folder.path().join("a-p"), "mine").unwrap();
        assert!(maker.open("a").is_err());
        assert!(!folder.path().join("a-o").exists());
        std::fs::remove_file(folder.path().join("a-p")).unwrap();
        let opened = maker.open("a").unwrap();
        drop(maker);
        drop(opened);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_folders_of_all_sockets_are_each_named_once() {
        let config = config::parse(
            "control_socket = \"/run/c/s\"\n[[link]]\nname = \"l\"\nowner_socket = \"/run/o/1\"\n\
             peer_socket = \"/run/c/p\"\ndoorbell_socket = \"/run/d/d\"\n",
        )
        .unwrap();
        assert_eq!(folders(&config), ["/run/c", "/run/d", "/run/o"].map(PathBuf::from));
    }
}
