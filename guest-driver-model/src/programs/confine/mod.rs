//! Programs that try whether a peer sees and changes what its owner maps, and nothing
//! else of the owner. Those of the owner work a network card through VFIO, those of the
//! peer a vhost-pci device.
//!
//! | module | what it holds | runs in the guest of |
//! |---|---|---|
//! | [`secret`] | what is looked for | |
//! | [`hold`] | keeps a secret and gives it to nobody | the owner |
//! | [`scan`] | looks for a secret in the whole window | the peer |
//! | [`mailbox`] | a page by which the next two take turns | |
//! | [`revoke`] | maps a page and takes it back, over and over | the owner |
//! | [`hammer`] | reads and writes that page all the time | the peer |
//! | [`probe`] | tries what may not be done to a page | the peer |

pub mod hammer;
pub mod hold;
pub mod mailbox;
pub mod probe;
pub mod revoke;
pub mod scan;
pub mod secret;
mod window;
