//! The command line of the broker.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io::stdin;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing::{error, warn};
use tracing_subscriber::EnvFilter;
use vhost_pci_switch::config::{self, Config, Confine, LoadError, MAX_LINKS};
use vhost_pci_switch::confine::{self, Role};
use vhost_pci_switch::control::{client, render};
use vhost_pci_switch::demo;
use vhost_pci_switch::guardian::{self, Guardian};
use vhost_pci_switch::opener::{self, Opener};
use vhost_pci_switch::runtime::broker::Broker;
use vhost_pci_switch::runtime::links::Links;
use vhost_pci_switch::runtime::one_heap;
use vhost_pci_switch::vm::{self, VmArgs};

/// Where `status` and `watch` ask unless told otherwise.
const CONTROL_SOCKET: &str = "/run/vhost-pci-switch/control.sock";

/// Shows one VM's memory, as far as its IOMMU maps it, to another VM as a PCI BAR,
/// joins their notifications, and then stays out of the way.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the broker in the foreground until SIGTERM or SIGINT; SIGHUP: as `reload`.
    Run {
        /// The configuration file (docs/configuration.md).
        #[arg(long, value_name = "FILE.toml")]
        config: PathBuf,
    },
    /// Report every mistake in a configuration file, with its line.
    Check {
        /// The configuration file (docs/configuration.md).
        #[arg(long, value_name = "FILE.toml")]
        config: PathBuf,
    },
    /// Show the links of a running broker.
    Status {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
        /// The broker's control socket.
        #[arg(long, value_name = "SOCKET", default_value = CONTROL_SOCKET)]
        control_socket: PathBuf,
    },
    /// Show the links of a running broker, live, until interrupted.
    Watch {
        /// Seconds between two looks.
        #[arg(long, default_value_t = 1.0)]
        interval: f64,
        /// The broker's control socket.
        #[arg(long, value_name = "SOCKET", default_value = CONTROL_SOCKET)]
        control_socket: PathBuf,
    },
    /// Begin a link of a running broker: one that its configuration file, read again, names. With QMP
    /// sockets also plug its devices into running VMs.
    Plug {
        /// The link's name.
        link: String,
        /// The VMs.
        #[command(flatten)]
        vms: VmArgs,
        /// The broker's control socket.
        #[arg(long, value_name = "SOCKET", default_value = CONTROL_SOCKET)]
        control_socket: PathBuf,
    },
    /// End a link of a running broker: its peer loses the owner's memory, then both VMMs their
    /// connections. With QMP sockets first unplug its devices from running VMs.
    Unplug {
        /// The link's name.
        link: String,
        /// The VMs.
        #[command(flatten)]
        vms: VmArgs,
        /// The broker's control socket.
        #[arg(long, value_name = "SOCKET", default_value = CONTROL_SOCKET)]
        control_socket: PathBuf,
    },
    /// Have a running broker read its configuration file again: new links begin, others end, and those
    /// that are as before are not touched.
    Reload {
        /// The broker's control socket.
        #[arg(long, value_name = "SOCKET", default_value = CONTROL_SOCKET)]
        control_socket: PathBuf,
    },
    /// Run a broker and two guest models on this machine and show what they reach.
    Demo(demo::Args),
    /// Guard a broker's links: started by `run`.
    #[command(hide = true)]
    Guardian {
        /// How long the peers' VMMs have to let go of memory.
        #[arg(long, value_name = "MILLISECONDS")]
        timeout_ms: u64,
        /// The configuration's `confine`.
        #[arg(long)]
        confine: String,
    },
    /// Make a broker's sockets: started by `run`.
    #[command(hide = true)]
    Opener {
        /// The configuration file.
        #[arg(long, value_name = "FILE.toml")]
        config: PathBuf,
    },
    /// Run a guest program of the demo: the same as vhost-pci-guest.
    #[command(hide = true)]
    Guest {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match execute(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-pci-switch: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run { config } => run(&config)?,
        Command::Check { config } => {
            let links = load(&config)?.links.len();
            println!("{}: no mistakes, {links} link{}", config.display(), if links == 1 { "" } else { "s" });
        }
        Command::Status { json, control_socket } => {
            let report = client::status(&control_socket)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                print!("{}", render::broker(&report));
            }
        }
        Command::Watch { interval, control_socket } => watch(&control_socket, interval)?,
        Command::Plug { link, vms, control_socket } => {
            let link = vm::plug(&control_socket, &link, &vms)?;
            println!(
                "{} is plugged: its owner's VMM connects to {}, its peer's to {}",
                link.name,
                link.owner_socket.display(),
                link.peer_socket.display()
            );
        }
        Command::Unplug { link, vms, control_socket } => {
            vm::unplug(&control_socket, &link, &vms)?;
            println!("{link} is unplugged");
        }
        Command::Reload { control_socket } => reload(&control_socket)?,
        Command::Demo(args) => demo::run(&args)?,
        Command::Guardian { timeout_ms, confine } => {
            let policy = Confine::named(&confine).context("no policy of that name")?;
            // The broker's end of a socket is its standard input.
            let socket = stdin().as_fd().try_clone_to_owned()?;
            guardian::process::run(&socket, Duration::from_millis(timeout_ms), policy)?;
        }
        Command::Opener { config } => {
            // Likewise.
            let socket = UnixStream::from(stdin().as_fd().try_clone_to_owned()?);
            opener::process::run(&socket, &config)?;
        }
        Command::Guest { args } => guest_driver_model::programs::main(args)?,
    }
    Ok(())
}

fn load(path: &Path) -> anyhow::Result<Config> {
    config::load(path).map_err(|LoadError { mistakes, summary }| refuse(&mistakes, summary))
}

/// Prints each mistake, and gives what they come to.
fn refuse(mistakes: &[String], summary: String) -> anyhow::Error {
    mistakes.iter().for_each(|mistake| eprintln!("{mistake}"));
    anyhow::Error::msg(summary)
}

fn run(path: &Path) -> anyhow::Result<()> {
    one_heap();
    raise_descriptor_limit();
    // Registered before the first socket exists: none is left behind.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    // Both are programs, and starting one is what a confined process cannot.
    let (opener, config) =
        Opener::start(path).map_err(|error| refuse(error.mistakes(), error.to_string()))?;
    let guardian = Guardian::start(MAX_LINKS, config.confirm_timeout, config.confine)
        .context("the guardian does not start")?;
    // What follows takes no privilege.
    let bound = Broker::bind(&config, opener)?;
    let confinement = confine::enter(config.confine, &Role::Broker)?;
    if config.confine == Confine::Off {
        warn!("confine = false: the broker keeps its capabilities, and no filter limits its system calls");
    } else if !confinement.missing.is_empty() {
        warn!(missing = %confinement.missing.join("; "), "the broker is confined in part");
    }
    let broker = bound.serve(confinement, Some(guardian))?;
    for signal in signals.forever() {
        if signal != SIGHUP {
            break;
        }
        // It may wait for VMMs, and who ends the broker meanwhile is not to.
        let links = broker.links();
        let reload = thread::Builder::new().name("reload".into()).spawn(move || reload_by_signal(&links));
        if let Err(error) = reload {
            error!(%error, "the host gives no thread to reload with: the links are as before; send SIGHUP again");
        }
    }
    broker.leave();
    Ok(())
}

/// What `reload` would say goes to the log.
fn reload_by_signal(links: &Links) {
    match links.reload() {
        Ok(difference) => difference.problems.iter().for_each(|problem| warn!("{problem}")),
        Err(refused) => {
            refused.mistakes().iter().for_each(|mistake| error!("{mistake}"));
            error!("{refused}; the links are as before");
        }
    }
}

fn reload(socket: &Path) -> anyhow::Result<()> {
    let difference = client::reload(socket)?;
    let named = |what: &str, links: &[String]| {
        if !links.is_empty() {
            println!("{what}: {}", links.join(", "));
        }
    };
    named("plugged", &difference.plugged);
    named("unplugged", &difference.unplugged);
    named("changed", &difference.changed);
    match difference.problems.len() {
        0 => Ok(()),
        _ => bail!("{}", difference.problems.join("; ")),
    }
}

/// A link has tens of descriptors, those of its guests' memory and notifications: the soft limit
/// that a shell gives is for programs that use select(2).
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open descriptors stays as it is");
    }
}

fn watch(socket: &Path, interval: f64) -> anyhow::Result<()> {
    let pause = Duration::try_from_secs_f64(interval).context("the interval is not a number of seconds")?;
    loop {
        let report = client::status(socket)?;
        // Home, the text with each line's rest cleared, and the rest of the screen cleared.
        let text = render::broker(&report).replace('\n', "\x1b[K\n");
        print!("\x1b[H{text}\x1b[J");
        std::io::Write::flush(&mut std::io::stdout())?;
        thread::sleep(pause);
    }
}
