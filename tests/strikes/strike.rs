//! What can befall a process, and how it is undone.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use vhost_pci_tests::Random;

use crate::bed::{Bed, CONFIRM_MS, Role};

/// A kind of strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    OwnerKilled,
    OwnerRebooted,
    OwnerStopped,
    PeerKilled,
    PeerRebooted,
    PeerStopped,
    BrokerKilled,
    BrokerStopped,
}

impl Kind {
    pub const ALL: [Self; 8] = [
        Self::OwnerKilled,
        Self::OwnerRebooted,
        Self::OwnerStopped,
        Self::PeerKilled,
        Self::PeerRebooted,
        Self::PeerStopped,
        Self::BrokerKilled,
        Self::BrokerStopped,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::OwnerKilled => "owner killed",
            Self::OwnerRebooted => "owner rebooted",
            Self::OwnerStopped => "owner stopped",
            Self::PeerKilled => "peer killed",
            Self::PeerRebooted => "peer rebooted",
            Self::PeerStopped => "peer stopped",
            Self::BrokerKilled => "broker killed",
            Self::BrokerStopped => "broker stopped",
        }
    }

    pub fn role(self) -> Role {
        match self {
            Self::OwnerKilled | Self::OwnerRebooted | Self::OwnerStopped => Role::Owner,
            Self::PeerKilled | Self::PeerRebooted | Self::PeerStopped => Role::Peer,
            Self::BrokerKilled | Self::BrokerStopped => Role::Broker,
        }
    }

    /// Whether the process ends.
    pub fn ends(self) -> bool {
        !matches!(self, Self::OwnerStopped | Self::PeerStopped | Self::BrokerStopped)
    }
}

/// A strike, and when it is undone.
#[derive(Clone, Copy, Debug)]
pub struct Strike {
    pub kind: Kind,
    /// So long the process is dead or stopped.
    pub lasts: Duration,
}

impl Strike {
    /// Any of these kinds, of which there is one at least.
    pub fn any(random: &mut Random, kinds: &[Kind]) -> Self {
        let kind = *random.one(kinds);
        let lasts = match (kind.ends(), random.below(1000)) {
            (true, 0..300) => Duration::ZERO,
            (true, _) => random.between_ms(0, 300),
            (false, 0..700) => random.between_ms(2, 200),
            // Longer than a change of the window may take, and than an owner waits for it.
            (false, 700..980) => random.between_ms(CONFIRM_MS, 3 * CONFIRM_MS),
            // Longer than anybody waits for an answer.
            (false, _) => random.between_ms(10_200, 11_000),
        };
        Self { kind, lasts }
    }

    /// It happens.
    pub fn begin(self, bed: &mut Bed) -> Result<Falling> {
        match self.kind {
            Kind::OwnerKilled => bed.struck.owner.end()?,
            Kind::PeerKilled => bed.struck.peer.end()?,
            Kind::BrokerKilled => bed.broker.take().context("there is no broker")?.kill()?,
            Kind::OwnerRebooted | Kind::PeerRebooted => bed.signal(self.kind.role(), Signal::SIGTERM)?,
            Kind::OwnerStopped | Kind::PeerStopped | Kind::BrokerStopped => {
                bed.signal(self.kind.role(), Signal::SIGSTOP)?;
            }
        }
        Ok(Falling { strike: self, since: Instant::now() })
    }
}

/// A strike that is not undone yet.
pub struct Falling {
    pub strike: Strike,
    since: Instant,
}

impl Falling {
    /// Undoes it, if it is time. Whether it is undone.
    pub fn undo(&self, bed: &mut Bed, random: &mut Random) -> Result<bool> {
        if self.since.elapsed() < self.strike.lasts {
            return Ok(false);
        }
        match self.strike.kind {
            Kind::OwnerRebooted | Kind::PeerRebooted => {
                let role = self.strike.kind.role();
                let process = bed.process(role).context("it does not run")?;
                // It may wait for a process that is stopped.
                let Some(status) = process.exited()? else { return Ok(false) };
                ensure!(status.success(), "{}: {status}\n{}", process.name(), process.log());
                match role {
                    Role::Owner => bed.struck.owner.end()?,
                    _ => bed.struck.peer.end()?,
                }
                bed.start_program(role, random)?;
            }
            Kind::OwnerKilled | Kind::PeerKilled => bed.start_program(self.strike.kind.role(), random)?,
            Kind::BrokerKilled => bed.start_broker()?,
            Kind::OwnerStopped | Kind::PeerStopped | Kind::BrokerStopped => {
                bed.signal(self.strike.kind.role(), Signal::SIGCONT)?;
            }
        }
        Ok(true)
    }
}
