//! Programs that obey no rule: what the other VM, the broker and other links have to bear. Each
//! breaks, attack by attack, what the specifications forbid.
//!
//! | module | what it holds | runs in the guest of |
//! |---|---|---|
//! | [`owner`] | a card whose rings are forged, between times of honest traffic | the owner |
//! | [`owner_attacks`] | each attack of it | the owner |
//! | [`forge`] | descriptors that nobody should write | |
//! | [`peer`] | a vhost-pci device that is written all over | the peer |
//! | [`peer_attacks`] | each attack of it | the peer |
//! | [`random`] | numbers that a seed decides | |

pub mod forge;
pub mod owner;
pub mod owner_attacks;
pub mod peer;
pub mod peer_attacks;
pub mod random;
