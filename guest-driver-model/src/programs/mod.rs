//! The programs of `vhost-pci-guest`: what runs in guests, and what stands in for
//! them where no VM is started.
//!
//! | module | what it does |
//! |---|---|
//! | [`tap`], [`echo`], [`sink`], [`generate`] | a peer's work on packets |
//! | [`forward`], [`bridge`] | a peer's work between two owners, and between many |
//! | [`blk`] | is the owner's disk |
//! | [`show`] | prints what the device and the link look like |
//! | [`owner`], [`ping`] | an owner without a VM; how long its packets take to the peer and back |
//! | [`owner_forward`] | one with two cards, between two peers |
//! | [`vf`] | lends an owner's buffers to a network card of the peer |
//! | [`vfio_owner`] | an owner's driver in its guest, behind the guest's IOMMU |
//! | [`confine`] | try whether a peer is confined to what its owner maps |
//! | [`hostile`] | break every rule there is |
//! | [`datagrams`] | exchanges datagrams through the guest's kernel |
//! | [`disk_check`] | writes blocks that can be checked, and checks them |
//! | [`peer_loop`] | the main loop of the peers |
//! | [`run`], [`owner_args`] | what several of them can be told, and do alike |
//! | [`device`], [`wire`], [`waiting`], [`stop`], [`traffic`], [`quiet`] | its parts |
//! | [`quantity`] | numbers of the command line |
//! | [`pattern`], [`source`] | packets that can be checked |
//! | [`unrest`] | pauses, for tests of waking up |
//!
//! Results go to stdout, messages to stderr (`RUST_LOG` chooses which). Exit status 0
//! means that the program did what it was asked until it was asked to end; packets
//! lost or corrupted are in the counters, not in the status.

mod allowance;
pub mod blk;
pub mod bridge;
pub mod confine;
pub mod datagrams;
pub mod device;
pub mod disk_check;
pub mod echo;
mod error;
pub mod forward;
pub mod generate;
pub mod hostile;
mod live;
pub mod owner;
pub mod owner_args;
pub mod owner_forward;
pub mod pattern;
pub mod peer_loop;
pub mod ping;
pub mod quantity;
pub mod quiet;
pub mod run;
mod session;
pub mod show;
pub mod sink;
pub mod source;
pub mod stop;
mod sys;
mod tally;
pub mod tap;
pub mod traffic;
pub mod unrest;
pub mod vf;
pub mod vfio_owner;
pub mod waiting;
pub mod wire;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};

use clap::Parser;
use tracing_subscriber::EnvFilter;

pub use self::error::ProgramError;

/// Drives a vhost-pci device from a guest, or stands in for a guest and its VMM.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "vhost-pci-guest", version, no_binary_name = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub program: Program,
}

/// A program with what it was told.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Program {
    /// Give Linux a network interface to the owner
    ///
    /// On a link with `offloads = true` in the broker's configuration the kernel and the owner leave
    /// checksums and segments to each other, as far as the owner's driver accepts that.
    Tap(tap::TapArgs),
    /// Send each packet back to its owner
    Echo(echo::EchoArgs),
    /// Count and check what the owner sends
    Sink(sink::SinkArgs),
    /// Send packets to the owner
    Gen(generate::GenArgs),
    /// Pass the packets of two owners on to each other
    Forward(forward::ForwardArgs),
    /// Be a learning switch between owners, each of which has a device
    Bridge(bridge::BridgeArgs),
    /// Be the owner's disk, whose bytes are in a file or device of this guest
    ///
    /// The link has `profile = "block"` and the disk's size in the broker's configuration.
    Blk(blk::BlkArgs),
    /// Put a network card of this VM in front of the owner: the card reads and writes the owner's memory
    ///
    /// The card, a virtio one as SmartNICs offer as virtual functions, is driven through VFIO, and so is the
    /// vhost-pci device. It reaches what the owner lets its own card reach, and nothing else of the owner; no
    /// processor copies a packet.
    Vf(vf::VfArgs),
    /// Print what the device and the link look like, as JSON
    Show(show::ShowArgs),
    /// Be an owner without a VM
    Owner(owner::OwnerArgs),
    /// Be an owner without a VM that passes the packets of two cards on to each other
    OwnerForward(owner_forward::OwnerForwardArgs),
    /// Be the driver of an owner's network card, through VFIO in its guest
    VfioOwner(vfio_owner::VfioOwnerArgs),
    /// Test: keep a secret in the owner's memory
    Hold(confine::hold::HoldArgs),
    /// Test: map a page for the owner's card and take it back, over and over
    Revoke(confine::revoke::RevokeArgs),
    /// Test: look for a secret in every page of the window
    Scan(confine::scan::ScanArgs),
    /// Test: read and write the page that `revoke` maps, also when it is gone
    Hammer(confine::hammer::HammerArgs),
    /// Test: try what may not be done to a page
    Probe(confine::probe::ProbeArgs),
    /// Test: be an owner's driver that breaks what the specification demands of it
    HostileOwner(hostile::owner::HostileOwnerArgs),
    /// Test: be a peer's driver that does
    HostilePeer(hostile::peer::HostilePeerArgs),
    /// Test: exchange datagrams with another guest through both kernels, and check them
    Datagrams(datagrams::DatagramsArgs),
    /// Test: write blocks of a file at random places, and check them
    DiskCheck(disk_check::DiskCheckArgs),
}

impl Program {
    /// Runs the program to its end.
    ///
    /// # Errors
    /// If it cannot do what it is for.
    pub fn run(&self) -> Result<(), ProgramError> {
        match self {
            Self::Tap(args) => tap::run(args),
            Self::Echo(args) => echo::run(args),
            Self::Sink(args) => sink::run(args),
            Self::Gen(args) => generate::run(args),
            Self::Forward(args) => forward::run(args),
            Self::Bridge(args) => bridge::run(args),
            Self::Blk(args) => blk::run(args),
            Self::Vf(args) => vf::run(args),
            Self::Show(args) => show::run(args),
            Self::Owner(args) => owner::run(args),
            Self::OwnerForward(args) => owner_forward::run(args),
            Self::VfioOwner(args) => vfio_owner::run(args),
            Self::Hold(args) => confine::hold::run(args),
            Self::Revoke(args) => confine::revoke::run(args),
            Self::Scan(args) => confine::scan::run(args),
            Self::Hammer(args) => confine::hammer::run(args),
            Self::Probe(args) => confine::probe::run(args),
            Self::HostileOwner(args) => hostile::owner::run(args),
            Self::HostilePeer(args) => hostile::peer::run(args),
            Self::Datagrams(args) => datagrams::run(args),
            Self::DiskCheck(args) => disk_check::run(args),
        }
    }
}

/// All of `main`, for arguments without the program's name. A mistake in them, and
/// `--help`, end the process.
///
/// # Errors
/// What the program ends with, if it cannot do what it is for.
pub fn main<I>(args: I) -> anyhow::Result<()>
where
    I: IntoIterator<Item: Into<OsString> + Clone>,
{
    let args = Args::try_parse_from(args).unwrap_or_else(|error| error.exit());
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A caller that has set up its own messages keeps them.
    let messages = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = messages.without_time().with_ansi(std::io::stderr().is_terminal()).with_target(false).try_init();
    // Its message holds its causes: printed with the chain of sources, they would come twice.
    args.program.run().map_err(|error| anyhow::Error::msg(error.to_string()))
}

/// A line on stdout. Whoever stops reading has seen enough.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_device_or_a_socket_is_chosen_not_both() {
        let parse = |line: &str| Args::try_parse_from(line.split(' '));
        assert!(parse("sink --socket /x --wait interrupt --seconds 2 --json").is_ok());
        assert!(parse("echo --socket /x --wait adaptive=20 --pauses-us 2000").is_ok());
        assert!(parse("echo --socket /x --wait sometimes").is_err());
        assert!(parse("tap --device auto --vfio --ifname vp1 --mtu 9000").is_ok());
        assert!(parse("echo --device auto --socket /x").is_err());
        assert!(parse("gen --vfio").is_err());
        assert!(parse("owner --socket /x --mode echo-check --wait adaptive --guest-start 0").is_ok());
        assert!(parse("owner --socket /x --guest-start x").is_err());
        assert!(parse("owner --socket /x --seconds 1.5 --rate 0.5 --memory-mib 1 --size 1514").is_ok());
        assert!(parse("forward --socket /x --socket /y --wait adaptive --json").is_ok());
        assert!(parse("forward --device 0000:00:03.0 --device 0000:00:04.0 --vfio").is_ok());
        assert!(
            parse("bridge --socket /x --socket /y --socket /z --ageing 10 --flood-limit 100 --json").is_ok()
        );
        assert!(parse("bridge --device all --vfio --wait interrupt --stations 16 --reconnect").is_ok());
        assert!(parse("owner-forward --socket /x --socket /y").is_ok());
        assert!(parse("owner-forward").is_err());
    }

    #[test]
    fn a_number_that_means_nothing_is_refused_and_what_may_be_is_said() {
        for (line, what) in [
            ("owner --socket /x --mode ping --rate nan", "more than 0"),
            ("owner --socket /x --rate 0", "more than 0"),
            ("gen --socket /x --rate=-5", "more than 0"),
            ("vfio-owner --rate inf", "more than 0"),
            ("gen --socket /x --size 70000", "30 to 65535"),
            ("owner --socket /x --memory-mib 17592186044480", "1 to 8796093022207"),
            ("owner-forward --socket /x --socket /y --memory-mib 0", "1 to 8796093022207"),
            ("owner-forward --socket /x --socket /y --size 3", "30 to 65535"),
            ("owner-forward --socket /x --socket /y --seconds nan", "0 or more"),
            ("owner --socket /x --seconds nan", "0 or more"),
            ("vfio-owner --seconds nan", "0 or more"),
            ("echo --socket /x --seconds=-1", "0 or more"),
            ("forward --socket /x --socket /y --seconds inf", "0 or more"),
            ("show --socket /x --wait nan", "0 or more"),
            ("bridge --socket /x --socket /y --ageing 0", "more than 0"),
            ("bridge --socket /x --socket /y --stations 0", "1..=65536"),
            ("bridge --socket /x --socket /y --flood-limit 0", "1..=4294967295"),
        ] {
            let error = Args::try_parse_from(line.split(' ')).unwrap_err().to_string();
            assert!(error.contains(what), "{line}: {error}");
        }
    }
}
